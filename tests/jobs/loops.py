"""The same small training in three loops: a bare one, Trainer and SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, get_scheduler

from eckart.io.packing import order
from eckart.jobs.training.trainer import trainer
from eckart.recipe import Handle, Recipe, attach, registry
from tests.conftest import VOCAB, tiny

LR, ROWS, SEED = 1e-2, 24, 3


def rows(count: int = ROWS, length: int = 12) -> list[dict[str, list[int]]]:
    """Rows of one length: the mean of micro-batch means is then the mean over all tokens."""
    g = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCAB, (count, length), generator=g).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    batch = {k: torch.tensor([e[k] for e in examples]) for k in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer wants one; the rows are tokens already."""
    words = {f"t{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t2")), pad_token="t0", eos_token="t1"
    )


def handle_of(objectives: tuple[Any, ...] = (), model: str = "llama", **fields: Any) -> Handle:
    """LoRA in fp64 on a tiny model, away from its zero start."""
    lora: Any = registry.load("lora")
    net = tiny(model, torch.float64)
    handle = attach(net, Recipe(weights=lora(rank=4, **fields), objective=objectives), seed=SEED)
    return in_double(handle)


def in_double(handle: Handle) -> Handle:
    handle.model.to(torch.float64)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return handle


def bare(handle: Handle, steps: int, accumulate: int, batch: int = 2, **more: Any) -> list[float]:
    """The loop that a user writes, with `more` for the model; the losses of its steps."""
    optimizer = handle.optimizer(lr=LR, clip=0.5)
    schedule = get_scheduler("linear", optimizer, 0, steps)
    data, losses, queue = rows(), [], []
    epoch = 0
    handle.model.train()
    while len(losses) < steps:
        rank = order(len(data), SEED, epoch).tolist()
        queue += [rank[i : i + batch] for i in range(0, len(data), batch)]
        while len(queue) >= accumulate and len(losses) < steps:
            total = 0.0
            for ids in [queue.pop(0) for _ in range(accumulate)]:
                inputs = collate([data[i] for i in ids])
                loss = handle.loss(inputs, handle.model(**inputs, **more)) / accumulate
                loss.backward()
                total += loss.item()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(total)
        epoch += 1
    return losses


def head_of(cls: type[Trainer], handle: Handle) -> dict[str, bool]:
    """Give the model the head that this trainer computes its loss with; the words that choose it.

    SFTTrainer's takes log-probabilities in fp32 whatever the model: other numbers than the
    model's own loss, the same ones in every loop.
    """
    if cls is Trainer:
        return {}
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(handle.model, outputs=("log_probs", "entropy", "is_top1"))
    return {"fused_lm_head": True}


def arguments(cls: type[Trainer], out: Path, steps: int, accumulate: int, **more: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": SEED,
        "remove_unused_columns": False,
        **more,
    }
    if cls is Trainer:
        return TrainingArguments(**options)
    from trl import SFTConfig

    skip = {"skip_prepare_dataset": True}
    return SFTConfig(**options, dataset_kwargs=skip, bf16=False, gradient_checkpointing=False)


def mixed(handle: Handle, cls: Any, out: Path, steps: int, accumulate: int, **more: Any) -> Any:
    """A trainer of ours over a class of theirs."""
    from datasets import Dataset

    extra: dict[str, Any] = {} if cls is Trainer else {"processing_class": tokenizer()}
    if "eval_strategy" in more:
        extra["eval_dataset"] = Dataset.from_list(rows(4))
    return trainer(cls)(
        handle,
        args=arguments(cls, out, steps, accumulate, **more),
        train_dataset=Dataset.from_list(rows()),
        data_collator=collate,
        **extra,
    )


def logged(trained: Any, key: str = "loss") -> list[float]:
    """One logged value for each step."""
    return [entry[key] for entry in trained.state.log_history if "loss" in entry]
