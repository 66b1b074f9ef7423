"""The page without a server, in a real browser: what it finds is what Python finds, and nothing leaves the machine."""

import base64
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from browser import open_browser, overflow, skip_without_browser
from image_files import as_bytes
from npm_packages import node_modules
from PIL import Image
from static_server import serve_static
from tiny import CAPTIONS, IMAGE_SIZE, PATCH_SIZE, TINY_ENCODER, VOCAB_SIZE
from transformers import ViTImageProcessor

from modeling_cots import COTSConfig, COTSImageProcessor, COTSModel, COTSProcessor, COTSVideoProcessor, ScenesDataset
from modeling_cots.image_reading_cots import read_image
from modeling_cots.search import browser_demo
from modeling_cots.search.browser_demo import (
    RUNTIME_FILES,
    RUNTIME_PACKAGES,
    export_browser_demo,
    image_settings,
    quantize_embeddings,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDE, PHONE = 1000, 390
NASTY = "</script><img src=x onerror=document.title=1>"
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
QUERIES = [
    *CAPTIONS,
    "a red circle",
    "two green triangles",
    "a Boat, near the BEACH!",
    "people and the dog and people and the dog " * 7,  # more tokens than the model reads
    "zürich 42 東京 🔎",
    "large yellow star on dark grass",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """A demo of 40 scenes and one nasty caption, with the model and what Python makes of the images."""
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f'{package} is missing: pip install -e ".[onnx]"')
    runtime = node_modules()
    config = COTSConfig(
        text_config={**TINY_ENCODER, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 40},
        vision_config={**TINY_ENCODER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        projection_dim=16,
        image_vocab_size=50,
        initializer_range=0.1,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = COTSProcessor(COTSImageProcessor(size=size), tiny_tokenizer, COTSVideoProcessor(size=size))
    torch.manual_seed(0)
    model = COTSModel(config).eval()
    scenes = ScenesDataset("validation", image_size=64)
    items = [scenes[place] for place in range(40)]
    items[7] = {**items[7], "captions": [NASTY]}
    folder = tmp_path_factory.mktemp("demo") / "page"
    export_browser_demo(
        model, items, folder, processor=processor, runtime=runtime, title=f"Scenes {NASTY}", examples=QUERIES[:3]
    )
    with torch.no_grad():
        pixels = processor(images=[item["image"] for item in items], return_tensors="pt")["pixel_values"]
        embeds = model.encode_image(pixels)
    return SimpleNamespace(folder=folder, model=model, processor=processor, items=items, embeds=embeds)


@pytest.fixture
def site(exported):
    with serve_static(exported.folder) as site:
        yield site


def encode_text(exported, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        rows = [exported.processor(text=[text], truncation=True, return_tensors="pt") for text in texts]
        return torch.cat([exported.model.encode_text(row["input_ids"], row["attention_mask"]) for row in rows])


def encode_image(exported, content: bytes) -> torch.Tensor:
    with torch.no_grad():
        return exported.model.encode_image(
            exported.processor(images=read_image(content), return_tensors="pt")["pixel_values"]
        )[0]


def first_five(exported, embed: torch.Tensor) -> list[tuple[int, str]]:
    scores = exported.embeds @ embed
    best = scores.topk(5)
    return [(row, f"{score:.3f}") for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


# --- in the browser


def wait(browser, condition, message: str):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, 120, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition(), message)


def text_of(browser, name: str) -> str:
    return browser.find_element("id", name).text


def load(browser, site) -> str:
    """Load the page; returns on which device it computes."""
    browser.get(f"{site.url}/")
    ready = "return document.body.dataset.ready"
    wait(browser, lambda: browser.execute_script(ready) or text_of(browser, "error"), "neither ready nor an error")
    assert text_of(browser, "error") == ""
    return browser.execute_script(ready)


def shown(browser, name: str) -> list[tuple[int, str]]:
    """The rows and cosines of the first five images of a list."""
    items = browser.find_elements("css selector", f"#{name} li")[:5]
    cosines = [item.find_element("css selector", "b").text.split()[1] for item in items]
    return [(int(item.get_attribute("data-row")), cosine) for item, cosine in zip(items, cosines, strict=True)]


def search(browser, query: str) -> list[tuple[int, str]]:
    box = browser.find_element("id", "query")
    browser.execute_script("arguments[0].value = arguments[1]", box, query)  # the driver cannot type an emoji
    box.send_keys("\n")
    wait(browser, lambda: f"for “{query}”" in text_of_content(browser, "found-note"), "nothing found")
    return shown(browser, "found")


def text_of_content(browser, name: str) -> str:
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def close_to(found: list[tuple[int, str]], expected: list[tuple[int, str]]) -> bool:
    """The same images in the same order, whose cosines differ in the last printed digit at most."""
    same = [row for row, _ in found] == [row for row, _ in expected]
    return same and all(abs(float(a) - float(b)) < 0.0011 for (_, a), (_, b) in zip(found, expected, strict=True))


def asked_by_pages(net_log: Path) -> set[str]:
    """The addresses that pages, and not Chromium itself, have asked for; of `data:` and `blob:` that word alone."""
    log = json.loads(net_log.read_text(encoding="utf-8"))
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in log["events"] if event["type"] == started and "params" in event]
    of_pages = [request["url"] for request in requests if request.get("initiator", "").startswith("http")]
    return {url.partition(":")[0] if url.startswith(("data:", "blob:")) else url for url in of_pages}


def test_finds_what_python_finds_and_asks_nobody_else(exported, site, tmp_path):
    skip_without_browser()
    net_log = tmp_path / "net_log.json"
    with open_browser(WIDE, flags=(f"--log-net-log={net_log}",)) as browser:
        assert load(browser, site) == "wasm"
        for query, embed in zip(QUERIES, encode_text(exported, QUERIES), strict=True):
            assert close_to(search(browser, query), first_five(exported, embed)), query

        content = as_bytes(ScenesDataset("train", image_size=90)[5]["image"], "JPEG")
        (tmp_path / "mine.jpg").write_bytes(content)
        labels = ["a red circle", "the white dog", "  people walk along the beach  "]
        box = browser.find_element("id", "labels")
        box.clear()
        box.send_keys("\n".join([*labels, "", labels[0]]))
        browser.find_element("id", "file").send_keys(str(tmp_path / "mine.jpg"))
        wait(browser, lambda: "The nearest 12 of 40" in text_of(browser, "nearest-note"), "no nearest images")
        embed = encode_image(exported, content)
        assert close_to(shown(browser, "nearest"), first_five(exported, embed))

        labels = [label.strip() for label in labels]
        logits = encode_text(exported, labels) @ embed / exported.model.config.temperature
        shares = dict(zip(labels, (100 * logits.softmax(0)).tolist(), strict=True))
        items = [item.text.rpartition("\n") for item in browser.find_elements("css selector", "#scores li")]
        assert [name for name, _, _ in items] == sorted(labels, key=shares.__getitem__, reverse=True)
        for name, _, percent in items:
            assert abs(float(percent.removesuffix(" %")) - shares[name]) < 0.2

        assert browser.title == f"Scenes {NASTY}" == browser.find_element("css selector", "h1").text
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    asked = asked_by_pages(net_log)
    assert f"{site.url}/encoders/text_model.onnx" in asked
    assert {url for url in asked if not url.startswith((f"{site.url}/", "data", "blob"))} == set()


def test_pixels_and_embeddings_are_pythons(exported, site):
    """Pixels are equal bit for bit, in all modes that browsers read; embeddings to 1e-4."""
    skip_without_browser()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (61, 93, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise[:6, :9]).resize((210, 130), Image.Resampling.BICUBIC)
    transparent = np.concatenate([noise, rng.integers(0, 2, (61, 93, 1), dtype=np.uint8) * 255], axis=2)
    deep = rng.integers(0, 2**16, (40, 50), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = [
        as_bytes(Image.fromarray(noise)),
        as_bytes(Image.fromarray(noise[:9, :14])),
        as_bytes(smooth, "JPEG"),
        as_bytes(smooth, "JPEG", exif=exif),
        as_bytes(smooth, "WEBP"),
        as_bytes(Image.fromarray(noise).convert("L")),
        as_bytes(Image.fromarray(noise).convert("P")),
        as_bytes(Image.fromarray(transparent)),
        as_bytes(Image.fromarray(deep)),
    ]
    script = """
        const [files, settings, done] = arguments;
        const bytes = (file) => Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
        import("/images.js").then(({ pixelValues }) =>
          Promise.all(files.map(async (file) => Array.from(await pixelValues(new Blob([bytes(file)]), settings)))),
        ).then(done, (error) => done(String(error)));
    """
    encoded = [base64.b64encode(content).decode() for content in contents]
    with open_browser(WIDE) as browser:
        browser.get(f"{site.url}/README.md")
        for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
            size = {"height": 20, "width": 31}
            processor = COTSImageProcessor(size=size, resample=resample)
            got = browser.execute_async_script(script, encoded, image_settings(processor))
            assert not isinstance(got, str), got
            for values, content in zip(got, contents, strict=True):
                expected = processor(images=read_image(content), return_tensors="pt")["pixel_values"][0]
                torch.testing.assert_close(torch.tensor(values).view(3, 20, 31), expected, rtol=0, atol=1e-6)

        texts = [*QUERIES, "", "a " * 200]
        got = torch.tensor(browser.execute_async_script(ENCODE, json.dumps(read_demo(exported)), texts, encoded))
    expected = torch.cat([encode_text(exported, texts), *(encode_image(exported, c)[None] for c in contents)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# The worker of the page, asked as the page asks it.
ENCODE = """
    const [demo, texts, files, done] = arguments;
    const worker = new Worker("/encoder.js", { type: "module" });
    worker.postMessage({ demo: JSON.parse(demo), device: "wasm", dtype: "float32" });
    let id = 0;
    const ask = (name, request) => new Promise((resolve, reject) => {
      const mine = ++id;
      worker.addEventListener("message", ({ data }) => {
        if (data.id === mine && data.error !== undefined) reject(data.error);
        else if (data.id === mine && data.bytes === undefined) resolve(data.result);
      });
      worker.postMessage({ id: mine, name, ...request });
    });
    const blob = (file) => new Blob([Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0))]);
    (async () => {
      await ask("load", { encoder: "text" });
      await ask("load", { encoder: "image" });
      const found = await ask("texts", { texts });
      for (const file of files) found.push(await ask("image", { file: blob(file) }));
      return found.map((embed) => Array.from(embed));
    })().then(done, (error) => done(String(error)));
"""


def read_demo(exported) -> dict:
    return json.loads((exported.folder / "demo.json").read_text(encoding="utf-8"))


def test_works_offline_after_the_first_load_and_then_with_threads(exported, site):
    skip_without_browser()
    query = QUERIES[1]
    expected = first_five(exported, encode_text(exported, [query])[0])
    with open_browser(WIDE) as browser:
        load(browser, site)
        assert not browser.execute_script("return crossOriginIsolated")
        assert close_to(search(browser, query), expected)
        browser.execute_async_script("navigator.serviceWorker.ready.then(arguments[0])")
        site.is_down = True
        site.requests.clear()
        load(browser, site)
        assert close_to(search(browser, query), expected)
        assert browser.execute_script("return crossOriginIsolated")  # by the service worker: memory may be shared
        assert not any(path.startswith(("encoders/", "collection/", "runtime/")) for path in site.requests)


def test_a_new_version_of_the_page_takes_the_place_of_the_old_one(exported, site):
    skip_without_browser()
    with open_browser(WIDE) as browser:
        load(browser, site)
        entries = json.loads((exported.folder / "collection/entries.json").read_text(encoding="utf-8"))
        entries[0]["caption"] = "another caption"
        content = json.dumps(entries).encode()
        demo = read_demo(exported)
        demo["files"]["collection/entries.json"] |= {"bytes": len(content), "sha256": browser_demo.digest(content)}
        site.replaced = {"collection/entries.json": content, "demo.json": json.dumps(demo).encode()}
        site.requests.clear()
        load(browser, site)
        assert {path for path in site.requests if "/" in path} == {"collection/entries.json"}
        kept = browser.execute_async_script(
            "const done = arguments[0]; caches.open('cots-demo /').then((cache) => cache.keys())"
            ".then((keys) => done(keys.map((key) => key.url.split('/').pop())))"
        )
        used = {entry["sha256"] for entry in demo["files"].values()}
        assert set(kept) <= used and browser_demo.digest(content) in kept


def damaged(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    "path, damage, said",
    [
        ("encoders/text_model.onnx", damaged, "encoders/text_model.onnx is damaged"),
        ("encoders/vision_model.onnx", lambda content: content[:-7], "encoders/vision_model.onnx is damaged"),
        (
            "collection/embeddings.bin",
            lambda content: None,
            "embeddings.bin is missing on the server (404)",
        ),
        ("runtime/onnxruntime-web/dist/ort.wasm.min.mjs", damaged, "ort.wasm.min.mjs is damaged"),
        ("demo.json", lambda content: content[:50], "demo.json, which lists this page's files, is damaged"),
        ("demo.json", lambda content: None, "demo.json, which lists this page's files, is missing (404)"),
        ("encoder.js", lambda content: None, "encoder.js or one that it needs, is missing"),
        ("images.js", lambda content: None, "encoder.js or one that it needs, is missing"),
    ],
)
def test_a_broken_file_of_the_page_is_told_in_a_sentence(exported, site, path, damage, said):
    skip_without_browser()
    site.replaced[path] = damage((exported.folder / path).read_bytes())
    with open_browser(PHONE) as browser:
        browser.get(f"{site.url}/")
        wait(browser, lambda: said in text_of(browser, "error"), said)
        assert "Not everything could be loaded" in text_of(browser, "status")
        assert browser.find_element("id", "query").is_displayed() and overflow(browser) == 0
        if path == "encoders/vision_model.onnx":  # the search by text needs no image encoder
            assert close_to(search(browser, QUERIES[0]), first_five(exported, encode_text(exported, QUERIES[:1])[0]))


def test_a_page_without_its_script_says_so(site):
    skip_without_browser()
    site.replaced["app.js"] = None
    with open_browser(PHONE) as browser:
        browser.get(f"{site.url}/")
        assert "one of the page's files is missing" in text_of(browser, "status").replace("\n", " ")


def test_a_brought_file_that_is_no_image_is_told_and_the_next_one_works(exported, site, tmp_path):
    skip_without_browser()
    (tmp_path / "letter.jpg").write_bytes(b"no image")
    exported.items[3]["image"].save(tmp_path / "scene.png")
    with open_browser(WIDE) as browser:
        load(browser, site)
        browser.find_element("id", "file").send_keys(str(tmp_path / "letter.jpg"))
        said = "“letter.jpg” cannot be read as an image. Try another JPEG, PNG or WebP file."
        wait(browser, lambda: text_of(browser, "error") == said, "not told")
        browser.find_element("id", "file").send_keys(str(tmp_path / "scene.png"))
        wait(browser, lambda: shown(browser, "nearest"), "nothing found")
        assert text_of(browser, "error") == "" and shown(browser, "nearest")[0][0] == 3


def test_progress_and_the_size_of_the_download_are_shown(exported, site):
    skip_without_browser()
    total = f"{browser_demo.download_sizes(read_demo(exported))['wasm'] / 1e6:.1f} MB"
    site.gates["encoders/text_model.onnx"] = threading.Event()
    with open_browser(PHONE) as browser:
        browser.get(f"{site.url}/")
        wait(browser, lambda: "the text encoder" in text_of(browser, "status"), "no progress")
        bar = browser.find_element("id", "progress")
        assert f"of {total}, once" in text_of(browser, "status") and overflow(browser) == 0
        assert bar.is_displayed() and 0 < float(bar.get_attribute("value")) < 1
        browser.find_element("id", "query").send_keys(QUERIES[0] + "\n")
        assert "as soon as the encoders are loaded" in text_of(browser, "found-note")
        site.gates["encoders/text_model.onnx"].set()
        wait(browser, lambda: shown(browser, "found"), "the search did not run after loading")
        wait(browser, lambda: f"{total} loaded" in text_of(browser, "status"), "not ready")
        assert not bar.is_displayed()


def test_a_large_download_waits_for_a_click_and_is_asked_for_once(exported, site):
    skip_without_browser()
    script = (exported.folder / "app.js").read_text(encoding="utf-8")
    site.replaced["app.js"] = script.replace("ASK_FROM_BYTES = 100e6", "ASK_FROM_BYTES = 1e6").encode()
    with open_browser(PHONE) as browser:
        browser.get(f"{site.url}/")
        button = browser.find_element("id", "start")
        wait(browser, button.is_displayed, "no button")
        assert button.text.startswith("Download ") and button.text.endswith(" MB and start")
        assert not any("/" in path for path in site.requests)
        button.click()
        wait(browser, lambda: browser.execute_script("return document.body.dataset.ready"), "not ready")
        load(browser, site)  # without a click


def test_a_phone_and_the_keyboard_alone(exported, site, tmp_path):
    skip_without_browser()
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def focused() -> str:
        return browser.switch_to.active_element.get_attribute("id") or browser.switch_to.active_element.text

    with open_browser(PHONE, 800) as browser:
        load(browser, site)
        stops = []
        for _ in range(7):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            stops.append(focused())
        assert stops == ["query", "find", *QUERIES[:3], "file", "labels"]
        browser.find_element("id", "query").send_keys(Keys.TAB + Keys.TAB)
        browser.switch_to.active_element.send_keys(Keys.ENTER)  # the first example
        wait(browser, lambda: shown(browser, "found"), "nothing found")
        exported.items[0]["image"].save(tmp_path / "scene.png")
        browser.find_element("id", "file").send_keys(str(tmp_path / "scene.png"))
        wait(browser, lambda: shown(browser, "nearest"), "nothing found")
        assert overflow(browser) == 0
        search(browser, QUERIES[0])
        controls = browser.find_elements("css selector", "input, button, textarea")
        assert all(control.accessible_name.strip() for control in controls if control.is_displayed())
        assert all(image.get_attribute("alt") for image in browser.find_elements("css selector", "img"))
        assert [heading.tag_name for heading in browser.find_elements("css selector", "h1, h2")] == ["h1"] + 3 * ["h2"]
        browser.find_element("id", "query").clear()
        browser.find_element("id", "query").send_keys("  " + Keys.ENTER)
        assert "Type what the images should show" in text_of(browser, "found-note")


@pytest.mark.slow
def test_finds_the_same_on_a_graphics_card(exported, site):
    """SwiftShader is one in software: WebGPU in float32."""
    skip_without_browser()
    with open_browser(WIDE, flags=SWIFTSHADER) as browser:
        if load(browser, site) != "webgpu":
            pytest.skip("this Chromium has no WebGPU in software")
        for query, embed in zip(QUERIES, encode_text(exported, QUERIES), strict=True):
            assert close_to(search(browser, query), first_five(exported, embed)), query


# --- the export


def test_embeddings_in_int8_rank_as_they_are():
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2_000, 64)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    embeds[5] = 0
    scales, coarse, fine = quantize_embeddings(embeds)
    assert coarse.dtype == fine.dtype == np.int8 and scales.dtype == np.float32
    restored = scales[:, None] * (coarse + fine / 254)
    assert np.abs(restored - embeds).max() < 2e-5
    assert np.abs(scales[:, None] * coarse - embeds).max() <= scales.max() / 2 * 1.001


def test_without_an_npm_folder_the_runtime_comes_from_a_cdn_by_version_and_checksum(exported, tmp_path):
    folder = tmp_path / "page"
    export_browser_demo(exported.model, exported.items[:3], folder, processor=exported.processor, dtype="int8")
    demo = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert not (folder / "runtime").exists()
    packages = json.loads((Path(__file__).parents[1] / "node/package.json").read_text(encoding="utf-8"))[
        "dependencies"
    ]
    assert {name: packages[name] for name in RUNTIME_PACKAGES} == RUNTIME_PACKAGES
    for name, (size, sha256) in RUNTIME_FILES.items():
        content = (node_modules() / name).read_bytes()
        assert len(content) == size and browser_demo.digest(content) == sha256
        (package,) = [package for package in RUNTIME_PACKAGES if name.startswith(package)]
        url = f"https://cdn.jsdelivr.net/npm/{package}@{RUNTIME_PACKAGES[package]}{name.removeprefix(package)}"
        assert demo["files"][name] == {"url": url, "bytes": size, "sha256": sha256}
    assert "connect-src 'self' https://cdn.jsdelivr.net\"" in (folder / "index.html").read_text(encoding="utf-8")
    assert set(demo["encoders"]["text"]) == {"int8", "float16", "float32"}
    local = (exported.folder / "index.html").read_text(encoding="utf-8")
    assert "connect-src 'self'\"" in local and "jsdelivr" not in local


def test_the_folder_is_a_static_space_and_names_no_place_of_this_machine(exported, tmp_path):
    for name in ("a dog.png", "b.png"):
        (tmp_path / "secret").mkdir(exist_ok=True)
        exported.items[0]["image"].save(tmp_path / "secret" / name)
    folder = tmp_path / "page"
    export_browser_demo(exported.model, tmp_path / "secret", folder, processor=exported.processor)
    card = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["sdk"] == "static" and (folder / head["app_file"]).is_file() and len(head["short_description"]) <= 60
    assert head["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    sizes = browser_demo.download_sizes(json.loads((folder / "demo.json").read_text(encoding="utf-8")))
    assert f"{sizes['wasm'] / 1e6:.1f} MB" in card and "2 images" in card
    names = [e["name"] for e in json.loads((folder / "collection/entries.json").read_text(encoding="utf-8"))]
    assert names == ["a dog.png", "b.png"]
    for path in folder.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_refusals(exported, tmp_path):
    def export(**options):
        folder = options.pop("folder", tmp_path / "page")
        export_browser_demo(exported.model, exported.items[:2], folder, **{"processor": exported.processor, **options})

    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        export(folder=tmp_path)
    with pytest.raises(ValueError, match="must be one of float32, int8, got 'float8'"):
        export(dtype="float8")
    with pytest.raises(ValueError, match="has no onnxruntime-web/dist.*npm install --ignore-scripts onnxruntime-web@"):
        export(runtime=tmp_path)
    for name in RUNTIME_FILES:
        (tmp_path / "npm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "npm" / name).write_bytes(b"of another version")
    with pytest.raises(ValueError, match="is of another version. Install"):
        export(runtime=tmp_path / "npm")
    shorter = ViTImageProcessor(size={"shortest_edge": 32})
    with pytest.raises(ValueError, match="one height and width, and this ViTImageProcessor does not"):
        image_settings(shorter)
    with pytest.raises(ValueError, match="bilinearly or bicubically, and not by resample="):
        image_settings(ViTImageProcessor(size={"height": 32, "width": 32}, resample=Image.Resampling.NEAREST))
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="has no image"):
        export_browser_demo(exported.model, tmp_path / "images", tmp_path / "page", processor=exported.processor)
    assert not (tmp_path / "page").exists()
