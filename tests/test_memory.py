"""The counted memory of a training step must not grow unnoticed."""
import functools
from types import SimpleNamespace

import bench_train
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_repae_e as train
from models import lpips, vae
from models.runtime import memory
from models.runtime.flops import step_flops

pytestmark = pytest.mark.skipif(not memory.countable(),
                                reason="before torch 2.10 the count needs a GPU's driver")
SMALL = ("--preset", "demo", "--resolution", "64", "--model", "SiT-Ti/4", "--batch-size", "16",
         "--perceptual-weight", "1", "--disc-weight", "0.1", "--mixed-precision", "bf16")


def test_a_tensor_counts_once_and_until_it_is_freed():
    with memory.Count() as count:
        x = torch.zeros(1000, 1000)
        y = x.view(-1)
        assert count.now == count.peak == -(-4_000_000 // 512) * 512
        del x
        assert count.now > 0
        del y
        assert count.now == 0 and count.peak > 0


def test_what_is_kept_and_freed_by_a_backward_pass():
    """exp keeps its result: after k of them k + 1 tensors live; in the end the leaf and its gradient do."""
    size = 2 ** 20
    with memory.Count() as count:
        leaf = torch.zeros(size // 4, requires_grad=True)
        x = leaf
        for _ in range(5):
            x = x.exp()
        assert count.now == 6 * size
        loss = x.sum()
        del x
        loss.backward()
        assert leaf.grad.shape == leaf.shape
        assert 6 * size <= count.peak <= 8 * size + 4096
        assert 2 * size <= count.now <= 2 * size + 4096


def test_gradients_go_where_autograd_sends_them():
    with memory.Count():
        a, b, c = (torch.zeros(3, 4, requires_grad=True) for _ in range(3))
        (grad,) = torch.autograd.grad(((a @ b.mT) @ c[:, :1].expand(3, 2)).sum(), b)
        assert grad.shape == b.shape and a.grad is None and b.grad is None
        (a * b.sum(0)).sum().backward()
        assert a.grad.shape == b.grad.shape == (3, 4) and c.grad is None


def test_lpips_takes_the_memory_of_a_few_images():
    peaks = []
    for batch in (8, 32):
        with memory.Count() as count:
            net, images = lpips.LPIPS(), torch.zeros(batch, 3, 64, 64)
            recon = torch.zeros_like(images).requires_grad_()
            before = count.now
            count.reset_peak()
            net(images, recon).mean().backward()
            peaks.append(count.peak - before)
    assert peaks[1] < 1.3 * peaks[0]


# Settings and the GiB per GPU that were counted for them; a change that adds 5 % fails.
PAPER = ("--preset", "sdvae", "--batch-size", "32")
COUNTED = {(): 0.318, ("--grad-checkpoint",): 0.308, ("--gradient-accumulation-steps", "2"): 0.293}


def check_peak(count, expected):
    assert 0.95 * expected < count.peak / memory.GIB < 1.05 * expected
    assert sum(count.at_peak.values()) == count.peak == max(count.phases.values())


@pytest.fixture(scope="module")
def small():
    """small(*flags) -> the Count of a small step; each is counted once."""
    training_peak = memory.training_peak  # which a test may replace

    @functools.cache
    def count(*flags):
        return training_peak(bench_train.settings(*SMALL, *flags), train.build_blank, train.blank_step)
    return count


def test_the_papers_step_takes_no_more_memory_than_it_did():
    count = bench_train.count_memory(bench_train.settings(*PAPER))
    check_peak(count, 25.9)
    assert {"VAE", "weights", "EMA"} <= set(count.at_peak) and "DDP's buckets" not in count.at_peak


def test_the_flops_of_the_papers_step_are_right_to_two_percent():
    """Against torch's count of every operation of a whole step, forward and backward."""
    found, args = {}, bench_train.settings(*PAPER)

    def step(nets, args, images, labels):
        with FlopCounterMode(display=False) as counter:
            train.blank_step(nets, args, images, labels)
        own = SimpleNamespace(sit=nets.sit, encoders=nets.encoders, lpips=nets.lpips, disc=nets.disc)
        found.update(counted=counter.get_total_flops() / 32, nets=own, vae=nets.vae)

    memory.training_peak(args, train.build_blank, step)
    nets = found["nets"]
    stated = step_flops(args, nets, lambda: train.build_sit(args, found["vae"], nets.encoders))
    assert found["counted"] == pytest.approx(stated, rel=0.02)


def test_eight_gpus_of_24_gib_take_the_papers_step():
    flags = ("--batch-size", str(8 * 32), "--grad-checkpoint", "--shard-optimizer")
    count = bench_train.count_memory(bench_train.settings(*PAPER, *flags), world_size=8)
    check_peak(count, 16.8)
    whole = 2.866  # GiB of the gradients, which lie in the buckets; AdamW's moments are twice that
    assert count.at_peak["DDP's buckets"] / memory.GIB == pytest.approx(whole, rel=0.01)
    assert count.at_peak["optimisers' states"] / memory.GIB == pytest.approx(2 * whole / 8, rel=0.05)


@pytest.mark.parametrize("flags", COUNTED)
def test_a_small_step_takes_no_more_memory_than_it_did(small, flags):
    check_peak(small(*flags), COUNTED[flags])


def test_a_change_that_adds_a_tenth_is_noticed(monkeypatch):
    real, more = train.vae_losses, int(0.1 * COUNTED[()] * memory.GIB)

    def heavier(nets, args, part):
        part.kept = torch.zeros(more, dtype=torch.uint8)
        return real(nets, args, part)
    monkeypatch.setattr(train, "vae_losses", heavier)
    with pytest.raises(AssertionError):
        check_peak(bench_train.count_memory(bench_train.settings(*SMALL)), COUNTED[()])


def test_a_frozen_run_with_caches_has_no_vae_and_no_images_on_the_gpu():
    counts, seen = [], []

    def step(nets, args, images, labels):
        train.blank_step(nets, args, images, labels)
        seen.append(any(p.is_cuda for p in nets.vae.parameters()))
    for caches in ((), ("--latent-cache", "x", "--cache-features", "y")):
        args = bench_train.settings(*SMALL, "--freeze-vae", *caches)
        counts.append(memory.training_peak(args, train.build_blank, step))
    assert seen == [True, False]
    size = sum(p.numel() * 4 for p in vae.VAE_models["f4d4"]().parameters())
    assert counts[0].at_peak["weights"] - counts[1].at_peak["weights"] >= size
    images = 16 * 3 * 64 * 64 * 5  # as bytes and as float32
    assert counts[0].at_peak["other"] - counts[1].at_peak["other"] >= images


def test_a_dry_run_says_where_it_fits_and_a_remedy(small, monkeypatch):
    def training_peak(args, *_):
        flags = ("--grad-checkpoint",) if args.grad_checkpoint else ()
        parts = args.gradient_accumulation_steps
        return small(*flags, *(("--gradient-accumulation-steps", str(parts)) if parts > 1 else ()))
    monkeypatch.setattr(memory, "training_peak", training_peak)
    monkeypatch.setattr(memory, "SIZES", (0.3, 1))
    monkeypatch.setattr(memory, "BESIDE", 0.0)
    args = bench_train.settings(*SMALL)
    text = memory.forecast(args, train.build_blank, train.blank_step)
    assert "1 x 16 images" in text and "GiB  VAE" in text and "by phase: VAE forward" in text
    assert "GPUs of 1 GiB: fits" in text and "add --grad-checkpoint --gradient-accumulation-steps 2" in text
    monkeypatch.setattr(memory, "countable", lambda: False)
    assert "needs a GPU for it" in memory.forecast(args, train.build_blank, train.blank_step)


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_a_residual_block_keeps_two_tensors_compiled_or_not(backend):
    """Its input and what lies between its convolutions; as one graph, cut as the default backend cuts it."""
    block = vae.ResnetBlock(64, 64)
    x = torch.randn(2, 64, 16, 16).bfloat16().requires_grad_()
    if backend is not None:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    own, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert 2 <= sum(size for size, _ in kept.values()) / (2 * x.numel()) < 2.5
