"""The progress bar: what an operator wants to see while rollouts run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import rich.progress
from rich.console import Console

if TYPE_CHECKING:
    from .stats import Stats


#: Terminals from this width on show everything.
_WIDE = 110


class Progress:
    """rollouts done, tokens/s, in flight, resumed, durable lag; on standard error."""

    def __init__(self, stats: Stats, total: int, *, already: int) -> None:
        self._stats = stats
        self._before = stats.tokens
        self._since = time.monotonic()
        console = Console(stderr=True)
        wide = console.width >= _WIDE
        columns = [
            rich.progress.TextColumn("rollouts"),
            rich.progress.BarColumn(bar_width=None if wide else 8),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]} tok/s"),
            rich.progress.TextColumn("in flight {task.fields[in_flight]}"),
            rich.progress.TextColumn("resumed {task.fields[resumed]}"),
            rich.progress.TextColumn("deaths {task.fields[deaths]}"),
            rich.progress.TextColumn("durable lag {task.fields[lag]} B"),
            rich.progress.TimeElapsedColumn(),
        ]
        if not wide:  # what is cut off helps nobody: the lag matters least, for it is bounded
            del columns[-2]
        self._bar = rich.progress.Progress(*columns, console=console, expand=wide)
        self._task = self._bar.add_task("", total=total, completed=already, **self._fields())

    def _fields(self) -> dict[str, Any]:
        s = self._stats
        rate = (s.tokens - self._before) / max(1e-6, time.monotonic() - self._since)
        return {
            "rate": f"{rate:,.0f}",
            "in_flight": s.in_flight + s.waiting,
            "resumed": s.resumed,
            "deaths": s.deaths,
            "lag": s.durable_lag_bytes,
        }

    def advance(self) -> None:
        self._bar.update(self._task, advance=1, **self._fields())

    def refresh(self) -> None:
        self._bar.update(self._task, **self._fields())

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
