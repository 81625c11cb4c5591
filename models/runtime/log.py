"""What a run tells: its log, the watch on a collapse, the progress line; and signals that ask it to stop."""
import contextlib
import datetime
import json
import math
import os
import resource
import signal
import sys
import time
from types import SimpleNamespace

import torch

from models.runtime import distributed, files


# ---------------------------------------------------------------- progress and signals

def progress(what, total):
    """Function update(done) that prints how far a long loop is, on stderr of the main process.

    what: such as "images encoded"; the line is "images encoded: 12,000 of 50,000, 410/s, 0:01:33 left". It is
    printed every ten seconds.
    """
    last, began = time.monotonic(), None

    def update(done):
        nonlocal last, began
        now = time.monotonic()
        began = began or (now, done)    # a resumed loop starts in the middle
        if distributed.is_main() and now - last >= 10:
            last = now
            rate = max(done - began[1], 1) / max(now - began[0], 1e-9)
            print(f"{what}: {done:,} of {total:,}, {rate:.3g}/s, {time_text((total - done) / rate)} left",
                  file=sys.stderr, flush=True)
    return update


@contextlib.contextmanager
def watch():
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C only set `by` of its value, to the signal's name.

        with log.watch() as asked:
            for batch in batches:
                ...
                if distributed.any_process(asked.by):   # save and stop

    Nothing is interrupted: the loop decides where it stops. The main thread must enter the context.
    """
    asked = SimpleNamespace(by=None)

    def handle(number, frame):
        asked.by = asked.by or signal.Signals(number).name

    before = {number: signal.signal(number, handle)
              for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the log of a run

class Collapse(RuntimeError):
    """Training has stopped learning; the message names the step and the sign of it."""


class RunLog:
    """Keeps metrics on the device; every log_every steps reads them, writes a line and looks for a collapse.

    Files in `folder`: log.txt (what `say` showed) and metrics.jsonl (one object per logged step).
    Only the main process writes; all processes take part in the means.
    """

    def __init__(self, folder, args):
        """args: the run's settings, of which report_to, log_every and max_train_steps are read."""
        self.folder, self.args, self.main = folder, args, distributed.is_main()
        self.steps = []     # since the last line: (names of metrics, their values and skip on the device)
        self.in_a_row, self.largest_norms = 0, {}
        self.last = time.perf_counter()
        self.report = None
        if self.main:
            os.makedirs(folder, exist_ok=True)
            self.report = open_report(args.report_to, folder, args)

    def say(self, text):
        """One line to the terminal and log.txt."""
        if self.main:
            print(text, flush=True)
            with open(os.path.join(self.folder, "log.txt"), "a") as f:
                f.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")

    def resume(self, step):
        """Drop the lines of metrics.jsonl after `step`: a run that resumes there writes them again."""
        path = os.path.join(self.folder, "metrics.jsonl")
        if self.main and os.path.exists(path):
            kept = []
            with open(path, errors="replace") as f:
                for line in f:
                    with contextlib.suppress(ValueError, TypeError, KeyError):  # a line cut by a kill
                        kept += [line] if json.loads(line)["step"] <= step else []
            with files.replace(path) as temporary, open(temporary, "w") as f:
                f.writelines(kept)

    def add(self, metrics, skip):
        """Keep a step's metrics (dict of scalar tensors) and `skip` (1.0 for a skipped step) until the line.

        Nothing is read on the host here: a GPU would have to be waited for.
        """
        values = torch.stack([value.detach().double() for value in (*metrics.values(), skip)])
        self.steps.append((tuple(metrics), values))

    def write(self, step, batch_size):
        """Read the steps since the last line, which waits for the device, and write a line everywhere.

        Returns it, a dict; the first one's rate includes compilation. Raises Collapse if learning stopped.
        """
        device = self.steps[0][1].device
        rows = [dict(zip((*names, "skip"), values.tolist())) for names, values in self.steps]
        for row in rows:
            self.in_a_row = self.in_a_row + 1 if row["skip"] else 0
        # in the order of computation: what comes later follows from it
        not_finite = (name for row in rows if row["skip"] for name in row if not math.isfinite(row[name]))
        first_bad = next(not_finite, None)
        good = [row for row in rows if not row["skip"]]
        means = {}
        for name in dict.fromkeys(name for row in rows for name in row if name != "skip"):
            values = [row[name] for row in good if name in row]
            means[name] = sum(values) / len(values) if values else math.nan
        everyone = distributed.gather(means)
        means = {name: sum(other[name] for other in everyone) / len(everyone) for name in means}
        now = time.perf_counter()
        seconds = (now - self.last) / len(rows)
        line = {"step": step, **means, "skipped_steps": len(rows) - len(good),
                "images_per_s": batch_size / seconds, "seconds_per_step": seconds,
                "peak_memory_gib": peak_memory_gib(device)}
        if first_bad is not None:
            line["not_finite_first"] = first_bad
        self.steps, self.last = [], now
        if self.main:
            self.publish(step, line, means)
        self.watch(step, good, means, first_bad)
        return line

    def publish(self, step, line, means):
        """One line of figures to metrics.jsonl, the terminal, tensorboard or wandb."""
        with open(os.path.join(self.folder, "metrics.jsonl"), "a") as f:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                      for k, v in line.items()}
            f.write(json.dumps(finite) + "\n")
        if self.report is not None:
            self.report(line)
        losses = "  ".join(f"{n} {v:.4g}" for n, v in means.items()
                           if n.endswith("loss") or n.startswith("grad_norm"))
        skipped = f"  skipped {line['skipped_steps']}" if line["skipped_steps"] else ""
        if "not_finite_first" in line:
            skipped += f" (not finite first: {line['not_finite_first']})"
        left = time_text((self.args.max_train_steps - step) * line["seconds_per_step"])
        self.say(f"step {step}/{self.args.max_train_steps}  {line['images_per_s']:.1f} img/s  "
                 f"{line['seconds_per_step']:.3g} s/step  {line['peak_memory_gib']:.2f} GiB  "
                 f"{left} left{skipped}  {losses}")

    def watch(self, step, good, means, first_bad):
        """Raise Collapse if the last 50 steps were skipped, or if the SiT's or VAE's gradient vanishes.

        That is a norm of 0, or of 1e-4 of the largest logged. (The discriminator's may well be 0: the hinge
        loss is, where it is sure.)
        """
        if self.in_a_row >= 50:
            raise Collapse(f"step {step}: {self.in_a_row} steps in a row had non-finite losses or gradients, "
                           f"{first_bad} first")
        for name in ("grad_norm_sit", "grad_norm_vae"):
            if good and name in means:
                value, largest = means[name], max(means[name], self.largest_norms.get(name, 0.0))
                if value <= 1e-4 * largest:
                    raise Collapse(f"step {step}: {name} fell to {value:.2g} from {largest:.2g}: "
                                   "nothing is learnt any more")
                self.largest_norms[name] = largest

    @contextlib.contextmanager
    def paused(self):
        """Context whose time is left out of the rates: pictures and checkpoints are no training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued belongs to the steps
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start


def open_report(report_to, folder, args):
    """Function of one metrics dict, for tensorboard or wandb (optional packages); None for "none"."""
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
        return lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in line.items()
                             if k != "step" and not isinstance(v, str)]
    if report_to == "wandb":
        import wandb
        path = os.path.join(folder, "wandb_id")  # kept, so that a resumed run continues its own curves
        if not os.path.exists(path):
            with files.replace(path) as temporary, open(temporary, "w") as f:
                f.write(wandb.util.generate_id())
        with open(path) as f:
            run_id = f.read()
        wandb.init(project="repa-e", name=os.path.basename(folder), dir=folder, config=vars(args),
                   resume="allow", id=run_id)
        return lambda line: wandb.log(line, step=line["step"])
    return None


def peak_memory_gib(device):
    """Largest memory so far in GiB: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def time_text(seconds):
    """12.3 s as "0:00:12", days as "2 days, 4:00:00"."""
    return str(datetime.timedelta(seconds=int(seconds)))
