"""pockc: compile a PyTorch model into a sparse training program that a small C++ runtime runs."""

__version__ = "0.1.0"
