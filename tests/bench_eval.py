"""Speed of the evaluator beside the plain way, torch-fidelity and pytorch-fid; one JSON line each.

    python tests/bench_eval.py [--plain | --peers] [--images 64] [--rounds 3] [--points 10000] [--threads 2]
                               [--device cuda]

Same PNG files, same (random) weights, same device, from files to pool features, each program with its own
reading and resizing; the programs take turns and the best round of each counts. The two peers take part where
they are installed. Then precision and recall at points x points x 2048, half and float32, and
the Frechet distance at 2048 dimensions. The plain way: files read one after the other between the batches,
whole matrices of distances, scipy's matrix square root; --plain runs nothing else. --peers: the figures
themselves instead of times, from images to FID, KID and Inception Score by each program with equal weights.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate_fid
from models.runtime.images import open_input
from models.inception import FIDInception


def emit(**figures):
    figures = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(figures | {"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)


def clocks(device):
    """(seconds, CPU seconds of this process and those it has waited for) once the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def best_of(programs, rounds, device):
    """{name: (seconds, CPU seconds), the least of all rounds of each}, after one round to warm up.

    The programs take turns, so that a slow minute hits all; CPU seconds do not count what other programs of
    a shared machine take away.
    """
    found = {name: [] for name in programs}
    for program in programs.values():
        program()
    for _ in range(rounds):
        for name, program in programs.items():
            begin = clocks(device)
            program()
            found[name].append(clocks(device) - begin)
    return {name: np.min(values, 0) for name, values in found.items()}


def ours(folder, net, device):
    images = open_input(folder)
    batches = images.read(evaluate_fid.fitting_batch_size(device))
    return evaluate_fid.extract(batches, [lambda x: {"": net(x)[0]}], device)["pool"]


def plain_features(folder, net, device):
    pool = []
    files = sorted(Path(folder).glob("*.png"))
    for names in (files[i:i + 32] for i in range(0, len(files), 32)):
        images = np.stack([np.array(Image.open(name).convert("RGB")) for name in names])
        with torch.no_grad():
            pool.append(net(torch.from_numpy(images).to(device))[0].cpu())
    return torch.cat(pool).numpy()


def plain_precision_recall(ref, samples, device):
    ref, samples = (torch.from_numpy(x).to(device) for x in (ref, samples))
    radii = [torch.cdist(x, x).kthvalue(4, dim=1).values for x in (ref, samples)]
    distances = torch.cdist(ref, samples)
    return ((distances <= radii[0][:, None]).any(0).float().mean().item(),
            (distances <= radii[1]).any(1).float().mean().item())


def peers(folder, weights, device):
    """{name: program} of the peers that are installed."""
    programs, files = {}, sorted(map(str, Path(folder).glob("*.png")))
    with contextlib.suppress(ImportError):
        import pytorch_fid.inception
        from pytorch_fid.fid_score import get_activations
        inception = pytorch_fid.inception
        inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
        first = inception.InceptionV3([3]).to(device)
        programs["pytorch_fid"] = lambda: get_activations(files, first, 50, 2048, device, 2)
    with contextlib.suppress(ImportError):
        from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
        cuda = device == "cuda"
        second = create_feature_extractor("inception-v3-compat", ["2048"], cuda=cuda, verbose=False,
                                          feature_extractor_weights_path=weights)
        programs["torch_fidelity"] = lambda: extract_featuresdict_from_input_id(
            1, second, input1=folder, cuda=cuda, batch_size=64, verbose=False)["2048"].numpy()
    return programs


def filled_network():
    """FIDInception with random weights; the default initialisation shrinks activations to nothing."""
    net = FIDInception()
    for tensor in net.state_dict().values():
        if tensor.ndim > 1:
            torch.nn.init.kaiming_normal_(tensor)
    return net


def write_images(folder, count, seed=0, cells=16):
    """A new folder of `count` smooth random PNG files of 256 x 256."""
    folder.mkdir()
    coarse = np.random.default_rng(seed).integers(0, 256, (count, cells, cells, 3), dtype=np.uint8)
    for k, image in enumerate(coarse):
        Image.fromarray(image).resize((256, 256), Image.BICUBIC).save(folder / f"{k:05d}.png")
    return folder


def bench_features(args):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        net, weights = filled_network(), f"{folder}/weights.pth"
        torch.save(net.state_dict(), weights)
        images = write_images(Path(folder) / "images", args.images)
        net.to(args.device)
        programs = {"plain": lambda: plain_features(images, net, args.device)}
        if not args.plain:
            programs["ours"] = lambda: ours(str(images), net, args.device)
            programs |= peers(str(images), weights, args.device)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            features = {name: program() for name, program in programs.items()}
            seconds = best_of(programs, args.rounds, args.device)
    rates = {f"{name}_images_per_s": args.images / s[0] for name, s in seconds.items()}
    rates |= {f"{name}_cpu_s_per_image": s[1] / args.images for name, s in seconds.items()}
    for name in [] if args.plain else set(seconds) - {"ours"}:
        rates[f"speedup_over_{name}"], rates[f"cpu_ratio_{name}"] = (seconds[name] / seconds["ours"]).tolist()
    if "torch_fidelity" in features:
        rates["largest_difference"] = float(np.abs(features["ours"] - features["torch_fidelity"]).max())
    emit(bench="features", images=args.images, device=args.device, **rates)


def bench_peers(args):
    """FID, KID and Inception Score of two sets by us, torch-fidelity and pytorch-fid, and the differences."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.utils import create_feature_extractor
    torch.manual_seed(0)
    kid = {"subsets": 20, "subset_size": args.images // 2}
    with tempfile.TemporaryDirectory() as folder:
        net, weights = filled_network(), f"{folder}/weights.pth"
        net.fc.weight.mul_(20)      # so that the classes of two images differ
        torch.save(net.state_dict(), weights)
        sets = [write_images(Path(folder) / name, args.images, k, cells)
                for k, (name, cells) in enumerate((("ref", 16), ("samples", 6)))]
        images = [open_input(str(path)) for path in sets]
        ref, samples = (evaluate_fid.extract(x.read(32), [evaluate_fid.inception_features(net)], "cpu")
                        for x in images)
        found = evaluate_fid.score(samples, ref, net, exact_is=True, extras=["kid"], kid=tuple(kid.values()))
        emit(program="ours", images=args.images,
             **{k: found[k] for k in ("fid", "kid", "kid_std", "inception_score")})

        with contextlib.redirect_stdout(io.StringIO()):
            peer = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False,
                                            verbose=False, feature_extractor_weights_path=weights)
        with torch.no_grad():
            theirs = [[torch.cat(x) for x in zip(*(peer(torch.from_numpy(b).permute(0, 3, 1, 2))
                                                   for b in x.read(32)))]
                      for x in images]
        (pool_ref, _), (pool, logits) = theirs
        scores = [isc_features_to_metric(logits, splits, shuffle)["inception_score_mean"]
                  for splits, shuffle in ((1, False), (10, True))]
        theirs = kid_features_to_metric(pool, pool_ref, kid_subsets=20, kid_subset_size=kid["subset_size"],
                                        verbose=False)
        statistics = (fid_features_to_statistics(x) for x in (pool, pool_ref))
        fid = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
        emit(program="torch_fidelity", fid=fid, kid=theirs["kernel_inception_distance_mean"],
             kid_std=theirs["kernel_inception_distance_std"],
             inception_score_of_ten_shuffled_splits=scores[1], inception_score_of_one_split=scores[0])
        largest = float(np.abs(samples["pool"] - pool.numpy()).max() / np.abs(samples["pool"]).max())
        emit(difference="torch_fidelity", features_of_largest=largest,
             fid_relative=abs(found["fid"] / fid - 1),
             kid_relative=abs(found["kid"] / theirs["kernel_inception_distance_mean"] - 1),
             kid_std_relative=abs(found["kid_std"] / theirs["kernel_inception_distance_std"] - 1),
             inception_score_relative=abs(found["inception_score"] / scores[0] - 1))

        import pytorch_fid.inception
        from pytorch_fid.fid_score import calculate_fid_given_paths
        inception = pytorch_fid.inception
        inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
        with contextlib.redirect_stderr(io.StringIO()):
            fid = calculate_fid_given_paths([str(sets[1]), str(sets[0])], 32, "cpu", 2048, 0)
        emit(program="pytorch_fid", fid=fid, relative_to_ours=fid / found["fid"] - 1,
             because="half-pixel resize and 2x/255 - 1")


def bench_precision_recall(args):
    random = np.random.default_rng(0)
    ref, samples = (np.maximum(random.standard_normal((args.points, 2048), dtype=np.float32), 0)
                    for _ in range(2))
    programs = {"plain": lambda: plain_precision_recall(ref, samples, args.device)}
    if not args.plain:
        for name, exact in (("half", False), ("exact", True)):
            programs[name] = partial(evaluate_fid.precision_recall, ref, samples, exact=exact,
                                     device=args.device)
    seconds = best_of(programs, 1, args.device)
    emit(bench="precision_recall", points=args.points, device=args.device,
         **{f"{k}_s": v[0] for k, v in seconds.items()},
         **({} if args.plain else {"speedup": seconds["plain"][0] / seconds["exact"][0]}))


def bench_frechet(args):
    width = args.dimensions
    random, scale = np.random.default_rng(0), 1 / (1 + np.arange(width) / 64)
    a, b = (evaluate_fid.feature_statistics(random.standard_normal((2 * width, width)) * scale + m)
            for m in (0, 0.1))

    def by_root():
        root = scipy.linalg.sqrtm(a[1] @ b[1]).real
        return float((a[0] - b[0]) @ (a[0] - b[0]) + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root))
    seconds = best_of({"plain": by_root} if args.plain
                      else {"plain": by_root, "ours": lambda: evaluate_fid.frechet_distance(*a, *b)},
                      args.rounds, "cpu")
    emit(bench="frechet", dimensions=width, **{f"{k}_s": v[0] for k, v in seconds.items()},
         **({} if args.plain else {"speedup": seconds["plain"][0] / seconds["ours"][0]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--peers", action="store_true",
                        help="compare the figures with those of the installed peers")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=10_000, help="rows of each set in precision and recall")
    parser.add_argument("--dimensions", type=int, default=2048, help="of the Frechet distance")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # ours computes without TF32, so the others do too
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.peers:
        return bench_peers(args)
    bench_features(args)
    bench_precision_recall(args)
    bench_frechet(args)


if __name__ == "__main__":
    main()
