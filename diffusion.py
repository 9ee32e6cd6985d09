"""Noise schedule, noise by seed, classifier-free guidance, and three samplers in one generator.

With abar_t the share of a latent's variance that is signal at timestep t, alpha_t = sqrt(abar_t)
and sigma_t = sqrt(1 - abar_t):

    z_t = alpha_t z_0 + sigma_t noise,      v = alpha_t noise - sigma_t z_0

A model predicts the noise (SD 1.x, 2.x base) or v (SD 2.x at 768 px). Either gives an estimate of
z_0, and that is all a sampler needs. DDIM and Euler are the same step on other timesteps;
DPM-Solver++ 2M replaces the estimate by an extrapolation from this step's and the one before.

Shapes: B batch, 4 latent channels, H W rows and columns of the latent.

    for z_t in sample(denoise, draw_noise([0], (4, 64, 64)), NoiseSchedule(), steps=50):
        pass                                # z_t is one step cleaner each time; the last is z_0
"""
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

SAMPLERS = ("ddim", "dpm++2m", "dpm++2m-karras", "euler", "euler-karras")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
RHO = 7                         # of Karras et al.: how much denser steps lie at low noise


class Sampling(NamedTuple):
    """How pictures are drawn.

    On the embedded base 20 steps of dpm++2m are as good as 50 of DDIM. Stable Diffusion's own
    weights usually get 20 or more. The guidance scale is the embedded base's.
    """
    sampler: str = "dpm++2m"                # one of SAMPLERS
    steps: int = 20
    guidance_scale: float = 3.0             # 1 is no guidance; for SD 1.x and 2.x 7.5 is usual


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise a latent holds at each timestep; the defaults are Stable Diffusion's.

    alphas_cumprod: abar (1000,) float64. prediction_type: what the model predicts. spacing: how
    steps are laid over the timesteps; None is each sampler's usual way. set_alpha_to_one: whether
    DDIM ends at abar = 1, not abar_0.
    """
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    prediction_type: str = "epsilon"
    spacing: str | None = None
    steps_offset: int = 1                   # of leading steps
    set_alpha_to_one: bool = False
    alphas_cumprod: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # "scaled linear": the betas' square roots are equally spaced
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps,
                               dtype=torch.float64) ** 2
        object.__setattr__(self, "alphas_cumprod", (1 - betas).cumprod(0))

    def signal_and_noise(self, t, like):
        """Returns alpha_t and sigma_t, each (B, 1, 1, 1), at timesteps t (B,).

        like: z (B, 4, H, W), or of any other rank, as in the plane; they get its rank, dtype and
        device.
        """
        # not in half precision, where 1 - abar_0 may be 0; nor in float64, which Apple's GPU lacks
        dtype = torch.promote_types(like.dtype, torch.float32)
        abar = self.alphas_cumprod.to(dtype).to(like.device)[t]
        abar = abar.view(-1, *(1 for _ in like.shape[1:]))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def add_noise(self, z_0, noise, t):
        """Returns z_t (B, 4, H, W): the clean z_0 with as much noise as timestep t (B,) has."""
        alpha, sigma = self.signal_and_noise(t, z_0)
        return alpha * z_0 + sigma * noise

    def target(self, z_0, noise, t):
        """Returns what the model should predict (B, 4, H, W) for add_noise(z_0, noise, t).

        Source of v: Progressive Distillation, arXiv 2202.00512.
        """
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self.signal_and_noise(t, z_0)
        return alpha * noise - sigma * z_0

    def clean(self, z_t, prediction, alpha, sigma):
        """Returns the z_0 (B, 4, H, W) that a prediction implies.

        alpha and sigma are numbers, those of z_t's timestep.
        """
        if self.prediction_type == "epsilon":           # z_t = alpha z_0 + sigma eps
            return (z_t - sigma * prediction) / alpha
        return alpha * z_t - sigma * prediction         # from v = alpha eps - sigma z_0, too


def draw_noise(seeds, shape):
    """Returns standard normal noise (B, *shape), each row a function of its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


def guide(eps_empty, eps_text, guidance_scale):
    """Returns the guided eps (or v): 1 is no guidance, a larger scale follows the prompt more.

    Source: classifier-free guidance, arXiv 2207.12598.
    """
    return eps_empty + guidance_scale * (eps_text - eps_empty)


def spaced_timesteps(steps, schedule, sampler="ddim"):
    """Returns `steps` timesteps (steps,), highest first: for DDIM and 50 steps 981, 961 .. 1.

    The usual spacing is leading for DDIM, as in Stable Diffusion's own code, and linspace for the
    others. DPM-Solver++ lays one step more and leaves out the lowest, and Euler does not round, as
    diffusers does it. Source of the spacings: arXiv 2305.08891, table 2.
    """
    if not 1 <= steps < schedule.timesteps:
        raise ValueError(f"{steps} steps: allowed are 1 to {schedule.timesteps - 1}")
    last, laid = schedule.timesteps - 1, steps + sampler.startswith("dpm++")
    spacing = schedule.spacing or ("leading" if sampler == "ddim" else "linspace")
    if spacing == "trailing":
        return np.round(schedule.timesteps * (1 - np.arange(steps) / steps)) - 1
    if spacing == "linspace":
        spaced = np.linspace(0, last, laid)[::-1][:steps]
        return spaced if sampler.startswith("euler") else spaced.round()
    leading = np.arange(laid)[::-1][:steps] * (schedule.timesteps // laid) + schedule.steps_offset
    return leading.clip(max=last)


def noise_ratios(steps, schedule, sampler="ddim"):
    """Returns (timesteps (steps,), sigma_t / alpha_t (steps + 1,)) of a sampler, the last clean.

    The ratio is what Karras et al. call sigma. Their levels are equally spaced in ratio^(1/7), and
    the timesteps fall between the whole ones; a 2M solver rounds them. Source: arXiv 2206.00364,
    equation 5.
    """
    abar = schedule.alphas_cumprod.numpy()
    all_ratios, all_timesteps = np.sqrt((1 - abar) / abar), np.arange(schedule.timesteps)
    timesteps = spaced_timesteps(steps, schedule, sampler)
    ratios = np.interp(timesteps, all_timesteps, all_ratios)
    if sampler.endswith("-karras"):
        # as diffusers: DPM-Solver++ spans the whole schedule, Euler its own timesteps
        is_dpm = sampler.startswith("dpm++")
        ends = (all_ratios[-1], all_ratios[0]) if is_dpm else (ratios[0], ratios[-1])
        ratios = np.linspace(*(end ** (1 / RHO) for end in ends), steps) ** RHO
        timesteps = np.interp(np.log(ratios), np.log(all_ratios), all_timesteps)
        timesteps = timesteps.round() if is_dpm else timesteps
    end = all_ratios[0] if sampler == "ddim" and not schedule.set_alpha_to_one else 0.0
    return timesteps, np.append(ratios, end)


def sampler_steps(steps, schedule, sampler="ddim"):
    """Returns (timesteps, [(alpha, sigma)]) of a sampler as numbers, the last pair being the end's.

    A timestep is an int if it is whole.
    """
    timesteps, ratios = noise_ratios(steps, schedule, sampler)
    return ([int(t) if t == int(t) else t for t in timesteps.tolist()],
            [(1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5)
             for ratio in ratios.tolist()])


def sample(denoise, z_t, schedule, steps=50, sampler="ddim", start=0):
    """Yields z_t (B, 4, H, W) after each of the steps from `start` on, the last one being clean.

    denoise(z_t, t) -> the model's prediction; t is a Python int if it is whole, else a float.
    z_t: standard normal noise (B, 4, H, W), or with start > 0 a latent with the noise of that
    step. sampler: one of SAMPLERS; all are deterministic. DDIM's last step goes to abar_0, not to
    1, as Stable Diffusion's own does. Sources: DDIM, arXiv 2010.02502, equation 12; DPM-Solver++
    2M, arXiv 2211.01095, algorithm 2; Euler, arXiv 2206.00364.
    """
    timesteps, alphas_sigmas = sampler_steps(steps, schedule, sampler)
    if sampler.startswith("euler") and schedule.spacing != "leading" and start == 0:
        z_t = z_t * alphas_sigmas[0][1]    # k-diffusion starts from sigma_t noise, as if z_0 were 0
    z_0_before, h_before = None, None
    for i in range(start, steps):
        (alpha, sigma), (alpha_next, sigma_next) = alphas_sigmas[i:i + 2]
        estimate = z_0 = schedule.clean(z_t, denoise(z_t, timesteps[i]), alpha, sigma)
        if sampler.startswith("dpm++") and sigma_next > 0:
            h = np.log(alpha_next / sigma_next) - np.log(alpha / sigma)
            if z_0_before is not None:
                estimate = z_0 + h / (2 * h_before) * (z_0 - z_0_before)
            z_0_before, h_before = z_0, h
        z_t = alpha_next * estimate + sigma_next * (z_t - alpha * estimate) / sigma
        yield z_t
