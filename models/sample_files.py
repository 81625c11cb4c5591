"""Files of samples: shards while a run goes on, then the .npz that evaluators read. Memory stays constant.

A shard is a file FIRST-END.npy, the samples FIRST .. END - 1 as uint8 [END - FIRST, H, W, 3].
"""
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from models import checkpoint


def write_shard(folder, first, images):
    """Write the samples first, first + 1, ... (uint8 [k, H, W, 3]) to their shard, atomically."""
    path = os.path.join(folder, f"{first:08d}-{first + len(images):08d}.npy")
    with checkpoint.replace(path) as temporary, open(temporary, "wb") as f:
        np.save(f, images)


def list_shards(folder):
    """Sorted [(first, end)] of the shards in `folder`; [] if it does not exist."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(tuple(map(int, n[:-4].split("-"))) for n in names if n.endswith(".npy") and not n.startswith("."))


def missing_ranges(shards, first, end):
    """[(first, end)] of what sorted shards leave out of first .. end - 1."""
    gaps = []
    for start, stop in shards + [(end, end)]:
        if min(start, end) > first:
            gaps.append((first, min(start, end)))
        first = max(first, stop)
    return gaps


def shard_rows(folder, number):
    """Yields samples 0 .. number - 1 from the shards, in order, as uint8 arrays [k, H, W, 3]."""
    done = 0
    for first, end in list_shards(folder):
        if first <= done < min(end, number):
            rows = np.load(os.path.join(folder, f"{first:08d}-{end:08d}.npy"))[done - first:number - first]
            done += len(rows)
            yield rows


def npz_rows(path, at_once=64):
    """Yields the images of a .npz that write_npz wrote as uint8 arrays [<= at_once, H, W, 3], never all of them."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as f:
        np.lib.format.read_magic(f)
        shape, _, _ = np.lib.format.read_array_header_1_0(f)
        while data := f.read(at_once * int(np.prod(shape[1:]))):
            yield np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])


def write_npz(path, rows, shape, labels, protocol):
    """Write an uncompressed .npz atomically, with memory for one array of `rows` at a time.

    arr_0: uint8, `shape` [N, H, W, 3], from the iterable `rows` of arrays [k, H, W, 3]; arr_1: labels [N]; protocol:
    JSON text of a dict. The bytes depend on these alone. ValueError if `rows` does not give N samples.
    """
    with checkpoint.replace(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        def member(name):  # a fixed date, and room for more than 4 GiB, which a stream must announce
            return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)

        with member("arr_0") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
            written = 0
            for part in rows:
                f.write(np.ascontiguousarray(part, dtype=np.uint8).data)
                written += len(part)
        if written != shape[0]:
            raise ValueError(f"{path}: {written} samples instead of {shape[0]}")
        for name, value in (("arr_1", np.asarray(labels)), ("protocol", np.array(json.dumps(protocol)))):
            with member(name) as f:
                np.lib.format.write_array(f, value, allow_pickle=False)


def write_pngs(folder, rows):
    """Sample i of `rows` (iterable of uint8 arrays [k, H, W, 3]) to folder/00000i.png; those that are there stay."""
    def write(item):
        path = os.path.join(folder, f"{item[0]:06d}.png")
        if not os.path.exists(path):
            Image.fromarray(item[1]).save(path + ".tmp", "PNG")
            os.replace(path + ".tmp", path)

    os.makedirs(folder, exist_ok=True)
    first = 0
    with ThreadPoolExecutor(8) as pool:
        for part in rows:
            list(pool.map(write, enumerate(part, first)))
            first += len(part)
