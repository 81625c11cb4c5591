"""train_repae_e.py on tiny runs: gradients, accumulation, processes, resuming, flags, users' mistakes."""
import json
import os
import shutil
import signal
from types import SimpleNamespace

import processes
import pytest
import torch
from PIL import Image

import train_repae_e as train
from models import vae
from models.losses import denoising_loss, gan_loss, noisy_latents, reconstruction_losses
from models.runtime import distributed, files, log, trainer
from models.runtime.data import ShapesData

TINY = ["--preset", "demo", "--model", "SiT-Ti/4", "--vae", "f4d4", "--batch-size", "4",
        "--sampling-steps", "0", "--log-every", "1", "--checkpointing-steps", "2",
        "--keep-checkpoints", "0", "--disc-weight", "0.1", "--disc-start", "1"]


def settings(*flags):
    return train.parse_args([*TINY, *flags])


def tiny_nets(*flags):
    torch.manual_seed(0)
    args = settings(*flags)
    nets = train.build_networks(args, torch.device("cpu"), None)
    for p in nets.sit.parameters():  # zero gates would hide what flows through the branches
        torch.nn.init.normal_(p, std=0.05) if p.abs().sum() == 0 else None
    trainer.prepare(nets, args)
    return nets, args


def tiny_batch(nets, args, step=1):
    data = ShapesData(64, args.resolution)
    images, labels = (torch.stack([torch.as_tensor(data[i][k]) for i in range(args.batch_size)])
                      for k in (0, 1))
    return train.make_batch(nets, args, step, images, labels)


def run(folder, *flags):
    train.main([*TINY, "--output-dir", str(folder), *flags])
    return folder / "demo"


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run of four steps, with checkpoints 2 and 4 and the pictures of step 4."""
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("run"), *FOUR)


FOUR = ["--hflip", "--num-workers", "1", "--max-train-steps", "4", "--sampling-steps", "4"]


@pytest.fixture
def resumed(four_steps, tmp_path):
    """Function of flags that resumes a copy of that run; its folder is tmp_path / "demo"."""
    shutil.copytree(four_steps, tmp_path / "demo")
    return lambda *flags: run(tmp_path, *FOUR[:3], *flags)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder, step):
    return files.load(folder / "checkpoints" / f"{step:07d}.pt")


def assert_same(a, b, path=""):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for k in a:
            assert_same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


# -------------------------------------------------------------------------------------------------- gradients

def gradient_norms(net):
    return {n: 0.0 if p.grad is None else p.grad.norm().item() for n, p in net.named_parameters()}


def vae_backward(nets, args, batch, use_gan=False):
    """Part 2 of the step alone; returns the reconstructions."""
    parts, gan, gradient = trainer.micro_batches(batch, 1), None, None
    outputs, _, recon = trainer.vae_forward(nets, parts, [None])
    if use_gan:
        leaf = recon.clone().requires_grad_()
        gan = gan_loss(nets.disc, leaf)
        gradient, = torch.autograd.grad(args.disc_weight * gan, leaf)
    trainer.backward(nets, "vae", "vae_loss", lambda *row: train.vae_losses(nets, args, gan, *row),
                     parts, [None], outputs, [gradient])
    return recon


def sit_backward(nets, args, batch, z):
    """Part 4 of the step alone."""
    trainer.backward(nets, "sit", "sit_loss", lambda *row: train.sit_losses(nets, args, *row),
                     [batch], [nets.sit.bn(z)])


def test_alignment_reaches_vae_in_its_update_and_nothing_else():
    nets, args = tiny_nets("--reconstruction-weight", "0", "--kl-weight", "0", "--disc-weight", "0")
    batch = tiny_batch(nets, args)
    vae_backward(nets, args, batch)
    norms = gradient_norms(nets.vae)
    assert all(norm > 0 for name, norm in norms.items() if name.startswith("encoder.conv"))
    # alignment sees latents only
    assert all(norm == 0 for name, norm in norms.items() if name.startswith("decoder."))
    assert set(gradient_norms(nets.sit).values()) == {0.0}  # SiT and projector: frozen in this update


def test_gan_reaches_the_vae_but_not_the_discriminator():
    nets, args = tiny_nets("--reconstruction-weight", "0", "--kl-weight", "0", "--vae-align-proj-coeff", "0")
    batch = tiny_batch(nets, args)
    recon = vae_backward(nets, args, batch, use_gan=True)
    assert gradient_norms(nets.vae)["decoder.conv_out.weight"] > 0
    assert set(gradient_norms(nets.disc).values()) == {0.0}
    trainer.backward(nets, "disc", "d_loss", lambda *row: train.disc_losses(nets, *row),
                     [batch.images], [recon])
    assert all(norm > 0 for name, norm in gradient_norms(nets.disc).items() if "weight" in name)


@pytest.mark.parametrize("ablation", [False, True])
def test_diffusion_loss_never_reaches_the_vae_unless_asked(ablation):
    flags = ["--diffusion-to-vae"] if ablation else []
    nets, args = tiny_nets("--reconstruction-weight", "0", "--kl-weight", "0", "--disc-weight", "0",
                           "--proj-coeff", "0", "--vae-align-proj-coeff", "0", *flags)
    before = {k: v.clone() for k, v in nets.vae.state_dict().items()}
    batch = tiny_batch(nets, args)
    vae_backward(nets, args, batch)
    sit_backward(nets, args, batch, nets.vae(batch.images, batch.eps)[1].detach())
    norms = gradient_norms(nets.vae)
    if ablation:
        assert norms["encoder.conv_in.weight"] > 0
    else:
        assert set(norms.values()) == {0.0}
        train.train_step(nets, args, batch, use_gan=False)
        assert_same(before, dict(nets.vae.state_dict()))
    assert gradient_norms(nets.sit)["x_embedder.proj.weight"] > 0 or not ablation


def test_both_losses_reach_sit_and_projector_in_its_update():
    nets, args = tiny_nets()
    batch = tiny_batch(nets, args)
    z = nets.vae(batch.images, batch.eps)[1].detach()
    sit_backward(nets, args, batch, z)
    norms = gradient_norms(nets.sit)
    assert all(norm > 0 for name, norm in norms.items() if not name.startswith("y_embedder")), norms
    only_diffusion, args0 = tiny_nets("--proj-coeff", "0")
    sit_backward(only_diffusion, args0, batch, z)
    assert set(v for k, v in gradient_norms(only_diffusion.sit).items()
               if k.startswith("projectors")) == {0.0}


# -------------------------------------------------------------------------------- equal results, other splits

def whole_step(*flags):
    """(metrics, gradients, batch norm statistics) of a step with all losses, none of them clipped."""
    torch.set_num_threads(1)    # with more the sums of a convolution depend on the size of the batch
    nets, args = tiny_nets("--disc-start", "0", "--max-grad-norm", "1e9", *flags)
    nets.opts = {}  # keep the gradients
    values, _ = train.train_step(nets, args, tiny_batch(nets, args))
    gradients = {f"{name}.{k}": p.grad for name in nets.trained
                 for k, p in getattr(nets, name).named_parameters()}
    return values, gradients, {str(k): buffer for k, buffer in enumerate(nets.statistics)}


@pytest.mark.parametrize("both, flags", [
    ([], ["--gradient-accumulation-steps", "4"]),
    ([], ["--gradient-accumulation-steps", "2", "--grad-checkpoint"]),
    (["--decoder-noise", "0.3"], ["--gradient-accumulation-steps", "2"])])
def test_accumulation_and_recomputation_keep_the_step(both, flags, monkeypatch):
    """All gradients, batch norm statistics and losses, the discriminator's batch norm included."""
    monkeypatch.setattr(vae, "LARGE", 16 * 16)
    monkeypatch.setattr(vae, "CHUNK", 3 * 16 * 16)  # parts that are not equally large
    for found, expected in zip(whole_step(*both, *flags), whole_step(*both)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_decoder_noise_has_the_latents_scale_and_is_seen_by_the_decoder_alone():
    plain, args0 = tiny_nets("--batch-size", "8")
    nets, args = tiny_nets("--batch-size", "8", "--decoder-noise", "0.3")
    part, part0 = (trainer.micro_batches(tiny_batch(*pair), 1)[0] for pair in ((nets, args), (plain, args0)))
    assert torch.equal(part.eps, part0.eps) and torch.equal(part.noise, part0.noise)
    noise, = trainer.decoder_noises(nets, args, [part])
    _, z0, recon0 = trainer.vae_forward(plain, [part0], trainer.decoder_noises(plain, args0, [part0]))
    _, z, recon = trainer.vae_forward(nets, [part], [noise])
    assert torch.equal(z, z0) and not torch.equal(recon, recon0)
    ratio = noise.std((0, 2, 3)) / z.std((0, 2, 3))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3), rtol=0.2, atol=0)


def test_two_processes_and_then_one_equal_one(tmp_path):
    """Two processes take two steps, one takes the third."""
    rates = ("--learning-rate", "1e-4", "--vae-learning-rate", "1e-4", "--disc-learning-rate", "1e-4")
    torch.set_num_threads(1)
    one = run(tmp_path / "one", *rates, "--max-train-steps", "3")
    processes.run_two("train_repae_e", [*TINY, "--output-dir", tmp_path / "two", *rates, "--max-train-steps",
                                        "2"], tmp_path / "log")
    two = run(tmp_path / "two", *rates, "--max-train-steps", "3")
    a, b = metrics(one), metrics(two)
    assert [m["step"] for m in a] == [m["step"] for m in b] == [1, 2, 3]
    for x, y in zip(a, b):
        for name in x:
            if name.endswith("loss") or name.startswith("logits"):
                assert y[name] == pytest.approx(x[name], abs=1e-5), (x["step"], name)


def test_a_resumed_run_gives_the_same_bits(tmp_path, resumed):
    """tests/faults.py kills it, too."""
    torch.set_num_threads(1)
    whole = final_state(run(tmp_path / "whole", *FOUR[:3], "--max-train-steps", "5"), 5)
    folder = resumed("--max-train-steps", "5", "--keep-checkpoints", "2")
    state = final_state(folder, 5)
    state["args"] = whole["args"]
    assert_same(whole, state)
    assert [m["step"] for m in metrics(folder)] == [1, 2, 3, 4, 5]
    assert sorted(os.listdir(folder / "checkpoints")) == ["0000004.pt", "0000005.pt"]


def test_a_signal_to_one_of_two_processes_saves_and_ends_both(tmp_path):
    """As a cluster sends it, to data workers as well; exit code 0, and the same command resumes."""
    output, folder = tmp_path / "log", tmp_path / "demo"
    arguments = [*TINY, "--checkpointing-steps", "100000", "--max-train-steps", "100000",
                 "--num-workers", "1", "--output-dir", tmp_path]
    both = processes.start_two("train_repae_e", arguments, output)
    try:
        processes.wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 2, both,
                           output)
        os.killpg(both[1].pid, signal.SIGTERM)
        processes.wait_for(lambda: all(p.exitcode == 0 for p in both), both, output, seconds=60)
    finally:
        for process in both:
            processes.kill(process)
    saved, = (folder / "checkpoints").iterdir()
    text = output.read_text()
    assert "Traceback" not in text and f"saved {saved}; the same command resumes" in text
    step = int(saved.stem)
    run(tmp_path, "--max-train-steps", str(step + 1))
    assert metrics(folder)[-1]["step"] == step + 1


def test_processes_that_were_started_differently_end_before_the_first_step(tmp_path):
    """The one that finds the mistake names it; a process whose peer has died says so in one line."""
    both = [processes.start("train_repae_e", [*TINY, "--output-dir", tmp_path / "out", "--learning-rate",
                                              rate], tmp_path / "log", **more)
            for rate, more in zip(("1e-3", "5e-4"), processes.rendezvous())]
    for process in both:
        process.join(60)
    assert all(process.exitcode in (1, 2) for process in both), [p.exitcode for p in both]
    text = (tmp_path / "log").read_text()
    assert "--learning-rate differs between processes: 0.001 in rank 0, 0.0005 in" in text
    assert "Traceback" not in text and not (tmp_path / "out").exists()


def test_checkpoints_that_differ_between_processes_are_named(four_steps, monkeypatch):
    seen, state = [], final_state(four_steps, 4)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "check_same", seen.append)
    for change in (0, 1):
        state["ema"]["bn.running_mean"] = state["ema"]["bn.running_mean"] + change
        trainer.check_same(settings(), {"data": {"classes": ["a"]}, "vae_digest": "1"}, state)
    assert {name for name in seen[0] if seen[0][name] != seen[1][name]} == {"the checkpoint"}
    assert seen[0]["the checkpoint"][0] == 4 and "--vae-ckpt" not in seen[0]


# ----------------------------------------------------------------------------------------------- run folders

def test_resume_passes_over_a_broken_checkpoint(resumed, tmp_path, capsys):
    """And it is never replaced by a worse one: with one checkpoint kept, the sound one stays."""
    checkpoints = tmp_path / "demo" / "checkpoints"
    for name in ("0000004.pt", "0000006.pt"):
        (checkpoints / name).write_bytes(b"PK\x03\x04 cut off")
    resumed("--max-train-steps", "5", "--keep-checkpoints", "1")
    out = capsys.readouterr().out
    assert out.count("passed over") == 2 and "from step 2 of" in out
    assert sorted(os.listdir(checkpoints)) == ["0000005.pt", "0000006.pt"]


def test_run_folder_and_checkpoint_layout(four_steps):
    assert sorted(p.name for p in four_steps.iterdir()) == [".lock", "args.json", "checkpoints", "log.txt",
                                                            "metrics.jsonl", "reconstructions", "samples"]
    for kind in ("samples", "reconstructions"):
        with Image.open(four_steps / kind / "0000004.png") as image:
            assert image.format == "PNG" and min(image.size) >= 64
    line = metrics(four_steps)[-1]
    names = ("reconstruction_loss kl_loss weighted_gan_loss gan_loss vae_align_loss vae_loss grad_norm_vae "
             "d_loss logits_real logits_fake grad_norm_disc denoising_loss proj_loss sit_loss grad_norm_sit "
             "step images_per_s peak_memory_gib seconds_per_step skipped_steps")
    assert set(names.split()) == set(line) and line["step"] == 4
    state = final_state(four_steps, 4)
    assert list(state) == ["model", "ema", "opt", "vae", "opt_vae", "discriminator", "opt_disc", "data",
                           "encoder_digests", "loss_scale", "args", "steps"]
    assert json.loads((four_steps / "args.json").read_text()) == state["args"]
    assert not torch.equal(state["model"]["final_layer.linear.weight"],
                           state["ema"]["final_layer.linear.weight"])


def test_frozen_vae_run(tmp_path, capsys):
    files.save(train.VAE_models["f4d4"]().state_dict(), tmp_path / "vae.pt")
    flags = "--freeze-vae", "--vae-ckpt", str(tmp_path / "vae.pt"), "--max-train-steps"
    folder = run(tmp_path, *flags, "2")
    state = final_state(folder, 2)
    assert list(state) == ["model", "ema", "opt", "data", "vae_digest", "encoder_digests",
                           "loss_scale", "args", "steps"]
    bn = {k: v for k, v in state["model"].items() if k.startswith("bn.")}
    # measured, then fixed
    assert bn["bn.num_batches_tracked"] == 0 and not torch.equal(bn["bn.running_var"], torch.ones(4))
    assert "proj_loss" in metrics(folder)[0] and "vae_loss" not in metrics(folder)[0]

    files.save(train.VAE_models["f4d4"]().state_dict(), tmp_path / "vae.pt")    # another one lies there now
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *flags, "3")
    assert stop.value.code == 2 and "was trained on another VAE" in capsys.readouterr().err


def test_other_data_and_encoders_than_before(capsys):
    sources = {"data": {"classes": ["a", "b"], "images": 9}, "encoder_digests": {"dino": "1", "clip": "2"}}
    trainer.check_sources(settings(), "x.pt", {"data": {"classes": ["a", "b"], "images": 8}}, sources)
    assert "other files or labels, 9 images, before 8" in capsys.readouterr().out
    for before, words in (({"encoder_digests": {"dino": "1", "clip": "3"}}, "other weights of encoder clip"),
                          ({"data": {"classes": ["a"]}}, "None is now b;")):
        with pytest.raises(ValueError, match=words):
            trainer.check_sources(settings(), "x.pt", before, sources)


# ------------------------------------------------------------------------------------------------- robustness

def test_a_step_that_is_not_finite_changes_nothing():
    nets, args = tiny_nets("--disc-start", "0")
    train.train_step(nets, args, tiny_batch(nets, args))

    def state():
        return {n: {k: v.clone() for k, v in getattr(nets, n).state_dict().items() if v.is_floating_point()}
                for n in nets.trained}
    before, batch = state(), tiny_batch(nets, args, step=2)
    batch.images[0, 0, 0, 0] = float("nan")
    _, skip = train.train_step(nets, args, batch)
    assert skip == 1
    assert_same(before, state())
    _, skip = train.train_step(nets, args, tiny_batch(nets, args, step=3))
    assert skip == 0 and not torch.equal(before["vae"]["encoder.conv_in.weight"],
                                         nets.vae.encoder.conv_in.weight)


def test_collapse_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    real, calls = train.train_step, []

    def broken(nets, *rest, **more):
        calls.append(1)
        if len(calls) <= 2:
            return real(nets, *rest, **more)
        return {"sit_loss": torch.tensor(float("nan"))}, torch.tensor(1.0)
    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max-train-steps", "200", "--log-every", "2", "--checkpointing-steps", "50")
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert "stopped: step 52: 50 steps in a row had non-finite" in out
    assert out.rstrip().endswith("0000050.pt")  # skipped steps change no weight: still good


def test_vanishing_gradients_stop_the_run(tmp_path):
    run_log = log.RunLog(tmp_path, SimpleNamespace(report_to="none", max_train_steps=10, log_every=1))
    run_log.add({"grad_norm_sit": torch.tensor(2.0)}, torch.tensor(0.0))
    run_log.write(1, 4)
    run_log.add({"grad_norm_sit": torch.tensor(1e-6)}, torch.tensor(0.0))
    with pytest.raises(log.Collapse, match="grad_norm_sit"):
        run_log.write(2, 4)


@pytest.mark.parametrize("error, code, words", [
    (files.NotFinite("x.pt: not written, because model.a contains NaN"), 1, "stopped: x.pt"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."), 1,
     "Tried to allocate 2.00 GiB")])
def test_what_ends_a_run_badly_is_one_line(resumed, monkeypatch, capsys, error, code, words):
    def fail(*_):
        raise error
    monkeypatch.setattr(files, "save", fail)
    with pytest.raises(SystemExit) as stop:
        resumed("--max-train-steps", "5")
    shown = capsys.readouterr()
    assert stop.value.code == code and words in shown.err + shown.out and shown.err.count("\n") <= 1
    if isinstance(error, torch.OutOfMemoryError):
        assert all(flag in shown.err for flag in ("--batch-size", "--gradient-acc", "--grad-checkpoint"))


def test_loss_scale_backs_off_and_grows():
    scale = trainer.LossScale(True, "cpu")
    scale.update(torch.tensor(1.0))
    assert scale.value == 32768
    scale.good_steps.fill_(1999)
    scale.update(torch.tensor(0.0))
    assert scale.value == 65536 and scale.good_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    nets, args = tiny_nets()
    batch = tiny_batch(nets, args)
    with torch.autocast("cpu", dtype):
        moments, z, recon = nets.vae(batch.images, batch.eps)
        losses = reconstruction_losses(batch.images, recon, train.Posterior(moments), perceptual_weight=0)
        x_t, target = noisy_latents(nets.sit.bn(z), batch.noise, batch.t)
        velocity, zs_tilde = nets.sit(x_t, batch.t, batch.labels)
        results = [*losses.values(), denoising_loss(velocity, target), train.proj_loss(batch.zs, zs_tilde), z,
                   train.proj_loss(batch.zs, [torch.zeros_like(v) for v in zs_tilde])]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in results)


def test_without_a_c_compiler_a_gpu_run_is_not_compiled_and_says_so(monkeypatch, capsys):
    """pytorch's -runtime images have none; compiling would end in a traceback at step 1."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(trainer.os.path, "exists", lambda _: True)
    monkeypatch.setattr(trainer.shutil, "which", lambda _: "/usr/bin/cc")
    assert trainer.wants_compile(settings(), gpu) and not trainer.wants_compile(settings("--no-compile"), gpu)
    monkeypatch.setattr(trainer.shutil, "which", lambda _: None)
    assert not trainer.wants_compile(settings(), gpu) and "a C compiler" in capsys.readouterr().out
    assert trainer.wants_compile(settings("--compile"), gpu)    # who asks for it gets its error
    assert not trainer.wants_compile(settings(), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------ flags

def test_explicit_flags_win_over_a_preset():
    args = train.parse_args(["--preset", "demo", "--batch-size", "7"])
    assert args.batch_size == 7 and args.model == train.PRESETS["demo"]["model"]


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, words", [
    (["--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--num-classes", "3"], "--num-classes 3"),
    (["--resolution", "36"], "--resolution 36"),
    (["--gradient-accumulation-steps", "3"], "--batch-size 4"),
    (["--encoder-depth", "7"], "encoder depth 7"),
    (["--vae-ckpt", "{tmp}/other.pt"], "other.pt"),
    (["--latents-stats", "{tmp}/stats.pt"], "stats.pt: no latents_scale"),
    (["--log-every", "0"], "--log-every 0"),
    (["--freeze-vae", "--diffusion-to-vae"], "exclude"),
    (["--freeze-vae"], "--vae-ckpt"),
    (["--latent-cache", "{tmp}"], "--freeze-vae"),
    (["--cfg-scale", "0.5"], "--cfg-scale 0.5"),
    (["--disc-ckpt", "{tmp}/nope.pt"], "nope.pt"),
    (["--perceptual-weight", "1"], "--perceptual-weight 0"),
    (["--encoder", "dinov2-vit-s"], "--encoder hog"),
    (["--output-dir", __file__], "test_train.py"),
])
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, words):
    """Nothing is written."""
    files.save({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "other.pt")
    files.save({k: torch.ones(1, 16, 1, 1) for k in ("latents_scale", "latents_bias")}, tmp_path / "stats.pt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(files, "download", no_network)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", *[f.format(tmp=tmp_path) for f in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def no_network(*args, **kwargs):
    raise OSError("no network")


def test_an_old_run_is_neither_mixed_nor_overwritten(resumed, capsys):
    for flags, words in ((["--proj-coeff", "0.1"], "--proj-coeff 0.5"),
                         (["--path-type", "cosine"], "--path-type linear"),
                         (["--model", "SiT-Ti/2"], "SiT-Ti/4"),
                         (["--max-train-steps", "1"], "beyond --max-train-steps 1")):
        with pytest.raises(SystemExit) as stop:
            resumed("--max-train-steps", "5", *flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    folder = resumed("--max-train-steps", "5", "--learning-rate", "5e-5")
    assert "changed since" in capsys.readouterr().out
    state = final_state(folder, 5)
    assert state["opt"]["param_groups"][0]["lr"] == 5e-5 and state["args"]["vae_ckpt"] == "none"


def test_a_dry_run_writes_nothing(tmp_path, resumed, capsys):
    run(tmp_path / "out", "--dry-run")
    assert capsys.readouterr().out.endswith("settings are sound\n") and not (tmp_path / "out").exists()
    resumed("--dry-run")
    assert capsys.readouterr().out.endswith("settings are sound\n")
