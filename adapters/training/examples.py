"""Training data: a file of JSON objects, one a line, as prompts and answers in tokens.

    {"prompt": "…", "completion": "…"}           texts as they are
    {"messages": [{"role": "user", "content": "…"}, …, {"role": "assistant", "content": "…"}]}

Messages go through the model's chat template; the last one is the answer. Answers end with the
tokenizer's end-of-sequence token. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.training.errors import TrainingError


@dataclass(frozen=True)
class Example:
    """One prompt and its answer as token ids; `text` is the answer without its end."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def read_examples(file: Path, tokenizer: Any, max_tokens: int) -> list[Example]:
    """Every line of `file`, in order. Blank lines are passed over.

    Raises TrainingError that names the line, for one that is longer than `max_tokens` as well, and
    OSError.
    """
    examples = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{file} is not in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = make_example(_object(line), tokenizer)
        except TrainingError as error:
            raise TrainingError(f"{file} line {number}: {error}") from error
        if len(example) > max_tokens:
            raise TrainingError(
                f"{file} line {number}: {len(example)} tokens, must be at most {max_tokens}"
            )
        examples.append(example)
    if not examples:
        raise TrainingError(f"{file} has no examples")
    return examples


def make_example(content: Mapping[str, Any], tokenizer: Any) -> Example:
    """Tokenise one object. Raises TrainingError."""
    if set(content) == {"prompt", "completion"}:
        prompt, answer = (_string(content, key) for key in ("prompt", "completion"))
        prompt_ids = tokenizer(prompt).input_ids
    elif set(content) == {"messages"}:
        messages = _messages(content["messages"])
        answer = messages[-1]["content"]
        text = _chat_prompt(messages[:-1], tokenizer)
        prompt_ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        raise TrainingError(
            f"its keys are {', '.join(sorted(content)) or 'none'}, must be prompt and completion, "
            "or messages"
        )
    if not prompt_ids or not answer:
        raise TrainingError("prompt and answer must not be empty")
    answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
    return Example(tuple(prompt_ids), (*answer_ids, tokenizer.eos_token_id), answer)


def _object(line: str) -> Mapping[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise TrainingError(f"no JSON: {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{line[:60]!r} is no JSON object")
    return content


def _string(content: Mapping[str, Any], key: str) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise TrainingError(f"{key} is {str(value)[:60]!r}, must be a string")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    are_messages = isinstance(value, list) and all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(part, str) for part in message.values())
        for message in value
    )
    if not are_messages or len(value) < 2 or value[-1]["role"] != "assistant":
        raise TrainingError(
            "messages must be objects of role and content, at least two, the last an assistant's"
        )
    return list(value)


def _chat_prompt(messages: list[dict[str, str]], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise TrainingError("the base has no chat template: give prompt and completion instead")
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
