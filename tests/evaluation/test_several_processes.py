"""Evaluation that two and three real processes (gloo) share: embeddings and metrics of one process, bit for bit."""

from pathlib import Path

import pytest
import torch
from programs import TORCHRUN, run_python

RUN = Path(__file__).parents[1] / "helpers" / "evaluation_run.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone") / "found.pt", 1)


def run(output: Path, num_processes: int) -> dict:
    run_python("-m", *TORCHRUN, str(num_processes), RUN, output)
    return torch.load(output, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_equal_one_bit_for_bit(alone, tmp_path, num_processes):
    together = run(tmp_path / "found.pt", num_processes)
    assert alone.keys() == together.keys()
    for name, found in together.items():
        assert found["metrics"] == alone[name]["metrics"], name
        assert found["evaluated"] == alone[name]["evaluated"], name
        for several, one in zip(found["embeds"], alone[name]["embeds"], strict=True):
            assert torch.equal(several, one), name
    images, texts, image_ids, _ = alone["uneven"]["embeds"]
    assert image_ids.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10] and len(texts) == 25
    assert alone["uneven"]["metrics"]["test_skipped_images"] == 2
    assert alone["ties"]["metrics"]["test_t2i_recall_at_1"] == 0, "each image has two twins, which tie with it"
