"""The config as a tree of named values: flattening, the check of each value, suggestions of names."""

import difflib
import json
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config import aliases
from opd_jax.config.fields import FIELDS
from opd_jax.config.record import KINDS, Choices, Field
from opd_jax.config.trees import EXPERIMENT, MODEL, TRAINING, TREES, Tree
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


def suggest(name: str, tree: Tree = TRAINING) -> str:
    """The fields of the tree that somebody means by `name`, dotted or not; or the list of sections.

    In this order: the field that has its place in this tree, what other programs call so, what ends so,
    and what is spelt nearly so.
    """
    known = sorted(tree.fields)
    last = name.rpartition(".")[2].lower().replace("-", "_")
    ours = [name] if name in FIELDS else aliases.FIELDS.get(name) or aliases.FIELDS.get(last, [])
    ours = [tree.instead.get(field, field) for field in ours]
    if aliases.WORKDIR in ours:
        return f"a folder for results is given by the flag {aliases.WORKDIR}=DIR, or --out"
    if MODEL in ours:
        return f"the model is given by the flag {MODEL}=DIR"
    optimizer = [field for field in known if field.startswith("optim.")]
    if aliases.OPTIMIZER in ours and len(optimizer) > 1:
        return f"the optimizer is AdamW; its fields are {', '.join(optimizer)}"
    meant = [field for field in ours if field in known]
    if name not in FIELDS:
        meant = meant or [field for field in known if field.rpartition(".")[2] == last]
        meant = meant or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not meant:
        sections = {re.sub(r"\..*", ".*", field) for field in known}
        return f"known: {', '.join(sorted(sections))}"
    return f"did you mean {' or '.join(repr(field) for field in meant)}?"


def not_a_field(name: str, tree: Tree) -> ConfigError:
    """The error about a name that is no field of the tree, though maybe one of another entry point."""
    if name in FIELDS and name not in tree.fields:
        readers = " and ".join(other.program for other in TREES if name in other.fields)
        return ConfigError(
            f"config.{name} is not a field that {tree.program} reads, {readers} would; "
            f"{suggest(name, tree)}"
        )
    return ConfigError(f"config.{name} is not a field; {suggest(name, tree)}")


def explain(error: Exception, arguments: list[str], tree: Tree = TRAINING) -> ConfigError:
    """One line of ours for what ml_collections raises about a `--config` file or override.

    `tree` has the fields that the entry point reads.
    """
    known = tree.fields
    config_at = [i for i, x in enumerate(arguments) if re.match(r"--?config(=|$)", x)]
    for i, argument in enumerate(arguments):
        if re.match(r"--?config\.", argument) and config_at and i < config_at[-1]:
            return ConfigError(
                f"{argument} stands before --config, whose fields it sets; put --config=FILE first"
            )
    for argument in arguments:
        match = re.match(r"--?config\.([\w.-]+)(?:=(.*))?$", argument)
        if match and match[1] not in known:
            return not_a_field(match[1], tree)
        if match and match[2] is not None and not _parses(match[2], known[match[1]].default):
            kind = type(known[match[1]].default).__name__
            return ConfigError(
                f"config.{match[1]}={match[2]!r}, wanted a value of type {kind}, "
                f"such as {known[match[1]].default!r}"
            )
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if "opd_jax.errors." in last:  # raised inside the config file; it comes to us as a traceback
        return ConfigError(last.partition("Error: ")[2])
    if match := re.search(r"Key \"(\w+)\" does not exist", last):  # set in the config file
        if set(known) <= set(EXPERIMENT.fields):  # which is one for several entry points
            tree = EXPERIMENT
        return ConfigError(
            f"the config file sets {match[1]!r}, which is not a field; {suggest(match[1], tree)}"
        )
    if match := re.search(r"No such file or directory: '([^']+)'", last):
        hint = f"did you mean {match[1]}.py?" if pathlib.Path(f"{match[1]}.py").is_file() else (
            "give an experiment file, such as configs/stable_opd.py"
        )  # fmt: skip
        return ConfigError(f"--config={match[1]} does not exist; {hint}")
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


def check(config: ConfigDict, tree: Tree, also: Tree = EXPERIMENT) -> dict[str, Any]:
    """Return the flat config after a check of every name and every value against its record.

    The fields of `tree` have to be there; those of `also` may be, and are checked too. Raises
    ConfigError with one line: the field, what it is, what is wanted, the option that fixes it.
    """
    flat = flatten(config.to_dict())
    allowed = also.fields | tree.fields
    for name, value in flat.items():
        if name not in allowed:
            if any(field.startswith(f"{name}.") for field in allowed):
                raise ConfigError(f"config.{name} is {_shown(value)}, wanted a section of fields")
            if (above := name.rpartition(".")[0]) in allowed:
                raise wrong(above, "a section of fields", allowed[above].wanted())
            raise not_a_field(name, tree)
    for name in tree.fields:
        if name not in flat:
            raise ConfigError(f"config.{name} is missing; start from {tree.maker}")
    for name, value in flat.items():
        check_value(name, value, allowed[name])
    return flat


def check_value(name: str, value: Any, field: Field) -> None:
    """Refuse a value of the wrong type, or one that its record does not allow. Raises ConfigError."""
    allowed = field.allowed
    if isinstance(allowed, Choices):
        if isinstance(value, str) and value in allowed.refused:
            raise ConfigError(f"{name}={value} {allowed.refused[value]}")
        if not allowed.holds(value):
            names = allowed.names
            hint = difflib.get_close_matches(str(value), names, n=1) or names[:1]
            raise ConfigError(
                f"{name}={_shown(value)}, wanted {field.wanted()}; set --config.{name}={hint[0]}"
            )
        return
    if not _is_kind(value, field.default):
        tuples = isinstance(field.default, tuple)
        raise wrong(name, _shown(value), field.wanted() if tuples else KINDS[type(field.default)])
    try:
        fits, why = allowed is None or allowed.holds(value), ""
    except ValueError as error:
        fits, why = False, f" ({error})"
    if not fits:
        raise wrong(name, _shown(value), field.wanted() + why)


def _is_kind(value: Any, default: Any) -> bool:
    """Whether a value is of the type of the default: a config file may set what the flags would not."""
    kinds: Any = {float: (int, float), tuple: (tuple, list)}.get(type(default), type(default))
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if isinstance(value, int):
        fits &= abs(value) < 2**63  # a larger one fails where it is computed with
    return fits


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


def wrong(field: str, got: Any, wanted: str) -> ConfigError:
    """The error about one value: the field, what it is, what is wanted, the option that sets it."""
    return ConfigError(f"{field}={got}, wanted {wanted}; set --config.{field}=...")
