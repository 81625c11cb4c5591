"""Machinery of tests/faults.py: cases, the files they start from, and forked processes with limits.

A case is a function of (tmp, have) that raises AssertionError where something does not hold: tmp is an empty folder of
its own, have the folder that `make_world` filled, which no case may change. Cases are registered by `case` and
`refused`; what they run are the scripts' own main functions, in processes forked from one that has imported them.
"""
import contextlib
import functools
import hashlib
import importlib
import itertools
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import loopback
import numpy as np
import processes
import torch
from PIL import Image

from models import encoders
from models.runtime import features, files

SECONDS, GIB = 60, 2        # what a process may take, beside what it has mapped when it begins
NOBODY = 65534              # a user without rights; only root can become it
TRAIN = ["--preset", "demo", "--model", "SiT-Ti/4", "--encoder-depth", "1", "--batch-size", "2", "--sampling-steps", "0",
         "--log-every", "1", "--checkpointing-steps", "1", "--max-train-steps", "3", "--exp-name", "run",
         "--output-dir", "{tmp}/exps"]
REFINE = ["--preset", "demo", "--ckpt", "{have}/vae.pt", "--encoder", "hog", "--batch-size", "2", "--sampling-steps", "0",
          "--log-every", "1", "--checkpointing-steps", "1", "--max-train-steps", "3", "--exp-name", "refined",
          "--output-dir", "{tmp}/exps"]
SAMPLE = ["--ckpt", "{have}/exps/run/checkpoints/0000003.pt", "--num-fid-samples", "12", "--num-steps", "2",
          "--pproc-batch-size", "4", "--npz", "{tmp}/a.npz"]
HOG = ["--features", "hog"]
FROZEN = [*TRAIN, "--data-dir", "{have}/photos", "--freeze-vae", "--vae-ckpt", "{have}/vae.pt", "--exp-name", "frozen",
          "--latent-cache", "{tmp}/cache", "--cache-features", "{tmp}/cache"]


# ---------------------------------------------------------------- cases

@dataclass
class Case:
    group: str
    name: str
    run: callable       # (tmp, have)
    cheap: bool = False  # part of the suite's form

CASES = []
TURN = threading.Lock()     # multiprocessing looks after all processes at every start: threads must not do so at once


def case(group, name, cheap=False):
    """Decorator: the function (tmp, have) is the case `name` of `group`."""
    def register(function):
        CASES.append(Case(group, name, function, cheap))
        return function
    return register


def refused(group, name, script, flags, *words, make=None, code=2, leaves=(), cheap=None, **how):
    """Register the case that a script ends in one line on stderr that has all `words`, with that exit code, and changes
    no file. make(tmp, have): lays what is needed; leaves: files that may be new; how: see `start`."""
    def run(tmp, have):
        if make is not None:
            make(tmp, have)
        before = digests(tmp)
        assert_refused(finish(start(script, flags, tmp, have, **how)), words, code)
        after = digests(tmp)
        changed = [name for name in {*before, *after} if before.get(name) != after.get(name) and name not in leaves]
        assert not changed, f"changed: {changed}"
    CASES.append(Case(group, name, run, make is None if cheap is None else cheap))


def assert_refused(done, words=(), code=2):
    lines = done.err.splitlines()
    assert "Traceback" not in done.out + done.err, done.text
    assert done.code == code, f"exit code {done.code} instead of {code}\n{done.text}"
    assert lines and lines[-1].startswith("error: "), done.text
    assert all(line.startswith("note: ") for line in lines[:-1]), done.text
    assert all(str(word) in lines[-1] for word in words), f"{words} expected in: {lines[-1]}"


def assert_done(done, *words):
    assert done.code == 0 and "Traceback" not in done.out + done.err, done.text
    assert all(word in done.out + done.err for word in words), f"{words} expected in:\n{done.text}"


def attempt(a_case, folder, have):
    """None if the case holds, else what went wrong."""
    folder.mkdir()
    try:
        a_case.run(folder, have)
    except Skip as reason:
        return reason
    except Exception as error:
        return str(error) if isinstance(error, AssertionError) and str(error) else traceback.format_exc()
    finally:
        remove(folder)


@contextlib.contextmanager
def small_disk(folder, size):
    """Context in which `folder` is a disk of `size` bytes; Skip where this machine does not let us."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", folder], capture_output=True)
    if mounted.returncode:
        raise Skip(f"no disk can be mounted here ({mounted.stderr.decode().strip()})")
    try:    # its value makes it larger
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


class Skip(Exception):
    """This machine cannot show the case."""


def digests(folder):
    """{relative name: content or what it is} of all in a folder; the content of large files by their digest."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        status = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if is_file and os.access(path, os.R_OK) else status.st_mode
        found[str(path.relative_to(folder))] = content
    return found


def remove(folder):
    """rm -rf, whatever rights a case has taken away."""
    for path, names, _ in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- processes

def begin():
    """Start the process that the others are forked from."""
    processes.begin()


def start(script, flags, tmp, have, hooks=(), env=(), seconds=SECONDS, name="0", gib=GIB):
    """A script's main with these flags in a forked process; {tmp} and {have} in them are filled in.

    hooks: [(function of this module's top level, *arguments)], called in the process first; env: dict of variables.
    """
    fill = functools.partial(fill_in, tmp=tmp, have=have)
    log = Path(f"{tmp}.{name}")     # beside the folder, which shall hold what the script writes and nothing else
    flags = [fill(flag) for flag in flags]
    hooks = [tuple(fill(x) for x in hook) for hook in hooks]
    process = processes.context.Process(target=_child, args=(script, flags, str(tmp), str(log), hooks, dict(env), gib))
    with TURN:
        process.start()
    return SimpleNamespace(process=process, pid=process.pid, log=log, deadline=time.monotonic() + seconds, seconds=seconds)


def fill_in(text, tmp, have):
    return text.replace("{tmp}", str(tmp)).replace("{have}", str(have)) if isinstance(text, str) else text


def finish(run):
    """Wait for it: namespace(code, out, err, text of both)."""
    while (late := is_running(run)) and time.monotonic() < run.deadline:
        time.sleep(0.005)
    with TURN:
        processes.kill(run.process)
    out, err = (Path(f"{run.log}.{end}").read_text(errors="replace") for end in ("out", "err"))
    assert not late, f"still running after {run.seconds} s\n{out}{err}"
    return SimpleNamespace(code=run.process.exitcode, out=out, err=err, text=f"{out}{err}"[-3000:])


def start_two(script, flags, tmp, have, env=(), **how):
    """The same in two processes, with what torchrun sets for them."""
    return [start(script, flags, tmp, have, env=dict(env) | more, name=more["RANK"], **how)
            for more in processes.rendezvous()]


def execute_two(*arguments, **how):
    """start_two and finish of both."""
    return [finish(run) for run in start_two(*arguments, **how)]


def is_running(run):
    with TURN:
        return run.process.is_alive()


def wait(run, condition):
    """Until condition() holds while the process runs."""
    while not condition():
        assert is_running(run) and time.monotonic() < run.deadline, finish(run).text
        time.sleep(0.005)


def execute(*arguments, **how):
    """start and finish."""
    return finish(start(*arguments, **how))


def _child(script, flags, folder, log, hooks, environment, gib):
    os.setpgid(0, 0)  # so that a kill reaches its data workers as well
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    os.chdir(folder)
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "TORCH_HOME": f"{folder}/torch", "HF_HUB_OFFLINE": "1",
                       "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"} | environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # as the scripts do before they import torch
    small_networks()
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(gib * 2 ** 30),) * 2)
    for hook, *arguments in hooks:
        hook(*arguments)
    if script:
        importlib.import_module(script).main(flags)


def small_networks():
    """Networks under the names of the smallest, of a few hundred kB: a run of three steps takes a second."""
    import finetune_vae
    import train_repae_e
    from models.sit import SiT, SiT_models
    from models.vae import AutoencoderKL, VAE_models
    SiT_models["SiT-Ti/4"] = lambda **more: SiT(**{"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
                                                   "projector_dim": 16, **more})
    VAE_models["f4d4"] = lambda: AutoencoderKL(4, base=8, multipliers=(1, 1, 2), blocks=1)
    VAE_models["f8d4"] = lambda: AutoencoderKL(4, base=128, multipliers=(1, 1, 1, 1), blocks=1)     # diffusers: 128
    for module, count in ((finetune_vae, "vae_step_flops"), (train_repae_e, "step_flops")):
        setattr(module, count, lambda *_: 1.0)
        module.matmul_rate = lambda *_: 1e9


# ---------------------------------------------------------- hooks: what is done to a process before it begins

def limit_files(size):
    """No file can grow beyond `size` bytes: a disk that fills."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(gib):
    """Less memory than the case has by default."""
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(gib * 2 ** 30),) * 2)


def as_nobody():
    """Without root's rights, to which no permission applies."""
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def slow_saves(seconds):
    """Every checkpoint takes longer."""
    save = files.save
    files.save = lambda *arguments: (time.sleep(seconds), save(*arguments))


def to_loopback(port):
    """The internet is the loopback.Server at this port, with little patience for it."""
    files.https_session = loopback.sessions(port)
    files.BACK_OFF, files.TIMEOUT = 0.01, (1, 1)
    encoders.BACK_OFF, encoders.TIMEOUT = 0.01, 1
    encoders.MOCOV3_URL = f"http://127.0.0.1:{port}/{{0}}.pth.tar"
    for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE"):
        os.environ.pop(name)


class SmallInception(torch.nn.Module):
    """Instead of the Inception network: outputs of its sizes, out of the pixels."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(64.0))

    def forward(self, images):
        x = images.flatten(1).float() / self.scale
        return x[:, :2048], x[:, :2023]

    def logits(self, pool):
        return pool[:, :1008] / 50


def small_inception(digest=None):
    """evaluate_fid.py's network is SmallInception; digest: of the file that is downloaded for it."""
    features.FIDInception = SmallInception
    features.WEIGHTS_SHA256 = digest or features.WEIGHTS_SHA256


def pause_at(module, name, marker, stubborn=False):
    """The next call of a function lasts until a signal ends it, or {marker}.go is there; {marker} says it has begun.
    stubborn: a first signal does not end it."""
    module = importlib.import_module(module)
    function, seen = getattr(module, name), []

    def paused(*arguments, **more):
        Path(marker).touch()
        going = False
        while not going:
            try:
                time.sleep(0.01)
                going = os.path.exists(f"{marker}.go")
            except SystemExit:
                if not stubborn or seen:
                    raise
                seen.append(1)
        setattr(module, name, function)
        return function(*arguments, **more)
    setattr(module, name, paused)


def no_check(module, name):
    """A function that looks whether there is room, or the like, finds nothing wrong."""
    setattr(importlib.import_module(module), name, lambda *arguments: None)


def clock(*seconds):
    """time.time says these, again and again: a clock that stands still, or goes backwards."""
    told = itertools.cycle(seconds)
    time.time = lambda: next(told)


def set_constant(module, name, value):
    """Replace a constant of a module."""
    setattr(importlib.import_module(module), name, value)


# ---------------------------------------------------------------- the world

def make_world(have):
    """Fill the folder `have`: checkpoints of both scripts, VAEs, photos, .npz files, exports. In the suite's style: tiny."""
    have.mkdir()
    photos(have / "photos")
    pack(have / "photos", have / "photos.zip")
    np.savez(have / "s.npz", pictures(8))
    np.savez(have / "r.npz", pictures(12, 1))
    build = start(None, [], have, have, [(_networks, str(have))], seconds=120, name="networks")
    assert_done(finish(build))
    for script, flags in (("train_repae_e", TRAIN), ("finetune_vae", REFINE), ("sample_ddp", SAMPLE),
                          ("train_repae_e", FROZEN)):
        assert_done(execute(script, flags, have, have, seconds=120, name=script))
    for flags in (["--format", "diffusers", "--ckpt", "{have}/wide.pt", "--export", "{have}/diffusers"],
                  ["--format", "compvis", "--ckpt", "{have}/vae.pt", "--export", "{have}/compvis"]):
        assert_done(execute("finetune_vae", flags, have, have, seconds=120, name="export"))
    assert_done(execute("models.runtime.prepare", ["{have}/photos", "{have}/prepared.zip", "--resolution", "32",
                                                   "--num-workers", "0"], have, have))
    for path in have.parent.glob(f"{have.name}.*"):
        path.unlink()


def _networks(have):
    from models.vae import VAE_models
    torch.manual_seed(7)
    files.save(VAE_models["f4d4"]().state_dict(), f"{have}/vae.pt")
    files.save(VAE_models["f8d4"]().state_dict(), f"{have}/wide.pt")
    stats = {"latents_scale": torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1),
             "latents_bias": torch.tensor([0.1, 0.2, 0.3, -0.4]).view(1, 4, 1, 1)}
    files.save(stats, f"{have}/vae-latents-stats.pt")
    files.save(SmallInception().state_dict(), f"{have}/inception.pt")


def pictures(n, seed=0, size=32):
    """n smooth random images, uint8 [n, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.BICUBIC)) for x in coarse])


def photos(folder, classes=("ant", "bird", "fish"), each=4):
    """A folder of class folders of small images."""
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(pictures(each, k, 40)):
            Image.fromarray(image).save(folder / name / f"{i}.{('png', 'jpg')[i % 2]}")


def pack(folder, path, change=None):
    """A .zip of a folder. change(archive): what is to be added."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*g")):
            archive.write(file, file.relative_to(folder))
        if change is not None:
            change(archive)


def read_state(path):
    return torch.load(path, weights_only=True)


def change_state(path, change):
    """Read a checkpoint, let `change` work on it, and write it as a foreign program would: without our checks."""
    state = read_state(path)
    changed = change(state)
    state = state if changed is None else changed
    path.unlink(missing_ok=True)
    torch.save(state, path)


def flip(path, place, bits=255):
    """Change the byte at `place`, a number or a fraction of the size."""
    data = bytearray(path.read_bytes())
    data[int(place if place >= 1 else place * len(data))] ^= bits
    path.write_bytes(data)


def cut(path, share):
    """Keep only this share of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])


def copy(what, to):
    """Copy a file or a folder."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(what, to) if what.is_dir() else shutil.copy(what, to)
    return to


def same_state(a, b, path=""):
    """Assert that two checkpoints are equal to the bit but for the folder they were made in."""
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{path}: other keys"
        for key in a:
            if key not in LEFT_OUT:
                same_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{path}: other length"
        for k, pair in enumerate(zip(a, b)):
            same_state(*pair, f"{path}/{k}")
    else:
        assert a == b, f"{path}: {a} and {b}"


LEFT_OUT = ("output_dir", "resume", "max_train_steps", "keep_checkpoints", "latent_cache", "cache_features")


# ---------------------------------------------------------------- what an undisturbed run makes

WHOLES, MAKING = {}, threading.Lock()


def whole(name, make, have):
    """The folder that make(folder) fills, made once for all cases."""
    with MAKING:
        if name not in WHOLES:
            folder = Path(tempfile.mkdtemp(prefix="whole-", dir=have.parent))
            make(folder)
            WHOLES[name] = folder
    return WHOLES[name]


def results(folder):
    """{name: content} of what a script left, but for what is only about the moment it ran, and checkpoints."""
    left_out = ("log.txt", "metrics.jsonl", ".lock", ".json", "args.json", ".pt")
    return {name: content for name, content in digests(folder).items() if not name.endswith(left_out)}


def compare(undisturbed, folder):
    """Assert that a folder holds the files of an undisturbed run, bit by bit."""
    one, two = results(undisturbed), results(folder)
    names = sorted(n for n in {*one, *two} if one.get(n) != two.get(n))
    assert not names, f"other files: {names}"
    for path in sorted(undisturbed.rglob("*.pt")):
        same_state(read_state(path), read_state(folder / path.relative_to(undisturbed)), path.name)
