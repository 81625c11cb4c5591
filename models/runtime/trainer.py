"""What the training scripts share: flags to data and precision, guarded updates, EMA, resuming, the log, the watch on collapse."""
import argparse
import contextlib
import os
import sys
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

from models.runtime import distributed, files
from models.runtime.data import EndlessSampler, ImageData, ShapesData, check_images, make_loader
from models.metrics import latent_moments


def flag(group, name, default, help, **more):
    """group.add_argument(name) with the default's type; False makes a switch, None a string unless `type` is given."""
    kind = {} if isinstance(default, bool) else {"type": more.pop("type", str if default is None else type(default))}
    if isinstance(default, bool):
        kind["action"] = "store_true"
    group.add_argument(name, default=default, help=help, **kind, **more)


def check_numbers(args, world_size, fractions, positive=()):
    """Raise a one-line ValueError unless the settings are above 0, those named `fractions` lie in [0, 1], and the batch can
    be divided among processes and accumulation steps. The settings that all training has need not be named."""
    for name in ("resolution", "batch_size", "gradient_accumulation_steps", "max_train_steps", "log_every",
                 "checkpointing_steps", "learning_rate", "max_grad_norm", *positive):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    for name in ("num_workers", "keep_checkpoints", "sampling_steps"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must not be negative")
    for name in fractions:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must lie in [0, 1]")
    parts = world_size * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {world_size} processes x "
                         f"{args.gradient_accumulation_steps} accumulation steps")


def open_data(args):
    """The images of --data-dir ("shapes": the built-in set); every file's first bytes are looked at, by the main process."""
    if args.data_dir == "shapes":
        return ShapesData(50000, args.resolution, hflip=args.hflip, seed=args.seed)
    dataset = ImageData(args.data_dir, args.resolution, hflip=args.hflip, seed=args.seed, skip_corrupt=args.skip_corrupt)
    bad = check_images(args.data_dir, dataset.names) if distributed.is_main() else []
    if bad and (not args.skip_corrupt or len(bad) == len(dataset)):
        raise ValueError(f"{args.data_dir}: {bad[0]} is no image ({len(bad)} such files); remove them or pass --skip-corrupt")
    if bad:
        print(f"{len(bad)} of {len(dataset)} files are no images and will be skipped, e.g. {bad[0]}", flush=True)
    return dataset


def data_loader(args, dataset, device, rank, world_size, step, workers):
    """This process's share of the global batches that follow `step`: (uint8 images, labels, files skipped) without end."""
    sampler = EndlessSampler(len(dataset), args.batch_size, rank, world_size, args.seed, start_step=step)
    return make_loader(dataset, sampler, args.batch_size // world_size, workers, device)


@torch.no_grad()
def measure_latents(args, vae, dataset, device, rank, world_size, batches):
    """(mean, variance), each [C] float64, of the latents of the run's first `batches` global batches, all processes together."""
    sums, loader = 0, data_loader(args, dataset, device, rank, world_size, 0, workers=0)
    for _, (images, _, _) in zip(range(batches), loader):
        for part in images.chunk(args.gradient_accumulation_steps):
            moments = latent_moments(vae.encode(part.to(device).float() / 127.5 - 1))
            sums = sums + moments / args.gradient_accumulation_steps
    mean, square = distributed.all_reduce_sum(sums) / (batches * world_size)
    return mean, square - mean.square()


def autocast_type(args, device):
    """torch type of --mixed-precision: auto is bfloat16 on a GPU and float32 (no autocast) on the CPU."""
    precision = ("bf16" if device.type == "cuda" else "no") if args.mixed_precision == "auto" else args.mixed_precision
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision]


def wrap_ddp(net, device):
    """`net` in DistributedDataParallel, or as it is in one process. Buffers are kept equal by synced batch norms."""
    if distributed.world_size() == 1:
        return net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions rename broadcast_buffers; both know this name
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)


def sync_if(last, ddp):
    """Context in which DDP averages gradients over the processes only if `last`: once per step, not per micro-batch."""
    return contextlib.nullcontext() if last or not isinstance(ddp, DistributedDataParallel) else ddp.no_sync()


def adamw(parameters, args, learning_rate):
    """AdamW over `parameters`, fused: it can skip a step on a tensor's say-so, without the host reading it."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                             eps=args.adam_epsilon, weight_decay=args.adam_weight_decay, fused=True)


def channels_last(*networks):
    """Put those convolutional networks that are not None in channels_last: on a GPU tensor cores want it. It pays with
    --compile only, since torch's own group norm would turn every activation back."""
    for network in networks:
        if network is not None:
            network.to(memory_format=torch.channels_last)


def compile_blocks(blocks):
    """torch.compile modules one by one, in place: equal ones share their code, which takes seconds instead of minutes."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 64)  # every width and resolution of the VAE is one more graph of the same code
    for block in blocks:
        block.compile(dynamic=False)


def clip_gradients(parameters, max_norm, loss_scale):
    """Undo the LossScale, clip to total L2 norm max_norm, return the norm before clipping (a scalar tensor)."""
    parameters = list(parameters)
    if loss_scale.enabled:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / loss_scale.value)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)


def guarded_updates(optimizers, skip):
    """One step of each optimiser, or none of them where `skip` (float scalar tensor) is 1; gradients are freed."""
    for optimizer in optimizers:
        optimizer.found_inf = skip  # the fused kernels read it on the device; mixed-precision scalers use the same door
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def restore_where(skip, buffers, saved):
    """Put back `saved` values into `buffers` where `skip` is 1: a skipped step must not leave NaN statistics."""
    for buffer, old in zip(buffers, saved):
        buffer.copy_(torch.where(skip > 0, old, buffer))


@torch.no_grad()
def update_ema(ema, model, decay):
    """e <- decay e + (1 - decay) p for every parameter and float buffer; integer buffers are copied."""
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values()))
    averaged = [(e, p) for e, p in pairs if e.is_floating_point()]
    torch._foreach_lerp_([e for e, _ in averaged], [p for _, p in averaged], 1 - decay)
    for e, p in pairs:
        if not e.is_floating_point():
            e.copy_(p)


class LossScale:
    """Dynamic loss scale of fp16 training, kept on the device: halved when a step is skipped, doubled after 2,000 good ones.

    Constant 1 when not enabled. `value` multiplies every loss before its backward pass.
    """

    def __init__(self, enabled, device):
        self.enabled = enabled
        self.value = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skip):
        if self.enabled:
            self.good_steps = torch.where(skip > 0, 0.0, self.good_steps + 1)
            grow = self.good_steps >= 2000
            self.value = torch.where(skip > 0, self.value * 0.5, torch.where(grow, self.value * 2, self.value))
            self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state_dict(self):
        return {"value": self.value.cpu(), "good_steps": self.good_steps.cpu()}

    def load_state_dict(self, state):
        self.value.copy_(state["value"])
        self.good_steps.copy_(state["good_steps"])


def find_checkpoint(args, folder):
    """(path, state) to continue from by --resume, or (None, None). A file that cannot be read is passed over, with a note.

    Raises ValueError if the folder holds later checkpoints than the one asked for: the next run would mix both.
    """
    steps = files.checkpoint_steps(os.path.join(folder, "checkpoints"))
    if args.resume != "auto":
        path, state = (None, None) if args.resume == "none" else (args.resume, files.load(args.resume))
        begin = state.get("steps", 0) if isinstance(state, dict) else 0
        if steps and steps[-1] > begin:
            raise ValueError(f"{folder} holds a checkpoint of step {steps[-1]}, beyond --resume {args.resume}; "
                             "use another --exp-name or remove it")
        return path, state
    folder = os.path.join(folder, "checkpoints")
    for step in reversed(steps):
        path = os.path.join(folder, f"{step:07d}.pt")
        try:
            return path, files.load(path)
        except ValueError as error:
            print(f"passed over: {error}", flush=True)
    return None, None


def check_resume(args, path, state, names):
    """Raise a one-line ValueError if this is no checkpoint, or its run differs in one of the settings `names`; other
    changed settings are printed."""
    if not isinstance(state, dict) or not {"steps", "args"} <= set(state):
        raise ValueError(f"{path}: is no training checkpoint (it has no steps and args)")
    old = vars(state["args"]) if isinstance(state["args"], argparse.Namespace) else state["args"] or {}
    changed = [f"--{name.replace('_', '-')} {old[name]} -> {value}" for name, value in vars(args).items()
               if name in old and old[name] != value and name not in names]
    if changed and distributed.is_main():
        print(f"changed since {path}: {', '.join(changed)}", flush=True)
    for name in names:
        if name in old and old[name] != getattr(args, name):
            raise ValueError(f"{path}: was trained with --{name.replace('_', '-')} {old[name]}, not {getattr(args, name)}; "
                             "use another --exp-name to start anew")


def load_optimizer(optimizer, state, path):
    """Load an optimiser's state but keep the learning rate and the other settings of this run's flags."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: its optimiser state does not fit ({error})") from error
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == p.shape and value.stride() != p.stride():
                # fused kernels pair a weight with its moments by their places in memory
                values[name] = torch.empty_like(p).copy_(value)


def check_same_start(start, device):
    """Raise ValueError unless all processes continue from the same step: without a shared folder they would not."""
    both = torch.tensor([start, -start], device=device)
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise ValueError(f"processes found different checkpoints (up to step {both[0]}); all nodes need the same --output-dir")


def keep_newest(folder, count):
    """Remove all but the `count` newest checkpoints of `folder`; 0 keeps all."""
    for step in files.checkpoint_steps(folder)[:-count] if count else []:
        os.remove(os.path.join(folder, f"{step:07d}.pt"))


def exit_with(error):
    """End the process as a user's mistake ends: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(2)
