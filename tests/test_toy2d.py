"""The plane: closed forms, networks at the start, measurements, and very short runs."""
import json
import math
import sys
from unittest.mock import Mock

import pytest
import torch

import toy2d
from studies import toy
from toy2d import SCHEDULE, World, energy_distance
from unet import timestep_embedding

B, T = 7, (5, 300, 700)


@pytest.fixture
def world():
    """The pinwheel in float64."""
    world = toy2d.pinwheel()
    return World(world.means.double(), world.arms, world.places.double())


@pytest.fixture(scope="module")
def held_out():
    return toy2d.HeldOut(toy2d.pinwheel(), 0)


# ---- the world -----------------------------------------------------------------------------

@pytest.mark.parametrize("t", T)
@pytest.mark.parametrize("conditional", (False, True))
def test_the_exact_denoiser_is_the_gradient_of_the_log_density(world, t, conditional):
    generator = torch.Generator().manual_seed(t)
    z_0, cond = world.sample_labels(B, generator)
    log_p_cond = world.log_p_cond(cond) if conditional else 0.0
    alpha, sigma = SCHEDULE.alpha_sigma(t, z_0)
    z_t = alpha * z_0 + sigma * torch.randn(z_0.shape, generator=generator, dtype=z_0.dtype)
    z_t.requires_grad_()
    score, = torch.autograd.grad(world.log_p(z_t, alpha, sigma, log_p_cond).sum(), z_t)
    torch.testing.assert_close(world.eps(z_t, alpha, sigma, log_p_cond), -sigma * score)


def test_the_density_integrates_to_one(world):
    side = torch.linspace(-5, 5, 400, dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha_sigma(200, world.means)
    p = world.log_p(torch.cartesian_prod(side, side), alpha, sigma).exp()
    assert p.sum().item() * (side[1] - side[0]).item() ** 2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("t", T)
def test_steering_is_posterior_minus_prior_even_far_from_the_arm_in_float32(t):
    world = toy2d.pinwheel()
    points = torch.cartesian_prod(*2 * [torch.linspace(-2.2, 2.2, 19)])
    alpha, sigma = SCHEDULE.alpha_sigma(t, points)
    log_p_cond = world.log_p_cond(world.sample_labels(1, torch.Generator().manual_seed(0))[1])
    difference = world.eps(points, alpha, sigma, log_p_cond) - world.eps(points, alpha, sigma)
    torch.testing.assert_close(world.steering(points, alpha, sigma, log_p_cond), difference,
                               rtol=1e-3, atol=1e-3)


def test_conditions_are_as_likely_as_log_p_cond_claims(world):
    one_per_arm = World(world.means[3::12], world.arms[3::12], world.places[3::12] + 0.5)
    _, cond = one_per_arm.sample_labels(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(cond[:, :5].argmax(1), torch.arange(20_000) % 5)         # arms in turn
    errors = cond[:, 5] - one_per_arm.places[0]
    assert errors.mean().item() == pytest.approx(0, abs=0.01)
    assert errors.std().item() == pytest.approx(0.2, rel=0.03)
    normal = torch.distributions.Normal(world.places, 0.2).log_prob(cond[:, 5:])
    right_arm = cond[:, :5].argmax(1)[:, None] == world.arms
    expected = normal.masked_fill(~right_arm, -math.inf).softmax(1)
    torch.testing.assert_close(world.log_p_cond(cond).softmax(1), expected)


# ---- the likelihood ------------------------------------------------------------------------

def exact_likelihood(world):
    """What toy2d.fit_likelihood returns, with the first two moments of the exact p(c | z)."""
    def fitted(z):
        p_k = world.log_components(z, *toy.CLEAN).softmax(1)
        place = p_k @ world.places
        error = (p_k @ world.places**2 - place**2 + toy2d.PLACE_ERROR**2).sqrt()
        return p_k @ torch.nn.functional.one_hot(world.arms, 5).to(z), place, error
    return fitted


def test_draws_with_exact_conditions_have_the_law_of_labels(monkeypatch):
    world, n = toy2d.pinwheel(), 20_000
    monkeypatch.setattr(toy2d, "DRAWS", n)
    monkeypatch.setattr(toy2d, "fit_likelihood", lambda *labels: exact_likelihood(world))
    z_0, cond = toy2d.draw_and_label(toy.exact_denoiser(world), (None, None), 0)
    for arm in range(5):
        drawn = torch.cat([z_0, cond[:, 5:]], 1)[cond[:, arm] == 1]
        k = world.arms == arm
        known = torch.cat([world.means[k], world.places[k, None]], 1)       # a component each
        noise = torch.tensor([world.std, world.std, toy2d.PLACE_ERROR]).square().diag()
        assert len(drawn) / n == pytest.approx(0.2, abs=0.012)
        torch.testing.assert_close(drawn.mean(0), known.mean(0), atol=0.03, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), known.T.cov(correction=0) + noise, atol=0.02,
                                   rtol=0)


def test_the_fitted_likelihood_converges_to_the_exact_one():
    world = toy2d.pinwheel()
    z_0, cond = world.sample_labels(1000, torch.Generator().manual_seed(1))
    exact = toy.exact_bits(world, z_0, cond, "both") - math.log2(toy2d.PLACE_ERROR)
    normal = world.log_p_cond(cond).logsumexp(1) - math.log(len(world.means))     # log p(c)
    exact = exact + (normal / math.log(2)) - math.log2(math.sqrt(2 * math.pi))
    bits = []
    for n in (50, 400, 2000):
        fitted = toy2d.fit_likelihood(*toy2d.sample_labels(world, n, 0))
        log_p = torch.stack([toy.log_likelihood(fitted, z[None], c)[0] for z, c in zip(z_0, cond)])
        bits.append((exact - log_p / math.log(2)).mean().item())
    assert bits[0] > bits[1] > bits[2] > 0
    assert bits[2] < 0.04


def test_the_bound_with_an_exact_likelihood_loses_nothing(monkeypatch, held_out):
    monkeypatch.setattr(toy2d, "fit_likelihood", lambda *labels: exact_likelihood(held_out.world))
    points, bits = toy.bound(held_out, (None, None))
    assert held_out.scores(points)["energy"] == pytest.approx(0, abs=2e-3)
    assert bits == pytest.approx(0, abs=0.02)


def test_a_kernel_density_of_more_labels_is_closer():
    world = toy2d.pinwheel()
    held_out = toy2d.HeldOut(world, 0)
    few, many = (toy.density(held_out, toy2d.sample_labels(world, n, 0)) for n in (12, 400))
    energies = [held_out.scores(points)["energy"] for points, _ in (few, many)]
    assert energies[0] > 10 * energies[1] > 0 and few[1] > 4 * many[1] > 0


# ---- bits lost -----------------------------------------------------------------------------

def test_a_wrong_likelihood_loses_the_divergence_of_its_density(held_out):
    world = held_out.world
    log_p_cond = toy.log_p_cond(world, held_out.cond, "arm") + torch.distributions.Normal(
        world.places, 2 * toy2d.PLACE_ERROR).log_prob(held_out.cond[:, 5:])
    log_p_c = log_p_cond.logsumexp(1) - math.log(len(world.means))
    log_density = torch.stack([world.log_p(points, *toy.CLEAN, row)
                               for points, row in zip(held_out.reference, log_p_cond)])
    known = toy.excess_bits(held_out, log_density - log_p_c[:, None])
    denoise = toy.exact_denoiser(world, log_p_cond[held_out.rows])
    lost = held_out.bits_lost(lambda z_t, t, _: denoise(z_t, t)).sum().item()
    assert known > 0.05 and lost == pytest.approx(known, rel=0.03)


# ---- the networks --------------------------------------------------------------------------

def test_the_time_embedding_is_the_big_models():
    unet, t = toy2d.ToyUNet(), torch.tensor([0, 1, 500, 999])
    expected = unet.time_embed(timestep_embedding(t, toy2d.TIME_DIM))
    torch.testing.assert_close(unet.time_embedding(t), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("port_weights", toy.MODES.values())
def test_a_steered_network_is_the_prior_until_it_is_trained(port_weights):
    torch.manual_seed(0)
    unet, bps = toy2d.ToyUNet(), toy2d.ToyBPS(port_weights)
    z_t, t, cond = torch.randn(B, 2), torch.arange(B) * 100, torch.rand(B, 6)
    eps = toy2d.steer(unet, bps)(z_t, t, cond)
    assert torch.equal(eps, unet(z_t, t))
    eps.square().sum().backward()
    for weight, port in zip(port_weights, bps.ports):
        assert (port.weight.grad is not None and port.weight.grad.any()) == bool(weight)
        torch.nn.init.normal_(port.weight)
    assert not torch.equal(toy2d.steer(unet, bps)(z_t, t, cond), eps)


@pytest.mark.parametrize("blind", (True, False))
def test_an_output_term_starts_at_zero_and_sees_z_t_unless_blind(blind):
    torch.manual_seed(0)
    term, t_emb, cond = toy.OutputTerm(blind), torch.randn(B, 64), torch.rand(B, 6)
    z_t, other = torch.randn(2, B, 2)
    assert not term(z_t, t_emb, cond).any()
    torch.nn.init.normal_(term.out.weight)
    assert torch.equal(term(z_t, t_emb, cond), term(other, t_emb, cond)) == blind


@pytest.mark.parametrize("method", ("scratch", "labels", "draws", "tuned", "CP", "output"))
def test_only_scratch_is_new_and_only_tuned_changes_a_copy(monkeypatch, method):
    torch.manual_seed(5)
    prior = toy2d.ToyUNet().requires_grad_(False)
    monkeypatch.setattr(toy2d, "train", Mock())
    monkeypatch.setattr(toy2d, "DRAWS", 40)
    labels = toy2d.sample_labels(toy2d.pinwheel(), 5, 0)
    eps = toy.learn(toy.Run(method, 5, 1, 1e-3, 0), prior, labels)
    z_t, t = torch.randn(B, 2), torch.arange(B) * 100
    untrained = eps(z_t, t, labels[1][:1].expand(B, 6))
    assert torch.equal(untrained, prior(z_t, t)) == (method != "scratch")
    _, parameters, (z_0, _), *_ = toy2d.train.call_args.args
    trains_a_unet = (2, 96) in [p.shape for p in parameters] and method != "output"
    assert trains_a_unet == (method in ("scratch", "tuned"))
    assert not any(p is q for p in parameters for q in prior.parameters())
    assert len(z_0) == (40 if method == "draws" else 5)


# ---- measurements --------------------------------------------------------------------------

def test_energy_distance_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, generator=generator), torch.randn(4, 2, generator=generator)

    def mean(a, b, pairs):
        return sum((p - q).norm() for p in a for q in b) / pairs

    expected = 2 * mean(x, y, 24) - mean(x, x, 30) - mean(y, y, 12)
    assert energy_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_true_points_get_full_scores_and_other_arms_none(held_out):
    scores = held_out.scores(held_out.independent)
    assert scores["accuracy"] > 0.99 and abs(scores["energy"]) < 2e-3
    assert scores["spread"] == pytest.approx(1, abs=0.05)
    # the arms go in turn
    assert held_out.scores(held_out.independent.roll(1, 0))["accuracy"] < 0.01


def test_a_gaussian_is_drawn_as_predicted():
    for row in toy.gaussian_rows():
        name, wanted, predicted, drawn = row.values()
        assert drawn == pytest.approx(predicted, rel=0.04), row
        exact = name in ("one reading, s = 0", "one reading, s = 1",
                         "a reading of each coordinate")
        assert (predicted == pytest.approx(wanted)) == exact, row


@pytest.mark.slow
def test_a_tempered_law_is_the_small_space_at_strength_1(held_out):
    points = toy.law_points(held_out, dict(both=1.0))
    assert energy_distance(points, held_out.reference).abs().mean() < 0.003
    # the square root of a normal likelihood is one of sqrt(2) times the error
    reading = torch.distributions.Normal(held_out.world.places, toy2d.PLACE_ERROR * 2**0.5)
    for i, points in enumerate(toy.law_points(held_out, dict(place=0.5))[:5]):
        wide = held_out.world.sample(4000, torch.Generator().manual_seed(i),
                                     reading.log_prob(held_out.cond[i, 5]))
        assert abs(energy_distance(points, wide)) < 4e-3


@pytest.mark.parametrize("strength", (0.0, 1.0))
def test_strength_0_draws_the_prior_and_1_the_posterior(monkeypatch, held_out, strength):
    monkeypatch.setattr(toy2d, "STEPS", 5)
    prior, posteriors = denoisers = toy.exact_denoisers(held_out)
    denoise = posteriors["arm"] if strength else prior
    expected = held_out.draw(lambda z_t, t, _: denoise(z_t, t))
    drawn = toy.draw_law(held_out, denoisers, dict(arm=strength))
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_short_training_steers():
    world = toy2d.pinwheel()
    prior, held_out = toy2d.train_prior(world, 0, effort=0.1), toy2d.HeldOut(world, 0)
    eps = toy2d.learn("labels", prior, toy2d.sample_labels(world, 100, 0), 310, 3e-4, 0)
    steered, alone = (held_out.scores(held_out.draw(denoise))
                      for denoise in (eps, lambda z_t, t, _: prior(z_t, t)))
    assert alone["accuracy"] < 0.3 and alone["energy"] > 1
    assert steered["accuracy"] > 0.85 and steered["energy"] < 0.2


# ---- runs ----------------------------------------------------------------------------------

@pytest.fixture
def run(monkeypatch):
    """A function that runs a script's main in a very short form."""
    short = {
        toy2d: dict(SAMPLES=20, STEPS=5, CONDITIONS=5, DRAWS=50, PRIOR_SAMPLES=1000,
                    BITS_T=torch.tensor([0, 200, 400, 600, 999])),
        toy: dict(SIZES=(100,), ROBUSTNESS_SIZES=(12, 25), MODES_SIZES=(12,), RATES=(3e-4,),
                  MODES_SEEDS=(0, 1), SEEDS=(0, 1), STEPS=(160, 625), BITS_POINTS=50,
                  GAUSSIAN_STEPS=10, GAUSSIAN_SAMPLES=100, STRENGTHS=(1,),
                  LAWS=[dict(arm=1), dict(place=1), dict(arm=1, place=1)])}
    for module, values in short.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    def main(module, out, *arguments):
        monkeypatch.setattr(sys, "argv", ["toy", *arguments, "--effort=0.001", f"--out={out}"])
        module.main()

    return main


@pytest.mark.parametrize("arguments, names", (
    ((), {"toy2d.md", "toy2d.png"}),
    (("prior",), {"prior.md", "prior.png", "prior-chosen.md", "runs.jsonl"}),
    (("modes",), {"modes.md", "modes.png", "runs.jsonl"}),
    (("bits",), {"bits.md", "sources.md", "steering.png"}),
    (("algebra",), {"algebra.md", "algebra.png", "gaussian.md"})))
def test_a_run_writes_its_tables_and_figures(run, tmp_path, arguments, names):
    run(toy if arguments else toy2d, tmp_path, *arguments)
    assert {file.name for file in tmp_path.iterdir()} == names
    assert not any("nan" in file.read_text() for file in tmp_path.glob("*.md"))


def test_a_study_resumes_from_its_record(run, tmp_path, monkeypatch):
    run(toy, tmp_path, "robustness")
    record, table = tmp_path / "runs.jsonl", (tmp_path / "robustness.md").read_text()
    assert "nan" not in table and (tmp_path / "robustness.png").is_file()
    *kept, last = record.read_text().splitlines()
    record.write_text("".join(f"{line}\n" for line in kept))
    scores = Mock(return_value=json.loads(last)["scores"])
    monkeypatch.setattr(toy.Lab, "measure", scores)
    run(toy, tmp_path, "robustness")
    (measured,), _ = scores.call_args
    assert scores.call_count == 1 and measured._asdict().items() <= json.loads(last).items()
    assert (tmp_path / "robustness.md").read_text() == table


@pytest.mark.parametrize("effort, measured", ((0.5, 0), (1.0, 1)))
def test_a_recorded_run_is_not_repeated_at_its_own_effort(tmp_path, monkeypatch, effort, measured):
    line = dict(method="labels", n=12, steps=160, lr=3e-4, seed=0, effort=0.5, scores=dict(bits=7))
    (tmp_path / "runs.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr(toy.Lab, "measure", Mock(return_value=dict(bits=8)))
    lab = toy.Lab(tmp_path, effort)
    assert lab.scores(toy.Run("labels", 12, 160, 3e-4, 0, lab.effort)) == dict(bits=7 + measured)


def test_the_best_run_has_the_least_score_on_a_seed_of_its_own(tmp_path, monkeypatch):
    lab = toy.Lab(tmp_path, 1.0)
    monkeypatch.setattr(lab, "scores", lambda run: dict(energy=(run.seed != toy.GRID_SEED) + abs(
        run.lr - 1e-3) + abs(run.steps - 625)))
    assert lab.best("energy", "tuned", 12) == toy.Run("tuned", 12, 625, 1e-3, toy.GRID_SEED)


@pytest.mark.slow
def test_the_same_seed_prints_the_same_table_and_another_does_not(run, tmp_path):
    tables = []
    for i, seed in enumerate(("1", "1", "2")):
        run(toy2d, tmp_path / str(i), "--seed", seed)
        tables.append((tmp_path / str(i) / "toy2d.md").read_text())
    assert tables[0] == tables[1] != tables[2]


@pytest.mark.parametrize("arguments, words", (
    (["rates"], "rates"), (["--effort", "1.5"], "(0, 1], got 1.5"),
    (["--seed", "-1"], "--seed must be in [0, 2147483647], got -1"),
    (["--out", f"{__file__}/inside"], "must be a folder to write to")))
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", *arguments])
    with pytest.raises(SystemExit) as stop:
        toy2d.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "error: " in printed and words in printed
    assert printed.count("\n") == 1
