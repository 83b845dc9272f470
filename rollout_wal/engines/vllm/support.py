"""Which vLLM this is made for, and what of it is hooked into."""

from __future__ import annotations

from ..common.support import Hook, Versions, check_hooks, check_version

VERSIONS = Versions("0.32.0", "0.33")
"""What was tested. vLLM calls the scheduler interface private, so every minor version is looked at anew."""

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_CORE = "vllm.v1.engine.core:EngineCore"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
_PROCESSOR = "vllm.v1.sample.logits_processor.interface:LogitsProcessor"
_V2 = "vllm.v1.worker.gpu.sample.logits_processor.interface"

PROCESSOR_HOOKS = (
    Hook(f"{_PROCESSOR}.__init__", ("self", "vllm_config", "device", "is_pin_memory")),
    Hook(f"{_PROCESSOR}.apply", ("self", "logits")),
    Hook(f"{_PROCESSOR}.update_state", ("self", "batch_update")),
    Hook(f"{_PROCESSOR}.validate_params", ("cls", "sampling_params")),
    Hook(f"{_PROCESSOR}.is_argmax_invariant", ("self",)),
    Hook("vllm.v1.sample.sampler:Sampler.apply_logits_processors", ("self", "logits", "sampling_metadata")),
    Hook("vllm.v1.worker.gpu_input_batch:InputBatch.refresh_metadata", ("self",)),
    Hook(f"{_V2}:LogitsProcessor.__init__", ("self", "vllm_config", "req_states")),
    Hook(f"{_V2}:LogitsProcessor.add_request", ("self", "req_idx", "sampling_params")),
    Hook(f"{_V2}:LogitsProcessor.apply_staged_writes", ("self",)),
    Hook(f"{_V2}:LogitsProcessor.apply", ("self", "logits", "ctx")),
    Hook(f"{_V2}:LogitsProcessor.validate_params", ("cls", "sampling_params")),
    Hook(
        f"{_V2}:LogitsProcRequestState.__init__",
        ("self", "device", "max_num_reqs", "vocab_size", "all_token_ids", "prompt_len", "prefill_len", "total_len"),
    ),
    Hook(
        f"{_V2}:LogitsContext.__init__",
        (
            "self",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "expanded_local_pos",
            "input_ids",
            "pos",
            "seq_lens_upper_bound_np",
        ),
    ),
)

ENGINE_HOOKS = (
    *PROCESSOR_HOOKS,
    Hook(f"{_CONNECTOR}.get_num_new_matched_tokens", ("self", "request", "num_computed_tokens")),
    Hook(f"{_CONNECTOR}.update_state_after_alloc", ("self", "request", "blocks", "num_external_tokens")),
    Hook(f"{_CONNECTOR}.build_connector_meta", ("self", "scheduler_output")),
    Hook(f"{_CONNECTOR}.register_kv_caches", ("self", "kv_caches")),
    Hook(f"{_CONNECTOR}.start_load_kv", ("self", "forward_context")),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", ("self", "request_id")),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.from_engine_args", ("cls", "engine_args")),
    Hook("vllm.v1.engine.input_processor:InputProcessor.process_inputs", ("self", "request_id", "prompt", "params")),
    Hook("vllm.v1.engine.core_client:InprocClient.get_output", ("self",)),
    Hook("vllm.v1.engine.core_client:InprocClient.add_request", ("self", "request")),
    Hook("vllm.v1.engine.core_client:InprocClient.abort_requests", ("self", "request_ids")),
    Hook("vllm.v1.engine.core_client:InprocClient.collective_rpc", ("self", "method", "timeout", "args", "kwargs")),
    Hook("vllm.v1.engine.core_client:InprocClient.reset_prefix_cache", ("self", "reset_running_requests")),
    Hook(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights",
        ("self", "weights_iterator", "weights_path", "is_checkpoint_format"),
    ),
)

SCHEDULER_HOOKS = (
    *PROCESSOR_HOOKS,
    Hook(f"{_SCHEDULER}.__init__", ("self", "vllm_config", "kv_cache_config", "structured_output_manager")),
    Hook(f"{_SCHEDULER}.schedule", ("self",)),
    Hook(f"{_SCHEDULER}.update_from_output", ("self", "scheduler_output", "model_runner_output")),
    Hook(f"{_SCHEDULER}.add_request", ("self", "request")),
    Hook(f"{_SCHEDULER}.finish_requests", ("self", "request_ids", "finished_status")),
    Hook(f"{_SCHEDULER}.has_requests", ("self",)),
    Hook(f"{_SCHEDULER}.shutdown", ("self",)),
    Hook("vllm.v1.core.sched.async_scheduler:AsyncScheduler.update_from_output", ("self", "scheduler_output")),
    Hook(f"{_CORE}.set_weight_version", ("self", "weight_version")),
    Hook(f"{_CORE}.collective_rpc", ("self", "method", "timeout", "args", "kwargs")),
    Hook(f"{_CORE}.sleep", ("self", "level")),
    Hook("vllm.v1.request:RequestStatus.FINISHED_ERROR"),
    Hook(f"{_CORE}.step", ("self",)),
    Hook("vllm.v1.engine.core:EngineCoreProc._process_engine_step", ("self",)),
    Hook("vllm.v1.engine.core:EngineCoreProc.has_work", ("self",)),
    Hook("vllm.v1.request:Request.append_output_token_ids", ("self", "token_ids")),
    Hook("vllm.v1.engine:EngineCoreOutput.new_token_ids"),
    Hook("vllm.v1.engine:EngineCoreOutput.new_logprobs"),
    Hook("vllm.v1.engine:EngineCoreOutput.finish_reason"),
    Hook("vllm.v1.engine:EngineCoreOutput.stop_reason"),
    Hook("vllm.v1.engine:EngineCoreOutput.routed_experts"),
    Hook("vllm.config.aux_output:AuxOutputConfig.enable_return_routed_experts"),
)


def check(hooks: tuple[Hook, ...] = ()) -> str:
    """Refuse a vLLM that this was not made for. Returns its version.

    Raises:
        UnsupportedEngine, HookMoved: see `common.support`.
    """
    import vllm

    version = str(vllm.__version__)
    check_version("vLLM", version, VERSIONS)
    check_hooks("vLLM", version, hooks)
    return version
