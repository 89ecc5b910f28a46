"""Thirty steps lower the loss on data that was not trained on, for every adapter."""

import pytest
import torch

from tests.conftest import ARCHITECTURES, VOCAB
from tests.laws.matrix import attached, small, steps, weights_methods

ADAPTERS = [slug for slug in weights_methods() if small(slug).base == "frozen"]
# Seconds for each architecture: plain maps by default, the others with the slow tests.
CASES = [
    pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in ARCHITECTURES
]


def regular(name, seed):
    """A batch whose labels can be learnt: few of all tokens, in turn; bright images or dark."""
    g = torch.Generator().manual_seed(seed)
    if name == "vit":
        bright = torch.randint(0, 2, (8,), generator=g)
        noise = torch.randn(8, 1, 8, 8, generator=g)
        return {"pixel_values": noise + bright[:, None, None, None], "labels": bright}
    start = torch.randint(0, 8, (8, 1), generator=g)
    ids = 3 + (VOCAB // 16) * ((start + torch.arange(12)) % 8)
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("architecture", CASES)
@pytest.mark.parametrize("slug", ADAPTERS)
def test_thirty_steps_lower_the_held_out_loss(slug, architecture):
    model, handle, _ = attached(slug, architecture)
    held_out = regular(architecture, 1000)

    def loss():
        with torch.inference_mode():  # what is remembered of it must serve the training after it
            return float(model.eval()(**held_out)["loss"])

    before = loss()
    model.train()
    steps(handle, handle.optimizer(), [regular(architecture, seed) for seed in range(30)])
    assert loss() < before
