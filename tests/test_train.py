"""The main job, shortened: what training changes, what it writes, how it resumes."""
import json
import shlex
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import drawings
import pytest
import torch
from PIL import Image, ImageOps
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

ARGS = dict(steps=3, lr=1e-3, batch=2, seed=0, save_every=9, device="cpu", accumulate=1,
            dtype="fp32")


# ---- a run ---------------------------------------------------------------------------------

def test_a_run_writes_everything_and_its_last_line_draws(run_train, run_script, tmp_path, capsys):
    out = tmp_path / "run"
    run_train("--out", out)
    assert sorted(file.name for file in out.iterdir()) == [
        "args.json", "bps.safetensors", "condition.png", "curve.png", "log.jsonl", "samples.png"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["val_base"] > 0 and row["val_steered"] > 0 for row in rows)
    metadata = load_bps(out / "bps.safetensors").metadata
    assert metadata["steps"] == 2 and metadata["size"] == 32 and metadata["results"]["pairs"] == 6
    assert Image.open(out / "samples.png").width > 500
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("python sample.py --bps") and "'" in command      # quoted
    run_script(sample, *shlex.split(command)[2:], "--n", 1, "--steps", 2, "--out", tmp_path / "p")
    assert (tmp_path / "p" / "0000.png").is_file()
    # the base is the one it was trained on; the one note is about the small size
    assert capsys.readouterr().err.count("note:") == 1


@pytest.mark.parametrize("task, measured", [
    pytest.param("segmentation", ["pixel accuracy", "mIoU"], marks=pytest.mark.slow),
    pytest.param("layout", ["box IoU"], marks=pytest.mark.slow),
    ("artistic", ["colour distance", "line F1"])])
def test_every_task_trains_and_draws_from_its_own_condition(task, measured, run_train, run_script,
                                                            tmp_path, capsys):
    has_labels = task in ("segmentation", "layout")
    run_train("--task", task, "--size", 64 if has_labels else 32, "--out", tmp_path / "run")
    command = capsys.readouterr().out.splitlines()[-1]
    bps = load_bps(tmp_path / "run" / "bps.safetensors")
    metadata, head = bps.metadata, bps.config.input_weights
    assert head == ((1, 1, 1) if task == "layout" else (16, 8, 4))      # the authors' for layout
    assert metadata["task"] == task and list(metadata["results"]["obedience"]) == measured
    for scores in metadata["results"]["obedience"].values():
        assert all(0 <= scores[name] <= 1 for name in ("base", "steered", "round_trip"))
    assert ("hair" in metadata["classes"].values()) == has_labels == bool(metadata["classes"])
    run_script(sample, *shlex.split(command)[2:], "--n", 1, "--steps", 2, "--out", tmp_path / "p")
    assert (tmp_path / "p" / "0000.png").is_file()


def test_the_options_of_the_network_reach_it(run_train, interrupted, tmp_path):
    interrupted(run_train, "--weights", "1,1,1,2,0", "--foot", "light", "--out", tmp_path / "run")
    config = load_bps(tmp_path / "run" / "bps.safetensors").config
    assert config.output_weight == 0 and config.foot == "light"
    assert config.input_weights == (1, 1, 1) and config.middle_weight == 2


def test_the_loss_is_against_what_the_model_predicts(run_train, interrupted, tmp_path, monkeypatch):
    """Not the noise, which a model that predicts v never gives: here the target is far away."""
    seen = []

    def far_away(schedule, z, noise, t):
        seen.append(schedule.prediction_type)
        return torch.full_like(noise, 1000.0)

    monkeypatch.setattr(diffusion.NoiseSchedule, "target", far_away)
    interrupted(run_train, "--prediction-type", "v_prediction", "--out", tmp_path / "run")
    assert set(seen) == {"v_prediction"}
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert all(0.9e6 < row[loss] < 1.1e6 for loss in ("train_loss", "val_base", "val_steered"))
    metadata = load_bps(tmp_path / "run" / "bps.safetensors").metadata
    assert metadata["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("base, no_mirror, count", [
    (options.BASE, False, 2), (options.BASE, True, 1), ("SD", False, 14), ("SD", True, 14)])
def test_pairs_have_moved_copies_unless_the_base_is_the_embedded_one(base, no_mirror, count,
                                                                     monkeypatch):
    make_cache = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(train, "LatentCache", make_cache)
    args = SimpleNamespace(**ARGS, task="sketch", base=base, no_mirror=no_mirror, size=64,
                           from_base=None, extract=False, cache=None)
    splits = dict.fromkeys(train.SPLITS, load_pairs("sketch", "train")[:3])
    with pytest.raises(KeyboardInterrupt):
        train.run_training(None, args, None, {}, None, splits, Processes())
    views = [row.view for row in make_cache.call_args.args[0]]
    assert len(views) == 3 * count
    assert any(view.is_mirrored for view in views) == (not no_mirror)
    assert any(view.side < 1 for view in views) == (base == "SD")


def test_training_changes_all_of_bps_and_nothing_of_the_base(base):
    parts = base.unet, base.vae, base.text_model
    before = [{key: t.clone() for key, t in part.state_dict().items()} for part in parts]
    cache = LatentCache(load_pairs("sketch", "train")[:4], "sketch", 32, base)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    start = {key: t.clone() for key, t in bps.state_dict().items()}
    args = SimpleNamespace(**ARGS)
    training = train.Training(None, bps, args, Processes())
    train.train(training, base, cache, args, lambda step, loss: None)
    for part, saved in zip(parts, before):
        assert all(torch.equal(saved[key], t) for key, t in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())
    unchanged = [key for key, t in bps.state_dict().items() if torch.equal(start[key], t)]
    assert unchanged == []


def test_the_average_is_a_mean_at_first_and_then_forgets():
    training = train.Training(None, torch.nn.Linear(1, 1), SimpleNamespace(**ARGS), Processes())
    expected = 0.0
    for step in range(300):
        torch.nn.init.constant_(training.bps.weight, step)
        training.average_weights(step)
        if step == 49:
            assert training.average.weight.item() == pytest.approx(sum(range(50)) / 50)
        share = max(1 / (step + 1), 1 / train.AVERAGED_STEPS)
        expected = (1 - share) * expected + share * step
    assert training.average.weight.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("few_pairs, kept", [(1, 1), (1000, 2)], ids=["many pairs", "few pairs"])
def test_the_best_average_is_kept_and_of_few_pairs_the_last(few_pairs, kept, run_train, interrupted,
                                                            tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SELECTION_PAIRS", few_pairs)
    losses, errors = iter([0.5, 0.3, 0.4]), train.paired_errors         # of the base, steps 1 and 2
    monkeypatch.setattr(train, "paired_errors", lambda *a: errors(*a) * 0 + next(losses))
    averages, save = {}, train.Training.save

    def noted(self, step, *arguments):
        averages[step] = {key: tensor.half() for key, tensor in self.average.state_dict().items()}
        save(self, step, *arguments)

    monkeypatch.setattr(train.Training, "save", noted)
    interrupted(run_train, "--out", tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "bps.safetensors")
    assert all(torch.equal(tensors[key], averages[kept][key]) for key in tensors)
    assert any(not torch.equal(averages[1][key], averages[2][key]) for key in tensors)
    best = load_bps(tmp_path / "run" / "bps.safetensors").metadata["best"]
    assert best == dict(step=kept, loss=pytest.approx({1: 0.3, 2: 0.4}[kept]))


def test_the_learning_rate_falls_linearly_to_zero(run_train, interrupted, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *a, **k):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    interrupted(run_train, "--lr", "8e-4", "--out", tmp_path / "run")
    assert rates == pytest.approx([8e-4, 4e-4])


# ---- resuming ------------------------------------------------------------------------------

def test_a_run_interrupted_in_training_and_report_has_the_same_result(
        run_train, interrupted, refused, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_train("--out", whole)
    with monkeypatch.context() as patch:
        # it is called in step 1, in its validation, and in step 2
        stop = Mock(side_effect=[None, None, UserError("stopped")])
        patch.setattr(train, "require_finite", stop)
        assert "stopped" in refused(run_train, "--out", parts)
    interrupted(run_train, "--out", parts)
    run_train("--out", parts)
    expected, tensors = (load_file(out / "bps.safetensors") for out in (whole, parts))
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert not (tmp_path / "parts-2").exists() and (parts / "samples.png").exists()
    assert "results" in load_bps(parts / "bps.safetensors").metadata


@pytest.mark.parametrize("arguments, size, lr, steps", [
    ("", 64, 1e-3, 1200), (f"--base {options.BASE}/../model --task artistic", 64, 1e-3, 300),
    ("--base sd", 512, 1e-5, 10_000), ("--base sd --size 768 --lr 2e-5 --steps 9", 768, 2e-5, 9)])
def test_size_rate_and_steps_follow_the_base(arguments, size, lr, steps, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments.split()])
    args = train.parse_args()
    assert (args.size, args.lr, args.steps) == (size, lr, steps)


def test_other_pairs_pictures_or_weights_are_another_run(tmp_path, monkeypatch):
    base, folder = tmp_path / "base", drawings.write_shapes(tmp_path / "pairs")
    shutil.copytree(options.BASE, base)
    monkeypatch.setattr("sys.argv", ["train.py", "--base", str(base), "--data", str(folder)])
    args = train.parse_args()

    def record(count=7):
        return run_record(args, dict(train=load_pairs("sketch", "train", folder)[:count]))

    first = record()
    assert first == record() != record(count=5)
    for file in (folder / "images").glob("*.png"):
        ImageOps.mirror(Image.open(file)).save(file)
    mirrored = record()
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(drawings.flip_bit(file.read_bytes(), -4))          # a bit of one weight
    assert first != mirrored != record()


def test_a_finished_run_or_another_one_is_never_overwritten(tmp_path):
    record, out, second = dict(task="sketch"), tmp_path / "run", tmp_path / "run-2"
    assert choose_out(out, record) == out
    out.mkdir()
    write_json(record, out / "args.json")
    assert choose_out(out, record) == out               # stopped before its first checkpoint
    assert choose_out(out, dict(task="other")) == second
    (out / "log.jsonl").touch()
    assert choose_out(out, record) == second            # finished, though its BPS was moved away
    (out / "checkpoint.safetensors").touch()
    assert choose_out(out, record) == out
    assert choose_out(out, dict(task="other")) == second
    (out / "args.json").unlink()                        # a copy, or somebody else's
    assert choose_out(out, record) == second


# ---- the report ----------------------------------------------------------------------------

def test_validation_tells_a_steered_model_from_the_base(base, short_report):
    cache = LatentCache(load_pairs("sketch", "val")[:4], "sketch", 32, base)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    numbers = report.validate(base, cache, bps)
    assert numbers["gain"][0] == 0 and numbers["gap"][0] == 0       # zero ports: the base itself
    torch.nn.init.normal_(bps.zero_blocks[1].weight, std=0.1)
    numbers = report.validate(base, cache, bps)
    assert numbers["gain"][0] < 0 and numbers["gap"][0] != 0        # noise in a port: worse


# ---- numbers that are not finite -----------------------------------------------------------

def poison(tensors):
    max(tensors.values(), key=torch.Tensor.numel).view(-1)[::7] = float("nan")


def enlarge(tensors):
    tensors["conv_out.weight"] = torch.full_like(tensors["conv_out.weight"].float(), 1e36)


OVERFLOW = "the validation loss of the frozen base is not", "the numbers of the pictures overflowed"


@pytest.mark.parametrize("part, change, messages", [
    ("unet", poison, 2 * ("the weights of its U-Net are not finite",)),
    pytest.param("vae", poison, 2 * ("the weights of its autoencoder are not finite",),
                 marks=pytest.mark.slow),
    pytest.param("text_encoder", poison, 2 * ("the weights of its text encoder are not finite",),
                 marks=pytest.mark.slow), ("unet", enlarge, OVERFLOW)])
def test_a_base_whose_numbers_are_not_finite_is_named(part, change, messages, run_train, draw,
                                                      refused, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(options.BASE, base)
    file, = (base / part).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    assert f"{base}: {messages[0]}" in refused(run_train, "--base", base, "--out", out)
    assert messages[1] in refused(draw, "--base", base, "--bps", "none", "--out", out)
    assert not (out / "bps.safetensors").exists() and not list(out.glob("*.png"))


def test_a_bps_whose_weights_are_not_finite_is_named(draw, refused, tmp_path, bps_file):
    bps, file = load_bps(bps_file), tmp_path / "bps.safetensors"
    bps.zero_blocks[1].weight.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="zero_blocks.1.weight .* smaller --lr"):
        save_bps(bps, file, bps.metadata)
    assert not list(tmp_path.iterdir())
    tensors, metadata = load_file(bps_file), safe_open(bps_file, "pt").metadata()
    poison(tensors)
    save_file(tensors, file, metadata)
    assert "bps.safetensors: its weights are not finite" in refused(draw, "--bps", file)


def test_a_diverging_run_keeps_its_last_checkpoint(run_train, interrupted, refused, tmp_path,
                                                   monkeypatch):
    out, true_loss, losses = tmp_path / "run", train.F.mse_loss, []

    def overflowing_loss(eps, target):
        losses.append(true_loss(eps, target))
        return losses[-1] * (float("inf") if len(losses) == 2 else 1)

    monkeypatch.setattr(train.F, "mse_loss", overflowing_loss)
    assert "step 2: the loss or its gradient is not finite" in refused(run_train, "--out", out)
    for name in ("checkpoint.safetensors", "bps.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(out / name).values())
    interrupted(run_train, "--out", out)                                # resumes from step 1
    assert len(losses) == 3 and len((out / "log.jsonl").read_text().splitlines()) == 2
