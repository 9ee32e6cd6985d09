"""The U-Net's layers against PyTorch's own functions, its sizes, and its shapes."""
import math

import pytest
import torch
import torch.nn.functional as F

from clip import CLIPTextConfig, CLIPTextModel
from unet import GEGLU, CrossAttention, UNet, UNetConfig, timestep_embedding
from vae import AutoencoderKL, VAEConfig


def test_timestep_embedding_is_the_closed_form_cosines_first():
    timesteps = (0, 7, 7.5, 999)
    for row, t in zip(timestep_embedding(torch.tensor(timesteps), 6), timesteps):
        angles = [t * 10_000 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)


def test_cross_attention_equals_torch_multi_head_attention():
    torch.manual_seed(0)
    attention = CrossAttention(dim=12, context_dim=10, heads=3)
    h, context = torch.randn(2, 7, 12), torch.randn(2, 5, 10)
    expected, _ = F.multi_head_attention_forward(
        h.transpose(0, 1), context.transpose(0, 1), context.transpose(0, 1), 12, 3,
        in_proj_weight=None, in_proj_bias=torch.zeros(36), bias_k=None, bias_v=None,
        add_zero_attn=False, dropout_p=0.0, out_proj_weight=attention.to_out[0].weight,
        out_proj_bias=attention.to_out[0].bias, use_separate_proj_weight=True,
        q_proj_weight=attention.to_q.weight, k_proj_weight=attention.to_k.weight,
        v_proj_weight=attention.to_v.weight)
    torch.testing.assert_close(attention(h, context), expected.transpose(0, 1))


def test_geglu_gates_with_the_exact_gelu():
    layer = GEGLU(3, 4)
    h = torch.randn(2, 5, 3)
    value, gate = F.linear(h, layer.proj.weight, layer.proj.bias).split(4, dim=-1)
    torch.testing.assert_close(layer(h), value * 0.5 * gate * (1 + torch.erf(gate / 2**0.5)))


@pytest.mark.parametrize("linear_projection", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (9, 7)])
def test_eps_has_the_size_of_the_latent_even_if_odd(size, linear_projection):
    unet = UNet(UNetConfig(channels=(32, 64), attention=(False, True), heads=(2, 4),
                           blocks_per_level=1, context_dim=24,
                           linear_projection=linear_projection)).eval()
    with torch.inference_mode():
        eps = unet(torch.randn(3, 4, *size), torch.tensor([1, 2, 3]), torch.randn(3, 5, 24))
    assert eps.shape == (3, 4, *size) and eps.std() > 0


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
