"""The passes have one import name."""

from __future__ import annotations

import importlib.util

import pytest

import pockc.passes


def test_importing_the_folder_under_another_name_fails_at_once() -> None:
    spec = importlib.util.spec_from_file_location("passes", pockc.passes.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"pockc\.passes"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
