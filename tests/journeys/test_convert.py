"""`eckart convert` as a person uses it: exact where it can be, else as near as was asked."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eckart.io.models import load_model
from eckart.io.opening import open_model
from tests.journeys.adapters import adapter, handle_on
from tests.journeys.runs import eckart, model_folder, workplace
from tests.tiny import ids, logits

FORMS = ("peft", "lora", "dense", "factored", "native")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("convert"))
    adapter(folder / "lora", folder / "m", "lora", rank=4)
    adapter(folder / "dora", folder / "m", "dora", rank=4)
    adapter(folder / "full", folder / "m", "dense", form="dense")
    return folder


def convert(place, source, *words):
    return eckart("convert", place / source, f"data={place / 'd.jsonl'}", *words)


def plain(folder, base):
    """What someone without eckart's own loader gets."""
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(base), folder)
    return open_model(folder).model


@pytest.mark.parametrize("to", FORMS)
def test_every_exact_form_is_the_same_function(place, tmp_path, to):
    ran = convert(place, "lora", "--to", to, "-o", tmp_path / "out", "--json")
    assert ran.code == 0 and ran.err == "", ran.err
    assert ran.document["exact"] is True and ran.document["drift"]["kl"] < 1e-6
    theirs, ours = plain(tmp_path / "out", place / "m"), open_model(place / "lora").model
    # fp32; merged matrices are rounded once
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-4)


def test_a_round_through_every_form_ends_where_it_began(place, tmp_path):
    ways = ("native", "factored", "lora")
    source = place / "lora"
    for to in ways:
        words = (f"data={place / 'd.jsonl'}", f"base={place / 'm'}", "-o", tmp_path / to)
        ran = eckart("convert", source, "--to", to, *words)
        assert ran.code == 0, ran.err
        source = tmp_path / to
    ours = open_model(place / "lora").model
    torch.testing.assert_close(logits(open_model(source).model), logits(ours), rtol=0, atol=1e-4)


def test_a_factored_model_is_an_adapter_only_on_its_own_base(place, tmp_path):
    assert convert(place, "lora", "--to", "factored", "-o", tmp_path / "f").code == 0
    words = ("convert", tmp_path / "f", "--to", "lora", "-o", tmp_path / "no")
    ran = eckart(*words)
    assert ran.code == 2 and ran.err == (
        "a factored model does not name its base\n"
        f"  {tmp_path / 'f'}  lora on a base\n"
        "Type base=BASE with the model that it was made from.\n"
    )
    other = model_folder(tmp_path / "other", seed=3)
    ran = eckart(*words, f"base={other}")
    assert ran.code == 3 and ran.err.startswith(f"this is another base\n  {other}")


def test_what_is_written_is_said_with_its_drift(place, tmp_path):
    ran = convert(place, "lora", "--to", "dense", "-o", tmp_path / "out")
    drift, done, following = ran.out.splitlines()
    assert drift.startswith("drift    KL ") and "first choice at 100.0 % of" in drift
    assert done.endswith("exact; dense: plain transformers loads it")
    assert following.startswith("next     eckart generate ")
    assert ran.err.splitlines()[0].endswith("14 matrices")


def test_without_a_size_an_inexact_form_is_refused_with_both_ways(place, tmp_path):
    ran = convert(place, "dora", "--to", "lora", "-o", tmp_path / "out")
    assert ran.code == 2 and not (tmp_path / "out").exists()
    assert ran.err.endswith(
        "--to lora has no exact form here\n"
        f"  {place / 'dora'}  dora is no product of two thin matrices\n"
        "Type rank=16 for an approximation of that rank, or max_drift=0.01 for the smallest\n"
        "rank whose words are within 0.01 nats a token.\n"
    )


def test_the_error_said_is_that_of_the_matrices_written(place, tmp_path):
    out = tmp_path / "out"
    ran = convert(place, "dora", "--to", "lora", "rank=3", "-o", out, "--json")
    assert ran.code == 0 and ran.document["exact"] is False and ran.document["rank"] == 3
    handle = handle_on(place / "m", "dora", rank=4)
    tensors = load_file(out / "adapter_model.safetensors")
    for path, error in ran.document["weight_error"].items():
        site = handle.sites[path]
        change = site.module.merged() - site.weight(torch.float64)
        stem = f"base_model.model.{path}.lora"
        product = tensors[f"{stem}_B.weight"].double() @ tensors[f"{stem}_A.weight"].double()
        measured = float((change - product).norm() / change.norm())
        assert measured == pytest.approx(error, abs=1e-5)  # fp32 factors
    assert len(ran.document["weight_error"]) == 14


def test_a_smaller_rank_can_be_asked_for_where_the_form_is_exact(place, tmp_path):
    ran = convert(place, "lora", "--to", "lora", "rank=2", "-o", tmp_path / "two", "--json")
    assert ran.document["exact"] is False and 0 < max(ran.document["weight_error"].values()) < 1
    ran = convert(place, "lora", "--to", "lora", "rank=8", "-o", tmp_path / "eight", "--json")
    assert ran.document["exact"] is True


def test_max_drift_gives_the_smallest_rank_that_holds_it(place, tmp_path):
    ranks = {}
    for rank in (1, 2, 4, 8):
        ran = convert(
            place, "dora", "--to", "lora", f"rank={rank}", "-o", tmp_path / str(rank), "--json"
        )
        ranks[rank] = ran.document["drift"]["kl"]
    assert ranks[1] > ranks[4] > ranks[8]
    allowed = f"max_drift={ranks[4] * 1.01}"
    ran = convert(place, "dora", "--to", "lora", allowed, "-o", tmp_path / "found", "--json")
    assert ran.document["rank"] in (3, 4) and ran.document["drift"]["kl"] <= ranks[4] * 1.01
    below = f"rank={ran.document['rank'] - 1}"
    ran = convert(place, "dora", "--to", "lora", allowed, below, "-o", tmp_path / "no")
    assert ran.code == 2 and "the drift is larger than allowed" in ran.err
    assert not (tmp_path / "no").exists()


def test_a_trained_model_becomes_an_adapter_on_its_base(place, tmp_path):
    out = tmp_path / "out"
    words = ("--to", "lora", f"base={place / 'm'}", "rank=32", "-o", out)
    ran = convert(place, "full", *words)
    assert ran.code == 0, ran.err
    assert "warning  5 more tensors have changed and stay as in the base:" in ran.err
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 32
    ran = convert(place, "full", "--to", "lora", "rank=4", "-o", tmp_path / "no")
    assert ran.code == 2 and "Type base=BASE with the model that it was made from." in ran.err


def test_an_ordinary_model_is_factored_by_truncation(place, tmp_path):
    ran = convert(place, "m", "--to", "factored", "rank=3", "-o", tmp_path / "out", "--json")
    assert ran.code == 0 and ran.document["exact"] is False
    model = open_model(tmp_path / "out").model
    whole = load_model(place / "m").state_dict()
    for path, error in ran.document["weight_error"].items():
        W, S = whole[f"{path}.weight"], model.get_submodule(path).weight
        assert float((W - S).norm() / W.norm()) == pytest.approx(error, abs=1e-5)
    # from this rank on, factors are larger than these matrices, which stay whole
    ran = convert(place, "m", "--to", "factored", "rank=16", "-o", tmp_path / "more", "--json")
    assert ran.document["weight_error"]["model.layers.0.self_attn.q_proj"] == 0.0


def test_a_dense_result_may_have_another_number_format(place, tmp_path):
    ran = convert(place, "lora", "--to", "dense", "dtype=bfloat16", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert open_model(tmp_path / "out").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "eckart convert needs --to\nChoices:\n  --to peft "),
        (("--to", "pefft"), "no such form pefft     --to\nDid you mean peft?\n"),
        (("--to", "native", "rank=4"), "rank means nothing for --to native\n"),
        (("--to", "peft", "dtype=float16"), "dtype is for --to dense\n"),
        (("--to", "lora", "max_drif=1"), "unknown key max_drif     command line\nDid you mean"),
        (("--to", "kohya", "-o", "x.safetensors"), "a folder is written, not one file\n"),
        (("--to", "lora", "rank=0"), "rank is out of range\n  rank = 0  command line\n"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_loaded(place, words, said):
    ran = convert(place, "lora", *words)
    assert (ran.code, ran.out) == (2, "") and ran.err.startswith(said)


def test_an_adapter_finds_its_base_where_base_says(place, tmp_path):
    moved = tmp_path / "moved"
    (place / "m").rename(moved)
    try:
        ran = convert(place, "lora", "--to", "dense", "-o", tmp_path / "no")
        assert ran.code == 3 and "no such file or folder" in ran.err
        ran = convert(place, "lora", "--to", "dense", f"base={moved}", "-o", tmp_path / "yes")
        assert ran.code == 0, ran.err
    finally:
        moved.rename(place / "m")
    assert not torch.equal(
        logits(open_model(tmp_path / "yes").model, ids()), logits(load_model(place / "m"), ids())
    )
