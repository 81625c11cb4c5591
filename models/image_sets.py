"""Sets of images to be scored: a .npz with arr_0, a folder, or a .zip; looked at first, then read in a stream.

    images = open_input("samples.npz")      # namespace(path, count, size (H, W), converted, statistics, protocol, ...)
    for batch in images.read(64, rank, world_size):     # uint8 [b, H, W, 3]; never more than a batch in memory
        ...

Needs numpy and pillow, and data.py beside it for folders and .zips. What is wrong with an input is found by open_input,
before any long work, and raised as ValueError or FileNotFoundError with a one-line message; damage that only reading
shows is InputError.
"""
import hashlib
import json
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from PIL import Image

# of the pool features and of the spatial features
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
MINIMUM = 4             # images per set: precision and recall look at the 3rd neighbour


class InputError(ValueError):
    """Something wrong with an input file, found only while reading it; the message is one line."""


def _array_header(path):
    """arr_0 of a .npz -> (shape, byte where its data begin, names of all members); ValueError says what is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                found = ", ".join(names)[:200] or "nothing"
                raise ValueError(f"{path}: has no arr_0 (the images, uint8 [N, H, W, 3]), only {found}")
            stored = archive.getinfo("arr_0.npy").file_size
            with archive.open("arr_0.npy") as file:
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[np.lib.format.read_magic(file)[0]](file)
                begin = file.tell()
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{path}: empty, truncated or no .npz file ({error}); write it again") from None
    if dtype.hasobject:
        raise ValueError(f"{path}: arr_0 holds pickled Python objects, which are never loaded; save a uint8 array")
    if dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {dtype}, not uint8; save the images as 0..255")
    if len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        nchw = len(shape) == 4 and shape[1] == 3
        layout = "NCHW" if nchw else "in Fortran order" if fortran else f"of shape {list(shape)}"
        raise ValueError(f"{path}: arr_0 is {layout}, not [N, H, W, 3] with N > 0; transpose it and save again")
    if stored != begin + int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path}: arr_0 ends early, its header promises {shape[0]} images; write the file again")
    return shape, begin, names


def open_npz(path):
    """Look at a .npz without loading it -> namespace as in the module's docstring."""
    try:
        shape, begin, names = _array_header(path)
    except ValueError as error:      # numpy's own complaints about a header do not name the file
        named = str(error).startswith(path)
        raise ValueError(str(error) if named else f"{path}: arr_0 is no array ({error})") from None
    per_image = shape[1] * shape[2] * 3

    def read(batch_size, rank=0, world_size=1, limit=None):
        """Batches uint8 [b, H, W, 3] of the first `limit` images: those numbered rank, rank + world_size, ..."""
        total = min(limit or shape[0], shape[0])
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                file.read(begin)
                for number, start in enumerate(range(0, total, batch_size)):
                    n = min(batch_size, total - start)
                    if number % world_size != rank:
                        file.seek(n * per_image, os.SEEK_CUR)
                        continue
                    yield np.frombuffer(bytearray(file.read(n * per_image)), np.uint8).reshape(n, *shape[1:])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise InputError(f"{path}: arr_0 is damaged ({error}); write the file again") from error

    return SimpleNamespace(path=path, count=shape[0], size=shape[1:3], converted=0, names=[], read=read,
                           statistics=stored_statistics(path, names), protocol=stored_protocol(path, names))


def stored_statistics(path, names):
    """{mu, sigma, mu_s, sigma_s} of a .npz that has mu, {} of one that has not. Float32 or float64, as they are."""
    if "mu.npy" not in names:
        return {}
    if missing := [key for key in STATISTICS if f"{key}.npy" not in names]:
        raise ValueError(f"{path}: has mu but not {', '.join(missing)}; all four statistics must be there, or none")
    try:
        with np.load(path, allow_pickle=False) as file:
            statistics = {key: file[key] for key in STATISTICS}
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: statistics cannot be read ({reason}); make them again with --save-ref") from None
    for key, shape in STATISTICS.items():
        value = statistics[key]
        if value.shape != shape or value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ValueError(f"{path}: {key} is no finite float array of shape {list(shape)}; make it with --save-ref")
    return statistics


def stored_protocol(path, names):
    """How the samples were drawn, where sample_ddp.py wrote it into the .npz (JSON text); None in other files."""
    if "protocol.npy" not in names:
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["protocol"]))
    except (ValueError, zipfile.BadZipFile, zlib.error):
        return None


def open_images(path, resolution=None):
    """The same for a folder or .zip of images: all headers are read at once, pixels when they are needed."""
    from models.data import center_crop, find_images, open_image
    names, sizes, modes = find_images(path), {}, {}
    archive = None if os.path.isdir(path) else zipfile.ZipFile(path)
    for name in names:
        try:
            with archive.open(name) if archive else open(os.path.join(path, name), "rb") as f, Image.open(f) as image:
                sizes.setdefault(image.size, name)
                modes[image.mode] = modes.get(image.mode, 0) + 1
        except Exception as error:      # Pillow raises nearly anything on a damaged file
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            raise ValueError(f"{path}/{name}: not a readable image ({reason}); remove it") from None
        if len(sizes) > 1 and not resolution:
            (a, first), (b, second) = sizes.items()
            raise ValueError(f"{path}: different sizes, {first} is {a[0]}x{a[1]} and {second} is {b[0]}x{b[1]}; "
                             "bring the images to one size, or pass --resolution to crop them as ADM does")
    width, height = (resolution, resolution) if resolution else next(iter(sizes))

    def load(name):
        image = open_image(path, name)
        return np.asarray(center_crop(image, resolution) if resolution else image)

    def read(batch_size, rank=0, world_size=1, limit=None):
        total = min(limit or len(names), len(names))
        try:
            with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool:
                for start in range(rank * batch_size, total, world_size * batch_size):
                    yield np.stack(list(pool.map(load, names[start:min(start + batch_size, total)])))
        except (ValueError, OSError) as error:
            raise InputError(str(error)) from error

    return SimpleNamespace(path=path, count=len(names), size=(height, width), statistics={}, protocol=None, read=read,
                           converted=len(names) - modes.get("RGB", 0), names=names)


def open_input(path, resolution=None):
    """A .npz, a folder of images or a .zip of one; raises ValueError or FileNotFoundError with a one-line message."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; give a .npz with arr_0, or a folder or .zip of images")
    images = open_npz(path) if path.endswith(".npz") else open_images(path, resolution)
    if images.count < MINIMUM:
        raise ValueError(f"{path}: {images.count} images are too few, at least {MINIMUM} are needed")
    return images


def input_digest(images):
    """sha256 of the file, or of the names and contents of a folder's images."""
    digest = hashlib.sha256()
    for name in images.names if os.path.isdir(images.path) else [""]:
        digest.update(name.encode())
        with open(os.path.join(images.path, name) if name else images.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
