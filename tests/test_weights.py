"""Loading is strict: a file loads completely, or one line says what is wrong with it."""
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
from inputs.checkpoints import load_schedule, load_unet, load_vae
from inputs.files import read_json, write_json
from tiny.pretrain import save_part
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

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


def test_every_missing_unexpected_and_misshaped_tensor_is_named(folder):
    state = load_file(folder / "unet" / WEIGHTS)
    del state["conv_in.bias"], state["time_embedding.linear_2.weight"]
    state["surprise.weight"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, folder / "unet" / WEIGHTS)
    with pytest.raises(weights.UserError) as error:
        load_unet(folder)
    for part in ("4 tensors", "missing conv_in.bias", "missing time_embedding.linear_2.weight",
                 "unexpected surprise.weight", "conv_out.bias is (7,), not (4,)", WEIGHTS):
        assert part in str(error.value)


def test_a_single_file_of_sd15_sizes_loads_by_its_prefixes(tmp_path):
    """All zeros, so that the file is sparse: 4 GB of names and shapes that cost no disk."""
    with torch.device("meta"):
        modules = UNet(UNetConfig()), AutoencoderKL(VAEConfig()), CLIPTextModel(CLIPTextConfig())
    shapes = {name: list(tensor.shape) for name, tensor in references.single_file_of(
        [module.state_dict() for module in modules]).items()}
    shapes["model_ema.decay"] = shapes["betas"] = [1]
    file = tmp_path / "sd15.safetensors"
    references.write_zeros(file, shapes)
    unet = load_unet(file, torch.float16)           # the file's own dtype: nothing is copied
    assert len(unet.state_dict()) == 686 and unet.config == UNetConfig()
    assert load_vae(file, torch.float16).config == VAEConfig()
    assert len(checkpoints.read_text(file).state) == 196


def test_absent_keys_of_a_config_are_sd15s():
    assert UNetConfig(**checkpoints.unet_config_from_json({}, "config.json")) == UNetConfig()
    assert VAEConfig(**checkpoints.vae_config_from_json({})) == VAEConfig()


@pytest.mark.parametrize("name, spoil, message", [
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes()[:-9]), "truncated: .* header promises"),
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes()[:500]), "truncated: it has 500 bytes"),
    (WEIGHTS, lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git-LFS"),
    (WEIGHTS, lambda f: f.write_bytes(b"nonsense" * 9), "can't be read as a safetensors file"),
    (WEIGHTS, lambda f: f.write_bytes(f.read_bytes().replace(b'"F16"', b'"F99"')), "can't be read"),
    (WEIGHTS, lambda f: f.rename(f.with_suffix(".bin")), "pickle"),
    (WEIGHTS, lambda f: f.rename(f.with_suffix(".CKPT")), "pickle"),
    (WEIGHTS, lambda f: f.unlink(), "diffusion_pytorch_model.safetensors is missing"),
    ("config.json", lambda f: f.write_text("{,}"), "config.json is not JSON"),
    ("config.json", lambda f: f.write_text("[]"), "config.json is not a JSON object"),
    ("config.json", lambda f: f.unlink(), "config.json is missing"),
    ("", lambda f: shutil.rmtree(f), "unet is missing. A Stable Diffusion folder has"),
])
def test_a_corrupt_file_is_rejected_with_the_reason(folder, name, spoil, message):
    spoil(folder / "unet" / name)
    with pytest.raises(weights.UserError, match=message):
        load_unet(folder)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json(dict(a=1), file)
    with pytest.raises(KeyboardInterrupt), weights.replacing(file) as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt
    assert read_json(file) == dict(a=1) and list(tmp_path.iterdir()) == [file]
    with pytest.raises(weights.UserError, match="a.json can't be written .No space left"):
        with weights.replacing(file):
            raise OSError(errno.ENOSPC, "No space left on device")
    weights.save({}, tmp_path / "b", {})
    assert (tmp_path / "b").stat().st_mode == file.stat().st_mode
    (tmp_path / "b").unlink()
    write_json(dict(a=2), file)
    assert read_json(file) == dict(a=2) and list(tmp_path.iterdir()) == [file]


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
            net(torch.ones(1, 3)).sum().backward()
            adam.step()
        assert torch.equal(module.weight, restored.weight)
        module.zero_grad()


# ---- damaged at random ---------------------------------------------------------------------

NONSENSE = (None, True, -1, 0, 1, 7, 1.5, 2**70, "x", [], {}, [0], [None], [1, 2, 3], ["x", 64])


def loads_or_is_rejected(load, path):
    """Whether a path loads; any error but a UserError of one line fails the test."""
    try:
        load(path)
    except weights.UserError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return False
    return True


def load_text(path):
    """The text encoder of a path, without the tokenizer that a single file lacks."""
    return checkpoints.read_text(path).build(CLIPTextModel, CLIPTextConfig)


def small_shapes():
    """{name: shape} of a single file that is as small as possible."""
    with torch.device("meta"):
        modules = (UNet(UNetConfig(channels=(32,), attention=(True,), heads=(8,),
                                   blocks_per_level=1)),
                   AutoencoderKL(VAEConfig(channels=(32,), blocks_per_level=1)),
                   CLIPTextModel(CLIPTextConfig(width=64, layers=1, heads=1, vocab_size=9)))
    return {name: list(tensor.shape) for name, tensor in references.single_file_of(
        [module.state_dict() for module in modules]).items()}


def damage(header, pick):
    """Change one thing in the header of a safetensors file, a dict, in place."""
    name = pick.choice([name for name in header if name != "__metadata__"])
    entry, kind = header[name], pick.choice(("drop", "name", "entry", "key", "value", "number"))
    if "__metadata__" in header and pick.random() < 0.7:
        content = json.loads(header["__metadata__"]["bps"])
        part = content[pick.choice(("config", "training"))]
        part[pick.choice(sorted(part))] = pick.choice((*NONSENSE, 2**63, 1e300, float("nan")))
        content = pick.choice((content, content, content, dict(content, training=3), *NONSENSE[:3]))
        header["__metadata__"]["bps"] = json.dumps(content)
    elif kind == "drop":
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
@pytest.mark.parametrize("kind", ["single file", "BPS file"])
def test_a_header_damaged_at_random_loads_or_is_rejected(kind, tmp_path, bps_file):
    pick, file = random.Random(0), tmp_path / "damaged.safetensors"
    loaders = (load_bps,) if kind == "BPS file" else (load_unet, load_vae, load_text)
    if kind == "BPS file":
        shutil.copy(bps_file, file)
    else:
        references.write_zeros(file, small_shapes())
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert all(loads_or_is_rejected(load, file) for load in loaders)
    rejected = 0
    for i in range(200):
        header = json.loads(content[8:8 + length])
        damage(header, pick)
        text = json.dumps(header).encode()
        damaged = struct.pack("<Q", len(text)) + text + content[8 + length:]
        if i % 3 == 0:                                          # one byte instead
            position = pick.randrange(8 + length)
            damaged = content[:position] + bytes([pick.randrange(256)]) + content[position + 1:]
        file.write_bytes(damaged)
        rejected += not all([loads_or_is_rejected(load, file) for load in loaders])
    assert rejected > 100


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("load, prefix", [*zip((load_unet, load_vae, load_text),
                                               references.PREFIXES)])
def test_shapes_changed_at_random_load_or_are_rejected(load, prefix, tmp_path):
    pick, file, shapes = random.Random(0), tmp_path / "changed.safetensors", small_shapes()
    names = [name for name in shapes if name.startswith(prefix)]
    for _ in range(60):
        changed = dict(shapes)
        for name in pick.sample(names, pick.choice((1, 1, 9))):
            shape = list(shapes[name])
            shape[pick.randrange(len(shape))] = pick.choice((0, 1, 3, 33, 64))
            changed[name] = pick.choice(([], [0], shape, shape[:1], [*shape, 2]))
        references.write_zeros(file, changed)
        loads_or_is_rejected(load, file)


@pytest.mark.parametrize("name, load", [
    ("unet/config.json", load_unet), ("vae/config.json", load_vae),
    ("scheduler/scheduler_config.json", load_schedule)])
def test_nonsense_in_a_config_loads_or_is_rejected(name, load, folder):
    (folder / "scheduler").mkdir()
    write_json(dict.fromkeys(checkpoints.SCHEDULE_FIXED) | references.OLD,
               folder / "scheduler" / "scheduler_config.json")
    config = read_json(folder / name)
    assert loads_or_is_rejected(load, folder)
    for key in config:
        for value in NONSENSE:
            (folder / name).write_text(json.dumps(config | {key: value}))
            loads_or_is_rejected(load, folder)


def test_nonsense_in_an_index_of_shards_is_rejected(folder):
    (folder / "unet" / WEIGHTS).unlink()
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    for value in (*NONSENSE, {"a": 1}, {"a": "b.bin"}, {"a": "none.safetensors"}):
        index.write_text(json.dumps(dict(weight_map=value)))
        assert not loads_or_is_rejected(load_unet, folder)
