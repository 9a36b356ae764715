"""The cycle model: what it reads, what it chooses, and that llvm-mca's figures arrive where they belong."""

import pytest

from benchmarks import cycle_model
from benchmarks.cycle_model import Block, Symbols

FMLA, LOAD, DIVIDE = "4fa21020", "3cc10400", "6e22fc20"  # fmla, ldr, fdiv of four floats


def test_blocks_of_one_address_are_added_up() -> None:
    text = "block 1000 7 4fa21020 3cc10400\nnoise\nblock 2000 1 6e22fc20\nblock 1000 3 4fa21020 3cc10400\n"
    assert cycle_model.parse_blocks(text) == {(0x1000, (FMLA, LOAD)): 10, (0x2000, (DIVIDE,)): 1}


@pytest.mark.parametrize(
    ("symbol", "kernel"),
    [
        ("void pockc::simd_neon::micro_kernel<8, 3, true>(pockc::simd_neon::Tile const&)", "micro_kernel"),
        ("pockc::simd_neon::(anonymous namespace)::gemm_part(pockc::simd_neon::Gemm const&, long)", "gemm_part"),
        ("pockc::simd_neon::run_attention(pockc::Call const&)::$_0::operator()(long, long, int) const", "attention"),
        ("pockc::simd_neon::parallel<combine_of<float, pockc::simd_neon::run_add(pockc::Call const&)::$_0>>()", "add"),
        ("memset", "memset"),
    ],
)
def test_kernels_have_short_names(symbol: str, kernel: str) -> None:
    assert cycle_model.kernel_of(symbol) == kernel


def test_an_address_belongs_to_the_function_before_it() -> None:
    symbols = Symbols("0000000000002000 T second\n0000000000001000 t first(int)\n0000000000003000 D data\n")
    assert [symbols.at(address) for address in (0x1000, 0x1FFC, 0x2004)] == ["first(int)", "first(int)", "second"]


def test_the_hottest_blocks_are_the_fewest_with_their_share() -> None:
    blocks = [Block("a", (FMLA,), 10), Block("b", (FMLA, LOAD), 45), Block("c", (LOAD,), 1)]
    assert [block.kernel for block in cycle_model.hottest(blocks, 0.89)] == ["b"]
    assert [block.kernel for block in cycle_model.hottest(blocks, 0.95)] == ["b", "a"]


@pytest.mark.parametrize("core", cycle_model.CORES, ids=lambda core: core.name)
def test_simulated_cycles_are_counted_and_shared_out(core: cycle_model.Core) -> None:
    if reason := cycle_model.missing():
        pytest.skip(reason)
    load, divide = cycle_model.simulate([(LOAD,), (DIVIDE,)], core.name)
    assert 0 < load < divide

    cycles = cycle_model.cycles_by_kernel([Block("loads", (LOAD,), 1), Block("division", (DIVIDE,), 999)], core.name)
    assert cycles == pytest.approx({"division": 1000 * divide})  # the load is a thousandth: not simulated


def test_unknown_instructions_are_an_error() -> None:
    if reason := cycle_model.missing():
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="llvm-mc"):
        cycle_model.disassemble(["ffffffff", FMLA])


def test_a_slower_step_than_that_on_record_misses_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"llvm": "14.0.6", "image_size": 96, "modelled_ms": {"full": {"cortex-a72": 100.0}}}
    slower = {**record, "modelled_ms": {"full": {"cortex-a72": 103.0}}}

    assert [bar.met for bar in cycle_model.bars_of(record, record)] == [True]
    assert [bar.met for bar in cycle_model.bars_of(slower, record)] == [False]
    assert cycle_model.bars_of({**slower, "llvm": "15.0.0"}, record) == []
    assert "not compared" in capsys.readouterr().out
