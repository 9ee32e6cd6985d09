"""The autoencoder of Stable Diffusion: from images to a small latent space and back.

Shapes: B batch, C channels, H W rows and columns, N = H * W of the innermost map.
f = 2 ** (levels - 1) is the downsampling factor: 8 for Stable Diffusion, 4 for the embedded base.

    vae = AutoencoderKL(VAEConfig())    # random weights; inputs/checkpoints.py loads trained ones
    x = vae.decode(vae.encode(x).mean)
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LOGVAR_RANGE = (-30.0, 20.0)    # clamp of the original code; keeps exp() finite


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder; the defaults are Stable Diffusion's."""
    channels: tuple = (128, 256, 512, 512)     # one entry per level, outermost first
    blocks_per_level: int = 2                  # in the encoder; the decoder has one more
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215            # gives latents about unit variance


class Latent(NamedTuple):
    """Normal distribution of the scaled latents: mean and std, each (B, 4, H/f, W/f)."""
    mean: torch.Tensor
    std: torch.Tensor


def norm(channels, groups):
    """GroupNorm with the autoencoder's eps of 1e-6; PyTorch's default is 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions plus a skip connection; unlike the U-Net's without a timestep."""

    def __init__(self, channels_in, channels, groups):
        super().__init__()
        self.norm1 = norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = norm(channels, groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = (nn.Identity() if channels_in == channels
                             else nn.Conv2d(channels_in, channels, 1))

    def forward(self, h):
        out = self.conv1(F.silu(self.norm1(h)))
        return self.nin_shortcut(h) + self.conv2(F.silu(self.norm2(out)))


class Attention(nn.Module):
    """Single-head self-attention over all pixels, plus a skip connection."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, h):
        B, C, H, W = h.shape
        normed = self.norm(h)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2)                    # (B, N, C)
                   for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return h + self.proj_out(out.transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halve height and width; only right and bottom are padded, as in the checkpoints' training."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h):
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then convolve."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h):
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Innermost part of encoder and decoder: ResBlock, Attention, ResBlock."""

    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Level(nn.Module):
    """One level of encoder or decoder: ResBlocks, then a change of size if it has one."""

    def __init__(self, channels_in, channels, blocks, groups, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(channels_in if i == 0 else channels, channels, groups)
                                   for i in range(blocks))
        self.downsample = Downsample(channels) if downsample else nn.Identity()
        self.upsample = Upsample(channels) if upsample else nn.Identity()

    def forward(self, h):
        for block in self.block:
            h = block(h)
        return self.upsample(self.downsample(h))


class Encoder(nn.Module):
    """Image (B, 3, H, W) to features (B, 8, H/f, W/f), the input of quant_conv."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c, config.blocks_per_level, groups, downsample=i < len(channels) - 1)
            for i, (c_in, c) in enumerate(zip((channels[0], *channels), channels)))
        self.mid = Middle(channels[-1], groups)
        self.norm_out = norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Unscaled latent (B, 4, H/f, W/f) to image (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], groups)
        self.up = nn.ModuleList(                # outermost level first, although it runs last
            Level(c_in, c, config.blocks_per_level + 1, groups, upsample=i > 0)
            for i, (c_in, c) in enumerate(zip((*channels[1:], channels[-1]), channels)))
        self.norm_out = norm(channels[0], groups)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Variational autoencoder that defines the latent space of Stable Diffusion."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    @property
    def factor(self):
        """Downsampling factor f: side of an image divided by the side of its latent."""
        return 2 ** (len(self.config.channels) - 1)

    def encode(self, x):
        """Latent of images x (B, 3, H, W) in [-1, 1]; H and W are multiples of f."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"height and width must be multiples of {self.factor}, got "
                             f"{x.shape[-2]} x {x.shape[-1]}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
        return Latent(mean * self.config.scaling_factor, std * self.config.scaling_factor)

    def decode(self, z):
        """Images (B, 3, H, W) of scaled latents z, in about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))
