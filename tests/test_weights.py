"""models/runtime/weights.py: discriminators of every kind of file, checkpoints for sampling."""
import pytest
import torch
from fill import fill_

from models.discriminator import Discriminator
from models.lpips import LPIPS
from models.runtime import files, weights
from models.sit import SiT_models
from models.vae import VAE_models


def test_discriminator_of_every_kind_of_file(tmp_path, monkeypatch):
    disc = fill_(Discriminator())
    state, digest = disc.state_dict(), files.state_digest(disc)
    vae = {"decoder.conv_in.weight": torch.zeros(1, 4, 3, 3)}
    files.save(state, tmp_path / "bare.pt")
    files.save({"vae": vae, "discriminator": state, "steps": 1}, tmp_path / "0000001.pt")
    files.save(vae, tmp_path / "vae.pt")
    files.save(state, tmp_path / "vae-discriminator-ckpt.pt")
    monkeypatch.setattr(files, "hub_file", lambda repo, name: str(tmp_path / "bare.pt"))
    paths = [str(tmp_path / name) for name in ("bare.pt", "0000001.pt", "vae.pt")]
    for source in (*paths, "REPA-E/sdvae"):
        assert files.state_digest(weights.discriminator(source, "f8d4")) == digest, source
    files.save(vae, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    hub = "REPA-E/e2e-vavae", "stabilityai/sd-vae-ft-mse"  # known to have none
    for source in (str(tmp_path / "none.pt"), str(tmp_path / "folder"), *hub):
        assert weights.discriminator_state(source, "f8d4") is None
        with pytest.raises(ValueError, match="contains no discriminator"):
            weights.discriminator(source, "f8d4")
    files.save({k: v for k, v in state.items() if k != "main.3.bias"}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="the first is main.3.bias: missing"):
        weights.discriminator(str(tmp_path / "bare.pt"), "f8d4")
    assert files.state_digest(weights.discriminator("none", "f8d4")) != digest


def test_lpips_from_two_files(tmp_path, monkeypatch):
    """torchvision's VGG16 and the published linear weights, each by the digest that is known of it."""
    lpips, asked = LPIPS(), []
    state = {k: torch.full_like(v, 0.5) for k, v in lpips.state_dict().items()}
    vgg = {k: v for k, v in state.items() if k.startswith("features")}
    files.save(vgg | {"classifier.0.bias": torch.ones(1)}, tmp_path / "vgg16-397923af.pth")
    files.save({k: v for k, v in state.items() if k.startswith("lin")}, tmp_path / "lpips_vgg.pth")

    def download(url, name, sha256_prefix):
        asked.append((url.split("/")[2], sha256_prefix[:8]))
        return str(tmp_path / name)
    monkeypatch.setattr(files, "download", download)
    monkeypatch.setattr(weights, "LPIPS", lambda: lpips)
    assert files.state_digest(weights.lpips()) == files.state_digest(state)
    assert asked == [("download.pytorch.org", "397923af"), ("raw.githubusercontent.com", "a78928a0")]

    def no_network(*_):
        raise OSError("no network")
    monkeypatch.setattr(files, "download", no_network)
    with pytest.raises(OSError, match="weights of LPIPS: no network; or pass --perceptual-weight 0"):
        weights.lpips()


# ---------------------------------------------------------------- whole checkpoints

def checkpoint(path, **changes):
    sit = fill_(SiT_models["SiT-Ti/2"](input_size=8, num_classes=10, encoder_depth=4, z_dims=[16],
                                       projector_dim=32))
    content = {"ema": sit.state_dict(), "args": {"model": "SiT-Ti/2", "num_classes": 10}, "steps": 3}
    files.save(content | changes, path)
    return str(path)


def test_a_checkpoint_is_decoded_with_its_vae_or_with_another(tmp_path):
    own, other = fill_(VAE_models["f4d4"]()), fill_(VAE_models["f4d4"](), "another")
    files.save(other.state_dict(), tmp_path / "other.pt")
    path = checkpoint(tmp_path / "0000003.pt", vae=own.state_dict())
    for vae_ckpt, vae, expected in ((None, own, "checkpoint"), (str(tmp_path / "other.pt"), other, None)):
        sit, loaded, settings, source = weights.load(path, vae_ckpt)
        assert files.state_digest(loaded) == files.state_digest(vae) and source == (expected or vae_ckpt)
    assert not sit.training and not loaded.training and settings["steps"] == 3


@pytest.mark.parametrize("changes, words", [
    ({"ema": [1]}, "no 'ema' weights"),
    ({"args": {"model": "SiT"}}, "none of"),
    ({}, "names none"),
    ({"args": {"model": "SiT-Ti/2", "num_classes": 7}}, "float [11, 192], expected float [8, 192]"),
])
def test_broken_checkpoints(tmp_path, changes, words):
    with pytest.raises((ValueError, OSError)) as error:
        weights.load(checkpoint(tmp_path / "0000003.pt", **changes))
    assert words in str(error.value) and "\n" not in str(error.value) and "0000003.pt" in str(error.value)
