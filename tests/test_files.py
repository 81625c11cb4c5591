"""models/runtime/files.py: whole or not at all, damage told from other failures, one run per folder, one
downloader."""

import argparse
import hashlib
import multiprocessing
import os
import resource
import signal
import struct
import time
import zipfile

import loopback
import numpy as np
import pytest
import torch

from models.runtime import files


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def in_child(work):
    """Exit code of a forked process that runs `work`: 0, or 1 where it raises; a fork sees the test's own
    state."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- checkpoints

CONTENT = {"ema": {"w": torch.arange(3000.0).view(30, 100), "b": torch.zeros(0)}, "steps": 7,
           "args": {"model": "SiT-B/2", "nested": [1, None]}, "half": torch.ones(5, dtype=torch.bfloat16)}


def test_save_and_load(tmp_path):
    files.save(CONTENT, tmp_path / "new" / "0000007.pt")
    back = files.load(tmp_path / "new" / "0000007.pt")
    assert torch.equal(back["ema"]["w"], CONTENT["ema"]["w"]) and back["half"].dtype == torch.bfloat16
    assert back["args"] == CONTENT["args"] and back["steps"] == 7
    assert os.listdir(tmp_path / "new") == ["0000007.pt"]
    plain = torch.load(
        tmp_path / "new" / "0000007.pt", weights_only=True
    )  # an ordinary file of torch's to everyone else
    assert torch.equal(plain["ema"]["w"], CONTENT["ema"]["w"])
    assert zipfile.ZipFile(tmp_path / "new" / "0000007.pt").comment == b"repa-e format 1"


@pytest.mark.parametrize("zip_format, crc", [(True, True), (True, False), (False, True)])
def test_files_of_others_load(tmp_path, zip_format, crc):
    """What torch.save wrote, in its old format too, with the reference's Namespace, with or without
    digests."""
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save({**CONTENT, "args": argparse.Namespace(model="SiT-XL/2")}, tmp_path / "a.pt",
                   _use_new_zipfile_serialization=zip_format)
    finally:
        torch.serialization.set_crc32_options(True)
    back = files.load(tmp_path / "a.pt")
    assert torch.equal(back["ema"]["w"], CONTENT["ema"]["w"]) and back["args"].model == "SiT-XL/2"


def test_flipped_bits_are_seen(tmp_path):
    """A bit anywhere, in tensors or in what is around them: found, or of no effect on what is read."""
    path, state = tmp_path / "a.pt", {"w": torch.arange(8.0), "steps": 3}
    files.save(state, path)
    whole, found = path.read_bytes(), 0
    tensor = whole.index(struct.pack("<4f", 0, 1, 2, 3))
    for place in sorted(
        {*range(0, len(whole), 5), *range(tensor, tensor + 32), *range(len(whole) - 40, len(whole))}
    ):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1:])
        try:
            back = files.load(path)
            assert torch.equal(back["w"], state["w"]) and back["steps"] == 3, place
        except ValueError as error:
            assert "\n" not in str(error) and "a.pt" in str(error)
            found += isinstance(error, files.Damaged)
            assert isinstance(error, files.Damaged) or place > len(whole) - 20, (
                place,
                error,
            )  # there: the format's mark
        assert not tensor <= place < tensor + 32 or found, place
    assert found > 150  # the rest is padding, dates and such


def test_exponent_bit(tmp_path):
    """The bit that torch.load resumed from in silence."""
    path = tmp_path / "a.pt"
    files.save({"w": torch.full((1000,), 0.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<2f", 0.5, 0.5)) + 3] ^= 0x40
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].max() > 1e38
    with pytest.raises(files.Damaged) as error:
        files.load(path)
    one_line(error, "a.pt", "damaged", "data/0", "another copy")
    assert files.load(path, verify=False)["w"].max() > 1e38


def test_cut_files(tmp_path):
    path = tmp_path / "a.pt"
    files.save({"w": torch.arange(500.0)}, path)
    whole = path.read_bytes()
    for size in (0, 1, 3, 4, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(files.Damaged) as error:
            files.load(path)
        one_line(error, "a.pt", "another copy")
    path.write_bytes(bytes(len(whole)))  # what some file systems leave after a power cut
    with pytest.raises(files.Damaged):
        files.load(path)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_refused_is_not_damaged(tmp_path, monkeypatch, zip_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Runs()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError) as error:
        files.load(tmp_path / "a.pt")
    assert not isinstance(error.value, files.Damaged) and not (tmp_path / "ran").exists()
    one_line(error, "a.pt", "refused", "posix.mkdir", "only tensors")


@pytest.mark.parametrize("content, kind", [(None, "NoneType"), (torch.zeros(2), "Tensor"), ([1, 2], "list")])
def test_no_checkpoint_in_it(tmp_path, content, kind):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError) as error:
        files.load(tmp_path / "a.pt")
    assert not isinstance(error.value, files.Damaged)
    one_line(error, "a.pt", f"holds a {kind}", "checkpoint")


def test_compressed_zip_is_refused(tmp_path):
    """torch writes none, and a small one can unpack to anything."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 24))
    with pytest.raises(ValueError, match="refused") as error:
        files.load(tmp_path / "a.pt")
    assert not isinstance(error.value, files.Damaged)


def test_later_format_is_refused(tmp_path):
    files.save(CONTENT, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.comment = b"repa-e format 2"
    with pytest.raises(ValueError, match="format 2 is later than 1") as error:
        files.load(tmp_path / "a.pt")
    assert not isinstance(error.value, files.Damaged)


def test_unreadable_is_not_damaged(tmp_path, monkeypatch):
    """No permission, no memory: nothing is known about the file, so it must not be passed over."""
    files.save(CONTENT, tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.load(tmp_path / "none.pt")
    with pytest.raises(OSError, match="is a folder"):
        files.load(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(OSError) as error:
            files.load(tmp_path / "a.pt")
        one_line(error, "a.pt", "cannot be read (Permission denied)")

    def no_memory(*args, **kwargs):
        raise RuntimeError("unable to mmap 8192 bytes from file <a.pt>: Cannot allocate memory (12)")
    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(OSError) as error:
        files.load(tmp_path / "a.pt")
    one_line(error, "a.pt", "memory")


def test_safetensors(tmp_path):
    from safetensors.torch import save_file
    save_file({"w": torch.arange(10.0)}, tmp_path / "a.safetensors")
    assert torch.equal(files.load(tmp_path / "a.safetensors")["w"], torch.arange(10.0))
    whole = (tmp_path / "a.safetensors").read_bytes()
    for data in (b"", whole[:20], whole[:-1], b"<html>" * 9):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(files.Damaged) as error:
            files.load(tmp_path / "a.safetensors")
        one_line(error, "a.safetensors")


def test_not_finite(tmp_path):
    state = {
        "steps": 3,
        "opt": {"state": {0: {"exp_avg": torch.zeros(4)}}},
        "ema": {
            "a": torch.ones(2, 3, dtype=torch.bfloat16),
            "n": torch.tensor(3),
            "empty": torch.zeros(0),
            "double": torch.full((2,), 1e300, dtype=torch.float64),
        },
    }
    assert files.first_non_finite(state) is None
    for value in ("nan", "inf", "-inf"):
        state["opt"]["state"][0]["exp_avg"][3] = float(value)
        assert files.first_non_finite(state) == "opt.state.0.exp_avg"
        with pytest.raises(ValueError) as error:
            files.save(state, tmp_path / "0000003.pt")
        one_line(error, "0000003.pt", "not written", "opt.state.0.exp_avg")
    assert os.listdir(tmp_path) == []
    state["opt"]["state"][0]["exp_avg"][3] = 3.4e38
    state["ema"]["a"][1, 2] = float("inf")
    assert files.first_non_finite(state) == "ema.a"


# ---------------------------------------------------------------- writing

def test_interrupted_write_leaves_the_old_file(tmp_path):
    files.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(KeyboardInterrupt), files.replace(tmp_path / "x.pt") as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert torch.equal(files.load(tmp_path / "x.pt")["a"], torch.zeros(2)) and os.listdir(tmp_path) == [
        "x.pt"
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.save(CONTENT, path),
        lambda path: files.save_json({"a": 1}, path),
        lambda path: files.save_array(np.zeros(100), path),
    ],
)
def test_full_disk(tmp_path, write):
    """One line that says so, whatever torch and numpy make of it, and the file of before."""
    path = tmp_path / "x"
    path.write_text("before")
    os.symlink("/dev/full", files.temporary_name(str(path)))
    with pytest.raises(OSError) as error:
        write(path)
    one_line(error, "disk full", str(path))
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["x"]


def test_last_write_error_is_not_lost(tmp_path):
    """np.save on a disk that fills with the last bytes returns as if all were well; here a limit of 4 KiB is
    the disk."""

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    def numpys():
        small_disk()
        with open(tmp_path / "n.npy", "wb") as f:
            np.save(f, np.zeros(500))  # 128 + 4000 bytes
    lost = in_child(numpys) == 0 and os.path.getsize(tmp_path / "n.npy") < 4128

    def ours():
        small_disk()
        with pytest.raises(OSError):
            files.save_array(np.zeros(500), tmp_path / "x.npy")
        with pytest.raises(OSError):
            files.save({"a": torch.zeros(5000)}, tmp_path / "x.pt")
    assert in_child(ours) == 0 and not {"x.npy", "x.pt"} & set(os.listdir(tmp_path))
    print(f"np.save itself {'lost' if lost else 'reported'} the error")


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.zeros((0, 3), np.uint8), np.float32(3),
                                   np.arange(6, dtype=">i4").reshape(2, 3)])
def test_save_array(tmp_path, array):
    files.save_array(array, tmp_path / "a.npy")
    back = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert (
        np.array_equal(back, array)
        and back.dtype == np.asarray(array).dtype
        and back.shape == np.shape(array)
    )


def test_leftovers(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=lambda: None)
    child.start()
    child.join()
    gone, host = child.pid, files._host()
    for name in (
        f".a.pt.{gone}.tmp",
        f".b.c.{gone}@{host}.tmp",
        f".new.{gone}@elsewhere.tmp",
        f".old.{gone}@elsewhere.tmp",
        f".mine.{os.getpid()}@{host}.tmp",
        "a.tmp",
        ".a.pt",
        "0000001.pt",
    ):
        (tmp_path / name).touch()
    (tmp_path / f".export.{gone}@{host}.tmp").mkdir()
    (tmp_path / f".export.{gone}@{host}.tmp" / "file").touch()
    os.utime(tmp_path / f".old.{gone}@elsewhere.tmp", (time.time() - 100000,) * 2)
    assert set(files.remove_leftovers(tmp_path)) == {
        f".a.pt.{gone}.tmp",
        f".b.c.{gone}@{host}.tmp",
        f".old.{gone}@elsewhere.tmp",
        f".export.{gone}@{host}.tmp",
    }
    assert len(os.listdir(tmp_path)) == 5 and files.remove_leftovers(tmp_path / "none") == []


def test_killed_writer_leaves_what_is_then_removed(tmp_path):
    def write(pipe):
        with files.replace(tmp_path / "x.pt") as temporary:
            with open(temporary, "wb") as f:
                f.write(b"half")
            pipe.send(None)
            time.sleep(60)
    ready, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=write, args=(there,))
    child.start()
    ready.recv()
    assert files.remove_leftovers(tmp_path) == []  # at work
    child.kill()
    child.join()
    assert len(files.remove_leftovers(tmp_path)) == 1 and os.listdir(tmp_path) == []


def test_check_writable(tmp_path):
    files.check_writable(tmp_path / "new" / "deeper" / "x.npz")
    assert os.listdir(tmp_path) == []
    (tmp_path / "x.npz").write_text("data")
    files.check_writable(tmp_path / "x.npz", inputs=["no such file", tmp_path])
    os.symlink("x.npz", tmp_path / "same.npz")
    for path, words, inputs in ((tmp_path, "folder", ()), (tmp_path / "x.npz" / "y", "cannot be written", ()),
                                (tmp_path / "x.npz", "would be replaced", [tmp_path / "same.npz"])):
        with pytest.raises((OSError, ValueError)) as error:
            files.check_writable(path, inputs)
        one_line(error, str(path), words)
    assert (tmp_path / "x.npz").read_text() == "data"


# ---------------------------------------------------------------- the lock

def locked_elsewhere(folder):
    return in_child(lambda: files.lock(folder)) == 1


def test_lock(tmp_path, capfd):
    first = files.lock(tmp_path / "run")
    assert files.lock(tmp_path / "run") is first  # of the same process
    assert locked_elsewhere(tmp_path / "run")
    words = capfd.readouterr().out
    assert str(os.getpid()) in words and "--exp-name" in words and words.count("\n") == 1
    first.close()
    assert not locked_elsewhere(tmp_path / "run")
    files.lock(tmp_path / "run").close()


def test_lock_ends_with_its_process(tmp_path):
    """Killed while a worker that it forked lives on, as data workers do for some seconds."""
    ready, there = multiprocessing.Pipe()

    def run():
        files.lock(tmp_path)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        there.send(worker)
        time.sleep(60)
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    worker = ready.recv()
    try:
        assert locked_elsewhere(tmp_path)
        child.kill()
        child.join()
        os.kill(worker, 0)  # still there
        files.lock(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


# ---------------------------------------------------------------- optimiser states

def test_optimizer_state():
    def optimizer(sizes=(4, 6)):
        parameters = [torch.nn.Parameter(torch.randn(n, 2)) for n in sizes]
        optimizer = torch.optim.AdamW(parameters)
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
        return optimizer
    own, what = optimizer(), "a.pt (opt)"
    files.check_optimizer_state(own, optimizer().state_dict(), what)
    partly = optimizer().state_dict()
    del partly["state"][1]
    files.check_optimizer_state(own, partly, what)

    def broken(change):
        state = optimizer().state_dict()
        change(state)
        return state
    cases = {
        "exp_avg [5, 2] of parameter 1, which is [6, 2]": optimizer((4, 5)).state_dict(),
        "[3] parameters instead of [2]": optimizer((4, 6, 1)).state_dict(),
        "no optimiser state": [],
        "no exp_avg_sq": broken(lambda s: s["state"][0].pop("exp_avg_sq")),
        "a NoneType": broken(lambda s: s["state"].update({1: None})),
        "no step": broken(lambda s: s["state"][0].pop("step")),
        "does not list": broken(lambda s: s["state"].update({7: {}})),
        "no optimiser state (": broken(lambda s: s.update(state=None)),
        "[None] parameters": broken(lambda s: s.update(param_groups=[None])),
    }
    for words, state in cases.items():
        with pytest.raises(ValueError) as error:
            files.check_optimizer_state(own, state, what)
        one_line(error, what, words)


def test_checkpoint_steps(tmp_path):
    for name in (
        "0000100.pt",
        "0000020.pt",
        "12345678.pt",
        "5.pt",
        "a.pt",
        ".0000300.pt.1.tmp",
        "0000001.pt.bak",
    ):
        (tmp_path / name).touch()
    assert (
        files.checkpoint_steps(tmp_path) == [20, 100, 12345678]
        and files.checkpoint_steps(tmp_path / "none") == []
    )


def test_args(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path = str(tmp_path / "checkpoints" / "0000001.pt")
    with pytest.raises(FileNotFoundError, match="args.json"):
        files.training_args({}, path)
    files.save_json({"model": "SiT-B/2"}, tmp_path / "args.json")
    assert files.training_args({}, path) == files.training_args(
        {"args": argparse.Namespace(model="SiT-B/2")}, path
    )
    with pytest.raises(ValueError, match="its args are a list"):
        files.training_args({"args": [1]}, path)
    for text, words in (
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        ("[" * 100000, "not valid JSON"),
        ("\xff", "not valid"),
    ):
        (tmp_path / "args.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError) as error:
            files.training_args({}, path)
        one_line(error, "args.json", words)


# ---------------------------------------------------------------- the downloader

@pytest.fixture
def server(monkeypatch, tmp_path):
    server = loopback.Server(b"the weights, all of them" * 100)
    monkeypatch.setattr(files, "https_session", loopback.sessions(server.server_port))
    monkeypatch.setattr(files, "BACK_OFF", 0.01)
    monkeypatch.setattr(files, "TIMEOUT", (0.2, 0.2))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


@pytest.mark.parametrize(
    "plan, tries",
    [
        (["whole"], 1),
        ([500, 503, "whole"], 3),
        (["cut", "whole"], 2),
        (["stall", "whole"], 2),
        (["close", "silent", "whole"], 3),
        ([429, "redirect", "whole"], 3),
        (["no length"], 1),
    ],
)
def test_download(tmp_path, server, plan, tries):
    server.plan(*plan)
    path = files.download(
        "https://example.org/w.pt", tmp_path / "c" / "w.pt", len(server.body), server.digest[:8]
    )
    assert (
        open(path, "rb").read() == server.body
        and len(server.requests) == tries
        and os.listdir(tmp_path / "c") == ["w.pt"]
    )
    files.download("https://example.org/w.pt", path)  # it is there
    assert len(server.requests) == tries


@pytest.mark.parametrize(
    "plan, tries, words",
    [
        ([500], 3, "HTTP 500; 3 tries"),
        (["cut"], 3, "3 tries"),
        (["stall"], 3, "3 tries"),
        (["close"], 3, "3 tries"),
        (["silent"], 3, "3 tries"),
        (["short"], 3, "3 tries"),
        ([404], 1, "HTTP 404"),
        ([403], 1, "HF_TOKEN"),
        (["wrong"], 1, "sha256"),
        (["long"], 1, "longer than"),
        (["redirect to http"], 1, "not https"),
        (["redirect", "redirect to http"], 2, "not https"),
    ],
)
def test_download_that_fails(tmp_path, server, plan, tries, words):
    server.plan(*plan)
    with pytest.raises((OSError, ValueError)) as error:
        files.download(
            "https://example.org/w.pt", tmp_path / "c" / "w.pt", len(server.body), server.digest
        )
    one_line(error, "https://example.org/w.pt", words)
    assert len(server.requests) == tries and os.listdir(tmp_path / "c") == []


def test_a_killed_download_leaves_nothing_for_ever(tmp_path, server):
    # beyond the largest process id
    (tmp_path / f".w.pt.4194305@{files._host()}.tmp").write_bytes(b"half of it")
    files.download("https://example.org/w.pt", tmp_path / "w.pt")
    assert os.listdir(tmp_path) == ["w.pt"]


def test_cut_without_a_known_size(tmp_path, server):
    server.plan("cut")
    with pytest.raises(OSError, match="3 tries"):
        files.download("https://example.org/w.pt", tmp_path / "w.pt")
    assert os.listdir(tmp_path) == []


def test_https_only(tmp_path):
    with pytest.raises(ValueError, match="only https"):
        files.download("http://example.org/w.pt", tmp_path / "w.pt")


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(OSError) as error:
        files.download("https://127.0.0.1:9/w.pt", tmp_path / "w.pt")
    one_line(error, "without a network put the file at", "w.pt")


def test_hub_file(server, monkeypatch):
    """Size and digest are the hub's word before the redirect; the token goes to the hub alone."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.body, server.digest = b"0", hashlib.sha256(b"0").hexdigest()
    server.plan(500, "whole", "redirect", "whole")
    path = files.hub_file("REPA-E/sdvae", "sdvae-f8d4.pt")
    assert open(path, "rb").read() == b"0" and path == files.cache_path("REPA-E/sdvae", "sdvae-f8d4.pt")
    assert [r[0] for r in server.requests] == ["HEAD", "HEAD", "GET", "GET"]
    assert ["Authorization" in r[2] for r in server.requests] == [True, True, True, False]
    server.body = b"1"
    server.plan("whole")
    with pytest.raises(ValueError, match="sha256"):
        files.hub_file("REPA-E/sdvae", "other.pt")
    assert not os.path.exists(files.cache_path("REPA-E/sdvae", "other.pt"))
