"""All that only a GPU can show, in one command of ten minutes: one JSON and one table for the README.

    python tests/gpu_check.py [--out gpu_check] [--minutes 10] [--only NAME ...] [--again]
    python tests/gpu_check.py --tiny          the same code at tiny sizes, on a CPU too

Each piece runs in a process of its own under a time limit, the most important first: one that fails or hangs
is noted, with the figures it had until then, and the rest goes on. OUT/gpu_check.json is written after every
piece; the same command again does what is missing there or failed.
"""
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_train  # noqa: E402
import torch  # noqa: E402

from models.runtime import memory, runlog  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = ["--preset", "demo", "--model", "SiT-Ti/4", "--batch-size", "4", "--disc-weight", "0"]
# At a small learning rate: Adam's first steps are signs of gradients and would make noise of rounding.
SLOW = ["--learning-rate", "1e-5", "--vae-learning-rate", "1e-5", "--ema-decay", "0.5"]


def losses(device, number, *flags, plain=False):
    """The losses of `number` steps of a small run."""
    path = bench_train.Steps(bench_train.settings(*SMALL, *SLOW, *flags), torch.device(device), plain)
    for _ in range(number):
        path.step()
    return path.losses


def largest_difference(a, b):
    """Of two lists of losses: the largest |x - y| / max(1, |y|)."""
    return max(abs(x[k] - y[k]) / max(1.0, abs(y[k])) for x, y in zip(a, b, strict=True) for k in x)


def so_far(figures):
    """Print figures that count should this piece not come to its end."""
    print(json.dumps(figures), flush=True)


def within(**checks):
    """{name: (difference, tolerance)} as figures; raises AssertionError where one is too large."""
    figures = {name: {"difference": d, "tolerance": tol} for name, (d, tol) in checks.items()}
    assert all(f["difference"] <= f["tolerance"] for f in figures.values()), json.dumps(figures)
    return figures


def parity(tiny):
    """The step here against the CPU's in float32, which the golden tests compare with the reference."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def three(device, precision):
        return losses(device, 3, "--mixed-precision", precision, "--no-compile")
    expected = three("cpu", "no")
    return within(float32=(largest_difference(three(DEVICE, "no"), expected), 1e-4),
                  bf16=(largest_difference(three(DEVICE, "bf16"), expected), 0.02))


def twenty_steps(tiny):
    """The fast path, as it is by default on this device, against the plain one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    number = 4 if tiny else 20
    float32, bf16 = ("--mixed-precision", "no"), ("--mixed-precision", "bf16")
    plain = losses(DEVICE, number, *float32, plain=True)
    return within(float32=(largest_difference(losses(DEVICE, number, *float32), plain), 1e-4),
                  bf16=(largest_difference(losses(DEVICE, number, *bf16), plain), 0.02))


def counted_memory(tiny):
    """The predicted peak beside the real one, compiled and not, and with recomputation (GiB)."""
    figures = {}
    for name, flags in (("default", []), ("eager", ["--no-compile"]),
                        ("grad_checkpoint", ["--grad-checkpoint"])):
        flags = [*(SMALL if tiny else bench_train.PAPER), *flags]
        count = bench_train.count_memory(bench_train.settings(*flags)).peak / memory.GIB
        path = bench_train.Steps(bench_train.settings(*flags), DEVICE, False)
        if GPU:
            path.step()
            torch.cuda.reset_peak_memory_stats()
        path.step()
        figures[name] = {"counted": count, "real": runlog.peak_memory_gib(DEVICE)}
        if GPU:
            figures[name]["reserved"] = torch.cuda.max_memory_reserved() / memory.GIB
        so_far(figures)
        del path
        bench_train.free_memory()
    if GPU and not tiny:
        assert all(abs(f["counted"] / f["real"] - 1) <= 0.15 for f in figures.values()), json.dumps(figures)
    return figures


# ----------------------------------------------------------------------------------- pieces that are commands

def lines_of(command):
    """What a command prints, as lines; AssertionError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    return done.stdout.strip().splitlines()


def figures_of(*command):
    """The JSON lines that a script of tests/ prints, each said on at once."""
    found = []
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
                so_far(found)
    assert process.returncode == 0, f"exit code {process.returncode}; see above"
    return found


def gpu_tests(tiny):
    """The tests marked gpu; without a GPU they skip."""
    where = "tests/test_performance.py" if tiny else "tests"
    return {"summary": lines_of([sys.executable, "-m", "pytest", "-q", "-m", "gpu", where])[-1]}


def train(tiny):
    """The paper's step: seconds, utilisation, memory, phases, and the ratios to the plain path."""
    flags = [*SMALL, "--steps", "1"] if tiny else ["--steps", "10"]
    return figures_of("tests/bench_train.py", *flags)[-1:]


def sample(tiny):
    return figures_of("tests/bench_sample.py", *(["--tiny"] if tiny else []))


def evaluate(tiny):
    flags = ["--images", "4", "--rounds", "1", "--points", "64", "--dimensions", "64"] if tiny else \
        ["--images", "2048", "--rounds", "2"]
    return figures_of("tests/bench_eval.py", *flags)


def run_flags(folder, name, steps, *more):
    return ["train_repae_e.py", *SMALL, "--output-dir", folder, "--exp-name", name,
            "--max-train-steps", str(steps), "--checkpointing-steps", "2", "--sampling-steps", "0",
            "--log-every", "1", "--mixed-precision", "no", *more]


def logged(folder, name):
    """[losses of each logged step] of a run."""
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k.endswith("loss")} for line in lines]


def two_processes(tiny):
    """Two processes (NCCL where there are two GPUs, else gloo) against one."""
    if GPU and torch.cuda.device_count() < 2:
        return {"skipped": "one GPU only"}
    with tempfile.TemporaryDirectory() as folder:
        lines_of([sys.executable, *run_flags(folder, "one", 4)])
        lines_of([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                  *run_flags(folder, "two", 4)])
        return within(losses=(largest_difference(logged(folder, "two"), logged(folder, "one")), 1e-3))


def resume(tiny):
    """A run killed by SIGKILL and continued against one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        lines_of([sys.executable, *run_flags(folder, "whole", 6, "--no-compile")])
        endless = [sys.executable, *run_flags(folder, "killed", 10 ** 6, "--no-compile")]
        killed = subprocess.Popen(endless, cwd=ROOT, stdout=subprocess.DEVNULL)  # without data workers
        try:
            while not (Path(folder) / "killed/checkpoints/0000002.pt").exists():
                assert killed.poll() is None, "the run ended before its first checkpoint"
                time.sleep(0.02)
        finally:
            killed.kill()
            killed.wait()
        for path in (Path(folder) / "killed/checkpoints").glob("*.pt"):
            if int(path.stem) > 4:  # it may have come further than the whole run
                path.unlink()
        lines_of([sys.executable, *run_flags(folder, "killed", 6, "--no-compile")])
        return within(losses=(largest_difference(logged(folder, "killed"), logged(folder, "whole")),
                              1e-3 if GPU else 0.0))


# Seconds allowed. The first is short and tells whether the rest is worth its time; train leaves compiled code
# that counted_memory finds.
PIECES = {parity: 90, train: 330, counted_memory: 240, twenty_steps: 180, resume: 150, two_processes: 200,
          sample: 200, gpu_tests: 150, evaluate: 150}


# ------------------------------------------------------------------------------------------------ the command

def run_piece(name, limit, tiny):
    """The record of one piece, run in a process of its own: ok, seconds, its figures, what went wrong."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--piece", name, *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                               start_new_session=True)
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started
        output = process.communicate()[0] + f"\nstopped after {limit:.3g} s"
    record = {"ok": process.returncode == 0, "seconds": round(time.perf_counter() - begin, 1)}
    said = [line for line in output.splitlines() if line.startswith(("{", "["))]
    with contextlib.suppress(ValueError):   # of a line that was cut off
        record["figures"] = json.loads(said[-1]) if said else {}
    return record if record["ok"] else record | {"error": output[-2000:]}


def flat(figures, prefix=""):
    """(name, number or text) of nested figures."""
    if isinstance(figures, dict):
        for key, value in figures.items():
            yield from flat(value, f"{prefix} {key}".strip())
    elif isinstance(figures, list):
        for value in figures:
            title = " ".join(str(value[k]) for k in ("model", "guided") if k in value)
            yield from flat(value, f"{prefix} {title}".strip())
    else:
        yield prefix, f"{figures:.4g}" if isinstance(figures, float) else str(figures)


def table(results):
    rows = [f"{results['device']}, torch {results['torch']}", "", "| piece | figure | |", "|---|---|---|"]
    for name, record in results["pieces"].items():
        if not record["ok"]:
            error = " ".join(record["error"].split())[-120:].replace("|", "/")
            rows.append(f"| {name} | **failed** | {error} |")
        rows += [f"| {name} | {key} | {value} |" for key, value in flat(record.get("figures", {}))]
    return "\n".join(rows) + "\n"


def main(argv=None):
    names = {function.__name__: function for function in PIECES}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_check", help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--minutes", type=float, default=10,
                        help="begin no piece after that, and cut the last")
    parser.add_argument("--only", nargs="+", choices=names, help="these pieces")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--piece", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.piece:
        return print(json.dumps(names[args.piece](args.tiny)))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu_check.json"
    device = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} CPU threads"
    results = {"device": device, "torch": torch.__version__, "tiny": args.tiny, "pieces": {}}
    if path.exists():
        old = json.loads(path.read_text())
        if all(old[k] == results[k] for k in ("device", "torch", "tiny")):
            results = old
    end, late = time.monotonic() + 60 * args.minutes, []
    for function, limit in PIECES.items():
        name = function.__name__
        wanted = name in (args.only or names)
        if not wanted or (not args.again and results["pieces"].get(name, {}).get("ok")):
            continue
        left = end - time.monotonic()
        if left < 10:
            late.append(name)
            continue
        print(f"{name} ...", end=" ", flush=True)
        results["pieces"][name] = record = run_piece(name, min(limit, left), args.tiny)
        print(f"{'ok' if record['ok'] else 'FAILED'} in {record['seconds']} s", flush=True)
        for file, text in ((path, json.dumps(results, indent=1)), (out / "gpu_check.md", table(results))):
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(file)
    print(f"{path} and {out / 'gpu_check.md'}")
    if late:
        print(f"no time was left for {', '.join(late)}: the same command goes on with them")
    return sys.exit(0 if not late and all(r["ok"] for r in results["pieces"].values()) else 1)


if __name__ == "__main__":
    main()
