"""The retrieval script from end to end on small real files: fine-tuning, measuring only, protocols, bad input."""

import json
import shutil
from operator import le
from pathlib import Path

import pytest
import run_retrieval
from huggingface_hub import ModelCard
from karpathy_data import write_karpathy
from PIL import Image
from scene_files import write_folder, write_jsonl, write_parquet, write_shards
from script_runs import script_runner

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.evaluation.retrieval_metrics import PROTOCOLS
from modeling_cots.scripts import retrieval

ROOT = Path(__file__).parents[2]


SPLITS = ["train"] * 8 + ["val"] * 2 + ["test"] * 5


@pytest.fixture
def run(tmp_path, monkeypatch):
    return script_runner(run_retrieval, tmp_path, monkeypatch, eval_split="test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return script_runner(run_retrieval, tmp_path_factory.mktemp("trained"), monkeypatch)("scenes")


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A model fine-tuned on scenes."""
    return shutil.copytree(trained, tmp_path / "checkpoint")


def write_repository(folder: Path, scenes: list[dict]) -> Path:
    """A data set as the Hub holds it: files whose splits its card names."""
    write_parquet(folder, scenes)
    (folder / "train.parquet").rename(folder / "part-0.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part-0.parquet\n---\n"
    (folder / "README.md").write_text(card)
    return folder


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def measured_in_card(folder: Path) -> dict[tuple[str, str], float]:
    results = ModelCard.load(folder / "README.md").data.eval_results
    return {(result.dataset_type, result.metric_type): result for result in results}


def test_fine_tuning_ends_in_a_model_results_and_a_card(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "flickr30k-1k", (5, 10))
    write_karpathy(tmp_path / "data", SPLITS)
    folder = run(tmp_path / "data", protocol="flickr30k-1k")
    printed = capsys.readouterr().out
    assert "among 5 images and 10 captions" in printed
    assert "Protocol: flickr30k-1k; zero-shot: none; skipped: 0." in printed
    results = results_of(folder)
    assert results["protocol"] == "flickr30k-1k" and results["zero_shot_protocol"] == "none"
    assert results["trained_on"] == "flickr30k train" and results["measured_on"] == "flickr30k test"
    assert results["num_steps"] == 2 and results["num_captions"] == 10
    COTSModel.from_pretrained(folder)
    in_card = measured_in_card(folder)[("flickr30k-test", "t2i_recall_at_5")]
    assert in_card.metric_value == round(results["metrics"]["t2i_recall_at_5"], 2)
    assert in_card.dataset_config == "flickr30k-1k" and in_card.metric_args == {"zero_shot_protocol": "none"}
    assert "Protocol: `flickr30k-1k`. Not zero-shot" in (folder / "README.md").read_text()


def test_measuring_only_states_how_far_it_is_zero_shot(run, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "coco-1k", (5, 10))
    write_karpathy(tmp_path / "data", SPLITS, name="coco")
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    options = {"model": str(checkpoint), "train_split": "none", "protocol": "coco-1k"}
    with pytest.raises(ValueError, match="Say how the measured model came about"):
        run(tmp_path / "data", **options)
    folder = run(tmp_path / "data", **options, zero_shot_protocol="fine-tuned-elsewhere")
    results = results_of(folder)
    printed = capsys.readouterr().out
    assert "zero-shot: fine-tuned-elsewhere" in printed
    assert "among 1 images and 2 captions" in printed, "the candidates of a fold"
    assert results["zero_shot_protocol"] == "fine-tuned-elsewhere" and results["trained_on"] is None
    # Five folds of one image with its two captions each: whatever is wanted is all there is.
    assert results["protocol"] == "coco-1k" and results["metrics"]["i2t_recall_at_1"] == 100.0
    in_card = measured_in_card(folder)
    assert in_card[("coco-test", "i2t_recall_at_1")].metric_args == {"zero_shot_protocol": "fine-tuned-elsewhere"}
    assert ("scenes-validation", "i2t_recall_at_1") in in_card, "what the card said before is still there"
    text = (folder / "README.md").read_text()
    assert "| coco test | coco-1k | fine-tuned-elsewhere | image to text | 100.0 | 100.0 | 100.0 | 1 |" in text
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_jsonl, write_shards, write_repository])
def test_measures_on_every_form_that_pre_training_takes(run, checkpoint, tmp_path, write):
    scenes = [ScenesDataset("train", 8, 32)[index] for index in range(8)]
    data = write(tmp_path / "data", scenes)
    options = {"eval_split": "train", "train_split": "none", "model": str(checkpoint)}
    if write in (write_parquet, write_repository):
        options.update(image_column="photo", caption_column="sentences")
    results = results_of(run(data, **options, zero_shot_protocol="pretrained"))
    several = write in (write_parquet, write_jsonl, write_repository)
    assert results["num_images"] == 8 and results["num_captions"] == (40 if several else 8)
    assert results["protocol"] is None and results["num_steps"] == 0


def test_other_counts_than_the_protocols_are_refused_before_training(run, tmp_path):
    write_karpathy(tmp_path / "data", SPLITS)
    with pytest.raises(ValueError, match="1,000 images or videos and 5,000 captions, got 5 and 10"):
        run(tmp_path / "data", protocol="flickr30k-1k")
    assert not (tmp_path / "run").exists()


def test_an_unreadable_test_image_costs_the_name_of_the_protocol(run, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "flickr30k-1k", (5, 10))
    write_karpathy(tmp_path / "data", SPLITS)
    (tmp_path / "data" / "images" / "12.png").write_bytes(b"no image")
    results = results_of(run(tmp_path / "data", protocol="flickr30k-1k"))
    assert results["protocol"] is None and results["num_skipped"] == 1
    assert "this is not flickr30k-1k" in results["note"]
    assert measured_in_card(tmp_path / "run")[("flickr30k-test", "t2i_recall_at_5")].dataset_config is None
    assert "Protocol: `" not in (tmp_path / "run" / "README.md").read_text()


def paint(folder: Path, form: str) -> Path:
    """Four images, each of one color that no crop changes, with three captions each, in one of two forms."""
    folder.mkdir()
    captions = [[f"image {number} told {times} times" for times in ("one", "two", "six")] for number in range(4)]
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(folder / f"{number}.png")
    if form == "karpathy":
        entries = [
            {"filename": f"{n}.png", "split": split, "sentences": [{"raw": caption} for caption in captions[n]]}
            for split in ("train", "test")
            for n in range(4)
        ]
        (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))
        return folder
    rows = [{"image": f"{n}.png", "caption": caption} for n in range(4) for caption in captions[n]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("form", ["karpathy", "one caption a row"])
@pytest.mark.parametrize("fresh_keys", [True, False])
def test_captions_of_one_image_are_never_negatives_of_each_other(run, tmp_path, monkeypatch, form, fresh_keys):
    """By what the images show, not by the ids that the code goes by: a candidate counts if it is another image."""
    queue_size, history, checked = 8, [], []

    class Watching(retrieval.COTSTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.colors = inputs["pixel_values"][:, 0, 0, 0].clone()
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            history.extend(self.colors.tolist())
            return loss

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            objective = self.cots_objective
            self.contrast, objective.contrast = objective.contrast, self.checked_contrast

        def checked_contrast(self, *args):
            logits, drift = self.contrast(*args)
            slots = [None] * queue_size
            for number, color in enumerate(history):
                slots[number % queue_size] = color
            for side in logits:
                for row, color in zip(side.tolist(), self.colors.tolist(), strict=True):
                    counts = [logit > -1e6 for logit in row[1:]]
                    in_queue, in_batch = counts[:queue_size], counts[queue_size:]
                    others = [slot is not None and abs(slot - color) > 1e-3 for slot in slots]
                    if fresh_keys:  # stale keys of the queue are left out, too
                        assert all(map(le, in_queue, others))
                        assert in_batch == [abs(each - color) > 1e-3 for each in self.colors.tolist()]
                    else:
                        assert in_queue == others and in_batch == []
                    checked.append(sum(slot is not None and abs(slot - color) <= 1e-3 for slot in slots))
            return logits, drift

    monkeypatch.setattr(retrieval, "COTSTrainer", Watching)
    run(
        paint(tmp_path / "data", form),
        max_steps=6,
        queue_size=queue_size,
        per_device_train_batch_size=3,
        batch_candidates=fresh_keys,
    )
    assert len(set(history)) == 4
    assert max(checked) >= 2 and len(checked) > 20, "images met their own in the queue, several times"


def test_token_losses_are_off_unless_asked_for(run, tmp_path, caplog):
    write_karpathy(tmp_path / "data", SPLITS)
    plain = run(tmp_path / "data", save_strategy="steps", save_steps=2)
    asked = run(
        tmp_path / "data",
        cmvm_weight=1,
        cmlm_weight=1,
        image_tokenizer="random",
        save_strategy="steps",
        save_steps=2,
        output_dir=tmp_path / "asked",
    )
    logged = {}
    for name, folder in (("plain", plain), ("asked", asked)):
        history = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
        logged[name] = set().union(*history)
    assert {"loss_cmvm", "loss_cmlm"} <= logged["asked"] - logged["plain"]
    assert {"loss_i2t", "loss_t2i", "loss_kl"} <= logged["plain"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_split": "none", "zero_shot_protocol": "pretrained"}, "There is nothing to measure: give `model`"),
        ({"eval_split": "none"}, "There is nothing to measure on"),
        ({"zero_shot_protocol": "pretrained"}, "this run trains on the data set"),
        ({"train_split": "none", "zero_shot_protocol": "half"}, "one of pretrained"),
        ({"protocol": "flickr"}, "No protocol is called"),
        (
            {"train_split": "none", "zero_shot_protocol": "pretrained", "model": "mine", "push_to_hub": "true"},
            "this run only measures",
        ),
    ],
)
def test_what_cannot_be_is_refused(run, options, message):
    options = {"eval_split": "validation", **options}
    with pytest.raises(ValueError, match=message):
        run("scenes", **options)


@pytest.mark.parametrize("recipe, protocol", [("flickr30k", "flickr30k-1k"), ("coco", "coco-5k")])
def test_the_recipes_run_on_a_few_images(run, checkpoint, tmp_path, monkeypatch, recipe, protocol):
    monkeypatch.setitem(PROTOCOLS, protocol, (5, 10))
    write_karpathy(tmp_path / "data", SPLITS, name=recipe)
    folder = run(
        tmp_path / "data",
        str(ROOT / "examples" / "configs" / f"{recipe}.yaml"),
        model=str(checkpoint),
        bf16="false",
        auto_augment=None,
        dataloader_num_workers=0,
    )
    assert results_of(folder)["protocol"] == protocol
