"""The throw-away Slurm of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.throwaway import ThrowawaySlurm, missing_program


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowawaySlurm]:
    """A cluster of three nodes; tests leave its queue empty and its nodes up."""
    if (missing := missing_program()) is not None:
        pytest.skip(
            f"Slurm is not installed ({missing} is missing): "
            "apt-get install slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
        )
    with ThrowawaySlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
