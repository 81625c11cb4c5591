"""A VAE on a set of images: the stream of its reconstructions, what is measured on the way, and a picture of both.

Behind `finetune_vae.py --eval`; the formulas are in models/reconstruction.py. Every process works on its share.
Errors a user can cause are ValueError or OSError with a message of one line.
"""
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models import metrics

from models.encoders import load_encoders
from models.runtime import distributed, files, weights
from models.runtime.cli import fail
from models.runtime.features import extract, inception_features, load_inception
from models.runtime.images import InputError
from models.runtime.trainer import autocast_type
from models.vae import VAE_models
from models.runtime.data import ShapesData, center_crop, open_image
from models.runtime.images import label_grid
from models.runtime.images import open_input
from models.metrics import float32_exactly, frechet_distance
from models.losses import noisy_latents

EVAL_PIXELS = 16 * 256 ** 2  # pixels per process and batch of --eval
COLUMNS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID", "spatial_variance": "spatial variance",
           "total_variation": "total variation", "cknna": "CKNNA"}
SUMS = ("images", "psnr", "ssim", "lpips", "spatial_variance", "total_variation")


def open_shapes(resolution, seed, count=1000):
    """The built-in shapes as open_input gives a folder; `seed` should be one that training does not draw from."""
    shapes = ShapesData(count, resolution, seed=seed)

    def read(batch_size, rank=0, world_size=1, limit=None):
        end = limit or count
        for first in range(rank * batch_size, end, world_size * batch_size):
            yield np.stack([shapes[i][0].permute(1, 2, 0) for i in range(first, min(first + batch_size, end))])
    return SimpleNamespace(path="shapes", count=count, size=(resolution, resolution), read=read, names=[])


def held_out_images(path, resolution, limit=None, seed=0):
    """The images to measure on: namespace(count, read, shown).

    read(batch_size, rank, world_size) gives this process's uint8 batches [b, H, W, 3] of the first `limit` images of a
    folder, a .zip, a .npz or "shapes"; shown is uint8 [n, 3, H, W], up to 8, evenly spaced where that is cheap.
    """
    if path == "shapes":
        images = open_shapes(resolution, seed)
    else:
        images = open_input(path, None if path.endswith(".npz") else resolution)
    if tuple(images.size) != (resolution, resolution):
        height, width = images.size
        raise ValueError(f"{path}: holds images of {width}x{height}; pass --resolution {height}")
    count = min(images.count, limit or images.count)
    if images.names:
        chosen = np.unique(np.linspace(0, count - 1, 8).round().astype(int))
        shown = np.stack([np.asarray(center_crop(open_image(path, images.names[i]), resolution)) for i in chosen])
    else:
        shown = next(images.read(min(8, count)))

    def read(batch_size, rank=0, world_size=1):
        return images.read(batch_size, rank, world_size, count)
    return SimpleNamespace(count=count, read=read, shown=torch.from_numpy(shown).permute(0, 3, 1, 2))


def to_uint8(images):
    """uint8 [B, H, W, 3] of images [B, 3, H, W] in [-1, 1], rounded to the nearest: a reconstruction is compared with
    uint8 images (the sampler truncates instead, as the paper's does)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def reconstructions(vae, batches, device, sums, dtype=torch.float32, lpips=None, tokens=None):
    """For each uint8 batch [b, H, W, 3] its reconstruction from the posterior's mean, likewise.

    On the way, adds to `sums`, float64 [len(SUMS) + 2 C], and calls tokens(images uint8 [b, 3, H, W], z) if given. The
    VAE runs in `dtype`, everything else in float32 or wider.
    """
    for batch in batches:
        # inside the loop: autocast and inference mode belong to a thread, and a stream may be read by another one
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            originals = torch.as_tensor(batch).to(device).permute(0, 3, 1, 2)
            posterior = vae.encode(originals.float() / 127.5 - 1)
            copies = to_uint8(vae.decode(posterior.mean))
        with torch.inference_mode(), float32_exactly():
            a, b = originals.float(), copies.permute(0, 3, 1, 2).float()
            values = [torch.ones(len(a), device=device), metrics.psnr(a, b), metrics.ssim(a, b),
                      torch.zeros(len(a), device=device) if lpips is None else lpips(a / 127.5 - 1, b / 127.5 - 1),
                      metrics.spatial_variance(posterior.mean), metrics.total_variation(posterior.mean)]
            sums[:len(SUMS)] += torch.stack([value.double().sum() for value in values])
            sums[len(SUMS):] += len(a) * metrics.latent_moments(posterior).flatten()
            if tokens is not None:
                tokens(originals, posterior.mean)
        yield copies


def measure(vae, batches, device, dtype=torch.float32, lpips=None, features=None, reference=None, tokens=None):
    """Figures of a VAE on all processes' batches: a dict with psnr, ssim, lpips (if given), spatial_variance,
    total_variation, latents_mean and latents_std (lists of C, of sampled latents) and, in the main process, rfid.

    features: function that takes the stream of uint8 reconstructions and returns their {"mu", "sigma"}, as
    evaluate_fid.extract does; reference: the same of the originals.
    """
    sums = torch.zeros(len(SUMS) + 2 * vae.latent_channels, dtype=torch.float64, device=device)
    stream = reconstructions(vae, batches, device, sums, dtype, lpips, tokens)
    found = features(stream) if features else {}
    for _ in stream:  # without features, running through it is the work; with them nothing is left
        pass
    count, *totals = distributed.all_reduce_sum(sums).tolist()
    result = {name: total / count for name, total in zip(SUMS[1:], totals)}
    if lpips is None:
        del result["lpips"]
    mean, square = np.array(totals[len(SUMS) - 1:]).reshape(2, -1) / count
    result |= {"latents_mean": mean.tolist(), "latents_std": np.sqrt(square - mean ** 2).tolist()}
    if found:
        result["rfid"] = frechet_distance(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
    return result


class TokenPairs:
    """Collects, for CKNNA, the tokens of a SiT at its encoder_depth and those of an encoder, averaged over positions.

    Called with images uint8 [b, 3, R, R] and their latents z [b, C, h, w]. The SiT sees z with seeded noise at time t
    and the null label (without one: the last class).
    """

    def __init__(self, sit, encoder, t=0.5, path_type="linear", seed=0):
        self.sit, self.encoder, self.t, self.path_type = sit, encoder, t, path_type
        self.seed, self.calls, self.found, self.latest = seed, 0, ([], []), None
        sit.blocks[sit.encoder_depth - 1].register_forward_hook(lambda _, __, output: setattr(self, "latest", output))

    def __call__(self, images, z):
        t = torch.full((len(z),), self.t, device=z.device)
        number = self.calls * distributed.world_size() + (dist.get_rank() if dist.is_initialized() else 0)
        self.calls += 1  # noise of the batch's number: the same for any number of processes
        generator = torch.Generator(z.device).manual_seed(self.seed * 1_000_003 + number)
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        label = torch.full((len(z),), len(self.sit.y_embedder.embedding_table.weight) - 1, device=z.device)
        self.sit(noisy_latents(self.sit.normalize(z), noise, t, self.path_type)[0], t, label, align_only=True)
        for tokens, found in zip((self.latest, self.encoder(images)), self.found):
            found.append(tokens.float().mean(1).cpu())

    def cknna(self, device, most=10000):
        """Over the first `most` images of all processes; every process must call it."""
        found = self.found
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            found = [[x for part in everyone for x in part[k]] for k in (0, 1)]
        return metrics.cknna(*(torch.cat(x)[:most].to(device) for x in found))


@torch.inference_mode()
def picture(images, vaes, captions):
    """PIL.Image: images (uint8 [N, 3, H, W]) in one row, then for each VAE their reconstructions and their latents'
    first three principal components as colours."""
    rows, labels = [images.permute(0, 2, 3, 1)], ["original"]
    for vae, caption in zip(vaes, captions, strict=True):
        z = vae.encode(images.to(next(vae.parameters()).device).float() / 127.5 - 1).mean
        colors = (metrics.principal_colors(z.cpu()) * 255).round().to(torch.uint8)
        rows += [to_uint8(vae.decode(z)).cpu(), F.interpolate(colors, images.shape[-2:]).permute(0, 2, 3, 1)]
        labels += [caption, f"latents of {caption}"]
    captions = [text for label in labels for text in (label, *[""] * (len(images) - 1))]
    return label_grid(torch.cat(rows), captions, columns=len(images))


def model_of(args, source, vae):
    """The SiT whose tokens CKNNA compares for this VAE: of --model-ckpt, or of the VAE's own checkpoint; or None."""
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
        raise ValueError(f"{path}: its model takes {sit.in_channels} x {sit.input_size}^2 latents, {source} gives "
                         f"{vae.latent_channels} x {args.resolution // vae.downsample}^2; check --resolution")
    return sit


def prepare_eval(args, device):
    """All that --eval needs, or a one-line error before any long work: VAEs and SiTs by source, images, LPIPS,
    Inception, encoder."""
    wanted = [m for m in args.metrics.split(",") if m]
    known = ["psnr", "ssim", "lpips", "rfid", "latents", "cknna"]
    if not wanted or set(wanted) - set(known):
        raise ValueError(f"--metrics {args.metrics}: known are {', '.join(known)}")
    if args.resolution < 16:
        raise ValueError(f"--resolution {args.resolution}: SSIM and LPIPS need at least 16 pixels")
    tools = SimpleNamespace(wanted=wanted, vaes={}, sits={}, lpips=None, inception=None, encoder=None)
    for source in args.eval:
        name, state, _ = weights.open_vae(source, args.vae)
        tools.vaes[source] = VAE_models[name]().eval().requires_grad_(False)
        tools.vaes[source].load_state_dict(state)
        tools.sits[source] = model_of(args, source, tools.vaes[source]) if "cknna" in wanted else None
    tools.images = held_out_images(args.data_dir, args.resolution, args.limit, args.seed + 1)
    remedy = "leave it out with --metrics " + (",".join(m for m in wanted if m not in ("lpips", "rfid")) or "psnr,ssim")
    if "lpips" in wanted:
        tools.lpips = weights.lpips(remedy).to(device)
    if "rfid" in wanted:
        try:
            tools.inception = load_inception(args.inception_weights, device)
        except OSError as error:
            raise OSError(f"the weights of rFID: {error}; or {remedy}") from error
    if "cknna" in wanted:
        if not any(tools.sits.values()):
            raise ValueError("cknna compares a model's tokens: name its training checkpoint with --model-ckpt")
        if tools.images.count <= 10:
            raise ValueError(f"{args.data_dir}: cknna needs more than 10 images, not {tools.images.count}")
        tools.encoder = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)[0]
    return tools


def evaluate(args):
    """--eval: a table on the terminal; metrics.json and images.png in the run folder."""
    try:
        rank, world_size, device = distributed.init()
        dtype = torch.float32 if args.mixed_precision == "auto" else autocast_type(args, device)
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32
        with distributed.main_first():
            tools = prepare_eval(args, device)
    except (ValueError, OSError) as error:
        fail(error)
    size = max(1, min(256, EVAL_PIXELS // args.resolution ** 2))
    results, features = {}, None
    if tools.inception is not None:
        networks = [inception_features(tools.inception)]
        features = lambda stream: extract(stream, networks, device, keep=False, skip=("_s",))  # noqa: E731
    try:
        reference = features and features(tools.images.read(size, rank, world_size))  # of rFID: the same images
        for source, vae in tools.vaes.items():
            sit = tools.sits[source]
            tokens = sit and TokenPairs(sit.to(device), tools.encoder, path_type=sit.path_type, seed=args.seed)
            batches = tools.images.read(size, rank, world_size)
            results[source] = measure(vae.to(device), batches, device, dtype, tools.lpips, features, reference, tokens)
            if sit:
                results[source]["cknna"] = tokens.cknna(device)
    except InputError as error:
        fail(error)
    if rank == 0:
        report(args, tools, results)
    distributed.shut_down()


def report(args, tools, results):
    """Print the table, write metrics.json and images.png."""
    folder, n = os.path.join(args.output_dir, args.exp_name), tools.images.count
    notes = [f"{n:,} images of {args.data_dir} at {args.resolution} px; reconstructed from the posterior's mean"]
    if "rfid" in tools.wanted:
        notes.append("rFID's reference is these images themselves, not the reference of a generation benchmark"
                     + ("; fewer than 2,049 images: compare only at equal numbers" if n < 2049 else ""))
    wanted = {*tools.wanted, *(("spatial_variance", "total_variation") if "latents" in tools.wanted else ())}
    columns = [m for m in COLUMNS if m in wanted]
    width = max(3, *map(len, results))
    print("".join([f"{'VAE':<{width}}", *(f"  {COLUMNS[m]:>16}" for m in columns)]))
    for source, result in results.items():
        cells = [f"{result[m]:.4f}" if m in result else "-" for m in columns]
        print("".join([f"{source:<{width}}", *(f"  {cell:>16}" for cell in cells)]))
    moments = ["latents_mean", "latents_std"] if "latents" in tools.wanted else []
    for source, result in results.items():
        for name in moments:
            print(f"{source} {name}: " + " ".join(f"{value:.4g}" for value in result[name]))
    print("\n".join(f"note: {note}" for note in notes))
    figures = {source: {k: None if k in columns and not math.isfinite(result[k]) else result[k]
                        for k in columns + moments if k in result} for source, result in results.items()}
    about = {"data_dir": args.data_dir, "images": n, "resolution": args.resolution, "notes": notes}
    with files.replace(os.path.join(folder, "metrics.json")) as temporary, open(temporary, "w") as f:
        json.dump({**about, "vaes": figures}, f, indent=1)
    save_picture(os.path.join(folder, "images.png"), tools.images.shown, tools.vaes.values(), list(results))
    print(f"wrote {folder}/metrics.json and images.png")


def save_picture(path, images, vaes, captions):
    """`picture` as a PNG file, whole or not at all."""
    with files.replace(path) as temporary:
        picture(images, vaes, captions).save(temporary, format="png")
