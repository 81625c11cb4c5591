"""Speed of the evaluator next to torch-fidelity and pytorch-fid, and their figures; one JSON line each.

    python tests/bench_eval.py [--figures] [--images 64] [--rounds 3] [--threads 2]

Same PNG files, same (random) weights, same device, from files to pool features, each program with its own
reading and resizing, in alternating runs; the best round of each counts. The two peers take part where they
are installed. --figures: instead of times, FID and Inception Score by each program.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.inception import FIDInception
from models.runtime import features
from models.runtime.data import open_images


def emit(**figures):
    figures = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(figures | {"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)


def clocks(device):
    """(seconds, CPU seconds of this process and of its finished children) once the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def best_of(programs, rounds, device):
    """{name: (seconds, CPU seconds), the least of all rounds of each}, after one round to warm up.

    The programs alternate, so that a slow minute hits all; CPU seconds do not count what other programs of a
    shared machine take away.
    """
    found = {name: [] for name in programs}
    for k in range(rounds + 1):
        for name, program in programs.items():
            begin = clocks(device)
            program()
            if k:
                found[name].append(clocks(device) - begin)
    return {name: np.min(values, 0) for name, values in found.items()}


def ours(folder, network, device):
    data = open_images(folder, labelled=False)
    batches = features.read(data, 32, range(len(data)))
    return features.extract(batches, network, device)


def peers(folder, weights, device):
    """{name: program from files to pool features} of the peers that are installed."""
    programs, paths = {}, sorted(map(str, Path(folder).glob("*.png")))
    with contextlib.suppress(ImportError):
        from pytorch_fid import inception
        from pytorch_fid.fid_score import get_activations
        inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
        first = inception.InceptionV3([3]).to(device)
        programs["pytorch_fid"] = lambda: get_activations(paths, first, 50, 2048, device, 2)
    with contextlib.suppress(ImportError):
        from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
        cuda = device == "cuda"
        second = create_feature_extractor("inception-v3-compat", ["2048"], cuda=cuda, verbose=False,
                                          feature_extractor_weights_path=weights)
        programs["torch_fidelity"] = lambda: extract_featuresdict_from_input_id(
            1, second, input1=folder, cuda=cuda, batch_size=64, verbose=False)["2048"].numpy()
    return programs


def prepare(folder, images, device):
    """-> (network with random weights, file of them, folders of two sets of smooth PNGs of 256 x 256)."""
    torch.manual_seed(0)
    net, weights, sets = FIDInception(), f"{folder}/weights.pth", []
    for tensor in net.state_dict().values():
        if tensor.ndim > 1:     # the default initialisation shrinks activations to nothing
            torch.nn.init.kaiming_normal_(tensor)
    net.fc.weight.mul_(20)      # so that the classes of two images differ
    torch.save(net.state_dict(), weights)
    for seed, cells in enumerate((16, 6)):
        sets.append(f"{folder}/{seed}")
        os.mkdir(sets[-1])
        coarse = np.random.default_rng(seed).integers(0, 256, (images, cells, cells, 3), dtype=np.uint8)
        for k, image in enumerate(coarse):
            Image.fromarray(image).resize((256, 256), Image.BICUBIC).save(f"{sets[-1]}/{k:05d}.png")
    return net.to(device), weights, sets


def bench_features(args):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        net, weights, (images, _) = prepare(folder, args.images, args.device)
        # the pool features alone, as the peers do
        programs = {"ours": lambda: ours(images, lambda x: {"": net(x.permute(0, 2, 3, 1))[0]}, args.device)}
        programs |= peers(images, weights, args.device)
        seconds = best_of(programs, args.rounds, args.device)
    rates = {f"{name}_images_per_s": args.images / s[0] for name, s in seconds.items()}
    rates |= {f"{name}_cpu_s_per_image": s[1] / args.images for name, s in seconds.items()}
    emit(bench="features", images=args.images, device=args.device, **rates)


def compare_figures(args):
    """FID and Inception Score of two sets by us, torch-fidelity and pytorch-fid."""
    import torch_fidelity
    from pytorch_fid import inception
    from pytorch_fid.fid_score import calculate_fid_given_paths
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        net, weights, sets = prepare(folder, args.images, "cpu")
        ref, samples = (ours(path, features.inception_features(net), "cpu") for path in sets)
        found = features.score(samples, ref, net, exact=True)
        emit(program="ours", images=args.images, fid=found["fid"], inception_score=found["inception_score"])
        peer = torch_fidelity.calculate_metrics(
            input1=sets[1], input2=sets[0], isc=True, fid=True, isc_splits=1, cuda=False, verbose=False,
            cache=False, feature_extractor_weights_path=weights)
        emit(program="torch_fidelity", fid=peer["frechet_inception_distance"],
             inception_score=peer["inception_score_mean"])
        inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights, weights_only=True)
        fid = calculate_fid_given_paths([sets[1], sets[0]], 32, "cpu", 2048, 0)
        emit(program="pytorch_fid", fid=float(fid), because="half-pixel resize and 2x/255 - 1")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", action="store_true", help="compare figures instead of times")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # ours computes without TF32, so the others do too
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (compare_figures if args.figures else bench_features)(args)


if __name__ == "__main__":
    main()
