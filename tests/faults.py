"""What can go wrong, tried: kills, signals, damaged and malicious files, full disks, the mistakes of users.

    python tests/faults.py                      # all cases, some minutes
    python tests/faults.py pickles users        # groups by name
    python tests/faults.py --kills 100          # instead: SIGKILL at random moments, each writer in turn

Every case runs a script in a process of its own, with networks of a few hundred kB, in an empty folder next
to `have` (the inputs) and `whole-...` (what undisturbed runs make). The suite runs the quick cases
(test_faults.py).
"""
import argparse
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = Path(tempfile.gettempdir(), "faults-OUT")     # where nothing may be written
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import processes

from models.discriminator import Discriminator
from models.runtime import files
from models.vae import AutoencoderKL

SECONDS = 120   # that a process may take

# ---------------------------------------------------------------- commands, given in a folder next to `have`

RUN = "--resolution 32 --perceptual-weight 0 --disc-weight 0.1 --disc-ckpt none --disc-start 1 " \
      "--batch-size 4 --num-workers 0 --max-train-steps 4 --log-every 1 --checkpointing-steps 1 " \
      "--sampling-steps 2 --learning-rate 1e-3 --disc-learning-rate 1e-3 --ema-decay 0.9 --exp-name run"
TRAIN = f"--data-dir shapes --model SiT-Ti/4 --encoder hog --encoder-depth 1 --vae f4d4 --vae-ckpt none " \
        f"--num-classes 10 {RUN}".split()
FROZEN = TRAIN + "--data-dir ../have/photos --hflip --freeze-vae --vae-ckpt ../have/vae.pt " \
                 "--latent-cache cache".split()
REFINE = f"--data-dir ../have/photos --ckpt ../have/vae.pt {RUN}".split()
CHECKPOINT = "../whole-train/exps/run/checkpoints/0000004.pt"
SAMPLE = f"--ckpt {CHECKPOINT} --num-fid-samples 150 --num-steps 2 --npz out.npz".split()
EXPORT = "--ckpt ../have/vae.pt --export e --format compvis".split()
HOG = "--features hog ../have/r.npz".split()
FID = "--inception-weights ../have/vae.pt ../have/r.npz ../have/s.npz".split()
MEASURE = "--metrics psnr --data-dir ../have/photos --resolution 32 --eval".split()

# What writes -> (script, flags).
WRITERS = {
    "train": ("train_repae_e", TRAIN),
    "sample": ("sample_ddp", SAMPLE),
    "cache": ("train_repae_e", FROZEN),
    "refine": ("finetune_vae", REFINE),
}
# What shows that they are at work, and a function of theirs that is made slow.
SIGNS = {"train": ("exps/run/metrics.jsonl", "train_repae_e", "train_step"),
         "refine": ("exps/run/metrics.jsonl", "finetune_vae", "train_step"),
         "sample": ("out.shards/0*", "models.samplers", "decode"),
         "cache": ("exps/run/metrics.jsonl", "train_repae_e", "train_step")}

CASES = []      # namespaces: group, name, quick, run(folder), which raises AssertionError


def case(group, name, quick, function, *arguments):
    """Register the case function(folder, *arguments); the suite runs those that are quick."""
    CASES.append(SimpleNamespace(group=group, name=name, quick=quick,
                                 run=lambda tmp: function(tmp, *arguments)))


# ---------------------------------------------------------------- processes

def start(script, flags, tmp, *hooks):
    """A script's main in a process in the folder tmp; hooks: (function, *arguments), called before it.

    Its output lies next to the folder, which gets what the script writes and nothing else.
    """
    log = Path(f"{tmp}.{time.monotonic_ns()}")
    hooks = (offline,), (small_networks,), *hooks
    return SimpleNamespace(log=log, process=processes.start(script, flags, log, folder=tmp, hooks=hooks))


def finish(run):
    """Wait for the process: namespace(code, text of its output)."""
    run.process.join(SECONDS)
    late = run.process.is_alive()
    processes.kill(run.process)
    text = run.log.read_text(errors="replace")
    assert not late, f"still running after {SECONDS} s\n{text}"
    return SimpleNamespace(code=run.process.exitcode, text=text)


def execute(*arguments):
    return finish(start(*arguments))


def offline():
    """Hook: empty caches in the folder, and no network."""
    from huggingface_hub import constants   # it has read its environment already
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = os.path.abspath("hub"), True
    os.environ["TORCH_HOME"] = "torch"


small_vae = partial(AutoencoderKL, 4, base=8, multipliers=(1, 1, 2), blocks=1)


def small_networks():
    """A smaller VAE too (processes.py has the small SiT), and statistics of few images."""
    import finetune_vae
    from models.vae import VAE_models
    VAE_models["f4d4"] = small_vae
    finetune_vae.STATS_IMAGES = 4


def slow(module, name, seconds):
    """Hook: a function takes longer."""
    function = getattr(importlib.import_module(module), name)
    setattr(importlib.import_module(module), name,
            lambda *arguments, **more: (time.sleep(seconds), function(*arguments, **more))[1])


def fill_disk(after):
    """Hook: once `after` checkpoints are written, no file can grow beyond 5 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, saved = files.save, []

    def limited(*arguments):
        saved.append(arguments)
        if len(saved) > after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        return save(*arguments)
    files.save = limited


# ---------------------------------------------------------------- what must be true afterwards

def assert_done(done, *words):
    assert done.code == 0 and "Traceback" not in done.text, f"exit code {done.code}\n{done.text}"
    assert all(word in done.text for word in words), f"{words} expected in:\n{done.text}"


def assert_rejected(done, *words, codes=(2,)):
    """One line with all the words, and that exit code."""
    lines = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.text and done.code in codes, f"exit code {done.code}\n{done.text}"
    assert len(lines) == 1, f"not one line:\n{done.text}"
    assert all(word in lines[0] for word in words), f"{words} expected in: {lines[0]}"


def whole(writer, tmp):
    """The folder of what this writer makes when nothing disturbs it; made when it is first asked for."""
    folder = tmp.parent / f"whole-{writer}"
    if not folder.exists():
        folder.mkdir()
        assert_done(execute(*WRITERS[writer], folder))
    return folder


def assert_whole(writer, tmp):
    """Run the writer, again: tmp has the files of an undisturbed run and no other, equal to the bit."""
    assert_done(execute(*WRITERS[writer], tmp))
    undisturbed = whole(writer, tmp)
    assert names(undisturbed) == names(tmp), f"other files: {sorted(names(undisturbed) ^ names(tmp))}"
    different = [n for n in sorted(names(tmp)) if not same(content(undisturbed / n), content(tmp / n))]
    assert not different, f"other bits: {different}"


TELL = ("log.txt", "metrics.jsonl", "args.json", ".lock")    # files that tell of one run


def names(folder):
    """Relative names of a folder's files, but for TELL and the pictures of a step: they are drawn once its
    checkpoint is written, and not again after a kill in between."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()
            and path.name not in TELL and path.parent.name not in ("samples", "reconstructions")}


def content(path):
    """What is compared of a file: its bytes, of a checkpoint its tensors and numbers."""
    if path.suffix != ".pt":
        return path.read_bytes()
    return {name: value for name, value in torch.load(path, weights_only=True).items() if name != "args"}


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------- the world

@contextlib.contextmanager
def world():
    """Context: a folder with `have`, the inputs, in which each case gets a folder of its own."""
    processes.begin()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        base, have = Path(folder), Path(folder) / "have"
        for k, name in enumerate(("ant", "bird", "fish")):
            (have / "photos" / name).mkdir(parents=True)
            for i, image in enumerate(pictures(12, k, 40)):
                Image.fromarray(image).save(have / "photos" / name / f"{i:02d}.{('png', 'jpg')[i % 2]}")
        pack(have / "photos", have / "photos.zip")
        np.savez(have / "r.npz", pictures(12, 1))
        np.savez(have / "s.npz", pictures(8))
        torch.manual_seed(7)
        torch.save(small_vae().state_dict(), have / "vae.pt")
        torch.save({"latents_scale": torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1),
                    "latents_bias": torch.tensor([0.1, 0.2, 0.3, -0.4]).view(1, 4, 1, 1)},
                   have / "vae-latents-stats.pt")
        torch.save(Discriminator().state_dict(), have / "disc.pt")
        for writer in ("train", "refine"):  # whose checkpoints are inputs of others
            whole(writer, have)
        yield base


def pictures(n, seed=0, size=32):
    """n smooth random images, uint8 [n, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.BICUBIC)) for x in coarse])


def pack(folder, path, *more):
    """A .zip of a folder; `more` are names of further members."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*g")):
            archive.write(file, file.relative_to(folder))
        for name in more:
            archive.write(file, name)


def copy_run(tmp, writer="train"):
    """A copy of an undisturbed run. Returns its newest checkpoint."""
    shutil.copytree(whole(writer, tmp) / "exps", tmp / "exps")
    return max(tmp.glob("exps/run/checkpoints/*.pt"))


def cut(path):
    Path(path).write_bytes(Path(path).read_bytes()[:os.path.getsize(path) // 2])


def flip(path):
    """Change a bit of the largest tensor in a file of torch's zip format."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
        place = path.read_bytes().index(archive.read(member)) + member.file_size // 2
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


# ---------------------------------------------------------------- SIGKILL at a random moment

DRAWS, TAKES = random.Random(0), {}     # seconds that each writer takes, at most


def killed(tmp, writer):
    begun = time.monotonic()
    run = start(*WRITERS[writer], tmp)
    time.sleep(DRAWS.uniform(0, TAKES.get(writer, 2)))
    if not run.process.is_alive():      # too late: earlier next time
        TAKES[writer] = 0.8 * (time.monotonic() - begun)
    processes.kill(run.process)
    assert_whole(writer, tmp)
    assert_whole(writer, tmp)   # now there is nothing to do but to tidy up


for writer in WRITERS:
    case("kills", writer, writer == "train", killed, writer)


# ---------------------------------------------------------------- signals: it saves, and the same bits follow

def signalled(tmp, writer, number):
    sign, *function = SIGNS[writer]
    run = start(*WRITERS[writer], tmp, (slow, *function, 0.3))
    processes.wait_for(lambda: any(tmp.glob(sign)), [run.process], run.log)
    os.kill(run.process.pid, number)
    assert_done(finish(run), f"stopped by {number.name}")
    assert_whole(writer, tmp)


def signalled_with_torchrun(tmp):
    """As `timeout`, scancel and systemd send it: torchrun, the processes and their data workers get it."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
               ROOT / "train_repae_e.py", *TRAIN, "--num-workers", "1",
               "--max-train-steps", "100000", "--checkpointing-steps", "100000"]
    log = Path(f"{tmp}.log")
    with open(log, "w") as output:
        group = subprocess.Popen([sys.executable, *map(str, command)], cwd=tmp, stdout=output, stderr=output,
                                 start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        processes.wait_for((tmp / SIGNS["train"][0]).exists, [SimpleNamespace(exitcode=None)], log)
        os.killpg(group.pid, signal.SIGTERM)
        group.wait(60)
    finally:
        if group.poll() is None:
            os.killpg(group.pid, signal.SIGKILL)
    saved, = tmp.glob("exps/run/checkpoints/*.pt")
    text = log.read_text()
    assert f"stopped by SIGTERM: saved {saved.relative_to(tmp)}" in text, text
    assert "DataLoader worker" not in text, text


case("signals", "torchrun: SIGTERM to all", False, signalled_with_torchrun)
for writer in ("train", "refine", "cache"):     # sampling is killed: its shards are all that it would save
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        case("signals", f"{writer}: {number.name}", False, signalled, writer, number)


# ---------------------------------------------------------------- two runs in one folder

def second_run(tmp, writer):
    sign, *function = SIGNS[writer]
    run = start(*WRITERS[writer], tmp, (slow, *function, 1))
    try:
        processes.wait_for(lambda: any(tmp.glob(sign)), [run.process], run.log)
        assert_rejected(execute(*WRITERS[writer], tmp), "another run is at work")
        assert run.process.is_alive(), finish(run).text
    finally:
        processes.kill(run.process)
    assert_whole(writer, tmp)


for writer in SIGNS:
    case("folders", f"a second run: {writer}", False, second_run, writer)


# ---------------------------------------------------------------- full disks

def no_more_room(tmp, writer):
    """Full at the third checkpoint: the second stays, also where only one is to be kept."""
    script, flags = WRITERS[writer]
    done = execute(script, [*flags, "--keep-checkpoints", "1"], tmp, (fill_disk, 2))
    assert_rejected(done, "0000003.pt", codes=(1, 2))
    assert [p.name for p in tmp.glob("exps/run/checkpoints/*")] == ["0000002.pt"]
    assert_done(execute(script, flags, tmp), "from step 2")
    last = "exps/run/checkpoints/0000004.pt"
    assert same(content(tmp / last), content(whole(writer, tmp) / last))


for writer in ("train", "refine"):
    case("disks", f"{writer}: full at the third checkpoint", writer == "train", no_more_room, writer)


# ---------------------------------------------------------------- damaged files

DAMAGE = {"half of it": cut, "a flipped bit": flip, "text": lambda path: path.write_text("hello")}


def damaged_newest(tmp, damage):
    """It is named and passed over, and the run ends in the same bits."""
    damage(newest := copy_run(tmp))
    assert_done(execute("train_repae_e", TRAIN, tmp), newest.name, "from step 3")
    assert_whole("train", tmp)


def damaged_later(tmp, damage):
    """A damaged checkpoint of a later step pushes no sound one out."""
    later = Path(shutil.copy(newest := copy_run(tmp), tmp / "exps/run/checkpoints/0000009.pt"))
    damage(later)
    assert_done(execute("train_repae_e", [*TRAIN, "--keep-checkpoints", "1"], tmp), later.name)
    assert same(content(newest), content(whole("train", tmp) / newest.relative_to(tmp)))


def damaged_input(tmp, damage, script, flags, sound):
    damage(Path(shutil.copy(tmp / sound, tmp / "x.pt")))
    assert_rejected(execute(script, flags, tmp), "x.pt")
    assert names(tmp) == {"x.pt"}, names(tmp)


def poisoned(tmp, key):
    """NaN in the newest checkpoint stops the start; the file stays, for its owner to decide."""
    newest = copy_run(tmp)
    state = torch.load(newest, weights_only=True, mmap=False)
    next(v for v in state[key].values() if v.is_floating_point()).view(-1)[0] = float("nan")
    torch.save(state, newest)
    more = "--max-train-steps 5 --keep-checkpoints 1".split()
    assert_rejected(execute("train_repae_e", [*TRAIN, *more], tmp), newest.name, key)
    assert files.checkpoint_steps(newest.parent) == [1, 2, 3, 4]
    assert same(state["opt"], content(newest)["opt"])


def diverged(tmp):
    done = execute("train_repae_e", [*TRAIN, "--learning-rate", "1e30", "--max-train-steps", "6"], tmp)
    assert done.code in (0, 1) and "Traceback" not in done.text, done.text
    for path in tmp.rglob("*.pt"):
        assert files.first_non_finite(content(path)) is None, path


# Where a file of tensors is read, as x.pt -> (script, flags, a sound file).
READERS = {
    "--init-from": ("train_repae_e", [*TRAIN, "--init-from", "x.pt"], CHECKPOINT),
    "--vae-ckpt": ("train_repae_e", [*TRAIN, "--vae-ckpt", "x.pt"], "../have/vae.pt"),
    "--disc-ckpt": ("train_repae_e", [*TRAIN, "--disc-ckpt", "x.pt"], "../have/disc.pt"),
    "--latents-stats": ("train_repae_e", [*FROZEN, "--latents-stats", "x.pt"],
                        "../have/vae-latents-stats.pt"),
    "sampled": ("sample_ddp", [*SAMPLE, "--ckpt", "x.pt"], CHECKPOINT),
    "decoded with": ("sample_ddp", [*SAMPLE, "--vae-ckpt", "x.pt"], "../have/vae.pt"),
    "refined": ("finetune_vae", [*REFINE, "--ckpt", "x.pt"], "../have/vae.pt"),
    "exported": ("finetune_vae", [*EXPORT, "--ckpt", "x.pt"], CHECKPOINT),
    "measured": ("finetune_vae", [*MEASURE, "x.pt"], "../have/vae.pt"),
    "--inception-weights": ("evaluate_fid", ["--inception-weights", "x.pt", *HOG[2:], "../have/s.npz"],
                            "../have/vae.pt"),
}
for name, damage in DAMAGE.items():
    case("damage", f"the newest checkpoint: {name}", name == "a flipped bit", damaged_newest, damage)
    case("damage", f"a later checkpoint: {name}", False, damaged_later, damage)
    for place, reader in READERS.items():
        case("damage", f"{place}: {name}", (name, place) == ("half of it", "sampled"), damaged_input,
             damage, *reader)
for key in ("model", "ema", "vae", "discriminator"):
    case("damage", f"NaN in the checkpoint: {key}", key == "ema", poisoned, key)
case("damage", "a learning rate of 1e30: no NaN in a checkpoint", False, diverged)


# ---------------------------------------------------------------- malicious files

class Evil:
    def __reduce__(self):
        return os.system, ("touch RAN",)


def evil(path, kind="alone", sound=None):
    """A file with code in its pickle: "alone", "within" the content of a sound file, or in the old layout."""
    state = {"ema": Evil(), "state_dict": {"x": Evil()}}
    state = state if kind != "within" else {**torch.load(sound, weights_only=True), "callbacks": state}
    torch.save(state, path, _use_new_zipfile_serialization=kind != "old")


def assert_nothing_ran(tmp, done, *words, may_work=False):
    assert not list(tmp.parent.rglob("RAN")), "the code ran"
    if not may_work or done.code:
        assert_rejected(done, *words)


def evil_input(tmp, kind, script, flags, sound):
    evil(tmp / "x.pt", kind, tmp / sound)
    assert_nothing_ran(tmp, execute(script, flags, tmp), "x.pt", may_work=kind == "within")


def evil_checkpoint(tmp, kind):
    """The newest of a run that resumes."""
    newest = copy_run(tmp)
    evil(newest, kind, tmp / CHECKPOINT)
    assert_nothing_ran(tmp, execute("train_repae_e", TRAIN, tmp), newest.name, may_work=kind == "within")


def evil_downloads(tmp, paths, flags):
    """Files in the caches of torch and the hub."""
    for path in paths:
        (tmp / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp / path).write_text("1") if path.endswith("refs/main") else evil(tmp / path)
    assert_nothing_ran(tmp, execute("train_repae_e", [*TRAIN, *flags], tmp))


def evil_npz(tmp, member):
    arrays = {"arr_0": pictures(8), "mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp / "x.npz", **arrays | {member: np.array([Evil()] * 8, object)})
    done = execute("evaluate_fid", ["--inception-weights", "gone.pth", "x.npz", "../have/s.npz"], tmp)
    assert_nothing_ran(tmp, done)


def evil_cache(tmp):
    shutil.copytree(whole("cache", tmp) / "cache", tmp / "cache")
    np.save(tmp / "cache/latents.npy", np.array([Evil()] * 72, object), allow_pickle=True)
    assert_nothing_ran(tmp, execute("train_repae_e", FROZEN, tmp), "cache")


def escaping_member(tmp, member, images):
    """A member of a .zip or .npz whose name leads out: only the script's own outputs are written."""
    if images:
        pack(tmp.parent / "have/photos", tmp / "x.zip", member)
    else:
        shutil.copy(tmp.parent / "have/s.npz", tmp / "x.npz")
        zipfile.ZipFile(tmp / "x.npz", "a").writestr(member, b"x")
    before = names(tmp.parent)
    commands = [("evaluate_fid", [*HOG, "x.npz"])] if not images else [
        ("train_repae_e", [*TRAIN, "--data-dir", "x.zip"]),
        ("evaluate_fid", "--features hog x.zip x.zip".split())]
    for command in commands:
        assert "Traceback" not in execute(*command, tmp).text
    new = [n for n in names(tmp.parent) - before if not n.startswith((f"{tmp.name}/exps", f"{tmp.name}."))]
    assert not new and not OUTSIDE.exists(), new


ENCODED = {name: ("train_repae_e", [*TRAIN, "--encoder", name, "--encoder-ckpt", "x.pt"], "../have/vae.pt")
           for name in ("test_vit", "clip-vit-l")}
for kind in ("alone", "within", "old"):
    case("pickles", f"resumed: {kind}", kind == "alone", evil_checkpoint, kind)
    for place, reader in (READERS | ENCODED).items():
        quick = kind == "alone" and place == "test_vit"
        case("pickles", f"{place}: {kind}", quick, evil_input, kind, *reader)
for name, paths, flags in [
    ("LPIPS", ["torch/hub/checkpoints/vgg16-397923af.pth", "torch/hub/checkpoints/lpips_vgg.pth"],
     ["--perceptual-weight", "1"]),
    ("DINOv2", ["hub/models--timm--vit_small_patch14_dinov2.lvd142m/refs/main",
                "hub/models--timm--vit_small_patch14_dinov2.lvd142m/snapshots/1/pytorch_model.bin"],
     ["--encoder", "dinov2-vit-s"]),
    ("a VAE", ["hub/models--REPA-E--sdvae/refs/main", "hub/models--REPA-E--sdvae/snapshots/1/sdvae-f8d4.pt"],
     "--vae f8d4 --vae-ckpt REPA-E/sdvae".split())]:
    case("pickles", f"{name} in the caches", False, evil_downloads, paths, flags)
case("pickles", "a latent cache", False, evil_cache)
for member in ("arr_0", "mu", "arr_1", "protocol"):
    case("pickles", f"a .npz as reference: {member}", member == "arr_0", evil_npz, member)
for member in ("../../OUT.png", f"{OUTSIDE}/OUT.png"):
    case("archives", f".zip of images: {member}", member == "../../OUT.png", escaping_member, member, True)
for member in ("../../OUT.npy", f"{OUTSIDE}/OUT.npy"):
    case("archives", f".npz: {member}", False, escaping_member, member, False)


# ---------------------------------------------------------------- the commonest mistakes of users

def write(name, text=""):
    return lambda tmp: (tmp / name).write_text(text)


def photos(change):
    """A copy of the photos in which something is changed."""
    return lambda tmp: change(Path(shutil.copytree(tmp.parent / "have/photos", tmp / "photos")))


def splits(tmp):
    for split in ("train", "val"):
        shutil.copytree(tmp.parent / "have/photos", tmp / "photos" / split)


BASE = {"train": ("train_repae_e", TRAIN), "sample": ("sample_ddp", SAMPLE), "hog": ("evaluate_fid", HOG),
        "refine": ("finetune_vae", REFINE), "export": ("finetune_vae", EXPORT),
        "fid": ("evaluate_fid", FID)}
OURS = "--data-dir photos "
MISTAKES = [    # command, further flags, what the line must name, what is wrong[, what is laid before]
    ("train", "--learning-rat 1", "--learning-rat", "a flag that does not exist"),
    ("train", "--learning-rate 1e-4x", "--learning-rate", "a number that is text"),
    ("sample", "--cfg-scale nan", "--cfg-scale", "NaN as a number"),
    ("train", "--encoder dinov9", "dinov9", "an unknown encoder"),
    ("train", "--encoder-depth 9", "depth", "a depth beyond the network"),
    ("train", "--gradient-accumulation-steps 3", "--batch-size 4", "a batch that cannot be split"),
    ("train", "--resolution 36", "--resolution 36", "a resolution the VAE cannot halve"),
    ("train", "--resolution 16", "--disc-weight 0", "a resolution below the discriminator's"),
    ("train", "--num-classes 3", "--num-classes 3", "too few classes"),
    ("train", "--freeze-vae", "--vae-ckpt", "a frozen VAE without weights"),
    ("train", OURS, "photos", "data that are not there"),
    ("train", OURS, "x.png", "images without a class",
     photos(lambda f: shutil.copy(f / "ant/00.png", f / "x.png"))),
    ("train", OURS, "crow", "an empty class folder", photos(lambda f: (f / "crow").mkdir())),
    ("train", OURS, "photos/train", "splits taken for classes", splits),
    ("train", OURS + "--batch-size 36", "00.png", "a truncated image",
     photos(lambda f: cut(f / "ant/00.png"))),
    ("train", "--data-dir x.zip", "x.zip", "half a .zip",
     lambda tmp: cut(shutil.copy(tmp.parent / "have/photos.zip", tmp / "x.zip"))),
    ("train", "--vae-ckpt vae.pt", "vae.pt", "weights that are not there"),
    ("train", "--vae f4d16 --vae-ckpt ../have/vae.pt", "vae.pt", "weights of another VAE"),
    ("train", "--disc-ckpt ../have/vae.pt", "vae.pt", "a file without a discriminator"),
    ("train", "--vae-ckpt x.pt", "LFS", "a Git LFS pointer",
     write("x.pt", "version https://git-lfs.github.com/spec/v1")),
    ("refine", "--ckpt x.pt", "web page", "a web page as weights", write("x.pt", "<!DOCTYPE html>")),
    ("train", "--vae f8d4 --vae-ckpt REPA-E/sdvae", "REPA-E/sdvae", "no network for a VAE"),
    ("train", "--encoder dinov2-vit-s", "dinov2-vit-s", "no network for an encoder"),
    ("train", "--seed 5", "--seed", "a run of other settings resumed", copy_run),
    ("train", "--max-train-steps 2", "--max-train-steps", "fewer steps than there are", copy_run),
    ("train", "--model SiT-Ti/2", "--model", "a checkpoint of another model", copy_run),
    ("sample", "--ckpt ../have/vae.pt", "vae.pt", "a VAE as a checkpoint"),
    ("sample", "--classes 10", "10", "a class that does not exist"),
    ("sample", "--heun", "--mode ode", "Heun's method for the SDE"),
    ("sample", "--cfg-scale 2 --guidance-low 0.9 --guidance-high 0.1", "guidance", "an interval upside down"),
    ("sample", "--npz samples", ".npz", "a .npz without its ending"),
    ("sample", "--global-seed 5", "out.npz", "samples of other settings under one name",
     lambda tmp: shutil.copy(whole("sample", tmp) / "out.npz", tmp)),
    ("export", "--ckpt none", "--ckpt", "an export of nothing"),
    ("export", "", "e", "an export over another", lambda tmp: (tmp / "e").mkdir()),
    ("hog", "gone.npz", "gone.npz", "samples that are not there"),
    ("hog", "", "--save-ref", "one input only"),
    ("hog", "x.npz", "uint8", "float images", lambda tmp: np.savez(tmp / "x.npz", pictures(8) / 255)),
    ("hog", "x.npz", "[N, H, W, 3]", "images as NCHW",
     lambda tmp: np.savez(tmp / "x.npz", pictures(8).transpose(0, 3, 1, 2))),
    ("fid", "--inception-weights gone.pth", "gone.pth", "weights of Inception that are not there"),
    ("fid", "--json f/a.json", "f", "an output that cannot be written", write("f")),
]


def mistaken(tmp, command, more, words, lay=()):
    script, flags = BASE[command]
    for make in lay:
        make(tmp)
    before = {name: (tmp / name).read_bytes() for name in names(tmp)}
    assert_rejected(execute(script, [*flags, *more.split()], tmp), words)
    assert {name: (tmp / name).read_bytes() for name in names(tmp)} == before, "it wrote files"


for number, (command, more, words, what, *lay) in enumerate(MISTAKES):
    case("users", f"{command}: {what}", number % 8 == 0, mistaken, command, more, words, lay)


# ---------------------------------------------------------------- the command

def attempt(one, base, number=0):
    """None if the case holds, else text that says what is wrong."""
    tmp = base / f"{number:04d}"
    tmp.mkdir()
    try:
        one.run(tmp)
    except Exception:
        return traceback.format_exc()
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        for path in base.glob(f"{tmp.name}.*"):
            path.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help="groups of cases; all without one")
    parser.add_argument("--kills", type=int, default=0, help="instead: so many kills, each writer in turn")
    args = parser.parse_args()
    chosen = [c for c in CASES if not args.groups or c.group in args.groups]
    if args.kills:
        kills = [c for c in chosen if c.group == "kills"]
        chosen = [kills[k % len(kills)] for k in range(args.kills)]
    begun, table = time.monotonic(), {}
    with world() as base:
        print(f"world made in {time.monotonic() - begun:.0f} s", flush=True)
        for number, one in enumerate(chosen):
            wrong = attempt(one, base, number)
            table.setdefault(one.group, []).append(wrong is None)
            if wrong is not None:
                print(f"FAILED: {one.group}: {one.name}\n{wrong}\n", flush=True)
    for group, held in table.items():
        print(f"{group:<10}{len(held):>5} tried{sum(held):>5} held")
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(not all(map(all, table.values())))


if __name__ == "__main__":
    main()
