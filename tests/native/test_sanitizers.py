"""The kernel tests again, on a build with AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import kernels

SHIM = kernels.ROOT / "build" / "asan" / "test" / "libkernel_shim.so"
OVERFLOW = """
from pockc.ir import TensorType
from tests.native import kernels
small, large = TensorType((4,)), TensorType((5,))
blocks = [kernels.Block(small.nbytes)], [kernels.Block(large.nbytes)]
kernels.call("neg", "ref", [large], [large], [], [], blocks)
"""

pytestmark = [pytest.mark.native, pytest.mark.slow]


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with the sanitizers' runtime loaded first, as a sanitized library wants it."""
    if not SHIM.exists():
        pytest.skip("there is no build/asan: `make asan` makes it")
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    if not all(Path(file).is_absolute() for file in found):
        pytest.skip("the compiler has no shared sanitizer runtime to load first")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "POCKC_KERNEL_SHIM": str(SHIM),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=kernels.ROOT, env=environment, capture_output=True, text=True, check=False)


def test_no_kernel_call_touches_memory_outside_its_operands() -> None:
    files = [f"tests/native/{name}.py" for name in ("test_kernels", "test_half_kernels", "test_half_products")]
    done = sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_sanitizer_sees_a_read_past_an_operand() -> None:
    done = sanitized("-c", OVERFLOW)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
