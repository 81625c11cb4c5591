"""models/runtime/weights.py: discriminators of every kind of file, optimiser states by name, digests."""
import argparse
import json
from pathlib import Path

import pytest
import torch
from fill import fill_

from models.discriminator import Discriminator
from models.runtime import files, vae_files, weights
from models.sit import SiT, SiT_models
from models.vae import VAE_models


def test_discriminator_of_every_kind_of_file(tmp_path):
    disc = fill_(Discriminator())
    state, digest = disc.state_dict(), weights.state_digest(disc)
    vae = {"decoder.conv_in.weight": torch.zeros(1, 4, 3, 3)}
    files.save(state, tmp_path / "bare.pt")
    files.save({"vae": vae, "discriminator": state, "steps": 1}, tmp_path / "0000001.pt")
    ldm = {
        "state_dict": vae
        | {f"loss.discriminator.{k}": v for k, v in state.items()}
        | {"loss.logvar": torch.zeros(())}
    }
    files.save(ldm, tmp_path / "ldm.ckpt")
    files.save(vae, tmp_path / "vae.pt")
    files.save(state, tmp_path / "vae-discriminator-ckpt.pt")
    for name in ("bare.pt", "0000001.pt", "ldm.ckpt", "vae.pt"):
        assert weights.state_digest(weights.discriminator(str(tmp_path / name), "f8d4")) == digest, name
    files.save(vae, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    hub = "REPA-E/e2e-vavae", "stabilityai/sd-vae-ft-mse"  # answered without asking it
    for source in (str(tmp_path / "none.pt"), str(tmp_path / "folder"), *hub):
        assert weights.discriminator_state(source, "f8d4") is None
        with pytest.raises(ValueError, match="holds no discriminator"):
            weights.discriminator(source, "f8d4")
    files.save({k: v for k, v in state.items() if k != "main.3.bias"}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="1 missing .first: main.3.bias"):
        weights.discriminator(str(tmp_path / "bare.pt"), "f8d4")
    assert weights.state_digest(weights.discriminator("none", "f8d4")) != digest


def test_digest_sees_every_bit():
    state = {
        "a": torch.arange(6.0).view(2, 3),
        "n": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    digest = weights.state_digest(state)
    assert digest == weights.state_digest({k: v.clone() for k, v in state.items()})
    assert digest != weights.state_digest(
        state | {"half": torch.tensor([1, 1.0078125], dtype=torch.bfloat16)}
    )
    assert digest != weights.state_digest({("b" if k == "a" else k): v for k, v in state.items()})
    assert weights.state_digest({"a": state["a"].mT.contiguous().mT}) == weights.state_digest(
        {"a": state["a"]}
    )


# ---------------------------------------------------------------- optimiser states

def moments(shapes, missing=()):
    """The state dict of an AdamW after 5 steps, with moments that tell of their number."""
    entries = {
        i: {
            "step": torch.tensor(5.0),
            "exp_avg": torch.full(shape, i + 1.0),
            "exp_avg_sq": torch.full(shape, i + 0.5),
        }
        for i, shape in enumerate(shapes)
        if i not in missing
    }
    return {
        "state": entries,
        "param_groups": [
            {
                "lr": 3e-4,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "amsgrad": False,
                "params": list(range(len(shapes))),
            }
        ],
    }


def released_checkpoint(golden_json, sit, vae, disc):
    """What the reference writes: names and order of golden/keys_checkpoint.json. Its position table is a
    parameter, the first; its loss module's optimiser covers logvar, discriminator and LPIPS, with state for
    the discriminator alone."""
    keys = golden_json("keys_checkpoint")
    model, vae, discriminator = (net.state_dict() for net in (sit, vae, disc))
    sit_shapes = [v.shape for k, v in model.items() if not k.startswith("bn.")]
    assert next(iter(model)) == "pos_embed" and keys["optimizer_state_dict"]["sit_note"].startswith(
        "index 0 of opt is pos_embed"
    )
    disc_shapes = {f"discriminator.{k}": v.shape for k, v in discriminator.items()}
    order, with_state = keys["opt_disc_parameter_order"], keys["opt_disc_indices_with_state"]
    shapes = [disc_shapes.get(name, (3,)) for name in order]
    return {"model": model, "ema": model, "vae": vae, "discriminator": discriminator, "steps": 400000,
            "opt": moments(sit_shapes), "opt_vae": moments([v.shape for v in vae.values()]),
            "opt_disc": moments(shapes, set(range(len(shapes))) - set(with_state)),
            "args": argparse.Namespace(**keys["repae_args"])}


def tiny_sit(**more):
    return SiT(
        depth=2,
        hidden_size=48,
        patch_size=2,
        num_heads=4,
        input_size=8,
        num_classes=10,
        encoder_depth=1,
        z_dims=[16],
        projector_dim=32,
        **more,
    )


@pytest.mark.parametrize("learn", [False, True])
def test_released_optimizers_go_over_by_name(golden_json, tmp_path, learn):
    files.save(
        released_checkpoint(golden_json, tiny_sit(), VAE_models["f4d4"](), Discriminator()),
        tmp_path / "0400000.pt",
    )
    content = files.load(tmp_path / "0400000.pt")
    networks = {
        "opt": tiny_sit(learn_pos_embed=learn),
        "opt_vae": VAE_models["f4d4"](),
        "opt_disc": Discriminator(),
    }
    for key, network in networks.items():
        names = [name for name, _ in network.named_parameters()]
        in_file = weights.optimizer_names(content, key)
        assert len(in_file) == len(content[key]["param_groups"][0]["params"])
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        state, anew = weights.map_optimizer_state(content[key], in_file, optimizer, names)
        assert anew == []
        files.check_optimizer_state(optimizer, state, key)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 1e-4
        for name, parameter in network.named_parameters():
            index = in_file.index(name)
            assert optimizer.state[parameter]["exp_avg"].unique().tolist() == [index + 1.0]
            assert (
                optimizer.state[parameter]["step"] == 5
                and optimizer.state[parameter]["exp_avg"].shape == parameter.shape
            )
            if key == "opt_disc":
                assert (
                    golden_json("keys_checkpoint")["opt_disc_parameter_order"][index]
                    == f"discriminator.{name}"
                )
        if key == "opt":
            assert ("pos_embed" in names) == learn and in_file[0] == "pos_embed"
        sum(p.square().sum() for p in network.parameters()).backward()
        optimizer.step()


def test_what_does_not_fit_starts_anew():
    """Another head of another encoder, a table of another size, a new parameter; what had no state is not
    named."""
    network = tiny_sit(learn_pos_embed=True)
    names = [name for name, _ in network.named_parameters()]
    shapes = {name: p.shape for name, p in network.named_parameters()} | {
        "pos_embed": (1, 64, 48),
        "gone": (3,),
    }
    in_file = [name for name in shapes if name != "projectors.0.4.bias"]
    state = moments([shapes[name] for name in in_file], missing=[in_file.index("final_layer.linear.bias")])
    optimizer = torch.optim.AdamW(network.parameters())
    mapped, anew = weights.map_optimizer_state(state, in_file, optimizer, names)
    assert anew == ["pos_embed", "projectors.0.4.bias"]
    assert set(mapped["state"]) == {
        i for i, name in enumerate(names) if name not in (*anew, "final_layer.linear.bias")
    }
    optimizer.load_state_dict(mapped)
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
    content["opt"]["param_groups"][0]["params"].pop()
    content["opt"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameters, but model has"):
        weights.optimizer_names(content, "opt")
    for broken in ({}, {"opt": None, "model": {}}, {"opt": {"param_groups": [{}]}, "model": {}}):
        with pytest.raises(ValueError, match="no optimiser state"):
            weights.optimizer_names(broken, "opt")


# ---------------------------------------------------------------- whole checkpoints

def checkpoint(path, **changes):
    sit = fill_(
        SiT_models["SiT-Ti/2"](input_size=8, num_classes=10, encoder_depth=4, z_dims=[16], projector_dim=32)
    )
    content = {
        "ema": sit.state_dict(),
        "args": {"model": "SiT-Ti/2", "num_classes": 10},
        "steps": 3,
    } | changes
    files.save(content, path)
    return str(path)


def test_frozen_checkpoint_loads_with_the_vae_it_names(tmp_path):
    vae = fill_(VAE_models["f4d4"]())
    files.save(vae.state_dict(), tmp_path / "vae.pt")
    args = {"model": "SiT-Ti/2", "num_classes": 10, "vae": "f4d4", "vae_ckpt": str(tmp_path / "vae.pt")}
    path = checkpoint(tmp_path / "a" / "0000003.pt", args=args)
    _, loaded, settings, source = weights.load(path)
    assert (
        weights.state_digest(loaded) == weights.state_digest(vae)
        and source == args["vae_ckpt"]
        and settings["steps"] == 3
    )
    assert vae_files.open_vae(path, "f4d4")[0] == "f4d4"
    sit, other, _, source = weights.load(path, str(tmp_path / "vae.pt"))
    assert source == str(tmp_path / "vae.pt") and not sit.training and not other.training


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ema": [1]}, "no 'ema' weights"),
        ({"args": [1]}, "args are a list"),
        ({"ema": {"pos_embed": 1}}, "another layout"),
        ({"args": {"model": ["SiT"]}}, "none of"),
        ({"ema": {"x_embedder.proj.weight": torch.zeros(3)}}, "another layout"),
        ({}, "names none"),
        ({"vae": None}, "no VAE"),
    ],
)
def test_broken_checkpoints(tmp_path, changes, words):
    with pytest.raises((ValueError, OSError)) as error:
        weights.load(checkpoint(tmp_path / "0000003.pt", **changes))
    assert words in str(error.value) and "\n" not in str(error.value) and "0000003.pt" in str(error.value)


def test_golden_layout_is_what_the_tests_say():
    keys = json.loads((Path(__file__).parent / "data" / "golden" / "keys_checkpoint.json").read_text())
    assert keys["opt_disc_parameter_order"][1:14] == [
        f"discriminator.{n}" for n, _ in Discriminator().named_parameters()
    ]
