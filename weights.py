"""Strict reading and writing of weights: .safetensors files only, never a pickle.

The header of a file holds names and shapes, which decide whether the file fits a module. Then each
tensor is mapped from the file into the module, one at a time. inputs/checkpoints.py knows the names
in Stable Diffusion's files. Nothing is downloaded.

    checkpoint = checkpoints.read_unet("tiny/model")    # config and header, no tensor yet
    unet = checkpoint.build(UNet, UNetConfig)
"""
import contextlib
import glob
import json
import os
import re
import secrets
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
CONVERTED_AT_A_TIME = 16        # tensors converted before their file is reopened
MAX_SIZE = 1 << 20              # more channels or tokens than any model has
MAX_NAMES = 8                   # tensor names in an error message
NUM_LAST = 64                   # numbers at the end of a file that are not all zero
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")        # types of weights
# errors while reading names, numbers or shapes that make no sense
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, and the fix."""


def reason(error):
    """Why something failed, in one line; PyTorch appends more."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message.partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def as_user_error(errors, problem, fix=""):
    """Turn these errors, a type or a tuple, into a UserError: the problem, the reason, the fix."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{problem} ({reason(error)}). {fix}".rstrip()) from None


def quoted(argument):
    """A path or value as one word of a command line, for cmd.exe or a POSIX shell."""
    if os.name != "nt":
        return shlex.quote(str(argument))
    escaped = str(argument).replace('"', '\\"')
    return escaped if re.fullmatch(r"[\w\\:./=+-]+", escaped) else f'"{escaped}"'


class Stored(NamedTuple):
    """A tensor in a .safetensors file, not yet read."""
    file: Path
    name: str
    shape: tuple
    dtype: str                              # one of FLOATS, or a type that no weights have
    rows: slice | None = None               # which rows of the tensor; None for all


class Checkpoint(NamedTuple):
    """One network in files: U-Net, autoencoder, text encoder or BPS."""
    config: dict                            # keyword arguments of the config dataclass
    state: dict                             # {name in the file: Stored}
    key_map: Callable[[str], str]           # state_dict key of our module -> name in the file
    file: Path

    def files(self):
        """All files that hold its tensors, sorted."""
        return sorted({stored.file for stored in self.state.values()})

    def build(self, Module, Config, dtype=torch.float32, device="cpu", may_end_in_zeros=False):
        """Module(Config(**config)) with the checkpoint's tensors, frozen; see load_strict.

        The module is created on the meta device, where initial weights need neither memory nor
        time. Layers still do, so a config must not name more layers than the file has tensors.
        may_end_in_zeros: accept a file whose last weights are zeros, as a BPS's untrained ports
        are; in other files they mean a truncated download.
        """
        check_types(self.config, {field.name: field.default for field in fields(Config)}, self.file)
        part = Config.__name__.removesuffix("Config")
        with as_user_error(MALFORMED, f"{self.file}: no {part} has these sizes"):
            config = Config(**self.config)
            layers = (config.layers if hasattr(config, "layers") else
                      len(config.channels) * config.blocks_per_level)
            if layers > len(self.state):
                raise ValueError(f"{layers} layers in {len(self.state)} tensors")
            with torch.device("meta"):
                module = Module(config)
        module = load_strict(module, self, dtype, device)
        if not may_end_in_zeros:
            check_ends(self.state)
        return module


def check_types(values, examples, file):
    """Raise UserError if a value from JSON does not match its example; values, examples: dicts.

    A value must have its example's type, entry by entry; numbers must be in range (see kind_of).
    """
    for key, example in examples.items():
        value, (kind, matches) = values.get(key, example), kind_of(example)
        if value != example and not matches(value):
            raise UserError(f"{file}: {key} must be {kind}, got {value!r}. Get another copy of the "
                            f"file.")


def kind_of(example):
    """(words, test) of the values that match an example; None is an absent whole number."""
    if isinstance(example, tuple):
        kind, matches = kind_of(example[0])
        return (f"a list, each entry {kind}",
                lambda value: isinstance(value, tuple) and all(map(matches, value)))
    if isinstance(example, bool):
        return "true or false", lambda value: type(value) is bool
    if isinstance(example, str):
        return "text", lambda value: type(value) is str
    if isinstance(example, float):
        return (f"a number in [0, {MAX_SIZE}]",
                lambda value: type(value) in (int, float) and 0 <= value <= MAX_SIZE)
    return (f"a whole number in [1, {MAX_SIZE}]",
            lambda value: type(value) is int and 0 < value <= MAX_SIZE)


# ---- reading -------------------------------------------------------------------------------

def read_header(file):
    """The tensors of a .safetensors file in their order, {name: Stored}; none is read yet."""
    file = Path(file)
    if file.suffix.lower() in PICKLES:
        raise UserError(
            f"{file} is a pickle, which can run code. Convert a file that you trust: "
            f"python -c \"import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], "
            f"weights_only=True); s.save_file(d.get('state_dict', d), 'model.safetensors')\" "
            f"{quoted(file)}")
    if not file.is_file():
        problem = ("a folder" if file.is_dir() else "not a regular file" if file.exists() else
                   "missing")
        raise UserError(f"{file} is {problem}. Give a "
                        f".safetensors file or an SD folder; nothing is downloaded.")
    with as_user_error(SafetensorError, f"{file} is not a complete safetensors file",
                       "Copy or download it again; for a Git-LFS pointer run `git lfs pull`."), \
            safe_open(file, "pt") as f:
        slices = {name: f.get_slice(name) for name in f.offset_keys()}
        return {name: Stored(file, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()}


def read_tensors(entries, dtype, device):
    """Yield the tensors of a list of Stored, mapped from their files or converted.

    An open safetensors file keeps the pages in memory that were read, so it is reopened after every
    CONVERTED_AT_A_TIME conversions. Convolutions have a mapping of their own: converting them to
    channels_last later releases all of it.
    """
    files, converted = {}, 0
    for entry in entries:
        mapping = (entry.file, len(entry.shape) == 4)
        if mapping not in files:
            files[mapping] = safe_open(entry.file, "pt")
        stored = files[mapping].get_tensor(entry.name)
        tensor = (stored if entry.rows is None else stored[entry.rows]).to(device, dtype)
        converted += tensor.data_ptr() != stored.data_ptr()
        if converted == CONVERTED_AT_A_TIME:
            files, converted = {}, 0
        yield tensor


def load_strict(module, checkpoint, dtype=torch.float32, device="cpu"):
    """The module with the checkpoint's tensors, frozen; every key and shape has to match.

    The module may be on the meta device. A tensor that has the dtype already stays mapped from its
    file, without a copy. A linear layer may be stored as a 1x1 convolution and vice versa.
    """
    expected = {checkpoint.key_map(key): (key, tensor.shape)
                for key, tensor in module.state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in checkpoint.state]
    problems += [f"unexpected {name}" for name in checkpoint.state if name not in expected]
    problems += [f"{name} is {checkpoint.state[name].shape}, not {tuple(shape)}"
                 for name, (_, shape) in expected.items() if name in checkpoint.state
                 and _squeezed(checkpoint.state[name].shape) != _squeezed(shape)]
    problems += [f"{name} has type {stored.dtype}, not {FLOATS[1]}"
                 for name, stored in checkpoint.state.items() if stored.dtype not in FLOATS]
    if problems:
        raise UserError(f"{checkpoint.file}: {len(problems)} tensors do not fit a "
                        f"{type(module).__name__} of this size: {shortened(problems)}")
    tensors = read_tensors([checkpoint.state[name] for name in expected], dtype, device)
    module.load_state_dict({key: tensor.reshape(shape) for (key, shape), tensor
                            in zip(expected.values(), tensors)}, assign=True)
    return module.eval().requires_grad_(False)


def check_ends(state):
    """Raise UserError if the last weights of a file are zeros, as if a download had broken off."""
    last = {stored.file: stored.name for name, stored in state.items() if name.endswith("weight")}
    for file, name in last.items():
        with safe_open(file, "pt") as f:
            if not f.get_tensor(name).flatten()[-NUM_LAST:].float().any():
                raise UserError(f"{file} ends in zeros ({name}), as if its download broke off. "
                                f"Copy or download it again.")


def shortened(names):
    """The first names as one string, and how many more there are."""
    omitted = len(names) - MAX_NAMES
    return "; ".join(names[:MAX_NAMES]) + (f" and {omitted} more" if omitted > 0 else "")


def _squeezed(shape):
    """Shape without the trailing ones of a 1x1 convolution."""
    return tuple(shape[:2]) if set(shape[2:]) == {1} else tuple(shape)


def is_finite(module):
    """Whether a module's weights are free of NaN and infinity."""
    return all(parameter.isfinite().all() for parameter in module.parameters())


# ---- writing -------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(file):
    """Yield a temporary path with the same name, and move it to `file` at the end.

    After an error or an interruption the old `file` is intact and the temporary one is deleted. Its
    folder is its own, because safetensors writes to random names next to it first, and because
    another process may write the same file: the first one that is done deletes the folders of all,
    also those that killed processes left, and the others have nothing more to do.
    """
    file = Path(file)
    folder = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    temporary = folder / file.name
    folder.mkdir()
    try:
        yield temporary
        temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors' files are private to the user
        os.replace(temporary, file)
        for other in file.parent.glob(f".{glob.escape(file.name)}.{'[0-9a-f]' * 8}"):
            shutil.rmtree(other, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if folder.exists():                     # else another process has just written the file
            raise UserError(f"{file} can't be written ({reason(error)}).") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(tensors, file, metadata):
    """Write tensors and metadata, {str: str}, as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata)


def save_training(file, modules, trained, optimizer, progress):
    """Write what a resumed run needs: parameters, AdamW's moments m and v, progress (a dict).

    modules: {name: module}. trained: the name of the module that the optimizer trains.
    """
    tensors = {f"{name}.{key}": parameter for name, module in modules.items()
               for key, parameter in module.named_parameters()}
    updates = 0                                         # fewer than steps if fp16 overflowed
    for key, parameter in modules[trained].named_parameters():
        if state := optimizer.state.get(parameter):     # none before the first step
            tensors |= {f"m.{key}": state["exp_avg"], f"v.{key}": state["exp_avg_sq"]}
            updates = int(state["step"])
    save(tensors, file, dict(progress=json.dumps(progress | dict(updates=updates))))


@torch.no_grad()
def load_training(file, modules, trained, optimizer):
    """Restore in place what save_training wrote of the same modules; return the progress."""
    with as_user_error((SafetensorError, *MALFORMED), f"{file}: checkpoint is corrupt",
                       "Delete the run folder to start over."):
        with safe_open(file, "pt") as f:
            progress = json.loads(f.metadata()["progress"])
            stored = {name: f.get_tensor(name) for name in f.keys()}
        updates = float(progress.pop("updates"))
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                parameter.copy_(stored[f"{name}.{key}"])
        moments = {i: dict(step=torch.tensor(updates),
                           exp_avg=torch.empty_like(parameter).copy_(stored[f"m.{key}"]),
                           exp_avg_sq=torch.empty_like(parameter).copy_(stored[f"v.{key}"]))
                   for i, (key, parameter) in enumerate(modules[trained].named_parameters())
                   if f"m.{key}" in stored}
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=moments))
        return progress
