"""How many bits do conditions say, and does steering at the calibrated strength draw better?

    python -m measure.calibration runs/sketch/bps.safetensors runs/segmentation/bps.safetensors

Prints a row for each trained BPS of an embedded task and each of two strengths, 1 and the one of
the lowest loss on validation pairs. Everything else is measured on the test pairs, as in the
report of train.py; kernel distance is that of measure/quality.py.
"""
from pathlib import Path

import torch

from data import LatentCache, load_pairs
from inputs.options import BASE, Parser, run
from measure.obedience import meter_for
from measure.quality import distance_and_error, true_features
from measure.report import draw_pairs, load_fitting, validate
from sample import load_base
from tiny import world
from tiny.classifier import Classifier


@torch.inference_mode()
def main():
    """Prints the table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("bps", type=Path, nargs="+", help="files that train.py wrote for embedded tasks")
    parser.add_draws()
    parser.add_device()
    args = parser.parse_args()
    base, classify = load_base(BASE, device=args.device), Classifier()
    print("| task | bits | strength | obedience | kernel distance |\n|" + "---|" * 5)
    for file in args.bps:
        bps = load_fitting(file, base, device=args.device)
        task = bps.metadata["task"]
        val, test = (LatentCache(load_pairs(task, split), task, world.SIZE, base)
                     for split in ("val", "test"))
        count = min(args.count or len(test.pairs), len(test.pairs))
        meter = meter_for(task, embedded=True, device=args.device)
        true = true_features(classify, test, count)
        bits = "{:.0f} +- {:.0f}".format(*validate(base, test, bps)["bits"])
        best, error = validate(base, val, bps)["strength"]
        for strength, shown in ((1.0, "1"), (best, f"{best:.2f} +- {error:.2f}")):
            x = draw_pairs(base, test, bps, count, args.seed, strength=strength)
            distance = distance_and_error(classify.embed_pictures(x), true)
            measures = ", ".join(f"{name} {value:.3f}" for name, value in
                                 meter(x, test.cond(range(count))).items())
            print(f"| {task} | {bits} | {shown} | {measures} | "
                  "{:.4f} +- {:.4f} |".format(*distance), flush=True)


if __name__ == "__main__":
    run(main)
