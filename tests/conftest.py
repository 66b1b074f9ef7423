"""One tiny configuration, and a processor to match, for all tests. Offline, on one CPU thread."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: a second thread only waits, here and in processes of the tests
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
# `datasets` finds a folder with a card again by the folder's name alone: another run's data would be taken for ours.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="cots-tests-")
# Remote code and metrics are copied to folders which two runs, or two workers of pytest-xdist, would share.
os.environ["HF_MODULES_CACHE"] = os.environ["HF_DATASETS_CACHE"] + "/modules"
os.environ["HF_METRICS_CACHE"] = os.environ["HF_DATASETS_CACHE"] + "/metrics"

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings
from PIL import Image
from tiny import CAPTIONS, IMAGE_SIZE, PATCH_SIZE, SPECIAL_TOKENS, TINY_ENCODER, VOCAB_SIZE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from modeling_cots import COTSConfig, COTSModel, COTSProcessor, COTSVideoProcessor

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
# The same examples in every run, and none that fails because the machine is busy; to look for others, run
# `python -m pytest --hypothesis-profile default`.
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """A training run collects garbage: without this, each time among millions of objects of imported libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """The precision that a test trained in is kept in a singleton, and would be that of the next one too."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def float32_everywhere(monkeypatch):
    """Pipelines and searches would run in bfloat16 on some CPUs, and the tests see other numbers there."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)


@pytest.fixture
def tiny_config() -> COTSConfig:
    """Two layers, 32 wide, 99 words, 16 patches of 8 x 8; a fresh object for every test."""
    return COTSConfig(
        text_config={
            **TINY_ENCODER,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 40,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        vision_config={**TINY_ENCODER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        projection_dim=16,
        image_vocab_size=50,
        initializer_range=0.1,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most 99 pieces in BERT's format, trained on `CAPTIONS`."""
    # The library numbers the letters inside words anew in every process, unless they are numbered beforehand: some
    # tests train, and what they reach must not depend on it.
    letters = sorted({f"##{letter}" for caption in CAPTIONS for letter in caption if letter != " "})
    special_tokens = [*SPECIAL_TOKENS, *letters]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(
        CAPTIONS, trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=special_tokens, show_progress=False)
    )
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=40,
    )


@pytest.fixture
def tiny_processor(tiny_tokenizer) -> COTSProcessor:
    """32 x 32 images of any mode, the tiny tokenizer, videos of 4 frames."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return COTSProcessor(
        ViTImageProcessor(size=size, do_convert_rgb=True), tiny_tokenizer, COTSVideoProcessor(size=size, num_frames=4)
    )


@pytest.fixture
def saved_model(tiny_config, tiny_processor, tmp_path) -> Path:
    """The folder `model` with a COTSModel, whose weights are the same in every test, and its processor."""
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def ray_address():
    """Ray with more CPUs than the tests have actors, of RAY_ADDRESS or its own; its address, for other drivers."""
    ray = pytest.importorskip("ray")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_prestart_worker_first_driver="0")
    own = {"address": "local", "num_cpus": 6, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    context = ray.init(**({} if "RAY_ADDRESS" in os.environ else own), logging_level="error")
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def image() -> Image.Image:
    """Eight by six orange pixels."""
    return Image.new("RGB", (8, 6), (200, 100, 0))


@pytest.fixture
def tiny_inputs() -> dict[str, torch.Tensor]:
    """Four random pairs: `input_ids`, `attention_mask` (4, 7), padded on the right; `pixel_values` (4, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    attention_mask = torch.ones(4, 7, dtype=torch.long)
    attention_mask[1, 5:] = 0
    attention_mask[3, 2:] = 0
    input_ids = torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (4, 7), generator=generator)
    return {
        "input_ids": input_ids * attention_mask,  # [PAD] is 0
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    }


@pytest.fixture
def tiny_masked_inputs(tiny_inputs) -> dict[str, torch.Tensor]:
    """`tiny_inputs` with all that `COTSForPreTraining` takes for its masked passes; rows differ in what is masked."""
    generator = torch.Generator().manual_seed(1)
    masked_token_pos = (torch.rand(4, 7, generator=generator) < 0.4) & tiny_inputs["attention_mask"].bool()
    mask_id = SPECIAL_TOKENS.index("[MASK]")
    return {
        **tiny_inputs,
        "bool_masked_pos": torch.rand(4, (IMAGE_SIZE // PATCH_SIZE) ** 2, generator=generator) < 0.4,
        "masked_input_ids": tiny_inputs["input_ids"].masked_fill(masked_token_pos, mask_id),
        "masked_token_pos": masked_token_pos,
    }


@pytest.fixture
def make_trainer(tiny_config, tiny_processor, tmp_path):
    """A function that builds a COTSTrainer on 24 small scenes; keywords replace arguments or parts."""
    from modeling_cots import COTSForPreTraining, COTSTrainer, COTSTrainingArguments, ImageTokenizer, ScenesDataset

    def make(config=None, train_dataset=None, eval_dataset=None, image_tokenizer="random", **arguments) -> COTSTrainer:
        config = tiny_config if config is None else config
        image_processor = tiny_processor.image_processor
        if image_tokenizer == "random":
            image_tokenizer = ImageTokenizer.random(
                config.image_vocab_size, image_processor.image_mean, image_processor.image_std
            )
        torch.manual_seed(0)
        return COTSTrainer(
            model=COTSForPreTraining(config),
            args=COTSTrainingArguments(
                **{
                    "output_dir": str(tmp_path / "run"),
                    "per_device_train_batch_size": 8,
                    "max_steps": 3,
                    "lr_hold_epochs": 0,
                    "learning_rate": 1e-3,
                    "queue_size": 20,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "disable_tqdm": True,
                    "use_cpu": True,
                    **arguments,
                }
            ),
            train_dataset=ScenesDataset("train", 24, IMAGE_SIZE) if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_processor,
            image_tokenizer=image_tokenizer,
            max_text_length=24,
        )

    return make
