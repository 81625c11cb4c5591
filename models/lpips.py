"""LPIPS perceptual distance on VGG16 (Zhang et al., arXiv 1801.03924). Needs torch and torchvision."""
import torch
import torch.nn as nn
import torchvision

# Index in vgg16.features -> channels: relu1_2 ... relu5_3.
WIDTHS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}


class LPIPS(nn.Module):
    """Distance [B] between images img0 and img1 [B, 3, H, W], both in [-1, 1], H and W at least 16.

    The network is made with random weights; load_pretrained fills in the real ones. It is frozen: gradients
    pass to the images only, and only once (not for gradients of gradients). Everything is float32 at least,
    whatever the autocast type.
    """

    chunk = 8  # images whose features are in memory at a time where img1 needs a gradient

    def __init__(self):
        super().__init__()
        for name, values in (("shift", [-0.030, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.features = torchvision.models.vgg16(weights=None).features[:30]
        for module in self.features:
            if isinstance(module, nn.ReLU):
                module.inplace = True
        for k, width in enumerate(WIDTHS.values()):
            linear = nn.Module()
            linear.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            setattr(self, f"lin{k}", linear)
        self.requires_grad_(False)

    def vgg_features(self, x):
        """Images in [-1, 1] to five feature maps of unit length along the channels."""
        h = (x - self.shift) / self.scale
        outputs = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in WIDTHS:
                # vector_norm has a zero gradient at zero, where sqrt(sum of squares) gives NaN
                outputs.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return outputs

    def layer_terms(self, img0, img1):
        """The distance's five terms, [B, 5]."""
        # "meta", where FLOPs are counted, has no autocast.
        with torch.autocast("cuda" if img0.is_cuda else "cpu", enabled=False):
            img0, img1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (img0, img1))
            with torch.set_grad_enabled(torch.is_grad_enabled() and img0.requires_grad):
                features0 = self.vgg_features(img0)
            features1 = self.vgg_features(img1)
            terms = [(weight * (f0 - f1).square()).sum(1).mean((1, 2)) for weight, f0, f1 in
                     zip((getattr(self, f"lin{k}").model[1].weight for k in range(5)), features0, features1)]
            return torch.stack(terms, dim=1)

    def forward(self, img0, img1):
        if not torch.is_grad_enabled() or not img1.requires_grad or img0.requires_grad:
            return self.layer_terms(img0, img1).sum(1)
        # VGG's float32 features are the largest tensors of a training step. So the gradient at img1 is taken
        # here, a few images at a time, before the rest of the backward pass is in memory; only it is kept.
        distances, gradients = [], []
        for part0, part1 in zip(img0.split(self.chunk), img1.detach().split(self.chunk)):
            part1 = part1.to(torch.promote_types(part1.dtype, torch.float32)).requires_grad_()
            distance = self.layer_terms(part0, part1).sum(1)
            gradients += torch.autograd.grad(distance.sum(), part1)
            distances.append(distance.detach())
        gradient = torch.cat(gradients)
        product = (img1.to(gradient.dtype) * gradient).flatten(1).sum(1)
        return torch.cat(distances) + (product - product.detach())  # the distances, with that gradient


def load_pretrained(lpips, vgg_state, linear_state):
    """Fill `lpips` from torchvision's vgg16 state dict and the published lpips v0.1 vgg.pth; returns it."""
    features = {k: v for k, v in vgg_state.items() if k.startswith("features.")}
    lpips.load_state_dict({**features, **linear_state})
    return lpips
