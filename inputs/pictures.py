"""The options and fingerprints in a picture, from which sample.py can draw it again.

    fields = png_fields(args, job, seed, size, fingerprints(args, job.condition_args), base)
    write_new(image, Path("pictures/0000.png"), fields)
"""
import contextlib
import glob
import io
import itertools
import json
import sys

import torch
from PIL import PngImagePlugin

from inputs import checkpoints
from inputs.conditions import load_image
from inputs.files import fingerprint
from inputs.options import BASE, DEFAULT_BPS, DEFAULT_DRAWING, NONE, shell_command, to_argv
from weights import MALFORMED, UserError, as_user_error, reason

# Options that a picture stores. Where files are written is never among them.
STORED = ("prompt", "negative_prompt", "sampler", "steps", "guidance", "dtype", "denoise", "seed",
          "size", "base", "tokenizer", "vae", "prediction_type", "init", "bps", "cond", "strength",
          "window", "mask")


def stored_options(args, job, seed, size, base):
    """The options that draw a picture again; included files are left out, so they may move."""
    options = {name: getattr(args, name) for name in STORED[:7]}
    options |= dict(prompt=job.prompt, seed=seed, size=f"{size[0]}x{size[1]}", bps=["none"],
                    prediction_type=base.schedule.prediction_type)
    for name in ("base", "tokenizer", "vae", "init"):
        path = getattr(args, name)
        if path and path.resolve() != BASE:
            options[name] = str(path.resolve())
    if job.condition_args:
        columns = type(job.condition_args[0])(*map(list, zip(*job.condition_args)))
        options |= dict(strength=columns.strength, window=[*sum(columns.window, ())])
        for name, default in (("bps", DEFAULT_BPS), ("cond", DEFAULT_DRAWING), ("mask", None)):
            paths = [path and path.resolve() for path in getattr(columns, name)]
            options[name] = [str(path or NONE) for path in paths]
            if paths in ([default], [None] * len(paths)):
                del options[name]
    return options


def fingerprints(args, condition_args, hash_files=fingerprint):
    """{role: fingerprint} of the files that a picture depends on."""
    files = checkpoints.weights_files(args.base, args.vae) | dict(
        config=checkpoints.config_files(args.base, args.tokenizer, args.vae))
    if args.init:
        files["init"] = [args.init]
    for i, c in enumerate(condition_args, 1):
        files |= {f"{name} {i}": [getattr(c, name)] for name in ("bps", "cond", "mask")
                  if getattr(c, name)}
    return {role: hash_files(*paths) for role, paths in files.items()}


def png_fields(args, job, seed, size, files, base):
    """The text fields of a picture's PNG (a dict), among them the command that draws it again."""
    stored = stored_options(args, job, seed, size, base)
    command = shell_command(["python", "sample.py", *to_argv(stored), "--n=1"])
    return dict(prompt=job.prompt, seed=seed, device=args.device, torch=torch.__version__,
                files=json.dumps(files), options=json.dumps(stored), command=command)


def read_stored(picture):
    """(options, {role: fingerprint}) that a picture drawn by sample.py stores.

    Only STORED options: a picture from elsewhere must not decide where files are written.
    """
    text = load_image(picture).info
    with as_user_error(MALFORMED, f"--from {picture}: does not say how it was drawn",
                       "Use a PNG as sample.py wrote it; other programs drop its text."):
        options, files = json.loads(text["options"]), json.loads(text["files"])
        if not isinstance(files, dict):
            raise TypeError("its files are no JSON object")
        stored = {name: value for name, value in options.items() if name in STORED}
        for entry in itertools.chain(*(v for v in stored.values() if isinstance(v, list))):
            if isinstance(entry, str) and entry.startswith("-"):    # argparse's options do, too
                raise ValueError(f"{entry} is not a value")
        return stored, files


def note_changes(args, files, networks):
    """Print a note for each file that is not the one that a picture or a BPS was made with.

    args: sample.py's. files: fingerprints(..). networks: {BPS file: BPS}.
    """
    for role in args.stored_files.keys() & files.keys():
        if args.stored_files[role] != files[role]:
            print(f"note: {args.picture} was drawn with another {role} file", file=sys.stderr)
    for file, bps in networks.items():
        if files["base"] != bps.metadata.get("base"):
            print(f"note: {file} was trained on other weights than {args.base}; it fits, but may "
                  f"follow the condition less", file=sys.stderr)


def find_drawn(file, fields):
    """The existing picture FILE, FILE-2 .. that the same options drew from the same files."""
    for candidate in (file, *sorted(file.parent.glob(f"{glob.escape(file.stem)}-[0-9]*.png"))):
        with contextlib.suppress(UserError):            # another file, which is left alone
            text = load_image(candidate).info
            if all(text.get(key) == str(fields[key]) for key in ("options", "files")):
                return candidate
    return None


def without_drawn(pictures):
    """Those of the pictures {file: PNG fields} that have not been drawn yet."""
    missing = {}
    for file, fields in pictures.items():
        drawn = find_drawn(file, fields)
        if drawn:
            print(f"{drawn} (already drawn; another --seed draws others)")
        else:
            missing[file] = fields
    return missing


def write_new(image, file, fields=()):
    """Write an image as PNG under a name that no other file or program has: FILE, FILE-2 .."""
    info = PngImagePlugin.PngInfo()
    for key, value in dict(fields).items():
        # a file's name may not be valid Unicode, which a text field must be
        info.add_itxt(key, str(value).encode("utf-8", "backslashreplace").decode("utf-8"))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=info)
    for number in itertools.count(1):
        name = file if number == 1 else file.with_stem(f"{file.stem}-{number}")
        with contextlib.suppress(FileExistsError):
            picture = open(name, "xb")
            break
    try:
        with picture:                       # at once: a killed process leaves nothing half-written
            picture.write(content.getbuffer())
    except OSError as error:
        name.unlink()
        raise UserError(f"{name} can't be written ({reason(error)}).") from None
    print(name)
    return name
