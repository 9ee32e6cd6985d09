"""Draws pictures: by the frozen base alone, or steered by one or several conditions.

    python sample.py --cond drawing.png --prompt "a red apple" --n 4
    python sample.py --base SD --prompt "a red apple" --negative-prompt "a bowl" --size 768x512
    python sample.py --bps A B --cond a.png b.png --strength 0.7 1 --window 0 0.5 0 1
    python sample.py --bps A A --cond a.png b.png --mask left.png right.png
    python sample.py --from pictures/0000.png

Without arguments it draws from a drawing and a BPS file that come with the project; with --base
alone it is a plain Stable Diffusion sampler. Of --cond, --scale, --strength, --window and --mask
give one for all --bps, or one for each. A condition may have any size, a drawing either polarity;
--cond FOLDER draws from each image in it, with NAME.txt as its prompt if that is there. Picture i
depends on seed + i alone, not on --n; --batch changes its last bits. Each PNG holds the options
that draw it, for --from.

Shapes: B batch, L tokens, D width, H W rows and columns of the picture.
"""
import contextlib
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import diffusion
from bps import Steering, load_bps, make_denoiser
from clip import CLIPTextModel, Tokenizer, load_clip
from inputs import checkpoints
from inputs.conditions import (
    crop,
    images_at_a_time,
    open_image,
    read_condition,
    read_mask,
    to_x,
)
from inputs.options import DTYPES, run
from inputs.pictures import describe, is_drawn, write_pictures
from inputs.sample_options import (
    check_clip_skip,
    check_drawn_with,
    check_fit,
    default_condition,
    fingerprints,
    list_jobs,
    parse_args,
    picture_size,
)
from unet import UNet, load_unet
from vae import AutoencoderKL, load_vae
from weights import UserError, fingerprint, is_finite

PROMPTS_AT_A_TIME = 16
FAR_OUTSIDE = 10                # mean of |x| or |z|, which is about 1 at most


class StableDiffusion(NamedTuple):
    """A loaded base: the frozen networks, and their noise schedule."""
    unet: UNet
    vae: AutoencoderKL
    tokenizer: Tokenizer
    text_model: CLIPTextModel
    schedule: diffusion.NoiseSchedule
    path: Path                  # where it was loaded from, for messages
    vae_path: Path

    def encode(self, prompts, clip_skip=1):
        """Returns text states (B, L, D) of a list of prompts."""
        device = next(self.text_model.parameters()).device
        parts = [prompts[i:i + PROMPTS_AT_A_TIME]
                 for i in range(0, len(prompts), PROMPTS_AT_A_TIME)]
        return torch.cat([self.text_model(self.tokenizer(part).to(device), clip_skip)
                          for part in tqdm(parts, desc="text states", delay=2, leave=False)])

    def autocast(self):
        """Returns the context in which networks of fp32 weights compute in the base's dtype."""
        weight = next(self.unet.parameters())
        if weight.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(weight.device.type, weight.dtype)

    def check_finite(self):
        """Raises UserError if weights of a network are not finite."""
        for part, module, file in (("U-Net", self.unet, self.path),
                                   ("text encoder", self.text_model, self.path),
                                   ("autoencoder", self.vae, self.vae_path)):
            if not is_finite(module):
                raise UserError(f"{file}: the weights of its {part} hold numbers that are not "
                                f"finite; get another copy of it")


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
    for what, given, taken in (
            ("text states of width {}", text_model.config.width, unet.config.context_dim),
            ("latents of {} channels", vae.config.latent_channels, unet.config.latent_channels)):
        if given != taken:
            raise UserError(f"{path}: {what.format(given)}, but its U-Net takes {taken}; the parts "
                            f"are of different models")
    unet, vae = (module.to(memory_format=torch.channels_last) for module in (unet, vae))
    return StableDiffusion(unet, vae, tokenizer, text_model, schedule, path, vae_path or path)


def draw(base, context, context_empty, seeds, size, sampling=diffusion.Sampling(), conditions=()):
    """Returns pictures x (B, 3, size, size), one per text state and seed, drawn as one batch.

    context: (B, L, D). context_empty: (1, L, D). seeds: B integers. conditions: Steerings, of
    B conditions each or of one for all.
    """
    sampler, steps, guidance_scale = sampling
    timesteps, _ = diffusion.sampler_steps(steps, base.schedule, sampler)
    denoise = make_denoiser(base.unet, context, context_empty, guidance_scale, conditions,
                            timesteps)
    side = size // base.vae.factor
    noise = diffusion.draw_noise(seeds, (base.unet.config.latent_channels, side, side))
    noise = noise.to(context.device)
    for z in tqdm(diffusion.sample(denoise, noise, base.schedule, steps, sampler), total=steps,
                  leave=False, desc="draw with BPS" if conditions else "draw"):
        pass
    return torch.cat([base.vae.decode(part) for part in z.split(images_at_a_time(size))])


@torch.inference_mode()
def draw_job(job, steerings, args, base, z_init, size, on_step=None):
    """Returns pictures x, a list of --n (3, H, W), of a job; size is (width, height).

    z_init: the latent of --init, or None. on_step() is called after each step; what it raises ends
    the drawing. Errors: UserError if a picture is not finite; it says whether the weights,
    --dtype or the options are to blame.
    """
    timesteps, alphas_sigmas = diffusion.sampler_steps(args.steps, base.schedule, args.sampler)
    context, empty = base.encode([job.prompt, args.negative_prompt], args.clip_skip).split(1)
    width, height = (side // base.vae.factor for side in size)
    samplers = []
    # With --batch 1 each seed has a sampler, so that a picture is the same to the bit whatever --n
    # is. Samplers go side by side, so that BPS runs once per timestep for all of them.
    for seeds in torch.arange(args.seed, args.seed + args.n).split(args.batch):
        z_t = diffusion.draw_noise(seeds.tolist(),
                                   (base.unet.config.latent_channels, height, width))
        z_t = z_t.to(args.device)
        if args.start:
            alpha, sigma = alphas_sigmas[args.start]
            z_t = alpha * z_init + sigma * z_t
        denoise = make_denoiser(base.unet, context.expand(len(seeds), -1, -1), empty,
                                args.guidance, steerings, timesteps[args.start:])
        samplers.append(diffusion.sample(denoise, z_t, base.schedule, args.steps, args.sampler,
                                         args.start))
    for latents in tqdm(zip(*samplers), total=args.steps - args.start, desc="draw", leave=False):
        if on_step:
            on_step()
    latents = torch.cat(latents).split(1)
    pictures = [base.vae.decode(z)[0] for z in tqdm(latents, desc="decode", leave=False)]
    if not all(x.abs().mean() < FAR_OUTSIDE for x in pictures):         # NaN is not less either
        refuse_pictures(latents, job, steerings, args, base)
    return pictures


def refuse_pictures(latents, job, steerings, args, base):
    """Raises UserError, which says why the pictures of latents z, each (1, 4, h, w), overflowed."""
    base.check_finite()
    for condition, steering in zip(job.conditions, steerings):
        if not is_finite(steering.bps):
            raise UserError(f"{condition.bps}: its weights hold numbers that are not finite; "
                            f"train it again, or get another copy of it")
    if all(z.abs().mean() < FAR_OUTSIDE for z in latents):
        raise UserError(f"{base.vae_path}: the numbers of its autoencoder overflowed; "
                        f"give another --vae")
    remedy = ("a --guidance, --strength or --scale nearer to 1, or another --base"
              if args.dtype == "fp32" else "--dtype bf16 or fp32")
    raise UserError(f"--dtype {args.dtype}: the numbers of {args.base} overflowed; give {remedy}")


# ---- the script ----------------------------------------------------------------------------

def main():
    """Draws --n pictures of each job."""
    args = parse_args(__doc__)
    dtype = DTYPES[args.dtype]
    networks = {file: load_bps(file, dtype, args.device)
                for file in dict.fromkeys(condition.bps for condition in args.conditions)}
    base = load_base(args.base, args.tokenizer, args.device, dtype, args.vae, args.prediction_type)
    for file, bps in networks.items():
        check_fit(bps, file, base)
    args.conditions = [default_condition(c, networks[c.bps].metadata) for c in args.conditions]
    check_clip_skip(args.clip_skip, base.text_model)
    size = picture_size(args, [bps.metadata for bps in networks.values()], base)
    masks = {c.mask: read_mask(c.mask, *size, base.vae.factor).to(args.device)
             for c in args.conditions if c.mask}
    jobs = list_jobs(args.conditions, args.prompt)

    def read(condition):
        """Returns (cond, picture of it) of a Condition."""
        metadata = networks[condition.bps].metadata
        return read_condition(condition.cond, metadata["task"], *size, metadata.get("classes"))

    for job in jobs:                    # before the work, should one not be readable
        for condition in job.conditions:
            read(condition)
    if len(jobs) > 1:
        print(f"{len(jobs)} conditions, {args.n} pictures each")
    z_init = None
    if args.init:
        with torch.inference_mode():
            x = to_x(crop(open_image(args.init), *size))[None].to(args.device)
            z_init = base.vae.encode(x).mean
    fingerprint_once = functools.cache(fingerprint)     # of a base it takes seconds
    files = [fingerprints(args, job.conditions, fingerprint_once) for job in jobs]
    check_drawn_with(args, files[0])
    for file, bps in networks.items():
        if files[0]["base"] != bps.metadata.get("base"):
            print(f"note: {file} was trained on other weights than {args.base}; it fits, but may "
                  f"follow the condition less", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)         # before the work, should it not be possible
    seeds = range(args.seed, args.seed + args.n)
    for job, used in zip(jobs, files):
        texts = [describe(args, job, seed, size, used, base) for seed in seeds]
        if job.name and all(is_drawn(args.out / f"{job.name}{seed:04d}.png", text)
                            for seed, text in zip(seeds, texts)):
            print(f"{args.out / job.name}*: drawn before by this command")
            continue
        print(f"prompt: {job.prompt}")
        for condition in job.conditions:
            print(f"steered by {condition.bps} and {condition.cond} (--bps none draws without)")
        conds, images = zip(*map(read, job.conditions)) if job.conditions else ((), ())
        steerings = [Steering(networks[c.bps], base.unet, cond[None], c.scale, c.strength, c.window,
                              masks.get(c.mask)) for c, cond in zip(job.conditions, conds)]
        pictures = draw_job(job, steerings, args, base, z_init, size)
        write_pictures(job.name, pictures, seeds, texts, images, args.out)


if __name__ == "__main__":
    run(main)
