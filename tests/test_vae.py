"""The autoencoder's peculiarities, each against PyTorch's own functions."""
import math

import pytest
import torch
import torch.nn.functional as F

from vae import Attention, AutoencoderKL, Downsample, VAEConfig

SMALL = VAEConfig(channels=(8, 16, 16), blocks_per_level=1, norm_groups=4, scaling_factor=0.5)


def test_downsampling_pads_right_and_bottom_only():
    layer, h = Downsample(3), torch.randn(2, 3, 6, 10)
    expected = F.conv2d(F.pad(h, (1, 1, 1, 1)), layer.conv.weight, layer.conv.bias)[..., 1::2, 1::2]
    torch.testing.assert_close(layer(h), expected)


def test_attention_is_softmax_of_scaled_products_over_all_pixels():
    torch.manual_seed(0)
    layer, h = Attention(8, 4), torch.randn(2, 8, 3, 5)
    normed = F.group_norm(h, 4, layer.norm.weight, layer.norm.bias, eps=1e-6)
    q, k, v = (conv(normed).flatten(2) for conv in (layer.q, layer.k, layer.v))
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 8**0.5, dim=-1)
    out = torch.einsum("bnm,bcm->bcn", weights, v).view_as(h)
    torch.testing.assert_close(layer(h), h + layer.proj_out(out))


def test_latents_are_scaled_and_f_times_smaller():
    torch.manual_seed(0)
    vae = AutoencoderKL(SMALL).eval()
    x = torch.rand(3, 3, 24, 16) * 2 - 1
    with torch.inference_mode():
        latent = vae.encode(x)
        mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
        torch.testing.assert_close(latent.mean, mean * 0.5)
        torch.testing.assert_close(latent.std, torch.exp(logvar / 2) * 0.5)
        assert latent.mean.shape == (3, 4, 6, 4)
        assert vae.decode(latent.mean).shape == x.shape
    with pytest.raises(ValueError, match="must be multiples of 4, got 10 x 8"):
        vae.encode(torch.zeros(1, 3, 10, 8))


@pytest.mark.parametrize("bias, logvar", [(1e4, 20), (-1e4, -30)])
def test_an_extreme_log_variance_is_clamped(bias, logvar):
    vae = AutoencoderKL(SMALL)
    torch.nn.init.constant_(vae.quant_conv.bias, bias)
    with torch.inference_mode():
        std = vae.encode(torch.zeros(1, 3, 8, 8)).std
    torch.testing.assert_close(std, torch.full_like(std, 0.5 * math.exp(logvar / 2)))
