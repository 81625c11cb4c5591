"""Samplers that turn noise (t = 1) into latents (t = 0) by a velocity network. Needs torch only.

Every sampler is a pure function `(velocity, latents, y, ...) -> x`:

    velocity   function (x [B, ...], t [B], y [B]) -> v [B, ...], the network's dx_t/dt for x_t = a(t) x_0 + s(t) eps
    latents    [B, ...] standard normal, x at t = 1; the network is called in this tensor's type (float32)
    y          [B] labels; `null_label` is the one that stands for "no class" (the model's number of classes)
    returns x  [B, ...] float64 at t = 0: normalised latents, to be decoded with `decode`

The state is integrated in float64 whatever the network computes in, as in the reference implementation.

Guidance (all samplers): at a step that starts at time t the label and null predictions are combined as
v_null + cfg_scale * (v_label - v_null) if and only if cfg_scale > 1 and guidance_low <= t <= guidance_high (inclusive,
compared in float64); other steps run the label half alone, at half the cost. Interval guidance: arXiv 2404.07724.

    g = sample_generators(seed=0, indices=range(8))
    latents = draw_noise(g, (4, 32, 32))
    y = sample_labels(seed=0, indices=range(8), num_classes=1000)
    noise = lambda i: draw_noise(g, (4, 32, 32))
    x = euler_maruyama(lambda x, t, y: sit(x, t, y)[0], latents, y, noise, num_steps=250, null_label=1000)
    images = to_uint8(decode(vae.decode, x.float(), latents_scale, latents_bias))
"""
import hashlib
import math

import torch


def check_guidance(cfg_scale, guidance_low, guidance_high):
    """Raises ValueError unless cfg_scale >= 1 and 0 <= guidance_low <= guidance_high <= 1."""
    if not (math.isfinite(cfg_scale) and cfg_scale >= 1):
        raise ValueError(f"cfg scale {cfg_scale} is below 1; 1 means no guidance")
    if not 0 <= guidance_low <= guidance_high <= 1:
        raise ValueError(f"guidance interval [{guidance_low}, {guidance_high}] must satisfy 0 <= low <= high <= 1")


def time_grid(num_steps, mode="ode"):
    """float64 [num_steps + 1] times from 1 to 0. "ode": equally spaced; "sde": `num_steps` equally spaced points from 1
    to 0.04, then 0, because the SDE's drift is stiff near the data (the reference's last step of 0.04)."""
    if num_steps < 1:
        raise ValueError(f"number of steps {num_steps} must be at least 1")
    if mode == "ode":
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return torch.cat([torch.linspace(1, 0.04, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def is_guided(t, cfg_scale, guidance_low, guidance_high):
    """Whether a step that starts at time t (float) is guided."""
    return cfg_scale > 1 and guidance_low <= t <= guidance_high


def _guided_velocity(velocity, x, t, y, dtype, cfg_scale, guided, null_label):
    """v [B, ...] float64 at state x [B, ...] and times t [B], float64; one batch of 2B rows when guided, else of B."""
    x, t = x.to(dtype), t.to(dtype)
    if not guided:
        return velocity(x, t, y).double()
    both = velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_label)]))
    v_label, v_null = both.double().chunk(2)
    return v_null + cfg_scale * (v_label - v_null)


def euler(velocity, latents, y, *, num_steps=50, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, null_label=1000):
    """Probability-flow ODE by Euler's method (order 1): x <- x + (t_next - t) v, `num_steps` network calls."""
    return _ode(velocity, latents, y, False, num_steps, cfg_scale, guidance_low, guidance_high, null_label)


def heun(velocity, latents, y, *, num_steps=50, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, null_label=1000):
    """Probability-flow ODE by Heun's method (order 2): the velocity at Euler's prediction is averaged with the first,
    except in the last step, which stays Euler's; 2 num_steps - 1 network calls. Both are guided, or neither is."""
    return _ode(velocity, latents, y, True, num_steps, cfg_scale, guidance_low, guidance_high, null_label)


def _ode(velocity, latents, y, second_order, num_steps, cfg_scale, guidance_low, guidance_high, null_label):
    check_guidance(cfg_scale, guidance_low, guidance_high)
    grid = time_grid(num_steps, "ode").tolist()
    x = latents.double()
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        guided = is_guided(t, cfg_scale, guidance_low, guidance_high)

        def v_at(x, t):
            return _guided_velocity(velocity, x, _times(x, t), y, latents.dtype, cfg_scale, guided, null_label)

        v = v_at(x, t)
        x_next = x + (t_next - t) * v
        if second_order and i < num_steps - 1:
            x_next = x + (t_next - t) * 0.5 * (v + v_at(x_next, t_next))
        x = x_next
    return x


def _times(x, t):
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)


def score_from_velocity(v, x, t, path_type="linear"):
    """Score grad_x log p_t(x) from the velocity: s = ((a/a') v - x) / (sigma^2 - (a/a') sigma' sigma), all float64.

    v, x [B, ...]; t [B] in (0, 1]; path_type "linear" (a = 1 - t, sigma = t: s = -(x + (1-t) v)/t) or "cosine"
    (a = cos(pi t/2), sigma = sin(pi t/2)). From SiT, arXiv 2401.08740, section 2.
    """
    t = t.double().view(-1, *[1] * (x.ndim - 1))
    if path_type == "linear":
        a, sigma, da, dsigma = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    elif path_type == "cosine":
        angle = math.pi / 2 * t
        a, sigma = torch.cos(angle), torch.sin(angle)
        da, dsigma = -math.pi / 2 * sigma, math.pi / 2 * a
    else:
        raise ValueError(f"path type {path_type!r} must be linear or cosine")
    ratio = a / da
    return (ratio * v.double() - x.double()) / (sigma**2 - ratio * dsigma * sigma)


def euler_maruyama(velocity, latents, y, noise, *, num_steps=250, path_type="linear", cfg_scale=1.0, guidance_low=0.0,
                   guidance_high=1.0, null_label=1000):
    """Reverse SDE by Euler-Maruyama with diffusion w = 2t, the paper's sampler.

    Drift d = v - t * score; the step t -> t + h (h < 0) is x <- x + h d + sqrt(2 t |h|) noise(i), and the last one
    (0.04 -> 0) adds no noise.

    noise: function i -> [B, ...] standard normal noise of step i, called once each for i = 0 ... num_steps-2, in order.
    """
    check_guidance(cfg_scale, guidance_low, guidance_high)
    grid = time_grid(num_steps, "sde").tolist()
    x = latents.double()
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        guided = is_guided(t, cfg_scale, guidance_low, guidance_high)
        times = _times(x, t)
        # d is affine in v with the same coefficients for both halves, so guiding v is guiding d
        v = _guided_velocity(velocity, x, times, y, latents.dtype, cfg_scale, guided, null_label)
        h = t_next - t
        x = x + h * (v - t * score_from_velocity(v, x, times, path_type))
        if i < num_steps - 1:
            x = x + math.sqrt(2 * t * -h) * noise(i).to(x)
    return x


# Dormand & Prince 1980, the pair 5(4): times, stage weights (the last row is the solution of order 5), and the weights
# of the error estimate (order 5 minus order 4)
_DOPRI_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_DOPRI_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_DOPRI_E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(velocity, latents, y, *, rtol=1e-5, atol=1e-5, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0,
           null_label=1000, max_steps=1000):
    """Probability-flow ODE by the adaptive Dormand-Prince 5(4) pair, 6 network calls per attempted step.

    Each sample has its own step sizes, so its result does not depend on which samples share its batch. A step is
    accepted when the root mean square over the sample of error / (atol + rtol * max(|x|, |x_new|)) is at most 1. No
    step crosses an end of the guidance interval, where the velocity jumps. The network sees float32, so tolerances
    below about 1e-6 gain nothing.
    Raises ArithmeticError if `max_steps` attempts do not reach the end of a piece.
    """
    check_guidance(cfg_scale, guidance_low, guidance_high)
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"tolerances rtol {rtol} and atol {atol} must be above 0")
    cuts = {1.0, 0.0} | ({guidance_low, guidance_high} if cfg_scale > 1 else set())
    cuts = sorted(cuts, reverse=True)
    x = latents.double()
    for start, stop in zip(cuts[:-1], cuts[1:]):
        guided = is_guided((start + stop) / 2, cfg_scale, guidance_low, guidance_high)

        def v_at(x, t):
            return _guided_velocity(velocity, x, t, y, latents.dtype, cfg_scale, guided, null_label)

        x = _dopri5_piece(v_at, x, start, stop, rtol, atol, max_steps)
    return x


def _dopri5_piece(v_at, x, start, stop, rtol, atol, max_steps):
    """x at time `stop` from x at time `start` > `stop`; t and h are kept per sample."""
    def per_sample(values):
        return values.view(-1, *[1] * (x.ndim - 1))

    t = _times(x, start)
    h = torch.full_like(t, -0.05)
    k_first = v_at(x, t)
    for _ in range(max_steps):
        live = t > stop
        if not live.any():
            return x
        last = h <= stop - t
        h = torch.where(last, stop - t, h)
        k = [k_first]
        for c, row in zip(_DOPRI_C[1:], _DOPRI_A):
            x_new = x + per_sample(h) * sum(a * kj for a, kj in zip(row, k) if a)
            k.append(v_at(x_new, t + c * h))
        error = per_sample(h) * sum(e * kj for e, kj in zip(_DOPRI_E, k) if e)
        error = error / (atol + rtol * torch.maximum(x.abs(), x_new.abs()))
        error = error.square().flatten(1).mean(1).sqrt().nan_to_num(nan=math.inf)
        accept = live & (error <= 1)
        x = torch.where(per_sample(accept), x_new, x)
        k_first = torch.where(per_sample(accept), k[-1], k_first)  # first stage of the next step = last of this one
        t = torch.where(accept, torch.where(last, stop, t + h), t)
        h = torch.where(live, h * (0.9 * error.clamp_min(1e-10) ** -0.2).clamp(0.2, 5), h)
    raise ArithmeticError(f"dopri5 did not get from t = {start} to {stop} in {max_steps} steps; loosen rtol and atol")


def _generator(seed, index, stream):
    # torch's CPU generator keeps 32 bits of its seed: a hashed base plus the index gives each sample its own stream
    base = int.from_bytes(hashlib.sha256(f"{stream} {seed}".encode()).digest()[:4], "little")
    return torch.Generator().manual_seed((base + index) % 2**32)


def sample_generators(seed, indices):
    """One CPU generator per sample, a function of (seed, index) alone. `draw_noise` takes the latents from them first,
    then the noise of each step."""
    return [_generator(seed, int(i), "noise") for i in indices]


def draw_noise(generators, shape):
    """[B, *shape] float32 standard normal: the next values of each sample's generator. Drawn on the CPU, so that every
    device sees the same noise."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def sample_labels(seed, indices, num_classes, mode="random", classes=None):
    """[len(indices)] int64 labels, each a function of (seed, index) alone.

    mode "random": uniform over the classes; "equal": index modulo the number of classes, so that num_classes samples in
    a row hold each class once. `classes`: only these class numbers (ValueError if one is outside [0, num_classes)).
    """
    if classes is None:
        classes = range(num_classes)
    for c in classes:
        if not 0 <= c < num_classes:
            raise ValueError(f"class {c} is outside 0..{num_classes - 1}, the classes of this model")
    if mode == "equal":
        picks = [int(i) % len(classes) for i in indices]
    elif mode == "random":
        picks = [int(torch.randint(len(classes), (), generator=_generator(seed, int(i), "label"))) for i in indices]
    else:
        raise ValueError(f"label sampling {mode!r} must be random or equal")
    return torch.tensor([classes[p] for p in picks], dtype=torch.int64)


def decode(vae_decode, x, latents_scale, latents_bias, chunk=16):
    """Images [B, 3, H, W] from normalised latents x [B, C, h, w]: vae_decode(x / latents_scale + latents_bias).

    latents_scale = 1/sqrt(running variance) and latents_bias = running mean, [C] or [1, C, 1, 1]; `chunk` samples at a
    time, so that the decoder's memory stays flat.
    """
    z = x / latents_scale.view(1, -1, 1, 1) + latents_bias.view(1, -1, 1, 1)
    return torch.cat([vae_decode(part) for part in z.split(chunk)])


def to_uint8(images):
    """uint8 [B, H, W, 3] of images [B, 3, H, W] in [-1, 1]: (x + 1)/2 * 255, clamped and truncated as in the paper's
    code."""
    return ((images + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
