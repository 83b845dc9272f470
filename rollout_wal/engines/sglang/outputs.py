"""What a scheduler sends, held until the log is durable.

Tokens, and everything that would overtake them (the answer to an abort, say), wait in one queue in the order in which
SGLang sent them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..common.step_log import StepLog

Held = tuple[Any, Any, Any]
"""A sender, what it is to send, and the request that it answers."""


class HeldSender:
    """In the place of one of the scheduler's senders: what it is given to send joins the queue."""

    def __init__(self, sender: Any, step_log: StepLog[Held]) -> None:
        self._sender = sender
        self._log = step_log
        self.socket = sender.socket

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        self._log.hold((self._sender, output, recv_obj))


class Outputs:
    """The queue of one scheduler, from the moment that this is made.

    The sync runs while the next step computes, so a step's outputs leave at the start of the turn after the next one.
    """

    def __init__(self, scheduler: Any, step_log: StepLog[Held]) -> None:
        self._scheduler = scheduler
        self._log = step_log
        channels = scheduler.ipc_channels
        channels = replace(
            channels,
            send_to_tokenizer=HeldSender(channels.send_to_tokenizer, step_log),
            send_to_detokenizer=HeldSender(channels.send_to_detokenizer, step_log),
        )
        scheduler.ipc_channels = channels
        scheduler.output_streamer.send_to_detokenizer = channels.send_to_detokenizer

    def turn(self) -> None:
        """At the start of each turn of the scheduler's loop: let go of what is durable."""
        if not self._log.holding:
            return
        s = self._scheduler
        computing = not s._engine_paused and (s.last_batch is not None or s.waiting_queue or s.running_batch.reqs)
        if not computing:
            self._log.flush()  # no step will come whose time the sync could use
        self.let_go()

    def let_go(self) -> None:
        """Send what is durable. Does not wait."""
        for sender, output, recv_obj in self._log.take():
            sender.send_output(output, recv_obj)

    def drain(self) -> None:
        """Before a pause, new weights or an end: everything that was sampled is durable and sent."""
        self._log.flush()
        self.let_go()
