"""Several processes: start-up from torchrun's environment, waiting for one another, batch norm over all.

Without torchrun everything here works for one process and returns at once.
"""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist
import torch.nn as nn

PATIENCE = datetime.timedelta(minutes=30)   # a process that the others wait for this long ends the run
META = None     # a gloo group next to NCCL's: its barrier waits on the host and names the missing ranks


def init():
    """Join torchrun's process group if there is one. Returns (rank, world_size, device).

    NCCL with one GPU per process where there are GPUs, gloo otherwise. Raises ValueError for more processes
    than GPUs.
    """
    global META
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise ValueError("srun started several processes, each of which would run alone; start torchrun in "
                         "one task per node, or unset SLURM_NTASKS to run one process")
    device = choose_device()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, rank_, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        # After torchrun --max-restarts the store still has the addresses of the dead: a prefix per restart.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank_, world_size=size, timeout=PATIENCE)
        META = dist.new_group(backend="gloo", timeout=PATIENCE)
    return rank(), world_size(), device


def choose_device():
    """This process's device: cuda:LOCAL_RANK, or the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"process {local_rank} has no GPU: there are {count}; "
                         f"use torchrun --nproc-per-node {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def world_size():
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """True in the process that writes files and prints."""
    return rank() == 0


def shut_down():
    """Leave the process group, at the end of a script. The store lives in rank 0, so all leave together."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------- waiting for one another

def barrier():
    """Wait for all processes.

    Raises ConnectionError after PATIENCE, with the missing ranks, or as soon as another process has died.
    """
    if dist.is_initialized():
        try:
            dist.monitored_barrier(META, timeout=PATIENCE, wait_all_ranks=True)
        except RuntimeError as error:
            raise ConnectionError(lost_process(error)) from error


def lost_process(error):
    """One line for the RuntimeError of a collective that another process did not join; None for others."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, dist.DistBackendError) or "gloo" in text or "monitoredBarrier" in text:
        return f"another process has ended or hangs, see its own message ({text[:150]})"
    return None


def any_process(flag):
    """Whether `flag` is true in any process. All must ask, and wait here for one another, not for GPUs."""
    barrier()
    flag = torch.tensor(float(bool(flag)))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=META)
    return bool(flag)


@contextlib.contextmanager
def main_first():
    """Context that the main process passes through before the others: it downloads, they find the files."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def gather(value):
    """[value of each process], in every process; any object that pickles. All must call it."""
    values = [value]
    if dist.is_initialized():
        barrier()
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=META)
    return values


def check_same(values):
    """Raise ValueError unless all processes have the same `values`, a dict of what a run depends on.

    Processes with other settings, data or weights would train and sample to the end, and the result would be
    wrong without a word. The error names the first entry that differs and the two ranks.
    """
    first, *others = gather(values)
    for number, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(f"{name} differs between processes: {first.get(name)} in rank 0, "
                                 f"{other.get(name)} in rank {number}; start all of them with the same "
                                 "command, data and weights")


# ---------------------------------------------------------------- sums and batch norm over all processes

def all_reduce_sum(tensor):
    """Sum of `tensor` over all processes, in place; returned for convenience. No gradient."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


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

    Same state-dict entries, running statistics (unbiased variance) and gradients as one BatchNorm2d that sees
    the concatenated batch; torch's own SyncBatchNorm needs GPUs. x [B, C, H, W], the same B in every process.
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
    """Turn every BatchNorm2d in `module` into SyncBatchNorm2d, in place; returns it. All names stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm2d
    return module
