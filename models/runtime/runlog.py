"""The log of one training run: what is written, and the watch on a collapse."""
import contextlib
import json
import math
import os
import resource
import sys
import time

import torch

from models.runtime import distributed, files


class Collapse(RuntimeError):
    """Training has stopped learning; the message names the step, the sign and the last good checkpoint."""


class RunLog:
    """The log of one run: sums metrics on the device, reads them every log_every steps, writes and watches.

    Files in `folder`: log.txt (what the terminal showed), metrics.jsonl (one object per logged step). Only the main
    process writes; all processes take part in the sums.
    """

    def __init__(self, folder, args, flops_per_image=None, peak_flops=None):
        self.folder, self.args, self.main = folder, args, distributed.is_main()
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.names, self.sums, self.counted = None, None, 0
        self.in_a_row, self.longest, self.largest_norms = None, None, {}
        self.started = self.last = time.perf_counter()
        self.writers = []
        if self.main:
            os.makedirs(folder, exist_ok=True)
            self.writers = open_writers(args.report_to, folder, args)

    def say(self, text):
        """One line to the terminal and log.txt."""
        if self.main:
            print(text, flush=True)
            with open(os.path.join(self.folder, "log.txt"), "a") as f:
                f.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")

    def rewind(self, step):
        """Drop metrics.jsonl's lines after `step`: a resumed run writes them again."""
        path = os.path.join(self.folder, "metrics.jsonl")
        if self.main and os.path.exists(path):
            kept = []
            with open(path) as f:
                for line in f:
                    try:
                        kept += [line] if json.loads(line)["step"] <= step else []
                    except ValueError:  # cut off when the run was killed
                        break
            with files.replace(path) as temporary, open(temporary, "w") as f:
                f.writelines(kept)

    def add(self, metrics, skip):
        """Add one step's metrics (dict of scalar tensors); those of a skipped step count only as skipped."""
        self.names = list(metrics)
        values = torch.stack([metrics[n].detach().double() for n in self.names] + [torch.ones_like(skip).double()])
        values = torch.where(skip > 0, torch.zeros_like(values), values)
        self.sums = values if self.sums is None else self.sums + values
        self.in_a_row = torch.where(skip > 0, skip + (0 if self.in_a_row is None else self.in_a_row), 0)
        self.longest = self.in_a_row if self.longest is None else torch.maximum(self.longest, self.in_a_row)
        self.counted += 1

    def write(self, step, batch_size, **extra):
        """Read the sums (the one host synchronisation), write a line everywhere, raise Collapse if learning stopped."""
        *sums, longest = [*distributed.all_reduce_sum(self.sums).tolist(), int(self.longest)]
        steps, good = self.counted, round(sums[-1] / distributed.world_size())
        now = time.perf_counter()
        seconds = (now - self.last) / steps
        means = {n: s / sums[-1] if good else math.nan for n, s in zip(self.names, sums)}
        rate = batch_size / seconds
        line = {"step": step, **means, "skipped_steps": steps - good, "images_per_s": rate, "seconds_per_step": seconds,
                "peak_memory_gib": peak_memory_gib(self.sums.device), **extra}
        if self.peak_flops and self.flops_per_image:
            line["mfu"] = rate * self.flops_per_image / (self.peak_flops * distributed.world_size())
        self.sums, self.longest, self.counted, self.last = None, None, 0, now
        if self.main:
            with open(os.path.join(self.folder, "metrics.jsonl"), "a") as f:
                f.write(json.dumps({k: (None if isinstance(v, float) and not math.isfinite(v) else v)
                                    for k, v in line.items()}) + "\n")
            for writer in self.writers:
                writer(line)
            losses = "  ".join(f"{n} {v:.4g}" for n, v in means.items() if n.endswith("loss") or n.startswith("grad_norm"))
            mfu = f"  mfu {line['mfu']:.0%}" if "mfu" in line else ""
            left = time_text((self.args.max_train_steps - step) * seconds)
            self.say(f"step {step}/{self.args.max_train_steps}  {rate:.1f} img/s  {seconds:.3g} s/step  "
                     f"{line['peak_memory_gib']:.2f} GiB{mfu}  {left} left  {losses}")
        self.watch(step, longest, good, means)
        return line

    def watch(self, step, longest, good, means):
        """Raise Collapse after 50 skipped steps in a row, or when the SiT's or VAE's gradient norm is 0 or falls to 1e-4 of
        the largest logged. (The discriminator's may well be 0: the hinge loss is, where it is sure.)"""
        if longest >= 50:
            raise Collapse(f"step {step}: {longest} steps in a row had non-finite losses or gradients")
        for name in ("grad_norm_sit", "grad_norm_vae"):
            if good and name in means:
                value, largest = means[name], max(means[name], self.largest_norms.get(name, 0.0))
                if value <= 1e-4 * largest:
                    raise Collapse(f"step {step}: {name} fell to {value:.2g} from {largest:.2g}: nothing is learnt any more")
                self.largest_norms[name] = largest

    @contextlib.contextmanager
    def paused(self):
        """Context whose time (sampling, evaluation, a checkpoint) is left out of the rates."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued belongs to the steps
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start


def open_writers(report_to, folder, args):
    """Functions that take one metrics dict, for tensorboard or wandb; both are optional packages."""
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
        return [lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in line.items() if k != "step"]]
    if report_to == "wandb":
        import wandb
        path = os.path.join(folder, "wandb_id")  # kept, so that a resumed run goes on in the same curves
        if not os.path.exists(path):
            with files.replace(path) as temporary, open(temporary, "w") as f:
                f.write(wandb.util.generate_id())
        with open(path) as f:
            wandb.init(project="repa-e", name=os.path.basename(folder), dir=folder, config=vars(args), resume="allow", id=f.read())
        return [lambda line: wandb.log(line, step=line["step"])]
    return []


def peak_memory_gib(device):
    """Largest memory so far in GiB: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def time_text(seconds):
    """12.3 s as "12s", hours as "3h05m", days as "2d04h"."""
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours // 24}d{hours % 24:02d}h" if hours >= 24 else f"{hours}h{minutes:02d}m"
