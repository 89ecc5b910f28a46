"""What a model is for: a task, the Auto class that loads it, and how a configuration tells.

causal          goes on from a text (llama, gpt2)
masked          fills in hidden words (bert)
seq2seq         answers one text by another (t5, bart)
classification  a class for a text; `tagging` one for each word; `image` one for an image
encoder         features alone
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from eckart.errors import UsageError, did_you_mean

TASKS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
    "encoder": "AutoModel",
    "image": "AutoModelForImageClassification",
}
NEW_HEAD = ("classification", "tagging", "image")  # their head may be missing from a checkpoint
LANGUAGE = ("causal", "masked", "seq2seq")  # learnt from text as it is
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
    return getattr(transformers, TASKS[task])


def task_of(config: PretrainedConfig | Mapping[str, Any]) -> str:
    """The task that a configuration was saved for; of a bare shape the usual one of its type.

    BERT can be made a decoder too, so for its like `is_decoder` decides.
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
    return "causal"
