"""What several processes share before they train."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_cots.training.processes import share_weights_


@pytest.fixture
def group(tmp_path):
    """A group of one process, to which everything is sent that would go to others."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield SimpleNamespace(world_size=2, device=torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_weights_of_every_kind_are_shared_or_left(group):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight  # tied
    model[0].weight.data = model[0].weight.data.T  # in another order of memory
    for name in ("int16", "float8_e4m3fn", "bool", "bfloat16"):
        model.register_buffer(f"of_{name}", torch.ones(2).to(getattr(torch, name)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share_weights_(model, group)
    assert all(torch.equal(tensor.float(), before[name].float()) for name, tensor in model.state_dict().items())
