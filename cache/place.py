"""Where a cache is: a folder, or a prefix in a bucket of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sherl_pipe.cache.errors import InputError, UnsafeError, explain

# Of URLs that obstore opens with the credentials of its surroundings.
SCHEMES = ("s3", "gs", "az")

# Two letters at least: `C:/` is no scheme. One slash is what is left of two in a `Path`.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}\Z")
# What every store and every tool takes as it is.
_PART = re.compile(r"[A-Za-z0-9!_.*'()=+-]+\Z")
MAX_PREFIX = 512  # of a store's 1024 bytes a key; names and numbers below it need the rest


@dataclass(frozen=True)
class Url:
    """A place in an object store; `/` and `parent` work as a path's do.

    Attributes:
        scheme: one of SCHEMES.
        bucket: or container.
        key: below it, without slashes at its ends; may be empty.
    """

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, name: str) -> Url:
        return Url(self.scheme, self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.bucket, self.key.rpartition("/")[0])


Place: TypeAlias = Path | Url


def parse_place(text: str | Place) -> Place:
    """The folder or URL that a person named.

    Raises InputError for a URL that is none of a store, UnsafeError for one that carries
    credentials. Neither message repeats what may be secret.
    """
    if isinstance(text, Url):
        return text
    scheme = _URL.match(str(text))
    if scheme is None:
        return Path(text)
    if isinstance(text, Path):
        raise InputError(f"{scheme[1]}: a URL was given as a Path, which loses a slash. Use text.")
    return _parse_url(scheme[1], text)


def _parse_url(scheme: str, text: str) -> Url:
    rest = text[len(scheme) + 1 :]
    if any(mark in rest for mark in "@?#"):
        raise UnsafeError(
            f"the {scheme} URL carries a user, a password, a token or a query. Name the bucket and "
            "the prefix only; credentials come from the environment, a profile or the machine."
        )
    if scheme not in SCHEMES:
        wanted = ", ".join(f"{name}://bucket/prefix" for name in SCHEMES)
        raise InputError(explain("cache", expected=f"a folder, {wanted}", found=f"{scheme}:"))
    bucket, _, key = rest.removeprefix("//").partition("/")
    key = key.removesuffix("/")
    parts = key.split("/") if key else []
    plain = all(_PART.match(part) and part not in (".", "..") for part in parts)
    if not rest.startswith("//") or not _BUCKET.match(bucket) or not plain:
        raise InputError(
            explain(
                "cache",
                expected=f"{scheme}://bucket/prefix of letters, digits and !_.*'()=+-",
                found=repr(text),
            )
        )
    if len(key) > MAX_PREFIX:
        raise InputError(explain("cache: bytes of the prefix", expected=MAX_PREFIX, found=len(key)))
    return Url(scheme, bucket, key)
