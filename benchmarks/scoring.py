"""The teacher-scoring service beside what it is built on.

    python -m benchmarks.scoring [--quick] [--part PART ...] --json FILE

- Throughput at saturation: items streamed to a server in another process, over a bare length-sorted loop of batched
  forwards of the same model in this process, with the same token budget and threads. In pairs.
- A group of 8 (1,024 shared tokens and 256 of its own each) through the server, with prefixes shared and not. Theory:
  8 · 1,280 / (1,024 + 8 · 256) = 3.33.
- Ten teachers with memory for three and random arrivals: loads, over the fewest that an offline schedule needs that
  knows all arrivals and lets no item wait longer; and how long items waited.
- The wire: encoding, loopback and decoding of results, beside lists in JSON over HTTP and base64 in JSON over HTTP.
- Latency under open-loop load of two thirds of the saturated throughput.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scoring.client import ScoringClient
from scoring.items import ScoreItem, Scores
from scoring.load_generator import generate_load

from ._common import save, show
from ._scoring_loads import MAX_WAIT_S, measure_loads
from ._scoring_server import ServerProcess
from ._scoring_wire import measure_wire

BUDGET = 8192
THREADS = 2
GROUP, SHARED, OWN = 8, 1024, 256
THEORY = GROUP * (SHARED + OWN) / (SHARED + GROUP * OWN)


def make_model(folder: Path) -> int:
    """A random Llama; returns its number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_items(lengths: Sequence[int], rng: np.random.Generator, teacher: str = "t") -> list[ScoreItem]:
    return [ScoreItem(rng.integers(0, 8192, n).astype(np.int32), (1, n), teacher) for n in lengths]


def bare_plan(items: Sequence[ScoreItem]) -> list[list[ScoreItem]]:
    """Sorted by length, longest first, cut where padding included the budget is reached."""
    batches: list[list[ScoreItem]] = []
    for item in sorted(items, key=lambda i: -len(i.token_ids)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].token_ids) > BUDGET:
            batches.append([])
        batches[-1].append(item)
    return batches


@torch.inference_mode()
def bare(model: Any, items: Sequence[ScoreItem]) -> float:
    """Seconds of a loop over forwards that give logits, and of nothing else."""
    started = time.perf_counter()
    for batch in bare_plan(items):
        ids = torch.zeros(len(batch), len(batch[0].token_ids) - 1, dtype=torch.long)
        for row, item in zip(ids, batch):
            row[: len(item.token_ids) - 1] = torch.from_numpy(item.token_ids[:-1].astype(np.int64))
        model(input_ids=ids, use_cache=False)
    return time.perf_counter() - started


def served(client: ScoringClient, items: Sequence[ScoreItem]) -> float:
    started = time.perf_counter()
    for _, outcome in client.score(items):
        if not isinstance(outcome, Scores):
            raise outcome
    return time.perf_counter() - started


def measure_throughput(client: ScoringClient, model: Any, pairs: int, count: int) -> dict[str, Any]:
    rng, order = np.random.default_rng(0), random.Random(0)
    ratios, rates = [], []
    for _ in range(pairs):
        items = make_items([int(n) for n in rng.integers(512, 2049, count)], rng)
        tokens = sum(len(item.token_ids) for item in items)
        took = {
            which: bare(model, items) if which == "bare" else served(client, items)
            for which in order.sample(("bare", "served"), 2)
        }
        ratios.append(took["bare"] / took["served"])
        rates.append(tokens / took["served"])
    return {
        "ratio_to_bare_forward": statistics.median(ratios),
        "ratio_to_bare_forward_all": ratios,
        "tokens_per_second": statistics.median(rates),
    }


def measure_sharing(shared: ScoringClient, unshared: ScoringClient, pairs: int) -> dict[str, Any]:
    rng, order = np.random.default_rng(1), random.Random(1)
    speedups = []
    for _ in range(pairs):
        prompt = rng.integers(0, 8192, SHARED).astype(np.int32)
        items = [
            ScoreItem(
                np.concatenate((prompt, rng.integers(0, 8192, OWN).astype(np.int32))), (SHARED, SHARED + OWN), "t"
            )
            for _ in range(GROUP)
        ]
        took = {client: served(client, items) for client in order.sample((shared, unshared), 2)}
        speedups.append(took[unshared] / took[shared])
    speedup = statistics.median(speedups)
    return {
        "prefix_sharing_speedup": speedup,
        "prefix_sharing_speedup_all": speedups,
        "prefix_sharing_ratio_to_theory": speedup / THEORY,
    }


def measure_latency(target: str, tokens_per_second: float, count: int) -> dict[str, Any]:
    """Open loop: arrivals do not wait for answers."""
    rng = np.random.default_rng(2)
    items = make_items([int(n) for n in rng.integers(512, 2049, count)], rng)
    mean_s = float(np.mean([len(item.token_ids) for item in items])) / tokens_per_second / (2 / 3)
    report = asyncio.run(generate_load(target, items, 1.0 / mean_s, seed=2))
    if report.failures:
        raise RuntimeError(f"not all items were scored: {report.failures}")
    took = report.latencies_s
    return {
        "p50_latency_ms": 1000 * float(np.quantile(took, 0.5)),
        "p99_latency_ms": 1000 * float(np.quantile(took, 0.99)),
        "latency_items": count,
    }


def measure_model(folder: Path, wanted: set[str], quick: bool, tokens_per_second: float) -> dict[str, Any]:
    """What needs the large model."""
    result: dict[str, Any] = {"parameters": make_model(folder / "model")}
    teacher = {"model": "model", "precision": "float32", "pinned": True, "token_budget": BUDGET}
    config = {"memory": "8GiB", "threads": THREADS, "teachers": {"t": teacher}}
    warm = make_items([64], np.random.default_rng(3))
    with ServerProcess(folder / "shared.yaml", config) as server, ScoringClient([server.target]) as client:
        served(client, warm)
        if "throughput" in wanted:
            model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
            bare(model, warm)
            result.update(measure_throughput(client, model, 1 if quick else 3, 4 if quick else 8))
            tokens_per_second = result["tokens_per_second"]
            del model
        if "latency" in wanted:
            if not tokens_per_second:
                raise click.UsageError("latency needs the throughput: measure that part too, or first")
            result.update(measure_latency(server.target, tokens_per_second, 3 if quick else 16))
        if "sharing" in wanted:
            unshared = {**config, "teachers": {"t": {**teacher, "share_prefixes": False}}}
            with ServerProcess(folder / "unshared.yaml", unshared) as two, ScoringClient([two.target]) as other:
                served(other, warm)
                result.update(measure_sharing(client, other, 1 if quick else 2))
    return result


PARTS = ("wire", "throughput", "latency", "sharing", "loads")


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these, beside what the file holds."
)
def main(quick: bool, json_path: Path | None, parts: tuple[str, ...]) -> None:
    torch.set_num_threads(THREADS)
    result: dict[str, Any] = {"token_budget": BUDGET, "threads": THREADS, "group": [GROUP, SHARED, OWN]}
    if parts and json_path is not None and json_path.exists():
        kept = json.loads(json_path.read_text())
        result = {key: value for key, value in kept.items() if key not in ("date", "quick", "hardware")} | result
    wanted = set(parts or PARTS)
    if "wire" in wanted:
        result["wire"] = measure_wire(4096 if quick else 16_384, 3 if quick else 5)
        top = result["wire"]["top64"]
        result["topk_wire_ratio_to_json"] = top["json_us"] / top["ours_us"]
        result["topk_wire_ratio_to_base64"] = top["base64_us"] / top["ours_us"]
    with tempfile.TemporaryDirectory() as name:
        if wanted & {"throughput", "latency", "sharing"}:
            result.update(measure_model(Path(name), wanted, quick, result.get("tokens_per_second", 0.0)))
        if "loads" in wanted:
            result.update(measure_loads(Path(name), 15.0 if quick else 60.0))
    save(json_path, result, quick=quick)
    rows = [
        ("tokens/s at saturation", "tokens_per_second", "{:.0f}", ""),
        ("  over a bare loop of forwards", "ratio_to_bare_forward", "{:.3f}", "at least 0.92"),
        ("a group of 8, prompt shared", "prefix_sharing_speedup", "{:.2f} ×", f"theory {THEORY:.2f} ×"),
        ("loads of teachers over the fewest", "teacher_loads_ratio_to_min", "{:.2f}", "at most 1.2"),
        ("  longest wait, seconds", "teacher_wait_max_s", "{:.1f}", f"bound {MAX_WAIT_S:.1f}"),
        ("top 64 on the wire, JSON lists over ours", "topk_wire_ratio_to_json", "{:.1f}", "at least 10"),
        ("  base64 in JSON over ours", "topk_wire_ratio_to_base64", "{:.1f}", "at least 3"),
        ("latency at 2/3 load, p99", "p99_latency_ms", "{:.0f} ms", ""),
    ]
    show(
        "Teacher scoring",
        ("", "measured", "beside"),
        [(text, form.format(result[key]), beside) for text, key, form, beside in rows if key in result],
    )


if __name__ == "__main__":
    main()
