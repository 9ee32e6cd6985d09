"""Drawing from the command line: what a picture depends on, and what it remembers."""
import hashlib
import json
import shlex
import shutil
import sys

import numpy as np
import pytest
import references
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

import diffusion
import sample
from bps import BPS, BPSConfig, Steering, config_for, load_bps, save_bps
from inputs import options
from inputs.conditions import crop, open_image, read_mask, to_x
from inputs.sample_options import DEFAULT_DRAWING
from measure.report import load_fitting
from unet import UNet, load_unet
from vae import load_vae
from weights import UserError


@pytest.fixture
def draw(tmp_path, monkeypatch, bps_file):
    """Runs sample.main() with arguments; returns the folder of its pictures."""
    counter = iter(range(100))

    def run(*arguments, bps=bps_file):
        out = tmp_path / str(next(counter))
        given = [] if "--bps" in arguments else ["--bps", bps]
        monkeypatch.setattr(sys, "argv", ["sample.py", "--steps", "2", "--device", "cpu", "--out",
                                          *map(str, (out, *given, *arguments))])
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


def test_a_png_remembers_how_it_was_drawn(draw, bps_file):
    file = draw("--n", 1, "--prompt", "a grüne pear", "--guidance", 2.5) / "0000.png"
    text = Image.open(file).text
    assert text["prompt"] == "a grüne pear" and text["guidance"] == "2.5"
    assert text["seed"] == "0" and text["steps"] == "2" and text["sampler"] == "dpm++2m"
    files = json.loads(text["files"])
    for key, source in (("base", options.BASE / "unet" / "diffusion_pytorch_model.safetensors"),
                        ("vae", options.BASE / "vae" / "diffusion_pytorch_model.safetensors"),
                        ("text", options.BASE / "text_encoder" / "model.safetensors"),
                        ("bps 1", bps_file), ("cond 1", DEFAULT_DRAWING)):
        assert files.pop(key) == hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    assert not files


def test_nothing_that_is_there_is_overwritten(draw, tmp_path):
    drawing = tmp_path / "condition.png"
    shutil.copy(DEFAULT_DRAWING, drawing)
    before = drawing.read_bytes()
    for _ in range(2):
        draw("--n", 1, "--cond", drawing, "--out", tmp_path)
    assert drawing.read_bytes() == before
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "0000-2.png", "0000-3.png", "condition-2.png", "condition-3.png", "condition.png"]


def test_a_long_prompt_is_one_line_of_warning(draw, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    options.run(lambda: draw("--n", 1, "--prompt", "a grüne pear " * 40))
    warned = [line for line in capsys.readouterr().err.splitlines() if "pear" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: prompt longer than 75 tokens")
    assert "grüne" in warned[0]


@pytest.mark.parametrize("error, code, line", [
    (UserError("bad.safetensors: truncated"), 2, "error: bad.safetensors: truncated"),
    (UserError("pairs: empty"), 2, "error: pairs: empty"),
    (FileExistsError(17, "File exists", "README.md"), 2, "error: [Errno 17] File exists"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_a_script_ends_in_one_line_and_an_exit_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        options.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err.strip().startswith(line)


def test_a_bps_of_other_weights_draws_with_a_note(draw, capsys):
    draw("--n", 1)                      # the fixture's file names no base
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize("config, context_dim, message", [
    (BPSConfig(channels=(32, 64, 96), factor=4, norm_groups=8), 128, "channels"),
    (BPSConfig(channels=(64, 128, 192), factor=4, blocks_per_level=2), 128, "blocks per level"),
    (BPSConfig(channels=(64, 128, 192), factor=4, blocks_per_level=1), 768, "text width"),
])
def test_a_bps_of_another_base_is_refused(config, context_dim, message, draw, tmp_path):
    file = tmp_path / "other.safetensors"
    save_bps(BPS(config), file, dict(size=64, context_dim=context_dim))
    with pytest.raises(UserError, match=f"other.safetensors.*{message}"):
        draw("--bps", file)


def test_a_bps_trained_to_steer_another_prediction_is_refused(draw, tmp_path, bps_file):
    bps = load_bps(bps_file)
    file = tmp_path / "v.safetensors"
    save_bps(bps, file, bps.metadata | dict(prediction_type="v_prediction"))
    with pytest.raises(UserError, match="prediction type v_prediction, but .* has epsilon"):
        draw("--bps", file)


def test_a_damaged_bps_file_is_refused(draw, tmp_path, bps_file):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(bps_file.read_bytes().replace(b'"F16"', b'"F99"'))
    with pytest.raises(UserError, match="bad.safetensors: not a safetensors file"):
        draw("--bps", file)


@pytest.mark.parametrize("option", ["--scale", "--strength"])
def test_at_zero_the_picture_is_the_bases_own_bit_for_bit(option, draw):
    zero, half, one = (pixels(draw("--n", 1, option, s) / "0000.png") for s in (0, 0.5, 1))
    alone = pixels(draw("--bps", "none", "--n", 1, "--size", 64) / "0000.png")
    assert np.array_equal(zero, alone)
    assert not np.array_equal(zero, one) and not np.array_equal(half, one)


def test_a_window_of_everything_is_no_window_and_one_of_half_the_steps_is(draw, monkeypatch):
    whole, first, second = (pixels(draw("--n", 1, "--window", *window) / "0000.png")
                            for window in ((0, 1), (0, 0.5), (0.5, 1)))
    assert not np.array_equal(first, whole) and not np.array_equal(first, second)
    monkeypatch.setattr(Steering, "is_active", lambda *_: True)
    assert np.array_equal(whole, pixels(draw("--n", 1) / "0000.png"))


@pytest.fixture
def other(tmp_path, bps_file):
    """A second BPS of random ports, and a drawing for it."""
    bps = load_bps(bps_file)
    generator = torch.Generator().manual_seed(1)
    for port in bps.zero_blocks[1:2]:
        port.weight += 0.005 * torch.randn(port.weight.shape, generator=generator)
    save_bps(bps, tmp_path / "other.safetensors", bps.metadata)
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((10, 20, 50, 40), outline="black", width=3)
    image.save(tmp_path / "box.png")
    return tmp_path / "other.safetensors", tmp_path / "box.png"


def test_conditions_add_up_in_any_order_each_with_its_own_options(draw, bps_file, other):
    alone = pixels(draw("--n", 1, "--cond", DEFAULT_DRAWING, "--strength", 0.5) / "0000.png")
    one = draw("--n", 1, "--bps", bps_file, other[0], "--cond", DEFAULT_DRAWING, other[1],
               "--strength", 0.5, 1, "--scale", 1, 0.5)
    assert sorted(file.name for file in one.iterdir()) == [
        "0000.png", "condition1.png", "condition2.png"]
    two = draw("--n", 1, "--bps", other[0], bps_file, "--cond", other[1], DEFAULT_DRAWING,
               "--strength", 1, 0.5, "--scale", 0.5, 1)
    assert np.array_equal(pixels(one / "0000.png"), pixels(two / "0000.png"))
    assert not np.array_equal(pixels(one / "0000.png"), alone)


def test_a_batch_draws_the_same_pictures_up_to_rounding(draw, monkeypatch):
    alone, sizes, forward = draw("--n", 3, "--seed", 5), [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, z, *rest: (
        sizes.append(len(z)), forward(self, z, *rest))[1])
    for batch in (2, 8):                                    # 2 + 1, and more than there are
        together = draw("--n", 3, "--seed", 5, "--batch", batch)
        for name in ("0005.png", "0006.png", "0007.png"):
            difference = pixels(alone / name).astype(int) - pixels(together / name)
            assert np.abs(difference).max() <= 1
    assert sizes == [4, 2] * 2 + [6] * 2                    # two steps, both passes of guidance


@pytest.fixture
def mask(tmp_path):
    """A function that writes a mask of 40 x 40 px, white from a column on, and returns its file."""
    def write(white_from, name="mask.png", size=(40, 40)):
        image = Image.new("L", size)
        image.paste(255, (white_from, 0, *size))
        image.save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("strength", [1, 0.7])
def test_a_white_mask_is_none_and_a_black_one_the_base_bit_for_bit(strength, draw, mask):
    options = ["--n", 1, "--strength", strength]
    white, black, half = (pixels(draw(*options, "--mask", mask(column)) / "0000.png")
                          for column in (0, 40, 20))
    steered, named = (pixels(draw(*options, *more) / "0000.png")
                      for more in ([], ["--mask", "none"]))
    alone = pixels(draw("--bps", "none", "--n", 1, "--size", 64) / "0000.png")
    assert np.array_equal(white, steered) and np.array_equal(named, steered)
    assert np.array_equal(black, alone)
    assert not np.array_equal(half, steered) and not np.array_equal(half, alone)


def test_two_masks_steer_by_one_condition_each_and_come_again_from_the_picture(
        draw, draw_again, mask, bps_file, other):
    right = mask(20, "right.png")
    left = right.with_name("left.png")
    ImageOps.invert(Image.open(right)).save(left)
    out = draw("--n", 1, "--bps", bps_file, other[0], "--cond", DEFAULT_DRAWING, other[1],
               "--mask", left, right)
    again = draw_again(out / "0000.png")
    assert np.array_equal(pixels(out / "0000.png"), pixels(again / "0000.png"))
    one = draw("--n", 1, "--bps", bps_file, other[0], "--cond", DEFAULT_DRAWING, other[1],
               "--mask", left, "none")
    again = draw_again(one / "0000.png")
    assert np.array_equal(pixels(one / "0000.png"), pixels(again / "0000.png"))
    assert not np.array_equal(pixels(out / "0000.png"), pixels(one / "0000.png"))
    mask(10, "right.png")
    with pytest.raises(UserError, match="right.png: not the file that .* was drawn with"):
        draw_again(out / "0000.png")


def test_a_mask_covers_the_picture_and_is_averaged_over_each_latent_pixel(mask, tmp_path):
    assert torch.equal(read_mask(mask(48, size=(80, 40)), 40, 40, 4)[0, 0, 0],
                       torch.tensor([0.0] * 7 + [1.0] * 3))       # the middle 40 of 80 columns
    shares = read_mask(mask(22), 40, 40, 4)[0, 0]                 # 2 of 4 columns
    assert shares.shape == (10, 10)
    torch.testing.assert_close(shares[3], torch.tensor([0.0] * 5 + [0.5] + [1.0] * 4), atol=0.01,
                               rtol=0)
    tall = read_mask(mask(20), 24, 48, 4)[0, 0]                   # its middle 12 .. 28 columns
    assert tall.shape == (12, 6) and torch.equal(tall[5], torch.tensor([0.0] * 3 + [1.0] * 3))
    Image.new("LA", (8, 8), (255, 0)).save(tmp_path / "transparent.png")
    assert not read_mask(tmp_path / "transparent.png", 40, 40, 4).any()
    Image.new("L", (8, 8), 1).save(tmp_path / "labels.png")
    with pytest.raises(UserError, match="labels.png: its lightest tone is 1 of 255"):
        read_mask(tmp_path / "labels.png", 40, 40, 4)


def test_one_value_counts_for_all_conditions(draw, bps_file, other):
    both = ["--n", 1, "--bps", bps_file, other[0], "--cond", DEFAULT_DRAWING, other[1]]
    one = draw(*both, "--strength", 0.5, "--window", 0, 0.5)
    each = draw(*both, "--strength", 0.5, 0.5, "--window", 0, 0.5, 0, 0.5)
    assert np.array_equal(pixels(one / "0000.png"), pixels(each / "0000.png"))


@pytest.fixture
def draw_again(tmp_path, monkeypatch):
    """Runs sample.main() with --from and other options; returns the folder of its pictures."""
    counter = iter(range(100))

    def run(picture, *arguments):
        out = tmp_path / f"again{next(counter)}"
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--from", str(picture),
                                          *map(str, arguments), "--out", str(out)])
        sample.main()
        return out

    return run


def test_a_picture_is_drawn_again_from_itself_alone(draw, draw_again, other, bps_file):
    out = draw("--n", 2, "--seed", 3, "--prompt", "-a 'grüne' pear", "--negative-prompt", "a cup",
               "--bps", bps_file, other[0], "--cond", DEFAULT_DRAWING, other[1],
               "--strength", 0.5, 1, "--window", 0, 0.5, 0, 1, "--scale", 1, 2,
               "--sampler", "euler", "--init", DEFAULT_DRAWING, "--denoise", 0.4, "--steps", 5,
               "--size", "48x80")
    again = draw_again(out / "0004.png")
    assert [file.name for file in again.glob("0*.png")] == ["0004.png"]
    assert np.array_equal(pixels(out / "0004.png"), pixels(again / "0004.png"))
    other_seed = draw_again(out / "0004.png", "--seed", 3)
    assert np.array_equal(pixels(out / "0003.png"), pixels(other_seed / "0003.png"))
    # a file that was moved: the conditions' other options stay
    moved = other[0].with_name("moved.safetensors")
    shutil.copy(other[0], moved)
    same = draw_again(out / "0004.png", "--bps", bps_file, moved)
    changed = draw_again(out / "0004.png", "--bps", bps_file, moved, "--scale", 1)
    assert np.array_equal(pixels(same / "0004.png"), pixels(out / "0004.png"))
    assert not np.array_equal(pixels(changed / "0004.png"), pixels(out / "0004.png"))
    # a file that has changed since is named
    ImageOps.invert(Image.open(other[1])).save(other[1])
    with pytest.raises(UserError, match="box.png: not the file that .*0004.png was drawn with"):
        draw_again(out / "0004.png")


def test_notes_that_others_wrote_into_a_picture_are_refused_or_do_no_harm(draw, draw_again,
                                                                         tmp_path):
    drawn = Image.open(draw("--n", 1) / "0000.png")
    for notes, is_drawn in ((dict(files='{"another": "x"}'), True), (dict(files="[]"), False),
                            (dict(options="[" * 10**5), False)):
        info = PngImagePlugin.PngInfo()
        for key, value in (drawn.text | notes).items():
            info.add_itxt(key, value)
        drawn.save(tmp_path / "noted.png", pnginfo=info)
        if is_drawn:
            assert np.array_equal(pixels(draw_again(tmp_path / "noted.png") / "0000.png"),
                                  pixels(tmp_path / "noted.png"))
        else:
            with pytest.raises(UserError, match="noted.png: does not say how it was drawn"):
                draw_again(tmp_path / "noted.png")


def test_options_of_the_command_line_overrule_those_of_the_picture(draw, draw_again, other):
    single = draw("--n", 1, "--strength", 0.5) / "0000.png"
    stronger = draw_again(single, "--strength", 1)
    assert np.array_equal(pixels(stronger / "0000.png"), pixels(draw("--n", 1) / "0000.png"))
    assert not np.array_equal(pixels(draw_again(single, "--cond", other[1]) / "0000.png"),
                              pixels(single))
    alone = draw_again(single, "--bps", "none")
    assert not list(alone.glob("condition*"))


def test_the_command_in_a_picture_draws_it_again(draw, tmp_path, monkeypatch):
    file = draw("--n", 1, "--prompt", "-a pear", "--strength", 0.5, "--window", 0, 0.5) / "0000.png"
    words = shlex.split(Image.open(file).text["command"])
    monkeypatch.setattr(sys, "argv", [*words[1:], "--device", "cpu", "--out", str(tmp_path / "c")])
    sample.main()
    assert np.array_equal(pixels(file), pixels(tmp_path / "c" / "0000.png"))


@pytest.mark.parametrize("options, message", [
    ([], "does not say how it was drawn"), (dict(window=[None]), "invalid float value: 'None'"),
    (dict(sampler="none"), "invalid choice: 'none'"), (dict(other=1), "unrecognized arguments"),
])
def test_a_picture_whose_options_make_no_sense_is_refused_in_one_line(draw_again, tmp_path, capsys,
                                                                      options, message):
    info = PngImagePlugin.PngInfo()
    for name, value in dict(options=json.dumps(options), files="{}", device="cpu").items():
        info.add_text(name, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises((UserError, SystemExit)) as error:
        draw_again(tmp_path / "a.png")
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_a_picture_of_an_earlier_version_is_refused_in_one_line(draw, draw_again, tmp_path):
    image = Image.open(draw("--n", 1) / "0000.png")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("command", "python sample.py --scale 1.0")
    image.save(tmp_path / "old.png", pnginfo=info)
    with pytest.raises(UserError, match="old.png: drawn by an earlier version"):
        draw_again(tmp_path / "old.png")


def test_a_folder_of_conditions_is_drawn_each_with_its_own_prompt(draw, tmp_path, bps_file):
    folder = tmp_path / "drawings"
    folder.mkdir()
    shutil.copy(DEFAULT_DRAWING, folder / "apple.png")
    shutil.copy(DEFAULT_DRAWING, folder / "pear.png")
    (folder / "pear.txt").write_text("a pear\n")
    (folder / "._pear.png").write_bytes(b"left by a Mac")
    out = draw("--n", 2, "--cond", folder, "--prompt", "a red apple")
    assert sorted(file.name for file in out.iterdir()) == [
        "apple-0000.png", "apple-0001.png", "apple-condition.png", "pear-0000.png",
        "pear-0001.png", "pear-condition.png"]
    assert Image.open(out / "pear-0000.png").text["prompt"] == "a pear"
    single = pixels(draw("--n", 1, "--cond", folder / "apple.png") / "0000.png")
    assert np.array_equal(pixels(out / "apple-0000.png"), single)
    (folder / "pear.txt").write_bytes("Birne, grün".encode("latin-1"))
    with pytest.raises(UserError, match="pear.txt: not UTF-8"):
        draw("--cond", folder)
    other_folder = tmp_path / "others"
    shutil.copytree(folder, other_folder)
    (other_folder / "pear.png").rename(other_folder / "plum.png")
    with pytest.raises(UserError, match="only one of them has pear"):
        draw("--bps", bps_file, bps_file, "--cond", folder, other_folder)


def test_bps_runs_once_per_step_for_each_condition_whatever_the_number_of_pictures(
        draw, other, tmp_path, bps_file, monkeypatch):
    folder, calls, forward = tmp_path / "drawings", [], BPS.forward
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(DEFAULT_DRAWING, folder / name)

    def counted(self, cond, t_emb):
        calls.append(len(cond))
        return forward(self, cond, t_emb)

    monkeypatch.setattr(BPS, "forward", counted)
    draw("--n", 3, "--bps", bps_file, other[0], "--cond", folder, other[1])
    jobs, steps, conditions = 2, 2, 2
    assert calls == [1] * jobs * steps * conditions


def test_a_label_map_with_a_class_that_was_not_trained_on_is_refused(draw, tmp_path):
    config = config_for(load_unet(options.BASE).config, 3, 4, port_weights="flat")
    save_bps(BPS(config), tmp_path / "boxes.safetensors", dict(
        task="layout", size=64, context_dim=128, classes={"#000000": "ground", "#ff0000": ""}))
    image = Image.new("RGB", (100, 60))
    ImageDraw.Draw(image).rectangle((10, 10, 40, 40), fill=(255, 0, 0))
    image.save(tmp_path / "a.png")
    out = draw("--bps", tmp_path / "boxes.safetensors", "--cond", tmp_path / "a.png", "--n", 1)
    colours = {colour for _, colour in Image.open(out / "condition.png").getcolors()}
    assert colours == {(0, 0, 0), (255, 0, 0)}                  # scaled, and none in between
    image.putpixel((5, 5), (0, 0, 255))
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: class #0000ff is unknown; .*#000000 ground, #ff"):
        draw("--bps", tmp_path / "boxes.safetensors", "--cond", tmp_path / "a.png")
    image.save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a.jpg: a JPEG file blurs"):
        draw("--bps", tmp_path / "boxes.safetensors", "--cond", tmp_path / "a.jpg")
    with pytest.raises(UserError, match="boxes.safetensors: trained for layout; give --cond"):
        draw("--bps", tmp_path / "boxes.safetensors")


def test_a_start_is_the_pictures_latent_with_the_noise_of_its_step(draw, tmp_path, monkeypatch):
    seen, sample_from = [], diffusion.sample

    def noted(denoise, z_t, schedule, steps, sampler, start):
        seen.append((z_t, start))
        return sample_from(denoise, z_t, schedule, steps, sampler, start)

    monkeypatch.setattr(diffusion, "sample", noted)
    for share in (0.3, 1):
        draw("--n", 1, "--steps", 10, "--sampler", "ddim", "--init", DEFAULT_DRAWING,
             "--denoise", share)
    (z_t, start), (all_noise, first) = seen
    noise = diffusion.draw_noise([0], (4, 16, 16))
    x = to_x(crop(open_image(DEFAULT_DRAWING), 64, 64))[None]
    z_init = load_vae(options.BASE).encode(x).mean
    assert start == 7 and first == 0 and torch.equal(all_noise, noise)
    expected = diffusion.NoiseSchedule().add_noise(z_init, noise, torch.tensor([201]))
    torch.testing.assert_close(z_t, expected, atol=1e-4, rtol=1e-4)


def test_little_denoising_keeps_the_picture_and_all_of_it_forgets_it(draw, tmp_path):
    image = Image.new("RGB", (64, 64), (40, 60, 200))
    image.save(tmp_path / "blue.png")
    blue = np.asarray(image).astype(float)
    kept, half, gone = (np.abs(pixels(draw("--n", 1, "--steps", 20, "--init", tmp_path / "blue.png",
                                           "--denoise", share) / "0000.png") - blue).mean()
                        for share in (0.05, 0.6, 1))
    assert kept < 0.95 * half < 0.5 * gone, (kept, half, gone)
    noise = pixels(draw("--n", 1, "--steps", 20) / "0000.png")
    assert np.abs(noise - blue).mean() == gone


def test_what_comes_with_the_project_is_found_again_where_the_project_has_moved(draw):
    text = Image.open(draw("--bps", DEFAULT_DRAWING.parent / "bps_sketch.safetensors",
                           "--n", 1) / "0000.png").text
    assert str(options.HERE) not in text["command"]


@pytest.mark.parametrize("arguments, message", [
    (["--size", "100000"], "--size 100000x100000: at most 16,777,216 pixels"),
    (["--init", "nowhere.png"], "nowhere.png: no such file"),
    (["--window", "0.6", "0.4"], "--window 0.6 0.4: give a start and a later end"),
    (["--window", "0.6"], "--window 0.6: give a START and an END for each --bps"),
    (["--window", "0.7", "0.8"], "--window 0.7 0.8: holds none of the 2 steps"),
    (["--cond", "a.png", "b.png"], "--cond: 2 values for 1 --bps; give one for all, or one"),
    (["--bps", "x", "y", "--cond", "a", "--scale", "1", "2", "3"], "--scale: 3 values for 2 --bps"),
    (["--strength", "nan"], "--strength nan: allowed are -1000 to 1000"),
    (["--guidance", "1e30"], "--guidance 1e+30: allowed are -1000 to 1000"),
    (["--guidance", "nan"], "--guidance nan: allowed are -1000 to 1000"),
    (["--seed", "-3"], "-3: allowed are 0 to"), (["--device", "warp"], "warp cannot be used"),
    (["--device", "privateuseone"], "privateuseone cannot be used"),
    (["--bps", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["--bps", "x", "y"], "--bps x: without --cond; of several, each needs its own"),
    (["--bps", "none", "x"], "--bps x: beside --bps none"),
    (["--bps", "none", "--cond", "a.png"], "--cond a.png: needs --bps, not none"),
    (["--bps", "none", "--mask", "a.png"], "--mask a.png: needs --bps, not none"),
    (["--mask", "a.png", "b.png"], "--mask: 2 values for 1 --bps; give one for all, or one"),
    (["--mask", "nowhere.png"], "nowhere.png: no such file"),
    (["--batch", "0"], "--batch 0: allowed are 1 to 10000"),
    (["--bps", "none", "--strength", "0.5"], "--strength 0.5: needs --bps, not none"),
    (["--denoise", "0.5"], "--denoise 0.5: needs --init"),
    (["--init", "tiny/drawing.png", "--denoise", "0"], "--denoise 0.0: allowed is above 0"),
    (["--from", "tiny/drawing.png"], "tiny/drawing.png: does not say how it was drawn"),
    (["--cond", "tests"], "--cond tests: no image in it"),
    (["--cond", "tests", "--out", "tests/x"], "--out tests/x: lies in tests, whose pictures are"),
])
def test_a_wrong_option_is_named_with_what_is_allowed(arguments, message, draw, monkeypatch,
                                                      capsys):
    monkeypatch.chdir(options.HERE)
    with pytest.raises((UserError, SystemExit)) as error:
        draw(*arguments)
    printed = capsys.readouterr().err
    if error.type is SystemExit:
        assert error.value.code == 2 and printed.count("\n") == 1
    assert message in f"{error.value}{printed}"


def test_a_measurement_refuses_a_bps_for_another_task(tmp_path):
    file = references.write_random_bps(tmp_path / "a.safetensors", "layout")
    base = sample.load_base(options.BASE)
    assert load_fitting(file, base).metadata["task"] == "layout"
    with pytest.raises(UserError, match="a.safetensors: for layout; a BPS for sketch is wanted"):
        load_fitting(file, base, "sketch")


def test_a_bps_of_the_wrong_channels_or_without_its_task_is_refused(draw, tmp_path, bps_file):
    bps = load_bps(bps_file)
    save_bps(bps, tmp_path / "a.safetensors", bps.metadata | dict(task="layout"))
    with pytest.raises(UserError, match="takes conditions of 1 channels, but .* layout, have 3"):
        draw("--bps", tmp_path / "a.safetensors")
    for fault in (dict(task="nonsense"), dict(size="64"), dict(size=0), dict(classes=["face"])):
        save_bps(bps, tmp_path / "b.safetensors", bps.metadata | fault)
        with pytest.raises(UserError, match="does not say what it was trained for"):
            draw("--bps", tmp_path / "b.safetensors")


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
def test_a_narrower_dtype_draws_nearly_the_same_picture(dtype, draw):
    exact, rounded = (pixels(draw("--n", 1, "--steps", 10, "--dtype", name) / "0000.png")
                      for name in ("fp32", dtype))
    difference = np.abs(exact.astype(float) - rounded)
    assert 0 < difference.mean() < 5            # of 255


def test_the_autoencoder_stays_float32():
    base = sample.load_base(options.BASE, dtype=torch.float16)
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    for module in (base.unet, base.text_model):
        assert {p.dtype for p in module.parameters()} == {torch.float16}


def test_numbers_that_overflowed_are_an_error_not_a_black_picture(draw, monkeypatch):
    monkeypatch.setattr("bps.guide", lambda *_: torch.tensor(float("nan")))
    message = "--dtype fp16: the numbers .* overflowed; give --dtype bf16"
    with pytest.raises(UserError, match=message):
        draw("--dtype", "fp16")
    with pytest.raises(UserError, match="--dtype fp32: .* --strength or --scale nearer to 1"):
        draw("--n", 1)


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
        base.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
        return base

    return load


def test_a_folder_of_conditions_goes_on_where_it_was_interrupted(draw, tmp_path, monkeypatch,
                                                                 capsys):
    folder, out = tmp_path / "conditions", tmp_path / "drawn"
    folder.mkdir()
    for name in "abc":
        shutil.copy(DEFAULT_DRAWING, folder / f"{name}.png")
    draw_job, jobs = sample.draw_job, []

    def counted(job, *arguments):
        if len(jobs) == 2:
            raise KeyboardInterrupt
        jobs.append(job.name)
        return draw_job(job, *arguments)

    monkeypatch.setattr(sample, "draw_job", counted)
    with pytest.raises(KeyboardInterrupt):
        draw("--cond", folder, "--n", 2, "--out", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    jobs.clear()
    draw("--cond", folder, "--n", 2, "--out", out)
    assert jobs == ["c-"] and capsys.readouterr().out.count("drawn before by this command") == 2
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert len(list(out.glob("*00*.png"))) == 6
    jobs.clear()
    with pytest.raises(KeyboardInterrupt):              # another command draws them anew
        draw("--cond", folder, "--n", 2, "--steps", 3, "--out", out)
    assert jobs == ["a-", "b-"] and (out / "a-0000-2.png").exists()
