"""Live view, metric sinks and the HTML report."""

from megatron_rlvr.report.html_report import REPORT_FILE, write_report
from megatron_rlvr.report.live_view import LiveView
from megatron_rlvr.report.metrics_writer import METRICS_FILE, MetricsWriter, read_metrics
from megatron_rlvr.report.run_directory import RESOLVED_CONFIG, run_directory
from megatron_rlvr.report.run_record import RunRecord
from megatron_rlvr.report.samples import write_samples

__all__ = [
    "METRICS_FILE",
    "REPORT_FILE",
    "RESOLVED_CONFIG",
    "LiveView",
    "MetricsWriter",
    "RunRecord",
    "read_metrics",
    "run_directory",
    "write_report",
    "write_samples",
]
