"""Named sets: their problems, their settings, and the tool that fetches them."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from megatron_rlvr.config.compose import load_evaluate_config
from megatron_rlvr.config.schema import EvalSetConfig, ReasoningGymSpec, RewardConfig
from megatron_rlvr.data.eval_sets import check_sets, load_set
from megatron_rlvr.evaluate import check, run

ROOT = Path(__file__).parents[3]
SUMS = ReasoningGymSpec(name="chain_sum")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("get_eval_sets", ROOT / "tools" / "get_eval_sets.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["get_eval_sets"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["get_eval_sets"]


def test_rows_keep_their_order_and_size(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(5)))
    spec = EvalSetConfig(name="mine", jsonl=[str(file)], size=3)
    problems = load_set(spec, RewardConfig())
    assert [p.uid for p in problems] == ["mine/0", "mine/1", "mine/2"]
    assert [p.answer for p in problems] == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"evaluation set 'mine': size must be at most the 5 rows of its files, got 9"):
        load_set(EvalSetConfig(name="mine", jsonl=[str(file)], size=9), RewardConfig())


def test_families_give_distinct_problems_that_the_seed_decides():
    first = load_set(EvalSetConfig(name="sums", reasoning_gym=[SUMS], size=20), RewardConfig())
    again = load_set(EvalSetConfig(name="sums", reasoning_gym=[SUMS], size=20), RewardConfig())
    other = load_set(EvalSetConfig(name="sums", reasoning_gym=[SUMS], size=20, seed=1), RewardConfig())
    questions = [p.messages[0]["content"] for p in first]
    assert len(set(questions)) == 20
    assert questions == [p.messages[0]["content"] for p in again]
    assert questions != [p.messages[0]["content"] for p in other]
    assert first[7].uid == "sums/7"


def test_a_missing_set_names_the_command_that_fetches_it(tmp_path):
    spec = EvalSetConfig(name="aime24", jsonl=[str(tmp_path / "eval_sets" / "aime24.jsonl")])
    with pytest.raises(ValueError, match=r"python tools/get_eval_sets.py aime24"):
        load_set(spec, RewardConfig())
    with pytest.raises(ValueError, match="jsonl must name existing files, got"):
        load_set(EvalSetConfig(name="mine", jsonl=[str(tmp_path / "no.jsonl")]), RewardConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name must be letters"),
        ({"name": "held_out"}, "none of held_out"),
        ({"reasoning_gym": []}, "exactly one of jsonl and reasoning_gym must be given, got neither"),
        ({"jsonl": ["x.jsonl"]}, "exactly one of jsonl and reasoning_gym must be given, got both"),
        ({"size": None}, "size must be given for reasoning_gym"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, or 0 with greedy=true, got 0"),
        ({"num_samples": 0, "greedy": True, "temperature": 0.5}, "temperature has no effect while num_samples is 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"k": [1, 16]}, r"k must be distinct numbers in \[1, num_samples=4\], got \[1, 16\]"),
        ({"max_response_tokens": 0}, "max_response_tokens must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    fields = {"name": "sums", "reasoning_gym": [SUMS], "size": 4, "num_samples": 4, "k": [1], **changes}
    with pytest.raises(ValueError, match=message):
        check_sets([EvalSetConfig(**fields)], "eval.sets")


def test_names_are_distinct():
    sets = [EvalSetConfig(name="sums", reasoning_gym=[SUMS], size=4)] * 2
    with pytest.raises(ValueError, match=r"eval\.sets must have distinct names, got 'sums' 2 times"):
        check_sets(sets, "eval.sets")


def test_the_papers_protocol_is_the_default():
    config = load_evaluate_config(["model.path=x"])
    check(config)
    assert [spec.name for spec in config.sets] == ["aime24", "aime25", "amc23"]
    assert {(s.num_samples, s.temperature, s.top_p, tuple(s.k)) for s in config.sets} == {(32, 0.7, 1.0, (1, 16))}
    assert config.data.chat_template
    assert config.rollout.max_response_tokens == 20480


def test_all_missing_sets_are_named_before_the_model_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="aime24") as refused:
        run(load_evaluate_config(["model.path=nowhere"]))
    for name in ("aime24", "aime25", "amc23"):
        assert f"'{name}': 'outputs/eval_sets/{name}.jsonl' does not exist; `python tools/get" in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "model.path must be a model's folder, or rollout.urls name running servers, got neither"),
        (["model.path=x", "protocol=none"], "sets must name at least one set"),
        (["rollout.urls=[http://a]", "rollout.server.tp=2"], "rollout.server has no effect with rollout.urls"),
        (["rollout.urls=[http://a]", "model.dtype=bf16"], "model.dtype has no effect with rollout.urls"),
        (["model.path=x", "model.tokenizer=y"], "model.tokenizer has no effect without rollout.urls"),
        (["model.path=x", "rollout.router_url=http://r"], "rollout.router_url has no effect without rollout.urls"),
        (["model.path=x", "reward.overlong.enabled=true"], "reward.overlong has no effect on an evaluation"),
        (["model.path=x", "level=1.0"], r"level must be in \(0, 1\), got 1.0"),
        (["model.path=x", "seed=-1"], "seed must be at least 0, got -1"),
        (["model.path=x", "rollout.concurrency=0"], "rollout.concurrency must be at least 1, got 0"),
        (["model.pth=x"], "Key 'pth' not in 'EvaluatedModelConfig'"),
    ],
)
def test_mistakes_of_the_command_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        check(load_evaluate_config(overrides))


def test_problems_are_taken_out_of_the_packages_files(tool):
    """Rows as the packages hold them, with problems of our own."""
    lines = [
        {"id": "aime24-0", "question": "1+1?", "expected_answer": 2, "subset_for_metrics": "aime24"},
        {"id": "aime25-0", "question": "2+2?", "expected_answer": "4", "subset_for_metrics": "aime25"},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    assert list(tool.competition("aime24")(content)) == [{"id": "aime24-0", "prompt": "1+1?", "answer": "2"}]

    document = {"index": 3, "problem": "Halve $1$.", "solution": r"It is $\boxed{\left(\frac{1}{2}\right)}$.",
                "answer": r"\le(\frac12\right)"}  # fmt: skip
    packed = gzip.compress(json.dumps({"doc": document}).encode())
    assert list(tool.math500(packed)) == [{"id": 3, "prompt": "Halve $1$.", "answer": r"\left(\frac{1}{2}\right)"}]
    packed = gzip.compress(json.dumps({"doc": {"id": 0, "question": "Two and two?", "short_answer": "4"}}).encode())
    assert list(tool.gsm8k(packed)) == [{"id": 0, "prompt": "Two and two?", "answer": "4"}]


def test_sets_that_no_package_holds_are_told_apart(tool, tmp_path, capsys):
    assert tool.main(["amc23", "--output", str(tmp_path)]) == 2
    assert "no package of the index is known to hold AMC23: bring a file of your own" in capsys.readouterr().err
    assert tool.main(["amc24", "--output", str(tmp_path)]) == 2
    assert "sets must be of aime24, aime25, hmmt, math500, gsm8k, got 'amc24'" in capsys.readouterr().err
    (tmp_path / "aime24.jsonl").write_text("{}\n")
    assert tool.main(["aime24", "--output", str(tmp_path)]) == 0
    assert "is there already" in capsys.readouterr().out
