"""The demo in a real browser, operated by typing, by clicking and by the keyboard alone."""

import importlib.util
import io
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_browser, overflow, skip_without_browser
from image_files import thin_png
from PIL import Image

from modeling_cots import COTSModel

pytest.importorskip("gradio", reason='gradio is missing: pip install -e ".[demo]"')
pytest.importorskip("matplotlib", reason='matplotlib is missing: pip install -e ".[demo]"')

DEMO = Path(__file__).parents[2] / "demo"
WIDE, PHONE = 1000, 390


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("demo_app", DEMO / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def collection(app, tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return app.open_collection(str(tmp_path / "model"), "scenes", "validation")


@pytest.fixture
def address(app, collection, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    page, local, _ = app.launch(collection, ["a red circle"], prevent_thread_lock=True, quiet=True)
    yield local
    app.gr.close_all()


def wait(browser, condition, message: str):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, 60, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition(), message)


def elements(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def texts(browser, selector: str) -> list[str]:
    return [element.text for element in elements(browser, selector)]


def expected_texts(app, collection, image_id: int) -> list[str]:
    return [f"{text} ({score:.2f})" for text, score in app.find_texts(collection, collection.image(image_id))]


def search(browser, app, collection, query: str, key: str) -> list[int]:
    """Type a query and wait for what belongs to it; returns the ids found."""
    box = wait(browser, lambda: elements(browser, "#query textarea"), "no box for the query")[0]
    box.clear()
    box.send_keys(query + key)
    found = app.find_images(collection, query)
    alts = [
        f"{place}. ({score:.2f}) {collection.items[image_id]['captions'][0]}"
        for place, (image_id, score) in enumerate(found, start=1)
    ]
    images = "#found button img"
    wait(browser, lambda: [e.get_attribute("alt") for e in elements(browser, images)] == alts, "not these images")
    first = expected_texts(app, collection, found[0][0])
    wait(browser, lambda: texts(browser, "#texts label") == first, "not the texts of the first image")
    return [image_id for image_id, _ in found]


def shown_image(browser, selector: str) -> np.ndarray:
    with urllib.request.urlopen(elements(browser, selector)[0].get_attribute("src")) as response:
        return np.asarray(Image.open(io.BytesIO(response.read())).convert("RGB"), dtype=float)


def test_text_to_images_to_texts_to_words(app, collection, address):
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    with open_browser(WIDE) as browser:
        browser.get(address)
        ids = search(browser, app, collection, "a red circle", Keys.ENTER)
        assert wait(browser, lambda: texts(browser, "#word label"), "no words") == ["a", "red", "circle"]

        # a click on another image: its texts
        elements(browser, "#found button")[2].click()
        third = expected_texts(app, collection, ids[2])
        wait(browser, lambda: texts(browser, "#texts label") == third, "not the texts of the third image")

        # a click on a text makes it the caption, whose words can be clicked on
        elements(browser, "#texts label")[1].click()
        caption = app.find_texts(collection, collection.image(ids[2]))[1][0]
        words = app.words_of(collection, caption)
        wait(browser, lambda: texts(browser, "#word label") == words, "not the words of that text")
        elements(browser, "#word label")[1].click()
        wait(browser, lambda: elements(browser, "#heat img"), "no map")
        wait(browser, lambda: words[1] in elements(browser, "#heat img")[0].get_attribute("alt"), "not said")
        assert f"“{words[1]}”" in elements(browser, "#heat")[0].text
        image = Image.fromarray(shown_image(browser, "#image img").astype(np.uint8))
        relevance = app.explain_pair(collection.model, collection.processor, image, caption, [words[1]])
        expected = np.asarray(app.overlay(image, relevance.word_maps[0]), dtype=float)
        assert np.abs(shown_image(browser, "#heat img") - expected).mean() < 1

        check_labels(browser)
        assert overflow(browser) == 0
        foreign = "return performance.getEntriesByType('resource').map(e => e.name)"
        assert all(name.startswith((address, "data:", "blob:")) for name in browser.execute_script(foreign))
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def check_labels(browser) -> None:
    """Every control has a role and a name for screen readers."""
    roles = {}
    for element in elements(browser, "textarea, input:not([type=file]), button, img, [role=radiogroup]"):
        if element.is_displayed():
            roles.setdefault(element.aria_role, []).append(element.accessible_name)
    assert {"What should the images show?", "Caption"} <= set(roles["textbox"])
    assert {"Words", "Texts that fit it, best first"} <= set(roles["radiogroup"])
    assert "Find images" in roles["button"] and len(roles["radio"]) > 5
    assert all(name.strip() for names in roles.values() for name in names), roles
    assert elements(browser, "html")[0].get_attribute("lang") and browser.title
    assert [heading.tag_name for heading in elements(browser, "h1, h2")] == ["h1", "h2", "h2", "h2"]


def test_a_phone_and_the_keyboard_alone(app, collection, address):
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    with open_browser(PHONE, 800) as browser:
        browser.get(address)
        ids = search(browser, app, collection, "two green triangles", Keys.TAB + Keys.ENTER)  # the button
        assert overflow(browser) == 0
        # Tab on to the second image, past the example and the first one; Enter takes it.
        for _ in range(30):
            focused = browser.switch_to.active_element
            if (focused.get_attribute("aria-label") or "").startswith("Thumbnail 2"):
                break
            focused.send_keys(Keys.TAB)
        focused.send_keys(Keys.ENTER)
        second = expected_texts(app, collection, ids[1])
        wait(browser, lambda: texts(browser, "#texts label") == second, "not the texts of the second image")
        elements(browser, "#word input")[0].send_keys(Keys.SPACE)
        wait(browser, lambda: elements(browser, "#heat img"), "no map")
        assert overflow(browser) == 0


def test_an_empty_query_is_told_and_markup_is_text(app, collection, address):
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    with open_browser(WIDE) as browser:
        browser.get(address)
        box = wait(browser, lambda: elements(browser, "#query textarea"), "no box for the query")[0]
        box.send_keys("  " + Keys.ENTER)
        wait(browser, lambda: "Type what the images should show" in elements(browser, "body")[0].text, "not told")
        search(browser, app, collection, "<img src=x onerror=document.title=1> circle", Keys.ENTER)
        wait(browser, lambda: "circle" in texts(browser, "#word label"), "no words")
        assert browser.title.startswith("COTS")


def test_says_what_to_do_without_a_model(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit, match="examples/run_pretraining.py examples/configs/quickstart.yaml"):
        app.main()


def test_texts_are_told_once_and_words_have_places(app, collection):
    found = app.find_texts(collection, collection.image(3))
    assert len({text for text, _ in found}) == app.NUM_TEXTS
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert app.words_of(collection, "a dog and a boat") == ["a", "dog", "and", "boat"]
    assert app.Page(collection).show_word(None, "a dog", "dog") is None


def test_the_space_has_its_front_matter_and_phones_nobody(app):
    from huggingface_hub.repocard import metadata_load

    card = metadata_load(DEMO / "README.md")
    assert card["sdk"] == "gradio" and (DEMO / card["app_file"]).is_file() and card["license"] == "apache-2.0"
    assert len(card["short_description"]) <= 60  # the Hub refuses more
    required = (DEMO / "requirements.txt").read_text(encoding="utf-8")
    assert {"torch", "transformers", "gradio", "datasets", "accelerate"} <= {
        line.split(">")[0].split("=")[0] for line in required.splitlines()
    }
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_brought_image_is_given_to_the_model_as_in_training(app, collection, tmp_path):
    """Gradio would clip its 16 bits a pixel; what it turns upright, nobody turns once more."""
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.random.default_rng(0).integers(0, 2**16, (30, 50), dtype=np.uint16)
    Image.fromarray(np.ascontiguousarray(np.rot90(levels))).save(tmp_path / "deep.png", exif=exif)
    image = next(block for block in app.build(collection, []).blocks.values() if block.elem_id == "image")
    path = image.preprocess(image.data_model(path=str(tmp_path / "deep.png"), orig_name="deep.png"))
    upright = Image.fromarray((levels // 256).astype(np.uint8)).convert("RGB")
    assert np.array_equal(np.asarray(app.open_upload(path)), np.asarray(upright))
    choices, _ = app.Page(collection).describe(path)
    found = app.find_texts(collection, upright)
    assert choices["choices"] == [(f"{text} ({score:.2f})", text) for text, score in found]


@pytest.mark.parametrize("content", [thin_png(1, 4_000_000), b"no image"])
def test_a_brought_file_that_cannot_be_read_is_an_error_on_the_page(app, collection, tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    for act in (
        app.Page(collection).describe,
        lambda path: app.Page(collection).show_word(path, "a circle", "circle"),
    ):
        with pytest.raises(app.gr.Error, match="This image cannot be read. (The image has 1 x|Unidentified)"):
            act(str(tmp_path / "image.png"))


def test_the_heat_map_of_a_large_image_is_small(app, collection, tmp_path):
    Image.new("RGB", (3_000, 2_000)).save(tmp_path / "image.png")
    shown = app.Page(collection).show_word(str(tmp_path / "image.png"), "a red circle", "circle")
    assert shown["value"].size == (512, 341)
