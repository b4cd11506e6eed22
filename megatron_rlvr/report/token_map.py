"""Sampled responses token by token: ``samples/tokens_000012.json``, and the map of them in the report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from megatron_rlvr.report.charts import number
from megatron_rlvr.report.samples import SAMPLES_DIR

KEPT_TOKENS = 2000
"""Tokens of a response that are kept; the others are only counted."""
SHOWN_TOKENS = 400
"""Tokens of a response that the report draws."""
LEAST_SHADE = 0.04


@dataclass(kw_only=True, slots=True)
class TokenMap:
    """One response; R tokens."""

    uid: str
    source: str
    number: int
    """Index of the response in its group."""
    right: bool
    advantage: float
    pieces: list[str]
    """[R] text that every token adds."""
    logprobs: list[float]
    """[R] nats, before the step's updates."""
    entropy: list[float]
    """[R] nats; empty where it was not measured."""
    covariance: list[float]
    """[R] (log pi - mean)(A - mean)."""
    selected: list[bool]
    """[R] whether the covariance loss acted on the token."""


def write_token_maps(run_dir: Path, step: int, maps: Sequence[TokenMap]) -> Path | None:
    """Writes a step's responses in one step of the file system; nothing without any.

    Returns:
        The file, or None.
    """
    if not maps:
        return None
    path = Path(run_dir) / SAMPLES_DIR / f"tokens_{step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"step": step, "responses": [_cut(token_map) for token_map in maps]}
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    os.replace(fresh, path)
    return path


def _cut(token_map: TokenMap) -> dict[str, object]:
    fields = asdict(token_map) | {"num_tokens": len(token_map.pieces)}
    for name in ("logprobs", "entropy", "covariance"):
        fields[name] = [round(value, 6) for value in fields[name][:KEPT_TOKENS]]
    for name in ("pieces", "selected"):
        fields[name] = fields[name][:KEPT_TOKENS]
    return fields


def token_map_section(run_dir: Path) -> str:
    """The newest step's map; empty without one."""
    files = sorted((Path(run_dir) / SAMPLES_DIR).glob("tokens_*.json"))
    if not files:
        return ""
    content = json.loads(files[-1].read_text(encoding="utf-8"))
    responses = content["responses"]
    largest = max((abs(value) for r in responses for value in r["covariance"][:SHOWN_TOKENS]), default=0.0)
    any_selected = any(any(r["selected"]) for r in responses)
    legend = '<span class="key hot">covariance above 0</span><span class="key cold">below 0</span>'
    if any_selected:
        legend += '<mark class="tok picked">selected</mark><span>by the covariance loss</span>'
    else:
        legend += "<span>nothing was selected in these responses</span>"
    body = "".join(_response(r, largest) for r in responses)
    return (
        f'<h2>Tokens of step {content["step"]}</h2><section class="card tokens"><p class="legend">{legend}'
        f"<span>deepest colour: {number(largest)}; a token's numbers show under the pointer</span></p>{body}</section>"
    )


def _response(response: dict, largest: float) -> str:
    total, selected = response["num_tokens"], sum(response["selected"])
    facts = [f"advantage {response['advantage']:+.3f}", f"{total} tokens", f"{selected} selected"]
    if total > SHOWN_TOKENS:
        facts.append(f"the first {SHOWN_TOKENS} are shown")
    kind = "right" if response["right"] else "wrong"
    heading = f"Response {response['number']} to {response['uid']} ({response['source']}), {kind}"
    entropies = response["entropy"] or [None] * len(response["pieces"])
    tokens = zip(
        response["pieces"],
        response["logprobs"],
        entropies,
        response["covariance"],
        response["selected"],
        strict=True,
    )
    spans = [_token(*token, largest) for token in list(tokens)[:SHOWN_TOKENS]]
    return (
        f'<h4>{escape(heading)}</h4><p class="fact">{escape(", ".join(facts))}</p><p class="map">{"".join(spans)}</p>'
    )


def _token(piece: str, logprob: float, entropy: float | None, covariance: float, selected: bool, largest: float) -> str:
    shade = (abs(covariance) / largest) ** 0.5 * 0.85 if largest else 0.0
    facts = f"log-prob {number(logprob)}, covariance {number(covariance)}"
    if entropy is not None:
        facts += f", entropy {number(entropy)}"
    # A line break is shown as well as made; what is part of a character shows as a dot.
    text = escape(piece).replace("\n", "⏎\n") or "·"
    tag = "mark" if selected else "span"
    kind = ("tok" if covariance >= 0 else "tok cold") + (" picked" if selected else "")
    style = f' style="--v:{shade:.2f}"' if shade >= LEAST_SHADE else ""
    return f'<{tag} class="{kind}"{style} title="{escape(facts)}">{text}</{tag}>'
