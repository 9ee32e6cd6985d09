"""All layouts of SD 1.x and 2.x weights give the same tensors; other models are rejected."""
import contextlib
import itertools
import json
import operator
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import references
import torch
from PIL import Image
from references import PARTS, folder_states, save_file, single_file, write_folder
from safetensors.torch import save_file as save_float32

import sample
import weights
from inputs import checkpoints
from inputs.checkpoints import load_clip, load_schedule, load_unet, load_vae
from inputs.files import read_json, write_json
from inputs.options import BASE
from weights import UserError

RECORD = references.read_record()


@pytest.fixture(params=["small1", "small2"])
def name(request):
    """A small model like SD 1, then one like SD 2."""
    return request.param


def only(states, *parts):
    """The states with all other parts empty, for smaller files."""
    return [state if i in parts else {} for i, state in enumerate(states)]


def assert_same(module, state):
    """Assert that a loaded module has exactly the tensors of a state."""
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(loaded[key], tensor.reshape(loaded[key].shape)), key


def test_a_folder_and_a_single_file_give_the_same_tensors(name, random_states, sd_folder,
                                                          sd_file):
    for path, tokenizer in ((sd_folder(name), None), (sd_file(name), BASE)):
        unet, vae, (_, text) = load_unet(path), load_vae(path), load_clip(path, tokenizer)
        for module, state in zip((unet, vae, text), random_states(name)):
            assert_same(module, state)
        heads = (8,) * 4 if name == "small1" else (1, 2, 2, 2)
        assert unet.config.heads == heads and unet.config.blocks_per_level == 2
        assert unet.config.linear_projection == (name == "small2")
        assert text.config.heads == text.config.width // 64
        assert text.config.activation == ("quick_gelu" if name == "small1" else "gelu")
        assert vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("index", ["{}.safetensors.index.json", "{}.safetensors.index.fp16.json"])
@pytest.mark.filterwarnings("ignore:.*using the shards")
def test_shards_are_read_by_their_index(index, copied, random_states):
    path, states = copied(), random_states("small1")
    for part, stem in PARTS.items():
        (path / part / f"{stem}.safetensors").unlink()
        state = folder_states(states)[part]
        weight_map = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(sorted(state))}
        for file in set(weight_map.values()):
            save_file({name: state[name] for name in state if weight_map[name] == file},
                      path / part / file)
        write_json(dict(weight_map=weight_map), path / part / index.format(stem))
        write_json(dict(weight_map=dict(a="model-1.bin")), path / part / "model.bin.index.json")
    for module, state in zip((load_unet(path), load_vae(path), load_clip(path)[1]), states):
        assert_same(module, state)
    for read in (checkpoints.read_vae, checkpoints.read_text):
        assert [file.name for file in read(path).files()] == ["a.safetensors", "b.safetensors"]
    (path / "unet" / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors is missing"):
        load_unet(path)


def test_the_exact_name_wins_then_its_index_then_fp16(tmp_path):
    """A folder with every variant, from which the best one is deleted again and again."""
    def find():
        [file] = checkpoints.find_weights(tmp_path, "m")
        return file.name

    indices = ["m.safetensors.index.json", "m.fp16.safetensors.index.json",
               "m.non_ema.safetensors.index.json"]
    files = ["m.safetensors", *indices, "m.fp16.safetensors"]
    for name in (*files, "m.non_ema.safetensors", "other.safetensors"):
        write_json(dict(weight_map=dict(a=f"{name}.safetensors")), tmp_path / name)
    for name in files:
        found = f"{name}.safetensors" if name in indices else name
        with pytest.warns(UserWarning, match=f"using .*{name}") if name not in files[:2] \
                else contextlib.nullcontext():
            assert find() == found
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="has several weights files: .*Rename one to m.safetensors"):
        find()
    (tmp_path / "m.non_ema.safetensors").unlink()
    with pytest.warns(UserWarning, match="no m.safetensors, using other.safetensors"):
        assert find() == "other.safetensors"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists its maps")
def test_only_tensors_that_have_the_dtype_stay_mapped(random_states, tmp_path, monkeypatch):
    file, opened = tmp_path / "all.safetensors", Mock(side_effect=weights.safe_open)
    save_float32(single_file(only(random_states("small1"), 0)), file)
    monkeypatch.setattr(weights, "safe_open", opened)

    def maps():
        """How often the file is mapped into memory."""
        return Path("/proc/self/maps").read_text().count(str(file))

    unet = load_unet(file)
    assert opened.call_count == 4           # for header, end, the convolutions and the rest
    assert maps() == 2
    unet.to(memory_format=torch.channels_last)
    assert maps() == 1
    unet = load_unet(file, torch.float16)
    assert unet.out[2].weight.dtype == torch.float16 and maps() == 0
    assert opened.call_count > 4 + 686 / 16         # or pages of converted tensors would stay


@pytest.mark.parametrize("configs", RECORD["configs"].values(), ids=RECORD["configs"])
def test_configs_with_every_key_are_read(configs, tmp_path):
    """They also contain keys that mean nothing here, such as one of tomorrow."""
    for part, config in configs.items():
        write_json(config | dict(new_key_of_tomorrow=3), tmp_path / part)
        config = checkpoints.read_config(tmp_path / part)
        checkpoints.check_values(config, getattr(checkpoints, f"{part.upper()}_FIXED"), part)
        if part == "unet":
            arguments = checkpoints.unet_config_from_json(config, part)
            assert arguments["channels"] == (320, 640, 1280, 1280)
            assert arguments["context_dim"] == configs["text"]["hidden_size"]
        if part == "vae":
            assert checkpoints.vae_config_from_json(config)["scaling_factor"] == 0.18215


SINGLE_FILE_NAMES = ("norm", "q", "k", "v", "proj_out")


@pytest.mark.parametrize("rank, names", [
    (2, SINGLE_FILE_NAMES), (3, ("group_norm", "query", "key", "value", "proj_attn")),
    (4, ("group_norm", "to_q", "to_k", "to_v", "to_out.0")),
    (4, ("norm", "to_q", "key", "v", "to_out.0"))], ids=str)
def test_the_autoencoders_attention_loads_under_all_names(names, rank, random_states, tmp_path):
    vae, renamed = random_states("small1")[1], {}
    for key, tensor in vae.items():
        for old, new in zip(SINGLE_FILE_NAMES, names):
            if f".attn_1.{old}." in key:
                key = key.replace(f".attn_1.{old}.", f".attn_1.{new}.")
                if old != "norm" and key.endswith("weight"):
                    tensor = tensor.reshape(*tensor.shape[:2], *[1] * (rank - 2))
                break
        renamed[key] = tensor
    file, folder = tmp_path / "all.safetensors", tmp_path / "vae"
    folder.mkdir()
    write_json(references.MODELS["small1"]["vae"], folder / "config.json")
    save_file({checkpoints.vae_folder_name(key, 4): tensor for key, tensor in renamed.items()},
              folder / "diffusion_pytorch_model.safetensors")
    assert_same(load_vae(folder), vae)
    for prefix in ("first_stage_model.", ""):               # in a single file, and alone
        save_file({prefix + key: tensor for key, tensor in renamed.items()}, file)
        assert_same(load_vae(file), vae)


def test_projections_load_as_linear_layers_and_as_convolutions(name, random_states, tmp_path):
    states = only(random_states(name), 0)
    for rank in (2, 4):
        unet = {key: tensor.reshape(*tensor.shape[:2], *[1] * (rank - 2))
                if ".proj_" in key and key.endswith("weight") else tensor
                for key, tensor in states[0].items()}
        path = write_folder(tmp_path / f"rank{rank}", name, (unet, *states[1:]))
        file = tmp_path / f"rank{rank}.safetensors"
        save_file(single_file((unet, *states[1:])), file)
        assert_same(load_unet(path), states[0])
        assert_same(load_unet(file), states[0])


EXTRA = {name: torch.zeros(2, 2) for name in (
    "logit_scale", "text_projection.weight", "vision_model.post_layernorm.weight")}


@pytest.mark.parametrize("prefix", ["transformer.text_model.", "transformer.",
                                    "transformer.text_model.text_model.",
                                    "transformer.transformer.text_model."])
def test_the_text_encoder_of_a_file_loads_under_every_prefix(prefix, random_states, tmp_path):
    states, file = only(random_states("small1"), 2), tmp_path / "single.safetensors"
    extra = {f"cond_stage_model.{name}": tensor for name, tensor in EXTRA.items()}
    save_file(single_file(states, f"cond_stage_model.{prefix}") | extra, file)
    assert_same(load_clip(file, BASE)[1], states[2])


@pytest.mark.parametrize("prefix", ["text_model.", "", "text_model.text_model.", "transformer."])
def test_the_text_encoder_of_a_folder_loads_under_every_prefix(prefix, random_states, copied):
    folder, (*_, state) = copied(), random_states("small1")
    save_file({f"{prefix}{key}": tensor for key, tensor in state.items()} | EXTRA
              | {f"{prefix}embeddings.position_ids": torch.arange(77)},
              folder / "text_encoder" / "model.safetensors")
    assert_same(load_clip(folder)[1], state)


@pytest.mark.parametrize("has_last_block", [False, True])
def test_openclips_tower_loads_without_its_last_block(has_last_block, random_states, tmp_path,
                                                      monkeypatch):
    """SD 2 reads 23 of 24 blocks, this small model 2 of 3; some files lack the last one."""
    monkeypatch.setattr(checkpoints, "SD2_TEXT_LAYERS", 2)
    state, prefix = random_states("small2")[2], "cond_stage_model.model."
    tower = {f"{prefix}{name}": torch.zeros(4, 4) for name in (
        "text_projection", "logit_scale", "attn_mask", "visual.proj")}
    parts = sorted((*RECORD["names"]["openclip"][key], key) for key in state)   # name, row, key
    for name, rows in itertools.groupby(parts, key=operator.itemgetter(0)):
        tower[name] = torch.cat([state[key] for *_, key in rows])               # q, k and v
    if has_last_block:
        tower |= {name.replace("resblocks.1", "resblocks.2"): 0 * tensor
                  for name, tensor in tower.items() if "resblocks.1" in name}
    save_file(tower, tmp_path / "sd2.safetensors")
    text_model = load_clip(tmp_path / "sd2.safetensors", BASE)[1]
    assert_same(text_model, state)
    assert text_model.config.layers == 2 and text_model.config.activation == "gelu"


# ---- rejected ------------------------------------------------------------------------------

PREFIX = "model.diffusion_model."
CONV_IN, TO_K = "input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("change, message", [
    ({"conditioner.embedders.0.transformer.x": (1,)}, "all.safetensors is an SDXL model"),
    ({PREFIX + TO_K: (32, 1280)}, "an SDXL refiner model"),
    ({PREFIX + TO_K: (32, 640)}, "an unknown model with text states of width 640"),
    *(({PREFIX + CONV_IN: (32, channels, 3, 3)}, f"all.safetensors is {kind} model")
      for channels, kind in checkpoints.OTHER_CHANNELS.items()),
    ({f"depth_model.{i}": (1,) for i in range(99)}, "99 unexpected tensors: depth_model.0; .* and "
                                                    "91 more"),
    ({"lora_unet_x": (1,)}, "1 unexpected tensors: lora_unet_x"),
])
def test_weights_of_another_model_are_rejected(change, message, random_states, tmp_path):
    """Names and shapes decide, so nearly all numbers are zeros that take no disk."""
    file, unet = tmp_path / "all.safetensors", random_states("small1")[0]
    shapes = {f"{PREFIX}{key}": tensor.shape for key, tensor in unet.items()}
    references.write_zeros(file, shapes | change)
    with pytest.raises(UserError, match=message):
        load_unet(file)


LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_clip,
           "scheduler": load_schedule}


@pytest.mark.parametrize("part, change, message", [
    ("unet", dict(only_cross_attention=[True] * 4, addition_embed_type="text_time",
                  cross_attention_dim=640), r"attn2.to_k.weight is \(32, 768\), not \(32, 640\)"),
    ("unet", dict(down_block_types=["AttnDownBlock2D"] * 4), "unexpected down_blocks.0.attentions"),
    ("unet", dict(layers_per_block=10**6), "4000000 layers in 684 tensors"),
    ("unet", dict(attention_head_dim=[8, 8]), "don't fit together"),
    ("unet", dict(norm_num_groups=48), "no UNet has these sizes"),
    ("unet", dict(use_linear_projection="yes"), "projection must be true or false, got 'yes'"),
    ("vae", dict(latents_mean=[0, 0, 0, 1]), "latents_mean must be None"),
    ("vae", dict(scaling_factor=float("nan")), "scaling_factor must be a number in .*, got nan"),
    ("text_encoder", dict(hidden_act="relu"), "hidden_act must be 'quick_gelu' or 'gelu', got"),
    ("text_encoder", dict(hidden_act=["gelu"]), "activation must be text, got"),
    ("text_encoder", dict(num_attention_heads=5), "must divide the width 768, got 5"),
    ("text_encoder", dict(num_hidden_layers=10**6), "1000000 layers"),
    ("scheduler", dict(prediction_type="sample"), "'epsilon' or 'v_prediction', got 'sample'"),
    ("scheduler", dict(prediction_type=["epsilon"]), "prediction_type must be text, got"),
    ("scheduler", dict(prediction_type=[]), "prediction_type must be text, got"),
    ("scheduler", dict(beta_end=12.0), "beta_start <= beta_end < 1, got 0.00085 and 12.0"),
])
def test_a_config_of_another_model_is_rejected_before_it_is_built(part, change, message, copied):
    path = copied()
    file = path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    write_json(read_json(file) | change, file)
    with pytest.raises(UserError, match=message):
        LOADERS[part](path)


@pytest.mark.parametrize("fixed", ["UNET_FIXED", "VAE_FIXED", "TEXT_FIXED", "SCHEDULE_FIXED"])
def test_every_key_that_would_change_the_graph_is_checked(fixed):
    implemented = getattr(checkpoints, fixed)
    for key in implemented:
        with pytest.raises(UserError, match=f"config.json: {key} must be .*, got 'other'"):
            checkpoints.check_values({key: "other"}, implemented, "config.json")


def test_the_option_for_what_a_single_file_lacks_is_named(name, random_states, sd_file, tmp_path):
    states, file = random_states(name), sd_file(name)
    if name == "small2":
        with pytest.raises(UserError, match="--prediction-type epsilon"):
            sample.load_base(file, BASE)
    assert load_schedule(file, "v_prediction").prediction_type == "v_prediction"
    with pytest.raises(UserError, match="which has no tokenizer. Add --tokenizer"):
        sample.load_base(file, prediction_type="epsilon")
    file, vae = tmp_path / "no_vae.safetensors", tmp_path / "vae.safetensors"
    save_file(single_file([states[0], {}, states[2]]), file)
    with pytest.raises(UserError, match="has no autoencoder. Add --vae"):
        sample.load_base(file, BASE, prediction_type="epsilon")
    save_file(states[1], vae)
    base = sample.load_base(file, BASE, vae_path=vae, prediction_type="epsilon")
    assert_same(base.vae, states[1])


def test_a_hub_name_and_parts_of_different_models_are_rejected(sd_folder, copied):
    with pytest.raises(UserError, match="someone/model is missing.*downloaded"):
        sample.load_base("someone/model")
    path = copied("small1")
    shutil.rmtree(path / "text_encoder")
    shutil.copytree(sd_folder("small2") / "text_encoder", path / "text_encoder")
    with pytest.raises(UserError, match="text states of width 1024.*needs 768"):
        sample.load_base(path)


def test_padding_follows_the_model_if_the_tokenizer_is_anothers(name, sd_folder, sd_file):
    """SD 1 pads with the end token, SD 2 with !; the embedded tokenizer is like SD 1's."""
    expected = "<|endoftext|>" if name == "small1" else "!"
    tokenizer, _ = load_clip(sd_file(name), BASE)
    assert tokenizer.pad == tokenizer.vocab[expected]
    own, _ = load_clip(sd_folder(name))
    assert own.pad == own.vocab["<|endoftext|>"]            # what the folder itself says


def test_an_autoencoder_alone_has_the_scaling_factor_of_its_base(tmp_path):
    save_file(load_vae(BASE).state_dict(), tmp_path / "vae.safetensors")
    for file in (tmp_path / "vae.safetensors", BASE / "vae/diffusion_pytorch_model.safetensors"):
        base = sample.load_base(BASE, vae_path=file)
        assert base.vae.config == load_vae(BASE).config     # a factor of 0.4319, not SD's 0.18215
    shutil.copytree(BASE / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    write_json(read_json(file) | dict(scaling_factor=0.25), file)
    with pytest.warns(UserWarning, match="scales latents by 0.25, but .* with 0.4319"):
        base = sample.load_base(BASE, vae_path=tmp_path / "vae")
    assert base.vae.config.scaling_factor == 0.25


def test_a_distilled_base_is_named_with_the_guidance_that_fits(copied):
    path = copied()
    write_json(references.SCHEDULE | dict(_class_name="LCMScheduler"),
               path / "scheduler" / "scheduler_config.json")
    with pytest.warns(UserWarning, match="is distilled .* --guidance 1 to 2 and --steps 4 to 8"):
        load_schedule(path)


# ---- drawing with them ---------------------------------------------------------------------

def test_a_base_alone_is_a_plain_sampler(sd_folder, sd_file, draw):
    def picture(base, *options):
        out = draw("--bps", "none", "--base", base, "--n", 1, "--size", "40x24", *options)
        return Image.open(next(out.iterdir()))          # of a latent of 3 x 5

    folder = sd_folder("small1")
    plain = picture(folder)
    stored = json.loads(plain.text["options"])
    assert plain.size == (40, 24) and stored["bps"] == ["none"] and stored["guidance"] == 7.5
    single = picture(sd_file("small1"), "--tokenizer", folder)
    assert single.tobytes() == plain.tobytes()
    seen = {plain.tobytes()}
    for option, value in dict(negative_prompt="a bowl", guidance=1.0, sampler="euler-karras",
                              prompt="a pear", prediction_type="v_prediction").items():
        changed = picture(folder, f"--{option.replace('_', '-')}={value}")
        assert json.loads(changed.text["options"])[option] == value
        seen.add(changed.tobytes())
    assert len(seen) == 6                   # each option changes the picture


def test_the_default_size_is_that_of_the_bases_training(sd_file):
    base = sample.load_base(BASE)
    assert sample.picture_size(None, [], base) == (64, 64)
    assert sample.picture_size((32, 48), [], base) == (32, 48)
    file = sd_file("small2")
    base = base._replace(unet=load_unet(file), vae=load_vae(file))
    for kind, side in (("epsilon", 512), ("v_prediction", 768)):
        single = base._replace(schedule=load_schedule(file, kind))
        assert sample.picture_size(None, [], single) == (side, side)
