"""Pictures: grids of images, PNG files, and the samples and reconstructions that a run draws as it trains."""
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.runtime import files
from models.samplers import (decode, draw_noise, euler, guided, sample_generators, sample_labels, time_grid,
                             truncate_to_uint8)

CAPTION = 14  # height of a caption in pixels


def round_to_uint8(images):
    """uint8 [B, H, W, 3] of a tensor [B, 3, H, W] in [-1, 1], rounded to the nearest level.

    For reconstructions, which are compared with uint8 images. Samples are truncated instead, as the paper's
    are: samplers.truncate_to_uint8.
    """
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def label_grid(images, captions=None, columns=None):
    """PIL.Image of uint8 images [N, H, W, 3] (numpy array or CPU tensor) in rows of `columns`.

    columns: by default nearly square. captions: one per image, written above it, anything that str() accepts
    such as a class number. Images smaller than 64 pixels are enlarged by a whole factor.
    """
    images = np.asarray(images)
    n, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    zoom = max(1, math.ceil(64 / max(height, width)))
    top = CAPTION if captions is not None else 0
    cell_h, cell_w = height * zoom + top + 2, width * zoom + 2
    sheet = Image.new("RGB", (columns * cell_w, math.ceil(n / columns) * cell_h), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i in range(n):
        x, y = i % columns * cell_w, i // columns * cell_h
        if captions is not None:
            draw.text((x + 2, y + 1), str(captions[i]), fill="black", font=font)
        image = Image.fromarray(images[i]).resize((width * zoom, height * zoom), Image.NEAREST)
        sheet.paste(image, (x + 1, y + top + 1))
    return sheet


def write_png(path, image):
    """Write a PIL.Image as a PNG file, atomically."""
    with files.replace(path) as temporary, open(temporary, "wb") as f:
        image.save(f, "PNG")


# ---------------------------------------------------------------- while a run trains

@torch.inference_mode()
def save_reconstructions(path, images, vaes, captions):
    """PNG of images (uint8 [N, 3, H, W]) in one row, below it those of each VAE, in float32."""
    rows = [images.permute(0, 2, 3, 1)]
    for vae in vaes:
        x = images.to(next(vae.parameters()).device).float() / 127.5 - 1
        rows.append(round_to_uint8(vae.decode(vae.encode(x).mean)).cpu())
    captions = [text for label in ("original", *captions) for text in (label, *[""] * (len(images) - 1))]
    write_png(path, label_grid(torch.cat(rows), captions, columns=len(images)))


@torch.no_grad()
def save_grids(nets, args, step, folder, originals):
    """Write two pictures of step NNNNNNN: samples/NNNNNNN.png, 40 samples of the EMA model with their
    classes, and reconstructions/NNNNNNN.png, `originals` (uint8 [n, 3, R, R]) above theirs.

    Sampling takes 50 Euler steps; sample i depends on the seed, i and its label alone.
    """
    how = "equal" if args.num_classes <= 40 else "random"
    labels = sample_labels(args.seed, range(40), args.num_classes, how)
    shape = (nets.ema.in_channels, nets.ema.input_size, nets.ema.input_size)
    noise = draw_noise(sample_generators(args.seed, range(40)), shape).to(nets.device)
    with nets.autocast():
        velocity = guided(lambda x, t, y: nets.ema(x, t, y)[0], labels.to(nets.device), args.num_classes,
                          args.cfg_scale if args.cfg_prob > 0 else 1.0)
        x = euler(velocity, noise, time_grid(50))
        samples = truncate_to_uint8(decode(nets.vae.decode, x.float(), *nets.ema.latents_stats()).float())
    grid = label_grid(samples.cpu(), labels.tolist(), columns=min(args.num_classes, 10))
    write_png(os.path.join(folder, "samples", f"{step:07d}.png"), grid)
    path = os.path.join(folder, "reconstructions", f"{step:07d}.png")
    save_reconstructions(path, originals, [nets.vae], ["VAE"])
