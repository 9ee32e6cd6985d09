"""A user's mistake is one line on stderr and exit code 2, in every script; nothing is written."""
import shlex
import shutil

import pytest

import sample
import train
from inputs.options import DEFAULT_DRAWING, MAX_SEEDS
from pad import __main__ as pad
from studies import base as base_study
from studies import figures, rivals, toy
from tiny import pretrain

LAST_SEED = MAX_SEEDS - 1
# Run in the folder of the fixture below.
ERRORS = [
    # values of a wrong kind or out of range
    (train, "--steps 0", "--steps: must be a whole number in [1, 1000000], got 0"),
    (train, f"--batch 1{'0' * 22}",
     f"--batch: must be a whole number in [1, 1000000], got 1{'0' * 22}"),
    (train, "--lr -1", "--lr: must be a number in [1e-09, 1], got -1"),
    (train, "--seed -3", "--seed: must be a whole number in [0, 2147483647], got -3"),
    (train, "--device warp", "--device: warp can't be used"),
    (train, "--size 60", "--size must be a multiple of 16 for this base, got 60"),
    (train, "--size 100000", "--size must have at most 16,777,216 pixels, got 100000x100000"),
    (train, "--batch 1 --accumulate 2",
     "--batch must be at least processes x --accumulate = 2, got 1"),
    (train, "--weights a,b", "--weights: must be head-heavy, flat or numbers in [0, 10000)"),
    (train, "--weights 0,0", "not all 0, as in 16,8,4,16,1, got 0,0"),
    (train, "--weights 1,2", "port weights must be 5 numbers for this base"),
    (train, "--weights 1,0,0,0,0", "at least one of the last three not 0, got 1, 0, 0, 0, 0"),
    (sample, "--steps 1000", "--steps: must be a whole number in [1, 999], got 1000"),
    (sample, "--n 0", "--n: must be a whole number in [1, 10000], got 0"),
    (sample, "--size 64x", "--size: must be WIDTHxHEIGHT or one number, got 64x"),
    (sample, "--size 30x64", "--size must be multiples of 4 for this base, got 30x64"),
    (sample, "--strength nan", "--strength: must be a number in [-1000, 1000], got nan"),
    (sample, "--guidance 1e30", "--guidance: must be a number in [-1000, 1000], got 1e30"),
    (sample, "--denoise 0", "--denoise: must be a number in [0.001, 1], got 0"),
    (sample, "--window 0.6 1.4", "--window: must be a number in [0, 1], got 1.4"),
    (sample, "--window 0.6 0.4", "--window must have START < END, got 0.6 0.4"),
    (sample, "--window 0.6", "--window must be pairs of START END, got 1 numbers"),
    (sample, "--prompt --n 1", "expected one argument. Write --option=VALUE"),
    (sample, "--prompt caf\udce9", "--prompt: must be UTF-8, got 'caf\\udce9'"),
    (sample, f"--seed {LAST_SEED} --n 2", "--seed plus --n must be at most 2147483648"),
    (pad, "--port 99999", "--port: must be a whole number in [0, 65535], got 99999"),
    (toy, "bits --effort 0", "--effort must be in (0, 1], got 0"),
    (pretrain, "--stage vae --minutes 0", "--minutes must be greater than 0, got 0"),
    (pretrain, "--stage clip --init", "--init must be used with --stage vae or unet, got clip"),
    (figures, "nonsense", "figure: invalid choice: 'nonsense'"),
    # options that are given twice, and options that need or exclude others
    (train, "--data a --data=b", "--data must be given once"),
    (sample, "--cond a --seed 1 --cond b", "--cond must be given once. Write its values after one"),
    (rivals, "--done --done", "--done must be given once"),
    (train, "--extract", "--extract needs --data"),
    (train, "--check-data", "--check-data needs --data"),
    (train, "--default-prompt -cat", "--default-prompt needs --data"),
    (train, "--from-base 20 --base empty", "--data is missing. Give a text file with a prompt per"),
    (train, "--data empty --extract --task layout",
     "--extract must be used with --task sketch or artistic, got layout"),
    (sample, "--denoise 0.5", "--denoise needs a picture to start from. Give --init FILE"),
    (sample, "--bps none x", "--bps none can't be combined with files"),
    (sample, "--bps none --mask a.png", "--mask needs a --bps FILE, got none"),
    (sample, "--bps none --strength 0.5", "--strength needs a --bps FILE, got none"),
    (sample, "--bps x y", "--cond is missing. Give one per --bps"),
    (sample, "--cond a b", "--cond must have one value, or one per --bps (1), got 2"),
    (sample, "--bps x y --cond a --strength 1 2 3",
     "--strength must have one value, or one per --bps (2), got 3"),
    (sample, "--guidance 1 --negative-prompt x", "--guidance must not be 1"),
    (pad, "--base a.md", "--base a.md needs --bps"),
    (rivals, "--steps 5", "--steps: invalid choice: 5"),
    (figures, "strip --bps a b", "--bps must be one file for strip, got 2"),
    # files and folders to read
    (train, "--base empty", "empty must be a Stable Diffusion folder"),
    (train, "--base model.ckpt", "model.ckpt is a pickle"),
    (train, "--base nowhere.safetensors", "nowhere.safetensors is missing"),
    (train, "--data nowhere.zip", "must be a folder of pairs, got nowhere.zip. Unpack it"),
    (train, "--data empty", "empty has no pairs. It must contain prompt.json"),
    (sample, "--bps a.md", "a.md is not a complete safetensors file"),
    (sample, "--cond a.md", "a.md can't be read as an image"),
    (sample, "--cond empty", "--cond empty has no images"),
    (sample, "--cond long", "--cond long: names must have at most 200 bytes, got xxx"),
    (sample, "--init nowhere.png", "nowhere.png is missing"),
    (sample, "--mask nowhere.png", "nowhere.png is missing"),
    (sample, f"--from '{DEFAULT_DRAWING}'", "drawing.png: does not say how it was drawn"),
    (pad, "--bps nowhere", "nowhere is missing"),
    (rivals, "--done --record a.jsonl", "a.jsonl has no results of these rows"),
    # folders to write
    (train, "--out a.md/run", "--out must be a folder, got a.md/run"),
    (train, "--cache a.md", "--cache must be a folder, got a.md"),
    (train, "--out caf\udce9", "--out: must be UTF-8, got 'caf\\udce9'"),
    (train, "--data empty --extract --out empty/x", "--out must be outside empty, whose images"),
    (train, "--data own --out own/images", "--out must be outside own/images, whose images"),
    (sample, "--out a.md", "--out must be a folder, got a.md"),
    (sample, "--cond empty --out empty/x", "--out must be outside empty, whose images"),
    (pad, "--out a.md", "--out must be a folder, got a.md"),
    (rivals, "--out a.md", "--out must be a folder, got a.md"),
    (base_study, "--out a.md", "--out must be a folder, got a.md"),
    (figures, "strip --out a.md", "--out must be a folder, got a.md"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: two empty ones, `a.md`, and `long` with a name of 246 bytes."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "long", "own/images"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a.md").write_text("no image, and no weights")
    shutil.copy(DEFAULT_DRAWING, tmp_path / "long" / f"{'x' * 246}.png")
    return tmp_path


@pytest.mark.parametrize("module, arguments, message", ERRORS)
def test_a_mistake_is_one_line_and_nothing_is_written(module, arguments, message, run_script,
                                                      refused, folder):
    before = sorted(folder.rglob("*"))
    assert message in refused(run_script, module, *shlex.split(arguments))
    assert sorted(folder.rglob("*")) == before
