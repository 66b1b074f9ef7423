"""One complete repository folder: what is in it, and that everybody can load it, with this package and without."""

import ast
import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from carried import CARRIED
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny import CAPTIONS, IMAGE_SIZE, PATCH_SIZE, TINY_ENCODER
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    ViTImageProcessor,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from without_package import run_without_package

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel, COTSProcessor, COTSVideoProcessor
from modeling_cots.hub_export import (
    cots_model_of,
    export_repository,
    is_untouched,
    link_space,
    mark_generated,
    rename_card,
)

FILES = {
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "handler.py",
    "model.safetensors",
    "modules.json",
    "processor_config.json",
    "requirements.txt",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Normalize/config.json",
}
# What may be imported by a repository's files: with transformers, torch and torchvision installed, all are there.
ALLOWED = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "tokenizers"}
# Imported where they are installed: behind a check, or in a `try`.
OPTIONAL = {"av", "onnxruntime", "openvino", "pillow_heif", "simplejpeg"}


@pytest.fixture
def model(tiny_config) -> COTSForPreTraining:
    torch.manual_seed(0)
    return COTSForPreTraining(tiny_config).eval()


@pytest.fixture
def folder(model, tiny_processor, tmp_path) -> Path:
    """A name that is no Python identifier, as names on the Hub are."""
    export_repository(model, tiny_processor, tmp_path / "cots-tiny-v1.0")
    return tmp_path / "cots-tiny-v1.0"


def draw_images() -> list[Image.Image]:
    return [Image.radial_gradient("L").resize((50 + 10 * i, 40)).rotate(20 * i).convert("RGB") for i in range(3)]


def embed(model: COTSModel, processor: COTSProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of `draw_images()` and of `CAPTIONS`, one of them over-long."""
    texts = [*CAPTIONS, "a red circle " * 40]
    with torch.no_grad():
        images = model.encode_image(**processor(images=draw_images(), return_tensors="pt"))
        query = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        return images, model.encode_text(**query)


def names_in(folder: Path) -> set[str]:
    """Files of a repository; those in which Python keeps what it has compiled are none, and come with an import."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------ what is in it


def test_has_every_file_and_no_other(folder):
    assert names_in(folder) == FILES | CARRIED
    config = read_json(folder / "config.json")
    auto_map = config["auto_map"]
    references = [*auto_map.values(), *(pipeline["impl"] for pipeline in config["custom_pipelines"].values())]
    assert {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoProcessor"} <= set(auto_map)
    for reference in references:
        module, _, name = reference.partition(".")
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_has_the_weights_of_the_encoders_and_nothing_else(model, folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        num_parameters = sum(file.get_tensor(name).numel() for name in names)
    assert not [name for name in names if any(word in name for word in ("head", "queue", "momentum", "mask_token"))]
    assert num_parameters == COTSModel(model.config).num_parameters()
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["COTSModel"]
    assert not [name for name in config if "momentum" in name or "queue" in name]


def test_the_code_files_are_those_of_the_package(folder):
    package = Path(sys.modules["modeling_cots"].__file__).parent
    for name in names_in(folder):
        if name.endswith(".py"):
            original = "hub/handler.py" if name == "handler.py" else name
            assert (folder / name).read_bytes() == (package / original).read_bytes()


def test_every_import_in_it_is_allowed_and_every_relative_one_is_there(folder):
    """As transformers looks for them (`get_imports`, a line regex), and as Python does (anywhere in the file)."""
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        absolute = {
            alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        absolute |= {n.module.partition(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0}
        relative = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 1}
        assert not [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.level > 1 or n.level and not n.module)]
        assert set(get_imports(path)) - set(sys.stdlib_module_names) <= ALLOWED, path.name
        assert absolute - set(sys.stdlib_module_names) <= ALLOWED | OPTIONAL, path.name
        assert set(get_relative_imports(path)) == relative, path.name
        assert all((path.parent / f"{name}.py").is_file() for name in relative), path.name


def test_requirements_name_packages_that_satisfy_the_imports(folder):
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    names = {line.partition(">")[0] for line in lines}
    assert names == {"torch", "torchvision", "transformers", "pillow"}  # numpy and huggingface_hub come with these
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert next(line for line in lines if line.startswith("transformers")) in project["dependencies"]


def test_the_card_says_what_the_hub_reads_and_claims_no_results(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.eval_results is None
    assert f"{IMAGE_SIZE} x {IMAGE_SIZE}" in card.text and 'from_pretrained("cots-tiny-v1.0"' in card.text
    assert is_untouched(card.content)


def test_exporting_leaves_the_model_as_it_was(model, tiny_processor, tmp_path):
    config, state = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_repository(model, tiny_processor, tmp_path / "export")
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_card_in_the_folder_stays_and_a_given_one_is_written(model, tiny_processor, tmp_path):
    (tmp_path / "README.md").write_text("by hand")
    export_repository(model, tiny_processor, tmp_path)
    assert (tmp_path / "README.md").read_text() == "by hand"
    export_repository(model, tiny_processor, tmp_path, card="given")
    assert (tmp_path / "README.md").read_text() == "given"


def test_refuses_what_is_no_cots_and_a_processor_that_does_not_fit(model, tiny_processor, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="exports COTS models, got BertModel"):
        export_repository(model.cots.text_model, tiny_processor, tmp_path)
    for wrong in (None, tiny_processor.tokenizer, ViTImageProcessor()):
        with pytest.raises(ValueError, match="needs the COTSProcessor"):
            export_repository(model, wrong, tmp_path)
    tiny_config.text_config.vocab_size = 50
    with pytest.raises(ValueError, match="tokens and the text encoder only 50"):
        export_repository(COTSModel(tiny_config), tiny_processor, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ cards


def test_a_generated_card_is_known_until_somebody_edits_it():
    card = mark_generated("---\nlicense: mit\n---\n# Title\n\nText.\n")
    assert is_untouched(card)
    assert is_untouched(card.replace("\n", "\r\n")) and is_untouched(card + "\n\n")  # what editors and git may do
    assert mark_generated("same") == mark_generated("same\n")
    for edited in (card.replace("Text", "More text"), card + "More.", "More.\n" + card, "no mark", ""):
        assert not is_untouched(edited)


def test_the_examples_of_a_generated_card_follow_the_repository():
    card = mark_generated('from_pretrained("old") and "old" and from_pretrained("older")')
    renamed = rename_card(card, "old", "me/new")
    assert 'from_pretrained("me/new") and "old" and from_pretrained("older")' in renamed and is_untouched(renamed)
    assert rename_card(card + "edited", "old", "me/new") == card + "edited"


# ------------------------------------------------------------------------------------------------------ loading


def test_a_card_links_one_space_below_its_title():
    card = "---\n# a comment\nlicense: mit\n---\n\nBefore.\n\n# Title\n\nText.\n\n```python\n# code\n```\n"
    line = "[Try it in your browser](https://huggingface.co/spaces/{}).\n\n"
    expected = card.replace("# Title\n\n", "# Title\n\n" + line)
    assert link_space(card, "me/first") == expected.format("me/first")
    assert link_space(link_space(card, "me/first"), "me/second.page") == expected.format("me/second.page")
    generated = link_space(link_space(mark_generated(card), "me/first"), "me/second")
    assert is_untouched(generated) and line.format("me/second") in generated and "first" not in generated
    assert link_space("Only text.", "me/first") == "Only text.\n\n" + line.format("me/first")


def test_loads_with_the_package_without_trust(model, folder, tiny_processor):
    expected = embed(model.cots, tiny_processor)
    assert type(AutoConfig.from_pretrained(folder)) is COTSConfig
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is COTSProcessor and type(processor.video_processor) is COTSVideoProcessor
    for auto_class in (COTSModel, AutoModel, AutoModelForZeroShotImageClassification):
        loaded, report = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is COTSModel
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for ours, theirs in zip(embed(loaded.eval(), processor), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "device_map": "cpu"}
    loaded = AutoModel.from_pretrained(folder, **options).eval()
    assert loaded.dtype == torch.bfloat16 and loaded.vision_model.config._attn_implementation == "eager"
    assert loaded.device.type == "cpu"


def test_loads_as_remote_code_where_the_package_cannot_be_imported(model, folder, tiny_processor, tmp_path):
    """Also what was loaded so is exported again, with its code: the same repository."""
    expected = embed(model.cots, tiny_processor)
    torch.save(tiny_processor(images=draw_images(), return_tensors="pt")["pixel_values"], tmp_path / "pixels.pt")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(torch.arange(0, 60_000, 1_000).to(torch.uint16).view(6, 10).numpy())
    deep.save(tmp_path / "deep.png", exif=exif)
    code = f"""
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
    from importlib import import_module

    folder, trust = {str(folder)!r}, {{"trust_remote_code": True}}
    pixels = torch.load({str(tmp_path / "pixels.pt")!r})
    processor = AutoProcessor.from_pretrained(folder, **trust)
    texts = processor(text={[*CAPTIONS, "a red circle " * 40]!r}, padding=True, truncation=True, return_tensors="pt")
    for name, auto_class in {{"zero-shot": AutoModelForZeroShotImageClassification, "model": AutoModel}}.items():
        model = auto_class.from_pretrained(folder, **trust).eval()
        with torch.no_grad():
            embeds = model.encode_image(pixels), model.encode_text(**texts)
        answer[name] = [embed.tolist() for embed in embeds]
    options = {{"dtype": torch.bfloat16, "attn_implementation": "eager", "device_map": "cpu"}}
    half = AutoModel.from_pretrained(folder, **options, **trust).eval()
    with torch.no_grad():
        answer["half"] = [half.encode_image(pixels.bfloat16()).tolist(), half.encode_text(**texts).tolist()]
    answer["options"] = [str(half.dtype), half.text_model.config._attn_implementation, half.device.type]
    config = AutoConfig.from_pretrained(folder, **trust)
    parts = (config, model, processor, processor.image_processor, processor.video_processor)
    answer["deep"] = processor(images=[Image.open({str(tmp_path / "deep.png")!r})])["pixel_values"][0].tolist()
    answer["modules"] = [type(part).__module__ for part in parts]
    hub_export = import_module(type(model).__module__.rpartition(".")[0] + ".hub_export")
    hub_export.export_repository(model, processor, {str(tmp_path / "again")!r})
    sys.path.insert(0, folder)
    from handler import EndpointHandler  # as Inference Endpoints do
    answer["handler"] = EndpointHandler(folder)({{"inputs": {CAPTIONS!r}}})
    """
    answer = run_without_package(code, tmp_path)
    assert all(name.startswith("transformers_modules.cots_hyphen_tiny_hyphen_v1_dot_0.") for name in answer["modules"])
    assert answer["options"] == ["torch.bfloat16", "eager", "cpu"]
    assert answer["deep"] == tiny_processor(images=[Image.open(tmp_path / "deep.png")])["pixel_values"][0].tolist()
    for name, tolerance in (("model", 1e-5), ("zero-shot", 1e-5), ("half", 0.05)):
        for found, wanted in zip(answer[name], expected, strict=True):
            torch.testing.assert_close(torch.tensor(found), wanted, atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.tensor(answer["handler"]), expected[1][: len(CAPTIONS)], atol=1e-5, rtol=0)
    assert names_in(tmp_path / "again") == names_in(folder)
    for name in names_in(folder):
        if name.endswith((".py", ".safetensors")):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert read_json(tmp_path / "again/config.json")["auto_map"] == read_json(folder / "config.json")["auto_map"]


def test_refuses_remote_code_that_nobody_trusts(folder, tmp_path):
    code = f"""
    from transformers import AutoModel
    try:
        AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=False)
    except ValueError as error:
        answer["error"] = str(error)
    """
    assert "trust_remote_code=True" in run_without_package(code, tmp_path)["error"]


def test_a_pre_training_checkpoint_loads_as_the_model_and_the_reverse(model, folder, tiny_processor, tmp_path):
    expected = embed(model.cots, tiny_processor)
    for original_format in (True, False):  # the second is how COTSTrainer writes its checkpoints
        checkpoint = tmp_path / f"checkpoint-{original_format}"
        model.save_pretrained(checkpoint, save_original_format=original_format)
        cots, report = COTSModel.from_pretrained(checkpoint, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for ours, theirs in zip(embed(cots.eval(), tiny_processor), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    whole, report = COTSForPreTraining.from_pretrained(folder, output_loading_info=True)
    heads = ("cmvm_head.", "cmlm_head.", "text_to_image.", "image_to_text.")
    missing = {name for name in report["missing_keys"] if not name.startswith(heads)}
    assert all(name.endswith("mask_token") for name in missing) and not report["unexpected_keys"]
    assert all(torch.isfinite(parameter).all() for parameter in whole.parameters())
    for ours, theirs in zip(embed(whole.eval().cots, tiny_processor), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_model_of_half_precision_stays_in_it(model):
    cots = cots_model_of(model.to(torch.bfloat16))
    assert cots.dtype == torch.bfloat16
    assert cots_model_of(cots) is cots


@pytest.mark.parametrize("vision", [{"model_type": "dinov2"}, {"model_type": "beit", "use_mask_token": True}])
def test_an_encoder_with_a_mask_token_of_its_own_keeps_it(tiny_config, tiny_processor, tmp_path, vision):
    vision = {**TINY_ENCODER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **vision}
    config = COTSConfig(text_config=tiny_config.text_config, vision_config=vision, projection_dim=16)
    model = COTSForPreTraining(config).eval()
    export_repository(model, tiny_processor, tmp_path / "export")
    loaded, report = COTSModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for ours, theirs in zip(embed(loaded.eval(), tiny_processor), embed(model.cots, tiny_processor), strict=True):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------------ others' tools


def test_sentence_transformers_gives_our_embeddings(model, folder, tiny_processor):
    images, texts = embed(model.cots, tiny_processor)
    loaded = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for found, wanted in (
        (loaded.encode(draw_images()), images),
        (loaded.encode([*CAPTIONS, "a red circle " * 40]), texts),
        (loaded.encode(CAPTIONS[0])[None], texts[:1]),
    ):
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(found).norm(dim=-1), torch.ones(len(found)))
    assert loaded.get_embedding_dimension() == model.config.projection_dim
    similarity = loaded.similarity(loaded.encode(CAPTIONS), loaded.encode(draw_images()))
    torch.testing.assert_close(similarity, texts[: len(CAPTIONS)] @ images.T, atol=1e-5, rtol=0)


@pytest.mark.slow  # each process imports everything anew
def test_sentence_transformers_encodes_in_several_processes(folder):
    loaded = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    pool = loaded.start_multi_process_pool(["cpu", "cpu"])
    try:
        for part in (CAPTIONS, draw_images()):
            found = loaded.encode(part, pool=pool, chunk_size=1)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(loaded.encode(part)), atol=1e-5, rtol=0)
    finally:
        loaded.stop_multi_process_pool(pool)


def test_sentence_transformers_trains_it_and_saves_what_it_has_trained(folder, tmp_path):
    loaded = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    before = loaded.encode(CAPTIONS, convert_to_tensor=True)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no"
    )
    pairs = Dataset.from_dict({"anchor": CAPTIONS, "positive": CAPTIONS[::-1]})
    SentenceTransformerTrainer(
        loaded, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(loaded)
    ).train()
    trained = loaded.encode(CAPTIONS, convert_to_tensor=True)
    assert not torch.allclose(trained, before, atol=1e-3)
    loaded.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(again.encode(CAPTIONS, convert_to_tensor=True), trained, atol=1e-5, rtol=0)


def test_sentence_transformers_needs_no_package(model, folder, tiny_processor, tmp_path):
    images, texts = embed(model.cots, tiny_processor)
    for index, image in enumerate(draw_images()):
        image.save(tmp_path / f"{index}.png")
    code = f"""
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer({str(folder)!r}, trust_remote_code=True, device="cpu")
    answer["texts"] = model.encode({[*CAPTIONS, "a red circle " * 40]!r}).tolist()
    answer["images"] = model.encode([{str(tmp_path)!r} + f"/{{index}}.png" for index in range(3)]).tolist()
    """
    answer = run_without_package(code, tmp_path)
    torch.testing.assert_close(torch.tensor(answer["texts"]), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(answer["images"]), images, atol=1e-5, rtol=0)
