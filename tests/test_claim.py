"""claim.py: CLAIM.md has the figures of the committed results; and the parts that need no training."""
import json
import time
import zipfile
from types import SimpleNamespace

import claim
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT

from models.encoders import load_encoders
from models.runtime import files

TABLES = {"shapes": (claim.latents, claim.table, claim.claims),
          "shapes-noise": (claim.latents, claim.table),
          "shapes-trained": (claim.latents, claim.table),
          "shapes-trained-6400": (claim.table,),
          "shapes-hog": (claim.table,), "cifar10": (claim.table,)}


@pytest.mark.parametrize("name", TABLES)
def test_the_account_shows_the_figures_of_the_committed_results(name):
    results = json.loads((ROOT / "tests" / "data" / f"claim-{name}.json").read_text())
    account = (ROOT / "tests" / "CLAIM.md").read_text()
    for table in TABLES[name]:
        assert table(results) in account, f"CLAIM.md: put what claim.{table.__name__} gives for {name}"
    setting = claim.SETTINGS[name.removesuffix("-6400")] | ({"steps": 6400} if "-6400" in name else {})
    assert results["setting"] == setting, "made with other settings than the script's"


def test_the_target_of_the_shapes_is_one_of_timm_s_models_here(tmp_path):
    model = timm.create_model("shapes_vit_patch4_16", num_classes=16)
    files.save(model.state_dict(), str(tmp_path / "target.pt"))
    encoder, = load_encoders("shapes_vit_patch4_16", str(tmp_path / "target.pt"), 16)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(encoder(images), model.eval().forward_features(images / 127.5 - 1))
    assert encoder(images).shape == (2, 16, 96)


def test_a_linear_target_is_read_off_the_latents_and_less_so_under_noise():
    """8 channels of which 2 carry everything; the target is linear in one of these two."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(60, 2, 4, 4, generator=random)
    z = torch.cat([z, z, z, z], 1)
    vae = SimpleNamespace(encode=lambda images: SimpleNamespace(mean=images))
    tokens = (z[:, :1] * torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)).flatten(2).mT
    found = claim.readout(vae, z, tokens)
    assert found["readout"] == pytest.approx(1, abs=1e-6)
    assert 0.5 < found["readout_half"] < 0.97
    assert found["rank"] == pytest.approx(2, abs=0.05)


def test_steps_that_end_between_checkpoints_are_rejected(tmp_path, capsys):
    for steps in ("100", "0", "-400"):
        with pytest.raises(SystemExit):
            claim.main(["--setting", "shapes", "--out", str(tmp_path), "--steps", steps])
        assert "take a multiple of 400" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_steps_to_a_distance_are_read_off_the_line_between_checkpoints():
    points = [(100, 9.0), (200, 5.0), (300, 6.0), (400, 2.0)]
    assert claim.steps_to(points, 7.0) == 150
    assert claim.steps_to(points, 4.0) == 350
    assert claim.steps_to(points, 10.0) == 100
    assert claim.steps_to(points, 1.0) is None


def test_agreement_asks_the_nearest_images():
    random = np.random.default_rng(0)
    known_labels = np.arange(60) % 3
    known = np.eye(3)[known_labels] + 0.1 * random.normal(size=(60, 3))
    rows, labels = np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 0])
    assert claim.agreement(rows, labels, known, known_labels) == 0.75


def test_shapes_are_the_same_whenever_they_are_drawn(tmp_path):
    for name in ("a.zip", "b.zip"):
        claim.write_shapes(tmp_path / name, 12, 3, 16)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_part_of_the_photos_has_all_classes_alike(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("b/2.png", "a/1.png", "b/1.png", "a/4.png", "a/2.png", "b/3.png", "a/3.png", "b/4.png"):
            archive.writestr(name, name)
    claim.take_some(tmp_path / "all.zip", tmp_path / "some.zip", 4)
    with zipfile.ZipFile(tmp_path / "some.zip") as archive:
        assert archive.namelist() == ["a/1.png", "a/3.png", "b/1.png", "b/3.png"]
        assert archive.read("b/3.png") == b"b/3.png"


def test_a_run_that_fails_or_outlives_the_budget_ends_the_experiment(tmp_path):
    runner = claim.Runner(tmp_path, minutes=1)
    assert runner.call(lambda: print("fine"), tmp_path / "log") < 5
    with pytest.raises(SystemExit, match="cannot go on\n.*log is"):
        runner.call(lambda: exit("cannot go on"), tmp_path / "log")
    runner.deadline = time.monotonic() + 0.1
    with pytest.raises(claim.OutOfTime):
        runner.call(lambda: time.sleep(60), tmp_path / "log")
    with pytest.raises(claim.OutOfTime):
        runner.call(lambda: print("never"), tmp_path / "log")
    assert "never" not in (tmp_path / "log").read_text()


def test_a_run_whose_training_is_not_through_is_left_out_of_the_results(tmp_path):
    setting = claim.SETTINGS["shapes-trained"]
    np.savez(tmp_path / "reference.npz", floor=1.0, agreement=0.5)
    for seed, done in ((0, True), (1, False)):
        run = claim.run_folder(tmp_path, "REPA", seed)
        run.mkdir(parents=True)
        for name in (setting["every"], "last"):
            files.save_json({"distance": 2.0, "agreement": 0.25}, run / f"score-{name}.json")
        if done:
            files.save_json({"seconds": 3.0}, run / "done.json")
    for part, step in (("vae", 24000), ("vae-last", 6000)):     # this setting's VAE is trained in two parts
        (tmp_path / "runs" / part).mkdir()
        files.save_json({"seconds": 4.0}, tmp_path / "runs" / part / "done.json")
        files.save_json({"rfid": float(step)}, tmp_path / "runs" / part / f"vae-{step}.json")
    job = SimpleNamespace(folder=tmp_path, setting=setting, reference=tmp_path / "reference.npz")
    found = claim.collect(job)
    assert list(found["runs"]["REPA"]) == ["0"]
    run = found["runs"]["REPA"]["0"]
    assert "REPA" not in claim.table(found)     # its last step has no score
    run["scores"] = {str(step): run["last"] for step in claim.checkpoint_steps(setting)}
    assert "| REPA | 1 |" in claim.table(found)
    del run["last"]                             # not yet scored with more samples
    assert "REPA" not in claim.table(found)
    assert list(found["vae_by_step"]) == ["24000", "30000"] and found["vae_seconds"] == 8
    assert found["vae"] == {"rfid": 6000}
