"""The benchmarks: every topic runs and gives rows; one command writes them, and the table comes from its file."""

import importlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import pytest

from modeling_cots.training.recomputed_activations import IS_SEEN

pytest.importorskip("faiss")

ROOT = Path(__file__).parents[2]

import run_all  # noqa: E402
from encode import caption_lengths  # noqa: E402
from side_by_side import batches_to_time, format_ratio, seconds_a_batch, speed, versions  # noqa: E402

ENTRY = {"id": "2", "title": "ours / theirs", "ratio": 1234.5, "goal": ">= 2", "note": "a | b", "topic": "encode"}
RESULTS = {"device": "a device", "date": "2026-01-01", "quick": False, "versions": {"torch": "2"}, "rows": [ENTRY]}


def write(path: Path, **changes) -> Path:
    path.write_text(json.dumps({**RESULTS, **changes}))
    return path


OF_ALL_ROWS = pytest.mark.skipif(not IS_SEEN, reason="this torch does not tell what it keeps")


@pytest.mark.parametrize(
    ("topic", "ids"),
    [
        ("encode", {"1a", "1b", "1c", "2"}),
        ("encode_cpu", {"1q"}),
        pytest.param("memory", {"5"}, marks=OF_ALL_ROWS),
        ("search", {"6", "6p"}),
        ("cross_encoder", {"7"}),
    ],
)
def test_a_topic_gives_its_rows(topic, ids):
    rows = list(importlib.import_module(topic).measure("cpu", True))
    assert ids <= {entry["id"] for entry in rows}
    missing = {entry["id"] for entry in rows if entry["ratio"] is None}
    assert missing <= {"1b", "1p", "1q", "2p", "6p"}  # a GPU's, and peers that are not installed
    assert all(entry["ratio"] > 0 for entry in rows if entry["ratio"] is not None)


def test_a_topic_runs_in_its_own_process():
    rows = list(run_all.run_topic("search", "measure", "cpu", quick=True))
    assert {entry["topic"] for entry in rows} == {"search"}
    assert all(entry["versions"]["torch"] and entry["date"] for entry in rows)


@pytest.fixture
def topic_of(tmp_path, monkeypatch):
    """A function that writes the script of the topic "memory"; its rows are numbered, and it may wait at a pipe."""

    def write_topic(body: str) -> Path:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        row = "{'id': str(number), 'title': 't', 'ratio': 1.0, 'goal': 'g', 'note': 'n'}"
        lines = f"def measure(device, quick):\n    pipe = {str(pipe)!r}\n    row = lambda number: {row}\n"
        (tmp_path / "memory.py").write_text(lines + body)
        monkeypatch.setattr(run_all, "FOLDER", tmp_path)
        return pipe

    return write_topic


def test_a_row_is_written_while_the_next_one_is_measured(tmp_path, monkeypatch, topic_of):
    pipe = topic_of("    yield row(1)\n    open(pipe).read()\n    yield row(2)\n")
    path, written = tmp_path / "out.json", []
    add = run_all.Results.add

    def look(results, entry):
        add(results, entry)
        written.append([each["id"] for each in json.loads(path.read_text())["rows"]])
        if entry["id"] == "1":
            pipe.write_text("go on")

    monkeypatch.setattr(run_all.Results, "add", look)
    assert run_all.measure_all("cpu", ["memory"], True, path) == 0
    assert written == [["1"], ["1", "2"]]


def test_a_topic_that_would_not_end_is_ended_at_the_deadline(topic_of):
    topic_of("    open(pipe).read()\n    yield row(1)\n")
    with pytest.raises(TimeoutError):
        list(run_all.run_topic("memory", "measure", "cpu", True, deadline=time.monotonic()))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("    yield row(1)\n    raise RuntimeError('broken')\n", "broken"),
        ("    yield from ()\n", "it gave no rows"),
        ("    yield {'id': '1'}\n", "a row without exactly"),
    ],
)
def test_a_broken_topic_says_why(topic_of, body, why):
    topic_of(body)
    with pytest.raises(ValueError, match=why):
        list(run_all.run_topic("memory", "measure", "cpu", True))


def test_what_only_a_gpu_can_tell_comes_first():
    order = run_all.plan("cuda", list(run_all.TOPICS))
    assert order[:3] == [("encode", "measure_first"), ("step", "measure_first"), ("memory", "measure")]
    assert order[3:5] == [("encode", "measure_rest"), ("encode_cpu", "measure")]
    assert sorted(topic for topic, _ in order) == sorted([*run_all.TOPICS, "encode", "step"])
    assert run_all.plan("cuda", ["search", "step"]) == [
        ("step", "measure_first"),
        ("search", "measure"),
        ("step", "measure_rest"),
    ]
    assert run_all.plan("cpu", ["step", "memory"]) == [("step", "measure"), ("memory", "measure")]


@OF_ALL_ROWS
def test_the_first_rows_are_those_that_need_a_gpu():
    first = [
        entry["id"]
        for topic, function in run_all.FIRST_ON_GPU
        for entry in getattr(importlib.import_module(topic), function)("cpu", True)
    ]
    assert first == ["1b", "3b", "3b", "compile", *5 * ["5"]]


def test_where_time_ends_old_rows_stay_and_the_rest_is_named(tmp_path, monkeypatch, capsys):
    old = [{**ENTRY, "title": title} for title in ("again", "not reached")]
    path = write(tmp_path / "out.json", **{**run_all.describe("cpu", True), "date": "2026-01-01"}, rows=old)

    def run(topic, *_):
        yield {**ENTRY, "title": "again", "date": "2026-02-02"}
        raise TimeoutError

    monkeypatch.setattr(run_all, "run_topic", run)
    assert run_all.measure_all("cpu", ["encode"], True, path) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(entry["title"], entry["date"]) for entry in rows] == [
        ("again", "2026-02-02"),
        ("not reached", "2026-01-01"),
    ]
    assert "go on with --only encode" in capsys.readouterr().err


def test_search_without_faiss_says_so(monkeypatch):
    import search

    monkeypatch.setattr(search, "faiss", None)
    rows = search.measure("cpu", True)
    assert {entry["id"] for entry in rows} == {"6", "6p"}
    assert {(entry["ratio"], entry["note"]) for entry in rows} == {(None, "FAISS is not installed")}


def test_a_library_of_search_that_is_missing_is_not_measured(monkeypatch):
    import search

    for name, (_, package, build, file) in search.PEERS.items():
        if package != "faiss-cpu":
            monkeypatch.setitem(search.PEERS, name, (None, package, build, file))
    rows = search.measure("cpu", True)
    assert [entry["note"] for entry in rows if entry["ratio"] is None] == [
        "usearch is not installed",
        "scalable-vs is not installed",
    ]
    (ours,) = (entry for entry in rows if entry["title"].endswith("index type ivfpq --target_recall 0.95"))
    assert "chosen on other captions" in ours["note"] and "bytes a vector in memory" in ours["note"]


def test_captions_of_a_real_step_are_as_long_as_the_estimate_counts(tmp_path):
    import memory

    trainer = memory.build_trainer(memory.small_config(True), str(tmp_path), 64, use_cpu=True, queue_size=64)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].shape == (64, memory.TEXT_LENGTH) and batch["attention_mask"].all()


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("3,1", "3"), ("2", "2"), ("", "")])
def test_a_topic_sees_one_gpu_and_the_search_has_one_thread(monkeypatch, visible, first):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run_all.environment_of("search")["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in run_all.environment_of("encode")
    assert run_all.environment_of("encode")["CUDA_VISIBLE_DEVICES"] == first


@pytest.mark.parametrize(
    ("changes", "what"), [({"device": "an H100"}, "device 'an H100'"), ({"quick": False}, "quick")]
)
def test_rows_of_another_device_or_of_other_sizes_are_not_mixed(tmp_path, monkeypatch, changes, what):
    path = write(tmp_path / "out.json", **{**run_all.describe("cpu", True), **changes})
    before = path.read_text()
    monkeypatch.setattr(run_all, "run_topic", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(ValueError, match=f"was measured with {what}"):
        run_all.measure_all("cpu", ["memory"], True, path)
    assert path.read_text() == before


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "run_topic", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(ValueError, match="There is no folder"):
        run_all.measure_all("cpu", ["memory"], True, tmp_path / "missing" / "out.json")
    with pytest.raises(ValueError, match="cannot be written"):
        run_all.measure_all("cpu", ["memory"], True, tmp_path)


def test_rows_of_a_topic_replace_its_old_ones(tmp_path, monkeypatch):
    old = [ENTRY, {**ENTRY, "topic": "memory", "id": "5"}]
    path = write(tmp_path / "out.json", **{**run_all.describe("cpu", True), "date": "2026-01-01"}, rows=old)
    monkeypatch.setattr(run_all, "run_topic", lambda topic, *_: [{**ENTRY, "topic": topic, "id": "7"}])
    assert run_all.measure_all("cpu", ["memory"], True, path) == 0
    written = json.loads(path.read_text())
    assert [(entry["topic"], entry["id"]) for entry in written["rows"]] == [("encode", "2"), ("memory", "7")]
    assert written["versions"]["torch"] and written["quick"]
    assert written["rows"][0]["date"] == "2026-01-01" < written["date"]  # what stays keeps its date
    dated = [{**ENTRY, "date": date} for date in ("2026-01-03", "2026-01-02")]
    assert "2026-01-02 to 2026-01-03;" in run_all.format_table({**written, "rows": dated})


def test_rows_of_a_peer_that_is_missing_now_keep_its_version(tmp_path, monkeypatch):
    path = write(tmp_path / "out.json", **{**run_all.describe("cpu", True), "versions": {"timm": "1", "torch": "2"}})
    monkeypatch.setattr(run_all, "versions", lambda: {"timm": "missing", "torch": "3"})
    monkeypatch.setattr(run_all, "run_topic", lambda topic, *_: [{**ENTRY, "topic": topic}])
    run_all.measure_all("cpu", ["memory"], True, path)
    versions = json.loads(path.read_text())["versions"]
    assert (versions["timm"], versions["torch"]) == ("1", "3")


def test_the_table_names_every_version_that_a_row_was_measured_with(tmp_path):
    rows = [ENTRY, {**ENTRY, "versions": {"torch": "3"}}]
    path = write(tmp_path / "out.json", **{**run_all.describe("cpu", True), "versions": {"torch": "2"}}, rows=rows)
    assert "torch 2 and 3." in run_all.format_table(json.loads(path.read_text()))
    kept = run_all.Results(path, "cpu", True).old  # the file will name those of today
    assert [entry["versions"]["torch"] for entry in kept] == ["2", "3"]


def test_a_topic_that_fails_stops_no_other_and_is_told(tmp_path, monkeypatch, capsys):
    def run(topic, *_):
        if topic == "memory":
            raise ValueError("memory failed: no reason")
        return [{**ENTRY, "topic": topic}]

    monkeypatch.setattr(run_all, "run_topic", run)
    assert run_all.measure_all("cpu", ["memory", "search"], True, tmp_path / "out.json") == 1
    assert [entry["topic"] for entry in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["search"]
    assert "no reason" in capsys.readouterr().err


def test_unknown_topics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no topic nothing; there are encode"):
        run_all.measure_all("cpu", ["nothing"], True, tmp_path / "out.json")


def test_the_table_stands_between_its_markers_and_nothing_else_changes(tmp_path):
    results = write(tmp_path / "out.json", rows=[{**ENTRY, "id": "10", "ratio": None}, ENTRY])
    document = tmp_path / "page.md"
    document.write_text(f"before\n{run_all.BEGIN}\nold\n{run_all.END}\nafter\n")
    for _ in range(2):  # writing again changes nothing
        run_all.write_table(results, document)
        lines = document.read_text().splitlines()
        assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", run_all.BEGIN, run_all.END, "after")
        assert lines[-4] == "| 2 | ours / theirs | >= 2 | 1,234.50 | a / b |"
        assert lines[-3].startswith("| 10 |") and "not measured" in lines[-3]
        assert "old" not in lines and "torch 2" in lines[2]


def test_no_table_without_markers_or_from_a_quick_run(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("no markers\n")
    with pytest.raises(ValueError, match="must hold the lines"):
        run_all.write_table(write(tmp_path / "out.json"), document)
    document.write_text(f"{run_all.BEGIN}\n{run_all.END}\n")
    with pytest.raises(ValueError, match="measured with --quick"):
        run_all.write_table(write(tmp_path / "out.json", quick=True), document)


def test_the_documented_table_is_that_of_the_committed_results():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results_cpu.json").read_text(encoding="utf-8"))
    assert run_all.format_table(results) in page


def test_lengths_are_those_of_real_captions():
    lengths = caption_lengths(5000)
    assert lengths.mean() == pytest.approx(14.4, abs=0.1)
    assert sorted(lengths)[4750] == 22
    assert lengths.max() == 36


def test_speed_is_their_time_over_ours():
    def ours():
        pass

    def theirs():
        pass

    def timer(side, device):
        return next(times[side])

    times = {ours: iter([3.0, 2.0, 100.0]), theirs: iter([12.0, 1.0, 13.0])}
    assert speed(ours, theirs, "cpu", rounds=3, timer=timer) == 4


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_made_ahead_are_not_timed(monkeypatch, num_workers):
    workers, now = max(1, num_workers), [0.0]

    def batches():
        for number in range(batches_to_time(num_workers)):
            now[0] += 100 if number < 2 * workers or number >= 12 * workers else 2
            yield

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[0])
    assert seconds_a_batch(batches(), num_workers, "cpu") == 2


def test_ratios_near_their_goal_have_three_digits():
    assert [format_ratio(ratio) for ratio in (0.9851, 9.9994, 12.345, 12345.678, None)] == [
        "0.985",
        "9.999",
        "12.35",
        "12,345.68",
        "not measured",
    ]


def test_either_package_of_faiss_counts(monkeypatch):
    def version(name):
        if name == "faiss-gpu":
            return "1.2"
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", version)
    found = versions()
    assert found["faiss-gpu"] == "1.2" and "faiss-cpu" not in found and found["timm"] == "missing"
