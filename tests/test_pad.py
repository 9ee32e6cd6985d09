"""The pad's server: it draws as sample.py does, the newest request first, for its own page only."""
import base64
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import references
from PIL import Image, ImageDraw

import sample
from inputs.options import BASE
from inputs.sample_options import DEFAULT_BPS, DEFAULT_DRAWING
from pad import __main__ as pad
from pad import studio
from tiny.tasks import CLASSES

ROOT = Path(__file__).parent.parent
SETTINGS = dict(task="sketch", prompt="a red apple", negative_prompt="", seed="3", steps="2",
                guidance="3", sampler="dpm++2m", strength="1")


def url_of(file):
    """Returns the data URL of a file."""
    return "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()


DRAWING = url_of(DEFAULT_DRAWING)


@pytest.fixture(scope="module")
def layout_bps(tmp_path_factory):
    """A BPS file for boxes, which steers at random."""
    file = tmp_path_factory.mktemp("layout") / "bps.safetensors"
    return references.write_random_bps(file, "layout", classes={
        colour: name for name, colour in CLASSES.items()})


def studio_args(out):
    """Returns a pad's arguments for the embedded base."""
    return SimpleNamespace(base=BASE, tokenizer=None, vae=None, prediction_type=None, dtype="fp32",
                           device="cpu", out=out)


@pytest.fixture(scope="module")
def server(layout_bps, tmp_path_factory):
    """A running server of the embedded base; `.studio.args.out` is where it saves."""
    args = studio_args(tmp_path_factory.mktemp("pictures"))
    server = pad.make_server(studio.Studio(args, [DEFAULT_BPS, layout_bps]), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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


def pictures_of(lines, name="picture"):
    """Returns the images that lines of an answer hold."""
    return [Image.open(io.BytesIO(base64.b64decode(line[name].split(",")[1])))
            for line in lines if name in line]


def test_a_drawing_is_drawn_beside_the_prior_and_saved_as_sample_py_draws_it(
        server, ask, monkeypatch, tmp_path):
    for strength in ("1", "0.6"):
        status, lines = ask("/draw", SETTINGS | dict(drawing=DRAWING, strength=strength))
        assert status == 200
        (picture,), (prior,) = pictures_of(lines), pictures_of(lines, "prior")
        assert picture.tobytes() != prior.tobytes()
        assert "seconds" in lines[-1]
        status, (saved,) = ask("/save", dict(number=server.studio.newest))
        file, drawing = map(Path, saved["files"])
        assert Image.open(file).tobytes() == picture.tobytes()
        assert drawing.read_bytes() == DEFAULT_DRAWING.read_bytes()
        monkeypatch.setattr(sys, "argv", ["sample.py", "--from", str(file), "--out",
                                          str(tmp_path / strength)])
        sample.main()
        again, = (tmp_path / strength).glob("0003.png")
        assert Image.open(again).tobytes() == picture.tobytes()
    shares = [line["progress"] for line in lines if "progress" in line]
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 2   # the prior is known


def test_what_is_saved_without_a_drawing_is_the_prior(server, ask, monkeypatch, tmp_path):
    _, lines = ask("/draw", SETTINGS | dict(seed="4"))
    assert not pictures_of(lines)
    _, (saved,) = ask("/save", dict(number=server.studio.newest))
    file, = saved["files"]
    assert saved["command"] == f"python sample.py --from {file}"
    monkeypatch.setattr(sys, "argv", ["sample.py", "--from", file, "--out", str(tmp_path)])
    sample.main()
    assert Image.open(tmp_path / "0004.png").tobytes() == pictures_of(lines, "prior")[0].tobytes()


def test_a_strip_goes_from_the_prior_to_the_posterior_and_is_not_what_is_saved(server, ask):
    _, lines = ask("/draw", SETTINGS | dict(drawing=DRAWING))
    last = server.studio.last
    _, strip = ask("/draw", SETTINGS | dict(drawing=DRAWING, strip=True))
    images = [image.tobytes() for image in pictures_of(strip)]
    assert [line["strength"] for line in strip if "picture" in line] == list(studio.STRIP)
    assert images[0] == pictures_of(lines, "prior")[0].tobytes()
    assert images[-1] == pictures_of(lines)[0].tobytes()
    assert len(set(images)) == 5 and server.studio.last is last


def test_the_newest_request_wins_and_the_older_one_is_dropped_between_two_steps(server, ask):
    begun, go_on, sent = threading.Event(), threading.Event(), []

    def send(line):
        sent.append(line)
        begun.set()
        go_on.wait(30)

    number, answers = server.studio.newest + 1, []
    old = threading.Thread(target=server.studio.draw, args=(
        SETTINGS | dict(number=number, drawing=DRAWING, steps="20"), send))
    old.start()
    assert begun.wait(30)
    new = threading.Thread(target=lambda: answers.append(ask("/draw", SETTINGS | dict(seed="9"))))
    new.start()
    while server.studio.newest == number:
        time.sleep(0.01)
    go_on.set()
    for thread in (old, new):
        thread.join(30)
    assert sent[-1] == {"dropped": True} and sum("progress" in line for line in sent) == 1
    (status, lines), = answers
    assert status == 200 and "seconds" in lines[-1]
    # the newest is the one of the highest number, in whatever order they come
    assert ask("/draw", SETTINGS | dict(number=number))[1] == [{"dropped": True}]


def test_a_preview_has_few_steps_and_no_prior_and_is_not_saved(server, ask):
    ask("/draw", SETTINGS | dict(drawing=DRAWING))
    last = server.studio.last
    _, lines = ask("/draw", SETTINGS | dict(drawing=DRAWING, seed="11", preview=True, steps="20"))
    assert len(pictures_of(lines)) == 1 and not pictures_of(lines, "prior")
    assert sum("progress" in line for line in lines) == studio.PREVIEW_STEPS
    assert server.studio.last is last


def test_a_picture_is_saved_only_if_it_is_the_last_one(server, ask):
    ask("/draw", SETTINGS | dict(drawing=DRAWING))
    number = server.studio.newest
    ask("/draw", SETTINGS | dict(drawing=DRAWING, seed="12"))       # of another page
    before = list(server.studio.args.out.iterdir())
    status, (line,) = ask("/save", dict(number=number))
    assert status == 400 and "no longer there" in line["error"]
    assert list(server.studio.args.out.iterdir()) == before
    assert ask("/save", {})[0] == 400


def test_a_record_is_of_the_file_that_drew_even_if_it_was_replaced(layout_bps, tmp_path, capsys):
    file = tmp_path / "bps.safetensors"
    shutil.copy(layout_bps, file)
    own = studio.Studio(studio_args(tmp_path / "out"), [file])
    boxes = Image.new("RGB", (64, 64), "#000000")
    boxes.paste("#d62728", (8, 8, 40, 40))
    boxes.save(tmp_path / "boxes.png")
    own.draw(SETTINGS | dict(task="layout", number=1, drawing=url_of(tmp_path / "boxes.png")),
             lambda line: None)
    digest = own.fingerprint(file)
    shutil.copy(DEFAULT_BPS, file)
    saved = own.save(dict(number=1))
    with Image.open(saved["files"][0]) as image:
        assert json.loads(image.text["files"])["bps 1"] == digest


def test_a_trained_bps_that_does_not_fit_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("sketch", "sketch-2", "sketch-old", "layout"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
        (tmp_path / "runs" / folder / "bps.safetensors").write_text("no")
        os.utime(tmp_path / "runs" / folder / "bps.safetensors", (0, len(folder)))
    shutil.copytree(tmp_path / "runs" / "sketch", tmp_path / "runs" / "sketch-3")
    (tmp_path / "runs" / "sketch-3" / "checkpoint.safetensors").touch()     # it is unfinished
    assert pad.trained_files() == [Path("runs/sketch-2/bps.safetensors"),
                                   Path("runs/layout/bps.safetensors")]
    own = studio.Studio(studio_args(tmp_path), [DEFAULT_BPS], pad.trained_files())
    assert own.networks["sketch"][0] == DEFAULT_BPS and list(own.networks) == ["sketch"]
    assert capsys.readouterr().err.count("note: not used: runs/") == 2


@pytest.mark.parametrize("change, words", [
    (dict(steps="abc"), "--steps: invalid int value"), (dict(steps="0"), "--steps 0: allowed are"),
    (dict(sampler="x"), "--sampler: invalid choice"), (dict(task="artistic"), "task artistic: no"),
    (dict(seed="-1"), "must be in 0..2147483647, got -1"), (dict(strength="1e9"), "--strength 1"),
    (dict(drawing="data:image/png;base64,AAAA"), "drawing: cannot be read as an image"),
    (dict(drawing="nonsense"), "not a data URL"), (dict(drawing="data:,\xe4"), "not a data URL"),
    (dict(number="1"), "number 1: give a whole number"), (dict(task=["sketch"]), "no BPS for it"),
    (dict(task="layout", drawing=DRAWING), "is unknown; this BPS was trained on")])
def test_a_mistake_in_a_request_is_one_line_and_the_next_request_draws(ask, change, words):
    status, lines = ask("/draw", SETTINGS | dict(drawing=DRAWING) | change)
    assert status == 200 and words in lines[-1]["error"] and "\n" not in lines[-1]["error"]
    assert "Traceback" not in json.dumps(lines)
    assert "seconds" in ask("/draw", SETTINGS)[1][-1]


def test_a_crash_of_one_request_harms_no_other(ask, monkeypatch, capsys):
    def crash(*_):
        raise RuntimeError("something broke\nin two lines")

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(studio, "draw_job", out_of_memory)
        assert ask("/draw", SETTINGS | dict(drawing=DRAWING))[1] == [{"error": "MemoryError"}]
        patch.setattr(studio, "draw_job", crash)
        _, lines = ask("/draw", SETTINGS | dict(drawing=DRAWING))
    assert lines[-1] == {"error": "something broke"}
    assert "RuntimeError: something broke" in capsys.readouterr().err
    assert "seconds" in ask("/draw", SETTINGS | dict(drawing=DRAWING))[1][-1]


@pytest.mark.parametrize("headers", [
    dict(Host="pad.example"), dict(Origin="http://pad.example"), dict(Origin="null"),
    dict(Host="127.0.0.1:1"), {"Sec-Fetch-Site": "cross-site"}])
def test_a_page_of_another_site_is_refused(ask, headers):
    for path, content in (("/", None), ("/setup", None), ("/draw", SETTINGS), ("/save", {})):
        status, (line,) = ask(path, content, **headers)
        assert status == 403 and "own page" in line["error"]


def test_the_pads_own_page_is_answered_with_what_it_has_to_know(server, ask):
    own = f"http://localhost:{server.server_port}"
    status, page = ask("/", **{"Origin": own, "Host": own.removeprefix("http://"),
                               "Sec-Fetch-Site": "same-origin"})
    assert status == 200 and page == (ROOT / "pad" / "page.html").read_text(encoding="utf-8")
    _, (setup,) = ask("/setup")
    assert setup["tasks"]["sketch"]["file"] == str(DEFAULT_BPS)
    assert setup["tasks"]["layout"]["classes"]["#d62728"] == "food"
    assert setup["tasks"]["layout"]["ground"] == "#000000"
    assert setup["tasks"]["artistic"] == {"command": "python train.py --task artistic"}
    assert setup["defaults"] == dict(prompt="a red apple", negative_prompt="", seed=0, steps=20,
                                     guidance=3.0, sampler="dpm++2m")
    assert ask("/nowhere")[0] == ask("/nowhere", {})[0] == 404


@pytest.mark.parametrize("content, headers, words", [
    (b"{}", {"Content-Type": "text/plain"}, "a JSON object"), (b"{", {}, "not JSON"),
    (b"[]", {}, "not a JSON object"),
    (b"", {"Content-Length": "-5"}, "with its length")])
def test_a_body_that_is_no_request_is_refused(ask, content, headers, words):
    status, (line,) = ask("/draw", content, **headers)
    assert status == 400 and words in line["error"]


def test_a_body_that_is_too_large_is_read_to_its_end_so_that_the_refusal_arrives(ask):
    status, (line,) = ask("/draw", b" " * (pad.MOST_BYTES + 1))
    assert status == 400 and "allowed are" in line["error"]
    assert ask("/draw", b" " * 2**23, Host="pad.example")[0] == 403


def test_a_picture_is_opened_as_a_condition_with_the_guards_of_inputs(server, ask, tmp_path):
    light_on_dark = Image.new("L", (90, 60), 0)
    ImageDraw.Draw(light_on_dark).line((20, 10, 70, 50), fill=255, width=3)
    light_on_dark.save(tmp_path / "dark.png")
    _, (line,) = ask("/open", dict(task="sketch", file=url_of(tmp_path / "dark.png")))
    image, = pictures_of([line])
    assert image.size == (256, 256) and image.getpixel((5, 128)) == (255, 255, 255)
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (9, 9), "#123456").save(tmp_path / "unknown.png")
    for task, name, words in (("sketch", "bomb.png", "meant to fill the memory"),
                              ("layout", "unknown.png", "#123456 is unknown")):
        status, (line,) = ask("/open", dict(task=task, file=url_of(tmp_path / name)))
        assert status == 400 and words in line["error"] and "picture" in line["error"]
    assert ask("/open", dict(task="sketch"))[0] == 400
    assert {file.name for file in Path(server.studio.scratch.name).iterdir()} <= {"drawing.png"}


@pytest.mark.parametrize("arguments, words", [
    (["--port", "99999"], "--port 99999: allowed are"), (["--bps", "nowhere"], "nowhere"),
    (["--out", "README.md"], "must be a folder, got README.md"),
    (["--base", "README.md"], "--bps")])
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pad", *arguments])
    with pytest.raises(SystemExit) as stop:
        pad.run_script(pad.main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and words in printed and printed.count("\n") == 1


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(pad.UserError, match=f"--port {server.server_port}: .*give another"):
        pad.make_server(None, server.server_port)


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGTERM,
                                                             marks=pytest.mark.slow)])
def test_it_prints_its_address_and_ctrl_c_ends_it_at_once(end, tmp_path):
    without_display = {name: value for name, value in os.environ.items()
                       if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    process = subprocess.Popen([sys.executable, "-m", "pad", "--port", "0", "--out", tmp_path],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=without_display,     # what nohup starts ignores Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        body = json.dumps(SETTINGS | dict(number=1, steps="900", drawing=DRAWING))
        connection.request("POST", "/draw", body, {"Content-Type": "application/json"})
        connection.getresponse().readline()             # it is drawing
        process.send_signal(end)
        assert process.wait(5) == 130
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()
