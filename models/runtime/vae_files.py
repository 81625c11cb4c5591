"""VAE files: CompVis .pt, diffusers AutoencoderKL folders and hub names, with the latent statistics that come along.

Names used in this project are those of CompVis (encoder.down.0.block.1.conv1.weight ...). The renaming functions are
pure: dict in, dict out, no file touched. Latent statistics are a pair (latents_scale, latents_bias), each float32
[1, C, 1, 1]: normalised latents are (z - latents_bias) * latents_scale.

Errors: ValueError or OSError with a one-line message.
"""
import json
import os
import re
import shutil

import safetensors.torch
import torch

from models.runtime import files

# (levels, latent channels) -> name in VAE_models
ARCHITECTURES = {(4, 4): "f8d4", (5, 32): "f16d32", (4, 16): "f8d16", (3, 4): "f4d4"}

# The release's repositories in CompVis naming -> file; other hub names are taken for diffusers folders
RELEASED = {"REPA-E/sdvae": "sdvae-f8d4.pt", "REPA-E/invae": "invae-f16d32.pt", "REPA-E/vavae": "vavae-f16d32.pt",
            "REPA-E/e2e-sdvae": "e2e-sdvae-400k.pt", "REPA-E/e2e-invae": "e2e-invae-400k.pt",
            "REPA-E/e2e-vavae": "e2e-vavae-400k.pt"}

# CompVis piece <-> diffusers piece; {} is a number, kept, but the decoder's levels are counted the other way round
_PIECES = (
    (".down.{}.block.{}.", ".down_blocks.{}.resnets.{}."),
    (".down.{}.attn.{}.", ".down_blocks.{}.attentions.{}."),
    (".down.{}.downsample.conv.", ".down_blocks.{}.downsamplers.0.conv."),
    (".up.{}.block.{}.", ".up_blocks.{}.resnets.{}."),
    (".up.{}.attn.{}.", ".up_blocks.{}.attentions.{}."),
    (".up.{}.upsample.conv.", ".up_blocks.{}.upsamplers.0.conv."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ATTENTION_BACK = {piece: own for own, piece in _ATTENTION.items()} | \
    {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # the names of diffusers before 0.17


def _rename(name, pieces, levels):
    for old, new in pieces:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)")
        name = re.sub(pattern, lambda m: new.format(*m.groups()), name)
    return re.sub(r"\.(up|up_blocks)\.(\d+)\.", lambda m: f".{m[1]}.{levels - 1 - int(m[2])}.", name)


def _rename_attention(name, table):
    """The last part of an attention weight's name, in diffusers' layout, through `table`; other names as they are."""
    match = re.fullmatch(r"(.*\.attentions\.\d+)\.([\w.]+)\.(weight|bias)", name)
    if not match:
        return name
    if match[2] not in table:
        raise ValueError(f"{name}: no such attention weight in an AutoencoderKL of these sizes")
    return f"{match[1]}.{table[match[2]]}.{match[3]}"


def to_diffusers(state):
    """State dict in CompVis names -> the same tensors in the names of diffusers' AutoencoderKL.

    Attention 1x1 convolutions [C, C, 1, 1] become linear weights [C, C].
    """
    levels = _levels(state, "encoder.down.")
    out = {}
    for name, tensor in state.items():
        name = _rename_attention(_rename(name, _PIECES, levels), _ATTENTION)
        out[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return out


def from_diffusers(state):
    """The inverse of `to_diffusers`; also takes the attention names of diffusers before 0.17 (query, key ...)."""
    levels = _levels(state, "encoder.down_blocks.")
    back = tuple((new, old) for old, new in _PIECES)
    out = {}
    for name, tensor in state.items():
        attention = ".attentions." in name
        name = _rename(_rename_attention(name, _ATTENTION_BACK), back, levels)
        out[name] = tensor[:, :, None, None] if attention and tensor.ndim == 2 else tensor
    return out


def _levels(state, prefix):
    """1 + the largest number that follows `prefix` in a name."""
    numbers = [int(name[len(prefix):].split(".")[0]) for name in state if name.startswith(prefix)]
    if not numbers:
        raise ValueError(f"not the weights of a VAE: no name begins with {prefix}")
    return 1 + max(numbers)


def vae_name(state):
    """Key of VAE_models for a state dict in CompVis names, by its number of levels and latent channels."""
    if "decoder.conv_in.weight" not in state:
        raise ValueError("not the weights of a VAE: no decoder.conv_in.weight")
    shape = (_levels(state, "encoder.down."), state["decoder.conv_in.weight"].shape[1])
    if shape not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES.values())
        raise ValueError(f"a VAE with {shape[0]} levels and {shape[1]} latent channels is none of {known}")
    return ARCHITECTURES[shape]


def diffusers_config(state, stats=None, sample_size=256):
    """The config.json (a dict) of an AutoencoderKL that holds `to_diffusers(state)`; sizes are read off the tensors.

    `stats` go to latents_mean and latents_std, with scaling_factor 1 (diffusers' pipelines multiply the two).
    """
    levels = _levels(state, "encoder.down.")
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    if min(widths) < 128:  # models/vae.py: groups of 4 channels there, where diffusers has one number for all layers
        raise ValueError("diffusers has no group norms like those of so narrow a VAE; use --format compvis")
    attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "layers_per_block": len({n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}),
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
    }
    if stats is not None:
        scale, bias = (s.flatten().double() for s in stats)
        config.update(latents_mean=bias.tolist(), latents_std=(1 / scale).tolist())
    return config


def export_vae(out, state, stats=None, format="diffusers", sample_size=256, force=False):
    """Write a VAE (state dict in CompVis names) and its statistics as a new folder `out`, whole or not at all.

    format "diffusers": config.json and diffusion_pytorch_model.safetensors, what AutoencoderKL.from_pretrained loads;
    "compvis": <folder's name>.pt and -latents-stats.pt, as REPA-E is released. An existing `out` is refused, or with
    `force` replaced if it holds nothing but such an export.
    """
    out = os.path.abspath(out)
    parent, name = os.path.split(out)
    ours = {"config.json", "diffusion_pytorch_model.safetensors", f"{name}.pt", _stats_name(f"{name}.pt")}
    if os.path.lexists(out) and not force:
        raise ValueError(f"{out}: exists; choose another folder, or pass --force to replace it")
    if os.path.lexists(out) and not (os.path.isdir(out) and set(os.listdir(out)) <= ours):
        raise ValueError(f"{out}: holds more than an export, so --force does not replace it; choose another folder")
    temporary, old = (os.path.join(parent, f".{name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        if format == "compvis":
            files.save(state, os.path.join(temporary, f"{name}.pt"))
            if stats is not None:
                content = {"latents_scale": stats[0], "latents_bias": stats[1]}
                files.save(content, os.path.join(temporary, _stats_name(f"{name}.pt")))
        else:
            data = safetensors.torch.save({k: v.contiguous() for k, v in to_diffusers(state).items()}, {"format": "pt"})
            weights = os.path.join(temporary, "diffusion_pytorch_model.safetensors")
            with files.replace(weights) as path, open(path, "wb") as f:
                f.write(data)  # safetensors' own save_file makes a file that only its owner can read
            with files.replace(os.path.join(temporary, "config.json")) as path, open(path, "w") as f:
                json.dump(diffusers_config(state, stats, sample_size), f, indent=2)
        if os.path.lexists(out):
            os.rename(out, old)
        os.rename(temporary, out)
    finally:
        if not os.path.lexists(out) and os.path.isdir(old):
            os.rename(old, out)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def stats_from_config(config, channels):
    """(latents_scale, latents_bias) of a diffusers config, or None if it has none.

    1/latents_std and latents_mean where it has them, as the REPA-E exports do, otherwise scaling_factor and
    shift_factor (stabilityai/sd-vae-ft-mse: 0.18215 and 0).
    """
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        bias, scale = torch.tensor(config["latents_mean"]), 1 / torch.tensor(config["latents_std"])
    elif config.get("scaling_factor"):
        bias = torch.full((channels,), float(config.get("shift_factor") or 0))
        scale = torch.full((channels,), float(config["scaling_factor"]))
    else:
        return None
    if bias.numel() != channels or scale.numel() != channels:
        raise ValueError(f"config.json: latents_mean and latents_std do not have {channels} values")
    return scale.float().view(1, -1, 1, 1), bias.float().view(1, -1, 1, 1)


def load_vae_file(source):
    """(state dict in CompVis names, (latents_scale, latents_bias) or None) of a VAE on disk or on the hub.

    `source`: a CompVis .pt (statistics from the <name>-latents-stats.pt beside it, if there), a training checkpoint of
    REPA-E (its `vae`; statistics of its `ema`) or of finetune_vae.py (its `vae_ema` and statistics), a folder that
    diffusers saved, or a hub name such as stabilityai/sd-vae-ft-mse or REPA-E/e2e-vavae.
    """
    if os.path.isdir(source):
        return _load_diffusers_folder(source)
    if os.path.isfile(source):
        return _load_compvis_file(source)
    is_file_name = source.endswith((".pt", ".pth", ".ckpt", ".safetensors"))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not is_file_name:
        return _load_from_hub(source)
    raise FileNotFoundError(f"{source}: no such VAE; give a .pt file, a diffusers folder or a hub name such as "
                            "REPA-E/e2e-vavae")


def _load_compvis_file(path):
    content = files.load(path)
    state, stats = content, None
    if "vae" in content:
        state, bn = content.get("vae_ema", content["vae"]), content.get("ema", {})  # vae_ema: from finetune_vae.py
        if "latents_scale" in content:
            stats = content["latents_scale"], content["latents_bias"]
        elif "bn.running_var" in bn:
            stats = bn["bn.running_var"].rsqrt().view(1, -1, 1, 1), bn["bn.running_mean"].view(1, -1, 1, 1)
    elif "state_dict" in content:  # a whole CompVis training checkpoint, with its loss and discriminator
        state = {k: v for k, v in content["state_dict"].items() if not k.startswith("loss.")}
    companion = _stats_name(path)
    if stats is None and os.path.isfile(companion):
        stats = load_stats_file(companion)
    _check_is_vae(state, path)
    return state, stats


def _stats_name(path):
    """sdvae-f8d4.pt -> sdvae-f8d4-latents-stats.pt, the release's naming."""
    return os.path.splitext(path)[0] + "-latents-stats.pt"


def _check_is_vae(state, path):
    if not isinstance(state, dict) or "decoder.conv_in.weight" not in state:
        raise ValueError(f"{path}: holds no VAE in CompVis names (no decoder.conv_in.weight)")


def load_stats_file(path):
    """(latents_scale, latents_bias) of a latent statistics file, each [1, C, 1, 1]."""
    content = files.load(path)
    if not isinstance(content, dict) or not {"latents_scale", "latents_bias"} <= set(content):
        raise ValueError(f"{path}: a latent statistics file holds latents_scale and latents_bias")
    return tuple(content[k].float().view(1, -1, 1, 1) for k in ("latents_scale", "latents_bias"))


def _load_diffusers_folder(folder):
    config_path = os.path.join(folder, "config.json")
    if not os.path.isfile(config_path):
        raise FileNotFoundError(f"{folder}: no config.json, so it is no diffusers AutoencoderKL folder")
    try:
        with open(config_path) as f:
            config = json.load(f)
    except ValueError as error:
        raise ValueError(f"{config_path}: not valid JSON") from error
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{config_path}: class {config.get('_class_name')!r} is not AutoencoderKL")
    if config.get("norm_num_groups", 32) != 32:
        raise ValueError(f"{config_path}: norm_num_groups {config['norm_num_groups']}; only 32 is supported")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if os.path.isfile(os.path.join(folder, name)):
            state = from_diffusers(files.load(os.path.join(folder, name)))
            _check_is_vae(state, os.path.join(folder, name))
            return state, stats_from_config(config, state["decoder.conv_in.weight"].shape[1])
    raise FileNotFoundError(f"{folder}: no diffusion_pytorch_model.safetensors")


def _load_from_hub(repo):
    file = RELEASED.get(repo)
    if file is None:
        config = files.hub_file(repo, "config.json")
        files.hub_file(repo, "diffusion_pytorch_model.safetensors")
        return _load_diffusers_folder(os.path.dirname(config))
    path = files.hub_file(repo, file)
    try:
        files.hub_file(repo, _stats_name(file))
    except OSError:
        pass  # a VAE without statistics is whole: the diffusion model's batch norm holds them too
    return _load_compvis_file(path)
