"""Models with random weights, whose initial values depend only on seed and module names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.shapes import PRESETS, Preset
from eckart.io.tasks import task_class, task_of

__all__ = ["PRESETS", "Preset", "build_model", "config_of", "fill", "quiet"]


def config_of(source: str | Path | PretrainedConfig, vocab: int | None = None) -> PretrainedConfig:
    """The configuration of a preset's name, a config.json or its folder.

    `vocab` replaces its vocabulary size. Special token ids outside the vocabulary are dropped, as
    the tokenizer's are the ones used.
    """
    if isinstance(source, PretrainedConfig):
        config = source
    elif str(source) in PRESETS and not Path(source).exists():
        preset = PRESETS[str(source)]
        config = AutoConfig.for_model(preset.kind, vocab_size=vocab or preset.vocab, **preset.shape)
    elif Path(source).exists():
        path = Path(source)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as fault:
            reason = str(fault).splitlines()[0]
            raise FileError("the model's config cannot be read", [(str(path), reason)]) from fault
    else:
        raise UsageError(
            "no such preset or config",
            [(str(source), "")],
            did_you_mean(str(source), list(PRESETS)),
        )
    if vocab is not None:
        config.vocab_size = vocab
    size = getattr(config, "vocab_size", None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, key, None)
        if size is not None and isinstance(token, int) and token >= size:
            setattr(config, key, None)
    return config


def build_model(
    source: str | Path | PretrainedConfig,
    vocab: int | None = None,
    seed: int = 0,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model with random weights, the same on every machine that draws the same numbers.

    `task` None is the configuration's own (`task_of`).

    Every module draws from its own seed, hash(seed, its name): a deeper model has the same
    values in the layers that both have. The global generator is left as it was.
    """
    config = config_of(source, vocab)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)  # for what a module draws in its constructor
        model = task_class(task or task_of(config)).from_config(config, dtype=dtype)
        initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw every module's initial values by its architecture's own rule, from its own seed.

    Children are initialised before their parents, whose rule may rescale them (GPT-2's
    projections).
    """
    owners: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        above = owners.get(name.rpartition(".")[0], model)
        owners[name] = module if isinstance(module, PreTrainedModel) else above
    for name, module in reversed(list(model.named_modules())):
        torch.manual_seed(seed_of(seed, name))
        owners[name]._init_weights(module)
    model.tie_weights()


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed from a run's seed and a module's name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fill(model: PreTrainedModel, names: set[str], seed: int) -> None:
    """Redraw the modules that hold these tensors: a head missing from a checkpoint."""
    modules = {name.rpartition(".")[0] for name in names}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in sorted(modules):
            torch.manual_seed(seed_of(seed, name))
            model._init_weights(model.get_submodule(name))


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' messages and progress bars: eckart reports errors itself."""
    logging = transformers.utils.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
