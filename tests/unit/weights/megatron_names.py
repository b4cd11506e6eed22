"""Builds real Megatron models for every rank of a layout and prints their parameter names and shapes as JSON.

A process of its own, because Megatron's parallel state is global. Ranks are played one after the other on torch's
``fake`` process group, so that any layout fits one process; parameters are only built, never used.

Usage: python megatron_names.py '{"MODEL_FOLDER": [{"tp": 2, "pp": 1, "vpp": 1, "ep": 1, "etp": 1}, ...], ...}'
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout


def chunk_parameters(shape: ModelShape, layout: Layout, vpp_rank: int, padded_vocab: int) -> dict[str, list[int]]:
    """Names and shapes of one chunk on the rank that the parallel state says."""
    moe = {}
    if shape.num_experts:
        moe = {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
            "moe_router_topk": shape.num_experts_per_token,
            "moe_layer_freq": [int(shape.is_moe_layer(i)) for i in range(shape.num_layers)],
            # The other dispatchers open CUDA streams while the model is built.
            "moe_token_dispatcher_type": "allgather",
        }
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        pipeline_dtype=torch.float32,
        **moe,
    )
    vp_stage = vpp_rank if layout.vpp > 1 else None
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage),
        vocab_size=padded_vocab,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=layout.is_first_chunk(pp_rank=pp_rank, vpp_rank=vpp_rank),
        post_process=layout.is_last_chunk(pp_rank=pp_rank, vpp_rank=vpp_rank),
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def main() -> None:
    if not torch.cuda.is_available():
        # A tied output layer on a later stage is filled by an all-reduce on the GPU while the model is built.
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    results: dict[str, list[dict[str, object]]] = {}
    for folder, layouts in json.loads(sys.argv[1]).items():
        shape = ModelShape.from_hf(folder)
        results[folder] = []
        for sizes in layouts:
            layout = Layout(**sizes)
            world = layout.pp * max(layout.tp, layout.ep * layout.etp)
            for rank in range(world):
                results[folder] += rank_parameters(shape, layout, rank, world)
    print(json.dumps(results))


def rank_parameters(shape: ModelShape, layout: Layout, rank: int, world: int) -> list[dict[str, object]]:
    """All chunks of one rank, with the coordinates that Megatron's parallel state gives it."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    chunks: list[dict[str, object]] = [
        {
            "layout": asdict(layout),
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "vpp": vpp_rank,
            "ep": parallel_state.get_expert_model_parallel_rank(),
            "etp": parallel_state.get_expert_tensor_parallel_rank(),
            "parameters": chunk_parameters(shape, layout, vpp_rank, padded_vocab=256),
        }
        for vpp_rank in range(layout.vpp)
    ]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return chunks


if __name__ == "__main__":
    main()
