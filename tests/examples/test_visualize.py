"""The two scripts that draw, as a user starts them, and the two benchmarks behind docs/results.md at toy size."""

import re
import sys
from pathlib import Path

import noisy_pairs
import numpy as np
import pointing_game
import pyarrow.parquet as pq
import pytest
import torch
import visualize_attention
import visualize_filter
from PIL import Image

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.scripts.factory import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(monkeypatch):
    """A function that runs a script in this process with these arguments."""

    def start(script, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()

    return start


@pytest.fixture
def model_folder(tiny_config, tiny_processor, tmp_path) -> Path:
    """A model that has learned nothing, with a tokenizer that knows the words of scenes."""
    tokenizer = train_tokenizer(ScenesDataset("train", 100).iter_captions(), 500)
    tokenizer.model_max_length = 40
    tiny_config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.tokenizer = tokenizer
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photo(tmp_path) -> Path:
    ScenesDataset("train", 1, 64)[0]["image"].save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_attention_is_drawn(start, model_folder, photo, tmp_path, capsys):
    output = tmp_path / "maps.png"
    caption = "a red circle above a small blue square"
    start(
        visualize_attention,
        photo,
        caption,
        "--words",
        "red",
        "blue square",
        "--model",
        model_folder,
        "--output",
        output,
    )
    printed = capsys.readouterr().out
    assert "blue square" in printed and str(output) in printed
    assert len(np.unique(np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3), axis=0)) > 100
    start(visualize_attention, photo, caption, "--model", model_folder, "--output", output)
    assert len(capsys.readouterr().out.splitlines()) == 8  # six words by default


def test_attention_refuses_bad_input(start, model_folder, photo, tmp_path):
    with pytest.raises(ValueError, match="There is no 'dog'"):
        start(visualize_attention, photo, "a red circle", "--words", "dog", "--model", model_folder)
    with pytest.raises(ValueError, match="No such file"):
        start(visualize_attention, tmp_path / "absent.png", "a red circle", "--model", model_folder)


def test_pairs_are_ranked_drawn_and_held_against_the_truth(start, model_folder, tmp_path, capsys, monkeypatch):
    small_table = noisy_pairs.scenes_table(8, 32)
    monkeypatch.setattr(noisy_pairs, "scenes_table", lambda: small_table)
    start(noisy_pairs, "shuffle", "scenes", tmp_path / "noisy", "--share", "0.25")
    output = tmp_path / "scores"
    start(visualize_filter, tmp_path / "noisy", "--model", model_folder, "--output_dir", output, "--num_std", 1)
    printed = capsys.readouterr().out
    assert "which has no momentum copy" in printed and "of 40 pairs score below" in printed
    scores = pq.read_table(output / "scores.parquet")
    assert len(scores) == 40 and 0 < scores["kept"].to_pylist().count(False) < 20
    for name in ("contact_sheet.jpg", "histogram.png"):
        assert Image.open(output / name).width > 300
    start(noisy_pairs, "report", tmp_path / "noisy", output / "scores.parquet")
    assert "40 pairs, 10 shuffled" in capsys.readouterr().out


def test_the_filter_script_takes_scenes_and_refuses_bad_input(start, model_folder, tmp_path):
    with pytest.raises(SystemExit):
        start(visualize_filter, "scenes", "--model", model_folder, "--num_std", -1)
    with pytest.raises(SystemExit):
        start(visualize_filter, "scenes", "--model", model_folder, "--num_std", 1, "--filter_rule", "mixture")
    with pytest.raises(ValueError, match="does not exist"):
        start(visualize_filter, tmp_path / "absent", "--model", model_folder)
    output = tmp_path / "scores"
    start(visualize_filter, "scenes", "--split", "validation", "--model", model_folder, "--output_dir", output)
    assert len(pq.read_table(output / "scores.parquet")) == 1000


def test_shuffling_moves_the_share_asked_for_to_other_images():
    captions = [[f"{image}-{number}" for number in range(image % 4)] for image in range(40)]
    moved, is_moved = noisy_pairs.shuffle_captions(captions, share=0.3, seed=0)
    assert [len(texts) for texts in moved] == [len(texts) for texts in captions]
    assert sorted(sum(moved, [])) == sorted(sum(captions, []))
    assert sum(map(sum, is_moved)) == round(0.3 * 60)
    for image, (texts, flags) in enumerate(zip(moved, is_moved, strict=True)):
        assert [not text.startswith(f"{image}-") for text in texts] == flags
    assert noisy_pairs.shuffle_captions(captions, 0.3, 0) == (moved, is_moved)
    assert noisy_pairs.shuffle_captions(captions, 0.3, 1)[0] != moved
    with pytest.raises(ValueError, match="no way to move 2 captions of 1 images"):
        noisy_pairs.shuffle_captions([["a", "b"]], 1.0, 0)


def test_the_area_under_the_curve_equals_counting_all_pairs():
    rng = np.random.default_rng(0)
    scores, is_noise = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.3
    clean, noise = scores[~is_noise], scores[is_noise]
    expected = np.mean([(a > b) + (a == b) / 2 for a in clean for b in noise])
    assert noisy_pairs.area_under_roc(scores, is_noise) == pytest.approx(expected)


def test_the_pointing_game_is_played(start, model_folder, capsys):
    start(pointing_game, "--model", model_folder, "--num_scenes", 2)
    printed = capsys.readouterr().out
    for row in ("chance", "attention roll-out", "GAE, the word", "occlusion, the word"):
        assert row in printed


def test_a_point_on_the_named_object_is_a_hit(tiny_config):
    model = COTSModel(tiny_config)
    scenes = ScenesDataset("validation", 50, 32)
    scene = next(scene for scene in map(scenes.scene, range(50)) if len(scene.objects) > 1)
    game = pointing_game.Game(model, scenes)
    named, other = scene.objects[:2]

    def map_of(item):  # hottest at the patch that is most inside the box, cold elsewhere
        heat = torch.zeros(4, 4)
        left, top, right, bottom = item.box
        heat[(top + bottom) // 2 // 8, (left + right) // 2 // 8] = 1
        return heat

    game.play("color", named, scene.objects, {"right": map_of(named), "wrong": map_of(other)})
    center = [
        (8 * (side // 8) + 4) for side in ((named.box[1] + named.box[3]) // 2, (named.box[0] + named.box[2]) // 2)
    ]
    assert game.hits["right", "color"] == [float(pointing_game.is_inside(named.box, *center))]
    assert game.hits["wrong", "color"] == [0.0]
    inside = sum(
        pointing_game.is_inside(named.box, 8 * row + 4, 8 * column + 4) for row in range(4) for column in range(4)
    )
    assert game.hits["chance", "color"] == [inside / 16]


def test_rollout_equals_the_product_of_matrices():
    attentions = [torch.rand(1, 2, 5, 5).softmax(dim=-1) for _ in range(3)]
    product = torch.eye(5)
    for attention in attentions:
        product = (attention[0].mean(dim=0) + torch.eye(5)) / 2 @ product
    torch.testing.assert_close(pointing_game.attention_rollout(tuple(attentions)), product[0])


def test_words_name_the_object_they_belong_to_and_no_word_twice():
    scenes = ScenesDataset("validation", 60)
    kinds = set()
    for scene in map(scenes.scene, range(60)):
        for caption in scene.captions:
            for kind, word, item in pointing_game.words_of_objects(scene, caption):
                kinds.add(kind)
                assert len(re.findall(rf"\b{word}\b", caption)) == 1
                assert any(f"{item.color} {shape}" in caption for shape in pointing_game.SHAPES[item.shape].words)
                assert word.split()[0] == item.color or word in pointing_game.SHAPES[item.shape].words
    assert kinds == set(pointing_game.KINDS)
