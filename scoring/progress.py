"""What a server does, in the terminal."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .server import ScoringServer


class Progress:
    """A table of teachers that follows the server."""

    def __init__(self, server: ScoringServer, console: Console) -> None:
        self._server, self._console = server, console
        self._last = time.monotonic(), 0
        self._rate = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        with Live(self.render(), console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(0.5)
                live.update(self.render(), refresh=True)

    def render(self) -> Group:
        scheduler = self._server.scheduler
        counters, waiting, failures = scheduler.counters, scheduler.waiting(), scheduler.failures
        now = time.monotonic()
        if now - self._last[0] >= 1.0:
            self._rate = (counters.scored_tokens - self._last[1]) / (now - self._last[0])
            self._last = now, counters.scored_tokens
        table = Table("teacher", "state", "queued tokens", "loads", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for teacher in scheduler.sources:
            if scheduler.busy is not None and scheduler.busy[0] == teacher:
                state = "[green]scoring[/]"
            elif teacher == scheduler.room.loading:
                state = "[yellow]loading[/]"
            elif teacher in scheduler.room.teachers:
                state = "in memory"
            else:
                state = "[red]failed[/]" if teacher in failures else "[dim]on disk[/]"
            queued = waiting[teacher].tokens if teacher in waiting else 0
            table.add_row(teacher, state, f"{queued:,}", str(counters.loads.get(teacher, 0)))
        line = (
            f"{counters.scored_items:,} scored, {counters.cached_items:,} from the cache, {counters.failed:,} failed, "
            f"{scheduler.queued_tokens:,} tokens queued, {self._rate:,.0f} tokens/s, "
            f"{self._server.open_streams} streams"
        )
        return Group(table, Text("draining: " + line if self._server.draining else line))
