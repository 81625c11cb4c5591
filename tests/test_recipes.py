"""Later work's flags and the paper's ablations: their mathematics, what they train, what a file keeps of them."""
import processes
import pytest
import torch
import torch.nn.functional as F
from test_train import TINY, assert_same, final_state, metrics, run, tiny_batch, tiny_nets

import train_repae_e as train
from models.encoders import HOG
from models.losses import spatial_norm
from models.runtime import files, flops, vae_files, weights
from models.sit import ConvProjector, SiT


# ---------------------------------------------------------------- iREPA

def test_the_conv_projector_weighs_each_token_with_its_eight_neighbours(close):
    torch.manual_seed(0)
    projector = ConvProjector(5, 3)
    tokens = torch.randn(2, 16, 5)
    padded = F.pad(tokens.view(2, 4, 4, 5), (0, 0, 1, 1, 1, 1))       # zeros around the grid
    expected = projector.bias + sum(padded[:, dy:dy + 4, dx:dx + 4] @ projector.weight[:, :, dy, dx].T
                                    for dy in range(3) for dx in range(3))
    close(projector(tokens), expected.reshape(2, 16, 3))


def test_the_conv_projector_changes_nothing_else_of_the_state_dict():
    def shapes(kind):
        sit = SiT(input_size=8, hidden_size=16, depth=2, num_heads=2, encoder_depth=1, z_dims=[3, 4],
                  projector_dim=8, projector=kind)
        return {name: tuple(value.shape) for name, value in sit.state_dict().items()}
    mlp, conv = shapes("mlp"), shapes("conv")
    assert {k: v for k, v in conv.items() if k.startswith("projectors.")} == {
        "projectors.0.weight": (3, 16, 3, 3), "projectors.0.bias": (3,),
        "projectors.1.weight": (4, 16, 3, 3), "projectors.1.bias": (4,)}
    others = [name for name in mlp if not name.startswith("projectors.")]
    assert [(name, conv[name]) for name in conv if not name.startswith("projectors.")] == \
        [(name, mlp[name]) for name in others]
    with pytest.raises(ValueError, match="linear"):
        shapes("linear")


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
    close(batch.zs[0], spatial_norm(HOG(32)(images), 0.8))


# ---------------------------------------------------------------- HASTE

@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    """A VAE with its statistics beside it."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(1)
    files.save(train.VAE_models["f4d4"]().state_dict(), folder / "vae.pt")
    files.save({"latents_scale": torch.tensor([0.5, 1.0, 2.0, 4.0]).view(1, 4, 1, 1),
                "latents_bias": torch.tensor([0.0, 1.0, -1.0, 2.0]).view(1, 4, 1, 1)},
               folder / "vae-latents-stats.pt")
    return folder / "vae.pt"


@pytest.fixture
def encoded(monkeypatch):
    """The batches that the encoder has seen."""
    seen, forward = [], HOG.forward

    def watched(self, images):
        seen.append(len(images))
        return forward(self, images)
    monkeypatch.setattr(HOG, "forward", watched)
    return seen


def test_alignment_ends_after_its_last_step(tmp_path, encoded):
    """From then on no encoder, no loss, no projector, no SiT in the VAE's update; the rest goes on learning.

    Two processes do the same as one, and so does a run that is continued there, to the bit.
    """
    flags = ("--projector", "conv", "--proj-until", "1", "--disc-weight", "0", "--max-train-steps", "3",
             "--checkpointing-steps", "1", "--learning-rate", "1e-4", "--vae-learning-rate", "1e-4")
    folder = run(tmp_path, *flags)
    assert encoded == [4]
    lines = metrics(folder)
    assert [len({"proj_loss", "vae_align_loss"} & set(line)) for line in lines] == [2, 0, 0]
    first, third = (final_state(folder, step) for step in (1, 3))
    for key, still in (("model", ("projectors.", "pos_embed")), ("vae", ())):
        same = {name for name, value in first[key].items() if torch.equal(value, third[key][name])}
        assert same == {name for name in first[key] if name.startswith(still)}

    (folder / "checkpoints" / "0000003.pt").unlink()
    run(tmp_path, *flags)
    assert_same(third, final_state(folder, 3))

    both = [*TINY, *flags, "--output-dir", tmp_path / "two"]
    processes.run_two("train_repae_e", both, tmp_path / "log")
    for one, line in zip(lines, metrics(tmp_path / "two" / "demo"), strict=True):
        for name in one:
            if name.endswith("loss"):
                assert line[name] == pytest.approx(one[name], abs=1e-5), (one["step"], name)


def test_what_alignment_cost_is_no_longer_counted():
    nets, args = tiny_nets("--disc-weight", "0")

    def count():
        return flops.step_flops(args, nets, lambda: train.build_sit(args, nets.vae, nets.encoders))
    before = count()
    train.end_alignment(nets)
    assert count() < before
    batch = tiny_batch(nets, args)
    with torch.no_grad():
        assert nets.sit(batch.noise, batch.t, batch.labels)[1] == []


# ---------------------------------------------------------------- no batch norm

def test_a_fixed_scale_is_the_checkpoints_own(tmp_path, vae_file):
    """The VAE learns, the scale stays that of its file: what a sampler, an export and a second stage find."""
    folder = run(tmp_path, "--fixed-latents-stats", "--vae-ckpt", str(vae_file), "--max-train-steps", "2")
    state = final_state(folder, 2)
    name = "encoder.conv_in.weight"
    assert not torch.equal(state["vae"][name], files.load(vae_file)[name])
    scale, bias = vae_files.load_stats_file(str(vae_file.with_name("vae-latents-stats.pt")))
    path = folder / "checkpoints" / "0000002.pt"
    sit, _, settings, _ = weights.load(str(path))
    for found in (sit.latents_stats(), vae_files.open_vae(str(path))[2]):
        assert torch.equal(found[0], scale) and torch.equal(found[1], bias)
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


def test_a_fixed_scale_of_a_random_vae_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--fixed-latents-stats")
    assert stop.value.code == 2 and "--latents-stats" in capsys.readouterr().err
