"""What is written is read by a process of its own, with eckart and without it."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from eckart.io import dense, factored, native, peft
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import attached, logits, weights_methods
from tests.processes import in_a_fresh_one

# Seconds for each architecture, so the default run has tied embeddings and fused experts alone.
FEW, REST = ("gemma", "mixtral"), ("llama", "qwen", "gpt2", "bert", "t5", "vit")


def write(place: Path, slug: str) -> None:
    """A method's forms, and what a loop that knows nothing of the terms would write."""
    model, handle, batch = attached(slug, place.name)
    randomise(handle)
    place = place / slug
    place.mkdir()
    save_file({"logits": logits(model, batch).contiguous()}, place / "logits.safetensors")
    native.save(handle, place / "native")
    for form in (factored, dense, peft):
        if not form.obstacle(handle):
            form.save(handle, place / form.__name__.rpartition(".")[2])
    if handle.attached:
        model.save_pretrained(place / "foreign")


@pytest.fixture(scope="module", params=[FEW, pytest.param(REST, marks=pytest.mark.slow)])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for architecture in request.param:
        place = folder / architecture
        tiny(architecture).save_pretrained(place / "base")
        save_file(batch_for(architecture), place / "batch.safetensors")
        for slug in weights_methods():
            write(place, slug)
    return folder


def test_without_eckart_ordinary_forms_load_and_all_else_is_refused(written):
    found = in_a_fresh_one("tests.laws.fresh", written, "plain")
    assert len({case.split("/")[1] for case in found}) == len(weights_methods())
    for case, answers in found.items():
        if case.endswith("foreign"):
            model, config = answers
            assert isinstance(model, str) and "import eckart.hf" in model, case
            assert isinstance(config, str) and "`eckart`" in config, case
        else:  # fp32, sums in another order, over two layers
            assert answers[0] < 1e-5, (case, answers)


def test_with_eckart_every_form_is_the_same_function(written):
    found = in_a_fresh_one("tests.laws.fresh", written, "eckart")
    cases = len(list(written.iterdir())) * len(weights_methods())
    assert sum(case.endswith("native") for case in found) == cases
    for case, (answer,) in found.items():
        # fp32; experts are computed by another implementation than in the first process
        assert isinstance(answer, float) and answer < 1e-5, (case, answer)
