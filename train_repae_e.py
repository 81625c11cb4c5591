"""REPA-E: end-to-end training of a VAE and a latent diffusion transformer (arXiv 2504.10483).

    python train_repae_e.py --preset demo                                        # CPU, offline, a few minutes
    torchrun --nproc-per-node 8 train_repae_e.py --model SiT-XL/2                 # the paper's run, data/imagenet/train
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_repae_e.py
    python train_repae_e.py --freeze-vae                                         # REPA; with --proj-coeff 0 plain SiT

Run the same command again and it continues from its newest checkpoint. The step itself is train_step below.
"""
import argparse
import copy
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import torch
from torch.func import functional_call

from models.runtime import distributed, files, online, runlog, trainer, weights
from models.runtime.features import load_inception, load_reference
from models.losses import proj_loss
from models.runtime.data import ImageError
from models.encoders import check_encoders, load_encoders
from models.runtime.flops import matmul_rate, step_flops
from models.losses import discriminator_loss, gan_loss, reconstruction_losses
from models.sit import SiT_models
from models.losses import PATHS, WEIGHTINGS, denoising_loss, noisy_latents, sample_time
from models.vae import Posterior, ResnetBlock, VAE_models
from models.runtime.vae_files import load_stats_file, load_vae_file

# What a run cannot change when it is continued: the networks, the losses, and the order of the data.
FIXED_IN_A_RUN = ("model", "vae", "resolution", "num_classes", "encoder", "encoder_depth", "qk_norm", "freeze_vae", "batch_size",
                  "seed", "path_type", "weighting", "proj_coeff", "vae_align_proj_coeff", "diffusion_to_vae", "learn_pos_embed",
                  "bn_momentum", "cfg_prob", "reconstruction_weight", "perceptual_weight", "kl_weight", "disc_weight")
PRESETS = {  # one row per configuration; every value is an ordinary flag and can be overridden
    "sdvae": dict(model="SiT-XL/2", vae="f8d4", vae_ckpt="REPA-E/sdvae", disc_ckpt="REPA-E/sdvae"),
    "invae": dict(model="SiT-XL/1", vae="f16d32", vae_ckpt="REPA-E/invae", disc_ckpt="REPA-E/invae"),
    "vavae": dict(model="SiT-XL/1", vae="f16d32", vae_ckpt="REPA-E/vavae", disc_ckpt="REPA-E/vavae"),
    "demo": dict(data_dir="shapes", resolution=32, num_classes=10, model="SiT-Ti/2", encoder="hog", encoder_depth=3,
                 vae="f4d4", vae_ckpt="none", disc_ckpt="none", reconstruction_weight=5.0, perceptual_weight=0.0,
                 disc_weight=0.0, batch_size=32, max_train_steps=400, learning_rate=1e-3, ema_decay=0.98, num_workers=0,
                 log_every=25, cfg_scale=2.0, sampling_steps=200, checkpointing_steps=200, exp_name="demo"),
}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, without the page of usage

    flag = trainer.flag
    data = parser.add_argument_group("data")
    flag(data, "--data-dir", "data/imagenet/train", "folder of class folders, a .zip of one, or 'shapes' (built in, drawn)")
    flag(data, "--resolution", 256, "side of the ADM centre crop in pixels")
    flag(data, "--num-classes", 1000, "classes of the label table; at least as many as the data has")
    flag(data, "--hflip", False, "flip half of the images (the paper does not)")
    flag(data, "--skip-corrupt", False, "replace files that are no images by the next one and count them, instead of stopping")
    flag(data, "--num-workers", 8, "image decoding processes per training process")
    model = parser.add_argument_group("model")
    flag(model, "--model", "SiT-XL/2", "diffusion transformer", choices=list(SiT_models))
    flag(model, "--encoder-depth", 8, "block, from 1, whose tokens are aligned (8 for L and XL, 4 is usual for B)")
    flag(model, "--qk-norm", False, "layer norm on queries and keys")
    flag(model, "--bn-momentum", 0.1, "momentum of the latent batch norm")
    flag(model, "--learn-pos-embed", False, "train the position table, as the reference does by accident")
    flag(model, "--cfg-prob", 0.1, "probability of dropping a label, for classifier-free guidance")
    flag(model, "--vae", "f8d4", "VAE: downsampling factor and latent channels", choices=list(VAE_models))
    flag(model, "--vae-ckpt", "auto", "VAE weights: a path, a hub name, none (from scratch), or auto (f8d4: REPA-E/sdvae, else none)")
    flag(model, "--disc-ckpt", "auto", "discriminator weights: the same")
    flag(model, "--latents-stats", None, "file with latents_scale and latents_bias; by default what comes with the VAE, else measured")
    flag(model, "--encoder", "dinov2-vit-b", "target encoder(s), comma-separated: reference names, timm names, or hog (no weights)")
    flag(model, "--encoder-ckpt", None, "encoder weights on disk, comma-separated in the order of --encoder")
    loss = parser.add_argument_group("losses, baselines and ablations")
    flag(loss, "--proj-coeff", 0.5, "alignment weight in the SiT update")
    flag(loss, "--vae-align-proj-coeff", 1.5, "alignment weight in the VAE update")
    flag(loss, "--freeze-vae", False, "train the SiT only (REPA; with --proj-coeff 0 vanilla SiT)")
    flag(loss, "--diffusion-to-vae", False, "ablation: let the diffusion loss reach the VAE too (it collapses the latents)")
    flag(loss, "--reconstruction-weight", 1.0, "L1 weight of the VAE")
    flag(loss, "--perceptual-weight", 1.0, "LPIPS weight; 0 needs no VGG weights")
    flag(loss, "--kl-weight", 1e-6, "KL weight")
    flag(loss, "--disc-weight", 0.1, "GAN weight; 0 trains without a discriminator")
    flag(loss, "--disc-start", -1, "step from which the generator sees the discriminator; -1: 0 if it is pretrained, else 5000")
    flag(loss, "--path-type", "linear", "interpolant", choices=PATHS)
    flag(loss, "--weighting", "uniform", "how training times are drawn", choices=WEIGHTINGS)
    optim = parser.add_argument_group("optimisation")
    flag(optim, "--batch-size", 256, "global batch: all processes and accumulation steps together")
    flag(optim, "--gradient-accumulation-steps", 1, "micro-batches per process and step; same result, less memory, more time")
    flag(optim, "--max-train-steps", 400000, "steps")
    flag(optim, "--learning-rate", 1e-4, "of the SiT, constant")
    flag(optim, "--vae-learning-rate", None, "of the VAE; default: --learning-rate", type=float)
    flag(optim, "--disc-learning-rate", None, "of the discriminator; default: --learning-rate", type=float)
    flag(optim, "--adam-beta1", 0.9, "AdamW")
    flag(optim, "--adam-beta2", 0.999, "AdamW")
    flag(optim, "--adam-weight-decay", 0.0, "AdamW")
    flag(optim, "--adam-epsilon", 1e-8, "AdamW")
    flag(optim, "--max-grad-norm", 1.0, "clip each network's gradient to this norm")
    flag(optim, "--ema-decay", 0.9999, "of the SiT's average, its float buffers included")
    flag(optim, "--mixed-precision", "auto", "autocast type; auto: bf16 on GPU, no on CPU", choices=["auto", "bf16", "fp16", "no"])
    flag(optim, "--compile", False, "torch.compile each block; convolutions in channels_last")
    flag(optim, "--grad-checkpoint", False, "recompute block activations in the backward pass: less memory, a third more arithmetic")
    flag(optim, "--seed", 0, "of weights, data order and every draw")
    run = parser.add_argument_group("run")
    flag(run, "--preset", None, "set of defaults; explicit flags win", choices=list(PRESETS))
    flag(run, "--output-dir", "exps", "parent of the run folders")
    flag(run, "--exp-name", None, "name of the run folder; default: from the model and VAE names")
    flag(run, "--checkpointing-steps", 50000, "steps between checkpoints; one is always written at the end")
    flag(run, "--keep-checkpoints", 3, "newest checkpoints kept; 0 keeps all")
    flag(run, "--sampling-steps", 10000, "steps between picture grids; 0 for none")
    flag(run, "--cfg-scale", 4.0, "guidance of the picture grids (50 Euler steps)")
    flag(run, "--eval-steps", 0, "steps between online scores (fid_online ..., 50 Euler steps, unguided); 0 for none")
    flag(run, "--eval-ref", None, "reference of the online scores, as for evaluate_fid.py")
    flag(run, "--eval-samples", 10000, "samples of an online score")
    flag(run, "--inception-weights", None, "pt_inception-2015-12-05-6726825d.pth, if it cannot be downloaded")
    flag(run, "--log-every", 100, "steps between log lines")
    flag(run, "--resume", "auto", "auto (newest whole checkpoint of the run folder, if any), none, or a checkpoint file")
    flag(run, "--report-to", "none", "also log to", choices=["none", "tensorboard", "wandb"])
    flag(run, "--dry-run", False, "check all settings and stop")
    return parser


def parse_args(argv=None):
    """Settings from the command line: explicit flags, over --preset, over the paper's defaults."""
    parser = make_parser()
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    if args.exp_name is None:
        args.exp_name = f"{args.model.replace('/', '-')}-{args.vae}{'-frozen' if args.freeze_vae else ''}".lower()
    for name in ("vae_ckpt", "disc_ckpt"):
        if getattr(args, name) == "auto":
            setattr(args, name, "REPA-E/sdvae" if args.vae == "f8d4" else "none")
    if args.disc_start < 0:  # an untrained discriminator learns for a while before the generator listens to it
        args.disc_start = 5000 if args.disc_ckpt == "none" else 0
    return args


def check_settings(args, world_size, continued):
    """Everything that can be checked before something heavy is built. Returns (dataset, VAE state or None, stats or None).
    A run that is `continued` has the weights of its VAE and discriminator in its checkpoint."""
    trainer.check_numbers(args, world_size, fractions=("cfg_prob", "ema_decay", "bn_momentum"), positive=("num_classes",))
    if args.freeze_vae and args.diffusion_to_vae:
        raise ValueError("--freeze-vae and --diffusion-to-vae exclude each other")
    if args.freeze_vae and args.vae_ckpt == "none":
        raise ValueError("--freeze-vae would train on a random VAE; name its weights with --vae-ckpt")
    if args.cfg_scale < 1:
        raise ValueError(f"--cfg-scale {args.cfg_scale} is below 1; 1 is no guidance")
    has_disc = args.disc_weight > 0 and not args.freeze_vae
    if has_disc and args.resolution < 32:
        raise ValueError(f"--resolution {args.resolution} is below 32, the least the discriminator takes; pass --disc-weight 0")
    with torch.device("meta"):
        vae = VAE_models[args.vae]()
        multiple = vae.downsample * int(args.model.split("/")[1])
        if args.resolution % multiple:
            raise ValueError(f"--resolution {args.resolution} is not divisible by {multiple}, the factor of {args.vae} "
                             f"times the patch of {args.model}")
        build_sit(args, vae, encoders=[])
    if args.eval_steps and (args.eval_ref is None or not os.path.exists(args.eval_ref)):
        raise FileNotFoundError(f"--eval-steps needs a reference: --eval-ref {args.eval_ref} does not exist")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(f"--report-to {args.report_to}: the package is not installed; pip install {args.report_to}")
    if uses_encoders(args):
        check_encoders(args.encoder, args.encoder_ckpt)
    dataset = trainer.open_data(args)
    if dataset.num_classes > args.num_classes:
        raise ValueError(f"--num-classes {args.num_classes} is below the {dataset.num_classes} classes found in {args.data_dir}")
    fetch_vae = args.vae_ckpt != "none" and (args.freeze_vae or not continued)
    vae_state, stats = load_vae_file(args.vae_ckpt) if fetch_vae else (None, None)
    if vae_state is not None:
        files.check_state(vae, vae_state, f"{args.vae_ckpt} (for --vae {args.vae})")
    if args.latents_stats is not None:
        stats = load_stats_file(args.latents_stats)
    if stats is not None and stats[0].numel() != vae.latent_channels:
        raise ValueError(f"{args.latents_stats or args.vae_ckpt}: statistics of {stats[0].numel()} channels, but {args.vae} has "
                         f"{vae.latent_channels}")
    if has_disc and not continued:
        weights.discriminator(args.disc_ckpt, args.vae)
    if args.inception_weights is not None and not os.path.isfile(args.inception_weights):
        raise FileNotFoundError(f"--inception-weights {args.inception_weights}: no such file")
    return dataset, vae_state, stats


def uses_encoders(args):
    return args.proj_coeff != 0 or (args.vae_align_proj_coeff != 0 and not args.freeze_vae)


def build_sit(args, vae, encoders):
    """A SiT of the settings: its latents are those of `vae`, and it has a projector for each of `encoders`."""
    return SiT_models[args.model](
        input_size=args.resolution // vae.downsample, in_channels=vae.latent_channels, num_classes=args.num_classes,
        class_dropout_prob=args.cfg_prob, encoder_depth=args.encoder_depth, z_dims=[e.embed_dim for e in encoders], qk_norm=args.qk_norm,
        bn_momentum=args.bn_momentum, learn_pos_embed=args.learn_pos_embed)


def build_networks(args, device, vae_state, continued=False):
    """All networks, as attributes of one namespace; `trained` names those that learn and their learning rates."""
    torch.manual_seed(args.seed)
    nets = SimpleNamespace(device=device, vae=VAE_models[args.vae](), disc=None, lpips=None, encoders=[],
                           trained={"sit": args.learning_rate})
    if vae_state is not None:
        nets.vae.load_state_dict(vae_state)
    if uses_encoders(args):
        nets.encoders = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)
    nets.sit = build_sit(args, nets.vae, nets.encoders).to(device)
    nets.vae.to(device)
    if args.freeze_vae:
        nets.vae.requires_grad_(False)
        return nets
    nets.trained["vae"] = args.learning_rate if args.vae_learning_rate is None else args.vae_learning_rate
    if args.perceptual_weight > 0:
        nets.lpips = weights.lpips().to(device)
    if args.disc_weight > 0:
        nets.disc = weights.discriminator("none" if continued else args.disc_ckpt, args.vae).to(device)
        nets.trained["disc"] = args.learning_rate if args.disc_learning_rate is None else args.disc_learning_rate
    return nets


def prepare_training(nets, args):
    """Add to `nets` what training needs: optimisers, DDP wrappers, the EMA, autocast and the loss scale."""
    if args.compile:
        trainer.channels_last(nets.vae, nets.disc, nets.lpips)
    nets.opts, nets.ddp = {}, {}
    for name, learning_rate in nets.trained.items():
        net = distributed.sync_batch_norms(getattr(nets, name)).train()
        nets.opts[name] = trainer.adamw(net.parameters(), args, learning_rate)
        nets.ddp[name] = trainer.wrap_ddp(net, nets.device)
    nets.ema = copy.deepcopy(nets.sit).eval().requires_grad_(False)
    # What a step changes beside weights: it must not keep the NaN of a step that is skipped.
    nets.statistics = [b for name in nets.trained for b in getattr(nets, name).buffers() if b.is_floating_point()]
    nets.dtype = dtype = trainer.autocast_type(args, nets.device)
    kind = nets.device.type  # not through nets: a cycle would keep the networks alive
    nets.autocast = lambda: torch.autocast(kind, dtype, enabled=dtype != torch.float32)
    nets.loss_scale = trainer.LossScale(nets.dtype == torch.float16, nets.device)
    if args.grad_checkpoint:
        nets.vae.save_memory()
        nets.sit.grad_checkpoint = True
    if args.compile:
        encoders = [encoder.model for encoder in nets.encoders if hasattr(encoder, "model")]
        trainer.compile_blocks([*nets.sit.blocks, *nets.ema.blocks, *(m for m in nets.vae.modules() if isinstance(m, ResnetBlock)),
                                 *(block for encoder in encoders for block in getattr(encoder, "blocks", ()))])


# --------------------------------------------------------------------------------------------------- the step

def train_step(nets, args, batch, use_gan=True):
    """One REPA-E step (paper, section 3). All gradients are taken at the weights before the step, then all are applied.

    Args:
        nets: the networks, from build_networks and prepare_training.
        batch: namespace of this process's images [b, 3, R, R] in [-1, 1], labels [b], labels_dropped [b] (some of them the
            null label), zs (list of encoder tokens [b, T', D_k]), eps and noise [b, C, h, w] ~ N(0, 1), t [b] in [0, 1].
        use_gan: whether the generator sees the discriminator yet.
    Returns (metrics: dict of scalar tensors, skip: 1.0 if a loss or gradient was not finite: then no weight and no batch
    norm statistic has changed; the EMA goes on averaging).
    """
    metrics, before = {}, [buffer.clone() for buffer in nets.statistics]
    n = args.gradient_accumulation_steps
    micro = [SimpleNamespace(**{k: [z[i] for z in (s.chunk(n) for s in v)] if k == "zs" else v.chunk(n)[i]
                                for k, v in vars(batch).items()}) for i in range(n)]
    if args.freeze_vae:
        with torch.no_grad(), nets.autocast():
            z = torch.cat([Posterior(nets.vae.moments(m.images)).sample(m.eps) for m in micro])
    else:
        # 1) VAE forward: posterior, latents z, reconstruction. With several micro-batches the graph is not kept but made
        #    again in 2), because the discriminator's batch norm must see the reconstructions of the whole batch first.
        with torch.set_grad_enabled(n == 1), nets.autocast():
            outputs = [(nets.ddp["vae"] if n == 1 else nets.vae)(m.images, m.eps) for m in micro]
        z, recon = (torch.cat([output[k].detach() for output in outputs]) for k in (1, 2))
        # 2) The VAE's gradient: its own losses, and the alignment loss through a frozen SiT.
        metrics.update(vae_gradient(nets, args, micro, outputs, recon, use_gan))
        # 3) The discriminator's gradient, on the same reconstructions.
        if nets.disc is not None:
            metrics.update(discriminator_gradient(nets, batch.images, recon))
    # 4) The SiT's gradient: diffusion and alignment on z without its history, so neither reaches the VAE.
    metrics.update(sit_gradient(nets, args, batch, z))
    # 5) Clip, update all, average the SiT.
    for name in nets.trained:
        metrics[f"grad_norm_{name}"] = trainer.clip_gradients(getattr(nets, name).parameters(), args.max_grad_norm, nets.loss_scale)
    finite = torch.stack([value.double() for value in metrics.values()]).isfinite().all()
    skip = distributed.all_reduce_sum((~finite).float()).clamp(max=1)  # one process's NaN must stop all of them
    trainer.guarded_updates(nets.opts.values(), skip)
    trainer.restore_where(skip, nets.statistics, before)
    nets.loss_scale.update(skip)
    trainer.update_ema(nets.ema, nets.sit, args.ema_decay)
    return metrics, skip


def vae_gradient(nets, args, micro, outputs, recon, use_gan):
    """Part 2. Receives gradient: the VAE. Not the SiT (its weights enter detached), not the projector (part of the SiT),
    not the discriminator (only the gradient at the reconstruction is taken), not the encoder.

    The diffusion loss is left out: reaching the VAE it makes latents that are easy to denoise and say nothing (paper,
    table 1), unless --diffusion-to-vae asks for that. The SiT is seen as in evaluation: running batch norm statistics,
    gradient through them into z, no dropped labels.
    """
    n, scale = len(micro), nets.loss_scale.value
    gan, recon_grads = torch.zeros((), device=recon.device), None
    if nets.disc is not None and use_gan:
        leaf = recon.to(torch.promote_types(recon.dtype, torch.float32)).requires_grad_()
        with nets.autocast():
            gan = gan_loss(nets.disc, leaf)
        recon_grads = torch.autograd.grad(scale * (args.disc_weight * gan), leaf)[0].chunk(n)
    frozen_sit = {name: p.detach() for name, p in nets.sit.named_parameters()}
    sums = {}
    for i, m in enumerate(micro):
        with trainer.sync_if(i == n - 1, nets.ddp["vae"]):
            with nets.autocast():
                moments, z, r = outputs[i] if n == 1 else nets.ddp["vae"](m.images, m.eps)
                losses = reconstruction_losses(m.images, r, Posterior(moments), nets.lpips, args.reconstruction_weight,
                                               args.perceptual_weight, args.kl_weight)
                align = torch.zeros_like(losses["kl_loss"])
                if args.vae_align_proj_coeff != 0 or args.diffusion_to_vae:
                    x_t, target = noisy_latents(nets.sit.normalize(z), m.noise, m.t, args.path_type)
                    velocity, zs_tilde = functional_call(nets.sit, frozen_sit, (x_t, m.t, m.labels),
                                                         {"align_only": not args.diffusion_to_vae})
                    if m.zs:
                        align = proj_loss(m.zs, zs_tilde)
                    if args.diffusion_to_vae:
                        losses["vae_denoising_loss"] = denoising_loss(velocity, target).mean()
            total = sum(losses.values()) + args.vae_align_proj_coeff * align
            scaled = scale * total / n
            if recon_grads is not None:  # the GAN's share: dL/dr is known, so r * dL/dr has the right gradient
                scaled = scaled + (r.to(recon_grads[i].dtype) * recon_grads[i]).sum()
            scaled.backward()
        for name, loss in {**losses, "vae_align_loss": align, "vae_loss": total}.items():
            sums[name] = sums.get(name, 0) + loss.detach() / n
    weighted = args.disc_weight * gan.detach()
    return {**sums, "gan_loss": gan.detach(), "weighted_gan_loss": weighted, "vae_loss": sums["vae_loss"] + weighted}


def discriminator_gradient(nets, images, recon):
    """Part 3. Receives gradient: the discriminator alone, from images and detached reconstructions. Always the whole
    batch at once, because of its batch norms."""
    with nets.autocast():
        d_loss, real, fake = discriminator_loss(nets.ddp["disc"], images, recon)
    (nets.loss_scale.value * d_loss).backward()
    return {"d_loss": d_loss.detach(), "logits_real": real, "logits_fake": fake}


def sit_gradient(nets, args, batch, z):
    """Part 4. Receives gradient: the SiT and its projectors, from the diffusion and the alignment loss. Not the VAE: z is
    detached. Same t and noise as in part 2, but labels dropped, and batch norm with the statistics of the whole batch,
    which also moves the running ones (frozen VAE: with the fixed running ones)."""
    n = args.gradient_accumulation_steps
    with nets.autocast():
        x = nets.sit.normalize(z) if args.freeze_vae else nets.sit.bn(z)
        x_t, target = noisy_latents(x, batch.noise, batch.t, args.path_type)
    sums = {"denoising_loss": 0, "proj_loss": 0}
    for i in range(n):
        part = lambda v: v.chunk(n)[i]  # noqa: E731
        with trainer.sync_if(i == n - 1, nets.ddp["sit"]):
            with nets.autocast():
                velocity, zs_tilde = nets.ddp["sit"](part(x_t), part(batch.t), part(batch.labels_dropped))
            denoising = denoising_loss(velocity, part(target)).mean()
            align = proj_loss([part(v) for v in batch.zs], zs_tilde) if batch.zs else torch.zeros_like(denoising)
            (nets.loss_scale.value * (denoising + args.proj_coeff * align) / n).backward()
        sums["denoising_loss"] += denoising.detach() / n
        sums["proj_loss"] += align.detach() / n
    return {**sums, "sit_loss": sums["denoising_loss"] + args.proj_coeff * sums["proj_loss"]}


def make_batch(nets, args, step, images, labels, rank, world_size):
    """The step's inputs for train_step, from uint8 images [b, 3, R, R] and labels [b] of this process.

    Every draw is made for the global batch from (seed, step) and cut: a run does not depend on the number of processes,
    and a resumed one needs no random state but the step.
    """
    device = nets.device
    generator = torch.Generator(device).manual_seed((args.seed * 1_000_003 + step) % 2 ** 32)
    total, shape = args.batch_size, (args.batch_size, nets.sit.in_channels, nets.sit.input_size, nets.sit.input_size)
    eps, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    t = sample_time(total, args.weighting, args.path_type, generator, device)
    dropped = torch.rand(total, generator=generator, device=device) < args.cfg_prob
    mine = slice(rank * total // world_size, (rank + 1) * total // world_size)
    images, labels = (v.to(device, non_blocking=True) for v in (images, labels))
    with torch.no_grad(), nets.autocast():
        zs = [encoder(images) for encoder in nets.encoders]
    return SimpleNamespace(images=images.float() / 127.5 - 1, labels=labels, zs=zs, eps=eps[mine], noise=noise[mine], t=t[mine],
                           labels_dropped=torch.where(dropped[mine], nets.sit.num_classes, labels))


# ------------------------------------------------------------------------------------------- around the step

@torch.no_grad()
def set_latents_stats(nets, args, dataset, stats, rank, world_size):
    """Start bn's running statistics from `stats`, or measure them with the VAE as it is on the run's first batches."""
    bn = nets.sit.bn
    if stats is not None:
        scale, bias = stats
        bn.running_mean.copy_(bias.flatten())
        bn.running_var.copy_(scale.flatten() ** -2.0)
    else:
        batches = 40 if args.freeze_vae else 2  # a trained VAE moves on, and bn follows it within some 20 steps
        mean, variance = trainer.measure_latents(args, nets.vae, dataset, nets.device, rank, world_size, batches)
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(variance)
    nets.ema.load_state_dict(nets.sit.state_dict())


def save_checkpoint(nets, args, step, folder):
    """<folder>/checkpoints/NNNNNNN.pt, whole or not at all; then the oldest beyond --keep-checkpoints go."""
    state = {"model": nets.sit.state_dict(), "ema": nets.ema.state_dict(), "opt": nets.opts["sit"].state_dict()}
    for name, key in (("vae", "vae"), ("disc", "discriminator")):
        if name in nets.trained:
            state |= {key: getattr(nets, name).state_dict(), f"opt_{name}": nets.opts[name].state_dict()}
    state |= {"loss_scale": nets.loss_scale.state_dict(), "args": vars(args), "steps": step}
    files.save(state, os.path.join(folder, "checkpoints", f"{step:07d}.pt"))
    trainer.keep_newest(os.path.join(folder, "checkpoints"), args.keep_checkpoints)


def restore(nets, path, state):
    """Put a checkpoint's networks, optimisers and loss scale in place. Returns its step."""
    for name, key in (("sit", "model"), ("ema", "ema"), *((n, {"vae": "vae", "disc": "discriminator"}[n])
                                                          for n in nets.trained if n != "sit")):
        if key not in state:
            raise ValueError(f"{path}: holds no {key}; it is no checkpoint of this kind of run")
        files.load_weights(getattr(nets, name), state[key], f"{path} ({key})")
    for name in nets.trained:
        key = "opt" if name == "sit" else f"opt_{name}"
        trainer.load_optimizer(nets.opts[name], state.get(key, {}), f"{path} ({key})")
    if "loss_scale" in state:
        nets.loss_scale.load_state_dict(state["loss_scale"])
    return state["steps"]


def main(argv=None):
    args = parse_args(argv)
    folder = os.path.join(args.output_dir, args.exp_name)
    try:
        rank, world_size, device = distributed.init()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        with distributed.main_first():
            path, state = trainer.find_checkpoint(args, folder)
            if state is not None:
                trainer.check_resume(args, path, state, FIXED_IN_A_RUN)
            dataset, vae_state, stats = check_settings(args, world_size, continued=state is not None)
            nets = None if args.dry_run else build_networks(args, device, vae_state, continued=state is not None)
            if args.eval_steps and nets is not None:
                inception = load_inception(args.inception_weights, device)
        if args.dry_run:
            return print("settings are sound") if rank == 0 else None
        prepare_training(nets, args)
        ref = load_reference(args.eval_ref, inception, device, pool=False) if args.eval_steps else None
        os.makedirs(folder, exist_ok=True)
        start = 0 if state is None else restore(nets, path, state)
        trainer.check_same_start(start, device)
        if state is None:
            set_latents_stats(nets, args, dataset, stats, rank, world_size)
    except (ValueError, OSError) as error:
        trainer.exit_with(error)
    del vae_state, state
    flops = step_flops(args, nets, lambda: build_sit(args, nets.vae, nets.encoders))
    log = runlog.RunLog(folder, args, flops, matmul_rate(device, nets.dtype))
    log.rewind(start)
    if rank == 0:
        with files.replace(os.path.join(folder, "args.json")) as temporary, open(temporary, "w") as f:
            json.dump(vars(args), f, indent=1)
    log.say(f"{args.model} ({sum(p.numel() for p in nets.sit.parameters()) / 1e6:.1f} M) with {args.vae}, {len(dataset)} images of "
            f"{dataset.num_classes} classes, {world_size} x {device.type}, from step {start}" + (f" of {path}" if path else ""))
    loader = iter(trainer.data_loader(args, dataset, device, rank, world_size, start, args.num_workers))
    skipped_files, last_good = 0, path
    try:
        for step in range(start + 1, args.max_train_steps + 1):
            images, labels, skipped = next(loader)
            skipped_files += int(skipped.sum())
            batch = make_batch(nets, args, step, images, labels, rank, world_size)
            log.add(*train_step(nets, args, batch, use_gan=step > args.disc_start))
            final, scores = step == args.max_train_steps, {}
            if args.eval_steps and step % args.eval_steps == 0:
                with log.paused():
                    scores = online.online_scores(nets, args, inception, ref, rank, world_size)
            if step % args.log_every == 0 or final or (args.eval_steps and step % args.eval_steps == 0):
                log.write(step, args.batch_size, skipped_files=skipped_files, **scores)
            if args.sampling_steps and step % args.sampling_steps == 0 and rank == 0:
                with log.paused():
                    online.save_grids(nets, args, step, folder, images)
            if step % args.checkpointing_steps == 0 or final:
                with log.paused():
                    if rank == 0:
                        save_checkpoint(nets, args, step, folder)
                    distributed.barrier()
                last_good = os.path.join(folder, "checkpoints", f"{step:07d}.pt")
    except runlog.Collapse as error:
        log.say(f"stopped: {error}; the last good checkpoint is {last_good or 'none yet'}")
        sys.exit(1)
    except ImageError as error:
        trainer.exit_with(error)
    log.say(f"done: {folder}")
    distributed.shut_down()


if __name__ == "__main__":
    main()
