"""tests/gpu_check.py in its short form: one piece for real, one that fails, and what is kept."""
import json

import bench_train
import gpu_check
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.runtime import flops


def test_pieces_run_apart_and_what_is_done_stays(tmp_path, monkeypatch, capsys):
    def check(expected, *flags):
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(["--tiny", "--out", str(tmp_path), *flags])
        assert stop.value.code == expected
        return json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]

    monkeypatch.setitem(gpu_check.PIECES, gpu_check.resume, 0.01)
    monkeypatch.setitem(gpu_check.PIECES, gpu_check.parity, 600)      # a machine busy with other work
    pieces = check(1, "--only", "parity", "resume")
    assert not pieces["resume"]["ok"] and "stopped after" in pieces["resume"]["error"]
    assert pieces["parity"]["ok"] and pieces["parity"]["figures"]["float32"]["difference"] <= 1e-4
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| parity | float32 difference |" in text and "| resume | **failed** |" in text
    capsys.readouterr()
    check(1, "--only", "parity", "resume")
    again = capsys.readouterr().out
    assert "parity" not in again and "resume ... FAILED" in again
    check(1, "--only", "resume", "--minutes", "0")
    assert "no time was left for resume" in capsys.readouterr().out


def test_what_a_piece_had_found_before_it_failed_stays(tmp_path, monkeypatch):
    """A stand-in for the interpreter that a piece runs in."""
    said = tmp_path / "python"
    said.write_text("#!/bin/sh\necho '{\"default\": {\"real\": 25.0}}'\necho out of memory\nexit 1\n")
    said.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(said))
    record = gpu_check.run_piece("counted_memory", 10, True)
    assert not record["ok"] and "out of memory" in record["error"]
    text = gpu_check.table({"device": "x", "torch": "y", "pieces": {"counted_memory": record}})
    assert "| counted_memory | **failed** |" in text and "| counted_memory | default real | 25 |" in text


def test_a_plain_path_that_does_not_fit_gets_half_the_images(monkeypatch):
    class Steps:
        def __init__(self, args, device, plain, compiled):
            self.args, self.seconds, self.losses = args, [], [{"loss": 1.0}]

        def step(self):
            if self.args.batch_size > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.seconds.append(1.0)
    monkeypatch.setattr(bench_train, "Steps", Steps)
    path, = bench_train.fitting(("plain",), ["--batch-size", "32"], torch.device("cpu"), 3).values()
    assert path.args.batch_size == 8 and path.seconds == [1.0] * 3
    with pytest.raises(torch.OutOfMemoryError):
        bench_train.fitting(("fast",), ["--batch-size", "32"], torch.device("cpu"), 3)
    report = {"fast": {"batch_size": 32}, "plain": {"batch_size": 8}}
    done = {"fast": ([1.0, 1.0], [{"loss": 1.0}]), "plain": ([0.5, 0.5], [{"loss": 9.0}])}
    assert bench_train.against_fast(done, report) == {"speedup_over_plain_eager": 2.0}


def test_the_rate_of_the_device_is_that_of_torchs_own_count(monkeypatch):
    """With a clock that goes on by a second at each look."""
    clock = iter(range(1000))
    monkeypatch.setattr(flops.time, "perf_counter", lambda: float(next(clock)))
    with FlopCounterMode(display=False) as counter:
        rate = flops.matmul_rate(torch.device("cpu"), torch.float32)
    assert rate == counter.get_total_flops() / 4  # of four products
