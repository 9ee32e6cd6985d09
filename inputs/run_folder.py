"""The folder of a training: which one it gets, and that no other training is in it.

    facts = run_facts(args, splits)
    out = choose_out(args.out, facts)
    with lock(out):
        ...
"""
import contextlib
import functools
import hashlib
import json
import os
import warnings

try:
    import fcntl
except ModuleNotFoundError:             # Windows
    fcntl = None

import weights
from inputs import checkpoints
from weights import UserError

CHECKPOINT = "checkpoint.safetensors"   # there as long as the training is unfinished
FILES = ("args.json", CHECKPOINT, "bps.safetensors", "log.jsonl", "curve.png", "samples.png",
         "condition.png")                       # what a training writes
CHANGEABLE = {"out", "cache", "accumulate", "checkpointing"}    # arguments it may go on with


def run_facts(args, splits):
    """Returns what makes a run this one: arguments, and what its base and its pairs consist of."""
    pairs = [(split, pair) for split, pairs in splits.items() for pair in pairs]
    names = [(split, pair.name, pair.prompts) for split, pair in pairs]
    arguments = vars(args) | dict(device=args.device.split(":")[0])
    fingerprint = functools.cache(weights.fingerprint)          # a single file is asked for thrice
    return {key: str(arguments[key]) for key in sorted(arguments.keys() - CHANGEABLE)} | dict(
        base_sha256=fingerprint(*checkpoints.find_unet(args.base)),
        vae_sha256=fingerprint(*checkpoints.read_vae(args.vae or args.base).files()),
        text_sha256=fingerprint(*checkpoints.read_text(args.base).files()),
        configs_sha256=fingerprint(*checkpoints.config_files(args.base, args.tokenizer, args.vae)),
        pairs_sha256=hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        pictures_sha256=fingerprint(*dict.fromkeys(file for _, pair in pairs
                                                   for file in pair.files)))


def choose_out(folder, facts):
    """Returns the run's folder: `folder` if new or an unfinished run of the same facts.

    Otherwise the first free one of folder-2, folder-3 ..: what is there is never overwritten.
    facts: what run_facts returns. Errors: UserError for a damaged args.json.
    """
    folder = folder if folder.name else folder.resolve()        # "." has no name to count up
    for number in range(1, 10_000):
        out = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        there = [name for name in FILES if (out / name).exists()]
        if not there:
            return out
        finished = "bps.safetensors" in there and CHECKPOINT not in there
        if "args.json" in there and not finished and weights.read_json(out / "args.json") == facts:
            return out
    raise UserError(f"{folder}: 10,000 runs beside it; give another --out")


@contextlib.contextmanager
def lock(folder):
    """Makes a folder and keeps other trainings out of it; there is no lock on Windows.

    Errors: UserError if another one is in it. The kernel lets go of the lock when a process dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains in it; wait for its end, or give "
                            f"another --out") from None
        except OSError as error:            # as some network file systems answer
            warnings.warn(f"{folder}: cannot be locked ({error.strerror}); start no second "
                          f"training in it")
        yield
    finally:
        os.close(file)
