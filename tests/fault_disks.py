"""The cases of tests/faults.py on real disks that are too small: what writes there says so, and goes on once there is room."""
import signal

import processes
from fault_tools import (FROZEN, REFINE, SAMPLE, TRAIN, assert_done, case, compare, execute, files, no_check, pause_at,
                         read_state, same_state, small_disk, small_inception, start, wait, whole)

OUT = "{tmp}/out"
EVALUATE = ["{have}/r.npz", "{have}/s.npz", "--inception-weights", "{have}/inception.pt", "--batch-size", "4"]


def on_disk(flags):
    """The same flags, writing below {tmp}/out."""
    return [flag.replace("{tmp}", OUT) for flag in flags]


# what is written -> (script, flags, sizes of the disk in KiB)
WRITERS = {
    "checkpoints": ("train_repae_e", on_disk(TRAIN), (4, 64, 700, 1500)),
    "checkpoints of a refinement": ("finetune_vae", on_disk(REFINE), (4, 64, 400, 900)),
    "caches": ("train_repae_e", on_disk(FROZEN), (4, 64, 300)),
    "samples": ("sample_ddp", on_disk(SAMPLE), (4, 16, 40, 72)),
    "samples as PNGs": ("sample_ddp", [*on_disk(SAMPLE), "--png"], (100,)),
    "a reference": ("evaluate_fid", ["{have}/r.npz", "--save-ref", f"{OUT}/ref.npz", *EVALUATE[2:]], (4, 40, 4000)),
    "features": ("evaluate_fid", [*EVALUATE, "--cache", f"{OUT}/cache"], (4, 100)),
    "figures": ("evaluate_fid", [*EVALUATE, "--json", f"{OUT}/a.json"], (4,)),
    "a prepared set": ("models.runtime.prepare", ["{have}/photos", f"{OUT}/a.zip", "--resolution", "32", "--num-workers", "0"],
                       (4, 16, 24)),
    "an export": ("finetune_vae", ["--ckpt", "{have}/vae.pt", "--export", f"{OUT}/e", "--format", "compvis"], (4, 100)),
    "an export for diffusers": ("finetune_vae", ["--ckpt", "{have}/wide.pt", "--export", f"{OUT}/e", "--format", "diffusers"],
                                (4, 2000)),
}
HOOKS = [(small_inception,)]
# Those who look for room before they begin: here they find it, and it is gone when they write.
NO_LOOK = [(no_check, "models.runtime.trainer", "space_needed"), (no_check, "models.runtime.cache", "check"),
           (no_check, "models.runtime.prepare", "check_space")]

for name, (script, flags, sizes) in WRITERS.items():
    for size in sizes:
        for look in (True, False) if name in ("checkpoints", "caches", "a prepared set") else (True,):
            @case("small disks", f"{name}: {size} KiB{'' if look else ', which were more before'}, then continued with room")
            def _(tmp, have, name=name, script=script, flags=flags, size=size, look=look):
                def make(folder):
                    (folder / "out").mkdir()
                    assert_done(execute(script, flags, folder, have, hooks=HOOKS))
                reference = whole(("disk", name), make, have)
                with small_disk(tmp / "out", size * 1024) as enlarge:
                    done = execute(script, flags, tmp, have, hooks=HOOKS + (NO_LOOK if not look else []))
                    assert "Traceback" not in done.text and done.code in (0, 1, 2), f"exit code {done.code}\n{done.text}"
                    if done.code:
                        said = ("disk full", "No space left", "no room", "are free", "cannot be written")
                        assert any(word in done.err.splitlines()[-1] for word in said), done.text
                    assert not list(tmp.rglob("*.tmp")), list(tmp.rglob("*.tmp"))
                    enlarge("256m")
                    if not (done.code == 0 and "--export" in flags):
                        assert_done(execute(script, flags, tmp, have, hooks=HOOKS))
                    compare(reference / "out", tmp / "out")


@case("small disks", "a checkpoint in the background: the error ends the run within one checkpoint, the one before stays")
def _(tmp, have):
    flags = on_disk([*TRAIN, "--max-train-steps", "400"])
    size = (have / "exps/run/checkpoints/0000003.pt").stat().st_size
    with small_disk(tmp / "out", int(size * 1.6)) as enlarge:
        done = execute("train_repae_e", flags, tmp, have)
        assert done.code == 1 and "disk full" in done.err and "Traceback" not in done.text, done.text
        folder = tmp / "out/exps/run/checkpoints"
        assert files.checkpoint_steps(folder) == [1] and [p.name for p in folder.iterdir()] == ["0000001.pt"]
        assert "step 4/" not in done.out, "it went on for more than one checkpoint"
        same_state(read_state(folder / "0000001.pt")["ema"], read_state(have / "exps/run/checkpoints/0000001.pt")["ema"])
        enlarge("256m")
        assert_done(execute("train_repae_e", [*flags, "--max-train-steps", "3"], tmp, have), "from step 1")


@case("small disks", "SIGKILL while a checkpoint is written in the background, then the same bits")
def _(tmp, have):
    marker = f"{tmp}.reached"
    run = start("train_repae_e", TRAIN, tmp, have, hooks=[(pause_at, "torch", "save", marker)])
    wait(run, lambda: any(tmp.rglob(".0000001.pt.*.tmp")) and run.process.is_alive())
    processes.kill(run.process)
    assert run.process.exitcode == -signal.SIGKILL
    assert_done(execute("train_repae_e", TRAIN, tmp, have))
    assert not list(tmp.rglob("*.tmp"))
    same_state(read_state(tmp / "exps/run/checkpoints/0000003.pt"), read_state(have / "exps/run/checkpoints/0000003.pt"))
