"""Shared by all tests: the golden vectors (GOLDEN_DIR, or tests/data/golden), the device and the threads."""
import json
import os
import sys
import warnings
from pathlib import Path

import jobs
import numpy as np
import processes
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "data" / "golden"))
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(GOLDEN if (GOLDEN / "fill.py").exists() else ROOT / "tests" / "data" / "golden"))


THREADS, GPU = torch.get_num_threads(), torch.cuda.is_available()


def pytest_addoption(parser):
    parser.addoption("--jobs", type=int, default=1, help="share the test files out among so many processes")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, and skips where there is none")


def begin(session, jobs=1):
    """What a process does before its first test; `jobs` of them share the machine."""
    global THREADS
    THREADS = max(1, THREADS // jobs)
    if any(hasattr(item.module, "processes") for item in session.items):
        processes.begin()


def pytest_runtestloop(session):
    wanted = session.config.option.jobs
    if wanted > 1 and not GPU:  # which a forked process could not use
        return jobs.run(session, lambda: begin(session, wanted))
    if not session.config.option.collectonly:
        begin(session)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of whole modules too
def pytest_runtest_setup(item):
    """The same number of threads for every test (sample_ddp.main leaves one); the CPU for all but gpu tests.

    The suite compares runs bit by bit and with other processes.
    """
    torch.set_num_threads(THREADS)
    on_gpu = item.get_closest_marker("gpu") is not None
    torch.cuda.is_available = lambda: GPU and on_gpu
    if on_gpu and not GPU:
        pytest.skip("there is no GPU here")


@pytest.fixture
def golden():
    """golden(name) -> (config, tensors): the JSON config of that .npz as a dict, its arrays as tensors."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


COUNTED = {}  # FLOPs of the runs so far, by what they depend on
ARITHMETIC = ("vae", "resolution", "model", "num_classes", "encoder", "encoder_depth", "projector",
              "freeze_vae", "train_encoder", "proj_coeff", "vae_align_proj_coeff")


@pytest.fixture(autouse=True)
def flops_counted_once(monkeypatch):
    """Counting a step's FLOPs takes as long as a step, at the start of every run: here once for each kind."""
    import finetune_vae
    import train_repae_e

    def remembered(module, count):
        def step_flops(args, nets, *rest):
            key = (module.__name__, nets.lpips is None, nets.disc is None, len(nets.encoders),
                   *(getattr(args, name, None) for name in ARITHMETIC),
                   *(bool(getattr(args, name, None)) for name in ("latent_cache", "cache_features")))
            if key not in COUNTED:
                COUNTED[key] = count(args, nets, *rest)
            return COUNTED[key]
        return step_flops
    for module, name in ((finetune_vae, "vae_step_flops"), (train_repae_e, "step_flops")):
        monkeypatch.setattr(module, name, remembered(module, getattr(module, name)))
