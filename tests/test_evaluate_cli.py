"""evaluate_fid.py as a program: inputs, references, JSON, processes, bad input."""
import json
import zipfile

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import evaluate_fid
from models.inception import FIDInception
from models.runtime import features, files
from models.runtime.data import open_images

HOG = ("--features", "hog")
FIVE = ("inception_score", "fid", "sfid", "precision", "recall")


def pictures(n, seed=0, size=32):
    """n smooth random images, uint8 [n, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.BICUBIC)) for x in coarse])


def write_folder(folder, images):
    """Writes the images as PNGs of two classes; returns them in the order of reading."""
    for k, image in enumerate(images):
        path = folder / f"class{k % 2}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return np.concatenate([images[::2], images[1::2]])


def figures(tmp_path, *args):
    evaluate_fid.main([*map(str, args), "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def rejected(capsys, *args):
    """Run, expect exit code 2 and one line on stderr; returns it."""
    with pytest.raises(SystemExit) as stop:
        evaluate_fid.main([str(a) for a in args])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith("error: "), output.err
    return output.err


class StandIn(torch.nn.Module):
    """What FIDInception gives, of 32 x 32 images, out of the pixels themselves: quick, of the right sizes."""
    path, sha256 = "stand-in", "no digest"

    def forward(self, images):
        x = images.flatten(1).float() / 64
        return x[:, :2048], x[:, :2023]

    def logits(self, pool):
        return pool[:, :1008]


@pytest.fixture
def stand_in(monkeypatch):
    """The command line with a StandIn for the Inception network."""
    net = StandIn()
    monkeypatch.setattr(evaluate_fid, "load_inception", lambda path, device: net)
    return net


# ---------------------------------------------------------------- inputs

def test_every_kind_of_input_gives_the_same_figures(tmp_path, capsys):
    samples, images = pictures(40, 1), write_folder(tmp_path / "ref", pictures(50))
    np.savez(tmp_path / "samples.npz", samples, np.arange(40),
             protocol=np.array('{"mode": "sde", "num_steps": 250}'))
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    with zipfile.ZipFile(tmp_path / "ref.zip", "w") as archive:
        for file in sorted((tmp_path / "ref").rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path / "ref"))
    results = [figures(tmp_path, *HOG, "--batch-size", 7, tmp_path / ref, tmp_path / "samples.npz")
               for ref in ("plain.npz", "packed.npz", "ref", "ref.zip")]
    assert "FD-hog: " in capsys.readouterr().out
    assert "fid" not in results[0]
    assert len({r["fd_hog"] for r in results}) == 1 and results[0]["fd_hog"] > 0
    assert [len({r[side]["sha256"] for r in results}) for side in ("ref", "samples")] == [4, 1]
    assert results[0]["samples"]["protocol"] == {"mode": "sde", "num_steps": 250}
    assert results[0]["ref"]["protocol"] is None
    assert results[0]["ref"]["images"] == 50 and results[0]["samples"]["size"] == [32, 32]


def test_sizes_must_agree_unless_cropped(tmp_path, capsys):
    folder = tmp_path / "sizes"
    write_folder(folder, pictures(6))
    Image.fromarray(pictures(1, 2, 48)[0]).save(folder / "other.png")
    np.savez(tmp_path / "s.npz", pictures(8, 1))
    line = rejected(capsys, *HOG, folder, tmp_path / "s.npz")
    assert "48x48" in line and "--resolution" in line
    result = figures(tmp_path, *HOG, "--resolution", 32, folder, tmp_path / "s.npz")
    assert result["ref"]["images"] == 7 and np.isfinite(result["fd_hog"])


# ---------------------------------------------------------------- references, the JSON, further metrics

def test_a_saved_reference_gives_its_statistics(tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_fid, "KEPT", 6)
    images = write_folder(tmp_path / "images", pictures(12))
    np.savez(tmp_path / "s.npz", pictures(10, 1))
    ref = tmp_path / "ref.npz"
    evaluate_fid.main(["--save-ref", str(ref), "--batch-size", "5", str(tmp_path / "images")])
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "mu", "mu_s", "protocol", "sigma", "sigma_s"]
        np.testing.assert_array_equal(file["arr_0"], images[[0, 2, 4, 7, 9, 11]])
        assert file["mu"].dtype == np.float32 and file["sigma"].dtype == np.float64
        statistics = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    data = open_images(str(tmp_path / "images"))
    batches = features.read(data, 5, range(12))
    found = features.extract(batches, features.inception_features(stand_in), "cpu")
    for key, value in statistics.items():
        np.testing.assert_array_equal(value, found[key])

    # 1. statistics of all twelve images come from the file, precision and recall from its six images
    args = ["--batch-size", 5, tmp_path / "ref.npz", tmp_path / "s.npz"]
    stored = figures(tmp_path, *args)
    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed[-6:] == ["Inception Score", "FID", "sFID", "Precision", "Recall", "inception_score_std"]
    assert stored["ref"]["statistics"] == "stored" and stored["samples"]["statistics"] == "computed"
    assert any("s.npz: 10 images" in note and "biased" in note for note in stored["notes"])
    assert any("of 12 images" in note for note in stored["notes"])

    # 2. statistics alone, as pytorch-fid writes them, and with sFID's: what needs images is left out
    for name, keys, allowed in (("fid", ("mu", "sigma"), {"fid"}),
                                ("both", tuple(statistics), {"fid", "sfid"})):
        np.savez(tmp_path / f"{name}.npz", **{key: statistics[key] for key in keys})
        alone = figures(tmp_path, *args[:-2], tmp_path / f"{name}.npz", tmp_path / "s.npz")
        assert {n for n in FIVE if n in alone} == {"inception_score", *allowed}
        assert all(alone[n] == stored[n] for n in (*allowed, "inception_score"))
        assert any("no precision, recall" in note for note in alone["notes"])
        assert ("no mu_s, so no sFID" in " ".join(alone["notes"])) == (name == "fid")


def test_the_json_proves_the_number(tmp_path, stand_in):
    np.savez(tmp_path / "r.npz", pictures(8))
    np.savez(tmp_path / "s.npz", pictures(9, 1), np.arange(9), protocol=np.array('{"mode": "sde"}'))
    found = figures(tmp_path, "--exact", tmp_path / "r.npz", tmp_path / "s.npz")
    assert found["samples"]["images"] == 9 and found["ref"]["images"] == 8
    assert found["samples"]["protocol"] == {"mode": "sde"}
    assert found["samples"]["sha256"] == files.sha256(tmp_path / "s.npz")
    assert found["weights"]["inception"] == {"path": stand_in.path, "sha256": stand_in.sha256}
    assert any("not the FID Inception" in note for note in found["notes"])
    assert any("s.npz: sorted by class" in note for note in found["notes"])
    assert found["versions"]["torch"] == torch.__version__ and found["device"]
    assert found["settings"]["exact"] is True and found["processes"] == 1
    swapped = figures(tmp_path, tmp_path / "s.npz", tmp_path / "r.npz")
    assert swapped["fid"] == pytest.approx(found["fid"], rel=1e-6)
    assert not any("sorted" in note for note in swapped["notes"])      # without labels nobody knows


def test_two_processes_give_the_figures_of_one(tmp_path):
    np.savez(tmp_path / "r.npz", pictures(45))
    # 5 batches: the second process is left without one at the end
    np.savez(tmp_path / "s.npz", pictures(23, 1))
    args = [*HOG, "--batch-size", 5, tmp_path / "r.npz", tmp_path / "s.npz"]
    one = figures(tmp_path, *args)
    processes.run_two("evaluate_fid", [*args, "--json", tmp_path / "two.json"], tmp_path / "log")
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["fd_hog"] == pytest.approx(one["fd_hog"], rel=1e-9)  # threads of the two runs may differ
    assert two["ref"]["sha256"] == one["ref"]["sha256"] and two["processes"] == 2
    assert (tmp_path / "log").read_text().count("FD-hog") == 1


# ---------------------------------------------------------------- bad input: one line, exit code 2

GOOD, STATISTICS = pictures(8), {"mu": np.zeros(2048), "sigma": np.eye(2048)}
BAD_NPZ = {     # its arrays, and a word that the error contains
    "float": ({"arr_0": GOOD.astype(np.float32)}, "float32"),
    "nchw": ({"arr_0": GOOD.transpose(0, 3, 1, 2).copy()}, "[8, 3, 32, 32]"),
    "few": ({"arr_0": GOOD[:3]}, "3 images are too few"),
    "wrong_mu": ({"arr_0": GOOD} | STATISTICS | {"mu": np.zeros(192)}, "mu"),
    "mu_only": ({"mu": np.zeros(2048)}, "sigma")}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_bad_npz(tmp_path, capsys, name):
    arrays, word = BAD_NPZ[name]
    np.savez(tmp_path / "good.npz", GOOD)
    np.savez(tmp_path / f"{name}.npz", **arrays)
    pair = tmp_path / f"{name}.npz", tmp_path / "good.npz"
    for paths in (pair, pair[::-1]):
        line = rejected(capsys, "--inception-weights", "gone.pth", *paths)
        assert word in line and f"{name}.npz" in line
    np.savez(tmp_path / "statistics.npz", **STATISTICS)     # they are not of HOG's features
    assert "0 images" in rejected(capsys, *HOG, tmp_path / "statistics.npz", tmp_path / "good.npz")


def test_outputs_are_checked_before_any_work(tmp_path, capsys):
    """Nothing is computed: the weights, which are asked for later, do not exist."""
    good, late = tmp_path / "good.npz", ["--inception-weights", tmp_path / "gone.pth"]
    np.savez(good, pictures(8))
    assert "would be replaced" in rejected(capsys, *late, "--save-ref", good, good)
    assert "would be replaced" in rejected(capsys, *late, "--json", good, good, good)
    assert "cannot be written" in rejected(capsys, *late, "--json", good / "x.json", good, good)
    assert "is a folder" in rejected(capsys, *late, "--json", tmp_path, good, good)


def test_bad_inputs_and_settings(tmp_path, capsys, monkeypatch):
    good = tmp_path / "good.npz"
    np.savez(good, pictures(8))
    assert "--save-ref" in rejected(capsys, good)
    assert "--save-ref" in rejected(capsys, *HOG, "--save-ref", tmp_path / "ref.npz", good)
    assert "gone.npz" in rejected(capsys, *HOG, good, tmp_path / "gone.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-5000])
    assert "cut.npz" in rejected(capsys, *HOG, tmp_path / "cut.npz", good)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("hello")
    line = rejected(capsys, *HOG, good, tmp_path / "text")
    assert "a.png" in line and "--skip-corrupt" not in line     # a flag of training
    assert "gone.pth" in rejected(capsys, "--inception-weights", tmp_path / "gone.pth", good, good)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert "another architecture" in rejected(capsys, "--inception-weights", tmp_path / "other.pth", good,
                                              good)
    path = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    files.save(FIDInception().state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "not the FID Inception weights" in rejected(capsys, good, good)
    np.savez(tmp_path / "wide.npz", pictures(8, 0, 64))
    assert "one size" in rejected(capsys, *HOG, good, tmp_path / "wide.npz")
