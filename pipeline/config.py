"""A whole run as one strict model; `pipeline.yaml` is its file form.

The defaults are the embedded demo, so a config without a line in it runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sherl_pipe.cache import InputError
from sherl_pipe.stages.data import DEMO_DATA

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which texts and labels.

    `source` is `demo`, `glue`, `glue/<task>`, another hub id, a folder, or one file; None follows
    the model: the demo's own corpus for `demo`, GLUE for any other.
    """

    source: str | None = None
    tasks: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    limit: Positive | None = None


class ExtractConfig(Section):
    """Stage one. `template` None is `task` for text-to-text models and `neutral` for encoders."""

    codec: Literal["float32", "bfloat16", "int8"] = "int8"
    taps: Literal["paper", "all"] | tuple[int, ...] = "paper"
    template: Literal["task", "neutral"] | None = None
    max_length: Positive = 128
    batch_tokens: Positive = 4096
    shard_mib: Positive = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TuneConfig(Section):
    """Stage two. None leaves a setting to the model's family."""

    tasks: tuple[str, ...] = ()
    method: str = "sherl"
    reduction: Positive | None = None
    late: Positive = 1
    lr: tuple[Annotated[float, Field(gt=0)], ...] = ()
    epochs: Positive = 10
    batch_size: Positive = 32
    seed: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    init: Literal["residual", "paper"] = "residual"
    pool: Literal["mean", "first"] = "mean"
    precision: Literal["float32", "bf16"] = "float32"
    memory_budget: str | None = None
    out: Path = Path("runs")


class RunConfig(Section):
    """Both stages. `cache` None is `./cache/<name of the data>`."""

    model: str = "demo"
    revision: str | None = None
    device: str = "auto"
    cache: Path | None = None
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    tune: TuneConfig = TuneConfig()

    @property
    def data_source(self) -> str:
        """The data, resolved."""
        return self.data.source or (DEMO_DATA if self.model == "demo" else "glue")

    @property
    def cache_path(self) -> Path:
        """The cache, resolved."""
        if self.cache is not None:
            return self.cache
        source = self.data_source
        name = "glue" if source.startswith("glue/") else Path(source).resolve().stem
        return Path("cache") / name


def make_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate. Raises InputError naming the key, with the nearest known one if it is unknown."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from error


def read_config(path: Path) -> RunConfig:
    """The config in a YAML file. Raises InputError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of keys, found {type(values).__name__}.")
    return make_config(values, str(path))


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    # Where a value may have several forms, the location names the form as well.
    place = [str(part) for part in first["loc"] if "[" not in str(part)]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = sorted(_section(place[:-1]).model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.0)
        return f"unknown key {key!r}. Did you mean {near[0]!r}? Known: {', '.join(known)}."
    return f"{key}: {first['msg']}, found {first['input']!r}."


def _section(place: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in place:
        kind = section.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            section = kind
    return section
