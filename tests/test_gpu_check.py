"""tests/gpu_check.py in its short form: one piece for real, one that fails, and what is kept."""
import json

import bench_train
import gpu_check
import pytest
import torch


def test_pieces_run_apart_and_what_is_done_stays(tmp_path, monkeypatch, capsys):
    def check(expected, *flags):
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(["--tiny", "--out", str(tmp_path), *flags])
        assert stop.value.code == expected
        return json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]

    monkeypatch.setitem(gpu_check.PIECES, gpu_check.resume, 0.01)
    monkeypatch.setitem(gpu_check.PIECES, gpu_check.fast, 600)      # a machine busy with other work
    pieces = check(1, "--only", "fast", "resume", "--minutes", "20")
    assert not pieces["resume"]["ok"] and "stopped after" in pieces["resume"]["error"]
    figures = pieces["fast"]["figures"]
    assert pieces["fast"]["ok"] and 0 < figures["utilisation"] < 2
    assert figures["kernels"]["ms"]["convolution"] > 0
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| fast | phases sit_forward |" in text and "| resume | **failed** |" in text
    capsys.readouterr()
    check(1, "--only", "fast", "resume")
    again = capsys.readouterr().out
    assert "fast" not in again and '{"resume": {"ok": false' in again
    check(1, "--only", "resume", "--minutes", "0")
    assert "no time was left for resume" in capsys.readouterr().out


def test_parity_holds_where_both_sides_are_this_cpu():
    assert gpu_check.parity(True)["float32"]["difference"] <= 1e-4


def test_what_a_piece_had_found_stays(tmp_path, monkeypatch):
    """Before it failed, and in front of a warning of C++. A stand-in for the interpreter it runs in."""
    said = tmp_path / "python"
    for code in (1, 0):
        said.write_text("#!/bin/sh\necho '{\"real\": 25.0}'\necho '[W1127 12:00:00 x.cpp:1] full'\n"
                        f"exit {code}\n")
        said.chmod(0o755)
        monkeypatch.setattr(gpu_check.sys, "executable", str(said))
        record = gpu_check.run_piece("fast", 10, True)
        assert record["ok"] == (code == 0) and record["figures"] == {"real": 25.0}
        text = gpu_check.table({"device": "x", "torch": "y", "pieces": {"fast": record}})
        assert ("**failed**" in text) == (code == 1) and "| fast | real | 25 |" in text


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
