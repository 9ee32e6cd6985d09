"""What people hand in as pictures: formats, devices, floats, desks, pencils, masks."""
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from drawings import ring
from PIL import EpsImagePlugin, Image, ImageDraw

from data import Pair, open_pair
from inputs import files
from inputs.conditions import (drawing_to_cond, is_light_on_dark, level_drawing, open_boxes,
                               open_drawing, open_image, open_label_map, read_condition, read_mask)
from inputs.files import fingerprint, read_json
from inputs.pairs import read_captions
from inputs.pictures import read_stored
from weights import UserError

ROOT = Path(__file__).parent.parent


# ---- files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("read", [open_image, open_drawing, open_label_map, read_stored])
def test_a_picture_that_is_postscript_is_not_executed(read, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(1))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"
                                     b"%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="its format is not read.* Save it as PNG, JPEG, WEBP"):
        read(tmp_path / "a.png")
    assert not started


def test_one_function_opens_what_a_user_hands_in():
    opening = [file.name for folder in (".", "inputs", "measure", "pad", "studies")
               for file in (ROOT / folder).glob("*.py")
               if re.search(r"\bImage\.open\(", file.read_text(encoding="utf-8"))]
    assert opening == ["conditions.py"]


UNUSUAL_FILES = {
    "a link to a device": (lambda file: file.symlink_to("/dev/zero"), "is a device or a pipe"),
    "a pipe": (os.mkfifo, "is a device or a pipe"),
    "a folder": (os.mkdir, "is a folder"),
    "no file": (lambda file: None, "is missing"),
    "a pointer": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid "
                                               "sha256:0\nsize 9\n"), "is a Git LFS pointer")}


@pytest.mark.parametrize("read", [open_image, read_json, fingerprint,
                                  lambda file: read_captions([file])])
@pytest.mark.parametrize("kind", UNUSUAL_FILES)
def test_only_regular_files_are_read(kind, read, tmp_path):
    make, message = UNUSUAL_FILES[kind]
    make(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png {message}"):
        read(tmp_path / "a.png")


def test_a_text_file_is_not_larger_than_memory_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT", 10)
    (tmp_path / "a.txt").write_text("10 letters")
    assert read_captions([tmp_path / "a.txt"])[0] == ("10 letters",)
    (tmp_path / "a.txt").write_text("11 letters.")
    with pytest.raises(UserError, match="a.txt must have at most 10 characters"):
        read_captions([tmp_path / "a.txt"])


# ---- drawings ------------------------------------------------------------------------------

def sheet_on_desk(drawing, angle, desk=40, scale=1.5):
    """(photo of a drawing's sheet on a desk, turned by degrees, and which pixels are the sheet)."""
    size = int(drawing.width * scale), int(drawing.height * scale)
    offset = (size[0] - drawing.width) // 2, (size[1] - drawing.height) // 2
    photo, sheet = Image.new("L", size, desk), Image.new("L", size)
    photo.paste(drawing.convert("L").point(lambda grey: 60 + grey * 150 // 255), offset)
    sheet.paste(255, (*offset, offset[0] + drawing.width, offset[1] + drawing.height))
    photo, sheet = (image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=ground)
                    for image, ground in ((photo, desk), (sheet, 0)))
    grey = np.asarray(photo) + np.random.default_rng(0).normal(0, 8, size[::-1])
    return (Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB"),
            np.asarray(sheet) == 255)


@pytest.mark.parametrize("angle", [0, 1, 2, 5, -12, 25])
def test_a_sheet_on_a_dark_desk_is_dark_on_light_at_any_angle(angle):
    photo, sheet = sheet_on_desk(ring(200, 280), angle)
    photo.paste("white", (3, 3, 6, 6))                          # a speck on the desk
    levelled = np.asarray(level_drawing(photo).convert("L"))[sheet]
    assert np.median(levelled) > 235 and 0.02 < (levelled < 128).mean() < 0.3


def test_a_filled_shape_that_is_light_on_dark_is_no_sheet():
    image = Image.new("RGB", (200, 200))
    ImageDraw.Draw(image).ellipse((30, 30, 170, 170), fill="white")
    ImageDraw.Draw(image).ellipse((80, 70, 120, 110), fill="black")
    assert is_light_on_dark(image)


def pencil(width, height):
    return ring(width, height, (175, 175, 175))


@pytest.mark.parametrize("draw_ring", [ring, pencil])
def test_training_and_sampling_see_the_same_ink(draw_ring, tmp_path):
    draw_ring(256, 256).save(tmp_path / "a.png")
    pair = Pair("a", lambda: open_drawing(tmp_path / "a.png"), lambda: ring(256, 256), ("",))
    trained, _, _ = open_pair(pair, "sketch", 64)
    sampled, _ = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    assert trained.max() == 255 and sampled.max() == 1
    assert (trained / 255 - sampled).abs().max() < 0.003


def test_paper_without_a_line_is_not_stretched_to_full_ink():
    assert drawing_to_cond(Image.new("L", (8, 8), 250)).max() < 0.02


def test_lines_thinner_than_a_pixel_are_named_as_such(tmp_path):
    image = Image.new("L", (4000, 3000), 255)
    ImageDraw.Draw(image).line((500, 500, 3000, 2500), fill=0, width=2)
    image.save(tmp_path / "scan.png")
    with pytest.raises(UserError, match="scan.png has only lines thinner than a pixel at this si"):
        read_condition(tmp_path / "scan.png", "sketch", 64, 64)
    assert read_condition(tmp_path / "scan.png", "sketch", 512, 512)[0].max() == 1


# ---- pictures, label maps and masks --------------------------------------------------------

@pytest.mark.parametrize("scale, dtype", [(1 / 255, "f4"), (1, "f4"), (257, "f4"), (257, "u2"),
                                          (257, "i4")])
def test_a_tiff_of_any_number_type_is_scaled_to_8_bits(scale, dtype, tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    Image.fromarray((grey * float(scale)).astype(dtype)).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif"))[..., 0], grey)


@pytest.mark.parametrize("values", [(0, 1.3), (-0.5, 1), (0, np.nan), (0, np.inf), (0, 70000)])
def test_a_tiff_of_numbers_without_a_white_is_refused(values, tmp_path):
    Image.fromarray(np.float32([values])).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif .*its values must be in 0..1, or whole numbers"):
        open_image(tmp_path / "a.tif")


def test_an_rgb_label_map_is_read_in_a_fraction_of_a_second(tmp_path):
    classes = np.random.default_rng(0).integers(0, 20, (1000, 1000))
    colours = np.random.default_rng(1).integers(0, 256, (20, 3), np.uint8)
    Image.fromarray(colours[classes]).save(tmp_path / "a.png", compress_level=0)
    start = time.process_time()
    labels = open_boxes(tmp_path / "a.png")
    assert time.process_time() - start < 0.6
    assert labels.mode == "P" and np.array_equal(np.asarray(labels.convert("RGB")), colours[classes])


def erased(mode):
    """Two boxes on black, one of them erased to transparency, which keeps its colour."""
    array = np.zeros((40, 40, 4), np.uint8)
    array[5:15, 5:15] = 255, 0, 0, 255
    array[20:30, 20:30] = 0, 0, 255, 0
    array[..., 3] |= 255 * (array[..., 2] == 0).astype(np.uint8)
    image = Image.fromarray(array)
    if mode == "P":
        image = image.convert("RGB").quantize(3)
        image.info["transparency"] = image.getpixel((25, 25))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_box_erased_to_transparency_is_no_class(mode, tmp_path):
    erased(mode).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png must be opaque: a transparent part has no class"):
        open_boxes(tmp_path / "a.png")


@pytest.mark.parametrize("white, message", [
    ((0, 0, 0, 0), "black where the picture is .maximum 0 of"), ((0, 0, 9, 40), "black where the")])
def test_a_mask_that_steers_nowhere_is_refused(white, message, tmp_path):
    image = Image.new("L", (80, 40))
    image.paste(255, white)
    image.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=f"mask.png: mask is {message}.*White means steer"):
        read_mask(tmp_path / "mask.png", 40, 40, 4)             # the middle 40 of 80 columns
