"""Images from the command line: a folder per class or arrays, to plain reload and back."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eckart.io.images import read_images
from eckart.io.models import load_model
from eckart.io.opening import open_model
from eckart.io.presets import build_model
from eckart.jobs.training import fit
from tests.journeys.runs import eckart, model_folder, texts

VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 8, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
RESNET = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    "num_channels": 1,
}  # fmt: skip
HALVES = ("bottom", "top")  # which half of an image is bright


def pictures(count: int = 32):
    """Grey [n, 8, 8] bytes, one half brighter than the other, and which."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 90, (count, 8, 8), dtype=np.uint8)
    bright = np.arange(count) % 2
    for image, top in zip(pixels, bright, strict=True):
        image[:4] += np.uint8(120 * top)
        image[4:] += np.uint8(120 * (1 - top))
    return pixels, bright


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("images")
    for name, shape in (("vit", VIT), ("resnet", RESNET)):
        config = AutoConfig.for_model(name, **shape)
        build_model(config, task="image").save_pretrained(folder / name)
    pixels, bright = pictures()
    for i, (image, top) in enumerate(zip(pixels, bright, strict=True)):
        file = folder / "photos" / HALVES[top] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    np.savez(folder / "a.npz", images=pixels, labels=np.array(HALVES)[bright])
    np.savez(folder / "floats.npz", images=pixels / 16.0, labels=bright)
    return folder


@pytest.fixture(scope="module")
def learnt(place):
    ran = eckart(
        "finetune", place / "vit", place / "photos", "train.steps=30", "train.lr=1e-2",
        "data.eval=0.25", "-o", place / "learnt",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture(scope="module")
def dense(place):
    """A convolutional net, trained whole on arrays that are no bytes."""
    ran = eckart(
        "finetune", place / "resnet", place / "floats.npz", "method=dense", "train.steps=30",
        "train.lr=1e-2", "data.eval=0.25", "-o", place / "dense",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return ran


def logits(model, pixels):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


def rows(place):
    data = read_images(place / "photos", 8, 3, eval=0)
    return torch.stack([data.train[i]["pixel_values"] for i in range(len(data.train))])


def test_a_folder_for_each_class_teaches_a_vit(learnt, place):
    assert (
        "photos   32 images of 2 classes; loss on the class; 25.0% held out\n"
        "         8 x 8 x 3; mean 0.5, deviation 0.5 "
        "(no preprocessor_config.json; the model's image_size)\n"
        "         24 images, the first (« » is learnt): 8 x 8 x 3, seen from "
    ) in learnt.err
    assert "«bottom»" in learnt.err
    facts = json.loads((place / "learnt" / "run.json").read_text())
    assert facts["eval"]["after"]["accuracy"] == 1.0
    assert facts["eval"]["after"]["loss"] < facts["eval"]["before"]["loss"]
    assert (place / "learnt" / "report.html").is_file()


def test_the_adapter_loads_in_plain_peft_in_a_fresh_process(learnt, place, tmp_path):
    pixels = rows(place)
    torch.save(pixels, tmp_path / "pixels.pt")
    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoImageProcessor\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "from PIL import Image\n"
        "base, final, pixels, photo, out = sys.argv[1:]\n"
        "config = AutoConfig.from_pretrained(final)\n"
        "assert config.id2label == {0: 'bottom', 1: 'top'}\n"
        "model = PeftModel.from_pretrained(Auto.from_pretrained(base, config=config), final)\n"
        "seen = AutoImageProcessor.from_pretrained(final)\n"
        "image = seen(Image.open(photo).convert('RGB'), return_tensors='pt')['pixel_values']\n"
        "batch = torch.cat([torch.load(pixels), image])\n"
        "torch.save([image, model.eval()(pixel_values=batch).logits.detach()], out)\n"
    )
    photo = sorted((place / "photos" / "bottom").iterdir())[0]
    words = [place / "vit", place / "learnt" / "final", tmp_path / "pixels.pt", photo]
    code = [sys.executable, "-c", script, *map(str, words), str(tmp_path / "out.pt")]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image, theirs = torch.load(tmp_path / "out.pt")
    # fp32: transformers scales in another order
    torch.testing.assert_close(image[0], pixels[0], rtol=0, atol=1e-6)
    ours = logits(open_model(place / "learnt").model, torch.cat([pixels, image]))
    # merged nowhere: the same products in the same order but for the scale's place
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_eval_of_the_held_out_share_agrees_with_the_training(learnt, place):
    after = json.loads((place / "learnt" / "run.json").read_text())["eval"]["after"]
    ran = eckart("eval", place / "learnt", place / "photos", "data.eval=0.25", "--json")
    assert ran.code == 0, ran.out
    assert ran.document["eval"]["loss"] == pytest.approx(after["loss"], abs=1e-5)
    assert ran.document["rows"] == 8
    ran = eckart("eval", place / "learnt", place / "a.npz", "--against", place / "learnt")
    assert ran.code == 0, ran.err
    assert "accuracy" in ran.out and "[" in ran.out and "32 with 32 labels" in ran.err
    assert "the same first choice at 100.0 %" in ran.out


def test_an_image_is_given_its_class(learnt, place):
    photo = sorted((place / "photos" / "top").iterdir())[0]
    ran = eckart("generate", place / "learnt", "-p", photo)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"{photo}\n  top ") and "bottom 0." in ran.out
    ran = eckart("generate", place / "learnt", "-p", place / "photos" / "top" / "none.png")
    assert ran.code == 3 and ran.err.startswith("no such file or folder\n")


def test_an_adapter_is_merged_and_gone_on_with(learnt, place, tmp_path):
    words = ("--to", "dense", "-o", tmp_path / "m")
    ran = eckart("convert", place / "learnt", f"data={place / 'photos'}", *words)
    assert ran.code == 0 and "of 32 classes" in ran.out, ran.err
    merged = load_model(tmp_path / "m")
    ours = logits(open_model(place / "learnt").model, rows(place))
    # fp32; merged matrices are rounded once
    torch.testing.assert_close(logits(merged, rows(place)), ours, rtol=0, atol=1e-4)
    assert merged.config.id2label == {0: "bottom", 1: "top"}
    assert (tmp_path / "m" / "preprocessor_config.json").is_file()
    for source in (place / "learnt", tmp_path / "m"):
        out = tmp_path / f"on-{source.name}"
        words = ("train.steps=1", "train.lr=1e-6", "data.eval=0.25", "-o", out, "--json")
        ran = eckart("finetune", source, place / "photos", *words)
        assert ran.code == 0, ran.out
        assert ran.document["eval"]["before"]["accuracy"] == 1.0, "its head is kept"


def test_other_classes_get_a_new_head(learnt, dense, place, tmp_path):
    pixels, bright = pictures()
    labels = bright + (pixels[:, 0, 0] > 128)
    np.savez(tmp_path / "b.npz", images=pixels / 16.0, labels=labels)
    words = ("train.steps=1", "weights.targets=[conv]", "-o", tmp_path / "r")
    ran = eckart("finetune", place / "dense", tmp_path / "b.npz", *words)
    assert ran.code == 0, ran.err
    ran = eckart("finetune", place / "dense", place / "a.npz", *words[1:2], "-o", tmp_path / "no")
    assert ran.code == 3 and "\nthe images exceed the model's range of values\n" in ran.err
    config = json.loads((tmp_path / "r" / "final" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}
    ran = eckart("finetune", place / "learnt", tmp_path / "b.npz", "-o", tmp_path / "no")
    assert ran.code == 2 and ran.err.startswith(
        f"this adapter was made for other classes\n  {place / 'learnt'}  bottom, top\n  the data"
    )


def test_a_net_of_convolutions_learns_from_arrays_and_opens_in_transformers(dense, place):
    from transformers import AutoModelForImageClassification

    assert "32 images of 2 classes" in dense.err
    facts = json.loads((place / "dense" / "run.json").read_text())
    assert facts["eval"]["after"]["loss"] < facts["eval"]["before"]["loss"]
    model = AutoModelForImageClassification.from_pretrained(place / "dense" / "final")
    assert model.config.architectures == ["ResNetForImageClassification"]
    written = json.loads((place / "dense" / "final" / "preprocessor_config.json").read_text())
    # arrays up to 13.1, so that the model sees -1 to 1; said once, and followed ever after
    assert written["rescale_factor"] == pytest.approx(16 / 209)
    ran = eckart("eval", place / "dense", place / "floats.npz", "data.eval=0.25", "--json")
    assert ran.code == 0, ran.out
    after = facts["eval"]["after"]
    assert ran.document["eval"]["loss"] == pytest.approx(after["loss"], abs=1e-5)


def test_an_adapter_on_convolutions_opens_in_plain_peft(place, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForImageClassification

    ran = eckart("finetune", place / "resnet", place / "a.npz", "-o", tmp_path / "r")
    assert ran.code == 2 and ran.err.endswith("Type weights.targets=[conv].\n")
    words = ("weights.rank=2", "weights.targets=[conv]", "train.steps=3", "train.lr=1e-2")
    ran = eckart("finetune", place / "resnet", place / "a.npz", *words, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    config = AutoConfig.from_pretrained(tmp_path / "r" / "final")
    base = AutoModelForImageClassification.from_pretrained(place / "resnet", config=config)
    theirs = PeftModel.from_pretrained(base, tmp_path / "r" / "final")
    pixels = rows(place)[:, :1]
    ours = logits(open_model(tmp_path / "r").model, pixels)
    torch.testing.assert_close(logits(theirs, pixels), ours, rtol=0, atol=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(place, tmp_path, monkeypatch):
    words = ["finetune", place / "vit", place / "photos", "train.batch_size=8", "train.steps=8"]
    words += ["weights.dropout=0.1", "data.eval=0"]
    assert eckart(*words, "-o", tmp_path / "whole").code == 0
    told = fit.Interrupt.on_step_end

    def asked(self, args, state, control, **more):
        self.asked = self.asked or state.global_step == 4
        return told(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(fit.Interrupt, "on_step_end", asked)
        assert eckart(*words, "-o", tmp_path / "run").code == 130
    ran = eckart("finetune", "--resume", tmp_path / "run")
    assert ran.code == 0, ran.err
    one, two = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        for name in ("whole", "run")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_estimate_counts_images(learnt, place):
    ran = eckart("estimate", "finetune", place / "vit", place / "photos", "--json")
    assert ran.code == 0, ran.out
    facts = json.loads((place / "learnt" / "run.json").read_text())
    assert ran.document["memory"]["weights"] == facts["memory"]["estimated"]["weights"]
    assert ran.document["memory"]["factors"] == facts["memory"]["estimated"]["factors"]


def test_a_vit_is_made_smaller_and_keeps_its_classes(learnt, place, tmp_path):
    words = ("--to", "dense", "-o", tmp_path / "m")
    assert eckart("convert", place / "learnt", *words).code == 0
    out = tmp_path / "small"
    ran = eckart("compress", tmp_path / "m", place / "photos", "keep=0.9", "-o", out)
    assert ran.code == 0, ran.err
    assert "import eckart.hf, then AutoModelForImageClassification.from_pretrained" in ran.out
    ran = eckart("eval", out, place / "photos", "--json")
    assert ran.code == 0 and ran.document["eval"]["accuracy"] > 0.5, ran.out


def test_a_stream_of_image_tasks_shares_one_head(place, tmp_path):
    pixels, bright = pictures()
    np.savez(tmp_path / "b.npz", images=255 - pixels, labels=np.array(["dark", "top"])[bright])
    words = ("method=codyra", "train.steps=20", "train.lr=2e-2", "data.eval=0.25")
    data = f"data=[{place / 'a.npz'},{tmp_path / 'b.npz'}]"
    out = tmp_path / "r"
    ran = eckart("finetune", place / "vit", data, *words, "-o", out, "--json")
    assert ran.code == 0, ran.out
    first, last = (task["held_out"] for task in ran.document["tasks"])
    # a's images never are dark: ln 2 is what a head that learns this reaches at once
    assert first["a"]["loss"] < 0.8 and last["b"]["loss"] < first["b"]["loss"] - 1
    ran = eckart("eval", out, tmp_path / "b.npz", "data.eval=0.25", "--json")
    assert ran.code == 0, ran.out
    # merged task after task here, one adapter there; the head is in its file
    assert ran.document["eval"]["loss"] == pytest.approx(last["b"]["loss"], abs=1e-4)


# --- bad input -----------------------------------------------------------------------------


def test_what_is_wrong_with_images_is_said(place, tmp_path, monkeypatch):
    def refused(code, text, *words):
        ran = eckart("finetune", *words, "-o", tmp_path / "r")
        assert (ran.code, ran.out) == (code, "") and ran.err.endswith(text), ran.err
        assert "Traceback" not in ran.err and not (tmp_path / "r").exists()

    broken = tmp_path / "broken"
    for name in HALVES:
        (broken / name).mkdir(parents=True)
        photo = sorted((place / "photos" / name).iterdir())[0]
        (broken / name / "1.png").write_bytes(photo.read_bytes())
    (broken / "top" / "2.png").write_bytes(b"no picture")
    refused(
        3,
        "the image cannot be read\n"
        f"  {broken / 'top' / '2.png'}  no kind of image that is known\n",
        place / "vit", broken,
    )  # fmt: skip
    (broken / "top" / "2.png").unlink()
    (broken / "top" / "1.png").unlink()
    refused(
        3,
        f"the data has one class only\n  {broken}  bottom\n"
        "Two are needed to be told apart: other labels, or a folder for each class.\n",
        place / "vit", broken,
    )  # fmt: skip
    table = tmp_path / "shapes.parquet"
    pixels = [[[1, 2], [3, 4]], [[1, 2, 3], [4, 5, 6]]]
    pa.parquet.write_table(pa.table({"image": pixels, "label": ["a", "b"]}), table)
    refused(
        3,
        f"the images have different shapes\n  {table}, row 2  [2, 3], and [2, 2] in row 1\n"
        "Keep them as encoded bytes (PNG), which are fitted one by one.\n",
        place / "vit", table,
    )  # fmt: skip
    pa.parquet.write_table(pa.table({"image": [b"x", b"y"], "kind": ["a", "b"]}), table)
    refused(3, f"the file has no label\n  {table}  columns image, kind\n", place / "vit", table)
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "d.jsonl")
    (tmp_path / "vit").symlink_to(place / "vit")
    (tmp_path / "p").symlink_to(place / "photos")
    refused(
        2,
        "this model looks at images, and the data is text\n"
        "  vit      image\n  d.jsonl  text\n"
        "Give it a folder with a folder of images for each class, or arrays in an .npz file.\n",
        "vit", "d.jsonl",
    )  # fmt: skip
    model_folder(tmp_path / "llama")
    refused(
        2,
        "this model continues text, and the data is images\n"
        "  llama  causal\n  p      image+label\n"
        "Take a model for images, such as a ViT or a ResNet.\n",
        "llama", "p",
    )  # fmt: skip
    ran = eckart("pretrain", "vit", "p", "-o", "r")
    assert ran.code == 2 and ran.err.startswith(
        "pretraining learns from text, with a model for words\n"
        "  vit  looks at images\n  p    a task with classes: image\n"
    )
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(
        6,
        "Type pip install 'eckart[images]', or arrays in an .npz file, which need none.\n",
        place / "vit", place / "photos",
    )  # fmt: skip
    words = ("train.steps=1", "-o", tmp_path / "arrays")
    assert eckart("finetune", place / "vit", place / "a.npz", *words).code == 0
