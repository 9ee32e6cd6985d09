"""Draws README's pictures of steering, by the shipped BPS on the first test drawings.

    python -m measure.figures strip         # docs/figures/strip.png: strengths from 0 to 1
    python -m measure.figures halves        # docs/figures/halves.png: two conditions, a half each

Shapes: C channels, H W rows and columns of the picture.
"""
from pathlib import Path

import torch

from bps import Steering, load_bps
from data import load_pairs
from inputs.conditions import cond_to_x, drawing_to_cond
from inputs.options import BASE, HERE, Parser, run
from inputs.sample_options import DEFAULT_BPS
from measure.report import contact_sheet
from sample import draw, load_base
from tiny import world

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
HALVES_PROMPT = "face, 3d style"
ROWS = 3


def drawings(count, category=None):
    """Returns conditions (count, 1, H, W) and pairs: the first test pairs, of a category or any."""
    pairs = [pair for pair, row in zip(load_pairs("sketch", "test"), world.records("test", ("3d",)))
             if category in (None, row["category"])][:count]
    return torch.stack([drawing_to_cond(pair.open_cond()) for pair in pairs]), pairs


def strip(base, bps):
    """Returns (columns, titles, names) of a sheet: one noise a row, the strength rising."""
    conds, pairs = drawings(ROWS)
    rows = []
    for seed, (cond, pair) in enumerate(zip(conds, pairs)):
        context, empty = base.encode([pair.prompts[0], ""]).split(1)
        rows.append(torch.cat([
            draw(base, context, empty, [seed], world.SIZE,
                 conditions=[Steering(bps, base.unet, cond[None], strength=strength)])
            for strength in STRENGTHS]))
    columns = [cond_to_x(conds), *torch.stack(rows, dim=1)]
    return columns, ["drawing", *map("strength {:g}".format, STRENGTHS)], [p.name for p in pairs]


def halves(base, bps):
    """Returns (columns, titles, names) of a sheet: two drawings, each of which steers a half."""
    conds, pairs = drawings(2 * ROWS, "face")
    mask = torch.zeros(1, 1, *2 * [world.SIZE // base.vae.factor])
    mask[..., :mask.shape[-1] // 2] = 1                                     # the left half
    context, empty = base.encode([HALVES_PROMPT, ""]).split(1)
    columns, names = [[] for _ in range(4)], []
    for row, (left, right) in enumerate(zip(conds[::2], conds[1::2])):
        names.append(" | ".join(pair.name for pair in pairs[2 * row:2 * row + 2]))
        steerings = [Steering(bps, base.unet, cond[None], mask=share)
                     for cond, share in ((left, mask), (right, 1 - mask))]
        for column, some in zip(columns, ([], steerings[:1], steerings[1:], steerings)):
            column.append(draw(base, context, empty, [row], world.SIZE, conditions=some))
    return ([cond_to_x(conds[::2]), cond_to_x(conds[1::2]), *map(torch.cat, columns)],
            ["left drawing", "right drawing", "the base", "left half", "right half", "both"],
            names)


FIGURES = dict(strip=strip, halves=halves)


@torch.inference_mode()
def main():
    """Writes one of the figures."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES)
    add("--out", type=Path, default=HERE / "docs" / "figures", help="folder (default: "
        "docs/figures)")
    args = parser.parse_args()
    columns, titles, names = FIGURES[args.figure](load_base(BASE), load_bps(DEFAULT_BPS))
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns, titles, names, args.out / f"{args.figure}.png", groups=1)


if __name__ == "__main__":
    run(main)
