"""What reconstructions and latents are like, as numbers and colours: PSNR, SSIM, latent moments, spatial variance,
total variation, principal components, CKNNA. Pure functions on tensors; needs only torch.
"""
import torch
import torch.nn.functional as F


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each pair, [B]; a, b [B, 3, H, W] in [0, 255]. Infinite for equal images."""
    mse = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(a, b):
    """Structural similarity of each pair, [B]; a, b [B, 3, H, W] in [0, 255], H and W at least 11.

    As in its paper (Wang et al. 2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, windows inside
    the image only; the mean of the three channels. In float64, because variances are differences of large numbers.
    Raises ValueError for smaller images.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {a.shape[-2]}x{a.shape[-1]}")
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=a.device).square() / (2 * 1.5 ** 2))
    window /= window.sum()

    def blur(x):
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11))

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)))
    return similarity.flatten(1).mean(1).view(len(a), -1).mean(1)


def latent_moments(posterior):
    """Mean and mean square of latents z ~ posterior per channel, [2, C] float64: the statistics of a batch norm on z.

    `posterior` has mean and std [B, C, h, w]. The spread of the posterior counts: E z^2 = mean^2 + std^2.
    """
    return torch.stack([posterior.mean, posterior.mean.square() + posterior.std.square()]).double().mean((1, 3, 4))


def spatial_variance(z):
    """Variance of latents z [B, C, h, w] over the positions of an image, mean over channels: [B]. 0 for a flat latent.

    The paper reports 17.06 for SD-VAE, 18.02 after REPA-E and 0.02 where the diffusion loss reaches the VAE.
    """
    return z.double().flatten(2).var(2, correction=0).mean(1)


def total_variation(z):
    """[B]: sum over positions of |z[i+1, j] - z[i, j]| + |z[i, j+1] - z[i, j]|, mean over channels; z [B, C, h, w].

    It grows with the number of positions: compare equal sizes. The paper gives its figures (SD-VAE 6,627, after REPA-E
    5,516, by the diffusion loss 90) without a formula; the mean over channels is our reading, since with a sum SD-VAE's
    latents would be smoother than the images themselves.
    """
    z = z.double()
    return (z.diff(dim=2).abs().sum((2, 3)) + z.diff(dim=3).abs().sum((2, 3))).mean(1)


def principal_colors(z):
    """First three principal components of latents z [N, C, h, w], over all positions of all N, as colours [N, 3, h, w].

    Each component is stretched so that its 1st to 99th percentile fill [0, 1]; its sign makes the largest loading
    positive.
    """
    x = z.double().permute(0, 2, 3, 1).flatten(0, 2)                     # [N h w, C]
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :3]        # eigenvalues come in ascending order
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    x = x @ axes
    low, high = (torch.quantile(x, q, dim=0) for q in (0.01, 0.99))
    x = ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return x.view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2).float()


def _nearest(kernel, k):
    """Mask [N, N] float64: 1 where column j is one of the k largest of row i, i itself excluded."""
    kernel = kernel.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(kernel).scatter_(1, kernel.topk(k, dim=1).indices, 1.0)


def _unbiased_hsic(kernel_a, kernel_b):
    """Unbiased Hilbert-Schmidt independence criterion (Song et al. 2012, eq. 5) of two kernels with zero diagonals."""
    n = len(kernel_a)
    total = (kernel_a * kernel_b.T).sum() + kernel_a.sum() * kernel_b.sum() / ((n - 1) * (n - 2))
    return (total - 2 * (kernel_a.sum(0) @ kernel_b.sum(1)) / (n - 2)) / (n * (n - 3))


def cknna(a, b, k=10):
    """Centred kernel nearest-neighbour alignment of features a [N, D] and b [N, D'] of the same N images, a float.

    Huh et al. 2024 (arXiv 2405.07987): a kernel alignment that looks only at pairs which are among the k nearest
    neighbours in both; rows are brought to unit length, kernels are inner products. 1 for equal features, near 0 for
    unrelated ones. REPA takes 10,000 images and k = 10. Raises ValueError unless N > k and N > 3.
    """
    if len(a) != len(b) or len(a) <= max(k, 3):
        raise ValueError(f"CKNNA with {k} neighbours needs more images than that in both, got {len(a)} and {len(b)}")
    kernels = [x @ x.T for x in (F.normalize(v.double(), dim=1) for v in (a, b))]
    masks = [_nearest(kernel, k) for kernel in kernels]

    def aligned(i, j):
        mask = masks[i] * masks[j]
        return _unbiased_hsic(mask * kernels[i], mask * kernels[j])

    return (aligned(0, 1) / (aligned(0, 0) * aligned(1, 1)).sqrt()).item()
