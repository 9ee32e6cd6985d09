"""What the scripts share: how they read their command line and how they end."""
import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import torch

import diffusion
from inputs.processes import ended_elsewhere
from weights import UserError, first_line

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
MOST_PIXELS = 4096**2
MOST_SEEDS = 2**31
HERE = Path(__file__).parent.parent
BASE = HERE / "tiny" / "model"
DEFAULT_BPS = HERE / "tiny" / "bps_sketch.safetensors"      # for the embedded base
DEFAULT_DRAWING = HERE / "tiny" / "drawing.png"
NONE = Path("none")             # for --bps and --mask
TEXT_OPTIONS = ("--prompt", "--negative-prompt", "--default-prompt")
PORT_WEIGHTS = ("head-heavy", "flat")
FEET = ("faithful", "light")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")     # GPU, CPU


class Parser(argparse.ArgumentParser):
    """A parser that prints the script's docstring as help, and a mistake as one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):
        """Reads the command line, in which the value of a text option may begin with a dash."""
        words = list(sys.argv[1:] if args is None else args)
        for i in range(len(words) - 1, 0, -1):
            if words[i - 1] in TEXT_OPTIONS and re.match("-[^-]", words[i]):
                words[i - 1:i + 1] = [f"{words[i - 1]}={words[i]}"]
        return super().parse_args(words, namespace)

    def error(self, message):
        """Ends the script with exit code 2."""
        if re.search("expected (one|at least one) argument", message):
            message += "; write --option=VALUE if the value begins with a dash"
        self.exit(2, f"error: {message}\n")

    def check_out(self, out, *sources, option="--out"):
        """Ends the script if a folder to write to, or one it would lie in, is a file or protected.

        Nor may it lie in a source, a folder whose pictures are read: its own would be among them.
        """
        for source in sources:
            if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
                self.error(f"{option} {out}: lies in {source}, whose pictures are read; give "
                           f"another")
        for folder in (out, *out.absolute().parents):
            if folder.is_file():
                self.error(f"{option} {out}: {folder} is a file; a folder is wanted")
            if folder.exists():
                if not os.access(folder, os.W_OK):
                    self.error(f"{option} {out}: {folder} cannot be written to")
                return

    def add_device(self):
        """Adds --device: the GPU if there is one, NVIDIA's or Apple's, else the CPU."""
        gpus = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        default = next((name for name, is_there in gpus.items() if is_there), "cpu")
        self.add_argument("--device", type=usable_device, default=default,
                          help="(default: %(default)s)")

    def add_base(self):
        """Adds --base, and the options that supply what a single file lacks."""
        add = self.add_argument
        add("--base", type=Path, default=BASE, help="Stable Diffusion 1.x or 2.x: a folder, or a "
            ".safetensors file (default: tiny/model)")
        add("--tokenizer", type=Path, help="folder with vocab.json and merges.txt, if --base is "
            "a single file")
        add("--vae", type=Path, help="folder or file of another autoencoder than the base's own")
        add("--prediction-type", choices=diffusion.PREDICTION_TYPES, help="if --base does not say "
            "it: v_prediction for SD 2.x at 768 px")

    def add_draws(self):
        """Adds --count and --seed of the pictures that a measurement draws."""
        self.add_argument("--count", type=positive, help="pictures of each row (default: "
                          "all test pairs)")
        self.add_argument("--seed", type=seed_number, default=0, help="the seed of the first "
                          "picture (default: %(default)s)")


def add_port_options(parser):
    """Adds what a BPS consists of: --weights and --foot."""
    add = parser.add_argument
    add("--weights", type=port_weights, help=f"port weights: {' or '.join(PORT_WEIGHTS)}, or "
        "numbers joined by commas: one per level, the middle's, the expansive path's; 0 is no port "
        "(default: head-heavy, for layout flat)")
    add("--foot", choices=FEET, default=FEET[0], help="light: an expansive path of narrow 1x1 "
        "layers, 1x1 ports and one middle block, a third of the parameters (default: %(default)s)")


def port_weights(text):
    """Returns a name in PORT_WEIGHTS, or the numbers (a tuple) in a text.

    Errors: ArgumentTypeError.
    """
    if text in PORT_WEIGHTS:
        return text
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not any(numbers) or not all(0 <= number < 1e4 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: allowed are {', '.join(PORT_WEIGHTS)}, or "
                                         f"numbers from 0 to 10,000, not all 0, as in 16,8,4,16,1")
    return numbers


def usable_device(name):
    """Returns the name of a device that this machine has. Errors: ArgumentTypeError.

    Of several processes that torchrun starts, each asks for a GPU of its own.
    """
    number = os.environ.get("LOCAL_RANK")
    device = f"cuda:{number}" if name == "cuda" and number else name
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{device} cannot be used ({first_line(error)}); cpu "
                                         f"always can") from None
    return name


def check_pixels(width, height):
    """Raises UserError if a picture would be too large for any of these models."""
    if width * height > MOST_PIXELS:
        raise UserError(f"--size {width}x{height}: at most {MOST_PIXELS:,} pixels")


def unicode_text(text):
    """Returns the text of an argument. Errors: ArgumentTypeError if it was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: not UTF-8") from None
    return text


def unicode_path(text):
    """Returns the path of an argument, whose name safetensors has to take. Errors: as unicode_text.
    """
    return Path(unicode_text(text))


def shell_command(words):
    """Returns a command line that a shell splits into these words.

    Words are in double quotes, as cmd.exe knows no others. A word into which a POSIX shell would
    then read something is quoted for that shell alone, and a comment in the command says so.
    """
    command, note = [], []
    for word in map(str, words):
        quoted = shlex.quote(word)
        if os.name == "nt":
            escaped = word.replace('"', '\\"')
            quoted = f'"{escaped}"' if re.search(r"[^\w\\:./=+-]", word) or not word else word
        elif re.search(r'["$`!%\\\n]', word):
            note = ["# quoted for a POSIX shell"]
        elif quoted != word:
            quoted = f'"{word}"'
        command.append(quoted)
    return " ".join(command + note)


def to_argv(options):
    """The command line's words that give these options (a dict)."""
    argv = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        argv += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return argv                                         # with =, for a prompt may begin with -


def in_range(kind, low, high):
    """An argparse type: an int or float (`kind`) from low to high."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be in [{low}, {high}], got {text}")
    return convert


def seed_number(text):
    """Returns the integer that a seed's text means. Errors: ArgumentTypeError."""
    if not text.isdecimal() or int(text) >= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text}: allowed are 0 to {MOST_SEEDS - 1}")
    return int(text)


def positive(text):
    """Returns the integer that a text means, 1 or more. Errors: ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return int(text)


def run(main, interrupted="interrupted"):
    """Runs a script's main(): a user's mistake ends in one line on stderr and exit code 2.

    What the console cannot show is printed as an escape sequence.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
        print(end="", flush=True)               # not sys.stdout, which is None if it was closed
    except BrokenPipeError:                     # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            print("error: out of memory; a smaller --size or --batch, --dtype fp16 or, on a GPU, "
                  "--device cpu needs less", file=sys.stderr)
        elif ended_elsewhere(error):
            print("error: another process of this training has ended", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
