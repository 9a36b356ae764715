"""Sparse update schemes: which parameters a program trains, and which input channels of their weights.

A scheme is a preset, a join of presets, or a YAML file:

    name: my-scheme
    family: mobilenet_v2        # optional: refuse models of another family
    update:                     # rules add up; where two match one tensor, the larger channel fraction wins
      - "classifier.*"          # a glob on parameter names: `*` crosses dots, [2-8] is one character
      - preset: head            # what a preset updates
      - tensors: "features.1[2-7].conv.0.0.weight"       # one glob or a list of them
        channels: {fraction: 0.5, select: magnitude, seed: 0}
      - blocks: {pattern: "encoder.layer.{}.", last: 6, of: 12}
        tensors: ["*.bias", "attention.self.*.weight"]   # globs on what follows the block's prefix
    freeze: ["features.0.*"]    # wins over update

`blocks` finds the repeated blocks of a model of any depth: each `{}` stands for a number, and the pattern may begin
after any dot of a name. `last: 6` takes the last six in order of definition; `last: 6, of: 12` scales with the depth
(three of six), never below one. A rule may say `optional: true` (matching nothing is no error) and
`tied: skip` (leave out tensors that the model uses under several names: training a head that is also the input
embedding would pull the gradient through the whole network).

Presets: `full`; `bias-only` (every tensor whose name ends in `bias`, nothing else); `head` (weight and bias of the last
linear layer) or `head:<module>`; `last-k:<n>` (the last n modules that own parameters, in order of definition);
`sparse` (the published scheme of the model's family, from pockc/schemes); `a+b` joins presets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pockc.errors import UserError, near_names

Shapes = Mapping[str, tuple[int, ...]]
Selection = dict[str, "Channels | None"]

_PRESETS = "full, bias-only, head, head:<module>, last-k:<n>, sparse, joined with +, or a .yaml file"
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Channels:
    """The part of a weight that is updated: a fraction of its input channels (of all channels, if depthwise).

    ``first`` takes the first ones, ``magnitude`` those of the largest L2 norm, ``random`` a seeded sample.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    fraction: Annotated[float, Field(gt=0, le=1)]
    select: Literal["first", "magnitude", "random"] = "first"
    seed: int = 0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Blocks(_Strict):
    """Repeated blocks: those whose parameter names hold ``pattern``, the last ``last`` (of ``of``) of them."""

    pattern: str
    last: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _has_placeholder(self) -> Blocks:
        if "{}" not in self.pattern or not self.pattern.endswith("."):
            raise ValueError("a block pattern holds {} for the number and ends with a dot, as in 'layer.{}.'")
        return self

    def prefixes(self, names: Iterator[str]) -> list[str]:
        """The selected blocks' name prefixes, in order of definition."""
        number = r"\d+".join(re.escape(part) for part in self.pattern.split("{}"))
        expression = re.compile(rf"(?:^|.*?\.){number}")
        found = list(dict.fromkeys(match.group() for name in names if (match := expression.match(name))))
        count = self.last if self.of is None else max(1, round(len(found) * self.last / self.of))
        return found[-count:]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Globs = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Rule(_Strict):
    """One line under ``update``: globs (relative to blocks, if given) or a preset."""

    tensors: Globs = ()
    preset: str = ""
    blocks: Blocks | None = None
    channels: Channels | None = None
    optional: bool = False
    tied: Literal["update", "skip"] = "update"

    @model_validator(mode="before")
    @classmethod
    def _from_glob(cls, value: Any) -> Any:
        return {"tensors": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        if bool(self.tensors) == bool(self.preset):
            raise ValueError("a rule has either 'tensors' or 'preset'")
        if self.preset and (self.blocks or self.channels):
            raise ValueError("a preset takes neither 'blocks' nor 'channels'")
        return self


class Scheme(_Strict):
    """Rules on parameter names. Make one with :meth:`load`, or directly from keyword arguments."""

    name: str
    update: Annotated[tuple[Rule, ...], Field(min_length=1)]
    family: str | None = None
    classes: Globs = ()  # of a published scheme: the class names of its family's models
    freeze: Globs = ()

    def __str__(self) -> str:
        return self.name

    @classmethod
    def load(cls, source: str | Path) -> Scheme:
        """A scheme from a YAML file, or from preset text such as ``head+bias-only``.

        Raises:
            UserError: no such file or preset, or the file is not a valid scheme.
        """
        text = str(source)
        if isinstance(source, Path) or text.endswith((".yaml", ".yml")):
            return _parse_file(Path(source))
        parts = [part.strip() for part in text.split("+")]
        for part in parts:
            _check_preset(part)
        return cls(name="+".join(parts), update=tuple(Rule(preset=part) for part in parts))


def resolve(
    scheme: Scheme | str | Path,
    parameters: Shapes,
    *,
    modules: Mapping[str, str],
    family: str | None = None,
    aliases: Mapping[str, str] | None = None,
    frozen: frozenset[str] = frozenset(),
) -> Selection:
    """The parameters that a scheme trains.

    Args:
        scheme: A scheme, the path of one, or preset text.
        parameters: Name and shape (user's layout) of each parameter, in order of definition.
        modules: Module path and class name, in order of definition.
        family: The model's family; None detects it from the class names.
        aliases: Other names of tied parameters, each with the name that ``parameters`` has. Globs match both.
        frozen: Parameters that another option freezes. Presets and globs leave them out silently.

    Returns:
        Trained names in the order of ``parameters``, each with its channel selection; None is the whole tensor.

    Raises:
        UserError: a glob matches nothing, an exact name is frozen by another option, the scheme is for another family,
            channels are asked of a tensor that has none, or nothing is left to train.
    """
    loaded = scheme if isinstance(scheme, Scheme) else Scheme.load(scheme)
    model = _Model(parameters, modules, family or detect_family(modules), dict(aliases or {}), frozen)
    selected = _apply(loaded, model)
    if not selected:
        raise UserError(f"scheme {loaded} trains nothing", instead="Widen its 'update' globs or drop 'freeze' globs.")
    return {name: selected[name] for name in parameters if name in selected}


def detect_family(modules: Mapping[str, str]) -> str | None:
    """The family of published schemes that a model's class, or else that of one of its modules, belongs to."""
    for class_name in dict.fromkeys(modules.values()):
        for family, scheme in published().items():
            if any(fnmatchcase(class_name, pattern) for pattern in scheme.classes):
                return family
    return None


@cache
def published() -> dict[str, Scheme]:
    """The published schemes by family."""
    with resources.as_file(resources.files("pockc") / "schemes") as folder:
        schemes = [_parse_file(path) for path in sorted(folder.glob("*.yaml"))]
    return {scheme.family: scheme for scheme in schemes if scheme.family}


def channel_axis(shape: tuple[int, ...]) -> int:
    """The axis of a weight, in the user's layout, that channel selection runs along: 0 if depthwise, else 1."""
    return 0 if len(shape) == 4 and shape[1] == 1 else 1


def select_channels(weight: npt.NDArray[Any], channels: Channels, axis: int) -> npt.NDArray[np.int32]:
    """Sorted int32 indices of the selected channels of ``weight`` along ``axis``; at least one."""
    total = weight.shape[axis]
    count = max(1, round(channels.fraction * total))
    if channels.select == "first":
        return np.arange(count, dtype=np.int32)
    if channels.select == "random":
        chosen = np.random.default_rng(channels.seed).choice(total, count, replace=False)
        return np.sort(chosen).astype(np.int32)
    others = tuple(a for a in range(weight.ndim) if a != axis)
    norms = np.square(weight, dtype=np.float64).sum(axis=others)
    # The stable sort makes the choice among equal norms the same on every machine.
    return np.sort(np.argsort(-norms, kind="stable")[:count]).astype(np.int32)


# --- Applying rules to a model ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    parameters: Shapes
    modules: Mapping[str, str]
    family: str | None
    aliases: Mapping[str, str]
    frozen: frozenset[str]

    def names(self) -> Iterator[str]:
        """Every name that a glob may match, aliases last."""
        yield from self.parameters
        yield from self.aliases

    def canonical(self, name: str) -> str:
        return self.aliases.get(name, name)

    def owned_by(self, module: str) -> list[str]:
        """The parameters that a module itself holds, by their canonical names."""
        return [self.canonical(name) for name in self.names() if name.rpartition(".")[0] == module]


def _apply(scheme: Scheme, model: _Model) -> Selection:
    if scheme.family and model.family and scheme.family != model.family:
        raise UserError(
            f"scheme {scheme} is for models of the family {scheme.family}, this one is of {model.family}",
            instead="Use --scheme sparse for the model's own, or drop 'family' from the file.",
        )
    selected: Selection = {}
    for rule in scheme.update:
        for name, channels in _matches(rule, scheme, model).items():
            selected[name] = _larger(selected[name], channels) if name in selected else channels
    for pattern in scheme.freeze:
        for name in _glob(pattern, model, scheme):
            selected.pop(model.canonical(name), None)
    return selected


def _matches(rule: Rule, scheme: Scheme, model: _Model) -> Selection:
    if rule.preset:
        found = _preset(rule.preset, model)
    else:
        names = _rule_names(rule, scheme, model)
        found = {name: _checked_channels(name, rule.channels, model) for name in names}
    if rule.tied == "skip":
        shared = set(model.aliases.values())
        found = {name: channels for name, channels in found.items() if name not in shared}
    return {name: channels for name, channels in found.items() if name not in model.frozen}


def _rule_names(rule: Rule, scheme: Scheme, model: _Model) -> list[str]:
    found: list[str] = []
    for pattern in rule.tensors:
        if rule.blocks:
            found += _glob_in_blocks(pattern, rule.blocks, model, scheme, rule.optional)
        else:
            found += _glob(pattern, model, scheme, rule.optional)
    return [model.canonical(name) for name in found]


def _glob(pattern: str, model: _Model, scheme: Scheme, optional: bool = False) -> list[str]:
    matched = [name for name in model.names() if fnmatchcase(name, pattern)]
    if not matched and not optional:
        raise UserError(
            f"scheme {scheme}: {pattern!r} matches no parameter of the model",
            instead=near_names(pattern, model.names()) or _some_names(model),
        )
    exact = not _WILDCARDS & set(pattern)
    if exact and matched and model.canonical(pattern) in model.frozen and pattern not in scheme.freeze:
        raise UserError(
            f"scheme {scheme} updates {pattern}, which the batchnorm policy freezes",
            instead="Build with batchnorm='freeze' or 'train' to update it, or take it out of the scheme.",
        )
    return matched


def _some_names(model: _Model) -> str:
    names = list(model.parameters)
    return f"Its parameters are called {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}."


def _glob_in_blocks(pattern: str, blocks: Blocks, model: _Model, scheme: Scheme, optional: bool) -> list[str]:
    prefixes = blocks.prefixes(model.names())
    if not prefixes and not optional:
        raise UserError(
            f"scheme {scheme}: no parameter has a block like {blocks.pattern!r}",
            instead=near_names(blocks.pattern, model.names()) or _some_names(model),
        )
    inside = [(prefix, name) for prefix in prefixes for name in model.names() if name.startswith(prefix)]
    matched = [name for prefix, name in inside if fnmatchcase(name.removeprefix(prefix), pattern)]
    if not matched and not optional:
        raise UserError(
            f"scheme {scheme}: {pattern!r} matches nothing in the blocks {prefixes[0]}* to {prefixes[-1]}*",
            instead=near_names(pattern, dict.fromkeys(name.removeprefix(prefix) for prefix, name in inside)),
        )
    return matched


def _checked_channels(name: str, channels: Channels | None, model: _Model) -> Channels | None:
    if channels is None or channels.fraction == 1:
        return None
    shape = model.parameters[name]
    module = model.modules.get(name.rpartition(".")[0], "")
    if len(shape) < 2 or "Embedding" in module:
        raise UserError(
            f"channels cannot be selected of {name} (shape {list(shape)}{f', of {module}' if module else ''})",
            supported="weights of convolutions and linear layers",
            instead="Narrow the glob to such weights, or update the whole tensor.",
        )
    return channels


def _larger(one: Channels | None, other: Channels | None) -> Channels | None:
    """Of two selections of one tensor, the one that updates more."""
    if one is None or other is None:
        return None
    return one if one.fraction >= other.fraction else other


# --- Presets ----------------------------------------------------------------------------------------------------------


def _check_preset(text: str) -> None:
    kind, _, argument = text.partition(":")
    if kind in ("full", "bias-only", "sparse") and not argument:
        return
    if kind == "head" and (argument or ":" not in text):
        return
    if kind == "last-k":
        if argument.isdecimal() and int(argument) > 0:
            return
        raise UserError(f"scheme {text!r} needs a positive number of modules", instead="Write for instance last-k:3.")
    raise UserError(f"there is no scheme {text!r}", supported=_PRESETS, instead=near_names(text, _PRESETS.split(", ")))


def _preset(text: str, model: _Model) -> Selection:
    _check_preset(text)
    kind, _, argument = text.partition(":")
    if kind == "sparse":
        return _sparse(model)
    if kind == "full":
        names = list(model.parameters)
    elif kind == "bias-only":
        names = [name for name in model.parameters if name.endswith("bias")]
    elif kind == "head":
        names = _head(argument, model)
    else:
        names = _last_modules(int(argument), model)
    return dict.fromkeys(names)


def _sparse(model: _Model) -> Selection:
    if model.family in published():
        return _apply(published()[model.family], model)
    root = next(iter(model.modules.values()), "this model")
    raise UserError(
        f"there is no published sparse scheme for {root}",
        supported=f"the families {', '.join(published())}",
        instead="Write a scheme file, or join presets as in head+bias-only.",
    )


def _head(module: str, model: _Model) -> list[str]:
    if module:
        if found := model.owned_by(module):
            return found
        owners = dict.fromkeys(name.rpartition(".")[0] for name in model.names())
        raise UserError(f"head:{module} names no module with parameters", instead=near_names(module, owners))
    linear = [path for path, kind in model.modules.items() if kind.endswith("Linear") and model.owned_by(path)]
    if not linear:
        raise UserError("the model has no linear layer to take as its head", instead="Name it, as in head:<module>.")
    return model.owned_by(linear[-1])


def _last_modules(count: int, model: _Model) -> list[str]:
    owners = [path for path in model.modules if model.owned_by(path)]
    return [name for path in owners[-count:] for name in model.owned_by(path)]


# --- Files ------------------------------------------------------------------------------------------------------------


def _parse_file(path: Path) -> Scheme:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the scheme file {path}: {reason}", supported=_PRESETS) from None
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"not valid YAML: {getattr(error, 'problem', error)}", where=where) from None
    if not isinstance(content, dict):
        raise UserError("a scheme file holds keys such as 'name' and 'update'", where=path)
    try:
        return Scheme.model_validate({"name": path.stem} | content)
    except ValidationError as error:
        raise _explain(error, path, document) from None


# Where pydantic speaks of Python types, not of what a file holds.
_REASONS = {
    "tuple_type": "it should be a list",
    "too_short": "it should not be empty",
    "model_type": "it should be a mapping",
    "dataclass_type": "it should be a mapping",
    "missing": "it is missing",
}


def _explain(error: ValidationError, path: Path, document: yaml.Node | None) -> UserError:
    """The first problem of a file, in one sentence with its line and key path."""
    problem = error.errors()[0]
    place = [part for part in problem["loc"] if isinstance(part, int) or not part.startswith("function-")]
    key = ".".join(map(str, place))
    where = f"{path}:{_line(document, place)}"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [*Scheme.model_fields, *Rule.model_fields, *Blocks.model_fields, *Channels.__dataclass_fields__]
        return UserError(f"there is no key {key!r}", where=where, instead=near_names(str(place[-1]), known))
    reason = _REASONS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ").replace("Input ", "it ")
    return UserError(f"{key}: {reason}", where=where)


def _line(node: yaml.Node | None, place: list[int | str]) -> int:
    """The line, from 1, of the innermost part of a key path that the document has."""
    line = node.start_mark.line + 1 if node else 1
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == part), None)
        else:
            node = None
        if node is None:
            break
        line = node.start_mark.line + 1
    return line
