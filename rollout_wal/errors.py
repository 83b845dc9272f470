"""Every error this package raises on purpose.

    RolloutWalError
    ├── BadInput (ValueError)        the caller's request is wrong; nothing was changed
    │   ├── BadPrompt                empty, out of the vocabulary, or longer than the model's context
    │   ├── BadSampling              sampling parameters that are out of range or cannot be honoured
    │   ├── UnknownRollout (KeyError)
    │   ├── CohortMismatch           a cohort of this name exists with other prompts or parameters
    │   └── CheckpointMismatch       a trainer's checkpoint and the log do not belong together
    ├── LogError
    │   ├── LogPoisoned              an I/O error; this writer accepts nothing more
    │   ├── LogDamaged               bytes that were acknowledged as durable cannot be read back
    │   ├── LogOwned                 another live process owns the log
    │   ├── LogFenced                another process took the log over; this one must stop
    │   ├── LogTooNew                written by a newer format than this version reads
    │   └── LogCorruptInput          bytes that are no log at all
    ├── ProvenanceError
    │   ├── UndeclaredWeights        the weights changed without a policy version that says so
    │   ├── ArchitectureMismatch
    │   └── TokenizerMismatch
    ├── BackendError
    │   ├── WorkerFailed             a worker failed in a way that restarting does not cure
    │   └── UnsupportedEngine        an engine of a version that the adapter was not made for
    │       └── HookMoved            what the adapter hooks into is gone or has changed
    ├── DatasetError                 its kinds are in `dataset.errors`
    ├── KvError
    ├── AuditError
    └── MissingExtra (ImportError)   an optional dependency is not installed

A message says three things: what happened, what follows from it, and what to do about it. `problem` builds one.
"""

from __future__ import annotations


def problem(what: str, *, consequence: str, remedy: str) -> str:
    """The message of an error: what happened, what follows from it, what to do about it."""
    return f"{what.rstrip('.')}. {consequence.rstrip('.')}. {remedy.rstrip('.')}."


class RolloutWalError(Exception):
    """The root of every error that this package raises on purpose."""


class BadInput(RolloutWalError, ValueError):
    """The caller's request is wrong. It was refused whole: nothing was logged and nothing changed."""


class BadPrompt(BadInput):
    """A prompt that is empty, holds token ids out of the vocabulary, or exceeds the model's context."""


class BadSampling(BadInput):
    """Sampling parameters out of range, or ones that this engine cannot honour on resume."""


class UnknownRollout(BadInput, KeyError):
    """A rollout id that the log has never seen, or has released."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class CohortMismatch(BadInput):
    """A cohort of this name is in the log with other prompts, parameters or seed."""


class CheckpointMismatch(BadInput):
    """A trainer's checkpoint and the log disagree on what was consumed, or do not belong together."""


class LogError(RolloutWalError):
    """Something about a log on disk, or about its writer."""


class LogPoisoned(LogError):
    """A write or sync failed. What was acknowledged is safe; this writer accepts nothing more."""


class LogDamaged(LogError):
    """Bytes that the log itself says were durable cannot be read back."""


class LogOwned(LogError):
    """Another live process on this machine holds the log."""


class LogFenced(LogError):
    """Another process took this log over. Whatever this one still holds must not be acknowledged."""


class LogTooNew(LogError):
    """Written by a newer format than this version reads."""


class LogCorruptInput(LogError):
    """Bytes that cannot be decoded as what they claim to be."""


class ProvenanceError(RolloutWalError):
    """A token would have been attributed to a model that did not produce it."""


class UndeclaredWeights(ProvenanceError):
    """The weights are not those of the logged policy version."""


class ArchitectureMismatch(ProvenanceError):
    """The log was written by a model of another architecture."""


class TokenizerMismatch(ProvenanceError):
    """The log was written with another tokenizer or chat template."""


class BackendError(RolloutWalError):
    """The rollout backend cannot go on."""


class WorkerFailed(BackendError):
    """A worker failed in a way that starting it again does not cure."""


class UnsupportedEngine(BackendError):
    """An inference engine of a version that its adapter was not made for."""


class HookMoved(UnsupportedEngine):
    """What the adapter hooks into is gone from the engine, or takes other parameters."""


class DatasetError(RolloutWalError):
    """A dataset folder, manifest or payload file that cannot be used as it is."""


class KvError(RolloutWalError):
    """A KV snapshot store that cannot be used as it is. Never a reason to lose a rollout."""


class AuditError(RolloutWalError):
    """The audit cannot say anything sound about the data that it was given."""


class MissingExtra(RolloutWalError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            problem(
                f"{purpose} needs the module {module!r}, which is not installed",
                consequence="Nothing else of rollout-wal is affected",
                remedy=f"Install it with: pip install 'rollout-wal[{extra}]'",
            )
        )
        self.module = module
        self.extra = extra
