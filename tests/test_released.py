"""What the reference wrote: its checkpoints are sampled from, and training starts from their weights."""
import argparse
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from fill import fill_

import sample_ddp
import train_repae_e as train
from models.discriminator import Discriminator
from models.runtime import files
from models.sit import SiT_models
from models.vae import VAE_models

KEYS = json.loads((GOLDEN / "keys_checkpoint.json").read_text())
STEP, HOG = 400000, 109     # HOG: width of the tokens of --encoder hog
TINY = {"model": "SiT-Ti/4", "vae": "f4d4", "resolution": 32, "num_classes": 10, "encoder_depth": 3,
        "batch_size": 64, "enc_type": "hog"}


def released(path, args=TINY, frozen=False, width=HOG):
    """Write what the reference writes: names and args of golden/keys_checkpoint.json.

    Its args are an argparse.Namespace, its position table was trained. With `frozen`, as its latent script
    writes: no VAE. Returns (content, VAE).
    """
    args = KEYS["ldm_only_args" if frozen else "repae_args"] | args
    vae, disc = fill_(VAE_models[args["vae"]]()), fill_(Discriminator())
    sit = fill_(SiT_models[args["model"]](
        input_size=args["resolution"] // vae.downsample, in_channels=vae.latent_channels,
        num_classes=args["num_classes"], encoder_depth=args["encoder_depth"], z_dims=[width]))
    with torch.no_grad():
        sit.pos_embed += 0 if frozen else 0.01
    model = sit.state_dict()
    content = {"model": model, "ema": {k: v * 1 for k, v in model.items()}, "opt": {},
               "args": argparse.Namespace(**args), "steps": STEP}
    if not frozen:
        content |= {"vae": vae.state_dict(), "discriminator": disc.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return content, vae


def run(folder, *flags, steps=1):
    """Train from the flags given up to `steps`; returns (content of the last checkpoint, text of the log)."""
    train.main([str(f) for f in (
        "--preset", "demo", "--model", "SiT-Ti/4", "--vae", "f4d4", "--batch-size", 4, "--disc-weight", 0.1,
        "--disc-start", 1, "--sampling-steps", 0, "--log-every", 1, "--output-dir", folder,
        "--max-train-steps", steps, *flags)])
    state = files.load(folder / "demo" / "checkpoints" / f"{steps:07d}.pt")
    return state, (folder / "demo" / "log.txt").read_text()


def sample(path):
    """Four samples of a checkpoint, uint8 [4, H, W, 3]."""
    npz = path.with_suffix(".npz")
    sample_ddp.main(["--ckpt", str(path), "--npz", str(npz), "--num-fid-samples", "4", "--num-steps", "2",
                     "--cfg-scale", "2"])
    return np.load(npz)["arr_0"]


STILL = ["--learning-rate", 1e-12, "--vae-learning-rate", 1e-12, "--disc-learning-rate", 1e-12]


def test_init_from_takes_the_weights_alone(tmp_path, capsys):
    """The average, VAE and discriminator of a released file.

    Samples are the same from the file and from a run that starts from it.
    """
    path = tmp_path / "0400000.pt"
    content, _ = released(path, width=64)    # the alignment heads are of another encoder
    content["model"] = {k: torch.zeros_like(v) for k, v in content["model"].items()}
    torch.save(content, path)
    state, log = run(tmp_path, "--init-from", path, *STILL)
    assert "from step 0\n" in log and f"weights of {path}, but new alignment heads" in capsys.readouterr().out
    for key, source in (("model", "ema"), ("ema", "ema"), ("vae", "vae"), ("discriminator", "discriminator")):
        for name, value in content[source].items():
            if value.is_floating_point() and "running" not in name and not name.startswith("projectors."):
                torch.testing.assert_close(state[key][name], value, atol=1e-6, rtol=1e-5, msg=f"{key}.{name}")
    variances = (s["ema"]["bn.running_var"] for s in (state, content))
    torch.testing.assert_close(*variances, rtol=0.1, atol=0.01)
    state["ema"] |= {k: v for k, v in content["ema"].items() if k.startswith("bn.")}    # they follow
    files.save(state, tmp_path / "again.pt")
    first = sample(path)
    assert first.std() > 1 and np.abs(sample(tmp_path / "again.pt").astype(int) - first).max() <= 1
    _, log = run(tmp_path, "--init-from", path, *STILL, steps=2)    # again: its own checkpoint comes first
    assert "from step 1 of" in log


def test_sources_that_do_not_fit(tmp_path, capsys):
    """Another architecture, no file, and, in the run folder, a checkpoint that this code did not write."""
    released(tmp_path / "larger.pt", TINY | {"model": "SiT-Ti/2"})
    (tmp_path / "theirs" / "demo" / "checkpoints").mkdir(parents=True)
    released(tmp_path / "theirs" / "demo" / "checkpoints" / "0400000.pt")
    for name, flags, words in (("run", ["--init-from", tmp_path / "larger.pt"], "larger.pt"),
                               ("run", ["--init-from", tmp_path / "none.pt"], "none.pt"),
                               ("theirs", [], "--init-from")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / name, *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "demo" / "checkpoints").exists()


def test_frozen_checkpoint_leads_to_the_vae_that_it_names(tmp_path, capsys):
    """Sampling and training from it; where the file is missing, the error says where to get it."""
    path, place = tmp_path / "release" / "0400000.pt", tmp_path / "pretrained" / "e2e-vavae-400k.pt"
    content, vae = released(path, TINY | {"vae_ckpt": str(place)}, frozen=True)
    flags = "--init-from", path, "--freeze-vae"
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    error = capsys.readouterr().err
    assert all(words in error for words in ("e2e-vavae-400k.pt", "--vae-ckpt", "REPA-E/e2e-vavae"))
    place.parent.mkdir()
    files.save(vae.state_dict(), place)
    stats = dict.fromkeys(("latents_scale", "latents_bias"), torch.full((1, 4, 1, 1), 0.5))
    files.save(stats, place.with_name("e2e-vavae-400k-latents-stats.pt"))
    state, _ = run(tmp_path, *flags)
    torch.testing.assert_close(state["model"]["bn.running_var"], content["model"]["bn.running_var"])
    assert state["vae_digest"] == files.state_digest(vae)
    assert sample(path).shape == (4, 32, 32, 3)
    files.save(fill_(VAE_models["f4d4"](), "another").state_dict(), place)
    own = tmp_path / "demo" / "checkpoints" / "0000001.pt"
    for again in (lambda: run(tmp_path, *flags, steps=2), lambda: sample(own)):     # another VAE by now
        with pytest.raises(SystemExit):
            again()
        assert "was trained on another VAE" in capsys.readouterr().err


def test_init_from_comes_after_flags_and_before_presets():
    def of(*flags):
        args = train.parse_args(["--preset", "vavae", *flags])
        return args.vae_ckpt, args.disc_ckpt
    assert of() == ("REPA-E/vavae", "REPA-E/vavae")
    assert of("--init-from", "run.pt") == ("run.pt", "run.pt")
    assert of("--init-from", "run.pt", "--vae-ckpt", "my.pt") == ("my.pt", "run.pt")
