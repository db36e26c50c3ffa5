"""What the caches hold when latency is measured."""

from __future__ import annotations

from typing import Literal

Regime = Literal["hot", "cold"]
"""What an inference finds in the caches: itself, as in a loop without pauses, or nothing of itself, as in a server
whose requests come with pauses and whose core does other work in between."""
