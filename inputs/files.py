"""JSON, text and fingerprints of files. A file is written completely or not at all.

Only regular files are read: a device or a pipe, which a link may lead to, may never end.

    write_json(dict(steps=100), "args.json")
    digest = fingerprint("bps.safetensors")
"""
import hashlib
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

from weights import UserError, as_user_error, replacing

MAX_TEXT = 1 << 26              # characters in a text file: captions of half a million pictures
LFS_POINTER = b"version https://git-lfs"


def check_file(file):
    """Raise UserError unless this is a regular file with content of its own."""
    path = Path(file)
    if not path.is_file():
        kind = ("a folder" if path.is_dir() else
                "a device or a pipe" if path.exists() else "missing")
        raise UserError(f"{file} is {kind}. Give a regular file.")
    with open(file, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{file} is a Git LFS pointer, not the file itself. Run `git lfs "
                            f"pull`.")


def read_utf8(file):
    """Content of a UTF-8 text file, with or without a byte order mark."""
    check_file(file)
    with as_user_error(UnicodeDecodeError, f"{file} must be UTF-8", "Save it as UTF-8."), \
            open(file, encoding="utf-8-sig") as f:
        text = f.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise UserError(f"{file} must have at most {MAX_TEXT:,} characters. Split it.")
    return text


def read_json(file):
    """The dict in a JSON file."""
    with as_user_error((ValueError, RecursionError), f"{file} is not JSON"):
        content = json.loads(read_utf8(file))
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object.")
    return content


def write_text(text, file):
    """Write text as UTF-8."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content, file):
    """Write a dict or list as indented JSON."""
    write_text(json.dumps(content, indent=1) + "\n", file)


def write_lines(rows, file):
    """Write each dict as one line of JSON."""
    write_text("".join(json.dumps(row) + "\n" for row in rows), file)


def fingerprint(*files):
    """First 16 hex digits of the SHA-256 of the files' concatenated bytes."""
    digest = hashlib.sha256()
    for file in files:
        check_file(file)
    megabytes = sum(os.path.getsize(file) for file in files) >> 20
    for chunk in tqdm(read_chunks(files), desc="fingerprint", total=megabytes, unit="MB", delay=2,
                      leave=False):
        digest.update(chunk)
    return digest.hexdigest()[:16]


def hash_module(module):
    """First 16 hex digits of the SHA-256 of a module's config and weights."""
    digest = hashlib.sha256(repr(module.config).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())    # NumPy has no bf16
    return digest.hexdigest()[:16]


def read_chunks(files):
    """Yield the bytes of the files, 1 MiB at a time."""
    for file in files:
        with open(file, "rb") as f:
            yield from iter(lambda: f.read(1 << 20), b"")
