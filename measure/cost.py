"""What loading, predicting and steering cost at SD 1.5's sizes, beside diffusers if installed.

    python -m measure.cost                  # six tables: over an hour on two cores
    python -m measure.cost --only training  # or load, forward, controlnet, steering, rounding

The base is made if it is missing: a folder and a single file of SD 1.5's sizes with random weights,
8.5 GB in all. Each measurement of memory runs in a process of its own. Files are in the page cache.
Times are medians of --repeat runs, in which the programs take turns; of seven for steering the
embedded base, of one at SD 1.5's sizes. The comparison needs an environment with diffusers,
transformers and accelerate.

Steering is timed relative to drawing the same pictures unsteered, without text encoder and
autoencoder. "naive" is how the authors' code runs: BPS in every call of the U-Net, for both passes
of guidance. "amortised" is how sample.py runs: once per timestep and condition, for all pictures.
At SD 1.5's sizes one step of 512 px, timed once, stands for all of them.

Beside ControlNet both programs draw with guidance, in fp32: ours each picture as a batch of two,
diffusers all in one batch. Training is one step on one picture: BPS and base forward, backward,
AdamW, on random weights. ControlNet is diffusers'.
"""
import importlib.util
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import nan
from pathlib import Path

import numpy as np
import torch

import diffusion
import weights
from bps import Steering, build_bps, config_for, make_denoiser
from clip import CLIPTextConfig, CLIPTextModel
from inputs import checkpoints
from inputs.options import BASE, DTYPES, FEET, Parser, positive, run
from measure.report import peak_memory
from sample import draw, load_base
from tiny.pretrain import save_text_encoder, save_unet, save_vae
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

# folder: network, its config, its reader, its writer, its prefix in a single file
PARTS = dict(
    unet=(UNet, UNetConfig, checkpoints.read_unet, save_unet, "model.diffusion_model."),
    vae=(AutoencoderKL, VAEConfig, checkpoints.read_vae, save_vae, "first_stage_model."),
    text_encoder=(CLIPTextModel, CLIPTextConfig, checkpoints.read_text, save_text_encoder,
                  "cond_stage_model.transformer.text_model."))
SIDE = 64                       # rows and columns of the latent: 512 px
PICTURES = (1, 4, 16)           # how many are steered at once
STEERING_BASES = {"embedded base": (BASE, 10, 7), "SD 1.5": ("sd15", 1, 1)}    # base, steps, repeat
SHARED_STEP = 4                 # pictures drawn at once beside ControlNet
PEER = "diffusers with ControlNet"
PEERS = ("diffusers", "transformers", "accelerate")
PROGRAMS = ("ours", "diffusers") if all(map(importlib.util.find_spec, PEERS)) else ("ours",)


# ---- what is measured in a process of its own ----------------------------------------------

def in_a_process(function, *arguments):
    """Returns what a function returns that runs in a new process, so its peak of memory is new."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_base(folder):
    """Writes FOLDER/sd15 and FOLDER/sd15.safetensors with seeded random weights, in fp32."""
    torch.manual_seed(0)
    tensors = {}
    for name, (Module, Config, _, save, prefix) in PARTS.items():
        module = Module(Config())
        save(module, folder / "sd15" / name, torch.float32)
        tensors |= {prefix + key: tensor for key, tensor in module.state_dict().items()}
    # the single file comes last, so that the base is complete if it is there
    weights.save(tensors, folder / "sd15.safetensors", dict(format="pt"))


def load(program, name, path, dtype):
    """Returns a part as one of the programs loads it, from a folder or a single file."""
    dtype = DTYPES[dtype]
    if program == "ours":
        Module, Config, read, *_ = PARTS[name]
        return read(path).build(Module, Config, dtype)
    import diffusers
    import transformers
    folder = path.with_suffix("")
    if name == "text_encoder":              # transformers reads no single files
        return transformers.CLIPTextModel.from_pretrained(folder / name, dtype=dtype)
    Module = dict(unet=diffusers.UNet2DConditionModel, vae=diffusers.AutoencoderKL)[name]
    if path.is_dir():
        return Module.from_pretrained(path / name, torch_dtype=dtype)
    return Module.from_single_file(str(path), config=str(folder), subfolder=name,
                                   torch_dtype=dtype, local_files_only=True)


def measure_load(program, path, dtype):
    """Returns seconds to load, to convert, to then read every weight once, and peak / weights.

    To convert is to make our convolutions channels_last, as sample.py does.
    """
    load(program, "text_encoder", BASE, "fp32")     # neither imports nor Python's first model count
    before, start = peak_memory("cpu"), time.perf_counter()
    modules = [load(program, name, path, dtype) for name in PARTS]
    load_end = time.perf_counter()
    if program == "ours":
        modules = [module.to(memory_format=torch.channels_last) for module in modules]
    conversion_end = time.perf_counter()
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.sum()
    read_end = time.perf_counter()
    gigabytes = sum(p.numel() for p in parameters) * DTYPES[dtype].itemsize / 1e9
    return [load_end - start, conversion_end - load_end, read_end - conversion_end,
            (peak_memory("cpu") - before) / gigabytes]


def unet_call(program, path, device, dtype):
    """Returns a function without arguments that predicts once, 512 px, batch 2."""
    unet = load(program, "unet", path, dtype).to(device)
    generator = torch.Generator().manual_seed(0)
    width = checkpoints.read_unet(path).config["context_dim"]
    z_t, context = (torch.randn(shape, generator=generator).to(device, DTYPES[dtype])
                    for shape in ((2, 4, SIDE, SIDE), (2, 77, width)))
    if program == "ours":
        unet = unet.to(memory_format=torch.channels_last)
        z_t = z_t.contiguous(memory_format=torch.channels_last)
    return partial(unet.eval(), z_t, torch.tensor([981, 981], device=device), context)


@torch.inference_mode()
def measure_forward(programs, path, device, dtype, repeat):
    """Returns {program: median seconds}, and the peak of memory in GB, weights and all."""
    before = peak_memory(device)
    calls = {program: unet_call(program, path, device, dtype) for program in programs}
    for call in calls.values():
        call()                                                  # warms up
    memory = peak_memory(device) - before
    return medians({program: partial(seconds, call, device) for program, call in calls.items()},
                   repeat), memory


def random_bps(unet, factor, foot, device="cpu"):
    """Returns an untrained BPS for a U-Net and a condition of one channel."""
    bps = build_bps(config_for(unet.config, 1, factor, foot=foot))
    return bps.to(device, memory_format=torch.channels_last)


def with_controlnet(unet, controlnet):
    """Returns prediction(z_t, t, context, cond) of diffusers' U-Net with its ControlNet."""
    def predict(z_t, t, context, cond):
        """Returns eps (B, 4, H, W)."""
        down, middle = controlnet(z_t, t, context, cond, return_dict=False)
        return unet(z_t, t, context, down_block_additional_residuals=down,
                    mid_block_additional_residual=middle).sample

    return predict


def training_networks(program, checkpointing, dtype, device):
    """Returns (trained network, prediction(z_t, t, context, cond)) at SD 1.5's sizes.

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
        trained = random_bps(unet, 8, program, device)
        unet.checkpointing = trained.checkpointing = checkpointing

        def predict(z_t, t, context, cond):
            """Returns eps (B, 4, H, W)."""
            return unet(z_t, t, context, trained(cond, unet.time_embedding(t)))
    return trained.to(device).train(), predict


def measure_training(program, size, checkpointing, dtype, device, repeat):
    """Returns (median seconds of a step, peak memory in GB) of a training on one picture."""
    torch.manual_seed(0)
    dtype = DTYPES[dtype]
    trained, predict = training_networks(program, checkpointing, dtype, device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)
    z_t = torch.randn(1, 4, size // 8, size // 8, device=device)
    noise, context = torch.randn_like(z_t), torch.randn(1, 77, 768, device=device)
    cond, t = torch.rand(1, 1, size, size, device=device), torch.tensor([500], device=device)

    def step():
        """Trains on the picture once."""
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype != torch.float32):
            loss = (predict(z_t, t, context, cond).float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()                                                      # makes the optimiser's state
    return np.median([seconds(step, device) for _ in range(repeat)]), peak_memory(device)


# ---- tables --------------------------------------------------------------------------------

def medians(measures, repeat):
    """Returns {name: median} of what functions without arguments return, called in turns."""
    results = {name: [] for name in measures}
    for name, measure in [*measures.items()] * repeat:
        results[name].append(measure())
    return {name: np.median(values, axis=0).tolist() for name, values in results.items()}


def seconds(call, device):
    """Returns the time that a function without arguments takes."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        getattr(torch, device.split(":")[0]).synchronize()
    return time.perf_counter() - start


def print_row(*cells):
    """Prints a row of a markdown table."""
    texts = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |", flush=True)


def print_head(*names):
    """Prints the head of a markdown table."""
    print()
    print_row(*names)
    print("|---" * len(names) + "|")


def load_table(args):
    """Prints the seconds and the memory of loading."""
    print_head("load", "dtype", "ours s", "diffusers s", "ratio", "ours to channels_last s",
               "read all, ours s", "diffusers s", "peak / weights, ours", "diffusers")
    for path in (args.base / "sd15", args.base / "sd15.safetensors"):
        for dtype in DTYPES:
            measures = {program: partial(in_a_process, measure_load, program, path, dtype)
                        for program in PROGRAMS}
            results = dict(diffusers=[nan] * 4) | medians(measures, args.repeat)
            (loading, conversion, reading, memory), peer = results["ours"], results["diffusers"]
            print_row(path.name, dtype, loading, peer[0], loading / peer[0], conversion, reading,
                      peer[2], memory, peer[3])


def forward_table(args):
    """Prints the seconds and the memory of one prediction."""
    print_head(f"U-Net on {args.device}, 512 px, batch 2", "ours s", "diffusers s", "ratio",
               "ours GB", "diffusers GB")
    for dtype in ("fp32", "bf16") if args.device == "cpu" else DTYPES:
        options = (args.base / "sd15", args.device, dtype, args.repeat)
        times, _ = in_a_process(measure_forward, PROGRAMS, *options)
        memory = {program: in_a_process(measure_forward, [program], *options[:3], 1)[1]
                  for program in PROGRAMS}
        ours, peer = times["ours"], times.get("diffusers", nan)
        print_row(dtype, f"{ours:.3f}", f"{peer:.3f}", ours / peer, memory["ours"],
                  memory.get("diffusers", nan))


class NaiveSteering(Steering):
    """A Steering that never remembers its maps, and makes them for both passes of guidance."""

    def __call__(self, t):
        self.last_t = None
        return [r if r is None else r[:1] for r in super().__call__(t)]     # the passes' are equal


def draw_latents(unet, make_steering, pictures, steps):
    """Draws latents with guidance, step by step side by side, as sample.py does."""
    config, device = unet.config, next(unet.parameters()).device
    side = config.sample_size or SIDE
    context = torch.zeros(1, 77, config.context_dim, device=device)
    noise = diffusion.draw_noise(range(pictures), (config.latent_channels, side, side)).to(device)
    steerings = [make_steering()] if make_steering else []      # a new one, which has no maps yet
    denoise = make_denoiser(unet, context, context, 3.0, steerings)
    for _ in zip(*(diffusion.sample(denoise, z_t[None], diffusion.NoiseSchedule(), steps)
                   for z_t in noise)):
        pass


@torch.inference_mode()
def steering_table(args):
    """Prints what steering costs on the embedded base and at SD 1.5's sizes; BPS is random."""
    print_head("networks", "BPS", "pictures", "unsteered s", "naive s", "ratio", "amortised s",
               "ratio")
    for name, (path, steps, repeat) in STEERING_BASES.items():
        torch.manual_seed(0)
        path = args.base / path                             # an absolute path stays as it is
        unet, factor = load("ours", "unet", path, "fp32"), checkpoints.vae_factor(path)
        unet = unet.to(args.device, memory_format=torch.channels_last)
        side = factor * (unet.config.sample_size or SIDE)
        cond = torch.rand(1, 1, side, side, device=args.device)
        for foot in FEET:
            bps = random_bps(unet, factor, foot, args.device)
            ways = dict(unsteered=None, amortised=partial(Steering, bps, unet, cond),
                        naive=partial(NaiveSteering, bps, unet, cond.expand(2, -1, -1, -1)))
            draw_latents(unet, ways["naive"], 1, steps)                     # warms up
            for pictures in PICTURES if foot == FEET[0] else PICTURES[:1]:
                plain, amortised, naive = medians(
                    {way: partial(seconds, partial(draw_latents, unet, kind, pictures, steps),
                                  args.device) for way, kind in ways.items()}, repeat).values()
                print_row(name, foot, pictures, plain, naive, naive / plain, amortised,
                          amortised / plain)


def peer_steps(device):
    """Returns {name: function that predicts SHARED_STEP pictures with guidance} of diffusers."""
    import diffusers
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).to(device)
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=1).to(device)
    batch = 2 * SHARED_STEP
    inputs = (torch.randn(batch, 4, SIDE, SIDE, device=device), torch.tensor(981, device=device),
              torch.randn(batch, 77, 768, device=device))
    cond = torch.rand(batch, 1, 8 * SIDE, 8 * SIDE, device=device)

    return {"diffusers": partial(unet, *inputs),
            PEER: partial(with_controlnet(unet, controlnet), *inputs, cond)}


@torch.inference_mode()
def controlnet_table(args):
    """Prints what a step of several pictures costs beside diffusers' ControlNet, all random."""
    unet = UNet(UNetConfig()).to(args.device, memory_format=torch.channels_last)
    cond = torch.rand(1, 1, 8 * SIDE, 8 * SIDE, device=args.device)
    calls = {"ours": partial(draw_latents, unet, None, SHARED_STEP, 1)}
    for foot in FEET:
        bps = random_bps(unet, 8, foot, args.device)
        calls[f"ours with BPS, {foot} foot"] = partial(
            draw_latents, unet, partial(Steering, bps, unet, cond), SHARED_STEP, 1)
    if "diffusers" in PROGRAMS:
        calls |= peer_steps(args.device)
    for call in calls.values():
        call()                                                  # warms up
    times = medians({name: partial(seconds, call, args.device) for name, call in calls.items()},
                    args.repeat)
    print_head(f"a step of {SHARED_STEP} pictures, 512 px", "s", "of the same unsteered",
               f"of {PEER}")
    for name, taken in times.items():
        print_row(name, taken, taken / times[name.split()[0]], taken / times.get(PEER, nan))


def training_table(args):
    """Prints seconds and memory of a training step, beside ControlNet if diffusers is installed."""
    print_head("training step, batch 1", "px", "base", "checkpointing", "s", "GB")
    programs = [*reversed(FEET), *(["controlnet"] if len(PROGRAMS) > 1 else [])]
    for size, dtype in ((256, "fp32"), (512, "bf16")):
        for checkpointing in (False, True):
            for program in programs:
                cost = in_a_process(measure_training, program, size, checkpointing, dtype,
                                    args.device, args.repeat)
                print_row(program, size, dtype, "on" if checkpointing else "off", *cost)


@torch.inference_mode()
def rounding_table(args):
    """Prints how far fp16 and bf16 are from fp32: the largest difference, relative to the largest
    value.
    """
    torch.backends.cudnn.allow_tf32 = False             # TF32 is not fp32
    generator, path = torch.Generator().manual_seed(0), args.base / "sd15"
    z_t = torch.randn(2, 4, 24, 32, generator=generator).to(args.device)
    vocab_size = checkpoints.read_text(path).config["vocab_size"]
    ids = torch.randint(vocab_size, (2, 77), generator=generator).to(args.device)
    t = torch.tensor([21, 981], device=args.device)
    results = []
    for name, dtype in DTYPES.items():
        context = load("ours", "text_encoder", path, name).to(args.device)(ids)
        unet = load("ours", "unet", path, name).to(args.device)
        eps = unet(z_t.to(dtype), t, context)
        tiny = load_base(BASE, device=args.device, dtype=dtype)
        states, empty = tiny.encode(["a red apple", ""]).split(1)
        picture = draw(tiny, states, empty, [0], 64).clamp(-1, 1)
        results.append((context.float(), eps.float(), picture))
    print_head("largest difference from fp32, of the largest value", "fp16", "bf16")
    for words, exact, *narrow in zip(
            ("text states, SD 1.5's size", "eps, SD 1.5's size, 192 x 256 px",
             f"embedded base, picture after {diffusion.Sampling().steps} steps"), *results):
        print_row(words, *(f"{(value - exact).abs().max() / exact.abs().max():.1e}"
                           for value in narrow))


def main():
    """Makes the base and prints the tables."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, default=Path("runs/bench"), help="folder of the base that is made "
        "(default: %(default)s)")
    add("--repeat", type=positive, default=5, help="runs of each program (default: %(default)s)")
    # The last three make this process big, and the peak of a child begins with that of its parent.
    tables = dict(load=load_table, forward=forward_table, training=training_table,
                  controlnet=controlnet_table, steering=steering_table, rounding=rounding_table)
    add("--only", choices=tables, help="print only one table (default: all)")
    parser.add_device()
    args = parser.parse_args()
    needs_base = args.only not in ("training", "controlnet")
    if needs_base and not (args.base / "sd15.safetensors").is_file():
        in_a_process(make_base, args.base)
    if len(PROGRAMS) == 1:
        print(f"not all of {', '.join(PEERS)} are installed: only our own figures")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for name, print_table in tables.items():
        if args.only in (None, name):
            print_table(args)


if __name__ == "__main__":
    run(main)
