"""Caches: what a frozen network makes of every image, computed once and read at every step instead.

    torchrun --nproc-per-node 8 train_repae_e.py --freeze-vae --latent-cache cache --cache-features cache

A cache is one .npy file of records in the order of the data, one per image; with --hflip as many again, of
the mirrored images. It is memory-mapped, and other code can read it with numpy alone:

    rows = np.load("cache/latents.npy", mmap_mode="r")
    z = rows["mean"][7] + rows["std"][7] * eps      # [C, h, w] float32; its class is rows["label"][7]

Every record begins with the CRC-32 of the rest of it, which is checked whenever it is read.
`latents.npy` has mean and std of the VAE's posterior, `tokens-<encoder>.npy` the encoder's tokens [T, D]: the
bits of bfloat16, as uint16. The .json beside it says what the cache is bound to and how far it is. It is
computed in float32 in fixed blocks of images by all processes, whatever their number; killed and started
again it continues and ends in the same bytes. The .npy is there when it is whole, and not before.

Errors a user can cause are ValueError or OSError with a message of one line.
"""
import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from models.runtime import distributed, files
from models.runtime.data import ImageError, flips, progress, start_worker, worker_death
from models.runtime.prepare import lock
from models.runtime.weights import state_digest

BLOCK = 16          # images in one pass of the network, always the same ones: the numbers depend on it
SYNC_EVERY = 128    # blocks of each process between two points from which a killed run continues


@dataclass
class Cache:
    """One file of a cache: where it is, what it is bound to, and how its records are made."""

    path: str
    flag: str           # that asked for it, for messages
    bound: dict         # {name a user knows it by: value}, of all that the content depends on
    rows: int           # records: one per image, or two with flips
    network: torch.nn.Module
    compute: Callable   # uint8 images [b, 3, R, R] -> [a tensor [b, ...] for each of `fields`]
    fields: list        # of a record, after its crc, label and skipped: [(name, numpy type, shape)]

    @property
    def dtype(self):
        return np.dtype([("crc", "<u4"), ("label", "<i4"), ("skipped", "<i4"), *self.fields])

    @property
    def header(self):
        """The first bytes of the file, by which numpy reads the rest."""
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(self.dtype),
                                                    "fortran_order": False, "shape": (self.rows,)})
        return file.getvalue()

    @property
    def size(self):
        return len(self.header) + self.rows * self.dtype.itemsize

    @property
    def journal(self):
        return os.path.splitext(self.path)[0] + ".json"

    @property
    def part(self):
        folder, name = os.path.split(self.path)
        return os.path.join(folder, f".{name}.part")


# ---------------------------------------------------------------- which, and whether they are there

def plan(args, dataset, kept, vae, encoders):
    """The caches that the settings ask for, the latents' first.

    kept: the identity of the data and the digest of the VAE, as in a checkpoint ("data", "vae_digest"). The
    networks may be on the meta device, for `check`; what an encoder's weights are is not known then.
    """
    rows = len(dataset) * (2 if args.hflip else 1)
    common = {"data set": hashlib.sha256(json.dumps(kept["data"], sort_keys=True).encode()).hexdigest(),
              "--resolution": args.resolution, "--hflip": args.hflip}
    caches = []
    if args.latent_cache:
        side = args.resolution // vae.downsample
        shape = (vae.latent_channels, side, side)
        caches.append(Cache(path=os.path.join(args.latent_cache, "latents.npy"), flag="--latent-cache",
                            bound={"VAE": kept["vae_digest"], **common}, rows=rows, network=vae,
                            compute=lambda images: posterior(vae, images),
                            fields=[("mean", "<f4", shape), ("std", "<f4", shape)]))
    for encoder in encoders if args.cache_features else ():
        bound = {"encoder": encoder.name, **common}
        if not any(tensor.is_meta for tensor in encoder.state_dict().values()):
            bound["weights of the encoder"] = state_digest(encoder)
        name = "tokens-" + re.sub(r"[^\w.-]", "_", encoder.name) + ".npy"
        shape = (encoder.grid ** 2, encoder.embed_dim)
        caches.append(Cache(path=os.path.join(args.cache_features, name), flag="--cache-features",
                            bound=bound, rows=rows, network=encoder,
                            compute=lambda images, encoder=encoder: [encoder(images).bfloat16()],
                            fields=[("tokens", "<u2", shape)]))
    return caches


def posterior(vae, images):
    """[mean, std], each [b, C, h, w] float32, of uint8 images [b, 3, R, R]."""
    of = vae.encode(images.float() / 127.5 - 1)
    return [of.mean, of.std]


def done(cache):
    """How many records are made; ValueError for another one's file, or one not whole that should be."""
    there = next((path for path in (cache.path, cache.part) if os.path.exists(path)), None)
    if there is None:
        return 0
    remedy = f"give another folder with {cache.flag}, or remove it"
    try:
        with open(cache.journal) as file:
            state = json.load(file)
        made, bound = int(state["done"]), dict(state["bound"])
    except FileNotFoundError:
        if there == cache.part:
            return 0  # killed before its first record
        name = os.path.basename(cache.journal)
        raise ValueError(f"{cache.path}: has no {name} beside it; {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{cache.journal}: is damaged; remove it and {cache.path}") from None
    for name, value in cache.bound.items():
        if bound.get(name) != value:
            before, now = (str(v)[:12] for v in (bound.get(name), value))
            raise ValueError(f"{there}: was made for another {name} ({before}, not {now}); {remedy}")
    if there == cache.path:
        with open(cache.path, "rb") as file:
            head, size = file.read(len(cache.header)), os.fstat(file.fileno()).st_size
        if head != cache.header or size != cache.size or made != cache.rows:
            raise ValueError(f"{cache.path}: is damaged or cut off ({size:,} of {cache.size:,} bytes); "
                             "remove it, and it is made again")
    return min(made, cache.rows)


def check(caches):
    """Say what is still to be made and how large it will be.

    Raises ValueError for a cache of another VAE, encoder, data set, resolution or with other flips, for one
    that is not whole, and if the disk has no room for what is missing.
    """
    needs = {}  # disk -> bytes
    for cache in caches:
        made = done(cache)
        if os.path.exists(cache.path):
            continue
        folder = os.path.abspath(os.path.dirname(cache.path))
        files.check_writable(os.path.abspath(cache.path))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        disk, free = os.stat(folder).st_dev, shutil.disk_usage(folder).free
        needs[disk] = needs.get(disk, 0) + (cache.rows - made) * cache.dtype.itemsize
        print(f"{cache.path}: {cache.rows:,} images, {cache.size / 1e9:,.3f} GB, to be made"
              + (f" from image {made:,} on" if made else ""), flush=True)
        if needs[disk] > free:
            raise ValueError(f"{cache.path}: {needs[disk] / 1e9:,.3f} GB are needed on its disk, and "
                             f"{free / 1e9:,.3f} GB are free; make room, or give another folder with "
                             f"{cache.flag}")


# ---------------------------------------------------------------- making them

class Blocks(Dataset):
    """The images of record k to k + BLOCK - 1, by k: (uint8 [b, 3, R, R], labels [b], skipped [b]).

    Beyond the data's own number they begin again, mirrored.
    """

    def __init__(self, data, rows):
        self.data, self.rows = copy.copy(data), rows
        self.data.hflip = False  # each image as it is

    def __getitem__(self, first):
        rows = range(first, min(first + BLOCK, self.rows))
        return default_collate([self.image(row) for row in rows])

    def image(self, row):
        image, label, skipped = self.data[row % len(self.data)]
        return image.flip(-1) if row >= len(self.data) else image, label, skipped


@contextlib.contextmanager
def on_device(network, device):
    """Context in which the network's weights are on `device`; then they go back to where they were."""
    home = next((p.device for p in network.parameters()), device)
    network.to(device)
    try:
        yield
    finally:
        network.to(home)


@contextlib.contextmanager
def full_precision():
    """Context of float32 without TF32, with kernels that always give the same bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def make(caches, dataset, device, workers):
    """Make what is missing, by all processes, which must all call this; see `check` for what is refused.

    Images are read once for all caches that are not there, by `workers` decoding processes of each process.
    """
    missing = distributed.from_main(lambda: [k for k, c in enumerate(caches) if not is_whole(c)])
    caches = [caches[k] for k in missing]
    if not caches:
        return
    try:
        with contextlib.ExitStack() as stack:
            start = distributed.from_main(lambda: min(begin(cache, stack) for cache in caches))
            for cache in caches if not distributed.is_main() else ():
                cache.file = stack.enter_context(open_part(cache))
            for cache in caches:
                stack.enter_context(on_device(cache.network, device))
            stack.enter_context(full_precision())
            stack.enter_context(torch.no_grad())
            write_blocks(caches, dataset, device, workers, start)
            if distributed.is_main():
                for cache in caches:
                    os.replace(cache.part, cache.path)
            distributed.barrier()
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"{caches[0].path}: cannot be made ({error.strerror}); mend that, and the same command "
                      "continues") from error
    except RuntimeError as error:
        if (line := worker_death(error)) is None:
            raise
        raise OSError(f"{line}; the same command continues") from error


def is_whole(cache):
    """Whether the file is there, and of this cache."""
    return done(cache) == cache.rows and os.path.exists(cache.path)


def begin(cache, stack):
    """Open the unfinished file, or a new one, for this process alone; returns how many records are made."""
    os.makedirs(os.path.dirname(os.path.abspath(cache.path)), exist_ok=True)
    if not os.path.exists(cache.part) and os.path.exists(cache.journal):
        os.remove(cache.journal)  # of a file that was removed
    cache.file = stack.enter_context(os.fdopen(os.open(cache.part, os.O_RDWR | os.O_CREAT, 0o666), "rb+"))
    lock(cache.file, cache.part, cache.path)
    if os.path.exists(cache.path):
        os.remove(cache.part)
        raise ValueError(f"{cache.path}: another process has just made it; run the same command again")
    made = done(cache)
    if not made or os.fstat(cache.file.fileno()).st_size != cache.size:
        made = 0
        cache.file.truncate(0)
        cache.file.write(cache.header)
        write_journal(cache, 0)
    cache.file.truncate(cache.size)  # of a new one: a hole, which fills as it is written
    return made


def open_part(cache):
    try:
        return open(cache.part, "rb+")
    except FileNotFoundError:
        raise ValueError(f"{cache.path}: all processes make it, but process {distributed.rank()} does not "
                         f"see its folder; give {cache.flag} one that all nodes share") from None


def write_journal(cache, made):
    files.save_json({"bound": cache.bound, "rows": cache.rows, "done": made}, cache.journal)


def write_blocks(caches, dataset, device, workers, start):
    """Compute and write the records from number `start` on: blocks rank, rank + world_size, ... of them."""
    rank, world_size, rows = distributed.rank(), distributed.world_size(), caches[0].rows
    stride = BLOCK * world_size
    mine = range(start + rank * BLOCK, rows, stride)
    pool = {"multiprocessing_context": "fork", "worker_init_fn": start_worker} if workers else {}
    loader = DataLoader(Blocks(dataset, rows), batch_size=None, sampler=mine, num_workers=workers, **pool)
    update = progress("images encoded", rows, print if distributed.is_main() else lambda _: None)
    update(start)
    batches = iter(loader)
    for number, first in enumerate(range(start, rows, stride)):
        if number < len(mine):
            images, labels, skipped = next(batches)
            for cache in caches:
                write_block(cache, mine[number], images.to(device), labels, skipped)
        made = min(first + stride, rows)
        update(made)
        if (number + 1) % SYNC_EVERY == 0 or made == rows:
            sync(caches, made)


def write_block(cache, first, images, labels, skipped):
    """Write the records of one block of images, from number `first` on."""
    records = np.empty(len(images), cache.dtype)
    records["label"], records["skipped"] = labels.numpy(), skipped.numpy()
    for (name, kind, _), value in zip(cache.fields, cache.compute(images), strict=True):
        if not value.isfinite().all():
            last = first + len(images) - 1
            raise ValueError(f"{cache.path}: {name} of images {first} to {last} is not finite; the network "
                             "gives no usable values")
        # bfloat16, which numpy does not have, goes as its bits
        value = value.view(torch.uint16) if kind == "<u2" else value
        records[name] = value.cpu().numpy()
    for record in records:
        record["crc"] = checksum(record)
    cache.file.seek(len(cache.header) + first * cache.dtype.itemsize)
    cache.file.write(records.tobytes())


def checksum(record):
    """CRC-32 of a record without its first field, which keeps it."""
    return zlib.crc32(memoryview(record.tobytes())[4:])


def sync(caches, made):
    """Bring what all processes wrote to the disk, then write down how far it is."""
    for cache in caches:
        cache.file.flush()
        os.fsync(cache.file.fileno())
    distributed.barrier()
    if distributed.is_main():
        for cache in caches:
            write_journal(cache, max(made, done(cache)))


# ---------------------------------------------------------------- reading them

class CachedData(Dataset):
    """`data` with its whole caches: (image, label, skipped, [mean, std] or [], [tokens of each encoder]).

    Keys are (epoch, index), as EndlessSampler gives them. Without `images` no image is read: in its place
    stands an empty tensor.
    """

    def __init__(self, data, caches, images):
        self.data, self.images = data, images
        self.caches = [(cache.path, np.load(cache.path, mmap_mode="r")) for cache in caches]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        epoch, index = key
        row = index + len(self) * (self.data.hflip and flips(self.data.seed, epoch, index))
        latents, tokens = [], []
        for path, array in self.caches:
            record = array[row]
            if record["crc"] != checksum(record):
                raise ImageError(f"{path}: record {row} is not as it was written; remove the file, and it is "
                                 "made again")
            if "tokens" in record.dtype.names:
                tokens.append(torch.from_numpy(record["tokens"].copy()).view(torch.bfloat16))
            else:
                latents += [torch.from_numpy(record[name].copy()) for name in ("mean", "std")]
        if self.images:
            image, label, skipped = self.data[key]
        else:
            image = torch.empty(0, dtype=torch.uint8)
            label, skipped = int(record["label"]), int(record["skipped"])
        return image, label, skipped, latents, tokens
