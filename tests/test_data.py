"""Users' drawings and folders, the lines of a picture, and what a training step is given."""
import io

import numpy as np
import pytest
import torch
from drawings import ring
from PIL import Image, ImageDraw, ImageOps

import data
from data import LatentCache, Pair, load_pairs, open_pair, split_names
from inputs.conditions import (
    extract_lines,
    is_light_on_dark,
    level_drawing,
    line_f1,
    open_drawing,
    open_image,
    read_condition,
    to_image,
    to_x,
)
from inputs.disk_cache import DiskCache
from inputs.options import BASE
from sample import load_base
from tiny import world
from weights import UserError


def on_grey_paper(image):
    """Darkens the paper to 200 and keeps the ink."""
    return image.point(lambda grey: grey * 200 // 255)


def as_transparent(image):
    ink = ImageOps.invert(image.convert("L"))
    return Image.merge("LA", (Image.new("L", image.size, 0), ink))


@pytest.mark.parametrize("change", [
    lambda image: image.convert("L"), lambda image: image.convert("1"),
    lambda image: image.convert("P"), as_transparent, ImageOps.invert, on_grey_paper,
    lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)],
    ids=["grey", "bilevel", "palette", "transparent", "light on dark", "grey paper", "16 bit"])
def test_a_drawing_of_any_mode_and_polarity_gives_the_same_condition(tmp_path, change):
    ring(64, 64).save(tmp_path / "a.png")
    change(ring(64, 64)).save(tmp_path / "b.png")
    expected, _ = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    cond, used = read_condition(tmp_path / "b.png", "sketch", 64, 64)
    assert cond.shape == (1, 64, 64) and cond.min() == 0 and cond.max() == 1
    torch.testing.assert_close(cond, expected, atol=0.02, rtol=0)
    assert used.size == (64, 64) and used.getpixel((0, 0)) == (255, 255, 255)


def test_a_drawing_keeps_its_aspect_ratio_and_is_padded_with_paper(tmp_path):
    ring(400, 200).save(tmp_path / "wide.png")
    cond, _ = read_condition(tmp_path / "wide.png", "sketch", 64, 64)
    rows, columns = cond[0].max(dim=1).values > 0.5, cond[0].max(dim=0).values > 0.5
    assert columns.sum() / rows.sum() == pytest.approx(2.0, rel=0.15)
    assert cond[0, :16].max() == 0 and cond[0, -16:].max() == 0


def test_what_is_no_drawing_is_refused(tmp_path):
    Image.new("RGB", (50, 50), "white").save(tmp_path / "blank.png")
    Image.new("RGB", (50, 40), (200, 180, 90)).save(tmp_path / "yellow.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (("blank.png", "no line in it"), ("yellow.png", "no line in it"),
                          ("text.png", "cannot be read"), ("absent.png", "absent.png")):
        with pytest.raises(UserError, match=message):
            read_condition(tmp_path / name, "sketch", 64, 64)


# ---- polarity and paper --------------------------------------------------------------------

def framed(image, width, colour=0):
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1),
                                    outline=(colour,) * 3, width=width)
    return image


def toned(image, paper, ink, noise=3.0):
    """The drawing on paper of another tone, (H, W) or a number, with noise, as photographed."""
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


def kraft(image):
    white = np.asarray(image.convert("L"), float)[..., None] / 255
    colours = np.array([20, 15, 10]) + white * np.array([130, 95, 60])
    return Image.fromarray(colours.astype(np.uint8))


LOOKS = {
    "plain": lambda image: image,
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
    "kraft paper": kraft,
    "jpeg": as_jpeg,
    "jpeg, light on dark": lambda image: as_jpeg(ImageOps.invert(image)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_drawing_is_read_as_dark_on_white_whatever_it_looks_like(look):
    drawing = ring(300, 300)
    changed = LOOKS[look](drawing)
    expected = np.asarray(drawing.convert("L"), float)
    border = (changed.height - 300) // 2, (changed.width - 300) // 2
    read = np.asarray(level_drawing(changed).convert("L"), float)
    read = read[border[0]:border[0] + 300, border[1]:border[1] + 300]
    inside = np.s_[25:-25, 25:-25]                      # a frame is part of what is drawn
    assert np.abs(read - expected)[inside].mean() < 25
    assert np.median(read[inside]) > 235


def test_all_embedded_drawings_are_dark_on_light_and_stay_as_they_are():
    embedded = [world.on_ground(world.picture("line", row["name"]))
                for row in world.records(None, ("line",))]
    assert len(embedded) == 978
    assert not any(is_light_on_dark(image) for image in embedded)
    for image in embedded[::20]:
        assert np.array_equal(np.asarray(level_drawing(image)), np.asarray(image.convert("L")
                                                                           .convert("RGB")))


@pytest.mark.parametrize("look", ["plain", "light on dark", "grey paper", "thin black frame"])
def test_training_and_sampling_read_one_file_alike(look, tmp_path):
    LOOKS[look](ring(64, 64)).save(tmp_path / "a.png")
    pair = Pair("a", lambda: open_drawing(tmp_path / "a.png"), lambda: ring(64, 64), ("",))
    trained, _, _ = open_pair(pair, "sketch", 64)
    sampled, _ = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    torch.testing.assert_close(trained / 255, sampled, atol=0.15, rtol=0)


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


@pytest.mark.parametrize("task, sizes", [
    ("sketch", (779, 58, 141)), ("segmentation", (480, 48, 144)), ("layout", (480, 48, 144)),
    ("artistic", (40, 22, 52))])
def test_every_embedded_task_has_as_many_pairs_as_its_table_says(task, sizes):
    splits = [load_pairs(task, split) for split in ("train", "val", "test")]
    assert tuple(map(len, splits)) == sizes
    names = [{pair.name for pair in pairs} for pairs in splits]
    assert [len(each) for each in names] == list(sizes)
    if task == "artistic":
        assert not set.intersection(*names[:2]) and not names[0] & names[2]
        assert "firefox" not in world.BASE_STYLES


def test_embedded_pairs_are_aligned_drawings_of_their_pictures():
    pairs = load_pairs("sketch", "test")[:20]
    drawn = torch.stack([to_x(pair.open_cond()) for pair in pairs])
    true = torch.stack([to_x(pair.open_image()) for pair in pairs])
    right = line_f1(extract_lines(true), extract_lines(drawn)).mean()
    wrong = line_f1(extract_lines(true.roll(1, 0)), extract_lines(drawn)).mean()
    assert right > 0.6 and right > wrong + 0.2


@pytest.fixture(scope="module")
def base():
    return load_base(BASE)


def drawn_pairs(change, count=6):
    return [Pair(str(i), lambda i=i: change(ring(64 - 2 * i, 64 - 2 * i)),
                 lambda i=i: ring(64 - 2 * i, 64 - 2 * i), (f"ring {i}", "a ring"))
            for i in range(count)]


def test_a_condition_of_another_size_than_its_picture_is_refused(base):
    pairs = drawn_pairs(lambda image: image.resize((70, 60)))
    with pytest.raises(UserError, match="0: 70 x 60 px, but its picture has 64 x 64"):
        LatentCache(pairs, "sketch", 64, base)


def test_a_batch_has_pairs_mirrored_or_not_their_own_prompts_and_a_tenth_empty(base):
    cache = LatentCache(drawn_pairs(lambda image: image), "sketch", 64, base, mirror=True)
    assert len(cache) == 12 and torch.equal(
        cache.cond(range(6)).flip(-1), cache.cond(range(6, 12)))
    cond, z, context = cache.batch(torch.arange(2000), 2000, torch.Generator().manual_seed(0))
    which = (cond[:, None] == cache.cond(range(12))[None]).flatten(2).all(dim=2).int().argmax(1)
    empty = (context == cache.context([""])).flatten(1).all(dim=1)
    assert empty.float().mean().item() == pytest.approx(0.1, abs=0.03)
    for i in range(6):
        own = cache.context(cache.pairs[i].prompts)
        chosen = context[(which % 6 == i) & ~empty]
        hits = (chosen[:, None] == own[None]).flatten(2).all(dim=2)
        assert hits.any(dim=1).all() and hits.any(dim=0).all()      # both prompts, no other's
    mean, std = cache.rows("mean", which).float(), cache.rows("std", which).float()
    spread = (z - mean).std() / std.square().mean().sqrt()
    assert spread.item() == pytest.approx(1, abs=0.05)


def test_a_users_pairs_are_split_by_name_with_some_on_every_side():
    for count in (10, 57, 500):
        names = [f"{i:03d}.png" for i in range(count)]
        splits = split_names(names)
        assert splits == split_names(names[::-1])
        sides = [sum(side == wanted for side in splits.values()) for wanted in ("test", "val")]
        assert sides == [max(1, round(0.15 * count)), max(1, round(0.05 * count))]


# ---- the cache on disk ---------------------------------------------------------------------

@pytest.fixture
def pairs(tmp_path):
    """Sixty pairs of files, more than a part holds."""
    (tmp_path / "pairs").mkdir()
    found = []
    for i in range(60):
        files = tmp_path / "pairs" / f"{i}-cond.png", tmp_path / "pairs" / f"{i}.png"
        ring(80 - i, 80 - i).save(files[0])
        ring(80 - i, 80 - i).rotate(90).save(files[1])
        found.append(Pair(str(files[0]), lambda file=files[0]: open_drawing(file),
                          lambda file=files[1]: open_image(file), (f"ring {i}",), files))
    return found


@pytest.fixture
def counting_base(monkeypatch):
    """The embedded base, whose autoencoder counts the pictures that it encodes."""
    base = load_base(BASE)
    base.vae.encoded, encode = 0, base.vae.encode

    def counted(x):
        base.vae.encoded += len(x)
        return encode(x)

    monkeypatch.setattr(base.vae, "encode", counted)
    return base


def batches(cache):
    """Returns all that a training would read."""
    return [tensor for seed in range(3) for tensor in
            cache.batch(torch.arange(8), 8, torch.Generator().manual_seed(seed))]


def test_a_cache_on_disk_is_the_one_in_memory_and_is_computed_once(pairs, counting_base, tmp_path):
    disk = DiskCache(tmp_path / "cache", {"vae": "a"})
    expected = batches(LatentCache(pairs, "sketch", 64, counting_base, mirror=True))
    for encoded in (120, 0):                             # the second training finds it there
        counting_base.vae.encoded = 0
        cache = LatentCache(pairs, "sketch", 64, counting_base, mirror=True, disk=disk)
        assert counting_base.vae.encoded == encoded and len(cache) == 120
        assert all(map(torch.equal, batches(cache), expected))
    for others, size, base_key in ((pairs, 64, {"vae": "b"}), (pairs[1:], 64, {"vae": "a"}),
                                   (pairs, 48, {"vae": "a"})):
        counting_base.vae.encoded = 0           # another autoencoder, pictures or size
        LatentCache(others, "sketch", size, counting_base, disk=disk._replace(base_key=base_key))
        assert counting_base.vae.encoded == len(others)


def test_an_interrupted_pass_goes_on_and_a_damaged_part_is_made_again(pairs, counting_base,
                                                                      tmp_path, monkeypatch):
    disk = DiskCache(tmp_path / "cache", {})
    expected = batches(LatentCache(pairs, "sketch", 64, counting_base))
    encode = counting_base.vae.encode

    def interrupted(x):
        if counting_base.vae.encoded >= 60 + 48:
            raise KeyboardInterrupt
        return encode(x)

    monkeypatch.setattr(counting_base.vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LatentCache(pairs, "sketch", 64, counting_base, disk=disk)
    monkeypatch.setattr(counting_base.vae, "encode", encode)
    counting_base.vae.encoded = 0
    LatentCache(pairs, "sketch", 64, counting_base, disk=disk)
    assert counting_base.vae.encoded == 12              # the part that was not finished
    file = max((tmp_path / "cache").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    counting_base.vae.encoded = 0
    cache = LatentCache(pairs, "sketch", 64, counting_base, disk=disk)
    assert counting_base.vae.encoded == 48
    assert all(map(torch.equal, batches(cache), expected))


def test_many_prompts_are_encoded_as_they_are_needed(pairs, counting_base, monkeypatch):
    expected = batches(LatentCache(pairs, "sketch", 64, counting_base))
    monkeypatch.setattr(data, "MOST_PROMPTS", 10)
    cache = LatentCache(pairs, "sketch", 64, counting_base)
    assert cache.contexts is None
    for ours, theirs in zip(batches(cache), expected):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)      # a rounding of fp16
