"""Training images (an ImageFolder tree, a .zip of one, EDM2's layout, or drawn shapes) and their order.

Needs numpy, pillow and torch; imports nothing of this project, so the file can be lifted out alone.

    data = ImageData("data/imagenet/train", resolution=256)
    sampler = EndlessSampler(len(data), global_batch=256, rank=rank, world_size=world_size, start_step=step)
    for images, labels, skipped in make_loader(data, sampler, batch_size=256 // world_size):
        x = images.to(device).float() / 127.5 - 1       # uint8 [B, 3, R, R] -> [-1, 1]

Errors a user can cause are ValueError or OSError with a message of one line. The files are not trusted: what
they declare is held against MAX_BYTES, MAX_PIXELS and MAX_ASPECT before memory is taken, only the formats in
FORMATS are decoded, and the name of a .zip member is never a path on the disk.
"""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, Sampler

EXPECTED = "put class folders of images there (n01440764/x.JPEG ...) or pass --data-dir"
# For those who come with the reference's HDF5 file: image files by name, and dataset.json in EDM2's layout.
H5_ANSWER = (
    "HDF5 is not read here; give the photos, or make a .zip of it where it lies: pip install h5py && python "
    "-c \"import h5py, zipfile; z = zipfile.ZipFile('images.zip', 'w'); h5py.File('images.h5').visititems("
    "lambda n, d: z.writestr(n, bytes(d[()])) if hasattr(d, 'shape') else None)\"")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
# What is decoded, within Pillow; an .eps, under any name, it would hand to Ghostscript, an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "TGA", "JPEG2000")

# Far above any photograph; a file of a few bytes can declare terabytes.
MAX_BYTES = 2 ** 28     # of one file or .zip member: 256 MiB
MAX_PIXELS = 2 ** 27    # of one image: 134 million, 400 MB decoded
MAX_ASPECT = 100        # long side over short side: the crop scales the short side up, and the strip with it
MAX_CLASSES = 10 ** 6   # of a dataset.json

SAY_EVERY = 10.0        # seconds between progress lines


# ---------------------------------------------------------------- files: a folder tree or a .zip

class ImageError(ValueError):
    """An image file that cannot be decoded or read, in one line."""

    def __init__(self, message):
        # DataLoader gives a worker's exception its whole traceback as the message: keep the last line.
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].removeprefix(f"{__name__}.ImageError: "))


def _visible(name):
    """Whether no part of the name is hidden or a Mac's __MACOSX."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _shared_folders(names):
    """Number of leading folders that all images lie in, above their class folder: usually 0.

    It is 1 for train/n01440764/x.JPEG. Counted on the names that end like an image's, where there are any."""
    names = [name for name in names if name.lower().endswith(EXTENSIONS)] or names
    first, last = min(names).split("/"), max(names).split("/")  # what these two share, all share
    shared = next((k for k, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), 0)
    return max(0, min(shared, min(name.count("/") for name in names) - 1))


def _scan(folder, prefix="", above=()):
    """Relative names of the files below a folder and, ending in "/", of the folders. Links are followed."""
    status = os.stat(folder)
    above += ((status.st_dev, status.st_ino),)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():  # from the directory listing itself: no stat per file
                if entry.is_symlink() and (entry.stat().st_dev, entry.stat().st_ino) in above:
                    continue  # a link to a folder that it lies in
                yield f"{prefix}{entry.name}/"
                yield from _scan(entry.path, f"{prefix}{entry.name}/", above)
            # A FIFO would block its reader, a device never end. A link to nothing stays, to be reported.
            elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                yield prefix + entry.name


@lru_cache(maxsize=4)
def _open_zip(path):
    """Opens a .zip once per process -> (descriptor, {file: row}, folders (ending in "/"), table).

    table: int64 [files, 5] of offset, packed size, size, method and CRC.

    Members are read with os.pread, which has no file position, so descriptor and table are shared with forked
    worker processes; a zipfile.ZipFile would have to be opened again in each (about 14 s and 0.7 GB for
    ImageNet's members).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:  # the latter: a false version of the format
        raise ValueError(f"{path}: no whole .zip file ({error}); make it again") from None
    rows, folders, table = {}, [], []
    for info in infos:
        name, remedy = info.filename.removeprefix("./"), "make the .zip with zip -0 -r"
        if name and {"", ".", ".."} & set(name.removesuffix("/").split("/")):
            raise ValueError(f"{path}: {info.filename} is no name within the .zip; {remedy}")
        if not name or not _visible(name):
            continue
        if info.is_dir():
            folders.append(name)
            continue
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: {info.filename} is encrypted or oddly packed; {remedy}")
        rows[name] = len(table)
        table.append((info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC))
    return os.open(path, os.O_RDONLY), rows, folders, np.array(table, np.int64).reshape(-1, 5)


def _read(path, name, size=None):
    """The bytes of one file; with `size`, at least its first `size` bytes where there are as many.

    Raises ImageError if it is, or says that it is, above MAX_BYTES.
    """
    def check(size):
        if size > MAX_BYTES:
            raise ImageError(f"{path}/{name}: larger than {MAX_BYTES >> 20} MiB, so no image; "
                             "remove it or pass --skip-corrupt")

    if os.path.isdir(path):
        with open(os.path.join(path, name), "rb") as file:
            check(os.fstat(file.fileno()).st_size)
            return file.read(size)
    descriptor, rows, _, table = _open_zip(path)
    if name not in rows:
        raise FileNotFoundError(f"{path}: holds no {name}")
    offset, packed, unpacked, method, crc = map(int, table[rows[name]])
    check(max(packed, unpacked))
    # The local header's name and extra field have lengths of their own, which the directory does not tell.
    header = os.pread(descriptor, 30, offset)
    offset += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = os.pread(descriptor, packed if size is None else min(packed, size + 64), offset)
    if method == zipfile.ZIP_DEFLATED:
        # One byte more than it should give: what goes on for gigabytes stops there, and is found wrong.
        data = zlib.decompressobj(-15).decompress(data, unpacked + 1)
    if size is None and len(data) != unpacked:
        raise zlib.error("size differs")
    if size is None and zlib.crc32(data) != crc:
        raise zlib.error("checksum differs")
    return data


def _listing(path):
    """(names of files that may be images, sorted; names of folders; how many folders they all share)."""
    path = str(path)
    if os.path.isdir(path):
        entries = list(_scan(path))
        names = [name for name in entries if name[-1] != "/" and _visible(name)]
        folders = [name for name in entries if name[-1] == "/" and _visible(name[:-1])]
    elif not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such folder or .zip; {EXPECTED}")
    elif path.lower().endswith((".h5", ".hdf5")):
        raise ValueError(f"{path}: {H5_ANSWER}")
    elif not path.lower().endswith(".zip"):
        raise ValueError(f"{path}: neither a folder nor a .zip; {EXPECTED}")
    else:
        _, rows, folders, _ = _open_zip(path)
        names = list(rows)
    depth = _shared_folders(names) if names else 0
    names = sorted(name for name in names if name.count("/") > depth or name.lower().endswith(EXTENSIONS))
    if not names:
        h5 = os.path.isdir(path) and os.path.exists(os.path.join(path, "images.h5"))
        raise ValueError(f"{path}: {H5_ANSWER}" if h5 else f"{path}: holds no images; {EXPECTED}")
    return names, folders, depth


def find_images(path):
    """Sorted relative names ("n01440764/x.JPEG") of the images in a folder tree or in a .zip of one.

    Every file inside a class folder counts, whatever its ending (`check_images` finds those that are no
    images); beside the class folders only names with an image's ending. Hidden files, FIFOs and devices are
    left out. Raises FileNotFoundError when nothing is at `path`, ValueError when it is no folder or .zip or
    holds no images, or when a .zip has names that lead out of it.
    """
    return _listing(path)[0]


def _rgb(image):
    """A PIL image as 8-bit RGB; EXIF orientation and alpha are dropped, as in ADM."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # The high byte, as Pillow takes it from 16-bit colour; these grey modes it would clip to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


def open_image(path, name):
    """The image `name` of the folder or .zip `path` as an RGB PIL image, decoded whole.

    As in ADM, EXIF orientation and alpha are dropped; 16-bit pixels are scaled to 8 bits. Raises ImageError
    (a ValueError) for a file that is no image, is damaged or beyond the limits, OSError when it cannot be
    read at all.
    """
    try:
        data = _read(str(path), name)
    except zlib.error as error:
        raise ImageError(f"{path}/{name}: damaged in the .zip ({error}); "
                         "remake it or pass --skip-corrupt") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            (width, height), pixels = image.size, image.width * image.height
            if pixels > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"{width} x {height} pixels: above {MAX_PIXELS >> 20} Mi, or thinner than "
                                 f"1:{MAX_ASPECT}")
            return _rgb(image)
    except MemoryError:  # says nothing about the file
        raise
    except Image.UnidentifiedImageError:
        reason = "no image format"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        reason = str(error).split("\n")[0]
    raise ImageError(f"{path}/{name}: not a readable image ({reason}); remove it or pass --skip-corrupt")


# ---------------------------------------------------------------- a look at all files

def progress(what, total, say=print):
    """Function of the number done so far: every SAY_EVERY seconds it says a line with the time left.

    what: such as "images looked at"; the line is "12,000 of 50,000 images looked at, 3 min left".
    """
    began = last = time.monotonic()
    first = None

    def update(done):
        nonlocal last, first
        now = time.monotonic()
        first = done if first is None else first  # a resumed work begins in the middle
        if now - last >= SAY_EVERY and done > first:
            left = (now - began) * (total - done) / (done - first)
            left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            say(f"{done:,} of {total:,} {what}, {left} left")
            last = now
    return update


def share(names, rank, world_size):
    """The rank-th of `world_size` nearly equal runs of consecutive names."""
    return names[len(names) * rank // world_size:len(names) * (rank + 1) // world_size]


def _is_image(head):
    """Whether a file that begins with these bytes is an image: known magic bytes, else one of FORMATS."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        return True
    try:
        Image.open(io.BytesIO(head), formats=FORMATS).close()
        return True
    except Exception:
        return False


def check_images(path, names, threads=8, say=print):
    """Names of the files that are no images, in the order of `names`, by the first bytes of each.

    A damaged image with a sound beginning passes; it is found when it is decoded. Threads look, and
    `say` how far they are if it takes long. Several processes each look at their share(names, rank,
    world_size). Raises OSError for a file that is there but cannot be read.
    """
    path = str(path)
    quiet_pillow()

    def bad(chunk):
        found = []
        for name in chunk:
            try:
                good = _is_image(_read(path, name, 32))
                # Other formats keep their header further in: hand Pillow the whole file.
                good = good or _is_image(_read(path, name))
            except (FileNotFoundError, ImageError, zlib.error):
                good = False
            if not good:
                found.append(name)
        return found

    result, update = [], progress("files looked at", len(names), say)
    update(0)
    with ThreadPoolExecutor(threads) as pool:
        for k, found in enumerate(pool.map(bad, (names[i:i + 1000] for i in range(0, len(names), 1000)))):
            result += found
            update(min(1000 * (k + 1), len(names)))
    return result


def center_crop(image, size):
    """ADM's centre crop of a PIL image to size x size (center_crop_arr of guided-diffusion, pixel for pixel).

    Halve with a box filter while the short side is at least 2 * size, scale the short side to `size`
    bicubically, cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---------------------------------------------------------------- data sets

def flips(seed, epoch, index):
    """Whether the image is flipped in this epoch: of these three alone, so a resumed run flips the same."""
    return np.random.default_rng((seed, epoch, index)).random() < 0.5


def _to_tensor(array, flip):
    """uint8 array [R, R, 3] -> tensor [3, R, R]."""
    array = array[:, ::-1] if flip else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _labels(names, path, folders, depth):
    """Class of each image, its first folder below those that all share -> (sorted names, int64 labels).

    So a .zip holding train/n01.../ gives the classes n01..."""
    flat = next((name for name in names if "/" not in name), None)
    if flat is not None:
        raise ValueError(f"{path}: {flat} lies in no class folder; {EXPECTED}")
    found = [name.split("/", depth + 1)[depth] for name in names]
    classes = sorted(set(found))
    if len(classes) > 1 and set(classes) <= {"train", "val", "valid", "validation", "test"}:
        raise ValueError(f"{path}: holds {' and '.join(classes)}, no class folders; "
                         "give one of these with --data-dir")
    number = {name: k for k, name in enumerate(classes)}
    shared = "/".join(names[0].split("/")[:depth] + [""])
    for folder in folders:
        name = folder[len(shared):-1]
        if folder.startswith(shared) and name and "/" not in name and name not in number:
            raise ValueError(f"{path}: class folder {folder[:-1]} holds no images; leaving it out would "
                             "change the labels after it: fill it, or remove it if it is no class")
    return classes, np.array([number[name] for name in found], np.int64)


def read_json(path, name):
    """Content of a .json of the folder or .zip `path`; None where there is none."""
    try:
        return json.loads(_read(path, name))
    except FileNotFoundError:
        return None
    except (ValueError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path}/{name}: no readable JSON ({str(error)[:100]})") from None


def _json_labels(content, names, path, depth):
    """The same of EDM2's dataset.json -> (class names, int64 labels, names of the images, a part of `names`).

    {"labels": [["00000/img00000000.png", 6], ...]}, or null for a set without labels: one class. prepare.py
    writes the names of the classes too, {"classes": ["n01440764", ...]}; without them a class is called by
    its number.
    """
    where, shared = f"{path}: dataset.json", "/".join(names[0].split("/")[:depth] + [""])
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f'{where} holds no "labels", so it is not of EDM2\'s layout; remove or rename it')
    pairs, classes = content["labels"], content.get("classes")
    if pairs is None:
        names = [name for name in names if name.lower().endswith(EXTENSIONS)]
        return ["images"], np.zeros(len(names), np.int64), names
    try:
        label_of = {shared + name: label for name, label in pairs}
    except (TypeError, ValueError):
        raise ValueError(f'{where}: "labels" is no list of [name, label]') from None
    wrong = next((x for x in label_of.values() if type(x) is not int or not 0 <= x < MAX_CLASSES), None)
    if wrong is not None:
        raise ValueError(f"{where}: label {wrong} is no whole number from 0 to {MAX_CLASSES - 1}")
    unlabelled = next((n for n in names if n not in label_of and n.lower().endswith(EXTENSIONS)), None)
    names = [name for name in names if name in label_of]
    if unlabelled or not names:
        raise ValueError(f"{where} has no label for {unlabelled or 'any image'}; make it again")
    labels = np.array([label_of[name] for name in names], np.int64)
    classes = [str(k) for k in range(max(label_of.values()) + 1)] if classes is None else classes
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) <= labels.max():
        raise ValueError(f'{where}: "classes" is no list of a name for each label')
    return classes, labels, names


class ImageData(Dataset):
    """An ImageFolder tree, or a .zip of one, as ADM-cropped uint8 images.

    An item is (image uint8 [3, R, R], label int, skipped int). Its key is an index, or (epoch, index) as
    EndlessSampler gives it: `hflip` draws each image's flip from (seed, epoch, index) alone. A file that
    cannot be decoded raises ImageError; with `skip_corrupt` the next readable image stands in, with its own
    label, and `skipped` counts the files passed over (0 for a sound one). So with a file that is no longer
    there; a disk that fails, or the whole folder gone, is never passed over.

    Labels are torchvision's ImageFolder's: classes sorted by name, and a class folder without images is
    refused, since leaving it out would shift the labels after it. Where there is a dataset.json in EDM2's
    layout (as prepare.py writes it), labels come from there instead. A set without labels, described so by
    its dataset.json, is one class; with `unlabelled` a folder of nothing but images is one too, instead of an
    error.

    Attributes: path, names, labels (int64 array), classes (label k is the k-th), num_classes, labelled.
    Raises what `find_images` raises, and ValueError for images without a class.
    """

    def __init__(self, path, resolution, hflip=False, seed=0, skip_corrupt=False, unlabelled=False):
        self.path, self.resolution, self.skip_corrupt = str(path), resolution, skip_corrupt
        self.hflip, self.seed = hflip, seed
        self.names, folders, depth = _listing(self.path)
        described = read_json(self.path, "/".join(self.names[0].split("/")[:depth] + ["dataset.json"]))
        self.labelled = True
        if described is not None:
            self.classes, self.labels, self.names = _json_labels(described, self.names, self.path, depth)
            self.labelled = described["labels"] is not None
            self.check_prepared(described.get("prepared"))
        elif unlabelled and not any("/" in name for name in self.names):
            self.classes, self.labels, self.labelled = ["images"], np.zeros(len(self.names), np.int64), False
        else:
            self.classes, self.labels = _labels(self.names, self.path, folders, depth)
        self.num_classes = len(self.classes)

    def check_prepared(self, prepared):
        side = prepared.get("resolution") if isinstance(prepared, dict) else None
        if isinstance(side, int) and side < self.resolution:
            raise ValueError(f"{self.path}: prepared at {side} pixels, which --resolution {self.resolution} "
                             "would enlarge; prepare it again from the original images")

    def __len__(self):
        return len(self.names)

    def content(self, index):
        """Bytes of the image's file as it is, b"" if it is not there or above the limits."""
        try:
            return _read(self.path, self.names[index])
        except (FileNotFoundError, ImageError, zlib.error):
            return b""

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self)):
            # At first the plain index, so that one out of range raises.
            at = (index + skipped) % len(self) if skipped else index
            where = f"{self.path}/{self.names[at]}"
            try:
                image = center_crop(open_image(self.path, self.names[at]), self.resolution)
            except ImageError:
                if not self.skip_corrupt:
                    raise
                continue
            except FileNotFoundError:
                if not self.skip_corrupt or not os.path.exists(self.path):
                    remedy = "put it back or pass --skip-corrupt"
                    raise ImageError(f"{where}: no longer there; {remedy}") from None
                continue
            except OSError as error:
                reason = error.strerror or error
                raise ImageError(f"{where}: cannot be read ({reason}); see to the disk") from None
            flip = self.hflip and flips(self.seed, epoch, index)
            return _to_tensor(np.asarray(image), flip), int(self.labels[at]), skipped
        raise ValueError(f"{self.path}: none of its {len(self)} files is a readable image")


def _outlines():
    """The ten shapes -> {name: (outline [N, 2], hole [M, 2] or None)} in the unit circle, y pointing down."""
    def polygon(n, radius=1.0, start=-90.0, center=(0.0, 0.0)):
        angle = np.deg2rad(start + np.arange(n) * 360 / n)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1)) + center

    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    heart_y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    a, b = 0.32, 1.0
    plus = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    return {
        "circle": (polygon(32, 0.9), None),
        "square": (polygon(4, 1.15, 45), None),
        "triangle": (polygon(3, 1.1), None),
        "star": (polygon(10, np.tile([1.15, 0.45], 5)), None),
        "plus": (np.array(plus), None),
        "ring": (polygon(32), polygon(32, 0.5)),
        "diamond": (polygon(4) * (0.7, 1.15), None),
        "crescent": (polygon(32), polygon(32, 0.85, center=(0.5, 0.0))),
        "heart": (np.stack([np.sin(t) ** 3, heart_y / 16], 1), None),
        "bar": (np.array([(-1.15, -0.3), (1.15, -0.3), (1.15, 0.3), (-1.15, 0.3)]), None),
    }


class ShapesData(Dataset):
    """The demo's images: ten shapes drawn from their index, so of any number and size; label = index % 10.

    One saturated shape on a plain light ground, its colour, size (about half the image), place and rotation
    (up to 12 degrees) drawn from (seed, index). Items, keys and attributes as in ImageData; nothing is ever
    skipped.
    """

    SHAPES = _outlines()
    COLOURS = np.array([(214, 40, 40), (236, 122, 20), (34, 150, 60),
                        (20, 150, 170), (40, 80, 210), (140, 50, 180)])

    def __init__(self, n, resolution, hflip=False, seed=0):
        self.path, self.resolution, self.hflip, self.seed = "shapes", resolution, hflip, seed
        self.classes = list(self.SHAPES)
        self.num_classes = len(self.classes)
        self.labels = np.arange(n, dtype=np.int64) % self.num_classes
        self.names = [f"{self.classes[label]}/{index:07d}" for index, label in enumerate(self.labels)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        label = int(self.labels[index])
        random = np.random.default_rng((self.seed, index % len(self)))
        size, x, y, turn = random.uniform((0.27, -0.08, -0.08, -12), (0.36, 0.08, 0.08, 12)).tolist()
        colour = self.COLOURS[random.integers(len(self.COLOURS))] + random.integers(-20, 21, 3)
        ground = random.integers(225, 256) * np.ones(3)
        cover = self._draw(label, size, 0.5 + x, 0.5 + y, np.deg2rad(turn))[..., None]
        image = np.rint(ground + (colour - ground) * cover).clip(0, 255).astype(np.uint8)
        return _to_tensor(image, self.hflip and flips(self.seed, epoch, index)), label, 0

    def content(self, index):
        """Bytes that say what is drawn for an index."""
        return f"shapes {self.seed} {index}".encode()

    def _draw(self, label, size, x, y, turn):
        """Coverage [R, R] in [0, 1]: drawn four times as large in two tones, then averaged."""
        side = 4 * self.resolution
        turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * (size * side)
        mask = Image.new("L", (side, side))
        draw = ImageDraw.Draw(mask)
        for points, fill in zip(self.SHAPES[self.classes[label]], (255, 0)):
            if points is not None:
                draw.polygon((points @ turned + (x * side, y * side)).ravel().tolist(), fill=fill)
        return np.asarray(mask.reduce(4), np.float32) / 255


def identity(data, probes=64):
    """What a run was trained on, kept with it and compared when it continues: a dict for JSON.

    classes: names in the order of their labels; images: their number; labels, files: sha256 (hex) over the
    label of each image, and over the file names and the content of `probes` files spread evenly over them. A
    folder and the .zip of it have the same identity; resolution and flips are not part of it.
    """
    files = hashlib.sha256("\n".join(data.names).encode("utf-8", "surrogateescape"))
    for index in np.linspace(0, len(data) - 1, min(probes, len(data))).round().astype(int):
        files.update(hashlib.sha256(data.content(int(index))).digest())
    labels = hashlib.sha256(data.labels.astype("<i8").tobytes())
    return {"classes": list(data.classes), "images": len(data), "labels": labels.hexdigest(),
            "files": files.hexdigest()}


def check_same_data(before, now, where):
    """Raise a one-line ValueError if two identities differ in their classes: labels would change meaning.

    Returns a line for the log if only their files differ, "" if nothing does. `where` is the run, for the
    message.
    """
    old, new = before["classes"], now["classes"]
    if old != new:
        k = next((k for k, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        changed = (f"class {k} was {old[k]} and is now {new[k]}" if k < min(len(old), len(new)) else
                   f"class {k} is now {new[k]}" if k < len(new) else f"class {k}, {old[k]}, is gone")
        raise ValueError(f"{where}: the classes of the data have changed, {changed} ({len(new)} classes, "
                         f"{len(old)} classes before); restore them, or start anew with another --exp-name")
    if (before["images"], before["labels"]) != (now["images"], now["labels"]):
        return (f"the data has changed: {now['images']} images, {before['images']} before; "
                "the order of the images is another one from here on")
    return "" if before["files"] == now["files"] else "the data has changed: as many images, but other files"


# ---------------------------------------------------------------- order and loading

class EndlessSampler(Sampler):
    """One process's share of an endless shuffled order, as keys (epoch, index).

    The order is one permutation of the data after another, the one of each epoch fixed by (seed, epoch):
    every image comes exactly once per epoch. Global batch number k is entries [k * global_batch, (k + 1) *
    global_batch) of it, running across the border of two epochs (nothing is dropped, and a batch may be
    larger than the data). Process `rank` takes the rank-th of `world_size` equal parts of each batch, so the
    global batch is the same for any number of processes. `start_step` = number of global batches already
    done: continues there without walking the order.
    """

    def __init__(self, length, global_batch, rank=0, world_size=1, seed=0, start_step=0):
        if global_batch % world_size:
            raise ValueError(f"--batch-size {global_batch} cannot be divided among {world_size} processes")
        self.length, self.global_batch, self.seed, self.start_step = length, global_batch, seed, start_step
        self.share = global_batch // world_size
        self.first = rank * self.share

    def __iter__(self):
        epoch, order = -1, None
        step = self.start_step
        while True:
            begin = step * self.global_batch + self.first
            for position in range(begin, begin + self.share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                yield epoch, int(order[position % self.length])
            step += 1


def quiet_pillow():
    """No warnings about ImageNet's odd EXIF blocks: an image is decoded or it raises."""
    warnings.filterwarnings("ignore", module="PIL")


def start_worker(_):
    """What a decoding process does first; for DataLoader's worker_init_fn."""
    torch.set_num_threads(1)  # decoding is one thread's work; more would take the cores of the other workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends its workers
    quiet_pillow()


class _Loader(DataLoader):
    """DataLoader for which a worker's sudden end is always the RuntimeError that worker_death knows.

    Where it dies while a batch is handed over, torch lets the broken connection through.
    """

    def __iter__(self):
        def batches(iterator):
            try:
                yield from iterator
            except (OSError, EOFError) as error:
                time.sleep(1)  # for the signal of its death, which raises here what has to be said, once
                raise RuntimeError(f"DataLoader worker closed its connection: {error}") from error
        iterator = super().__iter__()  # the workers start now, not with the first batch
        return batches(iterator) if self.num_workers else iterator


def make_loader(dataset, sampler, batch_size, num_workers=8, device="cpu"):
    """Endless DataLoader of (images uint8 [B, 3, R, R], labels int64 [B], skipped int64 [B]), B = batch_size.

    `batch_size` is what one process takes at a time: its share of the global batch, or of an accumulation
    step. `num_workers` 0 decodes in the training process. Pinned memory when `device` is a GPU.
    """
    workers = {}
    if num_workers == 0:
        quiet_pillow()
    else:
        # fork shares the list of files with the workers; where there is none (Windows) they get a copy each.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        workers = dict(multiprocessing_context=method, persistent_workers=True, worker_init_fn=start_worker)
    return _Loader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True,
                   pin_memory=torch.device(device).type == "cuda", **workers)


def worker_death(error):
    """One line for the RuntimeError that torch raises when a loader's worker dies; None for any other.

    torch raises it from a signal handler: wherever the training process is at that moment, not only in
    next().
    """
    text = str(error)
    if "DataLoader worker" not in text:
        return None
    return (f"a data worker died ({text.splitlines()[0].rstrip('. ')}); most often memory ran out: use fewer "
            "--num-workers, or more shared memory (docker run --ipc=host)")
