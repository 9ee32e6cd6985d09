"""The command line of sample.py, read from the shell or from a picture that it drew.

    args = parse_args(description)
    args.conditions                             # a Condition for each --bps
    command_words(args, facts, conditions)      # what a picture remembers, for --from
"""
import argparse
import json
import math
import shlex
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from cli import BASE, HERE, Parser, seed_number
from conditions import DataError, load_image

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
DENOISE = 0.6                   # share of the steps after --init


class Condition(NamedTuple):
    """What one --bps and the options behind it say."""
    bps: Path | None = None
    cond: Path | None = None
    scale: float = 1.0
    strength: float = 1.0
    window: tuple = (0.0, 1.0)


class ConditionOption(argparse.Action):
    """Collects Conditions in args.conditions: --bps starts one, the other options fill the last."""

    def __call__(self, parser, args, value, option=None):
        """Adds an option's value."""
        conditions = list(args.conditions)
        begins = self.dest == "bps" and (not conditions or conditions[-1].get("bps") is not None)
        if begins or not conditions:
            conditions.append({})
        last = dict(conditions.pop())
        if self.dest in last:
            parser.error(f"{option}: twice for one condition; each begins with its own --bps")
        last[self.dest] = tuple(value) if isinstance(value, list) else value
        args.conditions = [*conditions, last]


def width_and_height(text):
    """Returns (width, height) that a text like 768x512 or 512 means. Errors: ArgumentTypeError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: allowed are WIDTHxHEIGHT or one number, in "
                                         f"pixels, as in 768x512")
    return int(sides[0]), int(sides[-1])


def make_parser(description):
    """Returns the parser."""
    parser = Parser(description)
    add, once = parser.add_argument, dict(action=ConditionOption, default=argparse.SUPPRESS)
    parser.set_defaults(conditions=())
    add("--bps", type=Path, help="trained BPS file, or none (default: the embedded base's for "
        "drawings, none for another --base)", **once)
    add("--cond", type=Path, help="the condition, or a folder of some (default: tiny/drawing.png)",
        **once)
    add("--scale", type=float, help="times the maps: how strong their features are (default: 1)",
        **once)
    add("--strength", type=float, help="of the posterior: 0 the prior, 1 the posterior, others "
        "temper it, for a second pass of the U-Net (default: 1)", **once)
    add("--window", type=float, nargs=2, metavar=("START", "END"), help="share of the steps that "
        "are steered (default: 0 1)", **once)
    add("--prompt", default="a red apple", help="what it shows (default: %(default)s)")
    add("--negative-prompt", default="", help="what guidance leads away from (default: nothing)")
    add("--n", type=int, default=4, help="how many pictures (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="of picture 0 (default: %(default)s)")
    add("--size", type=width_and_height, help="of the pictures, as in 768x512 (default: what BPS, "
        "or else the base, was trained with)")
    add("--init", type=Path, help="a picture to start from instead of noise")
    add("--denoise", type=float, help="share of the steps that --init goes through: little keeps "
        f"it, 1 forgets it (default: {DENOISE})")
    add("--sampler", choices=diffusion.SAMPLERS, default="ddim", help="(default: %(default)s)")
    add("--steps", type=int, default=50, help="of the sampler (default: %(default)s)")
    add("--guidance", type=float, help="to the prompt; 1 is none (default: 3 for the embedded "
        "base, else 7.5)")
    add("--clip-skip", type=int, default=1, help="2 reads the text encoder's last layer but one, "
        "as many fine-tunes want (default: %(default)s)")
    parser.add_base()
    add("--dtype", choices=DTYPES, default="fp32", help="what all but the autoencoder computes in "
        "(default: %(default)s)")
    add("--from", type=Path, dest="picture", help="a picture drawn here, to draw it again; other "
        "options overrule its own")
    add("--out", type=Path, default=Path("pictures"), help="folder (default: %(default)s)")
    parser.add_device()
    return parser


def parse_args(description):
    """Returns the checked command line, where --from is given joined to the picture's own.

    args.conditions is a list of Condition; args.drawn_with holds {role: fingerprint} of the files
    that the --from picture was drawn with, or nothing.
    """
    parser = make_parser(description)
    args = parser.parse_args()
    args.drawn_with = {}
    if args.picture:
        words, drawn_with = recorded(args.picture)
        again = parser.parse_args(words)
        if args.conditions:
            again.conditions = ()
        args = parser.parse_args(namespace=again)
        args.drawn_with = drawn_with
    if args.n < 1:
        parser.error(f"--n {args.n}: at least 1")
    if not 1 <= args.steps <= 999:
        parser.error(f"--steps {args.steps}: allowed are 1 to 999")
    embedded = args.base.resolve() == BASE.resolve()
    if args.guidance is None:
        args.guidance = 3.0 if embedded else 7.5
    if not math.isfinite(args.guidance):
        parser.error(f"--guidance {args.guidance}: a finite number is wanted")
    if args.guidance == 1 and args.negative_prompt:
        parser.error(f"--guidance 1: leaves --negative-prompt {args.negative_prompt!r} without "
                     f"effect; give more than 1")
    if args.denoise is not None and not args.init:
        parser.error(f"--denoise {args.denoise}: needs --init, the picture to start from")
    args.denoise = DENOISE if args.denoise is None else args.denoise
    if not 0 < args.denoise <= 1:
        parser.error(f"--denoise {args.denoise}: allowed is above 0, up to 1")
    parser.check_out(args.out)
    args.conditions = check_conditions(parser, args.conditions, embedded)
    return args


def check_conditions(parser, options, embedded):
    """Returns Conditions of what ConditionOption collected; ends the script where they are wrong."""
    if any(str(given.get("bps")) == "none" for given in options):
        for given in options:
            for name, value in given.items():
                if name != "bps":
                    parser.error(f"--{name} {value}: needs --bps, a file that train.py wrote")
        return []
    if embedded and (not options or "bps" not in options[0]):
        options = [{"bps": HERE / "tiny" / "bps_sketch.safetensors"} | (
            options[0] if options else {}), *options[1:]]
    conditions = []
    for given in options:
        if "bps" not in given:
            name, value = next(iter(given.items()))
            parser.error(f"--{name} {value}: needs --bps, a file that train.py wrote for this base")
        condition = Condition(**given)
        for name in ("scale", "strength"):
            if not math.isfinite(getattr(condition, name)):
                parser.error(f"--{name} {getattr(condition, name)}: a finite number is wanted")
        start, end = condition.window
        if not 0 <= start < end <= 1:
            parser.error(f"--window {start:g} {end:g}: a start and a later end are wanted, both "
                         f"from 0 to 1, as in 0 0.5")
        conditions.append(condition)
    return conditions


# ---- what a picture remembers --------------------------------------------------------------

def recorded(picture):
    """Returns (the words of the command that drew a picture, {role: fingerprint} of its files)."""
    text = getattr(load_image(picture), "text", {})
    try:
        return shlex.split(text["command"])[2:], json.loads(text["files"])
    except (KeyError, ValueError):
        raise DataError(f"{picture}: does not say how it was drawn; --from takes a PNG as "
                        f"sample.py wrote it; other programs drop such notes") from None


def command_words(args, facts, conditions):
    """Returns the words of the command that draws a picture of these facts once more."""
    words = ["python", "sample.py"]
    for condition in conditions:
        words += ["--bps", condition.bps, "--cond", condition.cond, "--scale", condition.scale,
                  "--strength", condition.strength, "--window", *condition.window]
    if not conditions:
        words += ["--bps", "none"]
    for name in ("base", "tokenizer", "vae", "init"):
        value = getattr(args, name)
        words += [f"--{name}", value] if value and value != BASE else []
    if args.init:
        words += ["--denoise", args.denoise]
    for name in ("prompt", "negative_prompt", "seed", "size", "sampler", "steps", "guidance",
                 "clip_skip", "dtype", "prediction_type"):
        words += [f"--{name.replace('_', '-')}={facts[name]}"]       # a prompt may begin with -
    return [*map(str, words), "--n", "1"]
