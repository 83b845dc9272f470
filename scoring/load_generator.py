"""Open-loop load on a scoring server: items arrive at random whether or not earlier ones are answered.

Bounded, and on loopback only: it is made to find out what a server does when there is too much to do.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .client import AsyncScoringClient, ClientOptions
from .errors import BadConfiguration, problem
from .items import ScoreItem, Scores

#: Items that may be in flight, whatever the rate.
IN_FLIGHT_MAX = 10_000


@dataclass(slots=True)
class LoadReport:
    """What came of the items.

    Args:
        latencies_s: from an item's arrival to its verified scores.
        failures: names of errors, each with how often it was an item's last word.
    """

    latencies_s: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    answers: dict[int, Scores] = field(default_factory=dict)
    """By position in the list of items."""


async def generate_load(
    target: str, items: Sequence[ScoreItem], per_s: float, *, seed: int = 0, options: ClientOptions | None = None
) -> LoadReport:
    """Send each item once, at exponential intervals, and wait for all answers.

    Args:
        target: host:port, on loopback.
        per_s: arrivals in a second, on average.

    Raises:
        BadConfiguration: another machine, or more items than IN_FLIGHT_MAX.
    """
    host = target.rpartition(":")[0].strip("[]")
    if not ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback or len(items) > IN_FLIGHT_MAX:
        raise BadConfiguration(
            problem(
                f"{len(items)} items for {target}",
                consequence="No load was generated",
                remedy=f"Name an address on loopback, and at most {IN_FLIGHT_MAX} items",
            )
        )
    rng, report = random.Random(seed), LoadReport()

    async def one(index: int, item: ScoreItem, client: AsyncScoringClient) -> None:
        started = time.perf_counter()
        async for _, outcome in client.score([item]):
            if isinstance(outcome, Scores):
                report.latencies_s.append(time.perf_counter() - started)
                report.answers[index] = outcome
            else:
                name = type(outcome).__name__
                report.failures[name] = report.failures.get(name, 0) + 1

    async with AsyncScoringClient([target], options) as client, asyncio.TaskGroup() as tasks:
        for index, item in enumerate(items):
            tasks.create_task(one(index, item, client))
            await asyncio.sleep(rng.expovariate(per_s))
    return report
