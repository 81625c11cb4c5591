"""Inception Score, FID, sFID, precision and recall, exactly as the ADM evaluation suite computes them (no TensorFlow).

    python evaluate_fid.py ref.npz samples.npz                         # prints the five numbers
    python evaluate_fid.py --json out.json ref.npz samples/            # .npz, folder or .zip on either side
    python evaluate_fid.py --save-ref ref.npz images/                  # make a reference once, use it for ever
    torchrun --nproc-per-node 8 evaluate_fid.py ref.npz samples.npz    # features on 8 GPUs
    python evaluate_fid.py --metrics kid,fdd ref.npz samples.npz       # further metrics, each under its own name

In a .npz, `arr_0` holds the images, uint8 [N, H, W, 3]. Where a file also holds mu, sigma, mu_s, sigma_s, these give
FID and sFID; Inception Score, precision and recall always come from the images. As a library:

    from evaluate_fid import feature_statistics, frechet_distance, inception_score, kernel_distance, precision_recall

The formulas are in models/metrics.py, the network and its preprocessing in models/inception.py,
the reading of files in models/image_sets.py.
"""
import argparse
import hashlib
import json
import os
import sys
import zipfile

import numpy as np
import torch

from models.inception import POOL_DIM
from models.metrics import (feature_statistics, frechet_distance, inception_score, kernel_distance,  # noqa: F401
                            precision_recall)
from models.runtime import distributed, files
from models.runtime.features import (encoder_features, extract, fitting_batch_size, hog_features, inception_features,
                                     load_inception, load_reference, progress_line, score, score_samples)  # noqa: F401
from models.runtime.images import MINIMUM, STATISTICS, InputError, evenly_spaced, input_digest, open_input

FDD_ENCODERS = ("dinov2-vit-l", "vit_large_patch14_dinov2.lvd142m")    # what a figure called fdd may come from
PROTOCOL = 50_000    # samples behind published figures


# ---------------------------------------------------------------- the command line

LABELS = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision",
          "recall": "Recall", "kid": "KID", "fdd": "FDD", "fd_hog": "FD-hog"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ref", help="reference: .npz with arr_0 [, mu, sigma, mu_s, sigma_s], folder or .zip of images")
    parser.add_argument("samples", nargs="?", help="samples, likewise (none with --save-ref)")
    parser.add_argument("--save-ref", metavar="OUT.npz", help="write a reference file made from the one input and stop")
    parser.add_argument("--save-ref-images", type=int, default=10_000, metavar="N",
                        help="images kept in it (evenly spaced) for precision and recall; its statistics are of all")
    parser.add_argument("--exact", action="store_true",
                        help="precision and recall in float32 instead of the suite's float16, IS in float64")
    parser.add_argument("--features", choices=("inception", "hog"), default="inception",
                        help="hog: a Frechet distance on gradient histograms (FD-hog) alone, which needs no weights")
    parser.add_argument("--metrics", default="", help="further metrics, comma-separated: kid, fdd")
    parser.add_argument("--encoder", default="dinov2-vit-l", help="encoder of fdd; another one is reported as fd_NAME")
    parser.add_argument("--encoder-ckpt", metavar="PATH", help="its weights on disk")
    parser.add_argument("--inception-weights", metavar="PATH",
                        help="pt_inception-2015-12-05-6726825d.pth; without it, downloaded once")
    parser.add_argument("--resolution", type=int, help="crop the images of folders and .zips to this size as ADM does")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of each input, for a look")
    parser.add_argument("--batch-size", type=int, help="images per process at a time (default: what fits)")
    parser.add_argument("--json", metavar="PATH", help="write figures, counts, input digests and settings there")
    parser.add_argument("--cache", metavar="FOLDER", help="keep features there, keyed by content, and reuse them")
    args = parser.parse_args(argv)
    args.metrics = [name for name in args.metrics.split(",") if name]
    return args


def check_args(args):
    """Raise a one-line ValueError for settings that contradict each other."""
    if unknown := set(args.metrics) - {"kid", "fdd"}:
        raise ValueError(f"--metrics {','.join(sorted(unknown))}: unknown, known are kid and fdd")
    if bool(args.save_ref) == bool(args.samples):
        raise ValueError("give a reference and samples, or --save-ref OUT.npz and one input")
    if args.features == "hog" and (args.metrics or args.save_ref):
        raise ValueError("--features hog gives FD-hog alone; drop --metrics and --save-ref")
    for name, least in (("limit", MINIMUM), ("batch_size", 1), ("resolution", 1), ("save_ref_images", MINIMUM)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for path in filter(None, (args.json, args.save_ref)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise FileNotFoundError(f"{path}: its folder does not exist; make it first")


def load_networks(args, inputs, device):
    """-> (Inception network or None, list of feature functions, text that identifies them in the cache)."""
    if args.features == "hog":
        if len({images.size for images in inputs}) > 1 or inputs[0].size[0] != inputs[0].size[1]:
            raise ValueError("--features hog needs square images of one size in both inputs; pass --resolution")
        return None, [hog_features(inputs[0].size[0], device)], f"hog {inputs[0].size}"
    net = load_inception(args.inception_weights, device)
    networks = [inception_features(net)]
    identity = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())).hexdigest()
    if "fdd" in args.metrics:
        networks.append(encoder_features(args.encoder, args.encoder_ckpt, device))
        identity += f" {args.encoder} {files.sha256(args.encoder_ckpt) if args.encoder_ckpt else ''}"
    return net, networks, identity


def features_of(images, args, networks, identity, device):
    """Features of one input, from the cache or by running the networks, stored statistics on top (in process 0)."""
    total = min(images.count, args.limit or images.count)
    found, path = None, None
    if args.cache and distributed.is_main():
        wanted = [bool(images.statistics), bool(args.save_ref)]
        key = json.dumps([images.digest, total, images.size, identity, torch.__version__, wanted]).encode()
        path = os.path.join(args.cache, hashlib.sha256(key).hexdigest()[:32] + ".npz")
        if os.path.exists(path):
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
    hit = distributed.all_reduce_sum(torch.tensor(float(found is not None), device=device))
    if not hit:
        batches = images.read(args.batch_size, distributed.rank(), distributed.world_size(), range(total))
        skip = ("", "_s") if images.statistics else ()
        found = extract(batches, networks, device, not args.save_ref, skip, progress_line(images.path, total))
        if path:
            with files.replace(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **found)
    return (found or {}) | images.statistics


def save_reference(path, images, statistics, count, limit=None):
    """Write arr_0 (`count` images, evenly spaced), mu, sigma, mu_s, sigma_s: the layout of the suite's references."""
    total = min(images.count, limit or images.count)
    chosen = evenly_spaced(total, count)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *images.size, 3)}
    with files.replace(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start, batch in zip(range(0, total, 256), images.read(256, rows=range(total))):
                file.write(batch[chosen[(chosen >= start) & (chosen < start + 256)] - start].tobytes())
        for key in STATISTICS:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, statistics[key], allow_pickle=False)
    print(f"{path}: statistics of {total:,} images, {len(chosen):,} of them kept for precision and recall")


def remarks(args, ref, samples, result):
    """What a reader of the figures must know, one line each."""
    counts = [min(images.count, args.limit or images.count) for images in (ref, samples)]
    lines = [f"{images.path}: {images.converted:,} grey, palette or transparent images were converted to RGB"
             for images in (ref, samples) if images.converted]
    if ref.size != samples.size:
        lines.append("sizes differ: {}x{} in the reference, {}x{} in the samples".format(*ref.size, *samples.size))
    lines += [f"FID and sFID use the statistics stored in {images.path}" for images in (ref, samples)
              if images.statistics and "fid" in result]
    few = [f"{n:,} {name}" for n, name, images in zip(counts, ("reference images", "samples"), (ref, samples))
           if n < PROTOCOL and (not images.statistics or "fid" not in result)]
    if few:
        lines.append(f"{' and '.join(few)}: FID is biased upwards by few images, compare only at equal numbers"
                     + (f"; below {POOL_DIM + 1:,} the covariance is singular" if min(counts) <= POOL_DIM else ""))
    if args.exact:
        lines.append("--exact: precision and recall in float32, Inception Score in float64, not the suite's arithmetic")
    if np.isnan(result.get("inception_score", 0)):
        lines.append("Inception Score nan, as in the suite: a probability underflows; --exact gives a number")
    return lines


def report(args, ref, samples, result):
    """Print the figures, the suite's five first, and write --json."""
    notes = remarks(args, ref, samples, result)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for name in sorted(result, key=[*LABELS, *result].index):
        print(f"{LABELS.get(name, name)}: {result[name]}")
    if args.json:
        about = {which: {"path": images.path, "images": images.count, "size": list(images.size),
                         "sha256": images.digest, "converted": images.converted, "protocol": images.protocol,
                         "statistics": "stored" if images.statistics else "computed"}
                 for which, images in (("ref", ref), ("samples", samples))}
        figures = {name: None if np.isnan(value) else value for name, value in result.items()}
        with files.replace(args.json) as temporary, open(temporary, "w") as file:
            json.dump({**figures, **about, "settings": vars(args), "notes": notes}, file, indent=1)


def prepare(args):
    """Everything that can be wrong with settings, inputs and weights: raises ValueError or OSError before long work."""
    check_args(args)
    _, _, device = distributed.init()
    inputs = [open_input(path, args.resolution) for path in (args.ref, args.samples) if path]
    if args.save_ref and inputs[0].statistics:
        raise ValueError(f"{args.ref}: is a reference with statistics already")
    net, networks, identity = load_networks(args, inputs, device)
    for images in inputs:
        images.digest = input_digest(images) if (args.json or args.cache) and distributed.is_main() else None
    args.batch_size = args.batch_size or fitting_batch_size(device)
    return device, inputs, net, networks, identity


def main(argv=None):
    args = parse_args(argv)
    try:
        device, inputs, net, networks, identity = prepare(args)
    except (ValueError, OSError) as error:
        sys.exit(fail(error))
    try:
        found = [features_of(images, args, networks, identity, device) for images in inputs]
        if distributed.is_main() and args.save_ref:
            save_reference(args.save_ref, inputs[0], found[0], args.save_ref_images, args.limit)
    except InputError as error:
        sys.exit(fail(error))
    if distributed.is_main() and not args.save_ref:
        result = score(found[1], found[0], net, args.exact, "kid" in args.metrics, device)
        if "fdd" in result and args.encoder not in FDD_ENCODERS:
            result[f"fd_{args.encoder}"] = result.pop("fdd")
        report(args, *inputs, result)
    distributed.shut_down()


def fail(error):
    """Print one line on stderr; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
