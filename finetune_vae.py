"""VAE-only stage of REPA-E (arXiv 2504.10483): refine the tuned VAE, measure VAEs side by side, export them.

    torchrun --nproc-per-node 8 finetune_vae.py --ckpt exps/run/checkpoints/0400000.pt         # the decoder alone
    torchrun --nproc-per-node 8 finetune_vae.py --ckpt none --vae f16d32 --train-encoder       # a VAE from scratch
    python finetune_vae.py --eval REPA-E/sdvae exps/run/checkpoints/0400000.pt --data-dir data/imagenet/val
    python finetune_vae.py --export out/e2e-vae --format diffusers --ckpt exps/run/checkpoints/0400000.pt

A VAE is named as everywhere here: a CompVis .pt, a diffusers folder, a training checkpoint of either script, or a hub
name. With the encoder frozen, latents stay bit for bit what they were, so every diffusion model trained on them stays
valid.
Run the same training command again and it continues from its newest checkpoint.
"""
import argparse
import copy
import importlib.util
import json
import math
import os
import sys
from types import SimpleNamespace

import torch

from models.runtime import distributed, files, runlog, trainer, vae_files, weights
from models.runtime.features import extract, inception_features, load_inception
from models.losses import proj_loss
from models.runtime.data import ImageError
from models.encoders import check_encoders, load_encoders
from models.runtime.flops import forward_flops, matmul_rate
from models.runtime.images import InputError
from models.losses import discriminator_loss, gan_loss, reconstruction_losses
from models.lpips import LPIPS
from models.vae import Posterior, ResnetBlock, VAE_models
from models.runtime.vae_report import TokenPairs, held_out_images, measure, picture

# What a run cannot change when it is continued.
FIXED_IN_A_RUN = ("ckpt", "vae", "train_encoder", "resolution", "batch_size", "seed")
EVAL_PIXELS = 16 * 256 ** 2  # pixels per process and batch of --eval
STATS_IMAGES = 4096  # images behind latent statistics that did not come with the VAE: 4 million positions at 256 px, f8
PRESETS = {
    "demo": dict(data_dir="shapes", resolution=32, ckpt="exps/demo/checkpoints/0000400.pt", perceptual_weight=0.0,
                 disc_weight=0.0, batch_size=32, max_train_steps=300, learning_rate=1e-3, ema_decay=0.98, num_workers=0,
                 log_every=25, sampling_steps=150, checkpointing_steps=150, metrics="psnr,ssim,latents,cknna",
                 encoder="hog"),
}
COLUMNS = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID", "spatial_variance": "spatial variance",
           "total_variation": "total variation", "cknna": "CKNNA"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, without the page of usage
    flag = trainer.flag
    data = parser.add_argument_group("data")
    flag(data, "--data-dir", None, "folder of class folders, a .zip of one, or 'shapes' (built in, drawn); with --eval "
         "any folder, .zip or .npz of held-out images; default: data/imagenet/train, with --eval data/imagenet/val")
    flag(data, "--resolution", 256, "side of the ADM centre crop in pixels")
    flag(data, "--hflip", False, "flip half of the images")
    flag(data, "--skip-corrupt", False, "replace and count files that are no images, instead of stopping")
    flag(data, "--num-workers", 8, "image decoding processes per training process")
    model = parser.add_argument_group("model")
    flag(model, "--ckpt", None, "VAE to refine or export: a path, a hub name, or none (from scratch)")
    flag(model, "--vae", None, "its architecture; default: read off --ckpt", choices=list(VAE_models))
    flag(model, "--train-encoder", False, "train the encoder too: latents change, diffusion models need retraining")
    flag(model, "--disc-ckpt", "auto", "discriminator weights: a path, a hub name, none, or auto (those of --ckpt)")
    flag(model, "--latents-stats", None, "file with latents_scale and latents_bias, where the VAE comes without")
    flag(model, "--encoder", "dinov2-vit-b", "encoder(s) to align latents with, or of CKNNA; hog needs no weights")
    flag(model, "--encoder-ckpt", None, "encoder weights on disk, comma-separated in the order of --encoder")
    loss = parser.add_argument_group("losses")
    flag(loss, "--reconstruction-weight", 1.0, "L1 weight")
    flag(loss, "--perceptual-weight", 1.0, "LPIPS weight; 0 needs no VGG weights")
    flag(loss, "--kl-weight", 1e-6, "KL weight; acts on the encoder only")
    flag(loss, "--disc-weight", 0.1, "GAN weight; 0 trains without a discriminator")
    flag(loss, "--adaptive-disc-weight", False, "multiply the GAN weight by VQGAN's ratio of last-layer gradients")
    flag(loss, "--disc-start", -1, "step from which the VAE sees the discriminator; -1: 0 if pretrained, else 5000")
    flag(loss, "--lecam-weight", 0.0, "LeCam regularisation of the discriminator")
    flag(loss, "--lecam-decay", 0.999, "of LeCam's average logits")
    flag(loss, "--vae-align-proj-coeff", 0.0, "weight of aligning projected latents with --encoder's tokens")
    optim = parser.add_argument_group("optimisation")
    flag(optim, "--batch-size", 256, "global batch: all processes and accumulation steps together")
    flag(optim, "--gradient-accumulation-steps", 1, "micro-batches per process; same result, less memory, more time")
    flag(optim, "--max-train-steps", 50000, "steps")
    flag(optim, "--learning-rate", 1e-4, "of the VAE, constant")
    flag(optim, "--disc-learning-rate", None, "of the discriminator; default: --learning-rate", type=float)
    flag(optim, "--adam-beta1", 0.9, "AdamW")
    flag(optim, "--adam-beta2", 0.999, "AdamW")
    flag(optim, "--adam-weight-decay", 0.0, "AdamW")
    flag(optim, "--adam-epsilon", 1e-8, "AdamW")
    flag(optim, "--max-grad-norm", 1.0, "clip each network's gradient to this norm")
    flag(optim, "--ema-decay", 0.999, "of the VAE's average, which is what other scripts and --export use")
    flag(optim, "--mixed-precision", "auto", "autocast type; auto: bf16 on GPU, no on CPU and with --eval",
         choices=["auto", "bf16", "fp16", "no"])
    flag(optim, "--compile", False, "torch.compile each block; convolutions in channels_last")
    flag(optim, "--grad-checkpoint", False, "recompute activations in the backward pass: less memory, more arithmetic")
    flag(optim, "--seed", 0, "of weights, data order and every draw")
    run = parser.add_argument_group("run")
    flag(run, "--preset", None, "set of defaults; explicit flags win", choices=list(PRESETS))
    flag(run, "--output-dir", "exps", "parent of the run folders")
    flag(run, "--exp-name", None, "name of the run folder; default: vae-decoder, vae-all or vae-eval")
    flag(run, "--checkpointing-steps", 5000, "steps between checkpoints; one is always written at the end")
    flag(run, "--keep-checkpoints", 3, "newest checkpoints kept; 0 keeps all")
    flag(run, "--sampling-steps", 2500, "steps between picture grids; 0 for none")
    flag(run, "--log-every", 100, "steps between log lines")
    flag(run, "--resume", "auto", "auto (newest whole checkpoint of the run folder), none, or a checkpoint file")
    flag(run, "--report-to", "none", "also log to", choices=["none", "tensorboard", "wandb"])
    flag(run, "--dry-run", False, "check all settings and stop")
    other = parser.add_argument_group("measuring and exporting, instead of training")
    flag(other, "--eval", None, "VAEs to measure side by side", nargs="+", metavar="VAE")
    flag(other, "--metrics", "psnr,ssim,lpips,rfid,latents", "comma-separated; lpips and rfid need weights; also cknna")
    flag(other, "--limit", None, "only the first so many images", type=int)
    flag(other, "--inception-weights", None, "pt_inception-2015-12-05-6726825d.pth for rFID, otherwise downloaded once")
    flag(other, "--model-ckpt", None, "training checkpoint of the SiT that CKNNA compares; default: each VAE's own")
    flag(other, "--export", None, "write the VAE of --ckpt into this new folder")
    flag(other, "--format", "diffusers", "of --export", choices=["diffusers", "compvis"])
    flag(other, "--force", False, "let --export replace an earlier export")
    return parser


def parse_args(argv=None):
    """Settings from the command line: explicit flags, over --preset, over the defaults."""
    parser = make_parser()
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    if args.exp_name is None:
        args.exp_name = "vae-eval" if args.eval else "vae-all" if args.train_encoder else "vae-decoder"
    if args.data_dir is None:
        args.data_dir = "data/imagenet/val" if args.eval else "data/imagenet/train"
    return args


# ------------------------------------------------------------------------------------------------- set-up of training

def load_vae(source, vae=None, stats_file=None):
    """(name of the architecture, state dict, statistics or None) of any VAE; ValueError if it is not of type `vae`.
    The statistics are those of `stats_file` if given."""
    state, stats = vae_files.load_vae_file(source)
    stats = vae_files.load_stats_file(stats_file) if stats_file else stats
    try:
        name = vae_files.vae_name(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if vae not in (None, name):
        raise ValueError(f"{source}: holds a VAE of type {name}, not --vae {vae}")
    with torch.device("meta"):
        files.check_state(VAE_models[name](), state, source)
    if stats is not None and stats[0].numel() != state["decoder.conv_in.weight"].shape[1]:
        raise ValueError(f"{stats_file or source}: latent statistics of {stats[0].numel()} channels, unlike the VAE")
    return name, state, stats


def check_settings(args, world_size, old_args=None):
    """All that can be checked before something heavy is built. Returns (dataset, VAE state or None, stats or None).

    old_args: those of the checkpoint that a run continues from; it holds all weights, so no other file is read.
    """
    trainer.check_numbers(args, world_size, fractions=("ema_decay", "lecam_decay"))
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(f"--report-to {args.report_to}: the package is not installed; pip install {args.report_to}")
    if args.vae_align_proj_coeff and not args.train_encoder:
        raise ValueError("--vae-align-proj-coeff acts on the encoder; it needs --train-encoder")
    if args.vae_align_proj_coeff:
        check_encoders(args.encoder, args.encoder_ckpt)
    state, stats = find_weights(args) if old_args is None else (None, None)
    if old_args is not None:
        args.disc_ckpt = old_args["disc_ckpt"]
        args.disc_start = old_args["disc_start"] if args.disc_start < 0 else args.disc_start
    check_resolution(args.resolution, args.vae)
    dataset = trainer.open_data(args)
    if len(dataset) < args.batch_size:
        raise ValueError(f"{args.data_dir}: {len(dataset)} images are fewer than one batch; lower --batch-size")
    return dataset, state, stats


def find_weights(args):
    """Settle --vae, --disc-ckpt and --disc-start by what --ckpt is. Returns (VAE state or None, stats or None)."""
    if args.ckpt is None:
        raise ValueError("name the VAE to refine with --ckpt; from scratch: --ckpt none --vae f16d32 --train-encoder")
    state, stats = None, None
    if args.ckpt == "none":
        if not args.train_encoder or args.vae is None:
            raise ValueError("--ckpt none makes a VAE from scratch: it needs --train-encoder and --vae")
    else:
        args.vae, state, stats = load_vae(args.ckpt, args.vae, args.latents_stats)
    if args.disc_ckpt == "auto":
        has_own = args.ckpt in ("REPA-E/sdvae", "REPA-E/invae", "REPA-E/vavae") or (
            os.path.isfile(args.ckpt) and "discriminator" in files.load(args.ckpt))
        args.disc_ckpt = args.ckpt if has_own else "none"
    if args.disc_start < 0:  # an untrained discriminator learns for a while before the VAE listens to it
        args.disc_start = 5000 if args.disc_ckpt == "none" else 0
    return state, stats


def check_resolution(resolution, vae):
    with torch.device("meta"):
        factor = VAE_models[vae]().downsample
    if resolution % factor:
        raise ValueError(f"--resolution {resolution} is not divisible by {factor}, the downsampling factor of {vae}")


class LatentProjectors(torch.nn.ModuleList):
    """Latents [B, C, h, w] to tokens [B, h * w, D_k], one linear map per encoder (as VA-VAE does, arXiv 2501.01423)."""

    def __init__(self, channels, encoders):
        super().__init__(torch.nn.Conv2d(channels, encoder.embed_dim, 1) for encoder in encoders)

    def forward(self, z):
        return [projector(z).flatten(2).transpose(1, 2) for projector in self]


def trained_part(vae, args):
    """The part of the VAE that learns, as a module: all of it, or what turns latents into images."""
    return vae if args.train_encoder else torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])


def build_networks(args, device, vae_state, disc_ckpt="none"):
    """All networks, as attributes of one namespace; `trained` names those that learn and their learning rates."""
    torch.manual_seed(args.seed)
    nets = SimpleNamespace(device=device, vae=VAE_models[args.vae](), disc=None, lpips=None, proj=None, encoders=[],
                           trained={"vae": args.learning_rate})
    if vae_state is not None:
        nets.vae.load_state_dict(vae_state)
    nets.vae.to(device)
    if args.perceptual_weight > 0:
        nets.lpips = weights.lpips().to(device)
    if args.disc_weight > 0:
        nets.disc = weights.discriminator(disc_ckpt, args.vae).to(device)
        nets.trained["disc"] = args.learning_rate if args.disc_learning_rate is None else args.disc_learning_rate
    if args.vae_align_proj_coeff:
        nets.encoders = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)
        nets.proj = LatentProjectors(nets.vae.latent_channels, nets.encoders).to(device)
        nets.trained["proj"] = args.learning_rate
    return nets


def prepare_training(nets, args):
    """Add to `nets` what training needs: optimisers, DDP wrappers, the EMA, autocast and the loss scale."""
    nets.vae.requires_grad_(False)
    trained_part(nets.vae, args).requires_grad_(True)
    if args.compile:
        trainer.channels_last(nets.vae, nets.disc, nets.lpips)
    nets.opts, nets.ddp = {}, {}
    for name, learning_rate in nets.trained.items():
        net = distributed.sync_batch_norms(getattr(nets, name)).train()
        nets.opts[name] = trainer.adamw([p for p in net.parameters() if p.requires_grad], args, learning_rate)
        nets.ddp[name] = trainer.wrap_ddp(net, nets.device)
    nets.ema = copy.deepcopy(nets.vae).eval().requires_grad_(False)
    nets.lecam_means = torch.zeros(2, device=nets.device)  # moving averages of the logits of images and reconstructions
    # What a step changes beside weights: it must not keep the NaN of a step that is skipped.
    nets.statistics = [b for name in nets.trained for b in getattr(nets, name).buffers() if b.is_floating_point()]
    nets.statistics.append(nets.lecam_means)
    nets.dtype = dtype = trainer.autocast_type(args, nets.device)
    kind = nets.device.type  # not through nets: a cycle would keep the networks alive
    nets.autocast = lambda: torch.autocast(kind, dtype, enabled=dtype != torch.float32)
    nets.loss_scale = trainer.LossScale(nets.dtype == torch.float16, nets.device)
    if args.grad_checkpoint:
        nets.vae.save_memory()
    if args.compile:
        trainer.compile_blocks(m for m in nets.vae.modules() if isinstance(m, ResnetBlock))


def step_flops(args, nets):
    """FLOPs of one step per image. A backward pass costs twice the forward pass; a frozen encoder has none."""
    image = (1, 3, args.resolution, args.resolution)
    encoder = forward_flops(lambda: VAE_models[args.vae]().encoder, image)
    flops = 3 * forward_flops(VAE_models[args.vae], image) - (0 if args.train_encoder else 2 * encoder)
    if nets.lpips is not None:  # two images forward, one of them backward, without weight gradients
        flops += 3 / 2 * forward_flops(LPIPS, image, image)
    if nets.disc is not None:  # the generator's pass, and real and fake images in its own update
        flops += (2 + 2 * 3) * forward_flops(lambda: type(nets.disc)(), image)
    return flops + sum(encoder.flops for encoder in nets.encoders)


# --------------------------------------------------------------------------------------------------- the step

def train_step(nets, args, batch, use_gan=True):
    """One step: the VAE's gradient and the discriminator's, both at the weights before the step, then all are applied.

    Args:
        nets: the networks, from build_networks and prepare_training.
        batch: namespace of this process's images [b, 3, R, R] in [-1, 1], eps [b, C, h, w] ~ N(0, 1) and zs (list of
            encoder tokens [b, T', D_k], empty without alignment).
        use_gan: whether the VAE sees the discriminator yet.
    Returns (metrics: dict of scalar tensors, skip: 1.0 if a loss or gradient was not finite and nothing was updated).
    """
    before = [buffer.clone() for buffer in nets.statistics]
    n = args.gradient_accumulation_steps
    micro = [SimpleNamespace(images=batch.images.chunk(n)[i], eps=batch.eps.chunk(n)[i],
                             zs=[z.chunk(n)[i] for z in batch.zs]) for i in range(n)]
    # 1) VAE forward. With several micro-batches the graph is not kept but made again in 2), because the discriminator's
    #    batch norm must see the reconstructions of the whole batch first. A frozen encoder has no graph in either case.
    with torch.set_grad_enabled(n == 1), nets.autocast():
        outputs = [(nets.ddp["vae"] if n == 1 else nets.vae)(m.images, m.eps) for m in micro]
    recon = torch.cat([output[2].detach() for output in outputs])
    # 2) The VAE's gradient, and the projectors'.
    metrics = vae_gradient(nets, args, micro, outputs, recon, use_gan)
    # 3) The discriminator's gradient, on the same reconstructions.
    if nets.disc is not None:
        metrics.update(discriminator_gradient(nets, args, batch.images, recon))
    # 4) Clip, update all, average what was trained of the VAE.
    for name in nets.trained:
        metrics[f"grad_norm_{name}"] = trainer.clip_gradients(getattr(nets, name).parameters(), args.max_grad_norm, nets.loss_scale)
    finite = torch.stack([value.double() for value in metrics.values()]).isfinite().all()
    skip = distributed.all_reduce_sum((~finite).float()).clamp(max=1)  # one process's NaN must stop all of them
    trainer.guarded_updates(nets.opts.values(), skip)
    trainer.restore_where(skip, nets.statistics, before)
    nets.loss_scale.update(skip)
    trainer.update_ema(trained_part(nets.ema, args), trained_part(nets.vae, args), args.ema_decay)
    return metrics, skip


def vae_gradient(nets, args, micro, outputs, recon, use_gan):
    """Part 2. Receives gradient: the trained part of the VAE and the projectors. Not the discriminator: only the
    gradient at the reconstruction is taken."""
    n, scale = len(micro), nets.loss_scale.value
    gan, recon_grads = torch.zeros((), device=recon.device), None
    weight = torch.full_like(gan, args.disc_weight)
    if nets.disc is not None and use_gan:
        leaf = recon.to(torch.promote_types(recon.dtype, torch.float32)).requires_grad_()
        with nets.autocast():
            gan = gan_loss(nets.disc, leaf)
        recon_grads = torch.autograd.grad(scale * gan, leaf)[0].chunk(n)
        if args.adaptive_disc_weight:
            weight = args.disc_weight * adaptive_weight(nets, args, micro, outputs, recon_grads)
    sums = {}
    for i, m in enumerate(micro):
        last = i == n - 1
        with trainer.sync_if(last, nets.ddp["vae"]), trainer.sync_if(last, nets.ddp.get("proj")), nets.autocast():
            moments, z, r = outputs[i] if n == 1 else nets.ddp["vae"](m.images, m.eps)
            losses = reconstruction_losses(m.images, r, Posterior(moments), nets.lpips, args.reconstruction_weight,
                                           args.perceptual_weight, args.kl_weight)
            if nets.proj is not None:
                losses["vae_align_loss"] = args.vae_align_proj_coeff * proj_loss(m.zs, nets.ddp["proj"](z))
            total = sum(losses.values())
            scaled = scale * total / n
            if recon_grads is not None:  # the GAN's share: dL/dr is known, so r * dL/dr has the right gradient
                scaled = scaled + (r.to(recon_grads[i].dtype) * (weight * recon_grads[i])).sum()
            scaled.backward()
        for name, loss in {**losses, "vae_loss": total}.items():
            sums[name] = sums.get(name, 0) + loss.detach() / n
    weighted = weight * gan.detach()
    sums["vae_loss"] = sums["vae_loss"] + weighted
    return {**sums, "gan_loss": gan.detach(), "weighted_gan_loss": weighted, "disc_weight": weight}


def adaptive_weight(nets, args, micro, outputs, recon_grads):
    """|gradient of L1 + LPIPS| / (|gradient of the GAN loss| + 1e-4) at the decoder's last layer, in [0, 1e4] (VQGAN,
    arXiv 2012.09841, eq. 7). Of the whole batch of all processes; with micro-batches it costs one more VAE forward. The
    gradients of that layer's input are computed on the way, and not used.

    recon_grads: gradient of the GAN loss times the loss scale at each micro-batch's reconstructions.
    """
    n, last = len(micro), nets.vae.decoder.conv_out.weight
    gradients = torch.zeros(2, *last.shape, device=last.device)
    for i, m in enumerate(micro):
        with nets.autocast():
            moments, _, r = outputs[i] if n == 1 else nets.vae(m.images, m.eps)
            losses = reconstruction_losses(m.images, r, Posterior(moments.detach()), nets.lpips,
                                           args.reconstruction_weight, args.perceptual_weight, args.kl_weight)
        loss = nets.loss_scale.value * (sum(losses.values()) - losses["kl_loss"]) / n
        gradients[0] += torch.autograd.grad(loss, last, retain_graph=True)[0]
        gradients[1] += torch.autograd.grad(r, last, recon_grads[i].to(r.dtype), retain_graph=n == 1)[0]
    gradients = distributed.all_reduce_sum(gradients) / (distributed.world_size() * nets.loss_scale.value)
    return (gradients[0].norm() / (gradients[1].norm() + 1e-4)).clamp(0, 1e4)


def discriminator_gradient(nets, args, images, recon):
    """Part 3. Receives gradient: the discriminator alone, from images and detached reconstructions. Always the whole
    batch at once, because of its batch norms."""
    with nets.autocast():
        d_loss, real, fake = discriminator_loss(nets.ddp["disc"], images, recon, args.lecam_weight, nets.lecam_means)
    (nets.loss_scale.value * d_loss).backward()
    if args.lecam_weight > 0:
        means = distributed.all_reduce_sum(torch.stack([real, fake])) / distributed.world_size()
        nets.lecam_means.lerp_(means.to(nets.lecam_means.dtype), 1 - args.lecam_decay)
    return {"d_loss": d_loss.detach(), "logits_real": real, "logits_fake": fake}


def make_batch(nets, args, step, images, rank, world_size):
    """The step's inputs for train_step, from uint8 images [b, 3, R, R] of this process. The noise is drawn for the
    global batch from (seed, step) and cut: a run depends neither on the number of processes nor on interruptions."""
    generator = torch.Generator(nets.device).manual_seed((args.seed * 1_000_003 + step) % 2 ** 32)
    side = args.resolution // nets.vae.downsample
    eps = torch.randn((args.batch_size, nets.vae.latent_channels, side, side), generator=generator, device=nets.device)
    images = images.to(nets.device, non_blocking=True)
    with torch.no_grad(), nets.autocast():
        zs = [encoder(images) for encoder in nets.encoders]
    mine = slice(rank * args.batch_size // world_size, (rank + 1) * args.batch_size // world_size)
    return SimpleNamespace(images=images.float() / 127.5 - 1, zs=zs, eps=eps[mine])


# ------------------------------------------------------------------------------------------- around the step

KEYS = (("vae", "vae"), ("disc", "discriminator"), ("proj", "proj"))  # network -> its key in a checkpoint


def save_checkpoint(nets, args, step, folder, stats):
    """<folder>/checkpoints/NNNNNNN.pt, whole or not at all; then the oldest beyond --keep-checkpoints go.

    What other scripts read of it is vae_ema, with its latents_scale and latents_bias.
    """
    state = {"vae_ema": nets.ema.state_dict(), "latents_scale": stats[0].cpu(), "latents_bias": stats[1].cpu()}
    for name, key in KEYS:
        if name in nets.trained:
            state |= {key: getattr(nets, name).state_dict(), f"opt_{name}": nets.opts[name].state_dict()}
    state |= {"lecam_means": nets.lecam_means.cpu(), "loss_scale": nets.loss_scale.state_dict(), "args": vars(args),
              "steps": step}
    files.save(state, os.path.join(folder, "checkpoints", f"{step:07d}.pt"))
    trainer.keep_newest(os.path.join(folder, "checkpoints"), args.keep_checkpoints)


def restore(nets, path, state):
    """Put a checkpoint's networks, optimisers and loss scale in place. Returns (its step, its latent statistics)."""
    for name, key in (("ema", "vae_ema"), *(pair for pair in KEYS if pair[0] in nets.trained)):
        if key not in state:
            raise ValueError(f"{path}: holds no {key}; it is no checkpoint of this kind of run")
        files.load_weights(getattr(nets, name), state[key], f"{path} ({key})")
    for name in nets.trained:
        trainer.load_optimizer(nets.opts[name], state.get(f"opt_{name}", {}), f"{path} (opt_{name})")
    nets.lecam_means.copy_(state["lecam_means"])
    nets.loss_scale.load_state_dict(state["loss_scale"])
    return state["steps"], (state["latents_scale"], state["latents_bias"])


def measure_stats(args, vae, dataset, device, rank, world_size):
    """(latents_scale, latents_bias), [1, C, 1, 1] each, of the latents of the run's first images."""
    batches = max(1, min(STATS_IMAGES, len(dataset)) // args.batch_size)
    mean, variance = trainer.measure_latents(args, vae, dataset, device, rank, world_size, batches)
    return variance.rsqrt().float().view(1, -1, 1, 1), mean.float().view(1, -1, 1, 1)


def train(args):
    """Refinement, from the first step or the newest checkpoint to --max-train-steps."""
    folder = os.path.join(args.output_dir, args.exp_name)
    try:
        rank, world_size, device = distributed.init()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        with distributed.main_first():
            path, state = trainer.find_checkpoint(args, folder)
            if state is not None:
                if not isinstance(state, dict) or "vae_ema" not in state:
                    raise ValueError(f"{path}: holds no vae_ema; it is no checkpoint of this kind of run")
                args.vae = args.vae or vae_files.vae_name(state["vae_ema"])
                trainer.check_resume(args, path, state, FIXED_IN_A_RUN)
            dataset, vae_state, stats = check_settings(args, world_size, state and state["args"])
            disc_ckpt = "none" if state else args.disc_ckpt
            nets = None if args.dry_run else build_networks(args, device, vae_state, disc_ckpt)
        if args.dry_run:
            return print("settings are sound") if rank == 0 else None
        prepare_training(nets, args)
        os.makedirs(folder, exist_ok=True)
        start = 0
        if state is not None:
            start, stats = restore(nets, path, state)
        trainer.check_same_start(start, device)
        if state is None and stats is None and not args.train_encoder:
            stats = measure_stats(args, nets.vae, dataset, device, rank, world_size)
    except (ValueError, OSError) as error:
        trainer.exit_with(error)
    del vae_state, state
    log = runlog.RunLog(folder, args, step_flops(args, nets), matmul_rate(device, nets.dtype))
    log.rewind(start)
    if rank == 0:
        with files.replace(os.path.join(folder, "args.json")) as temporary, open(temporary, "w") as f:
            json.dump(vars(args), f, indent=1)
    log.say(f"{'VAE' if args.train_encoder else 'decoder'} of {args.vae} ({args.ckpt}), {len(dataset)} images, "
            f"{world_size} x {device.type}, from step {start}" + (f" of {path}" if path else ""))
    loader = iter(trainer.data_loader(args, dataset, device, rank, world_size, start, args.num_workers))
    skipped_files, last_good = 0, path
    try:
        for step in range(start + 1, args.max_train_steps + 1):
            images, _, skipped = next(loader)
            skipped_files += int(skipped.sum())
            batch = make_batch(nets, args, step, images, rank, world_size)
            log.add(*train_step(nets, args, batch, use_gan=step > args.disc_start))
            final = step == args.max_train_steps
            if step % args.log_every == 0 or final:
                log.write(step, args.batch_size, skipped_files=skipped_files)
            if args.sampling_steps and step % args.sampling_steps == 0 and rank == 0:
                with log.paused(), files.replace(os.path.join(folder, "reconstructions", f"{step:07d}.png")) as temporary:
                    picture(images[:8], [nets.ema], ["EMA"]).save(temporary, format="png")
            if step % args.checkpointing_steps == 0 or final:
                with log.paused():
                    if args.train_encoder:
                        stats = measure_stats(args, nets.ema, dataset, device, rank, world_size)
                    if rank == 0:
                        save_checkpoint(nets, args, step, folder, stats)
                    distributed.barrier()
                last_good = os.path.join(folder, "checkpoints", f"{step:07d}.pt")
    except runlog.Collapse as error:
        log.say(f"stopped: {error}; the last good checkpoint is {last_good or 'none yet'}")
        sys.exit(1)
    except ImageError as error:
        trainer.exit_with(error)
    log.say(f"done: {folder}")
    distributed.shut_down()


# ------------------------------------------------------------------------------------------------- measuring VAEs

def model_of(args, source, vae):
    """The SiT whose tokens CKNNA compares for this VAE: of --model-ckpt, or of the VAE's own checkpoint; or None."""
    path = args.model_ckpt or source
    content = files.load(path) if os.path.isfile(path) else {}
    if "ema" not in content:
        if args.model_ckpt:
            raise ValueError(f"--model-ckpt {path}: no training checkpoint with a SiT")
        return None
    settings = weights.training_args(content, path)
    sit = weights.build_sit(content["ema"], settings, path)
    sit.encoder_depth, sit.path_type = settings.get("encoder_depth", 8), settings.get("path_type") or "linear"
    if (sit.in_channels, sit.input_size) != (vae.latent_channels, args.resolution // vae.downsample):
        raise ValueError(f"{path}: its model takes {sit.in_channels} x {sit.input_size}^2 latents, {source} gives "
                         f"{vae.latent_channels} x {args.resolution // vae.downsample}^2; check --resolution")
    return sit


def prepare_eval(args, device):
    """All that --eval needs, or a one-line error before any long work: VAEs and SiTs by source, images, LPIPS,
    Inception, encoder."""
    wanted = [m for m in args.metrics.split(",") if m]
    known = ["psnr", "ssim", "lpips", "rfid", "latents", "cknna"]
    if not wanted or set(wanted) - set(known):
        raise ValueError(f"--metrics {args.metrics}: known are {', '.join(known)}")
    if args.resolution < 16:
        raise ValueError(f"--resolution {args.resolution}: SSIM and LPIPS need at least 16 pixels")
    tools = SimpleNamespace(wanted=wanted, vaes={}, sits={}, lpips=None, inception=None, encoder=None)
    for source in args.eval:
        name, state, _ = load_vae(source, args.vae)
        check_resolution(args.resolution, name)
        tools.vaes[source] = VAE_models[name]().eval().requires_grad_(False)
        tools.vaes[source].load_state_dict(state)
        tools.sits[source] = model_of(args, source, tools.vaes[source]) if "cknna" in wanted else None
    tools.images = held_out_images(args.data_dir, args.resolution, args.limit, args.seed + 1)
    remedy = "leave it out with --metrics " + (",".join(m for m in wanted if m not in ("lpips", "rfid")) or "psnr,ssim")
    if "lpips" in wanted:
        tools.lpips = weights.lpips(remedy).to(device)
    if "rfid" in wanted:
        try:
            tools.inception = load_inception(args.inception_weights, device)
        except OSError as error:
            raise OSError(f"the weights of rFID: {error}; or {remedy}") from error
    if "cknna" in wanted:
        if not any(tools.sits.values()):
            raise ValueError("cknna compares a model's tokens: name its training checkpoint with --model-ckpt")
        if tools.images.count <= 10:
            raise ValueError(f"{args.data_dir}: cknna needs more than 10 images, not {tools.images.count}")
        tools.encoder = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)[0]
    return tools


def evaluate(args):
    """--eval: a table on the terminal; metrics.json and images.png in the run folder."""
    try:
        rank, world_size, device = distributed.init()
        dtype = torch.float32 if args.mixed_precision == "auto" else trainer.autocast_type(args, device)
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32
        with distributed.main_first():
            tools = prepare_eval(args, device)
    except (ValueError, OSError) as error:
        trainer.exit_with(error)
    size = max(1, min(256, EVAL_PIXELS // args.resolution ** 2))
    results, features = {}, None
    if tools.inception is not None:
        networks = [inception_features(tools.inception)]
        features = lambda stream: extract(stream, networks, device, keep=False, skip=("_s",))  # noqa: E731
    try:
        reference = features and features(tools.images.read(size, rank, world_size))  # of rFID: the same images
        for source, vae in tools.vaes.items():
            sit = tools.sits[source]
            tokens = sit and TokenPairs(sit.to(device), tools.encoder, path_type=sit.path_type, seed=args.seed)
            batches = tools.images.read(size, rank, world_size)
            results[source] = measure(vae.to(device), batches, device, dtype, tools.lpips, features, reference, tokens)
            if sit:
                results[source]["cknna"] = tokens.cknna(device)
    except InputError as error:
        trainer.exit_with(error)
    if rank == 0:
        report(args, tools, results)
    distributed.shut_down()


def report(args, tools, results):
    """Print the table, write metrics.json and images.png."""
    folder, n = os.path.join(args.output_dir, args.exp_name), tools.images.count
    notes = [f"{n:,} images of {args.data_dir} at {args.resolution} px; reconstructed from the posterior's mean"]
    if "rfid" in tools.wanted:
        notes.append("rFID's reference is these images themselves, not the reference of a generation benchmark"
                     + ("; fewer than 2,049 images: compare only at equal numbers" if n < 2049 else ""))
    wanted = {*tools.wanted, *(("spatial_variance", "total_variation") if "latents" in tools.wanted else ())}
    columns = [m for m in COLUMNS if m in wanted]
    width = max(3, *map(len, results))
    print("".join([f"{'VAE':<{width}}", *(f"  {COLUMNS[m]:>16}" for m in columns)]))
    for source, result in results.items():
        cells = [f"{result[m]:.4f}" if m in result else "-" for m in columns]
        print("".join([f"{source:<{width}}", *(f"  {cell:>16}" for cell in cells)]))
    moments = ["latents_mean", "latents_std"] if "latents" in tools.wanted else []
    for source, result in results.items():
        for name in moments:
            print(f"{source} {name}: " + " ".join(f"{value:.4g}" for value in result[name]))
    print("\n".join(f"note: {note}" for note in notes))
    figures = {source: {k: None if k in columns and not math.isfinite(result[k]) else result[k]
                        for k in columns + moments if k in result} for source, result in results.items()}
    about = {"data_dir": args.data_dir, "images": n, "resolution": args.resolution, "notes": notes}
    with files.replace(os.path.join(folder, "metrics.json")) as temporary, open(temporary, "w") as f:
        json.dump({**about, "vaes": figures}, f, indent=1)
    with files.replace(os.path.join(folder, "images.png")) as temporary:
        picture(tools.images.shown, tools.vaes.values(), list(results)).save(temporary, format="png")
    print(f"wrote {folder}/metrics.json and images.png")


def export(args):
    """--export: the VAE of --ckpt and its latent statistics as a folder."""
    if args.ckpt in (None, "none"):
        raise ValueError("--export needs the VAE's --ckpt")
    name, state, stats = load_vae(args.ckpt, args.vae, args.latents_stats)
    vae_files.export_vae(args.export, state, stats, args.format, args.resolution, args.force)
    print(f"{args.export}: {name} VAE for {args.format}, with " + ("its latent statistics" if stats else
          "no latent statistics, because it came without (--latents-stats gives them)"))


def main(argv=None):
    args = parse_args(argv)
    if args.export is None:
        return evaluate(args) if args.eval else train(args)
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            export(args)
    except (ValueError, OSError) as error:
        trainer.exit_with(error)


if __name__ == "__main__":
    main()
