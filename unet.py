"""The U-Net of Stable Diffusion 1.x and 2.x: the prior denoiser, and where BPS adds its maps.

Modules and attributes carry the names of the original single-file checkpoints: `input_blocks` is
the contracting path (CP), `middle_block` the transition path (TP), `output_blocks` the expansive
path (EP). The forward pass runs through these three lists, one loop each.

Shapes: B batch, C channels, H W rows and columns of the latent, N = H * W, L tokens, D width,
C_h = C / heads.

    unet = UNet(UNetConfig())           # random weights; inputs/checkpoints.py loads trained ones
    eps = unet(z_t, t, context)
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MAX_PERIOD = 10_000     # longest period of the timestep sinusoids (Attention Is All You Need, 3.5)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are Stable Diffusion 1.5's."""
    channels: tuple = (320, 640, 1280, 1280)           # one entry per level, outermost first
    attention: tuple = (True, True, True, False)       # levels with spatial transformers
    heads: tuple = (8, 8, 8, 8)                        # attention heads of each level
    blocks_per_level: int = 2
    context_dim: int = 768                             # width of the text states
    latent_channels: int = 4
    norm_groups: int = 32
    linear_projection: bool = False                    # Linear (SD 2) or 1x1 conv (SD 1)
    sample_size: int | None = None                     # side of the latents in training, if known


def timestep_embedding(t, dim):
    """Sinusoids (B, dim) float32 of timesteps t (B,), int or float in 0..999; cosines first.

    Source: Denoising Diffusion Probabilistic Models, arXiv 2006.11239. Stable Diffusion's
    checkpoints have the cosines first.
    """
    half = dim // 2
    # float32 and this order of operations, as in training: at t = 999 rounding is visible
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(exponents / half)
    angles = t.float()[:, None] * frequencies[None]                            # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)                      # (B, dim)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep added in between, plus a skip connection."""

    def __init__(self, channels_in, channels, t_emb_dim, norm_groups):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels_in), nn.SiLU(),
                                       nn.Conv2d(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(t_emb_dim, channels))
        self.out_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels), nn.SiLU(),
                                        nn.Dropout(0.0),    # keeps the checkpoint's numbering
                                        nn.Conv2d(channels, channels, 3, padding=1))
        self.skip_connection = (nn.Identity() if channels_in == channels
                                else nn.Conv2d(channels_in, channels, 1))

    def forward(self, h, t_emb):
        out = self.in_layers(h) + self.emb_layers(t_emb)[:, :, None, None]
        return self.skip_connection(h) + self.out_layers(out)


class CrossAttention(nn.Module):
    """Multi-head attention from the pixels h (B, N, C) to the context (B, L, D).

    With the pixels as their own context it is self-attention.
    """

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))

    def forward(self, h, context):
        B, N, C = h.shape
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # (B, heads, N or L, C_h)
                   for x in (self.to_q(h), self.to_k(context), self.to_v(context)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(B, N, C))


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first through a GELU (arXiv 2002.05202)."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, h):
        value, gate = self.proj(h).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron of the transformer, four times as wide inside."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim))

    def forward(self, h):
        return self.net(h)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, perceptron; each pre-normed, with a skip."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, h, context):
        normed = self.norm1(h)
        h = h + self.attn1(normed, normed)
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff(self.norm3(h))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map, plus a skip connection."""

    def __init__(self, channels, context_dim, heads, norm_groups, linear_projection):
        super().__init__()
        project = nn.Linear if linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)   # elsewhere 1e-5
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = project(channels, channels)

    def forward(self, h, context):
        B, C, H, W = h.shape
        tokens = self.norm(h).flatten(2).transpose(1, 2)                       # (B, N, C)
        tokens = apply_projection(self.proj_in, tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = apply_projection(self.proj_out, tokens)
        return h + tokens.transpose(1, 2).reshape(B, C, H, W)


def apply_projection(layer, tokens):
    """Apply a Linear or the equivalent 1x1 convolution to tokens (B, N, C)."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class Downsample(nn.Module):
    """Halve height and width, rounded up, with a strided convolution padded on all sides."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h):
        return self.op(h)


class Upsample(nn.Module):
    """Repeat pixels up to the size of the next skip, which may be odd, then convolve."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h, size):
        return self.conv(F.interpolate(h, size=size, mode="nearest"))


class UNetBlock(nn.Sequential):
    """One entry of a path: convolution, ResBlock, SpatialTransformer, Downsample or Upsample.

    A residual r of BPS enters the frozen U-Net here: the same map is added after every ResBlock
    and every SpatialTransformer of the block, and nowhere else (authors' code). A block with
    attention computes ST(Res(x) + r) + r. ST has a skip connection, so r counts about twice
    there, and three times in the middle block.
    """

    def forward(self, h, t_emb, context, residual=None, size=None):
        """Output (B, C_out, H_out, W_out) for h (B, C, H, W).

        residual: (B or 1, C_out, H, W) or None. size: (rows, columns) after an Upsample.
        """
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, t_emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            else:
                h = layer(h)
            if residual is not None and isinstance(layer, (ResBlock, SpatialTransformer)):
                h = h + residual
        return h


def run_block(block, *arguments, checkpointing):
    """Call the block; with checkpointing its activations are recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


class UNet(nn.Module):
    """Predicts the noise in a latent from the noisy latent, the timestep and the text."""
    checkpointing = False               # True saves memory and computes activations twice

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        base, levels = config.channels[0], len(config.channels)
        t_emb_dim = base * 4
        res_block = partial(ResBlock, t_emb_dim=t_emb_dim, norm_groups=config.norm_groups)
        transformer = partial(SpatialTransformer, context_dim=config.context_dim,
                              norm_groups=config.norm_groups,
                              linear_projection=config.linear_projection)

        self.time_embed = nn.Sequential(nn.Linear(base, t_emb_dim), nn.SiLU(),
                                        nn.Linear(t_emb_dim, t_emb_dim))
        # Contracting path. `skip_channels` records what the expansive path will concatenate.
        self.input_blocks = nn.ModuleList(
            [UNetBlock(nn.Conv2d(config.latent_channels, base, 3, padding=1))])
        skip_channels = [base]
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks_per_level):
                layers = [res_block(skip_channels[-1], channels)]
                if config.attention[level]:
                    layers.append(transformer(channels, heads=config.heads[level]))
                self.input_blocks.append(UNetBlock(*layers))
                skip_channels.append(channels)
            if level < levels - 1:
                self.input_blocks.append(UNetBlock(Downsample(channels)))
                skip_channels.append(channels)

        self.middle_block = UNetBlock(res_block(channels, channels),        # innermost level
                                      transformer(channels, heads=config.heads[-1]),
                                      res_block(channels, channels))

        # Expansive path: one block per skip, so one more per level than on the way down.
        self.output_blocks = nn.ModuleList()
        channels_in = channels
        for level in reversed(range(levels)):
            channels = config.channels[level]
            for i in range(config.blocks_per_level + 1):
                layers = [res_block(channels_in + skip_channels.pop(), channels)]
                channels_in = channels
                if config.attention[level]:
                    layers.append(transformer(channels, heads=config.heads[level]))
                if i == config.blocks_per_level and level > 0:
                    layers.append(Upsample(channels))
                self.output_blocks.append(UNetBlock(*layers))

        self.out = nn.Sequential(nn.GroupNorm(config.norm_groups, base), nn.SiLU(),
                                 nn.Conv2d(base, config.latent_channels, 3, padding=1))

    def time_embedding(self, t):
        """Embedding (B, 4 * base channels) of timesteps t (B,), which BPS shares."""
        sinusoids = timestep_embedding(t, self.config.channels[0])
        return self.time_embed(sinusoids.to(self.time_embed[0].weight.dtype))

    def forward(self, z_t, t, context, residuals=None):
        """Predicted noise eps (B, 4, H, W), or v if the model was trained to predict v.

        z_t: (B, 4, H, W) noisy scaled latents. t: (B,) int or float in 0..999. context: (B, L, D)
        text states. residuals: None, or a list with one entry per block in the order input,
        middle, output: a map (batch B or 1) of the shape of its ResBlock's output, or None for no
        steering.
        """
        blocks = len(self.input_blocks) + 1 + len(self.output_blocks)
        residuals = [None] * blocks if residuals is None else residuals
        if len(residuals) != blocks:
            raise ValueError(f"residuals must have {blocks} entries, one per block, got "
                             f"{len(residuals)}. Pass None for a block without a port.")
        t_emb = self.time_embedding(t)
        residual = iter(residuals)
        call = partial(run_block, checkpointing=self.checkpointing)

        h, skips = z_t, []
        for block in self.input_blocks:
            h = call(block, h, t_emb, context, next(residual))
            skips.append(h)                             # so the skips carry the residuals along
        h = call(self.middle_block, h, t_emb, context, next(residual))
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if skips else None
            h = call(block, h, t_emb, context, next(residual), size)
        return self.out(h)
