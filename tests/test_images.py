"""models/runtime/images.py: one reader and one writer a format; what is damaged or hostile is one line."""
import errno
import io
import json
import os
import resource
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from models.runtime import images


def pictures(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def rewrite(path, change):
    """The .npz `path` with its members {name: bytes} after change(members), each with a CRC that fits."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


# ---------------------------------------------------------------- .npz

def test_written_and_read(tmp_path):
    data, path = pictures(10), str(tmp_path / "a.npz")
    mu = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    images.write_npz(path, [data[:3], data[3:4], data[4:]], data.shape, arr_1=np.arange(10), text="xyz",
                     mu2=mu)
    with np.load(path, allow_pickle=False) as content:
        assert content.files == ["arr_0", "arr_1", "text", "mu2"]
        assert np.array_equal(content["arr_0"], data) and np.array_equal(content["mu2"], mu)
    found = images.open_npz(path)
    assert (found.count, found.size, found.protocol, found.statistics) == (10, (8, 8), None, {})
    assert np.array_equal(found.array("mu2"),
                          mu) and str(found.array("text")) == "xyz" and found.array("gone") is None
    assert np.array_equal(np.concatenate(list(found.read(4))), data)
    assert np.array_equal(np.concatenate(list(found.read(4, 1, 2))), data[4:8])
    assert np.array_equal(np.concatenate(list(found.read(2, rows=[0, 1, 5, 7, 8]))), data[[0, 1, 5, 7, 8]])
    first = (tmp_path / "a.npz").read_bytes()
    images.write_npz(path, iter([data]), data.shape, arr_1=np.arange(10), text="xyz", mu2=mu)
    assert (tmp_path / "a.npz").read_bytes() == first  # no date, no order of writing


@pytest.mark.parametrize("rows, message", [
    ([pictures(3)], "3 images instead of 4"), ([pictures(4).astype(float)], "float64"),
    ([pictures(4, 9)], "9, 9, 3")])
def test_rows_that_do_not_fit_leave_no_file(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        images.write_npz(str(tmp_path / "a.npz"), rows, (4, 8, 8, 3))
    with pytest.raises(ValueError, match="allow_pickle"):
        images.write_npz(str(tmp_path / "a.npz"), [pictures(4)], (4, 8, 8, 3), x=np.array([None]))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_is_no_file(tmp_path, monkeypatch):
    """A disk that keeps other bytes than it was given is found before the file gets its name."""
    path, data = tmp_path / "a.npz", pictures(4)
    images.write_npz(str(path), [data], data.shape)
    before = path.read_bytes()
    write = np.lib.format.write_array

    def broken(file, value, **more):
        write(file, value, **more)
        file._crc ^= 1  # as if one bit of the member had changed on its way
    monkeypatch.setattr(np.lib.format, "write_array", broken)
    with pytest.raises(OSError, match="reads back differently"):
        images.write_npz(str(path), [data], data.shape, arr_1=np.arange(4))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def header(shape, descr="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


HOSTILE = {
    "promises more than there is": (lambda m: m.update({"arr_0.npy": header((9, 8, 8, 3)) + bytes(8 * 192)}),
                                    "ends early"),
    "promises terabytes": (lambda m: m.update({"arr_0.npy": header((1 << 40, 8, 8, 3))}), "ends early"),
    "negative": (lambda m: m.update({"arr_0.npy": header((-1, -8, 8, 3)) + bytes(192)}), "ends early"),
    "huge images": (lambda m: m.update({"arr_0.npy": header((1, 4097, 4096, 3)) + bytes(4097 * 4096 * 3)}),
                    "pixels"),
    "header is no header": (lambda m: m.update({"arr_0.npy": b"\x93NUMPY\1\0\4\0(((("}), "empty, truncated"),
    "version 9": (lambda m: m.update({"arr_0.npy": b"\x93NUMPY\x09\0" + bytes(99)}), "empty, truncated"),
    "no array": (lambda m: m.update({"arr_0.npy": b""}), "empty, truncated"),
    "pickle": (lambda m: m.update({"arr_0.npy": header((4,), "|O") + b"c"}), "pickled"),
    "statistics of terabytes": (lambda m: [m.update({f"{k}.npy": header((1 << 40,), "<f8")})
                                           for k in images.STATISTICS],
                                "statistics cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_npz(tmp_path, name):
    change, message = HOSTILE[name]
    path = str(tmp_path / "a.npz")
    images.write_npz(path, [pictures(8)], (8, 8, 8, 3))
    rewrite(path, change)
    with pytest.raises(images.InputError) as error:
        images.open_npz(path)
    assert message in one_line(error) and path in str(error.value)


def test_other_arrays_are_looked_at_before_memory_is_taken(tmp_path):
    path = str(tmp_path / "a.npz")
    images.write_npz(path, [pictures(4)], (4, 8, 8, 3), arr_1=np.zeros(4))
    rewrite(path, lambda m: m.update({"arr_1.npy": header((1 << 40,), "<f8")}))
    with pytest.raises(images.InputError, match="arr_1 ends early"):
        images.open_npz(path).array("arr_1")
    for text in ("[1, 2]", "{", "[" * 100_000):
        rewrite(path, lambda m: m.pop("protocol.npy", None))
        images.write_npz(path, [pictures(4)], (4, 8, 8, 3), protocol=text)
        assert images.open_npz(path).protocol is None


def test_mutated_npz_are_one_line_or_the_same_images(tmp_path):
    """Cut, flipped and spliced copies of a sound file: InputError, or the right images; nothing else."""
    data, path = pictures(6), tmp_path / "a.npz"
    images.write_npz(str(path), [data], data.shape, protocol=json.dumps({"mode": "sde"}))
    whole, random, outcomes = path.read_bytes(), np.random.default_rng(0), {"refused": 0, "same": 0}
    for number in range(300):
        mutated = bytearray(whole)
        kind = number % 3
        if kind == 0:
            del mutated[random.integers(len(whole)):]
        elif kind == 1:  # mostly in what is not pixels
            for at in random.integers(0, len(whole),
                                      3) if number % 2 else len(whole) - random.integers(1, 600, 3):
                mutated[at] = random.integers(256)
        else:
            a, b = sorted(random.integers(0, len(whole), 2))
            del mutated[a:b]
        path.write_bytes(mutated)
        try:
            found = images.open_npz(str(path))
            read = np.concatenate(list(found.read(4)))
            found.array("protocol")
            assert np.array_equal(read, data)
            outcomes["same"] += 1
        except images.InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 200 and outcomes["same"] > 0


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    path = str(tmp_path / "a.npz")
    images.write_npz(path, [pictures(4)], (4, 8, 8, 3))
    real = zipfile.ZipFile

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError):
        images.open_npz(path)
    monkeypatch.setattr(zipfile, "ZipFile", real)
    found = images.open_npz(path)
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError):
        next(found.read(4))


# ---------------------------------------------------------------- folders, pictures

def test_folders(tmp_path):
    data = pictures(5, 16)
    images.write_pngs(str(tmp_path / "a"), iter([data[:2], data[2:]]))
    found = images.open_input(str(tmp_path / "a"))
    assert found.names == [f"{i:06d}.png"
                           for i in range(5)] and found.size == (16, 16) and found.converted == 0
    assert np.array_equal(np.concatenate(list(found.read(2))), data)
    assert np.array_equal(np.concatenate(list(found.read(2, 1, 2, rows=[0, 2, 3, 4]))), data[[3, 4]])
    # a PNG whose header declares 20 gigapixels
    picture = (tmp_path / "a" / "000003.png").read_bytes()
    bomb = b"IHDR" + (1 << 17).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    bomb += zlib.crc32(bomb).to_bytes(4, "big")
    (tmp_path / "a" / "000003.png").write_bytes(picture[:12] + bomb + picture[33:])
    with pytest.raises(images.InputError) as error:
        images.open_input(str(tmp_path / "a"))
    assert "000003.png" in one_line(error)
    for name in os.listdir(tmp_path / "a"):
        os.remove(tmp_path / "a" / name)
    for i in range(4):
        Image.new("L", (4200, 4100)).save(tmp_path / "a" / f"{i}.png")
    with pytest.raises(images.InputError, match="4200x4100, above 16 Mi pixels.*--resolution"):
        images.open_input(str(tmp_path / "a"))


def test_evenly_spaced():
    assert images.evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert images.evenly_spaced(3, 8).tolist() == [0, 1, 2]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """RLIMIT_FSIZE is the nearest thing to a full disk that a test may have: the write fails half-way."""
    path, data = tmp_path / "a.npz", pictures(200, 16)
    images.write_npz(str(path), [data[:4]], (4, 16, 16, 3))
    images.write_png(str(tmp_path / "a.png"), data[0])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError):
            images.write_npz(str(path), [data], data.shape)
        with pytest.raises(OSError):
            images.write_png(str(tmp_path / "a.png"), np.concatenate(list(data)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
