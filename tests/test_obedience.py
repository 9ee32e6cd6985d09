"""The meters of obedience give full marks to what obeys, and few to what does not."""
import math

import numpy as np
import pytest
import torch

from data import load_pairs, open_pair
from inputs.conditions import TASKS, coarse_colours, extract_lines, soft_lines, to_image, to_x
from measure import obedience
from studies.quality import distance_shares
from tiny import world
from tiny.pretrain import true_pictures
from tiny.tasks import CLASSES


@pytest.fixture(scope="module")
def figures():
    """(rows, names, pictures x (48, 3, 64, 64)) of the first test figures."""
    rows = world.figures("test")[:48]
    return rows, [row["name"] for row in rows], true_pictures(rows)


# ---- embedded figures ----------------------------------------------------------------------

def test_true_pictures_follow_their_part_maps_and_others_do_not(figures):
    _, names, x = figures
    right, wrong = (obedience.segmentation(each, None, names) for each in (x, x.roll(1, 0)))
    assert right["pixel accuracy"] > 0.97 and right["mIoU"] > 0.88
    assert wrong["pixel accuracy"] < 0.7 and wrong["mIoU"] < 0.4
    right, wrong = (obedience.layout(each, None, names)["box IoU"] for each in (x, x.roll(1, 0)))
    assert right > 0.75 and wrong < 0.5


def test_segmentation_counts_pixels_and_classes(monkeypatch):
    figure = dict(ground="white", hair="red", skin="dark")
    target = np.repeat([[0, 0, 1, 1, 2, 2, 2, 5]], 8, axis=0)      # ground, hair, skin, features
    monkeypatch.setattr(obedience, "part_map", lambda name: target)
    monkeypatch.setattr(world, "figure", lambda name: figure)
    colours = [world.rgb("ground", "white"), world.rgb("hair", "red"), world.rgb("skin", "dark")]
    drawn = np.array(colours)[np.where(target == 5, 0, target)]
    drawn[:, 6] = colours[1]                                # one of three skin columns is hair
    x = torch.from_numpy(drawn).permute(2, 0, 1)[None] / 127.5 - 1
    scores = obedience.segmentation(x, None, ["a"])
    assert scores["pixel accuracy"] == pytest.approx(6 / 7)
    assert scores["mIoU"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize("other, iou", [
    ((0, 0, 4, 4), 1.0), ((2, 0, 6, 4), 1 / 3), ((4, 0, 8, 4), 0.0), ((1, 1, 3, 3), 0.25)])
def test_the_iou_of_boxes_is_overlap_over_union(other, iou):
    assert obedience.box_iou((0, 0, 4, 4), other) == pytest.approx(iou)


def test_a_few_stray_pixels_do_not_move_a_box():
    classes = np.zeros((64, 64), int)
    classes[10:40, 20:50] = list(CLASSES).index("hair")
    clean = obedience.trimmed_boxes(classes)
    classes[60, :4] = list(CLASSES).index("hair")
    strayed = obedience.trimmed_boxes(classes)
    assert clean.keys() == strayed.keys()
    assert obedience.box_iou(*(boxes[1] for boxes in (clean, strayed))) > 0.95


def test_true_pictures_have_the_colours_that_their_prompts_name(figures):
    rows, names, x = figures
    for right, wrong in ((obedience.colour_fidelity(x, names),
                          obedience.colour_fidelity(x.roll(1, 0), names)),
                         (obedience.prompt_fidelity(x, rows),
                          obedience.prompt_fidelity(x.roll(1, 0), rows))):
        assert right.keys() == set(world.PARTS)
        assert np.mean(list(right.values())) > 0.96 and np.mean(list(wrong.values())) < 0.4


def test_artistic_measures_colours_and_lines():
    opened = [open_pair(pair, "artistic", 64) for pair in load_pairs("artistic", "test")[:8]]
    conds = torch.stack([cond for cond, *_ in opened]) / 255
    pictures = torch.stack([x for _, x, _ in opened])
    assert conds.shape == (8, TASKS["artistic"].channels, 64, 64)
    right, wrong = (obedience.artistic(each, conds, None)
                    for each in (pictures, pictures.roll(1, 0)))
    assert right["colour distance"] < 0.003 and right["line F1"] == 1
    assert wrong["colour distance"] > 0.1 and wrong["line F1"] < 0.8


def test_a_large_picture_has_the_lines_of_its_own_condition():
    x = torch.nn.functional.interpolate(to_x(load_pairs("artistic", "test")[0].open_image())[None],
                                        scale_factor=8, mode="bilinear")
    noisy = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    cond = torch.cat([coarse_colours(noisy), soft_lines(noisy)], dim=1)
    assert obedience.artistic(noisy, cond, None)["line F1"] == 1


def test_a_perfect_drawing_is_obedient_and_a_blank_one_is_not():
    cond = torch.zeros(2, 1, 24, 20)
    cond[:, :, 6:18, 5:14] = 1.0
    assert obedience.sketch((1 - 2 * cond).expand(-1, 3, -1, -1), cond, None)["line F1"] > 0.99
    assert obedience.sketch(torch.ones(2, 3, 24, 20), cond, None)["line F1"] == 0


def test_own_label_maps_have_no_meter():
    assert obedience.meter_for("segmentation", embedded=False) is None
    assert obedience.meter_for("sketch", embedded=False) is obedience.sketch


# ---- quality -------------------------------------------------------------------------------

def test_the_kernel_distance_of_a_shift_is_the_closed_form():
    """For N(0, I) and N(m, I) in D dimensions with a Gaussian kernel of width w, the squared MMD is
    2 (w^2 / (w^2 + 2))^(D / 2) (1 - exp(-|m|^2 / (2 (w^2 + 2))))."""
    generator, dim, shift = torch.Generator().manual_seed(0), 3, 1.5
    a, b, c = torch.randn(3, 3000, dim, generator=generator, dtype=torch.float64)
    assert abs(distance_shares(a, b).mean()) < 0.002
    w2 = torch.pdist(b).median().item() ** 2
    expected = 2 * (w2 / (w2 + 2)) ** (dim / 2) * (1 - math.exp(-shift**2 / (2 * (w2 + 2))))
    moved = c + torch.tensor([shift, 0.0, 0.0])
    assert distance_shares(moved, b).mean().item() == pytest.approx(expected, rel=0.05)


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
