"""The rollout process: ``python -m megatron_rlvr.rollout.worker --fd N``, started by `RolloutService`.

It holds the HTTP client, the data order and the verifier pool, talks to the trainer over an inherited socket
(`rollout.messages`), and never imports torch. It ends with the trainer, however that ends.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import select
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from megatron_rlvr.config.schema import RolloutConfig
from megatron_rlvr.data.problems import load_problems
from megatron_rlvr.data.prompts import PromptBuilder, PromptStream
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.reward.pool import VerifierPool
from megatron_rlvr.rollout.api_key import use_key_file
from megatron_rlvr.rollout.client import GenerationClient
from megatron_rlvr.rollout.evaluate import SetDefaults, build_sets
from megatron_rlvr.rollout.generate import RolloutGenerator
from megatron_rlvr.rollout.messages import (
    Close,
    Command,
    Connect,
    Evaluate,
    Failure,
    Generate,
    Heartbeat,
    Hold,
    Initialize,
    LoadState,
    Message,
    Notice,
    Ping,
    Progress,
    Result,
    RolloutError,
    ServerTrouble,
    ServiceInfo,
    UseServers,
)

logger = logging.getLogger("megatron_rlvr.rollout.worker")

HEARTBEAT_S = 2.0
GRACE_S = 5.0
"""Time for a clean end once the trainer is gone; then everything in this process group is killed."""


class RolloutWorker:
    """Executes commands one after the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._writable = select.poll()  # not select(), which fails for descriptors beyond 1023
        self._writable.register(connection, select.POLLOUT)
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._rollout: RolloutConfig | None = None
        self._verifier: VerifierPool | None = None
        self._generator: RolloutGenerator | None = None

    async def run(self) -> None:
        """Returns on `Close` or when the trainer is gone, with every connection and verifier process closed."""
        loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._serve())
        closing = asyncio.Event()
        loop.add_reader(self._connection.fileno(), self._read, closing)
        waiting = asyncio.create_task(closing.wait())
        try:
            await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(self._connection.fileno())
            for task in (serving, waiting):
                task.cancel()
            outcomes = await asyncio.gather(serving, waiting, return_exceptions=True)
            await self._close()
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]

    def _read(self, closing: asyncio.Event) -> None:
        try:
            command = self._connection.recv()
        except (EOFError, OSError):
            logger.warning("the trainer is gone")
            closing.set()
            return
        match command:
            case Close():
                closing.set()
            case UseServers(urls=urls, router_url=router_url):
                self._client().routing.use(urls, router_url=router_url)
            case Hold(held=held):
                self._client().routing.hold(held)
            case _:
                self._commands.put_nowait(command)

    def _client(self) -> GenerationClient:
        assert self._generator is not None, "Initialize comes first"
        assert self._generator.client is not None, "Connect comes first"
        return self._generator.client

    async def _serve(self) -> None:
        while True:
            command = await self._commands.get()
            heartbeat = asyncio.create_task(self._beat())
            try:
                value = await self._execute(command)
                state = self._generator.state_dict() if self._generator is not None else None
                answer: Result | Failure = Result(value=value, state=state)
            except Exception as error:  # process edge: whatever it is, the trainer must hear of it
                logger.exception("%s failed", type(command).__name__)
                answer = Failure(
                    error=str(error) or type(error).__name__,
                    user_mistake=isinstance(error, ValueError) and isinstance(command, Initialize | LoadState),
                    foreseen=isinstance(error, RolloutError),
                    traceback=traceback.format_exc(),
                )
            finally:
                heartbeat.cancel()
            self._send(answer)

    async def _beat(self) -> None:
        while True:
            self.tell(Heartbeat())
            await asyncio.sleep(HEARTBEAT_S)

    async def _execute(self, command: Command) -> Any:
        match command:
            case Initialize():
                return await self._initialize(command)
            case Connect(urls=urls, router_url=router_url):
                return await self._connect(urls, router_url)
            case Ping():
                return os.getpid()
        assert self._generator is not None, "Initialize comes first"
        match command:
            case Generate(step=step, policy_version=version):
                return await self._generator.generate(step=step, policy_version=version, on_progress=self.tell)
            case Evaluate(policy_version=version, max_problems=max_problems, key=key):
                return await self._generator.evaluate(
                    policy_version=version, max_problems=max_problems, key=key, on_progress=self.tell
                )
            case LoadState(state=state):
                return self._generator.load_state_dict(state)
            case _:
                raise TypeError(f"unknown command {command!r}")

    async def _initialize(self, config: Initialize) -> ServiceInfo:
        use_key_file(config.rollout.api_key_file)
        problems = load_problems(config.data, config.reward)
        tokenizer = Tokenizer.load(config.tokenizer_path)
        builder = PromptBuilder(
            tokenizer,
            system_prompt=config.data.system_prompt,
            prompt_template=config.data.prompt_template,
            chat_template=config.data.chat_template,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        validation, num_dropped = builder.build_all(problems.val)
        eval_sets = build_sets(config.evaluation.sets, _defaults(config), tokenizer=tokenizer, reward=config.reward)
        self._verifier = VerifierPool(config.reward)
        await self._verifier.start()
        self._generator = RolloutGenerator(
            verifier=self._verifier,
            stream=PromptStream(problems.train, builder, seed=config.seed),
            validation=validation,
            rollout=config.rollout,
            evaluation=config.evaluation,
            overlong=config.reward.overlong,
            seed=config.seed,
            eval_sets=eval_sets,
        )
        self._rollout = config.rollout
        # A parsed answer is thousands of small lists that are gone at once: collecting at every 700 of them, over all
        # that has been loaded, took four times as long as parsing (8,192 tokens: 7.4 ms a response, 1.7 ms with this).
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        return ServiceInfo(
            num_train=len(problems.train),
            num_val=len(validation),
            num_dropped_prompts=num_dropped,
            eval_sets={each.key: len(each.prompts) for each in eval_sets},
        )

    async def _connect(self, urls: tuple[str, ...], router_url: str | None) -> None:
        """Reaches every server before it takes the place of the servers so far."""
        assert self._rollout is not None, "Initialize comes first"
        assert self._generator is not None
        rollout = self._rollout
        client = GenerationClient(
            urls,
            router_url=router_url,
            concurrency=rollout.concurrency,
            request_timeout_s=rollout.request_timeout_s,
            max_retries=rollout.max_retries,
            recovery_s=rollout.recovery_timeout_s,
            silence_s=rollout.silence_timeout_s,
            on_trouble=self.tell,
        )
        try:
            await client.check()
        except BaseException:
            await client.close()
            raise
        if self._generator.client is not None:
            await self._generator.client.close()
        self._generator.client = client

    def tell(self, message: Progress | Heartbeat | Notice | ServerTrouble) -> None:
        """Sends what may as well be lost: while the trainer is busy and reads nothing, sending would block the loop."""
        if self._writable.poll(0):
            self._send(message)

    def _send(self, message: Message) -> None:
        try:
            self._connection.send(message)
        except OSError:
            logger.warning("the trainer is gone: %s not delivered", type(message).__name__)

    async def _close(self) -> None:
        if self._generator is not None and self._generator.client is not None:
            await self._generator.client.close()
        if self._verifier is not None:
            await self._verifier.close()


def _defaults(config: Initialize) -> SetDefaults:
    data, rollout = config.data, config.rollout
    return SetDefaults(
        system_prompt=data.system_prompt,
        prompt_template=data.prompt_template,
        chat_template=data.chat_template,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=rollout.max_response_tokens,
        stop=tuple(rollout.stop),
    )


class _NoticeHandler(logging.Handler):
    """Passes warnings on to the trainer."""

    def __init__(self, worker: RolloutWorker) -> None:
        super().__init__(logging.WARNING)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        # An error has its own way to the trainer. The socket belongs to the loop's thread.
        if record.levelno == logging.WARNING and threading.current_thread() is threading.main_thread():
            self._worker.tell(Notice(text=record.getMessage()))


def watch_trainer(fd: int, trainer_pid: int) -> None:
    """Thread that makes sure of the end: waits until the trainer is gone, grants `GRACE_S`, then kills the group.

    The event loop ends the process by itself when the socket closes. This is for a loop that is busy loading data,
    and for a trainer whose end of the socket lives on in a forked child.
    """
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP)
    while os.getppid() == trainer_pid and not poller.poll(1000):
        pass
    time.sleep(GRACE_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


async def _main(connection: Connection) -> None:
    worker = RolloutWorker(connection)
    logging.getLogger("megatron_rlvr").addHandler(_NoticeHandler(worker))
    await worker.run()


def leave_to_trainer(number: int, frame: FrameType | None) -> None:
    """A batch system's SIGTERM reaches all processes of a job at once; the trainer, which saves first, ends this one.

    A handler and not SIG_IGN, which the verifiers would inherit.
    """


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the trainer")
    parser.add_argument("--trainer-pid", type=int, required=True, help="process whose end ends this one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Ctrl-C reaches the trainer, which decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_to_trainer)
    os.set_inheritable(arguments.fd, False)
    threading.Thread(target=watch_trainer, args=(arguments.fd, arguments.trainer_pid), daemon=True).start()
    asyncio.run(_main(Connection(arguments.fd)))


if __name__ == "__main__":
    main()
