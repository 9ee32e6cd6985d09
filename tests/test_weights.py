"""Loading is strict: a file loads completely, or one line says what is wrong with it."""
import errno
import json
import random
import shutil
import struct
import subprocess
import sys

import pytest
import references
import torch
from safetensors.torch import load_file, save_file

import weights
from bps import BPSConfig, load_bps
from clip import CLIPTextConfig, CLIPTextModel
from inputs import checkpoints
from inputs.checkpoints import load_schedule, load_unet, load_vae
from inputs.files import read_json, write_json
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig
from weights import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_every_missing_unexpected_and_misshaped_tensor_is_named(copied):
    folder = copied()
    state = load_file(folder / "unet" / WEIGHTS)
    del state["conv_in.bias"], state["time_embedding.linear_2.weight"]
    state["surprise.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, folder / "unet" / WEIGHTS)
    with pytest.raises(UserError) as error:
        load_unet(folder)
    for part in ("4 tensors", "missing conv_in.bias", "missing time_embedding.linear_2.weight",
                 "unexpected surprise.weight", "conv_out.bias is (7,), not (4,)", WEIGHTS):
        assert part in str(error.value)


def zeros_file(file, unet, vae, text, **others):
    """Write a single file of zeros for these configs, sparse and so without disk usage."""
    with torch.device("meta"):
        modules = UNet(unet), AutoencoderKL(vae), CLIPTextModel(text)
    shapes = {name: list(tensor.shape) for name, tensor in references.single_file_of(
        [module.state_dict() for module in modules]).items()}
    references.write_zeros(file, shapes | others)
    return shapes


def small_file(file):
    """Write a single file that is as small as possible; return {name: shape}."""
    return zeros_file(
        file, UNetConfig(channels=(32,), attention=(True,), heads=(8,), blocks_per_level=1),
        VAEConfig(channels=(32,), blocks_per_level=1),
        CLIPTextConfig(width=64, layers=1, heads=1, vocab_size=9))


def test_a_single_file_of_sd15_sizes_loads_by_its_prefixes(tmp_path):
    file = tmp_path / "sd15.safetensors"
    zeros_file(file, UNetConfig(), VAEConfig(), CLIPTextConfig(), betas=[1])
    unet = load_unet(file, torch.float16)           # the file's own dtype: nothing is copied
    assert len(unet.state_dict()) == 686 and unet.config == UNetConfig()
    assert load_vae(file, torch.float16).config == VAEConfig()
    assert len(checkpoints.read_text(file).state) == 196


@pytest.mark.parametrize("name, spoil, message", [
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes()[:-9]), "is not a complete safetensors file"),
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes()[:500]), "is not a complete safetensors file"),
    (WEIGHTS, lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git-LFS"),
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes()[:-999].ljust(f.stat().st_size, b"\0")),
     "ends in zeros .*, as if its download broke off"),
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes().replace(b'"F16"', b'"I16"')),
     "has type I16, not F32"),
    (WEIGHTS, lambda f: f.rename(f.with_suffix(".CKPT")), "pickle"),
    (WEIGHTS, lambda f: f.unlink(), "diffusion_pytorch_model.safetensors is missing"),
    ("config.json", lambda f: f.write_text("{,}"), "config.json is not JSON"),
    ("config.json", lambda f: f.write_text("[]"), "config.json is not a JSON object"),
    ("config.json", lambda f: f.unlink(), "config.json is missing"),
    ("", lambda f: shutil.rmtree(f), "unet is missing. A Stable Diffusion folder has"),
])
def test_a_corrupt_file_is_rejected_with_the_reason(copied, name, spoil, message):
    folder = copied()
    spoil(folder / "unet" / name)
    with pytest.raises(UserError, match=message):
        load_unet(folder)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json(dict(a=1), file)
    with pytest.raises(KeyboardInterrupt), weights.replacing(file) as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt
    assert read_json(file) == dict(a=1) and list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match="a.json can't be written .No space left"):
        with weights.replacing(file):
            raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / ".b.0123abcd").mkdir()                      # a killed process left it behind,
    (tmp_path / ".b.0123abcd" / ".tmpX2b1").write_text("half")     # where safetensors writes
    weights.save({}, tmp_path / "b", {})
    assert (tmp_path / "b").stat().st_mode == file.stat().st_mode
    (tmp_path / "b").unlink()
    write_json(dict(a=2), file)
    assert read_json(file) == dict(a=2) and list(tmp_path.iterdir()) == [file]


def test_two_processes_may_write_the_same_file_at_once(tmp_path):
    file = tmp_path / "part[1]"
    with weights.replacing(file) as slow:
        slow.write_text("slow")
        with weights.replacing(file) as fast:
            fast.write_text("fast")
    assert file.read_text() == "fast" and list(tmp_path.iterdir()) == [file]


def test_the_command_for_a_pickle_runs_nothing_of_its_name(tmp_path):
    name = "x'); open('ran', 'w'); ('$(touch ran).pt"
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle") as error:
        weights.read_header(tmp_path / name)
    command = str(error.value).partition("you trust: ")[2].replace("python", sys.executable, 1)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "UnpicklingError" in done.stderr                 # it was opened, and is none
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_training_resumes_with_its_own_count_of_updates(tmp_path):
    """Before the first update, and after one update in two steps, as if fp16 had overflowed."""
    module, file = torch.nn.Linear(3, 2), tmp_path / "checkpoint.safetensors"
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step, updates in ((0, []), (2, [1, 1])):
        weights.save_training(file, dict(net=module), "net", optimizer, dict(step=step))
        restored = torch.nn.Linear(3, 2)
        fresh = torch.optim.AdamW(restored.parameters(), lr=0.1)
        assert weights.load_training(file, dict(net=restored), "net", fresh) == dict(step=step)
        assert [state["step"] for state in fresh.state.values()] == updates
        for net, adam in ((module, optimizer), (restored, fresh)):
            adam.zero_grad()
            net(torch.ones(1, 3)).sum().backward()
            adam.step()
        assert torch.equal(module.weight, restored.weight)


# ---- damaged at random ---------------------------------------------------------------------

NONSENSE = (None, True, -1, 0, 1, 7, 1.5, 2**70, float("nan"), "x", [], {}, [0], [None], [1, 2, 3],
            ["x", 64])


def damage(content, pick):
    """Replace, rename or delete one random entry of nested dicts and lists, in place."""
    key = pick.choice(list(content) if isinstance(content, dict) else range(len(content)))
    if isinstance(content[key], (dict, list)) and content[key] and pick.random() < 0.8:
        return damage(content[key], pick)
    value = content.pop(key)
    if isinstance(content, list):
        content.insert(key, pick.choice(NONSENSE))
    elif pick.random() < 0.8:
        renamed = pick.random() < 0.3
        content[f"{key}.x" if renamed else key] = value if renamed else pick.choice(NONSENSE)


def loads_or_is_rejected(load, path):
    """Whether a path loads; any error but a UserError of one line fails the test."""
    try:
        load(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    return True


def load_text(path):
    """The text encoder of a path, without the tokenizer that a single file lacks."""
    return checkpoints.read_text(path).build(CLIPTextModel, CLIPTextConfig)


def small_bps(file):
    """Write a BPS file that is as small as possible."""
    references.write_random_bps(file, "sketch", BPSConfig(
        factor=1, channels=(32,), blocks_per_level=1, input_weights=(16.0,)))


@pytest.mark.parametrize("write, loaders", [
    (small_file, (load_unet, load_vae, load_text)), (small_bps, (load_bps,))],
    ids=["single file", "BPS file"])
def test_a_header_damaged_at_random_loads_or_is_rejected(write, loaders, tmp_path):
    pick, file = random.Random(0), tmp_path / "damaged.safetensors"
    write(file)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert all(loads_or_is_rejected(load, file) for load in loaders)
    rejected = 0
    for i in range(100):
        header = json.loads(content[8:8 + length])
        if load_bps in loaders and i % 4:
            entry = json.loads(header["__metadata__"]["bps"])
            damage(entry, pick)
            header["__metadata__"]["bps"] = json.dumps(entry)
        else:
            damage(header, pick)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length:])
        rejected += not all([loads_or_is_rejected(load, file) for load in loaders])
    assert rejected > 50


@pytest.mark.parametrize("name, load", [
    ("unet/config.json", load_unet), ("vae/config.json", load_vae),
    ("scheduler/scheduler_config.json", load_schedule)])
def test_nonsense_in_a_config_loads_or_is_rejected(name, load, copied):
    pick, folder = random.Random(0), copied()
    config = dict.fromkeys(checkpoints.SCHEDULE_FIXED) if load is load_schedule else {}
    config |= read_json(folder / name)
    assert loads_or_is_rejected(load, folder)
    for key in config:
        for value in pick.sample(NONSENSE, 4):
            (folder / name).write_text(json.dumps(config | {key: value}))
            loads_or_is_rejected(load, folder)


def test_nonsense_in_an_index_of_shards_is_rejected(copied):
    folder = copied()
    (folder / "unet" / WEIGHTS).unlink()
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    for value in (*NONSENSE, {"a": 1}, {"a": "b.bin"}, {"a": "none.safetensors"}):
        index.write_text(json.dumps(dict(weight_map=value)))
        assert not loads_or_is_rejected(load_unet, folder)
