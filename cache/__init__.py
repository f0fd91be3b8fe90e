"""The on-disk feature cache: format, codecs, writer, reader. Needs numpy and zarr only."""

from sherl_pipe.cache.codecs import CODECS, Codec
from sherl_pipe.cache.errors import (
    CorruptCacheError,
    IncompleteSplitError,
    InputError,
    LockedError,
    NonFiniteError,
    SherlPipeError,
    StaleCacheError,
    StorageError,
    UnsafeError,
    WorkerError,
)
from sherl_pipe.cache.labels import LabelTable, TaskSpec
from sherl_pipe.cache.reader import FeatureCache
from sherl_pipe.cache.schema import Identity, StreamSpec
from sherl_pipe.cache.stream import ShardData, Stream
from sherl_pipe.cache.stream_writer import StreamWriter
from sherl_pipe.cache.writer import CacheWriter

__all__ = [
    "CODECS",
    "CacheWriter",
    "Codec",
    "CorruptCacheError",
    "FeatureCache",
    "Identity",
    "IncompleteSplitError",
    "InputError",
    "LabelTable",
    "LockedError",
    "NonFiniteError",
    "ShardData",
    "SherlPipeError",
    "StaleCacheError",
    "StorageError",
    "Stream",
    "StreamSpec",
    "StreamWriter",
    "TaskSpec",
    "UnsafeError",
    "WorkerError",
]
