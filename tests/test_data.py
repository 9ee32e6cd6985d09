"""Users' drawings and folders, the lines of a picture, and what a training step is given."""
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from data import (
    DataError,
    embedded_pairs,
    extract_lines,
    folder_pairs,
    line_f1,
    load_pairs,
    read_drawing,
    split_names,
    to_image,
    to_x,
)
from tiny import world


def ring(width, height):
    """A black ring on white, RGB."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 5, height // 5, width * 4 // 5, height * 4 // 5),
                                  outline="black", width=max(2, width // 16))
    return image


def as_transparent(image):
    ink = ImageOps.invert(image.convert("L"))
    return Image.merge("LA", (Image.new("L", image.size, 0), ink))


@pytest.mark.parametrize("change", [
    lambda image: image.convert("L"), lambda image: image.convert("1"),
    lambda image: image.convert("P"), as_transparent, ImageOps.invert,
    lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)],
    ids=["grey", "bilevel", "palette", "transparent", "light on dark", "16 bit"])
def test_a_drawing_of_any_mode_and_polarity_gives_the_same_condition(tmp_path, change):
    ring(64, 64).save(tmp_path / "a.png")
    change(ring(64, 64)).save(tmp_path / "b.png")
    expected, _ = read_drawing(tmp_path / "a.png", 64)
    cond, used = read_drawing(tmp_path / "b.png", 64)
    assert cond.shape == (1, 64, 64) and cond.min() == 0 and cond.max() == 1
    torch.testing.assert_close(cond, expected, atol=0.02, rtol=0)
    assert used.size == (64, 64) and used.getpixel((0, 0)) == (255, 255, 255)


def test_a_drawing_keeps_its_aspect_ratio_and_is_padded_with_paper(tmp_path):
    ring(400, 200).save(tmp_path / "wide.png")
    cond, _ = read_drawing(tmp_path / "wide.png", 64)
    rows, columns = cond[0].max(dim=1).values > 0.5, cond[0].max(dim=0).values > 0.5
    assert columns.sum() / rows.sum() == pytest.approx(2.0, rel=0.15)
    assert cond[0, :16].max() == 0 and cond[0, -16:].max() == 0


def test_what_is_no_drawing_is_refused(tmp_path):
    Image.new("RGB", (50, 50), "white").save(tmp_path / "blank.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (("blank.png", "no line in it"), ("text.png", "cannot be read"),
                          ("absent.png", "absent.png")):
        with pytest.raises(DataError, match=message):
            read_drawing(tmp_path / name, 64)


def test_images_survive_the_way_to_x_and_back():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    x = to_x(image)
    assert x.shape == (3, 5, 7) and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(np.asarray(to_image(x)), np.asarray(image))


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


def test_no_name_is_on_two_sides_of_the_split():
    names = {split: {row["name"] for row in world.records(split, (*world.BASE_STYLES, "line"))}
             for split in ("train", "val", "test")}
    assert not names["train"] & names["test"] and not names["train"] & names["val"]
    assert not names["val"] & names["test"] and len(names["test"]) >= 128


def test_embedded_pairs_are_aligned_drawings_of_their_pictures():
    pairs = embedded_pairs("sketch", "test")[:20]
    drawn = torch.stack([to_x(pair.open_cond()) for pair in pairs])
    true = torch.stack([to_x(pair.open_image()) for pair in pairs])
    right = line_f1(extract_lines(true), extract_lines(drawn)).mean()
    wrong = line_f1(extract_lines(true.roll(1, 0)), extract_lines(drawn)).mean()
    assert right > 0.6 and right > wrong + 0.2


@pytest.fixture
def images(tmp_path):
    """A folder with 3 pictures and 3 conditions."""
    for kind in ("images", "conditions"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            ring(32, 24).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def test_three_layouts_give_the_same_pairs(images):
    (images / "images" / "0.txt").write_text("a ring\n")
    expected = [(images / "conditions" / f"{i}.png", images / "images" / f"{i}.png",
                 "a ring" if i == 0 else "") for i in range(3)]
    assert folder_pairs(images) == expected
    for listing, keys in (("metadata.jsonl", ("conditioning_image", "file_name", "text")),
                          ("prompt.json", ("source", "target", "prompt"))):
        rows = [dict(zip(keys, (f"conditions/{i}.png", f"images/{i}.png", prompt)))
                for i, (*_, prompt) in enumerate(expected)]
        (images / listing).write_text("\n".join(map(json.dumps, rows)) + "\n")
        assert folder_pairs(images) == expected
        (images / listing).write_text(json.dumps(rows[0]) + "\nnonsense\n")
        with pytest.raises(DataError, match="line 2"):
            folder_pairs(images)
        (images / listing).unlink()


def test_a_folder_without_pairs_or_with_half_a_pair_is_refused(images, tmp_path):
    (images / "images" / "1.png").unlink()
    with pytest.raises(DataError, match="1 is not in both"):
        folder_pairs(images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pairs"):
        folder_pairs(tmp_path / "empty")
    (images / "conditions" / "1.png").unlink()
    with pytest.raises(DataError, match="2 pairs; at least 10"):
        load_pairs("sketch", "train", images)


def test_a_users_pairs_are_split_by_name_with_some_on_every_side():
    for count in (10, 57, 500):
        names = [f"{i:03d}.png" for i in range(count)]
        splits = split_names(names)
        assert splits == split_names(names[::-1])
        sides = [sum(side == wanted for side in splits.values()) for wanted in ("test", "val")]
        assert sides == [max(1, round(0.15 * count)), max(1, round(0.05 * count))]
