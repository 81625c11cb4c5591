"""All that only a GPU can show, in one command of six minutes: one JSON and one table for the README.

    python tests/gpu_check.py [--out gpu_check] [--minutes 6] [--only NAME ...] [--again]
    python tests/gpu_check.py --tiny          the same code at tiny sizes, on a CPU too

Each piece runs in a process of its own under a time limit, the most important first: one that fails or hangs
is noted, with the figures it had until then, and the rest follows. A piece's record is printed as soon as it
is there, and OUT/gpu_check.json is written; the same command again does what is missing there or failed.
Nothing is downloaded: random weights stand in for DINOv2, VGG and Inception.
"""
import argparse
import contextlib
import json
import os
import re
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

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = ["--preset", "demo", "--model", "SiT-Ti/4", "--batch-size", "4", "--disc-weight", "0"]
# At a small learning rate: Adam's first steps are signs of gradients and would make noise of rounding.
SLOW = ["--learning-rate", "1e-5", "--vae-learning-rate", "1e-5", "--ema-decay", "0.5"]
# For runs that are compared: rounding to TF32 alone would move their losses by 5e-3.
EXACT = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}


def losses(device, number, *flags, plain=False):
    """The losses of `number` steps of a small run, with the CPU's draws on every device."""
    path = bench_train.Steps(bench_train.settings(*SMALL, *SLOW, *flags), torch.device(device), plain,
                             make_batch=bench_train.batch_drawn_on_the_cpu)
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
    so_far(figures)
    assert all(f["difference"] <= f["tolerance"] for f in figures.values()), json.dumps(figures)
    return figures


def parity(tiny):
    """The step here against the CPU's in float32, which the golden tests compare with the reference."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def three(device, precision):
        return losses(device, 3, "--mixed-precision", precision, "--no-compile")
    expected = three("cpu", "no")
    return within(float32=(largest_difference(three(DEVICE, "no"), expected), 1e-4),
                  bf16=(largest_difference(three(DEVICE, "bf16"), expected), 0.05))


# ------------------------------------------------------------------------------------- the speed of the step

def measured(tiny, *flags, kind="fast", steps=8, details=False):
    """Rates and peak memory of one path; with details also the time by phase, FLOPs and kernels."""
    bench_train.allow_tf32()
    flags = [*(SMALL if tiny else bench_train.PAPER), *flags]
    steps = 1 if tiny else steps
    path = bench_train.fitting((kind,), flags, DEVICE, bench_train.WARM_UP + steps)[kind]
    figures = path.report(bench_train.WARM_UP)
    so_far(figures)
    if details:
        figures["phases"] = bench_train.phases(path, 1 if tiny else 4)
        so_far(figures)
        figures["kernels"] = kernels(path)
        so_far(figures)
        figures |= bench_train.utilisation(path, figures["seconds_per_step"])
    return figures


KINDS = {"attention": "flash|fmha|attention", "triton": "triton", "copies": "memcpy|memset|copy|nchw|nhwc",
         "convolution": "conv|cudnn|wgrad|dgrad|fprop|implicit|winograd", "gemm": "gemm|cutlass|cublas|nvjet"}


def kernels(path):
    """Of one profiled step: milliseconds by kind of kernel, the share of idle time, the five largest."""
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if GPU else [kind.CPU]
    with torch.profiler.profile(activities=activities) as trace:
        path.step()
    wanted = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
    times = {}
    for event in trace.events():
        if event.device_type == wanted and not re.match(r"ProfilerStep|Optimizer|## ", event.name):
            elapsed = event.time_range.elapsed_us() if GPU else event.self_cpu_time_total
            times[event.name] = times.get(event.name, 0) + elapsed / 1000
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, value in times.items():
        kinds[next((k for k, words in KINDS.items() if re.search(words, name, re.I)), "other")] += value
    largest = sorted(times, key=times.get)[-5:][::-1]
    return {"ms": kinds, "idle_share": 1 - sum(times.values()) / 1000 / path.seconds[-1],
            "largest": {name[:80]: times[name] for name in largest}}


def fast(tiny):
    """The paper's step as it is by default: compiled on a GPU."""
    return measured(tiny, details=True)


def fast_eager(tiny):
    return measured(tiny, "--no-compile", steps=4)


def twenty_steps(tiny):
    """The fast path, as it is by default on this device, against the plain one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    number = 4 if tiny else 20
    float32, bf16 = ("--mixed-precision", "no"), ("--mixed-precision", "bf16")
    plain = losses(DEVICE, number, *float32, plain=True)
    return within(float32=(largest_difference(losses(DEVICE, number, *float32), plain), 1e-4),
                  bf16=(largest_difference(losses(DEVICE, number, *bf16), plain), 0.05))


def plain(tiny):
    """The plain path, as the reference computes, at 16 images."""
    return measured(tiny, *([] if tiny else ["--batch-size", "16"]), kind="plain", steps=4)


def grad_checkpoint(tiny):
    return measured(tiny, "--grad-checkpoint", steps=4)


def plain_compiled_sit(tiny):
    """The plain path with its SiT compiled, as the reference's is by default."""
    return measured(tiny, *(["--disc-weight", "0"] if tiny else ["--batch-size", "16"]),
                    kind="plain_compiled_sit" if GPU else "plain", steps=4)


# ----------------------------------------------------------------------------------- pieces that are commands

def lines_of(command):
    """What a command prints, as lines; AssertionError with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=EXACT)
    assert done.returncode == 0, f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    return done.stdout.strip().splitlines()


def figures_of(*command):
    """The JSON lines that a script of tests/ prints, each repeated at once."""
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


def sample(tiny):
    return figures_of("tests/bench_sample.py", *(["--tiny"] if tiny else []))


def evaluate(tiny):
    return figures_of("tests/bench_eval.py", "--images", "4" if tiny else "1024", "--rounds", "1")


def run_flags(folder, name, steps, *more):
    return ["train_repae_e.py", *SMALL, *SLOW, "--output-dir", folder, "--exp-name", name,
            "--max-train-steps", str(steps), "--checkpointing-steps", "2", "--sampling-steps", "0",
            "--log-every", "1", "--mixed-precision", "no", "--no-compile", *more]


def logged(folder, name):
    """[losses of each logged step] of a run."""
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k.endswith("loss")} for line in lines]


def resume(tiny):
    """A run killed by SIGKILL and resumed against one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        lines_of([sys.executable, *run_flags(folder, "whole", 6)])
        killed = subprocess.Popen([sys.executable, *run_flags(folder, "killed", 10 ** 6)], cwd=ROOT,
                                  env=EXACT, stdout=subprocess.DEVNULL)     # it has no data workers
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
        lines_of([sys.executable, *run_flags(folder, "killed", 6)])
        return within(losses=(largest_difference(logged(folder, "killed"), logged(folder, "whole")),
                              1e-3 if GPU else 0.0))


# Seconds allowed, in the order of what the figures are worth: the first six take six minutes.
PIECES = {parity: 40, fast: 180, fast_eager: 50, twenty_steps: 90, gpu_tests: 60, plain: 60,
          resume: 75, sample: 60, grad_checkpoint: 120, evaluate: 60, plain_compiled_sit: 190}


# ------------------------------------------------------------------------------------------------ the command

def last_json(output):
    """The last line of a piece's output that is JSON: warnings of C++ may follow it ("[W1127 ...")."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError):
            figures = json.loads(line)
            if isinstance(figures, (dict, list)):
                return figures
    return {}


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
    record = {"ok": process.returncode == 0, "seconds": round(time.perf_counter() - begin, 1),
              "figures": last_json(output)}
    return record if record["ok"] else record | {"error": output[-2000:]}


def flat(figures, prefix=""):
    """(name, number or text) of nested figures."""
    if isinstance(figures, dict):
        for key, value in figures.items():
            yield from flat(value, f"{prefix} {key}".strip())
    elif isinstance(figures, list):
        for value in figures:
            yield from flat(value, f"{prefix} {value.get('model', '')}".strip())
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
    parser.add_argument("--minutes", type=float, default=6,
                        help="begin no piece after that, and cut the last")
    parser.add_argument("--only", nargs="+", choices=names, help="these pieces")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--piece", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.piece:
        return print(json.dumps(names[args.piece](args.tiny)), flush=True)
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
        results["pieces"][name] = record = run_piece(name, min(limit, left), args.tiny)
        print(json.dumps({name: record}), flush=True)
        for file, text in ((path, json.dumps(results, indent=1)), (out / "gpu_check.md", table(results))):
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(file)
    print(f"{path} and {out / 'gpu_check.md'}")
    if late:
        print(f"no time was left for {', '.join(late)}: the same command resumes with them")
    return sys.exit(0 if not late and all(r["ok"] for r in results["pieces"].values()) else 1)


if __name__ == "__main__":
    main()
