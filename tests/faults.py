"""What can go wrong, tried: hostile settings, files, disks, signals and networks, kills, mutated files.

    python tests/faults.py                          # every case
    python tests/faults.py data signals --verbose   # groups by name
    python tests/faults.py --kills 100              # kill loops over every writer; the final bits are equal each time
    python tests/faults.py --fuzz 2000              # mutated files for each reader

Every case runs a script in a forked process of its own, with limits on time and memory, and says what must come of it:
refused in one line with exit code 2, survived with equal bits, or continued. The table at the end counts those tried and
held by group; the exit code is 1 if one failed. The suite runs the quick ones (tests/test_faults.py).
"""
import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import fault_cases  # noqa: F401
import fault_disks  # noqa: F401
import fault_fuzz
import fault_kills
import fault_network  # noqa: F401
import fault_odd  # noqa: F401
import fault_runs  # noqa: F401
import fault_signals  # noqa: F401
import fault_tools


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help="groups of cases; all without one")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--cheap", action="store_true", help="those of the suite")
    parser.add_argument("--verbose", action="store_true", help="a line for each case with its seconds")
    parser.add_argument("--kills", type=int, help="instead of cases: so many kills, over every writer in turn")
    parser.add_argument("--fuzz", type=int, help="instead of cases: so many mutated files for each reader")
    args = parser.parse_args()
    cases = [c for c in fault_tools.CASES if (not args.groups or c.group in args.groups) and args.only in c.name
             and (c.cheap or not args.cheap)]
    fault_tools.begin()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        folder = Path(folder)
        if args.kills or args.fuzz:
            fault_tools.make_world(folder / "have")
        if args.kills:
            done, failed = fault_kills.kill_loop(args.kills, folder, folder / "have")
            print(f"{done} kills over {min(done, len(fault_kills.WRITERS))} writers, bits differed {len(failed)} times")
        elif args.fuzz:
            failed = [text for found in fault_fuzz.fuzz(args.fuzz, folder, folder / "have").values()
                      for text in found["failed"]]
        else:
            failed = run(cases, folder, args.jobs, args.verbose)
    sys.exit(1 if failed else 0)


def run(cases, folder, jobs=2, verbose=False):
    """Try the cases; print what fails and a table. Returns the names of those that failed."""
    folder.chmod(0o755)     # for those who are nobody
    begun = time.monotonic()
    have = folder / "have"
    fault_tools.make_world(have)
    print(f"world made in {time.monotonic() - begun:.0f} s", flush=True)
    before = fault_tools.digests(have)

    def attempt(numbered):
        k, case = numbered
        at = time.monotonic()
        wrong = fault_tools.attempt(case, folder / f"{k:04d}", have)
        if isinstance(wrong, fault_tools.Skip):
            print(f"skipped: {case.group}: {case.name}: {wrong}", flush=True)
        elif wrong:
            print(f"FAILED: {case.group}: {case.name}\n{wrong}\n", flush=True)
        elif verbose:
            print(f"held: {case.group}: {case.name} ({time.monotonic() - at:.1f} s)", flush=True)
        return wrong
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(attempt, enumerate(cases)))
    if fault_tools.digests(have) != before:
        raise AssertionError("a case changed what it was to read")

    rows, failed = {}, [f"{c.group}: {c.name}" for c, wrong in zip(cases, results)
                        if wrong and not isinstance(wrong, fault_tools.Skip)]
    for case, wrong in zip(cases, results):
        row = rows.setdefault(case.group, [0, 0])
        row[0] += not isinstance(wrong, fault_tools.Skip)
        row[1] += wrong is None
    rows["all"] = [sum(row[k] for row in rows.values()) for k in (0, 1)]
    print(f"\n{'group':<14}{'tried':>7}{'held':>7}")
    for group, (tried, held) in rows.items():
        print(f"{group:<14}{tried:>7}{held:>7}")
    print(f"{time.monotonic() - begun:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    main()
