"""REPA-E: end-to-end training of a VAE and a latent diffusion transformer (arXiv 2504.10483).

    python train_repae_e.py --preset demo                             # CPU, offline, a few minutes
    torchrun --nproc-per-node 8 train_repae_e.py --model SiT-XL/2      # the paper's run, data/imagenet/train
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_repae_e.py
    python train_repae_e.py --freeze-vae                              # REPA; with --proj-coeff 0 plain SiT

Run the same command again and it resumes from its newest checkpoint.

From top to bottom: the flags, the networks, the step (train_step and the losses of its parts), and main: what
happens from the first line to the last. The formulas are in models/losses.py; what both training scripts need
around them, in models/runtime/trainer.py. In comments "1)" to "5)" are the parts of the step, "(1)" to "(7)"
the formulas.
"""
import math
import os
import sys
from types import SimpleNamespace

import torch
from torch.func import functional_call

from models.encoders import load_encoders
from models.losses import (denoising_loss, discriminator_loss, gan_loss, noisy_latents, proj_loss,
                           reconstruction_losses, sample_time, spatial_norm, wide)
from models.runtime import cache, cli, distributed, files, pictures, trainer, vae_files, weights
from models.runtime.data import identity, open_images
from models.runtime.log import Collapse, RunLog, watch
from models.runtime.trainer import Networks
from models.sit import PROJECTORS, SiT_models
from models.vae import Posterior, VAE_models

# What a run cannot change when it resumes: the networks, the losses, and the order of the data.
FIXED_IN_A_RUN = (
    "model", "vae", "resolution", "num_classes", "encoder", "encoder_depth", "qk_norm", "projector",
    "freeze_vae", "bn_momentum", "fixed_latents_stats", "cfg_prob", "batch_size", "seed", "hflip",
    "path_type", "weighting", "proj_coeff", "vae_align_proj_coeff", "spatial_norm", "diffusion_to_vae",
    "reconstruction_weight", "reconstruction_loss", "perceptual_weight", "kl_weight", "disc_weight",
    "disc_ckpt", "decoder_noise")

# One row per configuration; every value is an ordinary flag and can be overridden.
PRESETS = {
    "sdvae": dict(model="SiT-XL/2", vae="f8d4", vae_ckpt="REPA-E/sdvae", disc_ckpt="REPA-E/sdvae"),
    "invae": dict(model="SiT-XL/1", vae="f16d32", vae_ckpt="REPA-E/invae", disc_ckpt="REPA-E/invae"),
    "vavae": dict(model="SiT-XL/1", vae="f16d32", vae_ckpt="REPA-E/vavae", disc_ckpt="REPA-E/vavae"),
    "demo": dict(data_dir="shapes", resolution=32, num_classes=10, num_workers=0, exp_name="demo",
                 model="SiT-Ti/2", encoder="hog", encoder_depth=3,
                 vae="f4d16", vae_ckpt="none", disc_ckpt="none",
                 reconstruction_weight=5.0, perceptual_weight=0.0, disc_weight=0.0,
                 batch_size=32, max_train_steps=700, ema_decay=0.98,
                 learning_rate=1e-3, vae_learning_rate=1e-3, disc_learning_rate=1e-3,
                 cfg_scale=2.0, log_every=25, sampling_steps=350, checkpointing_steps=350),
}


def make_parser():
    parser = cli.make_parser(__doc__)
    groups = cli.training_flags(parser, PRESETS)
    data, model, losses, optim, run = (groups[k] for k in ("data", "model", "losses", "optimisation", "run"))
    flag = cli.flag
    flag(data, "--num-classes", 1000, "classes of the label table; at least as many as the data has")
    flag(data, "--latent-cache", None, "folder of the frozen VAE's posteriors, which the first run fills")

    flag(model, "--model", "SiT-XL/2", "diffusion transformer: SiT-{XL,L,B,S,Ti}/{1,2,4,8}",
         choices=list(SiT_models), metavar="NAME")
    flag(model, "--encoder", "dinov2-vit-b", "targets, with commas: the reference's names, timm's, or hog")
    flag(model, "--encoder-ckpt", None, "encoder weights on disk, comma-separated in the order of --encoder")
    flag(model, "--encoder-depth", 8, "block, from 1, whose tokens are aligned (8 for L and XL; for B 4)")
    flag(model, "--projector", "mlp",
         "alignment head: REPA's MLP, or one 3x3 convolution (iREPA, arXiv 2512.10794)", choices=PROJECTORS)
    flag(model, "--qk-norm", False, "layer norm on queries and keys")
    flag(model, "--bn-momentum", 0.1, "momentum of the latent batch norm")
    flag(model, "--fixed-latents-stats", False,
         "ablation: the latents keep the scale they start with; no batch norm (a frozen VAE's always do)")
    flag(model, "--cfg-prob", 0.1, "probability of dropping a label, for classifier-free guidance")
    flag(model, "--vae-ckpt", "auto",
         "VAE weights: a path, a hub name, none, or auto (f8d4: REPA-E/sdvae, else none)")
    flag(model, "--init-from", None,
         "start at step 0 from this training checkpoint, ours or a released one: its averaged weights and, "
         "unless flags name others, its VAE and discriminator")

    flag(losses, "--proj-coeff", 0.5, "alignment weight in the SiT update")
    flag(losses, "--vae-align-proj-coeff", 1.5, "alignment weight in the VAE update")
    flag(losses, "--spatial-norm", None, "normalise the encoder's tokens over space, with this share of "
         "their mean removed (iREPA: 0.6 to 1); default: as they are", type=float)
    flag(losses, "--freeze-vae", False, "train the SiT only (REPA; with --proj-coeff 0 vanilla SiT)")
    flag(losses, "--diffusion-to-vae", False, "ablation: the diffusion loss reaches the VAE (it collapses)")
    flag(losses, "--path-type", "linear", "interpolant", choices=["linear", "cosine"])
    flag(losses, "--weighting", "uniform", "how training times are drawn", choices=["uniform", "lognormal"])

    flag(optim, "--vae-learning-rate", 1e-4, "of the VAE, constant")

    flag(run, "--cfg-scale", 4.0, "guidance of the picture grids (50 Euler steps)")
    parser.set_defaults(vae="f8d4")  # finetune_vae.py has none: there the checkpoint says
    return parser


def parse_args(argv=None):
    """Settings from the command line: explicit flags, over --preset, over the paper's defaults."""
    args = cli.parse(make_parser(), argv, PRESETS)
    if args.init_from is not None:  # its VAE counts more than one a preset names, less than one a flag names
        own = {"vae_ckpt": args.init_from, "disc_ckpt": args.init_from}
        parser = make_parser()
        parser.set_defaults(**own)
        args = cli.parse(parser, argv, {name: preset | own for name, preset in PRESETS.items()})
    if args.exp_name is None:
        frozen = "-frozen" if args.freeze_vae else ""
        args.exp_name = f"{args.model.replace('/', '-')}-{args.vae}{frozen}".lower()
    for name in ("vae_ckpt", "disc_ckpt"):
        if getattr(args, name) == "auto":
            setattr(args, name, "REPA-E/sdvae" if args.vae == "f8d4" else "none")
    if args.disc_start is None:  # an untrained discriminator learns for a while before the VAE listens to it
        args.disc_start = 5000 if args.disc_ckpt == "none" else 0
    return args


# -------------------------------------------------------------------------------------------- the networks

def check_settings(args, world_size):
    """Raise a one-line ValueError for settings that contradict each other, before anything is built."""
    trainer.check_settings(args, world_size)
    cli.check_range(args, 1, math.inf, "cfg_scale")
    cli.check_range(args, 0, 1, "cfg_prob", "bn_momentum")
    if args.freeze_vae and args.diffusion_to_vae:
        raise ValueError("--freeze-vae and --diffusion-to-vae exclude each other")
    if args.latent_cache and not args.freeze_vae:
        raise ValueError("--latent-cache stores what a VAE that learns would change: it needs --freeze-vae")
    keeps = args.freeze_vae or (args.fixed_latents_stats and args.latents_stats is None)
    if keeps and args.vae_ckpt == "none":
        raise ValueError("--freeze-vae and --fixed-latents-stats keep what they find, here of a random VAE; "
                         "name its weights with --vae-ckpt")
    with torch.device("meta"):
        vae = VAE_models[args.vae]()
        multiple = vae.downsample * int(args.model.split("/")[1])
        if args.resolution % multiple:
            raise ValueError(f"--resolution {args.resolution} is not divisible by {multiple}, the factor of "
                             f"{args.vae} times the patch of {args.model}")
        build_sit(args, vae, encoders=[])


def load_vae(args, resumed):
    """(state dict of the VAE or None, its latent statistics (scale, bias) or None) to start from.

    A `resumed` run has the VAE that it trains in its checkpoint.
    """
    if args.vae_ckpt != "none" and (args.freeze_vae or not resumed):
        return vae_files.open_vae(args.vae_ckpt, args.vae, args.latents_stats)[1:3]
    if args.latents_stats is not None:
        return None, vae_files.load_stats(args.latents_stats, VAE_models[args.vae]().latent_channels)
    return None, None


def build_sit(args, vae, encoders):
    """A SiT of the settings: its latents are those of `vae`; a projector for each of `encoders`."""
    return SiT_models[args.model](
        input_size=args.resolution // vae.downsample, in_channels=vae.latent_channels,
        num_classes=args.num_classes, class_dropout_prob=args.cfg_prob,
        encoder_depth=args.encoder_depth, z_dims=[e.embed_dim for e in encoders], projector=args.projector,
        qk_norm=args.qk_norm, bn_momentum=args.bn_momentum)


def build_networks(args, device, vae_state, resumed=False):
    """The networks of the settings, and which of them learn. A `resumed` run reads their weights later."""
    torch.manual_seed(args.seed)
    nets = Networks(device, vae=VAE_models[args.vae](), trained={"sit": args.learning_rate})
    if vae_state is not None:
        nets.vae.load_state_dict(vae_state)
    if args.proj_coeff != 0 or (args.vae_align_proj_coeff != 0 and not args.freeze_vae):
        nets.encoders = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)
    nets.sit = build_sit(args, nets.vae, nets.encoders).to(device)
    nets.vae.to(device)
    if args.freeze_vae:
        nets.vae.requires_grad_(False)
        return nets
    nets.trained["vae"] = args.vae_learning_rate
    if args.perceptual_weight > 0:
        nets.lpips = weights.lpips().to(device)
    if args.disc_weight > 0:
        nets.disc = weights.discriminator("none" if resumed else args.disc_ckpt, args.vae).to(device)
        nets.trained["disc"] = args.disc_learning_rate
    return nets


@torch.no_grad()
def set_latents_stats(nets, args, dataset, stats):
    """Start bn's running statistics from `stats`, or measure them with the VAE on the run's first batches."""
    bn = nets.sit.bn
    if stats is not None:
        scale, bias = stats
        mean, variance = bias.flatten(), scale.flatten() ** -2.0
    else:
        # Where bn follows the latents, within some 20 steps, its start matters little.
        batches = 40 if args.freeze_vae or args.fixed_latents_stats else 2
        mean, variance = trainer.measure_latents(args, nets.vae, dataset, nets.device, batches)
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(variance)
    nets.ema.load_state_dict(nets.sit.state_dict())


# ------------------------------------------------------------------------------------------------ the step

def make_batch(nets, args, step, images, labels, latents=()):
    """The step's inputs for train_step, from uint8 images [b, 3, R, R] and labels [b] of this process.

    latents: of --latent-cache, mean and std of the posterior, each [b, C, h, w].
    """
    device, total = nets.device, args.batch_size
    generator, mine = trainer.draw_generator(args, step, device), trainer.my_share(args)
    shape = (total, nets.sit.in_channels, nets.sit.input_size, nets.sit.input_size)
    eps, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    t = sample_time(total, args.weighting, args.path_type, generator, device)
    dropped = torch.rand(total, generator=generator, device=device) < args.cfg_prob
    more = {}
    if args.decoder_noise:
        more["decoder_noise"] = torch.randn(shape, generator=generator, device=device)[mine]
    images, labels, *latents = (v.to(device, non_blocking=True) for v in (images, labels, *latents))
    with torch.no_grad(), nets.autocast():
        zs = [encoder(images).bfloat16() for encoder in nets.encoders]
    if args.spatial_norm is not None:
        zs = [spatial_norm(z, args.spatial_norm) for z in zs]
    labels_dropped = torch.where(dropped[mine], nets.sit.num_classes, labels)
    return SimpleNamespace(images=images.float() / 127.5 - 1, labels=labels, labels_dropped=labels_dropped,
                           latents=latents, zs=zs, eps=eps[mine], noise=noise[mine], t=t[mine], **more)


def train_step(nets, args, batch, use_gan=True):
    """One REPA-E step (paper, section 3).

    All gradients are taken at the weights before the step, then all are applied.

    Args:
        nets: trainer.Networks, after trainer.prepare.
        batch: namespace of this process's images [b, 3, R, R] in [-1, 1], labels [b], labels_dropped [b]
            (some of them the null label), zs (list of encoder tokens [b, T', D_k]), eps (of the posterior)
            and noise (of the path), both [b, C, h, w] ~ N(0, 1), t [b] in [0, 1], latents (of --latent-cache:
            [mean, std], else empty), with --decoder-noise decoder_noise [b, C, h, w] ~ N(0, 1). The VAE's
            and the SiT's update share t and noise.
        use_gan: whether the VAE sees the discriminator yet.
    Returns (metrics: dict of scalar tensors, skip: 1.0 if one of them was not finite: then no weight and no
    batch norm statistic has changed; the EMA still averages).
    """
    before = [buffer.clone() for buffer in nets.statistics]
    n = args.gradient_accumulation_steps
    parts = trainer.micro_batches(batch, n)
    metrics = {}

    if args.freeze_vae:
        z = torch.cat([frozen_latents(nets, part) for part in parts])
    else:
        # 1) VAE forward: posterior, latents z, reconstruction r.
        noises = trainer.decoder_noises(nets, args, parts)      # None without --decoder-noise
        outputs, z, recon = trainer.vae_forward(nets, parts, noises)
        # 2) The VAE's gradient: its own losses, and the alignment loss through a frozen SiT.
        gan, gan_gradients = None, [None] * n
        if nets.disc is not None and use_gan:
            # (6) and its gradient at r, weighted. Of the whole batch at once, because of the discriminator's
            # batch norms; its weights receive nothing. In float32, as in the reference: in bf16 this gradient
            # is off by an eighth, and the discriminator is small.
            r = wide(recon).requires_grad_()
            with nets.autocast(False):
                gan = gan_loss(nets.disc, r)                                                         # (6)
                gan_gradient, = torch.autograd.grad(args.disc_weight * gan, r)
            gan_gradients = (n * gan_gradient).chunk(n)     # n: backward averages over the micro-batches
        metrics |= trainer.backward(nets, "vae", "vae_loss", lambda *row: vae_losses(nets, args, gan, *row),
                                    parts, noises, outputs, gan_gradients)
        # 3) The discriminator's gradient, on the same reconstructions; the whole batch at once, for its
        #    batch norms.
        if nets.disc is not None:
            metrics |= trainer.backward(nets, "disc", "d_loss", lambda *row: disc_losses(nets, *row),
                                        [batch.images], [recon])

    # 4) The SiT's gradient, on z without its history: z was detached in trainer.vae_forward, and this is the
    #    paper's stop-gradient. bn takes the statistics of the whole batch, and its running ones follow; a
    #    frozen VAE's stay as they are.
    with nets.autocast():
        fixed = args.freeze_vae or args.fixed_latents_stats
        u = nets.sit.normalize(z) if fixed else nets.sit.bn(z)
    metrics |= trainer.backward(nets, "sit", "sit_loss", lambda *row: sit_losses(nets, args, *row),
                                parts, u.chunk(n))

    # 5) Clip, update all, average the SiT.
    return metrics, trainer.update(nets, args, metrics, before)


@torch.no_grad()
def frozen_latents(nets, part):
    """Latents z [b, C, h, w] of the frozen VAE, without autocast: they never change, so let them be good."""
    if part.latents:  # of a cache
        mean, std = part.latents
        return mean + std * part.eps
    return nets.vae.encode(part.images).sample(part.eps)


def vae_losses(nets, args, gan, part, noise, output, gan_gradient):
    """Part 2: the losses of the VAE on a micro-batch, as scalars by name; "vae_loss" is what it minimises.

    gan: the GAN loss of the whole batch, None until the VAE sees the discriminator; gan_gradient: this part's
    share of its gradient at the reconstructions, weighted. Gradient reaches the VAE. Not the SiT and its
    projector, whose weights enter detached; not the encoder.
    """
    moments, z, recon = trainer.vae_outputs(nets, part, noise, output)  # [b, 2C, h, w], [b, C, h, w], images
    losses = reconstruction_losses(part.images, recon, Posterior(moments), nets.lpips,
                                   args.reconstruction_weight, args.perceptual_weight, args.kl_weight,
                                   args.reconstruction_loss)                                         # (5)
    total = sum(losses.values())
    if gan is not None:
        losses["gan_loss"] = gan
        losses["weighted_gan_loss"] = trainer.with_gradient(args.disc_weight * gan.detach(), recon,
                                                            gan_gradient)                            # (6)
        total = total + losses["weighted_gan_loss"]

    aligned = part.zs and args.vae_align_proj_coeff
    if aligned or args.diffusion_to_vae:
        # The SiT is seen as in evaluation: running batch norm statistics, with gradient through them, and no
        # dropped label.
        u_t, v = noisy_latents(nets.sit.normalize(z), part.noise, part.t, args.path_type)       # (1), (2)
        frozen = {name: p.detach() for name, p in nets.sit.named_parameters()}
        velocity, zs_tilde = functional_call(                                          # zs_tilde [b, T, D_k]
            nets.sit, frozen, (u_t, part.t, part.labels), {"align_only": not args.diffusion_to_vae})
        if aligned:
            losses["vae_align_loss"] = proj_loss(part.zs, zs_tilde)                                  # (4)
            total = total + args.vae_align_proj_coeff * losses["vae_align_loss"]
        if args.diffusion_to_vae:
            # Left out otherwise: reaching the VAE, this loss makes latents that are easy to denoise and say
            # nothing (paper, table 1).
            losses["vae_denoising_loss"] = denoising_loss(velocity, v).mean()                        # (3)
            total = total + losses["vae_denoising_loss"]
    return losses | {"vae_loss": total}


def disc_losses(nets, images, recon):
    """Part 3: the discriminator's loss (7). Gradient reaches it alone. In float32, as in the reference."""
    with nets.autocast(False):
        d_loss, real, fake = discriminator_loss(nets.ddp["disc"], images, wide(recon))
    return {"d_loss": d_loss, "logits_real": real, "logits_fake": fake}


def sit_losses(nets, args, part, u):
    """Part 4: diffusion and alignment on a micro-batch; "sit_loss" is what SiT and projector minimise.

    u: its normalised latents [b, C, h, w], without history: gradient reaches SiT and projector, not the VAE.
    """
    u_t, v = noisy_latents(u, part.noise, part.t, args.path_type)                               # (1), (2)
    velocity, zs_tilde = nets.ddp["sit"](u_t, part.t, part.labels_dropped)
    losses = {"denoising_loss": denoising_loss(velocity, v).mean()}                                  # (3)
    total = losses["denoising_loss"]
    if part.zs:
        losses["proj_loss"] = proj_loss(part.zs, zs_tilde)                                           # (4)
        total = total + args.proj_coeff * losses["proj_loss"]
    return losses | {"sit_loss": total}


# ---------------------------------------------------------------------------------------------------- main

@cli.one_line_errors(trainer.MEMORY_REMEDY)
def main(argv=None):
    args = parse_args(argv)
    folder = os.path.join(args.output_dir, args.exp_name)

    # Processes: one per GPU under torchrun, or this one.
    rank, world_size, device = distributed.init()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # shapes never change
    check_settings(args, world_size)

    # Data.
    dataset = open_images(args.data_dir, args.resolution, args.hflip, args.seed, args.skip_corrupt)
    if dataset.num_classes > args.num_classes:
        raise ValueError(f"--num-classes {args.num_classes} is below the {dataset.num_classes} classes "
                         f"found in {args.data_dir}")
    sources = {"data": identity(dataset)}   # what the run is made of, for its checkpoints

    # The checkpoint to resume from, if there is one.
    path, state = trainer.newest_checkpoint(folder)
    if state is not None:
        # a frozen VAE may have moved: its digest is compared below
        fixed = FIXED_IN_A_RUN if args.freeze_vae else (*FIXED_IN_A_RUN, "vae_ckpt")
        trainer.check_resume(args, path, state, fixed)

    # Networks.
    with distributed.main_first():  # it downloads, the others find the files
        vae_state, stats = load_vae(args, resumed=state is not None)
        nets = build_networks(args, device, vae_state, resumed=state is not None)
    if args.freeze_vae:
        sources["vae_digest"] = files.state_digest(vae_state)
    sources["encoder_digests"] = {encoder.name: files.state_digest(encoder) for encoder in nets.encoders}
    if state is not None:
        trainer.check_sources(args, path, state, sources)
    trainer.check_same(args, sources, state)
    lock = trainer.claim_folder(folder, args.dry_run)   # nothing is written before, by a mistaken command
    if args.init_from is not None and state is None:
        initial, own_heads = weights.initial_sit(args.init_from, nets.sit)
        nets.sit.load_state_dict(initial)
        trainer.note(f"weights of {args.init_from}" + (", but new alignment heads" if own_heads else ""))
    trainer.prepare(nets, args)
    data = dataset
    if args.latent_cache and not args.dry_run:
        made_of = {"VAE": sources["vae_digest"], "data set": sources["data"],
                   "--resolution": args.resolution, "--hflip": args.hflip}
        data = cache.latents(args.latent_cache, dataset, made_of, nets.vae, device, args.num_workers,
                             images=bool(nets.encoders))

    # Resume, or begin.
    start = 0 if state is None else trainer.restore(nets, path, state)
    if args.dry_run:
        trainer.note("settings are sound")
        return distributed.shut_down()
    if state is None:
        set_latents_stats(nets, args, data, stats)
    log = RunLog(folder, args)
    log.resume(start)
    if rank == 0:
        files.save_json(vars(args), os.path.join(folder, "args.json"))
    parameters = sum(p.numel() for p in nets.sit.parameters())
    log.say(f"{args.model} ({parameters / 1e6:.1f} M) with {args.vae}, {len(dataset)} images of "
            f"{dataset.num_classes} classes, {world_size} x {device.type}, from step {start}"
            + (f" of {path}" if path else ""))

    # The loop.
    step, loader = start, trainer.data_loader(args, data, device, start, args.num_workers)
    with watch() as asked:
        for step in range(start + 1, args.max_train_steps + 1):
            images, labels, *latents = next(loader)
            stop = distributed.any_process(asked.by)    # all processes meet here: one that hangs is named
            batch = make_batch(nets, args, step, images, labels, latents)
            log.add(*train_step(nets, args, batch, use_gan=step > args.disc_start))

            final = step == args.max_train_steps
            try:
                if step % args.log_every == 0 or final:
                    log.write(step, args.batch_size)
                if step % args.checkpointing_steps == 0 or final or stop:
                    with log.paused():
                        path = trainer.save_checkpoint(nets, args, step, folder, **sources)
            except (Collapse, files.NotFinite) as error:
                log.say(f"stopped: {error}; the last good checkpoint is {path or 'none yet'}")
                sys.exit(1)
            if args.sampling_steps and step % args.sampling_steps == 0 and rank == 0:
                with log.paused(), torch.compiler.set_stance("force_eager"):    # compiling would take longer
                    if args.latent_cache:   # the batch may have no images
                        images = torch.stack([dataset[k][0] for k in range(min(8, len(dataset)))])
                    pictures.save_grids(nets, args, step, folder, images[:8])
            if stop:
                break
    log.say(f"done: {folder}" if step == args.max_train_steps else
            f"stopped by {asked.by or 'another process'}: saved {path}; the same command resumes")
    distributed.shut_down()     # waits for the last pictures
    if lock is not None:
        lock.close()


if __name__ == "__main__":
    main()
