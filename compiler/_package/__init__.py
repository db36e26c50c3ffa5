"""foldcut: make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal."""

from .compiler import starting as _starting  # noqa: F401 - first: the rest takes seconds to load

# isort: split
from .compiler.analysis.provenance import Provenance, find_units
from .compiler.analysis.regions import Region, RegionAnalysis, find_regions
from .compiler.analysis.unit_groups import UnitGroup
from .compiler.data.calibration_set import CalibrationSet, horizontal_flip, random_crop, read_calibration
from .compiler.driver.api import Compiled, compile
from .compiler.driver.channel_pipeline import ChannelSettings
from .compiler.driver.pipeline_settings import PipelineSettings
from .compiler.driver.replay import Replayed, apply, apply_plan
from .compiler.driver.saved import Saved, load
from .compiler.driver.sweep import Sweep, SweepPoint, sweep
from .compiler.frontend.capture import capture
from .compiler.ir.program import Program, TensorSpec
from .compiler.plan.plan import (
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
from .compiler.report.report import Report
from .compiler.support.errors import (
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
from .passes.factorize.select_ranks import RankSettings
from .passes.mimic.settings import MimicSettings
from .passes.prune.channel_budget import ChannelLimits

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
