"""The demo in a real browser, operated by typing, by clicking and by the keyboard alone; what it opens and keeps."""

import importlib.util
import io
import json
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_browser, overflow, skip_without_browser
from image_files import thin_png
from PIL import Image

from modeling_cots import COTSModel, ScenesDataset, SearchIndex

pytest.importorskip("gradio", reason='gradio is missing: pip install -e ".[demo]"')
pytest.importorskip("faiss", reason='faiss is missing: pip install -e ".[search]"')
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
def model(app, tiny_config, tiny_processor, tmp_path, monkeypatch) -> str:
    """A folder with a tiny model; what the demo keeps goes beside it."""
    monkeypatch.setattr(app, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def collection(app, model):
    return app.open_collection(model, "scenes")


@pytest.fixture
def photos(tmp_path) -> Path:
    """A plain folder of ten images."""
    folder = tmp_path / "PHOTOS"
    folder.mkdir()
    for item in ScenesDataset("validation", 10, 48):
        item["image"].save(folder / f"photo {item['pair_id']}.png")
    return folder


@pytest.fixture
def page(app, collection):
    with app.gr.Blocks():
        return app.Page(collection, [])


@pytest.fixture
def address(app, collection):
    _, local, _ = app.launch(collection, ["a red circle", "a blue star"], prevent_thread_lock=True, quiet=True)
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


def expected_texts(app, collection, hit: dict) -> list[str]:
    return [f"{text} ({score:.2f})" for text, score in app.find_texts(collection, collection.image(hit))]


def labels(app, hits: list[dict]) -> list[str]:
    return [app.label(place, hit) for place, hit in enumerate(hits, start=1)]


def wait_for_images(browser, app, hits: list[dict]) -> None:
    images = "#found button img"
    wait(
        browser,
        lambda: [e.get_attribute("alt") for e in elements(browser, images)] == labels(app, hits),
        "not these images",
    )


def search(browser, app, collection, query: str, key: str) -> list[dict]:
    """Type a query and wait for what belongs to it; returns what is found."""
    box = wait(browser, lambda: elements(browser, "#query textarea"), "no box for the query")[0]
    box.clear()
    box.send_keys(query + key)
    hits = collection.index.search(query, top=app.NUM_IMAGES)
    wait_for_images(browser, app, hits)
    first = expected_texts(app, collection, hits[0])
    wait(browser, lambda: texts(browser, "#texts label") == first, "not the texts of the first image")
    return hits


def wait_for_top(browser, element: str) -> None:
    """Until the page has scrolled to an element."""
    top = f"return document.getElementById('{element}').getBoundingClientRect().top"
    wait(browser, lambda: -2 < browser.execute_script(top) < 400, f"not scrolled to {element}")


def shown_image(browser, selector: str) -> np.ndarray:
    with urllib.request.urlopen(elements(browser, selector)[0].get_attribute("src")) as response:
        return np.asarray(Image.open(io.BytesIO(response.read())).convert("RGB"), dtype=float)


def click(browser, element) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def test_text_to_images_to_texts_to_words(app, collection, address):
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    with open_browser(WIDE) as browser:
        browser.get(address)
        hits = search(browser, app, collection, "a red circle", Keys.ENTER)
        assert wait(browser, lambda: texts(browser, "#word label"), "no words") == ["a", "red", "circle"]

        # a click on another image: the page shows its texts
        click(browser, elements(browser, "#found button")[2])
        third = expected_texts(app, collection, hits[2])
        wait(browser, lambda: texts(browser, "#texts label") == third, "not the texts of the third image")
        wait_for_top(browser, "image")

        # a click on a text makes it the caption, whose words can be clicked on
        caption = app.find_texts(collection, collection.image(hits[2]))[1][0]
        click(browser, elements(browser, "#texts label")[1])
        words = app.words_of(collection, caption)
        wait(browser, lambda: texts(browser, "#word label") == words, "not the words of that text")
        click(browser, elements(browser, "#word label")[1])
        wait(browser, lambda: elements(browser, "#heat img"), "no map")
        image = collection.image(hits[2])
        index = collection.index
        relevance = app.explain_pair(index.model, index.processor, image, caption, [words[1]])
        added = f"{relevance.word_scores[0].item():+.2f}"
        wait(browser, lambda: added in elements(browser, "#word-note")[0].text, "the map has no number")
        alt = elements(browser, "#heat img")[0].get_attribute("alt")
        assert words[1] in alt and added in alt and f"“{words[1]}” ({added})" in elements(browser, "#heat")[0].text
        expected = np.asarray(app.overlay(app.for_showing(image), relevance.word_maps[0]), dtype=float)
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
    assert {"Find images", "More images", "Bring an image", "Find similar images"} <= set(roles["button"])
    assert len(roles["radio"]) > 5
    assert all(name.strip() for names in roles.values() for name in names), roles
    assert elements(browser, "html")[0].get_attribute("lang") and browser.title
    assert [heading.tag_name for heading in elements(browser, "h1, h2")] == ["h1", "h2", "h2", "h2"]


def test_a_phone_and_the_keyboard_alone(app, collection, address):
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    with open_browser(PHONE, 800) as browser:
        browser.get(address)
        hits = search(browser, app, collection, "two green triangles", Keys.TAB + Keys.ENTER)  # the button
        assert overflow(browser) == 0
        # Tab on to the second image, past the examples and the first one; Enter takes it.
        for _ in range(30):
            focused = browser.switch_to.active_element
            if (focused.get_attribute("aria-label") or "").startswith("Thumbnail 2"):
                break
            focused.send_keys(Keys.TAB)
        focused.send_keys(Keys.ENTER)
        second = expected_texts(app, collection, hits[1])
        wait(browser, lambda: texts(browser, "#texts label") == second, "not the texts of the second image")
        elements(browser, "#word input")[0].send_keys(Keys.SPACE)
        wait(browser, lambda: elements(browser, "#heat img"), "no map")
        assert overflow(browser) == 0
        assert largest_gap(browser) < 60  # pixels


def largest_gap(browser) -> float:
    """The largest empty height between what is shown, from the heading to the end of the page."""
    script = """
    const shown = [...document.querySelectorAll("h1, h2, p, textarea, button, img, span")]
      .map(e => e.getBoundingClientRect()).filter(box => box.height > 0).sort((a, b) => a.top - b.top)
    let end = shown[0].bottom, gap = 0
    for (const box of shown) { gap = Math.max(gap, box.top - end); end = Math.max(end, box.bottom) }
    return gap"""
    return browser.execute_script(script)


def test_an_example_searches_and_more_images_and_similar_ones_appear(app, collection, address):
    skip_without_browser()
    with open_browser(WIDE) as browser:
        browser.get(address)
        wait(browser, lambda: elements(browser, "#examples button"), "no examples")[1].click()
        search_of = collection.index.search
        hits = search_of("a blue star", top=2 * app.NUM_IMAGES)
        wait_for_images(browser, app, hits[: app.NUM_IMAGES])
        click(browser, elements(browser, "#more")[0])
        wait_for_images(browser, app, hits)
        click(browser, elements(browser, "#similar")[0])
        alike = search_of(image=collection.image(hits[0]), top=app.NUM_IMAGES + 1)
        alike = [hit for hit in alike if hit["name"] != hits[0]["name"]][: app.NUM_IMAGES]
        wait_for_images(browser, app, alike)
        wait_for_top(browser, "search-note")


def test_what_goes_wrong_is_a_sentence_in_its_place(app, collection, address, tmp_path):
    skip_without_browser()
    from selenium.webdriver.common.keys import Keys

    Image.new("RGB", (20, 2_000)).save(tmp_path / "tall.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with (tmp_path / "large.jpg").open("wb") as large:
        large.truncate((app.MAX_UPLOAD + 1) * 2**20)
    with open_browser(WIDE) as browser:
        browser.get(address)
        box = wait(browser, lambda: elements(browser, "#query textarea"), "no box for the query")[0]
        for query, sentence in (("  ", "Type what the images should show."), ("dog.jpg", "bring it in step 2")):
            box.clear()
            box.send_keys(query + Keys.ENTER)
            wait(
                browser,
                lambda sentence=sentence: sentence in elements(browser, "#search-note")[0].text,
                f"{query} is not told",
            )
        names = {"broken.jpg": "damaged, or no image", "photo.heic": "HEIC", "large.jpg": "20 MB", "tall.png": ""}
        for name, sentence in names.items():
            elements(browser, "input[type=file]")[0].send_keys(str(tmp_path / name))
            wait(browser, lambda s=sentence: s in (texts(browser, "#image-note") or [""])[0], f"{name} is not told")
            assert not any(word in elements(browser, "body")[0].text for word in ("Error", "Traceback", "/gradio"))
        image = wait(browser, lambda: elements(browser, "#image img"), "no image")[0]
        assert image.size["height"] <= 400 and texts(browser, "#image-note") == [""]
        search(browser, app, collection, "<img src=x onerror=document.title=1> circle", Keys.ENTER)
        wait(browser, lambda: "circle" in texts(browser, "#word label"), "no words")
        assert browser.title.startswith("COTS")


def test_says_what_to_do_without_a_model(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit, match="examples/run_pretraining.py examples/configs/quickstart.yaml"):
        app.main()


def test_says_what_cannot_be_opened(app, model, tmp_path, capsys):
    with pytest.raises(ValueError, match="There is no folder '.*nowhere' for --images"):
        app.open_asked(app.parse_arguments(["--images", str(tmp_path / "nowhere"), "--model", model]))
    with pytest.raises(ValueError, match="There is no index"):
        app.open_asked(app.parse_arguments(["--index", str(tmp_path / "nowhere"), "--model", model]))
    with pytest.raises(SystemExit):
        app.parse_arguments(["--images", "a", "--dataset", "b"])
    assert "give one of them" in capsys.readouterr().err


def count_encoded(app, monkeypatch) -> list[int]:
    """The sizes of the batches of images that are embedded from now on."""
    sizes, encode = [], COTSModel.encode_image

    def count(self, pixel_values, **options):
        sizes.append(len(pixel_values))
        return encode(self, pixel_values, **options)

    monkeypatch.setattr(COTSModel, "encode_image", count)
    return sizes


def test_a_folder_is_embedded_once_and_then_only_what_is_new(app, model, photos, monkeypatch, capsys):
    sizes = count_encoded(app, monkeypatch)
    args = app.parse_arguments(["--images", str(photos), "--model", model])
    first = app.open_asked(args)
    assert sum(sizes) == len(first.index) == 10 and first.captions == []
    printed = capsys.readouterr()
    assert "Embedding" in printed.err and "10/10" in printed.err and "kept in" in printed.out
    assert app.open_asked(args).index.search("a dog", top=3) == first.index.search("a dog", top=3)
    assert sum(sizes) == 10
    Image.new("RGB", (40, 40), "red").save(photos / "new.jpg")
    assert len(app.open_asked(args).index) == sum(sizes) == 11
    # by weights of the same name that are others
    torch.manual_seed(1)
    COTSModel(COTSModel.from_pretrained(model).config).save_pretrained(model)
    assert len(app.open_asked(args).index) == 11 and sum(sizes) == 22


def test_texts_are_embedded_once(app, model, monkeypatch):
    first = app.open_collection(model, "scenes")
    monkeypatch.setattr(app, "encode_texts", None)
    assert torch.equal(app.open_collection(model, "scenes").caption_embeds, first.caption_embeds)
    assert len(first.captions) == len(set(first.captions)) > 500


def test_an_index_is_opened_with_its_model(app, model, photos, tmp_path):
    loaded, processor = app.load_model(model, None)
    with SearchIndex.create(tmp_path / "IDX", loaded, processor) as index:
        index.add(app.ImageFolder(photos))
    collection = app.open_asked(app.parse_arguments(["--index", str(tmp_path / "IDX")]))
    hit = collection.index.search("a dog", top=1)[0]
    path = Path(hit["name"])
    assert np.array_equal(np.asarray(collection.image(hit)), np.asarray(Image.open(path)))
    path.unlink()
    assert collection.image(hit).size == (48, 48)  # the thumbnail
    assert app.label(1, hit) == f"1. ({hit['score']:.2f}) {path.name}"


def test_an_empty_index_is_told(app, model, tmp_path):
    SearchIndex.create(tmp_path / "IDX", *app.load_model(model, None)).close()
    with pytest.raises(ValueError, match="The index is empty"):
        app.open_index(str(tmp_path / "IDX"))


def test_images_that_have_gone_hide_no_results(app, model, photos):
    with SearchIndex.create(photos.parent / "IDX", *app.load_model(model, None)) as index:
        index.add(app.ImageFolder(photos), thumbnail_side=0)
    collection = app.open_index(str(photos.parent / "IDX"))
    Path(collection.index.search("a dog", top=1)[0]["name"]).unlink()
    with app.gr.Blocks():
        page = app.Page(collection, [])
    changed = page.search("a dog")
    assert len(changed[page.hits]) == app.NUM_IMAGES and "no longer there" in changed[page.image_note]


def test_a_toy_is_called_a_toy(app, model, tmp_path):
    assert not app.is_toy(app.load_model(model, None)[0])
    for data, is_toy in (("scenes", True), ("flickr8k", False)):
        record = json.dumps({"training_data": {"name": data}})
        Path(model, "training_record.json").write_text(record)
        collection = app.open_collection(model, "scenes")
        told = [block.value for block in app.build(collection, []).blocks.values() if hasattr(block, "value")]
        assert any("This model is a toy" in str(value) for value in told) is is_toy


def test_a_word_that_adds_nothing_is_told(app):
    assert app.describe_map("the", 0.004, 0.5) == (
        "“the” adds nothing to the similarity (+0.00 of 0.50): **its map means nothing.**"
    )
    assert "adds nothing" in app.describe_map("the", -0.2, 0.5)
    assert app.describe_map("dog", 0.12, 0.5).startswith("“dog” adds +0.12 to the similarity")


def test_texts_are_told_once_and_words_have_places(app, collection, page):
    hit = collection.index.search("a dog", top=1)[0]
    found = app.find_texts(collection, collection.image(hit))
    assert len({text for text, _ in found}) == app.NUM_TEXTS
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert app.words_of(collection, "a dog and a boat") == ["a", "dog", "and", "boat"]
    assert "Choose an image first" in page.show_word(None, "a dog", "dog")[page.word_note]


def test_an_unforeseen_fault_is_a_sentence_too(app, page, monkeypatch, capsys):
    monkeypatch.setattr(page, "collection", None)
    told = page.search("a dog")
    assert told == {page.search_note: "That did not work. The terminal of the demo says why."}
    assert "AttributeError" in capsys.readouterr().err


def test_the_space_has_its_front_matter_and_phones_nobody(app):
    from huggingface_hub.repocard import metadata_load

    card = metadata_load(DEMO / "README.md")
    assert card["sdk"] == "gradio" and (DEMO / card["app_file"]).is_file() and card["license"] == "apache-2.0"
    assert len(card["short_description"]) <= 60  # the Hub refuses more
    required = (DEMO / "requirements.txt").read_text(encoding="utf-8")
    assert {"torch", "transformers", "gradio", "datasets", "accelerate", "faiss-cpu"} <= {
        line.split(">")[0].split("=")[0] for line in required.splitlines()
    }
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_brought_image_is_given_to_the_model_as_in_training(app, collection, page, tmp_path):
    """PIL alone would clip its 16 bits a pixel; and it is turned upright, once."""
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.random.default_rng(0).integers(0, 2**16, (30, 50), dtype=np.uint16)
    Image.fromarray(np.ascontiguousarray(np.rot90(levels))).save(tmp_path / "deep.png", exif=exif)
    upright = Image.fromarray((levels // 256).astype(np.uint8)).convert("RGB")
    assert np.array_equal(np.asarray(app.open_upload(str(tmp_path / "deep.png"))), np.asarray(upright))
    choices = page.bring(str(tmp_path / "deep.png"), "")[page.texts]["choices"]
    assert choices == [(f"{text} ({score:.2f})", text) for text, score in app.find_texts(collection, upright)]


@pytest.mark.parametrize("content", [thin_png(1, 4_000_000), b"no image"])
def test_a_brought_file_that_cannot_be_read_is_a_sentence(page, tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    path = str(tmp_path / "image.png")
    for told in (page.bring(path, "")[page.image_note], page.show_word(path, "a circle", "circle")[page.word_note]):
        assert told.startswith("image.png cannot be read: ") and told.endswith(".") and str(tmp_path) not in told


def test_the_heat_map_of_a_large_image_is_small(page, tmp_path):
    Image.new("RGB", (3_000, 2_000)).save(tmp_path / "image.png")
    shown = page.show_word(str(tmp_path / "image.png"), "a red circle", "circle")
    assert shown[page.heat]["value"].size == (512, 341)
