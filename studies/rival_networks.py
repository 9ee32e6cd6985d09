"""BPS's rivals, each wired as its authors wire it, at the embedded base's size; BPS without a part.

| method | sees | enters the U-Net |
|---|---|---|
| ControlNet (arXiv 2302.05543) | all | skips and middle, once, through zero 1x1 convolutions |
| T2I-Adapter (arXiv 2302.08453) | condition | the end of each level of the contracting path, once |
| fine-tuning | all | every weight; the condition is concatenated to the input channels |
| LoRA (arXiv 2106.09685) | all | low-rank terms of the attention's layers; the same input |
| output term (DEFT, arXiv 2406.01781) | all but the text | nowhere: it is added to eps |

"All" is the condition, z_t, t and the text. A rival is called like a BPS, rival(cond, t_emb) ->
maps. RivalUNet combines it with the frozen U-Net, so that training, validation and drawing run as
they do for BPS. All parameters of a rival are trained; none belongs to the frozen U-Net.

Shapes: B batch, C channels, H W rows and columns of the latent, f the autoencoder's factor.
"""
import copy
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from bps import BPS, zero_conv
from diffusion import NoiseSchedule
from unet import CrossAttention, UNet, timestep_embedding

HINT_CHANNELS = (16, 32, 96, 256)   # ControlNet's condition encoder, from size to size
LORA_RANK = 16
LAST_T = 999


class RivalUNet(nn.Module):
    """The frozen U-Net, which predicts as the rival does where it is given the rival's maps."""

    def __init__(self, unet, rival, time=None):
        """time: a function of the timesteps (B,) that gives those to predict at, if others."""
        super().__init__()
        self.unet, self.config, self.time = unet, unet.config, time
        self.time_embedding = unet.time_embedding
        self.predict = rival.predict            # a bound method, so that its weights stay its own

    def forward(self, z_t, t, context, maps=None):
        """eps (B, 4, H, W)."""
        if maps is None:
            return self.unet(z_t, t, context)
        return self.predict(self.unet, z_t, self.time(t) if self.time else t, context, maps)


def cubic_time(t):
    """T2I-Adapter's timesteps (1 - u^3) 1000 for uniform ones t = 1000 u: most are noisy."""
    return ((1 - (t / (LAST_T + 1)) ** 3) * (LAST_T + 1)).long().clamp(max=LAST_T)


class CubicSchedule(NoiseSchedule):
    """A schedule with the noise levels of cubic_time(t) at the timesteps t."""

    def alpha_sigma(self, t, like):
        """alpha and sigma as NoiseSchedule returns them."""
        return super().alpha_sigma(cubic_time(t), like)


def base_with(base, network, cubic=False):
    """The base that predicts as a network does: a rival needs another U-Net, BPS does not.

    cubic: for training, at T2I-Adapter's timesteps.
    """
    if not hasattr(network, "predict"):
        return base
    if cubic:
        base = base._replace(schedule=CubicSchedule(**asdict(base.schedule)))
    return base._replace(unet=RivalUNet(base.unet, network, cubic_time if cubic else None))


# ---- networks beside the frozen U-Net ------------------------------------------------------

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
    """A trained copy of contracting path and middle, which sees z_t and the text, too."""

    def __init__(self, unet, cond_channels, factor):
        super().__init__()
        self.time_embed, self.input_blocks, self.middle_block = copy.deepcopy(
            nn.ModuleList([unet.time_embed, unet.input_blocks, unet.middle_block]))
        self.requires_grad_(True)
        # pictures to latents' size: a stride of 2 until f is reached
        base = unet.config.channels[0]
        layers = [nn.Conv2d(cond_channels, HINT_CHANNELS[0], 3, padding=1), nn.SiLU()]
        sizes = factor.bit_length() - 1
        for c_in, c_out in zip(HINT_CHANNELS[:sizes], HINT_CHANNELS[1:]):
            layers += [nn.Conv2d(c_in, c_in, 3, padding=1), nn.SiLU(),
                       nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.SiLU()]
        self.hint = nn.Sequential(*layers, zero_conv(HINT_CHANNELS[sizes], base))
        self.zero_convs = nn.ModuleList(zero_conv(c, c, size=1) for c in block_channels(unet))
        self.zero_middle = zero_conv(unet.config.channels[-1], unet.config.channels[-1], size=1)

    def forward(self, cond, t_emb):
        """The condition as a map that is added behind the copy's stem."""
        return [self.hint(cond)]

    def predict(self, unet, z_t, t, context, maps):
        """eps of the U-Net with the copy's maps on its skips and its middle."""
        t_emb = self.time_embed(timestep_embedding(t, unet.config.channels[0]))
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
    """A small network with the U-Net's levels, whose ends are added to the contracting path."""

    def __init__(self, unet, cond_channels, factor):
        super().__init__()
        channels, per_level = unet.config.channels, unet.config.blocks_per_level + 1
        self.factor = factor
        self.stem = nn.Conv2d(cond_channels * factor**2, channels[0], 3, padding=1)
        self.ends = [per_level * (level + 1) - 1 for level in range(len(channels))]
        self.levels = nn.ModuleList(
            nn.Sequential(AdapterBlock(c_in, c), AdapterBlock(c, c))
            for c_in, c in zip((channels[0], *channels), channels))

    def forward(self, cond, t_emb):
        """A map for the end of each level."""
        h, maps = self.stem(F.pixel_unshuffle(cond, self.factor)), []
        for i, level in enumerate(self.levels):
            h = level(F.avg_pool2d(h, 2) if i else h)
            maps.append(h)
        return maps

    def predict(self, unet, z_t, t, context, maps):
        """eps of the U-Net with the maps at the ends of its contracting levels."""
        return predict_with(unet, z_t, t, context, dict(zip(self.ends, maps)))


# ---- networks that see the condition as channels beside z_t --------------------------------

class InputRival(nn.Module):
    """A rival that is given the condition at the latent's size, as further channels."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, cond, t_emb):
        """The condition as one map (B, f^2 C, H, W)."""
        return [F.pixel_unshuffle(cond, self.factor)]


def beside(z_t, maps):
    """z_t and the condition (B, 4 + f^2 C, H, W)."""
    return torch.cat([z_t, maps[0].to(z_t).expand(len(z_t), -1, -1, -1)], dim=1)


def widened(stem, channels):
    """A copy of the U-Net's first layer with further input channels, which start at zero."""
    wider = zero_conv(stem.in_channels + channels, stem.out_channels)
    with torch.no_grad():
        wider.weight[:, :stem.in_channels] = stem.weight
        wider.bias.copy_(stem.bias)
    return wider


class FineTuned(InputRival):
    """A copy of the U-Net, all of it trained."""

    def __init__(self, unet, cond_channels, factor):
        super().__init__(factor)
        self.unet = copy.deepcopy(unet).requires_grad_(True)
        self.unet.input_blocks[0][0] = widened(unet.input_blocks[0][0], cond_channels * factor**2)

    def predict(self, unet, z_t, t, context, maps):
        """eps of the copy; the frozen U-Net is not asked."""
        return self.unet(beside(z_t, maps), t, context)


class LoRA(InputRival):
    """Products of thin matrices, which start at zero, for the attention's weights; a new stem."""

    def __init__(self, unet, cond_channels, factor, rank=LORA_RANK):
        super().__init__(factor)
        self.stem = widened(unet.input_blocks[0][0], cond_channels * factor**2)
        self.names = [f"{name}.{layer}.weight" for name, module in unet.named_modules()
                      if isinstance(module, CrossAttention)
                      for layer in ("to_q", "to_k", "to_v", "to_out.0")]
        shapes = [unet.get_parameter(name).shape for name in self.names]
        self.up = nn.ParameterList(torch.zeros(c_out, rank) for c_out, _ in shapes)
        self.down = nn.ParameterList(torch.randn(rank, c_in) / rank for _, c_in in shapes)

    def predict(self, unet, z_t, t, context, maps):
        """eps of the frozen U-Net with these terms added to its weights."""
        changed = {f"input_blocks.0.0.{name}": p for name, p in self.stem.named_parameters()}
        for name, up, down in zip(self.names, self.up, self.down):
            changed[name] = unet.get_parameter(name) + up @ down
        return functional_call(unet, changed, (beside(z_t, maps), t, context))


class OutputTerm(InputRival):
    """eps_bar = eps + h(z_t, eps, cond, t): h is a convolutional U-Net of half the width.

    As in DEFT it sees what the frozen U-Net predicts, and the frozen U-Net never sees it.
    """

    def __init__(self, unet, cond_channels, factor):
        super().__init__(factor)
        latent_channels = unet.config.latent_channels
        config = replace(unet.config, channels=tuple(c // 2 for c in unet.config.channels),
                         attention=(False,) * len(unet.config.channels),
                         latent_channels=2 * latent_channels + cond_channels * factor**2,
                         norm_groups=unet.config.norm_groups // 2)
        self.h = UNet(config)
        self.h.middle_block[1] = nn.Identity()              # a transformer, which reads the text
        self.h.out[2] = zero_conv(config.channels[0], latent_channels)

    def predict(self, unet, z_t, t, context, maps):
        """eps of the frozen U-Net plus the term."""
        eps = unet(z_t, t, context)
        return eps + self.h(beside(torch.cat([z_t, eps], dim=1), maps), t, context)


# ---- BPS without a part --------------------------------------------------------------------

class TimeBlindBPS(BPS):
    """A BPS that is not told the timestep."""

    def forward(self, cond, t_emb):
        return super().forward(cond, torch.zeros_like(t_emb[:1]))


class ConditionBlindBPS(BPS):
    """A BPS that is shown no condition: what it gains, it has learned of the pictures in general.
    """

    def forward(self, cond, t_emb):
        return super().forward(torch.zeros_like(cond), t_emb)
