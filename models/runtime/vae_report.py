"""Behind `finetune_vae.py --eval`: several VAEs measured on held-out images, as a table and a picture.

`evaluate(args)` is the whole of it; `measure` gives the figures of one VAE as a dict, `picture` the
reconstructions. The formulas are in models/metrics.py. Every process works on its share of the images. Errors
a user can cause are ValueError or OSError with a message of one line.
"""
import hashlib
import itertools
import math
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models import metrics
from models.encoders import load_encoders
from models.losses import noisy_latents
from models.metrics import float32_exactly, frechet_distance
from models.runtime import cli, distributed, files, signals, vae_files, weights
from models.runtime.data import center_crop, open_image
from models.runtime.features import (extract, inception_features, load_inception, progress_line)
from models.runtime.images import (InputError, evenly_spaced, label_grid, open_input, round_to_uint8,
                                   write_png)
from models.vae import VAE_models

METRICS = ("psnr", "ssim", "lpips", "rfid", "latents", "cknna")  # what --metrics may name
COLUMNS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID",
           "spatial_variance": "spatial variance", "total_variation": "total variation", "cknna": "CKNNA"}
SUMS = ("images", "psnr", "ssim", "lpips", "spatial_variance", "total_variation")
EVAL_PIXELS = 16 * 256 ** 2  # pixels per process and batch


# ---------------------------------------------------------------- the images

def held_out_images(path, resolution, limit=None, seed=0):
    """The images to measure on: namespace(path, count, read, shown, identity).

    `limit` images of a folder, a .zip, a .npz or "shapes", evenly spaced: the first ones of a sorted folder
    would be of a few classes. read(batch_size, rank, world_size) gives this process's uint8 batches [b, H, W,
    3]; shown is uint8 [n, 3, H, W], up to 8 of them; identity: text by which a run that goes on finds that
    they are the same.
    """
    images = open_input(path, None if path.endswith(".npz") else resolution, seed)
    if tuple(images.size) != (resolution, resolution):
        height, width = images.size
        raise ValueError(f"{path}: holds images of {width}x{height}; pass --resolution {height}")
    rows = evenly_spaced(images.count, limit or images.count)
    pictured = rows[evenly_spaced(len(rows), 8)]
    if images.names:
        shown = np.stack([np.asarray(center_crop(open_image(path, images.names[i]), resolution))
                          for i in pictured])
    else:
        shown = next(images.read(8, rows=pictured))
    paths = [os.path.join(path, name) for name in images.names] if os.path.isdir(path) else [path]
    sizes = [os.path.getsize(p) for p in paths if path != "shapes"]

    def read(batch_size, rank=0, world_size=1):
        return images.read(batch_size, rank, world_size, rows)
    identity = hashlib.sha256(repr((path, images.names, sizes, seed)).encode()).hexdigest()
    return SimpleNamespace(path=path, count=len(rows), read=read, identity=identity,
                           shown=torch.from_numpy(shown).permute(0, 3, 1, 2))


# ---------------------------------------------------------------- one VAE

def reconstructions(vae, batches, device, sums, dtype=torch.float32, lpips=None, tokens=None):
    """For each uint8 batch [b, H, W, 3] its reconstruction from the posterior's mean, likewise.

    On the way, adds to `sums`, float64 [len(SUMS) + 2 C], and calls tokens(images uint8 [b, 3, H, W], z) if
    given. The VAE runs in `dtype`, everything else in float32 or wider.
    """
    for batch in batches:
        # inside the loop: autocast and inference mode belong to a thread, and another may read the stream
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            originals = torch.as_tensor(batch).to(device).permute(0, 3, 1, 2)
            posterior = vae.encode(originals.float() / 127.5 - 1)
            copies = round_to_uint8(vae.decode(posterior.mean))
        with torch.inference_mode():
            a, b = originals.float(), copies.permute(0, 3, 1, 2).float()
            distance = lpips(a / 127.5 - 1, b / 127.5 - 1) if lpips else torch.zeros(len(a), device=device)
            values = [torch.ones(len(a), device=device), metrics.psnr(a, b), metrics.ssim(a, b), distance,
                      metrics.spatial_variance(posterior.mean), metrics.total_variation(posterior.mean)]
            sums[:len(SUMS)] += torch.stack([value.double().sum() for value in values])
            sums[len(SUMS):] += len(a) * metrics.latent_moments(posterior).flatten()
            if tokens is not None:
                tokens(originals, posterior.mean)
        yield copies


def measure(vae, batches, device, dtype=torch.float32, lpips=None, features=None, reference=None, tokens=None,
            progress=lambda done: None):
    """Figures of a VAE on all processes' batches, as a dict.

    Its keys: psnr, ssim, lpips (if given), spatial_variance, total_variation, latents_mean and latents_std
    (lists of C, of sampled latents) and, in the main process, rfid.

    features: function that takes the stream of uint8 reconstructions and returns their {"mu", "sigma"}, as
    features.extract does; reference: the same of the originals. progress: called with the number of images
    done.
    """
    sums = torch.zeros(len(SUMS) + 2 * vae.latent_channels, dtype=torch.float64, device=device)
    stream, done = reconstructions(vae, batches, device, sums, dtype, lpips, tokens), 0
    with float32_exactly():  # once, around all batches: with `features`, a thread draws them from the stream
        found = features(stream) if features else {}
        for copies in stream:  # without features, running through it is the work; with them nothing is left
            done += len(copies) * distributed.world_size()
            progress(done)
    count, *totals = distributed.all_reduce_sum(sums).tolist()
    result = {name: total / count for name, total in zip(SUMS[1:], totals)}
    if lpips is None:
        del result["lpips"]
    mean, square = np.array(totals[len(SUMS) - 1:]).reshape(2, -1) / count
    std = np.sqrt(np.maximum(square - mean ** 2, 0))
    result |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    if found:
        result["rfid"] = frechet_distance(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
    return result


class TokenPairs:
    """Collects for CKNNA the mean tokens, over positions, of a SiT at its encoder_depth and of an encoder.

    Called with images uint8 [b, 3, R, R] and their latents z [b, C, h, w]. The SiT sees z with seeded noise
    at time t and the null label (without one: the last class).
    """

    def __init__(self, sit, encoder, t=0.5, path_type="linear", seed=0):
        self.sit, self.encoder, self.t, self.path_type = sit, encoder, t, path_type
        self.seed, self.calls, self.found, self.latest = seed, 0, [], None
        block = sit.blocks[sit.encoder_depth - 1]
        block.register_forward_hook(lambda _, __, output: setattr(self, "latest", output))

    def __call__(self, images, z):
        t = torch.full((len(z),), self.t, device=z.device)
        number = self.calls * distributed.world_size() + distributed.rank()
        self.calls += 1  # noise of the batch's number: the same for any number of processes
        generator = torch.Generator(z.device).manual_seed(self.seed * 1_000_003 + number)
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        label = torch.full((len(z),), len(self.sit.y_embedder.embedding_table.weight) - 1, device=z.device)
        self.sit(noisy_latents(self.sit.normalize(z), noise, t, self.path_type)[0], t, label, align_only=True)
        self.found.append((number, *(x.float().mean(1).cpu() for x in (self.latest, self.encoder(images)))))

    def cknna(self, device, most=10000):
        """Over at most `most` images of all processes, evenly spaced; every process must call it."""
        found = self.found
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            found = sorted((batch for part in everyone for batch in part), key=lambda batch: batch[0])
        tokens = [torch.cat(batches) for batches in list(zip(*found))[1:]]
        chosen = evenly_spaced(len(tokens[0]), most)
        return metrics.cknna(*(x[chosen].to(device) for x in tokens))


@torch.inference_mode()
def picture(images, vaes, captions):
    """PIL.Image: images (uint8 [N, 3, H, W]) in one row; for each VAE their copies, and their latents.

    Colours of latents are their first three principal components.
    """
    rows, labels = [images.permute(0, 2, 3, 1)], ["original"]
    for vae, caption in zip(vaes, captions, strict=True):
        z = vae.encode(images.to(next(vae.parameters()).device).float() / 127.5 - 1).mean
        colors = (metrics.principal_colors(z.cpu()) * 255).round().to(torch.uint8)
        colors = F.interpolate(colors, images.shape[-2:]).permute(0, 2, 3, 1)
        rows += [round_to_uint8(vae.decode(z)).cpu(), colors]
        labels += [caption, f"latents of {caption}"]
    captions = [text for label in labels for text in (label, *[""] * (len(images) - 1))]
    return label_grid(torch.cat(rows), captions, columns=len(images))


def save_picture(path, images, vaes, captions):
    """The same as a PNG file, whole or not at all."""
    write_png(path, picture(images, vaes, captions))


# ---------------------------------------------------------------- several VAEs: the command line's --eval

def evaluate(args):
    """Measure the VAEs args.eval: a table on the terminal; metrics.json and images.png in the run folder.

    args: data_dir, resolution, limit, metrics, vae, encoder, encoder_ckpt, model_ckpt, inception_weights,
    mixed_precision ("auto" is float32 here), seed, output_dir, exp_name (None: the next vae-eval-NUMBER),
    dry_run. metrics.json is written after each VAE; the same command goes on with those that are not in it. A
    user's mistake ends the process in one line.
    """
    try:
        with signals.stopped_in_one_line("metrics.json has what is measured; the same command goes on"):
            _evaluate(args)
    except (InputError, OSError) as error:
        cli.fail(error)
    distributed.shut_down()


def _evaluate(args):
    try:
        rank, world_size, device = distributed.init()
        with distributed.main_first():
            tools = prepare(args, device)
            folder, results = run_folder(args, tools) if rank == 0 else (None, {})
    except (ValueError, OSError) as error:
        cli.fail(error)
    if args.dry_run:
        return print("settings are sound") if rank == 0 else None
    done = torch.tensor([float(source in results) for source in tools.vaes], device=device)
    todo = [source for source, d in zip(tools.vaes, distributed.all_reduce_sum(done).tolist()) if not d]
    size, count = max(1, min(256, EVAL_PIXELS // args.resolution ** 2)), tools.images.count
    features = reference = None
    if tools.inception is not None and todo:
        networks = [inception_features(tools.inception)]

        def features(stream, name):
            line = progress_line(name, count)
            return extract(stream, networks, device, keep=False, skip=("_s",), progress=line)
        # of rFID: these images themselves
        reference = features(tools.images.read(size, rank, world_size), args.data_dir)
    for source in todo:
        vae, sit = tools.vaes[source].to(device), tools.sits[source]
        tokens = sit and TokenPairs(sit.to(device), tools.encoder, path_type=sit.path_type, seed=args.seed)
        batches, line = tools.images.read(size, rank, world_size), progress_line(source, count)
        results[source] = measure(vae, batches, device, tools.dtype, tools.lpips,
                                  features and partial(features, name=source), reference, tokens, line)
        if sit:
            results[source]["cknna"] = tokens.cknna(device)
        if rank == 0:
            write_results(folder, args, tools, results)
    if rank == 0:
        report(folder, args, tools, {source: results[source] for source in tools.vaes})


def open_vae(source, resolution, name=None):
    """Any VAE, in eval mode on the CPU; ValueError if not of type `name` or misfit to the resolution."""
    found, state, _ = vae_files.open_vae(source, name)
    vae = VAE_models[found]().eval().requires_grad_(False)
    vae.load_state_dict(state)
    if resolution % vae.downsample:
        raise ValueError(f"--resolution {resolution} is not divisible by {vae.downsample}, the downsampling "
                         f"factor of {found}")
    return vae


def open_sit(args, source, vae):
    """The SiT whose tokens CKNNA compares: of --model-ckpt, of the VAE's own checkpoint, or None."""
    path = args.model_ckpt or source
    content = files.load(path) if os.path.isfile(path) else {}
    if "ema" not in content:
        if args.model_ckpt:
            raise ValueError(f"--model-ckpt {path}: no training checkpoint with a SiT")
        return None
    settings = weights.training_args(content, path)
    sit = weights.build_sit(content["ema"], settings, path)
    sit.encoder_depth, sit.path_type = settings.get("encoder_depth", 8), settings.get("path_type") or "linear"
    if (sit.in_channels, sit.input_size) != (vae.latent_channels, args.resolution // vae.downsample):
        own = f"{vae.latent_channels} x {args.resolution // vae.downsample}^2"
        raise ValueError(f"{path}: its model takes {sit.in_channels} x {sit.input_size}^2 latents, {source} "
                         f"gives {own}; check --resolution")
    return sit


def prepare(args, device):
    """VAEs and SiTs by source, images, LPIPS, Inception, encoder; or a one-line error before long work."""
    wanted = [m for m in args.metrics.split(",") if m]
    if not wanted or set(wanted) - set(METRICS):
        raise ValueError(f"--metrics {args.metrics}: known are {', '.join(METRICS)}")
    if args.resolution < 16:
        raise ValueError(f"--resolution {args.resolution}: SSIM and LPIPS need at least 16 pixels")
    tools = SimpleNamespace(wanted=wanted, vaes={}, sits={}, lpips=None, inception=None, encoder=None)
    tools.dtype = {"auto": torch.float32, "no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        args.mixed_precision]
    for source in args.eval:
        tools.vaes[source] = open_vae(source, args.resolution, args.vae)
        tools.sits[source] = open_sit(args, source, tools.vaes[source]) if "cknna" in wanted else None
    tools.images = held_out_images(args.data_dir, args.resolution, args.limit, args.seed + 1)
    without = [m for m in wanted if m not in ("lpips", "rfid")]
    remedy = f"leave it out with --metrics {','.join(without) or 'psnr,ssim'}"
    if "lpips" in wanted:
        tools.lpips = weights.lpips(remedy).to(device)
    if "rfid" in wanted:
        try:
            tools.inception = load_inception(args.inception_weights, device)
        except OSError as error:
            raise OSError(f"the weights of rFID: {error}; or {remedy}") from error
    if "cknna" in wanted:
        if not any(tools.sits.values()):
            raise ValueError("cknna compares a model's tokens: name its checkpoint with --model-ckpt")
        if tools.images.count <= 10:
            raise ValueError(f"{args.data_dir}: cknna needs more than 10 images, not {tools.images.count}")
        tools.encoder = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)[0]
    if distributed.is_main():
        digests = {source: [weights.state_digest(net) for net in (vae, tools.sits[source]) if net is not None]
                   for source, vae in tools.vaes.items()}
        tools.about = {"data_dir": args.data_dir, "images": tools.images.count, "resolution": args.resolution,
                       "identity": tools.images.identity, "metrics": sorted(wanted), "seed": args.seed,
                       "dtype": str(tools.dtype), "inception": getattr(tools.inception, "sha256", None),
                       "encoder": [args.encoder, args.encoder_ckpt] if "cknna" in wanted else None,
                       "sha256": digests}
    return tools


# ---------------------------------------------------------------- what is written

def run_folder(args, tools):
    """(folder of this evaluation, {source: figures} of the VAEs that are measured there already).

    Made here, with a metrics.json that says what is measured, but for a dry run. Without --exp-name: the
    first of vae-eval-1, vae-eval-2 ... that is free, or that holds the same VAEs, images and settings. Raises
    ValueError if --exp-name holds another evaluation.
    """
    names = [args.exp_name] if args.exp_name else (f"vae-eval-{number}" for number in itertools.count(1))
    for name in names:
        folder = os.path.join(args.output_dir, name)
        path = os.path.join(folder, "metrics.json")
        if not os.path.exists(path if args.exp_name else folder):
            files.check_writable(path)
            if not args.dry_run:
                write_results(folder, args, tools, {})
            return folder, {}
        try:
            content = files.load_json(path)
        except (OSError, ValueError):
            content = {}
        other = [key for key, value in tools.about.items() if content.get(key) != value]
        if not other:
            done = content["vaes"]
            if done:
                print(f"{path}: {len(done)} of {len(tools.vaes)} VAEs are measured already")
            return folder, done
    raise ValueError(f"{folder} holds another evaluation (of other {other[0]}); use another --exp-name")


def columns(tools):
    """(single figures, lists) that --metrics asks for, by name."""
    latents = "latents" in tools.wanted
    wanted = {*tools.wanted, *(("spatial_variance", "total_variation") if latents else ())}
    return [m for m in COLUMNS if m in wanted], ["latents_mean", "latents_std"] if latents else []


def remarks(args, tools):
    """What a reader of the table must know, one line each."""
    n = tools.images.count
    notes = [f"{n:,} images of {args.data_dir} at {args.resolution} px; reconstructed from the posterior's "
             "mean"]
    if "rfid" in tools.wanted:
        few = "; fewer than 2,049 images: compare only at equal numbers" if n < 2049 else ""
        notes.append("rFID's reference is these images themselves, not the reference of a generation "
                     f"benchmark{few}")
    return notes


def write_results(folder, args, tools, results):
    """metrics.json with the VAEs measured so far; an infinite PSNR is null there."""
    single, lists = columns(tools)
    figures = {}
    for source, result in results.items():
        finite = {name: result[name] if math.isfinite(result[name] or 0) else None
                  for name in single if name in result}
        figures[source] = finite | {name: result[name] for name in lists}
    content = {**tools.about, "notes": remarks(args, tools), "vaes": figures}
    files.save_json(content, os.path.join(folder, "metrics.json"))


def report(folder, args, tools, results):
    """Print the table, write metrics.json (in the order of args.eval) and images.png."""
    single, lists = columns(tools)
    width = max(3, *map(len, results))
    print("".join([f"{'VAE':<{width}}", *(f"  {COLUMNS[name]:>16}" for name in single)]))
    for source, result in results.items():
        cells = [f"{result[name]:.4f}" if result.get(name) is not None else "-" for name in single]
        print("".join([f"{source:<{width}}", *(f"  {cell:>16}" for cell in cells)]))
    for source, result in results.items():
        for name in lists:
            print(f"{source} {name}: " + " ".join(f"{value:.4g}" for value in result[name]))
    print("\n".join(f"note: {note}" for note in remarks(args, tools)))
    write_results(folder, args, tools, results)
    save_picture(os.path.join(folder, "images.png"), tools.images.shown, tools.vaes.values(), list(results))
    print(f"wrote {folder}/metrics.json and images.png")
