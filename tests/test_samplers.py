"""Samplers: golden parity, order of convergence, marginals, guidance, draws of (seed, index) alone."""
import doctest
import math
from functools import partial

import pytest
import torch
from fill import fill_

from models import samplers
from models.losses import interpolant
from models.sit import SiT
from models.vae import VAE_models


@pytest.fixture(params=["analytic", "sit"])
def field(request, golden):
    """(config, arrays, velocity, latents, y, eps) of one of the two golden fields."""
    config, g = golden("samplers")
    name = request.param
    if name == "analytic":
        velocity = analytic(config)
    else:
        sit = fill_(SiT(**config["sit"]), salt=config["salt"]).eval().requires_grad_(False)
        def velocity(x, t, y): return sit(x, t, y)[0]
    return name, config, g, velocity, g[f"in.{name}_latents"], g[f"in.{name}_y"], g[f"in.{name}_eps"]


def analytic(config):
    """The network of the analytic field."""
    a, b, c = config["analytic"]
    return lambda x, t, y: a * x + (b * t + c * y.to(x).sin()).view(-1, *[1] * (x.ndim - 1))


def interval(config, on):
    """(cfg_scale, low, high) of the golden runs."""
    return (config["cfg_scale"], config["guidance_low"], config["guidance_high"]) if on else (1.0, 0.0, 1.0)


@pytest.mark.usefixtures("plain_convolutions")
@pytest.mark.parametrize("cfg", ["nocfg", "cfg"])
def test_golden_samplers(field, close, cfg):
    name, config, g, velocity, x, y, eps = field
    velocity = samplers.guided(velocity, y, 1000, *interval(config, cfg == "cfg"))
    euler = samplers.euler(velocity, x, samplers.time_grid(config["euler_steps"]))
    heun = samplers.heun(velocity, x, samplers.time_grid(config["heun_steps"]))
    assert euler.dtype == heun.dtype == torch.float64
    close(euler, g[f"out.{name}_euler_{cfg}"])
    close(heun, g[f"out.{name}_heun_{cfg}"])
    for path_type in ("linear", "cosine"):
        noise = iter(eps)
        sde = samplers.euler_maruyama(velocity, x, samplers.time_grid(config["sde_steps"], "sde"),
                                      lambda: next(noise), partial(interpolant, path_type=path_type))
        close(sde, g[f"out.{name}_sde_{path_type}_{cfg}"])


def test_golden_grids_and_scores(golden, close):
    config, g = golden("samplers")
    for name, mode in (("euler", "ode"), ("heun", "ode"), ("sde", "sde")):
        grid = samplers.time_grid(config[f"{name}_steps"], mode)
        close(torch.tensor(grid, dtype=torch.float64), g[f"out.{name}_t"], atol=0)
        on = [samplers.is_guided(t, *interval(config, True)) for t in grid[:-1]]
        assert on == g[f"out.{name}_guided"].tolist()
    for path_type in ("linear", "cosine"):
        path = partial(interpolant, path_type=path_type)
        score = samplers.score_from_velocity(g["in.score_v"], g["in.score_x"], g["in.score_t"], path)
        close(score, g[f"out.score_{path_type}"])


def exact(config, x, y):
    """Closed form at time 0 of dx/dt = a x + b t + d, d = c sin(y), from x at time 1."""
    a, b, c = config["analytic"]
    d = c * y.double().sin().view(-1, 1, 1, 1)
    def particular(t): return -(b * t + d) / a - b / a**2
    return (x - particular(1)) * math.exp(-a) + particular(0)


def test_orders_of_convergence(golden):
    config, g = golden("samplers")
    x, y = g["in.analytic_latents"].double(), g["in.analytic_y"]
    truth = exact(config, x, y)
    velocity = samplers.guided(analytic(config), y, 1000, dtype=torch.float64)
    for solver, order in ((samplers.euler, 1), (samplers.heun, 2)):
        errors = [(solver(velocity, x, samplers.time_grid(n)) - truth).abs().max().item()
                  for n in (40, 80, 160)]
        for coarse, fine in zip(errors, errors[1:]):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_sde_ends_in_the_data_distribution(path_type):
    """Gaussian data of deviation 0.5 has a closed-form velocity; the SDE must end at 0.5 on both paths."""
    def velocity(x, t):
        var = 0.25
        if path_type == "linear":
            a, s, da, ds = 1 - t, t, -1, 1
        else:
            a, s = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            da, ds = -math.pi / 2 * s, math.pi / 2 * a
        return (a * da * var + s * ds) / (a * a * var + s * s) * x

    g = torch.Generator().manual_seed(0)
    def noise(): return torch.randn(64, 512, generator=g)
    x = samplers.euler_maruyama(velocity, noise(), samplers.time_grid(250, "sde"), noise,
                                partial(interpolant, path_type=path_type))
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_null_rows_run_inside_the_interval_only():
    calls = []

    def network(x, t, y):
        calls.append((t[0].item(), y.tolist()))
        assert x.dtype == t.dtype == torch.float32
        return torch.zeros_like(x)

    x, y = torch.zeros(2, 1), torch.tensor([3, 4])
    samplers.euler(samplers.guided(network, y, 7, 2.0, 0.5, 0.75), x, samplers.time_grid(4))
    assert calls == [(1.0, [3, 4]), (0.75, [3, 4, 7, 7]), (0.5, [3, 4, 7, 7]), (0.25, [3, 4])]
    calls.clear()
    samplers.heun(samplers.guided(network, y, 7, 2.0, 0.6), x, samplers.time_grid(2))
    # the test is on the step's start
    assert calls == [(1.0, [3, 4, 7, 7]), (0.5, [3, 4, 7, 7]), (0.5, [3, 4])]


def test_noise_and_labels_depend_on_seed_and_index_alone():
    whole = samplers.sample_generators(5, range(10))
    parts = samplers.sample_generators(5, [7, 2])
    for _ in range(3):
        a, b = samplers.draw_noise(whole, (2, 4, 4)), samplers.draw_noise(parts, (2, 4, 4))
        assert torch.equal(a[[7, 2]], b)
        assert len({row.sum().item() for row in a}) == 10
    other = samplers.draw_noise(samplers.sample_generators(6, range(10)), (2, 4, 4))
    first = samplers.draw_noise(samplers.sample_generators(5, range(10)), (2, 4, 4))
    assert not torch.isclose(other, first).any(0).all()
    assert first.flatten().std().item() == pytest.approx(1, abs=0.15)
    labels = samplers.sample_labels(5, range(3000), 10)
    assert torch.equal(labels[[9, 4]], samplers.sample_labels(5, [9, 4], 10))
    assert torch.bincount(labels, minlength=10).min() > 220 and not torch.equal(
        labels, samplers.sample_labels(6, range(3000), 10))


def test_label_modes():
    equal = samplers.sample_labels(0, range(30), 10, "equal")
    assert torch.bincount(equal).tolist() == [3] * 10
    assert samplers.sample_labels(0, range(4), 1000, "equal", [207, 360]).tolist() == [207, 360, 207, 360]
    assert set(samplers.sample_labels(0, range(50), 1000, "random", [207, 360]).tolist()) == {207, 360}


def test_decode_and_uint8():
    scale, bias = torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0])
    x = torch.arange(10.0).view(5, 2, 1, 1)
    z = samplers.decode(lambda z: z, x, scale, bias, chunk=2)
    assert torch.equal(z, torch.stack([x[:, 0] / 2 + 1, x[:, 1] / 4 - 1], 1))
    pixels = torch.tensor([-3, -1, -0.999, 0, 0.999, 1, 3]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert samplers.truncate_to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_the_docstrings_example():
    """As it stands, with tiny networks."""
    torch.manual_seed(0)
    sit = SiT(input_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2, encoder_depth=1,
              z_dims=()).eval()
    vae = VAE_models["f4d4"]().eval()
    names = vars(samplers) | {"sit": sit, "vae": vae, "interpolant": interpolant}
    test, = doctest.DocTestFinder(recurse=False).find(samplers, "samplers", globs=names)
    with torch.no_grad():
        result = doctest.DocTestRunner().run(test, clear_globs=False)
    assert (result.attempted, result.failed) == (7, 0)
    assert test.globs["images"].shape == (8, 32, 32, 3) and test.globs["images"].dtype == torch.uint8
    linear = "lambda t: (1 - t, t, -torch.ones_like(t), torch.ones_like(t))"
    assert linear in samplers.__doc__
