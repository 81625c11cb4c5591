"""The mutated files of tests/faults.py: each reader gets sound files with bytes changed, cut, doubled or swapped.

Seeded mutations rather than hypothesis: no dependency, and the same files again by their number. A file may be read (the
change was harmless, or made another sound file) or refused in one line; anything else is a failure, so is one that takes
5 seconds or more than 2 GiB.
"""
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from fault_tools import finish, pictures, read_state, start

SECONDS = 5


def mutated(data, draws):
    """The bytes with one to four changes; headers and ends, where formats keep their tables, get more than their share."""
    data = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        n = len(data)
        if not n:
            break
        near = draws.choice((n, min(n, 600), min(n, 600)))
        at = draws.randrange(near) if draws.random() < .5 else n - 1 - draws.randrange(near)
        kind = draws.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draws.randrange(8)
        elif kind == 1:
            data[at] = draws.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at:at + draws.randint(1, 64)]
        elif kind == 4:
            data[at:at] = data[at:at + draws.randint(1, 64)]
        elif kind == 5:
            data[at:at + 8] = draws.choice((b"\xff" * 8, b"\0" * 8, b"9" * 8, draws.randbytes(8)))
        else:
            other = draws.randrange(n)
            data[at:at + 4], data[other:other + 4] = data[other:other + 4], data[at:at + 4]
    return bytes(data)


def mutated_json(data, draws):
    """The same, or a sound JSON with another value in it."""
    if draws.random() < .4:
        return mutated(data, draws)
    content = json.loads(data)
    odd = (None, -1, 0, 1e308, "x", [], {}, True, 2 ** 70, [1] * 4, ["a"] * 4, [0.0] * 4, "../x")
    for _ in range(draws.randint(1, 3)):
        key = draws.choice(list(content))
        if draws.random() < .2:
            del content[key]
        else:
            content[key] = draws.choice(odd)
        if not content:
            break
    return json.dumps(content).encode()


def readers(folder, have):
    """{reader: (sound file's bytes, path to write the mutated to, function that reads it, mutation)}"""
    import safetensors.torch
    import torch
    from PIL import Image

    from models.runtime import images, vae_files, weights
    from models.runtime.data import ImageData, check_images, open_image

    def sound(path):
        return Path(path).read_bytes()

    def read_npz():
        found = images.open_npz(str(folder / "x.npz"))
        for _ in found.read(4):
            pass
        found.array("arr_1")

    def read_zip():
        data = ImageData(str(folder / "x.zip"), 32)
        check_images(data.path, data.names, threads=1)
        for k in range(len(data)):
            data[k]

    checkpoint = have / "exps/run/checkpoints/0000003.pt"
    state = read_state(checkpoint)
    (folder / "run" / "checkpoints").mkdir(parents=True)
    torch.save({k: v for k, v in state.items() if k in ("ema", "vae", "steps")}, folder / "run/checkpoints/0000003.pt")
    shutil.copytree(have / "diffusers", folder / "diffusers")
    small = vae_files.to_diffusers(read_state(have / "vae.pt"))
    Image.fromarray(pictures(1, 5, 40)[0]).save(folder / "x.jpg")
    return {
        "checkpoint": (sound(checkpoint), folder / "x.pt", lambda: weights.load(str(folder / "x.pt")), mutated),
        ".npz": (sound(have / "a.npz"), folder / "x.npz", read_npz, mutated),
        ".zip": (sound(have / "photos.zip"), folder / "x.zip", read_zip, mutated),
        "image": (sound(folder / "x.jpg"), folder / "x.jpg", lambda: open_image(str(folder), "x.jpg"), mutated),
        "PNG": (sound(have / "photos/ant/0.png"), folder / "x.png", lambda: open_image(str(folder), "x.png"), mutated),
        "args.json": (sound(have / "exps/run/args.json"), folder / "run/args.json",
                      lambda: weights.load(str(folder / "run/checkpoints/0000003.pt")), mutated_json),
        "config.json": (sound(have / "diffusers/config.json"), folder / "diffusers/config.json",
                        lambda: vae_files.open_vae(str(folder / "diffusers")), mutated_json),
        "safetensors": (safetensors.torch.save(small), folder / "x.safetensors",
                        lambda: vae_files.open_vae(str(folder / "x.safetensors")), mutated),
    }


NAMES = ("checkpoint", ".npz", ".zip", "image", "PNG", "args.json", "config.json", "safetensors")


def read_many(name, first, count, have):
    """In a forked process: write and read mutated files; prints read, refused and what failed as JSON."""
    def late(*_):
        raise TimeoutError("late")
    signal.signal(signal.SIGALRM, late)
    data, path, read, mutate = readers(Path.cwd(), Path(have))[name]
    found, failed = {"read": 0, "refused": 0}, []
    for number in range(first, first + count):
        if path.exists():
            path.unlink()
        path.write_bytes(mutate(data, random.Random(f"{name} {number}")))
        if hasattr(sys.modules["models.runtime.data"], "_open_zip"):
            sys.modules["models.runtime.data"]._open_zip.cache_clear()
        signal.alarm(SECONDS)
        try:
            read()
            found["read"] += 1
        except TimeoutError:
            failed.append(f"{number}: over {SECONDS} s")
        except (ValueError, OSError) as error:
            one_line = str(error) and "\n" not in str(error)
            found["refused"] += bool(one_line)
            failed += [] if one_line else [f"{number}: {type(error).__name__} {error!r}"]
        except BaseException as error:
            failed.append(f"{number}: {type(error).__name__} {str(error)[:200]}")
        finally:
            signal.alarm(0)
        if number % 200 == 0:
            for descriptor in range(20, 2000):  # those that the reader keeps for its .zips
                try:
                    os.close(descriptor)
                except OSError:
                    pass
    Path("result.json").write_text(json.dumps(found | {"failed": failed}))


def fuzz(count, folder, have, say=print):
    """Mutated files for each reader. Returns {reader: {"read", "refused", "failed": [text]}}."""
    found = {}
    for name in NAMES:
        tmp = folder / f"fuzz-{len(found)}"
        tmp.mkdir()
        done = finish(start(None, [], tmp, have, [(read_many, name, 0, count, str(have))], seconds=60 + count))
        result = tmp / "result.json"
        found[name] = json.loads(result.read_text()) if result.exists() else {"read": 0, "refused": 0, "failed": [done.text]}
        say(f"{name:<12} {count:>6} tried {found[name]['read']:>6} read {found[name]['refused']:>6} refused "
            f"{len(found[name]['failed']):>4} failed {found[name]['failed'][:3] or ''}")
        shutil.rmtree(tmp)
    return found
