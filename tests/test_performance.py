"""What makes the step fast or small must not change its numbers."""
import copy

import bench_train
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train_repae_e as train
from models import vae
from models.runtime import trainer
from test_train import TINY, tiny_batch, tiny_nets


def kept_for_backward(net, images):
    """Numbers that a forward pass keeps, the parameters left out."""
    sizes, own = [], {p.data_ptr() for p in net.parameters()}

    def pack(t):
        sizes.append(0 if t.data_ptr() in own else t.numel())
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(images)[2].sum()
    return sum(sizes)


def test_less_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(vae, "LARGE", 16 * 16)
    net, images = vae.VAE_models["f4d4"](), torch.zeros(4, 3, 32, 32)
    usual = kept_for_backward(net, images)
    net.save_memory()
    assert kept_for_backward(net, images) < 0.75 * usual
    monkeypatch.setattr(vae, "norm_silu_conv", bench_train.PLAIN[vae, "norm_silu_conv"])
    assert usual < 0.6 * kept_for_backward(vae.VAE_models["f4d4"](), images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_norm_silu_conv_is_its_parts_to_the_bit(dtype, memory_format, frozen):
    torch.manual_seed(0)
    norm, conv = vae.GroupNorm(64), torch.nn.Conv2d(64, 32, 3, padding=1)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    norm.requires_grad_(not frozen), conv.requires_grad_(not frozen)
    x = (torch.randn(2, 64, 8, 8) + 1).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    inputs = [x] if frozen else [x, *norm.parameters(), *conv.parameters()]
    results = []
    for function in (vae.norm_silu_conv, lambda norm, conv, x: conv(torch.nn.functional.silu(norm(x)))):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with autocast, FlopCounterMode(display=False) as flops:
            y = function(norm, conv, x)
            y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in inputs), torch.tensor(flops.get_total_flops())])
        for leaf in inputs:
            leaf.grad = None
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("rounded", [False, True])
def test_group_norm_keeps_the_type_and_takes_its_statistics_in_float32(rounded, monkeypatch):
    """Before torch 2.13 CUDA's kernel rounds them to the type of its input: there it gets a float32 copy."""
    monkeypatch.setattr(vae, "ROUNDED_STATISTICS", rounded)
    seen, real = [], torch.nn.functional.group_norm

    def group_norm(x, *more):
        seen.append(x.dtype)
        return real(x, *more)
    monkeypatch.setattr(torch.nn.functional, "group_norm", group_norm)
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            norm, x = vae.GroupNorm(64), torch.empty(2, 64, 8, 8)
        for dtype in (torch.bfloat16, torch.float32):
            assert norm(x.to(dtype)).dtype == dtype
    assert seen == [torch.float32 if rounded else torch.bfloat16, torch.float32]


def check_group_norm(device):
    """Of a mean far above the deviation, where a mean rounded to bf16 would be off by half a deviation."""
    torch.manual_seed(0)
    x = (torch.randn(2, 64, 32, 32) + 100).bfloat16()
    with torch.no_grad():
        y = vae.GroupNorm(64).to(device)(x.to(device)).double().cpu()
    groups = x.double().view(2, 16, -1)
    expected = (groups - groups.mean(2, keepdim=True)) / groups.std(2, correction=0, keepdim=True)
    torch.testing.assert_close(y, expected.view_as(y), rtol=2 ** -8, atol=0.02)


def test_group_norm_of_bf16_is_right():
    check_group_norm("cpu")


@pytest.mark.gpu
def test_group_norm_of_bf16_is_right_on_a_gpu():
    check_group_norm("cuda")


def make_steps(plain, number, *flags):
    """At a small learning rate: Adam's first steps are signs of gradients, which turn rounding to noise."""
    args = bench_train.settings(*TINY, "--batch-size", "2", "--learning-rate", "1e-5", "--vae-learning-rate",
                                  "1e-5", "--disc-learning-rate", "1e-5", "--ema-decay", "0.5", *flags)
    path = bench_train.Steps(args, torch.device("cpu"), plain)
    for _ in range(number):
        path.step()
    return path


@pytest.fixture(scope="module")
def fast():
    return make_steps(False, 8, "--disc-weight", "0")


def test_the_fast_and_the_plain_path_agree(fast):
    plain = make_steps(True, 8, "--disc-weight", "0")
    for name, value in plain.nets.ema.state_dict().items():
        torch.testing.assert_close(fast.nets.ema.state_dict()[name], value, atol=1e-4, rtol=1e-4, msg=name)
    for k, (a, b) in enumerate(zip(fast.losses, plain.losses, strict=True)):
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-4), (k, name)


def test_bf16_stays_within_two_percent_of_float32(fast):
    bf16 = make_steps(False, 8, "--disc-weight", "0", "--mixed-precision", "bf16")
    for k, (a, b) in enumerate(zip(bf16.losses, fast.losses, strict=True)):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=0.02, abs=1e-3), (k, name)


def test_a_step_reads_nothing_on_the_host(monkeypatch):
    """item(), bool(), int() and masks show in the trace, the rest is forbidden; each would wait for a GPU."""
    nets, args = tiny_nets("--disc-start", "0")
    batch = tiny_batch(nets, args)
    train.train_step(nets, args, batch)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as trace, monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"a step calls {name}()"))
        train.train_step(nets, args, batch)
    reads = [e for e in trace.events() if e.name in ("aten::_local_scalar_dense", "aten::nonzero",
                                                     "aten::masked_select")]
    parents = {e.cpu_parent.cpu_parent.name if e.cpu_parent and e.cpu_parent.cpu_parent else e.name
               for e in reads}
    # reads its count of steps in the CPU's kernel, and not in the GPU's
    assert parents <= {"aten::_fused_adamw_"}


@pytest.mark.gpu
def test_a_step_waits_for_nothing_on_a_gpu():
    path = bench_train.Steps(bench_train.settings(*TINY), torch.device("cuda"), False)
    for _ in range(3):
        path.step()
    batch = train.make_batch(path.nets, path.args, 1, path.images, path.labels)
    torch.cuda.synchronize()
    with torch.profiler.profile() as trace:
        train.train_step(path.nets, path.args, batch)
    names = {event.name for event in trace.events()}
    assert "cudaLaunchKernel" in names
    assert not [n for n in names if "StreamSynchronize" in n or "DtoH" in n]


def test_optimiser_state_follows_the_memory_format():
    """A run begun without --compile goes on with it: moments are laid out anew, each with its own weights."""
    def steps(net, optimizer, number):
        for k in range(number):
            net(torch.linspace(-1, 1, 2 * 3 * 25).view(2, 3, 5, 5) * (k + 1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    args = train.parse_args(["--learning-rate", "0.1"])
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3)
    optimizer = trainer.adamw(net.parameters(), args, 0.1)
    steps(net, optimizer, 2)
    other = copy.deepcopy(net)
    other.to(memory_format=torch.channels_last)
    resumed = trainer.adamw(other.parameters(), args, 0.1)
    trainer.load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
    steps(net, optimizer, 2), steps(other, resumed, 2)
    torch.testing.assert_close(other.weight, net.weight, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process(monkeypatch):
    """A process group of one, in which the networks are in DistributedDataParallel nevertheless."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(trainer, "wrap_ddp", lambda net, _: torch.nn.parallel.DistributedDataParallel(
        net, broadcast_buffers=False, gradient_as_bucket_view=True))
    yield
    torch.distributed.destroy_process_group()


def test_every_kind_of_block_is_compiled_once(monkeypatch, one_process):
    """Without a graph break, never again after the first step, in DistributedDataParallel, and the step stays
    the same. Traced and differentiated by the compiler; without its code generator, which takes minutes.

    A few graphs for the VAE's 9 blocks (by width and resolution), its attention, the ends of its encoder and
    decoder, and the SiT's 4 blocks (learning, and frozen for the alignment; the first of them sees an input
    without gradient). Accumulation runs the VAE with and without a graph.
    """
    flags = ("--disc-weight", "0", "--batch-size", "2", "--gradient-accumulation-steps", "2",
             "--grad-checkpoint", "--mixed-precision", "bf16")
    monkeypatch.setattr(vae, "LARGE", 16 * 16)
    monkeypatch.setattr(vae, "CHUNK", 16 * 16)
    nets, args = tiny_nets(*flags)
    expected, _ = train.train_step(nets, args, tiny_batch(nets, args))
    graphs, real, aot_eager = [], torch.compile, torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    monkeypatch.setattr(torch, "compile",   # which Module.compile calls
                        lambda function, **more: real(function, **more, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    nets, args = tiny_nets(*flags, "--compile")
    counts = []
    for _ in range(3):
        actual, _ = train.train_step(nets, args, tiny_batch(nets, args))
        counts.append(len(graphs))
        if len(counts) == 1:
            for name, value in expected.items():    # bfloat16 rounds; in float32 they agree to 1e-5
                assert actual[name].item() == pytest.approx(value.item(), abs=1e-3, rel=1e-2), name
    assert counts == [18] * 3
    # the average is not compiled: precision flags of an evaluation would compile it anew
    with torch.no_grad():
        nets.ema(torch.zeros_like(tiny_batch(nets, args).noise), torch.zeros(2),
                 torch.zeros(2, dtype=torch.long))
    assert len(graphs) == 18
