"""Builds Megatron's GPTModel, or this rank's chunks of it, from a Hugging Face shape."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.config.schema import DType, ModelConfig, ParallelConfig, Recompute
from megatron_rlvr.policy import platform
from megatron_rlvr.policy.layers import PackedSequences, block_spec, uses_transformer_engine
from megatron_rlvr.weights.hf_config import ModelShape

TORCH_DTYPE = {DType.fp32: torch.float32, DType.bf16: torch.bfloat16}


class PolicyModel(GPTModel):
    """Megatron's GPTModel, whose last stage hands over hidden states instead of logits.

    The head (`policy.head`) makes logits from them: of response tokens alone, in the model's own dtype, and piece by
    piece where memory is short.
    """

    def _preprocess(
        self, *unused: object, position_ids: torch.Tensor, packed_seq_params: PackedSequences, **more: object
    ) -> tuple:
        """Megatron's, with the rotary embedding of every packed token in its place where this project attends.

        Megatron takes one of as many rows as there are tokens row by row, else from the start for each sequence, which
        would not know that a response continues a shared prompt.
        """
        decoder_input, rotary, *rest = super()._preprocess(
            *unused, position_ids=position_ids, packed_seq_params=packed_seq_params, **more
        )
        if packed_seq_params.plan is not None:
            rotary = rotary.index_select(0, position_ids.squeeze(0))
        return decoder_input, rotary, *rest

    def _postprocess(self, hidden_states: torch.Tensor, *unused: object, **more: object) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """Output weight [padded vocabulary / TP, D] of this rank; on the last stage."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


def transformer_config(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration for a shape; every fusion that needs a GPU is off without one."""
    dtype = TORCH_DTYPE[model.dtype]
    gpu = platform.on_gpu()
    pipelined = parallel.pp > 1
    recompute: dict[str, object] = {}
    if model.recompute is Recompute.full:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute is Recompute.selective:
        recompute = {"recompute_granularity": "selective"}
    experts: dict[str, object] = {}
    if shape.num_experts:
        experts = {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.num_experts_per_token,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_router_pre_softmax": not shape.norm_topk_prob,
            "moe_grouped_gemm": uses_transformer_engine(),
            "moe_permute_fusion": False,
        }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1 if shape.num_experts else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.dtype is DType.bf16,
        variable_seq_lengths=pipelined,
        # Packed micro-batches differ in length between expert ranks, which the allgather dispatcher cannot have.
        # (Megatron checks this field of dense models too.)
        moe_token_dispatcher_type="alltoall",
        # batch_p2p_comm together with virtual stages is silently wrong on gloo.
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.vpp > 1,
        # With overlap Megatron frees an output while its send is under way: gloo then reads memory of somebody else.
        deallocate_pipeline_outputs=pipelined and parallel.vpp == 1,
        # Weights are always loaded, so no time is spent on random values.
        perform_initialization=False,
        use_cpu_initialization=not gpu,
        bias_activation_fusion=gpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=gpu,
        apply_rope_fusion=uses_transformer_engine(),
        gradient_accumulation_fusion=False,
        persist_layer_norm=uses_transformer_engine(),
        **recompute,
        **experts,
    )


def _llama3_inv_freq(shape: ModelShape) -> torch.Tensor:
    """Inverse frequencies of Llama 3.x: long wavelengths slowed by `factor`, a linear ramp between.

    float32 [head_dim / 2]; formula of the Llama 3.1 release (rope_type "llama3").
    """
    scaling = shape.rope_scaling
    assert scaling is not None
    inv_freq = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return inv_freq * (keep + (1.0 - keep) / scaling.factor)


def build_chunks(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, *, padded_vocab_size: int
) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or `parallel.vpp`), uninitialised, on the training device in the model's dtype.

    Args:
        padded_vocab_size: rows of the embedding, a multiple of `parallel.tp`; padding's logits are masked later.
    """
    chunks: list[torch.nn.Module] = []
    for vp_stage in range(parallel.vpp):
        config = transformer_config(shape, model, parallel)
        stage = vp_stage if parallel.vpp > 1 else None
        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage=stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            vp_stage=stage,
        )
        if shape.rope_scaling is not None:
            chunk.rotary_pos_emb.inv_freq = _llama3_inv_freq(shape)
        chunk.to(platform.device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def wrap_for_training(chunks: list[torch.nn.Module], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Megatron's DistributedDataParallel around every chunk, gradients summed in fp32."""
    wrapped = []
    for index, chunk in enumerate(chunks):
        config: TransformerConfig = chunk.config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        # Later chunks' gradients are ready last in backward: only the first overlaps by buckets.
        wrapped.append(DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0))
    for index, chunk in enumerate(wrapped):
        config = chunk.config
        config.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            config.no_sync_func = [c.no_sync for c in wrapped] if len(wrapped) > 1 else wrapped[index].no_sync
    return wrapped


def unwrap(chunk: torch.nn.Module) -> PolicyModel:
    """The model inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, PolicyModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def has_auxiliary_loss(chunk: torch.nn.Module) -> bool:
    """Whether Megatron adds a loss over the routing of all tokens to the gradient."""
    config = unwrap(chunk).config
    balances = config.num_moe_experts is not None and config.moe_router_load_balancing_type != "none"
    return balances or config.moe_z_loss_coeff is not None
