"""BPS's rivals start at the prior where their authors' do, learn only their part, are compared."""
import json

import pytest
import torch

from data import load_pairs
from diffusion import Sampling
from inputs import checkpoints
from inputs.files import fingerprint
from inputs.options import BASE
from measure import report
from studies import rivals
from studies.quality import distance_and_error, kernel_distance
from studies.rival_networks import ControlNet, FineTuned, LoRA, RivalUNet, T2IAdapter, predict_with
from unet import UNet, UNetConfig
from weights import UserError

SMALL = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4), blocks_per_level=1,
                   context_dim=24, norm_groups=16)
JOB = rivals.Job("sketch", "lora", 0, 4, 1e-3, 0)


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


# ---- networks ------------------------------------------------------------------------------

def test_maps_are_added_once_at_their_block(unet, inputs):
    assert torch.equal(predict_with(unet, *inputs), unet(*inputs))
    # a residual of a block without attention is added once too, and reaches the skip
    r = torch.randn(2, 64, 6, 4)
    residuals = [None] * 9
    residuals[3] = r
    torch.testing.assert_close(predict_with(unet, *inputs, {3: r}), unet(*inputs, residuals))
    skips = [torch.zeros(2, *shape) for shape in
             ((32, 12, 8), (32, 12, 8), (32, 6, 4), (64, 6, 4))]
    assert torch.equal(predict_with(unet, *inputs, {}, skips), unet(*inputs))
    skips[3] = r                            # only the skip: the next block does not see it
    assert not torch.allclose(predict_with(unet, *inputs, {}, skips),
                              predict_with(unet, *inputs, {3: r}))


@pytest.mark.parametrize("make", [
    ControlNet, lambda *base: ControlNet(*base, width=1.5), FineTuned, LoRA],
    ids=["ControlNet", "wider ControlNet", "FineTuned", "LoRA"])
def test_a_rival_with_zero_layers_leaves_the_prior_when_trained(make, unet, inputs, cond):
    rival = make(unet, 1, 4)
    steered, prior = RivalUNet(unet, rival), unet(*inputs)
    trained = [p for p in rival.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    torch.testing.assert_close(steered(*inputs, rival(cond, None)), prior)
    for _ in range(3):
        optimizer.zero_grad()
        (steered(*inputs, rival(cond, None)) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    assert all(p.grad is None for p in unet.parameters())
    with torch.no_grad():
        first, second = (steered(*inputs, rival(c, None)) for c in (cond, 1 - cond))
    assert not torch.allclose(first, second)
    assert torch.equal(steered(*inputs), prior)                     # the base has not changed


def test_methods_of_bpss_size_are_of_that_size():
    base = (checkpoints.load_unet(BASE), 1, 4)
    sizes = {name: sum(p.numel() for p in rivals.METHODS[name](*base).parameters()
                       if p.requires_grad)
             for name in ("bps", "controlnet-wide-random", "t2i-adapter-wide", "lora-full-rank")}
    assert list(sizes.values()) == pytest.approx(4 * [sizes["bps"]], rel=0.1)


def test_lora_trains_only_low_rank_terms_and_the_stem(unet):
    rival = LoRA(unet, 1, 4, rank=2)
    trained = {name for name, p in rival.named_parameters() if p.requires_grad}
    assert all(".up." in name or ".down." in name or "input_blocks.0.0" in name for name in trained)
    transformers = 1 + 1 + 2                # of contracting path, middle and expansive path
    assert sum(".up." in name for name in trained) == transformers * 2 * 4


def test_an_adapter_reads_only_the_condition_and_ends_the_levels(unet, cond):
    rival = T2IAdapter(unet, 1, 4)
    maps, of_another = rival(cond, None), rival(1 - cond, None)
    assert not any(torch.allclose(a, b) for a, b in zip(maps, of_another))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 12, 8), (2, 64, 6, 4)]
    assert rival.ends == [1, 3]             # the last block of each level, before its down-sampler


# ---- studies -------------------------------------------------------------------------------

@pytest.fixture
def short(monkeypatch):
    """Trainings of four steps on six pairs, judged by two pictures."""
    monkeypatch.setattr(report, "SAMPLING", Sampling(steps=1))
    monkeypatch.setattr(report, "VALIDATION_T", (500,))
    for name, value in dict(STEPS=4, BATCH=2, SAVES=2, RATES=(1e-4, 1e-3), MOST_RATES=3,
                            MAIN=("t2i-adapter",), METHODS={
                                name: rivals.METHODS[name] for name in ("t2i-adapter", "lora")},
                            load_pairs=lambda *a: load_pairs(*a)[:6]).items():
        monkeypatch.setattr(rivals, name, value)


@pytest.mark.slow
def test_a_study_trains_once_and_then_prints_its_record(short, run_script, tmp_path, monkeypatch,
                                                        capsys):
    record = tmp_path / "new" / "rivals.jsonl"

    def run_study(study):
        run_script(rivals, "--study", study, "--record", record, "--out", tmp_path / "trainings",
                   "--figures", tmp_path)
        return capsys.readouterr().out

    printed = run_study("methods"), run_study("data")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    for method in ("t2i-adapter", "lora"):          # two rates, and one beyond the better
        assert len({row["job"]["rate"] for row in rows if row["job"]["seed"] == rivals.SWEEP_SEED
                    and row["job"]["method"] == method}) == 3
    assert not list((tmp_path / "trainings").iterdir())
    assert (tmp_path / "rivals-sketch-data.png").exists()
    monkeypatch.setattr(rivals, "train", None)                      # nothing is trained again
    assert (run_study("methods"), run_study("data")) == printed


@pytest.mark.slow
def test_a_killed_job_resumes_to_the_same_numbers(short, base, tmp_path, monkeypatch):
    def kill(training, *arguments):
        save(training, *arguments)
        raise KeyboardInterrupt

    results, save = [], rivals.RivalTraining.save
    for name in ("whole", "killed"):
        record = rivals.Record(tmp_path / f"{name}.jsonl", "base")
        bench = rivals.Bench("sketch", base, tmp_path / name, record)
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(rivals.RivalTraining, "save", kill)
                bench.result(JOB)
            assert JOB.folder(tmp_path / name).exists() and not record.results
        results.append(bench.result(JOB) | dict(minutes=None))
        assert not JOB.folder(tmp_path / name).exists()
    assert results[0] == results[1] and results[0]["gain"][0] != 0


def test_done_prints_the_record_without_training(run_script, tmp_path, monkeypatch, capsys):
    sha256 = fingerprint(*checkpoints.read_unet(BASE).files())
    record = rivals.Record(tmp_path / "rivals.jsonl", sha256)
    numbers = dict(gain=[0.1, 0.01], gains=[0.1, 0.2], distance=[0.2, 0.02], minutes=1.0,
                   obedience={"line F1": 0.5})
    for method, seed in (("lora", 0), ("bps", 0), ("bps", 1)):
        record.add(JOB._replace(method=method, seed=seed, steps=rivals.STEPS), numbers)
    record.add(JOB._replace(method="bps", steps=1, seed=rivals.SWEEP_SEED), dict(val=None))
    monkeypatch.setattr(rivals, "load_base", None)
    run_script(rivals, "--record", record.file, "--done")
    table, sweeps = capsys.readouterr().out.split("\n\n")
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [(row[0], row[4]) for row in rows] == [("| bps", "2"), ("| lora", "1")]
    assert "| bps | 1 | 0.001: not finite |" in sweeps


def test_a_row_of_another_base_is_ignored_and_a_corrupt_one_named(tmp_path):
    file = tmp_path / "rivals.jsonl"
    rivals.Record(file, "old").add(JOB, dict(val=1.0))
    assert rivals.Record(file, "old").results == {JOB: dict(val=1.0)}
    assert rivals.Record(file, "new").results == {}
    with file.open("a") as f:
        f.write("{")
    with pytest.raises(UserError, match="line 2 is corrupt. Delete it"):
        rivals.Record(file, "new")


def test_a_sweep_widens_at_its_ends_and_ignores_rates_that_diverge(monkeypatch):
    bench, tried = object.__new__(rivals.Bench), []
    bench.task = "sketch"

    def best_rate(loss):
        tried.clear()
        monkeypatch.setattr(bench, "result", lambda job: tried.append(job.rate) or
                            dict(val=loss(job.rate)), raising=False)
        return bench.best_rate("lora")

    assert best_rate(lambda rate: abs(rate - 1e-3)) == 1e-3
    assert tried == list(rivals.RATES)
    assert best_rate(lambda rate: None if rate > 2e-3 else -rate) == 1e-3
    lowest = best_rate(lambda rate: rate)
    assert lowest == min(tried) == pytest.approx(rivals.RATES[0] / rivals.WIDER**3)
    assert len(tried) == rivals.MOST_RATES
    assert best_rate(lambda rate: -rate) == max(tried) > rivals.RATES[-1]


# ---- numbers -------------------------------------------------------------------------------

@pytest.mark.parametrize("paired", [True, False])
def test_the_error_of_a_kernel_distance_is_its_deviation_over_draws(paired):
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


def test_pictures_near_the_true_ones_are_at_no_distance():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(60, 4, generator=generator)
    noisy = true + 0.1 * torch.randn(60, 4, generator=generator)
    assert kernel_distance(true, true) == pytest.approx(0, abs=1e-6)
    assert abs(kernel_distance(noisy, true)) < 1e-3
    assert kernel_distance(true, true, paired=False) < -0.01        # which is for independent draws
    assert kernel_distance(noisy + 0.5, true) > 0.02


def test_errors_over_pairs_and_deviations_over_seeds_stay_apart():
    group = [dict(gain=[gain, 0.5], distance=[0.0, 0.1], obedience={"line F1": gain})
             for gain in (1.0, 2.0, 3.0)]
    found = rivals.means(dict(enumerate(group)))
    assert found["gain"] == (2.0, 0.5, 1.0)
    assert found["line F1"] == pytest.approx((2.0, float("nan"), 1.0), nan_ok=True)
    assert rivals.means({0: group[0]})["gain"] == pytest.approx((1, 0.5, float("nan")), nan_ok=True)


def test_a_gain_beyond_another_has_the_error_of_paired_differences():
    gains = torch.linspace(0, 1, 50).tolist()
    reference = {0: dict(gains=gains), 1: dict(gains=[9.0] * 50)}       # seed 1 has no counterpart
    group = {0: dict(gains=[gain + 0.1 + 0.01 * (-1) ** i for i, gain in enumerate(gains)])}
    difference, error = rivals.gain_beyond(group, reference)
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(0.01 / 50**0.5, rel=0.02)             # not that of the gains
