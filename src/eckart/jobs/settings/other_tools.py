"""Translates keys of LLaMA-Factory and axolotl to keys of a job.

Most are in the table that also gives hints for keys typed on the command line (words.HABITS). A
key without a counterpart is reported with its line; its meaning is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eckart.errors import UsageError
from eckart.jobs.settings.words import HABITS, Setting
from eckart.recipe import registry
from eckart.recipe.registry import FULL

MORE = {  # keys of the two tools beside the habits
    "loraplus_lr_ratio": "weights.lr_ratio",
    "lora_target_modules": "weights.targets",
    "sequence_len": "data.seq_len",
    "val_size": "data.eval",
    "test_datasets": "data.eval",
    "datasets": "data.train",
    "galore_rank": "update.rank",
}
SILENT = (  # done by default here, or not needed
    "do_train", "do_eval", "overwrite_output_dir", "overwrite_cache", "logging_steps", "stage",
    "preprocessing_num_workers", "dataloader_num_workers", "plot_loss", "save_only_model",
    "ddp_timeout", "strict", "is_llama_derived_model", "sample_packing", "pad_to_sequence_len",
    "eval_sample_packing", "train_on_inputs", "model_type", "tokenizer_type", "save_safetensors",
    "tf32", "template", "dataset_dir", "dataset_prepared_path", "packing", "eval_strategy",
    "per_device_eval_batch_size", "eval_batch_size", "lora_modules_to_save",
)  # fmt: skip
TRAINED_ALIKE = ("sft", "pt")  # LLaMA-Factory's stages that `finetune` covers


@dataclass
class Found:
    """The translated keys, and those that could not be translated as (key, place, reason)."""

    tool: str
    words: dict[str, Any] = field(default_factory=dict)
    lost: list[tuple[str, str, str]] = field(default_factory=list)

    def lose(self, setting: Setting, why: str = "no counterpart") -> None:
        self.lost.append((f"{'.'.join(setting.key)} = {setting.text}", setting.place, why))


def from_keys(tool: str, settings: list[Setting]) -> Found:
    """Translate settings of another tool, keys and values."""
    found = Found(tool)
    table = {**HABITS, **MORE}
    for setting in settings:
        name = setting.key[0]
        special = SPECIAL.get(name)
        if special is not None:
            special(found, setting)
        elif method := method_named(name):
            if setting.value:
                found.words[method.axis] = method.name
        elif name in table and len(setting.key) == 1:
            take(found, setting, table[name])
        elif name not in SILENT and setting.value not in (None, False, [], ""):
            found.lose(setting)
    return found


def method_named(key: str) -> registry.Entry | None:
    """The method turned on by a switch of another tool, such as use_galore or peft_use_dora."""
    slug = key.removeprefix("peft_").removeprefix("use_")
    if slug == key:
        return None
    return registry.methods().get(slug.replace("_", "-"))


def take(found: Found, setting: Setting, key: str) -> None:
    """Take over one setting whose key has a counterpart."""
    value = setting.value
    if value is None:
        return
    shape = SHAPES.get(key)
    if shape is None:
        found.words[key] = value
        return
    shaped = shape(value)
    if shaped is None:
        found.lose(setting, f"{key} has no such choice")
    else:
        found.words[key] = shaped


OUR_TARGETS = {"all": "linear", "self_attn": "attn"}


def targets(value: Any) -> list[str]:
    """all, a,b or a list."""
    names = value.split(",") if isinstance(value, str) else list(value)
    return [OUR_TARGETS.get(name.strip(), name.strip()) for name in names]


def schedule(value: Any) -> str | None:
    name = str(value).removesuffix("_with_warmup")
    return name if name in ("cosine", "linear", "constant") else None


def paths(value: Any) -> list[str] | None:
    """A name, names with commas, or axolotl's list of {path: ...}."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    names = [each.get("path") if isinstance(each, Mapping) else each for each in value]
    texts = [name for name in names if isinstance(name, str)]
    return texts if texts and len(texts) == len(names) else None


def held_out(value: Any) -> Any:
    """A share, or paths."""
    return value if isinstance(value, int | float) else paths(value)


def loggers(value: Any) -> list[str] | None:
    names = [value] if isinstance(value, str) else list(value)
    return [n for n in names if n != "none"]


def positive(value: Any) -> Any:
    """A number of steps; -1 and 0 stand for none."""
    return value if isinstance(value, int | float) and value > 0 else None


SHAPES: dict[str, Callable[[Any], Any]] = {
    "weights.targets": targets,
    "update.targets": targets,
    "train.schedule": schedule,
    "train.lr": float,
    "train.epochs": float,
    "weights.alpha": float,
    "data.train": paths,
    "data.eval": held_out,
    "track": loggers,
    "train.save_every": positive,
    "eval.every": positive,
}


def adapter_kind(found: Found, setting: Setting) -> None:
    """finetuning_type, adapter: lora, qlora, full, ..."""
    name = str(setting.value or "full")
    if name == "full":
        found.words["weights"] = FULL
        return
    entry = registry.methods().get(name) or registry.methods().get(name.removeprefix("q"))
    if entry is None or entry.axis != "weights":
        found.lose(setting)
        return
    found.words.setdefault("weights", entry.name)
    if entry.name != name:
        found.lose(setting, f"read as {entry.name}: quantise the base itself first")


def optimizer(found: Found, setting: Setting) -> None:
    """adamw_torch, galore_adamw_8bit: the method that the name begins with."""
    name = str(setting.value).split("_")[0]
    entry = registry.methods().get(name)
    if entry is None or entry.axis != "update":
        found.lose(setting)
    else:
        found.words.setdefault("update", entry.name)  # a switch such as use_galore has precedence


def half(found: Found, setting: Setting) -> None:
    """bf16: true or auto, pure_bf16: true, fp16: true."""
    entry = registry.methods().get(setting.key[0].removeprefix("pure_"))
    if setting.value not in (True, "true", "auto", "full"):
        return
    if entry is None:
        found.lose(setting)
    elif found.words.get("precision") == held_in_bytes():
        found.words["precision.compute"] = entry.declares["dtype"]
    else:
        found.words["precision"] = entry.name


def held_in_bytes() -> str:
    """The precision that quantises the base."""
    entries = registry.methods().values()
    return next(e.name for e in entries if e.axis == "precision" and e.declares.get("converts"))


def quantised_base(found: Found, setting: Setting) -> None:
    """load_in_8bit: true, quantization_bit: 8; a precision of activations is kept."""
    if setting.value in (True, "true") or str(setting.value) == "8":
        before = registry.methods().get(str(found.words.get("precision")))
        found.words["precision"] = held_in_bytes()
        if before is not None:
            found.words["precision.compute"] = before.declares["dtype"]
    elif setting.value not in (False, "false", None):
        found.lose(setting, "bases are held in 8 bits: type precision=" + held_in_bytes())


def stage(found: Found, setting: Setting) -> None:
    """LLaMA-Factory's stage: sft and pt are finetune; others raise an error."""
    if setting.value not in TRAINED_ALIKE:
        raise UsageError(
            "this trains on preferences or rewards, which no command here does",
            [(f"stage = {setting.text}", setting.place)],
            "Use TRL's trainers with eckart.attach.",
        )


def steps(found: Found, setting: Setting) -> None:
    """max_steps; -1 means none."""
    if positive(setting.value):
        found.words.pop("train.epochs", None)
        found.words["train.steps"] = setting.value


def epochs(found: Found, setting: Setting) -> None:
    if positive(setting.value) and "train.steps" not in found.words:
        found.words["train.epochs"] = float(setting.value)


def warmup(found: Found, setting: Setting) -> None:
    """warmup_steps or warmup_ratio; steps count if both are set."""
    if setting.value and (setting.key[0] == "warmup_steps" or "train.warmup" not in found.words):
        found.words["train.warmup"] = setting.value


def all_linear(found: Found, setting: Setting) -> None:
    if setting.value:
        found.words["weights.targets"] = ["linear"]


def scaling(found: Found, setting: Setting) -> None:
    if setting.value:
        found.words["weights.scaling"] = "rslora"


def principal(found: Found, setting: Setting) -> None:
    if setting.value:
        found.words["weights.init"] = setting.key[0].removesuffix("_init")


def tracker(found: Found, setting: Setting) -> None:
    """The tracker named by the key's first part: wandb_project, mlflow_tracking_uri."""
    if setting.value:
        found.words["track"] = [setting.key[0].split("_")[0]]


def options(found: Found, setting: Setting) -> None:
    """axolotl's optim_args: {rank: ..., update_proj_gap: ..., scale: ...}."""
    key = HABITS.get(f"galore_{setting.key[-1]}") or HABITS.get(setting.key[-1])
    if key is None or not key.startswith("update."):
        found.lose(setting)
    else:
        take(found, setting, key)


SPECIAL: dict[str, Callable[[Found, Setting], None]] = {
    "finetuning_type": adapter_kind,
    "adapter": adapter_kind,
    "optim": optimizer,
    "optimizer": optimizer,
    "optim_args": options,
    "load_in_8bit": quantised_base,
    "quantization_bit": quantised_base,
    "bf16": half,
    "pure_bf16": half,
    "fp16": half,
    "stage": stage,
    "max_steps": steps,
    "num_train_epochs": epochs,
    "num_epochs": epochs,
    "warmup_steps": warmup,
    "warmup_ratio": warmup,
    "lora_target_linear": all_linear,
    "use_rslora": scaling,
    "peft_use_rslora": scaling,
    "pissa_init": principal,
    "wandb_project": tracker,
    "mlflow_tracking_uri": tracker,
}
