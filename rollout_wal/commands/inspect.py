"""`rollout-wal inspect`: what is in a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..engines.base import FinishReason
from ..job_state import Rollout, Status
from ..job_view import JobView
from ..records import Observe
from ._output import JSON, PATH, print_facts, print_json, print_table


@click.command()
@PATH
@JSON
@click.option("--rollout", type=int, help="One rollout: its events, and every token with logprob and policy version.")
@click.option("--limit", default=50, show_default=True, help="Rows of a table; JSON is always whole.")
def inspect(path: Path, as_json: bool, rollout: int | None, limit: int) -> None:
    """Show the rollouts in the logs under PATH, or one of them. Reads what is durable; the logs may be in use."""
    view = JobView(path)
    view.refresh()
    if rollout is not None:
        _show_one(view, view.rollout(rollout), as_json, limit)
        return
    rows = [summary(view, r) for r in view.job.rollouts.values()]
    if as_json:
        print_json({"counts": view.counts(), "rollouts": rows})
        return
    print_facts(str(path), view.counts())
    print_table(
        f"rollouts ({min(len(rows), limit)} of {len(rows)})",
        ("id", "cohort", "index", "status", "attempts", "tokens", "delivered", "consumed"),
        [
            [row[k] for k in ("id", "cohort", "index", "status", "attempts", "tokens", "delivered", "consumed")]
            for row in rows[:limit]
        ],
    )


def summary(view: JobView, r: Rollout) -> dict[str, Any]:
    """One line about a rollout."""
    status = r.status.value
    if r.status is Status.CENSORED and r.censor is not None:
        status = f"censored ({r.censor.reason})"
    elif r.finish is not None:
        status = f"finished ({FinishReason(r.finish.reason).name.lower()})"
    return {
        "id": r.id,
        "cohort": r.begin.cohort,
        "index": r.begin.index,
        "status": status,
        "attempts": len(r.attempts),
        "interruptions": r.interruptions,
        "prompt_tokens": len(r.begin.prompt),
        "tokens": len(view.tokens(r)),
        "delivered": r.delivered,
        "consumed": list(r.consumed) if r.consumed else None,
    }


def events(r: Rollout) -> list[dict[str, Any]]:
    """What happened to a rollout, in order."""
    out: list[dict[str, Any]] = [
        {"event": "begin", "seed": r.begin.seed, "noise": r.begin.noise, "sampling": r.begin.sampling}
    ]
    for h in r.history:
        if isinstance(h, Observe):
            out.append({"event": "observe", "position": h.position, "tokens": h.tokens.tolist()})
        else:
            out.append({"event": "attempt", "attempt": h.attempt, "start": h.start, "log": h.log, "cause": h.cause})
    if r.finish is not None:
        out.append({"event": "finish", "count": r.finish.count, "reason": FinishReason(r.finish.reason).name.lower()})
    if r.censor is not None:
        out.append({"event": "censor", "count": r.censor.count, "reason": r.censor.reason})
    if r.delivered:
        out.append({"event": "delivered"})
    if r.consumed is not None:
        out.append({"event": "consumed", "epoch": r.consumed[0], "step": r.consumed[1]})
    return out


def _show_one(view: JobView, r: Rollout, as_json: bool, limit: int) -> None:
    tokens = view.tokens(r)

    def masked(values: list[float], valid: list[bool]) -> list[float | None]:
        return [v if ok else None for v, ok in zip(values, valid)]

    columns = {
        "token": tokens.token_T.tolist(),
        "sampled": tokens.sampled_T.tolist(),
        "logprob": masked(tokens.logprob.value_T.tolist(), tokens.logprob.valid_T.tolist()),
        "sampling_logprob": masked(tokens.sampling_logprob.value_T.tolist(), tokens.sampling_logprob.valid_T.tolist()),
        "policy_version": masked(tokens.version_T.tolist(), tokens.sampled_T.tolist()),
    }
    if as_json:
        whole = {**summary(view, r), "prompt": r.begin.prompt.tolist(), "events": events(r), **columns}
        print_json(whole)
        return
    print_facts(f"rollout {r.id}", summary(view, r))
    print_table(
        "events",
        ("event", ""),
        [(e["event"], ", ".join(f"{k} {v}" for k, v in e.items() if k != "event")) for e in events(r)],
    )
    shown = zip(range(limit), *columns.values())
    print_table(f"tokens ({min(limit, len(tokens))} of {len(tokens)})", ("position", *columns), list(shown))
