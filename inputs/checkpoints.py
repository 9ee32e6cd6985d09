"""How Stable Diffusion and BPS lie in files: names, sizes, and what other models look like.

The modules of unet.py, vae.py and clip.py carry the names of the single-file layout, so that one
loads as it is. Other layouts go through the functions *_name below, from a module's key to the
file's. A folder's config.json says the sizes; of a single file, the tensors' shapes do.

    checkpoint = read_unet("tiny/model")        # config, tensors, and how keys are spelled there
"""
import functools
import json
import re
import warnings
from pathlib import Path

from safetensors import safe_open

from diffusion import PREDICTION_TYPES, SPACINGS, NoiseSchedule
from weights import (
    PICKLES,
    SENSELESS,
    Checkpoint,
    UserError,
    first_line,
    read_header,
    read_json,
    shortened,
)

UNET_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"       # names of weights files
TAKES = "this program takes text-to-image models of SD 1.x and 2.x"
SDXL_WIDTHS = {2048: "an SD XL model", 1280: "an SD XL refiner"}
SD2_TEXT_LAYERS = 23
IN_CHANNELS_OF = {9: "an in-painting", 8: "an InstructPix2Pix", 7: "an up-scaler", 5: "a depth"}

# Keys of a config.json that would change the graph, with what is implemented of them.
UNET_FIXED = dict(
    _class_name="UNet2DConditionModel", act_fn="silu", norm_eps=1e-5, downsample_padding=1,
    conv_in_kernel=3, conv_out_kernel=3, class_embed_type=None, num_class_embeds=None,
    class_embeddings_concat=False, projection_class_embeddings_input_dim=None,
    addition_embed_type=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
    attention_type="default", cross_attention_norm=None, only_cross_attention=False,
    mid_block_only_cross_attention=None, dual_cross_attention=False,
    transformer_layers_per_block=1, reverse_transformer_layers_per_block=None,
    mid_block_type="UNetMidBlock2DCrossAttn", mid_block_scale_factor=1, center_input_sample=False,
    resnet_time_scale_shift="default", resnet_skip_time_act=False, resnet_out_scale_factor=1.0,
    time_embedding_type="positional", time_embedding_dim=None, time_embedding_act_fn=None,
    timestep_post_act=None, time_cond_proj_dim=None, flip_sin_to_cos=True, freq_shift=0)
VAE_FIXED = dict(
    _class_name="AutoencoderKL", act_fn="silu", in_channels=3, out_channels=3,
    down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D",
    use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
    shift_factor=None, latents_mean=None, latents_std=None)
TEXT_FIXED = dict(max_position_embeddings=77, layer_norm_eps=1e-5)
SCHEDULE_FIXED = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", trained_betas=None,
                      rescale_betas_zero_snr=False, prediction_type=PREDICTION_TYPES,
                      timestep_spacing=(None, *SPACINGS), steps_offset=(0, 1))


# ---- refusing ------------------------------------------------------------------------------

def as_user_error(read):
    """Decorates a function that reads a path: content that makes no sense is a UserError too.

    What is known to occur is refused by name before; this is for the rest, such as a number where
    a list belongs or a tensor with too few dimensions.
    """
    @functools.wraps(read)
    def guarded(path, *args):
        """Reads the path; all errors name it."""
        try:
            return read(path, *args)
        except SENSELESS as error:
            raise UserError(f"{path}: its names or sizes are not those of SD 1.x or 2.x "
                            f"({type(error).__name__}: {first_line(error)}); {TAKES}") from error

    return guarded


def refuse_by_name(path, in_channels=None, context_dim=None):
    """Raises UserError if a U-Net's sizes are those of a known model for another task."""
    if context_dim in SDXL_WIDTHS:
        raise UserError(f"{path}: text states of width {context_dim}, "
                        f"{SDXL_WIDTHS[context_dim]}; {TAKES}")
    if in_channels in IN_CHANNELS_OF:
        raise UserError(f"{path}: {in_channels} input channels, {IN_CHANNELS_OF[in_channels]} "
                        f"model; {TAKES}")


def check_values(config, implemented, file):
    """Raises UserError if a key has a value that would change the graph; absent keys are right.

    implemented: {key: its value, or a tuple of them}. A list must hold nothing else.
    """
    for key, allowed in implemented.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        value = config.get(key, allowed[0])
        values = value if isinstance(value, list) else [value]
        # diffusers writes "off" as false, null or 0
        if any((entry or None) not in [choice or None for choice in allowed] for entry in values):
            raise UserError(f"{file}: {key} = {value!r} is not implemented; allowed is "
                            f"{' or '.join(map(repr, allowed))}")


# ---- folders -------------------------------------------------------------------------------

def read_config(file):
    """Returns the dict of a config.json without the keys that have no value, as if absent."""
    return {key: value for key, value in read_json(file).items() if value is not None}


def find_weights(folder, stem):
    """Returns the weights files of a part's folder: exact name, else shards, fp16, or the only one.

    A name that is not the exact one is warned of. Errors: UserError if there is none, only
    pickles, or a choice that cannot be made.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Stable Diffusion folder has unet/, vae/, "
                        f"text_encoder/ and tokenizer/")
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    exact = f"{stem}.safetensors.index.json"
    for index in sorted(folder.glob("*.index*.json"),
                        key=lambda file: (file.name != exact, ".fp16." not in file.name, file)):
        shards = set(read_json(index).get("weight_map", {}).values())
        if shards and all(name.endswith(".safetensors") for name in shards):
            if index.name != exact:
                warnings.warn(f"{folder}: no {stem}.safetensors; took the shards of {index.name}")
            return [folder / name for name in sorted(shards)]
    files = sorted(folder.glob("*.safetensors"))
    fp16 = folder / f"{stem}.fp16.safetensors"
    if fp16 in files or len(files) == 1:
        file = fp16 if fp16 in files else files[0]
        warnings.warn(f"{folder}: no {stem}.safetensors; took {file.name}")
        return [file]
    if files:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder}: which one? {names}; rename one to {stem}.safetensors")
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in PICKLES]
    if pickles:
        read_header(pickles[0])         # says why not
    raise UserError(f"{folder}: no {stem}.safetensors in it")


def config_files(*paths):
    """Returns the files beside the weights in SD folders that say how these are used, sorted."""
    folders = [Path(path) for path in paths if path and Path(path).is_dir()]
    return sorted({file for folder in folders for pattern in ("*.json", "*.txt")
                   for file in folder.rglob(pattern)})


def read_folder(folder, stem, implemented):
    """Returns (config.json as a dict, {name: Stored}, first file) of one part of an SD folder.

    implemented: as for check_values. Errors: UserError.
    """
    files = find_weights(folder, stem)
    config, state = read_config(folder / "config.json"), {}
    refuse_by_name(folder, config.get("in_channels"), config.get("cross_attention_dim"))
    check_values(config, implemented, folder / "config.json")
    for file in files:
        state |= read_header(file)
    return config, state, files[0]


# ---- single files --------------------------------------------------------------------------

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
SINGLE_FILE_PARTS = {"model.diffusion_model.": "U-Net", "first_stage_model.": "autoencoder",
                     "cond_stage_model.": "text encoder"}
# What training left in single files: averages, the noise schedule, the autoencoder's own loss.
SINGLE_FILE_IGNORED = re.compile(
    r"(first_stage_model\.)?(model_ema|loss)\.|"
    r"(betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|lvlb_weights|scale_factor)$")


def read_single_file(path, part):
    """Returns {name without the part's prefix: Stored} of a single file.

    part: one of SINGLE_FILE_PARTS. Errors: UserError if the part is not there, or the file holds
    another model or anything that is neither a part nor known to be of no use.
    """
    state = read_header(path)
    if any(name.startswith("conditioner.embedders.") for name in state):
        raise UserError(f"{path}: an SD XL model, or another with its names; {TAKES}")
    if CONV_IN in state:
        refuse_by_name(path, state[CONV_IN].shape[1])
    if not any(name.startswith(tuple(SINGLE_FILE_PARTS)) for name in state):
        raise UserError(f"{path}: no tensor of it begins with "
                        f"{' or '.join(SINGLE_FILE_PARTS)}; it is not a Stable Diffusion file, "
                        f"but perhaps a LoRA or a part of one")
    strange = [name for name in state if not name.startswith(tuple(SINGLE_FILE_PARTS))
               and not SINGLE_FILE_IGNORED.match(name)]
    if strange:
        raise UserError(f"{path}: {len(strange)} unexpected tensors: {shortened(strange)}")
    state = {name.removeprefix(part): stored for name, stored in state.items()
             if name.startswith(part) and not SINGLE_FILE_IGNORED.match(name)}
    if not state:
        supply = "give one with --vae" if part == "first_stage_model." else "give a whole model"
        raise UserError(f"{path}: holds no {SINGLE_FILE_PARTS[part]}; {supply}")
    return state


def _count(state, name, first=0):
    """Returns how many of name.format(first), name.format(first + 1) .. there are without a gap."""
    number = first
    while name.format(number) in state:
        number += 1
    return number - first


# ---- U-Net ---------------------------------------------------------------------------------

UNET_NAMES = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
              "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
              "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
              "middle_block.2": "mid_block.resnets.1"}
RES_NAMES = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
             "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def unet_folder_name(key, blocks_per_level):
    """Returns what the folder layout calls a U-Net key of the single-file layout."""
    for single, folder in UNET_NAMES.items():
        key = re.sub(rf"^{re.escape(single)}\.", f"{folder}.", key)
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", key)
    if match:
        path, block, layer, rest = match.groups()
        # a level of either path is blocks_per_level + 1 entries; the input path starts at 1
        level, i = divmod(int(block) - (path == "input"), blocks_per_level + 1)
        side = "down_blocks" if path == "input" else "up_blocks"
        if rest.startswith("op."):
            key = f"{side}.{level}.downsamplers.0.conv.{rest[3:]}"
        elif rest.startswith("conv."):
            key = f"{side}.{level}.upsamplers.0.{rest}"
        else:
            key = f"{side}.{level}.{'resnets' if layer == '0' else 'attentions'}.{i}.{rest}"
    if ".resnets." in key:
        for single, folder in RES_NAMES.items():
            key = key.replace(f".{single}.", f".{folder}.")
    return key


def unet_config_from_json(config, file):
    """Returns UNetConfig's arguments from a folder's config.json; absent keys are SD 1.5's."""
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    mirrored = ["CrossAttnUpBlock2D" if with_text else "UpBlock2D" for with_text in attention][::-1]
    if set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"} or list(up) != mirrored:
        raise UserError(f"{file}: block types {down + up}; allowed are (CrossAttn)DownBlock2D "
                        f"and, mirrored, (CrossAttn)UpBlock2D")
    # SD's configs say attention_head_dim but mean the number of heads.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = (heads,) * len(channels) if isinstance(heads, int) else tuple(heads)
    for key in ("layers_per_block", "cross_attention_dim", "norm_num_groups", "sample_size"):
        if not isinstance(config.get(key, 1), int):
            raise UserError(f"{file}: {key} = {config[key]!r}; allowed is one number")
    groups = config.get("norm_num_groups", 32)
    if not len(heads) == len(channels) == len(attention) or \
            any(c % groups or c % head for c, head in zip(channels, heads)):
        raise UserError(f"{file}: block_out_channels {list(channels)}, {len(attention)} blocks, "
                        f"heads {list(heads)} and {groups} norm groups do not go together")
    return dict(channels=channels, attention=attention, heads=heads,
                blocks_per_level=config.get("layers_per_block", 2),
                context_dim=config.get("cross_attention_dim", 768),
                latent_channels=config.get("out_channels", 4),
                norm_groups=groups,
                linear_projection=config.get("use_linear_projection", False),
                sample_size=config.get("sample_size"))


def unet_config_from_shapes(state, path):
    """Returns UNetConfig's arguments of a single file, which says nothing of its sizes.

    The width of the text states tells SD 1.x (768), with 8 heads, from SD 2.x (1024), with heads
    of width 64.
    """
    ops = [n for n in range(99) if f"input_blocks.{n}.0.op.weight" in state]
    stride = ops[0] if ops else _count(state, "input_blocks.{}.0.in_layers.2.weight", 1) + 1
    levels = [1 + stride * level for level in range(len(ops) + 1)]
    try:
        channels = tuple(state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in levels)
        context_dim = next(stored.shape[1] for name, stored in state.items()
                           if name.endswith("attn2.to_k.weight"))
    except (KeyError, StopIteration):
        raise UserError(f"{path}: its U-Net's names are not those of SD 1.x or 2.x; "
                        f"{TAKES}") from None
    refuse_by_name(path, context_dim=context_dim)
    if context_dim not in (768, 1024):
        raise UserError(f"{path}: text states of width {context_dim}, an unknown model; {TAKES}")
    return dict(channels=channels, context_dim=context_dim, blocks_per_level=stride - 1,
                attention=tuple(f"input_blocks.{n}.1.norm.weight" in state for n in levels),
                heads=tuple(8 if context_dim == 768 else c // 64 for c in channels),
                latent_channels=state["out.2.weight"].shape[0] if "out.2.weight" in state else 4,
                linear_projection=context_dim == 1024)


def find_unet(path):
    """Returns the files that hold the U-Net of an SD folder or single file."""
    path = Path(path)
    return find_weights(path / "unet", UNET_STEM) if path.is_dir() else [path]


@as_user_error
def read_unet(path):
    """Returns the Checkpoint of the U-Net of an SD folder or single file."""
    path = Path(path)
    if not path.is_dir():
        state = read_single_file(path, "model.diffusion_model.")
        return Checkpoint(unet_config_from_shapes(state, path), state, str, path)
    config, state, file = read_folder(path / "unet", UNET_STEM, UNET_FIXED)
    if "conv_in.weight" in state:
        refuse_by_name(path, state["conv_in.weight"].shape[1])
    arguments = unet_config_from_json(config, path / "unet" / "config.json")
    spelling = functools.partial(unet_folder_name, blocks_per_level=arguments["blocks_per_level"])
    return Checkpoint(arguments, state, spelling, file)


# ---- autoencoder ---------------------------------------------------------------------------

VAE_NAMES = {".block.": ".resnets.", ".nin_shortcut.": ".conv_shortcut.",
             ".downsample.conv.": ".downsamplers.0.conv.", ".upsample.conv.": ".upsamplers.0.conv.",
             ".norm_out.": ".conv_norm_out.", ".mid.block_1.": ".mid_block.resnets.0.",
             ".mid.block_2.": ".mid_block.resnets.1.", ".mid.attn_1.": ".mid_block.attentions.0."}
# The middle's attention is spelled in three ways, which occur under either of its two names.
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
                 "proj_out": "to_out.0", "query": "to_q", "key": "to_k", "value": "to_v",
                 "proj_attn": "to_out.0"}


def vae_attention_name(name):
    """Returns an autoencoder's name with its attention spelled group_norm, to_q .. to_out.0."""
    return re.sub(r"(\.mid\.attn_1|\.mid_block\.attentions\.0)\.(\w+)\.(?=weight|bias)",
                  lambda m: f"{m[1]}.{VAE_ATTENTION.get(m[2], m[2])}.", name)


def vae_folder_name(key, levels):
    """Returns what the folder layout calls an autoencoder key of the single-file layout."""
    key = vae_attention_name(key)
    for single, folder in VAE_NAMES.items():
        key = key.replace(single, folder)
    key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
    return re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)


def vae_config_from_json(config):
    """Returns VAEConfig's arguments from a folder's config.json; absent keys are SD's."""
    return dict(channels=tuple(config.get("block_out_channels", (128, 256, 512, 512))),
                blocks_per_level=config.get("layers_per_block", 2),
                latent_channels=config.get("latent_channels", 4),
                norm_groups=config.get("norm_num_groups", 32),
                scaling_factor=float(config.get("scaling_factor") or 0.18215))


@as_user_error
def read_vae(path):
    """Returns the Checkpoint of an autoencoder, from wherever one may lie.

    path: an SD folder or single file, or an autoencoder's own folder or file.
    """
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
        levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
        arguments = dict(
            channels=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]
                           for i in range(levels)),
            blocks_per_level=_count(state, "encoder.down.0.block.{}.conv1.weight"),
        ) if levels else vae_config_from_json({})       # a folder's file, without its config.json
    state = {vae_attention_name(name): stored for name, stored in state.items()}
    if any(".up_blocks." in name for name in state):
        levels = len(arguments["channels"])
        return Checkpoint(arguments, state, lambda key: vae_folder_name(key, levels), file)
    return Checkpoint(arguments, state, vae_attention_name, file)


def vae_factor(path):
    """Returns f, how many pixels of a side an autoencoder's latent pixel covers."""
    return 2 ** (len(read_vae(path).config["channels"]) - 1)


# ---- text encoder --------------------------------------------------------------------------

TEXT_IGNORED = re.compile(r"(^|\.)(position_ids|logit_scale|text_projection|attn_mask)\b|"
                          r"(^|\.)(vision_model|visual_projection|visual)\.")
OPENCLIP_NAMES = {"encoder.layers.": "transformer.resblocks.", ".self_attn.": ".attn.",
                  ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.",
                  ".mlp.fc2.": ".mlp.c_proj.", "final_layer_norm.": "ln_final.",
                  "embeddings.token_embedding.": "token_embedding.",
                  "embeddings.position_embedding.weight": "positional_embedding"}


def openclip_name(key):
    """Returns what an SD 2 single file calls a text encoder's key, with in_proj split in three."""
    for name, openclip in OPENCLIP_NAMES.items():
        key = key.replace(name, openclip)
    return key


def split_in_proj(state, width):
    """Returns the state with each in_proj (3 D, ..) of attention as q_proj, k_proj and v_proj."""
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


@as_user_error
def read_text(path):
    """Returns the Checkpoint of the CLIP text encoder of an SD folder or single file."""
    path = Path(path)
    config = {}
    if path.is_dir():
        config, state, file = read_folder(path / "text_encoder", TEXT_STEM, TEXT_FIXED)
    else:
        state, file = read_single_file(path, "cond_stage_model."), path
    state = {name: stored for name, stored in state.items() if not TEXT_IGNORED.search(name)}
    # whatever stands before the embedding's name is the prefix: text_model., transformer. or more
    embedding = next((name for name in state if name.endswith("token_embedding.weight")), None)
    if embedding is None:
        raise UserError(f"{file}: holds no CLIP text encoder; give a folder or file with one")
    prefix = embedding.removesuffix("token_embedding.weight").removesuffix("embeddings.")
    vocab_size, width = state[embedding].shape
    state = {name.removeprefix(prefix): stored for name, stored in state.items()}
    # what a config.json does not say: SD 1's heads are 64 wide, and so are SD 2's
    arguments = dict(width=width, vocab_size=vocab_size,
                     heads=config.get("num_attention_heads", width // 64),
                     activation=config.get("hidden_act",
                                           "gelu" if width == 1024 else "quick_gelu"))
    if width % arguments["heads"]:
        raise UserError(f"{file}: num_attention_heads = {arguments['heads']}, but its width is "
                        f"{width}; allowed is what divides it")
    layers = _count(state, "encoder.layers.{}.layer_norm1.weight")
    if layers or "embeddings.token_embedding.weight" in state:
        layers = config.get("num_hidden_layers", layers)
        return Checkpoint(arguments | dict(layers=layers), state, str, file)
    # OpenCLIP: SD 2 reads the states before the last block, which is left out; some files lack it
    blocks = _count(state, "transformer.resblocks.{}.ln_1.weight")
    layers = blocks if blocks == SD2_TEXT_LAYERS else blocks - 1
    state = {name: stored for name, stored in split_in_proj(state, width).items()
             if not name.startswith(f"transformer.resblocks.{layers}.")}
    return Checkpoint(arguments | dict(layers=layers, activation="gelu"), state, openclip_name,
                      file)


# ---- tokenizer -----------------------------------------------------------------------------

def find_tokenizer(path, tokenizer_path=None):
    """Returns the folder of a tokenizer: tokenizer_path, else that of an SD folder.

    Errors: UserError for a single file, which holds no tokenizer.
    """
    if tokenizer_path is None and not Path(path).is_dir():
        raise UserError(f"{path}: a single file holds no tokenizer; give --tokenizer, a folder "
                        f"with vocab.json and merges.txt, or with tokenizer.json")
    folder = Path(tokenizer_path or path)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def read_tokenizer(folder):
    """Returns (vocabulary, merges, padding token, added tokens) of a tokenizer's folder.

    The folder holds vocab.json and merges.txt, or else tokenizer.json. vocabulary: {token: id}.
    merges: [(left, right)]. padding token: None if the folder names none. added tokens: {token:
    whether it is looked for after lower-casing}. Errors: UserError names the file at fault.
    """
    folder = Path(folder)
    missing = [folder / name for name in ("vocab.json", "merges.txt")
               if not (folder / name).is_file()]
    names = ["tokenizer_config", "special_tokens_map", "added_tokens"]
    names += ["tokenizer"] if missing else []
    files = {name: read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else {}
             for name in names}
    if missing and not files["tokenizer"]:
        raise UserError(f"{missing[0]}: no such file; a tokenizer is vocab.json and merges.txt, or "
                        f"tokenizer.json")
    try:
        if missing:
            vocab, merges = (files["tokenizer"]["model"][name] for name in ("vocab", "merges"))
        else:
            vocab = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        merges = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges]
        pad_token = None
        for name in ("tokenizer_config", "special_tokens_map"):                 # the latter wins
            entry = files[name].get("pad_token")
            pad_token = (entry["content"] if isinstance(entry, dict) else entry) or pad_token
        entries = [dict(content=token, id=number)
                   for token, number in files["added_tokens"].items()]
        entries += [entry | dict(id=int(number)) for number, entry in
                    files["tokenizer_config"].get("added_tokens_decoder", {}).items()]
        entries += files.get("tokenizer", {}).get("added_tokens", [])
        vocab = vocab | {entry["content"]: entry["id"] for entry in entries}
        added = {entry["content"]: bool(entry.get("normalized", True)) for entry in entries}
        wrong = [token for token, number in vocab.items() if type(number) is not int or number < 0]
        if wrong:
            raise ValueError(f"{wrong[0]!r} has the id {vocab[wrong[0]]!r}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: not a CLIP tokenizer ({error})") from None
    return vocab, merges, pad_token, added


def check_text(checkpoint, folder, vocab, activations):
    """Raises UserError if a text encoder does not fit its tokenizer or has another activation.

    vocab: {token: id} of the tokenizer.
    """
    activation = checkpoint.config["activation"]
    if activation not in activations:
        raise UserError(f"{checkpoint.file}: activation {activation!r}; allowed are "
                        f"{', '.join(activations)}")
    vocab_size = checkpoint.config["vocab_size"]
    last = max(vocab, key=vocab.get)
    if vocab[last] >= vocab_size:
        raise UserError(f"{folder}: token {last!r} has id {vocab[last]}, but {checkpoint.file} "
                        f"knows ids up to {vocab_size - 1}; give the tokenizer of this model")
    if vocab[last] + 1 < vocab_size:
        warnings.warn(f"{folder}: {vocab[last] + 1} tokens, but {checkpoint.file} knows "
                      f"{vocab_size}; is it this model's?")


# ---- noise schedule ------------------------------------------------------------------------

@as_user_error
def load_schedule(path, prediction_type=None):
    """Returns the NoiseSchedule of an SD folder; a single file has Stable Diffusion's.

    prediction_type: overrules the folder's. Errors: UserError if scheduler_config.json asks for
    what is not implemented, or nothing tells what an SD 2 model predicts.
    """
    file = Path(path) / "scheduler" / "scheduler_config.json"
    config = read_config(file) if file.is_file() else {}
    if prediction_type:
        config["prediction_type"] = prediction_type
    if not config and read_unet(path).config["context_dim"] == 1024:
        raise UserError(f"{path}: does not say what its SD 2 model predicts; give "
                        f"--prediction-type epsilon (512 px models) or v_prediction (768 px)")
    check_values(config, SCHEDULE_FIXED, file)
    beta_start, beta_end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    if not 0 < beta_start <= beta_end < 1:
        raise UserError(f"{file}: beta_start = {beta_start} and beta_end = {beta_end}; allowed is "
                        f"what rises between 0 and 1")
    return NoiseSchedule(beta_start, beta_end,
                         prediction_type=config.get("prediction_type", "epsilon"),
                         spacing=config.get("timestep_spacing"),
                         steps_offset=config.get("steps_offset", 1),
                         set_alpha_to_one=config.get("set_alpha_to_one", False))


# ---- BPS -----------------------------------------------------------------------------------

def read_bps(file):
    """Returns (Checkpoint, metadata) of a file that bps.save_bps wrote. Errors: UserError."""
    state = read_header(file)
    try:
        with safe_open(file, "pt") as f:
            entries = f.metadata() or {}
        # version 1 had an entry for each
        content = json.loads(entries["bps"]) if "bps" in entries else {
            name: json.loads(entries[name]) for name in ("config", "training")}
        config = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in content["config"].items()}
        if "paths" in config:
            config, state = migrate_bps(config, state)
        return Checkpoint(config, state, str, file), dict(content["training"])
    except SENSELESS:
        raise UserError(f"{file}: not a BPS file; train.py writes bps.safetensors") from None


def migrate_bps(config, state):
    """Returns config and Stored tensors of a version-1 file as today's files have them.

    Version 1 named the `paths` that are steered, where port weights of 0 leave out the others now,
    and held ports of all of them.
    """
    paths = config.pop("paths")
    levels = len(config["channels"])
    middle = f"zero_blocks.{levels * (config['blocks_per_level'] + 1)}."
    state = {name.replace("light_foot.levels.", "output_blocks."): stored
             for name, stored in state.items()}
    if "contracting" not in paths:
        config["input_weights"] = (0.0,) * levels
        state = {name: stored for name, stored in state.items()
                 if name.startswith(middle) or not name.startswith("zero_blocks.")}
    if "transition" not in paths:
        config["middle_weight"] = 0.0
        state = {name: stored for name, stored in state.items() if not name.startswith(middle)}
    if "expansive" not in paths:
        config["output_weight"] = 0.0
    return config, state
