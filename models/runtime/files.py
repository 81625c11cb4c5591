"""Files: written whole or not at all, read without running foreign code, fetched with their digest checked.

Every function raises ValueError or OSError with a one-line message that names the file and the remedy. Three
kinds of failure are told apart, because what to do differs: FileNotFoundError; Damaged, a file proved not to
be what was written, which another copy may replace; and anything else (no permission, no memory, a file
refused for what it holds), after which nothing may be concluded about the file.
"""
import argparse
import contextlib
import copy
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
import zipfile

import numpy as np
import requests
import torch
from urllib3.exceptions import ProtocolError    # what requests itself is made of

# Stands in the zip comment of every file of `save`: who wrote it, in which layout. Other files have no such
# comment.
MARK, FORMAT = b"repa-e format ", 1

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class NotFinite(ValueError):
    """Something to be saved holds NaN or infinity; the message is one line."""


class Damaged(ValueError):
    """A file proved damaged: its digest differs, it ends early, or it is no file of its kind."""


# ---------------------------------------------------------------- writing

@contextlib.contextmanager
def replace(path):
    """Context: a temporary path beside `path`, on success synced to disk and renamed to `path`.

    An interrupted write leaves whatever `path` held before. Missing parent folders are made. A full disk
    gives one OSError that says so, whatever the writer made of it.
    """
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            # an error of the disk that was not reported yet is raised here, before the rename
            os.fsync(f.fileno())
        os.replace(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must reach the disk too
        os.fsync(descriptor)
        os.close(descriptor)
    # torch's and Pillow's writers say "enforce fail" and "encoder error -2"
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in DISK_FULL or _free_bytes(folder) < 1 << 16:
            full = OSError(f"{path}: not written, disk full; what was there before is unchanged. Make room "
                           "and run the "
                           "same command again")
            full.errno = errno.ENOSPC
            raise full from error
        raise
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)


def temporary_name(path, end="tmp"):
    """Where this process writes `path` first: .NAME.PID@HOST.tmp beside it; see `remove_leftovers`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid()}@{_host()}.{end}")


def _host():
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "localhost"


def _free_bytes(folder):
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 1 << 62  # not known
    return disk.f_bavail * disk.f_frsize


def remove_leftovers(folder):
    """Remove the temporary files that killed runs left in `folder` (not below it). Returns their names.

    Left over is what a process of this host wrote that is gone, and anything older than a day: a process on
    another host cannot be asked.
    """
    removed = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        match = re.fullmatch(r"\..+\.([0-9]+)(?:@([\w-]+))?\.tmp", name)  # without @HOST: of earlier versions
        path = os.path.join(folder, name)
        try:
            if not match:
                continue
            here = match[2] in (None, _host())
            if _is_alive(int(match[1])) if here else time.time() - os.lstat(path).st_mtime < 86400:
                continue
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
            removed.append(name)
        except FileNotFoundError:
            pass  # its process ended, or another one tidied up
    return removed


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def save(obj, path):
    """torch.save `obj` to `path`, whole or not at all, with a digest, which `load` checks, and a version.

    The digest is the CRC-32 that the zip format keeps of each tensor and that torch writes anyway. A tensor
    that is not finite is refused (NotFinite): it would be taken for a good checkpoint later.
    """
    bad = first_non_finite(obj)
    if bad is not None:
        raise NotFinite(f"{path}: not written, because {bad} holds NaN or infinity")
    with replace(path) as temporary:
        with _CheckedFile(io.FileIO(temporary, "wb")) as f:
            try:
                torch.save(obj, f)
            except RuntimeError as error:
                raise f.error or error
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = MARK + str(FORMAT).encode()


def host_copy(obj, old=None):
    """Copy of nested dicts and lists with every tensor copied to host memory, the bytes `save` would write.

    `old`: an earlier copy that is no longer needed. Tensors of the same name and shape go into its memory,
    for which the system need not find and clear new pages.
    """
    if torch.is_tensor(obj):
        fits = torch.is_tensor(old) and old.dtype == obj.dtype and old.shape == obj.shape
        if not fits or old.stride() != obj.stride():
            old = torch.empty_like(obj, device="cpu", requires_grad=False)
        return old.copy_(obj.detach())
    if isinstance(obj, dict):
        new = copy.copy(obj)    # an OrderedDict's versions of modules stay
        new.update((k, host_copy(v, old.get(k) if isinstance(old, dict) else None)) for k, v in obj.items())
        return new
    if isinstance(obj, (list, tuple)):
        before = old if isinstance(old, (list, tuple)) and len(old) == len(obj) else [None] * len(obj)
        return type(obj)(host_copy(a, b) for a, b in zip(obj, before))
    return obj


class _CheckedFile(io.BufferedWriter):
    """A file that remembers why a write failed: torch's writer says "unexpected pos" instead."""
    error = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def save_json(obj, path, indent=1):
    """`obj` as JSON in the file `path`, whole or not at all."""
    with replace(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(obj, f, indent=indent)


def save_array(array, path):
    """np.save of `array` to `path`, whole or not at all.

    np.save itself hands the data to C's stdio and loses the error of the last write: on a full disk it
    returns as if all were well, and leaves a file that ends early.
    """
    array = np.asarray(array, order="C")
    with replace(path) as temporary, open(temporary, "wb") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
        f.write(array.reshape(-1).view(np.uint8).data)


def first_non_finite(obj, name=""):
    """Name of a tensor in nested dicts and lists that holds NaN or infinity ("ema.bn.running_var"), or None.

    The tensors are looked at where they are, and the host waits once per device.
    """
    extremes = {}  # device -> ([names], [smallest and largest value of each, which are NaN where one is])
    for key, tensor in _tensors(obj, name):
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            names, values = extremes.setdefault(tensor.device, ([], []))
            names.append(key)
            values.extend(tensor.detach().aminmax())  # one pass, and nothing of the tensor's size is made
    for names, values in extremes.values():
        finite = torch.stack([v.double() for v in values]).isfinite().view(-1, 2).all(1)
        bad = (~finite).nonzero().flatten().tolist()
        if bad:
            return names[bad[0]]
    return None


def _tensors(obj, name):
    """(name, tensor) pairs of nested dicts, lists and tuples."""
    if torch.is_tensor(obj):
        yield name, obj
    elif isinstance(obj, (dict, list, tuple)):
        for key, value in obj.items() if isinstance(obj, dict) else enumerate(obj):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def check_writable(path, inputs=()):
    """Raise a one-line OSError or ValueError unless `path` can be written, before work whose result it takes.

    It may exist, but must not be one of the files `inputs`, which it would replace. Nothing is left behind.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder; give the name of a file to write")
    for other in inputs:
        if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise ValueError(f"{path}: is read and would be replaced; give another name to write to")
    folder = os.path.dirname(path)
    while not os.path.lexists(folder):  # `replace` makes missing folders
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b"0")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


# ---------------------------------------------------------------- one run per folder

_LOCKS = {}  # folder -> open file


def lock(folder):
    """Lock a run's folder for this process, until it ends or the returned file is closed.

    Raises OSError naming the process that holds it. The kernel frees the lock when its process dies, however
    that happens; children forked meanwhile (data workers) close their copy, so none of them keeps it.
    """
    path = os.path.join(os.path.realpath(folder), ".lock")
    if path in _LOCKS and not _LOCKS[path].closed:
        return _LOCKS[path]
    os.makedirs(folder, exist_ok=True)
    try:
        f = open(path, "a+")
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir"
                      ) from error
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        f.seek(0)
        holder = f.read(200).strip() or "unknown"
        f.close()
        raise OSError(f"{folder}: another run is at work here (process {holder}); wait for it or use another "
                      "--exp-name") from error
    except OSError:
        pass  # a file system without locks: better to run than not to
    f.truncate(0)
    f.write(f"{os.getpid()} on {socket.gethostname()}\n")
    f.flush()
    _LOCKS[path] = f
    return f


def _close_locks_in_child():
    for f in _LOCKS.values():
        f.close()  # frees nothing: the lock belongs to the open file, which the parent still has
    _LOCKS.clear()


os.register_at_fork(after_in_child=_close_locks_in_child)


# ---------------------------------------------------------------- reading

def load(path, verify=True):
    """Read a .pt/.pth/.safetensors file, a dict, onto the CPU; no code in it is run.

    The only object type allowed beside tensors and plain containers is argparse.Namespace, which the
    reference's checkpoints hold under "args". Files in torch's zip format are checked against the CRC-32 that
    they carry (not with `verify` False) and then memory-mapped, so unused entries cost no memory.

    Raises FileNotFoundError, Damaged (see there), OSError if it cannot be read, and ValueError for a file
    that is refused: one with other objects in it, of a later format, or with something else than a dict.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as f:
            head = f.read(4)
        if path.endswith(".safetensors"):
            content = _load_safetensors(path)
        elif head == b"PK\3\4":
            check_zip(path, verify)
            content = _torch_load(path, mmap=True)
        elif head[:1] == b"\x80":  # a pickle, as torch wrote before version 1.6
            content = _torch_load(path, mmap=False)
        else:
            kind = "is no checkpoint, whole or part" if head else "is empty"
            raise Damaged(f"{path}: cannot be read, it {kind}; use another copy, or remove it")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{path}: is a folder, not a file") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror or error}); nothing is known about its "
                      "content") \
            from error
    except MemoryError as error:
        raise OSError(f"{path}: cannot be read, memory is full; nothing is known about its content"
                      ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__} where a checkpoint (a dict of tensors) "
                         "is expected")
    return content


def check_zip(path, verify=True):
    """Raise Damaged unless each member of a zip has the CRC-32 that it states; torch.load does not look.

    Takes 1.2 s per GiB where sha256 takes 2.2. Files that torch wrote without CRCs (torch.serialization.
    set_crc32_options) and that have no mark of `save` pass.
    """
    bad, comment, odd = "its end, or its list of members,", b"", False
    try:
        with zipfile.ZipFile(path) as archive:
            members, comment = archive.infolist(), archive.comment
            odd = any(m.compress_type != zipfile.ZIP_STORED for m in members) or \
                sum(m.file_size for m in members) > os.path.getsize(path)  # could unpack to anything
            has_crc = comment.startswith(MARK) or any(m.CRC for m in members)
            if not odd:
                bad = archive.testzip() if verify and has_crc else None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: told to seek to a place before the file's start
            raise
    except Exception:  # zipfile raises half a dozen types for lists of members that make no sense
        pass
    if odd and not comment.startswith(MARK):
        raise ValueError(f"{path}: refused, it is compressed, which torch's files never are; save it with "
                         "torch.save")
    version = comment[len(MARK):] if comment.startswith(MARK) else None
    if bad is None and version is not None and not version.isdigit():
        bad = "its end"
    if bad is not None:
        raise Damaged(f"{path}: damaged, {bad} is not as it was written; use another copy, or remove it")
    if version is not None and int(version) > FORMAT:
        raise ValueError(f"{path}: refused, its format {int(version)} is later than {FORMAT}, the last one "
                         "known here; use "
                         "the version of this project that wrote it")


def _torch_load(path, mmap):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of pickles that cannot be read anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        if "mmap" in text or "allocate memory" in text:
            raise MemoryError(text) from error
        # a list of members that zipfile could make sense of, and torch cannot
        if "PytorchStreamReader" in text:
            raise Damaged(f"{path}: damaged, its list of members makes no sense; use another copy, or remove "
                          "it") from error
        # Its digest was right (or it has none), so this is what somebody wrote.
        foreign = re.search(r"GLOBAL ([\w.]+)|type '?([\w.]+)'?", text)
        found = next((g for g in foreign.groups() if g), None) if foreign else None
        what = f"torch cannot read it ({' '.join(text.split())[:100] or type(error).__name__})"
        if found:
            what = f"it holds {found}, and only tensors, plain containers and argparse.Namespace are read"
        raise ValueError(f"{path}: refused, {what}; use a file of tensors") from error


def _load_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as error:  # its header and its length do not agree
        raise Damaged(f"{path}: damaged ({' '.join(str(error).split())[:100]}); use another copy, or remove "
                      "it") from error


def load_json(path):
    """The content of a JSON file, a dict. Raises FileNotFoundError, OSError, or Damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not valid JSON; use another copy, or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__} where a JSON object is expected")
    return content


def training_args(content, path):
    """The flags a checkpoint was trained with: its `args`, or args.json beside it or in its run folder."""
    args = content.get("args")
    if args is not None:
        if not isinstance(args, (dict, argparse.Namespace)):
            raise ValueError(f"{path}: its args are a {type(args).__name__} instead of a dict")
        return dict(args if isinstance(args, dict) else vars(args))
    folder = os.path.dirname(os.path.abspath(path))
    for candidate in (os.path.join(folder, "args.json"), os.path.join(os.path.dirname(folder), "args.json")):
        if os.path.isfile(candidate):
            return load_json(candidate)
    raise FileNotFoundError(f"{path}: no args in it and no args.json beside it or in its run folder")


def check_state(module, state, what):
    """Raise a one-line ValueError unless `state` has exactly the names and shapes of module.state_dict()."""
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{what}: holds no weights (a dict of name -> tensor)")
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or wrong:
        parts = [f"{len(keys)} {label} (first: {keys[0]})" for keys, label in
                 ((missing, "missing"), (extra, "not known here")) if keys]
        if wrong:
            parts.append(f"{wrong[0]} is {list(state[wrong[0]].shape)} instead of "
                         f"{list(own[wrong[0]].shape)}")
        raise ValueError(f"{what}: weights of another architecture, {'; '.join(parts)}")


def load_weights(module, state, what):
    """Strict load_state_dict of `state` (name -> tensor) into `module`; errors name the source `what`."""
    check_state(module, state, what)
    module.load_state_dict(state)
    return module


def check_optimizer_state(optimizer, state, what):
    """Raise a one-line ValueError unless `state` is one of `optimizer` (AdamW) with its parameters' shapes.

    load_state_dict does not look at shapes, and the fused kernels then read and write past the end of the
    moments. A parameter without state passes: it has had no gradient yet.
    """
    own = optimizer.state_dict()
    groups, entries = (state.get(k) if isinstance(state, dict) else None for k in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(entries, dict):
        raise ValueError(f"{what}: no optimiser state (a dict with state and param_groups)")
    listed = [g.get("params") if isinstance(g, dict) else None for g in groups]
    sizes = [len(params) if isinstance(params, list) else None for params in listed]
    expected = [len(g["params"]) for g in own["param_groups"]]
    if sizes != expected:
        raise ValueError(f"{what}: optimiser state of {sizes} parameters instead of {expected}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in groups for i in group["params"]]
    if len(set(order)) != len(order) or not set(entries) <= set(order):
        raise ValueError(f"{what}: optimiser state of parameters that it does not list")
    for index, parameter in zip(order, parameters):
        wrong = wrong_moment(entries[index], parameter) if index in entries else None
        if wrong:
            raise ValueError(f"{what}: optimiser state of another network, {wrong} of parameter {index}, "
                             "which is "
                             f"{list(parameter.shape)}")


def wrong_moment(entry, parameter):
    """What AdamW's state of one parameter lacks or has wrong, in words; None if it fits."""
    if not isinstance(entry, dict):
        return f"a {type(entry).__name__} as the state"
    for name in ("exp_avg", "exp_avg_sq"):
        value = entry.get(name)
        if not torch.is_tensor(value) or not value.is_floating_point():
            return f"no {name}"
        if value.shape != parameter.shape:
            return f"{name} {list(value.shape)}"
    step = entry.get("step")
    is_number = isinstance(step, (int, float)) or (torch.is_tensor(step) and step.numel() == 1)
    return None if is_number else "no step"


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


# ---------------------------------------------------------------- fetching

TRIES = 3
BACK_OFF = 1.0  # seconds before the second try; doubled after it
TIMEOUT = (10.0, 30.0)  # seconds to a connection, and without a byte


def cache_path(*parts):
    """A path in the download cache: <torch hub folder>/repae/... (TORCH_HOME moves it)."""
    return os.path.join(torch.hub.get_dir(), "repae", *parts)


def https_session():
    """A requests session that can open https addresses and no others, redirects included."""
    session = requests.Session()
    del session.adapters["http://"]
    return session


class _Again(Exception):
    """A failure of the network that may be gone a moment later."""


def _with_retries(fetch, url, path):
    """fetch() -> result, up to TRIES times if it fails in a way that may pass; failures become one line."""
    for attempt in range(1, TRIES + 1):
        try:
            with _broken_off():
                return fetch()
        except (_Again, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            known = isinstance(error, _Again)
            reason = str(error) if known else f"{type(error).__name__}, no whole answer came"
            if attempt == TRIES:
                raise OSError(f"{url}: cannot be fetched ({reason}; {TRIES} tries); try again later or put "
                              "the file at "
                              f"{path}") from error
            time.sleep(BACK_OFF * 2 ** (attempt - 1))
        except requests.exceptions.InvalidSchema as error:
            raise ValueError(f"{url}: refused, it leads to an address that is not https") from error
        except requests.HTTPError as error:
            code = error.response.status_code
            hint = "set HF_TOKEN to a token that may read it" if code in (401, 403) else "check the name"
            raise OSError(f"{url}: cannot be fetched (HTTP {code}); {hint}, or put the file at {path}"
                          ) from error
        except requests.RequestException as error:  # no network at all: said at once
            raise OSError(f"{url}: cannot be fetched ({type(error).__name__}); without a network put the "
                          f"file at {path}"
                          ) from error


@contextlib.contextmanager
def _broken_off():
    """Context in which a connection that was made, and ended without an answer, is _Again; where there is no
    network requests raises the same type, but not for this reason."""
    try:
        yield
    except requests.ConnectionError as error:
        if not error.args or not isinstance(error.args[0], ProtocolError):
            raise
        raise _Again("the connection was broken off") from error


def _check_status(response):
    if response.status_code >= 500 or response.status_code == 429:
        raise _Again(f"HTTP {response.status_code}")
    response.raise_for_status()


def download(url, path, size=None, sha256_prefix=None, headers=None):
    """Fetch an https URL to `path` unless it is there; size and leading sha256 digits are checked first.

    Tried three times when the server fails, stalls or stops early. Raises OSError if it cannot be fetched,
    ValueError if what came is not the file that was promised; then nothing is kept.
    """
    if os.path.isfile(path):
        return path
    if not url.startswith("https://"):
        raise ValueError(f"{url}: only https downloads are allowed")
    remove_leftovers(os.path.dirname(os.path.abspath(path)))    # of downloads that were killed

    def fetch():
        plain = {"Accept-Encoding": "identity"} | (headers or {})  # so that lengths are those of the file
        with https_session() as session, replace(path) as temporary, \
                session.get(url, stream=True, timeout=TIMEOUT, headers=plain) as response:
            _check_status(response)
            promised = response.headers.get("Content-Length")
            expected = size if size is not None else int(promised) if (promised or "").isdigit() else None
            got = 0
            with open(temporary, "wb") as f:
                try:
                    for block in response.iter_content(1 << 20):
                        got += f.write(block)
                        if expected is not None and got > expected:
                            break  # more than promised: whatever it is, it shall not fill the disk
                except requests.ConnectionError as error:  # the answer had begun
                    raise _Again(f"stopped after {got} bytes") from error
            if expected is not None and got < expected:
                raise _Again(f"{got} of {expected} bytes came")
            if expected is not None and got > expected:
                raise ValueError(f"{url}: is longer than {expected} bytes; do not use this file")
            if sha256_prefix and not sha256(temporary).startswith(sha256_prefix):
                raise ValueError(f"{url}: the sha256 does not begin with {sha256_prefix}; do not use this "
                                 "file")
        return path
    return _with_retries(fetch, url, path)


def hub_file(repo, filename):
    """Path of huggingface.co/{repo}'s {filename}: cached, or fetched and checked by the hub's own sha256.

    The token of a gated repository is taken from the environment variable HF_TOKEN.
    """
    path = cache_path(repo, filename)
    if os.path.isfile(path):
        return path
    url = f"https://huggingface.co/{repo}/resolve/main/{filename}"
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}

    def ask():  # not followed: the hub's own headers hold the digest
        with https_session() as session:
            answer = session.head(url, timeout=TIMEOUT, headers=headers)
        _check_status(answer)
        return answer.headers
    answer = _with_retries(ask, url, path)
    size = answer.get("X-Linked-Size", "")
    digest = answer.get("X-Linked-ETag", "").strip('"')
    size = int(size) if size.isdigit() else None
    return download(url, path, size, digest if len(digest) == 64 else None, headers)
