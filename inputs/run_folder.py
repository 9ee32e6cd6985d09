"""Output folder of a run: naming and locking.

    record = run_record(args, splits)
    out = choose_out(args.out, record)
    with lock(out):
        ...
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import warnings

try:
    import fcntl
except ModuleNotFoundError:             # Windows
    fcntl = None

from bps import load_bps
from inputs import checkpoints, files
from weights import UserError, reason

CHECKPOINT = "checkpoint.safetensors"   # written first, and deleted when the training is finished
FILES = ("args.json", CHECKPOINT, "bps.safetensors", "log.jsonl", "curve.png", "samples.png",
         "condition.png")                       # what a training writes
CHANGEABLE = {"out", "cache", "accumulate", "checkpointing"}    # may differ when a run resumes


def run_record(args, splits):
    """What identifies a run: its arguments, and fingerprints of its base and its pairs."""
    pairs = [(split, pair) for split, pairs in splits.items() for pair in pairs]
    names = [(split, pair.name, pair.prompts) for split, pair in pairs]
    arguments = vars(args) | dict(device=args.device.split(":")[0])
    read = checkpoints.weights_files(args.base, args.vae) | dict(
        configs=checkpoints.config_files(args.base, args.tokenizer, args.vae),
        pictures=dict.fromkeys(file for _, pair in pairs for file in pair.files))
    fingerprint = functools.cache(files.fingerprint)    # a single file holds all three networks
    return {key: str(arguments[key]) for key in sorted(arguments.keys() - CHANGEABLE)} \
        | {f"{part}_sha256": fingerprint(*paths) for part, paths in read.items()} \
        | dict(pairs_sha256=hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16])


def choose_out(folder, record):
    """`folder` if it is new or holds an unfinished run with this record, else folder-2, -3 ..

    Nothing is overwritten.
    """
    # "." and ".." are no names to append to
    folder = folder.resolve() if folder.name in ("", "..") else folder
    for number in itertools.count(1):
        out = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        existing = [name for name in FILES if (out / name).exists()]
        if not existing:
            return out
        unfinished = CHECKPOINT in existing or existing == ["args.json"]
        if unfinished and (out / "args.json").exists() \
                and files.read_json(out / "args.json") == record:
            return out


def check_best(out, best):
    """Raise UserError if the best weights so far are lost, which the end of a run needs.

    best: {step: .., loss: ..} of the best weights.
    """
    file = out / "bps.safetensors"
    try:
        if load_bps(file).metadata.get("best") != best:
            raise UserError(f"{file} is not of step {best['step']} of this run.")
    except UserError as error:
        raise UserError(f"{error} The run's best weights were in it: put it back, or delete {out} "
                        f"to start over.") from None


@contextlib.contextmanager
def lock(folder):
    """Create a folder and lock it against other trainings; Windows has no lock.

    The kernel releases the lock when the process ends.
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
            raise UserError(f"{folder} is in use by another training. Wait until it ends, or give "
                            f"another --out.") from None
        except OSError as error:            # some network file systems
            warnings.warn(f"{folder} can't be locked ({reason(error)}). Don't start a second "
                          f"training in it.")
        yield
    finally:
        os.close(file)
