"""One reader for every format: whole and streamed give the same pairs, and damage costs its own row."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_writers import IMAGES, NAMES, png, write_images, write_parquet, write_tar

from modeling_cots.data.formats import MAX_CSV_LINES, read_rows
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.rows import BadRowError, image_columns
from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.image_reading_cots import UnreadableImageError, read_image


def rows_of(content: bytes, suffix: str) -> list[dict | str]:
    """Rows, and of refused ones the reason."""
    return [
        str(row) if isinstance(row, BadRowError) else row
        for _, row in read_rows(io.BytesIO(content), suffix, image_columns(), with_others=True)
    ]


def whole_and_streamed(dataset) -> tuple[list, list]:
    """The captions of what both ways of opening give, as far as its image can be read."""

    def captions(items) -> list:
        readable = []
        for item in items:
            try:
                read_image(item["image"])
            except UnreadableImageError:
                continue
            readable.append(item["captions"])
        return readable

    return captions(open_pairs(str(dataset), "train")), captions(open_stream(str(dataset), "train", shuffle_buffer=0))


def sample(number: int, **members: bytes) -> dict[str, bytes]:
    members = members or {"png": png(number), "txt": f"thing {number}".encode()}
    return {f"{number:03d}.{name}": content for name, content in members.items()}


NUMPY = io.BytesIO()
np.save(NUMPY, np.array([{"a": 1}], dtype=object), allow_pickle=True)
ODD_SAMPLES = {
    "no caption": {"png": png(9)},
    "no image": {"txt": b"gone"},
    "another format": {"webp": png(9), "txt": b"x"},
    "upper case": {"PNG": png(9), "TXT": b"x"},
    "no UTF-8": {"png": png(9), "txt": b"caf\xe9"},
    "empty": {"png": b"", "txt": b""},
    "a number": {"png": png(9), "json": b'{"caption": 7}'},
    "json of another kind": {"png": png(9), "json": b'["x", 5, null]'},
    "brackets": {"png": png(9), "json": b"[" * 100_000},
    "numpy": {"png": png(9), "txt": b"x", "npy": NUMPY.getvalue(), "npz": b"no archive"},
    "pickles": {"png": png(9), "txt": b"x", "pth": b"no model", "pyd": b"cos\nsystem\n(S'false'\ntR."},
    "cbor": {"png": png(9), "txt": b"x", "cbor": b"\xff", "mp": b"\xc1", "ten": b"no", "cls": b"many"},
}


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("name", ODD_SAMPLES)
def test_an_odd_sample_of_a_shard_costs_itself_at_most(tmp_path, name, place):
    members = {}
    for number in range(8):
        members |= sample(number, **(ODD_SAMPLES[name] if number == place else {}))
    write_tar(tmp_path / "a.tar", members)
    whole, streamed = whole_and_streamed(tmp_path / "a.tar")
    assert whole == streamed and len(whole) >= 7
    is_usable = name in ("another format", "upper case", "json of another kind", "numpy", "pickles", "cbor")
    assert len(whole) == 7 + is_usable


@pytest.mark.parametrize("suffix", ["tar", "parquet", "jsonl", "json", "csv"])
def test_every_format_is_read_both_ways(tmp_path, suffix):
    write_images(tmp_path)
    file = tmp_path / f"pairs.{suffix}"
    rows = [{"image": name, "caption": f"of {name}"} for name in NAMES]
    if suffix == "tar":
        write_tar(file, {f"{n}.{k}": c for n, i in enumerate(IMAGES) for k, c in (("png", i), ("txt", b"of"))})
    elif suffix == "parquet":
        write_parquet(file, {"image": IMAGES, "caption": [row["caption"] for row in rows]})
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        lines = [json.dumps(row) if suffix == "jsonl" else ",".join(row.values()) for row in rows]
        file.write_text("\n".join(lines if suffix == "jsonl" else ["image,caption", *lines]))
    whole, streamed = whole_and_streamed(file)
    assert whole == streamed and len(whole) == 3


def test_a_cut_shard_gives_both_ways_what_is_sound(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr("modeling_cots.data.tables.logger.warning", messages.append)
    write_tar(tmp_path / "a.tar", {k: v for n in range(6) for k, v in sample(n).items()})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: content.index(b"004.png")])
    write_tar(tmp_path / "b.tar", sample(8))
    whole, streamed = whole_and_streamed(tmp_path)
    assert whole == streamed == [["thing 0"], ["thing 1"], ["thing 2"], ["thing 8"]]
    assert len(messages) == 1 and "it cannot be read beyond its first 3 rows (DamagedShardError" in messages[0]


def test_rows_of_failed_downloads_are_left_out_and_counted(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr("modeling_cots.data.tables.logger.warning", messages.append)
    images = [IMAGES[0], None, IMAGES[1], None, IMAGES[2]]
    write_parquet(tmp_path / "00000.parquet", {"jpg": images, "caption": list("abcde"), "status": ["x"] * 5})
    whole, streamed = whole_and_streamed(tmp_path)
    assert whole == streamed == [["a"], ["c"], ["e"]]
    assert messages[0].startswith("2 of 5 rows of") and "in 'jpg': 00000.parquet/1, 00000.parquet/3." in messages[0]


# Columns that nobody uses


def test_a_column_that_is_not_used_may_hold_anything(tmp_path):
    write_images(tmp_path)
    odd = [2000, "unknown", None, 10**30, 1.5, [1, "a"], {"x": 1}, True, float("nan")]
    lines = [json.dumps({"image": NAMES[n % 3], "caption": f"{n}", "year": value}) for n, value in enumerate(odd)]
    lines.append('{"image": "a.png", "caption": "huge", "year": ' + "9" * 5000 + "}")
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = open_pairs(str(tmp_path / "pairs.jsonl"), "train")
    assert sorted(c for item in pairs for c in item["captions"]) == sorted([*map(str, range(9)), "huge"])


def test_a_parquet_cell_that_python_cannot_hold_costs_itself(tmp_path):
    text = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc"))
    table = {"image": IMAGES, "caption": ["x", "y", "z"], "note": text}
    write_parquet(tmp_path / "a.parquet", table)
    assert len(open_pairs(str(tmp_path / "a.parquet"), "train")) == 3
    write_parquet(tmp_path / "b.parquet", {**table, "caption": text})
    whole, streamed = whole_and_streamed(tmp_path / "b.parquet")
    assert whole == streamed == [["a"], ["c"]]


def test_shards_whose_columns_differ_are_one_data_set(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": IMAGES[:1], "caption": ["x"], "n": [1]})
    write_parquet(tmp_path / "b.parquet", {"image": IMAGES[1:2], "caption": [["y", "z"]], "n": ["one"]})
    write_parquet(tmp_path / "c.parquet", {"date": [1, 2], "amount": [3, 4]})
    assert [item["captions"] for item in open_pairs(str(tmp_path), "train")] == [["x"], ["y", "z"]]


# csv


def csv_rows(text: str | bytes) -> list:
    return rows_of(text if isinstance(text, bytes) else text.encode(), ".csv")


def test_csv_cells_with_line_breaks_commas_and_quotes():
    rows = csv_rows('\ufeffimage,caption\r\na,"x, ""y""\nz"\r\n\r\nb,\r\nc\r\n')
    assert rows == [{"image": "a", "caption": 'x, "y"\nz'}, {"image": "b", "caption": ""}, {"image": "c"}]


@pytest.mark.parametrize("num_after", [1, MAX_CSV_LINES, 3 * MAX_CSV_LINES])
def test_a_quotation_mark_that_is_never_closed_costs_its_line(num_after):
    rows = csv_rows('image,caption\na,x\nb,"never closed\n' + "".join(f"c{n},y\n" for n in range(num_after)))
    assert rows[0] == {"image": "a", "caption": "x"} and rows[1].startswith("its line is no csv")
    assert [row["image"] for row in rows[2:]] == [f"c{n}" for n in range(num_after)]


def test_a_huge_cell_one_comma_too_many_and_bytes_that_are_no_utf8():
    huge = "x" * 1_000_000
    rows = csv_rows(b"image,caption,note\na,x,%b\nb,one, two,\nc,caf\xe9,\n\xe9.png,y,\n" % huge.encode())
    assert rows[0]["note"] == huge and rows[1] == "it has 4 cells for 3 columns: quote commas"
    assert rows[2]["caption"] == b"caf\xe9" and rows[3]["image"] == "\udce9.png"


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_named(tmp_path, separator):
    (tmp_path / "a.csv").write_text(f"image{separator}caption\na.png{separator}x\n")
    with pytest.raises(ValueError, match="separated by .*: write the file again with commas"):
        open_pairs(str(tmp_path / "a.csv"), "train")


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    name = b"caf\xe9.png"
    with open(bytes(tmp_path) + b"/" + name, "wb") as file:
        file.write(IMAGES[0])
    (tmp_path / "pairs.csv").write_bytes(b"image,caption\n" + name + b",x\n")
    (pair,) = open_pairs(str(tmp_path / "pairs.csv"), "train")
    assert read_image(pair["image"]).size == (4, 4) and pair["name"] == "caf\\udce9.png"
    assert len(list(open_stream(str(tmp_path / "pairs.csv"), "train"))) == 1


# JSON


def test_bad_lines_cost_themselves():
    rows = rows_of(b'{"image": "a"}\n\n{bad\n[1]\n\xff\n' + b"[" * 100_000 + b'\n{"image": "b"}', ".jsonl")
    assert [row for row in rows if isinstance(row, dict)] == [{"image": "a"}, {"image": "b"}]
    assert [row for row in rows if isinstance(row, str)] == [
        "its line is no JSON (JSONDecodeError)",
        "it holds a list of 1 and no object",
        "its line is no JSON (UnicodeDecodeError)",
        "its line is no JSON (RecursionError)",
    ]


@pytest.mark.parametrize(
    "content",
    ['[{"image": "a"}, {"image": "b"}]', '{"image": ["a", "b"]}', '{"image": "a"}\n{"image": "b"}\n'],
)
def test_a_json_file_is_an_array_columns_or_lines(content):
    assert rows_of(content.encode(), ".json") == [{"image": "a"}, {"image": "b"}]


def test_a_json_file_of_brackets_is_refused():
    with pytest.raises(BadRowError, match="too many brackets"):
        rows_of(b"[" * 100_000, ".json")


def test_an_unknown_ending_is_refused():
    with pytest.raises(BadRowError, match="ends in '.gz', and in none of .parquet"):
        rows_of(b"", ".gz")


def test_only_wanted_columns_of_parquet_are_read():
    file = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGES, "year": [1, 2, 3], "mask": IMAGES, "boxes": [[1]] * 3}), file)
    assert set(rows_of(file.getvalue(), ".parquet")[0]) == {"image", "year"}
    (_, row), *_ = read_rows(file, ".parquet", image_columns())
    assert set(row) == {"image"}
