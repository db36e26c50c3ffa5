"""foldcut: make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal."""

from .compiler.api import Compiled, compile
from .compiler.calibration_set import CalibrationSet, horizontal_flip, random_crop, read_calibration
from .compiler.capture import capture
from .compiler.channel_budget import ChannelLimits
from .compiler.channel_pipeline import ChannelSettings
from .compiler.errors import (
    BackendError,
    CalibrationError,
    CaptureError,
    CompilerError,
    ExportError,
    GoalError,
    OutputError,
    PlanError,
    ProgramError,
    Reject,
    RewriteError,
)
from .compiler.pipeline_settings import PipelineSettings
from .compiler.plan import (
    Blocks,
    Channels,
    DropBlock,
    FactorizeLayer,
    Latency,
    Macs,
    MaxError,
    Parameters,
    Plan,
    PruneChannels,
    Ranks,
)
from .compiler.program import Program, TensorSpec
from .compiler.provenance import Provenance, find_units
from .compiler.regions import Region, RegionAnalysis, find_regions
from .compiler.replay import Replayed, apply, apply_plan
from .compiler.report import Report
from .compiler.saved import Saved, load
from .compiler.sweep import Sweep, SweepPoint, sweep
from .compiler.unit_groups import UnitGroup
from .passes.mimic_settings import MimicSettings
from .passes.select_ranks import RankSettings

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Blocks",
    "CalibrationError",
    "CalibrationSet",
    "CaptureError",
    "ChannelLimits",
    "ChannelSettings",
    "Channels",
    "Compiled",
    "CompilerError",
    "DropBlock",
    "ExportError",
    "FactorizeLayer",
    "GoalError",
    "Latency",
    "Macs",
    "MaxError",
    "MimicSettings",
    "OutputError",
    "Parameters",
    "PipelineSettings",
    "Plan",
    "PlanError",
    "Program",
    "ProgramError",
    "Provenance",
    "PruneChannels",
    "RankSettings",
    "Ranks",
    "Region",
    "RegionAnalysis",
    "Reject",
    "Replayed",
    "Report",
    "RewriteError",
    "Saved",
    "Sweep",
    "SweepPoint",
    "TensorSpec",
    "UnitGroup",
    "apply",
    "apply_plan",
    "capture",
    "compile",
    "find_regions",
    "find_units",
    "horizontal_flip",
    "load",
    "random_crop",
    "read_calibration",
    "sweep",
]
