"""Samplers: from noise (t = 1) to latents (t = 0) along a network's velocity. Needs torch only.

Guidance is a closure around the network, and a solver takes any velocity and a grid of times:

    >>> shape, indices = (4, 8, 8), range(8)
    >>> generators = sample_generators(seed=0, indices=indices)
    >>> def noise():
    ...     return draw_noise(generators, shape)
    >>> y = sample_labels(seed=0, indices=indices, num_classes=1000)
    >>> velocity = guided(lambda x, t, y: sit(x, t, y)[0], y, null_label=1000, cfg_scale=2.2, high=0.65)
    >>> x = euler_maruyama(velocity, noise(), time_grid(250, "sde"), noise, interpolant)
    >>> images = truncate_to_uint8(decode(vae.decode, x.float(), *sit.latents_stats()))

Here `sit` and `vae` are trained networks and `interpolant` is models/losses.py's, or for the paper's linear
path just lambda t: (1 - t, t, -torch.ones_like(t), torch.ones_like(t)).

A solver is a function (velocity, x, times, ...) -> x:

    velocity   function (x [B, ...] float64, t float) -> v [B, ...] float64, the dx_t/dt of
               x_t = alpha(t) x_0 + sigma(t) eps; heun passes a third argument, see `guided`
    x          [B, ...] standard normal, the state at times[0]
    times      floats, descending; from 1 to 0 for a whole trajectory
    returns    [B, ...] float64, the state at times[-1]; at time 0 these are normalised latents, see `decode`

The state is kept in float64 whatever the network computes in, as in the reference implementation.
"""
import hashlib
import math
from itertools import pairwise

import torch


# ---------------------------------------------------------------- guidance

def check_guidance(cfg_scale, low, high):
    """Raises ValueError unless cfg_scale is finite and at least 1, and 0 <= low <= high <= 1."""
    if not (math.isfinite(cfg_scale) and cfg_scale >= 1):
        raise ValueError(f"cfg scale {cfg_scale} is below 1; 1 means no guidance")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval [{low}, {high}] must satisfy 0 <= low <= high <= 1")


def is_guided(t, cfg_scale, low, high):
    """Whether there is guidance at time t (float): cfg_scale > 1 and low <= t <= high, both ends included."""
    return cfg_scale > 1 and low <= t <= high


def guided(network, y, null_label, cfg_scale=1.0, low=0.0, high=1.0, dtype=torch.float32):
    """velocity(x, t) of a network under classifier-free guidance in an interval of times.

    v = v_null + cfg_scale (v_label - v_null) at times `is_guided`; at others v_label alone, which costs half.
    Guidance: arXiv 2207.12598; the interval: arXiv 2404.07724.

    Args:
        network: function (x [N, ...], t [N], y [N]) -> v [N, ...]; x and t come in `dtype`.
        y: labels [B]; null_label: the label of no class, which is num_classes in the models here.

    velocity(x, t, at): `at` (float, by default t) is the time that decides about guidance. Heun's method
    gives the step's start for both of its calls: a velocity that jumps inside a step would cost it its order.
    """
    check_guidance(cfg_scale, low, high)

    def velocity(x, t, at=None):
        on = is_guided(t if at is None else at, cfg_scale, low, high)
        x, t = x.to(dtype), x.new_full((len(x),), t, dtype=dtype)
        if not on:
            return network(x, t, y).double()
        # One batch of 2B rows instead of two of B: the halves see the same kernels.
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_label)]))
        v_label, v_null = both.double().chunk(2)
        return v_null + cfg_scale * (v_label - v_null)

    return velocity


# ---------------------------------------------------------------- solvers

def time_grid(num_steps, mode="ode"):
    """num_steps + 1 times (floats) from 1 to 0. "ode": equally spaced; "sde": num_steps equally spaced from 1
    to 0.04, then 0. The last step has the reference's length: near the data the SDE's drift is stiff."""
    if mode == "ode":
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    return torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist() + [0.0]


def euler(velocity, x, times):
    """Probability-flow ODE by Euler's method (order 1); one call of the velocity per step."""
    x = x.double()
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity, x, times):
    """Probability-flow ODE by Heun's method (order 2): the mean of the velocities at the step's start and at
    Euler's prediction of its end. The step to time 0 stays Euler's, as in EDM (arXiv 2206.00364). Two calls
    per step, one in that to 0."""
    x = x.double()
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        x_next = x + (t_next - t) * v
        if t_next > 0:
            # Guided if the step's start is: both calls, or neither.
            v_next = velocity(x_next, t_next, t)
            x_next = x + (t_next - t) * 0.5 * (v + v_next)
        x = x_next
    return x


def score_from_velocity(v, x, t, interpolant):
    """Score grad_x log p_t(x) from the velocity (SiT, arXiv 2401.08740, section 2):

    s = ((alpha/alpha') v - x) / (sigma^2 - (alpha/alpha') sigma' sigma), for the linear path -(x + (1-t) v) /
    t. v, x [B, ...] and t [B] in (0, 1], all computed in float64; `interpolant`: function t -> (alpha, sigma,
    alpha', sigma'), each of the shape of t.
    """
    alpha, sigma, d_alpha, d_sigma = interpolant(t.double().view(-1, *[1] * (x.ndim - 1)))
    ratio = alpha / d_alpha
    return (ratio * v.double() - x.double()) / (sigma**2 - ratio * d_sigma * sigma)


def euler_maruyama(velocity, x, times, noise, interpolant):
    """Reverse SDE with diffusion w(t) = 2t by Euler-Maruyama: the paper's sampler. One call per step.

    The step t -> t + h (h < 0) is x <- x + h d + sqrt(2 t |h|) noise() with the drift d = v - t score; the
    step to time 0 adds no noise.

    noise: function () -> [B, ...] standard normal, called once for each step but that to 0, in order;
    interpolant: as for `score_from_velocity`.
    """
    x = x.double()
    for t, t_next in pairwise(times):
        h = t_next - t
        # d is affine in v, with the same coefficients for both halves of a guided v: guiding v guides d.
        v = velocity(x, t)
        x = x + h * (v - t * score_from_velocity(v, x, x.new_full((len(x),), t), interpolant))
        if t_next > 0:
            x = x + math.sqrt(2 * t * -h) * noise().to(x)
    return x


# ---------------------------------------------------------------- noise and labels of sample i

def _generator(seed, index, stream):
    # torch's CPU generator keeps 32 bits of its seed: a hashed base plus the index gives each its own stream.
    base = int.from_bytes(hashlib.sha256(f"{stream} {seed}".encode()).digest()[:4], "little")
    return torch.Generator().manual_seed((base + index) % 2**32)


def sample_generators(seed, indices):
    """One CPU generator per sample, a function of (seed, index) alone. The first `draw_noise` from them gives
    the initial latents, the following ones the noise of each step."""
    return [_generator(seed, int(i), "noise") for i in indices]


def draw_noise(generators, shape):
    """[B, *shape] float32 standard normal: the next values of each sample's generator. Drawn on the CPU, so
    that every device sees the same noise."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def sample_labels(seed, indices, num_classes, mode="random", classes=None):
    """[len(indices)] int64 labels, each a function of (seed, index) alone.

    mode "random": uniform over the classes; "equal": index modulo the number of classes, so that num_classes
    samples in a row have each class once. `classes`: only these class numbers; ValueError if one is outside
    [0, num_classes).
    """
    if classes is None:
        classes = range(num_classes)
    for c in classes:
        if not 0 <= c < num_classes:
            raise ValueError(f"class {c} is outside 0..{num_classes - 1}, the classes of this model")
    if mode == "equal":
        picks = [int(i) % len(classes) for i in indices]
    else:
        generators = [_generator(seed, int(i), "label") for i in indices]
        picks = [int(torch.randint(len(classes), (), generator=g)) for g in generators]
    return torch.tensor([classes[p] for p in picks], dtype=torch.int64)


# ---------------------------------------------------------------- latents to images

def decode(vae_decode, x, latents_scale, latents_bias, chunk=16):
    """Images [B, 3, H, W] of normalised latents x [B, C, h, w]: vae_decode(x / latents_scale + latents_bias).

    latents_scale = 1/sqrt(running variance) and latents_bias = running mean of the latent batch norm, [C] or
    [1, C, 1, 1]. `chunk` samples are decoded at a time, so that the decoder's memory stays flat.
    """
    z = x / latents_scale.view(1, -1, 1, 1) + latents_bias.view(1, -1, 1, 1)
    return torch.cat([vae_decode(part) for part in z.split(chunk)])


def truncate_to_uint8(images):
    """uint8 [B, H, W, 3] of images [B, 3, H, W] in [-1, 1]: (x + 1)/2 * 255, clamped and truncated as in the
    paper's code. Only for samples: truncation is half a level darker than rounding, and the published FIDs
    were measured with it."""
    return ((images + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
