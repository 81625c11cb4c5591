"""Images in and out of files: .npz, folders and .zips read as streams; .npz and PNG files written.

    images = open_input("samples.npz")              # namespace(path, count, size (H, W), read, protocol, ...)
    for batch in images.read(64, rank, world_size): # uint8 [b, H, W, 3]; never more than a batch in memory
        ...
    write_npz("copy.npz", images.read(64), (images.count, *images.size, 3), arr_1=labels)

In a .npz, arr_0 holds the images, uint8 [N, H, W, 3]. Each format has one reader and one writer here, whoever
uses it. Needs numpy and pillow, and data.py beside it for folders and .zips.

The files read are not trusted: nothing in them is run, and what they declare is held against the file before
memory is taken. What is wrong with one is InputError, a single line that names it, where possible before any
long work. An error of the disk (no permission, disk full) stays OSError: it says nothing about the content.
"""
import contextlib
import errno
import hashlib
import json
import math
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.runtime import files

# of the pool features and of the spatial features
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
MINIMUM = 4             # images per set: precision and recall look at the 3rd neighbour
MOST_PIXELS = 1 << 24   # of an image that is not cropped: 4096 x 4096, and a batch of them is held
MOST_BYTES = 1 << 28    # of an array beside the images


class InputError(ValueError):
    """A file that is not what it should be, found when it is opened or read; the message is one line."""


# ---------------------------------------------------------------- .npz: the reader

def open_npz(path):
    """Look at a .npz without loading it -> namespace(path, count, size, read, array, statistics, protocol).

    size: (H, W); read: see there; array(name): another array of the file, None if it has none of that name;
    statistics: {mu, sigma, mu_s, sigma_s} of a reference, else {}; protocol: how sample_ddp.py drew the
    samples (a dict), else None. Raises InputError for a file without images or a damaged one, OSError if
    unreadable.
    """
    with _one_line(f"{path}: empty, truncated or no .npz file"), zipfile.ZipFile(path) as archive:
        names = {name[:-4] for name in archive.namelist() if name.endswith(".npy")}
        if "arr_0" not in names and not {"mu", "sigma"} <= names:
            found = ", ".join(archive.namelist())[:200] or "nothing"
            raise InputError(f"{path}: has no arr_0 (the images, uint8 [N, H, W, 3]), only {found}")
        # A reference may be statistics alone.
        shape, begin = _images_layout(archive) if "arr_0" in names else ((0, 0, 0, 3), 0)
    per_image = math.prod(shape[1:])

    def read(batch_size, rank=0, world_size=1, rows=None):
        """Batches uint8 [b, H, W, 3] of the images `rows` (ascending numbers; default: all): this process's
        share of them, which is the batches numbered rank, rank + world_size, ...

        Where one process reads them all, the file's digest (zip's CRC-32) is checked at the end.
        """
        rows = range(shape[0]) if rows is None else rows
        starts = range(rank * batch_size, len(rows), world_size * batch_size)
        if not starts:
            return
        with (_one_line(f"{path}: arr_0 is damaged"), zipfile.ZipFile(path) as archive,
              archive.open("arr_0.npy") as file):
            file.read(begin)
            for start in starts:
                wanted = np.asarray(rows[start:start + batch_size])
                data = bytearray()
                # Rows that are neighbours are read in one piece.
                for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
                    gap = begin + int(run[0]) * per_image - file.tell()
                    if gap:  # a needless seek would end the check of the digest
                        file.seek(gap, os.SEEK_CUR)
                    data += file.read(len(run) * per_image)
                yield np.frombuffer(data, np.uint8).reshape(len(wanted), *shape[1:])

    def array(name):
        with _one_line(f"{path}: {name} is damaged"), zipfile.ZipFile(path) as archive:
            if name not in names:
                return None
            if archive.getinfo(f"{name}.npy").file_size > MOST_BYTES:
                raise InputError(f"{path}: {name} is larger than {MOST_BYTES >> 20} MiB")
            _layout(archive, name)
            with archive.open(f"{name}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)

    images = SimpleNamespace(path=path, count=shape[0], size=shape[1:3], converted=0, names=[], read=read,
                             array=array)
    images.statistics = _stored_statistics(path, names, array)
    images.protocol = _stored_protocol(array)
    return images


@contextlib.contextmanager
def _one_line(what):
    """Context in which whatever zipfile, zlib and numpy say of a damaged file becomes one InputError: `what`,
    and why.

    For bytes that make no sense they raise a dozen types, so all are caught, but for those of disk and
    memory.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise OSError(f"{what}, or memory is full") from error
    except Exception as error:
        # EINVAL: a place before the file's start was sought, by a table of contents that lies
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{what} ({reason}); write it again") from error


def _layout(archive, name):
    """(shape, whether in Fortran order, dtype, byte where the data begin) of an array in an open .npz.

    InputError where its header does not agree with the size of the member, or the member with that of the
    file.
    """
    info, where = archive.getinfo(f"{name}.npy"), f"{archive.filename}: {name}"
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(info) as file:
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
        begin = file.tell()
    if dtype.hasobject:
        raise InputError(f"{where} holds pickled Python objects, which are never loaded; save a plain array")
    too_long = info.header_offset + info.compress_size > os.path.getsize(archive.filename)
    if too_long or min(shape, default=0) < 0 or info.file_size != begin + math.prod(shape) * dtype.itemsize:
        raise InputError(f"{where} ends early, its header promises {list(shape)}; write the file again")
    return shape, fortran, dtype, begin


def _images_layout(archive):
    """(shape [N, H, W, 3], byte where the data begin) of arr_0; InputError says what is wrong with it."""
    (shape, fortran, dtype, begin), where = _layout(archive, "arr_0"), f"{archive.filename}: arr_0"
    if dtype != np.uint8:
        raise InputError(f"{where} is {dtype}, not uint8; save the images as 0..255")
    if len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        nchw = len(shape) == 4 and shape[1] == 3
        layout = "NCHW" if nchw else "in Fortran order" if fortran else f"of shape {list(shape)}"
        raise InputError(f"{where} is {layout}, not [N, H, W, 3] with N > 0; transpose it and save again")
    if shape[1] * shape[2] > MOST_PIXELS:
        raise InputError(f"{where} has images of {shape[2]}x{shape[1]}, above {MOST_PIXELS >> 20} Mi pixels")
    return shape, begin


def _stored_statistics(path, names, array):
    """{mu, sigma, mu_s, sigma_s} of a .npz that has mu, {} of one that has not. Float32 or float64, as they
    are. Beside images all four must be there, as in the ADM suite; alone, mu and sigma may be."""
    if "mu" not in names:
        return {}
    alone = "arr_0" not in names and not {"mu_s", "sigma_s"} & names
    wanted = ["mu", "sigma"] if alone else list(STATISTICS)
    if missing := set(wanted) - names:
        raise InputError(f"{path}: has mu but not {', '.join(sorted(missing))}; "
                         "all four statistics must be there, or none")
    try:
        statistics = {key: array(key) for key in wanted}
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: statistics cannot be read ({reason}); make them with --save-ref") from None
    for key, value in statistics.items():
        shape = STATISTICS[key]
        if value.shape != shape or value.dtype.kind != "f" or not np.isfinite(value).all():
            raise InputError(f"{path}: {key} is no finite float array of shape {list(shape)}; "
                             "make it with --save-ref")
    return statistics


def _stored_protocol(array):
    """The protocol (JSON text) of a file that sample_ddp.py wrote, as a dict; None in other files."""
    try:
        protocol = json.loads(str(array("protocol")))
    except (ValueError, RecursionError):  # somebody else's array of that name
        return None
    return protocol if isinstance(protocol, dict) else None


# ---------------------------------------------------------------- .npz: the writer

def write_npz(path, rows, shape, **arrays):
    """Write an uncompressed .npz, whole or not at all, with memory for one array of `rows` at a time.

    arr_0: uint8 of `shape` [N, H, W, 3], from the iterable `rows` of uint8 arrays [k, H, W, 3]; after it each
    of `arrays` under its name, as np.savez has them (no pickled objects). The bytes depend on these alone,
    and they are read back and checked before the file gets its name. ValueError if `rows` does not give
    `shape`.
    """
    with files.replace(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            with _new_member(archive, "arr_0") as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(f, header)
                written = 0
                for part in rows:
                    if part.dtype != np.uint8 or part.shape[1:] != tuple(shape[1:]):
                        raise ValueError(f"{path}: {part.dtype} {list(part.shape)} instead of uint8 images "
                                         f"of {list(shape[1:])}")
                    f.write(np.ascontiguousarray(part).data)
                    written += len(part)
            if written != shape[0]:
                raise ValueError(f"{path}: {written} images instead of {shape[0]}")
            for name, value in arrays.items():
                with _new_member(archive, name) as f:
                    np.lib.format.write_array(f, np.asarray(value), allow_pickle=False)
        with zipfile.ZipFile(temporary) as archive:
            if bad := archive.testzip():
                raise OSError(f"{path}: {bad} reads back differently than it was written; is the disk sound?")


def _new_member(archive, name):
    """A file to write in an open .npz; with a fixed date, and room for more than 4 GiB, which must be
    announced."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


# ---------------------------------------------------------------- folders and .zips of images: the reader

def open_images(path, resolution=None):
    """A folder or .zip of images as open_npz gives a .npz: all headers are read at once, pixels when needed.

    resolution: crop them to this size as ADM does; without it they must be of one size. `converted` counts
    those that are not RGB (grey, palette, transparent), `names` are relative paths in the order of reading.
    """
    from models.runtime.data import center_crop, find_images, open_image
    names = find_images(path)
    sizes, converted = _image_headers(path, names)
    if not resolution and len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise InputError(f"{path}: different sizes, {first} is {a[0]}x{a[1]} and {second} is {b[0]}x{b[1]}; "
                         "bring the images to one size, or pass --resolution to crop them as ADM does")
    width, height = (resolution, resolution) if resolution else next(iter(sizes))
    if width * height > MOST_PIXELS:
        raise InputError(f"{path}: images of {width}x{height}, above {MOST_PIXELS >> 20} Mi pixels each; "
                         "pass --resolution to crop them as ADM does")

    def load(row):
        image = open_image(path, names[row])
        return np.asarray(center_crop(image, resolution) if resolution else image)

    def read(batch_size, rank=0, world_size=1, rows=None):
        rows = range(len(names)) if rows is None else rows
        try:
            with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool:
                for start in range(rank * batch_size, len(rows), world_size * batch_size):
                    yield np.stack(list(pool.map(load, rows[start:start + batch_size])))
        except (ValueError, OSError) as error:
            raise InputError(str(error)) from error

    return SimpleNamespace(path=path, count=len(names), size=(height, width), converted=converted,
                           names=names, read=read, array=lambda name: None, statistics={}, protocol=None)


def _image_headers(path, names):
    """({size (W, H): name of the first image that has it}, number of images that are not RGB)."""
    sizes, converted = {}, 0
    with contextlib.nullcontext() if os.path.isdir(path) else zipfile.ZipFile(path) as archive:
        for name in names:
            try:
                file = archive.open(name) if archive else open(os.path.join(path, name), "rb")
                with file, Image.open(file) as image:
                    sizes.setdefault(image.size, name)
                    converted += image.mode != "RGB"
            except Exception as error:      # Pillow raises nearly anything on a damaged file
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
                raise InputError(f"{path}/{name}: not a readable image ({reason}); remove it") from error
    return sizes, converted


# ---------------------------------------------------------------- any of them

def open_shapes(resolution, seed, count=1000):
    """The built-in shapes as open_npz describes a file; `seed`: one that training does not draw from."""
    from models.runtime.data import ShapesData
    shapes = ShapesData(count, resolution, seed=seed)

    def read(batch_size, rank=0, world_size=1, rows=None):
        rows = range(count) if rows is None else rows
        for first in range(rank * batch_size, len(rows), world_size * batch_size):
            yield np.stack([shapes[int(i)][0].permute(1, 2, 0) for i in rows[first:first + batch_size]])

    return SimpleNamespace(path="shapes", count=count, size=(resolution, resolution), converted=0, names=[],
                           statistics={}, protocol=None, read=read, array=lambda name: None)


def open_input(path, resolution=None, seed=1):
    """A .npz, a folder of images or a .zip of one, as open_npz describes it.

    "shapes" is the built-in set of drawn images, of that seed. Raises InputError, ValueError or OSError with
    a one-line message.
    """
    if path == "shapes":
        return open_shapes(resolution or 32, seed)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file; give a .npz with arr_0, a folder or a .zip of images")
    images = open_npz(path) if path.endswith(".npz") else open_images(path, resolution)
    if images.count < MINIMUM and not (images.statistics and images.count == 0):
        raise InputError(f"{path}: {images.count} images are too few, at least {MINIMUM} are needed")
    return images


def evenly_spaced(count, most):
    """Row numbers of `most` of `count` images (of all, if there are fewer), evenly spaced from the first to
    the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def input_digest(images):
    """sha256 of the file, or of the names and contents of a folder's images."""
    digest = hashlib.sha256()
    if images.path == "shapes":
        return hashlib.sha256(np.concatenate(list(images.read(100))).tobytes()).hexdigest()
    for name in images.names if os.path.isdir(images.path) else [""]:
        digest.update(name.encode())
        with open(os.path.join(images.path, name) if name else images.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- pictures

CAPTION = 14  # height of a caption in pixels


def round_to_uint8(images):
    """uint8 [B, H, W, 3] of a tensor [B, 3, H, W] in [-1, 1], rounded to the nearest level: for
    reconstructions, which are compared with uint8 images. Samples are truncated instead, as the paper's are:
    samplers.truncate_to_uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def label_grid(images, captions=None, columns=None):
    """PIL.Image of uint8 images [N, H, W, 3] (numpy array or CPU tensor) in rows of `columns` (default:
    nearly square).

    captions: one per image, written above it, anything that str() takes such as a class number. Images
    smaller than 64 pixels are enlarged by a whole factor.
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
    """Write a PIL.Image, or a uint8 array [H, W, 3], as a PNG file, whole or not at all."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with files.replace(path) as temporary, open(temporary, "wb") as f:
        image.save(f, "PNG")


def write_pngs(folder, rows):
    """Write image i of `rows` (an iterable of uint8 arrays [k, H, W, 3]) to folder/00000i.png."""
    def write(numbered):
        write_png(os.path.join(folder, f"{numbered[0]:06d}.png"), numbered[1])

    first = 0
    with ThreadPoolExecutor(8) as pool:
        for part in rows:
            list(pool.map(write, enumerate(part, first)))
            first += len(part)
