"""Stage one with several workers: the driver deals out shards and commits the manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sherl_pipe.cache import Stream, StreamWriter
from sherl_pipe.cache.layout import Layout, summary
from sherl_pipe.stages.extract import Extractor, Report
from sherl_pipe.stages.shards import Crew, Done, Lost, ShardJob
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.words import PrefixTree


class CrewExtractor(Extractor):
    """An extractor whose shards are computed and committed by others.

    It tokenizes, lays out, and holds the cache's lock. The weights of its own backbone are used for
    free-text targets alone. A stream with shards that nobody could do stays unfinished; the others
    are done.

    Attributes:
        crew: the workers.
        lost: what killed every worker that tried it.
    """

    def __init__(self, *args: Any, crew: Crew, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.crew = crew
        self.lost: list[Lost] = []

    def _extract_main(
        self, out: StreamWriter, layout: Layout, ids: list[bytes], tokens: Tokens, report: Report
    ) -> None:
        self._share(out, layout, ids, report, tokens=tokens)

    def _extract_words(
        self,
        out: StreamWriter,
        layout: Layout,
        ids: list[bytes],
        encoder: Stream,
        tree: PrefixTree,
        report: Report,
    ) -> None:
        self._share(out, layout, ids, report, tree=tree.to_json())

    def _finish(self, out: StreamWriter) -> None:
        if out.base not in {f"{each.job.split}/{each.job.stream}" for each in self.lost}:
            out.finish()

    def _share(
        self,
        out: StreamWriter,
        layout: Layout,
        ids: list[bytes],
        report: Report,
        *,
        tokens: Tokens | None = None,
        tree: Mapping[str, Any] | None = None,
    ) -> None:
        """Have the pending shards done, told of each as it is committed."""
        pending, done = out.pending(), 0
        what, total = self._say_what(out, layout, pending)

        def job(shard: int) -> ShardJob:
            members = layout.members(shard)
            chosen = None
            if tokens is not None:
                chosen = replace(tokens, inputs=[tokens.inputs[member] for member in members])
            return ShardJob(
                out.split,
                out.stream,
                shard,
                summary(layout),
                tuple(ids[member] for member in members),
                layout.index[members, 2],
                chosen,
                tree,
            )

        def told(answer: Done) -> None:
            nonlocal done
            report.bytes_written += out.accept(answer.shard, answer.receipt)
            done += layout.used_rows(answer.shard)
            self.progress(what, done, total, "tokens")

        self.progress(what, 0, total, "tokens")
        lost = self.crew.work(pending, job, told)
        report.lost = len(lost)
        self.lost += lost
