"""What BPS steers where, with which weight, and what that costs: the options, and their table.

    python bps.py --ports --foot light
"""
import argparse
from pathlib import Path

import torch

import layouts
from bps import BPS, FEET, PATHS, WEIGHTS, TimeResBlock, config_for
from cli import Parser
from unet import Downsample, UNetConfig
from vae import VAEConfig


def add_options(parser):
    """Adds what a BPS consists of to a parser: --paths, --weights, --foot."""
    add = parser.add_argument
    add("--paths", nargs="+", choices=PATHS, default=PATHS, metavar="PATH",
        help=f"what is steered, some of {', '.join(PATHS)} (default: all)")
    add("--weights", type=port_weights, help=f"of the ports: {', '.join(WEIGHTS)}, or numbers with "
        f"commas between: one a level, the middle's, the expansive path's (default: "
        f"{WEIGHTS[0]}, for layout {WEIGHTS[1]})")
    add("--foot", choices=FEET, default=FEET[0], help="light: an expansive half of narrow 1x1 "
        "layers, 1x1 ports and one middle block, a third of the parameters (default: %(default)s)")


def port_weights(text):
    """Returns a name of bps.WEIGHTS, or the numbers (a tuple) of a text. Errors: ArgumentTypeError.
    """
    if text in WEIGHTS:
        return text
    try:
        weights = tuple(map(float, text.split(",")))
    except ValueError:
        weights = ()
    if not any(weights) or not all(0 <= weight < 1e4 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text}: allowed are {', '.join(WEIGHTS)}, or numbers "
                                         f"from 0 to 10,000, not all 0, as in 16,8,4,16,1")
    return weights


def port_table(bps, side):
    """Returns rows (block, path, latent side, channels, weight, parameters) of all blocks.

    side: of the latent at the outermost level. parameters: of the block and its port, so that
    they add up to the network's; weight is "-" where there is no port.
    """
    config = bps.config
    light = bps.light_foot.levels if hasattr(bps, "light_foot") else []
    rows, sides = [], [side]

    def add(block, path, channels, weight, *parts):
        """Appends a row; parts: the block's modules, or None."""
        count = sum(p.numel() for part in parts if part is not None for p in part.parameters())
        rows.append((block, path, sides[-1], channels, "-" if weight is None else weight, count))

    channels = config.channels[0]
    for i, (block, port, weight) in enumerate(zip(bps.input_blocks, bps.zero_blocks,
                                                  bps.input_port_weights)):
        if isinstance(block, TimeResBlock):
            channels = block.in_layers[-1].out_channels
        elif isinstance(block, Downsample):
            sides.append(-(-sides[-1] // 2))
        add(f"input {i}", "contracting", channels, None if port is None else weight, block, port)
    port = bps.zero_blocks[-1]
    add("middle", "transition", channels, None if port is None else config.middle_weight,
        bps.middle_block, port)
    for i in range(len(config.channels) * (config.blocks_per_level + 1)):
        level, number = divmod(i, config.blocks_per_level + 1)
        parts = [bps.output_blocks[i]] if len(bps.output_blocks) else []
        if light:
            mix, ports = light[level]
            parts = [ports[number], mix if number == 0 else None]
        add(f"output {i}", "expansive", config.channels[-1 - level],
            config.output_weight if parts else None, *parts)
        if number == config.blocks_per_level and len(sides) > 1:
            sides.pop()
    return rows


def main():
    """Prints the table of ports for a base."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ports", action="store_true", help="prints the table")
    add("--cond-channels", type=int, default=1, help="1 sketch, 3 segmentation or layout, 4 "
        "artistic (default: %(default)s)")
    add("--base", type=Path, help="a Stable Diffusion that is steered (default: SD 1.5's sizes)")
    add_options(parser)
    args = parser.parse_args()
    if not args.ports:
        parser.error("nothing to do; --ports prints the table of ports")
    if args.cond_channels < 1:
        parser.error(f"--cond-channels {args.cond_channels}: at least 1")
    unet_config, vae_config = UNetConfig(), VAEConfig()
    if args.base:
        unet_config = UNetConfig(**layouts.read_unet(args.base).config)
        vae_config = VAEConfig(**layouts.read_vae(args.base).config)
    factor = 2 ** (len(vae_config.channels) - 1)
    with torch.device("meta"):
        bps = BPS(config_for(unet_config, args.cond_channels, factor, args.weights or WEIGHTS[0],
                             args.paths, args.foot))
    rows = port_table(bps, unet_config.sample_size or 64)
    print("| block | path | latent | channels | weight | parameters |\n|---|---|---|---|---|---|")
    for block, path, side, channels, weight, count in rows:
        weight = weight if isinstance(weight, str) else f"{weight:g}"
        print(f"| {block} | {path} | {side} x {side} | {channels} | {weight} | {count:,} |")
    print(f"| all | | | | | {sum(row[-1] for row in rows):,} |")
