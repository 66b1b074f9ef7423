"""Write a model card for a trained model, from its run folder, or for a recipe that was not run, from its options.

    python model_cards/make_cards.py runs/quickstart model_cards/cots-scenes-quickstart.md
    python model_cards/make_cards.py runs/flickr8k_small model_cards/cots-small-flickr8k.md --name cots-small-flickr8k
    python model_cards/make_cards.py runs/mine out/CARD.md --space you/cots-search   # the card links this Space
    python model_cards/make_cards.py examples/configs/pretrain_5m.yaml model_cards/cots-base-5m-recipe.md

A run folder holds `config.json` and `training_record.json`, which training writes at its end. Nothing in a card is
written by hand; the title is `--name`, by default the file's name. A card names a Space once
there is one: `demo/browser/export.py --repo_id you/cots-search` makes it.
"""

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from modeling_cots import COTSConfig, COTSModel, COTSTrainingArguments
from modeling_cots.hub.model_card import build_model_card, describe_encoder
from modeling_cots.hub_export import check_space, link_space
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.starting_point import name_start
from modeling_cots.training.record import load_record, reported_settings

STARTS = "model", "text_model", "vision_model", "lora_rank"
RECIPE_TEMPLATE = Path(__file__).parent / "recipe_template.md"
# Facts that are not in the configurations. Data: Lu et al., CVPR 2022. Reported: its supplement, MSR-VTT full split.
RECIPES = {
    "pretrain_5m": {
        "pairs": "5.3",
        "data": "CC3M, SBU, Visual Genome and COCO",
        "reported": "R@1 17.4, R@5 38.8, R@10 49.7, median rank 11",
    },
    "pretrain_15m": {
        "pairs": "15.3",
        "data": "CC3M, SBU, Visual Genome, COCO and CC12M",
        "reported": "R@1 19.2, R@5 41.6, R@10 52.8, median rank 9",
    },
}


def card_of_run(folder: Path, name: str) -> ModelCard:
    """The card of a trained model, from the files of its run in `folder`."""
    return build_model_card(COTSConfig.from_pretrained(folder), load_record(folder), model_name=name)


def card_of_recipe(path: Path, name: str) -> ModelCard:
    """The card of a recipe of the paper: its options, and a note that there are no weights.

    Raises `ValueError` for a configuration that is not one of the paper's recipes.
    """
    if path.stem not in RECIPES:
        raise ValueError(
            f"{path.name} is no recipe of the paper ({', '.join(RECIPES)}): run it, then give its folder."
        )
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(COTSTrainingArguments)}
    given = {option: value for option, value in options.items() if option in known}
    args = COTSTrainingArguments(**{**given, "use_cpu": True, "bf16": False})  # nothing is trained here
    args.starting_point = name_start(SimpleNamespace(**{name: options.get(name) for name in STARTS}))
    config = COTSConfig()
    with torch.device("meta"):
        num_parameters = COTSModel(config).num_parameters()
    settings = {option: value for option, value in reported_settings(args).items() if option != "world_size"}
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["cots", "image-text-retrieval", "two-stream", "recipe"],
    )
    return ModelCard.from_template(
        data,
        template_path=RECIPE_TEMPLATE,
        title=name,
        options=options,
        config_path=f"examples/configs/{path.name}",
        text_encoder=describe_encoder(config.text_config),
        vision_encoder=f"{describe_encoder(config.vision_config)}, {'x'.join(map(str, config.image_size))} pixels",
        projection_dim=config.projection_dim,
        temperature=config.temperature,
        num_parameters=f"{num_parameters:,}",
        training_settings=settings,
        **RECIPES[path.stem],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="A run folder, or the .yaml of a recipe.")
    parser.add_argument("card", type=Path, help="The file to write.")
    parser.add_argument("--name", help="Title, and where the examples load the model from: a Hub id, say.")
    parser.add_argument("--space", help="A Space to try the model in, `owner/name`, which the card then links.")
    options = parser.parse_args(argv)
    if options.space is not None:
        check_space(options.space)
    name = options.name or options.card.stem
    if options.source.is_dir():
        card = card_of_run(options.source, name)
    elif options.source.is_file():
        card = card_of_recipe(options.source, name)
    else:
        parser.error(f"there is no {options.source}")
    options.card.parent.mkdir(parents=True, exist_ok=True)
    text = f"{str(card).rstrip()}\n"
    if options.space is not None:
        text = link_space(text, options.space)
    options.card.write_text(text, encoding="utf-8")
    print(f"Wrote {options.card}.")


if __name__ == "__main__":
    run_script(main)
