"""models/runtime/pictures.py: grids and rounding."""
import numpy as np
import torch

from models.runtime import pictures


def pixels(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_label_grid():
    """Two columns of 16-pixel images, each enlarged to 64 pixels with a border of 1 and a caption above."""
    images = pixels(3)
    grid = np.asarray(pictures.label_grid(torch.from_numpy(images), captions=[1, "x", ""], columns=2))
    assert grid.shape == (2 * 80, 2 * 66, 3)
    for i, (row, column) in enumerate(((0, 0), (0, 1), (1, 0))):
        top, left = row * 80 + 15, column * 66 + 1
        assert np.array_equal(grid[top:top + 64:4, left:left + 64:4], images[i])
    assert (grid[:14, :66] < 128).any() and (grid[80:94, :66] == 255).all()     # captions "1" and ""
    assert (grid[80:, 66:] == 255).all()                                        # no fourth image
    assert pictures.label_grid(pixels(2, 100)).size == (2 * 102, 102)           # large ones as they are


def test_round_to_uint8():
    levels = torch.arange(256.0)
    x = ((levels + torch.linspace(-0.49, 0.49, 256)) / 127.5 - 1).reshape(1, 1, 16, 16).expand(1, 3, -1, -1)
    found = pictures.round_to_uint8(x)
    assert found.shape == (1, 16, 16, 3) and found.dtype == torch.uint8
    assert torch.equal(found[0, :, :, 0].flatten().float(), levels)
    x = torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)
    assert pictures.round_to_uint8(x).flatten().tolist() == [0, 255]
