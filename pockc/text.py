"""The text form of a graph: ``show`` prints it, ``parse`` reads it back, ``show(parse(show(g))) == show(g)``.

One line each, in this order; attributes that have their default value are left out:

    input %x: f32[8,16]
    state %head.weight: f32[4,16] parameter
    state %head.kernel: f32[8,3,3,3] parameter permutation=(0, 2, 3, 1)
    state %constant: f32[2] constant = [0.5, 1.0]
    %y: f32[8,4] = matmul(%x, %head.weight) transpose_b=true  # head (model.py:12) backward
    output logits = %y
    update %head.weight = %new

Contents are printed of constants of up to 16 elements, if they are not compact; other states come back without data.
Of the file in a node's origin only its last part is printed. Names with unusual characters are quoted: ``%"my name"``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any, cast, get_args

import numpy as np

from pockc.compact import COMPACT_DTYPES
from pockc.errors import UserError
from pockc.ir import DTYPES, NUMPY_DTYPES, Array, Graph, Node, Origin, Phase, State, StateKind, TensorType, Value
from pockc.ops import OPS, complete_attributes, load_families

INLINE_ELEMENTS = 16
_PLAIN_NAME = re.compile(r"[\w.\-/<>]+")


# Printing


def show(graph: Graph) -> str:
    """The text of a graph, ending in a newline."""
    load_families()
    lines = [f"input {_typed(value)}" for value in graph.inputs]
    lines += [_show_state(value, state) for value, state in graph.states.items()]
    lines += [show_node(node) + _show_origin(node.origin) for node in graph.nodes]
    lines += [f"output {_show_name(name)} = {_use(value)}" for name, value in graph.outputs.items()]
    lines += [f"update {_use(state)} = {_use(value)}" for state, value in graph.updates.items()]
    return "".join(line + "\n" for line in lines)


def show_node(node: Node) -> str:
    """The line of a node without its origin."""
    defaults = OPS[node.op].attributes if node.op in OPS else {}
    attrs = [f" {n}={_show_attribute(v)}" for n, v in node.attrs.items() if n not in defaults or defaults[n] != v]
    return f"{_list(map(_typed, node.outputs))} = {node.op}({_list(map(_use, node.inputs))}){''.join(attrs)}"


def _list(items: Iterable[str]) -> str:
    return ", ".join(items)


def _show_name(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else json.dumps(name)


def _use(value: Value) -> str:
    return "%" + _show_name(value.name)


def _typed(value: Value) -> str:
    return f"{_use(value)}: {value.type}"


def _show_attribute(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value)
        case tuple():
            return f"({_list(map(_show_attribute, value))})"
    return repr(value)


def _show_state(value: Value, state: State) -> str:
    line = f"state {_typed(value)} {state.kind}"
    if state.permutation:
        line += f" permutation={_show_attribute(state.permutation)}"
    shown = state.kind == "constant" and not value.type.is_compact
    if shown and state.data is not None and state.data.size <= INLINE_ELEMENTS:
        line += f" = [{_list(map(_show_element, state.data.reshape(-1)))}]"
    return line


def _show_element(element: Any) -> str:
    """The shortest text that reads back as the same element."""
    return str(element).lower() if element.dtype == np.bool_ else str(element)


def _show_origin(origin: Origin) -> str:
    if origin == Origin():
        return ""
    place = f" ({PurePath(origin.file).name}:{origin.line})" if origin.file else ""
    phase = "" if origin.phase == "forward" else f" {origin.phase}"
    return f"  # {origin.module or '<model>'}{place}{phase}"


# Parsing


def parse(text: str) -> Graph:
    """The graph that ``show`` printed.

    Types are taken as printed and not checked; that is the verifier's part.

    Raises:
        UserError: the text is not of this form; the message names the line.
    """
    load_families()
    return _Parser(text).graph()


_TOKEN = re.compile(
    r"""\s*(?: (?P<comment>\#.*) | %"(?P<quoted_value>(?:[^"\\]|\\.)*)" | %(?P<value>[\w.\-/<>]+)
      | "(?P<string>(?:[^"\\]|\\.)*)" | (?P<word>[\w.\-+/<>]+) | (?P<sign>[,():=\[\]]) )""",
    re.VERBOSE,
)
_ORIGIN = re.compile(
    r"\#\s(?P<module>.+?)(?:\s\((?P<file>[^()]*):(?P<line>\d+)\))?(?:\s(?P<phase>backward|recompute|update))?"
)


class _Parser:
    """A recursive descent over the tokens of one line after the other."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.line_number = 0
        self.tokens: list[tuple[str, str]] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[Value] = []
        self.states: dict[Value, State] = {}
        self.nodes: list[Node] = []
        self.outputs: dict[str, Value] = {}
        self.updates: dict[Value, Value] = {}

    def graph(self) -> Graph:
        statements: dict[str, Callable[[], None]] = {
            "input": self._input,
            "state": self._state,
            "output": self._output,
            "update": self._update,
        }
        for number, line in enumerate(self.lines, 1):
            self.line_number = number
            self.tokens = self._tokenise(line)
            if not self.tokens:
                continue
            kind, text = self.tokens[-1]
            if kind == "word" and text in statements:
                self.tokens.pop()
                statements[text]()
            else:
                self._node()
            if self.tokens:
                raise self._error(f"{self.tokens[-1][1]!r} is one too many")
        return Graph(tuple(self.inputs), self.states, tuple(self.nodes), self.outputs, self.updates)

    # Tokens: a stack of (kind, text), the next one last.

    def _tokenise(self, line: str) -> list[tuple[str, str]]:
        tokens, position = [], 0
        line = line.rstrip()
        while position < len(line):
            match = _TOKEN.match(line, position)
            if match is None:
                raise self._error(f"{line[position:].strip()!r} cannot be read")
            position = match.end()
            kind = str(match.lastgroup)
            text = match.group(kind)
            if kind in ("quoted_value", "string"):
                text = json.loads(f'"{text}"')
            tokens.append((kind.removeprefix("quoted_"), text))
        return tokens[::-1]

    def _error(self, found: str) -> UserError:
        return UserError(found, where=f"line {self.line_number} of the graph")

    def _next(self, *kinds: str) -> str:
        kind, text = self.tokens.pop() if self.tokens else ("end of line", "")
        if kind not in kinds:
            raise self._error(f"there is {text or kind!r} where a {' or '.join(kinds)} should be")
        return text

    def _sign(self, sign: str) -> None:
        if not self._accept(sign):
            raise self._error(f"there is no {sign!r} where one should be")

    def _accept(self, sign: str) -> bool:
        if not self.tokens or self.tokens[-1] != ("sign", sign):
            return False
        self.tokens.pop()
        return True

    def _sequence(self, item: Callable[[], Any], closing: str) -> list[Any]:
        """Items separated by commas, up to and with the closing sign."""
        items: list[Any] = []
        while not self._accept(closing):
            if items:
                self._sign(",")
            items.append(item())
        return items

    # Pieces

    def _type(self) -> TensorType:
        dtype = self._next("word")
        if dtype not in (*DTYPES, *COMPACT_DTYPES):
            raise self._error(f"there is no element type {dtype!r}")
        self._sign("[")
        return TensorType(tuple(self._sequence(self._integer, "]")), dtype)

    def _integer(self) -> int:
        word = self._next("word")
        if not re.fullmatch(r"-?\d+", word):
            raise self._error(f"{word!r} is not an integer")
        return int(word)

    def _definition(self) -> Value:
        name = self._next("value")
        self._sign(":")
        if name in self.values:
            raise self._error(f"%{name} is defined twice")
        self.values[name] = value = Value(name, self._type())
        return value

    def _use(self) -> Value:
        name = self._next("value")
        if name not in self.values:
            raise self._error(f"%{name} is not defined")
        return self.values[name]

    def _attribute(self) -> Any:
        if self._accept("("):
            return tuple(self._sequence(self._attribute, ")"))
        if self.tokens and self.tokens[-1][0] == "string":
            return self._next("string")
        return self._number()

    def _number(self) -> bool | int | float:
        word = self._next("word")
        if word in ("true", "false"):
            return word == "true"
        try:
            return int(word) if re.fullmatch(r"-?\d+", word) else float(word)
        except ValueError:
            raise self._error(f"{word!r} is not a number") from None

    def _attributes(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        while self.tokens and self.tokens[-1][0] == "word":
            name = self._next("word")
            self._sign("=")
            attrs[name] = self._attribute()
        return attrs

    # Lines

    def _input(self) -> None:
        self.inputs.append(self._definition())

    def _state(self) -> None:
        value = self._definition()
        kind = self._next("word")
        if kind not in get_args(StateKind):
            raise self._error(f"{kind!r} is not a kind of state")
        permutation = self._attributes().get("permutation", ())
        data = self._data(value.type) if self._accept("=") else None
        self.states[value] = State(cast(StateKind, kind), data, permutation)

    def _data(self, type_: TensorType) -> Array:
        if type_.is_compact:
            raise self._error(f"the contents of {type_} cannot be given as text")
        self._sign("[")
        elements = self._sequence(self._number, "]")
        if len(elements) != type_.elements:
            raise self._error(f"there are {len(elements)} elements for {type_}")
        return np.array(elements, NUMPY_DTYPES[type_.dtype]).reshape(type_.shape)

    def _node(self) -> None:
        outputs: list[Value] = self._sequence(self._definition, "=")
        op = self._next("word")
        if op not in OPS:
            raise self._error(f"there is no op {op!r}")
        self._sign("(")
        inputs: list[Value] = self._sequence(self._use, ")")
        attrs = complete_attributes(op, self._attributes(), f"line {self.line_number} of the graph")
        origin = self._origin() if self.tokens else Origin()
        self.nodes.append(Node(op, tuple(inputs), tuple(outputs), attrs, origin))

    def _origin(self) -> Origin:
        match = _ORIGIN.fullmatch(self._next("comment"))
        if match is None:
            raise self._error("the comment is not an origin")
        module = "" if match["module"] == "<model>" else match["module"]
        return Origin(module, match["file"] or "", int(match["line"] or 0), cast(Phase, match["phase"] or "forward"))

    def _output(self) -> None:
        name = self._next("word", "string")
        self._sign("=")
        self.outputs[name] = self._use()

    def _update(self) -> None:
        state = self._use()
        self._sign("=")
        self.updates[state] = self._use()
