"""Several adapters of one base on the command line: each writes in turn, in the order asked."""

import pytest

from tests.journeys.adapters import adapter
from tests.journeys.runs import eckart, model_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model_folder(folder / "m")
    adapter(folder / "a", folder / "m", "lora", rank=4)
    adapter(folder / "b", folder / "m", "dora", form="peft", rank=4)
    return folder


def test_each_adapter_writes_what_it_writes_alone(place):
    words = ("-p", "low", "-p", "rank", "-n", 8, "--json")
    both = ("--adapter", f"french={place / 'a'}", "--adapter", f"legal={place / 'b'}")
    ran = eckart("generate", place / "m", *both, *words)
    assert ran.code == 0, ran.err
    found = [(one["adapter"], one["prompt"], one["text"]) for one in ran.document["texts"]]
    assert [one[:2] for one in found] == [
        (name, prompt) for name in ("french", "legal") for prompt in ("low", "rank")
    ]
    for name, folder in (("french", "a"), ("legal", "b")):
        alone = eckart("generate", place / folder, *words).document["texts"]
        assert [one["text"] for one in alone] == [text for who, _, text in found if who == name]
    ran = eckart("generate", place / "m", *both, "-p", "low", "-n", 2)
    assert [line.split(":")[0] for line in ran.out.splitlines()] == ["french", "legal"]


def test_what_is_wrong_with_an_adapter_is_said(place, tmp_path):
    ran = eckart("generate", place / "m", "--adapter", place / "a", "-p", "low")
    assert ran.code == 2 and ran.err == (
        "--adapter needs a name and a path\n"
        f"  --adapter {place / 'a'}  command line\n"
        f"Type --adapter NAME={place / 'a'}\n"
    )
    other = model_folder(tmp_path / "other", seed=3)
    ran = eckart("generate", other, "--adapter", f"x={place / 'a'}", "-p", "low")
    assert ran.code == 3 and ran.err.startswith("this adapter was made for another base\n")
    twice = ("--adapter", f"x={place / 'a'}", "--adapter", f"x={place / 'b'}")
    ran = eckart("generate", place / "m", *twice, "-p", "low")
    assert ran.code == 2 and ran.err.startswith("two adapters have one name\n")
