"""sample_ddp.py: samples depend on seed and index alone, runs stop and continue, released files load."""
import argparse
import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from fill import fill_
from PIL import Image

import sample_ddp
import train_repae_e
from models import samplers
from models.losses import PATHS, interpolant
from models.runtime import files, images, shards
from models.sit import SiT_models
from models.vae import VAE_models

ROOT = Path(__file__).resolve().parent.parent
N = 19
FAST = ["--num-fid-samples", str(N), "--num-steps", "3", "--cfg-scale", "1.5", "--guidance-high", "0.7"]


def tiny_checkpoint(path, **changes):
    """A training checkpoint, tiny, of 10 classes, latents 8x8 with filled (far from 0 and 1) statistics."""
    sit = fill_(SiT_models["SiT-Ti/2"](input_size=8, num_classes=10, encoder_depth=4, z_dims=[16],
                                       projector_dim=32))
    vae = fill_(VAE_models["f4d4"]())
    args = {"model": "SiT-Ti/2", "num_classes": 10, "path_type": "linear", "vae": "f4d4", "exp_name": "run"}
    content = {"model": {}, "ema": sit.state_dict(), "vae": vae.state_dict(), "args": args, "steps": 3}
    content |= changes
    files.save({k: v for k, v in content.items() if v is not None}, path)
    return str(path)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run") / "exp" / "checkpoints" / "0000003.pt")


@pytest.fixture(scope="module")
def reference(ckpt, tmp_path_factory):
    """The .npz of one process, batch 16, as the other runs must make it too."""
    path = tmp_path_factory.mktemp("reference") / "a.npz"
    sample_ddp.main(["--ckpt", ckpt, *FAST, "--npz", str(path), "--pproc-batch-size", "16"])
    return path


def sample(ckpt, npz, *flags):
    sample_ddp.main(["--ckpt", ckpt, *FAST, "--npz", str(npz), *flags])
    return npz


def test_contents(ckpt, reference):
    with np.load(reference) as content:
        images, labels, protocol = content["arr_0"], content["arr_1"], json.loads(str(content["protocol"]))
    assert images.shape == (N, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 10
    assert len(np.unique(images, axis=0)) == N
    assert labels.tolist() == samplers.sample_labels(0, range(N), 10).tolist()
    assert protocol["checkpoint_sha256"] == files.sha256(ckpt) and protocol["resolution"] == 32
    assert (protocol["solver"], protocol["num_steps"], protocol["cfg_scale"]) == ("euler-maruyama", 3, 1.5)
    beside = json.loads(reference.with_suffix(".json").read_text())
    assert beside.pop("run")["samples"] == N and beside == protocol
    assert sorted(p.name for p in reference.parent.iterdir()) == ["a.json", "a.npz", "a.png"]


def test_samples_are_what_the_functions_give(ckpt, reference):
    """Samples 4..7 by hand: float32 network, float64 state, statistics without eps, truncation."""
    content = files.load(ckpt)
    sit = SiT_models["SiT-Ti/2"](input_size=8, num_classes=10, encoder_depth=4, z_dims=[16],
                                 projector_dim=32).eval()
    sit.load_state_dict(content["ema"])
    vae = VAE_models["f4d4"]()
    vae.load_state_dict(content["vae"])
    generators = samplers.sample_generators(0, range(4, 8))
    x = samplers.draw_noise(generators, (4, 8, 8))
    y = samplers.sample_labels(0, range(4, 8), 10)
    with torch.no_grad():
        velocity = samplers.guided(lambda x, t, y: sit(x, t, y)[0], y, 10, 1.5, high=0.7)
        x = samplers.euler_maruyama(velocity, x, samplers.time_grid(3, "sde"),
                                    lambda: samplers.draw_noise(generators, (4, 8, 8)), interpolant).float()
        z = x * sit.bn.running_var.sqrt()[:, None, None] + sit.bn.running_mean[:, None, None]
        expected = ((vae.decode(z) + 1) / 2 * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    with np.load(reference) as npz:
        difference = np.abs(npz["arr_0"][4:8].astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01  # the last float bits may cross a level


def test_batch_size_and_threads_do_not_matter(ckpt, reference, tmp_path):
    a = sample(ckpt, tmp_path / "a.npz", "--pproc-batch-size", "7")
    torch.set_num_threads(3)
    b = sample(ckpt, tmp_path / "b.npz", "--pproc-batch-size", "1")
    torch.set_num_threads(3)
    c = sample(ckpt, tmp_path / "c.npz", "--pproc-batch-size", "64")
    assert a.read_bytes() == b.read_bytes() == c.read_bytes() == reference.read_bytes()


def test_two_processes_give_the_same_file_from_a_trained_model(tmp_path):
    train_repae_e.main(["--preset", "demo", "--output-dir", str(tmp_path / "exps"), "--max-train-steps", "2",
                        "--batch-size", "4", "--checkpointing-steps", "2", "--sampling-steps", "0"])
    ckpt = str(tmp_path / "exps" / "demo" / "checkpoints" / "0000002.pt")
    reference = sample(ckpt, tmp_path / "16.npz", "--pproc-batch-size", "16")
    assert reference.read_bytes() == sample(ckpt, tmp_path / "7.npz", "--pproc-batch-size", "7").read_bytes()
    path = tmp_path / "2.npz"
    processes.run_two("sample_ddp", ["--ckpt", ckpt, *FAST, "--npz", path], tmp_path / "log")
    assert path.read_bytes() == reference.read_bytes()
    assert json.loads(path.with_suffix(".json").read_text())["run"]["processes"] == 2


def test_killed_and_continued(ckpt, tmp_path):
    flags = ["--num-fid-samples", "40", "--num-steps", "8"]
    whole, path = tmp_path / "whole.npz", tmp_path / "a.npz"
    sample_ddp.main(["--ckpt", ckpt, *flags, "--npz", str(whole)])
    run = processes.start("sample_ddp", ["--ckpt", ckpt, *flags, "--npz", path, "--pproc-batch-size", "4"],
                          tmp_path / "log")
    folder = tmp_path / "a.shards"
    processes.wait_for(lambda: len(shards.list_shards(folder)) >= 2, [run], tmp_path / "log")
    processes.kill(run)
    done = sum(b - a for a, b in shards.list_shards(folder))
    assert 0 < done < 40 and not path.exists()
    # what else a kill can leave: temporary files, of a shard and of the .npz
    gone = subprocess.Popen(["true"])
    gone.wait()
    for left in (folder / f".00000036-00000040.npz.{gone.pid}.tmp", tmp_path / f".a.npz.{gone.pid}.tmp"):
        left.write_bytes(bytes(1000))
    sample_ddp.main(["--ckpt", ckpt, *flags, "--npz", str(path)])
    assert path.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    # nothing made twice
    assert json.loads(path.with_suffix(".json").read_text())["run"]["samples"] == 40 - done
    assert not folder.exists()


def test_halves_of_two_machines(ckpt, reference, tmp_path, capsys):
    first = sample(ckpt, tmp_path / "one" / "a.npz", "--range", "0:10")
    second = sample(ckpt, tmp_path / "two" / "a.npz", "--range", "10:19")
    assert "lacks samples 10:19" in capsys.readouterr().out and not first.exists() and not second.exists()
    for shard in (tmp_path / "two" / "a.shards").glob("*.npz"):
        shard.rename(tmp_path / "one" / "a.shards" / shard.name)
    sample(ckpt, first)
    assert first.read_bytes() == reference.read_bytes()


def test_a_whole_file_is_left_alone(ckpt, reference, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(reference.read_bytes())
    monkeypatch.setattr(sample_ddp, "make_sampler", lambda *_: pytest.fail("sampled again"))
    sample(ckpt, path, "--png")
    assert path.read_bytes() == reference.read_bytes()
    with np.load(path) as content:
        pngs = np.stack([np.asarray(Image.open(tmp_path / "a" / f"{i:06d}.png")) for i in range(N)])
        assert np.array_equal(pngs, content["arr_0"])


SOLVERS = [
    (["--mode", "ode"], "euler"),
    (["--mode", "ode", "--heun"], "heun"),
    (["--mode", "ode", "--dopri5", "--rtol", "0.01", "--atol", "0.01"], "dopri5"),
    (["--mixed-precision", "bf16"], "euler-maruyama"),
    (["--path-type", "cosine"], "euler-maruyama"),
]


@pytest.mark.parametrize("flags, solver", SOLVERS)
def test_grid_only_with_every_solver(ckpt, tmp_path, flags, solver):
    path = sample(ckpt, tmp_path / "a.npz", "--grid-only", "--num-fid-samples", "4", "--classes", "2,7",
                  *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.png"] and not path.exists()
    protocol = json.loads((tmp_path / "a.json").read_text())
    assert protocol["solver"] == solver and protocol["classes"] == [2, 7]
    assert Image.open(tmp_path / "a.png").size == (2 * 66, 2 * (64 + 14 + 2))


def test_equal_labels_and_folder_flags(ckpt, tmp_path, capsys):
    run_folder = str(Path(ckpt).parent.parent)
    sample_ddp.main(["--exp-path", run_folder, "--train-steps", "3", "--sample-dir", str(tmp_path), *FAST,
                     "--num-fid-samples", "20", "--label-sampling", "equal"])
    assert "note" not in capsys.readouterr().err
    path, = tmp_path.glob("*.npz")
    assert path.name == "run-0000003-euler-maruyama-3-cfg1.5-0-0.7-equal-seed0-20.npz"
    with np.load(path) as content:
        assert np.bincount(content["arr_1"]).tolist() == [2] * 10
    sample(ckpt, tmp_path / "b.npz", "--label-sampling", "equal", "--range", "0:1")
    assert "19 samples are not the same number of each of 10 classes" in capsys.readouterr().err


def test_args_beside_frozen_vae_and_other_vae_files(ckpt, reference, tmp_path):
    """args.json in the run folder, not args; no VAE in the checkpoint, named by its args or --vae-ckpt."""
    content = files.load(ckpt)
    frozen = tiny_checkpoint(tmp_path / "exp" / "checkpoints" / "0000003.pt", vae=None, args=None)
    files.save(content["vae"], tmp_path / "vae.pt")
    args = dict(content["args"], vae_ckpt=str(tmp_path / "vae.pt"))
    (tmp_path / "exp" / "args.json").write_text(json.dumps(args))
    with np.load(reference) as expected:
        for name in (None, "vae.pt"):
            flags = ["--vae-ckpt", str(tmp_path / name)] if name else []
            with np.load(sample(frozen, tmp_path / f"by-{name}.npz", *flags)) as got:
                assert np.array_equal(got["arr_0"], expected["arr_0"])


def test_released_layout_at_full_size(golden_json, tmp_path, monkeypatch):
    """Every name and shape of the released SiT-B/1 + f16d32 checkpoint, args a pickled Namespace."""
    monkeypatch.setattr(sample_ddp, "CPU_BLOCK", 1)  # one 256-pixel image is enough
    keys, names = golden_json("keys_checkpoint"), {"sit": "keys_sit_b_1", "vae": "keys_vae_f16d32"}
    g = torch.Generator().manual_seed(0)

    def weights(name):
        state = {}
        for key, shape in golden_json(name)["state_dict"].items():
            if key.endswith("num_batches_tracked"):
                state[key] = torch.tensor(7)
            elif key.endswith("running_var"):
                state[key] = torch.rand(shape, generator=g) + 0.5
            else:
                scale = 0.3 / max(1, int(np.prod(shape[1:]))) ** 0.5
                is_norm = len(shape) == 1 and key.endswith("weight")
                state[key] = torch.randn(shape, generator=g).mul_(scale) + is_norm
        return state

    sit = weights(names["sit"])
    args = argparse.Namespace(**keys["repae_args"] | {"model": "SiT-B/1", "vae": "f16d32",
                                                      "exp_name": "released"})
    folder = tmp_path / "sit-repae-invae" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"model": sit, "ema": sit, "vae": weights(names["vae"]), "discriminator": {},
                "opt": {"state": {}}, "opt_vae": {}, "opt_disc": {}, "args": args, "steps": 400000},
               folder / "0400000.pt")
    sample_ddp.main(["--exp-path", str(folder.parent), "--train-steps", "400000", "--npz",
                     str(tmp_path / "a.npz"), "--num-fid-samples", "1", "--num-steps", "2", "--cfg-scale",
                     "2", "--guidance-high", "0.5"])
    with np.load(tmp_path / "a.npz") as content:
        assert content["arr_0"].shape == (1, 256, 256, 3) and content["arr_0"].std() > 1
        protocol = json.loads(str(content["protocol"]))
    assert (protocol["num_classes"], protocol["train_steps"], protocol["model"]) == (1000, 400000, "SiT-B/1")


def test_writing_needs_little_memory(tmp_path):
    """500 256-pixel images are 94 MiB, which the writer must not hold (bench_sample.py writes 20,000)."""
    path, random = str(tmp_path / "a.npz"), np.random.default_rng(0)
    parts = (random.integers(0, 256, (20, 256, 256, 3), dtype=np.uint8) for _ in range(25))
    tracemalloc.start()
    images.write_npz(path, parts, (500, 256, 256, 3), arr_1=np.zeros(500, int))
    written = sum(len(rows) for rows in images.open_npz(path).read(20))
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert written == 500 and peak < 25, f"the writer took {peak:.0f} MiB"
    with np.load(path) as content:
        assert content["arr_1"].shape == (500,)


BAD = [
    (["--cfg-scale", "0.5"], "at least 1"),
    (["--guidance-low", "0.8", "--guidance-high", "0.2"], "0.8, 0.2"),
    (["--heun"], "--mode ode"),
    (["--mode", "ode", "--heun", "--dopri5"], "exclude"),
    (["--classes", "3,10"], "class 10"),
    (["--classes", "cat"], "--classes"),
    (["--range", "9:5"], "--range"),
    *(([flag, value], flag) for flag in ("--num-fid-samples", "--pproc-batch-size", "--num-steps",
                                         "--cfg-scale", "--guidance-low", "--guidance-high", "--rtol",
                                         "--atol", "--global-seed", "--train-steps")
      for value in ("nan", "inf", "-1", "1e400")),
    (["--num-fid-samples", "0"], "--num-fid-samples"),
    (["--num-fid-samples", "1000000000000"], "--num-fid-samples"),
    (["--pproc-batch-size", "0"], "--pproc-batch-size"),
    (["--num-steps", "0"], "--num-steps"),
    (["--num-steps", "2.5"], "--num-steps"),
    (["--rtol", "1e-300"], "--rtol"),
    (["--atol", "0"], "--atol"),
    (["--guidance-high", "1.1"], "--guidance-high"),
    (["--classes", ""], "--classes"),
    (["--classes", "1,-1"], "class -1"),
    (["--range", "0:5:9"], "--range"),
    (["--range", "-2:5"], "--range"),
    (["--npz", ".npz"], "ends in .npz"),
    (["--mixed-precision", "fp8"], "--mixed-precision"),
    (["--num-fid", "4"], "--num-fid"),
    (["--mode", "pde"], "--mode"),
    (["--npz", "a.zip"], ".npz"),
    (["--train-steps", "3"], "--exp-path"),
    (["--vae-ckpt", "nowhere.pt"], "nowhere.pt"),
]


def refused(capsys, *flags, begun=False):
    """stderr of a run that must end in one line and exit code 2; before all output, unless it had `begun`."""
    with pytest.raises(SystemExit) as stop:
        sample_ddp.main([*map(str, flags)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and (begun or captured.out == "")
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_flags(ckpt, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "--ckpt", ckpt, *flags)
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = files.load(ckpt)
    no_bn = {k: v for k, v in content["ema"].items() if not k.startswith("bn.")}
    no_null = dict(content["ema"], **{"y_embedder.embedding_table.weight": torch.zeros(10, 192)})
    wide = dict(content["ema"], **{"final_layer.linear.bias": torch.zeros(3)})
    broken = {
        "latent statistics": dict(ema=no_bn), "none of": dict(args=content["args"] | {"model": "DiT-XL/2"}),
        "another layout": dict(ema={"weight": torch.zeros(1)}), "no args": dict(args=None),
        "null class": dict(ema=no_null), "another architecture": dict(ema=wide),
        "label table": dict(args=content["args"] | {"num_classes": 1000}),
        "names none": dict(vae=None),
        "REPA-E/e2e-vavae": dict(vae=None,
                                 args=content["args"] | {"vae_ckpt": "pretrained/x/e2e-vavae-400k.pt"}),
        "latent channels": dict(ema=SiT_models["SiT-Ti/2"](input_size=8, in_channels=8, num_classes=10,
                                                           encoder_depth=1, z_dims=()).state_dict()),
        "not the weights of a VAE": dict(vae={"a": torch.zeros(1)}),
    }
    for message, changes in broken.items():
        path = tiny_checkpoint(tmp_path / "in" / "bad.pt", **changes)
        assert message in refused(capsys, "--ckpt", path, "--cfg-scale", "2"), message
    files.save(content["vae"], tmp_path / "in" / "bad.pt")
    assert "no 'ema'" in refused(capsys, "--ckpt", path)
    Path(path).write_bytes(b"not a checkpoint")
    assert "cannot be read" in refused(capsys, "--ckpt", path)
    assert "no such file" in refused(capsys, "--ckpt", "nowhere.pt")
    assert "no checkpoints" in refused(capsys, "--exp-path", tmp_path)
    assert "no step 4" in refused(capsys, "--exp-path", Path(ckpt).parent.parent, "--train-steps", "4")
    assert "--ckpt FILE or" in refused(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_output_of_other_settings_is_not_touched(ckpt, reference, tmp_path, capsys):
    path = tmp_path / "a.npz"
    path.write_bytes(reference.read_bytes())
    assert "made with cfg_scale 1.5, this run has 3.0" in refused(
        capsys, "--ckpt", ckpt, *FAST, "--cfg-scale", "3", "--npz", path)
    sample(ckpt, tmp_path / "b.npz", "--range", "0:4")
    capsys.readouterr()
    assert "global_seed" in refused(capsys, "--ckpt", ckpt, *FAST, "--global-seed", "1", "--npz",
                                    tmp_path / "b.npz")
    path.write_bytes(b"PK")
    assert "truncated or no .npz" in refused(capsys, "--ckpt", ckpt, *FAST, "--npz", path)
    np.savez(path, np.zeros((N, 32, 32, 3), np.uint8))
    assert "not from here" in refused(capsys, "--ckpt", ckpt, *FAST, "--npz", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.shards"]


def test_samples_that_are_not_finite_stop_the_run(ckpt, tmp_path, capsys):
    content = files.load(ckpt)
    for value, words, begun in ((float("nan"), "ema.final_layer.linear.bias", False),
                                (3e38, "not finite", True)):
        ema = dict(content["ema"], **{"final_layer.linear.bias": torch.full((16,), value)})
        torch.save(content | {"ema": ema}, path := tmp_path / "nan.pt")  # files.save refuses NaN
        assert words in refused(capsys, "--ckpt", path, *FAST, "--npz", tmp_path / "a.npz", begun=begun)
    assert not (tmp_path / "a.npz").exists()


# ---------------------------------------------------------------- shards

def test_missing_ranges():
    assert shards.missing_ranges([], 0, 5) == [(0, 5)]
    assert shards.missing_ranges([(0, 4), (6, 9)], 0, 12) == [(4, 6), (9, 12)]
    assert shards.missing_ranges([(0, 4), (2, 9)], 3, 8) == []
    assert shards.missing_ranges([(0, 4), (20, 30)], 6, 12) == [(6, 12)]


def test_batches_end_at_multiples_of_their_size():
    assert shards.cut([(0, 10)], 4) == [(0, 4), (4, 8), (8, 10)]
    assert shards.cut([(3, 4), (6, 13), (16, 20)], 4) == [(3, 4), (6, 8), (8, 12), (12, 13), (16, 20)]
    assert shards.cut([(1, 3)], 64) == [(1, 3)] and shards.cut([], 4) == []


def pictures(count, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_rows_of_overlapping_shards(tmp_path):
    data, folder = pictures(200), str(tmp_path)
    for first, end in ((0, 70), (64, 128), (100, 190), (150, 200)):
        shards.write_shard(folder, first, data[first:end], {})
    for number in (1, 64, 65, 70, 100, 129, 200):
        assert np.array_equal(np.concatenate(list(shards.shard_rows(folder, number))), data[:number]), number


def test_damaged_shards_are_removed_and_those_of_another_protocol_refused(tmp_path, capsys):
    data, folder = pictures(20), tmp_path / "shards"
    def path(first, end): return Path(shards.shard_path(folder, first, end))
    def check(**protocol): shards.check_shards(str(folder), (8, 8), {"seed": 1} | protocol)
    for first in range(0, 20, 4):
        shards.write_shard(str(folder), first, data[first:first + 4], {"seed": 1, "num_fid_samples": 99})
    (folder / "notes.txt").write_text("mine")
    (folder / "1-2.npz").write_text("")  # no name of ours
    check()
    assert len(shards.list_shards(folder)) == 5 and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="00000.*was made with seed 1, this run has 2"):
        check(seed=2)
    assert len(shards.list_shards(folder)) == 5
    flipped = bytearray(path(0, 4).read_bytes())
    flipped[400] ^= 1
    path(0, 4).write_bytes(flipped)
    path(4, 8).write_bytes(path(4, 8).read_bytes()[:500])
    path(8, 12).rename(path(8, 13))
    np.savez(path(12, 16), data[:4])
    check()
    notes = capsys.readouterr().err.splitlines()
    assert shards.list_shards(folder) == [(16, 20)]
    assert len(notes) == 4 and all(note.startswith("note: ") and "made again" in note for note in notes)
    shards.write_shard(str(folder), 0, pictures(4, 9), {"seed": 1})
    check()
    assert shards.list_shards(folder) == [(16, 20)]
    lock = shards.claim(str(folder))
    shards.remove_shards(folder)
    shards.release(str(folder), lock)
    assert sorted(os.listdir(folder)) == ["1-2.npz", "notes.txt"]  # what is not ours stays


def test_a_shard_that_cannot_be_read_is_not_removed(tmp_path, monkeypatch):
    shards.write_shard(str(tmp_path), 0, pictures(4), {})

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    monkeypatch.setattr(images, "open_npz", refuse)
    with pytest.raises(PermissionError):
        shards.check_shards(str(tmp_path), (8, 8), {})
    assert shards.list_shards(tmp_path) == [(0, 4)]


def test_damaged_shards_are_made_again(ckpt, reference, tmp_path, capsys):
    path = sample(ckpt, tmp_path / "a.npz", "--range", "0:18")
    first, *_, last = sorted((tmp_path / "a.shards").glob("*.npz"))
    first.write_bytes(first.read_bytes()[:-1000])
    np.savez(last, np.zeros((2, 9, 9, 3), np.uint8))
    sample(ckpt, path)
    assert path.read_bytes() == reference.read_bytes()
    notes = capsys.readouterr().err
    assert first.name in notes and last.name in notes and not (tmp_path / "a.shards").exists()


def test_shards_of_another_seed_are_refused_by_name(ckpt, tmp_path, capsys):
    """Two machines were given different seeds; the shards of both lie in one folder."""
    sample(ckpt, tmp_path / "one" / "a.npz", "--range", "0:4")
    sample(ckpt, tmp_path / "two" / "a.npz", "--range", "4:8", "--global-seed", "1")
    shard, = (tmp_path / "two" / "a.shards").glob("*.npz")
    shard.rename(tmp_path / "one" / "a.shards" / shard.name)
    capsys.readouterr()
    error = refused(capsys, "--ckpt", ckpt, *FAST, "--npz", tmp_path / "one" / "a.npz")
    assert shard.name in error and "global_seed 1, this run has 0" in error
    assert len(shards.list_shards(tmp_path / "one" / "a.shards")) == 2


def test_a_shard_that_goes_bad_before_the_end_costs_no_other(ckpt, reference, tmp_path, capsys, monkeypatch):
    """Found while the .npz is written: no .npz, the shards stay, and the next run makes that one again."""
    path, finish = tmp_path / "a.npz", sample_ddp.finish

    def damage_first(*job):
        bad = max((tmp_path / "a.shards").glob("*.npz"))
        bad.write_bytes(bad.read_bytes()[:300])
        finish(*job)
    monkeypatch.setattr(sample_ddp, "finish", damage_first)
    assert "00000016-00000019.npz: " in refused(capsys, "--ckpt", ckpt, *FAST, "--npz", path, begun=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.shards"]
    monkeypatch.undo()
    assert sample(ckpt, path).read_bytes() == reference.read_bytes()


# ---------------------------------------------------------------- outputs, locks, full disks

def test_outputs_are_tried_before_work(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample_ddp, "make_sampler", lambda *_: pytest.fail("has begun"))
    flags = ["--ckpt", ckpt, *FAST, "--npz", tmp_path / "a.npz"]
    (tmp_path / "a.json").mkdir()
    assert "a.json: is a folder" in refused(capsys, *flags)
    (tmp_path / "a.json").rmdir()
    (tmp_path / "a").write_text("a file")
    assert "cannot be written" in refused(capsys, *flags, "--png")
    assert "cannot be written" in refused(capsys, "--ckpt", ckpt, *FAST, "--npz", tmp_path / "a" / "b.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_second_run_in_the_same_folder_is_refused(ckpt, tmp_path, capsys):
    """The lock is the kernel's: it ends with the process that holds it, however that ends."""
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(600)")
    folder = tmp_path / "a.shards"
    folder.mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert "another run is at work" in refused(capsys, "--ckpt", ckpt, *FAST, "--npz", tmp_path / "a.npz")
        sample(ckpt, tmp_path / "b.npz", "--range", "0:1")  # another name is another folder
    finally:
        other.kill()
        other.wait()
    sample(ckpt, tmp_path / "a.npz", "--range", "0:1")


@pytest.mark.parametrize("where", ["shard", "npz", "json", "png"])
def test_disk_full(ckpt, reference, tmp_path, capsys, monkeypatch, where):
    """One line that names the file; what was written stays, and with room the same command ends the same."""
    path, real = tmp_path / "a.npz", files.replace
    wanted = {"shard": "00000016-00000019.npz", "npz": "a.npz", "json": "a.json", "png": "a.png"}[where]

    def full(name):
        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")
        with monkeypatch.context() as patch:
            if os.path.basename(name) == wanted:  # as the writers inside would find it
                patch.setattr(np.lib.format, "write_array_header_1_0", fail)
                patch.setattr(json, "dump", fail)
                patch.setattr(Image.Image, "save", fail)
            with real(name) as temporary:
                yield temporary
    monkeypatch.setattr(files, "replace", contextlib.contextmanager(full))
    error = refused(capsys, "--ckpt", ckpt, *FAST, "--npz", path, "--pproc-batch-size", "4", begun=True)
    assert "disk full" in error and wanted in error
    kept = shards.list_shards(tmp_path / "a.shards")
    assert kept == [(i, min(i + 4, N)) for i in range(0, 16 if where == "shard" else N, 4)]
    assert path.exists() == (where in ("json", "png")) and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert sample(ckpt, path).read_bytes() == reference.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz", "a.png"]


# ---------------------------------------------------------------- signals

LONG = ["--num-fid-samples", "4000", "--num-steps", "3", "--pproc-batch-size", "4"]


def stop(running, folder, log, numbers, to=None):
    """Send signals to processes once two shards are there; their exit codes and the seconds they took."""
    processes.wait_for(lambda: len(shards.list_shards(folder)) >= 2, running, log)
    begin = time.monotonic()
    for number in numbers:
        for process in to or running:
            os.kill(process.pid, number)
    for process in running:
        process.join(60)
    return [process.exitcode for process in running], time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_between_batches(ckpt, tmp_path, number):
    log = tmp_path / "log"
    run = processes.start("sample_ddp", ["--ckpt", ckpt, *LONG, "--npz", tmp_path / "a.npz"], log)
    codes, seconds = stop([run], tmp_path / "a.shards", log, [number])
    last = log.read_text().splitlines()[-1]
    assert codes == [0] and seconds < 20
    assert last.startswith(f"stopped by {number.name}: ") and "a.shards" in last
    assert "Traceback" not in log.read_text()
    done = shards.list_shards(tmp_path / "a.shards")
    assert f"{sum(end - first for first, end in done)} samples are in" in last
    for first, end in done:
        assert images.open_npz(shards.shard_path(tmp_path / "a.shards", first, end)).count == end - first


def test_a_second_ctrl_c_ends_at_once(ckpt, tmp_path):
    log = tmp_path / "log"
    flags = ["--ckpt", ckpt, "--num-fid-samples", "8", "--num-steps", "100000", "--npz", tmp_path / "a.npz"]
    run = processes.start("sample_ddp", flags, log)
    processes.wait_for((tmp_path / "a.shards" / ".lock").exists, [run], log)
    time.sleep(0.5)
    os.kill(run.pid, signal.SIGINT)
    run.join(1)
    assert run.is_alive()  # in the middle of its only batch
    os.kill(run.pid, signal.SIGINT)
    run.join(10)
    assert run.exitcode == -signal.SIGINT and "Traceback" not in log.read_text()


def test_a_long_batch_is_given_up(ckpt, tmp_path):
    log = tmp_path / "log"
    flags = ["--ckpt", ckpt, "--num-fid-samples", "8", "--num-steps", "100000", "--npz", tmp_path / "a.npz"]
    run = processes.start("sample_ddp", flags, log, {"GRACE": 0.5})
    processes.wait_for((tmp_path / "a.shards" / ".lock").exists, [run], log)
    os.kill(run.pid, signal.SIGTERM)
    run.join(30)
    assert run.exitcode == 0 and "stopped by SIGTERM: 0 samples" in log.read_text()
    assert not (tmp_path / "a.shards").exists()


def test_two_processes_stop_and_go_on(ckpt, reference, tmp_path):
    """Also where the signal reaches only one of them."""
    log, flags = tmp_path / "log", ["--ckpt", ckpt, *LONG, "--npz", tmp_path / "a.npz"]
    for which in (0, 1):
        running = processes.start_two("sample_ddp", flags, log)
        (tmp_path / "a.shards").mkdir(exist_ok=True)
        done = shards.list_shards(tmp_path / "a.shards")
        processes.wait_for(lambda: len(shards.list_shards(tmp_path / "a.shards")) > len(done), running, log)
        codes, seconds = stop(running, tmp_path / "a.shards", log, [signal.SIGTERM], [running[which]])
        assert codes == [0, 0] and seconds < 30
        assert log.read_text().count("stopped by") == which + 1 and "Traceback" not in log.read_text()


def test_a_signal_while_the_npz_is_written(ckpt, reference, tmp_path, capsys, monkeypatch):
    path, write = tmp_path / "a.npz", images.write_npz

    def interrupted(name, *rest, **arrays):
        if name == str(path):
            os.kill(os.getpid(), signal.SIGTERM)
        write(name, *rest, **arrays)
    monkeypatch.setattr(images, "write_npz", interrupted)
    sample(ckpt, path)
    assert f"stopped by SIGTERM: {N} samples are in" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["a.shards"]
    monkeypatch.undo()
    assert sample(ckpt, path).read_bytes() == reference.read_bytes()


# ---------------------------------------------------------------- the command line

def test_paths_are_those_of_the_samplers():
    """Flags come before the heavy imports, so what they name is spelt out."""
    source = (ROOT / "sample_ddp.py").read_text()
    choices = re.search(r'"--path-type".*?choices=\[(.*?)\]', source, re.S)[1]
    assert [c.strip('" ') for c in choices.split(",")] == list(PATHS)


def test_every_flag_is_used():
    source = (ROOT / "sample_ddp.py").read_text()
    for flag in vars(sample_ddp.parse_args([])):
        uses = len(re.findall(rf"\bargs\.{flag}\b", source)) + source.count(f'"{flag}"')
        assert uses, f"--{flag} is never read"
