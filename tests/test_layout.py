"""The walls of the package: who may import whom; a downloaded model needs nothing but torch and transformers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "modeling_cots"

# A file imports from the layers before its own. In the tools layer nobody imports another, but for the named helpers.
HUB_CLOSURE = {
    "configuration_cots",
    "encoders_cots",
    "hub_export",
    "hub_push",
    "modeling_cots",
    "modeling_cots_pretraining",
    "pipeline_cots",
    "processing_cots",
    "similarities_cots",
    "video_processing_cots",
    "video_reading_cots",
}
# Exported as the handler of an endpoint: it stands alone.
HANDLER = {"hub_handler"}
MATHEMATICS = {"losses", "momentum", "feature_queue", "filtering", "momentum_state"}
TOOLS = {
    "image_tokenizer",
    "data_collator",
    "datasets_pairs",
    "datasets_scenes",
    "datasets_streaming",
    "timm_weights",
    "retrieval_metrics",
    "datasets_moving_scenes",
    "datasets_videos",
    "relevance",
    "heat_maps",
    "layer_compiling",
    "score_pictures",
    "text_encoding",
}
HELPERS_OF_TOOLS = {
    "figures",
    "image_augmentation",
    "image_reading",
    "image_token_cache",
    "karpathy_files",
    "msrvtt_files",
    "pair_files",
    "pair_items",
    "pair_rows",
    "pixel_normalization",
    "scene_drawing",
}
# What a stream is made of, each on top of the ones before it.
STREAM_PARTS = ("shard_names", "shard_reading", "stream_report", "shard_sources")
# Search: the parts of an index, and the index itself, which is a tool.
SEARCH_PARTS = {
    "search_conditions",
    "search_embedding",
    "search_page",
    "search_rows",
    "search_vectors",
    "vector_store_faiss",
    "vector_store_milvus",
    "vector_stores",
}
SEARCH = {"search_index"}
TRAINING = {
    "building",
    "checkpoints",
    "command_line",
    "datasets_opening",
    "evaluation",
    "filter_log",
    "model_card",
    "pair_scores",
    "reporting",
    "retrieval_results",
    "script_steps",
    "search_cli",
    "stock_exports",
    "stream_loading",
    "trainer",
    "trainer_hub",
    "training_args",
    "training_callback",
    "training_cost",
    "training_guards",
    "training_log",
    "training_record",
    "training_schedule",
    "token_writing",
    "training_recovery",
    "training_setup",
    "widget_examples",
    "video_collator",
}
ALLOWED = {
    **dict.fromkeys(HUB_CLOSURE, HUB_CLOSURE),
    **dict.fromkeys(HANDLER, set()),
    **dict.fromkeys(MATHEMATICS, MATHEMATICS),
    **dict.fromkeys(HELPERS_OF_TOOLS, {"pair_items"}),
    "image_augmentation": {"image_reading"},
    "image_token_cache": {"image_reading", "pair_rows"},
    **{part: {"pair_files", "pair_rows", *STREAM_PARTS[:i]} for i, part in enumerate(STREAM_PARTS)},
    **dict.fromkeys(TOOLS, HELPERS_OF_TOOLS),
    "datasets_streaming": {*HELPERS_OF_TOOLS, *STREAM_PARTS},
    **dict.fromkeys(SEARCH_PARTS | SEARCH, HELPERS_OF_TOOLS | SEARCH_PARTS),
    **dict.fromkeys(TRAINING, HUB_CLOSURE | MATHEMATICS | TOOLS | HELPERS_OF_TOOLS | SEARCH_PARTS | SEARCH | TRAINING),
}
THIRD_PARTY = {
    # `av` is imported inside functions only, behind transformers' own check for it.
    **dict.fromkeys(HUB_CLOSURE, {"torch", "transformers", "huggingface_hub", "numpy", "av"}),
    **dict.fromkeys(HANDLER, {"torch", "transformers", "huggingface_hub", "PIL"}),
    **dict.fromkeys(MATHEMATICS, {"torch", "safetensors"}),
    "layer_compiling": {"torch", "transformers"},
    "relevance": {"torch"},
    "text_encoding": {"torch"},
}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and third-party packages, that a file imports anywhere in it."""
    ours, theirs = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            ours.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            theirs.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            theirs.update(alias.name.partition(".")[0] for alias in node.names)
    return ours, theirs - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_the_layers_below(module):
    assert module in ALLOWED, f"{module}.py stands in no layer: say where it belongs"
    ours, theirs = imports_of(module)
    assert ours <= ALLOWED[module]
    assert theirs <= THIRD_PARTY.get(module, theirs)
    assert "modeling_cots" not in theirs


def test_importing_the_package_loads_nothing_of_training():
    code = (
        "import sys, modeling_cots\n"
        "heavy = {'datasets', 'evaluate', 'timm', 'modeling_cots.trainer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import modeling_cots

    for name in modeling_cots.__all__:
        assert getattr(modeling_cots, name).__doc__
    with pytest.raises(AttributeError, match="no attribute"):
        modeling_cots.nothing  # noqa: B018


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "a name is missing: extract it"
