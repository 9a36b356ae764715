"""The C demos and the C++ wrapper: compiled with the system's compilers against libpockrt, and run."""

from __future__ import annotations

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

pytestmark = [pytest.mark.torch, pytest.mark.native]

RUNTIME = Path(__file__).parents[2] / "runtime"

WRAPPER = r"""
#include <cstdio>
#include <utility>

#include "bindings/pockc.hpp"

using namespace pockc::api;

int main(int, char** arguments) {
  if (Program::load("/nowhere.pock").status().code() != PK_NOT_FOUND) return 10;
  Result<Program> loaded = Program::load(arguments[1]);
  if (!loaded.ok()) return 11;
  Program program = std::move(loaded.value());
  Result<Session> created = Session::create(program);
  if (!created.ok()) return 12;
  Session session = std::move(created.value());
  if (program.tensors(PK_INPUT, "train_step").size() != 2) return 13;
  float x[2 * 4] = {0.5f, -1, 2, 0, 1, 1, -0.25f, 3};
  int64_t labels[2] = {0, 2};
  const Named inputs[] = {{"input", tensor(x, {2, 4})}, {"labels", tensor(labels, {2})}};
  for (int step = 0; step < 3; ++step) {
    Result<float> loss = session.train_step({inputs[0], inputs[1]});
    if (!loss.ok()) return 14;
    std::printf("%.9g\n", static_cast<double>(loss.value()));
  }
  if (session.train_step({inputs[0]}).ok()) return 15;
  if (!session.save(arguments[2], "{\"at\": 3}").ok()) return 16;
  if (session.load(arguments[2]).value().find("\"at\"") == std::string::npos) return 19;
  float bias[3];
  pk_tensor to = tensor(bias, {3});
  if (!session.read_state("0.bias", &to).ok() || !session.write_state("0.bias", to).ok()) return 17;
  if (session.memory().arena_bytes == 0 || program.metadata()[0] != '{') return 18;
  return 0;
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("bindings") / "model.pock"
    build(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),), optimizer=SGD(lr=0.1)).save(file)
    return file


def compiled(compiler: str, source: Path, folder: Path, *flags: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    library = runtime_file("libpockrt.so")
    program = folder / source.stem
    include = [f"-I{RUNTIME / 'include'}", f"-I{RUNTIME}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    done = subprocess.run(
        [compiler, *flags, *warnings, *include, str(source), *link], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def test_explained_demo_trains_and_resumes(model: Path, tmp_path: Path) -> None:
    demo = compiled("cc", RUNTIME / "bindings" / "demo.c", tmp_path, "-std=c99")

    printed = run(demo, model, tmp_path / "tuned.ckpt")

    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 6 and losses == sorted(losses, reverse=True)
    assert re.search(r"arena \d+ bytes", printed)
    assert (tmp_path / "tuned.ckpt").is_file()


def test_explained_demo_says_why_it_fails(model: Path, tmp_path: Path) -> None:
    demo = compiled("cc", RUNTIME / "bindings" / "demo.c", tmp_path, "-std=c99")
    done = subprocess.run([demo, "nowhere.pock", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("cannot load the program: cannot open nowhere.pock")


def test_terse_demo_trains_on_zeros(model: Path, tmp_path: Path) -> None:
    demo = compiled("cc", RUNTIME / "bindings" / "demo_terse.c", tmp_path, "-std=c99")
    with Session(model) as session:
        expected = [session.train_step(input=np.zeros((2, 4)), labels=[0, 0]) for _ in range(5)]
    assert [float(line) for line in run(demo, model).split()] == pytest.approx(expected, abs=1e-6)


def test_wrapper_does_what_the_python_session_does(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "wrapper.cpp"
    source.write_text(WRAPPER)
    wrapper = compiled("c++", source, tmp_path, "-std=c++17", "-fno-exceptions")
    x = np.array([[0.5, -1, 2, 0], [1, 1, -0.25, 3]])
    with Session(model) as session:
        expected = [np.float32(session.train_step(input=x, labels=[0, 2])) for _ in range(3)]

    printed = run(wrapper, model, tmp_path / "tuned.ckpt")

    assert [np.float32(line) for line in printed.split()] == expected
