"""Cards: every number is one that was measured, the metadata is what the Hub reads, and the text fits the data."""

import pytest
from card_records import METRICS, check_metadata, make_record
from huggingface_hub import ModelCard

from modeling_cots.hub.model_card import build_model_card, write_card_of_measured
from modeling_cots.training.record import REPORTED_SETTINGS


@pytest.mark.parametrize("name", ["scenes", "flickr8k", "own-photos", "someone/pairs"])
def test_metadata_survives_the_file(tiny_config, tmp_path, name):
    card = build_model_card(tiny_config, make_record(name), model_name="me/first")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    check_metadata(loaded)
    assert {(result.metric_type, result.metric_value) for result in loaded.data.eval_results} == {
        (metric, round(value, 2)) for metric, value in METRICS.items() if "recall" in metric
    }
    assert (
        loaded.data.model_name == "me/first"
        and "# first" in loaded.text
        and 'from_pretrained("me/first"' in loaded.text
    )


@pytest.mark.parametrize("name", ["/home/me/secret/*.tar", "/home/me/{secret,other}/*.tar", "~/secret/x test"])
def test_a_card_names_no_folder_of_this_machine(tiny_config, tmp_path, name):
    card = build_model_card(tiny_config, make_record(name), model_name="first")
    card.save(tmp_path / "model" / "README.md")
    results = {"metrics": METRICS, "measured_on": name, "protocol": None, "zero_shot_protocol": "none"}
    write_card_of_measured(str(tmp_path), str(tmp_path / "model"), results)
    for content in (str(card), (tmp_path / "README.md").read_text(encoding="utf-8")):
        assert "secret" not in content and "/home" not in content and "~" not in content


def test_license_and_language_are_claimed_for_known_data_only(tiny_config):
    for name, is_known in {"scenes": True, "flickr8k": True, "own-photos": False, "someone/pairs": False}.items():
        data = build_model_card(tiny_config, make_record(name), model_name="first").data
        assert (data.license == "apache-2.0") == (data.language == "en") == is_known
        assert data.datasets == (["someone/pairs"] if "/" in name else None)


def test_numbers_stand_beside_chance(tiny_config):
    text = build_model_card(tiny_config, make_record(), model_name="first").text
    # One of 200 images; five of 1,000 captions: 1 - C(995, k) / C(1000, k).
    assert "| text to image | 10.1 (0.5) | 50.1 (2.5) | 100.1 (5.0) | 3.5 | 9.0 |" in text
    assert "| image to text | 10.1 (0.5) | 50.1 (2.5) | 100.1 (4.9) | 2.0 | 7.2 |" in text
    assert "200 images, 1,000 captions" in text and "441 optimizer steps" in text and "1,234,567" in text
    for setting in REPORTED_SETTINGS:
        assert f"| `{setting}` | value of {setting} |" in text
    assert "Not zero-shot" in text and "16 numbers" in text


def test_without_an_evaluation_nothing_is_claimed(tiny_config):
    record = make_record(metrics=None, evaluation_data=None, zero_shot_protocol=None)
    card = build_model_card(tiny_config, record, model_name="first")
    assert card.data.eval_results is None
    assert "None: no evaluation set was given." in card.text and "R@1" not in card.text
    check_metadata(card)


def test_a_protocol_and_videos_are_named(tiny_config):
    record = make_record("own-clips", unit="video", protocol="msrvtt-full")
    card = build_model_card(tiny_config, record, model_name="first")
    assert "`msrvtt-full`" in card.text and "encode_video" in card.text and "video-text-retrieval" in card.data.tags
    assert {result.metric_type[:3] for result in card.data.eval_results} == {"v2t", "t2v"}


@pytest.mark.parametrize("name", ["scenes", "flickr8k", "own-photos"])
def test_the_text_is_of_its_data(tiny_config, name):
    text = build_model_card(tiny_config, make_record(name), model_name="first").text
    assert ("It is a toy" in text) == ("eight shapes" in text) == (name == "scenes")
    assert ("Hodosh" in text) == ("apparent gender" in text) == (name == "flickr8k")
    assert ("resemble its training data" in text) == (name == "own-photos")
    assert "identify people" in text and "no probabilities" in text and "{{" not in text and "{%" not in text
    assert "\n\n\n" not in text.replace("\r", "")
