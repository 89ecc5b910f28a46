"""Files of other tools as job files: what is carried over, and what is said to be left out."""

from dataclasses import fields

import pytest

from eckart.jobs.settings.config import resolve
from tests.journeys.adapters import adapter
from tests.journeys.runs import eckart, model_folder

FACTORY = """
model_name_or_path: ./m
trust_remote_code: true
stage: sft
finetuning_type: lora
lora_rank: 4
lora_target: all
loraplus_lr_ratio: 16.0
dataset: mine,theirs
template: llama3
cutoff_len: 2048
output_dir: saves/x
logging_steps: 10
save_steps: 500
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
"""
FULL = """
model_name_or_path: ./m
stage: sft
optim: adamw_8bit
finetuning_type: full
use_galore: true
galore_target: mlp,self_attn
galore_rank: 128
galore_update_interval: 50
galore_layerwise: true
pure_bf16: true
dataset: d
max_steps: 30
num_train_epochs: 3.0
lr_scheduler_type: polynomial
"""
AXOLOTL = """
base_model: org/model
load_in_4bit: true
datasets:
  - path: ./a.jsonl
    type: alpaca
  - path: ./b.jsonl
    type: chat_template
val_set_size: 0.1
output_dir: ./out
adapter: qlora
sequence_len: 512
sample_packing: true
lora_r: 16
lora_alpha: 24
lora_target_modules: [gate_proj, q_proj]
peft_use_dora: false
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
weight_decay: 0.01
wandb_project: mine
"""


def imported(tmp_path, text, name="theirs.yaml"):
    """The job that the printed file resolves to, and what was said to be left out."""
    (tmp_path / name).write_text(text)
    ran = eckart("config", "import", tmp_path / name)
    assert ran.code == 0, ran.err
    (tmp_path / "job.yaml").write_text(ran.out)
    left = [line for line in ran.err.splitlines() if line.startswith("left out")]
    return resolve("finetune", files=[tmp_path / "job.yaml"], partial=True), left


def test_llama_factory_with_lora(tmp_path):
    job, left = imported(tmp_path, FACTORY)
    weights = job.choices["weights"].method
    assert job.choices["weights"].name == "lora" and weights.targets == ("linear",)
    assert (weights.rank, weights.alpha, weights.lr_ratio) == (4, 8.0, 16.0), "alpha is 2 r there"
    train = job.train
    assert (train.batch_size, train.accumulate, train.lr, train.epochs) == (1, 8, 1e-4, 3.0)
    assert (train.schedule, train.warmup, train.save_every) == ("cosine", 0.1, 500)
    assert (job.model, job.out, job.data.seq_len, job.track) == ("./m", "saves/x", 2048, ())
    assert job.choices["precision"].name == "bf16"
    assert [line.split("     ")[0] for line in left] == [
        "left out  trust_remote_code = true",
        "left out  dataset = mine,theirs",
    ]
    assert "theirs.yaml, line 3: no counterpart" in left[0]


def test_llama_factory_finds_its_data_files(tmp_path):
    (tmp_path / "data").mkdir()
    table = '{"mine": {"file_name": "mine.json"}, "theirs": {"hf_hub_url": "org/set"}}'
    (tmp_path / "data" / "dataset_info.json").write_text(table)
    job, left = imported(tmp_path, FACTORY)
    assert [s.path for s in job.data.train] == ["data/mine.json", "org/set"]
    assert not any("dataset" in line for line in left)


def test_llama_factory_with_galore(tmp_path):
    job, left = imported(tmp_path, FULL)
    assert job.choices["weights"].name == "dense"
    update = job.choices["update"].method
    assert update.slug == "galore" and update.targets == ("mlp", "attn")
    assert (update.rank, update.every) == (128, 50)
    assert job.train.layerwise and job.choices["precision"].name == "bf16"
    assert (job.train.steps, job.train.epochs) == (30, None), "steps win over epochs there"
    assert any("train.schedule has no such choice" in line for line in left)


def test_axolotl(tmp_path):
    job, left = imported(tmp_path, AXOLOTL)
    weights = job.choices["weights"].method
    assert (weights.slug, weights.rank, weights.alpha) == ("lora", 16, 24.0)
    assert weights.targets == ("gate_proj", "q_proj")
    assert [s.path for s in job.data.train] == ["./a.jsonl", "./b.jsonl"]
    assert (job.data.eval, job.data.seq_len, job.train.warmup) == (0.1, 512, 10)
    assert (job.train.checkpointing, job.track) == (True, ("wandb",))
    assert job.choices["update"].method.weight_decay == 0.01
    names = [line.split()[2] for line in left]
    assert names == ["load_in_4bit", "adapter", "flash_attention"]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("base", ["load_in_8bit: true", "quantization_bit: 8"])
def test_a_base_in_8_bits_keeps_what_was_said_of_activations(base, order, tmp_path):
    lines = ["base_model: m", *[base, "bf16: true"][::order], "micro_batch_size: 2"]
    job, left = imported(tmp_path, "\n".join(lines) + "\n")
    assert (job.choices["precision"].name, left) == ("int8", [])
    assert job.choices["precision"].method.dtype == "bfloat16"
    _, left = imported(tmp_path, "base_model: m\nmicro_batch_size: 2\nquantization_bit: 4\n")
    assert len(left) == 1 and left[0].endswith("type precision=int8")


@pytest.mark.parametrize(
    ("slug", "given"),
    [
        ("lora", {"rank": 4, "alpha": 4.0, "scaling": "rslora", "targets": ("q_proj", "mlp.up")}),
        ("lora", {"rank": 4, "overrides": ({"match": "layers.0-0", "rank": 2},)}),
        ("dora", {"rank": 3}),
    ],
)
def test_a_peft_config_means_the_same_adapter(tmp_path, slug, given):
    from tests.journeys.adapters import handle_on

    base = model_folder(tmp_path / "m")
    adapter(tmp_path / "a", base, slug, "peft", **given)
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    job, left = imported(tmp_path, text, "adapter_config.json")
    assert left == [] and job.model == str(base)
    method = job.choices["weights"].method
    ours = handle_on(base, slug, **given)
    again = handle_on(base, slug, **{f.name: getattr(method, f.name) for f in fields(method)})
    shapes = {n: tuple(t.shape) for n, t in ours.named_state().items()}
    assert {n: tuple(t.shape) for n, t in again.named_state().items()} == shapes
    assert {p: t["lora"].scale for p, t in again.terms().items()} == pytest.approx(
        {p: t["lora"].scale for p, t in ours.terms().items()}
    )


def test_what_is_no_known_file_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1\nb: 2\n")
    ran = eckart("config", "import", tmp_path / "x.yaml")
    assert ran.code == 3 and ran.err == (
        "this is no configuration that is known here\n"
        f"  {tmp_path / 'x.yaml'}  keys a, b\n"
        "Known: PEFT's adapter_config.json, YAML of LLaMA-Factory and of axolotl.\n"
    )
    (tmp_path / "x.yaml").write_text("model_name_or_path: m\nstage: dpo\n")
    ran = eckart("config", "import", tmp_path / "x.yaml")
    assert ran.code == 2 and "stage = dpo" in ran.err
    assert eckart("config", "import", tmp_path / "none.yaml").code == 3
