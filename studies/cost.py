"""What training and steering cost at SD 1.5's sizes, beside diffusers if it is installed.

    python -m studies.cost                      # two tables: about an hour on two cores
    python -m studies.cost --only training      # or steering

All weights are random. Times are medians of --repeat runs, in which the programs take turns. Each
measurement of memory runs in a process of its own. The comparison needs an environment with
diffusers, transformers and accelerate.

Training is one step on one picture: BPS and base forward, backward, AdamW. ControlNet is
diffusers'. Steering is one step of drawing with guidance in fp32, without text encoder and
autoencoder. sample.py runs BPS once per timestep for all pictures; "naive" is how the authors' code
runs, with BPS in every call of the U-Net for both passes of guidance. Ours draws each picture as a
batch of two, diffusers draws all of them in one batch.
"""
import importlib.util
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import nan

import numpy as np
import torch

import diffusion
from bps import Condition, build_bps, config_for, make_denoiser
from inputs.options import DTYPES, FEET, Parser, positive, run_script
from measure.report import peak_memory
from unet import UNet, UNetConfig

SIDE = 64                       # rows and columns of the latent: 512 px
PICTURES = (1, 4)               # how many are steered at once
PEER = "diffusers with ControlNet"
PEERS = ("diffusers", "transformers", "accelerate")
HAS_PEERS = all(map(importlib.util.find_spec, PEERS))


# ---- what is measured in a process of its own ----------------------------------------------

def in_a_process(function, *arguments):
    """What a function returns that runs in a new process, so its peak of memory is new."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def random_bps(unet, foot, device):
    """An untrained BPS for a U-Net and a condition of one channel."""
    bps = build_bps(config_for(unet.config, 1, 8, foot=foot))
    return bps.to(device, memory_format=torch.channels_last)


def with_controlnet(unet, controlnet):
    """prediction(z_t, t, context, cond) of diffusers' U-Net with its ControlNet."""
    def predict(z_t, t, context, cond):
        """eps (B, 4, H, W)."""
        down, middle = controlnet(z_t, t, context, cond, return_dict=False)
        return unet(z_t, t, context, down_block_additional_residuals=down,
                    mid_block_additional_residual=middle).sample

    return predict


def training_networks(program, checkpointing, dtype, device):
    """(trained network, prediction(z_t, t, context, cond)) at SD 1.5's sizes.

    program: a foot of BPS, or "controlnet".
    """
    if program == "controlnet":
        import diffusers
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        trained = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=1)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            trained.enable_gradient_checkpointing()
        predict = with_controlnet(unet.to(device, dtype).requires_grad_(False), trained)
    else:
        unet = UNet(UNetConfig()).to(device, dtype, memory_format=torch.channels_last)
        unet.requires_grad_(False)
        trained = random_bps(unet, program, device)
        unet.checkpointing = trained.checkpointing = checkpointing

        def predict(z_t, t, context, cond):
            """eps (B, 4, H, W)."""
            return unet(z_t, t, context, trained(cond, unet.time_embedding(t)))
    return trained.to(device).train(), predict


def measure_training(program, size, checkpointing, dtype, device, repeat):
    """(median seconds of a step, peak memory in GB) of a training on one picture."""
    torch.manual_seed(0)
    dtype = DTYPES[dtype]
    trained, predict = training_networks(program, checkpointing, dtype, device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)
    z_t = torch.randn(1, 4, size // 8, size // 8, device=device)
    noise, context = torch.randn_like(z_t), torch.randn(1, 77, 768, device=device)
    cond, t = torch.rand(1, 1, size, size, device=device), torch.tensor([500], device=device)

    def step():
        """Train on the picture once."""
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype != torch.float32):
            loss = (predict(z_t, t, context, cond).float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()                                                      # makes the optimizer's state
    return np.median([seconds(step, device) for _ in range(repeat)]), peak_memory(device)


# ---- tables --------------------------------------------------------------------------------

def medians(measures, repeat):
    """{name: median} of what functions without arguments return, called in turns."""
    results = {name: [] for name in measures}
    for name, measure in [*measures.items()] * repeat:
        results[name].append(measure())
    return {name: np.median(values, axis=0).tolist() for name, values in results.items()}


def seconds(call, device):
    """The time that a function without arguments takes."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        getattr(torch, device.split(":")[0]).synchronize()
    return time.perf_counter() - start


def print_row(*cells):
    """Print a row of a markdown table."""
    texts = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |", flush=True)


def print_head(*names):
    """Print the head of a markdown table."""
    print()
    print_row(*names)
    print("|---" * len(names) + "|")


class NaiveCondition(Condition):
    """A Condition that never keeps its maps, and makes them for both passes of guidance."""

    def __init__(self, bps, cond):
        super().__init__(bps, cond.expand(2, -1, -1, -1))

    def residuals(self, unet, t, batch_size):
        self.last_t = None
        return super().residuals(unet, t, batch_size)


def draw_latents(unet, make_condition, pictures, steps=1):
    """Draw latents with guidance, step by step side by side, as sample.py does."""
    device = next(unet.parameters()).device
    context = torch.zeros(1, 77, unet.config.context_dim, device=device)
    noise = diffusion.draw_noise(range(pictures), (4, SIDE, SIDE)).to(device)
    conditions = [make_condition()] if make_condition else []   # a new one, which has no maps yet
    denoise = make_denoiser(unet, context, context, 3.0, conditions)
    for _ in zip(*(diffusion.sample(denoise, z_t[None], diffusion.NoiseSchedule(), steps)
                   for z_t in noise)):
        pass


def peer_steps(pictures, device):
    """{name: function that predicts pictures with guidance} of diffusers, if it is installed."""
    if not HAS_PEERS:
        return {}
    import diffusers
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).to(device)
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=1).to(device)
    batch = 2 * pictures
    inputs = (torch.randn(batch, 4, SIDE, SIDE, device=device), torch.tensor(981, device=device),
              torch.randn(batch, 77, 768, device=device))
    cond = torch.rand(batch, 1, 8 * SIDE, 8 * SIDE, device=device)
    return {"diffusers": partial(unet, *inputs),
            PEER: partial(with_controlnet(unet, controlnet), *inputs, cond)}


@torch.inference_mode()
def steering_table(args):
    """Print what steering adds to a step of drawing."""
    unet = UNet(UNetConfig()).to(args.device, memory_format=torch.channels_last)
    cond = torch.rand(1, 1, 8 * SIDE, 8 * SIDE, device=args.device)
    ways = {"ours": None}
    for foot in FEET:
        bps = random_bps(unet, foot, args.device)
        ways[f"ours with BPS, {foot} foot"] = partial(Condition, bps, cond)
        ways[f"ours with BPS, {foot} foot, naive"] = partial(NaiveCondition, bps, cond)
    print_head("pictures, 512 px", "program", "s", "of the same unsteered", f"of {PEER}")
    for pictures in PICTURES:
        calls = {name: partial(draw_latents, unet, way, pictures) for name, way in ways.items()}
        calls |= peer_steps(pictures, args.device)
        for call in calls.values():
            call()                                              # warms up
        times = medians({name: partial(seconds, call, args.device)
                         for name, call in calls.items()}, args.repeat)
        for name, taken in times.items():
            print_row(pictures, name, taken, taken / times[name.split()[0]],
                      taken / times.get(PEER, nan))


def training_table(args):
    """Print seconds and memory of a training step, beside ControlNet if diffusers is installed."""
    print_head("training step, batch 1", "px", "base", "checkpointing", "s", "GB")
    programs = [*reversed(FEET), *(["controlnet"] if HAS_PEERS else [])]
    for size, dtype in ((256, "fp32"), (512, "bf16")):
        for checkpointing in (False, True):
            for program in programs:
                cost = in_a_process(measure_training, program, size, checkpointing, dtype,
                                    args.device, args.repeat)
                print_row(program, size, dtype, "on" if checkpointing else "off", *cost)


def main():
    """Print the tables."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--repeat", type=positive, default=5, help="runs of each program (default: %(default)s)")
    # steering makes this process big, and the peak of a child begins with that of its parent
    tables = dict(training=training_table, steering=steering_table)
    add("--only", choices=tables, help="print only one table (default: both)")
    parser.add_device()
    args = parser.parse_args()
    if not HAS_PEERS:
        print(f"Not all of {', '.join(PEERS)} are installed, so only our own figures are printed.")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for name, print_table in tables.items():
        if args.only in (None, name):
            print_table(args)


if __name__ == "__main__":
    run_script(main)
