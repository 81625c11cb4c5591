"""Shared by all tests: the golden vectors (GOLDEN_DIR, or the copy in tests/data/golden) and one thread per process."""
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "data" / "golden"))
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(GOLDEN if (GOLDEN / "fill.py").exists() else ROOT / "tests" / "data" / "golden"))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, and skips where there is none")
    import processes  # found only now: sys.path holds the root since the lines above
    processes.begin()


@pytest.fixture
def golden():
    """golden(name) -> (config, tensors): the npz of that name, its JSON config as a dict and its arrays as tensors."""
    def load(name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            config = json.loads(str(file["config"]))
            arrays = {k: file[k] for k in file.files if k != "config"}
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)).reshape(v.shape) if v.dtype.kind != "U" else v.tolist()
                   for k, v in arrays.items()}
        return config, tensors
    return load


@pytest.fixture
def golden_json():
    """golden_json(name) -> the parsed JSON file of that name."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture
def close():
    """close(actual, expected, atol, rtol=0): assert with the largest difference in the message."""
    def check(actual, expected, atol=1e-5, rtol=0.0):
        actual, expected = (torch.as_tensor(v).detach().double() for v in (actual, expected))
        assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
        error = (actual - expected).abs()
        worst = (error - atol - rtol * expected.abs()).max().item() if error.numel() else 0.0
        assert worst <= 0, f"off by {error.max().item():.3g} (tolerance {atol:g} + {rtol:g} relative)"
    return check


@pytest.fixture
def plain_convolutions():
    """torch's own convolutions instead of oneDNN's, which on some CPUs round to 1.3e-5 where the tolerance is 1e-5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """The suite compares runs bit by bit and with other processes: it stays on the CPU where there is a GPU too, but for the
    tests marked gpu."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


@pytest.fixture(autouse=True)
def threads():
    """Every test starts with the same number of threads; sample_ddp.main leaves one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
