"""Tiny language models with a real tokenizer, made on the spot: for tests, demonstrations and examples.

They know nothing, but they are whole: a transformers folder with configuration, safetensors, a byte-level BPE
tokenizer trained on real text, and a chat template. What they say depends on their whole context, so a defect in
attention, positions or resumption shows in the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ..engines.hf.weights import no_progress_bars
from ..errors import BadInput, problem

Architecture = Literal["llama", "qwen3", "gemma", "gemma2", "moe"]

_PAD, _BOS, _EOS, _TURN = "<pad>", "<bos>", "<eos>", "<turn>"
_SPECIAL = (_PAD, _BOS, _EOS, _TURN)
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
#: Standard deviation of the logits: enough that the likely tokens are far likelier than the rest.
_LOGIT_STD = 1.5
#: What the carrier dimension (see `make_tiny_model`) holds in every embedding, where the others have deviation 1.
_CARRIER = 3.0

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma": (Gemma3TextConfig, {**_SLIDING, "query_pre_attn_scalar": 16}),
    "gemma2": (Gemma2Config, {**_SLIDING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}


def make_tiny_model(
    folder: str | Path,
    architecture: Architecture = "llama",
    *,
    vocab_size: int = 384,
    mean_length: float = 120.0,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    max_context: int = 2048,
    head_dim: int = 16,
) -> Path:
    """Write a tiny model (2 layers, hidden size 64) and its tokenizer. The same arguments give the same bytes.

    Completion lengths at temperature 1 without filters are close to geometric with mean `mean_length`, whatever the
    prompt: about as many rollouts end in their first tens of tokens as live for hundreds, and the standard deviation
    is about the mean. This is how: one dimension of the hidden state, the carrier, holds the same constant in every
    embedding and no layer writes to it, so that after the final normalisation it is nearly the same everywhere. The
    end of sequence looks at the carrier alone and no other token does. Its weight is then solved for, on random text,
    such that the mean probability of the end of sequence is 1 / mean_length.

    Args:
        folder: created if need be.
        architecture: "llama" (grouped queries), "qwen3" (normalised queries and keys), "gemma" (Gemma 3, sliding
            and global layers), "gemma2" (the same with soft-capped attention and logits), "moe" (Qwen3-MoE).
        vocab_size: at least 260: 4 special tokens and 256 bytes. The tokenizer may have fewer if the texts are poor.
        mean_length: mean tokens of a completion, its end of sequence included; more than 1.
        seed: of the weights and of the default texts.
        texts: what the tokenizer is trained on; arithmetic exercises if not given.
        max_context: positions that the model has.
        head_dim: of queries and keys. Some attention kernels on CPUs take none below 32.

    Returns:
        The folder.

    Raises:
        BadInput: an unknown architecture, a vocabulary too small, or a mean length that no probability yields.
    """
    if architecture not in _CONFIGS or vocab_size < 256 + len(_SPECIAL) or not mean_length > 1:
        raise BadInput(
            problem(
                f"no tiny model of architecture {architecture!r}, vocabulary {vocab_size}, mean length {mean_length}",
                consequence="Nothing was written",
                remedy=f"Choose one of {sorted(_CONFIGS)}, a vocabulary of at least 260 and a mean length above 1",
            )
        )
    folder = Path(folder)
    tokenizer = _tokenizer(list(_arithmetic(seed)) if texts is None else texts, vocab_size, max_context)
    make_config, specific = _CONFIGS[architecture]
    config = make_config(
        **{**_COMMON, "head_dim": head_dim},
        **specific,
        vocab_size=vocab_size,
        max_position_embeddings=max_context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # constructing a model draws from the global generator
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    _fill(model, int(tokenizer.eos_token_id), generator)
    _calibrate(model, int(tokenizer.eos_token_id), mean_length, generator)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _arithmetic(seed: int) -> Iterator[str]:
    """Exercises with their solutions, spelled out."""
    rng = random.Random(seed)
    ask = ("What is {0}?", "Calculate {0}.", "Solve the following problem: {0} =", "Please compute {0} step by step.")
    for _ in range(400):
        a, b, c = (rng.randrange(1, 1000) for _ in range(3))
        sign, other = rng.choice("+-*"), rng.choice("+-")
        task = f"{a} {sign} {b} {other} {c}"
        partial = {"+": a + b, "-": a - b, "*": a * b}[sign]
        total = partial + c if other == "+" else partial - c
        yield (
            f"{rng.choice(ask).format(task)}\nFirst, {a} {sign} {b} = {partial}. "
            f"Then {partial} {other} {c} = {total}. The answer is {total}.\n"
        )


def _tokenizer(texts: Sequence[str], vocab_size: int, max_context: int) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        additional_special_tokens=[_TURN],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_context,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def _fill(model: Any, eos: int, generator: torch.Generator) -> None:
    """Weights of unit gain, the carrier dimension (index 0), and an end of sequence that sees nothing else."""
    hidden = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter[..., 0, :] = 0  # no layer writes to the carrier
    embedding: Tensor = model.get_input_embeddings().weight
    # Gemma multiplies embeddings by sqrt(hidden); what the layers add must still weigh against them.
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    embedding.normal_(generator=generator)
    embedding[:, 0] = _CARRIER
    embedding /= scale
    head: Tensor = model.get_output_embeddings().weight
    head.normal_(std=_LOGIT_STD * hidden**-0.5, generator=generator)
    head[:, 0] = 0
    head[eos] = 0


@torch.no_grad()
def _calibrate(model: Any, eos: int, mean_length: float, generator: torch.Generator) -> None:
    """Solve for the weight of the carrier in the end of sequence's logit, by bisection on random text."""
    vocab_size = model.config.vocab_size
    text = torch.randint(len(_SPECIAL), vocab_size, (4, 128), generator=generator)
    head = model.get_output_embeddings()
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(input_ids=text, use_cache=False).logits.double()
    hook.remove()
    carrier = seen[0][..., 0].double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits[..., eos] = -torch.inf
    others = logits.logsumexp(dim=-1)
    low, high = -50.0, 50.0
    for _ in range(60):
        weight = (low + high) / 2
        logit = weight * carrier
        if cap is not None:
            logit = cap * torch.tanh(logit / cap)
        if float((logit - others).sigmoid().mean()) < 1 / mean_length:
            low = weight
        else:
            high = weight
    head.weight[eos, 0] = (low + high) / 2
