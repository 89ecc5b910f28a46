"""Parses YAML files and key=value words to settings: key, value, and where it was written.

weights: {name: lora, rank: 16}   -> weights.name, weights.rank     job.yaml, line 3
train.lr=1e-3                     -> train.lr                       command line
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eckart.errors import FileError, UsageError, nearest

Key = tuple[str, ...]
COMMAND_LINE = "command line"
WORD = re.compile(r"[A-Za-z_][\w.\-]*=")  # the start of a key=value word; no path starts so
# A glob such as *.q_proj, which YAML would take for an alias.
GLOB = re.compile(r"(?:^|(?<=[\[,\s]))\*[^,\]\s'\"]*")

# Keys of other tools -> our key, for hints and for importing their files.
HABITS = {
    "r": "weights.rank",
    "lora_r": "weights.rank",
    "lora_rank": "weights.rank",
    "lora_alpha": "weights.alpha",
    "lora_dropout": "weights.dropout",
    "target_modules": "weights.targets",
    "lora_target": "weights.targets",
    "init_lora_weights": "weights.init",
    "finetuning_type": "weights",
    "peft_type": "weights",
    "adapter": "weights",
    "optim": "update",
    "optimizer": "update",
    "weight_decay": "update.weight_decay",
    "galore_rank": "update.rank",
    "galore_scale": "update.scale",
    "galore_update_interval": "update.every",
    "update_proj_gap": "update.every",
    "galore_target": "update.targets",
    "optim_target_modules": "update.targets",
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "local_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "grad_accumulation": "train.accumulate",
    "max_grad_norm": "train.clip",
    "gradient_clipping": "train.clip",
    "gradient_checkpointing": "train.checkpointing",
    "galore_layerwise": "train.layerwise",
    "torch_compile": "train.compile",
    "save_steps": "train.save_every",
    "checkpoint_every": "train.save_every",
    "checkpoint_interval": "train.save_every",
    "save_total_limit": "train.keep",
    "load_best_model_at_end": "train.best",
    "early_stopping_patience": "train.patience",
    "num_processes": "train.processes",
    "eval_steps": "eval.every",
    "max_seq_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_length": "data.seq_len",
    "cutoff_len": "data.seq_len",
    "block_size": "data.seq_len",
    "train_file": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "val_set_size": "data.eval",
    "model_name_or_path": "model",
    "base_model": "model",
    "output_dir": "out",
    "report_to": "track",
    "torch_dtype": "precision",
    "dtype": "precision",
}
# Keys of other tools whose values differ -> the hint; other_tools.py translates them in files.
SWITCHES = {
    "use_rslora": "weights.scaling=rslora",
    "peft_use_rslora": "weights.scaling=rslora",
    "pissa_init": "weights.init=pissa",
    "rank_pattern": "weights.overrides=[{match: q_proj, rank: 8}]",
    "alpha_pattern": "weights.overrides=[{match: q_proj, alpha: 8}]",
    "lora_target_modules": "weights.targets",
    "loraplus_lr_ratio": "weights.lr_ratio",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), "precision=int8"),
    "fp16": "precision=bf16",
    "resume_from_checkpoint": "--resume RUN",
    "proj_type": "update.side",
    "galore_proj_type": "update.side",
}


@dataclass(frozen=True)
class Setting:
    """One key's value and where it was written."""

    key: Key
    value: Any
    place: str
    text: str  # the value as typed: YAML reads some words as numbers or booleans
    typed: str = ""  # the key as typed, if it was a shorthand

    @property
    def name(self) -> str:
        return self.typed or ".".join(self.key)

    def moved(self, *key: str, value: Any = ...) -> Setting:
        """The same setting under another key (and with another value)."""
        value = self.value if value is ... else value
        return Setting(key, value, self.place, self.text, self.name)


def is_setting(word: str) -> bool:
    """Is this command-line word key=value, not a path?"""
    return WORD.match(word) is not None


def read_words(words: Sequence[str]) -> list[Setting]:
    """The settings of key=value words, in order."""
    return [setting for word in words for setting in read_word(word)]


def read_word(word: str) -> list[Setting]:
    """One word's settings: several where its value is a mapping, `heal={steps: 50}`."""
    if not is_setting(word):
        raise UsageError(
            f"{word if word.isprintable() else repr(word)} is not key=value     {COMMAND_LINE}",
            fix="Type a key and its value: train.lr=1e-3",
        )
    key, _, text = word.partition("=")
    try:
        value = plain(OmegaConf.from_dotlist([f"value={GLOB.sub(quoted, text)}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise UsageError(
            f"cannot read the value of {key}     {COMMAND_LINE}",
            [(word, str(e).splitlines()[0])],
            f"Quote text that YAML does not take: {key}='\"...\"'",
        ) from None
    path: Key = tuple(key.split("."))
    if isinstance(value, Mapping):
        below = settings_of(value, COMMAND_LINE)
        return [Setting((*path, *s.key), s.value, s.place, s.text) for s in below]
    return [Setting(path, value, COMMAND_LINE, text)]


def quoted(match: re.Match[str]) -> str:
    return f"'{match[0]}'"


def read_file(path: str | os.PathLike[str]) -> list[Setting]:
    """The settings of a YAML file, in order. Raises FileError or UsageError with the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        others = {p.stem: p.name for p in Path(path).absolute().parent.glob("*.y*ml")}
        close = [others[stem] for stem in nearest(Path(path).stem, others)]
        raise FileError(
            f"cannot read {path}",
            [("reason", e.strerror or str(e))],
            f"Did you mean {close[0]}?" if close else "Type -c with the path of a YAML file.",
        ) from None
    except UnicodeDecodeError as e:
        raise FileError(f"{path} is not UTF-8 text", [("reason", e.reason)]) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = plain(OmegaConf.create(text)) if root is not None else {}
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise UsageError(f"not valid YAML     {path}, line {line}", fix=str(e.problem)) from None
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise UsageError(f"not valid YAML     {path}", fix=str(e).splitlines()[0]) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(
            f"a job file is a tree of keys     {path}, line 1", fix="Write key: value."
        )
    return list(flatten(root, values, (), str(path)))


def plain(config: Any) -> Any:
    """OmegaConf's containers as dicts and lists, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def flatten(
    node: yaml.MappingNode, values: Mapping[Any, Any], above: Key, path: str
) -> Iterator[Setting]:
    """The settings in a YAML mapping, with their lines. A list is one value."""
    for key_node, value_node in node.value:
        key = (*above, *str(key_node.value).split("."))
        value = values.get(key_node.value, values.get(yaml.safe_load(key_node.value)))
        if isinstance(value_node, yaml.MappingNode) and isinstance(value, Mapping):
            yield from flatten(value_node, value, key, path)
        else:
            text = value_node.value if isinstance(value_node, yaml.ScalarNode) else str(value)
            yield Setting(key, value, f"{path}, line {key_node.start_mark.line + 1}", text)


def settings_of(tree: Mapping[str, Any], place: str) -> list[Setting]:
    """The settings in a nested dict, all with the same place."""
    found: list[Setting] = []
    for key, value in tree.items():
        name = str(key)  # YAML reads {1.5: x} with a number for a key
        if isinstance(value, Mapping):
            below = settings_of(value, place)
            found += [Setting((name, *s.key), s.value, s.place, s.text) for s in below]
        else:
            found.append(Setting((name,), value, place, str(value)))
    return found
