"""Records of runs that never ran, and the Hub's rules for the metadata of a card."""

import re

from huggingface_hub import ModelCard
from transformers.pipelines import get_supported_tasks

from modeling_cots.training.record import REPORTED_SETTINGS

METRICS = {f"{side}_recall_at_{k}": 10.0 * k + 0.123 for side in ("i2t", "t2i") for k in (1, 5, 10)}


METRICS |= {"i2t_median_rank": 2.0, "t2i_median_rank": 3.5, "i2t_mean_rank": 7.25, "t2i_mean_rank": 9.0}


def make_record(name: str = "scenes", **changes) -> dict:
    return {
        "num_parameters": 1234567,
        "num_steps": 441,
        "unit": "image",
        "settings": {setting: f"value of {setting}" for setting in REPORTED_SETTINGS},
        "training_data": {"name": name, "num_items": 4000},
        "evaluation_data": {"name": name, "num_items": 200, "num_captions": 1000},
        "metrics": METRICS,
        "protocol": None,
        "zero_shot_protocol": "none",
        "widget": [],
        **changes,
    }


def check_metadata(card: ModelCard) -> None:
    """The Hub's own check needs a network: these are its rules for the fields that we fill."""
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] in get_supported_tasks()
    assert data.get("license") in (None, "apache-2.0") and data.get("language") in (None, "en")
    assert all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in data["tags"])
    for name in data.get("datasets", []):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    for model in data.get("model-index", []):
        assert model["name"]
        for result in model["results"]:
            assert result["task"]["type"] and result["dataset"]["name"]
            assert re.fullmatch(r"[\w./-]+", result["dataset"]["type"])
            assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])
