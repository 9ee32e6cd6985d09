"""Bits and best strength, against closed forms and against their definitions."""
import math

import pytest
import torch

import toy2d
from bps import BPS, config_for
from data import LatentCache, load_pairs
from diffusion import NoiseSchedule
from measure import report
from measure.bits import best_strength, condition_bits, log_snr
from studies import toy

SCHEDULE = NoiseSchedule()


def known_bits(snr, v):
    """Bits of a reading after which a number of N(0, 1) has variance v, from snr[0] to snr[-1]."""
    ends = snr[[0, -1]]
    # a constant less the bits that the reading adds to z_t
    bits = ((1 + ends) / (1 + ends * v)).log2() / 2
    return (bits[0] - bits[1]).item()


@pytest.mark.parametrize("r", [0.2, 1.0, 3.0])
def test_the_bits_of_a_reading_of_a_gaussian_are_the_known_ones(r):
    """z_0 ~ N(0, 1), c = z_0 + r n, so v is the variance of z_0 given c."""
    timesteps, v = range(1000), r**2 / (1 + r**2)
    snr = log_snr(SCHEDULE, timesteps).exp()
    gain = snr / (1 + snr) - snr * v / (1 + snr * v)
    bits = condition_bits(gain[None], log_snr(SCHEDULE, timesteps))
    assert bits.item() == pytest.approx(known_bits(snr, v), rel=1e-3)
    assert bits.item() == pytest.approx(math.log2(1 + 1 / r**2) / 2, rel=0.03)


@pytest.mark.parametrize("kind", toy.KINDS)
def test_the_bits_of_exact_denoisers_in_the_plane_are_the_mutual_information(kind):
    world = toy2d.pinwheel()
    z_0, cond = world.sample_labels(2000, torch.Generator().manual_seed(0))
    exact = toy.exact_bits(world, z_0, cond, kind)
    posterior = toy.exact_denoiser(world, toy.log_p_cond(world, cond, kind))
    prior = toy.exact_denoiser(world)
    estimate = toy.denoisers_bits(range(0, 1000, 10), z_0, prior, posterior, seed=0)
    difference, error = report.mean_and_error(estimate - exact)
    assert error < 0.05
    assert abs(difference) < 3 * error


def test_calibration_halves_a_steering_that_is_twice_as_large():
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(50, 1000, generator=generator)
    rest = torch.randn(50, 1000, generator=generator)               # what steering cannot know
    steering = 2 * right
    gains = (right + rest).square().mean(1) - (right + rest - steering).square().mean(1)
    squares = steering.square().mean(1)
    strength, error = best_strength(gains, squares)
    assert strength == pytest.approx(0.5, abs=4 * error)
    assert 0 < error < 0.01
    without = torch.tensor([best_strength(*(torch.cat([x[:i], x[i + 1:]])
                                                  for x in (gains, squares)))[0]
                            for i in range(50)])
    assert error == pytest.approx((49 * without.var(correction=0)).sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("prediction_type", ("epsilon", "v_prediction"))
def test_validation_counts_the_bits_of_all_dimensions_whatever_is_predicted(prediction_type):
    """200 independent readings of 200 standard normal numbers, each with an error of 1."""
    dimensions, v, schedule = 200, 0.5, NoiseSchedule(prediction_type=prediction_type)
    snr = log_snr(schedule, report.VALIDATION_T).exp()
    abar = schedule.alphas_cumprod[list(report.VALIDATION_T)]
    prior, posterior = snr / (1 + snr), snr * v / (1 + snr * v)             # errors of eps
    squares = torch.stack([prior, posterior, prior, prior - posterior])[:, None].expand(4, 3, 8)
    if prediction_type == "v_prediction":
        squares = squares / abar                                            # v = eps / alpha + ..
    numbers = report.summarize(squares, schedule, dimensions)
    assert numbers["bits"][0] == pytest.approx(dimensions * known_bits(snr, v), rel=0.02)
    assert numbers["gain"][0] == pytest.approx(numbers["base"] - numbers["steered"])
    assert numbers["strength"][0] == pytest.approx(1)
    assert numbers["gap"][0] == pytest.approx(numbers["gain"][0])           # as shuffled is prior


def test_validation_measures_the_strength_of_the_lowest_loss(base, monkeypatch):
    monkeypatch.setattr(report, "VALIDATION_T", (200, 600))
    cache = LatentCache(load_pairs("sketch", "val")[:4], "sketch", 32, base)
    torch.manual_seed(0)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    for port in bps.zero_blocks:
        if port is not None:
            torch.nn.init.normal_(port.weight, std=1e-3)
    best, _ = report.validate(base, cache, bps)["strength"]
    losses = {}
    with torch.inference_mode():
        for shift in (-0.02, 0.0, 0.02):
            losses[shift] = sum(
                report.mean_square((1 - best - shift) * predict(None) + (best + shift) * predict(i)
                                   - target).sum().item()
                for _, i, target, predict in report.held_out(base, cache, bps))
    assert losses[0.0] < min(losses[-0.02], losses[0.02])
    assert losses[-0.02] == pytest.approx(losses[0.02], rel=1e-4)       # it is a parabola
