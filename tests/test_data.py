"""Drawings of every look, the lines of a picture, and what a training step gets from the cache."""
import io

import numpy as np
import pytest
import torch
from drawings import ring
from PIL import Image, ImageDraw, ImageOps

import data
from data import LatentCache, Pair, View, load_pairs, open_pair, split_names, with_copies
from inputs.conditions import (extract_lines, is_light_on_dark, level_drawing, line_f1,
                               open_drawing, open_image, read_condition, to_image, to_x)
from inputs.files import hash_module
from tiny import world
from weights import UserError

# ---- polarity and paper --------------------------------------------------------------------


def as_transparent(image):
    ink = ImageOps.invert(image.convert("L"))
    return Image.merge("LA", (Image.new("L", image.size, 0), ink))


@pytest.mark.parametrize("change", [
    lambda image: image.convert("L"), lambda image: image.convert("1"),
    lambda image: image.convert("P"), as_transparent, ImageOps.invert,
    lambda image: image.point(lambda grey: grey * 200 // 255),
    lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)],
    ids=["grey", "bilevel", "palette", "transparent", "light on dark", "grey paper", "16 bit"])
def test_a_drawing_of_any_mode_and_polarity_gives_the_same_condition(tmp_path, change):
    ring(64, 64).save(tmp_path / "a.png")
    change(ring(64, 64)).save(tmp_path / "b.png")
    expected, _ = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    cond, shown = read_condition(tmp_path / "b.png", "sketch", 64, 64)
    assert cond.shape == (1, 64, 64) and cond.min() == 0 and cond.max() == 1
    torch.testing.assert_close(cond, expected, atol=0.02, rtol=0)
    assert shown.size == (64, 64) and shown.getpixel((0, 0)) == (255, 255, 255)


def test_a_drawing_keeps_its_aspect_ratio_and_is_padded_with_paper(tmp_path):
    ring(400, 200).save(tmp_path / "wide.png")
    cond, _ = read_condition(tmp_path / "wide.png", "sketch", 64, 64)
    rows, columns = cond[0].max(dim=1).values > 0.5, cond[0].max(dim=0).values > 0.5
    assert columns.sum() / rows.sum() == pytest.approx(2.0, rel=0.15)
    assert cond[0, :16].max() == 0 and cond[0, -16:].max() == 0


def test_a_file_without_a_drawing_is_refused(tmp_path):
    Image.new("RGB", (50, 50), "white").save(tmp_path / "blank.png")
    Image.new("RGB", (50, 40), (200, 180, 90)).save(tmp_path / "yellow.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (("blank.png", "has no line"), ("yellow.png", "has no line"),
                          ("text.png", "can't be read"), ("absent.png", "absent.png is missing")):
        with pytest.raises(UserError, match=message):
            read_condition(tmp_path / name, "sketch", 64, 64)


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
    levelled = np.asarray(level_drawing(changed).convert("L"), float)
    levelled = levelled[border[0]:border[0] + 300, border[1]:border[1] + 300]
    inside = np.s_[25:-25, 25:-25]                      # a frame is part of what is drawn
    assert np.abs(levelled - expected)[inside].mean() < 25
    assert np.median(levelled[inside]) > 235


@pytest.mark.parametrize("look", ["plain", "light on dark", "grey paper", "thin black frame"])
def test_training_and_sampling_read_a_file_alike(look, tmp_path):
    LOOKS[look](ring(64, 64)).save(tmp_path / "a.png")
    pair = Pair("a", lambda: open_drawing(tmp_path / "a.png"), lambda: ring(64, 64), ("",))
    trained, _, _ = open_pair(pair, "sketch", 64)
    sampled, _ = read_condition(tmp_path / "a.png", "sketch", 64, 64)
    torch.testing.assert_close(trained / 255, sampled, atol=0.15, rtol=0)


def test_embedded_drawings_are_dark_on_light():
    drawings = [pair.open_cond() for pair in load_pairs("sketch", "test")]
    assert not any(is_light_on_dark(image.convert("RGB")) for image in drawings)


# ---- pictures and lines --------------------------------------------------------------------

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


# ---- pairs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["sketch", "artistic"])
def test_no_embedded_figure_is_in_two_splits(task):
    names = [pair.name for split in ("train", "val", "test") for pair in load_pairs(task, split)]
    assert len(names) == len(set(names))
    assert all(pair.files == (world.FIGURES,) for pair in load_pairs(task, "val"))


def test_a_users_pairs_are_split_by_name_with_some_in_every_split():
    for count in (10, 57, 500):
        names = [f"{i:03d}.png" for i in range(count)]
        splits = split_names(names)
        assert splits == split_names(names[::-1])
        counts = [list(splits.values()).count(split) for split in ("test", "val")]
        assert counts == [max(1, round(0.15 * count)), max(1, round(0.05 * count))]


# ---- the cache -----------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """An empty folder of cached parts."""
    return tmp_path / "cache"


@pytest.fixture
def pairs(tmp_path):
    """Sixty pairs of files, more than a part contains."""
    (tmp_path / "pairs").mkdir()
    found = []
    for i in range(60):
        files = tmp_path / "pairs" / f"{i}-cond.png", tmp_path / "pairs" / f"{i}.png"
        ring(80 - i, 80 - i).save(files[0])
        ring(80 - i, 80 - i).rotate(90).save(files[1])
        found.append(Pair(str(files[0]), lambda file=files[0]: open_drawing(file),
                          lambda file=files[1]: open_image(file), (f"ring {i}", "a ring"), files))
    return found


@pytest.fixture
def encoded(base, monkeypatch):
    """A list of how many pictures each call of the base's autoencoder encodes."""
    counts, encode = [], base.vae.encode
    monkeypatch.setattr(base.vae, "encode", lambda x: (counts.append(len(x)), encode(x))[1])
    return counts


def batches(cache):
    """Everything that a training would read."""
    return [tensor for seed in range(3) for tensor in
            cache.batch(torch.arange(8), 8, torch.Generator().manual_seed(seed))]


def test_a_condition_with_another_aspect_ratio_is_refused(base, folder):
    pair = Pair("a", lambda: ring(70, 60), lambda: ring(64, 64), ("",))
    with pytest.raises(UserError, match="a must have the aspect ratio .* got 70 x 60 px"):
        LatentCache([pair], "sketch", 64, base, folder=folder)


def test_a_batch_has_mirrored_pairs_their_own_prompts_and_a_tenth_empty(base, pairs, folder):
    copies = with_copies(pairs[:6])[:12]
    cache = LatentCache(copies, "sketch", 64, base, folder=folder)
    assert torch.equal(cache.cond(range(6)).flip(-1), cache.cond(range(6, 12)))
    cond, z, context = cache.batch(torch.arange(1000), 1000, torch.Generator().manual_seed(0))
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


def test_shards_of_a_batch_are_rows_of_the_whole(base, pairs, folder):
    cache = LatentCache(pairs[:6], "sketch", 64, base, folder=folder)
    whole, shard = (cache.batch(torch.arange(8)[rows], 8, torch.Generator().manual_seed(0))
                    for rows in (slice(None), slice(1, None, 2)))
    for expected, rows in zip(whole, shard, strict=True):
        assert torch.equal(expected[1::2], rows)


def test_a_cache_is_computed_once_and_again_for_different_content(base, pairs, folder, encoded):
    expected = batches(LatentCache(pairs, "sketch", 64, base, folder=folder))
    assert sum(encoded) == 60
    encoded.clear()
    assert all(map(torch.equal, expected, batches(
        LatentCache(pairs, "sketch", 64, base, folder=folder))))
    assert not encoded
    for task, size, chosen in (("sketch", 48, pairs), ("sketch", 64, pairs[1:]),
                               ("artistic", 64, pairs)):
        encoded.clear()
        LatentCache(chosen, task, size, base, folder=folder)
        assert sum(encoded) == len(chosen)


def test_another_autoencoder_or_a_changed_file_is_another_part(base, pairs, folder):
    LatentCache(pairs[:2], "sketch", 64, base, folder=folder)
    other = base._replace(vae=type(base.vae)(base.vae.config))
    LatentCache(pairs[:2], "sketch", 64, other, folder=folder)
    ImageOps.invert(Image.open(pairs[1].files[1])).save(pairs[1].files[1])
    LatentCache(pairs[:2], "sketch", 64, base, folder=folder)
    assert len(list(folder.iterdir())) == 3


def test_an_interrupted_pass_resumes_with_the_part_that_is_missing(base, pairs, folder, encoded,
                                                                   monkeypatch):
    encode = base.vae.encode

    def interrupted(x):
        if sum(encoded) >= 48:
            raise KeyboardInterrupt
        return encode(x)

    with monkeypatch.context() as patch:
        patch.setattr(base.vae, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LatentCache(pairs, "sketch", 64, base, folder=folder)
    encoded.clear()
    cache = LatentCache(pairs, "sketch", 64, base, folder=folder)
    assert sum(encoded) == 12 and len(cache.files) == 2


def test_the_memory_format_of_weights_does_not_change_their_hash():
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 1, 1))
    convolutions.config = None
    expected = hash_module(convolutions)
    assert hash_module(convolutions.to(memory_format=torch.channels_last)) == expected
    convolutions[1].weight.data += 1
    assert hash_module(convolutions) != expected


def test_a_corrupt_part_is_named_with_the_fix(base, pairs, folder):
    LatentCache(pairs[:2], "sketch", 64, base, folder=folder)
    part, = folder.iterdir()
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part.name} is corrupt. Delete it"):
        LatentCache(pairs[:2], "sketch", 64, base, folder=folder)


def test_a_latent_that_overflows_is_named(base, pairs, folder, monkeypatch):
    encode = base.vae.encode
    monkeypatch.setattr(base.vae, "encode", lambda x: encode(x * 1e30))
    with pytest.raises(UserError, match="0-cond.png .* is not finite. Use another --vae"):
        LatentCache(pairs[:2], "sketch", 64, base, folder=folder)
    assert not list(folder.iterdir())


def test_many_prompts_are_encoded_when_they_are_needed(base, pairs, folder, monkeypatch):
    expected = batches(LatentCache(pairs[:8], "sketch", 64, base, folder=folder))
    monkeypatch.setattr(data, "MOST_PROMPTS", 5)
    cache = LatentCache(pairs[:8], "sketch", 64, base, folder=folder)
    assert cache.contexts is None
    for ours, theirs in zip(batches(cache), expected):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)      # a rounding of fp16


# ---- moved copies --------------------------------------------------------------------------

def dots(size, colours):
    """A palette image with a 6 x 6 block of class 1 at a fifth, and of class 2 at two fifths."""
    labels = np.zeros((size, size), np.uint8)
    for number, place in ((1, size // 5), (2, 2 * size // 5)):
        labels[place:place + 6, 2 * place:2 * place + 6] = number
    image = Image.fromarray(labels)
    image.putpalette(bytes(colours))
    return image


def test_fewer_pairs_have_more_copies_and_no_two_are_the_same():
    pair = Pair("a", None, None, ("",))
    for count, copies in ((12, 14), (40, 14), (100, 6), (300, 2), (1000, 2)):
        rows = with_copies([pair] * count)
        assert len(rows) == copies * count
        assert len({row.view for row in rows[::count]}) == copies
        assert all(row.view == View() for row in rows[:count])
        assert all(row.view == View(is_mirrored=True) for row in rows[count:2 * count])


def test_without_mirrored_copies_nothing_is_flipped():
    rows = with_copies([Pair("a", None, None, ("",))] * 40, with_mirrored=False)
    assert len(rows) == 14 * 40 and not any(row.view.is_mirrored for row in rows)


def test_views_lie_inside_the_picture_and_move_by_at_most_6_percent():
    views = [row.view for row in with_copies([Pair("a", None, None, ("",))] * 40)]
    for left, top, side, _ in views:
        assert 0.8 <= side <= 1
        for start in (left, top):
            assert 0 <= start and start + side <= 1 + 1e-9
            assert abs(start + side / 2 - 0.5) <= 0.06 + 1e-9


def test_condition_and_picture_of_a_copy_show_the_same_place():
    labels = dots(64, (0, 0, 0, 255, 0, 0, 0, 0, 255))
    pair = Pair("a", lambda: labels, lambda: labels.convert("RGB"), ("",))
    for row in with_copies([pair])[1:]:
        cond, x, colours = open_pair(row, "segmentation", 48)
        assert set(map(tuple, cond.flatten(1).T.tolist())) <= {(0, 0, 0), (255, 0, 0), (0, 0, 255)}
        assert len(colours) == 3
        for channel in (0, 2):                  # the centres of both blocks
            centres = []
            for weight in (cond[channel] / 255, (x[channel] + 1) / 2):
                rows, columns = torch.meshgrid(*[torch.arange(48.0)] * 2, indexing="ij")
                centres.append([(weight * axis).sum() / weight.sum() for axis in (rows, columns)])
            assert torch.tensor(centres).diff(dim=0).abs().max() < 1


def test_a_row_with_a_larger_weight_is_drawn_more_often(base, pairs, folder):
    rows = [pair._replace(weight=weight) for pair, weight in zip(pairs[:4], (1, 1, 1, 9))]
    cache = LatentCache(rows, "sketch", 64, base, folder=folder)
    cond, _, _ = cache.batch(torch.arange(1000), 1000, torch.Generator().manual_seed(0))
    share = (cond == cache.cond([3])).flatten(1).all(1).float().mean()
    assert share.item() == pytest.approx(9 / 12, abs=0.04)
