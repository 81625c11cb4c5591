"""A look at the model while it trains: picture grids, and scores by the evaluator's own functions."""
import os

import torch

from models.runtime import distributed, trainer
from models.runtime.cache import on_device
from models.runtime.features import load_inception, load_reference, score_samples
from models.runtime.images import label_grid, round_to_uint8, write_png
from models.samplers import (decode, draw_noise, euler, guided, sample_generators, sample_labels, time_grid,
                             truncate_to_uint8)


@torch.no_grad()
def draw_samples(nets, args, indices, labels, cfg_scale):
    """uint8 images [N, R, R, 3] of the EMA model, 50 Euler steps.

    Image i depends on the seed, i and its label alone.
    """
    shape = (nets.ema.in_channels, nets.ema.input_size, nets.ema.input_size)
    noise = draw_noise(sample_generators(args.seed, indices), shape).to(nets.device)
    with nets.autocast():
        labels = labels.to(nets.device)
        velocity = guided(lambda x, t, y: nets.ema(x, t, y)[0], labels, args.num_classes, cfg_scale)
        x = euler(velocity, noise, time_grid(50))
        return truncate_to_uint8(decode(nets.vae.decode, x.float(), *nets.ema.latents_stats()).float())


@torch.no_grad()
def save_grids(nets, args, step, folder, dataset):
    """Write samples/NNNNNNN.png, 40 samples with their classes, and reconstructions/NNNNNNN.png, images above
    their copies."""
    how = "equal" if args.num_classes <= 40 else "random"
    labels = sample_labels(args.seed, range(40), args.num_classes, how)
    originals = trainer.step_images(args, dataset, step, 8).to(nets.device).float() / 127.5 - 1
    with on_device(nets.vae, nets.device), nets.autocast():
        samples = draw_samples(nets, args, range(40), labels, args.cfg_scale if args.cfg_prob > 0 else 1.0)
        copies = nets.vae.decode(nets.vae.encode(originals).mean)
    both = round_to_uint8(torch.cat([originals, copies.float()]))
    grid = label_grid(samples.cpu(), labels.tolist(), columns=min(args.num_classes, 10))
    write_png(os.path.join(folder, "samples", f"{step:07d}.png"), grid)
    grid = label_grid(both.cpu(), columns=len(originals))
    write_png(os.path.join(folder, "reconstructions", f"{step:07d}.png"), grid)


def make_scorer(nets, args):
    """Function () -> {"fid_online": ...} of --eval-samples unguided samples; {} in all but the first process.

    The processes share the samples. Reads the reference of --eval-ref and the Inception weights now.
    """
    with distributed.main_first():
        inception = load_inception(args.inception_weights, nets.device)
    ref = load_reference(args.eval_ref, inception, nets.device, pool=False)

    def batches(size=32):
        rank, world_size = distributed.rank(), distributed.world_size()
        for first in range(rank * size, args.eval_samples, world_size * size):
            indices = range(first, min(first + size, args.eval_samples))
            labels = sample_labels(args.seed, indices, args.num_classes, "equal")
            yield draw_samples(nets, args, indices, labels, cfg_scale=1.0)

    def score():
        with on_device(nets.vae, nets.device):
            scores = score_samples(batches(), ref, inception, nets.device)
        distributed.barrier()   # the figures are computed by the main process alone
        return {f"{name}_online": value for name, value in scores.items()}
    return score
