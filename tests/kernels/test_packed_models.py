"""Packed layers and models against dense ones that hold the dequantised weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rollout_kernels import linear as linear_module
from rollout_kernels.errors import BadCheckpoint, BadTensor
from rollout_kernels.experts import expert_stacks, packed_stacks
from rollout_kernels.linear import MXFP4Linear, packed_linear
from rollout_kernels.model import load_packed_model, memory_report, quantize_model_
from rollout_kernels.mxfp4 import MXFP4, dequantize, quantize
from rollout_kernels.peak_memory import peak_bytes
from rollout_kernels.quantize_folder import quantize_folder
from rollout_kernels.selection import QuantizeOptions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        AutoModelForCausalLM,
        GptOssConfig,
        LlamaConfig,
        MixtralConfig,
        PreTrainedConfig,
        Qwen3MoeConfig,
    )

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:
                parameter.normal_(std=0.1)  # so that a lost bias is seen
    return model  # type: ignore[no-any-return]


def rounded(weight: Tensor, transposed: bool) -> Tensor:
    if transposed:
        return dequantize(quantize(weight.transpose(-1, -2)), weight.dtype).transpose(-1, -2)
    return dequantize(quantize(weight), weight.dtype)


def round_dense(model: nn.Module, packed: list[str]) -> None:
    """Write into a dense model what the packed one's weights stand for."""
    with torch.no_grad():
        for name in packed:
            module: Any = model.get_submodule(name)
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, False))
            for stack in expert_stacks(module).values():
                stack.copy_(rounded(stack, module.is_transposed))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_model_equals_a_dense_one_with_the_same_values(family: str, cache: bool) -> None:
    dense = build(family)
    packed = copy.deepcopy(dense)
    report = quantize_model_(packed, cache=cache)
    round_dense(dense, report.packed)
    ids = torch.arange(24).view(2, 12)
    outputs = []
    for model in (dense, packed):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
        logits = model(inputs_embeds=embeddings).logits
        logits.square().mean().backward()
        outputs.append((logits.detach(), embeddings.grad))
    for a, b in zip(*outputs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # what was packed: everything in the layers but routers
    assert "lm_head" in report.kept
    assert any(name.endswith("q_proj") for name in report.packed)
    assert any("experts" in name for name in report.packed) is (family != "llama")
    assert not any(name.endswith((".gate", ".router")) for name in report.packed)
    with torch.no_grad():
        assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)  # type: ignore[operator]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_memory_is_reported(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    before = memory_report(model)
    assert before.packed == before.cached == 0
    bare, cached = copy.deepcopy(model), copy.deepcopy(model)
    for m, cache in ((bare, False), (cached, True)):
        quantize_model_(m, cache=cache)
        m(torch.arange(24).view(2, 12))
    small, large = memory_report(bare), memory_report(cached)
    assert small.cached == 0
    assert small.packed * 64 == small.packed_as_bfloat16 * 17
    assert small.other + small.packed_as_bfloat16 == before.total
    assert 0 < large.cached <= large.packed_as_bfloat16
    if family == "llama":  # every layer was used
        assert large.cached == large.packed_as_bfloat16
    assert large.packed == small.packed


@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_folder_loads_with_the_values_it_holds(family: str, tmp_path: Path) -> None:
    dense = build(family).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    on_disk = quantize_folder(tmp_path / "dense", tmp_path / "packed")
    loaded = load_packed_model(tmp_path / "packed")
    experts_only = family == "gpt_oss"
    expected = quantize_model_(copy.deepcopy(dense), QuantizeOptions(layers="experts" if experts_only else "linear"))
    got = [n for n, m in loaded.named_modules() if isinstance(m, MXFP4Linear) or packed_stacks(m)]
    assert got == expected.packed
    assert memory_report(loaded).packed == sum(t.bytes_after for t in on_disk.packed)
    round_dense(dense, expected.packed)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert_close_bfloat16(loaded(ids).logits, dense(ids).logits)
    with pytest.raises(BadCheckpoint, match="no packed weights"):
        load_packed_model(tmp_path / "dense")


def assert_close_bfloat16(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.float(), other.float(), rtol=0.03, atol=0.01)


def test_options_choose_and_reasons_are_given() -> None:
    model = build("mixtral")
    report = quantize_model_(model, QuantizeOptions(layers="experts", exclude=r"layers\.1\."))
    assert report.packed == ["model.layers.0.mlp.experts"]
    assert report.kept["model.layers.1.mlp.experts"] == "excluded by name"
    assert report.kept["model.layers.0.self_attn.q_proj"] == "no expert"
    odd = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(40, 8)])})
    assert quantize_model_(odd).kept == {"layers.0": "K = 40 is not a multiple of 32"}


def test_state_dictionaries_are_in_the_checkpoint_layout() -> None:
    one, other = build("gpt_oss"), build("gpt_oss")
    quantize_model_(one)
    quantize_model_(other, QuantizeOptions(mode="floor"), cache=True)  # type: ignore[arg-type]
    names = set(one.state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj_blocks" in names
    assert "model.layers.0.self_attn.q_proj.weight_scales" in names
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        other(ids)  # fills caches with what is about to be replaced
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(other(ids).logits, one(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (64,), (0, 64)])
def test_packed_linear_equals_a_dense_product(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(linear_module, "_TILE_ELEMENTS", 64 * 7)  # several tiles, the last one short
    g = torch.Generator().manual_seed(0)
    packed, bias = quantize(torch.randn(40, 64, generator=g)), torch.randn(40, generator=g).to(dtype)
    x = torch.randn(*shape, generator=g).to(dtype)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = packed_linear(one, packed, bias)
    expected = nn.functional.linear(other, dequantize(packed, dtype), bias)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 10)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance * 10)


def test_gradients_of_a_packed_linear() -> None:
    packed = quantize(torch.randn(5, 32))
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: packed_linear(x, packed, b), (x, bias))


def test_the_dequantised_weight_is_never_whole() -> None:
    packed = quantize(torch.randn(8192, 1024))
    x = torch.randn(4, 1024, requires_grad=True)
    peak = peak_bytes(lambda: packed_linear(x, packed).sum().backward())
    assert peak < 8192 * 1024 * 4 / 2


def test_cache_follows_dtype_and_moves() -> None:
    layer = MXFP4Linear.from_linear(nn.Linear(64, 8), cache=True)
    assert "cache=True" in repr(layer)
    assert layer.cache is not None
    before = layer(torch.ones(1, 64))
    assert layer.cache.nbytes == 8 * 64 * 4
    layer.to(torch.bfloat16)
    assert layer(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.cache.nbytes == 8 * 64 * 2
    assert layer.weight_blocks.dtype == torch.uint8
    layer.weight_scales += 1  # twice every weight
    after = layer(torch.ones(1, 64, dtype=torch.bfloat16))
    bias = layer.bias.detach()
    torch.testing.assert_close((after - bias).float(), 2 * (before - bias), rtol=2e-2, atol=2e-2)
    layer.cache.clear()
    assert layer.cache.nbytes == 0


def test_what_is_cached_in_inference_mode_can_be_trained_through() -> None:
    for cache in (False, True):
        layer = MXFP4Linear.from_linear(nn.Linear(64, 8), cache=cache)
        with torch.inference_mode():
            layer(torch.ones(1, 64))
        x = torch.ones(1, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None


def test_a_cache_of_weights_made_in_inference_mode_follows_what_is_written() -> None:
    with torch.inference_mode():
        layer = MXFP4Linear.from_linear(nn.Linear(64, 8, bias=False), cache=True)
        before = layer(torch.ones(1, 64))
        layer.weight_scales += 1  # twice every weight
        torch.testing.assert_close(layer(torch.ones(1, 64)), 2 * before)
    assert layer.cache is not None
    assert layer.cache.nbytes == 0
    x = torch.ones(1, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_float64_does_not_go_through_the_gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sums in float32, and does not compile for float64."""
    monkeypatch.setattr(linear_module, "has_gpu_kernels", lambda _: True)
    packed, x = quantize(torch.randn(8, 64)), torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(packed_linear(x, packed), x @ dequantize(packed, torch.float64).T)


def test_bad_inputs_are_named() -> None:
    layer = MXFP4Linear.from_linear(nn.Linear(64, 8))
    for cache in (False, True):
        layer = MXFP4Linear.from_linear(nn.Linear(64, 8), cache=cache)
        with pytest.raises(BadTensor, match=r"x has shape \[2, 32\].*\[2, 64\].*\[8, 64\]"):
            layer(torch.ones(2, 32))
        with pytest.raises(BadTensor, match=r"x .*int64"):
            layer(torch.ones(2, 64, dtype=torch.int64))
        with pytest.raises(BadTensor, match=r"x .*meta"):
            layer(torch.ones(2, 64, device="meta"))
    with pytest.raises(BadTensor, match=r"bias has shape \[7\]"):
        MXFP4Linear(layer.packed, torch.zeros(7))
    with pytest.raises(BadTensor, match=r"packed has shape \[2, 8, 64\]"):
        MXFP4Linear(MXFP4(layer.weight_blocks.expand(2, -1, -1, -1), layer.weight_scales.expand(2, -1, -1)))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(32, 2)])})
    with torch.no_grad():
        model["layers"][0].weight[1, 3] = torch.nan  # type: ignore[index]
    with pytest.raises(BadTensor, match=r"layers\.0\.weight .* nan at index \[1, 3\]"):
        quantize_model_(model)
