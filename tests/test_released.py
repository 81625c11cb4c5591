"""Going on from what the reference wrote: its checkpoints resumed, started from, and sampled from; its
optimiser states by name."""
import argparse
import json
import os

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from fill import fill_

import sample_ddp
import train_repae_e as train
from models.discriminator import Discriminator
from models.runtime import files, trainer, vae_files, weights
from models.sit import SiT, SiT_models
from models.vae import VAE_models

KEYS = json.loads((GOLDEN / "keys_checkpoint.json").read_text())
STEP, HOG = 400000, 109     # HOG: width of the tokens of --encoder hog
TINY = {"model": "SiT-Ti/4", "vae": "f4d4", "resolution": 32, "num_classes": 10, "encoder_depth": 3,
        "batch_size": 64, "enc_type": "hog"}


def moments(shapes, missing=()):
    """The state dict of an AdamW after 5 steps, with moments that tell of their number."""
    entries = {i: {"step": torch.tensor(5.0), "exp_avg": torch.tensor(i + 1.0).expand(shape),
                   "exp_avg_sq": torch.tensor(i + 0.5).expand(shape)}
               for i, shape in enumerate(shapes) if i not in missing}
    group = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    return {"state": entries, "param_groups": [group | {"params": list(range(len(shapes)))}]}


def released(path, args=TINY, frozen=False, width=HOG):
    """Write what the reference writes: names, order and args of golden/keys_checkpoint.json.

    Its position table is a parameter, the first, and was trained; its loss module's optimiser covers logvar,
    discriminator and LPIPS, with state for the discriminator alone. With `frozen`, as its latent script
    writes, which leaves the table alone. Returns (content, VAE).
    """
    args = KEYS["ldm_only_args" if frozen else "repae_args"] | args
    vae, disc = fill_(VAE_models[args["vae"]]()), fill_(Discriminator())
    sit = fill_(SiT_models[args["model"]](
        input_size=args["resolution"] // vae.downsample, in_channels=vae.latent_channels,
        num_classes=args["num_classes"], encoder_depth=args["encoder_depth"], z_dims=[width]))
    with torch.no_grad():
        sit.pos_embed += 0 if frozen else 0.01
    model = sit.state_dict()
    assert next(iter(model)) == "pos_embed"
    assert "index 0 of opt is pos_embed" in KEYS["optimizer_state_dict"]["sit_note"]
    shapes = [v.shape for k, v in model.items() if not k.startswith("bn.")]
    content = {"model": model, "ema": {k: v * 1 for k, v in model.items()},
               "opt": moments(shapes, [0] if frozen else []),
               "args": argparse.Namespace(**args), "steps": STEP}
    if not frozen:
        sizes = {f"discriminator.{k}": v.shape for k, v in disc.state_dict().items()}
        sizes = [sizes.get(name, (3,)) for name in KEYS["opt_disc_parameter_order"]]
        without = set(range(len(sizes))) - set(KEYS["opt_disc_indices_with_state"])
        content |= {"vae": vae.state_dict(), "discriminator": disc.state_dict(),
                    "opt_vae": moments([v.shape for v in vae.state_dict().values()]),
                    "opt_disc": moments(sizes, without)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return content, vae


def run(folder, *flags, steps=STEP + 2):
    """Train from the flags given up to `steps`; returns (content of the last checkpoint, text of the log)."""
    train.main([str(f) for f in (
        "--preset", "demo", "--model", "SiT-Ti/4", "--batch-size", 4, "--disc-weight", 0.1, "--disc-start", 1,
        "--sampling-steps", 0, "--log-every", 1, "--output-dir", folder, "--max-train-steps", steps, *flags)])
    state = files.load(folder / "demo" / "checkpoints" / f"{steps:07d}.pt")
    return state, (folder / "demo" / "log.txt").read_text()


def steps_of(state, key):
    """How often AdamW has stepped, over the weights of one optimiser state of a checkpoint."""
    return {float(entry["step"]) for entry in state[key]["state"].values()}


@pytest.mark.parametrize("learn", [False, True])
def test_resumes_and_goes_on(tmp_path, capsys, learn):
    path = tmp_path / "release" / "0400000.pt"
    content, _ = released(path)
    flags = ["--resume", path, *["--learn-pos-embed"] * learn]
    state, log = run(tmp_path, *flags)
    assert f"from step {STEP} of {path}" in log
    assert log.count("position table") == 1 and "anew" not in log
    assert ("goes on learning" if learn else "stays as it is") in log
    assert "--batch-size 64 -> 4" in capsys.readouterr().out
    for key in ("opt", "opt_vae", "opt_disc"):
        assert len(state[key]["state"]) > 10 and steps_of(state, key) == {7.0}, key     # 5 there and 2 here
    table, ema = content["model"]["pos_embed"], content["ema"]
    assert torch.equal(state["model"]["pos_embed"], table) != learn
    assert not torch.equal(state["ema"]["blocks.0.mlp.fc1.weight"], ema["blocks.0.mlp.fc1.weight"])
    if learn:   # the same command again goes on from the run's own checkpoint
        state, log = run(tmp_path, *flags, steps=STEP + 3)
        assert f"from step {STEP + 2} of {tmp_path / 'demo'}" in log and steps_of(state, "opt") == {8.0}


@pytest.mark.skipif("LARGE_TESTS" not in os.environ, reason="30 s, 5 GB of disk: set LARGE_TESTS=1")
def test_a_released_size_resumes_and_goes_on(tmp_path):
    """SiT-B/1 with f16d32 at 64 pixels; what is sampled from the file stays the same."""
    path = tmp_path / "0400000.pt"
    sizes = {"model": "SiT-B/1", "vae": "f16d32", "resolution": 64, "num_classes": 1000, "encoder_depth": 4}
    released(path, TINY | sizes)
    before = sample(path)
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", value)]
    state, log = run(tmp_path, "--resume", path, "--batch-size", 2, *flags)
    assert "anew" not in log
    assert [steps_of(state, key) for key in ("opt", "opt_vae", "opt_disc")] == [{7.0}] * 3
    path.with_suffix(".npz").unlink()
    assert np.array_equal(before, sample(path))


def sample(path):
    """Four samples of a checkpoint, uint8 [4, H, W, 3]."""
    npz = path.with_suffix(".npz")
    sample_ddp.main(["--ckpt", str(path), "--npz", str(npz), "--num-fid-samples", "4", "--num-steps", "2",
                     "--cfg-scale", "2"])
    return np.load(npz)["arr_0"]


def test_what_does_not_fit_is_named_once(tmp_path):
    """Another encoder's alignment heads, and an optimiser of another network, start anew; the rest goes
    over."""
    path = tmp_path / "0400000.pt"
    content, _ = released(path, width=64)
    content["opt_vae"]["param_groups"][0]["params"].pop()
    torch.save(content, path)
    state, log = run(tmp_path, "--resume", path)
    assert log.count("alignment heads") == 1
    assert log.count("its opt does not fit 2 of 77 weights of sit (first: projectors.0.4.weight)") == 1
    assert log.count("its opt_vae does not fit all") == 1 and "opt_disc" not in log
    assert [steps_of(state, key) for key in ("opt", "opt_vae", "opt_disc")] == [{2.0, 7.0}, {2.0}, {7.0}]


def test_sampling_is_unchanged(tmp_path):
    """From the released file, from the networks that resume it, and from those that start from it: the same
    bytes."""
    path = tmp_path / "0400000.pt"
    content, _ = released(path)
    files_to_sample = [path]
    for name in ("resume", "init-from"):
        args = train.parse_args(["--preset", "demo", "--model", "SiT-Ti/4", f"--{name}", str(path)])
        nets = train.build_networks(args, torch.device("cpu"), vae_files.open_vae(str(path))[1],
                                    continued=name == "resume")
        trainer.prepare(nets, args)
        if name == "resume":
            trainer.restore(nets, path, trainer.adopt(nets, path, files.load(path)))
        files_to_sample.append(tmp_path / f"{name}.pt")
        files.save(trainer.checkpoint_state(nets, args, STEP), files_to_sample[-1])
    images = [sample(file) for file in files_to_sample]
    assert all(np.array_equal(images[0], other) for other in images[1:]) and images[0].std() > 1


def test_frozen_checkpoint_resumes_on_the_vae_that_it_names(tmp_path, capsys):
    path, place = tmp_path / "release" / "0400000.pt", tmp_path / "pretrained" / "e2e-vavae-400k.pt"
    args = TINY | {"vae_ckpt": str(place)}
    content, vae = released(path, args, frozen=True)
    flags = "--resume", path, "--freeze-vae"
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    error = capsys.readouterr().err
    assert all(words in error for words in ("e2e-vavae-400k.pt", "--vae-ckpt", "REPA-E/e2e-vavae"))
    place.parent.mkdir()
    files.save(vae.state_dict(), place)
    stats = dict.fromkeys(("latents_scale", "latents_bias"), torch.full((1, 4, 1, 1), 0.5))
    files.save(stats, place.with_name("e2e-vavae-400k-latents-stats.pt"))
    state, log = run(tmp_path, *flags)
    assert "position table" not in log and "anew" not in log
    assert steps_of(state, "opt") == {7.0}
    assert torch.equal(state["model"]["bn.running_var"], content["model"]["bn.running_var"])
    assert state["vae_digest"] == weights.state_digest(vae)
    files.save(fill_(VAE_models["f4d4"](), "another").state_dict(), place)
    with pytest.raises(SystemExit):
        run(tmp_path, *flags, steps=STEP + 3)
    assert "was trained on another VAE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "other", "--resume", path)
    assert "holds no vae" in (error := capsys.readouterr().err) and "--freeze-vae" in error


def test_settings_that_its_weights_were_made_for_are_kept(tmp_path, capsys):
    path = tmp_path / "0400000.pt"
    released(path)
    for flags, words in ((["--encoder-depth", "2", "--path-type", "cosine"],
                          ("--encoder-depth 3, not 2", "--path-type linear, not cosine")),
                         (["--model", "SiT-Ti/2"], ("--model SiT-Ti/4, not SiT-Ti/2",))):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "--resume", path, *flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and all(w in error for w in words) and error.count("\n") == 1


def test_init_from_takes_the_weights_alone(tmp_path, capsys):
    """The average, VAE and discriminator of a released file; then of the checkpoint that this made, with
    another encoder's heads; and neither steps nor moments."""
    path = tmp_path / "0400000.pt"
    content, _ = released(path)
    content["ema"] = {k: v * 1.5 if v.is_floating_point() else v for k, v in content["ema"].items()}
    torch.save(content, path)
    still = ["--learning-rate", 1e-12, "--vae-learning-rate", 1e-12, "--disc-learning-rate", 1e-12]
    state, log = run(tmp_path, "--init-from", path, *still, steps=1)
    assert f"weights of {path}\n" in log and "from step 0\n" in log
    assert [steps_of(state, key) for key in ("opt", "opt_vae", "opt_disc")] == [{1.0}] * 3
    for key, source in (("model", "ema"), ("ema", "ema"), ("vae", "vae"), ("discriminator", "discriminator")):
        for name, value in content[source].items():
            if value.is_floating_point() and "running" not in name:
                torch.testing.assert_close(state[key][name], value, atol=1e-6, rtol=1e-5, msg=f"{key}.{name}")
    variances = (s["ema"]["bn.running_var"] for s in (state, content))
    torch.testing.assert_close(*variances, rtol=0.1, atol=0.01)
    own = tmp_path / "demo" / "checkpoints" / "0000001.pt"
    no_alignment = "--proj-coeff", 0, "--vae-align-proj-coeff", 0
    _, log = run(tmp_path / "second", "--init-from", own, *no_alignment, steps=1)
    assert f"weights of {own}" in log
    # again: its own checkpoint comes first
    _, log = run(tmp_path, "--init-from", path, *still, steps=2)
    assert "from step 1 of" in log
    released(tmp_path / "larger.pt", TINY | {"model": "SiT-Ti/2"})
    for source in (tmp_path / "larger.pt", tmp_path / "none.pt"):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "third", "--init-from", source, steps=1)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and str(source) in error and error.count("\n") == 1
    assert not (tmp_path / "third").exists()


def test_init_from_comes_after_flags_and_before_presets():
    def of(*flags):
        args = train.parse_args(["--preset", "vavae", *flags])
        return args.vae_ckpt, args.disc_ckpt
    assert of() == ("REPA-E/vavae", "REPA-E/vavae")
    assert of("--init-from", "run.pt") == ("run.pt", "run.pt")
    assert of("--init-from", "run.pt", "--vae-ckpt", "my.pt") == ("my.pt", "run.pt")
    assert of("--freeze-vae", "--resume", "run.pt")[0] == "run.pt"


# ---------------------------------------------------------------- optimiser states by name

def tiny_sit(**more):
    return SiT(depth=2, hidden_size=48, patch_size=2, num_heads=4, input_size=8, num_classes=10,
               encoder_depth=1, z_dims=[16], projector_dim=32, **more)


@pytest.mark.parametrize("learn", [False, True])
def test_moments_go_over_by_name(tmp_path, learn):
    released(tmp_path / "0400000.pt")
    content = files.load(tmp_path / "0400000.pt")
    sit = SiT_models["SiT-Ti/4"](input_size=8, num_classes=10, encoder_depth=3, z_dims=[HOG],
                                 learn_pos_embed=learn)
    for key, network in {"opt": sit, "opt_vae": VAE_models["f4d4"](), "opt_disc": Discriminator()}.items():
        names = [name for name, _ in network.named_parameters()]
        in_file = weights.optimizer_names(content, key)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        state, anew = weights.map_optimizer_state(content[key], in_file, optimizer, names)
        assert anew == []
        trainer.load_optimizer(optimizer, state, key)
        assert optimizer.param_groups[0]["lr"] == 1e-4
        for name, parameter in network.named_parameters():
            index, entry = in_file.index(name), optimizer.state[parameter]
            assert entry["exp_avg"].unique().tolist() == [index + 1.0] and entry["step"] == 5
            assert entry["exp_avg"].shape == parameter.shape
            if key == "opt_disc":
                assert KEYS["opt_disc_parameter_order"][index] == f"discriminator.{name}"
        if key == "opt":
            assert ("pos_embed" in names) == learn and in_file[0] == "pos_embed"
        sum(p.square().sum() for p in network.parameters()).backward()
        optimizer.step()


def test_what_does_not_fit_starts_anew():
    """Another head of another encoder, a table of another size, a new parameter; what had no state is not
    named."""
    network = tiny_sit(learn_pos_embed=True)
    names = [name for name, _ in network.named_parameters()]
    shapes = {name: p.shape for name, p in network.named_parameters()}
    shapes |= {"pos_embed": (1, 64, 48), "gone": (3,)}
    in_file = [name for name in shapes if name != "projectors.0.4.bias"]
    state = moments([shapes[name] for name in in_file], missing=[in_file.index("final_layer.linear.bias")])
    optimizer = torch.optim.AdamW(network.parameters())
    mapped, anew = weights.map_optimizer_state(state, in_file, optimizer, names)
    assert anew == ["pos_embed", "projectors.0.4.bias"]
    started = (*anew, "final_layer.linear.bias")
    assert set(mapped["state"]) == {i for i, name in enumerate(names) if name not in started}
    trainer.load_optimizer(optimizer, mapped, "opt")
    sum(p.square().sum() for p in network.parameters()).backward()
    optimizer.step()
    assert optimizer.state[network.pos_embed]["step"] == 1


def test_own_checkpoints_keep_their_order():
    """In ours the table is a buffer, unless --learn-pos-embed, and the discriminator has an optimiser of its
    own."""
    for learn in (False, True):
        nets = {"model": tiny_sit(learn_pos_embed=learn), "discriminator": Discriminator()}
        content = {name: net.state_dict() for name, net in nets.items()}
        for key, name in (("opt", "model"), ("opt_disc", "discriminator")):
            content[key] = moments([p.shape for p in nets[name].parameters()])
            assert weights.optimizer_names(content, key) == [n for n, _ in nets[name].named_parameters()]
    content["opt"]["param_groups"][0]["params"] = content["opt"]["param_groups"][0]["params"][:-2]
    with pytest.raises(ValueError, match="parameters, but model has"):
        weights.optimizer_names(content, "opt")
    for broken in ({}, {"opt": None, "model": {}}, {"opt": {"param_groups": [{}]}, "model": {}}):
        with pytest.raises(ValueError, match="no optimiser state"):
            weights.optimizer_names(broken, "opt")
        assert weights.optimizer_state(broken, "opt", torch.optim.AdamW([torch.ones(1)]), ["a"])[1] == ["a"]
