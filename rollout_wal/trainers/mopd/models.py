"""Tiny language models over characters: made, taught by examples, and measured by greedy decoding.

Shape legend: B = sequences, L = tokens of the longest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ...engines.hf.weights import no_progress_bars
from .tasks import Problem, reward

_CHARACTERS = "0123456789+-=<>"
_PAD, _EOS = "<pad>", "<eos>"
_VOCABULARY = 32
PAD_ID, EOS_ID = 0, 1
_IDS = {c: i + 2 for i, c in enumerate(_CHARACTERS)}
_TEXT = {i: c for c, i in _IDS.items()}
#: Characters of the longest answer, and the end of sequence.
MAX_ANSWER_TOKENS = 8

HIDDEN = 96
_LAYERS = 3


def encode(text: str) -> list[int]:
    """Token ids, one per character; no end of sequence."""
    return [_IDS[c] for c in text]


def decode(token_ids: Sequence[int]) -> str:
    """Characters up to the end of sequence; `?` for a token that stands for none."""
    out = []
    for token in token_ids:
        if token == EOS_ID:
            break
        out.append(_TEXT.get(int(token), "?"))
    return "".join(out)


def make_model(seed: int) -> Any:
    """A Llama of 3 layers with random weights, float32."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HIDDEN // 4,
        max_position_embeddings=64,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def load_model(folder: Path) -> Any:
    """A model that `save_model` wrote, in float32, for training."""
    with no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )


def save_model(model: Any, folder: Path) -> Path:
    """Model and tokenizer as a transformers folder; it appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with no_progress_bars():
        model.save_pretrained(temporary)
    _tokenizer().save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def teach(
    model: Any,
    batches: Callable[[int], Sequence[Problem]],
    steps: int,
    *,
    learning_rate: float = 2e-3,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Supervised training on answers: cross-entropy of the answer's tokens and the end of sequence.

    Args:
        batches: the problems of each step.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * max(0.05, 1.0 - step / steps)
        ids_BL, labels_BL = _examples(batches(step))
        loss = model(input_ids=ids_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1)


@torch.no_grad()
def accuracy(model: Any, asked: Sequence[Problem]) -> float:
    """Share of problems that the model solves, decoding greedily; judged by the verifier."""
    was, solved = model.training, 0.0
    model.eval()
    by_length: dict[int, list[Problem]] = {}
    for problem in asked:
        by_length.setdefault(len(problem.prompt), []).append(problem)
    for members in by_length.values():  # of one length: no padding before an answer
        ids_BL = torch.tensor([encode(p.prompt) for p in members])
        said: list[Tensor] = []
        past = None
        for _ in range(MAX_ANSWER_TOKENS):
            out = model(input_ids=said[-1] if said else ids_BL, past_key_values=past, use_cache=True)
            past = out.past_key_values
            said.append(out.logits[:, -1:].argmax(-1))
        for problem, row in zip(members, torch.cat(said, 1).tolist(), strict=True):
            solved += reward(problem, decode(row)) if EOS_ID in row else 0.0
    model.train(was)
    return solved / len(asked)


def _examples(batch: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    rows = [(encode(p.prompt), [*encode(p.answer), EOS_ID]) for p in batch]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BL = torch.full((len(rows), longest), PAD_ID)
    labels_BL = torch.full((len(rows), longest), -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids_BL[i, :end] = torch.tensor(prompt + answer)
        labels_BL[i, len(prompt) : end] = torch.tensor(answer)
    return ids_BL, labels_BL


def _tokenizer() -> Any:
    names = [_PAD, _EOS, *_CHARACTERS]
    names += [f"<unused{i}>" for i in range(_VOCABULARY - len(names))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=_PAD))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=_PAD, eos_token=_EOS, model_max_length=64, clean_up_tokenization_spaces=False
    )
