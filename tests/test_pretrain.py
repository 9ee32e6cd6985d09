"""The embedded base: its splits and captions, and its training, shortened: seeded, resumable."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from inputs import checkpoints
from inputs.files import write_lines
from inputs.options import BASE
from sample import load_base
from tiny import make_data, pretrain, tasks, world
from tiny.clip_score import Reader


@pytest.fixture
def run_stage(run_script, monkeypatch):
    """A function that trains a stage in a folder whose pool holds 24 figures, 4 at a time."""
    def run(stage, folder, steps, *arguments):
        pool = folder / "work" / "pool"
        if not pool.exists():
            rows = world.figures("train")[:24]
            pool.mkdir(parents=True)
            np.save(pool / "pictures.npy",
                    [np.asarray(world.open_part("picture", row["name"])) for row in rows])
            write_lines(rows, pool / "figures.jsonl")
        monkeypatch.setattr(pretrain.STAGES[stage], "batch", 4)
        run_script(pretrain, "--stage", stage, "--steps", steps, "--device", "cpu", "--work",
                   folder / "work", "--out", folder / "model", *arguments)

    return run


# ---- splits --------------------------------------------------------------------------------

def test_the_base_has_learned_no_held_out_shape():
    learned = set(np.load(world.DATA / "pool_hashes.npy").tolist())
    held_out = [int(row["hash"], 16) for row in world.figures() if row["split"] != "train"]
    assert len(held_out) == len(set(held_out)) == 360
    assert len(learned) > 30_000 and learned.isdisjoint(held_out)


def test_a_split_is_a_function_of_shapes_alone():
    figure, parts, digest = dict(style="toonHead"), dict(rearHair="longWavy"), "f" * 64
    assert make_data.split_of(figure, parts, digest) == "train"
    assert make_data.split_of(figure, parts, "0" * 64) == "test"
    assert make_data.split_of(figure, parts, "1c" + "0" * 62) == "val"
    assert make_data.split_of(figure, dict(rearHair="shoulderHigh"), digest) == "unseen"


def test_a_hash_ignores_rounding_and_sees_a_moved_shape():
    coded = np.zeros((64, 64, 4), np.float32)
    coded[20:40, 10:30, 1] = coded[20:40, 10:30, 3] = 1
    digest = make_data.hash_shapes(coded)
    assert digest == make_data.hash_shapes(coded + 1e-3)
    assert digest != make_data.hash_shapes(np.roll(coded, 4, axis=1))


def test_every_task_has_its_pairs_and_no_prompt_names_a_shape():
    counts = dict(train=1000, val=60, test=200, unseen=100)
    for task in ("sketch", "segmentation", "layout"):
        assert {split: len(tasks.embedded_pairs(task, split)) for split in counts} == counts
    assert [len(tasks.embedded_pairs("artistic", split))
            for split in ("train", "val", "test")] == [40, 20, 60]
    shapes = {*world.HAIR_WORDS, *world.TOPS, *world.EXTRAS, *world.EXPRESSIONS} - {"bald"}
    for *_, (prompt,) in tasks.embedded_pairs("sketch", "test"):
        assert not any(shape in prompt for shape in shapes)


def test_the_artistic_style_is_in_no_other_task():
    styles = {world.figure(name)["style"] for name, *_ in tasks.embedded_pairs("artistic", "train")}
    assert styles == {world.ARTISTIC_STYLE} and styles.isdisjoint(world.STYLES)
    assert {row["style"] for row in world.figures()} == set(world.STYLES)


# ---- pictures and conditions ---------------------------------------------------------------

def test_named_colours_are_where_the_part_map_says():
    distances = []
    for row in world.figures("val"):
        picture = np.asarray(world.open_part("picture", row["name"])).astype(int)
        classes = np.asarray(world.open_part("parts", row["name"]))
        for part in set(world.PARTS) & row.keys():
            inside = classes == list(tasks.CLASSES).index(part)
            if inside.sum() > 40:
                median = np.median(picture[inside], axis=0)
                distances.append(np.abs(median - world.rgb(part, row[part])).max())
    assert len(distances) > 100 and np.quantile(distances, 0.95) < 30


def test_shares_of_parts_are_what_was_drawn():
    black, coded = np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
    black[..., 3] = coded[..., 3] = 1
    coded[0, :, 0], coded[1, :, 1], coded[2, :, 2] = 1, 0.5, 1
    black[3, :, 0] = coded[3, :, 0] = 0.7                   # a feature that happens to be red
    shares = make_data.part_shares(black, coded)
    assert shares[0, 0].tolist() == [1, 0, 0] and shares[1, 0].tolist() == [0, 0.5, 0]
    assert shares[2, 0].tolist() == [0, 0, 1] and not shares[3].any()


def test_ink_is_a_closed_line_around_a_disc_and_black_inside():
    rows, columns = np.mgrid[:256, :256]
    disc = np.hypot(rows - 128, columns - 128) < 60
    eye = np.hypot(rows - 128, columns - 128) < 12
    black = np.zeros((256, 256, 4), np.float32)
    black[disc, 3] = 1
    coded = black.copy()
    coded[disc & ~eye, 1] = 1                               # skin with a black eye
    ink = make_data.find_ink(black, coded, 5)
    distance = np.hypot(rows - 128, columns - 128)
    assert (ink[np.abs(distance - 60) < 1.5] == 255).mean() > 0.95
    assert (ink[distance < 10] == 255).all() and not ink[(distance > 20) & (distance < 52)].any()
    wider = make_data.find_ink(black, coded, 7)
    assert wider.astype(bool).sum() > ink.astype(bool).sum()


def test_a_hand_makes_gaps_and_moves_lines():
    rng = np.random.default_rng(0)
    ink = np.zeros((256, 256), np.uint8)
    ink[::16] = 255
    erased = make_data.erase(ink, 0.1, rng)
    assert 1 - erased.astype(bool).sum() / ink.astype(bool).sum() == pytest.approx(0.1, abs=0.02)
    moved = make_data.wobble(ink, 0.02, rng)
    assert (moved != ink).any() and moved.astype(bool).mean() == pytest.approx(1 / 16, rel=0.2)


def test_boxes_hold_their_parts():
    for name, open_cond, *_ in tasks.embedded_pairs("layout", "val")[:20]:
        boxes = np.asarray(open_cond())
        found = tasks.find_boxes(np.asarray(world.open_part("parts", name)))
        for left, top, right, bottom in found.values():
            assert (boxes[top:bottom, left:right] != 0).all()
        assert set(np.unique(boxes)) <= {0, *found}


def test_a_caption_is_a_function_of_its_generator_and_says_what_is_there():
    row = dict(style="toonHead", ground="pink", hair="purple", skin="brown", shape="bun",
               features=["smiling", "glasses"])
    full = "person, purple bun, brown skin, smiling, glasses, toon style, on pink"
    assert world.full_caption(row) == full
    assert world.prompt(row) == "person, purple hair, brown skin, toon style, on pink"
    said = {phrase for seed in range(40) for phrase in
            world.vary_caption(row, np.random.default_rng(seed)).split(", ")}
    assert said == set(full.split(", "))
    assert pretrain.draw_captions([row], 3) == pretrain.draw_captions([row], 3)


def test_parts_become_words():
    parts = dict(hair="bunHair", mouth="openedSmile", accessories="sunglasses")
    assert world.describe(parts, "hair") == dict(shape="bun", features=["smiling", "sunglasses"])
    parts = dict(top="horns", eyes="glow", glassesColor="2b2b30", earringsColor="000000")
    assert world.describe(parts, "top") == dict(shape="horns", features=[])


# ---- training ------------------------------------------------------------------------------

@pytest.mark.slow
def test_each_stage_is_seeded_and_resumes_to_the_same_weights(run_stage, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for stage in ("vae", "clip", "unet"):
        run_stage(stage, whole, 4)
        run_stage(stage, halves, 2)
        run_stage(stage, halves, 4)
        file = f"work/{stage}/checkpoint.safetensors"
        first, second = load_file(whole / file), load_file(halves / file)
        assert all(torch.equal(first[key], second[key]) for key in first), stage
        rows = (halves / "work" / stage / "log.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2, 4]
    base = load_base(whole / "model")                                           # a valid SD folder
    context = base.encode(["person, purple hair"])
    assert base.unet(torch.randn(1, 4, 16, 16), torch.tensor([5]), context).isfinite().all()
    assert base.vae.config.scaling_factor > 0 and (whole / "model" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_unet_starts_from_the_base_and_draws_sheets(run_stage, base, tmp_path, monkeypatch):
    shutil.copytree(BASE, tmp_path / "model")
    monkeypatch.setattr(pretrain, "SHEET_SECONDS", -1)
    run_stage("unet", tmp_path, 1, "--init")
    folder = tmp_path / "work" / "unet"
    assert Image.open(folder / "drawn-0000000.png").width > 500
    stored, key = load_file(folder / "checkpoint.safetensors"), "time_embed.0.weight"
    torch.testing.assert_close(stored[f"model.{key}"], base.unet.state_dict()[key], atol=1e-4,
                               rtol=0)                  # one step with a small rate


@pytest.mark.parametrize("part, prefix", [("unet", ""), ("vae", ""), ("text", "text_model.")])
def test_a_part_of_the_base_is_exported_as_the_same_bytes(part, prefix, base, tmp_path):
    checkpoint = getattr(checkpoints, f"read_{part}")(BASE)
    model = base.text_model if part == "text" else getattr(base, part)
    pretrain.export(model, checkpoint, tmp_path, prefix)
    for file in (checkpoint.file, checkpoint.file.with_name("config.json")):
        assert (tmp_path / file.relative_to(BASE)).read_bytes() == file.read_bytes()


def test_min_snr_weights_count_clean_steps_less():
    abar = pretrain.NoiseSchedule().alphas_cumprod
    snr = abar / (1 - abar)
    expected = torch.where(snr > 5, 5 / snr, torch.ones(()))
    weights = pretrain.min_snr_weights(pretrain.NoiseSchedule(), gamma=5.0)
    torch.testing.assert_close(weights, (expected / expected.mean()).float())
    assert weights[0] < 0.02 < 1 < weights[999]


def test_a_trained_tokenizer_keeps_frequent_words_whole(tmp_path):
    captions = ["person, purple hair"] * 9 + ["person, teal robot"]
    pretrain.train_tokenizer(captions, tmp_path)
    tokenizer = checkpoints.load_tokenizer(tmp_path)
    ids, dropped = tokenizer.truncate("person, purple zebra")
    words = [word for word, i in tokenizer.vocab.items() if i in ids[:3]]
    assert {"person</w>", "purple</w>"} <= set(words) and not dropped
    assert len(ids) > 4                                     # an unknown word is spelled in letters


def test_the_small_clip_reads_the_style_of_true_pictures():
    rows = world.figures("test")[:60]
    styles = [list(world.STYLES)[i] for i in Reader().styles(pretrain.true_pictures(rows))]
    assert np.mean([style == row["style"] for style, row in zip(styles, rows)]) > 0.9
