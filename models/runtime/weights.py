"""Networks from files: SiT, VAE, discriminator and LPIPS, each by one function.

Files are training checkpoints, ours and each kind that REPA-E released, and the VAEs of vae_files. A
checkpoint says which model it is in its `args` (a dict, or the reference's argparse.Namespace) or in the
args.json of its run folder; every size is read off the tensors. Errors: ValueError or OSError with a one-line
message that names the file and the remedy.
"""
import math
import os

import torch
import torchvision

from models.discriminator import Discriminator
from models.lpips import LPIPS, load_pretrained
from models.runtime import files, vae_files
from models.sit import SiT_models
from models.vae import VAE_models


# ---------------------------------------------------------------- training checkpoints

def load(path, vae_ckpt=None):
    """(sit, vae, settings, source of the VAE) of a training checkpoint, both in eval mode on the CPU.

    The SiT has the EMA weights and no alignment heads, which do not act on samples: no encoder is needed.
    Label sit.num_classes is the null class where the label table has a row for it. `settings` contains the
    training flags and `steps`. `vae_ckpt`: decode with this VAE instead (anything that vae_files.open_vae
    opens).
    """
    content = files.load(path)
    state = ema_weights(content, path)
    settings = files.training_args(content, path) | {"steps": content.get("steps")}
    sit = build_sit(state, settings, path)
    vae = open_vae(vae_ckpt or path, content=None if vae_ckpt else content)
    source = vae_ckpt or ("checkpoint" if "vae" in content else settings.get("vae_ckpt"))
    if vae.latent_channels != sit.in_channels:
        raise ValueError(f"the VAE of {source} has {vae.latent_channels} latent channels, the model of "
                         f"{path} {sit.in_channels}; give the right one with --vae-ckpt")
    return sit, vae, settings, source


def ema_weights(content, path):
    """The averaged SiT weights of a training checkpoint, finite."""
    if not isinstance(content.get("ema"), dict):
        raise ValueError(f"{path}: checkpoint of another layout, it has no 'ema' weights")
    if bad := files.first_non_finite(content["ema"], "ema"):
        raise ValueError(f"{path}: {bad} contains NaN or infinity; use an earlier checkpoint")
    return content["ema"]


def build_sit(state, settings, path):
    """The SiT of an `ema` state dict, in eval mode: named by the settings, all sizes from the tensors."""
    if settings.get("model") not in SiT_models:
        raise ValueError(f"{path}: model {settings.get('model')!r} is none of {', '.join(SiT_models)}")
    state = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    rows, _ = state["y_embedder.embedding_table.weight"].shape
    _, tokens, _ = state["pos_embed"].shape
    num_classes = settings.get("num_classes", rows - 1)
    with torch.device("meta"):  # random initial values would cost more time than the file
        sit = SiT_models[settings["model"]](
            input_size=math.isqrt(tokens) * patch, in_channels=channels, num_classes=num_classes,
            class_dropout_prob=float(rows > num_classes), encoder_depth=1, z_dims=(),
            qk_norm="blocks.0.attn.q_norm.weight" in state)
    return files.load_weights(sit.to_empty(device="cpu"), state, path).eval()


def open_vae(source, name=None, content=None):
    """The VAE that `source` names, frozen, in eval mode on the CPU; see vae_files.open_vae."""
    name, state, *_ = vae_files.open_vae(source, name, content=content)
    with torch.device("meta"):
        vae = VAE_models[name]()
    vae.to_empty(device="cpu").load_state_dict(state)
    return vae.eval().requires_grad_(False)


def initial_sit(path, sit):
    """(averaged SiT weights of the training checkpoint `path` for `sit`, names of the alignment heads that
    do not fit, which belong to an encoder: those stay sit's own).

    Ours or a released one. Raises ValueError if anything else does not fit, or is not finite.
    """
    own, state = sit.state_dict(), ema_weights(files.load(path), path)
    new = [k for k in own if k.startswith("projectors.")
           and (k not in state or state[k].shape != own[k].shape)]
    state = {k: v for k, v in state.items() if k in own or not k.startswith("projectors.")}
    state |= {k: own[k] for k in new}
    files.check_state(sit, state, f"--init-from {path}")
    return state, new


# ---------------------------------------------------------------- LPIPS and the discriminator

LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
             "lpips/weights/v0.1/vgg.pth")
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


def lpips(remedy="pass --perceptual-weight 0"):
    """LPIPS with torchvision's VGG16 and its linear weights, downloaded once. `remedy` ends the error."""
    url = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    name = os.path.basename(url)    # vgg16-397923af.pth: its sha256 begins like that
    try:
        vgg = files.download(url, name, name[6:14])
        linear = files.download(LPIPS_URL, "lpips_vgg.pth", LPIPS_SHA256)
    except OSError as error:
        raise OSError(f"the weights of LPIPS: {error}; or {remedy}") from error
    return load_pretrained(LPIPS(), files.load(vgg), files.load(linear))


WITH_DISCRIMINATOR = ("REPA-E/sdvae", "REPA-E/invae", "REPA-E/vavae")  # released with one


def discriminator(source, vae_name):
    """The discriminator that comes with `source`, see `discriminator_state`; "none": from scratch."""
    disc = Discriminator()
    if source == "none":
        return disc
    state = discriminator_state(source, vae_name)
    if state is None:
        raise ValueError(f"--disc-ckpt {source}: contains no discriminator; give another file, or none to "
                         "train one from scratch")
    return files.load_weights(disc, state, f"--disc-ckpt {source}")


def discriminator_state(source, vae_name):
    """State dict of the discriminator that comes with `source`, or None if none does.

    A training checkpoint's `discriminator`, the -discriminator-ckpt.pt beside a VAE or in its repository, or
    a file of its weights alone.
    """
    path = source
    if source in WITH_DISCRIMINATOR:
        path = files.hub_file(source, f"{source.split('/')[1]}-{vae_name}-discriminator-ckpt.pt")
    elif os.path.isdir(source) or not (os.path.isfile(source) or source.endswith(vae_files.ENDINGS)):
        return None     # a diffusers folder, or another hub name
    content = files.load(path)
    if "discriminator" in content or "main.0.weight" in content:
        return content.get("discriminator", content)
    beside = vae_files.companion(path, "discriminator-ckpt")
    return files.load(beside) if os.path.isfile(beside) else None
