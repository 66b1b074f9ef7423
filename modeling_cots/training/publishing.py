"""What `COTSTrainer` gives away: the complete repository of `hub_export.py` with the card of the run, and its pushes.

During training a push runs in the background, of a folder that is written before training goes on, and so is of one
moment. One that fails there is told in the log and does not stop the training.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard, run_as_future
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.model_card import build_model_card
from ..hub.widget_examples import publishable_images, record_widget_examples
from ..hub_export import cots_model_of, export_repository, mark_generated
from ..hub_push import full_repo_id, push_folder
from .record import build_record, save_record

logger = logging.get_logger(__name__)


def build_card(trainer, model, folder: str) -> ModelCard:
    """The card of what `trainer` has made of `model`, with what was measured last, for a repository in `folder`.

    There it also writes the record that the card is made of, and the images that it shows.
    """
    args = trainer.args
    logs = [entry for entry in trainer.state.log_history if "eval_recall_sum" in entry]
    metrics = {name.removeprefix("eval_"): value for name, value in logs[-1].items()} if logs else None
    record = build_record(
        model,
        args,
        num_steps=trainer.state.global_step,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        metrics=metrics,
        # With images missing it is another test set.
        protocol=None if metrics is None or "skipped_images" in metrics else trainer.eval_protocol,
    )
    images = publishable_images(trainer.eval_dataset)
    if images is not None:
        record["widget"] = record_widget_examples(model, trainer.processing_class, images, folder)
    save_record(record, folder)
    model_name = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
    return build_model_card(model.config, record, model_name=model_name)


def export_trained(trainer, output_dir: str) -> None:
    model = cots_model_of(trainer.model)
    card = build_card(trainer, model, output_dir)
    export_repository(model, trainer.processing_class, output_dir, card=mark_generated(card))


def push_trained(
    trainer, *, blocking: bool, private: bool | None, token: str | None, revision: str | None, **options
) -> CommitInfo | Future | None:
    """
    Push to `args.hub_model_id`, or to a repository named as the output folder.

    Returns the `CommitInfo`, without `blocking` a `Future` of it, and `None` on all processes but the first. For the
    options, and for what is raised, see `push_folder`.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    if not trainer.is_world_process_zero():
        return None
    args = trainer.args
    token = args.hub_token if token is None else token
    if trainer.hub_model_id is None:  # else the Trainer has made the repository at its start
        trainer.hub_model_id = full_repo_id(args.hub_model_id or Path(args.output_dir).absolute().name, token)
    trainer._finish_current_push()
    revision = args.hub_revision if revision is None else revision
    private = args.hub_private_repo if private is None else private
    push = _prepare_push(trainer, private=private, token=token, revision=revision, **options)
    return push() if blocking else run_as_future(push)


def push_while_training(trainer) -> None:
    """Push in the background, at a checkpoint; unless an earlier push is under way (or `hub_always_push` is set)."""
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    earlier = trainer.push_in_progress
    is_busy = earlier is not None and not earlier.is_done()
    if is_busy and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    message = f"Training in progress, step {trainer.state.global_step}"
    push = _prepare_push(trainer, revision=args.hub_revision, token=args.hub_token, commit_message=message)
    job = run_as_future(_push_or_tell, push)
    trainer.push_in_progress = PushInProgress([*earlier.jobs, job] if is_busy else [job])


def _prepare_push(trainer, **options) -> Callable[[], CommitInfo]:
    """A push of the model as it is now, that may be made at any later moment, in another thread too."""
    folder = tempfile.TemporaryDirectory()
    export_trained(trainer, folder.name)

    def push() -> CommitInfo:
        with folder:
            return push_folder(folder.name, trainer.hub_model_id, **options)

    return push


def _push_or_tell(push: Callable[[], CommitInfo]) -> CommitInfo:
    # Not a callback of the future, which would run only after those who wait for it have gone on.
    try:
        return push()
    except Exception as error:
        logger.warning(f"Training goes on. {error}")
        raise
