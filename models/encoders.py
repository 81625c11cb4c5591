"""Frozen vision encoders, whose patch tokens the alignment loss aims at (REPA, arXiv 2410.06940).

Needs torch and timm (and what timm brings: safetensors, huggingface_hub); imports nothing of this project, so
it can be lifted out alone.

    encoders = load_encoders("dinov2-vit-b", resolution=256, device=device)  # or "dinov2-vit-b,clip-vit-l"
    targets = [encoder(images) for encoder in encoders]
    # uint8 [B, 3, R, R] -> float32 [B, T, D], T a square grid

A name is one of `ENCODERS` (the reference's names), any model name of timm, or `hog`, which needs no weights.

What an encoder sees (`input_size`): the image at its own size R, or 7/8 of it for 14-pixel patches, so that a
256-pixel image gives a 16x16 grid either way. An image smaller than the encoder was trained on is enlarged to
that size (256, or 224 for 14-pixel patches, at most): a 32-pixel image goes to tf_efficientnet_lite0 at 224.
Position embeddings are resampled to that size once, by timm, when the weights are loaded; a network for which
timm cannot do so (CaiT, VOLO, MLP-Mixer) sees every image at the size it was trained on.

Mean and std are those the weights were trained with, as timm lists them: CLIP's own, 0.5/0.5 for SigLIP,
ImageNet's for DINO, DINOv2, DINOv3, MAE, I-JEPA and MoCo v3; the reference uses the same. Tokens are what the
network's last norm gives (`x_norm_patchtokens` in DINOv2), without class and register tokens; of CLIP and
MAE, under the reference's names, what enters that norm, because the reference aligns with that
(`BEFORE_LAST_NORM`; the two differ by about half their length).

Errors a user can cause are ValueError with a message of one line.
"""

import difflib
import errno
import http.client
import math
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from logging import ERROR, getLogger

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ENCODERS = {  # the reference's names -> timm's
    "dinov2-vit-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vit-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vit-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vit-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2reg-vit-s": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-b": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-l": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-g": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3-vit-s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-vit-b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-vit-l": "vit_large_patch16_dinov3.lvd1689m",
    "dinov1-vit-b": "vit_base_patch16_224.dino",
    "mae-vit-b": "vit_base_patch16_224.mae",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "clip-vit-l": "vit_large_patch14_clip_quickgelu_224.openai",  # its GELU is x * sigmoid(1.702 x)
    "jepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
    "siglip2-vit-b": "vit_base_patch16_siglip_256.v2_webli",
    "mocov3-vit-s": "vit_small_patch16_224",  # of these three timm has the architecture; weights: MOCOV3_URL
    "mocov3-vit-b": "vit_base_patch16_224",
    "mocov3-vit-l": "vit_large_patch16_224",
}
BEFORE_LAST_NORM = "clip-vit-l", "mae-vit-b", "mae-vit-l"
MOCOV3_URL = "https://dl.fbaipublicfiles.com/moco-v3/{0}-300ep/{0}-300ep.pth.tar"  # {0}: vit-s, vit-b, vit-l


# ---------------------------------------------------------------- the encoders

class TimmEncoder(nn.Module):
    """A frozen timm network as a token extractor.

    `model` needs timm's `forward_features`; `size` is the side in pixels it gets to see, `mean` and `std` (3
    numbers each) are those of its training, for images in [0, 1]. `last_norm`: whether tokens pass the
    network's last norm. `probe` sets embed_dim, grid (tokens along a side) and flops (of one image).
    """

    def __init__(self, model, name, size, mean, std, last_norm=True):
        super().__init__()
        self.name, self.size, self.last_norm = name, size, last_norm
        self.model = model.eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # 1.6 times as fast for EfficientNet-Lite0 on a CPU
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def probe(self):
        """Run one blank image through: a network that gives no tokens is noticed before training starts."""
        with FlopCounterMode(display=False) as counter:
            tokens = self(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=self.mean.device))
        self.flops = counter.get_total_flops()
        self.embed_dim, self.grid = tokens.shape[2], math.isqrt(tokens.shape[1])
        return self

    def train(self, mode=True):
        return super().train(False)  # frozen: never in training mode, whatever its owner is switched to

    @torch.no_grad()
    def forward(self, images):
        """uint8 [B, 3, R, R] -> float32 [B, grid * grid, embed_dim], row by row."""
        x = images.float() / 255
        if x.shape[-1] != self.size:
            # Bicubic; 256 -> 224 without antialiasing, as in the reference, unlike where it shrinks more.
            shrinks = self.size < 0.75 * x.shape[-1]
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=shrinks)
        return self.tokens((x - self.mean) / self.std).float()

    def tokens(self, x):
        """Normalised images [B, 3, size, size] -> patch tokens [B, T, D], or a feature map row by row."""
        if not self.last_norm:
            return self.model.forward_intermediates(  # of the last 1 block
                x, indices=1, norm=False, output_fmt="NLC", intermediates_only=True)[0]
        x = self.model.forward_features(x)
        if torch.is_tensor(x) and x.ndim == 4:
            last = getattr(self.model, "output_fmt", None) == "NHWC"
            return x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2)
        if not torch.is_tensor(x) or x.ndim != 3:
            raise ValueError("it gives no grid of tokens")
        count = x.shape[1]
        prefix = getattr(self.model, "num_prefix_tokens", None)  # class and register tokens come first
        prefix = count - math.isqrt(count) ** 2 if prefix is None else prefix
        if math.isqrt(count - prefix) ** 2 != count - prefix:
            raise ValueError(f"it gives {count - prefix} tokens, no square grid")
        return x[:, prefix:]


class HOG(nn.Module):
    """Dense histograms of oriented gradients as patch tokens: a target that needs no weights.

    After MaskFeat (arXiv 2112.09133): per colour channel, 9 unsigned orientation bins, 2x2 cells per patch,
    so 108 numbers. A pixel votes with its gradient magnitude for the two nearest bins; a cell averages the
    votes of a window twice its side. A patch is divided by sqrt(|v|^2 + eps^2), and eps over the same root is
    appended as the 109th number: every token has length 1, and a flat patch is a definite direction, where
    the plain histogram would be zero (which has no cosine) or noise blown up to length 1. `eps` is in units
    of intensity (range [0, 1]) per pixel. Patches are 16 pixels for images of 256 and more, smaller below, 4
    at least: 32 pixels give an 8x8 grid. Where such patches do not fill the image, they are smaller still:
    always a multiple of 4, so that a cell's window has a centre.
    """

    BINS = 9

    def __init__(self, resolution, eps=0.02):
        super().__init__()
        if resolution % 4 or resolution < 8:
            raise ValueError(f"encoder hog needs a --resolution divisible by 4, 8 at least, not {resolution}")
        largest = min(16, max(4, resolution // 32 * 2))
        self.patch = max(patch for patch in (4, 8, 12, 16) if patch <= largest and resolution % patch == 0)
        self.name, self.eps, self.grid = "hog", eps, resolution // self.patch
        self.embed_dim = 3 * 4 * self.BINS + 1
        self.flops = 0  # no matrix products

    @torch.no_grad()
    def forward(self, images):
        """uint8 [B, 3, R, R] -> float32 [B, grid * grid, 109] of length 1."""
        with torch.autocast(images.device.type, enabled=False):
            x = F.pad(images.float() / 255, (1, 1, 1, 1), mode="replicate")
            dx = (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]) / 2
            dy = (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]) / 2
            magnitude = (dx.square() + dy.square()).sqrt()
            # in bins; unsigned: the half turn is BINS wide
            where = torch.atan2(dy, dx) * (self.BINS / math.pi)
            cell = self.patch // 2
            cells = []
            for k in range(self.BINS):  # one bin at a time: all at once would take BINS times the memory
                distance = (where - k - 0.5).remainder(self.BINS)
                distance = torch.minimum(distance, self.BINS - distance)
                votes = magnitude * (1 - distance).clamp(min=0)
                cells.append(F.avg_pool2d(votes, 2 * cell, cell, cell // 2, count_include_pad=False))
            v = torch.stack(cells, 2).flatten(1, 2)  # [B, 3 * BINS, 2 * grid, 2 * grid]
            v = F.pixel_unshuffle(v, 2).flatten(2).transpose(1, 2)  # [B, grid * grid, 108]
            v = torch.cat([v, torch.full_like(v[..., :1], self.eps)], -1)
            return F.normalize(v, dim=-1)


def input_size(resolution, patch, own):
    """Side in pixels an encoder sees for images of `resolution`; `patch` None for a convolutional network,
    `own` the side it was trained on. The rule is in the module's docstring."""
    size, floor = (resolution * 7 // 8, 224) if patch == 14 else (resolution, 256)
    size = max(size, min(own, floor))
    return max(1, round(size / patch)) * patch if patch else size


# ---------------------------------------------------------------- weights

@contextmanager
def _one_line(what, remedy):
    """Turns whatever goes wrong with someone else's file or network into a ValueError of one line."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{what}: {reason[:200]}; {remedy}") from error


def _reach(url):
    """Raise OSError soon where no server answers; huggingface_hub alone retries for most of a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("not in the local cache, and HF_HUB_OFFLINE is set")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an answer is an answer
    except OSError as error:
        if "certificate" not in str(error).lower():  # another client may know more of those: let it try
            reason = getattr(error, "reason", error)
            raise OSError(f"not in the local cache, and no network ({reason})") from None


class _StaysHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, answer, code, message, headers, url):
        if not url.startswith("https:"):
            raise ValueError(f"{request.full_url} leads to an address that is not https")
        return super().redirect_request(request, answer, code, message, headers, url)


TRIES, BACK_OFF, TIMEOUT = 3, 1.0, 30.0     # seconds before the second try, doubled after it; without a byte


def _download(url, path):
    """Fetch `url` to `path`, whole or not at all; again where the server fails, stalls or stops early."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    opener, part = urllib.request.build_opener(_StaysHttps), f"{path}.{os.getpid()}.partial"
    for left in range(TRIES - 1, -1, -1):
        try:
            with opener.open(url, timeout=TIMEOUT) as answer, open(part, "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                size = int(answer.headers.get("Content-Length") or file.tell())
                if file.tell() != size:
                    raise OSError(f"{file.tell()} of {size} bytes came")
            return os.replace(part, path)
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
            if refused or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not left:
                reason = str(error) or type(error).__name__
                raise OSError(f"{url} cannot be fetched ({reason}; {TRIES} tries)") from None
            time.sleep(BACK_OFF * 2 ** (TRIES - 1 - left))
        finally:
            if os.path.exists(part):
                os.remove(part)


def _fetch(name, cfg):
    """Pretrained state dict of a named encoder: from timm's or torch.hub's cache, or downloaded there."""
    with _one_line(f"weights of encoder {name}", "give them with --encoder-ckpt PATH, or take --encoder hog"):
        url = cfg.url if cfg else None
        if name.lower().startswith("mocov3-"):
            url = MOCOV3_URL.format(name.lower().removeprefix("mocov3-"))
        elif cfg and cfg.hf_hub_id:
            return _from_hub(cfg)
        if not url:
            raise ValueError("timm has none")
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        if not os.path.exists(path):
            _reach(url)
            _download(url, path)
        try:
            return _read_state(path)
        except ValueError:  # a download that ended early shall not stay
            os.remove(path)
            raise


def _from_hub(cfg):
    from huggingface_hub import constants, try_to_load_from_cache
    repo, _, revision = cfg.hf_hub_id.partition("@")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    if not any(isinstance(try_to_load_from_cache(repo, n, revision=revision or None), str) for n in names):
        _reach(constants.ENDPOINT)
    getLogger("huggingface_hub").setLevel(ERROR)  # a line for each retry
    which = names[:1] if cfg.hf_hub_filename else []
    return _unwrap(timm.models.load_state_dict_from_hf(cfg.hf_hub_id, *which, weights_only=True))


def _read_state(path):
    """State dict of a weights file, or of a hub-style folder holding one."""
    if os.path.isdir(path):
        files = [os.path.join(path, file) for file in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if os.path.exists(file)), files[0])
    if not os.path.exists(path):
        raise ValueError("no such file")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file
        return _unwrap(load_file(path))
    try:
        return _unwrap(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except (OSError, MemoryError):
        raise
    except Exception:
        what = "no whole file of tensors (torch.load with weights_only=True, or .safetensors)"
        raise ValueError(what) from None


def _unwrap(state):
    """The network's tensors by their names in it, out of what training scripts wrap around."""
    for key in ("state_dict", "model", "teacher", "encoder"):  # "encoder": I-JEPA
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    state = {k: v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, dict) else {}
    # MoCo v3: base_
    for prefix in ("_orig_mod.", "module.", "base_encoder.", "backbone.", "model.", "timm_model."):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    return state


def _fitting(model, state, what):
    """`state` in the names and shapes of a timm `model`, through timm's own converter for that architecture.

    All of the network must be there with the right shapes; only what lies outside it (classifier, decoder,
    text tower) may be more. Raises ValueError naming what differs. The model may be on the meta device.
    """
    with _one_line(what, "give --encoder-ckpt a weights file of that encoder"):
        if not state:
            raise ValueError("holds no tensors")
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        own = model.state_dict()
        if convert is not None:
            try:
                state = convert(dict(state), model)
            # it assumes its architecture's names: without them, the comparison below says more
            except Exception:
                pass
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        shapes = [k for k in own if k in state and state[k].shape != own[k].shape]
        trunk = {k.split(".")[0] for k in own}
        head = model.pretrained_cfg.get("classifier") or ()  # inside the trunk's "head." in some
        head = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
        extra = [k for k in state if k not in own and k.split(".")[0] in trunk and not k.startswith(head)]
        differs = [f"{len(keys)} tensors {kind} (first: {keys[0]})" for kind, keys in
                   (("missing", missing), ("of another shape", shapes), ("more than it has", extra)) if keys]
        if differs:
            raise ValueError("another architecture: " + ", ".join(differs))
        return {k: v for k, v in state.items() if k in own}


# ---------------------------------------------------------------- by name

def _resolve(name):
    """--encoder name -> (timm name, its pretrained_cfg); ValueError with near matches for an unknown one."""
    known = ENCODERS.get(name.lower(), name)
    try:
        if not timm.is_model(known):
            raise RuntimeError
        cfg = timm.models.get_pretrained_cfg(known)
    except RuntimeError:  # no such model, or no such tag of it
        near = difflib.get_close_matches(name.lower(), [*ENCODERS, "hog"], 3, 0.6)
        all_names = timm.list_models() + timm.list_models(pretrained=True)
        near = near or difflib.get_close_matches(name, all_names, 3, 0.6)
        hint = f"; near: {', '.join(near)}" if near else ""
        known = ", ".join([*ENCODERS, "hog"])
        raise ValueError(f"unknown encoder {name!r}: known are {known}, and any timm name{hint}") from None
    return known, cfg


def _create(name, size, device="cpu"):
    """That encoder for images of `size` pixels, with random weights (none on "meta", at no cost)."""
    timm_name, cfg = _resolve(name)
    # A network with a table of positions is built for its size; a convolutional one takes any, untold.
    options = {"img_size": size} if cfg and cfg.fixed_input_size else {}
    mean, std = (cfg.mean, cfg.std) if cfg else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    # of timm's entry only the architecture is used, but for the heads of S
    if name.lower().startswith("mocov3-"):
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        options |= {"num_heads": 12} if name.lower() == "mocov3-vit-s" else {}
    remedy = "take another --encoder or --resolution"
    with _one_line(f"encoder {name} at {size} pixels", remedy), torch.device(device):
        model = timm.create_model(timm_name, num_classes=0, **options)
        return TimmEncoder(model, name, size, mean, std, name.lower() not in BEFORE_LAST_NORM)


def _outline(name, resolution, state=None, what=None):
    """(encoder on the meta device, `state` in its names and shapes or None): what fits, at no cost.

    A network that cannot be had at the size that suits `resolution`, or whose positions timm cannot resample
    to it, is taken at the size it was trained on. `what` names the state's source in an error.
    """
    timm_name, cfg = _resolve(name)
    own = cfg.input_size[-1] if cfg else 224
    patch = re.search(r"_(?:patch|p)(\d+)", timm_name)
    wanted = input_size(resolution, int(patch[1]) if patch else None, own)
    failure = None
    for size in dict.fromkeys((wanted, own)):
        try:
            encoder = _create(name, size, "meta")
            weights = None if state is None else _fitting(encoder.model, state, what)
            with _one_line(f"encoder {name} at {size} pixels", "take another --encoder or --resolution"):
                encoder.probe()
        except ValueError as error:
            failure = failure or error
            continue
        if size != wanted and os.environ.get("RANK", "0") == "0" and (name, size) not in _SAID:
            _SAID.add((name, size))
            print(f"note: encoder {name} sees every image at {size} pixels, the size it was trained on; "
                  f"it cannot be had at {wanted}", file=sys.stderr, flush=True)
        return encoder, weights
    raise failure


_SAID = set()  # notes, each given once


def _source(name, ckpt):
    """Where an encoder's weights come from, for an error."""
    return f"{ckpt} (weights for encoder {name})" if ckpt else f"weights of encoder {name}"


def _state(name, ckpt):
    """State dict of the file `ckpt`, or of the encoder's own weights."""
    if not ckpt:
        return _fetch(name, _resolve(name)[1])
    with _one_line(_source(name, ckpt), "give --encoder-ckpt a weights file of that encoder"):
        return _read_state(ckpt)


def build_encoder(name, resolution, ckpt=None, device="cpu"):
    """One frozen encoder; see `load_encoders`."""
    check_encoders(name, ckpt)
    if name.lower() == "hog":
        return HOG(resolution).to(device)
    state = _state(name, ckpt)  # before the network is made: a large one takes long
    sketch, weights = _outline(name, resolution, state, _source(name, ckpt))
    encoder = _create(name, sketch.size)
    encoder.model.load_state_dict(weights, strict=False)  # whole, but for num_batches_tracked in some
    encoder.grid, encoder.embed_dim, encoder.flops = sketch.grid, sketch.embed_dim, sketch.flops
    return encoder.to(device)


def load_encoders(names, ckpts=None, resolution=256, device="cpu"):
    """Comma-separated encoder names, with weights from disk where given -> list of frozen encoders.

    names: "dinov2-vit-b", "dinov2-vit-b,clip-vit-l", "tf_efficientnet_lite0", "hog". ckpts: None, or as many
    paths, comma-separated; an empty one ("a.pth,") is fetched from the encoder's own source. Each encoder has
    name, embed_dim and grid, and maps uint8 images [B, 3, R, R], R = resolution, to float32 tokens [B, grid *
    grid, embed_dim] without gradients. Raises ValueError for an unknown name, and for weights that are
    missing, of another architecture, or out of reach.
    """
    return [build_encoder(name, resolution, path, device) for name, path in _pairs(names, ckpts)]


def check_encoders(names, ckpts=None, resolution=None):
    """Raise what load_encoders would for names, files and, with `resolution`, shapes; downloads nothing.

    With `resolution`: a list of the encoders without weights (meta device): name, embed_dim, grid and flops
    are there.
    """
    encoders = []
    for name, path in _pairs(names, ckpts):
        hog = name.lower() == "hog"
        if hog and path:
            raise ValueError(f"encoder hog takes no weights, not {path}; leave its place empty")
        if not hog:
            _resolve(name)
        if path and not os.path.exists(path):
            raise ValueError(f"{path}: no such file (weights for encoder {name}); check --encoder-ckpt")
        if resolution and hog:
            encoders.append(HOG(resolution))
        elif resolution:
            state = _state(name, path) if path else None
            encoders.append(_outline(name, resolution, state, _source(name, path))[0])
    return encoders


def _pairs(names, ckpts):
    """[(name, path or None)] of the two comma-separated lists."""
    names = [name.strip() for name in names.split(",")]
    paths = [path.strip() or None for path in ckpts.split(",")] if ckpts else [None] * len(names)
    if len(paths) != len(names):
        raise ValueError(f"--encoder names {len(names)} encoders, --encoder-ckpt {len(paths)} files; "
                         "give one for each")
    return list(zip(names, paths))
