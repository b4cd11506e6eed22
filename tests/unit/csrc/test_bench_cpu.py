"""The CPU benchmark runs and writes the rows it promises; no time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "bench" / "cpu.py"
KEYS = [
    "op",
    "impl",
    "tokens",
    "vocab",
    "dtype",
    "fwd_ms",
    "bwd_ms",
    "total_ms",
    "floor_ms",
    "peak_extra_bytes",
    "max_err_logprob",
    "max_err_entropy",
    "max_err_grad",
]


def test_rows(tmp_path):
    pytest.importorskip("megatron_rlvr._C")
    out = tmp_path / "rows.json"
    names = ["native", "native_new_gradient", "eager", "slime_way", "verl_way"]
    options = ["--tokens", "5", "--vocab", "3000", "--dtype", "fp32", "--rounds", "1", "--json", str(out)]
    result = subprocess.run(
        [sys.executable, str(TOOL), *options, "--impl", *names], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())
    assert [row["impl"] for row in rows] == names
    for row in rows:
        assert list(row) == KEYS
        assert row["impl"] in result.stdout
        assert max(row["max_err_logprob"], row["max_err_entropy"], row["max_err_grad"]) < 1e-5
    assert rows[0]["peak_extra_bytes"] < rows[1]["peak_extra_bytes"] < rows[2]["peak_extra_bytes"]
