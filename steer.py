"""From the prior to the posterior denoiser: BPS's maps, strengths, windows, guidance.

    conditions = [Steering(bps, unet, cond, strength=0.8, window=(0.0, 0.5))]
    denoise = make_denoiser(unet, context, context_empty, 3.0, conditions, timesteps)
    for z_t in diffusion.sample(denoise, draw_noise(seeds, shape), schedule, steps):
        ...

Shapes: B batch, C channels, H W rows and columns of the latent, L tokens, D width.
"""
import torch
from tqdm import tqdm

import diffusion
from bps import posterior
from conditions import images_at_a_time

CACHE_BYTES = 3 * 2**30         # for maps that are kept: 50 steps of SD 1.5 at 512 px are 2.4 GB


def room_for_maps(device):
    """Returns how many bytes of maps may be kept: CACHE_BYTES, or half of what a GPU has free."""
    if torch.device(device).type != "cuda":
        return CACHE_BYTES
    return min(CACHE_BYTES, torch.cuda.mem_get_info(device)[0] // 2)


def draw_noise(seeds, shape):
    """Returns standard normal noise (B, *shape), each row a function of its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


class Steering:
    """One condition: BPS's maps of it, and how strongly and how long they steer.

    BPS sees neither the latent nor the text, so the maps of a timestep are computed once, whatever
    the number of seeds, prompts and halves of guidance. They are kept for the next pictures as far
    as cache_bytes reach; of the other timesteps only the last one's are.
    """

    def __init__(self, bps, unet, cond, scale=1.0, strength=1.0, window=(0.0, 1.0),
                 cache_bytes=CACHE_BYTES):
        """cond: (B or 1, C, f H, f W) in [0, 1]. scale multiplies the maps. strength tempers the
        posterior: p(c_add | z)^strength. window: the share of the steps that are steered.
        """
        self.bps, self.unet, self.cond = bps, unet, cond
        self.scale, self.strength, self.window = scale, strength, window
        self.cache_bytes, self.kept, self.last = cache_bytes, {}, (None, None)

    def __call__(self, t, halves=1):
        """Returns the residuals at timestep t for the halves of guidance: batch 1 or halves * B."""
        if t in self.kept:
            maps = self.kept[t]
        elif t == self.last[0]:
            maps = self.last[1]
        else:
            maps = self.compute(t)
            self.last = t, maps
            size = sum(r.nbytes for r in maps if r is not None)
            if size * (len(self.kept) + 1) <= self.cache_bytes:
                self.kept[t] = maps
        if len(self.cond) == 1 or halves == 1:
            return maps
        return [r if r is None else torch.cat([r] * halves) for r in maps]

    def compute(self, t):
        """Returns BPS's residuals at timestep t, times the scale."""
        t_emb = self.unet.time_embedding(
            torch.tensor([t], device=next(self.unet.parameters()).device))
        return [r if r is None else self.scale * r
                for r in self.bps(self.cond.to(t_emb), t_emb)]

    def forget_last(self):
        """Drops the maps of the last timestep, where they are not kept for the next pictures."""
        self.last = None, None

    def steers(self, share):
        """Returns whether it does anything once a share of the steps is done, 0 to below 1."""
        start, end = self.window
        return self.scale != 0 and self.strength != 0 and start <= share < end


def make_denoiser(unet, context, context_empty, guidance_scale, conditions=(), timesteps=()):
    """Returns denoise(z_t, t) -> eps (or v): the prior, or the posterior of all the conditions.

    context: (B, L, D); context_empty: (1, L, D), of the empty or negative prompt, which guidance 1
    does not need. conditions: Steerings; a single one of strength 1 costs nothing more than the
    prior, all others a pass of the U-Net each. timesteps: of the steps, in order; what windows are
    a share of. z_t and eps are float32, whatever the U-Net computes in. Errors: ValueError where a
    window is given without timesteps.
    """
    if not timesteps and any(each.window != (0.0, 1.0) for each in conditions):
        raise ValueError("a window is a share of the steps; give timesteps")
    halves = 1 if guidance_scale == 1 else 2
    context = torch.cat([context_empty.expand_as(context), context][-halves:])
    shares = {t: i / len(timesteps) for i, t in enumerate(timesteps)}

    def denoise(z_t, t):
        """Returns the guided prediction (B, 4, H, W)."""
        z = torch.cat([z_t] * halves).to(context.dtype, memory_format=torch.channels_last)
        ts = torch.full((len(z),), t, device=z.device)
        active = [each for each in conditions if each.steers(shares.get(t, 0.0))]
        posteriors = [unet(z, ts, context, each(t, halves)).float() for each in active]
        if len(active) == 1 and active[0].strength == 1:
            eps = posteriors[0]
        else:
            eps = posterior(unet(z, ts, context).float(), posteriors,
                            [each.strength for each in active])
        return eps if halves == 1 else diffusion.guide(*eps.chunk(2), guidance_scale)

    return denoise


def draw(unet, vae, schedule, context, context_empty, seeds, size, steps, guidance_scale,
         conditions=()):
    """Returns pictures x (B, 3, size, size), one per text state and seed, drawn as one batch.

    context: (B, L, D); seeds: B integers; conditions: Steerings of B conditions each.
    """
    timesteps, _ = diffusion.levels(steps, schedule)
    denoise = make_denoiser(unet, context, context_empty, guidance_scale, conditions, timesteps)
    side = size // vae.factor
    noise = draw_noise(seeds, (unet.config.latent_channels, side, side)).to(context.device)
    for z in tqdm(diffusion.sample(denoise, noise, schedule, steps), total=steps, leave=False,
                  desc="draw with BPS" if conditions else "draw"):
        pass
    return torch.cat([vae.decode(part) for part in z.split(images_at_a_time(size))])
