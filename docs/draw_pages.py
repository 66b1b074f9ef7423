"""Photograph the demo and a page of search results in headless Chromium, for the docs.

    python docs/draw_pages.py runs/quickstart docs/

writes demo.png and search.png. Needs Debian's chromium and chromium-driver, and the extras demo, search and test.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "demo")]

import app  # noqa: E402
from browser import open_browser, save_page  # noqa: E402
from PIL import Image  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402

from modeling_cots import ScenesDataset  # noqa: E402
from modeling_cots.scripts.error_boundary import run_script  # noqa: E402

QUERY, WORD, WIDTH, SIDE = "a large purple square", "purple", 860, 160


def wait_for(browser, selector: str, number: int = 1) -> list:
    """The elements, when there are as many."""
    for _ in range(600):
        found = browser.find_elements("css selector", selector)
        if len(found) >= number:
            return found
        time.sleep(0.1)
    raise RuntimeError(f"{selector} does not appear.")


def draw_demo(browser, model: str, path: Path) -> None:
    """Search, click on a word, take the image."""
    _, address, _ = app.launch(app.open_collection(model, "scenes", "validation"), [QUERY], prevent_thread_lock=True)
    browser.get(address)
    wait_for(browser, "#query textarea")[0].send_keys(QUERY + "\n")
    wait_for(browser, "#texts label", app.NUM_TEXTS)
    next(label for label in wait_for(browser, "#word label", 4) if label.text == WORD).click()
    wait_for(browser, "#heat img")
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    time.sleep(1)  # what fades in has done so
    save_page(browser, path, WIDTH)
    app.gr.close_all()


def draw_search(browser, model: str, path: Path) -> None:
    """Index a folder of images by the command, query it, take the image of the page."""
    with tempfile.TemporaryDirectory() as folder:
        photos, index, page = Path(folder, "PHOTOS"), Path(folder, "IDX"), Path(folder, "out.html")
        photos.mkdir()
        for item in ScenesDataset("validation", image_size=SIDE):
            item["image"].save(photos / f"{item['name']}.png")
        command = [sys.executable, "-m", "modeling_cots.scripts.cots_search"]
        subprocess.run([*command, "index", photos, "--model", model, "--index", index], check=True)
        subprocess.run([*command, "query", index, QUERY, "--top", "12", "--html", page], check=True)
        browser.get(page.as_uri())
        save_page(browser, path, WIDTH)


def main(model: str, folder: str) -> None:
    for draw, name in ((draw_demo, "demo.png"), (draw_search, "search.png")):
        with open_browser(WIDTH) as browser:
            draw(browser, model, Path(folder, name))
        Image.open(Path(folder, name)).convert("RGB").save(Path(folder, name), optimize=True)


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:]))
