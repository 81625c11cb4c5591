"""sample_ddp.py: samples depend on seed and index alone, runs stop and resume, released files load."""
import json
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from fill import fill_
from PIL import Image

import sample_ddp
from models import samplers
from models.losses import interpolant
from models.runtime import files
from models.sit import SiT_models
from models.vae import VAE_models

N = 19
FAST = ["--num-fid-samples", str(N), "--num-steps", "3", "--cfg-scale", "1.5", "--guidance-high", "0.7"]
LONG = ["--num-fid-samples", "40", "--num-steps", "20"]
SHARD = {"SHARD": 8}


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


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Of 8 samples, so that 19 are three shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ddp, "SHARD", SHARD["SHARD"])
        yield


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run") / "exp" / "checkpoints" / "0000003.pt")


@pytest.fixture(scope="module")
def reference(ckpt, tmp_path_factory):
    """The .npz of one process, as the other runs must make it too."""
    path = tmp_path_factory.mktemp("reference") / "a.npz"
    sample_ddp.main(["--ckpt", ckpt, *FAST, "--npz", str(path)])
    return path


@pytest.fixture(scope="module")
def long_reference(ckpt, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "long.npz"
    sample_ddp.main(["--ckpt", ckpt, *LONG, "--npz", str(path)])
    return path


def sample(ckpt, npz, *flags):
    sample_ddp.main(["--ckpt", ckpt, *FAST, "--npz", str(npz), *flags])
    return npz


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_contents(ckpt, reference):
    with np.load(reference) as content:
        images, labels, protocol = content["arr_0"], content["arr_1"], json.loads(str(content["protocol"]))
    assert images.shape == (N, 32, 32, 3) and images.dtype == np.uint8 and images.std() > 10
    assert len(np.unique(images, axis=0)) == N
    assert labels.tolist() == samplers.sample_labels(0, range(N), 10).tolist()
    assert protocol["checkpoint_sha256"] == files.sha256(ckpt) and protocol["resolution"] == 32
    assert (protocol["solver"], protocol["num_steps"], protocol["cfg_scale"]) == ("euler-maruyama", 3, 1.5)
    assert json.loads(reference.with_suffix(".json").read_text()) == protocol
    assert names(reference.parent) == ["a.json", "a.npz", "a.png"]
    assert Image.open(reference.with_suffix(".png")).size == (3 * 66, 3 * (64 + 14 + 2))


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


def test_batch_size_threads_and_shards_do_not_matter(ckpt, reference, tmp_path, monkeypatch):
    for threads, size, shard in ((1, 7, 8), (3, 1, 12), (3, 64, 64)):
        monkeypatch.setattr(sample_ddp, "SHARD", shard)
        torch.set_num_threads(threads)
        path = sample(ckpt, tmp_path / f"{size}.npz", "--pproc-batch-size", str(size))
        assert path.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("flags, solver", [
    (["--mode", "ode"], "euler"), (["--mode", "ode", "--heun"], "heun"),
    (["--mixed-precision", "bf16"], "euler-maruyama")])
def test_every_solver(ckpt, tmp_path, flags, solver):
    path = sample(ckpt, tmp_path / "a.npz", "--num-fid-samples", "4", "--classes", "2,7", *flags)
    protocol = json.loads((tmp_path / "a.json").read_text())
    assert protocol["solver"] == solver and protocol["classes"] == [2, 7]
    assert np.load(path)["arr_1"].tolist() == [2, 7, 2, 7]


def test_equal_labels_and_folder_flags(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample_ddp.main(["--exp-path", str(Path(ckpt).parent.parent), "--train-steps", "3", *FAST,
                     "--num-fid-samples", "20", "--label-sampling", "equal"])
    with np.load(tmp_path / "samples" / "run-0000003.npz") as content:
        assert np.bincount(content["arr_1"]).tolist() == [2] * 10


def test_a_frozen_runs_vae(ckpt, reference, tmp_path, capsys):
    """Its args name it, here in args.json of the run folder; another one at that path is an error.

    Any checkpoint can be decoded with another VAE by --vae-ckpt.
    """
    content = files.load(ckpt)
    files.save(content["vae"], tmp_path / "vae.pt")
    frozen = tiny_checkpoint(tmp_path / "exp" / "checkpoints" / "0000003.pt", vae=None, args=None,
                             vae_digest=files.state_digest(content["vae"]))
    args = dict(content["args"], vae_ckpt=str(tmp_path / "vae.pt"))
    (tmp_path / "exp" / "args.json").write_text(json.dumps(args))
    for flags in ([], ["--vae-ckpt", str(tmp_path / "vae.pt")]):
        path = sample(frozen, tmp_path / f"{len(flags)}.npz", *flags)
        assert np.array_equal(np.load(path)["arr_0"], np.load(reference)["arr_0"])
    files.save(content["vae"] | {"decoder.conv_out.bias": torch.zeros(3)}, tmp_path / "vae.pt")
    assert "vae.pt" in rejected(capsys, "--ckpt", frozen, *FAST, "--npz", tmp_path / "b.npz")
    other = sample(ckpt, tmp_path / "c.npz", "--vae-ckpt", str(tmp_path / "vae.pt"))
    assert not np.array_equal(np.load(other)["arr_0"], np.load(reference)["arr_0"])


# ---------------------------------------------------------------- mistakes

BAD = [
    (["--cfg-scale", "0.5"], "--cfg-scale 0.5 must be"),
    (["--guidance-low", "0.8", "--guidance-high", "0.2"], "0.8, 0.2"),
    (["--guidance-high", "nan"], "guidance interval"),
    (["--heun"], "--mode ode"),
    (["--classes", "3,10"], "class 10"),
    (["--vae-ckpt", "nowhere.pt"], "nowhere.pt"),
]


def rejected(capsys, *flags):
    """stderr of a run that must end in one line and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample_ddp.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_flags(ckpt, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in rejected(capsys, "--ckpt", ckpt, *flags)
    assert names(tmp_path) == []


def test_bad_checkpoints(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = files.load(ckpt)
    no_null = dict(content["ema"], **{"y_embedder.embedding_table.weight": torch.zeros(10, 192)})
    wide = dict(content["ema"], **{"final_layer.linear.bias": torch.zeros(3)})
    broken = {"null class": dict(ema=no_null), "another architecture": dict(ema=wide),
              "none of": dict(args={"model": "SiT"}), "names none": dict(vae=None)}
    for message, changes in broken.items():
        path = tiny_checkpoint(tmp_path / "in" / "bad.pt", **changes)
        assert message in rejected(capsys, "--ckpt", path, "--cfg-scale", "2"), message
    files.save(content["vae"], tmp_path / "in" / "bad.pt")
    assert "no 'ema'" in rejected(capsys, "--ckpt", path)
    assert "0000004.pt" in rejected(capsys, "--exp-path", Path(ckpt).parent.parent, "--train-steps", "4")
    assert "--ckpt FILE or" in rejected(capsys)
    assert names(tmp_path) == ["in"]


def test_samples_that_are_not_finite_end_the_run(ckpt, tmp_path, capsys):
    content = files.load(ckpt)
    for value, words in ((float("nan"), "ema.final_layer.linear.bias"), (3e38, "not finite")):
        ema = dict(content["ema"], **{"final_layer.linear.bias": torch.full((16,), value)})
        torch.save(content | {"ema": ema}, path := tmp_path / "nan.pt")  # files.save rejects NaN
        assert words in rejected(capsys, "--ckpt", path, *FAST, "--npz", tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


# ---------------------------------------------------------------- outputs

def test_a_finished_file_is_left_alone(ckpt, reference, tmp_path, monkeypatch):
    """Also one whose protocol has entries of an earlier version."""
    content = dict(np.load(reference))
    older = json.loads(str(content["protocol"])) | {"code_sha256": "0", "torch": "2.0"}
    content["protocol"] = json.dumps(older)
    np.savez(path := tmp_path / "a.npz", **content)
    before = path.read_bytes()
    monkeypatch.setattr(sample_ddp, "integrate", lambda *_: pytest.fail("sampled again"))
    sample(ckpt, path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.json", "a.npz", "a.png"]


def test_output_of_other_settings_is_not_touched(ckpt, reference, tmp_path, capsys):
    path = tmp_path / "a.npz"
    path.write_bytes(reference.read_bytes())
    flags = ["--ckpt", ckpt, *FAST, "--npz", path]
    assert "made with cfg_scale 1.5, this run has 3.0" in rejected(capsys, *flags, "--cfg-scale", "3")
    np.savez(path, np.zeros((N, 32, 32, 3), np.uint8))
    assert "made with checkpoint_sha256 None" in rejected(capsys, *flags)
    assert names(tmp_path) == ["a.npz"]
    protocol = json.loads(reference.with_suffix(".json").read_text()) | {"num_fid_samples": 128}
    files.save_json(protocol, tmp_path / "b.shards" / "protocol.json")      # of a larger run, unfinished
    (tmp_path / "b.shards" / "000000.npz").write_bytes(b"samples")
    error = rejected(capsys, *flags[:-1], tmp_path / "b.npz")
    assert f"b.shards: exists, made with num_fid_samples 128, this run has {N}" in error
    assert (tmp_path / "b.shards" / "000000.npz").read_bytes() == b"samples"


# ---------------------------------------------------------------- kills, several processes

def shards_in(folder):
    return list(folder.glob("0*.npz"))


def test_killed_and_resumed(ckpt, long_reference, tmp_path):
    """By one process and then by two."""
    flags, log = ["--ckpt", ckpt, *LONG, "--npz", tmp_path / "a.npz"], tmp_path / "log"
    run = processes.start("sample_ddp", [*flags, "--pproc-batch-size", "3"], log, SHARD)
    processes.wait_for(lambda: shards_in(tmp_path / "a.shards"), [run], log)
    processes.kill(run)
    before = {p.name: p.stat().st_mtime_ns for p in shards_in(tmp_path / "a.shards")}
    assert 0 < len(before) < 5 and not (tmp_path / "a.npz").exists()
    (tmp_path / "a.shards" / ".000004.npz.1.tmp").write_bytes(bytes(1000))  # what a kill can leave
    both = processes.start_two("sample_ddp", flags, log, SHARD)
    processes.wait_for(lambda: len(shards_in(tmp_path / "a.shards")) > len(before), both, log)
    after = {p.name: p.stat().st_mtime_ns for p in shards_in(tmp_path / "a.shards")}
    processes.wait_for(lambda: all(p.exitcode == 0 for p in both), both, log)
    assert not after or after.items() >= before.items()     # nothing is made twice
    assert (tmp_path / "a.npz").read_bytes() == long_reference.read_bytes()
    assert names(tmp_path) == ["a.json", "a.npz", "a.png", "log"]


def test_processes_with_other_settings_are_rejected(ckpt, tmp_path):
    """Half of the samples by another seed would pass for a sound file."""
    flags = ["--ckpt", ckpt, *FAST, "--npz", tmp_path / "a.npz"]
    both = [processes.start("sample_ddp", [*flags, "--global-seed", seed], tmp_path / f"log{seed}", **rank)
            for seed, rank in enumerate(processes.rendezvous())]
    both[0].join(60)
    processes.kill(both[1])     # it waits for torchrun to end it
    assert both[0].exitcode == 2
    assert "global_seed differs between processes: 0 in rank 0, 1 in" in (tmp_path / "log0").read_text()
    assert not (tmp_path / "a.npz").exists()
