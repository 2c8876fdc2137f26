"""The config as a tree of named values: flattening, spelling suggestions, checks of one value."""

import difflib
import json
import math
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config import aliases
from opd_jax.config.fields import default
from opd_jax.errors import ConfigError


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"rollout.top_p": 1.0, ...} of a nested dict."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """Every field, resolved, as the text of config.json."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def near(name: str, known: list[str]) -> str:
    """The known name nearest to a misspelt one, or the list of all."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def suggest(name: str, known: list[str], reads: aliases.Reads = aliases.TRAINING) -> str:
    """The fields among `known` that somebody means by `name`, dotted or not; or the list of sections.

    In this order: what other programs call so, what ends so, and what is spelt nearly so; only fields
    that the entry point reads.
    """
    known = reads.of(known)
    last = name.rpartition(".")[2].lower().replace("-", "_")
    ours = aliases.FIELDS.get(name) or aliases.FIELDS.get(last, [])
    ours = [reads.instead.get(field, field) for field in ours]
    if aliases.WORKDIR in ours:
        return f"a folder for results is given by the flag {aliases.WORKDIR}=DIR, or --out"
    if aliases.MODEL in ours:
        return f"the model is given by the flag {aliases.MODEL}=DIR"
    optimizer = [field for field in known if field.startswith("optim.")]
    if aliases.OPTIMIZER in ours and optimizer:
        return f"the optimizer is AdamW; its fields are {', '.join(optimizer)}"
    meant = [field for field in ours if field in known]
    meant = meant or [field for field in known if field.rpartition(".")[2] == last]
    meant = meant or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not meant:
        sections = {re.sub(r"\..*", ".*", field) for field in known}
        return f"known: {', '.join(sorted(sections))}"
    return f"did you mean {' or '.join(repr(field) for field in meant)}?"


def explain(
    error: Exception,
    arguments: list[str],
    fields: ConfigDict | None = None,
    reads: aliases.Reads = aliases.TRAINING,
) -> ConfigError:
    """One line of ours for what ml_collections raises about a `--config` file or override.

    `fields` is the tree that the file starts from, None = the training config's; `reads` says what of
    it the entry point reads.
    """
    known = flatten((fields or default()).to_dict())
    config_at = [i for i, x in enumerate(arguments) if re.match(r"--?config(=|$)", x)]
    for i, argument in enumerate(arguments):
        if re.match(r"--?config\.", argument) and config_at and i < config_at[-1]:
            return ConfigError(
                f"{argument} stands before --config, whose fields it sets; put --config=FILE first"
            )
    for argument in arguments:
        match = re.match(r"--?config\.([\w.-]+)(?:=(.*))?$", argument)
        if match and match[1] not in known:
            return ConfigError(
                f"config.{match[1]} is not a field; {suggest(match[1], list(known), reads)}"
            )
        if match and match[2] is not None and not _parses(match[2], known[match[1]]):
            kind = type(known[match[1]]).__name__
            return ConfigError(
                f"config.{match[1]}={match[2]!r}, wanted a value of type {kind}, "
                f"such as {known[match[1]]!r}"
            )
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if "opd_jax.errors." in last:  # raised inside the config file; it comes to us as a traceback
        return ConfigError(last.partition("Error: ")[2])
    if match := re.search(r"Key \"(\w+)\" does not exist", last):  # set in the config file
        return ConfigError(f"the config file sets {match[1]!r}, which is not a field; "
                           f"{suggest(match[1], list(known))}")  # fmt: skip
    return ConfigError(f"--config cannot be read: {last.strip()}")


def _parses(text: str, example: Any) -> bool:
    if isinstance(example, bool):
        return text.lower() in ("true", "false", "1", "0", "t", "f")
    if isinstance(example, tuple):
        return True  # any text is a tuple of one
    try:
        type(example)(text)
    except ValueError:
        return False
    return True


def _check_kind(field: str, value: Any, known: Any) -> None:
    """A value has to be of the kind of the default: a config file may set what the flags would not."""
    wanted = {
        bool: "True or False", int: "a whole number", float: "a number", str: "a text",
        tuple: "a tuple",
    }[type(known)]  # fmt: skip
    kinds: Any = {float: (int, float), tuple: (tuple, list)}.get(type(known), type(known))
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(known, bool)
    if isinstance(value, int):
        fits &= abs(value) < 2**63  # a larger one fails where it is computed with
    if not fits:
        raise _wrong(field, _shown(value), wanted)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong(field: str, got: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{field}={got}, wanted {wanted}; set --config.{field}=...")


def _range(flat: dict[str, Any], field: str, low: float, high: float) -> None:
    value = flat[field]
    whole = isinstance(flatten(default().to_dict())[field], int)
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise _wrong(field, value, f"a {'whole ' if whole else ''}number, {wanted}")
    if value == math.inf:
        raise _wrong(field, value, "a finite number")


def _choice(flat: dict[str, Any], field: str, choices: tuple[str, ...]) -> None:
    if flat[field] not in choices:
        hint = difflib.get_close_matches(str(flat[field]), choices, n=1) or choices[:1]
        raise ConfigError(
            f"{field}={flat[field]!r}, wanted one of {', '.join(choices)}; "
            f"set --config.{field}={hint[0]}"
        )
