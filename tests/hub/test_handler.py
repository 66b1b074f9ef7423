"""The handler of Inference Endpoints: right answers, and a refusal instead of an accident for everything else.

How it reads images is in `test_handler_images.py`.
"""

import base64
import importlib.util
import json
import socket
from collections import Counter

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import as_base64, as_bytes
from PIL import Image

from modeling_cots import COTSModel
from modeling_cots.hub import handler as hub_handler
from modeling_cots.hub.handler import EndpointHandler, Query, RequestError, parse_payload

LABELS = ["a red circle", "two dogs", "the sea"]


class StubProcessor:
    """Texts to counts of letters (`input_ids` (B, 26)), images to mean colors (`pixel_values` (B, 3))."""

    def __call__(self, text=None, images=None, return_tensors=None, padding=False, truncation=False):
        assert return_tensors == "pt" and (text is None or (padding and truncation))
        inputs = {}
        if text is not None:
            inputs["input_ids"] = torch.tensor([[t.lower().count(chr(97 + i)) + 1.0 for i in range(26)] for t in text])
        if images is not None:
            pixels = [list(image.convert("RGB").resize((1, 1)).tobytes()) for image in images]
            inputs["pixel_values"] = torch.tensor(pixels, dtype=torch.float32) + 1
        return inputs


class StubModel(torch.nn.Module):
    def encode_text(self, input_ids):
        return torch.nn.functional.normalize(input_ids[:, :3])

    def encode_image(self, pixel_values):
        return torch.nn.functional.normalize(pixel_values)

    def forward(self, input_ids, pixel_values):
        self.logits_per_image = 20 * self.encode_image(pixel_values) @ self.encode_text(input_ids).T
        return self


@pytest.fixture
def handler(monkeypatch) -> EndpointHandler:
    """A handler over the stubs; `loaded` is how they were asked for."""
    loaded = []

    def load(kind):
        return lambda path, **kwargs: loaded.append((path, kwargs)) or kind()

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load(StubModel))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load(StubProcessor))
    handler = EndpointHandler("repository")
    handler.loaded = loaded
    return handler


def test_code_and_weights_are_those_of_the_repository(handler):
    assert handler.loaded == [("repository", {"trust_remote_code": True})] * 2
    assert not handler.model.training


def test_labels_are_ranked_by_their_probability(handler, image):
    answer = handler({"inputs": as_base64(image), "parameters": {"candidate_labels": LABELS}})
    inputs = StubProcessor()([f"This is a photo of {label}." for label in LABELS], [image], "pt", True, True)
    similarities = (
        20
        * handler.model.encode_text(inputs["input_ids"])
        @ handler.model.encode_image(inputs["pixel_values"]).squeeze(0)
    )
    weights = dict(zip(LABELS, similarities.exp().tolist(), strict=True))
    expected = {label: weight / sum(weights.values()) for label, weight in weights.items()}
    assert [a["label"] for a in answer] == sorted(LABELS, key=expected.get, reverse=True)
    assert {a["label"]: a["score"] for a in answer} == pytest.approx(expected, abs=1e-5)


def test_the_ways_to_ask_are_one_question(handler, image):
    text = as_base64(image)
    labels = {"candidate_labels": LABELS, "hypothesis_template": "{}"}
    expected = handler({"inputs": text, "parameters": labels})
    assert {a["label"] for a in expected} == set(LABELS)
    for payload in [
        {"inputs": {"image": text, **labels}},
        {"inputs": {"image": text}, "parameters": labels},
        {"inputs": image, "parameters": labels},
        {"inputs": text, "parameters": {**labels, "candidate_labels": ", ".join(LABELS)}},
    ]:
        assert handler(payload) == expected
    assert handler({"inputs": text, "parameters": {"candidate_labels": LABELS}}) != expected


def test_embeddings_of_texts(handler):
    expected = handler.model.encode_text(StubProcessor()(LABELS, None, "pt", True, True)["input_ids"]).tolist()
    assert handler({"inputs": LABELS}) == handler({"inputs": {"text": LABELS}}) == expected
    assert handler({"inputs": LABELS[1]}) == handler({"inputs": {"text": LABELS[1]}}) == expected[1]
    assert handler({"inputs": LABELS[1:2]}) == expected[1:2]
    url = "https://127.0.0.1/"  # explicitly a text, it is not fetched
    assert len(handler({"inputs": {"text": url}})) == 3


def test_embedding_of_a_image_from_anywhere(handler, image, monkeypatch):
    expected = handler.model.encode_image(StubProcessor()(None, [image], "pt")["pixel_values"])[0].tolist()
    content, url = as_bytes(image), "https://images.test/image.png"
    monkeypatch.setattr(hub_handler, "fetch", {url: content}.get)
    text, lines = base64.b64encode(content).decode(), base64.encodebytes(content).decode()
    for source in (image, text, lines, f"data:image/png;base64,{text}", f"DATA:;base64,{text}", url):
        assert handler({"inputs": {"image": source}}) == expected
    for source in (image, f"data:image/png;base64,{text}", url):
        assert handler({"inputs": source}) == expected


@pytest.mark.parametrize("data", [None, 1, True, [], "text", {}, {"parameters": {}}])
def test_a_request_is_an_object_with_inputs(data):
    with pytest.raises(RequestError, match="field 'inputs'"):
        parse_payload(data)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"inputs": None}, "'inputs' must be"),
        ({"inputs": 3.5}, "'inputs' must be"),
        ({"inputs": {}}, "either an image or a text"),
        ({"inputs": {"image": "a", "text": "b"}}, "either an image or a text"),
        ({"inputs": {"image": ["a", "b"]}}, "'image' must be a string"),
        ({"inputs": {"image": "a", "imgae": "b"}}, "unknown field 'imgae'; known are image, text"),
        ({"inputs": "a", "parameters": {"top_k": 5}}, "unknown field 'top_k'"),
        ({"inputs": "a", "parameters": []}, "'parameters' must be an object"),
        ({"inputs": {"text": "a"}, "parameters": {"text": "b"}}, "both in"),
        ({"inputs": {"text": "a", "candidate_labels": ["b"]}}, "need an image"),
        ({"inputs": {"image": "a", "hypothesis_template": "{}"}}, "needs 'candidate_labels'"),
        ({"inputs": "a", "parameters": {"candidate_labels": 5}}, "'candidate_labels' must be a string or a list"),
        ({"inputs": "a", "parameters": {"candidate_labels": ["b", 5]}}, "'candidate_labels' must be a string or"),
        ({"inputs": "a", "parameters": {"candidate_labels": []}}, "'candidate_labels' must be 1 to 256"),
        ({"inputs": "a", "parameters": {"candidate_labels": "b,,c"}}, "empty"),
        ({"inputs": "a", "parameters": {"candidate_labels": "b", "hypothesis_template": "c"}}, "once"),
        ({"inputs": "a", "parameters": {"candidate_labels": "b", "hypothesis_template": "{0.__class__}"}}, "once"),
        ({"inputs": "a", "parameters": {"candidate_labels": "b", "hypothesis_template": ["{}"]}}, "must be a string"),
        ({"inputs": ["a"] * 257}, "1 to 256 strings"),
        ({"inputs": "a" * 10_001}, "at most 10000 characters"),
        ({"inputs": " "}, "empty"),
        ({"inputs": "\ud800"}, "not valid Unicode"),
    ],
)
def test_refusals_of_payloads(handler, payload, message):
    answer = handler(payload)
    assert list(answer) == ["error"] and message in answer["error"]


def test_a_label_may_look_like_a_template():
    query = parse_payload(
        {"inputs": "aa", "parameters": {"candidate_labels": ["{}", "{0}"], "hypothesis_template": "({})"}}
    )
    assert query == Query("aa", ("({})", "({0})"), ("{}", "{0}"))


KEYS = st.sampled_from([*hub_handler.FIELDS, "inputs", "parameters", ""])
WORDS = st.sampled_from(
    ["http://", "https://a.b/c.png", "file:///etc/hosts", "data:image/png;base64,", "AAAA", "{}", ","]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS | st.lists(WORDS).map("".join),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(KEYS | st.text(), values, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.fixed_dictionaries({"inputs": JSON_VALUES}, optional={"parameters": JSON_VALUES}) | JSON_VALUES)
def test_any_json_gets_an_answer(handler, monkeypatch, data):
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **kwargs: (_ for _ in ()).throw(socket.gaierror("offline"))
    )
    answer = handler(data)
    assert isinstance(answer, list) or (list(answer) == ["error"] and not answer["error"].startswith("internal"))
    json.dumps(answer, allow_nan=False)


def test_an_accident_inside_is_told_without_its_details(handler, caplog):
    handler.model.encode_text = lambda **inputs: 1 / 0
    assert handler({"inputs": "a"}) == {"error": "internal error: the request could not be answered"}
    assert "ZeroDivisionError" in caplog.text


def test_it_works_on_the_real_model_as_a_file_of_its_repository(tmp_path, tiny_config, tiny_processor, image):
    """Loaded as the endpoint's server does: by path, outside the package."""
    model = COTSModel(tiny_config).eval()
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("handler", hub_handler.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(tmp_path))
    inputs = tiny_processor(text=LABELS, images=[image], padding=True, return_tensors="pt")
    with torch.no_grad():
        image_embeds = model.encode_image(inputs.pop("pixel_values"))
        text_embeds = model.encode_text(**inputs)
    torch.testing.assert_close(torch.tensor(handler({"inputs": LABELS})), text_embeds)
    torch.testing.assert_close(torch.tensor(handler({"inputs": image})), image_embeds[0])
    answer = handler({"inputs": image, "parameters": {"candidate_labels": LABELS, "hypothesis_template": "{}"}})
    logits = (image_embeds @ text_embeds.T)[0] / tiny_config.temperature
    expected = dict(zip(LABELS, logits.softmax(0).tolist(), strict=True))
    assert {a["label"]: a["score"] for a in answer} == pytest.approx(expected, abs=1e-5)


def test_requests_that_are_answered_together_go_through_the_model_once(handler):
    """Each gets its own answer: what it would get alone."""
    calls = Counter()

    def counting(name: str):
        encode = getattr(handler.model, name)
        return lambda **inputs: calls.update([name]) or encode(**inputs)

    for name in ("encode_text", "encode_image"):
        setattr(handler.model, name, counting(name))
    images = [as_base64(Image.new("RGB", (4, 4), color)) for color in ("red", "lime", "blue")]
    bodies = [{"inputs": {"image": image}} for image in images]
    bodies += [{"inputs": "dog"}, {"inputs": ["cat", "sea"]}, {"inputs": ["sun"]}, {"inputs": " "}, {"inputs": {}}]
    together = handler.answer([handler.read(body) for body in bodies])
    assert calls == {"encode_text": 1, "encode_image": 1}
    assert together == [handler(body) for body in bodies]
    assert len({tuple(embed) for embed in together[:3]}) == 3 and "error" in together[-1]
    labels = {"inputs": {"image": images[0], "candidate_labels": ["dog", "cat"]}}
    assert handler.answer([handler.read(body) for body in (labels, bodies[3])]) == [handler(labels), together[3]]


def test_a_request_that_fails_costs_the_others_of_its_batch_nothing(handler):
    encode = handler.model.encode_text

    def fragile(input_ids):
        if (input_ids[:, 25] > 2).any():
            raise ValueError("zz")
        return encode(input_ids)

    handler.model.encode_text = fragile
    requests = [handler.read({"inputs": text}) for text in ("dog", "zzz", "cat")]
    first, failed, last = handler.answer(requests)
    assert "internal error" in failed["error"] and first == handler({"inputs": "dog"}) and len(last) == 3


def test_many_texts_of_a_batch_are_embedded_in_bounded_passes(handler):
    body = {"inputs": [f"text {number}" for number in range(hub_handler.MAX_TEXTS)]}
    sizes, encode = [], handler.model.encode_text

    def measuring(input_ids):
        sizes.append(len(input_ids))
        return encode(input_ids)

    handler.model.encode_text = measuring
    first, second = handler.answer([handler.read(body)] * 2)
    assert sizes == [hub_handler.MAX_TEXTS] * 2 and first == second and len(first) == hub_handler.MAX_TEXTS
