"""A whole run as one strict model; `pipeline.yaml` is its file form.

A config without a line in it runs: model and data are then the embedded demo's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.functional_serializers import PlainSerializer
from pydantic.functional_validators import PlainValidator
from pydantic_core import PydanticCustomError
from sherl_pipe.cache import InputError, SherlPipeError
from sherl_pipe.cache.place import Place, Url, parse_place
from sherl_pipe.stages.data import DEMO_DATA

# Strict, so that `true` is no 1.
Integer = Annotated[int, Field(strict=True)]
Positive = Annotated[Integer, Field(gt=0)]


def _place(value: Any) -> Place:
    if not isinstance(value, str | Path | Url):
        raise PydanticCustomError("place", "Input should be a folder or a URL")
    return parse_place(value)


Cache = Annotated[Place, PlainValidator(_place), PlainSerializer(str, when_used="json")]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# None is this process, without Ray.
Workers = Positive | Literal["auto"] | None
Kind = TypeVar("Kind")
Values = Annotated[tuple[Kind, ...], Field(min_length=1)]


def _listed(spaces: Any) -> Any:
    """One space is a list of one."""
    return [spaces] if isinstance(spaces, dict) else spaces


class Section(BaseModel):
    """Unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which texts or images, and which labels.

    `source` is `demo`, `glue`, `glue/<task>`, another hub id, a folder, or one file; None follows
    the model: the demo's own corpus for `demo`, GLUE for any other.
    """

    source: str | None = None
    tasks: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    image_column: str | None = None
    label_column: str | None = None
    target_column: str | None = None
    limit: Positive | None = None


class ExtractConfig(Section):
    """Stage one. `template` None is `task` for text-to-text models and `neutral` for encoders.

    `batch_tokens` None is what suits the device. `workers` None is this process alone, or `auto`
    where there is a `ray_address`.
    """

    codec: Literal["float32", "bfloat16", "int8", "int4"] = "int8"
    taps: Literal["paper", "all"] | tuple[Integer, ...] = "paper"
    template: Literal["task", "neutral"] | None = None
    max_length: Positive = 128
    batch_tokens: Positive | None = None
    shard_mib: Positive = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    workers: Workers = None


class TuneConfig(Section):
    """Stage two. None leaves a setting to the preset, the method or the model's family."""

    tasks: tuple[str, ...] = ()
    method: str = "sherl"
    preset: Literal["paper"] | None = None
    reduction: Positive | None = None
    late: Annotated[Integer, Field(ge=0)] | None = None
    lr: tuple[Rate, ...] = ()
    epochs: Positive = 10
    batch_size: Positive = 32
    seed: tuple[Annotated[Integer, Field(ge=0)], ...] = (0,)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    init: Literal["residual", "paper", "random", "fisher"] | None = None
    pool: Literal["mean", "first", "last"] | None = None
    head: Literal["random", "probe", "words"] | None = None
    loss: Literal["words", "vocabulary"] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    together: Positive = 8
    residency: Literal["auto", "device", "host", "stream"] = "auto"
    memory_budget: str | None = None
    readers: Positive | None = None
    local_copies: Path | None = None
    local_copies_size: str | None = None
    out: Path = Path("runs")
    workers: Workers = None
    retries: Annotated[Integer, Field(ge=0)] = 3


class Span(Section):
    """A range that numbers are drawn from, evenly or evenly in their logarithm."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if not self.low <= self.high:
            raise ValueError(f"a range from low to high, such as low: {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError("low above zero where the scale is log")
        return self


class Space(Section):
    """Settings of `tune` that a sweep varies, with their values, or for `random` their ranges."""

    method: Values[str] | None = None
    reduction: Values[Positive] | None = None
    late: Values[Annotated[Integer, Field(ge=0)]] | None = None
    lr: Values[Rate] | Span | None = None
    epochs: Values[Positive] | None = None
    batch_size: Values[Positive] | None = None
    warmup: Values[Annotated[float, Field(ge=0, lt=1)]] | Span | None = None
    weight_decay: Values[Annotated[float, Field(ge=0)]] | Span | None = None
    clip: Values[Annotated[float, Field(gt=0)]] | Span | None = None
    init: Values[Literal["residual", "paper", "random", "fisher"]] | None = None
    pool: Values[Literal["mean", "first", "last"]] | None = None
    head: Values[Literal["random", "probe"]] | None = None
    loss: Values[Literal["words", "vocabulary"]] | None = None
    precision: Values[Literal["float32", "bf16"]] | None = None


class StopConfig(Section):
    """Early stopping: after `grace`, `grace` x `factor`, ... epochs one in `factor` goes on."""

    grace: Positive = 1
    factor: Annotated[Integer, Field(ge=2)] = 3


class SweepConfig(Section):
    """Which tunings a sweep has, each for every task and seed of `tune`.

    `grid` takes all combinations of the values in the space, `random` draws `samples` of them.
    Several spaces are swept one after another.
    """

    search: Literal["grid", "random"] = "grid"
    samples: Positive = 16
    seed: Annotated[Integer, Field(ge=0)] = 0
    space: Annotated[tuple[Space, ...], BeforeValidator(_listed)] = ()
    stop: StopConfig | None = None


class RunConfig(Section):
    """Both stages.

    `cache` None is `./cache/<name of the data>`; `ray_address` None starts a Ray cluster on this
    machine where more than one worker is asked for.
    """

    model: str = "demo"
    revision: str | None = None
    device: str = "auto"
    cache: Cache | None = None
    ray_address: str | None = None
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    tune: TuneConfig = TuneConfig()
    sweep: SweepConfig = SweepConfig()

    @property
    def data_source(self) -> str:
        """The data, resolved."""
        return self.data.source or (DEMO_DATA if self.model == "demo" else "glue")

    @property
    def cache_path(self) -> Place:
        """The cache, resolved."""
        if self.cache is not None:
            return self.cache
        source = self.data_source
        path = Path(source).resolve()
        name = path.stem if path.is_file() else path.name
        return Path("cache") / ("glue" if source.startswith("glue/") else name)


def place_from_root(place: Place) -> Place:
    """A cache's place for a process in another folder."""
    return place.resolve() if isinstance(place, Path) else place


def model_from_root(name: str) -> str:
    """A model's name for a process in another folder: the whole path where it is a folder here."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def make_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate. Raises InputError naming the key, with the nearest known one if it is unknown."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        own = error.errors()[0].get("ctx", {}).get("error")
        if isinstance(own, SherlPipeError):
            # Not from `error`, which repeats the value.
            raise type(own)(f"{where}: {own}") from None
        raise InputError(f"{where}: {_explain(error)}") from error


def read_config(path: Path) -> RunConfig:
    """The config in a YAML file. Raises InputError."""
    try:
        # A loader of yaml.SafeLoader's kind: no tag makes an object.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        line = f", line {where.line + 1}" if where else ""
        raise InputError(f"{path}{line}, is no YAML: {error.problem}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(values).__name__}.")
    return make_config(values, str(path))


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = _keys(first)
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = sorted(_section(place[:-1]).model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.0)
        return f"unknown key {key!r}. Did you mean {near[0]!r}? Known: {', '.join(known)}."
    if first["type"] == "invalid_key":
        return f"a key: expected text, found {first['input']!r}."
    # A value that may have several forms has one error for each.
    forms = dict.fromkeys(_wanted(each["msg"]) for each in error.errors() if _keys(each) == place)
    return f"{key}: expected {' or '.join(forms)}, found {first['input']!r}."


def _keys(error: Any) -> list[str]:
    """The keys that lead to an error, without numbers of elements and names of forms."""
    return [str(part) for part in error["loc"] if isinstance(part, str) and "[" not in part]


def _wanted(message: str) -> str:
    """Pydantic's message in the words of a YAML file."""
    text = re.sub(r"^Input should be (a valid )?|, unable to .*", "", message)
    text = re.sub(r"^dictionary or instance of .*", "a section with keys", text)
    return {"tuple": "a list", "string": "text", "integer": "a whole number"}.get(text, text)


def _section(place: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in place:
        kind = section.model_fields[name].annotation
        # A section may be one of several forms, or an element of a list.
        for form in (kind, *get_args(kind)):
            if isinstance(form, type) and issubclass(form, BaseModel):
                section = form
    return section
