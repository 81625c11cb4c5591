"""The scripts in other processes, forked from one that has imported them: an import takes many seconds."""
import importlib
import multiprocessing
import os
import signal
import socket
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from models.sit import SiT, SiT_models

ROOT = Path(__file__).resolve().parent.parent

context = multiprocessing.get_context("forkserver")

# In the tests and in the processes that they start, but not in a command line: most of a tiny run's time
# would go into a network of millions of weights.
SiT_models["SiT-Ti/4"] = partial(SiT, depth=4, hidden_size=48, num_heads=3, patch_size=4, projector_dim=32)


def begin():
    """Start the process that the others are forked from; it imports while the first tests run."""
    scripts = ["train_repae_e", "finetune_vae", "sample_ddp", "evaluate_fid"]
    context.set_forkserver_preload([*scripts, "processes"])
    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT / "tests", ROOT):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        forkserver.ensure_running()


def _main(script, arguments, log, settings, folder, hooks, environment):
    os.setpgid(0, 0)  # so that a kill reaches its data workers as well
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    os.chdir(folder)
    torch.set_num_threads(1)
    for hook, *given in hooks:
        hook(*given)
    module = importlib.import_module(script)
    for name, value in settings.items():
        setattr(module, name, value)
    module.main([str(a) for a in arguments])


def start(script, arguments, log, settings={}, folder=".", hooks=(), **environment):
    """main(arguments) of a script, given without .py, in a process of its own with one thread.

    It works in `folder` and its output goes to `log`; `settings` replace constants of the script, and
    (function, *arguments) of `hooks` are called before it.
    """
    process = context.Process(target=_main, args=(script, arguments, str(log), settings, str(folder), hooks,
                                                  environment))
    process.start()
    return process


def rendezvous():
    """What torchrun sets for each of two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank in ("0", "1")]


def start_two(script, arguments, log, settings={}):
    """The same in two processes."""
    return [start(script, arguments, log, settings, **more) for more in rendezvous()]


def run_two(script, arguments, log, settings={}):
    """start_two; waits, and fails with their output if one fails."""
    both = start_two(script, arguments, log, settings)
    try:
        wait_for(lambda: all(p.exitcode == 0 for p in both), both, log)
    finally:
        for p in both:
            kill(p)


def wait_for(condition, processes, log, seconds=240):
    """Until condition() holds; fails with the log where a process ends badly before, or time runs out."""
    deadline = time.monotonic() + seconds
    while not condition():
        if any(p.exitcode not in (None, 0) for p in processes) or time.monotonic() > deadline:
            codes = [p.exitcode for p in processes]
            for p in processes:
                kill(p)
            raise AssertionError(f"exit codes {codes} (None: was still running)\n{Path(log).read_text()}")
        time.sleep(0.005)


def kill(process):
    """SIGKILL to the process and its children, if it still runs."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            process.kill()
    process.join()
