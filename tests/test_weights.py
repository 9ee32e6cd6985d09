"""Checkpoints in both layouts load to the same model, and every fault is named."""
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from clip import CLIPTextConfig, CLIPTextModel
from tiny.pretrain import save_part
from unet import UNet, UNetConfig, load_unet
from vae import AutoencoderKL, VAEConfig, load_vae

UNET = UNetConfig(channels=(32, 64, 64), attention=(True, True, False), heads=(2, 4, 4),
                  blocks_per_level=2, context_dim=24)
UNET_JSON = dict(block_out_channels=[32, 64, 64], layers_per_block=2, cross_attention_dim=24,
                 attention_head_dim=[2, 4, 4], norm_num_groups=32,
                 down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
                 up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2)
VAE = VAEConfig(channels=(8, 16, 16), blocks_per_level=1, norm_groups=4, scaling_factor=0.25)
VAE_JSON = dict(block_out_channels=[8, 16, 16], layers_per_block=1, norm_num_groups=4,
                scaling_factor=0.25)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """An SD folder with a random U-Net and autoencoder, and the U-Net itself (rounded to fp16)."""
    torch.manual_seed(0)
    unet = UNet(UNET).half().float().eval()
    save_part(unet, tmp_path / "unet", lambda key: weights.unet_folder_name(key, 2), UNET_JSON)
    vae = AutoencoderKL(VAE).half().float().eval()
    save_part(vae, tmp_path / "vae", lambda key: weights.vae_folder_name(key, 3), VAE_JSON)
    return tmp_path, unet, vae


def test_a_folder_gives_back_the_unet_and_the_autoencoder(folder):
    path, unet, vae = folder
    loaded = load_unet(path)
    assert loaded.config == UNET
    inputs = torch.randn(2, 4, 8, 12), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    torch.testing.assert_close(loaded(*inputs), unet(*inputs))
    assert load_vae(path).config == VAE
    z = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(load_vae(path).decode(z), vae.decode(z))


def test_folder_names_are_those_of_the_published_table():
    def name(key):
        return weights.unet_folder_name(key, 2)

    assert name("input_blocks.0.0.weight") == "conv_in.weight"
    assert name("input_blocks.3.0.op.bias") == "down_blocks.0.downsamplers.0.conv.bias"
    assert name("input_blocks.5.1.proj_in.weight") == "down_blocks.1.attentions.1.proj_in.weight"
    assert name("middle_block.2.emb_layers.1.bias") == "mid_block.resnets.1.time_emb_proj.bias"
    assert name("output_blocks.2.1.conv.weight") == "up_blocks.0.upsamplers.0.conv.weight"
    assert name("output_blocks.5.2.conv.weight") == "up_blocks.1.upsamplers.0.conv.weight"
    assert name("output_blocks.9.0.skip_connection.bias") == \
        "up_blocks.3.resnets.0.conv_shortcut.bias"
    assert name("out.0.weight") == "conv_norm_out.weight"
    assert weights.vae_folder_name("decoder.up.3.block.2.conv1.weight", 4) == \
        "decoder.up_blocks.0.resnets.2.conv1.weight"
    assert weights.vae_folder_name("encoder.mid.attn_1.proj_out.bias", 4) == \
        "encoder.mid_block.attentions.0.to_out.0.bias"
    with torch.device("meta"):      # every key has a name of its own
        keys = UNet(UNetConfig()).state_dict().keys()
    assert len({name(key) for key in keys}) == 686


def test_old_attention_names_and_ranks_of_the_autoencoder_load(folder):
    path, _, vae = folder
    file = path / "vae" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        for side in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                key = f"{side}.mid_block.attentions.0.{new}.{kind}"
                tensor = state.pop(key)
                state[key.replace(new, name)] = tensor.flatten(1) if kind == "weight" else tensor
    save_file(state, file)
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(load_vae(path).decode(z), vae.decode(z))


def test_every_missing_unexpected_and_misshaped_key_is_named(folder):
    path, *_ = folder
    state = load_file(path / "unet" / WEIGHTS)
    del state["conv_in.bias"], state["time_embedding.linear_2.weight"]
    state["surprise.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, path / "unet" / WEIGHTS)
    with pytest.raises(weights.WeightsError) as error:
        load_unet(path)
    for part in ("4 keys", "missing conv_in.bias", "missing time_embedding.linear_2.weight",
                 "unexpected surprise.weight", "conv_out.bias is (7,), not (4,)", WEIGHTS):
        assert part in str(error.value)


def test_fp16_variants_and_shards_are_found(folder):
    path, unet, _ = folder
    file, inputs = path / "unet" / WEIGHTS, (torch.randn(1, 4, 8, 8), torch.tensor([3]),
                                             torch.randn(1, 5, 24))
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    torch.testing.assert_close(load_unet(path)(*inputs), unet(*inputs))

    state = load_file(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    file.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, file.with_name(part))
    index = dict(weight_map={key: part for part, keys in parts.items() for key in keys})
    (path / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(load_unet(path)(*inputs), unet(*inputs))


def test_a_single_file_of_sd15_sizes_loads_by_its_prefixes(tmp_path):
    """All zeros, so that the file is sparse: 4 GB of names and shapes that cost no disk."""
    with torch.device("meta"):
        shapes = {f"{prefix}{key}": list(tensor.shape) for prefix, module in (
            ("model.diffusion_model.", UNet(UNetConfig())),
            ("first_stage_model.", AutoencoderKL(VAEConfig())),
            ("cond_stage_model.transformer.text_model.", CLIPTextModel(CLIPTextConfig())),
        ) for key, tensor in module.state_dict().items()}
    shapes["model_ema.decay"] = shapes["betas"] = [1]
    file = tmp_path / "sd15.safetensors"
    write_zeros(file, shapes)
    checkpoint = weights.read_unet(file)
    with torch.device("meta"):
        unet = UNet(UNetConfig(**checkpoint.config))
    weights.load_strict(unet, checkpoint)
    assert len(checkpoint.state) == 686 and unet.config == UNetConfig()
    assert load_vae(file).config == VAEConfig()
    assert len(weights.read_text(file).state) == 196


def test_an_sd15_folder_loads(tmp_path):
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")        # absent keys: SD 1.5's values
    write_zeros(tmp_path / "unet" / WEIGHTS, {weights.unet_folder_name(key, 2): list(tensor.shape)
                                              for key, tensor in unet.state_dict().items()})
    loaded = load_unet(tmp_path, dtype=torch.float16)
    assert sum(p.numel() for p in loaded.parameters()) == 859_520_964


def write_zeros(file, shapes):
    """Writes a sparse fp16 safetensors file of zeros with the given names and shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = dict(dtype="F16", shape=shape, data_offsets=[begin, end])
    text = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


@pytest.mark.parametrize("spoil, message", [
    (lambda f: f.write_bytes(f.read_bytes()[:-9]), "header promises"),
    (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git-LFS pointer"),
    (lambda f: f.write_bytes(b"nonsense" * 9), "not a safetensors file"),
    (lambda f: f.rename(f.with_suffix(".bin")), "pickle"),
    (lambda f: f.rename(f.with_suffix(".CKPT")), "pickle"),
    (lambda f: (f.parent / "config.json").write_text("{,}"), "config.json: not JSON"),
    (lambda f: (f.parent / "config.json").write_text("[]"), "config.json: not a JSON object"),
    (lambda f: f.write_bytes(f.read_bytes().replace(b'"F16"', b'"F99"')), "not a safetensors"),
    (lambda f: f.unlink(), "no diffusion_pytorch_model.safetensors"),
    (lambda f: (f.parent / "config.json").unlink(), "config.json: no such file"),
    (lambda f: (f.parent / "config.json").write_text('{"class_embed_type": "timestep"}'),
     "class_embed_type"),
])
def test_a_faulty_file_is_refused_with_the_reason(folder, spoil, message):
    path, *_ = folder
    spoil(path / "unet" / WEIGHTS)
    with pytest.raises(weights.WeightsError, match=message):
        load_unet(path)


@pytest.mark.parametrize("channels, kind", [(9, "in-painting"), (8, "InstructPix2Pix"),
                                            (5, "depth")])
def test_models_of_another_kind_are_refused_by_name(folder, channels, kind):
    path, *_ = folder
    state = load_file(path / "unet" / WEIGHTS)
    state["conv_in.weight"] = torch.zeros(32, channels, 3, 3)
    save_file(state, path / "unet" / WEIGHTS)
    with pytest.raises(weights.WeightsError, match=kind):
        load_unet(path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="nowhere"):
        load_unet(tmp_path / "nowhere")
