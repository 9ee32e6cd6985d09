"""Bayesian Power Steering (BPS, arXiv 2406.03683): the steering network and the posterior.

The frozen U-Net is the prior denoiser, eps*(z_t, t, text) = E[eps | z_t, text], over a large
probability space. A new condition c_add lives in a small one, and by Bayes' rule

    p_t(z_t | text, c_add)  is proportional to  p_t(z_t | text) p_t(c_add | z_t, text),
    eps_bar*(z_t, t, text, c_add) = eps*(z_t, t, text) - sigma_t grad_z log p_t(c_add | z_t, text).

BPS learns the second, time-dependent term: a network that sees only the condition and the timestep
produces one map (residual) for each block of the U-Net, strong on the contracting path's outer
levels, weak on the expansive path: head-heavy and foot-light.

    python bps.py --ports               # what is steered where, and what it costs

Shapes: B batch, C channels, H W rows and columns of the latent, f the autoencoder's factor.

    residuals = BPS(config)(cond, unet.time_embedding(t))
    eps_bar = unet(z_t, t, context, residuals)
"""
import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

import weights
from unet import Downsample, Upsample

PATHS = ("contracting", "transition", "expansive")      # input blocks, middle, output blocks
WEIGHTS = ("head-heavy", "flat")        # names of port weights: config_for
FEET = ("faithful", "light")
NARROW = 4                              # the light foot's layers are so much narrower


@dataclass(frozen=True)
class BPSConfig:
    """The sizes of a BPS network and its port weights; the defaults steer SD 1.5 with a sketch.

    channels, blocks_per_level and norm_groups are the U-Net's. The weights are fixed factors on
    the maps, one a level for the contracting path (outermost first), one for the middle, one for
    the whole expansive path. paths: those that are steered. foot: "faithful" to the authors'
    network, or "light": LightFoot, 1x1 ports, and one block in the middle instead of two.
    """
    cond_channels: int = 1                             # 1 sketch, 3 segmentation or layout
    factor: int = 8                                    # f: pixels of the condition per latent pixel
    channels: tuple = (320, 640, 1280, 1280)
    blocks_per_level: int = 2
    norm_groups: int = 32
    input_weights: tuple = (16.0, 8.0, 4.0, 2.0)       # head-heavy ...
    middle_weight: float = 16.0
    output_weight: float = 1.0                         # ... and foot-light
    paths: tuple = PATHS
    foot: str = "faithful"


def zero_conv(channels_in, channels, size=3):
    """Returns a convolution of size x size that outputs zero until it is trained.

    Its own gradient is not zero: d loss / d weight = d loss / d output * input.
    """
    conv = nn.Conv2d(channels_in, channels, size, padding=size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class TimeResBlock(nn.Module):
    """A residual block that the timestep scales and shifts: BPS's contracting and middle block."""

    def __init__(self, channels_in, channels, t_emb_dim, norm_groups):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels_in), nn.SiLU(),
                                       nn.Conv2d(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(t_emb_dim, 2 * channels))
        self.out_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels), nn.SiLU(),
                                        nn.Dropout(0.0),    # keeps the authors' numbering
                                        zero_conv(channels, channels))
        self.skip_connection = (nn.Identity() if channels_in == channels
                                else nn.Conv2d(channels_in, channels, 1))

    def forward(self, h, t_emb):
        """Returns (B, C, H, W) for h (B, C_in, H, W) and t_emb (B or 1, D)."""
        norm, *rest = self.out_layers
        scale, shift = self.emb_layers(t_emb)[:, :, None, None].chunk(2, dim=1)
        out = norm(self.in_layers(h)) * (1 + scale) + shift
        for layer in rest:
            out = layer(out)
        return self.skip_connection(h) + out


class LightResBlock(nn.Module):
    """A residual block of one convolution that ignores the timestep: BPS's expansive block."""

    def __init__(self, channels_in, channels, norm_groups):
        super().__init__()
        self.out_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels_in), nn.SiLU(),
                                        nn.Dropout(0.0),    # keeps the authors' numbering
                                        zero_conv(channels_in, channels))
        self.skip_connection = nn.Conv2d(channels_in, channels, 1)

    def forward(self, h):
        """Returns (B, C, H, W) for h (B, C_in, H, W)."""
        return self.skip_connection(h) + self.out_layers(h)


class LightFoot(nn.Module):
    """The expansive half, made light: one narrow 1x1 layer a level, from which all its ports read.

    Narrow, because its maps have the smallest weight. 1x1, because the U-Net convolves each map
    right after it is added. Shared, because the blocks of a level differ in nothing that BPS sees.
    """

    def __init__(self, config):
        super().__init__()
        self.levels, below = nn.ModuleList(), config.channels[-1]
        for channels in reversed(config.channels):
            narrow = channels // NARROW
            mix = nn.Sequential(nn.Conv2d(below + channels, narrow, 1), nn.SiLU())
            ports = nn.ModuleList(zero_conv(narrow, channels, 1)
                                  for _ in range(config.blocks_per_level + 1))
            self.levels.append(nn.ModuleList([mix, ports]))
            below = narrow

    def forward(self, h, features):
        """Returns a map for each output block; features: a map (B, C, H, W) a level, deepest last.

        h: (B, C, H, W), the middle's output.
        """
        maps = []
        for (mix, ports), feature in zip(self.levels, reversed(features)):
            h = F.interpolate(h, feature.shape[-2:], mode="nearest")
            h = mix(torch.cat([h, feature], dim=1))
            maps += [port(h) for port in ports]
        return maps


def expansive_blocks(config, skip_channels):
    """Returns the authors' expansive half: an entry [block, port, up-sampler] per skip of BPS.

    skip_channels: those of the contracting path's entries; the last is the middle's, too.
    """
    blocks, skip_channels = nn.ModuleList(), list(skip_channels)
    channels_in = skip_channels[-1]
    for level, channels in reversed(list(enumerate(config.channels))):
        for i in range(config.blocks_per_level + 1):
            entry = [LightResBlock(channels_in + skip_channels.pop(), channels, config.norm_groups),
                     zero_conv(channels, channels)]
            channels_in = channels
            if i == config.blocks_per_level and level > 0:
                entry.append(Upsample(channels))
            blocks.append(nn.ModuleList(entry))
    return blocks


class BPS(nn.Module):
    """The steering network: condition and timestep to one residual per block of the U-Net.

    Attributes are named and numbered as in the authors' checkpoints: `zero_blocks` are the
    ports of the contracting path and, last, of the middle; an expansive entry is
    [block, port, up-sampler]. Blocks without a port have None there; what only serves a path that
    is not steered is not built.
    """

    def __init__(self, config=BPSConfig()):
        super().__init__()
        self.config = config
        base, levels, groups = config.channels[0], len(config.channels), config.norm_groups
        t_emb_dim = base * 4                               # the frozen U-Net's own embedding
        light = config.foot == "light"

        def port_if(path, channels):
            """Returns a port, or None where its path is not steered."""
            if path in config.paths:
                return zero_conv(channels, channels, 1 if light else 3)

        # Contracting path: stem, then residual blocks with ports, then a down-sampler, per level.
        cond_dim = config.cond_channels * config.factor**2
        self.input_blocks = nn.ModuleList([nn.Conv2d(cond_dim, base, 3, padding=1)])
        ports, port_weights, skip_channels = [None], [None], [base]
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks_per_level):
                self.input_blocks.append(
                    TimeResBlock(skip_channels[-1], channels, t_emb_dim, groups))
                ports.append(port_if("contracting", channels))
                port_weights.append(config.input_weights[level])
                skip_channels.append(channels)
            if level < levels - 1:
                self.input_blocks.append(Downsample(channels))
                ports.append(None)
                port_weights.append(None)
                skip_channels.append(channels)
        self.input_port_weights = port_weights

        self.middle_block = nn.ModuleList()
        if {"transition", "expansive"} & set(config.paths):
            self.middle_block.extend(TimeResBlock(channels, channels, t_emb_dim, groups)
                                     for _ in range(1 if light else 2))
        self.zero_blocks = nn.ModuleList([*ports, port_if("transition", channels)])

        self.output_blocks = nn.ModuleList()
        if "expansive" in config.paths and light:
            self.light_foot = LightFoot(config)
        elif "expansive" in config.paths:
            self.output_blocks = expansive_blocks(config, skip_channels)

    def forward(self, cond, t_emb):
        """Returns residuals: one map (B, C, H, W) per U-Net block, None where there is no port.

        cond: (B, C_cond, f H, f W) in [0, 1]. t_emb: (B or 1, 4 * base channels), the frozen
        U-Net's time_embedding(t). The order is input blocks, middle, output blocks.
        Errors: ValueError where the condition's channels or size do not fit.
        """
        B, C, rows, columns = cond.shape
        factor = self.config.factor
        if C != self.config.cond_channels or rows % factor or columns % factor:
            raise ValueError(f"condition of {C} channels, {rows} x {columns} px; this BPS takes "
                             f"{self.config.cond_channels} channels and multiples of {factor} px")
        h = F.pixel_unshuffle(cond, factor)                                    # (B, C f^2, H, W)
        skips, features, residuals = [], [], []
        for block, port, weight in zip(self.input_blocks, self.zero_blocks,
                                       self.input_port_weights):
            if isinstance(block, Downsample):
                features.append(h)                         # what a level ends with
            h = block(h, t_emb) if isinstance(block, TimeResBlock) else block(h)
            skips.append(h)
            residuals.append(None if port is None else weight * port(h))
        features.append(h)
        for block in self.middle_block:
            h = block(h, t_emb)
        port = self.zero_blocks[-1]
        residuals.append(None if port is None else self.config.middle_weight * port(h))
        return residuals + self.expansive(h, skips, features)

    def expansive(self, h, skips, features):
        """Returns the residuals of the output blocks, for the middle's output and own skips."""
        config = self.config
        if "expansive" not in config.paths:
            return [None] * (len(config.channels) * (config.blocks_per_level + 1))
        if config.foot == "light":
            return [config.output_weight * port_map for port_map in self.light_foot(h, features)]
        residuals = []
        for block, port, *up in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1))
            residuals.append(config.output_weight * port(h))
            for upsample in up:
                h = upsample(h, skips[-1].shape[-2:])
        return residuals


def config_for(unet_config, cond_channels, factor, port_weights="head-heavy", paths=PATHS,
               foot="faithful"):
    """Returns the BPSConfig that fits a U-Net.

    port_weights: "head-heavy", halving from level to level, 16, 8, 4, 2 for four levels, with 16 in
    the middle and 1 on the expansive path (authors' code); "flat", 1 everywhere (theirs for
    layout); or numbers: one a level, the middle's, the expansive path's. Errors:
    weights.WeightsError where their count is another.
    """
    levels = len(unet_config.channels)
    if port_weights == "head-heavy":
        port_weights = (*(16.0 / 2**level for level in range(levels)), 16.0, 1.0)
    elif port_weights == "flat":
        port_weights = (1.0,) * (levels + 2)
    if len(port_weights) != levels + 2:
        raise weights.WeightsError(f"{len(port_weights)} port weights; this base takes "
                                   f"{levels + 2}: one for each of {levels} levels of the "
                                   f"contracting path, the middle's, the expansive path's")
    *input_weights, middle_weight, output_weight = port_weights
    return BPSConfig(cond_channels, factor, unet_config.channels, unet_config.blocks_per_level,
                     unet_config.norm_groups, tuple(input_weights), middle_weight, output_weight,
                     tuple(path for path in PATHS if path in paths), foot)


def posterior(eps_prior, eps_posteriors, strengths):
    """Returns eps* + sum_i s_i (eps_bar_i* - eps*), the combined posterior denoiser.

    eps_prior, each of eps_posteriors: (B, 4, H, W). strengths: one float each; 0 is the prior, 1
    the posterior, and others temper p(c_add | z)^s. Conditions that are independent given z_t add
    up. Derived from Bayes' rule as in the module's docstring. Errors: ValueError where the
    counts differ.
    """
    if len(eps_posteriors) != len(strengths):
        raise ValueError(f"{len(eps_posteriors)} posteriors but {len(strengths)} strengths")
    return eps_prior + sum(strength * (eps_posterior - eps_prior)
                           for eps_posterior, strength in zip(eps_posteriors, strengths))


def save_bps(bps, file, metadata):
    """Writes the network in fp16 as safetensors, its config and `metadata` (a dict) beside it."""
    tensors = {key: tensor.half() for key, tensor in bps.state_dict().items()}
    weights.save(tensors, file, dict(config=json.dumps(asdict(bps.config)),
                                     training=json.dumps(metadata)))


def load_bps(file, dtype=torch.float32, device="cpu"):
    """Returns the BPS of a file that save_bps wrote, ready to steer; `.metadata` is what was given.

    Errors: weights.WeightsError names the file and what is wrong with it.
    """
    state = weights.read_header(file)
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
        config = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in json.loads(metadata["config"]).items()}
        with torch.device("meta"):
            bps = BPS(BPSConfig(**config))
        bps.metadata = json.loads(metadata["training"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SafetensorError):
        raise weights.WeightsError(f"{file}: not a BPS file; train.py writes "
                                   f"bps.safetensors") from None
    return weights.load_strict(bps, weights.Checkpoint({}, state, str, file), dtype, device)


if __name__ == "__main__":
    from cli import run
    from ports import main
    run(main)
