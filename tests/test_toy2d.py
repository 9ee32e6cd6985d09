"""The toy's closed forms, its networks at the start, its measurements, and short runs of it."""
import functools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import toy2d
from bps import posterior
from measure import plots, toy
from toy2d import KINDS, World, energy_distance, signal_and_noise, sliced_wasserstein

B, T = 7, (5, 300, 700)


@pytest.fixture
def world():
    """The pinwheel in float64."""
    return in_float64(toy2d.pinwheel())


def in_float64(world):
    """Returns the world with float64 numbers."""
    return World(world.means.double(), world.arms, world.places.double())


def some_points(world, t):
    """Returns z_t (B, 2), a and s (1, 1) at t, and log_p_cond (B, K) of B conditions."""
    generator = torch.Generator().manual_seed(t)
    z_0, cond = world.draw_labelled(B, generator)
    alpha, sigma = signal_and_noise(t, z_0)
    z_t = alpha * z_0 + sigma * torch.randn(z_0.shape, generator=generator, dtype=z_0.dtype)
    return z_t, alpha, sigma, world.log_p_cond(cond)


@pytest.mark.parametrize("t", T)
@pytest.mark.parametrize("conditional", (False, True))
def test_the_exact_denoiser_is_the_gradient_of_the_log_density(world, t, conditional):
    z_t, alpha, sigma, log_p_cond = some_points(world, t)
    log_p_cond = log_p_cond if conditional else 0.0
    z_t.requires_grad_()
    score, = torch.autograd.grad(world.log_p(z_t, alpha, sigma, log_p_cond).sum(), z_t)
    torch.testing.assert_close(world.eps(z_t, alpha, sigma, log_p_cond), -sigma * score)


def test_the_density_integrates_to_one(world):
    side = torch.linspace(-5, 5, 400, dtype=torch.float64)
    alpha, sigma = signal_and_noise(200, world.means)
    p = world.log_p(torch.cartesian_prod(side, side), alpha, sigma).exp()
    assert p.sum().item() * (side[1] - side[0]).item() ** 2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("t", T)
def test_steering_is_the_posterior_minus_the_prior_and_w_has_mean_one(world, t):
    z_t, alpha, sigma, log_p_cond = some_points(world, t)
    difference = world.eps(z_t, alpha, sigma, log_p_cond) - world.eps(z_t, alpha, sigma)
    torch.testing.assert_close(world.steering(z_t, alpha, sigma, log_p_cond), difference)
    # w_k = p(c_add | k) / p_t(c_add | z_t)
    log_p_c = world.log_p(z_t, alpha, sigma, log_p_cond) - world.log_p(z_t, alpha, sigma)
    w = (log_p_cond - log_p_c[:, None]).exp()
    p_k = world.log_components(z_t, alpha, sigma).softmax(1)
    torch.testing.assert_close((p_k * w).sum(1), torch.ones(B).double())


def test_steering_is_finite_in_float32_where_one_component_is_all_that_is_left():
    world = toy2d.pinwheel()
    points = torch.cartesian_prod(*2 * [torch.linspace(-2.2, 2.2, 19)])
    alpha, sigma = signal_and_noise(5, points)
    log_p_cond = world.log_p_cond(world.draw_labelled(1, torch.Generator().manual_seed(0))[1])
    difference = world.eps(points, alpha, sigma, log_p_cond) - world.eps(points, alpha, sigma)
    torch.testing.assert_close(world.steering(points, alpha, sigma, log_p_cond), difference,
                               rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_steering_is_the_covariance_of_the_noise_and_w_by_monte_carlo(world):
    # z_0 given z_t, by importance from the large space; what c_add says is decided by z_0 alone
    z_t, alpha, sigma, log_p_cond = some_points(world, 700)
    z_0, _ = world.draw(200_000, torch.Generator().manual_seed(0))
    clean = [value.double() for value in toy2d.CLEAN]
    for i in range(3):
        weight = (-(z_t[i] - alpha * z_0).square().sum(1) / (2 * sigma.item() ** 2)).softmax(0)
        noise = (z_t[i] - alpha * z_0) / sigma
        log_p_c = world.log_p(z_0, *clean, log_p_cond[i]) - world.log_p(z_0, *clean)
        w = log_p_c.exp() / (weight * log_p_c.exp()).sum()
        covariance = (weight * (w - 1)) @ noise
        exact = world.steering(z_t[i:i + 1], alpha, sigma, log_p_cond[i:i + 1])[0]
        torch.testing.assert_close(covariance, exact, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("t", T)
def test_a_condition_that_says_nothing_steers_nothing(world, t):
    z_t, alpha, sigma, log_p_cond = some_points(world, t)
    nothing = torch.full_like(log_p_cond, -0.7)
    torch.testing.assert_close(world.steering(z_t, alpha, sigma, nothing),
                               torch.zeros(B, 2).double())
    assert world.steering(z_t, alpha, sigma, log_p_cond).abs().max() > 0.01


def test_ddim_with_the_exact_denoiser_reaches_the_floor():
    world = toy2d.pinwheel()
    generator = torch.Generator().manual_seed(1)
    (x, _), (y, _) = world.draw(4000, generator), world.draw(4000, generator)
    drawn = toy2d.draw(world.denoiser(), 4000, seed=2)
    assert abs(energy_distance(x, y)) < 1e-3
    assert abs(energy_distance(drawn, y)) < 1e-3
    assert energy_distance(drawn + 0.1, y) > 5e-3           # what a shift by a component would be


def test_the_bayes_classifier_names_the_arm_a_point_was_drawn_from():
    world = toy2d.pinwheel()
    z_0, k = world.draw(2000, torch.Generator().manual_seed(0))
    assert (world.classify(z_0) == world.arms[k]).float().mean() > 0.995


def test_a_reading_of_the_place_errs_by_as_much_as_its_likelihood_says(world):
    k = torch.arange(20_000) % len(world.means)
    cond = world.label(k, torch.Generator().manual_seed(0))
    error = cond[:, 5] - world.places[k]
    assert error.std().item() == pytest.approx(toy2d.PLACE_ERROR, rel=0.03)
    log_normal = torch.distributions.Normal(world.places, toy2d.PLACE_ERROR).log_prob(cond[:, 5:])
    log_p_cond = world.log_p_cond(cond, "place")
    torch.testing.assert_close(log_p_cond.softmax(1), log_normal.softmax(1))
    assert torch.equal(cond[:, :5].argmax(1), world.arms[k])


def test_a_bps_sees_only_its_own_part_of_a_condition():
    torch.manual_seed(0)
    cond, t_emb = torch.rand(B, 6), torch.randn(B, 2 * toy2d.TIME_DIM)
    for kind, unseen in (("arm", slice(5, 6)), ("place", slice(0, 5))):
        bps = toy2d.ToyBPS(kind)
        torch.nn.init.normal_(bps.ports[0].weight)
        changed, other = cond.clone(), cond.clone()
        changed[:, unseen] += 1
        other[:, toy2d.KINDS[kind]] += 1
        same, different = (bps(each, t_emb)[0] for each in (changed, other))
        assert torch.equal(same, bps(cond, t_emb)[0]) and not torch.equal(different, same)


def test_composition_is_exact_where_the_conditions_speak_of_independent_coordinates(world):
    apart = []
    for each in (in_float64(toy.grid()), world):
        generator = torch.Generator().manual_seed(0)
        z_0, cond = each.draw_labelled(B, generator)
        alpha, sigma = signal_and_noise(500, z_0)
        z_t = alpha * z_0 + sigma
        eps = {kind: each.eps(z_t, alpha, sigma, each.log_p_cond(cond, kind)) for kind in KINDS}
        composed = posterior(each.eps(z_t, alpha, sigma), [eps["arm"], eps["place"]], [1.0, 1.0])
        apart.append((composed - eps["both"]).abs().max().item())
    assert apart[0] < 1e-12 and apart[1] > 0.01


@pytest.mark.slow
def test_a_tempered_law_is_the_large_space_at_0_and_the_small_one_at_1():
    world = toy2d.pinwheel()
    held_out = toy2d.HeldOut(world, 0)
    laws = toy.Laws(held_out)
    large, _ = world.draw(2000, torch.Generator().manual_seed(5))
    assert energy_distance(laws.draw(dict(both=0.0)), large).abs().max() < 0.03
    assert energy_distance(laws.draw(dict(both=1.0)), held_out.true).abs().mean() < 0.003
    # the square root of a normal likelihood is one of sqrt(2) times the error
    reading = torch.distributions.Normal(world.places, toy2d.PLACE_ERROR * 2**0.5)
    for i, points in enumerate(laws.draw(dict(place=0.5))[:5]):
        wide, _ = world.draw(4000, torch.Generator().manual_seed(i),
                             reading.log_prob(held_out.cond[i, 5]))
        assert abs(energy_distance(points, wide)) < 4e-3


def test_strength_0_draws_the_prior_and_strength_1_the_posterior(monkeypatch):
    monkeypatch.setattr(toy2d, "STEPS", 5)
    held_out = toy2d.HeldOut(toy2d.pinwheel(), 0)
    prior, posteriors = denoisers = toy.exact_denoisers(held_out)
    for s, denoise in ((0.0, prior), (1.0, posteriors["arm"])):
        expected = held_out.draw(lambda z_t, t, _: denoise(z_t, t))
        torch.testing.assert_close(toy.draw_law(held_out, denoisers, dict(arm=s)), expected,
                                   atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("port_weights", toy.MODES.values())
def test_a_steered_network_is_the_prior_until_it_is_trained(port_weights):
    torch.manual_seed(0)
    unet, bps = toy2d.ToyUNet(), toy2d.ToyBPS(port_weights=port_weights)
    z_t, t, cond = torch.randn(B, 2), torch.arange(B) * 100, torch.rand(B, 6)
    eps = toy2d.steer(unet, bps)(z_t, t, cond)
    assert torch.equal(eps, unet(z_t, t))
    eps.square().sum().backward()
    for weight, port in zip(port_weights, bps.ports):
        assert (port.weight.grad is not None and port.weight.grad.any()) == bool(weight)
        torch.nn.init.normal_(port.weight)
    assert not torch.equal(toy2d.steer(unet, bps)(z_t, t, cond), eps)


def test_a_time_blind_steering_gives_the_same_residuals_at_all_times():
    torch.manual_seed(0)
    for blind in (False, True):
        bps = toy2d.ToyBPS(time_blind=blind)
        for port in bps.ports:
            torch.nn.init.normal_(port.weight)
        cond = torch.full((1, 6), 0.5)
        early, late = (bps(cond, t_emb)[0] for t_emb in torch.randn(2, 1, 64))
        assert torch.equal(early, late) == blind


def test_a_line_is_drawn_where_its_numbers_are_and_no_name_on_another():
    figure = plots.Figure(1, [""])
    for y, name in (((1.0, 0.5), "falls"), ((0.0, 0.5), "rises")):
        figure.axes[0].line((1, 10), y, name)
    sheet, left, top = NotedSheet(), 16, plots.TOP
    figure.axes[0].paint(sheet, left, top)
    high, low, middle = (sheet.dots[i][1] for i in (0, 2, 1))
    assert high < middle == sheet.dots[3][1] < low
    assert middle == pytest.approx((high + low) / 2)
    (x, y), (other_x, other_y) = sheet.words["falls"], sheet.words["rises"]
    assert x == other_x > sheet.dots[1][0] and abs(y - other_y) >= 11


def test_panels_with_shared_limits_draw_one_number_at_one_height_and_bands_around_it():
    figure, sheet = plots.Figure(2, ["", ""]), NotedSheet()
    figure.axes[0].line((1, 10), (1.0, 2.0), "small", band=0.5)
    figure.axes[1].line((1, 10), (1.0, 8.0), "large")
    figure.axes[1].line((1,), (1.0,), "short")
    figure.share_limits((0, 1))
    for axes in figure.axes:
        axes.paint(sheet, 0, 0)
    small, _, large, _, short = (y for _, y in sheet.dots)
    assert small == large == short
    band, flat, _ = sheet.polygons
    (_, lower), (_, upper) = band[0], band[-1]
    assert lower > small > upper and lower - small == pytest.approx(small - upper)
    assert flat[0] == flat[-1]
    assert "8" in sheet.words and "0" in sheet.words


@pytest.mark.parametrize("extent", (0.0071, 1.0, 1.3, 2.1, 3.9, 7.0, 9.9))
def test_a_step_between_ticks_is_round_and_goes_three_to_eight_times_into_an_extent(extent):
    step = plots.round_step(extent)
    assert 3 <= extent / step <= 8
    assert f"{step:e}"[0] in "125"


def test_dots_and_arrows_lie_where_their_coordinates_say():
    figure, sheet = plots.Figure(1, [""]), NotedSheet()
    figure.axes[0].dots({0: [[0.0, 0.0], [1.3, 0.0], [0.0, 1.3], [3.0, 0.0]]})
    figure.axes[0].arrows([[0.0, 0.0]], [[0.0, 1.3]])
    figure.axes[0].paint(sheet, 0, 0)
    quarter = plots.SIDE / 4
    assert sheet.dots == [(2 * quarter, 2 * quarter), (3 * quarter, 2 * quarter),
                        (2 * quarter, quarter)]        # up is up; what is outside is not drawn
    assert sheet.lines == [[(2 * quarter, 2 * quarter), (2 * quarter, quarter)]]


class NotedSheet(plots.Sheet):
    """Notes what it is told to draw."""

    def __init__(self):
        self.dots, self.words, self.lines, self.polygons = [], {}, [], []

    def disc(self, x, y, radius, color):
        self.dots.append((x, y))

    def text(self, x, y, words, *style):
        self.words[words] = x, y

    def line(self, points, color, width=1):
        self.lines.append(points)

    def polygon(self, points, color):
        self.polygons.append(points)

    def rectangle(self, *_, **__):
        pass


def test_energy_and_sliced_wasserstein_distance_match_what_is_known():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, generator=generator), torch.randn(4, 2, generator=generator)

    def mean(a, b, pairs):
        return sum((p - q).norm() for p in a for q in b) / pairs

    expected = 2 * mean(x, y, 24) - mean(x, x, 30) - mean(y, y, 12)
    assert energy_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    # a shift by d moves every projection by |d . u|, on average over directions 2 |d| / pi
    shift = sliced_wasserstein(x, x + torch.tensor([0.6, 0.8])).item()
    assert shift == pytest.approx(2 / torch.pi, rel=1e-3)


def test_true_points_get_full_scores_and_the_exact_steering_no_error():
    world, held_out = toy2d.pinwheel(), toy2d.HeldOut(toy2d.pinwheel(), 0)
    scores = held_out.scores(held_out.fresh)
    assert scores["accuracy"] > 0.99 and abs(scores["energy"]) < 2e-3
    assert scores["spread"] == pytest.approx(1, abs=0.05)
    assert held_out.scores(held_out.fresh.roll(1, 0))["accuracy"] < 0.01     # the arms go in turn

    def prior(z_t, t):
        return world.eps(z_t, *signal_and_noise(t, z_t))

    def steered(strength):
        def eps(z_t, t, cond):
            exact = world.eps(z_t, *signal_and_noise(t, z_t), world.log_p_cond(cond))
            return posterior(prior(z_t, t), [exact], [strength])
        return held_out.steering_error(eps, prior)

    assert steered(1.0) == pytest.approx([0] * 4, abs=1e-3)
    assert steered(0.0) == pytest.approx([1] * 4, abs=1e-3)
    assert steered(1.5) == pytest.approx([0.5] * 4, abs=1e-3)


def test_only_what_a_method_learns_is_changed_and_only_scratch_starts_anew(monkeypatch):
    world, seen = toy2d.pinwheel(), {}
    torch.manual_seed(5)
    prior = toy2d.ToyUNet().requires_grad_(False)

    def spy(eps, parameters, *_):
        seen["values"] = [p.clone() for p in parameters]
        seen["trained"] = [p.requires_grad for p in parameters]

    monkeypatch.setattr(toy2d, "train", spy)
    of_prior = list(prior.parameters())
    for method, settings in toy2d.METHODS.items():
        toy2d.train_method(settings, prior, toy2d.labelled_points(world, 5, 0), 0)
        from_prior = all(torch.equal(p, q) for p, q in zip(seen["values"], of_prior))
        assert from_prior == (method in ("steered", "tuned")), method
        assert all(seen["trained"][len(of_prior):])
        assert all(seen["trained"][:len(of_prior)]) == (method != "steered"), method
        assert any(seen["trained"][:len(of_prior)]) == (method != "steered"), method


def test_the_rate_that_is_chosen_has_the_least_energy_distance_on_another_seed(monkeypatch):
    seen = []

    def scores(held_out, method, prior, n, effort):
        seen.append(held_out.seed)
        return dict(energy=abs(method.lr - toy.RATES[2]))

    monkeypatch.setattr(toy, "train_and_score", scores)
    args = SimpleNamespace(seed=1, effort=1.0)
    method = toy.best_rate(toy2d.METHODS["tuned"], toy2d.pinwheel(), None, 12, args)
    assert method == replace(toy2d.METHODS["tuned"], lr=toy.RATES[2])
    assert len(seen) == len(toy.RATES) and set(seen) == {1 + toy.RATE_SEED}


def test_a_gaussian_is_drawn_as_its_closed_form_says_and_wanted_only_where_that_is_exact():
    for row in toy.gaussian_rows():
        assert row["drawn"] == pytest.approx(row["closed form"], rel=0.04), row
        exact = row["Gaussian"] in ("one reading, s = 0", "one reading, s = 1",
                                    "a reading of each coordinate")
        assert (row["closed form"] == pytest.approx(row["wanted"])) == exact, row


@pytest.mark.slow
def test_a_short_training_steers_and_leaves_the_prior_as_it_was():
    world = toy2d.pinwheel()
    short_prior, held_out = toy2d.train_prior(world, 0, samples=50_000), toy2d.HeldOut(world, 0)
    before = [p.clone() for p in short_prior.parameters()]
    points = toy2d.labelled_points(world, 100, 0)
    eps = toy2d.train_method(toy2d.METHODS["steered"], short_prior, points, 0, effort=0.5)
    assert all(torch.equal(p, q) for p, q in zip(short_prior.parameters(), before))
    steered, prior = (held_out.scores(held_out.draw(denoise))
                      for denoise in (eps, lambda z_t, t, _: short_prior(z_t, t)))
    assert prior["accuracy"] < 0.3 and prior["energy"] > 1
    assert steered["accuracy"] > 0.85 and steered["energy"] < 0.2
    assert all(error < 1 for error in held_out.steering_error(eps, short_prior)[:3])


def test_repeated_is_one_for_the_training_points_and_a_twentieth_for_true_ones():
    held_out = toy2d.HeldOut(toy2d.pinwheel(), 0)
    z_0, _ = toy2d.labelled_points(held_out.world, 100, 0)
    again = z_0[torch.arange(held_out.fresh.shape[0] * held_out.fresh.shape[1]) % 100]
    assert held_out.repeated(again.view_as(held_out.fresh), z_0) == 1
    assert held_out.repeated(held_out.fresh, z_0) == pytest.approx(0.05, abs=0.015)


@pytest.fixture(scope="module")
def run_toy(tmp_path_factory):
    """A function of arguments that runs the toy in a very short form; returns its folder.

    The first argument is a study's name or "compare". The prior of a seed is trained once.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((toy2d, "SAMPLES", 20), (toy2d, "STEPS", 5),
                                    (toy2d, "CONDITIONS", 5), (toy, "SIZES", (12, 25)),
                                    (toy, "EPOCHS", (50, 500)), (toy, "MODES_SEEDS", 2),
                                    (toy, "RATES_SEEDS", 2), (toy, "ROBUSTNESS_SEEDS", 2),
                                    (toy, "RATES", (3e-4, 1e-3)), (toy, "BITS_POINTS", 50),
                                    (toy, "ALL_T", range(0, 1000, 200)),
                                    (toy2d, "train_prior", functools.cache(toy2d.train_prior))):
            patch.setattr(module, name, value)
        world = toy2d.pinwheel()
        patch.setattr(toy2d, "pinwheel", lambda: world)

        def run_it(study, *arguments):
            out, script = tmp_path_factory.mktemp(study), [study]
            main = toy.main
            if study == "compare":
                script, main = [], toy2d.main
            patch.setattr(sys, "argv", ["toy", *script, "--effort", "0.004", "--out", str(out),
                                        *arguments])
            main()
            return out

        yield run_it


@pytest.fixture(scope="module")
def compared(run_toy):
    """The folder of the comparison by seed 1."""
    return run_toy("compare", "--seed", "1")


@pytest.fixture(scope="module")
def modes_run(run_toy):
    """The folder of the study of modes, and the (port weights, time_blind) that it trained."""
    seen, learn = set(), toy2d.train_method

    def spy(*arguments, port_weights, time_blind):
        seen.add((port_weights, time_blind))
        return learn(*arguments, port_weights=port_weights, time_blind=time_blind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy2d, "train_method", spy)
        return run_toy("modes"), seen


def test_the_mode_named_time_blind_is_the_only_one_that_is(modes_run):
    folder, seen = modes_run
    table = (folder / "modes.md").read_text()
    assert [port_weights for port_weights, blind in seen if blind] == [toy2d.HEAD_HEAVY]
    assert {port_weights for port_weights, blind in seen if not blind} == {
        port_weights for name, port_weights in toy.MODES.items() if name != "time-blind"}
    assert "+0.000 +- 0.000" in table.split("| CP+TP+EP |")[1].split("\n")[0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_and_another_seed_another(compared, run_toy):
    toy2d.train_prior.cache_clear()             # so that it is trained again
    text = (compared / "toy2d.md").read_text()
    again, other = ((run_toy("compare", "--seed", seed) / "toy2d.md").read_text()
                    for seed in ("1", "2"))
    assert text == again != other
    for name in ("true", "exact", "prior", "steered", "scratch", "scratch, short", "tuned"):
        assert f"| {name} |" in text


@pytest.mark.parametrize("study, names", (
    ("compare", ["toy2d.md", "toy2d.png", "steering.png"]), ("modes", ["modes.md", "modes.png"]),
    ("robustness", ["robustness.md", "robustness.png"]),
    pytest.param("rates", ["rates.md"], marks=pytest.mark.slow), ("bits", ["bits.md"]),
    ("algebra", ["algebra.md", "algebra.png", "gaussian.md"])))
def test_a_run_writes_its_table_and_its_figures(study, names, run_toy, compared, modes_run):
    out = dict(compare=compared, modes=modes_run[0]).get(study) or run_toy(study)
    assert sorted(file.name for file in out.iterdir()) == sorted(names)
    assert "nan" not in (out / names[0]).read_text()


@pytest.mark.parametrize("main, arguments, words", (
    (toy.main, ["all"], "study"), (toy.main, [], "study"), (toy2d.main, ["rates"], "rates"),
    (toy2d.main, ["--effort", "0"], "--effort 0"),
    (toy2d.main, ["--effort", "1.5"], "--effort 1.5"),
    (toy2d.main, ["--seed", "-1"], "-1"), (toy2d.main, ["--out", __file__], "a file"),
    (toy2d.main, ["--out", f"{__file__}/inside"], "a file")))
def test_a_wrong_option_is_one_line_and_exit_code_2(main, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and words in printed
