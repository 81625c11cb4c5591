"""The cases of tests/faults.py for signals, at work and before it, in one process and in two, and for two runs at once."""
import contextlib
import os
import signal
import time

import processes
from fault_tools import (FROZEN, REFINE, SAMPLE, TRAIN, assert_done, assert_refused, case, compare, execute, execute_two,
                         finish, pause_at, set_constant, slow_saves, small_inception, start, start_two, wait, whole)

from models.runtime import files

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EVALUATE = ["{have}/r.npz", "{have}/s.npz", "--inception-weights", "{have}/inception.pt", "--json", "{tmp}/out.json",
            "--cache", "{tmp}/cache", "--batch-size", "4"]
# what is at work -> (script, flags, where it is caught: functions by module)
WORK = {
    "train": ("train_repae_e", [*TRAIN, "--data-dir", "{have}/photos"], [
        ("models.runtime.trainer", "check_images"), ("train_repae_e", "build_networks"),
        ("models.runtime.trainer", "measure_latents"), ("train_repae_e", "matmul_rate"),
        ("models.runtime.trainer", "data_loader"), ("train_repae_e", "train_step"), ("models.runtime.files", "save")]),
    "continue a run": ("train_repae_e", TRAIN, [("models.runtime.trainer", "check_finite"),
                                                ("models.runtime.trainer", "restore")]),
    "make caches": ("train_repae_e", FROZEN, [("models.runtime.cache", "begin"), ("models.runtime.cache", "write_block"),
                                              ("models.runtime.cache", "sync")]),
    "refine": ("finetune_vae", [*REFINE, "--data-dir", "{have}/photos"], [
        ("models.runtime.trainer", "check_images"), ("models.runtime.vae_files", "open_vae"),
        ("models.runtime.trainer", "claim_folder"), ("finetune_vae", "matmul_rate"), ("finetune_vae", "train_step")]),
    "measure VAEs": ("finetune_vae", ["--eval", "{have}/vae.pt", "--metrics", "psnr,ssim", "--data-dir", "{have}/photos",
                                      "--resolution", "32", "--output-dir", "{tmp}/exps", "--exp-name", "eval"], [
        ("models.runtime.vae_report", "prepare"), ("models.runtime.vae_report", "measure")]),
    "export": ("finetune_vae", ["--ckpt", "{have}/vae.pt", "--export", "{tmp}/e", "--format", "compvis"], [
        ("models.runtime.vae_files", "open_vae"), ("models.runtime.files", "save")]),
    "sample": ("sample_ddp", SAMPLE, [("models.runtime.weights", "load"), ("models.runtime.shards", "check_shards"),
                                      ("sample_ddp", "make_sampler"), ("models.runtime.shards", "write_shard"),
                                      ("models.runtime.images", "write_npz"), ("models.runtime.images", "write_png")]),
    "evaluate": ("evaluate_fid", EVALUATE, [("evaluate_fid", "load_networks"), ("evaluate_fid", "input_digest"),
                                            ("models.runtime.features", "save_piece"), ("evaluate_fid", "score")]),
    "prepare": ("models.runtime.prepare", ["{have}/photos", "{tmp}/out.zip", "--resolution", "32", "--num-workers", "0"], [
        ("models.runtime.prepare", "check_space"), ("models.runtime.prepare", "write_images"),
        ("models.runtime.prepare", "member")]),
}
TWO = {"train", "make caches", "refine", "sample", "evaluate", "measure VAEs"}
HOOKS = [(small_inception,), (set_constant, "models.runtime.features", "PIECE", 4),
         (set_constant, "finetune_vae", "STATS_IMAGES", 4)]


def lay(name, tmp, have):
    """What is there before the work begins: two of three steps of a run to continue."""
    if name == "continue a run":
        assert_done(execute("train_repae_e", [*TRAIN, "--max-train-steps", "2"], tmp, have))


def undisturbed(name, two, have):
    script, flags, _ = WORK[name]

    def make(folder):
        lay(name, folder, have)
        for done in (execute_two if two else lambda *a, **k: [execute(*a, **k)])(script, flags, folder, have, hooks=HOOKS):
            assert_done(done)
    return whole((name, two), make, have)


def stopped(name, module, function, number, two, tmp, have):
    """The work is caught in a function, gets the signal, ends in a line; the same command ends in the same bits."""
    script, flags, _ = WORK[name]
    reference = undisturbed(name, two, have)
    lay(name, tmp, have)
    marker = f"{tmp}.reached"
    hooks = [*HOOKS, (pause_at, module, function, marker)]
    runs = (start_two if two else lambda *a, **k: [start(*a, **k)])(script, flags, tmp, have, hooks=hooks)
    wait(runs[0], lambda: os.path.exists(marker))
    time.sleep(two)     # until the second has come to wait for the first
    for run in runs:    # as torchrun does
        with contextlib.suppress(ProcessLookupError):   # one that has nothing left to do
            os.kill(run.pid, number)
    time.sleep(0.1)
    open(f"{marker}.go", "w").close()
    for rank, done in enumerate([finish(run) for run in runs]):
        codes = {0, 128 + number} | ({-number} if rank else set())    # the second may still wait for the first, where torch does
        assert "Traceback" not in done.text and done.code in codes, f"exit code {done.code}\n{done.text}"
        finished = done.code == 0 and (name == "sample" or function == "save")   # it was the last there was to do
        said = f"stopped by {number.name}" in done.text or finished
        assert rank or said, done.text
    for done in execute_two(script, flags, tmp, have, hooks=HOOKS) if two else [execute(script, flags, tmp, have, hooks=HOOKS)]:
        assert_done(done)
    compare(reference, tmp)
    assert not list(tmp.rglob("*.tmp")), list(tmp.rglob("*.tmp"))


for name, (_, _, places) in WORK.items():
    for k, (module, function) in enumerate(places):
        for number in STOPS if k == 0 else STOPS[k % 3:][:1]:
            @case("signals", f"{name}: {number.name} in {function}, then the same bits")
            def _(tmp, have, name=name, module=module, function=function, number=number):
                stopped(name, module, function, number, False, tmp, have)
        for number in STOPS[(k + 1) % 3:][:1] if name in TWO else ():
            @case("signals", f"{name}, two processes: {number.name} in {function}, then the same bits")
            def _(tmp, have, name=name, module=module, function=function, number=number):
                stopped(name, module, function, number, True, tmp, have)

    @case("signals", f"{name}: a second Ctrl-C in {places[0][1]} ends at once")
    def _(tmp, have, name=name, place=places[0]):
        script, flags, _ = WORK[name]
        lay(name, tmp, have)
        marker = f"{tmp}.reached"
        run = start(script, flags, tmp, have, hooks=[*HOOKS, (pause_at, *place, marker, True)])
        wait(run, lambda: os.path.exists(marker))
        os.kill(run.pid, signal.SIGINT)
        time.sleep(0.2)
        os.kill(run.pid, signal.SIGINT)
        done = finish(run)
        assert done.code == -signal.SIGINT and "Traceback" not in done.text, f"exit code {done.code}\n{done.text}"


# ---------------------------------------------------------------- signals, and two at once

ENDS = {"train_repae_e": ([*TRAIN, "--max-train-steps", "400"], "exps/run/metrics.jsonl"),
        "finetune_vae": ([*REFINE, "--max-train-steps", "400"], "exps/refined/metrics.jsonl")}
for script, (flags, sign) in ENDS.items():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        @case("signals", f"{script}: {number.name} saves and ends with 0, and the run continues")
        def _(tmp, have, script=script, flags=flags, sign=sign, number=number):
            run = start(script, flags, tmp, have)
            wait(run, (tmp / sign).exists)
            os.kill(run.pid, number)
            done = finish(run)
            assert_done(done, f"stopped by {number.name}: saved", "the same command continues")
            steps = files.checkpoint_steps((tmp / sign).parent / "checkpoints")
            assert_done(execute(script, [*flags, "--max-train-steps", str(steps[-1] + 1)], tmp, have),
                        f"from step {steps[-1]}")

    @case("signals", f"{script}: a second Ctrl-C ends at once")
    def _(tmp, have, script=script, flags=flags, sign=sign):
        run = start(script, flags, tmp, have, hooks=[(slow_saves, 3)])
        wait(run, (tmp / sign).exists)
        os.kill(run.pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(run.pid, signal.SIGINT)
        done = finish(run)
        assert done.code == -signal.SIGINT and "Traceback" not in done.text, done.text

    @case("signals", f"{script}: a second run in its folder is refused")
    def _(tmp, have, script=script, flags=flags, sign=sign):
        run = start(script, flags, tmp, have)
        try:
            wait(run, (tmp / sign).exists)
            assert_refused(execute(script, flags, tmp, have, name="second"), ["another run is at work", str(run.pid)])
        finally:
            processes.kill(run.process)
