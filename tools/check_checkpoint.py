"""Compares two checkpoints tensor by tensor: Hugging Face folders and Megatron torch_dist checkpoints, in any mix.

    python tools/check_checkpoint.py A B                 equal bit by bit (or, for different types, in value)
    python tools/check_checkpoint.py A B --norm 1e-3     every tensor within a relative norm
    python tools/check_checkpoint.py A B --logprobs      and log-probs of A in Megatron against B in Hugging Face

Both are checked against their config.json (names, shapes, complete files) and for NaNs. Exit status 0 where they
agree, 1 where they differ, 2 where one is broken.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np

from megatron_rlvr.weights.conversion import Team, compare, megatron_to_hf, open_model
from megatron_rlvr.weights.conversion_cli import run_tool
from megatron_rlvr.weights.torch_dist_reader import is_torch_dist

PROMPT = "The capital of France is Paris. 17 + 25 = 42, because"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("left", metavar="A", type=Path)
    parser.add_argument("right", metavar="B", type=Path)
    parser.add_argument("--norm", type=float, metavar="TOLERANCE", help="accept ||a - b|| / ||a|| up to this")
    parser.add_argument("--hf-config", type=Path, metavar="HF_DIR", help="for torch_dist checkpoints without hf/")
    parser.add_argument("--logprobs", action="store_true", help="in fp32; needs a tokenizer, or --token-ids")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--token-ids", metavar="1,2,3", help="instead of a prompt")
    parser.add_argument("--logprob-tolerance", type=float, default=1e-4, help="nats, largest over the prompt")
    options = parser.parse_args(arguments)
    return run_tool(lambda: check(options))


def check(options: argparse.Namespace) -> int:
    """Prints the differences and returns the exit status."""
    if options.norm is not None and options.norm < 0:
        raise ValueError(f"--norm must be at least 0, got {options.norm}")
    left, right = (open_model(path, options.hf_config) for path in (options.left, options.right))
    total = bad = 0
    worst = 0.0
    for difference in compare(left, right):
        total += 1
        worst = max(worst, difference.relative_norm)
        accepted = difference.equal or (options.norm is not None and difference.relative_norm <= options.norm)
        if not accepted or any(difference.not_finite):
            bad += 1
            print(
                f"{difference.name} ({'/'.join(difference.dtypes)}): max |a-b| {difference.max_abs:.3e}, "
                f"relative norm {difference.relative_norm:.3e}, not finite {difference.not_finite[0]}/"
                f"{difference.not_finite[1]}"
            )
    rule = "equal" if options.norm is None else f"within {options.norm:g}"
    print(f"{total - bad} of {total} tensors {rule} (largest relative norm {worst:.3e})")
    if options.logprobs:
        nats = logprob_difference(options)
        print(f"log-probs of A in Megatron and of B in Hugging Face: largest difference {nats:.2e} nats")
        bad += not nats <= options.logprob_tolerance
    return 1 if bad else 0


def logprob_difference(options: argparse.Namespace) -> float:
    """Largest difference in nats over the tokens of the prompt, both sides in fp32."""
    with tempfile.TemporaryDirectory(prefix="check_checkpoint_") as scratch:
        left = as_hf_folder(options.left, Path(scratch) / "a", options.hf_config)
        right = as_hf_folder(options.right, Path(scratch) / "b", options.hf_config)
        ids = prompt_ids(options, left)
        return float(np.abs(megatron_logprobs(left, ids) - hugging_face_logprobs(right, ids)).max())


def as_hf_folder(checkpoint: Path, scratch: Path, hf_config: Path | None) -> Path:
    """The checkpoint itself, or a torch_dist checkpoint converted into the scratch folder."""
    if not is_torch_dist(checkpoint):
        return checkpoint
    megatron_to_hf(checkpoint, scratch, dtype=None, hf_config=hf_config, team=Team(), progress=lambda done, total: None)
    return scratch


def prompt_ids(options: argparse.Namespace, folder: Path) -> np.ndarray:
    """int64 token ids, at least two.

    Raises:
        ValueError: for ids that are no numbers, or a prompt of one token.
    """
    if options.token_ids is not None:
        if not all(part.strip().isdecimal() for part in options.token_ids.split(",")):
            raise ValueError(f"--token-ids must be numbers like 1,2,3, got {options.token_ids!r}")
        ids = np.array([int(part) for part in options.token_ids.split(",")])
    else:
        from megatron_rlvr.data.tokenizer import Tokenizer

        ids = np.asarray(Tokenizer.load(folder).encode(options.prompt), dtype=np.int64)
    if len(ids) < 2:
        raise ValueError(f"the prompt must have at least 2 tokens, got {len(ids)}")
    return ids


def megatron_logprobs(folder: Path, ids: np.ndarray) -> np.ndarray:
    """float32 [T - 1] nats of every token after the first, by the trainer's own forward pass."""
    from megatron_rlvr.config.schema import DType, ModelConfig, OptimConfig, ParallelConfig
    from megatron_rlvr.data.packing import PackedSequence, build_microbatch
    from megatron_rlvr.policy.parallel import ParallelContext
    from megatron_rlvr.policy.policy import Policy
    from megatron_rlvr.weights.hf_config import ModelShape

    sequence = PackedSequence(
        prompt_ids=ids[:1],
        response_ids=ids[1:],
        advantage=0.0,
        weight=0.0,
        rollout_logprobs=np.zeros(len(ids) - 1, np.float32),
        trajectory=0,
    )
    with ParallelContext(ParallelConfig(), seed=0) as parallel:
        policy = Policy(
            folder,
            ModelShape.from_hf(folder),
            model_config=ModelConfig(path=str(folder), dtype=DType.fp32),
            parallel=parallel,
            optim=OptimConfig(),
            trainable=False,
        )
        logprobs_T = policy.logprobs([build_microbatch([sequence])], temperature=1.0).logprobs[0]
        return logprobs_T[: len(ids) - 1].cpu().numpy()


def hugging_face_logprobs(folder: Path, ids: np.ndarray) -> np.ndarray:
    """As `megatron_logprobs`, by transformers."""
    import torch

    from megatron_rlvr.rollout.platform import declare_torchvision_ops

    declare_torchvision_ops()
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(ids)[None]).logits[0, :-1]
    targets_T = torch.from_numpy(ids[1:])
    return logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0].numpy()


if __name__ == "__main__":
    sys.exit(main())
