"""The files and commands of docs/benchmarks.md, as they stand there, on a local set of pairs."""

import ast
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from programs import run_python
from scene_files import png

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.evaluation.retrieval_metrics import retrieval_metrics
from modeling_cots.hub_export import export_repository

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def section(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


def file_and_command(title: str) -> tuple[str, str, list[str]]:
    """Name and text of the file that a section shows, and the words of the command below it."""
    text = section(title)
    (name,) = re.findall(r"This file,\s`(\w+\.py)`", text)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["python", name]
    return name, code, words[1:]


@pytest.fixture(scope="module")
def scenes():
    dataset = ScenesDataset("validation", 12, 32)
    return [dataset[number] for number in range(12)]


@pytest.fixture
def place(tiny_config, tiny_processor, tmp_path, monkeypatch, scenes) -> Path:
    """A folder with a model and what it finds, to which the names of the page refer."""
    torch.manual_seed(0)
    model = COTSModel(tiny_config)
    export_repository(model, tiny_processor, tmp_path / "runs" / "quickstart")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write_wds(folder: Path, scenes: list[dict]) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    (folder / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for number, item in list(enumerate(scenes))[shard::2]:
                for extension, content in (("png", png(item["image"])), ("txt", "\n".join(item["captions"]).encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def write_pairs(folder: Path, scenes: list[dict]) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for number, item in enumerate(scenes):
            item["image"].save(folder / f"{number}.png")
            metadata.write(json.dumps({"file_name": f"{number}.png", "captions": item["captions"]}) + "\n")


@torch.no_grad()
def our_metrics(place: Path, processor, scenes) -> dict[str, float]:
    model = COTSModel.from_pretrained(place / "runs" / "quickstart").eval()
    texts = [caption for item in scenes for caption in item["captions"]]
    image_ids = torch.arange(len(scenes))
    text_ids = torch.tensor([number for number, item in enumerate(scenes) for _ in item["captions"]])
    images = model.encode_image(**processor(images=[item["image"] for item in scenes], return_tensors="pt"))
    inputs = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
    return retrieval_metrics(images, model.encode_text(**inputs), image_ids, text_ids)


def test_clip_benchmark_measures_what_we_do(place, tiny_processor, scenes):
    pytest.importorskip("clip_benchmark")
    name, code, words = file_and_command("CLIP_benchmark")
    (place / name).write_text(code)
    write_wds(place / "PHOTOS_WDS", scenes)
    run_python(*words, cwd=place)
    found = json.loads((place / "clip_benchmark.json").read_text())["metrics"]
    expected = our_metrics(place, tiny_processor, scenes)
    for k in (1, 5, 10):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(expected[f"t2i_recall_at_{k}"] / 100)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(expected[f"i2t_recall_at_{k}"] / 100)


def test_mteb_measures_what_we_do_and_calls_it_hit_rate(place, tiny_processor, scenes):
    pytest.importorskip("mteb")
    name, code, words = file_and_command("mteb")
    (place / name).write_text(code)
    write_pairs(place / "PHOTOS" / "test", scenes)
    printed = run_python(*words, cwd=place).stdout
    expected = our_metrics(place, tiny_processor, scenes)
    for direction in ("t2i", "i2t"):
        found = ast.literal_eval(re.search(rf"^{direction} (\{{.*\}})$", printed, flags=re.MULTILINE)[1])
        for k in (1, 5, 10):
            assert found[f"hit_rate_at_{k}"] == pytest.approx(expected[f"{direction}_recall_at_{k}"] / 100, abs=1e-4)
        parts = 1 if direction == "t2i" else len(scenes[0]["captions"])  # of its captions, at most one is first
        assert found["recall_at_1"] == pytest.approx(found["hit_rate_at_1"] / parts, abs=1e-4)
