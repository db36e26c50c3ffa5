"""Backends that run a network, and the measurement of their latency."""
