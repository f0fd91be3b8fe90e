"""Where a cache is, and with which rights it is reached."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
from cache_tools import write_split
from s3_tools import SECRET, Wire
from sherl_pipe.cache import FeatureCache, connect, errors
from sherl_pipe.cache.place import Url, parse_place
from test_cache_remote import LENGTHS


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("gs://my.bucket_1/a/b-c/d=1/", "my.bucket_1", "a/b-c/d=1"),
        ("az://container/x", "container", "x"),
    ],
)
def test_urls(text: str, bucket: str, key: str) -> None:
    place = parse_place(text)
    assert place == Url(text[:2], bucket, key) and parse_place(place) is place
    assert str(place) == text.removesuffix("/") and parse_place(str(place)) == place
    assert str(place / "a" / "b").startswith(str(place)) and (place / "a").parent == place


@pytest.mark.parametrize("text", ["cache", "./s3", "/a/b", "C:/x", "a:b/c", "", "ünï/x"])
def test_folders(text: str) -> None:
    assert parse_place(text) == Path(text) == parse_place(Path(text))


@pytest.mark.parametrize(
    "text",
    [
        f"s3://me:{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"az://container/x#{SECRET}",
        f"https://me:{SECRET}@host/x",
    ],
)
def test_urls_with_secrets(text: str) -> None:
    with pytest.raises(errors.UnsafeError) as caught:
        FeatureCache.open(text)
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize(
    "text",
    [
        "http://host/x",
        "file:///x",
        "s3:/bucket/x",
        "s3://",
        "s3:///x",
        "s3://b/x",
        "s3://bucket//x",
        "s3://bucket/a/../b",
        "s3://bucket/a b",
        "s3://bucket/a%2e",
        "s3://bucket/" + "x" * 600,
        Path("s3://bucket/x"),
    ],
)
def test_urls_that_are_none(text: str | Path) -> None:
    with pytest.raises(errors.InputError):
        parse_place(text)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(errors.InputError, match=r"pip install 'sherl-pipe\[cloud\]'"):
        FeatureCache.open("s3://bucket/x")


def who(wire: Wire) -> set[str]:
    return {each.headers["authorization"].split("Credential=")[1][:6] for each in wire.seen}


def test_credentials_of_a_profile(
    wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    text = "[{}]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    file.write_text(text.format("default", "ALPHA1") + text.format("other", "OTHER1"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    write_split(url, LENGTHS)
    assert who(wire) == {"ALPHA1"}
    wire.seen.clear()
    monkeypatch.setenv("AWS_PROFILE", "other")
    FeatureCache.open(url)
    assert who(wire) == {"OTHER1"}
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(errors.InputError, match="AWS profile gives no credentials"):
        FeatureCache.open(url)


def test_plain_http_is_for_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = connect._may_speak_plain
    assert plain({"AWS_ENDPOINT_URL": "http://127.0.0.1:5000"})
    assert plain({"AWS_ENDPOINT_URL": "http://x", "AWS_ENDPOINT_URL_S3": "http://localhost:1"})
    for safe in ("https://localhost", "https://10.0.0.1", ""):
        assert not plain({"AWS_ENDPOINT_URL": safe})
    for far in ("http://10.0.0.1:9000", "http://localhost.evil.org"):
        assert not plain({"AWS_ENDPOINT_URL": far, "AWS_ALLOW_HTTP": "true"})
        monkeypatch.setenv("AWS_ENDPOINT_URL", far)
        with pytest.raises(errors.InputError, match="AWS_ALLOW_HTTP=true"):
            FeatureCache.open("s3://bucket/x")


def test_other_stores_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server of theirs here; that they are understood can be seen."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for text, kind in (("gs://bucket/x", "GCSStore"), ("az://container/x", "AzureStore")):
        place = parse_place(text)
        assert isinstance(place, Url)
        assert type(connect.client(place, timedelta(seconds=1))).__name__ == kind
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(errors.InputError, match="az://container: the store cannot be opened"):
        connect.client(Url("az", "container"), timedelta(seconds=1))
