"""pockc: compile a PyTorch model into a sparse training program that a small C++ runtime runs."""

from pockc.build import build
from pockc.errors import BudgetError, InternalError, PockcError, UserError
from pockc.memory_report import MemoryReport
from pockc.optim import SGD, Adam, AdamW, Group, Lion, Optimizer, Schedule
from pockc.program import Program
from pockc.scheme import Scheme
from pockc.session import Session

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BudgetError",
    "Group",
    "InternalError",
    "Lion",
    "MemoryReport",
    "Optimizer",
    "PockcError",
    "Program",
    "Schedule",
    "Scheme",
    "Session",
    "UserError",
    "build",
]
