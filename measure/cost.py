"""Time, memory and rounding of Stable Diffusion's networks, side by side with diffusers.

    python -m measure.cost --base runs/bench

The base is made where it is missing: a folder and a single file of SD 1.5's sizes with random
weights, 8.5 GB in all. Every measurement of memory is a process of its own, files are in the page
cache, times are medians of --repeat runs that take turns. What is not installed is skipped; to
compare, run it in an environment with diffusers, transformers and accelerate.
"""
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from inputs import checkpoints
import weights
from inputs.options import BASE, Parser, run
from clip import BEGIN, END, CLIPTextConfig, CLIPTextModel, load_clip
from sample import load_base
from inputs.sample_options import DTYPES
from steer import draw
from unet import UNet, UNetConfig, load_unet
from vae import AutoencoderKL, VAEConfig, load_vae

PREFIXES = dict(unet="model.diffusion_model.", vae="first_stage_model.",
                text_encoder="cond_stage_model.transformer.text_model.")
CONFIGS = dict(
    unet=dict(_class_name="UNet2DConditionModel", sample_size=64, cross_attention_dim=768,
              attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280],
              layers_per_block=2, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
              up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, act_fn="silu",
              norm_eps=1e-5, norm_num_groups=32, class_embed_type=None, addition_embed_type=None),
    vae=dict(_class_name="AutoencoderKL", block_out_channels=[128, 256, 512, 512],
             layers_per_block=2, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
             up_block_types=["UpDecoderBlock2D"] * 4),
    text_encoder=dict(architectures=["CLIPTextModel"], hidden_size=768, intermediate_size=3072,
                      num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu",
                      model_type="clip_text_model", vocab_size=49408, bos_token_id=0,
                      eos_token_id=2))
SIDE = 64                       # of the latent: 512 px
STEPS = 25                      # of the picture whose rounding is measured
PEERS = ("diffusers", "transformers", "accelerate")
DIFFUSERS = all(importlib.util.find_spec(name) for name in PEERS)


# ---- the base ------------------------------------------------------------------------------

def make_base(folder):
    """Writes FOLDER/sd15 and FOLDER/sd15.safetensors with seeded random weights, in fp32."""
    torch.manual_seed(0)
    folder = Path(folder)
    modules = dict(unet=UNet(UNetConfig()), vae=AutoencoderKL(VAEConfig()),
                   text_encoder=CLIPTextModel(CLIPTextConfig()))
    names = dict(unet=lambda key: checkpoints.unet_folder_name(key, 2),
                 vae=lambda key: checkpoints.vae_folder_name(key, 4), text_encoder=str)
    sd15 = folder / "sd15"
    for part, module in modules.items():
        (sd15 / part).mkdir(parents=True, exist_ok=True)
        # the folder layout holds the autoencoder's attention as linear layers
        tensors = {names[part](key): tensor.flatten(1) if "attn_1" in key and tensor.dim() == 4
                   else tensor for key, tensor in module.state_dict().items()}
        stem = checkpoints.TEXT_STEM if part == "text_encoder" else checkpoints.UNET_STEM
        weights.save(tensors, sd15 / part / f"{stem}.safetensors", dict(format="pt"))
        weights.write_json(CONFIGS[part], sd15 / part / "config.json")
    single = {f"{PREFIXES[part]}{key}": tensor for part, module in modules.items()
              for key, tensor in module.state_dict().items()}
    weights.save(single, folder / "sd15.safetensors", dict(format="pt"))
    (sd15 / "tokenizer").mkdir(exist_ok=True)
    vocab = {token: i for i, token in enumerate([*map(str, range(49406)), BEGIN, END])}
    weights.write_json(vocab, sd15 / "tokenizer" / "vocab.json")
    (sd15 / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    weights.write_json({}, sd15 / "model_index.json")


# ---- measured in a process of its own ------------------------------------------------------

def load(program, path, dtype):
    """Returns [U-Net, autoencoder, text encoder] as one of the programs loads them."""
    path, dtype = Path(path), DTYPES[dtype]
    sd15 = path.with_suffix("") if path.is_file() else path
    if program == "ours":
        return [load_unet(path, dtype), load_vae(path, dtype), load_clip(path, sd15, dtype)[1]]
    from diffusers import AutoencoderKL as PeerVAE
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel as PeerText
    if path.is_file():          # transformers reads no single files: the folder's text encoder
        parts = [kind.from_single_file(str(path), config=str(sd15), subfolder=part,
                                       torch_dtype=dtype, local_files_only=True)
                 for kind, part in ((UNet2DConditionModel, "unet"), (PeerVAE, "vae"))]
    else:
        parts = [kind.from_pretrained(path / part, torch_dtype=dtype)
                 for kind, part in ((UNet2DConditionModel, "unet"), (PeerVAE, "vae"))]
    return [*parts, PeerText.from_pretrained(sd15 / "text_encoder", dtype=dtype)]


def peak():
    """Returns the most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_load(program, path, dtype):
    """Returns seconds to load, to convert, to then read every weight once, and peak / weights.

    To convert is to make our convolutions channels_last, as sample.py does.
    """
    if program == "diffusers":
        import diffusers  # noqa: F401      its import is not loading
        import transformers  # noqa: F401
    load_clip(BASE)             # neither is what Python does at its first model
    before, started = peak(), time.perf_counter()
    modules = load(program, path, dtype)
    loaded = time.perf_counter()
    if program == "ours":
        modules = [module.to(memory_format=torch.channels_last) for module in modules]
    converted = time.perf_counter()
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.sum()
    size = sum(p.numel() for p in parameters) * DTYPES[dtype].itemsize
    return dict(load=loaded - started, convert=converted - loaded,
                read=time.perf_counter() - converted, peak=(peak() - before) / size)


def unet_calls(path, device, dtype, programs):
    """Returns {program: a function without arguments that predicts once, 512 px, batch 2}."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[dtype]
    width = checkpoints.read_unet(path).config["context_dim"]
    z_t, context = (torch.randn(shape, generator=generator).to(device, dtype)
                    for shape in ((2, 4, SIDE, SIDE), (2, 77, width)))
    t, last = torch.tensor([981, 981], device=device), torch.channels_last
    calls = {}
    if "ours" in programs:
        ours = load_unet(path, dtype, device).to(memory_format=last)
        z_last = z_t.contiguous(memory_format=last)
        calls["ours"] = lambda: ours(z_last, t, context)
    if "diffusers" in programs:
        from diffusers import UNet2DConditionModel
        peer = UNet2DConditionModel.from_pretrained(Path(path) / "unet", torch_dtype=dtype)
        peer = peer.to(device).eval()
        calls["diffusers"] = lambda: peer(z_t, t, context).sample
    return calls


@torch.inference_mode()
def measure_forward(path, device, dtype, repeat):
    """Returns {program: median seconds} of taking turns."""
    calls = unet_calls(path, device, dtype, ["ours", "diffusers"] if DIFFUSERS else ["ours"])
    times = {program: [] for program in calls}
    for i in range(int(repeat) + 1):
        for program, call in calls.items():
            started = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:                                               # the first warms up
                times[program].append(time.perf_counter() - started)
    return {program: statistics.median(values) for program, values in times.items()}


@torch.inference_mode()
def measure_memory(program, path, device, dtype):
    """Returns the peak of one prediction's memory in bytes, weights and all."""
    before = peak()
    call = unet_calls(path, device, dtype, [program])[program]
    call()
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak() - before


@torch.inference_mode()
def measure_rounding(path, device):
    """Returns {dtype: {what: largest difference from fp32, relative to the largest value}}."""
    torch.backends.cudnn.allow_tf32 = False             # which is not fp32
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(2, 4, 24, 32, generator=generator).to(device)
    vocab_size = checkpoints.read_text(path).config["vocab_size"]
    ids = torch.randint(vocab_size, (2, 77), generator=generator).to(device)
    t, found = torch.tensor([21, 981], device=device), {}
    for name, dtype in DTYPES.items():
        text = load_clip(path, dtype=dtype, device=device)[1]
        context = text(ids)
        unet = load_unet(path, dtype, device)
        eps = unet(z_t.to(dtype), t, context)
        tiny, vae, tokenizer, tiny_text, schedule = load_base(BASE, device=device, dtype=dtype)
        states, empty = tiny_text(tokenizer(["a red apple", ""]).to(device)).split(1)
        picture = draw(tiny, vae, schedule, states, empty, [0], 64, STEPS, 3.0)
        found[name] = dict(context=context.float(), eps=eps.float(), picture=picture.clamp(-1, 1))
        del text, unet
    exact = found.pop("fp32")
    return {name: {what: ((value - exact[what]).abs().max() / exact[what].abs().max()).item()
                   for what, value in values.items()} for name, values in found.items()}


# ---- tables --------------------------------------------------------------------------------

def in_a_process(function, *arguments):
    """Returns what a function of this file returns in a process of its own."""
    words = [sys.executable, "-m", "measure.cost", "--child", function, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_table(base, repeat):
    """Prints the seconds and the memory of loading."""
    print("\n| load | dtype | ours s | diffusers s | ratio | ours to channels_last s | read all, "
          "ours s | diffusers s | peak / weights, ours | diffusers |\n" + "|---" * 10 + "|")
    for path in (base / "sd15", base / "sd15.safetensors"):
        for dtype in DTYPES:
            rows = {"ours": [], "diffusers": []}
            for _ in range(repeat):
                for program in rows if DIFFUSERS else ("ours",):
                    rows[program].append(in_a_process("measure_load", program, path, dtype))
            cells = {}
            for program, runs in rows.items():
                cells[program] = {what: statistics.median(run[what] for run in runs)
                                  for what in runs[0]} if runs else None
            ours, nan = cells["ours"], float("nan")
            peer = cells["diffusers"] or dict(load=nan, read=nan, peak=nan)
            print(f"| {path.name} | {dtype} | {ours['load']:.2f} | {peer['load']:.2f} | "
                  f"{ours['load'] / peer['load']:.2f} | {ours['convert']:.2f} | "
                  f"{ours['read']:.2f} | {peer['read']:.2f} | "
                  f"{ours['peak']:.2f} | {peer['peak']:.2f} |", flush=True)


def forward_table(base, device, dtypes, repeat):
    """Prints the seconds and the memory of one prediction."""
    print(f"\n| U-Net on {device}, 512 px, batch 2 | ours s | diffusers s | ratio | ours GB | "
          f"diffusers GB |\n|---|---|---|---|---|---|")
    path, nan = base / "sd15", float("nan")
    for dtype in dtypes:
        seconds = in_a_process("measure_forward", path, device, dtype, repeat)
        memory = {program: in_a_process("measure_memory", program, path, device, dtype) / 1e9
                  for program in seconds}
        peer = seconds.get("diffusers", nan)
        print(f"| {dtype} | {seconds['ours']:.3f} | {peer:.3f} | {seconds['ours'] / peer:.2f} | "
              f"{memory['ours']:.2f} | {memory.get('diffusers', nan):.2f} |", flush=True)


def rounding_table(base, device):
    """Prints how far narrower numbers are from fp32."""
    found = in_a_process("measure_rounding", base / "sd15", device)
    print("\n| largest difference from fp32, of the largest value | fp16 | bf16 |\n|---|---|---|")
    for what, words in (("context", "text states, SD 1.5's size"),
                        ("eps", "eps, SD 1.5's size, 192 x 256 px"),
                        ("picture", f"embedded base, picture after {STEPS} steps")):
        print(f"| {words} | {found['fp16'][what]:.1e} | {found['bf16'][what]:.1e} |")


def main():
    """Makes the base and prints the tables."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[sys.argv[2]](*sys.argv[3:])))
        return
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    add("--repeat", type=int, default=5, help="runs of each program (default: %(default)s)")
    add("--only", choices=("load", "forward", "rounding"), help="one table")
    args = parser.parse_args()
    args.base = args.base.resolve()
    if not (args.base / "sd15" / "model_index.json").is_file():
        in_a_process("make_base", args.base)    # a big parent would pass its peak on
    for name in PEERS:
        if not importlib.util.find_spec(name):
            print(f"{name} is not installed: only our own figures")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if gpu else "no GPU: its table is left out")
    if args.only in (None, "load"):
        load_table(args.base, args.repeat)
    if args.only in (None, "forward"):
        forward_table(args.base, "cpu", ["fp32", "bf16"], args.repeat)
        if gpu:
            forward_table(args.base, "cuda", DTYPES, args.repeat * 4)
    if args.only in (None, "rounding"):
        rounding_table(args.base, "cuda" if gpu else "cpu")


if __name__ == "__main__":
    run(main)
