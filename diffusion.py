"""Noise schedule, seeded noise, classifier-free guidance, and three samplers in one generator.

abar_t is the fraction of a latent's variance that is signal at timestep t. With alpha_t =
sqrt(abar_t) and sigma_t = sqrt(1 - abar_t):

    z_t = alpha_t z_0 + sigma_t noise,      v = alpha_t noise - sigma_t z_0

A model predicts the noise (SD 1.x, 2.x base) or v (SD 2.x at 768 px). Either gives an estimate of
z_0, which is all a sampler needs. DDIM and Euler take the same step at different timesteps.
DPM-Solver++ 2M extrapolates the estimate from the current and the previous step.

Shapes: B batch, 4 latent channels, H W rows and columns of the latent.

    for z_t in sample(denoise, draw_noise([0], (4, 64, 64)), NoiseSchedule(), steps=50):
        pass                                # less noise at each step; the last z_t is z_0
"""
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-karras")
PREDICTION_TYPES = ("epsilon", "v_prediction")
RHO = 7                         # Karras et al.: how much denser the steps are at low noise


class Sampling(NamedTuple):
    """Settings of a sampler; the guidance scale is the embedded base's."""
    sampler: str = "dpm++2m"                # one of SAMPLERS
    steps: int = 20
    guidance_scale: float = 3.0             # 1 is no guidance; 7.5 is usual for SD


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise level of each timestep; the defaults are Stable Diffusion's.

    prediction_type: what the model predicts. spacing: leading, trailing or linspace, how sampling
    steps are spread over the timesteps; None is the usual spacing of each sampler.
    set_alpha_to_one: whether DDIM ends at abar = 1 instead of abar_0.
    """
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    prediction_type: str = "epsilon"
    spacing: str | None = None
    steps_offset: int = 1                   # added to leading timesteps
    set_alpha_to_one: bool = False

    @cached_property
    def alphas_cumprod(self):
        """abar (1000,) float64."""
        # "scaled linear": the square roots of the betas are equally spaced
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps,
                               dtype=torch.float64) ** 2
        return (1 - betas).cumprod(0)

    def alpha_sigma(self, t, like):
        """alpha_t and sigma_t of timesteps t (B,), with the rank, dtype and device of `like`.

        Each is (B, 1, 1, 1) for a latent (B, 4, H, W), and (B, 1) for points in the plane.
        """
        # half precision could round 1 - abar_0 to 0, and Apple's GPU has no float64
        dtype = torch.promote_types(like.dtype, torch.float32)
        abar = self.alphas_cumprod.to(dtype).to(like.device)[t]
        abar = abar.view(-1, *(1 for _ in like.shape[1:]))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def add_noise(self, z_0, noise, t):
        """Noisy latent z_t (B, 4, H, W): the clean z_0 with the noise level of timestep t (B,)."""
        alpha, sigma = self.alpha_sigma(t, z_0)
        return alpha * z_0 + sigma * noise

    def target(self, z_0, noise, t):
        """Training target (B, 4, H, W) for the input add_noise(z_0, noise, t).

        Source of v: Progressive Distillation, arXiv 2202.00512.
        """
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self.alpha_sigma(t, z_0)
        return alpha * noise - sigma * z_0

    def estimate_z_0(self, z_t, prediction, alpha, sigma):
        """Estimate of z_0 (B, 4, H, W) from a prediction; alpha and sigma are numbers."""
        if self.prediction_type == "epsilon":           # z_t = alpha z_0 + sigma eps
            return (z_t - sigma * prediction) / alpha
        return alpha * z_t - sigma * prediction         # the same from v = alpha eps - sigma z_0


def draw_noise(seeds, shape):
    """Standard normal noise (B, *shape); each row depends on its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


def guide(eps_empty, eps_text, guidance_scale):
    """Guided eps (or v): scale 1 is no guidance, a larger one follows the prompt more closely.

    Source: classifier-free guidance, arXiv 2207.12598.
    """
    return eps_empty + guidance_scale * (eps_text - eps_empty)


def spaced_timesteps(steps, schedule, sampler="ddim"):
    """Timesteps (steps,), highest first: 981, 961 .. 1 for 50 steps of DDIM.

    The usual spacing is leading for DDIM, as in Stable Diffusion's own code, and linspace for the
    others. As in diffusers, DPM-Solver++ omits the lowest of steps + 1 timesteps, and Euler does
    not round. Source of the spacings: arXiv 2305.08891, table 2.
    """
    last = schedule.timesteps - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps must be in 1..{last}, got {steps}")
    num_points = steps + sampler.startswith("dpm++")
    spacing = schedule.spacing or ("leading" if sampler == "ddim" else "linspace")
    if spacing == "trailing":
        return np.round(schedule.timesteps * (1 - np.arange(steps) / steps)) - 1
    if spacing == "linspace":
        spaced = np.linspace(0, last, num_points)[::-1][:steps]
        return spaced if sampler.startswith("euler") else spaced.round()
    spaced = np.arange(num_points)[::-1][:steps] * (schedule.timesteps // num_points)
    return (spaced + schedule.steps_offset).clip(max=last)


def sampler_steps(steps, schedule, sampler="ddim"):
    """Timesteps [steps] and noise levels [(alpha, sigma)] (steps + 1) of a sampler, as numbers.

    The last level is that of the result. A timestep is an int if it is whole. The ratio sigma /
    alpha is the sigma of Karras et al.: their levels are equally spaced in ratio^(1/7), so their
    timesteps are fractions; a 2M solver rounds them. Source: arXiv 2206.00364, equation 5.
    """
    abar = schedule.alphas_cumprod.numpy()
    all_ratios, all_timesteps = np.sqrt((1 - abar) / abar), np.arange(schedule.timesteps)
    timesteps = spaced_timesteps(steps, schedule, sampler)
    ratios = np.interp(timesteps, all_timesteps, all_ratios)
    if sampler.endswith("-karras"):
        # as in diffusers: DPM-Solver++ spans the whole schedule, Euler its own timesteps
        is_dpm = sampler.startswith("dpm++")
        ends = (all_ratios[-1], all_ratios[0]) if is_dpm else (ratios[0], ratios[-1])
        ratios = np.linspace(*(end ** (1 / RHO) for end in ends), steps) ** RHO
        timesteps = np.interp(np.log(ratios), np.log(all_ratios), all_timesteps)
        timesteps = timesteps.round() if is_dpm else timesteps
    end = all_ratios[0] if sampler == "ddim" and not schedule.set_alpha_to_one else 0.0
    return ([int(t) if t == int(t) else t for t in timesteps.tolist()],
            [(1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5)
             for ratio in (*ratios.tolist(), float(end))])


def sample(denoise, z_t, schedule, steps=50, sampler="ddim", start=0):
    """Yield z_t (B, 4, H, W) after each step from number `start` on; the last one is the result.

    denoise(z_t, t) -> the model's prediction; t is a Python int if it is whole, else a float.
    z_t: standard normal noise (B, 4, H, W), or with start > 0 a latent with the noise level of
    that step. sampler: one of SAMPLERS; all are deterministic. The last step of DDIM goes to
    abar_0, not to 1, as in Stable Diffusion's own code. Sources: DDIM, arXiv 2010.02502, equation
    12; DPM-Solver++ 2M, arXiv 2211.01095, algorithm 2; Euler, arXiv 2206.00364.
    """
    timesteps, alphas_sigmas = sampler_steps(steps, schedule, sampler)
    if sampler.startswith("euler") and schedule.spacing != "leading" and start == 0:
        z_t = z_t * alphas_sigmas[0][1]    # k-diffusion starts at sigma_t noise, as if z_0 were 0
    z_0_before = h_before = None            # h is a step's length in log (alpha / sigma)
    for i in range(start, steps):
        (alpha, sigma), (alpha_next, sigma_next) = alphas_sigmas[i:i + 2]
        estimate = z_0 = schedule.estimate_z_0(z_t, denoise(z_t, timesteps[i]), alpha, sigma)
        if sampler.startswith("dpm++") and sigma_next > 0:      # the last step's h is infinite
            h = np.log(alpha_next / sigma_next) - np.log(alpha / sigma)
            if z_0_before is not None:
                estimate = z_0 + h / (2 * h_before) * (z_0 - z_0_before)
            z_0_before, h_before = z_0, h
        # keep the noise that the estimate implies, and mix it in at the next level
        z_t = alpha_next * estimate + sigma_next * (z_t - alpha * estimate) / sigma
        yield z_t
