"""From words and files to a job: precedence, shorthands, and what is said to mistakes."""

import json
from dataclasses import fields

import pytest
import yaml

from eckart.errors import EckartError, FileError, UsageError
from eckart.jobs.schema import build
from eckart.jobs.settings import words
from eckart.jobs.settings.config import NONE, Choice, Flags, Job, resolve
from eckart.jobs.settings.tree import SECTIONS, Source
from eckart.recipe import registry


def finetune(*settings: str, **kwargs) -> Job:
    return resolve("finetune", "m", "d.jsonl", settings, **kwargs)


def names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a job file into the current folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "job.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write


def complaint(*settings: str, command: str = "finetune", **kwargs) -> str:
    with pytest.raises(UsageError) as e:
        resolve(command, "m", "d.jsonl", settings, **kwargs)
    return str(e.value)


# What holds


def test_model_and_data_stand_before_the_keys():
    job = finetune()
    assert (job.model, job.data.train) == ("m", (Source("d.jsonl"),))
    assert (job.out, job.train.lr, job.eval.every) == ("runs/{name}", "auto", "auto")


def test_precedence_is_defaults_then_files_then_the_command_line(write):
    low = write("train: {lr: 1e-3, steps: 10, batch_size: 2}\n", "low.yaml")
    high = write("train: {lr: 1e-4, steps: 20}\n", "high.yaml")
    train = finetune("train.lr=1e-5", files=[low, high]).train
    assert (train.lr, train.steps, train.batch_size, train.clip) == (1e-5, 20, 2, 1.0)


def test_method_names_the_axis_it_lives_on():
    job = finetune("method=galore", "method.rank=7", "weights=dense")
    assert job.choices["update"].name == "galore" and job.choices["update"].method.rank == 7
    job = finetune("method=lora", "method.rank=3", "method=adamw", "method.weight_decay=0.5")
    assert job.choices["weights"].method.rank == 3
    assert job.choices["update"].method.weight_decay == 0.5


def test_method_may_follow_its_field_and_come_from_a_file(write):
    assert finetune("method.rank=3", "method=lora").choices["weights"].method.rank == 3
    file = write("method: lora\n")
    assert finetune("method.rank=5", files=[file]).choices["weights"].method.rank == 5


def test_hyphens_and_underscores_name_the_same_method():
    for name in registry.methods():
        spelled = registry.find(name.replace("-", "_"))
        assert spelled is registry.find(name)


def test_a_string_stands_for_a_name(write):
    file = write("weights: lora\nobjective: orthogonality\n")
    job = finetune(files=[file])
    assert job.choices["weights"].name == "lora"
    assert [c.name for c in job.objectives] == ["orthogonality"]


def test_automatic_weights_follow_the_command_and_the_update():
    assert finetune().choices["weights"].name == "lora"
    assert resolve("pretrain", "m", "d").choices["weights"].name == "dense"
    job = finetune("method=galore")
    assert job.choices["weights"].name == "dense"
    assert job.settled["weights.name"] == "galore acts on whole matrices"


def test_another_method_starts_its_axis_anew_and_the_same_one_goes_on(write):
    file = write("weights: {name: lora, rank: 8}\n")
    assert finetune("weights=lora", files=[file]).choices["weights"].method.rank == 8
    assert finetune("weights=dora", files=[file]).choices["weights"].method.rank != 8
    assert finetune("weights.rank=5", "weights=dora", files=[file]).given["weights.rank"] == 5


def test_objectives_are_a_list_and_a_later_layer_replaces_it(write):
    file = write("objective: [orthogonality, {name: distill, weight: 0.25}]\n")
    job = finetune(files=[file])
    assert [c.name for c in job.objectives] == ["orthogonality", "distill"]
    assert job.objectives[1].method.weight == 0.25
    assert finetune("objective=none", files=[file]).objectives == ()
    job = finetune("objective=distill", "objective.weight=0.75", files=[file])
    assert [c.method.weight for c in job.objectives] == [0.75]
    job = finetune("objective.distill.weight=0.75", files=[file])
    assert [c.name for c in job.objectives] == ["orthogonality", "distill"]
    assert job.objectives[1].method.weight == 0.75


def test_compress_takes_its_size_without_the_section():
    job = resolve("compress", "m", words=["keep=0.5"])
    assert job.compress.keep == 0.5 and job.choices["compress"].method.keep == 0.5
    job = resolve("compress", "m", words=["rank=4"])
    assert (job.compress.rank, job.compress.keep) == (4, None)
    assert job.choices["compress"].method.rank == 4


def test_a_later_size_replaces_an_earlier_one(write):
    file = write("compress: {keep: 0.5}\n")
    job = resolve("compress", "m", words=["rank=4"], files=[file])
    assert (job.compress.rank, job.compress.keep) == (4, None)


def test_data_may_be_mixed():
    job = resolve("finetune", "m", words=["data=[a.jsonl,{path: b.jsonl, weight: 2}]"])
    assert job.data.train == (Source("a.jsonl"), Source("b.jsonl", 2))
    assert finetune("data.eval=[e.jsonl]").data.eval == ("e.jsonl",)
    assert finetune("data.eval=e.jsonl").data.eval == ("e.jsonl",)
    assert finetune("data.eval=0").data.eval == 0


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("out=0001", "0001"),  # YAML: octal 1
        ("out=1e3", "1e3"),
        ("out=on", "on"),  # YAML 1.1: true
        ("model=123", "123"),
        ("train.clip=none", None),
        ("train.clip=null", None),
        ("train.lr=1e-4", 1e-4),  # YAML 1.1: text
        ("train.lr=1", 1.0),
        ("train.checkpointing=off", False),
        ("weights.targets=*.q_proj", ["*.q_proj"]),  # YAML: an alias
        ("weights.targets=[*.q_proj,mlp]", ["*.q_proj", "mlp"]),
        ("weights.targets=mlp", ["mlp"]),
    ],
)
def test_values_are_read_as_their_key_asks(word, value):
    given = finetune(word).given[word.partition("=")[0]]
    assert given == value and type(given) is type(value)


def test_overrides_have_the_fields_types():
    job = finetune("weights.overrides=[{match: layers.0, rank: 3}]")
    assert job.choices["weights"].method.overrides == ({"match": "layers.0", "rank": 3},)


def test_flags_stand_for_keys():
    job = finetune(flags=Flags(out="here", seed=0))
    assert (job.out, job.train.seed) == ("here", 0)
    assert (job.given["out"], job.given["train.seed"]) == ("here", 0)


def test_healing_trains_like_the_job_where_it_says_nothing_else():
    job = resolve(
        "compress", "m", "d", ["train.lr=1e-3", "heal.steps=5", "heal.train.batch_size=2"]
    )
    assert (job.heal.steps, job.heal.train.lr, job.heal.train.batch_size) == (5, 1e-3, 2)
    assert job.train.batch_size == "auto" and job.heal.weights == Choice("auto")


def test_resume_reads_what_the_run_was_given(tmp_path):
    (tmp_path / "config.yaml").write_text(finetune("train.lr=1e-3", "train.steps=4").dump())
    (tmp_path / "run.json").write_text("{}")
    job = resolve("finetune", words=["train.lr=1e-4"], flags=Flags(resume=str(tmp_path)))
    assert (job.model, job.train.lr, job.train.steps) == ("m", 1e-4, 4)


ROUND = {
    "plain": [],
    "lora": ["method=lora", "method.rank=3", "weights.overrides=[{match: layers.0, rank: 1}]"],
    "galore": ["method=galore", "method.betas=[0.5,0.75]", "train.lr=1e-3"],
    "objectives": ["objective=[orthogonality,{name: distill, weight: 0.25}]"],
    "words": ["out=0001", "train.clip=none", "track=[a,b]", "data.eval=[x,y]"],
    "epochs": ["train.epochs=2.5", "precision=fp32", "attention=none"],
    "mixture": ["data=[a,{path: b, weight: 0.5},{path: c, encoding: latin-1}]"],
    "heal": ["heal.steps=5", "heal.weights=lora", "heal.weights.rank=2", "heal.train.lr=0.1"],
}


@pytest.mark.parametrize("name", ["none", "null"])
def test_a_model_may_have_the_name_of_nothing(name, write):
    job = resolve("finetune", name, name)
    assert (job.model, job.data.train) == (name, (Source(name),))
    assert resolve("finetune", files=[write(job.dump())]) == job


@pytest.mark.parametrize("command", ["finetune", "compress"])
@pytest.mark.parametrize("name", ROUND)
def test_a_written_job_is_read_back_equal(name, command, write):
    job = resolve(command, "m", "d.jsonl", ROUND[name])
    assert resolve(command, files=[write(job.dump())]) == job
    assert resolve(command, files=[write(job.dump_resolved())]) == job


def test_a_settled_job_is_written_with_its_reasons(write):
    job = finetune("train.epochs=2")
    job = job.settle("train.steps", 40, "2 epochs of 20 steps").settle("data.seq_len", 128, "most")
    job = job.settle("heal.train.lr", 0.5, "tried")
    assert "  steps: 40  # 2 epochs of 20 steps\n" in job.dump_resolved()
    again = resolve("finetune", files=[write(job.dump_resolved())])
    assert (again.train.steps, again.data.seq_len, again.heal.train.lr) == (40, 128, 0.5)
    assert job.dump() == finetune("train.epochs=2").dump()


def test_a_choice_can_be_settled():
    chosen = Choice("fp32", registry.load("fp32")())
    job = finetune().choose("precision", chosen, "no bf16 here")
    assert job.recipe().precision is chosen.method
    assert "precision:\n  name: fp32  # no bf16 here\n" in job.dump_resolved()


def test_commands_without_a_recipe_load_none():
    job = resolve("generate", "m")
    assert set(job.choices.values()) <= {NONE, Choice("auto")}


# What is said to mistakes: word for word


def test_unknown_key_on_the_command_line():
    assert complaint("weights.rnak=8") == (
        "unknown key weights.rnak     command line\n"
        "Did you mean weights.rank? All keys: eckart methods lora"
    )


def test_unknown_key_in_a_file_names_the_line(write):
    file = write("model: ./m\n\nweights: {name: lora,\n  rnak: 8}\n", "finetune.yaml")
    assert complaint(files=[file]) == (
        "unknown key weights.rnak     finetune.yaml, line 4\n"
        "Did you mean weights.rank? All keys: eckart methods lora"
    )


def test_unknown_key_behind_a_shorthand_is_named_as_typed():
    assert complaint("method=lora", "method.rnak=8").startswith("unknown key method.rnak     comm")


def test_out_of_range(write):
    file = write("weights:\n  name: lora\n  rank: 0\n", "finetune.yaml")
    assert complaint(files=[file]) == (
        "weights.rank is out of range\n"
        "  weights.rank = 0  finetune.yaml, line 3\n"
        "  allowed           a whole number >= 1\n"
        "Leave it out for 16. All keys: eckart methods lora"
    )


@pytest.mark.parametrize("text", ["true", "8.0", "abc", "[8]", ""])
def test_wrong_type(text):
    assert complaint(f"weights.rank={text}") == (
        "weights.rank is of the wrong type\n"
        f"  weights.rank = {text}  command line\n"
        f"  allowed {' ' * (len(text) + 7)}  a whole number >= 1\n"
        "Leave it out for 16. All keys: eckart methods lora"
    )


def test_no_such_choice_of_a_field():
    assert complaint("weights.scaling=rslor") == (
        "no such weights.scaling\n"
        "  weights.scaling = rslor  command line\n"
        "  allowed                  lora, rslora\n"
        "Did you mean rslora? All keys: eckart methods lora"
    )


@pytest.mark.parametrize("word", ["train.lr=.nan", "train.lr=.inf", "train.lr=0", "train.lr=-1"])
def test_rates_are_positive_and_finite(word):
    assert complaint(word).startswith("train.lr is out of range\n")


def test_unknown_method():
    assert complaint("method=galor") == (
        "unknown method galor     command line\nDid you mean galore? All methods: eckart methods"
    )
    assert complaint("weights=none").startswith("unknown method none     command line")


def test_method_on_the_wrong_axis():
    assert complaint("weights=galore") == (
        "galore is not a choice for weights     command line\n"
        "It is one for update: type update=galore"
    )


def test_combinations_are_refused_before_anything_is_loaded():
    assert complaint("update=galore", "weights=lora").startswith("these two do not combine\n")


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("r=8", "Here it is weights.rank: type weights.rank=8."),
        ("weights.r=8", "Here it is weights.rank: type weights.rank=8."),
        ("lora_alpha=16", "Here it is weights.alpha: type weights.alpha=16."),
        ("learning_rate=1e-4", "Here it is train.lr: type train.lr=1e-4."),
        ("train.learning_rate=1e-4", "Here it is train.lr: type train.lr=1e-4."),
        (
            "per_device_train_batch_size=4",
            "Here it is train.batch_size: type train.batch_size=4.",
        ),
        ("num_train_epochs=3", "Here it is train.epochs: type train.epochs=3."),
        ("use_dora=true", "A method is named: type weights=dora."),
        ("bf16=true", "A method is named: type precision=bf16."),
        ("lr=1e-4", "Did you mean train.lr?"),
        ("rank=8", "Did you mean weights.rank?"),
        ("seed=8", "Did you mean train.seed?"),
        ("trian.lr=8", "Did you mean train.lr?"),
        ("train.checkpoint_every=5", "Here it is train.save_every: type train.save_every=5."),
        ("checkpoint.interval=5", "Here it is train.save_every: type train.save_every=5."),
        ("optim=adamw_torch", "Here it is update=adamw."),
        ("logging_steps=5", "Leave it out: there is nothing to set here."),
        ("deepspeed=a.json", "All keys: eckart config schema"),
        ("eval.steps=8", "Here it is eval.every: type eval.every=8."),
        ("train.banana=8", "Keys of train: steps, epochs, batch_size,"),  # nothing is near
        ("ranking=8", "Did you mean weights.rank?"),
        ("banana=8", "All keys: eckart config schema"),
    ],
)
def test_habits_are_answered_with_the_key_here(word, answer):
    first, second = complaint(word).split("\n")
    assert first == f"unknown key {word.partition('=')[0]}     command line"
    assert second.startswith(answer)


def test_a_habit_of_another_method_names_the_methods():
    answer = complaint("galore_update_interval=9").splitlines()[1]
    assert answer.startswith("Here it is update.every, with update=") and "galore" in answer


def test_every_habit_leads_to_a_key_that_exists():
    sections = {f"{s}.{n}" for s, cls in SECTIONS.items() for n in names(cls)}
    fields = {f"{e.axis}.{n}" for e in registry.methods().values() for n in e.fields}
    keys = sections | fields | {"model", "out", "track", "weights", "update", "precision"}
    assert set(words.HABITS.values()) <= keys


def test_overrides_are_checked_like_fields():
    assert complaint("weights.overrides=[{match: layers.0, rnak: 3}]") == (
        "unknown key weights.overrides.rnak     command line\n"
        "Did you mean weights.overrides.rank? All keys: eckart methods lora"
    )
    assert complaint("weights.overrides=[{match: layers.0, rank: 0}]").startswith(
        "weights.overrides.rank is out of range\n"
    )
    assert complaint("weights.overrides=[{rank: 3}]").startswith("an override without match")


def test_two_sizes_exclude_each_other():
    assert complaint("keep=0.5", "rank=4", command="compress") == (
        "keep and rank exclude each other\n"
        "  keep = 0.5  command line\n"
        "  rank = 4    command line\n"
        "Leave one of them."
    )


def test_a_field_of_a_method_that_is_not_named():
    assert complaint("method.rank=8") == (
        "method.rank without a method     command line\nType method=NAME method.rank=8"
    )


def test_what_a_command_cannot_do_without():
    with pytest.raises(UsageError) as e:
        resolve("finetune", "m")
    assert str(e.value) == (
        "eckart finetune needs data\n"
        "Type eckart finetune MODEL DATA, or set data.train in a file: -c FILE"
    )
    assert resolve("finetune", partial=True).model is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML     job.yaml, line 2\n"),
        ("- a\n", "a job file is a tree of keys     job.yaml, line 1\n"),
        ("train: 3\n", "unknown key train     job.yaml, line 1\n"),
        ("train:\n  lr: ${nowhere}\n", "not valid YAML     job.yaml\n"),
    ],
)
def test_files_that_are_no_jobs(write, text, message):
    assert complaint(files=[write(text)]).startswith(message)


def test_files_that_are_not_there(write):
    write("")
    with pytest.raises(FileError, match="cannot read nowhere"):
        resolve("finetune", "m", "d", files=["nowhere.yaml"])


def test_an_empty_file_says_nothing(write):
    assert finetune(files=[write("# nothing\n")]) == finetune()


@pytest.mark.parametrize("word", ["a", "=1", "train.lr=[1", "train.lr=${x}", "train.lr={a: 1"])
def test_words_that_are_no_settings_are_said_to_be_so(word):
    with pytest.raises(EckartError) as e:
        finetune(word)
    assert e.value.exit_code == 2


# The schema


def test_the_schema_has_every_key_and_method():
    schema = build()
    json.dumps(schema)
    assert {"model", "out", "track", "method", *SECTIONS} <= set(schema["properties"])
    for entry in registry.methods().values():
        options = schema["properties"][entry.axis]["anyOf"]
        objects = [o for o in options if "properties" in o]
        here = [o for o in objects if o["properties"]["name"] == {"const": entry.name}]
        assert entry.axis == "objective" or set(entry.fields) < set(here[0]["properties"])


def test_the_schema_has_no_references_and_every_key_a_description():
    text = json.dumps(build())
    assert "$ref" not in text
    for section, cls in SECTIONS.items():
        body = build()["properties"][section]
        options = [body, *body.get("anyOf", [])]
        properties = next(o["properties"] for o in options if "properties" in o)
        for name in names(cls) - {"train"}:
            assert properties[name]["description"], f"{section}.{name}"


def test_resolved_files_are_yaml():
    text = finetune("method=lora", "weights.targets=[*.q_proj]").dump_resolved()
    assert yaml.safe_load(text)["weights"]["targets"] == ["*.q_proj"]
