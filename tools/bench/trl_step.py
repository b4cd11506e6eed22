"""Seconds per training step of TRL's GRPOTrainer on the quickstart's model and task, to hold ours against.

TRL is not a dependency: install it beside (``pip install --target DIR --no-deps trl datasets accelerate ...``) and put
DIR on PYTHONPATH. One step is 16 prompts x 8 responses of at most 24 tokens and one update, as the quickstart's.

    PYTHONPATH=DIR python tools/bench/trl_step.py MODEL_DIR --steps 8 --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", help="Hugging Face folder, such as the quickstart's warm start")
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--prompts", type=int, default=16)
    arguments.add_argument("--responses", type=int, default=8)
    arguments.add_argument("--max-tokens", type=int, default=24)
    options = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from megatron_rlvr.rollout import platform

    platform.install()  # the torchvision of the package index beside a CPU torch
    import reasoning_gym
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    data = reasoning_gym.create_dataset("chain_sum", size=2000, seed=0, min_terms=2, max_terms=2, max_digits=2)
    columns = {"prompt": [row["question"] for row in data], "answer": [row["answer"] for row in data]}
    rows = Dataset(InMemoryTable.from_pydict(columns), fingerprint="chain_sum")

    def reward(completions: list[str], answer: list[str], **unused: object) -> list[float]:
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.started = time.monotonic()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            self.seconds.append(time.monotonic() - self.started)

    clock = Clock()
    batch = options.prompts * options.responses
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=options.model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=out,
                per_device_train_batch_size=batch,
                generation_batch_size=batch,
                num_generations=options.responses,
                max_completion_length=options.max_tokens,
                max_steps=options.steps,
                learning_rate=1e-5,
                beta=0.0,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                model_init_kwargs={"dtype": "float32"},
            ),
            train_dataset=rows,
            callbacks=[clock],
        )
        trainer.train()
    timed = clock.seconds[1:]
    print(
        json.dumps({"trl_step_s_median": statistics.median(timed), "trl_step_s_min": min(timed), "steps": len(timed)})
    )


if __name__ == "__main__":
    main()
