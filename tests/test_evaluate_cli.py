"""evaluate_fid.py as a program: inputs, references, JSON, cache, processes, training's hook, bad input."""
import json
import os
import shutil
import signal
import tracemalloc
import zipfile

import numpy as np
import processes
import pytest
import timm
import torch
from conftest import ROOT
from fill import fill_
from PIL import Image

import evaluate_fid
from models.inception import FIDInception
from models.runtime import features, files
from models.runtime.images import open_input


def pictures(n, seed=0, size=32):
    """n smooth random images, uint8 [n, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.BICUBIC)) for x in coarse])


def write_folder(folder, images):
    for k, image in enumerate(images):
        path = folder / f"class{k % 2}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    order = sorted(range(len(images)), key=lambda k: f"class{k % 2}/{k:03d}.png")
    return images[order]


def write_zip(path, folder):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))


def figures(tmp_path, *args):
    evaluate_fid.main([*map(str, args), "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def refused(capsys, *args):
    """Run, expect exit code 2 and one line on stderr; returns it."""
    with pytest.raises(SystemExit) as stop:
        evaluate_fid.main([str(a) for a in args])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith("error: "), output.err
    return output.err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(fill_(FIDInception(), salt="cli").state_dict(), path)
    return path


# ---------------------------------------------------------------- inputs

def test_every_kind_of_input_gives_the_same_figures(tmp_path, capsys):
    samples, images = pictures(40, 1), write_folder(tmp_path / "ref", pictures(50))
    np.savez(tmp_path / "samples.npz", samples, np.arange(40),
             protocol=np.array('{"mode": "sde", "num_steps": 250}'))
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    write_zip(tmp_path / "ref.zip", tmp_path / "ref")
    results = [figures(tmp_path, "--features", "hog", "--batch-size", 7, tmp_path / ref,
                       tmp_path / "samples.npz")
               for ref in ("plain.npz", "packed.npz", "ref", "ref.zip")]
    assert "FD-hog: " in capsys.readouterr().out
    assert "fid" not in results[0]
    assert len({r["fd_hog"] for r in results}) == 1 and results[0]["fd_hog"] > 0
    assert [len({r[side]["sha256"] for r in results}) for side in ("ref", "samples")] == [4, 1]
    assert results[0]["samples"]["protocol"] == {"mode": "sde", "num_steps": 250}
    assert results[0]["ref"]["protocol"] is None
    assert results[0]["ref"]["images"] == 50 and results[0]["samples"]["size"] == [32, 32]


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, pack):
    images = np.zeros((4000, 64, 64, 3), np.uint8)      # 49 MB
    images[:, 0, 0, 0] = np.arange(4000) % 251
    pack(tmp_path / "x.npz", images)
    source = open_input(str(tmp_path / "x.npz"))
    seen = []
    tracemalloc.start()
    for batch in source.read(50, rank=1, world_size=2):
        seen += batch[:, 0, 0, 0].tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert seen == [k % 251 for start in range(50, 4000, 100) for k in range(start, start + 50)]


def test_other_modes_are_converted_and_counted(tmp_path, capsys):
    folder = tmp_path / "mixed"
    write_folder(folder, pictures(6))
    rgb = Image.fromarray(pictures(1, 5)[0])
    for name, image in (("grey", rgb.convert("L")), ("alpha", rgb.convert("RGBA")),
                        ("palette", rgb.quantize(16))):
        image.save(folder / f"{name}.png")
    np.savez(tmp_path / "s.npz", pictures(20, 1))
    result = figures(tmp_path, "--features", "hog", folder, tmp_path / "s.npz")
    assert result["ref"]["converted"] == 3 and result["ref"]["images"] == 9
    assert "3 grey, palette or transparent images" in capsys.readouterr().err
    # alpha, class*/..., grey, palette
    alpha, _, grey, _ = next(open_input(str(folder)).read(9))[[0, 1, -2, -1]]
    assert (np.ptp(grey, axis=-1) == 0).all()
    np.testing.assert_array_equal(alpha, np.asarray(rgb))


def test_sizes_must_agree_unless_cropped(tmp_path, capsys):
    folder = tmp_path / "sizes"
    write_folder(folder, pictures(6))
    Image.fromarray(pictures(1, 2, 48)[0]).save(folder / "other.png")
    np.savez(tmp_path / "s.npz", pictures(8, 1))
    line = refused(capsys, "--features", "hog", folder, tmp_path / "s.npz")
    assert "class0/000.png is 32x32 and other.png is 48x48" in line and "--resolution" in line
    result = figures(tmp_path, "--features", "hog", "--resolution", 32, folder, tmp_path / "s.npz")
    assert result["ref"]["images"] == 7 and np.isfinite(result["fd_hog"])


def test_limit_takes_the_first_images(tmp_path):
    np.savez(tmp_path / "all.npz", pictures(40))
    np.savez(tmp_path / "first.npz", pictures(40)[:16])
    np.savez(tmp_path / "s.npz", pictures(16, 1))
    cut = figures(tmp_path, "--features", "hog", "--limit", 16, tmp_path / "all.npz", tmp_path / "s.npz")
    whole = figures(tmp_path, "--features", "hog", tmp_path / "first.npz", tmp_path / "s.npz")
    assert cut["fd_hog"] == whole["fd_hog"]


# ---------------------------------------------------------------- references, the JSON, further metrics

class StandIn(torch.nn.Module):
    """What FIDInception gives, of 32 x 32 images, out of the pixels themselves: quick, of the right sizes."""
    path, sha256 = "stand-in", "no digest"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        x = images.flatten(1).float() / 64
        return x[:, :2048], x[:, :2023]

    def logits(self, pool):
        return pool[:, :1008]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The command line with a StandIn for the Inception network."""
    net = StandIn()
    net.path = str(tmp_path / "stand-in.pth")
    (tmp_path / "stand-in.pth").write_bytes(b"weights")
    monkeypatch.setattr(evaluate_fid, "load_inception", lambda path, device: net)
    return net


FIVE = ("inception_score", "fid", "sfid", "precision", "recall")


def test_saved_reference_cache_and_online_score(tmp_path, stand_in, capsys):
    images, samples = write_folder(tmp_path / "images", pictures(12)), pictures(10, 1)
    np.savez(tmp_path / "s.npz", samples)
    evaluate_fid.main([str(a) for a in ("--save-ref", tmp_path / "ref.npz", "--save-ref-images", 6,
                                        "--batch-size", 5, tmp_path / "images")])
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "mu", "mu_s", "protocol", "sigma", "sigma_s"]
        np.testing.assert_array_equal(file["arr_0"], images[[0, 2, 4, 7, 9, 11]])
        assert file["mu"].dtype == np.float32 and file["sigma"].dtype == np.float64
        statistics = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}

    # 1. statistics of all twelve images come from the file, precision and recall from its six images
    args = ["--metrics", "kid,fid_infinity", "--kid-subsets", 5, "--kid-subset-size", 5, "--batch-size", 5,
            "--cache", tmp_path / "cache", tmp_path / "ref.npz", tmp_path / "s.npz"]
    stored = figures(tmp_path, *args)
    output = capsys.readouterr()
    printed = [line.split(":")[0] for line in output.out.splitlines()]
    assert printed[-11:-6] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert printed[-6:-3] == ["F-score", "KID", "KID, spread of its subsets"]
    assert stored["ref"]["statistics"] == "stored" and stored["samples"]["statistics"] == "computed"
    assert any("10 samples" in note and "biased" in note for note in stored["notes"])
    assert any("of 12 images" in note and "precision and recall its 6 images" in note
               for note in stored["notes"])
    assert "precision and recall: 100 %, 0:00 left" in output.err and "KID: 100 %" in output.err
    ref = evaluate_fid.load_reference(str(tmp_path / "ref.npz"), stand_in, pool=False)
    features = evaluate_fid.extract(iter([images]), [evaluate_fid.inception_features(stand_in)], "cpu")
    for key in statistics:
        np.testing.assert_allclose(ref[key], features[key], atol=1e-6)

    # 2. the same samples scored as a training run makes them
    online = evaluate_fid.score_samples(iter(np.split(samples, [5])), ref, stand_in)
    assert {name: stored[name] for name in ("fid", "sfid", "inception_score")} == online

    # 3. a second run finds its features in the cache
    stand_in.seen = 0
    again = figures(tmp_path, *args)
    assert stand_in.seen == 0 and {n: again[n] for n in (*FIVE, "kid", "kid_std")} == {
        n: stored[n] for n in (*FIVE, "kid", "kid_std")}

    # 4. statistics alone, as pytorch-fid writes them, and with sFID's: what needs images is left out and said
    for name, keys, found in (("fid", ("mu", "sigma"), {"fid"}),
                              ("both", tuple(statistics), {"fid", "sfid"})):
        np.savez(tmp_path / f"{name}.npz", **{key: statistics[key] for key in keys})
        alone = figures(tmp_path, *args[:-2], tmp_path / f"{name}.npz", tmp_path / "s.npz")
        assert {n for n in FIVE if n in alone} == {"inception_score", *found} and "kid" not in alone
        assert all(alone[n] == stored[n] for n in (*found, "inception_score"))
        assert any("precision, recall and the like are left out" in note for note in alone["notes"])
        assert ("no mu_s, so no sFID" in " ".join(alone["notes"])) == (name == "fid")


def test_the_json_proves_the_number(tmp_path, stand_in):
    np.savez(tmp_path / "r.npz", pictures(8))
    np.savez(tmp_path / "s.npz", pictures(9, 1), np.arange(9), protocol=np.array('{"mode": "sde"}'))
    found = figures(tmp_path, "--limit", 6, "--exact-pr", "--seed", 5, "--metrics", "kid", tmp_path / "r.npz",
                    tmp_path / "s.npz")
    assert found["samples"]["images"] == 9 and found["samples"]["used"] == found["ref"]["used"] == 6
    assert found["samples"]["protocol"] == {"mode": "sde"} and len(found["samples"]["sha256"]) == 64
    assert found["weights"]["inception"] == {"path": stand_in.path, "sha256": files.sha256(stand_in.path)}
    assert any("not the FID Inception" in note for note in found["notes"])
    assert found["versions"]["torch"] == torch.__version__ and len(found["versions"]["code_sha256"]) == 64
    assert {found["arithmetic"][name] for name in ("precision_recall", "inception_score")} == {"float32"}
    assert found["seeds"]["kid"] == 5 and found["settings"]["kid_subsets"] == 100 and found["device"]


def test_scores_per_class_where_classes_are_stored(tmp_path, stand_in, capsys):
    ref, samples, labels = pictures(12), pictures(9, 1), np.arange(9) % 3
    np.savez(tmp_path / "r.npz", ref, np.arange(12) % 4)
    np.savez(tmp_path / "s.npz", samples, labels)
    found = figures(tmp_path, "--metrics", "fid_per_class", tmp_path / "r.npz",
                    tmp_path / "s.npz")["fid_per_class"]
    assert list(found) == ["0", "1", "2"] and "FID per class: " in capsys.readouterr().out
    x, y = (torch.from_numpy(a).flatten(1)[:, :2048] / 64 for a in (samples[labels == 1], ref[1::4]))
    expected = evaluate_fid.frechet_distance(*evaluate_fid.feature_statistics(x),
                                             *evaluate_fid.feature_statistics(y))
    assert found["1"] == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "r.npz", ref)
    assert "a label per image" in refused(capsys, "--metrics", "fid_per_class", tmp_path / "r.npz",
                                          tmp_path / "s.npz")


def test_weights_are_found_where_the_peers_keep_them(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "WEIGHTS_SHA256", files.sha256(weights)[:8])
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    # passed over: wrong digest
    (folder / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"cut off")
    shutil.copy(weights, folder / "weights-inception-2015-12-05-6726825d.pth")
    net = features.load_inception()
    assert net.path == str(folder / "weights-inception-2015-12-05-6726825d.pth")
    assert net.sha256 == files.sha256(weights)


def test_clip_embeddings(tmp_path, monkeypatch):
    torch.manual_seed(0)
    # stands in for CLIP, which needs a network
    name = "deit_tiny_patch16_224.fb_in1k"
    model, config = timm.create_model(name).eval(), timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    torch.save(model.state_dict(), tmp_path / "clip.pth")
    embed = features.clip_features(str(tmp_path / "clip.pth"), name=name)
    images = torch.from_numpy(pictures(2))
    with torch.no_grad():
        x = torch.nn.functional.interpolate(images.permute(0, 3, 1, 2) / 255, (224, 224), mode="bicubic")
        torch.testing.assert_close(embed(images)["_clip"], model((x - mean) / std))
    found = evaluate_fid.extract(iter([pictures(6)]), [embed], "cpu")
    assert set(found) == {"clip"} and evaluate_fid.score(found, found)["cmmd"] == pytest.approx(0, abs=1e-5)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for path, error in ((tmp_path / "other.pth", ValueError), (tmp_path / "gone.pth", FileNotFoundError)):
        with pytest.raises(error, match="--clip-ckpt"):
            features.clip_features(str(path), name=name)

    def offline(*args):
        raise OSError("cannot be fetched")
    monkeypatch.setattr(files, "hub_file", offline)
    with pytest.raises(OSError, match="cannot be fetched; or name timm's file of it with --clip-ckpt"):
        features.clip_features()


# ---------------------------------------------------------------- runs that are stopped

def test_a_stopped_run_goes_on_from_its_pieces(tmp_path, monkeypatch, capfd):
    np.savez_compressed(tmp_path / "r.npz", pictures(40))
    np.savez(tmp_path / "s.npz", pictures(8, 1))
    args = ["--features", "hog", "--batch-size", "4", tmp_path / "r.npz", tmp_path / "s.npz"]
    whole = figures(tmp_path, *args)["fd_hog"]
    monkeypatch.setattr(features, "PIECE", 8)
    hog, seen, stop_at = evaluate_fid.hog_features(32), [], 28

    def network(images):
        seen.append(len(images))
        if sum(seen) > stop_at:
            signal.raise_signal(signal.SIGINT)
        return hog(images)
    monkeypatch.setattr(evaluate_fid, "hog_features", lambda size, device: network)
    args += ["--cache", tmp_path / "cache"]
    with pytest.raises(SystemExit) as stop:
        evaluate_fid.main([str(a) for a in args])
    output = capfd.readouterr().err.splitlines()
    assert stop.value.code == 130 and output[-1].startswith("stopped by SIGINT: the same command goes on")
    assert not any("Traceback" in line for line in output)
    pieces = sorted((tmp_path / "cache").glob("*/*.npz"))
    assert [p.name for p in pieces] == ["00000000-00000008.npz", "00000008-00000016.npz",
                                        "00000016-00000024.npz"]

    # the last one is damaged: eight images are done again, no more
    data = bytearray(pieces[2].read_bytes())
    data[-3000] ^= 255
    pieces[2].write_bytes(data)
    seen.clear()
    stop_at = 1000
    again = figures(tmp_path, *args)
    assert sum(seen) == 40 - 16 + 8 and again["fd_hog"] == pytest.approx(whole, rel=1e-9)
    assert "00000016-00000024.npz: not used" in capfd.readouterr().err
    seen.clear()
    assert figures(tmp_path, *args)["fd_hog"] == again["fd_hog"] and not seen
    cut = figures(tmp_path, *args, "--limit", "20")         # the first rows of what is there
    assert not seen and cut["ref"]["used"] == 20 and cut["fd_hog"] != whole


def test_a_signal_ends_a_run_in_one_line(tmp_path):
    np.savez(tmp_path / "r.npz", np.zeros((60_000, 32, 32, 3), np.uint8))
    args = ["--features", "hog", "--cache", tmp_path / "cache", tmp_path / "r.npz", tmp_path / "r.npz"]
    process = processes.start("evaluate_fid", args, tmp_path / "log")
    processes.wait_for(lambda: list((tmp_path / "cache").glob("*/*.npz")), [process], tmp_path / "log")
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM
    log = (tmp_path / "log").read_text()
    assert log.count("\n") == 1 and log.startswith("stopped by SIGTERM: the same command goes on"), log
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix == ".tmp"]


# ---------------------------------------------------------------- with the network

def test_frechet_distance_on_an_encoder_has_its_own_name(tmp_path, weights):
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "vit.pth")
    np.savez(tmp_path / "r.npz", pictures(5))
    np.savez(tmp_path / "s.npz", pictures(6, 1))
    features = evaluate_fid.encoder_features("vit_tiny_patch16_224", str(tmp_path / "vit.pth"))
    assert features(torch.from_numpy(pictures(2)))["_fdd"].shape == (2, 192)
    first, second = ({"mu_fdd": np.full(2, m), "sigma_fdd": np.eye(2)} for m in (0, 1))
    assert evaluate_fid.score(first, second) == {"fdd": pytest.approx(2)}
    result = figures(tmp_path, "--inception-weights", weights, "--metrics", "fdd", "--encoder",
                     "vit_tiny_patch16_224", "--encoder-ckpt", tmp_path / "vit.pth", tmp_path / "r.npz",
                     tmp_path / "s.npz")
    assert result["fd_vit_tiny_patch16_224"] > 0 and "fdd" not in result


def test_two_processes_give_the_figures_of_one(tmp_path, monkeypatch):
    np.savez(tmp_path / "r.npz", pictures(45))
    # 5 batches: the second process is left without one at the end
    np.savez(tmp_path / "s.npz", pictures(23, 1))
    args = ["--features", "hog", "--batch-size", 5, "--cache", tmp_path / "cache", tmp_path / "r.npz",
            tmp_path / "s.npz"]
    one = figures(tmp_path, *args)
    # of the reference, which both make again together
    for piece in (tmp_path / "cache").glob("*/*-00000045.npz"):
        piece.unlink()
    processes.run_two("evaluate_fid", [*args, "--json", tmp_path / "two.json"], tmp_path / "log")
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["fd_hog"] == pytest.approx(one["fd_hog"], rel=1e-9)  # threads of the two runs may differ
    assert two["ref"]["sha256"] == one["ref"]["sha256"]
    assert (tmp_path / "log").read_text().count("FD-hog") == 1
    monkeypatch.setattr(evaluate_fid,
                        "hog_features", lambda *a: lambda images: pytest.fail("it is all in the cache"))
    assert figures(tmp_path, *args)["fd_hog"] == pytest.approx(one["fd_hog"], rel=1e-9)


# ---------------------------------------------------------------- bad input: one line, exit code 2

def broken(name, folder):
    """Writes one broken input, returns its path and a word the error must contain."""
    path, good = folder / f"{name}.npz", pictures(8)
    if name == "missing":
        return path, "no such file"
    if name == "no_arr_0":
        np.savez(path, images=good)
        return path, "no arr_0"
    if name == "float":
        np.savez(path, good.astype(np.float32))
        return path, "float32, not uint8"
    if name == "nchw":
        np.savez(path, good.transpose(0, 3, 1, 2).copy())
        return path, "NCHW"
    if name == "fortran":
        np.savez(path, np.asfortranarray(good))
        return path, "Fortran"
    if name == "grey":
        np.savez(path, good[..., 0])
        return path, "[8, 32, 32]"
    if name == "none":
        np.savez(path, good[:0])
        return path, "N > 0"
    if name == "few":
        np.savez(path, good[:3])
        return path, "3 images are too few"
    if name == "empty":
        path.write_bytes(b"")
        return path, "empty, truncated"
    if name == "truncated":
        np.savez(path, good)
        path.write_bytes(path.read_bytes()[:-5000])
        return path, "truncated"
    if name == "short":
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (8, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(good[:7].tobytes())
        return path, "ends early"
    if name == "pickled":
        np.savez(path, np.array([{"a": 1}] * 8, dtype=object))
        return path, "pickled"
    if name == "no_mu_s":
        np.savez(path, good, mu=np.zeros(2048), sigma=np.eye(2048))
        return path, "mu_s"
    if name == "pickled_mu":
        np.savez(path, good, mu=np.array([None] * 4), sigma=np.eye(2), mu_s=np.zeros(2), sigma_s=np.eye(2))
        return path, "statistics cannot be read"
    if name == "wrong_mu":
        np.savez(path, good, mu=np.zeros(192), sigma=np.eye(192), mu_s=np.zeros(2023), sigma_s=np.eye(2))
        return path, "shape [2048]"
    if name == "stats_only":
        np.savez(path, mu=np.zeros(2048), sigma=np.eye(2))
        return path, "shape [2048, 2048]"
    if name == "mu_only":
        np.savez(path, mu=np.zeros(2048))
        return path, "no arr_0"
    if name == "text_image":
        (folder / "dir" / "a").mkdir(parents=True)
        (folder / "dir" / "a" / "notes.txt").write_text("hello")
        return folder / "dir", "notes.txt"
    (folder / "nothing").mkdir()
    return folder / "nothing", "no images"


@pytest.mark.parametrize("name", ["missing", "no_arr_0", "float", "nchw", "fortran", "grey", "none", "few",
                                  "empty", "truncated", "short", "pickled", "no_mu_s", "pickled_mu",
                                  "wrong_mu", "stats_only", "mu_only", "text_image", "no_images"])
def test_bad_inputs(tmp_path, capsys, name):
    np.savez(tmp_path / "good.npz", pictures(8))
    path, word = broken(name, tmp_path)
    assert word in refused(capsys, "--features", "hog", path, tmp_path / "good.npz")
    assert word in refused(capsys, "--features", "hog", tmp_path / "good.npz", path)


def test_damage_found_while_reading(tmp_path, capsys):
    np.savez(tmp_path / "good.npz", pictures(8))
    data = bytearray((tmp_path / "good.npz").read_bytes())
    data[9000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        evaluate_fid.main(["--features", "hog", str(tmp_path / "damaged.npz"), str(tmp_path / "good.npz")])
    assert stop.value.code == 2 and "damaged.npz: arr_0 is damaged" in capsys.readouterr().err


def test_every_flag_is_read():
    source = (ROOT / "evaluate_fid.py").read_text()
    unread = [name for name in vars(evaluate_fid.parse_args(["r", "s"])) if f"args.{name}" not in source]
    assert unread == []


def test_outputs_are_checked_before_any_work(tmp_path, capsys):
    """Nothing is computed: the weights, which are asked for later, do not exist."""
    good, link = tmp_path / "good.npz", tmp_path / "link.npz"
    late = ["--inception-weights", tmp_path / "gone.pth"]
    np.savez(good, pictures(8))
    content = good.read_bytes()
    link.symlink_to(good)
    assert "would be replaced" in refused(capsys, *late, "--save-ref", good, good)
    assert "would be replaced" in refused(capsys, *late, "--save-ref", link, good)
    assert "would be replaced" in refused(capsys, *late, "--json", good, good, good)
    assert "must end in .npz" in refused(capsys, *late, "--save-ref", tmp_path / "ref", good)
    (tmp_path / "file").write_text("")
    for flags in (["--json", tmp_path / "file" / "x.json", good, good],
                  ["--cache", tmp_path / "file", good, good],
                  ["--save-ref", tmp_path / "file" / "x.npz", good]):
        assert "cannot be written" in refused(capsys, *late, *flags)
    assert good.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "good.npz", "link.npz"]


def test_statistics_that_are_no_covariance_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", pictures(8))
    negative, lopsided = np.eye(2048), np.eye(2048)
    negative[0, 0], lopsided[3, 4] = -5, 1
    for sigma, word in ((negative, "negative eigenvalue -5"), (lopsided, "not symmetric")):
        np.savez(tmp_path / "r.npz", mu=np.zeros(2048), sigma=sigma)
        line = refused(capsys, "--inception-weights", tmp_path / "gone.pth", tmp_path / "r.npz",
                       tmp_path / "s.npz")
        assert word in line and "r.npz: sigma" in line


def test_bad_settings(tmp_path, capsys, weights, monkeypatch):
    good = tmp_path / "good.npz"
    np.savez(good, pictures(8))
    assert "unknown" in refused(capsys, "--metrics", "lpips", good, good)
    assert "--save-ref" in refused(capsys, good)
    assert "FD-hog alone" in refused(capsys, "--features", "hog", "--metrics", "kid", good, good)
    for flag, value in (("--limit", 2), ("--limit", 0), ("--kid-subset-size", 1), ("--seed", -1),
                        ("--batch-size", "nan"), ("--resolution", "inf"), ("--kid-subsets", "1e3")):
        assert f"{flag}: " in refused(capsys, flag, value, good, good)
    assert "gone.pth" in refused(capsys, "--inception-weights", tmp_path / "gone.pth", good, good)
    state = FIDInception().state_dict() | {"fc.bias": torch.full((1008,), torch.nan)}
    torch.save(state, tmp_path / "nan.pth")
    assert "fc.bias holds NaN" in refused(capsys, "--inception-weights", tmp_path / "nan.pth", good, good)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert "another architecture" in refused(capsys, "--inception-weights", tmp_path / "other.pth", good,
                                             good)
    fdd = ["--inception-weights", weights, "--metrics", "fdd", "--encoder", "x"]
    assert "unknown encoder" in refused(capsys, *fdd, good, good)
    np.savez(tmp_path / "wide.npz", pictures(8, 0, 64))
    assert "one size" in refused(capsys, "--features", "hog", good, tmp_path / "wide.npz")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")      # no network
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    line = refused(capsys, good, good)
    assert "cannot be fetched" in line and "--inception-weights" in line
    assert not any(name.endswith(".pth") for _, _, names in os.walk(tmp_path / "home") for name in names)
