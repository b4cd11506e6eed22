"""Evaluates a model: ``python -m megatron_rlvr.evaluate model.path=FOLDER [protocol=NAME] [key=value ...]``.

Without further words the protocol of the QAE paper: AIME24, AIME25 and AMC23, 32 samples at temperature 0.7, pass@1 and
pass@16 with confidence intervals. FOLDER is a Hugging Face model, a run of this trainer, or a Megatron checkpoint;
``rollout.urls=[http://host:port]`` evaluates what running servers hold. Answers are kept problem by problem: the same
command continues after a stop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from megatron_rlvr.config.compose import config_dir, register_schema, to_evaluate_config
from megatron_rlvr.config.schema import DType, EvaluateConfig, RolloutConfig, ServerConfig

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_rlvr.rollout.evaluate import EvalSet

USER_MISTAKE = 2
FAILED = 1


def check(config: EvaluateConfig) -> None:
    """Refuses what cannot work or would have no effect.

    Raises:
        ValueError: naming the field.
    """
    from megatron_rlvr.data.eval_sets import check_sets

    rollout = config.rollout
    if not config.sets:
        raise ValueError("sets must name at least one set of problems (protocol=qae does), got none")
    check_sets(config.sets, "sets")
    if config.model.path is None and not rollout.urls:
        raise ValueError("model.path must be a model's folder, or rollout.urls name running servers, got neither")
    if rollout.urls:
        if rollout.server != ServerConfig():
            raise ValueError("rollout.server has no effect with rollout.urls: those servers run already")
        if config.model.dtype is not None:
            raise ValueError(
                f"model.dtype has no effect with rollout.urls: those servers run already, got {config.model.dtype.name}"
            )
    elif config.model.tokenizer is not None:
        raise ValueError("model.tokenizer has no effect without rollout.urls: the model's folder has its tokenizer")
    if rollout.router_url is not None and not rollout.urls:
        raise ValueError("rollout.router_url has no effect without rollout.urls")
    if config.reward.overlong.enabled:
        raise ValueError("reward.overlong has no effect on an evaluation, got enabled=true")
    for name, value in (
        ("rollout.max_response_tokens", rollout.max_response_tokens),
        ("rollout.concurrency", rollout.concurrency),
        ("data.max_prompt_tokens", config.data.max_prompt_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < config.level < 1:
        raise ValueError(f"level must be in (0, 1), got {config.level}")
    if config.seed < 0:
        raise ValueError(f"seed must be at least 0, got {config.seed}")


def run(config: EvaluateConfig) -> int:
    """Evaluates; prints progress, the summary and where the answers lie. Returns the exit status."""
    check(config)
    # Imported late: a mistake answers before anything heavy is loaded.
    from rich.console import Console

    from megatron_rlvr.data.eval_sets import check_files
    from megatron_rlvr.data.tokenizer import Tokenizer
    from megatron_rlvr.rollout.api_key import use_key_file
    from megatron_rlvr.rollout.evaluate import SetDefaults, build_sets
    from megatron_rlvr.trainer.evaluation.run import claim_folder, finished_uids, table, write_summary

    # Before the model is looked at, of which a checkpoint would be converted first.
    check_files(config.sets)
    use_key_file(config.rollout.api_key_file)
    model = _identify(config)
    tokenizer = Tokenizer.load(model["tokenizer"])
    data, rollout = config.data, config.rollout
    parts = build_sets(
        config.sets,
        SetDefaults(
            system_prompt=data.system_prompt,
            prompt_template=data.prompt_template,
            chat_template=data.chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=rollout.max_response_tokens,
            stop=tuple(rollout.stop),
        ),
        tokenizer=tokenizer,
        reward=config.reward,
    )
    _check_lengths(parts, model["path"])
    dtype = None if rollout.urls else _dtype(config, model["path"])
    settings = _settings(config, model, dtype)
    folder = Path(config.output_dir) / f"{config.name or model['name']}-{_hash(settings)}"
    claim_folder(folder, settings)
    console = Console(file=sys.stdout)

    def note(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    note(f"{model['source']}; answers go to {folder}")
    left = [part for part in parts if part.without(finished_uids(folder, part)).prompts]
    aborted = _generate(config, left, model["path"], dtype or DType.bf16, folder, console) if left else 0
    if not left:
        note("all problems are answered already")
    summary = write_summary(folder, config.sets, settings, level=config.level, seed=config.seed)
    _print_table(table(summary))
    print(f"answers and summary.json: {folder}")
    if aborted:
        print(f"error: the servers aborted answers to {aborted} problems, which do not count; the same command asks "
              "again", file=sys.stderr)  # fmt: skip
    return FAILED if aborted else 0


def _generate(
    config: EvaluateConfig, parts: Sequence[EvalSet], path: str, dtype: DType, folder: Path, console: Console
) -> int:
    """Starts servers where none are given, and asks; the number of problems whose answers were aborted."""
    from megatron_rlvr.report.progress_bar import progress_bar
    from megatron_rlvr.rollout.server import LocalServers
    from megatron_rlvr.trainer.evaluation.run import answer_sets

    def note(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    rollout = config.rollout
    servers = LocalServers(
        RolloutConfig(
            urls=rollout.urls,
            router_url=rollout.router_url,
            api_key_file=rollout.api_key_file,
            server=rollout.server,
        ),
        model_path=path,
        dtype=dtype,
        run_dir=folder / "logs",
    )
    try:
        ready = servers.wait_ready(_every(30.0, note))
        note(f"servers ready: {', '.join(map(str, ready))}")
        return asyncio.run(
            answer_sets(
                parts,
                config,
                urls=[server.url for server in ready],
                router_url=servers.router_url,
                folder=folder,
                phase=partial(progress_bar, console),
                note=note,
            )
        )
    finally:
        servers.stop()


def _identify(config: EvaluateConfig) -> dict[str, str]:
    """What is evaluated: ``path`` and ``tokenizer`` folders, ``source`` for people, ``name``, ``identity``."""
    from megatron_rlvr.rollout.engine import probe
    from megatron_rlvr.trainer.evaluation.model import CONVERTED_DIR, find_model
    from megatron_rlvr.types import EngineError

    if not config.rollout.urls:
        assert config.model.path is not None
        found = find_model(config.model.path, converted=Path(config.output_dir) / CONVERTED_DIR, on_convert=print)
        path = str(found.path)
        return {"path": path, "tokenizer": path, "source": found.source, "name": found.name, "identity": found.identity}
    try:
        servers = [probe(url, timeout_s=5.0) for url in config.rollout.urls]
    except EngineError as error:
        raise ValueError(f"rollout.urls must name running SGLang servers: {error}") from error
    held = {(server.model_path, server.weight_version) for server in servers}
    if len(held) > 1:
        raise ValueError(f"rollout.urls must name servers of one model and weight version, got {sorted(held)}")
    [(path, version)] = held
    tokenizer = config.model.tokenizer or config.model.path or path
    return {
        "path": path,
        "tokenizer": tokenizer,
        "source": f"weights {version} of {path} at {', '.join(config.rollout.urls)}",
        "name": f"{Path(path).name}-{version}",
        "identity": f"{path} {version}",
    }


def _check_lengths(parts: Sequence[EvalSet], path: str) -> None:
    """Refuses answers that would run beyond the model's positions, where its config.json can be read."""
    from megatron_rlvr.weights.hf_config import ModelShape

    if not (Path(path) / "config.json").is_file():
        return
    positions = ModelShape.from_hf(path).max_position_embeddings
    for part in parts:
        longest = max(len(prompt.input_ids) for prompt in part.prompts)
        if longest + part.sampling.max_tokens > positions:
            raise ValueError(
                f"sets {part.name!r}: max_response_tokens (or rollout.max_response_tokens) must leave room for its "
                f"longest prompt of {longest} tokens in the model's {positions} positions, got "
                f"{part.sampling.max_tokens}"
            )


def _dtype(config: EvaluateConfig, path: str) -> DType:
    """Of weights and computation in the servers to start."""
    chosen = config.rollout.server.dtype or config.model.dtype
    if chosen is not None:
        return chosen
    given = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    # Fields of a file that others write: older and newer transformers, or neither.
    return DType.fp32 if DType.fp32.value in (given.get("torch_dtype"), given.get("dtype")) else DType.bf16


def _settings(config: EvaluateConfig, model: dict[str, str], dtype: DType | None) -> dict[str, Any]:
    """All that decides an answer; what changes only speed or places does not belong here."""
    reward = {key: value for key, value in asdict(config.reward).items() if key not in ("num_workers", "overlong")}
    plain = {
        "model": model["identity"],
        "source": model["source"],
        "dtype": None if dtype is None else dtype.value,
        "sets": [asdict(spec) for spec in config.sets],
        "data": asdict(config.data),
        "reward": reward,
        "max_response_tokens": config.rollout.max_response_tokens,
        "stop": list(config.rollout.stop),
        "seed": config.seed,
    }
    return json.loads(json.dumps(plain, default=str))


def _hash(settings: dict[str, Any]) -> str:
    decisive = {key: value for key, value in settings.items() if key != "source"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def _every(seconds: float, note: Callable[[str], None]) -> Callable[[str], None]:
    """Passes a line on at most every so many seconds."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            note(f"  {line}")

    return tell


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _main(composed: DictConfig) -> None:
    from megatron_rlvr.rollout.messages import RolloutError
    from megatron_rlvr.rollout.server import ServerStartError

    signal.signal(signal.SIGTERM, _stop)
    try:
        config = to_evaluate_config(composed)
        if config.name is not None and not re.fullmatch(r"[\w.-]+", config.name):
            raise ValueError(f"name must be a folder name, got {config.name!r}")
        sys.exit(run(config))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except (RolloutError, ServerStartError) as error:
        print(f"error: {error}\nthe same command continues", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def main() -> None:
    """Entry point of the command."""
    register_schema()
    hydra.main(config_path=str(config_dir()), config_name="evaluate", version_base="1.3")(_main)()


if __name__ == "__main__":
    main()
