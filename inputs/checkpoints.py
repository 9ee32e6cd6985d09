"""Stable Diffusion in files: load the networks of 1.x and 2.x checkpoints, and reject all others.

Attributes of our modules carry the names of the single-file layout, so a single file loads without
renaming. The functions *_name below map a module's key to its name in any other layout. Sizes come
from a folder's config.json, or from the tensors' shapes in a single file.

    unet, vae = load_unet("tiny/model"), load_vae("tiny/model")
    tokenizer, text_model = load_clip("tiny/model")
    schedule = load_schedule("tiny/model")
"""
import functools
import itertools
import re
import warnings
from dataclasses import fields
from pathlib import Path

import torch

from clip import ACTIVATIONS, BEGIN, END, CLIPTextConfig, CLIPTextModel, Tokenizer
from diffusion import PREDICTION_TYPES, NoiseSchedule
from inputs.files import read_json, read_utf8
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig
from weights import (MALFORMED, PICKLES, Checkpoint, UserError, as_user_error, check_types,
                     read_header, shortened)


UNET_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"       # names of weights files
SUPPORTED = "Only text-to-image models of SD 1.x and 2.x are supported."
OTHER_WIDTHS = {2048: "an SDXL", 1280: "an SDXL refiner"}     # of the text states
OTHER_CHANNELS = {9: "an inpainting", 8: "an InstructPix2Pix", 7: "an upscaler", 5: "a depth"}
SD2_WIDTH, SD2_TEXT_LAYERS = 1024, 23
SD2_PAD = "!"

# What a field of our config dataclasses is called in a config.json, if not by its own name.
CONFIG_KEYS = dict(
    channels="block_out_channels", blocks_per_level="layers_per_block",
    context_dim="cross_attention_dim", norm_groups="norm_num_groups",
    linear_projection="use_linear_projection", spacing="timestep_spacing")
# Keys of a config.json that change the graph, but no tensor's name or shape, with the values that
# are implemented.
UNET_FIXED = dict(
    act_fn="silu", norm_eps=1e-5, downsample_padding=1, mid_block_scale_factor=1,
    center_input_sample=False, resnet_skip_time_act=False, resnet_out_scale_factor=1.0,
    time_embedding_act_fn=None, timestep_post_act=None, flip_sin_to_cos=True, freq_shift=0,
    class_embed_type=None)
VAE_FIXED = dict(act_fn="silu", shift_factor=None, latents_mean=None, latents_std=None)
TEXT_FIXED = dict(layer_norm_eps=1e-5, hidden_act=tuple(ACTIVATIONS))
SCHEDULE_FIXED = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", trained_betas=None,
                      rescale_betas_zero_snr=False, prediction_type=PREDICTION_TYPES,
                      timestep_spacing=(None, "leading", "trailing", "linspace"),
                      steps_offset=(0, 1))


# ---- loading -------------------------------------------------------------------------------

def load_unet(path, dtype=torch.float32, device="cpu"):
    """Frozen UNet of an SD folder or single .safetensors file."""
    return read_unet(path).build(UNet, UNetConfig, dtype, device)


def load_vae(path, dtype=torch.float32, device="cpu", base=None):
    """Frozen AutoencoderKL of an SD folder or single file, or of a folder or file of its own.

    fp16 is too narrow for some autoencoders: draw with float32. base: the path whose U-Net it is
    loaded for. What a file alone does not say, such as its scaling factor, is the base's.
    """
    checkpoint = read_vae(path)
    if base:
        file = Path(base) / "vae" / "config.json"
        of_base = vae_config_from_json(read_config(file) if file.is_file() else {})
        checkpoint = checkpoint._replace(config=of_base | checkpoint.config)
        factor = checkpoint.config["scaling_factor"]
        if factor != of_base["scaling_factor"]:
            warnings.warn(f"{path} scales latents by {factor}, but {base} was trained with "
                          f"{of_base['scaling_factor']}. They may not fit together.")
    return checkpoint.build(AutoencoderKL, VAEConfig, dtype, device)


def load_clip(path, tokenizer_path=None, dtype=torch.float32, device="cpu"):
    """(Tokenizer, frozen CLIPTextModel) of an SD folder or single .safetensors file.

    tokenizer_path: the folder of a tokenizer, or an SD folder; required for a single file. The
    token that pads a prompt is then the model's, whatever the folder says.
    """
    checkpoint, pad_token = read_text(path), None
    if tokenizer_path:
        pad_token = SD2_PAD if checkpoint.config["width"] == SD2_WIDTH else END
    folder = find_tokenizer(path, tokenizer_path)
    tokenizer = load_tokenizer(folder, pad_token)
    check_vocab(tokenizer.vocab, folder, checkpoint)
    return tokenizer, checkpoint.build(CLIPTextModel, CLIPTextConfig, dtype, device)


def load_tokenizer(folder, pad_token=None):
    """Tokenizer of a folder with vocab.json and merges.txt, or with tokenizer.json.

    pad_token: instead of the folder's own.
    """
    # `tokenizers` raises plain Exceptions
    with as_user_error(Exception, f"{folder} holds no CLIP tokenizer"):
        vocab, merges, own_pad_token, added = read_tokenizer(Path(folder))
        return Tokenizer(vocab, merges, pad_token or own_pad_token, added)


# ---- rejecting -----------------------------------------------------------------------------

def checked(read):
    """Decorate a reader of a path: malformed content raises UserError.

    The readers themselves name the known problems. This covers all others, such as a number in
    place of a list or a tensor with too few dimensions.
    """
    @functools.wraps(read)
    def read_checked(path, *args):
        with as_user_error(MALFORMED, f"{path}: its names or sizes are not those of SD 1.x or 2.x",
                           SUPPORTED):
            return read(path, *args)

    return read_checked


def reject_other_models(state, path):
    """Raise UserError if a file has the names or shapes of a known other kind of model."""
    for name, stored in state.items():
        other = None
        if name in CONV_IN:
            other = OTHER_CHANNELS.get(stored.shape[1])
        elif name.endswith("attn2.to_k.weight"):
            other = OTHER_WIDTHS.get(stored.shape[1])
        elif name.startswith("conditioner.embedders."):
            other = "an SDXL"
        if other:
            raise UserError(f"{path} is {other} model. {SUPPORTED}")


def check_values(config, implemented, file):
    """Raise UserError if a key of the config has a value that would change the graph.

    implemented: {key: its only value, or a tuple of values}; the first is that of an absent key.
    If the config has a list, each entry is checked.
    """
    for key, choices in implemented.items():
        choices = choices if isinstance(choices, tuple) else (choices,)
        value = config.get(key, choices[0])
        # diffusers writes "off" as false, null or 0
        if any((entry or None) not in [choice or None for choice in choices]
               for entry in (value if isinstance(value, list) else [value])):
            raise UserError(f"{file}: {key} must be {' or '.join(map(repr, choices))}, got "
                            f"{value!r}. Nothing else is implemented.")


# ---- folders -------------------------------------------------------------------------------

def read_config(file):
    """Dict of a config.json; null is the same as an absent key."""
    return {key: value for key, value in read_json(file).items() if value is not None}


def config_arguments(config, Config):
    """Arguments of our dataclass from a config.json's dict; absent keys have its defaults."""
    values = {field.name: config.get(CONFIG_KEYS.get(field.name, field.name), field.default)
              for field in fields(Config)}
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()}


def find_weights(folder, stem):
    """Weights files of a network's folder: the exact name, else shards, fp16, or the only file.

    Warn if the name is not the exact one. If there is none, return what read_header explains.
    """
    exact = f"{stem}.safetensors"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. A Stable Diffusion folder has unet/, vae/, "
                        f"text_encoder/ and tokenizer/.")
    if (folder / exact).is_file():
        return [folder / exact]
    for index in sorted(folder.glob("*.index*.json"), key=lambda file: (
            file.name != f"{exact}.index.json", ".fp16." not in file.name, file)):
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if shards and all(name.endswith(".safetensors") for name in shards):
            if index.name != f"{exact}.index.json":
                warnings.warn(f"{folder}: no {exact}, using the shards of {index.name}")
            return [folder / name for name in shards]
    files = sorted(folder.glob("*.safetensors"))
    candidates = [file for file in files if file.name == f"{stem}.fp16.safetensors"] or files
    if len(candidates) == 1:
        warnings.warn(f"{folder}: no {exact}, using {candidates[0].name}")
        return candidates
    if files:
        raise UserError(f"{folder} has several weights files: "
                        f"{', '.join(file.name for file in files)}. Rename one to {exact}.")
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in PICKLES]
    return pickles[:1] or [folder / exact]


def weights_files(path, vae_path=None):
    """{network: its weights files} of an SD folder or single file, and another autoencoder."""
    return dict(base=read_unet(path).files(), vae=read_vae(vae_path or path).files(),
                text=read_text(path).files())


def config_files(*paths):
    """Sorted .json and .txt files of SD folders, which say how the weights are used."""
    folders = [Path(path) for path in paths if path and Path(path).is_dir()]
    return sorted({file for folder in folders for file in folder.rglob("*")
                   if file.suffix in (".json", ".txt")})


def read_folder(folder, stem, implemented):
    """(dict of config.json, {name: Stored}, first weights file) of a network's folder.

    implemented: as for check_values.
    """
    files = find_weights(folder, stem)
    config, state = read_config(folder / "config.json"), {}
    for file in files:
        state |= read_header(file)
    reject_other_models(state, folder)
    check_values(config, implemented, folder / "config.json")
    return config, state, files[0]


# ---- single files --------------------------------------------------------------------------

CONV_IN = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight")
SINGLE_FILE_PARTS = {"model.diffusion_model.": "U-Net", "first_stage_model.": "autoencoder",
                     "cond_stage_model.": "text encoder"}
# What training leaves in single files: averages, the noise schedule, the autoencoder's own loss.
SINGLE_FILE_IGNORED = re.compile(
    r"(first_stage_model\.)?(model_ema|loss)\.|"
    r"(betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|lvlb_weights|scale_factor)$")


def read_single_file(path, prefix):
    """{name without the prefix: Stored} of one network in a single file.

    prefix: one of SINGLE_FILE_PARTS. All other tensors have to be of another part or ignored.
    """
    state = read_header(path)
    reject_other_models(state, path)
    kept = [name for name in state if not SINGLE_FILE_IGNORED.match(name)]
    unexpected = [name for name in kept if not name.startswith(tuple(SINGLE_FILE_PARTS))]
    if unexpected:
        raise UserError(f"{path} is no complete Stable Diffusion checkpoint. It may be a LoRA or "
                        f"one network alone: {len(unexpected)} unexpected tensors: "
                        f"{shortened(unexpected)}")
    state = {name.removeprefix(prefix): state[name] for name in kept if name.startswith(prefix)}
    if not state:
        fix = "Add --vae" if prefix == "first_stage_model." else "Give a complete checkpoint"
        raise UserError(f"{path} has no {SINGLE_FILE_PARTS[prefix]}. {fix}.")
    return state


def _count(state, name, first=0):
    """Number of consecutive names name.format(first), name.format(first + 1) .. in the state."""
    numbers = itertools.takewhile(lambda n: name.format(n) in state, itertools.count(first))
    return len(list(numbers))


def renamed(name, names):
    """A tensor's name with the parts in `names`, {old: new}, replaced one after the other."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


# ---- U-Net ---------------------------------------------------------------------------------

UNET_NAMES = {
    ".time_embed.0.": ".time_embedding.linear_1.", ".time_embed.2.": ".time_embedding.linear_2.",
    ".input_blocks.0.0.": ".conv_in.", ".out.0.": ".conv_norm_out.", ".out.2.": ".conv_out.",
    ".middle_block.0.": ".mid_block.resnets.0.", ".middle_block.1.": ".mid_block.attentions.0.",
    ".middle_block.2.": ".mid_block.resnets.1.", ".in_layers.0.": ".norm1.",
    ".in_layers.2.": ".conv1.", ".emb_layers.1.": ".time_emb_proj.", ".out_layers.0.": ".norm2.",
    ".out_layers.3.": ".conv2.", ".skip_connection.": ".conv_shortcut."}


def unet_folder_name(key, blocks_per_level):
    """Name in the folder layout of a U-Net key of the single-file layout."""
    key = renamed(f".{key}", UNET_NAMES).removeprefix(".")
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", key)
    if not match:
        return key
    path, block, layer, rest = match.groups()
    # a level of either path has blocks_per_level + 1 entries; the input path starts at 1
    level, i = divmod(int(block) - (path == "input"), blocks_per_level + 1)
    level = f"{'down' if path == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{level}.downsamplers.0.conv.{rest[3:]}"
    if rest.startswith("conv."):
        return f"{level}.upsamplers.0.{rest}"
    return f"{level}.{'resnets' if layer == '0' else 'attentions'}.{i}.{rest}"


def unet_config_from_json(config, file):
    """Arguments of UNetConfig from a folder's config.json; absent keys are SD 1.5's."""
    arguments = config_arguments(config, UNetConfig)
    channels = arguments["channels"]
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    # SD's configs call the number of heads attention_head_dim
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = tuple(heads) if isinstance(heads, list) else (heads,) * len(channels)
    if not len(heads) == len(channels) == len(down) or any(
            c % head for c, head in zip(channels, heads)):
        raise UserError(f"{file}: {len(down)} blocks, block_out_channels {list(channels)} and "
                        f"heads {list(heads)} don't fit together.")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    return arguments | dict(heads=heads, attention=attention,
                            latent_channels=config.get("out_channels", 4))


def unet_config_from_shapes(state, path):
    """Arguments of UNetConfig from the shapes in a single file, which has no config.

    The width of the text states tells SD 1.x (768, with 8 heads) from SD 2.x (1024, with heads of
    width 64).
    """
    ops = [n for n in range(99) if f"input_blocks.{n}.0.op.weight" in state]
    stride = ops[0] if ops else _count(state, "input_blocks.{}.0.in_layers.2.weight", 1) + 1
    levels = [1 + stride * level for level in range(len(ops) + 1)]
    channels = tuple(state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in levels)
    [context_dim, *_] = [stored.shape[1] for name, stored in state.items()
                         if name.endswith("attn2.to_k.weight")]
    if context_dim not in (768, SD2_WIDTH):
        raise UserError(f"{path} is an unknown model with text states of width {context_dim}. "
                        f"{SUPPORTED}")
    return dict(channels=channels, context_dim=context_dim, blocks_per_level=stride - 1,
                attention=tuple(f"input_blocks.{n}.1.norm.weight" in state for n in levels),
                heads=tuple(8 if context_dim == 768 else c // 64 for c in channels),
                latent_channels=state["out.2.weight"].shape[0] if "out.2.weight" in state else 4,
                linear_projection=context_dim == SD2_WIDTH)


@checked
def read_unet(path):
    """Checkpoint of the U-Net in an SD folder or single file."""
    path = Path(path)
    if not path.is_dir():
        state = read_single_file(path, "model.diffusion_model.")
        return Checkpoint(unet_config_from_shapes(state, path), state, str, path)
    config, state, file = read_folder(path / "unet", UNET_STEM, UNET_FIXED)
    arguments = unet_config_from_json(config, path / "unet" / "config.json")
    key_map = functools.partial(unet_folder_name, blocks_per_level=arguments["blocks_per_level"])
    return Checkpoint(arguments, state, key_map, file)


# ---- autoencoder ---------------------------------------------------------------------------

VAE_NAMES = {".block.": ".resnets.", ".nin_shortcut.": ".conv_shortcut.",
             ".downsample.conv.": ".downsamplers.0.conv.", ".upsample.conv.": ".upsamplers.0.conv.",
             ".norm_out.": ".conv_norm_out.", ".mid.block_1.": ".mid_block.resnets.0.",
             ".mid.block_2.": ".mid_block.resnets.1.", ".mid.attn_1.": ".mid_block.attentions.0."}
# The attention in the middle has three sets of names, which older files mix.
VAE_ATTENTION = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
                 ".proj_out.": ".to_out.0.", ".query.": ".to_q.", ".key.": ".to_k.",
                 ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# name of an autoencoder's tensor with its attention called group_norm, to_q .. to_out.0
vae_attention_name = functools.partial(renamed, names=VAE_ATTENTION)


def vae_folder_name(key, levels):
    """Name in the folder layout of an autoencoder's key of the single-file layout."""
    key = renamed(vae_attention_name(key), VAE_NAMES)
    key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
    return re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)


def vae_config_from_json(config):
    """Arguments of VAEConfig from a folder's config.json; absent keys are SD's."""
    return config_arguments(config, VAEConfig)


def vae_config_from_shapes(state):
    """Arguments of VAEConfig from the shapes in a file of either layout."""
    level, block = "encoder.down_blocks.{}", ".resnets.{}.conv1.weight"
    if not any(name.startswith("encoder.down_blocks.") for name in state):
        level, block = "encoder.down.{}", ".block.{}.conv1.weight"
    first = level + block.format(0)
    channels = tuple(state[first.format(i)].shape[0] for i in range(_count(state, first)))
    return dict(channels=channels,
                blocks_per_level=_count(state, level.format(0) + block)) if channels else {}


@checked
def read_vae(path):
    """Checkpoint of an autoencoder in an SD folder or single file, or in files of its own."""
    path = Path(path)
    if path.is_dir():
        is_vae = (path / "config.json").is_file() and not (path / "vae").is_dir()
        config, state, file = read_folder(path if is_vae else path / "vae", UNET_STEM, VAE_FIXED)
        arguments = vae_config_from_json(config)
    else:
        state, file = read_header(path), path
        if any(name.startswith(("encoder.", "decoder.")) for name in state):
            state = {name: stored for name, stored in state.items()
                     if not SINGLE_FILE_IGNORED.match(name)}
        else:
            state = read_single_file(path, "first_stage_model.")
        arguments = vae_config_from_shapes(state)
    state = {vae_attention_name(name): stored for name, stored in state.items()}
    key_map = vae_attention_name
    if any(".up_blocks." in name for name in state):
        key_map = functools.partial(vae_folder_name, levels=len(VAEConfig(**arguments).channels))
    return Checkpoint(arguments, state, key_map, file)


def vae_factor(path):
    """Downsampling factor f of an autoencoder, without loading it."""
    return 2 ** (len(VAEConfig(**read_vae(path).config).channels) - 1)


# ---- text encoder --------------------------------------------------------------------------

TEXT_IGNORED = re.compile(r"(^|\.)(position_ids|logit_scale|text_projection|attn_mask)\b|"
                          r"(^|\.)(vision_model|visual_projection|visual)\.")
OPENCLIP_NAMES = {"encoder.layers.": "transformer.resblocks.", ".self_attn.": ".attn.",
                  ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.",
                  ".mlp.fc2.": ".mlp.c_proj.", "final_layer_norm.": "ln_final.",
                  "embeddings.token_embedding.": "token_embedding.",
                  "embeddings.position_embedding.weight": "positional_embedding"}
# name of a text encoder's key in an SD 2 single file, where split_in_proj was applied
openclip_name = functools.partial(renamed, names=OPENCLIP_NAMES)


def split_in_proj(state, width):
    """The state with each in_proj (3 D, ..) of attention split into q_proj, k_proj and v_proj."""
    split = {}
    for name, stored in state.items():
        if ".attn.in_proj_" not in name:
            split[name] = stored
            continue
        for i, letter in enumerate("qkv"):
            rows = slice(i * width, (i + 1) * width)
            split[name.replace("in_proj_", f"{letter}_proj.")] = stored._replace(
                shape=(width, *stored.shape[1:]), rows=rows)
    return split


@checked
def read_text(path):
    """Checkpoint of the CLIP text encoder in an SD folder or single file."""
    path = Path(path)
    config = {}
    if path.is_dir():
        config, state, file = read_folder(path / "text_encoder", TEXT_STEM, TEXT_FIXED)
    else:
        state, file = read_single_file(path, "cond_stage_model."), path
    state = {name: stored for name, stored in state.items() if not TEXT_IGNORED.search(name)}
    # the prefix is whatever precedes the embedding: text_model., transformer. or several
    embedding = next((name for name in state if name.endswith("token_embedding.weight")), None)
    if embedding is None:
        raise UserError(f"{file} has no CLIP text encoder. Give a folder or file with one.")
    prefix = embedding.removesuffix("token_embedding.weight").removesuffix("embeddings.")
    vocab_size, width = state[embedding].shape
    state = {name.removeprefix(prefix): stored for name, stored in state.items()}
    # without a config.json: heads are 64 wide in SD 1 and SD 2
    heads = config.get("num_attention_heads", width // 64)
    if width % heads:
        raise UserError(f"{file}: num_attention_heads must divide the width {width}, got {heads}.")
    layers = config.get("num_hidden_layers", _count(state, "encoder.layers.{}.layer_norm1.weight"))
    key_map = str
    if "token_embedding.weight" in state:
        # OpenCLIP: SD 2 reads the states before the last of 24 blocks; some files don't contain it
        blocks = _count(state, "transformer.resblocks.{}.ln_1.weight")
        layers = blocks if blocks == SD2_TEXT_LAYERS else blocks - 1
        state = {name: stored for name, stored in split_in_proj(state, width).items()
                 if not name.startswith(f"transformer.resblocks.{layers}.")}
        key_map = openclip_name
    activation = config.get("hidden_act", "gelu" if width == SD2_WIDTH else "quick_gelu")
    arguments = dict(width=width, vocab_size=vocab_size, heads=heads, layers=layers,
                     activation=activation)
    return Checkpoint(arguments, state, key_map, file)


# ---- tokenizer -----------------------------------------------------------------------------

def find_tokenizer(path, tokenizer_path=None):
    """Folder of the tokenizer: tokenizer_path, else the one in an SD folder."""
    if tokenizer_path is None and not Path(path).is_dir():
        raise UserError(f"{path} is a single file, which has no tokenizer. Add --tokenizer, a "
                        f"folder with vocab.json and merges.txt, or with tokenizer.json.")
    folder = Path(tokenizer_path or path)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def read_tokenizer(folder):
    """Arguments of Tokenizer from a folder with vocab.json and merges.txt, or tokenizer.json."""
    def read(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    tokenizer = {}
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = read("vocab.json")
        lines = read_utf8(folder / "merges.txt").splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    elif tokenizer := read("tokenizer.json"):
        vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    else:
        raise UserError(f"{folder}: vocab.json or merges.txt is missing. A tokenizer is vocab.json "
                        f"and merges.txt, or tokenizer.json.")
    merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
    config = read("tokenizer_config.json")
    pad_token = read("special_tokens_map.json").get("pad_token") or config.get("pad_token") or END
    pad_token = pad_token["content"] if isinstance(pad_token, dict) else pad_token
    entries = [dict(content=token, id=number)
               for token, number in read("added_tokens.json").items()]
    entries += [entry | dict(id=int(number))
                for number, entry in config.get("added_tokens_decoder", {}).items()]
    entries += tokenizer.get("added_tokens", [])
    added = {entry["content"]: bool(entry.get("normalized", True)) for entry in entries}
    # all tokens but single letters are made by a merge
    made = {left + right for left, right in merges} | {BEGIN, END, pad_token} | added.keys()
    lost = [token for token in vocab if len(token.removesuffix("</w>")) > 1 and token not in made]
    if lost:
        raise UserError(f"{folder}: the merges of {len(lost)} tokens are missing, such as that of "
                        f"{lost[-1]!r}. Copy merges.txt again.")
    return vocab | {entry["content"]: entry["id"] for entry in entries}, merges, pad_token, added


def check_vocab(vocab, folder, checkpoint):
    """Raise UserError if a text encoder has no embedding for a token.

    vocab: {token: id} of the tokenizer in `folder`.
    """
    last, vocab_size = max(vocab, key=vocab.get), checkpoint.config["vocab_size"]
    if vocab[last] >= vocab_size:
        raise UserError(f"{folder}: token {last!r} has id {vocab[last]}, but {checkpoint.file} "
                        f"has ids up to {vocab_size - 1}. Give the tokenizer of this model.")
    if vocab[last] + 1 < vocab_size:
        warnings.warn(f"{folder}: {vocab[last] + 1} tokens, but {checkpoint.file} has "
                      f"{vocab_size}. Is it the tokenizer of this model?")


# ---- noise schedule ------------------------------------------------------------------------

@checked
def load_schedule(path, prediction_type=None):
    """NoiseSchedule of an SD folder; a single file has Stable Diffusion's.

    prediction_type: overrides the folder's; required for a single file of SD 2.
    """
    file = Path(path) / "scheduler" / "scheduler_config.json"
    config = read_config(file) if file.is_file() else {}
    if prediction_type:
        config["prediction_type"] = prediction_type
    if not config and read_unet(path).config["context_dim"] == SD2_WIDTH:
        raise UserError(f"{path}: the prediction type of this SD 2 model is unknown. Add "
                        f"--prediction-type epsilon (512 px models) or v_prediction (768 px).")
    check_values(config, SCHEDULE_FIXED, file)
    if config.get("_class_name") == "LCMScheduler":
        warnings.warn(f"{path} is distilled for few steps (LCM). Draw with --guidance 1 to 2 and "
                      f"--steps 4 to 8.")
    arguments = config_arguments(config, NoiseSchedule)
    check_types(arguments, dict(beta_start=0.1, beta_end=0.1, set_alpha_to_one=False,
                                prediction_type="epsilon"), file)
    if not 0 < arguments["beta_start"] <= arguments["beta_end"] < 1:
        raise UserError(f"{file}: need 0 < beta_start <= beta_end < 1, got "
                        f"{arguments['beta_start']} and {arguments['beta_end']}.")
    return NoiseSchedule(**arguments)
