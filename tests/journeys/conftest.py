"""The folder that most journeys begin in."""

import pytest

from tests.journeys.runs import workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("journey"))
