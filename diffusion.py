"""Noise schedule, classifier-free guidance and the DDIM sampler, a generator.

Shapes: B batch, 4 latent channels, H W rows and columns of the latent.

    schedule = NoiseSchedule()
    for z_t in sample(denoise, noise, schedule, steps=50):
        pass                                # z_t is one step cleaner each time; the last is z_0
"""
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weights import WeightsError, read_json


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise a latent holds at each timestep; the defaults are Stable Diffusion's.

    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, with abar = `alphas_cumprod` (1000,) float64.
    """
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    steps_offset: int = 1
    alphas_cumprod: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # "scaled linear": the betas' square roots are equally spaced
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps,
                               dtype=torch.float64) ** 2
        object.__setattr__(self, "alphas_cumprod", (1 - betas).cumprod(0))

    def add_noise(self, z, noise, t):
        """Returns z_t (B, 4, H, W): the clean z with as much noise as timestep t (B,) has."""
        abar = self.alphas_cumprod.to(z.device, z.dtype)[t].view(-1, 1, 1, 1)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise


def load_schedule(path):
    """Returns the NoiseSchedule of an SD folder; a single file has Stable Diffusion's.

    Errors: WeightsError where scheduler_config.json asks for what is not implemented.
    """
    file = Path(path) / "scheduler" / "scheduler_config.json"
    config = read_json(file) if file.is_file() else {}
    for key, allowed in dict(beta_schedule="scaled_linear", prediction_type="epsilon").items():
        if config.get(key, allowed) != allowed:
            raise WeightsError(f"{file}: {key} = {config[key]!r} is not implemented; "
                               f"allowed is {allowed!r}")
    return NoiseSchedule(config.get("beta_start", 0.00085), config.get("beta_end", 0.012),
                         config.get("num_train_timesteps", 1000))


def ddim_timesteps(steps, schedule):
    """Returns `steps` timesteps, highest first, with leading spacing: 981, 961 .. 1 for 50."""
    if not 1 <= steps < schedule.timesteps:
        raise ValueError(f"{steps} steps: allowed are 1 to {schedule.timesteps - 1}")
    stride = schedule.timesteps // steps
    return [i * stride + schedule.steps_offset for i in reversed(range(steps))]


def guide(eps_empty, eps_text, guidance_scale):
    """Returns the guided eps: 1 is no guidance, more follows the prompt more strongly.

    Source: classifier-free guidance, arXiv 2207.12598.
    """
    return eps_empty + guidance_scale * (eps_text - eps_empty)


def ddim_step(z_t, eps, abar_t, abar_prev):
    """Returns z at the previous timestep for the predicted noise eps; deterministic (eta 0).

    z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    z_prev = sqrt(abar_prev) z_0 + sqrt(1 - abar_prev) eps
    Source: Denoising Diffusion Implicit Models, arXiv 2010.02502.
    """
    z_0 = (z_t - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5
    return abar_prev**0.5 * z_0 + (1 - abar_prev) ** 0.5 * eps


def sample(denoise, z_t, schedule, steps=50):
    """Yields z_t (B, 4, H, W) after each of the `steps` DDIM steps, the last one being clean.

    denoise(z_t, t) -> eps, with t a Python int. z_t: standard normal noise (B, 4, H, W). The last
    step goes to abar_0, not to 1, as Stable Diffusion's own sampler does.
    """
    timesteps = ddim_timesteps(steps, schedule)
    for i, t in enumerate(timesteps):
        t_prev = timesteps[i + 1] if i + 1 < len(timesteps) else 0
        abar_t, abar_prev = (schedule.alphas_cumprod[s].item() for s in (t, t_prev))
        z_t = ddim_step(z_t, denoise(z_t, t), abar_t, abar_prev)
        yield z_t
