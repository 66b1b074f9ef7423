"""Our tar reader against `tarfile`, and on every kind of damage and malice."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_files import sample_members, shard_bytes, tar_bytes

from modeling_cots.data.streaming import tar
from modeling_cots.data.streaming.tar import DamagedShardError, gather_samples, key_of, read_members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
FIELDS = {"png", "txt"}


class OneWay(io.RawIOBase):
    """A stream that cannot seek and hands out a few bytes at a time, as a socket does; it counts what it gave."""

    def __init__(self, content: bytes, piece: int = 700):
        self.rest, self.piece, self.given = content, piece, 0

    def read(self, size: int = -1) -> bytes:
        part = self.rest[: min(size, self.piece)]
        self.rest = self.rest[len(part) :]
        self.given += len(part)
        return part


def read_samples(stream, fields):
    """The samples with these fields, as streams read them."""
    return gather_samples(read_members(stream, lambda name: key_of(name)[1] in fields))


def samples_of(content: bytes) -> tuple[list[str], list[tuple[str, str]], str | None]:
    """Keys of the samples, refused names with their reasons, and why the shard broke off."""
    keys, refused, damage = [], [], None
    try:
        for sample, members in read_samples(OneWay(content), FIELDS):
            refused += [(member.name, member.refusal) for member in members]
            keys += [sample["__key__"]] if sample else []
    except DamagedShardError as error:
        damage = str(error)
    return keys, refused, damage


@pytest.mark.parametrize("format", FORMATS)
@given(
    members=st.lists(
        st.tuples(
            st.text("abé/_-", min_size=1, max_size=90).map(lambda name: f"x{name}.jpg"),
            st.integers(0, 3000).map(lambda size: b"\0" * size),
        ),
        max_size=6,
    )
)
@settings(deadline=None, max_examples=60)
def test_members_are_those_of_tarfile(format, members):
    try:
        content = tar_bytes(members, format)
    except ValueError:  # ustar has no room for such a name
        return
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(info.name, archive.extractfile(info).read()) for info in archive if info.isreg()]
    got = [(member.name, member.content) for member in read_members(OneWay(content), lambda name: True)]
    assert got == expected


def test_samples_are_neighbors_with_one_key():
    members = [
        ("./d/0001.JPG", b"1"),
        ("d/0001.txt", b"2"),
        ("d/0001.cls", b"not asked for"),
        ("d/0001.seg.jpg", b"another field"),
        ("e/0001.jpg", b"3"),
        ("e/._0001.jpg", b"of macOS"),
        ("e/0002.txt", b"4"),
    ]
    got = [sample for sample, _ in read_samples(io.BytesIO(tar_bytes(members)), {"jpg", "txt"})]
    assert got == [
        {"__key__": "d/0001", "jpg": b"1", "txt": b"2"},
        {"__key__": "e/0001", "jpg": b"3"},
        {"__key__": "e/0002", "txt": b"4"},
    ]


def test_a_second_file_of_one_name_is_refused():
    keys, refused, damage = samples_of(tar_bytes([("a.png", b"1"), ("a.PNG", b"2"), ("a.txt", b"")]))
    assert keys == ["a"] and damage is None
    assert refused == [("a.PNG", "a second file of this name in its sample")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd.png", "absolute"),
        ("../a.png", "climbs out"),
        ("a/../../b.png", "climbs out"),
        ("a\\..\\b.png", "climbs out"),
        ("C:\\a.png", "absolute"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(name, reason):
    keys, refused, damage = samples_of(tar_bytes([*sample_members(0), (name, b"x"), *sample_members(1)]))
    assert keys == ["00000", "00001"] and damage is None
    assert [each[0] for each in refused] == [name] and reason in refused[0][1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(format, type):
    link = tarfile.TarInfo("00005.png")
    link.type, link.linkname = type, "/etc/passwd" + "x" * (0 if format == tarfile.USTAR_FORMAT else 200)
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    keys, refused, damage = samples_of(
        tar_bytes([*sample_members(0), (link, b""), (folder, b""), *sample_members(1)], format)
    )
    assert keys == ["00000", "00001"] and damage is None
    assert [name for name, _ in refused] == ["00005.png"]


def test_files_too_large_to_be_images_are_passed_over_without_being_kept(monkeypatch):
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 5000)
    content = tar_bytes([("big.png", b"x" * 5001), ("big.txt", b"big"), *sample_members(1)])
    keys, refused, damage = samples_of(content)
    assert keys == ["big", "00001"] and damage is None
    assert refused == [("big.png", "of 5,001 bytes, more than the 5,000 that one file may have")]


def test_every_cut_is_noticed_and_costs_no_earlier_sample():
    """Also between two members, where `tarfile` sees nothing wrong."""
    content = shard_bytes(range(3))
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    starts = [content.index(f"{number:05d}.png".encode()) for number in range(3)] + [end]
    for length in range(0, end, 128):
        keys, refused, damage = samples_of(content[:length])
        assert damage == "it ends too early" and not refused
        num_whole = max(0, sum(start < length for start in starts) - 2)
        assert [f"{number:05d}" for number in range(num_whole)] == keys[:num_whole]
    assert samples_of(content[: end + 512]) == (["00000", "00001", "00002"], [], None)


@given(st.lists(st.tuples(st.integers(0, 6143), st.binary(min_size=1, max_size=12)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=300)
def test_mutated_shards_end_in_samples_refusals_or_damage(changes):
    content = bytearray(shard_bytes(range(3)))
    for place, written in changes:
        content[place : place + len(written)] = written
    stream = OneWay(bytes(content), 10_000)
    try:
        for sample, _ in read_samples(stream, FIELDS):
            assert all(len(value) <= len(content) for value in sample.values())
    except DamagedShardError:
        pass
    assert stream.given <= len(content)


@given(st.binary(max_size=3000))
@settings(deadline=None, max_examples=200)
def test_what_is_no_archive_is_damage(content):
    if not content.startswith(b"\0" * 512):
        assert samples_of(content)[2] is not None


def header(name: str, size: int, type: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, type
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "content",
    [
        header("x", 10**12, tarfile.XHDTYPE),
        header("x", 10**12, tarfile.GNUTYPE_LONGNAME),
        header("x", 10**12, tarfile.XGLTYPE),
        header("x.png", -512, tarfile.REGTYPE),
        header("x", 20, tarfile.XHDTYPE) + b"99999 path=a\n".ljust(512, b"\0"),
        header("x", 20, tarfile.XHDTYPE) + b"0 path=a".ljust(512, b"\0"),
        header("x", 11, tarfile.XHDTYPE) + b"11 size=99\n".ljust(512, b"\0"),
        header("x.png", 10**12, tarfile.REGTYPE) + b"short",
    ],
)
def test_headers_that_lie_about_sizes_cost_no_memory(content):
    stream = OneWay(content)
    with pytest.raises(DamagedShardError):
        list(read_samples(stream, FIELDS))
    assert stream.given <= len(content)


def test_compressed_archives_are_not_unpacked():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    assert samples_of(file.getvalue().ljust(512, b"\1"))[2].startswith("no tar archive from here on")
