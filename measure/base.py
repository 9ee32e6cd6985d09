"""Measures the embedded base on pictures that none of its parts has seen, and draws some of them.

    python -m measure.base          # prints the table of tiny/README.md, writes tiny/drawn.png

Shapes: n pictures, L tokens, D width.
"""
from pathlib import Path

import numpy as np
import torch

from inputs.conditions import to_x
from inputs.options import BASE, Parser, run
from measure.report import contact_sheet
from sample import draw, load_base
from tiny import world
from tiny.classifier import Classifier

STEPS, GUIDANCE = 50, 3.0
BATCH = 48
T_EDGES = (0, 250, 500, 750, 1000)
TIMESTEPS_PER_RANGE = 4         # of each picture
CANDIDATES = 24                 # captions among which a picture has to find its own
SHOWN = 24


def true_pictures(rows):
    """Returns the emoji of the rows on white, x (n, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_x(world.on_ground(world.picture(row["style"], row["name"])))
                        for row in rows])


def vae_errors(vae, x):
    """Returns PSNR in dB, over the mean squared error of all pictures, and L1 of a round trip."""
    decoded = torch.cat([vae.decode(vae.encode(part).mean).clamp(-1, 1)
                         for part in x.split(BATCH)])
    psnr = 10 * torch.log10(4 / (decoded - x).square().mean())
    return psnr.item(), (decoded - x).abs().mean().item()


def eps_losses(base, context, x, seed):
    """Returns the mean squared error of eps in each range of T_EDGES."""
    latent = torch.cat([base.vae.encode(part).mean for part in x.split(BATCH)])
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for low, high in zip(T_EDGES, T_EDGES[1:]):
        errors = []
        for _ in range(TIMESTEPS_PER_RANGE):
            t = torch.randint(low, high, (len(x),), generator=generator).to(x.device)
            noise = torch.randn(latent.shape, generator=generator).to(x.device)
            z_t = base.schedule.add_noise(latent, noise, t)
            errors += [(base.unet(z_t[i], t[i], context[i]) - noise[i]).square().mean((1, 2, 3))
                       for i in torch.arange(len(x)).split(BATCH)]
        losses.append(torch.cat(errors).mean().item())
    return losses


def draw_captions(base, captions, seed):
    """Returns pictures x (n, 3, 64, 64) of n captions; picture i has the noise of seed + i."""
    context, empty = base.encode(captions), base.encode([""])
    return torch.cat([draw(base, context[i], empty, (seed + i).tolist(), world.SIZE, STEPS,
                           GUIDANCE) for i in torch.arange(len(captions)).split(BATCH)])


def print_sight(what, classify, x, captions, categories):
    """Prints how often the CLIP sees the right category and the right name; returns the former.

    A picture's candidates are its own caption and those of the pictures that follow it.
    """
    category = (classify(x).cpu() == categories).float().mean().item()
    cosines = classify.cosines(x, captions).cpu()                              # (n, n)
    order = (torch.arange(len(x))[:, None] + torch.arange(CANDIDATES)) % len(x)
    name = (cosines.gather(1, order).argmax(dim=1) == 0).float().mean().item()
    print(f"| category, {what} | {category:.1%} |")
    print(f"| name among {CANDIDATES}, {what} | {name:.1%} |")
    return category


@torch.inference_mode()
def main():
    """Prints the table and writes the picture."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, default=BASE, help="the SD folder to measure (default: tiny/model)")
    add("--reader", type=Path, default=BASE, help="the SD folder whose CLIP looks at the pictures "
        "(default: tiny/model)")
    add("--count", type=int, default=141, help="test pictures to draw (default: all %(default)s)")
    add("--seed", type=int, default=0, help="the seed of the first picture (default: %(default)s)")
    parser.add_device()
    add("--out", type=Path, default=BASE.parent / "drawn.png", help="(default: tiny/drawn.png)")
    args = parser.parse_args()
    base = load_base(args.base, device=args.device)

    rows = world.pool("test")
    x, captions = true_pictures(rows).to(args.device), [world.full_caption(row) for row in rows]
    psnr, l1 = vae_errors(base.vae, x)
    print("| measure | value |\n|---|---|")
    print(f"| VAE round trip of {len(x)} test pictures, PSNR | {psnr:.2f} dB |")
    print(f"| the same, L1 (images in [-1, 1]) | {l1:.4f} |")
    losses = eps_losses(base, base.encode(captions), x, args.seed)
    for low, high, loss in zip(T_EDGES, T_EDGES[1:], losses):
        print(f"| eps loss on test pictures, t {low}..{high - 1} | {loss:.4f} |")

    rows = world.records("test", ("3d",))
    rows = [rows[i] for i in np.random.default_rng(args.seed).permutation(len(rows))[:args.count]]
    x, captions = true_pictures(rows).to(args.device), [world.full_caption(row) for row in rows]
    categories = torch.tensor([world.CATEGORIES.index(row["category"]) for row in rows])
    trained_names = Classifier(args.reader, args.device, split="train")
    accuracy = (trained_names(x).cpu() == categories).float().mean().item()
    print(f"| category, {len(x)} true 3d test pictures, read with training names' captions only | "
          f"{accuracy:.1%} |")
    classify = Classifier(args.reader, args.device)
    real = print_sight(f"{len(x)} true 3d test pictures", classify, x, captions, categories)
    drawn = draw_captions(base, captions, args.seed)
    generated = print_sight("drawn from the same captions", classify, drawn, captions, categories)
    print(f"| category, drawn relative to true | {generated / max(real, 1e-9):.1%} |")
    contact_sheet([x[:SHOWN], drawn[:SHOWN]], ["true picture", "drawn"],
                  [row["caption"] for row in rows[:SHOWN]], args.out)


if __name__ == "__main__":
    run(main)
