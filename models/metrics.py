"""Measures of generated images, of reconstructions and of latents; arrays or tensors in, plain numbers out.

Generated images, from features [N, D] of their network, with the arithmetic of the ADM evaluation suite
(Dhariwal & Nichol 2021):

    fid = frechet_distance(*feature_statistics(samples), *feature_statistics(ref))  # Heusel et al. 2017
    score = inception_score(logits)                                     # Salimans et al. 2016; [N, 1008]
    precision, recall = precision_recall(ref, samples)                  # Kynkaanniemi et al. 2019
    kid = kernel_distance(ref, samples)                                 # Binkowski et al. 2018
    fid_infinity, error = frechet_infinity(samples, mu_ref, sigma_ref)  # after Chong & Forsyth 2020
    cmmd = clip_distance(ref, samples)                                  # Jayasumana et al. 2024; of CLIP

Pairs of images: psnr, ssim. Latents: latent_moments, spatial_variance, total_variation, principal_colors,
cknna.

Needs numpy, scipy and torch, so the file can be lifted out alone. Inputs are detached; what a function cannot
use (other shapes, too few rows, NaN) is a ValueError of one line. float32_exactly keeps a GPU from rounding
to TF32 meanwhile.
"""
import contextlib
import functools
import threading

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F


def _no_progress(done, total):
    pass


def _rows(x, what="features", least=2):
    """x as a detached tensor [N, D] of finite floats, N at least `least`, or a one-line ValueError."""
    x = x.detach() if torch.is_tensor(x) else torch.from_numpy(np.asarray(x))
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{what} are [N, D] floats, a row per image, not {x.dtype} of shape {list(x.shape)}")
    if len(x) < least:
        raise ValueError(f"{len(x)} rows of {what} are too few, at least {least} are needed")
    if not all(rows.isfinite().all() for rows in x.split(4096)):     # in pieces: isfinite copies
        raise ValueError(f"{what} with non-finite values: are the weights and the images sound?")
    return x


# ---------------------------------------------------------------- the arithmetic's precision

_lock, _users, _saved = threading.Lock(), 0, []


@contextlib.contextmanager
def float32_exactly():
    """Full float32 in products and convolutions, whatever the caller has set: no TF32, no autocast.

    The flags belong to the process, so a stage of work enters once, in one thread, around all its batches:
    code that another thread runs meanwhile, such as a generator of images, sees the same flags for every
    batch. Where contexts overlap, the first one in sets them and the last one out puts back what it found.
    Autocast belongs to a thread.
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
    operations = [cuda, *(getattr(owner, name, None) for owner in (cudnn, mkldnn)
                          for name in ("conv", "rnn", "matmul"))]
    switches += [(op, "fp32_precision", "ieee") for op in operations if hasattr(op, "fp32_precision")]
    restore = []
    with contextlib.suppress(RuntimeError):          # a caller's fp32_precision makes the older getters raise
        before = torch.get_float32_matmul_precision()
        restore.append(functools.partial(torch.set_float32_matmul_precision, before))
    for owner, name, _ in switches:
        with contextlib.suppress(RuntimeError):
            restore.append(functools.partial(setattr, owner, name, getattr(owner, name)))
    torch.set_float32_matmul_precision("highest")
    for owner, name, value in switches:
        setattr(owner, name, value)
    return restore


# ---------------------------------------------------------------- Frechet distance (FID, sFID, FDD)

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
    -1e-14 for equal sets. Raises ValueError for shapes that differ, for non-finite input, and for a sigma
    that is no covariance as far as the computation meets it (see check_covariance).
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
    if len(inner) and inner[0] < -COVARIANCE_TOLERANCE * np.abs(inner).max():
        raise ValueError("a sigma is no covariance: it is not positive semi-definite")
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.maximum(inner, 0)).sum()
    return float(difference @ difference + trace)


COVARIANCE_TOLERANCE = 1e-5     # of the matrix's size: what storing it in float32 may do, with room


def covariance_root(sigma):
    """r [D, rank] with r r' = sigma [D, D]; a one-line ValueError where a negative eigenvalue shows."""
    # Cholesky with pivoting, P' sigma P = l l': it stops at the numerical rank: zero eigenvalues add no noise
    factor, order, rank, _ = scipy.linalg.lapack.dpstrf(np.asarray(sigma, np.float64), lower=1)
    root = np.empty((len(sigma), rank))
    root[order - 1] = np.tril(factor[:, :rank])
    diagonal = np.diag(sigma)
    if np.abs(diagonal - np.square(root).sum(1)).max() > COVARIANCE_TOLERANCE * np.abs(diagonal).max():
        raise ValueError("a sigma is no covariance: it is not positive semi-definite")
    return root


def check_covariance(sigma, what="sigma"):
    """Raise a one-line ValueError unless sigma [D, D] is symmetric and positive semi-definite.

    A matrix that is not gives any distance, also a large negative one.
    """
    sigma = np.asarray(sigma, np.float64)
    allowed = COVARIANCE_TOLERANCE * np.linalg.norm(sigma)
    if np.abs(sigma - sigma.T).max() > allowed:
        raise ValueError(f"{what}: no covariance, it is not symmetric")
    # A Cholesky factor exists if and only if all eigenvalues are positive, and costs a tenth of them.
    if torch.linalg.cholesky_ex(torch.from_numpy(sigma + allowed * np.eye(len(sigma)))).info:
        smallest = torch.linalg.eigvalsh(torch.from_numpy(sigma))[0].item()
        if smallest < -allowed:
            raise ValueError(f"{what}: no covariance, it has the negative eigenvalue {smallest:.3g}")


def frechet_distance_of_features(samples, ref):
    """The same distance from few features, samples [N, D] and ref [M, D]: no D x D matrix is made.

    With A and B the centred features over sqrt(N - 1) and sqrt(M - 1), tr((sigma1 sigma2)^(1/2)) is the sum
    of the singular values of A B', an N x M matrix. Float64 throughout.
    """
    a, b = (_rows(x).double() for x in (samples, ref))
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = ((x - mean) / (len(x) - 1) ** 0.5 for x, mean in ((a, mean_a), (b, mean_b)))
    root = torch.linalg.svdvals(a @ b.T).sum()
    return ((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * root).item()


def frechet_infinity(samples, mu_ref, sigma_ref, splits=10, seed=2020, device="cpu", progress=_no_progress):
    """(estimate of FID at infinitely many samples, standard error of FID at these N); samples [N, D], N >= 4.

    FID of N samples is biased upwards by about b / N with b of the model's own (Chong & Forsyth 2020, arXiv
    1911.07023), so two counts give the limit: 2 FID(N) - FID(N / 2), the latter averaged over both halves of
    `splits` random splits. The spread of FID over the halves is also its standard error at N: a half drawn
    without replacement has the same variance around the whole set as the whole set has around the law it was
    drawn from (delete-half jackknife).

    Why neither a bootstrap nor a line through many counts: a bootstrap draws images twice, which raises FID
    by the bias of N / 2 or so; on a 64-dimensional skewed law with known FID 0.0213 and 2,000 samples (FID(N)
    0.0604 +- 0.0053), its 95 % interval held neither the limit nor the mean of FID(N) in any of 200 trials,
    while limit +- 2 standard errors from here held the truth in 95 %, and the estimate (0.0215 +- 0.0054) was
    steadier than a line through 15 counts (0.0194 +- 0.0075). Below a few thousand samples (N / 2 < D) the
    bias is not b / N and the estimate is too low. The reference's statistics are taken as they are.
    """
    x = _rows(samples, least=4).to(device, torch.float64)
    # With r r' = sigma_ref only r' sigma r of a subset is needed: the covariance of x r.
    projected = x @ torch.from_numpy(covariance_root(sigma_ref)).to(device)
    mu_ref = torch.as_tensor(mu_ref, dtype=torch.float64, device=device)
    trace_ref = float(np.trace(sigma_ref))

    def distance(rows):
        part, y = x[rows], projected[rows]
        mean, y = part.mean(0), y - y.mean(0)
        traces = (part - mean).square().sum() / (len(y) - 1) + trace_ref
        gram = y.T @ y if len(y) >= y.shape[1] else y @ y.T     # the same eigenvalues but for zeros
        root = torch.linalg.eigvalsh(gram / (len(y) - 1)).clamp(min=0).sqrt().sum()
        return ((mean - mu_ref).square().sum() + traces - 2 * root).item()

    n, random, halves = len(x), np.random.RandomState(seed), []
    for k in range(splits):
        order = torch.from_numpy(random.permutation(n)).to(device)
        halves += [distance(order[:n // 2]), distance(order[n // 2:2 * (n // 2)])]
        progress(k + 1, splits)
    whole = distance(torch.arange(n, device=device))
    return 2 * whole - float(np.mean(halves)), float(np.std(halves, ddof=1))


# ---------------------------------------------------------------- Inception Score

def inception_score_splits(logits, split_size=5000, exact=False):
    """exp(mean KL(p(y|x) || p(y))) of each chunk of `split_size` rows, a list; logits [N, classes].

    The last, shorter chunk counts like the others (ADM). Float32 as in ADM, where a probability that
    underflows gives nan; exact=True computes in float64 from the log-softmax and stays finite.
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
    return scores


def inception_score(logits, split_size=5000, exact=False):
    """ADM's one figure: the mean of inception_score_splits; logits [N, classes], in file order, no bias."""
    return float(np.mean(np.asarray(inception_score_splits(logits, split_size, exact), np.float64)))


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
                     progress=_no_progress):
    """(precision, recall), improved: of features ref [N, D] and samples [M, D], N and M above k.

    precision = share of samples within the k-nearest-neighbour radius of some reference point, recall the
    reverse. Distances are in float16 with a float32 fallback per block of `block` rows and columns, as in
    ADM; exact=True is float32 throughout. progress(done, total) counts distances, after each block.
    """
    ref, samples = (_rows(x).to(device, torch.float32) for x in (ref, samples))
    if min(len(ref), len(samples)) <= k:
        counts = f"{len(ref)} and {len(samples)}"
        raise ValueError(f"precision and recall need more than {k} images per set, not {counts}")
    done, total = 0, len(ref) ** 2 + len(samples) ** 2 + len(ref) * len(samples)

    def count(pairs):
        nonlocal done
        done += pairs
        progress(done, total)

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


# ---------------------------------------------------------------- kernel distances: KID, CMMD

def kernel_distances(ref, samples, subsets=100, subset_size=1000, seed=2020, device="cpu",
                     progress=_no_progress):
    """Unbiased squared MMD, kernel (x.y / D + 1)^3, of each of `subsets` random pairs of subsets: an array.

    ref [N, D], samples [M, D]; sets smaller than `subset_size` are used whole. Subsets, their order and the
    defaults are torch-fidelity's. KID is the mean; its published +- is the standard deviation (divisor
    `subsets`).
    """
    ref, samples = (_rows(x).to(device, torch.float32) for x in (ref, samples))
    size, random = min(subset_size, len(ref), len(samples)), np.random.RandomState(seed)
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=device)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1).double().pow(3)

    values = []
    with float32_exactly():
        for k in range(subsets):
            x = samples[torch.from_numpy(random.choice(len(samples), size, replace=False)).to(device)]
            y = ref[torch.from_numpy(random.choice(len(ref), size, replace=False)).to(device)]
            within = kernel(x, x)[off_diagonal].mean() + kernel(y, y)[off_diagonal].mean()
            values.append((within - 2 * kernel(x, y).mean()).item())
            progress(k + 1, subsets)
    return np.array(values)


def kernel_distance(ref, samples, subsets=100, subset_size=1000, seed=2020, device="cpu"):
    """KID: the mean of kernel_distances. May be slightly negative."""
    return float(kernel_distances(ref, samples, subsets, subset_size, seed, device).mean())


def clip_distance(ref, samples, device="cpu", progress=_no_progress):
    """CMMD: 1000 times the squared MMD of CLIP embeddings ref [N, D] and samples [M, D], normalised here.

    Jayasumana et al. 2024 (arXiv 2401.09603): kernel exp(-|x - y|^2 / (2 * 10^2)), the biased estimate (means
    over all pairs, the diagonal included), and no Gaussian assumption. Published figures use ViT-L/14 at 336
    px.
    """
    ref, samples = (F.normalize(_rows(x).to(device, torch.float32), dim=1) for x in (ref, samples))
    done, total = 0, len(ref) ** 2 + len(samples) ** 2 + len(ref) * len(samples)

    def mean_kernel(a, b):      # minus 1: the ones cancel, and the small rest keeps its digits
        nonlocal done
        rest = 0.0
        for strip in a.split(2048):
            square = (2 - 2 * strip @ b.T).clamp_(min=0)
            rest += square.mul_(-1 / 200).expm1_().sum(dtype=torch.float64).item()
            done += strip.shape[0] * len(b)
            progress(done, total)
        return rest / (len(a) * len(b))

    with float32_exactly():
        return 1000 * (mean_kernel(ref, ref) + mean_kernel(samples, samples) - 2 * mean_kernel(ref, samples))


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


def principal_colors(z):
    """Latents z [N, C, h, w] as colours [N, 3, h, w]: their first three principal components.

    The components are of all positions of all images. Each is stretched so that its 1st to 99th percentile
    fill [0, 1]; its sign makes the largest loading positive.
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
    """Unbiased HSIC (Song et al. 2012, eq. 5) of two kernels [N, N] with zero diagonals."""
    n = len(kernel_a)
    total = (kernel_a * kernel_b.T).sum() + kernel_a.sum() * kernel_b.sum() / ((n - 1) * (n - 2))
    return (total - 2 * (kernel_a.sum(0) @ kernel_b.sum(1)) / (n - 2)) / (n * (n - 3))


def cknna(a, b, k=10):
    """Centred kernel nearest-neighbour alignment of features a [N, D], b [N, D'] of the same images, a float.

    Huh et al. 2024 (arXiv 2405.07987): a kernel alignment that looks only at pairs which are among the k
    nearest neighbours in both; rows are brought to unit length, kernels are inner products. 1 for equal
    features, near 0 for unrelated ones. REPA takes 10,000 images and k = 10. Raises ValueError unless N > k
    and N > 3.
    """
    if len(a) != len(b) or len(a) <= max(k, 3):
        raise ValueError(f"CKNNA with {k} neighbours needs more images than that in both: {len(a)}, {len(b)}")
    kernels = [x @ x.T for x in (F.normalize(v.double(), dim=1) for v in (a, b))]
    masks = [_nearest(kernel, k) for kernel in kernels]

    def aligned(i, j):
        mask = masks[i] * masks[j]
        return _unbiased_hsic(mask * kernels[i], mask * kernels[j])

    return (aligned(0, 1) / (aligned(0, 0) * aligned(1, 1)).sqrt()).item()
