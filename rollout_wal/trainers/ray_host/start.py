"""The actor of a rollout host: started, or found by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from ...backend.spec import EngineSpec
from ...errors import BadInput, MissingExtra, problem
from .host import RolloutHost

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise MissingExtra(error.name or "ray", "ray", "a rollout backend on Ray") from None

#: The actor's name, if none is given.
DEFAULT_NAME: Final = "rollout-wal"

#: An actor that is up answers at once; one that died while it started is known to be dead at once.
_ANSWERS_S: Final = 10.0

#: By namespace and name, what this process has started or found. Ray ends an actor that is not detached when the handle
#: of the call that started it is collected, and does not count those that were looked up by name.
_kept: dict[tuple[str, str], Any] = {}


def start_host(
    engine: EngineSpec | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT_NAME,
    namespace: str | None = None,
    detached: bool = False,
    shared: bool = False,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Any:
    """The host of this name, started if there is none, or one that could not start. Ray restarts it when it dies, as
    often as it takes.

    It lives as long as the process that started it, whoever keeps its handle, or until `ray.kill`.

    Args:
        engine, path, options: of the `RolloutBackend`.
        name, namespace: by which `get_host` finds it.
        detached: it outlives the Ray job that started it, and so do its rollouts: a trainer that is started again finds
            it at work.
        shared: `path` is on a file system that every node sees, so the host may be restarted on any node, and takes
            the job over there from one that may only be cut off. Otherwise it stays on the caller's node, with logs.
        num_cpus, num_gpus: what Ray sets aside for the host and its workers.

    Returns:
        Ray's handle of the actor: `await host.generate.remote(...)`, or `ray.get` of it.
    """
    _make_room(name, namespace)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RolloutHost).options(
        name=name,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached" if detached else None,
        # Forever: each restart goes on where the log ends, and callers get their answer from the next one.
        max_restarts=-1,
        max_task_retries=-1,
        # Callers wait inside for their rollouts.
        max_concurrency=1 << 16,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        scheduling_strategy=here if not shared else "DEFAULT",
    )
    model = engine if isinstance(engine, EngineSpec) else os.fspath(engine)
    handle = actor.remote(model, str(Path(path).resolve()), options, shared)
    place = (namespace or ray.get_runtime_context().namespace, name)
    kept = _kept.get(place)
    if kept is None or kept._actor_id != handle._actor_id:
        _kept[place] = handle
    return handle


def _make_room(name: str, namespace: str | None) -> None:
    """An actor that failed while it started, or whose node is gone, is dead for good, and keeps its name as long as
    anybody has its handle. One that does not answer in time is at its start, or waits for its resources."""
    try:
        found = ray.get_actor(name, namespace=namespace)
    except ValueError:
        return
    try:
        ray.get(found.pid.remote(), timeout=_ANSWERS_S)
    except ray.exceptions.GetTimeoutError:
        return
    except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError):
        ray.kill(found, no_restart=True)
        place = (namespace or ray.get_runtime_context().namespace, name)
        if (kept := _kept.get(place)) is not None and kept._actor_id == found._actor_id:
            del _kept[place]


def get_host(name: str = DEFAULT_NAME, namespace: str | None = None) -> Any:
    """The handle of a host that somebody has started.

    Raises:
        BadInput: there is none of this name.
    """
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        raise BadInput(
            problem(
                f"no rollout host is called {name!r} on this Ray cluster",
                consequence="Nothing was sampled",
                remedy="Call start_host first, in the same namespace or with the same `namespace`",
            )
        ) from None
