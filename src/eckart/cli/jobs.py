"""The table of commands that run a job: what is typed, its options, what it does, examples."""

from inspect import Parameter
from typing import Any

from eckart.cli import running
from eckart.cli.app import HELP, command
from eckart.cli.options import (
    ADAPTER,
    AGAINST,
    BENCH,
    COMPARED,
    CONFIG,
    JSON,
    OUT,
    OVERWRITE,
    PICTURE,
    PROMPT,
    RESULT,
    RESUME,
    SEED,
    TEMPERATURE,
    TO,
    TOKENS,
    TRAINING,
    WORDS,
)

FLAGS = ("out", "seed", "dry_run", "json", "resume", "overwrite")  # not keys of a job
# Unknown options are passed to `to_job` as words; its error suggests the key meant.
JOB = {**HELP, "ignore_unknown_options": True}
MODEL_DATA = "MODEL DATA [KEY=VALUE]..."


def job(
    name: str,
    shown: str,
    options: tuple[Parameter, ...],
    text: str,
    *examples: str,
) -> None:
    """Register a command that resolves a job and runs the module of its name in `jobs`."""

    def run(**given: Any) -> None:
        flags = {key: given.pop(key) for key in FLAGS if key in given}
        typed, files = given.pop("words", None), given.pop("config", None)
        running.run_job(name, typed, files, flags, given or None)

    takes = (*((WORDS,) if shown else ()), *options)
    settings = JOB if shown else HELP
    command(
        *takes, words=shown, name=name, help=text, examples=examples, context_settings=settings
    )(run)


# fmt: off
job("demo", "", (OUT, JSON, OVERWRITE), "A first run: a few minutes, no network.")
job("finetune", MODEL_DATA, TRAINING,
    "Teach a model from data. MODEL is a model, an adapter or a run to continue from; DATA is a "
    "file of text, chats, answers or classes, a glob, a folder (of images too) or a hub id.",
    "eckart finetune ./model chat.jsonl",
    "eckart finetune ./model data=[a.jsonl,b.csv] method=dora weights.rank=8 train.lr=1e-3",
    "eckart finetune --resume runs/0001")
job("pretrain", MODEL_DATA, TRAINING,
    "Train from random weights. MODEL is a configuration or the name of a preset.",
    "eckart pretrain llama-tiny notes.txt",
    "eckart pretrain llama-60m 'corpus/*.parquet' update=galore train.steps=5000")
job("compress", "MODEL [DATA] [KEY=VALUE]...", TRAINING,
    "Make a trained model smaller. DATA measures what it cost, and heals.\n\n\b\n"
    "Keys, of which one of keep, rank and error says how small:\n"
    "  keep=X        The share of the matrices' parameters that stays; 0.8.\n"
    "  rank=N        One rank for all of them.\n"
    "  error=X       The relative error allowed at each of them.\n"
    "  samples=N     Rows of DATA for a method that measures some; 128.\n"
    "  heal.steps=N  Training afterwards, on DATA.",
    "eckart compress ./model keep=0.8",
    "eckart compress ./model notes.txt rank=64 heal.steps=300")
job("generate", "MODEL [KEY=VALUE]...",
    (CONFIG, PROMPT, TOKENS, TEMPERATURE, ADAPTER, SEED, JSON),
    "Let a model, an adapter or a run write. Prompts come from -p or standard input.",
    'eckart generate runs/0001 -p "Once upon a time"',
    'echo "Once upon a time" | eckart generate ./model -t 0.8 -n 50')
job("eval", MODEL_DATA, (CONFIG, AGAINST, JSON),
    "Measure a model on data. Loss, bits per byte, accuracy, with intervals; MODEL is a model, an "
    "adapter or a run.",
    "eckart eval runs/0001 held_out.jsonl --against ./model")
job("convert", "SOURCE [KEY=VALUE]...", (TO, RESULT, JSON, OVERWRITE),
    "Write a run, an adapter or a model in another form.\n\n\b\n"
    "Keys:\n"
    "  rank=N       An approximation of this rank, where the form is not exact or too large.\n"
    "  max_drift=X  The smallest rank that costs no more than X nats a token, on data=TEXT.\n"
    "  base=MODEL   An adapter's base, where it is elsewhere now; a model's, to be an adapter.\n"
    "  dtype=NAME   --to dense in float32, bfloat16 or float16; the base's.",
    "eckart convert runs/0001 --to dense -o merged",
    "eckart convert ./finetuned --to lora base=./model max_drift=0.01")
job("inspect", "SOURCE [DATA]", (COMPARED, PICTURE, JSON),
    "Show structure, spectra and effective ranks. SOURCE is a model, an adapter or a run.",
    "eckart inspect runs/0001 --against runs/0002",
    "eckart inspect ./model -o layers.html")
job("bench", MODEL_DATA, (CONFIG, *BENCH, OUT, SEED, JSON, RESUME, OVERWRITE),
    "Compare methods, each with its own best learning rate. Paired seeds, intervals, a report.",
    "eckart bench ./model notes.jsonl --methods dora,lora:rank=4,dense+galore")
# fmt: on
