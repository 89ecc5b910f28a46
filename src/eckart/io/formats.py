"""Rows of known columns to text, with what the model is to learn from marked.

An example is a list of (text, trained) parts: the loss is taken on the trained ones. What a
file holds is told by its columns:

    text                          all of it                (text)
    messages, conversations       what the assistant says  (messages)
    instruction (+input), output  the outputs              (instruction)
    prompt, completion            the completion           (prompt+completion)
    text, label                   the label                (text+label)
    tokens, tags                  a tag for each token     (tokens+tags)
    input_ids (+labels)           as given                 (input_ids)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eckart.errors import FileError, UsageError, did_you_mean, nearest
from eckart.io.reading import Row

Part = tuple[str, bool]  # text, and whether the loss is taken on it

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "input_ids": ("input_ids",),
    "text+label": ("text", "label"),
    "tokens+tags": ("tokens", "tags"),
    "text": ("text",),
}
IMAGES = "image+label"  # no format of text: io/images.py
CLASSES = {"text+label": "classification", "tokens+tags": "tagging", IMAGES: "image"}
PAIRS = ("prompt+completion", "instruction", "messages")  # formats of questions and answers
LEARNT = {
    "messages": "loss on assistant tokens",
    "prompt+completion": "loss on completions",
    "instruction": "loss on outputs",
    "input_ids": "loss on labels as given",
    "text+label": "loss on the label",
    "tokens+tags": "loss on the tags",
    "text": "loss on all tokens",
}
PLACE = re.compile(r", (line|row) \d+$")  # what follows the file where a row is named
UNITS = {"messages": "conversations", "text": "documents", "tokens+tags": "sentences"}

# Used, and said, where a tokenizer has no chat template of its own. A turn ends with the
# tokenizer's end token, so that generation stops there.
PLAIN = (
    "{% for m in messages %}"
    "{{ '### ' + m['role'].capitalize() + ':\\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def format_of(row: Row, wanted: str = "auto") -> str:
    """The format that a row's columns indicate, or `wanted` if it is not "auto".

    Raises UsageError for preference pairs, FileError if no format fits.
    """
    columns = columns_of(row)
    if {"chosen", "rejected"} <= columns:
        raise UsageError(
            "these are preference pairs, which no command trains on",
            [(row.where, "columns chosen and rejected")],
            "Use TRL's DPOTrainer with eckart.attach, as examples/dpo.py does.",
        )
    if wanted != "auto":
        if wanted not in FORMATS:
            fix = did_you_mean(wanted, list(FORMATS))
            raise UsageError("unknown data.format", [(f"data.format = {wanted}", "")], fix)
        for column in FORMATS[wanted]:
            if column not in columns:
                raise lacking(row, column)
        return wanted
    for name, needed in FORMATS.items():
        if set(needed) <= columns:
            return name
    known = sorted({column for needed in FORMATS.values() for column in needed})
    choices = "Known: " + "; ".join(" + ".join(needed) for needed in FORMATS.values()) + "."
    fix = next((f for c in row.fields if (f := did_you_mean(c, known, " ")) != " "), choices)
    raise FileError("no known columns in the data", [(row.where, spelled(row))], fix)


def require_alike(found: Sequence[Row], kind: str) -> None:
    """Raise FileError for the first row that lacks a column of the common format."""
    for row in found:
        columns = columns_of(row)
        lost = next((c for c in FORMATS[kind] if c not in columns), None)
        if lost is None:
            continue
        files = [PLACE.sub("", r.where) for r in (found[0], row)]
        if files[0] == files[1]:
            raise lacking(row, lost)
        raise FileError(
            "these files have different columns",
            [(r.where, spelled(r)) for r in (found[0], row)],
            f"Type data=[{','.join(files)}]: each is then read by its own columns.",
        )


def columns_of(row: Row) -> set[str]:
    """A row's columns; `conversations` counts as `messages`."""
    return {*row.fields, *(["messages"] if "conversations" in row.fields else [])}


def lacking(row: Row, column: str) -> FileError:
    """The error for a row without a column that its format has."""
    return FileError(f"the row has no {column}", [(row.where, spelled(row))])


def spelled(row: Row) -> str:
    """A row's columns, for an error."""
    return "columns " + ", ".join(row.fields) if row.fields else "no columns"


def field(row: Row, name: str) -> str:
    """A text field. Raises FileError if the row lacks it or it is not text."""
    if name not in row.fields:
        raise lacking(row, name)
    value = row.fields[name]
    if not isinstance(value, str):
        said = "null" if value is None else f"{type(value).__name__}: {value!r}"
        raise FileError(f"{name} is not text", [(row.where, said)])
    return value


def examples(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase) -> list[list[Part]]:
    """The examples of a row as parts; several if a chat template rewrites earlier turns.

    Raises FileError, with file and line, if nothing in the row counts in the loss.
    """
    end = tokenizer.eos_token or ""
    if kind == "text":
        return [[(field(row, "text"), True), (end, True)]]
    if kind == "prompt+completion" and isinstance(row.fields.get("prompt"), str):
        prompt, completion = field(row, "prompt"), field(row, "completion")
        if not completion.strip():
            raise FileError("nothing to learn from", [(row.where, "completion is empty")])
        return [[(prompt, False), (completion, True), (end, True)]]
    found = conversation(messages_of(row, kind), tokenizer, row.where)
    if kind == "prompt+completion":  # of messages: the prompt's own answers are given, not learnt
        return found[-1:]
    return found


def pairs(row: Row, kind: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """A row as (given, answer) texts: one per run of trained parts, given all before it.

    The end token is left out of the answer: the encoder adds it.
    """
    found, end = [], tokenizer.eos_token or ""
    for parts in examples(row, kind, tokenizer):
        before = ""
        for trained, run in groupby(parts, key=lambda part: part[1]):
            said = "".join(text for text, _ in run)
            if trained:
                found.append((before, said.removesuffix(end) if end else said))
            before += said
    found = found[-1:] if kind == "prompt+completion" else found  # a prompt's own are given
    return [(given, answer) for given, answer in found if answer.strip()]


def tagged(row: Row) -> list[tuple[str, str]]:
    """A row's tokens and tags. Raises FileError if their numbers differ."""
    tokens, tags = listed(row, "tokens", "a list"), listed(row, "tags", "a list")
    if len(tokens) != len(tags):
        counts = f"{len(tokens)} tokens, {len(tags)} tags"
        raise FileError("tokens and tags are not as many", [(row.where, counts)])
    for token in tokens:
        if not isinstance(token, str):
            reason = f"{type(token).__name__}: {token!r}"
            raise FileError("a token is not text", [(row.where, reason)])
    return list(zip(tokens, map(str, tags), strict=True))


def messages_of(row: Row, kind: str) -> list[dict[str, str]]:
    """A row as role/content messages, from any of the three formats.

    A column `system` becomes the first of them; `history`, of earlier [question, answer] pairs,
    comes before an instruction.
    """
    if kind == "instruction":
        asked = field(row, "instruction")
        if row.fields.get("input"):
            asked += "\n\n" + field(row, "input")
        pairs = [*earlier(row), (asked, field(row, "output"))]
        roles = ("user", "assistant") * len(pairs)
        said = [text for pair in pairs for text in pair]
        found = [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]
    else:
        given = (
            [*listed(row, "prompt"), *listed(row, "completion")]
            if kind == "prompt+completion"
            else listed(row, "messages" if "messages" in row.fields else "conversations")
        )
        found = [message_of(m, i, row) for i, m in enumerate(given, 1)]
    if row.fields.get("system") and found[0]["role"] != "system":
        found = [{"role": "system", "content": field(row, "system")}, *found]
    return found


def earlier(row: Row) -> list[tuple[str, str]]:
    """The [question, answer] pairs of a column `history`. FileError if they are malformed."""
    found = row.fields.get("history") or []
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in found]
    if any(len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in pairs):
        raise FileError("history is not [question, answer] pairs", [(row.where, "")])
    return [(question, answer) for question, answer in pairs]


def listed(row: Row, name: str, what: str = "a list of messages") -> list[Any]:
    """A field that is a list and not empty. FileError otherwise."""
    value = row.fields.get(name)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise FileError(f"{name} is not {what}", [(row.where, kind)])
    return value


SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES = (
    "system", "developer", "user", "assistant", "tool", "tool_call", "tool_response", "function",
    "function_call", "observation", "ipython", *SPEAKERS,
)  # fmt: skip


def message_of(message: Any, number: int, row: Row) -> dict[str, str]:
    """One message with `role` and `content`; `from` and `value` are accepted for these."""
    where = f"{row.where}, message {number}"
    if not isinstance(message, Mapping):
        raise FileError("a message is not an object", [(where, type(message).__name__)])
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(c, Mapping) and "text" in c for c in content):
        content = "".join(c["text"] for c in content)
    if not isinstance(role, str) or not isinstance(content, str):
        lost = "role" if not isinstance(role, str) else "content"
        keys = ", ".join(map(str, message))
        raise FileError(f"a message has no {lost}", [(where, f"keys {keys}")])
    role = role.lower()
    if role not in ROLES and (close := nearest(role, ROLES)):  # others: the template's choice
        fix = f"Did you mean {close[0]}?"
        raise FileError("a message has an unknown role", [(where, f"role {role}")], fix)
    return {"role": SPEAKERS.get(role, role), "content": content}


def conversation(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[list[Part]]:
    """A conversation as the chat template writes it, with the assistant's text trained.

    A template with generation markers says which text that is. For other templates it is what a
    message adds to the text before it, without the generation prompt. If a template writes earlier
    turns differently once later ones follow (it drops their reasoning, for example), each answer
    becomes its own example, with the text before it as in generation.
    """
    template = tokenizer.chat_template or PLAIN
    if isinstance(template, dict):
        template = template.get("default", PLAIN)

    def render(upto: int, opening: bool = False) -> str:
        given = messages[:upto]
        return written(template, given, tokenizer, where, opening) if given else ""

    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not any(messages[i]["content"].strip() for i in answers):
        roles = ", ".join(m["role"] for m in messages)
        raise FileError("nothing to learn from", [(where, f"no assistant turn; roles {roles}")])
    if "{% generation" in template or "{%- generation" in template:
        return [marked(template, messages, tokenizer, where)]
    turns = [answer_in(render, i, tokenizer.eos_token) for i in answers]
    whole = render(len(messages))
    if all(whole.startswith(text) for text, _, _ in turns):
        return [cut(whole, [(start, stop) for _, start, stop in turns])]
    return [[(text[:start], False), (text[start:stop], True)] for text, start, stop in turns]


def answer_in(render: Callable[..., str], i: int, end: str | None) -> tuple[str, int, int]:
    """The text up to and including message i, and the start and end of the answer in it.

    `render(n)` is the text of the first n messages, with `opening=True` including the generation
    prompt.
    """
    text, before = render(i + 1), render(i)
    given = render(i, opening=True) if text.startswith(before) else before
    start, stop = len(common_start(given, text)), len(text)
    if end and text.rstrip().endswith(end):
        stop = len(text.rstrip())  # generation ends with the end token, before any blank
    return text, start, stop


def written(
    template: str,
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    opening: bool = False,
) -> str:
    """The text that a chat template produces."""
    with template_errors(where):
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=opening
            )
        )


def marked(
    template: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Part]:
    """A conversation from a template with generation markers."""
    with template_errors(where):
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return cut(texts[0], spans[0])


@contextmanager
def template_errors(where: str) -> Iterator[None]:
    """Convert exceptions of a chat template into a FileError with the template's message."""
    try:
        yield
    except Exception as fault:  # a template can raise anything
        reason = next(iter(str(fault).strip().splitlines()), type(fault).__name__)
        raise FileError("the chat template refuses this", [(where, reason)]) from fault


def cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Part]:
    """A text as parts; the spans (in order, disjoint) are trained."""
    parts: list[Part] = []
    at = 0
    for start, stop in spans:
        parts += [(text[at:start], False), (text[start:stop], True)]
        at = stop
    return [(t, trained) for t, trained in [*parts, (text[at:], False)] if t]


def common_start(a: str, b: str) -> str:
    """The common prefix of two texts."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if at is None else at]


def shown(parts: Sequence[Part], most: int = 800) -> str:
    """An example as text for the user: trained parts are enclosed in « and »."""
    text = "".join(f"«{t}»" if trained else t for t, trained in parts if t)
    text = text.replace("»«", "")
    return text if len(text) <= most else text[: most // 2] + " [...] " + text[-most // 2 :]
