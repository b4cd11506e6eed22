"""Problem sources: determinism, disjoint splits, and errors that name the place."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from megatron_rlvr.config.schema import DataConfig, ReasoningGymSpec, RewardConfig
from megatron_rlvr.data.problems import load_problems

TINY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 distinct sums


def gym(name, weight=1.0, **params):
    return ReasoningGymSpec(name=name, weight=weight, params=params)


def question(problem):
    return problem.messages[-1]["content"]


def load(reward=None, **options):
    return load_problems(DataConfig(**options), reward or RewardConfig())


def test_gym_problems_repeat_by_seed_and_any_order():
    options = {"reasoning_gym": [gym("chain_sum"), gym("basic_arithmetic")], "train_size": 9000, "val_size": 16}
    first, second = load(**options, seed=3), load(**options, seed=3)
    places = [8999, 0, 4500, 1]
    assert [first.train[i] for i in places] == [second.train[i] for i in reversed(places)][::-1]
    assert first.val == second.val
    other = load(**options, seed=4)
    assert question(other.train[0]) != question(first.train[0])
    assert {question(p) for p in other.val} != {question(p) for p in first.val}
    problem = first.train[4500]
    assert problem.uid == "train/4500"
    assert problem.metadata["reasoning_gym"]["entry"]["answer"] == problem.answer
    assert problem.metadata["reasoning_gym"]["family"] == problem.data_source
    assert [p.uid for p in first.val[:2]] == ["val/0", "val/1"]
    assert first.train[1:3] == [first.train[1], first.train[2]]
    with pytest.raises(IndexError, match="got 9000"):
        first.train[9000]


def test_gym_problems_repeat_in_another_process():
    code = (
        "from megatron_rlvr.config.schema import *; from megatron_rlvr.data.problems import load_problems;"
        "p = load_problems(DataConfig(reasoning_gym=[ReasoningGymSpec(name='word_ladder')], val_size=2), "
        "RewardConfig());"
        "print([p.train[i].messages[0]['content'] for i in (5, 6)], [v.answer for v in p.val])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != b""


def test_mixture_follows_the_weights():
    problems = load(reasoning_gym=[gym("chain_sum", 3.0), gym("gcd", 1.0)], train_size=4000, val_size=8)
    assert Counter(p.data_source for p in problems.val) == {"chain_sum": 6, "gcd": 2}
    share = sum(problems.train[i].data_source == "gcd" for i in range(1000)) / 1000
    assert 0.2 < share < 0.3


def test_small_family_trains_only_on_what_is_not_held_out():
    problems = load(reasoning_gym=[gym("chain_sum", **TINY)], train_size=500, val_size=150)
    held_out = {question(p) for p in problems.val}
    assert len(held_out) == 150
    trained = {question(problems.train[i]) for i in range(500)}
    assert not trained & held_out
    assert len(trained) == 50  # all that are left of the 200


def test_family_too_small_for_the_split():
    with pytest.raises(ValueError, match=r"data.val_size must not exceed .* 201 wanted .*'chain_sum'.* 200 found"):
        load(reasoning_gym=[gym("chain_sum", **TINY)], val_size=201)
    with pytest.raises(ValueError, match=r"data.val_size must leave problems to train on.*'chain_sum'"):
        load(reasoning_gym=[gym("chain_sum", **TINY)], val_size=200)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([gym("chainsum")], r"got 'chainsum' \(near names: chain_sum, "),
        ([gym("composite")], "must be a reasoning-gym family, got 'composite'"),
        ([gym("chain_sum", 0.0)], "weight of 'chain_sum' must be positive, got 0.0"),
        ([gym("chain_sum", min_term=3)], r"got 'min_term' \(near: min_terms"),
        ([gym("chain_sum", min_terms=3, max_terms=2)], r"must suit the family, got .*max_terms must be >= min_terms"),
        ([gym("chain_sum", seed=3)], "must not set 'seed'"),
    ],
)
def test_bad_gym_specs(specs, message):
    with pytest.raises(ValueError, match=message):
        load(reasoning_gym=specs)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_jsonl_rows_and_split(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "é?"}]
    rows = [{"prompt": f"q{i}", "answer": str(i), "level": i} for i in range(20)]
    rows += [{"messages": chat, "answer": 0.5, "data_source": "chats"}]
    files = [
        write_rows(tmp_path / "sums.jsonl", rows),
        write_rows(tmp_path / "more.jsonl", [{"prompt": "q3", "answer": 3}]),
    ]
    problems = load(jsonl=files, val_size=5, seed=1)
    again = load(jsonl=files, val_size=5, seed=1)
    assert (problems.train, problems.val) == (again.train, again.val)
    assert load(jsonl=files, val_size=5, seed=2).val != problems.val
    held_out = {question(p) for p in problems.val}
    assert len(problems.val) == len(held_out) == 5
    assert not held_out & {question(p) for p in problems.train}
    assert len(problems.train) == (17 if "q3" not in held_out else 16)  # q3 is there twice
    assert [p.uid for p in problems.val] == [f"val/{i}" for i in range(5)]
    everything = {(question(p), p.answer, p.data_source) for p in [*problems.train, *problems.val]}
    assert ("é?", "0.5", "chats") in everything
    assert {("q3", "3", "sums"), ("q4", "4", "sums")} <= everything
    problem = next(p for p in [*problems.train, *problems.val] if question(p) == "q4")
    assert problem.metadata == {"file": files[0], "line": 5, "row": {"level": 4}}


GOOD = '{"prompt": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "q", "answer": ', "not JSON: .* at column"),
        ('["q", "a"]', "row must be a JSON object, got a list"),
        ('{"prompt": "q"}', r"row must have 'answer', got fields \['prompt'\]"),
        ('{"answer": "a"}', r"row must have one of 'prompt' and 'messages', got fields \['answer'\]"),
        ('{"prompt": "q", "messages": [], "answer": "a"}', "one of 'prompt' and 'messages'"),
        ('{"prompt": 3, "answer": "a"}', "'prompt' must be non-empty text, got 'a number'"),
        ('{"prompt": "", "answer": "a"}', "'prompt' must be non-empty text, got ''"),
        ('{"messages": "q", "answer": "a"}', "'messages' must be a non-empty list, got text"),
        ('{"messages": ["q"], "answer": "a"}', r"'messages\[0\]' must be an object, got text"),
        ('{"messages": [{"role": "user"}], "answer": "a"}', r"'messages\[0\]' must have text in 'content'"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answer": "a"}',
            "must end before the assistant's turn",
        ),
        ('{"prompt": "q", "answer": null}', "'answer' must be text or a number, got null"),
        ('{"prompt": "q", "answer": true}', "'answer' must be text or a number, got a boolean"),
        ('{"prompt": "q", "answer": " "}', "'answer' must not be empty"),
        ('{"prompt": "q", "answer": "a", "data_source": 3}', "'data_source' must be non-empty text, got 3"),
        (b'{"prompt": "\xff", "answer": "a"}', "not UTF-8 text"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join([GOOD.encode(), b"", line if isinstance(line, bytes) else line.encode(), GOOD.encode()])
    )
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: .*{message}"):
        load(jsonl=[str(path)], val_size=0)


def test_jsonl_files_and_sizes_are_checked(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=r"'.*empty.jsonl' must hold at least one row"):
        load(jsonl=[str(empty)])
    with pytest.raises(ValueError, match=r"data.jsonl must name existing files, got 'absent.jsonl'"):
        load(jsonl=["absent.jsonl"])
    path = write_rows(tmp_path / "two.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "a ", "answer": 1}])
    with pytest.raises(ValueError, match=r"number of distinct questions in data.jsonl \(1\), got 1"):
        load(jsonl=[path], val_size=1)


def test_answers_of_any_kind_for_a_verifier_of_ones_own(tmp_path):
    path = write_rows(tmp_path / "tests.jsonl", [{"prompt": "write f", "answer": {"tests": [1, 2]}}])
    own = RewardConfig(verifier="my_pkg:verify")
    assert load(own, jsonl=[path], val_size=0).train[0].answer == {"tests": [1, 2]}
    with pytest.raises(ValueError, match=r"tests.jsonl:1: 'answer' must be text or a number, got an object"):
        load(jsonl=[path], val_size=0)
    with pytest.raises(ValueError, match=r"reward.verifier must not be 'reasoning_gym'"):
        load(RewardConfig(verifier="reasoning_gym"), jsonl=[path], val_size=0)


def test_verifiers_that_need_a_reference_answer():
    assert load(reasoning_gym=[gym("graph_color")], val_size=1).train[0].answer is None
    for verifier in ("math", "exact"):
        with pytest.raises(ValueError, match=rf"for family 'graph_color'.* got '{verifier}'"):
            load(RewardConfig(verifier=verifier), reasoning_gym=[gym("chain_sum"), gym("graph_color")], val_size=1)


def test_both_kinds_of_source(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "answer": i} for i in range(50)])
    problems = load(reasoning_gym=[gym("chain_sum")], jsonl=[path], train_size=150, val_size=8)
    assert len(problems.train) == 150 + 48
    assert Counter(p.data_source for p in problems.val) == {"chain_sum": 6, "rows": 2}
    assert [p.uid for p in problems.val] == [f"val/{i}" for i in range(8)]
    assert [problems.train[i].uid for i in (149, 150, 197)] == ["train/149", "train/150", "train/197"]
    assert problems.train[150].data_source == "rows"
    assert len(load(reasoning_gym=[gym("chain_sum")], jsonl=[path], val_size=0).val) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.reasoning_gym or data.jsonl must name at least one"),
        ({"reasoning_gym": [gym("chain_sum")], "train_size": 0}, "data.train_size must be at least 1, got 0"),
        ({"reasoning_gym": [gym("chain_sum")], "val_size": -1}, "data.val_size must be at least 0, got -1"),
        ({"reasoning_gym": [gym("chain_sum")], "seed": -1}, "data.seed must be at least 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)
