"""Draws pictures that follow a condition: the frozen base steered by a trained BPS.

    python sample.py --cond drawing.png --prompt "a red apple" --n 4

Without arguments it draws from a drawing and a BPS file that come with the project. The drawing
may have any size and either polarity. Picture i depends on seed + i alone, not on --n. Each PNG's
text fields hold all that is needed to draw it again.
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
from unet import load_unet
from vae import load_vae
from weights import WeightsError, find_unet, fingerprint

HERE = Path(__file__).parent
BASE = HERE / "tiny" / "model"


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

    def __call__(self, t):
        """Returns the residuals at timestep t, for both halves of guidance: batch 1 or 2 B."""
        if t != self.t:
            t_emb = self.unet.time_embedding(torch.tensor([t], device=self.cond.device))
            residuals = self.bps(self.cond, t_emb)
            if len(self.cond) > 1:
                residuals = [r if r is None else torch.cat([r, r]) for r in residuals]
            self.t, self.residuals = t, residuals
        return self.residuals


def make_denoiser(unet, context, context_empty, guidance_scale, steering=None, strength=1.0):
    """Returns denoise(z_t, t) -> eps: the prior, or the posterior where there is steering.

    context: (B, L, D); context_empty: (1, L, D). strength: 0 is the prior, 1 the posterior; others
    cost a second pass of the U-Net.
    """
    both = torch.cat([context_empty.expand_as(context), context])              # (2 B, L, D)

    def denoise(z_t, t):
        z_both = torch.cat([z_t, z_t]).contiguous(memory_format=torch.channels_last)
        t_both = torch.full((len(z_both),), t, device=z_t.device)
        if steering is None or strength == 0:
            eps = unet(z_both, t_both, both)
        else:
            eps = unet(z_both, t_both, both, steering(t))
            if strength != 1:
                eps = posterior(unet(z_both, t_both, both), [eps], [strength])
        return diffusion.guide(*eps.chunk(2), guidance_scale)

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


def load_base(path, tokenizer_path=None, device="cpu"):
    """Returns (unet, vae, tokenizer, text_model, schedule) of an SD folder or single file.

    Errors: WeightsError names the file and what is missing or does not fit.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise WeightsError(f"{path}: no model_index.json in it; a base is a Stable Diffusion "
                           f"folder with one, or a .safetensors file")
    return (load_unet(path, device=device), load_vae(path, device=device),
            *load_clip(path, tokenizer_path, device=device), diffusion.load_schedule(path))


class Parser(argparse.ArgumentParser):
    """A parser that prints the script's docstring as help, and of a mistake one line."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        """Ends the script with exit code 2."""
        self.exit(2, f"error: {message}\n")

    def add_device(self):
        """Adds --device: the GPU where there is one, else the CPU."""
        self.add_argument("--device", type=usable_device,
                          default="cuda" if torch.cuda.is_available() else "cpu",
                          help="(default: %(default)s)")


def usable_device(name):
    """Returns the name of a device that this machine has. Errors: ArgumentTypeError."""
    try:
        torch.zeros(1, device=name)
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
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)


def parse_args():
    """Returns the checked command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--bps", type=Path, default=HERE / "tiny" / "bps_sketch.safetensors", help="trained BPS")
    add("--cond", type=Path, default=HERE / "tiny" / "drawing.png", help="the drawing")
    add("--prompt", default="a red apple", help="what it shows (default: %(default)s)")
    add("--n", type=int, default=4, help="how many pictures (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="of picture 0 (default: %(default)s)")
    add("--steps", type=int, default=50, help="DDIM steps (default: %(default)s)")
    add("--guidance", type=float, default=3.0, help="1 is none (default: %(default)s)")
    add("--scale", type=float, default=1.0,
        help="steering strength: 0 the prior, 1 the posterior (default: %(default)s)")
    add("--base", type=Path, default=BASE, help="SD folder or .safetensors (default: tiny/model)")
    add("--tokenizer", type=Path, help="folder with vocab.json, where --base is a single file")
    add("--out", type=Path, default=Path("pictures"), help="folder (default: %(default)s)")
    parser.add_device()
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"--n {args.n}: at least 1")
    if not 1 <= args.steps <= 999:
        parser.error(f"--steps {args.steps}: allowed are 1 to 999")
    for name in ("guidance", "scale"):
        if not math.isfinite(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)}: a finite number is wanted")
    return args


def check_fit(bps, bps_file, unet, vae, base):
    """Raises WeightsError where the BPS was trained for a base of other sizes.

    SD 1 and SD 2 differ only in the width of their text states. A fine-tune of the same sizes fits.
    """
    for name, trained, own in (
            ("channels", bps.config.channels, unet.config.channels),
            ("pixels per latent", bps.config.factor, vae.factor),
            ("blocks per level", bps.config.blocks_per_level, unet.config.blocks_per_level),
            ("text width", bps.metadata.get("context_dim"), unet.config.context_dim)):
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


@torch.inference_mode()
def main():
    """Draws --n pictures of one prompt and one drawing."""
    args = parse_args()
    bps = load_bps(args.bps, device=args.device)
    unet, vae, tokenizer, text_model, schedule = load_base(args.base, args.tokenizer, args.device)
    check_fit(bps, args.bps, unet, vae, args.base)
    size = bps.metadata["size"]
    cond, as_used = read_drawing(args.cond, size)
    context, empty = text_model(tokenizer([args.prompt, ""]).to(args.device)).split(1)
    steering = Steering(bps, unet, cond[None].to(args.device))
    denoise = make_denoiser(unet, context, empty, args.guidance, steering, args.scale)

    args.out.mkdir(parents=True, exist_ok=True)         # before the work, should it not be possible
    # One sampler a seed, not one batch, so that a picture is the same to the bit whatever --n is;
    # they go in step, so that BPS runs once a timestep for all of them.
    seeds, side = range(args.seed, args.seed + args.n), size // vae.factor
    shape = (unet.config.latent_channels, side, side)
    samplers = [diffusion.sample(denoise, draw_noise([seed], shape).to(args.device), schedule,
                                 args.steps) for seed in seeds]
    for latents in tqdm(zip(*samplers), total=args.steps, desc="draw", leave=False):
        pass

    facts = dict(prompt=args.prompt, steps=args.steps, guidance=args.guidance, scale=args.scale,
                 sampler="DDIM", base=fingerprint(find_unet(args.base)),
                 bps=fingerprint(args.bps), drawing=fingerprint(args.cond))
    if facts["base"] != bps.metadata.get("base"):
        print(f"note: {args.bps} was trained on other weights than {args.base}; it fits, but may "
              f"follow the drawing less", file=sys.stderr)
    condition, *files = unused([args.out / "condition.png",
                                *(args.out / f"{seed:04d}.png" for seed in seeds)])
    as_used.save(condition)
    print(condition, "(the drawing as the network sees it)")
    for seed, z, file in zip(seeds, latents, files):
        text = PngImagePlugin.PngInfo()
        for key, value in (facts | dict(seed=seed)).items():
            text.add_itxt(key, str(value))
        to_image(vae.decode(z)[0]).save(file, pnginfo=text)
        print(file)


if __name__ == "__main__":
    run(main)
