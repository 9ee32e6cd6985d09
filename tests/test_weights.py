"""Checkpoints in both layouts load to the same model, and every fault is named."""
import errno
import json
import random
import shutil
import struct

import pytest
import references
import torch
from safetensors.torch import load_file, save_file

import weights
from bps import load_bps
from clip import CLIPTextConfig, CLIPTextModel
from inputs import checkpoints
from tiny.pretrain import save_part
from unet import UNet, UNetConfig, load_unet
from vae import AutoencoderKL, VAEConfig, load_vae

UNET = UNetConfig(channels=(32, 64, 64), attention=(True, True, False), heads=(2, 4, 4),
                  blocks_per_level=2, context_dim=24)
UNET_JSON = dict(block_out_channels=[32, 64, 64], layers_per_block=2, cross_attention_dim=24,
                 attention_head_dim=[2, 4, 4], norm_num_groups=32,
                 down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
                 up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2)
VAE = VAEConfig(channels=(8, 16, 16), blocks_per_level=1, norm_groups=4, scaling_factor=0.25)
VAE_JSON = dict(block_out_channels=[8, 16, 16], layers_per_block=1, norm_num_groups=4,
                scaling_factor=0.25)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """An SD folder with a random U-Net and autoencoder, and the two (rounded to fp16)."""
    path = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    unet = UNet(UNET).half().float().eval()
    save_part(unet, path / "unet", lambda key: checkpoints.unet_folder_name(key, 2), UNET_JSON)
    vae = AutoencoderKL(VAE).half().float().eval()
    save_part(vae, path / "vae", lambda key: checkpoints.vae_folder_name(key, 3), VAE_JSON)
    return path, unet, vae


@pytest.fixture
def folder(written, tmp_path):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)


def test_a_folder_gives_back_the_unet_and_the_autoencoder(written):
    path, unet, vae = written
    loaded = load_unet(path)
    assert loaded.config == UNET
    inputs = torch.randn(2, 4, 8, 12), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    torch.testing.assert_close(loaded(*inputs), unet(*inputs))
    assert load_vae(path).config == VAE
    z = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(load_vae(path).decode(z), vae.decode(z))


def test_every_missing_unexpected_and_misshaped_key_is_named(folder):
    state = load_file(folder / "unet" / WEIGHTS)
    del state["conv_in.bias"], state["time_embedding.linear_2.weight"]
    state["surprise.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, folder / "unet" / WEIGHTS)
    with pytest.raises(weights.UserError) as error:
        load_unet(folder)
    for part in ("4 keys", "missing conv_in.bias", "missing time_embedding.linear_2.weight",
                 "unexpected surprise.weight", "conv_out.bias is (7,), not (4,)", WEIGHTS):
        assert part in str(error.value)


def test_a_single_file_of_sd15_sizes_loads_by_its_prefixes(tmp_path):
    """All zeros, so that the file is sparse: 4 GB of names and shapes that cost no disk."""
    with torch.device("meta"):
        shapes = {f"{prefix}{key}": list(tensor.shape) for prefix, module in (
            ("model.diffusion_model.", UNet(UNetConfig())),
            ("first_stage_model.", AutoencoderKL(VAEConfig())),
            ("cond_stage_model.transformer.text_model.", CLIPTextModel(CLIPTextConfig())),
        ) for key, tensor in module.state_dict().items()}
    shapes["model_ema.decay"] = shapes["betas"] = [1]
    file = tmp_path / "sd15.safetensors"
    references.write_zeros(file, shapes)
    checkpoint = checkpoints.read_unet(file)
    with torch.device("meta"):
        unet = UNet(UNetConfig(**checkpoint.config))
    weights.load_strict(unet, checkpoint, torch.float16)    # its own dtype: nothing is copied
    assert len(checkpoint.state) == 686 and unet.config == UNetConfig()
    assert load_vae(file, torch.float16).config == VAEConfig()
    assert len(checkpoints.read_text(file).state) == 196


def test_absent_keys_of_a_config_are_sd15s():
    assert UNetConfig(**checkpoints.unet_config_from_json({}, "config.json")) == UNetConfig()
    assert VAEConfig(**checkpoints.vae_config_from_json({})) == VAEConfig()


@pytest.mark.parametrize("spoil, message", [
    (lambda f: f.write_bytes(f.read_bytes()[:-9]), "header promises"),
    (lambda f: f.write_bytes(f.read_bytes()[:500]), "500 bytes, but its header alone has"),
    (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git-LFS pointer"),
    (lambda f: f.write_bytes(b"nonsense" * 9), "not a safetensors file"),
    (lambda f: f.rename(f.with_suffix(".bin")), "pickle"),
    (lambda f: f.rename(f.with_suffix(".CKPT")), "pickle"),
    (lambda f: (f.parent / "config.json").write_text("{,}"), "config.json: not JSON"),
    (lambda f: (f.parent / "config.json").write_text("[]"), "config.json: not a JSON object"),
    (lambda f: f.write_bytes(f.read_bytes().replace(b'"F16"', b'"F99"')), "not a safetensors"),
    (lambda f: f.unlink(), "no diffusion_pytorch_model.safetensors"),
    (lambda f: (f.parent / "config.json").unlink(), "config.json: no such file"),
    (lambda f: (f.parent / "config.json").write_text('{"class_embed_type": "timestep"}'),
     "class_embed_type"),
])
def test_a_faulty_file_is_refused_with_the_reason(folder, spoil, message):
    spoil(folder / "unet" / WEIGHTS)
    with pytest.raises(weights.UserError, match=message):
        load_unet(folder)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    weights.write_json(dict(a=1), file)
    with pytest.raises(KeyboardInterrupt), weights.replacing(file) as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt
    assert weights.read_json(file) == dict(a=1) and list(tmp_path.iterdir()) == [file]
    with pytest.raises(weights.UserError, match="a.json: cannot be written .No space left"):
        with weights.replacing(file):
            raise OSError(errno.ENOSPC, "No space left on device")
    weights.save({}, tmp_path / "b", {})
    assert (tmp_path / "b").stat().st_mode == file.stat().st_mode
    (tmp_path / "b").unlink()
    weights.write_json(dict(a=2), file)
    assert weights.read_json(file) == dict(a=2) and list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_before_the_optimizers_first_step_is_written_and_read(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    for step in range(2):
        weights.save_training(tmp_path / "a", dict(net=module), "net", optimizer, dict(step=step))
        restored, fresh = torch.nn.Linear(2, 2), torch.optim.AdamW(module.parameters())
        facts = weights.load_training(tmp_path / "a", dict(net=restored), "net", fresh)
        assert facts == dict(step=step) and torch.equal(restored.weight, module.weight)
        assert len(fresh.state) == (0 if step == 0 else 2)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(weights.UserError, match="nowhere"):
        load_unet(tmp_path / "nowhere")


# ---- damaged at random ---------------------------------------------------------------------

NONSENSE = (None, True, -1, 0, 1, 7, 1.5, 2**70, "x", [], {}, [0], [None], [1, 2, 3], ["x", 64])


def loads_or_is_refused(read, path):
    """Returns whether a file loads; any error but a UserError of one line fails the test."""
    try:
        read(path)
    except weights.UserError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return False
    return True


def load_text(path):
    """Returns the text encoder of a path, without the tokenizer that a single file lacks."""
    return checkpoints.read_text(path).build(CLIPTextModel, CLIPTextConfig)


def small_shapes():
    """Returns {name: shape} of a single file that is as small as one can be."""
    with torch.device("meta"):
        modules = (UNet(UNetConfig(channels=(32,), attention=(True,), heads=(8,),
                                   blocks_per_level=1)),
                   AutoencoderKL(VAEConfig(channels=(32,), blocks_per_level=1)),
                   CLIPTextModel(CLIPTextConfig(width=64, layers=1, heads=1, vocab_size=9)))
    return {name: list(tensor.shape) for name, tensor in references.single_file_of(
        [module.state_dict() for module in modules]).items()}


def damaged(header, pick):
    """Changes one thing in the header of a safetensors file, a dict, in place."""
    name = pick.choice(list(header))
    entry, kind = header[name], pick.choice(("drop", "name", "entry", "key", "value", "number"))
    if kind == "drop":
        del header[name]
    elif kind == "name":
        header[name + pick.choice((".", "x", "0.weight"))] = header.pop(name)
    elif kind == "entry":
        header[name] = pick.choice(NONSENSE)
    elif kind == "key":
        del entry[pick.choice(list(entry))]
    elif kind == "value":
        entry[pick.choice(list(entry))] = pick.choice(NONSENSE)
    else:
        numbers = entry[pick.choice(("shape", "data_offsets"))]
        numbers[pick.randrange(len(numbers))] = pick.choice(NONSENSE)


@pytest.mark.slow
def test_a_header_damaged_at_random_loads_or_is_refused_in_one_line(tmp_path):
    pick, file, shapes = random.Random(0), tmp_path / "damaged.safetensors", small_shapes()
    references.write_zeros(file, shapes)
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    readers = (load_unet, load_vae, load_text)
    assert all(loads_or_is_refused(read, file) for read in readers)
    refused = 0
    for i in range(300):
        header = json.loads(whole[8:8 + length])
        damaged(header, pick)
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + whole[8 + length:]
        if i % 3 == 0:                                          # a byte, rather than a value
            position = pick.randrange(8 + length)
            content = whole[:position] + bytes([pick.randrange(256)]) + whole[position + 1:]
        file.write_bytes(content)
        refused += not all([loads_or_is_refused(read, file) for read in readers])
    assert refused > 250


@pytest.mark.slow
def test_a_bps_file_damaged_at_random_loads_or_is_refused_in_one_line(tmp_path, bps_file):
    whole, pick, file = bps_file.read_bytes(), random.Random(0), tmp_path / "damaged.safetensors"
    length = struct.unpack("<Q", whole[:8])[0]
    values = (None, 0, -1, 2**63, 1e300, float("nan"), "x", [], {}, [0], [2**40], True)
    refused = 0
    for i in range(120):
        header = json.loads(whole[8:8 + length])
        if i % 3 == 0:
            damaged(header, pick)
        else:
            content = json.loads(header["__metadata__"]["bps"])
            part = content[pick.choice(("config", "training"))]
            part[pick.choice(sorted(part))] = pick.choice(values)
            if i % 7 == 0:
                content = pick.choice((*values, dict(content, training=3), dict(config={})))
            header["__metadata__"]["bps"] = json.dumps(content)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length:])
        refused += not loads_or_is_refused(load_bps, file)
    assert refused > 60


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("read, prefix", [*zip((load_unet, load_vae, load_text),
                                               references.PREFIXES)])
def test_a_sound_header_of_senseless_shapes_loads_or_is_refused_in_one_line(read, prefix,
                                                                            tmp_path):
    pick, file, shapes = random.Random(0), tmp_path / "senseless.safetensors", small_shapes()
    names = [name for name in shapes if name.startswith(prefix)]
    for _ in range(60):
        changed = dict(shapes)
        for name in pick.sample(names, pick.choice((1, 1, 9))):
            shape = list(shapes[name])
            shape[pick.randrange(len(shape))] = pick.choice((0, 1, 3, 33, 64))
            changed[name] = pick.choice(([], [0], shape, shape[:1], [*shape, 2]))
        references.write_zeros(file, changed)
        loads_or_is_refused(read, file)


@pytest.mark.parametrize("part, read", [("unet", load_unet), ("vae", load_vae)])
def test_a_config_of_senseless_values_loads_or_is_refused_in_one_line(part, read, folder):
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    for key in config:
        for value in NONSENSE:
            file.write_text(json.dumps(config | {key: value}))
            loads_or_is_refused(read, folder)


def test_a_senseless_index_of_shards_is_refused_in_one_line(folder):
    (folder / "unet" / WEIGHTS).unlink()
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    for value in (*NONSENSE, {"a": 1}, {"a": "b.bin"}, {"a": "none.safetensors"}):
        index.write_text(json.dumps(dict(weight_map=value)))
        assert not loads_or_is_refused(load_unet, folder)


def test_a_senseless_noise_schedule_is_refused_in_one_line(tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    for key in (*references.OLD, *checkpoints.SCHEDULE_FIXED):
        for value in NONSENSE:
            file.write_text(json.dumps(references.OLD | {key: value}))
            loads_or_is_refused(checkpoints.load_schedule, tmp_path)


def test_a_step_that_fp16_left_out_is_not_counted_after_a_resume(tmp_path):
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    models[0](torch.ones(1, 3)).sum().backward()
    optimizers[0].step()                                # one update in two steps of the training
    modules = [dict(model=model) for model in models]
    weights.save_training(tmp_path / "run.safetensors", modules[0], "model", optimizers[0],
                          dict(step=2))
    facts = weights.load_training(tmp_path / "run.safetensors", modules[1], "model", optimizers[1])
    assert facts == dict(step=2)
    assert optimizers[1].state[models[1].weight]["step"] == 1
