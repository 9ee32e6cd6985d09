"""What the recorded outputs of test_references.py do not show: the clamp, and wrong sides."""
import math

import pytest
import torch

from vae import AutoencoderKL, VAEConfig

SMALL = VAEConfig(channels=(8, 16, 16), blocks_per_level=1, norm_groups=4, scaling_factor=0.5)


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
