"""Frozen vision encoders, whose patch tokens the alignment loss aims at (REPA, arXiv 2410.06940).

Needs torch and timm (and safetensors, which comes with timm). Imports nothing of this project, so the file
can be copied alone.

    encoders = load_encoders("dinov2-vit-b", resolution=256, device=device)  # or "dinov2-vit-b,clip-vit-l"
    targets = [encoder(images) for encoder in encoders]
    # uint8 [B, 3, R, R] -> float32 [B, T, D], T a square grid

A name is one of `ENCODERS` (the reference's names), any model name of timm, or `hog`, which needs no weights.

What an encoder sees (`input_size`): the image at its own size R, or 7/8 of it for 14-pixel patches, so that a
256-pixel image gives a 16x16 grid either way. An image smaller than the encoder was trained on is enlarged to
that size (256, or 224 for 14-pixel patches, at most): a 32-pixel image goes to tf_efficientnet_lite0 at 224.
timm resamples the position embeddings to that size when the weights are loaded.

Weights come from timm's own source of that name, through the hub's cache (HF_HOME) or torch hub's
(TORCH_HOME), or from a file. No code in a file is run.

Mean and std are those the weights were trained with, as timm lists them: CLIP's own, 0.5/0.5 for SigLIP,
ImageNet's for DINO, DINOv2, DINOv3, MAE and I-JEPA; the reference uses the same. Tokens are the output of
the network's last norm (`x_norm_patchtokens` in DINOv2), without class and register tokens. For CLIP and MAE
under the reference's names they are the input of that norm, because the reference aligns with that
(`BEFORE_LAST_NORM`; the two differ by about half their length). MoCo v3's ViT-B, which timm does
not have, is vit_base_patch16_224.dino with the file vit-b-300ep.pth.tar; its ViT-S has other heads.

Errors that a user can cause are ValueError with a message of one line.
"""

import math
import re
import sys

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

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
}
BEFORE_LAST_NORM = "clip-vit-l", "mae-vit-b", "mae-vit-l"
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


# ---------------------------------------------------------------- the encoders

class TimmEncoder(nn.Module):
    """A frozen timm network as a token extractor.

    `model` needs timm's `forward_features`; `size` is the side in pixels that it sees; `mean` and `std` (3
    numbers each) are those of its training, for images in [0, 1]. `last_norm`: whether tokens pass the
    network's last norm. Attributes: name, size, embed_dim, grid (tokens along a side). Raises ValueError for
    a network that does not give a square grid of tokens.
    """

    def __init__(self, model, name, size, mean, std, last_norm=True):
        super().__init__()
        self.name, self.size, self.last_norm = name, size, last_norm
        self.model = model.eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # 1.6 times as fast for EfficientNet-Lite0 on a CPU
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        # a blank image: a network without a grid of tokens is noticed before training starts
        tokens = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.embed_dim, self.grid = tokens.shape[2], math.isqrt(tokens.shape[1])

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
            raise ValueError("its features are not a grid of tokens")
        x = x[:, getattr(self.model, "num_prefix_tokens", 0):]      # class and register tokens come first
        if math.isqrt(x.shape[1]) ** 2 != x.shape[1]:
            raise ValueError(f"its {x.shape[1]} tokens are not a square grid")
        return x


class HOG(nn.Module):
    """Dense histograms of oriented gradients as patch tokens: a target that needs no weights.

    After MaskFeat (arXiv 2112.09133): per colour channel, 9 unsigned orientation bins, 2x2 cells per patch,
    so 108 numbers. A pixel votes with its gradient magnitude for the two nearest bins; a cell averages the
    votes of a window twice its side. A patch is divided by sqrt(|v|^2 + EPS^2), and EPS over the same root is
    appended as the 109th number. So every token has length 1 and a flat patch has a definite direction, where
    the plain histogram would be zero (which has no cosine) or noise scaled up to length 1. EPS is in units
    of intensity (range [0, 1]) per pixel. Patches are 16 pixels for images of 256 and more, smaller below, 4
    at least: 32 pixels give an 8x8 grid. Where such patches do not tile the image, smaller ones do. They are
    always a multiple of 4, so that a cell's window has a centre.
    """

    BINS, EPS = 9, 0.02

    def __init__(self, resolution):
        super().__init__()
        if resolution % 4 or resolution < 8:
            raise ValueError(f"encoder hog needs a --resolution divisible by 4, 8 at least, not {resolution}")
        largest = min(16, max(4, resolution // 32 * 2))
        self.patch = max(patch for patch in (4, 8, 12, 16) if patch <= largest and resolution % patch == 0)
        self.name, self.grid = "hog", resolution // self.patch
        self.embed_dim = 3 * 4 * self.BINS + 1

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
            v = torch.cat([v, torch.full_like(v[..., :1], self.EPS)], -1)
            return F.normalize(v, dim=-1)


def input_size(resolution, patch, own):
    """Side in pixels an encoder sees for images of `resolution`; `patch` None for a convolutional network,
    `own` the side it was trained on. The rule is in the module's docstring."""
    size, floor = (resolution * 7 // 8, 224) if patch == 14 else (resolution, 256)
    size = max(size, min(own, floor))
    return max(1, round(size / patch)) * patch if patch else size


# ---------------------------------------------------------------- weights

def unwrap(state):
    """The network's tensors by their own names, without what training scripts put around them."""
    for key in ("state_dict", "model", "teacher", "encoder"):   # "teacher": DINO; "encoder": I-JEPA
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    state = {k: v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, dict) else {}
    # "base_encoder.": MoCo v3
    for prefix in ("_orig_mod.", "module.", "base_encoder.", "backbone.", "model.", "timm_model."):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    return state


def load_weights(model, state):
    """Load a file's content into a timm network by timm's own converter of names and positions.

    timm's loader leaves tensors that a file lacks at their random initial values. Here all of the network
    must be there, as dense floating point, and no further blocks or register tokens; the file may contain
    more outside of it (classifier, decoder, text tower). Raises ValueError naming the first tensor that
    differs.
    """
    own, state = model.state_dict(), unwrap(state)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(dict(state), model) if convert else state
    except Exception:   # it expects its architecture's names; where they are missing, the list below says so
        pass
    trunk = {"reg_token", *(k.split(".")[0] for k in own)} - {"head"}    # some have their classifier there
    differs = [f"{k} is missing" for k in own if k not in state and not k.endswith("num_batches_tracked")]
    differs += [f"{k} is unknown" for k in state if k not in own and k.split(".")[0] in trunk]
    state = {k: v for k, v in state.items() if k in own}
    differs += [f"{k} is {v.dtype} {list(v.shape)}, not {own[k].dtype} {list(own[k].shape)}"
                for k, v in state.items() if v.shape != own[k].shape or v.layout != torch.strided or v.is_meta
                or own[k].is_floating_point() != (v.dtype in FLOATS)]
    if differs:
        raise ValueError(f"weights of another architecture, {len(differs)} tensors differ: {differs[0]}")
    model.load_state_dict(state, strict=False)  # num_batches_tracked may be missing


# ---------------------------------------------------------------- by name

def timm_config(name):
    """timm's name for encoder `name` and its pretrained_cfg; ValueError if unknown."""
    timm_name = ENCODERS.get(name.lower(), name)
    if timm_name not in (*timm.list_models(), *timm.list_pretrained()):     # without and with a tag
        raise ValueError(f"unknown encoder {name!r}: known are {', '.join(ENCODERS)}, hog, and any timm name")
    return timm_name, timm.models.get_pretrained_cfg(timm_name)


def build_encoder(name, resolution, ckpt=None, device="cpu"):
    """One frozen encoder; see `load_encoders`."""
    if name.lower() == "hog":
        return HOG(resolution).to(device)
    timm_name, cfg = timm_config(name)
    patch = re.search(r"_(?:patch|p)(\d+)", timm_name)
    size = input_size(resolution, int(patch[1]) if patch else None, cfg.input_size[-1])
    # A network with a table of positions is built for its size; a convolutional one takes any.
    options = {"img_size": size} if cfg.fixed_input_size else {}
    try:
        model = timm.create_model(timm_name, pretrained=not ckpt, num_classes=0, **options)
        if ckpt:    # no code in it is run
            load_weights(model, load_file(ckpt) if ckpt.endswith(".safetensors") else
                         torch.load(ckpt, map_location="cpu", weights_only=True))
        encoder = TimmEncoder(model, name, size, cfg.mean, cfg.std, name.lower() not in BEFORE_LAST_NORM)
    except Exception as error:      # timm, the hub, torch and safetensors raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200]
        remedy = (f"give --encoder-ckpt a file of {timm_name}'s weights" if ckpt else
                  "give its weights with --encoder-ckpt PATH, or take --encoder hog; without a network "
                  "HF_HUB_OFFLINE=1 saves the wait")
        where = f"encoder {name} at {size} pixels" + (f", {ckpt}" if ckpt else "")
        raise ValueError(f"{where}: {reason}; {remedy}") from error
    return encoder.to(device)


def load_encoders(names, ckpts=None, resolution=256, device="cpu"):
    """Comma-separated encoder names, with weights from disk where given -> list of frozen encoders.

    names: "dinov2-vit-b", "dinov2-vit-b,clip-vit-l", "tf_efficientnet_lite0", "hog". ckpts: None, or as many
    paths, comma-separated; an empty one ("a.pth,") is fetched from the encoder's own source. Each encoder has
    name, embed_dim and grid, and maps uint8 images [B, 3, R, R], R = resolution, to float32 tokens [B, grid *
    grid, embed_dim] without gradients. Raises ValueError for an unknown name, and for weights that are
    missing, of another architecture, or out of reach.
    """
    names = [name.strip() for name in names.split(",")]
    paths = [path.strip() for path in ckpts.split(",")] if ckpts else [None] * len(names)
    if len(paths) != len(names):
        raise ValueError(f"--encoder names {len(names)} encoders, --encoder-ckpt {len(paths)} files; "
                         "give one for each")
    return [build_encoder(name, resolution, path, device) for name, path in zip(names, paths)]
