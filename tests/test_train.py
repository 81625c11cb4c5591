"""train_repae_e.py on tiny runs: gradients, accumulation, processes, resuming, flags, users' mistakes."""
import ast
import json
import os
import signal
import socket
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import ROOT
from PIL import Image

import train_repae_e as train
from models.runtime import files, flops, runlog, trainer
from models.runtime.data import ShapesData
from models.losses import denoising_loss, noisy_latents, reconstruction_losses

TINY = ["--preset", "demo", "--model", "SiT-Ti/4", "--batch-size", "4", "--sampling-steps", "0",
        "--log-every", "1", "--checkpointing-steps", "2",
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
    parts = trainer.micro_batches(batch, 1)
    _, recon = trainer.first_pass(nets, parts)
    if use_gan:
        trainer.gan_gradient(nets, parts, recon, args.disc_weight)
    trainer.backward(nets, parts, lambda part: train.vae_losses(nets, args, part), "vae_loss", "vae")
    return recon


def sit_backward(nets, args, batch, z):
    """Part 4 of the step alone."""
    batch.u = nets.sit.bn(z)
    trainer.backward(nets, [batch], lambda part: train.sit_losses(nets, args, part), "sit_loss", "sit")


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
    part = SimpleNamespace(images=batch.images, recon=recon)
    trainer.backward(nets, [part], lambda part: train.disc_losses(nets, part), "d_loss", "disc")
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


def test_learning_the_position_table_is_a_choice():
    assert "pos_embed" in dict(tiny_nets()[0].sit.named_buffers())
    nets, args = tiny_nets("--learn-pos-embed")
    before = nets.sit.pos_embed.detach().clone()
    train.train_step(nets, args, tiny_batch(nets, args))
    assert not torch.equal(before, nets.sit.pos_embed)


# -------------------------------------------------------------------------------- equal results, other splits

def test_accumulation_equals_the_whole_batch():
    """All gradients, batch norm statistics and losses, the discriminator's batch norm included."""
    results = []
    for n in (1, 2, 4):
        nets, args = tiny_nets("--gradient-accumulation-steps", str(n), "--disc-start", "0",
                               "--max-grad-norm", "1e9")
        nets.opts = {}  # keep the gradients
        values, _ = train.train_step(nets, args, tiny_batch(nets, args))
        gradients = {f"{name}.{k}": p.grad for name in nets.trained
                     for k, p in getattr(nets, name).named_parameters()}
        results.append((values, gradients, [b.clone() for b in nets.statistics]))
    for values, gradients, statistics in results[1:]:
        for name in values:
            assert values[name].item() == pytest.approx(results[0][0][name].item(), abs=1e-5, rel=1e-5), name
        for name in gradients:
            torch.testing.assert_close(gradients[name], results[0][1][name], atol=1e-5, rtol=1e-4, msg=name)
        for a, b in zip(statistics, results[0][2]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_two_nodes_and_then_one_process_equal_one(tmp_path):
    """Two nodes of a process each, by rendezvous, take two steps; one process takes the third."""
    rates = ("--learning-rate", "1e-4", "--vae-learning-rate", "1e-4", "--disc-learning-rate", "1e-4")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{s.getsockname()[1]}"
    command = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", end,
               "--rdzv-id", "test", ROOT / "train_repae_e.py", *TINY, "--output-dir", tmp_path / "two",
               *rates]
    nodes = [processes.start("torch.distributed.run", [*command, "--max-train-steps", "2"], tmp_path / "log",
                             OMP_NUM_THREADS="1") for _ in range(2)]
    torch.set_num_threads(1)
    one = run(tmp_path / "one", *rates, "--max-train-steps", "3")  # meanwhile
    processes.wait_for(lambda: all(node.exitcode == 0 for node in nodes), nodes, tmp_path / "log")
    two = run(tmp_path / "two", *rates, "--max-train-steps", "3")
    a, b = metrics(one), metrics(two)
    assert [m["step"] for m in a] == [m["step"] for m in b] == [1, 2, 3]
    for x, y in zip(a, b):
        for name in x:
            if name.endswith("loss") or name.startswith("logits"):
                assert y[name] == pytest.approx(x[name], abs=1e-5), (x["step"], name)


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    flags = ("--max-train-steps", "5", "--hflip", "--num-workers", "1")
    torch.set_num_threads(1)
    whole = final_state(run(tmp_path / "whole", *flags), 5)
    process = processes.start("train_repae_e", [*TINY, "--output-dir", tmp_path / "killed", *flags],
                              tmp_path / "log")
    folder = tmp_path / "killed" / "demo"
    processes.wait_for((folder / "checkpoints" / "0000002.pt").exists, [process], tmp_path / "log")
    processes.kill(process)
    assert not (folder / "checkpoints" / "0000005.pt").exists()
    resumed = final_state(run(tmp_path / "killed", *flags), 5)
    whole["args"].pop("output_dir"), resumed["args"].pop("output_dir")
    assert_same(whole, resumed)
    assert [m["step"] for m in metrics(folder)] == [1, 2, 3, 4, 5]  # no line twice


def test_a_signal_to_one_of_two_processes_saves_and_ends_both(tmp_path):
    """As a cluster sends it; exit code 0 within seconds, and the same command goes on from there."""
    log, folder = tmp_path / "log", tmp_path / "demo"
    arguments = [*TINY, "--checkpointing-steps", "100000", "--max-train-steps", "100000", "--output-dir",
                 tmp_path]
    both = processes.start_two("train_repae_e", arguments, log)
    try:
        processes.wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 2, both,
                           log)
        os.kill(both[1].pid, signal.SIGTERM)
        processes.wait_for(lambda: all(p.exitcode == 0 for p in both), both, log, seconds=60)
    finally:
        for process in both:
            processes.kill(process)
    saved, = (folder / "checkpoints").iterdir()
    text = log.read_text()
    assert "Traceback" not in text and f"saved {saved}; the same command continues" in text
    step = int(saved.stem)
    run(tmp_path, "--max-train-steps", str(step + 1))
    assert metrics(folder)[-1]["step"] == step + 1


def test_resume_passes_over_a_broken_checkpoint(tmp_path, capsys):
    folder = run(tmp_path, "--max-train-steps", "4")
    (folder / "checkpoints" / "0000004.pt").write_bytes(b"PK\x03\x04 cut off")
    run(tmp_path, "--max-train-steps", "4")
    out = capsys.readouterr().out
    assert "passed over" in out and "from step 2 of" in out
    assert final_state(folder, 4)["steps"] == 4


def test_run_folder_and_checkpoint_layout(tmp_path):
    folder = run(tmp_path, "--max-train-steps", "2", "--sampling-steps", "2")
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "args.json", "checkpoints", "log.txt",
                                                        "metrics.jsonl", "reconstructions", "samples"]
    for kind in ("samples", "reconstructions"):
        with Image.open(folder / kind / "0000002.png") as image:
            assert image.format == "PNG" and min(image.size) >= 64
    line = metrics(folder)[-1]
    names = ("reconstruction_loss kl_loss weighted_gan_loss gan_loss vae_align_loss vae_loss grad_norm_vae "
             "d_loss logits_real logits_fake grad_norm_disc denoising_loss proj_loss sit_loss grad_norm_sit "
             "step images_per_s peak_memory_gib seconds_per_step mfu skipped_steps")
    assert set(names.split()) <= set(line) and line["step"] == 2 and 0 < line["mfu"] < 2
    state = final_state(folder, 2)
    assert list(state) == ["model", "ema", "opt", "vae", "opt_vae", "discriminator", "opt_disc", "data",
                           "log", "loss_scale", "args", "steps"]
    assert state["args"]["model"] == "SiT-Ti/4"
    assert json.loads((folder / "args.json").read_text()) == state["args"]
    assert not torch.equal(state["model"]["final_layer.linear.weight"],
                           state["ema"]["final_layer.linear.weight"])


def test_frozen_vae_run(tmp_path):
    vae = train.VAE_models["f4d4"]()
    files.save(vae.state_dict(), tmp_path / "vae.pt")
    folder = run(tmp_path, "--freeze-vae", "--vae-ckpt", str(tmp_path / "vae.pt"), "--max-train-steps", "2")
    state = final_state(folder, 2)
    assert list(state) == ["model", "ema", "opt", "data", "vae_digest", "log", "loss_scale", "args", "steps"]
    bn = {k: v for k, v in state["model"].items() if k.startswith("bn.")}
    # measured, then fixed
    assert bn["bn.num_batches_tracked"] == 0 and not torch.equal(bn["bn.running_var"], torch.ones(4))
    assert "proj_loss" in metrics(folder)[0] and "vae_loss" not in metrics(folder)[0]


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


def test_mfu_is_against_the_best_measurement(tmp_path):
    """A peak that was measured in a busy moment is measured again when a step beats it; mfu ends at 1."""
    args = SimpleNamespace(report_to="none", max_train_steps=10, log_every=1)
    for later in (1e30, 1e-9):      # FLOP/s; each time 1e-9 at the start
        measured = [1e-9, later]
        log = runlog.RunLog(tmp_path, args, 1e6, lambda: measured.pop(0))
        log.add({"loss": torch.tensor(1.0)}, torch.tensor(0.0))
        log.write(1, 4)
        assert not measured
    idle, busy = (line["mfu"] for line in metrics(tmp_path))
    assert 0 < idle < 1e-10 and busy == 1


def test_vanishing_gradients_stop_the_run(tmp_path):
    log = runlog.RunLog(tmp_path, SimpleNamespace(report_to="none", max_train_steps=10, log_every=1))
    log.add({"grad_norm_sit": torch.tensor(2.0)}, torch.tensor(0.0))
    log.write(1, 4)
    log.add({"grad_norm_sit": torch.tensor(1e-6)}, torch.tensor(0.0))
    with pytest.raises(runlog.Collapse, match="grad_norm_sit"):
        log.write(2, 4)


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


def test_bf16_step_stays_close_to_float32():
    reference = None
    for precision in ("no", "bf16"):
        nets, args = tiny_nets("--mixed-precision", precision)
        values, skip = train.train_step(nets, args, tiny_batch(nets, args))
        reference = reference or values
        assert skip == 0
        for name in ("reconstruction_loss", "vae_align_loss", "denoising_loss", "proj_loss", "d_loss"):
            assert values[name].item() == pytest.approx(reference[name].item(), rel=0.03, abs=0.01), name


# ------------------------------------------------------------------------------------------------------ flags

def test_every_flag_is_read_and_every_setting_is_a_flag():
    used = set()
    for name in ("train_repae_e.py", "models/runtime/trainer.py", "models/runtime/runlog.py",
                 "models/runtime/online.py"):
        used |= {node.attr for node in ast.walk(ast.parse((ROOT / name).read_text()))
                 if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                 and node.value.id == "args"}
    flags = set(vars(train.parse_args([])))
    assert used <= flags, f"read but no flag: {used - flags}"
    # the parser itself reads --preset
    assert flags - used == {"preset"}, f"a flag that nothing reads: {flags - used}"


def test_every_flag_has_a_help_line_and_presets_name_flags(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = set(vars(train.parse_args([])))
    for name in flags:
        assert f"--{name.replace('_', '-')}" in text
    for preset in train.PRESETS.values():
        assert set(preset) <= flags


def flag_tables():
    """The README's tables of the training script's flags, group by group."""
    text = ""
    for group in train.make_parser()._action_groups[2:]:
        text += f"\n**{group.title}**\n\n| flag | default | meaning |\n|---|---|---|\n"
        for action in group._group_actions:
            default = "" if action.default is None or action.default is False else action.default
            choices = f" ({', '.join(action.choices)})" if action.choices and len(action.choices) < 6 else ""
            text += f"| `{action.option_strings[0]}` | {default} | {action.help}{choices} |\n"
    return text


def test_readme_lists_every_flag_with_its_default():
    readme = (ROOT / "README.md").read_text()
    assert flag_tables() in readme, "README.md: put what flag_tables() returns under 'Flags'"


def test_explicit_flags_win_over_a_preset():
    args = train.parse_args(["--preset", "demo", "--batch-size", "7"])
    assert args.batch_size == 7 and args.model == train.PRESETS["demo"]["model"]


# -------------------------------------------------------------------------------------------------- bad input

@pytest.fixture
def photos(tmp_path):
    """Two class folders of small JPEG files."""
    data = ShapesData(8, 40)
    for i in range(8):
        folder = tmp_path / "photos" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data[i][0].permute(1, 2, 0).numpy()).save(folder / f"{i}.jpg", quality=90)
    return tmp_path / "photos"


def test_real_files_train(tmp_path, photos):
    folder = run(tmp_path, "--data-dir", str(photos), "--max-train-steps", "2", "--num-workers", "1")
    assert metrics(folder)[-1]["step"] == 2


def corrupt(photos):
    (photos / "class0" / "broken.jpg").write_text("this is no image")


@pytest.mark.parametrize("flags, words", [
    (["--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--data-dir", "{tmp}/empty"], "no images"),
    (["--data-dir", "{photos}", "--num-classes", "1"], "--num-classes 1"),
    (["--resolution", "36"], "--resolution 36"),
    (["--gradient-accumulation-steps", "3"], "--batch-size 4"),
    (["--encoder", "dinov9"], "dinov9"),
    (["--encoder", "tf_efficientnet_lite0", "--encoder-ckpt", "{tmp}/none.safetensors"], "none.safetensors"),
    (["--encoder-depth", "7"], "encoder depth 7"),
    (["--vae-ckpt", "{tmp}/nothing.pt"], "nothing.pt"),
    (["--vae-ckpt", "{tmp}/other.pt"], "not the weights of a VAE"),
    (["--latents-stats", "{tmp}/other.pt"], "latents_scale"),
    (["--resume", "{tmp}/none.pt"], "none.pt"),
    (["--resume", "{tmp}/other.pt"], "other.pt"),
    (["--learning-rate", "0"], "--learning-rate"),
    (["--freeze-vae", "--diffusion-to-vae"], "exclude"),
    (["--freeze-vae"], "--vae-ckpt"),
    (["--cfg-scale", "0.5"], "--cfg-scale: 0.5"),
    (["--num-workers", "-1"], "--num-workers: -1"),
    (["--resolution", "16"], "--resolution 16"),
    (["--disc-ckpt", "{tmp}/nope.pt"], "nope.pt"),
    (["--latents-stats", "{tmp}/stats.pt"], "16 channels"),
    (["--resume", "{tmp}/stats.pt"], "no training checkpoint"),
    (["--perceptual-weight", "1"], "--perceptual-weight 0"),
    (["--encoder", "dinov2-vit-s"], "--encoder hog"),
])
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, photos, capsys, monkeypatch, flags, words):
    (tmp_path / "empty").mkdir()
    files.save({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "other.pt")
    files.save({k: torch.ones(1, 16, 1, 1) for k in ("latents_scale", "latents_bias")}, tmp_path / "stats.pt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    expect_error([f.format(tmp=tmp_path, photos=photos) for f in flags], words, tmp_path, capsys)


def no_network(*args, **kwargs):
    raise OSError("no network")


def expect_error(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "out", "--max-train-steps", "1", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_image(tmp_path, photos, capsys):
    corrupt(photos)
    flags = ["--data-dir", str(photos)]
    expect_error(flags, "class0/broken.jpg", tmp_path, capsys)
    folder = run(tmp_path / "out", *flags, "--skip-corrupt", "--max-train-steps", "3")
    assert metrics(folder)[-1]["skipped_files"] > 0


def test_resume_from_another_model(tmp_path, capsys):
    run(tmp_path, "--max-train-steps", "1")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max-train-steps", "2", "--model", "SiT-Ti/2")
    assert stop.value.code == 2 and "SiT-Ti/4" in capsys.readouterr().err


def test_an_old_run_is_neither_mixed_nor_overwritten(tmp_path, capsys):
    folder = run(tmp_path, "--max-train-steps", "2")
    for flags, words in ((["--resume", "none"], "step 2"), (["--proj-coeff", "0.1"], "--proj-coeff 0.5"),
                         (["--path-type", "cosine"], "--path-type linear"),
                         (["--max-train-steps", "1"], "beyond --max-train-steps 1")):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "--max-train-steps", "3", *flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    run(tmp_path, "--max-train-steps", "3", "--learning-rate", "5e-5")
    assert "changed since" in capsys.readouterr().out
    state = final_state(folder, 3)
    assert state["opt"]["param_groups"][0]["lr"] == 5e-5 and state["args"]["vae_ckpt"] == "none"


def test_a_dry_run_writes_nothing_and_what_it_calls_sound_is(tmp_path, capsys):
    run(tmp_path / "out", "--dry-run")
    assert capsys.readouterr().out.endswith("settings are sound\n") and not (tmp_path / "out").exists()
    run(tmp_path / "out", "--max-train-steps", "1")
    capsys.readouterr()
    run(tmp_path / "out", "--max-train-steps", "1", "--dry-run")
    assert capsys.readouterr().out.endswith("settings are sound\n")
    run(tmp_path / "out", "--max-train-steps", "1")
    assert "changed since" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--encoder", "test_vit"], "give them with --encoder-ckpt"),
    (["--encoder", "hog", "--resolution", "40", "--model", "SiT-Ti/8"], "--resolution 40"),
    (["--perceptual-weight", "1"], "--perceptual-weight 0"),
    (["--eval-steps", "1", "--eval-ref", __file__], "cannot be fetched"),
    (["--resolution", "24"], "--disc-weight 0"),
    (["--output-dir", f"{__file__}/out"], "test_train.py"),
])
def test_a_dry_run_finds_what_the_run_would(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(files.requests, "get", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    for dry_run in (["--dry-run"], []):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "out", *flags, *dry_run)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists() or not dry_run


def test_the_papers_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--model", "SiT-XL/2"])
    assert stop.value.code == 2 and "data/imagenet/train" in capsys.readouterr().err


def test_flops_agree_with_published_figures():
    """GFLOP per 256-pixel image, forward: SiT-XL/2 237, f8d4 273 + 622, VGG16 40."""
    image = (1, 3, 256, 256)
    with torch.device("meta"):
        vae = train.VAE_models["f8d4"]()
        args = train.parse_args([])
        nets = SimpleNamespace(sit=train.build_sit(args, vae, []), encoders=[], lpips=None, disc=None)
    assert flops.forward_flops(train.VAE_models["f8d4"], image) / 1e9 == pytest.approx(895, rel=0.01)
    assert flops.forward_flops(flops.LPIPS, image, image) / 2e9 == pytest.approx(40, rel=0.02)
    args.freeze_vae, args.vae_align_proj_coeff = True, 0.0
    total = flops.step_flops(args, nets, lambda: train.build_sit(args, vae, [])) / 1e9
    assert total == pytest.approx(3 * 237 + 273, rel=0.01)
