"""What strengths and windows do: against exact Gaussians, and bit for bit."""
from unittest.mock import Mock

import pytest
import torch

import diffusion
from bps import BPS, Condition, config_for, make_denoiser
from unet import UNet, UNetConfig

SMALL = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4), blocks_per_level=1,
                   context_dim=24)
SCHEDULE = diffusion.NoiseSchedule()
LINE = torch.linspace(-3, 3, 7, dtype=torch.float64).view(-1, 1, 1, 1)


# ---- against exact Gaussians ---------------------------------------------------------------

def gaussian(z_t, ts, context, residuals=None):
    """A U-Net and BPS in closed form: z_0 ~ N(0, 1), readings r_i = z_0 + error_i N(0, 1) of it.

    The residuals are a reading: (r, error). eps = context - s grad log p_t(z_t | reading).
    """
    z = z_t.double().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        log_p = log_density(z, int(ts[0]), [residuals] if residuals else [])
        score, = torch.autograd.grad(log_p.sum(), z)
    return context[:, :1, :1, None] - SCHEDULE.alpha_sigma(ts, z)[1] * score


def read(reading, error, **options):
    """A Condition whose maps are a reading."""
    condition = Condition(None, None, **options)
    condition.residuals = lambda *_: [torch.tensor([reading]), torch.tensor([error])]
    return condition


def predict(conditions, z_t=LINE, t=501, context=0.0, guidance_scale=1.0):
    """eps of a Gaussian with these Conditions."""
    context = torch.full((len(z_t), 1, 1), context, dtype=torch.float64)
    return make_denoiser(gaussian, context, 0 * context[:1], guidance_scale, conditions)(z_t, t)


def log_density(z, t, readings, powers=None):
    """log p_t(z) prod_i p_t(r_i | z)^power_i, up to a constant, in closed form.

    z_0 | z_t ~ N(a z, s^2), since p_t(z) = N(0, a^2 + s^2) = N(0, 1).
    """
    a, s = (x.item() for x in SCHEDULE.alpha_sigma(torch.tensor([t]), z[:1].flatten()))
    log_p = -z**2 / 2
    for (reading, error), power in zip(readings, powers or [1] * len(readings)):
        log_p = log_p - power * (reading - a * z) ** 2 / (2 * (s**2 + error**2))
    return log_p


@pytest.mark.parametrize("strengths", [(0.5,), (2.0,), (1.0, 1.0), (0.3, 1.7)])
@pytest.mark.parametrize("t", [21, 501, 981])
def test_strengths_are_powers_of_the_conditions_likelihoods(strengths, t):
    readings = [(1.5, 0.4), (-0.5, 1.0)][:len(strengths)]
    conditions = [read(*reading, strength=strength)
                  for reading, strength in zip(readings, strengths)]
    z = LINE.clone().requires_grad_()
    score, = torch.autograd.grad(log_density(z, t, readings, strengths).sum(), z)
    s = SCHEDULE.alpha_sigma(torch.tensor([t]), LINE)[1]
    torch.testing.assert_close(predict(conditions, t=t), (-s * score).float())


def test_a_mask_is_a_strength_of_its_own_at_each_place():
    """A row of readings: each place is steered as by a number, its mask times the strength."""
    shares = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)

    def steered(**options):
        return predict([read(1.5, 0.4, **options), read(-0.5, 1.0)], LINE.expand(-1, -1, -1, 3))

    masked = steered(strength=2.0, mask=shares)
    for place, share in enumerate(shares.flatten().tolist()):
        torch.testing.assert_close(masked[..., place], steered(strength=2.0 * share)[..., place])


@pytest.mark.parametrize("readings", [[], [(1.5, 0.5)], [(1.5, 0.5), (0.5, 1.0)]], ids=len)
def test_sampling_draws_the_posterior_of_gaussian_readings(readings):
    """Precisions add up: 1 of the prior, 1 / error^2 of each reading."""
    precision = 1 + sum(1 / error**2 for _, error in readings)
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    # readings of one z_0 are independent given z_0, not given z_t: joined, they are one reading
    conditions = [read(sum(r / e**2 for r, e in readings) / (precision - 1),
                       (precision - 1) ** -0.5)] if readings else []
    *_, z = diffusion.sample(lambda z_t, t: predict(conditions, z_t, t), noise, SCHEDULE, 200)
    mean = sum(r / e**2 for r, e in readings) / precision
    assert z.mean().item() == pytest.approx(mean, abs=0.05)
    assert z.std().item() == pytest.approx(precision**-0.5, rel=0.05)


def test_guidance_extrapolates_with_conditions_in_both_passes():
    plain, guided = (predict([read(1.5, 0.4, strength=0.5)], context=0.25, guidance_scale=scale)
                     for scale in (1.0, 5.0))
    torch.testing.assert_close(guided - plain, torch.full_like(plain, 0.25 * 4))


# ---- maps, once a timestep -----------------------------------------------------------------

@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    return UNet(SMALL).eval().requires_grad_(False)


@pytest.fixture
def bps():
    """A BPS with random ports."""
    bps = BPS(config_for(SMALL, 1, 4))
    for parameter in bps.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return bps


def test_a_batch_of_conditions_serves_both_passes_of_guidance(unet, bps):
    conds, context = torch.rand(2, 1, 48, 32), torch.randn(2, 5, 24)
    z, empty = torch.randn(2, 4, 12, 8), torch.zeros(1, 5, 24)

    def steered(i):
        conditions = [Condition(bps, conds[i])]
        return make_denoiser(unet, context[i], empty, 3.0, conditions)(z[i], 500)

    torch.testing.assert_close(steered(slice(2)), torch.cat([steered([0]), steered([1])]),
                               atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nothing", [dict(strength=0.0), dict(mask=torch.zeros(1, 1, 12, 8)),
                                     dict(window=(0.0, 0.3))], ids=str)
def test_a_condition_that_steers_nothing_costs_nothing(unet, nothing):
    bps = Mock()
    condition = Condition(bps, torch.rand(1, 1, 48, 32), **nothing)
    denoise = make_denoiser(unet, torch.randn(1, 5, 24), torch.zeros(1, 5, 24), 3.0, [condition])
    denoise(torch.randn(1, 4, 12, 8), 500)
    bps.assert_not_called()


@pytest.mark.parametrize("window, active", [
    ((0.0, 1.0), (999, 750, 749, 500, 0)), ((0.0, 0.25), (999, 750)), ((0.25, 0.5), (749, 500)),
    ((0.5, 1.0), (0,))], ids=str)
def test_a_window_is_a_range_of_progress_from_noise_to_clean(window, active):
    condition = Condition(None, None, window=window)
    assert tuple(filter(condition.is_active, (999, 750, 749, 500, 0))) == active


def test_guidance_one_needs_no_empty_prompt(unet):
    context, z = torch.randn(1, 5, 24), torch.randn(1, 4, 12, 8)
    without = make_denoiser(unet, context, None, 1.0)(z, 500)
    assert torch.equal(without, make_denoiser(unet, context, torch.zeros(1, 5, 24), 1.0)(z, 500))
    torch.testing.assert_close(without, unet(z, torch.tensor([500]), context))
