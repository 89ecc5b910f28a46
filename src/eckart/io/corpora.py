"""Built-in text and tokenizers trained on it: no network, no downloads.

The corpora are Python's own library (PSF-2.0) and its reference prose. Their bytes depend on the
Python build, so no checksum is fixed here: runs record the corpus' SHA-256 and the Python version,
and are compared only if both agree.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
MASK = "<|mask|>"

# Tests, vendored code, generated tables, and the prose that is the other corpus.
LEFT_OUT = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Corpus:
    """Named documents, in a fixed order."""

    name: str
    documents: tuple[tuple[str, str], ...]  # (name, text)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all texts, concatenated in UTF-8."""
        return hashlib.sha256(b"".join(text.encode() for _, text in self.documents)).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all texts in UTF-8."""
        return sum(len(text.encode()) for _, text in self.documents)

    def split(self, fraction: float = 0.05) -> tuple[Corpus, Corpus]:
        """Training and held-out documents, by SHA-256 of their names."""
        held = {name for name, _ in self.documents if is_held_out(name, fraction)}
        return (
            Corpus(self.name, tuple(d for d in self.documents if d[0] not in held)),
            Corpus(self.name, tuple(d for d in self.documents if d[0] in held)),
        )


def is_held_out(key: str, fraction: float) -> bool:
    """Is a document of this name in the held-out share?

    SHA-256(key) mod round(1 / fraction) == 0: mod 20 for 5 %. It depends on the name alone, so no
    document changes sides in a larger corpus.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % round(1 / fraction) == 0


def stdlib_code() -> Corpus:
    """The source files of Python's standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if any(part in LEFT_OUT or part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            continue
        with tokenize.open(path) as file:  # respects the file's encoding declaration
            documents.append(("/".join(parts), file.read()))
    return Corpus("stdlib-code", tuple(documents))


def pydoc_prose() -> Corpus:
    """The language reference that `help()` shows, one document per entry."""
    topics = import_module("pydoc_data.topics").topics
    return Corpus("pydoc-prose", tuple((name, topics[name]) for name in sorted(topics)))


CORPORA = {"stdlib-code": stdlib_code, "pydoc-prose": pydoc_prose}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 2048,
    split_digits: bool = False,
    special: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a special token, `<|end|>`, as end and padding.

    `special` are further special tokens; `<|mask|>` among them is the mask token.

    Any text can be encoded and decodes to itself exactly. Train on the training split alone.
    `split_digits` makes every digit its own token, for arithmetic.
    """
    tokenizer = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    else:
        tokenizer.pre_tokenizer = by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, **({"mask_token": MASK} if MASK in special else {}))


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8 (ids 1 to 256), and `<|end|>` (id 0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END: 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        **names,
    )
