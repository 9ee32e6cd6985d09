"""The costs are measured as they say, on a small model; the full run takes over an hour."""
import sys
from types import SimpleNamespace

import pytest
import torch

from bps import BPS
from inputs import options
from measure import cost
from unet import UNetConfig
from weights import UserError


@pytest.fixture
def args(tmp_path, sd_folder, sd_file, monkeypatch):
    """The options of a run on a base as make_base writes it, with a small model; nothing forks."""
    (tmp_path / "sd15").symlink_to(sd_folder("small1"))
    (tmp_path / "sd15.safetensors").symlink_to(sd_file("small1"))
    monkeypatch.setattr(cost, "PROGRAMS", ("ours",))
    monkeypatch.setattr(cost, "in_a_process", lambda function, *arguments: function(*arguments))
    return SimpleNamespace(base=tmp_path, repeat=1, device="cpu")


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize("name", ["sd15", "sd15.safetensors"])
def test_loading_is_timed_and_weighed(name, args):
    loading, converting, reading, _ = cost.measure_load("ours", args.base / name, "fp32")
    assert min(loading, converting, reading) > 0


def test_a_prediction_is_timed_in_turns_with_what_is_installed(args, monkeypatch):
    turns = []
    monkeypatch.setattr(cost, "unet_call", lambda program, *_: lambda: turns.append(program))
    times, _ = cost.measure_forward(["ours", "theirs"], args.base / "sd15", "cpu", "fp32", 2)
    assert times.keys() == {"ours", "theirs"} and min(times.values()) > 0
    assert turns == ["ours", "theirs"] * 3                  # the first turn warms up


@pytest.mark.slow
def test_without_diffusers_only_our_own_figures_are_printed(args, monkeypatch, capsys):
    monkeypatch.setattr(cost, "SIDE", 8)
    monkeypatch.setattr(cost, "DTYPES", dict(fp32=torch.float32, bf16=torch.bfloat16))
    cost.load_table(args)
    cost.forward_table(args)
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if "nan" in line]
    assert [row[:2] for row in rows[:4]] == [
        [name, dtype] for name in ("sd15", "sd15.safetensors") for dtype in ("fp32", "bf16")]
    assert [row[0] for row in rows[4:]] == ["fp32", "bf16"]
    assert all("nan" not in row[1] for row in rows)


@pytest.mark.slow
def test_the_rounding_of_narrower_dtypes_is_in_its_table(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost", "--base", str(args.base), "--only", "rounding",
                                      "--device", "cpu"])
    cost.main()
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if "e-0" in line]
    assert len(rows) == 3
    for _, half, brain in rows:
        assert 0 < float(half) < float(brain) < 0.5         # bf16 keeps three bits fewer


@pytest.mark.slow
def test_a_child_process_that_fails_says_why():
    with pytest.raises(UserError, match="is missing"):
        cost.in_a_process(cost.measure_load, "ours", options.BASE / "nowhere", "fp32")


def test_a_step_of_four_pictures_is_timed_with_each_foot(args, monkeypatch, capsys):
    small = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4),
                       blocks_per_level=1, context_dim=24)
    monkeypatch.setattr(cost, "UNetConfig", lambda: small)
    monkeypatch.setattr(cost, "SIDE", 8)
    cost.controlnet_table(args)
    _, head, _, *rows = map(cells, capsys.readouterr().out.splitlines())
    assert head[0] == "a step of 4 pictures, 512 px"
    assert [row[0] for row in rows] == ["ours", "ours with BPS, faithful foot",
                                        "ours with BPS, light foot"]
    assert rows[0][2] == "1.00" and all(float(row[2]) > 0 and row[3] == "nan" for row in rows)


@pytest.mark.slow
def test_steering_is_timed_naive_and_amortised(args, monkeypatch, capsys):
    monkeypatch.setattr(cost, "PICTURES", (2,))
    monkeypatch.setattr(cost, "SIDE", 8)
    monkeypatch.setattr(cost, "STEERING_BASES", {"small": ("sd15", 3, 1)})
    batches, forward = [], BPS.forward

    def counted(self, cond, t_emb):
        batches.append(len(cond))
        return forward(self, cond, t_emb)

    monkeypatch.setattr(BPS, "forward", counted)
    cost.steering_table(args)
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if "small" in line]
    assert [row[1] for row in rows] == ["faithful", "light"]
    # for each foot the warm-up; then every step for one condition; then every step of two pictures,
    # for both passes of guidance
    assert batches == 2 * ([2] * 3 + [1] * 3 + [2] * 6)
