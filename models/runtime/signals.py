"""A polite end: SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and stop; a second Ctrl-C ends it at once.

`stopped_in_one_line` is for work that has nothing to save. `watch` is for work that has:

    with signals.watch() as asked:
        for batch in batches:
            ...
            if asked.by:        # "SIGTERM"; asked.at is when, on the clock of time.monotonic()
                break
"""
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def watch():
    """Context whose value has `by`, the first signal that asked for the end (or None), and `at`, its time.

    Nothing is interrupted: the work looks when it can stop.
    """
    asked = SimpleNamespace(by=None, at=None)
    # One Ctrl-C may come twice under torchrun, which passes it on: from the terminal, and from torchrun.
    echo = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handle(number, frame):
        if asked.by is None:
            asked.by, asked.at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - asked.at >= echo:
            signal.signal(number, signal.SIG_DFL)  # ends as a process without Python would: no traceback
            os.kill(os.getpid(), number)

    with handled_by(handle):
        yield asked


@contextlib.contextmanager
def stopped_in_one_line(remedy):
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C end the process in one line that closes with `remedy`; a
    second one at once. For work that leaves nothing half done wherever it stops.
    """
    def stop(number, frame):
        for name in WATCHED:
            signal.signal(name, signal.SIG_DFL)
        line = f"stopped by {signal.Signals(number).name}: {remedy}\n"
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            os.write(2, ("\n" * sys.stderr.isatty() + line).encode())  # not print: the work may be printing
        sys.exit(128 + number)      # as shells report a process that a signal ended

    with handled_by(stop):
        yield


def at_once():
    """Context in which they end the process at once, whatever else is arranged: for waiting in C++, where no
    handler of Python's would run."""
    return handled_by(signal.SIG_DFL)


@contextlib.contextmanager
def handled_by(handler):
    """Context in which `handler` gets the three signals, in the main thread: Python allows none elsewhere."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in WATCHED if in_main_thread}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_torchrun():
    """Let this process, a child of torchrun, get a Ctrl-C when torchrun dies.

    torchrun runs its processes in sessions of their own: when it is killed (SIGKILL, or SIGUSR1, which it
    does not handle) they would go on without it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(AttributeError, OSError):  # Linux only
            ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
