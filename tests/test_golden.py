"""Recorded outputs of the authors' network are reproduced through the public names.

In float64, because the maps reach 108 and float32 would round by about 1e-4.
"""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bps import BPS, BPSConfig
from unet import UNet, UNetConfig

FILE = Path(__file__).parent / "data" / "steered_unet_a.safetensors"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    """The recorded tensors, and the U-Net and BPS that hold the recorded weights."""
    with safe_open(FILE, "pt") as f:
        sizes = json.loads(f.metadata()["config"])
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    channels = tuple(sizes["model_channels"] * m for m in sizes["channel_mult"])
    unet = UNet(UNetConfig(channels=channels, attention=(True, True),
                           heads=(sizes["num_heads"],) * 2, context_dim=sizes["context_dim"],
                           blocks_per_level=sizes["num_res_blocks"]))
    per_block = sizes["weights_per_encoder_block"]
    bps = BPS(BPSConfig(cond_channels=1, factor=sizes["unshuffle"], channels=channels,
                        blocks_per_level=sizes["num_res_blocks"],
                        input_weights=(per_block[1], per_block[3]), middle_weight=per_block[4]))

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    unet.load_state_dict(part("unet."))
    # the authors also keep port convolutions that they throw away, and the weights as scalars
    recorded = part("bps.")
    unused = {"zero_blocks.0.weight", "zero_blocks.0.bias", "zero_blocks.2.weight",
              "zero_blocks.2.bias"} | {f"res_weights.{i}" for i in range(5)}
    bps.load_state_dict({k: v for k, v in recorded.items() if k not in unused})
    io = {k: v if k == "timesteps" else v.double() for k, v in part("io.").items()}
    return unet.double().eval(), bps.double().eval(), io


@torch.inference_mode()
def test_every_residual_matches_the_authors_network(golden):
    unet, bps, io = golden
    residuals = bps(io["condition"], unet.time_embedding(io["timesteps"]))
    assert len(residuals) == 9
    for i, residual in enumerate(residuals):
        expected = io.get(f"residual.{i:02d}")
        assert (residual is None) == (expected is None), i
        if expected is not None:
            torch.testing.assert_close(residual, expected, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_prior_and_steered_eps_match_the_authors_network(golden):
    unet, bps, io = golden
    t = io["timesteps"]
    prior = unet(io["latents"], t, io["context"])
    torch.testing.assert_close(prior, io["eps_base"], atol=TOLERANCE, rtol=0)
    residuals = bps(io["condition"], unet.time_embedding(t))
    steered = unet(io["latents"], t, io["context"], residuals)
    torch.testing.assert_close(steered, io["eps_steered"], atol=TOLERANCE, rtol=0)
    assert (steered - prior).abs().max() > 100 * TOLERANCE      # the steering is not a no-op
