"""The rollout process with real problems, tokenizer and verifiers, against a server that can add."""

import asyncio
import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_rlvr.config.schema import (
    DataConfig,
    EvalConfig,
    GroupFilter,
    ReasoningGymSpec,
    RewardConfig,
    RolloutConfig,
)
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.rollout import service as service_module
from megatron_rlvr.rollout.messages import Progress, RolloutError
from megatron_rlvr.rollout.service import RolloutService
from megatron_rlvr.rollout.worker import RolloutWorker
from megatron_rlvr.types import FinishReason, RolloutBatch
from tests.fakes.sglang_server import FakeSGLang, Fault
from tests.fakes.tiny_qwen3 import write_byte_tokenizer

EOS = 258
GROUP_SIZE = 4
START_S = 120.0


class AddingServer(FakeSGLang):
    """Solves "problem: 4 + 3 =" in some of the responses to a problem: as many as the answer modulo 5."""

    def __init__(self, tokenizer: Tokenizer, **options: Any) -> None:
        super().__init__(next_token=self._next, decode=lambda ids: tokenizer.decode(ids), eos_token_id=EOS, **options)
        self.tokenizer = tokenizer
        self.asked: Counter[str] = Counter()

    def _next(self, context: Sequence[int], sample: int, updates: int) -> tuple[int, float]:
        question, written = re.fullmatch(r".*problem: ([-+ 0-9]+) =(.*)", self.tokenizer.decode(context)).groups()
        answer = eval(question)
        if not written:
            number = self.asked[question] % GROUP_SIZE
            self.asked[question] += 1
            written = "" if number < answer % 5 else "x"
            return int(self.tokenizer.encode(written or str(answer)[0])[0]), -1.5
        if written == "x" or written == str(answer):
            return EOS, -0.25
        return int(self.tokenizer.encode(str(answer)[len(written)])[0]), -0.75


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def server(model: Path) -> Iterator[AddingServer]:
    with AddingServer(Tokenizer.load(model)) as running:
        yield running


def chain_sum(**changes: Any) -> DataConfig:
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    settings: dict[str, Any] = {
        "reasoning_gym": [ReasoningGymSpec(name="chain_sum", params=params)],
        "train_size": 500,
        "val_size": 6,
    }
    return DataConfig(**(settings | changes))


def service(
    model: Path,
    log: Path,
    urls: Sequence[str] = (),
    *,
    data: DataConfig | None = None,
    reward: RewardConfig | None = None,
) -> RolloutService:
    return RolloutService(
        data=data or chain_sum(),
        reward=reward or RewardConfig(num_workers=1),
        rollout=RolloutConfig(
            prompts_per_step=4,
            group_size=GROUP_SIZE,
            max_response_tokens=16,
            group_filter=GroupFilter.mixed,
            max_gen_batches=20,
            request_timeout_s=60.0,
            max_retries=1,
        ),
        evaluation=EvalConfig(num_samples=GROUP_SIZE),
        tokenizer_path=str(model),
        urls=urls,
        seed=3,
        log_path=log,
    )


def family_of(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def assert_gone(processes: list[psutil.Process], *, within_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert alive == []


def check_values(batch: RolloutBatch) -> None:
    for group in batch.groups:
        assert len(group.rollouts) == GROUP_SIZE
        num_right = int(group.prompt.answer) % 5
        assert [rollout.text for rollout in group.rollouts].count(group.prompt.answer) == min(num_right, GROUP_SIZE)
        for rollout in group.rollouts:
            assert rollout.correctness == rollout.reward == float(rollout.text == group.prompt.answer)
            assert rollout.finish_reason is FinishReason.stop
            assert rollout.response_ids[-1] == EOS
            assert rollout.rollout_logprobs.dtype == np.float32
            expected = [-1.5, *[-0.75] * (len(rollout.text) - 1), -0.25]
            assert rollout.rollout_logprobs.tolist() == expected


def test_a_run_with_real_parts(model: Path, server: AddingServer, tmp_path: Path):
    with service(model, tmp_path / "rollout.log", [server.url]) as running:
        info = running.start(START_S)
        assert (info.num_train, info.num_val, info.num_dropped_prompts) == (500, 6, 0)
        processes = family_of(running.ping())
        assert len(processes) >= 2  # at least one verifier
        seen: list[Progress] = []
        first = running.generate(step=0, policy_version=0, on_progress=seen.append)
        second = running.generate(step=1, policy_version=0)
        state = pickle.dumps(running.state_dict())
        third = running.generate(step=2, policy_version=0)
        evaluation = running.evaluate(policy_version=0)
        # the whole of it happened without torch
        assert "libtorch" not in Path(f"/proc/{processes[0].pid}/maps").read_text()
    assert_gone(processes, within_s=5)

    batches = [first, second, third]
    for batch in batches:
        check_values(batch)
        assert len(batch.groups) == 4
        assert all(group.mixed for group in batch.groups)
    used = [group.index for batch in batches for group in batch.groups]
    assert used == sorted(set(used))
    assert seen[-1].accepted >= seen[-1].wanted == 4
    assert [group.prompt.uid for group in evaluation.groups] == [f"val/{i}" for i in range(6)]
    rates = [min(int(group.prompt.answer) % 5, 4) / 4 for group in evaluation.groups]
    assert evaluation.accuracy == pytest.approx(np.mean(rates))

    # a new process continues with the batch that came after the state
    with service(model, tmp_path / "resumed.log") as resumed:
        resumed.start(START_S)
        resumed.load_state_dict(pickle.loads(state))
        resumed.connect([server.url])
        again = resumed.generate(step=2, policy_version=0)
    assert [group.prompt.uid for group in again.groups] == [group.prompt.uid for group in third.groups]


def test_overlap_failures_and_signals(
    model: Path, server: AddingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with service(model, tmp_path / "rollout.log") as running:
        running.start(START_S)
        with pytest.raises(RolloutError, match="knows no servers yet"):
            running.generate(step=0, policy_version=0)

        with pytest.raises(RolloutError, match=r"server http://127.0.0.1:9 cannot be reached: .*[Cc]onnect"):
            running.connect([server.url, "http://127.0.0.1:9"])
        running.connect([server.url])

        before = running.state_dict()
        running.generate_async(step=0, policy_version=0)
        assert running.state_dict() == before
        with pytest.raises(RuntimeError, match="Generate is still under way"):
            running.evaluate(policy_version=0)
        check_values(running.result())
        assert running.state_dict() != before
        with pytest.raises(RuntimeError, match="no rollouts are under way"):
            running.result()

        # a failure names the server, and costs nothing but the step
        before = running.state_dict()
        server.fault("generate", Fault.error)
        with pytest.raises(RolloutError, match=rf"{server.url}: HTTP 500") as refused:
            running.generate(step=1, policy_version=0)
        assert "Traceback" not in str(refused.value), "it says all there is to say"
        assert running.state_dict() == before
        server.heal()
        assert f"server {server.url} leaves the routing: HTTP 500: Internal Server Error" in caplog.messages

        # Ctrl-C in the terminal is the trainer's business, and so is what a batch system sends to all of a job
        os.kill(running.ping(), signal.SIGINT)
        os.kill(running.ping(), signal.SIGTERM)
        check_values(running.generate(step=1, policy_version=0))

        # closing does not wait for responses
        processes = family_of(running.ping())
        server.fault("generate", Fault.hang)
        running.generate_async(step=2, policy_version=0)
        running.close()
        assert_gone(processes, within_s=5)
        with pytest.raises(RuntimeError, match="not started"):
            running.ping()


def test_a_killed_process_is_noticed_and_leaves_nothing(model: Path, server: AddingServer, tmp_path: Path):
    with service(model, tmp_path / "rollout.log", [server.url]) as running:
        running.start(START_S)
        processes = family_of(running.ping())
        server.fault("generate", Fault.hang)
        hanging = threading.Event()
        running.generate_async(step=0, policy_version=0)
        killer = threading.Timer(0.2, lambda: (hanging.set(), processes[0].kill()))
        killer.start()
        with pytest.raises(RolloutError, match=r"the rollout process was killed by SIGKILL; the end of .*rollout.log"):
            running.result()
        assert hanging.is_set()
        killer.join()
        assert_gone(processes, within_s=5)


def test_a_stuck_process_is_ended(model: Path, server: AddingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with service(model, tmp_path / "rollout.log", [server.url]) as running:
        running.start(START_S)
        processes = family_of(running.ping())
        monkeypatch.setattr(service_module, "SILENCE_S", 0.5)
        processes[0].suspend()
        with pytest.raises(RolloutError, match=r"sent nothing for 0.5 s in Generate and was ended"):
            running.generate(step=0, policy_version=0)
        assert_gone(processes, within_s=5)


def test_a_busy_trainer_does_not_block_the_process():
    async def scenario() -> int:
        worker = RolloutWorker(theirs)
        for _ in range(20000):  # far more than a socket holds
            worker.tell(Progress(finished=1, drawn=1, accepted=1, wanted=1, response_tokens=1))
        received = 0
        while ours.poll():
            assert ours.recv().finished == 1
            received += 1
        return received

    ours, theirs = Pipe()
    with ours, theirs:
        assert 10 < asyncio.run(scenario()) < 20000


TRAINER = """
    import pickle, sys, time
    from megatron_rlvr.rollout.service import RolloutService
    options = pickle.load(open(sys.argv[1], "rb"))
    service = RolloutService(**options)
    service.start({start_s})
    print(service.ping(), flush=True)
    service.generate(step=0, policy_version=0)
"""


def test_the_process_and_its_verifiers_end_with_a_killed_trainer(model: Path, server: AddingServer, tmp_path: Path):
    made = service(model, tmp_path / "rollout.log")._initialize
    options = {
        "data": made.data, "reward": made.reward, "rollout": made.rollout, "evaluation": made.evaluation,
        "tokenizer_path": str(model), "urls": [server.url], "seed": 0, "log_path": tmp_path / "rollout.log",
    }  # fmt: skip
    (tmp_path / "options").write_bytes(pickle.dumps(options))
    server.fault("generate", Fault.hang)
    command = [sys.executable, "-c", textwrap.dedent(TRAINER.format(start_s=START_S)), str(tmp_path / "options")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            processes = family_of(int(trainer.stdout.readline()))
            assert len(processes) >= 2
        finally:
            trainer.kill()
    assert_gone(processes, within_s=15)
    assert "the trainer is gone" in (tmp_path / "rollout.log").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": chain_sum(reasoning_gym=[ReasoningGymSpec(name="chain_summ")])}, "chain_summ"),
        ({"reward": RewardConfig(verifier="nonsense")}, "reward.verifier must be one of"),
        ({"data": DataConfig(jsonl=["broken.jsonl"])}, r"broken\.jsonl:2"),
    ],
)
def test_mistakes_are_value_errors(changes: dict, message: str, model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"\n')
    with service(model, tmp_path / "rollout.log", **changes) as running, pytest.raises(ValueError, match=message):
        running.start(START_S)


def test_a_reward_by_path_is_found_where_the_trainer_finds_it(
    model: Path, server: AddingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_reward.py").write_text("def score(text, prompt):\n    return 1.0 if 'x' in text else 0.25\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = RewardConfig(verifier="own_reward:score", num_workers=1, binary=False)
    with service(model, tmp_path / "rollout.log", [server.url], reward=reward) as running:
        running.start(START_S)
        batch = running.generate(step=0, policy_version=0)
    for group in batch.groups:
        assert {(r.text == "x", r.reward, r.correctness) for r in group.rollouts} == {
            (True, 1.0, 1.0),
            (False, 0.25, 0.0),
        }


def test_the_process_starts_without_torch():
    code = "import sys, megatron_rlvr.rollout.worker; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_close_without_start_is_nothing(model: Path, tmp_path: Path):
    running = service(model, tmp_path / "rollout.log")
    with contextlib.closing(running):
        running.close()
    with pytest.raises(RuntimeError, match="not started"):
        running.generate(step=0, policy_version=0)
