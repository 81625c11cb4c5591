"""VAE files: CompVis and diffusers names, statistics, and what is refused."""
import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from models.discriminator import Discriminator
from models.runtime import files, vae_files, weights
from models.vae import AutoencoderKL, VAE_models

NAMES = ["f8d4", "f16d32", "f8d16", "f4d4"]


def stats_of(channels):
    return torch.linspace(0.5, 2, channels).view(1, -1, 1, 1), torch.linspace(-1, 1, channels).view(
        1, -1, 1, 1
    )


@pytest.fixture
def slim(monkeypatch):
    """Weights of an f8d4 whose layers are all as narrow as its first."""
    monkeypatch.setitem(VAE_models, "f8d4", lambda: AutoencoderKL(4, multipliers=(1,) * 4))
    return VAE_models["f8d4"]().state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name):
    state = VAE_models[name]().state_dict()
    there = vae_files.to_diffusers(state)
    assert not any(
        piece in k for k in there for piece in (".down.", ".up.", ".mid.", "nin_shortcut", ".norm_out")
    )
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {}
    for k, v in there.items():
        for new, old in old_names.items():
            k = k.replace(f".{new}.", f".{old}.")
        older[k] = v
    assert set(older) != set(there)
    for back in (vae_files.from_diffusers(there), vae_files.from_diffusers(older)):
        assert list(back) == list(state) and all(torch.equal(back[k], state[k]) for k in state)
    assert vae_files.vae_name(state) == name


@pytest.mark.parametrize("name", NAMES[:3])
def test_files_round_trip(name, tmp_path, close):
    """CompVis -> diffusers -> CompVis through files; all widths are the smallest of the real ones, the names
    the same."""
    narrow = {
        "f8d4": dict(latent_channels=4, multipliers=(1,) * 4),
        "f8d16": dict(latent_channels=16, multipliers=(1,) * 4, quant=False),
        "f16d32": dict(latent_channels=32, multipliers=(1,) * 5, attention_levels=(4,)),
    }
    vae = AutoencoderKL(**narrow[name])
    state, stats = {k: v.bfloat16() for k, v in vae.state_dict().items()}, stats_of(vae.latent_channels)
    vae_files.export_vae(tmp_path / "a", state, stats, "compvis")
    source = str(tmp_path / "a" / "a.pt")
    for folder, format, file in (("b", "diffusers", ""), ("c", "compvis", "c.pt")):
        vae_files.export_vae(tmp_path / folder, *vae_files.load_vae_file(source), format)
        source = os.path.join(tmp_path, folder, file)
    back, again = vae_files.load_vae_file(source)
    assert vae_files.vae_name(back) == name and set(back) == set(state)
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state.items())
    for mine, theirs in zip(again, stats):
        close(mine, theirs, 0, 2e-7)


def test_every_kind_of_file(tmp_path, close, capfd, slim):
    state, stats = slim, stats_of(4)
    vae_files.export_vae(tmp_path / "folder", state, stats)
    vae_files.export_vae(tmp_path / "pipeline" / "vae", state, stats)
    files.save(state, tmp_path / "bare.pt")
    files.save(state, tmp_path / "with-400k.pt")
    files.save({"latents_scale": stats[0], "latents_bias": stats[1]}, tmp_path / "with-400k-latents-stats.pt")
    ema = {"bn.running_var": stats[0].flatten() ** -2, "bn.running_mean": stats[1].flatten()}
    files.save({"model": {}, "ema": ema, "vae": state, "steps": 1}, tmp_path / "0000001.pt")
    save_file(vae_files.to_diffusers(state), tmp_path / "alone.safetensors")
    save_file(state, tmp_path / "compvis.safetensors")
    with_stats = {
        "folder",
        "pipeline",
        "with-400k.pt",
        "0000001.pt",
        "folder/diffusion_pytorch_model.safetensors",
    }
    for name in with_stats | {"bare.pt", "alone.safetensors", "compvis.safetensors"}:
        found, loaded, its = vae_files.open_vae(str(tmp_path / name))
        assert (
            found == "f8d4"
            and set(loaded) == set(state)
            and all(torch.equal(loaded[k], state[k]) for k in state)
        ), name
        assert (its is not None) == (name in with_stats), name
        for mine, theirs in zip(its or (), stats):
            close(mine, theirs, atol=1e-6)
    assert capfd.readouterr().err == ""  # nothing was left out


@pytest.mark.parametrize(
    "beside",
    [
        {"linear_proj.weight": 1, "foundation_model.model.norm.weight": 2},
        {"loss.logvar": 0},
        {"model_ema.decay": 0, "model_ema.num_updates": 0, "loss.discriminator.main.0.weight": 3},
        {"model.diffusion_model.out.0.weight": 1, "cond_stage_model.x": 1},
    ],
)
def test_more_than_a_vae(tmp_path, capfd, beside, slim):
    """LightningDiT's, LDM's, sd-vae-ft-mse's and Stable Diffusion's: what is no VAE is left out and said."""
    state, prefix = slim, "first_stage_model." if "cond_stage_model.x" in beside else ""
    content = {prefix + k: v for k, v in state.items()} | {k: torch.ones(n) for k, n in beside.items()}
    files.save({"state_dict": content, "epoch": 3}, tmp_path / "a.ckpt")
    loaded, stats = vae_files.load_vae_file(str(tmp_path / "a.ckpt"))
    assert (
        stats is None and set(loaded) == set(state) and all(torch.equal(loaded[k], state[k]) for k in state)
    )
    note = capfd.readouterr().err
    if not prefix:
        assert note.count("\n") == 1 and "a.ckpt" in note and "left out" in note
        assert f"{len(beside)} tensors" in note and {k.split(".")[0] for k in beside} <= set(
            re.findall(r"\w+", note)
        )
    for missing in ("decoder.up.0.block.0.conv1.bias", "quant_conv.weight"):
        cut = {k: v for k, v in content.items() if k != prefix + missing}
        files.save(cut, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=f"1 missing .first: {missing}"):
            vae_files.open_vae(str(tmp_path / "b.ckpt"))
    files.save(content | {f"{prefix}decoder.extra": torch.zeros(1)}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="1 not known here .first: decoder.extra"):
        vae_files.open_vae(str(tmp_path / "b.ckpt"))


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_averages_are_taken(tmp_path, capfd, squeezed, both, slim):
    """model_ema.*, with dots as most trainers write it, or without as LDM does; with the raw weights beside
    it or alone."""
    state = slim
    content = {f"model_ema.{k.replace('.', '') if squeezed else k}": v + 1 for k, v in state.items()}
    content |= {"model_ema.decay": torch.tensor(0.999)} | (state if both else {})
    files.save(content, tmp_path / "a.pt")
    _, loaded, _ = vae_files.open_vae(str(tmp_path / "a.pt"))
    assert (
        all(torch.equal(loaded[k], v + 1) for k, v in state.items()) and "averages" in capfd.readouterr().err
    )


def frozen_checkpoint(path, stats, vae_ckpt):
    bn = {"bn.running_var": stats[0].flatten() ** -2, "bn.running_mean": stats[1].flatten()}
    args = {"model": "SiT-B/1", "vae": "f8d4", "vae_ckpt": vae_ckpt}
    files.save({"model": {}, "ema": bn, "opt": {}, "args": args, "steps": 1}, path)
    return str(path)


def test_frozen_checkpoint_leads_to_its_vae(tmp_path, close, slim):
    """By its args or args.json, to a file or a folder, with the statistics that it was trained with."""
    state, stats = slim, stats_of(4)
    vae_files.export_vae(tmp_path / "folder", state)
    for kind in ("folder", "folder/diffusion_pytorch_model.safetensors"):
        path = frozen_checkpoint(tmp_path / "0000001.pt", stats, str(tmp_path / kind))
        name, loaded, found = vae_files.open_vae(path, "f8d4")
        assert all(torch.equal(loaded[k], state[k]) for k in state)
        close(found[0], stats[0], 1e-6)
    for vae_ckpt, words in (
        ("pretrained/e2e-vavae/e2e-vavae-400k.pt", "REPA-E/e2e-vavae"),
        (None, "names none"),
        (str(tmp_path / "0000001.pt"), "leads back"),
    ):
        path = frozen_checkpoint(tmp_path / "0000001.pt", stats, vae_ckpt)
        with pytest.raises((ValueError, OSError), match=words) as error:
            vae_files.open_vae(path)
        assert "\n" not in str(error.value) and "0000001.pt" in str(error.value)


def test_statistics_of_a_config():
    scale, bias = vae_files.stats_from_config({"scaling_factor": 0.13025}, 4)
    assert scale.shape == bias.shape == (1, 4, 1, 1)
    assert scale.unique().tolist() == pytest.approx([0.13025]) and bias.abs().max() == 0
    scale, bias = vae_files.stats_from_config({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 16)
    assert bias.unique().tolist() == pytest.approx([0.1159])
    for config in (
        {},
        {"scaling_factor": None, "shift_factor": None},
    ):  # sd-vae-ft-mse states none: diffusers' default
        assert vae_files.stats_from_config(config, 4)[0].unique().tolist() == pytest.approx([0.18215])
    for config in (
        {"scaling_factor": "x"},
        {"scaling_factor": 0},
        {"scaling_factor": -1.0},
        {"shift_factor": float("nan")},
        {"latents_mean": "abcd", "latents_std": [1] * 4},
        {"latents_mean": [0] * 4, "latents_std": [1, 1, 1, 0]},
        {"latents_mean": [0] * 4, "latents_std": [1, 1, 1, None]},
        {"latents_mean": [[0]] * 4, "latents_std": [1] * 4},
    ):
        with pytest.raises(ValueError, match="config.json") as error:
            vae_files.stats_from_config(config, 4)
        assert "\n" not in str(error.value)


def test_export_keeps_the_numbers_that_pipelines_read(tmp_path, close, slim):
    """Through a refinement as well; per-channel statistics are written with a scale of 1, and it is said who
    reads them."""
    state, uniform = slim, vae_files.stats_from_config({}, 4)
    numbers = {
        "plain": {},
        "sdxl": {"scaling_factor": 0.13025, "force_upcast": False},
        "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        "both": {
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
            "latents_mean": [1.0] * 4,
            "latents_std": [2.0, 1.0, 1.0, 1.0],
        },
    }
    for kind, given in numbers.items():
        source, expected = (
            tmp_path / kind,
            {"scaling_factor": 0.18215, "shift_factor": 0.0, "force_upcast": True} | given,
        )
        vae_files.export_vae(source, state)
        config = json.loads((source / "config.json").read_text())
        config = {
            k: v for k, v in config.items() if k not in ("scaling_factor", "shift_factor", "force_upcast")
        } | given
        (source / "config.json").write_text(json.dumps(config))
        stats = vae_files.load_vae_file(str(source))[1]
        refined = {
            "vae_ema": state,
            "vae": state,
            "latents_scale": stats[0],
            "latents_bias": stats[1],
            "steps": 3,
        }
        for encoder in (False, True):
            files.save(
                refined | {"args": {}, "source_config": vae_files.source_config(str(source), encoder)},
                tmp_path / f"{kind}{encoder}.pt",
            )
        for start in (source, tmp_path / f"{kind}False.pt"):
            found = vae_files.source_config(str(start))
            text = vae_files.export_vae(tmp_path / "out", state, stats, source=found, force=True)
            wrote = json.loads((tmp_path / "out" / "config.json").read_text())
            assert all(wrote[k] == pytest.approx(v) for k, v in expected.items()), (kind, start)
            assert ("latents_mean" in wrote) == (kind == "both") == ("Stable Diffusion XL" in text)
        assert vae_files.source_config(str(tmp_path / f"{kind}True.pt")) == {
            "force_upcast": expected["force_upcast"]
        }
    vae_files.export_vae(
        tmp_path / "out", state, uniform, force=True
    )  # the source is gone: its scalar is in the statistics
    wrote = json.loads((tmp_path / "out" / "config.json").read_text())
    assert wrote["scaling_factor"] == 0.18215 and wrote["shift_factor"] == 0.0 and "latents_mean" not in wrote
    text = vae_files.export_vae(
        tmp_path / "out",
        state,
        stats_of(4),
        source={"scaling_factor": 0.18215, "shift_factor": 0.0},
        force=True,
    )
    wrote = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        wrote["scaling_factor"] == 1
        and len(wrote["latents_std"]) == 4
        and "DiT's" in text
        and "\n" not in text
    )
    assert (
        vae_files.source_config(str(tmp_path / "plain" / "diffusion_pytorch_model.safetensors"))[
            "force_upcast"
        ]
        is True
    )


def test_compvis_export_with_its_discriminator(tmp_path, slim):
    state, disc = slim, Discriminator().state_dict()
    text = vae_files.export_vae(tmp_path / "e2e", state, stats_of(4), "compvis", discriminator=disc)
    assert set(os.listdir(tmp_path / "e2e")) == {
        "e2e.pt",
        "e2e-latents-stats.pt",
        "e2e-discriminator-ckpt.pt",
    }
    assert "discriminator" in text
    again = weights.discriminator(str(tmp_path / "e2e" / "e2e.pt"), "f8d4")  # the VAE's name leads to it
    assert weights.state_digest(again) == weights.state_digest(disc)
    vae_files.export_vae(tmp_path / "e2e", state, None, "compvis", force=True)
    assert os.listdir(tmp_path / "e2e") == ["e2e.pt"]


def test_export_killed_between_its_renames(tmp_path, slim):
    """The old export lies beside under another name then; the next export puts it back before anything
    else."""
    state = slim
    vae_files.export_vae(tmp_path / "vae", state, None, "compvis")
    os.rename(tmp_path / "vae", tmp_path / ".vae.4194303@host.old")
    with pytest.raises(ValueError, match="--force"):
        vae_files.export_vae(tmp_path / "vae", state, None, "compvis")
    assert os.listdir(tmp_path) == ["vae"]


def test_refused(tmp_path, slim):
    state = slim
    vae_files.export_vae(tmp_path / "other", state)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for folder, changes in (("other", {"_class_name": "UNet2DModel"}), ("groups", {"norm_num_groups": 16}),
                            ("counts", {"latents_mean": [0.0], "latents_std": [1.0]})):
        vae_files.export_vae(tmp_path / folder, state, force=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    files.save({"a": torch.zeros(1)}, tmp_path / "no_vae.pt")
    files.save({"vae": [1]}, tmp_path / "a_list_in_it.pt")
    torch.save([1, 2], tmp_path / "a_list.pt")
    for key, shape in (("levels", (8, 7, 3, 3)), ("shape", (4,))):
        files.save(state | {"decoder.conv_in.weight": torch.zeros(shape)}, tmp_path / f"{key}.pt")
    files.save(state, tmp_path / "vae.pt")
    files.save({"latents_scale": torch.ones(2), "latents_bias": torch.ones(2)}, tmp_path / "two.pt")
    files.save({"latents_scale": torch.zeros(4), "latents_bias": torch.ones(4)}, tmp_path / "zero.pt")
    files.save({"latents_scale": [1.0], "latents_bias": torch.ones(4)}, tmp_path / "odd.pt")
    for name, message, *more in (
        ("other", "UNet2DModel"),
        ("empty", "config.json"),
        ("counts", "4 values"),
        ("groups", "norm_num_groups 16"),
        ("broken", "not valid JSON"),
        ("no_vae.pt", "not the weights of a VAE"),
        ("a_list.pt", "a list"),
        ("missing.pt", "no such VAE"),
        ("a_list_in_it.pt", "no VAE"),
        ("levels.pt", "7 latent channels"),
        ("shape.pt", "not the weights of a VAE"),
        ("vae.pt", "of type f8d4, not --vae f16d32", "f16d32"),
        ("vae.pt", "2 channels", None, "two.pt"),
        ("vae.pt", "zero.pt", None, "zero.pt"),
        ("vae.pt", "odd.pt", None, "odd.pt"),
        ("vae.pt", "latents_scale", None, "no_vae.pt"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as error:
            vae_files.open_vae(
                str(tmp_path / name), more[0] if more else None, str(tmp_path / more[1]) if more[1:] else None
            )
        assert "\n" not in str(error.value)
    with pytest.raises(
        ValueError, match="--format compvis"
    ):  # its group norms have no place in a diffusers config
        vae_files.export_vae(tmp_path / "narrow", VAE_models["f4d4"]().state_dict())
    with pytest.raises(ValueError, match="NaN"):
        vae_files.export_vae(tmp_path / "narrow", state | {"quant_conv.bias": torch.full((8,), float("nan"))})
    assert not (tmp_path / "narrow").exists()
    with pytest.raises(ValueError, match="none of"):
        vae_files.vae_name(
            {"decoder.conv_in.weight": torch.zeros(8, 7, 3, 3), "encoder.down.0.x": torch.zeros(1)}
        )
