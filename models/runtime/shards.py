"""Shards: samples that wait for their .npz, so that stopped runs go on and machines share the work.

A shard 00000064-00000128.npz holds the samples 64 .. 127 and the protocol they were drawn by; being a .npz it
has a digest (zip's CRC-32). One run at a time works in a folder. Its processes share nothing but the folder.
"""
import contextlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from models.runtime import files, images

NAME = re.compile(r"(\d{8,})-(\d{8,})\.npz")


def shard_path(folder, first, end):
    """Path of the shard with the samples first .. end - 1."""
    return os.path.join(folder, f"{first:08d}-{end:08d}.npz")


def write_shard(folder, first, samples, protocol):
    """Write the samples first, first + 1, ... (uint8 [k, H, W, 3]) and their protocol (a dict)."""
    path = shard_path(folder, first, first + len(samples))
    images.write_npz(path, [samples], samples.shape, protocol=json.dumps(protocol))


def list_shards(folder):
    """Sorted [(first, end)] of the shards in `folder`; [] if it does not exist."""
    matches = map(NAME.fullmatch, os.listdir(folder) if os.path.isdir(folder) else [])
    return sorted((int(m[1]), int(m[2])) for m in matches if m)


def missing_ranges(shards, first, end):
    """[(first, end)] of what sorted shards leave out of first .. end - 1."""
    gaps = []
    for start, stop in shards + [(end, end)]:
        if min(start, end) > first:
            gaps.append((first, min(start, end)))
        first = max(first, stop)
    return gaps


def cut(ranges, size):
    """[(first, end)] of batches of at most `size`. They end at its multiples, so that a continued run has the
    batches of an undisturbed one."""
    batches = []
    for first, end in ranges:
        edges = [first, *range((first // size + 1) * size, end, size), end]
        batches += pairwise(edges)
    return batches


def shard_rows(folder, number):
    """Yields samples 0 .. number - 1, in order, as uint8 [k, H, W, 3]; InputError for a damaged shard."""
    done = 0
    for first, end in list_shards(folder):
        if first <= done < min(end, number):
            for part in images.open_npz(shard_path(folder, first, end)).read(64):
                rows = part[max(0, done - first):max(0, number - first)]
                first += len(part)
                done += len(rows)
                yield rows


def check_same(old, protocol, where, free=("torch", "checkpoint", "vae")):
    """Raises ValueError unless two protocols say the same about what the samples are.

    free: what may differ: by default the version of torch, and the names of files whose digests are compared.
    """
    for key in sorted(set(old) | set(protocol)):
        if key not in free and old.get(key) != protocol.get(key):
            difference = f"made with {key} {old.get(key)}, this run has {protocol.get(key)}"
            raise ValueError(f"{where}: was {difference}; move it away, or give another --npz")


def check_shards(folder, size, protocol):
    """Read all shards and their digests. Damaged ones, and those of other than `size` (H, W), are removed and
    named on stderr: their samples are made again.

    Raises ValueError for a shard of another protocol, before any is removed, and OSError for one that cannot
    be read: nothing is known about it.
    """
    def problem(shard):
        path = shard_path(folder, *shard)
        try:
            found = images.open_npz(path)
            if found.protocol is not None:  # a sample does not depend on how many others there are
                check_same(found.protocol, protocol, path, ("torch", "checkpoint", "vae", "num_fid_samples"))
            if found.protocol is None or found.count != shard[1] - shard[0] or found.size != size:
                height, width = found.size
                return f"{path}: holds {found.count} images of {width}x{height}, or no protocol"
            for _ in found.read(64):
                pass
        except images.InputError as error:
            return str(error)

    shards = list_shards(folder)
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(problem, shards))
    for shard, text in zip(shards, problems):
        if text:
            print(f"note: {text}; its samples are made again", file=sys.stderr)
            os.remove(shard_path(folder, *shard))


def remove_shards(folder):
    """Remove all shards."""
    for shard in list_shards(folder):
        os.remove(shard_path(folder, *shard))


# ---------------------------------------------------------------- one run in a folder

def claim(folder):
    """Lock `folder` for this run and clear away what a killed one left. Returns the lock, for `release`.

    Raises OSError in one line if another run is at work there. Only one process of a run claims the folder.
    """
    lock = files.lock(folder)
    files.remove_leftovers(folder)
    with contextlib.suppress(FileNotFoundError):
        os.remove(_stop_file(folder))
    return lock


def release(folder, lock):
    """Undo `claim`; a folder without shards is removed, unless somebody keeps something else in it."""
    if not list_shards(folder):
        for path in (os.path.join(folder, ".lock"), _stop_file(folder)):
            with contextlib.suppress(OSError):
                os.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    lock.close()


def _stop_file(folder):
    return os.path.join(folder, "stop")


def ask_to_stop(folder):
    """Tell all processes that work in `folder` to stop: a signal may have reached only one of them."""
    with contextlib.suppress(OSError):
        open(_stop_file(folder), "a").close()


def stop_asked(folder):
    """Whether one of the processes has called ask_to_stop since the folder was claimed."""
    return os.path.exists(_stop_file(folder))
