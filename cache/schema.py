"""What the metadata files of a cache hold, and their validation.

Every JSON file of a cache that is not Zarr's own is *sealed*: `{"body": ..., "sha256": ...}`, so
that a flipped bit in it is found before anything in it is believed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sherl_pipe.cache.codecs import Codec, codec_from_json
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    InputError,
    StaleCacheError,
    UnsafeError,
    explain,
)
from sherl_pipe.cache.fingerprint import canonical_json, hash_bytes, hash_json

FORMAT_VERSION = 1
ATTRIBUTE = "sherl_pipe"
MAX_NAME_BYTES = 128
# Bounds no honest cache reaches; beyond them metadata is refused before memory is reserved.
MAX_TAPS, MAX_WIDTH, MAX_ROWS = 4096, 1 << 20, 1 << 40

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_RESERVED = {"zarr.json", "c"}


def check_name(name: str, what: str = "split") -> str:
    """`name` if it is safe as a folder path below the cache; else UnsafeError."""
    parts = name.split("/")
    good = len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES and all(
        _SEGMENT.match(part) and part not in _RESERVED for part in parts
    )
    if not good:
        raise UnsafeError(
            explain(
                f"{what} name {name!r}",
                expected=f"letters, digits, '.', '_', '-' (each part begins with a letter or "
                f"digit, at most {MAX_NAME_BYTES} bytes)",
                found="something else",
                todo="Rename it.",
            )
        )
    return name


def seal(body: Any) -> bytes:
    """The bytes of a sealed JSON file."""
    text = canonical_json(body)
    return b'{"body":' + text + b',"sha256":"' + hash_bytes(text).encode() + b'"}\n'


def unseal(data: bytes, path: str) -> Any:
    """The body of a sealed file. Raises CorruptCacheError naming `path`."""
    try:
        outer = json.loads(data)
        body, found = outer["body"], outer["sha256"]
        written = seal(body)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCacheError(
            explain(f"{path} is damaged", expected="sealed JSON", found=type(error).__name__)
        ) from error
    # The bytes and not the hash alone: one bit makes 1E-05 of 1e-05, which is the same number.
    if data != written:
        raise CorruptCacheError(
            explain(f"{path} is damaged: sha256 or form", expected=found, found=hash_json(body))
        )
    return body


@dataclass(frozen=True)
class StreamSpec:
    """Which taps of one stack of blocks a cache holds.

    Attributes:
        taps: tap numbers, ascending; tap k enters block k, tap `blocks` leaves the last block.
        blocks: blocks of the stack in the whole backbone.
        width: values per token and tap.
    """

    taps: tuple[int, ...]
    blocks: int
    width: int

    def to_json(self) -> dict[str, Any]:
        return {"taps": list(self.taps), "blocks": self.blocks, "width": self.width}


@dataclass(frozen=True)
class Identity:
    """Everything that a feature depends on besides its text.

    Attributes:
        backbone: `name`, `revision`, `architecture`, `model_type`, `parameters` (count), and what
            is compared: `fingerprint` (all weights), `config` (hash) and `dtype` it ran in.
        tokenizer: its fingerprint.
        template: `task` or `neutral`.
        max_length: tokens after which an input is cut.
        streams: by name: `encoder` and `decoder`, or `hidden`.
        codec: how values are stored.
        seed: of the permutation that assigns examples to shards.
        versions: packages that wrote the cache (not compared).
    """

    backbone: Mapping[str, Any]
    tokenizer: str
    template: str
    max_length: int
    streams: Mapping[str, StreamSpec]
    codec: Codec
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "backbone": dict(self.backbone),
            "tokenizer": self.tokenizer,
            "template": self.template,
            "max_length": self.max_length,
            "streams": {name: spec.to_json() for name, spec in self.streams.items()},
            "codec": self.codec.to_json(),
            "seed": self.seed,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Any, path: str) -> Identity:
        """Validate a cache's root attributes.

        Raises:
            InputError: not a cache, or written in a format that this version does not read.
            UnsafeError: sizes out of bounds.
        """
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT_VERSION:
            raise InputError(
                explain(
                    f"{path}: cache format",
                    expected=FORMAT_VERSION,
                    found="none" if found is None else found,
                    todo="Extract again with this version, or use the version that wrote it.",
                )
            )
        try:
            streams = {
                check_name(name, "stream"): StreamSpec(
                    tuple(int(tap) for tap in spec["taps"]), int(spec["blocks"]), int(spec["width"])
                )
                for name, spec in data["streams"].items()
            }
            identity = cls(
                backbone={str(key): value for key, value in data["backbone"].items()},
                tokenizer=str(data["tokenizer"]),
                template=str(data["template"]),
                max_length=int(data["max_length"]),
                streams=streams,
                codec=codec_from_json(data["codec"]),
                seed=int(data["seed"]),
                versions={str(key): str(value) for key, value in data["versions"].items()},
            )
        except (InputError, UnsafeError) as error:
            raise type(error)(f"{path}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise CorruptCacheError(f"{path} lacks or misstates the field {error}") from error
        for name, spec in streams.items():
            bounded(len(spec.taps), 1, MAX_TAPS, f"{path}: {name} taps")
            bounded(spec.width, 1, MAX_WIDTH, f"{path}: {name} width")
        return identity

    def compared(self) -> dict[str, Any]:
        """The fields that must agree, flat, by the name that messages use."""
        fields: dict[str, Any] = {
            "backbone weights": self.backbone.get("fingerprint"),
            "backbone config": self.backbone.get("config"),
            "backbone dtype": self.backbone.get("dtype"),
            "tokenizer": self.tokenizer,
            "template": self.template,
            "max_length": self.max_length,
            "codec": self.codec.to_json(),
            "seed": self.seed,
        }
        for name, spec in self.streams.items():
            fields[f"{name} taps"] = list(spec.taps)
            fields[f"{name} width"] = spec.width
        return fields

    def fingerprint(self) -> str:
        """One hash of the compared fields."""
        return hash_json(self.compared())

    def require(self, expected: Identity, path: str) -> None:
        """Raise StaleCacheError naming the first field in which this cache differs."""
        mine, theirs = self.compared(), expected.compared()
        revisions = [each.backbone.get("revision") for each in (self, expected)]
        if None not in revisions:  # a local folder has none, and its weights are compared anyway
            mine["backbone revision"], theirs["backbone revision"] = revisions
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise StaleCacheError(
                    explain(
                        f"{path} was made with another {name}",
                        expected=theirs.get(name),
                        found=mine.get(name),
                        todo="Use the model and settings it was made with, or extract to "
                        "another --cache.",
                    )
                )


def bounded(value: int, low: int, high: int, what: str) -> int:
    """`value` if it lies in the bounds; else UnsafeError."""
    if not low <= value <= high:
        raise UnsafeError(explain(what, expected=f"{low} to {high}", found=value))
    return value
