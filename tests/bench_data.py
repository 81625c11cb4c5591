"""Images per second and core: photos as they are, and a .zip of them cropped; one JSON line each.

    python tests/bench_data.py data/imagenet/train [--resolution 256] [--images 100] [--rounds 5]

One process decodes and crops as for training. CPU time counts, so other work on the machine hardly does. The
two take turns and the best round of each is printed.
"""
import argparse
import io
import json
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import PIL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.runtime.data import center_crop, evenly_spaced, open_images


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("data", help="folder or .zip of photos")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    photos = open_images(args.data, args.resolution, labelled=False)
    photos.names = [photos.names[k] for k in evenly_spaced(len(photos), args.images)]
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(f"{folder}/cropped.zip", "w") as archive:
            for k, name in enumerate(photos.names):
                file = io.BytesIO()
                center_crop(photos.load(k), args.resolution).save(file, "JPEG", quality=95)
                archive.writestr(f"{k:06d}.jpg", file.getvalue())
        sets = {"photos": photos,
                "cropped": open_images(f"{folder}/cropped.zip", args.resolution, labelled=False)}
        seconds = {name: [] for name in sets}
        for _ in range(args.rounds):
            for name, data in sets.items():
                begin = time.process_time()
                for k in range(len(data)):
                    data[k]
                seconds[name].append(time.process_time() - begin)
        for name, data in sets.items():
            size = sum(len(data.content(k)) for k in range(len(data))) / len(data)
            print(json.dumps({"source": name,
                              "images_per_second_per_core": round(len(data) / min(seconds[name]), 1),
                              "kilobytes_per_image": round(size / 1e3, 1), "resolution": args.resolution,
                              "images": len(data), "pillow": PIL.__version__}), flush=True)


if __name__ == "__main__":
    main()
