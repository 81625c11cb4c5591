"""models/runtime/data.py: folder, .zip, EDM2's layout and .npz alike, ADM's crop, the drawn shapes, the order
and its resume, user errors."""
import io
import json
import os
import shutil
import traceback
import warnings
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.runtime import files
from models.runtime.data import (EndlessSampler, ImageData, ImageError, ShapesData, center_crop,
                                 evenly_spaced, flips, identity, make_loader, open_images)


@pytest.fixture
def tree(tmp_path):
    """Three classes of four photos each, of several formats and modes, and files that lie beside such."""
    random = np.random.default_rng(0)
    for c in ("a-x", "a", "b"):
        (tmp_path / "images" / c).mkdir(parents=True)
        for k, (mode, ending) in enumerate((("RGB", "JPEG"), ("L", "jpg"), ("RGBA", "png"), ("CMYK", "jpg"))):
            pixels = random.integers(0, 256, (40 + 9 * k, 70 - 9 * k, len(mode)), dtype=np.uint8).squeeze()
            image = Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())
            image.save(tmp_path / "images" / c / f"{k}.{ending}")
    for name in ("README.txt", "a/.DS_Store", "a/._0.JPEG", "a/Thumbs.db", "b/caption.txt"):
        (tmp_path / "images" / name).write_text("not data")
    return tmp_path / "images"


def pack(tree, path, method=zipfile.ZIP_STORED, prefix=""):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(tree.rglob("*"), reverse=True):  # the order inside must not matter
            name = prefix + str(file.relative_to(tree)) + "/" * file.is_dir()
            archive.writestr(zipfile.ZipInfo(name), b"" if file.is_dir() else file.read_bytes(), method)
    return path


def rejected(path, *words, error=ValueError, **options):
    """open_images(path), or where that passes its first image, raises an error of one line with the words."""
    with pytest.raises(error) as caught:
        open_images(path, **{"resolution": 16} | options)[0]
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


# ---------------------------------------------------------------- folders and .zips

@pytest.mark.parametrize("method, prefix", [(zipfile.ZIP_STORED, ""), (zipfile.ZIP_DEFLATED, "train/")])
def test_zip_equals_folder(tree, tmp_path, method, prefix):
    archive = pack(tree, tmp_path / "images.zip", method, prefix)
    one, two = open_images(tree, 16), open_images(archive, 16)
    assert [prefix + name for name in one.names] == two.names
    assert one.classes == two.classes == ["a", "a-x", "b"] and one.num_classes == 3 and one.size == (16, 16)
    assert len(one) == len(two) == 12 and list(one.labels) == list(two.labels)
    for a, b in zip(one, two):
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
        assert a[0].shape == (3, 16, 16) and a[0].dtype == torch.uint8


def test_labels_are_those_of_torchvision(tree):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(tree)
    data = ImageData(tree, 16)
    assert data.classes == folder.classes
    expected = {os.path.relpath(path, tree): label for path, label in folder.samples if "/._" not in path}
    assert dict(zip(data.names, data.labels.tolist())) == expected


def test_pixels_are_the_files_pixels(tmp_path):
    """Row 0 is the top, channel 0 is red, nothing is scaled where the size fits already."""
    (tmp_path / "d" / "c").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "d" / "c" / "x.png")
    for resolution in (8, None):
        assert np.array_equal(ImageData(tmp_path / "d", resolution)[0][0].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("width, height", [(500, 375), (63, 200), (129, 128)])
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


def test_images_as_they_are(tmp_path):
    """Without a resolution: all of one size, or an error that names two; (H, W) are known at once."""
    for k, size in enumerate(((9, 8), (9, 8), (8, 9))):
        Image.new("RGB", size).save(tmp_path / f"{k}.png")
    data = open_images(tmp_path, labelled=False)
    assert data.size == (8, 9) and data[1][0].shape == (3, 8, 9)
    with pytest.raises(ValueError, match=r"0\.png is 9x8, 2\.png is 8x9; pass --resolution"):
        data[2]


def test_what_is_not_a_set_of_images(tree, tmp_path):
    rejected(tmp_path / "nowhere", "nowhere: no such folder or .zip", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    rejected(tmp_path / "empty", "empty: has no images")
    rejected(tree / "README.txt", "README.txt: neither a folder nor a whole .zip")
    whole = pack(tree, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[:len(whole) // 2])
    rejected(tmp_path / "half.zip", "half.zip: neither a folder nor a whole .zip")


@pytest.mark.parametrize("names, classes", [
    (["one/x.png", "one/y.png"], ["one"]),
    (["train/a/x.png", "train/b/x.png"], ["a", "b"]),  # one folder around the class folders
    (["a/x/1.png", "a/y/2.png", "b/x/3.png"], ["a", "b"]),  # folders within a class
    (["lake/1.png", "train_station/1.png", "valley/1.png"], ["lake", "train_station", "valley"]),
])
def test_class_folders(tmp_path, names, classes):
    data = ImageData(images(tmp_path, *names), 8)
    assert data.classes == classes and data.names == sorted(names)


@pytest.mark.parametrize("names, train", [
    (["train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png"], "train"),
    (["x/Training/1.png", "x/Testing/2.png"], "x/Training"),
    (["fold0/a/1.png", "fold0/b/1.png", "fold1/a/1.png", "fold1/b/1.png", "more/1.png"], "fold0"),
])
def test_splits_are_not_classes(tmp_path, names, train):
    """data/imagenet instead of data/imagenet/train would train on two classes, and on val's images."""
    rejected(images(tmp_path / "d", *names), "look like splits", f"--data-dir {tmp_path}/d/{train}")


def test_images_outside_class_folders(tree):
    images(tree, "loose.png")
    rejected(tree, "loose.png lies in no class folder")
    assert "loose.png" in open_images(tree, 8, labelled=False).names
    shutil.rmtree(tree / "a")
    for name in ("a-x", "b"):
        shutil.rmtree(tree / name)
    assert open_images(tree, 8, labelled=False).classes == [""]     # a flat folder


def test_empty_class_folder_is_an_error(tree, tmp_path):
    """Left out it would shift the labels of all classes after it, unlike those of a whole copy."""
    (tree / "a1").mkdir()
    (tree / "a" / "empty").mkdir()  # within a class it says nothing
    for path in (tree, pack(tree, tmp_path / "x.zip")):
        rejected(path, "a1", "no images")
        assert len(open_images(path, 8, labelled=False)) == 12


def test_linked_folders(tree):
    (tree / "a" / "linked").symlink_to(tree / "b")
    (tree / "b" / "back").symlink_to(tree / "a")
    names = ImageData(tree, 16).names
    assert "a/linked/0.JPEG" in names and len(names) == 12 + 8


# ---------------------------------------------------------------- corrupt and hostile files

def test_corrupt_files_are_named_or_skipped(tree):
    (tree / "a" / "1.jpg").write_text("<html>404</html>")
    (tree / "a" / "2.png").write_bytes(b"")
    whole = (tree / "b" / "3.jpg").read_bytes()
    (tree / "b" / "3.jpg").write_bytes(whole[:len(whole) // 2])
    data, skipping = ImageData(tree, 16), ImageData(tree, 16, skip_corrupt=True)
    for name in ("a/1.jpg", "a/2.png", "b/3.jpg"):
        with pytest.raises(ImageError, match=f"{name}: not a readable image; remove it"):
            data[data.names.index(name)]
    with pytest.warns(UserWarning, match="skipped .*b/3.jpg"):
        assert torch.equal(skipping[11][0], data[0][0])  # after the last comes the first
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            image, label = skipping[5]
            assert torch.equal(image, data[7][0]) and label == data.labels[7]
    assert len(caught) == 2     # one per file


def test_corrupt_file_is_one_line_out_of_a_worker(tree):
    (tree / "b" / "0.JPEG").write_text("<html>404</html>")
    data = ImageData(tree, 16)
    with pytest.raises(ImageError) as error:
        list(islice(make_loader(data, EndlessSampler(len(data), 4), 4, 1), 3))
    assert str(error.value).startswith(f"{tree}/b/0.JPEG: not a readable") and "\n" not in str(error.value)
    traceback.clear_frames(error.tb)    # ends the worker


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow hands .eps to Ghostscript, an interpreter, whatever the file's ending is."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript",
                        lambda *a, **k: called.append(a) or Image.new("RGB", (9, 9)).im)
    Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert called  # the file is one that Pillow alone would have run
    called.clear()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(POSTSCRIPT)
    rejected(tmp_path, "c/x.png", "not a readable image", error=ImageError)
    assert not called


def test_16_bit_images_are_scaled(tmp_path):
    """Pillow alone clips them to 255: white."""
    (tmp_path / "d" / "c").mkdir(parents=True)
    wide = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "d" / "c" / "x.png")
    found = ImageData(tmp_path / "d", 8)[0][0]
    assert np.array_equal(found.permute(1, 2, 0), np.repeat(wide[..., None] >> 8, 3, 2))


# ---------------------------------------------------------------- EDM2's layout

def edm2(tree, path, packed=False, prefix="", change=lambda pairs: pairs):
    """The images of the tree under EDM2's names, in an order that is not the classes', with their labels."""
    data = ImageData(tree, 8)
    order = np.random.default_rng(0).permutation(len(data))
    names = [f"{k // 5:05d}/img{k:08d}{Path(data.names[i]).suffix}" for k, i in enumerate(order)]
    for name, i in zip(names, order):
        (path / prefix / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / data.names[i], path / prefix / name)
    pairs = change([[name, int(data.labels[i])] for name, i in zip(names, order)])
    (path / prefix / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return (pack(path, path.with_suffix(".zip")) if packed else path), order


@pytest.mark.parametrize("packed, prefix", [(False, ""), (True, "imagenet")])
def test_edm2_layout(tree, tmp_path, packed, prefix):
    plain = ImageData(tree, 16)
    path, order = edm2(tree, tmp_path / "edm2", packed, prefix)
    data = ImageData(path, 16)
    assert data.labels.tolist() == plain.labels[order].tolist() and data.classes == ["0", "1", "2"]
    assert all(torch.equal(data[k][0], plain[int(i)][0]) for k, i in enumerate(order))
    path, _ = edm2(tree, tmp_path / "unlabelled", packed, prefix, lambda pairs: None)
    assert ImageData(path, 16).num_classes == 1


@pytest.mark.parametrize("change, words", [
    (lambda pairs: pairs[1:], "img00000000.jpg"),
    (lambda pairs: [[n, 0.5] for n, _ in pairs], "whole number"),
    (lambda pairs: 7, "EDM2's layout"),
])
def test_edm2_labels_that_do_not_fit(tree, tmp_path, change, words):
    path, _ = edm2(tree, tmp_path / "edm2", change=change)
    rejected(path, "dataset.json", words)


# ---------------------------------------------------------------- .npz

def pixels(count=6, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["compressed", "ours"])
def test_npz(tmp_path, kind):
    path, rows, labels = str(tmp_path / "x.npz"), pixels(), np.array([2, 0, 1, 2, 0, 1])
    arrays = dict(arr_1=labels, mu=np.arange(3.0), protocol=json.dumps({"mode": "sde"}))
    if kind == "ours":
        files.write_npz(path, [rows], rows.shape, **arrays)
    else:
        np.savez_compressed(path, rows, **arrays)
    data = open_images(path, 8, hflip=True, seed=1)
    assert isinstance(data.images, np.memmap) == (kind != "compressed")
    assert data.labels.tolist() == labels.tolist() and data.classes == ["0", "1", "2"] and data.size == (8, 8)
    for k in range(6):
        image, label = data[2, k]
        flip = flips(1, 2, k)
        assert np.array_equal(image.permute(1, 2, 0), rows[k][:, ::-1] if flip else rows[k])
        assert label == labels[k]
    assert data.array("mu").tolist() == [0, 1, 2] and data.array("gone") is None
    assert data.protocol == {"mode": "sde"}
    assert open_images(path, 4)[0][0].shape == (3, 4, 4)


def test_npz_without_labels_or_images(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pixels(), arr_1=np.arange(3))
    rejected(path, "x.npz: has no labels (arr_1, 6 integers from 0 on)")
    data = open_images(path, labelled=False)
    assert data.labels.tolist() == [0] * 6 and data.num_classes == 1 and data.protocol == {}
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert len(open_images(path, labelled=False)) == 0
    np.savez(path, images=pixels())
    rejected(path, "x.npz", "arr_0")


def header(shape, descr="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


@pytest.mark.parametrize("member, message", [
    (header((9, 8, 8, 3)) + bytes(8 * 192), "ends early"),
    (header((4, 8, 8, 3), "|O") + b"cos\nsystem\n", "arr_0 is object"),
    (b"\x93NUMPY\1\0\4\0((((", "write it again"),
])
def test_hostile_npz(tmp_path, member, message):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", member)
    rejected(tmp_path / "x.npz", "x.npz", message, labelled=False)


# ---------------------------------------------------------------- what a run was trained on

def test_identity(tree, tmp_path):
    folder, again = identity(ImageData(tree, 16)), identity(ImageData(tree, 32, hflip=True, seed=5))
    assert folder == again == json.loads(json.dumps(folder))
    assert folder["classes"] == ["a", "a-x", "b"] and folder["images"] == 12
    assert identity(ImageData(pack(tree, tmp_path / "x.zip"), 16)) == folder  # packing changes nothing
    assert identity(ShapesData(100, 16, seed=0)) != identity(ShapesData(100, 16, seed=1))
    old = identity(ShapesData(100, 16, seed=0))     # as checkpoints contain it
    assert (old["labels"][:12], old["files"][:12]) == ("a1a25ef3c369", "8adb1a3e7a6e")
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9] and evenly_spaced(3, 8).tolist() == [0, 1, 2]


# ---------------------------------------------------------------- flips and shapes

def test_flip_depends_on_seed_epoch_and_index_alone(tree):
    keys = [(epoch, index) for epoch in range(8) for index in range(12)]
    assert 25 < sum(flips(1, *key) for key in keys) < 71     # of 96, half
    for data, plain in ((ImageData(tree, 16, hflip=True, seed=1), ImageData(tree, 16)),
                        (ShapesData(12, 16, hflip=True, seed=1), ShapesData(12, 16, seed=1))):
        for epoch, index in keys[::-1]:
            image = plain[index][0]
            assert torch.equal(data[epoch, index][0], image.flip(-1) if flips(1, epoch, index) else image)


def test_shapes():
    data = ShapesData(200, 32, seed=3)
    assert len(data) == len(data.names) == 200 and data.num_classes == len(data.classes) == 10
    images = torch.stack([data[i][0] for i in range(200)])
    labels = [data[i][1] for i in range(200)]
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert labels == [i % 10 for i in range(200)] == data.labels.tolist()
    longer = open_images("shapes", seed=3)
    assert torch.equal(images, torch.stack([longer[i][0] for i in range(200)]))  # of the index alone
    assert len({image.numpy().tobytes() for image in images}) == 200
    assert not torch.equal(images[0], ShapesData(200, 32, seed=4)[0][0])
    with pytest.raises(IndexError):
        data[200]
    large = ShapesData(200, 64, seed=3)[7][0].float()
    small = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - images[7].float()).abs().mean() < 2  # the same picture at any size


# ---------------------------------------------------------------- order and loading

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


def test_processes_share_the_same_global_batches():
    shares = [take(20, rank=rank, world_size=2) for rank in range(2)]
    assert [sum(parts, []) for parts in zip(*shares)] == take(20)


def test_resume():
    for start in (1, 17):
        whole = take(5 + start, rank=1, world_size=2)
        assert take(5, rank=1, world_size=2, start_step=start) == whole[start:]
    assert len(take(2, length=1_300_000, batch=256, start_step=400_000)[1]) == 256  # without walking there


def test_loader(tree, tmp_path):
    """From a .zip, which each worker opens for itself."""
    data = ImageData(pack(tree, tmp_path / "x.zip"), 16, hflip=True)
    keys = take(6, length=len(data), batch=6)
    loader = make_loader(data, EndlessSampler(len(data), 6), batch_size=3, num_workers=2)
    batches = list(islice(loader, 12))  # two accumulation steps to a global batch
    assert [tuple(part.shape) for part in batches[0]] == [(3, 3, 16, 16), (3,)]
    expected = [data[key] for key in sum(keys, [])]
    assert torch.equal(torch.cat([b[0] for b in batches]), torch.stack([item[0] for item in expected]))
    assert torch.cat([b[1] for b in batches]).tolist() == [item[1] for item in expected]
