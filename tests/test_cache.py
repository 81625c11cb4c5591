"""models/runtime/cache.py: the same losses with a cache as without, the same bytes after any kill, and what
is rejected."""
import json
import os

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import train_repae_e as train
from models.runtime import cache, files
from models.runtime.data import ImageData, ShapesData, open_images
from models.vae import AutoencoderKL

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


@pytest.mark.parametrize("more", [["--hflip"], ["--proj-coeff", "0"]])
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


def test_a_stopped_run_makes_only_what_is_missing(tmp_path, vae, monkeypatch):
    """tests/faults.py kills it."""
    monkeypatch.setattr(cache, "BLOCK", 2)
    make(tmp_path / "whole", vae, workers=1)
    real, seen = cache.Blocks.__getitem__, []

    def stop_once(self, k):
        seen.append(k)
        if len(seen) == 21:
            raise KeyboardInterrupt
        return real(self, k)
    monkeypatch.setattr(cache.Blocks, "__getitem__", stop_once)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "stopped", vae)
    assert not (tmp_path / "stopped" / "latents.npy").exists()
    make(tmp_path / "stopped", vae)
    assert seen == [*range(21), *range(20, 39)]
    assert (tmp_path / "stopped/latents.npy").read_bytes() == (tmp_path / "whole/latents.npy").read_bytes()
    assert sorted(os.listdir(tmp_path / "stopped")) == ["latents.json", "latents.npy"]


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
                        (["--data-dir", "shapes", "--hflip"], "another data set and another --hflip")):
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
