"""A VAE on a set of images: the stream of its reconstructions, what is measured on the way, and a picture of both.

Behind `finetune_vae.py --eval`; the formulas are in models/reconstruction.py. Every process works on its share.
Errors a user can cause are ValueError or OSError with a message of one line.
"""
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models import metrics

from models.runtime import distributed
from models.runtime.data import ShapesData, center_crop, open_image
from models.runtime.images import label_grid
from models.runtime.images import open_input
from models.metrics import float32_exactly, frechet_distance
from models.losses import noisy_latents

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
        with torch.inference_mode():
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
    with float32_exactly():  # once, around all batches: with `features`, a thread draws them from the stream
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
