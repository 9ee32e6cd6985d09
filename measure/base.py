"""Measures the embedded base on names it has never seen, and draws a grid of what it can do.

    python -m measure.base         # prints the table of tiny/README.md, writes tiny/drawn.png
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from inputs.options import BASE, Parser, run
from inputs.conditions import to_image, to_x
from sample import load_base
from steer import draw
from tiny import world
from tiny.classifier import Classifier

STEPS, GUIDANCE = 50, 3.0
BATCH = 48
T_EDGES = (0, 250, 500, 750, 1000)


def true_pictures(rows):
    """Returns the pictures of the rows on white, x (n, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_x(world.on_ground(world.picture(row["style"], row["name"])))
                        for row in rows])


def vae_errors(vae, x):
    """Returns (PSNR in dB over the mean squared error of all pictures, mean L1) of a round trip."""
    again = torch.cat([vae.decode(vae.encode(part).mean).clamp(-1, 1)
                       for part in x.split(BATCH)])
    return (10 * torch.log10(4 / (again - x).square().mean())).item(), \
        (again - x).abs().mean().item()


def eps_losses(unet, vae, schedule, context, x, seed):
    """Returns the mean squared error of eps in each range of T_EDGES, 16 timesteps a picture."""
    latent = torch.cat([vae.encode(part).mean for part in x.split(BATCH)])
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for low, high in zip(T_EDGES, T_EDGES[1:]):
        errors = []
        for _ in range(4):
            t = torch.randint(low, high, (len(x),), generator=generator).to(x.device)
            noise = torch.randn(latent.shape, generator=generator).to(x.device)
            z_t = schedule.add_noise(latent, noise, t)
            errors += [(unet(z_t[i], t[i], context[i]) - noise[i]).square().mean(dim=(1, 2, 3))
                       for i in torch.arange(len(x)).split(BATCH)]
        losses.append(torch.cat(errors).mean().item())
    return losses


def draw_all(unet, vae, schedule, context, empty, seed):
    """Returns pictures x (n, 3, 64, 64) for text states (n, L, D); picture i has noise seed + i."""
    return torch.cat([draw(unet, vae, schedule, context[i], empty, (seed + i).tolist(), world.SIZE,
                           STEPS, GUIDANCE) for i in torch.arange(len(context)).split(BATCH)])


def grid(pictures, captions, file, columns=8):
    """Writes pictures x (n, 3, 64, 64) with their captions below, twice as large."""
    side, height = world.SIZE * 2, world.SIZE * 2 + 14
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (x, caption) in enumerate(zip(pictures, captions)):
        left, top = i % columns * side, i // columns * height
        sheet.paste(to_image(x).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.text((left + 2, top + side + 1), caption[:21], "black")
    sheet.save(file)
    print(file)


@torch.inference_mode()
def main():
    """Prints the table and draws the grid."""
    parser = Parser(__doc__)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--count", type=int, default=192, help="test pictures that are drawn again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_device()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "drawn.png")
    args = parser.parse_args()
    unet, vae, tokenizer, text_model, schedule = load_base(args.base, device=args.device)

    def encode(captions):
        """Returns text states (n, L, D)."""
        return torch.cat([text_model(tokenizer(captions[i:i + BATCH]).to(args.device))
                          for i in range(0, len(captions), BATCH)])

    rows = world.records("test")
    x = true_pictures(rows).to(args.device)
    psnr, l1 = vae_errors(vae, x)
    print("| measure | value |\n|---|---|")
    print(f"| VAE round trip of {len(x)} test pictures, PSNR | {psnr:.2f} dB |")
    print(f"| the same, L1 (images in [-1, 1]) | {l1:.4f} |")
    captions = [world.full_caption(row) for row in rows]
    losses = eps_losses(unet, vae, schedule, encode(captions), x, args.seed)
    for low, high, loss in zip(T_EDGES, T_EDGES[1:], losses):
        print(f"| eps loss on test pictures, t {low}..{high - 1} | {loss:.4f} |")

    chosen = np.random.default_rng(args.seed).permutation(len(rows))[:args.count]
    wanted = torch.tensor([world.CATEGORIES.index(rows[i]["category"]) for i in chosen])
    classify = Classifier(args.base, args.device)
    empty = encode([""])
    drawn = draw_all(unet, vae, schedule, encode([captions[i] for i in chosen]), empty, args.seed)
    real = (classify(x[chosen]).cpu() == wanted).float().mean().item()
    generated = (classify(drawn).cpu() == wanted).float().mean().item()
    print(f"| category accuracy of the CLIP, {len(chosen)} real test pictures | {real:.1%} |")
    print(f"| category accuracy, drawn from the same captions | {generated:.1%} |")
    print(f"| drawn relative to real | {generated / max(real, 1e-9):.1%} |")

    known = world.records("train")[::len(world.records("train")) // 24][:24]
    known_captions = [world.full_caption(row) for row in known]
    pictures = draw_all(unet, vae, schedule, encode(known_captions), empty, args.seed)
    names = [row["caption"] for row in known] + [rows[i]["caption"] for i in chosen[:24]]
    grid(torch.cat([pictures, drawn[:24]]), names, args.out)


if __name__ == "__main__":
    run(main)
