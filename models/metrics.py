"""Measures of generated images, of reconstructions and of latents; arrays or tensors in, plain numbers out.

Generated images, from features [N, D] of their network, with the arithmetic of the ADM evaluation suite
(Dhariwal & Nichol 2021):

    fid = frechet_distance(*feature_statistics(samples), *feature_statistics(ref))  # Heusel et al. 2017
    score, std = inception_score(logits)                                # Salimans et al. 2016; [N, 1008]
    precision, recall = precision_recall(ref, samples)                  # Kynkaanniemi et al. 2019

Pairs of images: psnr, ssim. Latents: latent_moments, spatial_variance, total_variation.

Needs numpy, scipy and torch, so the file can be lifted out alone. Inputs are detached; what a function cannot
use (other shapes, too few rows, NaN) is a ValueError of one line. float32_exactly keeps a GPU from rounding
to TF32 meanwhile.
"""
import contextlib

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F


def _rows(x, what="features"):
    """x as a detached tensor [N, D] of finite floats, N at least 2, or a one-line ValueError."""
    x = x.detach() if torch.is_tensor(x) else torch.from_numpy(np.asarray(x))
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{what} are [N, D] floats, a row per image, not {x.dtype} of shape {list(x.shape)}")
    if len(x) < 2:
        raise ValueError(f"{len(x)} rows of {what} are too few, at least 2 are needed")
    if not all(rows.isfinite().all() for rows in x.split(4096)):     # in pieces: isfinite copies
        raise ValueError(f"{what} with non-finite values: are the weights and the images sound?")
    return x


# ---------------------------------------------------------------- the arithmetic's precision

@contextlib.contextmanager
def float32_exactly():
    """Full float32 in products and convolutions, whatever the caller has set: no TF32, no autocast.

    The flags belong to the process, so the code of other threads sees them too. At the end the caller's are
    put back.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    switches = [(cudnn, "allow_tf32", False), (cuda, "allow_fp16_reduced_precision_reduction", False),
                (cudnn, "benchmark", True)]          # all batches but the last have one shape
    # torch 2.9 added a second set of switches, one per operation, which wins where both are set.
    operations = [cuda, *(getattr(owner, name, None) for owner in (cudnn, mkldnn)
                          for name in ("conv", "rnn", "matmul"))]
    switches += [(op, "fp32_precision", "ieee") for op in operations if hasattr(op, "fp32_precision")]
    before, products = [], None
    with contextlib.suppress(RuntimeError):          # with mixed settings the getters of the older set raise
        products = torch.get_float32_matmul_precision()
    for owner, name, _ in switches:
        with contextlib.suppress(RuntimeError):
            before.append((owner, name, getattr(owner, name)))
    try:
        torch.set_float32_matmul_precision("highest")
        for switch in switches:
            setattr(*switch)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        if products:
            torch.set_float32_matmul_precision(products)
        for switch in before:
            setattr(*switch)


# ---------------------------------------------------------------- Frechet distance (FID, sFID)

class Moments:
    """Running mean and covariance of float32 rows [n, dim], added in order, in constant memory."""

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
        self.scatter.addmm_(rows.T, rows)       # then move both parts to the common mean (Chan et al. 1979)
        self.scatter.addr_(shift, shift, alpha=self.n * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.n = total

    def statistics(self):
        """(mu float32 [dim], sigma float64 [dim, dim] with divisor n - 1)."""
        if self.pending:
            self._merge()
        return self.sum[0] / np.float32(self.n), (self.scatter / max(self.n - 1, 1)).cpu().numpy()


def feature_statistics(features):
    """(mu [D] float32, sigma [D, D] float64, divisor N - 1) of features [N, D], N >= 2, as in ADM."""
    features = np.ascontiguousarray(_rows(features).cpu().float().numpy())
    moments = Moments(features.shape[1])
    for start in range(0, len(features), 4096):
        moments.add(features[start:start + 4096])
    return moments.statistics()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); mu [D], sigma [D, D].

    1 are the samples, 2 the reference. The trace of the root is the sum of the roots of the eigenvalues of
    r' sigma2 r with r r' = sigma1, in float64: no matrix square root, so rank-deficient covariances (fewer
    samples than dimensions) are fine. The mean term keeps the type of mu, float32 in ADM. May come out as
    -1e-14 for equal sets. Raises ValueError for shapes that differ, for non-finite input, and for a sigma2
    that shows not to be positive semi-definite.
    """
    mu1, sigma1, mu2, sigma2 = (x.detach().cpu().numpy() if torch.is_tensor(x) else np.asarray(x)
                                for x in (mu1, sigma1, mu2, sigma2))
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        shapes = f"{mu1.shape}, {sigma1.shape} and {mu2.shape}, {sigma2.shape}"
        raise ValueError(f"statistics of different features: {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, mu2, sigma1, sigma2)):
        raise ValueError("statistics with non-finite entries: do images or weights give NaN features?")
    difference, root = mu1 - mu2, covariance_root(sigma1)
    inner = torch.linalg.eigvalsh(torch.from_numpy(root.T @ sigma2 @ root)).numpy()
    if len(inner) and inner[0] < -1e-5 * np.abs(inner).max():       # what storing it in float32 does is less
        raise ValueError("sigma2 is not a covariance matrix: it is not positive semi-definite")
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.maximum(inner, 0)).sum()
    return float(difference @ difference + trace)


def covariance_root(sigma):
    """r [D, rank] with r r' = sigma [D, D]."""
    # Cholesky with pivoting, P' sigma P = l l': it stops at the numerical rank: zero eigenvalues add no noise
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(np.asarray(sigma, np.float64), lower=1)
    root = np.empty((len(sigma), rank))
    root[order - 1] = np.tril(factor[:, :rank])
    return root


# ---------------------------------------------------------------- Inception Score

def inception_score(logits, split_size=5000, exact=False):
    """exp(mean KL(p(y|x) || p(y))) over chunks of `split_size` rows: (mean, standard deviation).

    logits [N, classes] in file order, without bias. ADM's figure is the mean; a last, shorter chunk counts
    like the others. Float32 as in ADM, where a probability that underflows gives nan; exact=True computes in
    float64 from the log-softmax and stays finite.
    """
    scores = []
    for chunk in _rows(logits, "logits").cpu().split(split_size):
        if exact:
            log_p = chunk.double().log_softmax(1)
            marginal = log_p.logsumexp(0) - np.log(len(chunk))
            scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())
        else:
            p = chunk.float().softmax(1).numpy()
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = p * (np.log(p) - np.log(p.mean(0, keepdims=True)))
            scores.append(float(np.exp(kl.sum(1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- precision and recall

def half_norms(x):
    """Squared norms [N] float16 of x [N, D] float16, added up as TensorFlow's CPU kernel does it, exactly."""
    def add_up(squares):
        if squares.shape[1] > 1024:
            middle = squares.shape[1] // 2
            return add_up(squares[:, :middle]) + add_up(squares[:, middle:])
        squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % 32)).view(len(squares), -1, 4, 8)
        lanes = squares[:, 0]           # four accumulators of eight lanes, rounded at each addition
        for step in range(1, squares.shape[1]):
            lanes = lanes + squares[:, step]
        total = ((lanes[:, 0] + lanes[:, 1]) + lanes[:, 2]) + lanes[:, 3]
        return total.float().sum(1).half()
    return add_up(x * x)


def _map_distances(u, v, exact, reduce):
    """[reduce(D, first row) of strips of rows of the squared distances D(u, v)]; u [N, D]; v [M, D] is whole.

    D = max(|u|^2 - 2 u.v + |v|^2, 0), evaluated wholly in float16 unless that leaves a non-finite entry in
    the block (after the maximum, so that a product that overflows gives distance 0): then all of it is done
    again in float32.
    """
    for half in (False,) if exact else (True, False):
        a, b = (u.half(), v.half()) if half else (u, v)
        norm_a, norm_b = (half_norms(x) if half else x.square().sum(1) for x in (a, b))
        if half and not (norm_a.isfinite().all() and norm_b.isfinite().all()):
            continue
        results = []
        widened = b.float().T if a.device.type == "cpu" else b.T    # CPU: float32 products, rounded once
        for start in range(0, len(a), 128):      # larger strips are no faster, and memory grows with them
            strip = slice(start, start + 128)
            product = (a[strip].to(widened.dtype) @ widened).to(a.dtype)
            distance = (norm_a[strip, None] - product.mul_(2)).add_(norm_b).clamp_(min=0)
            if half and not distance.max().isfinite():                           # max propagates nan
                break
            results.append(reduce(distance.float(), start))
        else:
            return results


def manifold_radii(features, k=3, exact=False, block=(10000, 10000), progress=lambda pairs: None):
    """Squared distance of each row of features [N, D] to its k-th neighbour in the set, [N] float32."""
    radii = []
    for rows in features.split(block[0]):
        nearest = features.new_empty(len(rows), 0)
        for columns in features.split(block[1]):
            smallest = min(k + 1, len(columns))      # the row itself is among them
            found = _map_distances(rows, columns, exact, lambda d, _: d.topk(smallest, largest=False).values)
            nearest = torch.cat([nearest, torch.cat(found)], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
            progress(len(rows) * len(columns))
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def precision_recall(ref, samples, k=3, exact=False, block=(10000, 10000), device="cpu",
                     progress=lambda done: None):
    """(precision, recall), improved: of features ref [N, D] and samples [M, D], N and M above k.

    precision = share of samples within the k-nearest-neighbour radius of some reference point, recall the
    reverse. Distances are in float16 with a float32 fallback per block of `block` rows and columns, as in
    ADM; exact=True is float32 throughout. progress(done) counts the N^2 + M^2 + N M distances.
    """
    ref, samples = (_rows(x).to(device, torch.float32) for x in (ref, samples))
    if min(len(ref), len(samples)) <= k:
        counts = f"{len(ref)} and {len(samples)}"
        raise ValueError(f"precision and recall need more than {k} images per set, not {counts}")
    done = 0

    def count(pairs):
        nonlocal done
        done += pairs
        progress(done)

    with float32_exactly():
        radii_ref, radii_samples = (manifold_radii(x, k, exact, block, count) for x in (ref, samples))
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
                count(len(ref[rows]) * len(samples[columns]))
    return in_ref.double().mean().item(), in_samples.double().mean().item()


# ---------------------------------------------------------------- pairs of images

def _pairs(a, b):
    """Two sets of images [B, 3, H, W] in [0, 255], detached and in float64, or a one-line ValueError."""
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise ValueError(f"pairs of images are [B, 3, H, W], not {list(a.shape)} and {list(b.shape)}")
    if a.is_floating_point() and min(a.min(), b.min()) < 0:
        raise ValueError("images are in [0, 255], not negative; bring [-1, 1] there by (x + 1) * 127.5")
    return a.detach().double(), b.detach().double()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, [B], of pairs a, b [B, 3, H, W] in [0, 255]; inf for equal ones."""
    a, b = _pairs(a, b)
    return 10 * torch.log10(255 ** 2 / (a - b).square().mean((1, 2, 3)))


def ssim(a, b):
    """Structural similarity of each pair, [B]; a, b [B, 3, H, W] in [0, 255], H and W at least 11.

    As in its paper (Wang et al. 2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03,
    windows inside the image only; the mean of the three channels. In float64, because variances are
    differences of large numbers. Raises ValueError for smaller images.
    """
    a, b = _pairs(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {a.shape[-2]}x{a.shape[-1]}")
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=a.device).square() / (2 * 1.5 ** 2))
    window /= window.sum()

    def blur(x):
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        return F.conv2d(x, window.view(1, 1, 1, 11))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)))
    return similarity.flatten(1).mean(1).view(len(a), -1).mean(1)


# ---------------------------------------------------------------- latents

def latent_moments(posterior):
    """Mean and mean square of z ~ posterior per channel, [2, C] float64: what a batch norm on z sees.

    `posterior` has mean and std [B, C, h, w]. The spread of the posterior counts: E z^2 = mean^2 + std^2.
    """
    square = posterior.mean.square() + posterior.std.square()
    return torch.stack([posterior.mean, square]).double().mean((1, 3, 4))


def spatial_variance(z):
    """Variance of z [B, C, h, w] over the positions of an image, mean over channels: [B]; 0 if flat.

    The paper reports 17.06 for SD-VAE, 18.02 after REPA-E and 0.02 where the diffusion loss reaches the VAE.
    """
    return z.double().flatten(2).var(2, correction=0).mean(1)


def total_variation(z):
    """Total variation [B] of latents z [B, C, h, w]: |z[i+1, j] - z[i, j]| + |z[i, j+1] - z[i, j]|,
    summed over positions, mean over channels.

    It grows with the number of positions: compare equal sizes. The paper gives its figures (SD-VAE 6,627,
    after REPA-E 5,516, by the diffusion loss 90) without a formula; the mean over channels is our reading,
    since with a sum SD-VAE's latents would be smoother than the images themselves.
    """
    z = z.double()
    return (z.diff(dim=2).abs().sum((2, 3)) + z.diff(dim=3).abs().sum((2, 3))).mean(1)


def between_images(means, std):
    """Share of the variance of latents that lies between images, mean over channels: in [0, 1].

    means [N, C]: of each image's latents over its positions; std [C]: of all latents. What is left varies
    within images, and is where the details are that the decoder needs. Alignment makes this share larger.
    """
    return float((means.double().var(0, correction=0) / std.to(means.device).double().square()).mean())


def psnr_under_noise(decode, images, z, std, noise, sigma):
    """PSNR [B] of images decoded from latents with an error, as a diffusion model makes one.

    images: [B, 3, H, W] in [0, 255]; z, noise: their latents and N(0, 1), [B, C, h, w]; std: of the latents
    per channel, [C]; sigma: size of the error at unit scale. By how much this is below the PSNR without noise
    says what equal errors of the diffusion model cost in this latent space.
    """
    copies = decode(z + sigma * std.view(1, -1, 1, 1) * noise)
    return psnr(images, ((copies.float() + 1) * 127.5).round().clamp(0, 255))
