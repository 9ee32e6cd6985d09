"""Networks, names, token ids and samplers against outputs of diffusers and transformers."""
import json

import pytest
import references
import torch
from safetensors.torch import load_file

import diffusion
from inputs import checkpoints

RECORDED = load_file(references.TENSORS)
RECORD = references.read_record()


def relative(ours, theirs):
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", ["small1", "small2"])
def test_the_networks_give_the_recorded_outputs(name, random_states):
    model = references.MODELS[name]
    modules = references.our_modules(model, meta=True)
    for module, state in zip(modules, random_states(name)):
        module.load_state_dict(state, assign=True)
    for what, value in references.our_outputs(modules, model).items():
        value = value[:, ::19] if what == "context" else value
        assert relative(value, RECORDED[f"{name}.{what}"]) < (5e-5 if what == "eps" else 1e-5), what


def test_every_name_of_sd15_is_renamed_as_diffusers_does():
    modules = references.our_modules(references.MODELS["sd15"], meta=True)
    for part, module, prefix, count, folder_name in zip(
            ("unet", "vae", "text"), modules, references.PREFIXES, (686, 248, 196),
            (lambda key: checkpoints.unet_folder_name(key, 2),
             lambda key: checkpoints.vae_folder_name(key, 4), str)):
        table = RECORD["names"][part]
        assert len(table) == count == len(set(table.values()))
        assert {f"{prefix}{key}": folder_name(key) for key in module.state_dict()} == table


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.filterwarnings("ignore:prompt longer")
def test_300_prompts_of_every_kind_give_the_recorded_ids(pad, tmp_path):
    vocab, merges = references.base_tokenizer()
    references.write_tokenizer(tmp_path, vocab, merges, pad)
    prompts = references.texts(300, references.words_of(vocab))
    ids = checkpoints.load_tokenizer(tmp_path)(prompts).tolist()
    different = [prompt for prompt, ours, theirs in zip(prompts, ids, RECORD["tokens"][pad])
                 if ours != theirs]
    assert not different


@pytest.mark.parametrize("sampler", references.SAMPLERS)
@pytest.mark.parametrize("config", references.SCHEDULERS)
def test_a_trajectory_is_diffusers_for_each_scheduler_config(config, sampler, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(references.SCHEDULERS[config]))
    schedule = checkpoints.load_schedule(tmp_path)
    timesteps = diffusion.sampler_steps(10, schedule, sampler)[0]
    assert timesteps == pytest.approx(RECORD["timesteps"][f"{config}.{sampler}"], abs=5e-3)
    start = references.numbers(6, 1, 2, 1, 2).double()
    trajectory = torch.cat(list(diffusion.sample(references.predict, start, schedule, 10, sampler)))
    assert relative(trajectory, RECORDED[f"{config}.{sampler}"]) < 1e-4
