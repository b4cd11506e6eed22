"""From problems to tokenised prompts, and the endless stream of them that training draws from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_rlvr.data.problems import Problem
from megatron_rlvr.data.tokenizer import Tokenizer
from megatron_rlvr.types import Prompt

logger = logging.getLogger(__name__)


class PromptBuilder:
    """Template and tokenisation of one problem.

    Without the chat template the text is the system prompt, the templated user message and a blank line between them;
    with it, the system prompt leads the conversation and the template of the model folder renders it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        system_prompt: str | None,
        prompt_template: str | None,
        chat_template: bool,
        max_prompt_tokens: int,
    ) -> None:
        """
        Raises:
            ValueError: a template without ``{prompt}``, a budget below 1, or a chat template asked of a model folder
                that has none.
        """
        if prompt_template is not None and "{prompt}" not in prompt_template:
            raise ValueError(f"data.prompt_template must contain '{{prompt}}', got {prompt_template!r}")
        if max_prompt_tokens < 1:
            raise ValueError(f"data.max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
        if chat_template and tokenizer.chat_template is None:
            raise ValueError("data.chat_template must be false for this model: its folder has no chat template")
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._prompt_template = prompt_template
        self._chat_template = chat_template
        self.max_prompt_tokens = max_prompt_tokens

    def build(self, problem: Problem) -> Prompt | None:
        """The tokenised prompt, or None if it is longer than `max_prompt_tokens`.

        Raises:
            ValueError: a conversation that needs the chat template, or an empty prompt; named by uid.
        """
        try:
            text = self._render(problem.messages)
        except ValueError as error:
            raise ValueError(f"problem {_name(problem)} cannot become a prompt: {error}") from error
        # A chat template writes its own special tokens.
        input_ids = self._tokenizer.encode(text, add_special_tokens=not self._chat_template)
        if len(input_ids) == 0:
            raise ValueError(f"problem {_name(problem)} cannot become a prompt: its text has no tokens: {text!r}")
        if len(input_ids) > self.max_prompt_tokens:
            return None
        return Prompt(
            uid=problem.uid,
            text=text,
            input_ids=input_ids,
            answer=problem.answer,
            data_source=problem.data_source,
            metadata=problem.metadata,
        )

    def build_all(self, problems: Sequence[Problem]) -> tuple[list[Prompt], int]:
        """The prompts of all problems in order, and how many were too long."""
        prompts = [prompt for problem in problems if (prompt := self.build(problem)) is not None]
        return prompts, len(problems) - len(prompts)

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        turns = [dict(message) for message in messages]
        if self._prompt_template is not None:
            # replace, not format: problems are full of braces.
            last = turns[-1]
            last["content"] = self._prompt_template.replace("{prompt}", last["content"])
        if self._system_prompt is not None:
            if turns[0]["role"] == "system":
                raise ValueError("data.system_prompt must be null for messages that begin with a system message")
            turns.insert(0, {"role": "system", "content": self._system_prompt})
        if self._chat_template:
            return self._tokenizer.render_chat(turns)
        if any(message["role"] not in ("system", "user") for message in turns):
            raise ValueError("data.chat_template must be true for messages with turns of an assistant")
        return "\n\n".join(message["content"] for message in turns)


def _name(problem: Problem) -> str:
    if "file" in problem.metadata:
        return f"{problem.uid} ({problem.metadata['file']}:{problem.metadata['line']})"
    return problem.uid


class PromptStream:
    """Endless training prompts: every epoch a new permutation by (seed, epoch).

    Too long problems are dropped and counted, broken ones skipped, counted and logged by name; an epoch that yields
    no prompt at all is an error. The same seed gives the same prompts, also after a resume in mid-epoch.

    Example:
        >>> stream = PromptStream(problems.train, builder, seed=0)
        >>> [(index, prompt.uid) for index, prompt in stream.next(2)]
        [(0, 'train/81'), (1, 'train/17')]
    """

    def __init__(self, problems: Sequence[Problem], builder: PromptBuilder, *, seed: int) -> None:
        if len(problems) == 0:
            raise ValueError("problems must hold at least one problem, got none")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._problems = problems
        self._builder = builder
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._drawn = 0
        self._drawn_in_epoch = 0
        self.num_too_long = 0
        """Problems dropped so far, epochs counted again."""
        self.num_broken = 0
        """Problems skipped so far because they cannot become a prompt."""
        self._order = self._permutation(0)

    @property
    def epoch(self) -> int:
        """Complete passes over the problems."""
        return self._epoch

    def next(self, num_prompts: int) -> list[tuple[int, Prompt]]:
        """The next prompts, each with its index in the run's data order (0, 1, 2, ...).

        Raises:
            ValueError: no problem of a whole epoch can become a prompt.
        """
        prompts: list[tuple[int, Prompt]] = []
        while len(prompts) < num_prompts:
            if self._position == len(self._order):
                self._begin_epoch()
            prompt = self._build(int(self._order[self._position]))
            self._position += 1
            if prompt is not None:
                prompts.append((self._drawn, prompt))
                self._drawn += 1
                self._drawn_in_epoch += 1
        return prompts

    def _build(self, position: int) -> Prompt | None:
        try:
            prompt = self._builder.build(self._problems[position])
        except ValueError as error:
            self.num_broken += 1
            logger.warning("skipped a training problem: %s", error)
            return None
        if prompt is None:
            self.num_too_long += 1
        return prompt

    def _begin_epoch(self) -> None:
        if self._drawn_in_epoch == 0:
            raise ValueError(
                f"training problems must yield prompts of at most data.max_prompt_tokens = "
                f"{self._builder.max_prompt_tokens} tokens, got none in an epoch of {len(self._problems)} "
                f"({self.num_too_long} too long and {self.num_broken} broken since the start)"
            )
        self._epoch += 1
        self._position = 0
        self._drawn_in_epoch = 0
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox([self._seed, epoch])).permutation(len(self._problems))

    def state_dict(self) -> dict[str, int]:
        """Everything that the next prompts depend on, as plain integers."""
        return {
            "seed": self._seed,
            "num_problems": len(self._problems),
            "epoch": self._epoch,
            "position": self._position,
            "drawn": self._drawn,
            "drawn_in_epoch": self._drawn_in_epoch,
            "num_too_long": self.num_too_long,
            "num_broken": self.num_broken,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: the state is of another seed or another number of problems.
        """
        for name, mine in (("seed", self._seed), ("num_problems", len(self._problems))):
            if state[name] != mine:
                raise ValueError(f"{name} of the data order must be as saved ({state[name]}) to resume, got {mine}")
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._drawn = state["drawn"]
        self._drawn_in_epoch = state["drawn_in_epoch"]
        self.num_too_long = state["num_too_long"]
        self.num_broken = state["num_broken"]
        self._order = self._permutation(self._epoch)
