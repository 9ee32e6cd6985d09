"""The meters of obedience give full marks to what obeys, and few to what does not."""
import math

import pytest
import torch

from data import load_pairs, open_pair
from inputs.conditions import TASKS, coarse_colours, extract_lines, soft_lines, to_image, to_x
from measure import obedience
from studies.quality import kernel_distance, recognition_rates
from tiny import world
from tiny.classifier import Classifier
from tiny.tasks import CLASSES


@pytest.fixture(scope="module")
def scenes():
    """Pictures x (24, 3, 64, 64) of test scenes, and {task: conditions}."""
    conds, pictures = {}, None
    for task in ("segmentation", "layout"):
        opened = [open_pair(pair, task, 64) for pair in load_pairs(task, "test")[:24]]
        conds[task] = torch.stack([cond for cond, *_ in opened]) / 255
        pictures = torch.stack([x for _, x, _ in opened])
    return pictures, conds


def test_a_scenes_condition_has_its_classes_where_its_emoji_are(scenes):
    pictures, conds = scenes
    outlines, boxes = (obedience.class_numbers(conds[task]) for task in ("segmentation", "layout"))
    covered = obedience.off_ground(pictures)
    assert ((outlines > 0) == covered).float().mean() > 0.9
    assert ((outlines == boxes) | (outlines == 0)).all()            # an outline lies in its box
    assert {0, *range(1, 7)} == set(outlines.unique().tolist())
    for x, map_of in zip(obedience.quarters(covered), obedience.quarters(boxes)):
        assert all(len(each[each > 0].unique()) <= 1 for each in map_of)


def told(conds):
    """A classifier that knows the answers: the class of each quarter that is asked about."""
    answers = []
    for numbers in obedience.quarters(obedience.class_numbers(conds)):
        answers += [int(each.max()) - 1 for each in numbers if each.any()]
    answers = iter(answers)
    return lambda x: torch.tensor([next(answers) for _ in x])


def test_segmentation_counts_pixels_and_classes(scenes):
    _, conds = scenes
    conds = conds["segmentation"]
    perfect = 2 * conds - 1                             # a picture that is its own label map
    scores = obedience.segmentation(perfect, conds, told(conds))
    assert scores["pixel accuracy"] > 0.97 and scores["mIoU"] > 0.93       # but for filled holes
    wrong = obedience.segmentation(perfect, conds, lambda x: (told(conds)(x) + 1) % 6)
    ground = (obedience.class_numbers(conds) == 0).float().mean().item()
    assert wrong["pixel accuracy"] == pytest.approx(ground, abs=0.03) and wrong["mIoU"] < 0.2
    empty = obedience.segmentation(torch.ones_like(conds), conds, None)
    assert empty["pixel accuracy"] == pytest.approx(ground)
    assert empty["mIoU"] == pytest.approx(ground / 7)


def test_layout_counts_boxes(scenes):
    pictures, conds = scenes
    conds = conds["layout"]
    boxes = sum(int(each.any()) for numbers in obedience.quarters(obedience.class_numbers(conds))
                for each in numbers)
    assert obedience.layout(pictures, conds, told(conds)) == {"boxes of the right class": 1.0}
    asked = []
    score, = obedience.layout(pictures, conds, lambda x: asked.append(x) or torch.zeros(len(x))
                              ).values()
    assert score < 0.5
    assert asked[0].shape == (boxes, 3, 64, 64)


@pytest.mark.slow
def test_the_small_clip_knows_true_scenes_from_shuffled_ones(scenes):
    pictures, conds = scenes
    for task in ("segmentation", "layout"):
        meter = obedience.meter_for(task, embedded=True)
        right, wrong = meter(pictures, conds[task]), meter(pictures.roll(1, 0), conds[task])
        for what in right:
            assert right[what] > wrong[what] + 0.15, what


@pytest.mark.slow
def test_the_classifier_names_categories_of_the_picture(scenes):
    rows = world.records("train", ("3d",))[::40]
    x = torch.stack([to_x(world.on_ground(world.picture("3d", row["name"]))) for row in rows])
    wanted = torch.tensor([world.CATEGORIES.index(row["category"]) for row in rows])
    assert (Classifier()(x) == wanted).float().mean() > 0.6


def test_artistic_measures_colours_and_lines():
    opened = [open_pair(pair, "artistic", 64) for pair in load_pairs("artistic", "test")[:8]]
    conds = torch.stack([cond for cond, *_ in opened]) / 255
    pictures = torch.stack([x for _, x, _ in opened])
    assert conds.shape == (8, TASKS["artistic"].channels, 64, 64)
    right, wrong = (obedience.artistic(each, conds) for each in (pictures, pictures.roll(1, 0)))
    assert right["colour distance"] < 0.003 and right["line F1"] == 1
    assert wrong["colour distance"] > 0.1 and wrong["line F1"] < 0.6


def test_a_large_picture_has_the_lines_of_its_own_condition():
    x = torch.nn.functional.interpolate(to_x(load_pairs("artistic", "test")[0].open_image())[None],
                                        scale_factor=8, mode="bilinear")
    noisy = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    cond = torch.cat([coarse_colours(noisy), soft_lines(noisy)], dim=1)
    assert obedience.artistic(noisy, cond)["line F1"] == 1


def test_a_perfect_drawing_is_obedient_and_a_blank_one_is_not():
    cond = torch.zeros(2, 1, 24, 20)
    cond[:, :, 6:18, 5:14] = 1.0
    assert obedience.sketch((1 - 2 * cond).expand(-1, 3, -1, -1), cond)["line F1"] > 0.99
    assert obedience.sketch(torch.ones(2, 3, 24, 20), cond)["line F1"] == 0


def test_own_label_maps_have_no_meter():
    assert obedience.meter_for("segmentation", embedded=False) is None
    assert obedience.meter_for("sketch", embedded=False) is obedience.sketch


# ---- quality -------------------------------------------------------------------------------

def test_the_kernel_distance_of_equal_laws_is_zero_and_of_a_shift_the_closed_form():
    """For N(0, I) and N(m, I) in D dimensions with a Gaussian kernel of width w, the squared MMD is
    2 (w^2 / (w^2 + 2))^(D / 2) (1 - exp(-|m|^2 / (2 (w^2 + 2))))."""
    generator, dim, shift = torch.Generator().manual_seed(0), 3, 1.5
    a, b, c = torch.randn(3, 3000, dim, generator=generator, dtype=torch.float64)
    assert abs(kernel_distance(a, b)) < 0.002
    w2 = torch.pdist(b).median().item() ** 2
    expected = 2 * (w2 / (w2 + 2)) ** (dim / 2) * (1 - math.exp(-shift**2 / (2 * (w2 + 2))))
    moved = c + torch.tensor([shift, 0.0, 0.0])
    assert kernel_distance(moved, b) == pytest.approx(expected, rel=0.05)


def test_recognition_rates_count_categories_and_captions_found_again():
    """A picture holds the number of the caption that is seen in it; its category is that mod 3."""
    class Seer:
        def cosines(self, x, captions):
            return torch.stack([-(x - float(caption)).abs() for caption in captions], dim=1)

        def __call__(self, x):
            return x % 3

    captions, categories = [str(i) for i in range(30)], torch.arange(30) % 3
    assert recognition_rates(Seer(), torch.arange(30), captions, categories) == (1.0, 1.0)
    half_wrong = (torch.arange(30) + 1) // 2 * 2 % 30       # odd ones show the one after
    category, name = recognition_rates(Seer(), half_wrong, captions, categories)
    assert category == name == 0.5


# ---- what conditions are made of -----------------------------------------------------------

def test_coarse_colours_are_the_means_of_cells():
    x = torch.rand(2, 3, 16, 32) * 2 - 1
    coarse = coarse_colours(x)
    assert coarse.shape == x.shape
    torch.testing.assert_close(coarse[1, :, 5, 9], (x[1, :, 4:6, 8:10].mean((1, 2)) + 1) / 2)
    assert torch.equal(coarse[:, :, 4], coarse[:, :, 5])


def test_soft_lines_have_more_ink_where_the_edge_is_steeper():
    x = torch.full((1, 3, 20, 24), -1.0)
    x[:, :, :, 8:16] += 0.2
    x[:, 1, :, 16:] += 1.5
    ink = soft_lines(x)[0, 0]
    assert ink.shape == (20, 24) and ink.min() == 0 and ink.max() == 1
    weak, strong = ink[10, 6:10].max(), ink[10, 14:18].max()
    assert 0 < weak < strong == 1 and ink[10, :5].max() == 0
    assert torch.equal(soft_lines(x)[:, 0] > obedience.SURE_INK, extract_lines(x))
    flat = TASKS["sketch"].extract(to_image(torch.zeros(3, 16, 16)))
    assert flat.shape == (1, 16, 16) and not flat.any()


def test_texture_of_a_large_picture_is_no_line():
    x = torch.zeros(1, 3, 512, 512)
    x[..., 256:] = 1.0
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ink = soft_lines(noisy)[0, 0]
    assert ink[:, 250:262].amax(1).mean() > 0.9 and ink[:, :200].mean() < 0.001


def test_class_colours_are_distinct_and_the_ground_is_first():
    assert list(CLASSES) == ["ground", *world.CATEGORIES]
    assert len(set(CLASSES.values())) == 7
