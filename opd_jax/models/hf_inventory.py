"""Compare the tensors of a folder with those that its config.json requires: missing, misnamed, unused.

A tensor that nothing reads may be a buffer, or a part of the model that this decoder does not have.
Only the second kind changes logits, and only that kind is refused (docs/models.md has the table).
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from opd_jax.errors import ModelError
from opd_jax.models.config import ModelConfig
from opd_jax.models.hf_names import EMBEDDING, HEAD, is_known
from opd_jax.models.safetensors_files import FLOATS, Tensor

# Tensors that do not affect the logits of text: the first pattern that matches a name gives its purpose.
_UNUSED = (
    (r"rotary_emb\.\w+$|rope\.freqs$", "computed from config.json"),
    (r"self_attn\.(masked_)?bias$", "causal masks"),
    (r"self_attn\.[kv]_scale$", "scales of 8-bit caches"),
    (r"^model\.(vision|visual|image|mm_|multi_modal|audio|speech)", "images and sound"),
    (r"^(model\.)?mtp", "multi-token prediction"),
)
_DECODER = re.compile(r"^(model|lm_head)\.")
# The decoder inside a wrapper, with another prefix than its own.
_WRAPPED = re.compile(
    r"^((base_model|model|module|policy|transformer|language_model|_\w+)\.)*"
    r"(layers\.\d+|embed_tokens|norm|lm_head)\."
)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_SHOWN = 4  # kinds of tensors that a line names


def has_own_head(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the folder has both a head and an embedding, and their numbers differ."""
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    head = tensors[HEAD]
    return head.stored not in FLOATS or not head.equals(tensors[EMBEDDING])


def unread(
    path: str, config: ModelConfig, tensors: Mapping[str, Tensor], required: Iterable[str]
) -> list[str]:
    """Return one line that names the tensors besides `required`, by kind; [] where there are none.

    Raises ModelError for those that would change the logits: layers beyond `num_layers`, and any tensor of
    the decoder that is not known to be unused. Biases of zeros change nothing.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(tensors.keys() - set(required)):
        kinds.setdefault(_purpose(tensors[name], config), []).append(name)
    if beyond := kinds.get("layers"):
        last = max(int(number) for name in beyond for number in _LAYER.findall(name))
        raise ModelError(
            f"{path}: holds layers up to {last} (counted from 0), config.json has num_hidden_layers="
            f"{config.num_layers}: the others would change the logits; correct config.json, or remove them"
        )
    if foreign := kinds.get("logits"):
        raise ModelError(
            f"{path}: holds {_named(foreign)}, which a {config.model_type} model does not have and which "
            f"would change the logits{_remedy(foreign)}"
        )
    kinds_shown = [f"{_named(names)} ({purpose})" for purpose, names in kinds.items()]
    return [f"not read: {'; '.join(kinds_shown)}"] if kinds_shown else []


def missing(path: str, name: str, tensors: Mapping[str, Tensor]) -> ModelError:
    """Return the error for a missing tensor; it names the tensors that the folder has instead."""
    text = f"{path}: tensor {name} is missing, config.json asks for it"
    spare = sorted(other for other in tensors if not is_known(other))
    core = name.removeprefix("model.")
    alike = min(
        (other for other in spare if _extra(core, other) is not None), key=len, default=None
    )
    if alike is not None:
        return ModelError(f"{text}; the folder has {alike}{_prefix(name, alike, tensors)}")
    use = "use a checkpoint with transformers' names"
    if spare and len(spare) == len(tensors):
        names = _named(spare)
        return ModelError(
            f"{text}; the folder has {len(spare)} tensors of other names ({names}): {use}"
        )
    if near := difflib.get_close_matches(name, spare, n=1, cutoff=0.8):
        return ModelError(f"{text}; the folder has {near[0]}: {use}")
    layers = [int(number) for other in tensors for number in _LAYER.findall(other)]
    layer = _LAYER.match(name)
    if layer and layers and int(layer[1]) > max(layers):
        return ModelError(
            f"{text}; the folder has layers up to {max(layers)} (counted from 0): correct "
            "num_hidden_layers, or download the folder again"
        )
    return ModelError(f"{text}; download the folder again")


def _purpose(tensor: Tensor, config: ModelConfig) -> str:
    """Return the purpose of a tensor that nothing reads; "layers" and "logits" if it must not be ignored."""
    layer = _LAYER.match(tensor.name)
    if layer and int(layer[1]) >= config.num_layers:
        return "layers"
    for pattern, purpose in _UNUSED:
        if re.search(pattern, tensor.name):
            return purpose
    if tensor.name == HEAD:  # the decoder is tied: has_own_head compared the two
        return "equal to the embedding, tied"
    if not _DECODER.match(tensor.name) and not _WRAPPED.match(tensor.name):
        return "outside the decoder"
    return "zeros" if tensor.name.endswith(".bias") and tensor.is_zero() else "logits"


def _named(names: list[str]) -> str:
    """Return the names, with `*` for the number of a layer, each once with its count."""
    counts = Counter(_LAYER.sub("model.layers.*.", name) for name in names)
    shown = [
        f"{name} in {count} layers" if count > 1 else name
        for name, count in list(counts.items())[:_SHOWN]
    ]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more kinds" if rest else "")


def _remedy(names: list[str]) -> str:
    """Return what to do about tensors that would change the logits."""
    if any(".lora_" in name for name in names):
        return ": they belong to an adapter that is not merged; merge it and save the model again"
    if any(re.search(r"scale|zeros|g_idx", name) for name in names):
        return ": the weights are quantised; use a checkpoint that is not"
    if not any(_DECODER.match(name) for name in names):
        return "; save the model inside its wrapper, or remove these tensors if they are not needed"
    return "; use a checkpoint of that architecture, or remove these tensors if they are not needed"


def _extra(name: str, other: str) -> list[str] | None:
    """Return the parts of `other` that `name` lacks, if it has all parts of `name` in order; else None."""
    parts = iter(other.split("."))
    extra: list[str] = []
    for required in name.split("."):
        for part in parts:
            if part == required:
                break
            extra.append(part)
        else:
            return None
    return None if list(parts) else extra


def _prefix(name: str, alike: str, tensors: Mapping[str, Tensor]) -> str:
    """Describe how `alike` differs from `name`, how many names do, and the remedy."""
    own = "model." if name.startswith("model.") else ""
    core = name.removeprefix(own)
    if alike == core:
        return f": its names lack the prefix {own!r}; save the model as ...ForCausalLM, not its base model"
    if alike.endswith(f".{core}"):
        full = alike.endswith(f".{name}")
        prefix = alike.removesuffix(name if full else core)
        count = sum(other.startswith(prefix) for other in tensors)
        where = f"{count} of {len(tensors)} names have the prefix {prefix!r}"
        where += "" if full else f" where {own!r} is wanted"
    else:
        extra = ".".join(_extra(name, alike) or _extra(core, alike) or [])
        where = f"its names have {extra!r} inside"
    return f": {where}; save the model inside the wrapper, or rename the tensors"
