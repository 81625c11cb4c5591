"""Features of sets of images, shared among processes, and the scores they allow: behind evaluate_fid.py, rFID and online scores."""
import contextlib
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from models.inception import WEIGHTS_SHA256, WEIGHTS_URL, FIDInception
from models.metrics import (Moments, float32_exactly, frechet_distance, inception_score, kernel_distance,
                            precision_recall)
from models.runtime import distributed, files
from models.runtime.images import open_input

def load_inception(path=None, device="cpu"):
    """FIDInception with the weights of the file `path`; without one they are downloaded once and checked.

    Raises ValueError for a file of another network, OSError for no such file, and for no weights and no network.
    """
    if path is None:
        path = files.cache_path(os.path.basename(WEIGHTS_URL))
        try:
            files.download(WEIGHTS_URL, path, sha256_prefix=WEIGHTS_SHA256)
        except OSError as error:
            raise OSError(f"{error}, or name it with --inception-weights") from error
    net = files.load_weights(FIDInception(), files.load(path), path).to(device)
    net.path, net.sha256 = path, files.sha256(path)
    return net


@contextlib.contextmanager
def stopped_in_one_line(remedy):
    """Context in which SIGTERM and Ctrl-C end the process in one line that closes with `remedy`; a second one at once."""
    def stop(number, frame):
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    main_thread = threading.current_thread() is threading.main_thread()     # elsewhere Python allows no handlers
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT) if main_thread}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(*interrupt.args or [signal.SIGINT])
        if distributed.is_main():
            print(f"stopped by {number.name}: {remedy}", file=sys.stderr, flush=True)
        sys.exit(128 + number)      # as shells report a process that a signal ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prefetch(batches):
    """The same batches, each next one made in a thread while the last is in use."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch


def inception_features(net):
    """-> function: uint8 [b, H, W, 3] -> {"": pool [b, 2048], "_s": spatial [b, 2023]}; keys: suffixes of mu, sigma."""
    return lambda images: dict(zip(("", "_s"), net(images)))


def encoder_features(name, ckpt=None, device="cpu"):
    """-> function: uint8 [b, H, W, 3] -> {"_fdd": [b, D]}: pooled (class token) output of a timm encoder.

    Images are resized bicubically with antialiasing to the encoder's size: 224 for DINOv2 (Stein et al. 2023).
    """
    from models.encoders import build_encoder
    encoder = build_encoder(name, 256, ckpt, device)

    def features(images):
        x = images.permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, (encoder.size, encoder.size), mode="bicubic", antialias=True)
        x = x.clamp_(0, 255).round_().div_(255)
        return {"_fdd": encoder.model((x - encoder.mean) / encoder.std)}
    return features


def hog_features(resolution, device="cpu"):
    """-> function: uint8 [b, H, W, 3] -> {"_hog": [b, 436]}: oriented gradients, averaged over image quarters."""
    from models.encoders import build_encoder
    hog = build_encoder("hog", resolution, device=device)

    def features(images):
        tokens = hog(images.permute(0, 3, 1, 2))     # [b, grid * grid, 109]
        grid = tokens.transpose(1, 2).unflatten(2, (hog.grid, hog.grid))
        return {"_hog": torch.nn.functional.adaptive_avg_pool2d(grid, 2).flatten(1)}
    return features


def fitting_batch_size(device):
    """Images per batch that fit: 32 on CPU, up to 256 on a GPU (about 50 MB each); the same in all processes."""
    if torch.device(device).type != "cuda":
        return 32
    size = torch.tensor(max(1, min(256, int(torch.cuda.mem_get_info(device)[0] * 0.7 / 50e6))), device=device)
    if dist.is_initialized():
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return size.item()


def _gather(rows, device):
    """rows [b, D] of all processes, any b -> (list of them in process 0, [] elsewhere; whether there were any rows)."""
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


def _append(rows, n, new):
    """Store `new` [b, D] after the first n rows of a buffer that doubles; many small arrays would fragment memory."""
    if rows is None or n + len(new) > len(rows):
        larger = np.empty((max(4096, 2 * n, n + len(new)), new.shape[1]), new.dtype)
        larger[:n] = rows[:n] if n else 0
        rows = larger
    rows[n:n + len(new)] = new
    return rows


@torch.inference_mode()
def extract(batches, networks, device, keep=True, skip=(), progress=lambda done: None):
    """Features of one set of images, shared among the processes.

    batches: this process's share, an iterable of uint8 arrays or tensors [b, H, W, 3]; the k-th batches of processes
    0, 1, ... follow each other in the order of the set. networks: functions as inception_features gives. Returns, in
    process 0 ({} elsewhere), mu + suffix and sigma + suffix for every suffix not in `skip`; if `keep`, pool [N, 2048].
    """
    # The flags are set before the first batch is asked for: it may be decoded on the GPU by the thread of prefetch.
    with float32_exactly(), contextlib.closing(prefetch(batches)) as batches:
        return _extract(batches, networks, device, keep, skip, progress)


def _extract(batches, networks, device, keep, skip, progress):
    moments, pool, widths, done, more = {}, None, {}, 0, True
    while more:
        batch, found = next(batches, None), {}
        if batch is not None:
            images = torch.as_tensor(batch).to(device, non_blocking=True)
            found = {suffix: x.float() for network in networks for suffix, x in network(images).items()}
        widths = {suffix: x.shape[1] for suffix, x in found.items()} or widths
        parts, more = _gather(torch.cat(list(found.values()), 1) if found else torch.zeros(0, 0, device=device), device)
        for part in filter(len, parts):
            for suffix, x in zip(widths, part.split(list(widths.values()), 1)):
                if suffix == "" and keep:
                    pool = _append(pool, done, x.numpy())
                if suffix not in skip:
                    moments.setdefault(suffix, Moments(x.shape[1], device)).add(x.numpy())
            done += len(part)
        if more:
            progress(done)
    result = {} if pool is None else {"pool": pool[:done]}
    for suffix, moment in moments.items():
        result["mu" + suffix], result["sigma" + suffix] = moment.statistics()
    return result


def score(samples, ref, net=None, exact=False, kid=False, device="cpu"):
    """Every figure that two dicts of features allow, by name; features as extract returns, or stored statistics."""
    result, names = {}, {"fid": "", "sfid": "_s", "fdd": "_fdd", "fd_hog": "_hog"}
    if "pool" in samples and net is not None:
        with float32_exactly(), torch.inference_mode():
            logits = [net.logits(x.to(device)).cpu() for x in torch.from_numpy(samples["pool"]).split(8192)]
            result["inception_score"] = inception_score(torch.cat(logits), exact=exact)
    for name, suffix in names.items():
        if "mu" + suffix in samples and "mu" + suffix in ref:
            result[name] = frechet_distance(*(d[k + suffix] for d in (samples, ref) for k in ("mu", "sigma")))
    if "pool" in samples and "pool" in ref:
        found = precision_recall(ref["pool"], samples["pool"], exact=exact, device=device)
        result["precision"], result["recall"] = found
        if kid:
            result["kid"] = kernel_distance(ref["pool"], samples["pool"], device=device)
    return result


def load_reference(path, net, device="cpu", batch_size=None, pool=True):
    """Features of a reference for score_samples. With pool=False and statistics in the file no image of it is touched.

    Every process must call this; the others than the first get only what the file itself stores.
    """
    images = open_input(path)
    found = {}
    if pool or not images.statistics:
        batches = images.read(batch_size or fitting_batch_size(device), distributed.rank(), distributed.world_size())
        found = extract(batches, [inception_features(net)], device, pool, ("", "_s") if images.statistics else ())
    return found | images.statistics


def score_samples(batches, ref, net, device="cpu", exact=False):
    """Score images as they are made: {"inception_score", "fid", "sfid", "precision", "recall"} in process 0, else {}.

    batches: this process's uint8 batches [b, H, W, 3]; ref: from load_reference (precision and recall need its pool
    features); net: from load_inception. The functions are the command line's, so both score the same samples alike.
    """
    samples = extract(batches, [inception_features(net)], device)
    return score(samples, ref, net, exact, device=device) if samples else {}


def progress_line(path, total):
    """-> function: number of images done -> one line on stderr, rewritten, with images/s and time left."""
    begin = last = time.perf_counter()
    terminal = sys.stderr.isatty()

    def show(done):
        nonlocal last
        now = time.perf_counter()
        if distributed.is_main() and (now - last > (0.5 if terminal else 30) or done == total):
            rate, last = done / max(now - begin, 1e-9), now
            left = int((total - done) / max(rate, 1e-9))
            line = f"{path}: {done:,}/{total:,} images, {rate:.1f} images/s, {left // 60}:{left % 60:02d} left"
            end = "" if terminal and done < total else "\n"
            print(f"\r{line}  " if terminal else line, file=sys.stderr, end=end, flush=True)
    return show
