"""Converts a Megatron torch_dist checkpoint, saved at any layout, into a Hugging Face model folder.

    python tools/megatron_to_hf.py CKPT_DIR OUT_DIR [--dtype bf16] [--hf-config HF_DIR]
    torchrun --nproc-per-node 8 tools/megatron_to_hf.py CKPT_DIR OUT_DIR

Tensors stream from disk to disk. Run again after an interruption, it goes on where it stopped; OUT_DIR appears only
when it is complete. Config, tokenizer and generation files come from CKPT_DIR/hf or --hf-config.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rlvr.weights.conversion import megatron_to_hf
from megatron_rlvr.weights.conversion_cli import DTYPES, launched_team, progress_bar, run_tool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as in CKPT_DIR")
    parser.add_argument("--hf-config", type=Path, metavar="HF_DIR", help="model folder of the same architecture")
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="size of one safetensors file")
    options = parser.parse_args(arguments)

    def convert() -> int:
        if options.max_file_gb <= 0:
            raise ValueError(f"--max-file-gb must be positive, got {options.max_file_gb}")
        with launched_team() as team, progress_bar(options.checkpoint.name, shown=team.rank == 0) as progress:
            megatron_to_hf(
                options.checkpoint,
                options.out_dir,
                dtype=None if options.dtype is None else DTYPES[options.dtype],
                hf_config=options.hf_config,
                team=team,
                progress=progress,
                max_file_bytes=int(options.max_file_gb * 1e9),
            )
            if team.rank == 0:
                print(f"wrote {options.out_dir}")
        return 0

    return run_tool(convert)


if __name__ == "__main__":
    sys.exit(main())
