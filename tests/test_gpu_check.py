"""tests/gpu_check.py in its short form: two pieces for real, one that hangs, and what is kept."""
import json

import bench_train
import gpu_check
import pytest
import torch


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """interpreter(script): the pieces are run by a shell script instead of Python, for an import less."""
    def replace(script):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(tmp_path / "python"))
    return replace


def test_pieces_run_apart_and_what_is_done_stays(tmp_path, monkeypatch, capsys, interpreter):
    def check(*flags):
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(["--tiny", "--out", str(tmp_path), *flags])
        assert stop.value.code == 1
        return json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]

    interpreter('case "$*" in *resume*) sleep 60;; esac; echo "{\\"real\\": 25.0}"')
    monkeypatch.setitem(gpu_check.PIECES, gpu_check.resume, 0.1)
    pieces = check("--only", "fast", "resume")
    assert not pieces["resume"]["ok"] and "stopped after" in pieces["resume"]["error"]
    assert pieces["fast"]["ok"] and pieces["fast"]["figures"] == {"real": 25.0}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| fast | real | 25 |" in text and "| resume | **failed** |" in text
    capsys.readouterr()
    check("--only", "fast", "resume")
    again = capsys.readouterr().out
    assert "fast" not in again and '{"resume": {"ok": false' in again
    check("--only", "resume", "--minutes", "0")
    assert "no time was left for resume" in capsys.readouterr().out


def test_what_a_piece_had_found_stays(interpreter):
    """Before it failed, and in front of a warning of C++."""
    interpreter("echo '{\"real\": 25.0}'; echo '[W1127 12:00:00 x.cpp:1] full'; exit 1")
    record = gpu_check.run_piece("fast", 10, True)
    assert not record["ok"] and record["figures"] == {"real": 25.0}


def test_two_pieces_on_this_cpu():
    figures = gpu_check.fast(True)
    assert 0 < figures["utilisation"] < 2 and figures["kernels"]["ms"]["convolution"] > 0
    assert gpu_check.parity(True)["float32"]["difference"] <= 1e-4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")])
def test_a_plain_path_that_does_not_fit_gets_half_the_images(monkeypatch, error):
    class Steps:
        def __init__(self, args, device, plain, compiled):
            self.args, self.seconds, self.losses = args, [], [{"loss": 1.0}]

        def step(self):
            if self.args.batch_size > 8:
                raise error
            self.seconds.append(1.0)
    monkeypatch.setattr(bench_train, "Steps", Steps)
    path, = bench_train.fitting(("plain",), ["--batch-size", "32"], torch.device("cpu"), 3).values()
    assert path.args.batch_size == 8 and path.seconds == [1.0] * 3
    with pytest.raises(RuntimeError):
        bench_train.fitting(("fast",), ["--batch-size", "32"], torch.device("cpu"), 3)
