"""models/runtime/cache.py: the same losses with caches as without, the same bytes after any kill, and what is
refused."""
import json
import multiprocessing
import os
import random
import shutil
import time
from collections import namedtuple

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import train_repae_e as train
from models.encoders import HOG
from models.runtime import cache, files, online, trainer, weights
from models.runtime.data import ImageData, ShapesData, identity
from models.vae import AutoencoderKL

fork = multiprocessing.get_context("fork")
FLAGS = ["--preset", "demo", "--model", "SiT-Ti/4", "--resolution", "16", "--batch-size", "4",
         "--freeze-vae", "--max-train-steps", "20", "--data-dir", "", "--skip-corrupt", "--num-workers", "0",
         "--log-every", "1", "--sampling-steps", "0"]


@pytest.fixture(scope="module", autouse=True)
def photos(tmp_path_factory):
    """39 files in three classes, one of them no image."""
    folder, drawn = tmp_path_factory.mktemp("photos"), ShapesData(39, 20)
    for k in range(39):
        (folder / f"class{k % 3}").mkdir(exist_ok=True)
        Image.fromarray(drawn[k][0].permute(1, 2, 0).numpy()).save(folder / f"class{k % 3}" / f"{k:02d}.png")
    (folder / "class1" / "07.png").write_text("this is no image")
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


def refused(capsys, folder, vae, *flags_and_words):
    *flags, words = flags_and_words
    with pytest.raises(SystemExit) as stop:
        run(folder, vae, *flags)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert all(word in line for word in words), line


def plan(folder, vae, *flags):
    """(caches, data) of a run with both."""
    torch.set_num_threads(1)  # also that processes may be forked
    args = train.parse_args([*FLAGS, "--vae-ckpt", vae, "--latent-cache", str(folder), "--cache-features",
                             str(folder), *flags])
    nets = train.build_networks(args, torch.device("cpu"), files.load(vae))
    data = trainer.open_data(args)
    kept = {"data": identity(data), "vae_digest": weights.state_digest(nets.vae)}
    return cache.plan(args, data, kept, nets.vae, nets.encoders), data


def content(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.mark.parametrize("latents, features, hflip", [(1, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_losses_are_those_of_a_run_without(tmp_path, vae, latents, features, hflip):
    more = ["--hflip"] * hflip
    plain = run(tmp_path / "plain", vae, *more)
    more += ["--latent-cache", tmp_path / "c"] * latents + ["--cache-features", tmp_path / "c"] * features
    cached = run(tmp_path / "cached", vae, *more)
    assert len(plain) == 20 and plain[-1]["skipped_files"] > 0
    for a, b in zip(plain, cached, strict=True):
        assert b["skipped_files"] == a["skipped_files"] and b["mfu"] > 0
        for name in ("denoising_loss", "proj_loss", "sit_loss", "grad_norm_sit"):
            assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)


def test_neither_images_nor_networks_are_touched(tmp_path, vae, monkeypatch):
    flags = ["--latent-cache", tmp_path / "c", "--cache-features", tmp_path / "c", "--max-train-steps", "2"]
    run(tmp_path / "a", vae, *flags)

    def touched(*_):
        raise AssertionError("an image or a network was used")
    for place, name in ((ImageData, "__getitem__"), (AutoencoderKL, "moments"), (HOG, "forward")):
        monkeypatch.setattr(place, name, touched)
    run(tmp_path / "b", vae, *flags)


def test_the_vae_is_on_the_device_only_while_pictures_are_made(tmp_path, vae, monkeypatch):
    """The device's name stands for a GPU: only `to` is looked at."""
    places, used = ["home"], []
    args = train.parse_args([*FLAGS, "--vae-ckpt", vae, "--latent-cache", str(tmp_path)])
    nets = train.build_networks(args, torch.device("cpu"), files.load(vae))
    trainer.prepare(nets, args)
    monkeypatch.setattr(nets.vae, "to", lambda device: places.append(str(device)))
    decode = nets.vae.decode
    monkeypatch.setattr(nets.vae, "decode", lambda z: used.append(len(places)) or decode(z))
    nets.device = torch.device("cpu:0")
    online.save_grids(nets, args, 1, tmp_path, trainer.open_data(args))
    assert places == ["home", "cpu:0", "cpu"] and set(used) == {2}
    assert sorted(os.listdir(tmp_path)) == ["reconstructions", "samples"]


def test_records_are_what_the_networks_give(tmp_path, vae):
    caches, data = plan(tmp_path, vae, "--hflip")
    cache.make(caches, data, torch.device("cpu"), workers=0)
    latents, tokens = (np.load(c.path, mmap_mode="r") for c in caches)
    assert len(latents) == len(tokens) == 78 and latents["skipped"].sum() == 2
    assert all(latents["label"][k] == data[k % 39][1] for k in range(78))
    data.hflip = False
    for row, image in ((5, data[5][0]), (39 + 5, data[5][0].flip(-1))):
        with torch.no_grad():
            posterior = caches[0].network.encode(image[None].float() / 127.5 - 1)
            wanted = caches[1].network(image[None]).bfloat16()
        assert np.allclose(latents["mean"][row], posterior.mean, atol=1e-5)
        assert np.allclose(latents["std"][row], posterior.std, atol=1e-5)
        assert (tokens["tokens"][row] == wanted[0].view(torch.uint16).numpy()).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments(tmp_path, vae, monkeypatch, workers, kills=5):
    monkeypatch.setattr(cache, "BLOCK", 2)
    monkeypatch.setattr(cache, "SYNC_EVERY", 2)
    caches, data = plan(tmp_path / "whole", vae, "--hflip")
    cache.make(caches, data, torch.device("cpu"), workers=0)
    sync = cache.sync
    monkeypatch.setattr(cache, "sync", lambda *a: sync(*a) or time.sleep(0.01))
    caches, data = plan(tmp_path / "killed", vae, "--hflip")
    draws, begun = random.Random(workers), []
    for least in sorted(draws.randrange(60) for _ in range(kills)):
        process = fork.Process(target=cache.make, args=(caches, data, torch.device("cpu"), workers))
        process.start()
        while cache.done(caches[1]) < least and process.is_alive():
            time.sleep(0.0005)
        time.sleep(draws.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -9 and not os.path.exists(caches[0].path)
        begun.append(cache.done(caches[0]))
    assert begun == sorted(begun) and begun[-1] >= 30  # it went on from where it was
    cache.make(caches, data, torch.device("cpu"), workers)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) == 4


def test_several_processes_and_another_number_on_resume(tmp_path, vae):
    """Three blocks for two processes; then one goes on, from the same cache."""
    flags = ["--latent-cache", tmp_path / "two", "--cache-features", tmp_path / "two"]
    processes.run_two("train_repae_e", [*FLAGS, "--vae-ckpt", vae, "--output-dir", tmp_path / "out", *flags,
                                        "--max-train-steps", "2"], tmp_path / "log")
    one, data = plan(tmp_path / "one", vae)
    cache.make(one, data, torch.device("cpu"), workers=0)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    lines = run(tmp_path / "out", vae, *flags, "--max-train-steps", "4")
    plain = run(tmp_path / "plain", vae, "--max-train-steps", "4")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for a, b in zip(plain, lines):
        assert b["sit_loss"] == pytest.approx(a["sit_loss"], abs=1e-5)


def test_another_ones_cache_is_refused_by_name(tmp_path, vae, photos, capsys):
    both = ["--latent-cache", tmp_path / "c", "--cache-features", tmp_path / "c", "--max-train-steps", "1"]
    run(tmp_path / "a", vae, *both)
    capsys.readouterr()
    other = str(tmp_path / "other.pt")
    files.save(train.VAE_models["f4d4"]().state_dict(), other)
    out = tmp_path / "b"
    refused(capsys, out, other, *both, ("another VAE", "latents.npy", "--latent-cache"))
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(photos / "class0" / "00.png", tmp_path / "photos" / "class1" / "07.png")
    refused(capsys, out, vae, *both, "--data-dir", tmp_path / "photos", ("another data set",))
    refused(capsys, out, vae, *both, "--resolution", "32", ("another --resolution (16, not 32)",))
    refused(capsys, out, vae, *both, "--hflip", ("another --hflip (False, not True)",))
    assert not out.exists()
    for name in ("tokens-hog.npy", "latents.npy"):
        os.truncate(tmp_path / "c" / name, os.path.getsize(tmp_path / "c" / name) - 1)
        refused(capsys, out, vae, *both, (name, "cut off"))
        if name == "latents.npy":
            os.remove(tmp_path / "c" / name)
            run(out, vae, *both[:2], "--max-train-steps", "1")  # and it is made again
    (tmp_path / "c" / "latents.json").write_text("{")
    refused(capsys, out, vae, *both, ("latents.json", "damaged"))
    os.remove(tmp_path / "c" / "latents.json")
    refused(capsys, out, vae, *both, ("has no latents.json",))


def test_size_is_said_and_a_small_disk_refused(tmp_path, vae, capsys, monkeypatch):
    usage = namedtuple("usage", "free")
    flags = ["--latent-cache", tmp_path / "c", "--cache-features", tmp_path / "d"]
    size = sum(c.rows * c.dtype.itemsize for c in plan(tmp_path, vae)[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size - 1))
    refused(capsys, tmp_path, vae, *flags, ("tokens-hog.npy", "make room"))  # both are on one disk
    assert not (tmp_path / "c").exists() and not (tmp_path / "demo").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size))
    train.main([*FLAGS, "--vae-ckpt", vae, "--output-dir", str(tmp_path), *map(str, flags), "--dry-run"])
    said = capsys.readouterr().out
    assert "39 images, 0.000 GB, to be made" in said and not (tmp_path / "c").exists()


def test_flags_that_contradict(tmp_path, vae, capsys):
    refused(capsys, tmp_path, vae, "--cache-features", tmp_path / "c", "--proj-coeff", "0", ("no encoder",))
    with pytest.raises(SystemExit):
        train.main(["--preset", "demo", "--latent-cache", str(tmp_path), "--output-dir", str(tmp_path)])
    assert "--freeze-vae" in capsys.readouterr().err


def test_values_that_are_not_finite_are_refused(tmp_path, vae):
    caches, data = plan(tmp_path, vae)
    caches[0].compute = lambda images: [torch.full((len(images), 4, 4, 4), float("nan"))] * 2
    with pytest.raises(ValueError, match="images 0 to 15 is not finite"):
        cache.make(caches, data, torch.device("cpu"), workers=0)
    assert not os.path.exists(caches[0].path)


def test_a_second_maker_is_refused(tmp_path, vae):
    caches, data = plan(tmp_path, vae)
    codes = []

    def second():
        with pytest.raises(ValueError, match="another process is making it"):
            cache.make(plan(tmp_path, vae)[0], data, torch.device("cpu"), workers=0)
        os._exit(7)

    def compute(images, real=caches[0].compute):
        if not codes:
            process = fork.Process(target=second)
            process.start()
            process.join()
            codes.append(process.exitcode)
        return real(images)
    caches[0].compute = compute
    cache.make(caches, data, torch.device("cpu"), workers=0)
    assert codes == [7]
