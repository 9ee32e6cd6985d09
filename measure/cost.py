"""What loading, predicting and steering cost at SD 1.5's sizes, beside diffusers where installed.

    python -m measure.cost                  # four tables: half an hour on two cores
    python -m measure.cost --only steering  # or load, forward, rounding

The base is made where it is missing: a folder and a single file of SD 1.5's sizes with random
weights, 8.5 GB in all. Every measurement of memory is a process of its own, files are in the page
cache, times are medians of --repeat runs that take turns. To compare, run it in an environment with
diffusers, transformers and accelerate.

Steering is timed relative to drawing the same pictures unsteered; text encoder and autoencoder are
left out. "naive" is how the authors' code runs: BPS in every call of the U-Net, for both passes of
guidance. "amortised" is how sample.py runs: once per timestep and condition, for all pictures. At
SD 1.5's sizes one step of 512 px, timed once, stands for all of them.
"""
import importlib.util
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import diffusion
import weights
from bps import Steering, build_bps, config_for, make_denoiser
from clip import CLIPTextConfig, CLIPTextModel
from inputs import checkpoints
from inputs.options import BASE, FEET, HERE, Parser, run
from inputs.sample_options import DTYPES
from sample import draw, load_base
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

# folder: network, its config, its reader, a key's name in a folder, prefix in a file, config.json
PARTS = dict(
    unet=(UNet, UNetConfig, checkpoints.read_unet,
          lambda key: checkpoints.unet_folder_name(key, 2), "model.diffusion_model.",
          dict(_class_name="UNet2DConditionModel", sample_size=64, cross_attention_dim=768,
               layers_per_block=2, class_embed_type=None, addition_embed_type=None)),
    vae=(AutoencoderKL, VAEConfig, checkpoints.read_vae,
         lambda key: checkpoints.vae_folder_name(key, 4), "first_stage_model.",
         dict(_class_name="AutoencoderKL", block_out_channels=[128, 256, 512, 512],
              layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
              up_block_types=["UpDecoderBlock2D"] * 4)),
    text_encoder=(CLIPTextModel, CLIPTextConfig, checkpoints.read_text,
                  str, "cond_stage_model.transformer.text_model.",
                  dict(architectures=["CLIPTextModel"], model_type="clip_text_model",
                       hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                       num_attention_heads=12, bos_token_id=0, eos_token_id=2)))
SIDE = 64                       # of the latent: 512 px
PICTURES = (1, 4, 16)           # that are steered at once
STEERED = {"embedded base": (BASE, 10, 7), "SD 1.5": ("sd15", 1, 1)}    # base, steps, repeat
STEPS = 25                      # of the picture whose rounding is measured
PEERS = ("diffusers", "transformers", "accelerate")
MISSING = [name for name in PEERS if not importlib.util.find_spec(name)]
NAN = float("nan")              # where there is no peer to measure
PROGRAMS = ("ours",) if MISSING else ("ours", "diffusers")


# ---- what is measured in a process of its own ----------------------------------------------

def in_a_process(function, *arguments):
    """Returns what a function of this file returns in a process of its own, by way of JSON."""
    call = json.dumps([function, *arguments], default=str)
    words = [sys.executable, "-m", "measure.cost", "--child", call]
    child = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def make_base(folder):
    """Writes FOLDER/sd15 and FOLDER/sd15.safetensors with seeded random weights, in fp32."""
    torch.manual_seed(0)
    folder, single_file = Path(folder), {}
    for name, (Module, Config, _, folder_name, prefix, config) in PARTS.items():
        state = Module(Config()).state_dict()
        # the folder layout holds the autoencoder's attention as linear layers
        tensors = {folder_name(key): tensor.flatten(1) if "attn_1" in key and tensor.dim() == 4
                   else tensor for key, tensor in state.items()}
        stem = checkpoints.TEXT_STEM if name == "text_encoder" else checkpoints.UNET_STEM
        (folder / "sd15" / name).mkdir(parents=True, exist_ok=True)
        weights.save(tensors, folder / "sd15" / name / f"{stem}.safetensors", dict(format="pt"))
        weights.write_json(config, folder / "sd15" / name / "config.json")
        single_file |= {prefix + key: tensor for key, tensor in state.items()}
    weights.save(single_file, folder / "sd15.safetensors", dict(format="pt"))   # last: all is there


def load(program, name, path, dtype):
    """Returns a part as one of the programs loads it, from a folder or a single file."""
    path, dtype = Path(path), DTYPES[dtype]
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


def peak():
    """Returns the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_load(program, path, dtype):
    """Returns seconds to load, to convert, to then read every weight once, and peak / weights.

    To convert is to make our convolutions channels_last, as sample.py does.
    """
    load(program, "text_encoder", BASE, "fp32")     # neither imports nor Python's first model count
    before, started = peak(), time.perf_counter()
    modules = [load(program, name, path, dtype) for name in PARTS]
    loaded = time.perf_counter()
    if program == "ours":
        modules = [module.to(memory_format=torch.channels_last) for module in modules]
    converted = time.perf_counter()
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.sum()
    read = time.perf_counter()
    size = sum(p.numel() for p in parameters) * DTYPES[dtype].itemsize
    return [loaded - started, converted - loaded, read - converted, (peak() - before) / size]


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
    """Returns {program: median seconds}, and the peak of memory in bytes, weights and all."""
    before = peak()
    calls = {program: unet_call(program, path, device, dtype) for program in programs}
    for call in calls.values():
        call()                                                  # warms up
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak() - before
    return medians({program: partial(seconds, call, device) for program, call in calls.items()},
                   repeat), memory


# ---- tables --------------------------------------------------------------------------------

def medians(measures, repeat):
    """Returns {name: median} of what functions without arguments return, called in turns."""
    results = {name: [] for name in measures}
    for name, measure in [*measures.items()] * repeat:
        results[name].append(measure())
    return {name: np.median(values, axis=0).tolist() for name, values in results.items()}


def seconds(call, device):
    """Returns the time that a function without arguments takes."""
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def print_row(*cells):
    """Prints a row of a markdown table."""
    words = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"| {' | '.join(words)} |", flush=True)


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
            measures = {program: partial(in_a_process, "measure_load", program, path, dtype)
                        for program in PROGRAMS}
            results = dict(diffusers=[NAN] * 4) | medians(measures, args.repeat)
            (loading, converting, reading, memory), peer = results["ours"], results["diffusers"]
            print_row(path.name, dtype, loading, peer[0], loading / peer[0], converting, reading,
                      peer[2], memory, peer[3])


def forward_table(args):
    """Prints the seconds and the memory of one prediction."""
    print_head(f"U-Net on {args.device}, 512 px, batch 2", "ours s", "diffusers s", "ratio",
               "ours GB", "diffusers GB")
    for dtype in ("fp32", "bf16") if args.device == "cpu" else DTYPES:
        options = (args.base / "sd15", args.device, dtype, args.repeat)
        times, _ = in_a_process("measure_forward", PROGRAMS, *options)
        memory = {program: in_a_process("measure_forward", [program], *options[:3], 1)[1] / 1e9
                  for program in PROGRAMS}
        ours, peer = times["ours"], times.get("diffusers", NAN)
        print_row(dtype, f"{ours:.3f}", f"{peer:.3f}", ours / peer, memory["ours"],
                  memory.get("diffusers", NAN))


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
    for name, (path, steps, repeat) in STEERED.items():
        torch.manual_seed(0)
        path = args.base / path                             # an absolute path stays as it is
        unet, factor = load("ours", "unet", path, "fp32"), checkpoints.vae_factor(path)
        unet = unet.to(args.device, memory_format=torch.channels_last)
        side = factor * (unet.config.sample_size or SIDE)
        cond = torch.rand(1, 1, side, side, device=args.device)
        for foot in FEET:
            bps = build_bps(config_for(unet.config, 1, factor, foot=foot))
            bps = bps.to(args.device, memory_format=torch.channels_last)
            ways = dict(unsteered=None, amortised=partial(Steering, bps, unet, cond),
                        naive=partial(NaiveSteering, bps, unet, cond.expand(2, -1, -1, -1)))
            draw_latents(unet, ways["naive"], 1, steps)                     # warms up
            for pictures in PICTURES if foot == FEET[0] else PICTURES[:1]:
                plain, amortised, naive = medians(
                    {way: partial(seconds, partial(draw_latents, unet, kind, pictures, steps),
                                  args.device) for way, kind in ways.items()}, repeat).values()
                print_row(name, foot, pictures, plain, naive, naive / plain, amortised,
                          amortised / plain)


@torch.inference_mode()
def rounding_table(args):
    """Prints how far narrower numbers are from fp32: the largest difference, relative to the
    largest value.
    """
    torch.backends.cudnn.allow_tf32 = False             # which is not fp32
    generator, path = torch.Generator().manual_seed(0), args.base / "sd15"
    z_t = torch.randn(2, 4, 24, 32, generator=generator).to(args.device)
    vocab_size = checkpoints.read_text(path).config["vocab_size"]
    ids = torch.randint(vocab_size, (2, 77), generator=generator).to(args.device)
    t, results = torch.tensor([21, 981], device=args.device), {}
    for name, dtype in DTYPES.items():
        context = load("ours", "text_encoder", path, name).to(args.device)(ids)
        unet = load("ours", "unet", path, name).to(args.device)
        eps = unet(z_t.to(dtype), t, context)
        tiny = load_base(BASE, device=args.device, dtype=dtype)
        states, empty = tiny.encode(["a red apple", ""]).split(1)
        picture = draw(tiny, states, empty, [0], 64, STEPS, 3.0).clamp(-1, 1)
        results[name] = (context.float(), eps.float(), picture)
    print_head("largest difference from fp32, of the largest value", "fp16", "bf16")
    for words, exact, *narrow in zip(
            ("text states, SD 1.5's size", "eps, SD 1.5's size, 192 x 256 px",
             f"embedded base, picture after {STEPS} steps"), *results.values()):
        print_row(words, *(f"{(value - exact).abs().max() / exact.abs().max():.1e}"
                           for value in narrow))


def main():
    """Makes the base and prints the tables."""
    if sys.argv[1:2] == ["--child"]:
        function, *arguments = json.loads(sys.argv[2])
        print(json.dumps(globals()[function](*arguments)))
        return
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    add("--repeat", type=int, default=5, help="runs of each program (default: %(default)s)")
    # in this order: the last two make this process big, and a child's peak begins with its parent's
    tables = dict(load=load_table, forward=forward_table, steering=steering_table,
                  rounding=rounding_table)
    add("--only", choices=tables, help="one table")
    parser.add_device()
    args = parser.parse_args()
    args.base = args.base.resolve()
    if not (args.base / "sd15.safetensors").is_file():
        in_a_process("make_base", args.base)
    for name in MISSING:
        print(f"{name} is not installed: only our own figures")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for name, print_table in tables.items():
        if args.only in (None, name):
            print_table(args)


if __name__ == "__main__":
    run(main)
