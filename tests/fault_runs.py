"""The cases of tests/faults.py for what a run starts from and keeps: caches, --init-from, shared moments, its checkpoints."""
import json
import shutil

import torch
from fault_cases import nan_in
from fault_tools import (FROZEN, SAMPLE, TRAIN, as_nobody, assert_done, assert_refused, case, change_state, copy, cut,
                         execute, execute_two, files, flip, limit_files, no_check, read_state, refused, same_state, small_disk)

LATENTS, TOKENS = "cache/latents.npy", "cache/tokens-hog.npy"
RUN = ("exps", "exps/frozen", "exps/frozen/.lock", "exps/frozen/log.txt", "exps/frozen/args.json")


# ---------------------------------------------------------------- caches

def cache_with(change):
    """make() of a case: the whole caches, then change(folder)."""
    def make(tmp, have):
        change(copy(have / "cache", tmp / "cache"))
    return make


def longer(path):
    """A header that promises more records than there are."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(12,)", b"(99,)", 1))


def journal(**changes):
    def change(folder):
        state = json.loads((folder / "latents.json").read_text())
        (folder / "latents.json").write_text(json.dumps(state | changes))
    return change


for name, change, flags, words in [
    ("latents cut off", lambda f: cut(f / "latents.npy", .7), (), "latents.npy"),
    ("tokens cut off", lambda f: cut(f / "tokens-hog.npy", .7), (), "tokens-hog.npy"),
    ("empty", lambda f: (f / "latents.npy").write_bytes(b""), (), "latents.npy"),
    ("text", lambda f: (f / "latents.npy").write_text("hello"), (), "latents.npy"),
    ("a lying header", lambda f: longer(f / "latents.npy"), (), "latents.npy"),
    ("no journal", lambda f: (f / "latents.json").unlink(), (), "latents.json"),
    ("a journal of text", lambda f: (f / "latents.json").write_text("{"), (), "latents.json"),
    ("a journal of a list", lambda f: (f / "latents.json").write_text("[]"), (), "latents.json"),
    ("a journal of fewer images", journal(done=3), (), "latents.npy"),
    ("a journal of text for a number", journal(done="x"), (), "latents.json"),
    ("another VAE", journal(bound={"VAE": "0" * 64}), (), "another VAE"),
    ("another data set", lambda f: None, ("--data-dir", "shapes"), "another data set"),
    ("another resolution", lambda f: None, ("--resolution", "64"), "another --resolution"),
    ("with flips", lambda f: None, ("--hflip",), "another --hflip"),
    ("a folder in its place", lambda f: ((f / "latents.npy").unlink(), (f / "latents.npy").mkdir()), (), "latents.npy"),
    ("a file where the folder should be", lambda f: (shutil.rmtree(f), f.write_text("x")), (), "cache"),
    ("a VAE that learns", lambda f: None, ("--vae-ckpt", "none", "--freeze-vae=0"), "--freeze-vae"),
]:
    refused("caches", name, "train_repae_e", [*FROZEN, *flags], words, make=cache_with(change), leaves=RUN)
refused("caches", "a VAE that learns on cached latents", "train_repae_e", [*TRAIN, "--latent-cache", "{tmp}/c"], "--freeze-vae")
refused("caches", "features without an encoder", "train_repae_e", [*FROZEN, "--proj-coeff", "0"], "--cache-features")
for name, file, place in [("the latents", "latents.npy", .5), ("the tokens", "tokens-hog.npy", .5), ("a label", "latents.npy", 265)]:
    @case("caches", f"a flipped byte of {name} is seen when its record is read")
    def _(tmp, have, file=file, place=place):
        cache_with(lambda folder: flip(folder / file, place))(tmp, have)
        assert_refused(execute("train_repae_e", [*FROZEN, "--max-train-steps", "6"], tmp, have), [file, "record", "remove"])


def unreadable(tmp, have):
    cache_with(lambda f: (f / "latents.npy").chmod(0))(tmp, have)
    for path in (tmp, tmp / "cache"):
        path.chmod(0o777)


refused("caches", "no right to read", "train_repae_e", FROZEN, "latents.npy", make=unreadable, hooks=[(as_nobody,)], leaves=RUN)


@case("caches", "made anew after they were removed, the same bytes, the same run")
def _(tmp, have):
    assert_done(execute("train_repae_e", FROZEN, tmp, have))
    for name in (LATENTS, TOKENS):
        assert (tmp / name).read_bytes() == (have / name).read_bytes()
    same_state(read_state(tmp / "exps/frozen/checkpoints/0000003.pt"), read_state(have / "exps/frozen/checkpoints/0000003.pt"))


for name, change in [
    ("a link to itself, which goes", lambda f: ((f / "latents.npy").unlink(), (f / "latents.npy").symlink_to("latents.npy"))),
    ("an unfinished file of another size", lambda f: ((f / "latents.npy").unlink(), (f / ".latents.npy.part").write_bytes(b"x"))),
    ("an unfinished file without a journal", lambda f: ((f / "latents.npy").rename(f / ".latents.npy.part"),
                                                        (f / "latents.json").unlink())),
    ("an unfinished file whose journal has nothing", lambda f: ((f / "latents.npy").rename(f / ".latents.npy.part"),
                                                                journal(done=0)(f))),
    ("whole but for its last rename", lambda f: (f / "latents.npy").rename(f / ".latents.npy.part")),
]:
    @case("caches", f"continued: {name}")
    def _(tmp, have, change=change):
        cache_with(change)(tmp, have)
        assert_done(execute("train_repae_e", FROZEN, tmp, have))
        assert (tmp / LATENTS).read_bytes() == (have / LATENTS).read_bytes()


@case("caches", "the disk fills while they are made, then continued")
def _(tmp, have):
    with small_disk(tmp / "cache", 1 << 16) as enlarge:
        done = execute("train_repae_e", FROZEN, tmp, have)
        assert_refused(done, ["free", "cache"])
        done = execute("train_repae_e", FROZEN, tmp, have, hooks=[(no_check, "models.runtime.cache", "check")])
        assert_refused(done, ["No space left", "cache"])
        enlarge("64m")
        assert_done(execute("train_repae_e", FROZEN, tmp, have))
        for name in (LATENTS, TOKENS):
            assert (tmp / name).read_bytes() == (have / name).read_bytes()


@case("caches", "no file beyond 20,000 bytes, then continued")
def _(tmp, have):
    assert_refused(execute("train_repae_e", FROZEN, tmp, have, hooks=[(limit_files, 20_000)]), ["cache"])
    assert_done(execute("train_repae_e", FROZEN, tmp, have))
    assert (tmp / LATENTS).read_bytes() == (have / LATENTS).read_bytes()


# ---------------------------------------------------------------- --init-from

INIT = [*TRAIN, "--init-from", "{tmp}/x.pt", "--exp-name", "next"]
for name, write, words in [
    ("not there", lambda p: p.unlink(), "x.pt"), ("a folder", lambda p: (p.unlink(), p.mkdir()), "x.pt"),
    ("half of it", lambda p: cut(p, .5), "x.pt"), ("a flipped bit", lambda p: flip(p, .5), "x.pt"),
    ("empty", lambda p: p.write_bytes(b""), "x.pt"), ("text", lambda p: p.write_text("hello"), "x.pt"),
    ("NaN in the average", lambda p: change_state(p, nan_in("ema")), "finite"),
    ("NaN in its VAE", lambda p: change_state(p, nan_in("vae")), "NaN"),
    ("no average", lambda p: change_state(p, lambda s: s.pop("ema") is None or None), "ema"),
    ("no VAE", lambda p: change_state(p, lambda s: s.pop("vae") is None or None), "x.pt"),
    ("an average of text", lambda p: change_state(p, lambda s: s.update(ema="x")), "ema"),
    ("a tensor of another shape", lambda p: change_state(p, lambda s: s["ema"].update({"x_embedder.proj.bias": torch.zeros(3)})),
     "x_embedder"),
    ("a missing tensor", lambda p: change_state(p, lambda s: s["ema"].pop("x_embedder.proj.bias") is None or None), "x_embedder"),
    ("a number where a tensor is", lambda p: change_state(p, lambda s: s["ema"].update({"x_embedder.proj.bias": 3})), "x.pt"),
    ("a VAE alone", lambda p: shutil.copy(p.parent / "vae.pt", p), "ema"),
]:
    def make(tmp, have, write=write):
        copy(have / "vae.pt", tmp / "vae.pt")
        write(copy(have / "exps/run/checkpoints/0000003.pt", tmp / "x.pt"))
    refused("starts", f"--init-from: {name}", "train_repae_e", INIT, "x.pt", words, make=make)
for name, flags in [("another width", ["--num-classes", "12"]), ("another VAE's channels", ["--vae", "f4d16", "--vae-ckpt", "none"]),
                    ("itself a refined VAE", ["--init-from", "{have}/exps/refined/checkpoints/0000003.pt"])]:
    refused("starts", f"--init-from: {name}", "train_repae_e", [*INIT, *flags], "",
            make=lambda tmp, have: copy(have / "exps/run/checkpoints/0000003.pt", tmp / "x.pt"))


@case("starts", "--init-from: the run continues from its own checkpoint when the file is gone")
def _(tmp, have):
    copy(have / "exps/run/checkpoints/0000003.pt", tmp / "x.pt")
    assert_done(execute("train_repae_e", INIT, tmp, have), "weights of")
    (tmp / "exps/next/checkpoints/0000003.pt").unlink()
    shutil.move(tmp / "x.pt", tmp / "y.pt")
    assert_done(execute("train_repae_e", INIT, tmp, have), "from step 2")


refused("starts", "--projector conv on a run with mlp", "train_repae_e", [*TRAIN, "--projector", "conv", "--max-train-steps", "4"],
        "--projector", make=lambda tmp, have: copy(have / "exps/run", tmp / "exps/run"), leaves=("exps/run/.lock",))


@case("starts", "--projector conv: continued with equal bits, sampled, and heads of another kind start anew")
def _(tmp, have):
    conv = [*TRAIN, "--projector", "conv", "--spatial-norm", "1"]
    assert_done(execute("train_repae_e", conv, tmp, have))
    last = tmp / "exps/run/checkpoints/0000003.pt"
    whole = read_state(last)
    last.unlink()
    assert_done(execute("train_repae_e", conv, tmp, have), "from step 2")
    same_state(read_state(last), whole)
    assert_done(execute("sample_ddp", [*SAMPLE, "--ckpt", str(last)], tmp, have))
    assert_done(execute("train_repae_e", [*TRAIN, "--init-from", str(last), "--exp-name", "b"], tmp, have), "new alignment heads")


@case("starts", "--proj-until: continued before, at and after the end of alignment with equal bits")
def _(tmp, have):
    until = [*TRAIN, "--proj-until", "2", "--max-train-steps", "4"]
    assert_done(execute("train_repae_e", until, tmp, have), "no alignment from here on")
    folder = tmp / "exps/run/checkpoints"
    last = read_state(folder / "0000004.pt")
    for step in (3, 2, 1):
        for later in range(step + 1, 5):
            (folder / f"{later:07d}.pt").unlink()
        assert_done(execute("train_repae_e", until, tmp, have), f"from step {step}")
        same_state(read_state(folder / "0000004.pt"), last)


for value in ("0", "-3", "nan", "x"):
    refused("starts", f"--proj-until {value}", "train_repae_e", [*TRAIN, f"--proj-until={value}"], "--proj-until")
for value in ("-1", "1.5", "x"):
    refused("starts", f"--milestones-every {value}", "train_repae_e", [*TRAIN, f"--milestones-every={value}"], "--milestones-every")


@case("starts", "--milestones-every 0 keeps none")
def _(tmp, have):
    assert_done(execute("train_repae_e", [*TRAIN, "--keep-checkpoints", "1", "--milestones-every", "0"], tmp, have))
    assert files.checkpoint_steps(tmp / "exps/run/checkpoints") == [3]


# ---------------------------------------------------------------- shared moments

SHARED = [*TRAIN, "--shard-optimizer"]


@case("starts", "--shard-optimizer: two processes, one, two again: continued")
def _(tmp, have):
    for steps, run in ((2, execute_two), (3, lambda *a: [execute(*a)]), (4, execute_two)):
        for done in run("train_repae_e", [*SHARED, "--max-train-steps", str(steps)], tmp, have):
            assert_done(done)
    assert files.checkpoint_steps(tmp / "exps/run/checkpoints") == [1, 2, 3, 4]


def moments_without(*names):
    """A state whose first parameter lacks these."""
    def change(state):
        for name in names:
            state["opt"]["state"][0].pop(name)
    return change


for name, change in [("no second moment", moments_without("exp_avg_sq")), ("no step of a moment", moments_without("step")),
                     ("a moment of another shape", lambda s: s["opt"]["state"][0].update(exp_avg=torch.zeros(2))),
                     ("a parameter too many", lambda s: s["opt"]["param_groups"][0]["params"].append(10 ** 6))]:
    @case("starts", f"--shard-optimizer, two processes: {name}")
    def _(tmp, have, change=change):
        copy(have / "exps/run", tmp / "exps/run")
        change_state(tmp / "exps/run/checkpoints/0000003.pt", change)
        first, second = execute_two("train_repae_e", [*SHARED, "--max-train-steps", "4"], tmp, have)
        assert_refused(first, ["opt"])
        assert second.code != 0 and "Traceback" not in second.text, second.text
        assert files.checkpoint_steps(tmp / "exps/run/checkpoints") == [1, 2, 3]


@case("starts", "--shard-optimizer, two processes: a flipped bit, continued from the one before")
def _(tmp, have):
    copy(have / "exps/run", tmp / "exps/run")
    flip(tmp / "exps/run/checkpoints/0000003.pt", .5)
    first, second = execute_two("train_repae_e", SHARED, tmp, have)
    assert_done(first, "passed over", "from step 2")
    assert_done(second)


case("starts", "--shard-optimizer in one process changes nothing")(
    lambda tmp, have: (assert_done(execute("train_repae_e", SHARED, tmp, have)),
                       same_state(read_state(tmp / "exps/run/checkpoints/0000003.pt")["opt"],
                                  read_state(have / "exps/run/checkpoints/0000003.pt")["opt"])))
