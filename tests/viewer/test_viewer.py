"""The panel in a real browser, on a live run: headless Chromium against `ns-train wys-tiny` on the demo scene."""

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
from PIL import Image
from test_entry_points import editorless
from test_entry_points_of_data import NO_NETWORK

from wys_nerfstudio.demo.scene import write_demo_scene

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]

STEPS = ["--pipeline.reconstruct-steps=150", "--pipeline.localize-steps=60", "--pipeline.edit-steps=11"]


def wait(condition: Callable[[], Any], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
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
    page.goto(f"http://127.0.0.1:{port}")
    page.get_by_text("Watch Your Steps").wait_for(timeout=60000)
    set_number(page, "Max res", 64)  # a CPU draws larger pictures for many seconds
    return page


def set_number(page: Any, label: str, value: float) -> None:
    box = page.get_by_text(label, exact=True).locator("xpath=following::input[@type='text'][1]")
    box.fill(str(value))
    box.press("Enter")


@pytest.fixture(scope="module")
def page(live_run: Path, browser: Any) -> Any:
    """The viewer's page of the live run."""
    return open_viewer(browser, PORT)


def panel(page: Any) -> str:
    text = page.inner_text("body")
    return text[text.index("Watch Your Steps") :]


def choose_output(page: Any, name: str) -> None:
    page.get_by_label("Output type").first.click()
    page.get_by_role("option", name=name, exact=True).click()


def set_threshold(page: Any, value: float) -> None:
    set_number(page, "Mask threshold", value)


def shown(page: Any) -> np.ndarray:
    """The scene as it is shown now, without the panel."""
    shot = page.screenshot(clip={"x": 0, "y": 60, "width": 700, "height": 1400})
    return np.asarray(Image.open(io.BytesIO(shot)).convert("L"), dtype=float)


def picture(page: Any) -> np.ndarray:
    """The scene as it is shown when it changes no more."""
    last = np.zeros(0)
    for _ in range(60):
        now = shown(page)
        if last.shape == now.shape and np.abs(last - now).mean() < 0.05:
            return now
        last = now
        page.wait_for_timeout(3000)
    raise AssertionError("the picture never came to rest")


def history(run: Path) -> list[dict]:
    return json.loads((run / "wys" / "history.json").read_text())


def edits(run: Path) -> int:
    return len((run / "wys" / "edits.jsonl").read_text().splitlines())


def test_the_panel_is_in_order(page: Any) -> None:
    wanted = ["finished", "Instruction", "Apply on top", "Apply instead", "Mask threshold", "Guidance scale",
              "Image guidance scale", "Localization", "Edit every", "Edit count", "Pause editing", "Preview", "Undo",
              "Reset"]  # fmt: skip
    wait(lambda: "finished" in panel(page))
    text = panel(page)
    places = [text.index(label) for label in wanted]
    assert places == sorted(places)


def mask_area(page: Any) -> float:
    return float((shown(page) > 128).mean())


def check_that_the_mask_shrinks(page: Any, thresholds: tuple[float, ...]) -> None:
    """Everything is white at 0, and each threshold shows less of it than the one before, or as much."""
    page.get_by_text("Hide Train Cams").click()
    choose_output(page, "relevance_overlay")
    choose_output(page, "edit_mask")
    set_threshold(page, 0.0)
    # Waiting for the picture, not for a time: a busy machine draws late.
    wait(lambda: mask_area(page) > 0.9)
    areas = [mask_area(page)]
    for threshold in thresholds:
        set_threshold(page, threshold)
        page.wait_for_timeout(3000)
        areas.append(float((picture(page) > 128).mean()))
    set_threshold(page, 1.0)
    wait(lambda: mask_area(page) < 0.5 * areas[0])
    areas.append(float((picture(page) > 128).mean()))
    assert areas == sorted(areas, reverse=True)


def test_the_mask_shrinks_in_the_picture_as_the_threshold_rises(page: Any) -> None:
    check_that_the_mask_shrinks(page, (0.2, 0.5))
    set_threshold(page, 0.3)


def test_a_preview_appears_and_a_wrong_value_is_refused(page: Any) -> None:
    set_threshold(page, 0.0)  # so short a run may find nothing relevant
    page.get_by_role("button", name="Preview").click()
    page.locator("img[alt=preview]").wait_for(timeout=60000)
    every = page.get_by_text("Edit every").locator("xpath=following::input[1]")
    every.fill("0")
    wait(lambda: "--pipeline.edit-every must be at least 1, not 0" in panel(page), 60)
    wait(lambda: every.input_value() == "5", 60)


def test_two_outputs_side_by_side(page: Any) -> None:
    choose_output(page, "rgb")
    alone = picture(page)
    switch = page.get_by_role("checkbox", name="Enable").first
    switch.check(force=True)
    page.get_by_label("Output render split").click()
    page.get_by_role("option", name="edit_mask", exact=True).click()
    page.wait_for_timeout(1500)
    both = picture(page)
    half = alone.shape[1] // 3  # the split is in the middle of the window, which the panel covers in part
    assert np.abs(both[:, :half] - alone[:, :half]).mean() < 3
    switch.uncheck(force=True)


def test_what_is_typed_stays_until_it_is_applied(page: Any) -> None:
    box = page.get_by_text("Instruction").locator("xpath=following::input[1]")
    box.fill("make the ball red")
    box.press("Enter")
    set_threshold(page, 0.25)
    page.wait_for_timeout(2000)
    assert box.input_value() == "make the ball red"


def test_apply_and_undo(page: Any, live_run: Path) -> None:
    choose_output(page, "rgb")
    before = picture(page)
    box = page.get_by_text("Instruction").locator("xpath=following::input[1]")
    box.fill("make the ball blue")
    box.press("Enter")
    page.wait_for_timeout(1000)
    for number, start in enumerate(["on top", "instead"]):
        count = edits(live_run)
        page.get_by_role("button", name=f"Apply {start}").click()
        wait(lambda: len(history(live_run)) == number + 2)
        wait(lambda: edits(live_run) > count and "finished" in panel(page))
    first, *applied = history(live_run)
    assert first["instruction"] == "turn the bear into a panda"
    assert {entry["instruction"] for entry in applied} == {"make the ball blue"}
    assert [entry["start"] for entry in applied] == ["on top", "instead"]
    for number in (2, 1):
        page.get_by_role("button", name="Undo").click()
        wait(lambda: len(history(live_run)) == number)
    # The first undo leaves the same words in the status line, and the panel is told after the history is written.
    wait(lambda: box.input_value() == "turn the bear into a panda")
    assert '"make the ball blue" is undone' in panel(page)
    wait(lambda: np.abs(picture(page) - before).mean() < 0.5)


def test_a_finished_run_shows_its_outputs_and_the_threshold_without_an_editor(live_run: Path, browser: Any) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **NO_NETWORK}
    port = free_port()
    arguments = ["--load-config", live_run / "config.yml", "--viewer.websocket-port", port]
    viewer = subprocess.Popen(editorless("viewer.run_viewer", *arguments), env=environment, stdout=subprocess.DEVNULL)
    try:
        wait(lambda: viewer.poll() is not None or listens(port))
        page = open_viewer(browser, port)
        text = panel(page)
        assert "Mask threshold" in text
        assert not any(label in text for label in ("Apply", "Guidance scale", "Preview", "Undo", "Reset"))
        check_that_the_mask_shrinks(page, (0.4,))
        assert viewer.poll() is None
        page.close()
    finally:
        viewer.kill()
        viewer.wait()


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
