"""The tables of cost run on small networks, and steering is timed as its table says."""
from functools import partial

import pytest
import torch

from bps import BPS
from studies import cost
from unet import UNet, UNetConfig


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small networks in this process, without diffusers."""
    config = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4),
                        blocks_per_level=1, context_dim=768)
    for name, value in dict(UNetConfig=lambda: config, SIDE=8, HAS_PEERS=False, PICTURES=(2,),
                            in_a_process=lambda function, *arguments: function(*arguments)).items():
        monkeypatch.setattr(cost, name, value)


@pytest.mark.parametrize("table, rows", [
    ("steering", 6), pytest.param("training", 9, marks=pytest.mark.slow)])
def test_a_table_has_a_row_for_each_network(table, rows, run_script, capsys):
    run_script(cost, "--only", table, "--repeat", 1, "--device", "cpu")
    assert capsys.readouterr().out.count("\n| ") == rows


def test_naive_steering_runs_bps_in_each_call(monkeypatch):
    calls, forward = [], BPS.forward
    monkeypatch.setattr(BPS, "forward", lambda self, cond, t_emb: (
        calls.append(len(cond)), forward(self, cond, t_emb))[1])
    unet = UNet(cost.UNetConfig())
    bps = cost.random_bps(unet, "faithful", "cpu")
    make = partial(cost.NaiveCondition, bps, torch.rand(1, 1, 64, 64))
    with torch.inference_mode():
        cost.draw_latents(unet, make, pictures=2, steps=3)
    assert calls == [2] * 6         # every step of two pictures, both passes of guidance
