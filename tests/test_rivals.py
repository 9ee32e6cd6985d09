"""BPS's rivals start at the prior where their authors' do, learn what is theirs, are compared."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import weights
from diffusion import Sampling
from inputs.options import BASE
from measure import report, rivals
from measure.rival_networks import ControlNet, FineTuned, LoRA, RivalUNet, T2IAdapter, predict_with
from unet import UNet, UNetConfig, load_unet

SMALL = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4), blocks_per_level=1,
                   context_dim=24, norm_groups=16)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(SMALL).eval().requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, 12, 8, generator=generator), torch.tensor([5, 700]),
            torch.randn(2, 5, 24, generator=generator))


@pytest.fixture
def cond():
    return torch.rand(2, 1, 48, 32, generator=torch.Generator().manual_seed(2))


def test_maps_are_added_once_where_they_are_said_to_be(unet, inputs):
    assert torch.equal(predict_with(unet, *inputs), unet(*inputs))
    # a residual of a block without attention is added once, too, and reaches the skip
    r = torch.randn(2, 64, 6, 4)
    residuals = [None] * 9
    residuals[3] = r
    torch.testing.assert_close(predict_with(unet, *inputs, {3: r}), unet(*inputs, residuals))
    skips = [torch.zeros(2, *shape) for shape in
             ((32, 12, 8), (32, 12, 8), (32, 6, 4), (64, 6, 4))]
    assert torch.equal(predict_with(unet, *inputs, {}, skips), unet(*inputs))
    skips[3] = r                            # the skip alone: the path behind it does not see it
    assert not torch.allclose(predict_with(unet, *inputs, {}, skips),
                              predict_with(unet, *inputs, {3: r}))


@pytest.mark.parametrize("make", [
    ControlNet, lambda *base: ControlNet(*base, width=1.5), FineTuned, LoRA],
    ids=["ControlNet", "wider ControlNet", "FineTuned", "LoRA"])
def test_a_rival_with_zero_layers_starts_at_the_prior_and_leaves_it_when_trained(make, unet,
                                                                                 inputs, cond):
    rival = make(unet, 1, 4)
    steered = RivalUNet(unet, rival)
    trained = [p for p in rival.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    maps = rival(cond, steered.time_embedding(inputs[1]))
    prior = unet(*inputs)
    torch.testing.assert_close(steered(*inputs, maps), prior)
    assert torch.equal(steered(*inputs), prior)
    for _ in range(3):
        optimizer.zero_grad()
        maps = rival(cond, steered.time_embedding(inputs[1]))
        (steered(*inputs, maps) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert all(p.grad is None for p in unet.parameters())
    with torch.no_grad():
        maps, others = (rival(c, steered.time_embedding(inputs[1])) for c in (cond, 1 - cond))
        assert not torch.allclose(steered(*inputs, maps), steered(*inputs, others))
        assert torch.equal(steered(*inputs), prior)                 # the base is what it was


def test_a_training_of_which_a_part_is_frozen_is_resumed(unet, tmp_path):
    first, second = (LoRA(unet, 1, 4, rank=2) for _ in range(2))
    optimizers = [torch.optim.AdamW(module.parameters()) for module in (first, second)]
    first(torch.rand(1, 1, 48, 32), None)
    for parameter in first.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    file = tmp_path / "checkpoint.safetensors"
    weights.save_training(file, dict(model=first), "model", optimizers[0], dict(step=1))
    assert weights.load_training(file, dict(model=second), "model", optimizers[1]) == {"step": 1}
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (b in optimizers[1].state) == b.requires_grad
        if b.requires_grad:
            assert torch.equal(optimizers[0].state[a]["exp_avg"], optimizers[1].state[b]["exp_avg"])


def test_methods_that_are_said_to_be_of_bpss_size_are(monkeypatch):
    base = (load_unet(BASE), 1, 4)
    sizes = {name: sum(p.numel() for p in rivals.METHODS[name](*base).parameters()
                       if p.requires_grad) for name in rivals.METHODS}
    for name, size in sizes.items():
        if name.endswith("-sized"):
            assert size == pytest.approx(sizes["bps"], rel=0.1), name


def test_lora_trains_low_rank_terms_and_the_stem_only(unet):
    rival = LoRA(unet, 1, 4, rank=2)
    trained = {name for name, p in rival.named_parameters() if p.requires_grad}
    assert all(".up." in name or ".down." in name or "input_blocks.0.0" in name for name in trained)
    transformers = 1 + 1 + 2                # of contracting path, middle and expansive path
    assert sum(".up." in name for name in trained) == transformers * 2 * 4


def test_an_adapter_depends_on_the_condition_alone_and_is_added_at_the_levels_ends(unet, cond):
    rival = T2IAdapter(unet, 1, 4)
    maps, others = rival(cond, None), rival(1 - cond, None)
    assert not any(torch.allclose(a, b) for a, b in zip(maps, others))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 12, 8), (2, 64, 6, 4)]
    assert rival.ends == [1, 3]             # the last block of each level, before its down-sampler


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "SAMPLING", Sampling(steps=2))
    monkeypatch.setattr(report, "VALIDATION_T", (500,))
    for name, value in dict(STEPS=3, BATCH=2, SAVES=1, RATES=(1e-4, 1e-3), MOST_RATES=3,
                            MAIN=("t2i-adapter",)).items():
        monkeypatch.setattr(rivals, name, value)
    monkeypatch.setattr(rivals, "METHODS", {name: rivals.METHODS[name] for name in
                                            ("t2i-adapter", "lora")})
    load_pairs = rivals.load_pairs
    monkeypatch.setattr(rivals, "load_pairs", lambda *arguments: load_pairs(*arguments)[:6])
    record = tmp_path / "rivals.jsonl"

    def run_study(study):
        monkeypatch.setattr(sys, "argv", ["rivals", "--study", study, "--record", str(record),
                                          "--out", str(tmp_path / "under-way"),
                                          "--figures", str(tmp_path)])
        rivals.main()
        return capsys.readouterr().out

    printed = run_study("methods")
    table, conflicts = printed.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [*rivals.BOUNDS, "t2i-adapter", "lora"]
    assert [row[4] for row in rows] == ["1", "1", "1", "3", "1"]
    assert [row[6] == "-" for row in rows] == [True, True, True, False, False]      # their gain
    assert len(conflicts.splitlines()) == 2 + 2
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert sum("gain" in row["results"] for row in rows) == 4
    assert len(rows) == 3 + 4 + 3 * 2                               # the sweeps, widened once
    assert all(row["results"].get("val", 1) > 0 for row in rows)
    assert not list((tmp_path / "under-way").iterdir())
    printed_data = run_study("data")
    assert printed_data.count("| t2i-adapter |") == 5
    assert (tmp_path / "rivals-sketch-data.png").exists()
    monkeypatch.setattr(rivals, "train", None)                      # nothing is trained again
    assert run_study("methods") == printed and run_study("data") == printed_data


def test_what_is_done_is_printed_without_training_and_nothing_is_an_error(tmp_path, monkeypatch,
                                                                          capsys):
    record = rivals.Record(tmp_path / "rivals.jsonl")
    numbers = dict(gain=[0.1, 0.01], distance=[0.2, 0.02], obedience={"line F1": 0.5}, minutes=1.0)
    for method, seed in (("lora", 0), ("bps", 0), ("bps", 1), ("bps", rivals.SWEEP_SEED)):
        record.add(rivals.Job("sketch", method, 0, rivals.STEPS, 1e-3, seed), numbers)
    monkeypatch.setattr(rivals, "load_base", None)
    for task in ("sketch", "segmentation"):
        monkeypatch.setattr(sys, "argv", ["rivals", "--task", task, "--record", str(record.file),
                                          "--done"])
        if task == "sketch":
            rivals.main()
            rows = [line.split("|")[1:6] for line in capsys.readouterr().out.splitlines()
                    if line.startswith(("| bps", "| lora"))]
            assert [(row[0].strip(), row[4].strip()) for row in rows] == [("bps", "2"),
                                                                          ("lora", "1")]
        else:
            with pytest.raises(weights.UserError, match="nothing of this study"):
                rivals.main()


def test_a_kernel_distances_error_is_the_deviation_over_other_draws(monkeypatch):
    """The jackknife's, against many draws of the same law."""
    bench = object.__new__(rivals.Bench)
    generator = torch.Generator().manual_seed(0)
    bench.true = torch.randn(60, 4, generator=generator)
    draws = [bench.distance(0.3 + torch.randn(60, 4, generator=generator)) for _ in range(40)]
    values, errors = torch.tensor(draws).T
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35)


def test_means_keep_errors_over_pairs_and_over_seeds_apart():
    group = [dict(gain=[gain, 0.5], distance=[0.0, 0.1], obedience={"line F1": gain})
             for gain in (1.0, 2.0, 3.0)]
    found = rivals.means(group)
    assert found["gain"] == (2.0, 0.5, 1.0)
    assert found["line F1"][0] == 2.0 and found["line F1"][2] == 1.0
    assert found["line F1"][1] != found["line F1"][1]               # nan: it is unknown
    alone = rivals.means(group[:1])["gain"]
    assert alone[:2] == (1.0, 0.5) and alone[2] != alone[2]


def test_another_prompt_is_of_the_same_category_and_of_another_thing():
    rows = rivals.world.records("test", ("3d",))
    bench = object.__new__(rivals.Bench)
    bench.count = len(rows)
    bench.test = SimpleNamespace(first_prompts=lambda i: [str(k) for k in i])
    for i, other in enumerate(map(int, bench.other_prompts())):
        assert other != i and rows[other]["category"] == rows[i]["category"]
