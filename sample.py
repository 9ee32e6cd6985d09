"""Draws pictures: by the frozen base alone, or steered by one or several conditions.

    python sample.py --cond drawing.png --prompt "a red apple" --n 4
    python sample.py --base SD --prompt "a red apple" --negative-prompt "a bowl" --size 768x512
    python sample.py --bps A --cond a.png --bps B --cond b.png --strength 0.7 --window 0 0.5
    python sample.py --from pictures/0000.png

Without arguments it draws from a drawing and a BPS file that come with the project; with --base
alone it is a plain Stable Diffusion sampler. Each --bps starts a condition, to which the --cond,
--scale, --strength and --window behind it belong. A condition may have any size, a drawing either
polarity; --cond FOLDER draws from each image in it, with NAME.txt as its prompt where that is
there. Picture i depends on seed + i alone, not on --n. Each PNG holds the command that draws it.
"""
import argparse
import functools
import json
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import PngImagePlugin
from tqdm import tqdm

import diffusion
from bps import load_bps
from cli import BASE, HERE, Parser, run, seed_number
from clip import load_clip
from conditions import (
    TASKS,
    DataError,
    crop,
    load_image,
    open_image,
    read_condition,
    to_image,
    to_x,
)
from layouts import find_unet, read_vae
from own_data import IMAGE_SUFFIXES
from steer import Steering, draw_noise, make_denoiser
from unet import load_unet
from vae import load_vae
from weights import WeightsError, fingerprint

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def load_base(path, tokenizer_path=None, device="cpu", dtype=torch.float32, vae_path=None,
              prediction_type=None):
    """Returns (unet, vae, tokenizer, text_model, schedule) of an SD folder or single file.

    What a single file lacks comes from tokenizer_path, vae_path and prediction_type. The
    autoencoder is float32 whatever the dtype. Errors: WeightsError names the file and what is
    missing or does not fit.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise WeightsError(f"{path}: no model_index.json in it; a base is a Stable Diffusion "
                           f"folder with one, or a .safetensors file")
    schedule = diffusion.load_schedule(path, prediction_type)
    tokenizer, text_model = load_clip(path, tokenizer_path, dtype, device)
    vae = load_vae(vae_path or path, device=device)
    unet = load_unet(path, dtype, device)
    for what, own, other in (
            ("text states of width", text_model.config.width, unet.config.context_dim),
            ("latents of channels", vae.config.latent_channels, unet.config.latent_channels)):
        if own != other:
            raise WeightsError(f"{path}: {what} {own}, but its U-Net takes {other}; the parts are "
                               f"of different models")
    unet, vae = (module.to(memory_format=torch.channels_last) for module in (unet, vae))
    return unet, vae, tokenizer, text_model, schedule


def width_and_height(text):
    """Returns (width, height) that a text like 768x512 or 512 means. Errors: ArgumentTypeError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text}: allowed are WIDTHxHEIGHT or one number, in "
                                         f"pixels, as in 768x512")
    return int(sides[0]), int(sides[-1])


# ---- the command line ----------------------------------------------------------------------

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


def make_parser():
    """Returns the parser."""
    parser = Parser(__doc__)
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
        "it, 1 forgets it (default: 0.6)")
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


def parse_args():
    """Returns the checked command line, where --from is given joined to the picture's own.

    args.conditions is a list of Condition; args.drawn_with holds {role: fingerprint} of the files
    that the --from picture was drawn with, or nothing.
    """
    parser = make_parser()
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
    args.denoise = 0.6 if args.denoise is None else args.denoise
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


# ---- what is drawn, and what with ----------------------------------------------------------

def check_fit(bps, bps_file, unet, vae, prediction_type, base):
    """Raises WeightsError where the BPS was trained for a base of other sizes or another kind.

    SD 1 and SD 2 differ only in the width of their text states. A fine-tune of the same sizes fits.
    """
    for name, trained, own in (
            ("channels", bps.config.channels, unet.config.channels),
            ("pixels per latent", bps.config.factor, vae.factor),
            ("blocks per level", bps.config.blocks_per_level, unet.config.blocks_per_level),
            ("text width", bps.metadata.get("context_dim"), unet.config.context_dim),
            ("prediction type", bps.metadata.get("prediction_type", prediction_type),
             prediction_type)):
        if trained != own:
            raise WeightsError(f"{bps_file}: for a base of {name} {trained}, but {base} has {own}; "
                               f"give the --base it was trained on")
    task = bps.metadata.get("task")
    if task not in TASKS or "size" not in bps.metadata:
        raise WeightsError(f"{bps_file}: does not say what it was trained for; give a file that "
                           f"train.py wrote")
    if bps.config.cond_channels != TASKS[task].channels:
        raise WeightsError(f"{bps_file}: takes conditions of {bps.config.cond_channels} channels, "
                           f"but those of its task, {task}, have {TASKS[task].channels}")


def picture_size(wanted, bps, unet, vae, schedule):
    """Returns (width, height) in pixels: as wanted, else what BPS or the base was trained with.

    Errors: WeightsError where a side is not a multiple of the autoencoder's factor.
    """
    # a single file does not say it: SD 2.x predicts v at 768 px, all others are for 512 px
    at_768 = unet.config.context_dim == 1024 and schedule.prediction_type == "v_prediction"
    side = (unet.config.sample_size or (96 if at_768 else 64)) * vae.factor
    width, height = wanted or (bps.metadata["size"] if bps else side,) * 2
    if width % vae.factor or height % vae.factor:
        raise WeightsError(f"--size {width}x{height}: this base takes multiples of {vae.factor}")
    return width, height


def default_condition(condition, bps):
    """Returns the Condition with the drawing that comes with the project, where it has none."""
    if condition.cond:
        return condition
    if bps.metadata["task"] != "sketch":
        raise DataError(f"{condition.bps}: trained for {bps.metadata['task']}; give --cond, what it "
                        f"is to follow")
    return condition._replace(cond=HERE / "tiny" / "drawing.png")


def check_window(condition, steps):
    """Raises DataError where none of the steps begins in a condition's window."""
    start, end = condition.window
    if not any(start <= i / steps < end for i in range(steps)):
        raise DataError(f"--window {start:g} {end:g}: holds none of the {steps} steps; widen it or "
                        f"give more --steps")


def list_jobs(conditions, prompt):
    """Returns (name, conditions, prompt) of each picture to draw: one, or one a file of folders.

    name: what its files begin with. Errors: DataError where folders don't have the same names.
    """
    folders = [condition for condition in conditions if condition.cond.is_dir()]
    if not folders:
        return [("", conditions, prompt)]
    files = {condition.cond: {file.stem: file for file in sorted(condition.cond.iterdir())
                              if file.suffix.lower() in IMAGE_SUFFIXES} for condition in folders}
    first = folders[0].cond
    if not files[first]:
        raise DataError(f"--cond {first}: no image in this folder")
    jobs = []
    for stem in files[first]:
        for folder, by_stem in files.items():
            if stem not in by_stem:
                raise DataError(f"--cond {folder}: no {stem}, which {first} has")
        own = [condition._replace(cond=files.get(condition.cond, {}).get(stem, condition.cond))
               for condition in conditions]
        text = first / f"{stem}.txt"
        words = text.read_text(encoding="utf-8-sig").split("\n")[0].strip() if text.is_file() else ""
        jobs.append((f"{stem}-", own, words or prompt))
    return jobs


def start_latent(args, vae, noise, signal_and_noise, width, height):
    """Returns (z_t, start): noise and step 0, or --init with the noise of the step to start at."""
    start = args.steps - max(1, round(args.denoise * args.steps))
    if not args.init or start == 0:
        return noise, 0
    x = to_x(crop(open_image(args.init), width, height))[None].to(noise.device)
    a, s = signal_and_noise[start]
    return a * vae.encode(x).mean + s * noise, start


# ---- pictures, and what they remember ------------------------------------------------------

def recorded(picture):
    """Returns (the words of the command that drew a picture, {role: fingerprint} of its files)."""
    text = getattr(load_image(picture), "text", {})
    try:
        return shlex.split(text["command"])[2:], json.loads(text["files"])
    except (KeyError, ValueError):
        raise DataError(f"{picture}: does not say how it was drawn; --from takes a PNG as sample.py "
                        f"wrote it, not edited or sent through an app that drops such notes") from None


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


def fingerprints(args, conditions, fingerprint_of):
    """Returns {role: fingerprint} of the files that a picture depends on.

    fingerprint_of: weights.fingerprint, or a version that remembers. Errors: DataError where a --from picture was drawn with another one.
    """
    files = {"base": find_unet(args.base)}
    if args.vae:
        files["vae"] = [read_vae(args.vae).file]
    if args.init:
        files["init"] = [args.init]
    for i, condition in enumerate(conditions, 1):
        files |= {f"bps {i}": [condition.bps], f"cond {i}": [condition.cond]}
    found = {role: fingerprint_of(*paths) for role, paths in files.items()}
    for role, then in args.drawn_with.items():
        if role in found and found[role] != then:
            raise DataError(f"{files[role][0]}: not the file that {args.picture} was drawn with: "
                            f"its fingerprint is {found[role]}, not {then}; give the right one "
                            f"by --{role.split()[0]}")
    return found


def unused(files):
    """Returns the paths if none is there yet, else all of them with -2, -3 .. after the name."""
    number, free = 1, files
    while any(file.exists() for file in free):
        number += 1
        free = [file.with_stem(f"{file.stem}-{number}") for file in files]
    return free


def write_pictures(name, pictures, seeds, texts, conditions, out):
    """Writes NAME SEED.png for each of pictures x (3, H, W), with its text fields.

    conditions: images of them as the network sees them, written beside. Nothing is overwritten.
    """
    numbers = [""] if len(conditions) == 1 else range(1, len(conditions) + 1)
    files = unused([*(out / f"{name}condition{number}.png" for number in numbers),
                    *(out / f"{name}{seed:04d}.png" for seed in seeds)])
    for image, file in zip(conditions, files):
        image.save(file)
        print(file, "(the condition as the network sees it)")
    for x, text, file in zip(pictures, texts, files[len(conditions):]):
        info = PngImagePlugin.PngInfo()
        for key, value in text.items():
            info.add_itxt(key, str(value))
        to_image(x).save(file, pnginfo=info)
        print(file)


def main():
    """Draws --n pictures of each job."""
    args = parse_args()
    dtype = DTYPES[args.dtype]
    networks = {file: load_bps(file, dtype, args.device)
                for file in dict.fromkeys(condition.bps for condition in args.conditions)}
    base = load_base(args.base, args.tokenizer, args.device, dtype, args.vae, args.prediction_type)
    unet, vae, _, text_model, schedule = base
    for file, bps in networks.items():
        check_fit(bps, file, unet, vae, schedule.prediction_type, args.base)
    conditions = [default_condition(c, networks[c.bps]) for c in args.conditions]
    width, height = picture_size(args.size, next(iter(networks.values()), None), unet, vae,
                                 schedule)
    layers = text_model.config.layers
    if not 1 <= args.clip_skip <= layers:
        raise WeightsError(f"--clip-skip {args.clip_skip}: allowed are 1 to {layers}")
    once = functools.cache(fingerprint)                 # of a base it takes seconds
    jobs = [(name, own, prompt,
             [read_condition(c.cond, networks[c.bps].metadata["task"], width, height,
                             networks[c.bps].metadata.get("classes")) for c in own],
             fingerprints(args, own, once))
            for name, own, prompt in list_jobs(conditions, args.prompt)]
    for file, bps in networks.items():
        if jobs[0][-1]["base"] != bps.metadata.get("base"):
            print(f"note: {file} was trained on other weights than {args.base}; it fits, but may "
                  f"follow the condition less", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)         # before the work, should it not be possible
    for job in jobs:
        draw_job(job, args, networks, base, width, height)


@torch.inference_mode()
def draw_job(job, args, networks, base, width, height):
    """Draws and writes the pictures of a job."""
    name, conditions, prompt, read, files = job
    unet, vae, tokenizer, text_model, schedule = base
    timesteps, signal_and_noise = diffusion.levels(args.steps, schedule, args.sampler)
    ids = tokenizer([prompt, args.negative_prompt]).to(args.device)
    context, empty = text_model(ids, args.clip_skip).split(1)
    seeds = range(args.seed, args.seed + args.n)
    shape = (unet.config.latent_channels, height // vae.factor, width // vae.factor)
    starts = [start_latent(args, vae, draw_noise([seed], shape).to(args.device), signal_and_noise,
                           width, height) for seed in seeds]
    start = starts[0][1]
    for c in conditions:
        check_window(c, args.steps - start)
    steerings = [Steering(networks[c.bps], unet, cond[None].to(args.device), c.scale, c.strength,
                          c.window) for c, (cond, _) in zip(conditions, read)]
    denoise = make_denoiser(unet, context, empty, args.guidance, steerings, timesteps[start:])
    # One sampler a seed, not one batch, so that a picture is the same to the bit whatever --n is;
    # they go in step, so that BPS runs once a timestep for all of them.
    samplers = [diffusion.sample(denoise, z_t, schedule, args.steps, args.sampler, start)
                for z_t, start in starts]
    for latents in tqdm(zip(*samplers), total=args.steps - start, desc="draw", leave=False):
        pass
    if not all(z.isfinite().all() for z in latents):
        raise WeightsError(f"--dtype {args.dtype}: too narrow for {args.base}, its numbers ran "
                           f"over; give --dtype bf16 or fp32")
    facts = dict(prompt=prompt, negative_prompt=args.negative_prompt, size=f"{width}x{height}",
                 sampler=args.sampler, steps=args.steps, guidance=args.guidance,
                 clip_skip=args.clip_skip, dtype=args.dtype,
                 prediction_type=schedule.prediction_type)
    texts = []
    for seed in seeds:
        command = shlex.join(command_words(args, facts | dict(seed=seed), conditions))
        texts.append(facts | dict(seed=seed, device=args.device, torch=torch.__version__,
                                  command=command, files=json.dumps(files)))
    write_pictures(name, (vae.decode(z)[0] for z in latents), seeds, texts,
                   [image for _, image in read], args.out)


if __name__ == "__main__":
    run(main)
