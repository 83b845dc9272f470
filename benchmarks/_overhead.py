"""What the benchmarks of the log inside an engine share: the model, what is told of a series, the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ._common import show

HIDDEN, LAYERS = 512, 8


def make_model(folder: Path, hidden: int = HIDDEN, layers: int = LAYERS) -> Path:
    """A Llama with random weights, large enough that a step is no toy and small enough for a processor."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of such a benchmark: quick, path, folder."""
    for option in (
        click.option(
            "--folder", type=click.Path(path_type=Path), default=None, help="Where the log is; a disk, not a tmpfs."
        ),
        click.option("--json", "path", type=click.Path(path_type=Path), help="Write the numbers to this file."),
        click.option("--quick", is_flag=True, help="Fewer steps."),
    ):
        command = option(command)
    return command


def share_of(hook_s: Sequence[float], step_s: Sequence[float]) -> dict[str, float]:
    """The hook's share of each step."""
    shares = [hook / step for hook, step in zip(hook_s, step_s, strict=True)]
    return {
        "p50": statistics.median(shares),
        "p99": statistics.quantiles(shares, n=100)[98],
        "hook_us_p50": 1e6 * statistics.median(hook_s),
        "step_ms_p50": 1e3 * statistics.median(step_s),
    }


def ratio_of(ratios: Sequence[float]) -> dict[str, Any]:
    """Throughput with over without, of pairs of blocks that were run side by side."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "quartiles": [low, high], "pairs": len(ratios)}


def show_shares(title: str, shares: Mapping[int, Mapping[str, float]]) -> None:
    """By number of requests."""
    show(
        title,
        ["requests", "p50", "p99", "hook µs", "step ms"],
        [
            [n, f"{s['p50']:.2%}", f"{s['p99']:.2%}", f"{s['hook_us_p50']:.0f}", f"{s['step_ms_p50']:.1f}"]
            for n, s in shares.items()
        ],
    )


def show_ratios(title: str, rates: Mapping[int, Mapping[str, Any]]) -> None:
    """By number of requests; tokens/s are those without the log."""
    show(
        title,
        ["requests", "ratio", "quartiles", "tokens/s without"],
        [
            [
                n,
                f"{r['ratio']:.3f}",
                "–".join(f"{q:.3f}" for q in r["quartiles"]),
                f"{r['tokens_per_s_without']:,.0f}",
            ]
            for n, r in rates.items()
        ],
    )
