"""Modelled cycles of a training step on 64-bit ARM, kernel by kernel: `python -m benchmarks.cycle_model`.

`pock-run bench` runs under qemu-user with a plugin that counts how often each block of instructions is executed, once
with few and once with more steps: the difference is a step. llvm-mca then simulates the hottest blocks on a model of a
core, each of them repeated, and the cycles of a step are the sum of count times cycles.

It is a model, and no measurement. It assumes that every load hits the first cache, that no branch is mispredicted, that
a block follows upon itself, as inner loops do, and that what is not simulated, a hundredth of all instructions, takes
as long per instruction as the rest. LLVM 14 has one model for the Cortex-A57, A72 and A76, with the divisions and
square roots of the A57, which are slower than those of the others; that of the A53 is its own.

Its use is to show a change: the same program gives the same figures everywhere, which are held to those on record.
"""

import argparse
import bisect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import emulation, report
from benchmarks.instruction_counts import FEW_STEPS, MORE_STEPS, STEPS, build_plugin
from pockc.targets import devices
from pockc.targets.native import cross

SCHEMES = ("full", "sparse")
SIMULATED = 0.99  # of the executed instructions
ITERATIONS = 100  # of each block
KERNELS_SHOWN = 14
AT_MOST = 1.02  # of the figures on record
RECORD = Path(__file__).with_name("results") / "cycle_model.json"
_TOOLS = ("llvm-mca", "llvm-mc", "nm")


@dataclass(frozen=True)
class Core:
    """A core that llvm-mca knows."""

    board: str
    name: str
    gigahertz: float


CORES = (
    Core("Raspberry Pi 3", "cortex-a53", 1.2),
    Core("Raspberry Pi 4", "cortex-a72", 1.5),
    Core("Raspberry Pi 5", "cortex-a76", 2.4),
)

Words = tuple[str, ...]  # instructions, as hexadecimal numbers


@dataclass(frozen=True)
class Block:
    """Instructions that are executed in a row, and how often a step does so."""

    kernel: str
    words: Words
    count: float

    @property
    def instructions(self) -> float:
        """Executed in a step."""
        return self.count * len(self.words)


def main() -> None:
    """Count, simulate, print, write JSON; exit code 1 where a step takes longer than on record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--record", action="store_true", help="make the figures those on record")
    parser.add_argument("--output", type=Path, default=report.OUT / "cycle_model.json")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="pockc-cycles-") as folder:
        plugin = build_plugin(Path(folder), "count_blocks.c")
        steps = {scheme: blocks_of_step(scheme, arguments.image_size, Path(folder), plugin) for scheme in SCHEMES}
    cycles = {
        scheme: {core.name: cycles_by_kernel(blocks, core.name) for core in CORES} for scheme, blocks in steps.items()
    }
    milliseconds = {
        scheme: {core.name: sum(cycles[scheme][core.name].values()) / core.gigahertz / 1e6 for core in CORES}
        for scheme in SCHEMES
    }
    print_results(cycles, milliseconds, arguments.image_size)
    content = {"llvm": llvm_version(), "image_size": arguments.image_size, "modelled_ms": milliseconds}
    report.write_json(arguments.output, {**content, "cycles": cycles})
    if arguments.record:
        report.write_json(RECORD, content)
    found = ", ".join(f"{milliseconds['sparse'][c.name]:.1f} ms sparse on a {c.board}" for c in CORES)
    sys.exit(report.finish("cycle model", found, bars_of(content, json.loads(RECORD.read_text(encoding="utf-8")))))


def missing() -> str:
    """Why nothing can be modelled here, in one sentence; empty if it can."""
    lacking = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if reason := emulation.missing("aarch64"):
        return reason
    return f"{', '.join(lacking)}: not installed (Debian: llvm, binutils)" if lacking else ""


def llvm_version() -> str:
    """Of llvm-mca, such as 14.0.6: others may have other models of the cores."""
    found = re.search(r"version ([\d.]+)", _output(["llvm-mca", "--version"]))
    return found[1] if found else "unknown"


def blocks_of_step(scheme: str, image_size: int, folder: Path, plugin: Path) -> list[Block]:
    """What one step of a scheme executes."""
    program = STEPS[scheme].compiled(image_size)
    program.save(folder / "model.pock")
    runner = cross.build_runner(program, devices.find("rpi4"), folder, "zig", symbols=True)
    few, more = (count(runner, folder, plugin, steps) for steps in (FEW_STEPS, MORE_STEPS))
    symbols = Symbols(_output(["nm", "--demangle", str(runner)]))
    return [
        Block(kernel_of(symbols.at(address)), words, (number - few.get((address, words), 0)) / (MORE_STEPS - FEW_STEPS))
        for (address, words), number in more.items()
        if number > few.get((address, words), 0)
    ]


def count(runner: Path, folder: Path, plugin: Path, steps: int) -> dict[tuple[int, Words], int]:
    """How often each block is executed by a whole `pock-run bench`."""
    log = folder / "blocks.txt"
    before = [*emulation.emulated("aarch64", "cortex-a72"), "-plugin", str(plugin), "-d", "plugin", "-D", str(log)]
    emulation.run(runner, ["bench", folder / "model.pock", "--steps", steps, "--entry", "train_step"], before)
    return parse_blocks(log.read_text())


def parse_blocks(text: str) -> dict[tuple[int, Words], int]:
    """What the plugin printed. A block that was translated twice is there twice."""
    counts: dict[tuple[int, Words], int] = defaultdict(int)
    for address, number, words in re.findall(r"^block (\w+) (\d+)((?: \w{8})+)$", text, re.MULTILINE):
        counts[int(address, 16), tuple(words.split())] += int(number)
    return dict(counts)


class Symbols:
    """The functions of a program, from what `nm` printed."""

    def __init__(self, text: str) -> None:
        found = sorted((int(at, 16), name) for at, name in re.findall(r"^(\w+) [tTwW] (.*)$", text, re.MULTILINE))
        self._starts = [start for start, _ in found]
        self._names: list[str] = [name for _, name in found]

    def at(self, address: int) -> str:
        """The one that an address lies in."""
        return self._names[bisect.bisect_right(self._starts, address) - 1]


def kernel_of(symbol: str) -> str:
    """A short name: of a function, or of the op whose loop it is."""
    plain = symbol.replace("(anonymous namespace)", "")
    if "operator()" in plain or re.search(r"\bparallel<", plain):
        op = re.search(r"\brun_(\w+)", plain)
        return op[1] if op else "other loops"
    return re.split(r"[<(]", plain)[0].split("::")[-1].split(" ")[-1]


def cycles_by_kernel(blocks: Sequence[Block], core: str) -> dict[str, float]:
    """Cycles of a step, most first. What is not simulated is shared out by instructions."""
    hot = hottest(blocks, SIMULATED)
    taken = simulate([block.words for block in hot], core)
    simulated = sum(block.instructions for block in hot)
    factor = sum(block.instructions for block in blocks) / simulated
    cycles: dict[str, float] = defaultdict(float)
    for block, each in zip(hot, taken, strict=True):
        cycles[block.kernel] += factor * block.count * each
    return dict(sorted(cycles.items(), key=lambda item: -item[1]))


def hottest(blocks: Iterable[Block], share: float) -> list[Block]:
    """The fewest blocks with that share of all executed instructions."""
    ordered = sorted(blocks, key=lambda block: -block.instructions)
    wanted, chosen = share * sum(block.instructions for block in ordered), []
    for block in ordered:
        if wanted <= 0:
            break
        chosen.append(block)
        wanted -= block.instructions
    return chosen


def simulate(blocks: Sequence[Words], core: str) -> list[float]:
    """Cycles of each block, as one of many in a row. Raises RuntimeError with llvm-mca's message where it fails."""
    text = disassemble({word for words in blocks for word in words})
    regions = (
        f"# LLVM-MCA-BEGIN {i}\n" + "\n".join(text[word] for word in words) + "\n# LLVM-MCA-END\n"
        for i, words in enumerate(blocks)
    )
    options = ["--mtriple=aarch64-linux-gnu", f"--mcpu={core}", f"--iterations={ITERATIONS}", "--json"]
    quiet = ["--instruction-info=0", "--resource-pressure=0"]
    found = json.loads(_output(["llvm-mca", *options, *quiet], "".join(regions)), strict=False)
    cycles = {int(region["Name"]): region["SummaryView"]["TotalCycles"] for region in found["CodeRegions"]}
    return [cycles[i] / ITERATIONS for i in range(len(blocks))]


def disassemble(words: Iterable[str]) -> dict[str, str]:
    """Assembly of instructions, by their hexadecimal numbers. Raises RuntimeError where one is unknown."""
    ordered = sorted(words)
    listed = "\n".join(" ".join(f"0x{byte:02x}" for byte in reversed(bytes.fromhex(word))) for word in ordered)
    command = ["llvm-mc", "--disassemble", "--triple=aarch64", "--mattr=+v8.2a,+dotprod,+fullfp16"]
    lines = [line.strip() for line in _output(command, listed).splitlines() if line.strip() != ".text"]
    if len(lines) != len(ordered):
        raise RuntimeError(f"llvm-mc knows {len(lines)} of {len(ordered)} instructions")
    return dict(zip(ordered, lines, strict=True))


def bars_of(found: Mapping[str, object], record: Mapping[str, object]) -> list[report.Bar]:
    """Each modelled time against that on record, where both come from the same model and image size."""
    if (found["llvm"], found["image_size"]) != (record["llvm"], record["image_size"]):
        print(f"The record is of LLVM {record['llvm']} and {record['image_size']} px: not compared")
        return []
    new, old = (_times(content) for content in (found, record))
    return [
        report.Bar(f"{name}, modelled time over that on record", new[name] / old[name], at_most=AT_MOST) for name in old
    ]


def _times(content: Mapping[str, object]) -> dict[str, float]:
    by_scheme = content["modelled_ms"]
    assert isinstance(by_scheme, Mapping)
    return {f"{scheme} on {core}": ms for scheme, by_core in by_scheme.items() for core, ms in by_core.items()}


def print_results(
    cycles: Mapping[str, Mapping[str, Mapping[str, float]]], milliseconds: Mapping[str, Mapping[str, float]], size: int
) -> None:
    """A table of steps, and one of the kernels of a full step."""
    report.print_table(
        f"Modelled milliseconds of a step, no measurement: MobileNetV2, {size} px, batch 1, one thread",
        ["board", "core", *SCHEMES, "sparse / full"],
        [
            [
                *(core.board, core.name),
                *(f"{milliseconds[scheme][core.name]:.1f}" for scheme in SCHEMES),
                f"{milliseconds['sparse'][core.name] / milliseconds['full'][core.name]:.3f}",
            ]
            for core in CORES
        ],
    )
    first = cycles["full"][CORES[1].name]
    report.print_table(
        "Modelled millions of cycles of a full step, by kernel",
        ["kernel", *(core.name for core in CORES)],
        [
            [kernel, *(f"{cycles['full'][core.name].get(kernel, 0) / 1e6:.2f}" for core in CORES)]
            for kernel in list(first)[:KERNELS_SHOWN]
        ],
    )


def _output(command: Sequence[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, check=False, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[:2000]}")
    return done.stdout


if __name__ == "__main__":
    main()
