"""The report of an audit: JSON, Markdown and one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import plots
from .compare import Comparison, Settings
from .html import Cell, Page, Tone, number

#: Exit statuses of `--fail-on-bias`; 1 and 2 are errors, as for every command.
EXIT_BIASED = 3
EXIT_INCONCLUSIVE = 4

_TONE: dict[str, Tone] = {"equivalent": "good", "biased": "bad", "inconclusive": "warn"}
_HELD: dict[bool | None, Tone] = {True: "good", False: "bad", None: "quiet"}


@dataclass(frozen=True, eq=False, slots=True)
class Audit:
    """One or more arms, each compared with the same reference.

    Args:
        predicted: heading of the predictions, which say what theory expects of each arm.
        colours: series colour by name of the arm; by position otherwise.
        notes: remarks about how the data came about, one paragraph each.
    """

    title: str
    subtitle: str
    comparisons: tuple[Comparison, ...]
    settings: Settings
    notes: tuple[str, ...] = ()
    colours: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    predicted: str = "predicted"

    @property
    def exit_status(self) -> int:
        """For `--fail-on-bias`: 0 only if equivalence was shown for every arm."""
        verdicts = {c.verdict for c in self.comparisons}
        if "biased" in verdicts:
            return EXIT_BIASED
        return EXIT_INCONCLUSIVE if "inconclusive" in verdicts else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "subtitle": self.subtitle,
            "settings": asdict(self.settings),
            "notes": list(self.notes),
            "cells": [c.to_json() for c in self.comparisons],
        }

    def label(self, name: str) -> str:
        return self.labels.get(name, name.replace("_", " "))

    def colour(self, name: str) -> int:
        known = [c.name for c in self.comparisons]
        return self.colours.get(name, 1 + known.index(name) % (plots.COLOURS - 1))

    def series(self) -> list[plots.Series]:
        return [
            plots.Series(
                self.label(c.name), self.colour(c.name), c.lengths, c.prediction.accepted if c.prediction else None
            )
            for c in self.comparisons
        ]

    def page(self) -> Page:
        """The page; `page().markdown()` is the summary for a pull request."""
        page = Page(self.title, self.subtitle)
        reference = self.comparisons[0].reference_lengths
        self._tiles(page)
        _bias_section(page, self)
        section = page.section("Lengths")
        section.figure(
            plots.lengths(self.series(), reference),
            "Delivered lengths (area, mean as a line) against the true ones (black outline, mean dotted).",
        )
        section = page.section("Tilt")
        section.prose(
            "Restarting from scratch at a constant hazard multiplies the law of lengths by an exponential: a straight "
            "line on this scale. Points are measured; lines are exact predictions."
        )
        section.figure(
            plots.tilt(self.series(), reference),
            "Probability of each length among the delivered, divided by its true probability. 1× is no bias.",
        )
        _hypotheses_section(page, self)
        _statistics_section(page, self)
        _impact_section(page, self)
        if self.notes:
            page.section("How this was made").prose("\n\n".join(self.notes))
        return page

    def _tiles(self, page: Page) -> None:
        worst = max(self.comparisons, key=lambda c: abs(c.delta_relative))
        for verdict, count in _verdicts(self.comparisons).items():
            page.tile(verdict.capitalize(), f"{count} of {len(self.comparisons)}", tone=_TONE[verdict])
        page.tile("Largest bias", percent(worst.delta_relative))
        page.tile("Rollouts", f"{sum(c.rollouts for c in self.comparisons):,}")
        page.tile("True mean length", f"{worst.reference_mean:,.1f}")


def _verdicts(comparisons: Sequence[Comparison]) -> dict[str, int]:
    out: dict[str, int] = {}
    for verdict in ("equivalent", "biased", "inconclusive"):
        count = sum(c.verdict == verdict for c in comparisons)
        if count:
            out[verdict] = count
    return out


def percent(fraction: float | None, digits: int = 2) -> str:
    """A signed percentage, "–" where there is none."""
    if fraction is None:
        return "–"
    shown = round(100 * fraction, digits)
    return number(shown, f"+.{digits}f") + " %" if shown else f"{0:.{digits}f} %"


def interval(low: float, high: float, digits: int = 2) -> str:
    """The two ends of an interval, as percentages."""
    return f"{percent(low, digits)} to {percent(high, digits)}"


def _name(audit: Audit, c: Comparison) -> Cell:
    return Cell(audit.label(c.name), swatch=audit.colour(c.name))


def _bias_section(page: Page, audit: Audit) -> None:
    settings = audit.settings
    section = page.section("Bias of the mean length")
    rows = [
        plots.Bias(
            audit.label(c.name),
            audit.colour(c.name),
            c.delta_relative,
            *c.interval_relative,
            c.predicted_delta_relative,
        )
        for c in audit.comparisons
    ]
    section.figure(
        plots.bias(rows, settings.margin),
        f"Dots with bars: measured, with the {1 - 2 * settings.alpha:.0%} interval that decides equivalence. "
        f"Diamonds: {audit.predicted}. Green band: the margin of ±{settings.margin:.1%}, stated beforehand.",
    )
    section.table(
        ["arm", "rollouts", "interrupted", "mean", "bias", "interval", audit.predicted, "verdict"],
        [
            [
                _name(audit, c),
                f"{c.rollouts:,}",
                f"{c.interrupted_share:.0%}",
                f"{c.mean:,.2f}",
                percent(c.delta_relative),
                interval(*c.interval_relative),
                percent(c.predicted_delta_relative),
                Cell(c.verdict, tone=_TONE[c.verdict]),
            ]
            for c in audit.comparisons
        ],
        "; ".join(f"{audit.label(c.name)}: {note}" for c in audit.comparisons for note in c.notes),
    )


def _hypotheses_section(page: Page, audit: Audit) -> None:
    judged = [c for c in audit.comparisons if c.hypotheses]
    if not judged:
        return
    section = page.section("Why: the assumptions, and whether they held")
    section.prose("Delivered rollouts are an unbiased sample if all of these hold. Each names the check that was made.")
    columns = [f"{h.name}: {h.statement}" for h in judged[0].hypotheses]
    section.table(
        ["arm", *columns],
        [[_name(audit, c), *(Cell(h.verdict, tone=_HELD[h.held], note=h.check) for h in c.hypotheses)] for c in judged],
    )


def _statistics_section(page: Page, audit: Audit) -> None:
    settings = audit.settings
    section = page.section("Evidence")
    section.prose(
        "Equivalence is shown by two one-sided tests on the mean and on quantiles "
        f"(margin of quantiles ±{settings.quantile_margin:.1%} of the mean, level {settings.alpha:g}), with errors "
        "clustered by prompt and by failure. A difference is shown by tests of the whole distribution, corrected for "
        "many comparisons by Holm's method."
    )

    def p(value: float) -> str:
        return "< 0.0001" if value < 1e-4 else f"{value:.4f}"

    names = [q.what for q in audit.comparisons[0].quantile_estimates]
    section.table(
        ["arm", *names],
        [
            [
                _name(audit, c),
                *(
                    Cell(
                        number(q.difference, "+.1f"),
                        tone="" if q.equivalent else "bad",
                        note=f"± {_half(q):.1f}",
                    )
                    for q in c.quantile_estimates
                ),
            ]
            for c in audit.comparisons
        ],
        "Differences of quantiles, in tokens; coloured where equivalence is not shown.",
    )
    tests = [t.name for t in audit.comparisons[0].tests]
    section.table(
        ["arm", *tests],
        [[_name(audit, c), *(p(t.p_corrected) for t in c.tests)] for c in audit.comparisons],
        "Corrected p values of a difference.",
    )
    section.table(
        ["arm", "Cohen's d", "moved by (tokens)", "tilt per token", "design effect", "needed (mean)", "power (mean)"],
        [
            [
                _name(audit, c),
                number(c.effects.cohens_d, "+.3f"),
                f"{c.effects.wasserstein:.2f}",
                number(c.effects.tilt_per_token, ".5f"),
                f"{c.design_effect:.2f}",
                f"{c.rollouts_needed:,}",
                f"{c.power:.0%}",
            ]
            for c in audit.comparisons
        ],
        f"Effect sizes; rollouts per arm that show equivalence of the mean with {settings.power:.0%} power at this "
        "margin, and the power of those there are. Both are of the mean alone: the verdict wants the quantiles too.",
    )
    metrics = [(c, m) for c in audit.comparisons for m in c.metric_estimates]
    if metrics:
        section.table(
            ["arm", "metric", "difference", "equivalent"],
            [
                [
                    _name(audit, c),
                    m.what,
                    Cell(f"{m.difference:+.4g}", note=f"{m.ci_low:+.4g} to {m.ci_high:+.4g}"),
                    Cell("shown" if m.equivalent else "not shown", tone="good" if m.equivalent else "warn"),
                ]
                for c, m in metrics
            ],
            f"Other columns of the data, at a margin of {settings.metric_margin:g} standard deviations.",
        )
    censored = [(c, reason, x) for c in audit.comparisons for reason, x in c.censored.items()]
    if censored:
        section.table(
            ["arm", "reason", "rollouts", "of all tokens"],
            [[_name(audit, c), reason, f"{x.rollouts:,}", f"{x.length_mass:.1%}"] for c, reason, x in censored],
            "Censored: begun and not delivered.",
        )


def _half(estimate: Any) -> float:
    return float(estimate.ci_high - estimate.ci_low) / 2


def _impact_section(page: Page, audit: Audit) -> None:
    settings = audit.settings
    section = page.section("What it does to a training run")
    section.prose(
        f"A model, not a measurement: if each step moves the policy {settings.compound_rate:.0%} of the way "
        "(in log space) towards the lengths it was shown, the same tilt is applied again and again."
    )
    rows = [(audit.label(c.name), audit.colour(c.name), c.compounded_mean) for c in audit.comparisons]
    section.figure(
        plots.compounding(rows),
        f"Mean length over {settings.compound_steps} training steps if the measured bias compounds.",
    )
