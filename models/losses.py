"""The whole objective of REPA-E (arXiv 2504.10483, section 3) on one page. Needs only torch.

Notation: an image x becomes latents z ~ q(z | x) and a reconstruction r in the VAE; u = bn(z) is z at unit
scale; e ~ N(0, 1) is noise, t in [0, 1] a time (0 is data, 1 is noise); y are the patch tokens that a frozen
vision encoder gives x, and h those of the SiT at block `encoder_depth`, put through its projector. In code
y and h are lists, a member per encoder: zs and zs_tilde, REPA's names, which have nothing to do with z.

    (1)  u_t = alpha_t u + sigma_t e                                        noisy_latents: the path
    (2)  v   = alpha'_t u + sigma'_t e                                      its velocity, the SiT's target
    (3)  L_diff  = |SiT(u_t, t) - v|^2, mean                                denoising_loss
    (4)  L_align = -mean over tokens of cos(y, h)                           proj_loss
    (5)  L_rec   = |x - r| + LPIPS(x, r) + 1e-6 KL(q(z | x) || N(0, 1))     reconstruction_losses
    (6)  L_gan   = -mean D(r)                                               gan_loss
    (7)  L_disc  = (mean relu(1 - D(x)) + mean relu(1 + D(r))) / 2          discriminator_loss

    SiT and projector minimise    L_diff + 0.5 L_align     with z held fixed: the paper's stop-gradient
    the VAE minimises             L_rec + 0.1 L_gan + 1.5 L_align
    the discriminator minimises   L_disc

To add a loss, write it here; in vae_losses, disc_losses or sit_losses of train_repae_e.py add it to what that
function minimises (its total) and, for the log, to its dict. The flag of its weight belongs into
FIXED_IN_A_RUN there.
All results are float32 at least, whatever the autocast type.
"""
import math

import torch
import torch.nn.functional as F

PATHS = ("linear", "cosine")
WEIGHTINGS = ("uniform", "lognormal")


def wide(x):
    """x in float32, or as it is if it is wider: losses and norms are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- diffusion: (1), (2), (3)

def interpolant(t, path_type="linear"):
    """(alpha, sigma, alpha', sigma') at times t, any shape: the path's coefficients, their derivatives in t.

    "linear": 1 - t and t; "cosine": cos(pi t / 2) and sin(pi t / 2) (SiT, arXiv 2401.08740, section 2).
    Raises ValueError for another path_type.
    """
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        half_pi = math.pi / 2
        sin, cos = torch.sin(half_pi * t), torch.cos(half_pi * t)
        return cos, sin, -half_pi * sin, half_pi * cos
    raise ValueError(f"unknown path type {path_type!r}: use {' or '.join(PATHS)}")


def noisy_latents(u, noise, t, path_type="linear"):
    """(1) and (2): (u_t, v), both [B, C, H, W].

    Args:
        u, noise: latents at unit scale and N(0, 1), [B, C, H, W].
        t: times, [B].
    """
    alpha, sigma, d_alpha, d_sigma = interpolant(t.view(-1, 1, 1, 1), path_type)
    return alpha * u + sigma * noise, d_alpha * u + d_sigma * noise


def sample_time(n, weighting="uniform", path_type="linear", generator=None, device=None):
    """n training times [n] in [0, 1]: U(0, 1), or lognormal: g = exp(N(0, 1)) is the ratio sigma / alpha."""
    if weighting == "uniform":
        return torch.rand(n, generator=generator, device=device)
    if weighting == "lognormal":
        g = torch.randn(n, generator=generator, device=device).exp()
        return g / (1 + g) if path_type == "linear" else torch.atan(g) * (2 / math.pi)
    raise ValueError(f"unknown weighting {weighting!r}: use {' or '.join(WEIGHTINGS)}")


def denoising_loss(velocity, target):
    """(3) per sample, [B]: mean squared error of velocity and target [B, C, H, W]."""
    return (wide(velocity) - target).square().mean((1, 2, 3))


# ---------------------------------------------------------------- alignment: (4)

def resize_tokens(tokens, count):
    """Tokens [B, T, D] of a square grid, row-major, to [B, count, D] by bilinear interpolation.

    The same tensor if T == count.

    Raises ValueError if T or count is not a square number.
    """
    if tokens.shape[1] == count:
        return tokens
    source, target = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if source ** 2 != tokens.shape[1] or target ** 2 != count:
        raise ValueError(f"cannot resize {tokens.shape[1]} tokens to {count}: "
                         "a square grid is needed on both sides")
    grid = tokens.transpose(1, 2).unflatten(2, (source, source))             # [B, D, h, w]
    grid = F.interpolate(grid, size=(target, target), mode="bilinear")
    return grid.flatten(2).transpose(1, 2)


def spatial_norm(tokens, gamma=1.0):
    """Tokens [B, T, D] with mean 0 and spread 1 over T, per image and channel.

    (f - gamma mean_T f) / (std_T f + 1e-6), gamma 0.6 to 1 (iREPA, arXiv 2512.10794): what tells one place
    from another stays, what the whole image is goes.
    """
    tokens = wide(tokens)
    return (tokens - gamma * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)


def proj_loss(zs, zs_tilde):
    """(4): minus the cosine similarity, averaged over tokens, samples and encoders; a scalar in [-1, 1].

    REPA's loss (arXiv 2410.06940, eq. 8).

    Args:
        zs: list of target tokens [B, T', D_k], one per encoder, any square grid.
        zs_tilde: list of projected SiT tokens [B, T, D_k], in the same order.
    """
    losses = []
    for z, z_tilde in zip(zs, zs_tilde, strict=True):
        # In half precision the norm of a small vector is 0 and the cosine NaN.
        z, z_tilde = wide(z), wide(z_tilde)
        z = resize_tokens(z, z_tilde.shape[1])
        cosine = (F.normalize(z, dim=-1) * F.normalize(z_tilde, dim=-1)).sum(-1)    # [B, T]
        losses.append(-cosine.mean())
    return torch.stack(losses).mean()


# ---------------------------------------------------------------- the VAE's own: (5), (6), (7)

def reconstruction_losses(images, recon, posterior, lpips=None, reconstruction_weight=1.0,
                          perceptual_weight=1.0, kl_weight=1e-6, distance="l1"):
    """(5), each term with its weight, as a dict of scalars; LPIPS and KL are left out at weight 0.

    Args:
        images, recon: x and r, [B, 3, H, W] in [-1, 1].
        posterior: models/vae.py Posterior of the images.
        lpips: callable (images, recon) -> [B]; may be None at perceptual_weight 0.
        distance: of the first term: "l1" as in the released code, "l2" as in the paper's text.
    """
    difference = images - wide(recon)
    error = difference.abs() if distance == "l1" else difference.square()
    losses = {"reconstruction_loss": reconstruction_weight * error.mean()}
    if kl_weight > 0:
        losses["kl_loss"] = kl_weight * posterior.kl().mean()
    if perceptual_weight > 0:
        losses["perceptual_loss"] = perceptual_weight * wide(lpips(images, recon)).mean()
    return losses


def gan_loss(discriminator, recon):
    """(6). Its gradient belongs to recon: take it with autograd.grad, and leave the discriminator alone."""
    return -wide(discriminator(recon)).mean()


def discriminator_loss(discriminator, images, recon):
    """(7), the hinge loss; recon is detached.

    Returns (d_loss, logits_real, logits_fake), scalars; the logits are means, for the log. The discriminator
    sees the images first: in train mode each call updates its running statistics.
    """
    real = wide(discriminator(images))
    fake = wide(discriminator(recon.detach()))
    d_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return d_loss, real.detach().mean(), fake.detach().mean()
