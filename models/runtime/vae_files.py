"""VAE files: CompVis .pt, diffusers' AutoencoderKL folders, hub names; latent statistics come along.

`open_vae` opens any VAE, whatever it comes in; `export_vae` writes one for others.

Names used in this project are those of CompVis (encoder.down.0.block.1.conv1.weight ...). The renaming
functions are pure: dict in, dict out, no file touched. Latent statistics are a pair (latents_scale,
latents_bias), each float32 [1, C, 1, 1]: normalised latents are (z - latents_bias) * latents_scale.

Errors: ValueError or OSError with a one-line message.
"""
import os
import re
import shutil
import sys

import safetensors.torch
import torch

from models.runtime import files
from models.vae import VAE_models

# (levels, latent channels) -> name in VAE_models
ARCHITECTURES = {(4, 4): "f8d4", (5, 32): "f16d32", (4, 16): "f8d16", (3, 4): "f4d4", (3, 16): "f4d16"}

# The release's repositories in CompVis naming -> file; other hub names are taken for diffusers folders
RELEASED = {
    "REPA-E/sdvae": "sdvae-f8d4.pt", "REPA-E/e2e-sdvae": "e2e-sdvae-400k.pt",
    "REPA-E/invae": "invae-f16d32.pt", "REPA-E/e2e-invae": "e2e-invae-400k.pt",
    "REPA-E/vavae": "vavae-f16d32.pt", "REPA-E/e2e-vavae": "e2e-vavae-400k.pt",
}

# What a file holds for the VAE itself; beside it LightningDiT keeps linear_proj.* and foundation_model.*, LDM
# loss.*
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

# CompVis piece <-> diffusers piece; {} is a number, kept, but the decoder's levels are counted the other way
# round
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
    """An attention weight's name in diffusers' layout, its last part through `table`; other names stay."""
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
    """The inverse of `to_diffusers`; also takes the attention names before diffusers 0.17 (query ...)."""
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
    first = state.get("decoder.conv_in.weight")
    if not torch.is_tensor(first) or first.ndim != 4:
        raise ValueError("not the weights of a VAE: no decoder.conv_in.weight")
    shape = (_levels(state, "encoder.down."), first.shape[1])
    if shape not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES.values())
        raise ValueError(f"a VAE with {shape[0]} levels and {shape[1]} latent channels is none of {known}")
    return ARCHITECTURES[shape]


# ---------------------------------------------------------------- writing

def diffusers_config(state, stats=None, sample_size=256, source=None):
    """An AutoencoderKL's config.json (a dict) for `to_diffusers(state)`; sizes are read off the tensors.

    Pipelines take latents z from the scale of their network to that of the VAE as z / scaling_factor +
    shift_factor. `source`, the config that the VAE came with (see `source_config`), keeps these numbers and
    force_upcast. Otherwise statistics that are the same in all channels become them, and others latents_mean
    and latents_std, with scaling_factor 1, since the pipelines that read those multiply the two.
    """
    levels = _levels(state, "encoder.down.")
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    # models/vae.py: groups of 4 channels there, where diffusers has one number for all layers
    if min(widths) < 128:
        raise ValueError("diffusers has no group norms like those of so narrow a VAE; use --format compvis")
    attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    source = source or {}
    uniform = stats is not None and all(bool((s == s.flatten()[0]).all()) for s in stats)
    scaling, shift, moments = 1.0, 0.0, {}
    if stats is not None and not uniform:
        scale, bias = (s.flatten().double() for s in stats)
        moments = {"latents_mean": bias.tolist(), "latents_std": (1 / scale).tolist()}
    elif uniform:  # float32's neighbours of the numbers that were meant: 0.18215000629425049
        scaling, shift = (float(f"{s.flatten()[0].item():.7g}") for s in stats)
    if "scaling_factor" in source and (not moments or "latents_mean" in source):
        scaling, shift = source["scaling_factor"], source["shift_factor"]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
        "force_upcast": source.get("force_upcast", False),
        "in_channels": 3,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "layers_per_block": len({n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}),
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
    } | moments


def _pipelines(config):
    """Which pipelines of diffusers find in this config what they need, in a sentence."""
    scalars = f"scaling_factor {config['scaling_factor']:g} and shift_factor {config['shift_factor']:g}"
    if "latents_mean" not in config:
        return f"its config has {scalars}, which is all that diffusers' pipelines read"
    return ("its config has latents_mean and latents_std per channel, which Stable Diffusion XL's pipeline "
            "reads; DiT's and Stable Diffusion's read scaling_factor alone, Stable Diffusion 3's and Flux's "
            f"scaling_factor and shift_factor (here {scalars}): give those latents in the VAE's own scale")


def check_export(out, state, stats=None, format="diffusers", force=False):
    """Raise the ValueError or OSError that `export_vae` would; nothing is written."""
    compvis = f"{os.path.basename(os.path.abspath(out))}.pt"
    ours = {"config.json", "diffusion_pytorch_model.safetensors", compvis,
            _companion(compvis, "latents-stats"), _companion(compvis, "discriminator-ckpt")}
    if os.path.lexists(out) and not force:
        raise ValueError(f"{out}: exists; choose another folder, or pass --force to replace it")
    if os.path.lexists(out) and not (os.path.isdir(out) and set(os.listdir(out)) <= ours):
        raise ValueError(f"{out}: holds more than an export, so --force does not replace it; choose another "
                         "folder")
    if (bad := files.first_non_finite(state)) is not None:
        raise ValueError(f"{out}: not written, because {bad} of the VAE holds NaN or infinity")
    if format == "diffusers":
        diffusers_config(state, stats)
    files.check_writable(f"{os.path.abspath(out)}.tmp")     # beside it: it appears there by a rename


def export_vae(out, state, stats=None, format="diffusers", sample_size=256, force=False, source=None,
               discriminator=None):
    """Write a VAE (state dict in CompVis names) and its statistics as a folder `out`, whole or not at all.

    format "diffusers": config.json and diffusion_pytorch_model.safetensors, what
    AutoencoderKL.from_pretrained loads; `source`: see `diffusers_config`. "compvis": <folder's name>.pt and
    -latents-stats.pt, as REPA-E is released, and -discriminator-ckpt.pt if a discriminator's state dict is
    given. An existing `out` is refused, or with `force` replaced if it holds nothing but such an export.
    Returns what was written and who can read it, in a sentence.
    """
    out = os.path.abspath(out)
    parent, name = os.path.split(out)
    files.remove_leftovers(parent)
    # A process that was killed between the two renames below left the old export under its temporary name,
    # and one killed after them left it for nothing.
    for left in os.listdir(parent) if os.path.isdir(parent) else []:
        if left.startswith(f".{name}.") and left.endswith(".old"):
            if os.path.lexists(out):
                shutil.rmtree(os.path.join(parent, left), ignore_errors=True)
            else:
                os.rename(os.path.join(parent, left), out)
    check_export(out, state, stats, format, force)
    compvis = f"{name}.pt"
    temporary, old = files.temporary_name(out), files.temporary_name(out, "old")
    try:
        if format == "compvis":
            target = os.path.join(temporary, compvis)
            files.save(state, target)
            if stats is not None:
                content = {"latents_scale": stats[0], "latents_bias": stats[1]}
                files.save(content, _companion(target, "latents-stats"))
            if discriminator is not None:
                files.save(discriminator, _companion(target, "discriminator-ckpt"))
            wrote = ", ".join(sorted(os.listdir(temporary)))
        else:
            config = diffusers_config(state, stats, sample_size, source)
            tensors = {k: v.contiguous() for k, v in to_diffusers(state).items()}
            data = safetensors.torch.save(tensors, {"format": "pt"})
            target = os.path.join(temporary, "diffusion_pytorch_model.safetensors")
            with files.replace(target) as path, open(path, "wb") as f:
                f.write(data)  # safetensors' own save_file makes a file that only its owner can read
            files.save_json(config, os.path.join(temporary, "config.json"), indent=2)
            wrote = f"a folder for diffusers.AutoencoderKL.from_pretrained; {_pipelines(config)}"
        if os.path.lexists(out):
            os.rename(out, old)
        os.rename(temporary, out)
    finally:
        if not os.path.lexists(out) and os.path.isdir(old):
            os.rename(old, out)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return wrote


# ---------------------------------------------------------------- statistics

def _number(value, what):
    """`value` as a float; ValueError unless it is a finite number, also in float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e38:
        raise ValueError(f"{what} is not a finite number")
    return float(value)


def stats_from_config(config, channels):
    """(latents_scale, latents_bias) of a diffusers config.

    1/latents_std and latents_mean where it has them, as the REPA-E exports do, otherwise scaling_factor and
    shift_factor; where it states none, diffusers' own default 0.18215 (stabilityai/sd-vae-ft-mse) and 0.
    """
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        for key in ("latents_mean", "latents_std"):
            if not isinstance(config[key], list) or len(config[key]) != channels:
                raise ValueError(f"config.json: {key} is no list of {channels} values")
        bias, std = (torch.tensor([_number(v, f"config.json: a value of {key}") for v in config[key]])
                     for key in ("latents_mean", "latents_std"))
        scale = 1 / std
    else:
        scalars = _scalars(config)
        bias, scale = (torch.full((channels,), scalars[key]) for key in ("shift_factor", "scaling_factor"))
    return _checked_stats(scale, bias, "config.json")


def _scalars(config):
    """The numbers in a diffusers config that pipelines read, with diffusers.AutoencoderKL's defaults."""
    values = {key: default if config.get(key) is None else _number(config[key], f"config.json: {key}")
              for key, default in (("scaling_factor", 0.18215), ("shift_factor", 0.0))}
    return values | {"force_upcast": config.get("force_upcast") is not False}


def _checked_stats(scale, bias, what):
    """(latents_scale, latents_bias), each float32 [1, C, 1, 1]; ValueError if not finite, or scale <= 0."""
    if not all(torch.is_tensor(v) and v.numel() for v in (scale, bias)) or scale.numel() != bias.numel():
        raise ValueError(f"{what}: latents_scale and latents_bias must have one number per latent channel")
    scale, bias = (v.detach().float().view(1, -1, 1, 1) for v in (scale, bias))
    if not (scale.isfinite().all() and bias.isfinite().all() and (scale > 0).all()):
        raise ValueError(f"{what}: its latent statistics are not finite, or a scale is not above 0")
    return scale, bias


def load_stats_file(path):
    """(latents_scale, latents_bias) of a latent statistics file, each [1, C, 1, 1]."""
    content = files.load(path)
    if not {"latents_scale", "latents_bias"} <= set(content):
        raise ValueError(f"{path}: a latent statistics file holds latents_scale and latents_bias")
    return _checked_stats(content["latents_scale"], content["latents_bias"], path)


# ---------------------------------------------------------------- reading

def open_vae(source, name=None, stats_file=None):
    """(key of VAE_models, state dict in CompVis names, statistics or None) of any VAE, all checked.

    `source`: see `load_vae_file`. Raises ValueError if it is not of architecture `name`, where one is given,
    or does not hold exactly that architecture's weights. The statistics are those of `stats_file` if given.
    """
    state, stats = load_vae_file(source)
    try:
        found = vae_name(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if name not in (None, found):
        raise ValueError(f"{source}: weights of another architecture, a VAE of type {found}, "
                         f"not --vae {name}")
    with torch.device("meta"):
        files.check_state(VAE_models[found](), state, source)
    if (bad := files.first_non_finite(state)) is not None:
        raise ValueError(f"{source}: {bad} of the VAE holds NaN or infinity; take a sound copy")
    stats = load_stats_file(stats_file) if stats_file else stats
    channels = state["decoder.conv_in.weight"].shape[1]
    if stats is not None and stats[0].numel() != channels:
        raise ValueError(f"{stats_file or source}: statistics of {stats[0].numel()} channels, but {found} "
                         f"has {channels}")
    return found, state, stats


def load_vae_file(source):
    """(state dict in CompVis names, (latents_scale, latents_bias) or None) of a VAE on disk or on the hub.

    `source`: a .pt or .safetensors in CompVis or diffusers names (statistics from the <name>-latents-stats.pt
    or config.json beside it, if there), a training checkpoint of REPA-E (its `vae`, or the frozen one that
    its args name; statistics of its `ema`) or of finetune_vae.py (its `vae_ema` and statistics), a folder
    that diffusers saved, or a hub name such as stabilityai/sd-vae-ft-mse or REPA-E/e2e-vavae. Tensors that
    are no part of a VAE are left out, with a note on stderr.
    """
    path = _path_of(source)
    return _load_folder(path) if os.path.isdir(path) else vae_in(files.load(path), path)


def _path_of(source):
    """The file or diffusers folder that `source` names, fetched if it is a hub name."""
    if os.path.exists(source):
        nested = os.path.join(source, "vae")  # of a whole pipeline
        is_vae = os.path.isfile(os.path.join(source, "config.json"))
        return nested if os.path.isdir(nested) and not is_vae else source
    is_file_name = source.endswith((".pt", ".pth", ".ckpt", ".safetensors"))
    if is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(f"{source}: no such VAE; give a .pt file, a diffusers folder or a hub name "
                                "such as REPA-E/e2e-vavae")
    if source not in RELEASED:
        files.hub_file(source, "diffusion_pytorch_model.safetensors")
        return os.path.dirname(files.hub_file(source, "config.json"))
    path = files.hub_file(source, RELEASED[source])
    try:
        files.hub_file(source, _companion(RELEASED[source], "latents-stats"))
    except OSError:
        pass  # a VAE without statistics is whole: the diffusion model's batch norm holds them too
    return path


def vae_in(content, path, _followed=()):
    """`load_vae_file` of a file that has been read: `content` of `path`."""
    stats, ema = None, content.get("ema")
    if isinstance(ema, dict) and all(torch.is_tensor(ema.get(f"bn.running_{k}")) for k in ("mean", "var")):
        stats = _checked_stats(ema["bn.running_var"].rsqrt(), ema["bn.running_mean"], f"{path} (ema)")
    if "vae" in content or "vae_ema" in content:
        state = content.get("vae_ema", content.get("vae"))  # vae_ema: from finetune_vae.py
        if "latents_scale" in content:
            stats = _checked_stats(content["latents_scale"], content.get("latents_bias"), path)
    elif isinstance(ema, dict):
        return _frozen_vae(content, path, _followed)[0], stats
    else:
        state = content.get("state_dict", content)  # a whole CompVis training checkpoint
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no VAE (a dict of name -> tensor)")
    companion, config = _companion(path, "latents-stats"), os.path.join(os.path.dirname(path), "config.json")
    in_diffusers_names = any(isinstance(k, str) and k.startswith("encoder.down_blocks.") for k in state)
    state = _own_names(state, path)
    if stats is None and in_diffusers_names and os.path.isfile(config):
        stats = stats_from_config(_diffusers_json(config), state["decoder.conv_in.weight"].shape[1])
    if stats is None and os.path.isfile(companion):
        stats = load_stats_file(companion)
    return state, stats


def _frozen_vae(content, path, followed):
    """(state, statistics) of the VAE that a frozen-VAE checkpoint was trained on: the file its args name."""
    settings = files.training_args(content, path)
    source = settings.get("vae_ckpt")
    remedy = "name the VAE itself, with --vae-ckpt or in place of this checkpoint"
    if not isinstance(source, str) or source in ("none", "auto"):
        raise ValueError(f"{path}: holds no VAE and names none; {remedy}")
    if source in followed:
        raise ValueError(f"{path}: names {source} as its VAE, which leads back here; {remedy}")
    try:
        found = _path_of(source)
        if os.path.isdir(found):
            return _load_folder(found)
        return vae_in(files.load(found), found, (*followed, source))
    except OSError as error:
        hub = {file: repo for repo, file in RELEASED.items()}.get(os.path.basename(source))
        raise FileNotFoundError(f"{path}: trained on a frozen {settings.get('vae')} VAE, {source}, which is "
                                f"not here; {remedy}{f', for example {hub}' if hub else ''}") from error


def _own_names(state, path):
    """The VAE in CompVis names, out of those, diffusers' names, or a whole latent diffusion model."""
    state = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    whole = "first_stage_model."  # Stable Diffusion in one file
    state = {k.removeprefix(whole): v for k, v in state.items() if k.startswith(whole)} or state
    averages = _averages(state)
    if averages:
        _note(f"{path}: of its weights the averages (model_ema) are taken")
    vae = {k: v for k, v in (state | averages).items() if k.startswith(PARTS)}
    if any(k.startswith("encoder.down_blocks.") for k in vae):
        try:
            vae = from_diffusers(vae)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if "decoder.conv_in.weight" not in vae:
        raise ValueError(f"{path}: not the weights of a VAE, it has no decoder.conv_in.weight in CompVis or "
                         "diffusers names")
    beside = [k for k in state if not k.startswith(PARTS) and not (averages and k.startswith("model_ema."))]
    if beside:
        kinds = ", ".join(sorted({k.split(".")[0] for k in beside})[:5])
        _note(f"{path}: {len(beside)} tensors beside the VAE are left out ({kinds})")
    return vae


def _averages(state):
    """The averaged weights of a VAE, by name, where a trainer kept such; {} otherwise.

    LDM's average is model_ema.<name without dots>, others' model_ema.<name>. The files of sd-vae-ft-mse hold
    only the counters of it (model_ema.decay): their weights are the averages.
    """
    average = {k.removeprefix("model_ema."): v for k, v in state.items() if k.startswith("model_ema.")}
    names = [k for k in (*state, *average) if k.startswith(PARTS)]
    if not names and average:  # no names to learn from where the dots were
        with torch.device("meta"):
            names = sorted({k for make in VAE_models.values() for k in make().state_dict()})
    return {name: average[key] for name in names for key in (name.replace(".", ""), name) if key in average}


def _note(text):
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        print(f"note: {text}", file=sys.stderr, flush=True)


def _companion(path, what):
    """sdvae-f8d4.pt -> sdvae-f8d4-latents-stats.pt or -discriminator-ckpt.pt, the release's naming."""
    return f"{os.path.splitext(path)[0]}-{what}.pt"


def _diffusers_json(path):
    config = files.load_json(path)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{path}: class {config.get('_class_name')!r} is not AutoencoderKL")
    if config.get("norm_num_groups", 32) != 32:
        raise ValueError(f"{path}: norm_num_groups {config['norm_num_groups']}; only 32 is supported")
    return config


def _load_folder(folder):
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise FileNotFoundError(f"{folder}: no config.json, so it is no diffusers AutoencoderKL folder")
    _diffusers_json(os.path.join(folder, "config.json"))
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return vae_in(files.load(path), path)
    raise FileNotFoundError(f"{folder}: no diffusion_pytorch_model.safetensors")


def source_config(source, trained=False):
    """What `export_vae` keeps of a VAE's diffusers config; {} if it has none, or if that can't be told.

    That is scaling_factor, shift_factor, force_upcast and whether latents_mean is there.
    finetune_vae.py keeps them with its checkpoints: a VAE refined with a frozen encoder has the latents of
    the one it began as, and so its numbers. `trained`: its encoder was trained since; then only force_upcast
    is kept, which is about the range of activations.
    """
    path = _path_of(source)
    is_folder = os.path.isdir(path)
    config = os.path.join(path if is_folder else os.path.dirname(path), "config.json")
    found = {}
    if os.path.isfile(config) and (is_folder or _has_diffusers_names(path)):
        config = _diffusers_json(config)
        found = _scalars(config) | ({} if config.get("latents_mean") is None else {"latents_mean": True})
    elif not is_folder:
        content = files.load(path, verify=False)
        if "vae_ema" in content:
            found = content.get("source_config", {})
        elif "ema" in content:
            found = _config_of_stage_one(content, path)
    return {key: value for key, value in found.items() if key == "force_upcast" or not trained}


def _config_of_stage_one(content, path):
    """`source_config` of a checkpoint of train_repae_e.py: that of the VAE it began with, if still there."""
    try:
        before = files.training_args(content, path).get("vae_ckpt")
    except (OSError, ValueError):
        return {}
    here = isinstance(before, str) and os.path.exists(before)
    return source_config(before, trained="vae" in content) if here else {}


def _has_diffusers_names(path):
    return any(str(k).startswith("encoder.down_blocks.") for k in files.load(path, verify=False))
