"""Braces, stars and addresses."""

import pytest

from modeling_cots.data.streaming.names import display_name, expand_braces, expand_urls, is_url, public_name


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("a-{8..11}", ["a-8", "a-9", "a-10", "a-11"]),
        ("a-{00..00}", ["a-00"]),
        ("{x,y}/{1..2}", ["x/1", "x/2", "y/1", "y/2"]),
        ("{x,}", ["x", ""]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{3..1}", "runs backwards"),
        ("{}", "neither a range"),
        ("{a..c}", "neither a range"),
        ("{0..99999999999}", "has 100,000,000,000 names"),
        ("{0..9999}{0..9999}", "100,000,000 names; 1,000,000 at most"),
    ],
)
def test_braces_that_make_no_names_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_braces(pattern)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("/home/me/secret/*.tar", "*.tar"),
        ("/home/me/secret/{a,b}/train-{000..009}.tar", "train-{000..009}.tar"),
        ("{/home/me/a,/home/me/b}.tar", "{...}.tar"),
        ("~/photos", "photos"),
        ("../mine/*/x.parquet", "x.parquet"),
        ("mine/*.parquet", "*.parquet"),
        ("file:///home/me/secret/a.tar", "a.tar"),
        ("C:\\Users\\me\\*.tar", "*.tar"),
        ("https://me:key@host/shards/a.tar?signature=x", "https://host/shards/a.tar"),
        ("someone/pairs", "someone/pairs"),
        ("someone/pairs test", "someone/pairs test"),
        ("flickr30k test", "flickr30k test"),
        ("a data set of pairs", "a data set of pairs"),
    ],
)
def test_what_may_be_published_of_a_name(dataset, name):
    assert public_name(dataset) == public_name(public_name(dataset)) == name


def test_a_protocol_whose_package_is_missing_is_named():
    with pytest.raises(ValueError, match="adl://x/a.tar cannot be looked up: (ImportError|ValueError)"):
        expand_urls("adl://x/a.tar")


def test_logs_show_no_secrets():
    assert display_name("https://user:secret@host:80/a/b.tar?signature=secret#x") == "https://host:80/a/b.tar"
    assert display_name("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert display_name("/a/b?c.tar") == "/a/b?c.tar"
    with pytest.raises(ValueError) as error:
        expand_urls("pipe://user:secret@x/a.tar?secret")
    assert "secret" not in str(error.value)


def test_what_is_an_address():
    assert is_url("hf://datasets/a/b.tar") and not is_url("C:/a.tar")
