"""Measures the embedded base, and what steers it, on figures that no part of it has seen.

    python -m studies.base                                      # the base alone
    python -m studies.base --bps runs/*/bps.safetensors         # and each trained BPS

Prints Markdown tables and writes sheets for the eye to --out: drawn.png has true pictures beside
what the base draws from their captions. With a BPS for sketch, matching.png has twelve test
drawings beside the pictures drawn from them, shuffled (it prints the order), and prompts.png has
three test drawings, each with four prompts.

Shapes: n pictures.
"""
import functools
from pathlib import Path

import torch
from tqdm import tqdm

from bps import Condition
from data import LatentCache, load_pairs
from inputs.conditions import cond_to_x
from inputs.options import BASE, Parser, run_script, seed_number
from measure.obedience import colour_fidelity, meter_for, prompt_fidelity
from measure.report import contact_sheet, draw_pairs, load_fitting, ratio, round_trips
from sample import draw, load_base
from studies.figures import PROMPTS, draw_rows
from tiny import world
from tiny.clip_score import BATCH, Reader
from tiny.pretrain import decoder_errors, encode_means, true_pictures

T_EDGES = (0, 250, 500, 750, 1000)
TIMESTEPS_PER_RANGE = 4         # for each picture
SHEET_ROWS = 24
LETTERS = "ABCDEFGHIJKL"
MATCHED = len(LETTERS)          # drawings that fresh eyes match with pictures


def eps_losses(base, context, z, seed):
    """Mean squared error of eps in each range of T_EDGES, for latents z."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for low, high in zip(T_EDGES, T_EDGES[1:]):
        errors = []
        for _ in range(TIMESTEPS_PER_RANGE):
            t = torch.randint(low, high, (len(z),), generator=generator).to(z.device)
            noise = torch.randn(z.shape, generator=generator).to(z.device)
            z_t, target = base.schedule.add_noise(z, noise, t), base.schedule.target(z, noise, t)
            errors += [(base.unet(z_t[i], t[i], context[i]) - target[i]).square().mean((1, 2, 3))
                       for i in torch.arange(len(z)).split(BATCH)]
        losses.append(torch.cat(errors).mean().item())
    return losses


def draw_captions(base, captions, seed):
    """Pictures x (n, 3, 64, 64) of n captions; picture i has the noise of seed + i."""
    context, empty = base.encode(captions), base.encode([""])
    return torch.cat([draw(base, context[i], empty, (seed + i).tolist(), (world.SIZE,) * 2)
                      for i in torch.arange(len(captions)).split(BATCH)]).cpu()


def print_base(base, reader, args):
    """Print what the base alone does on the test figures, and write drawn.png."""
    figures = world.figures("test")
    x = true_pictures(figures).to(args.device)
    z = encode_means(base.vae, x)
    psnr, l1 = decoder_errors(base.vae, z, x)
    print(f"| measure, {len(x)} test figures | drawn by the base | true pictures |\n|---|---|---|")
    print(f"| autoencoder, PSNR (dB) | | {psnr:.2f} |")
    print(f"| the same, L1 (images in [-1, 1]) | | {l1:.4f} |")
    captions = list(map(world.full_caption, figures))
    context = base.encode(captions)
    for low, high, loss in zip(T_EDGES, T_EDGES[1:], eps_losses(base, context, z, args.seed)):
        print(f"| loss of eps, t {low} to {high - 1} | {loss:.4f} | |")
    drawn = draw_captions(base, captions, args.seed)
    ours, bound = prompt_fidelity(drawn, figures), prompt_fidelity(x.cpu(), figures)
    for part in world.PARTS:
        print(f"| colour of {part} as named | {ours[part]:.1%} | {bound[part]:.1%} |")
    styles = torch.tensor([list(world.STYLES).index(row["style"]) for row in figures])
    rates = [(reader.styles(pictures) == styles).float().mean() for pictures in (drawn, x)]
    print(f"| style as named, read by CLIP | {rates[0]:.1%} | {rates[1]:.1%} |")
    contact_sheet([x.cpu(), drawn], ["true picture", "drawn"], captions[:SHEET_ROWS],
                  args.out / "drawn.png")


def print_shares(name, task, conds, names, prior, steered, round_trip):
    """Print for each measure how three kinds of pictures follow conditions."""
    meter = meter_for(task, embedded=True)
    scores = [meter(x, conds, names) for x in (prior, steered, round_trip)]
    for measure in scores[0]:
        lower, value, bound = (score[measure] for score in scores)
        share = ratio(value - lower, bound - lower)
        print(f"| {name} | {measure} | {lower:.3f} | {value:.3f} | {bound:.3f} | {share:.0%} |")


def follow(name, base, bps, pairs, seed):
    """Print how pictures follow their pairs' conditions.

    The result is the conditions, and pictures: the base alone, with BPS, the round trip.
    """
    task, n = bps.metadata["task"], len(pairs)
    cache = LatentCache(pairs, task, world.SIZE, base)
    conds, pictures = cache.cond(range(n)), (
        draw_pairs(base, cache, None, n, seed), draw_pairs(base, cache, bps, n, seed),
        round_trips(base, cache, n))
    print_shares(name, task, conds, [pair.name for pair in pairs], *pictures)
    return conds, pictures


def print_steering(base, bps, args):
    """Print how pictures of a BPS follow their conditions; write the sheets of a sketch BPS."""
    task, seed = bps.metadata["task"], args.seed
    pairs = load_pairs(task, "test")
    conds, (prior, steered, round_trip) = follow(task, base, bps, pairs, seed)
    if task != "artistic":
        follow(f"{task}, unseen hair", base, bps, load_pairs(task, "unseen"), seed)
    if task == "sketch":
        names = [pair.name for pair in pairs]
        # another name, because the cache knows a pair by its name and its files
        shaky = [pair._replace(name=f"{pair.name}, shaky", open_cond=functools.partial(
            world.open_part, "hand", pair.name)) for pair in pairs]
        cache = LatentCache(shaky, task, world.SIZE, base)
        drawn = draw_pairs(base, cache, bps, len(pairs), seed)
        print_shares("sketch, shaky hand", task, conds, names, prior, drawn, round_trip)
        for part, share in colour_fidelity(steered, names).items():
            print(f"| sketch | colour of {part} as named | | {share:.3f} | | |")
        write_matching(conds, steered, args)
        write_prompts(base, bps, conds[:3], args)


def write_matching(conds, steered, args):
    """Write twelve drawings and their pictures in another order, which is printed."""
    order = torch.randperm(MATCHED, generator=torch.Generator().manual_seed(args.seed)).tolist()
    contact_sheet([cond_to_x(conds[:MATCHED]), steered[order]], ["drawing", "picture"],
                  [f"{i + 1} / {LETTERS[i]}" for i in range(MATCHED)], args.out / "matching.png")
    print("matching.png:", ", ".join(f"{LETTERS[k]} is {i + 1}" for k, i in enumerate(order)))


def write_prompts(base, bps, conds, args):
    """Write each drawing with each of PROMPTS, all from one noise."""
    conditions = [[Condition(bps, cond[None])] for cond in conds]
    rows = draw_rows(base, PROMPTS, lambda row: conditions)          # of prompts; columns: drawings
    columns = torch.stack(rows, dim=1)                              # (prompts, drawings, 3, H, W)
    contact_sheet([cond_to_x(conds), *columns], ["drawing", *"1234"], [""] * len(conds),
                  args.out / "prompts.png", groups=1)


@torch.inference_mode()
def main():
    """Print the tables and write the sheets."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, default=BASE, help="the SD folder to measure (default: tiny/model)")
    add("--bps", type=Path, nargs="+", default=[], help="files that train.py wrote for it")
    add("--seed", type=seed_number, default=0, help="of the first picture (default: %(default)s)")
    parser.add_device()
    add("--out", type=Path, default=Path("runs/base"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    parser.check_out(args.out)
    base = load_base(args.base, device=args.device)
    networks = [load_fitting(file, base, device=args.device) for file in args.bps]
    args.out.mkdir(parents=True, exist_ok=True)
    print_base(base, Reader(args.base, args.device), args)
    if networks:
        print("\n| test pairs | measure | base alone | with BPS | round trip | share of the way |\n"
              "|---|---|---|---|---|---|")
    for bps in tqdm(networks, desc="BPS", leave=False):
        print_steering(base, bps, args)


if __name__ == "__main__":
    run_script(main)
