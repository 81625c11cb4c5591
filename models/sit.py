"""SiT, the scalable interpolant transformer, with REPA-E's latent batch norm and alignment projectors.

The network of Ma et al., arXiv 2401.08740 (a DiT, arXiv 2212.09748, that predicts velocity), tapped after
block `encoder_depth` for representation alignment (REPA, arXiv 2410.06940). State-dict names are those of
the REPA-E release. Losses live elsewhere: this file holds networks only, and needs only torch and timm.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch.utils.checkpoint import checkpoint as recompute


def pos_embed_2d(dim, grid):
    """Sine/cosine position table [1, grid*grid, dim], column first: [sin(cw), cos(cw), sin(rw), cos(rw)].

    w_k = 10000^(-k/q), k = 0..q-1, q = dim/4; computed in float64, given in float32.
    """
    w = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, col = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    cw, rw = (axis.reshape(-1, 1) * w for axis in (col, row))          # [T, dim/4]
    return torch.cat([cw.sin(), cw.cos(), rw.sin(), rw.cos()], dim=1)[None].float()


def build_projector(hidden_size, projector_dim, z_dim):
    """Three-layer MLP from SiT tokens [..., hidden_size] to an encoder's width [..., z_dim].

    REPA, section 3.
    """
    return nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(),
                         nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                         nn.Linear(projector_dim, z_dim))


PROJECTORS = ("mlp", "conv")


class ConvProjector(nn.Conv2d):
    """One 3x3 convolution on the token grid, SiT tokens [B, T, hidden_size] to [B, T, z_dim].

    iREPA's (arXiv 2512.10794) in place of REPA's MLP: a token is aligned together with its neighbours.
    """

    def __init__(self, hidden_size, z_dim):
        super().__init__(hidden_size, z_dim, kernel_size=3, padding=1)

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))           # [B, D, h, w]
        return super().forward(grid).flatten(2).transpose(1, 2)


def modulate(x, shift, scale):
    """x [B, T, D] scaled and shifted per sample; shift, scale [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """Times t [B] in [0, 1] to vectors [B, hidden_size]: 256 sinusoids (cosine first), then an MLP."""

    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.half = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        # Always float32: half precision cannot tell neighbouring times apart.
        k = torch.arange(self.half, dtype=torch.float32, device=t.device)
        f = torch.exp(-math.log(10000) * k / self.half)
        angles = t.float()[:, None] * f
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels [B] to vectors [B, hidden_size].

    Where labels may be dropped, for guidance, the table has a null row of index num_classes.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


class SiTBlock(nn.Module):
    """Transformer block whose norms and branches are modulated by the condition c [B, D] (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm,
                              norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio),
                       act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens [B, T, D] to patches [B, T, p*p*C]."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Velocity network v(x_t, t, y) on latents, with `bn` (latent statistics) and `projectors` (to encoders).

    Args:
        input_size: height and width of the latents, a multiple of patch_size.
        class_dropout_prob: above 0, the label table has a null row, index num_classes. Replacing labels by it
            with that probability in training is the caller's business: nothing here is random.
        encoder_depth: the block, counted from 1, whose output tokens go to the projectors.
        z_dims: width of each target encoder, one projector each; () for none.
        projector: their kind, "mlp" (build_projector) or "conv" (ConvProjector).
        learn_pos_embed: train the position table, as the reference does by accident; else it is a buffer.
    """

    # True: compute the blocks' activations again in the backward pass instead of keeping them.
    grad_checkpoint = False

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, encoder_depth=8, z_dims=(768,),
                 projector_dim=2048, projector="mlp", qk_norm=False, bn_momentum=0.1, learn_pos_embed=False):
        super().__init__()
        if not 1 <= encoder_depth <= depth:
            raise ValueError(f"encoder depth {encoder_depth} is not a block of this SiT, which has 1 to "
                             f"{depth}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.encoder_depth = num_classes, encoder_depth
        table = pos_embed_2d(hidden_size, input_size // patch_size)
        if learn_pos_embed:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm)
                                     for _ in range(depth)])
        build = {"mlp": lambda z_dim: build_projector(hidden_size, projector_dim, z_dim),
                 "conv": lambda z_dim: ConvProjector(hidden_size, z_dim)}[projector]
        self.projectors = nn.ModuleList([build(z_dim) for z_dim in z_dims])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        # No affine part: a learnt scale would let the VAE's latents and the noise level drift apart.
        self.bn = nn.BatchNorm2d(in_channels, eps=1e-4, momentum=bn_momentum, affine=False)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier-uniform linear layers, N(0, 0.02) embeddings, zeros where branches start as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        zeros = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in zeros + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def normalize(self, z):
        """Latents z [B, C, H, W] to unit scale with bn's running statistics, whatever the mode; bn stays.

        The training update instead calls self.bn(z) in train mode: batch statistics, and the running ones
        follow.
        """
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return F.batch_norm(z, self.bn.running_mean, self.bn.running_var, eps=self.bn.eps)

    def latents_stats(self):
        """(latents_scale, latents_bias), both [1, C, 1, 1], for z = x / latents_scale + latents_bias.

        The reference leaves bn's eps out here, though bn itself uses it.
        """
        return torch.rsqrt(self.bn.running_var).view(1, -1, 1, 1), self.bn.running_mean.view(1, -1, 1, 1)

    def unpatchify(self, x):
        """Tokens [B, T, p*p*C] (row in patch, column in patch, channel) to latents [B, C, H, W]."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.reshape(-1, grid, grid, p, p, self.in_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, self.input_size, self.input_size)

    def forward(self, x, t, y, align_only=False):
        """Args: x normalised noisy latents [B, C, H, W], t [B] in [0, 1] (1 is noise), y labels [B] (int64).

        Returns (velocity [B, C, H, W], zs_tilde: list of projected tokens [B, T, z_dim], one per encoder).
        With align_only the network stops after block encoder_depth and the velocity is None.
        """
        x = self.x_embedder(x) + self.pos_embed                  # [B, T, D]
        c = self.t_embedder(t) + self.y_embedder(y)              # [B, D]
        zs_tilde = []
        # Not in the VAE's update, which passes frozen weights by functional_call: they are out of place again
        # by the backward pass, where the blocks would be computed anew; and little is kept there.
        learns = torch.is_grad_enabled() and self.x_embedder.proj.weight.requires_grad
        save_memory = self.grad_checkpoint and learns
        for number, block in enumerate(self.blocks, start=1):
            if save_memory:
                # preserve_rng_state=False: nothing in a block is random.
                x = recompute(block, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c)
            if number == self.encoder_depth:
                zs_tilde = [projector(x) for projector in self.projectors]
                if align_only:
                    return None, zs_tilde
        return self.unpatchify(self.final_layer(x, c)), zs_tilde


# depth, width, heads, projector width; Ti is for demos and tests
SiT_SIZES = {"XL": (28, 1152, 16, 2048), "L": (24, 1024, 16, 2048), "B": (12, 768, 12, 2048),
             "S": (12, 384, 6, 2048), "Ti": (6, 192, 3, 256)}


def _constructor(size, patch_size):
    depth, hidden_size, num_heads, projector_dim = SiT_SIZES[size]
    return lambda **kwargs: SiT(**{"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads,
                                   "patch_size": patch_size, "projector_dim": projector_dim, **kwargs})


# name -> constructor: SiT_models["SiT-XL/2"](input_size=32, in_channels=4, num_classes=1000)
SiT_models = {f"SiT-{size}/{patch}": _constructor(size, patch)
              for size in SiT_SIZES for patch in (1, 2, 4, 8)}
