"""`COTSTrainingArguments`: what training COTS needs beside the model, on top of transformers' own arguments.

Defaults are those of image-text pre-training in the paper (Lu et al., CVPR 2022, and its supplement). What the weights
need (temperature, embedding size) is in `COTSConfig`; paths and columns belong to the scripts.
"""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .base_arguments import check_base_arguments, check_numbers, check_precision, choose_measure, refuse_unused
from .frozen_layers import ALL, NONE, check_freeze
from .master_weights import FLOAT32, check_param_dtype
from .recomputed_activations import check_recompute
from .sharding import check_shard_arguments

MAX_KEY_DRIFT = 0.08
FILTER_RULES = "deviation", "mixture"
FILTER_NUM_STD = 2.0
# Adam as the supplement says it, with the decay in the gradient; transformers' `OptimizerNames` lacks it.
ADAM = "adam"


@dataclass
class COTSTrainingArguments(TrainingArguments):
    """Arguments of [`COTSTrainer`]: its own, and those of `transformers.TrainingArguments`, of which some are refused.

    docs/training.md lists what becomes of each. The default of `metric_for_best_model` is `eval_recall_sum`.
    Raises `ValueError` at construction for a value that no run could use, before any work is done.
    """

    # Supplement: "learning rate 5e-5", "weight decay 0.02".
    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate."})
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The initial learning rate of the two encoders, if not learning_rate: fresh projections on "
            "pre-trained encoders want 10 to 30 times more. Both follow the same schedule. Not in the paper."
        },
    )
    weight_decay: float = field(default=0.02, metadata={"help": "Weight decay of the optimizer."})
    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={
            "help": "An optimizer of transformers; or `adam`, torch's Adam, which adds the weight decay to the "
            "gradient (AdamW shrinks the weights directly)."
        },
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Number of passes over the images."})
    lr_hold_epochs: float = field(
        default=5.0,
        metadata={
            "help": "Epochs at the full learning rate (after any warm-up), before it decays linearly to zero. "
            "The paper: 5 in pre-training, 1 in fine-tuning. Only with lr_scheduler_type=linear."
        },
    )

    # Not the Trainer's 500: a short run would end without a line that tells whether it learns.
    logging_steps: float = field(default=50, metadata={"help": "Steps from one line of training logs to the next."})

    momentum: float = field(
        default=0.99, metadata={"help": "m of the momentum encoders: theta_m <- m * theta_m + (1 - m) * theta."}
    )
    queue_size: int = field(
        default=12_800, metadata={"help": "N_Q, the number of pairs in the two paired queues (1,444 in fine-tuning)."}
    )
    batch_candidates: bool = field(
        default=True,
        metadata={
            "help": "Also contrast against the batch itself, and let queue and momentum in as keys stay fresh "
            "(max_key_drift). Not in the paper, which has a constant momentum and the queue alone."
        },
    )
    freeze_vision: str = field(
        default=NONE,
        metadata={
            "help": "What of the vision encoder does not train: `all`, a number of layers from below with what runs "
            "before them, or `none`. Frozen layers run once a step, in evaluation mode. Not in the paper."
        },
    )
    freeze_text: str = field(default=NONE, metadata={"help": "Likewise of the text encoder."})
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder: outputs of encoders that are frozen whole are computed once, written there, and found "
            "by later runs. Of images that needs min_crop_scale 1."
        },
    )
    max_key_drift: float | None = field(
        default=None,
        metadata={
            "help": "With batch_candidates: keys of the queue are candidates while logits with them are lower than "
            "with fresh keys by less than this, on average. By default 0.08, and any drift where both encoders are "
            "frozen whole. Without batch_candidates (the paper) every key of the queue is one."
        },
    )
    mask_equal_captions: bool = field(
        default=True,
        metadata={"help": "Pairs with equal captions are no negatives of each other. Not in the paper."},
    )

    mcl_weight: float = field(default=1.0, metadata={"help": "Weight of momentum contrastive learning."})
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL alignment; the loss is logged with weight 0 too."}
    )
    kl_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which the weight of the KL alignment grows linearly from 0. From scratch, KL from the "
            "first step can collapse the model; pre-trained encoders need no warm-up."
        },
    )
    cmvm_weight: float = field(default=1.0, metadata={"help": "Weight of masked vision modeling."})
    cmlm_weight: float = field(default=1.0, metadata={"help": "Weight of masked language modeling."})
    image_mask_ratio: float = field(default=0.4, metadata={"help": "Share of patches masked, block-wise."})
    text_mask_ratio: float = field(default=0.15, metadata={"help": "Share of tokens masked."})

    adaptive_filter: bool = field(
        default=True,
        metadata={"help": "Adaptive momentum filter: leave noisy pairs out of the losses once the queue is full."},
    )
    filter_rule: str = field(
        default="deviation",
        metadata={
            "help": "Where noise begins: `deviation`, mean - k * std of the queued similarities (the paper); or "
            "`mixture`, where a pair is likelier to be one of an image and another image's caption."
        },
    )
    filter_num_std: float = field(
        default=FILTER_NUM_STD,
        metadata={"help": "k: pairs that score below mean - k * std of the queued momentum similarities are noise."},
    )

    filter_log: str | None = field(
        default=None,
        metadata={
            "help": "A folder for the audit trail of the filter: parquet files with id, name, step, score and "
            "threshold of every pair that it leaves out."
        },
    )
    max_skipped_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Stop when more than this share of the last 1,000 or more images cannot be read: rotten data, "
            "or storage that is gone. 1 never stops."
        },
    )

    min_crop_scale: float = field(
        default=0.5, metadata={"help": "Smallest share of the image that a random resized crop keeps; 1 = no crop."}
    )
    horizontal_flip: float = field(
        default=0.0,
        metadata={"help": "Probability of flipping an image. It makes captions with 'left' and 'right' untrue."},
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "A policy of timm, such as 'rand-m5-n2-mstd0.5', on top of crop and flip."}
    )

    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the layers of the encoders, those of the momentum copy too. Pays on a GPU, in runs long "
            "enough for the minutes that the first steps take; needs a C++ compiler and Triton."
        },
    )
    shard_model: bool = field(
        default=False,
        metadata={
            "help": "Split weights, gradients, optimizer and momentum copy among the processes (FSDP2), for models "
            "that one device cannot hold."
        },
    )
    shard_replicas: int = field(
        default=1,
        metadata={
            "help": "With shard_model: groups of processes that each hold the whole model, split within the group "
            "(HSDP). One for each machine saves traffic between machines."
        },
    )

    param_dtype: str = field(
        default=FLOAT32,
        metadata={
            "help": "The type of the trained weights: `float32`, or `bfloat16`, with float32 copies in the optimizer. "
            "Saves memory of activations beyond bf16. Not in the paper."
        },
    )

    recompute_activations: bool = field(
        default=False,
        metadata={
            "help": "Keep of each layer the results of matrix products and attention, and compute normalization, "
            "activation functions and dropout again in the backward pass: less memory a pair, equal gradients."
        },
    )

    # Set by the training scripts and told by the card; "" where nobody said.
    starting_point: str = field(default="", init=False)

    # What this trainer needs of the base class, see `COTSTrainer`.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from the log; COTSTrainer stops at them."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Must stay False."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Must stay False."})

    def __post_init__(self):
        refuse_unused(self)
        check_numbers(self)
        check_precision(self)
        choose_measure(self)
        is_adam = self.optim == ADAM
        if is_adam:
            self.optim = TrainingArguments.default_optim  # a name that the base class accepts
        super().__post_init__()
        check_base_arguments(self)
        if is_adam:
            self.optim = ADAM
        self._check_ranges()
        self._check_base_arguments()
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data must not depend on what else draws random numbers
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would warn in every epoch that there is nothing to pin it for

    @property
    def key_drift_limit(self) -> float:
        """The drift from which keys of the queue are no candidates; projections alone cannot run from their keys."""
        if self.max_key_drift is not None:
            return self.max_key_drift
        return math.inf if self.freeze_vision == self.freeze_text == ALL else MAX_KEY_DRIFT

    def check(self) -> None:
        """Raise `ValueError` for values that no run can use; they may have been set since the arguments were made."""
        check_numbers(self)
        check_base_arguments(self)
        self._check_ranges()
        self._check_base_arguments()

    def _check_ranges(self) -> None:
        if self.max_key_drift is not None and not self.max_key_drift > 0:
            raise ValueError(f"max_key_drift must be above 0, got {self.max_key_drift}.")
        if self.max_key_drift is not None and not self.batch_candidates:
            raise ValueError(
                "max_key_drift compares queued keys with those of the batch: leave it out, or set batch_candidates."
            )
        for name in ("freeze_vision", "freeze_text"):
            setattr(self, name, str(getattr(self, name)))
            check_freeze(name, getattr(self, name))
        if self.encoder_learning_rate is not None and self.encoder_learning_rate < 0:
            raise ValueError(f"encoder_learning_rate must not be negative, got {self.encoder_learning_rate}.")
        if self.encoder_learning_rate is not None and self.optim_target_modules is not None:
            raise ValueError("encoder_learning_rate would be ignored beside optim_target_modules: set one of them.")
        if self.queue_size < 1:
            raise ValueError(
                f"queue_size must be at least 1, got {self.queue_size}: COTS contrasts against the queue."
            )
        if self.shard_replicas < 1:
            raise ValueError(f"shard_replicas must be at least 1, got {self.shard_replicas}.")
        for name in ("max_skipped_fraction", "momentum", "image_mask_ratio", "text_mask_ratio", "horizontal_flip"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}.")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"min_crop_scale must be above 0 and at most 1, got {self.min_crop_scale}.")
        not_negative = (
            "mcl_weight",
            "kl_weight",
            "cmvm_weight",
            "cmlm_weight",
            "kl_warmup_steps",
            "lr_hold_epochs",
            "filter_num_std",
        )
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not any((self.mcl_weight, self.kl_weight, self.cmvm_weight, self.cmlm_weight)):
            raise ValueError("All four loss weights are 0: there is nothing to train.")
        for weight, ratio in (("cmvm_weight", "image_mask_ratio"), ("cmlm_weight", "text_mask_ratio")):
            if getattr(self, weight) > 0 and getattr(self, ratio) == 0:
                raise ValueError(f"{ratio} is 0, so there is nothing to predict: set {weight} to 0 as well.")

    def _check_base_arguments(self) -> None:
        check_param_dtype(self)
        if self.compile_layers and self.torch_compile:
            raise ValueError("compile_layers and torch_compile are two ways to compile the same layers: set one.")
        check_recompute(self)
        check_shard_arguments(self)
        if self.filter_rule not in FILTER_RULES:
            raise ValueError(f"filter_rule must be one of {', '.join(FILTER_RULES)}, got {self.filter_rule}.")
        if self.filter_rule == "mixture" and self.filter_num_std != FILTER_NUM_STD:
            raise ValueError("filter_num_std belongs to filter_rule=deviation: leave it out, as a mixture has no k.")
        if self.filter_log is not None and not self.adaptive_filter:
            raise ValueError(
                "filter_log has nothing to tell without the filter: set adaptive_filter, or leave the log out."
            )
        if self.lr_hold_epochs > 0 and self.lr_scheduler_type != "linear":
            raise ValueError(
                f"lr_hold_epochs belongs to lr_scheduler_type=linear, got {self.lr_scheduler_type}: "
                "set lr_hold_epochs to 0 to use another schedule."
            )
        if self.lr_hold_epochs > 0 and self.lr_scheduler_kwargs:
            raise ValueError("lr_scheduler_kwargs belongs to another schedule: set lr_hold_epochs to 0 to use it.")
