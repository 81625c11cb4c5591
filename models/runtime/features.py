"""Features of sets of images, shared among processes, and the scores they allow.

Behind evaluate_fid.py, the online scores of training, and rFID: `extract` runs networks over a stream of
images, `score` makes every figure that two sets of features allow. The formulas are in models/metrics.py.
Errors a user can cause are ValueError or OSError with a message of one line.
"""
import contextlib
import os
import re
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models.inception import WEIGHTS_SHA256, WEIGHTS_URL, FIDInception
from models.metrics import (Moments, clip_distance, float32_exactly, frechet_distance,
                            frechet_distance_of_features, frechet_infinity, inception_score_splits,
                            kernel_distances, precision_recall)
from models.runtime import distributed, files
from models.runtime.images import open_input

CLIP = "vit_large_patch14_clip_quickgelu_336.openai"    # timm's name of the network of published CMMD figures
KEPT = {"": "pool", "_clip": "clip"}    # features whose rows are kept, not their statistics alone
PIECE = 1024        # rows in a file of cached features


# ---------------------------------------------------------------- networks

def load_inception(path=None, device="cpu"):
    """FIDInception with the weights of the file `path`, which its attributes path and sha256 then tell.

    Without a path they are looked for where torch-fidelity and pytorch-fid keep theirs, else downloaded once
    and checked. Raises ValueError for a file of another network or with NaN in it, OSError for no such file,
    and for no weights and no network.
    """
    path = path or find_inception()
    state = files.load(path)
    net = files.load_weights(FIDInception(), state, path)
    if bad := files.first_non_finite(state):
        raise ValueError(f"{path}: {bad} holds NaN or infinity; take a sound copy of the weights")
    net.path, net.sha256 = path, files.sha256(path)
    return net.to(device)


def find_inception():
    """Path of the FID Inception weights: a copy of the right digest in torch hub's folder, or downloaded."""
    own = files.cache_path(os.path.basename(WEIGHTS_URL))
    # The names that pytorch-fid and torch-fidelity give the same file.
    for name in ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"):
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
        if not os.path.isfile(own) and os.path.isfile(path) and files.sha256(path).startswith(WEIGHTS_SHA256):
            return path
    try:
        return files.download(WEIGHTS_URL, own, sha256_prefix=WEIGHTS_SHA256)
    except OSError as error:
        raise OSError(f"{error}, or name it with --inception-weights") from error


def inception_features(net):
    """-> function: uint8 [b, H, W, 3] -> {"": pool [b, 2048], "_s": spatial [b, 2023]}.

    Its keys are the suffixes of mu and sigma.
    """
    return lambda images: dict(zip(("", "_s"), net(images)))


def encoder_features(name, ckpt=None, device="cpu"):
    """-> function: uint8 [b, H, W, 3] -> {"_fdd": [b, D]}: pooled (class token) output of a timm encoder.

    Images are resized bicubically with antialiasing to the encoder's size: 224 for DINOv2 (Stein et al.
    2023).
    """
    from models.encoders import build_encoder
    encoder = build_encoder(name, 256, ckpt, device)

    def features(images):
        x = images.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (encoder.size, encoder.size), mode="bicubic", antialias=True)
        x = x.clamp_(0, 255).round_().div_(255)
        return {"_fdd": encoder.model((x - encoder.mean) / encoder.std)}
    return features


def clip_features(ckpt=None, device="cpu", name=CLIP):
    """-> function: uint8 [b, H, W, 3] -> {"_clip": [b, 768]}: image embeddings of CLIP, for CMMD.

    Its projection included. Images are resized bicubically, without antialiasing, to the network's 336
    pixels, as the PyTorch version of the CMMD authors' program does. `ckpt`: timm's weights on disk, else
    from the hub.
    """
    import timm
    config = timm.models.get_pretrained_cfg(name)
    remedy = "name timm's file of it with --clip-ckpt"
    try:
        path = ckpt or files.hub_file(config.hf_hub_id, "model.safetensors")
    except (ValueError, OSError) as error:
        raise OSError(f"weights of {name} for cmmd: {error}; or {remedy}") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; {remedy}")
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path})
    except Exception as error:      # timm and safetensors raise nearly anything on a wrong file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no weights of {name} ({reason}); {remedy}") from error
    model = model.eval().requires_grad_(False).to(device)
    side = config.input_size[-1]
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (config.mean, config.std))

    def features(images):
        x = images.permute(0, 3, 1, 2).float() / 255
        return {"_clip": model((F.interpolate(x, (side, side), mode="bicubic") - mean) / std)}
    return features


def hog_features(resolution, device="cpu"):
    """-> function: uint8 [b, H, W, 3] -> {"_hog": [b, 436]}: histograms of gradients, by image quarter."""
    from models.encoders import build_encoder
    hog = build_encoder("hog", resolution, device=device)

    def features(images):
        tokens = hog(images.permute(0, 3, 1, 2))     # [b, grid * grid, 109]
        grid = tokens.transpose(1, 2).unflatten(2, (hog.grid, hog.grid))
        return {"_hog": F.adaptive_avg_pool2d(grid, 2).flatten(1)}
    return features


def fitting_batch_size(device):
    """Images per batch that fit: 32 on CPU, up to 256 on a GPU (50 MB each); equal in all processes."""
    if torch.device(device).type != "cuda":
        return 32
    size = torch.tensor(max(1, min(256, int(torch.cuda.mem_get_info(device)[0] * 0.7 / 50e6))), device=device)
    if dist.is_initialized():
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return size.item()


# ---------------------------------------------------------------- features kept in pieces on disk

def load_pieces(folder):
    """Yields features by suffix of the sound files FIRST-END.npz in `folder`, in order from row 0.

    The digest of each is checked (zip's CRC-32). What does not continue them is removed: it will be made
    again.
    """
    end = 0
    files.remove_leftovers(folder)
    names = sorted(name for name in os.listdir(folder) if re.fullmatch(r"\d{8}-\d{8}\.npz", name)) \
        if os.path.isdir(folder) else []
    for name in names:
        path, (first, last) = os.path.join(folder, name), map(int, name[:-4].split("-"))
        try:
            if first != end:
                raise ValueError(f"follows a gap after row {end}")
            with np.load(path, allow_pickle=False) as file:
                piece = {key[len("features"):]: file[key] for key in file.files}
            if not piece or not all(x.ndim == 2 and len(x) == last - first and np.isfinite(x).all()
                                    for x in piece.values()):
                raise ValueError("holds other features than its name says")
        except (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:100]
            print(f"note: {path}: not used ({reason}); made again", file=sys.stderr)
            os.remove(path)
            continue
        yield piece
        end = last


def save_piece(folder, first, rows):
    """Write features {suffix: [n, D]} of the rows from `first` on as the next piece, whole or not at all."""
    last = first + len(next(iter(rows.values())))
    with files.replace(os.path.join(folder, f"{first:08d}-{last:08d}.npz")) as temporary:
        with open(temporary, "wb") as f:
            np.savez(f, **{f"features{suffix}": x for suffix, x in rows.items()})
    return last


# ---------------------------------------------------------------- extraction

def prefetch(batches):
    """The same batches, each next one made in a thread while the last is in use."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch


def _gather(rows, device):
    """rows [b, D] of all processes, any b -> (list of them in process 0, else []; whether there were any)."""
    if distributed.world_size() == 1:
        return [rows.cpu()], len(rows) > 0
    shapes = torch.zeros(distributed.world_size(), 2, dtype=torch.long, device=device)
    shapes[dist.get_rank()] = torch.tensor(rows.shape)
    distributed.all_reduce_sum(shapes)
    padded = torch.zeros(*shapes.amax(0).tolist(), device=device)
    padded[:len(rows), :rows.shape[1]] = rows
    everyone = [torch.empty_like(padded) for _ in shapes] if distributed.is_main() else None
    if len(padded):
        dist.gather(padded, everyone)
    return [part[:n].cpu() for part, (n, _) in zip(everyone or [], shapes.tolist())], len(padded) > 0


class Rows:
    """Features taken in row after row: running statistics of all, some rows kept, pieces on disk."""

    def __init__(self, device, keep, skip, folder=None):
        self.device, self.keep, self.skip, self.folder = device, keep, skip, folder
        self.n, self.moments, self.kept, self.pending, self.saved = 0, {}, {}, [], 0

    def add(self, found, on_disk=False):
        """found: {suffix: float32 array [n, D]}, the rows that follow; on_disk: they came from a piece."""
        for suffix, x in found.items():
            if self.keep and suffix in KEPT:
                self._append(suffix, x)
            if suffix not in self.skip and suffix != "_clip":       # of CLIP features no statistics are asked
                self.moments.setdefault(suffix, Moments(x.shape[1], self.device)).add(x)
        self.n += len(x)
        if on_disk:
            self.saved = self.n
        elif self.folder:
            self.pending.append(found)
            if self.n - self.saved >= PIECE:
                self.save()

    def save(self):
        """Write what is not on disk yet as a piece."""
        if self.pending:
            rows = {suffix: np.concatenate([part[suffix] for part in self.pending])
                    for suffix in self.pending[0]}
            self.pending, self.saved = [], save_piece(self.folder, self.saved, rows)

    def _append(self, suffix, new):
        """Into a buffer that doubles: many small arrays would fragment memory."""
        rows, n = self.kept.get(suffix), self.n
        if rows is None or n + len(new) > len(rows):
            larger = np.empty((max(4096, 2 * n, n + len(new)), new.shape[1]), new.dtype)
            larger[:n] = rows[:n] if n else 0
            self.kept[suffix] = rows = larger
        rows[n:n + len(new)] = new

    def result(self):
        """{"pool": [N, 2048], "mu": ..., "sigma": ..., "mu_s": ...}: rows and statistics by name."""
        found = {KEPT[suffix]: rows[:self.n] for suffix, rows in self.kept.items()}
        for suffix, moments in self.moments.items():
            found["mu" + suffix], found["sigma" + suffix] = moments.statistics()
        return found


@torch.inference_mode()
def extract(batches, networks, device, keep=True, skip=(), progress=lambda done: None, rows=None):
    """Features of one set of images, shared among the processes.

    batches: this process's share, an iterable of uint8 arrays or tensors [b, H, W, 3]; the k-th batches of
    processes 0, 1, ... follow each other in the order of the set. networks: functions as inception_features
    gives. Returns, in process 0 ({} elsewhere), mu + suffix and sigma + suffix for every suffix not in
    `skip`; if `keep`, pool [N, 2048] (and clip [N, 768]). rows: a Rows to go on with, instead of keep and
    skip. progress: called with the rows done.
    """
    rows = rows or Rows(device, keep, skip)
    widths, more = {}, True
    # The flags are set before the first batch is asked for: the thread of prefetch may decode it on the GPU.
    with float32_exactly(), contextlib.closing(prefetch(batches)) as batches:
        while more:
            batch, found = next(batches, None), {}
            if batch is not None:
                images = torch.as_tensor(batch).to(device, non_blocking=True)
                found = {suffix: x.float() for network in networks for suffix, x in network(images).items()}
            widths = {suffix: x.shape[1] for suffix, x in found.items()} or widths
            row = torch.cat(list(found.values()), 1) if found else torch.zeros(0, 0, device=device)
            parts, more = _gather(row, device)
            for part in filter(len, parts):
                columns = part.split(list(widths.values()), 1)
                rows.add({suffix: x.numpy() for suffix, x in zip(widths, columns)})
            if more:
                progress(rows.n)
    rows.save()
    return rows.result()


def cached_features(images, networks, device, batch_size, keep=True, folder=None):
    """Features of one input as extract gives them, its stored statistics on top; every process must call it.

    The first images.used images count. Rows that are in `folder` already, of this very input and these
    networks, are taken from there, and new ones are added in pieces while they come: a run that was stopped
    goes on.
    """
    skip = ("", "_s") if images.statistics else ()
    rows = Rows(device, keep, skip, folder if distributed.is_main() else None)
    for piece in load_pieces(folder) if rows.folder else []:
        if (left := images.used - rows.n) > 0:
            rows.add({suffix: x[:left] for suffix, x in piece.items()}, on_disk=True)
    done = int(distributed.all_reduce_sum(torch.tensor(rows.n, device=device)))
    batches = images.read(batch_size, distributed.rank(), distributed.world_size(), range(done, images.used))
    line = progress_line(images.path, images.used, first=done)
    return extract(batches, networks, device, progress=line, rows=rows) | images.statistics


# ---------------------------------------------------------------- scores

def score(samples, ref, net=None, exact_is=False, exact_pr=False, extras=(), kid=(100, 1000), seed=2020,
          device="cpu", labels=None, progress=lambda name: lambda done, total: None):
    """Every figure that two dicts of features, from extract or stored statistics, allow, by name.

    net: for the Inception Score; extras: of EXTRAS; kid: (subsets, images in each); labels: classes of the
    samples and of the reference's images, for fid_per_class. progress(name) gives a function of (done,
    total).
    """
    result = {}
    if "pool" in samples and net is not None:
        with float32_exactly(), torch.inference_mode():
            logits = [net.logits(x.to(device)).cpu() for x in torch.from_numpy(samples["pool"]).split(8192)]
        splits = inception_score_splits(torch.cat(logits), exact=exact_is)
        result |= {"inception_score": float(np.mean(splits)), "inception_score_std": float(np.std(splits))}
    for name, suffix in {"fid": "", "sfid": "_s", "fdd": "_fdd", "fd_hog": "_hog"}.items():
        if "mu" + suffix in samples and "mu" + suffix in ref:
            result[name] = frechet_distance(*(d[k + suffix] for d in (samples, ref) for k in ("mu", "sigma")))
    if "pool" in samples and "pool" in ref:
        found = precision_recall(ref["pool"], samples["pool"], exact=exact_pr, device=device,
                                 progress=progress("precision and recall"))
        result["precision"], result["recall"] = found
        result["f_score"] = 2 * found[0] * found[1] / max(sum(found), 1e-12)
        if "kid" in extras:
            values = kernel_distances(ref["pool"], samples["pool"], *kid, seed, device, progress("KID"))
            result["kid"], result["kid_std"] = float(values.mean()), float(values.std())
    if "fid_infinity" in extras and "pool" in samples and "mu" in ref:
        result["fid_infinity"], result["fid_error"] = frechet_infinity(
            samples["pool"], ref["mu"], ref["sigma"], seed=seed, device=device,
            progress=progress("FID-infinity"))
    if "clip" in samples and "clip" in ref:
        result["cmmd"] = clip_distance(ref["clip"], samples["clip"], device, progress("CMMD"))
    if labels is not None:
        result["fid_per_class"] = per_class(samples["pool"], ref["pool"], *labels, progress("FID per class"))
    return result


def per_class(samples, ref, sample_labels, ref_labels, progress):
    """{class: FID of its samples and reference images}; a class with fewer than two on a side is left out."""
    classes, found = np.intersect1d(sample_labels, ref_labels), {}
    for k, label in enumerate(classes.tolist()):
        sides = samples[sample_labels == label], ref[ref_labels == label]
        if min(map(len, sides)) >= 2:
            found[label] = frechet_distance_of_features(*map(torch.from_numpy, sides))
        progress(k + 1, len(classes))
    return found


def load_reference(path, net, device="cpu", batch_size=None, pool=True):
    """Features of a reference for score_samples; with statistics and pool=False no image of it is read.

    Every process must call this; the others than the first get only what the file itself stores.
    """
    images = open_input(path)
    found = {}
    if images.count and (pool or not images.statistics):
        size, skip = batch_size or fitting_batch_size(device), ("", "_s") if images.statistics else ()
        batches = images.read(size, distributed.rank(), distributed.world_size())
        found = extract(batches, [inception_features(net)], device, pool, skip)
    return found | images.statistics


def score_samples(batches, ref, net, device="cpu", exact=False):
    """{"inception_score", "fid", "sfid", "precision", "recall"} of images as they are made.

    In process 0; {} in the others.

    batches: this process's uint8 batches [b, H, W, 3]; ref: from load_reference (precision and recall need
    its pool features); net: from load_inception. The functions are the command line's, so both score the same
    samples alike.
    """
    samples = extract(batches, [inception_features(net)], device)
    found = score(samples, ref, net, exact, exact, device=device) if samples else {}
    return {name: value for name, value in found.items() if name not in ("inception_score_std", "f_score")}


# ---------------------------------------------------------------- what the user sees meanwhile

def progress_line(what, total=None, unit="images", first=0):
    """-> function of (done, total): a line on stderr, rewritten, with rate and time left; process 0 only.

    first: how many were done before, in an earlier run.
    """
    begin = last = time.perf_counter()
    terminal = sys.stderr.isatty()

    def show(done, total=total):
        nonlocal last
        now = time.perf_counter()
        if distributed.is_main() and (now - last > (0.5 if terminal else 30) or done == total):
            rate, last = (done - first) / max(now - begin, 1e-9), now
            left = int((total - done) / max(rate, 1e-9))
            counts = f"{done:,}/{total:,} {unit}, {rate:.1f} {unit}/s"
            counts = counts if unit else f"{100 * done / total:.0f} %"
            line = f"{what}: {counts}, {left // 60}:{left % 60:02d} left"
            print(f"\r{line}  " if terminal else line, file=sys.stderr, flush=True,
                  end="" if terminal and done < total else "\n")
    return show
