"""What the four command lines share: how a flag is declared and checked, and the one way to fail.

Imports no torch, so that --help and a mistyped flag answer at once.
"""
import argparse
import math
import os
import sys
import time


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, and the script's docstring as it was written."""


def make_parser(doc):
    """ArgumentParser with a script's docstring as its description; a mistake in the flags ends in one line, exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(message)
    return parser


def flag(group, name, default, help, *, least=0, above=None, most=None, type=None, **more):
    """group.add_argument(name) with the type of its default; False makes a switch, None a string unless `type` is given.

    A number must be finite and at least `least`, or above `above` where that is given, and at most `most`.
    """
    if default is False:
        group.add_argument(name, default=False, action="store_true", help=help, **more)
        return
    kind = type or (str if default is None else default.__class__)
    if kind in (int, float):
        kind = number(kind, least, above, most)
    group.add_argument(name, default=default, type=kind, help=help, **more)


def number(kind, least=0, above=None, most=None):
    """Function from text to a number of type `kind` within the bounds; argparse turns what it raises into one line."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        low = f"above {above}" if above is not None else f"at least {least}"
        too_low = value <= above if above is not None else value < least
        if not math.isfinite(value) or too_low or (most is not None and value > most):
            limits = low if most is None else f"{low} and at most {most}"
            raise argparse.ArgumentTypeError(f"{text} must be a finite number, {limits}")
        return value
    return convert


def fail(error, code=2):
    """End the process as a user's mistake ends: one line on stderr, exit code 2.

    Of several processes the first speaks: the others usually found the same, and wait until torchrun ends them. One that
    is still there a while later has a mistake of its own to report.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(10)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
