"""PyTorch to the IR, through ``torch.export``. The only module of the compiler that imports PyTorch."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from pockc.errors import UserError
from pockc.frontend.aten import KEEP_WHOLE, Call, check_results, hint_for, load_handlers, refuse
from pockc.frontend.gradients import stopped_gradients
from pockc.frontend.patterns import rewrite
from pockc.frontend.source import MODEL, Problem, combined, export_error, origin_of, place_of
from pockc.ir import NUMPY_DTYPES, Array, Builder, Graph, TensorType, Value

DTYPE_NAMES = {torch.float32: "f32", torch.int64: "i64", torch.int32: "i32", torch.bool: "bool"}
_SUPPORTED_DTYPES = "float32, int64, int32 and bool"
# Images as cameras give them: a quarter of the memory. The model converts them first, since no op computes with bytes.
_INPUT_DTYPE_NAMES = {**DTYPE_NAMES, torch.uint8: "u8"}
_BATCHNORM_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Imported:
    """A model as a graph.

    ``graph`` takes the user's inputs by name; its states are the parameters and buffers that it uses, by their
    qualified names in the model, images in the user's own channels-first order. ``aliases`` leads from the other names
    of tied parameters to the one that holds the state. ``modules`` are the module paths with their class names.
    ``loss_output`` names the output that is the loss, if the model or a callable computes it.
    """

    graph: Graph
    aliases: dict[str, str]
    modules: dict[str, str]
    loss_output: str | None


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...],
    *,
    loss: str | Callable[..., Tensor] | None,
    batchnorm: str,
    training: bool | None = None,
) -> Imported:
    """Imports a model for the shapes and dtypes of its example inputs.

    Args:
        model: The model; it is left as it was found.
        example_inputs: Tensors by the names of the parameters of ``forward``, or in their order.
        loss: The name of a loss that is added later, or ``loss(output, labels)``, or None: the model returns its loss.
        batchnorm: "fold" and "freeze" use the running statistics, "train" those of the batch.
        training: Whether dropout is on; None leaves that to the mode of the model. False also makes batch norms use
            their running statistics, whatever the policy.

    Returns:
        The graph and what else is known of the model. Outputs are "logits" (a named loss) or "loss", then the others.

    Raises:
        UserError: The model cannot be exported, or uses operators or dtypes that are not supported, all of which are
            listed.
    """
    inputs = _named_inputs(model, example_inputs)
    if isinstance(loss, str):
        inputs.pop("labels", None)  # the target of a loss that is added later
    output_names: list[Sequence[str]] = []
    wrapper = _Entry(model, loss, output_names.append)
    with _modes(model, batchnorm, training):
        program, problems = _export(wrapper, inputs)
    graph, aliases = _Importer(wrapper, program, list(inputs), output_names[-1], problems).run()
    modules = {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}
    return Imported(rewrite(graph), aliases, modules, None if isinstance(loss, str) else "loss")


# ---- the user's model, made one function from named tensors to a tuple of tensors ----


class _Entry(nn.Module):
    """The model with its loss; `record` is told the names of the outputs when it runs.

    It is a function because torch.export undoes what forward does to attributes of the module.
    """

    def __init__(
        self, model: nn.Module, loss: str | Callable[..., Tensor] | None, record: Callable[[Sequence[str]], None]
    ) -> None:
        super().__init__()
        self.model = model
        self.pockc_loss = loss
        self.record = record

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        loss = self.pockc_loss
        labels = inputs.pop("labels", None) if loss is not None else None
        output = self.model(**inputs)
        if loss is None:
            named = _named_outputs(output, "loss")
        elif callable(loss):
            named = {"loss": loss(output, labels), **_named_outputs(output, "logits")}
        else:
            named = _named_outputs(output, "logits")
        self.record(tuple(named))
        return tuple(named.values())


def _named_outputs(output: object, first: str) -> dict[str, Tensor]:
    """The tensors of a model's output by name; the one that counts, or the first, is called `first`."""
    if isinstance(output, Tensor):
        return {first: output}
    if isinstance(output, Mapping):
        fields: dict[str, object] = {str(key): value for key, value in output.items()}
    elif isinstance(output, Sequence):
        fields = {f"output_{position}": value for position, value in enumerate(output)}
    else:
        fields = dict(vars(output)) if hasattr(output, "__dict__") else {}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            f"the model returns {type(output).__name__}, which holds no tensor",
            supported="a tensor, a tuple, a dict, or an object with the attribute logits",
        )
    chosen = first if first in tensors else next(iter(tensors))
    return {first: tensors.pop(chosen), **tensors}


def _named_inputs(model: nn.Module, example: Mapping[str, Tensor] | tuple[Tensor, ...]) -> dict[str, Tensor]:
    if isinstance(example, Mapping):
        inputs = dict(example)
    else:
        names = list(inspect.signature(model.forward).parameters)
        if len(example) > len(names):
            raise UserError(
                f"{len(example)} example inputs, but forward of {type(model).__name__} takes {len(names)}",
                instead=f"Its parameters are: {', '.join(names)}.",
            )
        inputs = dict(zip(names, example, strict=False))
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the example input {name!r} is a {type(value).__name__}",
                supported="tensors",
                instead="Wrap the model so that its forward takes tensors only.",
            )
    return inputs


@contextmanager
def _modes(model: nn.Module, batchnorm: str, training: bool | None) -> Iterator[None]:
    """Puts the modules into the mode of this import, and back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, mode in before:
            module.training = mode if training is None else training
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = batchnorm == "train" and training is not False
        yield
    finally:
        for module, mode in before:
            module.training = mode


# ---- torch.export ----


def _export(wrapper: _Entry, inputs: Mapping[str, Tensor]) -> tuple[ExportedProgram, list[Problem]]:
    """The program in the operators that we handle, and what was seen to be wrong with it on the way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(wrapper, (), kwargs=dict(inputs))
            parameters = program.graph_signature.inputs_to_parameters
            problems = list(stopped_gradients(program.graph, parameters))
            table: Any = torch.export.default_decompositions()
            kept: Any = {overload: rule for overload, rule in table.items() if not _kept_whole(str(overload))}
            return program.run_decompositions(kept), problems
    except UserError:
        raise
    except Exception as error:  # whatever the user's forward or torch.export raises
        raise export_error(error) from error


def _kept_whole(overload: str) -> bool:
    return overload.removeprefix("aten.").split(".")[0] in KEEP_WHOLE


# ---- the exported program to the IR ----


class _Unknown:
    """What a result that cannot be typed leaves behind; everything that reads it is passed over."""


_UNKNOWN = _Unknown()
# A value of the graph, or a tensor that is known now, or several of them, or nothing.
_Result = Value | Tensor | _Unknown | tuple[Any, ...] | None


class _Importer:
    def __init__(
        self,
        wrapper: _Entry,
        program: ExportedProgram,
        input_names: Sequence[str],
        output_names: Sequence[str],
        problems: list[Problem],
    ) -> None:
        self.program = program
        self.input_names = input_names
        self.output_names = output_names
        self.builder = Builder()
        self.handlers = load_handlers()
        self.results: dict[fx.Node, _Result] = {}
        self.materialised: dict[fx.Node, Value] = {}
        self.states: dict[str, Value] = {}
        self.problems = problems
        self.aliases, self.tensors = _tied(wrapper)
        self.mutated = {_name(target) for target in program.graph_signature.buffers_to_mutate.values()}
        buffers = {_name(name) for name, _ in wrapper.named_buffers(remove_duplicate=False)}
        self.frozen = frozenset(buffers - self.mutated)
        self.buffer_of: dict[fx.Node, str] = {}

    def run(self) -> tuple[Graph, dict[str, str]]:
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.builder.origin = origin_of(node)
                self.results[node] = self._call(node)
        outputs, updates = self._outputs()
        if self.problems:
            raise combined(self.problems)
        return self._graph(outputs, updates), self.aliases

    # -- inputs and states --

    def _inputs(self) -> None:
        placeholders = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        user_names = iter(self.input_names)
        for spec in self.program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                self.results[node] = self._user_input(next(user_names), node)
            elif spec.kind is InputKind.PARAMETER:
                self.results[node] = self._state(_name(str(spec.target)), "parameter")
            elif spec.kind is InputKind.BUFFER:
                self.results[node] = self._buffer(node, _name(str(spec.target)))
            elif spec.kind is InputKind.CONSTANT_TENSOR and spec.target in self.program.constants:
                self.results[node] = self.program.constants[spec.target].detach()
            else:
                self.results[node] = _UNKNOWN

    def _user_input(self, name: str, node: fx.Node) -> Value | _Unknown:
        fake = node.meta["val"]
        if fake.dtype not in _INPUT_DTYPE_NAMES:
            self._report(
                f"the input {name!r} is {_plain(fake.dtype)}",
                supported="float32, int64, int32, bool, and uint8 that the model converts to float32",
                instead="Convert it before it reaches the model.",
            )
            return _UNKNOWN
        return self.builder.input(name, TensorType(tuple(fake.shape), _INPUT_DTYPE_NAMES[fake.dtype]))

    def _buffer(self, node: fx.Node, name: str) -> _Result:
        """A buffer that nothing changes stays a tensor, so that what is computed from it alone can be folded."""
        if name in self.mutated:
            return self._state(name, "buffer")
        self.buffer_of[node] = name
        return self.tensors[name]

    def _state(self, name: str, kind: Any) -> Value | _Unknown:
        name = self.aliases.get(name, name)
        if name in self.states:
            return self.states[name]
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            self._report(
                f"the {kind} {name!r} is {_plain(tensor.dtype)}",
                supported=_SUPPORTED_DTYPES,
                instead="Convert the model with model.float() first.",
            )
            return _UNKNOWN
        self.states[name] = self.builder.state(name, kind, _copied(tensor))
        return self.states[name]

    def _graph(self, outputs: dict[str, Value], updates: dict[Value, Value]) -> Graph:
        """States in the order of the model, whatever the order in which they are used."""
        order = {name: position for position, name in enumerate(self.tensors)}
        states = sorted(self.builder.states.items(), key=lambda item: order.get(item[0].name, len(order)))
        self.builder.states = dict(states)
        return self.builder.build(outputs, updates)

    # -- calls --

    def _call(self, node: fx.Node) -> _Result:
        if node.target is operator.getitem:
            return self._item(node)
        name = str(node.target)
        if name.startswith(("aten._assert", "aten.sym_constrain")):
            return None
        read = [self.results[argument] for argument in node.all_input_nodes]
        if any(isinstance(result, _Unknown) for result in read) and name in self.handlers:
            return _stand_in(node)
        if all(isinstance(result, Tensor) for result in read) and _foldable(node.target):
            return self._folded(node)
        return self._handled(node, name)

    def _item(self, node: fx.Node) -> _Result:
        source = self.results[node.args[0]]  # type: ignore[index]  # getitem reads a node
        if isinstance(source, _Unknown):
            return source
        assert isinstance(source, tuple)
        item: _Result = source[node.args[1]]  # type: ignore[index]  # at a number
        if item is None and node.users:
            name = str(node.args[0].target)  # type: ignore[union-attr]
            self._report(f"its result {node.args[1]} cannot be used", name, node.args[0])
            return _UNKNOWN
        return item

    def _folded(self, node: fx.Node) -> _Result:
        """The node's result, computed now by PyTorch: nothing in it depends on inputs or parameters."""
        known: Any = self.results
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda argument: known[argument])
        with torch.no_grad():
            result: Tensor | Sequence[Tensor] = node.target(*arguments, **keywords)  # type: ignore[operator]
        return result if isinstance(result, Tensor) else tuple(result)

    def _handled(self, node: fx.Node, name: str) -> _Result:
        try:
            types = _result_types(node)
            handler = self.handlers.get(name)
            if handler is None:
                raise refuse("this operator is not supported", instead=hint_for(name))
            arguments = [self._operand(argument) for argument in node.args]
            keywords = {key: self._operand(value) for key, value in node.kwargs.items() if key not in _IGNORED}
            result = handler(Call(self.builder, name, types, self.frozen), *arguments, **keywords)
        except UserError as error:
            self.problems.append(Problem(place_of(node), name, error))
            return _stand_in(node)
        check_results(name, result, types)
        return result

    def _operand(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._value(argument)
        if isinstance(argument, list | tuple):
            return [self._operand(item) for item in argument]
        if isinstance(argument, torch.dtype):
            return _dtype_name(argument)
        return argument

    def _value(self, node: fx.Node) -> Any:
        """The result of a node as a value of the graph; tensors that are known now become states."""
        result = self.results[node]
        if not isinstance(result, Tensor):
            return result
        if node not in self.materialised:
            name = self.buffer_of.get(node)
            self.materialised[node] = self._state(name, "buffer") if name else self._constant(result)  # type: ignore[assignment]
        return self.materialised[node]

    def _constant(self, tensor: Tensor) -> Value:
        # Only numbers (tensors of rank 0) may still be float64 here: results of that type are refused.
        dtype = DTYPE_NAMES.get(tensor.dtype, "f32" if tensor.dtype.is_floating_point else "i64")
        return self.builder.constant(tensor.detach().numpy(force=True).astype(NUMPY_DTYPES[dtype]), dtype)

    # -- outputs --

    def _outputs(self) -> tuple[dict[str, Value], dict[Value, Value]]:
        nodes = {node.name: node for node in self.program.graph.nodes}
        outputs: dict[str, Value] = {}
        updates: dict[Value, Value] = {}
        names = iter(self.output_names)
        for spec in self.program.graph_signature.output_specs:
            if spec.kind is OutputKind.USER_OUTPUT and isinstance(spec.arg, TensorArgument):
                self._output(next(names), nodes[spec.arg.name], outputs)
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                self._update(_name(str(spec.target)), nodes[spec.arg.name], updates)
            # A model that works in place on its input changes the caller's tensor: nobody sees that on a device.
        return outputs, updates

    def _output(self, name: str, node: fx.Node, outputs: dict[str, Value]) -> None:
        if isinstance(self.results[node], _Unknown):
            return
        value: Value = self._value(node)
        # An output has a buffer of its own, so what is an input or a state is copied.
        given = value in self.builder.states or value in self.builder.inputs or value in outputs.values()
        outputs[name] = self.builder("copy", value) if given else value

    def _update(self, name: str, node: fx.Node, updates: dict[Value, Value]) -> None:
        leaf = name.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            return
        source = node.args[0] if node.target is operator.getitem else None
        batchnorm = isinstance(source, fx.Node) and "batch_norm" in str(source.target)
        if not batchnorm or leaf not in _BATCHNORM_STATISTICS:
            self._report(
                f"the forward pass changes the buffer {name!r}",
                node=node,
                supported="the running statistics of batch norm",
                instead="Move the change out of forward, or register no buffer for it.",
            )
            return
        state, new = self._state(name, "buffer"), self.results[node]
        if isinstance(state, Value) and isinstance(new, Value):
            updates[state] = new

    def _report(
        self, found: str, operator_name: str = "", node: Any = None, *, supported: str = "", instead: str = ""
    ) -> None:
        place = place_of(node) if isinstance(node, fx.Node) else "<model>"
        self.problems.append(Problem(place, operator_name, UserError(found, supported=supported, instead=instead)))


_IGNORED = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"})


def _name(target: str) -> str:
    return target.removeprefix(MODEL)


def _tied(wrapper: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Other names of tied tensors, and every parameter and buffer by name, in the order of definition."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    named = [*wrapper.named_parameters(remove_duplicate=False), *wrapper.named_buffers(remove_duplicate=False)]
    for target, tensor in named:
        name = _name(target)
        tensors[name] = tensor.detach()
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases, tensors


def _copied(tensor: Tensor) -> Array:
    """A contiguous copy, which later training of the model does not reach."""
    return np.array(tensor.detach().numpy(force=True), order="C", copy=True)


def _foldable(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in DTYPE_NAMES:
        raise refuse(f"its result is {_plain(dtype)}", supported=_SUPPORTED_DTYPES)
    return DTYPE_NAMES[dtype]


def _result_types(node: fx.Node) -> tuple[TensorType | None, ...]:
    """Types of what a node returns; None for results that are no tensors, or are unused and of another dtype."""
    returned = node.meta.get("val")
    if isinstance(returned, list | tuple):
        return tuple(_type_or_none(item) for item in returned)
    if not isinstance(returned, Tensor):
        raise refuse("it returns no tensor")
    shape = tuple(returned.shape)
    if not all(isinstance(size, int) for size in shape):
        raise refuse(
            "the shape of its result depends on the values of tensors",
            supported="static shapes",
            instead="Keep the shape and multiply by a mask.",
        )
    return (TensorType(shape, _dtype_name(returned.dtype)),)


def _type_or_none(returned: object) -> TensorType | None:
    if not isinstance(returned, Tensor) or returned.dtype not in DTYPE_NAMES:
        return None
    return TensorType(tuple(returned.shape), DTYPE_NAMES[returned.dtype])


def _stand_in(node: fx.Node) -> _Result:
    """Values of the right types that nothing computes: the import goes on, to find what else is not supported."""
    try:
        types = _result_types(node)
    except UserError:
        return _UNKNOWN
    values = tuple(Value(node.name, type_) if type_ else _UNKNOWN for type_ in types)
    return values if isinstance(node.meta["val"], list | tuple) else values[0]
