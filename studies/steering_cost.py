"""What steering costs: the time of steered pictures relative to unsteered ones of the same prompt.

    python -m studies.steering_cost                 # embedded base, and SD 1.5's sizes: 15 minutes

naive is how the authors' code runs: BPS in every call of the U-Net, for both halves of guidance.
amortised is how sample.py runs: once a timestep and condition, for all pictures. BPS has random
weights; at SD 1.5's sizes so has the U-Net, and one step of 512 px, timed once, stands for all of
them. On the embedded base times are medians of seven, taken in turns. Only the steps are timed, not
the text encoder and the autoencoder.
"""
import itertools
import statistics
import time

import torch

import diffusion
from bps import BPS, FEET, config_for
from inputs.options import BASE, Parser, run
from steer import Steering, draw_noise, make_denoiser
from unet import UNet, UNetConfig, load_unet

PICTURES = (1, 4, 16)
SIZES = {"embedded base": dict(steps=10, repeat=7), "SD 1.5": dict(steps=1, repeat=1)}
GUIDANCE = 3.0


class NaiveSteering(Steering):
    """A Steering that never remembers, and runs BPS for each half of guidance."""

    def __call__(self, t, halves=1):
        """Returns the residuals of batch `halves`."""
        ts = torch.full((halves,), t, device=self.cond.device)
        return self.bps(self.cond.expand(halves, -1, -1, -1), self.unet.time_embedding(ts))


def networks(size, device):
    """Returns (unet, {foot: BPS}, f) of a name in SIZES."""
    torch.manual_seed(0)
    unet, factor = (load_unet(BASE), 4) if size == "embedded base" else (UNet(UNetConfig()), 8)
    feet = {foot: BPS(config_for(unet.config, 1, factor, foot=foot)) for foot in FEET}
    unet, *bps = (module.to(device, memory_format=torch.channels_last).requires_grad_(False)
                  for module in (unet, *feet.values()))
    return unet, dict(zip(feet, bps)), factor


def seconds(unet, steering, pictures, steps):
    """Returns the time that the steps of some pictures take, in step as sample.py draws them."""
    config, device = unet.config, next(unet.parameters()).device
    side = config.sample_size or 64
    context = torch.zeros(1, 77, config.context_dim, device=device)
    noise = draw_noise(range(pictures), (config.latent_channels, side, side)).to(device)
    denoise = make_denoiser(unet, context, context, GUIDANCE, [steering] if steering else [])
    started = time.perf_counter()
    for _ in zip(*(diffusion.sample(denoise, z_t[None], diffusion.NoiseSchedule(), steps)
                   for z_t in noise)):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def table(size, steps, repeat, device):
    """Prints the rows of a size."""
    unet, feet, factor = networks(size, device)
    side = factor * (unet.config.sample_size or 64)
    cond = torch.rand(1, 1, side, side, device=device)
    seconds(unet, NaiveSteering(feet[FEET[0]], unet, cond), 1, steps)      # warms up
    for foot, bps in feet.items():
        for pictures in PICTURES if foot == FEET[0] else PICTURES[:1]:
            times = {"unsteered": [], "naive": [], "amortised": []}
            for _, (way, found) in itertools.product(range(repeat), times.items()):
                kind = dict(naive=NaiveSteering, amortised=Steering).get(way)
                found.append(seconds(unet, kind and kind(bps, unet, cond), pictures, steps))
            plain, naive, amortised = map(statistics.median, times.values())
            print(f"| {size} | {foot} | {pictures} | {plain:.2f} | {naive:.2f} | "
                  f"{naive / plain:.2f} | {amortised:.2f} | {amortised / plain:.2f} |", flush=True)


def main():
    """Prints the table."""
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=SIZES, help="one size")
    parser.add_device()
    args = parser.parse_args()
    print("| networks | BPS | pictures | unsteered s | naive s | ratio | amortised s | ratio |\n"
          + "|---" * 8 + "|")
    for size, options in SIZES.items():
        if args.only in (None, size):
            table(size, **options, device=args.device)


if __name__ == "__main__":
    run(main)
