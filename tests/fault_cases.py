"""The cases of tests/faults.py, by group: what a user or a cluster can do to the scripts, and what must come of it."""
import argparse
import contextlib
import json
import os
import signal
import time
import zipfile
from unittest import mock

import numpy as np
import processes
import torch
from fault_tools import (HOG, NOBODY, REFINE, SAMPLE, TRAIN, Skip, as_nobody, assert_done, assert_refused, case, change_state,
                         copy, cut, digests, execute, finish, flip, limit_files, limit_memory, pack, photos, pictures,
                         read_state, refused, same_state, set_constant, start)
from PIL import Image

import evaluate_fid
import finetune_vae
import sample_ddp
import train_repae_e
from models.runtime import files, prepare

CHECKPOINT = "{have}/exps/run/checkpoints/0000003.pt"


# ---------------------------------------------------------------- flags: no number that means nothing

def flags_of(main):
    """The argparse actions of a script, without starting it."""
    class Found(Exception):
        pass

    def parse(parser, *_):
        raise Found(parser)
    for method in ("parse_args", "parse_known_args"):
        with mock.patch.object(argparse.ArgumentParser, method, parse), contextlib.suppress(SystemExit):
            try:
                main([])
            except Found as found:
                return found.args[0]._actions


BASE = {"train_repae_e": TRAIN, "finetune_vae": REFINE, "sample_ddp": SAMPLE,
        "evaluate_fid": [*HOG, "{have}/r.npz", "{have}/s.npz"],
        "models.runtime.prepare": ["{have}/photos", "{tmp}/out.zip"]}
MAINS = {"train_repae_e": train_repae_e, "finetune_vae": finetune_vae, "sample_ddp": sample_ddp,
         "evaluate_fid": evaluate_fid, "models.runtime.prepare": prepare}
for script, module in MAINS.items():
    for action in flags_of(module.main):
        if getattr(action.type, "__name__", "") == "convert":      # of cli.number
            flag = action.option_strings[0]
            for value in ("nan", "inf", "-1", "1e-4x"):
                refused("flags", f"{script} {flag} {value}", script, [*BASE[script], f"{flag}={value}"], flag)
        elif action.choices:
            flag = action.option_strings[0]
            refused("flags", f"{script} {flag} of no choice", script, [*BASE[script], flag, "fp7"], flag)
    refused("flags", f"{script}: a flag that does not exist", script, [*BASE[script], "--learning-rat", "1"], "--learning-rat")
    refused("flags", f"{script}: a flag without its value", script, [*BASE[script], flag], flag)

for name, script, more, words in [
    ("above its bound: beta1", "train_repae_e", ["--adam-beta1", "1.5"], "--adam-beta1"),
    ("above its bound: cfg-prob", "train_repae_e", ["--cfg-prob", "2"], "--cfg-prob"),
    ("above its bound: guidance-high", "sample_ddp", ["--guidance-high", "1.5"], "--guidance-high"),
    ("zero steps", "train_repae_e", ["--max-train-steps", "0"], "--max-train-steps"),
    ("zero batch", "train_repae_e", ["--batch-size", "0"], "--batch-size"),
    ("huge steps of the solver", "sample_ddp", ["--num-steps", "99999999999"], "--num-steps"),
    ("huge number of samples", "sample_ddp", ["--num-fid-samples", "9" * 30], "--num-fid-samples"),
    ("huge seed", "train_repae_e", ["--seed", str(2 ** 70), "--dry-run"], "--seed"),
    ("huge number of workers", "train_repae_e", ["--num-workers", "1000000"], "--num-workers"),
    ("huge batch", "train_repae_e", ["--batch-size", "99999999999999999999"], "--batch-size"),
    ("huge resolution", "train_repae_e", ["--resolution", "1048576"], "--resolution"),
    ("huge class count", "train_repae_e", ["--num-classes", "999999999999"], "--num-classes"),
    ("huge accumulation", "train_repae_e", ["--gradient-accumulation-steps", str(10 ** 12)], "--batch-size"),
    ("tolerance no network can meet", "sample_ddp", ["--mode", "ode", "--dopri5", "--rtol", "1e-300"], "--rtol"),
    ("guidance interval upside down", "sample_ddp", ["--cfg-scale", "2", "--guidance-low", "0.9", "--guidance-high", "0.1"],
     "guidance"),
    ("heun on the SDE", "sample_ddp", ["--heun"], "--mode ode"),
    ("heun and dopri5", "sample_ddp", ["--mode", "ode", "--heun", "--dopri5"], "exclude"),
    ("checkpoint and folder", "sample_ddp", ["--exp-path", "{have}/exps/run"], "either"),
    ("step without folder", "sample_ddp", ["--train-steps", "3"], "--exp-path"),
    ("class that does not exist", "sample_ddp", ["--classes", "10"], "10"),
    ("negative class", "sample_ddp", ["--classes=-1"], "-1"),
    ("classes that are no numbers", "sample_ddp", ["--classes", "cat,dog"], "--classes"),
    ("range outside", "sample_ddp", ["--range", "6:99"], "--range"),
    ("range upside down", "sample_ddp", ["--range", "8:4"], "--range"),
    ("range of text", "sample_ddp", ["--range", "all"], "--range"),
    (".npz without its ending", "sample_ddp", ["--npz", "{tmp}/samples"], ".npz"),
    (".npz without a name", "sample_ddp", ["--npz", "{tmp}/.npz"], ".npz"),
    ("batch that cannot be cut", "train_repae_e", ["--gradient-accumulation-steps", "3"], "--batch-size 2"),
    ("frozen VAE and its ablation", "train_repae_e", ["--freeze-vae", "--diffusion-to-vae"], "exclude"),
    ("frozen VAE without weights", "train_repae_e", ["--freeze-vae"], "--vae-ckpt"),
    ("resolution the VAE cannot halve", "train_repae_e", ["--resolution", "36"], "--resolution 36"),
    ("resolution below the discriminator's", "train_repae_e", ["--resolution", "16", "--disc-weight", "0.1"], "--disc-weight 0"),
    ("depth beyond the network", "train_repae_e", ["--encoder-depth", "9"], "encoder depth 9"),
    ("unknown encoder", "train_repae_e", ["--encoder", "dinov9"], "dinov9"),
    ("no encoder's name", "train_repae_e", ["--encoder", ""], "encoder"),
    ("two encoders, one file", "train_repae_e", ["--encoder", "hog,hog", "--encoder-ckpt", "{tmp}/x"], "--encoder-ckpt"),
    ("unknown preset", "train_repae_e", ["--preset", "imagenet"], "--preset imagenet"),
    ("fewer classes than the data", "train_repae_e", ["--num-classes", "3"], "--num-classes 3"),
    ("logger that is not installed", "train_repae_e", ["--report-to", "wandb"], "pip install wandb"),
    ("scores without a reference", "train_repae_e", ["--eval-steps", "1"], "--eval-ref"),
    ("reference of scores that is not there", "train_repae_e", ["--eval-steps", "1", "--eval-ref", "{tmp}/no.npz"], "no.npz"),
    ("inception weights that are not there", "train_repae_e", ["--inception-weights", "{tmp}/no.pth"], "no.pth"),
    ("alignment without encoder training", "finetune_vae", ["--vae-align-proj-coeff", "1"], "--train-encoder"),
    ("from scratch without a type", "finetune_vae", ["--ckpt", "none", "--train-encoder"], "--vae"),
    ("from scratch without the encoder", "finetune_vae", ["--ckpt", "none", "--vae", "f4d4"], "--train-encoder"),
    ("other type than the file", "finetune_vae", ["--vae", "f8d4"], "f4d4"),
    ("more images than there are", "finetune_vae", ["--data-dir", "{have}/photos", "--batch-size", "13"], "fewer than one batch"),
    ("resolution the VAE cannot halve, refining", "finetune_vae", ["--resolution", "30"], "--resolution 30"),
    ("eval and export at once", "finetune_vae", ["--eval", "{have}/vae.pt", "--export", "{tmp}/e"], "--export"),
    ("unknown metric", "evaluate_fid", ["--metrics", "beauty"], "unknown"),
    ("metrics beside hog", "evaluate_fid", ["--metrics", "kid"], "hog"),
    ("limit of zero", "evaluate_fid", ["--limit", "0"], "--limit"),
    ("reference saved with two inputs", "evaluate_fid", ["--features", "inception", "--save-ref", "{tmp}/x.npz"], "--save-ref"),
    ("prepare: no .zip", "models.runtime.prepare", ["--resolution", "32", "{tmp}/x.tar"], "x.tar"),
]:
    refused("settings", name, script, [*BASE[script], *more], words)
refused("settings", "no checkpoint named", "sample_ddp", SAMPLE[2:], "--ckpt")
refused("settings", "no VAE named", "finetune_vae", [x for x in REFINE if x not in ("--ckpt", "{have}/vae.pt", "--preset",
                                                                                   "demo")], "--ckpt")
refused("settings", "one input only", "evaluate_fid", [*HOG, "{have}/r.npz"], "--save-ref")
for name, more, words in [
    ("export of nothing", ["--ckpt", "none", "--export", "{tmp}/e"], "--ckpt"),
    ("unknown metric of VAEs", ["--eval", "{have}/vae.pt", "--metrics", "psnr,beauty"], "--metrics"),
    ("no metric at all", ["--eval", "{have}/vae.pt", "--metrics", ","], "--metrics"),
    ("cknna without a model", ["--eval", "{have}/vae.pt", "--metrics", "cknna", "--data-dir", "{have}/photos", "--resolution",
                               "32", "--encoder", "hog"], "--model-ckpt"),
]:
    refused("settings", name, "finetune_vae", more, words)
