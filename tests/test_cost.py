"""The tables of cost run on small networks, and steering is timed as the table says."""
import pytest

from bps import BPS
from studies import cost
from unet import UNetConfig


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small networks in this process, without diffusers."""
    config = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4),
                        blocks_per_level=1, context_dim=768)
    for name, value in dict(UNetConfig=lambda: config, SIDE=8, PROGRAMS=("ours",), PICTURES=(2,),
                            STEERING_BASES={"small": (None, 3, 1)},
                            in_a_process=lambda function, *arguments: function(*arguments)).items():
        monkeypatch.setattr(cost, name, value)


@pytest.mark.parametrize("table, rows", [
    ("controlnet", ["ours", "ours with BPS, faithful foot", "ours with BPS, light foot"]),
    pytest.param("training", 4 * ["light", "faithful"], marks=pytest.mark.slow)])
def test_a_table_has_a_row_for_each_network(table, rows, run_script, capsys):
    run_script(cost, "--only", table, "--repeat", 1, "--device", "cpu")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]] == rows


def test_naive_steering_runs_bps_in_each_call_and_amortised_once(run_script, monkeypatch):
    batches, forward = [], BPS.forward
    monkeypatch.setattr(BPS, "forward", lambda self, cond, t_emb: (
        batches.append(len(cond)), forward(self, cond, t_emb))[1])
    monkeypatch.setattr(cost, "FEET", ("faithful",))
    run_script(cost, "--only", "steering", "--device", "cpu")
    # the warm-up; every step for one condition; every step of two pictures, both passes of guidance
    assert batches == [2] * 3 + [1] * 3 + [2] * 6
