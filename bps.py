"""Bayesian Power Steering (BPS, arXiv 2406.03683): from the prior to the posterior denoiser.

A latent z_t = alpha_t z_0 + sigma_t noise, alpha_t^2 + sigma_t^2 = 1, is denoised by predicting
its noise. Trained by least squares, the frozen U-Net approximates the best possible prediction,
eps* = E[noise | z_t, text], which is the gradient of a log density (Tweedie's formula):

    eps*(z_t, t, text) = -sigma_t grad log p_t(z_t | text)                      the prior

A new condition c is learned from few pairs. Bayes' rule turns a product of densities into a sum
of gradients:

    p_t(z_t | text, c)  is proportional to  p_t(z_t | text) p_t(c | z_t, text)
    eps_bar*(z_t, t, text, c) = eps*(z_t, t, text) + M                          the posterior
    M = -sigma_t grad log p_t(c | z_t, text)                                    the steering

BPS learns M with a network that sees only the condition and the timestep. Its maps r(c, t) are
added inside the frozen U-Net, after each residual block and each transformer; the layers that
follow make the steering depend on z_t and on the text:

    M_hat(z_t, t, text, c) = unet(z_t; r(c, t)) - unet(z_t)

With enough pairs from the base's own law, training by plain noise prediction makes M_hat the best
approximation of M within this family of functions. If the labelled pictures follow another law p',
M_hat also contains -sigma_t grad log (p'_t(z_t | text) / p_t(z_t | text)). r does not depend on
z_t. This restriction buys speed: one pass of BPS serves all seeds, all prompts and both passes of
guidance.

Shapes: B batch, C channels, H W rows and columns of the latent, f the autoencoder's factor, L
tokens, D width.

    residuals = BPS(config)(cond, unet.time_embedding(t))
    eps_bar = unet(z_t, t, context, residuals)
"""
import json
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import weights
from diffusion import guide
from unet import Downsample, Upsample, run_block

NARROW = 4                              # LightBPS: its expansive layers have channels / NARROW
# metadata of a BPS file by example: load_bps checks that each value has its example's type
METADATA = dict(task="sketch", size=512, context_dim=768, prediction_type="epsilon", base="",
                classes=("",))
LAST_T = 999                            # the noisiest timestep, where sampling starts


@dataclass(frozen=True)
class BPSConfig:
    """The sizes of a BPS network and its port weights; the defaults steer SD 1.5 with a sketch.

    channels, blocks_per_level and norm_groups are the U-Net's. Port weights are fixed factors of
    the maps: one per level of the contracting path (outermost first), one for the middle, one for
    the whole expansive path. A block whose weight is 0 has no port; without an expansive path its
    blocks are not built.
    """
    cond_channels: int = 1                             # sketch 1, label maps 3, artistic 4
    factor: int = 8                                    # f: a latent pixel covers f x f of the image
    channels: tuple = (320, 640, 1280, 1280)
    blocks_per_level: int = 2
    norm_groups: int = 32
    input_weights: tuple = (16.0, 8.0, 4.0, 2.0)       # head-heavy ...
    middle_weight: float = 16.0
    output_weight: float = 1.0                         # ... and foot-light
    foot: str = "faithful"                             # the authors' expansive path, or "light"


def config_for(unet_config, cond_channels, factor, port_weights="head-heavy", foot="faithful"):
    """The BPSConfig that fits a U-Net.

    port_weights: "head-heavy" halves from level to level, 16, 8, 4, 2 for four levels, with 16 in
    the middle and 1 on the expansive path (authors' code); "flat" is 1 everywhere (theirs for
    layout); or numbers: one per level, the middle's, the expansive path's. Weights do not limit
    what can be learned, since a port can grow; with Adam a weight of w acts like a learning rate
    w times as large.
    """
    levels = len(unet_config.channels)
    if port_weights == "head-heavy":
        port_weights = (*(16.0 / 2**level for level in range(levels)), 16.0, 1.0)
    elif port_weights == "flat":
        port_weights = (1.0,) * (levels + 2)
    if len(port_weights) != levels + 2 or not any(port_weights[levels - 1:]):
        raise weights.UserError(
            f"port weights must be {levels + 2} numbers for this base ({levels} levels, middle, "
            f"expansive path), at least one of the last three not 0, got "
            f"{', '.join(f'{weight:g}' for weight in port_weights)}.")
    *input_weights, middle_weight, output_weight = map(float, port_weights)
    return BPSConfig(
        cond_channels=cond_channels, factor=factor, channels=unet_config.channels,
        blocks_per_level=unet_config.blocks_per_level, norm_groups=unet_config.norm_groups,
        input_weights=tuple(input_weights), middle_weight=middle_weight,
        output_weight=output_weight, foot=foot)


# ---- the network ---------------------------------------------------------------------------

def zero_conv(channels_in, channels, size=3):
    """A convolution of size x size that outputs zero until it is trained.

    Its own gradient is not zero: d loss / d weight = d loss / d output * input.
    """
    conv = nn.Conv2d(channels_in, channels, size, padding=size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class TimeResBlock(nn.Module):
    """A residual block that the timestep scales and shifts, in the contracting path and middle.

    Its last convolution starts at zero, and so does the port after it. The ports therefore learn
    from the first step; first layer, downsamplers, skips and last convolutions from the second;
    layers before a last convolution from the third.
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

    Every block of the U-Net that contains a residual block has a port, and so a map. The stem and
    the downsamplers (input blocks 0, 3, 6 and 9 of SD 1.5) have None instead. Attributes carry
    the names and numbers of the authors' checkpoints: `zero_blocks` are the ports of the
    contracting path and, last, of the middle; an entry of `output_blocks` is [block, port] or
    [block, port, upsampler].
    """
    checkpointing = False               # recompute activations: less memory, more time
    port_size, middle_blocks = 3, 2     # a port's kernel; residual blocks of the middle

    def __init__(self, config=BPSConfig()):
        super().__init__()
        self.config = config
        base, levels = config.channels[0], len(config.channels)
        res_block = partial(TimeResBlock, t_emb_dim=base * 4,   # the frozen U-Net's own embedding
                            norm_groups=config.norm_groups)

        # Contracting path. `skip_channels` remembers what the expansive path will concatenate.
        self.input_blocks = nn.ModuleList(
            [nn.Conv2d(config.cond_channels * config.factor**2, base, 3, padding=1)])
        self.zero_blocks, self.port_weights = nn.ModuleList([None]), [0.0]
        skip_channels = [base]
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks_per_level):
                self.input_blocks.append(res_block(skip_channels[-1], channels))
                self.add_port(channels, config.input_weights[level])
                skip_channels.append(channels)
            if level < levels - 1:
                self.input_blocks.append(Downsample(channels))
                self.add_port(channels, 0.0)
                skip_channels.append(channels)

        self.middle_block = nn.ModuleList()
        if config.middle_weight or config.output_weight:
            self.middle_block.extend(res_block(channels, channels)
                                     for _ in range(self.middle_blocks))    # innermost level
        self.add_port(channels, config.middle_weight)
        self.output_blocks = nn.ModuleList()
        if config.output_weight:
            self.add_expansive_path(skip_channels)

    def add_port(self, channels, weight):
        """Append the port of a contracting block or the middle, None if its weight is 0."""
        self.zero_blocks.append(zero_conv(channels, channels, self.port_size) if weight else None)
        self.port_weights.append(weight)

    def add_expansive_path(self, skip_channels):
        """Append one block for every skip, so one more per level than on the way down."""
        channels_in, per_level = skip_channels[-1], self.config.blocks_per_level + 1
        for level, channels in reversed(list(enumerate(self.config.channels))):
            for i in range(per_level):
                layers = [TimelessResBlock(channels_in + skip_channels.pop(), channels,
                                           self.config.norm_groups),
                          zero_conv(channels, channels, self.port_size)]
                channels_in = channels
                if i == per_level - 1 and level > 0:
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))

    def forward(self, cond, t_emb):
        """Residuals: one map (B, C, H, W) per U-Net block, None where there is no port.

        cond: (B, C_cond, f H, f W) in [0, 1]. t_emb: (B or 1, 4 * base channels), the frozen
        U-Net's time_embedding(t). The order is input blocks, middle, output blocks. At SD 1.5's
        size and 512 px the maps go from (B, 320, 64, 64) to (B, 1280, 8, 8) and back.
        """
        h, skips, residuals = self.contract(cond, t_emb)
        return residuals + (self.expand(h, skips) if self.output_blocks else [None] * len(skips))

    def contract(self, cond, t_emb):
        """(h (B, C, H, W), skips, residuals) after the contracting path and the middle.

        The map of block i is r_i = weight_i port_i(h_i(c, t)).
        """
        B, C, rows, columns = cond.shape
        factor = self.config.factor
        if C != self.config.cond_channels or rows % factor or columns % factor:
            raise ValueError(f"the condition must have {self.config.cond_channels} channels and "
                             f"sides that are multiples of {factor}, got {tuple(cond.shape)}")
        # f x f pixels become channels: the latent's size, and nothing is lost
        h, skips, residuals = F.pixel_unshuffle(cond, factor), [], []         # (B, C f^2, H, W)
        ports = list(zip(self.zero_blocks, self.port_weights))
        for block, (port, weight) in zip(self.input_blocks, ports):
            inputs = (h, t_emb) if isinstance(block, TimeResBlock) else (h,)
            h = run_block(block, *inputs, checkpointing=self.checkpointing)
            skips.append(h)
            residuals.append(None if port is None else weight * port(h))
        for block in self.middle_block:
            h = run_block(block, h, t_emb, checkpointing=self.checkpointing)
        port, weight = ports[-1]
        residuals.append(None if port is None else weight * port(h))
        return h, skips, residuals

    def expand(self, h, skips):
        """The maps of the expansive path, from what contract returns."""
        residuals = []
        for block, port, *up in self.output_blocks:
            h = run_block(block, torch.cat([h, skips.pop()], dim=1),
                          checkpointing=self.checkpointing)
            residuals.append(self.config.output_weight * port(h))
            if up:
                h = up[0](h, skips[-1].shape[-2:])
        return residuals


class LightBPS(BPS):
    """BPS at a third of the parameters, this project's own variant: 1x1 ports, one middle block
    and a narrow expansive path.

    The expansive path is narrow because it is over half of BPS, and consists of 1x1 convolutions
    because the U-Net convolves each map right after it is added. The ports of a level share one
    layer because the blocks of a level differ in nothing that BPS sees.
    """
    port_size, middle_blocks = 1, 1

    def add_expansive_path(self, skip_channels):
        """Append a shared layer and its ports for each level."""
        channels_in = skip_channels[-1]
        for channels in reversed(self.config.channels):
            narrow = channels // NARROW
            shared = nn.Sequential(nn.Conv2d(channels_in + channels, narrow, 1), nn.SiLU())
            ports = nn.ModuleList(zero_conv(narrow, channels, self.port_size)
                                  for _ in range(self.config.blocks_per_level + 1))
            self.output_blocks.append(nn.ModuleList([shared, ports]))
            channels_in = narrow

    def expand(self, h, skips):
        """The maps of the expansive path, from what contract returns."""
        residuals = []
        level_ends = skips[self.config.blocks_per_level::self.config.blocks_per_level + 1]
        for (shared, ports), skip in zip(self.output_blocks, reversed(level_ends)):
            h = F.interpolate(h, skip.shape[-2:], mode="nearest")
            h = shared(torch.cat([h, skip], dim=1))
            residuals += [self.config.output_weight * port(h) for port in ports]
        return residuals


def build_bps(config):
    """An untrained BPS or LightBPS, as config.foot says."""
    return LightBPS(config) if config.foot == "light" else BPS(config)


# ---- from the prior to the posterior denoiser ----------------------------------------------

def posterior(eps_prior, eps_posteriors, strengths):
    """eps* + sum_i s_i (eps_bar_i* - eps*), the combined posterior denoiser.

    eps_prior, each of eps_posteriors: (B, 4, H, W), all eps or all v: the coefficients sum to 1,
    and v is affine in eps. strengths: s_i for each; 0 is the prior, 1 the posterior. For numbers,
    at each t this is -sigma_t grad log [p_t(z_t) prod_i p_t(c_i | z_t)^s_i]. A sampler reaches
    p(z_0) prod_i p(c_i | z_0)^s_i exactly if each s_i is 0 or 1 and the conditions are
    independent given z_t at every t, but not in general: a power or product of means is not the
    mean of the power or product (arXiv 2302.11552). A strength may also be a map (1, 1, H, W);
    the sum is then not a gradient, only a heuristic.
    """
    return eps_prior + sum(s * (eps_posterior - eps_prior)
                           for eps_posterior, s in zip(eps_posteriors, strengths, strict=True))


class Condition:
    """One condition, ready to steer: a BPS, what it is shown, and how strongly, when and where.

    The maps depend on the condition and the timestep only, so those of the last timestep are kept:
    all pictures drawn side by side share them.
    """

    def __init__(self, bps, cond, strength=1.0, window=(0.0, 1.0), mask=None):
        """cond: (B or 1, C, f H, f W) in [0, 1]. strength: s in p_t(c | z_t)^s. window: the part
        of the denoising, from 0 (pure noise) to 1 (clean), that is steered. mask: (1, 1, H, W) in
        [0, 1], the share of the strength at each place; None is 1 everywhere.
        """
        self.bps, self.cond, self.window = bps, cond, window
        self.strength = strength if mask is None else strength * mask
        strengths = torch.as_tensor(self.strength)
        self.is_full, self.is_off = bool((strengths == 1).all()), not strengths.any()
        self.last_t, self.last_residuals = None, None

    def is_active(self, t):
        """Whether this condition steers at timestep t."""
        start, end = self.window
        return not self.is_off and start <= (LAST_T - t) / (LAST_T + 1) < end

    def residuals(self, unet, t, batch_size):
        """The maps at timestep t (a number) for batch_size latents; one map may serve them all."""
        if t != self.last_t:
            device = next(unet.parameters()).device
            t_emb = unet.time_embedding(torch.tensor([t], device=device))
            self.last_t, self.last_residuals = t, self.bps(self.cond.to(t_emb), t_emb)
        # with guidance the batch is twice as large: the empty prompt's half, then the text's
        return [r if r is None or len(r) == 1 else r.repeat(batch_size // len(r), 1, 1, 1)
                for r in self.last_residuals]


def make_denoiser(unet, context, context_empty, guidance_scale, conditions=()):
    """A function denoise(z_t, t) -> eps (or v): the prior, or the posterior of all conditions.

        D(text) = eps*(text) + sum_i s_i (eps_bar_i*(text) - eps*(text))
        denoise = D(empty) + guidance_scale (D(text) - D(empty))

    Conditions steer both passes of guidance, so guidance does not raise their exponent: s_i stays
    s_i if c_i and the text are independent given z_t. context: (B, L, D). context_empty:
    (1, L, D) of the empty or negative prompt, unused (may be None) if guidance_scale is 1. A
    single condition of full strength costs no further pass of the U-Net, every other costs one.
    z_t and eps are float32, whatever the U-Net computes in.
    """
    with_guidance = guidance_scale != 1
    if with_guidance:
        context = torch.cat([context_empty.expand_as(context), context])

    def denoise(z_t, t):
        """The guided prediction (B, 4, H, W)."""
        z = torch.cat([z_t, z_t]) if with_guidance else z_t
        z = z.to(context.dtype, memory_format=torch.channels_last)
        ts = torch.full((len(z),), t, device=z.device)
        active = [condition for condition in conditions if condition.is_active(t)]
        posteriors = [unet(z, ts, context, condition.residuals(unet, t, len(z))).float()
                      for condition in active]
        if len(active) == 1 and active[0].is_full:
            eps = posteriors[0]                            # eps* cancels
        else:
            eps = posterior(unet(z, ts, context).float(), posteriors,
                            [condition.strength for condition in active])
        return guide(*eps.chunk(2), guidance_scale) if with_guidance else eps

    return denoise


# ---- files ---------------------------------------------------------------------------------

def save_bps(bps, file, metadata):
    """Write the network in fp16 as safetensors, with its config and `metadata` (a dict)."""
    tensors = {key: tensor.half() for key, tensor in bps.state_dict().items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise weights.UserError(f"{file} wasn't written: {key} overflows fp16. Train with a "
                                    f"smaller --lr.")
    # one entry, because safetensors writes several in any order: the same run gives the same bytes
    header = dict(config=asdict(bps.config), training=metadata)
    weights.save(tensors, file, dict(bps=json.dumps(header)))


def load_bps(file, dtype=torch.float32, device="cpu"):
    """The BPS of a file that save_bps wrote, frozen, with its `.metadata`."""
    state = weights.read_header(file)
    try:
        with safe_open(file, "pt") as f:
            header = json.loads(f.metadata()["bps"])
        config = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in header["config"].items()}
        metadata = dict(header["training"])
        classes = tuple(metadata.get("classes", {}).values())
    except weights.MALFORMED:
        raise weights.UserError(f"{file} is not a BPS file. train.py writes bps.safetensors."
                                ) from None
    weights.check_types(metadata | dict(classes=classes), METADATA, file)
    checkpoint = weights.Checkpoint(config, state, str, file)
    bps = checkpoint.build(build_bps, BPSConfig, dtype, device, may_end_in_zeros=True)
    bps.metadata = metadata
    return bps
