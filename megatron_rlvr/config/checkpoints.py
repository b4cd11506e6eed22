"""Checkpoints, resume, and how a run stops: what batch systems and people can rely on.

Folders. A run lives in ``<output_dir>/<experiment_name>/<run_name>``; with a `run_name` a job that is started again
finds its own folder. A complete checkpoint is ``checkpoints/step_000012`` in it (12 rollout steps are done) with a
``manifest.json`` inside; while one is written its name is ``checkpoints/.step_000012.incomplete``. Such a folder is
named last, by one rename, so that whatever is found under a final name was written to the end.

Start. With ``checkpoint.resume=auto`` a run goes on from the newest complete checkpoint of its folder, or starts anew
where there is none. One that is damaged (a file missing, cut, or of other content than the manifest's SHA-256 says; the
ranks share the reading) is named and skipped for the one before. ``metrics.jsonl`` is cut back to the checkpoint's
step, so that every step stands in it once.

Stop. On SIGUSR1 or SIGTERM at any rank the run finishes what it can, saves a checkpoint at the next safe point (the
step under way is finished if it has begun to train, and dropped if it still samples) and exits with code
`EXIT_RESUMABLE` (75, EX_TEMPFAIL): "stopped, start me again". All ranks agree on it. Signals that come within
`SIGNAL_ECHO_S` of the first belong to it (launchers pass on what they get), all of them before the first step. SIGINT
(Ctrl-C), or a second signal later than that, stops at once with code 130 and saves nothing. ``python -m
megatron_rlvr.launch`` passes SIGUSR1 and SIGTERM on to its ranks and ends with their code; torchrun itself turns every
code into 1. Ranks whose launcher is killed take that for such a request too, and end a minute later at the latest.
Therefore the outcome is in ``<run>/status.json`` too: an object with ``state`` (running, finished, stopped, failed),
``step`` (rollout steps done), ``checkpoint`` (folder name of the newest complete one, or null), ``exit_code`` and
``reason``. A file that still says running belongs to a run that was killed: start it again.
"""

from dataclasses import dataclass
from enum import Enum

EXIT_RESUMABLE = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL of sysexits.h)."""
SIGNAL_ECHO_S = 3.0
"""Signals that follow the first within so many seconds are the same request."""


class Resume(Enum):
    """auto: go on from the newest complete checkpoint of the run's folder; never: refuse a folder that has one."""

    auto = "auto"
    never = "never"


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 0
    """Rollout steps between checkpoints; 0: only when a signal stops the run."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of it; 0 is off."""
    keep_best: bool = False
    """Also keep the one with the best held-out accuracy so far (needs eval.every)."""
    asynchronous: bool = True
    """Write in the background while training goes on; the run waits only for a copy of its state in memory."""
    resume: Resume = Resume.auto
    export_hf_every: int = 0
    """Rollout steps between exports as a Hugging Face folder (``export/step_000012`` in the run's folder); 0 is off."""
