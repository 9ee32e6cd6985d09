"""Pretraining of the embedded base, shortened: seeded, resumable, and loadable afterwards."""
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from inputs.options import BASE
from sample import load_base
from tiny import pretrain, world

STAGES = ("clip", "vae", "unet")


def run(monkeypatch, stage, folder, steps, *arguments):
    monkeypatch.setattr(sys, "argv", [
        "pretrain", "--stage", stage, "--steps", str(steps), "--pool", "64", "--device", "cpu",
        "--work", str(folder / "work"), "--out", str(folder / "model"), *arguments])
    pretrain.main()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for stage in pretrain.STAGES.values():
        monkeypatch.setattr(stage, "batch", 4)


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
    unet, vae, tokenizer, text_model, schedule = load_base(whole / "model")     # a valid SD folder
    context = text_model(tokenizer(["a red apple"]))
    assert unet(torch.randn(1, 4, 16, 16), torch.tensor([5]), context).isfinite().all()
    assert vae.config.scaling_factor > 0 and (whole / "model" / "model_index.json").is_file()


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


def test_a_scene_holds_the_emoji_it_names_without_overlap():
    for i in range(20):
        rng = world.np.random.default_rng(i)
        _, caption, places = world.scene(world.records("val"), rng)
        assert 2 <= len(places) <= 4
        assert all(row["caption"] in caption for row, *_ in places)
        boxes = [(left, top, left + size, top + size) for _, left, top, size in places]
        for a in range(len(boxes)):
            for b in range(a):
                (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes[a], boxes[b]
                assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
