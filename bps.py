"""Bayesian Power Steering (BPS, arXiv 2406.03683): from the prior to the posterior denoiser.

A latent z_t = alpha_t z_0 + sigma_t noise, alpha_t^2 + sigma_t^2 = 1, is denoised by predicting
its noise. Trained by least squares, the frozen U-Net approximates the best prediction there is,
eps* = E[noise | z_t, text], and that is the gradient of a log density (Tweedie's formula):

    eps*(z_t, t, text) = -sigma_t grad log p_t(z_t | text)                      the prior

A new condition c is learned from few pairs. Bayes' rule turns a product of densities into a sum
of gradients:

    p_t(z_t | text, c)  is proportional to  p_t(z_t | text) p_t(c | z_t, text)
    eps_bar*(z_t, t, text, c) = eps*(z_t, t, text) + M                          the posterior
    M = -sigma_t grad log p_t(c | z_t, text)                                    the steering

BPS learns M with a network that sees the condition and the timestep only. Its maps r(c, t) are
added inside the frozen U-Net, after each residual block and each transformer, and the layers that
follow make them depend on z_t and on the text:

    M_hat(z_t, t, text, c) = unet(z_t; r(c, t)) - unet(z_t)

Trained by plain noise prediction on labelled pairs, M_hat becomes the best approximation of M that
this family of functions has. What is learned is the law p' of the labelled set: if its pictures
differ from the base's, M_hat also holds -sigma_t grad log (p'_t(z_t | text) / p_t(z_t | text)).
That r does not depend on z_t is a restriction, and it buys speed: one pass of BPS serves all seeds,
all prompts and both passes of guidance.

    python bps.py --ports               # where the maps are added, and what they cost

Shapes: B batch, C channels, H W rows and columns of the latent, f the autoencoder's factor, L
tokens, D width.

    residuals = BPS(config)(cond, unet.time_embedding(t))
    eps_bar = unet(z_t, t, context, residuals)
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import weights
from diffusion import guide
from inputs import checkpoints
from inputs.options import Parser, add_port_options, run
from unet import Downsample, UNetConfig, Upsample, run_block

NARROW = 4                              # LightBPS: its expansive layers are so much narrower


@dataclass(frozen=True)
class BPSConfig:
    """The sizes of a BPS network and its port weights; the defaults steer SD 1.5 with a sketch.

    channels, blocks_per_level and norm_groups are the U-Net's. The port weights are fixed factors
    on the maps: one per level of the contracting path (outermost first), one for the middle, one
    for the whole expansive path. A weight of 0 means no port; without an expansive path its blocks
    are not built, nor is the middle if it has no port either. foot is "faithful" for the authors'
    network and "light" for LightBPS.
    """
    cond_channels: int = 1                             # sketch 1, label maps 3, artistic 4
    factor: int = 8                                    # f: a latent pixel covers f x f of the image
    channels: tuple = (320, 640, 1280, 1280)
    blocks_per_level: int = 2
    norm_groups: int = 32
    input_weights: tuple = (16.0, 8.0, 4.0, 2.0)       # head-heavy ...
    middle_weight: float = 16.0
    output_weight: float = 1.0                         # ... and foot-light
    foot: str = "faithful"


# ---- the network ---------------------------------------------------------------------------

def zero_conv(channels_in, channels, size=3):
    """Returns a convolution of size x size that outputs zero until it is trained.

    Its own gradient is not zero: d loss / d weight = d loss / d output * input.
    """
    conv = nn.Conv2d(channels_in, channels, size, padding=size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class TimeResBlock(nn.Module):
    """A residual block that the timestep scales and shifts, in the contracting path and middle.

    Its last convolution starts at zero, and so does the port after it. So the ports learn from the
    first step; stem, down-samplers, skips and last convolutions from the second; what lies before
    a last convolution, in its block, from the third.
    """

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
        """h: (B, C_in, H, W). t_emb: (B or 1, D)."""
        scale, shift = self.emb_layers(t_emb)[:, :, None, None].chunk(2, dim=1)
        normed = self.out_layers[0](self.in_layers(h)) * (1 + scale) + shift
        return self.skip_connection(h) + self.out_layers[1:](normed)


class TimelessResBlock(nn.Module):
    """A residual block of one convolution that ignores the timestep: BPS's expansive block."""

    def __init__(self, channels_in, channels, norm_groups):
        super().__init__()
        self.out_layers = nn.Sequential(nn.GroupNorm(norm_groups, channels_in), nn.SiLU(),
                                        nn.Dropout(0.0),    # keeps the authors' numbering
                                        zero_conv(channels_in, channels))
        self.skip_connection = nn.Conv2d(channels_in, channels, 1)

    def forward(self, h):
        """h: (B, C_in, H, W)."""
        return self.skip_connection(h) + self.out_layers(h)


class BPS(nn.Module):
    """The steering network: a condition and a timestep to the maps that steer the U-Net.

    There is a port, and so a map, for each block of the U-Net that holds a residual block. The
    stem and the down-samplers (input blocks 0, 3, 6 and 9 of SD 1.5) have None in its place.
    Attributes are named and numbered as in the authors' checkpoints: `zero_blocks` are the ports
    of the contracting path and, last, of the middle; an entry of `output_blocks` is
    [block, port] or [block, port, up-sampler].
    """
    checkpointing = False               # activations computed twice: less memory, more time
    port_size = 3                       # the ports' convolutions in contracting path and middle
    middle_length = 2

    def __init__(self, config=BPSConfig()):
        super().__init__()
        self.config = config
        base, levels, groups = config.channels[0], len(config.channels), config.norm_groups
        t_emb_dim = base * 4                               # the frozen U-Net's own embedding

        def port(channels, weight):
            return zero_conv(channels, channels, self.port_size) if weight else None

        self.input_blocks, self.middle_block, self.zero_blocks, self.output_blocks = (
            nn.ModuleList() for _ in range(4))
        self.port_weights, skip_channels = [], []

        def add(block, channels, weight=0.0):
            """Appends a block of the contracting path, and its port if that has a weight."""
            self.input_blocks.append(block)
            self.zero_blocks.append(port(channels, weight))
            self.port_weights.append(weight)
            skip_channels.append(channels)

        # Contracting path: the stem, then per level residual blocks with ports and a down-sampler.
        add(nn.Conv2d(config.cond_channels * config.factor**2, base, 3, padding=1), base)
        for level, (channels, weight) in enumerate(zip(config.channels, config.input_weights)):
            for _ in range(config.blocks_per_level):
                add(TimeResBlock(skip_channels[-1], channels, t_emb_dim, groups), channels, weight)
            if level < levels - 1:
                add(Downsample(channels), channels)

        # Transition path
        innermost = config.channels[-1]
        if config.middle_weight or config.output_weight:
            self.middle_block.extend(TimeResBlock(innermost, innermost, t_emb_dim, groups)
                                     for _ in range(self.middle_length))
        self.zero_blocks.append(port(innermost, config.middle_weight))
        self.port_weights.append(config.middle_weight)

        # Expansive path
        if config.output_weight:
            self.output_blocks = self.build_expansive_path(skip_channels)

    def build_expansive_path(self, skip_channels):
        """Returns the entries [block, port, up-sampler] of the output blocks, innermost first.

        skip_channels: those of the contracting path's maps, each of which an entry takes in.
        """
        config, entries, skip_channels = self.config, nn.ModuleList(), list(skip_channels)
        channels_in = config.channels[-1]
        for level, channels in reversed(list(enumerate(config.channels))):
            for i in range(config.blocks_per_level + 1):
                entry = [TimelessResBlock(channels_in + skip_channels.pop(), channels,
                                          config.norm_groups), zero_conv(channels, channels)]
                channels_in = channels
                if i == config.blocks_per_level and level > 0:
                    entry.append(Upsample(channels))
                entries.append(nn.ModuleList(entry))
        return entries

    def forward(self, cond, t_emb):
        """Returns residuals: one map (B, C, H, W) per U-Net block, None if it has no port.

        cond: (B, C_cond, f H, f W) in [0, 1]. t_emb: (B or 1, 4 * base channels), the frozen
        U-Net's time_embedding(t). The order is input blocks, middle, output blocks. At SD 1.5's
        size and 512 px the maps go from (B, 320, 64, 64) to (B, 1280, 8, 8) and back.
        Errors: ValueError if the condition's channels or size do not fit.
        """
        B, C, rows, columns = cond.shape
        factor = self.config.factor
        if C != self.config.cond_channels or rows % factor or columns % factor:
            raise ValueError(f"condition of {C} channels, {rows} x {columns} px; this BPS takes "
                             f"{self.config.cond_channels} channels and multiples of {factor} px")
        # f x f pixels become channels: the latent's size, and nothing is lost
        h = F.pixel_unshuffle(cond, factor)                                    # (B, C f^2, H, W)
        skips, residuals = [], []
        for i, block in enumerate(self.input_blocks):
            inputs = (h, t_emb) if isinstance(block, TimeResBlock) else (h,)
            h = run_block(block, *inputs, checkpointing=self.checkpointing)
            skips.append(h)
            residuals.append(self.residual(i, h))
        for block in self.middle_block:
            h = run_block(block, h, t_emb, checkpointing=self.checkpointing)
        residuals.append(self.residual(-1, h))
        if not self.config.output_weight:
            blocks = len(self.config.channels) * (self.config.blocks_per_level + 1)
            return residuals + [None] * blocks
        return residuals + self.expansive_path(h, skips)

    def residual(self, i, h):
        """Returns r_i = weight_i port_i(h_i(c, t)) of an input block or, i = -1, of the middle."""
        port = self.zero_blocks[i]
        return None if port is None else self.port_weights[i] * port(h)

    def expansive_modules(self):
        """Returns for each output block a tuple of the modules that make its map."""
        return [(entry,) for entry in self.output_blocks]

    def expansive_path(self, h, skips):
        """Returns the residuals of the output blocks.

        h: (B, C, H, W) of the middle. skips: the contracting path's maps, used from the last on.
        """
        residuals, skips = [], list(skips)
        for block, port, *up in self.output_blocks:
            h = run_block(block, torch.cat([h, skips.pop()], dim=1),
                          checkpointing=self.checkpointing)
            residuals.append(self.config.output_weight * port(h))
            if up:
                h = up[0](h, skips[-1].shape[-2:])
        return residuals


def config_for(unet_config, cond_channels, factor, port_weights="head-heavy", foot="faithful"):
    """Returns the BPSConfig that fits a U-Net.

    port_weights: "head-heavy" halves from level to level, 16, 8, 4, 2 for four levels, with 16 in
    the middle and 1 on the expansive path (authors' code); "flat" is 1 everywhere (theirs for
    layout); or numbers: one per level, the middle's, the expansive path's. The weights do not
    limit what can be learned, for a port can grow; with Adam a weight of w acts like a learning
    rate w times as large. Errors: weights.UserError if their count does not fit, or if
    the layers behind the last port would learn nothing.
    """
    levels = len(unet_config.channels)
    if port_weights == "head-heavy":
        port_weights = (*(16.0 / 2**level for level in range(levels)), 16.0, 1.0)
    elif port_weights == "flat":
        port_weights = (1.0,) * (levels + 2)
    if len(port_weights) != levels + 2:
        raise weights.UserError(f"{len(port_weights)} port weights; this base takes {levels + 2}: "
                                f"one for each of {levels} levels of the contracting path, the "
                                f"middle's, the expansive path's")
    if not any(port_weights[levels - 1:]):
        raise weights.UserError(f"port weights {port_weights}: nothing is steered from the lowest "
                                f"level on; give it, the middle or the expansive path a weight")
    *input_weights, middle_weight, output_weight = map(float, port_weights)
    return BPSConfig(
        cond_channels=cond_channels, factor=factor, channels=unet_config.channels,
        blocks_per_level=unet_config.blocks_per_level, norm_groups=unet_config.norm_groups,
        input_weights=tuple(input_weights), middle_weight=middle_weight,
        output_weight=output_weight, foot=foot)


# ---- from the prior to the posterior denoiser ----------------------------------------------

def posterior(eps_prior, eps_posteriors, strengths):
    """Returns eps* + sum_i s_i (eps_bar_i* - eps*), the combined posterior denoiser.

    eps_prior, each of eps_posteriors: (B, 4, H, W), all eps or all v: coefficients sum to 1, and v
    is affine in eps. strengths: s_i for each; 0 is the prior, 1 the posterior. For numbers, at each
    t this is -sigma_t grad log [p_t(z_t) prod_i p_t(c_i | z_t)^s_i]. A sampler reaches
    p(z_0) prod_i p(c_i | z_0)^s_i exactly only if each s_i is 0 or 1 and the conditions are
    independent given z_t at every t, for a power or product of means is not the mean of the power
    or product (arXiv 2302.11552). A strength may also be a map (1, 1, H, W): then it is a
    heuristic, as the sum is no gradient. Errors: ValueError if the counts differ.
    """
    if len(eps_posteriors) != len(strengths):
        raise ValueError(f"{len(eps_posteriors)} posteriors but {len(strengths)} strengths")
    return eps_prior + sum(strength * (eps_posterior - eps_prior)
                           for eps_posterior, strength in zip(eps_posteriors, strengths))


class Steering:
    """One condition: the maps that BPS makes of it, how strongly and for how long they steer.

    The maps depend on the condition and the timestep only, so those of the last timestep are kept:
    all pictures that are drawn side by side share them.
    """

    def __init__(self, bps, unet, cond, scale=1.0, strength=1.0, window=(0.0, 1.0), mask=None):
        """cond: (B or 1, C, f H, f W) in [0, 1]. scale multiplies the maps, which costs no further
        pass and means no law. strength is s in p_t(c | z_t)^s. window: the part of the sampler's
        steps that is steered, from 0 to 1. mask: (1, 1, H, W) in [0, 1], the share of the strength
        at each place; None is 1 everywhere.
        """
        self.bps, self.unet, self.cond = bps, unet, cond
        self.scale, self.window = scale, window
        self.strength = strength if mask is None else strength * mask
        strengths = torch.as_tensor(self.strength)
        self.is_full, self.is_off = bool((strengths == 1).all()), not strengths.any()
        self.last_t, self.last_residuals = None, None

    def __call__(self, t):
        """Returns the residuals at timestep t (a number), of the condition's batch."""
        if t != self.last_t:
            device = next(self.unet.parameters()).device
            t_emb = self.unet.time_embedding(torch.tensor([t], device=device))
            self.last_residuals = [r if r is None else self.scale * r
                                   for r in self.bps(self.cond.to(t_emb), t_emb)]
            self.last_t = t
        return self.last_residuals

    def is_active(self, share):
        """Returns whether it steers a step before which a share of the steps is done, 0 to 1."""
        start, end = self.window
        return self.scale != 0 and not self.is_off and start <= share < end


def make_denoiser(unet, context, context_empty, guidance_scale, conditions=(), timesteps=()):
    """Returns denoise(z_t, t) -> eps (or v): the prior, or the posterior of all the conditions.

        P(x) = eps*(x) + sum_i s_i (eps_bar_i*(x) - eps*(x))
        denoise = P(empty) + guidance_scale (P(text) - P(empty))

    Conditions steer both passes of guidance, so guidance does not raise their exponent: s_i stays
    s_i, if c_i and the text are independent given z_t. context: (B, L, D). context_empty:
    (1, L, D) of the empty or negative prompt, unused (may be None) if guidance_scale is 1.
    conditions: Steerings; a single one of full strength costs no further pass of the U-Net, every
    other costs one. timesteps: all that the sampler will go through, in order, which windows are a
    share of; a denoiser that was given them serves one run of a sampler. z_t and eps are float32,
    whatever the U-Net computes in. Errors: ValueError for a window without timesteps, and for a
    timestep that is not the next.
    """
    if not timesteps and any(steering.window != (0.0, 1.0) for steering in conditions):
        raise ValueError("a window is a share of the steps; give timesteps")
    with_guidance = guidance_scale != 1
    if with_guidance:
        context = torch.cat([context_empty.expand_as(context), context])
    upcoming = iter(enumerate(timesteps))

    def share_done(t):
        """Returns the share of the steps that are done before this one."""
        if not timesteps:
            return 0.0
        step, expected = next(upcoming, (None, None))
        if t != expected:
            raise ValueError(f"timestep {t}, but the next of this run is {expected}; make a "
                             f"denoiser for each run of a sampler")
        return step / len(timesteps)

    def denoise(z_t, t):
        """Returns the guided prediction (B, 4, H, W)."""
        share = share_done(t)
        z = torch.cat([z_t, z_t]) if with_guidance else z_t
        z = z.to(context.dtype, memory_format=torch.channels_last)
        ts = torch.full((len(z),), t, device=z.device)
        active = [steering for steering in conditions if steering.is_active(share)]
        posteriors = []
        for steering in active:
            residuals = steering(t)
            if with_guidance:
                residuals = [r if r is None or len(r) == 1 else torch.cat([r, r])
                             for r in residuals]           # for both passes; 1 broadcasts
            posteriors.append(unet(z, ts, context, residuals).float())
        if len(active) == 1 and active[0].is_full:
            eps = posteriors[0]                            # eps* cancels
        else:
            eps = posterior(unet(z, ts, context).float(), posteriors,
                            [steering.strength for steering in active])
        return guide(*eps.chunk(2), guidance_scale) if with_guidance else eps

    return denoise


# ---- files ---------------------------------------------------------------------------------

def save_bps(bps, file, metadata):
    """Writes the network in fp16 as safetensors, its config and `metadata` (a dict) beside it.

    Errors: weights.UserError if a weight is not finite, or too large for fp16.
    """
    tensors = {key: tensor.half() for key, tensor in bps.state_dict().items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise weights.UserError(f"{file}: not written, as {key} is not finite or too large; "
                                    f"train with a smaller --lr")
    # one entry, because safetensors writes several in any order: the same run gives the same bytes
    header = dict(config=asdict(bps.config), training=metadata)
    weights.save(tensors, file, dict(bps=json.dumps(header)))


def load_bps(file, dtype=torch.float32, device="cpu"):
    """Returns the BPS of a file that save_bps wrote, ready to steer; `.metadata` is what was given.

    Errors: weights.UserError names the file and what is wrong with it.
    """
    checkpoint, metadata = checkpoints.read_bps(file)
    bps = checkpoint.build(build_bps, BPSConfig, dtype, device)
    bps.metadata = metadata
    return bps


# ---- a lighter expansive path --------------------------------------------------------------

class LightBPS(BPS):
    """BPS at a third of the parameters: 1x1 ports, one middle block, a narrow expansive path.

    The expansive path is narrow, because its maps have the smallest weight. It is made of 1x1
    convolutions, because the U-Net convolves each map right after it is added. The ports of a
    level read from one shared layer, because the blocks of a level differ in nothing that BPS sees.
    """
    port_size = 1
    middle_length = 1

    def build_expansive_path(self, skip_channels):
        """Returns an entry [shared layer, its ports] per level, innermost first."""
        entries, channels_in = nn.ModuleList(), skip_channels[-1]
        for channels in reversed(self.config.channels):
            narrow = channels // NARROW
            shared = nn.Sequential(nn.Conv2d(channels_in + channels, narrow, 1), nn.SiLU())
            ports = nn.ModuleList(zero_conv(narrow, channels, size=1)
                                  for _ in range(self.config.blocks_per_level + 1))
            entries.append(nn.ModuleList([shared, ports]))
            channels_in = narrow
        return entries

    def expansive_modules(self):
        """Returns each output block's port; a level's first one brings the shared layer along."""
        return [(port, shared) if i == 0 else (port,) for shared, ports in self.output_blocks
                for i, port in enumerate(ports)]

    def expansive_path(self, h, skips):
        """Returns the residuals of the output blocks, from the map that each level ends with."""
        residuals, level_length = [], self.config.blocks_per_level + 1
        for (shared, ports), skip in zip(self.output_blocks,
                                         reversed(skips[level_length - 1::level_length])):
            h = F.interpolate(h, skip.shape[-2:], mode="nearest")
            h = shared(torch.cat([h, skip], dim=1))
            residuals += [self.config.output_weight * port(h) for port in ports]
        return residuals


def build_bps(config):
    """Returns an untrained BPS or LightBPS, as the config's foot says."""
    return LightBPS(config) if config.foot == "light" else BPS(config)


# ---- the table of ports --------------------------------------------------------------------

def port_table(bps, side):
    """Returns rows (block, path, latent side, channels, weight, parameters) of all U-Net blocks.

    side: of the latent at the outermost level. parameters: those of the block and its port, which
    add up to the network's. Without a port, side, channels and weight are "-".
    """
    config, device = bps.config, next(bps.parameters()).device
    pixels = side * config.factor
    residuals = bps(torch.zeros(1, config.cond_channels, pixels, pixels, device=device),
                    torch.zeros(1, config.channels[0] * 4, device=device))
    inputs = len(bps.input_blocks)
    outputs = len(residuals) - inputs - 1
    blocks = [(f"input {i}", "contracting") for i in range(inputs)] + [("middle", "transition")]
    blocks += [(f"output {i}", "expansive") for i in range(outputs)]
    modules = [*zip(bps.input_blocks, bps.zero_blocks), (bps.middle_block, bps.zero_blocks[-1])]
    modules += bps.expansive_modules() or [()] * outputs
    port_weights = bps.port_weights + [config.output_weight] * outputs
    rows = []
    for block, residual, weight, parts in zip(blocks, residuals, port_weights, modules):
        count = sum(parameter.numel() for part in parts if part is not None
                    for parameter in part.parameters())
        port = ("-", "-", "-") if residual is None else (
            residual.shape[-1], residual.shape[1], weight)
        rows.append((*block, *port, count))
    return rows


def main():
    """Prints the table of ports for a base."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ports", action="store_true", help="print the table")
    add("--cond-channels", type=int, choices=(1, 3, 4), default=1, help="1 for sketch, 3 for "
        "segmentation or layout, 4 for artistic (default: %(default)s)")
    add("--base", type=Path, help="the Stable Diffusion to steer (default: SD 1.5's sizes)")
    add_port_options(parser)
    args = parser.parse_args()
    if not args.ports:
        parser.error("nothing to do; --ports prints the table of ports")
    unet_config, factor = UNetConfig(), BPSConfig.factor
    if args.base:
        unet_config = UNetConfig(**checkpoints.read_unet(args.base).config)
        factor = checkpoints.vae_factor(args.base)
    with torch.device("meta"):
        bps = build_bps(config_for(unet_config, args.cond_channels, factor,
                                   args.weights or "head-heavy", args.foot))
    rows = port_table(bps, unet_config.sample_size or 64)
    print("| block | path | latent | channels | weight | parameters |\n|---|---|---|---|---|---|")
    for block, path, side, channels, weight, count in rows:
        latent = side if side == "-" else f"{side} x {side}"
        weight = weight if weight == "-" else f"{weight:g}"
        print(f"| {block} | {path} | {latent} | {channels} | {weight} | {count:,} |")
    print(f"| all | | | | | {sum(row[-1] for row in rows):,} |")


if __name__ == "__main__":
    run(main)
