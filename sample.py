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
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import PngImagePlugin
from tqdm import tqdm

import diffusion
from bps import load_bps
from inputs.options import check_pixels, run
from clip import load_clip
from inputs.conditions import (
    TASKS,
    UserError,
    crop,
    open_image,
    read_condition,
    to_image,
    to_x,
)
from inputs.checkpoints import find_unet, read_text, read_vae
from inputs.pairs import Source
from inputs.sample_options import DEFAULT_DRAWING, DTYPES, command_words, files_of, parse_args
from steer import Steering, draw_noise, make_denoiser, room_for_maps
from unet import load_unet
from vae import load_vae
from weights import UserError, fingerprint


class StableDiffusion(NamedTuple):
    """A loaded base: the frozen networks, and the files' noise schedule."""
    unet: UNet
    vae: AutoencoderKL
    tokenizer: Tokenizer
    text_model: CLIPTextModel
    schedule: diffusion.NoiseSchedule

    def encode(self, prompts, clip_skip=1):
        """Returns text states (B, L, D) of a list of prompts."""
        device = next(self.text_model.parameters()).device
        return torch.cat([self.text_model(self.tokenizer(prompts[i:i + PROMPTS_AT_A_TIME]).to(device),
                                          clip_skip)
                          for i in range(0, len(prompts), PROMPTS_AT_A_TIME)])


def load_base(path, tokenizer_path=None, device="cpu", dtype=torch.float32, vae_path=None,
              prediction_type=None):
    """Returns the StableDiffusion of an SD folder or single file.

    What a single file lacks comes from tokenizer_path, vae_path and prediction_type. The
    autoencoder is float32 whatever the dtype. Errors: UserError names the file and what is
    missing or does not fit.
    """
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"{path}: no model_index.json in it; a base is a Stable Diffusion "
                        f"folder with one, or a .safetensors file")
    schedule = checkpoints.load_schedule(path, prediction_type)
    tokenizer, text_model = load_clip(path, tokenizer_path, dtype, device)
    vae = load_vae(vae_path or path, device=device)
    unet = load_unet(path, dtype, device)
    for what, own, other in (
            ("text states of width", text_model.config.width, unet.config.context_dim),
            ("latents of channels", vae.config.latent_channels, unet.config.latent_channels)):
        if own != other:
            raise UserError(f"{path}: {what} {own}, but its U-Net takes {other}; the parts are "
                            f"of different models")
    unet, vae = (module.to(memory_format=torch.channels_last) for module in (unet, vae))
    return StableDiffusion(unet, vae, tokenizer, text_model, schedule)


def draw(base, context, context_empty, seeds, size, steps, guidance_scale, conditions=()):
    """Returns pictures x (B, 3, size, size), one per text state and seed, drawn as one batch.

    context: (B, L, D). context_empty: (1, L, D). seeds: B integers. conditions: Steerings of B
    conditions each.
    """
    timesteps, _ = diffusion.levels(steps, base.schedule)
    denoise = make_denoiser(base.unet, context, context_empty, guidance_scale, conditions,
                            timesteps)
    side = size // base.vae.factor
    noise = diffusion.draw_noise(seeds, (base.unet.config.latent_channels, side, side))
    for z in tqdm(diffusion.sample(denoise, noise.to(context.device), base.schedule, steps),
                  total=steps, leave=False, desc="draw with BPS" if conditions else "draw"):
        pass
    return torch.cat([base.vae.decode(part) for part in z.split(images_at_a_time(size))])


# ---- what is drawn, and what with ----------------------------------------------------------

def check_fit(bps, bps_file, unet, vae, prediction_type, base):
    """Raises UserError where the BPS was trained for a base of other sizes or another kind.

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
            raise UserError(f"{bps_file}: for a base of {name} {trained}, but {base} has {own}; "
                               f"give the --base it was trained on")
    task = bps.metadata.get("task")
    if task not in TASKS or "size" not in bps.metadata:
        raise UserError(f"{bps_file}: does not say what it was trained for; give a file that "
                           f"train.py wrote")
    if bps.config.cond_channels != TASKS[task].channels:
        raise UserError(f"{bps_file}: takes conditions of {bps.config.cond_channels} channels, "
                           f"but those of its task, {task}, have {TASKS[task].channels}")


def picture_size(wanted, bps, unet, vae, schedule):
    """Returns (width, height) in pixels: as wanted, else what BPS or the base was trained with.

    Errors: UserError where a side is not a multiple of the autoencoder's factor.
    """
    # a single file does not say it: SD 2.x predicts v at 768 px, all others are for 512 px
    at_768 = unet.config.context_dim == 1024 and schedule.prediction_type == "v_prediction"
    side = (unet.config.sample_size or (96 if at_768 else 64)) * vae.factor
    width, height = wanted or (bps.metadata["size"] if bps else side,) * 2
    check_pixels(width, height)
    if width % vae.factor or height % vae.factor:
        raise UserError(f"--size {width}x{height}: this base takes multiples of {vae.factor}")
    return width, height


def default_condition(condition, bps):
    """Returns the Condition with the drawing that comes with the project, where it has none."""
    if condition.cond:
        return condition
    if bps.metadata["task"] != "sketch":
        raise UserError(f"{condition.bps}: trained for {bps.metadata['task']}; give --cond, what "
                        f"it is to follow")
    return condition._replace(cond=DEFAULT_DRAWING)


class Job(NamedTuple):
    """A prompt and its conditions; name is what the files of its pictures begin with."""
    name: str
    conditions: list
    prompt: str


def list_jobs(conditions, prompt):
    """Returns the Jobs: one, or where conditions are folders one for each name in them.

    Errors: UserError where folders don't have the same names.
    """
    folders = {condition.cond: Source(condition.cond) for condition in conditions
               if condition.cond.is_dir()}
    if not folders:
        return [Job("", conditions, prompt)]
    files = {}
    for folder, source in folders.items():
        files[folder], problems = source.images()
        if problems or not files[folder]:
            raise UserError(problems[0] if problems else f"--cond {folder}: no image in it")
    (first, source), jobs = next(iter(folders.items())), []
    for folder, names in files.items():
        for stem in sorted(names.keys() ^ files[first].keys()):
            raise UserError(f"--cond {folder} and {first}: only one of them has {stem}; folders "
                            f"of conditions are joined by name")
    for stem, name in files[first].items():
        own = [condition._replace(cond=condition.cond / files[condition.cond][stem])
               if condition.cond in files else condition for condition in conditions]
        jobs.append(Job(f"{stem}-", own, (*source.captions(name), prompt)[0]))
    return jobs


# ---- pictures, and what they remember ------------------------------------------------------

def fingerprints(args, conditions, fingerprint_of):
    """Returns {role: fingerprint} of the files that a picture depends on.

    fingerprint_of: weights.fingerprint, or a version that remembers. Errors: UserError where a
    --from picture was drawn with another one.
    """
    paths = files_of(argparse.Namespace(**vars(args) | dict(conditions=conditions)))
    readers = dict(base=find_unet, vae=lambda path: [read_vae(path).file],
                   text=lambda path: [read_text(path).file])
    found = {role: fingerprint_of(*readers.get(role, lambda path: [path])(path))
             for role, path in paths.items()}
    for role, then in args.drawn_with.items():
        if found[role] != then:
            raise UserError(f"{paths[role]}: not the file that {args.picture} was drawn with: its "
                            f"fingerprint is {found[role]}, not {then}; give the right one by "
                            f"--{'base' if role == 'text' else role.split()[0]}")
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
        temporary = file.with_suffix(".tmp")
        to_image(x).save(temporary, "PNG", pnginfo=info)
        temporary.replace(file)
        print(file)


def main():
    """Draws --n pictures of each job."""
    args = parse_args(__doc__)
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
        raise UserError(f"--clip-skip {args.clip_skip}: allowed are 1 to {layers}")
    jobs = list_jobs(conditions, args.prompt)
    uses = Counter(condition for job in jobs for condition in job.conditions)
    read = {c: read_condition(c.cond, networks[c.bps].metadata["task"], width, height,
                              networks[c.bps].metadata.get("classes")) for c in uses}
    z_init = None
    if args.init:
        x = to_x(crop(open_image(args.init), width, height))[None].to(args.device)
        with torch.inference_mode():
            z_init = vae.encode(x).mean
    once = functools.cache(fingerprint)                 # of a base it takes seconds
    files = [fingerprints(args, job.conditions, once) for job in jobs]
    for file, bps in networks.items():
        if files[0]["base"] != bps.metadata.get("base"):
            print(f"note: {file} was trained on other weights than {args.base}; it fits, but may "
                  f"follow the condition less", file=sys.stderr)
    # the maps of a condition are only kept where another job draws with it, and memory allows
    room = room_for_maps(args.device) // max(1, sum(n > 1 for n in uses.values()))
    steerings = {c: Steering(networks[c.bps], unet, cond[None], c.scale, c.strength, c.window,
                             room if uses[c] > 1 else 0) for c, (cond, _) in read.items()}
    args.out.mkdir(parents=True, exist_ok=True)         # before the work, should it not be possible
    for job, used in zip(jobs, files):
        print(f"prompt: {job.prompt}")
        facts = dict(prompt=job.prompt, negative_prompt=args.negative_prompt,
                     size=f"{width}x{height}", sampler=args.sampler, steps=args.steps,
                     guidance=args.guidance, clip_skip=args.clip_skip, dtype=args.dtype,
                     prediction_type=schedule.prediction_type)
        pictures = draw(job, [steerings[c] for c in job.conditions], args, base, z_init, width,
                        height)
        seeds = range(args.seed, args.seed + args.n)
        texts = [facts | dict(seed=seed, device=args.device, torch=torch.__version__,
                              command=shlex.join(command_words(args, facts | dict(seed=seed),
                                                               job.conditions)),
                              files=json.dumps(used)) for seed in seeds]
        write_pictures(job.name, pictures, seeds, texts, [read[c][1] for c in job.conditions],
                       args.out)


@torch.inference_mode()
def draw(job, steerings, args, base, z_init, width, height):
    """Returns pictures x, a list of --n (3, height, width), of a job.

    z_init: the latent of --init, or None. Errors: UserError where --dtype is too narrow.
    """
    unet, vae, tokenizer, text_model, schedule = base
    timesteps, signal_and_noise = diffusion.levels(args.steps, schedule, args.sampler)
    ids = tokenizer([job.prompt, args.negative_prompt]).to(args.device)
    context, empty = text_model(ids, args.clip_skip).split(1)
    shape = (unet.config.latent_channels, height // vae.factor, width // vae.factor)
    starts = [draw_noise([seed], shape).to(args.device)
              for seed in range(args.seed, args.seed + args.n)]
    if args.start:
        a, s = signal_and_noise[args.start]
        starts = [a * z_init + s * noise for noise in starts]
    denoise = make_denoiser(unet, context, empty, args.guidance, steerings, timesteps[args.start:])
    # One sampler a seed, not one batch, so that a picture is the same to the bit whatever --n is;
    # they go in step, so that BPS runs once a timestep for all of them.
    samplers = [diffusion.sample(denoise, z_t, schedule, args.steps, args.sampler, args.start)
                for z_t in starts]
    for latents in tqdm(zip(*samplers), total=args.steps - args.start, desc="draw", leave=False):
        pass
    for steering in steerings:
        steering.forget_last()
    if not all(z.isfinite().all() for z in latents):
        remedy = ("a --guidance, --strength or --scale nearer to 1" if args.dtype == "fp32" else
                  "--dtype bf16 or fp32")
        raise UserError(f"--dtype {args.dtype}: too narrow for {args.base}, its numbers ran "
                           f"over; give {remedy}")
    return [vae.decode(z)[0] for z in latents]


if __name__ == "__main__":
    run(main)
