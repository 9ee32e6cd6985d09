"""Finds and reads Stable Diffusion checkpoints: a folder or a single .safetensors file, strictly.

The modules of unet.py, vae.py and clip.py carry the names of the single-file layout, so that one
loads as it is. The folder ("diffusers") layout goes through the functions *_folder_name below,
from a module's key to the folder's. Nothing is fetched from a network, and no pickle is opened.

    checkpoint = read_unet("tiny/model")        # config, tensors, and how keys are spelled there
    load_strict(UNet(UNetConfig(**checkpoint.config)), checkpoint)
"""
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
IN_CHANNELS_OF = {9: "an in-painting", 8: "an InstructPix2Pix", 7: "an up-scaler", 5: "a depth"}
# Single files say nothing of their sizes: the width of the text states tells which model it is.
SINGLE_FILE_UNET = {
    768: {},                                                                        # SD 1.x
    1024: dict(context_dim=1024, heads=(5, 10, 20, 20), linear_projection=True),    # SD 2.x
}
# Keys of the U-Net's config.json that would change the graph: only these values are implemented.
UNET_FIXED = dict(act_fn=("silu",), class_embed_type=(None,), addition_embed_type=(None,),
                  encoder_hid_dim=(None,), encoder_hid_dim_type=(None,),
                  center_input_sample=(False,),
                  resnet_time_scale_shift=("default",), time_embedding_type=("positional",),
                  mid_block_type=("UNetMidBlock2DCrossAttn",), transformer_layers_per_block=(1,),
                  dual_cross_attention=(False,), flip_sin_to_cos=(True,), freq_shift=(0,))


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message is one line for the user."""


class Checkpoint(NamedTuple):
    """One part of a checkpoint: U-Net, autoencoder or text encoder."""
    config: dict                            # keyword arguments of the part's config dataclass
    state: dict                             # tensors by their names in the file
    spelling: Callable[[str], str]          # a module's key -> its name in the file
    file: Path


# ---- files ---------------------------------------------------------------------------------

def read_safetensors(file):
    """Returns the tensors of a .safetensors file by name.

    Errors: WeightsError for pickles, Git-LFS pointers, truncated files and anything else.
    """
    file = Path(file)
    if file.is_dir():
        raise WeightsError(f"{file}: a folder; a .safetensors file is wanted here")
    if file.suffix.lower() in PICKLES:
        raise WeightsError(f"{file}: a {file.suffix} file is a pickle and can run code; convert it "
                           f"where you trust it: safetensors.torch.save_file(torch.load(f, "
                           f"weights_only=True)['state_dict'], 'model.safetensors')")
    if not file.is_file():
        raise WeightsError(f"{file}: no such file")
    size = file.stat().st_size
    with open(file, "rb") as f:
        head = f.read(8)
        if head == b"version ":
            raise WeightsError(f"{file}: a Git-LFS pointer, not the weights; run `git lfs pull`")
        length = int.from_bytes(head, "little")
        try:
            header = json.loads(f.read(min(length, size)))
            promised = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items()
                                         if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(f"{file}: not a safetensors file") from None
    if size != promised:
        raise WeightsError(f"{file}: {size} bytes, but its header promises {promised}; "
                           f"copy or download it again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise WeightsError(f"{file}: not a safetensors file ({error})") from None


def read_json(file):
    """Returns the dict that a JSON file holds.

    Errors: WeightsError where there is no such file or it holds something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such file") from None
    except ValueError as error:
        raise WeightsError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: not a JSON object")
    return content


def find_weights(folder, stem):
    """Returns the weights files of a part's folder: exact name, else shards, fp16, or the only one.

    Errors: WeightsError where there is none, only pickles, or a choice that cannot be made.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; a Stable Diffusion folder has unet/, vae/, "
                           f"text_encoder/ and tokenizer/")
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    for index in sorted(folder.glob("*.index*.json")):
        shards = set(read_json(index).get("weight_map", {}).values())
        if shards and all(name.endswith(".safetensors") for name in shards):
            return [folder / name for name in sorted(shards)]
    found = sorted(folder.glob("*.safetensors"))
    fp16 = [file for file in found if ".fp16." in file.name]
    if len(fp16) == 1 or len(found) == 1:
        return fp16 or found
    if found:
        names = ", ".join(file.name for file in found)
        raise WeightsError(f"{folder}: which one? {names}; rename one to {stem}.safetensors")
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in PICKLES]
    if pickles:
        read_safetensors(pickles[0])        # says why not
    raise WeightsError(f"{folder}: no {stem}.safetensors in it")


def find_unet(path):
    """Returns the (first) file that holds the U-Net of an SD folder or single file."""
    if Path(path).is_dir():
        return find_weights(Path(path) / "unet", "diffusion_pytorch_model")[0]
    return Path(path)


def read_folder(path, part, stem):
    """Returns (config.json as a dict, tensors, file) of one part of an SD folder."""
    folder = Path(path) / part
    files = find_weights(folder, stem)
    config, state = read_json(folder / "config.json"), {}
    for file in files:
        state |= read_safetensors(file)
    return config, state, files[0]


def read_prefix(path, prefixes):
    """Returns (tensors without the prefix, prefix found) of one part of a single file."""
    state = read_safetensors(path)
    for prefix in prefixes:
        part = {name[len(prefix):]: tensor for name, tensor in state.items()
                if name.startswith(prefix)}
        if part:
            return part, prefix
    raise WeightsError(f"{path}: no tensor of it begins with {' or '.join(prefixes)}; "
                       f"it is not a whole Stable Diffusion file")


def save(tensors, file, metadata):
    """Writes tensors and string metadata as safetensors: to a temporary name, then renamed."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = f"{file}.tmp"
    save_file(tensors, temporary, metadata)
    os.replace(temporary, file)


def write_json(content, file):
    """Writes a dict or list as indented JSON: to a temporary name, then renamed."""
    temporary = f"{file}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, file)


def save_training(file, modules, trained, optimizer, facts):
    """Writes all that a resumed run needs: modules by name, AdamW's state, and facts (a dict).

    modules: {name: module}, of which `trained` names the one that the optimizer trains.
    """
    tensors = {f"{name}.{key}": parameter for name, module in modules.items()
               for key, parameter in module.named_parameters()}
    for key, parameter in modules[trained].named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"m.{key}": state["exp_avg"], f"v.{key}": state["exp_avg_sq"]}
    save(tensors, file, dict(facts=json.dumps(facts)))


def load_training(file, modules, trained, optimizer):
    """Restores in place what save_training wrote with the same modules; returns its facts."""
    with safe_open(file, "pt") as f, torch.no_grad():
        facts = json.loads(f.metadata()["facts"])
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                parameter.copy_(f.get_tensor(f"{name}.{key}"))
        for key, parameter in modules[trained].named_parameters():
            optimizer.state[parameter] = dict(
                step=torch.tensor(float(facts["step"])),
                exp_avg=torch.empty_like(parameter).copy_(f.get_tensor(f"m.{key}")),
                exp_avg_sq=torch.empty_like(parameter).copy_(f.get_tensor(f"v.{key}")))
    return facts


def fingerprint(file):
    """Returns the first 16 hex digits of the file's SHA-256."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


# ---- strict loading ------------------------------------------------------------------------

def load_strict(module, checkpoint):
    """Puts the checkpoint into the module, whose own keys are in the single-file spelling.

    The module may be on the meta device, which saves drawing weights only to replace them. A
    linear layer may be stored as a 1x1 convolution and the other way round. Errors: WeightsError
    names every missing, unexpected and mis-shaped key.
    """
    wanted = {checkpoint.spelling(key): (key, own) for key, own in module.state_dict().items()}
    faults = [f"missing {name}" for name in wanted if name not in checkpoint.state]
    faults += [f"unexpected {name}" for name in checkpoint.state if name not in wanted]
    state = {}
    for name, (key, own) in wanted.items():
        tensor = checkpoint.state.get(name)
        if tensor is None:
            continue
        if _squeezed(tensor.shape) != _squeezed(own.shape):
            faults.append(f"{name} is {tuple(tensor.shape)}, not {tuple(own.shape)}")
        else:
            state[key] = tensor.reshape(own.shape)
    if faults:
        raise WeightsError(f"{checkpoint.file}: {len(faults)} keys do not fit a "
                           f"{type(module).__name__} of this size: {'; '.join(faults)}")
    module.load_state_dict(state, assign=True)


def _squeezed(shape):
    """Returns the shape without the trailing ones that a 1x1 convolution has."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


# ---- U-Net ---------------------------------------------------------------------------------

UNET_NAMES = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
              "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
              "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
              "middle_block.2": "mid_block.resnets.1"}
RES_NAMES = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
             "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def unet_folder_name(key, blocks_per_level):
    """Returns what the folder layout calls a U-Net key of the single-file layout."""
    for own, name in UNET_NAMES.items():
        key = re.sub(rf"^{re.escape(own)}\.", f"{name}.", key)
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", key)
    if match:
        path, rest = match[1], match[4]
        block, layer = int(match[2]), int(match[3])
        # a level of either path is blocks_per_level + 1 entries; the input path starts at 1
        level, i = divmod(block - (path == "input"), blocks_per_level + 1)
        side = "down_blocks" if path == "input" else "up_blocks"
        if rest.startswith("op."):
            key = f"{side}.{level}.downsamplers.0.conv.{rest[3:]}"
        elif rest.startswith("conv."):
            key = f"{side}.{level}.upsamplers.0.{rest}"
        else:
            key = f"{side}.{level}.{'resnets' if layer == 0 else 'attentions'}.{i}.{rest}"
    if ".resnets." in key:
        for own, name in RES_NAMES.items():
            key = key.replace(f".{own}.", f".{name}.")
    return key


def unet_config_from_json(config, file):
    """Returns UNetConfig's arguments from a folder's config.json; absent keys are SD 1.5's."""
    for key, allowed in UNET_FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise WeightsError(f"{file}: {key} = {config[key]!r} is not implemented; "
                               f"allowed is {allowed[0]!r}")
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    if (set(down) | set(up)) - {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D",
                                "UpBlock2D"}:
        raise WeightsError(f"{file}: block types {down + up}; allowed are (CrossAttn)DownBlock2D "
                           f"and (CrossAttn)UpBlock2D")
    # SD's configs say attention_head_dim where they mean the number of heads.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = (heads,) * len(channels) if isinstance(heads, int) else tuple(heads)
    return dict(channels=channels, attention=tuple(kind.startswith("CrossAttn") for kind in down),
                heads=heads, blocks_per_level=config.get("layers_per_block", 2),
                context_dim=config.get("cross_attention_dim", 768),
                latent_channels=config.get("out_channels", 4),
                norm_groups=config.get("norm_num_groups", 32),
                linear_projection=config.get("use_linear_projection", False))


def read_unet(path):
    """Returns the Checkpoint of the U-Net of an SD folder or single file."""
    if Path(path).is_dir():
        config, state, file = read_folder(path, "unet", "diffusion_pytorch_model")
        arguments = unet_config_from_json(config, file.parent / "config.json")
        stem, blocks = "conv_in.weight", arguments["blocks_per_level"]

        def spelling(key):
            return unet_folder_name(key, blocks)
    else:
        state, _ = read_prefix(path, ["model.diffusion_model."])
        file, stem, spelling = Path(path), "input_blocks.0.0.weight", str
        attention = state.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
        width = None if attention is None else attention.shape[1]
        if width not in SINGLE_FILE_UNET:
            raise WeightsError(f"{path}: text states of width {width}: not SD 1.x (768) or 2.x "
                               f"(1024); SD XL has another graph")
        arguments = SINGLE_FILE_UNET[width]
    in_channels = state[stem].shape[1] if stem in state else 4
    if in_channels in IN_CHANNELS_OF:
        raise WeightsError(f"{file}: {in_channels} input channels, {IN_CHANNELS_OF[in_channels]} "
                           f"model; only text-to-image models (4) can be steered")
    return Checkpoint(arguments, state, spelling, file)


# ---- autoencoder ---------------------------------------------------------------------------

VAE_NAMES = {".block.": ".resnets.", ".nin_shortcut.": ".conv_shortcut.",
             ".downsample.conv.": ".downsamplers.0.conv.", ".upsample.conv.": ".upsamplers.0.conv.",
             ".norm_out.": ".conv_norm_out.", ".mid.block_1.": ".mid_block.resnets.0.",
             ".mid.block_2.": ".mid_block.resnets.1.",
             ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
             ".mid.attn_1.q.": ".mid_block.attentions.0.to_q.",
             ".mid.attn_1.k.": ".mid_block.attentions.0.to_k.",
             ".mid.attn_1.v.": ".mid_block.attentions.0.to_v.",
             ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0."}
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                 ".proj_attn.": ".to_out.0."}       # the official SD 1.5 folder still has these


def vae_folder_name(key, levels):
    """Returns what the folder layout calls an autoencoder key of the single-file layout."""
    for own, name in VAE_NAMES.items():
        key = key.replace(own, name)
    key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
    return re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)


def read_vae(path):
    """Returns the Checkpoint of the autoencoder of an SD folder or single file."""
    if not Path(path).is_dir():
        state, _ = read_prefix(path, ["first_stage_model."])
        return Checkpoint({}, state, str, Path(path))
    config, state, file = read_folder(path, "vae", "diffusion_pytorch_model")
    for old, name in OLD_ATTENTION.items():
        state = {key.replace(old, name): tensor for key, tensor in state.items()}
    channels = tuple(config.get("block_out_channels", (128, 256, 512, 512)))
    arguments = dict(channels=channels, blocks_per_level=config.get("layers_per_block", 2),
                     latent_channels=config.get("latent_channels", 4),
                     norm_groups=config.get("norm_num_groups", 32),
                     scaling_factor=config.get("scaling_factor", 0.18215))
    return Checkpoint(arguments, state, lambda key: vae_folder_name(key, len(channels)), file)


# ---- text encoder --------------------------------------------------------------------------

TEXT_IGNORED = ("position_ids", "logit_scale", "text_projection")


def read_text(path):
    """Returns the Checkpoint of the CLIP text encoder of an SD folder or single file."""
    if Path(path).is_dir():
        config, state, file = read_folder(path, "text_encoder", "model")
        prefix = "text_model." if any(name.startswith("text_model.") for name in state) else ""
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        arguments = dict(width=config.get("hidden_size", 768),
                         layers=config.get("num_hidden_layers", 12),
                         heads=config.get("num_attention_heads", 12),
                         vocab_size=config.get("vocab_size", 49408),
                         activation=config.get("hidden_act", "quick_gelu"))
    else:
        state, prefix = read_prefix(path, ["cond_stage_model.transformer.text_model.",
                                           "cond_stage_model.transformer.",
                                           "cond_stage_model.model."])
        if prefix == "cond_stage_model.model.":
            raise WeightsError(f"{path}: the OpenCLIP text encoder of an SD 2 single file; "
                               f"give the SD 2 folder instead")
        file, arguments = Path(path), {}
    state = {name: tensor for name, tensor in state.items()
             if not name.split(".")[-1].startswith(TEXT_IGNORED) and
             not name.startswith(TEXT_IGNORED)}
    return Checkpoint(arguments, state, str, file)
