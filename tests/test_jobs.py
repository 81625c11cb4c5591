"""tests/jobs.py: the tests of two processes are counted, and fail, as those of one."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

CONFTEST = """
import jobs

def pytest_addoption(parser):
    parser.addoption("--jobs", type=int, default=1)

def pytest_runtestloop(session):
    if session.config.option.jobs > 1:
        return jobs.run(session, lambda: None)
"""
GOOD = """
import os, pytest

@pytest.fixture(scope="module")
def number():
    yield 3
    print("the fixture ends")

@pytest.mark.parametrize("k", range(3))
def test_good(number, k, tmp_path, capfd):
    os.write(1, b"to a file descriptor")
    assert number == 3 and capfd.readouterr().out == "to a file descriptor"

def test_skipped():
    pytest.skip("for a reason")
"""
BAD = """
def test_bad():
    print("it said this")
    assert [1, 2] == [1, 3]
"""
DEADLY = """
import os, time

def test_before(): pass

def test_deadly(): os._exit(7)
"""


def outcome(folder, *flags, **tests):
    """(exit code, output, counts of the last line) of pytest with --jobs 2 on these files."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in tests.items():
        (folder / f"test_{name}.py").write_text(text)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "--jobs", "2", *flags, folder],
                          cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
                          capture_output=True, text=True)
    return done.returncode, done.stdout, re.sub(" in .*", "", done.stdout.splitlines()[-1])


def test_what_passes_is_counted_over_both(tmp_path):
    code, shown, counts = outcome(tmp_path, a=GOOD, b=GOOD, c=GOOD)
    assert (code, counts) == (0, "9 passed, 3 skipped") and shown.count("for a reason") == 3, shown


def test_a_failure_is_shown_with_its_output_and_the_exit_code_is_pytests(tmp_path):
    code, shown, counts = outcome(tmp_path, a=GOOD, b=BAD, c=GOOD)
    assert (code, counts) == (1, "1 failed, 6 passed, 2 skipped")
    assert "it said this" in shown and "At index 1 diff: 2 != 3" in shown


@pytest.mark.parametrize("flags, words", [((), "ended its process, exit code 7"), (("-x",), "1 failed")])
def test_a_process_that_dies_and_a_first_failure_end_the_run(tmp_path, flags, words):
    """With -x the failing file comes first, because it is the largest, and the deadly one is not begun."""
    bad = BAD + "#" * 2000 if flags else BAD
    code, shown, _ = outcome(tmp_path, *flags, a=DEADLY, b=bad, c=bad if flags else GOOD)
    assert code == 1 and words in shown, shown
    assert flags or "test_a.py::test_deadly ended" in shown


def test_a_file_that_cannot_be_imported_ends_the_run(tmp_path):
    code, shown, _ = outcome(tmp_path, a=GOOD, b="import no_such_module")
    assert code == 2 and "no_such_module" in shown and "passed" not in shown, shown
