"""The plumbing that both training scripts share. No loss is defined here: they say what is trained by what.

In the order in which a script calls it: the networks of a run, its settings and data, what `prepare` adds for
training, the functions around the losses of one step (micro_batches, decoder_noises, vae_forward, backward,
update), and checkpoints. Errors a user can cause are ValueError or OSError, with one line each.
"""
import contextlib
import copy
import hashlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.metrics import latent_moments
from models.runtime import cli, distributed, files
from models.runtime.data import EndlessSampler, make_loader
from models.vae import AttnBlock, Posterior, ResnetBlock

MEMORY_REMEDY = "lower --batch-size, raise --gradient-accumulation-steps, or pass --grad-checkpoint"


@dataclass
class Networks:
    """The networks of a run and what trains them: scripts declare the first block, `prepare` the second."""

    device: torch.device
    vae: nn.Module
    sit: nn.Module = None           # with its projectors; finetune_vae.py has none
    disc: nn.Module = None          # None: no GAN loss
    lpips: nn.Module = None         # None: no perceptual loss
    encoders: list = field(default_factory=list)
    trained: dict = field(default_factory=dict)     # name of each network that learns -> its learning rate
    averaged: str = "sit"           # name of the network whose weights `ema` averages

    ema: nn.Module = None
    opts: dict = field(default_factory=dict)        # name -> AdamW
    ddp: dict = field(default_factory=dict)         # name -> the network, as DistributedDataParallel
    dtype: torch.dtype = torch.float32              # of autocast; float32: none
    loss_scale: "LossScale" = None
    # What a step changes beside weights: it must not keep the NaN of a step that is skipped.
    statistics: list = field(default_factory=list)

    def autocast(self, enabled=True):
        """Context in which the networks run in `dtype`; enabled=False: in float32, within such a context."""
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=enabled and low)


# ---------------------------------------------------------------- settings and data

def check_settings(args, world_size):
    """Raise a one-line ValueError for settings of any training run that contradict each other."""
    cli.check_range(args, 1, math.inf, "batch_size", "gradient_accumulation_steps", "max_train_steps",
                    "checkpointing_steps", "log_every")
    cli.check_range(args, 0, math.inf, "seed", "num_workers", "sampling_steps", "keep_checkpoints")
    cli.check_range(args, 1e-12, math.inf, "max_grad_norm", "learning_rate", "disc_learning_rate")
    cli.check_range(args, 0, 1, "ema_decay", "adam_beta1", "adam_beta2")
    parts = world_size * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {world_size} processes x "
                         f"{args.gradient_accumulation_steps} accumulation steps")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(f"--report-to {args.report_to}: the package is not installed; "
                         f"pip install {args.report_to}")
    if args.resolution < 32 and args.disc_weight > 0 and not getattr(args, "freeze_vae", False):
        raise ValueError(f"--resolution {args.resolution} is below 32, the least that the discriminator "
                         "takes; pass --disc-weight 0")


# Settings that may differ between the processes of a run. The same files may have other paths on another
# machine: what is read from there is compared instead.
MAY_DIFFER = ("data_dir", "vae_ckpt", "disc_ckpt", "encoder_ckpt", "latents_stats", "init_from", "ckpt",
              "output_dir", "latent_cache", "num_workers")


def check_same(args, sources, state):
    """Raise ValueError unless all processes start the same run, naming what differs in which.

    Compared are settings, what the run is made of (`sources`, see check_sources) and the averaged weights of
    the checkpoint `state`, if there is one. Weights that learn from step 0 are those of rank 0 everywhere.
    """
    values = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()
              if name not in MAY_DIFFER}
    for name, value in sources.items():
        values[name] = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    if state is not None and distributed.world_size() > 1:
        values["the checkpoint"] = [state["steps"], *(files.state_digest(weights) for name, weights
                                                      in state.items() if name in AVERAGES.values())]
    distributed.check_same(values)


def data_loader(args, dataset, device, step, workers):
    """This process's share of the batches after `step`, endless: (uint8 images [b, 3, R, R], labels [b]), and
    from cache.Latents also mean and std of the posteriors, each [b, C, h, w]."""
    rank, world_size = distributed.rank(), distributed.world_size()
    sampler = EndlessSampler(len(dataset), args.batch_size, rank, world_size, args.seed, start_step=step)
    return iter(make_loader(dataset, sampler, args.batch_size // world_size, workers, device))


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
    for _, (images, _, *latents) in zip(range(batches), loader):
        if latents:     # of a cache
            mean, std = (v.to(device) for v in latents)
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
    nets.ema = copy.deepcopy(getattr(nets, nets.averaged)).eval().requires_grad_(False)
    nets.dtype = cli.autocast_type(args.mixed_precision, nets.device)
    nets.loss_scale = LossScale(nets.dtype == torch.float16, nets.device)
    if args.grad_checkpoint:
        nets.vae.save_memory()
        if nets.sit is not None:
            nets.sit.grad_checkpoint = True
    if compiled:
        compile_blocks(nets)


def wants_compile(args, device):
    """Whether blocks are compiled: by flag, else on a GPU where all that torch's compiler needs is there."""
    if args.compile is not None or device.type != "cuda":
        return bool(args.compile)
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    complete = importlib.util.find_spec("triton") is not None and compiler and os.path.exists(header)
    if not complete:
        note("not compiled, which costs speed: that needs triton, a C compiler and Python.h")
    return complete


def adamw(parameters, args, learning_rate):
    """AdamW over `parameters`, fused: it can skip a step on a tensor's say-so, unread by the host."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                             eps=args.adam_epsilon, weight_decay=args.adam_weight_decay, fused=True)


def wrap_ddp(net, device):
    """`net`, in DistributedDataParallel for several processes. Synced batch norms keep the buffers equal."""
    if distributed.world_size() == 1:
        return net
    return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None,
                                   broadcast_buffers=False,
                                   gradient_as_bucket_view=True)  # no second copy of all gradients


def compile_blocks(nets):
    """torch.compile the repeated blocks one by one, in place: equal ones share their code, which takes
    seconds instead of the minutes that whole networks take."""
    # every width and resolution of the VAE is one more graph of the same code
    torch._dynamo.config.cache_size_limit = 64
    # In DistributedDataParallel the compiler would cut every block of over 1 MB into pieces, to send
    # gradients while it runs backward; block by block they are sent early enough.
    torch._dynamo.config.optimize_ddp = False
    blocks = [m for m in nets.vae.modules() if isinstance(m, (ResnetBlock, AttnBlock))]
    for half in (nets.vae.encoder, nets.vae.decoder):   # norm, SiLU and convolution at their ends
        half.output = torch.compile(half.output, dynamic=False)
    if nets.sit is not None:
        blocks += nets.sit.blocks   # not the average's: it samples now and then only
    for encoder in nets.encoders:
        blocks += getattr(getattr(encoder, "model", None), "blocks", ())
    for block in blocks:
        block.compile(dynamic=False)


class LossScale(nn.Module):
    """Dynamic loss scale of fp16 training, kept on the device: halved when a step is skipped, doubled after
    2,000 good ones. Constant 1 when not enabled. `value` multiplies every loss before its backward pass."""

    def __init__(self, enabled, device):
        super().__init__()
        self.enabled = enabled
        self.register_buffer("value", torch.tensor(65536.0 if enabled else 1.0, device=device))
        self.register_buffer("good_steps", torch.zeros((), device=device))

    def update(self, skip):
        if self.enabled:
            self.good_steps = torch.where(skip > 0, 0.0, self.good_steps + 1)
            grow = self.good_steps >= 2000
            grown = torch.where(grow, self.value * 2, self.value)
            self.value = torch.where(skip > 0, self.value * 0.5, grown)
            self.good_steps = torch.where(grow, 0.0, self.good_steps)


# ---------------------------------------------------------------- around the losses of one step

def micro_batches(batch, n):
    """A namespace of tensors [b, ...] and lists of such -> n namespaces, each with its part of every one."""
    parts = [SimpleNamespace() for _ in range(n)]
    for name, value in vars(batch).items():
        for i, part in enumerate(parts):
            cut = [v.chunk(n)[i] for v in value] if isinstance(value, list) else value.chunk(n)[i]
            setattr(part, name, cut)
    return parts


@torch.no_grad()
def decoder_noises(nets, args, parts):
    """What is added to the latents that the decoder sees: [b, C, h, w] for each micro-batch, or None.

    Gaussian noise of --decoder-noise times the latents' standard deviation, per channel over the global
    batch, for which the encoder runs once more. A decoder that is trained with it tolerates the errors that a
    diffusion model makes (representation autoencoders do so, arXiv 2510.11690).
    """
    if not args.decoder_noise:
        return [None] * len(parts)
    with nets.autocast():
        z = torch.cat([Posterior(nets.vae.moments(part.images)).sample(part.eps) for part in parts]).double()
    sums = torch.stack([z.mean((0, 2, 3)), z.square().mean((0, 2, 3))])
    mean, square = distributed.all_reduce_sum(sums) / distributed.world_size()
    std = (square - mean.square()).sqrt().float()[:, None, None]
    return [args.decoder_noise * std * part.decoder_noise for part in parts]


def vae_forward(nets, parts, noises):
    """The VAE's forward pass over the micro-batches of a step, before any gradient is taken.

    Returns (outputs, z, recon): latents z [b, C, h, w] and reconstructions [b, 3, R, R] of the whole batch,
    detached, which the batch norms of SiT and discriminator must see at once. The one output of a single
    micro-batch keeps its graph for `vae_outputs`. Several are run without (outputs are None) and again with
    it, one at a time: that is what accumulation costs, and what it saves.
    """
    keep = len(parts) == 1
    vae = nets.ddp["vae"] if keep else nets.vae
    with torch.set_grad_enabled(keep), nets.autocast():
        outputs = [vae(part.images, part.eps, noise) for part, noise in zip(parts, noises)]
    z, recon = (torch.cat([output[k].detach() for output in outputs]) for k in (1, 2))
    return outputs if keep else [None] * len(parts), z, recon


def vae_outputs(nets, part, noise, output):
    """(moments [b, 2C, h, w], z [b, C, h, w], r [b, 3, R, R]) of a micro-batch, with their graph: `output` of
    vae_forward, computed now where that is None."""
    return nets.ddp["vae"](part.images, part.eps, noise) if output is None else output


def with_gradient(value, x, gradient):
    """A scalar equal to `value` whose gradient at x is `gradient`: a loss computed elsewhere joins a sum."""
    product = (x.to(gradient.dtype) * gradient).sum()
    return value + (product - product.detach())


def backward(nets, name, total, losses_of, *columns):
    """Add the gradient of a loss, averaged over micro-batches, to the weights of network `name`.

    The one place for autocast, the loss scale, the mean over micro-batches, and the exchange with other
    processes, which waits for the last micro-batch. columns: lists with one entry per micro-batch;
    losses_of(*entries) returns scalars by name, of which losses_of(...)[total] is the loss. Their means over
    the micro-batches are returned, detached.
    """
    rows, means = list(zip(*columns, strict=True)), {}
    for i, row in enumerate(rows):
        exchange = i == len(rows) - 1 or not isinstance(nets.ddp[name], DistributedDataParallel)
        with contextlib.nullcontext() if exchange else nets.ddp[name].no_sync():
            with nets.autocast():
                losses = losses_of(*row)
            (nets.loss_scale.value * losses[total] / len(rows)).backward()
        for key, loss in losses.items():
            means[key] = means.get(key, 0) + loss.detach() / len(rows)
    return means


def update(nets, args, metrics, before):
    """Clip, one step of each optimiser, the average. Adds the gradient norms to `metrics`.

    If a metric is not finite in any process, no process learns from the step: weights and moments stay,
    `before` (a copy of nets.statistics from the beginning of the step) is put back; the average goes on, and
    so does the loss scale. Returns skip: 1.0 in that case, else 0.0.
    """
    for name in nets.trained:
        parameters = [p for p in getattr(nets, name).parameters() if p.requires_grad]
        if nets.loss_scale.enabled:     # undo it
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / nets.loss_scale.value)
        metrics[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm, foreach=True)
    finite = torch.stack([value.double() for value in metrics.values()]).isfinite().all()
    skip = distributed.all_reduce_sum((~finite).float()).clamp(max=1)
    guarded_updates(nets.opts.values(), skip)
    for buffer, old in zip(nets.statistics, before):
        buffer.copy_(torch.where(skip > 0, old, buffer))
    nets.loss_scale.update(skip)
    update_ema(nets.ema, getattr(nets, nets.averaged), args.ema_decay)
    return skip


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
WEIGHTS = {"sit": "model", "vae": "vae", "disc": "discriminator"}
OPTIMISERS = {"sit": "opt", "vae": "opt_vae", "disc": "opt_disc"}
AVERAGES = {"sit": "ema", "vae": "vae_ema"}


def claim_folder(folder, dry_run=False):
    """Lock the run folder for this process and remove what killed runs left half-written; returns the lock.

    In the main process; raises OSError if another run works there, or where nothing can be written, which is
    all that a dry run looks at.
    """
    if not distributed.is_main():
        return None
    places = [os.path.join(folder, name) for name in ("checkpoints", "samples", "reconstructions")]
    for place in (folder, *places):
        files.check_writable(os.path.join(place, "file"))
    if dry_run:
        return None
    lock = files.lock(folder)
    files.remove_temporaries(folder, *places)
    return lock


def newest_checkpoint(folder):
    """(path, state) of the newest sound checkpoint of a run folder, or (None, None).

    A file that is proved damaged is passed over, with a note. Any other trouble with one stops the run, which
    would otherwise start from scratch and push the sound checkpoints out: OSError, or ValueError for a file
    of something else and for weights that are not finite.
    """
    folder = os.path.join(folder, "checkpoints")
    for step in reversed(files.checkpoint_steps(folder)):
        path = os.path.join(folder, f"{step:07d}.pt")
        try:
            state = files.load(path)
        except files.Damaged as error:
            note(f"passed over: {error}")
            continue
        if bad := files.first_non_finite(state):
            raise ValueError(f"{path}: {bad} is not finite; remove this checkpoint, and the run resumes from "
                             "the one before")
        return path, state
    return None, None


def note(text):
    """One line on the terminal, of the main process."""
    if distributed.is_main():
        print(text, flush=True)


def check_resume(args, path, state, fixed):
    """Raise a one-line ValueError if this is not a checkpoint of ours, or its run differs in one of the
    settings `fixed`; other changed settings are printed."""
    if not isinstance(state.get("args"), dict) or not isinstance(state.get("steps"), int):
        raise ValueError(f"{path}: is not a checkpoint that this code wrote; start from its weights with "
                         "--init-from")
    if state["steps"] > args.max_train_steps:
        raise ValueError(f"{path}: is of step {state['steps']}, beyond --max-train-steps "
                         f"{args.max_train_steps}; raise that to resume")
    old = state["args"]
    changed = {name: value for name, value in vars(args).items() if old.get(name, value) != value}
    wrong = [f"--{name.replace('_', '-')} {old[name]}, not {changed[name]}"
             for name in fixed if name in changed]
    if wrong:
        raise ValueError(f"{path}: was trained with {'; '.join(wrong)}; pass what it was trained with, or "
                         "start from scratch under another --exp-name")
    told = [f"--{name.replace('_', '-')} {old[name]} -> {value}"
            for name, value in changed.items() if name != "dry_run"]
    if told:
        note(f"changed since {path}: {', '.join(told)}")


def check_sources(args, path, state, sources):
    """Raise a one-line ValueError if a run resumes with other data classes or frozen networks than before.

    sources: what a run was made of and every checkpoint repeats: "data" (data.identity), of a frozen VAE
    "vae_digest", of the alignment encoders "encoder_digests" ({name: digest}). Other images of the same
    classes are allowed, and printed.
    """
    before, now = state.get("data", sources["data"]), sources["data"]
    classes = itertools.zip_longest(before["classes"], now["classes"])
    if changed := [f"{was} is now {found}" for was, found in classes if was != found]:
        # labels would change their meaning
        raise ValueError(f"{path}: the classes of {args.data_dir} have changed, {changed[0]}; restore them, "
                         "or start a new run with another --exp-name")
    if before != now:
        note(f"the data has changed: other files or labels, {now['images']} images, before "
             f"{before['images']}")
    if state.get("vae_digest", sources.get("vae_digest")) != sources.get("vae_digest"):
        raise ValueError(f"{path}: was trained on another VAE than {args.vae_ckpt} now is; name that one")
    for name, digest in sources.get("encoder_digests", {}).items():
        if state.get("encoder_digests", {}).get(name, digest) != digest:
            raise ValueError(f"{path}: was aligned with other weights of encoder {name}; give those with "
                             "--encoder-ckpt")


def save_checkpoint(nets, args, step, folder, **more):
    """Write <folder>/checkpoints/NNNNNNN.pt atomically, then remove those beyond --keep-checkpoints.

    It contains weights, their average, optimisers, `more`, loss scale, settings (a dict) and step. In the
    main process; returns the path in all. Only what this step supersedes is removed: a file of a later step
    was passed over as damaged, and must not push a sound one out. Raises NotFinite, or OSError for a full
    disk.
    """
    checkpoints = os.path.join(folder, "checkpoints")
    path = os.path.join(checkpoints, f"{step:07d}.pt")
    if not distributed.is_main():
        return path
    state = {}
    for name in nets.trained:
        state[WEIGHTS[name]] = getattr(nets, name).state_dict()
        if name == nets.averaged:
            state[AVERAGES[name]] = nets.ema.state_dict()
        state[OPTIMISERS[name]] = nets.opts[name].state_dict()
    state |= more | {"loss_scale": nets.loss_scale.state_dict(), "args": vars(args), "steps": step}
    files.save(state, path)
    steps = [s for s in files.checkpoint_steps(checkpoints) if s <= step]
    for old in steps[:-args.keep_checkpoints] if args.keep_checkpoints else []:
        os.remove(os.path.join(checkpoints, f"{old:07d}.pt"))
    return path


def restore(nets, path, state):
    """Put a checkpoint's networks, optimisers and loss scale in place. Returns its step."""
    named = {AVERAGES[nets.averaged]: nets.ema}
    named |= {WEIGHTS[name]: getattr(nets, name) for name in nets.trained}
    for key, net in named.items():
        files.load_weights(net, state.get(key), f"{path} ({key})")
    for name, optimizer in nets.opts.items():
        load_optimizer(optimizer, state[OPTIMISERS[name]])
    nets.loss_scale.load_state_dict(state["loss_scale"])
    return state["steps"]


def load_optimizer(optimizer, state):
    """Load an optimiser's state but keep the learning rate and the other settings of this run's flags."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    for p, values in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            # The fused kernels pair a weight with its moments by their places in memory.
            values[name] = torch.empty_like(p).copy_(values[name])
