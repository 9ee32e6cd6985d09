"""What people hand in as pictures, drawings, label maps and masks, and what BPS sees of it."""
import io
import os
import re
import struct
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from drawings import flip_bit, label_map, mask, ring
from PIL import EpsImagePlugin, Image, ImageDraw, ImageOps

from data import Pair, load_pairs, open_pair
from inputs import files
from inputs.conditions import (class_colours, class_names, drawing_to_cond, extract_lines,
                               is_blank, is_light_on_dark, level_drawing, line_f1, open_boxes,
                               open_drawing, open_image, open_label_map, read_condition, read_mask,
                               to_image, to_x)
from inputs.files import fingerprint, read_json
from inputs.pairs import read_captions
from inputs.pictures import read_stored
from weights import UserError

ROOT = Path(__file__).parent.parent


# ---- files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("read", [open_image, open_drawing, open_label_map, read_stored])
def test_a_picture_that_is_postscript_is_not_executed(read, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", Mock())
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"
                                     b"%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="cannot identify image file .* Save it as PNG, JPEG, WEBP"):
        read(tmp_path / "a.png")
    EpsImagePlugin.Ghostscript.assert_not_called()


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


# ---- pictures that Pillow trips over -------------------------------------------------------

def png_with(kind, data):
    """The bytes of a PNG with one more chunk after its header."""
    file = io.BytesIO()
    ring(64, 64).save(file, "PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file.getvalue()[:33] + chunk + file.getvalue()[33:]


def jpeg_with_tags(*tags):
    """The bytes of a JPEG whose EXIF has tags (number, type, value)."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    file = io.BytesIO()
    ring(96, 64).save(file, "JPEG", exif=exif)
    return file.getvalue()


LARGE = zlib.compress(b"a" * 3_000_000)
ODD_PICTURES = {
    "turned.jpg": (jpeg_with_tags((0x0103, 4, 0xFFFFFFFF), (0x0112, 3, 6)),
                   ring(96, 64).rotate(-90, expand=True)),
    "exif.png": (png_with(b"eXIf", b"not a TIFF header"), ring(64, 64)),
    "profile.png": (png_with(b"iCCP", b"large\0\0" + LARGE), ring(64, 64)),
    "text.png": (png_with(b"zTXt", b"Comment\0\0" + LARGE), ring(64, 64))}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_a_picture_with_odd_metadata_is_read_as_viewers_show_it(tmp_path, name, recwarn):
    content, expected = ODD_PICTURES[name]
    (tmp_path / name).write_bytes(content)
    picture = open_image(tmp_path / name)
    assert picture.size == expected.size and not recwarn.list
    assert np.abs(np.asarray(picture, float) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("pixels", [900, 500])      # more than that warns, twice as many raises
def test_a_huge_picture_is_refused_by_name(pixels, tmp_path, monkeypatch):
    ring(32, 32).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(UserError, match=f"a.png must have at most {pixels} pixels"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("spoil", [flip_bit, lambda content: content[:60]],
                         ids=["checksum of the pixels", "truncated"])
def test_a_corrupt_picture_is_refused_by_name(spoil, tmp_path):
    ring(32, 32).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(spoil((tmp_path / "a.png").read_bytes()))
    with pytest.raises(UserError, match="a.png can't be read as an image"):
        open_image(tmp_path / "a.png")


def test_any_error_of_a_decoder_is_one_line_with_the_file(tmp_path, monkeypatch):
    ring(32, 32).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=struct.error))
    with pytest.raises(UserError, match="a.png can't be read as an image .error"):
        open_image(tmp_path / "a.png")


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


def test_images_survive_the_way_to_x_and_back():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    x = to_x(image)
    assert x.shape == (3, 5, 7) and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(np.asarray(to_image(x)), np.asarray(image))


# ---- drawings ------------------------------------------------------------------------------

def test_a_drawing_keeps_its_aspect_ratio_and_is_padded_with_paper(tmp_path):
    ring(400, 200).save(tmp_path / "wide.png")
    cond = read_condition(tmp_path / "wide.png", "sketch", 64, 64)
    rows, columns = cond[0].max(dim=1).values > 0.5, cond[0].max(dim=0).values > 0.5
    assert columns.sum() / rows.sum() == pytest.approx(2.0, rel=0.15)
    assert cond[0, :16].max() == 0 and cond[0, -16:].max() == 0


def framed(image, width, colour=0):
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1),
                                    outline=(colour,) * 3, width=width)
    return image


def toned(image, paper, ink, noise=3.0):
    """The drawing as photographed: paper and ink of other tones, numbers or (H, W), and noise."""
    white = np.asarray(image.convert("L"), float) / 255
    grey = ink + (paper - ink) * white
    grey = grey + np.random.default_rng(0).normal(0, noise, white.shape)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def vignette(size):
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    return 130 - 90 * (x**2 + y**2)


def as_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


LOOKS = {
    "plain": lambda image: image,
    "grey": lambda image: image.convert("L"),
    "bilevel": lambda image: image.convert("1"),
    "palette": lambda image: image.convert("P"),
    "16 bit": lambda image: Image.fromarray(np.uint16(image.convert("L")) * 257),
    "thin black frame": lambda image: framed(image, 2),
    "thick black frame": lambda image: framed(image, 20),
    "letterbox": lambda image: ImageOps.expand(image, (0, 60), "black"),
    "black margins": lambda image: ImageOps.expand(image, 40, "black"),
    "white frame in a black one": lambda image: framed(ImageOps.expand(image, 10, "white"), 4),
    "light on dark": ImageOps.invert,
    "edge map with a white margin": lambda image: ImageOps.expand(ImageOps.invert(image), 20,
                                                                  "white"),
    "edge map with a grey frame": lambda image: framed(ImageOps.invert(image), 6, colour=200),
    "dim photo": lambda image: toned(image, vignette(image.width), 35),
    "grey paper": lambda image: toned(image, 115, 25),
    "chalk on a board": lambda image: toned(ImageOps.invert(image), 220, 60),
    "kraft paper": lambda image: ImageOps.colorize(image.convert("L"), (20, 15, 10),
                                                   (150, 110, 70)),
    "pencil": lambda image: toned(image, 255, 175, noise=0),
    "jpeg": as_jpeg,
    "jpeg, light on dark": lambda image: as_jpeg(ImageOps.invert(image)),
}


@pytest.mark.parametrize("look", [look for look in LOOKS if look != "pencil"])
def test_a_drawing_is_read_as_dark_on_white_whatever_it_looks_like(look):
    drawing = ring(300, 300)
    changed = LOOKS[look](drawing)
    expected = np.asarray(drawing.convert("L"), float)
    border = (changed.height - 300) // 2, (changed.width - 300) // 2
    levelled = np.asarray(level_drawing(changed).convert("L"), float)
    levelled = levelled[border[0]:border[0] + 300, border[1]:border[1] + 300]
    inside = np.s_[25:-25, 25:-25]                      # a frame is part of what is drawn
    assert np.abs(levelled - expected)[inside].mean() < 25
    assert np.median(levelled[inside]) > 235


def photo(sheet, angle, ground):
    """A sheet on a desk, turned, with the noise of a camera."""
    image = ImageOps.expand(sheet, 90, ground).rotate(angle, fillcolor=ground).convert("RGB")
    noise = np.random.default_rng(0).normal(0, 2, (*image.size[::-1], 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("ink, width", [(60, 6), (150, 3)])
@pytest.mark.parametrize("angle", [0, 1, 2, 5, -12, 25, 45, 63])
def test_a_sheet_on_a_dark_desk_is_dark_on_light_at_any_angle(angle, ink, width):
    sheet = Image.new("RGB", (200, 280), (210, 210, 210))
    ImageDraw.Draw(sheet).ellipse((30, 60, 170, 200), outline=(ink,) * 3, width=width)
    image = photo(sheet, angle, (40, 35, 30))
    image.paste("white", (3, 3, 6, 6))                          # a speck on the desk
    inside = np.asarray(photo(Image.new("L", (200, 280), 255), angle, 0))[..., 0] > 200
    levelled = np.asarray(level_drawing(image).convert("L"))[inside]
    assert np.median(levelled) > 235 and 0.02 < (levelled < 200).mean() < 0.3


@pytest.mark.parametrize("shapes", [
    dict(ellipse=(30, 30, 170, 170)), dict(polygon=(40, 180, 40, 80, 100, 20, 160, 80, 160, 180)),
    dict(rounded_rectangle=(70, 20, 130, 70), rectangle=(40, 80, 160, 190)),
    dict(line=(100, 20, 180, 100, 100, 180, 20, 100, 100, 20))])
def test_a_shape_that_is_light_on_dark_is_no_sheet(shapes):
    image = Image.new("RGB", (200, 200))
    for name, place in shapes.items():
        getattr(ImageDraw.Draw(image), name)(
            place, fill="white", **dict(width=20) if name == "line" else {})
    assert is_light_on_dark(image)


@pytest.mark.parametrize("margin", [0, 6])
@pytest.mark.parametrize("color", ["white", "black"])
def test_polarity_is_right_for_drawings_that_touch_a_side(margin, color):
    drawings = [pair.open_cond().convert("RGB") for pair in load_pairs("sketch", "test")]
    inverted = map(ImageOps.invert, drawings)
    wrong, right = ([is_light_on_dark(ImageOps.expand(image, margin, color)) for image in images]
                    for images in (drawings, inverted))
    assert np.mean(wrong) < 0.02 and np.mean(right) > 0.93


@pytest.mark.parametrize("look", ["plain", "16 bit", "light on dark", "grey paper",
                                  "thin black frame", "pencil"])
def test_training_and_sampling_see_the_same_ink(look, tmp_path):
    LOOKS[look](ring(256, 256)).save(tmp_path / "a.png")
    pair = Pair("a", lambda: open_drawing(tmp_path / "a.png"), lambda: ring(256, 256), ("",))
    trained, _, _ = open_pair(pair, "sketch", 64)
    sampled = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    assert trained.max() == 255 and sampled.shape == (1, 64, 64) and sampled.max() == 1
    assert (trained / 255 - sampled).abs().max() < 0.003


@pytest.mark.parametrize("ink, paper", [
    ("white", None), ("yellow", None), ("black", None), ("grey", None), ("black", "white"),
    ("white", "black")], ids=str)
def test_ink_on_transparency_is_seen_whatever_its_colour(tmp_path, ink, paper):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((13, 13, 51, 51), fill=paper, outline=ink, width=4)
    image.save(tmp_path / "a.png")
    cond = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    assert cond[0, :10].max() < 0.1 and cond[0, 10:20, 28:36].max() > 0.9
    assert np.asarray(open_drawing(tmp_path / "a.png"))[0, 0].tolist() == [255] * 3


def test_sparse_white_ink_on_transparency_is_seen(tmp_path):
    image = Image.new("RGBA", (1024, 1024), (0, 0, 0, 0))
    ImageDraw.Draw(image).line((300, 300, 380, 300), fill="white", width=6)
    image.save(tmp_path / "a.png")
    assert read_condition(tmp_path / "a.png", "sketch", 256, 256).sum() > 10


@pytest.mark.parametrize("image, message", [
    (Image.new("RGB", (50, 50), "white"), "has no line. A drawing must be dark on light"),
    (Image.new("RGB", (50, 40), (200, 180, 90)), "has no line"),
    (Image.fromarray(255 - 255 * np.eye(900, 1200, dtype=np.uint8)),
     "has only lines thinner than a pixel at this size")], ids=["white", "yellow", "thin lines"])
def test_a_drawing_without_ink_is_refused_with_the_reason(tmp_path, image, message):
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png {message}"):
        read_condition(tmp_path / "a.png", "sketch", 64, 64)
    assert drawing_to_cond(Image.new("L", (8, 8), 250)).max() < 0.02    # noise is not stretched


def test_the_lines_of_a_square_are_its_outline():
    x = torch.full((2, 3, 20, 24), -1.0)
    x[:, 1, 5:15, 8:16] = 1.0
    lines = extract_lines(x)
    assert lines.shape == (2, 20, 24)
    assert lines[:, 7:13, 10:14].sum() == 0 and lines[:, :3].sum() == 0
    outline = torch.zeros(2, 20, 24, dtype=torch.bool)
    outline[:, 5:15, [8, 15]] = True
    outline[:, [5, 14], 8:16] = True
    assert line_f1(lines, outline).min() > 0.95


def test_line_f1_forgives_one_pixel_and_no_more():
    a, b = torch.zeros(2, 1, 9, 12, dtype=torch.bool)
    a[0, :, 4] = True
    b[0, :, 5] = True
    assert line_f1(a, a).item() == 1 and line_f1(a, b).item() == 1
    assert line_f1(a, b.roll(1, 2)).item() == 0
    assert line_f1(a, torch.zeros_like(a)).item() == 0


# ---- label maps and masks ------------------------------------------------------------------

def erased(mode):
    """Two boxes on black, one of them erased to transparency, which keeps its colour."""
    array = np.zeros((40, 40, 4), np.uint8)
    array[..., 3] = 255
    array[5:15, 5:15, 0] = 255
    array[20:30, 20:30] = 0, 0, 255, 0
    image = Image.fromarray(array)
    if mode == "P":
        image = image.convert("RGB").quantize(3)
        image.info["transparency"] = image.getpixel((25, 25))
    return image


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
OPAQUE = "must be opaque: a transparent part has no class"


@pytest.mark.parametrize("open_map, image, name, message", [
    (open_label_map, label_map(colours=((10, 20, 30), (10, 20, 30))), "a.png",
     "must have a colour for each class, got two classes of one colour"),
    (open_label_map, label_map().convert("RGB"), "a.jpg", "must be in a lossless format, got JPEG"),
    (open_label_map, ring(64, 64), "a.png", "must have mode P or L, got RGB"),
    (open_boxes, NOISE, "a.png", "must have at most 256 colours, one per class, got 1,"),
    (open_boxes, Image.new("F", (9, 9)), "a.tif", "must have mode P or L, got F"),
    (open_boxes, erased("RGBA"), "a.png", OPAQUE), (open_boxes, erased("P"), "a.png", OPAQUE)],
    ids=["one colour", "jpeg", "rgb", "shades", "floats", "erased", "erased palette"])
def test_a_label_map_with_uncertain_classes_is_refused(open_map, image, name, message, tmp_path):
    image.save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} {message}"):
        open_map(tmp_path / name)


def test_an_rgb_label_map_is_read_in_a_fraction_of_a_second(tmp_path):
    classes = np.random.default_rng(0).integers(0, 20, (1000, 1000))
    colours = np.random.default_rng(1).integers(0, 256, (20, 3), np.uint8)
    Image.fromarray(colours[classes]).save(tmp_path / "a.png", compress_level=0)
    start = time.process_time()
    labels = open_boxes(tmp_path / "a.png")
    assert time.process_time() - start < 0.6
    assert np.array_equal(np.asarray(labels.convert("RGB")), colours[classes])


MASKS = (("1", 1), ("L", 255), ("L", 1), ("P", 255), ("I;16", 1), ("RGB", 255))


@pytest.mark.parametrize("trained", MASKS[:4], ids=str)
@pytest.mark.parametrize("drawn", MASKS, ids=str)
def test_a_mask_is_the_same_in_one_bit_grey_and_black_and_white(tmp_path, trained, drawn):
    mask(*trained).save(tmp_path / "trained.png")
    mask(*drawn).save(tmp_path / "drawn.png")
    colours = class_names(class_colours(open_label_map(tmp_path / "trained.png")))
    expected = read_condition(tmp_path / "trained.png", "segmentation", 48, 48, colours)
    cond = read_condition(tmp_path / "drawn.png", "segmentation", 48, 48, colours)
    assert torch.equal(cond, expected) and cond[:, :, 24:].amax() > 0.4
    label_map("L").save(tmp_path / "seven.png")
    known = "#ffffff, #000000" if trained[0] == "P" else r"0, \d+"
    with pytest.raises(UserError, match=f"seven.png: class 7 .* trained on {known}.$"):
        read_condition(tmp_path / "seven.png", "segmentation", 48, 48, colours)


def test_grey_maps_get_a_palette_of_distinct_colours(tmp_path):
    label_map("L").save(tmp_path / "grey.png")
    image = open_label_map(tmp_path / "grey.png")
    assert image.mode == "P" and set(np.unique(np.asarray(image))) == {0, 7}
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert len(set(map(tuple, palette.tolist()))) == 256
    # PASCAL VOC's first classes: background, aeroplane, bicycle
    assert palette[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


def test_classes_of_faint_contrast_are_not_blank():
    cond = torch.zeros(3, 8, 8)
    cond[:, 4:] = 7 / 255
    assert not is_blank(cond, "segmentation")
    assert is_blank(cond * 0, "segmentation") and is_blank(cond[:1], "sketch")


@pytest.mark.parametrize("white, tone, maximum", [
    ((0, 0, 80, 40), 1, 1), ((0, 0, 9, 40), 255, 0)], ids=["class numbers", "white is cropped"])
def test_a_mask_that_steers_nowhere_is_refused(white, tone, maximum, tmp_path):
    image = Image.new("L", (80, 40))
    image.paste(tone, white)
    image.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=f"mask.png: mask is black where .*m {maximum} of 255"):
        read_mask(tmp_path / "mask.png", 40, 40, 4)             # the middle 40 of 80 columns
