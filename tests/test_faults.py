"""The quick cases of tests/faults.py, whose own command tries all of them."""
import fault_tools
import faults
import processes  # noqa: F401: its forked-from process begins to import while other tests run


def test_quick_cases(tmp_path, capsys):
    """Of those that need little more than a process each, every third one; of the many about numbers in flags every twelfth."""
    cheap = [case for case in fault_tools.CASES if case.cheap]
    numbers = [case for case in cheap if case.group == "flags"]
    chosen = [case for case in cheap if case.group != "flags"][::3] + numbers[::12]
    failed = faults.run(chosen, tmp_path)
    assert len(chosen) > 60 and not failed, capsys.readouterr().out


def test_a_case_that_does_not_hold_is_found(tmp_path):
    """A harness that finds nothing would say so too."""
    def wrong(tmp, have):
        fault_tools.assert_refused(fault_tools.execute("sample_ddp", ["--cfg-scale", "nan"], tmp, have), ["--num-steps"])
    assert "--cfg-scale" in fault_tools.attempt(fault_tools.Case("made up", "wrong words", wrong), tmp_path / "a", tmp_path)
