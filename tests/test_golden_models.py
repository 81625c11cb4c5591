"""Parity with the reference's numbers: networks, losses, gradients (tests/data/golden/README.md, 2 to 6)."""
import functools

import numpy as np
import pytest
import torch
from fill import fill_, fill_array

from models.losses import proj_loss
from models.discriminator import Discriminator
from models.losses import discriminator_loss, gan_loss, reconstruction_losses
from models.lpips import LPIPS
from models.sit import SiT, SiT_models
from models.losses import denoising_loss, noisy_latents
from models.vae import Posterior, VAE_models

pytestmark = pytest.mark.usefixtures("plain_convolutions")


def test_fill_rule(golden_json):
    for key, expected in golden_json("fill_check").items():
        salt, name = key.split("|")
        value = fill_array(name, expected["shape"], salt)
        np.testing.assert_allclose(value.ravel()[:4], expected["first4"], rtol=1e-6)
        assert value.sum(dtype=np.float64) == pytest.approx(expected["sum"], rel=1e-9, abs=1e-9)


def shapes(module):
    return [(name, list(tensor.shape)) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("name", ["keys_sit_b_1", "keys_sit_xl_2", "keys_vae_f8d4", "keys_vae_f16d32",
                                  "keys_discriminator"])
def test_state_dict_names_shapes_and_order(golden_json, name):
    keys = golden_json(name)
    config = dict(keys["config"])
    with torch.device("meta"):
        if "model" in config:
            module = SiT_models[config.pop("model")](**config, learn_pos_embed=True)
        else:
            module = VAE_models[config["vae"]]() if "vae" in config else Discriminator(**config)
    assert shapes(module) == [(k, v) for k, v in keys["state_dict"].items()]
    assert [n for n, _ in module.named_buffers()] == keys["buffers"]
    assert sum(p.numel() for p in module.parameters()) == keys["parameter_count"]


def test_lpips_names(golden_json):
    keys = golden_json("keys_lpips")
    with torch.device("meta"):
        module = LPIPS()
    assert shapes(module) == [(k, v) for k, v in keys["state_dict"].items()]


@pytest.fixture(params=["sit_base", "sit_qknorm"])
def sit_case(request, golden):
    config, g = golden(request.param)

    def build(**changes):
        sit = SiT(**{**config["sit"], **changes}, learn_pos_embed=True)
        return fill_(sit, salt=config["salt"])
    return config, g, build


def targets(g):
    return [g[f"in.zs{k}"] for k in range(sum(name.startswith("in.zs") for name in g))]


def test_sit_inference_and_tables(sit_case, close):
    config, g, build = sit_case
    sit = build().eval()
    close(sit(g["in.inf_x"], g["in.inf_t"], g["in.inf_y"])[0], g["out.inference_velocity"])
    close(sit.pos_embed[0], g["out.pos_embed"], 1e-6)
    scale, bias = sit.latents_stats()
    close(scale.flatten(), g["out.stats_latents_scale"], 1e-6)
    close(bias.flatten(), g["out.stats_latents_bias"], 1e-6)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sit_eval_losses_and_alignment_gradient(sit_case, close, path_type):
    config, g, build = sit_case
    sit, t = build().eval(), g["in.time_input"].flatten()
    x_t, target = noisy_latents(sit.normalize(g["in.x"]), g["in.noises"], t, path_type)
    velocity, zs_tilde = sit(x_t, t, g["in.y"])
    close(velocity, g[f"out.eval_{path_type}_model_output"])
    close(denoising_loss(velocity, target), g[f"out.eval_{path_type}_denoising_loss"])
    close(proj_loss(targets(g), zs_tilde), g[f"out.eval_{path_type}_proj_loss"])
    for k, z_tilde in enumerate(zs_tilde):
        close(z_tilde, g[f"out.eval_{path_type}_zs_tilde{k}"])

    z = g["in.x"].clone().requires_grad_()
    x_t, _ = noisy_latents(sit.normalize(z), g["in.noises"], t, path_type)
    velocity, zs_tilde = sit(x_t, t, g["in.y"], align_only=True)
    loss = proj_loss(targets(g), zs_tilde)
    assert velocity is None
    close(loss, g[f"out.align_{path_type}_proj_loss"])
    close(torch.autograd.grad(loss, z)[0], g[f"out.align_{path_type}_grad_x"])


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sit_train_losses_batch_norm_and_gradients(sit_case, close, path_type):
    config, g, build = sit_case
    sit, t = build(class_dropout_prob=0.0).train(), g["in.time_input"].flatten()
    x_t, target = noisy_latents(sit.bn(g["in.x"]), g["in.noises"], t, path_type)
    velocity, zs_tilde = sit(x_t, t, g["in.y"])
    per_sample, align = denoising_loss(velocity, target), proj_loss(targets(g), zs_tilde)
    loss = per_sample.mean() + config["proj_coeff"] * align
    loss.backward()
    prefix = f"out.train_{path_type}_"
    close(velocity, g[prefix + "model_output"])
    close(per_sample, g[prefix + "denoising_loss"])
    close(align, g[prefix + "proj_loss"])
    close(loss, g[prefix + "sit_loss"])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(sit.bn, name), g[prefix + name])
    gradients = dict(sit.named_parameters())
    assert list(gradients) == g["out.grad_param_names"]
    norms = torch.stack([p.grad.double().norm() for p in gradients.values()])
    close(norms, g[prefix + "grad_l2"], 1e-5, 1e-5)
    close(norms.norm(), g[prefix + "grad_norm"], 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["vae_f8d4", "vae_f16d32"])
def test_vae(golden, close, name):
    config, g = golden(name)
    vae = fill_(VAE_models[config["vae"]](), salt=config["salt"])
    posterior = vae.encode(g["in.image"])
    close(posterior.mean, g["out.mean"])
    close(posterior.logvar, g["out.logvar"])
    close(posterior.std, g["out.std"])
    close(posterior.kl(), g["out.kl"], 1e-5, 1e-6)
    moments, z, recon = vae(g["in.image"], g["in.eps"])
    close(Posterior(moments).mean, g["out.mean"])
    close(z, g["out.sample"])
    close(recon, g["out.recon_of_sample"])
    z = g["in.z"].clone().requires_grad_()
    recon = vae.decode(z)
    l1 = (recon - g["in.image"]).abs().mean()
    gradient = torch.autograd.grad(l1, z)[0]
    close(recon, g["out.recon_of_z"])
    close(l1, g["out.l1"])
    close(gradient, g["out.l1_grad_z"])
    close(gradient.double().norm(), g["out.l1_grad_z_norm"], 1e-5, 1e-5)


def check_statistics(close, discriminator, g, prefix):
    for name, buffer in discriminator.named_buffers():
        if f"{prefix}.{name}" in g:
            close(buffer, g[f"{prefix}.{name}"])


def test_discriminator(golden, close):
    config, g = golden("disc")
    discriminator = fill_(Discriminator(), salt=config["salt"])
    close(discriminator.eval()(g["in.image"]), g["out.eval_logits"])
    close(discriminator.train()(g["in.image"]), g["out.train_logits"])
    check_statistics(close, discriminator, g, "out.after_train")


@functools.cache
def filled_lpips(salt):
    return fill_(LPIPS(), salt=salt, post=lambda name, value: np.abs(value) if name.startswith("lin")
                 else value)


def test_lpips(golden, close):
    config, g = golden("lpips")
    lpips = filled_lpips(config["salt"])
    img1 = g["in.img1"].clone().requires_grad_()
    terms = lpips.layer_terms(g["in.img0"], img1)
    close(terms, g["out.layer_terms"])
    close(lpips(g["in.img0"], img1), g["out.distance"])
    close(torch.autograd.grad(terms.sum(1).mean(), img1)[0], g["out.mean_distance_grad_img1"])
    close(lpips(2 * g["in.img0"] - 1, 2 * g["in.img1"] - 1), g["out.reference_quirk"])


@pytest.mark.parametrize("kind", ["std", "quirk"])
def test_vae_loss_and_gradients(golden, close, kind):
    config, g = golden("vae_loss")
    weights = config["loss"]
    lpips = filled_lpips(config["salt"])
    distance = lpips if kind == "std" else lambda a, b: lpips(2 * a - 1, 2 * b - 1)
    discriminator = fill_(Discriminator(), salt=config["salt"]).train()
    recon, moments = (g[name].clone().requires_grad_() for name in ("in.recon", "in.moments"))
    parts = reconstruction_losses(g["in.image"], recon, Posterior(moments), distance,
                                  weights["reconstruction_weight"], weights["perceptual_weight"],
                                  weights["kl_weight"])
    gan = gan_loss(discriminator, recon)
    weighted_gan = weights["discriminator_weight"] * weights["discriminator_factor"] * gan
    total = sum(parts.values())
    for name, value in {**parts, "gan_loss": gan, "weighted_gan_loss": weighted_gan,
                        "total_loss": total + weighted_gan}.items():
        close(value, g[f"out.{kind}_{name}"])
    grad_recon, grad_moments = torch.autograd.grad(total + weighted_gan, (recon, moments))
    close(grad_recon, g[f"out.{kind}_grad_recon"])
    close(grad_moments, g[f"out.{kind}_grad_moments"])
    assert all(p.grad is None for p in discriminator.parameters())
    if kind == "quirk":
        return
    # before the discriminator's start the generator has no GAN term
    close(total, g["out.prestart_total_loss"])
    check_statistics(close, discriminator, g, "out.after_generator")
    d_loss, real, fake = discriminator_loss(discriminator, g["in.image"], recon)
    d_loss.backward()
    close(d_loss * weights["discriminator_factor"], g["out.d_loss"])
    close(real, g["out.d_logits_real"])
    close(fake, g["out.d_logits_fake"])
    norms = torch.stack([p.grad.double().norm() for p in discriminator.parameters()])
    assert [n for n, _ in discriminator.named_parameters()] == g["out.d_grad_param_names"]
    close(norms, g["out.d_grad_l2"], 1e-5, 1e-5)
    close(norms.norm(), g["out.d_grad_norm"], 1e-5, 1e-5)
    check_statistics(close, discriminator, g, "out.after_discriminator")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_lpips_in_chunks_has_the_gradient_of_the_whole(dtype, tolerance):
    torch.manual_seed(0)
    net = LPIPS().to(dtype)
    net.chunk = 2  # the last of three images comes alone
    images, recon, weights = (torch.rand(*shape, dtype=dtype)
                              for shape in ((3, 3, 32, 32), (3, 3, 32, 32), (3,)))
    recon.requires_grad_()
    actual, expected = net(images, recon), net.layer_terms(images, recon).sum(1)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    gradients = [torch.autograd.grad((weights * d).sum(), recon)[0] for d in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance * gradients[1].abs().max().item())
