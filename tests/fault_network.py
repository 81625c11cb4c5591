"""The cases of tests/faults.py for weights that are fetched: a server that fails in every way, none at all, a full cache."""
import contextlib
import hashlib

import loopback
from fault_tools import (REFINE, SAMPLE, TRAIN, assert_done, assert_refused, case, copy, digests, execute, small_disk,
                         small_inception, to_loopback)

WIDE = ["--vae", "f8d4", "--encoder-depth", "2", "--resolution", "64", "--model", "SiT-Ti/4", "--disc-ckpt", "none"]
# what is fetched -> (script, flags, the file of the world it is, where it is kept, whether a HEAD comes first: True,
# the hub is asked for size and digest; None, whether there is a network)
FETCHED = {
    "a VAE to train": ("train_repae_e", [*TRAIN, *WIDE, "--vae-ckpt", "REPA-E/sdvae"], "wide.pt",
                       "repae/REPA-E/sdvae/sdvae-f8d4.pt", True),
    "a VAE to refine": ("finetune_vae", [*REFINE, "--resolution", "64", "--ckpt", "REPA-E/sdvae", "--disc-ckpt", "none"], "wide.pt",
                        "repae/REPA-E/sdvae/sdvae-f8d4.pt", True),
    "a VAE to decode with": ("sample_ddp", [*SAMPLE, "--vae-ckpt", "REPA-E/sdvae"], "wide.pt",
                             "repae/REPA-E/sdvae/sdvae-f8d4.pt", True),
    "LPIPS": ("train_repae_e", [*TRAIN, "--perceptual-weight", "1"], "vae.pt", None, False),
    "the Inception network": ("evaluate_fid", ["{have}/r.npz", "{have}/s.npz"], "inception.pt",
                              "repae/pt_inception-2015-12-05-6726825d.pth", False),
    "an encoder": ("train_repae_e", [*TRAIN, "--encoder", "mocov3-vit-s"], "vae.pt", None, None),
}
# what the server does -> (times a file is asked for, words)
FAILURES = {"cut": (3, "3 tries"), "stall": (3, "3 tries"), "silent": (3, "3 tries"), "close": (3, "3 tries"),
            "short": (3, "3 tries"), 500: (3, "3 tries"), 429: (3, "3 tries"), 404: (1, "404"), 403: (1, "403"),
            "wrong": (1, ""), "long": (1, "longer"), "redirect to http": (1, "not https")}


@contextlib.contextmanager
def served(tmp, have, name):
    """(server, function that runs the script of FETCHED[name] against it); a good file lies in the cache already."""
    script, flags, file, *_ = FETCHED[name]
    good = tmp / "torch/hub/repae/REPA-E/other/good.pt"
    good.parent.mkdir(parents=True, exist_ok=True)
    good.write_bytes(b"good")
    server = loopback.Server((have / file).read_bytes())
    hooks = [(to_loopback, server.server_port), (small_inception, server.digest)]
    try:
        yield server, lambda **how: execute(script, flags, tmp, have, hooks=hooks, **how)
    finally:
        server.close()


def cached(tmp):
    """The files in the cache, and their digests."""
    return {name: digest for name, digest in digests(tmp / "torch").items() if isinstance(digest, str)}


for name, (_, _, file, kept, asks) in FETCHED.items():
    heads = asks is not False
    for kind, (times, words) in FAILURES.items():
        if kind in ("short", "long") and not asks:      # nobody says how long these are
            continue

        @case("network", f"{name}: {kind}, always")
        def _(tmp, have, name=name, kind=kind, times=times, words=words, heads=heads):
            with served(tmp, have, name) as (server, run):
                before = cached(tmp)
                server.plan(*["whole"] * heads, kind)
                assert_refused(run(), [words])
                assert len(server.requests) == times + heads, server.requests
                assert cached(tmp) == before, "the cache has changed"

    @case("network", f"{name}: nobody there")
    def _(tmp, have, name=name):
        with served(tmp, have, name) as (server, run):
            before = cached(tmp)
            server.close()
            assert_refused(run(seconds=10), [""])
            assert cached(tmp) == before, "the cache has changed"

    @case("network", f"{name}: the cache's disk is full")
    def _(tmp, have, name=name):
        with small_disk(tmp / "torch", 1 << 16), served(tmp, have, name) as (server, run):
            server.body, server.digest = server.body + bytes(1 << 17), ""
            before = cached(tmp)
            assert_refused(run(), ["No space left" if name == "an encoder" else "disk full"])
            assert cached(tmp) == before, "the cache has changed"

    if kept:
        @case("network", f"{name}: fails twice and comes, and is not fetched again")
        def _(tmp, have, name=name, kept=kept, heads=heads):
            with served(tmp, have, name) as (server, run):
                if heads:   # what lies beside a VAE, and is asked for after it
                    copy(have / "vae-latents-stats.pt", tmp / f"torch/hub/{kept[:-3]}-latents-stats.pt")
                before = cached(tmp)
                server.plan(*[500, "whole"] * heads, "close", 503, "whole")
                assert_done(run())
                digest = hashlib.sha256(server.body).hexdigest()
                assert cached(tmp) == before | {f"hub/{kept}": digest}
                server.plan(500)
                for left in (tmp / "a.npz", tmp / "exps"):
                    left.rename(f"{left}.first") if left.exists() else None
                assert_done(run())
                assert not server.requests, "a file that is in the cache was asked for"
