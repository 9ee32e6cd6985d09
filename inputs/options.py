"""Command line of the scripts: shared options, and one line for each user error."""
import argparse
import contextlib
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

import diffusion
from inputs.processes import peer_ended
from weights import UserError, reason, quoted

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
MAX_PIXELS = 4096**2
MAX_SEEDS = 2**31
MAX_COUNT = 10**6               # of steps, or of pictures in a batch
ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "tiny" / "model"
DEFAULT_BPS = ROOT / "tiny" / "bps_sketch.safetensors"      # for the embedded base
DEFAULT_DRAWING = ROOT / "tiny" / "drawing.png"
NONE = Path("none")             # for --bps and --mask
TEXT_OPTIONS = ("--prompt", "--negative-prompt", "--default-prompt")
PORT_WEIGHTS = ("head-heavy", "flat")
FEET = ("faithful", "light")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")     # GPU, CPU


class Parser(argparse.ArgumentParser):
    """A parser that prints the script's docstring as help, and an error as one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):
        """Parse the command line; the value of a text option may begin with a dash.

        An option must not be given twice, because the first one would be ignored.
        """
        argv = list(sys.argv[1:] if args is None else args)
        for i in range(len(argv) - 1, 0, -1):
            if argv[i - 1] in TEXT_OPTIONS and re.match("-[^-]", argv[i]):
                argv[i - 1:i + 1] = [f"{argv[i - 1]}={argv[i]}"]
        given = Counter(argument.partition("=")[0] for argument in argv)
        for action in self._actions:
            if sum(given[option] for option in action.option_strings) > 1:
                fix = " Write its values after one, separated by spaces." if action.nargs else ""
                self.error(f"{action.option_strings[-1]} must be given once.{fix}")
        return super().parse_args(argv, namespace)

    def error(self, message):
        """Print the message and exit with code 2."""
        if re.search("expected (one|at least one) argument", message):
            message += ". Write --option=VALUE if the value begins with a dash."
        self.exit(2, f"error: {message}\n")

    def check_out(self, out, *sources, option="--out"):
        """Exit with an error if `out` can't be created, or is inside a folder that is read."""
        for source in sources:
            if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
                self.error(f"{option} must be outside {source}, whose images are read, got {out}.")
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        if existing.is_file():
            self.error(f"{option} must be a folder, got {out}. {existing} is a file.")
        if not os.access(existing, os.W_OK):
            self.error(f"{option} must be writable, got {out}. {existing} is protected.")

    def add_device(self):
        """Add --device: by default NVIDIA's or Apple's GPU if available, else the CPU."""
        gpus = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        default = next((name for name, available in gpus.items() if available), "cpu")
        self.add_argument("--device", type=usable_device, default=default,
                          help="(default: %(default)s)")

    def add_base(self):
        """Add --base, and the options for what a single file doesn't contain."""
        add = self.add_argument
        add("--base", type=Path, default=BASE, help="Stable Diffusion 1.x or 2.x: a folder, or a "
            ".safetensors file (default: tiny/model)")
        add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt; required if "
            "--base is a single file")
        add("--vae", type=Path, help="folder or file of another autoencoder")
        add("--prediction-type", choices=diffusion.PREDICTION_TYPES, help="overrides "
            "--base's; v_prediction for SD 2.x at 768 px")


def add_port_options(parser):
    """Add the architecture of a BPS: --weights and --foot."""
    add = parser.add_argument
    add("--weights", type=port_weights, help=f"port weights: {' or '.join(PORT_WEIGHTS)}, or "
        "numbers joined by commas: one per level, the middle's, the expansive path's; 0 is no port "
        "(default: flat for layout, else head-heavy)")
    add("--foot", choices=FEET, default=FEET[0], help="light: an expansive path of narrow 1x1 "
        "layers, 1x1 ports and one middle block, a third of the parameters (default: %(default)s)")


def port_weights(text):
    """argparse type: a name in PORT_WEIGHTS, or a tuple of numbers."""
    if text in PORT_WEIGHTS:
        return text
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not any(numbers) or not all(0 <= number < 1e4 for number in numbers):
        raise argparse.ArgumentTypeError(f"must be {', '.join(PORT_WEIGHTS)} or numbers in "
                                         f"[0, 10000), not all 0, as in 16,8,4,16,1, got {text}")
    return numbers


def usable_device(name):
    """argparse type: the name of a device that works on this machine.

    Under torchrun, test the GPU of this process.
    """
    number = os.environ.get("LOCAL_RANK")
    device = f"cuda:{number}" if name == "cuda" and number else name
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{device} can't be used ({reason(error)}). cpu "
                                         f"always works.") from None
    return name


def is_embedded(base):
    """Whether a --base is the embedded one."""
    return Path(base).resolve() == BASE


def check_pixels(width, height):
    """Raise UserError if a picture would be too large for any of these models."""
    if width * height > MAX_PIXELS:
        raise UserError(f"--size must have at most {MAX_PIXELS:,} pixels, got {width}x{height}.")


def unicode_text(text):
    """argparse type: a text that was UTF-8 on the command line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be UTF-8, got {text!r}") from None
    return text


def unicode_path(text):
    """argparse type: a path that safetensors can open, which has to be UTF-8."""
    return Path(unicode_text(text))


def shell_command(argv):
    """Command line that a shell splits into argv."""
    return " ".join(map(quoted, argv))


def to_argv(options):
    """The arguments that give these options (a dict) on a command line."""
    argv = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        argv += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return argv                                         # with =, for a prompt may begin with -


def in_range(kind, low, high):
    """argparse type: an int or float (`kind`) from low to high."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        number = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {number} in [{low}, {high}], got {text}")
    return convert


positive = in_range(int, 1, MAX_COUNT)
seed_number = in_range(int, 0, MAX_SEEDS - 1)


def width_and_height(text):
    """argparse type: (width, height) of a text like 768x512 or 512."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT or one number, got {text}")
    return int(sides[0]), int(sides[-1])


def run_script(main, interrupted="interrupted"):
    """Run a script's main(); a user error ends it with one line on stderr and exit code 2.

    Characters that the console can't show are printed as escape sequences, and a stream that was
    closed swallows everything.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(getattr(sys, name), "reconfigure"):        # not in a notebook
            getattr(sys, name).reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                     # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
            message = ("out of memory. Reduce --size or --batch, or try --dtype fp16 or, with a "
                       "GPU, --device cpu.")
        elif peer_ended(error):
            message = "another process of this training has ended"
        else:
            raise
    else:
        return
    # one write, newline included, because torchrun's processes share the console
    print(f"error: {message}\n", end="", file=sys.stderr)
    sys.exit(2)
