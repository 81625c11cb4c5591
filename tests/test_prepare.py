"""models/runtime/prepare.py: pixels, labels and order of the source in EDM2's layout, the same bytes after
any kill."""
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.runtime import prepare as module
from models.runtime.data import ImageData
from models.runtime.prepare import main, prepare


@pytest.fixture
def tree(tmp_path):
    """Three classes of 13 noisy photos each, of different sizes and formats."""
    draws = np.random.default_rng(0)
    for name in ("fish", "bird 2", "ant"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(13):
            pixels = draws.integers(0, 256, (33 + k, 70 - k, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.{('png', 'JPEG')[k % 2]}")
    return tmp_path / "photos"


def same_data(one, two):
    assert one.classes == two.classes and one.labels.tolist() == two.labels.tolist()
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[0], b[0]) and a[1:] == b[1:]


def fails(capsys, arguments, *words, code=2):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    line = capsys.readouterr().err
    assert end.value.code == code and line.count("\n") == 1 and all(str(word) in line for word in words), line


def run_apart(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("resolution", [32, 20])
def test_training_sees_the_same(tree, tmp_path, resolution):
    out = tmp_path / "sub" / "out.zip"
    main([str(tree), str(out), "--resolution", str(resolution), "--num-workers", "0"])
    same_data(ImageData(tree, resolution), ImageData(out, resolution))
    assert os.listdir(tmp_path / "sub") == ["out.zip"]  # neither part nor journal


def test_layout_is_edm2s(tree, tmp_path):
    """Read as EDM2 reads it: images by their sorted names, labels by a dict of them."""
    out = tmp_path / "out.zip"
    prepare(ImageData(tree, 16), out)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        assert names == [f"00000/img{k:08d}.png" for k in range(39)]
        content = json.loads(archive.read("dataset.json"))
        labels = dict(content["labels"])
        assert [labels[name] for name in names] == ImageData(tree, 16).labels.tolist()
        assert content["classes"] == ["ant", "bird 2", "fish"]
        with archive.open(names[5]) as file, Image.open(file) as image:
            assert image.format == "PNG" and image.mode == "RGB" and image.size == (16, 16)
    assert module.image_name(1_281_166) == "01281/img01281166.png"


def test_sources(tree, tmp_path):
    """A .zip of the folder, and what was prepared already, give the same bytes but for what they say of the
    source."""
    folder = ImageData(tree, 24)
    shutil.make_archive(tmp_path / "photos", "zip", tree)
    prepare(ImageData(tmp_path / "photos.zip", 24), tmp_path / "a.zip")
    prepare(ImageData(tmp_path / "a.zip", 24), tmp_path / "b.zip")
    for name in ("a.zip", "b.zip"):
        same_data(folder, ImageData(tmp_path / name, 24))
    prepare(folder, tmp_path / "c.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()


def test_folder_without_classes(tree, tmp_path):
    main([str(tree / "fish"), str(tmp_path / "out.zip"), "--resolution", "16", "--num-workers", "0"])
    data = ImageData(tmp_path / "out.zip", 16)
    assert data.labels.tolist() == [0] * 13 and data.num_classes == 1 and not data.labelled
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["labels"] is None
    one = ImageData(tree / "fish", 16, unlabelled=True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, data, strict=True))


def test_number_of_processes_does_not_matter(tree, tmp_path):
    for workers in (0, 1, 2):
        prepare(ImageData(tree, 16), tmp_path / f"{workers}.zip", workers)
    assert len({(tmp_path / f"{workers}.zip").read_bytes() for workers in (0, 1, 2)}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(tree, tmp_path, monkeypatch, workers, kills=5):
    prepare(ImageData(tree, 16), tmp_path / "whole.zip")
    monkeypatch.setattr(module, "SYNC_EVERY", 4)
    sync = module.sync
    monkeypatch.setattr(module, "sync", lambda *a: sync(*a) or time.sleep(0.01))
    out, journal, begun = tmp_path / "out.zip", tmp_path / ".out.zip.part.json", []
    draws = random.Random(1)

    def done():
        return json.loads(journal.read_text())["done"] if journal.exists() else 0
    for least in sorted(draws.randrange(32) for _ in range(kills)):
        process = run_apart(prepare, ImageData(tree, 16), str(out), workers)
        while done() < least and process.is_alive():
            time.sleep(0.0005)
        time.sleep(draws.uniform(0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        begun.append(done())
    assert begun == sorted(begun) and begun[-1] >= 20  # it went on from where it was
    prepare(ImageData(tree, 16), out, workers)
    assert out.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert not list(tmp_path.glob(".out.zip*"))


def raises(*_, **__):
    raise OSError(5, "disk gone")


def test_rubbish_after_the_last_sync_is_cut_off(tree, tmp_path, monkeypatch):
    """A power loss may leave anything in what had not reached the disk."""
    prepare(ImageData(tree, 16), tmp_path / "whole.zip")
    monkeypatch.setattr(module, "SYNC_EVERY", 10)
    with monkeypatch.context() as patch:
        patch.setattr(module.json, "dumps", raises)  # at the very end, for the labels
        with pytest.raises(OSError, match="disk gone; the same command continues"):
            prepare(ImageData(tree, 16), str(tmp_path / "out.zip"))
    with open(tmp_path / ".out.zip.part", "rb+") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(bytes(2000))
    prepare(ImageData(tree, 16), tmp_path / "out.zip")
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_other_work_is_started_anew(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SYNC_EVERY", 10)
    with monkeypatch.context() as patch:
        patch.setattr(module.json, "dumps", raises)  # at the very end, for the labels
        with pytest.raises(OSError, match="disk gone"):
            prepare(ImageData(tree, 32), tmp_path / "out.zip")
        assert (tmp_path / ".out.zip.part.json").exists()
    prepare(ImageData(tree, 16), tmp_path / "out.zip")
    same_data(ImageData(tree, 16), ImageData(tmp_path / "out.zip", 16))


def test_made_already(tree, tmp_path, capsys):
    arguments = [str(tree), str(tmp_path / "out.zip"), "--num-workers", "0", "--resolution"]
    main([*arguments, "16"])
    before = (tmp_path / "out.zip").stat().st_mtime_ns
    main([*arguments, "16"])
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "out.zip").stat().st_mtime_ns == before
    fails(capsys, [*arguments, 24], "out.zip", "made of something else")
    (tmp_path / "other.zip").write_text("somebody's file")
    fails(capsys, [tree, tmp_path / "other.zip"], "other.zip")
    assert (tmp_path / "other.zip").read_text() == "somebody's file"


def test_mistakes(tree, tmp_path, capsys):
    fails(capsys, [tmp_path / "nowhere", tmp_path / "x.zip"], "nowhere", "no such folder")
    fails(capsys, [tree, tmp_path / "x.tar"], "x.tar", ".zip")
    fails(capsys, [tree, tree / "ant" / "x.zip"], "lies in")
    fails(capsys, [tree, tmp_path / "x.zip", "--resolution", "0"], "--resolution")


def hold(path, ready):
    with open(path, "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        ready.touch()
        time.sleep(60)


def test_two_at_once(tree, tmp_path, capsys):
    process = run_apart(hold, tmp_path / ".x.zip.part", tmp_path / "ready")
    while not (tmp_path / "ready").exists():
        time.sleep(0.001)
    fails(capsys, [tree, tmp_path / "x.zip"], "another process")
    process.kill()
    process.join()
    prepare(ImageData(tree, 16), tmp_path / "x.zip")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files(tree, tmp_path, capsys, workers):
    (tree / "bird 2" / "1.JPEG").write_text("no image")
    (tree / "bird 2" / "4.png").write_bytes((tree / "bird 2" / "4.png").read_bytes()[:500])
    arguments = [tree, tmp_path / "x.zip", "--resolution", 16, "--num-workers", workers]
    fails(capsys, arguments, "bird 2", "--skip-corrupt")
    main([str(a) for a in [*arguments, "--skip-corrupt"]])
    assert "without 2 corrupt files" in capsys.readouterr().out
    data, source = ImageData(tmp_path / "x.zip", 16), ImageData(tree, 16)
    keep = [k for k, name in enumerate(source.names) if name not in ("bird 2/1.JPEG", "bird 2/4.png")]
    assert len(data) == 37 and data.labels.tolist() == source.labels[keep].tolist()
    assert all(torch.equal(data[at][0], source[k][0]) for at, k in enumerate(keep))


def test_disk_too_small(tree, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    fails(capsys, [tree, tmp_path / "x.zip", "--num-workers", 0], "x.zip", "MB are free")
    assert not (tmp_path / "x.zip").exists()


def fill(tree, out, log):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    sys.stderr = open(log, "w")
    main([str(tree), str(out), "--resolution", "16", "--num-workers", "0"])


def test_disk_that_fills(tree, tmp_path):
    process = run_apart(fill, tree, tmp_path / "x.zip", tmp_path / "log")
    process.join(60)
    line = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and line.count("\n") == 1 and "x.zip: File too large" in line
    prepare(ImageData(tree, 16), tmp_path / "x.zip")
    same_data(ImageData(tree, 16), ImageData(tmp_path / "x.zip", 16))
