"""Images from a folder of class folders, a .zip of one, EDM2's layout, a .npz, or drawn; and their order.

Training, evaluation and the VAE's metrics all read images here. Needs numpy, pillow and torch.

    data = open_images("data/imagenet/train", resolution=256)
    sampler = EndlessSampler(len(data), global_batch=256, rank=rank, world_size=world_size, start_step=step)
    for images, labels in make_loader(data, sampler, batch_size=256 // world_size):
        x = images.to(device).float() / 127.5 - 1       # uint8 [B, 3, R, R] -> [-1, 1]

Files are not trusted: only FORMATS are decoded, nothing is unpickled, and the name of a .zip member is never
a path on the disk.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import signal
import struct
import warnings
import zipfile

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, Sampler

EXPECTED = "it must contain class folders of images (n01440764/x.JPEG ...)"
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif",
              ".tga", ".jp2", ".avif")
# What is decoded, whatever a file is called: Pillow would pass an .eps to Ghostscript, an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "TGA", "JPEG2000", "AVIF")
SPLITS = ("train", "val", "test", "eval", "fold", "split")  # how the names of splits begin

PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26             # sound PNGs have text and color profiles above 1 MiB
warnings.filterwarnings("ignore", module="PIL")     # of odd EXIF blocks: an image is decoded or it raises


class ImageError(ValueError):
    """A file that cannot be decoded. The message is one line, also out of a DataLoader's worker."""

    def __init__(self, message):
        # DataLoader raises a worker's exception again with its whole traceback as the message.
        super().__init__(message.rstrip().rsplit("\n", 1)[-1].removeprefix(f"{__name__}.ImageError: "))


@contextlib.contextmanager
def damaged(what):
    """Context in which whatever Pillow, zipfile and numpy raise on bad data becomes ImageError: `what` (why).

    An error of the disk or of memory says nothing about the data and stays what it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = ("unknown format" if isinstance(error, Image.UnidentifiedImageError) else
                  " ".join(str(error).split())[:150] or type(error).__name__)
        raise ImageError(f"{what} ({reason})") from None


# ---------------------------------------------------------------- one image

def center_crop(image, size):
    """ADM's center crop of a PIL image to size x size (center_crop_arr of guided-diffusion, pixel for pixel).

    Halve with a box filter while the short side is at least 2 * size, scale the short side to `size`
    bicubically, cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode(content):
    """Bytes of an image file -> PIL image, 8-bit RGB; EXIF orientation and alpha are dropped, as in ADM."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            # 16-bit gray: the high byte, as Pillow does it for 16-bit color. It would clip these to white.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
        return image.convert("RGB")


def flips(seed, epoch, index):
    """Whether an image is flipped in this epoch: of these three alone, so a resumed run flips the same."""
    return np.random.default_rng((seed, epoch, index)).random() < 0.5


def to_tensor(array, flip=False):
    """uint8 array [H, W, 3] -> tensor [3, H, W]."""
    array = array[:, ::-1] if flip else array
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


# ---------------------------------------------------------------- a folder or a .zip: names and labels

def _walk(path, prefix="", above=frozenset()):
    """Relative names of the files below a folder and, ending in "/", of its folders. Links are followed."""
    above |= {os.path.realpath(os.path.join(path, prefix))}
    for entry in os.scandir(os.path.join(path, prefix)):
        if not entry.is_dir():
            yield prefix + entry.name
        elif os.path.realpath(entry.path) not in above:     # a link that leads back would list all again
            yield f"{prefix}{entry.name}/"
            yield from _walk(path, f"{prefix}{entry.name}/", above)


def _visible(name):
    """Whether no part of the name is empty, hidden or a Mac's __MACOSX; some .zips begin names with "./"."""
    parts = name.removeprefix("./").split("/")
    return not any(part.startswith(".") or part in ("", "__MACOSX") for part in parts)


def _shared_folders(names):
    """The folders that all images lie in, above their class folders: usually none.

    They are "train/" for train/n01440764/x.JPEG."""
    first, last = min(names).split("/"), max(names).split("/")  # what these two share, all share
    shared = next((k for k, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), 0)
    depth = min(shared, min(name.count("/") for name in names) - 1)
    return "".join(f"{folder}/" for folder in first[:max(0, depth)])


def _check_classes(path, names, folders, classes, shared):
    """Raise a one-line ValueError unless the images lie in class folders."""
    loose = next((name for name in names if "/" not in name), None)
    if loose is not None:
        raise ValueError(f"{path}: {loose} lies in no class folder; {EXPECTED}")
    tops = {folder.removeprefix(shared).split("/")[0] for folder in folders if folder.startswith(shared)}
    for empty in sorted(tops - {"", *classes}):
        raise ValueError(f"{path}: class folder {shared}{empty} has no images; leaving it out would shift "
                         "the labels of the classes after it: fill it, or remove it if it is not a class")
    splits = [name for name in classes if name.lower().startswith(SPLITS)]
    if len(splits) < len(classes):  # next to others: "valley" with images of its own is a class
        own = {os.path.dirname(name).removeprefix(shared) for name in names}
        splits = [name for name in splits if name not in own]
    if len(splits) > 1:
        train = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise ValueError(f"{path}: {' and '.join(splits)} look like splits of a data set, not like classes; "
                         f"pass --data-dir {os.path.join(path, shared, train)}")


def _json_labels(content, names, shared, where):
    """(class names, int64 labels of `names`) from the text of EDM2's dataset.json in the folder `shared`.

    {"labels": [["00000/img00000000.png", 6], ...]}, or null for a set without labels: one class. Raises a
    one-line ValueError unless each image has one label.
    """
    with damaged(f"{where}: not the labels of these images in EDM2's layout"):
        pairs = json.loads(content)["labels"]
        if pairs is None:
            return ["images"], np.zeros(len(names), np.int64)
        label_of = {shared + name: label for name, label in pairs}
        labels = np.array([label_of[name] for name in names])
        if labels.shape != (len(pairs),):
            raise ValueError(f"{len(pairs)} labels for {len(names)} images")
        if labels.dtype.kind != "i" or labels.min() < 0:
            raise ValueError("a label is not a whole number from 0 on")
    return [str(k) for k in range(labels.max() + 1)], labels


class ImageData(Dataset):
    """A folder or .zip of images, ADM-cropped to `resolution` (None: as they are, all of one size).

    An item is (image uint8 [3, R, R], label int). Its key is an index, or (epoch, index) as EndlessSampler
    gives it: `hflip` draws each image's flip from (seed, epoch, index). With `skip_corrupt` the next readable
    image takes the place of a corrupt one, with its own label and a warning; a disk that fails is never
    skipped over.

    Labels are torchvision's ImageFolder's: classes sorted by name, below the folders that all images share.
    Files without an image's ending are left out; a class folder without images is an error. A dataset.json in
    EDM2's layout gives the labels instead. With labelled=False any images do, in any folders.

    Attributes: path, resolution, names, labels (int64 array), classes (label k is the k-th), num_classes,
    size (H, W). Raises FileNotFoundError if nothing is at `path`, ValueError if it has no images or no
    classes, ImageError for a corrupt image, OSError for a file that cannot be read.
    """

    def __init__(self, path, resolution=None, hflip=False, seed=0, skip_corrupt=False, labelled=True):
        self.path, self.resolution, self.hflip, self.seed = str(path), resolution, hflip, seed
        self.skip_corrupt, self.zip = skip_corrupt, None
        entries = self._entries()
        self.names = sorted(name for name in entries if name.lower().endswith(EXTENSIONS) and _visible(name))
        if not self.names:
            raise ValueError(f"{path}: has no images; {EXPECTED}")
        shared = _shared_folders(self.names)
        described = f"{shared}dataset.json"
        if labelled and described in entries:
            content, where = self.read(described), f"{path}/{described}"
            self.classes, self.labels = _json_labels(content, self.names, shared, where)
        else:
            found = [name.removeprefix(shared).split("/")[0] if "/" in name else "" for name in self.names]
            self.classes = sorted(set(found))
            if labelled:
                folders = [name for name in entries if name.endswith("/") and _visible(name[:-1])]
                _check_classes(self.path, self.names, folders, self.classes, shared)
            number = {name: k for k, name in enumerate(self.classes)}
            self.labels = np.array([number[name] for name in found], np.int64)
        self.num_classes = len(self.classes)
        self.size = (resolution, resolution) if resolution else self.load(0).size[::-1]

    def _entries(self):
        """Names of all files in the folder or .zip and, ending in "/", of its folders."""
        if os.path.isdir(self.path):
            return set(_walk(self.path))
        if not os.path.exists(self.path):
            raise FileNotFoundError(f"{self.path}: no such folder or .zip; {EXPECTED}")
        with damaged(f"{self.path}: neither a folder nor a whole .zip; make or copy it again"):
            self.zip, self.pid = zipfile.ZipFile(self.path), os.getpid()
        return set(self.zip.namelist())

    def __len__(self):
        return len(self.names)

    def read(self, name):
        """The bytes of a file."""
        if self.zip is None:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read()
        if self.pid != os.getpid():     # a forked worker shares the list of members; the file must be its own
            self.zip.fp, self.pid = open(self.path, "rb"), os.getpid()
        return self.zip.read(name)

    def content(self, index):
        """The bytes of the image's file, b"" if it is damaged in the .zip."""
        with contextlib.suppress(ImageError), damaged(""):
            return self.read(self.names[index])
        return b""

    def load(self, index):
        """The whole image as a PIL image, 8-bit RGB. Raises ImageError if corrupt, OSError if unreadable."""
        with damaged(f"{self.path}/{self.names[index]}: not a readable image; remove it"):
            return decode(self.read(self.names[index]))

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self)):
            # At first the plain index, so that one out of range raises.
            at = (index + skipped) % len(self) if skipped else index
            try:
                image = self.load(at)
                break
            except ImageError as error:
                if not self.skip_corrupt or skipped == len(self) - 1:
                    raise
                warnings.warn(f"skipped {error}")   # once per file in each worker
        if self.resolution:
            image = center_crop(image, self.resolution)
        elif image.size != self.size[::-1]:
            raise ImageError(f"{self.path}: {self.names[0]} is {self.size[1]}x{self.size[0]}, "
                             f"{self.names[at]} is {image.width}x{image.height}; pass --resolution to crop")
        flip = self.hflip and flips(self.seed, epoch, index)
        return to_tensor(np.asarray(image), flip), int(self.labels[at])


class NpzData(Dataset):
    """The images arr_0, uint8 [N, H, W, 3], and labels arr_1 of a .npz; items and attributes as in ImageData.

    arr_0 is mapped into memory, not read, unless it is compressed. array(name) is any other array, `protocol`
    how sample_ddp.py drew the images (a dict, {} in other files). A file with the statistics mu and sigma
    instead of images has length 0. With labelled=True arr_1 must be there.
    """

    def __init__(self, path, resolution=None, hflip=False, seed=0, labelled=True):
        self.path, self.resolution, self.hflip, self.seed = str(path), resolution, hflip, seed
        with damaged(f"{path}: truncated, or not a .npz of images; write it again"):
            self.arrays = np.load(self.path)
            statistics = "mu" in self.arrays.files and "arr_0" not in self.arrays.files
            self.images = np.empty((0, 0, 0, 3), np.uint8) if statistics else self._images()
        labels = self.array("arr_1")
        fit = labels is not None and labels.shape == (len(self),) and labels.dtype.kind in "iu" \
            and labels.min(initial=0) >= 0
        if labelled and not fit:
            raise ValueError(f"{path}: has no labels (arr_1, {len(self)} integers from 0 on)")
        self.labels = labels.astype(np.int64) if fit else np.zeros(len(self), np.int64)
        self.classes = [str(k) for k in range(self.labels.max(initial=0) + 1)]
        self.num_classes = len(self.classes)
        self.names = [f"{k:06d}" for k in range(len(self))]
        self.size = (resolution, resolution) if resolution else self.images.shape[1:3]
        with damaged(f"{path}: its protocol is not one of sample_ddp.py; write it without"):
            self.protocol = json.loads(str(self.arrays["protocol"])) if "protocol" in self.arrays else {}

    def _images(self):
        info = self.arrays.zip.getinfo("arr_0.npy")
        with self.arrays.zip.open(info) as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            begin = member.tell()
        if dtype != np.uint8 or shape[3:] != (3,):
            raise ValueError(f"arr_0 is {dtype} {list(shape)}, not uint8 [N, H, W, 3]")
        if info.file_size != begin + math.prod(shape):
            raise ValueError(f"arr_0 ends early, its header promises {list(shape)}")
        if info.compress_type != zipfile.ZIP_STORED:
            return self.arrays["arr_0"]
        with open(self.path, "rb") as file:     # the member's own header tells where its bytes begin
            file.seek(info.header_offset + 26)
            begin += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        return np.memmap(self.path, dtype, "r", begin, shape, "F" if fortran else "C")

    def array(self, name):
        """The array of that name, None if there is none. Raises a one-line ValueError if it is damaged."""
        with damaged(f"{self.path}: {name} is damaged; write it again"):
            return self.arrays[name] if name in self.arrays.files else None

    def __len__(self):
        return len(self.images)

    def content(self, index):
        """The bytes of the image's pixels."""
        return self.images[index].tobytes()

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.images[index]
        if image.shape[:2] != self.size:
            image = np.asarray(center_crop(Image.fromarray(image), self.resolution))
        return to_tensor(image, self.hflip and flips(self.seed, epoch, index)), int(self.labels[index])


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

    One shape on white, three quarters of the image large. Its color, size, place and rotation (up to 8
    degrees) are drawn from (seed, index). Items, keys and attributes as in ImageData.
    """

    SHAPES = _outlines()
    # Of different brightness: a VAE takes much longer to tell equally bright colors apart.
    COLORS = np.array([(245, 160, 30), (205, 40, 90), (30, 50, 130)])
    GROUND = 250

    def __init__(self, n, resolution, hflip=False, seed=0):
        self.path, self.resolution, self.hflip, self.seed = "shapes", resolution, hflip, seed
        self.classes, self.size = list(self.SHAPES), (resolution, resolution)
        self.num_classes = len(self.classes)
        self.labels = np.arange(n, dtype=np.int64) % self.num_classes
        self.names = [f"{self.classes[label]}/{index:07d}" for index, label in enumerate(self.labels)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        label = int(self.labels[index])
        random = np.random.default_rng((self.seed, index % len(self)))
        size, x, y, turn = random.uniform((0.33, -0.04, -0.04, -8), (0.39, 0.04, 0.04, 8)).tolist()
        color = self.COLORS[random.integers(len(self.COLORS))]
        cover = self._draw(label, size, 0.5 + x, 0.5 + y, np.deg2rad(turn))[..., None]
        image = np.rint(self.GROUND + (color - self.GROUND) * cover).astype(np.uint8)
        return to_tensor(image, self.hflip and flips(self.seed, epoch, index)), label

    def content(self, index):
        """Bytes that say what is drawn for an index."""
        return f"shapes v2 {self.seed} {index}".encode()

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


def open_images(path, resolution=None, hflip=False, seed=0, skip_corrupt=False, labelled=True):
    """The images at `path`: a folder, a .zip, a .npz, or "shapes": 50,000 of them, at 32 pixels by default.

    See ImageData for the arguments, the items and the errors.
    """
    if path == "shapes":
        return ShapesData(50000, resolution or 32, hflip, seed)
    if str(path).endswith(".npz"):
        return NpzData(path, resolution, hflip, seed, labelled)
    return ImageData(path, resolution, hflip, seed, skip_corrupt, labelled)


# ---------------------------------------------------------------- which data a run has

def evenly_spaced(count, most):
    """Indices of `most` of `count` images (of all, if there are fewer), evenly spaced from first to last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def identity(data, probes=64):
    """What a run is trained on, stored in its checkpoints and compared when it resumes: a dict for JSON.

    classes: names in the order of their labels; images: their number; labels, files: sha256 (hex) over the
    label of each image, and over the file names and the content of `probes` files spread evenly over them. A
    folder and the .zip of it have the same identity; resolution and flips are not part of it.
    """
    files = hashlib.sha256("\n".join(data.names).encode("utf-8", "surrogateescape"))
    for index in evenly_spaced(len(data), probes):
        files.update(hashlib.sha256(data.content(int(index))).digest())
    labels = hashlib.sha256(data.labels.astype("<i8").tobytes())
    return {"classes": list(data.classes), "images": len(data), "labels": labels.hexdigest(),
            "files": files.hexdigest()}


# ---------------------------------------------------------------- order and loading

class EndlessSampler(Sampler):
    """One process's share of an endless shuffled order, as keys (epoch, index).

    The order is one permutation of the data after another, fixed by (seed, epoch). Global batch number k is
    entries [k * global_batch, (k + 1) * global_batch) of it, across the border of epochs. Process `rank`
    takes the rank-th of `world_size` equal parts of each batch: the global batch is the same for any number
    of processes. start_step: number of global batches already done; it is reached without walking the order.
    """

    def __init__(self, length, global_batch, rank=0, world_size=1, seed=0, start_step=0):
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


def start_worker(_):
    """What a worker process does first; for DataLoader's worker_init_fn."""
    # torchrun, timeout and Slurm signal the whole group. The training process needs its workers until it has
    # saved, and ends them itself.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, sampler, batch_size, num_workers=8, device="cpu"):
    """DataLoader of (images uint8 [B, 3, R, R], labels int64 [B]), B = batch_size, in the sampler's order.

    `batch_size` is what one process takes at a time: its share of the global batch, or of an accumulation
    step. `num_workers` 0 decodes in the training process. Pinned memory when `device` is a GPU.
    """
    workers = {}
    if num_workers:     # forked: they share the list of files
        workers = dict(multiprocessing_context="fork", persistent_workers=True, worker_init_fn=start_worker)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers,
                      pin_memory=torch.device(device).type == "cuda", **workers)
