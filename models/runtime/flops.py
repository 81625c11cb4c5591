"""How much arithmetic a training step is, how fast the device does it, and so the model FLOP utilisation."""
import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.discriminator import Discriminator
from models.lpips import LPIPS
from models.vae import VAE_models


@torch.no_grad()
def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product in `dtype` on `device`, measured now: the base of utilisation."""
    n = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def forward_flops(build, *shapes):
    """FLOPs of a forward pass of the module that build() makes on inputs of `shapes`; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        module, inputs = build(), [torch.zeros(shape) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
    return counter.get_total_flops()


def step_flops(args, nets, build_sit):
    """FLOPs of one REPA-E step per image, without recomputation.

    A backward pass costs twice the forward pass, or as much as it where no weight gradient is needed (VGG,
    and the SiT of the VAE update, which stops at its alignment depth). `build_sit` makes a SiT like nets.sit.
    """
    image = (1, 3, args.resolution, args.resolution)
    latents = (1, nets.sit.in_channels, nets.sit.input_size, nets.sit.input_size)

    class Network(torch.nn.Module):
        def __init__(self, align_only):
            super().__init__()
            self.sit, self.align_only = build_sit(), align_only

        def forward(self, x, t):
            return self.sit(x, t, torch.zeros(1, dtype=torch.long), self.align_only)

    flops = 3 * forward_flops(lambda: Network(False), latents, (1,))
    if not args.cache_features:
        flops += sum(encoder.flops for encoder in nets.encoders)
    if args.latent_cache:
        return flops
    if args.freeze_vae:
        return flops + forward_flops(lambda: VAE_models[args.vae]().encoder, image)
    flops += 3 * forward_flops(VAE_models[args.vae], image)
    if args.vae_align_proj_coeff and nets.encoders:
        flops += 2 * forward_flops(lambda: Network(True), latents, (1,))
    if nets.lpips is not None:  # two images forward, one of them backward
        flops += 3 / 2 * forward_flops(LPIPS, image, image)
    if nets.disc is not None:  # the generator's pass, and real and fake images in its own update
        flops += (2 + 2 * 3) * forward_flops(Discriminator, image)
    return flops


def vae_step_flops(args, nets):
    """FLOPs of one step of finetune_vae.py per image; a frozen encoder has no backward pass."""
    image = (1, 3, args.resolution, args.resolution)
    encoder = forward_flops(lambda: VAE_models[args.vae]().encoder, image)
    flops = 3 * forward_flops(VAE_models[args.vae], image) - (0 if args.train_encoder else 2 * encoder)
    if nets.lpips is not None:  # two images forward, one of them backward, without weight gradients
        flops += 3 / 2 * forward_flops(LPIPS, image, image)
    if nets.disc is not None:  # the generator's pass, and real and fake images in its own update
        flops += (2 + 2 * 3) * forward_flops(Discriminator, image)
    return flops + sum(encoder.flops for encoder in nets.encoders)
