"""Prepare a data set once: photos become one .zip of cropped, lossless images, which take less work to read.

    python -m models.runtime.prepare data/imagenet/train data/imagenet-256.zip --resolution 256
    torchrun --nproc-per-node 8 train_repae_e.py --data-dir data/imagenet-256.zip

The source is a folder of class folders, a .zip of one, EDM2's layout of either, or a folder of images without
classes. Images get ADM's centre crop and are kept as PNG: training sees the very pixels, labels and order
that it would see with the source itself. The .zip has EDM2's layout, 00000/img00000000.png ... and
dataset.json with the labels; the names of the classes are in it too, under a key that EDM2's reader passes
over.

Killed and started again it continues, and the bytes are the same. OUT is there when it is whole, and not
before. Errors a user can cause end in one line, exit code 2.
"""
import os

from models.runtime.cli import answer_early, fail, flag, make_parser


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("source", help="folder or .zip of images")
    parser.add_argument("out", help="the .zip to make")
    flag(parser, "--resolution", 256, "side of the ADM centre crop in pixels", least=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flag(parser, "--num-workers", cores, "processes; 0 for this one alone")
    flag(parser, "--skip-corrupt", False, "leave out and count files that are no images, instead of stopping")
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_args)

import fcntl
import io
import json
import shutil
import struct
import zipfile

import numpy as np
import PIL
from torch.utils.data import DataLoader, Dataset

from models.runtime import files, signals
from models.runtime.data import (ImageData, ImageError, center_crop, identity, open_image, progress,
                                 read_json, start_worker, worker_death)

SYNC_EVERY = 2000  # images between two points from which a killed run continues


class Encoded(Dataset):
    """The images of an ImageData as PNG files: item k is bytes, or None for a file that is left out as
    corrupt."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        source, output = self.source, io.BytesIO()
        where = f"{source.path}/{source.names[index]}"
        try:
            image = center_crop(open_image(source.path, source.names[index]), source.resolution)
        except ImageError:
            if not source.skip_corrupt:
                raise
            return None
        except OSError as error:
            raise ImageError(f"{where}: cannot be read ({error.strerror or error})") from None
        # Level 6 would make the files 4 % smaller, no faster to read, and take twice as long.
        image.save(output, "PNG", compress_level=1)
        return output.getvalue()


def member(name):
    """ZipInfo with nothing of the day or the machine in it, so that the bytes depend on the images alone."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info


def image_name(number):
    return f"{number // 1000:05d}/img{number:08d}.png"


def members_of(file, size):
    """The members that the first `size` bytes of a .zip being written hold, by their own headers:
    [ZipInfo]."""
    infos, at = [], 0
    while at < size:
        file.seek(at)
        signature, crc, packed, name, extra = struct.unpack("<4s10xII4xHH", file.read(30))
        info = member(file.read(name).decode())
        if signature != b"PK\3\4" or extra:
            raise ValueError(f"{file.name}: damaged at byte {at}; remove it and start again")
        info.header_offset, info.CRC, info.compress_size, info.file_size = at, crc, packed, packed
        infos.append(info)
        at += 30 + name + packed
    return infos


def last_sync(journal, part, what):
    """(images looked at, size of `part` then, those left out) where a killed run continues: all of that is on
    the disk. The work of another source, resolution or version of Pillow is of no use: (0, 0, [])."""
    try:
        with open(journal) as file:
            state = json.load(file)
        if state["what"] == what and os.path.getsize(part) >= state["size"]:
            return state["done"], state["size"], state["left_out"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, 0, []


def check_space(source, out, workers):
    """Say how large the .zip will be, by 16 of its images; ValueError if the disk has no room for it."""
    sizes = [len(data) for k in range(16) if (data := Encoded(source)[k * len(source) // 16])]
    need = sum(sizes) / max(1, len(sizes)) * len(source)
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(out))).free
    print(f"{len(source):,} images of {len(source.classes)} classes, {source.resolution} pixels: about "
          f"{need / 1e6:,.1f} MB, made by {max(1, workers)} processes", flush=True)
    if need * 0.9 > free:
        raise ValueError(f"{out}: needs about {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; "
                         "make room or give another place")


def lock(file, part, out):
    """Hold the open `part` for this process alone; ValueError if another one has it."""
    try:
        # Not flock: forked workers would hold it on for seconds after this process was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(part) or not os.path.samestat(os.stat(part), os.fstat(file.fileno())):
            raise BlockingIOError  # renamed to `out` by another process since it was opened here
    except BlockingIOError:
        raise ValueError(f"{out}: another process is making it") from None


def prepare(source, out, workers=0):
    """Write the images of an ImageData to the .zip `out`, by as many processes as `workers` says (0: this
    one).

    Returns the number of files left out as corrupt (with source.skip_corrupt). Raises ValueError or OSError
    with a message of one line; what is done by then is kept for the next call.
    """
    folder, name = os.path.split(os.path.abspath(out))
    part, journal = os.path.join(folder, f".{name}.part"), os.path.join(folder, f".{name}.part.json")
    origin = {k: v for k, v in identity(source).items() if k != "classes"}
    prepared = {"resolution": source.resolution, "source": origin}
    what = {"prepared": prepared, "classes": source.classes, "pillow": PIL.__version__}
    if os.path.exists(out):
        there = read_json(out, "dataset.json")
        if not isinstance(there, dict) or there.get("prepared") != prepared:
            raise ValueError(f"{out}: is there already, and made of something else; "
                             "give another name or remove it")
        print(f"{out}: is there already", flush=True)
        return 0
    try:
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
            lock(file, part, out)
            done, size, left_out = last_sync(journal, part, what)
            if done:
                print(f"continues at image {done:,}", flush=True)
            else:
                check_space(source, out, workers)
            members = members_of(file, size)
            file.truncate(size)
            file.seek(size)
            archive = zipfile.ZipFile(file, "w")  # writes on from here
            archive.infolist().extend(members)
            try:
                write_images(source, archive, workers, done, left_out,
                             lambda done: sync(file, journal, what, done, left_out))
                labels = np.delete(source.labels, left_out).tolist()
                pairs = [[image_name(k), label] for k, label in enumerate(labels)]
                content = {"labels": pairs if source.labelled else None, "classes": source.classes,
                           "prepared": prepared}
                archive.writestr(member("dataset.json"), json.dumps(content, separators=(",", ":")))
                archive.close()
            finally:
                archive.fp = None  # after an error it must not write its directory on being freed
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, out)
    except OSError as error:
        raise OSError(f"{out}: {error.strerror or error}; the same command continues") from None
    if os.path.exists(journal):
        os.remove(journal)
    return len(left_out)


def write_images(source, archive, workers, done, left_out, sync):
    """Add the images from number `done` on to the archive; `left_out` grows by the corrupt ones."""
    pool = {"multiprocessing_context": "fork", "worker_init_fn": start_worker} if workers else {}
    loader = DataLoader(Encoded(source), batch_size=8, sampler=range(done, len(source)), collate_fn=list,
                        num_workers=workers, **pool)
    update = progress("images written", len(source))
    update(done)
    for batch in loader:
        for data in batch:
            if data is None:
                left_out.append(done)
            else:
                archive.writestr(member(image_name(done - len(left_out))), data)
            done += 1
            if done % SYNC_EVERY == 0:
                sync(done)
        update(done)


def sync(file, journal, what, done, left_out):
    """Bring the .zip to the disk, then write down how far it is."""
    file.flush()
    os.fsync(file.fileno())
    with files.replace(journal) as temporary, open(temporary, "w") as f:
        json.dump({"what": what, "done": done, "size": file.tell(), "left_out": left_out}, f)


def main(argv=None):
    args = parse_args(argv)
    try:
        with signals.stopped_in_one_line("the same command continues"):
            left_out = run(args)
    except (ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        if (line := worker_death(error)) is None:
            raise
        fail(f"{line}; the same command continues", code=1)
    print(f"done: {args.out}" + (f" without {left_out} corrupt files" if left_out else ""), flush=True)


def run(args):
    """The whole program after the flags; returns the number of files left out as corrupt."""
    if not args.out.lower().endswith(".zip"):
        raise ValueError(f"{args.out}: is to be a .zip; give a name that ends so")
    inside = os.path.realpath(args.out).startswith(os.path.join(os.path.realpath(args.source), ""))
    if inside:
        raise ValueError(f"{args.out}: lies in {args.source} itself; give a place outside of it")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    source = ImageData(args.source, args.resolution, skip_corrupt=args.skip_corrupt, unlabelled=True)
    return prepare(source, args.out, args.num_workers)


if __name__ == "__main__":
    main()
