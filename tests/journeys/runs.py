"""What the journeys share: a tiny model on disk, data files, and the command line in-process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from eckart.cli import app
from eckart.io.corpora import bytes_tokenizer
from tests import tiny

TALK = "low rank is enough for most of what a model has to learn from little data"
WORDS = TALK.split()


@dataclass
class Ran:
    """How one command ended."""

    code: int
    out: str
    err: str
    document: dict[str, Any] = field(default_factory=dict)


def eckart(*words: object) -> Ran:
    """Run a command in this process; with --json the document is read."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    ran = Ran(result.exit_code, result.stdout, result.stderr)
    if "--json" in words:
        ran.document = json.loads(ran.out)
    return ran


def model_folder(folder: Path, **changes: Any) -> Path:
    """A llama of 40 thousand parameters that reads bytes."""
    model = tiny.llama(vocab_size=257, max_position_embeddings=48, **changes)
    model.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


def texts(path: Path, rows: int = 60) -> Path:
    """Sentences of the same few words, as JSON lines."""
    count = len(WORDS)
    said = [" ".join(WORDS[(i * 7 + k) % count] for k in range(8)) for i in range(rows)]
    path.write_text("".join(json.dumps({"text": s}) + "\n" for s in said))
    return path


def workplace(folder: Path, rows: int = 60) -> Path:
    """A folder with a model `m` and so many sentences in `d.jsonl`."""
    model_folder(folder / "m")
    texts(folder / "d.jsonl", rows)
    return folder


def labels(path: Path, rows: int = 40) -> Path:
    """Sentences with one of two classes."""
    said = [
        {"text": " ".join([WORDS[i % 2]] * 4), "label": ["no", "yes"][i % 2]} for i in range(rows)
    ]
    path.write_text("".join(json.dumps(s) + "\n" for s in said))
    return path
