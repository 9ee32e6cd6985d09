"""The command line of sample.py, read from the shell or from a picture that it drew.

    args = parse_args(description)
    args.conditions                 # a Condition for each --bps
"""
import argparse
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import diffusion
from inputs.checkpoints import find_unet, read_text, read_vae
from inputs.conditions import TASKS, load_image
from inputs.options import (
    BASE,
    DTYPES,
    HERE,
    MOST_SEEDS,
    Parser,
    check_pixels,
    seed_number,
    shell_command,
    unicode_text,
)
from inputs.pairs import list_files, read_captions
from weights import UserError

DEFAULT_BPS = HERE / "tiny" / "bps_sketch.safetensors"      # for the embedded base
DEFAULT_DRAWING = HERE / "tiny" / "drawing.png"
NONE = Path("none")             # for --bps and --mask
DEFAULTS = diffusion.Sampling()
SD_GUIDANCE = 7.5
DENOISE = 0.6                   # share of the steps after --init
MOST_STRENGTH = 1000            # either way; of scales and guidance, too
PATHS = ("base", "tokenizer", "vae", "init")                # options that name one file or folder
# what a picture's options are, beside its conditions and paths; the seed is its own
SETTINGS = ("prompt", "negative_prompt", "sampler", "steps", "guidance", "clip_skip", "dtype",
            "denoise")


class Condition(NamedTuple):
    """A --bps with what belongs to it."""
    bps: Path
    cond: Path | None
    scale: float
    strength: float
    window: tuple
    mask: Path | None           # None steers everywhere


class Job(NamedTuple):
    """A prompt and its conditions; name is what the files of its pictures begin with."""
    name: str
    conditions: list
    prompt: str


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
    add = parser.add_argument
    add("--bps", type=Path, nargs="+", help="trained BPS files, or the word none "
        "(default: the embedded base's for drawings, none for another --base)")
    add("--cond", type=Path, nargs="+", help="the condition of each --bps: a picture, or a folder "
        "of pictures (default: tiny/drawing.png)")
    add("--scale", type=float, nargs="+", default=[1.0], help="factor on the maps: how strong "
        "their features are (default: 1)")
    add("--strength", type=float, nargs="+", default=[1.0], help="0 is the prior, 1 the posterior; "
        "others temper it and cost a second pass of the U-Net (default: 1)")
    add("--window", type=float, nargs="+", default=[0.0, 1.0], metavar="START END", help="the part "
        "of the steps that is steered (default: 0 1)")
    add("--mask", type=Path, nargs="+", help="a picture that says where to steer, white where "
        "fully, or the word none for everywhere; one of both tones costs a second pass")
    add("--prompt", type=unicode_text, default="a red apple", help="what to draw (default: "
        "%(default)s)")
    add("--negative-prompt", type=unicode_text, default="", help="what guidance leads away from "
        "(default: nothing)")
    add("--n", type=int, default=4, help="how many pictures (default: %(default)s)")
    add("--batch", type=int, default=1, help="how many pictures the U-Net draws at a time; more "
        "than 1 are for GPUs, and round differently, also than --from (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="the seed of picture 0 (default: %(default)s)")
    add("--size", type=width_and_height, help="pixels, as in 768x512 (default: what BPS, or else "
        "the base, was trained with)")
    add("--init", type=Path, help="a picture to start from instead of noise")
    add("--denoise", type=float, help="the share of the steps that --init goes through: a small "
        f"one keeps it, 1 forgets it (default: {DENOISE})")
    add("--sampler", choices=diffusion.SAMPLERS, default=DEFAULTS.sampler,
        help="(default: %(default)s)")
    add("--steps", type=int, default=DEFAULTS.steps, help="sampling steps (default: %(default)s)")
    add("--guidance", type=float, help="how much the prompt counts; 1 is no guidance (default: "
        f"{DEFAULTS.guidance_scale:g} for the embedded base, else {SD_GUIDANCE})")
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
    """Returns the checked command line; --from supplies the defaults of all that is not given.

    args.conditions is a list of Condition. args.drawn_with holds {role: fingerprint} of the files
    that the --from picture was drawn with and that no option replaces.
    """
    parser = make_parser(description)
    args = parser.parse_args()
    drawn_with = {}
    if args.picture:
        options, drawn_with, device = read_picture_options(args.picture)
        if device != args.device:
            warnings.warn(f"{args.picture} was drawn on {device}; on {args.device} it may differ "
                          f"in the last bits")
        recorded = parser.parse_args(option_words(options))
        parser.set_defaults(**vars(recorded))
        recorded_files = files_of(recorded, finish(parser, recorded).conditions)
        args = parser.parse_args()
    files = files_of(args, finish(parser, args).conditions)
    args.drawn_with = {role: digest for role, digest in drawn_with.items()
                       if role in files and recorded_files.get(role) == files[role]}
    check_settings(parser, args)
    return args


def finish(parser, args):
    """Returns args with what depends on several options: conditions, and defaults by base."""
    is_embedded = args.base.resolve() == BASE.resolve()
    args.conditions = join_conditions(parser, args, is_embedded)
    if args.guidance is None:
        args.guidance = DEFAULTS.guidance_scale if is_embedded else SD_GUIDANCE
    return args


def join_conditions(parser, args, is_embedded):
    """Returns a Condition for each --bps; ends the script if the options do not go together."""
    files = [Path(file) for file in args.bps or ([DEFAULT_BPS] if is_embedded else [NONE])]
    conds = [Path(file) for file in args.cond or []]
    if NONE in files:
        others = [file for file in files if file != NONE]
        if others:
            parser.error(f"--bps {others[0]}: beside --bps none; leave one of them out")
        for name in ("cond", "scale", "strength", "window", "mask"):
            values = getattr(args, name)
            if values != parser.get_default(name):
                reason = "not none" if args.bps else "a file that train.py wrote for this base"
                parser.error(f"--{name} {values[0]}: needs --bps, {reason}")
        return []
    if len(files) > 1 and not conds:
        parser.error(f"--bps {files[0]}: without --cond; of several, each needs its own")
    columns = []
    masks = [None if mask == NONE else mask for mask in map(Path, args.mask or [NONE])]
    windows = list(zip(args.window[::2], args.window[1::2]))
    if len(args.window) % 2:
        parser.error(f"--window {args.window[-1]:g}: give a START and an END for each --bps, as in "
                     f"0 0.5")
    for name, values in (("cond", conds or [None]), ("scale", args.scale),
                         ("strength", args.strength), ("window", windows), ("mask", masks)):
        if len(values) not in (1, len(files)):
            parser.error(f"--{name}: {len(values)} values for {len(files)} --bps; give one for "
                         f"all, or one for each")
        columns.append(values * len(files) if len(values) == 1 else values)
    return [Condition(*row) for row in zip(files, *columns)]


def check_settings(parser, args):
    """Ends the script if a setting is out of range; sets args.start, the first step to do."""
    for name, low, high in (("n", 1, 10_000), ("batch", 1, 10_000), ("steps", 1, 999),
                            ("guidance", -MOST_STRENGTH, MOST_STRENGTH)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)}: allowed are {low} to {high}")
    if args.seed + args.n > MOST_SEEDS:
        parser.error(f"--seed {args.seed}: of {args.n} pictures the last has seed "
                     f"{args.seed + args.n - 1}; allowed are 0 to {MOST_SEEDS - 1}")
    if args.guidance == 1 and args.negative_prompt:
        parser.error(f"--guidance 1: leaves --negative-prompt {args.negative_prompt!r} without "
                     f"effect; give more than 1")
    if args.denoise is not None and not args.init:
        parser.error(f"--denoise {args.denoise}: needs --init, the picture to start from")
    args.denoise = DENOISE if args.denoise is None else args.denoise
    if not 0 < args.denoise <= 1:
        parser.error(f"--denoise {args.denoise}: allowed is above 0, up to 1")
    args.start = args.steps - max(1, round(args.denoise * args.steps)) if args.init else 0
    steps = args.steps - args.start
    for condition in args.conditions:
        for name in ("scale", "strength"):
            if not -MOST_STRENGTH <= getattr(condition, name) <= MOST_STRENGTH:
                parser.error(f"--{name} {getattr(condition, name)}: allowed are {-MOST_STRENGTH} "
                             f"to {MOST_STRENGTH}")
        start, end = condition.window
        if not 0 <= start < end <= 1:
            parser.error(f"--window {start:g} {end:g}: give a start and a later end, both from 0 "
                         f"to 1, as in 0 0.5")
        if not any(start <= i / steps < end for i in range(steps)):
            parser.error(f"--window {start:g} {end:g}: holds none of the {steps} steps; widen it "
                         f"or give more --steps")
    parser.check_out(args.out, *(c.cond for c in args.conditions if c.cond))


# ---- what belongs together -----------------------------------------------------------------

def check_fit(bps, file, base):
    """Raises UserError if the BPS was trained for a base of other sizes or another kind.

    SD 1 and SD 2 differ only in the width of their text states. A fine-tune of the same sizes fits.
    """
    prediction_type, config = base.schedule.prediction_type, base.unet.config
    for name, trained, given in (
            ("channels", bps.config.channels, config.channels),
            ("pixels per latent", bps.config.factor, base.vae.factor),
            ("blocks per level", bps.config.blocks_per_level, config.blocks_per_level),
            ("text width", bps.metadata.get("context_dim"), config.context_dim),
            ("prediction type", bps.metadata.get("prediction_type", prediction_type),
             prediction_type)):
        if trained != given:
            raise UserError(f"{file}: for a base of {name} {trained}, but {base.path} has {given}; "
                            f"give the --base it was trained on")
    task, size = bps.metadata.get("task"), bps.metadata.get("size")
    if (task not in TASKS or type(size) is not int or size < 1
            or not isinstance(bps.metadata.get("classes", {}), dict)):
        raise UserError(f"{file}: does not say what it was trained for; give a file that "
                        f"train.py wrote")
    if bps.config.cond_channels != TASKS[task].channels:
        raise UserError(f"{file}: takes conditions of {bps.config.cond_channels} channels, "
                        f"but those of its task, {task}, have {TASKS[task].channels}")


def default_condition(condition, metadata):
    """Returns the Condition, with the drawing that comes with the project if it has none."""
    if condition.cond:
        return condition
    if metadata["task"] != "sketch":
        raise UserError(f"{condition.bps}: trained for {metadata['task']}; give --cond, what it "
                        f"is to follow")
    return condition._replace(cond=DEFAULT_DRAWING)


def check_clip_skip(clip_skip, text_model):
    """Raises UserError if --clip-skip asks for a layer that the text encoder does not have."""
    layers = text_model.config.layers
    if not 1 <= clip_skip <= layers:
        raise UserError(f"--clip-skip {clip_skip}: allowed are 1 to {layers}")


def picture_size(args, metadata, base):
    """Returns (width, height) in pixels: --size, else what BPS or the base was trained with.

    Errors: UserError if a side is not a multiple of the autoencoder's factor.
    """
    # a single file does not say it: SD 2.x predicts v at 768 px, all others are for 512 px
    at_768 = (base.unet.config.context_dim == 1024
              and base.schedule.prediction_type == "v_prediction")
    side = (base.unet.config.sample_size or (96 if at_768 else 64)) * base.vae.factor
    width, height = args.size or (metadata[0]["size"] if metadata else side,) * 2
    check_pixels(width, height)
    if width % base.vae.factor or height % base.vae.factor:
        raise UserError(f"--size {width}x{height}: this base takes multiples of {base.vae.factor}")
    return width, height


def list_jobs(conditions, prompt):
    """Returns the Jobs: one, or if conditions are folders one for each name in them.

    Errors: UserError if folders don't have the same names.
    """
    folders, all_captions = {}, {}
    for condition in conditions:
        if condition.cond.is_dir():
            images, captions, problems = list_files(condition.cond)
            if problems or not images:
                raise UserError(problems[0] if problems else
                                f"--cond {condition.cond}: no image in it")
            folders[condition.cond] = images
            all_captions = captions | all_captions          # those of the first folder win
    if not folders:
        return [Job("", conditions, prompt)]
    first, images = next(iter(folders.items()))
    for folder, others in folders.items():
        for name in sorted(others.keys() ^ images.keys()):
            raise UserError(f"--cond {folder} and {first}: only one of them has {name}; folders "
                            f"of conditions are joined by name")
    return [Job(f"{name.replace('/', '-')}-",
                [condition._replace(cond=folders.get(condition.cond, {}).get(name, condition.cond))
                 for condition in conditions],
                (*read_captions(all_captions.get(name, [])), prompt)[0]) for name in images]


# ---- what a picture remembers --------------------------------------------------------------

def picture_options(args, job, seed, size, prediction_type):
    """Returns the options, as JSON takes them, that draw a picture once more.

    What comes with the project is not named, so that the folder may be moved.
    """
    options = {name: getattr(args, name) for name in SETTINGS}
    if not args.init:
        del options["denoise"]
    options |= dict(prompt=job.prompt, seed=seed, n=1, size=f"{size[0]}x{size[1]}",
                    prediction_type=prediction_type)
    for name in PATHS:
        path = getattr(args, name)
        if path and path.resolve() != BASE:
            options[name] = str(path.resolve())
    if not job.conditions:
        return options | dict(bps=["none"])
    for name in ("bps", "cond", "scale", "strength"):
        options[name] = [getattr(condition, name) for condition in job.conditions]
    options["window"] = [share for condition in job.conditions for share in condition.window]
    if any(condition.mask for condition in job.conditions):
        options["mask"] = [str(condition.mask.resolve()) if condition.mask else str(NONE)
                           for condition in job.conditions]
    for name, default in (("bps", DEFAULT_BPS), ("cond", DEFAULT_DRAWING)):
        paths = [path.resolve() for path in options.pop(name)]
        if paths != [default]:
            options[name] = list(map(str, paths))
    return options


def command_line(options):
    """Returns the command that draws a picture of these options."""
    return shell_command(["python", "sample.py", *option_words(options)])


def option_words(options):
    """Returns the words of a command line that gives these options."""
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words.append(f"{option}={value}")           # a prompt may begin with -
    return words


def read_picture_options(picture):
    """Returns (options, {role: fingerprint}, device) of a picture that sample.py drew."""
    text = getattr(load_image(picture), "text", {})
    if "command" in text and "options" not in text:
        raise UserError(f"{picture}: drawn by an earlier version, whose options are not read; its "
                        f"text field `command` says them")
    try:
        options, files = json.loads(text["options"]), json.loads(text["files"])
        if isinstance(options, dict) and isinstance(files, dict):
            return options, files, text["device"]
    except (KeyError, RecursionError, ValueError):
        pass                                    # as of any other picture
    raise UserError(f"{picture}: does not say how it was drawn; --from takes a PNG as sample.py "
                    f"wrote it; other programs drop such notes")


def files_of(args, conditions):
    """Returns {role: path} of the files and folders that a picture depends on."""
    files = {"base": args.base, "vae": args.vae or args.base, "text": args.base}
    if args.init:
        files["init"] = args.init
    for i, condition in enumerate(conditions, 1):
        files |= {f"bps {i}": condition.bps, f"cond {i}": condition.cond or DEFAULT_DRAWING}
        if condition.mask:
            files[f"mask {i}"] = condition.mask
    return files


def fingerprints(args, conditions, fingerprint):
    """Returns {role: fingerprint} of the files that a picture depends on.

    fingerprint: weights.fingerprint, or a version that remembers.
    """
    readers = dict(base=find_unet, vae=lambda path: read_vae(path).files(),
                   text=lambda path: read_text(path).files())
    paths = files_of(args, conditions)
    return {role: fingerprint(*readers.get(role, lambda path: [path])(path))
            for role, path in paths.items()}


def check_drawn_with(args, files):
    """Raises UserError if the --from picture was drawn with another file of the same name."""
    for role, digest in args.drawn_with.items():
        if files[role] != digest:
            option = "base" if role == "text" else role.split()[0]
            file = files_of(args, args.conditions)[role]
            raise UserError(f"{file}: not the file that {args.picture} was drawn with: its "
                            f"fingerprint is {files[role]}, not {digest}; give the right one by "
                            f"--{option}")
