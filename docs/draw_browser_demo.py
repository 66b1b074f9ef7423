"""Take the image of the page without a server in headless Chromium, for the docs.

    python docs/draw_browser_demo.py runs/quickstart docs/browser.png

Needs Debian's chromium and chromium-driver, the extras onnx and test, and the npm packages of tests/node.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from browser import open_browser, save_page  # noqa: E402
from npm_packages import NODE  # noqa: E402
from PIL import Image  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from static_server import serve_static  # noqa: E402

from modeling_cots import ScenesDataset, export_browser_demo  # noqa: E402
from modeling_cots.scripts.error_boundary import run_script  # noqa: E402

QUERY, WIDTH, SIDE = "a large purple square", 860, 320
EXAMPLES = ["a yellow star", "two green circles", "a red heart on a striped wall", "a purple cross and an orange hoop"]
BROUGHT = 100  # the scene that a visitor brings


def wait_for(browser, selector: str) -> None:
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements("css selector", selector))


def draw(browser, address: str, image: Path, path: Path) -> None:
    """Search by a text and by an image; take the image of the page down to the labels."""
    browser.get(address)
    wait_for(browser, "[data-ready]")
    browser.find_element("id", "query").send_keys(QUERY + "\n")
    browser.find_element("id", "file").send_keys(str(image))
    wait_for(browser, "#found li")
    wait_for(browser, "#scores li")
    save_page(browser, path, WIDTH)
    end = browser.find_element("id", "nearest-note").location["y"]
    Image.open(path).convert("RGB").crop((0, 0, WIDTH, end)).save(path, optimize=True)


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError(f"Give the model and the file to write:\n{__doc__}")
    model, path = sys.argv[1:]
    scenes = ScenesDataset("validation", image_size=SIDE)
    with tempfile.TemporaryDirectory() as folder:
        page, image = Path(folder, "page"), Path(folder, "drawing.png")
        scenes[BROUGHT]["image"].save(image)
        options = {"title": "Search drawn scenes", "examples": EXAMPLES}
        export_browser_demo(model, scenes, page, runtime=NODE / "node_modules", **options)
        with serve_static(page) as site, open_browser(WIDTH) as browser:
            draw(browser, site.url, image, Path(path))


if __name__ == "__main__":
    run_script(main)
