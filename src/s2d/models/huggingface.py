"""Loading through the transformers library, without its noise and with its errors as one line each."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.io.files import JSON, read_json
from s2d.models.hub import offline
from s2d.models.packages import WEIGHT_SUFFIXES, suggestions
from s2d.models.quiet import no_garbage_collection, quiet
from s2d.models.saved import (
    CONFIG_NAME,
    check_safetensors,
    explain_unpickling,
    own_tokenizer,
    read_weights,
    refuse_foreign_code,
    register_architecture,
)
from s2d.optional import require

# Which automatic class keeps the head that a checkpoint was saved with; without one, the bare encoder is loaded.
_HEADS: tuple[tuple[str, str], ...] = (
    (r"For\w*ImageClassification\w*", "AutoModelForImageClassification"),
    (r"ForSequenceClassification", "AutoModelForSequenceClassification"),
    (r"ForObjectDetection", "AutoModelForObjectDetection"),
    (r"(ForCausalLM|LMHeadModel)", "AutoModelForCausalLM"),
    (r"ForConditionalGeneration", "AutoModelForImageTextToText"),
)
_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_transformers(
    source: str,
    *,
    shown: str,
    gguf_file: str | None = None,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[nn.Module, Any, Any]:
    """A model with its tokenizer and its processor (None where it has none).

    Args:
        source: A local folder, or a name on the hub.
        shown: What the user asked for, for error lines.
        gguf_file: File within `source` that holds model and tokenizer; its weights are dequantized.
        weights: Weights to use with the configuration in `source`, instead of the folder's own.
        dtype: Type of the weights.
        trust_remote_code: Run model code that comes with the checkpoint.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: Anything about the checkpoint that stands in the way.
    """
    transformers = require("transformers", "hf")
    if gguf_file is not None:
        require("gguf", "hf")
    folder = Path(source) if Path(source).is_dir() else None
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if folder is None:
        options["local_files_only"] = offline()
        if revision is not None:
            options["revision"] = revision
    elif gguf_file is None:
        _check_folder(folder, weights)
    if gguf_file is not None:
        options["gguf_file"] = gguf_file

    with quiet(transformers), no_garbage_collection():
        try:
            config = transformers.AutoConfig.from_pretrained(source, **options)
            refuse_foreign_code(config, shown)
            auto_class, arguments = _model_class(transformers, config, of_gguf=gguf_file is not None)
            arguments |= {
                "config": config,
                "dtype": dtype,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,  # reported below, with both shapes, instead of raised without
            }
            if weights is None:
                model, report = auto_class.from_pretrained(source, **options, **arguments)
            else:  # only the concrete class takes weights without a folder
                state = _named_like_the_model(read_weights(weights))
                with torch.device("meta"):
                    concrete = type(auto_class.from_config(config, trust_remote_code=trust_remote_code))
                model, report = concrete.from_pretrained(None, state_dict=state, **arguments)
        except InputError:
            raise
        except ImportError as error:
            raise InputError(f"{shown} needs a library that is missing: {_one_line(error)}") from error
        except _FAILURES as error:
            raise InputError(_explain(error, shown, folder, bool(options.get("local_files_only")))) from error
        _check_report(model, report, shown)
        tokenizer = _tokenizer(transformers, source, options)
        processor = _processor(transformers, source, options)
    return model, tokenizer, processor


def load_parts(folder: Path, model: nn.Module) -> tuple[Any, Any]:
    """The tokenizer and the processor that a local folder holds for a model, None where there is none."""
    tokenizer, processor = _saved_parts(folder)
    return tokenizer or own_tokenizer(model), processor


def _saved_parts(folder: Path) -> tuple[Any, Any]:
    files = {file.name for file in folder.iterdir()}
    if not files & {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"}:
        return None, None
    transformers = require("transformers", "hf")
    options = {"trust_remote_code": False}
    with quiet(transformers), no_garbage_collection():
        return _tokenizer(transformers, str(folder), options), _processor(transformers, str(folder), options)


def _model_class(transformers: Any, config: Any, *, of_gguf: bool) -> tuple[Any, dict[str, Any]]:
    """The automatic class for a configuration, and what to pass to the model's constructor."""
    if of_gguf and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:  # a GGUF does not say which head it has
        return transformers.AutoModelForCausalLM, {}
    for architecture in getattr(config, "architectures", None) or ():
        if architecture.endswith("EncoderModel") and hasattr(transformers, architecture):
            return getattr(transformers, architecture), {}  # half of what its configuration describes (T5)
        for pattern, auto_class in _HEADS:
            if re.search(pattern + "$", architecture) and hasattr(transformers, auto_class):
                return getattr(transformers, auto_class), {}
    if type(config) not in transformers.MODEL_MAPPING:  # code of its own, or unknown: transformers decides or refuses
        return transformers.AutoModel, {}
    model_class = transformers.MODEL_MAPPING[type(config)]
    constructor = getattr(model_class, "__init__", None)
    # The pooler of a sentence encoder is not part of its embedding, and many checkpoints do not even hold one.
    takes_pooler = "add_pooling_layer" in getattr(getattr(constructor, "__code__", None), "co_varnames", ())
    return transformers.AutoModel, {"add_pooling_layer": False} if takes_pooler else {}


def _check_folder(folder: Path, weights: Path | None) -> None:
    """Check a folder before transformers reads it, with clearer error messages than its own."""
    read_json(folder / "config.json")
    if weights is not None:
        return
    files = [file for file in sorted(folder.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
    if not files:
        raise InputError(f"{folder} has a config.json but no weights (*.safetensors); copy or download them again")
    for file in files:
        if file.suffix == ".safetensors":
            check_safetensors(file)


def _check_report(model: nn.Module, report: Any, shown: str) -> None:
    """Refuse a checkpoint that would leave weights at random values, or of which blocks would be dropped."""
    kind = type(model).__name__
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise InputError(
            f"{shown}: {name} is {tuple(found)} in the weights but {tuple(wanted)} by config.json "
            f"({len(mismatched)} weights differ); configuration and weights do not belong together"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{shown}: the weights lack {len(missing)} tensors of a {kind}, e.g. {missing[0]}; "
            "they are of another architecture or incomplete"
        )
    own = {_pattern(name) for name in model.state_dict()}
    dropped = sorted(name for name in report["unexpected_keys"] if _pattern(name) in own)
    if dropped:
        raise InputError(
            f"{shown}: the weights hold {len(dropped)} tensors more than config.json describes, e.g. {dropped[0]}; "
            "configuration and weights do not belong together"
        )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _named_like_the_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State-dict names without the prefix that data-parallel training adds."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _explain(error: BaseException, shown: str, folder: Path | None, offline: bool) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{shown} comes with model code of its own; read it, and pass trust_remote_code=True if you trust it"
    if isinstance(error, pickle.UnpicklingError):
        return explain_unpickling(shown, error)
    if "model type" in text and "does not recognize" in text or "Unrecognized model" in text:
        found = re.search(r"model type `([^`]*)`", text)
        kind = f"model type {found.group(1)!r}" if found else "kind of model"
        return f"{shown}: transformers {_version()} does not know its {kind}; upgrade transformers or check config.json"
    if "GGUF" in text and "not supported" in text:
        return f"{shown}: {_one_line(error)} Take the model's original weights (a folder with config.json)"
    if (kind := re.search(r"Dequantization for (\w+) is not", text)) is not None:
        return (
            f"{shown}: its weights are of the GGUF type {kind[1]}, which cannot be read; take a file of another type, "
            "such as Q8_0, Q4_K_M or F16, or the original weights"
        )
    if folder is not None:
        return f"cannot load {shown}: {_one_line(error)}"
    if "is not a local folder and is not a valid model identifier" in text or "Repository Not Found" in text:
        return (
            f"there is no model {shown!r}: not a folder or file here, not an installed package, not on the hub; "
            + suggestions(shown)
        )
    if offline or "connect" in text or "offline" in text:
        return (
            f"there is no model {shown!r} here: not a folder or file, not an installed package, not downloaded before "
            f"(the hub is out of reach or switched off); {suggestions(shown)}"
        )
    return f"cannot load {shown}: {_one_line(error)}"


def _tokenizer(transformers: Any, source: str, options: dict[str, Any]) -> Any:
    """The tokenizer, or None for a model without one (images)."""
    if Path(source).is_dir() and "gguf_file" not in options:
        files = {file.name for file in Path(source).iterdir()}
        if not files & {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model"}:
            return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except ImportError as error:
        raise InputError(f"the tokenizer of {source} needs a library that is missing: {_one_line(error)}") from error
    except Exception as error:  # the tokenizers library raises nothing more special
        if Path(source).is_dir():
            raise InputError(f"cannot read the tokenizer of {source}: {_one_line(error)}") from error
    return None


def _processor(transformers: Any, source: str, options: dict[str, Any]) -> Any:
    """The image processor, or None for a model without one (text)."""
    if "gguf_file" in options:
        return None
    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(source, **options)
    except ImportError:  # pillow or torchvision; whoever needs images says so, the weights can be worked on without
        return None
    except _FAILURES as error:
        if Path(source).is_dir():
            raise InputError(f"cannot read the image processor of {source}: {_one_line(error)}") from error
    return None


def _version() -> str:
    return str(require("transformers", "hf").__version__)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# Their results differ in the last bits.
_ATTENTION = ("eager", "sdpa")
_EXPERTS = ("eager", "grouped_mm", "batched_mm")


def _describe_transformers(model: Any) -> JSON:
    kwargs = {}
    if getattr(model, "pooler", True) is None:
        kwargs["add_pooling_layer"] = False
    found = {"class": type(model).__name__, "config": model.config.to_dict(), "arguments": kwargs}
    attention = getattr(model.config, "_attn_implementation", None)
    experts = getattr(model.config, "_experts_implementation", None)
    found |= {"attention": attention} if attention in _ATTENTION else {}
    return found | ({"experts": experts} if experts in _EXPERTS else {})


def _rebuild_transformers(description: JSON) -> nn.Module:
    transformers = require("transformers", "hf")
    model_class = getattr(transformers, description["class"], None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise InputError(f"this transformers ({transformers.__version__}) has no model class {description['class']!r}")
    config = model_class.config_class.from_dict(description["config"])
    refuse_foreign_code(config, CONFIG_NAME)
    if description.get("attention") in _ATTENTION:
        config._attn_implementation = description["attention"]
    if description.get("experts") in _EXPERTS:
        config._experts_implementation = description["experts"]
    return model_class(config, **description["arguments"])


def _is_transformers(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.") and hasattr(model, "config")


register_architecture(
    "transformers", matches=_is_transformers, describe=_describe_transformers, rebuild=_rebuild_transformers
)
