"""VAE-only stage of REPA-E (arXiv 2504.10483): refine the tuned VAE, measure VAEs side by side, export them.

    torchrun --nproc-per-node 8 finetune_vae.py --ckpt exps/run/checkpoints/0400000.pt    # the decoder alone
    torchrun --nproc-per-node 8 finetune_vae.py --ckpt none --vae f16d32 --train-encoder  # a VAE from scratch
    python finetune_vae.py --eval REPA-E/sdvae exps/run/checkpoints/0400000.pt --data-dir data/imagenet/val
    python finetune_vae.py --export out/e2e-vae --format diffusers --ckpt exps/run/checkpoints/0400000.pt

A VAE is named as everywhere here: a CompVis .pt, a diffusers folder, a training checkpoint of either script,
or a hub name. With the encoder frozen, latents stay bit for bit what they were, so every diffusion model
trained on them stays valid. Run the same training command again and it continues from its newest checkpoint.

From top to bottom: the flags, the networks, the step, the loop (train), export. Measuring is in
models/runtime/vae_report.py, the formulas in models/losses.py, the plumbing in models/runtime/trainer.py.
"""
import os
import textwrap

from models.runtime import cli

# What a run cannot change when it is continued.
FIXED_IN_A_RUN = ("ckpt", "vae", "train_encoder", "resolution", "batch_size", "seed", "hflip", "encoder",
                  "reconstruction_weight", "reconstruction_loss", "perceptual_weight", "kl_weight",
                  "disc_weight", "disc_ckpt", "adaptive_disc_weight", "lecam_weight", "vae_align_proj_coeff")
# Images behind latent statistics that did not come with the VAE: 4 million positions at 256 px, f8.
STATS_IMAGES = 4096
# The modes beside training: their own flags, and those of training that they read too. Others are refused.
MODES = {
    "eval": (("eval", "metrics", "limit", "inception_weights", "model_ckpt"),
             ("data_dir", "resolution", "vae", "encoder", "encoder_ckpt", "mixed_precision", "seed", "preset",
              "output_dir", "exp_name", "dry_run")),
    "export": (("export", "format", "force"),
               ("ckpt", "vae", "latents_stats", "resolution", "preset", "dry_run")),
}
PRESETS = {
    "demo": dict(data_dir="shapes", resolution=32, ckpt="exps/demo/checkpoints/0000400.pt",
                 perceptual_weight=0.0, disc_weight=0.0, batch_size=32, max_train_steps=300,
                 learning_rate=1e-3, disc_learning_rate=1e-3, ema_decay=0.98, num_workers=0,
                 log_every=25, sampling_steps=150, checkpointing_steps=150,
                 metrics="psnr,ssim,latents,cknna", encoder="hog"),
}


def make_parser():
    parser = cli.make_parser(__doc__)
    groups = cli.training_flags(parser)
    model, losses = groups["model"], groups["losses"]
    flag = cli.flag
    flag(model, "--ckpt", None, "VAE to refine or export: a path, a hub name, or none (from scratch)")
    flag(model, "--train-encoder", False,
         "train the encoder too: latents change, diffusion models need retraining")

    flag(losses, "--adaptive-disc-weight", False,
         "multiply the GAN weight by VQGAN's ratio of last-layer gradients")
    flag(losses, "--lecam-weight", 0.0, "LeCam regularisation of the discriminator")
    flag(losses, "--vae-align-proj-coeff", 0.0,
         "weight of aligning projected latents with --encoder's tokens")

    measuring = parser.add_argument_group("measuring, instead of training", f"with {flags(MODES['eval'][1])}")
    flag(measuring, "--eval", None,
         "VAEs to measure side by side on any folder, .zip or .npz of held-out images",
         nargs="+", metavar="VAE")
    flag(measuring, "--metrics", "psnr,ssim,lpips,rfid,latents",
         "comma-separated; lpips and rfid need weights; cknna")
    flag(measuring, "--limit", None, "only so many images, evenly spaced", type=int, above=0)
    flag(measuring, "--inception-weights", None,
         "pt_inception-2015-12-05-6726825d.pth for rFID, else downloaded once")
    flag(measuring, "--model-ckpt", None,
         "training checkpoint of the SiT that CKNNA compares; default: each VAE's own")

    exporting = parser.add_argument_group("exporting, instead of training",
                                          f"with {flags(MODES['export'][1])}")
    flag(exporting, "--export", None, "write the VAE of --ckpt into this new folder")
    flag(exporting, "--format", "diffusers", "of the export", choices=["diffusers", "compvis"])
    flag(exporting, "--force", False, "let --export replace an earlier export")
    parser.set_defaults(data_dir=None, max_train_steps=50000, ema_decay=0.999, checkpointing_steps=5000,
                        sampling_steps=2500, milestones_every=0)
    return parser


def flags(names):
    return textwrap.fill(", ".join(f"--{name.replace('_', '-')}" for name in names), 100)


def check_mode(args, given):
    """End in one line if the command line states flags (names `given`) that its mode would ignore."""
    mode = next((name for name in MODES if getattr(args, name) is not None), None)
    if mode is not None:
        if ignored := given - set().union(*MODES[mode]):
            cli.fail(f"--{mode} does not read {flags(sorted(ignored))}; leave that out")
    for other, (own, _) in MODES.items():
        if other != mode and (ignored := given & set(own)):
            cli.fail(f"only --{other} reads {flags(sorted(ignored))}; leave that out")


def parse_args(argv=None):
    """Settings from the command line: explicit flags, over --preset, over the defaults."""
    parser = make_parser()
    args = cli.parse(parser, argv, PRESETS)
    check_mode(args, cli.given(parser, argv))
    if args.exp_name is None and not args.eval:     # evaluations are numbered: vae_report.run_folder
        args.exp_name = "vae-all" if args.train_encoder else "vae-decoder"
    if args.data_dir is None:
        args.data_dir = "data/imagenet/val" if args.eval else "data/imagenet/train"
    return args


if __name__ == "__main__":
    cli.answer_early(parse_args)

from types import SimpleNamespace

import torch

from models.encoders import check_encoders, load_encoders
from models.losses import discriminator_loss, proj_loss, reconstruction_losses, wide
from models.runtime import distributed, files, signals, trainer, vae_files, vae_report, weights
from models.runtime.flops import matmul_rate, vae_step_flops
from models.runtime.memory import forecast
from models.runtime.runlog import RunLog
from models.runtime.trainer import Networks
from models.vae import Posterior, VAE_models


# ----------------------------------------------------------------------------------------------- the networks

def check_settings(args, world_size, state):
    """All that can be checked before something heavy is built.

    Returns (dataset, VAE state or None, latent statistics or None).
    state: the checkpoint that a run continues from, or None; it holds all weights, so no other file is read.
    """
    trainer.check_settings(args, world_size)
    if args.vae_align_proj_coeff and not args.train_encoder:
        raise ValueError("--vae-align-proj-coeff acts on the encoder; it needs --train-encoder")
    if args.vae_align_proj_coeff:
        check_encoders(args.encoder, args.encoder_ckpt, args.resolution)
    vae_state = stats = None
    if state is None:
        vae_state, stats = find_weights(args)
    with torch.device("meta"):
        factor = VAE_models[args.vae]().downsample
    if args.resolution % factor:
        raise ValueError(f"--resolution {args.resolution} is not divisible by {factor}, "
                         f"the downsampling factor of {args.vae}")
    dataset = trainer.open_data(args)
    if len(dataset) < args.batch_size:
        raise ValueError(f"{args.data_dir}: {len(dataset)} images are fewer than one batch; "
                         "lower --batch-size")
    return dataset, vae_state, stats


def find_weights(args):
    """Settle --vae, --disc-ckpt and --disc-start by what --ckpt is.

    Returns (VAE state or None, latent statistics or None).
    """
    if args.ckpt is None:
        raise ValueError("name the VAE to refine with --ckpt; "
                         "from scratch: --ckpt none --vae f16d32 --train-encoder")
    state = stats = None
    if args.ckpt != "none":
        args.vae, state, stats = vae_files.open_vae(args.ckpt, args.vae, args.latents_stats)
    elif not args.train_encoder or args.vae is None:
        raise ValueError("--ckpt none makes a VAE from scratch: it needs --train-encoder and --vae")
    if args.disc_ckpt == "auto":
        sought = args.disc_weight > 0 and args.ckpt != "none"   # a hub's discriminator is a file of its own
        has_own = sought and weights.discriminator_state(args.ckpt, args.vae) is not None
        args.disc_ckpt = args.ckpt if has_own else "none"
    if args.disc_start is None:  # an untrained discriminator learns for a while before the VAE listens to it
        args.disc_start = 5000 if args.disc_ckpt == "none" else 0
    return state, stats


class LatentProjectors(torch.nn.ModuleList):
    """Latents [B, C, h, w] to tokens [B, h * w, D_k], one linear map per encoder.

    As VA-VAE does (arXiv 2501.01423).
    """

    def __init__(self, channels, encoders):
        super().__init__(torch.nn.Conv2d(channels, encoder.embed_dim, 1) for encoder in encoders)

    def forward(self, z):
        return [projector(z).flatten(2).transpose(1, 2) for projector in self]


def build_networks(args, device, vae_state, disc_ckpt="none"):
    """The networks of the settings, and which of them learn."""
    torch.manual_seed(args.seed)
    nets = Networks(device, vae=VAE_models[args.vae](), trained={"vae": args.learning_rate}, averaged="vae")
    if vae_state is not None:
        nets.vae.load_state_dict(vae_state)
    if not args.train_encoder:
        # Only what turns latents into images learns: the encoder is in no optimiser.
        nets.vae.requires_grad_(False)
        nets.vae.post_quant_conv.requires_grad_(True)
        nets.vae.decoder.requires_grad_(True)
    nets.vae.to(device)
    if args.perceptual_weight > 0:
        nets.lpips = weights.lpips().to(device)
    if args.disc_weight > 0:
        nets.disc = weights.discriminator(disc_ckpt, args.vae).to(device)
        nets.trained["disc"] = args.disc_learning_rate
    if args.vae_align_proj_coeff:
        nets.encoders = load_encoders(args.encoder, args.encoder_ckpt, args.resolution, device)
        nets.proj = LatentProjectors(nets.vae.latent_channels, nets.encoders).to(device)
        nets.trained["proj"] = args.learning_rate
    nets.lecam_means = torch.zeros(2, device=device)
    nets.statistics.append(nets.lecam_means)
    return nets


# --------------------------------------------------------------------------------------------------- the step

def make_batch(nets, args, step, images):
    """The step's inputs for train_step, from uint8 images [b, 3, R, R] of this process."""
    side = args.resolution // nets.vae.downsample
    eps = torch.randn((args.batch_size, nets.vae.latent_channels, side, side), device=nets.device,
                      generator=trainer.draw_generator(args, step, nets.device))
    images = images.to(nets.device, non_blocking=True)
    with torch.no_grad(), nets.autocast():
        zs = [encoder(images) for encoder in nets.encoders]
    return SimpleNamespace(images=images.float() / 127.5 - 1, zs=zs, eps=eps[trainer.my_share(args)])


def train_step(nets, args, batch, use_gan=True):
    """One step. Both gradients, the VAE's and the discriminator's, are taken at the weights before it.

    Args:
        nets: trainer.Networks, after trainer.prepare.
        batch: namespace of this process's images [b, 3, R, R] in [-1, 1], eps [b, C, h, w] ~ N(0, 1) and
            zs (list of encoder tokens [b, T', D_k], empty without alignment).
        use_gan: whether the VAE sees the discriminator yet.
    Returns (metrics: dict of scalar tensors, skip: 1.0 if one was not finite and nothing was updated).
    """
    before = [buffer.clone() for buffer in nets.statistics]
    parts = trainer.micro_batches(batch, args.gradient_accumulation_steps)

    # 1) VAE forward. A frozen encoder has no graph.
    _, recon = trainer.first_pass(nets, parts)
    # 2) The VAE's gradient, and the projectors'.
    if nets.disc is not None and use_gan:
        trainer.gan_gradient(nets, parts, recon)
        weight = args.disc_weight
        if args.adaptive_disc_weight:
            weight = weight * adaptive_weight(nets, args, parts)
        trainer.weigh_gan(parts, weight)
    aligned = ["proj"] if nets.proj is not None else []
    metrics = trainer.backward(nets, parts, lambda part: vae_losses(nets, args, part),
                               "vae_loss", "vae", *aligned)
    # 3) The discriminator's gradient, on the same reconstructions.
    #    The whole batch at once, for its batch norms.
    if nets.disc is not None:
        whole = SimpleNamespace(images=batch.images, recon=recon)
        metrics |= trainer.backward(nets, [whole], lambda part: disc_losses(nets, args, part),
                                    "d_loss", "disc")
        if args.lecam_weight > 0:
            means = torch.stack([metrics["logits_real"], metrics["logits_fake"]])
            means = distributed.all_reduce_sum(means) / distributed.world_size()
            # decay 0.999, as in the LeCam paper
            nets.lecam_means.lerp_(means.to(nets.lecam_means.dtype), 0.001)
    # 4) Clip, update all, average the VAE.
    return metrics, trainer.update(nets, args, metrics, before)


def vae_losses(nets, args, part):
    """Part 2: the losses of the VAE on a micro-batch, as scalars by name; "vae_loss" is what it minimises.

    Gradient reaches the trained part of the VAE and the projectors. Not the discriminator, of which only the
    gradient at the reconstruction was taken.
    """
    moments, z, recon = trainer.vae_outputs(nets, part)     # [b, 2C, h, w], [b, C, h, w], [b, 3, R, R]
    kl_weight = args.kl_weight if args.train_encoder else 0.0
    losses = reconstruction_losses(part.images, recon, Posterior(moments), nets.lpips,          # (5)
                                   args.reconstruction_weight, args.perceptual_weight, kl_weight,
                                   args.reconstruction_loss)
    if nets.proj is not None:
        alignment = proj_loss(part.zs, nets.ddp["proj"](z))                                      # (4)
        losses["vae_align_loss"] = args.vae_align_proj_coeff * alignment
    total = sum(losses.values())
    if hasattr(part, "gan_loss"):
        losses["gan_loss"] = part.gan_loss
        losses["weighted_gan_loss"] = trainer.gan_share(part, recon)                            # (6)
        total = total + losses["weighted_gan_loss"]
        if args.adaptive_disc_weight:
            losses["disc_weight"] = part.gan_weight     # for the log
    return losses | {"vae_loss": total}


def adaptive_weight(nets, args, parts):
    """|gradient of L1 + LPIPS| / (|gradient of the GAN loss| + 1e-4) at the decoder's last layer, up to 1e4.

    VQGAN's (arXiv 2012.09841, eq. 7), of the whole batch of all processes; with micro-batches it costs one
    more VAE forward. The gradients of that layer's input are computed on the way, and not used.
    """
    n, last, scale = len(parts), nets.vae.decoder.conv_out.weight, nets.loss_scale.value
    gradients = torch.zeros(2, *last.shape, device=last.device)
    for part in parts:
        with nets.autocast():
            kept = getattr(part, "outputs", None)
            moments, _, recon = nets.vae(part.images, part.eps) if kept is None else kept
            losses = reconstruction_losses(part.images, recon, None, nets.lpips,
                                           args.reconstruction_weight, args.perceptual_weight, 0.0,
                                           args.reconstruction_loss)
        loss = scale * sum(losses.values()) / n
        gan_gradient = scale * part.gan_gradient / n
        gradients[0] += torch.autograd.grad(loss, last, retain_graph=True)[0]
        gradients[1] += torch.autograd.grad(recon, last, gan_gradient.to(recon.dtype), retain_graph=n == 1)[0]
    gradients = distributed.all_reduce_sum(gradients) / (distributed.world_size() * scale)
    return (gradients[0].norm() / (gradients[1].norm() + 1e-4)).clamp(0, 1e4)


def disc_losses(nets, args, part):
    """Part 3: the discriminator's loss (7). Gradient reaches the discriminator alone."""
    with nets.autocast(False):  # float32, as in the reference
        d_loss, real, fake = discriminator_loss(nets.ddp["disc"], part.images, wide(part.recon),
                                                args.lecam_weight, nets.lecam_means)
    return {"d_loss": d_loss, "logits_real": real, "logits_fake": fake}


# --------------------------------------------------------------------------------------------------- the loop

def measure_stats(args, vae, dataset, device):
    """(latents_scale, latents_bias), [1, C, 1, 1] each, of the latents of the run's first images."""
    batches = max(1, min(STATS_IMAGES, len(dataset)) // args.batch_size)
    mean, variance = trainer.measure_latents(args, vae, dataset, device, batches)
    return variance.rsqrt().float().view(1, -1, 1, 1), mean.float().view(1, -1, 1, 1)


def build_blank(args, device):
    """Networks for models/runtime/memory.py, which counts with neither numbers nor files."""
    return build_networks(args, device, None)


def blank_step(nets, args, images, labels):
    """One step for models/runtime/memory.py."""
    train_step(nets, args, make_batch(nets, args, 2, images))


def set_up(args, folder, device):
    """Everything before the first step, what can fail first.

    Returns a namespace: nets, dataset, stats (of the latents), start (the step to go on from), kept (what
    every checkpoint repeats), log (the log's state), path (of the checkpoint); None after a --dry-run.
    """
    with distributed.main_first():  # it downloads, the others find the files
        path, state = trainer.find_checkpoint(args, folder)
        if state is not None:
            if "vae_ema" not in state:
                raise ValueError(f"{path}: holds no vae_ema; it is no checkpoint of this kind of run")
            args.vae = args.vae or vae_files.vae_name(state["vae_ema"])
            args.disc_ckpt = state["args"]["disc_ckpt"] if args.disc_ckpt == "auto" else args.disc_ckpt
            args.disc_start = state["args"]["disc_start"] if args.disc_start is None else args.disc_start
            trainer.check_resume(args, path, state, FIXED_IN_A_RUN)
        dataset, vae_state, stats = check_settings(args, distributed.world_size(), state)
    kept = {"data": trainer.check_data(args, dataset, state), "source_config": {}}
    if state is not None:
        kept["source_config"] = state.get("source_config", {})
    elif args.ckpt != "none":   # what pipelines read of the VAE, for an export
        kept["source_config"] = vae_files.source_config(args.ckpt, args.train_encoder)
    with distributed.main_first():
        nets = build_networks(args, device, vae_state, "none" if state else args.disc_ckpt)
    lock = trainer.claim_folder(folder, args.dry_run)
    trainer.prepare(nets, args)
    start = 0
    if state is not None:
        start = trainer.restore(nets, path, state)
        nets.lecam_means.copy_(state["lecam_means"])
        stats = state["latents_scale"], state["latents_bias"]
    trainer.check_same_start(start, device)
    if args.dry_run:
        if distributed.is_main():
            print(forecast(args, build_blank, blank_step, distributed.world_size()), flush=True)
        return None
    if state is None and stats is None and not args.train_encoder:
        stats = measure_stats(args, nets.vae, dataset, device)
    return SimpleNamespace(nets=nets, dataset=dataset, stats=stats, start=start, kept=kept,
                           log=(state or {}).get("log"), path=path, lock=lock)


def train(args):
    """Refinement, from the first step or the newest checkpoint to --max-train-steps."""
    folder = os.path.join(args.output_dir, args.exp_name)
    with trainer.starting():
        rank, world_size, device = distributed.init()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # shapes never change
        run = set_up(args, folder, device)
        if run is None:
            return print("settings are sound") if rank == 0 else None
        nets, dataset, stats, start = run.nets, run.dataset, run.stats, run.start

        log = RunLog(folder, args, vae_step_flops(args, nets), lambda: matmul_rate(device, nets.dtype))
        log.rewind(start)
        if run.log is not None:
            log.load_state_dict(run.log, device)
        trainer.write_args(args, folder)
        log.say(f"{'VAE' if args.train_encoder else 'decoder'} of {args.vae} ({args.ckpt}), "
                f"{len(dataset)} images, {world_size} x {device.type}, from step {start}"
                + (f" of {run.path}" if run.path else ""))
        for note in nets.notes:
            log.say(note)
        log.say(trainer.space_needed(nets, args, start, folder))
        loader = trainer.data_loader(args, dataset, device, start, args.num_workers)

    step, writer = start, trainer.CheckpointWriter(args, folder, run.path)
    with trainer.guarded(log, writer), signals.watch() as asked:
        for step in range(start + 1, args.max_train_steps + 1):
            images, _, skipped = next(loader)
            log.skipped_files += int(skipped.sum())
            stop = distributed.any_process(asked.by)    # all processes meet here: one that hangs is named
            batch = make_batch(nets, args, step, images)
            log.add(*train_step(nets, args, batch, use_gan=step > args.disc_start))

            final = step == args.max_train_steps
            def due(every): return every > 0 and step % every == 0
            if due(args.log_every) or final:
                log.write(step, args.batch_size)
            if due(args.checkpointing_steps) or final or stop:
                with log.paused("saving a checkpoint"):
                    if args.train_encoder:
                        stats = measure_stats(args, nets.ema, dataset, device)
                    # What other scripts read of it is vae_ema, with its latents_scale and latents_bias.
                    state = trainer.checkpoint_state(
                        nets, args, step, latents_scale=stats[0].cpu(), latents_bias=stats[1].cpu(),
                        lecam_means=nets.lecam_means.cpu(), **run.kept, log=log.state_dict())
                    writer.save(state)
            writer.check()
            if due(args.sampling_steps) and rank == 0:
                with log.paused("drawing pictures"):
                    picture = os.path.join(folder, "reconstructions", f"{step:07d}.png")
                    vae_report.save_picture(picture, images[:8], [nets.ema], ["EMA"])
            if stop:
                break
        writer.finish()
    log.say(f"done: {folder}" if step == args.max_train_steps else
            f"stopped by {asked.by or 'another process'}: saved {writer.last}; the same command continues")
    trainer.leave(run.lock)


# ----------------------------------------------------------------------------------------------------- export

def export(args):
    """--export: the VAE of --ckpt and its latent statistics as a folder."""
    if args.ckpt in (None, "none"):
        raise ValueError("--export needs the VAE's --ckpt")
    name, state, stats = vae_files.open_vae(args.ckpt, args.vae, args.latents_stats)
    # A pipeline reads these of the export as it did of the source.
    scalars = vae_files.source_config(args.ckpt)
    disc = weights.discriminator_state(args.ckpt, name) if args.format == "compvis" else None
    if args.dry_run:
        vae_files.check_export(args.export, state, stats, args.format, args.force)
        return print("settings are sound")
    written = vae_files.export_vae(args.export, state, stats, args.format, args.resolution, args.force,
                                   source=scalars, discriminator=disc)
    print(f"{args.export}: {written}")


def main(argv=None):
    args = parse_args(argv)
    if args.export is None:
        return vae_report.evaluate(args) if args.eval else train(args)
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            with signals.stopped_in_one_line("the export is whole, or not there"):
                export(args)
    except (ValueError, OSError) as error:
        cli.fail(error)


if __name__ == "__main__":
    main()
