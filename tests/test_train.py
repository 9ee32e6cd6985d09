"""The main job, shortened: what training changes, what it writes, how it goes on after a stop."""
import json
import shlex
import shutil
import subprocess
import sys
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


def run(module, monkeypatch, *arguments):
    """Runs a script's main() with these command-line arguments, in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch, short_report):
    """The first six embedded pairs of each split."""
    monkeypatch.setattr(train, "load_pairs", lambda *a, **k: load_pairs(*a, **k)[:6])


def test_a_run_writes_everything_and_its_last_line_draws(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(train, monkeypatch, *SHORT, "--out", out)
    assert sorted(file.name for file in out.iterdir()) == [
        "args.json", "bps.safetensors", "condition.png", "curve.png", "log.jsonl", "samples.png"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["val_base"] > 0 and row["val_steered"] > 0 for row in rows)
    metadata = load_bps(out / "bps.safetensors").metadata
    assert metadata["steps"] == 4 and metadata["size"] == 64 and metadata["results"]["pairs"] == 6
    assert Image.open(out / "samples.png").width > 500

    printed = capsys.readouterr()
    command = printed.out.splitlines()[-1]
    assert command.startswith("python sample.py --bps") and '"' in command      # quoted
    run(sample, monkeypatch, *shlex.split(command)[2:], "--n", 1, "--steps", 2,
        "--out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "0000.png").is_file()
    assert "note:" not in capsys.readouterr().err       # the base is the one it was trained on


@pytest.mark.parametrize("task, measured", [
    pytest.param("segmentation", ["pixel accuracy", "mIoU"], marks=pytest.mark.slow),
    pytest.param("layout", ["boxes of the right class"], marks=pytest.mark.slow),
    ("artistic", ["colour distance", "line F1"])])
def test_every_task_trains_measures_and_draws_from_its_own_condition(task, measured, tmp_path,
                                                                     monkeypatch, capsys):
    out = tmp_path / "run"
    run(train, monkeypatch, *SHORT, "--task", task, "--out", out)
    command = capsys.readouterr().out.splitlines()[-1]
    bps = load_bps(out / "bps.safetensors")
    metadata, head = bps.metadata, bps.config.input_weights
    assert head == ((1, 1, 1) if task == "layout" else (16, 8, 4))      # the authors' for layout
    assert metadata["task"] == task and list(metadata["results"]["obedience"]) == measured
    for scores in metadata["results"]["obedience"].values():
        assert all(0 <= scores[name] <= 1 for name in ("base", "steered", "round_trip"))
    has_labels = task in ("segmentation", "layout")
    assert ("face" in metadata["classes"].values()) == has_labels == bool(metadata["classes"])
    run(sample, monkeypatch, *shlex.split(command)[2:], "--n", 1, "--steps", 2,
        "--out", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "0000.png").is_file()


def test_the_share_of_empty_prompts_is_the_one_asked_for(tmp_path, monkeypatch):
    shares, batch = [], LatentCache.batch

    def noted(self, slots, size, generator, empty_share):
        shares.append(empty_share)
        return batch(self, slots, size, generator, empty_share)

    monkeypatch.setattr(LatentCache, "batch", noted)
    run(train, monkeypatch, *SHORT, "--prompt-drop", "0.25", "--weights", "1,1,1,2,0", "--foot",
        "light", "--out", tmp_path / "run")
    assert set(shares) == {0.25}
    config = load_bps(tmp_path / "run" / "bps.safetensors").config
    assert config.output_weight == 0 and config.foot == "light"
    assert config.input_weights == (1, 1, 1) and config.middle_weight == 2


def test_the_loss_is_against_what_the_model_predicts(tmp_path, monkeypatch):
    """Not the noise, which a model that predicts v never gives: here the target is far away."""
    seen = []

    def far_away(schedule, z, noise, t):
        seen.append(schedule.prediction_type)
        return torch.full_like(noise, 1000.0)

    monkeypatch.setattr(diffusion.NoiseSchedule, "target", far_away)
    run(train, monkeypatch, *SHORT, "--prediction-type", "v_prediction", "--out", tmp_path / "run")
    assert set(seen) == {"v_prediction"}
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    for loss in ("train_loss", "val_base", "val_steered"):
        assert 0.9e6 < row[loss] < 1.1e6
    metadata = load_bps(tmp_path / "run" / "bps.safetensors").metadata
    assert metadata["prediction_type"] == "v_prediction"


def test_training_changes_bps_and_nothing_of_the_base():
    base = sample.load_base(options.BASE)
    parts = base.unet, base.vae, base.text_model
    before = [{key: t.clone() for key, t in part.state_dict().items()} for part in parts]
    cache = LatentCache(load_pairs("sketch", "train")[:4], "sketch", 64, base)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    start = {key: t.clone() for key, t in bps.state_dict().items()}
    args = SimpleNamespace(steps=3, lr=1e-3, batch=2, seed=0, save_every=9, device="cpu",
                           prompt_drop=0.1, accumulate=1, keep="best", dtype="fp32")
    run = train.Run(None, bps, args, Processes())
    train.train(run, base, cache, args, lambda step, loss: None)
    for part, saved in zip(parts, before):
        assert all(torch.equal(saved[key], t) for key, t in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())
    unchanged = [key for key, t in bps.state_dict().items() if torch.equal(start[key], t)]
    assert unchanged == []


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    run(train, monkeypatch, *SHORT, "--out", tmp_path / "whole")

    step = torch.optim.AdamW.step
    calls = iter(range(100))

    def interrupted(self, *a, **k):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(train, monkeypatch, *SHORT, "--out", tmp_path / "halves")
    assert (tmp_path / "halves" / "checkpoint.safetensors").exists()
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(train, monkeypatch, *SHORT, "--out", tmp_path / "halves")
    whole, halves = (load_file(tmp_path / name / "bps.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_a_run_that_is_interrupted_in_its_report_keeps_its_bps_and_goes_on(tmp_path, monkeypatch):
    out, finish = tmp_path / "run", train.report

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(train, monkeypatch, *SHORT, "--out", out)
    trained = load_file(out / "bps.safetensors")
    monkeypatch.setattr(train, "report", finish)
    run(train, monkeypatch, *SHORT, "--out", out)
    assert not (tmp_path / "run-2").exists() and (out / "samples.png").exists()
    again = load_file(out / "bps.safetensors")
    assert all(torch.equal(trained[key], again[key]) for key in trained)
    assert "results" in load_bps(out / "bps.safetensors").metadata


def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, monkeypatch):
    out, finish = tmp_path / "run", train.report
    monkeypatch.setattr(train, "report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train, monkeypatch, *SHORT, "--out", out)
    file = out / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.setattr(train, "report", finish)
    with pytest.raises(UserError, match="checkpoint is corrupt .*Delete the run"):
        run(train, monkeypatch, *SHORT, "--out", out)


def test_other_pairs_are_another_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_args("")
    six, five = ({split: load_pairs("sketch", split)[:count] for split in train.SPLITS}
                 for count in (6, 5))
    facts = run_record(args, six)
    assert facts == run_record(args, six)
    assert run_record(args, five)["pairs_sha256"] != facts["pairs_sha256"]


def test_the_learning_rate_falls_linearly_to_zero(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recorded(self, *a, **k):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run(train, monkeypatch, *SHORT, "--lr", "8e-4", "--out", tmp_path / "run")
    assert rates == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4])


def test_a_finished_run_is_never_overwritten(tmp_path):
    facts = dict(task="sketch")
    wanted = tmp_path / "run"
    assert choose_out(wanted, facts) == wanted
    wanted.mkdir()
    write_json(facts, wanted / "args.json")
    assert choose_out(wanted, facts) == wanted                    # unfinished: goes on
    assert choose_out(wanted, dict(task="other")) == tmp_path / "run-2"
    (wanted / "bps.safetensors").touch()
    assert choose_out(wanted, facts) == tmp_path / "run-2"
    (wanted / "args.json").unlink()                                     # a copy, or another's
    assert choose_out(wanted, facts) == tmp_path / "run-2"


def test_a_users_folder_of_pairs_can_be_trained_on(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    lines = []
    for i, pair in enumerate(load_pairs("sketch", "train")[:40]):
        pair.open_cond().resize((90, 70)).save(tmp_path / "source" / f"{i}.png")
        pair.open_image().resize((90, 70)).save(tmp_path / "target" / f"{i}.png")
        lines.append(json.dumps(dict(source=f"source/{i}.png", target=f"target/{i}.png",
                                     prompt=pair.prompts[0])))
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    run(train, monkeypatch, *SHORT, "--data", tmp_path, "--size", 48, "--cache",
        tmp_path / "cache", "--out", tmp_path / "run")
    assert load_bps(tmp_path / "run" / "bps.safetensors").metadata["size"] == 48


def test_validation_tells_a_steered_model_from_the_base():
    base = sample.load_base(options.BASE)
    cache = LatentCache(load_pairs("sketch", "val")[:4], "sketch", 64, base)
    bps = BPS(config_for(base.unet.config, 1, base.vae.factor))
    numbers = report.validate(base, cache, bps)
    assert numbers["gain"][0] == 0 and numbers["gap"][0] == 0       # zero ports: the base itself
    for port in bps.zero_blocks[1:2]:
        torch.nn.init.normal_(port.weight, std=0.1)
    numbers = report.validate(base, cache, bps)
    assert numbers["gain"][0] < 0 and numbers["gap"][0] != 0        # noise in the ports: worse


def test_the_sheet_shows_its_columns_in_order(tmp_path):
    columns = [torch.full((3, 3, 16, 16), value) for value in (-1.0, -0.5, 0.0, 0.5)]
    report.contact_sheet(columns, "abcd", ["x", "y", "z"], tmp_path / "s.png")
    sheet = Image.open(tmp_path / "s.png").convert("L")
    assert [sheet.getpixel((k * 130 + 64, 80)) for k in range(4)] == [0, 64, 128, 191]


@pytest.mark.parametrize("module, arguments, message", [
    (train, ["--base", "tests"], "tests: no model_index.json in it"),
    (train, ["--base", "model.ckpt"], "model.ckpt is a pickle"),
    (sample, ["--cond", "README.md"], "README.md: cannot be read as an image"),
    (sample, ["--bps", "tiny"], "tiny is a folder"),
    (train, ["--data", "tests"], "tests: no pairs; allowed are"),
    (train, ["--base", "nowhere.safetensors"], "nowhere.safetensors is missing"),
    (train, ["--size", "60"], "multiples of 16"),
    (sample, ["--cond", "nowhere.png"], "nowhere.png"),
    (sample, ["--bps", "README.md"], "README.md can't be read as a safetensors file"),
])
def test_bad_input_is_named_and_nothing_is_written(module, arguments, message, tmp_path,
                                                   monkeypatch, bps_file):
    if module is sample and "--bps" not in arguments:
        arguments = ["--bps", bps_file, *arguments]
    monkeypatch.chdir(options.ROOT)
    with pytest.raises(UserError, match=message):
        run(module, monkeypatch, *arguments, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments, message", [
    (["train.py", "--data", "nowhere"], "nowhere: no such folder"),
    (["sample.py", "--steps", "0"], "allowed are 1 to 999"),
])
def test_a_user_error_is_one_line_with_exit_code_2(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, *arguments, "--out", tmp_path / "x"],
                          cwd=options.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


# ---- numbers that are not finite -----------------------------------------------------------

def poisoned(part, folder):
    """Returns a copy of the embedded base in which one number of a network is not finite."""
    shutil.copytree(options.BASE, folder)
    file, = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[::7] = float("nan")
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("part, words", [
    ("unet", "U-Net"), pytest.param("vae", "autoencoder", marks=pytest.mark.slow),
    pytest.param("text_encoder", "text encoder", marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_named_in_training_and_sampling(part, words, tmp_path,
                                                                        monkeypatch):
    base = poisoned(part, tmp_path / "base")
    message = f"{base}: the weights of its {words} hold numbers that are not finite"
    with pytest.raises(UserError, match=message):
        run(train, monkeypatch, *SHORT, "--base", base, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "bps.safetensors").exists()
    with pytest.raises(UserError, match=message):
        run(sample, monkeypatch, "--base", base, "--steps", "2", "--n", "1", "--out",
            tmp_path / "pictures")
    assert not list((tmp_path / "pictures").glob("*.png"))


def test_a_bps_whose_weights_are_not_finite_is_named(tmp_path, monkeypatch, bps_file):
    bps = load_bps(bps_file)
    bps.zero_blocks[1].weight.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="zero_blocks.1.weight is not finite .* smaller --lr"):
        save_bps(bps, tmp_path / "bps.safetensors", bps.metadata)
    assert not list(tmp_path.iterdir())
    tensors, metadata = load_file(bps_file), safe_open(bps_file, "pt").metadata()
    tensors["zero_blocks.1.weight"].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "bps.safetensors", metadata)
    with pytest.raises(UserError, match="bps.safetensors: its weights hold numbers that are not"):
        run(sample, monkeypatch, "--bps", tmp_path / "bps.safetensors", "--steps", "2", "--n", "1",
            "--out", tmp_path / "pictures")


def test_a_diverging_run_ends_in_one_line_and_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "run"
    true_loss, losses = train.F.mse_loss, []

    def overflowing_loss(eps, target):
        losses.append(true_loss(eps, target))
        return losses[-1] * (float("inf") if len(losses) == 4 else 1)

    monkeypatch.setattr(train.F, "mse_loss", overflowing_loss)
    message = "step 4: the loss or its gradient is not finite, most likely because --lr 0.01 is too"
    with pytest.raises(UserError, match=message):
        run(train, monkeypatch, *SHORT, "--lr", "0.01", "--out", out)
    for name in ("checkpoint.safetensors", "bps.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(out / name).values())
    monkeypatch.setattr(train.F, "mse_loss", true_loss)
    run(train, monkeypatch, *SHORT, "--lr", "0.01", "--out", out)        # goes on from step 2
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_picture_whose_latent_runs_over_is_named(monkeypatch):
    base = sample.load_base(options.BASE)
    base.vae.quant_conv.weight.mul_(1e9)
    pairs = load_pairs("sketch", "val")[:2]
    with pytest.raises(UserError, match=f"{pairs[0].name}: the autoencoder, .* no finite latent"):
        LatentCache(pairs, "sketch", 64, base)


def test_weights_whose_numbers_run_over_are_no_fault_of_the_options(tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(options.BASE, base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: torch.full_like(tensor, 6e4) if "conv_in" in name else tensor
               for name, tensor in load_file(file).items()}
    tensors["conv_out.weight"] = torch.full_like(tensors["conv_out.weight"], 6e4)
    save_file({name: tensor.float() * 1e30 if name == "conv_out.weight" else tensor
               for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=f"{base}: its own validation loss is not finite"):
        run(train, monkeypatch, *SHORT, "--base", base, "--out", tmp_path / "run")
    with pytest.raises(UserError, match=f"the numbers of {base} overflowed; .* or another --base"):
        run(sample, monkeypatch, "--bps", "none", "--base", base, "--steps", "2", "--n", "1",
            "--out", tmp_path / "pictures")


def test_a_saturated_picture_is_an_error(tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(options.BASE, base)
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.weight"].fill_(6e4)
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{base}: the numbers of its autoencoder overflowed"):
        run(sample, monkeypatch, "--bps", "none", "--base", base, "--steps", "2", "--n", "1",
            "--out", tmp_path / "pictures")
    assert not list((tmp_path / "pictures").glob("*.png"))
