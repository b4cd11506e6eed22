"""Prints the checksums of `test_sglang_gpu_checksum.tensors` by SGLang's kernel; needs TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import json
import sys

import torch

from tests.contract.test_sglang_gpu_checksum import tensors


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("kernel", path)
    assert spec is not None
    assert spec.loader is not None
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)

    # The kernel's host side refuses tensors that are not on a GPU; this is what it does with one.
    def checksum(tensor: torch.Tensor) -> int:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        words = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.uint32)
        seed = 0x243F6A88
        sums = torch.empty(-(-words.numel() // 8192), dtype=torch.uint64)
        kernel.hash_tiles32_kernel_blocked[(len(sums),)](
            words,
            sums,
            words.numel(),
            seed1=seed,
            seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
            FM_C1=kernel.FMIX32_C1,
            FM_C2=kernel.FMIX32_C2,
            POS_A=kernel.POS_C1,
            POS_B=kernel.POS_C2,
            TILE=8192,
            BLOCK=256,
            USE_CG=True,
        )
        while len(sums) > 1:
            merged = torch.empty(-(-len(sums) // 1024), dtype=torch.uint64)
            kernel.add_tree_reduce_u64_kernel[(len(merged),)](sums, merged, len(sums), CHUNK=1024)
            sums = merged
        return kernel._final_splitmix64(int(sums.item()))

    print(json.dumps([checksum(tensor) for tensor in tensors()]))


if __name__ == "__main__":
    main(sys.argv[1])
