"""Behind `finetune_vae.py --eval`: several VAEs measured on held-out images, as a table and a picture.

`evaluate(args)` is all of it; `measure` gives the figures of one VAE as a dict. The formulas are in
models/metrics.py. Every process works on its share of the images. Errors a user can cause are ValueError or
OSError with a message of one line.
"""
import os
from functools import partial

import numpy as np
import torch

from models import metrics
from models.metrics import float32_exactly, frechet_distance
from models.runtime import distributed, files, log, trainer, weights
from models.runtime.data import evenly_spaced, identity, open_images
from models.runtime.features import extract, inception_features, load_inception, read
from models.runtime.pictures import round_to_uint8, save_reconstructions

METRICS = ("psnr", "ssim", "lpips", "rfid", "latents")  # what --metrics may name
NOISES = (0.1, 0.4)         # sigmas of psnr_noise_*, at unit scale
SUMS = ("images", "psnr", "ssim", "lpips", "spatial_variance", "total_variation")
EVAL_PIXELS = 16 * 256 ** 2     # pixels per process and batch
NOISE_IMAGES = 1000             # for psnr_noise_*


# ---------------------------------------------------------------- one VAE

def reconstructions(vae, batches, device, sums, means, lpips=None):
    """For each uint8 batch [b, 3, H, W] its reconstruction from the posterior's mean, likewise.

    On the way, adds to `sums`, float64 [len(SUMS) + 2 C], and appends each image's mean latents to the list
    `means`. Everything is in float32 or wider.
    """
    for batch in batches:
        with torch.inference_mode(), float32_exactly():
            a = batch.to(device, memory_format=torch.channels_last).float()     # convolutions' fast layout
            posterior = vae.encode(a / 127.5 - 1)
            copies = round_to_uint8(vae.decode(posterior.mean)).permute(0, 3, 1, 2)
            b, z = copies.float(), posterior.mean
            distance = lpips(a / 127.5 - 1, b / 127.5 - 1) if lpips else torch.zeros(len(a), device=device)
            values = [torch.ones(len(a), device=device), metrics.psnr(a, b), metrics.ssim(a, b), distance,
                      metrics.spatial_variance(z), metrics.total_variation(z)]
            sums[:len(SUMS)] += torch.stack([value.double().sum() for value in values])
            sums[len(SUMS):] += len(a) * metrics.latent_moments(posterior).flatten()
            means.append(z.double().mean((2, 3)).cpu())
        yield copies


def measure(vae, batches, device, lpips=None, features=None, reference=None, progress=lambda done: None):
    """Figures of a VAE on all processes' batches, uint8 [b, 3, H, W], as a dict.

    Its keys: psnr, ssim, lpips (if given), spatial_variance, total_variation, between_images, latents_mean
    and latents_std (lists of C, of sampled latents) and, in the main process, rfid.

    features: function that takes the stream of uint8 reconstructions and returns their {"mu", "sigma"}, as
    features.extract does; reference: the same of the originals. progress: called with the number of images
    done.
    """
    sums = torch.zeros(len(SUMS) + 2 * vae.latent_channels, dtype=torch.float64, device=device)
    means, done = [], 0
    stream = reconstructions(vae, batches, device, sums, means, lpips)
    found = features(stream) if features else {}
    for copies in stream:   # without features, running through it is the work; with them nothing is left
        done += len(copies) * distributed.world_size()
        progress(done)
    count, *totals = distributed.all_reduce_sum(sums).tolist()
    result = {name: total / count for name, total in zip(SUMS[1:], totals)}
    if lpips is None:
        del result["lpips"]
    mean, square = np.array(totals[len(SUMS) - 1:]).reshape(2, -1) / count
    std = np.sqrt(np.maximum(square - mean ** 2, 0))
    means = torch.cat([batch for part in distributed.gather(means) for batch in part])
    result |= {"between_images": metrics.between_images(means, torch.from_numpy(std)),
               "latents_mean": mean.tolist(), "latents_std": std.tolist()}
    if found:
        result["rfid"] = frechet_distance(found["mu"], found["sigma"], reference["mu"], reference["sigma"])
    return result


@torch.inference_mode()
def measure_tolerance(vae, batches, std, device):
    """{"psnr_noise_0.1", ...}: metrics.psnr_under_noise over all processes' batches, uint8 [b, 3, H, W].

    std: of the latents per channel, C numbers. The noise is drawn from the number of the batch.
    """
    sums = torch.zeros(1 + len(NOISES), dtype=torch.float64, device=device)
    std = torch.tensor(std, dtype=torch.float32, device=device)
    for k, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(k * distributed.world_size() + distributed.rank())
        with float32_exactly():
            images = batch.to(device, memory_format=torch.channels_last)
            z = vae.encode(images.float() / 127.5 - 1).mean
            noise = torch.randn(z.shape, generator=generator).to(device)
            psnr = [metrics.psnr_under_noise(vae.decode, images, z, std, noise, sigma) for sigma in NOISES]
        sums += torch.stack([torch.ones_like(psnr[0]), *psnr]).sum(1)
    count, *totals = distributed.all_reduce_sum(sums).tolist()
    return {f"psnr_noise_{sigma:g}": total / count for sigma, total in zip(NOISES, totals)}


# ---------------------------------------------------------------- several VAEs: the command line's --eval

def evaluate(args):
    """Measure the VAEs args.eval: a table on the terminal; metrics.json and images.png in the run folder.

    args: data_dir, resolution, limit, metrics, vae, inception_weights, seed, output_dir, exp_name, dry_run.
    An earlier evaluation of that exp_name is replaced.
    """
    rank, world_size, device = distributed.init()
    wanted = [name for name in args.metrics.split(",") if name]
    if not wanted or set(wanted) - set(METRICS):
        raise ValueError(f"--metrics {args.metrics}: known are {', '.join(METRICS)}")
    folder = os.path.join(args.output_dir, args.exp_name)
    data = open_images(args.data_dir, args.resolution, seed=args.seed + 1, labelled=False)
    limit = args.limit or (1000 if args.data_dir == "shapes" else len(data))    # there is no end of shapes
    rows = evenly_spaced(len(data), limit)
    trainer.check_same(args, {"data": identity(data)}, None)
    with distributed.main_first():  # it downloads, the others find the files
        vaes = {source: weights.open_vae(source, args.vae) for source in args.eval}
        remedy = "leave lpips out of --metrics"
        lpips = weights.lpips(remedy).to(device) if "lpips" in wanted else None
        inception = load_inception(args.inception_weights, device) if "rfid" in wanted else None
    if args.resolution % max(vae.downsample for vae in vaes.values()):
        raise ValueError(f"--resolution {args.resolution} is not divisible by the VAEs' downsampling factors")
    digests = {source: files.state_digest(vae) for source, vae in vaes.items()}
    distributed.check_same({f"weights of {source}": digest for source, digest in digests.items()})
    files.check_writable(os.path.join(folder, "metrics.json"))
    if args.dry_run:
        return print("settings are sound") if rank == 0 else None

    size = max(1, min(256, EVAL_PIXELS // args.resolution ** 2))

    def statistics(batches, what):
        return extract(batches, inception_features(inception), device, keep=False,
                       update=log.progress(what, len(rows)))
    reference = inception and statistics(read(data, size, rows), args.data_dir)
    note = (f"{len(rows):,} images of {args.data_dir} at {args.resolution} px, reconstructed from posterior "
            "means; rFID's reference is these images themselves, not the reference of a generation benchmark")
    about = {"data_dir": args.data_dir, "images": len(rows), "resolution": args.resolution,
             "metrics": wanted, "sha256": digests, "note": note}

    results = {}
    for source, vae in vaes.items():
        found = measure(vae.to(device), read(data, size, rows), device, lpips,
                        inception and partial(statistics, what=source), reference,
                        log.progress(source, len(rows)))
        if "latents" in wanted:
            batches = read(data, size, rows[evenly_spaced(len(rows), NOISE_IMAGES)])
            found |= measure_tolerance(vae, batches, found["latents_std"], device)
        results[source] = {name: value for name, value in found.items()
                           if name in wanted or (name not in METRICS and "latents" in wanted)}
    if rank == 0:
        files.save_json({**about, "vaes": results}, os.path.join(folder, "metrics.json"))
        shown = torch.stack([data[int(i)][0] for i in rows[evenly_spaced(len(rows), 8)]])
        save_reconstructions(os.path.join(folder, "images.png"), shown, vaes.values(), list(vaes))
        names = [name for name, value in results[source].items() if isinstance(value, float)]
        width = max(map(len, results))
        print(f"{'VAE':<{width}}", *(f"{name:>16}" for name in names))
        for source, found in results.items():
            print(f"{source:<{width}}", *(f"{found[name]:>16.4f}" for name in names))
        print(f"note: {note}\nwrote {folder}/metrics.json and images.png")
    distributed.shut_down()
