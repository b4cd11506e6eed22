"""The servers that the protocol's tests run against: the fake always, the real one where marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rlvr.rollout.engine import HttpEngine
from tests.fakes.sglang_server import FakeSGLang
from tests.fakes.tiny_qwen3 import VOCAB_SIZE

PROMPT = [72, 101, 108, 108, 111]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A server under test."""

    url: str
    engine: HttpEngine
    model: Path
    other_model: Path
    """A folder with other weights of the same shape."""
    fake: FakeSGLang | None
    """The fake behind it, if it is one."""

    version: tuple[int, ...]
    """SGLang's own, e.g. (0, 5, 21)."""

    @property
    def real(self) -> bool:
        return self.fake is None

    @property
    def tells_spans(self) -> bool:
        """Whether it knows weight-update sessions and tells version spans; both came in one release."""
        return self.version >= (0, 5, 21)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.server)])
def subject(request: pytest.FixtureRequest, tiny_qwen3: Path, other_tiny_qwen3: Path) -> Iterator[Subject]:
    """A fake and a real server with version 0; the real one gets its weights back afterwards."""
    folders = {"model": tiny_qwen3, "other_model": other_tiny_qwen3}
    if request.param == "fake":
        with FakeSGLang(
            join_groups=True, eos_token_id=258, token_delay_s=0.002, weight_version="0", model_path=str(tiny_qwen3)
        ) as fake:
            engine = HttpEngine(fake.url, num_ranks=1, timeout_s=30.0)
            yield Subject(url=fake.url, engine=engine, fake=fake, version=(0, 5, 21), **folders)
        return
    server = request.getfixturevalue("real_server")
    engine = HttpEngine(server.url, num_ranks=server.info.num_ranks, timeout_s=60.0)
    version = tuple(int(part) for part in server.info.version.split(".")[:3])
    yield Subject(url=server.url, engine=engine, fake=None, version=version, **folders)
    engine.resume()
    engine.update_from_disk(str(tiny_qwen3), weight_version=0)


assert max(PROMPT) < VOCAB_SIZE, "a token id outside the vocabulary kills a real server"
