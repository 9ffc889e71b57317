"""What came out of a run: counts by test class, every skip with its reason, and what makes the run fail."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import fill

from .reasons import ADAPTED, explain

PASSED, SKIPPED, FAILED = OUTCOMES = ("passed", "skipped", "failed")  # the later outweighs the earlier
WIDTH = 118


@dataclass
class Result:
    """One test. Of its phases and subtests the worst counts: one skipped subtest makes the test a skipped one."""

    outcome: str = PASSED
    said: list[str] = field(default_factory=list)

    def add(self, outcome: str, said: str = "") -> None:
        self.outcome = max(self.outcome, outcome, key=OUTCOMES.index)
        if outcome == SKIPPED:
            self.said.append(said)


def split(node: str) -> tuple[str, str]:
    """`"file::Class::test[parameters]"` -> class (or file) and name of the test."""
    *places, test = node.split("::")
    return (places[-1] if places else node), test.partition("[")[0]


class Collector:
    """A pytest plugin that keeps the result of every test, and of every file that could not be read."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = defaultdict(Result)

    def pytest_runtest_logreport(self, report) -> None:
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        self.results[report.nodeid].add(report.outcome, said.removeprefix("Skipped: ").strip())

    def pytest_collectreport(self, report) -> None:
        if report.outcome != PASSED:
            self.pytest_runtest_logreport(report)


def unexplained(results: dict[str, Result]) -> list[str]:
    """A line for each skip without a reason in the table."""
    return [
        f"{node}: {said or 'no reason given'}"
        for node, result in results.items()
        if result.outcome == SKIPPED
        for said in result.said
        if explain(split(node)[1], said) is None
    ]


def table(header: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """Columns under their headings; the first one to the left, numbers to the right."""
    lines = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def counts(results: dict[str, Result]) -> str:
    """A row for each test class and one for all."""
    by_class: dict[str, Counter] = defaultdict(Counter)
    for node, result in results.items():
        for name in (split(node)[0], "all"):
            by_class[name][result.outcome] += 1
    by_class["all"] = by_class.pop("all", Counter())  # comes last
    rows = [
        (
            name,
            count.total(),
            count[PASSED],
            count[FAILED],
            count[SKIPPED],
            f"{count[PASSED] / max(count.total(), 1):.1%}",
        )
        for name, count in by_class.items()
    ]
    return table(("test class", "tests", "passed", "failed", "skipped", "passed of all"), rows)


def skips(results: dict[str, Result]) -> str:
    """Every skip: the reasons, most frequent first, and under each the tests with the number of classes."""
    by_reason: dict[str, Counter] = defaultdict(Counter)
    for node, result in results.items():
        if result.outcome == SKIPPED:
            test = split(node)[1]
            by_reason[explain(test, result.said[0]) or f"NO REASON: {result.said[0]}"][test] += 1
    blocks = []
    for reason, tests in sorted(by_reason.items(), key=lambda item: -item[1].total()):
        names = ", ".join(test if count == 1 else f"{test} ({count})" for test, count in sorted(tests.items()))
        blocks.append(
            fill(f"{tests.total():4}  {reason}", WIDTH, subsequent_indent=" " * 6)
            + "\n"
            + fill(names, WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10, break_on_hyphens=False)
        )
    return "\n".join(blocks)


def adapted(results: dict[str, Result]) -> str:
    """The tests that ran in this package's version."""
    ran = {split(node)[1] for node in results}
    return "\n".join(
        fill(f"{test}: {why}", WIDTH, initial_indent=" " * 6) for test, why in ADAPTED.items() if test in ran
    )


def summary(results: dict[str, Result]) -> tuple[str, bool]:
    """What is printed at the end, and whether all is well: no failure, no skip without a reason, some test passed."""
    parts = [
        "Skipped tests, by reason (in brackets: in how many classes)\n" + skips(results),
        "Tests whose check is this package's own\n" + adapted(results),
        counts(results),
    ]
    problems = unexplained(results)
    if problems:
        parts.append("Skips without a reason in tests_hf/reasons.py:\n" + "\n".join(problems))
    failed = sorted(node for node, result in results.items() if result.outcome == FAILED)
    if failed:
        parts.append("Failed:\n" + "\n".join(failed))
    passed = any(result.outcome == PASSED for result in results.values())
    return "\n\n".join(parts), passed and not failed and not problems


__all__ = ["Collector", "Result", "counts", "skips", "summary", "unexplained"]
