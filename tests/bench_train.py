"""Times the training step against the plain path, which computes as the reference does, in one run.

    python tests/bench_train.py              # on a GPU the paper's networks, 32 images; else the demo
    python tests/bench_train.py --plain                                    # the plain path alone
    python tests/bench_train.py --count --preset sdvae --batch-size 32     # its memory, counted without a GPU
    python tests/bench_train.py --minutes 5                                # the memory of a long run, no more

It prints a JSON line after each path; the last one has all.

The plain path: eager, NCHW, group norms in float32 and all activations kept, attention of the VAE spelt out,
the discriminator in float32, AdamW as torch has it by default, EMA tensor by tensor, the alignment loss in a
loop over samples, every metric read on the host each step.

On a CPU the paths take turns, and the medians over all turns count: these machines are noisy. On a GPU they
run one after the other, because each needs the memory; a plain path that does not fit gets half the images,
and the ratio is that of images per second. All networks have random weights (VGG too), so nothing is
downloaded.
"""
import argparse
import contextlib
import gc
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_repae_e as train  # noqa: E402
from models import encoders, lpips, vae  # noqa: E402
from models.runtime import flops, memory, runlog, trainer, weights  # noqa: E402
from models.losses import resize_tokens  # noqa: E402
from models.runtime.data import ShapesData  # noqa: E402


# The paper's networks, depths, classes and weights at its batch per GPU; the demo with all of its losses.
PAPER = ("--preset", "sdvae", "--batch-size", "32")
DEMO = ("--preset", "demo", "--disc-weight", "0.1")


def settings(*flags):
    """Settings of the training script for this benchmark: the paper's on a GPU, else the demo's."""
    start = PAPER if torch.cuda.is_available() and "--preset" not in flags else DEMO
    return train.parse_args([*start, "--disc-start", "0", "--num-workers", "0", *flags])


@contextlib.contextmanager
def replaced(changes):
    """Context in which the attributes {(owner, name): value} are others."""
    before = {(owner, name): getattr(owner, name) for owner, name in changes}
    for (owner, name), value in changes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def build(args, device):
    """Networks ready for training, all with random weights, so that no download is needed."""
    with replaced({(encoders, "_fitting"): lambda *a: {}, (encoders, "_fetch"): lambda *a: {},
                   (weights, "lpips"): lpips.LPIPS}):
        nets = train.build_networks(args, device, None)
    trainer.prepare(nets, args)
    return nets


# --------------------------------------------------------------------------------------------- the plain path

def plain_proj_loss(zs, zs_tilde):
    total = 0.0
    for z, z_tilde in zip(zs, zs_tilde):
        z = resize_tokens(z.float(), z_tilde.shape[1])
        for a, b in zip(z, z_tilde):
            total = total - (F.normalize(a, dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1).mean()
    return total / (len(zs) * len(zs[0]))


def plain_swish(x):
    return x * torch.sigmoid(x)  # keeps two tensors, F.silu one


def plain_attention(block, x):
    b, c, h, w = x.shape
    y = block.norm(x)
    q, k, v = (conv(y).flatten(2) for conv in (block.q, block.k, block.v))
    attention = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c ** -0.5, dim=2)
    return x + block.proj_out(torch.bmm(v, attention.transpose(1, 2)).view(b, c, h, w))


@torch.no_grad()
def plain_ema(ema, model, decay):
    for e, p in zip(ema.state_dict().values(), model.state_dict().values()):
        e.mul_(decay).add_(p, alpha=1 - decay) if e.is_floating_point() else e.copy_(p)


def plain_updates(optimizers, skip):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


PLAIN = {
    (train, "proj_loss"): plain_proj_loss,
    (trainer, "update_ema"): plain_ema,
    (trainer, "guarded_updates"): plain_updates,
    (vae.GroupNorm, "forward"): torch.nn.GroupNorm.forward,  # float32 under autocast
    (vae.Upsample, "forward"): lambda self, x: self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")),
    (vae, "norm_silu_conv"): lambda norm, conv, x: conv(plain_swish(norm(x))),
    (vae.AttnBlock, "forward"): plain_attention,
    (lpips.LPIPS, "forward"): lambda self, a, b: self.layer_terms(a, b).sum(1),  # the whole batch at once
}


def build_plain(args, device, compiled=False):
    """The same for the plain path, which runs within replaced(PLAIN).

    `compiled`: with its SiT compiled, as the reference's is by default.
    """
    args.compile = args.grad_checkpoint = False
    nets = build(args, device)
    if compiled:
        nets.sit.compile(dynamic=False)
    for name, learning_rate in nets.trained.items():
        parameters = getattr(nets, name).parameters()
        nets.opts[name] = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    return nets


# -------------------------------------------------------------------------------------------------- measuring

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device):
    """(seconds, result) of function()."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def median_of(function, device, repeats):
    """(median seconds, last result) of function()."""
    runs = [seconds_of(function, device) for _ in range(repeats)]
    return statistics.median(r[0] for r in runs), runs[-1][1]


class Steps:
    """One of the ways of making steps: seconds and losses of those made so far."""

    def __init__(self, args, device, plain, compiled=False):
        self.args, self.device, self.changes = args, device, PLAIN if plain else {}
        self.nets = build_plain(args, device, compiled) if plain else build(args, device)
        data = ShapesData(args.batch_size, args.resolution)
        self.images, self.labels = (torch.stack([torch.as_tensor(data[i][k]) for i in range(args.batch_size)])
                                    for k in (0, 1))
        self.seconds, self.losses = [], []

    def step(self):
        with replaced(self.changes):
            seconds, metrics = seconds_of(self._step, self.device)
        self.seconds.append(seconds)
        self.losses.append({k: float(v) for k, v in metrics.items() if "loss" in k})

    def _step(self):
        batch = train.make_batch(self.nets, self.args, len(self.losses), self.images, self.labels)
        metrics, _ = train.train_step(self.nets, self.args, batch)
        return {k: v.item() for k, v in metrics.items()} if self.changes else metrics

    def report(self, warm_up):
        seconds = statistics.median(self.seconds[warm_up:])
        gpu = self.device.type == "cuda"
        memory = {"peak_memory_gib": runlog.peak_memory_gib(self.device)} if gpu else {}
        return {"batch_size": self.args.batch_size, "seconds_per_step": seconds,
                "images_per_s": self.args.batch_size / seconds, "warm_up_s": sum(self.seconds[:warm_up]),
                **memory}


def phases(path, repeats):
    """Median seconds of each part of the step on its own."""
    nets, args, device = path.nets, path.args, path.device
    data, result = ShapesData(args.batch_size, args.resolution), {}

    def part(name, function):
        result[name], value = median_of(function, device, repeats)
        return value

    part("data", lambda: [data[i] for i in range(args.batch_size)])
    batch = train.make_batch(nets, args, 1, path.images, path.labels)
    with torch.no_grad(), nets.autocast():
        part("encoder", lambda: [encoder(path.images.to(device)) for encoder in nets.encoders])

    def vae_forward():
        with nets.autocast():
            return nets.vae(batch.images, batch.eps)

    outputs = part("vae_forward", vae_forward)
    z, recon = outputs[1].detach(), outputs[2].detach()

    def vae_update():
        parts = trainer.micro_batches(batch, 1)
        trainer.first_pass(nets, parts)
        if nets.disc is not None:
            trainer.gan_gradient(nets, parts, recon, args.disc_weight)
        trainer.backward(nets, parts, lambda part: train.vae_losses(nets, args, part), "vae_loss", "vae")

    both, _ = median_of(vae_update, device, repeats)
    result["vae_losses_and_backward"] = both - result["vae_forward"]
    if nets.disc is not None:
        batch.recon = recon
        part("discriminator", lambda: trainer.backward(nets, [batch], lambda b: train.disc_losses(nets, b),
                                                       "d_loss", "disc"))

    def sit_forward():
        with nets.autocast():
            return nets.sit(nets.sit.normalize(z), batch.t, batch.labels_dropped)

    part("sit_forward", sit_forward)
    batch.u = nets.sit.normalize(z)
    both, _ = median_of(lambda: trainer.backward(nets, [batch], lambda b: train.sit_losses(nets, args, b),
                                                 "sit_loss", "sit"), device, repeats)
    result["sit_losses_and_backward"] = both - result["sit_forward"]
    skip = torch.zeros((), device=device)
    gradients = {p: p.grad for name in nets.trained for p in getattr(nets, name).parameters()}

    def optimisers():
        for p, grad in gradients.items():
            p.grad = grad
        trainer.guarded_updates(nets.opts.values(), skip)

    part("optimisers", optimisers)
    part("ema", lambda: trainer.update_ema(nets.ema, nets.sit, args.ema_decay))
    return result


def resident_gib(device):
    """Memory in use now: allocated on the GPU, or resident in this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2 ** 30
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 30


WARM_UP = 2  # steps: compilation, allocation


def fitting(kinds, flags, device, number):
    """{kind: Steps} after `number` steps of each, made in turn.

    Where memory is full a plain path gets half the images, until it fits.
    """
    args = settings(*flags)
    while True:
        try:
            paths = {kind: Steps(argparse.Namespace(**vars(args)), device, kind != "fast", "compiled" in kind)
                     for kind in kinds}
            for k in range(number):
                if device.type == "cuda" and k == WARM_UP:
                    torch.cuda.reset_peak_memory_stats(device)
                for path in paths.values():
                    path.step()
            return paths
        except torch.OutOfMemoryError:
            if "fast" in kinds or args.batch_size % 2:
                raise
        paths = path = None
        free_memory()
        args.batch_size //= 2


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


def utilisation(path, images_per_s, repeats):
    """FLOPs of a step, the device's rate, the share of it that is reached, and the seconds of the phases."""
    nets, args = path.nets, path.args
    rate = flops.matmul_rate(path.device, nets.dtype)
    per_image = flops.step_flops(args, nets, lambda: train.build_sit(args, nets.vae, nets.encoders))
    return {"utilisation": per_image * images_per_s / rate, "gflop_per_image": per_image / 1e9,
            "matmul_tflops": rate / 1e12, "phases": phases(path, repeats)}


def against_fast(done, report):
    """The ratios of images per second, and how far the first losses are apart; `done`: (seconds, losses)."""
    found, (fast, losses), images = {}, done["fast"], report["fast"]["batch_size"]
    for kind, label in (("plain", "plain_eager"), ("plain_compiled_sit", "reference_default")):
        if kind in done:
            ratio = statistics.median(p / f for p, f in zip(done[kind][0], fast))
            found[f"speedup_over_{label}"] = ratio * images / report[kind]["batch_size"]
    if "plain" in done and report["plain"]["batch_size"] == images:
        plain = done["plain"][1][0]
        found["first_losses_differ_by"] = max(abs(losses[0][k] - plain[k]) for k in losses[0])
    return found


def memory_over_time(path, minutes):
    """GiB in use at ten points of a run of `minutes`, after a warm-up, and the growth from the third on."""
    for _ in range(3):
        path.step()
    begin, points = time.perf_counter(), []
    for k in range(1, 11):
        while time.perf_counter() - begin < 6 * minutes * k:
            path.step()
        points.append(resident_gib(path.device))
    return {"steps": len(path.seconds), "gib": points, "growth_gib": points[-1] - points[2]}


def count_memory(args, plain=False, world_size=1):
    """memory.Count of a step of the fast or the plain path."""
    with replaced(PLAIN if plain else {}):
        return memory.training_peak(args, train.build_blank, train.blank_step, world_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog="Further flags go to train_repae_e.py.")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per path")
    parser.add_argument("--plain", action="store_true", help="only the plain path")
    parser.add_argument("--count", action="store_true",
                        help="only count the memory of a step on a GPU, which need not be there")
    parser.add_argument("--minutes", type=float, default=0,
                        help="run that long and report the memory instead")
    mine, extra = parser.parse_known_args()
    if mine.count:
        return print(count_memory(settings(*extra), mine.plain).table())
    args, device = settings(*extra), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    report = {"bench": "train", "device": name, "torch": torch.__version__, "model": args.model,
              "vae": args.vae, "encoder": args.encoder, "resolution": args.resolution,
              "batch_size": args.batch_size, "precision": str(trainer.autocast_type(args, device))[6:],
              "compile": trainer.wants_compile(args, device) and not mine.plain,
              "grad_checkpoint": args.grad_checkpoint and not mine.plain}
    if mine.minutes:
        growth = memory_over_time(Steps(args, device, mine.plain), mine.minutes)
        return print(json.dumps(report | growth))
    on_gpu = [("fast",), ("plain",), ("plain_compiled_sit",)]
    turns = [("plain",)] if mine.plain else on_gpu if device.type == "cuda" else [("fast", "plain")]
    done = {}
    for turn in turns:
        paths = fitting(turn, extra, device, WARM_UP + mine.steps)
        for kind, path in paths.items():
            done[kind], report[kind] = (path.seconds[WARM_UP:], path.losses), path.report(WARM_UP)
        if "fast" in paths:
            report |= utilisation(paths["fast"], report["fast"]["images_per_s"], max(3, mine.steps // 2))
        if "fast" in done:
            report |= against_fast(done, report)
        print(json.dumps(report), flush=True)
        del paths, path
        free_memory()


if __name__ == "__main__":
    main()
