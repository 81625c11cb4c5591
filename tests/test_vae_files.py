"""VAE files: CompVis and diffusers names, statistics, every layout that is read, and what is rejected."""
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from models.discriminator import Discriminator
from models.runtime import files, vae_files, weights
from models.vae import AutoencoderKL, VAE_models

NAMES = ["f8d4", "f16d32", "f8d16", "f4d4", "f16d16", "f16d16-ldm"]


def stats_of(channels):
    return (torch.linspace(0.5, 2, channels).view(1, -1, 1, 1),
            torch.linspace(-1, 1, channels).view(1, -1, 1, 1))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def slim(monkeypatch):
    """Weights of an f8d4 whose layers are all as narrow as its first."""
    monkeypatch.setitem(VAE_models, "f8d4", lambda: AutoencoderKL(4, multipliers=(1,) * 4))
    return VAE_models["f8d4"]().state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name):
    with torch.device("meta"):
        state = VAE_models[name]().state_dict()
    there = vae_files.to_diffusers(state)
    ours = (".down.", ".up.", ".mid.", "nin_shortcut", ".norm_out")
    assert not any(piece in k for k in there for piece in ours)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {}
    for k, v in there.items():
        for new, old in old_names.items():
            k = k.replace(f".{new}.", f".{old}.")
        older[k] = v
    assert set(older) != set(there)
    for back in (vae_files.from_diffusers(there), vae_files.from_diffusers(older)):
        assert list(back) == list(state) and all(back[k].shape == state[k].shape for k in state)
    assert vae_files.vae_name(state) == name


def test_kl_16_has_attention_in_the_last_level_of_its_encoder_alone():
    with torch.device("meta"):
        names = VAE_models["f16d16"]().state_dict()
    assert {k[:15] for k in names if ".attn." in k} == {"encoder.down.4."}
    config = vae_files.diffusers_config(dict(names), stats_of(16))
    assert config["down_block_types"][-1] == "AttnDownEncoderBlock2D"
    assert set(config["up_block_types"]) == {"UpDecoderBlock2D"} and config["use_quant_conv"]


def test_every_kind_of_file(tmp_path, close, slim):
    state, stats = slim, stats_of(4)
    vae_files.export_vae(tmp_path / "folder", state, stats)
    vae_files.export_vae(tmp_path / "pipeline" / "vae", state, stats)
    vae_files.export_vae(tmp_path / "half" / "vae", {k: v.half() for k, v in state.items()}, stats)
    os.rename(tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors",
              tmp_path / "half" / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    vae_files.export_vae(tmp_path / "bin", state, stats)
    os.remove(tmp_path / "bin" / "diffusion_pytorch_model.safetensors")
    torch.save(vae_files.to_diffusers(state), tmp_path / "bin" / "diffusion_pytorch_model.bin")
    files.save(state, tmp_path / "bare.pt")
    files.save(state, tmp_path / "with-400k.pt")
    files.save({"latents_scale": stats[0], "latents_bias": stats[1]}, tmp_path / "with-400k-latents-stats.pt")
    ema = {"bn.running_var": stats[0].flatten() ** -2, "bn.running_mean": stats[1].flatten()}
    files.save({"model": {}, "ema": ema, "vae": state, "steps": 1}, tmp_path / "0000001.pt")
    files.save({"vae": state, "vae_ema": state, "latents_scale": stats[0], "latents_bias": stats[1]},
               tmp_path / "refined.pt")
    save_file(vae_files.to_diffusers(state), tmp_path / "alone.safetensors")
    save_file(state, tmp_path / "ae.sft")
    with_stats = {"folder", "pipeline", "half", "bin", "with-400k.pt", "0000001.pt", "refined.pt",
                  "folder/diffusion_pytorch_model.safetensors"}
    for name in with_stats | {"bare.pt", "alone.safetensors", "ae.sft"}:
        found, loaded, its, _ = vae_files.open_vae(str(tmp_path / name))
        expected = {k: v.half() for k, v in state.items()} if name == "half" else state
        assert found == "f8d4" and set(loaded) == set(state), name
        assert all(torch.equal(loaded[k], expected[k]) for k in state), name
        assert (its is not None) == (name in with_stats), name
        for mine, theirs in zip(its or (), stats):
            close(mine, theirs, atol=1e-6)
    _, _, its, _ = vae_files.open_vae(str(tmp_path / "bare.pt"), stats_file="0.2325")  # a scale, as text
    close(its[0], torch.full((1, 4, 1, 1), 0.2325)), close(its[1], torch.zeros(1, 4, 1, 1))


class Callback:
    """Stands for a trainer's class that a checkpoint pickles."""


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    lambda s: {"ema": s, "model": {k: v + 1 for k, v in s.items()}, "optimizer": {}},
    lambda s: {"state_dict": s, "callbacks": {Callback: {"best": torch.tensor(1.0)}}, "epoch": 3},
    lambda s: {**{k: v + 1 for k, v in s.items()}, **{f"model_ema.{k}": v for k, v in s.items()}},
    lambda s: {"state_dict": {"model.x": torch.ones(1)} | {f"first_stage_model.{k}": s[k] for k in s}},
])
def test_wrappers_and_prefixes_of_other_trainers(tmp_path, wrap, slim):
    """Of averages and raw weights the averages are read."""
    torch.save(wrap(slim), tmp_path / "a.ckpt")
    found, loaded, _, _ = vae_files.open_vae(str(tmp_path / "a.ckpt"))
    assert found == "f8d4" and all(torch.equal(loaded[k], v) for k, v in slim.items())


def test_more_than_a_vae(tmp_path, slim):
    """LightningDiT's and LDM's other tensors are left out; an incomplete VAE is rejected."""
    others = {"linear_proj.weight": torch.ones(1), "foundation_model.norm.weight": torch.ones(2),
              "loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    files.save({"state_dict": slim | others}, tmp_path / "a.ckpt")
    _, state, stats, _ = vae_files.open_vae(str(tmp_path / "a.ckpt"))
    assert stats is None and set(state) == set(slim)
    files.save(slim | {"decoder.extra": slim.pop("quant_conv.weight")}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="2 tensors differ, the first is quant_conv.weight: missing"):
        vae_files.open_vae(str(tmp_path / "b.ckpt"))


def frozen_checkpoint(path, stats, vae_ckpt, **more):
    bn = {"bn.running_var": stats[0].flatten() ** -2, "bn.running_mean": stats[1].flatten()}
    args = {"model": "SiT-B/1", "vae": "f8d4", "vae_ckpt": vae_ckpt}
    files.save({"model": {}, "ema": bn, "opt": {}, "args": args, "steps": 1, **more}, path)
    return str(path)


def test_frozen_checkpoint_leads_to_its_vae(tmp_path, close, monkeypatch, slim):
    """By its args, to the VAE that it was trained on, with the statistics of its own batch norm.

    Not to another that was put in its place, or that a relative path means in another folder.
    """
    stats = stats_of(4)
    for k, folder in enumerate(("a", "b")):
        vae_files.export_vae(tmp_path / folder / "vae", {name: v + k for name, v in slim.items()}, stats)
    digest = files.state_digest(vae_files.open_vae(str(tmp_path / "a" / "vae"))[1])
    path = frozen_checkpoint(tmp_path / "0000001.pt", stats, "vae", vae_digest=digest)
    monkeypatch.chdir(tmp_path / "a")
    name, loaded, found, _ = vae_files.open_vae(path, "f8d4")
    assert all(torch.equal(loaded[k], slim[k]) for k in slim)
    close(found[0], stats[0], 1e-6)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match="was trained on another VAE than vae is now; .* --vae-ckpt"):
        vae_files.open_vae(path)
    for vae_ckpt, words in (("pretrained/e2e-vavae/e2e-vavae-400k.pt", "REPA-E/e2e-vavae"),
                            (None, "names none")):
        path = frozen_checkpoint(tmp_path / "0000001.pt", stats, vae_ckpt)
        with pytest.raises((ValueError, OSError), match=words) as error:
            vae_files.open_vae(path)
        assert "\n" not in str(error.value) and "0000001.pt" in str(error.value)


def test_statistics_of_a_config():
    (scale, bias), _ = vae_files.stats_from_config({"scaling_factor": 0.13025}, 4)
    assert scale.shape == bias.shape == (1, 4, 1, 1)
    assert scale.unique().tolist() == pytest.approx([0.13025]) and bias.abs().max() == 0
    (_, bias), _ = vae_files.stats_from_config({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 16)
    assert bias.unique().tolist() == pytest.approx([0.1159])
    for config in ({}, {"scaling_factor": None, "shift_factor": None}):     # diffusers' default
        assert vae_files.stats_from_config(config, 4)[0][0].unique().tolist() == pytest.approx([0.18215])
    for config in ({"shift_factor": float("nan")}, {"latents_mean": [0], "latents_std": [1]},
                   {"latents_mean": [0] * 4, "latents_std": [1, 1, 1, 0]}):
        with pytest.raises(ValueError, match="config.json"):
            vae_files.stats_from_config(config, 4)


NUMBERS = {
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": False},
    "both": {"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": [1.0] * 4,
             "latents_std": [2.0, 1.0, 1.0, 1.0]},
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_export_keeps_the_numbers_that_pipelines_read(tmp_path, slim, kind):
    """Of a diffusers folder, also through a refinement of the decoder and a frozen diffusion model."""
    given, source = NUMBERS[kind], tmp_path / "source"
    vae_files.export_vae(source, slim, stats_of(4))
    dropped = ("scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std")
    config = {k: v for k, v in config_of(source).items() if k not in dropped} | given
    (source / "config.json").write_text(json.dumps(config))
    _, _, stats, numbers = vae_files.open_vae(str(source))
    files.save({"vae_ema": slim, "vae": slim, "latents_scale": stats[0], "latents_bias": stats[1], "steps": 3,
                "args": {}, "source_config": numbers}, tmp_path / "refined.pt")
    frozen_checkpoint(tmp_path / "frozen.pt", stats, str(source))
    for start in ("source", "refined.pt", "frozen.pt"):
        found, out = vae_files.open_vae(str(tmp_path / start))[3], tmp_path / f"out-{start}"
        vae_files.export_vae(out, slim, stats, source=found)
        expected = {"scaling_factor": 0.18215, "shift_factor": 0.0, "force_upcast": True} | given
        assert all(config_of(out)[k] == pytest.approx(v) for k, v in expected.items()), start
        assert ("latents_mean" in config_of(out)) == (kind == "both")


def test_export_of_statistics_alone(tmp_path, slim):
    vae_files.export_vae(tmp_path / "uniform", slim, vae_files.stats_from_config({}, 4)[0])
    config = config_of(tmp_path / "uniform")
    assert (config["scaling_factor"], config["shift_factor"]) == (0.18215, 0) and "latents_mean" not in config
    numbers = {"scaling_factor": 0.18215, "shift_factor": 0.0}
    vae_files.export_vae(tmp_path / "channels", slim, stats_of(4), source=numbers)
    config = config_of(tmp_path / "channels")    # pipelines multiply the two
    assert config["scaling_factor"] == 1 and len(config["latents_std"]) == 4
    with pytest.raises(ValueError, match="--latents-stats"):    # never a silent scale of 1
        vae_files.export_vae(tmp_path / "none", slim)
    assert not (tmp_path / "none").exists()


def test_compvis_export_with_its_discriminator(tmp_path, slim):
    disc = Discriminator().state_dict()
    vae_files.export_vae(tmp_path / "e2e", slim, stats_of(4), "compvis", discriminator=disc)
    names = ["e2e-discriminator-ckpt.pt", "e2e-latents-stats.pt", "e2e.pt"]
    assert sorted(os.listdir(tmp_path / "e2e")) == names
    again = weights.discriminator(str(tmp_path / "e2e" / "e2e.pt"), "f8d4")     # the VAE's name leads to it
    assert files.state_digest(again) == files.state_digest(disc)
    vae_files.export_vae(tmp_path / "bare", slim, None, "compvis")
    assert os.listdir(tmp_path / "bare") == ["bare.pt"]


def test_an_export_never_replaces_anything(tmp_path, slim):
    vae_files.export_vae(tmp_path / "vae", slim, stats_of(4), "compvis")
    before = (tmp_path / "vae" / "vae.pt").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        vae_files.export_vae(tmp_path / "vae", {k: v + 1 for k, v in slim.items()}, stats_of(4), "compvis")
    assert (tmp_path / "vae" / "vae.pt").read_bytes() == before
    with pytest.raises(ValueError, match="--format compvis"):   # its group norms have no place in a config
        vae_files.export_vae(tmp_path / "narrow", VAE_models["f4d4"]().state_dict(), stats_of(4))
    assert os.listdir(tmp_path) == ["vae"]


def test_rejected(tmp_path, slim):
    (tmp_path / "empty").mkdir()
    for name, content in {
            "no_vae.pt": {"a": torch.zeros(1)}, "vae.pt": slim,
            "levels.pt": slim | {"decoder.conv_in.weight": torch.zeros(8, 7, 3, 3)},
            "two.pt": {"latents_scale": torch.ones(2), "latents_bias": torch.ones(2)},
            "zero.pt": {"latents_scale": torch.zeros(4), "latents_bias": torch.ones(4)}}.items():
        files.save(content, tmp_path / name)
    for name, message, *more in (
            ("empty", "config.json"), ("no_vae.pt", "not the weights of a VAE"),
            ("missing.pt", "no such VAE"), ("levels.pt", "7 latent channels"),
            ("vae.pt", "of type f8d4, not f16d32", "f16d32"),
            ("vae.pt", "two.pt: no latents_scale", None, "two.pt"), ("vae.pt", "zero.pt", None, "zero.pt")):
        with pytest.raises((ValueError, OSError), match=message) as error:
            vae_files.open_vae(str(tmp_path / name), more[0] if more else None,
                               str(tmp_path / more[1]) if more[1:] else None)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_hub_names(tmp_path, monkeypatch, slim):
    """A released repository, a diffusers folder, and a pipeline with half-precision weights alone."""
    folders = [tmp_path / "hub" / name for name in ("sd/vae", "a/pipeline/vae", "REPA-E/sdvae")]
    for folder, format in zip(folders, ("diffusers", "diffusers", "compvis")):
        vae_files.export_vae(folder, slim, stats_of(4), format)
    for folder, old, new in (
            (folders[1], "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
            (folders[2], "sdvae.pt", "sdvae-f8d4.pt"),
            (folders[2], "sdvae-latents-stats.pt", "sdvae-f8d4-latents-stats.pt")):
        (folder / old).rename(folder / new)

    def hub_file(repo, name):
        path = tmp_path / "hub" / repo / name
        if not path.exists():
            raise OSError(f"{repo}/{name}: not there")
        return str(path)
    monkeypatch.setattr(files, "hub_file", hub_file)
    monkeypatch.chdir(tmp_path)
    for name in ("sd/vae", "a/pipeline", "REPA-E/sdvae"):
        found, _, stats, _ = vae_files.open_vae(name)
        assert found == "f8d4" and torch.allclose(stats[0], stats_of(4)[0])
    with pytest.raises(OSError, match="no/where/vae/config.json: not there"):
        vae_files.open_vae("no/where")
