"""`SearchIndex` with a tiny model: queries, the model's identity, killed runs, several processes."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from forks import ClientError, server_with_package
from programs import TORCHRUN, run_python

from modeling_cots import COTSModel, ScenesDataset, SearchIndex
from modeling_cots.search.embedding import ImageFolder
from modeling_cots.search.index import state_notes

pytest.importorskip("faiss")

RUN = """
import os, sys, time
import torch
torch.set_num_threads(1)
import modeling_cots.search.index as search_index
from modeling_cots import COTSModel, COTSProcessor, ScenesDataset, SearchIndex
search_index.ITEMS_PER_PART = 8
class Slow(ScenesDataset):
    name = "scenes"
    def __getitem__(self, index):
        if index == 50 and "stop" in sys.argv:
            print("reached", flush=True)
            time.sleep(600)  # until it is killed
        return super().__getitem__(index)
    def names(self):
        assert os.environ.get("RANK", "0") == "0"  # another process gets the names of its share
        return [f"scene {index}" for index in range(len(self))]
model, processor = COTSModel.from_pretrained(sys.argv[1]), COTSProcessor.from_pretrained(sys.argv[1])
index = SearchIndex(sys.argv[2], model, processor)
added = index.add(Slow("train", 70, 32), batch_size=4)
# A file for each process, because their printed lines may mix.
with open(f"{sys.argv[2]}-{os.environ.get('RANK', 0)}.txt", "w") as file:
    found = index.search(image=ScenesDataset("train", 70, 32)[69]["image"], top=1)[0]["name"]
    file.write(f"added {added} of {len(index)}, found {found}")
search_index.process_state().destroy_process_group()
"""


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


@pytest.fixture
def index(model, tiny_processor, tmp_path):
    index = SearchIndex.create(tmp_path / "index", model, tiny_processor)
    assert index.add(ScenesDataset("train", 30, 32), source="scenes", progress=False) == 30
    return index


def test_finds_by_text_image_and_both(index, model, tiny_processor):
    image = ScenesDataset("train", 30, 32)[11]["image"]
    assert index.search(image=image, top=1)[0]["name"] == "scenes: row 11"
    text = tiny_processor(text=["a red circle"], return_tensors="pt")
    pixels = tiny_processor.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        text_embed = model.encode_text(text["input_ids"], text["attention_mask"])[0].numpy()
        image_embed = model.encode_image(pixels)[0].numpy()
    np.testing.assert_allclose(index.embed_query("a red circle"), text_embed, atol=1e-6)
    # A query by text and image ranks by the weighted mean of the two similarities.
    stored = index.store._newest().rows.embeddings(slice(0, 30))
    mean = 0.75 * stored @ text_embed + 0.25 * stored @ image_embed
    found = index.search("a red circle", image, image_weight=0.25, top=30)
    assert [hit["name"] for hit in found] == [f"scenes: row {row}" for row in np.argsort(-mean)]
    for weight, alone in ((0, text_embed), (1, image_embed)):
        np.testing.assert_allclose(index.embed_query("a red circle", image, weight), alone, atol=1e-6)


def test_refuses_invalid_queries(index):
    for arguments, message in [
        ({}, "neither"),
        ({"text": "  "}, "empty"),
        ({"text": "a", "top": 0}, "at least 1"),
        ({"text": "a", "image_weight": 2}, "between 0"),
        ({"image": b"no image"}, "UnidentifiedImageError"),
        ({"text": "a", "where": "color == red"}, "no metadata 'color'"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(**arguments)
    for arguments in ({}, {"names": ["a"], "where": "a == 1"}):
        with pytest.raises(ValueError, match="what to delete"):
            index.delete(**arguments)


def test_refuses_another_model(index, tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="another one"):
        SearchIndex(tmp_path / "index", COTSModel(tiny_config), tiny_processor)
    tiny_processor.image_processor.do_normalize = False
    with pytest.raises(ValueError, match="another one"):
        SearchIndex(tmp_path / "index", index.model, tiny_processor)


def test_refuses_an_index_that_another_model_made_anew(index, tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(1)
    shutil.rmtree(tmp_path / "index")
    SearchIndex.create(tmp_path / "index", COTSModel(tiny_config), tiny_processor)
    for call in (lambda: index.search("a"), lambda: index.add(ScenesDataset("train", 2, 32), progress=False)):
        with pytest.raises(ValueError, match="another one"):
            call()


def test_refuses_an_index_of_another_version(model, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_cots.search.index.FORMAT", 1)
    with pytest.raises(ValueError, match="made by another version .* make a new one"):
        with SearchIndex.create(tmp_path / "index", model, tiny_processor):
            monkeypatch.undo()
            SearchIndex(tmp_path / "index", model, tiny_processor)


def test_notices_what_others_write(index, model, tiny_processor, tmp_path):
    """A service holds an index open while others delete, rebuild and add; then it adds, too."""
    scenes = ScenesDataset("train", 40, 32)
    SearchIndex(tmp_path / "index", model, tiny_processor).delete([f"scenes: row {row}" for row in range(5)])
    assert len(index) == 25
    assert index.search(image=scenes[3]["image"], top=1)[0]["name"] != "scenes: row 3"
    with SearchIndex(tmp_path / "index", model, tiny_processor) as other:
        other.rebuild("hnsw")
        other.add(ScenesDataset("train", 35, 32), source="scenes", progress=False, restore=True)
    assert index.add(scenes, source="scenes", progress=False) == 5
    for handle in (index, SearchIndex(tmp_path / "index", model, tiny_processor)):
        found = [handle.search(image=scenes[row]["image"], top=1)[0]["name"] for row in range(40)]
        assert found == [f"scenes: row {row}" for row in range(40)] and len(handle) == 40


class Stopping(ScenesDataset):
    """Scenes with years; Ctrl-C comes at the eleventh, or a year that is a text."""

    def __init__(self, fault: str):
        super().__init__("train", 20, 32)
        self.fault = fault

    def __getitem__(self, index):
        if index == 10 and self.fault == "interrupted":
            raise KeyboardInterrupt
        return super().__getitem__(index)

    def metadata(self, index):
        return {"year": "unknown" if self.fault == "refused" else 2020}


@pytest.mark.parametrize("fault", ["interrupted", "refused"])
def test_others_may_write_after_an_add_that_did_not_end(index, model, tiny_processor, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("modeling_cots.search.index.ITEMS_PER_PART", 4)
    index.add(Stopping("none"), source="years", progress=False)
    other = SearchIndex(tmp_path / "index", model, tiny_processor)
    error, said = (KeyboardInterrupt, None) if fault == "interrupted" else (ValueError, "'year' holds numbers")
    with pytest.raises(error, match=said):
        index.add(Stopping(fault), source="more", progress=False)
    assert other.delete(["scenes: row 3"]) == 1
    num_before = len(other)
    index.add(ScenesDataset("train", 20, 32), source="more", progress=False)
    assert other.delete(["scenes: row 4"]) == 1 and len(index) == len(other) == 50 - 2 + 20
    index.close()
    assert other.delete(["scenes: row 5"]) == 1
    # The parts of four that the interrupted call had written were taken up.
    assert num_before == 49 + (8 if fault == "interrupted" else 0)


def test_adds_what_is_new_and_deletes(index):
    assert index.add(ScenesDataset("train", 35, 32), source="scenes", progress=False) == 5
    assert index.delete(["scenes: row 3", "never there"]) == 1
    assert index.delete(where=["source == scenes", "name in ['scenes: row 4', 'scenes: row 5']"]) == 2
    assert len(index) == 32
    index.rebuild("hnsw")
    assert index.add(ScenesDataset("train", 35, 32), source="scenes", progress=False) == 0  # deleted ones stay so
    assert index.add(ScenesDataset("train", 35, 32), source="scenes", progress=False, restore=True) == 3
    assert index.delete(["scenes: row 4"]) == 1
    assert index.add(ScenesDataset("train", 35, 32), source="scenes", progress=False) == 0
    assert len(index) == 34 and index.store.info["engine"] == "hnsw"


@pytest.mark.parametrize("kind", ["faiss", "milvus", "postgres"])
def test_a_stopped_run_is_searched_and_says_how_far_it_is(model, tiny_processor, new_place, monkeypatch, kind):
    place = new_place(kind)
    monkeypatch.setattr("modeling_cots.search.index.ITEMS_PER_PART", 8)
    scenes, state = ScenesDataset("train", 20, 32), "{:,} of 20 are in; run the same command to go on (it adds more)."
    index = SearchIndex.create(place, model, tiny_processor)
    assert state_notes(index.store, "a b") == ["a b has no images: add some by `cots-search add 'a b' PHOTOS/`."]
    with pytest.raises(KeyboardInterrupt):
        index.add(Stopping("interrupted"), source="more", progress=False, batch_size=2)
    for handle in (index, SearchIndex(place, model, tiny_processor)):
        # A whole part of 8, and of the next one what was embedded before the interrupt at the eleventh.
        assert state_notes(handle.store, "IDX") == [state.format(10)] and len(handle) == 10
        assert handle.search(image=scenes[9]["image"], top=20)[0]["name"] == "more: row 9"
    assert index.delete(["more: row 0", "more: row 9"]) == 2 and state_notes(index.store, "IDX") == [state.format(8)]
    index.rebuild("hnsw")
    assert index.search(image=scenes[8]["image"], top=1)[0]["name"] == "more: row 8"
    assert state_notes(index.store, "IDX") == [state.format(8)]
    # Another source is whole, and changes nothing about this one.
    assert index.add(ScenesDataset("train", 3, 32), source="scenes", progress=False) == 3
    assert state_notes(index.store, "IDX") == [state.format(8)] and len(index) == 11
    assert index.add(Stopping("none"), source="more", progress=False, restore=True) == 12
    assert state_notes(index.store, "IDX") == [] and len(index) == 23
    index.close()


@pytest.mark.parametrize("engine", ["hnsw", "int8"])
def test_a_first_run_of_any_index_type_is_searched_before_it_ends(
    model, tiny_processor, tmp_path, monkeypatch, engine
):
    monkeypatch.setattr("modeling_cots.search.index.ITEMS_PER_PART", 4)
    index = SearchIndex.create(tmp_path / "index", model, tiny_processor, engine=engine)
    with pytest.raises(KeyboardInterrupt):
        index.add(Stopping("interrupted"), source="more", progress=False, batch_size=2)
    scenes = ScenesDataset("train", 20, 32)
    found = [index.search(image=scenes[row]["image"], top=1)[0]["name"] for row in range(10)]
    assert found == [f"more: row {row}" for row in range(10)]


@pytest.mark.parametrize("kind", ["faiss", "milvus", "postgres"])
def test_copies_are_found_by_their_pixels_and_shown_once(model, tiny_processor, tmp_path, new_place, kind):
    (tmp_path / "photos").mkdir()
    scenes = ScenesDataset("train", 3, 32)
    for number in range(3):
        scenes[number]["image"].save(tmp_path / "photos" / f"{number}.png")
    for name in ("1 again.png", "1.bmp", "z.png"):  # another name, another format
        scenes[1]["image"].save(tmp_path / "photos" / name)
    folder = ImageFolder(tmp_path / "photos")
    index = SearchIndex.create(new_place(kind), model, tiny_processor)
    assert index.add(folder, progress=False, batch_size=2) == 6 and len(index) == 6
    paths = {
        name: str(tmp_path / "photos" / name) for name in ("0.png", "1 again.png", "1.bmp", "1.png", "2.png", "z.png")
    }
    for top in (1, 2, 3, 9):
        hits = index.search(image=scenes[1]["image"], top=top)
        assert len(hits) == min(top, 3)
        shown = [hits[0]["name"], *hits[0]["copies"]]
        assert sorted(shown) == sorted(paths[name] for name in ("1 again.png", "1.bmp", "1.png", "z.png"))
        assert [hit["copies"] for hit in hits[1:]] == [[]] * (len(hits) - 1)
    index.delete(shown[:3])
    assert index.search(image=scenes[1]["image"], top=1)[0]["name"] == shown[3]
    index.close()


def test_says_which_words_the_tokenizer_does_not_know(index):
    assert index.words_note("a dog") is None and index.words_note("?!") is None
    assert index.words_note("a 犬 dog 猫") == "2 of 4 words are unknown to this model: 犬, 猫."
    assert index.words_note("犬") == "1 of 1 words is unknown to this model: 犬."


def test_a_word_that_is_only_spelled_is_not_known(index):
    """Every vocabulary has the single letters, so that no word of these letters is the unknown token."""
    pieces = index.processor.tokenizer.tokenize("god")
    assert len(pieces) == 3 and index.processor.tokenizer.unk_token not in pieces
    assert index.words_note("a god dog") == "1 of 3 words is unknown to this model: god."
    assert index.words_note("dogs") is None  # a word and an ending


def test_an_index_is_not_made_twice(index, model, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="is an index already: open it with `SearchIndex`, add to it by"):
        SearchIndex.create(tmp_path / "index", model, tiny_processor)
    assert len(index) == 30


@pytest.mark.parametrize("place", ["index", pytest.param("index.db", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(model, tiny_processor, tmp_path, place):
    if place.endswith(".db"):
        pytest.importorskip("milvus_lite")
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    SearchIndex.create(tmp_path / place, model, tiny_processor).close()
    command = ["-c", RUN, tmp_path / "model", tmp_path / place]
    os.mkfifo(tmp_path / "said")
    killed = server_with_package().start_python(*command, "stop", output=tmp_path / "said")
    with open(tmp_path / "said") as said:
        assert said.readline() == "reached\n"
        os.kill(killed.pid, signal.SIGKILL)
        with pytest.raises(ClientError, match="died"):
            killed.result()
    result = server_with_package().run_python(*command)
    # The killed run had embedded 50 images, of which 48 were in finished parts of 8.
    assert "48 of 70 images are in the index already" in result.stderr + result.stdout
    assert (tmp_path / f"{place}-0.txt").read_text() == "added 22 of 70, found scenes: scene 69"
    index = SearchIndex(tmp_path / place, model, tiny_processor)
    scenes = ScenesDataset("train", 70, 32)
    for number in (0, 47, 48, 69):
        assert index.search(image=scenes[number]["image"], top=1)[0]["name"] == f"scenes: scene {number}"
    index.close()


@pytest.mark.slow
def test_processes_share_the_images(model, tiny_processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    SearchIndex.create(tmp_path / "index", model, tiny_processor).close()
    (tmp_path / "run.py").write_text(RUN)
    run_python("-m", *TORCHRUN, "2", tmp_path / "run.py", tmp_path / "model", tmp_path / "index")
    assert [(tmp_path / f"index-{rank}.txt").read_text() for rank in range(2)] == [
        "added 70 of 70, found scenes: scene 69"
    ] * 2
    assert len(list((tmp_path / "index").glob("data-*-*.arrow"))) == 9  # parts of eight, none written twice
    index = SearchIndex(tmp_path / "index", model, tiny_processor)
    assert len(index) == 70 and len(set(index.store._newest().rows.row_ids.tolist())) == 70
    for number in (0, 35, 69):
        found = index.search(image=ScenesDataset("train", 70, 32)[number]["image"], top=1)
        assert found[0]["name"] == f"scenes: scene {number}"


TUNE = """
import os, sys, threading
import torch
torch.set_num_threads(1)
from accelerate import PartialState
PartialState(cpu=True)
from modeling_cots import COTSModel, COTSProcessor, ScenesDataset, SearchIndex
from modeling_cots.search.faiss_store import FaissStore
tune, fault = FaissStore.tune, sys.argv[3:]
def tuning_is_slow(*args):
    assert os.environ["RANK"] == "0"
    threading.Event().wait(1)
    if fault:
        raise ValueError("the index cannot be tuned")
    return tune(*args)
FaissStore.tune = tuning_is_slow
model, processor = COTSModel.from_pretrained(sys.argv[1]), COTSProcessor.from_pretrained(sys.argv[1])
index = SearchIndex(sys.argv[2], model, processor)
with open(f"{sys.argv[2]}-{os.environ['RANK']}.txt", "w") as file:
    try:
        added = index.add(ScenesDataset("train", 240, 32), batch_size=16, progress=False)
        info = index.store.info
        hit = index.search(image=ScenesDataset("train", 240, 32)[7]["image"], top=1)[0]["name"]
        file.write(f"added {added}, {info['target_recall']}, {info['nprobe']}, {info['candidates']}, {hit}")
    except ValueError as error:
        file.write(str(error))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True])
def test_processes_have_a_tuned_index_when_adding_ends(model, tiny_processor, tmp_path, fault):
    """The main process alone embeds captions and chooses; the others go on when the choice is stored."""
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    SearchIndex.create(tmp_path / "index", model, tiny_processor, engine="int8", target_recall=0.9).close()
    (tmp_path / "run.py").write_text(TUNE)
    run_python("-m", *TORCHRUN, "2", tmp_path / "run.py", tmp_path / "model", tmp_path / "index", *["fault"] * fault)
    said = [(tmp_path / f"index-{rank}.txt").read_text() for rank in range(2)]
    index = SearchIndex(tmp_path / "index", model, tiny_processor)
    assert len(index) == 240
    if fault:
        assert said == ["the index cannot be tuned", "The main process has failed; its own message says why."]
        index.add(ScenesDataset("train", 240, 32), progress=False)  # the same again chooses, without any fault
    info = index.store.info
    assert info["target_recall"] == 0.9 and 1 <= info["nprobe"] <= 6 and info["candidates"] >= 10
    if not fault:
        assert said == [f"added 240, 0.9, {info['nprobe']}, {info['candidates']}, data: row 7"] * 2


BUILD = """
import datetime, os, sys, threading
import torch
torch.set_num_threads(1)
from accelerate import PartialState
PartialState(cpu=True, timeout=datetime.timedelta(seconds=TIMEOUT))
import modeling_cots.search.embedding as embedding
from modeling_cots import COTSModel, COTSProcessor, SearchIndex
from modeling_cots.search.faiss_vectors import FaissVectors
is_main = os.environ["RANK"] == "0"
list_files, save, fault = embedding._files_below, FaissVectors.save, sys.argv[4:]
def pass_timeout():
    threading.Event().wait(1.5 * TIMEOUT)
def listing_is_slow(root):
    assert is_main
    pass_timeout()
    return list_files(root)
def building_is_slow(*args):
    pass_timeout()
    if fault:
        raise ValueError("the index cannot be built")
    return save(*args)
embedding._files_below, FaissVectors.save = listing_is_slow, building_is_slow
model, processor = COTSModel.from_pretrained(sys.argv[1]), COTSProcessor.from_pretrained(sys.argv[1])
index = SearchIndex(sys.argv[2], model, processor)
with open(f"{sys.argv[2]}-{os.environ['RANK']}.txt", "w") as file:
    try:
        added = index.add(embedding.ImageFolder(sys.argv[3], list_now=False), batch_size=4, progress=False)
        file.write(f"added {added} of {len(index)}, {index.store.unfinished}")
    except ValueError as error:
        file.write(str(error))
PartialState().destroy_process_group()
""".replace("TIMEOUT", "10")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True])
def test_other_processes_wait_for_the_list_and_the_index_beyond_the_timeout(model, tiny_processor, tmp_path, fault):
    model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    SearchIndex.create(tmp_path / "index", model, tiny_processor, engine="hnsw").close()
    (tmp_path / "photos").mkdir()
    for number in range(9):
        ScenesDataset("train", 9, 32)[number]["image"].save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "run.py").write_text(BUILD)
    arguments = (tmp_path / "model", tmp_path / "index", tmp_path / "photos", *["fault"] * fault)
    run_python("-m", *TORCHRUN, "2", tmp_path / "run.py", *arguments)
    said = [(tmp_path / f"index-{rank}.txt").read_text() for rank in range(2)]
    if fault:
        assert said == ["the index cannot be built", "The main process has failed; its own message says why."]
    else:
        assert said == ["added 9 of 9, {}"] * 2
    index = SearchIndex(tmp_path / "index", model, tiny_processor)
    found = index.search(image=ScenesDataset("train", 9, 32)[7]["image"], top=1)
    assert found[0]["name"] == f"{tmp_path.resolve()}/photos/7.png"
