"""Flags of later work and of the paper's ablations, their mathematics; and the README's recipes."""
import os
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_train import TINY, final_state, run, tiny_batch, tiny_nets

import sample_ddp
import train_repae_e as train
from models.encoders import HOG, timm_config
from models.losses import spatial_norm
from models.runtime import files, trainer, vae_files, weights
from models.runtime.data import open_images
from models.sit import ConvProjector


# ---------------------------------------------------------------- iREPA

def test_the_conv_projector_weighs_each_token_with_its_eight_neighbours(close):
    torch.manual_seed(0)
    projector = ConvProjector(5, 3)
    tokens = torch.randn(2, 16, 5)
    padded = F.pad(tokens.view(2, 4, 4, 5), (0, 0, 1, 1, 1, 1))       # zeros around the grid
    expected = projector.bias + sum(padded[:, dy:dy + 4, dx:dx + 4] @ projector.weight[:, :, dy, dx].T
                                    for dy in range(3) for dx in range(3))
    close(projector(tokens), expected.reshape(2, 16, 3))


def test_spatial_norm_removes_the_mean_over_tokens_and_scales_their_spread_to_one(close):
    tokens = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    close(spatial_norm(tokens).mean(1), torch.zeros(2, 5))
    close(spatial_norm(tokens).std(1), torch.ones(2, 5))
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True)
    close(spatial_norm(tokens, 0.6), (tokens - 0.6 * mean) / std)
    assert spatial_norm(torch.ones(1, 4, 2, dtype=torch.bfloat16)).isfinite().all()    # no spread at all


def test_spatial_norm_is_what_both_updates_align_with(close):
    nets, args = tiny_nets("--spatial-norm", "0.8")
    batch = tiny_batch(nets, args)
    images = ((batch.images + 1) * 127.5).round().to(torch.uint8)
    close(batch.zs[0], spatial_norm(HOG(32)(images).bfloat16(), 0.8))


# ---------------------------------------------------------------- no batch norm

@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    """A VAE with its statistics next to it."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(1)
    files.save(train.VAE_models["f4d4"]().state_dict(), folder / "vae.pt")
    files.save({"latents_scale": torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1),
                "latents_bias": torch.tensor([0.0, 1.0, -1.0, 2.0]).view(1, 4, 1, 1)},
               folder / "vae-latents-stats.pt")
    return folder / "vae.pt"


def test_a_fixed_scale_is_the_checkpoints_own(tmp_path, vae_file):
    """The VAE learns, the scale stays that of its file: what a sampler, an export and a second stage find.

    The sampler also takes the other flags' checkpoints: it leaves projectors out, whatever their kind.
    """
    folder = run(tmp_path, "--fixed-latents-stats", "--vae-ckpt", str(vae_file), "--max-train-steps", "2",
                 "--projector", "conv")
    state = final_state(folder, 2)
    name = "encoder.conv_in.weight"
    assert not torch.equal(state["vae"][name], files.load(vae_file)[name])
    scale, bias = vae_files.load_stats(str(vae_file.with_name("vae-latents-stats.pt")), 4)
    path = folder / "checkpoints" / "0000002.pt"
    sit, _, settings, _ = weights.load(str(path))
    for found in (sit.latents_stats(), vae_files.open_vae(str(path))[2]):
        assert torch.equal(found[0], scale) and torch.equal(found[1], bias)
    sample_ddp.main(["--ckpt", str(path), "--npz", str(tmp_path / "s.npz"), "--num-fid-samples", "2",
                     "--num-steps", "2"])
    assert (tmp_path / "s.npz").exists() and "projectors.0.weight" in state["ema"]
    assert settings["fixed_latents_stats"] and state["model"]["bn.num_batches_tracked"] == 0


def test_a_fixed_scale_divides_every_batch_alike(close):
    nets, args = tiny_nets("--fixed-latents-stats")
    nets.sit.bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    nets.sit.bn.running_var.fill_(0.25)
    seen, bn = [], nets.sit.normalize
    nets.sit.normalize = lambda z: seen.append((z, bn(z))) or seen[-1][1]
    train.train_step(nets, args, tiny_batch(nets, args), use_gan=False)
    assert len(seen) == 2       # the VAE's update and the SiT's
    for z, u in seen:
        close(u, (z - torch.arange(1, 5).view(4, 1, 1)) / (0.25 + 1e-4) ** 0.5)
    assert nets.sit.bn.num_batches_tracked == 0


# ---------------------------------------------------------------- the README's recipes

def readme_recipes():
    """{RUN: (FLAGS, [(step, flags for sample_ddp.py)] of its published figures)} of the tables in the README
    and in models/RECIPES.md: rows of RUN, FLAGS, up to two columns of figures, ours."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("\n## Recipes and published figures\n")[1].split("\n## ")[0]
    recipes = {}
    for line in [*section.splitlines(), *(ROOT / "models" / "RECIPES.md").read_text().splitlines()]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        name, flags = (re.match("`(.*?)`", cell)[1] for cell in cells[:2])
        assert name not in recipes, f"two rows {name}"
        figures = []
        for cell in cells[2:-1] if len(cells) > 3 else ():
            guidance = "".join(re.findall("`(.*)`", cell)).split()
            for step, unit, equal in re.findall(r"(\d+)([kM]): [\d.]+(=?)", cell):
                step = int(step) * {"k": 1000, "M": 1_000_000}[unit]
                figures.append((step, guidance + ["--label-sampling", "equal"] * bool(equal)))
        recipes[name] = (flags.split(), figures)
    return recipes


RECIPES = readme_recipes()
STEPS, DATA = int(os.environ.get("RECIPE_STEPS", 2)), os.environ.get("RECIPE_DATA", "shapes")

# What training changes, for every row of the README. A frozen VAE's statistics are measured before, and stay.
CHANGED = {
    "sit": "sit sit-vavae sit-e2e-vavae",
    "sit projectors": """repa repa-vavae repa-e2e-vavae e2e-flux l-repa b-repa l-repa-jepa l-repa-clip
        l-repa-dinov2-l l-repa-invae l-repa-vavae l-repa-512""",
    "sit projectors statistics vae-encoder vae-decoder discriminator": """repae-sdvae repae-invae repae-vavae
        repae-scratch l-repae b-repae l-repae-jepa l-repae-clip l-repae-dinov2-l l-repae-invae l-repae-vavae
        l-depth-6 l-depth-10 l-no-stop-gradient l-repae-512 l2 irepa flux sd35 sd35-512
        slow-statistics flowers""",
    "sit projectors vae-encoder vae-decoder discriminator": "l-no-batch-norm",
    "sit projectors statistics vae-encoder vae-decoder": "l-no-gan",
    "sit statistics vae-encoder vae-decoder discriminator": "naive",
}


def small(name, vae_file):
    """FLAGS of a recipe, with all that is small that is no part of its idea."""
    flags = RECIPES[name][0]
    random_vae = train.parse_args(flags).vae_ckpt == "none"
    return [*TINY, "--disc-start", "0", *flags, "--preset", "demo", "--data-dir", DATA, "--resolution", "32",
            "--num-classes", "10", "--model", "SiT-Ti/4", "--encoder-depth", "3", "--encoder", "hog",
            "--vae", "f4d4", "--vae-ckpt", "none" if random_vae else str(vae_file), "--disc-ckpt", "none",
            "--max-train-steps", str(STEPS)]


def groups(nets):
    """{group of the CHANGED table: {name: tensor}}, copied."""
    found = {}
    for net, module in (("sit", nets.sit), ("vae", nets.vae), ("discriminator", nets.disc)):
        for name, value in module.state_dict().items() if module is not None else ():
            first = name.split(".")[0]
            group = {"projectors": "projectors", "bn": "statistics", "encoder": "vae-encoder",
                     "quant_conv": "vae-encoder", "decoder": "vae-decoder", "post_quant_conv": "vae-decoder"}
            if value.is_floating_point() and name != "pos_embed":
                found.setdefault(group.get(first, net), {})[name] = value.clone()
    return found


def kinds_of_recipes():
    """[(names of rows that are the same but for sizes and files, the groups that change)]."""
    rows = {name: changed for changed, names in CHANGED.items() for name in names.split()}
    assert sorted(rows) == sorted(RECIPES), "CHANGED has other rows than the README"
    kinds = {}
    for name in RECIPES:
        kinds.setdefault(str(vars(train.parse_args(small(name, "vae.pt")))), []).append(name)
    return [(names, rows[names[0]]) for names in kinds.values() if len({rows[name] for name in names}) == 1]


KINDS = kinds_of_recipes()


def test_every_recipe_has_its_kind():
    assert sorted(name for names, _ in KINDS for name in names) == sorted(RECIPES)


@pytest.mark.parametrize("names, changed", KINDS, ids=[names[0] for names, _ in KINDS])
def test_a_recipe_trains_what_its_row_says(names, changed, vae_file):
    """The suite makes 2 steps on drawn shapes; RECIPE_STEPS and RECIPE_DATA ask for more, on other images."""
    args = train.parse_args(small(names[0], vae_file))
    train.check_settings(args, 1)
    dataset = open_images(args.data_dir, args.resolution, args.hflip, args.seed)
    vae_state, stats = train.load_vae(args, resumed=False)
    nets = train.build_networks(args, torch.device("cpu"), vae_state)
    trainer.prepare(nets, args)
    train.set_latents_stats(nets, args, dataset, stats)
    before, loader = groups(nets), trainer.data_loader(args, dataset, nets.device, 0, workers=0)
    for step in range(1, STEPS + 1):
        images, labels = next(loader)
        values, skip = train.train_step(nets, args, train.make_batch(nets, args, step, images, labels))
        assert skip == 0 and all(value.isfinite() for value in values.values())
    moved = {group: sum(not torch.equal(value, before[group][name]) for name, value in tensors.items())
             for group, tensors in groups(nets).items()}
    assert {group for group, number in moved.items() if number} == set(changed.split()), moved
    if STEPS >= 20:     # by then nothing waits for another weight to leave zero
        assert {group: len(before[group]) for group in changed.split()} == \
            {group: moved[group] for group in changed.split()}


@pytest.fixture
def no_downloads(monkeypatch):
    """Weights on the hub are taken to be there: of the architecture that the name says, empty."""
    def open_vae(source, name=None, stats_file=None):
        found = "f16d32" if source in ("REPA-E/invae", "REPA-E/vavae", "REPA-E/e2e-vavae") else \
            "f8d4" if source == "REPA-E/sdvae" else "f8d16"
        assert name == found, f"{source} is no {name}"
        return found, {}, None, {}

    def discriminator(source, vae_name):
        assert source == "none" or source in weights.WITH_DISCRIMINATOR

    monkeypatch.setattr(vae_files, "open_vae", open_vae)
    monkeypatch.setattr(weights, "discriminator", discriminator)


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_are_sound(name, tmp_path, monkeypatch, no_downloads):
    """The training one at full size, up to data and weights; the sampling ones up to the checkpoint."""
    flags, figures = RECIPES[name]
    args = train.parse_args(["--exp-name", name, *flags])
    assert args.data_dir == ("flowers.zip" if name == "flowers" else "data/imagenet/train")
    train.check_settings(args, 8)
    train.load_vae(args, resumed=False)
    if args.disc_weight > 0 and not args.freeze_vae:
        weights.discriminator(args.disc_ckpt, args.vae)
    for encoder in args.encoder.split(","):
        timm_config(encoder)

    monkeypatch.chdir(tmp_path)
    for step, sampling in figures:
        assert step <= args.max_train_steps and step % args.checkpointing_steps == 0, f"no checkpoint {step}"
        checkpoint = tmp_path / "exps" / name / "checkpoints" / f"{step:07d}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        asked = sample_ddp.parse_args(["--exp-path", f"exps/{name}", "--train-steps", str(step),
                                       "--npz", f"samples/{name}.npz", *sampling])
        sample_ddp.check_args(asked)
        assert (tmp_path / asked.ckpt).samefile(checkpoint) and asked.num_fid_samples == 50000
        assert (asked.mode, asked.num_steps) == ("sde", 250)
    if figures:
        assert max(figures)[0] == args.max_train_steps, "the run is longer than its last figure"
