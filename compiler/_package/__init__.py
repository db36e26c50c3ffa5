"""foldcut: make a trained network faster from the network, a few hundred unlabelled inputs and a latency goal."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

from .compiler import starting as _starting  # noqa: F401 - first: what follows takes seconds to load
from .compiler.support.version import __version__ as __version__

if TYPE_CHECKING:
    from .compiler.analysis.provenance import Provenance as Provenance
    from .compiler.analysis.provenance import find_units as find_units
    from .compiler.analysis.regions import Region as Region
    from .compiler.analysis.regions import RegionAnalysis as RegionAnalysis
    from .compiler.analysis.regions import find_regions as find_regions
    from .compiler.analysis.unit_groups import UnitGroup as UnitGroup
    from .compiler.data.calibration_set import CalibrationSet as CalibrationSet
    from .compiler.data.calibration_set import horizontal_flip as horizontal_flip
    from .compiler.data.calibration_set import random_crop as random_crop
    from .compiler.data.calibration_set import read_calibration as read_calibration
    from .compiler.data.shards import Sharded as Sharded
    from .compiler.data.synthetic import SyntheticSet as SyntheticSet
    from .compiler.driver.api import compile as compile
    from .compiler.driver.builtin import Plan as Plan
    from .compiler.driver.pipeline_settings import PipelineSettings as PipelineSettings
    from .compiler.driver.replay import apply as apply
    from .compiler.driver.replay import apply_plan as apply_plan
    from .compiler.driver.result import Compiled as Compiled
    from .compiler.driver.result import Replayed as Replayed
    from .compiler.driver.result import Saved as Saved
    from .compiler.driver.saved import load as load
    from .compiler.driver.sweep import Sweep as Sweep
    from .compiler.driver.sweep import SweepPoint as SweepPoint
    from .compiler.driver.sweep import sweep as sweep
    from .compiler.frontend.capture import capture as capture
    from .compiler.frontend.shards import load_shards as load_shards
    from .compiler.frontend.shards import save_shards as save_shards
    from .compiler.goals.counted import Macs as Macs
    from .compiler.goals.counted import Parameters as Parameters
    from .compiler.goals.latency import Latency as Latency
    from .compiler.goals.max_error import MaxError as MaxError
    from .compiler.goals.max_loss import MaxLoss as MaxLoss
    from .compiler.ir.program import Program as Program
    from .compiler.ir.program import TensorSpec as TensorSpec
    from .compiler.metric.top1 import Top1 as Top1
    from .compiler.plan.decision import Decision as Decision
    from .compiler.plan.goal import Goal as Goal
    from .compiler.plan.proposals import Claims as Claims
    from .compiler.plan.proposals import Item as Item
    from .compiler.plan.proposals import Proposal as Proposal
    from .compiler.report.report import Report as Report
    from .compiler.rewrite.budget import Budget as Budget
    from .compiler.rewrite.context import Context as Context
    from .compiler.rewrite.rewrite import Applied as Applied
    from .compiler.rewrite.rewrite import Offer as Offer
    from .compiler.rewrite.rewrite import Rewrite as Rewrite
    from .compiler.support.errors import BackendError as BackendError
    from .compiler.support.errors import CalibrationError as CalibrationError
    from .compiler.support.errors import CaptureError as CaptureError
    from .compiler.support.errors import CompilerError as CompilerError
    from .compiler.support.errors import ExportError as ExportError
    from .compiler.support.errors import GoalError as GoalError
    from .compiler.support.errors import OutputError as OutputError
    from .compiler.support.errors import PlanError as PlanError
    from .compiler.support.errors import ProcessError as ProcessError
    from .compiler.support.errors import ProgramError as ProgramError
    from .compiler.support.errors import Reject as Reject
    from .compiler.support.errors import RewriteError as RewriteError
    from .compiler.synthesis.settings import SynthesisSettings as SynthesisSettings
    from .compiler.synthesis.synthesise import synthesise as synthesise
    from .passes.drop.decision import Blocks as Blocks
    from .passes.drop.decision import DropBlock as DropBlock
    from .passes.drop.rewrite import Drop as Drop
    from .passes.factorize.decision import FactorizeLayer as FactorizeLayer
    from .passes.factorize.decision import Ranks as Ranks
    from .passes.factorize.rewrite import Factorize as Factorize
    from .passes.factorize.select_ranks import RankSettings as RankSettings
    from .passes.mimic.settings import MimicSettings as MimicSettings
    from .passes.prune.channel_budget import ChannelLimits as ChannelLimits
    from .passes.prune.decision import Channels as Channels
    from .passes.prune.decision import PruneChannels as PruneChannels
    from .passes.prune.rewrite import Prune as Prune
    from .passes.prune.settings import ChannelSettings as ChannelSettings
    from .passes.quantize.decision import QuantizeLayer as QuantizeLayer
    from .passes.quantize.dequantize import dequantize as dequantize
    from .passes.quantize.rewrite import Quantize as Quantize
    from .passes.solve.changes import Changes as Changes

#: Where each public name is defined: it is imported when it is first asked for.
_HOMES = {
    "compiler.analysis.provenance": "Provenance find_units",
    "compiler.analysis.regions": "Region RegionAnalysis find_regions",
    "compiler.analysis.unit_groups": "UnitGroup",
    "compiler.data.calibration_set": "CalibrationSet horizontal_flip random_crop read_calibration",
    "compiler.data.shards": "Sharded",
    "compiler.data.synthetic": "SyntheticSet",
    "compiler.driver.api": "compile",
    "compiler.driver.result": "Compiled Replayed Saved",
    "compiler.driver.builtin": "Plan",
    "compiler.driver.pipeline_settings": "PipelineSettings",
    "compiler.driver.replay": "apply apply_plan",
    "compiler.driver.saved": "load",
    "compiler.driver.sweep": "Sweep SweepPoint sweep",
    "compiler.frontend.capture": "capture",
    "compiler.frontend.shards": "load_shards save_shards",
    "compiler.goals.counted": "Macs Parameters",
    "compiler.goals.latency": "Latency",
    "compiler.goals.max_error": "MaxError",
    "compiler.goals.max_loss": "MaxLoss",
    "compiler.ir.program": "Program TensorSpec",
    "compiler.metric.top1": "Top1",
    "compiler.plan.decision": "Decision",
    "compiler.plan.goal": "Goal",
    "compiler.plan.proposals": "Claims Item Proposal",
    "compiler.report.report": "Report",
    "compiler.rewrite.budget": "Budget",
    "compiler.rewrite.context": "Context",
    "compiler.rewrite.rewrite": "Applied Offer Rewrite",
    "compiler.support.errors": "BackendError CalibrationError CaptureError CompilerError "
    "ExportError GoalError OutputError PlanError ProcessError ProgramError Reject RewriteError",
    "compiler.synthesis.settings": "SynthesisSettings",
    "compiler.synthesis.synthesise": "synthesise",
    "passes.drop.decision": "Blocks DropBlock",
    "passes.drop.rewrite": "Drop",
    "passes.factorize.decision": "FactorizeLayer Ranks",
    "passes.factorize.rewrite": "Factorize",
    "passes.factorize.select_ranks": "RankSettings",
    "passes.mimic.settings": "MimicSettings",
    "passes.prune.channel_budget": "ChannelLimits",
    "passes.prune.decision": "Channels PruneChannels",
    "passes.prune.rewrite": "Prune",
    "passes.prune.settings": "ChannelSettings",
    "passes.quantize.decision": "QuantizeLayer",
    "passes.quantize.dequantize": "dequantize",
    "passes.quantize.rewrite": "Quantize",
    "passes.solve.changes": "Changes",
}
__all__ = [
    "Applied",
    "BackendError",
    "Blocks",
    "Budget",
    "CalibrationError",
    "CalibrationSet",
    "CaptureError",
    "Changes",
    "ChannelLimits",
    "ChannelSettings",
    "Channels",
    "Claims",
    "Compiled",
    "CompilerError",
    "Context",
    "Decision",
    "Drop",
    "DropBlock",
    "ExportError",
    "Factorize",
    "FactorizeLayer",
    "Goal",
    "GoalError",
    "Item",
    "Latency",
    "Macs",
    "MaxError",
    "MaxLoss",
    "MimicSettings",
    "Offer",
    "OutputError",
    "Parameters",
    "PipelineSettings",
    "Plan",
    "PlanError",
    "ProcessError",
    "Program",
    "ProgramError",
    "Proposal",
    "Provenance",
    "Prune",
    "PruneChannels",
    "Quantize",
    "QuantizeLayer",
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
    "Sharded",
    "Sweep",
    "SweepPoint",
    "SynthesisSettings",
    "SyntheticSet",
    "TensorSpec",
    "Top1",
    "UnitGroup",
    "apply",
    "apply_plan",
    "capture",
    "compile",
    "dequantize",
    "find_regions",
    "find_units",
    "horizontal_flip",
    "load",
    "load_shards",
    "random_crop",
    "read_calibration",
    "save_shards",
    "sweep",
    "synthesise",
]


def __getattr__(name: str) -> _Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(_import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
