"""The evaluator's numbers: every array of adm_*.npz (ADM.md there, sections 8 to 11), closed forms, peers."""
import functools
import math
import threading
import types
import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from fill import fill_

from models.inception import FIDInception, resize_tf1
from models.metrics import (Moments, _map_distances, feature_statistics, float32_exactly, frechet_distance,
                            inception_score, manifold_radii, precision_recall, psnr)
from models.runtime.features import extract, inception_features, score


# ----------------------------------------------------------- the inputs of the golden files, from their seeds

def noise(seed, n, h, w):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def blocks(seed, n, size, emin=0, emax=5, amin=0.0, amax=1.0):
    rng = np.random.default_rng(seed)
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        cells = 2 ** int(rng.integers(int(emin), int(emax) + 1))
        colour, amplitude = rng.uniform(0, 255, 3), rng.uniform(amin, amax)
        grid = rng.uniform(-255, 255, (cells, cells, 3))
        grid = np.repeat(np.repeat(grid, size // cells, 0), size // cells, 1)
        out[i] = np.clip(np.floor(colour + amplitude * grid), 0, 255).astype(np.uint8)
    return out


def fid_features(seed, params):
    n, d, mean, amplitude, zero = params
    z = np.random.default_rng(seed).standard_normal((int(n), int(d)))
    w = 1.0 / (1.0 + np.arange(int(d)) / 16.0)
    x = mean + amplitude * (z * w + 0.7 * np.roll(z, 1, axis=1) + 0.3 * np.roll(z, 5, axis=1))
    x[:, :int(zero)] = 0.0
    return x.astype(np.float32)


def given_stats(seed, d):
    rng = np.random.default_rng(seed)
    mu = 0.5 + 0.1 * rng.standard_normal(d)
    diagonal = 0.05 + 0.05 * rng.uniform(0, 1, d)
    v = 0.1 * rng.standard_normal(d)
    return mu, np.diag(diagonal) + np.outer(v, v)


def is_features(seed, params):
    n, scale, ramp = params
    z = np.random.default_rng(seed).standard_normal((int(n), 64)) * scale
    z[:, 0] += ramp * np.arange(int(n)) / int(n)
    return z.astype(np.float32)


def pr_features(seed, n, d, params):
    c, s, decay, mul_rows, mul, nonneg = params
    z = np.random.default_rng(seed).standard_normal((n, d))
    x = c + s * (z * (1.0 / (1.0 + np.arange(d) / decay)))
    if nonneg:
        x = np.maximum(x, 0.0)
    x[:int(mul_rows)] *= mul
    return x.astype(np.float32)


def adm(name):
    with np.load(GOLDEN / f"adm_{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def same_input(array, crc):
    assert zlib.crc32(np.ascontiguousarray(array).tobytes()) == int(crc), "the test's own input is off"
    return array


def cases(name, key):
    with np.load(GOLDEN / f"adm_{name}.npz", allow_pickle=False) as file:
        return [k.split("/")[0] for k in file.files if k.endswith(key)]


def inception(data, filling="gain"):
    net = fill_(FIDInception(), salt=str(data["salt"]))
    for name, tensor in net.state_dict().items():
        if filling == "gain" and tensor.ndim == 4:
            tensor.mul_(float(np.float32(data["gain_conv"])))
        if filling == "gain" and name == "fc.weight":
            tensor.mul_(float(np.float32(data["gain_fc"])))
    return net


def nchw(images):
    """Images [N, H, W, 3] as the image source gives them."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def of_largest(actual, expected, tolerance):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"off by {error:.3g} of the largest entry"


# ---------------------------------------------------------------- preprocessing and network

@pytest.mark.parametrize("case", cases("resize", "/grid7"))
def test_resize_is_tensorflows_bit_for_bit(case):
    data, (h, w) = adm("resize"), map(int, case.split("x"))
    images = same_input(noise(int(data[f"{case}/seed"]), 2, h, w), data[f"{case}/input_crc32"])
    out = (resize_tf1(torch.from_numpy(images)).sub_(128).mul_(0.0078125)).numpy()
    for name, part in (("grid7", out[:, ::7, ::7]), ("last_row", out[:, -1, ::7]),
                       ("last_col", out[:, ::7, -1])):
        np.testing.assert_array_equal(part, data[f"{case}/{name}"])
    moments = out.mean(dtype=np.float64), out.std(dtype=np.float64)
    np.testing.assert_allclose(moments, data[f"{case}/mean_std"], atol=1e-7)


def test_inception_has_the_weight_files_entries(golden_json):
    entries = {name: list(tensor.shape) for name, tensor in FIDInception().state_dict().items()}
    assert entries == golden_json("adm_inception_state_dict") and len(entries) == 472


def inception_images(data, which):
    n, side = (2, 64) if which == "x64" else (1, 256)
    seeds = int(data[f"{which}/noise_seed"]), int(data[f"{which}/blocks_seed"])
    images = np.concatenate([noise(seeds[0], n, side, side), blocks(seeds[1], n, side)])
    return torch.from_numpy(same_input(images, data[f"{which}/crc32"]))


@pytest.mark.parametrize("filling", ["base", "gain"])
def test_inception_features(filling):
    data = adm("inception")
    net = inception(data, filling)
    for which in ("x64", "x256"):
        with torch.inference_mode():
            pool, spatial = net(inception_images(data, which))
            logits = net.logits(pool)
        for name, value, tolerance in (("pool3", pool, 1e-5), ("spatial", spatial, 1e-5),
                                       ("logits", logits, 1e-5), ("softmax", logits.softmax(1), 5e-5)):
            of_largest(value, data[f"{filling}/{which}/{name}"], tolerance)


def test_inception_stages():
    data = adm("inception")
    net, seen, at = inception(data), {}, "gain/x64/stage_"
    for name, module in net.named_children():
        module.register_forward_hook(
            lambda m, _, out, name=name: seen.update({name: out.permute(0, 2, 3, 1).numpy()}))
    with torch.inference_mode():
        net(inception_images(data, "x64"))
    compared = 0
    for k, name in enumerate(data[at + "names"].tolist()):
        if name not in seen:        # the poolings between the stages have no module
            continue
        x, compared = seen[name], compared + 1
        assert list(x.shape) == data[at + "shape_nhwc"][k].tolist()
        probe = x[2, x.shape[1] // 2, x.shape[2] // 3][[0, 1, 2, 3, -4, -3, -2, -1]]
        moments = x.mean(dtype=np.float64), x.std(dtype=np.float64)
        np.testing.assert_allclose(moments, data[at + "mean_std"][k], rtol=1e-5)
        np.testing.assert_allclose(probe, data[at + "probe"][k], atol=1e-5 * np.abs(x).max())
    assert compared >= 14, f"only {compared} of {data[at + 'names'].tolist()} were found in {sorted(seen)}"


# ---------------------------------------------------------------- Frechet distance and statistics

@pytest.mark.parametrize("case", cases("fid", "/ref_params"))
def test_frechet_distance_from_features(case):
    data = adm("fid")
    found = []
    for k, side in enumerate(("ref", "sample")):
        features = fid_features(int(data[f"{case}/{side}_seed"]), data[f"{case}/{side}_params"])
        found.append(feature_statistics(same_input(features, data[f"{case}/crc32"][k])))
        # the float32 mean, bit for bit
        np.testing.assert_array_equal(found[k][0], data[f"{case}/mu_{side}"])
        assert found[k][0].dtype == np.float32 and found[k][1].dtype == np.float64
        if f"{case}/sigma_{side}" in data:
            np.testing.assert_allclose(found[k][1], data[f"{case}/sigma_{side}"], rtol=0, atol=1e-12)
    distance = frechet_distance(*found[1], *found[0])
    traces = np.trace(found[0][1]) + np.trace(found[1][1])
    if case == "same":
        assert abs(distance) <= 1e-6 * traces
    else:
        assert distance == pytest.approx(float(data[f"{case}/fid_adm"]), rel=1e-6, abs=1e-9)
        assert distance == pytest.approx(float(data[f"{case}/fid_exact"]), rel=1e-4, abs=1e-6)


def test_frechet_distance_of_given_statistics():
    data = adm("fid")
    ref, sample = (given_stats(int(data[f"given/{side}_seed"]), int(data["given/dim"]))
                   for side in ("ref", "sample"))
    assert frechet_distance(*sample, *ref) == pytest.approx(float(data["given/fid_adm"]), rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians():
    s1, s2 = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 1.0])
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(s1) - np.sqrt(s2)) ** 2)
    assert frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(mu2, np.diag(s2), mu1, np.diag(s1)) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(mu1, np.zeros((3, 3)), mu2, np.diag(s2)) == pytest.approx(5 + 14, abs=1e-12)


def test_frechet_distance_rejects_what_it_cannot_use():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="different features"):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="non-finite"):
        frechet_distance(mu * np.nan, sigma, mu, sigma)
    with pytest.raises(ValueError, match="not a covariance"):
        frechet_distance(mu, sigma, mu, np.diag([1, 1, -5]))


def test_streamed_statistics_are_numpys():
    x = (np.random.default_rng(0).standard_normal((5000, 24)) * 3 + 100).astype(np.float32)
    moments = Moments(24)
    for part in np.split(x, [1, 70, 1500, 1503, 4999]):
        moments.add(part)
    mu, sigma = moments.statistics()
    np.testing.assert_array_equal(mu, x.mean(axis=0))
    assert np.abs(mu - x.mean(axis=0, dtype=np.float64)).max() > 0     # which a float64 mean would not be
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), atol=1e-11)


# ---------------------------------------------------------------- Inception Score

@pytest.mark.parametrize("case", cases("is", "/is_adm"))
def test_inception_score(case):
    data = adm("is")
    weight = np.random.default_rng(int(data["weight_seed"])).standard_normal((64, 1008))
    weight = same_input(weight.astype(np.float32), data["weight_crc32"])
    features = same_input(is_features(int(data[f"{case}/seed"]), data[f"{case}/params"]),
                          data[f"{case}/crc32"])
    score, _ = inception_score(features @ weight)
    assert score == pytest.approx(float(data[f"{case}/is_adm"]), rel=1e-5, nan_ok=True)
    if not math.isnan(score):
        assert score == pytest.approx(data[f"{case}/is_per_split"].mean(), rel=1e-5)
    exact, _ = inception_score(features.astype(np.float64) @ weight.astype(np.float64), exact=True)
    assert exact == pytest.approx(float(data[f"{case}/is_float64"]), rel=1e-9)
    if f"{case}/softmax_first4" in data:
        softmax = torch.from_numpy(features[:4] @ weight).softmax(1)
        of_largest(softmax, data[f"{case}/softmax_first4"], 5e-5)


def test_inception_score_has_the_spread_of_its_splits():
    logits = np.random.default_rng(0).standard_normal((25, 7)).astype(np.float32)
    splits = [inception_score(logits[i:i + 10])[0] for i in (0, 10, 20)]
    assert inception_score(logits, split_size=10) == pytest.approx((np.mean(splits), np.std(splits)))
    rows = np.repeat(logits, 210, axis=0)       # 5,250 rows: the suite's split of 5,000, and one of 250
    found = score({"pool": rows}, {}, types.SimpleNamespace(logits=lambda x: x))
    (first, _), (second, _) = inception_score(rows[:5000]), inception_score(rows[5000:])
    assert found["inception_score_std"] == pytest.approx(abs(first - second) / 2)


# ---------------------------------------------------------------- precision and recall

def pr_case(data, case):
    n, m, d = map(int, data[f"{case}/shape"])
    ref = pr_features(int(data[f"{case}/ref_seed"]), n, d, data[f"{case}/ref_params"])
    sample = pr_features(int(data[f"{case}/sample_seed"]), m, d, data[f"{case}/sample_params"])
    return same_input(ref, data[f"{case}/crc32"][0]), same_input(sample, data[f"{case}/crc32"][1])


def points(pair, expected, shape, allowed):
    n, m, _ = map(int, shape)
    return [abs(a - b) * count <= allowed + 1e-9
            for a, b, count in zip(pair, expected, (m, n))] == [True, True]


@pytest.mark.parametrize("case", adm("pr")["cases"].tolist())
def test_precision_and_recall(case):
    data = adm("pr")
    ref, sample = pr_case(data, case)
    block, shape = tuple(map(int, data[f"{case}/block"])), data[f"{case}/shape"]
    all_half = all(data[f"{case}/fp16_used_{which}"].all() for which in ("ref", "sample", "cross"))
    half = precision_recall(ref, sample, block=block)
    assert points(half, data[f"{case}/pr_tf"], shape, 0 if all_half else 3)
    assert points(half, data[f"{case}/pr_fp16_tfcpu"], shape, 0 if all_half else 3)
    exact = precision_recall(ref, sample, block=block, exact=True)
    if case == "half_range":        # at this norm float32 itself is noisy
        np.testing.assert_allclose(exact, data[f"{case}/pr_f32"], atol=0.02)
    else:
        assert points(exact, data[f"{case}/pr_f32"], shape, 3)
        assert points(exact, data[f"{case}/pr_f64"], shape, 3)
    for which, features in (("ref", ref), ("sample", sample)):
        features = torch.from_numpy(features)
        radii = manifold_radii(features, block=block).numpy()
        if data[f"{case}/fp16_used_{which}"].all():
            np.testing.assert_array_equal(radii, data[f"{case}/radii_{which}_tf"])
        else:       # float32 radii: TensorFlow's last places
            np.testing.assert_allclose(radii, data[f"{case}/radii_{which}_tf"], rtol=0.02)
        if case != "half_range":
            exact_radii = manifold_radii(features, exact=True, block=block)
            np.testing.assert_allclose(exact_radii, data[f"{case}/radii_{which}_f64"], rtol=0.01)


@pytest.mark.parametrize("case", adm("pr")["cases"].tolist())
def test_half_precision_blocks_survive_where_tensorflows_do(case):
    data = adm("pr")
    sides, block = [torch.from_numpy(x) for x in pr_case(data, case)], tuple(map(int, data[f"{case}/block"]))
    for which, (u, v) in (("ref", (0, 0)), ("sample", (1, 1)), ("cross", (0, 1))):
        used = []
        for rows in sides[u].split(block[0]):
            for columns in sides[v].split(block[1]):
                strips = _map_distances(rows, columns, False, lambda d, _: torch.equal(d.half().float(), d))
                used.append(all(strips))     # float32 distances are no float16 numbers
        assert used == data[f"{case}/fp16_used_{which}"].tolist()
    distance = torch.cat(_map_distances(sides[0][:block[0]], sides[1][:block[1]],
                                        False, lambda d, _: d))[:8, :8]
    if data[f"{case}/fp16_used_cross"][0]:
        np.testing.assert_array_equal(distance.numpy(), data[f"{case}/dist_tf_8x8"])
    else:
        np.testing.assert_allclose(distance.numpy(), data[f"{case}/dist_tf_8x8"], rtol=0.02)


def test_precision_and_recall_of_known_sets():
    line = np.arange(10, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line, line + 1000) == (0.0, 0.0)
    # sample 4 reaches 3 further: 8 and 9 are not recalled
    half_inside = np.concatenate([line[:5], line[:5] + 500])
    for exact in (False, True):
        assert precision_recall(line, half_inside, exact=exact) == (0.5, 0.8)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(line[:3], line)
    seen = []
    precision_recall(line, line[:6], block=(4, 5), progress=seen.append)
    assert seen[-1] == 10 * 10 + 6 * 6 + 10 * 6 and seen == sorted(seen) and len(seen) > 6


# ---------------------------------------------------------------- what the library rejects

@pytest.mark.parametrize("call", [
    feature_statistics, inception_score, lambda x: precision_recall(x, np.eye(9))])
def test_rows_that_no_metric_can_use(call):
    good = torch.rand(9, 9, requires_grad=True)
    call(good * 1)                                          # detached by itself
    bad = good.detach().clone()
    bad[3, 3] = math.nan
    for rows, words in ((bad, "non-finite"), (good[:1], "1 rows of"), (good[0], "a row per image")):
        with pytest.raises(ValueError, match=words):
            call(rows)


def test_images_that_the_network_cannot_use():
    net = FIDInception()
    for images, words in ((torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"not \[2, 3, 32, 32\]"),
                          (torch.rand(1, 8, 8, 3), "255"), (torch.rand(1, 8, 8, 3) * 2 - 1, "0..255"),
                          (torch.zeros(0, 8, 8, 3), r"\[0, 8, 8, 3\]")):
        with pytest.raises(ValueError, match=words):
            net(images)
    pool, _ = net(torch.full((1, 8, 8, 3), 200.0, requires_grad=True))
    assert not pool.requires_grad
    with pytest.raises(ValueError, match="not negative"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8) - 1)


# ---------------------------------------------------------------- precision of the arithmetic

def precision_flags():
    """Every switch that float32_exactly sets, and cuDNN's; "raises" if torch won't say (mixed settings)."""
    b = torch.backends
    read = [lambda: b.cudnn.enabled, lambda: b.cudnn.allow_tf32, lambda: b.cudnn.benchmark,
            torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_fp16_reduced_precision_reduction]
    if hasattr(b, "fp32_precision"):
        read += [lambda: b.cuda.matmul.fp32_precision, lambda: b.cudnn.conv.fp32_precision,
                 lambda: b.cudnn.rnn.fp32_precision, lambda: b.mkldnn.conv.fp32_precision,
                 lambda: b.mkldnn.matmul.fp32_precision]

    def answer(get):
        try:
            return get()
        except RuntimeError:
            return "raises"
    return [answer(get) for get in read]


def test_networks_run_in_full_float32_and_batches_come_with_the_callers_flags():
    """In the calling thread: another one would use GPU 0 in every process."""
    before, seen, threads = precision_flags(), [], set()

    def batches():
        for k in range(3):
            seen.append(precision_flags()), threads.add(threading.current_thread())
            yield torch.full((2, 3, 32, 32), k, dtype=torch.uint8)

    def network(images):
        enabled, tf32, _, products, *_ = precision_flags()
        assert (enabled, tf32, products) == (True, False, "highest")
        assert not torch.is_autocast_enabled("cpu")
        return {"": images.flatten(1)[:, :4] / 1}
    torch.set_float32_matmul_precision("high")
    try:
        before = precision_flags()
        with torch.autocast("cpu", torch.bfloat16):
            found = extract(batches(), network, "cpu")
        assert precision_flags() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [before] * 3 and threads == {threading.current_thread()}
    assert found["pool"][:, 0].tolist() == [0, 0, 1, 1, 2, 2] and found["mu"].tolist() == [1] * 4


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no fp32_precision")
@pytest.mark.parametrize("owner", ["cuda.matmul", "cudnn.conv", "cudnn", "mkldnn.conv", "mkldnn.matmul"])
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_a_callers_fp32_precision_does_not_raise(owner, value):
    owner = functools.reduce(getattr, owner.split("."), torch.backends)
    x, found = np.random.default_rng(0).standard_normal((2, 8, 3)), owner.fp32_precision
    owner.fp32_precision = value
    try:
        before = precision_flags()
        with float32_exactly():
            inside = precision_flags()
            precision_recall(*x)
        assert "raises" not in inside and inside[5:] == ["ieee"] * 5
        after = precision_flags()       # where torch refused to answer before, it may answer now
        assert [b for b in before if b != "raises"] == [a for a, b in zip(after, before) if b != "raises"]
    finally:
        owner.fp32_precision = found


# ---------------------------------------------------------------- the whole way, images to numbers

@pytest.fixture(scope="module")
def e2e():
    """(data, network, features of the reference, of the samples) of adm_e2e.npz."""
    data = adm("e2e")
    net = inception(data)
    found = []
    for k, (side, n) in enumerate((("ref", 64), ("sample", 48))):
        images = same_input(blocks(int(data[f"{side}_seed"]), n, 32, *data[f"{side}_blocks_params"]),
                            data["crc32"][k])
        keep = {}
        network = inception_features(net)

        def spy(x, keep=keep, network=network):
            result = network(x)
            keep.setdefault("spatial", result["_s"][:2].numpy())
            return result
        features = extract(nchw(images).split(20), spy, "cpu")
        found.append(features | keep)
    return data, net, *found


def test_features_end_to_end(e2e):
    data, _, ref, sample = e2e
    for side, features in (("ref", ref), ("sample", sample)):
        of_largest(features["pool"][:2], data[f"plain/{side}_pool3_first2"], 1e-5)
        of_largest(features["spatial"], data[f"plain/{side}_spatial_first2"], 1e-5)
        of_largest(features["pool"].mean(0, dtype=np.float64), data[f"plain/{side}_pool3_mean"], 1e-5)
        norms = (features["pool"].astype(np.float64) ** 2).sum(1)
        np.testing.assert_allclose(norms, data[f"plain/{side}_pool3_norm2"], rtol=1e-5)
        radii = manifold_radii(torch.from_numpy(features["pool"])).numpy()
        assert (np.abs(radii - data[f"plain/radii_{side}_tf"]) <= 0.25 + 0.01 * radii).all()


def stored(data, side):
    pool, spatial = (given_stats(int(data[f"stats/{side}_{mu}_seed"]), d)
                     for mu, d in (("mu", 2048), ("mu_s", 2023)))
    return {"mu": pool[0], "sigma": pool[1], "mu_s": spatial[0], "sigma_s": spatial[1]}


@pytest.mark.parametrize("run", ["plain", "refstats", "bothstats"])
def test_metrics_end_to_end(e2e, run):
    data, net, ref, sample = e2e
    ref = ref | (stored(data, "ref") if run != "plain" else {})
    sample = sample | (stored(data, "sample") if run == "bothstats" else {})
    result = score(sample, ref, net)
    inception_score_adm, fid, sfid, precision, recall = data[f"{run}/metrics_adm"].tolist()
    assert result["inception_score"] == pytest.approx(inception_score_adm, rel=1e-5)
    tolerance = 1e-6 if run == "bothstats" else 1e-4
    assert (result["fid"], result["sfid"]) == pytest.approx((fid, sfid), rel=tolerance)
    assert (result["fid"], result["sfid"]) == pytest.approx(tuple(data[f"{run}/fid_eigh"]), rel=tolerance)
    assert abs(result["precision"] - precision) <= 2.1 / 48 and abs(result["recall"] - recall) <= 2.1 / 48
    if run == "plain":
        exact = precision_recall(ref["pool"], sample["pool"], exact=True)
        assert exact == pytest.approx(tuple(data["plain/pr_f32"]))
        assert exact == pytest.approx(tuple(data["plain/pr_f64"]))
