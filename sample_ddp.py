"""Sample images from a checkpoint: the same images on one device or a hundred, ready for evaluation.

One GPU, or the CPU:
    python sample_ddp.py --ckpt exps/run/checkpoints/0400000.pt --npz samples/run.npz
The paper's guided numbers on the 8 GPUs of one machine:
    torchrun --nproc-per-node 8 sample_ddp.py --ckpt exps/run/checkpoints/0400000.pt --num-fid-samples 50000
        \\ --mode sde --num-steps 250 --cfg-scale 2.2 --guidance-low 0.0 --guidance-high 0.65
A look at classes 207 and 360:
    python sample_ddp.py --exp-path exps/run --grid-only --num-fid-samples 16 --classes 207,360

Writes NAME.npz (arr_0 uint8 [N, H, W, 3], arr_1 int64 labels [N], protocol: JSON text), NAME.json (the
protocol, and how the run went), NAME.png (a grid of the first samples) and with --png NAME/000000.png,
NAME/000001.png ...

Sample i is a function of the seed and i alone. Finished samples wait in NAME.shards/ until the .npz is whole:
the same command run again continues a stopped run. SIGTERM, SIGUSR1 and Ctrl-C stop it within 20 seconds and
a step of the solver; a second Ctrl-C ends it at once. Two machines make a half each with --range 0:25000 and
--range 25000:50000; copy the shards of both into one folder and run the command there without --range.
"""
import os

from models.runtime import cli

GRID = 64       # samples in the grid
CPU_BLOCK = 4   # on the CPU samples 4k .. 4k+3 are always computed together, see cpu_sampler
GRACE = 20      # seconds that a batch may go on after the signal to stop; torchrun itself waits for 30


# ---------------------------------------------------------------- flags

def parse_args(argv=None):
    parser = cli.make_parser(__doc__)
    model, what, solver, output, running = (parser.add_argument_group(name) for name in (
        "checkpoint", "samples", "solver and guidance", "output", "running"))
    flag = cli.flag
    flag(model, "--ckpt", None, "training checkpoint, ours or a released one")
    flag(model, "--exp-path", None, "instead of --ckpt: a run folder, whose newest checkpoint is taken")
    flag(model, "--train-steps", None, "with --exp-path: the checkpoint of this step instead", type=int)
    flag(model, "--vae-ckpt", None, "VAE to decode with instead of the checkpoint's: CompVis .pt, diffusers "
         "folder or hub name")

    flag(what, "--num-fid-samples", 50000, "samples in all", above=0, most=10**8)
    flag(what, "--range", None, "FIRST:END, make only these samples here (END is not included)")
    flag(what, "--global-seed", 0, "seed of labels and noise")
    flag(what, "--label-sampling", "random", "equal: the same number per class", choices=["random", "equal"])
    flag(what, "--classes", None, "comma-separated class numbers, taken in turn, instead of --label-sampling")

    flag(solver, "--mode", "sde", "Euler-Maruyama on the SDE, or Euler on the ODE", choices=["ode", "sde"])
    flag(solver, "--heun", False, "with --mode ode: Heun's method instead of Euler's")
    flag(solver, "--dopri5", False, "with --mode ode: adaptive Dormand-Prince; --num-steps is not used")
    # A float32 network cannot meet less: dopri5 would give up after its last step.
    flag(solver, "--rtol", 1e-5, "relative tolerance of --dopri5", least=1e-7, most=1.0)
    flag(solver, "--atol", 1e-5, "absolute tolerance of --dopri5", least=1e-7, most=1.0)
    flag(solver, "--num-steps", 250, "steps of the solver", above=0, most=10**6)
    flag(solver, "--path-type", None, "interpolant, for the SDE; by default the checkpoint's",
         choices=["linear", "cosine"])
    flag(solver, "--cfg-scale", 1.0, "classifier-free guidance; 1 is none", least=1.0)
    flag(solver, "--guidance-low", 0.0, "guide at times LOW <= t <= HIGH only; t = 1 is noise", most=1.0)
    flag(solver, "--guidance-high", 1.0, "see --guidance-low", most=1.0)

    flag(output, "--npz", None, "output file; the other outputs lie beside it under the same name")
    flag(output, "--sample-dir", "samples", "without --npz: folder of an output file with a telling name")
    flag(output, "--png", False, "also write every sample as a PNG")
    flag(output, "--grid-only", False, f"only the grid, of at most {GRID} samples, and the JSON")

    flag(running, "--pproc-batch-size", 64, "samples per process and batch", above=0, most=10**5)
    flag(running, "--mixed-precision", "auto", "type of the network; auto: bf16 on a GPU, no on a CPU; no: "
         "float32 without TF32 everywhere", choices=["auto", "no", "bf16", "fp16"])
    flag(running, "--compile", False, "torch.compile the network")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.answer_early(parse_args)

import contextlib
import datetime
import hashlib
import inspect
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from models import samplers
from models.losses import interpolant
from models.runtime import distributed, files, images, shards, signals, weights


class Stopped(Exception):
    """A signal asked for the end, and the work has been left where it can be taken up again."""


# ---------------------------------------------------------------- settings

def check_args(args):
    """Raise ValueError or OSError for what no checkpoint can make right; fill in args.ckpt, first and end."""
    samplers.check_guidance(args.cfg_scale, args.guidance_low, args.guidance_high)
    if args.mode == "sde" and (args.heun or args.dopri5):
        raise ValueError("--heun and --dopri5 solve the ODE; give --mode ode with them")
    if args.heun and args.dopri5:
        raise ValueError("--heun and --dopri5 exclude each other")
    if (args.ckpt is None) == (args.exp_path is None):
        raise ValueError("give either --ckpt FILE or --exp-path FOLDER")
    if args.train_steps is not None and args.exp_path is None:
        raise ValueError("--train-steps goes with --exp-path")
    if args.exp_path is not None:
        folder = os.path.join(args.exp_path, "checkpoints")
        steps = files.checkpoint_steps(folder)
        if not steps:
            raise FileNotFoundError(f"{folder}: no checkpoints there")
        step = steps[-1] if args.train_steps is None else args.train_steps
        if step not in steps:
            raise FileNotFoundError(f"{folder}: no step {step}, there are {', '.join(map(str, steps))}")
        args.ckpt = os.path.join(folder, f"{step:07d}.pt")
    if args.npz is not None and (not args.npz.endswith(".npz") or os.path.basename(args.npz) == ".npz"):
        raise ValueError(f"--npz {args.npz} must be a name that ends in .npz")
    if args.grid_only:
        args.num_fid_samples = min(args.num_fid_samples, GRID)
    try:
        args.classes = None if args.classes is None else [int(c) for c in args.classes.split(",")]
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
    """<sample-dir>/<run, checkpoint, usual settings>.npz; the protocol inside tells the rest."""
    step = os.path.splitext(os.path.basename(args.ckpt))[0]
    guidance = f"cfg{args.cfg_scale:g}"
    if args.cfg_scale > 1:
        guidance += f"-{args.guidance_low:g}-{args.guidance_high:g}"
    steps = [] if args.dopri5 else [args.num_steps]
    labels = "classes" if args.classes else args.label_sampling
    parts = [settings.get("exp_name") or "run", step, solver_name(args), *steps, guidance, labels,
             f"seed{args.global_seed}", args.num_fid_samples]
    name = "-".join(map(str, parts)).replace(os.sep, "_")
    return os.path.join(args.sample_dir, f"{name}.npz")


def make_protocol(args, sit, vae, settings, vae_source):
    """What the samples depend on, for the .npz, its shards and the JSON. No paths: they differ by machine."""
    code = hashlib.sha256()
    for name in ("sample_ddp.py", "models/samplers.py", "models/sit.py", "models/vae.py"):
        code.update(files.sha256(os.path.join(os.path.dirname(os.path.abspath(__file__)), name)).encode())
    code.update(inspect.getsource(interpolant).encode())
    return {
        "checkpoint": os.path.basename(args.ckpt), "checkpoint_sha256": files.sha256(args.ckpt),
        "train_steps": settings["steps"], "model": settings["model"], "weights": "ema",
        "num_classes": sit.num_classes,
        "vae": os.path.basename(vae_source.rstrip("/")), "vae_sha256": weights.state_digest(vae),
        "resolution": sit.input_size * vae.downsample, "num_fid_samples": args.num_fid_samples,
        "global_seed": args.global_seed, "label_sampling": "classes" if args.classes else args.label_sampling,
        "classes": args.classes, "mode": args.mode, "solver": solver_name(args),
        **({"rtol": args.rtol, "atol": args.atol} if args.dopri5 else {"num_steps": args.num_steps}),
        "path_type": args.path_type or settings.get("path_type") or "linear",
        "cfg_scale": args.cfg_scale, "guidance_low": args.guidance_low, "guidance_high": args.guidance_high,
        "mixed_precision": args.mixed_precision, "code_sha256": code.hexdigest(), "torch": torch.__version__,
    }


def prepare(args):
    """Find everything that can be wrong before anything is computed: ValueError or OSError, one line.

    Returns the job: namespace(args, sit, vae, npz, stem (npz without its ending), shards (folder), protocol,
    ranges: [(first, end)] of the samples that are missing, keep_shards, lock, rank, world_size, device).
    """
    check_args(args)
    rank, world_size, device = distributed.init()
    if args.mixed_precision == "auto":
        args.mixed_precision = "bf16" if device.type == "cuda" else "no"
    with distributed.main_first():  # a VAE from the hub is fetched once
        sit, vae, settings, vae_source = weights.load(args.ckpt, args.vae_ckpt)
    notes = check_model(args, sit, settings)
    npz = args.npz or default_npz(args, settings)
    job = SimpleNamespace(args=args, sit=sit, vae=vae, npz=npz, stem=npz[:-4], shards=npz[:-4] + ".shards",
                          rank=rank, world_size=world_size, device=device, lock=None)

    def open_output():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        pngs = [f"{job.stem}/000000.png"] if args.png else []
        for path in (npz, f"{job.stem}.png", f"{job.stem}.json", *pngs):
            files.check_writable(path, [args.ckpt])
        protocol = make_protocol(args, sit, vae, settings, vae_source)
        keep_shards = args.grid_only and bool(shards.list_shards(job.shards))  # those of a full run
        job.lock = shards.claim(job.shards)
        return protocol, find_missing(job, protocol), keep_shards

    try:
        job.protocol, job.ranges, job.keep_shards = distributed.from_main(open_output)
    except (ValueError, OSError):
        close_output(job)
        raise
    return job


def check_model(args, sit, settings):
    """Raises ValueError for what this model cannot do. Returns notes on what a user may not have meant."""
    if args.cfg_scale > 1 and len(sit.y_embedder.embedding_table.weight) == sit.num_classes:
        raise ValueError(f"{args.ckpt}: trained without label dropout, has no null class; use --cfg-scale 1")
    draw_labels(args, [], sit.num_classes)  # raises for a class out of range
    notes, trained_path = [], settings.get("path_type") or "linear"
    if args.label_sampling == "equal" and args.num_fid_samples % sit.num_classes:
        notes.append(f"{args.num_fid_samples} samples are not the same number of each of {sit.num_classes} "
                     "classes")
    if args.path_type not in (None, trained_path):
        notes.append(f"{args.ckpt} was trained on the {trained_path} path, not {args.path_type}")
    return notes


def find_missing(job, protocol):
    """[(first, end)] of samples in neither the .npz nor a sound shard; ValueError if they are others'."""
    for folder in (os.path.dirname(os.path.abspath(job.npz)), job.stem):
        files.remove_leftovers(folder)  # of runs that were killed
    if os.path.exists(job.npz):
        try:
            old = images.open_npz(job.npz).protocol
        except images.InputError as error:
            raise ValueError(f"{error}, or move it away, or give another --npz") from error
        if old is None:
            raise ValueError(f"{job.npz}: exists, and not from here; move it away, or give another --npz")
        number = {"num_fid_samples"} if job.args.grid_only else set()
        shards.check_same(old, protocol, job.npz, {"torch", "checkpoint", "vae"} | number)
        return []
    shards.check_shards(job.shards, (protocol["resolution"], protocol["resolution"]), protocol)
    return shards.missing_ranges(shards.list_shards(job.shards), job.args.first, job.args.end)


def close_output(job):
    if job.lock is not None:
        shards.release(job.shards, job.lock)


# ---------------------------------------------------------------- the samples

def integrate(args, velocity, noise, path_type):
    """Normalised latents of a batch, [B, C, h, w] float64, by the solver that the flags name."""
    times = samplers.time_grid(args.num_steps, args.mode)
    if args.mode == "sde":
        path = partial(interpolant, path_type=path_type)
        return samplers.euler_maruyama(velocity, noise(), times, noise, path)
    if args.dopri5:
        times = samplers.smooth_pieces(args.cfg_scale, args.guidance_low, args.guidance_high)
        return samplers.dopri5(velocity, noise(), times, args.rtol, args.atol)
    return (samplers.heun if args.heun else samplers.euler)(velocity, noise(), times)


def make_sampler(job, asked):
    """Function (first, number) -> that many samples from `first` on, a numpy uint8 [number, H, W, 3]."""
    args, device = job.args, job.device
    sit, vae = job.sit.to(device), job.vae.to(device)
    scale, bias = sit.latents_stats()
    model = torch.compile(sit, dynamic=False) if args.compile else sit
    shape = (sit.in_channels, sit.input_size, sit.input_size)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    torch.backends.cudnn.allow_tf32 = low is not None

    def network(x, t, y):
        if asked.by and time.monotonic() - asked.at > GRACE:
            raise Stopped  # this batch is given up; the ones before it are in their shards
        return model(x, t, y)[0]

    @torch.inference_mode()
    def sample(first, number):
        indices = range(first, first + number)
        generators = samplers.sample_generators(args.global_seed, indices)

        def noise():
            drawn = samplers.draw_noise(generators, shape)
            return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn

        y = draw_labels(args, indices, sit.num_classes).to(device)
        velocity = samplers.guided(network, y, sit.num_classes, args.cfg_scale, args.guidance_low,
                                   args.guidance_high)
        # one autocast region for all steps: the weights are cast to half precision once, not at every step
        with torch.autocast(device.type, dtype=low) if low else contextlib.nullcontext():
            x = integrate(args, velocity, noise, job.protocol["path_type"])
        # decoded outside autocast: bf16 steps near 1 are as coarse as those of a uint8 image
        pictures = samplers.decode(vae.decode, x.float(), scale, bias)
        if not pictures.isfinite().all():
            raise FloatingPointError(f"samples {first}:{first + number} are not finite; is the model sound?")
        return samplers.truncate_to_uint8(pictures).cpu().numpy()

    return sample


def cpu_sampler(sample, threads):
    """`sample` for the CPU: whole blocks of CPU_BLOCK samples, each on one thread, several at once.

    Both the shape of a batch and the number of threads inside an operation change the last bits of float32
    results, so both are kept constant: the images are bit-identical for any batch size and any number of
    processes.
    """
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)

    def sample_blocks(first, number):
        start = first // CPU_BLOCK * CPU_BLOCK
        blocks = pool.map(lambda block: sample(block, CPU_BLOCK), range(start, first + number, CPU_BLOCK))
        return np.concatenate(list(blocks))[first - start:first - start + number]

    return sample_blocks


def sample_missing(job, asked):
    """Each process samples its part of what is missing, into shards.

    Returns how it went, for the JSON; Stopped if a signal came first.
    """
    args, begin = job.args, time.monotonic()
    sample, size = make_sampler(job, asked), args.pproc_batch_size
    if job.device.type == "cpu":
        threads = 1 if args.compile else torch.get_num_threads()
        size = CPU_BLOCK * max(1, min(threads, size // CPU_BLOCK))
        sample = cpu_sampler(sample, threads)
    batches, total = shards.cut(job.ranges, size), sum(end - first for first, end in job.ranges)
    try:
        for first, end in batches[job.rank::job.world_size]:
            if asked.by:
                raise Stopped
            if shards.stop_asked(job.shards):
                break
            # On a GPU a short last batch is filled up: one shape, one compilation.
            number = end - first if job.device.type == "cpu" else size
            shards.write_shard(job.shards, first, sample(first, number)[:end - first], job.protocol)
            if job.rank == 0:
                show_progress(job, total, begin)
    except Stopped:
        shards.ask_to_stop(job.shards)
    finally:
        if job.rank == 0:
            print()  # ends the progress line
    distributed.barrier()
    if shards.stop_asked(job.shards):
        raise Stopped
    return {"samples": total, "seconds": round(time.monotonic() - begin, 1), "processes": job.world_size,
            "batch_per_process": size, "git_commit": git_commit(),
            "device": torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu"}


def show_progress(job, total, begin):
    """One line, rewritten: how far all processes are. total: number of samples missing at time `begin`."""
    wanted = job.args.end - job.args.first
    missing = shards.missing_ranges(shards.list_shards(job.shards), job.args.first, job.args.end)
    left = sum(b - a for a, b in missing)
    rate = max(total - left, 1) / max(time.monotonic() - begin, 1e-6)
    print(f"\r{wanted - left}/{wanted} samples, {rate:.2f} images/s, "
          f"{datetime.timedelta(seconds=int(left / rate))} left ", end="", flush=True)


# ---------------------------------------------------------------- the files

def write_outputs(job, run, asked):
    """The .npz out of the shards, the grid, the PNGs and the JSON. A whole .npz is only read."""
    number, size = job.args.num_fid_samples, job.protocol["resolution"]
    labels = draw_labels(job.args, range(number), job.protocol["num_classes"]).numpy()

    def rows():
        done = os.path.exists(job.npz)
        for part in images.open_npz(job.npz).read(64) if done else shards.shard_rows(job.shards, number):
            if asked.by:
                raise Stopped
            yield part

    if not os.path.exists(job.npz) and not job.args.grid_only:
        images.write_npz(job.npz, rows(), (number, size, size, 3), arr_1=labels,
                         protocol=json.dumps(job.protocol))
    first = []
    for part in rows():
        first.extend(part[:min(GRID, number) - len(first)])
        if len(first) == min(GRID, number):
            break
    images.write_png(f"{job.stem}.png", images.label_grid(np.stack(first), labels))
    if job.args.png:
        images.write_pngs(job.stem, rows())
    if run or not os.path.exists(f"{job.stem}.json"):
        files.save_json(job.protocol | {"run": run}, f"{job.stem}.json", indent=2)
    if not job.keep_shards:
        shards.remove_shards(job.shards)
    print(f"wrote {job.stem}.png" if job.args.grid_only else
          f"{job.npz}: {number} samples, with {job.stem}.json and {job.stem}.png")


def git_commit():
    """Commit of this code if it is a git checkout, else None."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, check=True, capture_output=True,
                              text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    with signals.watch() as asked:
        try:
            job = prepare(args)
            failure = None
        except (ValueError, OSError) as error:
            failure = error
        if failure is None:
            failure = carry_out(job, asked)
    if failure is not None:  # no longer watching: torchrun must be able to end the other processes
        cli.fail(failure)
    distributed.shut_down()


def carry_out(job, asked):
    """Samples and files, unless a signal comes first. Returns what to tell the user, an exception or None."""
    try:
        try:
            with distributed.busy("at work on samples and files"):
                run = sample_missing(job, asked) if job.ranges else None
                if job.rank == 0:
                    finish(job, run, asked)
        except Stopped:
            if job.rank == 0:
                done = sum(end - first for first, end in shards.list_shards(job.shards))
                print(f"stopped by {asked.by or 'a signal to another process'}: {done} samples are in "
                      f"{job.shards}; run the same command again to go on")
        distributed.barrier()
    except (images.InputError, OSError, ArithmeticError) as error:
        return error
    except torch.OutOfMemoryError:
        return MemoryError("the GPU's memory is full; give a --pproc-batch-size below "
                           f"{job.args.pproc_batch_size}")
    finally:
        close_output(job)


def finish(job, run, asked):
    """The outputs, if all samples are there; else a line that says which are not."""
    have = [(0, job.args.num_fid_samples)] if os.path.exists(job.npz) else shards.list_shards(job.shards)
    if left := shards.missing_ranges(have, 0, job.args.num_fid_samples):
        print(f"{job.shards} still lacks samples {', '.join(f'{a}:{b}' for a, b in left)}; when they are "
              "there, run this command without --range for the .npz")
    else:
        write_outputs(job, run, asked)


if __name__ == "__main__":
    main()
