"""Draws pictures of steering for README and docs/, by the included BPS on test drawings.

    python -m studies.figures hero          # docs/figures/hero.png: with and without BPS
    python -m studies.figures strip         # docs/figures/strip.png: strengths from 0 to 1
    python -m studies.figures halves        # docs/figures/halves.png: two drawings, a half each
    python -m studies.figures joined        # docs/figures/joined.png: two conditions, added
    python -m studies.figures windows       # docs/figures/windows.png: a part of the steps
    python -m studies.figures tasks --bps FILES
                                            # docs/figures/tasks.png: a row for each trained BPS

Shapes: C channels, H W rows and columns of the picture.
"""
from pathlib import Path

import torch

from bps import Condition
from data import LatentCache, load_pairs
from inputs.conditions import cond_to_x, drawing_to_cond
from inputs.options import BASE, DEFAULT_BPS, ROOT, Parser, run_script
from measure.obedience import drawing_f1
from measure.report import contact_sheet, draw_pairs, load_fitting
from sample import draw, load_base
from tiny import world

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WINDOWS = ((0.0, 0.25), (0.0, 0.5), (0.5, 1.0), (0.75, 1.0), (0.0, 1.0))       # of the denoising
# What a drawing is drawn with to see that colours come from the prompt and shapes from it.
PROMPTS = ("person, purple hair, light skin, on white",
           "person, blond hair, dark skin, red clothes, avataaars style, on pale blue",
           "person, green hair, brown skin, lorelei style, on yellow",
           "teal robot, bottts style, on pink")
OTHER_PROMPT = "person, blond hair, dark skin, on pale blue"        # of the hero
QUANTILES = (0.75, 0.5, 0.25)               # of the gain in line F1, for the rows of the hero
ROWS = 3
SHOWN = slice(2, 4)     # pairs of each task: the first two are a robot and an almost bald head


def person_pairs():
    """The test pairs that are no robots."""
    return [pair for pair in load_pairs("sketch", "test") if "robot" not in world.figure(pair.name)]


def conds_of(pairs):
    """The conditions (n, 1, H, W) of n pairs of sketch."""
    return torch.stack([drawing_to_cond(pair.open_cond()) for pair in pairs])


def drawings(count, persons=False):
    """Conditions (count, 1, H, W) and pairs: the first test pairs, of persons or any."""
    pairs = (person_pairs() if persons else load_pairs("sketch", "test"))[:count]
    return conds_of(pairs), pairs


def draw_rows(base, prompts, conditions_of):
    """Columns, each x (prompts, 3, H, W): a row has one prompt, and all have one noise.

    conditions_of(row): the list of Conditions of each column.
    """
    rows = []
    for row, prompt in enumerate(prompts):
        context, empty = base.encode([prompt, ""]).split(1)
        rows.append(torch.cat([draw(base, context, empty, [0], (world.SIZE,) * 2,
                               conditions=conditions)
                               for conditions in conditions_of(row)]))
    return list(torch.stack(rows, dim=1))


def one_drawing(base, bps, options):
    """(columns, titles, names) of a sheet: a row is one drawing, a column has its own options.

    A row's prompt names the colours and the style of its drawing, not its shapes.
    options: {title: arguments of Condition}.
    """
    conds, pairs = drawings(ROWS, persons=True)
    prompts = [pair.prompts[0] for pair in pairs]
    columns = draw_rows(base, prompts, lambda row: [
        [Condition(bps, conds[row:row + 1], **arguments)] for arguments in options.values()])
    return [cond_to_x(conds), *columns], ["drawing", *options], prompts


def hero(base, bps):
    """(columns, titles, names) of a sheet: drawings at QUANTILES of what BPS gains.

    A row has one noise. Its prompt is its drawing's, but OTHER_PROMPT in the last column.
    """
    pairs = person_pairs()
    cache, n = LatentCache(pairs, "sketch", world.SIZE, base), len(pairs)
    drawn = [draw_pairs(base, cache, network, n, 0) for network in (None, bps)]
    prior, steered = (drawing_f1(x, cache.cond(range(n))) for x in drawn)
    order = (steered - prior).argsort()
    chosen = [order[round(quantile * (n - 1))].item() for quantile in QUANTILES]
    conds = cache.cond(chosen)
    context, empty = base.encode([OTHER_PROMPT, ""]).split(1)
    others = [draw(base, context, empty, [i], (world.SIZE,) * 2,
                   conditions=[Condition(bps, cond[None])]) for i, cond in zip(chosen, conds)]
    return ([cond_to_x(conds), *(x[chosen] for x in drawn), torch.cat(others)],
            ["drawing", "the base alone", "with BPS", "BPS, another prompt"],
            cache.first_prompts(chosen))


def strip(base, bps):
    """(columns, titles, names) of a sheet: the strength rises."""
    return one_drawing(base, bps, {f"strength {s:g}": dict(strength=s) for s in STRENGTHS})


def windows(base, bps):
    """(columns, titles, names) of a sheet: a part of the denoising is steered."""
    return one_drawing(base, bps, {f"{start:g} to {end:g}": dict(window=(start, end))
                                   for start, end in WINDOWS})


def joined(base, bps):
    """(columns, titles, names) of a sheet: a drawing's two halves as two conditions."""
    conds, pairs = drawings(ROWS)
    upper, lower = conds.clone(), conds.clone()
    upper[:, :, world.SIZE // 2:] = lower[:, :, :world.SIZE // 2] = 0

    def conditions_of(row):
        """The Conditions of each half, of both, and of the whole."""
        a, b, whole = (Condition(bps, cond[row:row + 1]) for cond in (upper, lower, conds))
        return [a], [b], [a, b], [whole]

    columns = draw_rows(base, [pair.prompts[0] for pair in pairs], conditions_of)
    return ([cond_to_x(upper), cond_to_x(lower), *columns],
            ["upper half", "lower half", "upper", "lower", "both, added", "one drawing"],
            [pair.prompts[0] for pair in pairs])


def halves(base, bps):
    """(columns, titles, names) of a sheet: two drawings in one style, each steers a half.

    A row's prompt is that of its left drawing.
    """
    by_style = {}
    for pair in person_pairs():
        by_style.setdefault(world.figure(pair.name)["style"], []).append(pair)
    lefts, rights = zip(*(pairs[:2] for pairs in list(by_style.values())[:ROWS]))
    left, right = conds_of(lefts), conds_of(rights)
    side = world.SIZE // base.vae.factor
    mask = (torch.arange(side) < side // 2).float().expand(1, 1, side, side)    # the left half

    def conditions_of(row):
        """The Conditions of the base alone, of each half, and of both."""
        a, b = (Condition(bps, conds[row:row + 1], mask=half)
                for conds, half in ((left, mask), (right, 1 - mask)))
        return [], [a], [b], [a, b]

    prompts = [pair.prompts[0] for pair in lefts]
    return ([cond_to_x(left), cond_to_x(right), *draw_rows(base, prompts, conditions_of)],
            ["left drawing", "right drawing", "the base", "left half", "right half", "both"],
            prompts)


def tasks(base, *networks):
    """(columns, titles, names) of a sheet: a task's third and fourth test pair in each row."""
    rows = []
    for bps in networks:
        task = bps.metadata["task"]
        cache = LatentCache(load_pairs(task, "test")[SHOWN], task, world.SIZE, base)
        cells = (cond_to_x(cache.cond(range(2))), draw_pairs(base, cache, None, 2, 0),
                 draw_pairs(base, cache, bps, 2, 0))
        rows.append(torch.stack(cells, dim=1).flatten(0, 1))                # (6, 3, H, W)
    return (list(torch.stack(rows, dim=1)), ["condition", "the base", "with BPS"] * 2,
            [bps.metadata["task"] for bps in networks])


FIGURES = dict(hero=hero, strip=strip, halves=halves, joined=joined, windows=windows, tasks=tasks)


@torch.inference_mode()
def main():
    """Write one of the figures."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("figure", choices=FIGURES)
    add("--bps", type=Path, nargs="+", default=[DEFAULT_BPS], help="trained BPS: one for each row "
        "of tasks, else one of sketch (default: the included one)")
    add("--out", type=Path, default=ROOT / "docs" / "figures", help="(default: docs/figures)")
    args = parser.parse_args()
    parser.check_out(args.out)
    if args.figure != "tasks" and len(args.bps) > 1:
        parser.error(f"--bps must be one file for {args.figure}, got {len(args.bps)}.")
    base = load_base(BASE)
    task = None if args.figure == "tasks" else "sketch"
    networks = [load_fitting(file, base, task) for file in args.bps]
    columns, titles, names = FIGURES[args.figure](base, *networks)
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns, titles, names, args.out / f"{args.figure}.png", groups=1)


if __name__ == "__main__":
    run_script(main)
