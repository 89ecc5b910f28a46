"""`eckart inspect` as a person uses it: which layers are low-rank, and what an adapter adds."""

import math
import re
from xml.etree import ElementTree

import pytest
import torch

from eckart.decompose.spectra import effective_rank
from eckart.io.corpora import bytes_tokenizer
from eckart.io.models import load_model, load_tokenizer
from eckart.io.opening import open_model
from eckart.jobs.measuring.drift import of_text
from eckart.jobs.measuring.heads import reaches
from tests import tiny
from tests.journeys.adapters import adapter
from tests.journeys.runs import eckart, labels, model_folder, texts, workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("inspect"))
    adapter(folder / "lora", folder / "m", "lora", rank=3)
    adapter(folder / "dora", folder / "m", "dora", rank=3)
    adapter(folder / "wide", folder / "m", "lora", rank=5)
    model = load_model(folder / "m")
    with torch.no_grad():  # one layer's gate of rank 2
        W = model.model.layers[1].mlp.gate_proj.weight
        W.copy_(W[:, :2] @ W[:2, :])
    model.save_pretrained(folder / "low")
    return folder


def test_a_random_model_looks_random(place):
    ran = eckart("inspect", place / "m", "--json")
    assert ran.code == 0 and ran.err == "" and ran.document["kind"] == "model"
    assert len(ran.document["matrices"]) == 14
    for numbers in ran.document["matrices"].values():
        assert numbers["share_of_random"] == pytest.approx(1, abs=0.1)
        assert abs(numbers["rank_90"] - numbers["rank_90_random"]) <= 2


def test_the_low_rank_layer_is_named_and_drawn(place):
    ran = eckart("inspect", place / "low")
    assert ran.code == 0, ran.err
    gates = next(line for line in ran.out.splitlines() if "mlp.gate" in line and "|" in line)
    first, second = gates[gates.index("|") + 1 : -1]
    assert first in "%@" and second in " .:"
    assert "1 below 50% of random; lowest: model.layers.1.mlp.gate_proj" in ran.out
    head = ran.out.splitlines()[0].split()
    assert head[:7] == ["ranks", "role", "maps", "shape", "stable", "effective", "90%"]


def test_of_an_adapter_the_update_is_judged(place):
    found, base = (eckart("inspect", place / n, "--json").document for n in ("lora", "m"))
    assert (found["kind"], found["method"]) == ("adapter", "lora")
    assert found["parameters"] == base["parameters"], "the model's, without the adapter's own"
    handle = open_model(place / "lora").handle
    for path, numbers in found["matrices"].items():
        update = handle.terms()[path]["lora"].dense().detach()
        s = torch.linalg.svdvals(update)
        assert numbers["effective_rank"] == pytest.approx(float(effective_rank(s)), rel=1e-3)
        assert numbers["energy"]["4"] == pytest.approx(1), "its rank is 3"
        size = float(update.norm() / handle.sites[path].weight().norm())
        assert numbers["relative_norm"] == pytest.approx(size, rel=1e-4)


def test_an_update_without_factors_is_taken_from_the_merged_matrix(place):
    found = eckart("inspect", place / "dora", "--json").document["matrices"]
    assert all(numbers["effective_rank"] > 3 for numbers in found.values()), "rows are rescaled"


def test_a_factored_model_is_judged_by_what_its_factors_stand_for(place, tmp_path):
    assert eckart("compress", place / "m", "rank=2", "-o", tmp_path / "c").code == 0
    found = eckart("inspect", tmp_path / "c", "--json").document
    assert found["method"] == "svd"
    assert all(numbers["rank_90"] <= 2 for numbers in found["matrices"].values())


def test_heads_reach_as_far_as_the_logits_of_eager_attention(place):
    """Scores from the attention weights: log softmax differs from S by a row constant."""
    model = load_model(place / "m")
    text = of_text(load_tokenizer(place / "m"), 48, [str(place / "d.jsonl")])
    found = {(h.layer, h.head): h for h in reaches(model, text)}
    assert len(found) == 8 and model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    spread = torch.zeros(2, 4)
    for row in text.rows:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row["input_ids"]]), output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            seen = weights[0].clamp_min(1e-30).log().masked_fill(weights[0] == 0, math.nan)
            width = seen.nan_to_num(-1e9).amax(-1) - seen.nan_to_num(1e9).amin(-1)  # [heads, t]
            spread[layer] = torch.maximum(spread[layer], width.amax(-1))
    for (layer, head), reach in found.items():
        assert 0 < float(spread[layer, head]) <= 2 * reach.reach + 1e-5
        assert reach.reach < 30 * float(spread[layer, head]), "the same order of size"


def test_an_adapter_is_compared_with_itself_switched_off(place):
    ran = eckart("inspect", place / "lora", place / "d.jsonl", "--json")
    assert ran.code == 0, ran.err
    heads = ran.document["heads"]
    base = eckart("inspect", place / "m", place / "d.jsonl", "--json").document["heads"]
    assert len(heads) == 8
    for with_adapter, alone in zip(heads, base, strict=True):
        assert with_adapter["without"] == pytest.approx(alone["centred"], rel=1e-5)
        assert with_adapter["centred"] != pytest.approx(alone["centred"], rel=1e-3)
        assert alone["without"] == alone["centred"]
        assert alone["regime"] in ("easy", "measured", "hard") and alone["width"] == 8


def test_heads_are_looked_at_on_rows_as_long_as_the_model_reads(place, tmp_path):
    """Few features pay on long rows alone: cut at 128 tokens, heads of a new model were hard."""
    (tmp_path / "long.txt").write_text("one two three four " * 400)
    sources, tokenizer = [str(tmp_path / "long.txt")], load_tokenizer(place / "m")
    long, short = (of_text(tokenizer, None, sources, length=n) for n in (512, 128))
    assert max(long.lengths) == 512 and max(short.lengths) == 128
    assert sum(long.lengths) <= 4096 and len(long.rows) <= 8


def test_the_line_says_how_many_heads_are_easy(place):
    ran = eckart("inspect", place / "lora", place / "d.jsonl")
    assert "of 8 easy at" in ran.out and "of them across the line" in ran.out
    assert "its scale" in ran.out or "0 of 8 easy" in ran.out


def test_what_has_no_weights_is_not_inspected(place):
    ran = eckart("inspect", "llama-tiny")
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith("this is a shape without weights")
    ran = eckart("inspect")
    needed = "eckart inspect needs a source\nType eckart inspect SOURCE\n"
    assert (ran.code, ran.err) == (2, needed)


def test_errors_are_measured_where_few_features_would_do(place):
    """42 tokens and heads of 8 numbers: degree 1 has 9 features, degree 2 has 45."""
    heads = eckart("inspect", place / "m", place / "d.jsonl", "--json").document["heads"]
    length = heads[0]["length"]
    assert length == 42 and all(set(head["errors"]) == {"1"} for head in heads)
    for head in heads:
        assert 0 < head["errors"]["1"] < 1
        assert head["threshold"] == pytest.approx(math.sqrt(math.log(42)))
        assert head["norms"]["q"] * head["norms"]["k"] * 8**0.5 >= head["reach"]
        within = [g for g, error in head["errors"].items() if error <= 1e-2]
        assert head["measured_degree"] == (int(min(within)) if within else None)
        assert (head["regime"] == "hard") == (not within and head["features"] >= length)
    out = eckart("inspect", place / "m", place / "d.jsonl").out
    rows = [line.split() for line in out[out.index("norms") :].splitlines()]
    assert rows[0][:5] == ["norms", "layer", "|q|", "(1.9)", "|k|"] and len(rows) == 3


# --- two of them ---------------------------------------------------------------------------


def test_two_models_differ_where_one_was_changed(place):
    ran = eckart("inspect", place / "m", "--against", place / "low", "--json")
    assert ran.code == 0, ran.err
    found = ran.document
    assert (found["kind"], found["changed"], found["overlaps"]) == ("pair", 1, {})
    (path,) = found["matrices"]
    assert path == "model.layers.1.mlp.gate_proj" and not found["one_base"]
    one, other = (load_model(place / name).model.layers[1].mlp.gate_proj for name in ("m", "low"))
    change = (other.weight - one.weight).detach()
    numbers = found["matrices"][path]
    assert numbers["relative_norm"] == pytest.approx(float(change.norm() / one.weight.norm()))
    s = torch.linalg.svdvals(change)
    assert numbers["effective_rank"] == pytest.approx(float(effective_rank(s)), rel=1e-5)
    same = eckart("inspect", place / "m", "--against", place / "m")
    assert same.code == 0 and "0 of 16 matrices differ" in same.err + same.out


def test_two_adapters_of_one_base_share_what_they_share(place):
    found = eckart("inspect", place / "lora", "--against", place / "wide", "--json").document
    assert found["one_base"] and found["changed"] == 14
    shared = found["matrices"]["model.layers.0.self_attn.q_proj"]["shared"]
    one, other = (
        update(place / name, "model.layers.0.self_attn.q_proj") for name in ("lora", "wide")
    )
    assert shared["cosine"] == pytest.approx(
        float((one * other).sum() / (one.norm() * other.norm())), abs=1e-5
    )
    r = shared["rank"]
    U, V = (torch.linalg.svd(D)[0][:, :r] for D in (one, other))
    assert shared["left"] == pytest.approx(float((U.mT @ V).square().sum() / r), abs=1e-4)
    assert shared["left_by_chance"] == r / one.shape[0]
    out = eckart("inspect", place / "lora", "--against", place / "wide").out
    assert "effective, one" in out and "by chance" not in out  # the note goes to stderr
    itself = eckart("inspect", place / "dora", "--against", place / "m", "--json").document
    assert itself["changed"] == 14 and itself["overlaps"] == {}


def test_classifiers_are_compared_with_the_encoder_that_they_began_as(tmp_path):
    model = tiny.bert(vocab_size=257)
    model.save_pretrained(tmp_path / "classifier")
    model.bert.save_pretrained(tmp_path)
    bytes_tokenizer().save_pretrained(tmp_path)
    data = labels(tmp_path / "d.jsonl")
    for seed in (1, 2):
        words = ("train.steps=2", f"train.seed={seed}", "-o", tmp_path / str(seed))
        assert eckart("finetune", tmp_path, data, *words).code == 0
    found = eckart("inspect", tmp_path, "--against", tmp_path / "classifier", "--json").document
    assert found["changed"] == 0 and found["unchanged"] > 14  # the heads are in one alone
    found = eckart("inspect", tmp_path / "1", "--against", tmp_path / "2", "--json").document
    assert found["one_base"] and "attn.q" in found["overlaps"]


def test_a_run_from_random_numbers_has_no_base_to_open(tmp_path):
    run, data = tmp_path / "run", texts(tmp_path / "d.jsonl")
    words = ("data.seq_len=16", "train.steps=1", "-o", run)
    assert eckart("pretrain", "llama-tiny", data, *words).code == 0
    adapter(tmp_path / "lora", run / "final", "lora", rank=3)
    found = eckart("inspect", run, "--against", tmp_path / "lora", "--json").document
    assert found["changed"] and not found["one_base"] and found["warnings"] == []


def update(folder, path):
    opened = open_model(folder)
    module = opened.model.get_submodule(path)
    return (module.merged() - module.weight.double()).detach()


def test_models_of_two_shapes_are_refused(place, tmp_path):
    model_folder(tmp_path / "other", hidden_size=16)
    ran = eckart("inspect", place / "m", "--against", tmp_path / "other")
    assert ran.code == 2 and ran.err.startswith("these two are not of one shape\n")


def test_layers_are_drawn_as_a_page_or_an_image(place, tmp_path):
    ran = eckart("inspect", place / "low", "-o", tmp_path / "layers.svg")
    assert ran.code == 0, ran.err
    root = ElementTree.parse(tmp_path / "layers.svg").getroot()
    text = (tmp_path / "layers.svg").read_text()
    assert root.tag.endswith("svg") and "mlp.gate" in text and "<desc>" in text
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):#", text))
    eckart("inspect", place / "lora", place / "d.jsonl", "-o", tmp_path / "layers.html")
    page = (tmp_path / "layers.html").read_text()
    assert page.count("<svg") == 4 and "Reach of the logits" in page
    wrong = eckart("inspect", place / "low", "-o", tmp_path / "layers.png")
    assert wrong.code == 2 and wrong.err.splitlines()[-1] == "Type -o layers.html"
