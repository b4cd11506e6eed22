"""Problems from JSONL files: ``prompt`` or ``messages``, ``answer``, optional ``data_source``, any further fields."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr.data.problems import Problem

logger = logging.getLogger(__name__)

_OWN_FIELDS = ("prompt", "messages", "answer", "data_source")


def read_rows(files: Sequence[str], *, plain_answers: bool) -> list[Problem]:
    """Reads and checks every row, line by line; blank lines are skipped.

    Args:
        files: paths, in order.
        plain_answers: answers must be text or numbers (a verifier of one's own may take any JSON value).

    Returns:
        One problem a row; the uid is given by `split_rows`.

    Raises:
        ValueError: a missing or empty file, or a broken row, as ``file:line: reason``.
    """
    problems: list[Problem] = []
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"data.jsonl must name existing files, got {name!r}")
        before = len(problems)
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        problems.append(_parse_row(line, path, number, plain_answers))
                    except ValueError as error:  # of UnicodeDecodeError and JSONDecodeError too
                        raise ValueError(f"{name}:{number}: {error}") from error
        if len(problems) == before:
            raise ValueError(f"data.jsonl file {name!r} must hold at least one row, got none")
    return problems


def _parse_row(line: bytes, path: Path, number: int, plain_answers: bool) -> Problem:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"row must be a JSON object, got {_json_type(row)}")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(f"row must have one of 'prompt' and 'messages', got fields {sorted(row)}")
    if "answer" not in row:
        raise ValueError(f"row must have 'answer', got fields {sorted(row)}")
    answer = row["answer"]
    if plain_answers:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"'answer' must be text or a number, got {_json_type(answer)}")
        answer = str(answer)
        if not answer.strip():
            raise ValueError("'answer' must not be empty")
    data_source = row.get("data_source", path.stem)  # optional field of the file format, not of the configuration
    if not isinstance(data_source, str) or not data_source:
        raise ValueError(f"'data_source' must be non-empty text, got {data_source!r}")
    return Problem(
        uid="",
        messages=_parse_messages(row),
        answer=answer,
        data_source=data_source,
        metadata={
            "file": str(path),
            "line": number,
            "row": {key: value for key, value in row.items() if key not in _OWN_FIELDS},
        },
    )


def _parse_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"'prompt' must be non-empty text, got {prompt if prompt == '' else _json_type(prompt)!r}")
        return [{"role": "user", "content": prompt}]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a non-empty list, got {_json_type(messages)}")
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"'messages[{position}]' must be an object, got {_json_type(message)}")
        for key in ("role", "content"):
            if key not in message or not isinstance(message[key], str):
                raise ValueError(f"'messages[{position}]' must have text in {key!r}, got fields {sorted(message)}")
    if messages[-1]["role"] == "assistant":
        raise ValueError("'messages' must end before the assistant's turn, got an assistant message last")
    return messages


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def split_rows(
    rows: Sequence[Problem], *, val_size: int, seed: int, first_train: int = 0, first_val: int = 0
) -> tuple[list[Problem], list[Problem]]:
    """Splits rows by seed; a question that is in validation never trains, however often the files repeat it.

    Args:
        rows: of `read_rows`.
        val_size: number of validation rows, distinct questions.
        seed: of the shuffle.
        first_train, first_val: index that the first uid of each split carries.

    Raises:
        ValueError: fewer distinct questions than `val_size` + 1.
    """
    first_of_question: dict[str, int] = {}
    for index, row in enumerate(rows):
        first_of_question.setdefault(_question_key(row), index)
    if val_size >= len(first_of_question):
        raise ValueError(
            f"data.val_size must be smaller than the number of distinct questions in data.jsonl "
            f"({len(first_of_question)}), got {val_size}"
        )
    firsts = np.array(list(first_of_question.values()))
    chosen = firsts[np.random.default_rng([seed, len(firsts)]).permutation(len(firsts))[:val_size]]
    held_out = {_question_key(rows[index]) for index in chosen}
    val = [replace(rows[index], uid=f"val/{first_val + place}") for place, index in enumerate(chosen)]
    kept = [row for row in rows if _question_key(row) not in held_out]
    train = [replace(row, uid=f"train/{first_train + place}") for place, row in enumerate(kept)]
    repeated = len(rows) - len(train) - len(val)
    if repeated:
        logger.warning("%d rows of data.jsonl repeat a validation question and were left out of training", repeated)
    return train, val


def _question_key(problem: Problem) -> str:
    return "\0".join(f"{message['role']}\0{message['content'].strip()}" for message in problem.messages)
