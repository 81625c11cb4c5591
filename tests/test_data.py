"""models/runtime/data.py: folder and .zip read alike, ADM's crop, the drawn shapes, the order and its resume, user errors."""

import os
import shutil
import struct
import sys
import traceback
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.runtime.data import (EndlessSampler, ImageData, ShapesData, center_crop, check_images, find_images, make_loader,
                         open_image)


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
@pytest.mark.parametrize("prefix", ["", "train/", "./"])
def test_zip_equals_folder(tree, tmp_path, method, prefix):
    archive = pack(tree, tmp_path / "images.zip", method, prefix)
    one, two = ImageData(tree, 16), ImageData(archive, 16)
    assert [prefix + name for name in one.names] == two.names
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
    """The tree with three files that are no images (by their first bytes) and one cut short (decoding tells)."""
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


def test_missing_file_is_no_damaged_file(tree):
    """A file that went away, or a disk that fails, must not be skipped over as a damaged image is."""
    data = ImageData(tree, 16, skip_corrupt=True)
    (tree / data.names[0]).unlink()
    with pytest.raises(FileNotFoundError):
        data[0]


def test_worker_names_the_damaged_file_in_one_line(damaged):
    data = ImageData(damaged, 16)
    with pytest.raises(ValueError) as error:
        for _ in islice(make_loader(data, EndlessSampler(len(data), 4), 4, num_workers=1), 8):
            pass
    one_line(error, "not a readable image", "--skip-corrupt")
    assert str(error.value).startswith(str(damaged))
    traceback.clear_frames(error.tb)  # they keep the loader alive in a cycle, and its workers take seconds to end then


def test_skip_corrupt(damaged):
    data = ImageData(damaged, 16, skip_corrupt=True)
    at = data.names.index("a/1.jpg")
    image, label, skipped = data[at]  # the next, a/2.png, is empty too: a/3.jpg stands in
    assert skipped == 2 and label == 0
    assert torch.equal(image, data[at + 2][0]) and data[at + 2][2] == 0
    last = data.names.index("b/notes.txt")
    assert last == len(data) - 1 and torch.equal(data[last][0], data[0][0])  # round to the first
    assert data[last][1:] == (data[0][1], 1)  # with the label of what is shown
    batches = {workers: [batch for batch in islice(make_loader(data, EndlessSampler(len(data), 4), 4, workers), 8)]
               for workers in (0, 2)}
    for one, two in zip(*batches.values()):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert sum(int(batch[2].sum()) for batch in batches[2]) > 0


def test_nothing_readable(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_text("no")
    with pytest.raises(ValueError) as error:
        ImageData(tmp_path, 16, skip_corrupt=True)[0]
    one_line(error, "none of its 1 files")


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
        assert take(5, rank=rank, world_size=2, start_step=start) == take(5 + start, rank=rank, world_size=2)[start:]
    assert len(take(2, length=1_300_000, batch=256, start_step=400_000)[1]) == 256  # without walking there


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
    assert torch.equal(torch.cat([batch[0] for batch in batches]), torch.stack([item[0] for item in expected]))
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
    """Members with extra fields and long names: the local header, not the directory's, says where the data begins."""
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
