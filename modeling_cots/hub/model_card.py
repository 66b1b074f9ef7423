"""The card of a trained model, filled from its configuration and the record of its training."""

import os
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import cached_file

from ..data.files import broken_card
from ..data.streaming.names import public_name
from ..evaluation.recall_table import RecallRow, recall_rows, rename_metrics

TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"

# The section at the end of a card for results that were measured after training. Its head begins with a bar without a
# space, by which rows are told from it.
MEASURED_LATER = "## Measured later\n\nRecall in percent.\n\n"
TABLE_HEAD = "|on | protocol | zero-shot | direction | R@1 | R@5 | R@10 | median rank |\n" + 8 * "|---" + "|"
# Data sets that the template describes: source of the images, content of the captions, and biases that follow.
KNOWN_DATA = {"scenes": "scenes", "flickr8k": "flickr8k"}


def build_model_card(config, record: dict, *, model_name: str) -> ModelCard:
    """
    Fill the template of the card.

    Args:
        config: The [`COTSConfig`] of the trained model.
        record: The record of its training from `build_record`, with the `widget` entries of the card.
        model_name: Title, and where the examples load it from.
    """
    record = _without_paths(record)
    data, evaluation = record["training_data"], record["evaluation_data"]
    kind = KNOWN_DATA.get(data["name"].split()[0].lower())
    return ModelCard.from_template(
        _card_data(record, model_name, kind),
        template_path=TEMPLATE_PATH,
        model_name=model_name.rpartition("/")[2],
        model_id=model_name,
        modality=record["unit"],
        kind=kind,
        text_encoder=describe_encoder(config.text_config),
        vision_encoder=f"{describe_encoder(config.vision_config)}, {'x'.join(map(str, config.image_size))} pixels",
        projection_dim=config.projection_dim,
        projection=describe_projection(config),
        temperature=config.temperature,
        num_parameters=f"{record['num_parameters']:,}",
        dataset_name=data["name"],
        num_train_images=_number(data["num_items"]),
        num_steps=f"{record['num_steps']:,}",
        training_settings=record["settings"],
        evaluation=evaluation and {name: _number(value) for name, value in evaluation.items()},
        protocol=record["protocol"],
        zero_shot_protocol=record["zero_shot_protocol"],
        rows=_result_table(record),
        widget=record["widget"],
    )


def _without_paths(record: dict) -> dict:
    """The record with data sets named as a published card may name them: without folders of this machine."""
    named = {name: record[name] for name in ("training_data", "evaluation_data") if record[name] is not None}
    return record | {name: data | {"name": public_name(data["name"])} for name, data in named.items()}


def _card_data(record: dict, model_name: str, kind: str | None) -> ModelCardData:
    modality, name = record["unit"], record["training_data"]["name"]
    is_on_the_hub = kind is None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return ModelCardData(
        # Weights trained on custom data are licensed by whoever trained them.
        license=None if kind is None else "apache-2.0",
        language=None if kind is None else "en",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["cots", f"{modality}-text-retrieval", "two-stream", "sentence-transformers"],
        datasets=[name] if is_on_the_hub else None,
        model_name=model_name,
        eval_results=None
        if record["metrics"] is None
        else eval_results(
            record["metrics"],
            record["evaluation_data"]["name"],
            modality=modality,
            protocol=record["protocol"],
            zero_shot_protocol=record["zero_shot_protocol"],
        ),
        widget=record["widget"] or None,
    )


def _number(value):
    return f"{value:,}" if isinstance(value, int) else value


def _result_table(record: dict) -> list[list[str]] | None:
    """The cells of the two rows of measured results; `None` where nothing was measured."""
    metrics, evaluation = record["metrics"], record["evaluation_data"]
    if metrics is None:
        return None
    counts = evaluation["num_items"], evaluation["num_captions"]
    return [_result_cells(row) for row in recall_rows(metrics, record["unit"], *counts)]


def _result_cells(row: RecallRow) -> list[str]:
    """Direction, recalls beside those of a random order where these are known, median and mean rank."""
    chances = {k: f" ({chance:.1f})" for k, chance in row.chances.items()}
    recalls = [f"{recall:.1f}{chances.get(k, '')}" for k, recall in row.recalls.items()]
    return [row.direction, *recalls, f"{row.median_rank:.1f}", f"{row.mean_rank:.1f}"]


def describe_encoder(config) -> str:
    """Type, layers, width and heads of an encoder as a phrase for a card."""
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads"
    )


def describe_projection(config) -> str:
    """The projections from features to embeddings as a phrase for a card."""
    hidden = config.projection_hidden_size
    layers = "one linear layer" if hidden is None else f"a hidden layer of {hidden} and an output layer"
    of_features = "standardized features" if config.standardize_features else "features"
    if config.image_pooling == "cls_mean":
        return f"{layers} on {of_features}; of images, [CLS] and the mean of the patches"
    return f"{layers} on {of_features}" if config.standardize_features else layers


def eval_results(
    metrics: dict[str, float],
    dataset_name: str,
    *,
    modality: str = "image",
    protocol: str | None = None,
    zero_shot_protocol: str | None = None,
) -> list[EvalResult]:
    """The recalls in `metrics` (as `retrieval_metrics` returns them) for the `model-index` of a card.

    Args:
        metrics: Recalls in percent.
        dataset_name: The data set that they were measured on.
        modality: What the captions describe, an "image" or a "video".
        protocol: One of `PROTOCOLS`, or None.
        zero_shot_protocol: One of `ZERO_SHOT_PROTOCOLS`, stated with each number; None where it is not known.
    """
    return [
        EvalResult(
            task_type=f"{modality}-text-retrieval",
            dataset_type=os.path.basename(dataset_name).replace(" ", "-"),
            dataset_name=dataset_name,
            dataset_config=protocol,
            metric_type=name,
            metric_value=round(value, 2),
            metric_args=None if zero_shot_protocol is None else {"zero_shot_protocol": zero_shot_protocol},
        )
        for name, value in rename_metrics(metrics, modality).items()
        if "recall_at" in name
    ]


def load_card(model: str, revision: str | None = None) -> ModelCard:
    """The card of a checkpoint, a folder or a Hub id; an empty one where it has none."""
    path = cached_file(model, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {os.path.basename(os.path.normpath(model))}\n")
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise broken_card(path, error) from error


def add_results(card: ModelCard, results: list[EvalResult], model_name: str) -> None:
    """Add results to the `model-index` of a card; earlier results of the same metric on the same data are replaced.

    The index needs a name of the model: a card without one gets `model_name`.
    """
    replaced = {result.unique_identifier + (result.metric_type,) for result in results}
    kept = [
        result
        for result in card.data.eval_results or []
        if result.unique_identifier + (result.metric_type,) not in replaced
    ]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or model_name


def write_card_of_measured(
    output_dir: str, model: str, results: dict, modality: str = "image", revision: str | None = None
) -> None:
    """Write a copy of the card of a checkpoint that was only measured, with the results added.

    Args:
        output_dir: The folder in which `README.md` is written.
        model: The checkpoint, a folder or a Hub id.
        results: What `write_results` returned, with `measured_on` and `zero_shot_protocol` among its facts.
        modality: What the captions describe, an "image" or a "video".
        revision: Branch, tag or commit of a Hub id.
    """
    results = results | {"measured_on": public_name(results["measured_on"])}
    card = load_card(model, revision)
    measured = eval_results(
        results["metrics"],
        results["measured_on"],
        modality=modality,
        protocol=results["protocol"],
        zero_shot_protocol=results["zero_shot_protocol"],
    )
    add_results(card, measured, model_name=os.path.basename(os.path.normpath(model)))
    card.text = _with_rows(card.text, results, modality)
    card.save(os.path.join(output_dir, "README.md"))


def _with_rows(text: str, results: dict, modality: str) -> str:
    """The text of a card with a row for each direction in its last table; rows of the same test set are replaced."""
    what = f"| {results['measured_on']} | {results['protocol'] or ''} | {results['zero_shot_protocol']} |"
    text, _, table = text.partition(MEASURED_LATER)
    rows = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith(what)]
    for row in recall_rows(results["metrics"], modality):
        recalls = " | ".join(f"{recall:.1f}" for recall in row.recalls.values())
        rows.append(f"{what} {row.direction} | {recalls} | {row.median_rank:g} |")
    return "\n".join([text.rstrip() + "\n", MEASURED_LATER + TABLE_HEAD, *rows]) + "\n"
