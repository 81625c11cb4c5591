"""Image-generation metrics on feature arrays, with the ADM evaluation suite's arithmetic (Dhariwal & Nichol 2021).

Needs only numpy, scipy and torch, so the file can be lifted out alone. Arrays or tensors in, plain numbers out:

    mu, sigma = feature_statistics(features)                # [N, D] -> [D], [D, D]
    fid = frechet_distance(mu_samples, sigma_samples, mu_ref, sigma_ref)
    score = inception_score(logits)                         # [N, 1008], without the bias
    precision, recall = precision_recall(ref, samples)      # [N, D], [M, D]
    kid = kernel_distance(ref, samples)

Sources: Heusel et al. 2017 (FID), Salimans et al. 2016 (Inception Score), Kynkaanniemi et al. 2019 (precision and
recall), Binkowski et al. 2018 (KID).
"""
import contextlib
import functools
import threading

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F


_lock, _users, _saved = threading.Lock(), 0, []


@contextlib.contextmanager
def float32_exactly():
    """Full float32 in products and convolutions, whatever the caller has set: no TF32, no autocast.

    The flags belong to the process, so a stage of work enters once, in one thread, around all its batches: code that
    another thread runs meanwhile, such as a generator of images, sees the same flags for every batch. Where contexts
    overlap, the first one in sets them and the last one out puts back what it found. Autocast belongs to a thread.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _saved[:] = _set_float32()
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for restore in _saved:
                    restore()


def _set_float32():
    """Set the flags; returns functions that put back what was there."""
    cuda, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    switches = [(cudnn, "allow_tf32", False), (cuda, "allow_fp16_reduced_precision_reduction", False),
                (cudnn, "benchmark", True)]          # all batches but the last are of one shape
    # torch 2.9 added a second set of switches, one for each operation, which rule where both are set.
    operations = [cuda, *(getattr(owner, name, None) for owner in (cudnn, mkldnn) for name in ("conv", "rnn", "matmul"))]
    switches += [(owner, "fp32_precision", "ieee") for owner in operations if hasattr(owner, "fp32_precision")]
    restore = []
    with contextlib.suppress(RuntimeError):          # a caller's fp32_precision makes the older getters raise
        restore.append(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    for owner, name, _ in switches:
        with contextlib.suppress(RuntimeError):
            restore.append(functools.partial(setattr, owner, name, getattr(owner, name)))
    torch.set_float32_matmul_precision("highest")
    for owner, name, value in switches:
        setattr(owner, name, value)
    return restore


class Moments:
    """Running mean and covariance of float32 rows [n, dim], added in order; memory does not grow with their number."""

    def __init__(self, dim, device="cpu"):
        self.n, self.pending = 0, []
        self.sum = np.zeros((1, dim), np.float32)
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, rows):
        # ADM's mean is numpy's: one row after another in float32. At 50,000 rows that shows, so it is kept.
        self.sum = np.add.reduce(np.concatenate([self.sum, rows]), axis=0, keepdims=True)
        self.pending.append(rows)
        if sum(map(len, self.pending)) >= 1024:      # large products are the fast ones
            self._merge()

    def _merge(self):
        rows = torch.from_numpy(np.concatenate(self.pending)).to(self.mean.device, torch.float64)
        self.pending = []
        mean = rows.mean(0)
        total, shift = self.n + len(rows), mean - self.mean
        rows -= mean
        self.scatter.addmm_(rows.T, rows)            # then move both parts to the common mean (Chan et al. 1979)
        self.scatter.addr_(shift, shift, alpha=self.n * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.n = total

    def statistics(self):
        """(mu float32 [dim], sigma float64 [dim, dim] with divisor n - 1)."""
        if self.pending:
            self._merge()
        return self.sum[0] / np.float32(self.n), (self.scatter / max(self.n - 1, 1)).cpu().numpy()


def feature_statistics(features):
    """features [N, D] float32 -> (mu [D] float32, sigma [D, D] float64, divisor N - 1), with ADM's float32 mean."""
    features = np.ascontiguousarray(features, np.float32)
    moments = Moments(features.shape[1])
    for start in range(0, len(features), 4096):
        moments.add(features[start:start + 4096])
    return moments.statistics()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); mu [D], sigma [D, D]. 1 = samples, 2 = reference.

    The trace of the root is the sum of the roots of the eigenvalues of r' sigma2 r with r r' = sigma1, in float64: no
    matrix square root, so rank-deficient covariances (fewer samples than dimensions) are fine. The mean term keeps the
    type of mu, float32 in ADM. May come out as -1e-14 for equal sets. Raises ValueError for shapes that differ and for
    non-finite input.
    """
    mu1, mu2 = np.asarray(mu1), np.asarray(mu2)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        shapes = f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"statistics of different features: {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, mu2, sigma1, sigma2)):
        raise ValueError("statistics with non-finite entries: do the images or the weights give NaN features?")
    difference = mu1 - mu2
    # Cholesky with pivoting, P' sigma1 P = l l': stops at the numerical rank, so zero eigenvalues bring in no noise
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    root = np.empty((len(mu1), rank))
    root[order - 1] = np.tril(factor)[:, :rank]
    inner = torch.linalg.eigvalsh(torch.from_numpy(root.T @ sigma2 @ root))
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * inner.clamp(min=0).sqrt().sum().item()
    return float(difference @ difference + trace)


def inception_score(logits, split_size=5000, exact=False):
    """Mean over consecutive chunks of rows of exp(mean KL(p(y|x) || p(y))); logits [N, classes], without bias.

    Chunks of `split_size` rows in their order; the last, shorter one counts like the others (ADM). Float32 as in ADM,
    where a probability that underflows gives nan; exact=True computes in float64 from the log-softmax and stays finite.
    """
    logits = torch.as_tensor(logits).cpu()
    scores = []
    for chunk in logits.split(split_size):
        if exact:
            log_p = chunk.double().log_softmax(1)
            marginal = log_p.logsumexp(0) - np.log(len(chunk))
            scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())
        else:
            p = chunk.float().softmax(1).numpy()
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = p * (np.log(p) - np.log(p.mean(0, keepdims=True)))
            scores.append(np.exp(kl.sum(1).mean()))
    return float(np.mean(scores))


def half_norms(x):
    """Squared norms of x [N, D] in float16 -> [N] float16, added up as TensorFlow's CPU kernel does, bit for bit."""
    def add_up(squares):
        if squares.shape[1] > 1024:
            middle = squares.shape[1] // 2
            return add_up(squares[:, :middle]) + add_up(squares[:, middle:])
        squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % 32)).view(len(squares), -1, 4, 8)
        lanes = squares[:, 0]                        # four accumulators of eight lanes, rounded at each addition
        for step in range(1, squares.shape[1]):
            lanes = lanes + squares[:, step]
        total = ((lanes[:, 0] + lanes[:, 1]) + lanes[:, 2]) + lanes[:, 3]
        return total.float().sum(1).half()
    return add_up(x * x)


def _map_distances(u, v, exact, reduce):
    """[reduce(D, first row) for strips of rows of the squared distances D(u, v)]; u [N, D] and v [M, D] are one block.

    D = max(|u|^2 - 2 u.v + |v|^2, 0), evaluated wholly in float16 unless that leaves a non-finite entry in the block
    (after the maximum, so that a product that overflows gives distance 0): then all of it is done again in float32.
    """
    for half in (False,) if exact else (True, False):
        a, b = (u.half(), v.half()) if half else (u, v)
        norm_a, norm_b = (half_norms(x) if half else x.square().sum(1) for x in (a, b))
        if half and not (norm_a.isfinite().all() and norm_b.isfinite().all()):
            continue
        results, widened = [], b.float().T if a.device.type == "cpu" else b.T    # CPU: float32 products, rounded once
        for start in range(0, len(a), 512):
            strip = slice(start, start + 512)
            product = (a[strip].to(widened.dtype) @ widened).to(a.dtype)
            distance = (norm_a[strip, None] - product.mul_(2)).add_(norm_b).clamp_(min=0)
            if half and not distance.max().isfinite():                           # max propagates nan
                break
            results.append(reduce(distance.float(), start))
        else:
            return results


def manifold_radii(features, k=3, exact=False, block=(10000, 10000)):
    """Squared distance of each row of features [N, D] to its k-th neighbour in the same set -> [N] float32."""
    radii = []
    for rows in features.split(block[0]):
        nearest = features.new_empty(len(rows), 0)
        for columns in features.split(block[1]):
            smallest = min(k + 1, len(columns))      # the row itself is among them
            found = _map_distances(rows, columns, exact, lambda d, _: d.topk(smallest, largest=False).values)
            nearest = torch.cat([nearest, torch.cat(found)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def precision_recall(ref, samples, k=3, exact=False, block=(10000, 10000), device="cpu"):
    """Improved precision and recall: ref [N, D], samples [M, D] features, N and M above k -> (precision, recall).

    precision = share of samples within the k-nearest-neighbour radius of some reference point, recall the reverse.
    Distances are in float16 with a float32 fallback per block of `block` rows and columns, as in ADM; exact=True is
    float32 throughout.
    """
    ref, samples = (torch.as_tensor(x).to(device, torch.float32) for x in (ref, samples))
    if min(len(ref), len(samples)) <= k:
        raise ValueError(f"precision and recall need more than {k} images per set, got {len(ref)} and {len(samples)}")
    if not (ref.isfinite().all() and samples.isfinite().all()):
        raise ValueError("precision and recall of features with non-finite values: are the weights sound?")
    with float32_exactly():
        radii_ref, radii_samples = (manifold_radii(x, k, exact, block) for x in (ref, samples))
        in_ref = torch.zeros(len(samples), dtype=torch.bool, device=device)
        in_samples = torch.zeros(len(ref), dtype=torch.bool, device=device)
        for i in range(0, len(ref), block[0]):
            for j in range(0, len(samples), block[1]):
                rows, columns = slice(i, i + block[0]), slice(j, j + block[1])

                def inside(distance, start):
                    radius = radii_ref[i + start:i + start + len(distance), None]
                    return (distance <= radius).any(0), (distance <= radii_samples[columns]).any(1)

                found = _map_distances(ref[rows], samples[columns], exact, inside)
                in_ref[columns] |= torch.stack([f[0] for f in found]).any(0)
                in_samples[rows] |= torch.cat([f[1] for f in found])
    return in_ref.double().mean().item(), in_samples.double().mean().item()


def kernel_distance(ref, samples, subsets=100, subset_size=1000, seed=2020, device="cpu"):
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets; ref [N, D], samples [M, D].

    Sets smaller than `subset_size` are used whole. May be slightly negative.
    """
    ref, samples = (torch.as_tensor(x).to(device, torch.float32) for x in (ref, samples))
    size, random = min(subset_size, len(ref), len(samples)), np.random.RandomState(seed)
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=device)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1).double().pow(3)

    values = []
    with float32_exactly():
        for _ in range(subsets):
            x = samples[torch.from_numpy(random.choice(len(samples), size, replace=False)).to(device)]
            y = ref[torch.from_numpy(random.choice(len(ref), size, replace=False)).to(device)]
            within = kernel(x, x)[off_diagonal].mean() + kernel(y, y)[off_diagonal].mean()
            values.append((within - 2 * kernel(x, y).mean()).item())
    return float(np.mean(values))


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
