"""From a model's name to a loaded model: local folder, GGUF file, hub id, or the default model out of its wheel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.models.default import (
    DATA_ONLY,
    DEFAULT_CONFIG,
    DEFAULT_FOLDER,
    MANIFEST,
    _require_default,
    _require_gguf,
    default_model,
)
from kvcompile.models.forks import read_config
from kvcompile.models.gguf_settings import take_settings
from kvcompile.models.outside import outside
from kvcompile.progress import Progress, no_foreign_bars, silent

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from kvcompile.config.schema import ModelConfig
    from kvcompile.models.gguf import Contents

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
CHECKPOINT = "model.pretrained=<folder with config, safetensors and tokenizer, .gguf file or hub id>"
PACKAGE = "install what reads weights of this kind, or use a checkpoint that is not quantised"
PIECE, PIECES = 4096, 256  # bytes, and how many of them are read of a file to tell it from others
ALIGNMENT = 64  # bytes: where torch lets a tensor begin


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
        if model.architecture:
            config = read_config(source, model.architecture, options)
        else:
            config = AutoConfig.from_pretrained(source, **options)
        if file := _gguf(source, options):
            take_settings(file.settings, config)
            file.take_rope(config)
            file.take_window(config)
        return config


def load(
    model: ModelConfig, progress: Progress = silent, architecture: PretrainedConfig | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model, in eval mode on its device, and its tokenizer.

    architecture: its configuration, where `config_of` has read it (None: it is read with the weights).
    dtype `auto`: float32 on CPU, the checkpoint's own on an accelerator. device `auto`: cuda if there is one, else cpu.
    Raises KvcompileError where anything is missing, or weights are not in memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    device = device_of(model)
    dtype = _dtype(model, device)
    source, options = _place(model, progress)
    what = f"loading {model.pretrained or DEFAULT_FOLDER}"
    progress(what, 0, 0)
    with _plain_errors(model), no_foreign_bars():
        file = _gguf(source, options)
        if architecture is None and (file or model.architecture):
            architecture = config_of(model)
        known: dict[str, Any] = {}
        if architecture is not None and model.pretrained is not None:
            known["config"] = architecture
        tokenizer = AutoTokenizer.from_pretrained(source, **(known if model.architecture else {}), **options)
        if file:  # as floats, also where a kernel for blocks is installed
            known["quantization_config"] = GgufConfig(dequantize=True)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **known, **options
        )
    _require_whole(model, info)
    if file:
        file.require_taken(loaded)
        loaded = _unquantised(loaded)
    require_weights(loaded)
    require_vocabulary(loaded, tokenizer)
    progress(what, 1, 1)
    return loaded.to(device).eval(), tokenizer


def tokenizer_of(model: ModelConfig, progress: Progress = silent) -> Any:
    """The tokenizer of the model, without its weights. Raises KvcompileError where it cannot be found."""
    from transformers import AutoTokenizer

    source, options = _place(model, progress)
    known = {"config": config_of(model)} if model.architecture else {}
    with _plain_errors(model), no_foreign_bars():
        return AutoTokenizer.from_pretrained(source, **known, **options)


def fingerprint_of_files(model: ModelConfig, architecture: PretrainedConfig, progress: Progress = silent) -> str:
    """What tells the checkpoint from others before it is loaded: a hash of pieces of its files, or its hub commit."""
    source, options = _place(model, progress)
    folder = Path(source)
    if not folder.is_dir():
        return f"{source}@{getattr(architecture, '_commit_hash', None) or options.get('revision')}"
    names = [options["gguf_file"]] if "gguf_file" in options else [p.name for p in sorted(folder.iterdir())]
    found = hashlib.sha256(json.dumps(architecture.to_diff_dict(), sort_keys=True, default=str).encode())
    for path in (folder / name for name in names):
        if path.suffix in WEIGHTS and path.is_file():
            size = path.stat().st_size
            found.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(PIECE, size // PIECES)):
                    file.seek(start)
                    found.update(file.read(PIECE))
    return found.hexdigest()


def _place(model: ModelConfig, progress: Progress) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for the model, which is fetched first if it is the default one."""
    if model.pretrained is None:
        _require_default(model)
        return str(default_model(progress)), DATA_ONLY
    return _source(model)


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


def require_one_device(model: PreTrainedModel) -> None:
    """Raise KvcompileError for a model that a `device_map` spreads over several devices."""
    mapped = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    places = mapped if len(mapped) > 1 else {str(p.device) for p in model.parameters()}
    if len(places) > 1:
        raise KvcompileError(
            "a compiled model lies on one device",
            f"weights on {', '.join(sorted(places))}",
            "from_pretrained(...) without device_map, or with device_map=<one device>",
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


def _gguf(source: str, options: dict[str, Any]) -> Contents | None:
    """What the GGUF file says that transformers does not read; None for another checkpoint."""
    if "gguf_file" not in options:
        return None
    from kvcompile.models.gguf import contents

    return contents(Path(source, options["gguf_file"]))


def _source(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for the given `pretrained`: its first argument and its options."""
    outside()  # transformers must know the models of other packages before it reads one
    pretrained = str(model.pretrained)
    path = Path(pretrained).expanduser()
    if path.is_dir():
        if Path(path, MANIFEST).is_file() and Path(path, "recipe.yaml").is_file():
            raise KvcompileError(
                "model.pretrained must be a checkpoint that was not compiled",
                f"{pretrained}: an artifact",
                f"kvcompile.load opens it, artifact={pretrained} exports it",
            )
        return str(path), DATA_ONLY
    if path.suffix == ".gguf" and path.is_file():
        _require_gguf()
        return str(path.parent), {"gguf_file": path.name, **DATA_ONLY}
    if path.is_absolute() or pretrained.startswith(("~", ".")) or path.suffix == ".gguf" or pretrained.count("/") > 1:
        raise KvcompileError(
            "model.pretrained must be a folder, a .gguf file or a hub id", f"{pretrained}: no such path"
        )
    return pretrained, {"revision": model.revision, **DATA_ONLY} if model.revision else DATA_ONLY


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
        if "ignore_mismatched_sizes" in said:
            said = "weights of other sizes than its config says"
        raise KvcompileError(
            f"model.pretrained={model.pretrained} could not be loaded",
            f"{type(error).__name__}: {said}",
            PACKAGE if isinstance(error, ImportError) else CHECKPOINT,
        ) from error


def device_of(model: ModelConfig) -> Any:
    """The device that a model goes to. Raises KvcompileError for none of this machine."""
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
    # `.to(dtype)` would round the angles of rotary positions, which stay float32
    clean = type(loaded)._from_config(type(loaded.config)(**settings), dtype=loaded.dtype)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.config._name_or_path = loaded.config._name_or_path
    return clean
