"""The pairs' splits, and what a training step gets from the cache."""
import numpy as np
import pytest
import torch
from drawings import ring
from PIL import Image, ImageOps

import data
from data import LatentCache, Pair, View, load_pairs, open_pair, split_names, with_copies
from inputs.conditions import open_drawing, open_image
from inputs.files import hash_module
from measure.report import paired_errors
from tiny import world
from weights import UserError

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
def pairs(tmp_path, monkeypatch):
    """Six pairs of files, two more than a part contains."""
    monkeypatch.setattr(data, "PART", 4)
    (tmp_path / "pairs").mkdir()
    found = []
    for i in range(6):
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
    copies = with_copies(pairs)[:12]
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
    cache = LatentCache(pairs, "sketch", 64, base, folder=folder)
    whole, shard = (cache.batch(torch.arange(8)[rows], 8, torch.Generator().manual_seed(0))
                    for rows in (slice(None), slice(1, None, 2)))
    for expected, rows in zip(whole, shard, strict=True):
        assert torch.equal(expected[1::2], rows)


def test_a_cache_is_computed_once_and_again_for_different_content(base, pairs, folder, encoded):
    first, again = (batches(LatentCache(pairs, "sketch", 64, base, folder=folder))
                    for _ in range(2))
    assert all(map(torch.equal, first, again)) and sum(encoded) == 6
    other = base._replace(vae=type(base.vae)(base.vae.config))
    for arguments in ((pairs, "sketch", 48, base), (pairs[1:], "sketch", 64, base),
                      (pairs, "artistic", 64, base), (pairs, "sketch", 64, other)):
        LatentCache(*arguments, folder=folder)
    assert len(list(folder.iterdir())) == 5 * 2
    ImageOps.invert(Image.open(pairs[1].files[1])).save(pairs[1].files[1])
    LatentCache(pairs, "sketch", 64, base, folder=folder)
    assert len(list(folder.iterdir())) == 5 * 2 + 1
    # the same files, but the third condition belongs to the first or to the second picture
    *two, third = pairs[:3]
    first, second = (LatentCache(
        [*two, third._replace(open_image=pair.open_image, files=(third.files[0], pair.files[1]))],
        "sketch", 64, base, folder=folder).files for pair in two)
    assert first != second


def test_an_interrupted_pass_resumes_with_the_part_that_is_missing(base, pairs, folder, encoded,
                                                                   monkeypatch):
    encode = base.vae.encode

    def interrupted(x):
        if sum(encoded) >= 4:
            raise KeyboardInterrupt
        return encode(x)

    with monkeypatch.context() as patch:
        patch.setattr(base.vae, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LatentCache(pairs, "sketch", 64, base, folder=folder)
    encoded.clear()
    cache = LatentCache(pairs, "sketch", 64, base, folder=folder)
    assert sum(encoded) == 2 and len(cache.files) == 2


def test_the_memory_format_of_weights_does_not_change_their_hash():
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 1, 1))
    convolutions.config = None
    expected = hash_module(convolutions)
    assert hash_module(convolutions.to(memory_format=torch.channels_last)) == expected
    convolutions[1].weight.data += 1
    assert hash_module(convolutions) != expected
    assert hash_module(convolutions.bfloat16()) != expected         # NumPy has no such type


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
    expected = batches(LatentCache(pairs, "sketch", 64, base, folder=folder))
    monkeypatch.setattr(data, "MOST_PROMPTS", 5)
    cache = LatentCache(pairs, "sketch", 64, base, folder=folder)
    assert cache.contexts is None
    for ours, theirs in zip(batches(cache), expected):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)      # a rounding of fp16


# ---- copies --------------------------------------------------------------------------------

def dots(size, colours):
    """A palette image with a 6 x 6 block of class 1 at a fifth, and of class 2 at two fifths."""
    labels = np.zeros((size, size), np.uint8)
    for number, place in ((1, size // 5), (2, 2 * size // 5)):
        labels[place:place + 6, 2 * place:2 * place + 6] = number
    image = Image.fromarray(labels)
    image.putpalette(bytes(colours))
    return image


@pytest.mark.parametrize("with_mirrored", [True, False])
def test_fewer_pairs_have_more_copies_and_no_two_are_the_same(with_mirrored):
    pair = Pair("a", None, None, ("",))
    for count, copies in ((12, 14), (40, 14), (100, 6), (200, 3), (201, 2), (1000, 2)):
        views = [row.view for row in with_copies([pair] * count, with_mirrored)]
        assert len(views) == copies * count and len(set(views[::count])) == copies
        assert set(views[:count]) == {View()}
        assert (set(views[count:2 * count]) == {View(is_mirrored=True)}) == with_mirrored
        assert any(view.is_mirrored for view in views) == with_mirrored
    rows = with_copies([pair] * 40, with_mirrored, with_moved=False)
    assert [row.view for row in rows[40:]] == [View(is_mirrored=True)] * 40 * with_mirrored


def test_the_embedded_base_knows_mirrored_portraits_but_not_moved_ones(base, folder):
    copies = with_copies(load_pairs("sketch", "test")[:4])
    losses = [paired_errors(base, LatentCache(copies[i:i + 4], "sketch", 64, base, folder=folder)
                            ).mean() for i in (0, 4, 8)]
    assert losses[1] < 1.2 * losses[0] and losses[2] > 2 * losses[0]


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
