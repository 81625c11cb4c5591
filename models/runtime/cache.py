"""The posteriors of a frozen VAE for every image, computed once and read at every step instead.

    torchrun --nproc-per-node 8 train_repae_e.py --freeze-vae --latent-cache cache

`latents.npy` in that folder has one record per image, in the order of the data; with --hflip as many again,
of the mirrored images. Other code reads it with numpy alone:

    rows = np.load("cache/latents.npy", mmap_mode="r")
    z = rows["mean"][7] + rows["std"][7] * eps      # [C, h, w] float32; its class is rows["label"][7]

It is computed in float32 in fixed blocks of images, whatever the number of processes. A record that is not
made yet has std 0, so that a stopped run makes only the blocks that are missing. The file has its name when
it is complete. latents.json says what it was made of.
"""
import copy
import os
import shutil

import numpy as np
import torch
from torch.utils.data import Dataset

from models.metrics import float32_exactly
from models.runtime import distributed, files
from models.runtime.data import flips, make_loader
from models.runtime.log import progress

BLOCK = 16      # images in one pass of the network, always the same ones: the numbers depend on it


class Latents(Dataset):
    """`data` by its latents: (image, label, mean, std), the last two float32 [C, h, w].

    Keys are (epoch, index), as EndlessSampler gives them. Without `images` no image is read: an empty tensor
    takes its place.
    """

    def __init__(self, data, rows, images):
        self.data, self.rows, self.images = data, rows, images

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        epoch, index = key
        row = self.rows[index + len(self) * (self.data.hflip and flips(self.data.seed, epoch, index))]
        image = self.data[key][0] if self.images else torch.empty(0, dtype=torch.uint8)
        return image, int(row["label"]), *(torch.from_numpy(row[name].copy()) for name in ("mean", "std"))


class Blocks(Dataset):
    """Records k * BLOCK to (k + 1) * BLOCK - 1 by k: (k, uint8 images [b, 3, R, R], labels [b]).

    Beyond the number of images they start over, mirrored.
    """

    def __init__(self, data, rows):
        self.data, self.rows = copy.copy(data), rows
        self.data.hflip = False     # each image as it is

    def __len__(self):
        return -(-self.rows // BLOCK)

    def __getitem__(self, k):
        rows = range(k * BLOCK, min((k + 1) * BLOCK, self.rows))
        images, labels = zip(*(self.data[row % len(self.data)] for row in rows))
        images = [image.flip(-1) if row >= len(self.data) else image for image, row in zip(images, rows)]
        return k, torch.stack(images), torch.tensor(labels)


def latents(folder, data, made_of, vae, device, workers, images=False):
    """Latents of `data` in `folder`; what is missing is made now by all processes, which must all call this.

    made_of: a dict for JSON of all that the content depends on: VAE, data, resolution, flips. images: whether
    the items have their images too. Raises ValueError for a cache that was made of anything else, and OSError
    where it has no room.
    """
    path, about = os.path.join(folder, "latents.npy"), os.path.join(folder, "latents.json")
    part = f"{path}.part"
    rows = len(data) * (2 if data.hflip else 1)
    side = data.resolution // vae.downsample
    shape = (vae.latent_channels, side, side)
    dtype = np.dtype([("label", "<i4"), ("mean", "<f4", shape), ("std", "<f4", shape)])
    with distributed.main_first():
        found = next((p for p in (path, part) if os.path.exists(p)), None)
        if found is None and distributed.is_main():
            size = rows * dtype.itemsize
            os.makedirs(folder, exist_ok=True)
            if (free := shutil.disk_usage(folder).free) < size:
                raise OSError(f"{folder}: {size / 1e9:,.3f} GB are needed and {free / 1e9:,.3f} GB are free; "
                              "make room, or give another --latent-cache")
            files.save_json(made_of, about)
            np.lib.format.open_memmap(part, "w+", dtype, (rows,))   # a hole, which fills as it is written
        elif found is not None:
            before = files.load_json(about)
            other = [name for name in {**before, **made_of} if before.get(name) != made_of.get(name)]
            if other:
                raise ValueError(f"{found}: was made with another {' and another '.join(other)}; give "
                                 "another --latent-cache, or remove it")
    if not os.path.exists(path):
        fill(open_table(part, "r+", dtype, rows), Blocks(data, rows), vae, device, workers)
        distributed.barrier()
        if distributed.is_main() and os.path.exists(part):  # a second run may have made it meanwhile
            os.replace(part, path)
        distributed.barrier()
    return Latents(data, open_table(path, "r", dtype, rows), images)


def open_table(path, mode, dtype, rows):
    """The records of a cache, memory-mapped."""
    try:
        table = np.load(path, mmap_mode=mode)
    except ValueError:
        table = None
    if table is None or table.dtype != dtype or len(table) != rows:
        raise ValueError(f"{path}: damaged, or not a latent cache of these images; remove it")
    return table


@torch.no_grad()
def fill(table, blocks, vae, device, workers):
    """Compute this process's share of the blocks that `table` lacks."""
    mine = range(distributed.rank(), len(blocks), distributed.world_size())
    missing = [k for k in mine if not table["std"][k * BLOCK:(k + 1) * BLOCK, -1, -1, -1].all()]
    loader = make_loader(blocks, missing, None, workers)    # an item is a batch already
    update = progress("blocks of 16 images encoded", len(mine))
    with float32_exactly():
        for done, (k, images, labels) in enumerate(loader, len(mine) - len(missing) + 1):
            posterior = vae.encode(images.to(device).float() / 127.5 - 1)
            records = table[k * BLOCK:k * BLOCK + len(labels)]
            records["label"], records["mean"] = labels.numpy(), posterior.mean.cpu().numpy()
            records["std"] = posterior.std.cpu().numpy()    # last: it says that the record is there
            update(done)
    table.flush()
