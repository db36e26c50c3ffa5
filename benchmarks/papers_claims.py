"""What the papers and this project claim, looked up in the rows: where it does not hold, with the figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from frank_wolfe import WAYS
from papers_recoverability import rank_correlation
from papers_run import grouped, over_seeds
from papers_scores import METHODS
from papers_submodular import BUDGETS, GREEDY
from rows import Row

Rows = Mapping[str, Sequence[Row]]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison: whether the claim holds there, and the figures in words."""

    holds: bool
    words: str


def claims_section(rows: Rows) -> str:
    """A paragraph for each claim that was put to the test: how often it holds, and every place where it does not."""
    parts = ["## Where it does not hold", "By the means over the seeds, however close; sampling errors are above."]
    for claim, comparisons in CLAIMS.items():
        made = list(comparisons(rows))
        if made:
            failed = [f"  - {one.words}" for one in made if not one.holds]
            head = f"- {claim}: holds in {len(made) - len(failed)} of {len(made)} comparisons"
            parts.append("\n".join([f"{head}{', not here:' if failed else '.'}", *failed]))
    return "\n\n".join(parts if len(parts) > 2 else [parts[0], "Nothing was put to the test yet."])


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _versus(place: str, first: tuple[str, Sequence[float]], second: tuple[str, Sequence[float]]) -> Compared:
    """Whether the first is at least as good as the second."""
    words = f"{place}: {first[0]} {over_seeds(first[1])}, {second[0]} {over_seeds(second[1])}"
    return Compared(holds=_mean(first[1]) >= _mean(second[1]), words=words)


def _dropped(rows: Rows, first: str, second: str) -> Iterator[Compared]:
    names = {"mimicked": "foldcut", "resolved": "re-solved", "finetuned": "its finetune"}
    every = [row for run in ("practise_resnet56", "practise_mobilenetv2", "practise_other_data") for row in rows[run]]
    for key, some in grouped(every, "network", "blocks", "source", "images").items():
        both = [row for row in some if "top1" in row.get(first, {}) and "top1" in row.get(second, {})]
        if both:
            place = f"{key[0]}, {key[1]} block{'s' if key[1] > 1 else ''}, {key[3]} images of {key[2]}"
            ours, theirs = ([row[way]["top1"] for row in both] for way in (first, second))
            yield _versus(place, (names[first], ours), (names[second], theirs))


def above_finetune(rows: Rows) -> Iterator[Compared]:
    """foldcut and PRACTISE's finetune from the same blocks and images."""
    yield from _dropped(rows, "mimicked", "finetuned")


def solved_above_finetune(rows: Rows) -> Iterator[Compared]:
    """The closed form alone, which takes no gradient."""
    yield from _dropped(rows, "resolved", "finetuned")


def default_score_is_best(rows: Rows) -> Iterator[Compared]:
    """The default score of a block ranks as well as each other one."""
    for (network,), some in grouped(rows["practise_recoverability"], "network").items():
        left = [row["left"] for row in some]
        if len(left) > 2:
            found = {mode: rank_correlation([r["scores"][mode] for r in some], left) for mode in some[0]["scores"]}
            for mode in found.keys() - {"calibrated"}:
                words = f"{network}: calibrated {found['calibrated']:.2f}, {mode} {found[mode]:.2f}"
                yield Compared(holds=found["calibrated"] >= found[mode], words=words)


def _channels(rows: Rows, first: str, others: Sequence[str]) -> Iterator[Compared]:
    for network in ("lenet", "vgg11", "resnet56"):
        by = grouped(rows[f"submodular_{network}"], "keep", "method")
        for keep in sorted({keep for keep, _ in by}, reverse=True):
            for other in others:
                if (keep, first) in by and (keep, other) in by:
                    ours, theirs = ([r["resolved"]["top1"] for r in by[keep, m]] for m in (first, other))
                    yield _versus(f"{network}, {keep:g} of the channels", (first, ours), (other, theirs))


def greedy_above_baselines(rows: Rows) -> Iterator[Compared]:
    """The paper's own claim, with every method solved again."""
    yield from _channels(rows, "greedy-asymmetric", METHODS)


def asymmetric_above_variants(rows: Rows) -> Iterator[Compared]:
    """The paper's best variant."""
    yield from _channels(rows, "greedy-asymmetric", GREEDY[:2])


def foldcut_above_all(rows: Rows) -> Iterator[Compared]:
    """foldcut's, beside all of the paper's."""
    yield from _channels(rows, "foldcut", (*METHODS, *GREEDY[:3]))


def solving_helps(rows: Rows) -> Iterator[Compared]:
    """Every choice of channels is better once the layers behind are solved again."""
    for network in ("lenet", "vgg11", "resnet56"):
        for (keep, method), some in grouped(rows[f"submodular_{network}"], "keep", "method").items():
            solved, plain = ([row[part]["top1"] for row in some] for part in ("resolved", "plain"))
            yield _versus(f"{network}, {keep:g} of the channels by {method}", ("solved", solved), ("plain", plain))


def curves_above_budgets(rows: Rows) -> Iterator[Compared]:
    """Budgets by error curves beside equal shares and the paper's, within the MACs of equal shares."""
    by = grouped(rows["submodular_budgets"], "network", "keep", "budget")
    for network, keep in sorted({key[:2] for key in by}):
        for other in BUDGETS[:2]:
            if (network, keep, BUDGETS[2]) in by and (network, keep, other) in by:
                ours, theirs = ([row["top1"] for row in by[network, keep, b]] for b in (BUDGETS[2], other))
                yield _versus(f"{network}, shares of {keep:g}", (BUDGETS[2], ours), (other, theirs))


def guarantee_holds(rows: Rows) -> Iterator[Compared]:
    """Greedy explains at least the guaranteed share of what the best subset, or all channels, explain."""
    for line in (line for row in rows["submodular_guarantee"] for line in row["layers"]):
        best = line["best"] if line["best"] is not None else line["all"]
        words = f"{line['layer']}, {line['kept']} of {line['units']}: {line['greedy']:.4f} of {best:.4f}"
        yield Compared(holds=line["greedy"] >= line["guarantee"] * best - 1e-9, words=words)


def guarantee_says_something(rows: Rows) -> Iterator[Compared]:
    """The bound from the whole Gram matrix's spectrum is worth a hundredth of the best, in the best of the layers."""
    for row in rows["submodular_guarantee"]:
        shares = {line["layer"]: line["guarantee"] for line in row["layers"]}
        words = f"{row['case']['network']}: {min(shares.values()):.1e} to {max(shares.values()):.1e} guaranteed in"
        yield Compared(holds=max(shares.values()) >= 0.01, words=f"{words} {len(shares)} layers")


def sets_above_rivals(rows: Rows) -> Iterator[Compared]:
    """The best of the sets beside the best of the penalties, after a plain cut of each size, nothing trained again."""
    for way in (WAYS[0], WAYS[2]):
        found = {"a set": [], "a penalty": []}  # type: dict[str, list[Row]]
        for row in rows["frank_wolfe_rivals"]:
            found["a set" if row["case"]["trained"].startswith("SFW") else "a penalty"].append(row)
        if not all(found.values()):
            continue
        for share in found["a set"][0]["left"][way]:
            best = {}
            for name, some in found.items():
                by = grouped(some, "by")
                best[name] = max(by.values(), key=lambda part, s=share: _mean(r["left"][way][s] for r in part))
            ours, theirs = ([r["left"][way][share] for r in best[name]] for name in found)
            names = [f"{name} (`{best[name][0]['case']['by']}`)" for name in found]
            yield _versus(f"{way}, {share} left", (names[0], ours), (names[1], theirs))


def spectral_step_is_cheaper(rows: Rows) -> Iterator[Compared]:
    """A step with the spectral set beside one with the nuclear norm in the loss."""
    for row in rows["frank_wolfe_steps"]:
        ours, theirs = (row["methods"][name]["ratio"] for name in ("spectral:30:0.1", "nuclear:1e-3"))
        words = f"{row['case']['network']}: the set x{ours:.2f} of a step of SGD, the nuclear norm x{theirs:.2f}"
        yield Compared(holds=ours <= theirs, words=words)


CLAIMS: dict[str, Callable[[Rows], Iterator[Compared]]] = {
    "foldcut is above PRACTISE's finetune of the same blocks on the same images": above_finetune,
    "the re-solve alone, without gradient, is above that finetune": solved_above_finetune,
    "foldcut's score of a block ranks what dropping it leaves at least as well as the others": default_score_is_best,
    "asymmetric greedy selection is above the other choices of channels, all solved again": greedy_above_baselines,
    "the asymmetric variant is above the layerwise and the sequential one": asymmetric_above_variants,
    "foldcut's channels are above all of these": foldcut_above_all,
    "solving the layers behind again is better than leaving them": solving_helps,
    "budgets by error curves are above equal shares and the paper's equal loss": curves_above_budgets,
    "greedy selection reaches its guarantee": guarantee_holds,
    "the guarantee is at least a hundredth of the best in some layer": guarantee_says_something,
    "the sets leave more after a plain cut than the penalties": sets_above_rivals,
    "a step with the spectral set costs no more than one with a nuclear norm": spectral_step_is_cheaper,
}
