from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pockc.artifact import Artifact, read, write
from pockc.artifact_writer import DATA_ALIGNMENT, HEADER, SECTION, flatten
from pockc.build import build
from pockc.errors import PockcError, UserError
from pockc.ir import Graph, Node
from pockc.optim import AdamW
from pockc.passes.lifetimes import storages, unread_fills
from pockc.program import Program
from pockc.session import Session

pytestmark = pytest.mark.torch


class Small(nn.Module):
    """A convolution, two frozen layers with equal weights, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.load_state_dict(self.first.state_dict())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)).mean((2, 3))
        y = torch.relu(self.second(torch.relu(self.first(y))))
        logits: Tensor = self.head(y)
        return logits


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    return build(model, {"x": torch.randn(2, 3, 6, 6)}, optimizer=AdamW(lr=1e-3), scheme="head:conv+head")


@pytest.fixture(scope="module")
def file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "model.pock"
    program.save(path)
    return path


@pytest.fixture(scope="module")
def artifact(file: Path) -> Artifact:
    return read(file)


# --- Writing and reading back -----------------------------------------------------------------------------------------


def called(graph: Graph) -> list[Node]:
    """The nodes that make bytes of their own, which something reads: views are no calls."""
    storage, skipped = storages(graph), unread_fills(graph)
    return [node for node in graph.nodes if storage[node.outputs[0]] is node.outputs[0] and node not in skipped]


def test_sizes_and_entries_read_back_as_they_were_planned(program: Program, artifact: Artifact) -> None:
    assert artifact.state_bytes == program.state_bytes
    assert artifact.arena_bytes == program.arena_bytes
    assert artifact.max_threads == program.max_threads
    assert list(artifact.entries) == ["train_step", "eval_step", "infer"]
    for name, graph in program.entries.items():
        assert [call.op for call in artifact.entries[name].calls] == [node.op for node in called(graph)]


def test_calls_read_back_with_their_operands_attributes_and_origins(program: Program, artifact: Artifact) -> None:
    graph = program.entries["train_step"]
    unmade = {node.outputs[0] for node in unread_fills(graph)}
    for node, call in zip(called(graph), artifact.entries["train_step"].calls, strict=True):
        inputs = [value for value in node.inputs if value not in unmade]
        assert [(t.dtype, t.shape) for t in call.inputs] == [(v.type.dtype, v.type.shape) for v in inputs]
        assert [(t.dtype, t.shape) for t in call.outputs] == [(v.type.dtype, v.type.shape) for v in node.outputs]
        assert (list(call.ints), list(call.floats)) == flatten(node.op, node.attrs)
        assert call.module == (node.origin.module or "<model>").partition(" ")[0]
        assert call.phase == node.origin.phase
        for tensor, value in zip(call.inputs, inputs, strict=True):
            offset = program.offset("train_step", value)
            assert tensor.in_data == (offset is None)
            assert offset in (None, tensor.offset)


def test_states_hold_the_original_parameters_in_the_users_layout(model: nn.Module, artifact: Artifact) -> None:
    parameters = dict(model.named_parameters())
    states = {name: state for name, state in artifact.state_by_name.items() if state.kind == "parameter"}
    assert set(states) == set(parameters)
    for name, state in states.items():
        np.testing.assert_array_equal(artifact.contents(state), parameters[name].detach().numpy())
        assert state.trained == state.mutable == name.startswith(("conv.", "head."))
    assert states["conv.weight"].permutation == (0, 2, 3, 1)


def test_equal_contents_are_stored_once(artifact: Artifact) -> None:
    states = artifact.state_by_name
    assert states["first.weight"].initial == states["second.weight"].initial
    zeros = {states[f"head.bias.{slot}"].initial for slot in ("adam_m", "adam_v")}
    assert len(zeros) == 1


def test_data_begins_at_a_page_and_all_tensors_at_cache_lines(file: Path, artifact: Artifact) -> None:
    table = sections(file.read_bytes())
    assert table[3][0] % DATA_ALIGNMENT == 0
    assert all(tensor.offset % 64 == 0 for tensor in artifact.tensors)
    assert all(tensor.nbytes > 0 for tensor in artifact.tensors)


def test_metadata_has_the_memory_report_and_the_text_of_every_entry(program: Program, artifact: Artifact) -> None:
    assert artifact.metadata["memory"]["arena_bytes"] == program.arena_bytes
    assert artifact.metadata["text"] == {name: program.text(name) for name in program.entries}
    assert artifact.metadata["omitted"] == []


def test_writing_twice_gives_the_same_bytes(program: Program, file: Path, tmp_path: Path) -> None:
    write(program, tmp_path / "again.pock")
    assert (tmp_path / "again.pock").read_bytes() == file.read_bytes()


def test_golden_section_is_kept(program: Program, tmp_path: Path) -> None:
    write(program, tmp_path / "model.pock", golden=b"vectors")
    content = (tmp_path / "model.pock").read_bytes()
    offset, size = sections(content)[4]
    assert content[offset : offset + size] == b"vectors"
    read(tmp_path / "model.pock")


def test_attributes_are_flattened_in_canonical_order() -> None:
    attrs = {"low": -1.0, "high": float("inf"), "inclusive": True}
    assert flatten("clip", attrs) == ([1], [-1.0, float("inf")])
    assert flatten("transpose", {"permutation": (0, 2, 1)}) == ([3, 0, 2, 1], [])
    assert flatten("cast", {"dtype": "i64"}) == ([11], [])


def test_integer_given_for_a_float_attribute_is_stored_as_a_float() -> None:
    assert flatten("leaky_relu", {"slope": 1}) == ([], [1.0])


# --- Failing to write -------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file_and_nothing_else(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.pock"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*model\.pock: No space left on device"):
        program.save(target)

    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# --- Damaged files ----------------------------------------------------------------------------------------------------


def sections(content: bytes) -> dict[int, tuple[int, int]]:
    """Offset and size of each section by its id."""
    (count,) = struct.unpack_from("<I", content, 12)
    rows = [SECTION.unpack_from(content, HEADER.size + i * SECTION.size) for i in range(count)]
    return {code: (offset, size) for code, _, offset, size in rows}


def resealed(content: bytes) -> bytes:
    """The file with all its checksums made right again."""
    data = bytearray(content)
    (count,) = struct.unpack_from("<I", data, 12)
    for index in range(count):
        at = HEADER.size + index * SECTION.size
        code, _, offset, size = SECTION.unpack_from(data, at)
        SECTION.pack_into(data, at, code, zlib.crc32(data[offset : offset + size]), offset, size)
    table = bytes(data[HEADER.size : HEADER.size + count * SECTION.size])
    struct.pack_into("<I", data, 24, zlib.crc32(table))
    struct.pack_into("<I", data, 28, zlib.crc32(bytes(data[:28])))
    return bytes(data)


def patched(content: bytes, offset: int, value: bytes) -> bytes:
    return content[:offset] + value + content[offset + len(value) :]


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that a reader must refuse, by what was done to them."""
    table = sections(content)
    middle = {code: offset + size // 2 for code, (offset, size) in table.items()}
    yield "empty", b""
    yield "half a header", content[:40]
    yield "another kind of file", b"PK\x03\x04" + content[4:]
    yield "line ends changed", content.replace(b"\r\n", b"\n", 1)
    yield "version 4", resealed(patched(content, 8, struct.pack("<I", 4)))
    yield "header", patched(content, 12, b"\x09")
    yield "truncated", content[: len(content) // 2]
    yield "one byte missing", content[:-1]
    yield "one byte more", content + b"\0"
    yield "section table", patched(content, HEADER.size + 8, b"\xff")
    for code, name in ((1, "metadata"), (2, "program"), (3, "data")):
        yield name, patched(content, middle[code], bytes([content[middle[code]] ^ 1]))
    start = table[2][0]
    tensor_count = start + 24
    yield "arena of 2^63 bytes", resealed(patched(content, start + 8, struct.pack("<Q", 1 << 63)))
    yield "states above the arena", resealed(patched(content, start + 8, struct.pack("<Q", 0)))
    yield "no threads", resealed(patched(content, start + 16, struct.pack("<I", 0)))
    yield "2^32 tensors", resealed(patched(content, tensor_count, b"\xff\xff\xff\xff"))
    yield "unknown dtype", resealed(patched(content, tensor_count + 4, b"\x0a"))
    yield "rank 200", resealed(patched(content, tensor_count + 6, b"\xc8"))
    yield "negative size", resealed(patched(content, tensor_count + 8, struct.pack("<q", -1)))
    yield "metadata that is not JSON", resealed(patched(content, table[1][0], b"["))


def first_error(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_messages_about_damaged_files(golden: Callable[..., None], file: Path, tmp_path: Path) -> None:
    lines = []
    for name, content in damaged(file.read_bytes()):
        path = tmp_path / "model.pock"
        path.write_bytes(content)
        text = first_error(lambda path=path: read(path))  # type: ignore[misc]
        text = re.sub(r"\b\d{4,}", "N", text)  # sizes vary: the metadata holds timings
        lines.append(f"{name}: {text.replace(str(tmp_path) + '/', '')}\n")
    golden("".join(lines))


@pytest.mark.native
def test_runtime_refuses_the_same_files(file: Path, tmp_path: Path) -> None:
    for name, content in damaged(file.read_bytes()):
        path = tmp_path / "model.pock"
        path.write_bytes(content)
        assert first_error(lambda path=path: Session(path)), name  # type: ignore[misc]


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        read(tmp_path / "none.pock")


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PATCHES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True), st.sampled_from([b"\0", b"\xff", b"\x7f", b"\xff" * 8, b"\0" * 8, b"\1"])
    ),
    min_size=1,
    max_size=3,
)


def fuzzed(content: bytes, patches: list[tuple[float, bytes]]) -> bytes:
    """A file with a valid envelope and a damaged program section: what only the bounds checks can catch."""
    offset, size = sections(content)[2]
    for place, value in patches:
        at = offset + int(place * size)
        content = patched(content, at, value[: offset + size - at])
    return resealed(content)


@FUZZ
@given(patches=PATCHES)
def test_reader_refuses_or_reads_any_program_section(
    file: Path, tmp_path: Path, patches: list[tuple[float, bytes]]
) -> None:
    path = tmp_path / "fuzzed.pock"
    path.write_bytes(fuzzed(file.read_bytes(), patches))
    try:
        read(path)
    except UserError as error:
        assert "is corrupt" in str(error)


@pytest.mark.native
@FUZZ
@given(patches=PATCHES)
def test_runtime_survives_any_program_section(file: Path, tmp_path: Path, patches: list[tuple[float, bytes]]) -> None:
    path = tmp_path / "fuzzed.pock"
    path.write_bytes(fuzzed(file.read_bytes(), patches))
    try:
        with Session(path) as session:
            session.run("infer", x=np.zeros((2, 3, 6, 6), np.float32))
    except PockcError as error:
        assert str(error)
