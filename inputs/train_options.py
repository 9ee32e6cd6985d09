"""The command line of train.py.

    args = parse_args(description)
"""
from pathlib import Path

from inputs.conditions import TASKS
from inputs.options import (
    DTYPES,
    Parser,
    add_port_options,
    check_pixels,
    positive,
    seed_number,
    unicode_path,
    unicode_text,
)
from weights import UserError

EMPTY_SHARE = 0.1               # share of empty prompts, so that guidance has its other pass


def parse_args(description):
    """Returns the checked command line."""
    parser = Parser(description)
    add = parser.add_argument
    add("--task", choices=TASKS, default="sketch", help="kind of condition (default: %(default)s)")
    add("--data", type=Path, help="a folder of your own pairs (default: the embedded ones)")
    add("--extract", action="store_true", help="make the conditions from the images' own lines; "
        "--data then needs images only (for sketch and artistic)")
    add("--default-prompt", type=unicode_text, default="", help="the prompt of pictures without "
        "a caption (default: nothing)")
    add("--prompt-drop", type=float, default=EMPTY_SHARE, help="the share of prompts that training "
        "leaves empty, so that guidance works (default: %(default)s)")
    add("--check-data", action="store_true", help="look at --data without training: what is in "
        "it, what is wrong, and a sheet of what the network will see")
    parser.add_base()
    add("--size", type=positive, default=64, help="pixels of the square; 512 for SD 1.5 "
        "(default: %(default)s)")
    add_port_options(parser)
    add("--steps", type=positive, help="training steps; with few pictures fewer: when the "
        "validation loss rises, they are learned by heart (default: 900, artistic 300)")
    add("--batch", type=positive, default=16, help="pictures per step (default: %(default)s)")
    add("--accumulate", type=positive, default=1, help="parts of a batch, one after the other, "
        "which needs less memory (default: %(default)s)")
    add("--checkpointing", action="store_true", help="compute activations twice, which needs less "
        "memory and more time")
    add("--dtype", choices=DTYPES, help="what the base computes in; BPS's weights stay fp32 "
        "(default: bf16 on a GPU, else fp32)")
    add("--keep", choices=("best", "last"), default="best", help="the weights to keep: those of "
        "the lowest validation loss, or the last (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate, which falls to zero; 1e-5 "
        "for SD 1.5 (default: %(default)s)")
    add("--save-every", type=positive, default=150, help="steps between checkpoints, each with a "
        "validation (default: %(default)s)")
    add("--seed", type=seed_number, default=0, help="(default: %(default)s)")
    add("--cache", type=unicode_path, default=Path("runs/cache"), help="folder of the latents of "
        "--data, which trainings share (default: %(default)s)")
    parser.add_device()
    add("--out", type=unicode_path, help="folder of the run (default: runs/TASK)")
    args = parser.parse_args()
    kind = TASKS[args.task]
    args.weights = args.weights or kind.port_weights
    args.steps = kind.steps if args.steps is None else args.steps
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    if not 0 < args.lr < 1:
        parser.error(f"--lr {args.lr}: allowed is what lies between 0 and 1")
    if not 0 <= args.prompt_drop <= 1:
        parser.error(f"--prompt-drop {args.prompt_drop}: allowed are 0 to 1")
    for name in ("extract", "check_data", "default_prompt"):
        if getattr(args, name) and not args.data:
            parser.error(f"--{name.replace('_', '-')}: needs --data, your own pairs")
    if args.extract and not kind.extract:
        parser.error(f"--extract: makes no conditions for --task {args.task}; allowed are "
                     f"{', '.join(name for name, task in TASKS.items() if task.extract)}")
    check_pixels(args.size, args.size)
    args.out = args.out or Path("runs") / ("check" if args.check_data else args.task)
    parser.check_out(args.out, *([args.data] if args.extract else []))
    parser.check_out(args.cache, option="--cache")
    return args


def check_training(args, base, processes):
    """Raises UserError if the base cannot train on squares of --size, or processes have no work."""
    unit = base.vae.factor * 2 ** (len(base.unet.config.channels) - 1)
    if args.size % unit:
        raise UserError(f"--size {args.size}: this base takes multiples of {unit}")
    if args.batch < processes.count * args.accumulate:
        raise UserError(f"--batch {args.batch}: {processes.count} processes that --accumulate "
                        f"{args.accumulate} parts each need at least one picture for each part")
