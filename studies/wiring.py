"""Draws the ports between BPS and the U-Net, from the two networks themselves, or prints a table.

    python -m studies.wiring                            # docs/figures/wiring.png, at SD 1.5's size
    python -m studies.wiring --table --base tiny/model  # of any base
"""
from pathlib import Path

import torch

from bps import build_bps, config_for
from inputs import checkpoints
from inputs.options import ROOT, Parser, add_port_options, run_script
from measure.plots import COLORS, Sheet
from unet import ResBlock, SpatialTransformer, UNet, UNetConfig

STEP, BOX = 34, 24                      # pixels from block to block, and of a block's width
LEFT, UNET_FLOOR, BPS_FLOOR, HEIGHT = 30, 185, 345, 430
FROZEN, TRAINED = COLORS[3], COLORS[0]
TALLEST = 64                            # pixels, of a block at the latent's full size


def port_table(bps, side):
    """Rows (block, path, latent side, channels, weight, parameters) of all U-Net blocks.

    side: of the latent at the outermost level. parameters: of the layers that make the block's map;
    a layer that several ports share counts for the first of them. "-" means no port.
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
    modules += output_modules(bps) or [()] * outputs
    port_weights = bps.port_weights + [config.output_weight] * outputs
    rows = []
    for block, residual, weight, parts in zip(blocks, residuals, port_weights, modules):
        count = sum(parameter.numel() for part in parts if part is not None
                    for parameter in part.parameters())
        port = ("-", "-", "-") if residual is None else (
            residual.shape[-1], residual.shape[1], weight)
        rows.append((*block, *port, count))
    return rows


def output_modules(bps):
    """For each output block, the modules that make its map."""
    if bps.config.foot == "faithful":
        return [(entry,) for entry in bps.output_blocks]
    return [(port, shared) if i == 0 else (port,) for shared, ports in bps.output_blocks
            for i, port in enumerate(ports)]


def print_table(rows):
    """Print the rows of port_table as a markdown table, and the sum of their parameters."""
    print("| block | path | latent | channels | weight | parameters |\n|---|---|---|---|---|---|")
    for block, path, side, channels, weight, count in rows:
        latent = side if side == "-" else f"{side} x {side}"
        weight = weight if weight == "-" else f"{weight:g}"
        print(f"| {block} | {path} | {latent} | {channels} | {weight} | {count:,} |")
    print(f"| all | | | | | {sum(row[-1] for row in rows):,} |")


def additions(block):
    """The number of additions of a block's map: after each residual block and transformer."""
    return sum(isinstance(layer, (ResBlock, SpatialTransformer)) for layer in block)


class Drawing(Sheet):
    """A sheet of blocks, arrows and skips."""

    def block(self, x, floor, side, color, label):
        """Draw a block above a floor, as tall as its map; returns its upper edge."""
        top = floor - max(8, side)
        self.rectangle([(x - BOX / 2, top), (x + BOX / 2, floor)], color)
        self.text(x, floor + 9, label, 11, "mm")
        return top

    def arrow(self, x, start, end, color):
        """Draw an arrow upwards."""
        self.line([(x, start), (x, end + 4)], color, 2)
        self.polygon([(x, end), (x - 4, end + 7), (x + 4, end + 7)], color)

    def skip(self, x, other, top, other_top, height):
        """Draw a skip, above all blocks."""
        self.line([(x, top), (x, height), (other, height), (other, other_top)], "#c3c8d0")


def draw_wiring(file):
    """Write the figure as PNG."""
    config = UNetConfig()
    with torch.device("meta"):
        unet = UNet(config)
        rows = port_table(build_bps(config_for(config, 1, 8)), TALLEST)
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    inputs = len(unet.input_blocks)
    sides, side = [], TALLEST
    for row in rows:
        if row[2] != "-":
            side = row[2]
        elif sides:                     # a block without a port, after the stem, halves the side
            side //= 2
        sides.append(side)
    drawing = Drawing(2 * LEFT + STEP * len(rows), HEIGHT)
    xs = [LEFT + STEP * (i + 0.5) for i in range(len(rows))]
    tops = [UNET_FLOOR - max(8, side) for side in sides]
    for i in range(inputs):             # the last skip in is the first one out
        j = len(rows) - 1 - i
        drawing.skip(xs[i], xs[j], tops[i], tops[j], UNET_FLOOR - TALLEST - 12 - 5 * (inputs - i))
    for x, side, row, block in zip(xs, sides, rows, blocks):
        name, _, port, _, weight, _ = row
        number = name.split()[-1] if " " in name else "mid"
        drawing.block(x, UNET_FLOOR, side, FROZEN, number)
        top = drawing.block(x, BPS_FLOOR, side, TRAINED if port != "-" else "#e6b3ba", number)
        if port != "-":
            drawing.arrow(x, top - 2, UNET_FLOOR + 18, TRAINED)
            drawing.text(x, BPS_FLOOR + 24, f"{weight:g}", 12, "mm", TRAINED)
            drawing.text(x + 9, UNET_FLOOR + 50, f"{additions(block)}x", 11, "mm", "black")
    for x, path in zip((xs[inputs // 2], xs[inputs], xs[-(inputs // 2)]),
                       ("down: contracting path", "middle", "up: expansive path, the foot")):
        drawing.text(x, BPS_FLOOR + 44, path, 12, "mm")
    drawing.text(LEFT, 12, "frozen U-Net: z_t, t, text in; eps out. A map is added after each "
                 "residual block and each transformer of its block. Grey: skips", 13, "lm", FROZEN)
    drawing.text(LEFT, HEIGHT - 14, "BPS: condition and t in. Below each block the port's fixed "
                 "weight, beside its arrow how often its map is added. Pale: no port", 13, "lm",
                 TRAINED)
    drawing.save(file)
    print(file)


def main():
    """Write the figure, or print the table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--table", action="store_true", help="print a table instead")
    add("--base", type=Path, help="the Stable Diffusion of the table (default: SD 1.5's sizes)")
    add("--cond-channels", type=int, choices=(1, 3, 4), default=1, help="of the table: 1 for "
        "sketch, 3 for segmentation and layout, 4 for artistic (default: %(default)s)")
    add_port_options(parser)
    add("--out", type=Path, default=ROOT / "docs" / "figures", help="(default: docs/figures)")
    args = parser.parse_args()
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        return draw_wiring(args.out / "wiring.png")
    config, factor = UNetConfig(), 8
    if args.base:
        config = UNetConfig(**checkpoints.read_unet(args.base).config)
        factor = checkpoints.vae_factor(args.base)
    with torch.device("meta"):
        bps = build_bps(config_for(config, args.cond_channels, factor,
                                   args.weights or "head-heavy", args.foot))
    print_table(port_table(bps, config.sample_size or 64))


if __name__ == "__main__":
    run_script(main)
