"""foldcut: make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal."""

from .compiler import starting as _starting  # noqa: F401 - first: the rest takes seconds to load

# isort: split
from .compiler.analysis.provenance import Provenance, find_units
from .compiler.analysis.regions import Region, RegionAnalysis, find_regions
from .compiler.analysis.unit_groups import UnitGroup
from .compiler.data.calibration_set import CalibrationSet, horizontal_flip, random_crop, read_calibration
from .compiler.driver.api import Compiled, compile
from .compiler.driver.pipeline_settings import PipelineSettings
from .compiler.driver.replay import Replayed, apply, apply_plan
from .compiler.driver.saved import Saved, load
from .compiler.driver.sweep import Sweep, SweepPoint, sweep
from .compiler.frontend.capture import capture
from .compiler.goals.counted import Macs, Parameters
from .compiler.goals.latency import Latency
from .compiler.goals.max_error import MaxError
from .compiler.ir.program import Program, TensorSpec
from .compiler.plan.decision import Decision
from .compiler.plan.goal import Goal
from .compiler.plan.plan import Plan
from .compiler.report.report import Report
from .compiler.rewrite.rewrite import Applied, Offer, Rewrite
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
from .compiler.support.version import __version__ as __version__
from .passes.drop.decision import Blocks, DropBlock
from .passes.drop.rewrite import Drop
from .passes.factorize.decision import FactorizeLayer, Ranks
from .passes.factorize.rewrite import Factorize
from .passes.factorize.select_ranks import RankSettings
from .passes.mimic.settings import MimicSettings
from .passes.prune.channel_budget import ChannelLimits
from .passes.prune.decision import Channels, PruneChannels
from .passes.prune.rewrite import Prune
from .passes.prune.settings import ChannelSettings

__all__ = [
    "Applied",
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
    "Decision",
    "Drop",
    "DropBlock",
    "ExportError",
    "Factorize",
    "FactorizeLayer",
    "Goal",
    "GoalError",
    "Latency",
    "Macs",
    "MaxError",
    "MimicSettings",
    "Offer",
    "OutputError",
    "Parameters",
    "PipelineSettings",
    "Plan",
    "PlanError",
    "Program",
    "ProgramError",
    "Provenance",
    "Prune",
    "PruneChannels",
    "RankSettings",
    "Ranks",
    "Region",
    "RegionAnalysis",
    "Reject",
    "Replayed",
    "Report",
    "Rewrite",
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
