"""Summing up the measures of many clips."""

from __future__ import annotations

from dheads.evaluation.scoring import mean_values


def test_mean_values_are_over_the_rows_that_have_them() -> None:
    assert mean_values([{"x": 1.0, "y": 2.0}, {"x": 2.0}]) == {"x": 1.5, "y": 2.0}
