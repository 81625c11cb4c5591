"""models/runtime/data.py: folder and .zip read alike, ADM's crop, the drawn shapes, the order and its resume,
user errors."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.runtime import data as data_module
from models.runtime.data import (H5_ANSWER, EndlessSampler, ImageData, ImageError, ShapesData, center_crop,
                                 check_images, check_same_data, find_images, identity, make_loader,
                                 open_image, share, worker_death)


@pytest.fixture
def tree(tmp_path):
    """Three classes of four photos each, of several formats and modes, and a few files that are none."""
    random = np.random.default_rng(0)
    for c in ("a-x", "a", "b"):
        (tmp_path / "images" / c).mkdir(parents=True)
        for k, (mode, ending) in enumerate((("RGB", "JPEG"), ("L", "jpg"), ("RGBA", "png"), ("CMYK", "jpg"))):
            pixels = random.integers(0, 256, (40 + 9 * k, 70 - 9 * k, len(mode)), dtype=np.uint8).squeeze()
            image = Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())
            image.save(tmp_path / "images" / c / f"{k}.{ending}")
    (tmp_path / "images" / "README.txt").write_text("not data")
    (tmp_path / "images" / "a" / ".DS_Store").write_text("not data")
    return tmp_path / "images"


def pack(tree, path, method=zipfile.ZIP_STORED, prefix=""):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(tree.rglob("*"), reverse=True):  # the order inside must not matter
            name = prefix + str(file.relative_to(tree)) + "/" * file.is_dir()
            archive.writestr(zipfile.ZipInfo(name), b"" if file.is_dir() else file.read_bytes(), method)
    return path


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "train/", "./", "./train/"])
def test_zip_equals_folder(tree, tmp_path, method, prefix):
    archive = pack(tree, tmp_path / "images.zip", method, prefix)
    one, two = ImageData(tree, 16), ImageData(archive, 16)
    assert [prefix.removeprefix("./") + name for name in one.names] == two.names
    assert one.classes == two.classes == ["a", "a-x", "b"] and one.num_classes == 3
    assert len(one) == len(two) == 12 and list(one.labels) == list(two.labels)
    for a, b in zip(one, two):
        assert torch.equal(a[0], b[0]) and a[1:] == b[1:]
        assert a[0].shape == (3, 16, 16) and a[0].dtype == torch.uint8


def test_labels_are_those_of_torchvision(tree):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(tree)
    data = ImageData(tree, 16)
    assert data.classes == folder.classes
    expected = {os.path.relpath(path, tree): label for path, label in folder.samples}
    assert dict(zip(data.names, data.labels.tolist())) == expected


def test_pixels_are_the_files_pixels(tmp_path):
    """Row 0 is the top, channel 0 is red, nothing is scaled where the size fits already."""
    (tmp_path / "d" / "c").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "d" / "c" / "x.png")
    assert np.array_equal(ImageData(tmp_path / "d", 8)[0][0].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("width, height", [(500, 375), (333, 999), (64, 64), (63, 200), (129, 128), (40, 30)])
def test_center_crop_is_adms(width, height, size=64):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.size[0] * scale), round(image.size[1] * scale)
    array = np.array(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    assert np.array_equal(np.array(center_crop(Image.fromarray(pixels), size)), array[y:y + size, x:x + size])


def test_find_images_errors(tree, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_images(tmp_path / "nowhere")
    one_line(error, "nowhere: no such folder or .zip", "--data-dir")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        find_images(tmp_path / "empty")
    one_line(error, "empty: holds no images")
    with pytest.raises(ValueError) as error:
        find_images(tree / "README.txt")
    one_line(error, "README.txt: neither a folder nor a .zip")
    whole = pack(tree, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError) as error:
        find_images(tmp_path / "half.zip")
    one_line(error, "half.zip: no whole .zip")
    with pytest.raises(ValueError) as error:
        find_images(pack(tree, tmp_path / "lzma.zip", zipfile.ZIP_LZMA))
    one_line(error, "lzma.zip", "oddly packed")


def test_name_that_is_not_there(tree, tmp_path):
    for path in (tree, pack(tree, tmp_path / "x.zip")):
        with pytest.raises(FileNotFoundError) as error:
            open_image(path, "a/none.png")
        one_line(error, "none.png")


def test_folder_of_splits(tree):
    """data/imagenet instead of data/imagenet/train would train on two classes, train and val."""
    (tree / "a").rename(tree / "train")
    (tree / "b").rename(tree / "val")
    assert ImageData(tree, 8).classes == ["a-x", "train", "val"]
    shutil.rmtree(tree / "a-x")
    with pytest.raises(ValueError) as error:
        ImageData(tree, 8)
    one_line(error, "holds train and val, no class folders", "--data-dir")


def test_images_outside_class_folders(tree):
    Image.new("RGB", (8, 8)).save(tree / "loose.png")
    with pytest.raises(ValueError) as error:
        ImageData(tree, 16)
    one_line(error, "loose.png lies in no class folder")
    assert "loose.png" in find_images(tree)  # a flat folder is a fine set of images where no labels are asked


# ---------------------------------------------------------------- damaged files

@pytest.fixture
def damaged(tree):
    """The tree with three files that are no images (by their first bytes) and one cut short (decoding
    tells)."""
    (tree / "a" / "1.jpg").write_text("<html>404</html>")
    (tree / "a" / "2.png").write_bytes(b"")
    (tree / "b" / "notes.txt").write_text("inside a class folder, so it counts")
    whole = (tree / "b" / "0.JPEG").read_bytes()
    (tree / "b" / "0.JPEG").write_bytes(whole[:len(whole) // 2])
    return tree


@pytest.mark.parametrize("packed", [False, True])
def test_check_images(damaged, tmp_path, packed):
    Image.new("RGB", (8, 8)).save(damaged / "b" / "rare.tga")  # no magic bytes, but Pillow knows it
    path = pack(damaged, tmp_path / "x.zip", zipfile.ZIP_DEFLATED) if packed else damaged
    names = find_images(path)
    assert check_images(path, names) == ["a/1.jpg", "a/2.png", "b/notes.txt"]
    many = [name for name in names if name[0] != "b"] * 300  # several chunks
    assert check_images(path, many, threads=3) == ["a/1.jpg", "a/2.png"] * 300
    if not packed:
        (damaged / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
        assert "b/gone.png" in check_images(path, find_images(path))


@pytest.mark.parametrize("name", ["a/1.jpg", "a/2.png", "b/0.JPEG"])
def test_damaged_file_is_named(damaged, name):
    with pytest.raises(ValueError) as error:
        open_image(damaged, name)
    one_line(error, name, "not a readable image", "--skip-corrupt")
    data = ImageData(damaged, 16)
    with pytest.raises(ValueError) as error:
        data[data.names.index(name)]
    one_line(error, name)


def test_damaged_member_of_a_zip(tree, tmp_path):
    path = pack(tree, tmp_path / "x.zip")
    at = path.read_bytes().find((tree / "a" / "0.JPEG").read_bytes()) + 400
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes(64))
    with pytest.raises(ValueError) as error:
        open_image(path, "a/0.JPEG")
    one_line(error, "a/0.JPEG", "checksum", "--skip-corrupt")


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_vanishes(tree, workers):
    data = ImageData(tree, 16)
    for name in data.names[:4]:
        (tree / name).unlink()
    with pytest.raises(ImageError) as error:
        for _ in islice(make_loader(data, EndlessSampler(len(data), 4), 4, workers), 8):
            pass
    one_line(error, tree, "no longer there", "--skip-corrupt")
    traceback.clear_frames(error.tb)
    image, label, skipped = ImageData.__getitem__(remade := vars_of(data, skip_corrupt=True), 0)
    assert skipped == 4 and label == data.labels[4] and torch.equal(image, remade[4][0])


def vars_of(data, **changes):
    """A copy of a data set as it stands: its list of files was made before they vanished."""
    twin = object.__new__(ImageData)
    vars(twin).update(vars(data) | changes)
    return twin


def test_folder_that_vanishes_is_never_skipped_over(tree):
    """A disk that is gone must not look like 1.28 million corrupt images."""
    data = ImageData(tree, 16, skip_corrupt=True)
    tree.rename(tree.parent / "elsewhere")
    with pytest.raises(ImageError) as error:
        data[0]
    one_line(error, data.names[0], "no longer there")


def test_disk_that_fails_is_never_skipped_over(tree):
    data = ImageData(tree, 16, skip_corrupt=True)
    (tree / data.names[0]).unlink()
    (tree / data.names[0]).mkdir()  # opening it fails, and not because nothing is there
    with pytest.raises(ImageError) as error:
        data[0]
    one_line(error, data.names[0], "cannot be read")


def lose_a_worker(tree, result):
    torch.set_num_threads(1)
    loader = make_loader(ImageData(tree, 16), EndlessSampler(12, 4), 4, num_workers=1)
    try:
        for k, _ in enumerate(loader):
            if k == 1:
                os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
            time.sleep(0.01)
    except RuntimeError as error:
        result.write_text(worker_death(error))


def test_worker_that_dies(tree, tmp_path):
    """In a process of its own: torch raises wherever that process happens to be, in the loop's body or in
    next()."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=lose_a_worker, args=(tree, tmp_path / "result"))
    process.start()
    process.join(60)
    text = (tmp_path / "result").read_text()
    assert "a data worker died" in text and "--num-workers" in text and "\n" not in text
    assert worker_death(RuntimeError("CUDA error: something else")) is None


# ---------------------------------------------------------------- hostile files

def pixels_of(data, k=0):
    return data[k][0].permute(1, 2, 0).numpy()


def test_only_files_count(tree):
    """A FIFO would block for ever, a device never end; a loop of links would be walked until the system's
    limit."""
    os.mkfifo(tree / "a" / "pipe.png")
    (tree / "a" / "zero.png").symlink_to("/dev/zero")
    (tree / "a" / "linked.png").symlink_to(tree / "b" / "0.JPEG")
    (tree / "a" / "loop").symlink_to(tree)
    names = find_images(tree)
    assert "a/linked.png" in names and not {"a/pipe.png", "a/zero.png"} & set(names)
    assert not any("loop" in name for name in names)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "train/"])
def test_empty_class_folder_is_refused(tree, tmp_path, packed, prefix):
    """Left out it would shift the labels of all classes after it, unlike those of a whole copy."""
    (tree / "a1" / ".hidden").mkdir(parents=True)
    (tree / "a" / "empty").mkdir()  # within a class it says nothing
    if prefix:
        tree.rename(tmp_path / "train")
        (tmp_path / "images").mkdir()
        (tmp_path / "train").rename(tmp_path / "images" / "train")
    path = pack(tmp_path / "images", tmp_path / "x.zip") if packed else tmp_path / "images"
    with pytest.raises(ValueError) as error:
        ImageData(path, 16)
    one_line(error, prefix + "a1", "no images")
    assert len(find_images(path)) == 12  # where no labels are asked it does no harm


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "a//x.png", "a/./x.png"])
def test_names_that_lead_elsewhere_are_refused(tree, tmp_path, name):
    path = pack(tree, tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, (tree / "a" / "0.JPEG").read_bytes())
    with pytest.raises(ValueError) as error:
        find_images(path)
    one_line(error, path, name)


def test_zip_bomb(tree, tmp_path, monkeypatch):
    """Sizes are believed only as far as the limit, whether the directory tells the truth or not."""
    monkeypatch.setattr(data_module, "MAX_BYTES", 1 << 20)
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/big.png", bytes(3 << 20))
        archive.writestr("a/liar.png", bytes(3 << 20))
        archive.writestr("a/sound.jpg", (tree / "a" / "0.JPEG").read_bytes())
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"a/liar.png") - 46
    raw[at + 24:at + 28] = struct.pack("<I", 1000)  # its size in the directory
    path.write_bytes(raw)
    for name, words in (("a/big.png", "1 MiB"), ("a/liar.png", "size")):
        with pytest.raises(ImageError) as error:
            open_image(path, name)
        one_line(error, name, words)
    assert check_images(path, find_images(path)) == ["a/big.png", "a/liar.png"]
    assert ImageData(path, 16, skip_corrupt=True)[0][2] == 2
    (tree / "a" / "big.png").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ImageError) as error:
        open_image(tree, "a/big.png")
    one_line(error, "a/big.png", "1 MiB")


def png(width, height):
    """A PNG that declares this size and holds no pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("width, height", [(12_000, 12_000), (1 << 20, 1 << 20), (1, 101), (5000, 40)])
def test_image_bomb(tmp_path, width, height):
    """Both many pixels and a thin strip, which the crop would scale up to as many, are refused by what they
    declare."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(png(width, height))
    with pytest.raises(ImageError) as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            open_image(tmp_path, "c/x.png")
    one_line(error, "c/x.png", "pixels", "--skip-corrupt")


def test_postscript_is_never_run(tree, monkeypatch):
    """Pillow hands .eps to Ghostscript, an interpreter, whatever the file's ending is."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript",
                        lambda *a, **k: called.append(a) or Image.new("RGB", (9, 9)).im)
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"
    Image.open(io.BytesIO(text)).load()
    assert called  # the file is one that Pillow alone would have run
    called.clear()
    for name in ("a/1.jpg", "a/x.eps"):
        (tree / name).write_bytes(text)
        with pytest.raises(ImageError) as error:
            open_image(tree, name)
        one_line(error, name, "no image format")
    assert check_images(tree, find_images(tree)) == ["a/1.jpg", "a/x.eps"] and not called


@pytest.mark.parametrize("ending, mode",
                         [("png", "I;16"), ("pgm", "I;16"), ("tif", "I;16"), ("tif", "I;16B")])
def test_16_bit_images_are_scaled(tmp_path, ending, mode):
    """Pillow alone clips them to 255: white."""
    (tmp_path / "d" / "c").mkdir(parents=True)
    wide = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    data = wide.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    path = tmp_path / "d" / "c" / f"x.{ending}"
    if ending == "pgm":  # before 11.0 Pillow only reads them
        path.write_bytes(b"P5 8 8 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.frombytes(mode, (8, 8), data).save(path)
    assert np.array_equal(pixels_of(ImageData(tmp_path / "d", 8)), np.repeat(wide[..., None] >> 8, 3, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(tmp_path, dtype):
    (tmp_path / "c").mkdir()
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "c" / "x.tif")
    with pytest.raises(ImageError) as error:
        open_image(tmp_path, "c/x.tif")
    one_line(error, "c/x.tif", "8 or 16 bits")


def test_hdf5_is_answered(tmp_path):
    (tmp_path / "images.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError) as error:
        ImageData(tmp_path / "images.h5", 16)
    one_line(error, "images.h5", "HDF5", "pip install h5py && python -c")
    with pytest.raises(ValueError) as error:    # its --data-dir is the folder
        ImageData(tmp_path, 16)
    one_line(error, "HDF5", H5_ANSWER)


def test_hdf5_becomes_a_zip(tmp_path):
    """The line that the message and the README give makes a .zip with images and labels."""
    h5py = pytest.importorskip("h5py", reason="only this converter needs h5py")
    line = H5_ANSWER.split("python -c ")[1].strip('"')
    assert line in (Path(__file__).resolve().parents[1] / "README.md").read_text()
    with h5py.File(tmp_path / "images.h5", "w") as file:
        for k in range(4):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(buffer, "PNG")
            file[f"00000/img0000000{k}.png"] = np.frombuffer(buffer.getvalue(), np.uint8)
        file["dataset.json"] = json.dumps({"labels": [[f"00000/img0000000{k}.png", k % 2] for k in range(4)]})
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, check=True)
    data = ImageData(tmp_path / "images.zip", 16)
    assert [(int(data[k][0][0, 0, 0]), data[k][1]) for k in range(4)] == [(0, 0), (60, 1), (120, 0), (180, 1)]


# ---------------------------------------------------------------- looking at the files at the start

def test_progress_says_how_far_a_long_check_is(tree, monkeypatch):
    lines = []
    monkeypatch.setattr(data_module, "SAY_EVERY", 0.0)
    names = find_images(tree) * 300
    assert check_images(tree, names, say=lines.append) == []
    assert len(lines) >= 3 and "of 3,600" in lines[0] and "left" in lines[0]
    monkeypatch.undo()
    quiet = []
    check_images(tree, names, say=quiet.append)
    assert quiet == []  # a short one says nothing


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_make_the_whole(world):
    names = [f"{k}.png" for k in range(20)]
    assert sum((share(names, rank, world) for rank in range(world)), []) == names


def test_unreadable_file_is_no_bad_image(tree, monkeypatch):
    """It must stop the start by its name, not be counted among the files that are no images."""
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "a/0.JPEG")
    monkeypatch.setattr(data_module, "_read", refuse)
    with pytest.raises(PermissionError) as error:
        check_images(tree, ["a/0.JPEG"])
    one_line(error, "a/0.JPEG")


# ---------------------------------------------------------------- what a run was trained on

def test_identity(tree, tmp_path):
    folder, again = identity(ImageData(tree, 16)), identity(ImageData(tree, 32, hflip=True, seed=5))
    assert folder == again == json.loads(json.dumps(folder))
    assert folder["classes"] == ["a", "a-x", "b"] and folder["images"] == 12
    assert identity(ImageData(pack(tree, tmp_path / "x.zip"), 16)) == folder  # packing changes nothing
    assert check_same_data(folder, again, "run") == ""
    one = identity(ShapesData(100, 16, seed=0))
    assert identity(ShapesData(100, 16, seed=0)) == one != identity(ShapesData(100, 16, seed=1))


def test_a_class_that_went_is_refused_on_resume(tree):
    before = identity(ImageData(tree, 16))
    shutil.rmtree(tree / "a-x")
    with pytest.raises(ValueError) as error:
        check_same_data(before, identity(ImageData(tree, 16)), "exps/run")
    one_line(error, "exps/run", "class 1 was a-x and is now b", "another --exp-name")
    (tree / "c").mkdir()
    (tree / "a-x").mkdir()
    Image.new("RGB", (9, 9)).save(tree / "a-x" / "0.png")
    Image.new("RGB", (9, 9)).save(tree / "c" / "0.png")
    with pytest.raises(ValueError) as error:
        check_same_data(before, identity(ImageData(tree, 16)), "exps/run")
    one_line(error, "class 3 is now c", "3 classes before")


def test_a_file_that_went_or_changed_is_told_on_resume(tree):
    before = identity(ImageData(tree, 16))
    pixels = (tree / "a" / "0.JPEG").read_bytes()
    (tree / "a" / "0.JPEG").write_bytes((tree / "b" / "0.JPEG").read_bytes())
    assert "other files" in check_same_data(before, identity(ImageData(tree, 16)), "run")
    (tree / "a" / "0.JPEG").write_bytes(pixels)
    assert check_same_data(before, identity(ImageData(tree, 16)), "run") == ""
    (tree / "a" / "0.JPEG").unlink()
    assert "11 images, 12 before" in check_same_data(before, identity(ImageData(tree, 16)), "run")


# ---------------------------------------------------------------- EDM2's layout

def edm2(tree, path, packed, prefix="", classes=None, labels=None, **more):
    """The images of the tree under EDM2's names, in an order that is not the classes', with their labels in
    JSON."""
    data = ImageData(tree, 8)
    order = np.random.default_rng(0).permutation(len(data))
    names = [f"{k // 5:05d}/img{k:08d}{Path(data.names[i]).suffix}" for k, i in enumerate(order)]
    pairs = [[name, int(data.labels[i])] for name, i in zip(names, order)]
    content = {"labels": pairs if labels is None else labels(pairs)} | more
    if classes:
        content["classes"] = classes
    for name, i in zip(names, order):
        file = path / prefix / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / data.names[i], file)
    (path / prefix / "dataset.json").write_text(json.dumps(content))
    return (pack(path, path.with_suffix(".zip")) if packed else path), order


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "imagenet"])
def test_edm2_layout(tree, tmp_path, packed, prefix):
    plain = ImageData(tree, 16)
    path, order = edm2(tree, tmp_path / "edm2", packed, prefix)
    data = ImageData(path, 16)
    assert data.labels.tolist() == plain.labels[order].tolist() and data.classes == ["0", "1", "2"]
    for k, i in enumerate(order):
        assert torch.equal(data[k][0], plain[int(i)][0]) and data[k][1] == plain[int(i)][1]
    path, order = edm2(tree, tmp_path / "named", packed, prefix, classes=["a", "a-x", "b", "never seen"])
    assert ImageData(path, 16).classes == ["a", "a-x", "b", "never seen"]
    assert ImageData(path, 16).labels.tolist() == plain.labels[order].tolist()


def test_edm2_without_labels_is_one_class(tree, tmp_path):
    path, _ = edm2(tree, tmp_path / "edm2", False, labels=lambda pairs: None)
    data = ImageData(path, 16)
    assert data.num_classes == 1 and data.labels.tolist() == [0] * 12


@pytest.mark.parametrize("change, words", [
    (lambda pairs: pairs[1:], "00000/img00000000"),
    (lambda pairs: [[n, -1] for n, _ in pairs], "label -1"),
    (lambda pairs: [[n, True] for n, _ in pairs], "label True"),
    (lambda pairs: [[n, 10 ** 9] for n, _ in pairs], "label 1000000000"),
    (lambda pairs: [[n, [0.5, 0.5]] for n, _ in pairs], "label [0.5, 0.5]"),
    (lambda pairs: 7, "labels"),
    (lambda pairs: [3], "labels"),
])
def test_edm2_labels_that_are_none(tree, tmp_path, change, words):
    path, _ = edm2(tree, tmp_path / "edm2", False, labels=change)
    with pytest.raises(ValueError) as error:
        ImageData(path, 16)
    one_line(error, "dataset.json", words)


def test_edm2_odd_files(tree, tmp_path):
    path, _ = edm2(tree, tmp_path / "edm2", False)
    (path / "00000" / "notes.txt").write_text("no image and not listed")
    first = sorted(p for p in (path / "00001").iterdir())[0]
    first.unlink()  # listed, no longer there: labels do not move, so it is only missing
    assert first.relative_to(path).as_posix() not in ImageData(path, 16).names
    for text in ("{", "[]", '{"other": 1}', '{"labels": [], "classes": 3}'):
        (path / "dataset.json").write_text(text)
        with pytest.raises(ValueError) as error:
            ImageData(path, 16)
        one_line(error, "dataset.json")


def test_prepared_images_are_not_enlarged(tree, tmp_path):
    path, _ = edm2(tree, tmp_path / "edm2", False, prepared={"resolution": 32})
    assert ImageData(path, 32).num_classes == ImageData(path, 16).num_classes == 3
    with pytest.raises(ValueError) as error:
        ImageData(path, 64)
    one_line(error, "prepared at 32 pixels", "--resolution 64")


# ---------------------------------------------------------------- flips and shapes

@pytest.mark.parametrize("kind", ["files", "shapes"])
def test_flip_depends_on_seed_epoch_and_index_alone(tree, kind):
    def make(**options):
        return ImageData(tree, 16, **options) if kind == "files" else ShapesData(12, 16, **options)
    plain, flipped, again = make(seed=1), make(hflip=True, seed=1), make(hflip=True, seed=1)
    keys = [(epoch, index) for epoch in range(8) for index in range(12)]
    count = 0
    for key in keys[::-1]:
        a, b = plain[key][0], flipped[key][0]
        count += torch.equal(b, a.flip(-1))
        assert torch.equal(a, plain[key[1]][0]) and (torch.equal(b, a) or torch.equal(b, a.flip(-1)))
    assert all(torch.equal(again[key][0], flipped[key][0]) for key in keys)
    assert 25 < count < 71  # of 96, half


def test_shapes():
    data = ShapesData(200, 32, seed=3)
    assert len(data) == len(data.names) == 200 and data.num_classes == len(data.classes) == 10
    images = torch.stack([data[i][0] for i in range(200)])
    labels = [data[i][1] for i in range(200)]
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert labels == [i % 10 for i in range(200)] == data.labels.tolist()
    longer = ShapesData(1000, 32, seed=3)
    assert torch.equal(images, torch.stack([longer[i][0] for i in range(200)]))  # of the index alone
    assert len({image.numpy().tobytes() for image in images}) == 200
    assert not torch.equal(images[0], ShapesData(200, 32, seed=4)[0][0])
    with pytest.raises(IndexError):
        data[200]
    large = ShapesData(200, 64, seed=3)[7][0].float()
    small = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - images[7].float()).abs().mean() < 2  # the same picture at any size


def test_shapes_are_told_apart():
    """The most similar of the first 900 pictures has the class of nearly every one of the next 300."""
    data = ShapesData(1200, 32)
    x = torch.stack([data[i][0] for i in range(1200)]).float()
    x = (x - x[:, :, :1, :1]).abs().mean(1)  # what differs from the ground
    x = torch.nn.functional.avg_pool2d(x / x.amax((1, 2), keepdim=True), 2).flatten(1)
    right = torch.cdist(x[900:], x[:900]).argmin(1) % 10 == torch.arange(300) % 10
    assert right.float().mean() > 0.95


# ---------------------------------------------------------------- order

def take(steps, length=10, batch=4, **options):
    sampler = EndlessSampler(length, batch, **options)
    flat = list(islice(sampler, steps * sampler.share))
    return [flat[i:i + sampler.share] for i in range(0, len(flat), sampler.share)]


def test_every_image_once_per_epoch():
    flat = sum(take(25), [])
    for epoch in range(10):
        assert [e for e, _ in flat[10 * epoch:10 * epoch + 10]] == [epoch] * 10
        assert sorted(i for _, i in flat[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert [i for _, i in flat[:10]] not in ([i for _, i in flat[10:20]], list(range(10)))
    assert take(25) == take(25) != take(25, seed=1)
    assert len(take(2, length=3, batch=8)[0]) == 8  # a batch may be larger than the data


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_same_global_batches(world):
    shares = [take(20, rank=rank, world_size=world) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*shares)] == take(20)


@pytest.mark.parametrize("start", [1, 2, 3, 17])
def test_resume(start):
    for rank in range(2):
        whole = take(5 + start, rank=rank, world_size=2)
        assert take(5, rank=rank, world_size=2, start_step=start) == whole[start:]
    assert len(take(2, length=1_300_000, batch=256, start_step=400_000)[1]) == 256  # without walking there


@pytest.mark.parametrize("before, after", [(4, 2), (1, 3), (2, 6)])
def test_another_number_of_processes_on_resume(before, after, length=50, batch=12, stop=3):
    """Within an epoch that two sets of processes share, every image still comes exactly once."""
    def all_ranks(world, start):
        shares = (take(stop, length, batch, rank=r, world_size=world, start_step=start) for r in range(world))
        return sum(sum(shares, []), [])
    seen = sorted(all_ranks(before, 0) + all_ranks(after, stop))
    assert [i for e, i in seen if e == 0] == list(range(length))
    assert seen == sorted(sum(take(2 * stop, length, batch), []))


def test_batch_must_divide():
    with pytest.raises(ValueError) as error:
        EndlessSampler(10, 6, 0, 4)
    one_line(error, "--batch-size 6", "4 processes")


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(tree, tmp_path, workers):
    data = ImageData(pack(tree, tmp_path / "x.zip"), 16, hflip=True)
    keys = take(6, length=len(data), batch=6)
    loader = make_loader(data, EndlessSampler(len(data), 6), batch_size=3, num_workers=workers)
    batches = list(islice(loader, 12))  # two accumulation steps to a global batch
    assert [tuple(part.shape) for part in batches[0]] == [(3, 3, 16, 16), (3,), (3,)]
    expected = [data[key] for key in sum(keys, [])]
    images = torch.cat([batch[0] for batch in batches])
    assert torch.equal(images, torch.stack([item[0] for item in expected]))
    assert torch.cat([batch[1] for batch in batches]).tolist() == [item[1] for item in expected]
    assert sum(int(batch[2].sum()) for batch in batches) == 0


class Threads(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, key):
        return torch.get_num_threads()


def test_workers_use_one_thread_each():
    assert next(iter(make_loader(Threads(), EndlessSampler(4, 4), 4, num_workers=1))).tolist() == [1] * 4


def test_zip_of_many_members_is_read_by_its_own_headers(tmp_path):
    """Members with extra fields and long names: the local header, not the directory's, says where the data
    begins."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(3):
            info = zipfile.ZipInfo("c/" + "n" * 100 * (k + 1) + ".png")
            info.extra = struct.pack("<HH8s", 0x9999, 8, b"whatever")
            Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / "one.png")
            archive.writestr(info, (tmp_path / "one.png").read_bytes())
    assert sorted(int(ImageData(path, 4)[k][0][0, 0, 0]) for k in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("names, classes", [
    (["a/x.png", "b/x.png"], ["a", "b"]),
    (["one/x.png", "one/y.png"], ["one"]),
    (["train/a/x.png", "train/b/x.png", "train/map.txt"], ["a", "b"]),  # one folder around the class folders
    (["a/x/1.png", "a/y/2.png", "b/x/3.png"], ["a", "b"]),  # folders within a class
    (["a/1.png", "a/y/2.png"], ["a"]),
])
def test_class_folders(tmp_path, names, classes):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("only the name counts here")
    data = ImageData(tmp_path, 8)
    assert data.classes == classes and data.names == sorted(name for name in names if name.endswith(".png"))
