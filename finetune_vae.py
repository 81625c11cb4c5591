"""VAE-only stage of REPA-E (arXiv 2504.10483): refine the tuned VAE, measure VAEs side by side, export them.

    torchrun --nproc-per-node 8 finetune_vae.py --ckpt exps/run/checkpoints/0400000.pt    # the decoder alone
    torchrun --nproc-per-node 8 finetune_vae.py --ckpt none --vae f16d32 --train-encoder  # a VAE from scratch
    python finetune_vae.py --eval REPA-E/sdvae exps/run/checkpoints/0400000.pt --data-dir data/imagenet/val
    python finetune_vae.py --export out/e2e-vae --format diffusers --ckpt exps/run/checkpoints/0400000.pt

A VAE is named as everywhere here: a CompVis .pt, a diffusers folder, a training checkpoint of either script,
or a hub name. With the encoder frozen, latents stay bit for bit what they were, so every diffusion model
trained on them stays valid. Run the same training command again and it resumes from its newest checkpoint.

From top to bottom: the flags, the networks, the step, the loop (train), export. Measuring is in
models/runtime/vae_report.py, the formulas in models/losses.py, the plumbing in models/runtime/trainer.py.
"""
import os
import sys
from types import SimpleNamespace

import torch

from models.losses import discriminator_loss, gan_loss, reconstruction_losses, wide
from models.runtime import cli, distributed, files, pictures, trainer, vae_files, vae_report, weights
from models.runtime.data import identity, open_images
from models.runtime.log import Collapse, RunLog, watch
from models.runtime.trainer import Networks
from models.vae import Posterior, VAE_models

# What a run cannot change when it resumes.
FIXED_IN_A_RUN = ("ckpt", "vae", "train_encoder", "resolution", "batch_size", "seed", "hflip",
                  "reconstruction_weight", "reconstruction_loss", "perceptual_weight", "kl_weight",
                  "decoder_noise", "disc_weight", "disc_ckpt")
# Images behind latent statistics that did not come with the VAE: 4 million positions at 256 px, f8.
STATS_IMAGES = 4096
PRESETS = {
    "demo": dict(data_dir="shapes", resolution=32, ckpt="exps/demo/checkpoints/0000700.pt",
                 perceptual_weight=0.0, disc_weight=0.0, batch_size=32, max_train_steps=300,
                 learning_rate=1e-3, disc_learning_rate=1e-3, ema_decay=0.98, num_workers=0,
                 log_every=25, sampling_steps=150, checkpointing_steps=150, metrics="psnr,ssim,latents"),
}


def make_parser():
    parser = cli.make_parser(__doc__)
    groups = cli.training_flags(parser, PRESETS)
    model, flag = groups["model"], cli.flag
    flag(model, "--ckpt", None, "VAE to refine or export: a path, a hub name, or none (from scratch)")
    flag(model, "--train-encoder", False, "train the encoder too: diffusion models need retraining")

    measuring = parser.add_argument_group("measuring, instead of training")
    flag(measuring, "--eval", None, "VAEs to measure side by side on any folder, .zip or .npz of held-out "
         "images", nargs="+", metavar="VAE")
    flag(measuring, "--metrics", "psnr,ssim,lpips,rfid,latents", "with commas; lpips and rfid need weights")
    flag(measuring, "--limit", None, "only so many images, evenly spaced", type=int)
    flag(measuring, "--inception-weights", None,
         "pt_inception-2015-12-05-6726825d.pth for rFID, else downloaded once")

    exporting = parser.add_argument_group("exporting, instead of training")
    flag(exporting, "--export", None, "write the VAE of --ckpt into this new folder")
    flag(exporting, "--format", "diffusers", "of the export", choices=["diffusers", "compvis"])
    parser.set_defaults(data_dir=None, max_train_steps=50000, ema_decay=0.999, checkpointing_steps=5000,
                        sampling_steps=2500)
    return parser


def parse_args(argv=None):
    """Settings from the command line: explicit flags, over --preset, over the defaults."""
    args = cli.parse(make_parser(), argv, PRESETS)
    name = "vae-eval" if args.eval else "vae-all" if args.train_encoder else "vae-decoder"
    args.exp_name = args.exp_name or name
    args.data_dir = args.data_dir or f"data/imagenet/{'val' if args.eval else 'train'}"
    return args


# ----------------------------------------------------------------------------------------------- the networks

def find_weights(args):
    """Settle --vae, --disc-ckpt and --disc-start by what --ckpt is.

    Returns (VAE state or None, latent statistics or None, pipelines' numbers: see vae_files.open_vae).
    """
    if args.ckpt is None or args.ckpt == "none" and not (args.vae and args.train_encoder):
        raise ValueError("name the VAE to refine with --ckpt; "
                         "from scratch: --ckpt none --vae f16d32 --train-encoder")
    state, stats, numbers = None, None, {}
    if args.ckpt != "none":
        args.vae, state, stats, numbers = vae_files.open_vae(args.ckpt, args.vae, args.latents_stats)
    if args.disc_ckpt == "auto":
        sought = args.disc_weight > 0 and args.ckpt != "none"   # a hub's discriminator is a file of its own
        has_own = sought and weights.discriminator_state(args.ckpt, args.vae) is not None
        args.disc_ckpt = args.ckpt if has_own else "none"
    if args.disc_start is None:  # an untrained discriminator learns for a while before the VAE listens to it
        args.disc_start = 5000 if args.disc_ckpt == "none" else 0
    return state, stats, {} if args.train_encoder else numbers  # the numbers are of a frozen encoder


def build_networks(args, device, vae_state, resumed=False):
    """The networks of the settings, and which of them learn. A `resumed` run reads their weights later."""
    torch.manual_seed(args.seed)
    nets = Networks(device, vae=VAE_models[args.vae](), trained={"vae": args.learning_rate}, averaged="vae")
    if args.resolution % nets.vae.downsample:
        raise ValueError(f"--resolution {args.resolution} is not divisible by {nets.vae.downsample}, the "
                         f"downsampling factor of {args.vae}")
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
        nets.disc = weights.discriminator("none" if resumed else args.disc_ckpt, args.vae).to(device)
        nets.trained["disc"] = args.disc_learning_rate
    return nets


# --------------------------------------------------------------------------------------------------- the step

def make_batch(nets, args, step, images):
    """The step's inputs for train_step, from uint8 images [b, 3, R, R] of this process."""
    side, mine = args.resolution // nets.vae.downsample, trainer.my_share(args)
    generator = trainer.draw_generator(args, step, nets.device)
    shape = (args.batch_size, nets.vae.latent_channels, side, side)
    batch = SimpleNamespace(eps=torch.randn(shape, device=nets.device, generator=generator)[mine])
    if args.decoder_noise:
        batch.decoder_noise = torch.randn(shape, device=nets.device, generator=generator)[mine]
    batch.images = images.to(nets.device, non_blocking=True).float() / 127.5 - 1
    return batch


def train_step(nets, args, batch, use_gan=True):
    """One step. Both gradients, the VAE's and the discriminator's, are taken at the weights before it.

    Args:
        nets: trainer.Networks, after trainer.prepare.
        batch: namespace of this process's images [b, 3, R, R] in [-1, 1] and eps [b, C, h, w] ~ N(0, 1), with
            --decoder-noise also decoder_noise, likewise.
        use_gan: whether the VAE sees the discriminator yet.
    Returns (metrics: dict of scalar tensors, skip: 1.0 if one was not finite and nothing was updated).
    """
    before = [buffer.clone() for buffer in nets.statistics]
    n = args.gradient_accumulation_steps
    parts = trainer.micro_batches(batch, n)

    # 1) VAE forward. A frozen encoder has no graph.
    noises = trainer.decoder_noises(nets, args, parts)      # None without --decoder-noise
    outputs, _, recon = trainer.vae_forward(nets, parts, noises)
    # 2) The VAE's gradient.
    gan, gan_gradients = None, [None] * n
    if nets.disc is not None and use_gan:
        # of the whole batch at once, because of the discriminator's batch norms; its weights receive nothing
        r = wide(recon).requires_grad_()
        with nets.autocast(False):  # float32, as in the reference
            gan = gan_loss(nets.disc, r)                                                             # (6)
            gan_gradient, = torch.autograd.grad(gan, r)
        gan_gradients = (n * args.disc_weight * gan_gradient).chunk(n)  # n: backward averages over the parts
    metrics = trainer.backward(nets, "vae", "vae_loss", lambda *row: vae_losses(nets, args, gan, *row),
                               parts, noises, outputs, gan_gradients)
    # 3) The discriminator's gradient, on the same reconstructions.
    #    The whole batch at once, for its batch norms.
    if nets.disc is not None:
        metrics |= trainer.backward(nets, "disc", "d_loss", lambda *row: disc_losses(nets, *row),
                                    [batch.images], [recon])
    # 4) Clip, update all, average the VAE.
    return metrics, trainer.update(nets, args, metrics, before)


def vae_losses(nets, args, gan, part, noise, output, gan_gradient):
    """Part 2: the losses of the VAE on a micro-batch, as scalars by name; "vae_loss" is what it minimises.

    gan: the GAN loss of the whole batch, None until the VAE sees the discriminator; gan_gradient: this part's
    share of its gradient at the reconstructions, weighted. Gradient reaches the part of the VAE that learns.
    """
    moments, _, recon = trainer.vae_outputs(nets, part, noise, output)  # [b, 2C, h, w], z, [b, 3, R, R]
    kl_weight = args.kl_weight if args.train_encoder else 0.0
    losses = reconstruction_losses(part.images, recon, Posterior(moments), nets.lpips,               # (5)
                                   args.reconstruction_weight, args.perceptual_weight, kl_weight,
                                   args.reconstruction_loss)
    total = sum(losses.values())
    if gan is not None:
        losses["gan_loss"] = gan
        losses["weighted_gan_loss"] = trainer.with_gradient(args.disc_weight * gan.detach(), recon,
                                                            gan_gradient)                            # (6)
        total = total + losses["weighted_gan_loss"]
    return losses | {"vae_loss": total}


def disc_losses(nets, images, recon):
    """Part 3: the discriminator's loss (7). Gradient reaches it alone. In float32, as in the reference."""
    with nets.autocast(False):
        d_loss, real, fake = discriminator_loss(nets.ddp["disc"], images, wide(recon))
    return {"d_loss": d_loss, "logits_real": real, "logits_fake": fake}


# --------------------------------------------------------------------------------------------------- the loop

def measure_stats(args, vae, dataset, device):
    """(latents_scale, latents_bias), [1, C, 1, 1] each, of the latents of the run's first images."""
    batches = max(1, min(STATS_IMAGES, len(dataset)) // args.batch_size)
    mean, variance = trainer.measure_latents(args, vae, dataset, device, batches)
    return variance.rsqrt().float().view(1, -1, 1, 1), mean.float().view(1, -1, 1, 1)


def train(args):
    """Refinement, from the first step or the newest checkpoint to --max-train-steps."""
    folder = os.path.join(args.output_dir, args.exp_name)

    # Processes: one per GPU under torchrun, or this one.
    rank, world_size, device = distributed.init()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # shapes never change
    trainer.check_settings(args, world_size)

    # Data.
    dataset = open_images(args.data_dir, args.resolution, args.hflip, args.seed, args.skip_corrupt)
    sources = {"data": identity(dataset)}   # what the run is made of, for its checkpoints

    # The checkpoint to resume from, if there is one, or the VAE to start from.
    path, state = trainer.newest_checkpoint(folder)
    if state is None:
        with distributed.main_first():  # it downloads, the others find the files
            vae_state, stats, sources["source_config"] = find_weights(args)
    else:
        if "vae_ema" not in state:
            raise ValueError(f"{path}: has no vae_ema, it is not a checkpoint of this kind of run")
        args.vae = args.vae or vae_files.vae_name(state["vae_ema"])
        args.disc_ckpt = state["args"]["disc_ckpt"] if args.disc_ckpt == "auto" else args.disc_ckpt
        args.disc_start = state["args"]["disc_start"] if args.disc_start is None else args.disc_start
        trainer.check_resume(args, path, state, FIXED_IN_A_RUN)
        trainer.check_sources(args, path, state, sources)
        vae_state, stats = None, (state["latents_scale"], state["latents_bias"])
        sources["source_config"] = state.get("source_config", {})
    trainer.check_same(args, sources, state)

    # Networks.
    with distributed.main_first():
        nets = build_networks(args, device, vae_state, resumed=state is not None)
    lock = trainer.claim_folder(folder, args.dry_run)   # nothing is written before, by a mistaken command
    trainer.prepare(nets, args)
    start = 0 if state is None else trainer.restore(nets, path, state)
    if args.dry_run:
        trainer.note("settings are sound")
        return distributed.shut_down()
    if stats is None and not args.train_encoder:
        stats = measure_stats(args, nets.vae, dataset, device)
    log = RunLog(folder, args)
    log.resume(start)
    state = None    # its memory
    if rank == 0:
        files.save_json(vars(args), os.path.join(folder, "args.json"))
    log.say(f"{'VAE' if args.train_encoder else 'decoder'} of {args.vae} ({args.ckpt}), {len(dataset)} "
            f"images, {world_size} x {device.type}, from step {start}" + (f" of {path}" if path else ""))

    # The loop.
    step, loader = start, trainer.data_loader(args, dataset, device, start, args.num_workers)
    with watch() as asked:
        for step in range(start + 1, args.max_train_steps + 1):
            images, _ = next(loader)
            stop = distributed.any_process(asked.by)    # all processes meet here: one that hangs is named
            batch = make_batch(nets, args, step, images)
            log.add(*train_step(nets, args, batch, use_gan=step > args.disc_start))

            final = step == args.max_train_steps
            try:
                if step % args.log_every == 0 or final:
                    log.write(step, args.batch_size)
                if step % args.checkpointing_steps == 0 or final or stop:
                    with log.paused():
                        if args.train_encoder:
                            stats = measure_stats(args, nets.ema, dataset, device)
                        # What other scripts read of it is vae_ema, with its latents_scale and latents_bias.
                        path = trainer.save_checkpoint(nets, args, step, folder, latents_scale=stats[0].cpu(),
                                                       latents_bias=stats[1].cpu(), **sources)
            except (Collapse, files.NotFinite) as error:
                log.say(f"stopped: {error}; the last good checkpoint is {path or 'none yet'}")
                sys.exit(1)
            if args.sampling_steps and step % args.sampling_steps == 0 and rank == 0:
                with log.paused(), torch.compiler.set_stance("force_eager"):    # compiling would take longer
                    picture = os.path.join(folder, "reconstructions", f"{step:07d}.png")
                    pictures.save_reconstructions(picture, images[:8], [nets.ema], ["EMA"])
            if stop:
                break
    log.say(f"done: {folder}" if step == args.max_train_steps else
            f"stopped by {asked.by or 'another process'}: saved {path}; the same command resumes")
    distributed.shut_down()     # waits for the last picture
    if lock is not None:
        lock.close()


# ----------------------------------------------------------------------------------------------------- export

def export(args):
    """--export: the VAE of --ckpt and its latent statistics as a folder."""
    if args.ckpt in (None, "none"):
        raise ValueError("--export needs the VAE's --ckpt")
    name, state, stats, numbers = vae_files.open_vae(args.ckpt, args.vae, args.latents_stats)
    disc = weights.discriminator_state(args.ckpt, name) if args.format == "compvis" else None
    vae_files.export_vae(args.export, state, stats, args.format, args.resolution, numbers, disc)
    print(f"wrote {', '.join(sorted(os.listdir(args.export)))}")


@cli.one_line_errors(trainer.MEMORY_REMEDY)
def main(argv=None):
    args = parse_args(argv)
    if args.export and (args.eval or args.dry_run):
        raise ValueError("--export excludes --eval and --dry-run")
    if args.eval:
        vae_report.evaluate(args)
    elif args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
