"""Images of three kinds of sources reach a model alike, split by content, faults named."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tests.conftest import tiny

from eckart.errors import FileError, UsageError
from eckart.io.image_sources import decoded, holds_images
from eckart.io.images import read, read_images
from eckart.io.preprocessing import Preprocessing, load_preprocessing


@pytest.fixture
def colours():
    """Twelve 6 x 6 colour images of two classes, uint8 [n, h, w, c]."""
    return np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sources(root, colours):
    """The same images as a folder, arrays and a table."""
    classes = ["cat" if i % 2 else "ant" for i in range(len(colours))]
    for i, (pixels, name) in enumerate(zip(colours, classes, strict=True)):
        (root / "folder" / name).mkdir(parents=True, exist_ok=True)
        (root / "folder" / name / f"{i:02d}.png").write_bytes(png(pixels))
    np.savez(root / "a.npz", images=colours, labels=np.array(classes))
    rows = [{"bytes": png(pixels), "path": None} for pixels in colours]
    pa.parquet.write_table(pa.table({"image": rows, "label": classes}), root / "b.parquet")
    return [root / "folder", root / "a.npz", root / "b.parquet"]


def test_a_saved_data_set_names_its_classes_and_weights_repeat_rows(tmp_path, colours):
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"img": Image(), "label": ClassLabel(names=["ant", "cat"])})
    rows = [{"bytes": png(pixels), "path": None} for pixels in colours]
    made = Dataset.from_dict({"img": rows, "label": [i % 2 for i in range(12)]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    assert holds_images(str(tmp_path / "saved"))
    once = read(str(tmp_path / "saved"), Preprocessing(6, 6), eval=0, cache=False)
    folder = read(str(sources(tmp_path, colours)[0]), Preprocessing(6, 6), eval=0, cache=False)
    assert once.labels == ("ant", "cat") and content(once.train) == content(folder.train)
    entry = {"path": str(tmp_path / "saved"), "weight": 2.5}
    more = read([entry], Preprocessing(6, 6), eval=0, cache=False)
    assert len(more.train) == 30 and "weight 2.5" in more.summary


def content(data):
    return sorted((row["labels"], row["pixel_values"].numpy().tobytes()) for row in data)


def test_a_folder_arrays_and_a_table_give_the_same_rows(tmp_path, colours):
    data = [read_images(source, 6, 3, eval=0) for source in sources(tmp_path, colours)]
    assert data[0].labels == ("ant", "cat") and len(data[0].train) == 12
    assert content(data[0].train) == content(data[1].train) == content(data[2].train)
    first = data[1].train[0]["pixel_values"]
    # fp32: one multiplication and one subtraction of values up to 255
    expected = torch.as_tensor(colours[0].transpose(2, 0, 1)).float() / 127.5 - 1
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)


def test_digits_are_the_vision_default():
    pytest.importorskip("sklearn")
    data = read_images("digits", 8, 1)
    assert len(data.train) + len(data.evaluation["digits"]) == 1797
    assert len(data.evaluation["digits"]) == 359 and len(data.labels) == 10
    from sklearn.datasets import load_digits

    pixels = {x.tobytes() for x in (load_digits().images / 8 - 1).astype(np.float32)}
    assert data.train[0]["pixel_values"].numpy().tobytes() in pixels
    held = np.bincount(data.evaluation["digits"].labels)
    assert held.min() >= 34 and held.max() <= 37  # a fifth of 174 to 183


def test_the_split_follows_content_not_order(colours, tmp_path):
    labels = np.arange(12) % 2
    for name, order in (("a", np.arange(12)), ("b", np.arange(12)[::-1])):
        np.savez(tmp_path / f"{name}.npz", images=colours[order], labels=labels[order])
    a, b = (read_images(tmp_path / f"{n}.npz", 6, 3, eval=0.25) for n in "ab")
    assert content(a.evaluation["a"]) == content(b.evaluation["b"])
    assert len(a.evaluation["a"]) == 4 and len(a.train) == 8


def test_a_folder_that_is_split_stays_split(tmp_path, colours):
    for i, part in enumerate(("train", "test", "train", "test")):
        for name in ("ant", "cat"):
            (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name / f"{i}.png").write_bytes(png(colours[i]))
    data = read_images(tmp_path, 6, 3)
    held = data.evaluation[tmp_path.name]
    assert len(data.train) == len(held) == 4 and all("/test/" in w for w in held.where)


def test_pixels_are_fitted_to_the_model():
    grey = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    assert np.array_equal(Preprocessing(8, 8).fit(grey), np.repeat(grey, 3, 0))
    assert Preprocessing(4, 4, 1).fit(grey).shape == (1, 4, 4)
    white = np.ones((3, 8, 8), np.float32)
    # the three weights sum to 1 in fp32
    np.testing.assert_allclose(Preprocessing(8, 8, 1).fit(white), np.ones((1, 8, 8)), atol=1e-6)
    with pytest.raises(UsageError, match="number of channels"):
        Preprocessing(8, 8).fit(np.ones((2, 8, 8), np.float32))


def test_a_vit_trains_on_a_batch():
    pytest.importorskip("sklearn")
    data = read_images("digits", 8, 1)
    model = tiny("vit").train()
    batch = data.collate([data.train[i] for i in range(32)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_faults_are_named(tmp_path, colours):
    with pytest.raises(FileError, match="no images in this folder"):
        read_images(tmp_path, 6, 3)
    with pytest.raises(FileError, match="no such file"):
        read_images(tmp_path / "none", 6, 3)
    np.savez(tmp_path / "a.npz", imagse=colours, labels=np.arange(12))
    with pytest.raises(FileError, match="Did you mean image"):
        read_images(tmp_path / "a.npz", 6, 3)
    np.savez(tmp_path / "b.npz", images=colours, labels=np.arange(11))
    with pytest.raises(FileError, match=r"images \[12, 3, 6, 6\], labels \[11\]"):
        read_images(tmp_path / "b.npz", 6, 3)
    np.savez(tmp_path / "c.npz", images=np.array([{}, {}]), labels=np.arange(2))
    with pytest.raises(FileError, match="cannot be read"):
        read_images(tmp_path / "c.npz", 6, 3)
    np.savez(tmp_path / "d.npz", images=colours, labels=np.zeros(12))
    with pytest.raises(FileError, match="one class only"):
        read_images(tmp_path / "d.npz", 6, 3)
    (tmp_path / "e.txt").write_text("x")
    with pytest.raises(FileError, match="no file of images"):
        read_images(tmp_path / "e.txt", 6, 3)


def test_sixteen_bits_keep_their_upper_eight():
    pixels = np.arange(0, 2**16, 4096, dtype=np.uint16).reshape(4, 4)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert (decoded(file.getvalue(), "x.png") == pixels[None] // 256).all()
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.float32)).save(file, "TIFF")
    with pytest.raises(FileError, match="does not say how bright"):
        decoded(file.getvalue(), "x.tiff")


def test_a_damaged_image_is_named_when_it_is_reached(tmp_path, colours):
    folder = sources(tmp_path, colours)[0]
    (folder / "cat" / "01.png").write_bytes(png(colours[1])[:60])
    data = read_images(folder, 6, 3, eval=0)
    with pytest.raises(FileError, match=r"cat/01\.png"):
        [data.train[i] for i in range(12)]


PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 10}},
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 12},
        "crop_pct": 0.8, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
    },
    "cut out": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 14},
        "do_center_crop": True, "crop_size": {"height": 12, "width": 12}, "resample": 3,
    },
    "as they are": {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 20, "width": 30},
        "do_normalize": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_models_own_preprocessing_is_followed_as_transformers_does(tmp_path, kind):
    from transformers import AutoImageProcessor

    plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True}
    file = {**plain, "do_rescale": True, "do_normalize": True, **PROCESSORS[kind]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_channels": 3}))
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(images=[pixels], return_tensors="pt")
    ours = load_preprocessing(tmp_path)
    found = ours.scaled(ours.fit(pixels.transpose(2, 0, 1)))
    # PIL resizes in whole numbers, in two passes: 2 of 255 levels, over a deviation of 0.2
    torch.testing.assert_close(found, theirs["pixel_values"][0], rtol=0, atol=2 / 255 / 0.2)
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == file


def test_preprocessing_that_cannot_be_followed_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8, "do_flip": true}')
    with pytest.raises(FileError, match="do_flip is not known here"):
        load_preprocessing(tmp_path)


def test_decoded_images_are_kept_at_the_models_size(tmp_path, colours, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    folder, size = sources(tmp_path, colours)[0], Preprocessing(4, 4)
    first = content(read(str(folder), size, eval=0).train)
    assert content(read(str(folder), size, eval=0, cache=False).train) == first
    decodings = []
    monkeypatch.setattr("eckart.io.images.decoded", lambda *a: decodings.append(a) or decoded(*a))
    assert content(read(str(folder), size, eval=0).train) == first
    assert len(decodings) == 1, "the first tells whether they are bytes"
    (folder / "cat" / "01.png").write_bytes(png(255 - colours[1]))
    assert content(read(str(folder), size, eval=0).train) != first
