"""The cases of tests/faults.py, by group: what a user or a cluster can do to the scripts, and what must come of it."""
import argparse
import contextlib
import json
import os
import signal
import time
import zipfile
from unittest import mock

import numpy as np
import processes
import torch
from fault_tools import (HOG, NOBODY, REFINE, SAMPLE, TRAIN, Skip, as_nobody, assert_done, assert_refused, case, change_state,
                         copy, cut, digests, execute, finish, flip, limit_files, limit_memory, pack, photos, pictures,
                         read_state, refused, same_state, set_constant, slow_saves, start, wait)
from PIL import Image

import evaluate_fid
import finetune_vae
import sample_ddp
import train_repae_e
from models.runtime import files, prepare

CHECKPOINT = "{have}/exps/run/checkpoints/0000003.pt"


# ---------------------------------------------------------------- flags: no number that means nothing

def flags_of(main):
    """The argparse actions of a script, without starting it."""
    class Found(Exception):
        pass

    def parse(parser, *_):
        raise Found(parser)
    for method in ("parse_args", "parse_known_args"):
        with mock.patch.object(argparse.ArgumentParser, method, parse), contextlib.suppress(SystemExit):
            try:
                main([])
            except Found as found:
                return found.args[0]._actions


BASE = {"train_repae_e": TRAIN, "finetune_vae": REFINE, "sample_ddp": SAMPLE,
        "evaluate_fid": [*HOG, "{have}/r.npz", "{have}/s.npz"],
        "models.runtime.prepare": ["{have}/photos", "{tmp}/out.zip"]}
MAINS = {"train_repae_e": train_repae_e, "finetune_vae": finetune_vae, "sample_ddp": sample_ddp,
         "evaluate_fid": evaluate_fid, "models.runtime.prepare": prepare}
for script, module in MAINS.items():
    for action in flags_of(module.main):
        if getattr(action.type, "__name__", "") == "convert":      # of cli.number
            flag = action.option_strings[0]
            for value in ("nan", "inf", "-1", "1e-4x"):
                refused("flags", f"{script} {flag} {value}", script, [*BASE[script], f"{flag}={value}"], flag)
        elif action.choices:
            flag = action.option_strings[0]
            refused("flags", f"{script} {flag} of no choice", script, [*BASE[script], flag, "fp7"], flag)
    refused("flags", f"{script}: a flag that does not exist", script, [*BASE[script], "--learning-rat", "1"], "--learning-rat")
    refused("flags", f"{script}: a flag without its value", script, [*BASE[script], flag], flag)

for name, script, more, words in [
    ("above its bound: beta1", "train_repae_e", ["--adam-beta1", "1.5"], "--adam-beta1"),
    ("above its bound: cfg-prob", "train_repae_e", ["--cfg-prob", "2"], "--cfg-prob"),
    ("above its bound: guidance-high", "sample_ddp", ["--guidance-high", "1.5"], "--guidance-high"),
    ("zero steps", "train_repae_e", ["--max-train-steps", "0"], "--max-train-steps"),
    ("zero batch", "train_repae_e", ["--batch-size", "0"], "--batch-size"),
    ("huge steps of the solver", "sample_ddp", ["--num-steps", "99999999999"], "--num-steps"),
    ("huge number of samples", "sample_ddp", ["--num-fid-samples", "9" * 30], "--num-fid-samples"),
    ("huge seed", "train_repae_e", ["--seed", str(2 ** 70), "--dry-run"], "--seed"),
    ("huge number of workers", "train_repae_e", ["--num-workers", "1000000"], "--num-workers"),
    ("huge batch", "train_repae_e", ["--batch-size", "99999999999999999999"], "--batch-size"),
    ("huge resolution", "train_repae_e", ["--resolution", "1048576"], "--resolution"),
    ("huge class count", "train_repae_e", ["--num-classes", "999999999999"], "--num-classes"),
    ("huge accumulation", "train_repae_e", ["--gradient-accumulation-steps", str(10 ** 12)], "--batch-size"),
    ("tolerance no network can meet", "sample_ddp", ["--mode", "ode", "--dopri5", "--rtol", "1e-300"], "--rtol"),
    ("guidance interval upside down", "sample_ddp", ["--cfg-scale", "2", "--guidance-low", "0.9", "--guidance-high", "0.1"],
     "guidance"),
    ("heun on the SDE", "sample_ddp", ["--heun"], "--mode ode"),
    ("heun and dopri5", "sample_ddp", ["--mode", "ode", "--heun", "--dopri5"], "exclude"),
    ("checkpoint and folder", "sample_ddp", ["--exp-path", "{have}/exps/run"], "either"),
    ("step without folder", "sample_ddp", ["--train-steps", "3"], "--exp-path"),
    ("class that does not exist", "sample_ddp", ["--classes", "10"], "10"),
    ("negative class", "sample_ddp", ["--classes=-1"], "-1"),
    ("classes that are no numbers", "sample_ddp", ["--classes", "cat,dog"], "--classes"),
    ("range outside", "sample_ddp", ["--range", "6:99"], "--range"),
    ("range upside down", "sample_ddp", ["--range", "8:4"], "--range"),
    ("range of text", "sample_ddp", ["--range", "all"], "--range"),
    (".npz without its ending", "sample_ddp", ["--npz", "{tmp}/samples"], ".npz"),
    (".npz without a name", "sample_ddp", ["--npz", "{tmp}/.npz"], ".npz"),
    ("batch that cannot be cut", "train_repae_e", ["--gradient-accumulation-steps", "3"], "--batch-size 2"),
    ("frozen VAE and its ablation", "train_repae_e", ["--freeze-vae", "--diffusion-to-vae"], "exclude"),
    ("frozen VAE without weights", "train_repae_e", ["--freeze-vae"], "--vae-ckpt"),
    ("resolution the VAE cannot halve", "train_repae_e", ["--resolution", "36"], "--resolution 36"),
    ("resolution below the discriminator's", "train_repae_e", ["--resolution", "16", "--disc-weight", "0.1"], "--disc-weight 0"),
    ("depth beyond the network", "train_repae_e", ["--encoder-depth", "9"], "encoder depth 9"),
    ("unknown encoder", "train_repae_e", ["--encoder", "dinov9"], "dinov9"),
    ("no encoder's name", "train_repae_e", ["--encoder", ""], "encoder"),
    ("two encoders, one file", "train_repae_e", ["--encoder", "hog,hog", "--encoder-ckpt", "{tmp}/x"], "--encoder-ckpt"),
    ("unknown preset", "train_repae_e", ["--preset", "imagenet"], "--preset imagenet"),
    ("fewer classes than the data", "train_repae_e", ["--num-classes", "3"], "--num-classes 3"),
    ("logger that is not installed", "train_repae_e", ["--report-to", "wandb"], "pip install wandb"),
    ("scores without a reference", "train_repae_e", ["--eval-steps", "1"], "--eval-ref"),
    ("reference of scores that is not there", "train_repae_e", ["--eval-steps", "1", "--eval-ref", "{tmp}/no.npz"], "no.npz"),
    ("inception weights that are not there", "train_repae_e", ["--inception-weights", "{tmp}/no.pth"], "no.pth"),
    ("alignment without encoder training", "finetune_vae", ["--vae-align-proj-coeff", "1"], "--train-encoder"),
    ("from scratch without a type", "finetune_vae", ["--ckpt", "none", "--train-encoder"], "--vae"),
    ("from scratch without the encoder", "finetune_vae", ["--ckpt", "none", "--vae", "f4d4"], "--train-encoder"),
    ("other type than the file", "finetune_vae", ["--vae", "f8d4"], "f4d4"),
    ("more images than there are", "finetune_vae", ["--data-dir", "{have}/photos", "--batch-size", "13"], "fewer than one batch"),
    ("resolution the VAE cannot halve, refining", "finetune_vae", ["--resolution", "30"], "--resolution 30"),
    ("eval and export at once", "finetune_vae", ["--eval", "{have}/vae.pt", "--export", "{tmp}/e"], "--export"),
    ("unknown metric", "evaluate_fid", ["--metrics", "beauty"], "unknown"),
    ("metrics beside hog", "evaluate_fid", ["--metrics", "kid"], "hog"),
    ("limit of zero", "evaluate_fid", ["--limit", "0"], "--limit"),
    ("reference saved with two inputs", "evaluate_fid", ["--features", "inception", "--save-ref", "{tmp}/x.npz"], "--save-ref"),
    ("prepare: no .zip", "models.runtime.prepare", ["--resolution", "32", "{tmp}/x.tar"], "x.tar"),
]:
    refused("settings", name, script, [*BASE[script], *more], words)
refused("settings", "no checkpoint named", "sample_ddp", SAMPLE[2:], "--ckpt")
refused("settings", "no VAE named", "finetune_vae", [x for x in REFINE if x not in ("--ckpt", "{have}/vae.pt", "--preset",
                                                                                   "demo")], "--ckpt")
refused("settings", "one input only", "evaluate_fid", [*HOG, "{have}/r.npz"], "--save-ref")
for name, more, words in [
    ("export of nothing", ["--ckpt", "none", "--export", "{tmp}/e"], "--ckpt"),
    ("unknown metric of VAEs", ["--eval", "{have}/vae.pt", "--metrics", "psnr,beauty"], "--metrics"),
    ("no metric at all", ["--eval", "{have}/vae.pt", "--metrics", ","], "--metrics"),
    ("cknna without a model", ["--eval", "{have}/vae.pt", "--metrics", "cknna", "--data-dir", "{have}/photos", "--resolution",
                               "32", "--encoder", "hog"], "--model-ckpt"),
]:
    refused("settings", name, "finetune_vae", more, words)


# ---------------------------------------------------------------- data that is not what it should be

def tree(change):
    """make() of a case: the photos as a folder in tmp, then change(folder)."""
    def make(tmp, have):
        change(copy(have / "photos", tmp / "photos"))
    return make


def zipped(change):
    """The same as a .zip, to which change(archive) adds."""
    def make(tmp, have):
        pack(have / "photos", tmp / "photos.zip", change)
    return make


def png_header(path, width, height):
    """A PNG of a few bytes that declares a size."""
    import struct
    import zlib
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)))


def everywhere(change):
    """Each class's first image replaced by what change(path) writes."""
    return tree(lambda folder: [change(path) for path in folder.glob("*/0.png")])


LOOK = ["--data-dir", "{tmp}/photos"]
ZIP = ["--data-dir", "{tmp}/photos.zip"]
DATA = [
    ("a folder that is not there", LOOK, None, "photos"),
    ("an empty folder", LOOK, lambda tmp, have: (tmp / "photos").mkdir(), "no images"),
    ("an empty class folder", LOOK, tree(lambda f: (f / "crow").mkdir()), "crow"),
    ("an image beside the class folders", LOOK, tree(lambda f: copy(f / "ant" / "0.png", f / "x.png")), "x.png"),
    ("the folder of train and val", LOOK, lambda tmp, have: [copy(have / "photos", tmp / "photos" / s) for s in
                                                            ("train", "val")], "train"),
    ("a text called .png", LOOK, everywhere(lambda p: p.write_text("no image")), "0.png"),
    ("an empty file", LOOK, everywhere(lambda p: p.write_bytes(b"")), "0.png"),
    ("a link to nothing", LOOK, everywhere(lambda p: (p.unlink(), p.symlink_to("gone"))), "0.png"),
    ("a file that is no folder", LOOK, lambda tmp, have: (tmp / "photos").write_text("x"), "photos"),
    ("an HDF5 file", ["--data-dir", "{tmp}/a.h5"], lambda tmp, have: (tmp / "a.h5").write_bytes(b"\x89HDF"), "HDF5"),
    ("a tar", ["--data-dir", "{tmp}/a.tar"], lambda tmp, have: (tmp / "a.tar").write_bytes(b"x" * 512), "a.tar"),
    ("a .zip of nothing", ZIP, lambda tmp, have: zipfile.ZipFile(tmp / "photos.zip", "w").close(), "no images"),
    ("an empty .zip", ZIP, lambda tmp, have: (tmp / "photos.zip").write_bytes(b""), "photos.zip"),
    ("half a .zip", ZIP, lambda tmp, have: (copy(have / "photos.zip", tmp / "photos.zip"), cut(tmp / "photos.zip", .5)),
     "photos.zip"),
    ("an absolute name in a .zip", ZIP, zipped(lambda a: a.writestr("/etc/x.png", b"x")), "/etc/x.png"),
    ("a name that climbs out of a .zip", ZIP, zipped(lambda a: a.writestr("../x.png", b"x")), "../x.png"),
    ("an empty class folder in a .zip", ZIP, zipped(lambda a: a.mkdir("crow")), "crow"),
    ("another compression in a .zip", ZIP, zipped(lambda a: a.writestr("ant/z.png", b"x" * 99, zipfile.ZIP_BZIP2)), "z.png"),
    ("dataset.json that is no JSON", LOOK, tree(lambda f: (f / "dataset.json").write_text("{")), "dataset.json"),
    ("dataset.json without labels", LOOK, tree(lambda f: (f / "dataset.json").write_text("{}")), "dataset.json"),
    ("dataset.json with labels of text", LOOK, tree(lambda f: (f / "dataset.json").write_text(
        json.dumps({"labels": [["ant/0.png", "ant"]]}))), "dataset.json"),
    ("dataset.json with a huge label", LOOK, tree(lambda f: (f / "dataset.json").write_text(
        json.dumps({"labels": [["ant/0.png", 10 ** 12]]}))), "label"),
    ("dataset.json with a negative label", LOOK, tree(lambda f: (f / "dataset.json").write_text(
        json.dumps({"labels": [["ant/0.png", -1]]}))), "label"),
    ("dataset.json that leaves images out", LOOK, tree(lambda f: (f / "dataset.json").write_text(
        json.dumps({"labels": [["ant/0.png", 0]]}))), "no label"),
    ("dataset.json nested too deep", LOOK, tree(lambda f: (f / "dataset.json").write_text("[" * 10 ** 5)), "dataset.json"),
    ("an EPS called .png", LOOK, everywhere(lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "0.png"),
]
for name, flags, make, words in DATA:
    for script in ("train_repae_e", "finetune_vae"):
        refused("data", f"{script}: {name}", script, [*BASE[script], *flags], words, make=make)

for name, write in [
    ("an image bomb", lambda p: png_header(p, 60000, 60000)),
    ("an image of 1 x 100,000", lambda p: png_header(p, 1, 100000)),
    ("a float image", lambda p: Image.fromarray(np.ones((40, 40), np.float32)).save(p, "TIFF")),
    ("a cut image", lambda p: cut(p, .6)),
]:
    refused("data", f"read in training: {name}", "train_repae_e", [*TRAIN, *LOOK, "--batch-size", "12", "--vae-ckpt",
            "{have}/vae.pt"], "0.png", make=everywhere(write), leaves=("exps", "exps/run", "exps/run/.lock", "exps/run/args.json", "exps/run/log.txt"))


def trains_on(change, *flags, script="train_repae_e"):
    def run(tmp, have):
        tree(change)(tmp, have)
        assert_done(execute(script, [*BASE[script], *LOOK, *flags], tmp, have), "done: ")
    return run


for name, change, flags in [
    ("a FIFO in the tree is skipped", lambda f: os.mkfifo(f / "ant" / "pipe.png"), ()),
    ("a link in a circle", lambda f: (f / "ant" / "up").symlink_to(f), ()),
    ("spaces and umlauts in names", lambda f: (f / "ant").rename(f / "Käfer und  Co"), ()),
    ("a newline in a name", lambda f: (f / "ant" / "0.png").rename(f / "ant" / "a\nb.png"), ()),
    ("16-bit images", lambda f: Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(f / "ant" / "0.png"), ()),
    ("transparent and palette images", lambda f: Image.new("RGBA", (40, 40)).convert("P").save(f / "ant" / "0.png"), ()),
    ("hidden files", lambda f: (f / "ant" / ".DS_Store").write_text("x"), ()),
    ("--skip-corrupt passes over text and empty files", lambda f: ((f / "ant" / "0.png").write_text("x"), (f / "bird" / "0.png").
                                                                   write_bytes(b"")), ("--skip-corrupt",)),
    ("--skip-corrupt passes over a bomb", lambda f: png_header(f / "ant" / "0.png", 60000, 60000), ("--skip-corrupt",)),
    ("one image in a class", lambda f: [(f / "ant" / f"{k}.{e}").unlink() for k, e in ((1, "jpg"), (2, "png"), (3, "jpg"))], ()),
]:
    case("data", f"survived: {name}")(trains_on(change, *flags))


# -------------------------------------------------------------- checkpoints: resume, sample, export, evaluate

LAST = "exps/run/checkpoints/0000003.pt"
MORE = [*TRAIN, "--max-train-steps", "4"]


def run_with(change, name=LAST):
    """make() of a case: the run of the world in tmp, change(path of its last checkpoint)."""
    def make(tmp, have):
        copy(have / "exps" / name.split("/")[1], tmp / "exps" / name.split("/")[1])
        change(tmp / name)
    return make


def state_with(change):
    return run_with(lambda path: change_state(path, change))


def nan_in(key):
    def change(state):
        next(v for v in state[key].values() if torch.is_tensor(v) and v.is_floating_point()).view(-1)[0] = float("nan")
    return change


def wide_moment(state):
    state["opt"]["state"][0]["exp_avg"] = torch.zeros(3)


BAD_STATES = [
    ("NaN in the weights", state_with(nan_in("model")), "model."),
    ("NaN in the average", state_with(nan_in("ema")), "ema."),
    ("NaN in the VAE", state_with(nan_in("vae")), "vae."),
    ("a moment of another shape", state_with(wide_moment), "opt"),
    ("no optimiser", state_with(lambda s: s.pop("opt") is None or None), "opt"),
    ("no VAE", state_with(lambda s: s.pop("vae") is None or None), "vae"),
    ("no step", state_with(lambda s: s.pop("steps") is None or None), "steps"),
    ("a bare tensor", state_with(lambda s: torch.zeros(3)), "Tensor"),
    ("a list", state_with(lambda s: [1, 2]), "list"),
    ("weights of another width", state_with(lambda s: s["model"].update({"x_embedder.proj.bias": torch.zeros(5)})), "x_embedder"),
    ("weights that are text", state_with(lambda s: s.update(model="weights")), "model"),
    ("other classes", state_with(lambda s: s["data"].update(classes=["cat"])), "class"),
    ("a folder in its place", run_with(lambda p: (p.unlink(), p.mkdir())), "folder"),
    ("a later format", run_with(lambda p: mark(p, b"repa-e format 9")), "format"),
    ("another model", state_with(lambda s: s["args"].update(model="SiT-Ti/2")), "--model"),
    ("another seed", state_with(lambda s: s["args"].update(seed=5)), "--seed"),
]


def mark(path, comment):
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment


for name, make, words in BAD_STATES:
    refused("checkpoints", f"resume: {name}", "train_repae_e", MORE, words, make=make, cheap=False,
            leaves=("exps/run/.lock", "exps/run/log.txt"))
for name, write in [
    ("NaN in the average", lambda p: change_state(p, nan_in("ema"))), ("text", lambda p: p.write_text("hello")),
    ("empty", lambda p: p.write_bytes(b"")), ("half of it", lambda p: cut(p, .5)), ("a flipped bit", lambda p: flip(p, .5)),
    ("None", lambda p: torch.save(None, p)), ("a tensor", lambda p: torch.save(torch.zeros(2), p)),
    ("a list", lambda p: torch.save([1], p)), ("nothing in it", lambda p: torch.save({}, p)),
    ("an object", lambda p: torch.save({"ema": argparse.ArgumentParser}, p)), ("not there", lambda p: p.unlink()),
    ("a folder", lambda p: (p.unlink(), p.mkdir())), ("a link to itself", lambda p: (p.unlink(), p.symlink_to(p.name))),
]:
    def make(tmp, have, write=write):
        write(copy(have / LAST, tmp / "x.pt"))
    for script, flags in [("sample_ddp", [*SAMPLE, "--ckpt", "{tmp}/x.pt"]),
                          ("train_repae_e", [*TRAIN, "--resume", "{tmp}/x.pt"]),
                          ("train_repae_e", [*TRAIN, "--vae-ckpt", "{tmp}/x.pt"]),
                          ("finetune_vae", [*REFINE, "--ckpt", "{tmp}/x.pt"]),
                          ("finetune_vae", ["--export", "{tmp}/e", "--format", "compvis", "--ckpt", "{tmp}/x.pt"]),
                          ("evaluate_fid", ["--inception-weights", "{tmp}/x.pt", "{have}/r.npz", "{have}/s.npz"])]:
        if (script, name) not in {("finetune_vae", "NaN in the average"), ("train_repae_e", "NaN in the average")}:
            refused("checkpoints", f"{script} {flags[-2]}: {name}", script, flags, "x.pt", make=make, cheap=False)


def continues(change, *words):
    """The run of the world after change(last checkpoint) ends as the undisturbed one does, with these words."""
    def run(tmp, have):
        copy(have / "exps" / "run", tmp / "exps" / "run")
        change(tmp / LAST)
        assert_done(execute("train_repae_e", TRAIN, tmp, have), "done: ", *words)
        same_state(read_state(tmp / LAST), read_state(have / LAST))
        assert len((tmp / "exps/run/metrics.jsonl").read_text().splitlines()) == 3
    return run


for name, change in [("half written", lambda p: cut(p, .5)), ("a flipped bit", lambda p: flip(p, .4)), ("empty", lambda p:
                     p.write_bytes(b"")), ("text", lambda p: p.write_text("hello"))]:
    case("checkpoints", f"continued from the one before: {name}")(continues(change, "passed over"))
case("checkpoints", "continued: the newest is gone")(continues(lambda p: p.unlink()))
case("checkpoints", "continued: metrics.jsonl cut in a line")(continues(
    lambda p: (p.unlink(), cut(p.parent.parent / "metrics.jsonl", .9))))
case("checkpoints", "continued: left-over temporary files")(continues(
    lambda p: (p.unlink(), (p.parent / ".0000003.pt.999999.tmp").write_bytes(b"x"))))


@case("checkpoints", "a damaged later checkpoint pushes no sound one out")
def _(tmp, have):
    copy(have / "exps" / "run", tmp / "exps" / "run")
    cut(tmp / LAST, .5)
    copy(tmp / LAST, tmp / "exps/run/checkpoints/0000009.pt")
    assert_done(execute("train_repae_e", [*TRAIN, "--keep-checkpoints", "1"], tmp, have), "passed over")
    same_state(read_state(tmp / LAST), read_state(have / LAST))


@case("checkpoints", "milestones stay, whatever --keep-checkpoints says")
def _(tmp, have):
    assert_done(execute("train_repae_e", [*TRAIN, "--max-train-steps", "5", "--keep-checkpoints", "1", "--milestones-every",
                                          "2"], tmp, have), "checkpoints to keep: 3")
    assert files.checkpoint_steps(tmp / "exps/run/checkpoints") == [2, 4, 5]


for name, flags, words in [("an infinite step size", ["--learning-rate", "1e30"], "stopped"),
                           ("a run of skipped steps", ["--learning-rate", "1e38", "--max-train-steps", "6"], "stopped")]:
    @case("checkpoints", f"no weights that are not finite: {name}")
    def _(tmp, have, flags=flags, words=words):
        done = execute("train_repae_e", [*TRAIN, *flags], tmp, have)
        assert "Traceback" not in done.text and done.code in (0, 1), done.text
        for step in files.checkpoint_steps(tmp / "exps/run/checkpoints"):
            assert files.first_non_finite(read_state(tmp / f"exps/run/checkpoints/{step:07d}.pt")) is None


# ---------------------------------------------------------------- the disk and its rights

def no_rights(what):
    """make(): as another user: the run copied, `what` of it unreadable."""
    def make(tmp, have):
        copy(have / "exps" / "run", tmp / "exps" / "run")
        tmp.chmod(0o777)
        for path in (tmp, *tmp.rglob("*")):
            path.chmod(0o777)
        (tmp / what).chmod(0)
    return make


BASE_HOOK = dict(hooks=[(as_nobody,)])
for what, words in [(LAST, "0000003.pt"), ("exps/run/checkpoints", "checkpoints"), ("exps/run", "exps/run")]:
    refused("disk", f"no right to read {what}", "train_repae_e", MORE, words, make=no_rights(what), **BASE_HOOK,
            leaves=("exps/run/.lock",))


def read_only(tmp, have):
    tmp.chmod(0o755)
    (tmp / "exps").mkdir()


for script, flags in [("train_repae_e", TRAIN), ("finetune_vae", REFINE), ("sample_ddp", SAMPLE),
                      ("evaluate_fid", [*HOG, "{have}/r.npz", "{have}/s.npz", "--json", "{tmp}/x.json"]),
                      ("evaluate_fid", [*HOG, "{have}/r.npz", "{have}/s.npz", "--cache", "{tmp}/cache"]),
                      ("finetune_vae", ["--export", "{tmp}/e", "--format", "compvis", "--ckpt", "{have}/vae.pt"]),
                      ("models.runtime.prepare", ["{have}/photos", "{tmp}/out.zip", "--resolution", "32"])]:
    refused("disk", f"{script}: a folder that is read-only ({flags[-2]})", script, flags, "{tmp}"[:0], make=read_only,
            **BASE_HOOK)
for size in (300, 5000, 100_000, 400_000):
    for script, flags in [("train_repae_e", TRAIN), ("finetune_vae", REFINE), ("sample_ddp", SAMPLE),
                          ("models.runtime.prepare", ["{have}/photos", "{tmp}/out.zip", "--resolution", "32",
                                                      "--num-workers", "0"]),
                          ("finetune_vae", ["--export", "{tmp}/e", "--format", "compvis", "--ckpt", "{have}/vae.pt"])]:
        @case("disk", f"{script} {flags[0]}: no file beyond {size} bytes, then continued")
        def _(tmp, have, script=script, flags=flags, size=size):
            done = execute(script, flags, tmp, have, hooks=[(limit_files, size)])
            assert "Traceback" not in done.text, done.text
            assert done.code in (0, 1, 2), done.text
            assert not list(tmp.rglob("*.tmp")), list(tmp.rglob("*.tmp"))
            if not (flags[0] == "--export" and done.code == 0):  # it was small enough, and is not made twice
                assert_done(execute(script, flags, tmp, have))
