"""The path between data and noise: interpolant, velocity target, time sampling. Needs only torch.

x_t = alpha_t x + sigma_t e, with t = 0 data and t = 1 pure noise (SiT, arXiv 2401.08740, section 2).
"""
import math

import torch

PATHS = ("linear", "cosine")
WEIGHTINGS = ("uniform", "lognormal")


def interpolant(t, path_type="linear"):
    """(alpha, sigma, d_alpha, d_sigma) at times t (any shape): the coefficients and their derivatives in t."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        half_pi = math.pi / 2
        sin, cos = torch.sin(half_pi * t), torch.cos(half_pi * t)
        return cos, sin, -half_pi * sin, half_pi * cos
    raise ValueError(f"unknown path type {path_type!r}: use {' or '.join(PATHS)}")


def noisy_latents(x, noise, t, path_type="linear"):
    """Args: normalised latents x and noise, both [B, C, H, W], t [B]. Returns (x_t, velocity target), same shape."""
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def sample_time(n, weighting="uniform", path_type="linear", generator=None, device=None):
    """n training times [n] in [0, 1]: U(0, 1), or lognormal: g = exp(N(0, 1)) is the ratio sigma / alpha."""
    if weighting == "uniform":
        return torch.rand(n, generator=generator, device=device)
    if weighting == "lognormal":
        g = torch.randn(n, generator=generator, device=device).exp()
        return g / (1 + g) if path_type == "linear" else torch.atan(g) * (2 / math.pi)
    raise ValueError(f"unknown weighting {weighting!r}: use {' or '.join(WEIGHTINGS)}")


def denoising_loss(velocity, target):
    """Mean squared error per sample, [B], in float32 at least; velocity and target [B, C, H, W]."""
    velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
    return (velocity - target).square().mean((1, 2, 3))
