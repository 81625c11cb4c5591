"""The exported VAE where people use VAEs: in the pipelines of diffusers, built small with random weights.

Skips without diffusers; to run them:

    .venv/bin/pip install -q diffusers transformers && .venv/bin/python -m pytest -q tests/test_diffusers.py
"""
import json

import pytest
import torch
from fill import fill_

import finetune_vae as finetune
from models.runtime import files, vae_files
from models.vae import VAE_models

diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
pytest.importorskip("transformers", reason="needs the package transformers")

# sd-vae-ft-mse states none, Flux's VAE these.
NUMBERS = {"f8d4": {}, "f8d16": {"scaling_factor": 0.3611, "shift_factor": 0.1159}}


@pytest.fixture(scope="module", params=NUMBERS)
def vaes(request, tmp_path_factory):
    """Folders for diffusers by kind.

    "original" is a VAE as others publish it, and "exported" what --export makes of it; "refined", its decoder
    changed as a refinement with a frozen encoder does, under the original's config, and "refined-exported"
    what --export makes of that refinement's training checkpoint.
    """
    name, folder = request.param, tmp_path_factory.mktemp("vae")
    vae = fill_(VAE_models[name]()).eval()
    # random weights give pictures far beyond [-1, 1], which pipelines clip
    vae.decoder.conv_out.weight.data *= 0.3
    vae.decoder.conv_out.bias.data *= 0.3
    refined = {k: v * 1.1 if k.startswith("decoder.mid") else v for k, v in vae.state_dict().items()}
    for kind, state in (("original", vae.state_dict()), ("refined", refined)):
        peer = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=vae.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=name == "f8d4", use_post_quant_conv=name == "f8d4", sample_size=64,
            **NUMBERS[name])
        peer.load_state_dict(vae_files.to_diffusers(state))
        peer.save_pretrained(folder / kind)
        if not NUMBERS[name]:
            config = json.loads((folder / kind / "config.json").read_text())
            for key in ("scaling_factor", "shift_factor", "force_upcast"):
                del config[key]
            (folder / kind / "config.json").write_text(json.dumps(config))
    scale, bias = vae_files.open_vae(str(folder / "original"), name)[2]
    files.save({"vae_ema": refined, "vae": refined, "latents_scale": scale, "latents_bias": bias, "steps": 1,
                "args": {}, "source_config": vae_files.open_vae(str(folder / "original"))[3]},
               folder / "0000001.pt")
    finetune.main(["--ckpt", str(folder / "original"), "--export", str(folder / "exported")])
    finetune.main(["--ckpt", str(folder / "0000001.pt"), "--export", str(folder / "refined-exported")])
    return {k: str(folder / k) for k in ("original", "exported", "refined", "refined-exported")}


def dit(vae):
    channels = vae.config.latent_channels
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, patch_size=2,
        in_channels=channels, out_channels=2 * channels, num_embeds_ada_norm=1000)
    pipe = diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler())
    return lambda **more: pipe([3], guidance_scale=1.0, **more)


def prompt():
    return {"prompt_embeds": torch.full((1, 5, 32), 0.1), "pooled_prompt_embeds": torch.full((1, 24), 0.1),
            "guidance_scale": 1.0, "height": 32, "width": 32}


def sd3(vae):
    channels = vae.config.latent_channels
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        in_channels=channels, out_channels=channels, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=24)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(network, scheduler, vae, *[None] * 6)
    return lambda **more: pipe(**prompt(), **more)


def flux(vae):
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * vae.config.latent_channels, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, network)
    return lambda **more: pipe(**prompt(), **more)


@pytest.mark.parametrize("pipeline", [dit, sd3, flux])
def test_pipelines_decode_as_with_the_original(vaes, pipeline, close):
    """The same network, noise and steps: equal pictures. A VAE without shift_factor as its publisher wrote it
    makes SD3's and Flux's pipelines fail; the export has a number there, so it is compared with the original
    given that number."""
    def pictures(folder):
        vae = diffusers.AutoencoderKL.from_pretrained(folder)
        if vae.config.shift_factor is None and pipeline is not dit:
            assert "exported" not in folder
            vae.register_to_config(shift_factor=0.0)
        torch.manual_seed(0)  # of the networks' weights
        run = pipeline(vae)
        generator = torch.Generator().manual_seed(1)
        return torch.from_numpy(run(generator=generator, num_inference_steps=2, output_type="np").images)
    original, refined = pictures(vaes["original"]), pictures(vaes["refined"])
    assert original.std() > 0.02 and ((original > 0) & (original < 1)).double().mean() > 0.9  # not clipped
    close(pictures(vaes["exported"]), original, 1e-5)
    close(pictures(vaes["refined-exported"]), refined, 1e-5)
    assert (refined - original).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["f8d4", "f16d32", "f8d16", "f16d16"])
def test_networks_agree(name, tmp_path, close):
    vae = fill_(VAE_models[name]()).eval()
    channels = vae.latent_channels
    stats = tuple(torch.linspace(a, b, channels).view(1, -1, 1, 1) for a, b in ((0.5, 2), (-1, 1)))
    vae_files.export_vae(tmp_path / "vae", vae.state_dict(), stats)
    peer, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    z = torch.randn(1, channels, 64 // vae.downsample, 64 // vae.downsample)
    with torch.no_grad():
        close(peer.decode(z).sample, vae.decode(z), atol=1e-5, rtol=1e-5)
        close(peer.encode(x).latent_dist.mean, vae.encode(x).mean, atol=1e-5, rtol=1e-5)
    assert peer.config.latents_mean == pytest.approx(stats[1].flatten().tolist())
    peer.save_pretrained(tmp_path / "again")
    _, state, again, _ = vae_files.open_vae(str(tmp_path / "again"))
    assert all(torch.equal(state[k], v) for k, v in vae.state_dict().items())
    close(again[0], stats[0])
