"""The embedded base: its split, and its pretraining, shortened: seeded, resumable, loadable."""
import argparse
import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inputs.options import BASE
from sample import load_base
from tiny import pretrain, tasks, world

STAGES = ("clip", "vae", "unet")
POOL = world.pool


def run(monkeypatch, stage, folder, steps, *arguments):
    monkeypatch.setattr(sys, "argv", [
        "pretrain", "--stage", stage, "--steps", str(steps), "--pool", "64", "--device", "cpu",
        "--work", str(folder / "work"), "--out", str(folder / "model"), *arguments])
    pretrain.main()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for stage in pretrain.STAGES.values():
        monkeypatch.setattr(stage, "batch", 4)


@pytest.mark.slow
def test_each_stage_is_seeded_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for stage in STAGES:
        run(monkeypatch, stage, whole, 4)
        run(monkeypatch, stage, halves, 2)
        run(monkeypatch, stage, halves, 4)
        file = f"work/{stage}/checkpoint.safetensors"
        first, second = load_file(whole / file), load_file(halves / file)
        assert all(torch.equal(first[key], second[key]) for key in first), stage
        rows = (halves / "work" / stage / "log.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2, 4]
    base = load_base(whole / "model")                                           # a valid SD folder
    context = base.encode(["a red apple"])
    assert base.unet(torch.randn(1, 4, 16, 16), torch.tensor([5]), context).isfinite().all()
    assert base.vae.config.scaling_factor > 0 and (whole / "model" / "model_index.json").is_file()


@pytest.mark.parametrize("minutes", ["0", "-5", "nan"])
def test_no_time_is_no_budget(minutes, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "vae", tmp_path, 1, "--minutes", minutes)
    assert stop.value.code == 2 and "allowed is more than 0" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_unet_can_go_on_from_given_weights(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "model")
    file = "unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "model" / file).unlink()
    monkeypatch.setattr(pretrain.UNetStage, "rate", 0.0)
    run(monkeypatch, "unet", tmp_path, 1, "--init", str(BASE))
    given, written = load_file(BASE / file), load_file(tmp_path / "model" / file)
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in given)


def test_merges_are_the_most_frequent_pairs_with_ties_by_the_alphabet():
    merges = pretrain.learn_merges(["aab aab", "cab"], most=9)
    assert merges[:2] == [("a", "b</w>"), ("a", "ab</w>")]       # 3 times, then 2
    assert pretrain.merge(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")
    assert merges[2:] == [("c", "ab</w>")]


def test_a_picture_and_its_caption_are_a_function_of_the_seed():
    (first, captions), (again, same) = (pretrain.make_pool("val", 8, seed=3) for _ in range(2))
    assert torch.equal(first, again) and captions == same
    other, _ = pretrain.make_pool("val", 8, seed=4)
    assert not torch.equal(first, other)


def digest(row):
    return hashlib.sha256(world.picture(row["style"], row["name"]).tobytes()).hexdigest()


@pytest.mark.slow
def test_no_training_pool_opens_a_held_out_picture(tmp_path, monkeypatch):
    held_out = {digest(row) for row in world.records(None, ("3d", "flat", "line"))
                if row["split"] != "train"}
    unseen_style = {digest(row) for row in world.records(None, (tasks.ARTISTIC_STYLE,))}
    assert len(held_out) == 3 * 199 and len(unseen_style) > 300
    opened, open_picture, val_pool = set(), world.picture, world.pool("val")
    monkeypatch.setattr(world, "picture", lambda style, name:
                        opened.add((style, name)) or open_picture(style, name))
    monkeypatch.setattr(world, "pool", lambda split:       # what a stage composes to learn from
                        val_pool[:1] if split == "val" else POOL(split))
    shutil.copytree(BASE, tmp_path / "model")
    for stage in STAGES:
        run(monkeypatch, stage, tmp_path, 3)
    pretrain.make_pool("train", 3000, seed=5)
    styles = {style for style, _ in opened}
    assert styles == set(world.BASE_STYLES) and len(opened) > 2000
    monkeypatch.undo()
    validated = {(row["style"], row["name"]) for row in val_pool[:1]}
    digests = {digest(dict(style=style, name=name)) for style, name in opened - validated}
    assert not digests & (held_out | unseen_style)


def test_every_name_is_learned_from_other_designers_and_tested_on_fluents_own_pictures():
    known = {row["name"] for row in world.pool("train")}
    for split, names in (("val", 58), ("test", 141)):
        rows = world.pool(split)
        assert {row["style"] for row in rows} == set(world.FLUENT_STYLES)
        assert len({row["name"] for row in rows}) == names
        assert {row["name"] for row in rows} <= known


def test_min_snr_weights_count_clean_steps_less(tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "model")
    monkeypatch.setattr(pretrain.UNetStage, "encode", lambda *_: None)
    args = argparse.Namespace(out=tmp_path / "model", device="cpu", pool=8, seed=0, init=None)
    stage = pretrain.UNetStage(args)
    abar = stage.schedule.alphas_cumprod
    snr = abar / (1 - abar)
    expected = torch.where(snr > 5, 5 / snr, torch.ones(()))
    torch.testing.assert_close(stage.loss_weights, (expected / expected.mean()).float())
    assert stage.loss_weights[0] < 0.02 < 1 < stage.loss_weights[999]


def test_augmented_pictures_are_other_pictures_of_the_same_range():
    x = pretrain.to_batch(pretrain.make_pool("train", 8, seed=3)[0], "cpu")
    turned = pretrain.augment(x, torch.Generator().manual_seed(0))
    assert turned.shape == x.shape and turned.abs().max() <= 1
    assert (turned - x).abs().mean() > 0.02
    assert torch.equal(turned, pretrain.augment(x, torch.Generator().manual_seed(0)))


def test_a_scene_holds_the_emoji_it_names_without_overlap():
    for i in range(20):
        rng = np.random.default_rng(i)
        _, caption, places = world.scene(world.pool("val"), rng)
        assert 2 <= len(places) <= 4
        assert all(row["caption"] in caption for row, *_ in places)
        boxes = [(left, top, left + size, top + size) for _, left, top, size in places]
        for a in range(len(boxes)):
            for b in range(a):
                (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes[a], boxes[b]
                assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
