"""What a cache says of its features, and the validation of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sherl_pipe.cache.codecs import Codec, codec_from_json
from sherl_pipe.cache.errors import CorruptCacheError, InputError, StaleCacheError, explain, shown
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.cache.names import check_part, stream_kind, stream_number
from sherl_pipe.cache.sealed import bounded, take

FORMAT_VERSION = 1
# Of streams of added taps: a reader that knows format 1 alone refuses a cache that has some.
ADDED_VERSION = 2
ATTRIBUTE = "sherl_pipe"
# Bounds no honest cache reaches; beyond them metadata is refused before memory is reserved.
MAX_TAPS, MAX_WIDTH, MAX_ROWS = 4096, 1 << 20, 1 << 40


def stream_version(stream: str) -> int:
    """The format of a stream's plan and manifest."""
    return ADDED_VERSION if stream_number(stream)[1] else FORMAT_VERSION


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

    @classmethod
    def from_json(cls, data: Any, path: str) -> StreamSpec:
        """Raises CorruptCacheError, UnsafeError."""
        taps = take(data, "taps", list, path)
        bounded(len(taps), 1, MAX_TAPS, f"{path}: taps")
        if any(type(tap) is not int for tap in taps):
            raise CorruptCacheError(f"{path}: field 'taps' holds more than whole numbers.")
        width = bounded(take(data, "width", int, path), 1, MAX_WIDTH, f"{path}: width")
        return cls(tuple(taps), take(data, "blocks", int, path), width)


@dataclass(frozen=True)
class Identity:
    """Everything that a feature depends on besides its text.

    Attributes:
        backbone: `name`, `revision`, `architecture`, `model_type`, `parameters` (count), and what
            is compared: `fingerprint` (all weights), `config` (hash) and `dtype` it ran in.
        tokenizer: its fingerprint.
        template: `task` or `neutral`.
        max_length: tokens after which an input is cut.
        streams: by name: `encoder` and `decoder`, or `hidden`; as the first extraction made them.
        codec: how values are stored.
        seed: of the permutation that assigns examples to shards.
        versions: packages that wrote the cache (not compared).
        added: taps that were added later, addition by addition, by name (not compared, and not in
            the root's metadata; see `added.py`).
    """

    backbone: Mapping[str, Any]
    tokenizer: str
    template: str
    max_length: int
    streams: Mapping[str, StreamSpec]
    codec: Codec
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    added: tuple[Mapping[str, StreamSpec], ...] = ()

    def spec(self, stream: str) -> StreamSpec:
        """What a stored stream holds. Raises InputError for one that the cache does not have."""
        number, kind = stream_number(stream)[1], stream_kind(stream)
        additions = (self.streams, *self.added)
        if number >= len(additions) or kind not in additions[number]:
            raise InputError(
                explain("stream", expected=f"one of {sorted(self.streams)}", found=shown(stream))
            )
        return additions[number][kind]

    def parts(self, stream: str) -> list[str]:
        """The stored streams that together hold all taps of a stream, itself first."""
        kind = stream_kind(stream)
        numbers = (n for n, specs in enumerate(self.added, start=1) if kind in specs)
        return [stream, *(f"{stream}.{number}" for number in numbers)]

    def held(self, kind: str) -> StreamSpec:
        """All taps of a stream, added ones included."""
        specs = [self.spec(part) for part in self.parts(kind)]
        return replace(specs[0], taps=tuple(sorted(tap for spec in specs for tap in spec.taps)))

    def missing(self, wanted: Identity) -> dict[str, StreamSpec]:
        """The taps that `wanted` has and this cache has not, by stream; no entry for none."""
        found = {}
        for kind in self.streams.keys() & wanted.streams.keys():
            lacking = {*wanted.held(kind).taps} - {*self.held(kind).taps}
            if lacking:
                found[kind] = replace(self.streams[kind], taps=tuple(sorted(lacking)))
        return dict(sorted(found.items()))

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
            CorruptCacheError: a field is missing or of another type.
            UnsafeError: sizes or names out of bounds.
        """
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT_VERSION:
            raise InputError(
                explain(
                    f"{path}: cache format",
                    expected=FORMAT_VERSION,
                    found="none" if found is None else shown(found),
                    todo="Extract again with this version, or use the version that wrote it.",
                )
            )
        backbone = take(data, "backbone", dict, path)
        versions = take(data, "versions", dict, path)
        for name, value in backbone.items():
            if not isinstance(value, str | int | None):
                raise CorruptCacheError(
                    explain(
                        f"{path}: backbone: field {name[:60]!r}",
                        expected="text or a number",
                        found=shown(value),
                    )
                )
        try:
            codec = codec_from_json(data.get("codec"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return cls(
            backbone=backbone,
            tokenizer=take(data, "tokenizer", str, path),
            template=take(data, "template", str, path),
            max_length=take(data, "max_length", int, path),
            streams={
                check_part(name, f"{path}: stream"): StreamSpec.from_json(
                    spec, f"{path}: streams: {name}"
                )
                for name, spec in take(data, "streams", dict, path).items()
            },
            codec=codec,
            seed=take(data, "seed", int, path),
            versions={name: take(versions, name, str, f"{path}: versions") for name in versions},
        )

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

    def _without_taps(self) -> dict[str, Any]:
        return {k: v for k, v in self.compared().items() if not k.endswith(" taps")}

    def fingerprint(self) -> str:
        """One hash of the compared fields."""
        return hash_json(self.compared())

    def fingerprint_of(self, stream: str) -> str:
        """One hash of what the bytes of a stored stream depend on besides its texts."""
        if not stream_number(stream)[1]:
            return self.fingerprint()
        return hash_json([self.fingerprint(), stream_kind(stream), list(self.spec(stream).taps)])

    def fingerprint_for(self, taps: Mapping[str, Iterable[int]]) -> str:
        """One hash of what the values of some taps depend on, by stream. An addition of which none
        is read does not change it."""
        used = [
            self.fingerprint_of(f"{kind}.{number}")
            for number, specs in enumerate(self.added, start=1)
            for kind, spec in sorted(specs.items())
            if {*spec.taps} & {*taps.get(kind, ())}
        ]
        return hash_json([self.fingerprint(), *used]) if used else self.fingerprint()

    def require(self, expected: Identity, path: str) -> None:
        """Raise StaleCacheError naming the first field in which this cache differs, taps aside:
        others can be added."""
        mine, theirs = self._without_taps(), expected._without_taps()
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
