"""Networks from files, one way to open each: SiT, VAE, discriminator, LPIPS; and optimiser states by name.

Files are training checkpoints, ours and each kind that REPA-E released, as they are, and the VAEs of
vae_files.

A checkpoint says which model it is in its `args` (a dict, or the reference's pickled argparse.Namespace) or
in the args.json of its run folder; every size is read off the tensors. Errors: ValueError or OSError with a
one-line message that names the file and the remedy.
"""
import hashlib
import math
import os

import torch
import torchvision

from models.runtime import files, vae_files
from models.discriminator import Discriminator
from models.lpips import LPIPS, load_pretrained
from models.sit import SiT_models
from models.runtime.files import training_args
from models.runtime.vae_files import open_vae
from models.vae import VAE_models


def load(path, vae_ckpt=None):
    """(sit, vae, settings, source of the VAE) of a training checkpoint, both in eval mode on the CPU.

    The SiT has the EMA weights and no alignment heads, which do not act on samples: no encoder is needed.
    Label sit.num_classes is the null class where the label table has a row for it. `settings` holds the
    training flags and `steps`. `vae_ckpt`: decode with this VAE instead (anything that
    vae_files.load_vae_file takes).
    """
    content = files.load(path)
    if not isinstance(content, dict) or not isinstance(content.get("ema"), dict):
        raise ValueError(f"{path}: checkpoint of another layout, it has no 'ema' weights")
    if bad := files.first_non_finite(content["ema"], "ema"):
        raise ValueError(f"{path}: {bad} holds NaN or infinity; take an earlier checkpoint")
    settings = training_args(content, path) | {"steps": content.get("steps")}
    sit = build_sit(content["ema"], settings, path)
    vae, source = build_vae(content, settings, path, vae_ckpt)
    if vae.latent_channels != sit.in_channels:
        raise ValueError(f"the VAE of {source} has {vae.latent_channels} latent channels, the model of "
                         f"{path} takes "
                         f"{sit.in_channels}; give the right one with --vae-ckpt")
    return sit, vae, settings, source


def build_sit(state, settings, path):
    """The SiT of an `ema` state dict, in eval mode: named by the settings, all sizes from the tensors."""
    if settings.get("model") not in list(SiT_models):  # a list: whatever the file says may be compared
        raise ValueError(f"{path}: model {settings.get('model')!r} is none of {', '.join(SiT_models)}")
    state = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    for key, dimensions in (("x_embedder.proj.weight", 4), ("pos_embed", 3),
                            ("y_embedder.embedding_table.weight", 2)):
        if not torch.is_tensor(state.get(key)) or state[key].ndim != dimensions:
            raise ValueError(f"{path}: checkpoint of another layout, its ema has no {key} of {dimensions} "
                             "dimensions")
    if "bn.running_mean" not in state or "bn.running_var" not in state:
        raise ValueError(f"{path}: its ema has no latent statistics (bn.running_mean, bn.running_var)")
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    rows = len(state["y_embedder.embedding_table.weight"])
    num_classes = settings.get("num_classes", rows - 1)
    if type(num_classes) is not int or rows not in (num_classes, num_classes + 1):
        raise ValueError(f"{path}: a label table of {rows} rows does not fit {num_classes} classes")
    with torch.device("meta"):  # random initial values would cost more time than the file
        sit = SiT_models[settings["model"]](
            input_size=math.isqrt(state["pos_embed"].shape[1]) * patch, in_channels=channels,
            num_classes=num_classes,
            class_dropout_prob=float(rows > num_classes), encoder_depth=1, z_dims=(),
            qk_norm="blocks.0.attn.q_norm.weight" in state)
    return files.load_weights(sit.to_empty(device="cpu"), state, path).eval()


def with_own_heads(state, sit):
    """(SiT weights `state` for `sit`, names of the alignment heads that do not fit).

    Those, which belong to an encoder, stay sit's own."""
    own = sit.state_dict()
    state = {k: v for k, v in state.items() if k in own or not str(k).startswith("projectors.")}
    anew = [k for k in own if k.startswith("projectors.")
            and (not torch.is_tensor(state.get(k)) or state[k].shape != own[k].shape)]
    return state | {k: own[k] for k in anew}, anew


def initial_sit(path, sit):
    """The averaged SiT weights of the training checkpoint `path`, as `with_own_heads` gives them.

    Ours or a released one; ValueError if anything does not fit, or is not finite.
    """
    content = files.load(path)
    if not isinstance(content.get("ema"), dict):
        raise ValueError(f"{path}: checkpoint of another layout, it has no 'ema' weights")
    state, anew = with_own_heads(content["ema"], sit)
    files.check_state(sit, state, f"--init-from {path}")
    if (name := files.first_non_finite(state)) is not None:
        raise ValueError(f"--init-from {path}: {name} is not finite; use another checkpoint")
    return state, anew


def build_vae(content, settings, path, vae_ckpt=None):
    """(vae in eval mode, its source): `vae_ckpt`, else the checkpoint's own, else the file its args name."""
    if vae_ckpt:
        name, state, _ = open_vae(vae_ckpt)
        source = vae_ckpt
    else:
        state, _ = vae_files.vae_in(content, path)
        source = "checkpoint" if "vae" in content else settings.get("vae_ckpt")
        try:
            name = vae_files.vae_name(state)
        except ValueError as error:
            raise ValueError(f"VAE of {path}: {error}") from error
    with torch.device("meta"):  # random initial values would cost more time than the file
        vae = VAE_models[name]()
    return files.load_weights(vae.to_empty(device="cpu"), state, vae_ckpt or f"VAE of {path}").eval(), source


def state_digest(module):
    """sha256 (hex) over the names and tensors of a module or of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in (module if isinstance(module, dict) else module.state_dict()).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
             "lpips/weights/v0.1/vgg.pth")
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


def lpips(remedy="pass --perceptual-weight 0"):
    """LPIPS with torchvision's VGG16 and its linear weights, both fetched once. `remedy` ends the error."""
    # vgg16-397923af.pth: the sha256 begins like that
    url = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    name = os.path.basename(url)
    try:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name)  # torchvision's own place for it
        vgg = files.download(url, path, sha256_prefix=name[6:14])
        linear = files.download(LPIPS_URL, files.cache_path("lpips_vgg.pth"), 7289, LPIPS_SHA256)
    except OSError as error:
        raise OSError(f"the weights of LPIPS cannot be fetched ({error}); without a network {remedy}"
                      ) from error
    return load_pretrained(LPIPS(), files.load(vgg), files.load(linear))


# ---------------------------------------------------------------- the discriminator

WITH_DISCRIMINATOR = ("REPA-E/sdvae", "REPA-E/invae", "REPA-E/vavae")  # released with one


def discriminator(source, vae_name):
    """The discriminator of `source`: a file, a released VAE's hub name, or "none" (from scratch).

    The file holds its weights or is a training checkpoint.
    """
    disc = Discriminator()
    if source == "none":
        return disc
    state = discriminator_state(source, vae_name)
    if state is None:
        raise ValueError(f"--disc-ckpt {source}: holds no discriminator; give another file, or none to start "
                         "from scratch")
    if (bad := files.first_non_finite(state)) is not None:
        raise ValueError(f"--disc-ckpt {source}: {bad} holds NaN or infinity; take a sound copy, or none")
    return files.load_weights(disc, state, f"--disc-ckpt {source}")


def discriminator_state(source, vae_name):
    """State dict of the discriminator that comes with `source`, or None if none does.

    A training checkpoint's `discriminator`, a CompVis checkpoint's loss.discriminator.*, the
    -discriminator-ckpt.pt beside a VAE or in its repository, or a file of its weights alone.
    """
    path = source
    is_file_name = source.endswith((".pt", ".pth", ".ckpt", ".safetensors"))
    if not os.path.exists(source) and source.count("/") == 1 and not is_file_name:
        if source not in WITH_DISCRIMINATOR:
            return None
        path = files.hub_file(source, f"{source.split('/')[1]}-{vae_name}-discriminator-ckpt.pt")
    if os.path.isdir(path):
        return None
    content = files.load(path)
    if "discriminator" in content:
        return content["discriminator"]
    state = content.get("state_dict", content)
    if isinstance(state, dict):
        own = {k.removeprefix("loss.discriminator."): v for k, v in state.items()
               if str(k).startswith("loss.discriminator.")}
        if own or "main.0.weight" in state:
            return own or state
    beside = f"{os.path.splitext(path)[0]}-discriminator-ckpt.pt"
    return files.load(beside) if os.path.isfile(beside) else None


# ---------------------------------------------------------------- optimiser states of other layouts

BUFFERS = ("bn.running_mean", "bn.running_var", "num_batches_tracked", "running_mean", "running_var")


def optimizer_state(content, key, optimizer, names):
    """The optimiser state content[key] for `optimizer`, whose parameters have `names`.

    See map_optimizer_state. One that is missing, or whose names can't be found, starts anew as a whole.
    """
    try:
        return map_optimizer_state(content[key], optimizer_names(content, key), optimizer, names)
    except (AttributeError, LookupError, TypeError, ValueError):
        return optimizer.state_dict(), names


def optimizer_names(content, key):
    """Names of the parameters that content[key] ("opt", "opt_vae", "opt_disc") covers, in its order.

    A state knows numbers only; the order is that of the network's weights without buffers. In the reference's
    files `opt` has the position table first, which is a buffer here unless --learn-pos-embed trains it, and
    `opt_disc` covers the whole loss module: logvar, the discriminator, then LPIPS. Raises ValueError if the
    counts do not fit.
    """
    network = {"opt": "model", "opt_vae": "vae", "opt_disc": "discriminator"}[key]
    state, weights = content.get(key), content.get(network)
    try:
        count = sum(len(group["params"]) for group in dict(state)["param_groups"])
        names = [name for name in dict(weights) if not name.endswith(BUFFERS)]
    except (TypeError, LookupError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{key}: no optimiser state, or no {network} beside it") from error
    if count == len(names) - 1 and "pos_embed" in names:
        names.remove("pos_embed")
    elif key == "opt_disc" and count > len(names):
        names = ["logvar", *names]
        names += [f"perceptual_loss.{i}" for i in range(count - len(names))]
    if count != len(names):
        raise ValueError(f"{key}: an optimiser state of {count} parameters, but {network} has {len(names)}")
    return names


def map_optimizer_state(state, names_in_file, optimizer, names):
    """An optimiser state in a file's order -> (state dict for `optimizer`, names that start anew).

    names_in_file: of the parameters that `state` counts, in its order (`optimizer_names`); names: of the
    parameters of `optimizer`, in its own. A state goes over where the name is known and the moments have the
    parameter's shape; settings (learning rate ...) stay those of `optimizer`. A parameter that had no state
    in the file starts anew without being named: it had no gradient.
    """
    order = [index for group in state["param_groups"] for index in group["params"]]
    entries = {name: state["state"].get(index) for name, index in zip(names_in_file, order, strict=True)}
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in own["param_groups"] for index in group["params"]]
    mapped, anew = {}, []
    for index, name, parameter in zip(indices, names, parameters, strict=True):
        entry = entries.get(name)
        if name not in entries or (entry is not None and files.wrong_moment(entry, parameter)):
            anew.append(name)
        elif entry is not None:
            mapped[index] = entry
    return {"state": mapped, "param_groups": own["param_groups"]}, anew
