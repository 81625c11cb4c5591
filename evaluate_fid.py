"""Inception Score, FID, sFID, precision and recall, exactly as the ADM evaluation suite computes them.

    python evaluate_fid.py ref.npz samples.npz                       # prints the five figures, no TensorFlow
    python evaluate_fid.py --json out.json ref.npz samples/          # .npz, folder or .zip on either side
    python evaluate_fid.py --save-ref ref.npz images/                # compute a reference's statistics once
    torchrun --nproc-per-node 8 evaluate_fid.py ref.npz samples.npz  # features on 8 GPUs

In a .npz, arr_0 contains the images, uint8 [N, H, W, 3]. If a file also contains mu, sigma, mu_s, sigma_s,
FID and sFID use these; Inception Score, precision and recall always come from the images. A reference may be
statistics alone: mu and sigma (as pytorch-fid writes them) give FID, mu_s and sigma_s give sFID.

The formulas are in models/metrics.py, the network and its preprocessing in models/inception.py, the loop over
images and processes in models/runtime/features.py.
"""
import json
import os
import platform
import sys
from types import SimpleNamespace

import numpy as np
import torch

from models.inception import POOL_DIM, SPATIAL_DIM, WEIGHTS_SHA256
from models.runtime import cli, distributed, files, log
from models.runtime.data import NpzData, ShapesData, evenly_spaced, identity, open_images
from models.runtime.features import extract, hog_features, inception_features, load_inception, read, score

STATISTICS = {"mu": (POOL_DIM,), "sigma": (POOL_DIM,) * 2,
              "mu_s": (SPATIAL_DIM,), "sigma_s": (SPATIAL_DIM,) * 2}
LEAST = 4           # images per set: precision and recall look at the 3rd neighbor
KEPT = 10_000       # images that --save-ref keeps for them, evenly spaced; its statistics are of all
PROTOCOL = 50_000   # samples behind published figures
LABELS = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision",
          "recall": "Recall", "fd_hog": "FD-hog"}


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    parser, flag = cli.make_parser(__doc__), cli.flag
    parser.add_argument("ref", help="reference: .npz with arr_0 or statistics, folder or .zip, or shapes")
    parser.add_argument("samples", nargs="?", help="samples, likewise (none with --save-ref)")
    inputs, metrics, output = map(parser.add_argument_group, ("inputs", "metrics", "output and speed"))
    flag(inputs, "--resolution", None, "crop images to this size as ADM does", type=int)
    flag(inputs, "--inception-weights", None,
         "pt_inception-2015-12-05-6726825d.pth; default: a copy in torch hub's folder, or a download")

    flag(metrics, "--exact", False, "not the suite's arithmetic: Inception Score in float64, precision and "
         "recall in float32 instead of float16")
    flag(metrics, "--features", "inception", "hog: a Frechet distance on gradient histograms (FD-hog) alone, "
         "which needs no weights", choices=["inception", "hog"])

    flag(output, "--json", None, "write figures, digests, counts, settings and versions", metavar="PATH")
    flag(output, "--save-ref", None, "write a reference made from the one input and stop", metavar="OUT.npz")
    flag(output, "--batch-size", 32, "images per process at a time, 50 MB each")
    return parser.parse_args(argv)


def check_args(args):
    """Raise a one-line error for settings that contradict each other, or outputs that cannot be written."""
    if bool(args.save_ref) == bool(args.samples):
        raise ValueError("give a reference and samples, or --save-ref OUT.npz and one input")
    if args.features == "hog" and args.save_ref:
        raise ValueError("--save-ref stores what the Inception network sees; drop --features hog")
    cli.check_range(args, 1, 10**6, "batch_size")
    given = [p for p in (args.ref, args.samples, args.inception_weights) if p]
    for path in filter(None, (args.json, args.save_ref)):
        files.check_writable(path, given)


# ---------------------------------------------------------------- inputs and networks

def open_input(path, args):
    """One of the two inputs: namespace(path, images, statistics).

    images: from data.open_images; statistics: {mu, sigma, mu_s, sigma_s} that a .npz stores, else {}. Raises
    ValueError or OSError in one line.
    """
    if path == "shapes":    # others than training draws
        images = ShapesData(1000, args.resolution or 32, seed=1)
    else:
        images = open_images(path, args.resolution, labelled=False)
    # stored statistics are of the Inception network's features; --save-ref computes them again
    useful = isinstance(images, NpzData) and args.features == "inception" and not args.save_ref
    statistics = stored_statistics(images) if useful else {}
    if len(images) < LEAST and (len(images) or not statistics):
        raise ValueError(f"{path}: {len(images)} images are too few, at least {LEAST} are needed")
    return SimpleNamespace(path=path, images=images, statistics=statistics)


def stored_statistics(images):
    """{name: array} of the STATISTICS in a .npz: mu with sigma, mu_s with sigma_s, or all four."""
    names = [name for name in STATISTICS if name.replace("sigma", "mu") in images.arrays.files]
    found = {name: images.array(name) for name in names}
    for name, value in found.items():
        if value is None or value.shape != STATISTICS[name]:
            raise ValueError(f"{images.path}: {name} is not an array of shape {list(STATISTICS[name])}; "
                             "make the reference with --save-ref")
    return found


def load_network(args, size, device):
    """-> (Inception network or None, function images -> features, {network: what its weights are})."""
    if args.features == "hog":
        return None, hog_features(size[0], device), {"hog": {"size": list(size)}}
    net = load_inception(args.inception_weights, device)
    return net, inception_features(net), {"inception": {"path": net.path, "sha256": net.sha256}}


# ---------------------------------------------------------------- output

def save_reference(path, source, statistics):
    """Write KEPT evenly spaced images and mu, sigma, mu_s, sigma_s: the layout of the suite's references.

    `protocol`, JSON text, says of how many images the statistics are.
    """
    chosen = evenly_spaced(len(source.images), KEPT)
    rows = (source.images[int(row)][0].permute(1, 2, 0)[None].numpy() for row in chosen)
    protocol = json.dumps({"reference": os.path.basename(source.path), "statistics_of": len(source.images)})
    files.write_npz(path, rows, (len(chosen), *source.images.size, 3),
                    **{name: statistics[name] for name in STATISTICS}, protocol=np.array(protocol))
    print(f"{path}: statistics of {len(source.images):,} images, {len(chosen):,} kept for precision and "
          "recall")


def remarks(ref, samples, result, about):
    """What a reader of the figures must know, one line each."""
    lines = []
    for source in (ref, samples):
        number = len(source.images)
        if source.statistics and "fid" in result:
            of = source.images.protocol.get("statistics_of", "unknown many")
            lines.append(f"{source.path}: FID uses the statistics stored in it (of {of} images)" +
                         ("" if number else "; it has no images, so no precision, recall and the like"))
        elif 0 < number < PROTOCOL:
            lines.append(f"{source.path}: {number:,} images; FID of few images is biased upwards, "
                         "compare only at equal numbers")
        if source.statistics and "sfid" not in result:
            lines.append(f"{source.path}: no mu_s, so no sFID. If pytorch-fid made it, FID is off by about "
                         "1 %: it resizes with half-pixel centers and scales to [-1, 1], unlike the suite")
    labels = samples.images.labels
    if "inception_score" in result and labels[0] < labels[-1] and (np.diff(labels) >= 0).all():
        lines.append(f"{samples.path}: sorted by class. The suite's Inception Score is of 5,000 consecutive "
                     "images at a time; shuffle them to compare it with published ones")
    if "inception" in about and not about["inception"]["sha256"].startswith(WEIGHTS_SHA256):
        lines.append(f"{about['inception']['path']}: not the FID Inception (its sha256 does not begin with "
                     f"{WEIGHTS_SHA256}); no figure here compares with a published one")
    return lines


def describe(source):
    """What identifies an input, for the JSON: path, counts, sha256 of a file or of a folder's names and the
    content of 64 of its files."""
    images = source.images
    sha256 = files.sha256(source.path) if os.path.isfile(source.path) else identity(images)["files"]
    return {"path": source.path, "images": len(images), "size": list(images.size), "sha256": sha256,
            "statistics": "stored" if source.statistics else "computed",
            "protocol": getattr(images, "protocol", None) or None}


def report(args, ref, samples, result, about, device):
    """Print the figures, the suite's five first, and write --json."""
    notes = remarks(ref, samples, result, about)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for name in sorted(result, key=[*LABELS, *result].index):
        print(f"{LABELS.get(name, name)}: {result[name]}")
    if args.json:
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        figures = {name: value if np.isfinite(value) else None for name, value in result.items()}
        files.save_json({**figures, "ref": describe(ref), "samples": describe(samples), "weights": about,
                         "settings": vars(args), "processes": distributed.world_size(), "device": hardware,
                         "notes": notes, "versions": {"torch": torch.__version__, "numpy": np.__version__}},
                        args.json)


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    with cli.one_line_errors("pass a smaller --batch-size"):
        rank, _, device = distributed.init()
        check_args(args)
        inputs = [open_input(path, args) for path in (args.ref, args.samples) if path]
        if args.features == "hog" and len({side for source in inputs for side in source.images.size}) > 1:
            raise ValueError("--features hog needs square images of one size; pass --resolution")
        with distributed.main_first():
            net, network, about = load_network(args, inputs[0].images.size, device)
        paths = "ref", "samples", "json", "save_ref", "inception_weights"   # these may differ
        distributed.check_same({f"--{name}": x for name, x in vars(args).items() if name not in paths}
                               | {f"weights of {name}": x.get("sha256") for name, x in about.items()}
                               | {f"input {k}": identity(x.images) for k, x in enumerate(inputs)})

        found = []
        for source in inputs:
            batches = read(source.images, args.batch_size, range(len(source.images)))
            update = log.progress(source.path, len(source.images))
            found.append(extract(batches, network, device, not args.save_ref, update) | source.statistics)
        if rank == 0 and args.save_ref:
            save_reference(args.save_ref, inputs[0], found[0])
        elif rank == 0:
            ref, samples = inputs
            result = score(found[1], found[0], net, args.exact, device)
            report(args, ref, samples, result, about, device)
        distributed.shut_down()


if __name__ == "__main__":
    main()
