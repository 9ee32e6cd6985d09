"""Draws pictures: with the frozen base alone, or steered by one or several conditions.

    python sample.py --cond drawing.png --prompt "person, purple hair, dark skin" --n 4
    python sample.py --base SD --prompt "a red apple" --negative-prompt "a bowl" --size 768x512
    python sample.py --bps A B --cond a.png b.png --strength 0.7 1 --window 0 0.5 0 1
    python sample.py --from pictures/0000.png

Without options it draws from a drawing and a BPS file that are included; with --base alone it is a
plain Stable Diffusion sampler. Give --cond, --strength, --window and --mask once for all --bps, or
once for each. A condition may have any size, a drawing either polarity; --cond FOLDER draws from
each image in it, with NAME.txt as its prompt if there is one. Picture i depends on seed + i alone,
not on --n. Each PNG stores the options that draw it again with --from.

Shapes: B batch, L tokens, D width, H W rows and columns of the picture.
"""
import contextlib
import functools
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import diffusion
from bps import Condition, load_bps, make_denoiser
from clip import CLIPTextModel, Tokenizer
from inputs import checkpoints
from inputs.conditions import (TASKS, cond_to_x, crop, images_at_a_time, open_image,
                               read_condition, read_mask, to_image, to_x)
from inputs.files import fingerprint
from inputs.options import (DEFAULT_BPS, DEFAULT_DRAWING, DTYPES, MAX_PIXELS, MAX_SEEDS, NONE,
                            Parser, check_pixels, in_range, is_embedded, positive, run_script,
                            seed_number, to_argv, unicode_text, width_and_height)
from inputs.pairs import list_files, read_captions
from inputs.pictures import (fingerprints, note_changes, png_fields, read_stored, without_drawn,
                             write_new)
from unet import UNet
from vae import AutoencoderKL
from weights import UserError, is_finite

DEFAULT_PROMPT = "person, purple hair, light skin, blue clothes, avataaars style, on white"
DEFAULTS = diffusion.Sampling()
SD_GUIDANCE = 7.5
SIDE_BY_SIDE = 4                # pictures that share the passes of BPS and are written together
PROMPTS_AT_A_TIME = 16
MAX_NAME = 200                  # bytes of a condition's name, which the pictures' names begin with
FAR_OUTSIDE = 10                # mean of |x|, which is about 1 at most


# ---- the base ------------------------------------------------------------------------------

class StableDiffusion(NamedTuple):
    """A loaded base: the frozen networks and their noise schedule."""
    unet: UNet
    vae: AutoencoderKL
    tokenizer: Tokenizer
    text_model: CLIPTextModel
    schedule: diffusion.NoiseSchedule
    path: Path                  # where it was loaded from, for messages
    vae_path: Path

    def encode(self, prompts):
        """Text states (B, L, D) of a list of prompts."""
        device = next(self.text_model.parameters()).device
        parts = [prompts[i:i + PROMPTS_AT_A_TIME]
                 for i in range(0, len(prompts), PROMPTS_AT_A_TIME)]
        return torch.cat([self.text_model(self.tokenizer(part).to(device))
                          for part in tqdm(parts, desc="text states", delay=2, leave=False)])

    def autocast(self):
        """The context in which networks with fp32 weights compute in the base's dtype."""
        weight = next(self.unet.parameters())
        if weight.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(weight.device.type, weight.dtype)

    def check_finite(self):
        """Raise UserError if a network's weights are not finite."""
        for part, module, file in (("U-Net", self.unet, self.path),
                                   ("text encoder", self.text_model, self.path),
                                   ("autoencoder", self.vae, self.vae_path)):
            if not is_finite(module):
                raise UserError(f"{file}: the weights of its {part} are not finite. Get another "
                                f"copy.")


def load_base(path, tokenizer_path=None, device="cpu", dtype=torch.float32, vae_path=None,
              prediction_type=None):
    """The StableDiffusion of an SD folder or single file; its autoencoder is always float32.

    tokenizer_path, vae_path and prediction_type supply what a single file lacks.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"{path} must be a Stable Diffusion folder with a model_index.json, or a "
                        f".safetensors file.")
    schedule = checkpoints.load_schedule(path, prediction_type)
    tokenizer, text_model = checkpoints.load_clip(path, tokenizer_path, dtype, device)
    vae = checkpoints.load_vae(vae_path or path, device=device, base=path)
    unet = checkpoints.load_unet(path, dtype, device)
    for name, given, needed in (
            ("text states of width", text_model.config.width, unet.config.context_dim),
            ("latent channels", vae.config.latent_channels, unet.config.latent_channels)):
        if given != needed:
            raise UserError(f"{path} has {name} {given}, but its U-Net needs {needed}. The parts "
                            f"belong to different models.")
    unet, vae = (module.to(memory_format=torch.channels_last) for module in (unet, vae))
    return StableDiffusion(unet, vae, tokenizer, text_model, schedule, path, vae_path or path)


# ---- drawing -------------------------------------------------------------------------------

@torch.inference_mode()
def draw(base, context, empty, seeds, size, sampling=DEFAULTS, conditions=(), batch=None, init=None,
         on_step=None):
    """Pictures x (B, 3, height, width), one per seed.

    context: text states (B, L, D), or (1, L, D) for all pictures. empty: (1, L, D) of the empty or
    negative prompt, or None without guidance. seeds: B integers. size: (width, height).
    conditions: Conditions with one cond for all pictures, or with B if batch is None. batch:
    pictures per call of the U-Net (default: all). All batches advance together, so BPS runs once
    per timestep, and with batch 1 a picture is bit for bit the same for every B. init: (clean
    latent (1, 4, h, w), first step), or None for pure noise. on_step() is called after each step;
    an exception it raises ends the drawing.
    """
    if batch and any(len(condition.cond) > 1 for condition in conditions):
        raise ValueError("batch must be None if a Condition has a cond for each picture")
    sampler, steps, guidance_scale = sampling
    _, alphas_sigmas = diffusion.sampler_steps(steps, base.schedule, sampler)
    z_init, start = init or (0.0, 0)
    alpha, sigma = alphas_sigmas[start] if init else (0.0, 1.0)
    context = context.expand(len(seeds), -1, -1)
    width, height = (side // base.vae.factor for side in size)
    samplers = []
    for i in torch.arange(len(seeds)).split(batch or len(seeds)):
        denoise = make_denoiser(base.unet, context[i], empty, guidance_scale, conditions)
        noise = diffusion.draw_noise([seeds[k] for k in i],
                                     (base.unet.config.latent_channels, height, width))
        z_t = alpha * z_init + sigma * noise.to(context.device)
        samplers.append(diffusion.sample(denoise, z_t, base.schedule, steps, sampler, start))
    for latents in tqdm(zip(*samplers), total=steps - start, leave=False,
                        desc="draw with BPS" if conditions else "draw"):
        if on_step:
            on_step()
    return torch.cat([base.vae.decode(z) for part in latents
                      for z in part.split(images_at_a_time(max(size)))])


def check_pictures(x):
    """Raise UserError if pictures x (B, 3, H, W) are not finite, or far from [-1, 1]."""
    if not (x.abs().mean((1, 2, 3)) < FAR_OUTSIDE).all():           # NaN is not less either
        raise UserError("the numbers of the pictures overflowed. Use --dtype fp32 (or bf16), "
                        "another --vae, or --guidance and --strength closer to 1.")


# ---- options -------------------------------------------------------------------------------

class ConditionArgs(NamedTuple):
    """A --bps with its own options."""
    bps: Path
    cond: Path
    strength: float
    window: tuple
    mask: Path | None           # None steers everywhere


class Job(NamedTuple):
    """A prompt and its ConditionArgs; the names of its pictures begin with `name`."""
    name: str
    condition_args: list
    prompt: str


def make_parser():
    """The parser of sample.py's command line."""
    parser, default = Parser(__doc__), "(default: %(default)s)"
    add = parser.add_argument
    add("--bps", type=Path, nargs="+", help="trained BPS files, or the word none (default: the "
        "included one for drawings, none for another --base)")
    add("--cond", type=Path, nargs="+", help="the condition of each --bps: a picture, or a folder "
        "of pictures (default: tiny/drawing.png)")
    add("--strength", type=in_range(float, -1000, 1000), nargs="+", default=[1.0], help="0 is the "
        "prior, 1 the posterior; others cost a second pass of the U-Net (default: 1)")
    add("--window", type=in_range(float, 0, 1), nargs="+", default=[0.0, 1.0],
        metavar="START END", help="steer only this part of the denoising (default: 0 1)")
    add("--mask", type=Path, nargs="+", help="a picture, white where to steer, or the word none; "
        "costs a second pass")
    add("--prompt", type=unicode_text, default=DEFAULT_PROMPT, help=default)
    add("--negative-prompt", type=unicode_text, default="", help="what guidance avoids")
    add("--n", type=in_range(int, 1, 10_000), default=4, help=f"pictures {default}")
    add("--batch", type=positive, default=1, help="pictures per U-Net call; >1 is faster on GPUs, "
        f"pixels may differ by rounding {default}")
    add("--seed", type=seed_number, default=0, help=f"of the first picture {default}")
    add("--size", type=width_and_height, help="pixels, as in 768x512 (default: as trained)")
    add("--init", type=Path, help="a picture to start from instead of noise")
    add("--denoise", type=in_range(float, 0.001, 1), default=0.6, help="share of the steps that "
        f"--init goes through; 1 keeps nothing of it {default}")
    add("--sampler", choices=diffusion.SAMPLERS, default=DEFAULTS.sampler, help=default)
    add("--steps", type=in_range(int, 1, 999), default=DEFAULTS.steps, help=default)
    add("--guidance", type=in_range(float, -1000, 1000), help="how much the prompt is exaggerated; "
        f"1 is no guidance (default: {DEFAULTS.guidance_scale:g}, for another --base "
        f"{SD_GUIDANCE})")
    parser.add_base()
    add("--dtype", choices=DTYPES, default="fp32", help=f"of all but the autoencoder {default}")
    add("--from", type=Path, dest="picture", help="draw this picture again; other options "
        "override those that it stores")
    add("--out", type=Path, default=Path("pictures"), help=f"folder {default}")
    parser.add_device()
    return parser


def parse_args(argv, parser=None):
    """The checked options; args.condition_args is a list of ConditionArgs.

    With --from, the picture's options are added, except those that the user gave.
    args.stored_files are the fingerprints of the files that the picture was drawn with.
    """
    parser = parser or make_parser()
    args, stored_files = parser.parse_args(argv), {}
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_")
             for word in argv if word.startswith("--")}
    if args.picture:
        stored, stored_files = read_stored(args.picture)
        stored = {name: value for name, value in (dict(n=1) | stored).items() if name not in given}
        args = parser.parse_args([*to_argv(stored), *argv])
    if given & {"base", "tokenizer", "vae"}:
        given.add("config")                             # which belongs to these three
    args.stored_files = {role: digest for role, digest in stored_files.items()
                         if role.partition(" ")[0] not in given}
    args.bps = args.bps or [DEFAULT_BPS if is_embedded(args.base) else NONE]
    args.condition_args = join_conditions(parser, args)
    if args.guidance is None:
        args.guidance = DEFAULTS.guidance_scale if is_embedded(args.base) else SD_GUIDANCE
    if args.seed + args.n > MAX_SEEDS:
        parser.error(f"--seed plus --n must be at most {MAX_SEEDS}, got {args.seed + args.n}.")
    if args.guidance == 1 and args.negative_prompt:
        parser.error("--guidance must not be 1 with a --negative-prompt, which it ignores.")
    if args.denoise != parser.get_default("denoise") and not args.init:
        parser.error("--denoise needs a picture to start from. Give --init FILE.")
    args.start = args.steps - max(1, round(args.denoise * args.steps)) if args.init else 0
    parser.check_out(args.out, *(c.cond for c in args.condition_args))
    return args


def join_conditions(parser, args):
    """A ConditionArgs for each --bps, none for --bps none."""
    if NONE in args.bps:
        if len(args.bps) > 1:
            parser.error("--bps none can't be combined with files.")
        for name in ("cond", "strength", "window", "mask"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} needs a --bps FILE, got none. train.py writes one for this "
                             f"base.")
        return []
    if len(args.window) % 2:
        parser.error(f"--window must be pairs of START END, got {len(args.window)} numbers.")
    if len(args.bps) > 1 and not args.cond:
        parser.error("--cond is missing. Give one per --bps.")
    windows = list(zip(args.window[::2], args.window[1::2]))
    for start, end in windows:
        if start >= end:
            parser.error(f"--window must have START < END, got {start:g} {end:g}.")
    masks = [None if mask == NONE else mask for mask in args.mask or [NONE]]
    columns = dict(cond=args.cond or [DEFAULT_DRAWING], strength=args.strength, window=windows,
                   mask=masks)
    for name, values in columns.items():
        if len(values) not in (1, len(args.bps)):
            parser.error(f"--{name} must have one value, or one per --bps ({len(args.bps)}), got "
                         f"{len(values)}.")
        columns[name] = values * len(args.bps) if len(values) == 1 else values
    return [ConditionArgs(*row) for row in zip(args.bps, *columns.values())]


def list_jobs(condition_args, prompt):
    """One Job, or if conditions are folders a Job for each name in them."""
    folders, captions = {}, {}
    for folder in dict.fromkeys(c.cond for c in condition_args if c.cond.is_dir()):
        folders[folder], texts, problems = list_files(folder)
        if problems or not folders[folder]:
            raise UserError(*problems[:1] or [f"--cond {folder} has no images."])
        captions = texts | captions                     # those of the first folder win
    if not folders:
        return [Job("", condition_args, prompt)]
    first, *rest = folders
    for name in folders[first]:
        if len(os.fsencode(name)) > MAX_NAME:
            raise UserError(f"--cond {first}: names must have at most {MAX_NAME} bytes, got "
                            f"{name}.")
    for folder in rest:
        if unmatched := sorted(folders[folder].keys() ^ folders[first].keys()):
            raise UserError(f"--cond {folder} and {first} must have the same names, but only one "
                            f"has {unmatched[0]}.")
    jobs = []
    for name in folders[first]:
        own_args = [c._replace(cond=folders.get(c.cond, {}).get(name, c.cond))
                    for c in condition_args]
        own_prompts, _ = read_captions(captions.get(name, []))
        own_prompt = own_prompts[0] if own_prompts else prompt
        jobs.append(Job(f"{name.replace('/', '-')}-", own_args, own_prompt))
    return jobs


# ---- the script ----------------------------------------------------------------------------

def check_fit(bps, file, base):
    """Raise UserError if a BPS is broken, or was trained for a base of other sizes or another kind.

    SD 1 and SD 2 differ only in the width of their text states. A fine-tune of the same sizes
    fits.
    """
    config, task, size = base.unet.config, bps.metadata.get("task"), bps.metadata.get("size")
    if task not in TASKS or not size or bps.config.cond_channels != TASKS[task].channels:
        raise UserError(f"{file} does not say what it was trained for. Use a file that train.py "
                        f"wrote.")
    if size**2 > MAX_PIXELS or size % bps.config.factor:
        raise UserError(f"{file}: size must be a multiple of {bps.config.factor} with at most "
                        f"{MAX_PIXELS:,} pixels, got {size}. Use a file that train.py wrote.")
    prediction_type = base.schedule.prediction_type
    for name, trained, given in (
            ("channels", bps.config.channels, config.channels),
            ("pixels per latent", bps.config.factor, base.vae.factor),
            ("blocks per level", bps.config.blocks_per_level, config.blocks_per_level),
            ("text width", bps.metadata.get("context_dim"), config.context_dim),
            ("prediction type", bps.metadata.get("prediction_type", prediction_type),
             prediction_type)):
        if trained != given:
            raise UserError(f"{file} was trained for {name} {trained}, but {base.path} has "
                            f"{given}. Use the --base it was trained on.")
    if not is_finite(bps):
        raise UserError(f"{file}: its weights are not finite. Train it again.")


def picture_size(size, metadata, base):
    """(width, height) in pixels: `size` if given, else as the BPS or the base was trained."""
    # a single file doesn't store its size: SD 2.x with v was trained at 768 px, all others at 512
    at_768 = (base.unet.config.context_dim == 1024
              and base.schedule.prediction_type == "v_prediction")
    side = (base.unet.config.sample_size or (96 if at_768 else 64)) * base.vae.factor
    width, height = size or (metadata[0]["size"] if metadata else side,) * 2
    check_pixels(width, height)
    if width % base.vae.factor or height % base.vae.factor:
        raise UserError(f"--size must be multiples of {base.vae.factor} for this base, got "
                        f"{width}x{height}.")
    return width, height


def note_unlearned(prompts, size, base):
    """Print a note for words that the embedded base's tokenizer splits, and for another size."""
    words = dict.fromkeys(re.findall(r"\w+", " ".join(prompts)))
    unknown = [word for word in words if len(base.tokenizer.bpe.encode(word)) > 1]     # in pieces
    if unknown:
        print(f"note: the embedded base draws portraits and does not know "
              f"{', '.join(unknown[:8])}. tiny/README.md lists its words.", file=sys.stderr)
    side = base.unet.config.sample_size * base.vae.factor
    if size != (side, side):
        print(f"note: the embedded base was trained at {side}x{side} only.", file=sys.stderr)


def read_conditions(job, networks, size, base, timesteps, device):
    """The Conditions of a job; UserError if one steers at none of the timesteps."""
    conditions = []
    for c in job.condition_args:
        bps = networks[c.bps]
        if c.cond == DEFAULT_DRAWING and bps.metadata["task"] != "sketch":
            raise UserError(f"--cond is missing. {c.bps} was trained for {bps.metadata['task']}.")
        cond = read_condition(c.cond, bps.metadata["task"], *size, bps.metadata.get("classes"))
        mask = c.mask and read_mask(c.mask, *size, base.vae.factor).to(device)
        condition = Condition(bps, cond[None], c.strength, c.window, mask)
        if not condition.is_off and not any(map(condition.is_active, timesteps)):
            raise UserError("--window must contain a step, got {:g} {:g}. Widen it, or raise "
                            "--steps or, with --init, --denoise.".format(*c.window))
        conditions.append(condition)
    return conditions


def draw_job(job, conditions, pictures, args, base, size, init):
    """Draw the pictures {file: PNG fields} of a job, and write each group when it is done."""
    print(f"prompt: {job.prompt}")
    for i, (c, condition) in enumerate(zip(job.condition_args, conditions), 1):
        number = i if len(conditions) > 1 else ""
        print(f"steered by {c.bps} and {c.cond}, which the network sees as", end=" ")
        write_new(to_image(cond_to_x(condition.cond)[0]),
                  args.out / f"{job.name}condition{number}.png")
    context, empty = base.encode([job.prompt, args.negative_prompt]).split(1)
    sampling = diffusion.Sampling(args.sampler, args.steps, args.guidance)
    files, count = list(pictures), args.batch * math.ceil(SIDE_BY_SIDE / args.batch)
    for i in range(0, len(files), count):
        group = files[i:i + count]
        seeds = [pictures[file]["seed"] for file in group]
        x = draw(base, context, empty, seeds, size, sampling, conditions, args.batch, init)
        check_pictures(x)
        for file, picture in zip(group, x):
            write_new(to_image(picture), file, pictures[file])


def main():
    """Load networks and read conditions, then draw --n pictures of each job."""
    args = parse_args(sys.argv[1:])
    dtype = DTYPES[args.dtype]
    networks = {c.bps: load_bps(c.bps, dtype, args.device) for c in args.condition_args}
    base = load_base(args.base, args.tokenizer, args.device, dtype, args.vae, args.prediction_type)
    base.check_finite()
    for file, bps in networks.items():
        check_fit(bps, file, base)
    size = picture_size(args.size, [bps.metadata for bps in networks.values()], base)
    init = None
    if args.start:                      # a --denoise of 1 starts from noise alone
        x = to_x(crop(open_image(args.init), *size))[None].to(args.device)
        init = base.vae.encode(x).mean, args.start
    jobs = list_jobs(args.condition_args, args.prompt)
    if is_embedded(args.base):
        note_unlearned([args.negative_prompt, *(job.prompt for job in jobs)], size, base)
    timesteps, _ = diffusion.sampler_steps(args.steps, base.schedule, args.sampler)
    conditions_of = functools.partial(read_conditions, networks=networks, size=size, base=base,
                                      timesteps=timesteps[args.start:], device=args.device)
    for job in jobs:                    # all first, so that an unreadable one costs no drawing
        conditions_of(job)
    hash_once = functools.cache(fingerprint)            # of a base it takes seconds
    note_changes(args, fingerprints(args, jobs[0].condition_args, hash_once), networks)
    args.out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        files = fingerprints(args, job.condition_args, hash_once)
        fields = [png_fields(args, job, seed, size, files, base)
                  for seed in range(args.seed, args.seed + args.n)]
        pictures = {args.out / f"{job.name}{png['seed']:04d}.png": png for png in fields}
        if not args.picture:
            pictures = without_drawn(pictures)
        if pictures:
            draw_job(job, conditions_of(job), pictures, args, base, size, init)


if __name__ == "__main__":
    run_script(main)
