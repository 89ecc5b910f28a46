"""Few-shot learning through prompts: the example as it stands, and its two-pass gradient."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_few_shot.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("example_clip_few_shot", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chunks_of_prompts_give_the_gradient_of_all_at_once(example):
    torch.manual_seed(0)
    model = example.tiny_clip().double()
    words = example.prompts(["cat", "a dog", "owl", "very small fish", "hen"], "")
    batch = {
        "pixel_values": torch.randn(6, 3, 16, 16, dtype=torch.float64),
        "labels": torch.tensor([0, 1, 2, 3, 4, 0]),
    }
    heads = example.features(model.get_text_features(**words))
    image = example.features(model.get_image_features(pixel_values=batch["pixel_values"]))
    loss = cross_entropy(model.logit_scale.exp() * image @ heads.mT, batch["labels"])
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = example.few_shot_loss(model, batch, words, chunk=2)
    assert found.item() == pytest.approx(loss.item(), abs=1e-12)
    assert any("text_model" in name for name in expected)
    for name, parameter in model.named_parameters():
        if name in expected:  # fp64, sums over five prompts in another order
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


def test_new_classes_are_learnt_from_few_arrays(example, tmp_path):
    # Bright rows that differ by class, under noise
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 24)
    images = generator.normal(0, 0.3, (len(labels), 16, 16)).clip(-1, 1)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 2 : 2 * label + 5] += 1
    images = ((images + 1) / 3 * 255).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "rows.npz", images=images, labels=labels)
    before, after = example.main(str(tmp_path / "rows.npz"), 8, 25, "", str(tmp_path / "out"))
    assert after > max(before, 0.5) + 0.1  # two new classes: chance is a half
    model = example.tiny_clip()
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    assert any("lora_A" in name for name in loaded.state_dict())
