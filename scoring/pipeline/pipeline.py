"""The stages between prompts and the learner.

    prompts ─▶ engine ─▶ sealed in the dataset ─▶ scored ─▶ learner ─▶ consumed
               (log)     (metadata, tokens)       (column groups)      (log)

A batch is a closed cohort: the learner gets batches in the order in which they were submitted, each with all its
rollouts, and never the first ones that happen to be ready. Taking those would train on short rollouts first and drop
long ones as stale.

Killed anywhere, it starts again from what is durable: rollouts that were not consumed come out of the log again under
their keys, those that are in the dataset are not sealed twice, and those that have scores are not scored twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rollout_wal.backend import RolloutBackend
from rollout_wal.dataset import DatasetWriter, open_dataset
from rollout_wal.dataset.freshness import removed_by_length
from rollout_wal.params import SamplingParams

from ..client import ClientOptions
from ..items import Wanted
from ..routing import Router
from ..stored import stored_pins
from .batch import ScoredBatch, read_batch
from .options import PipelineOptions, PromptBatch
from .stages import Stages
from .state import PipelineStats

_T = TypeVar("_T")


class Pipeline(AbstractContextManager["Pipeline"]):
    """Joins an engine, scoring servers and a learner. Use as a context manager around the training loop.

        with RolloutBackend(...) as backend, Pipeline(backend, "data", ["host:50151"], prompts, sampling, ...) as pipe:
            for batch in pipe:
                train(batch)
                save_checkpoint(model, optimizer, pipe.trained(batch, step))
                pipe.commit()
                pipe.update_weights(folder, backend.policy_version + 1)

    What `trained` returns belongs into the same checkpoint as the weights. A checkpoint need not be made at every step:
    batches that were trained on since the last one come again after a crash, as its weights have not seen them.

    Args:
        backend: running.
        folder: the dataset that it is delivered to, and scored in.
        targets: host:port of scoring servers.
        prompts: the batch of a number, from 0; None ends the sequence. The same number must always give the same
            batch: it is asked for again after a restart.
        sampling: of all rollouts.
        router: which teachers score a rollout.
        wanted: what they compute; see `scoring.tasks` for the columns.
        temperature: that teachers' logits are divided by.
        state: of the checkpoint that the learner goes on from.
        version: of the policy that is in force; None: the backend's.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        folder: str | Path,
        targets: Sequence[str],
        prompts: Callable[[int], PromptBatch | None],
        sampling: SamplingParams,
        *,
        router: Router,
        wanted: Wanted | None = None,
        temperature: float = 1.0,
        options: PipelineOptions | None = None,
        client: ClientOptions | None = None,
        state: Mapping[str, Any] | None = None,
        version: int | None = None,
    ) -> None:
        self._backend, self._folder = backend, Path(folder)
        self.options = options or PipelineOptions()
        self._version = version
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pipeline", daemon=True)
        self._make_stages = partial(
            Stages,
            targets=list(targets),
            prompts=prompts,
            sampling=sampling,
            router=router,
            wanted=wanted or Wanted(),
            temperature=temperature,
            options=self.options,
            client=client,
            state=dict(state or {}),
            loop=self._loop,
        )

    def __enter__(self) -> Pipeline:
        writer = DatasetWriter(
            self._folder, writer_id="pipeline", check_fence=self._backend.check_fence, default_compression="zstd"
        )
        # Scores that are there and scores that come are of one checkpoint, whatever servers have by now.
        pins = stored_pins(open_dataset(self._folder, check_files=False))
        version = self._backend.policy_version if self._version is None else self._version
        self._stages = self._make_stages(self._backend, writer, pins=pins, version=version)
        self._thread.start()
        self._call(self._stages.start())
        return self

    def __exit__(self, *_: object) -> None:
        """Stop. What was not consumed comes again with the next start."""
        self._call(self._stages.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    # -- the learner's side -------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ScoredBatch]:
        """Batches in order, as they are complete; ends with the prompts.

        Raises:
            Whatever stopped a stage: no server, a full disk, a dead backend. Everything that was acknowledged is
            durable, and the next start goes on with it.
        """
        while (found := self._call(self._stages.next_batch())) is not None:
            batch, keys = found
            yield read_batch(self._folder, batch.number, batch.uses, keys, batch.size, batch.left_out)

    def trained(self, batch: ScoredBatch, step: int) -> dict[str, Any]:
        """The learner's weights contain the batch, as of optimizer step `step`.

        Returns:
            What the checkpoint with these weights must hold, in plain types: `state` of the next start.
        """
        return self._call(self._stages.mark(batch.number, step))

    def commit(self) -> None:
        """The checkpoint that holds the state that `trained` returned last is durable: what it contains is consumed.

        Durable when this returns: none of it ever comes again. After a crash before it, the state says the same.
        """
        self._call(self._stages.consume())

    def update_weights(self, source: Any, version: int) -> str:
        """As `RolloutBackend.update_weights`; what is fresh is counted from the new version."""
        digest = self._backend.update_weights(source, version)
        self._stages.version = version
        self._loop.call_soon_threadsafe(self._stages.notify)
        return digest

    def stats(self) -> PipelineStats:
        """What is where, now."""
        return self._call(self._stages.look())

    def removed_by_length(self) -> Any:
        """What the freshness window removed, by response length: see `rollout_wal.dataset.freshness`."""
        pairs = list(self._stages.lengths)
        return removed_by_length(np.array([n for n, _ in pairs], np.int64), np.array([k for _, k in pairs], np.bool_))

    @property
    def version(self) -> int:
        """Of the policy: what freshness is counted from."""
        return self._stages.version

    @property
    def failures(self) -> list[str]:
        """Why the last samples that no teacher could score were left out."""
        return list(self._stages.failures)

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
