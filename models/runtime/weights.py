"""SiT and VAE of a training checkpoint: ours, and each kind that REPA-E released, as they are.

A checkpoint says which model it is in its `args` (a dict, or the reference's pickled argparse.Namespace) or in the
args.json of its run folder; every size is read off the tensors.
Errors: ValueError or OSError with a one-line message that names the file and the remedy.
"""
import hashlib
import json
import math
import os

import torch
import torchvision

from models.runtime import files, vae_files
from models.discriminator import Discriminator
from models.lpips import LPIPS, load_pretrained
from models.sit import SiT_models
from models.vae import VAE_models


def load(path, vae_ckpt=None):
    """(sit, vae, settings, source of the VAE) of a training checkpoint, both networks in eval mode on the CPU.

    The SiT has the EMA weights and no alignment heads, which do not act on samples: no encoder is needed. Label
    sit.num_classes is the null class where the label table has a row for it. `settings` holds the training flags and
    `steps`. `vae_ckpt`: decode with this VAE instead (anything that vae_files.load_vae_file takes).
    """
    content = files.load(path)
    if not isinstance(content, dict) or not isinstance(content.get("ema"), dict):
        raise ValueError(f"{path}: checkpoint of another layout, it has no 'ema' weights")
    settings = training_args(content, path) | {"steps": content.get("steps")}
    sit = build_sit(content["ema"], settings, path)
    vae, source = build_vae(content, settings, path, vae_ckpt)
    if vae.latent_channels != sit.in_channels:
        raise ValueError(f"the VAE of {source} has {vae.latent_channels} latent channels, the model of {path} takes "
                         f"{sit.in_channels}; give the right one with --vae-ckpt")
    return sit, vae, settings, source


def training_args(content, path):
    """The flags a checkpoint was trained with, a dict: its own `args`, or args.json beside it or in its run folder."""
    if content.get("args") is not None:
        return dict(content["args"] if isinstance(content["args"], dict) else vars(content["args"]))
    folder = os.path.dirname(os.path.abspath(path))
    for candidate in (os.path.join(folder, "args.json"), os.path.join(os.path.dirname(folder), "args.json")):
        if os.path.isfile(candidate):
            try:
                with open(candidate) as f:
                    return json.load(f)
            except ValueError as error:
                raise ValueError(f"{candidate}: not valid JSON") from error
    raise FileNotFoundError(f"{path}: no args in it and no args.json beside it or in its run folder")


def build_sit(state, settings, path):
    """The SiT of an `ema` state dict, in eval mode: its name from the settings, every size from the tensors."""
    if settings.get("model") not in SiT_models:
        raise ValueError(f"{path}: model {settings.get('model')!r} is none of {', '.join(SiT_models)}")
    state = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    for key in ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"):
        if key not in state:
            raise ValueError(f"{path}: checkpoint of another layout, its ema has no {key}")
    if "bn.running_mean" not in state or "bn.running_var" not in state:
        raise ValueError(f"{path}: its ema has no latent statistics (bn.running_mean, bn.running_var)")
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    rows = len(state["y_embedder.embedding_table.weight"])
    num_classes = settings.get("num_classes", rows - 1)
    if rows not in (num_classes, num_classes + 1):
        raise ValueError(f"{path}: a label table of {rows} rows does not fit {num_classes} classes")
    with torch.device("meta"):  # random initial values would cost more time than the file
        sit = SiT_models[settings["model"]](
            input_size=math.isqrt(state["pos_embed"].shape[1]) * patch, in_channels=channels, num_classes=num_classes,
            class_dropout_prob=float(rows > num_classes), encoder_depth=1, z_dims=(),
            qk_norm="blocks.0.attn.q_norm.weight" in state)
    return files.load_weights(sit.to_empty(device="cpu"), state, path).eval()


def build_vae(content, settings, path, vae_ckpt=None):
    """(vae in eval mode, its source): `vae_ckpt`, else the checkpoint's own VAE, else the file its settings name."""
    source = vae_ckpt or ("checkpoint" if "vae" in content else settings.get("vae_ckpt"))
    if source is None:
        raise ValueError(f"{path}: holds no VAE and names none; give one with --vae-ckpt")
    if source == "checkpoint":
        state, what = content["vae"], f"VAE of {path}"
    else:
        what = source
        try:
            state, _ = vae_files.load_vae_file(source)
        except OSError as error:
            if vae_ckpt:
                raise
            hub = {file: repo for repo, file in vae_files.RELEASED.items()}.get(os.path.basename(source))
            raise FileNotFoundError(f"{path}: trained on a frozen {settings.get('vae')} VAE, {source}, which is not "
                                    f"here; give it with --vae-ckpt{f', for example {hub}' if hub else ''}") from error
    try:
        name = vae_files.vae_name(state)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    with torch.device("meta"):
        vae = VAE_models[name]()
    return files.load_weights(vae.to_empty(device="cpu"), state, what).eval(), source


def open_vae(source, name=None, stats_file=None):
    """(name of the architecture, state dict, statistics or None) of any VAE; ValueError if it is not of type `name`.
    The statistics are those of `stats_file` if given."""
    state, stats = vae_files.load_vae_file(source)
    stats = vae_files.load_stats_file(stats_file) if stats_file else stats
    try:
        found = vae_files.vae_name(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if name not in (None, found):
        raise ValueError(f"{source}: holds a VAE of type {found}, not --vae {name}")
    with torch.device("meta"):
        files.check_state(VAE_models[found](), state, source)
    if stats is not None and stats[0].numel() != state["decoder.conv_in.weight"].shape[1]:
        raise ValueError(f"{stats_file or source}: latent statistics of {stats[0].numel()} channels, unlike the VAE")
    return found, state, stats


def state_digest(module):
    """sha256 (hex) over a module's names and tensors."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


def lpips(remedy="pass --perceptual-weight 0"):
    """LPIPS with torchvision's VGG16 and the published linear weights, both fetched once. `remedy` ends the error."""
    try:
        vgg = torchvision.models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        path = files.download(LPIPS_URL, files.cache_path("lpips_vgg.pth"), 7289, LPIPS_SHA256)
    except OSError as error:
        raise OSError(f"the weights of LPIPS cannot be fetched ({error}); without a network {remedy}") from error
    return load_pretrained(LPIPS(), vgg, files.load(path))


def discriminator(source, vae_name):
    """The discriminator from `source`: a weights file or training checkpoint, the hub name of a released VAE, or "none"
    (from scratch)."""
    disc = Discriminator()
    if source == "none":
        return disc
    path = source
    if not os.path.exists(source) and source.count("/") == 1 and not source.endswith((".pt", ".pth")):
        path = files.hub_file(source, f"{source.split('/')[1]}-{vae_name}-discriminator-ckpt.pt")
    state = files.load(path)
    state = state["discriminator"] if "discriminator" in state else state
    return files.load_weights(disc, state, f"--disc-ckpt {source}")
