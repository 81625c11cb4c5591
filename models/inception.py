"""The FID Inception network ("2015-12-05", 1008 outputs) with TensorFlow 1's bilinear resize.

    net = FIDInception(); net.load_state_dict(torch.load("pt_inception-2015-12-05-6726825d.pth"))
    pool, spatial = net(images)              # images [N, H, W, 3] uint8, any H and W
    logits = net.logits(pool)                # bias-free, for the Inception Score

Architecture after Szegedy et al. 2015 (arXiv 1512.00567) as frozen in TensorFlow's 2015-12-05 graph, which
differs from torchvision's inception_v3: average pools do not count their padding and the last block pools
with a maximum. Names equal those of the PyTorch weight file (472 entries), so that it loads with strict=True.
Needs only torch; inference only.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d"  # the first digits of the file's sha256, as in its name
SIDE = 299                   # input side of the network
POOL_DIM, SPATIAL_DIM, CLASSES = 2048, 17 * 17 * 7, 1008


def resize_tf1(images, size=SIDE):
    """Bilinear resize as TensorFlow 1 does it: corners not aligned, no half-pixel centres, no antialiasing.

    images [N, H, W, C], uint8 or float. Returns float32 [N, size, size, C] in the same value range, bit for
    bit equal to TensorFlow's CPU kernel. Shrinking by more than two skips pixels, as it does there.
    """
    x = images.float()
    for axis in (2, 1):      # along x first, for both rows; then along y
        length = x.shape[axis]
        pos = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
        low = pos.long()
        high = (low + 1).clamp_(max=length - 1)
        t = (pos - low).to(x.device).view(-1, *[1] * (3 - axis))
        a, b = x.index_select(axis, low.to(x.device)), x.index_select(axis, high.to(x.device))
        x = b.sub_(a).mul_(t).add_(a)      # a + (b - a) t, each operation rounded to float32
    return x


def check_images(images):
    """Raise a one-line ValueError unless images are [N, H, W, 3] in 0..255."""
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images are [N, H, W, 3], not {list(images.shape)}")
    if images.is_floating_point():
        low, high = (x.item() for x in images.aminmax())
        if not (low >= 0 and high <= 255):      # true for NaN too
            raise ValueError(f"images are in 0..255, and these reach from {low:g} to {high:g}")
        if 0 < high <= 1:
            raise ValueError("images are in 0..255, and these look like floats in [0, 1]; multiply by 255")


class BatchNorm(nn.Module):
    """The four inference-time entries of a batch norm (the weight file has no num_batches_tracked)."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


class Conv(nn.Module):
    """Convolution, batch norm (eps 0.001) and ReLU, run as one convolution and ReLU."""

    def __init__(self, cin, cout, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = BatchNorm(cout)

    def forward(self, x):
        # y = (conv(x) - mean) * scale + bias, scale = weight / sqrt(var + eps): one convolution with a bias
        scale = self.bn.weight * (self.bn.running_var + 0.001).rsqrt()
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.bn.bias - self.bn.running_mean * scale
        return F.relu_(F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding))


def _avg(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """Mixed_5b, 5c, 5d at 35x35."""

    def __init__(self, cin, pool):
        super().__init__()
        self.branch1x1 = Conv(cin, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(cin, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(cin, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(cin, pool, 1)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        single = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_avg(x))], 1)


class InceptionB(nn.Module):
    """Mixed_6a: 35x35 to 17x17."""

    def __init__(self, cin):
        super().__init__()
        self.branch3x3 = Conv(cin, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(cin, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class InceptionC(nn.Module):
    """Mixed_6b to 6e at 17x17, factorised 7x7 convolutions."""

    def __init__(self, c):
        super().__init__()
        wide, high = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, c, 1), Conv(c, c, **wide)
        self.branch7x7_3 = Conv(c, 192, **high)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, c, 1), Conv(c, c, **high)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c, c, **wide), Conv(c, c, **high)
        self.branch7x7dbl_5 = Conv(c, 192, **wide)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_avg(x))], 1)


class InceptionD(nn.Module):
    """Mixed_7a: 17x17 to 8x8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class InceptionE(nn.Module):
    """Mixed_7b and 7c at 8x8; `pool`: the 3x3 pooling of branch_pool (average in 7b, maximum in 7c)."""

    def __init__(self, cin, pool):
        super().__init__()
        wide, high = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1 = Conv(cin, 320, 1)
        self.branch3x3_1 = Conv(cin, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **wide), Conv(384, 384, **high)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(cin, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **wide), Conv(384, 384, **high)
        self.branch_pool = Conv(cin, 192, 1)

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], 1)


class FIDInception(nn.Module):
    """images [N, H, W, 3] in 0..255 (uint8 or float) -> (pool [N, 2048], spatial [N, 2023]), float32.

    Other layouts and ranges are a ValueError; no gradient. spatial: the first 7 channels of Mixed_6d's 1x1
    branch after ReLU, 17x17, flattened as (row, column, channel).
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = InceptionA(192, 32), InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(128), InceptionC(160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(160), InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, _avg)
        self.Mixed_7c = InceptionE(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(POOL_DIM, CLASSES)
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):
        check_images(images)
        x = resize_tf1(images).sub_(128).mul_(0.0078125)
        x = x.permute(0, 3, 1, 2)      # NCHW shape over NHWC memory: channels_last, which convolutions like
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :7].permute(0, 2, 3, 1).reshape(len(x), SPATIAL_DIM)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial

    def logits(self, pool):
        """pool [N, 2048] -> logits [N, 1008] without the bias, as the Inception Score takes them."""
        return pool @ self.fc.weight.T
