"""The tokenizer of a Hugging Face model folder, without torch.

`transformers.AutoTokenizer` imports torch, which the rollout process must not; so this reads tokenizer.json with the
`tokenizers` library and renders the chat template with jinja2, in the same environment that transformers gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers

REPLACEMENT = "\ufffd"
"""Stands for bytes that do not make a character yet."""


class Tokenizer:
    """Text to token ids and back.

    Example:
        >>> tokenizer = Tokenizer.load("models/SmolLM2-135M-Instruct")
        >>> tokenizer.decode(tokenizer.encode("2 + 2 ="))
        '2 + 2 ='
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            backend: the tokenizer itself.
            eos_ids: ids that end a response, the tokenizer's own end-of-sequence token first; at least one.
            pad_id: id that fills.
            chat_template: jinja source.
            special_tokens: names that the chat template may use, e.g. ``{"bos_token": "<s>"}``.
        """
        if not eos_ids:
            raise ValueError("eos_ids must name at least one end-of-sequence token, got none")
        self._backend = backend
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._compiled: jinja2.Template | None = None

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json and chat_template.jinja.

        Raises:
            ValueError: the folder or tokenizer.json is missing or broken, or no file names an end-of-sequence token.
        """
        folder = Path(model_dir)
        if not folder.is_dir():
            raise ValueError(f"model.path must be an existing folder, got {str(folder)!r}")
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"model.path must hold tokenizer.json, not found: {str(file)!r} (older formats: load with "
                "transformers.AutoTokenizer and save_pretrained once)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{str(file)!r} must be a tokenizer of the tokenizers library: {error}") from error
        backend.no_truncation()
        backend.no_padding()

        settings = _read_json(folder / "tokenizer_config.json")
        named = {
            name: _token_text(value)
            for source in (_read_json(folder / "special_tokens_map.json"), settings)
            for name, value in source.items()
            if name.endswith("_token") and value is not None and not isinstance(value, bool)
        }
        candidates = [backend.token_to_id(named["eos_token"]) if "eos_token" in named else None]
        for config_name in ("generation_config.json", "config.json"):
            config = _read_json(folder / config_name)
            if "eos_token_id" in config:
                listed = config["eos_token_id"]
                candidates += listed if isinstance(listed, list) else [listed]
        eos_ids = list(dict.fromkeys(token for token in candidates if token is not None))
        if not eos_ids:
            raise ValueError(
                f"an end-of-sequence token must be named in tokenizer_config.json, generation_config.json or "
                f"config.json of {str(folder)!r}, found none"
            )
        pad_id = backend.token_to_id(named["pad_token"]) if "pad_token" in named else None
        return cls(
            backend,
            eos_ids=eos_ids,
            pad_id=eos_ids[0] if pad_id is None else pad_id,
            chat_template=_read_chat_template(folder, settings),
            special_tokens=named,
        )

    @property
    def eos_id(self) -> int:
        """The tokenizer's own end-of-sequence id."""
        return self.eos_ids[0]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """int32 [L] ids; `add_special_tokens` applies the tokenizer's own prefix (e.g. Llama's ``<s>``)."""
        return np.array(self._backend.encode(text, add_special_tokens=add_special_tokens).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text that every token adds, special tokens included; joined they are the whole text.

        Of tokens that share one character the last one has it, the others are empty.
        """
        pieces: list[str] = []
        anchor: list[int] = []
        pending: list[int] = []
        for token in ids:
            pending.append(int(token))
            # After the token before: some tokenizers drop a leading space at the start of a text.
            before = self.decode(anchor, skip_special_tokens=False)
            text = self.decode(anchor + pending, skip_special_tokens=False)[len(before) :]
            if text.endswith(REPLACEMENT):
                pieces.append("")
                continue
            pieces.append(text)
            anchor, pending = pending, []
        if pending:
            before = self.decode(anchor, skip_special_tokens=False)
            pieces[-1] = self.decode(anchor + pending, skip_special_tokens=False)[len(before) :]
        return pieces

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, ready for the assistant's turn; encode it without special tokens.

        Raises:
            ValueError: the model folder has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("data.chat_template must be false for this model: its folder has no chat template")
        try:
            if self._compiled is None:
                self._compiled = _template_environment().from_string(self.chat_template)
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def _token_text(value: Any) -> str:
    """A special token is written as its text or as an object with its ``content``."""
    return value["content"] if isinstance(value, dict) else value


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: from its own file as newer folders have it, else from tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if "chat_template" not in settings:
        return None
    template = settings["chat_template"]
    if isinstance(template, list):  # several by name
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training masks; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_environment() -> jinja2.Environment:
    """What chat templates expect: transformers' block trimming, ``raise_exception``, ``strftime_now``, plain tojson."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
