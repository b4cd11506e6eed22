"""Conversion both ways without Megatron: bits, resumption, broken inputs, memory. Megatron's side is in
tests/distributed/test_checkpoint_conversion.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.weights.conversion import Team, compare, hf_to_megatron, megatron_to_hf, open_model
from megatron_rlvr.weights.hf_config import ModelShape
from megatron_rlvr.weights.layout import Layout
from megatron_rlvr.weights.mapping import Mapping
from megatron_rlvr.weights.safetensors_io import CheckpointError

ROOT = Path(__file__).parents[3]
ModelFolder = Callable[[str], tuple[Path, dict[str, torch.Tensor]]]


def to_megatron(source: Path, out: Path, layout: Layout | None = None, dtype: torch.dtype | None = None) -> Path:
    hf_to_megatron(source, out, layout=layout or Layout(), dtype=dtype, team=Team(), progress=lambda done, total: None)
    return out


def to_hf(checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    megatron_to_hf(checkpoint, out, dtype=dtype, hf_config=None, team=Team(), progress=lambda done, total: None)
    return out


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def converted(model_folder: ModelFolder, tmp_path: Path) -> Path:
    """A torch_dist checkpoint of a small Qwen3, chunks of TP 2."""
    return to_megatron(model_folder("qwen3")[0], tmp_path / "mcore", Layout(tp=2, pp=2))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", Layout(tp=4, pp=2)),
        ("qwen2_tied", Layout(tp=2)),
        ("qwen3", Layout(tp=8, pp=4)),
        ("qwen3_moe", Layout(tp=2, ep=4, etp=2)),
        ("qwen3_moe_mixed", Layout(tp=2, pp=2, ep=2)),
        ("llama", Layout()),
        ("llama_tied", Layout(tp=2, pp=8)),
        ("mistral", Layout(tp=4)),
    ],
)
def test_round_trip_is_bit_exact(family: str, layout: Layout, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder(family)
    back = to_hf(to_megatron(folder, tmp_path / "mcore", layout), tmp_path / "back")
    written = load_file(back / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert (back / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "mcore"]


ODD: dict[str, dict[str, Any]] = {
    "one_token": {"model_type": "qwen2", "vocab_size": 1},
    "one_kv_head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 6, "layout": Layout(pp=4)},
    "one_head": {"model_type": "mistral", "num_attention_heads": 1, "num_key_value_heads": 1, "layout": Layout(pp=2)},
    "every_head_its_own": {"model_type": "qwen2", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "wide_heads": {"model_type": "qwen3", "head_dim": 32, "vocab_size": 257},
    "heads_that_do_not_divide": {"model_type": "mistral", "hidden_size": 40, "head_dim": 2},
    "no_head_dim": {"model_type": "llama", "head_dim": None, "vocab_size": 129},
    "three_ranks": {"model_type": "qwen3", "num_key_value_heads": 3, "layout": Layout(tp=3, pp=2)},
    "three_experts": {"model_type": "qwen3_moe", "num_experts": 3, "layout": Layout(ep=3, tp=2)},
    "one_expert": {"model_type": "qwen3_moe", "num_experts": 1, "num_experts_per_tok": 1},
    "every_second_layer": {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "layout": Layout(pp=2, ep=2, etp=2)},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "vocab_size": 151,
        "hidden_size": 24,
        "intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
        "sliding_window": None,
        **ODD[name],
    }
    layout = config.pop("layout", Layout(tp=2, pp=2))
    if config["model_type"] == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": True}
        config = experts | config
    if config["model_type"] == "llama":
        del config["sliding_window"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = Mapping(ModelShape.from_hf(config), layout=Layout(), naming="local").hf_tensors()
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    written = load_file(to_hf(to_megatron(source, tmp_path / "mcore", layout), tmp_path / "back") / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_are_cast_once(dtype: torch.dtype, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder("llama")
    checkpoint = to_megatron(folder, tmp_path / "mcore", dtype=dtype)
    back = load_file(to_hf(checkpoint, tmp_path / "back") / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.to(dtype)), name
    wide = load_file(to_hf(checkpoint, tmp_path / "wide", dtype=torch.float32) / "model.safetensors")
    assert torch.equal(wide["lm_head.weight"], tensors["lm_head.weight"].to(dtype).float())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("direction", ["hf_to_megatron", "megatron_to_hf"])
def test_a_killed_conversion_goes_on(
    direction: str, model_folder: ModelFolder, converted: Path, tmp_path: Path
) -> None:
    """kill -9 after a few units; the second run writes only the rest, and the result is the same."""
    source = model_folder("qwen3")[0] if direction == "hf_to_megatron" else converted
    options = "layout=Layout(tp=2), dtype=None" if direction == "hf_to_megatron" else "dtype=None, hf_config=None"
    script = textwrap.dedent(f"""
        import os, signal
        from megatron_rlvr.weights.conversion import Team, {direction}
        from megatron_rlvr.weights.layout import Layout
        seen = []
        def progress(done, total):
            seen.append(done)
            if len(seen) == 4 and {{kill}}:
                os.kill(os.getpid(), signal.SIGKILL)
        {direction}({str(source)!r}, {str(tmp_path / "out")!r}, {options}, team=Team(), progress=progress)
        print(len(seen))
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 120, "check": False}
    killed = subprocess.run([sys.executable, "-c", script.format(kill=True)], **run)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.incomplete").is_dir()
    finished = subprocess.run([sys.executable, "-c", script.format(kill=False)], **run)
    assert finished.returncode == 0, finished.stderr
    # 10 units (embedding, 8 layers, head), or 67 parameters; 4 of them were there.
    assert int(finished.stdout) == (10 if direction == "hf_to_megatron" else 67) - 4
    assert not (tmp_path / ".out.incomplete").exists()
    same = compare(open_model(tmp_path / "out"), open_model(model_folder("qwen3")[0]))
    assert all(difference.equal for difference in same)


def test_values_that_are_not_finite_are_named_and_nothing_is_left(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder("qwen3")
    source = shutil.copytree(folder, tmp_path / "source")
    name = "model.layers.5.mlp.up_proj.weight"
    broken = tensors[name].clone()
    broken[7, 3] = float("nan")
    save_file({**tensors, name: broken}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.5.mlp.up_proj.weight holds 1 values that are not finite"):
        to_megatron(source, tmp_path / "out")
    broken[7, 3] = 1e6
    save_file({**tensors, name: broken}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite as torch.float16"):
        to_megatron(source, tmp_path / "out", dtype=torch.float16)
    wide = to_megatron(source, tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"layers.5.mlp.up_proj.weight holds 1 values .* torch.float16"):
        to_hf(wide, tmp_path / "out", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "wide"]


def test_broken_sources_are_named_and_nothing_is_left(
    model_folder: ModelFolder, converted: Path, tmp_path: Path
) -> None:
    def attempt(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            to_hf(converted, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["mcore"]

    file = converted / "__0_3.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    # The last item of the file is an extra state, which nobody reads; the last tensor ends before it.
    file.write_bytes(content[: len(content) // 2])
    attempt(r"__0_3.distcp is truncated: .* ends at")
    file.unlink()
    attempt(r"__0_3.distcp is missing \(decoder.layers")
    file.write_bytes(content[:64] + b"\xff" * 64 + content[128:])
    attempt(r"__0_3.distcp: decoder.layers.* cannot be read")
    file.write_bytes(content)
    for name in (".metadata", "metadata.json"):
        hidden = (converted / name).rename(tmp_path / "mcore" / "elsewhere")
        attempt(f"{name} is missing")
        hidden.rename(converted / name)
    (converted / ".metadata").write_bytes(b"\x80\x04cos\nsystem\nq\x00.")
    attempt("the index is damaged: .*os.system has no place in a checkpoint index")


def test_a_checkpoint_must_fit_its_config(model_folder: ModelFolder, converted: Path, tmp_path: Path) -> None:
    config_path = converted / "hf" / "config.json"
    config = json.loads(config_path.read_text())
    changes = {
        "num_hidden_layers": 4,
        "hidden_size": 40,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "tie_word_embeddings": True,
    }
    for field, value in changes.items():
        config_path.write_text(json.dumps(config | {field: value, "layer_types": None}))
        with pytest.raises(CheckpointError, match=r"config.json says|is extra"):
            to_hf(converted, tmp_path / "out")
    shutil.rmtree(converted / "hf")
    with pytest.raises(CheckpointError, match=r"has no hf/config.json; name a model folder with --hf-config"):
        to_hf(converted, tmp_path / "out")


def test_impossible_requests_are_refused(model_folder: ModelFolder, converted: Path, tmp_path: Path) -> None:
    folder, _ = model_folder("qwen3")
    with pytest.raises(ValueError, match=r"parallel.tp must divide num_attention_heads \(8\), got 3"):
        to_megatron(folder, tmp_path / "out", Layout(tp=3))
    with pytest.raises(ValueError, match=r"output folder must not exist, but .*mcore does"):
        to_megatron(folder, converted)
    with pytest.raises(ValueError, match=r"output folder must not exist, but .*mcore does"):
        to_hf(converted, converted)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        to_megatron(tmp_path / "nowhere", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


def test_tools_convert_and_check(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder("qwen3")
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    result = run_tool("hf_to_megatron", folder, mcore, "--tp", 2, "--pp", 2, "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    assert f"wrote {mcore}" in result.stdout
    assert "100%" in result.stderr
    result = run_tool("megatron_to_hf", mcore, back, "--max-file-gb", "1e-4")
    assert result.returncode == 0, result.stderr
    # Both kinds, tensor by tensor, and Megatron's forward pass against Hugging Face's.
    ids = ",".join(str(7 * i % 200) for i in range(1, 40))
    result = run_tool("check_checkpoint", mcore, back, "--logprobs", "--token-ids", ids)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(tensors)} of {len(tensors)} tensors equal" in result.stdout
    assert "log-probs of A in Megatron and of B in Hugging Face" in result.stdout


def test_differences_are_measured(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder, tensors = model_folder("mistral")
    other = shutil.copytree(folder, tmp_path / "other")
    name = "model.layers.3.self_attn.k_proj.weight"
    changed = tensors[name] * 1.01
    save_file({**tensors, name: changed}, other / "model.safetensors")
    differences = {d.name: d for d in compare(open_model(folder), open_model(other))}
    assert [d.name for d in differences.values() if not d.equal] == [name]
    assert differences[name].relative_norm == pytest.approx(0.01, rel=1e-3)
    assert differences[name].max_abs == pytest.approx(float(tensors[name].abs().max()) * 0.01, rel=1e-3)
    assert run_tool("check_checkpoint", folder, other).returncode == 1
    assert run_tool("check_checkpoint", folder, other, "--norm", 0.02).returncode == 0
    broken = tensors[name].clone()
    broken[0, 0] = float("inf")
    save_file({**tensors, name: broken}, other / "model.safetensors")
    result = run_tool("check_checkpoint", other, other)
    assert result.returncode == 1
    assert "not finite 1/1" in result.stdout


def test_different_models_are_not_compared(model_folder: ModelFolder) -> None:
    with pytest.raises(CheckpointError, match=r"different models: family \('qwen3', 'mistral'\), head_dim \(16, 8\)"):
        next(compare(open_model(model_folder("qwen3")[0]), open_model(model_folder("mistral")[0])))


def test_memory_is_bounded_by_the_largest_tensors(tmp_path: Path) -> None:
    """Anonymous memory at its peak, both ways: below two of the largest parameters (1.5 were seen)."""
    config = {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = Mapping(ModelShape.from_hf(config), layout=Layout(), naming="local").hf_tensors()
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    largest = 4 * 8192 * 1024
    total = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total > 12 * largest
    script = textwrap.dedent(f"""
        import threading, time
        from megatron_rlvr.weights.conversion import Team, hf_to_megatron, megatron_to_hf
        from megatron_rlvr.weights.layout import Layout
        def anonymous():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
        def peak(work):
            base, highest, stop = anonymous(), 0, threading.Event()
            def watch():
                nonlocal highest
                while not stop.wait(0.001):
                    highest = max(highest, anonymous() - base)
            watcher = threading.Thread(target=watch)
            watcher.start()
            work()
            stop.set()
            watcher.join()
            return highest
        quiet = lambda done, total: None
        hf, mcore, back = {str(folder)!r}, {str(tmp_path / "mcore")!r}, {str(tmp_path / "back")!r}
        print(peak(lambda: hf_to_megatron(hf, mcore, layout=Layout(), dtype=None, team=Team(), progress=quiet)))
        print(peak(lambda: megatron_to_hf(mcore, back, dtype=None, hf_config=None, team=Team(), progress=quiet)))
    """)
    result = subprocess.run(
        [sys.executable, "-c", script],
        # Freed tensors of this size would otherwise stay in the allocator's heap; larger ones never do.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        assert int(line) < 2 * largest, f"{int(line) / largest:.2f} of the largest tensor"
