"""Tasks of models: the Auto class that loads each, and how a configuration indicates it.

causal          continues a text (llama, gpt2)
masked          fills in hidden words (bert)
seq2seq         answers one text by another (t5, bart)
classification  a class for a text; `tagging` one for each word; `image` one for an image
encoder         features alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from eckart.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Task:
    """What jobs need to know of a task; `gives` describes such a model in errors."""

    auto: str  # transformers' class that loads it
    gives: str
    language: bool = False  # is it learnt from text as it is?
    classes: bool = False  # has it a head for classes, which the data names?
    chosen: bool = False  # is it one choice per position, so that accuracy is defined?
    sees: str = "text"  # or images
    unit: str = "token"  # what has a label
    labels: str = "tokens"  # several of them, as `eval` counts them


TASKS = {
    "causal": Task("AutoModelForCausalLM", "continues text", language=True),
    "masked": Task("AutoModelForMaskedLM", "fills in words", language=True, chosen=True),
    "seq2seq": Task("AutoModelForSeq2SeqLM", "answers text", language=True),
    "classification": Task(
        "AutoModelForSequenceClassification",
        "gives classes", classes=True, chosen=True, unit="row", labels="labels",
    ),
    "tagging": Task(
        "AutoModelForTokenClassification",
        "gives classes", classes=True, chosen=True, unit="tag", labels="tags",
    ),
    "encoder": Task("AutoModel", "gives features"),
    "image": Task(
        "AutoModelForImageClassification",
        "looks at images", classes=True, chosen=True, sees="images", unit="row", labels="labels",
    ),
}  # fmt: skip
ENDINGS = {  # of an architecture's name
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForImageClassification": "image",
}


def task_class(task: str) -> Any:
    """The Auto class of a task."""
    if task not in TASKS:
        raise UsageError("no such task", [(task, "")], did_you_mean(task, list(TASKS)))
    return getattr(transformers, TASKS[task].auto)


def task_of(config: PretrainedConfig | Mapping[str, Any]) -> str:
    """The task that a configuration was saved for; for a bare shape, its type's usual one.

    BERT can be a decoder too, so `is_decoder` decides for models like it.
    """
    facts = config.to_dict() if isinstance(config, PretrainedConfig) else config
    kind = str(facts.get("base_model_type") or facts.get("model_type"))
    named = facts.get("architectures")
    made_as = str(named[0]) if isinstance(named, list) and named else ""
    for ending, task in ENDINGS.items():
        if made_as.endswith(ending):
            return task
    if made_as.endswith("ForConditionalGeneration") or not made_as:
        if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return "seq2seq"
    elif made_as.endswith("Model"):
        return "encoder"
    both = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (both and facts.get("is_decoder")):
        return "masked"
    return "image" if sees_images(facts) and not both else "causal"


def sees_images(config: PretrainedConfig | Mapping[str, Any]) -> bool:
    """Can a model of this type be one for classes of images?"""
    facts = config.to_dict() if isinstance(config, PretrainedConfig) else config
    kind = str(facts.get("base_model_type") or facts.get("model_type"))
    return kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
