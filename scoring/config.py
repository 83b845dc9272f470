"""A server's configuration: a YAML file whose every key is known, typed and checked before anything is loaded."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rollout_wal.errors import MissingExtra

from .auth import read_tokens
from .cache import ScoreCache
from .errors import BadConfiguration, problem
from .heads import HeadStore
from .residency import Residency
from .scheduler import Limits, Scheduler
from .server import ServerOptions
from .teachers.base import TeacherSource

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


@dataclass(frozen=True, slots=True)
class TeacherConfig:
    """One teacher.

    Args:
        model: its folder.
        engine: what runs it: "hf" (transformers, in the server's process), "vllm" or "sglang".
        precision: see `HfTeacherSource`, `EngineTeacherSource`.
        domains: labels that are routed to it.
        device: cpu, cuda, cuda:1, ...
        pinned: loaded first and never evicted: a reference model, say.
        frozen: score with a copy of the folder as it is when the server starts, for a student whose folder is
            written again later: the self-teacher.
        token_budget, share_prefixes: see `HfTeacherSource`, `EngineTeacherSource`.
        chunk_tokens: see `HfTeacherSource`. Engines cut by their token budget.
        kv_cache_bytes, max_context, python, engine_args: see `EngineTeacherSource`.
    """

    model: Path
    engine: str = "hf"
    precision: str = "bfloat16"
    domains: tuple[str, ...] = ()
    device: str = "cpu"
    pinned: bool = False
    frozen: bool = False
    token_budget: int = 8192
    chunk_tokens: int = 4096
    share_prefixes: bool = True
    kv_cache_bytes: int = 0
    max_context: int = 0
    python: Path | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)


#: Keys of a teacher that mean nothing under the other kind of engine.
_ENGINE_KEYS = frozenset({"kv_cache_bytes", "max_context", "python", "engine_args"})
_HF_KEYS = frozenset({"chunk_tokens"})


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A whole server.

    Args:
        teachers: by id.
        memory: bytes for all teachers that are in memory together: their weights, and the KV caches of those in
            engines. What a forward takes comes on top and is bounded by the token budget.
        max_wait_s, patience_s: see `Residency`.
        threads: of torch, and of each engine on a CPU; 0: their own choice.
        cache: folder of scores that were computed, and heads; None: none are kept.
        cache_bytes: of scores, at most.
        metrics: host:port for Prometheus; None: none are served.
        drain_s: how long a server that is told to stop goes on answering what it accepted.
        limits, server: see there.
    """

    teachers: Mapping[str, TeacherConfig]
    memory: int
    max_wait_s: float = 30.0
    patience_s: float | None = None
    threads: int = 0
    cache: Path | None = None
    cache_bytes: int = 8 << 30
    metrics: tuple[str, int] | None = None
    drain_s: float = 60.0
    limits: Limits = field(default_factory=Limits)
    server: ServerOptions = field(default_factory=ServerOptions)


def read_config(path: Path) -> ServeConfig:
    """The configuration in a YAML file; paths in it are relative to its folder.

    Raises:
        BadConfiguration: the file, the key, and what is wrong with it.
        MissingExtra: there is no YAML parser.
    """
    try:
        import yaml
    except ImportError:
        raise MissingExtra("yaml", "scoring", "reading a server's configuration") from None
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _bad(path, "", f"it cannot be read: {error}") from error
    reader = _Reader(path)
    top = reader.mapping("", raw)
    tls, auth = reader.mapping("tls", top.pop("tls", {})), top.pop("tokens_file", None)
    insecure = reader.boolean("insecure", top.pop("insecure", False))
    teachers = {
        reader.name("teachers", name): reader.teacher(f"teachers.{name}", entry)
        for name, entry in reader.mapping("teachers", top.pop("teachers", {})).items()
    }
    if not teachers:
        raise _bad(path, "teachers", "there is none")
    host, port = reader.address("listen", top.pop("listen", "127.0.0.1:50151"))
    shown = f"[{host}]" if ":" in host else host
    server = reader.fill("server", ServerOptions, top.pop("server", {}), not_here=_SERVER_ELSEWHERE)
    options = ServerOptions(
        **{
            **server,
            "address": f"{shown}:{port}",
            "tokens": read_tokens(reader.path("tokens_file", auth)) if auth is not None else (),
            **{name: reader.path(f"tls.{name}", value) for name, value in tls.items() if reader.known_tls(name)},
        }
    )
    if (
        not insecure
        and not _loopback(host)
        and not (options.certificate and (options.tokens or options.client_authorities))
    ):
        raise _bad(
            path,
            "listen",
            f"{host} can be reached from other machines, and the server would have no TLS, or neither tokens nor "
            "client authorities (tls.certificate and tls.private_key, and tokens_file or tls.client_authorities; or "
            "`insecure: true` where the network itself is trusted)",
        )
    limits = Limits(**reader.fill("limits", Limits, top.pop("limits", {})))
    config = {"teachers": teachers, "limits": limits, "server": options}
    if "memory" not in top:
        raise _bad(path, "memory", "it is missing")
    for name, read in (
        ("memory", reader.size),
        ("cache_bytes", reader.size),
        ("max_wait_s", reader.seconds),
        ("patience_s", reader.seconds),
        ("drain_s", reader.seconds),
        ("threads", reader.integer),
        ("cache", reader.path),
        ("metrics", reader.address),
    ):
        if name in top:
            config[name] = read(name, top.pop(name))
    if top:
        raise _bad(path, sorted(map(str, top))[0], "there is no such key")
    domains = [domain for teacher in teachers.values() for domain in teacher.domains]
    if twice := sorted({d for d in domains if domains.count(d) > 1}):
        raise _bad(path, "teachers", f"the domain {twice[0]!r} belongs to more than one teacher")
    return ServeConfig(**config)  # type: ignore[arg-type]


def build(config: ServeConfig) -> Scheduler:
    """The scheduler of a configuration: digests of all checkpoints are taken, nothing is loaded.

    Raises:
        BadConfiguration: a folder that holds no model, teachers that do not fit into memory.
    """
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    sources = [_source(name, teacher, config) for name, teacher in config.teachers.items()]
    residency = Residency(
        {source.info.id: source.info.nbytes for source in sources},
        config.memory,
        pinned=[name for name, teacher in config.teachers.items() if teacher.pinned],
        max_wait_s=config.max_wait_s,
        patience_s=config.patience_s,
    )
    cache = ScoreCache(config.cache / "scores", config.cache_bytes) if config.cache else None
    heads = HeadStore(config.cache / "heads") if config.cache else None
    return Scheduler(sources, residency, cache=cache, heads=heads, limits=config.limits)


def _source(name: str, teacher: TeacherConfig, config: ServeConfig) -> TeacherSource:
    from .teachers.hf import HfTeacherSource, freeze
    from .teachers.sglang import SglangTeacherSource
    from .teachers.vllm import VllmTeacherSource

    folder = freeze(teacher.model, config.cache) if teacher.frozen else teacher.model
    common: dict[str, Any] = {
        "precision": teacher.precision,
        "domains": teacher.domains,
        "device": teacher.device,
        "token_budget": teacher.token_budget,
        "share_prefixes": teacher.share_prefixes,
    }
    if teacher.engine == "hf":
        return HfTeacherSource(name, folder, **common, chunk_tokens=teacher.chunk_tokens)
    kind = VllmTeacherSource if teacher.engine == "vllm" else SglangTeacherSource
    return kind(
        name,
        folder,
        **common,
        kv_cache_bytes=teacher.kv_cache_bytes,
        max_context=teacher.max_context,
        python=teacher.python,
        threads=config.threads,
        engine_args=teacher.engine_args,
    )


_ENGINES = ("hf", "vllm", "sglang")
_SERVER_ELSEWHERE = frozenset({"address", "tokens", "certificate", "private_key", "client_authorities"})
_TLS = ("certificate", "private_key", "client_authorities")


class _Reader:
    """Values of a file, each read as what it must be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def mapping(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise _bad(self._path, key, "it is no mapping of names")
        return dict(value)

    def name(self, key: str, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise _bad(self._path, key, f"{value!r} is no name for a teacher (letters, digits, . _ / -; at most 100)")
        return value

    def teacher(self, key: str, value: Any) -> TeacherConfig:
        entry = self.fill(key, TeacherConfig, value)
        if "model" not in entry:
            raise _bad(self._path, key, "it names no model")
        engine = entry.get("engine", "hf")
        if engine not in _ENGINES:
            raise _bad(self._path, f"{key}.engine", f"{engine!r} is none of {', '.join(_ENGINES)}")
        if strange := sorted(set(entry) & (_ENGINE_KEYS if engine == "hf" else _HF_KEYS)):
            raise _bad(self._path, f"{key}.{strange[0]}", f"it means nothing to a teacher of `engine: {engine}`")
        return TeacherConfig(**entry)

    def fill(self, key: str, kind: Any, value: Any, *, not_here: frozenset[str] = frozenset()) -> dict[str, Any]:
        """Fields of a dataclass, by the types that it declares."""
        readers = {
            "int": self.integer,
            "float": self.seconds,
            "bool": self.boolean,
            "str": self.text,
            "Path": self.path,
            "Path | None": self.path,
            "Mapping[str, Any]": self.mapping,
            "tuple[str, ...]": self.texts,
        }
        known = {f.name: readers[str(f.type)] for f in fields(kind) if f.name not in not_here}
        out = {}
        for name, entry in self.mapping(key, value).items():
            if name not in known:
                raise _bad(self._path, f"{key}.{name}", f"there is no such key (known: {', '.join(sorted(known))})")
            read = self.size if name.endswith("_bytes") else known[name]
            out[name] = read(f"{key}.{name}", entry)
        return out

    def known_tls(self, name: str) -> bool:
        if name not in _TLS:
            raise _bad(self._path, f"tls.{name}", f"there is no such key (known: {', '.join(_TLS)})")
        return True

    def integer(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _bad(self._path, key, f"{value!r} is no whole number from 0 up")
        return value

    def seconds(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise _bad(self._path, key, f"{value!r} is no number of seconds")
        return float(value)

    def boolean(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise _bad(self._path, key, f"{value!r} is neither true nor false")
        return value

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise _bad(self._path, key, f"{value!r} is no text")
        return value

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise _bad(self._path, key, f"{value!r} is no list")
        return tuple(self.text(key, entry) for entry in value)

    def path(self, key: str, value: Any) -> Path:
        return self._path.parent / Path(self.text(key, value)).expanduser()

    def size(self, key: str, value: Any) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", str(value))
        if isinstance(value, bool) or not match or match[2] not in _UNITS:
            raise _bad(self._path, key, f"{value!r} is no size, such as 24GiB or {1 << 30}")
        return int(float(match[1]) * _UNITS[match[2]])

    def address(self, key: str, value: Any) -> tuple[str, int]:
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\s]+)):([0-9]{1,5})", str(value))
        if not match or int(match[3]) > 65535:
            raise _bad(self._path, key, f"{value!r} is no address, such as 127.0.0.1:50151")
        return match[1] or match[2], int(match[3])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bad(path: Path, key: str, what: str) -> BadConfiguration:
    return BadConfiguration(
        problem(
            f"{path}{f', {key}' if key else ''}: {what}",
            consequence="The server did not start",
            remedy="Correct the file; docs/scoring.md describes every key",
        )
    )
