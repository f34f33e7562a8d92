"""Losses as people write them in torch, each with one defect that has been reported, and how a report is to name it.

`PLANTED` maps a name to the loss, a pattern that a finding which *differs* must match, and the options that are nearest
(None: not looked at). `FRAGILE` is the same for findings that are fragile. Losses without a defect: `right_losses`.
"""

from typing import Any

from planted_kl import KL
from planted_means import MEANS
from planted_policy import POLICY, deep
from right_losses import clipped, columns, token_mean

PLANTED = POLICY | KL | MEANS


# --- fragile ----------------------------------------------------------------------------------------------------------
def clamped_at_20(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).clamp(-20, 20).exp(), advantages), mask)


def nan_through_mask(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages), mask)


def nothing_by_nothing(logps, old_logps, advantages, mask):
    return (clipped((logps - old_logps).exp(), advantages) * mask).sum() / mask.sum()


def empty_sequence(logps, old_logps, advantages, mask):
    return ((clipped((logps - old_logps).exp(), advantages) * mask).sum(1) / mask.sum(1)).mean()


def shifted_advantages(logps, old_logps, advantages, mask):
    A = columns(advantages).expand(logps.shape)
    return token_mean(clipped((logps - old_logps).exp(), A.roll(-1, 1)), mask)


def first_advantage(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), columns(advantages)[:, 0]), mask)


FRAGILE: dict[str, tuple[Any, str]] = {
    "log-ratio ±20": (clamped_at_20, "log-ratio is clamped at ±20: no gradient beyond"),
    "NaN where masked": (nan_through_mask, "NaN or infinity at a masked position makes the loss NaN"),
    "log π ≥ −50": (deep(-50.0), "log-probabilities below −50 are clamped"),
    "0/0": (nothing_by_nothing, r"batch without a token makes the loss NaN"),
    "an empty sequence": (empty_sequence, r"sequence without a token makes the loss NaN"),
    "shifted advantages": (shifted_advantages, "each has that of the one behind it in its row"),
    "first advantage": (first_advantage, "only that of the first is used"),
}
