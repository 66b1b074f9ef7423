"""What `COTSTrainer` publishes: the card of a run, and pushes of the complete repository that `hub_export.py` writes.

During training a push runs in the background, of a folder that is written before training goes on, so that it is of
one moment. Where one fails, the log says so and training goes on.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard, run_as_future
from transformers import PreTrainedModel, ProcessorMixin, TrainerState
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.model_card import build_model_card
from ..hub.widget_examples import publishable_images, record_widget_examples
from ..hub_export import CARD_NAME, is_untouched
from ..hub_push import push_folder
from .arguments import COTSTrainingArguments
from .record import build_record, save_record

logger = logging.get_logger(__name__)


def build_card(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str,
    *,
    args: COTSTrainingArguments,
    state: TrainerState,
    train_dataset,
    eval_dataset,
    eval_protocol: str | None,
    model_name: str | None,
) -> ModelCard:
    """
    The card of a trained model with what was measured last; into `folder` go its record and the images that it shows.

    Args:
        model ([`COTSModel`]): The trained model.
        processor ([`COTSProcessor`]): Its processor.
        folder: Of the repository.
        args, state: Of the run.
        train_dataset, eval_dataset: What it was trained and measured on.
        eval_protocol: One of `PROTOCOLS`, or `None`.
        model_name: Title; by default `repository_name`.
    """
    logs = [entry for entry in state.log_history if "eval_recall_sum" in entry]
    metrics = {name.removeprefix("eval_"): value for name, value in logs[-1].items()} if logs else None
    record = build_record(
        model,
        args,
        num_steps=state.global_step,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        metrics=metrics,
        # With images missing it is another test set.
        protocol=None if metrics is None or "skipped_images" in metrics else eval_protocol,
    )
    images = publishable_images(eval_dataset)
    if images is not None:
        record["widget"] = record_widget_examples(model, processor, images, folder)
    save_record(record, folder)
    return build_model_card(model.config, record, model_name=model_name or repository_name(args))


def keep_edited_card(folder: str) -> None:
    """Rename the card of a folder if somebody has edited or written it, before another one takes its place."""
    card = Path(folder) / CARD_NAME
    if not card.is_file() or is_untouched(card.read_text(encoding="utf-8", errors="replace")):
        return
    number = 1
    while (kept := card.with_stem(f"{card.stem}.{number}")).exists():
        number += 1
    card.rename(kept)
    logger.warning(f"Somebody has edited {card}: it is kept as {kept.name}.")


def repository_name(args: COTSTrainingArguments) -> str:
    """The Hub id of the arguments, or else the name of the output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def prepare_push(write: Callable[[str], None], repo_id: str, **options) -> Callable[[], CommitInfo]:
    """
    A push of the repository as it is now, that may be made at any later moment, in another thread too.

    Args:
        write: Writes the repository into a folder.
        repo_id: Where it goes.
        options: Of `push_folder`.
    """
    folder = tempfile.TemporaryDirectory()
    write(folder.name)

    def push() -> CommitInfo:
        with folder:
            return push_folder(folder.name, repo_id, **options)

    return push


def push_in_background(push: Callable[[], CommitInfo], earlier: PushInProgress | None) -> PushInProgress:
    """Start a push beside the earlier ones that are under way; one that fails is told in the log."""
    job = run_as_future(_push_or_tell, push)
    is_busy = earlier is not None and not earlier.is_done()
    return PushInProgress([*earlier.jobs, job] if is_busy else [job])


def _push_or_tell(push: Callable[[], CommitInfo]) -> CommitInfo:
    # Not a callback of the future, which would run only after those who wait for it have gone on.
    try:
        return push()
    except Exception as error:
        logger.warning(f"Training goes on. {error}")
        raise
