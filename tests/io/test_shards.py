"""Tensors are read one by one and written as they come, into files transformers loads."""

import pytest
import torch

from eckart.errors import FileError, UsageError
from eckart.io.folder import write_folder
from eckart.io.models import build_model, config_of, load_model
from eckart.io.shards import Shards, ShardWriter


@pytest.fixture
def saved(tmp_path):
    config = config_of("llama-tiny", 64)
    config.num_hidden_layers = 2
    build_model(config, seed=3).save_pretrained(tmp_path / "m", max_shard_size="1MB")
    return tmp_path / "m"


def test_a_model_copied_tensor_by_tensor_is_the_same(saved, tmp_path):
    with Shards(saved) as shards, write_folder(tmp_path / "out") as beside:
        (beside / "config.json").write_bytes((saved / "config.json").read_bytes())
        with ShardWriter(beside, shard_bytes=600_000) as writer:
            for name in shards:
                writer.add(name, shards[name])
                held = sum(t.numel() * t.element_size() for t in writer._pending.values())
                assert held <= 600_000
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    a, b = load_model(saved), load_model(tmp_path / "out")
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_a_small_model_is_one_file_without_an_index(saved, tmp_path):
    with Shards(saved) as shards, ShardWriter(tmp_path) as writer:
        for name in shards:
            writer.add(name, shards[name])
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    assert names == ["model.safetensors"]


def test_sizes_come_from_headers(saved):
    with Shards(saved) as shards:
        assert shards.shape("model.layers.0.mlp.up_proj.weight") == (512, 192)
        assert shards.bytes("model.layers.0.mlp.up_proj.weight") == 4 * 512 * 192
        assert "model.norm.weight" in shards and "model.nrom.weight" not in shards
        assert not shards._open  # nothing was read
        assert shards.bytes() == sum(4 * p.numel() for p in load_model(saved).parameters())


def test_a_module_is_read_by_its_name(saved):
    with Shards(saved) as shards:
        found = shards.below("model.layers.1.self_attn")
        assert sorted(found) == [f"{x}_proj.weight" for x in "koqv"]
        with pytest.raises(FileError, match=r"Did you mean model\.layers\.1\.mlp\.up_proj"):
            shards.below("model.layers.1.mlp.upproj")


def test_a_view_is_written_without_what_lies_behind_it(tmp_path):
    base = torch.arange(1000.0)
    with ShardWriter(tmp_path) as writer:
        writer.add("x", base[:10])
        base.zero_()  # what was taken is not changed by what happens later
    assert (tmp_path / "model.safetensors").stat().st_size < 400
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], torch.arange(10.0))


def test_a_name_written_twice_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=1)
    writer.add("x", torch.zeros(2))
    writer.add("y", torch.zeros(2))
    for name in ("x", "y"):
        with pytest.raises(UsageError, match="written twice"):
            writer.add(name, torch.zeros(2))


def test_a_cut_off_shard_is_found_when_the_model_is_opened(saved):
    file = sorted(saved.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FileError, match=file.name):
        Shards(saved)


def test_a_weights_file_is_as_open_as_its_folder(tmp_path):
    for mode in (0o755, 0o700):
        folder = tmp_path / oct(mode)
        folder.mkdir(mode=mode)
        folder.chmod(mode)
        with ShardWriter(folder) as writer:
            writer.add("a", torch.zeros(2))
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666
