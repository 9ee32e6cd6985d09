"""Draws pictures: by the frozen base alone, or steered by a BPS so that they follow a drawing.

    python sample.py --cond drawing.png --prompt "a red apple" --n 4
    python sample.py --base SD --prompt "a red apple" --negative-prompt "a bowl" --size 768x512

Without arguments it draws from a drawing and a BPS file that come with the project; with --base
alone it is a plain Stable Diffusion sampler. The drawing may have any size and either polarity.
Picture i depends on seed + i alone, not on --n. Each PNG's text fields hold all that is needed to
draw it again.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from PIL import PngImagePlugin
from tqdm import tqdm

import diffusion
from bps import load_bps
from cli import BASE, HERE, Parser, run, seed_number
from clip import load_clip
from conditions import read_drawing, to_image
from layouts import find_unet
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


def parse_args():
    """Returns the checked command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--bps", type=Path, help="trained BPS file, or none (default: the embedded base's for "
        "drawings, none for another --base)")
    add("--cond", type=Path, help="the drawing (default: tiny/drawing.png)")
    add("--prompt", default="a red apple", help="what it shows (default: %(default)s)")
    add("--negative-prompt", default="", help="what guidance leads away from (default: nothing)")
    add("--n", type=int, default=4, help="how many pictures (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="of picture 0 (default: %(default)s)")
    add("--size", type=width_and_height, help="of the pictures, as in 768x512 (default: what BPS, "
        "or else the base, was trained with)")
    add("--sampler", choices=diffusion.SAMPLERS, default="ddim", help="(default: %(default)s)")
    add("--steps", type=int, default=50, help="of the sampler (default: %(default)s)")
    add("--guidance", type=float, help="1 is none (default: 3 for the embedded base, else 7.5)")
    add("--scale", type=float, default=1.0,
        help="steering strength: 0 the prior, 1 the posterior (default: %(default)s)")
    add("--clip-skip", type=int, default=1, help="2 reads the text encoder's last layer but one, "
        "as many fine-tunes want (default: %(default)s)")
    parser.add_base()
    add("--dtype", choices=DTYPES, default="fp32", help="what all but the autoencoder computes in "
        "(default: %(default)s)")
    add("--out", type=Path, default=Path("pictures"), help="folder (default: %(default)s)")
    parser.add_device()
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"--n {args.n}: at least 1")
    if not 1 <= args.steps <= 999:
        parser.error(f"--steps {args.steps}: allowed are 1 to 999")
    embedded = args.base.resolve() == BASE.resolve()
    if args.guidance is None:
        args.guidance = 3.0 if embedded else 7.5
    for name in ("guidance", "scale"):
        if not math.isfinite(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)}: a finite number is wanted")
    if args.guidance == 1 and args.negative_prompt:
        parser.error(f"--guidance 1: leaves --negative-prompt {args.negative_prompt!r} without "
                     f"effect; give more than 1")
    parser.check_out(args.out)
    if args.bps is None and embedded:
        args.bps = HERE / "tiny" / "bps_sketch.safetensors"
    if args.bps is None or str(args.bps) == "none":
        args.bps = None
        if args.cond:
            parser.error(f"--cond {args.cond}: needs --bps, a file that train.py wrote for this "
                         f"base")
        if args.scale != 1:
            parser.error(f"--scale {args.scale}: needs --bps, whose strength it is")
    elif args.cond is None:
        args.cond = HERE / "tiny" / "drawing.png"
    return args


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
    if bps.config.cond_channels != 1 or "size" not in bps.metadata:
        raise WeightsError(f"{bps_file}: not a BPS for drawings that train.py wrote")


def unused(files):
    """Returns the paths if none is there yet, else all of them with -2, -3 .. after the name."""
    number, free = 1, files
    while any(file.exists() for file in free):
        number += 1
        free = [file.with_stem(f"{file.stem}-{number}") for file in files]
    return free


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


def write_pictures(pictures, seeds, facts, as_used, out):
    """Writes SEED.png for each of pictures x (3, H, W), with its facts, and perhaps condition.png.

    as_used: the drawing as the network sees it, or None. Nothing is overwritten.
    """
    condition, *files = unused([out / "condition.png",
                                *(out / f"{seed:04d}.png" for seed in seeds)])
    if as_used:
        as_used.save(condition)
        print(condition, "(the drawing as the network sees it)")
    for x, seed, file in zip(pictures, seeds, files):
        text = PngImagePlugin.PngInfo()
        for key, value in (facts | dict(seed=seed)).items():
            text.add_itxt(key, str(value))
        to_image(x).save(file, pnginfo=text)
        print(file)


@torch.inference_mode()
def main():
    """Draws --n pictures of one prompt, and of one drawing where there is a BPS."""
    args = parse_args()
    dtype = DTYPES[args.dtype]
    bps = args.bps and load_bps(args.bps, dtype, args.device)
    unet, vae, tokenizer, text_model, schedule = load_base(
        args.base, args.tokenizer, args.device, dtype, args.vae, args.prediction_type)
    width, height = picture_size(args.size, bps, unet, vae, schedule)
    layers = text_model.config.layers
    if not 1 <= args.clip_skip <= layers:
        raise WeightsError(f"--clip-skip {args.clip_skip}: allowed are 1 to {layers}")
    facts = dict(prompt=args.prompt, negative_prompt=args.negative_prompt, steps=args.steps,
                 sampler=args.sampler, guidance=args.guidance, size=f"{width}x{height}",
                 clip_skip=args.clip_skip, dtype=args.dtype,
                 prediction_type=schedule.prediction_type,
                 base=fingerprint(*find_unet(args.base)))
    if args.vae:
        facts["vae"] = str(args.vae)
    steering, as_used = None, None
    if bps:
        check_fit(bps, args.bps, unet, vae, schedule.prediction_type, args.base)
        cond, as_used = read_drawing(args.cond, width, height)
        steering = Steering(bps, unet, cond[None].to(args.device))
        facts |= dict(scale=args.scale, bps=fingerprint(args.bps), drawing=fingerprint(args.cond))
        if facts["base"] != bps.metadata.get("base"):
            print(f"note: {args.bps} was trained on other weights than {args.base}; it fits, but "
                  f"may follow the drawing less", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)         # before the work, should it not be possible

    ids = tokenizer([args.prompt, args.negative_prompt]).to(args.device)
    context, empty = text_model(ids, args.clip_skip).split(1)
    denoise = make_denoiser(unet, context, empty, args.guidance, steering, args.scale)
    # One sampler a seed, not one batch, so that a picture is the same to the bit whatever --n is;
    # they go in step, so that BPS runs once a timestep for all of them.
    seeds = range(args.seed, args.seed + args.n)
    shape = (unet.config.latent_channels, height // vae.factor, width // vae.factor)
    samplers = [diffusion.sample(denoise, draw_noise([seed], shape).to(args.device), schedule,
                                 args.steps, args.sampler) for seed in seeds]
    for latents in tqdm(zip(*samplers), total=args.steps, desc="draw", leave=False):
        pass
    if not all(z.isfinite().all() for z in latents):
        raise WeightsError(f"--dtype {args.dtype}: too narrow for {args.base}, its numbers ran "
                           f"over; give --dtype bf16 or fp32")
    write_pictures((vae.decode(z)[0] for z in latents), seeds, facts, as_used, args.out)


if __name__ == "__main__":
    run(main)
