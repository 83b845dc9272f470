"""`rollout-wal serve-teachers`: a scoring server, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.logging import RichHandler

from rollout_wal.errors import RolloutWalError

if TYPE_CHECKING:
    from .config import ServeConfig
    from .scheduler import Scheduler

log = logging.getLogger("scoring.serve")


@click.command("serve-teachers")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Read the configuration and every checkpoint's digest, then stop.")
@click.option(
    "--port-file", type=click.Path(dir_okay=False, path_type=Path), help="Write the port here once it listens."
)
@click.option(
    "--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), show_default=True
)
def serve_teachers(config: Path, check: bool, port_file: Path | None, log_level: str) -> None:
    """Score rollouts under the teachers that CONFIG, a YAML file, describes.

    SIGTERM and SIGINT drain: nothing more is accepted, what was accepted is answered, then the server ends with 0. A
    second signal ends it at once. Logs go to standard error: as JSON lines, or beside a table that follows the work if
    that is a terminal.
    """
    console = Console(stderr=True)
    _set_up_logs(console, log_level)
    try:
        from .config import build, read_config

        settings = read_config(config)
        scheduler = build(settings)
        if check:
            for name, source in scheduler.sources.items():
                provenance = source.info.provenance
                click.echo(f"{name}\t{provenance.precision}\t{provenance.checkpoint}\t{source.info.nbytes} bytes")
            return
        code = asyncio.run(_serve(settings, scheduler, console, port_file))
    except RolloutWalError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(code)


async def _serve(settings: ServeConfig, scheduler: Scheduler, console: Console, port_file: Path | None) -> int:
    from .progress import Progress
    from .server import ScoringServer

    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    server = ScoringServer(scheduler, settings.server)
    await server.start()
    metrics = None
    if settings.metrics is not None:
        from .metrics import expose

        metrics = expose(server, *settings.metrics)
    if port_file is not None:
        part = port_file.with_name(port_file.name + ".part")
        part.write_text(f"{server.port}\n")
        part.replace(port_file)
    show = asyncio.create_task(Progress(server, console).run()) if console.is_terminal else None
    ended, stopping = asyncio.create_task(server.wait()), asyncio.create_task(told.wait())
    await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if scheduler.crashed.is_set():
        await asyncio.sleep(0.5)  # the waiters' answers are on their way
        await server.stop(2.0)
        code = 70
    else:
        told.clear()
        drain = asyncio.create_task(server.drain(settings.drain_s))
        again = asyncio.create_task(told.wait())
        await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
        if drain.done():
            code = 0 if drain.result() else 1
        else:
            log.warning("told to stop again: ends without answering what it accepted")
            drain.cancel()
            await server.stop(0.0)
            code = 1
        again.cancel()
    for task in (show, ended, stopping):
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    if metrics is not None:
        metrics.shutdown()
        metrics.server_close()
    return code


def _set_up_logs(console: Console, level: str) -> None:
    from .logs import JsonLines, PlainLines

    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
        handler.setFormatter(PlainLines())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("scoring").setLevel(level.upper())
