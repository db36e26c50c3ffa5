"""Measurements over fresh loads, on sessions whose time is drawn when they are loaded."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foldcut.compiler.support.errors import BackendError
from foldcut.runtime.measure import environment
from foldcut.runtime.measure.backend import Array, Clock
from foldcut.runtime.measure.bootstrap import loads_interval
from foldcut.runtime.measure.cache_eviction import CacheEviction, last_level_bytes
from foldcut.runtime.measure.environment import OtherWork
from foldcut.runtime.measure.fresh_loads import Effort, measure_loads
from foldcut.runtime.measure.measurement import Measurement

EFFORT = Effort(loads=5, most_loads=9, rounds=4, warmup_ms=0)


class Sessions:
    """Loads of networks that take 10 ms and `ratio` times 10 ms, but for what each session draws: its buffers' luck."""

    def __init__(self, ratio: float = 1.0, luck: float = 0.0, noise: float = 0.0, seed: int = 0) -> None:
        self.ratio, self.luck, self.noise = ratio, luck, noise
        self.generator = np.random.default_rng(seed)
        self.open = self.loads = self.most_open = 0
        self.fail_at = self.cold_times = 0
        self.evicts = False

    def before(self) -> "Session":
        return self._load(10.0)

    def after(self) -> "Session":
        return self._load(10.0 * self.ratio)

    def _load(self, time_ms: float) -> "Session":
        self.loads += 1
        if self.loads == self.fail_at:
            raise BackendError("no memory left")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        kind = EvictingSession if self.evicts else Session
        return kind(self, time_ms * float(np.exp(self.generator.normal(0, self.luck))))

    def measured(self, regime: Any = "hot", seed: int = 0, **options: Any) -> Measurement:
        return measure_loads(self.before, self.after, replace(EFFORT, regime=regime, seed=seed), **options)[regime]


class Session:
    clock: Clock = "cuda"

    def __init__(self, home: Sessions, time_ms: float) -> None:
        self.home, self.time_ms = home, time_ms

    def run(self) -> None: ...

    def elapsed_ms(self) -> float:
        return self.time_ms * float(np.exp(self.home.generator.normal(0, self.home.noise)))

    def outputs(self) -> tuple[Array, ...]:
        return ()

    def close(self) -> None:
        self.home.open -= 1


class EvictingSession(Session):
    """One that takes 5 ms longer when it starts from empty caches."""

    empty = False

    def evict_caches(self) -> None:
        self.empty = True

    def elapsed_ms(self) -> float:
        extra, self.empty = (5.0 if self.empty else 0.0), False
        return super().elapsed_ms() + extra


def tries(count: int, make: Callable[[int], Sessions]) -> Iterator[tuple[Measurement, Measurement]]:
    for seed in range(count):
        yield tuple(make(2 * seed + i).measured(seed=i) for i in (0, 1))  # type: ignore[misc]


def test_steady_sessions_give_the_ratio_from_the_fewest_loads() -> None:
    sessions = Sessions(0.8)
    found = sessions.measured(environment={"batch": 4})
    assert found.ratio == pytest.approx(0.8)
    assert found.low == pytest.approx(found.high) == pytest.approx(0.8)
    assert (found.pairs, len(found.loads), found.regime, found.clock) == (20, 5, "hot", "cuda")
    assert (found.before_ms, found.after_ms) == pytest.approx((10, 8))
    assert found.control == pytest.approx(1) and found.environment == {"batch": 4}
    assert (sessions.loads, sessions.most_open, sessions.open) == (15, 3, 0)


@pytest.mark.parametrize("luck", [0.006, 0.02])
def test_two_measurements_agree_within_their_intervals(luck: float) -> None:
    """Each session is as fast as its buffers lie; the pairs of one load say nothing about that."""
    pairs = list(tries(60, lambda seed: Sessions(0.5, luck, 0.01, seed)))
    agree = [a.low <= b.high and b.low <= a.high for a, b in pairs]
    holds = [m.low <= 0.5 <= m.high for pair in pairs for m in pair]
    assert sum(agree) >= 57
    assert sum(holds) >= 0.9 * len(holds)


@pytest.mark.parametrize("luck", [0.006, 0.03])
def test_a_network_beside_itself_shows_no_gain(luck: float) -> None:
    found = [Sessions(1.0, luck, 0.01, seed).measured() for seed in range(100)]
    assert not any(m.faster or m.slower for m in found)
    assert sum(m.low <= 1 <= m.high for m in found) >= 98


def test_more_loads_where_sessions_differ_by_more() -> None:
    calm, wild = Sessions(0.5, 0.001).measured(), Sessions(0.5, 0.05).measured()
    assert len(calm.loads) == 5 and len(wild.loads) == 9
    assert wild.half_width > 0.01 > calm.half_width


def test_what_the_original_shows_to_itself_is_no_difference() -> None:
    """The loads agree that it is 1 % faster, but the original was 2 % faster than itself once."""
    found = loads_interval([0.99] * 6, [1.0, 1.0, 0.98, 1.0, 1.0, 1.0])
    assert found.low < 0.99 and found.high >= 1
    assert loads_interval([0.99] * 6, [1.0] * 6).high == pytest.approx(0.99)


def test_the_interval_is_never_narrower_than_the_controls_scatter() -> None:
    quiet, loud = (loads_interval([0.5] * 5, [1 + x, 1 - x, 1 + x, 1 - x, 1.0]) for x in (0.0, 0.02))
    assert quiet.high - quiet.low < 1e-9
    assert loud.high - loud.low > 0.01


@pytest.mark.parametrize(("ratios", "controls"), [([0.5], [1.0]), ([0.5, 0.5], [1.0]), ([0.5, 0.0], [1.0, 1.0])])
def test_figures_that_make_no_interval(ratios: list[float], controls: list[float]) -> None:
    with pytest.raises(ValueError, match=r"two loads|above 0"):
        loads_interval(ratios, controls)


def test_a_disturbed_machine_widens_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """What disturbs it lasts longer than a load: loads within it are not as many witnesses."""
    quiet = Sessions(0.5, 0.02).measured()
    monkeypatch.setattr("foldcut.runtime.measure.measure._CONTENDED_SPREAD", -1.0)
    disturbed = Sessions(0.5, 0.02).measured()
    assert disturbed.contended and not quiet.contended
    assert disturbed.loads == quiet.loads
    assert disturbed.half_width == pytest.approx(quiet.half_width * 3**0.5)


@pytest.mark.parametrize(("clock", "contended"), [("wall", True), ("thread_cpu", True), ("cuda", False)])
def test_other_work_on_the_cpus_disturbs_what_is_timed_there(
    monkeypatch: pytest.MonkeyPatch, clock: str, contended: bool
) -> None:
    """Samples of equal length do not show it: who shares a core's units slows each of them."""
    quiet = Sessions(0.5, 0.02).measured()
    monkeypatch.setattr("foldcut.runtime.measure.fresh_loads.common_clock", lambda _: clock)
    monkeypatch.setattr("foldcut.runtime.measure.environment._busy_s", iter(range(0, 100_000, 1_000)).__next__)
    beside = Sessions(0.5, 0.02).measured()
    assert beside.contended == contended and beside.loads == quiet.loads
    assert beside.half_width == pytest.approx(quiet.half_width * (3**0.5 if contended else 1))


def test_the_share_of_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on four CPUs of which others were busy for eight and this process for five."""
    with monkeypatch.context() as patch:  # the clocks are everyone's
        patch.setattr("foldcut.runtime.measure.environment.os.cpu_count", lambda: 4)
        patch.setattr("foldcut.runtime.measure.environment.time.perf_counter", iter([100.0, 110.0]).__next__)
        patch.setattr("foldcut.runtime.measure.environment.time.process_time", iter([1.0, 6.0]).__next__)
        patch.setattr("foldcut.runtime.measure.environment._busy_s", iter([50.0, 63.0]).__next__)
        share = OtherWork().share()
    assert share == pytest.approx(0.2)


def test_other_work_where_the_os_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("foldcut.runtime.measure.environment.Path.read_text", lambda *_, **__: "cpu  no numbers")
        share = OtherWork().share()
    assert share == 0


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux says")
def test_a_busy_process_is_other_work() -> None:
    started = environment._busy_s()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert environment._busy_s() - started > 0.4


def test_both_regimes_come_from_the_same_loads() -> None:
    sessions = Sessions(0.5)
    sessions.evicts = True
    found = measure_loads(sessions.before, sessions.after, replace(EFFORT, both=True))
    assert {name: m.ratio for name, m in found.items()} == {
        "hot": pytest.approx(0.5),
        "cold": pytest.approx((5 + 5) / (10 + 5)),
    }
    assert [m.regime for m in found.values()] == ["hot", "cold"]
    assert sessions.loads == 15
    assert list(measure_loads(sessions.before, sessions.after, replace(EFFORT, regime="cold"))) == ["cold"]


def test_a_device_whose_caches_nobody_empties_has_one_regime() -> None:
    sessions = Sessions(0.5)
    assert list(measure_loads(sessions.before, sessions.after, replace(EFFORT, both=True))) == ["hot"]
    with pytest.raises(BackendError, match="'cold' is not there"):
        sessions.measured(regime="cold")
    assert sessions.open == 0


def test_slow_networks_end_with_three_loads_of_both_orders() -> None:
    effort = Effort(seconds=1e-9, warmup_ms=0)
    sessions = Sessions(0.5, 0.05)
    found = measure_loads(sessions.before, sessions.after, effort)["hot"]
    assert (len(found.loads), found.pairs) == (3, 6)


def test_two_rounds_of_slow_networks_are_enough_of_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldcut.runtime.measure.fresh_loads._SLOW_S", 0.0)
    sessions = Sessions(0.5)
    found = measure_loads(sessions.before, sessions.after, Effort(rounds=8, warmup_ms=0))["hot"]
    assert (len(found.loads), found.pairs) == (5, 5 * 2)
    assert found.ratio == pytest.approx(0.5)


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_what_was_loaded_is_closed_when_the_next_fails(fail_at: int) -> None:
    sessions = Sessions(0.5)
    sessions.fail_at = fail_at
    with pytest.raises(BackendError, match="no memory left"):
        sessions.measured()
    assert sessions.loads == fail_at and sessions.open == 0


def test_progress_counts_loads_and_may_end_it() -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    sessions = Sessions(0.5)
    with pytest.raises(KeyboardInterrupt):
        sessions.measured(progress=stop)
    assert seen == [(1, 9), (2, 9)] and sessions.open == 0


@pytest.mark.parametrize(
    "options", [{"loads": 1}, {"loads": 6, "most_loads": 5}, {"rounds": 0}, {"seconds": 0}, {"target_halfwidth": 0}]
)
def test_efforts_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be above 0|loads start"):
        Effort(**options)


def test_the_cpus_caches_are_streamed_over(tmp_path: Any) -> None:
    for index, size in enumerate(["32K", "1024K", "8M", "many"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_bytes(tmp_path) == 8 << 20
    assert last_level_bytes(tmp_path / "none") is None
    eviction: Any = CacheEviction()
    assert eviction._memory.nbytes >= 2 * (last_level_bytes() or 1)
    session: Any = Session(Sessions(), 1.0)
    session.clock = "thread_cpu"
    eviction(session)
    assert eviction._memory.min() == eviction._memory.max() == 1
    session.device = "cuda"
    with pytest.raises(BackendError, match="'cold' is not there"):
        eviction(session)
