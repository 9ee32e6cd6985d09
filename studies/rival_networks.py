"""BPS's rivals, each wired as its authors wire it, at the embedded base's size.

| method | sees | enters the U-Net |
|---|---|---|
| ControlNet (arXiv 2302.05543) | all | skips and middle, once, through zero 1x1 convolutions |
| T2I-Adapter (arXiv 2302.08453) | condition | the end of each level of the contracting path, once |
| fine-tuning | all | every weight; the condition is further channels of the input |
| LoRA (arXiv 2106.09685) | all | low-rank terms of the attention's layers; the same input |

"All" is the condition, z_t, t and the text. A rival has the face of a BPS, rival(cond, t_emb) ->
maps, and stands with the frozen U-Net in a RivalUNet, so that training, validation and drawing run
as they do for BPS.

Shapes: B batch, C channels, H W rows and columns of the latent, f the autoencoder's factor.
"""
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from bps import BPS, zero_conv
from unet import CrossAttention, UNet, timestep_embedding

HINT_CHANNELS = (16, 32, 96, 256)   # ControlNet's condition encoder, from size to size


class RivalUNet(nn.Module):
    """The frozen U-Net, which predicts as the rival does where it is given the rival's maps."""

    def __init__(self, unet, rival):
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.time_embedding = unet.time_embedding
        self.predict = rival.predict            # a bound method, so that its weights stay its own

    def forward(self, z_t, t, context, maps=None):
        """eps (B, 4, H, W)."""
        if maps is None:
            return self.unet(z_t, t, context)
        return self.predict(self.unet, z_t, t, context, maps)


def predict_with(unet, z_t, t, context, on_path=None, on_skips=None, on_middle=0.0):
    """eps (B, 4, H, W) of a U-Net to which maps are added once each.

    on_path: {input block: map that it hands on}. on_skips: a map for each skip.
    """
    t_emb = unet.time_embedding(t)
    h, skips = z_t, []
    for i, block in enumerate(unet.input_blocks):
        h = block(h, t_emb, context)
        h = h + (on_path or {}).get(i, 0.0)
        skips.append(h)
    h = unet.middle_block(h, t_emb, context) + on_middle
    if on_skips is not None:
        skips = [skip + r for skip, r in zip(skips, on_skips, strict=True)]
    for block in unet.output_blocks:
        h = torch.cat([h, skips.pop()], dim=1)
        h = block(h, t_emb, context, size=skips[-1].shape[-2:] if skips else None)
    return unet.out(h)


class ControlNet(nn.Module):
    """A trainable copy of contracting path and middle, which sees z_t and the text, too."""

    def __init__(self, unet, cond_channels, factor, width=1.0):
        """width: of the copy, relative to the U-Net; one that is not 1 starts at random."""
        super().__init__()
        channels = tuple(16 * round(c * width / 16) for c in unet.config.channels)
        half = copy.deepcopy(unet) if width == 1 else UNet(
            replace(unet.config, channels=channels, norm_groups=16))
        self.time_embed, self.input_blocks = half.time_embed, half.input_blocks
        self.middle_block = half.middle_block
        self.sinusoids = channels[0]
        # pictures to latents' size: a stride of 2 until f is reached
        layers = [nn.Conv2d(cond_channels, HINT_CHANNELS[0], 3, padding=1), nn.SiLU()]
        sizes = factor.bit_length() - 1
        for here, there in zip(HINT_CHANNELS[:sizes], HINT_CHANNELS[1:]):
            layers += [nn.Conv2d(here, here, 3, padding=1), nn.SiLU(),
                       nn.Conv2d(here, there, 3, stride=2, padding=1), nn.SiLU()]
        self.hint = nn.Sequential(*layers, zero_conv(HINT_CHANNELS[sizes], channels[0]))
        shapes = list(zip(block_channels(half), block_channels(unet)))
        self.zero_convs = nn.ModuleList(zero_conv(a, b, size=1) for a, b in shapes)
        self.zero_middle = zero_conv(channels[-1], unet.config.channels[-1], size=1)
        self.requires_grad_(True)

    def forward(self, cond, t_emb):
        """The condition as a map that is added behind the copy's stem."""
        return [self.hint(cond)]

    def predict(self, unet, z_t, t, context, maps):
        """eps of the U-Net with the copy's maps on its skips and its middle."""
        t_emb = self.time_embed(timestep_embedding(t, self.sinusoids))
        h, on_skips = z_t, []
        for i, (block, zero) in enumerate(zip(self.input_blocks, self.zero_convs)):
            h = block(h, t_emb, context)
            h = h + maps[0] if i == 0 else h
            on_skips.append(zero(h))
        on_middle = self.zero_middle(self.middle_block(h, t_emb, context))
        return predict_with(unet, z_t, t, context, on_skips=on_skips, on_middle=on_middle)


def block_channels(unet):
    """The channels that each input block of a U-Net hands on."""
    config, channels = unet.config, [unet.config.channels[0]]
    for level, c in enumerate(config.channels):
        channels += [c] * config.blocks_per_level
        channels += [c] if level < len(config.channels) - 1 else []
    return channels


class AdapterBlock(nn.Module):
    """T2I-Adapter's residual block, which knows no time."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.project = (nn.Identity() if channels_in == channels
                        else nn.Conv2d(channels_in, channels, 1))
        self.layers = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(channels, channels, 1))

    def forward(self, h):
        h = self.project(h)
        return h + self.layers(h)


class T2IAdapter(nn.Module):
    """Four small levels, or as many as the U-Net has, whose ends are added to its contracting path.
    """

    def __init__(self, unet, cond_channels, factor, width=1.0):
        """width: of its residual blocks, relative to the U-Net's channels."""
        super().__init__()
        self.factor, per_level = factor, unet.config.blocks_per_level + 1
        narrow = [round(c * width) for c in unet.config.channels]
        self.stem = nn.Conv2d(cond_channels * factor**2, narrow[0], 3, padding=1)
        self.levels, self.outs = nn.ModuleList(), nn.ModuleList()
        self.ends = [per_level * (level + 1) - 1 for level in range(len(narrow))]
        for level, channels in enumerate(narrow):
            before = narrow[max(0, level - 1)]
            self.levels.append(nn.Sequential(AdapterBlock(before, channels),
                                             AdapterBlock(channels, channels)))
            self.outs.append(nn.Identity() if width == 1
                             else nn.Conv2d(channels, unet.config.channels[level], 1))

    def forward(self, cond, t_emb):
        """A map for the end of each level."""
        h, maps = self.stem(F.pixel_unshuffle(cond, self.factor)), []
        for level, (blocks, out) in enumerate(zip(self.levels, self.outs)):
            h = blocks(F.avg_pool2d(h, 2) if level else h)
            maps.append(out(h))
        return maps

    def predict(self, unet, z_t, t, context, maps):
        """eps of the U-Net with the maps at the ends of its contracting levels."""
        return predict_with(unet, z_t, t, context, dict(zip(self.ends, maps)))


class FineTuned(nn.Module):
    """A copy of the U-Net, all of it trained, with the condition as further input channels."""

    def __init__(self, unet, cond_channels, factor):
        super().__init__()
        self.factor, self.unet = factor, copy.deepcopy(unet).requires_grad_(True)
        stem = self.unet.input_blocks[0][0]
        wider = zero_conv(stem.in_channels + cond_channels * factor**2, stem.out_channels)
        with torch.no_grad():
            wider.weight[:, :stem.in_channels] = stem.weight
            wider.bias.copy_(stem.bias)
        self.unet.input_blocks[0][0] = wider

    def forward(self, cond, t_emb):
        """The condition at the latent's size."""
        return [F.pixel_unshuffle(cond, self.factor)]

    def predict(self, unet, z_t, t, context, maps):
        """eps of the copy; the frozen U-Net is not asked."""
        cond = maps[0].to(z_t).expand(len(z_t), -1, -1, -1)
        return self.unet(torch.cat([z_t, cond], dim=1), t, context)


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin ones that starts at zero."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, h):
        return self.layer(h) + self.up(self.down(h))


class LoRA(FineTuned):
    """A copy of the U-Net. Only low-rank terms in attention and the new input are trained."""

    def __init__(self, unet, cond_channels, factor, rank=16):
        super().__init__(unet, cond_channels, factor)
        self.unet.requires_grad_(False)
        self.unet.input_blocks[0][0].requires_grad_(True)
        for attention in self.unet.modules():
            if isinstance(attention, CrossAttention):
                for name in ("to_q", "to_k", "to_v"):
                    setattr(attention, name, LowRank(getattr(attention, name), rank))
                attention.to_out[0] = LowRank(attention.to_out[0], rank)


class TimeBlindBPS(BPS):
    """A BPS that is not told the timestep."""

    def forward(self, cond, t_emb):
        return super().forward(cond, torch.zeros_like(t_emb[:1]))


class ConditionBlindBPS(BPS):
    """A BPS that is shown no condition: what it gains, it has learned of the pictures in general.
    """

    def forward(self, cond, t_emb):
        return super().forward(torch.zeros_like(cond), t_emb)
