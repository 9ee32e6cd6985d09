"""Measures the embedded base on pictures that none of its parts has seen, and draws some of them.

    python -m measure.base          # prints the table of tiny/README.md, writes tiny/drawn.png

Shapes: n pictures.
"""
from pathlib import Path

import numpy as np
import torch

from inputs.conditions import to_x
from inputs.options import BASE, Parser, run
from measure.quality import CANDIDATES, recognition_rates
from measure.report import contact_sheet, ratio
from sample import draw, load_base
from tiny import world
from tiny.classifier import BATCH, Classifier
from tiny.pretrain import decoder_errors, encode_means

T_EDGES = (0, 250, 500, 750, 1000)
TIMESTEPS_PER_RANGE = 4         # for each picture
SHEET_ROWS = 24


def open_pictures(rows, device):
    """Returns the emoji of the rows on white, x (n, 3, 64, 64) in [-1, 1], and their captions."""
    x = torch.stack([to_x(world.on_ground(world.picture(row["style"], row["name"])))
                     for row in rows])
    return x.to(device), [world.full_caption(row) for row in rows]


def eps_losses(base, context, z, seed):
    """Returns the mean squared error of eps (or v) in each range of T_EDGES, for latents z."""
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
    """Returns pictures x (n, 3, 64, 64) of n captions; picture i has the noise of seed + i."""
    context, empty = base.encode(captions), base.encode([""])
    return torch.cat([draw(base, context[i], empty, (seed + i).tolist(), world.SIZE)
                      for i in torch.arange(len(captions)).split(BATCH)])


@torch.inference_mode()
def main():
    """Prints the table and writes the picture."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, default=BASE, help="the SD folder to measure (default: tiny/model)")
    add("--reader", type=Path, default=BASE, help="the SD folder whose CLIP reads the pictures "
        "(default: tiny/model)")
    parser.add_draws()
    parser.add_device()
    add("--out", type=Path, default=BASE.parent / "drawn.png", help="(default: tiny/drawn.png)")
    args = parser.parse_args()
    parser.check_out(args.out.parent)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    base = load_base(args.base, device=args.device)

    x, captions = open_pictures(world.pool("test"), args.device)
    z = encode_means(base.vae, x)
    psnr, l1 = decoder_errors(base.vae, z, x)
    print("| measure | value |\n|---|---|")
    print(f"| VAE round trip of {len(x)} test pictures, PSNR | {psnr:.2f} dB |")
    print(f"| the same, L1 (images in [-1, 1]) | {l1:.4f} |")
    losses = eps_losses(base, base.encode(captions), z, args.seed)
    for low, high, loss in zip(T_EDGES, T_EDGES[1:], losses):
        print(f"| eps loss on test pictures, t {low}..{high - 1} | {loss:.4f} |")

    rows = world.records("test", ("3d",))
    rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))[:args.count]]
    x, captions = open_pictures(rows, args.device)
    categories = world.category_numbers(rows)
    classify = Classifier(args.reader, args.device, split="train")
    accuracy, _ = recognition_rates(classify, x, captions, categories)
    print(f"| category, {len(x)} true 3d test pictures, read with training names' captions only | "
          f"{accuracy:.1%} |")
    classify = Classifier(args.reader, args.device)
    pictures = draw_captions(base, captions, args.seed)
    rates = [recognition_rates(classify, images, captions, categories) for images in (x, pictures)]
    for what, (accuracy, name_accuracy) in zip((f"{len(x)} true 3d test pictures",
                                                "drawn from the same captions"), rates):
        print(f"| category, {what} | {accuracy:.1%} |")
        print(f"| name among {min(CANDIDATES, len(x))}, {what} | {name_accuracy:.1%} |")
    print(f"| category, drawn relative to true | {ratio(rates[1][0], rates[0][0]):.1%} |")
    contact_sheet([x, pictures], ["true picture", "drawn"],
                  [row["caption"] for row in rows[:SHEET_ROWS]], args.out)


if __name__ == "__main__":
    run(main)
