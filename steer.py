"""From the prior to the posterior denoiser: BPS's maps at each timestep, guidance, strengths.

    denoise = make_denoiser(unet, context, context_empty, 3.0, Steering(bps, unet, cond))
    for z_t in diffusion.sample(denoise, draw_noise(seeds, shape), schedule, steps):
        ...

Shapes: B batch, C channels, H W rows and columns of the latent, L tokens, D width.
"""
import torch
from tqdm import tqdm

import diffusion
from bps import posterior
from conditions import images_at_a_time


def draw_noise(seeds, shape):
    """Returns standard normal noise (B, *shape), each row a function of its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


class Steering:
    """BPS's residuals for one condition: computed once a timestep, whatever the number of seeds."""

    def __init__(self, bps, unet, cond):
        """cond: (B or 1, C, f H, f W) in [0, 1]."""
        self.bps, self.unet, self.cond = bps, unet, cond
        self.t, self.residuals = None, None

    def __call__(self, t, halves):
        """Returns the residuals at timestep t for the halves of guidance: batch 1 or halves * B."""
        if t != self.t:
            t_emb = self.unet.time_embedding(torch.tensor([t], device=self.cond.device))
            residuals = self.bps(self.cond.to(t_emb.dtype), t_emb)
            if len(self.cond) > 1:
                residuals = [r if r is None else torch.cat([r] * halves) for r in residuals]
            self.t, self.residuals = t, residuals
        return self.residuals


def make_denoiser(unet, context, context_empty, guidance_scale, steering=None, strength=1.0):
    """Returns denoise(z_t, t) -> eps (or v): the prior, or the posterior where there is steering.

    context: (B, L, D); context_empty: (1, L, D), of the empty or negative prompt, which guidance 1
    does not need. strength: 0 is the prior, 1 the posterior; others cost a second pass of the
    U-Net. z_t and eps are float32, whatever the U-Net computes in.
    """
    halves = 1 if guidance_scale == 1 else 2
    context = torch.cat([context_empty.expand_as(context), context][-halves:])

    def denoise(z_t, t):
        """Returns the guided prediction (B, 4, H, W)."""
        z = torch.cat([z_t] * halves).to(context.dtype, memory_format=torch.channels_last)
        ts = torch.full((len(z),), t, device=z.device)
        if steering is None or strength == 0:
            eps = unet(z, ts, context)
        else:
            eps = unet(z, ts, context, steering(t, halves))
            if strength != 1:
                eps = posterior(unet(z, ts, context), [eps], [strength])
        eps = eps.float()
        return eps if halves == 1 else diffusion.guide(*eps.chunk(2), guidance_scale)

    return denoise


def draw(unet, vae, schedule, context, context_empty, seeds, size, steps, guidance_scale,
         steering=None):
    """Returns pictures x (B, 3, size, size), one per text state and seed, drawn as one batch.

    context: (B, L, D); seeds: B integers; steering: a Steering of B conditions, or None for the
    frozen base.
    """
    denoise = make_denoiser(unet, context, context_empty, guidance_scale, steering)
    side = size // vae.factor
    noise = draw_noise(seeds, (unet.config.latent_channels, side, side)).to(context.device)
    for z in tqdm(diffusion.sample(denoise, noise, schedule, steps), total=steps, leave=False,
                  desc="draw with BPS" if steering else "draw"):
        pass
    return torch.cat([vae.decode(part) for part in z.split(images_at_a_time(size))])
