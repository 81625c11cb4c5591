"""A look at the model while it trains: picture grids, and scores by the evaluator's own functions."""
import os

import torch

from models.runtime import distributed, files
from models.runtime.features import load_inception, load_reference, score_samples
from models.runtime.images import label_grid
from models.samplers import decode, draw_noise, euler, sample_generators, sample_labels, to_uint8


@torch.no_grad()
def draw_samples(nets, args, indices, labels, cfg_scale):
    """uint8 images [N, R, R, 3] of the EMA model, 50 Euler steps; image i depends on the seed, i and its label alone."""
    shape = (nets.ema.in_channels, nets.ema.input_size, nets.ema.input_size)
    noise = draw_noise(sample_generators(args.seed, indices), shape).to(nets.device)
    with nets.autocast():
        x = euler(lambda x, t, y: nets.ema(x, t, y)[0], noise, labels.to(nets.device), num_steps=50,
                  cfg_scale=cfg_scale, null_label=args.num_classes)
        return to_uint8(decode(nets.vae.decode, x.float(), *nets.ema.latents_stats()).float())


@torch.no_grad()
def save_grids(nets, args, step, folder, images):
    """samples/NNNNNNN.png: 40 samples with their classes; reconstructions/NNNNNNN.png: images above their copies."""
    labels = sample_labels(args.seed, range(40), args.num_classes, "equal" if args.num_classes <= 40 else "random")
    samples = draw_samples(nets, args, range(40), labels, args.cfg_scale if args.cfg_prob > 0 else 1.0)
    originals = images[:8].to(nets.device).float() / 127.5 - 1
    with nets.autocast():
        copies = nets.vae.decode(nets.vae.encode(originals).mean)
    both = to_uint8(torch.cat([originals, copies.float()]))
    columns = min(args.num_classes, 10)
    write_grid(os.path.join(folder, "samples", f"{step:07d}.png"), samples.cpu(), labels.tolist(), columns)
    write_grid(os.path.join(folder, "reconstructions", f"{step:07d}.png"), both.cpu(), None, len(originals))


def write_grid(path, images, captions, columns):
    """label_grid of uint8 images [N, H, W, 3] as a PNG file, whole or not at all."""
    with files.replace(path) as temporary:
        label_grid(images, captions, columns).save(temporary, format="png")


def make_scorer(nets, args):
    """Function () -> {"fid_online": ...} of --eval-samples unguided samples, shared among the processes; {} in all but
    the first. Reads the reference of --eval-ref and the Inception weights now."""
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
        scores = score_samples(batches(), ref, inception, nets.device)
        return {f"{name}_online": value for name, value in scores.items()}
    return score
