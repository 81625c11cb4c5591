"""Sampling speed, each figure beside the plain float32 path in the same run; one JSON line per figure.

    python tests/bench_sample.py            small on the CPU; SiT-B/2 and SiT-XL/2 where a GPU is
    python tests/bench_sample.py --tiny     one small figure alone

Plain float32 path: one batch, no autocast, no TF32, and with guidance both halves at every step. Ours: what
sample_ddp.py does by default, null half inside the interval [0, 0.65] only. Euler-Maruyama; images/s are for
250 steps, from a shorter run of the same solver, without decoding.
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


def run(network, batch, size, steps, guided, plain, device, autocast):
    """Latents [batch, 4, size, size] of the samples 0 .. batch - 1."""
    generators = samplers.sample_generators(0, range(batch))
    y = samplers.sample_labels(0, range(batch), 1000).to(device)

    def noise():
        drawn = samplers.draw_noise(generators, (4, size, size))
        drawn = drawn.pin_memory() if device.type == "cuda" else drawn  # else the copy would wait
        return drawn.to(device, non_blocking=True)

    def usual(x, t, y):
        """The usual sampler: both halves at every step, mixed afterwards."""
        rows = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 1000)])
        label, null = network(*rows)[0].chunk(2)
        return torch.where(t.view(-1, 1, 1, 1) <= 0.65, null + 2 * (label - null), label)

    if guided and plain:
        velocity = samplers.guided(usual, y, 1000)
    else:
        velocity = samplers.guided(lambda x, t, y: network(x, t, y)[0], y, 1000, 2.0 if guided else 1.0,
                                   high=0.65)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        return samplers.euler_maruyama(velocity, noise(), samplers.time_grid(steps, "sde"), noise,
                                       interpolant)


def seconds(function, device, repeats):
    """Fastest of `repeats` runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def model(name, size, device):
    sit = SiT_models[name](input_size=size, num_classes=1000, encoder_depth=1, z_dims=()).to(device).eval()
    for parameter in sit.parameters():  # the initial zeros would make the branches trivial
        torch.nn.init.normal_(parameter, std=0.02)
    return sit


def report(name, size, batch, steps, guided, device, times):
    images = {k: round(batch * steps / 250 / t, 4) for k, t in times.items()}
    speedup = {k: round(times["plain"] / t, 2) for k, t in times.items() if k != "plain"}
    print(json.dumps({"bench": "sample", "model": name, "latents": size, "batch": batch, "guided": guided,
                      "device": device, "torch": torch.__version__, "images_per_s": images,
                      "speedup": speedup}), flush=True)


def bench_cpu(name, size, batch=16, steps=5):
    """Blocks of 4 on a thread each, as sample_ddp.py, against one batch with all threads."""
    device, threads = torch.device("cpu"), torch.get_num_threads()
    sit = model(name, size, device)
    for guided in (False, True):
        times = {"plain": seconds(lambda: run(sit, batch, size, steps, guided, True, device, False), device,
                                  2)}
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads) as pool:
            def blocks():
                return list(pool.map(lambda _: run(sit, 4, size, steps, guided, False, device, False),
                                               range(batch // 4)))
            times["ours"] = seconds(blocks, device, 2)
        torch.set_num_threads(threads)
        report(name, size, batch, steps, guided, f"cpu, {threads} threads", times)


def bench_gpu(name, size=32, batch=64, steps=20):
    device = torch.device("cuda")
    sit = model(name, size, device)
    compiled = torch.compile(sit, dynamic=False)
    for guided in (False, True):
        torch.backends.cudnn.allow_tf32 = False
        times = {"plain": seconds(lambda: run(sit, batch, size, steps, guided, True, device, False), device,
                                  2)}
        torch.backends.cudnn.allow_tf32 = True
        for key, network in (("ours", sit), ("ours_compiled", compiled)):
            times[key] = seconds(lambda: run(network, batch, size, steps, guided, False, device, True),
                                 device, 2)
        report(name, size, batch, steps, guided, torch.cuda.get_device_name(), times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small figure alone")
    args = parser.parse_args()
    if args.tiny:
        bench_cpu("SiT-Ti/2", 4, batch=4, steps=2)
    else:
        bench_cpu("SiT-Ti/2", 16)
        bench_cpu("SiT-S/2", 8)
        if torch.cuda.is_available():
            for name in ("SiT-B/2", "SiT-XL/2"):
                bench_gpu(name)
