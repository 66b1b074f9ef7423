"""The video retrieval script from end to end, on real files: generated scenes, MSR-VTT's form, folders, bad input."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import moving_scenes_probe
import pytest
import run_video_retrieval
import torch
from programs import run_python
from script_runs import script_runner
from transformers import AutoProcessor
from video_files import write_audio, write_video

from modeling_cots import COTSModel, COTSTrainingArguments
from modeling_cots.data import skip_report
from modeling_cots.data.scenes.moving import sample_moving_scenes, write_moving_scenes
from modeling_cots.evaluation.retrieval_metrics import PROTOCOLS
from modeling_cots.scripts import video_retrieval
from modeling_cots.scripts.command_line import parse_config_and_options

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Few generated videos, and four frames of each."""
    monkeypatch.setattr("modeling_cots.data.scenes.moving.SPLIT_SIZES", {"train": 10, "validation": 6})
    return script_runner(run_video_retrieval, tmp_path, monkeypatch, image_size=48, num_frames=4)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, list[dict]]:
    """Rows {"file", "captions"} of ten clips of the training split and six of the validation split."""
    folder, found = tmp_path_factory.mktemp("clips"), {}
    for split, number in (("train", 10), ("validation", 6)):
        target = write_moving_scenes(folder, split, number, image_size=48)
        rows = [json.loads(line) for line in (target / "metadata.jsonl").read_text().splitlines()]
        found[split] = [{"file": target / row["file_name"], "captions": row["captions"]} for row in rows]
    return found


def write_msrvtt(folder: Path, clips: dict[str, list[dict]], *, in_one_file: bool) -> Path:
    """The clips as MSR-VTT: eight videos to train on, two to validate, six to test, four captions each."""
    rows = [("train", row) for row in clips["train"][:8]] + [("validate", row) for row in clips["train"][8:]]
    rows += [("test", row) for row in clips["validation"]]
    content = {name: {"info": {}, "videos": [], "sentences": []} for name in ("train_val", "test")}
    for number, (split, row) in enumerate(rows):
        part = content["test" if split == "test" else "train_val"]
        part["videos"].append({"video_id": f"video{number}", "split": split, "category": 3, "url": "", "id": number})
        for caption in row["captions"]:
            part["sentences"].append({"caption": caption, "video_id": f"video{number}", "sen_id": 0})
        place = folder / ("TestVideo" if split == "test" else "TrainValVideo")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(row["file"], place / f"video{number}.mp4")
    if in_one_file:
        joined = {key: content["train_val"][key] + content["test"][key] for key in ("videos", "sentences")}
        (folder / "MSRVTT_data.json").write_text(json.dumps({"info": {}, **joined}))
    else:
        (folder / "train_val_videodatainfo.json").write_text(json.dumps(content["train_val"]))
        (folder / "test_videodatainfo.json").write_text(json.dumps(content["test"]))
    return folder


def test_moving_scenes_end_in_a_folder_that_loads(run, capsys, tmp_path):
    folder = run("moving_scenes", eval_split="validation", max_steps=3)
    printed = capsys.readouterr().out
    assert "among 6 videos and 24 captions" in printed and "text to video:  R@1" in printed
    assert "What the model finds for a few captions among 6 held-out videos" in printed and re.search(
        r"1\. 0000\d\.mp4", printed
    )
    assert "zero-shot: none; skipped: 0" in printed
    model, processor = COTSModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.video_processor.num_frames == 4
    video = next((tmp_path / "run_videos").glob("validation/*.mp4"))
    inputs = processor(videos=[str(video)], text=["a red circle"], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits_per_video.shape == (1, 1)
    assert not list(folder.rglob("*.mp4")), "the folder is made to be shared"

    results = results_of(folder)
    assert results["trained_on"] == "moving_scenes train" and results["zero_shot_protocol"] == "none"
    assert results["protocol"] is None and results["num_frames"] == 4 and results["num_steps"] == 3
    assert set(results["metrics"]) == {"recall_sum"} | {
        f"{side}_{name}"
        for side in ("t2v", "v2t")
        for name in ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank")
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "On moving_scenes, 10 videos, for 3 optimizer steps." in card
    assert f"| text to video | {results['metrics']['t2v_recall_at_1']:.1f} (" in card
    assert "type: t2v_recall_at_10" in card and "t2i" not in card
    assert "model.encode_video" in card and "Measured on moving_scenes validation (6 videos, 24 captions)" in card


def test_the_probe_changes_one_thing_at_a_time(run, capsys, monkeypatch):
    scenes, rng = sample_moving_scenes("validation", 60), random.Random(0)
    for name, change in moving_scenes_probe.CHANGES.items():
        pairs = [(scene, change(scene, rng)) for scene in scenes]
        assert any(changed is not None for _, changed in pairs), name
        for scene, changed in pairs:
            if changed is None:
                continue
            same_actors, same_events = scene.actors == changed.actors, scene.events == changed.events
            assert same_actors != same_events, name
            differing = sum(
                a != b
                for old, new in zip(scene.actors, changed.actors, strict=True)
                for a, b in zip(old, new, strict=True)
            )
            assert differing == (0 if same_actors else 1)
            if "order" in name:
                assert [e.action for e in changed.events] == [e.action for e in scene.events][::-1]
                assert [e.start for e in changed.events] == [e.start for e in scene.events]
    monkeypatch.setattr(sys, "argv", ["moving_scenes_probe.py", str(run("moving_scenes")), "--num_videos", "20"])
    capsys.readouterr()
    moving_scenes_probe.main()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == len(moving_scenes_probe.CHANGES) and all(row.endswith(" %") for row in rows)


@pytest.mark.parametrize("in_one_file", [True, False])
def test_msrvtt_in_its_own_form(run, clips, tmp_path, monkeypatch, in_one_file):
    data = write_msrvtt(tmp_path / "data", clips, in_one_file=in_one_file)
    with pytest.raises(ValueError, match="msrvtt-full has 2,990 images or videos and 59,800 captions, got 6 and 24"):
        run(data, eval_split="test", protocol="msrvtt-full")
    monkeypatch.setitem(PROTOCOLS, "msrvtt-full", (6, 24))
    results = results_of(run(data, eval_split="test", protocol="msrvtt-full"))
    assert (results["protocol"], results["num_videos"], results["num_captions"]) == ("msrvtt-full", 6, 24)
    results = results_of(run(data, eval_split="validation"))
    assert (results["protocol"], results["num_videos"], results["num_captions"]) == (None, 2, 8)


def test_the_1k_a_split_has_one_caption_a_video(run, clips, tmp_path, monkeypatch):
    data = write_msrvtt(tmp_path / "data", clips, in_one_file=True)
    (data / "MSRVTT_train.9k.csv").write_text("video_id\n" + "".join(f"video{number}\n" for number in range(10)))
    rows = [f"ret{number},msr{number},video{number},a caption of its own {number}\n" for number in (10, 12)]
    (data / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\n" + "".join(rows))
    monkeypatch.setitem(PROTOCOLS, "msrvtt-1ka", (2, 2))
    results = results_of(run(data, eval_split="test", protocol="msrvtt-1ka"))
    assert (results["protocol"], results["num_videos"], results["num_captions"]) == ("msrvtt-1ka", 2, 2)


def test_goes_on_from_a_checkpoint_or_only_measures_it_and_says_how_it_came_about(
    run, clips, tmp_path, monkeypatch, capsys
):
    data = write_msrvtt(tmp_path / "data", clips, in_one_file=True)
    trained = run(data, eval_split="test", output_dir=str(tmp_path / "trained"))
    settings = trained / "processor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.4"))  # as an encoder with other images brings along
    goes_on = run(data, model=str(trained), eval_split="test", output_dir=str(tmp_path / "goes_on"))
    assert list(AutoProcessor.from_pretrained(goes_on).video_processor.image_mean) == [0.4] * 3
    settings.write_text(settings.read_text().replace("0.4", "0.5"))
    measuring = {"train_split": "none", "eval_split": "test", "output_dir": str(tmp_path / "measured")}
    with pytest.raises(ValueError, match="pretrained, fine-tuned-elsewhere, none; got None"):
        run(data, model=str(trained), **measuring)
    with pytest.raises(ValueError, match="nothing to measure"):
        run(data, zero_shot_protocol="pretrained", **measuring)
    with pytest.raises(ValueError, match="this run trains on the data set"):
        run(data, zero_shot_protocol="pretrained")
    capsys.readouterr()
    measured = run(data, model=str(trained), zero_shot_protocol="fine-tuned-elsewhere", **measuring)
    assert "zero-shot: fine-tuned-elsewhere" in capsys.readouterr().out
    results = results_of(measured)
    assert results["metrics"] == pytest.approx(results_of(trained)["metrics"])
    assert results["model"] == str(trained) and results["trained_on"] is None and results["num_steps"] == 0
    assert {path.name for path in measured.iterdir()} == {"results.json", "README.md"}


def test_a_folder_of_files_of_every_kind_is_trained_through(run, tmp_path, monkeypatch):
    """mp4, webm and avi; short and of variable rate; and five that cannot be read, counted and named."""
    messages = []
    monkeypatch.setattr(skip_report.logger, "warning", messages.append)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.mp4", "b.webm", "c.avi"):
        write_video(folder / name, range(20))
    write_video(folder / "short.mp4", range(2))
    write_video(folder / "variable.mp4", range(8), times=[0, 10, 20, 30, 1000, 2000, 4000, 8000])
    write_audio(folder / "audio.mp3")
    write_video(folder / "zero.avi", [])
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    (folder / "empty.webm").touch()
    bad = ["audio.mp3", "zero.avi", "broken.mp4", "empty.webm", "missing.mp4"]
    names = ["a.mp4", "b.webm", "c.avi", "short.mp4", "variable.mp4", *bad]
    with (folder / "metadata.csv").open("w") as file:
        file.write("file_name,caption\n" + "".join(f"{name},a grey video {i}\n" for i, name in enumerate(names)))
    output = run(folder, eval_split="train", num_train_epochs=2, max_steps=-1, num_frames=16, save_strategy="epoch")
    history = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["skipped_images"] for entry in history if "loss" in entry][-1] == 2 * len(bad)
    assert {name for name in bad if any(f"the video {name}," in message for message in messages)} == set(bad)
    assert results_of(output)["num_skipped"] == len(bad)
    assert all(torch.isfinite(tensor).all() for tensor in COTSModel.from_pretrained(output).state_dict().values())


def test_a_test_set_that_cannot_be_read_whole_loses_the_name_of_its_protocol(run, clips, tmp_path, monkeypatch):
    data = write_msrvtt(tmp_path / "data", clips, in_one_file=True)
    monkeypatch.setitem(PROTOCOLS, "msrvtt-full", (6, 24))
    next((data / "TestVideo").glob("*.mp4")).write_bytes(b"no video")
    results = results_of(run(data, eval_split="test", protocol="msrvtt-full"))
    assert results["protocol"] is None and results["num_skipped"] == 1
    assert results["note"] == "1 of the test set could not be read, so this is not msrvtt-full."


def test_refuses_bad_input_before_training(run, clips, tmp_path):
    data = write_msrvtt(tmp_path / "data", clips, in_one_file=True)
    cases = [
        ({"dataset": tmp_path / "nowhere"}, "nowhere"),
        ({"dataset": data, "eval_split": "testing"}, "no split 'testing'; it has test, train, validation"),
        ({"dataset": data, "protocol": "coco-5k"}, "'msrvtt-full' and 'msrvtt-1ka', got 'coco-5k'"),
        ({"dataset": data, "caption_column": "text"}, "no columns to choose"),
        ({"dataset": data, "cmlm_weight": 1}, "set cmlm_weight to 0"),
        ({"dataset": "moving_scenes", "protocol": "msrvtt-full"}, "moving_scenes is generated: leave out protocol"),
        ({"dataset": data, "num_frames": 0}, "num_frames"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            run(options.pop("dataset"), **options)
    for video in (data / "TrainValVideo").glob("*.mp4"):
        video.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="None of the first 8 videos can be read, beginning with video0"):
        run(data, eval_split="test")
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_recipe_of_the_supplement_value_by_value():
    """Lu et al., CVPR 2022, supplement: what it states for MSR-VTT; the script's own defaults say the same."""
    types = (video_retrieval.ScriptArguments, COTSTrainingArguments)
    recipe = ROOT / "examples" / "configs" / "msrvtt.yaml"
    cpu = ["--use_cpu", "true"]
    options, args = parse_config_and_options(*types, argv=[str(recipe), *cpu], defaults=video_retrieval.DEFAULTS)
    assert (options.num_frames, options.temperature, options.protocol) == (16, 0.05, "msrvtt-full")
    assert (args.learning_rate, args.weight_decay, args.optim) == (5e-5, 0.02, "adamw_torch_fused")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 48
    assert (args.momentum, args.queue_size) == (0.99, 1444) and args.queue_size % 48 != 0
    assert (args.lr_hold_epochs, args.lr_scheduler_type, args.warmup_steps) == (1, "linear", 0)
    bare = ["--dataset", "MSRVTT", "--output_dir", "runs/msrvtt", *cpu]
    _, defaults = parse_config_and_options(*types, argv=bare, defaults=video_retrieval.DEFAULTS)
    for name in ("learning_rate", "weight_decay", "momentum", "queue_size", "lr_hold_epochs", "num_train_epochs"):
        assert getattr(defaults, name) == getattr(args, name), name
    for name in ("per_device_train_batch_size", "kl_weight", "cmvm_weight", "cmlm_weight", "adaptive_filter"):
        assert getattr(defaults, name) == getattr(args, name), name


@pytest.mark.slow
def test_the_quick_configuration_learns_what_moves_where(tmp_path):
    folder = tmp_path / "moving_scenes"
    command = ["examples/run_video_retrieval.py", "examples/configs/moving_scenes.yaml", "--output_dir", str(folder)]
    run_python(*command, cwd=ROOT, timeout=1800)
    metrics = results_of(folder)["metrics"]
    # Chance is 10 both ways. It gave 89 and 72 when this was written; near half of that something is broken.
    assert metrics["t2v_recall_at_10"] > 44
    assert metrics["v2t_recall_at_10"] > 36
