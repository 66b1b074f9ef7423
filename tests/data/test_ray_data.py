"""`map_to_parquet`: what it refuses before Ray is started, and what an actor refuses."""

from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")

from modeling_cots.data.ray_data import map_to_parquet  # noqa: E402
from modeling_cots.data.ray_parts import numbered_parts  # noqa: E402
from modeling_cots.search.embedding import row_ids_of  # noqa: E402


def run(output: str = "out", checkpoint: str = "noted"):
    """A run of an actor that refuses to be made."""
    return map_to_parquet(
        numbered_parts(["a"], row_ids_of),
        partial(int, "x"),
        output=output,
        checkpoint=checkpoint,
        metadata=(b"made", {"by": "us"}),
        num_actors=1,
        gpus_per_actor=0,
        cpus_per_actor=1,
        rows_per_call=1,
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out", "noted"):
        (tmp_path / name).mkdir()
    return tmp_path


def write(path: str, metadata: dict) -> None:
    pq.write_table(pa.table({"row_id": ["a"]}).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("written", "noted", "message"),
    [
        ({b"made": b'{"by": "us"}'}, False, "'.*noted' knows of none: name the checkpoint"),
        (None, True, "'.*noted' is of rows that are not in '.*out'"),
        ({b"made": b'{"by": "them"}'}, True, "by another command, or with another model"),
        ({}, True, "by another command, or with another model"),
    ],
)
def test_output_and_checkpoint_belong_together(written, noted, message):
    if written is not None:
        write("out/0.parquet", written)
    if noted:
        write("noted/0.parquet", {})
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize("checkpoint", ["out", "out/noted"])
def test_a_checkpoint_in_the_output_is_refused(checkpoint):
    """Ray would take it for files of the output."""
    with pytest.raises(ValueError, match="--checkpoint must be outside of --output"):
        run(checkpoint=checkpoint)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="nowhere://out cannot be written to"):
        run(output="nowhere://out")


@pytest.mark.slow
def test_what_an_actor_refuses_is_one_sentence(ray_address):
    with pytest.raises(ValueError, match="^invalid literal for int.* 'x'$"):
        run()
