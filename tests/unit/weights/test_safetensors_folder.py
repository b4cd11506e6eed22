"""Model folders: broken ones are named by file and tensor, written ones appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import CheckpointError, CheckpointReader, read_header
from megatron_rlvr.weights.safetensors_writer import ShardedWriter, write_checkpoint

ModelFolder = Callable[[str], tuple[Path, dict[str, torch.Tensor]]]
TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b": torch.randn(10, generator=torch.Generator().manual_seed(1)),
    "c": torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2)),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of three files: a, b and c."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    write_checkpoint(tmp_path / "model", TENSORS.items(), like=source, shapes=SHAPES, max_file_bytes=64)
    return tmp_path / "model"


def test_files_and_index_are_read_by_safetensors_itself(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (24 + 10 + 30)
    assert sorted(index["weight_map"]) == ["a", "b", "c"]
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(sharded / file)[name], TENSORS[name])


def test_reader_reads_rectangles(sharded: Path) -> None:
    with CheckpointReader(sharded) as reader:
        assert torch.equal(reader.read("a", ((1, 3), (2, 6))), TENSORS["a"][1:3, 2:6])
        assert torch.equal(reader.read("c", ((0, 3), (1, 2), (0, 2))), TENSORS["c"][:, 1:2])
        assert torch.equal(reader.read_tensor("b"), TENSORS["b"])
        with pytest.raises(CheckpointError, match=r"a has shape \(4, 6\), but \(\(0, 5\), \(0, 6\)\) is wanted"):
            reader.read("a", ((0, 5), (0, 6)))
        with pytest.raises(CheckpointError, match="tensor d is missing"):
            reader.read_tensor("d")


def test_missing_folder_and_files_are_named(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        CheckpointReader(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .*index.json, only pytorch_model.bin"):
        CheckpointReader(tmp_path / "empty")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 weight files are missing: model-00002-of-00003.safetensors"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file_is_named(sharded: Path, keep: int) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003.safetensors is truncated"):
        CheckpointReader(sharded)


def test_appended_bytes_and_broken_headers_are_named(sharded: Path) -> None:
    path = sharded / "model-00001-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(path)
    path.write_bytes(content[:8] + b"x" + content[9:])
    with pytest.raises(CheckpointError, match="malformed safetensors header"):
        read_header(path)


def test_index_that_contradicts_the_files_is_named(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["b"]
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "d": file}}))
    with pytest.raises(CheckpointError, match=f"{file} lacks d, which"):
        CheckpointReader(sharded)
    path.write_text(json.dumps({"weight_map": {"a": index["weight_map"]["a"], "z": file}}))
    with pytest.raises(CheckpointError, match=f"{file} holds b, which .* places in nowhere"):
        CheckpointReader(sharded)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is no safetensors index"):
        CheckpointReader(sharded)


def test_weights_and_config_must_belong_together(model_folder: ModelFolder) -> None:
    """Every field that shapes a tensor, changed one at a time, and a tensor too many."""
    folder, _ = model_folder("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    changes = {
        "vocab_size": 201,
        "hidden_size": 40,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_local_experts": 7,
        "tie_word_embeddings": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
    }
    with CheckpointReader(folder) as reader:
        for field, value in changes.items():
            assert config[field] != value
            shape = ModelShape.from_hf(config | {field: value})
            expected = Mapping(shape, layout=Layout(), naming="local").hf_tensors()
            with pytest.raises(CheckpointError, match=r"weights and config.json do not belong together: "):
                reader.verify(expected, tied=shape.tie_embeddings)
        shape = ModelShape.from_hf(config)
        expected = Mapping(shape, layout=Layout(), naming="local").hf_tensors()
        reader.verify(expected, tied=False)
        norm = expected.pop("model.norm.weight")
        with pytest.raises(CheckpointError, match=r"model.norm.weight is extra$"):
            reader.verify(expected, tied=False)
        with pytest.raises(CheckpointError, match=r"model.norm2.weight is missing; model.norm.weight is extra$"):
            reader.verify(expected | {"model.norm2.weight": norm}, tied=False)


def test_a_tied_head_that_was_stored_must_equal_the_embedding(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder("llama_tied")
    shape = ModelShape.from_hf(folder)
    expected = Mapping(shape, layout=Layout(), naming="local").hf_tensors()
    head = tensors["model.embed_tokens.weight"].clone()
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **inv_freq, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        reader.verify(expected, tied=True)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match="differs from the embedding"):
        reader.verify(expected, tied=True)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match=r"a is I8 in model.safetensors"):
        reader.verify({"a": (2,)}, tied=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_model_loads_in_transformers(model_folder: ModelFolder, tmp_path: Path, dtype: torch.dtype) -> None:
    import transformers

    folder, tensors = model_folder("qwen3")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    (folder / "pytorch_model.bin").touch()
    shapes = Mapping(ModelShape.from_hf(folder), layout=Layout(), naming="local").hf_tensors()
    out = tmp_path / "out"
    # Any order will do.
    write_checkpoint(out, reversed(tensors.items()), like=folder, shapes=shapes, dtype=dtype, max_file_bytes=20_000)
    (folder / "pytorch_model.bin").unlink()
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    assert (out / "tokenizer_config.json").read_text() == '{"model_max_length": 5}'
    assert not (out / "pytorch_model.bin").exists()
    assert list(tmp_path.iterdir()) == [out]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name].to(dtype)), name
    with CheckpointReader(out) as reader:
        reader.verify(shapes, tied=False)


def write_and_interrupt(folder: Path, names: list[str], **options: Any) -> None:
    with ShardedWriter(folder, SHAPES, **options) as writer:
        for name in names:
            writer.write(name, TENSORS[name])
        raise KeyboardInterrupt


def test_an_interrupted_write_is_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt(folder, ["b", "a"], dtype=torch.float32, source="s", resume=True)
    assert not folder.exists()
    journal = next((tmp_path / ".out.incomplete").glob("journal*"))
    # Killed between the bytes of a name: the tensor counts as not written.
    journal.write_text(journal.read_text() + "c")
    with ShardedWriter(folder, SHAPES, dtype=torch.float32, source="s", resume=True) as writer:
        assert writer.missing() == ["c"]
        writer.write("c", TENSORS["c"])
        writer.commit()
    assert list(tmp_path.iterdir()) == [folder]
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("change", [{"source": "other"}, {"dtype": torch.bfloat16}, {"max_file_bytes": 50}])
def test_an_interrupted_write_of_something_else_starts_over(tmp_path: Path, change: dict) -> None:
    options = {"dtype": torch.float32, "source": "s", "resume": True, "max_file_bytes": 1000}
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt(tmp_path / "out", ["b"], **options)
    with ShardedWriter(tmp_path / "out", SHAPES, **options | change) as writer:
        assert writer.missing() == ["a", "b", "c"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    like = tmp_path / "like"
    like.mkdir()
    with pytest.raises(CheckpointError, match="1 tensors were not written, first c"):
        write_checkpoint(out, [("a", TENSORS["a"]), ("b", TENSORS["b"])], like=like, shapes=SHAPES)
    with pytest.raises(ValueError, match=r"b must have shape \(10,\), got \(4, 6\)"):
        write_checkpoint(out, [("b", TENSORS["a"])], like=like, shapes=SHAPES)
    with pytest.raises(ValueError, match="d is no tensor of the model"):
        write_checkpoint(out, [("d", TENSORS["a"])], like=like, shapes=SHAPES)
    with pytest.raises(ValueError, match="a was written before"):
        write_checkpoint(out, [("a", TENSORS["a"])] * 2, like=like, shapes=SHAPES)
    with pytest.raises(ValueError, match="no tensors to write"):
        write_checkpoint(out, [], like=like, shapes=SHAPES)
    assert list(tmp_path.iterdir()) == [like]
    with pytest.raises(ValueError, match="output folder must not exist"):
        write_checkpoint(like, TENSORS.items(), like=like, shapes=SHAPES)
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch.int8"):
        write_checkpoint(out, TENSORS.items(), like=like, shapes=SHAPES, dtype=torch.int8)


def test_several_processes_write_one_folder(tmp_path: Path) -> None:
    """Each writer stands for a rank: own journal, own tensors, one commit."""
    folder = tmp_path / "out"
    with ShardedWriter(folder, SHAPES, dtype=torch.float32) as main:
        with ShardedWriter(folder, SHAPES, dtype=torch.float32, rank=1) as other:
            other.write("a", TENSORS["a"])
            main.write("c", TENSORS["c"])
            other.write("b", TENSORS["b"])
        main.commit()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])


def test_writing_over_a_copy_of_a_real_folder_changes_only_the_type(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder("mistral")
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    assert config["dtype"] == "float32"
    shapes = Mapping(ModelShape.from_hf(copy), layout=Layout(), naming="local").hf_tensors()
    write_checkpoint(tmp_path / "out", tensors.items(), like=copy, shapes=shapes, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
