"""What the recorded outputs of test_references.py do not show: fp16, norms, clamps, wrong sizes."""
import math

import pytest
import torch

from clip import CLIPTextConfig, CLIPTextModel
from unet import CrossAttention, UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

SMALL = VAEConfig(channels=(8, 16, 16), blocks_per_level=1, norm_groups=4, scaling_factor=0.5)


def test_a_wrong_number_of_residuals_is_rejected():
    unet = UNet(UNetConfig(channels=(32,), attention=(False,), heads=(1,), blocks_per_level=1))
    with pytest.raises(ValueError, match="residuals must have 5 entries.* got 1"):
        unet(torch.randn(1, 4, 4, 4), torch.tensor([1]), torch.randn(1, 2, 768), [None])


@torch.inference_mode()
def test_attention_in_fp16_survives_products_beyond_its_range():
    """SD 2.1 at 768 px has such products: a softmax in fp16 would overflow to nan."""
    torch.manual_seed(0)
    attention = CrossAttention(dim=64, context_dim=64, heads=1)
    for layer in (attention.to_q, attention.to_k):
        layer.weight.mul_(500)
    h = torch.randn(2, 7, 64).half()
    q, k = attention.to_q(h.float()), attention.to_k(h.float())
    assert q.abs().max() < 65_504 < (q @ k.transpose(1, 2) / 8).abs().max()
    exact, half = attention(h.float(), h.float()), attention.half()(h, h)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, atol=5e-3, rtol=5e-3)


def test_every_norm_has_the_checkpoints_own_eps():
    with torch.device("meta"):
        models = UNet(UNetConfig()), AutoencoderKL(VAEConfig()), CLIPTextModel(CLIPTextConfig())
    counts = {}
    for model in models:
        for name, layer in model.named_modules():
            if isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                in_transformer = isinstance(layer, torch.nn.GroupNorm) and name.endswith(".1.norm")
                is_small = in_transformer or isinstance(model, AutoencoderKL)
                assert layer.eps == (1e-6 if is_small else 1e-5), name
                counts[type(model), layer.eps] = counts.get((type(model), layer.eps), 0) + 1
    assert counts == {(UNet, 1e-5): 2 * 22 + 1 + 3 * 16, (UNet, 1e-6): 16,
                      (AutoencoderKL, 1e-6): 2 * 24 + 4, (CLIPTextModel, 1e-5): 2 * 12 + 1}


@pytest.mark.parametrize("bias, logvar", [(1e4, 20), (-1e4, -30)])
def test_an_extreme_log_variance_is_clamped(bias, logvar):
    vae = AutoencoderKL(SMALL)
    torch.nn.init.constant_(vae.quant_conv.bias, bias)
    with torch.inference_mode():
        std = vae.encode(torch.zeros(1, 3, 8, 8)).std
    torch.testing.assert_close(std, torch.full_like(std, 0.5 * math.exp(logvar / 2)))


def test_a_picture_whose_sides_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be multiples of 4, got 10 x 8"):
        AutoencoderKL(SMALL).encode(torch.zeros(1, 3, 10, 8))
