"""models/runtime/weights.py: discriminators of every kind of file, LPIPS; test_sample_ddp has checkpoints."""
import pytest
import torch
from fill import fill_

from models.discriminator import Discriminator
from models.lpips import LPIPS
from models.runtime import files, weights


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
