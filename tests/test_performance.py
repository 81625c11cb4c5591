"""What makes the step fast or small must not change its numbers."""
import argparse

import bench_train
import pytest
import torch

import train_repae_e as train
from models import encoders, lpips, pretrained, training, vae
from test_train import TINY, tiny_batch, tiny_nets


def gradients(*flags):
    nets, args = tiny_nets("--disc-start", "0", "--max-grad-norm", "1e9", *flags)
    nets.opts = {}  # keep the gradients
    metrics, _ = train.train_step(nets, args, tiny_batch(nets, args))
    return metrics, {f"{name}.{k}": p.grad for name in nets.trained for k, p in getattr(nets, name).named_parameters()}


@pytest.mark.parametrize("flags", [["--grad-checkpoint"], ["--grad-checkpoint", "--gradient-accumulation-steps", "2"]])
def test_recomputation_keeps_all_gradients(flags):
    (values, expected), (others, actual) = gradients(), gradients(*flags)
    for name, value in values.items():
        assert others[name].item() == pytest.approx(value.item(), abs=1e-5, rel=1e-5), name
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_recomputation_keeps_less_for_the_backward_pass():
    def kept(save_memory):
        torch.manual_seed(0)
        net = vae.VAE_models["f4d4"]()
        if save_memory:
            net.save_memory()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(torch.zeros(1, 3, 32, 32))[2].sum()
        return sum(sizes)
    assert kept(True) < 0.6 * kept(False)


@pytest.fixture
def plain_path(monkeypatch):
    """Lets bench_train replace parts of the step for the length of one test."""
    for owner, name in ((train, "proj_loss"), (train, "load_encoders"), (training, "update_ema"), (training, "guarded_updates"),
                        (vae.GroupNorm, "forward"), (vae.AttnBlock, "forward"), (lpips.LPIPS, "layer_terms"), (pretrained, "lpips"),
                        (encoders, "load_weights")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def losses(plain, steps, *flags):
    mine = argparse.Namespace(plain=False)
    args = bench_train.settings(mine, [*TINY, "--disc-weight", "0", "--batch-size", "2", *flags])
    nets = bench_train.build(args, torch.device("cpu"))
    if plain:
        bench_train.make_plain(nets, args)
    return bench_train.measure(nets, args, steps - 2, plain)[1]


def test_twenty_steps_of_the_fast_and_the_plain_path_agree(plain_path):
    """At a small learning rate: Adam's first steps are signs of gradients and would make noise of rounding."""
    fast = losses(False, 20, "--learning-rate", "1e-5")
    plain = losses(True, 20, "--learning-rate", "1e-5")
    assert len(fast) == len(plain) == 20
    for k, (a, b) in enumerate(zip(fast, plain)):
        for name in a:
            if name.endswith("loss"):
                assert a[name] == pytest.approx(b[name], abs=1e-4), (k, name)


def test_compiled_blocks_give_the_same_step(monkeypatch):
    """Traced and differentiated by the compiler; without its code generator, which takes minutes on a CPU."""
    flags = ("--disc-weight", "0", "--batch-size", "2")
    nets, args = tiny_nets(*flags)
    expected, _ = train.train_step(nets, args, tiny_batch(nets, args))
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compiled.append(self) or real(self, backend="aot_eager", **more))
    nets, args = tiny_nets(*flags, "--compile")
    actual, _ = train.train_step(nets, args, tiny_batch(nets, args))
    assert len(compiled) > 12
    for name, value in expected.items():
        assert actual[name].item() == pytest.approx(value.item(), abs=1e-5, rel=1e-5), name
