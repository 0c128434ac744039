"""The panel in a real browser, on a live run: headless Chromium against `ns-train wys-tiny` on the demo scene."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import viser
from PIL import Image
from test_entry_points import editorless
from test_entry_points_of_data import NO_NETWORK

from wys_nerfstudio.config import wys_tiny
from wys_nerfstudio.demo.scene import write_demo_scene
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.viewer.panel import ViewerPanel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

STEPS = ["--pipeline.reconstruct-steps=150", "--pipeline.localize-steps=60", "--pipeline.edit-steps=11"]


def wait(condition: Callable[[], Any], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


PORT = free_port()


@pytest.fixture(scope="module")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a run that has finished and whose viewer is open."""
    folder = tmp_path_factory.mktemp("viewer")
    write_demo_scene(folder / "scene")
    command = ["wys-tiny", "--data", folder / "scene", "--output-dir", folder / "runs", "--machine.device-type=cpu"]
    command += ["--instruction", "turn the bear into a panda", f"--viewer.websocket-port={PORT}", *STEPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "nerfstudio.scripts.train", *map(str, command)],
            stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        try:
            wait(lambda: process.poll() is not None or "Use ctrl+c" in (folder / "log.txt").read_text())
            assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
            yield next((folder / "runs").glob("*/*/*/config.yml")).parent
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def open_viewer(browser: Any, port: int) -> Any:
    page = browser.new_page(viewport={"width": 1100, "height": 1500})
    # Pages are drawn in software: at full rate the browser takes the cores from the run.
    page.add_init_script(
        "requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 200); cancelAnimationFrame = clearTimeout;"
    )
    page.goto(f"http://127.0.0.1:{port}")
    page.get_by_text("Watch Your Steps").wait_for(timeout=60000)
    set_number(page, "Max res", 64)  # larger renders take many seconds on a CPU
    return page


def set_number(page: Any, label: str, value: float) -> None:
    box = page.get_by_text(label, exact=True).locator("xpath=following::input[@type='text'][1]")
    box.fill(str(value))
    box.press("Enter")


@pytest.fixture
def page(live_run: Path, browser: Any) -> Iterator[Any]:
    """A new client of the live run's viewer."""
    page = open_viewer(browser, PORT)
    yield page
    page.close()


def panel_text(page: Any) -> str:
    text = page.inner_text("body")
    return text[text.index("Watch Your Steps") :]


def choose_output(page: Any, name: str) -> None:
    page.get_by_label("Output type").first.click()
    page.get_by_role("option", name=name, exact=True).click()


def set_threshold(page: Any, value: float) -> None:
    set_number(page, "Mask threshold", value)


def screenshot(page: Any) -> np.ndarray:
    """Return the render on the page as it is now, without the panel."""
    shot = page.screenshot(clip={"x": 0, "y": 60, "width": 700, "height": 1400})
    return np.asarray(Image.open(io.BytesIO(shot)).convert("L"), dtype=float)


def settled_render(page: Any) -> np.ndarray:
    """Return the render on the page once it stops changing."""
    last = np.zeros(0)
    for _ in range(60):
        now = screenshot(page)
        if last.shape == now.shape and np.abs(last - now).mean() < 0.05:
            return now
        last = now
        page.wait_for_timeout(3000)
    raise AssertionError("the render kept changing")


def history(run: Path) -> list[dict]:
    return json.loads((run / "wys" / "history.json").read_text())


def edits(run: Path) -> int:
    return len((run / "wys" / "edits.jsonl").read_text().splitlines())


def test_the_panel_lists_its_controls_in_order(page: Any) -> None:
    labels = ["finished", "Instruction", "Apply on top", "Apply instead", "Undo", "Reset", "Export data set",
              "Mask threshold", "Guidance scale", "Image guidance scale", "Localization", "Edit every", "Edit count", "Pause editing",
              "Preview", "Nearest training view"]  # fmt: skip

    def positions() -> list[int]:
        text = panel_text(page)
        return [text.find(label) for label in labels]

    # The page receives one control after the other.
    wait(lambda: -1 not in positions() and positions() == sorted(positions()))
    assert positions() == sorted(positions())


def mask_area(page: Any) -> float:
    return float((screenshot(page) > 128).mean())


def assert_mask_shrinks(page: Any, thresholds: tuple[float, ...]) -> None:
    """Check that the whole mask is white at 0, and that no higher threshold shows more than a lower one."""
    if page.get_by_text("Hide Train Cams").is_visible():
        page.get_by_text("Hide Train Cams").click()
    choose_output(page, "relevance_overlay")
    choose_output(page, "edit_mask")
    set_threshold(page, 0.0)
    # Wait for the render, not for a time: a busy machine renders late.
    wait(lambda: mask_area(page) > 0.9)
    areas = [mask_area(page)]
    for threshold in thresholds:
        set_threshold(page, threshold)
        page.wait_for_timeout(3000)
        areas.append(float((settled_render(page) > 128).mean()))
    set_threshold(page, 1.0)
    wait(lambda: mask_area(page) < 0.5 * areas[0])
    areas.append(float((settled_render(page) > 128).mean()))
    assert areas == sorted(areas, reverse=True)


def test_the_rendered_mask_shrinks_as_the_threshold_rises(page: Any) -> None:
    assert_mask_shrinks(page, (0.2, 0.5))


def test_a_preview_appears_and_an_invalid_value_is_refused(page: Any) -> None:
    set_threshold(page, 0.0)  # after so few steps nothing may be relevant
    page.get_by_role("button", name="Preview").click()
    page.locator("img[alt='training view']").wait_for(timeout=60000)
    every = page.get_by_text("Edit every", exact=True).locator("xpath=following::input[1]")
    every.fill("0")
    wait(lambda: "Edit every must be at least 1, not 0" in panel_text(page), 60)
    wait(lambda: every.input_value() == "5", 60)


def test_the_nearest_training_view_is_rendered_and_shown(page: Any) -> None:
    choose_output(page, "rgb")
    if page.get_by_text("Show Train Cams").is_visible():
        page.get_by_text("Show Train Cams").click()
    page.get_by_role("button", name="Nearest training view").click()
    image = page.locator("img[alt='training view']")
    wait(lambda: image.count() and "at step" in panel_text(page))
    encoded = image.get_attribute("src").partition("base64,")[2]
    captured = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    captured = captured.crop((0, 0, captured.width, captured.width * 64 // 80)).resize((80, 64))
    settled_render(page)
    box = page.locator("canvas").last.bounding_box()
    shot = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
    assert shot.width < shot.height, "the view fills the width"
    margin = (shot.height - shot.width * 64 / 80) / 2
    render = shot.crop((0, round(margin), shot.width, round(shot.height - margin))).resize((80, 64))
    error = np.asarray(render, dtype=float) - np.asarray(captured, dtype=float)
    assert np.sqrt((error**2).mean()) < 25


def test_two_outputs_are_shown_side_by_side(page: Any) -> None:
    choose_output(page, "rgb")
    single = settled_render(page)
    switch = page.get_by_role("checkbox", name="Enable").first
    switch.check(force=True)
    page.get_by_label("Output render split").click()
    page.get_by_role("option", name="edit_mask", exact=True).click()
    page.wait_for_timeout(1500)
    split = settled_render(page)
    half = single.shape[1] // 3  # the split is at the middle of the window, part of which the panel covers
    assert np.abs(split[:, :half] - single[:, :half]).mean() < 3
    switch.uncheck(force=True)


def test_a_typed_instruction_stays_until_it_is_applied(page: Any) -> None:
    box = page.get_by_text("Instruction", exact=True).locator("xpath=following::input[1]")
    box.fill("make the ball red")
    box.press("Enter")
    set_threshold(page, 0.25)
    page.wait_for_timeout(2000)
    assert box.input_value() == "make the ball red"


def test_apply_and_undo(page: Any, live_run: Path) -> None:
    wait(lambda: "finished" in panel_text(page))
    choose_output(page, "rgb")
    before = settled_render(page)
    box = page.get_by_text("Instruction", exact=True).locator("xpath=following::input[1]")
    box.fill("make the ball blue")
    box.press("Enter")
    page.wait_for_timeout(1000)
    for number, start in enumerate(["on top", "instead"]):
        count = edits(live_run)
        page.get_by_role("button", name=f"Apply {start}").click()
        wait(lambda: len(history(live_run)) == number + 2)
        wait(lambda: edits(live_run) > count and "finished" in panel_text(page))
    first, *applied = history(live_run)
    assert first["instruction"] == "turn the bear into a panda"
    assert {entry["instruction"] for entry in applied} == {"make the ball blue"}
    assert [entry["start"] for entry in applied] == ["on top", "instead"]
    for number in (2, 1):
        page.get_by_role("button", name="Undo").click()
        wait(lambda: len(history(live_run)) == number)
    # Both undos leave the same status line; the panel is updated after the history is written.
    wait(lambda: box.input_value() == "turn the bear into a panda")
    wait(lambda: '"make the ball blue" is undone' in panel_text(page))
    wait(lambda: np.abs(settled_render(page) - before).mean() < 0.5)


def test_ns_viewer_shows_outputs_and_threshold_without_an_editor(live_run: Path, browser: Any) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **NO_NETWORK}
    port = free_port()
    arguments = ["--load-config", live_run / "config.yml", "--viewer.websocket-port", port]
    viewer = subprocess.Popen(editorless("viewer.run_viewer", *arguments), env=environment, stdout=subprocess.DEVNULL)
    try:
        wait(lambda: viewer.poll() is not None or listens(port))
        page = open_viewer(browser, port)
        text = panel_text(page)
        assert "Mask threshold" in text
        assert not any(label in text for label in ("Apply", "Guidance scale", "Preview", "Undo", "Reset"))
        assert_mask_shrinks(page, (0.4,))
        assert viewer.poll() is None
        page.close()
    finally:
        viewer.kill()
        viewer.wait()


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


HOSTILE = [
    "<img src='x' onerror='window.hacked=1'/>",
    "{window.hacked=1}",
    "![x](javascript:window.hacked=1)",
    "[click](javascript:window.hacked=1)",
    "export const x = window.hacked = 1",
    "<div ref={() => {window.hacked=1}}>x</div>",
]


def test_hostile_texts_are_shown_literally_and_run_nothing(browser: Any) -> None:
    panel = ViewerPanel(Settings(RunSettings.from_options(wys_tiny.config.pipeline), ["none"]), live=True)
    server = viser.ViserServer(host="127.0.0.1", port=free_port(), verbose=False)
    panel.install(server)
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.get_port()}")
    for text in HOSTILE:
        panel.show_status("progress", text)
        panel.show_images(f'preview of "{text}"', [torch.zeros(2, 2, 3)])
        wait(lambda: f'preview of "{text}"' in page.inner_text("body"), 60)
        assert page.locator("em").inner_text() == text
        assert page.evaluate("window.hacked") is None
        assert page.locator("a[href^=javascript]").count() == 0
        assert [image.get_attribute("alt") for image in page.locator("img[alt]").all()] == ["training view"]
    page.close()
    server.stop()


CONNECT = """url => new Promise(done => {
    const socket = new WebSocket(url);
    socket.onopen = () => done("open");
    socket.onerror = () => done("refused");
})"""


def test_only_the_viewers_own_page_can_connect(live_run: Path, browser: Any, page: Any) -> None:
    foreign = browser.new_page()
    foreign.route("http://evil.example/**", lambda route: route.fulfill(body="<p>page</p>", content_type="text/html"))
    foreign.goto("http://evil.example/")
    assert foreign.evaluate(CONNECT, f"ws://127.0.0.1:{PORT}") == "refused"
    assert page.evaluate(CONNECT, f"ws://127.0.0.1:{PORT}") == "open"
    foreign.close()


def test_a_live_run_serves_no_file_outside_the_viewer(live_run: Path) -> None:
    with socket.create_connection(("127.0.0.1", PORT), timeout=60) as connection:
        connection.sendall(b"GET /../../_viser.py HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 404")
