"""Times the training step against the plain path, which computes as the reference does, in one run; prints one JSON line.

    python tests/bench_train.py                                              # CPU: the demo's configuration
    python tests/bench_train.py --model SiT-XL/2 --vae f8d4 --resolution 256 --batch-size 32 --encoder dinov2-vit-b \
        --mixed-precision bf16 --compile                                      # one GPU; add --grad-checkpoint
    python tests/bench_train.py --plain                                      # the plain path alone

The plain path: eager, NCHW, group norms in float32, attention of the VAE spelt out, AdamW and EMA tensor by tensor, the
alignment loss in a loop over samples, graph for the real image's VGG features too, every metric read on the host each step.
All networks have random weights (VGG too), so nothing is downloaded.
"""
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_repae_e as train  # noqa: E402
from models import encoders, flops, lpips, pretrained, training, vae  # noqa: E402
from models.alignment import resize_tokens  # noqa: E402
from models.data import ShapesData  # noqa: E402


def settings(mine, extra):
    """Flags of the training script for this benchmark, everything from scratch."""
    args = train.parse_args(["--preset", "demo", "--disc-weight", "0.1", "--disc-start", "0", "--num-workers", "0", *extra])
    args.compile = args.compile and not mine.plain
    return args


def random_encoders(args, device):
    """The encoders of --encoder with random weights, so that no download is needed."""
    real = encoders.load_weights, encoders._fetch
    encoders.load_weights, encoders._fetch = (lambda *a: None), (lambda *a: os.devnull)
    try:
        return encoders.load_encoders(args.encoder, None, args.resolution, device)
    finally:
        encoders.load_weights, encoders._fetch = real


def build(args, device):
    pretrained.lpips = lpips.LPIPS
    train.load_encoders = lambda *a: random_encoders(args, device)
    nets = train.build_networks(args, device, None)
    train.prepare_training(nets, args)
    return nets


# ------------------------------------------------------------------------------------------------- the plain path

def plain_proj_loss(zs, zs_tilde):
    total = 0.0
    for z, z_tilde in zip(zs, zs_tilde):
        z = resize_tokens(z, z_tilde.shape[1])
        for a, b in zip(z, z_tilde):
            total = total - (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1).mean()
    return total / (len(zs) * len(zs[0]))


def plain_attention(block, x):
    b, c, h, w = x.shape
    y = block.norm(x)
    q, k, v = (conv(y).flatten(2) for conv in (block.q, block.k, block.v))
    weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c ** -0.5, dim=2)
    return x + block.proj_out(torch.bmm(v, weights.transpose(1, 2)).view(b, c, h, w))


def plain_layer_terms(self, img0, img1):
    with torch.autocast(img0.device.type, enabled=False):
        img0, img1 = (x.float().clone().requires_grad_() if not x.requires_grad else x.float() for x in (img0, img1))
        pairs = zip(self.vgg_features(img0), self.vgg_features(img1), (getattr(self, f"lin{k}").model[1].weight for k in range(5)))
        return torch.stack([(w * (a - b).square()).sum(1).mean((1, 2)) for a, b, w in pairs], dim=1)


@torch.no_grad()
def plain_ema(ema, model, decay):
    for e, p in zip(ema.state_dict().values(), model.state_dict().values()):
        e.mul_(decay).add_(p, alpha=1 - decay) if e.is_floating_point() else e.copy_(p)


def plain_updates(optimizers, skip):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def make_plain(nets, args):
    """Switch the step to the plain path, for the rest of this process."""
    train.proj_loss = plain_proj_loss
    training.update_ema, training.guarded_updates = plain_ema, plain_updates
    vae.GroupNorm.forward = torch.nn.GroupNorm.forward  # float32 under autocast
    vae.AttnBlock.forward = plain_attention
    lpips.LPIPS.layer_terms = plain_layer_terms
    for name, learning_rate in nets.trained.items():
        nets.opts[name] = torch.optim.AdamW(getattr(nets, name).parameters(), lr=learning_rate, weight_decay=0.0, foreach=False,
                                            fused=False)
    nets.vae.to(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------ measuring

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device, repeats):
    """(median seconds, last result) of function()."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        result = function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def measure(nets, args, steps, plain):
    """Seconds per step, images/s, peak memory, and the first losses of one path."""
    device, data = nets.device, ShapesData(args.batch_size, args.resolution)
    images, labels = (torch.stack([torch.as_tensor(data[i][k]) for i in range(args.batch_size)]) for k in (0, 1))
    losses = []

    def step():
        batch = train.make_batch(nets, args, len(losses), images, labels, 0, 1)
        metrics, _ = train.train_step(nets, args, batch)
        losses.append({k: v.item() for k, v in metrics.items()} if plain else metrics)

    timed(step, device, 2)  # compilation, allocation
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, _ = timed(step, device, steps)
    result = {"seconds_per_step": seconds, "images_per_s": args.batch_size / seconds, "peak_memory_gib": training.peak_memory_gib(device)}
    return result, [{k: float(v) for k, v in m.items()} for m in losses]


def phases(nets, args, repeats):
    """Median seconds of each part of the step on its own."""
    device, data = nets.device, ShapesData(args.batch_size, args.resolution)
    result = {}

    def part(name, function):
        result[name], value = timed(function, device, repeats)
        return value

    samples = part("data", lambda: [data[i] for i in range(args.batch_size)])
    images, labels = (torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in (0, 1))
    batch = train.make_batch(nets, args, 1, images, labels, 0, 1)
    with torch.no_grad(), nets.autocast():
        part("encoder", lambda: [encoder(images.to(device)) for encoder in nets.encoders])

    def vae_forward():
        with nets.autocast():
            return nets.vae(batch.images, batch.eps)

    outputs = part("vae_forward", vae_forward)
    z, recon = outputs[1].detach(), outputs[2].detach()
    both, _ = timed(lambda: train.vae_gradient(nets, args, [batch], [vae_forward()], recon, True), device, repeats)
    result["vae_losses_and_backward"] = both - result["vae_forward"]
    part("discriminator", lambda: train.discriminator_gradient(nets, batch.images, recon))

    def sit_forward():
        with nets.autocast():
            return nets.sit(nets.sit.normalize(z), batch.t, batch.labels_dropped)

    part("sit_forward", sit_forward)
    both, _ = timed(lambda: train.sit_gradient(nets, args, batch, z), device, repeats)
    result["sit_losses_and_backward"] = both - result["sit_forward"]
    skip = torch.zeros((), device=device)
    gradients = {p: p.grad for name in nets.trained for p in getattr(nets, name).parameters()}

    def optimisers():
        for p, grad in gradients.items():
            p.grad = grad
        training.guarded_updates(nets.opts.values(), skip)

    part("optimisers", optimisers)
    part("ema", lambda: training.update_ema(nets.ema, nets.sit, args.ema_decay))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Further flags go to train_repae_e.py.")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per path")
    parser.add_argument("--plain", action="store_true", help="only the plain path")
    mine, extra = parser.parse_known_args()
    args = settings(mine, extra)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    report = {"bench": "train", "device": name, "torch": torch.__version__, "model": args.model, "vae": args.vae, "encoder": args.encoder,
              "resolution": args.resolution, "batch_size": args.batch_size, "mixed_precision": args.mixed_precision,
              "compile": args.compile, "grad_checkpoint": args.grad_checkpoint}
    if not mine.plain:
        nets = build(args, device)
        per_image = flops.step_flops(args, nets, lambda: train.build_sit(args, nets.vae, nets.encoders))
        report["fast"], fast_losses = measure(nets, args, mine.steps, plain=False)
        report["phases"] = phases(nets, args, max(3, mine.steps // 2))
        peak = flops.matmul_rate(device, nets.dtype)
        report |= {"gflop_per_image": per_image / 1e9, "matmul_tflops": peak / 1e12,
                   "utilisation": per_image * report["fast"]["images_per_s"] / peak}
        del nets
    args.compile = args.grad_checkpoint = False
    nets = build(args, device)
    make_plain(nets, args)
    report["plain"], plain_losses = measure(nets, args, mine.steps, plain=True)
    if not mine.plain:
        report["speedup"] = report["plain"]["seconds_per_step"] / report["fast"]["seconds_per_step"]
        report["largest_loss_difference"] = max(abs(f[k] - p[k]) for f, p in zip(fast_losses, plain_losses)
                                                for k in f if "loss" in k)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
