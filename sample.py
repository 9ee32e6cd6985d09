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
import warnings
from pathlib import Path

import torch
from PIL import PngImagePlugin
from tqdm import tqdm

import diffusion
from bps import load_bps, posterior
from clip import load_clip
from data import DataError, images_at_a_time, read_drawing, to_image
from layouts import find_unet
from unet import load_unet
from vae import load_vae
from weights import WeightsError, fingerprint

HERE = Path(__file__).parent
BASE = HERE / "tiny" / "model"
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def draw_noise(seeds, shape):
    """Returns standard normal noise (B, *shape), each row a function of its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


class Steering:
    """BPS's residuals for one condition: computed once a timestep, whatever the number of seeds."""

    def __init__(self, bps, unet, cond):
        """cond: (B or 1, C, f H, f W) in [0, 1]."""
        self.bps, self.unet, self.cond = bps, unet, cond
        self.t, self.residuals = None, None

    def __call__(self, t, halves):
        """Returns the residuals at timestep t for the halves of guidance: batch 1 or halves * B."""
        if t != self.t:
            t_emb = self.unet.time_embedding(torch.tensor([t], device=self.cond.device))
            residuals = self.bps(self.cond.to(t_emb.dtype), t_emb)
            if len(self.cond) > 1:
                residuals = [r if r is None else torch.cat([r] * halves) for r in residuals]
            self.t, self.residuals = t, residuals
        return self.residuals


def make_denoiser(unet, context, context_empty, guidance_scale, steering=None, strength=1.0):
    """Returns denoise(z_t, t) -> eps (or v): the prior, or the posterior where there is steering.

    context: (B, L, D); context_empty: (1, L, D), of the empty or negative prompt, which guidance 1
    does not need. strength: 0 is the prior, 1 the posterior; others cost a second pass of the
    U-Net. z_t and eps are float32, whatever the U-Net computes in.
    """
    halves = 1 if guidance_scale == 1 else 2
    context = torch.cat([context_empty.expand_as(context), context][-halves:])

    def denoise(z_t, t):
        """Returns the guided prediction (B, 4, H, W)."""
        z = torch.cat([z_t] * halves).to(context.dtype, memory_format=torch.channels_last)
        ts = torch.full((len(z),), t, device=z.device)
        if steering is None or strength == 0:
            eps = unet(z, ts, context)
        else:
            eps = unet(z, ts, context, steering(t, halves))
            if strength != 1:
                eps = posterior(unet(z, ts, context), [eps], [strength])
        eps = eps.float()
        return eps if halves == 1 else diffusion.guide(*eps.chunk(2), guidance_scale)

    return denoise


def draw(unet, vae, schedule, context, context_empty, seeds, size, steps, guidance_scale,
         steering=None):
    """Returns pictures x (B, 3, size, size), one per text state and seed, drawn as one batch.

    context: (B, L, D); seeds: B integers; steering: a Steering of B conditions, or None for the
    frozen base.
    """
    denoise = make_denoiser(unet, context, context_empty, guidance_scale, steering)
    side = size // vae.factor
    noise = draw_noise(seeds, (unet.config.latent_channels, side, side)).to(context.device)
    for z in tqdm(diffusion.sample(denoise, noise, schedule, steps), total=steps, leave=False,
                  desc="draw with BPS" if steering else "draw"):
        pass
    return torch.cat([vae.decode(part) for part in z.split(images_at_a_time(size))])


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


class Parser(argparse.ArgumentParser):
    """A parser that prints the script's docstring as help, and of a mistake one line."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        """Ends the script with exit code 2."""
        self.exit(2, f"error: {message}\n")

    def check_out(self, out):
        """Ends the script where --out, or a folder it would lie in, is a file."""
        for folder in (out, *out.parents):
            if folder.is_file():
                self.error(f"--out {out}: {folder} is a file; a folder is wanted")

    def add_device(self):
        """Adds --device: the GPU where there is one, else the CPU."""
        self.add_argument("--device", type=usable_device,
                          default="cuda" if torch.cuda.is_available() else "cpu",
                          help="(default: %(default)s)")

    def add_base(self):
        """Adds --base, and the options that supply what a single file lacks."""
        add = self.add_argument
        add("--base", type=Path, default=BASE, help="Stable Diffusion 1.x or 2.x: a folder, or a "
            ".safetensors file (default: tiny/model)")
        add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, where --base is "
            "a single file")
        add("--vae", type=Path, help="folder or file of another autoencoder than the base's own")
        add("--prediction-type", choices=diffusion.PREDICTION_TYPES, help="where --base does not "
            "say it: v_prediction for SD 2.x at 768 px")


def usable_device(name):
    """Returns the name of a device that this machine has. Errors: ArgumentTypeError."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):      # no such kind, or PyTorch was built without it
        raise argparse.ArgumentTypeError(f"{name} is not there; cpu always is") from None
    return name


def seed_number(text):
    """Returns the integer that a seed's text means. Errors: ArgumentTypeError."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text}: allowed are 0 to {2**31 - 1}")
    return int(text)


def run(main, interrupted="interrupted"):
    """Runs a script's main(): a user's mistake ends in one line on stderr and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except (WeightsError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError:
        print("error: out of GPU memory; a smaller --size or --batch, --dtype fp16 or --device cpu "
              "needs less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)


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
