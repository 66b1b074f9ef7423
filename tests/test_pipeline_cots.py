"""The pipeline `image-text-retrieval`: the same answers as the encoders, for every way to ask."""

import json
import socket
from pathlib import Path

import pytest
import torch
from forks import server_without_package
from hub_network import Answer, Network, Server
from image_files import as_base64, as_bytes
from PIL import Image
from transformers import AutoProcessor, pipeline

from modeling_cots import COTSModel, ImageTextRetrievalPipeline, RetrievalIndex, encoders_cots, pipeline_cots
from modeling_cots.hub_export import CUSTOM_PIPELINES, export_repository
from modeling_cots.pipeline_cots import TASK

TEXTS = ["a red circle", "two green triangles beside one star", "the dog runs", "people near a boat"]


@pytest.fixture
def images() -> list[Image.Image]:
    """Four unlike ones, in different modes."""
    ramp = Image.linear_gradient("L").resize((40, 30))
    return [
        ramp,
        ramp.rotate(90),
        Image.new("RGB", (20, 50), (200, 30, 0)),
        Image.new("RGBA", (8, 8), (0, 9, 220, 99)),
    ]


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


@pytest.fixture
def folder(model, tiny_processor, tmp_path) -> Path:
    """A saved model."""
    model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def finder(folder) -> ImageTextRetrievalPipeline:
    return pipeline(TASK, model=str(folder))


@pytest.fixture
def embed(model, tiny_processor):
    """`encode_image` and `encode_text` of one image or text at a time: (d,)."""

    @torch.no_grad()
    def embed(item):
        if isinstance(item, str):
            return model.encode_text(**tiny_processor(text=[item], truncation=True, return_tensors="pt"))[0]
        return model.encode_image(**tiny_processor(images=[item.convert("RGB")], return_tensors="pt"))[0]

    return embed


def ranking(answer: list[dict]) -> list[int]:
    return [found["index"] for found in answer]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_the_encoders(finder, embed, images, batch_size):
    """Images and texts among the queries and among the candidates, in batches and one by one."""
    queries = [images[0], TEXTS[0], TEXTS[1], images[2]]
    candidates = [TEXTS[2], *images, TEXTS[3], TEXTS[1]]
    answers = finder(queries, candidates, top_k=4, batch_size=batch_size)
    for query, answer in zip(queries, answers, strict=True):
        scores = torch.stack([embed(candidate) for candidate in candidates]) @ embed(query)
        assert ranking(answer) == scores.argsort(descending=True)[:4].tolist()
        for found in answer:
            assert found["score"] == pytest.approx(scores[found["index"]].item(), abs=1e-5)
            assert found["item"] is candidates[found["index"]]


def test_an_index_is_computed_once_and_gives_the_same(finder, images, monkeypatch):
    expected = finder(TEXTS, images, top_k=2)
    index = finder.build_index(images, items=["p", "q", "r", "s"], batch_size=3)
    assert len(index) == 4 and index.embeds.shape == (4, 16)
    torch.testing.assert_close(index.embeds.norm(dim=1), torch.ones(4))
    monkeypatch.setattr(finder.model, "encode_image", None)  # no image is embedded from here on
    answers = finder(TEXTS, index=index, top_k=2)
    assert [ranking(answer) for answer in answers] == [ranking(answer) for answer in expected]
    assert [[found["item"] for found in answer] for answer in answers] == [
        ["pqrs"[found["index"]] for found in answer] for answer in expected
    ]
    again = RetrievalIndex(index.embeds.clone(), ["p", "q", "r", "s"])  # kept elsewhere and brought back
    assert finder(TEXTS, index=again, top_k=2) == answers


def test_candidates_of_like_length_enter_the_model_together(finder, embed, images):
    """And each keeps its place in the index."""
    candidates = ["a dog and a boat and a red star and a blue circle", images[0], "a dog", {"text": "a boat"}]
    candidates += [images[2], "two green triangles beside one large yellow star", "a star"]
    shapes = []
    finder.model.text_model.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    index = finder.build_index(candidates, batch_size=5)
    found = torch.stack([embed("a boat" if isinstance(candidate, dict) else candidate) for candidate in candidates])
    torch.testing.assert_close(index.embeds, found, atol=1e-5, rtol=0)
    assert [num_texts for num_texts, _ in shapes] == [3, 2]  # beside two images; alone
    assert shapes[0][1] < shapes[1][1]


def test_one_query_a_list_a_tuple_a_generator(finder, images):
    index = finder.build_index(images)
    one = finder(TEXTS[0], index=index)
    assert len(one) == 4  # no more than there are, though top_k is 5
    answers = finder(TEXTS, index=index, top_k=4)
    assert ranking(answers[0]) == ranking(one)
    assert finder(tuple(TEXTS), index=index, top_k=4) == answers
    assert list(finder((text for text in TEXTS), index=index, top_k=4)) == answers
    assert finder([], index=index) == []


def test_what_is_set_once_holds_for_every_call(folder, finder, images):
    index = finder.build_index(images)
    set_up = pipeline(TASK, model=str(folder), index=index, top_k=2, batch_size=2)
    assert set_up(TEXTS) == finder(TEXTS, index=index, top_k=2, batch_size=2)
    assert len(set_up(TEXTS[0], top_k=1)) == 1


def test_images_from_anywhere(finder, tmp_path):
    image = Image.radial_gradient("L").resize((30, 20)).convert("RGB")
    path = tmp_path / "an image.png"
    image.save(path)
    answers = {"/p": Answer(content=as_bytes(image))}
    server = Server(Network(), lambda request: answers.get(request.path, Answer(404)))
    server.open()
    expected = finder(image, TEXTS)
    data_url = f"data:image/png;base64,{as_base64(image)}"
    try:
        sources = [path, str(path), f"{server.url}/p", data_url, {"image": path}, {"image": as_base64(image)}]
        assert finder(sources, TEXTS, batch_size=4) == finder([image] * 6, TEXTS, batch_size=4)
        for source in sources:
            assert finder(source, TEXTS) == expected
        scores = [found["score"] for found in finder(TEXTS[0], [image, *sources])]
        assert scores == pytest.approx([scores[0]] * 5, abs=1e-5)
        with pytest.raises(ValueError, match="/none' cannot be read"):
            finder(f"{server.url}/none", TEXTS)
    finally:
        server.close()
        server.server_close()


def test_a_server_that_is_silent_is_left(finder):
    """The kernel accepts the connection, and nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/image.png"
        with pytest.raises(ValueError, match="cannot be read: ReadTimeout"):
            finder(url, TEXTS, timeout=0.05)
        with pytest.raises(ValueError, match="cannot be read: ReadTimeout"):
            finder(TEXTS[0], [url], timeout=0.05)


def test_a_text_may_look_like_a_image(finder, embed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dog").write_text("no image")
    for text in ("dog", "boat.png", "https://dog.test"):
        (found,) = finder({"text": text}, ["a star"])
        assert found["score"] == pytest.approx((embed(text) @ embed("a star")).item(), abs=1e-5)
    with pytest.raises(ValueError, match="'dog' cannot be read"):
        finder("dog", ["a star"])
    with pytest.raises(ValueError, match="There is no image 'boat.png'"):
        finder("boat.png", ["a star"])


def test_long_texts_are_cut_with_a_warning(finder, embed, caplog, monkeypatch):
    monkeypatch.setattr(pipeline_cots.logger, "propagate", True)
    pipeline_cots.logger.parent.propagate = True
    type(pipeline_cots.logger).warning_once.cache_clear()
    long = "dog " * 100
    (found,) = finder(long, ["a star"])
    assert found["score"] == pytest.approx((embed(long) @ embed("a star")).item(), abs=1e-5)
    num_tokens = len(finder.tokenizer(long)["input_ids"])
    warnings = [record.message for record in caplog.records if "cut" in record.message]
    assert num_tokens > 100 and warnings == [f"A text of {num_tokens} tokens is cut to the first 40."]
    # Without a limit in the tokenizer, the encoder's number of positions is one.
    finder.tokenizer = type(finder.tokenizer).from_pretrained(finder.model.name_or_path, model_max_length=10**9)
    (found,) = finder([long, "a star"], [long], batch_size=2)[0]
    assert found["score"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ("a", {}, "needs `candidates`"),
        ("a", {"candidates": []}, "Got 0 candidates"),
        ("a", {"candidates": "a star"}, "must be a list of images and texts, got a str"),
        ("a", {"candidates": {"text": "a"}}, "got a dict"),
        ("a", {"candidates": ["a", 5]}, "got '5' of type int"),
        (None, {"candidates": ["a"]}, "got 'None' of type NoneType"),
        ({"text": 5}, {"candidates": ["a"]}, "of type dict"),
        ({"image": "a", "text": "b"}, {"candidates": ["a"]}, "of type dict"),
        ("a", {"candidates": ["a"], "top_k": 0}, "`top_k` must be .* at least 1, got 0"),
        ("a", {"candidates": ["a"], "top_k": 2.5}, "`top_k` must be"),
        ("a", {"index": ["a"]}, "`index` must be what `build_index` returns, got list"),
        ("a", {"candidates": ["a"], "index": "b"}, "not both"),
    ],
)
def test_refusals(finder, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        finder(inputs, **kwargs)


def test_an_option_that_does_not_exist_is_an_error(finder):
    with pytest.raises(TypeError, match="topk"):
        finder("a", ["b"], topk=3)


@pytest.mark.parametrize(("embeds", "items"), [((2, 4), 3), ((0, 4), 0), ((4,), 4)])
def test_an_index_has_a_row_for_each_item(embeds, items):
    with pytest.raises(ValueError, match="one row of embeddings for each item"):
        RetrievalIndex(torch.zeros(embeds), ["x"] * items)


def test_a_model_object_needs_its_processor(model, tiny_processor, tiny_config):
    model.train()
    finder = pipeline(TASK, model=model, processor=tiny_processor)
    assert not model.training and len(finder(TEXTS[0], TEXTS)) == 4
    with pytest.raises(Exception, match="[Pp]rocessor"):
        pipeline(TASK, model=model)
    with pytest.raises(ValueError, match="needs a COTSModel, got ViTModel"):
        ImageTextRetrievalPipeline(model.vision_model, processor=tiny_processor)


def test_half_precision(folder, finder, images):
    scores = [found["score"] for found in finder(TEXTS[0], images, top_k=4)]
    half = pipeline(TASK, model=str(folder), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert [found["score"] for found in half(TEXTS[0], images, top_k=4)] == pytest.approx(scores, abs=0.05)


def test_saving_keeps_the_processor(finder, tmp_path, images):
    finder.save_pretrained(tmp_path / "again")
    assert pipeline(TASK, model=str(tmp_path / "again"))(TEXTS, images) == finder(TEXTS, images)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["custom_pipelines"] == CUSTOM_PIPELINES


# ------------------------------------------------------------------------------------- as code of a repository

REMOTE = """
import json, sys
sys.modules["modeling_cots"] = None  # installed or not, it cannot be imported
from transformers import AutoProcessor, pipeline
folder, task, text, *images = sys.argv[1:]
try:
    pipeline(task, model=folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("code of a repository ran without trust_remote_code")
finder = pipeline(task, model=folder, trust_remote_code=True, dtype="float32")
assert type(finder).__module__.startswith("transformers_modules.")
print(json.dumps(finder([text, images[0]], images, batch_size=2)))
print(json.dumps(pipeline(model=folder, trust_remote_code=True, dtype="float32")(text, images)))
"""


@pytest.fixture
def repository(model, tiny_processor, tmp_path) -> Path:
    """A model with its code, as a repository has it."""
    export_repository(model, tiny_processor, tmp_path / "cots-tiny-v1.0")
    return tmp_path / "cots-tiny-v1.0"


def test_by_trust_remote_code_where_the_package_is_not(repository, tmp_path, images):
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    result = server_without_package().run_python("-c", REMOTE, repository, TASK, TEXTS[0], *paths, cwd=tmp_path)
    remote, single = map(json.loads, result.stdout.splitlines())
    expected = pipeline(TASK, model=str(repository))([TEXTS[0], paths[0]], paths, batch_size=2)
    assert [ranking(answer) for answer in remote] == [ranking(answer) for answer in expected]
    assert remote[0][0]["score"] == pytest.approx(expected[0][0]["score"], abs=1e-5)
    assert ranking(single) == ranking(expected[0])


def test_the_package_serves_a_repository_by_name_without_its_code(repository):
    """transformers would ask for `trust_remote_code` for any task in `custom_pipelines`."""
    assert type(pipeline(TASK, model=str(repository))) is ImageTextRetrievalPipeline
    assert type(pipeline(TASK, model=str(repository), trust_remote_code=True)) is ImageTextRetrievalPipeline


@pytest.mark.parametrize("task", [TASK, "zero-shot-image-classification", "image-feature-extraction"])
def test_a_model_that_the_pipeline_loads_runs_in_bfloat16_where_the_cpu_computes_it(folder, model, monkeypatch, task):
    said: list[str] = []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(pipeline_cots.logger, "warning_once", lambda note: said.append(note))

    def dtypes(**options) -> set[torch.dtype]:
        pipe = pipeline(task, device="cpu", **options)
        return {module.weight.dtype for module in pipe.model.modules() if isinstance(module, torch.nn.Linear)}

    assert dtypes(model=str(folder), dtype="float32") == {torch.float32} and said == []
    assert dtypes(model=str(folder)) == {torch.bfloat16, torch.float32}  # the projections stay
    assert said == [encoders_cots.BFLOAT16_NOTE.format('dtype="float32"')]
    processor = AutoProcessor.from_pretrained(folder)
    parts = {"processor": processor} if task == TASK else {"image_processor": processor.image_processor}
    parts |= {"tokenizer": processor.tokenizer} if task.startswith("zero") else {}
    assert dtypes(model=model, **parts) == {torch.float32}  # the caller's own model stays as it is
