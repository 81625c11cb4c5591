"""Several processes: start-up from torchrun's environment, and batch norm over the batch of all of them."""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist
import torch.nn as nn

from models.runtime import signals


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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=60),
                                device_id=device if device.type == "cuda" else None)
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


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def shut_down():
    """Leave the process group, at the end of a script."""
    _HOST_GROUP.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first():
    """Context that the main process passes before the others enter: it downloads, they find the files."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


_HOST_GROUP = []


def any_process(flag):
    """Whether `flag` is true in any process; all must ask at the same moment.

    Waits for the other processes, not for GPUs.
    """
    if not dist.is_initialized():
        return bool(flag)
    if not _HOST_GROUP:  # gloo beside NCCL: a flag on the host should not queue behind kernels
        nccl = dist.get_backend() == "nccl"
        _HOST_GROUP.append(dist.new_group(backend="gloo") if nccl else dist.group.WORLD)
    both = torch.tensor([float(bool(flag))])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=_HOST_GROUP[0])
    return both.item() > 0


def from_main(function):
    """function() run in the main process alone.

    Every process gets its result, or raises its ValueError or OSError.
    """
    box = [None]
    if is_main():
        try:
            box = [function()]
        except (ValueError, OSError) as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def all_reduce_sum(tensor):
    """Sum of `tensor` over all processes, in place; returned for convenience. No gradient."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """[value of each process], in every process; any object that pickles. All must call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
