"""finetune_vae.py on tiny runs: gradients, processes, resuming, measuring, exporting, users' mistakes."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT
from fill import fill_
from PIL import Image
from safetensors.torch import save_file
from test_train import assert_same, final_state
from test_train import metrics as logged

import finetune_vae as finetune
import sample_ddp
import train_repae_e as stage_one
from evaluate_fid import feature_statistics, frechet_distance
from models import metrics
from models.runtime import files, trainer, vae_files, vae_report, weights
from models.runtime.data import ShapesData, center_crop
from models.discriminator import Discriminator
from models.losses import discriminator_loss, gan_loss, reconstruction_losses
from models.lpips import LPIPS
from models.vae import Posterior, VAE_models
from models.runtime.images import round_to_uint8
from models.runtime.vae_report import held_out_images, measure

TINY = ["--preset", "demo", "--batch-size", "8", "--sampling-steps", "0", "--log-every", "1",
        "--checkpointing-steps", "2", "--keep-checkpoints", "0", "--exp-name", "run"]
MEASURE = ["--preset", "demo", "--exp-name", "run"]
GAN = ["--disc-weight", "0.1", "--disc-start", "0", "--adaptive-disc-weight", "--lecam-weight", "0.1"]
STATS = [torch.tensor(values).view(1, 4, 1, 1) for values in ([0.5, 1.0, 2.0, 4.0], [0.1, 0.2, 0.3, -0.4])]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A VAE file with statistics, of a VAE with some life in every weight."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(7)
    files.save(VAE_models["f4d4"]().state_dict(), folder / "vae.pt")
    files.save({"latents_scale": STATS[0], "latents_bias": STATS[1]}, folder / "vae-latents-stats.pt")
    return str(folder / "vae.pt")


def tiny_nets(start, *flags):
    args = finetune.parse_args([*TINY, "--ckpt", start, *flags])
    _, state, _ = finetune.check_settings(args, 1, None)
    nets = finetune.build_networks(args, torch.device("cpu"), state)
    trainer.prepare(nets, args)
    return nets, args


def tiny_batch(nets, args, step=1):
    data = ShapesData(64, args.resolution)
    return finetune.make_batch(nets, args, step, torch.stack([data[i][0] for i in range(args.batch_size)]))


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A checkpoint of two steps of the first stage."""
    folder = tmp_path_factory.mktemp("first")
    stage_one.main(["--preset", "demo", "--batch-size", "8", "--sampling-steps", "0", "--output-dir",
                    str(folder), "--max-train-steps", "2"])
    return str(folder / "demo" / "checkpoints" / "0000002.pt")


def run(folder, *flags):
    finetune.main([*TINY, "--output-dir", str(folder), *flags])
    return folder / "run"


def vae_backward(nets, args, batch, use_gan=False):
    """Part 2 of the step alone: (its losses, latents, reconstructions)."""
    parts = trainer.micro_batches(batch, 1)
    z, recon = trainer.first_pass(nets, parts)
    if use_gan:
        trainer.gan_gradient(nets, parts, recon)
        trainer.weigh_gan(parts, args.disc_weight * (finetune.adaptive_weight(nets, args, parts)
                                                     if args.adaptive_disc_weight else 1))
    trained = ["vae", "proj"] if nets.proj is not None else ["vae"]
    return trainer.backward(nets, parts, lambda part: finetune.vae_losses(nets, args, part), "vae_loss",
                            *trained), z, recon


def norms(net):
    return {n: 0.0 if p.grad is None else p.grad.double().norm().item() for n, p in net.named_parameters()}


# --------------------------------------------------------------------------------------------------- the step

def test_decoder_only_leaves_the_encoder_as_it_was(start):
    nets, args = tiny_nets(start, *GAN)
    before, images = {k: v.clone() for k, v in nets.vae.state_dict().items()}, tiny_batch(nets, args).images
    moments = nets.vae.moments(images)
    for step in (1, 2):
        _, skip = finetune.train_step(nets, args, tiny_batch(nets, args, step))
        assert skip == 0
    for vae in (nets.vae, nets.ema):
        after = vae.state_dict()
        assert torch.equal(vae.moments(images), moments)
        for name in before:
            frozen = name.startswith(("encoder.", "quant_conv."))
            assert torch.equal(before[name], after[name]) == frozen, name
    held = {id(p) for group in nets.opts["vae"].param_groups for p in group["params"]}
    assert held == {id(p) for n, p in nets.vae.named_parameters()
                    if n.startswith(("decoder.", "post_quant_conv."))}


def test_train_encoder_and_alignment_gradients(start):
    flags = ["--train-encoder", "--vae-align-proj-coeff", "0.5", "--encoder", "hog"]
    nets, args = tiny_nets(start, *flags, "--reconstruction-weight", "0", "--kl-weight", "0", "--disc-weight",
                           "0")
    batch = tiny_batch(nets, args)
    values, z, _ = vae_backward(nets, args, batch)
    found = norms(nets.vae)
    assert all(v > 0 for n, v in found.items() if n.startswith("encoder.conv"))
    # the alignment sees latents only
    assert all(v == 0 for n, v in found.items() if n.startswith("decoder."))
    assert all(v > 0 for v in norms(nets.proj).values())
    tokens = nets.proj(z)[0]
    cosine = torch.nn.functional.cosine_similarity(tokens, batch.zs[0], dim=-1)  # 8x8 latents, 8x8 tokens
    assert values["vae_align_loss"].item() == pytest.approx(-0.5 * cosine.mean().item(), abs=1e-5)


def test_golden_losses_and_gradients_through_the_step(golden, close):
    """The reference's VAE loss, with the posterior and the reconstruction as the weights that learn."""
    config, g = golden("vae_loss")
    weights = config["loss"]

    class Stored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moments, self.recon = (torch.nn.Parameter(g[name].clone())
                                        for name in ("in.moments", "in.recon"))

        def forward(self, images, eps):
            return self.moments, Posterior(self.moments).mean, self.recon

    args = finetune.parse_args(["--disc-weight",
                                str(weights["discriminator_weight"] * weights["discriminator_factor"]),
                                "--reconstruction-weight", str(weights["reconstruction_weight"]),
                                "--train-encoder", "--perceptual-weight", str(weights["perceptual_weight"]),
                                "--kl-weight", str(weights["kl_weight"])])
    lpips = fill_(LPIPS(), salt=config["salt"], post=lambda n, v: np.abs(v) if n.startswith("lin") else v)
    nets = trainer.Networks(torch.device("cpu"), Stored(),
                            disc=fill_(Discriminator(), salt=config["salt"]).train(), lpips=lpips,
                            loss_scale=trainer.LossScale(False, "cpu"), lecam_means=torch.zeros(2))
    nets.ddp = {"vae": nets.vae, "disc": nets.disc}
    batch = SimpleNamespace(images=g["in.image"], eps=None, zs=[])
    batch.eps = torch.zeros(len(batch.images))
    values, _, recon = vae_backward(nets, args, batch, use_gan=True)
    for name in ("reconstruction_loss", "perceptual_loss", "kl_loss", "gan_loss", "weighted_gan_loss"):
        close(values[name], g[f"out.std_{name}"], 1e-5, 1e-6)
    close(values["vae_loss"], g["out.std_total_loss"])
    close(nets.vae.recon.grad, g["out.std_grad_recon"])
    close(nets.vae.moments.grad, g["out.std_grad_moments"])
    assert set(norms(nets.disc).values()) == {0.0}
    part = SimpleNamespace(images=g["in.image"], recon=recon)
    found = trainer.backward(nets, [part], lambda part: finetune.disc_losses(nets, args, part), "d_loss",
                             "disc")
    close(found["d_loss"] * weights["discriminator_factor"], g["out.d_loss"])
    close(torch.tensor(list(norms(nets.disc).values())), g["out.d_grad_l2"], 1e-5, 1e-5)
    for name, buffer in nets.disc.named_buffers():
        if f"out.after_discriminator.{name}" in g:
            close(buffer, g[f"out.after_discriminator.{name}"])


def test_adaptive_weight_is_the_ratio_of_last_layer_gradients(start):
    nets, args = tiny_nets(start, *GAN, "--train-encoder")
    batch, last = tiny_batch(nets, args), nets.vae.decoder.conv_out.weight
    moments, _, r = nets.vae(batch.images, batch.eps)
    rec = reconstruction_losses(batch.images, r, Posterior(moments),
                                perceptual_weight=0)["reconstruction_loss"]
    g_rec, g_gan = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                    for loss in (rec, gan_loss(nets.disc, r)))
    values, _, _ = vae_backward(nets, args, batch, use_gan=True)
    assert values["disc_weight"].item() == pytest.approx(0.1 * (g_rec / (g_gan + 1e-4)).item(), rel=1e-4)
    total = values["reconstruction_loss"] + values["kl_loss"] + values["disc_weight"] * values["gan_loss"]
    assert values["vae_loss"].item() == pytest.approx(total.item(), rel=1e-5)
    # a discriminator without a gradient: no infinite weight
    batch.gan_gradient = torch.zeros_like(batch.images)
    assert finetune.adaptive_weight(nets, args, [batch]) <= 1e4


def test_lecam(start):
    logits = {0: torch.tensor([[2.0, -1.0]]), 1: torch.tensor([[-3.0, 1.0]])}
    discriminator = lambda x: logits[int(x)]  # noqa: E731
    d_loss, real, fake = discriminator_loss(discriminator, torch.tensor(0), torch.tensor(1), 0.5,
                                            torch.tensor([0.5, -0.5]))
    hinge = 0.5 * ((0 + 2) / 2 + (0 + 2) / 2)
    lecam = (2.5 ** 2 + 0) / 2 + (3.5 ** 2 + 0) / 2
    assert d_loss.item() == pytest.approx(hinge + 0.5 * lecam) and real == 0.5 and fake == -1
    nets, args = tiny_nets(start, *GAN)
    for step in (1, 2):
        old = nets.lecam_means.clone()
        values, _ = finetune.train_step(nets, args, tiny_batch(nets, args, step))
        expected = 0.999 * old + 0.001 * torch.stack([values["logits_real"], values["logits_fake"]])
        torch.testing.assert_close(nets.lecam_means, expected)


def test_accumulation_equals_the_whole_batch(start):
    """All gradients, batch norm statistics and losses; the discriminator's and the adaptive weight too."""
    results = []
    for n in (1, 2, 4):
        nets, args = tiny_nets(start, *GAN, "--gradient-accumulation-steps", str(n), "--max-grad-norm", "1e9",
                               "--train-encoder", "--vae-align-proj-coeff", "0.5")
        nets.opts = {}  # keep the gradients
        values, _ = finetune.train_step(nets, args, tiny_batch(nets, args))
        gradients = {f"{name}.{k}": p.grad for name in nets.trained
                     for k, p in getattr(nets, name).named_parameters()}
        results.append((values, gradients, [b.clone() for b in nets.statistics]))
    for values, gradients, statistics in results[1:]:
        for name in values:
            assert values[name].item() == pytest.approx(results[0][0][name].item(), abs=1e-5, rel=1e-4), name
        for name in gradients:
            torch.testing.assert_close(gradients[name], results[0][1][name], atol=1e-5, rtol=1e-3, msg=name)
        for a, b in zip(statistics, results[0][2]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(start):
    nets, args = tiny_nets(start, *GAN)
    finetune.train_step(nets, args, tiny_batch(nets, args))

    def state():
        return [v.clone() for net in (nets.vae, nets.disc) for v in net.state_dict().values()
                if v.is_floating_point()] + [nets.lecam_means.clone()]
    before, batch = state(), tiny_batch(nets, args, step=2)
    batch.images[0, 0, 0, 0] = float("nan")
    _, skip = finetune.train_step(nets, args, batch)
    assert skip == 1
    assert_same(before, state())


def test_bf16_step_stays_close_to_float32(start):
    found = []
    for precision in ("no", "bf16"):
        nets, args = tiny_nets(start, "--batch-size", "2", "--disc-weight", "0.1", "--disc-start", "0",
                               "--mixed-precision", precision)
        values, skip = finetune.train_step(nets, args, tiny_batch(nets, args))
        assert skip == 0 and all(p.dtype == torch.float32 for p in nets.vae.parameters())
        found.append(values)
    for name in ("reconstruction_loss", "vae_loss", "d_loss"):
        assert found[1][name].item() == pytest.approx(found[0][name].item(), rel=0.03), name


# ------------------------------------------------------------------------------- processes, resuming, the run

def test_two_processes_equal_one(tmp_path, start, photos, first_stage):
    train = [*TINY, "--ckpt", start, *GAN, "--train-encoder", "--vae-align-proj-coeff", "0.5",
             "--max-train-steps", "2", "--learning-rate", "1e-4", "--disc-learning-rate", "1e-4",
             "--data-dir", str(photos.parent)]
    measure = ["--preset", "demo", "--eval", start, "--metrics", "psnr,latents,cknna", "--limit", "20",
               "--model-ckpt", first_stage, "--exp-name", "measured"]
    for flags in (train, measure):
        finetune.main([*flags, "--output-dir", str(tmp_path / "one")])
        processes.run_two("finetune_vae", [*flags, "--output-dir", tmp_path / "two"], tmp_path / "log")
    one, two = tmp_path / "one", tmp_path / "two"
    for x, y in zip(logged(one / "run"), logged(two / "run"), strict=True):
        for name in x:
            if name.endswith("loss") or name.startswith(("logits", "disc_weight")):
                assert y[name] == pytest.approx(x[name], abs=2e-5), (x["step"], name)
    a, b = final_state(one / "run", 2), final_state(two / "run", 2)
    for name in ("latents_scale", "latents_bias", "lecam_means"):
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(a["vae_ema"]["decoder.conv_out.weight"],
                               b["vae_ema"]["decoder.conv_out.weight"], atol=1e-5, rtol=0)
    one, two = (json.loads((k / "measured" / "metrics.json").read_text())["vaes"][start] for k in (one, two))
    assert "cknna" in one
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_killed_and_resumed_gives_the_same_bits(tmp_path, start):
    flags = ("--ckpt", start, *GAN, "--max-train-steps", "4", "--hflip", "--num-workers", "1")
    torch.set_num_threads(1)
    whole = final_state(run(tmp_path / "whole", *flags), 4)
    process = processes.start("finetune_vae", [*TINY, "--output-dir", tmp_path / "killed", *flags],
                              tmp_path / "log")
    folder = tmp_path / "killed" / "run"
    processes.wait_for((folder / "checkpoints" / "0000002.pt").exists, [process], tmp_path / "log")
    processes.kill(process)
    assert not (folder / "checkpoints" / "0000004.pt").exists()
    resumed = final_state(run(tmp_path / "killed", *flags), 4)
    whole["args"].pop("output_dir"), resumed["args"].pop("output_dir")
    assert_same(whole, resumed)
    assert [m["step"] for m in logged(folder)] == [1, 2, 3, 4]


def test_run_folder_and_checkpoint_layout(tmp_path, start, close):
    folder = run(tmp_path, "--ckpt", start, "--max-train-steps", "2", "--sampling-steps", "2", "--batch-size",
                 "4", *GAN, "--disc-start", "1")
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "args.json", "checkpoints", "log.txt",
                                                        "metrics.jsonl", "reconstructions"]
    with Image.open(folder / "reconstructions" / "0000002.png") as image:
        assert image.format == "PNG" and min(image.size) > 3 * 64
    names = ("reconstruction_loss weighted_gan_loss gan_loss disc_weight vae_loss grad_norm_vae d_loss "
             "logits_real logits_fake grad_norm_disc step images_per_s peak_memory_gib seconds_per_step mfu "
             "skipped_steps skipped_files")
    assert set(names.split()) <= set(logged(folder)[-1]) and 0 < logged(folder)[-1]["mfu"] < 2
    # What does not act is not logged: KL (frozen encoder), LPIPS (weight 0), the GAN before --disc-start.
    first = {"kl_loss", "perceptual_loss", "vae_align_loss", "gan_loss", "weighted_gan_loss", "disc_weight"}
    assert not first & set(logged(folder)[0])
    state = final_state(folder, 2)
    assert list(state) == ["vae", "vae_ema", "opt_vae", "discriminator", "opt_disc", "latents_scale",
                           "latents_bias", "lecam_means", "data", "source_config", "log", "loss_scale",
                           "args", "steps"]
    assert json.loads((folder / "args.json").read_text()) == state["args"] and state["args"]["vae"] == "f4d4"
    loaded, stats = vae_files.load_vae_file(str(folder / "checkpoints" / "0000002.pt"))
    assert_same(loaded, state["vae_ema"])
    close(stats[0], STATS[0], 0), close(stats[1], STATS[1], 0)  # the encoder is frozen: its statistics stay
    again = finetune.parse_args([*TINY, "--ckpt", str(folder / "checkpoints" / "0000002.pt"), "--disc-weight",
                                 "0.1"])
    finetune.check_settings(again, 1, None)
    assert again.disc_ckpt == again.ckpt and again.disc_start == 0  # its discriminator goes on too
    disc = weights.discriminator(again.disc_ckpt, "f4d4")
    assert_same(dict(disc.state_dict()), dict(state["discriminator"]))


def test_from_scratch_measures_the_statistics_of_what_it_saves(tmp_path, close, monkeypatch):
    monkeypatch.setattr(finetune, "STATS_IMAGES", 400)
    folder = run(tmp_path, "--ckpt", "none", "--vae", "f4d4", "--train-encoder", "--max-train-steps", "2",
                 "--batch-size", "4")
    state, stats = vae_files.load_vae_file(str(folder / "checkpoints" / "0000002.pt"))
    vae, data = VAE_models["f4d4"](), ShapesData(400, 32, seed=5)
    vae.load_state_dict(state)
    # the average
    assert not torch.equal(state["encoder.conv_in.weight"],
                           final_state(folder, 2)["vae"]["encoder.conv_in.weight"])
    with torch.no_grad():
        posterior = vae.encode(torch.stack([data[i][0] for i in range(400)]).float() / 127.5 - 1)
    mean, square = metrics.latent_moments(posterior)
    close(stats[1].flatten(), mean, 0.02)
    close(stats[0].flatten() ** -2, square - mean.square(), 0, 0.02)


def test_refined_vae_in_the_other_scripts(tmp_path, first_stage):
    """A VAE of the first stage, refined: closer to unseen images, the same latents, usable everywhere."""
    ckpt = first_stage
    folder = run(tmp_path, "--ckpt", ckpt, "--max-train-steps", "8", "--ema-decay", "0.7",
                 "--checkpointing-steps", "100")
    refined = str(folder / "checkpoints" / "0000008.pt")
    data, found = ShapesData(64, 32, seed=1), []
    x = torch.stack([data[i][0] for i in range(64)]).float() / 127.5 - 1
    for path in (ckpt, refined):
        vae = VAE_models["f4d4"]()
        vae.load_state_dict(vae_files.load_vae_file(path)[0])
        with torch.no_grad():
            mean = vae.encode(x).mean
            found.append((mean, (vae.decode(mean) - x).abs().mean().item()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] < 0.9 * found[0][1]
    before, after = (vae_files.load_vae_file(path)[1] for path in (ckpt, refined))
    assert_same(before, after)
    sample_ddp.main(["--ckpt", ckpt, "--vae-ckpt", refined, "--num-fid-samples", "4", "--num-steps", "2",
                     "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as samples:
        # it refuses what is not finite
        assert samples["arr_0"].shape == (4, 32, 32, 3) and samples["arr_0"].std() > 1
    stage_one.main(["--preset", "demo", "--batch-size", "2", "--sampling-steps", "0", "--max-train-steps",
                    "1", "--output-dir", str(tmp_path), "--freeze-vae", "--vae-ckpt", refined, "--exp-name",
                    "frozen"])
    frozen = str(tmp_path / "frozen" / "checkpoints" / "0000001.pt")  # leads to its VAE in every mode
    again = run(tmp_path / "again", "--ckpt", frozen, "--max-train-steps", "1", "--batch-size", "2")
    assert_same(vae_files.load_vae_file(str(again / "checkpoints" / "0000001.pt"))[1],
                vae_files.load_vae_file(frozen)[1])
    finetune.main([*MEASURE, "--eval", frozen, refined, "--output-dir", str(tmp_path), "--exp-name", "m",
                   "--limit", "4", "--metrics", "psnr"])
    one, two = json.loads((tmp_path / "m" / "metrics.json").read_text())["vaes"].values()
    assert one == two
    finetune.main(["--ckpt", frozen, "--export", str(tmp_path / "export"), "--format", "compvis"])
    assert_same(dict(files.load(tmp_path / "export" / "export.pt")), vae_files.load_vae_file(refined)[0])
    sit = files.load(tmp_path / "frozen" / "checkpoints" / "0000001.pt")["model"]
    torch.testing.assert_close(sit["bn.running_mean"], after[1].flatten())
    torch.testing.assert_close(sit["bn.running_var"], after[0].flatten() ** -2)


# -------------------------------------------------------------------------------------------------- measuring

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 12 small JPEG files, some of another shape, and a .zip of them."""
    folder, data = tmp_path_factory.mktemp("photos") / "all", ShapesData(12, 48)
    folder.mkdir()
    for i in range(12):
        image = Image.fromarray(data[i][0].permute(1, 2, 0).numpy())
        image.resize((40, 56) if i % 3 else (48, 48)).save(folder / f"{i:02d}.jpg", quality=95)
    with zipfile.ZipFile(folder.parent / "all.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"all/{path.name}")
    return folder


class TinyInception(torch.nn.Module):
    """Pool and spatial features that cost nothing."""

    def forward(self, images):
        x = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 8).flatten(1)
        return x[:, :6], x[:, 6:9]


def test_eval_measures_several_vaes(tmp_path, start, photos, monkeypatch, capsys, close):
    monkeypatch.setattr(vae_report, "load_inception", lambda path, device: TinyInception())
    lpips = LPIPS()
    monkeypatch.setattr(weights, "lpips", lambda remedy: lpips)
    torch.manual_seed(8)
    other = str(tmp_path / "other" / "other.pt")
    vae_files.export_vae(tmp_path / "other", VAE_models["f4d4"]().state_dict(), STATS, "compvis")
    flags = [*MEASURE, "--output-dir", str(tmp_path), "--eval", start, other,
             "--metrics", "psnr,ssim,lpips,rfid,latents"]
    finetune.main([*flags, "--data-dir", f"{photos}.zip", "--resolution", "32"])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["images"] == 12 and list(result["vaes"]) == [start, other]
    assert "these images themselves, not the reference of a generation benchmark" in out
    assert re.search(r"VAE +PSNR +SSIM +LPIPS +rFID +spatial variance +total variation\n", out)

    images = np.stack([np.asarray(center_crop(Image.open(p).convert("RGB"), 32))
                       for p in sorted(photos.iterdir())])
    a = torch.from_numpy(images).permute(0, 3, 1, 2)
    for source, figures in result["vaes"].items():
        vae = VAE_models["f4d4"]()
        vae.load_state_dict(vae_files.load_vae_file(source)[0])
        with torch.no_grad():
            posterior = vae.encode(a.float() / 127.5 - 1)
            copies = ((vae.decode(posterior.mean) + 1) * 127.5).round().clamp(0, 255)
            distance = lpips(a.float() / 127.5 - 1, copies / 127.5 - 1).mean()
        mean, square = metrics.latent_moments(posterior)
        pools = [TinyInception()(v.permute(0, 2, 3, 1))[0].numpy() for v in (copies, a)]
        expected = {"psnr": metrics.psnr(a, copies).mean(), "ssim": metrics.ssim(a, copies).mean(),
                    "lpips": distance,
                    "rfid": frechet_distance(*feature_statistics(pools[0]), *feature_statistics(pools[1])),
                    "spatial_variance": posterior.mean.var((2, 3), correction=0).mean(),
                    "total_variation": metrics.total_variation(posterior.mean).mean(),
                    "latents_mean": mean, "latents_std": (square - mean.square()).sqrt()}
        assert set(expected) == set(figures)
        for name, value in expected.items():
            close(figures[name], value, 1e-4, 1e-4)
        assert f"{figures['psnr']:.4f}" in out and f"{figures['rfid']:.4f}" in out
    with Image.open(tmp_path / "run" / "images.png") as picture:
        assert picture.width >= 8 * 64 and picture.height >= 5 * 64  # originals, and two rows for each VAE
    finetune.main([*flags, "--data-dir", str(photos), "--resolution", "32", "--exp-name", "folder"])
    assert json.loads((tmp_path / "folder" / "metrics.json").read_text())["vaes"] == result["vaes"]


def test_measure_does_not_depend_on_batches(start):
    vae = VAE_models["f4d4"]().eval()
    vae.load_state_dict(files.load(start))
    images = held_out_images("shapes", 32, limit=10, seed=1)
    found = [measure(vae, images.read(size), torch.device("cpu")) for size in (10, 3)]
    for name in found[0]:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name
    parts = [measure(vae, images.read(2, rank, 2), torch.device("cpu"))["psnr"] for rank in (0, 1)]
    assert (6 * parts[0] + 4 * parts[1]) / 10 == pytest.approx(found[0]["psnr"], rel=1e-5)
    assert round_to_uint8(torch.tensor([-2, -1, 0.0, 1,
                                        3]).view(1, 1, 1, 5)).flatten().tolist() == [0, 0, 128, 255, 255]


def test_cknna_of_a_training_checkpoint(tmp_path, start, first_stage):
    ckpt = first_stage
    flags = [*MEASURE, "--output-dir", str(tmp_path), "--limit", "40", "--metrics", "psnr,cknna",
             "--eval", ckpt, start]
    finetune.main(flags)
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())["vaes"]
    assert "cknna" not in figures[start]  # a VAE alone has no model
    assert 0 < figures[ckpt]["cknna"] < 1
    images = held_out_images("shapes", 32, limit=40, seed=1)
    sit, vae, settings, _ = weights.load(ckpt)
    sit.encoder_depth = settings["encoder_depth"]
    hog, kept = finetune.load_encoders("hog", None, 32, "cpu")[0], []
    sit.blocks[sit.encoder_depth - 1].register_forward_hook(lambda *a: kept.append(a[2]))
    x = torch.from_numpy(next(images.read(40))).permute(0, 3, 1, 2)
    with torch.no_grad():
        z = sit.normalize(vae.encode(x.float() / 127.5 - 1).mean)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        sit(0.5 * z + 0.5 * noise, torch.full((40,), 0.5), torch.full((40,), 10))
        expected = metrics.cknna(kept[0].mean(1), hog(x).mean(1))
    assert figures[ckpt]["cknna"] == pytest.approx(expected, abs=1e-3)
    finetune.main([*flags, "--model-ckpt", ckpt, "--exp-name", "both"])
    figures = json.loads((tmp_path / "both" / "metrics.json").read_text())["vaes"]
    assert figures[ckpt]["cknna"] == pytest.approx(expected, abs=1e-3)
    assert figures[start]["cknna"] != figures[ckpt]["cknna"]


# ----------------------------------------------------------------------------------------------------- export

def test_a_refinement_keeps_the_numbers_of_its_source(tmp_path, start, monkeypatch):
    """Of a diffusers folder, in its checkpoints, so that an export needs the folder no more."""
    monkeypatch.setattr(finetune, "STATS_IMAGES", 40)
    source = tmp_path / "source"
    source.mkdir()
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "shift_factor": None}
    (source / "config.json").write_text(json.dumps(config))
    save_file(vae_files.to_diffusers(files.load(start)), source / "diffusion_pytorch_model.safetensors")
    numbers = {"scaling_factor": 0.5, "shift_factor": 0.0, "force_upcast": True}
    flags = ["--ckpt", str(source), "--batch-size", "2"]
    run(tmp_path / "decoder", *flags, "--max-train-steps", "1")
    shutil.move(source, tmp_path / "gone")
    path = run(tmp_path / "decoder", *flags, "--max-train-steps", "2") / "checkpoints" / "0000002.pt"
    assert vae_files.source_config(str(path)) == numbers
    again = run(tmp_path / "again", "--ckpt", str(path), "--batch-size", "2", "--max-train-steps", "1")
    assert vae_files.source_config(str(again / "checkpoints" / "0000001.pt")) == numbers
    whole = run(tmp_path / "whole", "--ckpt", str(path), "--batch-size", "2", "--max-train-steps", "1",
                "--train-encoder")
    assert vae_files.source_config(str(whole / "checkpoints" / "0000001.pt")) == {"force_upcast": True}


def test_export_from_a_training_checkpoint(tmp_path, close):
    """The real f8d4 to a diffusers folder, which the package, if installed, decodes alike; and back."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VAE_models["f8d4"]().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {k: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for k, shape in shapes.items()}
    compvis = {"model": {}, "ema": {"bn.running_var": STATS[0].flatten() ** -2,
                                    "bn.running_mean": STATS[1].flatten()}, "vae": state}
    files.save(compvis, tmp_path / "0400000.pt")
    finetune.main(["--ckpt", str(tmp_path / "0400000.pt"), "--export", str(tmp_path / "out" / "e2e-vae")])
    assert os.listdir(tmp_path / "out") == ["e2e-vae"]
    written = sorted(os.listdir(tmp_path / "out" / "e2e-vae"))
    assert written == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / "out" / "e2e-vae" / "config.json").read_text())
    assert config["latents_mean"] == pytest.approx(STATS[1].flatten().tolist())
    assert config["latents_std"] == pytest.approx((1 / STATS[0]).flatten().tolist())
    finetune.main(["--ckpt", str(tmp_path / "out" / "e2e-vae"), "--export", str(tmp_path / "back"),
                   "--format", "compvis"])
    assert sorted(os.listdir(tmp_path / "back")) == ["back-latents-stats.pt", "back.pt"]
    again, stats = vae_files.load_vae_file(str(tmp_path / "back" / "back.pt"))
    assert set(state) == set(again) and all(torch.equal(state[k], again[k]) for k in state)
    close(stats[0], STATS[0], 1e-6), close(stats[1], STATS[1], 1e-6)
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        return
    peer, vae = AutoencoderKL.from_pretrained(tmp_path / "out" / "e2e-vae").float(), VAE_models["f8d4"]()
    vae.load_state_dict(state)
    with torch.no_grad():
        z = torch.randn(1, 4, 4, 4, generator=generator)
        close(peer.decode(z).sample, vae.decode(z), 1e-5, 1e-5)
    assert peer.config.latents_mean == pytest.approx(STATS[1].flatten().tolist())


def test_export_statistics_and_force(tmp_path, start, capsys):
    state, bare = files.load(start), tmp_path / "bare.pt"
    out = ["--export", str(tmp_path / "out"), "--format", "compvis"]
    files.save(state, bare)
    finetune.main(["--ckpt", str(bare), *out])
    assert "out.pt" in (text := capsys.readouterr().out) and "stats" not in text
    assert vae_files.load_vae_file(str(tmp_path / "out" / "out.pt"))[1] is None
    finetune.main(["--ckpt", str(bare), *out, "--force", "--latents-stats",
                   start.replace(".pt", "-latents-stats.pt")])
    again, stats = vae_files.load_vae_file(str(tmp_path / "out" / "out.pt"))
    assert_same(dict(state), again)
    assert_same(STATS, stats)


def test_an_export_that_fails_leaves_the_old_one(tmp_path, start, monkeypatch):
    state, save = files.load(start), files.save
    vae_files.export_vae(tmp_path / "vae", state, STATS, "compvis")
    before = {p.name: p.read_bytes() for p in (tmp_path / "vae").iterdir()}

    def full(content, path):
        if "stats" in path:
            raise OSError("disk full")
        save(content, path)
    monkeypatch.setattr(files, "save", full)
    with pytest.raises(OSError, match="disk full"):
        vae_files.export_vae(tmp_path / "vae", {k: v + 1 for k, v in state.items()}, STATS, "compvis",
                             force=True)
    assert os.listdir(tmp_path) == ["vae"]
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "vae").iterdir()}


# ------------------------------------------------------------------------------------------- flags, bad input

def test_every_flag_is_documented_and_read(capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--help"])
    text, flags = capsys.readouterr().out, set(vars(finetune.parse_args([])))
    runtime = ROOT / "models" / "runtime"
    read = ROOT / "finetune_vae.py", *(runtime / f"{name}.py" for name in ("trainer", "runlog", "vae_report"))
    code = "".join(path.read_text() for path in read)
    for name in flags:
        assert f"--{name.replace('_', '-')}" in text
        assert f"args.{name}" in code or name == "preset", name
    for preset in finetune.PRESETS.values():
        assert set(preset) <= flags
    for name in finetune.FIXED_IN_A_RUN:
        assert name in flags


ALIGNED = ["--ckpt", "{start}", "--train-encoder", "--vae-align-proj-coeff", "1"]


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "{tmp}/nothing.pt"], "nothing.pt"),
    (["--ckpt", "{start}", "--vae", "f8d4"], "f4d4, not --vae f8d4"),
    (["--ckpt", "{tmp}/odd.pt"], "7 latent channels"),
    (["--ckpt", "{tmp}/cut.pt"], "another architecture"),
    (["--ckpt", "{tmp}/unet"], "UNet2DModel"),
    (["--ckpt", "{start}", "--latents-stats", "{tmp}/two.pt"], "2 channels"),
    (["--ckpt", "none"], "--train-encoder"),
    (["--ckpt", "{start}", "--vae-align-proj-coeff", "1"], "--train-encoder"),
    (["--ckpt", "{start}", "--data-dir", "{photos}"], "class folder"),
    (["--ckpt", "{start}", "--data-dir", "{photos}/..", "--batch-size", "64"],
     "12 images are fewer than one batch"),
    (["--ckpt", "{start}", "--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--ckpt", "{start}", "--resolution", "30"], "--resolution 30"),
    (["--ckpt", "{start}", "--resolution", "24", "--disc-weight", "1"], "--disc-weight 0"),
    (["--ckpt", "{start}", "--resolution", "8", "--perceptual-weight", "1"], "--perceptual-weight 0"),
    ([*ALIGNED, "--encoder", "test_vit"], "give them with --encoder-ckpt"),
    ([*ALIGNED, "--encoder", "test_vit", "--encoder-ckpt", "{tmp}/two.pt"], "another architecture"),
    ([*ALIGNED, "--encoder", "test_vit", "--encoder-ckpt", "{tmp}/no.pt"], "no.pt"),
    ([*ALIGNED, "--encoder", "nonesuch"], "unknown encoder"),
    (["--ckpt", "{start}", "--batch-size", "0"], "--batch-size"),
    (["--ckpt", "{start}", "--resume", "{tmp}/odd.pt"], "odd.pt"),
    (["--ckpt", "{start}", "--report-to", "wandb"], "wandb"),
    (["--export", "{tmp}/new", "--ckpt", "{start}"], "--format compvis"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--ckpt", "{start}", "--gradient-accumulation-steps", "3"], "--batch-size 8"),
    (["--ckpt", "{start}", "--ema-decay", "1.5"], "--ema-decay"),
    (["--ckpt", "{start}", "--perceptual-weight", "1"], "--perceptual-weight 0"),
    (["--ckpt", "{start}", "--disc-weight", "1", "--disc-ckpt", "{tmp}/odd.pt"], "odd.pt"),
    (["--eval", "{start}", "--metrics", "psnr,fid"], "psnr,fid"),
    (["--eval", "{start}", "--metrics", "psnr,lpips"], "leave it out with --metrics psnr"),
    (["--eval", "{start}", "--metrics", "psnr,rfid"], "leave it out with --metrics psnr"),
    (["--eval", "{start}", "--metrics", "cknna"], "--model-ckpt"),
    (["--eval", "{start}", "--metrics", "cknna", "--model-ckpt", "{start}"], "no training checkpoint"),
    (["--eval", "{start}", "{tmp}/nothing.pt"], "nothing.pt"),
    (["--eval", "{start}", "--data-dir", "{tmp}/small.npz", "--metrics", "psnr"], "pass --resolution 16"),
    (["--eval", "{start}", "--data-dir", "{tmp}/empty", "--metrics", "psnr"], "no images"),
    (["--export", "{tmp}/unet", "--ckpt", "{start}"], "--force"),
    (["--export", "{tmp}", "--ckpt", "{start}", "--force"], "holds more than an export"),
    (["--export", "{tmp}/new", "--ckpt", "none"], "--ckpt"),
    (["--export", "{tmp}/new", "--ckpt", "{tmp}/nan.pt", "--format", "compvis"], "encoder.conv_in.bias"),
    (["--export", "{tmp}/odd.pt/new", "--ckpt", "{start}", "--format", "compvis"], "odd.pt/new"),
    (["--eval", "{start}", "--metrics", "psnr", "--limit", "0"], "--limit"),
    (["--eval", "{start}", "--metrics", "psnr", "--limit", "-3"], "--limit"),
    (["--eval", "{start}", "--batch-size", "4", "--train-encoder"],
     "--eval does not read --batch-size, --train-encoder"),
    (["--eval", "{start}", "--export", "{tmp}/new"], "--eval does not read --export"),
    (["--export", "{tmp}/new", "--ckpt", "{start}", "--limit", "3"], "--export does not read --limit"),
    (["--ckpt", "{start}", "--metrics", "psnr"], "only --eval reads --metrics"),
    (["--ckpt", "{start}", "--force"], "only --export reads --force"),
])
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, start, photos, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(files.requests, "get", no_network)
    state = files.load(start)
    files.save(dict(state, **{"decoder.conv_in.weight": torch.zeros(64, 7, 3, 3)}), tmp_path / "odd.pt")
    files.save({k: v for k, v in state.items() if k != "encoder.conv_in.bias"}, tmp_path / "cut.pt")
    torch.save(dict(state, **{"encoder.conv_in.bias": torch.full((64,), torch.nan)}), tmp_path / "nan.pt")
    files.save({"latents_scale": torch.ones(2), "latents_bias": torch.ones(2)}, tmp_path / "two.pt")
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    (tmp_path / "empty").mkdir(), (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    before = sorted(os.listdir(tmp_path))
    flags = [f.format(tmp=tmp_path, start=start, photos=photos) for f in flags]
    mode = [*MEASURE, "--output-dir", str(tmp_path / "out")] if "--eval" in flags else \
        ["--preset", "demo"] if "--export" in flags else \
        [*TINY, "--output-dir", str(tmp_path / "out"), "--max-train-steps", "1"]
    for dry_run in (["--dry-run"], []):  # it finds what the run itself would
        with pytest.raises(SystemExit) as stop:
            finetune.main([*mode, *flags, *dry_run])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert sorted(set(os.listdir(tmp_path)) - {"hub"}) == before  # torchvision makes its cache folder


def test_without_a_weight_no_discriminator_is_fetched(start, monkeypatch):
    def fetch(*_):
        raise AssertionError("a discriminator was asked for")
    monkeypatch.setattr(weights, "discriminator_state", fetch)
    _, args = tiny_nets(start)
    assert args.disc_ckpt == "none"
    with pytest.raises(AssertionError, match="asked for"):
        tiny_nets(start, "--disc-weight", "0.1")


def no_network(*args, **kwargs):
    raise files.requests.ConnectionError("no network")  # a kind of OSError


def test_a_run_folder_takes_no_other_run(tmp_path, start, photos, capsys):
    """The same command goes on, without remarks; another VAE, loss or data set is refused."""
    flags = ["--ckpt", start, "--batch-size", "4", "--data-dir", str(photos.parent), *GAN]
    folder = run(tmp_path, *flags, "--max-train-steps", "1")
    capsys.readouterr()
    run(tmp_path, *flags, "--max-train-steps", "1")
    out = capsys.readouterr().out
    assert "from step 1" in out and "changed" not in out
    shutil.copytree(photos.parent, tmp_path / "larger")
    shutil.copy(photos / "00.jpg", tmp_path / "larger" / "all" / "copy.jpg")
    for more, words in ((["--train-encoder"], "--train-encoder False"),
                        (["--disc-weight", "0.2"], "--disc-weight 0.1"),
                        (["--ckpt", "other.pt"], "other.pt"),
                        (["--disc-ckpt", "other.pt"], "--disc-ckpt none"),
                        (["--data-dir", "shapes"], "classes of the data have changed"),
                        (["--data-dir", str(tmp_path / "larger")], "other data than")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *flags, "--max-train-steps", "2", *more)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert len(logged(folder)) == 1


def test_the_first_line_after_a_resume(tmp_path, start):
    """It averages over all steps since the line before, those before the stop included."""
    flags = ["--ckpt", start, "--batch-size", "4", "--log-every", "2", *GAN]
    whole = logged(run(tmp_path / "whole", *flags, "--max-train-steps", "4"))
    for steps in ("1", "3", "4"):
        folder = run(tmp_path / "parts", *flags, "--max-train-steps", steps)
    parts = logged(folder)
    assert [line["step"] for line in whole] == [2, 4] and [line["step"] for line in parts] == [1, 2, 3, 4]
    for a, b in zip(whole, parts[1::2]):
        same = {name: value for name, value in a.items() if "loss" in name or "norm" in name
                or "skipped" in name}
        assert same == {name: b[name] for name in same} and len(same) > 8


@pytest.mark.parametrize("flags", [
    [*TINY, "--ckpt", "{start}", "--max-train-steps", "1"],
    [*TINY, "--ckpt", "none", "--vae", "f4d4", "--train-encoder", "--vae-align-proj-coeff", "1",
     "--resolution", "40", "--max-train-steps", "1"],
    [*MEASURE, "--eval", "{start}", "--metrics", "psnr,cknna", "--model-ckpt", "{ckpt}", "--limit", "12"],
    ["--export", "{tmp}/out", "--ckpt", "{start}", "--format", "compvis"],
])
def test_a_dry_run_writes_nothing_and_what_it_calls_sound_is(tmp_path, start, first_stage, flags, monkeypatch,
                                                             capsys):
    monkeypatch.setattr(finetune, "STATS_IMAGES", 40)
    flags = [f.format(start=start, ckpt=first_stage, tmp=tmp_path) for f in flags]
    flags += [] if "--export" in flags else ["--output-dir", str(tmp_path / "out")]
    finetune.main([*flags, "--dry-run"])
    assert capsys.readouterr().out.endswith("settings are sound\n") and os.listdir(tmp_path) == []
    finetune.main(flags)
    assert os.listdir(tmp_path) == ["out"]


def test_a_dry_run_looks_at_the_folder_that_is_there(tmp_path, start, capsys):
    """Checkpoint, settings and lock; the folder stays as it was."""
    flags = ["--ckpt", start, "--batch-size", "4"]
    folder = run(tmp_path, *flags, "--max-train-steps", "1")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    capsys.readouterr()
    run(tmp_path, *flags, "--max-train-steps", "1", "--dry-run")
    assert capsys.readouterr().out.endswith("settings are sound\n")
    state = final_state(folder, 1)
    del state["opt_vae"]["state"][0]["exp_avg"]
    files.save(state, folder / "checkpoints" / "0000002.pt")
    for more, words in ((["--dry-run"], "opt_vae"),
                        (["--dry-run", "--learning-rate", "1", "--seed", "3"], "--seed 0")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *flags, *more)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    os.remove(folder / "checkpoints" / "0000002.pt")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before
    held = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'a'); "
                             "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()",
                             folder / ".lock"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags, "--max-train-steps", "1", "--dry-run")
    held.communicate(b"")
    assert stop.value.code == 2 and "another run is at work" in capsys.readouterr().err
