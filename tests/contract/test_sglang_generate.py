"""What the client relies on when it generates, against the fake server and the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import requests

from tests.contract.conftest import PROMPT, Subject
from tests.contract.hugging_face import log_softmax, reference_logits
from tests.contract.talk import ENDLESS, RunningRequest, generate, post


def test_answer_has_ids_logprobs_reason_and_version(subject: Subject) -> None:
    answer = generate(subject.url, PROMPT, {"max_new_tokens": 7, "temperature": 1.0, "ignore_eos": True}, rid="request")
    meta = answer["meta_info"]
    assert meta["id"] == "request"
    assert meta["finish_reason"] == {"type": "length", "length": 7}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(PROMPT), 7)
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert len(answer["output_ids"]) == 7
    assert all(entry[0] < 0.0 for entry in meta["output_token_logprobs"])
    assert meta["weight_version"] == "0"
    if subject.tells_spans:
        assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 7}]
    assert isinstance(answer["text"], str)


def test_batch_answers_in_order_with_samples_of_a_prompt_together(subject: Subject) -> None:
    greedy = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    other = [*PROMPT, 33]
    alone = [generate(subject.url, ids, greedy)["output_ids"] for ids in (PROMPT, other)]
    assert alone[0] != alone[1]
    together = generate(subject.url, [PROMPT, other], greedy)
    assert [answer["output_ids"] for answer in together] == alone
    doubled = generate(subject.url, [PROMPT, other], {**greedy, "n": 2})
    assert [answer["output_ids"] for answer in doubled] == [alone[0], alone[0], alone[1], alone[1]]


def test_samples_of_a_prompt_differ_and_get_new_ids(subject: Subject) -> None:
    answers = generate(subject.url, PROMPT, {"max_new_tokens": 12, "n": 3, "ignore_eos": True}, rid="mine")
    assert len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 3
    assert "mine" not in {answer["meta_info"]["id"] for answer in answers}


def test_stop_token_ends_the_answer_and_is_kept_in_it(subject: Subject) -> None:
    greedy = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    ids = generate(subject.url, PROMPT, greedy)["output_ids"]
    end = ids.index(ids[3])
    answer = generate(subject.url, PROMPT, {"max_new_tokens": 6, "temperature": 0.0, "stop_token_ids": [ids[3]]})
    assert answer["output_ids"] == ids[: end + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[3]}


def test_wrong_value_is_a_400_with_a_message_and_wrong_name_an_error(subject: Subject) -> None:
    refused = post(subject.url, "/generate", {"input_ids": PROMPT, "sampling_params": {"temperature": -1.0}})
    assert refused.status_code == 400
    assert "temperature must be" in refused.json()["error"]["message"]
    unknown = post(subject.url, "/generate", {"input_ids": PROMPT, "sampling_params": {"temprature": 1.0}})
    assert unknown.status_code in (400, 500), "500 up to 0.5.22"


def test_abort_by_id_returns_what_there_is(subject: Subject) -> None:
    answer = RunningRequest(subject.url, PROMPT).abort()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < ENDLESS["max_new_tokens"]
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_held_request_goes_on_under_the_new_version(subject: Subject, mode: str) -> None:
    running = RunningRequest(subject.url, PROMPT)
    subject.engine.pause(mode)
    subject.engine.set_weight_version(8)
    subject.engine.resume()
    running.read_until_version("8")
    answer = running.abort()
    assert answer["meta_info"]["weight_version"] == "8"
    if not subject.tells_spans:
        return
    spans = answer["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == ["0", "8"]
    assert [spans[0]["start"], spans[0]["end"]] == [0, spans[1]["start"]]
    assert spans[1]["end"] == len(answer["output_ids"])


def test_pause_by_abort_returns_what_there_is_and_holds_new_requests(subject: Subject) -> None:
    running = RunningRequest(subject.url, PROMPT)
    subject.engine.pause("abort")
    answer = running.rest()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"]) > 0
    with pytest.raises(requests.ReadTimeout):
        requests.post(subject.url + "/generate", json={"input_ids": PROMPT}, timeout=1.0)
    subject.engine.resume()
    assert generate(subject.url, PROMPT, {"max_new_tokens": 2, "ignore_eos": True})["output_ids"]


def test_health_does_not_fail_while_paused(subject: Subject) -> None:
    subject.engine.pause("retract")
    assert requests.get(subject.url + "/health", timeout=60.0).status_code == 200
    subject.engine.resume()


@pytest.mark.server
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_real_logprobs_equal_hugging_face(real_server: Any, temperature: float) -> None:
    """Output log-probs are tempered, input log-probs are not."""
    params = {"max_new_tokens": 40, "temperature": temperature, "ignore_eos": True}
    answer = generate(real_server.url, PROMPT, params, logprob_start_len=0)
    ids = PROMPT + answer["output_ids"]
    logits_TV = reference_logits(real_server.model, ids)
    output = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    expected = log_softmax(logits_TV / temperature)[np.arange(len(PROMPT) - 1, len(ids) - 1), ids[len(PROMPT) :]]
    np.testing.assert_allclose(output, expected, atol=1e-4, rtol=0.0)
    given = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
    assert given[0] is None
    expected = log_softmax(logits_TV)[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(given[1:], expected, atol=1e-4, rtol=0.0)


@pytest.mark.server
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 50}], ids=["plain", "top_p and top_k"])
def test_real_sampling_by_seed_does_not_depend_on_the_batch(real_server: Any, filters: dict[str, Any]) -> None:
    """On a CPU by the platform module, on a GPU with rollout.server.deterministic."""
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True, **filters}
    seeds = list(range(6))
    alone = [generate(real_server.url, PROMPT, {**sampling, "sampling_seed": seed})["output_ids"] for seed in seeds]
    others = [{**sampling, "sampling_seed": seed} for seed in reversed(seeds)]
    unseeded = [{**sampling, "max_new_tokens": 5}] * 3
    together = generate(real_server.url, [PROMPT] * 9, [*unseeded, *others])
    assert [answer["output_ids"] for answer in together[3:]] == alone[::-1]
    assert len({tuple(ids) for ids in alone}) == len(seeds)
    assert len({tuple(answer["output_ids"]) for answer in together[:3]}) == 3, "no seed: drawn anew"
