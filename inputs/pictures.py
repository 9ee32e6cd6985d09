"""Pictures that are drawn, as PNG files which say how: sample.py draws them again with --from.

    texts = [describe(args, job, seed, size, files, base) for seed in seeds]
    write_pictures("", pictures, seeds, texts, conditions, Path("pictures"))
"""
import json

import torch
from PIL import PngImagePlugin

from inputs.conditions import load_image, to_image
from inputs.sample_options import command_line, picture_options
from weights import UserError, replacing


def unused(files):
    """Returns the paths if none is there yet, else all of them with -2, -3 .. after the name."""
    number, free = 1, files
    while any(file.exists() for file in free):
        number += 1
        free = [file.with_stem(f"{file.stem}-{number}") for file in files]
    return free


def is_drawn(file, text):
    """Returns whether a file, or one of its names with -2, -3 .., was drawn by a text's options."""
    number, candidate = 1, file
    while candidate.exists():
        try:
            record = getattr(load_image(candidate), "text", {})
        except UserError:               # some other file, which is not overwritten
            record = {}
        if all(record.get(key) == str(text[key]) for key in ("options", "files")):
            return True
        number += 1
        candidate = file.with_stem(f"{file.stem}-{number}")
    return False


def write_pictures(name, pictures, seeds, texts, conditions, out):
    """Writes NAME SEED.png for each of pictures x (3, H, W), with its text fields.

    conditions: images of them as the network sees them, written beside. Nothing is overwritten.
    """
    numbers = [""] if len(conditions) == 1 else range(1, len(conditions) + 1)
    files = unused([*(out / f"{name}condition{number}.png" for number in numbers),
                    *(out / f"{name}{seed:04d}.png" for seed in seeds)])
    for image, file in zip(conditions, files):
        with replacing(file) as temporary:
            image.save(temporary)
    for x, text, file in zip(pictures, texts, files[len(conditions):]):
        write_picture(x, text, file)
    for file in files[:len(conditions)]:
        print(file, "(the condition as the network sees it)")
    for file in files[len(conditions):]:
        print(file)


def write_picture(x, text, file):
    """Writes a picture x (3, H, W) as PNG with its text fields (a dict)."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        # a file's name may not be valid Unicode, which a text field must be
        info.add_itxt(key, str(value).encode("utf-8", "backslashreplace").decode("utf-8"))
    with replacing(file) as temporary:
        to_image(x).save(temporary, pnginfo=info)


def describe(args, job, seed, size, files, base):
    """Returns the text fields of a picture, among them the options that draw it once more."""
    options = picture_options(args, job, seed, size, base.schedule.prediction_type)
    facts = {name: options[name] for name in
             ("prompt", "negative_prompt", "seed", "size", "sampler", "steps", "guidance",
              "clip_skip", "dtype", "prediction_type")}
    return facts | dict(device=args.device, torch=torch.__version__, files=json.dumps(files),
                        options=json.dumps(options), command=command_line(options))
