"""One rank of a trainer layout: loads a converted torch_dist checkpoint with Megatron itself, then saves one.

Usage: python checkpoint_worker.py HF_DIR CONVERTED_DIR SAVE_DIR '{"tp": 2, "pp": 2, ...}' (with torchrun's
variables). Every loaded parameter is checked against the Hugging Face folder.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rlvr.config.schema import DType, ModelConfig, ParallelConfig
from megatron_rlvr.policy import model, platform
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import CheckpointReader
from megatron_rlvr.weights.slices import load_shard


def main() -> None:
    hf_dir, converted_dir, save_dir = sys.argv[1:4]
    sizes = json.loads(sys.argv[4])
    # What the writers of one rank answer into. Megatron starts a process for it that imports everything anew.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    shape = ModelShape.from_hf(hf_dir)
    mapping = Mapping(shape, layout=Layout(**sizes), naming="local")
    with ParallelContext(ParallelConfig(**sizes), seed=0, timeout_s=200) as parallel:
        chunks = model.build_chunks(
            shape, ModelConfig(dtype=DType.fp32), parallel.config, padded_vocab_size=mapping.padded_vocab_size
        )
        platform.install()
        gpts = [model.unwrap(chunk) for chunk in chunks]
        for gpt in gpts:
            for parameter in gpt.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
        loaded = dist_checkpointing.load(
            {f"model{i}": gpt.sharded_state_dict() for i, gpt in enumerate(gpts)}, converted_dir
        )
        for index, gpt in enumerate(gpts):
            gpt.load_state_dict(loaded[f"model{index}"])
            parameters = dict(gpt.named_parameters())
            wanted = expected(mapping, parallel, index, hf_dir)
            assert parameters.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(parameters[name], tensor), (parallel.ranks, name)
        if parallel.ranks.is_main:
            Path(save_dir).mkdir(parents=True)
        parallel.barrier()
        dist_checkpointing.save({f"model{i}": gpt.sharded_state_dict() for i, gpt in enumerate(gpts)}, save_dir)
        parallel.barrier()


def expected(mapping: Mapping, parallel: ParallelContext, chunk: int, hf_dir: str) -> dict[str, torch.Tensor]:
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    specs = mapping.shards(parallel.ranks.tp_rank, parallel.ranks.pp_rank, chunk, ep_rank)
    with CheckpointReader(hf_dir) as reader:
        return {name: load_shard(spec, reader, dtype=torch.float32) for name, spec in specs.items()}


if __name__ == "__main__":
    main()
