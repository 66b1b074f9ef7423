"""Draw the images of README and docs with a model: on photographs, or on scenes where the model is the toy.

    python docs/draw_pages.py runs/mine docs/

writes demo.png and search.png, the pages in headless Chromium, and, of a model for photographs, also photographs.png
(captions and what is found for them), attention.png, filter.jpg and filter_histogram.png. photographs.py says which
photographs these are. Needs Debian's chromium and chromium-driver, the extras demo, search and test, and scikit-image.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "demo"), str(ROOT / "docs")]

import app  # noqa: E402
from browser import open_browser, save_page  # noqa: E402
from draw_retrieval import draw_found  # noqa: E402
from photographs import PHOTOGRAPHS, write_photographs  # noqa: E402
from PIL import Image  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402

from modeling_cots import ScenesDataset  # noqa: E402
from modeling_cots.data.pairs import open_pairs  # noqa: E402
from modeling_cots.scripts.error_boundary import run_script  # noqa: E402

WIDTH, SIDE = 860, 160
TOY_QUERY, TOY_WORD = "a large purple square", "purple"
SHOWN, WORDS = "rocket.jpg", ["rocket", "launch", "evening"]
SWAPPED = ("chelsea.png", "rocket.jpg"), ("coins.png", "astronaut.png")  # captions that are made wrong on purpose


def wait_for(browser, selector: str, number: int = 1) -> list:
    """The elements, when there are as many."""
    for _ in range(600):
        found = browser.find_elements("css selector", selector)
        if len(found) >= number:
            return found
        time.sleep(0.1)
    raise RuntimeError(f"{selector} does not appear.")


def write_images(folder: Path, is_toy: bool) -> Path:
    """A folder of scenes, or of photographs with their captions."""
    if not is_toy:
        return write_photographs(folder)
    folder.mkdir()
    for item in ScenesDataset("validation", image_size=SIDE):
        item["image"].save(folder / f"{item['name']}.png")
    return folder


def draw_demo(model: str, images: Path, query: str, word: str, path: Path) -> None:
    """Search, click on a word, take the image."""
    is_toy = query == TOY_QUERY
    collection = app.open_collection(model, "scenes") if is_toy else app.open_collection(model, str(images), "train")
    _, address, _ = app.launch(collection, app.examples_of(collection, is_toy), prevent_thread_lock=True)
    with open_browser(WIDTH) as browser:
        browser.get(address)
        wait_for(browser, "#query textarea")[0].send_keys(query + "\n")
        wait_for(browser, "#texts label", app.NUM_TEXTS)
        chosen = next(label for label in wait_for(browser, "#word label", 4) if label.text == word)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chosen)
        chosen.click()
        wait_for(browser, "#heat img")
        browser.execute_script("scrollTo(0, 0)")
        ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
        time.sleep(1)  # what fades in has done so
        save_page(browser, path, WIDTH)
    app.gr.close_all()


def draw_search(model: str, images: Path, query: str, path: Path) -> None:
    """Index the folder by the command, query it, take the image of the page."""
    index, page = images.parent / "IDX", images.parent / "out.html"
    run("-m", "modeling_cots.scripts.cots_search", "index", images, "--model", model, "--index", index)
    run("-m", "modeling_cots.scripts.cots_search", "query", index, query, "--top", "12", "--html", page)
    with open_browser(WIDTH) as browser:
        browser.get(page.as_uri())
        save_page(browser, path, WIDTH)


def draw_attention(model: str, images: Path, path: Path) -> None:
    """What words of a caption respond to in one photograph."""
    script, caption = ROOT / "examples" / "visualize_attention.py", PHOTOGRAPHS[SHOWN]
    run(script, images / SHOWN, caption, "--words", *WORDS, "--model", model, "--output", path)


def draw_filter(model: str, images: Path, folder: Path) -> None:
    """The scores of the pairs, four of which have the caption of another photograph."""
    captions = dict(PHOTOGRAPHS)
    for one, other in SWAPPED:
        captions[one], captions[other] = captions[other], captions[one]
    rows = [json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items()]
    (images / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    scores = images.parent / "scores"
    run(ROOT / "examples" / "visualize_filter.py", images, "--model", model, "--num_std", "1", "--output_dir", scores)
    Image.open(scores / "contact_sheet.jpg").save(folder / "filter.jpg", quality=85, optimize=True)
    Image.open(scores / "histogram.png").convert("RGB").save(folder / "filter_histogram.png", optimize=True)


def run(*words) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True)


def main(model: str, folder: str) -> None:
    is_toy, target = app.is_toy(app.load_model(model, None)[0]), Path(folder)
    query, word = (TOY_QUERY, TOY_WORD) if is_toy else (PHOTOGRAPHS[SHOWN], WORDS[0])
    with tempfile.TemporaryDirectory() as temporary:
        app.CACHE = Path(temporary, "cache")
        images = write_images(Path(temporary, "PHOTOS"), is_toy)
        draw_demo(model, images, query, word, target / "demo.png")
        draw_search(model, images, query, target / "search.png")
        if not is_toy:
            pairs = open_pairs(str(images), "train")
            draw_found(model, pairs, [2, 3, 5, 11], target / "photographs.png")
            draw_attention(model, images, target / "attention.png")
            draw_filter(model, images, target)  # last, as it makes captions wrong
    for name in ("demo.png", "search.png"):
        Image.open(target / name).convert("RGB").save(target / name, optimize=True)


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:]))
