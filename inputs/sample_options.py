"""The command line of sample.py, read from the shell or from a picture that it drew.

    args = parse_args(description)
    args.conditions                             # a Condition for each --bps
    command_words(args, facts, conditions)      # what a picture remembers, for --from
"""
import argparse
import json
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from inputs.options import BASE, HERE, Parser, seed_number
from inputs.conditions import UserError, load_image

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
DEFAULT_BPS = HERE / "tiny" / "bps_sketch.safetensors"      # of the embedded base
DEFAULT_DRAWING = HERE / "tiny" / "drawing.png"
DENOISE = 0.6                   # share of the steps after --init
MOST = 1000                     # of a strength, either way


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
    that the --from picture was drawn with and that no option replaces.
    """
    parser = make_parser(description)
    own = parser.parse_args()
    args, drawn_with, then = own, {}, {}
    if own.picture:
        words, drawn_with, device = recorded(own.picture)
        if device != own.device:
            warnings.warn(f"{own.picture} was drawn on {device}; on {own.device} it may differ in "
                          f"the last bits", stacklevel=2)
        args = parser.parse_args(words)
        args.conditions = check_conditions(parser, args.conditions, args.base)
        then, before = files_of(args), args.conditions
        args.conditions = ()
        args = parser.parse_args(namespace=args)
        args.conditions = overruled(parser, before, args.conditions, args.base)
    else:
        args.conditions = check_conditions(parser, args.conditions, args.base)
    now = files_of(args)
    args.drawn_with = {role: found for role, found in drawn_with.items()
                       if then.get(role) == now.get(role)}
    if args.guidance is None:
        args.guidance = 3.0 if is_embedded(args.base) else 7.5
    for name, low, high in (("n", 1, 10_000), ("steps", 1, 999), ("guidance", -MOST, MOST)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)}: allowed are {low} to {high}")
    if args.guidance == 1 and args.negative_prompt:
        parser.error(f"--guidance 1: leaves --negative-prompt {args.negative_prompt!r} without "
                     f"effect; give more than 1")
    if args.denoise is not None and not args.init:
        parser.error(f"--denoise {args.denoise}: needs --init, the picture to start from")
    args.denoise = DENOISE if args.denoise is None else args.denoise
    if not 0 < args.denoise <= 1:
        parser.error(f"--denoise {args.denoise}: allowed is above 0, up to 1")
    # the first of the steps that are done: 0, or what --denoise leaves after --init
    args.start = args.steps - max(1, round(args.denoise * args.steps)) if args.init else 0
    for condition in args.conditions:
        start, end = condition.window
        steps = args.steps - args.start
        if not any(start <= i / steps < end for i in range(steps)):
            parser.error(f"--window {start:g} {end:g}: holds none of the {steps} steps; widen it "
                         f"or give more --steps")
    parser.check_out(args.out)
    return args


def is_embedded(base):
    """Returns whether a --base is the one that comes with the project."""
    return base.resolve() == BASE.resolve()


def check_conditions(parser, options, base):
    """Returns Conditions of what ConditionOption collected; ends the script if they are wrong."""
    options, none = [dict(given) for given in options], Path("none")
    if any(given.get("bps") == none for given in options):
        others = [(name, value) for given in options for name, value in given.items()
                  if value != none]
        for name, value in others[:1]:
            why = "beside --bps none" if name == "bps" else "needs --bps, not none"
            parser.error(f"--{name} {value}: {why}; leave one of them out")
        return []
    if is_embedded(base) and "bps" not in (options or [{}])[0]:
        options = [{"bps": DEFAULT_BPS} | (options or [{}])[0], *options[1:]]
    conditions = []
    for given in options:
        if "bps" not in given:
            name, value = next(iter(given.items()))
            parser.error(f"--{name} {value}: needs --bps, a file that train.py wrote for this base")
        condition = Condition(**given)
        if condition.cond is None and len(options) > 1:
            parser.error(f"--bps {condition.bps}: without --cond; of several, each needs its own")
        for name in ("scale", "strength"):
            if not -MOST <= getattr(condition, name) <= MOST:
                parser.error(f"--{name} {getattr(condition, name)}: allowed are {-MOST} to {MOST}")
        start, end = condition.window
        if not 0 <= start < end <= 1:
            parser.error(f"--window {start:g} {end:g}: a start and a later end are wanted, both "
                         f"from 0 to 1, as in 0 0.5")
        conditions.append(condition)
    return conditions


def overruled(parser, before, options, base):
    """Returns the Conditions of a --from picture, changed by those of the command line, in order.

    --bps none drops them; what is not given anew stays as it was.
    """
    if not options:
        return before
    if not before or any(given.get("bps") == Path("none") for given in options):
        return check_conditions(parser, options, base)
    merged = [condition._asdict() for condition in before]
    for i, given in enumerate(options):
        merged[i:i + 1] = [(merged[i] if i < len(merged) else {}) | given]
    return check_conditions(parser, merged, base)


# ---- what a picture remembers --------------------------------------------------------------

def recorded(picture):
    """Returns the words of the command that drew a picture, {role: fingerprint}, and the device."""
    text = getattr(load_image(picture), "text", {})
    try:
        return shlex.split(text["command"])[2:], json.loads(text["files"]), text["device"]
    except (KeyError, ValueError):
        raise UserError(f"{picture}: does not say how it was drawn; --from takes a PNG as "
                        f"sample.py wrote it; other programs drop such notes") from None


def files_of(args):
    """Returns {role: path} of the files and folders that a picture depends on."""
    files = {"base": args.base, "vae": args.vae or args.base, "text": args.base}
    if args.init:
        files["init"] = args.init
    for i, condition in enumerate(args.conditions, 1):
        files |= {f"bps {i}": condition.bps, f"cond {i}": condition.cond}
    return files


def command_words(args, facts, conditions):
    """Returns the words of the command that draws a picture of these facts once more."""
    words = ["python", "sample.py"]
    for condition in conditions:
        # what comes with the project is not named, so that the folder may be moved
        if len(conditions) > 1 or condition.bps != DEFAULT_BPS:
            words += ["--bps", condition.bps.resolve()]
        if len(conditions) > 1 or condition.cond != DEFAULT_DRAWING:
            words += ["--cond", condition.cond.resolve()]
        words += ["--scale", condition.scale, "--strength", condition.strength, "--window",
                  *condition.window]
    if not conditions:
        words += ["--bps", "none"]
    for name in ("base", "tokenizer", "vae", "init"):
        value = getattr(args, name)
        words += [f"--{name}", value.resolve()] if value and value != BASE else []
    if args.init:
        words += ["--denoise", args.denoise]
    for name in ("prompt", "negative_prompt", "seed", "size", "sampler", "steps", "guidance",
                 "clip_skip", "dtype", "prediction_type"):
        words += [f"--{name.replace('_', '-')}={facts[name]}"]       # a prompt may begin with -
    return [*map(str, words), "--n", "1"]
