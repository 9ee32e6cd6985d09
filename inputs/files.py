"""JSON, text and fingerprints of files. A file is written completely or not at all.

    write_json(dict(steps=100), "args.json")
    digest = fingerprint("bps.safetensors")
"""
import hashlib
import json
import os
from pathlib import Path

from tqdm import tqdm

from weights import UserError, replacing


def read_json(file):
    """The dict in a JSON file."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}).") from None
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
    size = sum(os.path.getsize(file) for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="fingerprint", delay=2,
              leave=False) as bar:
        for chunk in read_chunks(files):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()[:16]


def hash_module(module):
    """First 16 hex digits of the SHA-256 of a module's config and weights."""
    digest = hashlib.sha256(repr(module.config).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_chunks(files):
    """Yield the bytes of the files, 1 MiB at a time."""
    for file in files:
        with open(file, "rb") as f:
            yield from iter(lambda: f.read(1 << 20), b"")
