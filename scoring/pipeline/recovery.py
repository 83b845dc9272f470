"""What the dataset says of samples that were sealed before a restart."""

from __future__ import annotations

from pathlib import Path

from rollout_wal.dataset import Dataset, extras_from_json, open_dataset

from ..items import Wanted
from ..routing import Route, recorded
from ..tasks import groups_of


def known(folder: Path, keys: set[str], wanted: Wanted) -> dict[str, tuple[tuple[Route, ...], frozenset[str]]]:
    """(routes, teachers whose scores are there) of these samples. The dataset's routes count, not a router's of today.

    Raises:
        DatasetError: it cannot be read.
    """
    if not keys:
        return {}
    dataset = open_dataset(folder, check_files=False)
    found: dict[str, tuple[tuple[Route, ...], frozenset[str]]] = {}
    scored: dict[str, set[str]] = {}
    for row in dataset.metadata(["sample", "teachers", "extras"]).to_pylist():
        if row["sample"] not in keys:
            continue
        routes = recorded(row["teachers"], extras_from_json(row["extras"] or "{}"))
        for route in routes:
            if route.teacher not in scored:
                scored[route.teacher] = _scored_under(dataset, route.teacher, wanted)
        found[row["sample"]] = routes, frozenset(r.teacher for r in routes if row["sample"] in scored[r.teacher])
    return found


def _scored_under(dataset: Dataset, teacher: str, wanted: Wanted) -> set[str]:
    groups = groups_of(teacher, wanted)
    sets = [dataset.keys_with(name) if name in dataset.groups else set() for name in groups]
    return set.intersection(*sets) if sets else set()
