"""Images per second and core from photos and from the .zip that prepare.py makes of them, and steps per
second of a run on a frozen VAE without and with caches; one JSON line each.

    python tests/bench_data.py data/imagenet/train [--resolution 256] [--images 100] [--rounds 5]

Images: one process, decoded and cropped as for training, CPU time: other work on the machine hardly counts.
Steps: SiT-S/2 at that resolution with a random f8d4 and hog, in one process, from the prepared .zip (loading
included) and from caches of it. They take turns and the best round of each counts.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_repae_e as train
from models.runtime import trainer
from models.runtime.data import ImageData, identity
from models.runtime.prepare import prepare
from models.runtime.weights import state_digest


class Steps:
    """Training steps on a frozen VAE from `path`, timed with their loading; caches in the folder `caches`."""

    def __init__(self, path, resolution, caches, batch_size):
        flags = ["--latent-cache", caches, "--cache-features", caches] if caches else []
        self.args = args = train.parse_args([
            "--data-dir", path, "--resolution", str(resolution), "--batch-size", str(batch_size),
            "--freeze-vae", "--model", "SiT-S/2", "--encoder", "hog", "--num-workers", "0", *flags])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        state = train.VAE_models[args.vae]().state_dict()
        self.nets = train.build_networks(args, device, state)
        dataset = trainer.open_data(args)
        kept = {"data": identity(dataset), "vae_digest": state_digest(state)}
        data = train.cached_data(self.nets, args, dataset, kept)
        trainer.prepare(self.nets, args)
        self.loader, self.done = trainer.data_loader(args, data, device, 0, 0), 0

    def seconds(self):
        begin = time.perf_counter()
        self.done += 1
        images, labels, _, *cached = next(self.loader)
        batch = train.make_batch(self.nets, self.args, self.done, images, labels, *cached)
        metrics, _ = train.train_step(self.nets, self.args, batch)
        metrics["sit_loss"].item()
        return time.perf_counter() - begin


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("data", help="folder or .zip of photos")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    photos = ImageData(args.data, args.resolution, unlabelled=True)
    chosen = np.linspace(0, len(photos) - 1, min(args.images, len(photos))).round().astype(int)
    photos.names, photos.labels = [photos.names[k] for k in chosen], photos.labels[chosen]
    with tempfile.TemporaryDirectory() as folder:
        prepare(photos, f"{folder}/prepared.zip")
        sets = {"photos": photos, "prepared": ImageData(f"{folder}/prepared.zip", args.resolution)}
        seconds = {name: [] for name in sets}
        for _ in range(args.rounds):
            for name, data in sets.items():
                begin = time.process_time()
                for k in range(len(data)):
                    data[k]
                seconds[name].append(time.process_time() - begin)
        for name, data in sets.items():
            size = sum(len(data.content(k)) for k in range(len(data))) / len(data)
            speed = round(len(data) / min(seconds[name]), 1)
            print(json.dumps({"source": name, "images_per_second_per_core": speed,
                              "kilobytes_per_image": round(size / 1e3, 1), "resolution": args.resolution,
                              "images": len(data), "pillow": PIL.__version__}), flush=True)
        runs = {name: Steps(f"{folder}/prepared.zip", args.resolution, caches, args.batch_size)
                for name, caches in (("prepared", None), ("caches", f"{folder}/caches"))}
        seconds = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                seconds[name].append(run.seconds())
        for name, run in runs.items():
            print(json.dumps({"frozen_run_from": name, "steps_per_second": round(1 / min(seconds[name]), 3),
                              "batch_size": args.batch_size, "model": run.args.model, "vae": run.args.vae,
                              "encoder": run.args.encoder, "device": str(run.nets.device),
                              "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
