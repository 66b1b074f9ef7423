"""COTS: collaborative two-stream vision-language pre-training for cross-modal retrieval (Lu et al., CVPR 2022).

Importing this package makes the Auto classes of transformers know COTS, and `pipeline` the task
`image-text-retrieval`. Two tasks of transformers then read the images of COTS models as training does. Everything that
training needs is imported when it is first used.
"""

import importlib

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_cots import COTSConfig
from .image_processing_cots import COTSImageProcessor
from .modeling_cots import COTSModel, COTSOutput, COTSPreTrainedModel
from .modeling_cots_pretraining import COTSForPreTraining, COTSForPreTrainingOutput
from .pipeline_cots import STOCK_PIPELINES, TASK, ImageTextRetrievalPipeline, RetrievalIndex
from .processing_cots import COTSProcessor
from .video_processing_cots import COTSVideoProcessor

AutoConfig.register(COTSConfig.model_type, COTSConfig)
AutoModel.register(COTSConfig, COTSModel)
AutoModelForZeroShotImageClassification.register(COTSConfig, COTSModel)
AutoImageProcessor.register(COTSConfig, image_processor_classes={"torchvision": COTSImageProcessor})
AutoProcessor.register(COTSConfig, COTSProcessor)
AutoVideoProcessor.register(COTSConfig, COTSVideoProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=ImageTextRetrievalPipeline, pt_model=AutoModel)
for _task, _pipeline in STOCK_PIPELINES.items():  # these are those of transformers for every model that is not COTS
    PIPELINE_REGISTRY.supported_tasks[_task]["impl"] = _pipeline
COTSConfig.pipelines_are_registered = True

__version__ = "0.2.0.dev0"  # the only place that says it; pyproject.toml reads it here

_LAZY_NAMES = {
    "COTSOnnxModel": "onnx_cots",
    "COTSTrainer": "training.trainer",
    "COTSTrainingArguments": "training.arguments",
    "ImageTokenizer": "method.image_tokenizer",
    "SearchIndex": "search.index",
    "ScenesDataset": "data.scenes.still",
    "compile_layers": "training.layer_compiling",
    "export_browser_demo": "search.browser_demo",
    "export_onnx": "hub.onnx_export",
    "export_repository": "hub_export",
    "export_sentence_onnx": "hub.onnx_export",
    "export_text_encoder": "hub.standard_exports",
    "export_zero_shot_classifier": "hub.standard_exports",
    "load_clip_benchmark": "evaluation.clip_benchmark",
    "lora_config": "training.adapters",
    "open_pairs": "data.pairs",
    "push_folder": "hub_push",
}


def __getattr__(name: str):
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "COTSConfig",
    "COTSForPreTraining",
    "COTSForPreTrainingOutput",
    "COTSImageProcessor",
    "COTSModel",
    "COTSOutput",
    "COTSPreTrainedModel",
    "COTSProcessor",
    "COTSVideoProcessor",
    "ImageTextRetrievalPipeline",
    "RetrievalIndex",
    *_LAZY_NAMES,
]
