"""Pictures that the base draws, and the extractor that reads conditions off pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

import draws
import train
from bps import load_bps
from data import Pair, load_pairs
from diffusion import NoiseSchedule
from draws import draw_pictures, draw_splits, fit_extractor, pairs_of, pictures_folder
from inputs.conditions import class_colours, open_image
from weights import UserError

PROMPTS = ["person, red hair", "teal robot", "person, toon style"]


def discs(count, seed):
    """Pairs of a red and a blue disc on a noisy ground, and the label map of the discs."""
    def make(i):
        rng = np.random.default_rng((seed, i))
        places = rng.uniform(8, 24, (2, 2))
        rows, columns = np.mgrid[:32, :32]
        labels = np.zeros((32, 32), np.uint8)
        picture = rng.integers(0, 90, (32, 32, 3), np.uint8)
        for number, (y, x), colour in zip((3, 7), places, ((230, 40, 40), (40, 40, 230))):
            inside = (rows - y) ** 2 + (columns - x) ** 2 < 30
            labels[inside], picture[inside] = number, colour
        image = Image.fromarray(labels)
        image.putpalette(bytes(9) + b"\xff\xff\0" + bytes(9) + b"\0\xff\xff")    # 3 and 7
        return image, Image.fromarray(picture)

    return [Pair(f"{seed}-{i}", lambda i=i: make(i)[0], lambda i=i: make(i)[1], ("discs",))
            for i in range(count)]


# ---- pictures ------------------------------------------------------------------------------

def test_picture_i_depends_on_its_prompt_and_seed_alone(base, tmp_path, pixels):
    few, more = (draw_pictures(base, PROMPTS, count, 32, tmp_path / str(count))
                 for count in (2, 4))
    for a, b in zip(few, more):                 # other pictures in a batch change a rounding
        assert np.abs(pixels(a).astype(int) - pixels(b)).max() <= 1
    assert not np.array_equal(pixels(more[0]), pixels(more[3]))     # same prompt, another seed
    assert [pair.prompts[0] for pair in pairs_of(more, PROMPTS)] == [*PROMPTS, PROMPTS[0]]


def test_an_interrupted_drawing_resumes_with_what_is_missing(base, tmp_path, monkeypatch, pixels):
    draw, seeds_drawn = draws.draw, []
    monkeypatch.setattr(draws, "draw", lambda *a: (seeds_drawn.extend(a[3]), draw(*a))[1])
    files = draw_pictures(base, PROMPTS, 3, 32, tmp_path)
    kept, before = [files[0].read_bytes(), files[2].read_bytes()], pixels(files[1])
    files[1].unlink()
    assert draw_pictures(base, PROMPTS, 3, 32, tmp_path) == files
    assert seeds_drawn == [0, 1, 2, 1]
    assert [files[0].read_bytes(), files[2].read_bytes()] == kept
    assert np.abs(before.astype(int) - pixels(files[1])).max() <= 1


def test_another_base_other_prompts_or_sizes_have_folders_of_their_own(base, tmp_path):
    other = base._replace(unet=type(base.unet)(base.unet.config))
    folders = {pictures_folder(*arguments, tmp_path) for arguments in (
        (base, PROMPTS, 32), (base, PROMPTS[:2], 32), (base, PROMPTS, 64), (other, PROMPTS, 32),
        (base._replace(schedule=NoiseSchedule(prediction_type="v_prediction")), PROMPTS, 32))}
    assert len(folders) == 5


# ---- the extractor -------------------------------------------------------------------------

def test_an_extractor_reads_classes_off_pictures_that_it_never_saw(monkeypatch, capsys):
    monkeypatch.setattr(draws, "FIT_STEPS", 100)
    extractor = fit_extractor(discs(6, seed=0), discs(4, seed=1), "segmentation", 32)
    assert "explains" in capsys.readouterr().out
    for pair in discs(4, seed=2):
        labels, read = pair.open_cond(), extractor.read(pair.open_image())
        assert class_colours(read) == {"#000000": 0, "#ffff00": 3, "#00ffff": 7}
        assert np.mean(np.asarray(read) == np.asarray(labels)) > 0.95


def test_an_extractor_that_explains_too_little_is_refused(monkeypatch):
    monkeypatch.setattr(draws, "FIT_STEPS", 20)
    shuffled = [pair._replace(open_cond=other.open_cond)
                for pair, other in zip(discs(6, seed=0), discs(6, seed=1))]
    with pytest.raises(UserError, match="--from-base needs an extractor that explains 50%"):
        fit_extractor(shuffled, shuffled, "segmentation", 32)


def test_fitting_an_extractor_repeats_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(draws, "FIT_STEPS", 3)
    monkeypatch.setattr(draws, "MIN_QUALITY", -100)
    state = torch.get_rng_state()
    first, second = (fit_extractor(discs(4, 0), discs(2, 1), "segmentation", 32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_classes_that_share_a_number_keep_their_colours():
    extractor = draws.Extractor("layout", {"#ff0000": 1, "#0000ff": 1})
    torch.nn.init.zeros_(extractor.out.weight)
    extractor.out.bias.data = torch.tensor([1.0, 0.0])              # red everywhere
    labels = extractor.read(Image.new("RGB", (8, 8)))
    assert labels.convert("RGB").getcolors() == [(64, (255, 0, 0))]


# ---- training on draws ---------------------------------------------------------------------

@pytest.fixture
def train_on_draws(run_train, interrupted, monkeypatch, tmp_path):
    """A function that runs train.py up to its report; pictures are drawn in one step."""
    monkeypatch.setattr(draws, "SAMPLING", draws.SAMPLING._replace(steps=1))
    return lambda *arguments: interrupted(
        run_train, "--cache", tmp_path / "cache", "--out", tmp_path / "run", *arguments)


def test_a_bps_is_trained_without_a_single_pair(train_on_draws, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("person, red hair\n\nteal robot\n")
    train_on_draws("--from-base", 20, "--data", tmp_path / "prompts.txt")
    assert "16 training, 1 validation and 3 test pairs" in capsys.readouterr().out
    metadata = load_bps(tmp_path / "run" / "bps.safetensors").metadata
    assert metadata["from_base"] == 20 and metadata["extracted"]
    folder, = (tmp_path / "cache").glob("draws-*")
    assert len(list(folder.glob("*.png"))) == 20


@pytest.mark.parametrize("moved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_half_of_a_batch_is_drawn_when_there_are_pairs(moved, train_on_draws, tmp_path,
                                                       monkeypatch):
    for name in ("images", "conditions"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
    for i, pair in enumerate(discs(12, seed=0)):
        pair.open_image().save(tmp_path / "pairs" / "images" / f"{i}.png")
        pair.open_cond().save(tmp_path / "pairs" / "conditions" / f"{i}.png")
    caches, make = [], train.LatentCache
    monkeypatch.setattr(train, "LatentCache", lambda *a: (caches.append(make(*a)), caches[-1])[1])
    monkeypatch.setattr(draws, "FIT_STEPS", 3)
    monkeypatch.setattr(draws, "MIN_QUALITY", -100)
    monkeypatch.setattr(train, "is_embedded", lambda base: not moved)
    train_on_draws("--task", "segmentation", "--data", tmp_path / "pairs", "--from-base", 5)
    weights = caches[0].weights
    labelled = sum("draws-" not in pair.name for pair in caches[0].pairs)
    assert labelled == 6 * (14 if moved else 2) and len(weights) == labelled + 5 * 2
    assert weights[:labelled].sum().item() == pytest.approx(weights[labelled:].sum().item())
    assert set(colour for classes in caches[0].palettes for colour, _ in classes) == {
        "#000000", "#ffff00", "#00ffff"}


def test_embedded_prompts_are_drawn_when_none_are_given(base, tmp_path, monkeypatch):
    monkeypatch.setattr(draws, "SAMPLING", draws.SAMPLING._replace(steps=1))
    monkeypatch.setattr("sys.argv", ["train.py", "--from-base", "10", "--size", "32",
                                     "--cache", str(tmp_path)])
    splits = draw_splits(base, train.parse_args(), train.join_processes("cpu")[0])
    drawn = sorted((pair for pairs in splits.values() for pair in pairs), key=lambda p: p.name)
    prompts = [pair.prompts for pair in load_pairs("sketch", "train")]
    chosen = [prompts.index(pair.prompts) for pair in drawn]
    assert len(set(chosen)) == 10 and max(chosen) > 100         # not the first ones
    assert drawn[0].open_cond().tobytes() == open_image(drawn[0].files[0]).tobytes()
