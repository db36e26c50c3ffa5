"""foldcut: make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal."""

from .compiler.api import Compiled, apply_plan, compile
from .compiler.calibration_set import CalibrationSet, horizontal_flip, random_crop, read_calibration
from .compiler.capture import capture
from .compiler.errors import (
    BackendError,
    CalibrationError,
    CaptureError,
    CompilerError,
    ExportError,
    GoalError,
    OutputError,
    PlanError,
    Reject,
    RewriteError,
)
from .compiler.plan import Blocks, DropBlock, Latency, Plan
from .compiler.program import Program, TensorSpec
from .compiler.regions import Region, RegionAnalysis, find_regions
from .compiler.report import Report
from .passes.mimic import MimicSettings

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Blocks",
    "CalibrationError",
    "CalibrationSet",
    "CaptureError",
    "Compiled",
    "CompilerError",
    "DropBlock",
    "ExportError",
    "GoalError",
    "Latency",
    "MimicSettings",
    "OutputError",
    "Plan",
    "PlanError",
    "Program",
    "Region",
    "RegionAnalysis",
    "Reject",
    "Report",
    "RewriteError",
    "TensorSpec",
    "apply_plan",
    "capture",
    "compile",
    "find_regions",
    "horizontal_flip",
    "random_crop",
    "read_calibration",
]
