"""What the command lines share: how a flag is declared and checked, and the one way to fail."""
import argparse
import contextlib
import os
import sys
import time

import torch

from models.runtime.distributed import is_main, lost_process
from models.vae import VAE_models


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, and the script's docstring as it was written."""


def make_parser(doc):
    """ArgumentParser described by a script's docstring; a mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = fail
    return parser


def flag(group, name, default, help, *, type=None, **more):
    """group.add_argument(name) with the type of its default; False makes a switch, None takes a string."""
    if default is False:
        group.add_argument(name, action="store_true", help=help, **more)
    else:
        type = type or (str if default is None else default.__class__)
        group.add_argument(name, default=default, type=type, help=help, **more)


def check_range(args, low, high, *names):
    """Raise a one-line ValueError unless these settings are from `low` to `high`, both included."""
    for name in names:
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be from {low} to {high}")


def parse(parser, argv, presets):
    """Settings from the command line: explicit flags, over those of --preset, over the defaults."""
    parser.set_defaults(**presets.get(parser.parse_known_args(argv)[0].preset, {}))
    return parser.parse_args(argv)


def fail(error, code=2):
    """End the process as a user's mistake ends: one line on stderr, exit code 2.

    Of several processes the first speaks: the others usually found the same, and wait until torchrun ends
    them. One that is still there a while later has a mistake of its own to report.
    """
    if int(os.environ.get("RANK", 0)):
        time.sleep(3)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def autocast_type(name, device):
    """torch type that --mixed-precision `name` stands for; float32 means no autocast.

    auto is bfloat16 on a GPU, float16 on a GPU that cannot compute in it (V100, T4), float32 on the CPU.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if name == "fp16" and is_main():
            print("note: this GPU has no bfloat16, so --mixed-precision auto is fp16", flush=True)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


@contextlib.contextmanager
def one_line_errors(remedy="use smaller batches"):
    """Context in which the mistakes of a user or a machine end the process in one line.

    ValueError and OSError with exit code 2; full memory (`remedy` says what helps) and a lost process with 1.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error, code=1 if isinstance(error, ConnectionError) else 2)
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except (MemoryError, RuntimeError) as error:
        if (line := memory_full(error, remedy) or lost_process(error)) is None:
            raise
        fail(line, code=1)


def memory_full(error, remedy):
    """One line with `remedy` where an error says that memory ran out, on the host or a GPU; else None."""
    text = str(error).strip().split("\n")[0]
    # "ALLOC_FAILED" is how cuDNN and cuBLAS say it
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"memory is full{f' ({text[:150]})' if text else ''}; {remedy}"
    if "DataLoader worker" in text or "/torch_" in text:    # killed, or shared memory was full
        return f"a data worker ended ({text[:150]}); if memory or /dev/shm is full, lower --num-workers"
    return None


def training_flags(parser, presets):
    """Add the flags that both training scripts have; presets: {name: defaults}, of which --preset takes one.

    Returns the groups of the help page by name, for the scripts' own flags; where a default differs, the
    script changes it by parser.set_defaults.
    """
    names = ("data", "model", "losses", "optimisation", "run")
    groups = {name: parser.add_argument_group(name) for name in names}
    data, model, losses, optim, run = groups.values()

    flag(data, "--data-dir", "data/imagenet/train", "folder of class folders, .zip of one, .npz, or shapes")
    flag(data, "--resolution", 256, "side of the ADM centre crop in pixels")
    flag(data, "--hflip", False, "flip half of the images (the paper does not)")
    flag(data, "--skip-corrupt", False, "replace corrupt images by the next one and print their names")
    flag(data, "--num-workers", 8, "image decoding processes per training process")

    flag(model, "--vae", None, "VAE: downsampling factor and latent channels", choices=list(VAE_models))
    flag(model, "--disc-ckpt", "auto",
         "discriminator weights: a path, a hub name, none (from scratch), or auto")
    flag(model, "--latents-stats", None, "file with latents_scale and latents_bias, or a scale such as "
         "0.18215, for a VAE that has none")

    flag(losses, "--reconstruction-weight", 1.0, "weight of the distance between pixels")
    flag(losses, "--reconstruction-loss", "l1",
         "that distance: l1 in the released code, l2 in the paper's text", choices=["l1", "l2"])
    flag(losses, "--perceptual-weight", 1.0, "LPIPS weight; 0 needs no VGG weights")
    flag(losses, "--kl-weight", 1e-6, "KL weight")
    flag(losses, "--decoder-noise", 0.0, "noise on the latents that the decoder sees, in units of their "
         "standard deviation: a decoder that tolerates a diffusion model's errors (0.1 to 0.4)")
    flag(losses, "--disc-weight", 0.1, "GAN weight; 0 trains without a discriminator")
    flag(losses, "--disc-start", None, "steps in which the VAE does not see the discriminator; default: 0 if "
         "that is pretrained, else 5000", type=int)

    flag(optim, "--batch-size", 256, "global batch: all processes and accumulation steps together")
    flag(optim, "--gradient-accumulation-steps", 1, "micro-batches: same result, less memory, more time")
    flag(optim, "--max-train-steps", 400000, "steps")
    flag(optim, "--learning-rate", 1e-4, "constant")
    flag(optim, "--disc-learning-rate", 1e-4, "of the discriminator, constant")
    flag(optim, "--adam-beta1", 0.9, "AdamW")
    flag(optim, "--adam-beta2", 0.999, "AdamW")
    flag(optim, "--adam-weight-decay", 0.0, "AdamW")
    flag(optim, "--adam-epsilon", 1e-8, "AdamW")
    flag(optim, "--max-grad-norm", 1.0, "clip each network's gradient to this norm")
    flag(optim, "--ema-decay", 0.9999, "of the average of the weights")
    flag(optim, "--mixed-precision", "auto",
         "autocast type; auto: bf16 on a GPU (fp16 where it has no bf16), no on a CPU",
         choices=["auto", "bf16", "fp16", "no"])
    optim.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile each block, convolutions in channels_last; default: on a GPU")
    flag(optim, "--grad-checkpoint", False, "recompute activations: less memory, more arithmetic")
    flag(optim, "--seed", 0, "of weights, data order and every draw")

    flag(run, "--preset", None, "set of defaults; explicit flags win", choices=list(presets))
    flag(run, "--output-dir", "exps", "parent of the run folders")
    flag(run, "--exp-name", None, "name of the run folder; default: from what is trained")
    flag(run, "--checkpointing-steps", 50000, "steps between checkpoints; one is always written at the end")
    flag(run, "--keep-checkpoints", 0, "newest checkpoints kept; 0 keeps all")
    flag(run, "--sampling-steps", 10000, "steps between picture grids; 0 for none")
    flag(run, "--log-every", 100, "steps between log lines")
    flag(run, "--report-to", "none", "also log to", choices=["none", "tensorboard", "wandb"])
    flag(run, "--dry-run", False, "do all that can fail before the first step, write nothing, and stop")
    return groups
