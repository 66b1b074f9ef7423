"""`read_video` on real files of many forms: the frames asked for, and no others, or one clear error."""

import io
import os
import random
import tracemalloc

import av
import numpy as np
import pytest
from PIL import Image
from transformers.dynamic_module_utils import get_imports
from video_files import numbers_of, write_audio, write_video

from modeling_cots import video_reading_cots
from modeling_cots.image_reading_cots import MAX_IMAGE_SIDE
from modeling_cots.video_reading_cots import UnreadableVideoError, read_video

FORMS = [
    ("a.mp4", None),
    ("a.mp4", "mpeg4"),
    ("a.mov", None),
    ("a.mkv", None),
    ("a.webm", "libvpx"),
    ("a.webm", "libvpx-vp9"),
    ("a.avi", "mpeg4"),
    ("a.avi", "libx264"),
    ("a.ts", None),
]


def take(*indices: int):
    """A sampling function that always asks for the same positions."""
    return lambda metadata: np.array(indices)


@pytest.fixture
def num_decoded(monkeypatch) -> list[int]:
    """Gets one entry for each frame that is decoded."""
    decoded, plain = [], video_reading_cots._decoded

    def counting(*args):
        for item in plain(*args):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video_reading_cots, "_decoded", counting)
    return decoded


@pytest.mark.parametrize(("name", "codec"), FORMS)
def test_any_positions_in_any_order_are_those_of_a_full_decoding(tmp_path, name, codec):
    path = write_video(tmp_path / name, range(40), codec=codec)
    with av.open(path) as container:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert numbers_of(everything) == list(range(40))
    rng = random.Random(0)
    for count in (1, 2, 5, 16, 60):
        indices = [rng.randrange(40) for _ in range(count)]
        frames, metadata = read_video(path, take(*indices))
        assert frames.dtype == np.uint8 and frames.shape == (count, 48, 64, 3)
        np.testing.assert_array_equal(frames, everything[indices])
        assert list(metadata.frames_indices) == indices


@pytest.mark.parametrize(("name", "codec"), FORMS)
def test_all_frames_and_what_is_known_of_them(tmp_path, name, codec):
    frames, metadata = read_video(write_video(tmp_path / name, range(20), codec=codec))
    assert numbers_of(frames) == list(range(20))
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (20, 48, 64)
    assert metadata.fps == pytest.approx(10) and metadata.duration == pytest.approx(2)
    assert metadata.video_backend == "pyav"


def test_a_webm_file_whose_header_tells_no_number_of_frames(tmp_path):
    """As browsers record them: no index, no duration."""
    path = write_video(tmp_path / "live.webm", range(30), codec="libvpx", options={"live": "1"})
    with av.open(path) as container:
        assert container.streams.video[0].frames == 0 and container.duration is None
    frames, metadata = read_video(path, take(29, 3, 17))
    assert metadata.total_num_frames == 30 and numbers_of(frames) == [29, 3, 17]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_variable_frame_rate_changes_nothing(tmp_path, name):
    """Fifteen frames in the first 0.3 seconds, then one a second."""
    times = [20 * number for number in range(15)] + [1000 * number for number in range(1, 16)]
    frames, metadata = read_video(write_video(tmp_path / name, range(30), times=times), take(*range(0, 30, 3)))
    assert metadata.total_num_frames == 30 and numbers_of(frames) == list(range(0, 30, 3))


def test_the_number_of_frames_is_counted_where_the_file_was_cut_off(tmp_path):
    path = tmp_path / "a.webm"
    whole = write_video(path, range(40), codec="libvpx", size=(96, 128))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, metadata = read_video(whole, lambda metadata: np.arange(metadata.total_num_frames))
    assert 5 < metadata.total_num_frames < 35
    assert numbers_of(frames)[:-1] == list(range(len(frames) - 1))  # the last may itself be cut off


def test_only_the_frames_asked_for_are_kept(tmp_path):
    """4 of 200 frames: little more than these are in memory at once, and the file is not."""
    path = write_video(tmp_path / "long.mp4", [number % 40 for number in range(200)], size=(240, 320))
    frame_bytes = 240 * 320 * 3
    read_video(path, take(0))  # imports are not to be counted
    tracemalloc.start()
    frames, _ = read_video(path, take(10, 60, 110, 190))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers_of(frames) == [10, 20, 30, 30]
    assert peak < 2 * 4 * frame_bytes + 2 * frame_bytes


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_decoding_starts_at_the_key_frame_before(tmp_path, name, num_decoded):
    """Key frames are 8 frames apart, so two frames of 200 need no more than two groups each."""
    path = write_video(tmp_path / name, [number % 40 for number in range(200)])
    frames, _ = read_video(path, take(100, 199))
    assert numbers_of(frames) == [20, 39]
    assert len(num_decoded) <= 2 * 2 * 8


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_no_frame_is_decoded_twice(tmp_path, name, num_decoded):
    read_video(write_video(tmp_path / name, range(40)))
    assert len(num_decoded) == 40


def test_decoding_ends_with_the_last_frame_asked_for(tmp_path, num_decoded):
    read_video(write_video(tmp_path / "a.avi", range(40)), take(2, 5))
    assert len(num_decoded) == 6


def damaged(path, seed: int) -> None:
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(rng.randint(1, 40)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content if seed % 3 else content[: rng.randrange(len(content))])


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi"])
def test_damage_gives_frames_or_the_one_error(tmp_path, name):
    path = tmp_path / name
    write_video(path, range(24))
    whole, num_read = path.read_bytes(), 0
    for seed in range(40):
        path.write_bytes(whole)
        damaged(path, seed)
        try:
            frames, _ = read_video(str(path), take(0, 5, 11, 23))
        except UnreadableVideoError:
            continue
        assert len(frames) == 4 and frames.ndim == 4 and frames.shape[-1] == 3
        num_read += 1
    assert 0 < num_read < 40


def test_a_damaged_frame_is_replaced_by_a_later_one(tmp_path):
    """Frames 8 to 15 of an mpeg4 file are overwritten with zeros: key frames, and so decoding, begin anew at 16."""
    path = tmp_path / "a.mp4"
    write_video(path, range(30), codec="mpeg4")
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[8:16]:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    frames, metadata = read_video(str(path), take(3, 10, 20))
    numbers = numbers_of(frames)
    assert metadata.total_num_frames == 30 and (numbers[0], numbers[2]) == (3, 20) and 10 < numbers[1] <= 17


def unreadable_files(folder) -> dict[str, str]:
    """One file of every kind that holds no image."""
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video" * 100)
    (folder / "folder.mp4").mkdir()
    cut_off = folder / "cut_off.mp4"  # the index of an mp4 file stands at its end
    write_video(cut_off, range(10))
    cut_off.write_bytes(cut_off.read_bytes()[: cut_off.stat().st_size // 2])
    cover = io.BytesIO()
    Image.new("RGB", (16, 16)).save(cover, "JPEG")
    for name in ("no_frames.mp4", "no_frames.avi", "no_frames.webm"):
        write_video(folder / name, [])
    return {
        "missing": str(folder / "missing.mp4"),
        "audio": write_audio(folder / "audio.mp3"),
        "audio with a cover": write_audio(folder / "cover.mp3", cover.getvalue()),
        **{path.stem + path.suffix: str(path) for path in sorted(folder.glob("*.*")) if path.suffix != ".mp3"},
    }


def test_files_without_a_image_raise_the_one_error(tmp_path):
    files = unreadable_files(tmp_path)
    assert len(files) == 10
    for kind, path in files.items():
        with pytest.raises(UnreadableVideoError) as caught:
            read_video(path, take(0))
        assert str(caught.value), kind


def test_a_cover_is_what_the_music_file_has_as_its_video(tmp_path):
    """Or the refusal above would be for another reason."""
    cover = io.BytesIO()
    Image.new("RGB", (16, 16)).save(cover, "JPEG")
    with av.open(write_audio(tmp_path / "cover.mp3", cover.getvalue())) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(UnreadableVideoError, match="no video stream"):
        read_video(str(tmp_path / "cover.mp3"))


def test_video_with_sound_is_read(tmp_path):
    path = str(tmp_path / "sound.mkv")
    with av.open(path, "w") as container:
        sound, images = container.add_stream("mp3", rate=44100), container.add_stream("libx264", rate=10)
        images.height, images.width, images.pix_fmt = 48, 64, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        silence.sample_rate = 44100
        for stream, frames in (
            (sound, [silence]),
            (images, [av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, np.uint8)) for i in range(8)]),
        ):
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    assert numbers_of(read_video(path, take(0, 7, 7))[0]) == [0, 7, 7]


def test_videos_filmed_upright_are_turned(tmp_path):
    """A phone writes its images lying, and a matrix into the mp4 file's track header that says so.

    With (x, y) -> (-y, x) the left half of a lying image, here the white one, becomes the upper half.
    """
    path, image = tmp_path / "a.mp4", np.zeros((48, 64, 3), np.uint8)
    image[:, :32] = 255
    write_video(path, [image])
    content = path.read_bytes()
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    quarter_turn = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    header = content.index(b"tkhd")
    path.write_bytes(content[:header] + content[header:].replace(identity, quarter_turn, 1))
    frames, _ = read_video(str(path))
    assert frames.shape == (1, 64, 48, 3)
    assert frames[0, :30].min() > 240 and frames[0, 34:].max() < 15


def test_a_stream_that_changes_its_size_keeps_the_first(tmp_path):
    parts = [tmp_path / "one.ts", tmp_path / "two.ts"]
    write_video(parts[0], range(10))
    write_video(parts[1], range(10, 20), size=(96, 80))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames, _ = read_video(str(joined), take(0, 19))
    assert frames.shape == (2, 48, 64, 3) and numbers_of(frames) == [0, 19]


def test_frames_beyond_any_camera_are_refused_before_they_are_decoded(tmp_path, num_decoded, monkeypatch):
    path = write_video(tmp_path / "a.mp4", range(3))
    monkeypatch.setattr(video_reading_cots, "MAX_FRAME_PIXELS", 48 * 64 - 1)
    with pytest.raises(UnreadableVideoError, match="64 x 48 pixels, above the limit"):
        read_video(path)
    assert not num_decoded
    monkeypatch.setattr(video_reading_cots, "MAX_FRAME_PIXELS", 48 * 64)
    assert len(read_video(path)[0]) == 3


@pytest.mark.parametrize("size", [(MAX_IMAGE_SIDE + 1, 16), (16, MAX_IMAGE_SIDE + 1)])
def test_thin_frames_are_refused_before_they_are_decoded(tmp_path, num_decoded, size):
    """Few pixels, of which a resize to 384 x 384 would first make 384 x 65,536, for each of 16 frames."""
    path = write_video(tmp_path / "a.mkv", [0], codec="ffv1", size=size)
    with pytest.raises(UnreadableVideoError, match=f"{size[1]} x {size[0]} pixels, above the limit"):
        read_video(path)
    assert not num_decoded


def test_frames_are_measured_too_where_the_file_claims_another_size(tmp_path, monkeypatch):
    parts = [tmp_path / "one.ts", tmp_path / "two.ts"]
    write_video(parts[0], range(10))
    write_video(parts[1], range(10, 20), size=(96, 80))
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    monkeypatch.setattr(video_reading_cots, "MAX_FRAME_PIXELS", 96 * 80 - 1)
    with pytest.raises(UnreadableVideoError, match="80 x 96 pixels, above the limit"):
        read_video(str(tmp_path / "joined.ts"), take(0, 19))


def test_errors_of_the_sampling_function_stay_what_they_are(tmp_path):
    def refuse(metadata):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read_video(write_video(tmp_path / "a.mp4", range(3)), refuse)


def test_a_downloaded_model_does_not_need_pyav():
    """transformers refuses to load code of the Hub whose imports are not installed, but for guarded ones."""
    assert "av" not in get_imports(video_reading_cots.__file__)


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.txt", "list.mpd", "list.sdp", "list.ffconcat"])
@pytest.mark.parametrize("scheme", ["", "file:", "file://", "concat:", "http://127.0.0.1:9/"])
def test_a_file_that_names_other_files_opens_none(tmp_path, name, scheme):
    """Playlists, lists of files and descriptions of streams, also under the name of a video."""
    write_video(tmp_path / "secret.mp4", range(8))
    secret = f"{scheme}{tmp_path / 'secret.mp4'}" if scheme else "secret.mp4"
    contents = [
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{secret}</BaseURL></MPD>',
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    ]
    for content in contents:
        (tmp_path / name).write_text(content)
        with pytest.raises(UnreadableVideoError):
            read_video(str(tmp_path / name))


def test_names_that_ffmpeg_takes_for_protocols_or_patterns_are_plain_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", range(8))
    for name in ("concat:a.mp4", "file:a.mp4", "subfile,,start,0,end,0,,:a.mp4", "pipe:0", "http://127.0.0.1:9/a.mp4"):
        with pytest.raises(UnreadableVideoError, match="FileNotFoundError"):
            read_video(name)
    os.mkfifo("pipe.mp4")
    for name in ("pipe.mp4", "."):
        with pytest.raises(UnreadableVideoError, match="no plain file"):
            read_video(name)
