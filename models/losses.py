"""The VAE's own training loss, L1 + LPIPS + KL + PatchGAN, and the discriminator's. Needs only torch.

Weights as in the paper's recipe: 1, 1, 1e-6, 0.1; the GAN weight is constant, not adaptive. All results are float32
at least, whatever the autocast type.
"""
import torch
import torch.nn.functional as F


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
