"""Prints the shapes of one drawing and of one training step, on the embedded base.

    python -m studies.walkthrough           # docs/walkthrough.md explains what it prints
"""
import re

import torch
import torch.nn.functional as F

from bps import BPS, Condition, config_for, load_bps, make_denoiser
from data import LatentCache, load_pairs
from diffusion import Sampling, draw_noise, sample, sampler_steps
from inputs.conditions import read_condition
from inputs.options import BASE, DEFAULT_BPS, DEFAULT_DRAWING, Parser, run_script
from sample import DEFAULT_PROMPT, load_base
from studies.wiring import port_table
from tiny import world

SHOWN_STEPS = (1, 2, 10, 20)


def show(name, tensor, note=""):
    """Print a tensor's shape and range."""
    shape = str(tuple(tensor.shape))
    print(f"  {name:<28}{shape:<20}{tensor.min():>7.2f} to {tensor.max():<7.2f}{note}".rstrip())


def show_maps(base, bps, cond, t):
    """Print the map of each block of the U-Net."""
    t_emb = base.unet.time_embedding(torch.tensor([t]))
    show("t_emb", t_emb, "the frozen U-Net's own")
    show("cond, unshuffled", F.pixel_unshuffle(cond, bps.config.factor), "what BPS begins with")
    residuals = bps(cond, t_emb)
    rows = port_table(bps, cond.shape[-1] // bps.config.factor)
    for (name, *_), residual in zip(rows, residuals, strict=True):
        if residual is None:
            print(f"  map of {name:<21}none")
        else:
            show(f"map of {name}", residual)


@torch.inference_mode()
def show_drawing(base, bps):
    """Print what happens when BPS draws a picture from a drawing."""
    print("1. What is given")
    cond = read_condition(DEFAULT_DRAWING, "sketch", world.SIZE, world.SIZE)[None]
    show("cond", cond, "tiny/drawing.png: 1 is ink")
    context, empty = base.encode([DEFAULT_PROMPT, ""]).split(1)
    show("context", context, "states of 77 tokens")
    noise = draw_noise([0], (4, *2 * [world.SIZE // base.vae.factor]))
    show("z_t", noise, "the noise of seed 0")
    print("2. The maps of BPS at t = 500")
    show_maps(base, bps, cond, 500)
    sampler, steps, guidance_scale = Sampling()
    print(f"3. {steps} steps of {sampler}, guidance {guidance_scale:g}")
    timesteps, _ = sampler_steps(steps, base.schedule, sampler)
    denoise = make_denoiser(base.unet, context, empty, guidance_scale, [Condition(bps, cond)])
    for step, z_t in enumerate(sample(denoise, noise, base.schedule, steps, sampler), 1):
        if step in SHOWN_STEPS:
            show(f"z_t after step {step}", z_t, f"the step from t = {timesteps[step - 1]}")
    show("x", base.vae.decode(z_t), "the picture")


def show_training_step(base):
    """Print what happens in the first step of a training."""
    print("4. The first step of a training, batch 2")
    cache = LatentCache(load_pairs("sketch", "val")[:2], "sketch", world.SIZE, base)
    torch.manual_seed(0)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    generator = torch.Generator().manual_seed(0)
    cond, z, context = cache.batch(torch.arange(2), 2, generator)
    t, noise = torch.tensor([200, 700]), torch.randn(z.shape, generator=generator)
    z_t = base.schedule.add_noise(z, noise, t)
    show("cond", cond)
    show("z", z, "latents of two true pictures")
    show("noise", noise, "what is to be predicted")
    show("z_t", z_t, "alpha_t z + sigma_t noise, t = 200 and 700")
    residuals = bps(cond, base.unet.time_embedding(t))
    eps = base.unet(z_t, t, context, residuals)
    F.mse_loss(eps, noise).backward()
    largest = max(r.abs().max().item() for r in residuals if r is not None)
    print(f"  largest value of any map: {largest:g}, so eps is the frozen base's")
    gradients = {name: parameter.grad for name, parameter in bps.named_parameters()
                 if parameter.grad is not None}
    moved = [name for name, gradient in gradients.items() if gradient.any()]
    are_ports = all(re.match(r"zero_blocks\.|output_blocks\.\d+\.1\.", name) for name in moved)
    print(f"  tensors with a gradient: {len(moved)} of {len(gradients)}, all of them ports': "
          f"{are_ports}")
    untouched = all(p.grad is None for p in base.unet.parameters())
    print(f"  the frozen U-Net has none: {untouched}")


def main():
    """Print all of it."""
    Parser(__doc__).parse_args()
    base = load_base(BASE)
    show_drawing(base, load_bps(DEFAULT_BPS))
    show_training_step(base)


if __name__ == "__main__":
    run_script(main)
