"""`pytest --jobs 2`: the test files shared out among processes, forked once all tests are collected.

Each is given the next file when it is done with one, the longest first. What it reports goes to the first
process, which prints and counts it as if it had run the file itself: options, summary and exit code are
pytest's own. Warnings are not passed on.
"""
import itertools
import multiprocessing
from multiprocessing.connection import wait

import pytest

LONG = ("test_faults.py", "test_memory.py", "test_golden_train.py")     # though they are small


def run(session, begin):
    """The hook pytest_runtestloop: session.items in --jobs processes, each of which calls begin() first."""
    if session.testsfailed or session.config.option.collectonly:
        return None     # pytest's own loop knows what to do then
    session.config._tmp_path_factory.getbasetemp()      # one folder for the files of all
    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    paths = [items[0].path for items in files]
    waiting = sorted(range(len(files)), key=lambda k: (paths[k].name in LONG, paths[k].stat().st_size))
    context, workers, events = multiprocessing.get_context("fork"), {}, {}
    for _ in range(min(session.config.option.jobs, len(files))):
        pipe, other_end = context.Pipe()
        workers[pipe] = context.Process(target=_work, args=(session, files, other_end, begin))
        workers[pipe].start()
        other_end.close()
        events[pipe] = []
    try:
        while workers:
            for pipe in wait(list(workers)):
                try:
                    event = pipe.recv()
                except EOFError:
                    _say(session, events[pipe])
                    workers[pipe].join()
                    test = ["what comes first", *(e[1] for e in events[pipe] if e[0] == "start")][-1]
                    pytest.exit(f"{test} ended its process, exit code {workers[pipe].exitcode}", returncode=1)
                if event:
                    events[pipe].append(event)
                    continue
                _say(session, events[pipe])
                events[pipe].clear()
                if waiting:
                    pipe.send(waiting.pop())
                else:
                    pipe.send(None)
                    workers.pop(pipe).join()
    finally:
        for worker in workers.values():
            worker.kill()
    return True


def _say(session, events):
    """Give pytest in the first process what another one has seen of a file."""
    hook = session.config.hook
    for kind, *event in events:
        if kind == "start":
            hook.pytest_runtest_logstart(nodeid=event[0], location=event[1])
        else:
            report = hook.pytest_report_from_serializable(config=session.config, data=event[0])
            hook.pytest_runtest_logreport(report=report)
    if session.shouldfail:      # --maxfail
        raise session.Failed(session.shouldfail)


class _Sender:
    """Takes the place of what prints."""

    def __init__(self, config, pipe):
        self.config, self.pipe, self._tw = config, pipe, config.get_terminal_writer()

    def pytest_runtest_logstart(self, nodeid, location):
        self.pipe.send(("start", nodeid, location))

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.pipe.send(("report", data))


def _work(session, files, pipe, begin):
    """In a process of its own: runs the files whose numbers come, sends what happens, and None after each."""
    config = session.config
    sender, capture = _Sender(config, pipe), config.pluginmanager.getplugin("capturemanager")
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(sender, "terminalreporter")
    capture.stop_global_capturing()         # its files are the first process's
    capture.start_global_capturing()
    capture.suspend_global_capture()
    begin()
    pipe.send(None)
    while (number := pipe.recv()) is not None:
        items = files[number]
        for item, following in zip(items, [*items[1:], None]):
            if not session.shouldfail:
                config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        pipe.send(None)
