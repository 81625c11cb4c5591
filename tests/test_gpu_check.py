"""tests/gpu_check.py in its short form: one piece for real, one that fails, and what is kept."""
import json

import gpu_check
import pytest


def test_pieces_run_apart_and_what_is_done_stays(tmp_path, monkeypatch, capsys):
    def check(expected, *flags):
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(["--tiny", "--out", str(tmp_path), *flags])
        assert stop.value.code == expected
        return json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]

    monkeypatch.setitem(gpu_check.PIECES, gpu_check.resume, 0.01)
    pieces = check(1, "--only", "parity", "resume")
    assert not pieces["resume"]["ok"] and "stopped after" in pieces["resume"]["error"]
    assert pieces["parity"]["ok"] and pieces["parity"]["figures"]["float32"]["difference"] <= 1e-4
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| parity | float32 difference |" in text and "| resume | **failed** |" in text
    capsys.readouterr()
    check(1, "--only", "parity", "resume")
    again = capsys.readouterr().out
    assert "parity" not in again and "resume: FAILED" in again
