"""Metadata rows: what is known of a sample without touching its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from .errors import DatasetMismatch, problem
from .extras import extras_to_json
from .payload import Location
from .sample import ColumnGroup, Sample
from .schema import INDEX_SCHEMA, METADATA_SCHEMA

#: Fields of a metadata row that are fields of a sample by the same name, and nothing else.
_COPIED = (
    "rollout",
    "group",
    "prompt_length",
    "response_length",
    "domain",
    "teachers",
    "finish_reason",
    "censored",
    "reward",
    "interruptions",
    "router_id",
    "router_version",
    "router_reason",
    "verifier_version",
    "tokenizer_digest",
    "chat_template_digest",
    "engine",
    "engine_version",
    "architecture_digest",
    "seed",
)


def location_columns(file: str, locations: Sequence[Location]) -> dict[str, list[Any]]:
    """The columns that say where a row's payload is."""
    return {
        "payload_file": [file] * len(locations),
        "payload_batch": [at.batch for at in locations],
        "payload_row": [at.row for at in locations],
        "payload_offset": [at.offset for at in locations],
        "payload_bytes": [at.bytes for at in locations],
        "payload_raw_bytes": [at.raw_bytes for at in locations],
    }


def metadata_table(
    samples: Sequence[Sample],
    *,
    loss_tokens: Sequence[int],
    checksums: Sequence[int],
    file: str,
    locations: Sequence[Location],
) -> Any:
    """One row per sample, in their order.

    Raises:
        DatasetMismatch: extras or sampling parameters that are no plain types.
    """
    versions = [[v for v, _ in s.policy_runs] for s in samples]
    columns: dict[str, Any] = {name: [getattr(s, name) for s in samples] for name in _COPIED}
    columns |= {
        "sample": [s.key for s in samples],
        "loss_tokens": list(loss_tokens),
        "policy_version_start": [v[0] if v else None for v in versions],
        "policy_version_min": [min(v, default=None) for v in versions],
        "policy_version_max": [max(v, default=None) for v in versions],
        "policy_versions": versions,
        "policy_version_tokens": [[n for _, n in s.policy_runs] for s in samples],
        "sampling": [_json(s, "sampling") for s in samples],
        "extras": [_json(s, "extras") for s in samples],
        "sealed_at": [datetime.now(UTC)] * len(samples),
        "tokens_crc32c": list(checksums),
    }
    columns |= location_columns(file, locations)
    return pa.table([columns[f.name] for f in METADATA_SCHEMA], schema=METADATA_SCHEMA)


def index_table(
    keys: Sequence[str],
    groups: Sequence[ColumnGroup],
    checksums: Sequence[int],
    file: str,
    locations: Sequence[Location],
) -> Any:
    """Where the rows of another group's payload file are, and who computed them."""
    who = [g.provenance for g in groups]
    columns: dict[str, Any] = {
        "sample": list(keys),
        "tokens_crc32c": list(checksums),
        "source": [p.source if p else None for p in who],
        "checkpoint": [p.checkpoint if p else None for p in who],
        "tokenizer_digest": [p.tokenizer_digest if p else None for p in who],
        "chat_template_digest": [p.chat_template_digest if p else None for p in who],
        "precision": [p.precision if p else None for p in who],
    }
    columns |= location_columns(file, locations)
    return pa.table([columns[f.name] for f in INDEX_SCHEMA], schema=INDEX_SCHEMA)


def _json(sample: Sample, name: str) -> str:
    try:
        return extras_to_json(getattr(sample, name))
    except (TypeError, ValueError) as error:
        raise DatasetMismatch(
            problem(
                f"sample {sample.key!r}: its {name} cannot be kept as JSON: {error}",
                consequence="Nothing of this call was written",
                remedy="Use strings, bytes, numbers, booleans, None, and lists and mappings of them",
            )
        ) from error
