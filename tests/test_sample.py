"""Drawing from the command line: what a picture depends on, and what it remembers."""
import hashlib
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import sample
import steer
from bps import BPS, BPSConfig, save_bps
from conditions import DataError, read_drawing
from weights import WeightsError


@pytest.fixture
def draw(tmp_path, monkeypatch, bps_file):
    """Runs sample.main() with arguments; returns the folder of its pictures."""
    counter = iter(range(100))

    def run(*arguments):
        out = tmp_path / str(next(counter))
        monkeypatch.setattr(sys, "argv", ["sample.py", "--bps", str(bps_file), "--steps", "2",
                                          "--device", "cpu", "--out", str(out),
                                          *map(str, arguments)])
        sample.main()
        return out

    return run


def pixels(file):
    return np.asarray(Image.open(file))


def test_a_picture_depends_on_its_own_seed_alone(draw):
    three, one = draw("--n", 3, "--seed", 5), draw("--n", 1, "--seed", 6)
    assert sorted(f.name for f in three.glob("0*.png")) == ["0005.png", "0006.png", "0007.png"]
    assert np.array_equal(pixels(three / "0006.png"), pixels(one / "0006.png"))
    assert not np.array_equal(pixels(three / "0005.png"), pixels(three / "0006.png"))


def test_a_row_of_noise_is_that_of_its_seed():
    both = steer.draw_noise([3, 4], (4, 5, 6))
    assert torch.equal(both[1:], steer.draw_noise([4], (4, 5, 6)))
    assert not torch.equal(both[0], both[1])


def test_a_png_remembers_how_it_was_drawn(draw, bps_file):
    file = draw("--n", 1, "--prompt", "a grüne pear", "--guidance", 2.5) / "0000.png"
    text = Image.open(file).text
    assert text["prompt"] == "a grüne pear" and text["guidance"] == "2.5"
    assert text["seed"] == "0" and text["steps"] == "2" and text["sampler"] == "ddim"
    tiny = cli.BASE.parent
    for key, source in (("base", cli.BASE / "unet" / "diffusion_pytorch_model.safetensors"),
                        ("bps", bps_file), ("drawing", tiny / "drawing.png")):
        assert text[key] == hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def test_nothing_that_is_there_is_overwritten(draw, tmp_path):
    drawing = tmp_path / "condition.png"
    shutil.copy(cli.BASE.parent / "drawing.png", drawing)
    before = drawing.read_bytes()
    for _ in range(2):
        draw("--n", 1, "--cond", drawing, "--out", tmp_path)
    assert drawing.read_bytes() == before
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "0000-2.png", "0000-3.png", "condition-2.png", "condition-3.png", "condition.png"]


def test_a_long_prompt_is_one_line_of_warning(draw, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    cli.run(lambda: draw("--n", 1, "--prompt", "a grüne pear " * 40))
    warned = [line for line in capsys.readouterr().err.splitlines() if "pear" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: prompt longer than 75 tokens")
    assert "grüne" in warned[0]


@pytest.mark.parametrize("error, code, line", [
    (WeightsError("bad.safetensors: truncated"), 2, "error: bad.safetensors: truncated"),
    (DataError("pairs: empty"), 2, "error: pairs: empty"),
    (FileExistsError(17, "File exists", "README.md"), 2, "error: [Errno 17] File exists"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_a_script_ends_in_one_line_and_an_exit_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err.strip().startswith(line)


def test_a_bps_of_other_weights_draws_with_a_note(draw, capsys):
    draw("--n", 1)                      # the fixture's file names no base
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize("config, context_dim, message", [
    (BPSConfig(channels=(32, 64, 96), factor=4, norm_groups=8), 128, "channels"),
    (BPSConfig(channels=(64, 96, 128), factor=4, blocks_per_level=2), 128, "blocks per level"),
    (BPSConfig(channels=(64, 96, 128), factor=4, blocks_per_level=1), 768, "text width"),
])
def test_a_bps_of_another_base_is_refused(config, context_dim, message, draw, tmp_path):
    file = tmp_path / "other.safetensors"
    save_bps(BPS(config), file, dict(size=64, context_dim=context_dim))
    with pytest.raises(WeightsError, match=f"other.safetensors.*{message}"):
        draw("--bps", file)


def test_a_bps_trained_to_steer_another_prediction_is_refused(draw, tmp_path, bps_file):
    bps = sample.load_bps(bps_file)
    file = tmp_path / "v.safetensors"
    save_bps(bps, file, bps.metadata | dict(prediction_type="v_prediction"))
    with pytest.raises(WeightsError, match="prediction type v_prediction, but .* has epsilon"):
        draw("--bps", file)


def test_a_damaged_bps_file_is_refused(draw, tmp_path, bps_file):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(bps_file.read_bytes().replace(b'"F16"', b'"F99"'))
    with pytest.raises(WeightsError, match="bad.safetensors: not a BPS file"):
        draw("--bps", file)


def test_scale_zero_is_the_prior_and_scale_one_is_not(draw, monkeypatch):
    zero, one = (pixels(draw("--n", 1, "--scale", s) / "0000.png") for s in (0, 1))
    assert not np.array_equal(zero, one)
    monkeypatch.setattr(steer.Steering, "__call__", lambda *_: None)      # the base alone
    assert np.array_equal(zero, pixels(draw("--n", 1, "--scale", 1) / "0000.png"))


@torch.inference_mode()
def test_the_strength_tempers_the_posterior_linearly(bps_file):
    unet, vae, tokenizer, text_model, _ = sample.load_base(cli.BASE)
    bps = sample.load_bps(bps_file)
    context, empty = text_model(tokenizer(["a red apple", ""])).split(1)
    cond, _ = read_drawing(cli.BASE.parent / "drawing.png", 64, 64)
    steering = steer.Steering(bps, unet, cond[None])
    z_t = torch.randn(1, 4, 16, 16)
    prior, half, full = (steer.make_denoiser(unet, context, empty, 3.0, steering, s)(z_t, 500)
                         for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (prior + full) / 2, atol=1e-4, rtol=1e-4)
    assert (full - prior).abs().max() > 0.01


@torch.inference_mode()
def test_bps_runs_once_per_timestep_whatever_the_number_of_seeds(draw, monkeypatch):
    calls = []
    forward = BPS.forward

    def counted(self, cond, t_emb):
        calls.append(len(cond))
        return forward(self, cond, t_emb)

    monkeypatch.setattr(BPS, "forward", counted)
    draw("--n", 3)
    assert calls == [1, 1]          # two steps, condition batch 1, serving both guidance halves


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_narrower_dtype_draws_nearly_the_same_picture(dtype, draw):
    exact, rounded = (pixels(draw("--n", 1, "--steps", 10, "--dtype", name) / "0000.png")
                      for name in ("fp32", dtype))
    difference = np.abs(exact.astype(float) - rounded)
    assert 0 < difference.mean() < 5            # of 255


def test_the_autoencoder_stays_float32():
    unet, vae, _, text_model, _ = sample.load_base(cli.BASE, dtype=torch.float16)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    for module in (unet, text_model):
        assert {p.dtype for p in module.parameters()} == {torch.float16}


def test_numbers_that_ran_over_are_an_error_not_a_black_picture(draw, monkeypatch):
    monkeypatch.setattr(sample.diffusion, "guide", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(WeightsError, match="--dtype fp16: too narrow.*give --dtype bf16"):
        draw("--dtype", "fp16")


def test_guidance_one_needs_half_the_work(draw, monkeypatch):
    batches = []
    monkeypatch.setattr(sample, "load_base", counting(sample.load_base, batches))
    draw("--n", 1, "--guidance", 1)
    draw("--n", 1, "--guidance", 2)
    assert batches == [1, 1, 2, 2]


def counting(load_base, batches):
    """Returns a load_base whose U-Net notes the batch of each of its calls."""
    def load(*arguments):
        base = load_base(*arguments)
        base[0].register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
        return base

    return load
