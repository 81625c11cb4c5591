"""What the four command lines share: how a flag is declared and checked, and the one way to fail.

Imports no torch, so that --help and a mistyped flag answer at once.
"""
import argparse
import math
import os
import signal
import sys
import time

# The names that models/sit.py and models/vae.py know (a test compares); to ask them would import torch.
SITS = [f"SiT-{size}/{patch}" for size in ("XL", "L", "B", "S", "Ti") for patch in (1, 2, 4, 8)]
VAES = ["f8d4", "f16d32", "f8d16", "f4d4", "f4d16"]

# Flags of the reference's scripts that have another name here, or none: what a command that uses one is told.
# The README's page for those who come from there has the same words (a test compares).
REFERENCE_FLAGS = {
    "--enc-type": "use --encoder, which knows the same names",
    "--disc-pretrained-ckpt": "use --disc-ckpt",
    "--loss-cfg-path": "use --reconstruction-loss, --reconstruction-weight, --perceptual-weight, "
                       "--kl-weight, --disc-weight and --disc-start; their defaults are those of its "
                       "l1_lpips_kl_gan.yaml",
    "--epochs": "use --max-train-steps; an epoch of ImageNet has 5,004 steps of 256 images",
    "--resume-step": "use --resume, by default from the run folder's newest checkpoint",
    "--continue-train-exp-dir": "use --resume FILE to go on from a checkpoint, --init-from FILE to start "
                                "from its weights",
    "--wandb-history-path": "leave it out, a resumed run goes on in its own curves",
    "--logging-dir": "leave it out, logs lie in the run folder, OUTPUT_DIR/EXP_NAME",
    "--prediction": "leave it out, the networks predict velocity",
    "--fused-attn": "leave it out, attention is always torch's scaled_dot_product_attention",
    "--allow-tf32": "leave it out, training uses TF32 wherever it computes in float32",
    "--vae-latents-name": "use --latent-cache FOLDER, filled by the first run, and --latents-stats for "
                          "statistics of your own",
    "--tf32": "leave it out, --mixed-precision no means float32 without TF32, all others allow it",
    "--legacy": "leave it out, checkpoints of every released kind load as they are",
    "--projector-embed-dims": "leave it out, sampling needs no alignment heads",
    "--model": "leave it out, the checkpoint says it",
    "--num-classes": "leave it out, the checkpoint says it",
    "--encoder-depth": "leave it out, sampling needs no alignment heads",
    "--resolution": "leave it out, the checkpoint says it",
    "--qk-norm": "leave it out, the checkpoint says it",
    "--vae": "leave it out, the checkpoint says it; --vae-ckpt decodes with another one",
    "--vae-arch": "use --vae",
    "--vae-ckpt-path": "use --vae-ckpt",
    "--imagenet-path": "use --data-dir with the photos themselves, or with the .zip that python -m "
                       "models.runtime.prepare FOLDER OUT.zip makes of them",
    "--exp-path": "use --ckpt FILE with --export FOLDER --format compvis",
    "--train-steps": "name the checkpoint file itself",
    "--pproc-batch-size": "use --batch-size",
    "--no-qk-norm": "leave it out, it is off unless --qk-norm is given",
    "--no-compile": "leave it out, it is off unless --compile is given",
    "--no-heun": "leave it out, it is off unless --heun is given",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, and the script's docstring as it was written."""


def make_parser(doc):
    """ArgumentParser described by a script's docstring; a mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(explain(message))
    return parser


def explain(message):
    """argparse's message; for unknown flags that the reference's scripts have, what to do here instead."""
    unknown = "unrecognized arguments: "
    names = [word.split("=")[0] for word in message.removeprefix(unknown).split()]
    names = [name if name in REFERENCE_FLAGS else name.replace("--no-", "--", 1) for name in names]
    answers = [f"{name} is the reference's: {REFERENCE_FLAGS[name]}"
               for name in names if name in REFERENCE_FLAGS]
    return "; ".join(answers) if answers and message.startswith(unknown) else message


def flag(group, name, default, help, *, least=0, above=None, most=None, type=None, **more):
    """group.add_argument(name) with the type of its default.

    False makes a switch; None takes a string unless `type` is given. A number must be finite and at least
    `least`, or above `above` where that is given, and at most `most`.
    """
    if default is False:
        group.add_argument(name, default=False, action="store_true", help=help, **more)
        return
    kind = type or (str if default is None else default.__class__)
    if kind in (int, float):
        kind = number(kind, least, above, most)
    group.add_argument(name, default=default, type=kind, help=help, **more)


def number(kind, least=0, above=None, most=None):
    """Function from text to a number of type `kind` within the bounds.

    argparse turns what it raises into one line.
    """
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no {whole}number") from None
        low = f"above {above}" if above is not None else f"at least {least}"
        too_low = value <= above if above is not None else value < least
        if not math.isfinite(value) or too_low or (most is not None and value > most):
            limits = low if most is None else f"{low} and at most {most}"
            raise argparse.ArgumentTypeError(f"{text} must be a finite number, {limits}")
        return value
    return convert


def given(parser, argv=None):
    """Names of the settings that the command line itself states, whatever their defaults are."""
    unset = object()
    stated = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), unset))
    return {name for name, value in vars(parser.parse_args(argv, stated)).items() if value is not unset}


def fail(error, code=2):
    """End the process as a user's mistake ends: one line on stderr, exit code 2.

    Of several processes the first speaks: the others usually found the same, and wait until torchrun ends
    them. One that is still there a while later has a mistake of its own to report.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(10)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def answer_early(parse_args):
    """Look at the flags before torch is imported, which takes seconds: --help and mistakes answer at once.

    Ctrl-C meanwhile, and until a script watches for it, just ends the process: nothing has begun.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parse_args()


def memory_full(error, remedy):
    """One line with `remedy` where an error says that memory ran out, on the host or a GPU; else None."""
    text = str(error).strip().split("\n")[0]
    # "ALLOC_FAILED" is how cuDNN and cuBLAS say it
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"memory is full{f' ({text[:150]})' if text else ''}; {remedy}"
    return None


def training_flags(parser):
    """Add the flags that both training scripts have.

    Returns the groups of the help page by name, for the scripts' own flags; where a default differs, the
    script changes it by parser.set_defaults.
    """
    names = ("data", "model", "losses", "optimisation", "run")
    groups = {name: parser.add_argument_group(name) for name in names}
    data, model, losses, optim, run = groups.values()

    flag(data, "--data-dir", "data/imagenet/train",
         "folder of class folders, a .zip of one, or 'shapes' (built in, drawn)")
    flag(data, "--resolution", 256, "side of the ADM centre crop in pixels", above=0, most=2**14)
    flag(data, "--hflip", False, "flip half of the images (the paper does not)")
    flag(data, "--skip-corrupt", False, "replace files that are no images by the next one and count them")
    flag(data, "--num-workers", 8, "image decoding processes per training process", most=1024)

    flag(model, "--vae", None, "VAE: downsampling factor and latent channels", choices=VAES)
    flag(model, "--disc-ckpt", "auto",
         "discriminator weights: a path, a hub name, none (from scratch), or auto")
    flag(model, "--latents-stats", None,
         "file with latents_scale and latents_bias, where the VAE comes without")
    flag(model, "--encoder", "dinov2-vit-b",
         "target encoder(s), comma-separated: reference names, timm names, or hog")
    flag(model, "--encoder-ckpt", None, "encoder weights on disk, comma-separated in the order of --encoder")

    flag(losses, "--reconstruction-weight", 1.0, "weight of the pixels' distance")
    flag(losses, "--reconstruction-loss", "l1",
         "that distance: the released code's, or the paper's text's", choices=["l1", "l2"])
    flag(losses, "--perceptual-weight", 1.0, "LPIPS weight; 0 needs no VGG weights")
    flag(losses, "--kl-weight", 1e-6, "KL weight")
    flag(losses, "--disc-weight", 0.1, "GAN weight; 0 trains without a discriminator")
    flag(losses, "--disc-start", None, type=int, help="steps in which the VAE does not see the "
         "discriminator; default: 0 if that is pretrained, else 5000")

    flag(optim, "--batch-size", 256, "global batch: all processes and accumulation steps together", above=0,
         most=10**6)
    flag(optim, "--gradient-accumulation-steps", 1,
         "micro-batches per process: same result, less memory, more time", above=0)
    flag(optim, "--max-train-steps", 400000, "steps", above=0, most=10**9)
    flag(optim, "--learning-rate", 1e-4, "constant", above=0.0)
    flag(optim, "--disc-learning-rate", 1e-4, "of the discriminator, constant", above=0.0)
    flag(optim, "--adam-beta1", 0.9, "AdamW", most=1.0)
    flag(optim, "--adam-beta2", 0.999, "AdamW", most=1.0)
    flag(optim, "--adam-weight-decay", 0.0, "AdamW")
    flag(optim, "--adam-epsilon", 1e-8, "AdamW", above=0.0)
    flag(optim, "--max-grad-norm", 1.0, "clip each network's gradient to this norm", above=0.0)
    flag(optim, "--ema-decay", 0.9999, "of the average of the weights", most=1.0)
    flag(optim, "--mixed-precision", "auto", "autocast type; auto: bf16 on a GPU, no on a CPU",
         choices=["auto", "bf16", "fp16", "no"])
    optim.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile each block, convolutions in channels_last; default: on a GPU")
    flag(optim, "--grad-checkpoint", False,
         "recompute activations in the backward pass: less memory, more arithmetic")
    flag(optim, "--shard-optimizer", False, "share AdamW's moments out among the processes: less memory, "
         "same result")
    flag(optim, "--seed", 0, "of weights, data order and every draw", most=2**32 - 1)

    flag(run, "--preset", None, "set of defaults; explicit flags win")
    flag(run, "--output-dir", "exps", "parent of the run folders")
    flag(run, "--exp-name", None, "name of the run folder; default: from what is trained")
    flag(run, "--checkpointing-steps", 50000,
         "steps between checkpoints; one is always written at the end", above=0)
    flag(run, "--keep-checkpoints", 0, "newest checkpoints kept; 0 keeps all")
    flag(run, "--milestones-every", 100000, "checkpoints at multiples of this step are kept whatever "
         "--keep-checkpoints says; 0 for none")
    flag(run, "--sampling-steps", 10000, "steps between picture grids; 0 for none")
    flag(run, "--log-every", 100, "steps between log lines", above=0)
    flag(run, "--resume", "auto",
         "auto (newest checkpoint of the run folder, if any), none, or a checkpoint file")
    flag(run, "--report-to", "none", "also log to", choices=["none", "tensorboard", "wandb"])
    flag(run, "--dry-run", False, "do all that can fail before the first step, write nothing, and stop")
    return groups


def parse(parser, argv, presets):
    """Settings from the command line: explicit flags, over those of --preset, over the defaults."""
    name = parser.parse_known_args(argv)[0].preset
    if name is not None and name not in presets:
        fail(f"--preset {name}: known are {', '.join(presets)}")
    parser.set_defaults(**presets.get(name, {}))
    return parser.parse_args(argv)
