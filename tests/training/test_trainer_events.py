"""What happens at the moments of the training loop: epochs reach data and sampler, streams are resumed."""

import shutil

import pytest
import torch
from torch.utils.data import IterableDataset

from modeling_cots import ScenesDataset

ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}


class Stream(IterableDataset):
    """Items as a data set of pairs gives them, without a length."""

    def __init__(self, num_images: int):
        self.scenes = ScenesDataset("train", num_images, 32)

    def __iter__(self):
        for index in range(len(self.scenes)):
            yield self.scenes[index]


class Noting(ScenesDataset):
    """Notes the epoch and the number of every item that is asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.epoch, self.asked = None, []

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        self.asked.append((self.epoch, index))
        return super().__getitem__(index)


def test_every_epoch_has_its_number_and_its_order(make_trainer):
    dataset = Noting("train", 12, 32)
    make_trainer(train_dataset=dataset, per_device_train_batch_size=4, num_train_epochs=2, max_steps=-1).train()
    orders = [[index for epoch, index in dataset.asked if epoch == number] for number in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]


def test_a_stream_goes_on_where_it_stopped(make_trainer, tmp_path):
    whole = make_trainer(train_dataset=Stream(40), **ARGUMENTS)
    whole.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "other" / "checkpoint-2")
    resumed = make_trainer(train_dataset=Stream(40), **ARGUMENTS, output_dir=str(tmp_path / "other"))
    resumed.train("latest")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert torch.equal(whole.queue.pair_ids, resumed.queue.pair_ids)
    assert [entry["loss"] for entry in whole.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in resumed.state.log_history if "loss" in entry
    ]


def test_a_stream_that_ended_before_is_not_begun_again_in_silence(make_trainer):
    """8 images are 2 batches: the third step is of a second pass, into which the Trainer cannot find back."""
    make_trainer(train_dataset=Stream(8), **ARGUMENTS).train()
    with pytest.raises(ValueError, match="stream ended before the batch after step 4"):
        make_trainer(train_dataset=Stream(8), **{**ARGUMENTS, "max_steps": 6}).train("latest")
