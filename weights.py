"""Reads and writes weights: .safetensors files, strictly, a tensor at a time, never a pickle.

Only headers are read at first: names and shapes decide whether a file fits, and then each tensor
is mapped from the file into its module. inputs/checkpoints.py knows what the names are. Nothing is
fetched from a network.

    checkpoint = checkpoints.read_unet("tiny/model")    # config and tensors
    unet = checkpoint.build(UNet, UNetConfig)
"""
import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
CONVERTED_AT_A_TIME = 16        # tensors, before their file is opened anew
LARGEST_HEADER = 100_000_000    # bytes; the format's own limit
LARGEST_SIZE = 1 << 20          # more channels, layers or words than any model has
NAMES_SHOWN = 8                 # names of tensors that do not fit
# what reading a file's numbers or names raises if they make no sense
SENSELESS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what and how."""


def first_line(error):
    """Returns what an error says, without the lines that PyTorch adds."""
    return str(error).partition("\n")[0]


class Stored(NamedTuple):
    """A tensor in a .safetensors file, not yet read."""
    file: Path
    name: str
    shape: tuple
    rows: slice | None = None               # the part of the first dimension that is meant


class Checkpoint(NamedTuple):
    """One part of a checkpoint: U-Net, autoencoder or text encoder; or a BPS."""
    config: dict                            # keyword arguments of the part's config dataclass
    state: dict                             # Stored tensors by name
    spelling: Callable[[str], str]          # a module's key -> its name in `state`
    file: Path

    def files(self):
        """Returns the files that hold its tensors, sorted."""
        return sorted({stored.file for stored in self.state.values()})

    def build(self, Module, Config, dtype=torch.float32, device="cpu"):
        """Returns Module(Config(**config)) with the checkpoint's tensors, as load_strict does.

        The module is made without memory, which its tensors then bring. Errors: UserError where
        the sizes do not go together or a tensor does not fit.
        """
        check_sizes(self.config, self.file)
        try:
            with torch.device("meta"):
                module = Module(Config(**self.config))
        except SENSELESS as error:
            part = Config.__name__.removesuffix("Config")
            raise UserError(f"{self.file}: no {part} has its sizes "
                            f"({first_line(error)})") from error
        return load_strict(module, self, dtype, device)


def check_sizes(config, file):
    """Raises UserError if a whole number in a config (a dict) is no size that a module can have."""
    for key, value in config.items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and not 0 < number <= LARGEST_SIZE:
                raise UserError(f"{file}: {key} = {value}; allowed are sizes of 1 to "
                                f"{LARGEST_SIZE}")


# ---- files ---------------------------------------------------------------------------------

def read_header(file):
    """Returns {name: Stored} of a .safetensors file; no tensor is read.

    Errors: UserError for pickles, Git-LFS pointers, truncated files and anything else.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(f"{file}: a folder; a .safetensors file is wanted here")
    if file.suffix.lower() in PICKLES:
        raise UserError(
            f"{file}: a {file.suffix} file is a pickle and can run code; convert one that you "
            f"trust: python -c \"import torch, safetensors.torch as s; d = torch.load('{file}', "
            f"weights_only=True); s.save_file(d.get('state_dict', d), 'model.safetensors')\"")
    if not file.is_file():
        raise UserError(f"{file}: no such file; nothing is downloaded")
    with open(file, "rb") as f:
        if f.read(8) == b"version ":
            raise UserError(f"{file}: a Git-LFS pointer, not the weights; run `git lfs pull`")
    try:
        with safe_open(file, "pt") as f:
            return {name: Stored(file, name, tuple(f.get_slice(name).get_shape()))
                    for name in f.keys()}
    except SafetensorError as error:
        raise UserError(f"{file}: {_why_unreadable(file, error)}") from None


def _why_unreadable(file, error):
    """Returns what is wrong with a file that safetensors refuses; most are cut short."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        end_of_header = 8 + int.from_bytes(f.read(8), "little")
        header = f.read(min(end_of_header, LARGEST_HEADER))
    again = "copy or download it again"
    if "valid UTF-8" in str(error):
        return "rename it; its path has to be UTF-8"
    if header.startswith(b"{") and end_of_header > size:
        return f"{size} bytes, but its header alone has {end_of_header}; {again}"
    ends = re.findall(rb'"data_offsets": *\[ *\d+ *, *(\d{1,18}) *\]', header)
    promised = end_of_header + max(map(int, ends), default=0)
    if ends and size != promised:
        return f"{size} bytes, but its header promises {promised}; {again}"
    return f"not a safetensors file ({error})"


def read_tensors(stored, dtype, device):
    """Yields the tensors of a list of Stored: mapped from the file, or converted.

    What is read of a file stays in memory as long as the file is open; so it is opened anew once
    some tensors were converted. Convolutions are mapped apart from the rest: made channels_last
    later, they leave nothing behind.
    """
    files, converted = {}, 0
    for entry in stored:
        is_convolution = len(entry.shape) == 4
        if (entry.file, is_convolution) not in files:
            files[entry.file, is_convolution] = safe_open(entry.file, "pt")
        whole = files[entry.file, is_convolution].get_tensor(entry.name)
        tensor = (whole if entry.rows is None else whole[entry.rows]).to(device, dtype)
        converted += tensor.data_ptr() != whole.data_ptr()
        if converted == CONVERTED_AT_A_TIME:
            files, converted = {}, 0
        yield tensor


def read_json(file):
    """Returns the dict that a JSON file holds.

    Errors: UserError if there is no such file or it holds something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


@contextlib.contextmanager
def replacing(file):
    """Yields a temporary path to write to, of the same suffix, and renames it to `file` at the end.

    After an error or an interruption an older `file` is as it was, and the temporary one is gone.
    Errors: UserError names the file if it cannot be written.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)           # safetensors would keep other users from reading it
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(tensors, file, metadata):
    """Writes tensors and string metadata as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise UserError(f"{file}: cannot be written ({first_line(error)})") from None


def write_text(text, file):
    """Writes a text as UTF-8."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content, file):
    """Writes a dict or list as indented JSON."""
    write_text(json.dumps(content, indent=1) + "\n", file)


def write_lines(rows, file):
    """Writes dicts as one line of JSON each."""
    write_text("".join(json.dumps(row) + "\n" for row in rows), file)


def save_training(file, modules, trained, optimizer, facts):
    """Writes all that a resumed run needs: modules by name, AdamW's state, and facts (a dict).

    modules: {name: module}, of which `trained` names the one that the optimizer trains.
    """
    tensors = {f"{name}.{key}": parameter for name, module in modules.items()
               for key, parameter in module.named_parameters()}
    updates = 0                                         # fewer than steps if fp16 overflowed
    for key, parameter in modules[trained].named_parameters():
        if state := optimizer.state.get(parameter):     # none before its first step
            tensors |= {f"m.{key}": state["exp_avg"], f"v.{key}": state["exp_avg_sq"]}
            updates = int(state["step"])
    save(tensors, file, dict(facts=json.dumps(facts | dict(updates=updates))))


def load_training(file, modules, trained, optimizer):
    """Restores in place what save_training wrote with the same modules; returns its facts.

    Errors: UserError if the file is damaged.
    """
    try:
        with safe_open(file, "pt") as f, torch.no_grad():
            facts, names = json.loads(f.metadata()["facts"]), set(f.keys())
            updates = float(facts.pop("updates", facts["step"]))    # not in checkpoints of before
            for name, module in modules.items():
                for key, parameter in module.named_parameters():
                    parameter.copy_(f.get_tensor(f"{name}.{key}"))
            for key, parameter in modules[trained].named_parameters():
                if f"m.{key}" in names:
                    # AdamW counts on the CPU, but for its fused version
                    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
                    optimizer.state[parameter] = dict(
                        step=torch.tensor(updates, device=device),
                        exp_avg=torch.empty_like(parameter).copy_(f.get_tensor(f"m.{key}")),
                        exp_avg_sq=torch.empty_like(parameter).copy_(f.get_tensor(f"v.{key}")))
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({first_line(error)}); delete it and what else its run "
                        f"wrote, to start anew") from None
    return facts


def is_finite(module):
    """Returns whether a module's weights hold neither NaN nor infinity."""
    return all(parameter.isfinite().all() for parameter in module.parameters())


def fingerprint(*files):
    """Returns the first 16 hex digits of the SHA-256 of the files, one after the other."""
    digest = hashlib.sha256()
    size = sum(os.path.getsize(file) for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="fingerprint", delay=2,
              leave=False) as bar:
        for file in files:
            with open(file, "rb") as f:
                while chunk := f.read(1 << 20):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()[:16]


def hash_module(module):
    """The first 16 hex digits of the SHA-256 of a module's config and weights."""
    digest = hashlib.sha256(repr(module.config).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- strict loading ------------------------------------------------------------------------

def load_strict(module, checkpoint, dtype=torch.float32, device="cpu"):
    """Puts the checkpoint into the module, frozen, and returns it; the module's keys are our own.

    The module may be on the meta device, which saves drawing weights only to replace them. One
    tensor is read at a time; what already has the dtype stays mapped from its file, without a
    copy. A linear layer may be stored as a 1x1 convolution and the other way round. Errors:
    UserError names every missing, unexpected and mis-shaped key.
    """
    expected = {checkpoint.spelling(key): (key, tensor.shape)
                for key, tensor in module.state_dict().items()}
    faults = [f"missing {name}" for name in expected if name not in checkpoint.state]
    faults += [f"unexpected {name}" for name in checkpoint.state if name not in expected]
    faults += [f"{name} is {checkpoint.state[name].shape}, not {tuple(shape)}"
               for name, (_, shape) in expected.items() if name in checkpoint.state
               and _squeezed(checkpoint.state[name].shape) != _squeezed(shape)]
    if faults:
        raise UserError(f"{checkpoint.file}: {len(faults)} keys do not fit a "
                        f"{type(module).__name__} of this size: {shortened(faults)}")
    tensors = read_tensors([checkpoint.state[name] for name in expected], dtype, device)
    module.load_state_dict({key: tensor.reshape(shape) for (key, shape), tensor
                            in zip(expected.values(), tensors)}, assign=True)
    return module.eval().requires_grad_(False)


def shortened(names):
    """Returns the first names as one text, and how many more there are."""
    left_out = len(names) - NAMES_SHOWN
    return "; ".join(names[:NAMES_SHOWN]) + (f" and {left_out} more" if left_out > 0 else "")


def _squeezed(shape):
    """Returns the shape without the trailing ones that a 1x1 convolution has."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
