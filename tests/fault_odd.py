"""The cases of tests/faults.py that a reviewer thinks of: odd names, odd files in odd places, odd flags together, an odd clock."""
import json
import os
import shutil
import warnings
import zipfile

import numpy as np
from fault_cases import LAST, MORE, change_state, nan_in, trains_on, tree
from fault_tools import (HOG, REFINE, SAMPLE, TRAIN, as_nobody, assert_done, assert_refused, case, clock, copy, cut, execute,
                         files, finish, pictures, read_state, refused, same_state, start, wait)
from PIL import Image

FLAGS = {"train_repae_e": TRAIN, "finetune_vae": REFINE, "sample_ddp": SAMPLE, "evaluate_fid": [*HOG, "{have}/r.npz", "{have}/s.npz"],
         "models.runtime.prepare": ["{have}/photos", "{tmp}/out.zip", "--resolution", "32", "--num-workers", "0"]}
START = ("exps", "exps/run", "exps/run/.lock", "exps/run/args.json", "exps/run/log.txt")


def survives(name, script, flags, *words, make=None, **how):
    """Register the case that a script does its work."""
    @case("odd", name)
    def _(tmp, have):
        if make is not None:
            make(tmp, have)
        assert_done(execute(script, flags, tmp, have, **how), *words)


# ---------------------------------------------------------------- names

for flag in ("--data-dir", "--vae-ckpt", "--disc-ckpt", "--resume", "--encoder", "--preset", "--init-from", "--exp-name"):
    more = ["--disc-weight", "0.1"] if flag == "--disc-ckpt" else []
    refused("odd", f"an empty {flag}", "train_repae_e", [*TRAIN, *more, flag, ""], flag if flag == "--exp-name" else "")
refused("odd", "an empty --ckpt", "finetune_vae", [*REFINE, "--ckpt", ""], "")
refused("odd", "an empty --ckpt of samples", "sample_ddp", [*SAMPLE, "--ckpt", ""], "")
refused("odd", "an empty --classes", "sample_ddp", [*SAMPLE, "--classes", ""], "--classes")
refused("odd", "--classes with a gap", "sample_ddp", [*SAMPLE, "--classes", "1,,2"], "--classes")
refused("odd", "an empty --range", "sample_ddp", [*SAMPLE, "--range", ":"], "--range")
refused("odd", "--range of three", "sample_ddp", [*SAMPLE, "--range", "0:4:8"], "--range")
refused("odd", "an empty input", "evaluate_fid", [*HOG, "", "{have}/s.npz"], "no such file")
refused("odd", "an empty --eval", "finetune_vae", ["--eval", "", "--data-dir", "{have}/photos", "--resolution", "32"], "")
refused("odd", "an empty source", "models.runtime.prepare", ["", "{tmp}/out.zip"], "")
refused("odd", "a name too long", "train_repae_e", [*TRAIN, "--exp-name", "x" * 300], "xxx", leaves=("exps",))
refused("odd", "a comma too many", "train_repae_e", [*TRAIN, "--encoder", "hog,"], "encoder")
for name in ("with a space", "Käfer-蝶", "a\nb", "a/b/c", "-", "run.pt", "%s{}"):
    survives(f"--exp-name {name!r}", "train_repae_e", [*TRAIN, "--max-train-steps", "1", f"--exp-name={name}"])
    survives(f"--npz {name!r}", "sample_ddp", [*SAMPLE, "--npz", f"{{tmp}}/{name}.npz"])
survives("a flag twice: the last one counts", "train_repae_e", [*TRAIN, "--max-train-steps", "900", "--max-train-steps", "1"],
         "step 1/1")
survives("a file named by a path relative to here", "evaluate_fid", [*HOG, "r.npz", "./s.npz"],
         make=lambda tmp, have: [copy(have / f"{x}.npz", tmp / f"{x}.npz") for x in "rs"])
survives("the same file twice", "evaluate_fid", [*HOG, "{have}/r.npz", "{have}/r.npz"], "FD-hog")
refused("odd", "--output-dir is a file", "train_repae_e", [*TRAIN, "--output-dir", "{tmp}/f"], "f",
        make=lambda tmp, have: (tmp / "f").write_text("x"))
refused("odd", "--output-dir is a link to itself", "train_repae_e", [*TRAIN, "--output-dir", "{tmp}/f"], "f",
        make=lambda tmp, have: (tmp / "f").symlink_to("f"))
refused("odd", "--data-dir is a link to itself", "train_repae_e", [*TRAIN, "--data-dir", "{tmp}/f"], "f",
        make=lambda tmp, have: (tmp / "f").symlink_to("f"))
refused("odd", "--data-dir is /dev/null", "train_repae_e", [*TRAIN, "--data-dir", "/dev/null"], "/dev/null")
refused("odd", "an input is /dev/null", "evaluate_fid", [*HOG, "/dev/null", "{have}/s.npz"], "/dev/null")
refused("odd", "a checkpoint is /dev/zero", "sample_ddp", [*SAMPLE, "--ckpt", "/dev/zero"], "/dev/zero")
refused("odd", "--json in place of the reference", "evaluate_fid", [*HOG, "{tmp}/r.npz", "{have}/s.npz", "--json", "{tmp}/r.npz"],
        "r.npz", make=lambda tmp, have: copy(have / "r.npz", tmp / "r.npz"))
refused("odd", "--npz in place of the checkpoint", "sample_ddp", [*SAMPLE, "--ckpt", "{tmp}/a.npz"], "a.npz",
        make=lambda tmp, have: copy(have / LAST, tmp / "a.npz"), leaves=("a.shards", "a.shards/.lock"))
refused("odd", "--export over a file", "finetune_vae", ["--ckpt", "{have}/vae.pt", "--export", "{tmp}/f", "--format", "compvis"], "f",
        make=lambda tmp, have: (tmp / "f").write_text("x"))
refused("odd", "--export to /", "finetune_vae", ["--ckpt", "{have}/vae.pt", "--export", "/", "--format", "compvis", "--force"], "/")
refused("odd", "prepare into its own source", "models.runtime.prepare", ["{tmp}/photos", "{tmp}/photos/a.zip"], "a.zip",
        make=tree(lambda folder: None))
refused("odd", "prepare over its own source", "models.runtime.prepare", ["{tmp}/a.zip", "{tmp}/a.zip"], "a.zip",
        make=lambda tmp, have: copy(have / "photos.zip", tmp / "a.zip"))

# ---------------------------------------------------------------- something else where the scripts write

for place in ("log.txt", "metrics.jsonl", "args.json", ".lock"):
    refused("odd", f"a folder called {place}", "train_repae_e", TRAIN, "exps/run",
            make=lambda tmp, have, place=place: (tmp / "exps/run" / place).mkdir(parents=True), leaves=START)


def laid(place):
    """make(): a file at this place."""
    def make(tmp, have):
        (tmp / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp / place).write_text("x")
    return make


@case("odd", "a file called checkpoints")
def _(tmp, have):
    laid("exps/run/checkpoints")(tmp, have)
    done = execute("train_repae_e", TRAIN, tmp, have)
    assert_refused(done, ["checkpoints"], done.code)
    assert done.code in (1, 2) and (tmp / "exps/run/checkpoints").read_text() == "x"


for script, place in [("sample_ddp", "a.shards"), ("sample_ddp", "a.png/x"), ("sample_ddp", "a.json/x"), ("sample_ddp", "a.npz/x")]:
    refused("odd", f"something else is at {place}", script, SAMPLE, place.split("/")[0], make=laid(place),
            leaves=("a.shards", "a.shards/.lock"))
refused("odd", "--cache is a file", "evaluate_fid", [*FLAGS["evaluate_fid"], "--cache", "{tmp}/c"], "c", make=laid("c"))
survives("foreign files in --cache", "evaluate_fid", [*FLAGS["evaluate_fid"], "--cache", "{tmp}/c"], make=laid("c/00000000-00000004.npz"))
survives("foreign files among shards", "sample_ddp", SAMPLE, make=laid("a.shards/notes.txt"))
survives("a shard that is text", "sample_ddp", SAMPLE, "made again", make=laid("a.shards/00000000-00000004.npz"))
survives("foreign files among checkpoints", "train_repae_e", TRAIN, make=laid("exps/run/checkpoints/best.pt"))

for name, end in [("cut in a line", lambda data: data[:-30]), ("of zeros", lambda data: data + b"\0" * 500), ("not in UTF-8", lambda data:
                  data + b"\xff\xfe\x80\n"), ("with a number for a line", lambda data: data + b"3\n"), ("with a list for a line",
                  lambda data: data + b"[]\n"), ("with a line without a step", lambda data: data + b"{}\n"), ("with a step of text",
                  lambda data: data + b'{"step": "x"}\n'), ("that is empty", lambda data: b"")]:
    @case("odd", f"continued: metrics.jsonl {name}")
    def _(tmp, have, end=end):
        path = copy(have / "exps/run", tmp / "exps/run") / "metrics.jsonl"
        path.write_bytes(end(path.read_bytes()))
        assert_done(execute("train_repae_e", MORE, tmp, have), "from step 3")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines][-1] == 4 and all(set(line) >= {"step", "sit_loss"} for line in lines)


@case("odd", "the run's folder is removed while it is at work: it ends in one line, or goes on to whole checkpoints")
def _(tmp, have):
    run = start("train_repae_e", [*TRAIN, "--max-train-steps", "8"], tmp, have)
    wait(run, (tmp / "exps/run/metrics.jsonl").exists)
    shutil.rmtree(tmp / "exps", ignore_errors=True)
    done = finish(run)
    if done.code:
        assert_refused(done, [""], 1)
    else:
        assert read_state(tmp / "exps/run/checkpoints/0000008.pt")["steps"] == 8


@case("odd", "the folder of the data is removed while a run is at work")
def _(tmp, have):
    tree(lambda folder: None)(tmp, have)
    run = start("train_repae_e", [*TRAIN, "--data-dir", "{tmp}/photos", "--max-train-steps", "400"], tmp, have)
    wait(run, (tmp / "exps/run/metrics.jsonl").exists)
    shutil.rmtree(tmp / "photos", ignore_errors=True)
    done = finish(run)
    assert "Traceback" not in done.text and done.code in (1, 2) and "photos" in done.err.splitlines()[-1], done.text


@case("odd", "standard output is closed early: one line, and the run continues")
def _(tmp, have):
    done = execute("train_repae_e", [*TRAIN, "--max-train-steps", "50"], tmp, have, hooks=[(closed_pipe,)])
    assert_refused(done, ["pipe"], done.code)
    assert_done(execute("train_repae_e", TRAIN, tmp, have))
    same_state(read_state(tmp / LAST), read_state(have / LAST))


def closed_pipe():
    """Standard output goes to a reader that has left."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


for name, times in [("stands still", (1e9,)), ("goes backwards", (2e9, 1e9, 1e9 - 5, 10.0))]:
    for script, flags in FLAGS.items():
        survives(f"a clock that {name}: {script}", script, flags, hooks=[(clock, *times)])

# ---------------------------------------------------------------- processes that are no processes

for name, environment, words in [("WORLD_SIZE without an address", {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
                                 ("WORLD_SIZE of text", {"WORLD_SIZE": "two"}, "two")]:
    refused("odd", name, "train_repae_e", TRAIN, words, env=environment)

# ---------------------------------------------------------------- checkpoints of another kind of run

for name, script, flags, words in [
    ("a refinement's checkpoint to --resume", "train_repae_e", [*TRAIN, "--resume", "{have}/exps/refined/checkpoints/0000003.pt"], ""),
    ("a run's checkpoint to --resume a refinement", "finetune_vae", [*REFINE, "--resume", "{have}/" + LAST], "vae_ema"),
    ("samples of a refinement", "sample_ddp", [*SAMPLE, "--ckpt", "{have}/exps/refined/checkpoints/0000003.pt"], "ema"),
    ("samples of a VAE", "sample_ddp", [*SAMPLE, "--ckpt", "{have}/vae.pt"], "ema"),
    ("samples of an .npz", "sample_ddp", [*SAMPLE, "--ckpt", "{have}/r.npz"], "r.npz"),
    ("samples decoded with a wider VAE", "sample_ddp", [*SAMPLE, "--vae-ckpt", "{have}/inception.pt"], "inception.pt"),
    ("a run that went further", "train_repae_e", [*TRAIN, "--max-train-steps", "1", "--resume", "{have}/" + LAST], "--max-train-steps"),
    ("an exp-path without checkpoints", "sample_ddp", [*SAMPLE[2:], "--exp-path", "{have}"], "checkpoints"),
    ("a step that was not kept", "sample_ddp", [*SAMPLE[2:], "--exp-path", "{have}/exps/run", "--train-steps", "7"], "7"),
    ("Inception weights of another network", "evaluate_fid", ["--inception-weights", "{have}/vae.pt", "{have}/r.npz", "{have}/s.npz"],
     "vae.pt"),
    ("an encoder's weights of another network", "train_repae_e", [*TRAIN, "--encoder", "mocov3-vit-s", "--encoder-ckpt", "{have}/vae.pt"],
     "vae.pt"),
    ("statistics that are a VAE", "train_repae_e", [*TRAIN, "--latents-stats", "{have}/vae.pt"], "latents_scale"),
    ("a diffusers folder as a checkpoint", "sample_ddp", [*SAMPLE, "--ckpt", "{have}/diffusers"], "folder"),
]:
    refused("odd", name, script, flags, words)
for name, script, flags in [
    ("NaN in --vae-ckpt", "train_repae_e", [*TRAIN, "--vae-ckpt", "{tmp}/x.pt"]),
    ("NaN in the VAE to refine", "finetune_vae", [*REFINE, "--ckpt", "{tmp}/x.pt"]),
    ("NaN in the VAE to measure", "finetune_vae", ["--eval", "{tmp}/x.pt", "--metrics", "psnr", "--data-dir", "{have}/photos",
                                                   "--resolution", "32"]),
]:
    refused("odd", name, script, flags, "x.pt", "NaN", make=lambda tmp, have: change_state(
        copy(have / "vae.pt", tmp / "x.pt"), lambda state: next(iter(state.values())).view(-1).fill_(float("nan")) is None or None))

# ---------------------------------------------------------------- .npz

IMAGES = pictures(8)
ARRAYS = {
    "pickled objects": {"arr_0": np.array([1, "x", None], object)}, "in Fortran order": {"arr_0": np.asfortranarray(IMAGES)},
    "float64": {"arr_0": IMAGES / 255}, "NaN": {"arr_0": np.full((8, 32, 32, 3), np.nan)}, "no image": {"arr_0": IMAGES[:0]},
    "one image": {"arr_0": IMAGES[:1]}, "NCHW": {"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, "grey": {"arr_0": IMAGES[..., 0]},
    "four channels": {"arr_0": np.zeros((8, 32, 32, 4), np.uint8)}, "int64": {"arr_0": IMAGES.astype(int)},
    "signed bytes": {"arr_0": IMAGES.astype(np.int8)}, "a number": {"arr_0": np.uint8(3)}, "text": {"arr_0": np.array("x")},
    "another name": {"images": IMAGES}, "nothing": {}, "mu without sigma": {"arr_0": IMAGES, "mu": np.zeros(2048)},
    "records": {"arr_0": np.zeros(8, [("a", "u1"), ("b", "O")])}, "images of no width": {"arr_0": np.zeros((8, 32, 0, 3), np.uint8)},
}
for name, arrays in ARRAYS.items():
    refused("odd", f"a .npz with {name}", "evaluate_fid", [*HOG, "{have}/r.npz", "{tmp}/x.npz"], "x.npz",
            make=lambda tmp, have, arrays=arrays: np.savez(tmp / "x.npz", **arrays))


def doubled(tmp, have):
    """Two members of one name: the shorter one is the later."""
    copy(have / "s.npz", tmp / "x.npz")
    with zipfile.ZipFile(tmp / "x.npz", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00")


refused("odd", "a .npz with two arrays of one name", "evaluate_fid", [*HOG, "{have}/r.npz", "{tmp}/x.npz"], "x.npz", make=doubled)
survives("a compressed .npz", "evaluate_fid", [*HOG, "{have}/r.npz", "{tmp}/x.npz"], "FD-hog",
         make=lambda tmp, have: np.savez_compressed(tmp / "x.npz", IMAGES))
for name, statistics in [("that are NaN", (np.full(2048, np.nan), np.eye(2048))), ("of another size", (np.zeros(64), np.eye(64))),
                         ("that are no covariance", (np.zeros(2048), -np.eye(2048)))]:
    refused("odd", f"statistics {name}", "evaluate_fid", ["{tmp}/x.npz", "{have}/s.npz", "--inception-weights", "{have}/inception.pt"],
            "x.npz", make=lambda tmp, have, s=statistics: np.savez(tmp / "x.npz", mu=s[0], sigma=s[1]))

# ---------------------------------------------------------------- images


def saved(name, **how):
    """change(folder): the first image of the first class in another format."""
    def change(folder):
        image = how.pop("image", None) or Image.open(folder / "ant/0.png").convert(how.pop("mode", "RGB"))
        (folder / "ant/0.png").unlink()
        image.save(folder / "ant" / name, **how)
    return change


def frames(mode="RGB"):
    return [Image.fromarray(x).convert(mode) for x in pictures(3, size=40)]


GOOD = {
    "a WebP": saved("0.webp"), "an animated WebP": saved("0.webp", image=frames()[0], save_all=True, append_images=frames()),
    "a GIF": saved("0.gif"), "an animated GIF": saved("0.gif", image=frames("P")[0], save_all=True, append_images=frames("P")),
    "an animated PNG": saved("0.png", image=frames()[0], save_all=True, append_images=frames()),
    "a CMYK JPEG": saved("0.jpg", mode="CMYK"), "a black and white PNG": saved("0.png", mode="1"), "grey with alpha":
    saved("0.png", mode="LA"), "a TIFF of pages": saved("0.tif", image=frames()[0], save_all=True, append_images=frames()),
    "a BMP": saved("0.bmp"), "a JPEG 2000": saved("0.jp2"), "YCbCr in a JPEG": saved("0.jpg", mode="YCbCr"),
    "a JPEG with broken EXIF": saved("0.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "a PNG with a broken colour profile":
    saved("0.png", icc_profile=b"x" * 40), "a rotated JPEG": saved("0.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "an image of one pixel": saved("0.png", image=Image.new("RGB", (1, 1))), "a PNG called .jpg": lambda f: (f / "ant/0.png").rename(f / "ant/0.jpg"),
    "a class of one image": lambda f: [(f / "bird" / x).unlink() for x in ("1.jpg", "2.png", "3.jpg")],
    "one class": lambda f: [shutil.rmtree(f / x) for x in ("bird", "fish")], "folders that differ in case": lambda f:
    (f / "bird").rename(f / "ANT"), "a class called 0": lambda f: (f / "bird").rename(f / "0"), "a comma in a class":
    lambda f: (f / "bird").rename(f / "a, b"), "a deeper tree": lambda f: (f / "ant").rename(f / "bird" / "ant"),
    "a name in no encoding": lambda f: os.rename(f / "ant/0.png", os.fsencode(f / "ant") + b"/\xff\xfe.png"),
    "a class in no encoding": lambda f: os.rename(f / "ant", os.fsencode(f) + b"/\xff\xfe"), "two hard links":
    lambda f: os.link(f / "ant/0.png", f / "ant/9.png"), "a link to another image": lambda f: (f / "ant/9.png").symlink_to("0.png"),
}
for name, change in GOOD.items():
    case("odd", f"trained on: {name}")(trains_on(change, "--max-train-steps", "4", "--batch-size", "4"))
for name, change in {
    "an SVG": lambda f: (f / "ant/0.png").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    "an icon": saved("0.ico"), "HTML": lambda f: (f / "ant/0.png").write_text("<html>404</html>"),
    "a .zip called .png": lambda f: copy(f.parent / "photos.zip", f / "ant/0.png") if (f.parent / "photos.zip").exists() else
    zipfile.ZipFile(f / "ant/0.png", "w").close(),
}.items():
    refused("odd", f"to train on: {name}", "train_repae_e", [*TRAIN, "--data-dir", "{tmp}/photos"], "ant/0.", make=tree(change))
for name, change in [("a cut PNG", lambda f: cut(f / "ant/0.png", .6)), ("an empty file", lambda f: (f / "ant/0.png").write_bytes(b"")),
                     ("sizes that differ", saved("0.png", image=Image.new("RGB", (50, 40)))), ("a text", lambda f:
                     (f / "ant/0.png").write_text("x")), ("no image at all", lambda f: [p.unlink() for p in f.glob("*/*")])]:
    refused("odd", f"to evaluate: {name}", "evaluate_fid", [*HOG, "{tmp}/photos", "{tmp}/photos"], "photos", make=tree(change))


def of_root(tmp, have):
    """A run of somebody else, readable and not to be written to."""
    copy(have / "exps/run", tmp / "exps/run")
    tmp.chmod(0o755)


refused("odd", "somebody else's run folder", "train_repae_e", MORE, "exps/run", make=of_root, hooks=[(as_nobody,)])


@case("odd", "one sample, one step, one at a time")
def _(tmp, have):
    assert_done(execute("sample_ddp", [*SAMPLE, "--num-fid-samples", "1", "--num-steps", "1", "--pproc-batch-size", "1"], tmp, have))
    assert np.load(tmp / "a.npz")["arr_0"].shape == (1, 32, 32, 3)


@case("odd", "a checkpoint that holds NaN is not the newest sound one: it stops the start and stays")
def _(tmp, have):
    copy(have / "exps/run", tmp / "exps/run")
    change_state(tmp / LAST, nan_in("ema"))
    assert_refused(execute("train_repae_e", [*MORE, "--keep-checkpoints", "1"], tmp, have), ["0000003.pt"])
    assert files.checkpoint_steps(tmp / "exps/run/checkpoints") == [1, 2, 3]
