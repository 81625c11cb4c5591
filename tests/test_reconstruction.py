"""Reconstruction and latent metrics: closed forms, slow direct computations, and other packages."""
import copy
import math

import numpy as np
import pytest
import torch
from fill import fill_

from models.metrics import (between_images, latent_moments, psnr, psnr_under_noise, spatial_variance, ssim,
                            total_variation)
from models.runtime import vae_report
from models.runtime.data import ShapesData
from models.vae import AttnBlock, Posterior, VAE_models


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


def test_between_images():
    """All of the variance where images are flat and differ, none where they have equal means."""
    flat = torch.randn(50, 3, 1, 1).expand(50, 3, 8, 8)
    alike = torch.randn(50, 3, 8, 8)
    alike = alike - alike.mean((2, 3), keepdim=True)
    for z, expected in ((flat, 1.0), (alike, 0.0), (flat + 2 * alike, 0.2)):
        std = z.var((0, 2, 3), correction=0).sqrt()
        assert between_images(z.mean((2, 3)), std) == pytest.approx(expected, abs=0.06)


def test_psnr_under_noise():
    """Of a decoder that only rescales: the noise itself, in units of each channel's deviation."""
    images = torch.full((2, 3, 64, 64), 127.5)
    std, noise = torch.tensor([1.0, 2.0, 3.0]), torch.randn(2, 3, 64, 64)

    def decode(z):
        return z / std.view(1, 3, 1, 1)
    for sigma in (0.05, 0.1):
        error = 127.5 * sigma
        found = psnr_under_noise(decode, images, torch.zeros(2, 3, 64, 64), std, noise, sigma)
        assert found.tolist() == pytest.approx([20 * math.log10(255 / error)] * 2, abs=0.2)


# ---------------------------------------------------------------- one VAE

@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE_models["f4d4"]().eval()


def test_measure_does_not_depend_on_batches(vae):
    images = torch.stack([ShapesData(10, 32, seed=1)[i][0] for i in range(10)])
    found = [vae_report.measure(vae, images.split(size), torch.device("cpu")) for size in (10, 3)]
    for name in found[0]:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


def test_recomputed_activations_give_the_same_gradients(vae, monkeypatch):
    other = copy.deepcopy(vae)
    x = torch.stack([ShapesData(2, 32)[i][0] for i in range(2)]).float() / 127.5 - 1
    vae(x, torch.zeros(()))[2].square().sum().backward()
    monkeypatch.setattr("models.vae.recomputing_input", lambda function, x: function(x))
    other(x, torch.zeros(()))[2].square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(vae.parameters(), other.parameters()))


def test_compiled_attention_agrees(monkeypatch, close):
    """Two products and a softmax, in place of torch's kernels."""
    block, x = fill_(AttnBlock(128)), torch.randn(2, 128, 8, 8, requires_grad=True)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = block(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for plain, products in zip(*results):
        close(products, plain, 1e-5, 1e-5)
