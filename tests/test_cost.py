"""The benchmark measures what it says, on a small model; its full run takes minutes."""
import sys

import pytest
import torch
from test_layouts import save_file, single_file, write_folder

from inputs import options
from studies import bench, steering_cost


@pytest.fixture
def base(tmp_path, random_states):
    """A folder as make_base writes it, with a small model."""
    states = random_states("small1")
    write_folder(tmp_path / "sd15", "small1", states)
    save_file(single_file(states), tmp_path / "sd15.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["sd15", "sd15.safetensors"])
def test_loading_is_timed_and_weighed(name, base):
    found = bench.measure_load("ours", base / name, "fp32")
    assert found.keys() == {"load", "convert", "read", "peak"}
    assert min(found["load"], found["convert"], found["read"]) > 0


def test_a_prediction_is_timed_in_turns_with_what_is_installed(base, monkeypatch):
    monkeypatch.setattr(bench, "SIDE", 8)
    monkeypatch.setattr(bench, "DIFFUSERS", False)
    found = bench.measure_forward(base / "sd15", "cpu", "fp32", 2)
    assert found.keys() == {"ours"} and found["ours"] > 0


def test_the_rounding_of_narrower_dtypes_is_in_its_table(base, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_a_process", lambda name, *words: getattr(bench, name)(*words))
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--base", str(base), "--only", "rounding"])
    bench.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "e-0" in line]
    assert len(rows) == 3
    for *_, half, brain, _ in rows:
        assert 0 < float(half) < float(brain) < 0.5         # bf16 keeps three bits fewer


def test_a_child_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such file"):
        bench.in_a_process("measure_load", "ours", options.BASE / "nowhere", "fp32")


def test_without_diffusers_only_our_own_figures_are_printed(base, monkeypatch, capsys):
    monkeypatch.setattr(bench, "DIFFUSERS", False)
    monkeypatch.setattr(bench, "DTYPES", dict(fp32=torch.float32))
    monkeypatch.setattr(bench, "in_a_process", lambda name, *words: getattr(bench, name)(*words))
    bench.load_table(base, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["sd15", "sd15.safetensors"]
    assert "nan" in lines[-1]


def test_steering_is_timed_naive_and_amortised(monkeypatch, capsys):
    monkeypatch.setattr(steering_cost, "PICTURES", (2,))
    monkeypatch.setitem(steering_cost.SIZES, "embedded base", dict(steps=3, repeat=1))
    batches, forward = [], steering_cost.BPS.forward

    def counted(self, cond, t_emb):
        batches.append(len(cond))
        return forward(self, cond, t_emb)

    monkeypatch.setattr(steering_cost.BPS, "forward", counted)
    monkeypatch.setattr(sys, "argv", ["steering_cost.py", "--only", "embedded base"])
    steering_cost.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["faithful", "light"]
    # the warm-up; then for each foot: every step of two pictures with both halves, or every step
    assert batches == [2] * 3 + 2 * ([2] * 6 + [1] * 3)
