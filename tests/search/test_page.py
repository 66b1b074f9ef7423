"""The page of results: all text is escaped, nothing is loaded, and every image has a description."""

from html.parser import HTMLParser

from modeling_cots.search.page import results_page

NASTY = "\"><script>alert('x')</script> & \udcff"
THUMBNAIL = {"bytes": b"\xff\xd8jpeg", "path": None}


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_everything_is_escaped_and_nothing_is_loaded():
    hits = [{"name": f"set: {NASTY}", "captions": [NASTY], "thumbnail": THUMBNAIL, "score": 0.5}]
    page = results_page(NASTY, hits, NASTY)
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert "script" not in tags and "link" not in tags
    assert [attributes["src"].partition(":")[0] for tag, attributes in reader.tags if tag == "img"] == ["data"]
    assert "alert('x')" in reader.text  # shown as text
    page.encode("utf-8")


def test_images_are_described_and_files_are_linked(tmp_path):
    image = tmp_path / "a b&c.jpg"
    image.write_bytes(b"")
    hits = [
        {"name": str(image), "captions": [], "thumbnail": THUMBNAIL, "score": 0.9},
        {"name": "/not/there.jpg", "captions": ["a dog"], "thumbnail": THUMBNAIL, "score": 0.8},
        {"name": "x: 3", "captions": [], "thumbnail": None, "score": 0.1},
    ]
    reader = Reader(results_page("dogs", hits, "3 of 9"))
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == ["a b&c.jpg", "a dog"]
    assert [attributes["href"] for tag, attributes in reader.tags if tag == "a"] == [image.as_uri()]
    assert dict(reader.tags)["html"] == {"lang": "en"}
    assert ("ol", {"aria-label": "Images, best first"}) in reader.tags
    assert "1. 0.900" in reader.text and "3 of 9" in reader.text
    assert "Nothing fits." in results_page("dogs", [])
