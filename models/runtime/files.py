"""Files: written whole or not at all, loaded without running foreign code, downloaded with their digest checked.

Every function raises ValueError or OSError with a one-line message that names the file and the remedy.
"""
import argparse
import contextlib
import hashlib
import os
import zipfile

import requests
import torch


@contextlib.contextmanager
def replace(path):
    """Context manager: gives a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    An interrupted write leaves whatever `path` held before. Missing parent folders are made.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must reach the disk too
        os.fsync(descriptor)
        os.close(descriptor)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save(obj, path):
    """torch.save of `obj` to `path`, atomically."""
    with replace(path) as temporary:
        torch.save(obj, temporary)


def load(path):
    """Read a .pt/.pth/.safetensors file onto the CPU; no code in it is run.

    The only object type allowed beside tensors and plain containers is argparse.Namespace, which the reference's
    checkpoints hold under "args". Files in torch's zip format are memory-mapped, so unused entries cost nothing.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be read as a checkpoint ({reason}); is the file whole?") from error


def check_state(module, state, what):
    """Raise a one-line ValueError unless `state` has exactly the names and shapes of module.state_dict()."""
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or wrong:
        parts = [f"{len(keys)} {label} (first: {keys[0]})" for keys, label in
                 ((missing, "missing"), (extra, "not known here")) if keys]
        if wrong:
            parts.append(f"{wrong[0]} is {list(state[wrong[0]].shape)} instead of {list(own[wrong[0]].shape)}")
        raise ValueError(f"{what}: weights of another architecture, {'; '.join(parts)}")


def load_weights(module, state, what):
    """Strict load_state_dict of `state` (name -> tensor) into `module`; `what` names the source in the error."""
    check_state(module, state, what)
    module.load_state_dict(state)
    return module


def checkpoint_steps(folder):
    """Step numbers of the files NNNNNNN.pt in `folder`, ascending; [] if it does not exist."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(n[:-3]) for n in names if n.endswith(".pt") and n[:-3].isdigit())


def sha256(path):
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_path(*parts):
    """A path in the download cache: <torch hub folder>/repae/... (TORCH_HOME moves it)."""
    return os.path.join(torch.hub.get_dir(), "repae", *parts)


def download(url, path, size=None, sha256_prefix=None, headers=None):
    """Fetch an https URL to `path` unless it is there; size in bytes and leading sha256 digits are checked first.

    Raises OSError without a network, ValueError if what came is not the file that was promised.
    """
    if os.path.isfile(path):
        return path
    if not url.startswith("https://"):
        raise ValueError(f"{url}: only https downloads are allowed")
    try:
        with requests.get(url, stream=True, timeout=30, headers=headers) as response, replace(path) as temporary:
            response.raise_for_status()
            if not response.url.startswith("https://"):
                raise ValueError(f"{url}: redirected to {response.url}, which is not https")
            with open(temporary, "wb") as f:
                for block in response.iter_content(1 << 20):
                    f.write(block)
            if size is not None and os.path.getsize(temporary) != size:
                raise ValueError(f"{url}: got {os.path.getsize(temporary)} bytes instead of {size}; try again")
            if sha256_prefix and not sha256(temporary).startswith(sha256_prefix):
                raise ValueError(f"{url}: the sha256 does not begin with {sha256_prefix}; do not use this file")
    except requests.RequestException as error:
        raise OSError(f"{url}: cannot be fetched ({type(error).__name__}); without a network put the file at {path}") \
            from error
    return path


def hub_file(repo, filename):
    """Path of {filename} of huggingface.co/{repo}, from the cache or fetched with the size and sha256 the hub states.

    The token of a gated repository is taken from the environment variable HF_TOKEN.
    """
    path = cache_path(repo, filename)
    if os.path.isfile(path):
        return path
    url = f"https://huggingface.co/{repo}/resolve/main/{filename}"
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}
    try:
        answer = requests.head(url, timeout=30, headers=headers)  # not followed: the hub's own headers hold the digest
        answer.raise_for_status()
    except requests.RequestException as error:
        raise OSError(f"{url}: cannot be fetched ({type(error).__name__}); without a network put the file at {path}") \
            from error
    size = answer.headers.get("X-Linked-Size")
    digest = answer.headers.get("X-Linked-ETag", "").strip('"')
    return download(url, path, int(size) if size else None, digest if len(digest) == 64 else None, headers)
