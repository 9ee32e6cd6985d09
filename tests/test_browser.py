"""A headless Chromium draws on the pad's page: pytest -m browser.

Needs Debian's chromium and chromium-driver, and the package selenium; without them it fails. With
-s it prints how long a picture took. PAD_FIGURE=docs/figures/pad.png makes the page's picture anew.
"""
import base64
import io
import os
import shutil
import sys
import threading

import pytest
import references
from PIL import Image
from test_pad import studio_args

import sample
from inputs.options import BASE
from inputs.sample_options import DEFAULT_BPS
from pad import __main__ as pad
from pad import studio
from tiny.tasks import CLASSES

pytestmark = pytest.mark.browser
# a cat's face, as shares of the drawing's side: outline, eyes and mouth
CAT = [[(0.1, 0.08), (0.14, 0.45), (0.1, 0.62), (0.2, 0.82), (0.4, 0.92), (0.6, 0.92), (0.8, 0.82),
        (0.9, 0.62), (0.86, 0.45), (0.9, 0.08), (0.66, 0.24), (0.34, 0.24), (0.1, 0.08)],
       [(0.32, 0.46), (0.32, 0.54)], [(0.68, 0.46), (0.68, 0.54)],
       [(0.36, 0.72), (0.5, 0.78), (0.64, 0.72)]]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a running pad, of drawings, boxes and pictures in colours."""
    files = [DEFAULT_BPS]
    for task, classes in (("layout", CLASSES), ("artistic", {})):
        files.append(references.write_random_bps(
            tmp_path_factory.mktemp(task) / "bps.safetensors", task,
            classes={colour: name for name, colour in classes.items()}))
    args = studio_args(tmp_path_factory.mktemp("pictures"))
    server = pad.make_server(studio.Studio(args, files), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(1000, 1150)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The pad's page, freshly opened, when its first picture is there."""
    browser.get(address)
    browser.get_log("browser")                      # what was before
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
    set_value(page, "prompt", "face, 3d style")
    set_value(page, "seed", "1")
    wait_for(page, lambda: status(page).startswith("drawn in"))
    before = picture(page)
    assert before.tobytes() == picture(page, "prior").tobytes()             # nothing is drawn yet
    draw(page, CAT)
    steered = picture(page)
    print(f"\n{status(page)}")
    assert "the last preview in" in status(page)
    assert steered.tobytes() != before.tobytes() == picture(page, "prior").tobytes()
    find(page, "save").click()
    wait_for(page, lambda: status(page).startswith("saved"))
    file = status(page).split(" and ")[0].removeprefix("saved ")
    assert status(page).endswith(f"python sample.py --from {file}")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--from", file, "--out", str(tmp_path)])
    sample.main()
    assert Image.open(tmp_path / "0001.png").tobytes() == steered.tobytes()
    page.execute_script("window.scrollTo(0, 0)")
    find(page, "draw_strip").click()
    wait_for(page, lambda: len(page.find_elements("css selector", "#strip img")) == 5)
    wait_for(page, lambda: status(page).startswith("drawn in"))
    page.save_screenshot(tmp_path / "pad.png")
    with Image.open(tmp_path / "pad.png") as image:
        assert image.size[0] >= 900
        if "PAD_FIGURE" in os.environ:
            image.quantize(128).save(os.environ["PAD_FIGURE"], optimize=True)


def test_undo_redo_and_clear_are_followed_by_the_picture(page):
    draw(page, CAT[:1])
    first = picture(page).tobytes()
    draw(page, CAT[1:2])
    second = picture(page).tobytes()
    assert first != second
    for button, expected in (("undo", first), ("redo", second),
                             ("clear", picture(page, "prior").tobytes()), ("undo", second)):
        find(page, button).click()
        wait_for(page, lambda: status(page).startswith("drawn in"))
        assert picture(page).tobytes() == expected, button


def test_settings_count_and_a_mistake_is_one_line_in_the_page(page):
    draw(page, CAT)
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
    wait_for(page, lambda: not page.execute_script("return isBlank()"))
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


def choose(page, group, value):
    """Chooses one of the page's radio buttons."""
    page.find_element("css selector", f"input[name={group}][value='{value}']").click()


def canvas_colours(page):
    """Returns the colours on the canvas, as in #1f77b4."""
    return set(page.execute_script(
        "const all = new Uint8Array(image().data.buffer), seen = new Set();"
        "for (let i = 0; i < all.length; i += 4) {"
        "  seen.add('#' + [...all.slice(i, i + 3)].map("
        "    part => part.toString(16).padStart(2, '0')).join('')); }"
        "return [...seen]"))


def test_boxes_and_brush_strokes_have_the_classes_colours_only(page):
    choose(page, "task", "layout")
    wait_for(page, lambda: status(page).startswith("drawn in"))
    choose(page, "colour", "#d62728")
    draw(page, [[(0.1, 0.1), (0.3, 0.2), (0.45, 0.45)]])
    assert canvas_colours(page) == {"#000000", "#d62728"}
    choose(page, "tool", "pen")
    choose(page, "colour", "#2ca02c")
    draw(page, [[(0.6, 0.6), (0.71, 0.83), (0.9, 0.7)]])
    assert canvas_colours(page) == {"#000000", "#d62728", "#2ca02c"}
    assert picture(page).tobytes() != picture(page, "prior").tobytes()
    choose(page, "tool", "eraser")
    set_value(page, "width", "40")
    draw(page, [[(0.55, 0.5 + 0.1 * i), (0.95, 0.5 + 0.1 * i)] for i in range(5)])
    assert canvas_colours(page) == {"#000000", "#d62728"}


def test_another_task_begins_with_an_empty_canvas_and_history(page):
    draw(page, CAT[:1])
    choose(page, "task", "artistic")
    wait_for(page, lambda: status(page).startswith("drawn in"))
    assert not find(page, "undo").is_enabled() and canvas_colours(page) == {"#ffffff"}
    page.execute_script("const brush = document.querySelector('input[type=color]');"
                        "brush.value = '#ff0000'; brush.dispatchEvent(new Event('input'))")
    draw(page, CAT[:1])
    assert "#ff0000" in canvas_colours(page) and find(page, "undo").is_enabled()


def test_what_the_eraser_empties_is_no_drawing_and_no_strip(page):
    draw(page, [[(0.4, 0.5), (0.6, 0.5)]])
    choose(page, "tool", "eraser")
    set_value(page, "width", "40")
    draw(page, [[(0.3, 0.5), (0.7, 0.5)]])
    assert picture(page).tobytes() == picture(page, "prior").tobytes()
    find(page, "draw_strip").click()
    wait_for(page, lambda: status(page) == "draw something first")


def test_a_stroke_during_a_long_picture_has_a_preview(page):
    set_value(page, "steps", "400")
    wait_for(page, lambda: float(find(page, "progress").get_attribute("value")) > 0)
    from selenium.webdriver.common.action_chains import ActionChains
    before, canvas = picture(page).tobytes(), find(page, "pad")
    pointer = ActionChains(page).move_to_element(canvas).click_and_hold()
    pointer.move_by_offset(60, 40).move_by_offset(-90, 10).perform()
    wait_for(page, lambda: picture(page).tobytes() != before, 20)
    ActionChains(page).release().perform()
    find(page, "clear").click()
    set_value(page, "steps", "3")
    wait_for(page, lambda: status(page).startswith("drawn in"))


def test_without_keeping_the_seed_each_stroke_has_another(page):
    find(page, "lock").click()
    seeds = []
    for stroke in CAT[:2]:
        draw(page, [stroke])
        seeds.append(find(page, "seed").get_attribute("value"))
    assert len(set(seeds) | {"0"}) == 3


def test_a_picture_that_is_dropped_on_the_page_is_the_drawing(page):
    url = "data:image/png;base64," + base64.b64encode(
        (BASE.parent / "drawing.png").read_bytes()).decode()
    page.execute_script("""
        const bytes = Uint8Array.from(atob(arguments[0].split(",")[1]), c => c.charCodeAt(0));
        const dropped = new DataTransfer();
        dropped.items.add(new File([bytes], "drawing.png", {type: "image/png"}));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, cancelable: true}));
    """, url)
    wait_for(page, lambda: not page.execute_script("return isBlank()"))
    wait_for(page, lambda: status(page).startswith("drawn in"))
    assert picture(page).tobytes() != picture(page, "prior").tobytes()


def test_the_page_raises_no_error_and_asks_no_other_site(page, address):
    draw(page, CAT)
    assert find(page, "status").get_attribute("class") == ""
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    urls = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls and all(url.startswith((f"{address}/", "data:")) for url in urls)


def test_conditions_without_a_bps_are_named_with_the_command_that_trains_one(page):
    assert "python train.py --task segmentation" in find(page, "missing").text
