"""Sample images from a checkpoint: the same images on one device or a hundred, ready for evaluation.

One GPU, or the CPU:
    python sample_ddp.py --ckpt exps/run/checkpoints/0400000.pt --npz samples/run.npz
The paper's guided numbers on the 8 GPUs of one machine:
    torchrun --nproc-per-node 8 sample_ddp.py --ckpt exps/run/checkpoints/0400000.pt --num-fid-samples 50000 \
        --mode sde --num-steps 250 --cfg-scale 2.2 --guidance-low 0.0 --guidance-high 0.65
A look at classes 207 and 360:
    python sample_ddp.py --exp-path exps/run --grid-only --num-fid-samples 16 --classes 207,360

Writes NAME.npz (arr_0 uint8 [N, H, W, 3], arr_1 int64 labels [N], protocol: JSON text), NAME.json (the protocol, and
how the run went), NAME.png (a grid of the first samples) and with --png NAME/000000.png, NAME/000001.png ...

Sample i is a function of the seed and i alone. Finished samples wait in NAME.shards/ until the .npz is whole: the same
command run again continues a stopped run. Two machines make a half each with --range 0:25000 and --range 25000:50000;
copy the shards of both into one folder and run the command there without --range.
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from models import samplers
from models.losses import interpolant
from models.runtime import distributed, files, images, weights
from models.runtime.images import label_grid

GRID = 64      # samples in the grid
CPU_BLOCK = 4  # on the CPU samples 4k .. 4k+3 are always computed together, see cpu_sampler


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("--ckpt", help="training checkpoint, ours or a released one")
    add("--exp-path", help="instead of --ckpt: a run folder, its checkpoint --train-steps or the newest")
    add("--train-steps", type=int, help="with --exp-path: the step of the checkpoint")
    add("--vae-ckpt", help="VAE to decode with: CompVis .pt, diffusers folder or hub name (default: the checkpoint's)")
    add("--sample-dir", default="samples", help="folder of the output, under a telling name, unless --npz names it")
    add("--npz", help="output file; the other outputs lie beside it under the same name")
    add("--num-fid-samples", type=int, default=50000, help="samples in all")
    add("--pproc-batch-size", type=int, default=64, help="samples per process and batch")
    add("--range", help="FIRST:END, make only these samples here (END is not included)")
    add("--global-seed", type=int, default=0, help="seed of labels and noise")
    add("--label-sampling", choices=["random", "equal"], default="random", help="equal: the same number per class")
    add("--classes", help="comma-separated class numbers, taken in turn, instead of --label-sampling")
    add("--mode", choices=["ode", "sde"], default="sde", help="Euler on the ODE, or Euler-Maruyama on the SDE")
    add("--heun", action="store_true", help="with --mode ode: Heun's method instead of Euler's")
    add("--dopri5", action="store_true", help="with --mode ode: adaptive Dormand-Prince; --num-steps is not used")
    add("--rtol", type=float, default=1e-5, help="relative tolerance of --dopri5")
    add("--atol", type=float, default=1e-5, help="absolute tolerance of --dopri5")
    add("--num-steps", type=int, default=250, help="steps of the solver")
    add("--path-type", choices=["linear", "cosine"], help="interpolant, for the SDE (default: the checkpoint's)")
    add("--cfg-scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--guidance-low", type=float, default=0.0, help="guide at times LOW <= t <= HIGH only; t = 1 is noise")
    add("--guidance-high", type=float, default=1.0, help="see --guidance-low")
    add("--mixed-precision", choices=["no", "bf16", "fp16"],
        help="precision of the network (default: bf16 on GPU, no on CPU); no: float32 without TF32 everywhere")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--png", action="store_true", help="also write every sample as a PNG")
    add("--grid-only", action="store_true", help=f"only the grid, of at most {GRID} samples, and the JSON")
    return parser.parse_args(argv)


def check_args(args):
    """Raises ValueError or OSError for what no checkpoint can make right; fills in args.ckpt, first and end."""
    samplers.check_guidance(args.cfg_scale, args.guidance_low, args.guidance_high)
    if args.mode == "sde" and (args.heun or args.dopri5):
        raise ValueError("--heun and --dopri5 solve the ODE; give --mode ode with them")
    if args.heun and args.dopri5:
        raise ValueError("--heun and --dopri5 exclude each other")
    for name in ("num_fid_samples", "pproc_batch_size", "num_steps", "rtol", "atol"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if (args.ckpt is None) == (args.exp_path is None):
        raise ValueError("give either --ckpt FILE or --exp-path FOLDER")
    if args.train_steps is not None and args.exp_path is None:
        raise ValueError("--train-steps goes with --exp-path")
    if args.exp_path is not None:
        folder = os.path.join(args.exp_path, "checkpoints")
        steps = files.checkpoint_steps(folder)
        if not steps:
            raise FileNotFoundError(f"{folder}: no checkpoints there")
        if args.train_steps is not None and args.train_steps not in steps:
            raise FileNotFoundError(f"{folder}: no step {args.train_steps}, there are {', '.join(map(str, steps))}")
        args.ckpt = os.path.join(folder, f"{steps[-1] if args.train_steps is None else args.train_steps:07d}.pt")
    if args.npz is not None and not args.npz.endswith(".npz"):
        raise ValueError(f"--npz {args.npz} must end in .npz")
    if args.grid_only:
        args.num_fid_samples = min(args.num_fid_samples, GRID)
    try:
        args.classes = args.classes and [int(c) for c in args.classes.split(",")]
        args.first, args.end = map(int, (args.range or f"0:{args.num_fid_samples}").split(":"))
    except ValueError:
        raise ValueError("--classes takes numbers like 207,360 and --range two like 0:25000") from None
    if not 0 <= args.first < args.end <= args.num_fid_samples:
        raise ValueError(f"--range {args.range} must lie within 0:{args.num_fid_samples}")


def draw_labels(args, indices, num_classes):
    """Labels [len(indices)] of these samples: --classes in turn, or as --label-sampling says."""
    mode = "equal" if args.classes else args.label_sampling
    return samplers.sample_labels(args.global_seed, indices, num_classes, mode, args.classes)


def solver_name(args):
    if args.mode == "sde":
        return "euler-maruyama"
    return "heun" if args.heun else "dopri5" if args.dopri5 else "euler"


def default_npz(args, settings):
    """<sample-dir>/<run, checkpoint, the settings that people vary>.npz; the protocol inside tells the rest."""
    step = os.path.splitext(os.path.basename(args.ckpt))[0]
    guidance = f"cfg{args.cfg_scale:g}"
    if args.cfg_scale > 1:
        guidance += f"-{args.guidance_low:g}-{args.guidance_high:g}"
    parts = [settings.get("exp_name") or "run", step, solver_name(args), "" if args.dopri5 else args.num_steps,
             guidance, "classes" if args.classes else args.label_sampling, f"seed{args.global_seed}",
             args.num_fid_samples]
    name = "-".join(str(p) for p in parts if p != "").replace(os.sep, "_")
    return os.path.join(args.sample_dir, f"{name}.npz")


def make_protocol(args, sit, vae, settings, vae_source):
    """What the samples depend on, as a dict, for the .npz and the JSON beside it. No paths: they differ by machine."""
    code = hashlib.sha256()
    for name in ("sample_ddp.py", "models/samplers.py", "models/sit.py", "models/vae.py"):
        code.update(files.sha256(os.path.join(os.path.dirname(os.path.abspath(__file__)), name)).encode())
    return {
        "checkpoint": os.path.basename(args.ckpt), "checkpoint_sha256": files.sha256(args.ckpt),
        "train_steps": settings["steps"], "model": settings["model"], "weights": "ema", "num_classes": sit.num_classes,
        "vae": os.path.basename(vae_source.rstrip("/")), "vae_sha256": weights.state_digest(vae),
        "resolution": sit.input_size * vae.downsample, "num_fid_samples": args.num_fid_samples,
        "global_seed": args.global_seed, "label_sampling": "classes" if args.classes else args.label_sampling,
        "classes": args.classes, "mode": args.mode, "solver": solver_name(args),
        **({"rtol": args.rtol, "atol": args.atol} if args.dopri5 else {"num_steps": args.num_steps}),
        "path_type": args.path_type or settings.get("path_type") or "linear",
        "cfg_scale": args.cfg_scale, "guidance_low": args.guidance_low, "guidance_high": args.guidance_high,
        "mixed_precision": args.mixed_precision, "code_sha256": code.hexdigest(), "torch": torch.__version__,
    }


def make_sampler(args, sit, vae, path_type, device):
    """Function (first, number) -> samples first .. first + number - 1 as a numpy array, uint8 [number, H, W, 3]."""
    sit, vae = sit.to(device), vae.to(device)
    scale, bias = sit.latents_stats()
    network = torch.compile(sit, dynamic=False) if args.compile else sit
    shape = (sit.in_channels, sit.input_size, sit.input_size)
    guidance = args.cfg_scale, args.guidance_low, args.guidance_high
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    torch.backends.cudnn.allow_tf32 = low is not None

    @torch.inference_mode()
    def sample(first, number):
        indices = range(first, first + number)
        generators = samplers.sample_generators(args.global_seed, indices)

        def noise():
            drawn = samplers.draw_noise(generators, shape)
            return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn

        y = draw_labels(args, indices, sit.num_classes).to(device)
        velocity = samplers.guided(lambda x, t, y: network(x, t, y)[0], y, sit.num_classes, *guidance)
        x, times = noise(), samplers.time_grid(args.num_steps, args.mode)
        # one autocast region for all steps: the weights are cast to half precision once, not at every step
        with torch.autocast(device.type, dtype=low) if low else contextlib.nullcontext():
            if args.mode == "sde":
                x = samplers.euler_maruyama(velocity, x, times, noise, partial(interpolant, path_type=path_type))
            elif args.dopri5:
                x = samplers.dopri5(velocity, x, samplers.smooth_pieces(*guidance), args.rtol, args.atol)
            else:
                x = (samplers.heun if args.heun else samplers.euler)(velocity, x, times)
        # decoded outside autocast: bf16 steps near 1 are as coarse as those of a uint8 image
        images = samplers.decode(vae.decode, x.float(), scale, bias)
        if not images.isfinite().all():
            raise FloatingPointError(f"samples {first}:{first + number} are not finite; is the checkpoint sound?")
        return samplers.truncate_to_uint8(images).cpu().numpy()

    return sample


def cpu_sampler(sample, threads):
    """`sample` for the CPU: whole blocks of CPU_BLOCK samples, each on one thread, several at once.

    Both the shape of a batch and the number of threads inside an operation change the last bits of float32 results, so
    both are kept constant: the images are bit-identical for any batch size and any number of processes.
    """
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)

    def sample_blocks(first, number):
        start = first // CPU_BLOCK * CPU_BLOCK
        blocks = pool.map(lambda block: sample(block, CPU_BLOCK), range(start, first + number, CPU_BLOCK))
        return np.concatenate(list(blocks))[first - start:first - start + number]

    return sample_blocks


def write_json(path, content):
    with files.replace(path) as temporary, open(temporary, "w") as f:
        json.dump(content, f, indent=2)


def open_output(args, protocol, npz, shards):
    """Look at what is there and start the shards folder. Returns the ranges still to be sampled, [] if `npz` is whole.

    Raises ValueError if what is there was made by another protocol.
    """
    def check_same(old, where, free):
        for key in sorted(set(old) | set(protocol)):
            if key not in free and old.get(key) != protocol.get(key):
                raise ValueError(f"{where}: was made with {key} {old.get(key)}, this run has {protocol.get(key)}; "
                                 "give another --npz, or move it away")

    names = {"torch", "checkpoint", "vae"}  # these do not decide what the samples are
    if os.path.exists(npz):
        try:
            with np.load(npz) as content:
                old = json.loads(str(content["protocol"])) if "protocol" in content else {}
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{npz}: exists and is no whole .npz; move it away, or give another --npz") from error
        check_same(old, npz, names | {"num_fid_samples"} if args.grid_only else names)
        return []
    own = os.path.join(shards, "protocol.json")
    if os.path.exists(own):
        with open(own) as f:
            check_same(json.load(f), shards, names | {"num_fid_samples"})  # a sample does not depend on their number
    else:
        write_json(own, protocol)
    return images.missing_ranges(images.list_shards(shards), args.first, args.end)


def from_main(function):
    """function() run in the main process; every process gets its result, or raises its error."""
    box = [None]
    if distributed.is_main():
        try:
            box = [function()]
        except (ValueError, OSError) as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def sample_ranges(ranges, sample, size, shards, rank, world_size, args):
    """This process's part of the missing samples, a batch at a time into shards; rank 0 shows the progress of all."""
    batches = []
    for first, end in ranges:
        while first < end:  # batches end at multiples of their size, so that a continued run keeps to the CPU's blocks
            stop = min(end, (first // size + 1) * size)
            batches.append((first, stop))
            first = stop
    total, begin = sum(b - a for a, b in ranges), time.time()
    for first, end in batches[rank::world_size]:
        images.write_shard(shards, first, sample(first, end - first))
        if rank == 0:
            missing = images.missing_ranges(images.list_shards(shards), args.first, args.end)
            left = sum(b - a for a, b in missing)
            rate = max(total - left, 1) / (time.time() - begin)
            print(f"\r{args.end - args.first - left}/{args.end - args.first} samples, {rate:.2f} images/s, "
                  f"{datetime.timedelta(seconds=int(left / rate))} left ", end="", flush=True)
    if rank == 0 and batches:
        print()


def write_outputs(args, protocol, npz, shards, run):
    """The .npz out of the shards, the grid, the PNGs and the JSON. A whole .npz is read, not written again."""
    stem, number, size = npz[:-4], args.num_fid_samples, protocol["resolution"]
    labels = draw_labels(args, range(number), protocol["num_classes"]).numpy()
    if not os.path.exists(npz) and not args.grid_only:
        images.write_npz(npz, images.shard_rows(shards, number), (number, size, size, 3), labels, protocol)

    def rows():
        return images.npz_rows(npz) if os.path.exists(npz) else images.shard_rows(shards, number)

    first = []
    for part in rows():
        first.extend(part[:min(GRID, number) - len(first)])
        if len(first) == min(GRID, number):
            break
    with files.replace(f"{stem}.png") as temporary:
        label_grid(np.stack(first), labels).save(temporary, "PNG")
    if args.png:
        images.write_pngs(stem, rows())
    if run or not os.path.exists(f"{stem}.json"):
        write_json(f"{stem}.json", protocol | {"run": run})
    print(f"wrote {stem}.png" if args.grid_only else f"{npz}: {number} samples, with {stem}.json and {stem}.png")


def git_commit():
    """Commit of this code if it is a git checkout, else None."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)), check=True,
                              capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def fail(error):
    """One line on stderr, from one process, and exit code 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    args = parse_args(argv)

    # 1) Everything that can be wrong is found before anything is written.
    try:
        check_args(args)
        rank, world_size, device = distributed.init()
        args.mixed_precision = args.mixed_precision or ("bf16" if device.type == "cuda" else "no")
        with distributed.main_first():  # a VAE from the hub is fetched once
            sit, vae, settings, vae_source = weights.load(args.ckpt, args.vae_ckpt)
        if args.cfg_scale > 1 and len(sit.y_embedder.embedding_table.weight) == sit.num_classes:
            raise ValueError(f"{args.ckpt}: trained without label dropout, so it has no null class; use --cfg-scale 1")
        draw_labels(args, [], sit.num_classes)  # raises for a class out of range
        if args.label_sampling == "equal" and args.num_fid_samples % sit.num_classes and rank == 0:
            print(f"note: {args.num_fid_samples} samples are not the same number of each of {sit.num_classes} classes",
                  file=sys.stderr)
        trained_path = settings.get("path_type") or "linear"
        if args.path_type not in (None, trained_path) and rank == 0:
            print(f"note: {args.ckpt} was trained on the {trained_path} path, not {args.path_type}", file=sys.stderr)
        protocol = from_main(lambda: make_protocol(args, sit, vae, settings, vae_source))
        npz = args.npz or default_npz(args, settings)
        shards = npz[:-4] + ".shards"
        keep_shards = args.grid_only and os.path.isdir(shards)  # of a full run that was stopped
        ranges = from_main(lambda: open_output(args, protocol, npz, shards))
    except (ValueError, OSError) as error:
        fail(error)

    # 2) The samples that are missing, into shards.
    begin, run = time.time(), None
    if ranges:
        sample_padded = make_sampler(args, sit, vae, protocol["path_type"], device)
        if device.type == "cpu":
            threads = 1 if args.compile else torch.get_num_threads()
            size = CPU_BLOCK * max(1, min(threads, args.pproc_batch_size // CPU_BLOCK))
            sample = cpu_sampler(sample_padded, threads)
        else:  # a short last batch is filled up: one shape, one compilation
            size = args.pproc_batch_size
            def sample(first, number): return sample_padded(first, size)[:number]
        try:
            sample_ranges(ranges, sample, size, shards, rank, world_size, args)
        except ArithmeticError as error:
            fail(error)
        distributed.barrier()
        run = {"samples": sum(b - a for a, b in ranges), "seconds": round(time.time() - begin, 1),
               "processes": world_size, "batch_per_process": size, "git_commit": git_commit(),
               "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}

    # 3) One file out of the shards, and a picture.
    if rank == 0:
        have = [] if os.path.exists(npz) else images.list_shards(shards)
        left = [] if os.path.exists(npz) else images.missing_ranges(have, 0, args.num_fid_samples)
        if left:
            print(f"{shards} still lacks samples {', '.join(f'{a}:{b}' for a, b in left)}; when they are there, run "
                  "this command without --range for the .npz")
        else:
            write_outputs(args, protocol, npz, shards, run)
            if not keep_shards:
                shutil.rmtree(shards, ignore_errors=True)
    distributed.barrier()
    distributed.shut_down()


if __name__ == "__main__":
    main()
