"""A headless Chromium draws on the pad's page: pytest -m browser.

Needs Debian's chromium and chromium-driver, and the package selenium; without them it fails. With
-s it prints how long a picture took. PAD_FIGURE=docs/figures/pad.png writes the page's picture.
"""
import base64
import io
import os
import shutil

import pytest
import references
from PIL import Image
from test_pad import serving

import sample
from inputs.options import DEFAULT_BPS, DEFAULT_DRAWING
from tiny.tasks import CLASSES

pytestmark = pytest.mark.browser
# a portrait, as shares of the drawing's side: spiky hair, head, shoulders, eyes and mouth
FACE = [[(0.31, 0.5), (0.24, 0.36), (0.2, 0.16), (0.34, 0.22), (0.42, 0.06), (0.52, 0.2),
         (0.66, 0.08), (0.68, 0.24), (0.82, 0.2), (0.76, 0.38), (0.69, 0.5)],
        [(0.31, 0.5), (0.32, 0.38), (0.42, 0.34), (0.58, 0.34), (0.68, 0.38), (0.69, 0.5),
         (0.67, 0.62), (0.58, 0.72), (0.42, 0.72), (0.33, 0.62), (0.31, 0.5)],
        [(0.42, 0.72), (0.42, 0.8), (0.2, 0.86), (0.12, 0.99)],
        [(0.58, 0.72), (0.58, 0.8), (0.8, 0.86), (0.88, 0.99)],
        [(0.41, 0.48), (0.42, 0.5)], [(0.59, 0.48), (0.58, 0.5)],
        [(0.43, 0.61), (0.5, 0.64), (0.57, 0.61)]]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a running pad with a BPS for sketch, layout and artistic."""
    files = [DEFAULT_BPS]
    for task, classes in (("layout", CLASSES), ("artistic", {})):
        files.append(references.write_random_bps(
            tmp_path_factory.mktemp(task) / "bps.safetensors", task,
            classes={colour: name for name, colour in classes.items()}))
    with serving(tmp_path_factory.mktemp("pictures"), *files) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, as Selenium drives it."""
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for option in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "hide-scrollbars",
                   "disable-background-networking", f"user-data-dir={profile}"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(1000, 1150)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The pad's page, just opened, with its first picture."""
    browser.get(address)
    browser.get_log("browser")                      # drops old messages
    wait_until_drawn(browser)
    return browser


def wait_for(browser, condition, seconds=60):
    """Wait until condition() is true."""
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, seconds, poll_frequency=0.02).until(lambda _: condition())


def find(browser, name):
    """The element with an id."""
    return browser.find_element("id", name)


def status(browser):
    """The page's status line."""
    return find(browser, "status").text


def wait_until_drawn(browser):
    wait_for(browser, lambda: status(browser).startswith("drawn in"))


def picture(browser, name="picture"):
    """The pixels of an image on the page, as bytes."""
    url = find(browser, name).get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).tobytes()


def draw(browser, strokes):
    """Draw strokes, lists of (x, y) as shares of the canvas, with the mouse."""
    from selenium.webdriver.common.action_chains import ActionChains
    canvas = find(browser, "pad")
    side = canvas.size["width"]
    for stroke in strokes:
        pointer = ActionChains(browser, duration=20)
        for i, (x, y) in enumerate(stroke):
            pointer.move_to_element_with_offset(canvas, (x - 0.5) * side, (y - 0.5) * side)
            if i == 0:
                pointer.click_and_hold()
        pointer.pause(0.5).release().perform()          # a pause for the last preview
    wait_until_drawn(browser)


def set_value(browser, name, value):
    """Set a control and send the events that a user's hand would."""
    browser.execute_script("const control = document.getElementById(arguments[0]);"
                           "control.value = arguments[1];"
                           "control.dispatchEvent(new Event('input', {bubbles: true}));"
                           "control.dispatchEvent(new Event('change', {bubbles: true}));",
                           name, value)


# ---- drawing -------------------------------------------------------------------------------

def test_a_drawing_by_hand_is_drawn_again_by_sample_py(page, run_script, tmp_path):
    set_value(page, "prompt", "person, purple hair, light skin, toon style")
    set_value(page, "seed", "1")
    wait_until_drawn(page)
    before = picture(page)
    assert before == picture(page, "prior")             # the canvas is empty
    draw(page, FACE)
    steered = picture(page)
    print(f"\n{status(page)}")
    assert steered != before == picture(page, "prior")
    page.execute_script("window.scrollTo(0, 0)")
    page.save_screenshot(tmp_path / "pad.png")
    with Image.open(tmp_path / "pad.png") as image:
        if "PAD_FIGURE" in os.environ:
            image.quantize(128).save(os.environ["PAD_FIGURE"], optimize=True)
    find(page, "save").click()
    wait_for(page, lambda: status(page).startswith("saved"))
    file = status(page).split(" and ")[0].removeprefix("saved ")
    assert status(page).endswith(f"python sample.py --from {file}")
    run_script(sample, "--from", file, "--out", tmp_path)
    assert Image.open(tmp_path / "0001.png").tobytes() == steered
    find(page, "draw_strip").click()
    wait_for(page, lambda: len(page.find_elements("css selector", "#strip img")) == 5)
    wait_until_drawn(page)


def test_the_picture_follows_undo_redo_and_clear(page):
    draw(page, FACE[:1])
    first = picture(page)
    draw(page, FACE[1:2])
    second = picture(page)
    assert first != second
    for button, expected in (("undo", first), ("redo", second), ("clear", picture(page, "prior")),
                             ("undo", second)):
        find(page, button).click()
        wait_until_drawn(page)
        assert picture(page) == expected, button


def test_settings_count_and_a_mistake_is_one_line_in_the_page(page):
    draw(page, FACE)
    first = picture(page)
    set_value(page, "prompt", "person, green hair")
    wait_until_drawn(page)
    assert picture(page) != first
    set_value(page, "steps", "0")
    wait_for(page, lambda: "--steps: must be a whole number in [1, 999], got 0" in status(page))
    assert find(page, "status").get_attribute("class") == "bad"
    set_value(page, "steps", "3")
    wait_until_drawn(page)
    set_value(page, "strength", "0")
    wait_until_drawn(page)
    assert picture(page) == picture(page, "prior")


DROP = """
    const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
    const dropped = new DataTransfer();
    dropped.items.add(new File([bytes], "drawing.png", {type: "image/png"}));
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, cancelable: true}));
"""


@pytest.mark.parametrize("is_dropped", [False, True], ids=["opened", "dropped"])
def test_a_picture_that_is_opened_or_dropped_is_the_drawing(page, is_dropped):
    if is_dropped:
        page.execute_script(DROP, base64.b64encode(DEFAULT_DRAWING.read_bytes()).decode())
    else:
        find(page, "file").send_keys(str(DEFAULT_DRAWING))
    wait_for(page, lambda: not page.execute_script("return isBlank()"))
    wait_until_drawn(page)
    assert picture(page) != picture(page, "prior")


NOISY = """
    const [level] = arguments, read = CanvasRenderingContext2D.prototype.getImageData;
    CanvasRenderingContext2D.prototype.getImageData = function (...box) {
      const image = read.apply(this, box);
      image.data.forEach((value, i) => image.data[i] = value - level * (i % 5 % 2));
      return image;
    };
"""


@pytest.mark.parametrize("level, message", [(2, "drawn in"), (60, "this browser hides the canvas")])
def test_a_browser_may_add_a_little_noise_to_the_canvas(page, level, message):
    page.execute_script(NOISY, level)
    choose(page, "task", "artistic")
    wait_for(page, lambda: status(page).startswith(message))
    page.refresh()


def test_erased_ink_is_no_drawing(page):
    draw(page, [[(0.4, 0.5), (0.6, 0.5)]])
    choose(page, "tool", "eraser")
    set_value(page, "width", "40")
    draw(page, [[(0.3, 0.5), (0.7, 0.5)]])
    assert picture(page) == picture(page, "prior")
    find(page, "draw_strip").click()
    wait_for(page, lambda: status(page) == "draw something first")


def test_a_stroke_during_a_long_picture_has_a_preview(page):
    from selenium.webdriver.common.action_chains import ActionChains
    set_value(page, "steps", "400")
    wait_for(page, lambda: float(find(page, "progress").get_attribute("value")) > 0)
    before, canvas = picture(page), find(page, "pad")
    pointer = ActionChains(page).move_to_element(canvas).click_and_hold()
    pointer.move_by_offset(60, 40).move_by_offset(-90, 10).perform()
    wait_for(page, lambda: picture(page) != before, 20)
    ActionChains(page).release().perform()
    find(page, "clear").click()
    set_value(page, "steps", "3")
    wait_until_drawn(page)


def test_without_a_locked_seed_each_stroke_has_another(page):
    find(page, "lock").click()
    seeds = {"0"}
    for stroke in FACE[:2]:
        draw(page, [stroke])
        seeds.add(find(page, "seed").get_attribute("value"))
    assert len(seeds) == 3


# ---- the page ------------------------------------------------------------------------------

def test_controls_have_labels_are_reached_by_tab_and_fit_a_phone(page):
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
    """Choose one of the page's radio buttons."""
    page.find_element("css selector", f"input[name={group}][value='{value}']").click()


def canvas_colours(page):
    """The colours on the canvas, as in #1f77b4."""
    return set(page.execute_script(
        "const all = new Uint8Array(image().data.buffer), seen = new Set();"
        "for (let i = 0; i < all.length; i += 4) {"
        "  seen.add('#' + [...all.slice(i, i + 3)].map("
        "    part => part.toString(16).padStart(2, '0')).join('')); }"
        "return [...seen]"))


def test_boxes_and_strokes_have_only_colours_of_classes(page):
    ground, hair, robot = (CLASSES[name] for name in ("ground", "hair", "robot"))
    choose(page, "task", "layout")
    wait_until_drawn(page)
    choose(page, "colour", hair)
    draw(page, [[(0.1, 0.1), (0.3, 0.2), (0.45, 0.45)]])
    assert canvas_colours(page) == {ground, hair}
    choose(page, "tool", "pen")
    choose(page, "colour", robot)
    draw(page, [[(0.6, 0.6), (0.71, 0.83), (0.9, 0.7)]])
    assert canvas_colours(page) == {ground, hair, robot}
    assert picture(page) != picture(page, "prior")
    choose(page, "tool", "eraser")
    set_value(page, "width", "40")
    draw(page, [[(0.55, 0.5 + 0.1 * i), (0.95, 0.5 + 0.1 * i)] for i in range(5)])
    assert canvas_colours(page) == {ground, hair}


def test_another_task_starts_with_an_empty_canvas_and_history(page):
    draw(page, FACE[:1])
    choose(page, "task", "artistic")
    wait_until_drawn(page)
    assert not find(page, "undo").is_enabled() and canvas_colours(page) == {"#ffffff"}
    page.execute_script("const brush = document.querySelector('input[type=color]');"
                        "brush.value = '#ff0000'; brush.dispatchEvent(new Event('input'))")
    draw(page, FACE[:1])
    assert "#ff0000" in canvas_colours(page) and find(page, "undo").is_enabled()


def test_the_page_raises_no_error_and_asks_no_other_site(page, address):
    draw(page, FACE)
    assert find(page, "status").get_attribute("class") == ""
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    urls = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls and all(url.startswith((f"{address}/", "data:")) for url in urls)
