"""One rank of a trainer layout: loads a converted torch_dist checkpoint with Megatron itself, or saves one.

Usage: python checkpoint_worker.py load|save HF_DIR CKPT_DIR '{"tp": 2, "pp": 2, ...}' (under torchrun's variables).
``load`` checks every parameter against the Hugging Face folder, ``save`` loads that folder and saves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state

from megatron_rlvr.config.schema import DType, ModelConfig, ParallelConfig
from megatron_rlvr.policy import model, platform
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import CheckpointReader
from megatron_rlvr.weights.slices import load_shard


def main() -> None:
    action, hf_dir, ckpt_dir = sys.argv[1:4]
    sizes = json.loads(sys.argv[4])
    shape = ModelShape.from_hf(hf_dir)
    mapping = Mapping(shape, layout=Layout(**sizes), naming="local")
    with ParallelContext(ParallelConfig(**sizes), seed=0, timeout_s=120) as parallel:
        chunks = model.build_chunks(
            shape, ModelConfig(dtype=DType.fp32), parallel.config, padded_vocab_size=mapping.padded_vocab_size
        )
        platform.install()
        wanted = [expected(mapping, parallel, index, hf_dir) for index in range(len(chunks))]
        parameters = [dict(model.unwrap(chunk).named_parameters()) for chunk in chunks]
        with torch.no_grad():
            for chunk, tensors in zip(parameters, wanted, strict=True):
                for name, tensor in tensors.items():
                    chunk[name].copy_(tensor if action == "save" else torch.full_like(tensor, float("nan")))
        state = {f"model{index}": model.unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}
        if action == "save":
            if parallel.ranks.is_main:
                Path(ckpt_dir).mkdir(parents=True)
            parallel.barrier()
            dist_checkpointing.save(state, ckpt_dir)
        else:
            loaded = dist_checkpointing.load(state, ckpt_dir)
            for index, chunk in enumerate(chunks):
                model.unwrap(chunk).load_state_dict(loaded[f"model{index}"])
            for chunk, tensors in zip(parameters, wanted, strict=True):
                assert chunk.keys() == tensors.keys()
                for name, tensor in tensors.items():
                    # Padding rows are whatever the trainer makes of them; both sides have zeros.
                    assert torch.equal(chunk[name], tensor), (parallel.ranks, name)
        parallel.barrier()
    print("done")


def expected(mapping: Mapping, parallel: ParallelContext, chunk: int, hf_dir: str) -> dict[str, torch.Tensor]:
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    specs = mapping.shards(parallel.ranks.tp_rank, parallel.ranks.pp_rank, chunk, ep_rank)
    with CheckpointReader(hf_dir) as reader:
        return {name: load_shard(spec, reader, dtype=torch.float32) for name, spec in specs.items()}


if __name__ == "__main__":
    main()
