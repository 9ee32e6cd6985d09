"""Checkpoints in both layouts load to the same model, and every fault is named."""
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from inputs import checkpoints
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
    save_part(unet, tmp_path / "unet", lambda key: checkpoints.unet_folder_name(key, 2), UNET_JSON)
    vae = AutoencoderKL(VAE).half().float().eval()
    save_part(vae, tmp_path / "vae", lambda key: checkpoints.vae_folder_name(key, 3), VAE_JSON)
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


def test_every_missing_unexpected_and_misshaped_key_is_named(folder):
    path, *_ = folder
    state = load_file(path / "unet" / WEIGHTS)
    del state["conv_in.bias"], state["time_embedding.linear_2.weight"]
    state["surprise.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, path / "unet" / WEIGHTS)
    with pytest.raises(weights.UserError) as error:
        load_unet(path)
    for part in ("4 keys", "missing conv_in.bias", "missing time_embedding.linear_2.weight",
                 "unexpected surprise.weight", "conv_out.bias is (7,), not (4,)", WEIGHTS):
        assert part in str(error.value)


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
    checkpoint = checkpoints.read_unet(file)
    with torch.device("meta"):
        unet = UNet(UNetConfig(**checkpoint.config))
    weights.load_strict(unet, checkpoint, torch.float16)    # its own dtype: nothing is copied
    assert len(checkpoint.state) == 686 and unet.config == UNetConfig()
    assert load_vae(file, torch.float16).config == VAEConfig()
    assert len(checkpoints.read_text(file).state) == 196


def test_absent_keys_of_a_config_are_sd15s():
    assert UNetConfig(**checkpoints.unet_config_from_json({}, "config.json")) == UNetConfig()
    assert VAEConfig(**checkpoints.vae_config_from_json({})) == VAEConfig()


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
    (lambda f: f.write_bytes(f.read_bytes()[:500]), "500 bytes, but its header alone has"),
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
    with pytest.raises(weights.UserError, match=message):
        load_unet(path)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(weights.UserError, match="nowhere"):
        load_unet(tmp_path / "nowhere")
