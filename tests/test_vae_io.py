"""VAE files: CompVis and diffusers names, statistics, and what is refused."""
import json
import os

import pytest
import torch
from fill import fill_

from models.runtime import files, vae_files
from models.vae import AutoencoderKL, VAE_models

NAMES = ["f8d4", "f16d32", "f8d16", "f4d4"]


def stats_of(channels):
    return torch.linspace(0.5, 2, channels).view(1, -1, 1, 1), torch.linspace(-1, 1, channels).view(1, -1, 1, 1)


def slim_state():
    """Weights with the names of f8d4, all layers as narrow as its first."""
    return AutoencoderKL(4, multipliers=(1,) * 4).state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name):
    state = VAE_models[name]().state_dict()
    there = vae_files.to_diffusers(state)
    assert not any(piece in k for k in there for piece in (".down.", ".up.", ".mid.", "nin_shortcut", ".norm_out"))
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
    """CompVis -> diffusers -> CompVis through files; all widths are the smallest of the real ones, the names the same."""
    narrow = {"f8d4": dict(latent_channels=4, multipliers=(1,) * 4), "f8d16": dict(latent_channels=16, multipliers=(1,) * 4, quant=False),
              "f16d32": dict(latent_channels=32, multipliers=(1,) * 5, attention_levels=(4,))}
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


@pytest.mark.parametrize("name", NAMES[:3])
def test_diffusers_package_agrees(name, tmp_path, close):
    diffusers = pytest.importorskip("diffusers", reason="needs the diffusers package")
    vae = fill_(VAE_models[name]()).eval()
    stats = stats_of(vae.latent_channels)
    vae_files.export_vae(tmp_path / "vae", vae.state_dict(), stats)
    peer, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    z = torch.randn(1, vae.latent_channels, 64 // vae.downsample, 64 // vae.downsample)
    with torch.no_grad():
        close(peer.decode(z).sample, vae.decode(z), atol=1e-5, rtol=1e-5)
        close(peer.encode(x).latent_dist.mean, vae.encode(x).mean, atol=1e-5, rtol=1e-5)
    assert peer.config.latents_mean == pytest.approx(stats[1].flatten().tolist())
    peer.save_pretrained(tmp_path / "again")
    state, again = vae_files.load_vae_file(str(tmp_path / "again"))
    assert all(torch.equal(state[k], v) for k, v in vae.state_dict().items())
    close(again[0], stats[0])


def test_every_kind_of_file(tmp_path, close):
    state, stats = slim_state(), stats_of(4)
    vae_files.export_vae(tmp_path / "folder", state, stats)
    files.save(state, tmp_path / "bare.pt")
    files.save(state, tmp_path / "with-400k.pt")
    files.save({"latents_scale": stats[0], "latents_bias": stats[1]}, tmp_path / "with-400k-latents-stats.pt")
    files.save({"state_dict": state | {"loss.logvar": torch.zeros(())}, "epoch": 3}, tmp_path / "compvis.ckpt")
    ema = {"bn.running_var": stats[0].flatten() ** -2, "bn.running_mean": stats[1].flatten()}
    files.save({"model": {}, "ema": ema, "vae": state, "steps": 1}, tmp_path / "0000001.pt")
    with_stats = {"folder", "with-400k.pt", "0000001.pt"}
    for name in with_stats | {"bare.pt", "compvis.ckpt"}:
        loaded, found = vae_files.load_vae_file(str(tmp_path / name))
        assert set(loaded) == set(state) and all(torch.equal(loaded[k], state[k]) for k in state), name
        assert (found is not None) == (name in with_stats), name
        for mine, theirs in zip(found or (), stats):
            close(mine, theirs, atol=1e-6)


def test_single_scaling_factor():
    scale, bias = vae_files.stats_from_config({"scaling_factor": 0.18215}, 4)
    assert scale.shape == bias.shape == (1, 4, 1, 1)
    assert scale.unique().tolist() == pytest.approx([0.18215]) and bias.abs().max() == 0
    scale, bias = vae_files.stats_from_config({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 16)
    assert bias.unique().tolist() == pytest.approx([0.1159])
    assert vae_files.stats_from_config({}, 4) is None


def test_refused(tmp_path):
    state = slim_state()
    vae_files.export_vae(tmp_path / "other", state)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    (tmp_path / "empty").mkdir()
    vae_files.export_vae(tmp_path / "groups", state)
    (tmp_path / "groups" / "config.json").write_text(json.dumps(config | {"norm_num_groups": 16}))
    vae_files.export_vae(tmp_path / "counts", state)
    (tmp_path / "counts" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0], "latents_std": [1.0]}))
    files.save({"a": torch.zeros(1)}, tmp_path / "no_vae.pt")
    files.save([1, 2], tmp_path / "a_list.pt")
    for name, message in (("other", "UNet2DModel"), ("empty", "config.json"), ("counts", "4 values"), ("groups", "norm_num_groups 16"),
                          ("no_vae.pt", "no VAE"), ("a_list.pt", "no VAE"), ("missing.pt", "no such VAE")):
        with pytest.raises((ValueError, OSError), match=message) as error:
            vae_files.load_vae_file(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--format compvis"):  # its group norms have no place in a diffusers config
        vae_files.export_vae(tmp_path / "narrow", VAE_models["f4d4"]().state_dict())
    assert not (tmp_path / "narrow").exists()
    with pytest.raises(ValueError, match="none of"):
        vae_files.vae_name({"decoder.conv_in.weight": torch.zeros(8, 7, 3, 3), "encoder.down.0.x": torch.zeros(1)})
