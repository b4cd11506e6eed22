"""Which model an evaluation is of: a Hugging Face folder, a run, a checkpoint, or whatever running servers hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from megatron_rlvr.report.metrics_writer import METRICS_FILE
from megatron_rlvr.report.run_directory import RESOLVED_CONFIG
from megatron_rlvr.weights.hf_config import ModelShape

MODEL_DIR, EXPORT_DIR, CHECKPOINT_DIR = "model", "export", "checkpoints"
TORCH_DIST_MARK, HF_PART = ".metadata", "hf"
CONVERTED_DIR = "converted"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """A Hugging Face folder and where it comes from."""

    path: Path
    source: str
    """What the user gave and what was found there, for people."""
    identity: str
    """Changes when the weights change: names, sizes and times of their files."""
    name: str
    """For the folder of the results."""


def find_model(given: str, *, converted: Path, on_convert: Callable[[str], None]) -> ModelFolder:
    """The model behind ``model.path``.

    A Hugging Face folder is taken as it is. Of a run's folder the trained model is taken (``model``), else what has the
    most steps: the newest export or the newest complete checkpoint. A Megatron checkpoint is converted into a Hugging
    Face folder under `converted`, once.

    Args:
        given: the path.
        converted: folder for conversions.
        on_convert: told what is converted.

    Raises:
        ValueError: the path is none of these; says what was looked for.
    """
    folder = Path(given)
    if not folder.is_dir():
        raise ValueError(f"model.path must be an existing folder, got {given!r}")
    folder = folder.resolve()
    if _is_hugging_face(folder):
        return _taken(folder, source=str(folder), name=folder.name)
    if _torch_dist_part(folder) is not None:
        return _convert(folder, converted, on_convert)
    if (folder / METRICS_FILE).is_file() or (folder / RESOLVED_CONFIG).is_file():
        return _of_run(folder, converted, on_convert)
    raise ValueError(
        f"model.path must be a Hugging Face folder (config.json and *.safetensors), a Megatron checkpoint "
        f"({TORCH_DIST_MARK}) or a run's folder ({METRICS_FILE}), got {given!r}, which holds none of these"
    )


def _is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _of_run(run: Path, converted: Path, on_convert: Callable[[str], None]) -> ModelFolder:
    name = f"{run.parent.name}-{run.name}"
    if _is_hugging_face(run / MODEL_DIR):
        return _taken(run / MODEL_DIR, source=f"{run}, its trained model", name=name)
    exports = [path for path in sorted((run / EXPORT_DIR).glob("step_*")) if _is_hugging_face(path)]
    # A checkpoint that is still being written has another name (config/checkpoints.py).
    checkpoints = [path for path in sorted((run / CHECKPOINT_DIR).glob("step_*")) if _torch_dist_part(path)]
    # Names have six digits: their order is that of the steps.
    if exports and (not checkpoints or exports[-1].name >= checkpoints[-1].name):
        return _taken(exports[-1], source=f"{run}, its export {exports[-1].name}", name=f"{name}-{exports[-1].name}")
    if checkpoints:
        return _convert(checkpoints[-1], converted, on_convert)
    raise ValueError(
        f"model.path: the run {run} has neither a trained model ({MODEL_DIR}/, train.save_hf) nor an export "
        f"({EXPORT_DIR}/) nor a complete checkpoint ({CHECKPOINT_DIR}/)"
    )


def _torch_dist_part(folder: Path) -> Path | None:
    """The folder itself, or the one of its subfolders, that is a Megatron checkpoint."""
    found = [path for path in [folder, *sorted(folder.iterdir())] if (path / TORCH_DIST_MARK).is_file()]
    return found[0] if found else None


def _convert(checkpoint: Path, converted: Path, on_convert: Callable[[str], None]) -> ModelFolder:
    """Converts once; the result is kept under a name that changes with the checkpoint."""
    # Imported here: torch is needed for this alone.
    from megatron_rlvr.weights.conversion import Team, megatron_to_hf

    part = _torch_dist_part(checkpoint)
    assert part is not None
    identity = _identity(part, "*")
    out = converted / f"{checkpoint.name}-{identity[:12]}"
    if not _is_hugging_face(out):
        on_convert(f"converting {checkpoint} into {out}")
        converted.mkdir(parents=True, exist_ok=True)
        megatron_to_hf(
            part,
            out,
            dtype=None,
            hf_config=_config_of(checkpoint, part),
            team=Team(),
            progress=lambda done, total: None,
        )
    # <experiment>-<run>-<step> where it lies in a run.
    in_run = checkpoint.parent.name == CHECKPOINT_DIR
    names = [*checkpoint.parts[-4:-2], checkpoint.name] if in_run else [checkpoint.name]
    return ModelFolder(path=out, source=f"{checkpoint}, converted", identity=identity, name="-".join(names))


def _config_of(checkpoint: Path, part: Path) -> Path | None:
    """Folder with config.json and tokenizer; None where the checkpoint carries them itself."""
    if (part / HF_PART / "config.json").is_file():
        return None
    for near in (checkpoint / HF_PART, checkpoint):
        if (near / "config.json").is_file():
            return near
    resolved = checkpoint.parent.parent / RESOLVED_CONFIG
    if resolved.is_file():
        path = OmegaConf.select(OmegaConf.load(resolved), "model.path")
        if path is not None and (Path(path) / "config.json").is_file():
            return Path(path)
    raise ValueError(
        f"model.path: checkpoint {checkpoint} has no config.json and tokenizer beside its weights; convert it with "
        "tools/megatron_to_hf.py --hf-config FOLDER and give the result"
    )


def _taken(folder: Path, *, source: str, name: str) -> ModelFolder:
    ModelShape.from_hf(folder)
    return ModelFolder(path=folder, source=source, identity=_identity(folder, "*.safetensors"), name=name)


def _identity(folder: Path, pattern: str) -> str:
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
