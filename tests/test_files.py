"""models/runtime/files.py: atomic writes, damage told from other failures, no foreign code, one lock."""
import argparse
import contextlib
import hashlib
import os
import signal
import struct
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import safetensors.torch
import torch
from torch import nn

from models.runtime import files


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def in_child(work):
    """Exit code of a forked process that runs `work`: 0, or 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CONTENT = {"ema": {"w": torch.arange(3000.0).view(30, 100), "b": torch.zeros(0)}, "steps": 7,
           "args": {"model": "SiT-B/2", "nested": [1, None]}, "half": torch.ones(5, dtype=torch.bfloat16)}


# ---------------------------------------------------------------- reading

def test_save_and_load(tmp_path):
    files.save(CONTENT, tmp_path / "new" / "0000007.pt")
    back = files.load(tmp_path / "new" / "0000007.pt")
    assert torch.equal(back["ema"]["w"], CONTENT["ema"]["w"]) and back["half"].dtype == torch.bfloat16
    assert back["args"] == CONTENT["args"] and back["steps"] == 7
    assert os.listdir(tmp_path / "new") == ["0000007.pt"]
    files.save(CONTENT, tmp_path / "other name.pt")     # the bytes depend on the content alone
    assert (tmp_path / "other name.pt").read_bytes() == (tmp_path / "new" / "0000007.pt").read_bytes()


@pytest.mark.parametrize("zip_format", [True, False])
def test_files_of_others_load(tmp_path, zip_format):
    """What torch.save wrote, in its old format too, with the reference's Namespace."""
    torch.save({**CONTENT, "args": argparse.Namespace(model="SiT-XL/2")}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=zip_format)
    back = files.load(tmp_path / "a.pt")
    assert torch.equal(back["ema"]["w"], CONTENT["ema"]["w"]) and back["args"].model == "SiT-XL/2"


def test_flipped_bits_and_cut_files(tmp_path):
    """A flipped bit is found or has no effect on what is read; a cut file is Damaged."""
    path, state = tmp_path / "a.pt", {"w": torch.full((1000,), 0.5), "steps": 3}
    files.save(state, path)
    whole, found = path.read_bytes(), 0
    tensor = whole.index(struct.pack("<2f", 0.5, 0.5))
    for place in [tensor + 3, *range(0, len(whole), 17)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1:])
        try:
            back = files.load(path)
            assert torch.equal(back["w"], state["w"]) and back["steps"] == 3, place
        except files.Damaged as error:
            assert "\n" not in str(error) and "a.pt" in str(error)
            found += 1
    assert found > 240
    for size in (0, 1, 4, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(files.Damaged) as error:
            files.load(path)
        one_line(error, "a.pt", "another copy")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


class Evaluates:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("kind", [Runs, Evaluates])
def test_no_code_is_run(tmp_path, monkeypatch, zip_format, kind):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": kind(), "w": torch.ones(2)}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=zip_format)
    try:
        content = files.load(tmp_path / "a.pt")
        assert isinstance(content["a"], files.Ignored)
    except ValueError as error:
        assert not isinstance(error, files.Damaged) and "more than tensors" in str(error)
    assert not (tmp_path / "ran").exists()


class Callback:
    pass


def test_foreign_objects_are_ignored(tmp_path):
    """Lightning's checkpoints have a class as a key and numpy scalars next to the weights."""
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {Callback: np.float64(0.5)},
                "x": Callback()}, tmp_path / "a.ckpt")
    content = files.load(tmp_path / "a.ckpt")
    assert torch.equal(content["state_dict"]["w"], torch.ones(2)) and isinstance(content["x"], files.Ignored)


def test_what_is_often_saved_instead_of_weights(tmp_path):
    (tmp_path / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError) as error:
        files.load(tmp_path / "a.pt")
    one_line(error, "a.pt", "Git LFS pointer", "web page")


def test_not_a_dict_or_not_readable(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    for path, kind, words in ((tmp_path / "a.pt", ValueError, "contains a list"),
                              (tmp_path / "none.pt", FileNotFoundError, "No such file")):
        with pytest.raises(kind) as error:
            files.load(path)
        assert not isinstance(error.value, files.Damaged)
        one_line(error, str(path), words)


def test_a_volume_without_mmap(tmp_path, monkeypatch):
    files.save(CONTENT, tmp_path / "a.pt")
    load = torch.load

    def no_mmap(*args, mmap=False, **kwargs):
        if mmap:
            raise RuntimeError("unable to mmap 8192 bytes from file <a.pt>: No such device (19)")
        return load(*args, mmap=mmap, **kwargs)
    monkeypatch.setattr(torch, "load", no_mmap)
    assert torch.equal(files.load(tmp_path / "a.pt")["ema"]["w"], CONTENT["ema"]["w"])


def test_safetensors(tmp_path):
    """Under any name: FLUX's VAE is ae.sft."""
    for name in ("a.safetensors", "ae.sft", "a.bin"):
        safetensors.torch.save_file({"w": torch.arange(10.0)}, tmp_path / name)
        assert torch.equal(files.load(tmp_path / name)["w"], torch.arange(10.0))
    whole = (tmp_path / "a.safetensors").read_bytes()
    for data in (b"", whole[:20], whole[:-1]):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(files.Damaged) as error:
            files.load(tmp_path / "a.safetensors")
        one_line(error, "a.safetensors")


# ---------------------------------------------------------------- weights

def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("0.bias"), "0.bias: missing, expected float [4]"),
    (lambda s: s.update(more=torch.ones(1)), "1 tensors differ, the first is more: float [1], expected none"),
    (lambda s: s.update({"0.weight": torch.ones(4, 2, 1, 1)}), "[4, 2, 1, 1], expected float [4, 3, 1, 1]"),
    (lambda s: s.update({"0.weight": s["0.weight"].to(torch.int8)}), "int8"),
    (lambda s: s.update({"0.weight": 3}), "0.weight: int, expected float")])
def test_weights_that_do_not_fit(change, words):
    state = network().state_dict()
    change(state)
    with pytest.raises(ValueError) as error:
        files.load_weights(network(), state, "a.pt")
    one_line(error, "a.pt", words)


@pytest.mark.parametrize("dtype", files.FLOATS)
def test_weights_of_any_float_type_load(dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in network().state_dict().items()}
    loaded = files.load_weights(network(), state, "a.pt")
    assert torch.equal(loaded[0].weight, state["0.weight"].float())
    assert files.state_digest(loaded) == files.state_digest(loaded.state_dict())


def test_not_finite(tmp_path):
    state = {"opt": {"state": {0: {"exp_avg": torch.zeros(4)}}},
             "ema": [torch.ones(2, 3).bfloat16(), torch.tensor(3)]}
    assert files.first_non_finite(state) is None
    for value in ("nan", "inf", "-inf"):
        state["opt"]["state"][0]["exp_avg"][3] = float(value)
        with pytest.raises(files.NotFinite) as error:
            files.save(state, tmp_path / "0000003.pt")
        one_line(error, "0000003.pt", "not written", "opt.state.0.exp_avg")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- writing

def test_interrupted_and_killed_writes_leave_the_old_file(tmp_path):
    files.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(KeyboardInterrupt), files.replace(tmp_path / "x.pt") as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.pt"]

    def killed():
        with files.replace(tmp_path / "x.pt") as temporary:
            with open(temporary, "wb") as f:
                f.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert in_child(killed) == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    assert torch.equal(files.load(tmp_path / "x.pt")["a"], torch.zeros(2))
    files.remove_temporaries(tmp_path, tmp_path / "none")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_write_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    for name in ("a.npz", "b.npz"):
        files.write_npz(tmp_path / name, iter([images[:2], images[2:]]), images.shape, arr_1=np.arange(5),
                        text="{}")
    with np.load(tmp_path / "a.npz") as back:
        assert np.array_equal(back["arr_0"], images) and back["arr_1"].tolist() == list(range(5))
        assert str(back["text"]) == "{}"
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    members = zipfile.ZipFile(tmp_path / "a.npz").infolist()
    assert all(member.compress_type == zipfile.ZIP_STORED for member in members)


# ---------------------------------------------------------------- the lock

def test_lock(tmp_path, capfd):
    """It ends with its process, though a worker that this forked lives on, as data workers do for seconds."""
    first = files.lock(tmp_path / "run")
    assert in_child(lambda: files.lock(tmp_path / "run")) == 1
    text = capfd.readouterr().out
    assert "another run is at work" in text and text.count("\n") == 1
    first.close()

    def run():
        held = files.lock(tmp_path / "run")     # open to the end
        if (worker := os.fork()) == 0:
            time.sleep(60), os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)
    assert in_child(run) == -signal.SIGKILL
    try:
        assert in_child(lambda: files.lock(tmp_path / "run")) == 0
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


# ---------------------------------------------------------------- fetching

def test_download(tmp_path, monkeypatch):
    """Over https alone, once, and only the file that was meant."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    body, asked = b"the weights", []
    digest = hashlib.sha256(body).hexdigest()

    def get(session, url, **_):
        assert list(session.adapters) == ["https://"]
        asked.append(url)
        return contextlib.nullcontext(SimpleNamespace(raise_for_status=lambda: None,
                                                      iter_content=lambda size: [body[:4], body[4:]]))
    with monkeypatch.context() as patch:
        patch.setattr(requests.Session, "get", get)
        for _ in range(2):
            path = files.download("https://example.org/w", "w.pth", digest[:8])
        assert open(path, "rb").read() == body and asked == ["https://example.org/w"]
        with pytest.raises(ValueError) as error:
            files.download("https://example.org/w", "other.pth", "00000000")
        one_line(error, "https://example.org/w", "00000000")
    monkeypatch.setattr(files, "Retry", lambda *_, **__: 0)
    for url in ("https://127.0.0.1:9/w", "http://127.0.0.1:9/w"):
        with pytest.raises(OSError) as error:
            files.download(url, "other.pth", digest[:8])
        one_line(error, url, "cannot be downloaded", str(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == ["w.pth"]


def test_hub_file(tmp_path, monkeypatch):
    """From the hub's cache; without a network one line that says what helps."""
    monkeypatch.setattr(files, "hf_hub_download", lambda repo, name: f"{tmp_path}/{repo}/{name}")
    assert files.hub_file("REPA-E/sdvae", "a.pt") == f"{tmp_path}/REPA-E/sdvae/a.pt"

    def fail(repo, name):
        raise RuntimeError("no answer\nmore lines")
    monkeypatch.setattr(files, "hf_hub_download", fail)
    with pytest.raises(OSError) as error:
        files.hub_file("REPA-E/sdvae", "a.pt")
    one_line(error, "REPA-E/sdvae/a.pt", "HF_HUB_OFFLINE", "no answer")
