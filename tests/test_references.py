"""The networks, names, token ids and samplers against what diffusers and transformers recorded."""
import json

import pytest
import references
import torch
from safetensors.torch import load_file

import clip
import diffusion
import weights
from inputs import checkpoints
from inputs.options import BASE

RECORDED = load_file(references.TENSORS)
FACTS = references.read_facts()


def relative(ours, theirs):
    """Returns the largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", ["small1", "small2"])
@torch.inference_mode()
def test_the_networks_give_the_recorded_outputs(name, random_states):
    model = references.MODELS[name]
    unet, vae, text = references.our_modules(model, meta=True)
    for module, state in zip((unet, vae, text), random_states(name)):
        module.load_state_dict(state, assign=True)
        module.eval()
    x, z = references.vae_inputs()
    latent, ids = vae.encode(x), references.text_ids(model["text"]["vocab_size"])
    outputs = dict(eps=unet(*references.unet_inputs(model["unet"])), mean=latent.mean,
                   std=latent.std, x=vae.decode(z), context=text(ids)[:, ::19],
                   context_skip2=text(ids, clip_skip=2)[:, ::19])
    for what, value in outputs.items():
        assert relative(value, RECORDED[f"{name}.{what}"]) < (5e-5 if what == "eps" else 1e-5), what


@pytest.mark.parametrize("part, count, folder_name", [
    ("unet", 686, lambda key: checkpoints.unet_folder_name(key, 2)),
    ("vae", 248, lambda key: checkpoints.vae_folder_name(key, 4)),
    ("text", 196, str)])
def test_every_name_of_sd15_is_renamed_as_diffusers_does_and_no_two_alike(part, count, folder_name):
    table = FACTS["names"][part]
    assert len(table) == count == len(set(table.values()))
    for single, folder in table.items():
        [key] = [single.removeprefix(prefix) for prefix in references.PREFIXES
                 if single.startswith(prefix)]
        assert folder_name(key) == folder


def test_every_name_of_sd2s_text_encoder_is_found_in_openclips_spelling():
    table = FACTS["names"]["openclip"]
    state = {name.removeprefix("cond_stage_model.model."): weights.Stored(
        None, name, (3 * 1024, 1024) if "in_proj" in name else (1024,))
        for name, _ in table.values()}
    split = checkpoints.split_in_proj(state, 1024)
    assert len(table) == 372                        # 23 blocks of 16 tensors, and four
    for key, (name, row) in table.items():
        stored = split.pop(checkpoints.openclip_name(key))
        assert stored.name == name
        assert stored.rows is None or (stored.rows.start, stored.rows.stop) == (row, row + 1024)
    assert not split


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.filterwarnings("ignore:prompt longer")
def test_300_prompts_of_every_kind_give_the_recorded_ids(pad, tmp_path):
    folder = BASE / "tokenizer"
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(pad_token=pad)))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    prompts = references.texts(300, references.words_of(vocab))
    ids = clip.load_tokenizer(tmp_path)(prompts).tolist()
    different = [prompt for prompt, ours, theirs in zip(prompts, ids, FACTS["tokens"][pad])
                 if ours != theirs]
    assert not different


@pytest.mark.parametrize("sampler", references.SAMPLERS)
@pytest.mark.parametrize("config", references.SCHEDULERS)
def test_a_trajectory_is_diffusers_for_each_scheduler_config(config, sampler, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(references.SCHEDULERS[config]))
    schedule = checkpoints.load_schedule(tmp_path)
    timesteps = diffusion.noise_ratios(10, schedule, sampler)[0].tolist()
    assert timesteps == pytest.approx(FACTS["timesteps"][f"{config}.{sampler}"], abs=5e-3)
    start = references.numbers(6, 1, 2, 1, 2).double()
    trajectory = torch.cat(list(diffusion.sample(references.predict, start, schedule, 10, sampler)))
    assert relative(trajectory, RECORDED[f"{config}.{sampler}"]) < 1e-4
