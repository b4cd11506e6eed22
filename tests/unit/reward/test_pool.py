"""The worker pool with real math-verify and reasoning-gym, and with verifiers that hang, crash and eat memory."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from megatron_rlvr.config.schema import RewardConfig
from megatron_rlvr.reward.pool import VerifierPool, VerifierPoolError
from megatron_rlvr.types import Prompt, VerifierStatus

FOREVER_S = 600.0

VERIFIER_SOURCE = """
import ctypes, os, signal, time
from megatron_rlvr.reward.answer import UnparsableError

def verify(text, prompt):
    if text == "hang":
        signal.alarm(0)
        while True:
            time.sleep(60)
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "raise":
        raise KeyError("no such unit")
    if text == "unparsable":
        raise UnparsableError("nothing to read")
    if text == "nan":
        return float("nan")
    if text == "none":
        return None
    if text == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(2**24))
    return float(text)
"""


@pytest.fixture
def trial_verifier(tmp_path, monkeypatch):
    """Path of a verifier that does what the response says."""
    (tmp_path / "trial_verifier.py").write_text(VERIFIER_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "trial_verifier:verify"


def make_prompt(answer="4", metadata=None):
    input_ids = np.arange(3, dtype=np.int32)
    return Prompt(uid="t/0", text="q", input_ids=input_ids, answer=answer, data_source="t", metadata=metadata or {})


def score_all(config, cases):
    """Scores [(prompt, text)] at once; returns (scores, counts, restarts, pids before closing)."""

    async def run():
        async with VerifierPool(config) as pool:
            scores = await asyncio.gather(*[pool.score(prompt, text) for prompt, text in cases])
            return scores, dict(pool.counts), pool.num_restarts, pool.pids

    return asyncio.run(run())


def wait_for_end(pids):
    """Returns when none of the processes runs any more."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([handle], [], [], 60)[0], f"process {pid} is still there"
        finally:
            os.close(handle)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "text",
    ["$2^{2^{2^{2^{2^2}}}}$", "$10000000!$", "$" + "(" * 2000 + "1" + ")" * 2000 + "$"],
    ids=["tower", "factorial", "deep"],
)
def test_math_that_hangs_times_out(text):
    config = RewardConfig(verifier="math", timeout_s=1.0, num_workers=1)
    (score,), counts, _, pids = score_all(config, [(make_prompt(), text)])
    assert (score.status, score.correctness) == (VerifierStatus.timeout, 0.0)
    assert "reward.timeout_s = 1 s" in score.detail
    assert counts == {VerifierStatus.timeout: 1}
    assert not any(is_running(pid) for pid in pids)


def test_math_verdicts():
    texts = ["\\boxed{4}", "so it is 5", "no idea", "\\boxed{\\frac{}", "<answer>\\frac{8}{2}</answer>"]
    config = RewardConfig(verifier="math", timeout_s=FOREVER_S)
    scores, counts, restarts, pids = score_all(config, [(make_prompt(), text) for text in texts])
    ok, unparsable = VerifierStatus.ok, VerifierStatus.unparsable
    assert [score.status for score in scores] == [ok, ok, unparsable, unparsable, ok]
    assert [score.correctness for score in scores] == [1, 0, 0, 0, 1]
    assert counts == {ok: 3, unparsable: 2}
    assert restarts == 0
    assert not any(is_running(pid) for pid in pids)


def test_after_a_timeout_a_new_worker_goes_on(trial_verifier):
    config = RewardConfig(verifier=trial_verifier, timeout_s=2.0, num_workers=1)
    texts = ["1", "hang", "0", "hang", "1"]
    scores, counts, restarts, _ = score_all(config, [(make_prompt(), text) for text in texts])
    ok, timeout = VerifierStatus.ok, VerifierStatus.timeout
    assert [score.status for score in scores] == [ok, timeout, ok, timeout, ok]
    assert [score.correctness for score in scores] == [1, 0, 0, 0, 1]
    assert counts == {ok: 3, timeout: 2}
    assert restarts == 2


def test_every_way_to_fail_has_its_status(trial_verifier):
    texts = ["exit", "1.0", "segfault", "raise", "unparsable", "nan", "none", "memory", "0.25", "0.999"]
    config = RewardConfig(verifier=trial_verifier, timeout_s=60.0, memory_limit_mb=256, num_workers=2)
    scores, counts, *_ = score_all(config, [(make_prompt(), text) for text in texts])
    found = dict(zip(texts, scores, strict=True))
    crashes = ("exit", "segfault", "raise", "nan", "none", "memory")
    assert {text for text in texts if found[text].status is VerifierStatus.crash} == set(crashes)
    assert found["unparsable"].status is VerifierStatus.unparsable
    assert [found[text].status for text in ("1.0", "0.25", "0.999")] == [VerifierStatus.ok] * 3
    for text, detail in {
        "exit": "exit code 3",
        "segfault": "signal SIGSEGV",
        "raise": "KeyError: 'no such unit'",
        "unparsable": "nothing to read",
        "nan": "finite number, got nan",
        "none": "TypeError",
        "memory": "more than 256 MiB",
    }.items():
        assert detail in found[text].detail
    assert all(found[text].reward == 0.0 for text in (*crashes, "unparsable", "0.25"))
    assert found["1.0"].reward == found["0.999"].reward == 1.0
    assert counts == {VerifierStatus.crash: 6, VerifierStatus.unparsable: 1, VerifierStatus.ok: 3}


def test_raw_rewards_and_threshold(trial_verifier):
    config = RewardConfig(verifier=trial_verifier, binary=False, threshold=0.5, num_workers=1)
    scores, *_ = score_all(config, [(make_prompt(), text) for text in ("0.05", "0.5", "2")])
    assert [(score.correctness, score.reward) for score in scores] == [(0.0, 0.05), (1.0, 0.5), (1.0, 2.0)]


def test_jobs_behind_a_hanging_one_go_to_another_worker(trial_verifier):
    config = RewardConfig(verifier=trial_verifier, timeout_s=FOREVER_S, num_workers=2)

    async def run():
        async with VerifierPool(config) as pool:
            await asyncio.gather(*[pool.score(make_prompt(), "1") for _ in range(400)])  # learns that they are cheap
            hanging = asyncio.create_task(pool.score(make_prompt(), "hang"))
            scores = await asyncio.gather(*[pool.score(make_prompt(), "1") for _ in range(60)])
            assert not hanging.done()
            pids = pool.pids
        with pytest.raises(VerifierPoolError, match="closed"):
            await hanging
        return scores, pids

    scores, pids = asyncio.run(run())
    assert [score.correctness for score in scores] == [1.0] * 60
    assert not any(is_running(pid) for pid in pids)


def test_a_killed_idle_worker_is_replaced(trial_verifier):
    async def run():
        async with VerifierPool(RewardConfig(verifier=trial_verifier, num_workers=1)) as pool:
            assert (await pool.score(make_prompt(), "1")).correctness == 1.0
            (pid,) = pool.pids
            os.kill(pid, signal.SIGKILL)
            handle = os.pidfd_open(pid)
            assert select.select([handle], [], [], 60)[0]
            os.close(handle)
            score = await pool.score(make_prompt(), "1")
            return score, pool.num_restarts

    score, restarts = asyncio.run(run())
    assert score.status is VerifierStatus.ok
    assert restarts == 1


def test_an_abandoned_score_does_not_stop_the_pool(trial_verifier):
    async def run():
        async with VerifierPool(RewardConfig(verifier=trial_verifier, num_workers=1, timeout_s=FOREVER_S)) as pool:
            tasks = [asyncio.create_task(pool.score(make_prompt(), "1")) for _ in range(5)]
            await asyncio.sleep(0)  # they are queued
            tasks[3].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True), pool.counts.total()

    scores, counted = asyncio.run(run())
    assert isinstance(scores[3], asyncio.CancelledError)
    assert [score.correctness for place, score in enumerate(scores) if place != 3] == [1.0] * 4
    assert counted == 4


def test_the_pool_works_outside_of_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(score_all(RewardConfig(verifier="math"), [(make_prompt("1/2"), "$0.5$")]))
    )
    thread.start()
    thread.join()
    assert found[0][0][0].correctness == 1.0


PARENT_SOURCE = """
import asyncio, sys
sys.path[:0] = {path!r}
import numpy as np
from megatron_rlvr.config.schema import RewardConfig
from megatron_rlvr.reward.pool import VerifierPool
from megatron_rlvr.types import Prompt

async def run():
    pool = VerifierPool(RewardConfig(verifier="trial_verifier:verify", timeout_s=600.0, num_workers=2))
    await pool.start()
    prompt = Prompt(uid="t/0", text="q", input_ids=np.arange(3), answer="", data_source="t")
    await pool.score(prompt, "1")
    hanging = asyncio.gather(*[pool.score(prompt, "hang") for _ in range(4)])
    while len(pool.pids) < 2:
        await asyncio.sleep(0.01)
    print(*pool.pids, flush=True)
    await hanging

asyncio.run(run())
"""


def test_workers_die_with_a_killed_parent(trial_verifier, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_SOURCE.format(path=sys.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
    finally:
        parent.kill()
        parent.communicate()
    wait_for_end(pids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verifier": "maths"}, "reward.verifier must be one of .*'math'.* got 'maths'"),
        ({"num_workers": 0}, "reward.num_workers must be at least 1, got 0"),
        ({"timeout_s": 0.0}, "reward.timeout_s must be positive, got 0.0"),
        ({"memory_limit_mb": 0}, "reward.memory_limit_mb must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        VerifierPool(RewardConfig(**options))


@pytest.mark.parametrize(
    ("path", "message"),
    [("no_such_module_here:verify", "cannot import 'no_such_module_here'"), ("math:pi", "must be a callable")],
)
def test_a_verifier_that_cannot_be_loaded_stops_the_start(path, message):
    async def run():
        pool = VerifierPool(RewardConfig(verifier=path))
        try:
            with pytest.raises(ValueError, match=message):
                await pool.start()
            with pytest.raises(ValueError, match=message):
                await pool.score(make_prompt(), "1")
        finally:
            await pool.close()
            await pool.close()

    asyncio.run(run())


def test_close_without_start_and_score_after_close():
    async def run():
        pool = VerifierPool(RewardConfig(verifier="exact"))
        await pool.close()
        with pytest.raises(VerifierPoolError, match="closed"):
            await pool.score(make_prompt(), "4")

    asyncio.run(run())
