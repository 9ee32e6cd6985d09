"""Diffusers and transformers give the same numbers as our models: pytest -m peers -s.

The models have random weights, in small and at the sizes of SD 1.5 and SD 2.1. Prints the
differences. Besides requirements.txt, it needs diffusers, transformers, 10 GB of disk and memory,
and for the real vocabulary open_clip_torch.
"""
import gzip
import importlib.util
import itertools
from pathlib import Path
from unittest.mock import Mock

import pytest
import references
import torch
from test_references import relative

import clip
import diffusion
from bps import Condition, load_bps
from inputs.checkpoints import load_clip, load_tokenizer, load_unet, load_vae
from inputs.conditions import read_condition
from inputs.options import BASE, DEFAULT_BPS, DEFAULT_DRAWING
from measure.obedience import sketch
from sample import DEFAULT_PROMPT, draw
from studies.rival_networks import ControlNet, T2IAdapter

DDIM = diffusion.Sampling("ddim", 50, 3.0)
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Skip all tests if the peers are not installed."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")


@torch.no_grad()
def randomize(modules):
    """Move biases and norms away from their initial zeros and ones, in place."""
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return modules


@pytest.fixture(params=["small1", "small2", "sd15", "sd21"])
def peers(request, tmp_path):
    """(name, folder, diffusers' and transformers' modules) of a random model saved by them."""
    modules = randomize(references.peer_modules(references.MODELS[request.param]))
    for module, part in zip(modules, ("unet", "vae", "text_encoder")):
        module.save_pretrained(tmp_path / part, max_shard_size="100GB")
    yield request.param, tmp_path, modules
    for file in tmp_path.glob("*/*.safetensors"):
        file.unlink()                               # pytest keeps the folders of old runs


def vocabulary():
    """(vocab, merges) of CLIP, from the merges in open_clip_torch."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    text = gzip.decompress(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = [tuple(line.split()) for line in text.decode().split("\n")[1:49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    placeholders = range(256, 512 - len(printable))                 # for all other bytes
    letters = [chr(number) for number in (*printable, *placeholders)]
    tokens = (letters + [f"{letter}</w>" for letter in letters] + ["".join(m) for m in merges]
              + [clip.BEGIN, clip.END])
    return {token: i for i, token in enumerate(tokens)}, merges


def test_the_networks_are_exact(peers):
    name, folder, theirs = peers
    model = references.MODELS[name]
    expected = references.peer_outputs(theirs, model)
    vocab = {token: i for i, token in enumerate(
        [f"t{i}" for i in range(model["text"]["vocab_size"] - 2)] + [clip.BEGIN, clip.END])}
    references.write_tokenizer(folder / "tokenizer", vocab, [], clip.END)
    ours = load_unet(folder), load_vae(folder), load_clip(folder)[1]
    differences = {key: relative(value, expected[key])
                   for key, value in references.our_outputs(ours, model).items()}
    print(f"\n{name}:", ", ".join(f"{key} {value:.1e}" for key, value in differences.items()))
    for key, value in differences.items():
        assert value < (5e-5 if key == "eps" else 1e-5), key


@pytest.mark.parametrize("pad", [clip.END, "!"])
def test_2000_prompts_have_the_ids_of_transformers(pad, tmp_path):
    from transformers import CLIPTokenizerFast
    vocab, merges = vocabulary()
    references.write_tokenizer(tmp_path, vocab, merges, pad)
    ours = load_tokenizer(tmp_path)
    start = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ours(["a photo of a cat"])[0, :7].tolist() == start
    prompts = references.texts(2000, references.words_of(vocab))
    theirs = CLIPTokenizerFast(vocab=vocab, merges=merges, pad_token=pad)(
        prompts, padding="max_length", max_length=77, truncation=True).input_ids
    different = [prompt for prompt, a, b in zip(prompts, ours(prompts).tolist(), theirs) if a != b]
    print(f"\npad {pad}: {len(different)} of {len(prompts)} differ")
    assert not different


@pytest.mark.parametrize("prediction_type, spacing", list(itertools.product(
    ("epsilon", "v_prediction"), ("leading", "trailing", "linspace"))))
def test_whole_trajectories_are_those_of_diffusers(prediction_type, spacing):
    config = dict(references.SCHEDULERS["sd15"], prediction_type=prediction_type,
                  timestep_spacing=spacing)
    schedule = diffusion.NoiseSchedule(prediction_type=prediction_type, spacing=spacing)
    worst, start = 0.0, references.numbers(6, 1, 2, 1, 2).double()
    for sampler, steps in itertools.product(references.SAMPLERS, (1, 2, 5, 10, 20, 30, 50)):
        if sampler == "ddim" and (spacing == "linspace" or (spacing, steps) == ("trailing", 30)):
            continue        # diffusers takes the previous t from t - 1000 // n, not from its list
        _, theirs = references.peer_trajectory(config, sampler, steps, start)
        ours = torch.cat(list(diffusion.sample(references.predict, start, schedule, steps,
                                               sampler)))
        worst = max(worst, relative(ours, theirs))
    print(f"\n{prediction_type}, {spacing}: {worst:.1e}")
    assert worst < 1e-4


@torch.inference_mode()
def test_diffusers_draws_the_embedded_bases_picture(base):
    import diffusers
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    prompts = [DEFAULT_PROMPT, "teal robot, bottts style", ""]
    ids = base.tokenizer(prompts)
    assert torch.equal(ids, pipe.tokenizer(prompts, padding="max_length", max_length=77,
                                           return_tensors="pt").input_ids)
    context = base.encode(prompts)
    assert relative(context, pipe.text_encoder(ids)[0]) < 1e-5
    drawn = draw(base, context[:1], context[2:], [0], (64, 64), DDIM)
    assert (to_share(drawn) - drawn_by(pipe, 50)).abs().max() < 1 / 255


# ---- the recipe of docs/steer_diffusers.py ---------------------------------------------------

@pytest.fixture
def pipe():
    """A pipeline of the embedded base, ready to be steered."""
    import diffusers
    from docs.steer_diffusers import SteeredUNet
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = SteeredUNet(pipe.unet)
    return pipe


@pytest.fixture
def bps():
    """The included BPS, whose `.runs` notes its calls."""
    bps = load_bps(DEFAULT_BPS)
    bps.runs = Mock(return_value=None)
    bps.register_forward_hook(bps.runs)
    return bps


@pytest.fixture
def cond():
    """The included drawing as a condition (1, 1, 64, 64)."""
    return read_condition(DEFAULT_DRAWING, "sketch", 64, 64)[None]


def drawn_by(pipe, steps):
    """A pipeline's picture (1, 3, 64, 64) in [0, 1] of seed 0."""
    return pipe(DEFAULT_PROMPT, latents=diffusion.draw_noise([0], (4, 16, 16)), height=64, width=64,
                num_inference_steps=steps, guidance_scale=3.0, output_type="pt").images


def to_share(x):
    """Pictures in [0, 1] of pictures x."""
    return x.clamp(-1, 1) / 2 + 0.5


@torch.inference_mode()
@pytest.mark.parametrize("options", [
    {}, dict(strength=0.8, mask=torch.linspace(0, 1, 16).expand(1, 1, 16, 16))], ids=len)
def test_a_pipeline_draws_the_steered_picture_that_we_draw(options, pipe, bps, cond, base):
    pipe.unet.conditions = [Condition(bps, cond, **options)]
    theirs = drawn_by(pipe, 50)
    assert bps.runs.call_count == 50                        # once per timestep, for both passes
    z, t, context = torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 77, 128)
    torch.testing.assert_close(pipe.unet.unet(z, t, context).sample,        # unsteered again
                               base.unet(z, t, context), atol=1e-4, rtol=1e-4)
    drawn = draw(base, *base.encode([DEFAULT_PROMPT, ""]).split(1), [0], (64, 64), DDIM,
                 [Condition(bps, cond, **options)])
    difference = (to_share(drawn) - theirs).abs().max()
    print(f"\nsteered picture in [0, 1]: {difference:.1e}")
    assert difference < 1e-3


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
                                  "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"])
@torch.inference_mode()
def test_any_scheduler_of_diffusers_follows_the_condition(name, pipe, bps, cond):
    import diffusers
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    torch.manual_seed(0)                                    # for the ancestral one
    prior = sketch(drawn_by(pipe, 25) * 2 - 1, cond, None)["line F1"]
    pipe.unet.conditions = [Condition(bps, cond)]
    steered = sketch(drawn_by(pipe, 25) * 2 - 1, cond, None)["line F1"]
    print(f"\n{name}: line F1 {prior:.2f}, steered {steered:.2f}")
    assert bps.runs.call_count == 25 and steered > prior + 0.05


@pytest.mark.parametrize("peers", ["small1", "small2"], indirect=True)
@torch.inference_mode()
def test_the_rivals_are_wired_as_diffusers_wires_them(peers):
    """ControlNet and T2I-Adapter, with random weights where ours are zero."""
    from diffusers import ControlNetModel
    name, folder, (their_unet, *_) = peers
    unet = load_unet(folder)
    context_dim = references.MODELS[name]["unet"]["cross_attention_dim"]
    z_t, t = torch.randn(2, 4, 16, 8), torch.tensor([7, 801])
    context, cond = torch.randn(2, 77, context_dim), torch.rand(2, 3, 128, 64)
    rival, theirs = ControlNet(unet, 3, 8), ControlNetModel.from_unet(their_unet)
    encoder = theirs.controlnet_cond_embedding
    convolutions = [layer for layer in rival.hint if isinstance(layer, torch.nn.Conv2d)]
    torch.nn.init.normal_(convolutions[-1].weight, std=0.1)
    for ours, layer in zip(convolutions, [encoder.conv_in, *encoder.blocks, encoder.conv_out],
                           strict=True):
        layer.load_state_dict(ours.state_dict())
    zero_layers = [*theirs.controlnet_down_blocks, theirs.controlnet_mid_block]
    for ours, layer in zip([*rival.zero_convs, rival.zero_middle], zero_layers, strict=True):
        torch.nn.init.normal_(ours.weight, std=0.1)
        layer.load_state_dict(ours.state_dict())
    down, middle = theirs(z_t, t, context, cond, return_dict=False)
    expected = their_unet(z_t, t, context, down_block_additional_residuals=down,
                          mid_block_additional_residual=middle).sample
    eps = rival.predict(unet, z_t, t, context, rival(cond, None))
    adapter = T2IAdapter(unet, 3, 8)
    maps = adapter(cond, None)
    expected_of_adapter = their_unet(z_t, t, context,
                                     down_intrablock_additional_residuals=list(maps)).sample
    eps_of_adapter = adapter.predict(unet, z_t, t, context, maps)
    prior = unet(z_t, t, context)
    for method, ours, reference in (("ControlNet", eps, expected),
                                    ("T2I-Adapter", eps_of_adapter, expected_of_adapter)):
        difference = relative(ours, reference)
        print(f"\n{name}, {method}: {difference:.1e}, steered by {relative(prior, reference):.1e}")
        assert difference < 5e-5 < 1e-2 < relative(prior, reference)
