"""finetune_vae.py on tiny runs: gradients, processes, resuming, measuring, exporting, users' mistakes."""
import json
import os
import shutil
import zipfile

import numpy as np
import processes
import pytest
import torch
from fill import fill_
from PIL import Image
from safetensors.torch import save_file
from test_train import assert_same, final_state
from test_train import metrics as logged

import finetune_vae as finetune
import sample_ddp
import train_repae_e as stage_one
from models import metrics
from models.losses import discriminator_loss, gan_loss, reconstruction_losses
from models.lpips import LPIPS
from models.metrics import feature_statistics, frechet_distance
from models.runtime import files, trainer, vae_files, vae_report, weights
from models.runtime.data import ShapesData, center_crop
from models.vae import AutoencoderKL, Posterior, VAE_models

TINY = ["--preset", "demo", "--batch-size", "8", "--sampling-steps", "0", "--log-every", "1",
        "--checkpointing-steps", "2", "--keep-checkpoints", "0", "--exp-name", "run"]
MEASURE = ["--preset", "demo", "--exp-name", "run"]
GAN = ["--disc-weight", "0.1", "--disc-start", "0"]
STATS = [torch.tensor(values).view(1, 4, 1, 1) for values in ([0.5, 1.0, 2.0, 4.0], [0.1, 0.2, 0.3, -0.4])]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A VAE file with statistics, of a VAE with some life in every weight."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(7)
    files.save(VAE_models["f4d4"]().state_dict(), folder / "vae.pt")
    files.save({"latents_scale": STATS[0], "latents_bias": STATS[1]}, folder / "vae-latents-stats.pt")
    return str(folder / "vae.pt")


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


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A checkpoint of two steps of the first stage."""
    folder = tmp_path_factory.mktemp("first")
    stage_one.main(["--preset", "demo", "--vae", "f4d4", "--batch-size", "8", "--sampling-steps", "0",
                    "--output-dir", str(folder), "--max-train-steps", "2"])
    return str(folder / "demo" / "checkpoints" / "0000002.pt")


def tiny_nets(start, *flags):
    args = finetune.parse_args([*TINY, "--ckpt", start, *flags])
    state, _, _ = finetune.find_weights(args)
    nets = finetune.build_networks(args, torch.device("cpu"), state)
    trainer.prepare(nets, args)
    return nets, args


def tiny_batch(nets, args, step=1):
    data = ShapesData(64, args.resolution)
    return finetune.make_batch(nets, args, step, torch.stack([data[i][0] for i in range(args.batch_size)]))


def run(folder, *flags):
    finetune.main([*TINY, "--output-dir", str(folder), *flags])
    return folder / "run"


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
    optimised = {id(p) for group in nets.opts["vae"].param_groups for p in group["params"]}
    assert optimised == {id(p) for n, p in nets.vae.named_parameters()
                         if n.startswith(("decoder.", "post_quant_conv."))}


def test_the_whole_vaes_gradient_is_that_of_its_losses(start, monkeypatch):
    """With --train-encoder, of losses that test_golden_models compares with the reference's, written plainly.

    The discriminator's gradient is that of its own loss alone.
    """
    lpips = fill_(LPIPS(), post=lambda n, v: np.abs(v) if n.startswith("lin") else v)
    monkeypatch.setattr(weights, "lpips", lambda: lpips)
    flags = (*GAN, "--train-encoder", "--max-grad-norm", "1e9", "--perceptual-weight", "0.5", "--kl-weight",
             "1e-3", "--reconstruction-weight", "2", "--batch-size", "4")
    nets, args = tiny_nets(start, *flags)
    batch = tiny_batch(nets, args)
    moments, _, r = nets.vae(batch.images, batch.eps)
    losses = reconstruction_losses(batch.images, r, Posterior(moments), lpips, 2, 0.5, 1e-3)
    total = sum(losses.values()) + 0.1 * gan_loss(nets.disc, r)
    expected = torch.autograd.grad(total, list(nets.vae.parameters()))
    d_loss, *_ = discriminator_loss(nets.disc, batch.images, r.detach())
    expected_disc = torch.autograd.grad(d_loss, list(nets.disc.parameters()))
    nets, args = tiny_nets(start, *flags)
    nets.opts = {}  # keep the gradients
    values, _ = finetune.train_step(nets, args, batch)
    for name, value in (losses | {"vae_loss": total, "d_loss": d_loss}).items():
        assert values[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for (name, p), gradient in zip(nets.disc.named_parameters(), expected_disc, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3, msg=name)
    for (name, p), gradient in zip(nets.vae.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_accumulation_equals_the_whole_batch(start):
    """All gradients, batch norm statistics and losses; the discriminator's too."""
    results = []
    for n in (1, 4):
        nets, args = tiny_nets(start, *GAN, "--gradient-accumulation-steps", str(n), "--max-grad-norm", "1e9",
                               "--train-encoder", "--decoder-noise", "0.2")
        nets.opts = {}  # keep the gradients
        values, _ = finetune.train_step(nets, args, tiny_batch(nets, args))
        gradients = {f"{name}.{k}": p.grad for name in nets.trained
                     for k, p in getattr(nets, name).named_parameters()}
        results.append((values, gradients, [b.clone() for b in nets.statistics]))
    (values, gradients, statistics), (whole, expected, expected_statistics) = results
    for name in values:
        assert values[name].item() == pytest.approx(whole[name].item(), abs=1e-5, rel=1e-4), name
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(statistics, expected_statistics, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------- processes, resuming, the run

def test_two_processes_equal_one(tmp_path, start, photos):
    train = [*TINY, "--ckpt", start, *GAN, "--train-encoder", "--max-train-steps", "2", "--learning-rate",
             "1e-4", "--disc-learning-rate", "1e-4", "--data-dir", str(photos.parent), "--batch-size", "4",
             "--adam-epsilon", "1e-2"]      # else Adam's first steps are signs, of rounding too
    measure = ["--preset", "demo", "--eval", start, "--metrics", "psnr,latents", "--limit", "20",
               "--exp-name", "measured"]
    for flags in (train, measure):
        finetune.main([*flags, "--output-dir", str(tmp_path / "one")])
        processes.run_two("finetune_vae", [*flags, "--output-dir", tmp_path / "two"], tmp_path / "log")
    one, two = tmp_path / "one", tmp_path / "two"
    for x, y in zip(logged(one / "run"), logged(two / "run"), strict=True):
        for name in x:
            if name.endswith("loss") or name.startswith("logits"):
                assert y[name] == pytest.approx(x[name], abs=2e-5), (x["step"], name)
    a, b = final_state(one / "run", 2), final_state(two / "run", 2)
    for name in ("latents_scale", "latents_bias"):
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(a["vae_ema"]["decoder.conv_out.weight"],
                               b["vae_ema"]["decoder.conv_out.weight"], atol=1e-5, rtol=0)
    one, two = (json.loads((k / "measured" / "metrics.json").read_text())["vaes"][start] for k in (one, two))
    for name in set(one) - {"psnr_noise_0.1", "psnr_noise_0.4"}:    # their noise is of each batch
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_stopped_and_resumed_gives_the_same_bits(tmp_path, start):
    flags = ("--ckpt", start, *GAN, "--hflip", "--decoder-noise", "0.1")
    whole = final_state(run(tmp_path / "whole", *flags, "--max-train-steps", "4"), 4)
    run(tmp_path / "stopped", *flags, "--max-train-steps", "2")
    folder = run(tmp_path / "stopped", *flags, "--max-train-steps", "4")
    resumed = final_state(folder, 4)
    whole["args"].pop("output_dir"), resumed["args"].pop("output_dir")
    assert_same(whole, resumed)
    assert [m["step"] for m in logged(folder)] == [1, 2, 3, 4]


def test_run_folder_and_checkpoint_layout(tmp_path, start, close):
    folder = run(tmp_path, "--ckpt", start, "--max-train-steps", "2", "--sampling-steps", "2", "--batch-size",
                 "4", *GAN, "--disc-start", "1")
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "args.json", "checkpoints", "log.txt",
                                                        "metrics.jsonl", "reconstructions"]
    with Image.open(folder / "reconstructions" / "0000002.png") as image:
        assert image.format == "PNG" and min(image.size) > 2 * 64
    # What does not act is not logged: KL (frozen encoder), LPIPS (weight 0), the GAN before --disc-start.
    first = {"kl_loss", "perceptual_loss", "gan_loss", "weighted_gan_loss"}
    assert not first & set(logged(folder)[0])
    state = final_state(folder, 2)
    assert list(state) == ["vae", "vae_ema", "opt_vae", "discriminator", "opt_disc", "latents_scale",
                           "latents_bias", "data", "source_config", "loss_scale", "args", "steps"]
    assert json.loads((folder / "args.json").read_text()) == state["args"] and state["args"]["vae"] == "f4d4"
    path = str(folder / "checkpoints" / "0000002.pt")
    _, loaded, stats, _ = vae_files.open_vae(path)
    assert_same(loaded, state["vae_ema"])
    close(stats[0], STATS[0], 0), close(stats[1], STATS[1], 0)  # the encoder is frozen: its statistics stay
    again = finetune.parse_args([*TINY, "--ckpt", path, "--disc-weight", "0.1"])
    finetune.find_weights(again)
    assert again.disc_ckpt == again.ckpt and again.disc_start == 0  # its discriminator goes along
    assert_same(dict(weights.discriminator(path, "f4d4").state_dict()), dict(state["discriminator"]))


def test_from_scratch_measures_the_statistics_of_what_it_saves(tmp_path, close, monkeypatch):
    """Of the average, on the run's first images."""
    monkeypatch.setattr(finetune, "STATS_IMAGES", 8)
    flags = ["--ckpt", "none", "--vae", "f4d4", "--train-encoder", "--max-train-steps", "1", "--batch-size",
             "4"]
    path = str(run(tmp_path, *flags) / "checkpoints" / "0000001.pt")
    _, state, stats, _ = vae_files.open_vae(path)
    assert not torch.equal(state["encoder.conv_in.weight"], files.load(path)["vae"]["encoder.conv_in.weight"])
    args, vae = finetune.parse_args([*TINY, *flags]), weights.open_vae(path)
    loader = trainer.data_loader(args, ShapesData(50000, 32), torch.device("cpu"), 0, workers=0)
    images = torch.cat([next(loader)[0] for _ in range(2)])
    with torch.no_grad():
        mean, square = metrics.latent_moments(vae.encode(images.float() / 127.5 - 1))
    close(stats[1].flatten(), mean), close(stats[0].flatten() ** -2, square - mean.square(), 1e-5, 1e-5)


def test_refined_vae_in_the_other_scripts(tmp_path, first_stage):
    """A VAE of the first stage, refined: closer to unseen images, the same latents, usable in both stages."""
    folder = run(tmp_path, "--ckpt", first_stage, "--max-train-steps", "8", "--ema-decay", "0.7",
                 "--checkpointing-steps", "100")
    refined = str(folder / "checkpoints" / "0000008.pt")
    data, found = ShapesData(64, 32, seed=1), []
    x = torch.stack([data[i][0] for i in range(64)]).float() / 127.5 - 1
    for path in (first_stage, refined):
        vae = weights.open_vae(path)
        mean = vae.encode(x).mean
        found.append((mean, (vae.decode(mean) - x).abs().mean().item(), vae_files.open_vae(path)[2]))
    before, after = found
    assert torch.equal(before[0], after[0]) and after[1] < 0.9 * before[1]
    assert_same(before[2], after[2])
    sample_ddp.main(["--ckpt", first_stage, "--vae-ckpt", refined, "--num-fid-samples", "4",
                     "--num-steps", "2", "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as samples:
        assert samples["arr_0"].shape == (4, 32, 32, 3) and samples["arr_0"].std() > 1
    stage_one.main(["--preset", "demo", "--vae", "f4d4", "--batch-size", "2", "--sampling-steps", "0",
                    "--max-train-steps", "1", "--output-dir", str(tmp_path), "--freeze-vae",
                    "--vae-ckpt", refined, "--exp-name", "frozen"])
    frozen = str(tmp_path / "frozen" / "checkpoints" / "0000001.pt")    # leads to its VAE in every mode
    assert_same(vae_files.open_vae(frozen)[1], vae_files.open_vae(refined)[1])
    sit = files.load(frozen)["model"]
    torch.testing.assert_close(sit["bn.running_mean"], after[2][1].flatten())
    torch.testing.assert_close(sit["bn.running_var"], after[2][0].flatten() ** -2)


# -------------------------------------------------------------------------------------------------- measuring

class TinyInception(torch.nn.Module):
    """Pool and spatial features that cost nothing."""

    def forward(self, images):
        x = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 8).flatten(1)
        return x[:, :6], x[:, 6:9]


def test_eval_measures_several_vaes(tmp_path, start, photos, monkeypatch, capsys, close):
    """Every figure computed plainly."""
    monkeypatch.setattr(vae_report, "load_inception", lambda path, device: TinyInception())
    lpips = LPIPS()
    monkeypatch.setattr(weights, "lpips", lambda remedy: lpips)
    torch.manual_seed(8)
    other = str(tmp_path / "other" / "other.pt")
    vae_files.export_vae(tmp_path / "other", VAE_models["f4d4"]().state_dict(), STATS, "compvis")
    finetune.main([*MEASURE, "--output-dir", str(tmp_path), "--eval", start, other, "--resolution", "32",
                   "--metrics", "psnr,ssim,lpips,rfid,latents", "--data-dir", f"{photos}.zip"])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["images"] == 12 and list(result["vaes"]) == [start, other]
    assert "these images themselves, not the reference of a generation benchmark" in out

    images = np.stack([np.asarray(center_crop(Image.open(p).convert("RGB"), 32))
                       for p in sorted(photos.iterdir())])
    a = torch.from_numpy(images).permute(0, 3, 1, 2)
    for source, figures in result["vaes"].items():
        vae = weights.open_vae(source)
        with torch.no_grad():
            posterior = vae.encode(a.float() / 127.5 - 1)
            z, std = posterior.mean, posterior.sample(torch.zeros(())).var((0, 2, 3), correction=0)
            std = (std + posterior.std.square().mean((0, 2, 3))).sqrt()
            noise = std.view(1, 4, 1, 1) * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
            copies, noisy = (((vae.decode(x) + 1) * 127.5).round().clamp(0, 255)
                             for x in (z, z + 0.4 * noise))
            distance = lpips(a.float() / 127.5 - 1, copies / 127.5 - 1).mean()
        pools = [TinyInception()(v.permute(0, 2, 3, 1))[0].numpy() for v in (copies, a)]
        between = z.mean((2, 3)).var(0, correction=0)
        expected = {"psnr": metrics.psnr(a, copies).mean(), "ssim": metrics.ssim(a, copies).mean(),
                    "lpips": distance,
                    "rfid": frechet_distance(*feature_statistics(pools[0]), *feature_statistics(pools[1])),
                    "spatial_variance": z.var((2, 3), correction=0).mean(),
                    "total_variation": metrics.total_variation(z).mean(),
                    "between_images": (between / std.square()).mean(),
                    "psnr_noise_0.4": metrics.psnr(a, noisy).mean(),
                    "latents_mean": z.mean((0, 2, 3)), "latents_std": std}
        assert set(expected) == set(figures) - {"psnr_noise_0.1"}
        for name, value in expected.items():
            close(figures[name], value, 1e-4, 1e-4)
        assert f"{figures['psnr']:.4f}" in out and f"{figures['rfid']:.4f}" in out
        assert figures["psnr_noise_0.4"] < figures["psnr_noise_0.1"] < figures["psnr"] + 0.1
    with Image.open(tmp_path / "run" / "images.png") as picture:
        assert picture.width >= 8 * 64 and picture.height >= 3 * 64  # originals, and a row for each VAE


# ----------------------------------------------------------------------------------------------------- export

def test_a_refinement_keeps_the_numbers_of_its_source(tmp_path, start, monkeypatch):
    """Of a diffusers folder, in its checkpoints, so that resuming and an export need the folder no more."""
    monkeypatch.setattr(finetune, "STATS_IMAGES", 4)
    source = tmp_path / "source"
    source.mkdir()
    files.save_json({"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "shift_factor": None},
                    source / "config.json")
    save_file(vae_files.to_diffusers(files.load(start)), source / "diffusion_pytorch_model.safetensors")
    flags = ["--batch-size", "2", "--ckpt", str(source), "--max-train-steps"]
    run(tmp_path / "decoder", *flags, "1")
    run(tmp_path / "whole", *flags, "1", "--train-encoder")
    shutil.move(source, tmp_path / "gone")
    run(tmp_path / "decoder", *flags, "2")
    for name, numbers in (("decoder/run/checkpoints/0000002.pt", {"scaling_factor": 0.5, "shift_factor": 0.0,
                                                                  "force_upcast": True}),
                          ("whole/run/checkpoints/0000001.pt", {})):
        assert vae_files.open_vae(str(tmp_path / name))[3] == numbers


def test_export_from_a_training_checkpoint(tmp_path, close, capsys, monkeypatch):
    """A narrow f8d4 to a diffusers folder and back: the same bits."""
    monkeypatch.setitem(VAE_models, "f8d4", lambda: AutoencoderKL(4, multipliers=(1,) * 4))
    state = {k: v.bfloat16() for k, v in VAE_models["f8d4"]().state_dict().items()}
    ema = {"bn.running_var": STATS[0].flatten() ** -2, "bn.running_mean": STATS[1].flatten()}
    files.save({"model": {}, "ema": ema, "vae": state}, tmp_path / "0400000.pt")
    out = tmp_path / "out" / "e2e-vae"
    finetune.main(["--ckpt", str(tmp_path / "0400000.pt"), "--export", str(out)])
    assert os.listdir(tmp_path / "out") == ["e2e-vae"]
    assert sorted(os.listdir(out)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    assert config["latents_mean"] == pytest.approx(STATS[1].flatten().tolist())
    assert config["latents_std"] == pytest.approx((1 / STATS[0]).flatten().tolist())
    finetune.main(["--ckpt", str(out), "--export", str(tmp_path / "back"), "--format", "compvis"])
    assert "wrote back-latents-stats.pt, back.pt" in capsys.readouterr().out
    _, again, stats, _ = vae_files.open_vae(str(tmp_path / "back" / "back.pt"))
    assert all(torch.equal(state[k], again[k]) for k in state)
    close(torch.cat(stats), torch.cat(STATS), 1e-6)
    files.save(state, tmp_path / "bare.pt")     # Stable Diffusion's VAE in CompVis names: no statistics
    flags = ["--ckpt", str(tmp_path / "bare.pt"), "--export", str(tmp_path / "sd")]
    with pytest.raises(SystemExit):
        finetune.main(flags)
    assert "--latents-stats" in capsys.readouterr().err
    finetune.main([*flags, "--latents-stats", "0.18215"])
    assert json.loads((tmp_path / "sd" / "config.json").read_text())["scaling_factor"] == 0.18215


# ------------------------------------------------------------------------------------------- flags, bad input

@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "{tmp}/nothing.pt"], "nothing.pt"),
    (["--ckpt", "none"], "--train-encoder"),
    (["--ckpt", "{start}", "--resolution", "30"], "--resolution 30"),
    (["--ckpt", "{start}", "--perceptual-weight", "1"], "--perceptual-weight 0"),
    (["--eval", "{start}", "--metrics", "psnr,fid"], "psnr,fid"),
    (["--eval", "{start}", "--metrics", "psnr,lpips"], "leave lpips out of --metrics"),
    (["--eval", "{start}", "{tmp}/nothing.pt"], "nothing.pt"),
    (["--export", "{tmp}/new", "--ckpt", "{start}"], "--format compvis"),
    (["--export", "{tmp}", "--ckpt", "{start}", "--format", "compvis"], "exists"),
    (["--export", "{tmp}/new", "--ckpt", "none"], "--ckpt"),
    (["--export", "{tmp}/new", "--ckpt", "{tmp}/nan.pt", "--format", "compvis"], "encoder.conv_in.bias"),
])
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, start, capsys, monkeypatch, flags, words):
    def no_network(*_):
        raise OSError("no network")
    monkeypatch.setattr(files, "download", no_network)
    broken = files.load(start) | {"encoder.conv_in.bias": torch.full((64,), torch.nan)}
    torch.save(broken, tmp_path / "nan.pt")
    flags = [f.format(tmp=tmp_path, start=start) for f in flags]
    mode = [*MEASURE, "--output-dir", str(tmp_path / "out")] if "--eval" in flags else \
        ["--preset", "demo"] if "--export" in flags else \
        [*TINY, "--output-dir", str(tmp_path / "out"), "--max-train-steps", "1"]
    for dry_run in ([], ["--dry-run"])[:1 if "--export" in flags else 2]:   # it finds what the run would
        with pytest.raises(SystemExit) as stop:
            finetune.main([*mode, *flags, *dry_run])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert os.listdir(tmp_path) == ["nan.pt"]


def test_a_run_folder_takes_no_other_run(tmp_path, start, photos, capsys):
    """The same command resumes, without remarks; another VAE, loss or data set is rejected."""
    flags = ["--ckpt", start, "--batch-size", "4", "--data-dir", str(photos.parent), *GAN]
    folder = run(tmp_path, *flags, "--max-train-steps", "1")
    capsys.readouterr()
    run(tmp_path, *flags, "--max-train-steps", "1")
    out = capsys.readouterr().out
    assert "from step 1" in out and "changed" not in out
    for more, words in ((["--train-encoder"], "--train-encoder False"), (["--ckpt", "other.pt"], "other.pt"),
                        (["--data-dir", "shapes"], "have changed, all is now circle")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *flags, "--max-train-steps", "2", *more)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert len(logged(folder)) == 1


def test_a_dry_run_writes_nothing(tmp_path, start, capsys):
    for flags in ([*TINY, "--ckpt", start], [*MEASURE, "--eval", start, "--metrics", "psnr"]):
        finetune.main([*flags, "--output-dir", str(tmp_path / "out"), "--dry-run"])
        assert capsys.readouterr().out.endswith("settings are sound\n") and os.listdir(tmp_path) == []
