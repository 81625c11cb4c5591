"""models/runtime/weights.py: discriminators of every kind of file, digests, checkpoints."""
import pytest
import torch
from fill import fill_

from models.discriminator import Discriminator
from models.runtime import files, vae_files, weights
from models.sit import SiT_models
from models.vae import VAE_models


def test_discriminator_of_every_kind_of_file(tmp_path):
    disc = fill_(Discriminator())
    state, digest = disc.state_dict(), weights.state_digest(disc)
    vae = {"decoder.conv_in.weight": torch.zeros(1, 4, 3, 3)}
    files.save(state, tmp_path / "bare.pt")
    files.save({"vae": vae, "discriminator": state, "steps": 1}, tmp_path / "0000001.pt")
    ldm = {
        "state_dict": vae
        | {f"loss.discriminator.{k}": v for k, v in state.items()}
        | {"loss.logvar": torch.zeros(())}
    }
    files.save(ldm, tmp_path / "ldm.ckpt")
    files.save(vae, tmp_path / "vae.pt")
    files.save(state, tmp_path / "vae-discriminator-ckpt.pt")
    for name in ("bare.pt", "0000001.pt", "ldm.ckpt", "vae.pt"):
        assert weights.state_digest(weights.discriminator(str(tmp_path / name), "f8d4")) == digest, name
    files.save(vae, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    hub = "REPA-E/e2e-vavae", "stabilityai/sd-vae-ft-mse"  # answered without asking it
    for source in (str(tmp_path / "none.pt"), str(tmp_path / "folder"), *hub):
        assert weights.discriminator_state(source, "f8d4") is None
        with pytest.raises(ValueError, match="holds no discriminator"):
            weights.discriminator(source, "f8d4")
    files.save({k: v for k, v in state.items() if k != "main.3.bias"}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="1 missing .first: main.3.bias"):
        weights.discriminator(str(tmp_path / "bare.pt"), "f8d4")
    assert weights.state_digest(weights.discriminator("none", "f8d4")) != digest


def test_digest_sees_every_bit():
    state = {
        "a": torch.arange(6.0).view(2, 3),
        "n": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    digest = weights.state_digest(state)
    assert digest == weights.state_digest({k: v.clone() for k, v in state.items()})
    assert digest != weights.state_digest(
        state | {"half": torch.tensor([1, 1.0078125], dtype=torch.bfloat16)}
    )
    assert digest != weights.state_digest({("b" if k == "a" else k): v for k, v in state.items()})
    assert weights.state_digest({"a": state["a"].mT.contiguous().mT}) == weights.state_digest(
        {"a": state["a"]}
    )


# ---------------------------------------------------------------- whole checkpoints

def checkpoint(path, **changes):
    sit = fill_(
        SiT_models["SiT-Ti/2"](input_size=8, num_classes=10, encoder_depth=4, z_dims=[16], projector_dim=32)
    )
    content = {
        "ema": sit.state_dict(),
        "args": {"model": "SiT-Ti/2", "num_classes": 10},
        "steps": 3,
    } | changes
    files.save(content, path)
    return str(path)


def test_frozen_checkpoint_loads_with_the_vae_it_names(tmp_path):
    vae = fill_(VAE_models["f4d4"]())
    files.save(vae.state_dict(), tmp_path / "vae.pt")
    args = {"model": "SiT-Ti/2", "num_classes": 10, "vae": "f4d4", "vae_ckpt": str(tmp_path / "vae.pt")}
    path = checkpoint(tmp_path / "a" / "0000003.pt", args=args)
    _, loaded, settings, source = weights.load(path)
    assert (
        weights.state_digest(loaded) == weights.state_digest(vae)
        and source == args["vae_ckpt"]
        and settings["steps"] == 3
    )
    assert vae_files.open_vae(path, "f4d4")[0] == "f4d4"
    sit, other, _, source = weights.load(path, str(tmp_path / "vae.pt"))
    assert source == str(tmp_path / "vae.pt") and not sit.training and not other.training


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ema": [1]}, "no 'ema' weights"),
        ({"args": [1]}, "args are a list"),
        ({"ema": {"pos_embed": 1}}, "another layout"),
        ({"args": {"model": ["SiT"]}}, "none of"),
        ({"ema": {"x_embedder.proj.weight": torch.zeros(3)}}, "another layout"),
        ({}, "names none"),
        ({"vae": None}, "no VAE"),
    ],
)
def test_broken_checkpoints(tmp_path, changes, words):
    with pytest.raises((ValueError, OSError)) as error:
        weights.load(checkpoint(tmp_path / "0000003.pt", **changes))
    assert words in str(error.value) and "\n" not in str(error.value) and "0000003.pt" in str(error.value)
