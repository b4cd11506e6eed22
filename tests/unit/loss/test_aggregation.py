"""Token weights: the vectors, and independence from splits."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_rlvr.loss import token_weights

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "vectors.json").read_text())
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_vectors(aggregation):
    case = VECTORS["E2_aggregation"]
    mask = np.array(case["mask"], dtype=bool)
    lengths = mask.sum(axis=1)
    weights = token_weights(lengths, aggregation, max_response_tokens=4)
    loss = (np.array(case["token_loss"]) * weights[:, None])[mask].sum()
    key = "seq-mean-token-sum-norm_Lmax4" if aggregation == "seq-mean-token-sum-norm" else aggregation
    np.testing.assert_allclose(loss, case[key], rtol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_responses_without_tokens_do_not_count(aggregation):
    lengths = np.array([3, 0, 5])
    weights = token_weights(lengths, aggregation, 8)
    np.testing.assert_array_equal(weights[[0, 2]], token_weights(lengths[[0, 2]], aggregation, 8))
    assert weights[1] == 0.0
    np.testing.assert_array_equal(token_weights(np.zeros(2, int), aggregation, 8), [0.0, 0.0])
    assert token_weights(np.zeros(0, int), aggregation, 8).shape == (0,)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"loss.aggregation must be one of .*'sum'"):
        token_weights(np.array([1]), "sum", 4)
    with pytest.raises(ValueError, match="lengths_N must be 0 or above, got -1"):
        token_weights(np.array([-1]), "token-mean", 4)
    with pytest.raises(ValueError, match="max_response_tokens must be 1 or above, got 0"):
        token_weights(np.array([1]), "token-mean", 0)
