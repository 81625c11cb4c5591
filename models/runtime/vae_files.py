"""VAE files: every published layout is read (`open_vae`), two are written (`export_vae`).

What is read, with latent statistics where it has some:
    a .pt, .ckpt or .safetensors in CompVis names, as REPA-E, LDM and LightningDiT are released; statistics
        from <name>-latents-stats.pt next to it;
    a folder that diffusers saved, alone or in a pipeline's folder; statistics from its config.json;
    a training checkpoint of train_repae_e.py or of the reference: its VAE, or the frozen one that its args
        name; statistics from the batch norm of its `ema`;
    a checkpoint of finetune_vae.py: its averaged VAE and its statistics;
    a hub name such as stabilityai/sd-vae-ft-mse or REPA-E/e2e-vavae.

Which of diffusers' pipelines read what of an exported config.json: DiT's and Stable Diffusion's
scaling_factor; Stable Diffusion 3's and Flux's scaling_factor and shift_factor; Stable Diffusion XL's also
latents_mean and latents_std, one number per channel.

Names in this project are those of CompVis (encoder.down.0.block.1.conv1.weight ...). Latent statistics are a
pair (latents_scale, latents_bias), each float32 [1, C, 1, 1]: normalised latents are (z - latents_bias) *
latents_scale. Errors: ValueError or OSError with a one-line message.
"""
import contextlib
import json
import os
import re
import shutil

import safetensors.torch
import torch

from models.runtime import files
from models.vae import VAE_models

# (levels, latent channels, whether the decoder's levels have attention) -> name in VAE_models
ARCHITECTURES = {(4, 4, False): "f8d4", (5, 32, True): "f16d32", (4, 16, False): "f8d16",
                 (5, 16, False): "f16d16", (5, 16, True): "f16d16-ldm",
                 (3, 4, False): "f4d4", (3, 16, False): "f4d16"}

# The release's repositories in CompVis names -> file; other hub names are those of diffusers folders
RELEASED = {
    "REPA-E/sdvae": "sdvae-f8d4.pt", "REPA-E/e2e-sdvae": "e2e-sdvae-400k.pt",
    "REPA-E/invae": "invae-f16d32.pt", "REPA-E/e2e-invae": "e2e-invae-400k.pt",
    "REPA-E/vavae": "vavae-f16d32.pt", "REPA-E/e2e-vavae": "e2e-vavae-400k.pt",
}

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors", ".sft", ".bin")  # of files; no hub name has them

# What diffusers calls the weights, the first one that is there
DIFFUSERS_WEIGHTS = [f"diffusion_pytorch_model{variant}.{kind}"
                     for variant in ("", ".fp16") for kind in ("safetensors", "bin")]

# Where trainers put the weights in a file, the averaged ones first
WRAPPERS = ("vae_ema", "vae", "ema", "model", "state_dict")

# The VAE's parts, in both layouts. LDM has loss.* beside them, LightningDiT linear_proj.*, foundation_model.*
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
MARK = "decoder.conv_in.weight"     # every VAE has it, in both layouts

# CompVis piece <-> diffusers piece, renamed in this order; {} is a number, kept
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
    (".attentions.{}.norm.", ".attentions.{}.group_norm."),
    (".attentions.{}.q.", ".attentions.{}.to_q."),
    (".attentions.{}.k.", ".attentions.{}.to_k."),
    (".attentions.{}.v.", ".attentions.{}.to_v."),
    (".attentions.{}.proj_out.", ".attentions.{}.to_out.0."),
)
_BACK = tuple((theirs, ours) for ours, theirs in reversed(_PIECES))
# diffusers before 0.17
_OLD = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))


# ---------------------------------------------------------------- names: pure functions of state dicts

def to_diffusers(state):
    """State dict in CompVis names -> the same tensors in the names of diffusers' AutoencoderKL.

    Attention 1x1 convolutions [C, C, 1, 1] become linear weights [C, C].
    """
    levels, out = _levels(state), {}
    for name, tensor in state.items():
        name = _rename(name, _PIECES, levels)
        out[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return out


def from_diffusers(state):
    """The inverse of `to_diffusers`; also accepts the attention names before diffusers 0.17 (query ...)."""
    levels, out = _levels(state, "encoder.down_blocks."), {}
    for name, tensor in state.items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[_rename(name, _OLD + _BACK, levels)] = tensor
    return out


def _rename(name, pieces, levels):
    for old, new in pieces:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)")
        name = re.sub(pattern, lambda m: new.format(*m.groups()), name)
    # diffusers counts the decoder's levels the other way round
    return re.sub(r"\.(up|up_blocks)\.(\d+)\.", lambda m: f".{m[1]}.{levels - 1 - int(m[2])}.", name)


def _levels(state, prefix="encoder.down."):
    """1 + the largest number that follows `prefix` in a name."""
    return 1 + max((int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix)), default=-1)


def vae_name(state, what="the weights"):
    """Key of VAE_models for a state dict in CompVis names; `what` it is begins the error if there is none."""
    attention = any(re.match(r"decoder\.up\.\d+\.attn", name) for name in state)
    shape = _levels(state), state[MARK].shape[1], attention
    if shape not in ARCHITECTURES:
        raise ValueError(f"{what}: a VAE with {shape[0]} levels and {shape[1]} latent channels is none of "
                         f"{', '.join(ARCHITECTURES.values())}")
    return ARCHITECTURES[shape]


# ---------------------------------------------------------------- writing

def diffusers_config(state, stats, sample_size=256, source=None):
    """An AutoencoderKL's config.json (a dict) for `to_diffusers(state)`; sizes are read off the tensors.

    Pipelines take latents z from the scale of their network to that of the VAE as z / scaling_factor +
    shift_factor. `source`, the numbers of the config that the VAE came with (see `open_vae`), keeps these and
    force_upcast. Otherwise statistics that are the same in all channels become them, and others latents_mean
    and latents_std, with scaling_factor 1, since the pipelines that read those multiply the two.
    """
    levels, source = _levels(state), source or {}
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    # models/vae.py: groups of 4 channels there, where diffusers has one number for all layers
    if min(widths) < 128:
        raise ValueError("diffusers has no group norms like those of so narrow a VAE; use --format compvis")
    down = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in state for i in reversed(range(levels))]
    scale, bias = (s.flatten().double() for s in stats)
    if all((s == s[0]).all() for s in (scale, bias)):
        # float32's neighbours of the numbers that were meant: 0.18215000629425049
        scaling, shift, moments = *(float(f"{s[0].item():.7g}") for s in (scale, bias)), {}
    else:
        scaling, shift = 1.0, 0.0
        moments = {"latents_mean": bias.tolist(), "latents_std": (1 / scale).tolist()}
    if "scaling_factor" in source and (not moments or "latents_mean" in source):
        scaling, shift = source["scaling_factor"], source["shift_factor"]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "force_upcast": source.get("force_upcast", False),
        "in_channels": 3,
        "latent_channels": state[MARK].shape[1],
        "layers_per_block": len({n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}),
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up],
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
    } | moments


def export_vae(out, state, stats=None, format="diffusers", sample_size=256, source=None, discriminator=None):
    """Write a VAE (state dict in CompVis names) and its statistics as a new folder `out`, atomically.

    format "diffusers": config.json and diffusion_pytorch_model.safetensors, what
    AutoencoderKL.from_pretrained loads; `source`: see `diffusers_config`. "compvis": <folder's name>.pt and
    -latents-stats.pt, as REPA-E is released, and -discriminator-ckpt.pt if a discriminator's state dict is
    given. Raises ValueError for an `out` that exists.
    """
    out = os.path.abspath(out)
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists; choose another folder, or remove it")
    if format == "diffusers":
        if stats is None:   # a silent scaling_factor of 1 would give pipelines latents of another scale
            raise ValueError(f"{out}: the VAE comes without latent statistics, which pipelines need; name "
                             "them with --latents-stats (a file, or 0.18215 for Stable Diffusion's VAE)")
        config = diffusers_config(state, stats, sample_size, source)
    temporary = f"{out}.{os.getpid()}.tmp"
    try:
        if format == "compvis":
            target = os.path.join(temporary, f"{os.path.basename(out)}.pt")
            files.save(state, target)
            if stats is not None:
                content = {"latents_scale": stats[0], "latents_bias": stats[1]}
                files.save(content, companion(target, "latents-stats"))
            if discriminator is not None:
                files.save(discriminator, companion(target, "discriminator-ckpt"))
        else:
            tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(state).items()}
            with files.replace(os.path.join(temporary, DIFFUSERS_WEIGHTS[0])) as path, open(path, "wb") as f:
                # safetensors' own save_file makes a file that only its owner can read
                f.write(safetensors.torch.save(tensors, {"format": "pt"}))
            with files.replace(os.path.join(temporary, "config.json")) as path, open(path, "w") as f:
                json.dump(config, f, indent=2)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def companion(path, what):
    """sdvae-f8d4.pt -> sdvae-f8d4-latents-stats.pt or -discriminator-ckpt.pt, the release's naming."""
    return f"{os.path.splitext(path)[0]}-{what}.pt"


# ---------------------------------------------------------------- statistics

def load_stats(source, channels):
    """(latents_scale, latents_bias), each [1, C, 1, 1], of a latent statistics file, or of a number as text:
    the scale of all channels, such as 0.18215."""
    try:
        scale, bias = torch.full((channels,), float(source)), torch.zeros(channels)
    except ValueError:
        content = files.load(source)
        scale, bias = content.get("latents_scale"), content.get("latents_bias")
    return _checked_stats(scale, bias, source, channels)


def stats_from_config(config, channels):
    """((latents_scale, latents_bias), pipelines' numbers) of a diffusers config.

    The numbers are scaling_factor, shift_factor and force_upcast, with diffusers' own defaults, since
    stabilityai/sd-vae-ft-mse states none of them, and latents_mean: True where there is one. The statistics
    are 1/latents_std and latents_mean, as in the REPA-E exports, or else scaling_factor and shift_factor.
    """
    given = {key: value for key, value in config.items() if value is not None}
    defaults = {"scaling_factor": 0.18215, "shift_factor": 0.0, "force_upcast": True}
    numbers = {key: given.get(key, default) for key, default in defaults.items()}
    scale, bias = (torch.full((channels,), float(numbers[k])) for k in ("scaling_factor", "shift_factor"))
    if "latents_mean" in given and "latents_std" in given:
        numbers["latents_mean"] = True
        scale, bias = 1 / torch.tensor(given["latents_std"]), torch.tensor(given["latents_mean"])
    return _checked_stats(scale, bias, "config.json", channels), numbers


def _checked_stats(scale, bias, what, channels):
    """(latents_scale, latents_bias), each float32 [1, C, 1, 1]; ValueError if not finite, or scale <= 0."""
    if not all(torch.is_tensor(v) and v.numel() == channels for v in (scale, bias)):
        raise ValueError(f"{what}: no latents_scale and latents_bias of the VAE's {channels} channels")
    scale, bias = (v.detach().float().view(1, -1, 1, 1) for v in (scale, bias))
    if not (scale.isfinite().all() and bias.isfinite().all() and (scale > 0).all()):
        raise ValueError(f"{what}: its latent statistics are not finite, or a scale is not above 0")
    return scale, bias


# ---------------------------------------------------------------- reading

def open_vae(source, name=None, stats_file=None, content=None):
    """(key of VAE_models, state dict in CompVis names, statistics or None, pipelines' numbers) of any VAE.

    `source`: a path or a hub name, see the top of this file; `content`: of that file, if loaded already. The
    statistics are those of `stats_file` if given. Raises ValueError if it is not of architecture `name`,
    where one is given, or not exactly its weights.

    The numbers are those of `stats_from_config`, {} if there are none. finetune_vae.py keeps them in its
    checkpoints: a VAE refined with a frozen encoder has the latents of the one it started from, and so its
    numbers.
    """
    path = source if content else find(source)
    content = content or files.load(path)
    state, stats, numbers, ema = _weights_in(content), None, {}, content.get("ema")
    if state is None and isinstance(ema, dict):
        state, numbers = _frozen_vae(content, path)
    if state is None:
        raise ValueError(f"{path}: not the weights of a VAE, it has no {MARK} in CompVis or diffusers names")
    diffusers = any(key.startswith("encoder.down_blocks.") for key in state)
    state = from_diffusers(state) if diffusers else state
    found, channels = vae_name(state, source), state[MARK].shape[1]
    if name not in (None, found):
        raise ValueError(f"{source}: weights of another architecture, a VAE of type {found}, not {name}")
    with torch.device("meta"):
        files.check_state(VAE_models[found](), state, source)
    if (bad := files.first_non_finite(state)) is not None:
        raise ValueError(f"{source}: {bad} of the VAE contains NaN or infinity; use another copy")

    config = os.path.join(os.path.dirname(path), "config.json")
    beside = companion(path, "latents-stats")
    if "latents_scale" in content:      # of finetune_vae.py
        stats = _checked_stats(content["latents_scale"], content.get("latents_bias"), path, channels)
        numbers = content.get("source_config", {})
    elif isinstance(ema, dict) and "bn.running_var" in ema:     # of train_repae_e.py
        stats = _checked_stats(ema["bn.running_var"].rsqrt(), ema.get("bn.running_mean"), path, channels)
    elif diffusers and os.path.isfile(config):
        content = files.load_json(config)
        if content.get("norm_num_groups", 32) != 32:
            raise ValueError(f"{config}: the VAE's norms have other than 32 groups")
        stats, numbers = stats_from_config(content, channels)
    elif os.path.isfile(beside):
        stats = load_stats(beside, channels)
    return found, state, load_stats(stats_file, channels) if stats_file else stats, numbers


def find(source):
    """The file with the weights of the VAE that `source` names, fetched if that is a hub name."""
    if os.path.isfile(source):
        return source
    if source in RELEASED:
        path = files.hub_file(source, RELEASED[source])
        with contextlib.suppress(OSError):  # complete without statistics: the SiT's batch norm has them too
            files.hub_file(source, companion(RELEASED[source], "latents-stats"))
        return path
    hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.endswith(ENDINGS)
    if not hub_name and not os.path.isdir(source):
        raise FileNotFoundError(f"{source}: no such VAE; give a .pt file, a diffusers folder or a hub name "
                                "such as REPA-E/e2e-vavae")
    config, _ = _first(source, "config.json", "vae/config.json")    # alone, or in a pipeline
    return _first(source, *(config.replace("config.json", name) for name in DIFFUSERS_WEIGHTS))[1]


def _first(source, *names):
    """(name, path) of the first of `names` in a folder, or in a repository of the hub, which is fetched."""
    for name in names:
        path = os.path.join(source, name)
        try:
            path = path if os.path.isdir(source) else files.hub_file(source, name)
            os.stat(path)
            return name, path
        except OSError:
            if name == names[-1]:
                raise


def _weights_in(content):
    """The VAE's tensors in a file, their names without wrapper and prefix; None if there are none.

    Of raw weights and their averages (ema) the averages are taken. What is not part of a VAE is left out.
    """
    for part in (*map(content.get, WRAPPERS), content):
        names = [name for name in part if isinstance(name, str)] if isinstance(part, dict) else []
        prefixes = [name.removesuffix(MARK) for name in names if name.endswith(MARK)]
        if prefixes:
            prefix = min(prefixes, key=lambda p: ("ema" not in p, len(p)))  # module., first_stage_model. ...
            return {name.removeprefix(prefix): part[name] for name in names
                    if name.startswith(tuple(prefix + own for own in PARTS))}
    return None


def _frozen_vae(content, path):
    """(state, numbers) of the VAE that a frozen-VAE checkpoint was trained on: the one that its args name."""
    source = files.training_args(content, path).get("vae_ckpt")
    remedy = "name the VAE itself, such as REPA-E/e2e-vavae, with --vae-ckpt or in place of this checkpoint"
    if source in (None, "none", "auto"):
        raise ValueError(f"{path}: contains no VAE and names none; {remedy}")
    try:
        _, state, _, numbers = open_vae(source)
    except OSError as error:
        raise OSError(f"{path}: the frozen VAE of its training is not here ({error}); {remedy}") from error
    if content.get("vae_digest") not in (None, files.state_digest(state)):
        raise ValueError(f"{path}: was trained on another VAE than {source} is now; {remedy}")
    return state, numbers
