import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlvr.report import METRICS_FILE, MetricsWriter, read_metrics


def test_a_row_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=False)
    writer.write({"step": 1, "reward/mean": np.float32(0.25), "grad_norm": math.nan, "cov/mean": -math.inf})
    # Read while the writer is open, as a crash would leave it.
    assert json.loads((tmp_path / METRICS_FILE).read_text()) == {
        "step": 1,
        "reward/mean": 0.25,
        "grad_norm": None,
        "cov/mean": None,
    }
    writer.close()
    writer.close()


def test_rows_come_back_in_order_and_a_torn_end_is_no_row(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False, wandb=False) as writer:
        for step in (1, 2):
            writer.write({"step": step, "note": "a\u2028b"})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with MetricsWriter(tmp_path, tensorboard=False, wandb=False) as writer:
        writer.write({"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{broken", "[1]"])
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"{METRICS_FILE}:2: "):
        read_metrics(tmp_path)


@pytest.mark.parametrize("metrics", [{}, {"step": 1.0}, {"step": None}])
def test_a_row_without_its_step_is_refused(tmp_path: Path, metrics: dict) -> None:
    with (
        MetricsWriter(tmp_path, tensorboard=False, wandb=False) as writer,
        pytest.raises(ValueError, match="must be an integer"),
    ):
        writer.write(metrics)


def test_tensorboard_gets_the_finite_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True, wandb=False) as writer:
        writer.write({"step": 1, "reward/mean": 0.25, "grad_norm": math.nan})
        writer.write({"step": 2, "reward/mean": 0.5, "grad_norm": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("grad_norm")] == [(2, 1.5)]


@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_a_sink_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str
) -> None:
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[sink]
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=rf"logging\.{sink} must be false where {sink} is not installed, got true"):
        MetricsWriter(tmp_path, tensorboard=sink == "tensorboard", wandb=sink == "wandb")
    assert list(tmp_path.iterdir()) == []


def test_rewind_takes_back_later_steps(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True, wandb=False) as writer:
        for step in range(1, 6):
            writer.write({"step": step, "x": float(step)})
        writer.rewind(3)
        writer.write({"step": 4, "x": 40.0})
        assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
        writer.rewind(0)
        assert read_metrics(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["metrics.jsonl"]
