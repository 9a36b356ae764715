"""The natives of the Android binding, called by a real JVM: `make test-jni` installs one where that is permitted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pockc.abi import runtime_file
from pockc.build import build
from pockc.optim import SGD
from pockc.session import Session
from pockc.targets import devices
from pockc.targets.native import toolchain
from tests.cross.boards import MACHINES, elf_machine

pytestmark = [pytest.mark.torch, pytest.mark.native]

RUNTIME = Path(__file__).parents[2] / "runtime"
ANDROID = RUNTIME / "bindings" / "android"
X = [[0.5, -1, 2, 0], [1, 1, -0.25, 3]]
LABELS = [0, 2]

MAIN = """
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;
import org.pockc.Native;

public class Main {
  static ByteBuffer buffer(int bytes) {
    return ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
  }

  static void refused(String what, Runnable action) {
    try {
      action.run();
      System.out.println(what + ": not refused");
    } catch (IllegalStateException | IllegalArgumentException error) {
      System.out.println(what + ": " + error.getClass().getSimpleName() + ": " + error.getMessage());
    }
  }

  static void train(long model, String[] names, ByteBuffer[] inputs) {
    Native.run(model, "train_step", names, inputs, new String[0], new ByteBuffer[0]);
  }

  public static void main(String[] arguments) {
    long model = Native.open(arguments[0], 1);
    ByteBuffer x = buffer(32), labels = buffer(16), loss = buffer(4), bias = buffer(12);
    for (double value : new double[] {0.5, -1, 2, 0, 1, 1, -0.25, 3}) x.putFloat((float) value);
    labels.putLong(0).putLong(2);
    String[] names = {"input", "labels"}, wanted = {"loss"};
    ByteBuffer[] inputs = {x, labels}, outputs = {loss};
    String type = Arrays.toString(Native.type(model, "train_step", 0, 0));
    System.out.println(Native.name(model, "train_step", 0, 0) + " " + type);
    System.out.println(Native.name(model, "train_step", 0, 2) + " " + Native.metadata(model).startsWith("{"));
    for (int step = 0; step < 3; ++step) {
      Native.run(model, "train_step", names, inputs, wanted, outputs);
      System.out.println("loss " + loss.getFloat(0));
    }
    Native.save(model, arguments[1], "{\\"at\\": 3}");
    System.out.println(Native.load(model, arguments[1]) + " " + (Native.arenaBytes(model) > 0));
    Native.readState(model, "0.bias", bias);
    System.out.println("bias " + bias.getFloat(0));

    refused("no file", () -> Native.open("/nowhere.pock", 1));
    refused("no path", () -> Native.open(null, 1));
    refused("no such input", () -> train(model, new String[] {"y"}, new ByteBuffer[] {x}));
    refused("missing input", () -> train(model, new String[] {"input"}, new ByteBuffer[] {x}));
    refused("size", () -> train(model, names, new ByteBuffer[] {x, loss}));
    refused("heap", () -> train(model, names, new ByteBuffer[] {x, ByteBuffer.allocate(16)}));
    refused("null buffer", () -> train(model, names, new ByteBuffer[2]));
    refused("lengths", () -> train(model, names, new ByteBuffer[] {x}));
    refused("no such state", () -> Native.readState(model, "1.bias", bias));
    refused("no checkpoint", () -> Native.load(model, "/nowhere.ckpt"));
    Native.close(model);
  }
}
"""


def call(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words[0]}: exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def java_home() -> Path:
    compiler = shutil.which("javac")
    if compiler is None:
        pytest.skip("there is no JDK here: `make test-jni` installs one where that is permitted")
    home = Path(os.path.realpath(compiler)).parents[1]
    if not (home / "include" / "jni.h").is_file():
        pytest.skip(f"there is no jni.h in {home}")
    return home


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("jni") / "model.pock"
    build(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),), optimizer=SGD(lr=0.1)).save(file)
    return file


def test_a_jvm_trains_saves_and_gets_exceptions(model: Path, tmp_path: Path) -> None:
    home = java_home()
    library = runtime_file("libpockrt.so")
    include = [f"-I{folder}" for folder in (home / "include", home / "include" / "linux", RUNTIME / "include")]
    warnings = ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fPIC", "-shared"]
    binding = tmp_path / "libpockc_jni.so"
    call(
        "cc",
        "-std=c99",
        *warnings,
        *include,
        ANDROID / "pockc_jni.c",
        library,
        f"-Wl,-rpath,{library.parent}",
        "-o",
        binding,
    )
    (tmp_path / "Main.java").write_text(MAIN)
    call(
        "javac",
        "-Xlint:all",
        "-Werror",
        "-d",
        tmp_path,
        ANDROID / "org" / "pockc" / "Native.java",
        tmp_path / "Main.java",
    )
    with Session(model) as session:
        losses = [np.float32(session.train_step(input=X, labels=LABELS)) for _ in range(3)]
        bias = session.parameters()["0.bias"][0]

    printed = call(
        "java",
        "-Xcheck:jni",
        "-Xmx64m",
        f"-Djava.library.path={tmp_path}",
        "-cp",
        tmp_path,
        "Main",
        model,
        tmp_path / "c",
    ).splitlines()

    assert printed[:2] == ["input [0, 2, 4]", "null true"]
    assert [np.float32(line.removeprefix("loss ")) for line in printed[2:5]] == losses
    assert printed[5] == '{"at": 3} true'
    assert np.float32(printed[6].removeprefix("bias ")) == bias
    refused = dict(line.split(": ", 1) for line in printed[7:])
    assert refused["no file"] == "IllegalStateException: cannot open /nowhere.pock: No such file or directory"
    assert refused["no path"] == "IllegalArgumentException: a string is null"
    assert refused["size"] == "IllegalArgumentException: a ByteBuffer has not the size of its tensor"
    assert refused["heap"] == refused["null buffer"] == "IllegalArgumentException: a tensor is no direct ByteBuffer"
    assert refused["lengths"].startswith("IllegalArgumentException: there must be one buffer per name")
    assert refused["no such input"] == "IllegalArgumentException: there is no y in train_step"
    assert refused["no such state"] == "IllegalArgumentException: there is no 1.bias in the states"
    for what in ("missing input", "no checkpoint"):
        assert refused[what].startswith("IllegalStateException: "), refused[what]
    assert len(refused) == 10 and not any("WARNING" in line or "not refused" in line for line in printed)


# What the NDK's toolchain file tells CMake, over zig: the same system and processor, but another C library.
NDK = """
include("{zig}")
set(CMAKE_SYSTEM_NAME Android)
set(CMAKE_SYSTEM_VERSION 1)  # a toolchain file of somebody else's: CMake looks for no NDK
"""


def test_recipe_for_the_ndk_configures_compiles_and_links_what_it_should(tmp_path: Path) -> None:
    home = java_home()
    if not toolchain.has_zig():
        pytest.skip("zig is not installed: pip install 'pockc[cross]'")
    zig = toolchain.for_device(devices.find("android-arm64"), "zig").file
    (tmp_path / "ndk.cmake").write_text(NDK.format(zig=zig))
    options = {
        "CMAKE_TOOLCHAIN_FILE": tmp_path / "ndk.cmake",
        "CMAKE_MAKE_PROGRAM": toolchain.tool("ninja"),
        "ANDROID_ABI": "arm64-v8a",
        "JNI_INCLUDE_DIRS": f"{home / 'include'};{home / 'include' / 'linux'}",
    }
    tree, compiled = tmp_path / "build", "CMakeFiles/pockc_jni.dir/pockc_jni.c.o"

    definitions = [f"-D{name}={value}" for name, value in options.items()]
    call(toolchain.tool("cmake"), "-S", ANDROID, "-B", tree, "-G", "Ninja", *definitions)
    call(toolchain.tool("ninja"), "-C", tree, compiled)  # the kernels would take minutes: `make test-cross` has them
    commands = call(toolchain.tool("ninja"), "-C", tree, "-t", "commands", "pockc_jni").splitlines()

    assert elf_machine((tree / compiled).read_bytes()) == MACHINES["aarch64"]
    assert "-o libpockc_jni.so" in commands[-1] and "runtime/libpockrt_static.a" in commands[-1]
    assert "-Wl,-z,max-page-size=16384" in commands[-1] and "-Wl,--exclude-libs,ALL" in commands[-1]
    kernels = [line for line in commands if line.endswith("kernels/simd/gemm.cpp")]
    sets = {re.search(r"-DPOCKC_ISA=(\w+)", line)[1] for line in kernels}  # type: ignore[index]  # each has one
    assert len(kernels) == 2 and sets == {"neon", "fp16"} and all("-fPIC" in line for line in kernels)
