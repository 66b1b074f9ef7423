"""Configurations and revisions of data sets: of the Hub through the real client, and of a folder with a card."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from PIL import Image

from modeling_cots.data.opening import open_dataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.data.streaming.dataset import open_stream

pytest_plugins = ["hub_fixtures"]

CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("small", "large")
)


def write_repository(folder: Path, mark: str) -> Path:
    """Two configurations of one image each, with a caption that names both the configuration and `mark`."""
    import datasets

    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD + "---\n")
    for name in ("small", "large"):
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        rows = {"image": [Image.new("RGB", (9, 9))], "caption": [f"{name} {mark}"]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


# --- what clients do


def upload(folder: str, repo_id: str, **options) -> str:
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    return api.upload_folder(folder_path=folder, repo_id=repo_id, repo_type="dataset", **options).oid


def captions(dataset: str, stream: bool = False, **options) -> list[str]:
    opened = open_stream(dataset, "train", **options) if stream else open_dataset(dataset, "train", **options)
    return list(opened.iter_captions())


# --- tests


@pytest.mark.parametrize("stream", [False, True])
def test_configuration_and_revision_of_the_hub(hub, tmp_path, stream):
    repo_id = hub.new_repo_id()
    first = hub.run(upload, str(write_repository(tmp_path / "a", "one")), repo_id)
    hub.run(upload, str(write_repository(tmp_path / "b", "two")), repo_id)

    def read(**options) -> list[str]:
        return hub.run(captions, repo_id, stream=stream, **options)

    assert read(dataset_config="small") == ["small two"]
    assert read(dataset_config="large", revision=first) == ["large one"]
    with pytest.raises(Exception, match="has the configurations small, large: name one as dataset_config; none is"):
        read()
    with pytest.raises(Exception, match="name one as dataset_config; got 'huge'"):
        read(dataset_config="huge")
    with pytest.raises(Exception, match="cannot be opened at the revision 'v9'"):
        read(dataset_config="small", revision="v9")


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_with_a_card_has_configurations_but_no_revision(tmp_path, stream):
    folder = str(write_repository(tmp_path / "repository", "here"))
    assert captions(folder, stream, dataset_config="large") == ["large here"]
    with pytest.raises(ValueError, match="has the configurations small, large: name one"):
        captions(folder, stream)
    with pytest.raises(ValueError, match="dataset_revision=v1 belongs to a Hub id.*leave it out"):
        captions(folder, stream, dataset_config="large", revision="v1")


@pytest.mark.parametrize("option", ["dataset_config", "revision"])
def test_what_has_no_versions_refuses_them(tmp_path, option):
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": "a"}))
    (tmp_path / "dataset_coco.json").write_text("{}")
    write_repository(tmp_path / "repository", "here")
    for dataset, stream in [
        ("scenes", False),
        (str(tmp_path), False),
        (str(tmp_path / "metadata.jsonl"), False),
        (str(tmp_path / "dataset_coco.json"), False),
        (str(tmp_path / "repository" / "*.parquet"), False),
        (str(tmp_path / "repository" / "*.parquet"), True),
        (str(tmp_path / "repository" / "{small,large}.parquet"), True),
    ]:
        with pytest.raises(ValueError, match="=v1 belongs to a Hub id.*leave it out"):
            captions(dataset, stream, **{option: "v1"})


@pytest.mark.parametrize("name", [".", "random", "none"])
def test_a_revision_of_no_hub_id_is_refused(name):
    with pytest.raises(ValueError, match="is no Hub id and has no revision 'v1'"):
        check_revision("tokenizer", name, "v1")


def test_a_revision_of_nothing_is_refused():
    with pytest.raises(ValueError, match="give tokenizer, too"):
        check_revision("tokenizer", None, "v1")
    check_revision("tokenizer", "some/tokenizer", "v1")
    check_revision("tokenizer", None, None)
