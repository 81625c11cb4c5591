"""The plumbing that both training scripts share. No loss is defined here: they say what is trained by what.

In the order in which a script calls it: the networks of a run, its data, what `prepare` adds for training,
the five functions around the losses of one step (micro_batches, first_pass, gan_gradient, backward, update),
checkpoints, and the end of a run. Errors a user can cause are ValueError or OSError, with one line each.
"""
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
import threading
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.losses import gan_loss, wide
from models.metrics import latent_moments
from models.runtime import cli, distributed, files, signals, weights
from models.runtime.data import (EndlessSampler, ImageData, ImageError, ShapesData, check_images,
                                 check_same_data, identity, make_loader, share, worker_death)
from models.runtime.runlog import Collapse
from models.sit import pos_embed_2d
from models.vae import ResnetBlock

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Networks:
    """The networks of a run and what trains them: scripts declare the first block, `prepare` the second."""

    device: torch.device
    vae: nn.Module
    sit: nn.Module = None           # with its projectors; finetune_vae.py has none
    disc: nn.Module = None          # None: no GAN loss
    lpips: nn.Module = None         # None: no perceptual loss
    proj: nn.Module = None          # finetune_vae.py only: latents to encoder tokens
    lecam_means: torch.Tensor = None    # likewise: [2], averages of the mean logits (images, reconstructions)
    encoders: list = field(default_factory=list)
    trained: dict = field(default_factory=dict)     # name of each network that learns -> its learning rate
    averaged: str = "sit"           # name of the network whose weights `ema` averages
    notes: list = field(default_factory=list)       # lines for the log on what was loaded, and what was not

    ema: nn.Module = None
    opts: dict = field(default_factory=dict)        # name -> AdamW
    ddp: dict = field(default_factory=dict)         # name -> the network, as DistributedDataParallel
    dtype: torch.dtype = torch.float32              # of autocast; float32: none
    loss_scale: "LossScale" = None
    # What a step changes beside weights: it must not keep the NaN of a step that is skipped.
    statistics: list = field(default_factory=list)

    def autocast(self, enabled=True):
        """Context in which the networks run in `dtype`; enabled=False: in float32, within such a context."""
        low = self.dtype if self.dtype in LOW_PRECISION.values() else None
        return torch.autocast(self.device.type, low, enabled=enabled and low is not None)


# ---------------------------------------------------------------- settings and data

def check_settings(args, world_size):
    """Raise a one-line ValueError for settings of any training run that contradict each other."""
    if not args.exp_name.strip():
        raise ValueError("--exp-name is empty; name the folder of the run")
    parts = world_size * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {world_size} processes x "
                         f"{args.gradient_accumulation_steps} accumulation steps")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(f"--report-to {args.report_to}: the package is not installed; "
                         f"pip install {args.report_to}")
    if getattr(args, "freeze_vae", False):
        return
    for name, weight, least in (("disc", args.disc_weight, 32), ("perceptual", args.perceptual_weight, 16)):
        if weight > 0 and args.resolution < least:
            raise ValueError(f"--resolution {args.resolution} is below {least}, the least that its network "
                             f"takes; pass --{name}-weight 0")


def open_data(args):
    """The images of --data-dir; "shapes": the built-in set."""
    if args.data_dir == "shapes":
        return ShapesData(50000, args.resolution, hflip=args.hflip, seed=args.seed)
    return ImageData(args.data_dir, args.resolution, args.hflip, args.seed, args.skip_corrupt)


def check_data(args, dataset, state):
    """Look at the first bytes of every file, a share per process, unless the run whose checkpoint `state` is
    did so before. Returns the data's identity, for the checkpoints; every process must call this.

    Raises ValueError for files that are no images, and for other classes than those the run was trained on.
    """
    found = identity(dataset)
    before = (state or {}).get("data")
    note = None if before is None else check_same_data(before, found, args.data_dir)
    trained_on = state["args"]["data_dir"] if note else args.data_dir
    if trained_on != args.data_dir and any(before[key] != found[key] for key in ("images", "labels")):
        raise ValueError(f"{args.data_dir}: other data than {trained_on}, on which the run was trained; "
                         "use another --exp-name to start anew")
    if note and distributed.is_main():
        print(note, flush=True)
    if args.data_dir == "shapes" or before == found:
        return found
    mine = share(dataset.names, distributed.rank(), distributed.world_size())
    say = print if distributed.is_main() else lambda _: None
    bad = [name for part in distributed.gather(check_images(args.data_dir, mine, say=say)) for name in part]
    if bad and (not args.skip_corrupt or len(bad) == len(dataset)):
        raise ValueError(f"{args.data_dir}: {bad[0]} is no image ({len(bad)} such files); remove them or "
                         "pass --skip-corrupt")
    if bad and distributed.is_main():
        print(f"{len(bad)} of {len(dataset)} files are no images and will be skipped, e.g. {bad[0]}",
              flush=True)
    return found


def data_loader(args, dataset, device, step, workers):
    """This process's share of the batches after `step`, endless: (uint8 images, labels, files skipped),
    and from cache.CachedData also (..., [mean, std] of the latents or [], [tokens of each encoder])."""
    rank, world_size = distributed.rank(), distributed.world_size()
    sampler = EndlessSampler(len(dataset), args.batch_size, rank, world_size, args.seed, start_step=step)
    return iter(make_loader(dataset, sampler, args.batch_size // world_size, workers, device))


def step_images(args, dataset, step, count):
    """The first `count` images, uint8 [count, 3, R, R] at most, of this process's share of a step's batch."""
    rank, world_size = distributed.rank(), distributed.world_size()
    sampler = EndlessSampler(len(dataset), args.batch_size, rank, world_size, args.seed, start_step=step - 1)
    count = min(count, args.batch_size // world_size)
    return torch.stack([dataset[key][0] for key in itertools.islice(sampler, count)])


def draw_generator(args, step, device):
    """The generator of a step's draws. They are made for the global batch and cut by `my_share`: a run does
    not depend on the number of processes, and a resumed one needs no random state but the step."""
    return torch.Generator(device).manual_seed((args.seed * 1_000_003 + step) % 2 ** 32)


def my_share(args):
    """The slice of the global batch that this process works on."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return slice(rank * args.batch_size // world_size, (rank + 1) * args.batch_size // world_size)


@torch.no_grad()
def measure_latents(args, vae, dataset, device, batches):
    """(mean, variance), each [C] float64, of the latents of the run's first `batches` global batches."""
    sums, loader = 0, data_loader(args, dataset, device, 0, workers=0)
    for _, (images, _, _, *cached) in zip(range(batches), loader):
        if cached and cached[0]:
            mean, std = (v.to(device) for v in cached[0])
            sums = sums + latent_moments(SimpleNamespace(mean=mean, std=std))
            continue
        for part in images.chunk(args.gradient_accumulation_steps):
            moments = latent_moments(vae.encode(part.to(device).float() / 127.5 - 1))
            sums = sums + moments / args.gradient_accumulation_steps
    mean, square = distributed.all_reduce_sum(sums) / (batches * distributed.world_size())
    return mean, square - mean.square()


# ---------------------------------------------------------------- from networks to a run

def prepare(nets, args):
    """Add to `nets` what training needs: optimisers, processes, average, precision, memory, compilation."""
    compiled = wants_compile(args, nets.device)
    if compiled:
        # Tensor cores want channels_last. It pays with --compile only: torch's own group norm would turn
        # every activation back.
        for net in filter(None, (nets.vae, nets.disc, nets.lpips)):
            net.to(memory_format=torch.channels_last)
    for name, learning_rate in nets.trained.items():
        net = distributed.sync_batch_norms(getattr(nets, name)).train()
        nets.opts[name] = adamw([p for p in net.parameters() if p.requires_grad], args, learning_rate)
        nets.ddp[name] = wrap_ddp(net, nets.device)
        nets.statistics += [b for b in net.buffers() if b.is_floating_point()]
    if shares := [o.owners for o in nets.opts.values() if isinstance(o, distributed.ShardedAdamW)]:
        sizes = [(2 * tensor_bytes([p]), owner) for owners in shares for p, owner in owners.items()]
        mine = sum(size for size, owner in sizes if owner == distributed.rank())
        nets.notes.append(f"AdamW's moments are shared out: {mine / 1e9:.3g} GB here of "
                          f"{sum(size for size, _ in sizes) / 1e9:.3g} GB")
    nets.ema = copy.deepcopy(getattr(nets, nets.averaged)).eval().requires_grad_(False)
    nets.dtype = autocast_type(args, nets.device)
    nets.loss_scale = LossScale(nets.dtype == torch.float16, nets.device)
    if args.grad_checkpoint:
        nets.vae.save_memory()
        if nets.sit is not None:
            nets.sit.grad_checkpoint = True
    if compiled:
        compile_blocks(nets)


def wants_compile(args, device):
    """Whether blocks are compiled: by flag, else on a GPU whose code torch's compiler can write."""
    if args.compile is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return args.compile


def autocast_type(args, device):
    """torch type of --mixed-precision: auto is bfloat16 on a GPU and float32 (no autocast) on the CPU."""
    precision = args.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "no"
    return LOW_PRECISION.get(precision, torch.float32)


def adamw(parameters, args, learning_rate):
    """AdamW over `parameters`, fused: it can skip a step on a tensor's say-so, unread by the host."""
    sharded = args.shard_optimizer and distributed.world_size() > 1
    kind = distributed.ShardedAdamW if sharded else torch.optim.AdamW
    return kind(parameters, lr=learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
                weight_decay=args.adam_weight_decay, fused=True)


def wrap_ddp(net, device):
    """`net`, in DistributedDataParallel for several processes. Synced batch norms keep the buffers equal."""
    if distributed.world_size() == 1:
        return net
    with warnings.catch_warnings():
        # newer versions rename broadcast_buffers; both know this name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None,
                                       broadcast_buffers=False,
                                       gradient_as_bucket_view=True)  # no second copy of all gradients


def compile_blocks(nets):
    """torch.compile the repeated blocks one by one, in place: equal ones share their code, which takes
    seconds instead of the minutes that whole networks take."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    # every width and resolution of the VAE is one more graph of the same code
    setattr(torch._dynamo.config, limit, 64)
    # In DistributedDataParallel the compiler would cut every block of over 1 MB into pieces, to send
    # gradients while it runs backward; block by block they are sent early enough.
    torch._dynamo.config.optimize_ddp = False
    blocks = [m for m in nets.vae.modules() if isinstance(m, ResnetBlock)]
    if nets.sit is not None:
        # Not the average's: it samples now and then only, and while the evaluator's thread has set other
        # precision flags each of its blocks would be compiled again.
        blocks += nets.sit.blocks
    for encoder in nets.encoders:
        blocks += getattr(getattr(encoder, "model", None), "blocks", ())
    for block in blocks:
        block.compile(dynamic=False)


class LossScale:
    """Dynamic loss scale of fp16 training, kept on the device: halved when a step is skipped, doubled after
    2,000 good ones. Constant 1 when not enabled. `value` multiplies every loss before its backward pass."""

    def __init__(self, enabled, device):
        self.enabled = enabled
        self.value = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skip):
        if self.enabled:
            self.good_steps = torch.where(skip > 0, 0.0, self.good_steps + 1)
            grow = self.good_steps >= 2000
            grown = torch.where(grow, self.value * 2, self.value)
            self.value = torch.where(skip > 0, self.value * 0.5, grown)
            self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state_dict(self):
        return {"value": self.value.cpu(), "good_steps": self.good_steps.cpu()}

    def load_state_dict(self, state):
        self.value.copy_(state["value"])
        self.good_steps.copy_(state["good_steps"])


# ---------------------------------------------------------------- around the losses of one step

def micro_batches(batch, n):
    """A namespace of tensors [b, ...] and lists of such -> n namespaces, each with its part of every one."""
    parts = [SimpleNamespace() for _ in range(n)]
    for name, value in vars(batch).items():
        for i, part in enumerate(parts):
            cut = [v.chunk(n)[i] for v in value] if isinstance(value, list) else value.chunk(n)[i]
            setattr(part, name, cut)
    return parts


def first_pass(nets, parts):
    """The VAE's forward pass: (latents z [b, C, h, w], reconstructions [b, 3, R, R]) of the batch, detached.

    The discriminator's batch norm must see the reconstructions of the whole batch before any gradient is
    taken. One micro-batch keeps its graph for `vae_outputs`; several are run without, and again with it one
    at a time: that is what accumulation costs, and what it saves.
    """
    keep = len(parts) == 1
    vae = nets.ddp["vae"] if keep else nets.vae
    with torch.set_grad_enabled(keep), nets.autocast():
        outputs = [vae(part.images, part.eps) for part in parts]
    parts[0].outputs = outputs[0] if keep else None
    z, recon = (torch.cat([output[k].detach() for output in outputs]) for k in (1, 2))
    return z, recon


def vae_outputs(nets, part):
    """(posterior's moments [b, 2C, h, w], z [b, C, h, w], r [b, 3, R, R]) of a micro-batch, with graph."""
    kept = getattr(part, "outputs", None)
    return nets.ddp["vae"](part.images, part.eps) if kept is None else kept


def gan_gradient(nets, parts, recon, weight=1.0):
    """Give every part what `gan_share` needs: the generator's loss, and its share of the gradient of
    weight * loss at the reconstructions [b, 3, R, R]. The discriminator's weights receive nothing.

    Of the whole batch at once, because of the discriminator's batch norms. In float32, as in the reference:
    in bf16 this gradient is off by an eighth, and the discriminator is small.
    """
    leaf = wide(recon).requires_grad_()
    with nets.autocast(False):
        loss = gan_loss(nets.disc, leaf)
        gradient, = torch.autograd.grad(weight * loss, leaf)
    for part, piece in zip(parts, gradient.chunk(len(parts))):
        part.gan_loss, part.gan_weight, part.gan_gradient = loss.detach(), weight, piece * len(parts)


def weigh_gan(parts, weight):
    """Multiply what gan_gradient found by `weight`, which came out of those gradients themselves."""
    for part in parts:
        part.gan_weight, part.gan_gradient = weight * part.gan_weight, weight * part.gan_gradient


def gan_share(part, recon):
    """The weighted GAN loss as a scalar whose gradient at the part's `recon` is what gan_gradient found."""
    return known_gradient(part.gan_weight * part.gan_loss, recon, part.gan_gradient)


def known_gradient(value, x, gradient):
    """A scalar equal to `value` whose gradient at x is `gradient`: a loss computed elsewhere joins a sum."""
    product = (x.to(gradient.dtype) * gradient).sum()
    return value + (product - product.detach())


def backward(nets, parts, losses_of, total, *trained):
    """Add the gradient of losses_of(part)[total], averaged over `parts`, to the weights' .grad.

    The one place for autocast, the loss scale, the mean over micro-batches, and the exchange with other
    processes, which waits for the last micro-batch of the networks `trained`. losses_of(part) returns scalars
    by name; their means over the parts are returned, detached.
    """
    means = {}
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with contextlib.ExitStack() as stack:
            for name in trained:
                if not last and isinstance(nets.ddp[name], DistributedDataParallel):
                    stack.enter_context(nets.ddp[name].no_sync())
            with nets.autocast():
                losses = losses_of(part)
            (nets.loss_scale.value * losses[total] / len(parts)).backward()
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / len(parts)
    return means


def update(nets, args, metrics, before):
    """Clip, one step of each optimiser, the average. Adds the gradient norms to `metrics`.

    If a metric is not finite in any process, no process learns from the step: weights and moments stay,
    `before` (a copy of nets.statistics from the beginning of the step) is put back; the average goes on, and
    so does the loss scale. Returns skip: 1.0 in that case, else 0.0.
    """
    for name in nets.trained:
        parameters = [p for p in getattr(nets, name).parameters() if p.requires_grad]
        metrics[f"grad_norm_{name}"] = clip_gradients(parameters, args.max_grad_norm, nets.loss_scale)
    finite = torch.stack([value.double() for value in metrics.values()]).isfinite().all()
    skip = distributed.all_reduce_sum((~finite).float()).clamp(max=1)
    guarded_updates(nets.opts.values(), skip)
    for buffer, old in zip(nets.statistics, before):
        buffer.copy_(torch.where(skip > 0, old, buffer))
    nets.loss_scale.update(skip)
    update_ema(nets.ema, getattr(nets, nets.averaged), args.ema_decay)
    return skip


def clip_gradients(parameters, max_norm, loss_scale):
    """Undo the LossScale, clip to total L2 norm max_norm; returns the norm before (a scalar tensor)."""
    if loss_scale.enabled:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / loss_scale.value)
    return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)


def guarded_updates(optimizers, skip):
    """One step of each optimiser, or none where `skip` (float scalar tensor) is 1; gradients are freed."""
    for optimizer in optimizers:
        # the fused kernels read found_inf on the device; torch's GradScaler skips steps by the same attribute
        optimizer.found_inf = skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_ema(ema, model, decay):
    """e <- decay e + (1 - decay) p for every parameter and float buffer; integer buffers are copied.

    The buffers count: sampler and exported latent statistics use the average's batch norm (paper, section 3).
    """
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values()))
    averaged = [(e, p) for e, p in pairs if e.is_floating_point()]
    torch._foreach_lerp_([e for e, _ in averaged], [p for _, p in averaged], 1 - decay)
    for e, p in pairs:
        if not e.is_floating_point():
            e.copy_(p)


# ---------------------------------------------------------------- checkpoints

# network -> key in a checkpoint
WEIGHTS = {"sit": "model", "vae": "vae", "disc": "discriminator", "proj": "proj"}
OPTIMISERS = {"sit": "opt", "vae": "opt_vae", "disc": "opt_disc", "proj": "opt_proj"}
AVERAGES = {"sit": "ema", "vae": "vae_ema"}


def checkpoint_state(nets, args, step, **more):
    """Content of a checkpoint: weights, their average, optimisers, loss scale, settings (a dict), step."""
    state = {}
    for name in nets.trained:
        state[WEIGHTS[name]] = getattr(nets, name).state_dict()
        if name == nets.averaged:
            state[AVERAGES[name]] = nets.ema.state_dict()
        optimizer = nets.opts[name]
        sharded = isinstance(optimizer, distributed.ShardedAdamW)
        state[OPTIMISERS[name]] = optimizer.whole_state_dict() if sharded else optimizer.state_dict()
    return state | more | {"loss_scale": nets.loss_scale.state_dict(), "args": vars(args), "steps": step}


def restore(nets, path, state):
    """Put a checkpoint's networks, optimisers and loss scale in place. Returns its step."""
    named = {AVERAGES[nets.averaged]: nets.ema}
    named |= {WEIGHTS[name]: getattr(nets, name) for name in nets.trained}
    for key, net in named.items():
        if key not in state:
            hint = "; pass --freeze-vae as its run did, or use --init-from" if key == "vae" else ""
            raise ValueError(f"{path}: holds no {key}, it is no checkpoint of this kind of run{hint}")
        files.load_weights(net, state[key], f"{path} ({key})")
    for name, optimizer in nets.opts.items():
        load_optimizer(optimizer, state.get(OPTIMISERS[name], {}), f"{path} ({OPTIMISERS[name]})")
    if "loss_scale" in state:
        nets.loss_scale.load_state_dict(state["loss_scale"])
    return state["steps"]


def adopt(nets, path, state):
    """The content `state` of a checkpoint that the reference wrote, as `restore` takes it: its optimiser
    states by name, in the order of this run's parameters. Ours comes back as it is.

    What does not fit, alignment heads and moments, starts anew and is said in nets.notes.
    """
    if not is_released(state):
        return state
    mapped, heads = {}, []
    for key in ("model", "ema"):
        if isinstance(state.get(key), dict):
            mapped[key], heads = weights.with_own_heads(state[key], nets.sit)
    if heads:
        nets.notes.append(f"{path}: its alignment heads are of another encoder; they start anew")
    for name, optimizer in nets.opts.items():
        key, net = OPTIMISERS[name], getattr(nets, name)
        names = [n for n, p in net.named_parameters() if p.requires_grad]
        mapped[key], anew = weights.optimizer_state(state, key, optimizer, names)
        if anew:
            which = f"all {len(anew)}" if len(anew) == len(names) else f"{len(anew)} of {len(names)}"
            nets.notes.append(f"{path}: its {key} does not fit {which} weights of {name} (first: {anew[0]}); "
                              "their moments start anew")
    return state | mapped


def note_position_table(nets, path):
    """Say in nets.notes what becomes of a position table that was loaded from `path` and is not the
    formula's, because it was trained: by --learn-pos-embed, or by the reference, by accident."""
    table = nets.sit.pos_embed.detach().cpu()
    if (table - pos_embed_2d(table.shape[2], math.isqrt(table.shape[1]))).abs().max() > 1e-4:
        learns = nets.sit.pos_embed.requires_grad
        fate = "goes on learning" if learns else "stays as it is (--learn-pos-embed would train it on)"
        nets.notes.append(f"the position table of {path} was trained; it {fate}")


def is_released(state):
    """Whether a checkpoint is the reference's: it pickles an argparse.Namespace, where ours is a dict."""
    return not isinstance(state.get("args"), dict)


def load_optimizer(optimizer, state, path):
    """Load an optimiser's state but keep the learning rate and the other settings of this run's flags."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    files.check_optimizer_state(optimizer, state, path)
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


def find_checkpoint(args, folder):
    """(path, state) to continue from by --resume, or (None, None).

    A run that went on from --resume FILE continues from its own newest checkpoint when its command is given
    again. Raises ValueError if the folder holds later checkpoints than the one asked for from another run,
    which the next run would mix with its own, and for weights that are not finite.
    """
    if args.resume == "auto":
        return newest_checkpoint(args, folder)
    path, state = None, None
    if args.resume != "none":
        path, state = args.resume, files.load(args.resume)
        check_finite(path, state)
    last = max(files.checkpoint_steps(os.path.join(folder, "checkpoints")), default=0)
    if last > (state or {}).get("steps", 0):
        newest, own = newest_checkpoint(args, folder)
        if state is not None and own is not None:
            if files.training_args(own, newest).get("resume") == args.resume:
                return newest, own
        raise ValueError(f"{folder} holds a checkpoint of step {last}, beyond --resume {args.resume}; use "
                         "another --exp-name or remove it")
    return path, state


def newest_checkpoint(args, folder):
    """(path, state) of the newest sound checkpoint of a run folder, or (None, None).

    A file that is proved damaged is passed over, with a note; any other trouble with reading one stops the
    run, which would else start anew and push the sound checkpoints out.
    """
    checkpoints = os.path.join(folder, "checkpoints")
    for step in reversed(files.checkpoint_steps(checkpoints)):
        path = os.path.join(checkpoints, f"{step:07d}.pt")
        try:
            state = files.load(path)
        except files.Damaged as error:
            note = f"passed over: {error}"
            print(note, flush=True)
            if not args.dry_run:
                with open(os.path.join(folder, "log.txt"), "a") as f:
                    f.write(note + "\n")
            continue
        check_finite(path, state)
        return path, state
    return None, None


def check_finite(path, state):
    """Raise a one-line ValueError that names the first tensor of a checkpoint with a NaN or an infinity."""
    if (name := files.first_non_finite(state)) is not None:
        raise ValueError(f"{path}: {name} is not finite; remove this checkpoint, and the run continues from "
                         "the one before")


# What a run that goes on from a released checkpoint cannot change: what its weights were made for. The order
# of its data is another one anyway, and its losses may change, which is said.
FIXED_IN_RELEASED = ("model", "vae", "resolution", "num_classes", "encoder_depth", "qk_norm", "path_type")


def check_resume(args, path, state, fixed):
    """Raise a one-line ValueError if this is no checkpoint, or its run differs in one of the settings
    `fixed`; other changed settings are printed."""
    if not isinstance(state.get("steps"), int):
        raise ValueError(f"{path}: is no training checkpoint (it has no steps)")
    if state["steps"] > args.max_train_steps:
        raise ValueError(f"{path}: is of step {state['steps']}, beyond --max-train-steps "
                         f"{args.max_train_steps}; raise that to go on")
    old = {k: v for k, v in files.training_args(state, path).items() if not torch.is_tensor(v)}
    if is_released(state):
        old["encoder"] = str(old.get("enc_type") or args.encoder).lower()
        fixed = FIXED_IN_RELEASED
    changed = {name: value for name, value in vars(args).items() if name in old and old[name] != value}
    wrong = [f"--{name.replace('_', '-')} {old[name]}, not {changed[name]}"
             for name in fixed if name in changed]
    if wrong:
        raise ValueError(f"{path}: was trained with {'; '.join(wrong)}; pass what it was trained with, or "
                         "start anew under another --exp-name")
    told = [f"--{name.replace('_', '-')} {old[name]} -> {value}"
            for name, value in changed.items() if name not in ("resume", "dry_run")]
    if told and distributed.is_main():
        print(f"changed since {path}: {', '.join(told)}", flush=True)


def check_same_start(start, device):
    """Raise ValueError unless all processes go on from one step: without a shared folder they would not."""
    both = torch.tensor([start, -start], device=device)
    if distributed.world_size() > 1:
        dist.all_reduce(both, dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise ValueError(f"processes found different checkpoints (up to step {both[0]}); all nodes need the "
                         "same --output-dir")


class CheckpointWriter:
    """Writes <folder>/checkpoints/NNNNNNN.pt while training goes on: whole or not at all, one at a time.

    In the main process; in the others its methods do nothing. `last` is the newest checkpoint that is whole.
    The thread is no daemon: Python itself ends only when it has.
    """

    def __init__(self, args, folder, last=None):
        self.folder, self.last = os.path.join(folder, "checkpoints"), last
        self.keep = args.keep_checkpoints, args.milestones_every
        self.thread = self.error = self.copy = None

    def save(self, state):
        """Begin to write `state`: as it is now, for it is copied to host memory first."""
        if distributed.is_main():
            self.wait()
            self.copy = files.host_copy(state, self.copy)
            self.thread = threading.Thread(target=self.write)
            self.thread.start()

    def write(self):
        """What the thread does: the file; then those beyond --keep-checkpoints go."""
        try:
            path = os.path.join(self.folder, f"{self.copy['steps']:07d}.pt")
            files.save(self.copy, path)
            self.last = path
            keep_newest(self.folder, self.copy["steps"], *self.keep)
        except Exception as error:  # raised in the loop, by `check`
            self.error = error

    def check(self):
        """Raise what a write has failed with: NotFinite, or OSError for a full disk."""
        if self.error is not None:
            raise self.error

    def wait(self):
        """Until nothing is being written; then `check`."""
        if self.thread is not None:
            self.thread.join()
        self.check()

    def finish(self):
        """`wait`, in the main process; the others wait for it."""
        with distributed.busy("writing its last checkpoint"):
            self.wait()
        distributed.barrier()


def keep_newest(folder, latest, count, milestones):
    """Remove checkpoints but the `count` newest (0: keep all) and multiples of `milestones` (0: none).

    Only what step `latest`, just written, supersedes: one of a later step was passed over as damaged, and
    must not push a sound one out.
    """
    steps = [step for step in files.checkpoint_steps(folder) if step <= latest]
    for step in steps[:-count] if count else []:
        if not is_milestone(step, milestones):
            os.remove(os.path.join(folder, f"{step:07d}.pt"))


def is_milestone(step, every):
    return every > 0 and step % every == 0


def claim_folder(folder, dry_run=False):
    """Lock the run folder for this process and remove what killed runs left half-written; a dry run only
    looks whether it could. By the main process; raises OSError if another run is at work there."""
    if not distributed.is_main():
        return None
    if dry_run:
        files.check_writable(os.path.join(folder, "args.json"))
        return files.lock(folder).close() if os.path.exists(os.path.join(folder, ".lock")) else None
    lock = files.lock(folder)
    for place in ("", "checkpoints", "samples", "reconstructions"):
        files.remove_leftovers(os.path.join(folder, place))
    return lock


def space_needed(nets, args, start, folder):
    """What the checkpoints of a run that goes on from step `start` take, and what is free, in a sentence.

    Raises ValueError where not even one has room. Of the main process; "" elsewhere.
    """
    if not distributed.is_main():
        return ""
    each = tensor_bytes(nets.ema.state_dict().values())
    for net in (getattr(nets, name) for name in nets.trained):
        trained = (p for p in net.parameters() if p.requires_grad)
        each += tensor_bytes(net.state_dict().values()) + 2 * tensor_bytes(trained)  # AdamW's two moments

    def between(every):  # multiples of it among the steps to come
        return args.max_train_steps // every - start // every if every else 0
    number = between(args.checkpointing_steps) + (args.max_train_steps % args.checkpointing_steps > 0)
    if args.keep_checkpoints:
        milestones = between(math.lcm(args.checkpointing_steps, args.milestones_every))
        number = min(number, args.keep_checkpoints + milestones)
    free = shutil.disk_usage(folder).free
    sizes = (f"about {each / 1e9:.3g} GB each, {number * each / 1e9:.3g} GB in all; "
             f"{free / 1e9:.3g} GB are free")
    if number > 0 and free < each:
        raise ValueError(f"{folder}: no room for a checkpoint ({sizes}); make room or give another "
                         "--output-dir")
    remedy = ", too little: make room in time or give --keep-checkpoints" if free < number * each else ""
    return f"checkpoints to keep: {number}, {sizes}{remedy}"


def tensor_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def starting():
    """Context of all before the first step: the mistakes of a user or a machine end it in one line, and so do
    signals, which find nothing to save."""
    try:
        with signals.stopped_in_one_line("before its first step; the same command starts again"):
            yield
    except (ValueError, OSError) as error:
        cli.fail(error)
    except (MemoryError, RuntimeError) as error:
        if (line := cli.memory_full(error, MEMORY_REMEDY)) is None:
            raise
        cli.fail(line)


MEMORY_REMEDY = "lower --batch-size, raise --gradient-accumulation-steps, or pass --grad-checkpoint"


@contextlib.contextmanager
def guarded(log, writer):
    """Context of the training loop, which turns what ends a run badly into one line and an exit code: 2 for a
    mistake a user can mend, 1 for a run that has collapsed or lost its disk, memory, a data worker or another
    process."""
    try:
        yield
    except (Collapse, files.NotFinite) as error:
        with contextlib.suppress(OSError, files.NotFinite):
            writer.finish() if isinstance(error, Collapse) else None    # all processes come here, or this one
        log.say(f"stopped: {error}; the last good checkpoint is {writer.last or 'none yet'}")
        sys.exit(1)
    except ImageError as error:
        cli.fail(error)
    except OSError as error:
        cli.fail(error, code=1)
    except (MemoryError, RuntimeError) as error:
        line = (worker_death(error) or cli.memory_full(error, MEMORY_REMEDY)
                or distributed.lost_process(error))
        if line is None:
            raise
        cli.fail(line, code=1)


def leave(lock):
    """The end of a run: give the folder back, leave the process group."""
    if lock is not None:
        lock.close()
    distributed.shut_down()


def write_args(args, folder):
    """<folder>/args.json: every setting, by the main process."""
    if distributed.is_main():
        with files.replace(os.path.join(folder, "args.json")) as temporary, open(temporary, "w") as f:
            json.dump(vars(args), f, indent=1)
