"""A headless Chromium draws on the pad's page: pytest -m browser.

Needs Debian's chromium and chromium-driver, and the package selenium; without them it fails. With
-s it prints how long a picture took. PAD_FIGURE=docs/figures/pad.png makes the page's picture anew.
"""
import base64
import io
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

import sample
from inputs.options import BASE
from inputs.sample_options import DEFAULT_BPS
from pad import __main__ as pad
from pad import studio

pytestmark = pytest.mark.browser
# an apple, as shares of the drawing's side: round strokes that begin at the stem
APPLE = [[(0.5, 0.32), (0.36, 0.24), (0.2, 0.3), (0.14, 0.5), (0.22, 0.74), (0.38, 0.88), (0.5, 0.85),
          (0.62, 0.88), (0.78, 0.74), (0.86, 0.5), (0.8, 0.3), (0.64, 0.24), (0.5, 0.32)],
         [(0.5, 0.32), (0.52, 0.2), (0.58, 0.1)], [(0.55, 0.2), (0.68, 0.1), (0.78, 0.12), (0.6, 0.2)]]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a running pad."""
    args = SimpleNamespace(base=BASE, tokenizer=None, vae=None, prediction_type=None, dtype="fp32",
                           device="cpu", out=tmp_path_factory.mktemp("pictures"))
    server = pad.make_server(studio.Studio(args, [DEFAULT_BPS]), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, as Selenium drives it."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={profile}", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    driver.set_window_size(1000, 1150)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The pad's page, freshly opened, when its first picture is there."""
    browser.get(address)
    wait_for(browser, lambda: status(browser).startswith("drawn in"))
    return browser


def wait_for(browser, condition, seconds=60):
    """Waits until condition() is true."""
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, seconds, poll_frequency=0.02).until(lambda _: condition())


def find(browser, name):
    """Returns the element of an id."""
    return browser.find_element("id", name)


def status(browser):
    """Returns what the page says."""
    return find(browser, "status").text


def picture(browser, name="picture"):
    """Returns the image that the page shows."""
    url = find(browser, name).get_attribute("src") or ""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) if "," in url else None


def draw(browser, strokes):
    """Draws strokes, lists of (x, y) as shares of the canvas, with the mouse."""
    from selenium.webdriver.common.action_chains import ActionChains
    canvas = find(browser, "pad")
    side = canvas.size["width"]
    for stroke in strokes:
        pointer = ActionChains(browser, duration=20)
        for i, (x, y) in enumerate(stroke):
            pointer.move_to_element_with_offset(canvas, (x - 0.5) * side, (y - 0.5) * side)
            if i == 0:
                pointer.click_and_hold()
        pointer.pause(0.5).release().perform()          # so that the last preview is seen
    wait_for(browser, lambda: status(browser).startswith("drawn in"))


def set_value(browser, name, value):
    """Sets a control, as a hand does."""
    browser.execute_script("const control = document.getElementById(arguments[0]);"
                           "control.value = arguments[1];"
                           "control.dispatchEvent(new Event('input', {bubbles: true}));"
                           "control.dispatchEvent(new Event('change', {bubbles: true}));",
                           name, value)


def test_what_is_drawn_by_hand_is_drawn_again_by_sample_py(page, monkeypatch, tmp_path):
    before = picture(page)
    assert before.tobytes() == picture(page, "prior").tobytes()             # nothing is drawn yet
    draw(page, APPLE)
    steered = picture(page)
    print(f"\n{status(page)}")
    assert steered.tobytes() != before.tobytes() == picture(page, "prior").tobytes()
    find(page, "save").click()
    wait_for(page, lambda: status(page).startswith("saved"))
    file = status(page).split(" and ")[0].removeprefix("saved ")
    assert status(page).endswith(f"python sample.py --from {file}")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--from", file, "--out", str(tmp_path)])
    sample.main()
    assert Image.open(tmp_path / "0000.png").tobytes() == steered.tobytes()
    find(page, "draw_strip").click()
    wait_for(page, lambda: len(page.find_elements("css selector", "#strip img")) == 5)
    wait_for(page, lambda: status(page).startswith("drawn in"))
    page.save_screenshot(tmp_path / "pad.png")
    with Image.open(tmp_path / "pad.png") as image:
        assert image.size[0] >= 900
        if "PAD_FIGURE" in os.environ:
            image.quantize(128).save(os.environ["PAD_FIGURE"], optimize=True)


def test_undo_redo_and_clear_are_followed_by_the_picture(page):
    draw(page, APPLE[:1])
    first = picture(page).tobytes()
    draw(page, APPLE[1:2])
    second = picture(page).tobytes()
    assert first != second
    for button, expected in (("undo", first), ("redo", second),
                             ("clear", picture(page, "prior").tobytes()), ("undo", second)):
        find(page, button).click()
        wait_for(page, lambda: status(page).startswith("drawn in"))
        assert picture(page).tobytes() == expected, button


def test_settings_count_and_a_mistake_is_one_line_in_the_page(page):
    draw(page, APPLE)
    first = picture(page).tobytes()
    set_value(page, "prompt", "a green apple")
    wait_for(page, lambda: status(page).startswith("drawn in"))
    assert picture(page).tobytes() != first
    set_value(page, "steps", "0")
    wait_for(page, lambda: "--steps 0: allowed are" in status(page))
    assert find(page, "status").get_attribute("class") == "bad"
    set_value(page, "steps", "3")
    wait_for(page, lambda: status(page).startswith("drawn in"))
    set_value(page, "strength", "0")
    wait_for(page, lambda: status(page).startswith("drawn in"))
    assert picture(page).tobytes() == picture(page, "prior").tobytes()


def test_an_opened_picture_is_the_drawing(page, tmp_path):
    drawing = BASE.parent / "drawing.png"
    find(page, "file").send_keys(str(drawing))
    wait_for(page, lambda: not page.execute_script("return current.blank"))
    wait_for(page, lambda: status(page).startswith("drawn in"))
    assert picture(page).tobytes() != picture(page, "prior").tobytes()
    (tmp_path / "no.png").write_text("no picture")
    find(page, "file").send_keys(str(tmp_path / "no.png"))
    wait_for(page, lambda: "cannot be read as an image" in status(page))


def test_every_control_is_labelled_reachable_by_tab_and_fits_a_phone(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    unlabelled = page.execute_script(
        "return [...document.querySelectorAll('input, select, button, canvas, img, progress')]"
        ".filter(e => !e.labels?.length && !e.textContent.trim() && !e.alt && !e.ariaLabel)"
        ".map(e => e.outerHTML)")
    assert unlabelled == []
    names = set(page.execute_script(
        "return [...document.querySelectorAll('input, select, button')]"
        ".filter(e => !e.disabled).map(e => e.name || e.id)"))
    reached = set()
    for _ in range(40):
        ActionChains(page).send_keys(Keys.TAB).perform()
        reached.add(page.execute_script(
            "const e = document.activeElement; return e.name || e.id"))
    assert names <= reached
    width = page.get_window_size()["width"]
    try:
        page.set_window_size(500, 900)              # as narrow as Chromium's window gets
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
            width=360, height=740, deviceScaleFactor=2, mobile=True))
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.set_window_size(width, 1150)


def test_the_page_raises_no_error_and_asks_no_other_site(page, address):
    draw(page, APPLE)
    errors = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert [e for e in errors if "favicon" not in e["message"] and "400" not in e["message"]] == []
    urls = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls and all(url.startswith((address, "data:")) for url in urls)
