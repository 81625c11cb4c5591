"""How much GPU memory a training step takes and what holds it, counted without a GPU.

Every operation runs on fake CUDA tensors, which have shapes, types and storages but no numbers.

    count = memory.training_peak(args, build, step)
    print(count.table())

`python train_repae_e.py --dry-run` prints it, with what to do where it does not fit.

Not counted: the CUDA context (about 0.6 GiB), cuDNN's workspaces, and what the allocator loses to
fragmentation.
"""
import argparse
import contextlib
import heapq
import unittest.mock
import warnings
import weakref

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from models.lpips import LPIPS
from models.runtime import trainer

GIB = 2 ** 30


class Count:
    """Context in which CUDA tensors are fake and counted.

    Attributes: `bytes` in use now by holder, `now` their sum, `peak` the largest sum since the start or
    reset_peak, `at_peak` what `bytes` was then, `phases` the peak of each phase.
    """

    def __init__(self):
        self.bytes, self.now, self.holder, self.phase = {}, 0, "weights", "start"
        self.storages = {}  # id of a living storage: [its weak reference, bytes, holder]
        self.buckets = {}   # parameter: where DistributedDataParallel keeps its gradient
        self.reset_peak()

    def __enter__(self):
        fake, self.contexts = FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack()
        enter = self.contexts.enter_context
        patch = lambda *names, to: enter(unittest.mock.patch(".".join(names), to))  # noqa: E731
        # What asks for a GPU although nothing is computed: autocast, random numbers, the choice of an
        # attention kernel, and the backward pass, whose C++ engine wants a CUDA context.
        patch("torch.cuda.amp.common.amp_definitely_not_available", to=lambda: False)
        patch("torch.cuda.is_bf16_supported", to=lambda *a, **k: True)
        patch("torch.Generator", to=lambda device=None, make=torch.Generator: make())
        patch("torch.nn.functional.scaled_dot_product_attention", to=attention)
        patch("torch.autograd._engine_run_backward", to=self.backward)
        patch("torch._C._current_graph_task_id", to=lambda: 0)
        patch("torch.nn.Module.to", to=to_device)
        enter(unittest.mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode,
                                         create=True))
        enter(fake)
        enter(_Watch(self))
        enter(saved_tensors_hooks(_Saved, self.unpack))
        enter(torch.device("cuda"))
        return self

    def __exit__(self, *error):
        return self.contexts.__exit__(*error)

    # -------------------------------------------------------------------------------------- the count

    def add(self, tensor):
        """Count the tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        size = -(-storage.nbytes() // 512) * 512  # the allocator's unit

        def freed(_):
            _, size, holder = self.storages.pop(key)
            self.bytes[holder] -= size
            self.now -= size
        self.storages[key] = [weakref.ref(storage, freed), size, self.holder]
        self.bytes[self.holder] = self.bytes.get(self.holder, 0) + size
        self.now += size
        self.phases[self.phase] = max(self.phases.get(self.phase, 0), self.now)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.bytes)

    def hold(self, holder, tensors):
        """Say that `holder` is who holds these tensors, whatever made them."""
        for tensor in tensors:
            entry = self.storages.get(tensor.untyped_storage()._cdata)
            if entry is not None:
                self.bytes[entry[2]] -= entry[1]
                self.bytes[holder] = self.bytes.get(holder, 0) + entry[1]
                entry[2] = holder

    @contextlib.contextmanager
    def holding(self, holder):
        """Context whose new tensors are held by `holder`."""
        before, self.holder = self.holder, holder
        yield
        self.holder = before

    def watch(self, **modules):
        """From now on what a module's forward pass makes is held by the name it is given here.

        What is made outside of them is held by "other", parameters' gradients by "gradients", and what else
        the backward pass makes by "backward".
        """
        self.holder = "other"
        for name, module in modules.items():
            if module is None:
                continue
            outer = []

            def enter(*_, name=name, outer=outer):
                outer.append(self.holder)
                self.holder = name

            def leave(*_, outer=outer):
                self.holder = outer.pop()
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)

    def reset_peak(self):
        self.peak, self.at_peak, self.phases = self.now, dict(self.bytes), {}

    def in_phase(self, name, function):
        """`function`, during which the phase is name(its arguments)."""
        def wrapped(*args, **kwargs):
            before, self.phase = self.phase, name(*args)
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before
        return wrapped

    def table(self):
        """The peak and who held it, largest first, and the peaks of the step's phases, as lines of text."""
        rows = sorted(((size, holder) for holder, size in self.at_peak.items() if size), reverse=True)
        phases = ", ".join(f"{PHASES[name]} {size / GIB:.1f}" for name, size in self.phases.items()
                           if name in PHASES)
        lines = [f"{size / GIB:7.2f} GiB  {holder}" for size, holder in [(self.peak, "peak"), *rows]]
        return "\n".join([*lines, f"by phase: {phases}"])

    # ------------------------------------------------------------------------------ the backward pass

    def backward(self, outputs, gradients, retain_graph, create_graph, inputs, allow_unreachable=True,
                 accumulate_grad=True):
        """What torch's engine does behind backward() and autograd.grad().

        The graph's nodes run, the latest made first, and each one's saved tensors are freed after it. Returns
        the gradients at `inputs`, None where nothing arrives.
        """
        with self.holding("backward"), torch.set_grad_enabled(create_graph):
            wanted = [get_gradient_edge(t)[:2] for t in inputs]
            found, roots = [None] * len(wanted), [get_gradient_edge(t)[:2] for t in outputs]
            useful = leads_to({node for node, _ in wanted}, [node for node, _ in roots]) if wanted else None
            waiting, queue = {}, []  # node -> {output: gradient}; nodes to run, the latest made first

            def send(node, index, gradient):
                if node is None or gradient is None or (useful is not None and node not in useful):
                    return
                metadata = node._input_metadata[index]
                if gradient.shape != metadata.shape:  # of a broadcast input
                    gradient = gradient.sum_to_size(metadata.shape)
                gradient = gradient.to(metadata.dtype)
                if node not in waiting:
                    waiting[node] = {}
                    heapq.heappush(queue, (-node._sequence_nr(), id(node), node))
                old = waiting[node].get(index)
                if old is None:
                    waiting[node][index] = gradient
                elif sum(g is old for grads in waiting.values() for g in grads.values()) == 1:
                    old += gradient
                else:
                    waiting[node][index] = old + gradient

            for (node, index), gradient in zip(roots, gradients):
                send(node, index, gradient)
            del gradient
            while queue:
                node = heapq.heappop(queue)[2]
                grads = waiting.pop(node)
                for k, (end, index) in enumerate(wanted):
                    if end is node:
                        found[k] = grads.get(index)
                if useful is not None and not useful[node] and not accumulate_grad:
                    continue
                results = self.run(node, grads, retain_graph)
                for (following, index), gradient in zip(node.next_functions, results, strict=True):
                    send(following, index, gradient)
                    del gradient
                del results, grads  # a GPU's engine holds none of them any longer
            return tuple(found)

    def run(self, node, grads, retain_graph):
        """The gradients that one node of the graph passes on."""
        if node.name() == "torch::autograd::AccumulateGrad":
            parameter = node.variable
            if parameter.grad is not None:
                parameter.grad += grads[0]
            elif parameter in self.buckets:
                parameter.grad = self.buckets[parameter]
            else:
                parameter.grad = grads[0].detach()
                self.hold("gradients", [parameter.grad])
            return ()
        metadata = node._input_metadata
        arguments = [grads.pop(i, None) for i in range(len(metadata))]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            arguments = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if a is None else a
                         for a, m in zip(arguments, metadata)]
            call = node.apply
        else:
            call = node
        self.used = []
        results = call(*arguments)
        if not retain_graph:
            for saved in self.used:
                saved.tensor = None
        results = results if isinstance(results, tuple) else (results,)
        # A Function's arguments that are no tensors come last and have no node.
        return results[:len(node.next_functions)]

    def unpack(self, saved):
        self.used.append(saved)
        return saved.tensor


# What the phases of a step are called, by functions of models/runtime/trainer.py (backward's by its total).
PHASES = {"first_pass": "VAE forward", "gan_gradient": "GAN", "vae_loss": "VAE backward",
          "d_loss": "discriminator", "sit_loss": "SiT", "update": "update"}


def training_peak(args, build, step, world_size=1):
    """The Count of a training run's second step on each of `world_size` GPUs.

    (The first has no optimiser states yet.) With several GPUs all gradients live in DistributedDataParallel's
    buckets, which are there all the time.
    The blocks are counted uncompiled: what the compiler keeps for the backward pass is the same.

    Args:
        args: settings of a training script. Nothing is read from disk: all networks have random weights.
        build(args, device): the run's trainer.Networks, before trainer.prepare.
        step(nets, args, images, labels): one step on uint8 images [b, 3, R, R] and labels [b].
    """
    args = argparse.Namespace(**vars(args))
    args.compile = False
    with Count() as count, contextlib.ExitStack() as patches:
        patches.enter_context(warnings.catch_warnings())
        # Of a fake tensor, by torch's own deepcopy.
        warnings.filterwarnings("ignore", message="Accessing the data pointer")

        def patch(name, function):
            patches.enter_context(unittest.mock.patch(f"models.{name}", function))

        def wrap_ddp(net, _):
            if world_size > 1:
                count.buckets |= {p: torch.empty_like(p) for p in net.parameters() if p.requires_grad}
            return net
        patch("runtime.weights.lpips", LPIPS)
        patch("encoders._fitting", lambda *a: {})
        patch("encoders._fetch", lambda *a: {})
        patch("runtime.distributed.world_size", lambda: world_size)
        patch("runtime.distributed.rank", lambda: 0)
        patch("runtime.distributed.all_reduce_sum", lambda x: x)
        patch("runtime.trainer.wrap_ddp", wrap_ddp)
        patches.enter_context(unittest.mock.patch("torch.distributed.broadcast"))  # of ShardedAdamW
        for name in ("first_pass", "gan_gradient", "update"):
            function = getattr(trainer, name)
            patch(f"runtime.trainer.{name}", count.in_phase(lambda *a, name=name: name, function))
        patch("runtime.trainer.backward", count.in_phase(lambda *a: a[3], trainer.backward))

        nets = build(args, torch.device("cuda"))
        trainer.prepare(nets, args)
        count.hold("EMA", nets.ema.parameters())
        count.hold("DDP's buckets", count.buckets.values())
        for optimizer in nets.opts.values():  # as a first step would leave it
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = count.buckets.get(p, torch.empty_like(p))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for state in optimizer.state.values():
                count.hold("optimisers' states", state.values())
        encoders = {f"encoder {e.name}": e for e in nets.encoders}
        count.watch(VAE=nets.vae, VGG=nets.lpips, SiT=nets.sit, discriminator=nets.disc, **encoders)
        share = args.batch_size // world_size
        with torch.device("cpu"):   # where a step's data come from
            images = torch.zeros(share, 3, args.resolution, args.resolution, dtype=torch.uint8)
            labels = torch.zeros(share, dtype=torch.long)
        count.reset_peak()
        step(nets, args, images, labels)
    return count


# GPUs that people have, in GiB, and what a run takes beside what is counted: the CUDA context, cuDNN's
# workspaces, fragmentation.
SIZES, BESIDE = (24, 40, 48, 80, 141), 2.0


def countable():
    """Whether a Count works here: before 2.10 torch asks the GPU's driver even where tensors are fake."""
    return torch.cuda.is_available() or torch.__version__ >= (2, 10)


def forecast(args, build, step, world_size=1):
    """What --dry-run says about memory: the predicted peak per GPU, what holds it, where it fits, a remedy.

    It looks at the GPU at hand, or at SIZES if there is none. Arguments as for training_peak.
    """
    missing = list(SIZES)
    if torch.cuda.is_available():
        missing = [torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB]
    elif not countable():
        return f"peak per GPU: not predicted; torch {torch.__version__} needs a GPU for it, 2.10 does not"
    lines, least = [], float("inf")
    for flags, more in thriftier(args, world_size):
        count = training_peak(more, build, step, world_size)
        if not lines:
            lines = [f"predicted peak per GPU ({world_size} x {args.batch_size // world_size} images; CUDA's "
                     f"context, cuDNN's workspaces, fragmentation come on top, about {BESIDE:g} GiB):",
                     count.table()]
        need = count.peak / GIB + BESIDE
        if fits := [f"{size:.3g}" for size in missing if need <= size]:
            lines.append(f"GPUs of {', '.join(fits)} GiB: {f'add {flags}' if flags else 'fits'} "
                         f"({count.peak / GIB:.1f} GiB)")
        missing = [size for size in missing if need > size]
        if not missing or ("accumulation" in flags and count.peak > 0.97 * least):
            break  # what remains are weights and the discriminator's whole batch
        least = count.peak
    if missing:
        sizes = ", ".join(f"{size:.3g}" for size in missing)
        lines.append(f"GPUs of {sizes} GiB: too small, unless more of them share the batch "
                     f"(with {flags}: {count.peak / GIB:.1f} GiB)")
    return "\n".join(lines)


def thriftier(args, world_size):
    """(flags to add, settings) that need less and less memory.

    First args as they are, then with recomputation, then with more and more accumulation.
    """
    more = argparse.Namespace(**vars(args))
    yield "", more
    if not more.grad_checkpoint:
        more.grad_checkpoint = True
        yield "--grad-checkpoint", more
    while args.batch_size % (2 * world_size * more.gradient_accumulation_steps) == 0:
        more.gradient_accumulation_steps *= 2
        flags = "" if args.grad_checkpoint else "--grad-checkpoint "
        yield f"{flags}--gradient-accumulation-steps {more.gradient_accumulation_steps}", more


class _Saved:
    """A tensor that the graph keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


class _Watch(TorchDispatchMode):
    """Shows every operation's results to a Count."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            # Any number: nothing that takes memory depends on one.
            return 0.5 if args[0].is_floating_point() else 1
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.is_cuda:
                self.count.add(result)
        return results


def to_device(module, *args, **kwargs):
    """Module.to of a device: fake parameters cannot be moved, only made anew. Other changes are left out."""
    device = next((torch.device(a).type for a in args if isinstance(a, (str, torch.device))), None)
    if device is None:
        return module
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.device.type != device:
                setattr(part, name, torch.nn.Parameter(torch.empty_like(p, device=device), p.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.device.type != device:
                setattr(part, name, torch.empty_like(buffer, device=device))
    return module


def leads_to(ends, roots):
    """{node: whether it leads to one of `ends` (further on, if it is one)} for the nodes that do or are."""
    state, stack = {}, list(roots)  # state: None while a node's followers are looked at
    while stack:
        node = stack[-1]
        followers = [f for f, _ in node.next_functions if f is not None]
        new = [f for f in followers if f not in state]
        if node not in state and new:
            state[node] = None
            stack += new
            continue
        stack.pop()
        state[node] = any(state.get(f) or f in ends for f in followers)
    return {node: leads for node, leads in state.items() if leads or node in ends}


def attention(q, k, v, attn_mask=None, dropout_p=0.0, **more):
    """scaled_dot_product_attention by a GPU's kernels: flash, or efficient for float32 and wide heads."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype == torch.float32 or q.shape[-1] > 256:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask,
                                                                      torch.is_grad_enabled())[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
