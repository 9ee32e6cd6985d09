"""Strict reading and writing of weights: .safetensors files only, never a pickle.

The header of a file holds names and shapes, which decide whether the file fits a module. Then each
tensor is mapped from the file into the module, one at a time. inputs/checkpoints.py knows the names
in Stable Diffusion's files. Nothing is downloaded.

    checkpoint = checkpoints.read_unet("tiny/model")    # config and header, no tensor yet
    unet = checkpoint.build(UNet, UNetConfig)
"""
import contextlib
import json
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
CONVERTED_AT_A_TIME = 16        # tensors converted before their file is reopened
MAX_HEADER = 100_000_000        # bytes; the limit of the format
MAX_SIZE = 1 << 20              # more channels, layers or tokens than any model has
MAX_NAMES = 8                   # tensor names in an error message
# errors while reading names, numbers or shapes that make no sense
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, and the fix."""


def first_line(error):
    """Message of an error without the lines that PyTorch appends."""
    return str(error).partition("\n")[0]


class Stored(NamedTuple):
    """A tensor in a .safetensors file, not yet read."""
    file: Path
    name: str
    shape: tuple
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

    def build(self, Module, Config, dtype=torch.float32, device="cpu"):
        """Module(Config(**config)) with the checkpoint's tensors, frozen; see load_strict.

        The module is created on the meta device, so its initial weights need neither memory nor
        time.
        """
        check_sizes(self.config, self.file)
        try:
            with torch.device("meta"):
                module = Module(Config(**self.config))
        except MALFORMED as error:
            part = Config.__name__.removesuffix("Config")
            raise UserError(f"{self.file}: no {part} has these sizes "
                            f"({first_line(error)}).") from error
        return load_strict(module, self, dtype, device)


def check_sizes(config, file):
    """Raise UserError if a whole number in a config (a dict) is out of range for any module."""
    for key, value in config.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(type(number) is int and not 0 < number <= MAX_SIZE for number in numbers):
            raise UserError(f"{file}: {key} must be in 1..{MAX_SIZE}, got {value}.")


# ---- reading -------------------------------------------------------------------------------

def read_header(file):
    """Names and shapes of a .safetensors file, {name: Stored}; no tensor is read."""
    file = Path(file)
    if file.suffix.lower() in PICKLES:
        raise UserError(
            f"{file} is a pickle, which can run code. Convert a file that you trust: "
            f"python -c \"import torch, safetensors.torch as s; d = torch.load('{file}', "
            f"weights_only=True); s.save_file(d.get('state_dict', d), 'model.safetensors')\"")
    if not file.is_file():
        raise UserError(f"{file} is {'a folder' if file.is_dir() else 'missing'}. Give a "
                        f".safetensors file; nothing is downloaded.")
    try:
        with safe_open(file, "pt") as f:
            return {name: Stored(file, name, tuple(f.get_slice(name).get_shape()))
                    for name in f.keys()}
    except SafetensorError as error:
        raise UserError(f"{file} {_fault(file, error)}") from None


def _fault(file, error):
    """The end of a sentence on why safetensors rejected the file; most files are truncated."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        start = f.read(8)
        header_end = 8 + int.from_bytes(start, "little")
        header = f.read(min(header_end, MAX_HEADER))
    if start == b"version ":
        return "is a Git-LFS pointer, not the weights. Run `git lfs pull`."
    ends = re.findall(rb'"data_offsets": *\[ *\d+ *, *(\d{1,18}) *\]', header)
    expected = header_end + max(map(int, ends), default=0)
    if header.startswith(b"{") and size < expected:
        return (f"is truncated: it has {size} bytes, its header promises {expected} or more. Copy "
                f"or download it again.")
    return f"can't be read as a safetensors file ({error})."


def read_tensors(entries, dtype, device):
    """Yield the tensors of a list of Stored, mapped from their files or converted.

    An open safetensors file keeps the pages in memory that were read. Reopen it after 16
    conversions to release them. Convolutions have a mapping of their own: converting them to
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
    if problems:
        raise UserError(f"{checkpoint.file}: {len(problems)} tensors do not fit a "
                        f"{type(module).__name__} of this size: {shortened(problems)}")
    tensors = read_tensors([checkpoint.state[name] for name in expected], dtype, device)
    module.load_state_dict({key: tensor.reshape(shape) for (key, shape), tensor
                            in zip(expected.values(), tensors)}, assign=True)
    return module.eval().requires_grad_(False)


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
    """Yield a temporary path with the same suffix, and rename it to `file` at the end.

    After an error or an interruption the old `file` is intact and the temporary one is deleted.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)           # safetensors makes its files private to this user
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{file} can't be written ({reason}).") from None
    finally:
        temporary.unlink(missing_ok=True)


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
    save(tensors, file, dict(facts=json.dumps(progress | dict(updates=updates))))


@torch.no_grad()
def load_training(file, modules, trained, optimizer):
    """Restore in place what save_training wrote of the same modules; return the progress."""
    try:
        with safe_open(file, "pt") as f:
            progress = json.loads(f.metadata()["facts"])
            stored = {name: f.get_tensor(name) for name in f.keys()}
        updates = float(progress.pop("updates"))
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                parameter.copy_(stored[f"{name}.{key}"])
        for key, parameter in modules[trained].named_parameters():
            if f"m.{key}" in stored:
                # AdamW keeps its step count on the CPU, unless it is fused
                device = parameter.device if optimizer.defaults.get("fused") else "cpu"
                optimizer.state[parameter] = dict(
                    step=torch.tensor(updates, device=device),
                    exp_avg=torch.empty_like(parameter).copy_(stored[f"m.{key}"]),
                    exp_avg_sq=torch.empty_like(parameter).copy_(stored[f"v.{key}"]))
    except (SafetensorError, *MALFORMED) as error:
        raise UserError(f"{file}: checkpoint is corrupt ({first_line(error)}). Delete the run "
                        f"folder to start over.") from None
    return progress
