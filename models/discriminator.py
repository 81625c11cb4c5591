"""PatchGAN discriminator (Isola et al., arXiv 1611.07004), names as in the released REPA-E weights.

Needs only torch.
"""
import torch.nn as nn


class Discriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to a logit per 70x70 patch, [B, 1, H/8 - 2, W/8 - 2]; H, W at least 32.

    From scratch: convolutions N(0, 0.02), batch norm weights N(1, 0.02), biases 0.
    """

    def __init__(self, input_nc=3, ndf=64, n_layers=3):
        super().__init__()
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for i in range(1, n_layers + 1):
            previous, width = width, ndf * min(2 ** i, 8)
            # No bias: the batch norm that follows has one.
            layers += [nn.Conv2d(previous, width, 4, stride=2 if i < n_layers else 1, padding=1, bias=False),
                       nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)
