"""Features of sets of images, shared among processes, and the scores that two sets allow.

Behind evaluate_fid.py and the rFID of VAEs: `extract` runs networks over a stream of images, `score` computes
every figure that the features of two sets allow. The formulas are in models/metrics.py. Errors a user can
mend are ValueError or OSError with a message of one line.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from models.encoders import HOG
from models.inception import WEIGHTS_SHA256, WEIGHTS_URL, FIDInception
from models.metrics import Moments, float32_exactly, frechet_distance, inception_score, precision_recall
from models.runtime import distributed, files, log


# ---------------------------------------------------------------- networks

def load_inception(path=None, device="cpu"):
    """FIDInception with the weights in the file `path`; its attributes path and sha256 name them.

    Without a path: a copy in torch hub's folder, where pytorch-fid keeps it too, else it is downloaded.
    Raises ValueError for weights of another network, OSError if there are none and no network.
    """
    found = path or files.download(WEIGHTS_URL, os.path.basename(WEIGHTS_URL), WEIGHTS_SHA256)
    net = files.load_weights(FIDInception(), files.load(found), found)
    net.path, net.sha256 = found, files.sha256(found)
    if path is None and not net.sha256.startswith(WEIGHTS_SHA256):
        raise ValueError(f"{found}: not the FID Inception weights, whose sha256 begins with "
                         f"{WEIGHTS_SHA256}; remove the file and it is downloaded again")
    return net.to(device)


def inception_features(net):
    """-> function: uint8 [b, 3, H, W] -> {"": pool [b, 2048], "_s": spatial [b, 2023]}.

    The keys are the suffixes of mu and sigma.
    """
    return lambda images: dict(zip(("", "_s"), net(images.permute(0, 2, 3, 1))))


def hog_features(resolution, device="cpu"):
    """-> function: uint8 [b, 3, H, W] -> {"_hog": [b, 436]}: histograms of gradients, by image quarter."""
    hog = HOG(resolution).to(device)

    def features(images):
        tokens = hog(images)     # [b, grid * grid, 109]
        grid = tokens.transpose(1, 2).unflatten(2, (hog.grid, hog.grid))
        return {"_hog": F.adaptive_avg_pool2d(grid, 2).flatten(1)}
    return features


# ---------------------------------------------------------------- features of a set

def read(data, batch_size, rows):
    """This process's share of the images `rows` of a data set from data.open_images: uint8 [b, 3, H, W].

    The k-th batches of processes 0, 1, ... follow each other in the order of `rows`. Threads decode the next
    batch while the networks have the last one: unlike worker processes they need no shared memory, of which
    containers have little.
    """
    first, step = batch_size * distributed.rank(), batch_size * distributed.world_size()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        batches = ([pool.submit(data.__getitem__, int(row)) for row in rows[start:start + batch_size]]
                   for start in range(first, len(rows), step))
        upcoming = next(batches, None)
        while upcoming:
            current, upcoming = upcoming, next(batches, None)
            yield torch.stack([image.result()[0] for image in current])


@torch.inference_mode()
def extract(batches, network, device, keep=True, update=lambda done: None):
    """Features of one set of images, shared among the processes.

    batches: this process's share, an iterable of uint8 tensors [b, 3, H, W], as `read` gives it; network: a
    function such as inception_features gives; update: called with the number of images done. All processes
    must call this. Returns, in process 0 ({} elsewhere), mu + suffix and sigma + suffix for every suffix of
    the network and, if `keep`, pool [N, 2048].
    """
    moments, pool, done, batches = {}, [], 0, iter(batches)
    while True:
        found, batch = {}, next(batches, None)
        if batch is not None:
            images = batch.to(device)
            with float32_exactly():
                found = {suffix: x.float().cpu().numpy() for suffix, x in network(images).items()}
        parts = [part for part in distributed.gather(found) if part]
        if not parts:
            break
        for part in parts if distributed.is_main() else []:
            for suffix, x in part.items():
                moments.setdefault(suffix, Moments(x.shape[1], device)).add(x)
            if keep and "" in part:
                pool.append(part[""])
            done += len(x)
            update(done)
    result = {"pool": np.concatenate(pool)} if pool else {}
    for suffix, of_all in moments.items():
        result["mu" + suffix], result["sigma" + suffix] = of_all.statistics()
    return result


# ---------------------------------------------------------------- scores

def score(samples, ref, net=None, exact=False, device="cpu"):
    """Every figure that two dicts of features, from extract or stored statistics, allow, by name.

    net: for the Inception Score; exact: that in float64, and precision and recall in float32.
    """
    result = {}
    if "pool" in samples and net is not None:
        with float32_exactly(), torch.inference_mode():
            logits = torch.cat([net.logits(x.to(device)).cpu()
                                for x in torch.from_numpy(samples["pool"]).split(8192)])
        result["inception_score"], result["inception_score_std"] = inception_score(logits, exact=exact)
    for name, suffix in {"fid": "", "sfid": "_s", "fd_hog": "_hog"}.items():
        if "mu" + suffix in samples and "mu" + suffix in ref:
            result[name] = frechet_distance(*(d[k + suffix] for d in (samples, ref) for k in ("mu", "sigma")))
    if "pool" in samples and "pool" in ref:
        n, m = len(samples["pool"]), len(ref["pool"])
        result["precision"], result["recall"] = precision_recall(
            ref["pool"], samples["pool"], exact=exact, device=device,
            progress=log.progress("distances", n * n + m * m + n * m))
    return result
