"""Sample images from a checkpoint: the same images on one device or on many, ready for evaluation.

One GPU, or the CPU:
    python sample_ddp.py --ckpt exps/run/checkpoints/0400000.pt --npz samples/run.npz
The paper's guided numbers on the 8 GPUs of one machine:
    torchrun --nproc-per-node 8 sample_ddp.py --ckpt exps/run/checkpoints/0400000.pt --num-fid-samples 50000
        \\ --mode sde --num-steps 250 --cfg-scale 2.2 --guidance-low 0.0 --guidance-high 0.65
A look at classes 207 and 360:
    python sample_ddp.py --exp-path exps/run --num-fid-samples 16 --classes 207,360

Writes NAME.npz (arr_0 uint8 [N, H, W, 3], arr_1 int64 labels [N], protocol: JSON text), NAME.json (the
protocol) and NAME.png (a grid of the first samples).

Sample i is a function of the seed and i alone. Finished samples wait in NAME.shards/, 64 in a file, until the
.npz is written: after SIGTERM, Ctrl-C or a kill the same command resumes, with any number of processes. Nodes
of one torchrun must share the folder.
"""
import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from models import samplers
from models.losses import interpolant
from models.runtime import cli, data, distributed, files, log, pictures, weights

SHARD = 64      # samples in a file that waits for the .npz, and in the grid
CPU_BLOCK = 4   # on the CPU samples 4k .. 4k+3 are always computed together, see make_sampler
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    model, what, solver, output, running = (parser.add_argument_group(name) for name in (
        "checkpoint", "samples", "solver and guidance", "output", "running"))
    flag = cli.flag
    flag(model, "--ckpt", None, "training checkpoint, ours or a released one")
    flag(model, "--exp-path", None, "instead of --ckpt: a run folder, for its newest checkpoint")
    flag(model, "--train-steps", None, "with --exp-path: the checkpoint of this step instead", type=int)
    flag(model, "--vae-ckpt", None, "VAE to decode with instead of the checkpoint's: a path or a hub name")

    flag(what, "--num-fid-samples", 50000, "samples in all")
    flag(what, "--global-seed", 0, "seed of labels and noise")
    flag(what, "--label-sampling", "random", "equal: the same number per class", choices=["random", "equal"])
    flag(what, "--classes", None, "comma-separated class numbers, in turn, instead of --label-sampling",
         type=lambda text: [int(number) for number in text.split(",")])

    flag(solver, "--mode", "sde", "Euler-Maruyama on the SDE, or Euler on the ODE", choices=["ode", "sde"])
    flag(solver, "--heun", False, "with --mode ode: Heun's method instead of Euler's")
    flag(solver, "--num-steps", 250, "steps of the solver")
    flag(solver, "--cfg-scale", 1.0, "classifier-free guidance; 1 is none")
    flag(solver, "--guidance-low", 0.0, "guide at times LOW <= t <= HIGH only; t = 1 is noise")
    flag(solver, "--guidance-high", 1.0, "see --guidance-low")

    flag(output, "--npz", None, "output, whose name the others get; default: samples/RUN-STEP.npz")

    flag(running, "--pproc-batch-size", SHARD, f"samples per process and batch, up to {SHARD}")
    flag(running, "--mixed-precision", "auto", "type of the network; auto: bf16 on a GPU, no on a CPU; no: "
         "float32 without TF32 everywhere", choices=["auto", *PRECISIONS.values()])
    flag(running, "--compile", False, "torch.compile the network")
    return parser.parse_args(argv)


def check_args(args):
    """Raise ValueError or OSError for settings that no checkpoint can satisfy.

    Fills in args.solver and args.ckpt from what was given.
    """
    cli.check_range(args, 1, SHARD, "pproc_batch_size")
    cli.check_range(args, 1, 10**8, "num_fid_samples", "num_steps", "cfg_scale")
    samplers.check_guidance(args.cfg_scale, args.guidance_low, args.guidance_high)
    if args.mode == "sde" and args.heun:
        raise ValueError("--heun solves the ODE; give --mode ode with it")
    args.solver = "euler-maruyama" if args.mode == "sde" else "heun" if args.heun else "euler"
    if (args.ckpt is None) == (args.exp_path is None) or (args.ckpt and args.train_steps is not None):
        raise ValueError("give --ckpt FILE or --exp-path FOLDER, the latter also with --train-steps STEP")
    if args.exp_path is not None:
        folder = os.path.join(args.exp_path, "checkpoints")
        steps = files.checkpoint_steps(folder) if args.train_steps is None else [args.train_steps]
        if not steps:
            raise FileNotFoundError(f"{folder}: no checkpoints there")
        args.ckpt = os.path.join(folder, f"{steps[-1]:07d}.pt")
    if args.npz is not None and not args.npz.endswith(".npz"):
        raise ValueError(f"--npz {args.npz} must end in .npz")


# ---------------------------------------------------------------- the samples

def integrate(args, velocity, noise, path_type):
    """Normalised latents of a batch, [B, C, h, w] float64, by the solver of the flags."""
    times = samplers.time_grid(args.num_steps, args.mode)
    if args.mode == "sde":
        path = partial(interpolant, path_type=path_type)
        return samplers.euler_maruyama(velocity, noise(), times, noise, path)
    return (samplers.heun if args.heun else samplers.euler)(velocity, noise(), times)


def make_sampler(args, sit, vae, labels, path_type, low, device):
    """Function (first, end) -> samples first .. end - 1, numpy uint8 [end - first, H, W, 3].

    `first` is a multiple of SHARD; labels [N + 2 SHARD], since a last batch may reach beyond; `low` is the
    type of the network. The function raises ValueError for samples that are not finite.

    On the CPU both the shape of a batch and the number of threads in an operation change the last bits of
    float32 results. So batches of CPU_BLOCK samples are computed there on a thread each: the images have
    equal bits for any batch size and any number of processes.
    """
    sit, vae = sit.to(device), vae.to(device)
    scale, bias = sit.latents_stats()
    model = torch.compile(sit, dynamic=False) if args.compile else sit
    shape = (sit.in_channels, sit.input_size, sit.input_size)
    torch.backends.cudnn.allow_tf32 = low != torch.float32
    size, each = args.pproc_batch_size, map
    if device.type == "cpu":
        threads = 1 if args.compile else max(1, min(torch.get_num_threads(), size // CPU_BLOCK))
        torch.set_num_threads(1)
        size, each = CPU_BLOCK, ThreadPoolExecutor(threads).map

    @torch.inference_mode()
    def sample_batch(first):
        generators = samplers.sample_generators(args.global_seed, range(first, first + size))

        def noise():
            drawn = samplers.draw_noise(generators, shape)
            return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn

        y = labels[first:first + size].to(device)
        velocity = samplers.guided(lambda x, t, y: model(x, t, y)[0], y, sit.num_classes, args.cfg_scale,
                                   args.guidance_low, args.guidance_high)
        # one autocast region for all steps: the weights are cast to half precision once, not at every step
        with torch.autocast(device.type, dtype=low, enabled=low != torch.float32):
            x = integrate(args, velocity, noise, path_type)
        # decoded outside autocast: bf16 steps near 1 are as coarse as those of a uint8 image
        images = samplers.decode(vae.decode, x.float(), scale, bias)
        if not images.isfinite().all():
            raise ValueError(f"samples {first} to {first + size - 1} are not finite; try another checkpoint "
                             "or --mixed-precision no")
        return samplers.truncate_to_uint8(images).cpu().numpy()

    def sample(first, end):
        # A short last batch is computed at full size too: one shape, one compilation.
        return np.concatenate(list(each(sample_batch, range(first, end, size))))[:end - first]

    return sample


# ---------------------------------------------------------------- files

def make_protocol(args, sit, vae, settings, vae_source, low):
    """What the samples depend on, a dict for the .npz, the shards and the JSON. No paths: machines differ."""
    return {
        "checkpoint": os.path.basename(args.ckpt), "checkpoint_sha256": files.sha256(args.ckpt),
        "train_steps": settings["steps"], "model": settings["model"], "weights": "ema",
        "num_classes": sit.num_classes,
        "vae": os.path.basename(vae_source.rstrip("/")), "vae_sha256": files.state_digest(vae),
        "resolution": sit.input_size * vae.downsample, "num_fid_samples": args.num_fid_samples,
        "global_seed": args.global_seed, "label_sampling": "classes" if args.classes else args.label_sampling,
        "classes": args.classes, "mode": args.mode, "solver": args.solver, "num_steps": args.num_steps,
        "path_type": settings.get("path_type") or "linear",
        "cfg_scale": args.cfg_scale, "guidance_low": args.guidance_low, "guidance_high": args.guidance_high,
        "mixed_precision": PRECISIONS[low], "torch": torch.__version__,
    }


def check_protocol(found, protocol, where):
    """Raise ValueError unless `found` agrees with the protocol of this run.

    Names of files and the version of torch may differ. Entries of earlier versions of this code that are no
    longer in the protocol are ignored.
    """
    for key, value in protocol.items():
        if key not in ("checkpoint", "vae", "torch") and found.get(key) != value:
            raise ValueError(f"{where}: exists, made with {key} {found.get(key)}, this run has {value}; "
                             "move it away, or give another --npz")


def claim_output(args, npz, shards, protocol):
    """Raise ValueError or OSError unless the outputs can be written and are not those of other samples.

    Returns the lock of the folder `shards`, an open file.
    """
    stem = npz.removesuffix(".npz")
    for path in (npz, f"{stem}.json", f"{stem}.png"):
        files.check_writable(path, [args.ckpt])
    if os.path.exists(npz):
        check_protocol(data.open_images(npz, labelled=False).protocol, protocol, npz)
    lock = files.lock(shards)
    files.remove_temporaries(shards)
    path = os.path.join(shards, "protocol.json")
    if os.path.exists(path):
        check_protocol(files.load_json(path), protocol, shards)
    files.save_json(protocol, path)
    return lock


def shard_path(shards, k):
    """The file of the samples SHARD * k .. SHARD * (k + 1) - 1."""
    return os.path.join(shards, f"{k:06d}.npz")


def sample_missing(sample, npz, shards, number):
    """Write the shards that are missing, one per process at a time; none if there is the .npz."""
    missing = [k for k in range(-(-number // SHARD)) if not os.path.exists(shard_path(shards, k))]
    # As rank 0 finds it: another process may come when the first shards have been written.
    missing = distributed.gather([] if os.path.exists(npz) else missing)[0]
    update, processes = log.progress("samples", number), distributed.world_size()
    for begin in range(0, len(missing), processes):
        update(max(0, number - SHARD * len(missing[begin:])))
        mine = begin + distributed.rank()
        for k in missing[mine:mine + 1]:    # in the last round some processes have none
            images = sample(SHARD * k, min(SHARD * (k + 1), number))
            files.write_npz(shard_path(shards, k), [images], images.shape)
        distributed.barrier()


def write_outputs(npz, shards, labels, protocol):
    """The .npz from the shards, with one of them in memory at a time; from the .npz all other files."""
    stem, number, size = npz.removesuffix(".npz"), len(labels), protocol["resolution"]
    if not os.path.exists(npz):
        whole = os.path.join(shards, "whole.npz")   # half of it, after a kill, lies where it is removed
        rows = (np.load(shard_path(shards, k))["arr_0"] for k in range(-(-number // SHARD)))
        files.write_npz(whole, rows, (number, size, size, 3), arr_1=labels, protocol=json.dumps(protocol))
        os.replace(whole, npz)
    images = data.open_images(npz).images
    files.save_json(protocol, f"{stem}.json")
    pictures.write_png(f"{stem}.png", pictures.label_grid(images[:SHARD], labels[:SHARD]))
    shutil.rmtree(shards, ignore_errors=True)
    print(f"{npz}: {number} samples, with {stem}.json and {stem}.png")


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    with cli.one_line_errors("use a smaller --pproc-batch-size"):
        check_args(args)
        _, _, device = distributed.init()
        with distributed.main_first():      # a VAE of the hub is fetched once
            sit, vae, settings, vae_source = weights.load(args.ckpt, args.vae_ckpt)
        if args.cfg_scale > 1 and len(sit.y_embedder.embedding_table.weight) == sit.num_classes:
            raise ValueError(f"{args.ckpt}: trained without label dropout, has no null class; use "
                             "--cfg-scale 1")
        low = cli.autocast_type(args.mixed_precision, device)
        protocol = make_protocol(args, sit, vae, settings, vae_source, low)
        name, step = settings.get("exp_name") or "run", os.path.basename(args.ckpt).removesuffix(".pt")
        npz, number = args.npz or f"samples/{name}-{step}.npz", args.num_fid_samples
        shards = npz.removesuffix(".npz") + ".shards"
        # Ranks with another seed or checkpoint would mix two sets of samples without a word.
        distributed.check_same(protocol | {"--npz": npz})
        labels = samplers.sample_labels(args.global_seed, range(number + 2 * SHARD), sit.num_classes,
                                        "equal" if args.classes else args.label_sampling, args.classes)
        sample = make_sampler(args, sit, vae, labels, protocol["path_type"], low, device)
        main_process = distributed.is_main()
        with claim_output(args, npz, shards, protocol) if main_process else contextlib.nullcontext():
            sample_missing(sample, npz, shards, number)
            if main_process:
                write_outputs(npz, shards, labels[:number].numpy(), protocol)
        distributed.shut_down()


if __name__ == "__main__":
    main()
