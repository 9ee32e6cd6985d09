"""A user's own pairs: three layouts of a folder, what is left out of it, and --check-data."""
import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawings import label_map, mask, ring, with_orientation
from PIL import Image, ImageOps

import train
from data import LatentCache, Pair, check_conditions, load_pairs, open_pair
from inputs.conditions import FORMATS, cond_to_x, to_image
from inputs.options import BASE
from inputs.pairs import (IMAGE_SUFFIXES, PairFiles, find_pairs, group_pairs, list_files,
                          warn_of_losses)
from weights import UserError

NAMES = [f"{i:02d}" for i in range(12)]


@pytest.fixture
def folder(tmp_path):
    """A folder with 12 pictures and 12 conditions, no two alike."""
    root = tmp_path / "pairs"
    for part in ("images", "conditions"):
        (root / part).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            ring(32 + i, 32 + i).save(root / part / f"{name}.png")
    return root


def write_maps(folder, maps):
    """Replace the folder's pairs by label maps, an image or 12 of them, and pictures of 48 px."""
    for i, name in enumerate(NAMES):
        (maps[i] if isinstance(maps, list) else maps).save(folder / "conditions" / f"{name}.png")
        ring(48, 48).save(folder / "images" / f"{name}.png")


def find(folder, extract=False):
    """The pairs of a folder that has no problems."""
    pairs, problems, _ = find_pairs(folder, extract)
    assert problems == []
    return pairs


def prompts_of(folder):
    return [pair.prompts for pair in find(folder)]


def write_listing(folder, rows, name="prompt.json"):
    """Write each of rows, a dict or a line, as a line of a listing."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(name, **more):
    """A line of prompt.json for the pair of a name."""
    return dict(source=f"conditions/{name}.png", target=f"images/{name}.png") | more


LAYOUTS = {"prompt.json": ("source", "target", "prompt"),
           "metadata.jsonl": ("conditioning_image", "file_name", "text")}


# ---- layouts -------------------------------------------------------------------------------

def test_three_layouts_give_the_same_pairs(folder):
    (folder / "images" / "00.txt").write_text("a ring\n\nsomething round\n")
    names = [(f"conditions/{name}.png", f"images/{name}.png",
              ("a ring", "something round") if name == "00" else ()) for name in NAMES]
    expected = [PairFiles(folder / cond, folder / image, prompts) for cond, image, prompts in names]
    assert find(folder) == expected
    for name, keys in LAYOUTS.items():
        rows = [dict(zip(keys, (cond, image, list(prompts)))) for cond, image, prompts in names]
        write_listing(folder, rows, name)
        assert find(folder) == expected
        # several lines for one pair are several captions too
        first = [rows[0] | {keys[2]: text} for text in expected[0].prompts]
        write_listing(folder, first + rows[1:], name)
        assert find(folder) == expected
        (folder / name).unlink()
    rows = [dict(file_name=image, conditioning_image_file_name=cond) for cond, image, _ in names]
    write_listing(folder, rows, "metadata.jsonl")
    assert [pair[:2] for pair in find(folder)] == [pair[:2] for pair in expected]


@pytest.mark.parametrize("key", ["caption", "Prompt", "TEXT", "Description"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_and_listings_may_have_any_case(folder, name, key):
    cond, image, _ = LAYOUTS[name]
    write_listing(folder, [{cond.upper(): f"conditions/{i}.png", image: f"images/{i}.png",
                            key: f"thing {i}", "width": 3} for i in NAMES], name.title())
    assert prompts_of(folder) == [(f"thing {i}",) for i in NAMES]


def test_blank_captions_are_none(folder):
    texts = ["", " ", [""], ["a ", " "], "\n"]
    write_listing(folder, [row(name, text=text) for name, text in zip(NAMES, texts)])
    assert prompts_of(folder) == [(), (), (), ("a",), ()]


def test_a_listing_may_begin_with_a_byte_order_mark_but_must_be_utf8(folder):
    (folder / "prompt.json").write_text(json.dumps(row("00", prompt="grün")), encoding="utf-8-sig")
    assert prompts_of(folder) == [("grün",)]
    (folder / "prompt.json").write_bytes(b'{"source": "\xff"}')
    with pytest.raises(UserError, match="prompt.json must be UTF-8"):
        find_pairs(folder)


@pytest.mark.parametrize("suffix", [".caption", ".TXT", ".Caption"])
def test_a_caption_file_may_have_either_suffix_in_any_case(folder, suffix):
    (folder / "images" / f"03{suffix}").write_text("three\r\nand a half\x0cor so\u2028or more\r\n",
                                                   encoding="utf-8")
    assert prompts_of(folder)[3] == ("three", "and a half\x0cor so\u2028or more")


def test_pictures_without_a_caption_get_the_default_prompt(folder):
    (folder / "images" / "03.txt").write_text("three")
    prompts = {prompt for split in ("train", "val", "test")
               for pair in load_pairs("sketch", split, folder, default_prompt="a ring")
               for prompt in pair.prompts}
    assert prompts == {"three", "a ring"}


def test_missing_captions_are_one_warning_unless_there_is_a_default(folder, recwarn):
    warn_of_losses(folder, False, "")
    warn_of_losses(folder, False, "a ring")
    for name in NAMES[:6]:
        (folder / "images" / f"{name}.txt").write_text("a ring")
    warn_of_losses(folder, False, "")
    line, = [str(warning.message) for warning in recwarn.list]
    assert "12 of 12 pairs have no caption" in line and "--default-prompt" in line


def test_extracted_conditions_need_only_images(folder, tmp_path):
    shutil.rmtree(folder / "conditions")
    assert "conditions" in find_pairs(folder)[1][0]
    assert all(pair.cond == pair.image for pair in find(folder, extract=True))
    flat = tmp_path / "flat"
    shutil.copytree(folder / "images", flat)
    assert len(find(flat, extract=True)) == 12
    write_listing(flat, [dict(file_name="00.png", text="a ring")], "metadata.jsonl")
    assert find(flat, extract=True) == [PairFiles(flat / "00.png", flat / "00.png", ("a ring",))]
    pair = load_pairs("sketch", "train", folder, True)[0]
    cond, x, _ = open_pair(pair, "sketch", 64, extract=True)
    assert cond.max() == 255 and (cond[0, :5] == 0).all()           # ink only where the ring is
    assert x.mean(0)[cond[0] > 128].mean() < x.mean() - 0.2


# ---- files and folders ---------------------------------------------------------------------

def test_images_in_subfolders_are_used_and_unused_files_listed(folder, check):
    for part in ("images", "conditions"):
        (folder / part / "more").mkdir()
        (folder / part / "03.png").rename(folder / part / "more" / "03.png")
    (folder / "images" / "more" / "03.Caption").write_text("three")
    assert prompts_of(folder) == 11 * [()] + [("three",)]
    for name in ("images/12.json", "images/99.txt", "notes.docx"):
        (folder / name).write_text("")
    assert [str(file.relative_to(folder)) for file in find_pairs(folder)[2]] == [
        "images/12.json", "images/99.txt", "notes.docx"]
    with pytest.warns(UserWarning, match="3 files belong to no pair, such as .*images/12.json"):
        warn_of_losses(folder, False, "a ring")
    assert f"belong to no pair: {folder}/images/12.json; {folder}/images/99.txt" in check()


def test_links_are_followed_and_loops_end(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in ("images", "conditions"):
        (linked / part).symlink_to(folder / part)
    assert len(find(linked)) == 12
    (folder / "images" / "round").symlink_to(linked)            # linked/images/round is linked
    (folder / "conditions" / "round").symlink_to(linked)
    (folder / "images" / "self").symlink_to("self")             # a link to itself is no image
    assert len(find(linked)) == 12
    for i in range(8):                                          # each of eight links to all
        for j in range(8):
            (folder / "images" / f"f{i}").mkdir(exist_ok=True)
            (folder / "images" / f"f{i}" / f"f{j}").symlink_to(folder / "images" / f"f{j}")
    assert len(find(linked)) == 12
    write_listing(linked, [row("00", text="a ring")])
    assert prompts_of(linked) == [("a ring",)]


def test_pairs_in_folders_of_their_own_are_told_apart(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        for role in ("source", "target"):
            ring(32, 24).save(tmp_path / name / f"{role}.png")
    write_listing(tmp_path, [dict(source=f"{name}/source.png", target=f"{name}/target.png",
                                  prompt="a ring") for name in NAMES])
    counts = [len(load_pairs("sketch", split, tmp_path)) for split in ("train", "val", "test")]
    assert counts == [9, 1, 2]


def test_every_suffix_of_the_formats_that_are_read_is_used():
    registered = Image.registered_extensions().items()
    assert set(IMAGE_SUFFIXES) >= {suffix for suffix, name in registered if name in FORMATS}


def test_an_accent_is_one_letter_however_it_is_spelled(folder):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (folder / "images" / "03.png").rename(folder / "images" / f"{composed}.png")
    (folder / "conditions" / "03.png").rename(folder / "conditions" / f"{decomposed}.png")
    (folder / "images" / f"{decomposed}.txt").write_text("coffee")
    assert len(find(folder)) == 12 and prompts_of(folder)[-1] == ("coffee",)
    write_listing(folder, [dict(source=f"conditions/{composed}.png",
                                target=f"images/{decomposed}.png")])
    pair, = find(folder)
    assert pair.cond.is_file() and pair.image.is_file()


def test_pairs_that_share_a_file_are_in_one_split(folder):
    pairs = [PairFiles(folder / cond, folder / image, ()) for cond, image in
             ("ax", "by", "cy", "cx", "dz")]
    groups = group_pairs(folder, pairs)
    assert groups[0] == groups[1] == groups[2] == groups[3] != groups[4]
    write_listing(folder, [row(f"{i:02d}", target=f"images/{i % 6:02d}.png") for i in range(12)])
    with pytest.raises(UserError, match="at least 10 pairs .* got 6"):
        load_pairs("sketch", "train", folder)


# ---- what other programs leave beside the pictures -----------------------------------------

@pytest.mark.parametrize("text, captions, other_lines", [
    ("a thing, best\nNegative prompt: dull,\nblurry\nSteps: 25, Sampler: DDIM",
     ("a thing, best",), 3),
    ("a thing\nSteps: 9, Seed: 3", ("a thing",), 1),
    ("0 0.45 0.50 0.66 0.69\n3 0.2 0.31 0.1 0.12", (), 2),
    ("car 0.00 0 -1.57 599.41 156.40\na red car", ("a red car",), 1),
    ("0 0.5 0.5 0.1 1e-05\n0,0.5,0.5,0.1,1e+00", (), 2),
    ("top 10, 20, 30, 40\nsteps: 3, 2 and 1", ("top 10, 20, 30, 40", "steps: 3, 2 and 1"), 0),
    ("7\n2 cats, 3 dogs, 4 5 6\nsteps: up to a door", ("7", "2 cats, 3 dogs, 4 5 6",
                                                      "steps: up to a door"), 0)])
def test_parameters_and_boxes_are_not_captions(folder, check, text, captions, other_lines):
    (folder / "images" / "03.txt").write_text(text)
    pair = find(folder)[3]
    assert (pair.prompts, pair.other_lines) == (captions, other_lines)
    note = f"{other_lines} lines of NAME.txt are parameters or boxes of other programs"
    assert (f"note: {note}" in check()) == bool(other_lines)
    if other_lines:
        with pytest.warns(UserWarning, match=note):
            warn_of_losses(folder, False, "a ring")


@pytest.mark.parametrize("name", ["@eaDir/00.png", ".thumbnails", "__MACOSX/images", ".@__thumb",
                                  "@Recycle", "@tmp", "#recycle", "$RECYCLE.BIN", "lost+found",
                                  "Thumbs.db", "desktop.ini", "run"])
def test_folders_of_a_system_or_a_training_contain_no_pairs(folder, name):
    for part in ("images", "conditions"):
        (folder / part / name).mkdir(parents=True)
        ring(9, 9).save(folder / part / name / "small.png")
        if name == "run":
            (folder / part / name / "args.json").write_text("{}")
    assert len(find(folder)) == len(list_files(folder / "images").images) == 12
    assert find_pairs(folder)[2] == []


def test_a_format_that_is_not_read_is_named_unless_it_is_a_source(folder, check):
    (folder / "images" / "03.png").unlink()
    for name in ("02", "03"):                                   # there is a 02.png, too
        (folder / "images" / f"{name}.HEIC").write_text("no picture")
    file = folder / "images" / "03.HEIC"
    assert f"problem: {file} can't be read as an image (cannot identify image file '{file}'). " \
           "Save it as PNG, JPEG" in check(problems=1)


@pytest.mark.parametrize("place, name", [(".", "."), ("images", ".."), (".", "images/..")])
def test_a_folder_may_be_named_by_dots(folder, monkeypatch, place, name):
    monkeypatch.chdir(folder / place)
    assert len(find(name)) == len(list_files(Path(name) / "images").images) == 12
    assert len(list_files(Path(name)).images) == 24


# ---- what is wrong in a folder -------------------------------------------------------------

NOT_AN_OBJECT = "line 2 must be a JSON object with the keys source, target, text or prompt"


@pytest.mark.parametrize("line, message", [
    ("nonsense", NOT_AN_OBJECT), ("[1, 2]", NOT_AN_OBJECT), ('{"source": "a.png"}', NOT_AN_OBJECT),
    (row("01", source=3), NOT_AN_OBJECT), (row("01", prompt=[1]), NOT_AN_OBJECT),
    (row("01", text="\ud800"), NOT_AN_OBJECT), (row("01", text=dict(e="")), NOT_AN_OBJECT),
    ('{"a":' * 100_000, NOT_AN_OBJECT), (row("99"), "line 2: "),
    *((row("01", target=name), "is outside the folder") for name in (
        "../secret.png", "/etc/hosts.png", "images/../../secret.png", "C:\\secret.png",
        "..\\secret.png"))], ids=lambda value: str(value)[:40])
def test_a_wrong_line_of_a_listing_is_named_once(folder, line, message):
    ring(32, 32).save(folder.parent / "secret.png")
    write_listing(folder, [row("00", prompt="a ring"), line])
    pairs, (problem,), _ = find_pairs(folder)
    assert len(pairs) == 1 and "prompt.json, line 2" in problem and message in problem
    with pytest.raises(UserError, match="prompt.json, line 2"):
        load_pairs("sketch", "train", folder)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize("change, message", [
    (remove("images/01.png"), "images/01.* is missing. Each name must be in both"),
    (lambda folder: ring(9, 9).save(folder / "images" / "02.jpg"),
     "02.jpg and 02.png have the same name"),
    (lambda folder: write_listing(folder, ["[{},", "{}]"]), "got an array. Remove the brackets"),
    (lambda folder: write_listing(folder, [""]), "prompt.json has no pairs"),
    (remove(*(f"{part}/{name}.png" for part in ("images", "conditions") for name in NAMES[:3])),
     "must have at least 10 pairs to train, validate and test, got 9")],
    ids=["half a pair", "doubled name", "array", "empty listing", "few"])
def test_a_fault_of_the_folder_is_named(folder, change, message):
    change(folder)
    with pytest.raises(UserError) as error:
        load_pairs("sketch", "train", folder)
    assert message in str(error.value)


# ---- label maps ----------------------------------------------------------------------------

def test_classes_of_grey_maps_are_named_by_number(folder, check):
    write_maps(folder, label_map("L"))
    assert "classes: 0 in 12 maps, 7 in 12 maps" in check("--task", "segmentation")


@pytest.fixture
def check_caches(folder, base):
    """A function that caches the folder's pairs of a task and checks their conditions."""
    return lambda task: check_conditions(
        [LatentCache(load_pairs(task, split, folder), task, 48, base)
         for split in ("train", "val", "test")], task)


def test_palettes_may_number_the_same_colours_differently(folder, check_caches):
    colours, maps = [(10, 20, 30), (200, 100, 50), (0, 0, 255)], []
    for i in range(12):
        image = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8), 16)[None].repeat(48, 0))
        image.putpalette([value for k in range(3) for value in colours[(k + i) % 3]])
        maps.append(image)
    write_maps(folder, maps)
    check_caches("segmentation")
    maps[:2] = (label_map(colours=colours) for colours in (
        ([0, 255, 0], [255, 0, 255]), ([0, 255, 255], [255, 255, 0])))
    write_maps(folder, maps)
    with pytest.raises(UserError, match="palettes differ: class 0 is #00ff00 in .*, #00ffff in"):
        check_caches("segmentation")


def test_colours_that_are_objects_are_told_from_classes(folder, check, check_caches, recwarn):
    write_maps(folder, [label_map(colours=([0, 0, 0], [9 * i, 90, 200])) for i in range(12)])
    note = "12 of 13 classes occur in one map only. A colour must be a class"
    assert f"note: {note}" in check("--task", "layout")
    with pytest.warns(UserWarning, match=note):
        check_caches("layout")
    write_maps(folder, [label_map(colours=([0, 0, 0], [9 * (i % 3), 90, 200])) for i in range(12)])
    assert "occur in one map" not in check("--task", "layout")
    recwarn.clear()
    check_caches("layout")
    assert not recwarn.list


def test_masks_with_different_numbers_inside_are_refused(folder, check, check_caches):
    write_maps(folder, 6 * [mask("L", 1)] + 6 * [mask("L", 255)])
    assert "masks differ: inside is 1 in" in check("--task", "segmentation", problems=1)
    with pytest.raises(UserError, match="masks differ: inside is 1 in .*, but 255 in"):
        check_caches("segmentation")


def test_blank_conditions_are_named_and_refused_if_all_are(folder, check, check_caches):
    Image.new("RGB", (35, 35), "white").save(folder / "conditions" / "03.png")
    assert f"blank condition: {folder}/conditions/03.png" in check()
    with pytest.warns(UserWarning, match="1 of 12 conditions are blank, such as .*03.png"):
        check_caches("sketch")
    write_maps(folder, Image.new("RGB", (48, 48), "white"))
    with pytest.raises(UserError, match="all conditions are blank .first: .*Drawings need lines"):
        check_caches("sketch")
    assert "all conditions are blank" in check(problems=1)


def test_pictures_that_share_a_blank_condition_are_counted_one_by_one(base, tmp_path):
    white = Pair("shared", lambda: Image.new("RGB", (48, 48), "white"),
                 lambda: Image.new("RGB", (48, 48), "blue"), ("",))
    cache = LatentCache([white] * 3, "sketch", 48, base, folder=tmp_path / "cache")
    with pytest.raises(UserError, match="all conditions are blank .first: shared"):
        check_conditions([cache], "sketch")


# ---- --check-data --------------------------------------------------------------------------

@pytest.fixture
def check(folder, tmp_path, run_script, capsys):
    """A function that runs train.py --check-data on the folder and returns what it prints."""
    def run(*arguments, problems=0):
        command = ["--data", folder, "--check-data", "--out", tmp_path / "out", *arguments]
        with pytest.raises(SystemExit) if problems else contextlib.nullcontext():
            run_script(train, *command)
        printed = capsys.readouterr()
        assert printed.out.count("problem: ") == problems
        assert (f"listed above ({problems})" in printed.err) == bool(problems)
        return printed.out

    return run


def test_a_check_asks_for_a_tokenizer_before_it_reads_pictures(check, sd_file, tmp_path, folder,
                                                               run_script, capsys):
    with pytest.raises(SystemExit):
        run_script(train, "--data", folder, "--check-data", "--base", sd_file("small1"))
    printed = capsys.readouterr()
    assert "Add --tokenizer" in printed.err and printed.out == ""
    check("--base", sd_file("small1"), "--tokenizer", BASE)
    assert (tmp_path / "out" / "check.png").exists()


def test_a_check_prints_what_a_folder_contains(check, folder):
    (folder / "images" / "01.txt").write_text("red hair " * 60)
    for part in ("images", "conditions"):
        shutil.copy(folder / part / "01.png", folder / part / "05.png")
    for name in ("03.png", "07.png"):
        ImageOps.invert(Image.open(folder / "conditions" / name)).save(folder / "conditions" / name)
    printed = check()
    for text in ("pairs: 12 (9 train, 1 val, 2 test)", "image 33 x 33 (2)", "condition RGB (12)",
                 "note: 2 drawings are light on dark and will be inverted",
                 "captions: 1; pictures without one: 11, which train with --default-prompt ''",
                 f"truncated caption: {folder}/images/01.png loses 'hair red hair",
                 f"duplicates: image {folder}/images/01.png = {folder}/images/05.png"):
        assert text in printed


def test_the_sheet_of_a_check_shows_what_the_network_sees(check, folder, tmp_path, sd_file):
    check("--size", 48)
    cond, _, _ = open_pair(load_pairs("sketch", "train", folder)[0], "sketch", 48)
    picture = to_image(cond_to_x(cond[None] / 255)[0])
    sheet = Image.open(tmp_path / "out" / "check.png")
    tile = sheet.crop((0, 16, 96, 112))
    assert tile.tobytes() == picture.resize((96, 96), Image.Resampling.LANCZOS).tobytes()
    widths = []
    for base in (BASE, sd_file("small1")):
        check("--size", 64, "--no-mirror", "--base", base, "--tokenizer", BASE)
        widths.append(Image.open(tmp_path / "out" / "check.png").width)
    assert widths[1] > 1.5 * widths[0]              # moved copies, not for the embedded base


def test_a_check_knows_the_default_prompt_and_turned_photos(check, folder):
    for name in NAMES:                              # as a phone writes them: wide, to be turned
        ring(60, 30).save(folder / "images" / f"{name}.jpg", exif=with_orientation(6))
        (folder / "images" / f"{name}.png").unlink()
        ring(30, 60).save(folder / "conditions" / f"{name}.png")
    printed = check("--default-prompt", "a ring " * 60)
    assert "image 30 x 60 (12)" in printed
    assert "12, which train with --default-prompt 'a ring" in printed
    assert "truncated caption: --default-prompt loses" in printed


def test_a_check_names_every_problem(check, folder):
    (folder / "images" / "01.png").unlink()
    (folder / "images" / "02.png").write_bytes(b"nonsense")
    (folder / "images" / "04.txt").write_bytes("grün".encode("latin-1"))
    ring(32, 50).save(folder / "images" / "03.png")
    printed = check(problems=4)
    for text in ("images/01.* is missing", "02.png can't be read", "04.txt must be UTF-8",
                 "its picture, 32 x 50 px, got 35 x 35 px"):
        assert text in printed


def test_a_check_of_label_maps_lists_classes_and_other_palettes(check, folder):
    write_maps(folder, label_map())
    printed = check("--task", "segmentation")
    assert "classes: #0a141e in 12 maps, #c86432 in 12 maps" in printed
    label_map(colours=([10, 20, 30], [0, 0, 255])).save(folder / "conditions" / "00.png")
    printed = check("--task", "segmentation", problems=1)
    assert f"class 7 is #0000ff in {folder}/conditions/00.png, #c86432 in {folder}/" in printed
    assert "note: 12 drawings look like label maps" in check("--task", "sketch")
    with pytest.warns(UserWarning, match="drawings look like label maps.* use --task segmentation"):
        warn_of_losses(folder, False, "a ring")
