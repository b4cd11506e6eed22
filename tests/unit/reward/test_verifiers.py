"""Verdicts of the verifiers on real problems."""

import sys
from decimal import Decimal
from subprocess import run

import numpy as np
import pytest
from reasoning_gym.factory import create_dataset

from megatron_rlvr.reward.answer import UnparsableError, boxed_answer, extract_answer, tagged_answer
from megatron_rlvr.reward.verifiers import load_verifier
from megatron_rlvr.types import Prompt


def make_prompt(answer, metadata=None):
    input_ids = np.arange(3, dtype=np.int32)
    return Prompt(uid="t/0", text="q", input_ids=input_ids, answer=answer, data_source="t", metadata=metadata or {})


def make_gym_prompt(family, index=0, **params):
    entry = create_dataset(family, size=index + 1, seed=11, **params)[index]
    return make_prompt(entry["answer"], {"reasoning_gym": {"family": family, "params": params, "entry": entry}})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" 12\n", "12"),
        ("so <answer>7</answer> no, <answer> 8 </answer>.", "8"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}!", "\\frac{1}{2}"),
        ("<think>\\boxed{3}</think>4", "4"),
        ("<answer>5</answer>\\boxed{6}", "5"),
        ("an open \\boxed{7", "an open \\boxed{7"),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("response", ["", "  \n", "<think>hm</think>", "<answer> </answer>", "\\boxed{}"])
def test_extract_answer_finds_nothing(response):
    with pytest.raises(UnparsableError, match="no answer"):
        extract_answer(response)


def test_answers_that_are_absent():
    assert tagged_answer("<answer>open") is None
    assert boxed_answer("plain") is None
    assert boxed_answer("\\boxed{{}") is None


@pytest.mark.parametrize(
    ("reference", "response", "score"),
    [
        ("4", "The answer is 4.", 1.0),
        ("\\frac{1}{2}", "$0.5$", 1.0),
        ("x^2-1", "<answer>(x-1)(x+1)</answer>", 1.0),
        ("(3, \\frac{\\pi}{2})", "thus \\boxed{(3,\\pi/2)}", 1.0),
        ("$\\sqrt{8}$", "\\boxed{2\\sqrt 2}", 1.0),
        ("1,000", "\\boxed{1000}", 1.0),
        (7, "\\boxed{7}", 1.0),
        ("\\text{Monday}", "\\boxed{\\text{Monday}}", 1.0),
        ("4", "\\boxed{5} and not 4", 0.0),
        ("4", "<think>it is 4</think> 5", 0.0),
        ("[0,1)", "\\boxed{[0,1]}", 0.0),
    ],
)
def test_math(reference, response, score):
    assert load_verifier("math")(response, make_prompt(reference)) == score


@pytest.mark.parametrize(
    ("reference", "response", "message"),
    [
        ("4", "", "no expression"),
        ("4", "I do not know", "no expression"),
        ("4", "\\boxed{\\frac{}", "cannot parse the expression"),
        ("", "4", "cannot parse the reference answer ''"),
    ],
)
def test_math_unparsable(reference, response, message):
    with pytest.raises(UnparsableError, match=message):
        load_verifier("math")(response, make_prompt(reference))


def test_exact():
    verifier = load_verifier("exact")
    assert verifier(" 0:30 \n", make_prompt("0:30")) == 1.0
    assert verifier("00:30", make_prompt("0:30")) == 0.0
    assert verifier("\\boxed{12}", make_prompt(12)) == 1.0


@pytest.mark.parametrize(
    "family", ["chain_sum", "basic_arithmetic", "countdown", "gsm_symbolic", "spell_backward", "gcd"]
)
@pytest.mark.parametrize("wrap", ["{}", " {}\n", "<answer>{}</answer>", "<think>0</think>\\boxed{{{}}}"])
def test_reasoning_gym_gold_answers(family, wrap):
    prompt = make_gym_prompt(family, index=3)
    assert load_verifier("reasoning_gym")(wrap.format(prompt.answer), prompt) == 1.0


def test_reasoning_gym_partial_scores_stay_below_the_threshold():
    prompt = make_gym_prompt("countdown")
    assert load_verifier("reasoning_gym")("1+1", prompt) == 0.05


@pytest.mark.parametrize(("places", "score"), [(2, 1.0), (6, 0.0)])
def test_reasoning_gym_scores_with_the_family_parameters(places, score):
    prompt = make_gym_prompt("decimal_arithmetic", min_num_decimal_places=2, max_num_decimal_places=places)
    near = str(Decimal(prompt.answer) + Decimal("0.009"))  # off by less than one unit in the second place
    assert load_verifier("reasoning_gym")(near, prompt) == score


def test_auto_follows_the_source():
    verifier = load_verifier("auto")
    gym = make_gym_prompt("chain_sum")
    assert verifier(gym.answer, gym) == 1.0
    assert verifier("the answer is $4$", make_prompt("4")) == 1.0
    assert verifier(f"the answer is ${gym.answer}$", gym) < 1.0  # reasoning-gym takes the answer alone


def test_no_module_of_data_and_reward_that_rollouts_need_imports_torch():
    code = (
        "import sys; sys.path[:0] = ['.']; import megatron_rlvr.data.prompts, megatron_rlvr.data.problems, "
        "megatron_rlvr.data.jsonl_source, megatron_rlvr.data.reasoning_gym_source, megatron_rlvr.data.tokenizer, "
        "megatron_rlvr.reward.pool, megatron_rlvr.reward.auto, megatron_rlvr.reward.overlong; "
        "print('torch' in sys.modules)"
    )
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
