"""Everything a run holds open: process groups, policy, servers, rollout process, files. Closed in reverse order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from megatron_rlvr import ops
from megatron_rlvr.config.schema import RolloutSource, RunConfig, Transport
from megatron_rlvr.data.problems import ProblemSet, load_problems
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.entropy.dynamics_monitor import DynamicsMonitor
from megatron_rlvr.entropy.law_tracker import LawTracker
from megatron_rlvr.metrics import Metric
from megatron_rlvr.policy import platform
from megatron_rlvr.policy.parallel import ParallelContext
from megatron_rlvr.policy.policy import Policy, describe
from megatron_rlvr.report.live_view import LiveView
from megatron_rlvr.rollout.messages import RolloutError, ServerTrouble
from megatron_rlvr.rollout.recording import FOLDER, ReplayService
from megatron_rlvr.rollout.server import LocalServers, ServerInfo, ServerStartError
from megatron_rlvr.rollout.service import RolloutService
from megatron_rlvr.sync.coordinator import SyncReport, WeightSync
from megatron_rlvr.trainer import scratch
from megatron_rlvr.trainer.checks.configuration import check_shape, check_warm_start_missing
from megatron_rlvr.trainer.checks.transport import with_memory_saver
from megatron_rlvr.trainer.diagnostics.law_setup import law_tracker
from megatron_rlvr.trainer.diagnostics.measurements import Diagnostics
from megatron_rlvr.trainer.servers.engines import DiskPush, Routing, open_sync, sync_metrics
from megatron_rlvr.trainer.servers.rollout_supply import LiveRollouts, ReplayedRollouts, RolloutSupply
from megatron_rlvr.trainer.steering.controls import Controls
from megatron_rlvr.trainer.stopping import RunInterruptedError, StopSignals
from megatron_rlvr.trainer.update.elision import ElisionPlan, plan_elision
from megatron_rlvr.trainer.update.prompt_sharing import PromptPlan, plan_prompts
from megatron_rlvr.trainer.update.steps import Updater
from megatron_rlvr.trainer.warm_cache import WarmCacheEntry, cache_key, finished_model
from megatron_rlvr.trainer.warm_start import WarmStart
from megatron_rlvr.types import EngineError, EvalBatch, RolloutBatch, Stateful
from megatron_rlvr.weights.hf_config import ModelShape

T = TypeVar("T")
DATA_TIMEOUT_S = 300.0
"""For the rollout process to load data and start its verifiers."""
SERVER_NEWS_S = 15.0
CACHE_POLL_S = 1.0
SERVERS_GONE = (EngineError, RolloutError, ServerStartError)
"""What a run runs into whose servers or rollout process have ended."""


class RunStoppedError(RuntimeError):
    """Another rank failed; its own message tells why."""


class Session:
    """The parts of a run, built by `open`; every method is collective over the trainer's ranks.

    Args:
        stop: this rank's requests to stop; while rollouts are awaited they take effect at once.

    Attributes:
        policy_version: completed rollout steps whose weights the servers hold.
        stateful: by name, what else belongs into a checkpoint (controllers, monitors).
    """

    policy: Policy
    prompts: PromptPlan
    updater: Updater
    diagnostics: Diagnostics
    dynamics: DynamicsMonitor
    law: LawTracker
    sync: WeightSync

    def __init__(
        self, config: RunConfig, parallel: ParallelContext, run_dir: Path, view: LiveView | None, stop: StopSignals
    ) -> None:
        self.config = config
        self.stop = stop
        self.parallel = parallel
        self.run_dir = run_dir
        self.view = view
        self.policy_version = 0
        self.controls = Controls(config.advantage, config.loss, config.controller, seed=config.train.seed)
        self.stateful: dict[str, Stateful] = {"controls": self.controls}
        self._disk = DiskPush(run_dir / "sync", is_main=parallel.ranks.is_main)
        self._stack = ExitStack()
        self._servers: LocalServers | None = None
        self._service: RolloutService | None = None
        self._supply: RolloutSupply | None = None
        self._routing: Routing | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def elision(self) -> ElisionPlan:
        """What becomes of responses with zero advantage in the next update."""
        return plan_elision(self.config.train, self.updater.loss, has_auxiliary_loss=self.policy.has_auxiliary_loss)

    @property
    def is_live(self) -> bool:
        """Whether rollouts come from servers and not from files."""
        return self.config.rollout.source is RolloutSource.live

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The policy's."""
        return Tokenizer.load(self.policy.path)

    @property
    def is_main(self) -> bool:
        return self.parallel.ranks.is_main

    def open(self, *, resumes: bool) -> None:
        """Makes or finds the model, starts servers and rollouts, loads the policy, warms it up, syncs it.

        Args:
            resumes: a checkpoint follows: neither warm start nor sync are of use.
        """
        ops.set_backend(self.config.ops.backend.value)
        problems = load_problems(self.config.data, self.config.reward) if self.config.warm_start.enabled else None
        cache = WarmCacheEntry(Path(self.config.warm_start.cache_dir) / cache_key(self.config))
        ready: Path | None = self.on_main(lambda: cache.finished)
        if problems is not None and ready is None:
            check_warm_start_missing(self.config, cache.folder, resumes=resumes)
            if not resumes:
                ready = self._claim_warm_start(cache)
        path = self.on_main(lambda: str(ready or self._initial_model(cache, problems)))
        shape = ModelShape.from_hf(path)
        check_shape(self.config, shape)
        self.on_main(lambda: self._start_rollouts(path))
        if not self.config.train.enabled:
            self.on_main(self._await_servers)
            return
        self._load_policy(path, shape)
        if self.is_live:
            self._connect()
        if not resumes:
            self.push_weights()
            if problems is not None and ready is None:
                path = str(self._warm_up(problems, cache))
        self._build_updater(path)

    def _claim_warm_start(self, cache: WarmCacheEntry) -> Path | None:
        """None when this run is to make the warm start; where another one does, waits for its result."""
        self._stack.callback(cache.release)
        told = False
        while not self.on_main(lambda: cache.finished is not None or cache.claim()):
            if not told:
                told = True
                self.note(f"another run ({cache.maker()}) makes this warm start: waiting for it, {cache.folder}")
            time.sleep(CACHE_POLL_S)
        return self.on_main(lambda: cache.finished)

    def _initial_model(self, cache: WarmCacheEntry, problems: ProblemSet | None) -> Path:
        """The folder that training starts from; a scratch model is made from the task's text."""
        config = self.config
        if config.model.path is not None:
            return Path(config.model.path)
        assert config.model.scratch is not None
        assert problems is not None
        if finished_model(cache.init) is not None:
            return cache.init
        cache.folder.mkdir(parents=True, exist_ok=True)
        sample = [problems.train[i] for i in range(min(2000, len(problems.train)))]
        texts = [f"{message['content']}{problem.answer}" for problem in sample for message in problem.messages]
        scratch.make_model(cache.init, config.model.scratch, texts=texts, seed=config.train.seed)
        return cache.init

    def _start_rollouts(self, path: str) -> None:
        """On rank 0: begins to start the servers, and starts the rollout process meanwhile."""
        config = self.config
        self.note(f"{describe(config.parallel)}; world size {self.parallel.ranks.world_size}")
        if config.rollout.replay_from is not None:
            replay = ReplayService(
                Path(config.rollout.replay_from),
                group_size=config.rollout.group_size,
                prompts_per_step=config.rollout.prompts_per_step,
            )
            self._supply = ReplayedRollouts(replay, stop=self.stop)
            self.note(f"rollouts are replayed from {config.rollout.replay_from}")
            return
        self._servers = LocalServers(
            with_memory_saver(config, gpu=platform.on_gpu()),
            model_path=path,
            dtype=config.rollout.server.dtype or config.model.dtype,
            run_dir=self.run_dir,
        )
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
        self._supply = LiveRollouts(
            self._service,
            self._servers,
            brings_weights=config.train.enabled,
            phase=self.phase,
            stop=self.stop,
            prompts_per_step=config.rollout.prompts_per_step,
            num_problems={"": info.num_val, **info.eval_sets},
            record_in=self.run_dir / FOLDER if config.rollout.record else None,
        )
        dropped = f", {info.num_dropped_prompts} too long" if info.num_dropped_prompts else ""
        self.note(f"{info.num_train} training and {info.num_val} held-out problems{dropped}")

    def _load_policy(self, path: str, shape: ModelShape) -> None:
        self.policy = self._policy(path, shape, trainable=True)
        self.note(f"policy of {self.policy.num_parameters():,} parameters in {self.config.model.dtype.value}")
        self.prompts = plan_prompts(
            self.config.train.share_prompts,
            attends_packed=self.policy.attends_packed,
            has_auxiliary_loss=self.policy.has_auxiliary_loss,
        )

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
        self.diagnostics = Diagnostics(
            self.policy, self.parallel, config=config.diagnostics, temperature=config.rollout.temperature
        )
        self.stateful["dynamics"] = self.dynamics = DynamicsMonitor(window=config.diagnostics.window)
        self.stateful["law"] = self.law = law_tracker(config)
        self.updater = Updater(
            self.policy,
            self.parallel,
            loss=config.loss,
            optim=config.optim,
            temperature=config.rollout.temperature,
            seed=config.train.seed,
            total_updates=config.train.steps * config.train.updates_per_rollout,
            reference=reference,
            observer=self.diagnostics,
        )
        self.note(f"responses with zero advantage stay {self.elision}; prompts are computed {self.prompts}")

    def _connect(self) -> None:
        """Waits for the servers and forms the weight-update groups."""
        config = self.config
        servers: list[ServerInfo] = self.on_main(self._await_servers)
        self.sync = open_sync(
            config, servers, local=self._servers, policy=self.policy, parallel=self.parallel, on_main=self.on_main
        )
        self._stack.callback(self.sync.close)

    def _await_servers(self) -> list[ServerInfo]:
        assert self._servers is not None
        assert self._service is not None
        servers = self._servers.wait_ready(self._every(SERVER_NEWS_S))
        self._routing = Routing(self._service, self._servers)
        self._routing.start([server.url for server in servers])
        self.note(f"servers ready: {', '.join(map(str, servers))}")
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

    def push_weights(self) -> dict[str, Metric]:
        """Brings the servers to the current weights under the current version; rollouts come from those that took them.

        Raises:
            EngineError: no server took them; engines that hold a part of them stay paused.
        """
        if not self.is_live:
            return {}
        if self.config.sync.transport is Transport.disk:
            report = self._disk.push(self.sync, self.policy, version=self.policy_version)
        else:
            report = self.sync.run(self.policy.weights, version=self.policy_version)
        self.on_main(lambda: self._route(report))
        return sync_metrics(report)

    def release_memory(self) -> None:
        """Before training on the servers' devices: lets them give their memory back until the next `push_weights`."""
        if self.config.sync.release_memory and self.is_live:
            self.sync.release_memory()

    def _route(self, report: SyncReport) -> None:
        assert self._routing is not None
        for line in self._routing.follow(report):
            self.note(line)

    def _warm_up(self, problems: ProblemSet, cache: WarmCacheEntry) -> Path:
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
        draft: Path = self.on_main(lambda: cache.draft)
        self.policy.save_hf(draft, like=self.policy.path)
        return self.on_main(lambda: cache.keep(draft))

    @property
    def supply(self) -> RolloutSupply:
        """Where rollouts come from, on rank 0."""
        assert self._supply is not None, "open comes first, and rank 0 alone has rollouts"
        return self._supply

    def generate(self, step: int) -> RolloutBatch | None:
        """The rollouts of one step, on rank 0 alone; servers that come back meanwhile get the weights."""
        return self._from_servers(lambda: self.supply.generate(step, policy_version=self.policy_version))

    def _from_servers(self, ask: Callable[[], T | ServerTrouble]) -> T | None:
        """What rank 0 gets, None on the others; asks again after a server's trouble, which a sync takes away."""
        while True:
            answer = self.on_main(ask, share=False)
            trouble = self.parallel.broadcast_object(answer if isinstance(answer, ServerTrouble) else None)
            if trouble is None:
                return answer  # type: ignore[return-value]
            self.note(f"server {trouble.url} {trouble.reason}: all servers get the current weights")
            self.on_main(lambda: self._hold(True))
            self.push_weights()
            self.on_main(lambda: self._hold(False))

    def _hold(self, held: bool) -> None:
        assert self._service is not None
        self._service.hold(held)
        self.supply.mended()

    def evaluate(self, *, max_problems: int | None = None) -> EvalBatch:
        """Answers to the held-out problems under the weights that the servers hold."""
        batch = self._from_servers(lambda: self.supply.evaluate(self.policy_version, max_problems=max_problems))
        summary = self.parallel.broadcast_object(
            replace(batch, groups=[_light(group) for group in batch.groups]) if batch else None
        )
        return batch or summary

    def answer_set(self, key: str) -> EvalBatch:
        """Answers to a named set under the weights that the servers hold; on rank 0 alone, and not collective.

        Args:
            key: of ``eval.sets``: a set's name, with ``/greedy`` behind it for its greedy answers.
        """
        return self.supply.answer_set(self.policy_version, key)

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
            except SERVERS_GONE as caught:
                error = caught
                if self.stop.reason is not None:
                    # A batch system's SIGTERM reaches all of a job at once: the servers have ended of it too.
                    error = RunInterruptedError(self.stop.reason)
                    self.note(f"asked to stop by {self.stop.reason}; meanwhile: {caught}")
            except Exception as caught:  # noqa: BLE001 - passed on below; the other ranks must not wait for ever
                error = caught
            if isinstance(error, RunInterruptedError):
                outcome = ("interrupted", str(error))
            elif error is not None:
                outcome = ("failed", f"{type(error).__name__}: {error}")
        status, payload = self.parallel.broadcast_object(outcome)
        if error is not None:
            raise error
        if status == "interrupted":
            raise RunInterruptedError(payload)
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


def _light(group):
    """The group without token arrays, for ranks that only need its verdicts."""
    return replace(group, rollouts=[replace(r, response_ids=r.response_ids[:0], text="") for r in group.rollouts])
