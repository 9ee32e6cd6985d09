"""BPS's rivals start at the prior where their authors' do, learn only their part, are compared."""
import copy
import itertools
import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

import draws
from data import View, load_pairs
from diffusion import NoiseSchedule, Sampling
from inputs import checkpoints
from inputs.files import fingerprint
from inputs.options import BASE
from measure import report
from studies import quality, rivals
from studies import rival_networks as networks
from unet import CrossAttention, UNet, UNetConfig
from weights import UserError

SMALL = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4), blocks_per_level=1,
                   context_dim=24, norm_groups=16)
JOB = rivals.Job("sketch", "lora", "average", 0, 4, 1e-3, 0)


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
    predict = networks.predict_with
    assert torch.equal(predict(unet, *inputs), unet(*inputs))
    # a residual of a block without attention is added once too, and reaches the skip
    r = torch.randn(2, 64, 6, 4)
    residuals = [None] * 9
    residuals[3] = r
    torch.testing.assert_close(predict(unet, *inputs, {3: r}), unet(*inputs, residuals))
    skips = [torch.zeros(2, *shape) for shape in
             ((32, 12, 8), (32, 12, 8), (32, 6, 4), (64, 6, 4))]
    assert torch.equal(predict(unet, *inputs, {}, skips), unet(*inputs))
    skips[3] = r                            # only the skip: the next block does not see it
    assert not torch.allclose(predict(unet, *inputs, {}, skips), predict(unet, *inputs, {3: r}))


@pytest.mark.parametrize("make", [networks.ControlNet, networks.FineTuned, networks.LoRA,
                                  networks.OutputTerm])
def test_a_rival_starts_at_the_prior_and_trains_weights_of_its_own(make, unet, inputs, cond):
    torch.manual_seed(3)
    rival = make(unet, 1, 4)
    steered, prior = networks.RivalUNet(unet, rival), unet(*inputs)
    optimizer = torch.optim.SGD(rival.parameters(), lr=1.0)
    torch.testing.assert_close(steered(*inputs, rival(cond, None)), prior)
    for _ in range(3):
        optimizer.zero_grad()
        (steered(*inputs, rival(cond, None)) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in rival.parameters())
    addresses = {p.data_ptr() for p in unet.parameters()}
    assert not addresses & {p.data_ptr() for p in rival.parameters()}
    with torch.no_grad():
        first, second = (steered(*inputs, rival(c, None)) for c in (cond, 1 - cond))
    assert not torch.allclose(first, second)
    assert torch.equal(steered(*inputs), prior)                     # the base has not changed


def test_lora_adds_its_products_to_the_attentions_layers(unet, inputs, cond):
    rival, expected = networks.LoRA(unet, 1, 4, rank=2), copy.deepcopy(unet)
    for parameter in rival.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    expected.input_blocks[0][0] = rival.stem
    products = iter(zip(rival.up, rival.down))
    for attention in expected.modules():
        if isinstance(attention, CrossAttention):
            for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
                layer.register_forward_hook(lambda layer, h, out, product=next(products):
                                            out + h[0] @ product[1].T @ product[0].T)
    assert next(products, None) is None
    (z_t, *rest), maps = inputs, rival(cond, None)
    torch.testing.assert_close(rival.predict(unet, *inputs, maps),
                               expected(torch.cat([z_t, *maps], dim=1), *rest))


def test_an_adapter_reads_only_the_condition_and_ends_the_levels(unet, cond):
    rival = networks.T2IAdapter(unet, 1, 4)
    maps, of_another = rival(cond, None), rival(1 - cond, None)
    assert not any(torch.allclose(a, b) for a, b in zip(maps, of_another))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 12, 8), (2, 64, 6, 4)]
    assert rival.ends == [1, 3]             # the last block of each level, before its downsampler


def test_cubic_times_reach_the_noise_and_the_unet(unet, inputs, cond):
    rival, (z_t, _, context) = networks.T2IAdapter(unet, 1, 4), inputs
    Base = type("Base", (SimpleNamespace,), dict(
        _replace=lambda base, **values: Base(**vars(base) | values)))
    base = networks.base_with(Base(unet=unet, schedule=NoiseSchedule()), rival, cubic=True)
    given, cubic = torch.tensor([500, 999]), torch.tensor([875, 2])     # (1 - u^3) 1000
    torch.testing.assert_close(base.schedule.add_noise(z_t, z_t.flip(0), given),
                               NoiseSchedule().add_noise(z_t, z_t.flip(0), cubic))
    maps = rival(cond, None)
    assert torch.equal(base.unet(z_t, given, context, maps),
                       rival.predict(unet, z_t, cubic, context, maps))
    assert networks.cubic_time(torch.tensor([0])) == 999            # not 1000


# ---- trainings -----------------------------------------------------------------------------

@pytest.fixture
def short(monkeypatch):
    """Trainings of four steps on few pairs, judged by few pictures."""
    sampling = Sampling(steps=1, guidance_scale=1.0)
    for module, values in (
            (report, dict(SAMPLING=sampling, VALIDATION_T=(500,))),
            (draws, dict(SAMPLING=sampling, FIT_STEPS=1, MIN_QUALITY=-100)),
            (rivals, dict(BATCH=2, SAVES=2, WAIT=0, RATES=(1e-3,), DRAWS=12, SELECTION_PAIRS=5,
                          SEEDS=(0,), load_pairs=lambda *a: load_pairs(*a)[:6]))):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def bench(short, base, tmp_path):
    return rivals.Bench("sketch", base, tmp_path / "trainings")


@pytest.fixture
def args(tmp_path, monkeypatch):
    """Options of finish, for which a row is a Job."""
    monkeypatch.setattr(rivals, "resolve", lambda results, row: row)
    return SimpleNamespace(record=tmp_path / "a.jsonl", base_sha256="base", out=tmp_path / "out",
                           end=float("inf"))


@pytest.mark.parametrize("recipe", ["average", "best step"])
def test_the_network_that_is_measured_is_the_average(recipe, bench, tmp_path, monkeypatch):
    history, average_weights = [], rivals.RivalTraining.average_weights

    def watch(training, step):
        average_weights(training, step)
        history.append(copy.deepcopy(training.bps.state_dict()))

    monkeypatch.setattr(rivals.RivalTraining, "average_weights", watch)
    monkeypatch.setattr(rivals, "evaluate", lambda *arguments: dict(arguments=arguments))
    numbers = bench.measure(JOB._replace(recipe=recipe, pairs=4), tmp_path)
    base, _, network, _ = numbers["arguments"]
    assert base.unet.predict.__self__ is network
    for key, value in network.state_dict().items():
        steps = torch.stack([step[key] for step in history])
        expected = steps.mean(0) if recipe == "average" else steps[numbers["step"] - 1]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recipe, count, moved, drawn", [
    ("best step", 2, False, False), ("average", 2, False, False), ("copies", 14, True, False),
    ("draws", 2, False, True), ("copies and draws", 14, True, True)])
def test_a_recipe_chooses_copies_and_draws(recipe, count, moved, drawn, bench):
    rows = bench.train_rows(JOB._replace(recipe=recipe, pairs=3))
    own = [row for row in rows if row.name in {pair.name for pair in bench.pairs["train"]}]
    assert len(own) == 3 * count and len({row.name for row in own}) == 3
    assert any(row.view not in (View(), View(is_mirrored=True)) for row in own) == moved
    assert len({row.files for row in rows} - {row.files for row in own}) == 12 * drawn
    assert sum(row.weight for row in rows) == pytest.approx((1 + drawn) * len(own))


@pytest.mark.slow
def test_a_study_trains_once_and_then_prints_its_record(short, run_script, tmp_path, monkeypatch,
                                                        capsys):
    monkeypatch.setattr(rivals, "STUDIES", dict(
        methods=rivals.rows(["segmentation"], ["base-alone"], ["-"], [0], 0),
        data=rivals.rows(["sketch"], ["bps", "controlnet"], pairs=(3, 0), steps=2),
        recipes=rivals.rows(["artistic"], ["bps"], ["draws"], [4], steps=2)
        + rivals.rows(["artistic"], ["bps"], ["draws alone"], [11], steps=2)))
    record, figures = tmp_path / "new" / "rivals.jsonl", tmp_path / "new" / "figures"

    def run_study():
        run_script(rivals, "--record", record, "--out", tmp_path / "trainings")
        printed = capsys.readouterr().out
        return printed[printed.index("### "):]

    printed = run_study()
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["job"]["recipe"] for row in rows if row["job"]["method"] == "controlnet"
            and row["job"]["seed"] == rivals.SWEEP_SEED].count("half of the prompts") == 2
    assert all(row["commit"] and row["base_sha256"] for row in rows)
    assert [file.name for file in figures.iterdir()] == ["rivals.png"]
    assert not list((tmp_path / "trainings").rglob("*.safetensors"))
    monkeypatch.setattr(rivals, "train", None)                      # nothing is trained again
    assert run_study() == printed


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2])
def test_a_killed_job_resumes_to_the_same_numbers(saves, bench, args, monkeypatch, capsys):
    def kill(training, *arguments):
        save(training, *arguments)
        if len(training.rows) == saves:
            raise KeyboardInterrupt

    results, save = [], rivals.RivalTraining.save
    for args.base_sha256 in ("whole", "killed"):
        if args.base_sha256 == "killed":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(rivals.RivalTraining, "save", kill)
                rivals.finish(JOB, lambda task: bench, args)
            assert len(list(args.out.glob("*/kept.safetensors"))) == 1
        assert rivals.finish(JOB, lambda task: bench, args) and not list(args.out.iterdir())
        results.append(rivals.read_record(args.record, args.base_sha256)[JOB] | dict(minutes=None))
    assert results[0] == results[1] and results[0]["gain"][0] != 0
    assert f"resumed at step {2 * saves}" in capsys.readouterr().out


# ---- what to do next, and what is done -----------------------------------------------------

def test_a_job_that_another_process_trains_is_left_to_it(args, monkeypatch):
    bench = SimpleNamespace(measure=lambda job, out: dict(val=1.0))
    with ExitStack() as stack:
        assert rivals.claim(stack, args.out / "sketch-lora-average-0-4-0.001-0")
        assert not rivals.finish(JOB, lambda task: bench, args)
    assert rivals.finish(JOB, lambda task: bench, args)
    assert rivals.read_record(args.record, "base") == {JOB: dict(val=1.0)}
    assert rivals.finish(JOB, None, args)                           # it is done
    args.end = 0
    assert rivals.finish(JOB._replace(seed=1), None, args)          # the time is up
    args.end = float("inf")
    monkeypatch.setattr(rivals, "claim", lambda *arguments: rivals.write_record(
        args.record, "base", JOB._replace(seed=2), dict(val=1.0)) or True)
    assert rivals.finish(JOB._replace(seed=2), None, args)          # it has been done meanwhile


def test_done_prints_the_record_without_training(run_script, tmp_path, monkeypatch, capsys):
    files = itertools.chain(*checkpoints.weights_files(BASE).values())
    sha256, file = fingerprint(*files), tmp_path / "rivals.jsonl"
    numbers = dict(calibrated_gain=[0.1, 0], gains=[0.1, 0.2], strength=[1, 0],
                   distance=[0.2, 0], distances=[0.1, 0.3], minutes=1.0, parameters=10**6,
                   colours=0.9, obedience={"line F1": 0.5})
    for method, seeds in (("lora", [0]), ("bps", [0, 1])):
        job = JOB._replace(method=method, steps=rivals.STEPS)
        for rate, val in ((3e-4, None), (1e-3, 1.0), (3e-3, 2.0)):
            sweep = job._replace(rate=rate, seed=rivals.SWEEP_SEED)
            rivals.write_record(file, sha256, sweep, dict(val=val))
        for seed in seeds:
            gain = [0.1 + 0.01 * seed, 0]
            rivals.write_record(file, sha256, job._replace(seed=seed), numbers | dict(gain=gain))
    monkeypatch.setattr(rivals, "load_base", None)
    run_script(rivals, "--record", file, "--done", "--study", "methods")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| all |" in line]
    assert [(row[0], *row[4:7], row[-2]) for row in rows] == [
        ("| bps", "0.001", "2", "105 +- 7.1", "-"),
        ("| lora", "0.001", "1", "100", "+0.00 +- 0.00")]


def test_a_row_of_another_base_is_ignored_and_a_corrupt_one_named(tmp_path):
    file = tmp_path / "rivals.jsonl"
    rivals.write_record(file, "old", JOB, dict(val=1.0))
    assert rivals.read_record(file, "old") == {JOB: dict(val=1.0)}
    assert rivals.read_record(file, "new") == {}
    with file.open("a") as f:
        f.write("{")
    with pytest.raises(UserError, match="line 2 is corrupt. Delete it"):
        rivals.read_record(file, "new")


@pytest.mark.parametrize("loss, tried", [
    (lambda job: 1 + abs(job.rate - 1e-3), [1e-3, 3e-4, 3e-3]),
    (lambda job: None if job.rate > 2e-4 else 1 - job.rate, [1e-3, 3e-4, 1e-4, 3e-5]),
    (lambda job: 1 + job.rate, [1e-3, 3e-4, 1e-4, 3e-5, 1e-5]),
    (lambda job: 1 - job.rate, [1e-3, 3e-4, 3e-3, 1e-2, 3e-2])])
@pytest.mark.parametrize("own", [0.01, -0.01])
def test_a_sweep_walks_to_the_best_rate_and_then_tries_the_authors_recipe(loss, tried, own):
    results, row = {}, JOB._replace(method="controlnet", rate=0.0, pairs=12)
    while (job := rivals.resolve(results, row)).seed == rivals.SWEEP_SEED:
        assert job.pairs == 40
        results[job] = dict(val=loss(job) and loss(job) + own * (job.recipe != "average"))
    assert [job.rate for job in results] == [*tried, job.rate]
    assert job.rate == min(tried, key=lambda rate: loss(job._replace(rate=rate)) or 9)
    assert job.recipe == ("average" if own > 0 else "half of the prompts")


@pytest.mark.parametrize("changes, sweep", [
    (dict(method="bps-contracting"), dict(method="bps", recipe="average", pairs=40)),
    (dict(method="bps-flat", pairs=0), dict(method="bps-flat", recipe="average", pairs=0)),
    (dict(method="bps", recipe="draws alone", pairs=rivals.DRAWS), dict(recipe="average", pairs=0)),
    (dict(method="lora", pairs=12), dict(method="lora", pairs=40)),
    (dict(method="lora", pairs=300), dict(method="lora", pairs=0)),
    (dict(pairs=0, steps=rivals.LONGEST), dict(pairs=0, steps=rivals.LONG)),
    (dict(task="segmentation"), dict(task="sketch", method="lora"))], ids=str)
def test_a_row_has_the_rate_of_its_sweep(changes, sweep):
    job = rivals.resolve({}, JOB._replace(rate=0.0, pairs=40)._replace(**changes))
    assert job.seed == rivals.SWEEP_SEED
    assert {name: getattr(job, name) for name in sweep} == sweep


def test_a_given_rate_needs_no_sweep():
    assert all(rivals.resolve({}, row) == row for row in rivals.STUDIES["rates"])


@pytest.mark.slow
def test_draws_alone_train_on_all_of_them(bench):
    rows = bench.train_rows(JOB._replace(recipe="draws alone", pairs=10))
    assert len({row.name for row in rows}) == 10


def test_the_first_pairs_of_each_test_set_are_measured(bench, monkeypatch):
    monkeypatch.setattr(rivals, "MEASURED", dict(test=3, unseen=2))
    measured = [[pair.name for pair in cache.pairs]
                for cache in rivals.Bench("sketch", bench.base, bench.root).tests]
    assert measured == [[pair.name for pair in load_pairs("sketch", split)[:count]]
                        for split, count in rivals.MEASURED.items()]


@pytest.mark.parametrize("changes, saves", [
    (dict(pairs=4), [4]), (dict(pairs=4, recipe="best step"), [2, 4]), (dict(pairs=0), [2, 4]),
    (dict(pairs=0, seed=rivals.SWEEP_SEED), [4])], ids=str)
def test_only_what_picks_its_best_step_is_validated_on_the_way(changes, saves, bench, tmp_path,
                                                               monkeypatch):
    steps, save = [], rivals.RivalTraining.save
    monkeypatch.setattr(rivals, "evaluate", lambda *arguments: {})
    monkeypatch.setattr(rivals.RivalTraining, "save", lambda training, step, *rest: (
        steps.append(step), save(training, step, *rest)))
    bench.measure(JOB._replace(**changes), tmp_path)
    assert steps == saves


# ---- numbers -------------------------------------------------------------------------------

def test_the_shares_in_a_kernel_distance_are_those_of_the_jackknife():
    true, drawn = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    width = torch.pdist(true).median()                      # stays that of all pairs

    def distance(rows):
        def kernel(a, b):
            return torch.exp(-(a - b).square().sum() / width**2 / 2)

        return torch.stack([
            kernel(drawn[i], drawn[j]) + kernel(true[i], true[j]) - 2 * kernel(drawn[i], true[j])
            for i in rows for j in rows if i != j]).mean()

    expected = [9 * distance(range(9)) - 8 * distance([i for i in range(9) if i != left_out])
                for left_out in range(9)]
    shares = quality.distance_shares(drawn, true)
    torch.testing.assert_close(shares, torch.stack(expected))
    torch.testing.assert_close(shares.mean(), distance(range(9)))


def test_errors_of_distances_are_their_deviations_over_draws():
    generator, numbers = torch.Generator().manual_seed(0), []
    for _ in range(40):
        true, noise, other_noise = torch.randn(3, 60, 4, generator=generator)
        shares = [quality.distance_shares(drawn, true)
                  for drawn in (0.3 + noise, 0.4 + noise + 0.1 * other_noise)]
        numbers.append([*report.mean_and_error(shares[0]), *quality.paired_difference(*shares)])
    distance, error, difference, paired_error = torch.tensor(numbers).T
    assert error.mean().item() == pytest.approx(distance.std().item(), rel=0.35)
    assert paired_error.mean().item() == pytest.approx(difference.std().item(), rel=0.35)
    assert paired_error.mean() < error.mean() / 2           # what both share has cancelled


def test_what_is_beyond_bps_is_paired_over_pairs_and_seeds(args):
    gains = torch.linspace(0, 1, 50).tolist()
    bps = JOB._replace(method="bps", rate=0.0)
    better = [gain + 0.1 + 0.01 * (-1) ** i for i, gain in enumerate(gains)]
    groups = {JOB: {0: dict(gains=better)}, bps._replace(steps=7): {0: dict(gains=50 * [5.0])},
              bps: {0: dict(gains=gains), 1: dict(gains=50 * [9.0])}}
    error = 1000 * 0.01 / 49**0.5                           # not that of the gains
    assert rivals.beyond_bps(groups, JOB, "gains") == f"+100.00 +- {error:.2f}"
    assert rivals.beyond_bps(groups, bps, "gains") == "-"
