"""The audit trail of the filter: every filtered pair, once, with the numbers that decided it."""

import pytest
import torch
from objective_results import make_result

from modeling_cots import ScenesDataset
from modeling_cots.data.items import encode_names
from modeling_cots.training.filter_log import FilterLog, count_filtered, read_filter_log

ARGUMENTS = {
    "num_train_epochs": 3,
    "max_steps": -1,
    "queue_size": 10,
    "filter_num_std": 0.5,
    "save_strategy": "steps",
    "save_steps": 1,
}


def batch(*pair_ids: int) -> dict[str, torch.Tensor]:
    return {"pair_ids": torch.tensor(pair_ids), "names": encode_names([f"{number}.jpg" for number in pair_ids])}


def note(log: FilterLog, step: int, **scores: float) -> None:
    """Names such as `p3` are of pairs that are filtered, `k3` of those that are kept."""
    filtered = torch.tensor([name[0] == "p" for name in scores])
    pair_ids = [int(name[1:]) for name in scores]
    result = make_result(scores=list(scores.values()), keep_mask=(~filtered).tolist(), threshold=0.25)
    log.add(step, result, batch(*pair_ids))


def rows(folder) -> list[tuple]:
    return [(row["step"], row["pair_id"]) for row in read_filter_log(folder).to_pylist()]


def test_rows_hold_what_was_decided(tmp_path):
    log = FilterLog(tmp_path / "log", 0)
    log.start(100, 0)
    note(log, 1, p7=0.1, k8=0.9, p9=-0.5)
    note(log, 2, k7=0.4)
    log.write()
    expected = {"step": 1, "threshold": 0.25, "attempt": 100, "attempt_step": 0}
    assert read_filter_log(tmp_path / "log").to_pylist() == [
        {**expected, "pair_id": 7, "name": "7.jpg", "score": pytest.approx(0.1)},
        {**expected, "pair_id": 9, "name": "9.jpg", "score": -0.5},
    ]


def test_names_are_not_needed(tmp_path):
    log = FilterLog(tmp_path, 0)
    log.start(100, 0)
    log.add(1, make_result(scores=[0.0], keep_mask=[False], threshold=0.5), {"pair_ids": torch.tensor([3])})
    log.write()
    assert read_filter_log(tmp_path)["name"].to_pylist() == [None]


def test_steps_taken_again_count_as_they_were_taken_last(tmp_path):
    first = FilterLog(tmp_path, 0)
    first.start(100, 0)
    for step in (1, 2, 3):
        note(first, step, p1=0.0, p2=0.0)
    first.write()
    second = FilterLog(tmp_path, 0)
    second.start(200, 1)  # goes on from the checkpoint of step 1, with another threshold, say
    note(second, 2, p2=0.1)
    second.write()
    assert rows(tmp_path) == [(1, 1), (1, 2), (2, 2)]
    FilterLog(tmp_path, 0).start(300, 1)  # dies before it filters anything
    assert rows(tmp_path) == [(1, 1), (1, 2)]
    assert count_filtered(tmp_path).to_pylist() == [
        {"pair_id": 1, "name": "1.jpg", "times": 1, "lowest_score": 0.0},
        {"pair_id": 2, "name": "2.jpg", "times": 1, "lowest_score": 0.0},
    ]


def test_files_are_added_and_never_changed(tmp_path):
    log = FilterLog(tmp_path, 3)
    log.start(100, 0)
    note(log, 1, p1=0.0)
    log.write()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    note(log, 2, p1=-0.25)
    log.write()
    log.write()
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(after) == len(before) + 1
    assert all(after[path] == content for path, content in before.items())
    assert count_filtered(tmp_path).to_pylist() == [{"pair_id": 1, "name": "1.jpg", "times": 2, "lowest_score": -0.25}]


def test_a_step_that_is_undone_leaves_no_row(tmp_path):
    log = FilterLog(tmp_path, 0)
    log.start(100, 0)
    note(log, 1, p1=0.0)
    note(log, 2, p2=0.0)
    log.discard_step(2)
    log.write()
    assert rows(tmp_path) == [(1, 1)]


def test_a_folder_without_a_log_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no filter log"):
        read_filter_log(tmp_path)


def test_a_run_logs_exactly_what_it_leaves_out(make_trainer, tmp_path):
    """Against the filter's own decisions, noted as they are made; then an older checkpoint is resumed."""
    log = str(tmp_path / "filter_log")
    dataset = ScenesDataset("train", 24, 32)
    trainer = make_trainer(train_dataset=dataset, filter_log=log, **ARGUMENTS)
    decisions = []
    original = trainer.cots_objective.filter

    def noting(scores, valid):
        keep, threshold = original(scores, valid)
        decisions.append((trainer.state.global_step + 1, keep, scores, threshold))
        return keep, threshold

    trainer.cots_objective.filter = noting
    trainer.train()
    expected = [
        (step, pytest.approx(float(score)), float(threshold))
        for step, keep, scores, threshold in decisions
        for score in sorted(scores[~keep].tolist())
    ]
    found = sorted(read_filter_log(log).to_pylist(), key=lambda row: (row["step"], row["score"]))
    assert [(row["step"], row["score"], row["threshold"]) for row in found] == expected
    assert len(expected) > 3
    assert {row["name"] for row in found} <= {dataset[index]["name"] for index in range(24)}
    assert all(dataset[row["pair_id"]]["name"] == row["name"] for row in found)
    counts = count_filtered(log).to_pylist()
    assert sum(row["times"] for row in counts) == len(expected)

    make_trainer(train_dataset=dataset, filter_log=log, **ARGUMENTS).train(str(tmp_path / "run" / "checkpoint-4"))
    again = sorted(read_filter_log(log).to_pylist(), key=lambda row: (row["step"], row["score"]))
    assert [(row["step"], row["pair_id"], row["score"]) for row in again] == [
        (row["step"], row["pair_id"], row["score"]) for row in found
    ]


def test_without_the_filter_there_is_nothing_to_log(make_trainer):
    with pytest.raises(ValueError, match="adaptive_filter"):
        make_trainer(filter_log="log", adaptive_filter=False)


def test_starts_are_numbered_without_a_clock(make_trainer, tmp_path, monkeypatch):
    """The clock stands still, or goes back: what was taken last counts all the same."""
    monkeypatch.setattr("time.time_ns", lambda: 0)
    log = tmp_path / "log"
    for number in (1, 2, 3):
        assert FilterLog(log, 0).next_restart() == number
        make_trainer(**ARGUMENTS, filter_log=str(log)).train("latest" if number == 2 else None)
    table = read_filter_log(log)
    assert set(table["attempt"].to_pylist()) == {3}
    (log / "notes.parquet").write_bytes(b"")
    assert FilterLog(log, 0).next_restart() == 4
