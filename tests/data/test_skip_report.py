"""What is left out of the data: names, counts, and lists of names that are cut."""

from modeling_cots.data import skip_report
from modeling_cots.data.skip_report import MAX_REPORTED_NAMES, NamedOnce, SkipReport, StreamReport, and_more


def test_everything_counts_and_is_named_once_up_to_a_hundred(monkeypatch):
    messages = []
    monkeypatch.setattr(skip_report.logger, "warning", messages.append)
    report = StreamReport()
    for _ in range(2):
        report.add_shard("a.tar", OSError("gone"), 5)
        report.add_sample("b.tar/1", "it has no caption")
    assert (report.skipped_shards, report.skipped_samples) == (2, 2)
    assert messages == [
        "Skipped the shard a.tar after 5 samples: OSError: gone.",
        "Skipped b.tar/1: it has no caption.",
    ]
    for number in range(200):
        report.add_sample(f"c/{number}", "x")
    assert len(messages) == MAX_REPORTED_NAMES + 1 and "no longer named" in messages[-1]
    assert report.skipped_samples == 202


def test_an_unreadable_video_is_named_once(monkeypatch):
    messages = []
    monkeypatch.setattr(skip_report.logger, "warning", messages.append)
    report = SkipReport("video")
    for _ in range(2):
        report.add("a.mp4", ValueError("no frames"))
    assert messages == ["Skipped the video a.mp4, which cannot be read (no frames)."]


def test_two_reports_do_not_share_their_names(monkeypatch):
    messages = []
    monkeypatch.setattr(skip_report.logger, "warning", messages.append)
    for named in (NamedOnce("no more"), NamedOnce("no more")):
        named.warn("a", "a is gone")
        named.warn("a", "a is gone")
    assert messages == ["a is gone", "a is gone"]


def test_a_list_is_cut_and_says_by_how_much():
    assert and_more([], 2) == ""
    assert and_more(["a", "b"], 2) == "a, b"
    assert and_more(["a", "b", "c"], 2) == "a, b and 1 more"


def test_a_name_that_is_no_utf8_is_logged_as_text_that_any_file_takes(caplog):
    NamedOnce("There are more.").warn("caf\udce9", "Skipped caf\udce9.")
    assert [record.getMessage() for record in caplog.records] == ["Skipped caf\\udce9."]
