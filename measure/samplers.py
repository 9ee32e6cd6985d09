"""Compares samplers on the embedded base: how long, is the condition followed, are pictures good?

    python -m measure.samplers              # five minutes on two cores
    python -m measure.samplers --bps runs/sketch/bps.safetensors

Draws the test pairs of sketch, by the base alone and with BPS. The times are per picture, of 48
drawn as a batch, with the decoder and without the text encoder. Kernel distance is between drawn
and true pictures in the image features of the embedded CLIP; the smaller, the better.
"""
import time
from pathlib import Path

import torch

from data import LatentCache, load_pairs
from diffusion import Sampling
from inputs.options import BASE, Parser, run
from inputs.sample_options import DEFAULT_BPS
from measure.obedience import sketch
from measure.quality import CANDIDATES, kernel_distance, recognition_rates, true_features
from measure.report import draw_pairs, load_fitting
from sample import load_base
from tiny import world
from tiny.classifier import Classifier

COMPARED = (Sampling("ddim", 50), Sampling("ddim", 20), Sampling("dpm++2m", 20),
            Sampling("dpm++2m", 12), Sampling("dpm++2m", 8))


@torch.inference_mode()
def main():
    """Prints the table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--bps", type=Path, default=DEFAULT_BPS, help="a BPS for sketch (default: the one "
        "that comes with the project)")
    parser.add_draws()
    parser.add_device()
    args = parser.parse_args()
    base = load_base(BASE, device=args.device)
    bps = load_fitting(args.bps, base, "sketch", args.device)
    pairs = load_pairs("sketch", "test")[:args.count]
    cache = LatentCache(pairs, "sketch", world.SIZE, base)
    conds, captions = cache.cond(range(len(pairs))), cache.first_prompts(range(len(pairs)))
    categories = world.category_numbers(world.records("test", ("3d",))[:args.count])
    classify = Classifier()
    true = true_features(classify, cache, len(pairs))
    candidates = min(CANDIDATES, len(pairs))
    print(f"| drawn by | sampler | s per picture | line F1 | category | name among {candidates} | "
          "kernel distance |\n|---|---|---|---|---|---|---|")
    for drawer in (None, bps):
        for sampling in COMPARED:
            start = time.perf_counter()
            x = draw_pairs(base, cache, drawer, len(pairs), args.seed, sampling)
            seconds = (time.perf_counter() - start) / len(pairs)
            category, name = recognition_rates(classify, x, captions, categories)
            distance = kernel_distance(classify.embed_pictures(x), true)
            print(f"| {'with BPS' if drawer else 'the base'} | {sampling.sampler} {sampling.steps} "
                  f"| {seconds:.2f} | {sketch(x, conds)['line F1']:.3f} | {category:.1%} "
                  f"| {name:.1%} | {distance:.4f} |", flush=True)


if __name__ == "__main__":
    run(main)
