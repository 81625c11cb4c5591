"""REPA-E: end-to-end training of a VAE and a latent diffusion transformer (arXiv 2504.10483).

    python train_repae_e.py --preset demo                             # CPU, offline, a few minutes
    torchrun --nproc-per-node 8 train_repae_e.py --model SiT-XL/2      # the paper's run, data/imagenet/train
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_repae_e.py
    python train_repae_e.py --freeze-vae                              # REPA; with --proj-coeff 0 plain SiT

Run the same command again and it continues from its newest checkpoint.

From top to bottom: the flags, the networks, the step (train_step and the losses of its parts), the loop
(main). The formulas are in models/losses.py; what both training scripts need around them, in
models/runtime/trainer.py. In comments "1)" to "5)" are the parts of the step, "(1)" to "(7)" the formulas.
"""
import os

from models.runtime import cli

# What a run cannot change when it is continued: the networks, the losses, and the order of the data.
FIXED_IN_A_RUN = (
    "model", "vae", "resolution", "num_classes", "encoder", "encoder_depth", "qk_norm", "learn_pos_embed",
    "projector", "freeze_vae", "bn_momentum", "fixed_latents_stats", "cfg_prob", "batch_size", "seed",
    "hflip", "path_type", "weighting", "proj_coeff", "vae_align_proj_coeff", "spatial_norm",
    "diffusion_to_vae", "reconstruction_weight", "reconstruction_loss", "perceptual_weight", "kl_weight",
    "disc_weight", "disc_ckpt")

# One row per configuration; every value is an ordinary flag and can be overridden.
PRESETS = {
    "sdvae": dict(model="SiT-XL/2", vae="f8d4", vae_ckpt="REPA-E/sdvae", disc_ckpt="REPA-E/sdvae"),
    "invae": dict(model="SiT-XL/1", vae="f16d32", vae_ckpt="REPA-E/invae", disc_ckpt="REPA-E/invae"),
    "vavae": dict(model="SiT-XL/1", vae="f16d32", vae_ckpt="REPA-E/vavae", disc_ckpt="REPA-E/vavae"),
    "demo": dict(data_dir="shapes", resolution=32, num_classes=10, num_workers=0, exp_name="demo",
                 model="SiT-Ti/2", encoder="hog", encoder_depth=3,
                 vae="f4d4", vae_ckpt="none", disc_ckpt="none",
                 reconstruction_weight=5.0, perceptual_weight=0.0, disc_weight=0.0,
                 batch_size=32, max_train_steps=400, ema_decay=0.98,
                 learning_rate=1e-3, vae_learning_rate=1e-3, disc_learning_rate=1e-3,
                 cfg_scale=2.0, log_every=25, sampling_steps=200, checkpointing_steps=200),
}


def make_parser():
    parser = cli.make_parser(__doc__)
    groups = cli.training_flags(parser)
    data, model, losses, optim, run = (groups[k] for k in ("data", "model", "losses", "optimisation", "run"))
    flag = cli.flag
    flag(data, "--num-classes", 1000, "classes of the label table; at least as many as the data has", above=0,
         most=10**6)
    flag(data, "--latent-cache", None, "folder for the frozen VAE's posteriors of all images; the first run "
         "fills it", metavar="DIR")
    flag(data, "--cache-features", None, "folder for the encoders' tokens of all images; the first run fills "
         "it", metavar="DIR")

    flag(model, "--model", "SiT-XL/2", "diffusion transformer: SiT-{XL,L,B,S,Ti}/{1,2,4,8}",
         choices=cli.SITS, metavar="NAME")
    flag(model, "--encoder-depth", 8,
         "block, from 1, whose tokens are aligned (8 for L and XL, 4 is usual for B)", above=0)
    flag(model, "--projector", "mlp",
         "alignment head: REPA's MLP, or one 3x3 convolution (iREPA, arXiv 2512.10794)",
         choices=["mlp", "conv"])
    flag(model, "--qk-norm", False, "layer norm on queries and keys")
    flag(model, "--bn-momentum", 0.1, "momentum of the latent batch norm", most=1.0)
    flag(model, "--fixed-latents-stats", False,
         "ablation: the latents keep the scale they start with; no batch norm (a frozen VAE's always do)")
    flag(model, "--learn-pos-embed", False, "train the position table, as the reference does by accident")
    flag(model, "--cfg-prob", 0.1, "probability of dropping a label, for classifier-free guidance", most=1.0)
    flag(model, "--vae-ckpt", "auto",
         "VAE weights: a path, a hub name, none, or auto (f8d4: REPA-E/sdvae, else none)")
    flag(model, "--init-from", None,
         "start at step 0 from this training checkpoint, ours or a released one: its averaged weights and, "
         "unless flags name others, its VAE and discriminator")

    flag(losses, "--proj-coeff", 0.5, "alignment weight in the SiT update")
    flag(losses, "--vae-align-proj-coeff", 1.5, "alignment weight in the VAE update")
    flag(losses, "--proj-until", None, type=int, above=0, help="last step with alignment, in both updates "
         "(HASTE, arXiv 2505.16792); default: all have it")
    flag(losses, "--spatial-norm", None, type=float, above=0.0, most=1.0, help="normalise the encoder's "
         "tokens over space, with this share of their mean removed (iREPA: 0.6 to 1); default: as they are")
    flag(losses, "--freeze-vae", False, "train the SiT only (REPA; with --proj-coeff 0 vanilla SiT)")
    flag(losses, "--diffusion-to-vae", False,
         "ablation: the diffusion loss reaches the VAE (it collapses the latents)")
    flag(losses, "--path-type", "linear", "interpolant", choices=["linear", "cosine"])
    flag(losses, "--weighting", "uniform", "how training times are drawn", choices=["uniform", "lognormal"])

    flag(optim, "--vae-learning-rate", 1e-4, "of the VAE, constant", above=0.0)

    flag(run, "--cfg-scale", 4.0, "guidance of the picture grids (50 Euler steps)", least=1.0)
    flag(run, "--eval-steps", 0,
         "steps between online scores (fid_online ..., 50 Euler steps, unguided); 0 for none")
    flag(run, "--eval-ref", None, "reference of the online scores, as for evaluate_fid.py")
    flag(run, "--eval-samples", 10000, "samples of an online score", above=0, most=10**8)
    flag(run, "--inception-weights", None,
         "pt_inception-2015-12-05-6726825d.pth, if it cannot be downloaded")
    parser.set_defaults(vae="f8d4")  # finetune_vae.py has none: there the checkpoint says
    return parser


def parse_args(argv=None):
    """Settings from the command line: explicit flags, over --preset, over the paper's defaults."""
    args = cli.parse(make_parser(), argv, PRESETS)
    source = args.init_from
    if args.freeze_vae and args.resume not in ("auto", "none"):
        source = args.resume    # holds no VAE, but leads to the one that it was trained on
    if source is not None:      # its VAE counts more than one a preset names, less than one a flag names
        own = {"vae_ckpt": source, "disc_ckpt": source}
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


if __name__ == "__main__":
    cli.answer_early(parse_args)

from types import SimpleNamespace

import torch
from torch.func import functional_call

from models.encoders import check_encoders, load_encoders
from models.losses import (denoising_loss, discriminator_loss, noisy_latents, proj_loss,
                           reconstruction_losses, sample_time, spatial_norm, wide)
from models.runtime import cache, distributed, online, signals, trainer, vae_files, weights
from models.runtime.flops import matmul_rate, step_flops
from models.runtime.memory import forecast
from models.runtime.runlog import RunLog
from models.runtime.trainer import Networks
from models.sit import SiT_models
from models.vae import Posterior, VAE_models


# -------------------------------------------------------------------------------------------- the networks

def check_settings(args, world_size, continued):
    """All that can be checked before something heavy is built.

    Returns (dataset, VAE state or None, stats or None).
    A run that is `continued` has the weights of its VAE and discriminator in its checkpoint.
    """
    trainer.check_settings(args, world_size)
    if args.freeze_vae and args.diffusion_to_vae:
        raise ValueError("--freeze-vae and --diffusion-to-vae exclude each other")
    if args.latent_cache and not args.freeze_vae:
        raise ValueError("--latent-cache holds what a VAE that learns would change: it needs --freeze-vae")
    if args.cache_features and not uses_encoders(args):
        raise ValueError("--cache-features has nothing to hold: no encoder is aligned with")
    if args.freeze_vae and args.vae_ckpt == "none":
        raise ValueError("--freeze-vae would train on a random VAE; name its weights with --vae-ckpt")
    if args.fixed_latents_stats and args.vae_ckpt == "none" and args.latents_stats is None:
        raise ValueError("--fixed-latents-stats would keep the scale of a random VAE; name its weights with "
                         "--vae-ckpt, or a scale with --latents-stats")
    has_disc = args.disc_weight > 0 and not args.freeze_vae
    with torch.device("meta"):
        vae = VAE_models[args.vae]()
        multiple = vae.downsample * int(args.model.split("/")[1])
        if args.resolution % multiple:
            raise ValueError(f"--resolution {args.resolution} is not divisible by {multiple}, the factor of "
                             f"{args.vae} times the patch of {args.model}")
        sit = build_sit(args, vae, encoders=[])
    if args.init_from is not None and not continued:
        weights.initial_sit(args.init_from, sit)
    if args.eval_steps and (args.eval_ref is None or not os.path.exists(args.eval_ref)):
        raise FileNotFoundError(f"--eval-steps needs a reference: --eval-ref {args.eval_ref} does not exist")
    if args.inception_weights is not None and not os.path.isfile(args.inception_weights):
        raise FileNotFoundError(f"--inception-weights {args.inception_weights}: no such file")
    if uses_encoders(args):
        check_encoders(args.encoder, args.encoder_ckpt, args.resolution)
    dataset = trainer.open_data(args)
    if dataset.num_classes > args.num_classes:
        raise ValueError(f"--num-classes {args.num_classes} is below the {dataset.num_classes} classes "
                         f"found in {args.data_dir}")
    state = stats = None
    if args.vae_ckpt != "none" and (args.freeze_vae or not continued):
        _, state, stats = vae_files.open_vae(args.vae_ckpt, args.vae, args.latents_stats)
    elif args.latents_stats is not None:
        stats = vae_files.load_stats_file(args.latents_stats)
        if stats[0].numel() != vae.latent_channels:
            raise ValueError(f"{args.latents_stats}: statistics of {stats[0].numel()} channels, "
                             f"but {args.vae} has {vae.latent_channels}")
    if has_disc and not continued:
        weights.discriminator(args.disc_ckpt, args.vae)
    return dataset, state, stats


def uses_encoders(args):
    return args.proj_coeff != 0 or (args.vae_align_proj_coeff != 0 and not args.freeze_vae)


def build_sit(args, vae, encoders):
    """A SiT of the settings: its latents are those of `vae`; a projector for each of `encoders`."""
    return SiT_models[args.model](
        input_size=args.resolution // vae.downsample, in_channels=vae.latent_channels,
        num_classes=args.num_classes, class_dropout_prob=args.cfg_prob,
        encoder_depth=args.encoder_depth, z_dims=[e.embed_dim for e in encoders], projector=args.projector,
        qk_norm=args.qk_norm, bn_momentum=args.bn_momentum, learn_pos_embed=args.learn_pos_embed)


def build_networks(args, device, vae_state, continued=False):
    """The networks of the settings, and which of them learn."""
    torch.manual_seed(args.seed)
    nets = Networks(device, vae=VAE_models[args.vae](), trained={"sit": args.learning_rate})
    if vae_state is not None:
        nets.vae.load_state_dict(vae_state)
    if uses_encoders(args):
        place = "cpu" if args.cache_features else device
        nets.encoders = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, place)
    nets.sit = build_sit(args, nets.vae, nets.encoders).to(device)
    if args.init_from is not None and not continued:
        state, anew = weights.initial_sit(args.init_from, nets.sit)
        nets.sit.load_state_dict(state)
        nets.notes.append(f"weights of {args.init_from}" + (", but new alignment heads" if anew else ""))
    nets.vae.to("cpu" if args.latent_cache else device)  # a cached VAE is there for pictures only
    if args.freeze_vae:
        nets.vae.requires_grad_(False)
        return nets
    nets.trained["vae"] = args.vae_learning_rate
    if args.perceptual_weight > 0:
        nets.lpips = weights.lpips().to(device)
    if args.disc_weight > 0:
        nets.disc = weights.discriminator("none" if continued else args.disc_ckpt, args.vae).to(device)
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


def end_alignment(nets):
    """After step --proj-until: no update aligns any more, nor pays for it (HASTE, arXiv 2505.16792).

    The encoders go. The projectors stay in the checkpoints, as they are.
    """
    nets.encoders = []
    nets.sit.encoder_depth = None
    nets.sit.projectors.requires_grad_(False)
    nets.ddp["sit"] = trainer.wrap_ddp(nets.sit, nets.device)   # anew: it would wait for their gradients


# ------------------------------------------------------------------------------------------------ the step

def make_batch(nets, args, step, images, labels, latents=(), tokens=()):
    """The step's inputs for train_step, from uint8 images [b, 3, R, R] and labels [b] of this process.

    From caches come latents (mean and std of the posterior, each [b, C, h, w]) and each encoder's tokens.
    """
    device, total = nets.device, args.batch_size
    generator, mine = trainer.draw_generator(args, step, device), trainer.my_share(args)
    shape = (total, nets.sit.in_channels, nets.sit.input_size, nets.sit.input_size)
    eps, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    t = sample_time(total, args.weighting, args.path_type, generator, device)
    dropped = torch.rand(total, generator=generator, device=device) < args.cfg_prob
    images, labels, *cached = (v.to(device, non_blocking=True) for v in (images, labels, *latents, *tokens))
    latents, zs = cached[:len(latents)], cached[len(latents):]
    if not tokens:
        with torch.no_grad(), nets.autocast():
            zs = [encoder(images).bfloat16() for encoder in nets.encoders]  # as a cache keeps them
    elif not nets.encoders:  # the end of alignment, which does not stop the reading
        zs = []
    if args.spatial_norm is not None:
        zs = [spatial_norm(z, args.spatial_norm) for z in zs]
    labels_dropped = torch.where(dropped[mine], nets.sit.num_classes, labels)
    return SimpleNamespace(images=images.float() / 127.5 - 1, labels=labels, labels_dropped=labels_dropped,
                           latents=latents, zs=zs, eps=eps[mine], noise=noise[mine], t=t[mine])


def train_step(nets, args, batch, use_gan=True):
    """One REPA-E step (paper, section 3).

    All gradients are taken at the weights before the step, then all are applied.

    Args:
        nets: trainer.Networks, after trainer.prepare.
        batch: namespace of this process's images [b, 3, R, R] in [-1, 1], labels [b], labels_dropped [b]
            (some of them the null label), zs (list of encoder tokens [b, T', D_k]), eps (of the posterior)
            and noise (of the path), both [b, C, h, w] ~ N(0, 1), t [b] in [0, 1], latents (of --latent-cache:
            [mean, std], else empty). The VAE's and the SiT's update share t and noise.
        use_gan: whether the VAE sees the discriminator yet.
    Returns (metrics: dict of scalar tensors, skip: 1.0 if one of them was not finite: then no weight and no
    batch norm statistic has changed; the EMA goes on averaging).
    """
    before = [buffer.clone() for buffer in nets.statistics]
    parts = trainer.micro_batches(batch, args.gradient_accumulation_steps)
    metrics = {}

    if args.freeze_vae:
        z = torch.cat([frozen_latents(nets, part) for part in parts])
    else:
        # 1) VAE forward: posterior, latents z, reconstruction.
        z, recon = trainer.first_pass(nets, parts)
        # 2) The VAE's gradient: its own losses, and the alignment loss through a frozen SiT.
        if nets.disc is not None and use_gan:
            trainer.gan_gradient(nets, parts, recon, args.disc_weight)
        metrics |= trainer.backward(nets, parts, lambda part: vae_losses(nets, args, part), "vae_loss", "vae")
        # 3) The discriminator's gradient, on the same reconstructions; the whole batch at once, for its
        #    batch norms.
        if nets.disc is not None:
            whole = SimpleNamespace(images=batch.images, recon=recon)
            metrics |= trainer.backward(nets, [whole], lambda part: disc_losses(nets, part), "d_loss", "disc")

    # 4) The SiT's gradient, on z without its history: z was detached above, and this is the paper's
    #    stop-gradient. bn takes the statistics of the whole batch, and its running ones follow; a frozen
    #    VAE's stay as they are.
    with nets.autocast():
        fixed = args.freeze_vae or args.fixed_latents_stats
        u = nets.sit.normalize(z) if fixed else nets.sit.bn(z)
    for part, u_part in zip(parts, u.chunk(len(parts))):
        part.u = u_part
    metrics |= trainer.backward(nets, parts, lambda part: sit_losses(nets, args, part), "sit_loss", "sit")

    # 5) Clip, update all, average the SiT.
    return metrics, trainer.update(nets, args, metrics, before)


@torch.no_grad()
def frozen_latents(nets, part):
    """Latents z [b, C, h, w] of the frozen VAE, in float32: never changing, they may as well be exact."""
    if part.latents:  # of a cache
        mean, std = part.latents
        return mean + std * part.eps
    return nets.vae.encode(part.images).sample(part.eps)


def vae_losses(nets, args, part):
    """Part 2: the losses of the VAE on a micro-batch, as scalars by name; "vae_loss" is what it minimises.

    Gradient reaches the VAE. Not the SiT and its projector, whose weights enter detached; not the
    discriminator, of which only the gradient at the reconstruction was taken; not the encoder.
    """
    moments, z, recon = trainer.vae_outputs(nets, part)     # [b, 2C, h, w], [b, C, h, w], [b, 3, R, R]
    losses = reconstruction_losses(part.images, recon, Posterior(moments), nets.lpips,
                                   args.reconstruction_weight, args.perceptual_weight, args.kl_weight,
                                   args.reconstruction_loss)                                         # (5)
    total = sum(losses.values())
    if hasattr(part, "gan_loss"):   # put there by trainer.gan_gradient, once the VAE sees the discriminator
        losses["gan_loss"] = part.gan_loss
        losses["weighted_gan_loss"] = trainer.gan_share(part, recon)                                 # (6)
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


def disc_losses(nets, part):
    """Part 3: the discriminator's loss (7). Gradient reaches it alone. In float32, as in the reference."""
    with nets.autocast(False):
        d_loss, real, fake = discriminator_loss(nets.ddp["disc"], part.images, wide(part.recon))
    return {"d_loss": d_loss, "logits_real": real, "logits_fake": fake}


def sit_losses(nets, args, part):
    """Part 4: diffusion and alignment on a micro-batch; "sit_loss" is what SiT and projector minimise.

    Gradient reaches both. Not the VAE: part.u has no history.
    """
    u_t, v = noisy_latents(part.u, part.noise, part.t, args.path_type)                          # (1), (2)
    velocity, zs_tilde = nets.ddp["sit"](u_t, part.t, part.labels_dropped)
    losses = {"denoising_loss": denoising_loss(velocity, v).mean()}                                  # (3)
    total = losses["denoising_loss"]
    if part.zs:
        losses["proj_loss"] = proj_loss(part.zs, zs_tilde)                                           # (4)
        total = total + args.proj_coeff * losses["proj_loss"]
    return losses | {"sit_loss": total}


# ------------------------------------------------------------------------------------------------ the loop

def build_blank(args, device):
    """Networks for models/runtime/memory.py, which counts with neither numbers nor files."""
    return build_networks(args, device, None, continued=True)


def blank_step(nets, args, images, labels):
    """One step for models/runtime/memory.py, with what the settings have in caches."""
    latents, tokens, host = [], [], torch.device("cpu")
    if args.latent_cache:
        side, channels = nets.sit.input_size, nets.sit.in_channels
        latents = [torch.zeros(len(labels), channels, side, side, device=host) for _ in ("mean", "std")]
    if args.cache_features:
        tokens = [torch.zeros(len(labels), e.grid ** 2, e.embed_dim, dtype=torch.bfloat16, device=host)
                  for e in nets.encoders]
    if not reads_images(args, nets):
        images = images[:, :0]
    train_step(nets, args, make_batch(nets, args, 2, images, labels, latents, tokens))


def set_up(args, folder, device):
    """Everything before the first step; what can fail comes first.

    Returns a namespace: nets, dataset (images), data (what a step reads: images or their caches), start (the
    step to go on from), kept (what every checkpoint repeats), log (the log's state), path (of the
    checkpoint), lock (of the run folder), score (of --eval-steps); None after a --dry-run.
    """
    with distributed.main_first():  # it downloads, the others find the files
        path, state = trainer.find_checkpoint(args, folder)
        if state is not None:
            # A frozen VAE may lie elsewhere now: its digest is compared below.
            fixed = FIXED_IN_A_RUN if args.freeze_vae else (*FIXED_IN_A_RUN, "vae_ckpt")
            trainer.check_resume(args, path, state, fixed)
        dataset, vae_state, stats = check_settings(args, distributed.world_size(),
                                                   continued=state is not None)
    kept = {"data": trainer.check_data(args, dataset, state)}
    if args.freeze_vae:
        kept["vae_digest"] = weights.state_digest(vae_state)
        if state is not None and state.get("vae_digest", kept["vae_digest"]) != kept["vae_digest"]:
            raise ValueError(f"{path}: was trained on another VAE than {args.vae_ckpt} now is; name that one")
    if args.latent_cache or args.cache_features:
        distributed.from_main(lambda: check_caches(args, dataset, kept))
    with distributed.main_first():
        nets = build_networks(args, device, vae_state, continued=state is not None)
    lock = trainer.claim_folder(folder, args.dry_run)
    data = dataset if args.dry_run else cached_data(nets, args, dataset, kept)
    trainer.prepare(nets, args)
    start = 0 if state is None else trainer.restore(nets, path, trainer.adopt(nets, path, state))
    trainer.note_position_table(nets, path or args.init_from)
    trainer.check_same_start(start, device)
    score = online.make_scorer(nets, args) if args.eval_steps else None
    if args.dry_run:
        if distributed.is_main():
            print(forecast(args, build_blank, blank_step, distributed.world_size()), flush=True)
        return None
    if state is None:
        set_latents_stats(nets, args, data, stats)
    return SimpleNamespace(nets=nets, dataset=dataset, data=data, start=start, kept=kept,
                           log=(state or {}).get("log"), path=path, lock=lock, score=score)


def check_caches(args, dataset, kept):
    """Look at the caches by the networks' outlines, before anything is built: are they the right ones, and is
    there room for those to be made."""
    with torch.device("meta"):
        vae = VAE_models[args.vae]()
    encoders = []
    if args.cache_features:
        encoders = check_encoders(args.encoder, args.encoder_ckpt, args.resolution)
    cache.check(cache.plan(args, dataset, kept, vae, encoders))


def cached_data(nets, args, dataset, kept):
    """`dataset` with what the settings have in caches; those that are missing are made now."""
    caches = cache.plan(args, dataset, kept, nets.vae, nets.encoders)
    if not caches:
        return dataset
    cache.make(caches, dataset, nets.device, args.num_workers)
    return cache.CachedData(dataset, caches, reads_images(args, nets))


def reads_images(args, nets):
    """Whether a step needs the images themselves, or has all that it needs of them in caches."""
    return not args.latent_cache or bool(nets.encoders and not args.cache_features)


def main(argv=None):
    args = parse_args(argv)
    folder = os.path.join(args.output_dir, args.exp_name)
    with trainer.starting():
        rank, world_size, device = distributed.init()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # shapes never change
        run = set_up(args, folder, device)
        if run is None:
            return print("settings are sound") if rank == 0 else None
        nets, dataset, start, score = run.nets, run.dataset, run.start, run.score

        def flops(): return step_flops(args, nets, lambda: build_sit(args, nets.vae, nets.encoders))
        log = RunLog(folder, args, flops(), lambda: matmul_rate(device, nets.dtype))
        log.rewind(start)
        if run.log is not None:
            log.load_state_dict(run.log, device)
        trainer.write_args(args, folder)
        parameters = sum(p.numel() for p in nets.sit.parameters())
        log.say(f"{args.model} ({parameters / 1e6:.1f} M) with {args.vae}, {len(dataset)} images of "
                f"{dataset.num_classes} classes, {world_size} x {device.type}, from step {start}"
                + (f" of {run.path}" if run.path else ""))
        for note in nets.notes:
            log.say(note)
        log.say(trainer.space_needed(nets, args, start, folder))
        loader = trainer.data_loader(args, run.data, device, start, args.num_workers)

    step, writer = start, trainer.CheckpointWriter(args, folder, run.path)
    with trainer.guarded(log, writer), signals.watch() as asked:
        for step in range(start + 1, args.max_train_steps + 1):
            if args.proj_until is not None and step > args.proj_until and nets.encoders:
                end_alignment(nets)
                log.flops_per_image = flops()
                log.say(f"step {step}: no alignment from here on")
            images, labels, skipped, *cached = next(loader)
            log.skipped_files += int(skipped.sum())
            stop = distributed.any_process(asked.by)    # all processes meet here: one that hangs is named
            batch = make_batch(nets, args, step, images, labels, *cached)
            log.add(*train_step(nets, args, batch, use_gan=step > args.disc_start))

            final, scores = step == args.max_train_steps, {}
            def due(every): return every > 0 and step % every == 0
            if due(args.eval_steps):
                with log.paused("scoring samples"):
                    scores = score()
            if due(args.log_every) or due(args.eval_steps) or final:
                log.write(step, args.batch_size, **scores)
            if due(args.checkpointing_steps) or final or stop:
                with log.paused("saving a checkpoint"):
                    state = trainer.checkpoint_state(nets, args, step, **run.kept, log=log.state_dict())
                    writer.save(state)
            writer.check()
            if due(args.sampling_steps) and rank == 0:
                with log.paused("drawing pictures"):
                    online.save_grids(nets, args, step, folder, dataset)
            if stop:
                break
        writer.finish()
    log.say(f"done: {folder}" if step == args.max_train_steps else
            f"stopped by {asked.by or 'another process'}: saved {writer.last}; the same command continues")
    trainer.leave(run.lock)


if __name__ == "__main__":
    main()
