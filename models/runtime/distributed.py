"""Several processes: start-up from torchrun's environment, waiting for one another, and batch norm over the
batch of all of them.

Two kinds of waiting are told apart. Collectives (all_reduce, broadcast) are for the middle of a step, where
all processes are about equally far; torch ends them a little after PATIENCE. Where a process may be late
they meet in `any_process`, `barrier`, `gather`, `from_main` or `main_first`: there the others say for whom
they wait and what it does (`busy`), and end the run with its name if it stays away.
"""
import contextlib
import datetime
import math
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.nn as nn

from models.runtime import signals


# How long the others wait for a process that is silent, and for one that has said what it is busy with.
PATIENCE, LONG_PATIENCE = 10 * 60.0, 120 * 60.0     # seconds
SAY_EVERY = 60.0                                    # seconds between lines about a wait


def init():
    """Join torchrun's process group if there is one. Returns (rank, world_size, device).

    NCCL and one GPU per process where there are GPUs, gloo on CPU otherwise; plain `python` is one process,
    no group.
    """
    signals.follow_torchrun()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; "
                             f"start torchrun with --nproc-per-node {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # Longer than the others wait in `any_process`: they know the name, NCCL's watchdog does not.
        timeout = datetime.timedelta(seconds=1.2 * PATIENCE)
        with signals.at_once():     # here it waits for the others
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
            # What torchrun --max-restarts starts anew finds the store of before, with addresses of the dead.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            store.set_timeout(timeout)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, store=store,
                                    rank=rank, world_size=world_size,
                                    device_id=device if device.type == "cuda" else None)
            open_table()
    return int(os.environ.get("RANK", 0)), world_size, device


def world_size():
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """True in the process that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shut_down():
    """Leave the process group, at the end of a script."""
    if not dist.is_initialized():
        return
    store, deadline = TABLE["store"], time.monotonic() + 30
    left = store.add("left", 1)
    while is_main() and left < world_size() and time.monotonic() < deadline:
        time.sleep(0.02)    # the store may live in this process: it goes last
        left = store.add("left", 0)
    TABLE.clear()
    dist.destroy_process_group()


# ---------------------------------------------------------------- waiting for one another

TABLE = {}  # "store": keys and values that all processes see (torch's TCPStore); "meetings": their number


def open_table():
    """Connect to the store that the process group was made with,
    on a connection of our own: torch's watchdogs use the other, and would wait while we do."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          wait_for_workers=False, timeout=datetime.timedelta(seconds=PATIENCE))
    name = [f"repa-e {time.time_ns()}"]     # a store may outlive a process group
    dist.broadcast_object_list(name)
    TABLE.update(store=dist.PrefixStore(name[0], store), meetings=0)
    come_to(0)


def come_to(meeting):
    """Let the others know where this process is."""
    TABLE["meetings"] = meeting
    TABLE["store"].set(f"at {rank()}", f"{meeting} pid {os.getpid()} on {socket.gethostname()}")


@contextlib.contextmanager
def busy(what):
    """Context of work for which the others may have to wait long; `what` is what they then say it is."""
    if not dist.is_initialized():
        yield
        return
    with of_the_store():
        TABLE["store"].set(f"busy {rank()}", what)
    yield   # after an error the word stays: what follows is the end of this process
    with of_the_store():
        TABLE["store"].delete_key(f"busy {rank()}")


@contextlib.contextmanager
def of_the_store():
    """Context in which an error of the store is ConnectionError: the process that keeps it has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process has ended early; see what it says") from error


def any_process(flag):
    """Whether `flag` is true in any process; all must ask, and wait here for one another, not for GPUs.

    Raises TimeoutError, one line with the name of a process that stays away: for PATIENCE in silence, for
    LONG_PATIENCE if it is `busy`; ConnectionError if the process that keeps the store has ended.
    """
    if not dist.is_initialized():
        return bool(flag)
    store, n = TABLE["store"], TABLE["meetings"] + 1
    with of_the_store():
        if flag:
            store.set(f"flag {n}", "1")
        come_to(n)
        if store.add(f"here {n}", 1) == world_size():   # the last one to come
            store.set(f"go {n}", str(int(store.check([f"flag {n}"]))))
            for key in ("here", "flag", "go"):
                store.delete_key(f"{key} {n - 1}")
        else:
            wait_for_meeting(store, n)
        return store.get(f"go {n}") == b"1"


def wait_for_meeting(store, n):
    """Until all processes have come to the n-th meeting; see any_process."""
    began = said = time.monotonic()
    while not store.check([f"go {n}"]):
        now = time.monotonic()
        time.sleep(min(max((now - began) / 4, 1e-4), 0.1))
        if now - said < min(SAY_EVERY, PATIENCE):
            continue
        said, missing = now, absent(store, n)
        speaks = rank() == min(set(range(world_size())) - missing.keys(), default=0)  # one of those that wait
        for name, doing in missing.values():
            waited = f"{(now - began) / 60:.0f} min" if now - began >= 90 else f"{now - began:.0f} s"
            what = f"{name}, {doing or 'which is silent'}"
            if now - began >= (LONG_PATIENCE if doing else PATIENCE):
                time.sleep(0 if speaks else 30)
                raise TimeoutError(f"the others have waited {waited} for {what}; this run ends, and the same "
                                   "command goes on from its newest checkpoint")
            if speaks:
                print(f"waiting for {what} ({waited} so far)", flush=True)


def absent(store, n):
    """{rank: (name, what it is busy with or "")} of the processes that have not come to the n-th meeting."""
    found = {}
    for r in range(world_size()):
        at = store.get(f"at {r}").decode()
        doing = store.get(f"busy {r}").decode() if store.check([f"busy {r}"]) else ""
        number, _, where = at.partition(" ")
        if int(number) < n:
            found[r] = f"process {r} ({where})", doing
    return found


def barrier():
    """Wait for all processes, as any_process does."""
    any_process(False)


@contextlib.contextmanager
def main_first(what="the first to read files and weights"):
    """Context that the main process passes through before the others enter: it downloads, they find the files
    there."""
    if not is_main():
        barrier()
    with busy(what):
        yield
    if is_main():
        barrier()


def from_main(function, what="at work for all"):
    """function() run in the main process alone; every process gets its result, or raises its ValueError or
    OSError."""
    box = [None]
    if is_main():
        try:
            with busy(what):
                box = [function()]
        except (ValueError, OSError) as error:
            box = [error]
    if dist.is_initialized():
        barrier()
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def lost_process(error):
    """One line for the RuntimeError of a collective in which another process took no part, with its name.

    None for other errors. NCCL's collectives raise nothing when they last too long: a watchdog ends the
    process.
    """
    text = str(error).strip().split("\n")[0].split(". ")[0]
    if not dist.is_initialized() or not (isinstance(error, dist.DistBackendError) or "gloo/" in text):
        return None
    store = TABLE["store"]
    try:
        store.set(f"waited {rank()}", "1")
        time.sleep(min(10, PATIENCE))   # for all who waited to say so
        lost = {r for r in range(world_size()) if not store.check([f"waited {r}"])}
        names = [name for r, (name, _) in absent(store, math.inf).items() if r in lost]
    except RuntimeError:
        names = ["the process that keeps the store"]
    return f"{', '.join(names) or 'no process'} was missed in the middle of a step ({text})"


def all_reduce_sum(tensor):
    """Sum of `tensor` over all processes, in place; returned for convenience. No gradient."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """[value of each process], in every process; any object that pickles. All must call it."""
    if not dist.is_initialized():
        return [value]
    barrier()
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose moments are shared out: each process keeps and updates those of some parameters, and gets
    the others' new values from their owners (ZeRO stage 1, arXiv 1910.02054). The same updates as AdamW.

    It lists all parameters, as AdamW does; only `state` is a share. torch's ZeroRedundancyOptimizer keeps a
    second copy of the moments after a resume, and their steps on the host, which fused kernels refuse.
    """

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        self.owners, loads = {}, [0] * world_size()
        for p in sorted(self.parameters(), key=torch.numel, reverse=True):
            self.owners[p] = loads.index(min(loads))
            loads[self.owners[p]] += p.numel()

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self):
        """All processes must call it, with the same gradients."""
        for p in self.parameters():
            if self.owners[p] != rank():
                p.grad = None   # AdamW passes over it, and makes no moments
        super().step()
        for work in [dist.broadcast(p, self.owners[p], async_op=True) for p in self.parameters()]:
            work.wait()

    @torch.no_grad()
    def whole_state_dict(self):
        """AdamW's state dict of all parameters, on the host, in the main process; a share elsewhere. All must
        call it."""
        result, parameters = self.state_dict(), self.parameters()
        device = parameters[0].device
        known = all_reduce_sum(torch.tensor([float(p in self.state) for p in parameters], device=device))
        for i, p in enumerate(parameters):
            if known[i]:
                like = {"step": torch.zeros((), device=device), "exp_avg": p, "exp_avg_sq": p}
                values = self.state.get(p) or {name: torch.empty_like(t) for name, t in like.items()}
                for name in like:
                    dist.broadcast(values[name], self.owners[p])
                if is_main():
                    result["state"][i] = {name: values[name].cpu() for name in like}
        result["state"] = dict(sorted(result["state"].items()))
        return result

    def load_state_dict(self, state):
        """From a state dict of all parameters, the share of this process."""
        order = [i for group in state["param_groups"] for i in group["params"]]
        mine = {i for i, p in zip(order, self.parameters()) if self.owners[p] == rank()}
        super().load_state_dict(state | {"state": {i: v for i, v in state["state"].items() if i in mine}})


class AllReduceSum(torch.autograd.Function):
    """Sum over all processes whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.clone())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all processes' batches together, on gloo as on NCCL.

    Same state-dict entries, running statistics (unbiased variance) and gradients as one BatchNorm2d that
    sees the concatenated batch; torch's own SyncBatchNorm needs GPUs. x [B, C, H, W], the same B in every
    process.
    """

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))  # statistics in float32 under autocast
        count = x.numel() / x.shape[1] * world_size()
        mean = AllReduceSum.apply(x_wide.sum((0, 2, 3))) / count
        centred = x_wide - mean[:, None, None]
        var = AllReduceSum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        y = centred * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


def sync_batch_norms(module):
    """Turn every BatchNorm2d in `module` into SyncBatchNorm2d, in place; its entries and names stay.

    Returns it.
    """
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm2d
    return module
