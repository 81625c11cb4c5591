"""Training images: an ImageFolder tree or a .zip of one, the built-in set of drawn shapes, and the order of reading.

Needs numpy, pillow and torch; imports nothing of this project, so the file can be lifted out alone.

    data = ImageData("data/imagenet/train", resolution=256)
    sampler = EndlessSampler(len(data), global_batch=256, rank=rank, world_size=world_size, seed=0, start_step=step)
    for images, labels, skipped in make_loader(data, sampler, batch_size=256 // world_size, num_workers=8):
        x = images.to(device).float() / 127.5 - 1       # uint8 [B, 3, R, R] -> [-1, 1]

Errors a user can cause are ValueError or OSError with a message of one line.
"""

import io
import multiprocessing
import os
import signal
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
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


# ---------------------------------------------------------------- files: a folder tree or a .zip

class ImageError(ValueError):
    """An image file that cannot be decoded, in one line."""

    def __init__(self, message):
        # DataLoader re-raises a worker's exception with its whole traceback as the message: keep the last line.
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].removeprefix(f"{__name__}.ImageError: "))


def _visible(name):
    """Whether no part of the name is hidden or a Mac's __MACOSX."""
    return not any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _shared_folders(names):
    """Number of leading folders that all images lie in, above their class folder: 1 for train/n01440764/x.JPEG, usually
    0. Counted on the names that end like an image's, where there are any."""
    names = [name for name in names if name.lower().endswith(EXTENSIONS)] or names
    first, last = min(names).split("/"), max(names).split("/")  # what these two share, all share
    shared = next((k for k, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), 0)
    return max(0, min(shared, min(name.count("/") for name in names) - 1))


def _scan(folder, prefix=""):
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():  # from the directory listing itself: no stat per file
                if not entry.name.startswith("."):
                    yield from _scan(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


@lru_cache(maxsize=4)
def _open_zip(path):
    """Opens a .zip once per process -> (descriptor, {member: row}, int64 table of offset, packed size, method, CRC).

    Members are read with os.pread, which has no file position, so descriptor and table are shared with forked worker
    processes; a zipfile.ZipFile would have to be opened again in each (about 14 s and 0.7 GB for ImageNet's members).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir() and _visible(info.filename)]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: no whole .zip file ({error}); make it again") from None
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path}: {info.filename} is encrypted or oddly packed; make the .zip with zip -0 -r")
    table = [(info.header_offset, info.compress_size, info.compress_type, info.CRC) for info in infos]
    rows = {info.filename: row for row, info in enumerate(infos)}
    return os.open(path, os.O_RDONLY), rows, np.array(table, np.int64).reshape(-1, 4)


def _read(path, name, size=None):
    """The bytes of one image file; with `size`, at least its first `size` bytes where there are as many."""
    if os.path.isdir(path):
        with open(os.path.join(path, name), "rb") as file:
            return file.read(size)
    descriptor, rows, table = _open_zip(path)
    if name not in rows:
        raise FileNotFoundError(f"{path}: holds no {name}")
    offset, packed, method, crc = map(int, table[rows[name]])
    header = os.pread(descriptor, 30, offset)  # the local header: its name and extra field have their own lengths
    offset += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = os.pread(descriptor, packed if size is None else min(packed, size + 64), offset)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-15).decompress(data)
    if size is None and zlib.crc32(data) != crc:
        raise zlib.error("checksum differs")
    return data


def find_images(path):
    """Sorted relative names ("n01440764/x.JPEG") of the images in a folder tree or in a .zip of one.

    Every file inside a class folder counts, whatever its ending (`check_images` finds those that are no images); beside
    the class folders only names with an image's ending. Hidden files are left out.
    Raises FileNotFoundError when nothing is at `path`, ValueError when it is no folder or .zip or holds no images.
    """
    if os.path.isdir(path):
        names = [name for name in _scan(path) if _visible(name)]
    elif not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such folder or .zip; {EXPECTED}")
    elif not str(path).lower().endswith(".zip"):
        raise ValueError(f"{path}: neither a folder nor a .zip; {EXPECTED}")
    else:
        names = list(_open_zip(str(path))[1])
    depth = _shared_folders(names) if names else 0
    names = [name for name in names if name.count("/") > depth or name.lower().endswith(EXTENSIONS)]
    if not names:
        raise ValueError(f"{path}: holds no images; {EXPECTED}")
    return sorted(names)


def open_image(path, name):
    """The image `name` of the folder or .zip `path` as an RGB PIL image, decoded whole.

    As in ADM, EXIF orientation and alpha are dropped. Raises ImageError (a ValueError) for a file that is no image or
    is damaged, OSError when it cannot be read at all.
    """
    try:
        data = _read(str(path), name)
    except zlib.error as error:
        raise ImageError(f"{path}/{name}: damaged in the .zip ({error}); remake it or pass --skip-corrupt") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data; reading it is done already
        reason = "no image format" if isinstance(error, Image.UnidentifiedImageError) else str(error).split("\n")[0]
        raise ImageError(f"{path}/{name}: not a readable image ({reason}); remove it or pass --skip-corrupt") from None


def _is_image(head):
    """Whether the first bytes of a file are those of an image: known magic bytes, else whatever Pillow knows."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        return True
    try:
        Image.open(io.BytesIO(head)).close()
        return True
    except Exception:
        return False


def check_images(path, names, threads=8):
    """Names of the files that are no images, in the order of `names`: a look at the first bytes of each, in threads.

    A damaged image with a sound beginning passes; it is found when it is decoded.
    """
    path = str(path)

    def bad(chunk):
        found = []
        for name in chunk:
            try:
                good = _is_image(_read(path, name, 32))
                # Other formats keep their header further in: hand Pillow the whole file.
                good = good or _is_image(_read(path, name))
            except (OSError, zlib.error):
                good = False
            if not good:
                found.append(name)
        return found

    chunks = [names[i:i + 1000] for i in range(0, len(names), 1000)]
    with ThreadPoolExecutor(threads) as pool:
        return [name for found in pool.map(bad, chunks) for name in found]


def center_crop(image, size):
    """ADM's centre crop of a PIL image to size x size (center_crop_arr of guided-diffusion, pixel for pixel).

    Halve with a box filter while the short side is at least 2 * size, scale the short side to `size` bicubically, cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---------------------------------------------------------------- data sets

def _flips(seed, epoch, index):
    """Whether the image is flipped in this epoch: of these three alone, so that a resumed run sees the same images."""
    return np.random.default_rng((seed, epoch, index)).random() < 0.5


def _to_tensor(array, flip):
    """uint8 array [R, R, 3] -> tensor [3, R, R]."""
    array = array[:, ::-1] if flip else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _labels(names, path):
    """Class of each image: its first folder below the folders that all images share (so that a .zip holding
    train/n01.../ gives the classes n01...) -> (sorted class names, int64 labels)."""
    flat = next((name for name in names if "/" not in name), None)
    if flat is not None:
        raise ValueError(f"{path}: {flat} lies in no class folder; {EXPECTED}")
    depth = _shared_folders(names)
    found = [name.split("/", depth + 1)[depth] for name in names]
    classes = sorted(set(found))
    if len(classes) > 1 and set(classes) <= {"train", "val", "valid", "validation", "test"}:
        raise ValueError(f"{path}: holds {' and '.join(classes)}, no class folders; give one of these with --data-dir")
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([number[name] for name in found], np.int64)


class ImageData(Dataset):
    """An ImageFolder tree, or a .zip of one, as ADM-cropped uint8 images.

    An item is (image uint8 [3, R, R], label int, skipped int). Its key is an index, or (epoch, index) as
    EndlessSampler gives it: `hflip` draws each image's flip from (seed, epoch, index) alone. A file that cannot be
    decoded raises ImageError; with `skip_corrupt` the next readable image stands in, with its own label, and `skipped`
    counts the files passed over (0 for a sound one). Attributes: path, names, labels (int64 array), classes (sorted;
    label k is the k-th), num_classes. Raises what `find_images` raises, ValueError for images outside class folders.
    """

    def __init__(self, path, resolution, hflip=False, seed=0, skip_corrupt=False):
        self.path, self.resolution, self.skip_corrupt = str(path), resolution, skip_corrupt
        self.hflip, self.seed = hflip, seed
        self.names = find_images(self.path)
        self.classes, self.labels = _labels(self.names, self.path)
        self.num_classes = len(self.classes)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self)):
            at = (index + skipped) % len(self) if skipped else index  # the plain index first: out of range must raise
            try:
                image = center_crop(open_image(self.path, self.names[at]), self.resolution)
            except ImageError:
                if not self.skip_corrupt:
                    raise
                continue
            flip = self.hflip and _flips(self.seed, epoch, index)
            return _to_tensor(np.asarray(image), flip), int(self.labels[at]), skipped
        raise ValueError(f"{self.path}: none of its {len(self)} files is a readable image")


def _outlines():
    """The ten shapes -> {name: (outline [N, 2], hole [M, 2] or None)}, within the unit circle, y pointing down."""
    def polygon(n, radius=1.0, start=-90.0, center=(0.0, 0.0)):
        angle = np.deg2rad(start + np.arange(n) * 360 / n)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1)) + center

    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    heart_y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    a, b = 0.32, 1.0
    plus = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
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
    """The demo's images, drawn from their index and so of any number and size: ten shapes, label = index % 10.

    One saturated shape on a plain light ground, its colour, size (about half the image), place and rotation (up to 12
    degrees) drawn from (seed, index). Items, keys and attributes as in ImageData; nothing is ever skipped.
    """

    SHAPES = _outlines()
    COLOURS = np.array([(214, 40, 40), (236, 122, 20), (34, 150, 60), (20, 150, 170), (40, 80, 210), (140, 50, 180)])

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
        return _to_tensor(image, self.hflip and _flips(self.seed, epoch, index)), label, 0

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


# ---------------------------------------------------------------- order and loading

class EndlessSampler(Sampler):
    """One process's share of an endless shuffled order, as keys (epoch, index).

    The order is one permutation of the data after another, the one of each epoch fixed by (seed, epoch): every image
    comes exactly once per epoch. Global batch number k is entries [k * global_batch, (k + 1) * global_batch) of it,
    running across the border of two epochs (nothing is dropped, and a batch may be larger than the data). Process
    `rank` takes the rank-th of `world_size` equal parts of each batch, so the global batch is the same for any number
    of processes.
    `start_step` = number of global batches already done: continues there without walking the order.
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


def _start_worker(_):
    torch.set_num_threads(1)  # decoding is one thread's work; more would take the cores of the other workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends its workers
    warnings.filterwarnings("ignore", module="PIL")  # ImageNet's odd EXIF blocks: an image is decoded or it raises


def make_loader(dataset, sampler, batch_size, num_workers=8, device="cpu"):
    """Endless DataLoader of (images uint8 [B, 3, R, R], labels int64 [B], skipped int64 [B]), B = batch_size.

    `batch_size` is what one process takes at a time: its share of the global batch, or of an accumulation step.
    `num_workers` 0 decodes in the training process. Pinned memory when `device` is a GPU.
    """
    workers = {}
    if num_workers > 0:
        # fork shares the list of files with the workers; where there is none (Windows) they get a copy each.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        workers = dict(multiprocessing_context=method, persistent_workers=True, worker_init_fn=_start_worker)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True,
                      pin_memory=torch.device(device).type == "cuda", **workers)
