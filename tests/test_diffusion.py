"""Schedule and DDIM against closed forms."""
import numpy as np
import pytest
import torch

from diffusion import NoiseSchedule, sample, spaced_timesteps


def test_the_schedule_has_stable_diffusions_known_values():
    abar = NoiseSchedule().alphas_cumprod
    assert abar.dtype == torch.float64 and len(abar) == 1000
    sigma = ((1 - abar) / abar).sqrt()
    assert sigma[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigma[999].item() == pytest.approx(14.6146, abs=1e-4)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(abar.numpy(), np.cumprod(1 - betas), rtol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_each_row_gets_its_own_noise_and_the_target_gives_z_0_back(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    z, noise = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    t = torch.tensor([10, 900])                             # each row has its own
    z_t, target = schedule.add_noise(z, noise, t), schedule.target(z, noise, t)
    abar = schedule.alphas_cumprod[t].view(2, 1, 1, 1)
    torch.testing.assert_close(z_t, abar**0.5 * z + (1 - abar)**0.5 * noise)
    torch.testing.assert_close(schedule.estimate_z_0(z_t, target, abar**0.5, (1 - abar)**0.5), z)


def test_fifty_steps_of_ddim_are_981_961_to_1():
    assert spaced_timesteps(50, NoiseSchedule()).tolist() == list(range(981, 0, -20))
    assert spaced_timesteps(3, NoiseSchedule()).tolist() == [667, 334, 1]
    with pytest.raises(ValueError, match="must be in 1..999, got 0"):
        spaced_timesteps(0, NoiseSchedule())
    for sampler in ("ddim", "dpm++2m"):
        steps = spaced_timesteps(999, NoiseSchedule(spacing="leading"), sampler)
        assert steps.max() == 999 and steps.min() >= 1


def test_ddim_maps_a_normal_distribution_to_its_own_width():
    """For z_0 ~ N(0, s^2), eps* is linear in z_t, and so is DDIM's exact map."""
    schedule, s = NoiseSchedule(), 0.3
    abar = schedule.alphas_cumprod

    def denoise(z_t, t):
        return (1 - abar[t])**0.5 / (abar[t] * s * s + 1 - abar[t]) * z_t

    def relative_error(steps):
        *_, end = sample(denoise, torch.ones(1, 1, 1, 1, dtype=torch.float64), schedule, steps)
        first = int(spaced_timesteps(steps, schedule)[0])
        # the probability flow keeps quantiles, so it scales by the ratio of standard deviations
        width_0, width_first = ((abar[t] * s * s + 1 - abar[t])**0.5 for t in (0, first))
        return abs(end.item() / (width_0 / width_first).item() - 1)

    assert relative_error(500) < 0.01
    assert relative_error(250) == pytest.approx(2 * relative_error(500), rel=0.3)    # first order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_levels_are_right_in_half_precision(dtype):
    schedule, t = NoiseSchedule(), torch.tensor([0, 500, 999])
    exact = schedule.alpha_sigma(t, torch.zeros(3, 4, 2, 2, dtype=torch.float64))
    rounded_levels = schedule.alpha_sigma(t, torch.zeros(3, 4, 2, 2, dtype=dtype))
    for level, rounded in zip(exact, rounded_levels):
        assert rounded.dtype == dtype and rounded.shape == (3, 1, 1, 1)
        torch.testing.assert_close(rounded.double(), level, rtol=4e-3, atol=0)
