"""The VAE's own training loss, L1 + LPIPS + KL + PatchGAN, and the discriminator's. Needs only torch.

Weights as in the paper's recipe: 1, 1, 1e-6, 0.1; the GAN weight is constant, not adaptive. All results are float32
at least, whatever the autocast type.
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


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reconstruction_losses(images, recon, posterior, lpips=None, reconstruction_weight=1.0, perceptual_weight=1.0,
                          kl_weight=1e-6):
    """The three losses that compare an image with its reconstruction, weighted, as a dict of scalars.

    Args:
        images, recon: [B, 3, H, W] in [-1, 1].
        posterior: models/vae.py Posterior of the images.
        lpips: callable (images, recon) -> [B]; unused (may be None) at perceptual_weight 0.
    """
    losses = {"reconstruction_loss": reconstruction_weight * (images - _wide(recon)).abs().mean(),
              "kl_loss": kl_weight * posterior.kl().mean()}
    if perceptual_weight > 0:
        losses["perceptual_loss"] = perceptual_weight * _wide(lpips(images, recon)).mean()
    return losses


def gan_loss(discriminator, recon):
    """The generator's loss, -mean D(recon). The gradient belongs to recon: take it with autograd.grad, leave D alone."""
    return -_wide(discriminator(recon)).mean()


def discriminator_loss(discriminator, images, recon, lecam_weight=0.0, lecam_means=None):
    """Hinge loss 0.5 (mean relu(1 - D(images)) + mean relu(1 + D(recon))); recon is detached.

    With lecam_weight, LeCam regularisation on top (Tseng et al., arXiv 2104.03310, eq. 3): no logit may run away from
    lecam_means [2], the moving averages of the mean logits of images and of reconstructions, to the far side of them.
    Returns (d_loss, logits_real, logits_fake), scalars; the logits are means, for the log. D sees the images first:
    in train mode each call updates its running statistics.
    """
    real = _wide(discriminator(images))
    fake = _wide(discriminator(recon.detach()))
    d_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if lecam_weight > 0:
        d_loss = d_loss + lecam_weight * (F.relu(real - lecam_means[1]).square().mean()
                                          + F.relu(lecam_means[0] - fake).square().mean())
    return d_loss, real.detach().mean(), fake.detach().mean()
