"""Representation alignment (REPA, arXiv 2410.06940, eq. 8): SiT tokens should point where an encoder's tokens point.

The projector itself belongs to the SiT's state dict and is built in models/sit.py. Needs only torch.
"""
import math

import torch
import torch.nn.functional as F


def resize_tokens(tokens, count):
    """Tokens [B, T, D] of a square grid, row-major, to [B, count, D] by bilinear interpolation; the same if T == count.

    Raises ValueError if T or count is not a square number.
    """
    if tokens.shape[1] == count:
        return tokens
    source, target = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if source ** 2 != tokens.shape[1] or target ** 2 != count:
        raise ValueError(f"cannot resize {tokens.shape[1]} tokens to {count}: a square grid is needed on both sides")
    grid = tokens.transpose(1, 2).unflatten(2, (source, source))             # [B, D, h, w]
    grid = F.interpolate(grid, size=(target, target), mode="bilinear")
    return grid.flatten(2).transpose(1, 2)


def proj_loss(zs, zs_tilde):
    """Alignment loss: minus the cosine similarity, averaged over tokens, samples and encoders; a scalar in [-1, 1].

    Args:
        zs: list of target tokens [B, T', D_k], one per encoder, any square grid.
        zs_tilde: list of projected SiT tokens [B, T, D_k], in the same order.
    Computed in float32 at least: a norm of half-precision zeros is NaN.
    """
    losses = []
    for z, z_tilde in zip(zs, zs_tilde, strict=True):
        z, z_tilde = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (z, z_tilde))
        z = resize_tokens(z, z_tilde.shape[1])
        cosine = (F.normalize(z, dim=-1) * F.normalize(z_tilde, dim=-1)).sum(-1)  # norms are clamped at 1e-12
        losses.append(-cosine.mean())
    return torch.stack(losses).mean()
