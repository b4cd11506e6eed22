"""Runs a matrix of methods x seeds on one task and writes one page about what differed.

    python tools/compare.py configs/compare/chain_sum.yaml --out outputs/compare/chain_sum --share-server

Finished cells are not run again: the same command continues after a stop, and `--page-only` writes the page of what is
there. The page is OUT/comparison.html, its table OUT/comparison.md, its numbers OUT/comparison.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from megatron_rlvr.comparison.launch import CellError, Launcher, LocalLauncher, SlurmLauncher
from megatron_rlvr.comparison.matrix import Matrix, read_matrix
from megatron_rlvr.comparison.page import write_page
from megatron_rlvr.comparison.results import read_results
from megatron_rlvr.comparison.runner import Progress, Runner, check_starts

PLAIN_EVERY_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when every cell is finished, 1 when some failed, 2 for a mistake, 130 after a stop."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        seeds = _seeds(options.seeds)
        matrix = read_matrix(options.matrix, seeds=seeds)
        check_starts(matrix.cells())
        failed = [] if options.page_only else _run(matrix, options)
        results = read_results(matrix, options.out)
        if results or not failed:
            for path in write_page(matrix, results, options.out, remark=options.remark):
                print(path)
    except (ValueError, CellError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    if failed:
        print(f"error: {len(failed)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(matrix: Matrix, options: argparse.Namespace) -> list[str]:
    last = -PLAIN_EVERY_S

    def progress(state: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            _note(f"{state.done}/{state.total} cells, now {state.running or 'nothing'}")

    runner = Runner(
        matrix,
        options.out,
        _launcher(options),
        share_server=options.share_server,
        note=_note,
        progress=progress,
    )
    return runner.run()


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds must be integers with commas between them, got {text!r}") from None


def _launcher(options: argparse.Namespace) -> Launcher:
    if options.slurm is None:
        if options.jobs is not None:
            raise ValueError(f"--jobs has no effect without --slurm: cells run one after the other, got {options.jobs}")
        return LocalLauncher(1 if options.ranks is None else options.ranks)
    if options.share_server:
        raise ValueError("--share-server has no effect with --slurm: every job has servers of its own")
    if options.ranks is not None:
        raise ValueError(f"--ranks has no effect with --slurm: the cluster's file says it, got {options.ranks}")
    return SlurmLauncher(options.slurm, jobs=4 if options.jobs is None else options.jobs)


def _note(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="file of configs/compare/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--seeds", help="instead of those of the matrix, e.g. 0,1,2,3,4")
    parser.add_argument("--ranks", type=int, help="trainer ranks of a cell on this machine (default: 1)")
    parser.add_argument("--slurm", metavar="CLUSTER", help="cells as Slurm jobs, CLUSTER as for slurm/submit.py")
    parser.add_argument("--jobs", type=int, help="Slurm jobs at a time (default: 4)")
    parser.add_argument("--share-server", action="store_true", help="one server for all cells, instead of one a cell")
    parser.add_argument("--remark", default="", help="a sentence for the page, e.g. on the machine")
    parser.add_argument("--page-only", action="store_true", help="run nothing, write the page of what is finished")
    return parser


if __name__ == "__main__":
    sys.exit(main())
