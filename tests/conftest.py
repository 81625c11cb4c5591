"""Shared by all tests: the golden vectors (GOLDEN_DIR, or tests/data/golden), the device, the threads.

torch is imported where it is used: pytest-xdist's controller, which runs no test, need not wait for it.
"""
import functools
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"   # the suite needs no network; the hub's client would try for a minute

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "data" / "golden"))
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(GOLDEN if (GOLDEN / "fill.py").exists() else ROOT / "tests" / "data" / "golden"))

# The longest files, which begin first so that the workers end together.
LONGEST = ("test_train", "test_golden_train", "test_finetune_vae", "test_evaluate", "test_faults",
           "test_recipes", "test_performance", "test_golden_models", "test_sample_ddp")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest-xdist's -n a worker has all tests of a file: what they share is made once, not twice."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, and skips where there is none")


def pytest_collection_finish(session):
    if session.items and not session.config.option.collectonly:
        import processes    # it makes a network small, for all tests
        if any(hasattr(item.module, "processes") for item in session.items):
            processes.begin()


@functools.cache
def machine():
    """(whether there is a GPU, threads of a test: pytest-xdist's workers share the machine)."""
    import torch
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    return torch.cuda.is_available(), max(1, torch.get_num_threads() // workers)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of whole modules too
def pytest_runtest_setup(item):
    """The same number of threads for every test, and the CPU for all but gpu tests.

    The suite compares runs bit by bit and with other processes.
    """
    import torch
    gpu, threads = machine()
    torch.set_num_threads(threads)
    on_gpu = item.get_closest_marker("gpu") is not None
    torch.cuda.is_available = lambda: gpu and on_gpu
    if on_gpu and not gpu:
        pytest.skip("there is no GPU here")


@pytest.fixture
def golden():
    """golden(name) -> (config, tensors): the JSON config of that .npz as a dict, its arrays as tensors."""
    import torch

    def load(name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            config = json.loads(str(file["config"]))
            arrays = {k: file[k] for k in file.files if k != "config"}
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)).reshape(v.shape) if v.dtype.kind != "U"
                   else v.tolist()
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
    import torch

    def check(actual, expected, atol=1e-5, rtol=0.0):
        actual, expected = (torch.as_tensor(v).detach().double() for v in (actual, expected))
        assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
        error = (actual - expected).abs()
        worst = (error - atol - rtol * expected.abs()).max().item() if error.numel() else 0.0
        assert worst <= 0, f"off by {error.max().item():.3g} (tolerance {atol:g} + {rtol:g} relative)"
    return check


@pytest.fixture
def plain_convolutions():
    """torch's own convolutions: oneDNN's round to 1.3e-5 on some CPUs where the tolerance is 1e-5."""
    import torch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            yield
