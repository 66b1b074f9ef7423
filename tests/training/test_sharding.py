"""What cannot be split among processes is refused; real runs that are split: test_sharded_runs.py."""

import pytest
import torch

from modeling_cots import COTSTrainingArguments
from modeling_cots.training.sharding import check_shardable, check_sharding, check_shards


def arguments(tmp_path, **options) -> COTSTrainingArguments:
    return COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"fp16": True},
        {"torch_compile": True},
        {"feature_cache": "features", "freeze_text": "all"},
        {"save_on_each_node": True},
        {"ddp_bucket_cap_mb": 10},
        {"optim": "adafactor"},
        {"param_dtype": "bfloat16"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refuses_arguments_that_it_does_not_go_together_with(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* cannot be used with shard_model"):
        arguments(tmp_path, shard_model=True, **options)


def test_replicas_belong_to_a_model_that_is_split(tmp_path):
    with pytest.raises(ValueError, match="shard_replicas belongs to shard_model"):
        arguments(tmp_path, shard_replicas=2)
    with pytest.raises(ValueError, match="shard_replicas must be at least 1, got 0"):
        arguments(tmp_path, shard_model=True, shard_replicas=0)


@pytest.mark.parametrize(("replicas", "count"), [(3, 8), (8, 8), (16, 8)])
def test_refuses_replicas_that_leave_nothing_to_split(tmp_path, replicas, count):
    with pytest.raises(ValueError, match=f"shard_replicas={replicas} leaves {count} processes no equal groups"):
        check_shards(arguments(tmp_path, shard_model=True, shard_replicas=replicas), count)


@pytest.mark.parametrize(("replicas", "count"), [(1, 2), (2, 8), (4, 8)])
def test_takes_replicas_that_divide_the_processes(tmp_path, replicas, count):
    check_shards(arguments(tmp_path, shard_model=True, shard_replicas=replicas), count)


def test_refuses_a_single_process(make_trainer):
    with pytest.raises(ValueError, match="among several processes, and there is only one: .*torchrun"):
        make_trainer(shard_model=True)


@pytest.mark.parametrize("name", ["model_init", "optimizers", "optimizer_cls_and_kwargs"])
def test_refuses_parts_that_know_weights_as_they_were(tmp_path, monkeypatch, name):
    args = arguments(tmp_path, shard_model=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match=f"{name} cannot be used with shard_model"):
        check_sharding(args, {name: object()})


def test_refuses_an_old_torch(tmp_path, monkeypatch):
    args = arguments(tmp_path, shard_model=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setattr("modeling_cots.training.sharding.MIN_TORCH", "99.0")
    with pytest.raises(ValueError, match="needs torch 99.0 or later, and this is 2"):
        check_sharding(args, {})


def test_refuses_adapters(make_trainer):
    model = make_trainer().model
    model.peft_config = {"default": object()}  # as peft leaves it on a model
    with pytest.raises(ValueError, match="Adapters cannot be used with shard_model"):
        check_shardable(model)


def test_refuses_encoders_without_layers_and_quantized_weights(make_trainer):
    model = make_trainer().model
    check_shardable(model)
    weight = model.cots.text_projection.weight
    model.cots.text_projection.weight = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="cots.text_projection.weight is quantized"):
        check_shardable(model)
    model.cots.vision_model.encoder = torch.nn.Identity()
    model.cots.vision_model.layers = torch.nn.Identity()
    with pytest.raises(ValueError, match="This `vit` vision encoder has no layers"):
        check_shardable(model)
