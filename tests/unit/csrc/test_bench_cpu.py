"""The CPU benchmark runs and writes the rows it promises; no time is judged."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_rlvr import ops

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


@pytest.fixture
def bench(monkeypatch):
    """The tool, in this process, which has torch already."""
    pytest.importorskip("megatron_rlvr._C")
    monkeypatch.syspath_prepend(TOOL.parent)
    spec = importlib.util.spec_from_file_location("bench_cpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = ops.get_backend()
    yield module
    ops.set_backend(backend)


def test_rows(bench, tmp_path, capsys):
    out = tmp_path / "rows.json"
    names = ["native", "native_new_gradient", "eager", "slime_way", "verl_way"]
    options = ["--tokens", "5", "--vocab", "3000", "--dtype", "fp32", "--rounds", "1", "--json", str(out)]
    assert bench.main([*options, "--impl", *names]) == 0
    shown = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["impl"] for row in rows] == names
    for row in rows:
        assert list(row) == KEYS
        assert row["impl"] in shown
        assert max(row["max_err_logprob"], row["max_err_entropy"], row["max_err_grad"]) < 1e-5
    assert rows[0]["peak_extra_bytes"] < rows[1]["peak_extra_bytes"] < rows[2]["peak_extra_bytes"]
