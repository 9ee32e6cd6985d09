"""Draws how BPS is wired to the U-Net, at SD 1.5's size, from the two networks themselves.

    python -m measure.wiring                # docs/figures/wiring.png
"""
from pathlib import Path

import torch

from bps import build_bps, config_for, port_table
from inputs.options import HERE, Parser, run
from measure.plots import COLORS, Sheet
from unet import ResBlock, SpatialTransformer, UNet, UNetConfig

STEP, BOX = 34, 24                      # pixels from block to block, and of a block's width
LEFT, UNET_FLOOR, BPS_FLOOR, HEIGHT = 30, 185, 345, 430
FROZEN, TRAINED = COLORS[3], COLORS[0]
TALLEST = 64                            # pixels, of a block at the latent's full size


def additions(block):
    """Returns how often a block's map is added: after each residual block and transformer."""
    return sum(isinstance(layer, (ResBlock, SpatialTransformer)) for layer in block)


class Drawing(Sheet):
    """A sheet of blocks, arrows and skips."""

    def block(self, x, floor, side, color, words):
        """Draws a block that stands on a floor, as tall as its map; returns its upper edge."""
        top = floor - max(8, side)
        self.rectangle([(x - BOX / 2, top), (x + BOX / 2, floor)], color)
        self.text(x, floor + 9, words, 11, "mm")
        return top

    def arrow(self, x, start, end, color):
        """Draws an arrow upwards."""
        self.line([(x, start), (x, end + 4)], color, 2)
        self.polygon([(x, end), (x - 4, end + 7), (x + 4, end + 7)], color)

    def skip(self, x, other, top, other_top, height):
        """Draws the way of a skip, above all blocks."""
        self.line([(x, top), (x, height), (other, height), (other, other_top)], "#c3c8d0")


def draw_wiring(file):
    """Writes the figure as PNG."""
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
    """Writes the figure."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "figures", help="folder "
                        "(default: docs/figures)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_wiring(args.out / "wiring.png")


if __name__ == "__main__":
    run(main)
