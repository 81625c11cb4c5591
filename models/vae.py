"""AutoencoderKL, the convolutional VAE of latent diffusion (Rombach et al., arXiv 2112.10752).

State-dict names are those of CompVis. f8d4 is SD-VAE, f16d32 is IN-VAE and VA-VAE, f8d16 the
16-channel kind of FLUX and SD-3.5 (no quant convolutions), f16d16 the KL-16 of MAR and later work, f16d16-ldm
that of LDM, with attention in the decoder too, f4d4 and f4d16 tiny ones for small images. Needs only torch.
"""
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute


class Posterior:
    """Diagonal Gaussian over latents, from the encoder's moments [B, 2C, h, w] (mean, log variance).

    Computed in float32 at least; the log variance is clamped to [-30, 20].
    """

    def __init__(self, moments):
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, eps=None):
        """mean + std * eps; eps [B, C, h, w] ~ N(0, 1), drawn if not given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if eps is None else eps)

    def kl(self):
        """KL divergence to N(0, 1), summed over C, h, w: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum((1, 2, 3))


def no_autocast(x):
    """Context without autocast on the device of x ("meta", on which FLOPs are counted, counts as the CPU)."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


# Before torch 2.13 CUDA's kernel rounds mean and 1/std to the type of its input before it uses them.
ROUNDED_STATISTICS = torch.__version__ < (2, 13)


class GroupNorm(nn.GroupNorm):
    """GroupNorm (32 groups from 128 channels on) that keeps the type of its input.

    Statistics are float32 all the same, but autocast would store a float32 copy of every activation, half of
    the VAE's memory.

    Narrow layers (f4d4) have groups of 4: groups of one channel would normalise an image's colour away.
    """

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32) if ROUNDED_STATISTICS and x.is_cuda else x.dtype
        with no_autocast(x):
            y = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
            return y.to(x.dtype)


def recomputing_input(function, x):
    """function(x), in which nothing is random, keeping only x for the backward pass.

    A convolution at its end is not computed twice: recomputation stops as soon as everything that the
    backward pass asks for is there, and that is just before it.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return recompute(function, x, use_reentrant=False, preserve_rng_state=False)


def norm_silu_conv(norm, conv, x):
    """conv(silu(norm(x))) for x [B, C, H, W].

    The normalised and the activated copy of x, more than half of a VAE's memory, are recomputed in the
    backward pass: 12 GiB less in f8d4 at batch 32, 256 pixels, for some 3 % of the time.
    """
    return recomputing_input(lambda x: conv(F.silu(norm(x))), x)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h)
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """One-head self-attention over the positions of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT.contiguous()[:, None]      # [B, 1, HW, C]
                   for conv in (self.q, self.k, self.v))
        if torch.compiler.is_compiling():
            # One head of 512 channels is too wide for the fast kernels: two products and a softmax, compiled,
            # take a fifth of the time, for a matrix [B, 1, HW, HW].
            with no_autocast(x):
                h = F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the released weights expect


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        def function(x):
            with no_autocast(x):  # autocast would make a float32 copy of the VAE's largest tensor
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x)
        return recomputing_input(function, x)


def _middle(channels):
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels), attn_1=AttnBlock(channels),
                                     block_2=ResnetBlock(channels, channels)))


# With save_memory: the positions of a feature map from which a level is recomputed (smaller ones hold little
# memory and much of the arithmetic), and how many positions of all images together it works on at a time.
LARGE, CHUNK = 128 * 128, 4 * 256 * 256


class Level(nn.Module):
    """Blocks of one resolution, then the change to the next one, which Encoder and Decoder put in.

    With save_memory a large level keeps only its input for the backward pass, which makes the rest again, for
    a few images at a time: images do not see each other here.
    """

    save_memory = False

    def __init__(self, in_channels, out_channels, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(in_channels if i == 0 else out_channels, out_channels)
                                    for i in range(blocks)])
        self.attn = nn.ModuleList([AttnBlock(out_channels) if attention else nn.Identity()
                                   for _ in range(blocks)])
        self.downsample = self.upsample = nn.Identity()

    def layers(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))

    def forward(self, h):
        positions = h[0, 0].numel()
        if not self.save_memory or not torch.is_grad_enabled() or positions < LARGE:
            return self.layers(h)
        parts = [recomputing_input(self.layers, part) for part in h.split(max(1, CHUNK // positions))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Encoder(nn.Module):
    """Images [B, 3, H, W] to [B, 2C, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, latent_channels, base, multipliers, blocks, attention_levels):
        super().__init__()
        widths = [base * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[i - 1] if i else base, width, blocks, i in attention_levels)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.output(self.mid(h))

    def output(self, h):
        return norm_silu_conv(self.norm_out, self.conv_out, h)


class Decoder(nn.Module):
    """Latents [B, C, h, w] to images [B, 3, h*f, w*f], nominally in [-1, 1] and not squashed."""

    def __init__(self, latent_channels, base, multipliers, blocks, attention_levels):
        super().__init__()
        widths = [base * m for m in multipliers]
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        levels = []
        for i in reversed(range(len(widths))):
            level = Level(widths[min(i + 1, len(widths) - 1)], widths[i], blocks + 1, i in attention_levels)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.insert(0, level)  # up.0 is the level nearest the image, though it runs last
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.output(h)

    def output(self, h):
        return norm_silu_conv(self.norm_out, self.conv_out, h)


class AutoencoderKL(nn.Module):
    """VAE from images in [-1, 1] to latents without any scale factor (the SiT's bn takes that part).

    Args:
        latent_channels: C.
        base, multipliers: widths of the levels; the downsampling factor is 2^(len(multipliers) - 1).
        blocks: residual blocks per encoder level; the decoder has one more.
        attention_levels: levels with attention after each block (the middle always has one).
        decoder_attention: whether these are the decoder's levels too.
        quant: with the 1x1 quant_conv and post_quant_conv.
    """

    def __init__(self, latent_channels, base=128, multipliers=(1, 2, 4, 4), blocks=2, attention_levels=(),
                 decoder_attention=True, quant=True):
        super().__init__()
        self.latent_channels = latent_channels
        self.downsample = 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(latent_channels, base, multipliers, blocks, attention_levels)
        self.decoder = Decoder(latent_channels, base, multipliers, blocks,
                               attention_levels if decoder_attention else ())
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant else nn.Identity()

    def save_memory(self):
        """Keep only the inputs of large levels for the backward pass and make the rest again.

        15 % more arithmetic in f8d4 at 256 pixels.
        """
        for level in (*self.encoder.down, *self.decoder.up):
            level.save_memory = True

    def moments(self, x):
        """Images [B, 3, H, W] in [-1, 1] to the posterior's moments [B, 2C, H/f, W/f]."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x):
        """Images [B, 3, H, W] in [-1, 1] to their Posterior."""
        return Posterior(self.moments(x))

    def decode(self, z):
        """Latents [B, C, h, w] to images [B, 3, h*f, w*f], nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, eps=None, decoder_noise=None):
        """Returns (moments [B, 2C, h, w], z = sampled latents [B, C, h, w], recon [B, 3, H, W]).

        decoder_noise [B, C, h, w] is added to the latents that the decoder sees, not to the z returned.
        """
        moments = self.moments(x)
        z = Posterior(moments).sample(eps)
        return moments, z, self.decode(z if decoder_noise is None else z + decoder_noise)


# name -> constructor: VAE_models["f8d4"](). f = downsampling factor, d = latent channels.
VAE_models = {
    "f8d4": lambda: AutoencoderKL(4, multipliers=(1, 2, 4, 4)),
    "f16d32": lambda: AutoencoderKL(32, multipliers=(1, 1, 2, 2, 4), attention_levels=(4,)),
    "f8d16": lambda: AutoencoderKL(16, multipliers=(1, 2, 4, 4), quant=False),
    "f16d16": lambda: AutoencoderKL(16, multipliers=(1, 1, 2, 2, 4), attention_levels=(4,),
                                    decoder_attention=False),
    "f16d16-ldm": lambda: AutoencoderKL(16, multipliers=(1, 1, 2, 2, 4), attention_levels=(4,)),
    "f4d4": lambda: AutoencoderKL(4, base=32, multipliers=(1, 1, 2), blocks=1),
    "f4d16": lambda: AutoencoderKL(16, base=16, multipliers=(1, 1, 2), blocks=1),
}
