"""Files: written atomically, read without running foreign code, fetched once.

Errors a user can mend are ValueError or OSError with one line that names the file and the remedy. Damaged is
a ValueError of its own: the file is proved not to be what was written, so another copy may take its place.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import re
import zipfile

import numpy as np
import requests
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from requests.adapters import HTTPAdapter
from urllib3.util import Retry


class NotFinite(ValueError):
    """Something to be saved contains NaN or infinity; the message is one line."""


class Damaged(ValueError):
    """A file is damaged: a checksum differs, or it ends early."""


# ---------------------------------------------------------------- writing

@contextlib.contextmanager
def replace(path):
    """Context: a temporary path next to `path`; on success it is synced to disk and renamed to `path`.

    An interrupted write leaves whatever was at `path` before. Missing parent folders are made. A link stays a
    link: the file that it names is replaced.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)
        # the rename itself must reach the disk too; network shares that cannot sync folders do so anyway
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say of which file
            error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def remove_temporaries(*folders):
    """Remove what killed runs left half-written in these folders; only under the lock of the run."""
    for folder in folders:
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if name.startswith(".") and name.endswith(".tmp"):
                os.remove(os.path.join(folder, name))


def save(state, path):
    """torch.save of nested dicts and lists of tensors to `path`, atomically.

    Raises NotFinite for weights with NaN or infinity, which would pass for a good checkpoint later, and
    OSError if the file cannot be written.
    """
    if bad := first_non_finite(state):
        raise NotFinite(f"{path}: not written, because {bad} contains NaN or infinity")
    with replace(path) as temporary, open(temporary, "wb") as f:
        try:
            torch.save(state, f)    # to a file, not a name: torch writes the name into it
        except RuntimeError as error:   # torch hides the OSError of a full disk
            raise error.__context__ or error


def save_json(content, path):
    """`content` as JSON in the file `path`, atomically."""
    with replace(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)


def write_npz(path, rows, shape, **arrays):
    """Write an uncompressed .npz atomically, with one array of `rows` in memory at a time.

    arr_0 is uint8 of `shape` [N, H, W, 3], from the iterable `rows` of uint8 arrays [k, H, W, 3]; after it
    come `arrays` under their names. The bytes depend on these alone.
    """
    with replace(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:     # room for more than 4 GiB
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(f, header)
            for part in rows:
                f.write(np.ascontiguousarray(part).data)
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array(f, np.asarray(value), allow_pickle=False)


def first_non_finite(obj, name=""):
    """Name of a tensor in nested dicts and lists with NaN or infinity ("ema.bn.running_var"), or None."""
    if torch.is_tensor(obj):
        return None if obj.is_meta or obj.isfinite().all() else name
    items = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, (list, tuple)) else ()
    found = (first_non_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next(filter(None, found), None)


def check_writable(path, inputs=()):
    """Raise OSError or ValueError unless the file `path` can be written; for before the work.

    It may exist, but must not be one of the files `inputs`, which it would replace. Leaves nothing behind.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise IsADirectoryError(f"{path}: is a folder or a device; give the name of a file to write")
    path = os.path.realpath(path)
    if path in map(os.path.realpath, inputs):
        raise ValueError(f"{path}: is an input and would be replaced; give another name to write to")
    folder = os.path.dirname(path)
    while not os.path.lexists(folder):  # `replace` makes missing folders
        folder = os.path.dirname(folder)
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise OSError(f"{path}: cannot be written into {folder}; choose another place")


def lock(folder):
    """Lock a run's folder until this process ends or the returned file is closed.

    Raises OSError if another run works there. The kernel frees the lock when the process dies, however it
    dies; forked data workers do not keep it.
    """
    os.makedirs(folder, exist_ok=True)
    f = open(os.path.join(folder, ".lock"), "a")
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OSError(f"{folder}: another run is at work there; wait for it or choose another folder"
                      ) from None
    except OSError:
        pass    # a file system without locks, where it is better to run than not to
    return f


# ---------------------------------------------------------------- reading

class Ignored:
    """What stands for a foreign object in a checkpoint; it takes whatever it is made of and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load(path):
    """Read a .pt, .pth, .ckpt, .bin or .safetensors file, a dict, onto the CPU; no code in it is run.

    The reference's checkpoints contain an argparse.Namespace, which is kept; other objects than tensors and
    plain containers (Lightning's callbacks, numpy scalars) become Ignored. Files in torch's zip format are
    checked against the CRC-32 they contain and memory-mapped, so that unused entries cost no memory.

    Raises FileNotFoundError, OSError, Damaged, and ValueError for a file that is not a dict of tensors.
    """
    path = os.fspath(path)
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"version https://git-lfs") or head.lstrip()[:1] == b"<":
        raise ValueError(f"{path}: is a Git LFS pointer or a web page; fetch the file itself")
    try:
        if head[8:9] == b"{":
            return safetensors.torch.load_file(path)
        if not head.startswith((b"PK", b"\x80")):   # torch's zip, and its pickle before version 1.6
            raise EOFError("it has another format")
        content = _torch_load(path, is_zip=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:     # torch's own message says how to run the code
        raise ValueError(f"{path}: not read, it contains more than tensors and plain containers; where you "
                         "trust it, torch.save its state_dict alone and use that") from error
    except Exception as error:      # whatever unpicklers and zipfile raise for bytes that make no sense
        if isinstance(error, (OSError, MemoryError)) or "memory" in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:150]
        raise Damaged(f"{path}: damaged, or not a file of tensors ({reason}); use another copy") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: contains a {type(content).__name__}, not a dict of tensors")
    return content


def _torch_load(path, is_zip):
    """torch.load on the CPU with weights_only; foreign classes are replaced by Ignored."""
    known = [argparse.Namespace]
    if is_zip:
        with zipfile.ZipFile(path) as archive:      # torch.load does not look at checksums
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {bad} differs")
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known += [(Ignored, name) for name in foreign if name != "argparse.Namespace"]
    with torch.serialization.safe_globals(known):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except RuntimeError as error:
            if "mmap" not in str(error):    # some network volumes cannot map files: read them
                raise
            return torch.load(path, map_location="cpu", weights_only=True)


def load_json(path):
    """The content of a JSON file, a dict. Raises OSError or, for anything else, ValueError."""
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is not a JSON object ({error}); use another copy") from error


def training_args(content, path):
    """The flags a checkpoint was trained with: its `args`, or the args.json of its run folder."""
    args = content.get("args")
    if isinstance(args, argparse.Namespace):    # the reference's
        return vars(args)
    folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    return dict(args) if isinstance(args, dict) else load_json(os.path.join(folder, "args.json"))


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_state(module, state, what):
    """Raise ValueError unless `state` is weights for `module`: its names, its shapes, of the same kind."""
    def described(v):
        return f"{'float' if v.dtype in FLOATS else v.dtype} {list(v.shape)}" \
            if torch.is_tensor(v) else type(v).__name__

    own = {name: described(v) for name, v in module.state_dict().items()}
    found = {name: described(v) for name, v in (state if isinstance(state, dict) else {}).items()}
    differs = [name for name in {**own, **found} if own.get(name) != found.get(name)]
    if differs:
        first = differs[0]
        raise ValueError(f"{what}: weights of another architecture, {len(differs)} tensors differ, the first "
                         f"is {first}: {found.get(first, 'missing')}, expected {own.get(first, 'none')}")


def load_weights(module, state, what):
    """Strict load_state_dict of `state` (name -> tensor) into `module`; returns it. See check_state."""
    check_state(module, state, what)
    module.load_state_dict(state)
    return module


def checkpoint_steps(folder):
    """Step numbers of the files NNNNNNN.pt in `folder`, ascending; [] if it does not exist."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(n[:-3]) for n in names if re.fullmatch(r"[0-9]{7,}\.pt", n))


def sha256(path):
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_digest(module):
    """sha256 (hex) over the names and tensors of a module or of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in (module if isinstance(module, dict) else module.state_dict()).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- fetching

def hub_file(repo, filename):
    """Path of huggingface.co/{repo}'s {filename} in the hub's cache, fetched if it is not there.

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply. Raises OSError if it cannot be fetched; the hub's client tries
    for some 20 s where there is no network.
    """
    try:
        return hf_hub_download(repo, filename)
    except Exception as error:      # half a dozen types, of its http client too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise OSError(f"{repo}/{filename}: cannot be fetched from the hub ({reason}); give a path instead, "
                      "set HF_TOKEN if it is gated, or HF_HUB_OFFLINE=1 where there is no network") from error


def download(url, name, sha256_prefix):
    """Path of an https file in torch hub's folder under `name`, fetched unless it is there.

    Its sha256 must begin with `sha256_prefix`, or nothing is kept. TORCH_HOME moves the folder. Raises
    OSError if it cannot be fetched, ValueError if what came is another file.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if os.path.exists(path):
        return path
    retry = Retry(3, backoff_factor=1, status_forcelist=[429, 500, 502, 503, 504])
    with requests.Session() as session, replace(path) as temporary:
        session.adapters.clear()    # no plain http, in redirects either
        session.mount("https://", HTTPAdapter(max_retries=retry))
        try:
            with session.get(url, stream=True, timeout=30) as answer, open(temporary, "wb") as f:
                answer.raise_for_status()
                f.writelines(answer.iter_content(1 << 20))
        except requests.RequestException as error:
            raise OSError(f"{url}: cannot be downloaded ({type(error).__name__}); without a network put the "
                          f"file at {path}") from error
        if not sha256(temporary).startswith(sha256_prefix):
            raise ValueError(f"{url}: not the expected file, its sha256 does not begin with {sha256_prefix}")
    return path
