"""reasoning-gym's own scoring of its families."""

from __future__ import annotations

import json
from functools import lru_cache

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import create_dataset

from megatron_rlvr.reward.answer import extract_answer
from megatron_rlvr.reward.verifiers import VERIFIERS
from megatron_rlvr.types import Prompt


@VERIFIERS.register("reasoning_gym")
def verify_reasoning_gym(response_text: str, prompt: Prompt) -> float:
    """The family's score of the extracted answer, in [0, 1].

    Some families give a wrong answer more than nothing (countdown 0.05): `reward.threshold` tells right from wrong.

    Args:
        response_text: the response.
        prompt: of a reasoning-gym source; its metadata hold the entry and the family's parameters.
    """
    problem = prompt.metadata["reasoning_gym"]
    scorer = _scorer(problem["family"], json.dumps(problem["params"], sort_keys=True))
    return float(scorer.score_answer(answer=extract_answer(response_text), entry=problem["entry"]))


@lru_cache(maxsize=256)
def _scorer(family: str, params_json: str) -> ProceduralDataset:
    """A dataset for its scoring, which may depend on the parameters; no problem is generated."""
    return create_dataset(family, size=1, seed=0, **json.loads(params_json))
