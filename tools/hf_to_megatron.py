"""Converts a Hugging Face model folder into a Megatron torch_dist checkpoint, which loads at any TP, PP and EP.

    python tools/hf_to_megatron.py HF_DIR OUT_DIR [--tp N --pp N --ep N --dtype bf16]
    torchrun --nproc-per-node 8 tools/hf_to_megatron.py HF_DIR OUT_DIR

Tensors stream from disk to disk. Run again after an interruption, it goes on where it stopped; OUT_DIR appears only
when it is complete. Config, tokenizer and generation files travel along in OUT_DIR/hf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rlvr.weights.conversion import hf_to_megatron
from megatron_rlvr.weights.conversion_cli import DTYPES, launched_team, progress_bar, run_tool
from megatron_rlvr.weights.layout import Layout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--tp", type=int, default=1, help="cut tensors as this many tensor-parallel ranks would")
    parser.add_argument("--pp", type=int, default=1, help="name files after this many pipeline stages")
    parser.add_argument("--ep", type=int, default=1, help="checked against the model; experts are always apart")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as in HF_DIR")
    options = parser.parse_args(arguments)

    def convert() -> int:
        with launched_team() as team, progress_bar(options.hf_dir.name, shown=team.rank == 0) as progress:
            hf_to_megatron(
                options.hf_dir,
                options.out_dir,
                layout=Layout(tp=options.tp, pp=options.pp, ep=options.ep),
                dtype=None if options.dtype is None else DTYPES[options.dtype],
                team=team,
                progress=progress,
            )
            if team.rank == 0:
                print(f"wrote {options.out_dir}")
        return 0

    return run_tool(convert)


if __name__ == "__main__":
    sys.exit(main())
