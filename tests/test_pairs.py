"""A user's own pairs: three layouts of a folder, and all that can be wrong there."""
import io
import json
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from drawings import ring
from PIL import Image, ImageDraw, ImageOps

import train
from data import LatentCache, check_conditions, load_pairs, open_pair
from inputs import options
from inputs.conditions import (
    class_colours,
    class_names,
    is_blank,
    open_boxes,
    open_drawing,
    open_image,
    open_label_map,
    read_condition,
)
from inputs.options import BASE
from inputs.pairs import PairFiles, find_pairs, group_pairs, warn_of_losses
from sample import load_base
from weights import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with 12 pictures and 12 conditions, no two alike."""
    root = tmp_path / "pairs"
    for kind in ("images", "conditions"):
        (root / kind).mkdir(parents=True)
        for i in range(12):
            ring(32 + i, 32 + i).save(root / kind / f"{i:02d}.png")
    return root


def found(path, extract=False):
    """Returns the pairs of a path that has no problems."""
    pairs, problems, _ = find_pairs(path, extract)
    assert problems == []
    return pairs


def problem(path, extract=False):
    """Returns the only problem of a path."""
    line, = find_pairs(path, extract)[1]
    return line


def listing(folder, rows, name="prompt.json"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


LAYOUTS = {"prompt.json": ("source", "target", "prompt"),
           "metadata.jsonl": ("conditioning_image", "file_name", "text")}


def test_three_layouts_give_the_same_pairs(folder):
    (folder / "images" / "00.txt").write_text("a ring\n\nsomething round\n")
    names = [(f"conditions/{i:02d}.png", f"images/{i:02d}.png",
              ("a ring", "something round") if i == 0 else ()) for i in range(12)]
    expected = [PairFiles(folder / cond, folder / image, prompts) for cond, image, prompts in names]
    assert found(folder) == expected
    for name, keys in LAYOUTS.items():
        rows = [dict(zip(keys, (cond, image, list(prompts)))) for cond, image, prompts in names]
        listing(folder, rows, name)
        assert found(folder) == expected
        # several lines for one pair are several captions, too
        first = [rows[0] | {keys[2]: text} for text in expected[0].prompts]
        listing(folder, first + rows[1:], name)
        assert found(folder) == expected
        (folder / name).unlink()
    rows = [dict(file_name=image, conditioning_image_file_name=cond) for cond, image, _ in names]
    listing(folder, rows, "metadata.jsonl")
    assert [pair[:2] for pair in found(folder)] == [pair[:2] for pair in expected]


def test_a_zip_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "pairs.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="pairs.zip: a .zip is not read; unpack it and give the"):
        find_pairs(tmp_path / "pairs.zip")


def test_a_check_counts_the_drawings_that_it_turns(check, folder, capsys):
    for name in ("03.png", "07.png"):
        ImageOps.invert(Image.open(folder / "conditions" / name)).save(folder / "conditions" / name)
    check()
    assert "drawings that are light on dark, and are turned: 2" in capsys.readouterr().out


def test_where_there_is_no_caption_the_default_prompt_stands(folder):
    (folder / "images" / "03.txt").write_text("three")
    prompts = {prompt for split in ("train", "val", "test")
               for pair in load_pairs("sketch", split, folder, default_prompt="a ring")
               for prompt in pair.prompts}
    assert prompts == {"three", "a ring"}


def test_only_images_are_enough_where_conditions_are_extracted(folder, tmp_path):
    shutil.rmtree(folder / "conditions")
    assert "conditions" in find_pairs(folder)[1][0]
    assert [pair.cond for pair in found(folder, True)] == [pair.image for pair in
                                                           found(folder, True)]
    flat = tmp_path / "flat"
    shutil.copytree(folder / "images", flat)
    assert len(found(flat, True)) == 12
    listing(flat, [dict(file_name="00.png", text="a ring")], "metadata.jsonl")
    assert found(flat, True) == [PairFiles(flat / "00.png", flat / "00.png", ("a ring",))]
    pair = load_pairs("sketch", "train", folder, True)[0]
    cond, x, _ = open_pair(pair, "sketch", 64, extract=True)
    assert cond.max() == 255 and (cond[0, :5] == 0).all()           # ink where the ring is only
    assert (x.mean(0)[cond[0] > 128].mean() < x.mean() - 0.2)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hosts.png", "images/../../secret.png",
                                  "C:\\secret.png", "..\\secret.png"])
def test_a_path_that_leaves_the_folder_is_refused_by_file_and_line(folder, name):
    ring(32, 32).save(folder.parent / "secret.png")
    listing(folder, [dict(source="conditions/00.png", target="images/00.png", prompt=""),
                     dict(source="conditions/01.png", target=name, prompt="")])
    line = problem(folder)
    assert "prompt.json, line 2: " in line and "leaves the folder" in line
    with pytest.raises(UserError, match="leaves the folder"):
        load_pairs("sketch", "train", folder)


@pytest.mark.parametrize("line, words", [
    ("nonsense", "line 2: not a JSON object with the keys source, target, text or prompt"),
    ("[1, 2]", "line 2: not a JSON object"), ('{"source": "a.png"}', "line 2: not a JSON object"),
    ('{"source": 3, "target": "images/00.png"}', "line 2: not a JSON object"),
    ('{"source": "conditions/00.png", "target": "images/00.png", "prompt": [1]}', "line 2: not"),
    ('{"source": "conditions/99.png", "target": "images/00.png"}', "conditions/99.png does not"),
    ('{"a":' * 100_000, "line 2: not a JSON object"),
    ('{"source": "conditions/00.png", "target": "images/00.png", "text": "\\ud800"}', "line 2: no"),
    ('{"source": "conditions/00.png", "target": "images/00.png", "text": {"e": ""}}', "line 2: no"),
])
def test_a_wrong_line_of_a_listing_is_named_once(folder, line, words):
    row = json.dumps(dict(source="conditions/00.png", target="images/00.png", prompt="a ring"))
    (folder / "prompt.json").write_text(f"{row}\n{line}\n")
    assert words in problem(folder)
    assert len(find_pairs(folder)[0]) == 1              # the good line's pair alone
    (folder / "prompt.json").write_text(f"[{row},\n{row}]")
    assert "prompt.json: a JSON array" in problem(folder)


def test_pairs_that_share_an_image_or_a_condition_are_on_one_side(folder):
    pairs = [PairFiles(folder / cond, folder / image, ()) for cond, image in
             ("ax", "by", "cy", "cx", "dz")]
    names = group_pairs(folder, pairs)
    assert names[0] == names[1] == names[2] == names[3] != names[4]
    rows = [dict(source=f"conditions/{i:02d}.png", target=f"images/{i % 6:02d}.png", prompt="")
            for i in range(12)]
    listing(folder, rows)
    with pytest.raises(UserError, match="6 pairs; at least 10"):
        load_pairs("sketch", "train", folder)


def test_halves_of_pairs_doubled_names_and_too_few_are_refused(folder, tmp_path):
    (folder / "images" / "01.png").unlink()
    assert "01 is not in both" in problem(folder)
    with pytest.raises(UserError, match="01 is not in both"):
        load_pairs("sketch", "train", folder)
    (folder / "conditions" / "01.png").unlink()
    ring(32, 32).save(folder / "images" / "02.jpg")
    assert "02.jpg and 02.png: which one?" in problem(folder)
    (folder / "images" / "02.jpg").unlink()
    for i in (2, 3):
        for kind in ("images", "conditions"):
            (folder / kind / f"0{i}.png").unlink()
    with pytest.raises(UserError, match="9 pairs; at least 10"):
        load_pairs("sketch", "train", folder)
    (tmp_path / "empty").mkdir()
    assert "no pairs; allowed are" in problem(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_pairs(tmp_path / "nowhere")


def test_what_systems_leave_behind_is_no_pair(folder):
    (folder / "conditions" / ".DS_Store").write_text("")
    (folder / "images" / "Thumbs.db").write_text("")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "00.png").write_text("")
    assert len(found(folder)) == 12


def test_a_listing_may_begin_with_a_byte_order_mark_but_must_be_utf8(folder):
    row = json.dumps(dict(source="conditions/00.png", target="images/00.png", prompt="grün"))
    (folder / "prompt.json").write_text(row, encoding="utf-8-sig")
    assert found(folder)[0].prompts == ("grün",)
    (folder / "prompt.json").write_bytes(b'{"source": "\xff"}')
    with pytest.raises(UserError, match="prompt.json: not UTF-8"):
        find_pairs(folder)


def test_pairs_in_folders_of_their_own_are_told_apart(tmp_path):
    rows = []
    for i in range(12):
        (tmp_path / f"{i:02d}").mkdir()
        for name in ("source", "target"):
            ring(32, 24).save(tmp_path / f"{i:02d}" / f"{name}.png")
        rows.append(dict(source=f"{i:02d}/source.png", target=f"{i:02d}/target.png",
                         prompt="a ring"))
    listing(tmp_path, rows)
    sides = [len(load_pairs("sketch", side, tmp_path)) for side in ("train", "val", "test")]
    assert sides == [9, 1, 2]


@pytest.mark.parametrize("suffix", [".JPG", ".jfif", ".jpe", ".tif", ".TIFF", ".avif", ".gif",
                                    ".tga", ".ppm", ".jp2"])
def test_images_of_every_suffix_that_pillow_reads_are_used(folder, suffix):
    if suffix.lower() not in Image.registered_extensions():
        pytest.skip(f"this Pillow reads no {suffix}")
    for kind in ("images", "conditions"):
        Image.open(folder / kind / "03.png").save(folder / kind / f"03{suffix}")
        (folder / kind / "03.png").unlink()
    pairs, problems, unused = find_pairs(folder)
    assert (len(pairs), problems, unused) == (12, [], [])
    images = [pair.open_image() for split in ("train", "val", "test")
              for pair in load_pairs("sketch", split, folder) if pair.name.endswith(suffix)]
    assert [image.size for image in images] == [(35, 35)]


def test_images_in_subfolders_are_used_and_what_is_not_used_is_told(folder, check, capsys):
    for kind in ("images", "conditions"):
        (folder / kind / "more").mkdir()
        (folder / kind / "03.png").rename(folder / kind / "more" / "03.png")
    (folder / "images" / "more" / "03.Caption").write_text("three")
    assert len(found(folder)) == 12
    assert [pair.prompts for pair in found(folder) if "more" in str(pair.cond)] == [("three",)]
    for name in ("images/12.svg", "images/99.txt", "notes.docx"):
        (folder / name).write_text("")
    assert [str(file.relative_to(folder)) for file in find_pairs(folder)[2]] == [
        "images/12.svg", "images/99.txt", "notes.docx"]
    with pytest.warns(UserWarning, match="belong to no pair: 3, such as .*images/12.svg"):
        warn_of_losses(folder, False, "a ring")
    check()
    assert f"belongs to no pair: {folder}/images/12.svg" in capsys.readouterr().out


def test_links_are_followed_and_loops_end(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for kind in ("images", "conditions"):
        (linked / kind).symlink_to(folder / kind)
    assert len(found(linked)) == 12
    (folder / "images" / "round").symlink_to(linked)            # linked/images/round is linked
    (folder / "conditions" / "round").symlink_to(linked)
    (folder / "images" / "self").symlink_to("self")             # a link to itself is no image
    assert len(found(linked)) == 12
    for i in range(8):                                          # each of eight links to all
        for j in range(8):
            (folder / "images" / f"f{i}").mkdir(exist_ok=True)
            (folder / "images" / f"f{i}" / f"f{j}").symlink_to(folder / "images" / f"f{j}")
    assert len(found(linked)) == 12
    row = dict(source="conditions/00.png", target="images/00.png", text="a ring")
    listing(linked, [row])
    assert [pair.prompts for pair in found(linked)] == [("a ring",)]


@pytest.mark.parametrize("key", ["caption", "Prompt", "TEXT", "Description"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_caption_is_read_under_any_of_its_keys(folder, name, key):
    cond, image, _ = LAYOUTS[name]
    listing(folder, [{cond.upper(): f"conditions/{i:02d}.png", image: f"images/{i:02d}.png",
                      key: f"thing {i}", "width": 3} for i in range(12)], name)
    assert [pair.prompts for pair in found(folder)] == [(f"thing {i}",) for i in range(12)]


def test_blank_captions_are_none(folder):
    listing(folder, [dict(source=f"conditions/{i:02d}.png", target=f"images/{i:02d}.png", text=text)
                     for i, text in enumerate(["", " ", [""], ["a ", " "], "\n"])])
    assert [pair.prompts for pair in found(folder)] == [(), (), (), ("a",), ()]


def test_a_listing_may_be_written_in_any_case(folder):
    listing(folder, [dict(source="conditions/00.png", target="images/00.png")], "Prompt.JSON")
    assert len(found(folder)) == 1


def test_the_folder_of_a_training_is_no_folder_of_pictures(folder):
    shutil.copytree(folder / "images", folder / "images" / "run")
    (folder / "images" / "run" / "args.json").write_text("{}")
    assert len(found(folder)) == 12


@pytest.mark.parametrize("suffix", [".caption", ".TXT", ".Caption"])
def test_a_caption_file_may_have_either_suffix_in_any_case(folder, suffix):
    (folder / "images" / f"03{suffix}").write_text("three\r\nand a half\x0cor so\u2028or more\r\n",
                                                   encoding="utf-8")
    assert found(folder)[3].prompts == ("three", "and a half\x0cor so\u2028or more")


def test_pairs_without_captions_are_told_once_unless_there_is_a_default(folder, recwarn):
    warn_of_losses(folder, False, "")
    line, = [str(warning.message) for warning in recwarn.list]
    assert "12 of 12 pairs have no caption" in line and "--default-prompt" in line
    warn_of_losses(folder, False, "a ring")
    for i in range(6):
        (folder / "images" / f"{i:02d}.txt").write_text("a ring")
    warn_of_losses(folder, False, "")
    assert len(recwarn.list) == 1


def test_an_accent_is_one_letter_however_it_is_spelled(folder):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (folder / "images" / "03.png").rename(folder / "images" / f"{composed}.png")
    (folder / "conditions" / "03.png").rename(folder / "conditions" / f"{decomposed}.png")
    (folder / "images" / f"{decomposed}.txt").write_text("coffee")
    assert len(found(folder)) == 12 and found(folder)[-1].prompts == ("coffee",)
    listing(folder, [dict(source=f"conditions/{composed}.png", target=f"images/{decomposed}.png")])
    pair, = found(folder)
    assert pair.cond.is_file() and pair.image.is_file()


def test_a_huge_and_an_unreadable_file_are_refused_by_name(folder, monkeypatch):
    pair = load_pairs("sketch", "train", folder)[0]
    stem = pair.name[-6:]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)         # more than that warns, twice raises
    for pixels in (900, 500):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        with pytest.raises(UserError, match=f"{stem}: more than .* pixels"):
            pair.open_image()
    monkeypatch.undo()
    (folder / "images" / stem).write_bytes((folder / "images" / stem).read_bytes()[:60])
    with pytest.raises(UserError, match=f"{stem}: cannot be read as an image"):
        pair.open_image()


# ---- label maps ----------------------------------------------------------------------------

def label_map(size=40, mode="P"):
    """Two classes, 0 and 7, in halves."""
    array = np.zeros((size, size), np.uint8)
    array[:, size // 2:] = 7
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([10, 20, 30] * 7 + [200, 100, 50])
    return image


def test_a_label_map_keeps_its_colours_and_nothing_between(folder):
    for i in range(12):
        label_map(32 + i).save(folder / "conditions" / f"{i:02d}.png")
        label_map(32 + i).convert("RGB").save(folder / "images" / f"{i:02d}.png")   # lopsided
    pair = load_pairs("segmentation", "train", folder)[0]
    cond, x, colours = open_pair(pair, "segmentation", 48)
    assert colours == {"#0a141e": 0, "#c86432": 7}
    values = set(map(tuple, cond.flatten(1).T.tolist()))
    assert values == {(10, 20, 30), (200, 100, 50)}
    flipped, x_flipped, _ = open_pair(pair, "segmentation", 48, flip=True)
    assert torch.equal(flipped, cond.flip(-1)) and torch.equal(x_flipped, x.flip(-1))


def test_two_used_classes_of_one_colour_are_refused(tmp_path):
    image = label_map()
    image.putpalette([10, 20, 30] * 8)
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: two of its classes have one colour"):
        open_label_map(tmp_path / "a.png")


def test_grey_class_numbers_are_the_same_condition_in_training_and_sampling(folder, tmp_path):
    for i in range(12):
        label_map(48, "L").save(folder / "conditions" / f"{i:02d}.png")
        ring(48, 48).save(folder / "images" / f"{i:02d}.png")
    pair = load_pairs("segmentation", "train", folder)[0]
    trained, _, colours = open_pair(pair, "segmentation", 48)
    label_map(48, "L").save(tmp_path / "grey.png")
    drawn, _ = read_condition(tmp_path / "grey.png", "segmentation", 48, 48,
                              dict.fromkeys(colours, ""))
    assert torch.equal((drawn * 255).round().byte(), trained)


def mask(mode, inside):
    """The same half in one bit, in grey as 0 and `inside`, or in a palette of black and white."""
    array = np.zeros((48, 48), np.uint8)
    array[:, 24:] = inside
    image = Image.fromarray(array)
    if mode == "1":
        return image.point(lambda value: 255 * (value > 0)).convert("1")
    return image.convert("RGB").quantize(2) if mode == "P" else image.convert(mode)


MASKS = (("1", 1), ("L", 255), ("L", 1), ("P", 255), ("I;16", 1), ("RGB", 255))


@pytest.mark.parametrize("trained", MASKS[:4], ids=str)
@pytest.mark.parametrize("drawn", MASKS, ids=str)
def test_a_mask_is_the_same_in_one_bit_in_grey_and_in_black_and_white(tmp_path, trained, drawn):
    mask(*trained).save(tmp_path / "trained.png")
    mask(*drawn).save(tmp_path / "drawn.png")
    colours = class_names(class_colours(open_label_map(tmp_path / "trained.png")))
    expected, _ = read_condition(tmp_path / "trained.png", "segmentation", 48, 48, colours)
    cond, _ = read_condition(tmp_path / "drawn.png", "segmentation", 48, 48, colours)
    assert torch.equal(cond, expected) and cond[:, :, 24:].amax() > 0.4
    label_map(mode="L").save(tmp_path / "seven.png")
    with pytest.raises(UserError, match="seven.png: class 7 is unknown"):
        read_condition(tmp_path / "seven.png", "segmentation", 48, 48, colours)


def test_grey_maps_are_spoken_of_by_number(tmp_path, folder, check, capsys):
    for i in range(12):
        label_map(48, "L").save(folder / "conditions" / f"{i:02d}.png")
        ring(48, 48).save(folder / "images" / f"{i:02d}.png")
    check("--task", "segmentation")
    assert "classes: 0 in 12 maps, 7 in 12 maps" in capsys.readouterr().out
    classes = class_names(class_colours(open_label_map(folder / "conditions" / "00.png")))
    Image.fromarray(np.full((48, 48), 9, np.uint8)).save(tmp_path / "nine.png")
    with pytest.raises(UserError, match="nine.png: class 9 is unknown; .* trained on 0, 7$"):
        read_condition(tmp_path / "nine.png", "segmentation", 48, 48, classes)


def test_palettes_may_number_the_same_colours_differently(folder):
    colours = [(10, 20, 30), (200, 100, 50), (0, 0, 255)]
    for i in range(12):
        image = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8), 16)[None].repeat(48, 0))
        image.putpalette([value for k in range(3) for value in colours[(k + i) % 3]])
        image.save(folder / "conditions" / f"{i:02d}.png")
        ring(48, 48).save(folder / "images" / f"{i:02d}.png")
    base = load_base(options.BASE)
    caches = [LatentCache(load_pairs("segmentation", split, folder), "segmentation", 48, base)
              for split in ("train", "val", "test")]
    check_conditions(caches, "segmentation")
    other = label_map(48)
    other.putpalette([0, 255, 0] * 7 + [255, 0, 255])           # the numbers 0 and 7
    another = label_map(48)
    another.putpalette([0, 255, 255] * 7 + [255, 255, 0])
    other.save(folder / "conditions" / "00.png")
    another.save(folder / "conditions" / "01.png")
    caches = [LatentCache(load_pairs("segmentation", split, folder), "segmentation", 48, base)
              for split in ("train", "val", "test")]
    with pytest.raises(UserError, match="palettes differ: class 0 is #00ff00 in .*, #00ffff in"):
        check_conditions(caches, "segmentation")


def test_class_numbers_in_grey_get_a_palette_of_distinct_colours(tmp_path):
    label_map(mode="L").save(tmp_path / "grey.png")
    image = open_label_map(tmp_path / "grey.png")
    assert image.mode == "P" and set(np.unique(np.asarray(image))) == {0, 7}
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert len(set(map(tuple, palette.tolist()))) == 256
    # PASCAL VOC's first classes: background, aeroplane, bicycle
    assert palette[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


def test_a_label_map_in_jpeg_or_in_shades_is_refused(tmp_path):
    label_map().convert("RGB").save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a.jpg: a JPEG file blurs where classes meet"):
        open_label_map(tmp_path / "a.jpg")
    ring(64, 64).save(tmp_path / "rgb.png")
    with pytest.raises(UserError, match="rgb.png: mode RGB, .* palette PNG"):
        open_label_map(tmp_path / "rgb.png")
    boxes = label_map().convert("RGB")
    boxes.save(tmp_path / "boxes.png")
    assert open_boxes(tmp_path / "boxes.png").mode == "P"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    message = "noise.png: 1,[0-9]+ colours; a label map has one per class"
    with pytest.raises(UserError, match=message):
        open_boxes(tmp_path / "noise.png")


# ---- blank conditions ----------------------------------------------------------------------

def ink_on_transparency(ink, paper=None):
    """A ring of a colour on transparency, its middle filled if a paper is given."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((13, 13, 51, 51), fill=paper, outline=ink, width=4)
    return image


@pytest.mark.parametrize("ink, paper", [
    ("white", None), ("yellow", None), ("black", None), ("grey", None), ("black", "white"),
    ("white", "black")], ids=str)
def test_ink_on_transparency_is_seen_whatever_its_colour(tmp_path, ink, paper):
    ink_on_transparency(ink, paper).save(tmp_path / "a.png")
    cond, _ = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    assert cond[0, :10].max() < 0.1 and cond[0, 10:20, 28:36].max() > 0.9
    opened = np.asarray(open_drawing(tmp_path / "a.png").convert("L"))      # training reads it so
    assert opened[0, 0] == 255 and opened.min() < 160


def test_sparse_white_ink_on_transparency_is_seen(tmp_path):
    image = Image.new("RGBA", (1024, 1024), (0, 0, 0, 0))
    ImageDraw.Draw(image).line((300, 300, 380, 300), fill="white", width=6)
    image.save(tmp_path / "a.png")
    assert read_condition(tmp_path / "a.png", "sketch", 256, 256)[0].sum() > 10


def test_masks_whose_inside_differs_are_refused(folder, check, capsys):
    for i in range(12):
        mask("L", 1 if i < 6 else 255).save(folder / "conditions" / f"{i:02d}.png")
        ring(48, 48).save(folder / "images" / f"{i:02d}.png")
    with pytest.raises(UserError, match="problems, each named above: 1"):
        check("--task", "segmentation")
    assert "masks differ: inside is 1 in" in capsys.readouterr().out
    with pytest.raises(UserError, match="masks differ: inside is 1 in .*, but 255 in"):
        train_main(folder, "segmentation")


def train_main(folder, task):
    """Runs train.py on a folder for a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--data", str(folder), "--task", task, "--steps",
                                    "1", "--size", "48", "--cache", str(folder.parent / "cache"),
                                    "--out", str(folder.parent / "run")])
        train.main()


def test_classes_of_faint_contrast_are_not_blank(folder):
    for i in range(12):
        image = label_map(48)
        image.putpalette([value for k in range(256) for value in (k, k, k)])
        image.save(folder / "conditions" / f"{i:02d}.png")
    cond = open_pair(load_pairs("segmentation", "train", folder)[0], "segmentation", 48)[0] / 255
    assert not is_blank(cond, "segmentation") and is_blank(cond * 0, "segmentation")


def test_blank_conditions_are_named_and_refused_if_there_is_nothing_else(folder, check, capsys):
    Image.new("RGB", (35, 35), "white").save(folder / "conditions" / "03.png")
    check()
    assert f"blank condition: {folder}/conditions/03.png" in capsys.readouterr().out
    base = load_base(options.BASE)

    def caches():
        return [LatentCache(load_pairs("sketch", split, folder), "sketch", 48, base)
                for split in ("train", "val", "test")]

    with pytest.warns(UserWarning, match="1 of 12 conditions are blank, such as .*03.png"):
        check_conditions(caches(), "sketch")
    for i in range(12):
        Image.new("RGB", (32 + i, 32 + i), "white").save(folder / "conditions" / f"{i:02d}.png")
    with pytest.raises(UserError, match="blank, and so are all other conditions"):
        check_conditions(caches(), "sketch")
    with pytest.raises(UserError, match="problems, each named above: 1"):
        check()
    assert "all conditions are blank" in capsys.readouterr().out


# ---- pictures that Pillow trips over -------------------------------------------------------

def png_with(chunk):
    """The bytes of a PNG that has one more chunk, (kind, data), behind its header."""
    file = io.BytesIO()
    ring(64, 64).save(file, "PNG")
    kind, data = chunk
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file.getvalue()[:33] + chunk + file.getvalue()[33:]


def jpeg_with_tags(*tags):
    """The bytes of a JPEG whose EXIF has tags (number, type, value)."""
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    file = io.BytesIO()
    ring(64, 64).save(file, "JPEG", exif=exif)
    return file.getvalue()


ODD_PICTURES = {
    "long.jpg": jpeg_with_tags((0x0103, 4, 0xFFFFFFFF), (0x0112, 3, 6)),
    "orientation.jpg": jpeg_with_tags((0x0112, 3, 99)),
    "offset.jpg": jpeg_with_tags((0x0112, 2, 0xFFFF)),
    "exif.png": png_with((b"eXIf", b"not a TIFF header")),
    "hex.png": png_with((b"zTXt", b"Raw profile type exif\0\0"
                         + zlib.compress(b"\nexif\n  20\nzz\n"))),
    "profile.png": png_with((b"iCCP", b"large\0\0" + zlib.compress(bytes(3_000_000)))),
    "text.png": png_with((b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000))),
    "international.png": png_with((b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000))),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_a_picture_with_odd_notes_is_read_as_viewers_show_it(tmp_path, name):
    (tmp_path / name).write_bytes(ODD_PICTURES[name])
    picture = np.asarray(open_image(tmp_path / name), float)
    assert picture.shape == (64, 64, 3) and np.abs(picture - np.asarray(ring(64, 64))).mean() < 3


def test_every_orientation_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4), "white")
    image.putpixel((1, 0), (0, 0, 0))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.png"
        image.save(file, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        assert np.array_equal(np.asarray(open_image(file)), np.asarray(expected))


def test_whatever_a_decoder_raises_is_one_line_with_the_file(tmp_path, monkeypatch):
    ring(32, 32).save(tmp_path / "a.png")
    for error in (IndexError("x"), struct.error("x"), MemoryError(), RuntimeError("x")):
        def fail(*_, error=error):
            raise error
        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(UserError, match="a.png: cannot be read as an image"):
            open_image(tmp_path / "a.png")


# ---- --check-data --------------------------------------------------------------------------

@pytest.fixture
def check(folder, tmp_path, monkeypatch):
    """Runs train.py --check-data on the folder; returns its sheet."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(folder), "--check-data",
                                          "--out", str(tmp_path / "out"), *arguments])
        train.main()
        return tmp_path / "out" / "check.png"

    return run


def test_a_check_asks_for_a_tokenizer_before_it_looks_at_pictures(check, sd_file, capsys):
    with pytest.raises(UserError, match="a single file, which has no tokenizer. Add --tokenizer"):
        check("--base", str(sd_file("small1")))
    assert capsys.readouterr().out == ""
    assert check("--base", str(sd_file("small1")), "--tokenizer", str(BASE)).exists()


def test_a_check_tells_what_is_there_and_shows_what_the_network_sees(check, folder, capsys):
    (folder / "images" / "01.txt").write_text("a ring " * 60)
    shutil.copy(folder / "images" / "01.png", folder / "images" / "05.png")
    shutil.copy(folder / "conditions" / "01.png", folder / "conditions" / "05.png")
    sheet = Image.open(check("--size", "48"))
    printed = capsys.readouterr().out
    for words in ("pairs: 12, of which 9 train, 1 val, 2 test", "image 33 x 33 (2)",
                  "condition RGB (12)", "light on dark, and are turned: 0",
                  "captions: 1, and 11 pictures without; their --default-prompt is ''",
                  f"cut: {folder}/images/01.png: its caption loses 'ring a ring",
                  f"duplicates: image {folder}/images/01.png = {folder}/images/05.png"):
        assert words in printed, words
    pairs = load_pairs("sketch", "train", folder)
    cond, x, _ = open_pair(pairs[0], "sketch", 48)
    shown = np.asarray(sheet.crop((0, 16, 96, 112)).resize((48, 48), Image.Resampling.NEAREST))
    assert np.abs(shown[..., 0] - (255 - cond[0].numpy().astype(int))).max() <= 1


def test_a_check_knows_the_default_prompt_and_turned_photos(check, folder, capsys):
    for i in range(12):                             # as a phone writes them: wide, to be turned
        exif = Image.Exif()
        exif[0x0112] = 6
        ring(60, 30).save(folder / "images" / f"{i:02d}.jpg", exif=exif)
        (folder / "images" / f"{i:02d}.png").unlink()
        ring(30, 60).save(folder / "conditions" / f"{i:02d}.png")
    check("--default-prompt", "a ring " * 60)
    printed = capsys.readouterr().out
    assert "image 30 x 60 (12)" in printed
    assert "and 12 pictures without; their --default-prompt is 'a ring" in printed
    assert "cut: --default-prompt: its caption loses" in printed


def test_a_check_names_every_problem_and_ends_in_an_error(check, folder, capsys):
    (folder / "images" / "01.png").unlink()
    (folder / "images" / "02.png").write_bytes(b"nonsense")
    (folder / "images" / "04.txt").write_bytes("grün".encode("latin-1"))
    ring(32, 50).save(folder / "images" / "03.png")
    damaged = bytearray((folder / "images" / "05.png").read_bytes())
    damaged[-16] ^= 1                               # in the checksum of the pixels
    (folder / "images" / "05.png").write_bytes(damaged)
    with pytest.raises(UserError, match="problems, each named above: 5"):
        check()
    lines = capsys.readouterr().out
    for words in ("01 is not in both", "02.png: cannot be read as an image", "04.txt: not UTF-8",
                  "05.png: cannot be read as an image",
                  "03.png: 35 x 35 px, but its picture has 32 x 50"):
        assert words in lines, words


def test_a_check_of_label_maps_tells_classes_and_palettes_that_differ(check, folder, capsys):
    for i in range(12):
        label_map(32 + i).save(folder / "conditions" / f"{i:02d}.png")
    check("--task", "segmentation")
    assert "classes: #0a141e in 12 maps, #c86432 in 12 maps" in capsys.readouterr().out
    other = label_map(32)
    other.putpalette([10, 20, 30] * 7 + [0, 0, 255])
    other.save(folder / "conditions" / "00.png")
    with pytest.raises(UserError, match="problems, each named above: 1"):
        check("--task", "segmentation")
    printed = capsys.readouterr().out
    assert f"class 7 is #0000ff in {folder}/conditions/00.png, #c86432 in {folder}/" in printed
    check("--task", "sketch")
    assert "note: palette images as line drawings" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["--extract"], "--extract: needs --data"), (["--check-data"], "--check-data: needs"),
    (["--data", "x", "--extract", "--task", "layout"], "--extract: makes no conditions for --task"),
    (["--data", "tests", "--extract", "--out", "tests/x"], "--out must be outside tests, whose"),
    (["--prompt-drop", "1.5"], "--prompt-drop 1.5: allowed are 0 to 1"),
    (["--weights", "a,b"], "must be head-heavy, flat or numbers in [0, 10000)"),
    (["--weights", "0,0"], "not all 0, as in 16,8,4,16,1, got 0,0"),
    (["--paths", "up"], "unrecognized arguments: --paths up"),
    (["--lr", "-1"], "--lr -1.0: allowed is"), (["--task", "nonsense"], "'nonsense' (choose"),
    (["--foot", "none"], "'none'")])
def test_a_wrong_option_of_training_is_one_line(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        train.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and words in printed and printed.count("\n") == 1
