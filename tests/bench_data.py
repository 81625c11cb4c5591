"""Images per second and core from photos and from the .zip that prepare.py makes of them; one JSON line each.

    python tests/bench_data.py data/imagenet/train [--resolution 256] [--images 100] [--rounds 5]

One process, decoded and cropped as for training, CPU time: other work on the machine hardly counts. The two
take turns and the best round of each counts.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.runtime.data import ImageData
from models.runtime.prepare import prepare


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("data", help="folder or .zip of photos")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
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


if __name__ == "__main__":
    main()
