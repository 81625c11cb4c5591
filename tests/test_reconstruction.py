"""Reconstruction and latent metrics: closed forms, slow direct computations, and other packages."""
import json
import signal
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fill import fill_
from PIL import Image

from models.lpips import LPIPS
from models.metrics import (cknna, latent_moments, principal_colors, psnr, spatial_variance, ssim,
                            total_variation)
from models.runtime import files, vae_report
from models.runtime.data import ShapesData
from models.vae import Posterior, VAE_models


def pairs(n=4, size=48):
    """n pairs of uint8 images [n, 3, size, size]: shapes, and themselves with noise."""
    data, generator = ShapesData(n, size), torch.Generator().manual_seed(0)
    a = torch.stack([data[i][0] for i in range(n)])
    deviation = torch.tensor([2.0, 10.0, 30.0, 60.0])[:n, None, None, None]
    noise = torch.randn(a.shape, generator=generator) * deviation
    return a, (a + noise).clamp(0, 255).to(torch.uint8)


def test_psnr():
    a = torch.zeros(2, 3, 8, 8)
    b = a + torch.tensor([1.0, 255.0])[:, None, None, None]
    assert psnr(a, b).tolist() == pytest.approx([20 * math.log10(255), 0.0])
    assert psnr(a, a).isinf().all()


def test_ssim_by_its_formula():
    a, b = (v[:2, :, :13, :12].double().numpy() for v in pairs())
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window = np.outer(g, g) / g.sum() ** 2
    expected = []
    for x, y in zip(a, b):
        values = []
        for c, i, j in np.ndindex(3, 3, 2):
            p, q = x[c, i:i + 11, j:j + 11], y[c, i:i + 11, j:j + 11]
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            cov = (window * (p - mean_p) * (q - mean_q)).sum()
            var = (window * (p - mean_p) ** 2).sum() + (window * (q - mean_q) ** 2).sum()
            c1, c2 = 2.55 ** 2, 7.65 ** 2
            values.append((2 * mean_p * mean_q + c1) * (2 * cov + c2)
                          / ((mean_p ** 2 + mean_q ** 2 + c1) * (var + c2)))
        expected.append(np.mean(values))
    assert ssim(*(torch.from_numpy(v) for v in (a, b))).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(*[pairs()[0]] * 2).tolist() == pytest.approx([1.0] * 4)
    with pytest.raises(ValueError, match="11x11"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_scikit_image_agrees():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = pairs()
    for x, y, p, s in zip(a, b, psnr(a, b), ssim(a, b)):
        x, y = (v.permute(1, 2, 0).numpy() for v in (x, y))
        assert p.item() == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=255), abs=1e-4)
        expected = metrics.structural_similarity(x, y, channel_axis=2, data_range=255, gaussian_weights=True,
                                                 sigma=1.5, use_sample_covariance=False)
        assert s.item() == pytest.approx(expected, abs=1e-4)


def test_lpips_package_agrees(monkeypatch):
    """Its own linear weights in both, and the same made-up VGG, whose trained weights need a network."""
    package = pytest.importorskip("lpips", reason="the lpips package is not installed")
    peer = package.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    ours = fill_(LPIPS(), post=lambda name, value: np.abs(value) if name.startswith("lin") else value)
    names = {f"features.{index}": layer for part in range(1, 6)
             for index, layer in getattr(peer.net, f"slice{part}").named_children()}
    with torch.no_grad():
        for name, layer in names.items():
            for kind, weight in layer.named_parameters():
                weight.copy_(ours.get_parameter(f"{name}.{kind}"))
        for k in range(5):
            getattr(ours, f"lin{k}").model[1].weight.copy_(getattr(peer, f"lin{k}").model[1].weight)
        a, b = (v.float() / 127.5 - 1 for v in pairs())
        expected = peer(a, b).flatten()
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(a, b), expected, atol=1e-4, rtol=1e-5)


def test_latent_numbers_of_known_latents():
    # rises along the width
    ramp = torch.arange(8.0).expand(1, 2, 8, 8) * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    assert spatial_variance(ramp).item() == pytest.approx((5.25 + 9 * 5.25) / 2)
    assert total_variation(ramp).item() == pytest.approx((56 + 3 * 56) / 2)
    assert total_variation(ramp.transpose(2, 3)).item() == pytest.approx(112)
    flat = torch.ones(3, 2, 8, 8) * torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1, 1)
    assert spatial_variance(flat).tolist() == [0] * 3 and total_variation(flat).tolist() == [0] * 3
    moments = torch.cat([ramp, torch.full_like(ramp, 2 * math.log(3.0))], 1)
    mean, square = latent_moments(Posterior(moments))
    assert mean.tolist() == pytest.approx([3.5, 10.5])
    # the posterior's own spread adds
    assert (square - mean.square()).tolist() == pytest.approx([5.25 + 9, 9 * 5.25 + 9])


def test_principal_colors():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(8, 8)).Q
    parts = torch.rand(5, 3, 6, 6) * torch.tensor([9.0, 3.0, 1.0]).view(1, 3, 1, 1)
    z = torch.einsum("npij,cp->ncij", parts, axes[:, :3]) + torch.randn(8).view(1, 8, 1, 1)
    colors = principal_colors(z)
    assert colors.shape == (5, 3, 6, 6) and colors.min() == 0 and colors.max() == 1
    for k in range(3):  # each colour channel is one of the hidden parts, in order of size, up to a sign
        correlation = torch.corrcoef(torch.stack([colors[:, k].flatten(), parts[:, k].flatten()]))[0, 1]
        assert abs(correlation) > 0.97
    torch.testing.assert_close(principal_colors(-z), principal_colors(-z + 7))


def naive_cknna(a, b, k):
    """Straight from the definition: Song et al.'s unbiased HSIC of kernels masked to mutual neighbours."""
    n = len(a)
    K, L = ((lambda x: x @ x.T)(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in (a, b))

    def neighbours(kernel):
        mask = np.zeros((n, n))
        for i in range(n):
            order = [j for j in np.argsort(-kernel[i]) if j != i][:k]
            mask[i, order] = 1
        return mask

    def hsic(x, y):
        one = np.ones(n)
        both = one @ x @ one * (one @ y @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ x @ y @ one
        return (np.trace(x @ y) + both) / (n * (n - 3))
    masks = neighbours(K), neighbours(L)
    both = masks[0] * masks[1]
    norms = hsic(masks[0] * K, masks[0] * K) * hsic(masks[1] * L, masks[1] * L)
    return hsic(both * K, both * L) / np.sqrt(norms)


def test_cknna():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 16, generator=generator)
    near, other = a + 0.5 * torch.randn(60, 16, generator=generator), torch.randn(60, 24, generator=generator)
    for b in (near, other):
        assert cknna(a, b) == pytest.approx(naive_cknna(a.double().numpy(), b.double().numpy(), 10), abs=1e-9)
    assert cknna(a, a) == pytest.approx(1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    assert cknna(a, 3 * a @ turn) == pytest.approx(1, abs=1e-5)
    assert cknna(a, near) > 0.4 > 0.2 > abs(cknna(a, other))
    with pytest.raises(ValueError, match="more images"):
        cknna(a[:10], a[:10])


# ---------------------------------------------------------------- several VAEs: finetune_vae.py --eval

class TinyInception(torch.nn.Module):
    """Pool and spatial features that cost nothing."""
    sha256 = "tiny"

    def forward(self, images):
        x = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 8).flatten(1)
        return x[:, :6], x[:, 6:9]


@pytest.fixture(scope="module")
def vae_paths(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("vaes"), []
    for k in range(2):
        torch.manual_seed(k)
        paths.append(str(folder / f"{k}.pt"))
        files.save(VAE_models["f4d4"]().state_dict(), paths[-1])
    return paths


def settings(tmp_path, vaes, **more):
    """The settings that --eval reads, on the built-in shapes."""
    return SimpleNamespace(**{"eval": vaes, "data_dir": "shapes", "resolution": 16, "limit": 8,
                              "metrics": "psnr,rfid,latents", "vae": None, "encoder": "hog",
                              "encoder_ckpt": None, "model_ckpt": None, "seed": 0,
                              "inception_weights": None, "mixed_precision": "auto",
                              "output_dir": str(tmp_path), "exp_name": "eval", "dry_run": False} | more)


def test_a_stopped_comparison_goes_on_with_the_vaes_that_are_left(tmp_path, vae_paths, monkeypatch, capfd):
    monkeypatch.setattr(vae_report, "load_inception", lambda path, device: TinyInception())
    measure, measured = vae_report.measure, []

    def stopping(vae, *rest, **more):
        measured.append(vae)
        if len(measured) == 2:
            signal.raise_signal(signal.SIGINT)
        return measure(vae, *rest, **more)
    monkeypatch.setattr(vae_report, "measure", stopping)
    args = settings(tmp_path, vae_paths)
    with pytest.raises(SystemExit) as stop:
        vae_report.evaluate(args)
    assert stop.value.code == 130
    error = capfd.readouterr().err.splitlines()
    assert error[-1].startswith("stopped by SIGINT: ") and not any("Traceback" in line for line in error)
    assert any("8/8 images" in line and "left" in line for line in error)
    path = tmp_path / "eval" / "metrics.json"
    first = json.loads(path.read_text())["vaes"]
    assert list(first) == vae_paths[:1]

    vae_report.evaluate(args)
    found = json.loads(path.read_text())
    assert len(measured) == 3 and list(found["vaes"]) == vae_paths
    assert found["vaes"][vae_paths[0]] == first[vae_paths[0]]
    assert "1 of 2 VAEs are measured already" in capfd.readouterr().out
    vae_report.evaluate(args)                                                # nothing is left to do
    assert len(measured) == 3 and json.loads(path.read_text()) == found
    # another one does not fit in there
    with pytest.raises(SystemExit):
        vae_report.evaluate(settings(tmp_path, vae_paths, limit=7))
    assert "holds another evaluation (of other images)" in capfd.readouterr().err
    assert json.loads(path.read_text()) == found


def test_evaluations_are_numbered(tmp_path, vae_paths, monkeypatch, capsys):
    """Without a name: the same command finds its folder again, another one gets the next."""
    measure, measured = vae_report.measure, []
    monkeypatch.setattr(vae_report, "measure", lambda vae, *rest: measured.append(vae) or measure(vae, *rest))
    args = {"metrics": "psnr", "exp_name": None}
    changed = tmp_path / "changed.pt"
    shutil.copy(vae_paths[0], changed)
    for vaes, limit, number, count in ((vae_paths, 8, 1, 2), (vae_paths, 7, 2, 4), (vae_paths, 8, 1, 4),
                                       (vae_paths[:1], 8, 3, 5), ([str(changed)], 8, 4, 6)):
        vae_report.evaluate(settings(tmp_path / "out", vaes, limit=limit, **args))
        assert f"vae-eval-{number}/metrics.json" in capsys.readouterr().out and len(measured) == count
    # other weights under the same name
    files.save(VAE_models["f4d4"]().state_dict(), changed)
    vae_report.evaluate(settings(tmp_path / "out", [str(changed)], **args))
    assert "vae-eval-5" in capsys.readouterr().out
    vae_report.evaluate(settings(tmp_path / "out", vae_paths, limit=6, dry_run=True, **args))
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_a_limit_takes_images_of_all_classes(tmp_path):
    for k in range(12):
        path = tmp_path / "set" / f"class{k // 4}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * k, 0, 0)).save(path)
    np.savez(tmp_path / "set.npz", np.stack([np.asarray(Image.open(p))
                                             for p in sorted((tmp_path / "set").rglob("*.png"))]))
    for path in (tmp_path / "set", tmp_path / "set.npz"):
        images = vae_report.held_out_images(str(path), 16, limit=4)
        assert images.count == 4 and len(images.shown) == 4
        assert [batch[:, 0, 0, 0].tolist() for batch in images.read(3)] == [[0, 80, 140], [220]]
        assert next(images.read(1, rank=2, world_size=3))[0, 0, 0, 0] == 140
    shown = vae_report.held_out_images(str(path), 16).shown
    assert shown[:, 0, 0, 0].tolist() == [0, 40, 60, 100, 120, 160, 180, 220]
