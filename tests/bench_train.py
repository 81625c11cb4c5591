"""Times the training step against the plain path, which computes as the reference does, in alternation.

    python tests/bench_train.py              # on a GPU the paper's networks, 32 images; else the demo

It prints a JSON line. On a GPU tests/gpu_check.py measures each path in a process of its own instead, because
each needs the memory.

The plain path: eager, NCHW, group norms in float32 and all activations kept, attention of the VAE spelt out,
the discriminator in float32, AdamW as torch has it by default, EMA tensor by tensor, the alignment loss in a
loop over samples, every metric read on the host each step.

The medians over all steps count: these machines are noisy. All networks have random weights (VGG and the
encoder too), so nothing is downloaded. Further flags go to train_repae_e.py.
"""
import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_repae_e as train  # noqa: E402
from models import encoders, lpips, vae  # noqa: E402
from models.losses import gan_loss, resize_tokens, wide  # noqa: E402
from models.runtime import cli, log, trainer, weights  # noqa: E402
from models.runtime.data import ShapesData  # noqa: E402

# The paper's networks, depths, classes and weights at its batch per GPU; the demo with all of its losses.
PAPER = ("--preset", "sdvae", "--batch-size", "32", "--vae-ckpt", "none", "--disc-ckpt", "none")
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
    create = encoders.timm.create_model
    with replaced({(encoders.timm, "create_model"): lambda *names, **options: create(
                       *names, **options | {"pretrained": False}),
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


def median_of(function, device, repeats=1):
    """(median seconds, last result) of function()."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        result = function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def batch_drawn_on_the_cpu(nets, args, step, images, labels):
    """train.make_batch with the CPU's draws on any device: generators of devices differ."""
    stand_in = SimpleNamespace(device=torch.device("cpu"), sit=nets.sit, encoders=[],
                               autocast=contextlib.nullcontext)
    batch = train.make_batch(stand_in, args, step, images, labels)
    for name, value in vars(batch).items():
        setattr(batch, name, value.to(nets.device) if torch.is_tensor(value) else value)
    with torch.no_grad(), nets.autocast():
        batch.zs = [encoder(images.to(nets.device)).bfloat16() for encoder in nets.encoders]
    return batch


class Steps:
    """One of the ways of making steps: seconds and losses of those made so far."""

    def __init__(self, args, device, plain, compiled=False, make_batch=train.make_batch):
        self.args, self.device, self.make_batch = args, device, make_batch
        self.changes = PLAIN if plain else {}
        self.nets = build_plain(args, device, compiled) if plain else build(args, device)
        data = ShapesData(args.batch_size, args.resolution)
        self.images, self.labels = (torch.stack([torch.as_tensor(data[i][k]) for i in range(args.batch_size)])
                                    for k in (0, 1))
        self.seconds, self.losses = [], []

    def step(self):
        with replaced(self.changes):
            seconds, metrics = median_of(self._step, self.device)
        self.seconds.append(seconds)
        self.losses.append({k: float(v) for k, v in metrics.items() if "loss" in k})

    def _step(self):
        batch = self.make_batch(self.nets, self.args, len(self.losses), self.images, self.labels)
        metrics, _ = train.train_step(self.nets, self.args, batch)
        return {k: v.item() for k, v in metrics.items()} if self.changes else metrics

    def report(self, warm_up):
        seconds = statistics.median(self.seconds[warm_up:])
        return {"batch_size": self.args.batch_size, "seconds_per_step": seconds,
                "images_per_s": self.args.batch_size / seconds, "warm_up_s": sum(self.seconds[:warm_up]),
                "peak_memory_gib": log.peak_memory_gib(self.device)}


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

    z, recon = (v.detach() for v in part("vae_forward", vae_forward)[1:])

    def vae_update():
        gan = gradient = None
        outputs, _, _ = trainer.vae_forward(nets, [batch], [None])
        if nets.disc is not None:
            leaf = wide(recon).requires_grad_()
            with nets.autocast(False):
                gan = gan_loss(nets.disc, leaf)
                gradient, = torch.autograd.grad(args.disc_weight * gan, leaf)
        trainer.backward(nets, "vae", "vae_loss", lambda *row: train.vae_losses(nets, args, gan, *row),
                         [batch], [None], outputs, [gradient])

    both, _ = median_of(vae_update, device, repeats)
    result["vae_losses_and_backward"] = both - result["vae_forward"]
    if nets.disc is not None:
        part("discriminator", lambda: trainer.backward(
            nets, "disc", "d_loss", lambda *row: train.disc_losses(nets, *row), [batch.images], [recon]))
    u = nets.sit.normalize(z)

    def sit_forward():
        with nets.autocast():
            return nets.sit(u, batch.t, batch.labels_dropped)

    part("sit_forward", sit_forward)
    both, _ = median_of(lambda: trainer.backward(
        nets, "sit", "sit_loss", lambda *row: train.sit_losses(nets, args, *row), [batch], [u]),
        device, repeats)
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


class Flops(TorchDispatchMode):
    """Context that counts FLOPs by torch's own formulas. (Its FlopCounterMode follows modules by hooks that
    fail where a gradient at a tensor is asked for, as the GAN's and LPIPS's are.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def utilisation(path, seconds):
    """FLOPs of a step on uncompiled networks, and the share of the device's rate that it reaches."""
    with torch.compiler.set_stance("force_eager"), Flops() as counter:
        path.step()
    side, kind = 8192 if path.device.type == "cuda" else 1024, path.nets.dtype
    a = torch.randn(side, side, device=path.device, dtype=kind)
    for repeats in (3, 10):     # the first warm up
        rate = 2 * side ** 3 / median_of(lambda: a @ a, path.device, repeats)[0]
    return {"gflop_per_image": counter.total / path.args.batch_size / 1e9, "matmul_tflops": rate / 1e12,
            "utilisation": counter.total / seconds / rate}


WARM_UP = 2  # steps: compilation, allocation


def fitting(kinds, flags, device, number):
    """{kind: Steps} after `number` steps of each, made in alternation.

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
        except RuntimeError as error:   # cuDNN has its own words for full memory
            if cli.memory_full(error, "") is None or "fast" in kinds or args.batch_size % 2:
                raise
        paths = path = None
        gc.collect()
        torch.cuda.empty_cache()
        args.batch_size //= 2


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per path")
    mine, extra = parser.parse_known_args()
    args, device = settings(*extra), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allow_tf32()
    paths = fitting(("fast", "plain"), extra, device, WARM_UP + mine.steps)
    fast, plain = paths["fast"], paths["plain"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    report = {"bench": "train", "device": name, "torch": torch.__version__, "model": args.model,
              "vae": args.vae, "encoder": args.encoder, "resolution": args.resolution,
              "precision": str(fast.nets.dtype)[6:], "compile": trainer.wants_compile(args, device),
              "grad_checkpoint": args.grad_checkpoint, "fast": fast.report(WARM_UP),
              "plain": plain.report(WARM_UP)}
    ratios = [p / f for p, f in zip(plain.seconds[WARM_UP:], fast.seconds[WARM_UP:])]
    report["speedup_over_plain"] = statistics.median(ratios)
    first, other = fast.losses[0], plain.losses[0]
    report["first_losses_differ_by"] = max(abs(first[k] - other[k]) for k in first)
    report["phases"] = phases(fast, max(3, mine.steps // 2))
    print(json.dumps(report | utilisation(fast, report["fast"]["seconds_per_step"])), flush=True)


if __name__ == "__main__":
    main()
