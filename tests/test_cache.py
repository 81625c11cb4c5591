"""models/runtime/cache.py: the same losses with a cache as without, the same bytes after any kill, and what
is rejected."""
import json
import multiprocessing
import os
import random
import time
from collections import namedtuple

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import train_repae_e as train
from models.runtime import cache, files
from models.runtime.data import ImageData, ShapesData, open_images
from models.vae import AutoencoderKL

fork = multiprocessing.get_context("fork")
FLAGS = ["--preset", "demo", "--model", "SiT-Ti/4", "--vae", "f4d4", "--resolution", "16",
         "--batch-size", "4", "--freeze-vae", "--max-train-steps", "12", "--data-dir", "", "--skip-corrupt",
         "--num-workers", "0", "--log-every", "1", "--sampling-steps", "0"]


@pytest.fixture(scope="module", autouse=True)
def photos(tmp_path_factory):
    """39 files in three classes, one of them corrupt."""
    folder, drawn = tmp_path_factory.mktemp("photos"), ShapesData(39, 20)
    for k in range(39):
        (folder / f"class{k % 3}").mkdir(exist_ok=True)
        Image.fromarray(drawn[k][0].permute(1, 2, 0).numpy()).save(folder / f"class{k % 3}" / f"{k:02d}.png")
    (folder / "class1" / "07.png").write_text("this is not an image")
    FLAGS[FLAGS.index("--data-dir") + 1] = str(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    files.save(train.VAE_models["f4d4"]().state_dict(), path)
    return str(path)


def run(folder, vae, *flags):
    """The lines of metrics.jsonl of a run."""
    torch.set_num_threads(1)
    train.main([*FLAGS, "--vae-ckpt", vae, "--output-dir", str(folder), *map(str, flags)])
    return [json.loads(line) for line in (folder / "demo" / "metrics.jsonl").read_text().splitlines()]


def make(folder, vae, workers=0, hflip=True):
    """(the cache's records, the images) of a whole cache, made in this process."""
    torch.set_num_threads(1)  # also that processes may be forked
    net = train.VAE_models["f4d4"]()
    net.load_state_dict(files.load(vae))
    data = open_images(FLAGS[FLAGS.index("--data-dir") + 1], 16, hflip, 0, skip_corrupt=True)
    latents = cache.latents(str(folder), data, {"VAE": "x"}, net, torch.device("cpu"), workers)
    return latents.rows, data, net


@pytest.mark.parametrize("more", [[], ["--hflip"], ["--proj-coeff", "0"]])
def test_losses_are_those_of_a_run_without(tmp_path, vae, more):
    plain = run(tmp_path / "plain", vae, *more)
    cached = run(tmp_path / "cached", vae, *more, "--latent-cache", tmp_path / "c")
    assert len(plain) == 12
    for a, b in zip(plain, cached, strict=True):
        for name in a:
            if "loss" in name or "grad" in name:
                assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)


def test_neither_images_nor_the_vae_are_touched(tmp_path, vae, monkeypatch):
    flags = ["--latent-cache", tmp_path / "c", "--proj-coeff", "0", "--max-train-steps", "2"]
    run(tmp_path / "a", vae, *flags)

    def touched(*_):
        raise AssertionError("an image or a network was used")
    for place, name in ((ImageData, "__getitem__"), (AutoencoderKL, "moments")):
        monkeypatch.setattr(place, name, touched)
    run(tmp_path / "b", vae, *flags)


def test_records_are_what_the_vae_gives(tmp_path, vae):
    rows, data, net = make(tmp_path, vae)
    assert len(rows) == 78 and all(rows["label"][k] == data[k % 39][1] for k in range(78))
    data.hflip = False
    for row, image in ((5, data[5][0]), (39 + 5, data[5][0].flip(-1))):
        with torch.no_grad():
            posterior = net.encode(image[None].float() / 127.5 - 1)
        assert np.allclose(rows["mean"][row], posterior.mean, atol=1e-5)
        assert np.allclose(rows["std"][row], posterior.std, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments(tmp_path, vae, monkeypatch, workers):
    monkeypatch.setattr(cache, "BLOCK", 2)
    make(tmp_path / "whole", vae)
    part, draws = tmp_path / "killed" / "latents.npy.part", random.Random(workers)
    monkeypatch.setattr(cache.Blocks, "__getitem__", lambda self, k, real=cache.Blocks.__getitem__:
                        time.sleep(0.005) or real(self, k))

    def made():
        return int(np.load(part, mmap_mode="r")["std"][:, -1, -1, -1].astype(bool).sum())
    begun = []
    for least in (10, 30, 50):
        process = fork.Process(target=make, args=(tmp_path / "killed", vae, workers))
        process.start()
        while process.is_alive() and not (part.exists() and part.stat().st_size and made() >= least):
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -9 and not (tmp_path / "killed" / "latents.npy").exists()
        begun.append(made())
    assert begun == sorted(begun) and 50 <= begun[-1] < 78  # each resumed where the one before was
    make(tmp_path / "killed", vae, workers)
    assert (tmp_path / "killed/latents.npy").read_bytes() == (tmp_path / "whole/latents.npy").read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == ["latents.json", "latents.npy"]


def test_several_processes_make_the_same_bytes(tmp_path, vae):
    processes.run_two("train_repae_e", [*FLAGS, "--vae-ckpt", vae, "--output-dir", tmp_path / "out",
                                        "--latent-cache", tmp_path / "two", "--max-train-steps", "2"],
                      tmp_path / "log")
    make(tmp_path / "one", vae, hflip=False)
    assert (tmp_path / "one/latents.npy").read_bytes() == (tmp_path / "two/latents.npy").read_bytes()


def test_another_ones_cache_is_rejected_by_name(tmp_path, vae, capsys):
    flags = ["--latent-cache", tmp_path / "c", "--max-train-steps", "1", "--proj-coeff", "0"]
    run(tmp_path / "a", vae, *flags)
    other = str(tmp_path / "other.pt")
    files.save(train.VAE_models["f4d4"]().state_dict(), other)
    for more, words in ((["--vae-ckpt", other], "another VAE"),
                        (["--data-dir", "shapes"], "another data set"),
                        (["--resolution", "32"], "another --resolution"), (["--hflip"], "another --hflip")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "b", vae, *flags, *more)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1 and words in line and "latents.npy" in line


def test_a_damaged_cache_is_named(tmp_path, vae):
    make(tmp_path, vae)
    os.truncate(tmp_path / "latents.npy", os.path.getsize(tmp_path / "latents.npy") - 1)
    with pytest.raises(ValueError, match="latents.npy: damaged"):
        make(tmp_path, vae)
    np.save(tmp_path / "latents.npy", np.zeros(78))
    with pytest.raises(ValueError, match="latents.npy: damaged"):
        make(tmp_path, vae)


def test_a_small_disk_and_a_broken_vae_are_rejected(tmp_path, vae, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(OSError, match="make room"):
        make(tmp_path / "c", vae)
    monkeypatch.undo()
    state = files.load(vae)
    state["encoder.conv_in.bias"][0] = float("inf")
    torch.save(state, tmp_path / "inf.pt")
    with pytest.raises(ValueError, match="images 0 to 15 are not finite"):
        make(tmp_path / "d", str(tmp_path / "inf.pt"))
    assert not (tmp_path / "d" / "latents.npy").exists()
