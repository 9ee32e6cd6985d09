"""Outputs of diffusers and transformers for random models, recorded for the default tests.

    pip install -r requirements.txt diffusers transformers accelerate   # in a separate environment
    PYTHONPATH=. python tests/references.py

writes tests/data/references.safetensors (outputs; the versions used are in its metadata) and
tests/data/references.json.gz (names of tensors, token ids, timesteps). The random weights and the
inputs come from NumPy's RandomState, whose numbers never change, so they aren't stored.
test_peers.py makes the same comparisons live, also at full size.
"""
import gzip
import itertools
import json
import random
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file as save_float32

import clip
import unet
import vae
from bps import BPS, config_for, save_bps
from inputs import checkpoints
from inputs.conditions import TASKS
from inputs.options import BASE

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model"}          # folders of a checkpoint and their files' stems
DATA = Path(__file__).parent / "data"
TENSORS, RECORD = DATA / "references.safetensors", DATA / "references.json.gz"

# two small models, and Stable Diffusion's own sizes; keys that are absent have SD 1.5's values
BLOCKS = dict(down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
              up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
VAE_BLOCKS = dict(down_block_types=["DownEncoderBlock2D"] * 4,
                  up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, layers_per_block=2)
SD1_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                hidden_act="quick_gelu")
SD2_TEXT = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
                hidden_act="gelu")


def sizes(channels, heads, vae_channels, text, layers, vocab_size, **unet):
    """Contents of a model's config.json files."""
    return dict(unet=dict(BLOCKS, block_out_channels=channels, attention_head_dim=heads,
                          cross_attention_dim=text["hidden_size"], **unet),
                vae=dict(VAE_BLOCKS, block_out_channels=vae_channels),
                text=dict(text, num_hidden_layers=layers, vocab_size=vocab_size))


MODELS = {
    "small1": sizes([32, 64, 64, 64], 8, [32, 32, 64, 64], SD1_TEXT, 2, 739),
    "small2": sizes([64, 128, 128, 128], [1, 2, 2, 2], [32, 64, 64, 64], SD2_TEXT, 2, 739,
                    use_linear_projection=True),
    "sd15": sizes([320, 640, 1280, 1280], 8, [128, 256, 512, 512], SD1_TEXT, 12, 49408),
    "sd21": sizes([320, 640, 1280, 1280], [5, 10, 20, 20], [128, 256, 512, 512], SD2_TEXT, 23,
                  49408, use_linear_projection=True, sample_size=96)}
PREFIXES = ("model.diffusion_model.", "first_stage_model.",        # of a single file's parts
            "cond_stage_model.transformer.text_model.")
SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-karras")
# scheduler_config.json as the repositories have it, without the keys that are always the same
OLD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
           num_train_timesteps=1000)
SCHEDULERS = {
    "sd14, first version": dict(OLD, _class_name="PNDMScheduler", skip_prk_steps=True),
    "sd15": dict(OLD, _class_name="PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False,
                 steps_offset=1, clip_sample=False, trained_betas=None),
    "sd21": dict(OLD, _class_name="DDIMScheduler", skip_prk_steps=True, set_alpha_to_one=False,
                 steps_offset=1, clip_sample=False, trained_betas=None,
                 prediction_type="v_prediction"),
    "trailing": dict(OLD, _class_name="DDIMScheduler", set_alpha_to_one=False, clip_sample=False,
                     prediction_type="v_prediction", timestep_spacing="trailing",
                     steps_offset=1),
    "one": dict(OLD, _class_name="DDIMScheduler", set_alpha_to_one=True, clip_sample=False,
                timestep_spacing="leading", steps_offset=1),
    "k-diffusion": dict(OLD, _class_name="EulerDiscreteScheduler", steps_offset=1,
                        interpolation_type="linear", use_karras_sigmas=False),
}
SCHEDULE = dict(OLD, _class_name="PNDMScheduler")     # of the folders written below


# ---- without diffusers and transformers ----------------------------------------------------

def numbers(seed, *shape):
    """Standard normal numbers, float32, the same on every machine."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def random_weights(module, seed):
    """State dict for one of our modules in which no two tensors are equal.

    Weights preserve the scale of activations; norms are near 1, biases near 0. fp16 represents all
    of them exactly.
    """
    state = {}
    for i, (key, tensor) in enumerate(sorted(module.state_dict().items())):
        values = numbers(seed * 10_000 + i, *tensor.shape)
        if tensor.dim() > 1:
            values = values / tensor[0].numel() ** 0.5
        else:
            values = 0.1 * values + (1.0 if key.endswith("weight") else 0.0)
        state[key] = values.half().float()
    return state


def unet_inputs(config, rows=9, columns=14):
    """(z_t, t, context): odd and unequal sides, a whole and a fractional timestep."""
    width = config["cross_attention_dim"]
    return (numbers(1, 2, 4, rows, columns), torch.tensor([3.0, 901.5]), numbers(2, 2, 7, width))


def vae_inputs():
    """(x, scaled latent), H != W."""
    return numbers(3, 2, 3, 24, 40).clamp(-2, 2) / 2, numbers(4, 2, 4, 3, 5)


def text_ids(vocab_size):
    """Token ids (2, 77)."""
    return torch.from_numpy(np.random.RandomState(5).randint(0, vocab_size, (2, 77)))


def predict(z, t):
    """Prediction (1, 2, 1, 2) of a made-up model, a smooth function of z_t and t."""
    return torch.tanh(z.flip(3) + t / 1000) + 0.5 * z.flip(1)


def texts(count, words):
    """Prompts of every kind: words, contractions, Unicode, control characters, 500 words."""
    known = ["", " ", "a photo of a cat", "a cat!", "Hello!!! World?!", "\x00\x01 tab\tnew\nline",
             "don't I'll we've he'd I'm you're it's", "<|endoftext|> x", "a<|startoftext|>b",
             "A\u0301 \u00e9 \u00c9 \u00df \u1e9e \u0130stanbul \u01c5", "\u65e5\u672c\u8a9e",
             "\U0001f44d\U0001f3fd\U0001f468\u200d\U0001f469\u200d\U0001f467", "\uff11\u2167 12345",
             " leading", "nbsp\u00a0em\u2003zero\u200bwidth"]
    ranges = [(32, 127), (0, 32), (160, 0x250), (0x300, 0x370), (0x370, 0x530), (0x600, 0x700),
              (0x900, 0xa00), (0x2000, 0x2070), (0x3040, 0x3100), (0x4e00, 0x5000),
              (0xac00, 0xad00), (0x1f300, 0x1f650)]
    ends = ["'s", "'T", ", ", "...", "!?", "'LL", "\u2019s", "-", " 4,5 "]
    pick = random.Random(0)
    while len(known) < count:
        kind, length = pick.randrange(4), pick.choice((1, 5, 20, 60))
        if kind == 0:
            text = "".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(length))
        elif kind == 1:
            text = " ".join(pick.choice(words) for _ in range(pick.choice((3, 10, 40, 500))))
        elif kind == 2:
            text = " ".join(pick.choice(words).title() + pick.choice(ends) for _ in range(length))
        else:
            low, high = pick.choice(ranges)
            text = "".join(chr(pick.randrange(low, high)) for _ in range(length))
        known.append(text)
    return known


def words_of(vocab):
    """Complete words in plain letters of a vocabulary, in order."""
    return [token[:-4] for token in vocab if token.endswith("</w>") and token[:-4].isalpha()
            and token.isascii()]


def base_tokenizer():
    """(vocab, merges) of the embedded base."""
    vocab, merges = ((BASE / "tokenizer" / name).read_text(encoding="utf-8")
                     for name in ("vocab.json", "merges.txt"))
    return json.loads(vocab), [tuple(line.split()) for line in merges.splitlines()[1:]]


def read_record():
    """The dict in references.json.gz."""
    return json.loads(gzip.decompress(RECORD.read_bytes()))


# ---- written checkpoints -------------------------------------------------------------------

def save_file(state, file):
    """Write tensors in fp16, which is exact for the random ones and halves the work."""
    save_float32({name: tensor.half() for name, tensor in state.items()}, file)


def write_zeros(file, shapes):
    """Write a sparse fp16 safetensors file with the given names and shapes.

    All numbers are zero, but the last one of each tensor is 1.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = dict(dtype="F16", shape=shape, data_offsets=[begin, end])
    text = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            if begin < end:
                f.seek(8 + len(text) + end - 2)
                f.write(struct.pack("<e", 1.0))


def folder_states(states):
    """{part: {folder name: tensor}}; the autoencoder's attention has today's names."""
    unet, vae, text = states
    return {"unet": {checkpoints.unet_folder_name(key, 2): tensor for key, tensor in unet.items()},
            "vae": {checkpoints.vae_folder_name(key, 4): tensor for key, tensor in vae.items()},
            "text_encoder": {f"text_model.{key}": tensor for key, tensor in text.items()}}


def write_folder(path, name, states):
    """Write an SD folder with the embedded base's tokenizer and an old scheduler config."""
    parts, model = folder_states(states), MODELS[name]
    for part, config in (("unet", model["unet"]), ("vae", model["vae"]),
                         ("text_encoder", model["text"]), ("scheduler", SCHEDULE)):
        (path / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (path / part / file).write_text(json.dumps(config))
    for part, stem in PARTS.items():
        save_file(parts[part], path / part / f"{stem}.safetensors")
    (path / "tokenizer").symlink_to(BASE / "tokenizer")
    (path / "model_index.json").write_text("{}")
    return path


def write_tokenizer(folder, vocab, merges, pad=None):
    """Write a tokenizer's folder with the files of the original repositories."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if pad:
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(pad_token=pad)))


def write_random_bps(file, task, config=None, /, **metadata):
    """Write a BPS file of a task; random ports make it steer. config: by default the base's."""
    torch.manual_seed(0)
    config = config or config_for(checkpoints.load_unet(BASE).config, TASKS[task].channels, 4)
    bps = BPS(config)
    for port in bps.zero_blocks:
        if port is not None:
            torch.nn.init.normal_(port.weight, std=0.002)
    save_bps(bps, file, dict(task=task, size=64, context_dim=128) | metadata)
    return file


def single_file_of(states):
    """{name with its prefix: tensor} of our state dicts (U-Net, autoencoder, text)."""
    return {f"{prefix}{key}": tensor for prefix, state in zip(PREFIXES, states)
            for key, tensor in state.items()}


def single_file(states, text_prefix=PREFIXES[2]):
    """{name: tensor} of a single file, with what training leaves in one."""
    state = single_file_of(states[:2])
    state |= {f"{text_prefix}{key}": tensor for key, tensor in states[2].items()}
    return state | {name: torch.zeros(1) for name in (
        "model_ema.decay", "model_ema.diffusion_modelout2bias", "model_ema.num_updates", "betas",
        "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "log_one_minus_alphas_cumprod",
        "posterior_mean_coef1", "logvar", "lvlb_weights", "scale_factor",
        "first_stage_model.loss.logvar",
        "first_stage_model.model_ema.decay", f"{text_prefix}embeddings.position_ids")}


# ---- with diffusers and transformers -------------------------------------------------------

def peer_modules(model, meta=False):
    """U-Net and autoencoder of diffusers, text encoder of transformers, for a MODELS entry."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta" if meta else "cpu"):
        return (UNet2DConditionModel(**model["unet"]).eval(), AutoencoderKL(**model["vae"]).eval(),
                CLIPTextModel(CLIPTextConfig(**model["text"], bos_token_id=0,
                                             eos_token_id=2)).eval())


def to_folder_names(single, model):
    """State dicts (U-Net, autoencoder, text) of a single file by diffusers' own rules.

    single: {name with its prefix: tensor}; the text encoder may be CLIP's or OpenCLIP's.
    """
    from diffusers.loaders import single_file_utils as rules
    unet = rules.convert_ldm_unet_checkpoint(dict(single), dict(model["unet"], layers_per_block=2,
                                                                class_embed_type=None,
                                                                addition_embed_type=None))
    vae = rules.convert_ldm_vae_checkpoint(dict(single), model["vae"])
    if any("resblocks" in name for name in single):
        text = rules.convert_open_clip_checkpoint(peer_modules(model, meta=True)[2], dict(single))
    else:
        text = rules.convert_ldm_clip_checkpoint(dict(single))
    return unet, vae, {name.removeprefix("text_model."): tensor for name, tensor in text.items()
                       if "position_ids" not in name}


def openclip_names(blocks):
    """Names of OpenCLIP's text tower in SD 2 single files."""
    block = ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_weight",
             "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_fc.weight",
             "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    names = ["positional_embedding", "token_embedding.weight", "ln_final.weight", "ln_final.bias",
             "text_projection", "logit_scale"]
    return names + [f"transformer.resblocks.{i}.{name}" for i in range(blocks) for name in block]


def name_tables():
    """{part: {name in a single file: name(s) in a folder}} by diffusers' own rules."""
    ours, model = our_modules(MODELS["sd15"], meta=True), MODELS["sd15"]
    single = single_file_of([module.state_dict() for module in ours])
    tagged = {name: torch.tensor(i) for i, name in enumerate(single)}
    names = list(single)
    tables = {part: {names[tag]: name for name, tag in state.items()}
              for part, state in zip(("unet", "vae", "text"), to_folder_names(tagged, model))}
    openclip = [f"cond_stage_model.model.{name}" for name in openclip_names(23)]
    rows = {name: torch.arange(3072 if "in_proj" in name else 1024) + 10_000 * i
            for i, name in enumerate(openclip)}
    rows = {name: value[:, None].expand(-1, 2) if "in_proj_weight" in name else value
            for name, value in rows.items()}
    tables["openclip"] = {}
    for name, value in to_folder_names(rows, MODELS["sd21"])[2].items():
        if "text_projection" in name:
            continue
        first = value.flatten()[0].item()
        tables["openclip"][name] = [openclip[first // 10_000], first % 10_000]
    return tables


def our_modules(model, meta=False):
    """Our U-Net, autoencoder and text encoder for a MODELS entry."""
    text = model["text"]
    with torch.device("meta" if meta else "cpu"):
        return (unet.UNet(unet.UNetConfig(**checkpoints.unet_config_from_json(model["unet"], ""))),
                vae.AutoencoderKL(vae.VAEConfig(**checkpoints.vae_config_from_json(model["vae"]))),
                clip.CLIPTextModel(clip.CLIPTextConfig(
                    text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"],
                    text["vocab_size"], text["hidden_act"])))


@torch.inference_mode()
def our_outputs(modules, model):
    """{what: tensor}: outputs of our modules for the inputs above."""
    unet, vae, text = modules
    x, z = vae_inputs()
    latent, ids = vae.encode(x), text_ids(model["text"]["vocab_size"])
    return dict(eps=unet(*unet_inputs(model["unet"])), mean=latent.mean, std=latent.std,
                x=vae.decode(z), context=text(ids))


def small_peers(name):
    """Small models of diffusers and transformers, with random_weights loaded by their rules."""
    model = MODELS[name]
    ours, theirs = our_modules(model, meta=True), peer_modules(model)
    single = single_file_of([random_weights(module, seed) for seed, module in enumerate(ours)])
    for module, state in zip(theirs, to_folder_names(single, model)):
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        module.load_state_dict({key: value.reshape(shapes[key]) for key, value in state.items()})
    return theirs


@torch.inference_mode()
def peer_outputs(peers, model):
    """{what: tensor}: outputs of the peers for the same inputs."""
    unet, vae, text = peers
    factor = vae.config.scaling_factor
    x, z = vae_inputs()
    latent = vae.encode(x).latent_dist
    ids = text_ids(model["text"]["vocab_size"])
    return dict(eps=unet(*unet_inputs(model["unet"])).sample, mean=latent.mean * factor,
                std=latent.std * factor, x=vae.decode(z / factor).sample,
                context=text(ids).last_hidden_state)


def peer_trajectory(config, sampler, steps, start):
    """(timesteps, every z_t) of diffusers' scheduler of this name; z_t = a z_0 + s eps.

    start: float64 noise. Absent keys of a config get Stable Diffusion's own values for latents, as
    in diffusers' pipelines; the default spacing is each scheduler's own.
    """
    import diffusers
    kinds = {"ddim": "DDIMScheduler", "dpm++2m": "DPMSolverMultistepScheduler",
             "euler": "EulerDiscreteScheduler"}
    repaired = dict(set_alpha_to_one=False, steps_offset=1) | config | dict(clip_sample=False)
    karras = dict(use_karras_sigmas=True) if sampler.endswith("-karras") else {}
    scheduler = getattr(diffusers, kinds[sampler.removesuffix("-karras")]).from_config(
        repaired, **karras)
    scheduler.set_timesteps(steps)
    z, trajectory = start * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        prediction = predict(scheduler.scale_model_input(z, t).double(), t.item())
        z = scheduler.step(prediction, t, z).prev_sample.double()
        sigma = scheduler.sigmas[i + 1].item() if sampler.startswith("euler") else 0.0
        trajectory.append(z / (1 + sigma**2) ** 0.5)
    return scheduler.timesteps.tolist(), torch.cat(trajectory)


def main():
    """Write both files."""
    import diffusers
    import transformers
    tensors, timesteps = {}, {}
    for name in ("small1", "small2"):
        for what, value in peer_outputs(small_peers(name), MODELS[name]).items():
            value = value[:, ::19] if what == "context" else value     # every 19th is enough
            tensors[f"{name}.{what}"] = value.contiguous()
    for config, sampler in itertools.product(SCHEDULERS, SAMPLERS):
        steps, trajectory = peer_trajectory(SCHEDULERS[config], sampler, 10,
                                            numbers(6, 1, 2, 1, 2).double())
        tensors[f"{config}.{sampler}"] = trajectory
        timesteps[f"{config}.{sampler}"] = steps
    vocab, merges = base_tokenizer()
    tokens = {}
    for pad in ("<|endoftext|>", "!"):
        tokenizer = transformers.CLIPTokenizerFast(vocab=vocab, merges=merges, pad_token=pad)
        tokens[pad] = tokenizer(texts(300, words_of(vocab)), padding="max_length", max_length=77,
                                truncation=True).input_ids
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    save_float32(tensors, TENSORS, versions)
    # with every key, as saved today; the official configs have fewer
    configs = {name: {part: json.loads(module.to_json_string() if part != "text" else
                                       module.config.to_json_string())
                      for part, module in zip(("unet", "vae", "text"),
                                              peer_modules(MODELS[name], meta=True))}
               for name in ("sd15", "sd21")}
    record = dict(names=name_tables(), tokens=tokens, timesteps=timesteps, configs=configs,
                  versions=versions)
    RECORD.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    print(TENSORS, RECORD)


if __name__ == "__main__":
    main()
