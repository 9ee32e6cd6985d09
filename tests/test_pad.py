"""The pad's server: it draws as sample.py does, the newest request first, for its own page only."""
import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import references
from PIL import Image, ImageColor, ImageDraw

import sample
from inputs.files import fingerprint
from inputs.options import BASE, DEFAULT_BPS, DEFAULT_DRAWING, ROOT
from pad import __main__ as pad
from pad import studio
from tiny.tasks import CLASSES
from weights import UserError

SETTINGS = dict(task="sketch", prompt="a red apple", negative_prompt="", seed="3", steps="2",
                guidance="3", sampler="dpm++2m", strength="1")


def url_of(file):
    """The data URL of a file."""
    return "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()


DRAWING = url_of(DEFAULT_DRAWING)
DRAWN = SETTINGS | dict(drawing=DRAWING)


def studio_args(out):
    """A pad's arguments for the embedded base."""
    return SimpleNamespace(base=BASE, tokenizer=None, vae=None, prediction_type=None, dtype="fp32",
                           device="cpu", out=out)


@pytest.fixture(scope="module")
def layout_bps(tmp_path_factory):
    """A BPS file for boxes, with random ports."""
    return references.write_random_bps(tmp_path_factory.mktemp("layout") / "bps.safetensors",
                                       "layout", classes={c: name for name, c in CLASSES.items()})


@contextlib.contextmanager
def serving(out, *files):
    """A running server of the embedded base with BPS files; it saves to `out`."""
    server = pad.make_server(studio.Studio(studio_args(out), files), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(layout_bps, tmp_path_factory):
    """A server with a BPS for sketch and layout; it saves to `.studio.args.out`."""
    with serving(tmp_path_factory.mktemp("pictures"), DEFAULT_BPS, layout_bps) as server:
        yield server


@pytest.fixture
def ask(server):
    """A function that sends a request and returns (status, lines of its answer)."""
    def send(path, content=None, **headers):
        if path == "/draw" and isinstance(content, dict):
            content = dict(number=server.studio.newest + 1) | content
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        if content is None:
            connection.request("GET", path, headers=headers)
        else:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        is_json = answer.headers["Content-Type"] != "text/html; charset=utf-8"
        return answer.status, [json.loads(line) for line in text.splitlines()] if is_json else text

    return send


def image_of(url):
    """The image in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def pictures_of(lines, name="picture"):
    """The images in the lines of an answer, as bytes."""
    return [image_of(line[name]).tobytes() for line in lines if name in line]


# ---- drawing and saving --------------------------------------------------------------------

@pytest.mark.parametrize("change", [dict(drawing=DRAWING), dict(drawing=DRAWING, strength="0.6"),
                                    dict(seed="4")], ids=["drawing", "weaker", "no drawing"])
def test_a_saved_picture_is_drawn_again_by_sample_py(change, server, ask, run_script, tmp_path):
    _, lines = ask("/draw", SETTINGS | change)
    prior, = pictures_of(lines, "prior") or [None]
    expected, = pictures_of(lines) or [prior]
    assert "seconds" in lines[-1] and (expected == prior) == ("drawing" not in change)
    _, (saved,) = ask("/save", dict(number=server.studio.newest))
    file, *drawings = map(Path, saved["files"])
    assert Image.open(file).tobytes() == expected
    for drawing in drawings:
        assert Image.open(drawing).tobytes() == Image.open(DEFAULT_DRAWING).tobytes()
    assert len(drawings) == ("drawing" in change)
    assert saved["command"] == f"python sample.py --from {file}"
    run_script(sample, "--from", file, "--out", tmp_path)
    again, = tmp_path.glob("000?.png")
    assert Image.open(again).tobytes() == expected


def test_progress_counts_the_steps_of_steered_picture_and_prior(ask):
    for seed, steps in (("5", 4), ("5", 2)):                # the second time the prior is known
        _, lines = ask("/draw", DRAWN | dict(seed=seed, strength=str(steps / 4)))
        shares = [line["progress"] for line in lines if "progress" in line]
        assert shares == [(i + 1) / steps for i in range(steps)]


def test_a_strip_goes_from_prior_to_posterior_and_is_not_saved(server, ask):
    _, lines = ask("/draw", DRAWN)
    last = server.studio.last
    _, strip = ask("/draw", DRAWN | dict(strip=True))
    images = pictures_of(strip)
    assert [line["strength"] for line in strip if "picture" in line] == list(studio.STRIP)
    assert images[0] == pictures_of(lines, "prior")[0] and images[-1] == pictures_of(lines)[0]
    assert len(set(images)) == 5 and server.studio.last is last


def test_a_preview_has_few_steps_and_no_prior_and_is_not_saved(server, ask):
    ask("/draw", DRAWN)
    last = server.studio.last
    _, lines = ask("/draw", DRAWN | dict(seed="11", preview=True, steps="20"))
    assert len(pictures_of(lines)) == 1 and not pictures_of(lines, "prior")
    assert sum("progress" in line for line in lines) == studio.PREVIEW_STEPS
    assert server.studio.last is last


def test_the_newest_request_wins_between_two_steps(server, ask):
    number, sent, answers = server.studio.newest + 1, [], []
    with ThreadPoolExecutor() as threads:
        def send(line):
            """Ask for another picture after the first step, and wait until that has arrived."""
            sent.append(line)
            if len(sent) == 1:
                answers.append(threads.submit(ask, "/draw", SETTINGS | dict(seed="9")))
                while server.studio.newest == number:
                    time.sleep(0.01)

        server.studio.draw(DRAWN | dict(number=number, steps="20"), send)
        status, lines = answers[0].result(30)
    assert sent[-1] == {"dropped": True} and sum("progress" in line for line in sent) == 1
    assert status == 200 and "seconds" in lines[-1]
    # the newest has the highest number, in whatever order they arrive
    assert ask("/draw", SETTINGS | dict(number=number))[1] == [{"dropped": True}]


def test_only_the_last_picture_can_be_saved(server, ask):
    ask("/draw", DRAWN)
    number = server.studio.newest
    ask("/draw", DRAWN | dict(seed="12"))                   # of another page
    before = list(server.studio.args.out.iterdir())
    status, (line,) = ask("/save", dict(number=number))
    assert status == 400 and "this picture is gone. Draw it again" in line["error"]
    assert list(server.studio.args.out.iterdir()) == before
    assert ask("/save", {})[0] == 400


def test_a_saved_picture_names_the_bps_that_drew_even_if_replaced(bps_file, tmp_path):
    file = Path(shutil.copy(bps_file, tmp_path))
    own = studio.Studio(studio_args(tmp_path / "out"), [file])
    own.draw(DRAWN | dict(number=1), Mock())
    shutil.copy(DEFAULT_BPS, file)
    saved = own.save(dict(number=1))
    with Image.open(saved["files"][0]) as image:
        assert json.loads(image.text["files"])["bps 1"] == fingerprint(bps_file)


def test_a_trained_bps_that_does_not_fit_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("sketch", "sketch-2", "sketch-old", "layout", "sketch-30"):
        file = Path("runs") / name / "bps.safetensors"
        file.parent.mkdir(parents=True)
        file.write_text("no")
        os.utime(file, (0, len(name)))
    Path("runs/sketch-30/checkpoint.safetensors").touch()           # it is unfinished
    assert pad.trained_files() == [Path("runs/sketch-2/bps.safetensors"),
                                   Path("runs/layout/bps.safetensors")]
    own = studio.Studio(studio_args(tmp_path), [DEFAULT_BPS], pad.trained_files())
    assert own.networks["sketch"][0] == DEFAULT_BPS and list(own.networks) == ["sketch"]
    assert capsys.readouterr().err.count("note: not used: runs/") == 2


def test_a_picture_is_opened_as_a_condition_with_the_guards_of_inputs(ask, tmp_path):
    light_on_dark = Image.new("L", (90, 60), 0)
    ImageDraw.Draw(light_on_dark).line((20, 10, 70, 50), fill=255, width=3)
    light_on_dark.save(tmp_path / "dark.png")
    _, (line,) = ask("/open", dict(task="sketch", file=url_of(tmp_path / "dark.png")))
    image = image_of(line["picture"])
    assert image.size == (256, 256) and image.getpixel((5, 128)) == (255, 255, 255)
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (9, 9), "#123456").save(tmp_path / "unknown.png")
    for task, name, message in (("sketch", "bomb.png", "picture must have at most"),
                                ("layout", "unknown.png", "picture: class #123456 is unknown")):
        status, (line,) = ask("/open", dict(task=task, file=url_of(tmp_path / name)))
        assert status == 400 and message in line["error"]
    assert ask("/open", dict(task="sketch"))[0] == 400


def test_the_noise_of_a_privacy_browser_does_not_change_a_class(server, ask, tmp_path):
    boxes = np.full((64, 64, 3), ImageColor.getrgb(CLASSES["ground"]))
    boxes[8:40, 20:50] = ImageColor.getrgb(CLASSES["hair"])
    pictures = []
    for noise in (0, np.random.default_rng(0).integers(-3, 4, boxes.shape)):
        image = Image.fromarray((boxes + noise).clip(0, 255).astype(np.uint8))
        image.save(tmp_path / "boxes.png")
        _, lines = ask("/draw", SETTINGS | dict(task="layout", drawing=url_of(
            tmp_path / "boxes.png")))
        pictures += pictures_of(lines)
    assert len(pictures) == 2 and pictures[0] == pictures[1]
    _, (saved,) = ask("/save", dict(number=server.studio.newest))
    assert (np.asarray(Image.open(saved["files"][1])) == boxes).all()


# ---- mistakes, and other sites -------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(steps="abc"), "--steps: must be a whole number in [1, 999], got abc"),
    (dict(strength="1e9"), "--strength: must be a number in [-1000, 1000], got 1e9"),
    (dict(task="artistic"), "task must be one of sketch, layout, got artistic"),
    (dict(task=["sketch"]), "task must be one of"), (dict(number="1"), "number must be an integer"),
    (dict(drawing="data:image/png;base64,AAAA"), "picture can't be read as an image"),
    (dict(drawing="nonsense"), "must be a data URL"), (dict(drawing="data:,\xe4"), "a data URL"),
    (dict(task="layout", drawing=DRAWING), "is unknown. This BPS was trained on")], ids=str)
def test_a_mistake_in_a_request_is_one_line(ask, change, message):
    _, lines = ask("/draw", DRAWN | change)
    assert message in lines[-1]["error"] and "\n" not in lines[-1]["error"]


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "MemoryError"), (RuntimeError("it broke\nin two lines"), "it broke")], ids=str)
def test_a_crash_of_one_request_does_not_end_the_pad(ask, monkeypatch, capsys, error, message):
    with monkeypatch.context() as patch:
        patch.setattr(studio, "draw", Mock(side_effect=error))
        assert ask("/draw", DRAWN)[1] == [{"error": message}]
    assert f"error: {type(error).__name__}: {message}" in capsys.readouterr().err
    assert "seconds" in ask("/draw", SETTINGS)[1][-1]


@pytest.mark.parametrize("headers", [
    dict(Host="pad.example"), dict(Origin="http://pad.example"), dict(Origin="null"),
    dict(Host="127.0.0.1:1", Origin="http://127.0.0.1:2"), {"Sec-Fetch-Site": "cross-site"}],
    ids=str)
def test_a_page_of_another_site_is_refused(ask, headers):
    large = b" " * 2**23                        # it is read, so that the refusal arrives
    for path, content in (("/", None), ("/setup", None), ("/draw", SETTINGS), ("/save", large)):
        status, (line,) = ask(path, content, **headers)
        assert status == 403 and "own page" in line["error"]


def test_a_tunnel_may_have_a_port_of_its_own(server, ask):
    status, _ = ask("/setup", Host="localhost:9000", Origin="http://localhost:9000")
    assert status == 200
    _, (line,) = ask("/setup", Host="computer:9000")
    assert f"Open http://127.0.0.1:{server.server_port} on the pad's computer" in line["error"]


def test_a_connection_that_is_reset_early_prints_nothing(server, ask, capsys):
    connection = socket.create_connection(server.server_address)
    connection.sendall(b"GET / HT")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()                                      # sends a reset
    time.sleep(0.3)
    assert ask("/setup")[0] == 200 and capsys.readouterr().err == ""


def test_the_pads_own_page_gets_its_setup(server, ask):
    own = f"http://localhost:{server.server_port}"
    status, page = ask("/", **{"Origin": own, "Host": own.removeprefix("http://"),
                               "Sec-Fetch-Site": "same-origin"})
    assert status == 200 and page == (ROOT / "pad" / "page.html").read_text(encoding="utf-8")
    _, (setup,) = ask("/setup")
    assert setup["tasks"]["sketch"]["file"] == str(DEFAULT_BPS)
    assert len(setup["tasks"]["sketch"]["examples"]) == studio.EXAMPLES
    assert setup["tasks"]["layout"]["classes"][CLASSES["hair"]] == "hair"
    assert setup["tasks"]["layout"]["ground"] == "#000000"
    assert setup["tasks"]["artistic"] == {"command": "python train.py --task artistic"}
    sampler, steps, guidance = sample.DEFAULTS
    assert setup["defaults"] == dict(prompt=sample.DEFAULT_PROMPT, negative_prompt="", seed=0,
                                     steps=steps, guidance=guidance, sampler=sampler)
    assert ask("/nowhere")[0] == ask("/nowhere", {})[0] == 404


@pytest.mark.parametrize("content, headers", [
    (b"{}", {"Content-Type": "text/plain"}), (b"{", {}), (b"[]", {}),
    (b"", {"Content-Length": "-5"}), (b" " * pad.MOST_BYTES + b"{}", {})],
    ids=["type", "syntax", "list", "length", "too large"])
def test_a_body_that_is_no_request_is_refused(ask, content, headers):
    status, (line,) = ask("/draw", content, **headers)
    assert status == 400 and "a request must be a JSON object" in line["error"]


def test_a_port_in_use_is_named(server):
    with pytest.raises(UserError, match=f"--port {server.server_port} can't be used .*another"):
        pad.make_server(None, server.server_port)


@pytest.mark.parametrize("end, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, -signal.SIGHUP, marks=pytest.mark.slow)])
def test_the_pad_ends_at_once_and_leaves_no_file_behind(end, code, tmp_path):
    """By Ctrl-C, or because its terminal is closed, while it draws."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "pad", "--port", "0", "--out", tmp_path], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items()
             if "DISPLAY" not in name and "CACHE_DIR" not in name}      # of PyTorch's compiler
        | dict(TMPDIR=str(scratch)),
        # background jobs ignore Ctrl-C, and nohup's ignore SIGHUP
        preexec_fn=lambda: signal.signal(end, signal.SIG_DFL))
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        body = json.dumps(DRAWN | dict(number=1, steps="900"))
        connection.request("POST", "/draw", body, {"Content-Type": "application/json"})
        connection.getresponse().readline()             # it is drawing
        process.send_signal(end)
        assert process.wait(5) == code and not list(scratch.iterdir())
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()
