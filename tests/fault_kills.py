"""The kill loops of tests/faults.py: every writer is killed at a random moment and started again; the bits stay equal."""
import random
import shutil
import signal
import time

from fault_tools import HOG, REFINE, SAMPLE, TRAIN, assert_done, compare, copy, execute, set_constant, small_inception, start

import processes


def lay(tmp, have):
    """An older export, for the writer that replaces one."""
    copy(have / "compvis", tmp / "compvis")


EXPORT = ["--ckpt", "{have}/vae.pt", "--export", "{tmp}/e", "--format", "compvis"]
# writer -> (script, flags): run once they make the files that every killed and continued one must make
WRITERS = {
    "train": ("train_repae_e", TRAIN), "train with data workers": ("train_repae_e", [
        *TRAIN, "--data-dir", "{have}/photos", "--num-workers", "1"]),
    "train, keeping one": ("train_repae_e", [*TRAIN, "--keep-checkpoints", "1", "--milestones-every", "2"]),
    "refine": ("finetune_vae", REFINE), "refine all": ("finetune_vae", [*REFINE, "--train-encoder"]),
    "sample": ("sample_ddp", SAMPLE), "sample to PNGs": ("sample_ddp", [*SAMPLE, "--png"]),
    "grid": ("sample_ddp", [*SAMPLE, "--grid-only"]),
    "prepare": ("models.runtime.prepare", ["{have}/photos", "{tmp}/out.zip", "--resolution", "32", "--num-workers", "0"]),
    "export to CompVis": ("finetune_vae", EXPORT),
    "export to diffusers": ("finetune_vae", ["--ckpt", "{have}/wide.pt", "--export", "{tmp}/e", "--format", "diffusers"]),
    "export over an older one": ("finetune_vae", ["--ckpt", "{have}/vae.pt", "--export", "{tmp}/compvis", "--format", "compvis",
                                                  "--force"]),
    "evaluate with a cache": ("evaluate_fid", [*HOG, "--cache", "{tmp}/cache", "{have}/r.npz", "{have}/s.npz"]),
    "save a reference": ("evaluate_fid", ["--save-ref", "{tmp}/ref.npz", "--batch-size", "4", "{have}/r.npz",
                                          "--inception-weights", "{have}/inception.pt"]),
}


def kill_loop(kills, folder, have, say=print, seed=0):
    """`kills` kills, spread over WRITERS in turn. Returns (kills done, names of the writers whose bits differed)."""
    draws, wholes, differ, done = random.Random(seed), {}, [], 0
    names = list(WRITERS)
    for k in range(kills):
        name = names[k % len(names)]
        script, flags = WRITERS[name]
        hooks = [(small_inception,), (set_constant, "finetune_vae", "STATS_IMAGES", 4)]
        if name not in wholes:
            tmp = folder / f"whole-{len(wholes)}"
            tmp.mkdir()
            lay(tmp, have)
            begun = time.monotonic()
            assert_done(execute(script, flags, tmp, have, hooks=hooks))
            wholes[name] = tmp, time.monotonic() - begun
        whole, seconds = wholes[name]
        tmp = folder / f"killed-{k}"
        tmp.mkdir()
        lay(tmp, have)
        while True:     # until one of them was still at work
            run = start(script, flags, tmp, have, hooks=hooks)
            time.sleep(draws.uniform(0.05, 1) * seconds)
            processes.kill(run.process)
            if run.process.exitcode == -signal.SIGKILL:
                break
        done += 1
        try:
            for _ in range(2):  # the second time there is nothing to do but to tidy up
                again = execute(script, flags, tmp, have, hooks=hooks)
                if "exists" not in again.err:   # an export that was whole when it was killed
                    assert_done(again)
            if name == "grid":  # shards that were there when it went on may be those of a run without --grid-only
                shutil.rmtree(tmp / "a.shards", ignore_errors=True)
            compare(whole, tmp)
        except AssertionError as wrong:
            differ.append(name)
            say(f"FAILED: killed: {name}\n{wrong}\n")
    return done, differ
