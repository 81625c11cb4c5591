"""The quick cases of tests/faults.py, whose own command tries all of them."""
import faults
import pytest


@pytest.fixture(scope="module")
def base():
    with faults.world() as folder:
        yield folder


@pytest.mark.parametrize("case", [c for c in faults.CASES if c.quick], ids=lambda c: f"{c.group}: {c.name}")
def test_quick_case(base, case):
    assert faults.attempt(case, base) is None


def test_a_case_that_does_not_hold_is_found(base):
    """A harness that finds nothing would say so too."""
    def wrong(tmp):
        faults.assert_rejected(faults.execute("sample_ddp", ["--cfg-scale", "nan"], tmp), "--num-steps")
    case = faults.SimpleNamespace(group="made up", name="wrong words", run=wrong)
    assert "--cfg-scale" in faults.attempt(case, base)
