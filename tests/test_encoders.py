"""models/encoders.py: sizes, tokens against timm's own model, weights files of all layouts, HOG, errors, no
network."""
import math
import os
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models import encoders
from models.encoders import ENCODERS, HOG, input_size, load_encoders

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Empty caches, and no network."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def weights(name, seed=0, **options):
    """A timm model's state dict with random weights, norms and biases too, so that every tensor matters."""
    model = timm.create_model(name, **options)
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator).abs() if v.is_floating_point() else v
            for k, v in model.state_dict().items()}


def shallow(monkeypatch, depth=2, **sizes):
    """timm's networks with all of their parts, but few blocks, or narrow ones."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model",
                        lambda name, **options: create(name, depth=depth, **sizes, **options))


def images(resolution, n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, resolution, resolution), dtype=torch.uint8, generator=generator)


def normalised(x, mean, std):
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def timm_model(name, path, size):
    """The same weights through timm's own loader, the peer to compare with."""
    options = {"img_size": size} if timm.models.get_pretrained_cfg(name).fixed_input_size else {}
    overlay = {"file": str(path), "hf_hub_id": None, "url": None}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0,
                             **options).eval()


def fails(names, ckpts, *words, resolution=256):
    with pytest.raises(ValueError) as error:
        load_encoders(names, ckpts, resolution)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---------------------------------------------------------------- sizes and names

@pytest.mark.parametrize("resolution, patch, own, size", [
    (256, 14, 518, 224), (512, 14, 518, 448), (32, 14, 518, 224),  # DINOv2, CLIP, I-JEPA
    (256, 16, 224, 256), (512, 16, 224, 512), (32, 16, 224, 224), (250, 16, 224, 256),  # MAE, DINO
    (256, None, 224, 256), (32, None, 224, 224), (32, None, 600, 256)])  # convolutional
def test_input_size(resolution, patch, own, size):
    assert input_size(resolution, patch, own) == size


@pytest.mark.parametrize("name", ENCODERS)
def test_names_are_timms(name):
    """Every name is in timm, with a source of weights, 16x16 tokens for 256 pixels and the right mean."""
    timm_name, cfg = encoders.timm_config(name.upper())
    assert timm_name == ENCODERS[name] and (cfg.hf_hub_id or cfg.url)
    patch = int(timm_name.split("patch")[1].split("_")[0])
    assert input_size(256, patch, cfg.input_size[-1]) == 16 * patch
    if "clip" in name and "sig" not in name:
        assert cfg.mean[0] == 0.48145466 and cfg.std[2] == 0.27577711
    elif "siglip" in name:
        assert tuple(cfg.mean) == tuple(cfg.std) == (0.5, 0.5, 0.5)
    else:
        assert (tuple(cfg.mean), tuple(cfg.std)) == IMAGENET


# ---------------------------------------------------------------- tokens

@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos", "test_resnet", "test_mambaout"])
@pytest.mark.parametrize("resolution", [32, 256])
def test_tokens_are_those_of_timms_model(tmp_path, name, resolution):
    """ViTs with position tables, with relative positions, feature maps in both layouts; above and below their
    size."""
    save_file(weights(name), tmp_path / "w.safetensors")
    encoder, = load_encoders(name, str(tmp_path / "w.safetensors"), resolution)
    x, size = images(resolution), max(resolution, 160)
    cfg = timm.models.get_pretrained_cfg(name)
    resized = F.interpolate(x.float() / 255, (size, size), mode="bicubic")
    with torch.no_grad():
        peer = timm_model(name, tmp_path / "w.safetensors", size)
        expected = peer.forward_features(normalised(resized, cfg.mean, cfg.std))
    if name == "test_mambaout":  # [B, H, W, D]
        expected = expected.permute(0, 3, 1, 2)
    if expected.ndim == 4:
        rows = [expected[:, :, i, j] for i in range(expected.shape[2]) for j in range(expected.shape[3])]
        expected = torch.stack(rows, 1)
    elif name != "test_vit_relpos":
        expected = expected[:, 1:]  # the class token
    tokens = encoder(x)
    assert tokens.shape == (2, encoder.grid ** 2, encoder.embed_dim) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert tokens.std() > 0.1 and not tokens.requires_grad


def test_dinov2_from_its_authors_file(tmp_path, monkeypatch):
    """Their file: positions for 518 pixels, a mask token. 256-pixel images are seen at 224, tokens after the
    norm."""
    shallow(monkeypatch)
    name = ENCODERS["dinov2-vit-s"]
    state = weights(name)
    assert state["pos_embed"].shape[1] == 1 + 37 * 37
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    encoder, = load_encoders("dinov2-vit-s", str(tmp_path / "dinov2_vits14_pretrain.pth"), 256)
    assert (encoder.size, encoder.grid, encoder.embed_dim, encoder.name) == (224, 16, 384, "dinov2-vit-s")
    assert encoder.model.pos_embed.shape[1] == 1 + 16 * 16
    x = F.interpolate(normalised(images(256).float() / 255, *IMAGENET), (224, 224), mode="bicubic")
    peer = timm_model(name, tmp_path / "dinov2_vits14_pretrain.pth", 224)
    with torch.no_grad():
        expected = peer.norm(peer.forward_intermediates(x, indices=1, norm=False, intermediates_only=True,
                                                        output_fmt="NLC")[0])
    torch.testing.assert_close(encoder(images(256)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip-vit-l", "mae-vit-b"])
def test_tokens_before_the_last_norm(tmp_path, monkeypatch, name):
    """CLIP's and MAE's tokens under the reference's names are those of the network without its last norm, in
    float64."""
    shallow(monkeypatch, embed_dim=48, num_heads=4)
    save_file(weights(ENCODERS[name]), tmp_path / "w.safetensors")
    encoder, = load_encoders(name, str(tmp_path / "w.safetensors"), 256)
    assert (encoder.grid, encoder.embed_dim, encoder.size) == (16, 48, 224 if "clip" in name else 256)
    peer = timm_model(ENCODERS[name], tmp_path / "w.safetensors", encoder.size).double()
    x = torch.randn(2, 3, encoder.size, encoder.size, dtype=torch.float64)
    with torch.no_grad():
        after, peer.norm = peer.forward_features(x)[:, 1:], torch.nn.Identity()
        before = peer.forward_features(x)[:, 1:]
        tokens = encoder.double().tokens(x)
    torch.testing.assert_close(tokens, before, rtol=0, atol=1e-9)
    assert (after - before).norm() > 0.1 * before.norm()
    if "clip" in name:
        act, v = encoder.model.blocks[1].mlp.act, torch.linspace(-4, 4, 50)
        torch.testing.assert_close(act(v.clone()), v * torch.sigmoid(1.702 * v))


@pytest.mark.parametrize("features", [torch.zeros(1, 8), torch.zeros(1, 27, 8)])
def test_no_grid_of_tokens(tmp_path, monkeypatch, features):
    """Some of timm's networks give one vector, or tokens of several sizes."""
    save_file(weights("test_vit"), tmp_path / "w.safetensors")
    monkeypatch.setattr(timm.models.VisionTransformer, "forward_features", lambda self, x: features)
    fails("test_vit", str(tmp_path / "w.safetensors"), "test_vit", "grid")


def test_frozen(tmp_path):
    save_file(weights("test_resnet"), tmp_path / "w.safetensors")
    encoder, = load_encoders("test_resnet", str(tmp_path / "w.safetensors"), 32)
    before, state = encoder(images(32)), {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.nn.Sequential(encoder).train()
    assert torch.equal(encoder(images(32)), before) and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())
    for k, v in encoder.state_dict().items():       # batch norm's statistics too
        assert torch.equal(v, state[k]), k


def test_autocast(tmp_path):
    """Under bfloat16 autocast the image is still resized and normalised in float32, and tokens come as
    float32."""
    save_file(weights("test_vit"), tmp_path / "w.safetensors")
    for encoder in load_encoders("test_vit,hog", f"{tmp_path}/w.safetensors,", 64):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encoder(images(64))
        assert tokens.dtype == torch.float32
        same = F.cosine_similarity(tokens, encoder(images(64)), -1).min()
        assert same > (0.999999 if encoder.name == "hog" else 0.99)


# ---------------------------------------------------------------- weights files

@pytest.mark.parametrize("layout", ["dino", "moco", "classifier"])
def test_layouts(tmp_path, layout):
    state = weights("test_vit", num_classes=0)
    path = tmp_path / "w.pth"
    if layout == "dino":
        torch.save({"student": {}, "teacher": {**{f"backbone.{k}": v for k, v in state.items()},
                                               "head.mlp.0.weight": torch.zeros(3)}}, path)
    elif layout == "moco":
        torch.save({"epoch": 300, "state_dict": {
            **{f"module.base_encoder.{k}": v for k, v in state.items()},
            **{f"module.momentum_encoder.{k}": v + 1 for k, v in state.items()},
            "module.base_encoder.head.0.weight": torch.zeros(4096, 192),
            "module.predictor.0.weight": torch.zeros(4)}}, path)
    else:  # what lies outside the network may be more
        torch.save({**state, "head.weight": torch.zeros(10, 64), "decoder_blocks.0.w": torch.zeros(2)}, path)
    encoder, = load_encoders("test_vit", str(path), 160)
    assert all(torch.equal(v, state[k]) for k, v in encoder.model.state_dict().items())


def test_several_encoders(tmp_path):
    save_file(weights("test_vit"), tmp_path / "a.safetensors")
    save_file(weights("test_resnet"), tmp_path / "b.safetensors")
    found = load_encoders(
        "test_vit, hog,test_resnet", f"{tmp_path}/a.safetensors,, {tmp_path}/b.safetensors", 128
    )
    assert [encoder.name for encoder in found] == ["test_vit", "hog", "test_resnet"]
    assert [encoder.embed_dim for encoder in found] == [64, 109, 96]
    assert [encoder(images(128)).shape[2] for encoder in found] == [64, 109, 96]


def test_weights_of_another_architecture(tmp_path):
    """timm itself would leave what is missing at random, without an error."""
    path = tmp_path / "w.pth"
    torch.save(weights("test_resnet"), path)
    fails("test_vit", str(path), str(path), "test_vit", "another architecture", "cls_token is missing")
    state = weights("test_vit", num_classes=0)
    norm = state.pop("norm.weight")
    for changed, words in (({}, "norm.weight is missing"),
                           ({"norm.weight": norm, "blocks.99.norm1.weight": norm},
                            "99.norm1.weight is unknown"),
                           ({"norm.weight": norm, "reg_token": norm}, "reg_token is unknown"),
                           ({"norm.weight": torch.zeros(65)}, "norm.weight is torch.float32 [65], not"),
                           ({"norm.weight": norm.to(torch.int8)}, "norm.weight is torch.int8")):
        torch.save(state | changed, path)
        fails("test_vit", str(path), "another architecture", words)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bad_files(tmp_path):
    fails("test_vit", str(tmp_path / "no.pth"), "no.pth", "No such file", "--encoder-ckpt")
    for ending in ("pth", "safetensors"):
        (tmp_path / f"bad.{ending}").write_bytes(b"<html>404</html>")
        fails("test_vit", str(tmp_path / f"bad.{ending}"), f"bad.{ending}", "--encoder-ckpt")
    fails("test_vit,hog", "one.pth", "--encoder names 2", "--encoder-ckpt 1")


def test_a_file_runs_no_code(tmp_path):
    evil = RunsCode()
    evil.path = tmp_path / "ran"
    torch.save({"model": weights("test_vit"), "args": evil}, tmp_path / "zip.pth")
    torch.save({"model": evil}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps(evil))
    for name in ("zip.pth", "old.pth", "raw.safetensors"):
        fails("test_vit", str(tmp_path / name), name)
    assert not evil.path.exists()


# ---------------------------------------------------------------- names and network

@pytest.mark.parametrize("name", ["dinov2-vit-bb", "resnet18.no_such_tag"])
def test_unknown_encoder(name):
    fails(name, None, "unknown encoder", "dinov2-vit-b")


def test_no_network():
    fails("test_vit", None, "encoder test_vit", "--encoder-ckpt PATH", "--encoder hog", "HF_HUB_OFFLINE=1")


# ---------------------------------------------------------------- HOG

def plain_hog(image, patch, eps=0.02):
    """HOG.forward again, pixel by pixel: image uint8 [3, R, R] -> [tokens, 109]."""
    x = image.double().numpy() / 255
    side, cell = x.shape[1], patch // 2
    votes = np.zeros((3, 9, side, side))
    for c in range(3):
        for i in range(side):
            for j in range(side):
                dx = (x[c, i, min(j + 1, side - 1)] - x[c, i, max(j - 1, 0)]) / 2
                dy = (x[c, min(i + 1, side - 1), j] - x[c, max(i - 1, 0), j]) / 2
                # bin k is centred at 20 k + 10 degrees
                where = math.degrees(math.atan2(dy, dx)) % 180 / 20 - 0.5
                low = math.floor(where)
                votes[c, low % 9, i, j] += math.hypot(dx, dy) * (1 - where + low)
                votes[c, (low + 1) % 9, i, j] += math.hypot(dx, dy) * (where - low)
    tokens = []
    for i in range(0, side, patch):
        for j in range(0, side, patch):
            token = []
            for c in range(3):
                for k in range(9):
                    for a in (i, i + cell):
                        for b in (j, j + cell):
                            rows = slice(max(a - cell // 2, 0), a + cell + cell // 2)
                            columns = slice(max(b - cell // 2, 0), b + cell + cell // 2)
                            token.append(votes[c, k, rows, columns].mean())
            tokens.append(np.array([*token, eps]) / math.sqrt(sum(v * v for v in token) + eps * eps))
    return torch.from_numpy(np.stack(tokens)).float()


@pytest.mark.parametrize("resolution, patch", [(32, 4), (128, 8)])
def test_hog_is_its_definition(resolution, patch):
    x = images(resolution, 1)
    x[:, :, 8:20, 4:24] = 90  # something flat, something with edges
    hog = HOG(resolution)
    assert hog.patch == patch and hog.grid == resolution // patch and hog.embed_dim == 109
    torch.testing.assert_close(hog(x)[0], plain_hog(x[0], patch), rtol=1e-4, atol=1e-5)


def test_hog_grid():
    """The grids that runs have been trained with."""
    assert [HOG(r).grid for r in (32, 64, 96, 128, 160, 224, 256, 264, 512)] == [
        8, 16, 24, 16, 20, 28, 16, 22, 32]


def test_hog_resolution():
    for resolution in (30, 4, 258):
        fails("hog", None, "hog", "--resolution divisible by 4", resolution=resolution)
