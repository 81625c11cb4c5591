"""Labelled picture grids. Needs numpy and Pillow only."""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION = 14  # height of a caption in pixels


def label_grid(images, captions=None, columns=None):
    """PIL.Image of uint8 images [N, H, W, 3] (numpy array or CPU tensor) in rows of `columns` (default: nearly square).

    captions: one per image, written above it, anything that str() takes such as a class number. Images smaller than 64
    pixels are enlarged by a whole factor.
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
