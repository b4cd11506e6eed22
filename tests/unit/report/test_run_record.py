"""A run's report follows it at a bounded price, and is whole at the end, however that comes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_rlvr.report import REPORT_FILE, MetricsWriter, RunRecord, read_metrics, run_record


class Reports:
    """Steps in each report that was written; each takes a second of a clock that stands still otherwise."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.now = 1000.0

    def write(self, run_dir: Path) -> None:
        self.steps.append(len(read_metrics(run_dir)))
        self.now += 1.0


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    reports = Reports()
    monkeypatch.setattr(run_record, "write_report", reports.write)
    monkeypatch.setattr(time, "monotonic", lambda: reports.now)
    return reports


def metrics_in(folder: Path) -> MetricsWriter:
    return MetricsWriter(folder, tensorboard=False, wandb=False)


def test_report_costs_a_bounded_share_of_the_time(tmp_path: Path, reports: Reports) -> None:
    with metrics_in(tmp_path) as metrics, RunRecord(metrics) as record:
        for step in range(1, 101):
            record.write({"step": step})
            reports.now += 2.0
            assert len(read_metrics(tmp_path)) == step
        assert reports.steps == [1, 26, 51, 76]  # every 50 s of a report of 1 s
    assert reports.steps == [1, 26, 51, 76, 100]


def test_nothing_is_written_twice(tmp_path: Path, reports: Reports) -> None:
    with metrics_in(tmp_path) as metrics, RunRecord(metrics) as record:
        record.write({"step": 1})
    with metrics_in(tmp_path) as metrics, RunRecord(metrics):
        pass
    assert reports.steps == [1]


def run_and_fail(folder: Path, error: BaseException) -> None:
    with metrics_in(folder) as metrics, RunRecord(metrics) as record:
        for step in (1, 2, 3):
            record.write({"step": step, "reward/mean": 0.5})
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError()])
def test_report_is_whole_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_and_fail(tmp_path, error)
    assert "step 3" in (tmp_path / REPORT_FILE).read_text()


def test_a_report_that_fails_at_the_end_hides_no_error(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_after_the_first(run_dir: Path) -> None:
        if reports.steps:
            raise OSError("no space left")
        reports.write(run_dir)

    monkeypatch.setattr(run_record, "write_report", full_after_the_first)
    with pytest.raises(RuntimeError, match="cause"):
        run_and_fail(tmp_path, RuntimeError("cause"))
    assert "no space left" in caplog.text


def test_a_report_that_fails_at_the_end_is_an_error(tmp_path: Path, reports: Reports) -> None:
    with metrics_in(tmp_path) as metrics:
        metrics.write({"step": 1})
        record = RunRecord(metrics)
        record.rewind(1)
        metrics.path.unlink()
        with pytest.raises(FileNotFoundError), record:
            pass


def test_rows_taken_back_leave_the_report_too(tmp_path: Path, reports: Reports) -> None:
    with metrics_in(tmp_path) as metrics, RunRecord(metrics) as record:
        record.write({"step": 1})
        record.write({"step": 2})
        record.rewind(1)
    assert reports.steps == [1, 1]
