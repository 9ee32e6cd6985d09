"""BPS's rivals start at the prior where their authors' do, learn what is theirs, are compared."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import weights
from data import load_pairs
from diffusion import Sampling
from inputs.checkpoints import load_unet
from inputs.files import fingerprint
from inputs.options import BASE
from measure import report, rivals
from studies.quality import distance_and_error, kernel_distance
from studies.rival_networks import ControlNet, FineTuned, LoRA, RivalUNet, T2IAdapter, predict_with
from unet import UNet, UNetConfig

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


def test_methods_that_are_said_to_be_of_bpss_size_are():
    base = (load_unet(BASE), 1, 4)
    sizes = {name: sum(p.numel() for p in rivals.METHODS[name](*base).parameters()
                       if p.requires_grad) for name in rivals.METHODS}
    for name, size in sizes.items():
        if name in ("controlnet-wide-random", "t2i-adapter-wide", "lora-full-rank"):
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
    for name, value in dict(STEPS=4, BATCH=2, SAVES=1, RATES=(1e-4, 1e-3), MOST_RATES=3,
                            MAIN=("t2i-adapter",)).items():
        monkeypatch.setattr(rivals, name, value)
    monkeypatch.setattr(rivals, "METHODS", {name: rivals.METHODS[name] for name in
                                            ("t2i-adapter", "lora")})
    load_pairs = rivals.load_pairs
    monkeypatch.setattr(rivals, "load_pairs", lambda *arguments: load_pairs(*arguments)[:6])
    record = tmp_path / "new" / "rivals.jsonl"

    def run_study(study):
        monkeypatch.setattr(sys, "argv", ["rivals", "--study", study, "--record", str(record),
                                          "--out", str(tmp_path / "under-way"),
                                          "--figures", str(tmp_path)])
        rivals.main()
        return capsys.readouterr().out

    printed = run_study("methods")
    table, conflicts, sweeps = printed.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [*rivals.BOUNDS, "t2i-adapter", "lora"]
    assert [row[4] for row in rows] == ["1", "1", "1", "3", "1"]
    assert [row[6] == "-" for row in rows] == [True, True, True, False, False]      # their gain
    assert len(conflicts.splitlines()) == 2 + 3         # of the base, too
    assert all(line.count(": 0.") == 3 for line in sweeps.splitlines()[2:])
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
    sha256 = fingerprint(*rivals.checkpoints.read_unet(BASE).files())
    record = rivals.Record(tmp_path / "rivals.jsonl", sha256)
    numbers = dict(gain=[0.1, 0.01], gains=[0.1, 0.2], distance=[0.2, 0.02], minutes=1.0,
                   obedience={"line F1": 0.5})
    for method, seed in (("lora", 0), ("bps", 0), ("bps", 1)):
        record.add(rivals.Job("sketch", method, 0, rivals.STEPS, 1e-3, seed), numbers)
    record.add(rivals.Job("sketch", "bps", 0, 1, 1e-3, rivals.SWEEP_SEED), dict(val=None))
    monkeypatch.setattr(rivals, "load_base", None)
    for task in ("sketch", "segmentation"):
        monkeypatch.setattr(sys, "argv", ["rivals", "--task", task, "--record", str(record.file),
                                          "--done"])
        if task == "sketch":
            rivals.main()
            table, sweeps = capsys.readouterr().out.split("\n\n")
            rows = [line.split(" | ") for line in table.splitlines()[2:]]
            assert [(row[0], row[4]) for row in rows] == [("| bps", "2"), ("| lora", "1")]
            assert "| bps | 1 | 0.001: not finite |" in sweeps
        else:
            with pytest.raises(weights.UserError, match="nothing of this study"):
                rivals.main()


@pytest.mark.parametrize("paired", [True, False])
def test_a_kernel_distances_error_is_the_deviation_over_other_draws(paired):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(60, 4, generator=generator)
    draws = []
    for _ in range(40):
        if paired:
            true = torch.randn(60, 4, generator=generator)
        draws.append(distance_and_error(0.3 + torch.randn(60, 4, generator=generator), true,
                                        paired))
    values, errors = torch.tensor(draws).T
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35)


def test_pictures_that_are_nearly_the_true_ones_are_at_no_distance_and_none_is_below_it():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(60, 4, generator=generator)
    noisy = true + 0.1 * torch.randn(60, 4, generator=generator)
    assert kernel_distance(true, true) == pytest.approx(0, abs=1e-6)
    assert abs(kernel_distance(noisy, true)) < 1e-3
    assert kernel_distance(true, true, paired=False) < -0.01            # which is for other draws
    assert kernel_distance(noisy + 0.5, true) > 0.02


def test_means_keep_errors_over_pairs_and_over_seeds_apart():
    group = [dict(gain=[gain, 0.5], distance=[0.0, 0.1], obedience={"line F1": gain})
             for gain in (1.0, 2.0, 3.0)]
    found = rivals.means(dict(enumerate(group)))
    assert found["gain"] == (2.0, 0.5, 1.0)
    assert found["line F1"][0] == 2.0 and found["line F1"][2] == 1.0
    assert found["line F1"][1] != found["line F1"][1]               # nan: it is unknown
    alone = rivals.means({0: group[0]})["gain"]
    assert alone[:2] == (1.0, 0.5) and alone[2] != alone[2]


def test_another_prompt_is_of_the_same_category_and_of_another_thing():
    rows = rivals.world.records("test", ("3d",))
    pairs = load_pairs("sketch", "test")
    bench = object.__new__(rivals.Bench)
    bench.count = len(pairs)
    bench.test = SimpleNamespace(first_prompts=lambda indices: [pairs[i].prompts[0]
                                                                for i in indices])
    of_prompt = {pair.prompts[0]: row["category"] for pair, row in zip(pairs, rows, strict=True)}
    for pair, other in zip(pairs, bench.other_prompts(), strict=True):
        assert other != pair.prompts[0] and of_prompt[other] == of_prompt[pair.prompts[0]]
        assert f", {of_prompt[other]}, " in other


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SAMPLING", Sampling(steps=1))
    monkeypatch.setattr(report, "VALIDATION_T", (500,))
    monkeypatch.setattr(rivals, "SAVES", 2)
    monkeypatch.setattr(rivals, "BATCH", 2)
    monkeypatch.setattr(rivals, "load_pairs", lambda *arguments: load_pairs(*arguments)[:4])
    base = rivals.load_base(BASE)
    job = rivals.Job("sketch", "lora", 0, 4, 1e-3, 1)
    results = []
    for name, dies in (("whole", False), ("killed", True)):
        record = rivals.Record(tmp_path / f"{name}.jsonl", "base")
        bench = rivals.Bench("sketch", base, tmp_path / name, record)
        if dies:
            save = rivals.RivalRun.save
            with monkeypatch.context() as patch:
                def die(run, *arguments):
                    save(run, *arguments)
                    raise KeyboardInterrupt

                patch.setattr(rivals.RivalRun, "save", die)
                with pytest.raises(KeyboardInterrupt):
                    bench.result(job)
            assert job.folder(tmp_path / name).exists() and not record.results
        results.append({key: value for key, value in bench.result(job).items()
                        if key != "minutes"})
        assert not job.folder(tmp_path / name).exists()
    assert results[0] == results[1] and results[0]["gain"][0] != 0


def test_a_sweep_widens_at_an_end_takes_no_rate_that_diverges_and_stops(monkeypatch):
    bench = object.__new__(rivals.Bench)
    bench.task, asked = "sketch", []

    def best_rate(loss):
        asked.clear()
        monkeypatch.setattr(bench, "result", lambda job: asked.append(job.rate) or
                            dict(val=loss(job.rate)), raising=False)
        return bench.best_rate("lora")

    assert best_rate(lambda rate: abs(rate - 1e-3)) == 1e-3
    assert asked == list(rivals.RATES)
    assert best_rate(lambda rate: None if rate > 2e-3 else -rate) == 1e-3
    lowest = best_rate(lambda rate: rate)
    assert lowest == min(asked) == pytest.approx(rivals.RATES[0] / rivals.WIDER**3)
    assert len(asked) == rivals.MOST_RATES
    assert best_rate(lambda rate: -rate) == max(asked) > rivals.RATES[-1]


def test_a_gain_beyond_another_method_has_the_error_of_the_paired_differences():
    gains = torch.linspace(0, 1, 50).tolist()
    reference = {0: dict(gains=gains), 1: dict(gains=[9.0] * 50)}       # 1 is not trained there
    group = {0: dict(gains=[gain + 0.1 + 0.01 * (-1) ** i for i, gain in enumerate(gains)])}
    difference, error = rivals.gain_beyond(group, reference)
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(0.01 / 50**0.5, rel=0.02)             # not that of the gains


def test_a_row_of_another_base_is_not_read_and_a_damaged_one_is_named(tmp_path):
    file, job = tmp_path / "rivals.jsonl", rivals.Job("sketch", "lora", 0, 1, 1e-3, 0)
    rivals.Record(file, "old").add(job, dict(val=1.0))
    assert rivals.Record(file, "old").results == {job: dict(val=1.0)}
    assert rivals.Record(file, "new").results == {}
    with file.open("a") as f:
        f.write("{")
    with pytest.raises(weights.UserError, match="line 2 is damaged"):
        rivals.Record(file, "new")
