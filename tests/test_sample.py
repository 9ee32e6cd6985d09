"""Drawing from the command line: what a picture depends on, and what it stores."""
import hashlib
import json
import shlex
import shutil
from unittest.mock import Mock

import drawings
import numpy as np
import pytest
import references
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

import diffusion
import sample
from bps import BPS, BPSConfig, Condition, load_bps
from inputs import options, pictures
from inputs.conditions import crop, open_image, read_mask, to_x
from inputs.options import DEFAULT_BPS, DEFAULT_DRAWING
from tiny import world
from unet import UNet
from weights import UserError


@pytest.fixture
def ring(tmp_path):
    """A drawing of a ring."""
    drawings.ring(64, 64).save(tmp_path / "ring.png")
    return tmp_path / "ring.png"


# ---- what a picture depends on -------------------------------------------------------------

def test_a_picture_depends_on_its_own_seed_alone(draw, pixels):
    three, one = draw("--n", 3, "--seed", 5), draw("--n", 1, "--seed", 6)
    assert sorted(f.name for f in three.glob("0*.png")) == ["0005.png", "0006.png", "0007.png"]
    assert np.array_equal(pixels(three / "0006.png"), pixels(one / "0006.png"))
    assert not np.array_equal(pixels(three / "0005.png"), pixels(three / "0006.png"))


def test_strength_zero_is_the_base_bit_for_bit(picture):
    zero, half, one = (picture("--strength", strength) for strength in (0, 0.5, 1))
    assert np.array_equal(zero, picture("--bps", "none", "--size", 64))
    assert not np.array_equal(zero, one) and not np.array_equal(half, one)


def test_a_window_steers_a_part_of_the_denoising(picture):
    whole, first, second = (picture("--window", *window) for window in ((0, 1), (0, 0.4), (0.4, 1)))
    assert not np.array_equal(first, whole) and not np.array_equal(first, second)
    assert not np.array_equal(first, picture("--bps", "none", "--size", 64))


def test_a_window_without_a_step_is_refused(draw, refused):
    # two steps are at t = 999 and 500: the last tenth contains neither
    assert "--window must contain a step, got 0.9 1" in refused(draw, "--window", 0.9, 1)
    assert "--window must contain a step, got 0 0.4" in refused(
        draw, "--window", 0, 0.4, "--init", DEFAULT_DRAWING, "--denoise", 0.5)


def test_a_cond_for_each_picture_needs_one_batch(base):
    text = base.encode(["person"])
    conds = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    bps = load_bps(DEFAULT_BPS)

    def draw(conds, seeds, **batch):
        sampling = diffusion.Sampling(steps=2)
        return sample.draw(base, text, text, seeds, (64, 64), sampling, [Condition(bps, conds)],
                           **batch)

    both = draw(conds, [3, 4])
    torch.testing.assert_close(both[1:], draw(conds[1:], [4]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="batch must be None"):
        draw(conds, [3, 4], batch=1)


def test_conditions_add_up_in_any_order(draw, picture, pixels, bps_file, ring):
    both = draw("--n", 1, "--bps", bps_file, DEFAULT_BPS, "--cond", DEFAULT_DRAWING, ring,
                "--strength", 0.5, 1)
    assert sorted(file.name for file in both.iterdir()) == [
        "0000.png", "condition1.png", "condition2.png"]
    swapped = picture("--bps", DEFAULT_BPS, bps_file, "--cond", ring, DEFAULT_DRAWING,
                      "--strength", 1, 0.5)
    assert np.array_equal(pixels(both / "0000.png"), swapped)
    assert not np.array_equal(swapped, picture("--strength", 0.5))


def test_an_option_that_is_given_once_counts_for_all_conditions(picture, bps_file, ring):
    conditions = "--bps", bps_file, DEFAULT_BPS, "--cond", DEFAULT_DRAWING, ring
    once = picture(*conditions, "--strength", 0.5, "--window", 0, 0.5)
    each = picture(*conditions, "--strength", 0.5, 0.5, "--window", 0, 0.5, 0, 0.5)
    assert np.array_equal(once, each)


def test_a_batch_draws_the_same_pictures_up_to_rounding(draw, pixels, monkeypatch):
    alone, sizes, forward = draw("--n", 3, "--seed", 5), [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, z, *rest: (
        sizes.append(len(z)), forward(self, z, *rest))[1])
    for batch in (2, 8):                                    # 2 + 1, and more than there are
        together = draw("--n", 3, "--seed", 5, "--batch", batch)
        for name in ("0005.png", "0006.png", "0007.png"):
            difference = pixels(alone / name).astype(int) - pixels(together / name)
            assert np.abs(difference).max() <= 1
    assert sizes == [4, 2] * 2 + [6] * 2                    # two steps, both passes of guidance


def test_a_group_shares_passes_of_bps_and_is_written_as_it_finishes(draw, tmp_path, monkeypatch):
    out, calls, forward = tmp_path / "groups", [], BPS.forward

    def noted(bps, cond, t_emb):
        calls.append((len(cond), len(list(out.glob("00*.png")))))
        return forward(bps, cond, t_emb)

    monkeypatch.setattr(BPS, "forward", noted)
    monkeypatch.setattr(sample, "SIDE_BY_SIDE", 2)
    draw("--n", 5, "--out", out)
    assert calls == [(1, 0)] * 2 + [(1, 2)] * 2 + [(1, 4)] * 2          # two steps of three groups
    calls.clear()
    draw("--n", 5, "--out", out, "--seed", 10, "--batch", 5)
    assert len(calls) == 2                                              # one group, one batch


def test_a_start_is_the_pictures_latent_with_the_noise_of_its_step(draw, base, monkeypatch):
    noted = Mock(side_effect=diffusion.sample)
    monkeypatch.setattr(diffusion, "sample", noted)
    for share in (0.3, 1):
        draw("--n", 1, "--steps", 10, "--sampler", "ddim", "--init", DEFAULT_DRAWING,
             "--denoise", share)
    (_, z_t, *_, start), (_, all_noise, *_, first) = (call.args for call in noted.call_args_list)
    noise = diffusion.draw_noise([0], (4, 16, 16))
    x = to_x(crop(open_image(DEFAULT_DRAWING), 64, 64))[None]
    z_init = base.vae.encode(x).mean
    assert start == 7 and first == 0
    expected = diffusion.NoiseSchedule().add_noise(z_init, noise, torch.tensor([201]))
    torch.testing.assert_close(z_t, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(all_noise, noise)


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
def test_a_narrower_dtype_draws_nearly_the_same_picture(dtype, picture):
    exact, rounded = (picture("--steps", 5, "--dtype", name).astype(float)
                      for name in ("fp32", dtype))
    assert 0 < np.abs(exact - rounded).mean() < 5           # of 255


def test_the_autoencoder_stays_float32():
    base = sample.load_base(options.BASE, dtype=torch.float16)
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    for module in (base.unet, base.text_model):
        assert {p.dtype for p in module.parameters()} == {torch.float16}


# ---- masks ---------------------------------------------------------------------------------

@pytest.fixture
def mask(tmp_path):
    """A function that writes a mask of 40 x 40 px, white from a column on, and returns its file."""
    def write(white_from, name="mask.png", size=(40, 40)):
        image = Image.new("L", size)
        image.paste(255, (white_from, 0, *size))
        image.save(tmp_path / name)
        return tmp_path / name

    return write


def test_a_white_mask_is_none_and_half_a_mask_is_in_between(picture, mask):
    white, half, steered = (
        picture("--mask", given) for given in (mask(0, "w.png"), mask(20, "h.png"), "none"))
    assert np.array_equal(white, steered) and not np.array_equal(half, steered)
    assert not np.array_equal(half, picture("--bps", "none", "--size", 64))


def test_a_mask_covers_the_picture_and_is_averaged_per_latent_pixel(mask, tmp_path):
    assert torch.equal(read_mask(mask(48, size=(80, 40)), 40, 40, 4)[0, 0, 0],
                       torch.tensor([0.0] * 7 + [1.0] * 3))       # the middle 40 of 80 columns
    shares = read_mask(mask(22), 40, 40, 4)[0, 0]                 # 2 of 4 columns
    assert shares.shape == (10, 10)
    torch.testing.assert_close(shares[3], torch.tensor([0.0] * 5 + [0.5] + [1.0] * 4), atol=0.01,
                               rtol=0)
    tall = read_mask(mask(20), 24, 48, 4)[0, 0]                   # its middle 12 .. 28 columns
    assert tall.shape == (12, 6) and torch.equal(tall[5], torch.tensor([0.0] * 3 + [1.0] * 3))
    erased = Image.new("LA", (8, 8), (255, 255))
    erased.paste((255, 0), (0, 0, 4, 8))
    erased.save(tmp_path / "erased.png")
    assert read_mask(tmp_path / "erased.png", 40, 40, 4)[0, 0, 0].tolist() == [0.0] * 5 + [1.0] * 5


# ---- what a picture stores -----------------------------------------------------------------

def test_a_png_stores_how_it_was_drawn(draw, bps_file):
    file = draw("--n", 1, "--prompt", "a grüne pear", "--guidance", 2.5) / "0000.png"
    text = Image.open(file).text
    stored, files = json.loads(text["options"]), json.loads(text["files"])
    assert text["prompt"] == stored["prompt"] == "a grüne pear" and text["seed"] == "0"
    assert (stored["guidance"], stored["steps"], stored["sampler"]) == (2.5, 2, "dpm++2m")
    assert stored["bps"] == [str(bps_file)] and "cond" not in stored    # the included drawing
    assert stored.keys() <= set(pictures.STORED)
    for key, source in (("base", options.BASE / "unet" / "diffusion_pytorch_model.safetensors"),
                        ("vae", options.BASE / "vae" / "diffusion_pytorch_model.safetensors"),
                        ("text", options.BASE / "text_encoder" / "model.safetensors"),
                        ("bps 1", bps_file), ("cond 1", DEFAULT_DRAWING)):
        assert files.pop(key) == hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    assert files.keys() == {"config"}                       # all configs and vocabularies
    included = Image.open(draw("--n", 1, bps=DEFAULT_BPS) / "0000.png").text
    assert str(options.ROOT) not in included["command"]     # so the project's folder may move


def test_a_picture_is_drawn_again_from_itself(draw, run_script, pixels, ring, mask, bps_file,
                                              tmp_path, capsys):
    out = draw("--n", 2, "--seed", 3, "--prompt", "-a 'grüne' pear", "--negative-prompt", "a cup",
               "--bps", bps_file, DEFAULT_BPS, "--cond", DEFAULT_DRAWING, ring,
               "--strength", 0.5, 1, "--window", 0, 0.8, 0, 1, "--mask", mask(20), "none",
               "--sampler", "euler", "--init", DEFAULT_DRAWING, "--denoise", 0.4, "--steps", 5,
               "--size", "48x80")
    again = draw("--from", out / "0004.png")
    assert [file.name for file in again.glob("0*.png")] == ["0004.png"]
    assert np.array_equal(pixels(out / "0004.png"), pixels(again / "0004.png"))
    third = draw("--from", out / "0004.png", "--seed", 3, "--n", 1)
    assert np.array_equal(pixels(out / "0003.png"), pixels(third / "0003.png"))
    command = shlex.split(Image.open(out / "0004.png").text["command"])
    assert command[:2] == ["python", "sample.py"]
    run_script(sample, *command[2:], "--device", "cpu", "--out", tmp_path / "c")
    assert np.array_equal(pixels(out / "0004.png"), pixels(tmp_path / "c" / "0004.png"))
    named = draw("--from", out / "0004.png", "--prompt", "sampler")        # a value, no option
    assert "euler" in Image.open(named / "0004.png").text["command"]
    capsys.readouterr()
    ImageOps.invert(Image.open(ring)).save(ring)
    draw("--from", out / "0004.png")
    assert "was drawn with another cond 2 file" in capsys.readouterr().err
    draw("--from", out / "0004.png", "--cond", DEFAULT_DRAWING, ring)
    assert "another cond" not in capsys.readouterr().err


def write_png(file, **fields):
    info = PngImagePlugin.PngInfo()
    for key, value in fields.items():
        info.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


def test_a_picture_does_not_decide_where_files_are_written(draw, tmp_path):
    stored = json.dumps(dict(out=str(tmp_path / "theirs"), steps=1, bps=["none"]))
    write_png(tmp_path / "a.png", options=stored, files="{}")
    out = draw("--from", tmp_path / "a.png", "--n", 1)
    assert (out / "0000.png").is_file() and not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("stored, message", [
    ("[]", "does not say how it was drawn"), ("[" * 10**5, "does not say how it was drawn"),
    ('{"window": [null]}', "must be a number in [0, 1], got None"),
    ('{"sampler": "none"}', "invalid choice: 'none'"),
    ('{"prompt": ["a", "-h"]}', "does not say how it was drawn (-h is not a value"),
    ('{"bps": ["none", "--out=theirs"]}', "does not say how it was drawn (--out=theirs is not"),
    ('{"prompt": ["a", "--out=theirs"]}', "does not say how it was drawn (--out=theirs is not")])
def test_stored_options_that_make_no_sense_are_refused(draw, refused, tmp_path, stored, message):
    write_png(tmp_path / "a.png", options=stored, files="{}")
    assert message in refused(draw, "--from", tmp_path / "a.png")


# ---- which files are written ---------------------------------------------------------------

def test_no_existing_file_is_overwritten(draw, tmp_path):
    existing = {tmp_path / "condition.png": DEFAULT_DRAWING.read_bytes(),
                tmp_path / "0000.png": b"not a picture",
                tmp_path / "0000-2.png": b""}                       # reserved by another program
    for file, content in existing.items():
        file.write_bytes(content)
    for steps in (2, 3):
        draw("--n", 1, "--cond", tmp_path / "condition.png", "--steps", steps, "--out", tmp_path)
    assert {file: file.read_bytes() for file in existing} == existing
    new = {file.name for file in tmp_path.glob("*.png")} - {file.name for file in existing}
    assert new == {"0000-3.png", "0000-4.png", "condition-2.png", "condition-3.png"}


def test_only_missing_pictures_are_drawn_again(draw, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "conditions", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b[1]"):
        shutil.copy(DEFAULT_DRAWING, folder / f"{name}.png")
    out.mkdir()
    (out / "b[1]-0000.png").write_text("of another program")
    draw("--cond", folder, "--n", 2, "--out", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "b[1]-0001.png").unlink()
    drawn = Mock(side_effect=sample.draw)
    monkeypatch.setattr(sample, "draw", drawn)
    capsys.readouterr()
    draw("--cond", folder, "--n", 2, "--out", out)
    assert [call.args[3] for call in drawn.call_args_list] == [[1]]             # the seeds
    assert capsys.readouterr().out.count("already drawn") == 3
    assert {name: (out / name).read_bytes() for name in before} == before
    draw("--cond", folder, "--n", 2, "--steps", 3, "--out", out)    # another command
    assert (out / "a-0000-2.png").exists()


def test_conditions_are_read_before_the_first_picture(draw, refused, tmp_path):
    folder = tmp_path / "conditions"
    folder.mkdir()
    shutil.copy(DEFAULT_DRAWING, folder / "a.png")
    Image.new("RGB", (64, 64), "white").save(folder / "b.png")
    assert "b.png has no line" in refused(draw, "--cond", folder, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_of_conditions_is_drawn_each_with_its_own_prompt(draw, picture, pixels, refused,
                                                                  tmp_path, bps_file):
    folder, other_folder = tmp_path / "drawings", tmp_path / "others"
    folder.mkdir()
    for name in ("apple", "pear"):
        shutil.copy(DEFAULT_DRAWING, folder / f"{name}.png")
    (folder / "pear.txt").write_text("a pear\n")
    (folder / "._pear.png").write_bytes(b"left by a Mac")
    out = draw("--n", 2, "--cond", folder, "--prompt", "a red apple")
    assert sorted(file.name for file in out.iterdir()) == [
        "apple-0000.png", "apple-0001.png", "apple-condition.png", "pear-0000.png",
        "pear-0001.png", "pear-condition.png"]
    assert Image.open(out / "pear-0000.png").text["prompt"] == "a pear"
    single = picture("--cond", folder / "apple.png", "--prompt", "a red apple")
    assert np.array_equal(pixels(out / "apple-0000.png"), single)
    shutil.copytree(folder, other_folder)
    (other_folder / "pear.png").rename(other_folder / "plum.png")
    two = "--bps", bps_file, bps_file, "--cond", folder, other_folder
    assert "only one has pear" in refused(draw, *two)
    (folder / "pear.txt").write_bytes("Birne, grün".encode("latin-1"))
    assert "pear.txt must be UTF-8" in refused(draw, "--cond", folder)


# ---- what does not belong together ---------------------------------------------------------

@pytest.mark.parametrize("config, metadata, message", [
    (dict(channels=(32, 64, 96), norm_groups=8), {}, "for channels"),
    (dict(blocks_per_level=2), {}, "for blocks per level"),
    ({}, dict(context_dim=768), "for text width 768, but"),
    ({}, dict(prediction_type="v_prediction"), "for prediction type v_prediction, but"),
    ({}, dict(task="layout"), "does not say what it was trained for"),
    ({}, dict(task="nonsense"), "does not say what it was trained for"),
    ({}, dict(size=66), "size must be a multiple of 4 with at most 16,777,216 pixels, got 66"),
    ({}, dict(size=20_000), "pixels, got 20000"),
])
def test_a_bps_that_does_not_fit_is_refused(config, metadata, message, base):
    sizes = dict(channels=(64, 128, 192), factor=4, blocks_per_level=1,
                 input_weights=(16.0, 8.0, 4.0))
    bps = BPS(BPSConfig(**sizes | config))
    bps.metadata = dict(task="sketch", size=64, context_dim=128) | metadata
    with pytest.raises(UserError, match=f"bps.safetensors.* {message}"):
        sample.check_fit(bps, "bps.safetensors", base)


def test_a_bps_of_other_weights_draws_with_a_note(draw, capsys):
    draw("--n", 1)                      # the fixture's file names no base
    assert "was trained on other weights" in capsys.readouterr().err


def test_a_note_names_words_and_sizes_that_are_new_to_the_embedded_base(draw, base, capsys):
    sample.note_unlearned(map(world.full_caption, world.figures("train")), (64, 64), base)
    assert capsys.readouterr().err == ""
    draw("--n", 1, "--prompt", "a Cat, red hair", "--size", "64x32")
    notes = [line for line in capsys.readouterr().err.splitlines() if "embedded base" in line]
    assert "does not know Cat." in notes[0] and "trained at 64x64 only" in notes[1]


def test_a_class_that_was_not_trained_on_is_refused(draw, refused, tmp_path):
    file, image = tmp_path / "boxes.safetensors", Image.new("RGB", (100, 60))
    references.write_random_bps(file, "layout", classes={"#000000": "ground", "#ff0000": ""})
    ImageDraw.Draw(image).rectangle((10, 10, 40, 40), fill=(255, 0, 0))
    image.save(tmp_path / "a.png")
    out = draw("--bps", file, "--cond", tmp_path / "a.png", "--n", 1)
    colours = {colour for _, colour in Image.open(out / "condition.png").getcolors()}
    assert colours == {(0, 0, 0), (255, 0, 0)}                  # scaled, and none in between
    image.putpixel((5, 5), (0, 0, 255))
    image.save(tmp_path / "a.png")
    line = refused(draw, "--bps", file, "--cond", tmp_path / "a.png")
    assert "class #0000ff is unknown" in line
    assert "--cond is missing" in refused(draw, "--bps", file)
