"""Pipelines, processor, handler and search index in many threads: every answer is the one that it gets alone."""

import copy
import os
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from forks import server_with_package
from image_files import as_base64
from PIL import Image
from transformers import pipeline

from modeling_cots import COTSModel, COTSProcessor, SearchIndex
from modeling_cots.hub.handler import EndpointHandler

NUM_THREADS, NUM_QUERIES = 12, 240
WORDS = "a large red circle above the small blue square two green triangles dog runs".split()


@pytest.fixture(autouse=True)
def hasty_threads():
    """Threads take turns a thousand times as often, so that they meet where they share something."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Of 3 to 100 words; the tiny model reads 40 tokens."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.choice((3, 5, 12, 36, 60, 100)))) for _ in range(NUM_QUERIES)]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (NUM_QUERIES, 24, 40, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in noise]


def check(answer, queries) -> None:
    """Ask all queries one after the other and then in threads, twice."""
    alone = [answer(query) for query in queries]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for _ in range(2):
            for expected, found in zip(alone, threads.map(answer, queries), strict=True):
                assert found == expected


def as_lists(inputs) -> dict:
    return {name: tensor.tolist() for name, tensor in inputs.items()}


def test_processor(tiny_processor, texts, images):
    def answer(query):
        text, image, options = query
        return as_lists(tiny_processor(text=text, images=image, return_tensors="pt", **options))

    # Each way of calling leaves other settings in the tokenizer.
    ways = [
        {"truncation": True, "max_length": 9},
        {"truncation": True, "padding": "max_length"},
        {"padding": True},
        {"truncation": True, "padding": True, "pad_to_multiple_of": 8},
    ]
    batches = [[text, text[:30]] if "padding" in way else text for text, way in zip(texts, ways * 60, strict=True)]
    check(answer, list(zip(batches, images, ways * 60, strict=True)))


def test_retrieval_pipeline(saved_model, texts, images):
    finder = pipeline("image-text-retrieval", model=str(saved_model))
    index = finder.build_index(["a red circle", "the dog runs", *images[:3]])
    queries = [query for pair in zip(texts, images, strict=True) for query in pair][:NUM_QUERIES]
    check(lambda query: [hit["score"] for hit in finder(query, index=index)], queries)


def test_zero_shot_pipeline(saved_model, texts, images):
    classify = pipeline("zero-shot-image-classification", model=str(saved_model))

    def answer(query):
        text, image = query
        options = {"tokenizer_kwargs": {"truncation": True, "max_length": 7}} if len(text) % 2 else {}
        labels = [" ".join(text.split()[:20]), "the dog runs"]
        return classify(image, candidate_labels=labels, **options)

    check(answer, list(zip(texts, images, strict=True))[:120])


def test_handler(saved_model, texts, images):
    handler = EndpointHandler(str(saved_model))
    requests = [{"inputs": text} for text in texts[:80]]
    requests += [{"inputs": texts[start : start + 5]} for start in range(0, 80, 2)]
    requests += [
        {"inputs": {"image": as_base64(image), "candidate_labels": ["a dog", "a circle"]}} for image in images
    ]
    check(handler, requests[:160])


@pytest.mark.parametrize("index_type", ["exact", "hnsw", "int8"])
def test_index(saved_model, texts, images, index_type):
    pytest.importorskip("faiss")
    index = SearchIndex.create(
        saved_model / "index",
        COTSModel.from_pretrained(saved_model),
        COTSProcessor.from_pretrained(saved_model),
        engine=index_type,
    )
    index.add(Years(images), progress=False)

    def answer(query):
        number, text = query
        where = None if number % 3 == 0 else f"year == {number % 7}"
        image = images[number] if number % 2 else None
        return [(hit["name"], hit["score"]) for hit in index.search(text, image, top=3, where=where)]

    check(answer, list(enumerate(texts))[:120])


class Years(list):
    """A data set of images, each with a year from 0 to 6."""

    name = "photos"

    def __init__(self, images):
        super().__init__(
            {"image": image, "captions": [], "pair_id": row, "name": f"row {row}"} for row, image in enumerate(images)
        )

    def metadata(self, position: int) -> dict:
        return {"year": position % 7}


def test_filters_of_many_threads_at_once(images):
    """FAISS reads the rows that a search may find from memory that it does not own."""
    faiss_vectors = pytest.importorskip("modeling_cots.search.faiss_vectors")
    vectors = np.random.default_rng(0).standard_normal((4_000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss_vectors.FaissVectors("exact", 16, lambda positions: vectors[positions])
    index.grow(len(vectors))

    def answer(number):
        allowed = np.arange(len(vectors)) % NUM_QUERIES == number
        return index.search(vectors[:4], 5, allowed)[1].tolist()

    check(answer, range(NUM_QUERIES))


def test_a_processor_can_still_be_copied_and_pickled(tiny_processor):
    """Data loaders send it to their workers."""
    expected = tiny_processor(text=["a dog"])["input_ids"]
    for copied in (copy.deepcopy(tiny_processor), pickle.loads(pickle.dumps(tiny_processor))):
        assert copied(text=["a dog"])["input_ids"] == expected


FORK = """
import os, threading
from modeling_cots.processing_cots import TOKENIZER_LOCK
held, go = threading.Event(), threading.Event()
def hold():
    with TOKENIZER_LOCK:
        held.set()
        go.wait()
os.register_at_fork(before=go.set)  # such functions run in reverse order: before the one that waits for the lock
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if TOKENIZER_LOCK.acquire(timeout=20) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_finds_the_lock_free():
    assert server_with_package().run_python("-c", FORK).stdout.strip() == "0"
