"""What the C library keeps of freed memory; each in a process of its own, whose heap is its own."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other libraries keep to themselves"
)


def figures(code: str) -> list[int]:
    """What a program prints."""
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return [int(each) for each in done.stdout.split()]


def test_what_is_freed_is_kept_or_returned() -> None:
    returned, kept = figures("""
        import psutil, torch
        from sherl_pipe.stages.memory import keep_freed_memory, return_freed_memory
        def held():
            base = psutil.Process().memory_info().rss
            pieces = [torch.ones(8 << 20) for _ in range(8)]
            last = torch.ones(1)  # behind them in a heap
            del pieces
            return (psutil.Process().memory_info().rss - base) >> 20
        return_freed_memory(); returned = held()
        keep_freed_memory(); kept = held()
        return_freed_memory(); print(returned, kept)
    """)
    assert returned < 64 and kept > 192


def test_holes_are_returned() -> None:
    before, after, same = figures("""
        import psutil, torch
        from sherl_pipe.stages.memory import keep_freed_memory, return_holes
        def held():
            return (psutil.Process().memory_info().rss - base) >> 20
        keep_freed_memory()
        base = psutil.Process().memory_info().rss
        pieces = [torch.full((1 << 18,), float(each)) for each in range(256)]
        del pieces[::2]
        before = held(); return_holes()
        print(before, held(), all((p == 2 * n + 1).all() for n, p in enumerate(pieces)) + 0)
    """)
    assert before > 224 and after < 160 and same
