"""Everything a run holds open: process groups, policy, servers, rollout process, files. Closed in reverse order."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from megatron_rlvr import ops
from megatron_rlvr.config.schema import Elision, RunConfig, Transport
from megatron_rlvr.data.problems import ProblemSet, load_problems
from megatron_rlvr.policy import platform
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy, describe
from megatron_rlvr.report.live_view import LiveView
from megatron_rlvr.rollout.engine import HttpEngine
from megatron_rlvr.rollout.messages import Progress
from megatron_rlvr.rollout.server import LocalServers, ServerInfo
from megatron_rlvr.rollout.service import RolloutService
from megatron_rlvr.sync.broadcast import BroadcastTransport
from megatron_rlvr.sync.coordinator import WeightSync
from megatron_rlvr.trainer import scratch
from megatron_rlvr.trainer.checks import check_shape, whole_batch_reason
from megatron_rlvr.trainer.update import Updater
from megatron_rlvr.trainer.warm_start import WarmStart, cache_key, cached_model
from megatron_rlvr.types import EvalBatch, RolloutBatch
from megatron_rlvr.weights.hf_config import ModelShape

T = TypeVar("T")
DATA_TIMEOUT_S = 300.0
"""For the rollout process to load data and start its verifiers."""
SERVER_NEWS_S = 15.0


class RunStoppedError(RuntimeError):
    """Another rank failed; its own message tells why."""


class Session:
    """The parts of a run, built by `open`; every method is collective over the trainer's ranks.

    Attributes:
        policy_version: completed rollout steps whose weights the servers hold.
    """

    policy: Policy
    updater: Updater
    sync: WeightSync

    def __init__(self, config: RunConfig, parallel: ParallelContext, run_dir: Path, view: LiveView | None) -> None:
        self.config = config
        self.parallel = parallel
        self.run_dir = run_dir
        self.view = view
        self.policy_version = 0
        self._num_pushes = 0
        self._stack = ExitStack()
        self._servers: LocalServers | None = None
        self._service: RolloutService | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def elides_zero_advantage(self) -> bool:
        """Whether responses with zero advantage stay out of the update."""
        config = self.config
        wanted = config.train.elide_zero_advantage is Elision.auto
        return wanted and whole_batch_reason(config, has_experts=self.policy.shape.num_experts > 0) is None

    @property
    def is_main(self) -> bool:
        return self.parallel.ranks.is_main

    def open(self) -> None:
        """Makes or finds the model, starts servers and rollouts, loads the policy, warms it up, syncs it."""
        ops.set_backend(self.config.ops.backend.value)
        problems = load_problems(self.config.data, self.config.reward) if self.config.warm_start.enabled else None
        cache = Path(self.config.warm_start.cache_dir) / cache_key(self.config)
        ready = cached_model(cache.parent, cache.name)
        path = self.on_main(lambda: str(ready or self._initial_model(cache, problems)))
        shape = ModelShape.from_hf(path)
        check_shape(self.config, shape)
        self.on_main(lambda: self._start_rollouts(path))
        self._load_policy(path, shape)
        self._connect()
        self.push_weights()
        if problems is not None and ready is None:
            path = str(self._warm_up(problems, cache))
        self._build_updater(path)

    def _initial_model(self, cache: Path, problems: ProblemSet | None) -> Path:
        """The folder that training starts from; a scratch model is made from the task's text."""
        config = self.config
        if config.model.path is not None:
            return Path(config.model.path)
        assert config.model.scratch is not None
        assert problems is not None
        out = cache / "init"
        out.parent.mkdir(parents=True, exist_ok=True)
        sample = [problems.train[i] for i in range(min(2000, len(problems.train)))]
        texts = [f"{message['content']}{problem.answer}" for problem in sample for message in problem.messages]
        scratch.make_model(out, config.model.scratch, texts=texts, seed=config.train.seed)
        return out

    def _start_rollouts(self, path: str) -> None:
        """On rank 0: begins to start the servers, and starts the rollout process meanwhile."""
        config = self.config
        self.note(f"{describe(config.parallel)}; world size {self.parallel.ranks.world_size}")
        self._servers = LocalServers(
            config.rollout, model_path=path, dtype=config.rollout.server.dtype or config.model.dtype,
            run_dir=self.run_dir,
        )  # fmt: skip
        self._stack.callback(self._servers.stop)
        self._service = RolloutService(
            data=config.data,
            reward=config.reward,
            rollout=config.rollout,
            evaluation=config.eval,
            tokenizer_path=path,
            urls=[],
            seed=config.train.seed,
            log_path=self.run_dir / "logs" / "rollout.log",
        )
        self._stack.callback(self._service.close)
        info = self._service.start(DATA_TIMEOUT_S)
        dropped = f", {info.num_dropped_prompts} too long" if info.num_dropped_prompts else ""
        self.note(f"{info.num_train} training and {info.num_val} held-out problems{dropped}")

    def _load_policy(self, path: str, shape: ModelShape) -> None:
        self.policy = self._policy(path, shape, trainable=True)
        self.note(f"policy of {self.policy.num_parameters():,} parameters in {self.config.model.dtype.value}")

    def _policy(self, path: str, shape: ModelShape, *, trainable: bool) -> Policy:
        return Policy(
            path,
            shape,
            model_config=self.config.model,
            parallel=self.parallel,
            optim=self.config.optim,
            trainable=trainable,
        )

    def _build_updater(self, start_path: str) -> None:
        """Reinforcement learning starts from `start_path` with fresh moments; so does its reference model."""
        config = self.config
        self.policy.reset_optimizer(config.optim)
        reference = self._policy(start_path, self.policy.shape, trainable=False) if config.loss.kl_coef else None
        self.updater = Updater(
            self.policy,
            self.parallel,
            loss=config.loss,
            optim=config.optim,
            temperature=config.rollout.temperature,
            seed=config.train.seed,
            total_updates=config.train.steps * config.train.updates_per_rollout,
            reference=reference,
        )

    def _connect(self) -> None:
        """Waits for the servers and forms the weight-update groups."""
        config = self.config
        servers: list[ServerInfo] = self.on_main(self._await_servers)
        engines = [
            HttpEngine(server.url, num_ranks=server.num_ranks, timeout_s=config.sync.timeout_s) for server in servers
        ]
        ranks = self.parallel.ranks
        sends = ranks.dp_rank == 0 and ranks.tp_rank == 0 and config.sync.transport is Transport.broadcast
        transport = (
            BroadcastTransport(
                engines,
                stage=ranks.pp_rank,
                host=self._own_address(),
                bucket_bytes=config.sync.bucket_mb << 20,
                backend="nccl" if platform.on_gpu() else "gloo",
                timeout_s=config.sync.timeout_s,
            )
            if sends
            else None
        )
        self.sync = WeightSync(
            engines,
            gate=self.parallel,
            leads=self.is_main,
            stage=ranks.pp_rank,
            num_stages=ranks.pp_size,
            exports=self.policy.exports,
            transport=transport,
            pause_mode=config.sync.pause_mode.value,
        )
        self._stack.callback(self.sync.close)

    def _own_address(self) -> str:
        """Where the servers reach this process."""
        if self.config.sync.host is not None:
            return self.config.sync.host
        if not self.config.rollout.urls:
            return "127.0.0.1"
        server = urlsplit(self.config.rollout.urls[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            # Sends nothing: asks the kernel which of this machine's addresses faces the server.
            route.connect((server.hostname, server.port or 80))
            return str(route.getsockname()[0])

    def _await_servers(self) -> list[ServerInfo]:
        assert self._servers is not None
        assert self._service is not None
        servers = self._servers.wait_ready(self._every(SERVER_NEWS_S))
        self._service.connect([server.url for server in servers], router_url=self._servers.router_url)
        self.note(f"servers ready: {', '.join(server.url for server in servers)}")
        return servers

    def _every(self, seconds: float) -> Callable[[str], None]:
        """Notes a line at most every so many seconds."""
        last = time.monotonic()

        def news(line: str) -> None:
            nonlocal last
            if time.monotonic() - last >= seconds:
                last = time.monotonic()
                self.note(f"  {line}")

        return news

    def push_weights(self) -> float:
        """Brings the servers to the current weights under the current version; returns seconds."""
        started = time.monotonic()
        if self.config.sync.transport is Transport.broadcast:
            self.sync.run(self.policy.export, version=self.policy_version)
        else:
            self._push_through_disk()
        return time.monotonic() - started

    def _push_through_disk(self) -> None:
        """Servers load a folder of their own version; the last one goes when all of them have the new one."""
        root = self.run_dir / "sync"
        self._num_pushes += 1
        folder = root / f"weights-{self._num_pushes}"
        self.policy.save_hf(folder, like=self.policy.path)
        self.sync.run_from_disk(str(folder.resolve()), version=self.policy_version)
        if self.is_main:
            for old in root.iterdir():
                if old != folder:
                    shutil.rmtree(old)

    def _warm_up(self, problems: ProblemSet, cache: Path) -> Path:
        """Trains on the task's answers; returns the folder that keeps the result."""
        config = self.config.warm_start
        warm = WarmStart(self.config, self.policy, self.parallel, problems.train)

        def accuracy(step: int) -> float:
            self.push_weights()
            value = self.evaluate(max_problems=config.check_problems).accuracy
            self.note(f"warm start: step {step}, held-out accuracy {value:.1%}")
            return value

        with self.phase("warm start", config.max_steps) as advance:
            warm.run(accuracy, advance)
        out = cache / "warm"
        self.policy.save_hf(out, like=self.policy.path)
        return out

    def generate(self, step: int) -> RolloutBatch | None:
        """The rollouts of one step, on rank 0 alone."""

        def run() -> RolloutBatch:
            assert self._service is not None
            wanted = self.config.rollout.prompts_per_step
            with self.phase("rollout", wanted) as advance:
                return self._service.generate(
                    step=step, policy_version=self.policy_version, on_progress=_advance_to(advance)
                )

        return self.on_main(run, share=False)

    def evaluate(self, *, max_problems: int | None = None) -> EvalBatch:
        """Answers to the held-out problems under the weights that the servers hold."""

        def run() -> EvalBatch:
            assert self._service is not None
            with self.phase("evaluation", max_problems or self.config.data.val_size) as advance:
                return self._service.evaluate(
                    policy_version=self.policy_version, max_problems=max_problems, on_progress=_advance_to(advance)
                )

        batch = self.on_main(run, share=False)
        summary = self.parallel.broadcast_object(
            replace(batch, groups=[_light(group) for group in batch.groups]) if batch else None
        )
        return batch or summary

    def on_main(self, call: Callable[[], T], *, share: bool = True) -> T:
        """Runs `call` on rank 0; a failure there ends every rank.

        Args:
            share: broadcast the result; otherwise the other ranks get None.
        """
        outcome: tuple[str, object] = ("ok", None)
        error: Exception | None = None
        value: T | None = None
        if self.is_main:
            try:
                value = call()
                outcome = ("ok", value if share else None)
            except Exception as caught:  # noqa: BLE001 - passed on below; the other ranks must not wait for ever
                error, outcome = caught, ("failed", f"{type(caught).__name__}: {caught}")
        status, payload = self.parallel.broadcast_object(outcome)
        if error is not None:
            raise error
        if status == "failed":
            raise RunStoppedError(f"rank 0 failed: {payload}")
        return value if self.is_main else payload  # type: ignore[return-value]

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A progress bar on rank 0."""
        if self.view is None:
            yield lambda count=1: None
            return
        with self.view.phase(name, total) as advance:
            yield advance

    def note(self, text: str) -> None:
        """A line on rank 0's console."""
        if self.view is not None:
            self.view.note(text)


def _advance_to(advance: Callable[..., None]) -> Callable[[Progress], None]:
    """Turns totals into increments."""
    shown = 0

    def on_progress(progress: Progress) -> None:
        nonlocal shown
        advance(progress.accepted - shown)
        shown = progress.accepted

    return on_progress


def _light(group):
    """The group without token arrays, for ranks that only need its verdicts."""
    return replace(group, rollouts=[replace(r, response_ids=r.response_ids[:0], text="") for r in group.rollouts])
