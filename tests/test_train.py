"""The main job, shortened: what training changes, what it writes, how it resumes."""
import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusion
import sample
import train
from bps import BPS, config_for, load_bps, save_bps
from data import LatentCache, load_pairs
from inputs import options
from inputs.files import write_json
from inputs.processes import Processes
from inputs.run_folder import choose_out, run_record
from measure import report
from weights import UserError

SHORT = ["--steps", "4", "--batch", "2", "--save-every", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch, short_report):
    """Only the first six embedded pairs of each split."""
    monkeypatch.setattr(train, "load_pairs", lambda *a, **k: load_pairs(*a, **k)[:6])


@pytest.fixture
def run_train(run_script):
    """A function that runs train.py for four steps with more options."""
    return lambda *arguments: run_script(train, *SHORT, *arguments)


def interrupt(*_):
    raise KeyboardInterrupt


# ---- a run ---------------------------------------------------------------------------------

def test_a_run_writes_everything_and_its_last_line_draws(run_train, run_script, tmp_path, capsys):
    out = tmp_path / "run"
    run_train("--out", out)
    assert sorted(file.name for file in out.iterdir()) == [
        "args.json", "bps.safetensors", "condition.png", "curve.png", "log.jsonl", "samples.png"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["val_base"] > 0 and row["val_steered"] > 0 for row in rows)
    metadata = load_bps(out / "bps.safetensors").metadata
    assert metadata["steps"] == 4 and metadata["size"] == 64 and metadata["results"]["pairs"] == 6
    assert Image.open(out / "samples.png").width > 500
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("python sample.py --bps") and "'" in command      # quoted
    run_script(sample, *shlex.split(command)[2:], "--n", 1, "--steps", 2, "--out", tmp_path / "p")
    assert (tmp_path / "p" / "0000.png").is_file()
    assert "note:" not in capsys.readouterr().err       # the base is the one it was trained on


@pytest.mark.parametrize("task, measured", [
    pytest.param("segmentation", ["pixel accuracy", "mIoU"], marks=pytest.mark.slow),
    pytest.param("layout", ["box IoU"], marks=pytest.mark.slow),
    ("artistic", ["colour distance", "line F1"])])
def test_every_task_trains_and_draws_from_its_own_condition(task, measured, run_train, run_script,
                                                            tmp_path, capsys):
    run_train("--task", task, "--out", tmp_path / "run")
    command = capsys.readouterr().out.splitlines()[-1]
    bps = load_bps(tmp_path / "run" / "bps.safetensors")
    metadata, head = bps.metadata, bps.config.input_weights
    assert head == ((1, 1, 1) if task == "layout" else (16, 8, 4))      # the authors' for layout
    assert metadata["task"] == task and list(metadata["results"]["obedience"]) == measured
    for scores in metadata["results"]["obedience"].values():
        assert all(0 <= scores[name] <= 1 for name in ("base", "steered", "round_trip"))
    has_labels = task in ("segmentation", "layout")
    assert ("hair" in metadata["classes"].values()) == has_labels == bool(metadata["classes"])
    run_script(sample, *shlex.split(command)[2:], "--n", 1, "--steps", 2, "--out", tmp_path / "p")
    assert (tmp_path / "p" / "0000.png").is_file()


def test_the_options_of_the_network_reach_it(run_train, tmp_path):
    run_train("--weights", "1,1,1,2,0", "--foot", "light", "--out", tmp_path / "run")
    config = load_bps(tmp_path / "run" / "bps.safetensors").config
    assert config.output_weight == 0 and config.foot == "light"
    assert config.input_weights == (1, 1, 1) and config.middle_weight == 2


def test_the_loss_is_against_what_the_model_predicts(run_train, tmp_path, monkeypatch):
    """Not the noise, which a model that predicts v never gives: here the target is far away."""
    seen = []

    def far_away(schedule, z, noise, t):
        seen.append(schedule.prediction_type)
        return torch.full_like(noise, 1000.0)

    monkeypatch.setattr(diffusion.NoiseSchedule, "target", far_away)
    run_train("--prediction-type", "v_prediction", "--out", tmp_path / "run")
    assert set(seen) == {"v_prediction"}
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert all(0.9e6 < row[loss] < 1.1e6 for loss in ("train_loss", "val_base", "val_steered"))
    metadata = load_bps(tmp_path / "run" / "bps.safetensors").metadata
    assert metadata["prediction_type"] == "v_prediction"


def test_training_changes_all_of_bps_and_nothing_of_the_base(base):
    parts = base.unet, base.vae, base.text_model
    before = [{key: t.clone() for key, t in part.state_dict().items()} for part in parts]
    cache = LatentCache(load_pairs("sketch", "train")[:4], "sketch", 64, base)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    start = {key: t.clone() for key, t in bps.state_dict().items()}
    args = SimpleNamespace(steps=3, lr=1e-3, batch=2, seed=0, save_every=9, device="cpu",
                           accumulate=1, dtype="fp32")
    training = train.Training(None, bps, args, Processes())
    train.train(training, base, cache, args, lambda step, loss: None)
    for part, saved in zip(parts, before):
        assert all(torch.equal(saved[key], t) for key, t in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())
    unchanged = [key for key, t in bps.state_dict().items() if torch.equal(start[key], t)]
    assert unchanged == []


def test_the_average_is_a_mean_at_first_and_then_forgets(tmp_path):
    args = SimpleNamespace(device="cpu", dtype="fp32", lr=1e-3)
    training = train.Training(tmp_path, torch.nn.Linear(1, 1), args, Processes())
    expected = 0.0
    for step in range(300):
        with torch.no_grad():
            training.bps.weight.fill_(step)
        training.average_weights(step)
        if step == 49:
            assert training.average.weight.item() == pytest.approx(sum(range(50)) / 50)
        share = max(1 / (step + 1), 1 / train.AVERAGED_STEPS)
        expected = (1 - share) * expected + share * step
    assert training.average.weight.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("keep_best, kept", [(True, 1.0), (False, 2.0)])
def test_few_pairs_keep_the_last_average_others_the_best(keep_best, kept, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save_bps", lambda bps, *_: saved.append(bps.weight.item()))
    args = SimpleNamespace(device="cpu", dtype="fp32", lr=1e-3)
    training = train.Training(tmp_path, torch.nn.Linear(1, 1), args, Processes(), {}, keep_best)
    for value, val_loss in ((1.0, 0.5), (2.0, 0.6)):
        with torch.no_grad():
            training.average.weight.fill_(value)
        training.save(int(value), 0.5, 0.7, val_loss)
    assert saved[-1] == kept and training.best["step"] == kept


def test_the_learning_rate_falls_linearly_to_zero(run_train, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *a, **k):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run_train("--lr", "8e-4", "--out", tmp_path / "run")
    assert rates == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4])


def test_a_users_folder_of_pairs_can_be_trained_on(run_train, tmp_path):
    for folder in ("source", "target"):
        (tmp_path / folder).mkdir()
    lines = []
    for i, pair in enumerate(load_pairs("sketch", "train")[:40]):
        pair.open_cond().resize((90, 70)).save(tmp_path / "source" / f"{i}.png")
        pair.open_image().resize((90, 70)).save(tmp_path / "target" / f"{i}.png")
        lines.append(json.dumps(dict(source=f"source/{i}.png", target=f"target/{i}.png",
                                     prompt=pair.prompts[0])))
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    run_train("--data", tmp_path, "--size", 48, "--out", tmp_path / "run")
    assert load_bps(tmp_path / "run" / "bps.safetensors").metadata["size"] == 48


# ---- resuming ------------------------------------------------------------------------------

def test_an_interrupted_run_resumes_to_the_same_result(run_train, tmp_path, monkeypatch):
    run_train("--out", tmp_path / "whole")
    step, calls = torch.optim.AdamW.step, iter(range(100))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (
        interrupt() if next(calls) == 3 else step(self, *a, **k)))
    with pytest.raises(SystemExit):
        run_train("--out", tmp_path / "halves")
    assert (tmp_path / "halves" / "checkpoint.safetensors").exists()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_train("--out", tmp_path / "halves")
    whole, halves = (load_file(tmp_path / name / "bps.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_a_run_interrupted_in_its_report_keeps_its_bps(run_train, tmp_path, monkeypatch):
    out, finish = tmp_path / "run", train.report
    monkeypatch.setattr(train, "report", interrupt)
    with pytest.raises(SystemExit):
        run_train("--out", out)
    trained = load_file(out / "bps.safetensors")
    monkeypatch.setattr(train, "report", finish)
    run_train("--out", out)
    assert not (tmp_path / "run-2").exists() and (out / "samples.png").exists()
    again = load_file(out / "bps.safetensors")
    assert all(torch.equal(trained[key], again[key]) for key in trained)
    assert "results" in load_bps(out / "bps.safetensors").metadata


def test_a_corrupt_checkpoint_is_named_with_the_fix(run_train, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(train, "report", interrupt)
    with pytest.raises(SystemExit):
        run_train("--out", out)
    file = out / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SystemExit):
        run_train("--out", out)
    assert "checkpoint is corrupt" in capsys.readouterr().err


def test_different_pairs_are_a_different_run(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    args = train.parse_args()
    six, five = ({split: load_pairs("sketch", split)[:count] for split in train.SPLITS}
                 for count in (6, 5))
    record = run_record(args, six)
    assert record == run_record(args, six)
    assert run_record(args, five)["pairs_sha256"] != record["pairs_sha256"]


def test_a_finished_run_is_never_overwritten(tmp_path):
    record, wanted = dict(task="sketch"), tmp_path / "run"
    assert choose_out(wanted, record) == wanted
    wanted.mkdir()
    write_json(record, wanted / "args.json")
    assert choose_out(wanted, record) == wanted                   # unfinished: resumes
    assert choose_out(wanted, dict(task="other")) == tmp_path / "run-2"
    (wanted / "bps.safetensors").touch()
    assert choose_out(wanted, record) == tmp_path / "run-2"
    (wanted / "args.json").unlink()                               # a copy, or somebody else's
    assert choose_out(wanted, record) == tmp_path / "run-2"


# ---- the report ----------------------------------------------------------------------------

def test_validation_tells_a_steered_model_from_the_base(base):
    cache = LatentCache(load_pairs("sketch", "val")[:4], "sketch", 64, base)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    numbers = report.validate(base, cache, bps)
    assert numbers["gain"][0] == 0 and numbers["gap"][0] == 0       # zero ports: the base itself
    torch.nn.init.normal_(bps.zero_blocks[1].weight, std=0.1)
    numbers = report.validate(base, cache, bps)
    assert numbers["gain"][0] < 0 and numbers["gap"][0] != 0        # noise in a port: worse


def test_the_sheet_shows_its_columns_in_order(tmp_path):
    columns = [torch.full((3, 3, 16, 16), value) for value in (-1.0, -0.5, 0.0, 0.5)]
    report.contact_sheet(columns, "abcd", ["x", "y", "z"], tmp_path / "s.png")
    sheet = Image.open(tmp_path / "s.png").convert("L")
    assert [sheet.getpixel((k * 130 + 64, 80)) for k in range(4)] == [0, 64, 128, 191]


# ---- numbers that are not finite -----------------------------------------------------------

def changed_base(folder, part, change):
    """A copy of the embedded base whose `part` has the tensors that change(tensors) leaves."""
    shutil.copytree(options.BASE, folder)
    file, = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def poison(tensors):
    max(tensors.values(), key=torch.Tensor.numel).view(-1)[::7] = float("nan")


@pytest.mark.parametrize("part, name", [
    ("unet", "U-Net"), pytest.param("vae", "autoencoder", marks=pytest.mark.slow),
    pytest.param("text_encoder", "text encoder", marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_named(part, name, run_train, run_script, tmp_path, capsys):
    base = changed_base(tmp_path / "base", part, poison)
    for run, arguments in ((run_train, ["--out", tmp_path / "run"]), (
            lambda *a: run_script(sample, *a), ["--steps", 2, "--n", 1, "--out", tmp_path / "p"])):
        with pytest.raises(SystemExit):
            run("--base", base, *arguments)
        assert f"{base}: the weights of its {name} are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "bps.safetensors").exists()
    assert not list((tmp_path / "p").glob("*.png"))


def test_a_bps_whose_weights_are_not_finite_is_named(draw, tmp_path, bps_file, capsys):
    bps = load_bps(bps_file)
    bps.zero_blocks[1].weight.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="zero_blocks.1.weight .* smaller --lr"):
        save_bps(bps, tmp_path / "bps.safetensors", bps.metadata)
    assert not list(tmp_path.iterdir())
    tensors, metadata = load_file(bps_file), safe_open(bps_file, "pt").metadata()
    poison(tensors)
    save_file(tensors, tmp_path / "bps.safetensors", metadata)
    with pytest.raises(SystemExit):
        draw("--bps", tmp_path / "bps.safetensors", "--n", 1)
    assert "bps.safetensors: its weights are not finite" in capsys.readouterr().err


def test_a_diverging_run_keeps_its_last_checkpoint(run_train, tmp_path, monkeypatch, capsys):
    out, true_loss, losses = tmp_path / "run", train.F.mse_loss, []

    def overflowing_loss(eps, target):
        losses.append(true_loss(eps, target))
        return losses[-1] * (float("inf") if len(losses) == 4 else 1)

    monkeypatch.setattr(train.F, "mse_loss", overflowing_loss)
    with pytest.raises(SystemExit):
        run_train("--lr", "0.01", "--out", out)
    assert "step 4: the loss or its gradient is not finite" in capsys.readouterr().err
    for name in ("checkpoint.safetensors", "bps.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(out / name).values())
    monkeypatch.setattr(train.F, "mse_loss", true_loss)
    run_train("--lr", "0.01", "--out", out)                             # resumes from step 2
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_numbers_that_overflow_name_the_base(run_train, run_script, tmp_path, capsys):
    def enlarge(tensors):
        tensors["conv_out.weight"] = torch.full_like(tensors["conv_out.weight"].float(), 1e36)

    base = changed_base(tmp_path / "base", "unet", enlarge)
    with pytest.raises(SystemExit):
        run_train("--base", base, "--out", tmp_path / "run")
    assert f"{base}: the validation loss of the frozen base is not" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(sample, "--bps", "none", "--base", base, "--steps", 2, "--n", 1, "--out",
                   tmp_path / "p")
    assert "the numbers of the pictures overflowed" in capsys.readouterr().err
    assert not list((tmp_path / "p").glob("*.png"))
