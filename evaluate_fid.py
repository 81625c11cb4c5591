"""Inception Score, FID, sFID, precision and recall, exactly as the ADM evaluation suite computes them.

    python evaluate_fid.py ref.npz samples.npz                       # prints the five numbers, no TensorFlow
    python evaluate_fid.py --json out.json ref.npz samples/          # .npz, folder or .zip on either side
    python evaluate_fid.py --save-ref ref.npz images/                # make a reference once, use it for ever
    torchrun --nproc-per-node 8 evaluate_fid.py ref.npz samples.npz  # features on 8 GPUs
    python evaluate_fid.py --metrics kid,fid_infinity --cache features ref.npz samples.npz

In a .npz, arr_0 holds the images, uint8 [N, H, W, 3]. Where a file also holds mu, sigma, mu_s, sigma_s, these
give FID and sFID; Inception Score, precision and recall always come from the images. A reference may be
statistics alone: mu and sigma (as pytorch-fid writes them) give FID, mu_s and sigma_s give sFID.

With --cache a stopped run goes on where it was. As a library:

    from evaluate_fid import feature_statistics, frechet_distance, inception_score, precision_recall

The formulas are in models/metrics.py, the network and its preprocessing in models/inception.py, the work on
files and processes in models/runtime/features.py.
"""
from models.runtime import cli

METRICS = ("kid", "fdd", "cmmd", "fid_infinity", "fid_per_class")     # beside the five, under their own names


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    parser, flag = cli.make_parser(__doc__), cli.flag
    parser.add_argument("ref", help="reference: .npz with arr_0 or statistics, folder or .zip of images")
    parser.add_argument("samples", nargs="?", help="samples, likewise (none with --save-ref)")
    inputs, arithmetic, more, weights, output = (parser.add_argument_group(name) for name in (
        "inputs", "arithmetic", "further metrics", "weights", "output and speed"))
    flag(inputs, "--resolution", None, "crop the images of folders and .zips to this size as ADM does",
         type=int, above=0)
    flag(inputs, "--limit", None, "only the first N images of each input, for a look", type=int, least=4,
         metavar="N")

    flag(arithmetic, "--exact", False, "both of the following")
    flag(arithmetic, "--exact-is", False, "Inception Score in float64: a number where the suite prints nan")
    flag(arithmetic, "--exact-pr", False, "precision and recall in float32 instead of the suite's float16")
    flag(arithmetic, "--features", "inception", "hog: a Frechet distance on gradient histograms (FD-hog) "
         "alone, which needs no weights", choices=["inception", "hog"])

    flag(more, "--metrics", "", f"comma-separated: {', '.join(METRICS)}")
    flag(more, "--kid-subsets", 100, "pairs of subsets behind KID", above=0, most=10**6)
    flag(more, "--kid-subset-size", 1000, "images in each; smaller sets are used whole", least=2, most=10**5)
    flag(more, "--seed", 2020, "of KID's subsets and FID-infinity's halves", most=2**32 - 1)
    flag(more, "--encoder", "dinov2-vit-l", "encoder of fdd; another one is reported as fd_NAME")

    flag(weights, "--inception-weights", None, "pt_inception-2015-12-05-6726825d.pth; without it a copy in "
         "torch hub's folder is used, or downloaded once", metavar="PATH")
    flag(weights, "--encoder-ckpt", None, "weights of --encoder on disk", metavar="PATH")
    flag(weights, "--clip-ckpt", None, "timm's weights of CLIP ViT-L/14 at 336 px on disk, for cmmd",
         metavar="PATH")

    flag(output, "--json", None, "figures, and what proves them: digests, counts, versions", metavar="PATH")
    flag(output, "--save-ref", None, "write a reference made from the one input and stop", metavar="OUT.npz")
    flag(output, "--save-ref-images", 10_000, "images kept in it (evenly spaced) for precision and recall; "
         "its statistics are of all", least=4, metavar="N")
    flag(output, "--cache", None, "keep features there, 16 KB per image, by content; a run that was stopped "
         "goes on from them", metavar="FOLDER")
    flag(output, "--batch-size", None, "images per process at a time (default: what fits)", type=int, above=0)
    args = parser.parse_args(argv)
    args.metrics = [name for name in args.metrics.split(",") if name]
    args.exact_is, args.exact_pr = args.exact_is or args.exact, args.exact_pr or args.exact
    return args


if __name__ == "__main__":
    cli.answer_early(parse_args)

import hashlib
import json
import os
import platform
import sys

import numpy as np
import scipy
import timm
import torch

from models.inception import POOL_DIM, WEIGHTS_SHA256
from models.metrics import (check_covariance, feature_statistics, frechet_distance,  # noqa: F401
                            inception_score, kernel_distance, precision_recall)
from models.runtime import distributed, files, signals
from models.runtime.features import (CLIP, cached_features, clip_features, encoder_features,  # noqa: F401
                                     extract, fitting_batch_size, hog_features, inception_features,
                                     load_inception, load_reference, progress_line, score, score_samples)
from models.runtime.images import STATISTICS, evenly_spaced, input_digest, open_input, write_npz

# What a figure called fdd may come from.
FDD_ENCODERS = ("dinov2-vit-l", "vit_large_patch14_dinov2.lvd142m")
PROTOCOL = 50_000    # samples behind published figures
LABELS = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision",
          "recall": "Recall", "f_score": "F-score", "kid": "KID", "kid_std": "KID, spread of its subsets",
          "inception_score_std": "Inception Score, spread of its splits", "fid_infinity": "FID-infinity",
          "fid_error": "FID, standard error", "cmmd": "CMMD", "fdd": "FDD", "fd_hog": "FD-hog"}
# The files behind a figure.
CODE = ("evaluate_fid.py", "models/metrics.py", "models/inception.py", "models/encoders.py",
        "models/runtime/features.py", "models/runtime/images.py", "models/runtime/data.py")


# ---------------------------------------------------------------- what can be wrong, before any work

def check_args(args):
    """Raise a one-line error for settings that contradict each other, or outputs that cannot be written."""
    if unknown := set(args.metrics) - set(METRICS):
        raise ValueError(f"--metrics {','.join(sorted(unknown))}: unknown, known are {', '.join(METRICS)}")
    if bool(args.save_ref) == bool(args.samples):
        raise ValueError("give a reference and samples, or --save-ref OUT.npz and one input")
    if args.features == "hog" and (args.metrics or args.save_ref):
        raise ValueError("--features hog gives FD-hog alone; drop --metrics and --save-ref")
    if args.save_ref and args.metrics:
        raise ValueError("--metrics belongs to a comparison; drop it with --save-ref")
    if args.save_ref and not args.save_ref.endswith(".npz"):
        raise ValueError(f"--save-ref {args.save_ref}: must end in .npz")
    if args.save_ref and args.json:
        raise ValueError("--json belongs to a comparison; drop it with --save-ref")
    read = (args.ref, args.samples, args.inception_weights, args.encoder_ckpt, args.clip_ckpt)
    for path in (args.json, args.save_ref, args.cache and os.path.join(args.cache, "piece")):
        if path:
            files.check_writable(path, [p for p in read if p])
            files.remove_leftovers(os.path.dirname(os.path.abspath(path)))


def check_inputs(args, inputs):
    """Raise a one-line error for inputs too poor for the task; set images.used and images.labels."""
    for images in inputs:
        images.used = min(images.count, args.limit or images.count)
        for name in ("sigma", "sigma_s"):
            if name in images.statistics and args.features == "inception":
                check_covariance(images.statistics[name], f"{images.path}: {name}")
        if not images.count and (args.features == "hog" or args.save_ref):
            raise ValueError(f"{images.path}: has statistics but no images (arr_0), which this needs")
        if "fid_per_class" in args.metrics:
            labels = images.array("arr_1")
            if labels is None or labels.shape != (images.count,) or labels.dtype.kind not in "iu":
                raise ValueError(f"{images.path}: fid_per_class needs a .npz with a label per image (arr_1)")
            images.labels = labels[:images.used]
    if args.save_ref and inputs[0].statistics:
        raise ValueError(f"{args.ref}: is a reference with statistics already")
    if args.features == "hog" and len({images.size for images in inputs} | {inputs[0].size[::-1]}) > 1:
        raise ValueError("--features hog needs square images of one size in both inputs; pass --resolution")


def load_networks(args, inputs, device):
    """-> (Inception network or None, list of feature functions, {network: what its weights are})."""
    if args.features == "hog":
        return None, [hog_features(inputs[0].size[0], device)], {"hog": {"size": list(inputs[0].size)}}
    net = load_inception(args.inception_weights, device)
    networks, about = [inception_features(net)], {"inception": {"path": net.path}}
    if "fdd" in args.metrics:
        networks.append(encoder_features(args.encoder, args.encoder_ckpt, device))
        about["fdd"] = {"name": args.encoder, "path": args.encoder_ckpt}
    if "cmmd" in args.metrics:
        networks.append(clip_features(args.clip_ckpt, device))
        about["cmmd"] = {"name": CLIP, "path": args.clip_ckpt}
    for weights in about.values():
        if weights["path"]:
            weights["sha256"] = files.sha256(weights["path"])
    return net, networks, about


# ---------------------------------------------------------------- the work

def save_reference(path, images, statistics, count):
    """Write `count` evenly spaced images and mu, sigma, mu_s, sigma_s: the layout of the suite's references.

    `protocol` says of how many images the statistics are; arr_1, where the input has it, keeps their labels.
    """
    chosen, labels = evenly_spaced(images.used, count), images.array("arr_1")
    more = {name: statistics[name] for name in STATISTICS}
    if labels is not None and labels.shape == (images.count,):
        more["arr_1"] = labels[chosen]
    protocol = {"reference": os.path.basename(images.path), "statistics_of": images.used}
    more["protocol"] = np.array(json.dumps(protocol))
    write_npz(path, images.read(256, rows=chosen), (len(chosen), *images.size, 3), **more)
    print(f"{path}: statistics of {images.used:,} images, {len(chosen):,} kept for precision and recall")


def remarks(args, ref, samples, result, about):
    """What a reader of the figures must know, one line each."""
    lines, both = [], (ref, samples)
    for images in both:
        if images.converted:
            lines.append(f"{images.path}: {images.converted:,} grey, palette or transparent images were "
                         "converted to RGB")
        if images.statistics and "fid" in result:
            of = (images.protocol or {}).get("statistics_of")
            which = "FID and sFID use" if "mu_s" in images.statistics else "FID uses"
            lines.append(f"{which} the statistics stored in {images.path}"
                         + (f" (of {of:,} images)" if isinstance(of, int) else "")
                         + (f", precision and recall its {images.used:,} images" if images.used else
                            ", which has no images: precision, recall and the like are left out"))
        if images.statistics and "mu_s" not in images.statistics:
            lines.append(f"{images.path}: no mu_s, so no sFID. If pytorch-fid made it: it resizes with half-"
                         "pixel centres and scales to [-1, 1], unlike the suite, so FID is off by about 1 %")
    if ref.count and samples.count and ref.size != samples.size:
        (a, b), (c, d) = ref.size, samples.size
        lines.append(f"sizes differ: {a}x{b} in the reference, {c}x{d} in the samples")
    few = [(images.used, name) for name, images in (("reference images", ref), ("samples", samples))
           if 0 < images.used < PROTOCOL and not (images.statistics and "fid" in result)]
    if few:
        counts = " and ".join(f"{n:,} {name}" for n, name in few)
        singular = f"; below {POOL_DIM + 1:,} the covariance is singular" if min(few)[0] <= POOL_DIM else ""
        lines.append(f"{counts}: FID is biased upwards by few images, compare only at equal numbers"
                     + singular)
    if args.exact_pr and "precision" in result:
        lines.append("--exact-pr: precision and recall in float32, not the suite's arithmetic")
    if args.exact_is and "inception_score" in result:
        lines.append("--exact-is: Inception Score in float64, not the suite's arithmetic")
    if np.isnan(result.get("inception_score", 0)):
        lines.append("Inception Score nan, as in the suite: a probability underflows; see --exact-is")
    if "kid" in result and min(ref.used, samples.used) < args.kid_subset_size:
        lines.append(f"KID: a set is smaller than --kid-subset-size {args.kid_subset_size:,} and used whole")
    if "inception" in about and not about["inception"]["sha256"].startswith(WEIGHTS_SHA256):
        lines.append(f"{about['inception']['path']}: not the FID Inception (its sha256 does not begin with "
                     f"{WEIGHTS_SHA256}); no figure here compares with a published one")
    return lines


def report(args, ref, samples, result, about, device):
    """Print the figures, the suite's five first, and write --json."""
    notes = remarks(args, ref, samples, result, about)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    per_class = result.pop("fid_per_class", None)
    for name in sorted(result, key=[*LABELS, *result].index):
        print(f"{LABELS.get(name, name)}: {result[name]}")
    if per_class:
        worst, best = max(per_class, key=per_class.get), min(per_class, key=per_class.get)
        mean = np.mean(list(per_class.values()))
        print(f"FID per class: {mean}, the mean of {len(per_class)}, from {per_class[best]:.6g} "
              f"(class {best}) to {per_class[worst]:.6g} (class {worst})")
    if args.json:
        figures = {name: value if np.isfinite(value) else None for name, value in result.items()}
        figures |= {"fid_per_class": per_class} if per_class else {}
        files.save_json({**figures, **proof(args, ref, samples, about, device), "notes": notes}, args.json)


def proof(args, ref, samples, about, device):
    """What makes the figures repeatable: inputs, weights, settings, versions, precision, seeds."""
    inputs = {which: {"path": images.path, "images": images.count, "used": images.used,
                      "size": list(images.size), "sha256": images.digest, "converted": images.converted,
                      "protocol": images.protocol,
                      "statistics": "stored" if images.statistics else "computed"}
              for which, images in (("ref", ref), ("samples", samples))}
    code = hashlib.sha256()
    for name in CODE:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), "rb") as file:
            code.update(file.read())
    return inputs | {
        "weights": about, "settings": vars(args), "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"code_sha256": code.hexdigest(), "python": platform.python_version(),
                     "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__,
                     "timm": timm.__version__},
        "arithmetic": {"features": "float32, TF32 off", "statistics": "mean float32, covariance float64",
                      "inception_score": "float64" if args.exact_is else "float32",
                      "precision_recall": "float32" if args.exact_pr else "float16, float32 on overflow"},
        "seeds": {"kid": args.seed, "fid_infinity": args.seed}}


def run(args):
    """The program after the flags; raises ValueError or OSError, one line, for what a user can mend."""
    _, _, device = distributed.init()
    check_args(args)
    inputs = [open_input(path, args.resolution) for path in (args.ref, args.samples) if path is not None]
    check_inputs(args, inputs)
    net, networks, about = load_networks(args, inputs, device)
    with distributed.busy("reading the inputs for their digests"):
        for images in inputs:
            wanted = (args.json or args.cache) and distributed.is_main()
            images.digest = input_digest(images) if wanted else None
    distributed.barrier()
    args.batch_size = args.batch_size or fitting_batch_size(device)

    weights = {name: network.get("sha256", network) for name, network in about.items()}
    found = []
    for images in inputs:
        key = json.dumps([images.digest, images.size, weights, torch.__version__])
        folder = args.cache and os.path.join(args.cache, hashlib.sha256(key.encode()).hexdigest()[:32])
        found.append(cached_features(images, networks, device, args.batch_size, not args.save_ref, folder))
    if distributed.is_main() and args.save_ref:
        save_reference(args.save_ref, inputs[0], found[0], args.save_ref_images)
    elif distributed.is_main():
        ref, samples = inputs
        labels = (samples.labels, ref.labels) if "fid_per_class" in args.metrics else None
        result = score(found[1], found[0], net, args.exact_is, args.exact_pr, args.metrics,
                       (args.kid_subsets, args.kid_subset_size), args.seed, device, labels,
                       lambda name: progress_line(name, unit=None))
        if "fdd" in result and args.encoder not in FDD_ENCODERS:
            result[f"fd_{args.encoder}"] = result.pop("fdd")
        report(args, ref, samples, result, about, device)
    distributed.shut_down()


def main(argv=None):
    args = parse_args(argv)
    remedy = (f"the same command goes on from the features in {args.cache}" if args.cache else
              "with --cache FOLDER a run can go on where it was stopped")
    try:
        with signals.stopped_in_one_line(remedy):
            run(args)
    except (ValueError, OSError) as error:
        cli.fail(error)


if __name__ == "__main__":
    main()
