"""Sampling speed next to the plain float32 path in the same run; one JSON line per network.

    python tests/bench_sample.py            small on the CPU; SiT-B/2 and SiT-XL/2 where a GPU is
    python tests/bench_sample.py --tiny     one small figure alone

Euler-Maruyama with guidance. Plain: one batch in float32, both halves at every step. Ours, as sample_ddp.py
by default: the null half inside the interval [0, 0.65] only; on a GPU bf16, also compiled; on the CPU blocks
of 4 on a thread each. Images/s are for 250 steps, from a shorter run of the same solver, without decoding.
"""
import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models import samplers  # noqa: E402
from models.losses import interpolant  # noqa: E402
from models.sit import SiT_models  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def run(network, batch, size, steps, high=0.65, autocast=False):
    """Latents [batch, 4, size, size] of the samples 0 .. batch - 1."""
    generators = samplers.sample_generators(0, range(batch))
    y = samplers.sample_labels(0, range(batch), 1000).to(DEVICE)

    def noise():
        drawn = samplers.draw_noise(generators, (4, size, size))
        return drawn.pin_memory().to(DEVICE, non_blocking=True) if GPU else drawn

    velocity = samplers.guided(lambda x, t, y: network(x, t, y)[0], y, 1000, 2.0, high=high)
    with torch.inference_mode(), torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        return samplers.euler_maruyama(velocity, noise(), samplers.time_grid(steps, "sde"), noise,
                                       interpolant)


def seconds(function):
    """The faster of two runs after one to warm up."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def bench(name, size, batch, steps):
    sit = SiT_models[name](input_size=size, num_classes=1000, encoder_depth=1, z_dims=()).to(DEVICE).eval()
    for parameter in sit.parameters():  # the initial zeros would make the branches trivial
        torch.nn.init.normal_(parameter, std=0.02)
    torch.backends.cudnn.allow_tf32 = False
    times = {"plain": seconds(lambda: run(sit, batch, size, steps, high=1.0))}
    if GPU:
        torch.backends.cudnn.allow_tf32 = True
        for key, network in (("ours", sit), ("ours_compiled", torch.compile(sit, dynamic=False))):
            times[key] = seconds(lambda: run(network, batch, size, steps, autocast=True))
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads) as pool:
            times["ours"] = seconds(lambda: list(pool.map(lambda _: run(sit, 4, size, steps),
                                                          range(batch // 4))))
        torch.set_num_threads(threads)
    print(json.dumps({
        "bench": "sample", "model": name, "latents": size, "batch": batch, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} CPU threads",
        "images_per_s": {key: round(batch * steps / 250 / t, 4) for key, t in times.items()}}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small figure alone")
    if parser.parse_args().tiny:
        bench("SiT-Ti/2", 4, 4, 2)
    elif GPU:
        bench("SiT-B/2", 32, 64, 20)
        bench("SiT-XL/2", 32, 64, 20)
    else:
        bench("SiT-Ti/2", 16, 16, 5)
        bench("SiT-S/2", 8, 16, 5)
