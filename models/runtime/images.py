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
import math
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.runtime import files

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
    from models.runtime.data import center_crop, find_images, open_image
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


def round_to_uint8(images):
    """uint8 [B, H, W, 3] of a tensor [B, 3, H, W] in [-1, 1], rounded to the nearest level: for reconstructions, which
    are compared with uint8 images (samplers.truncate_to_uint8 truncates, as the paper's sampler does)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


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


def write_shard(folder, first, images):
    """Write the samples first, first + 1, ... (uint8 [k, H, W, 3]) to their shard, atomically."""
    path = os.path.join(folder, f"{first:08d}-{first + len(images):08d}.npy")
    with files.replace(path) as temporary, open(temporary, "wb") as f:
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
    with files.replace(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
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
