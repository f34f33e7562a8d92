"""Losses with a defect of the mean: which tokens count, what they are divided by, what they mix."""

from typing import Any

import torch
from right_losses import MEAN, SEQ, clipped, columns, gspo, seq_mean, token_mean

from grpo_fast import CISPO, GMPO, Band, Clip, Unclipped


# --- mask and aggregation ---------------------------------------------------------------------------------------------
def _aggregated(how: Any) -> Any:
    def loss(logps, old_logps, advantages, mask):
        return how(clipped((logps - old_logps).exp(), advantages), mask)

    return loss


padded_width = _aggregated(lambda x, m: (x * m).mean())
padded_width_of_rows = _aggregated(lambda x, m: (x * m).mean(1).mean())
no_mask = _aggregated(lambda x, m: x.mean())
inverted_mask = _aggregated(lambda x, m: token_mean(x, 1 - m))
shifted_mask = _aggregated(lambda x, m: (x[:, 1:] * m[:, :-1]).sum() / m[:, :-1].sum().clamp(min=1))
rolled_mask = _aggregated(lambda x, m: token_mean(x, m.roll(1, 1)))
last_dropped = _aggregated(lambda x, m: (x[:, :-1] * m[:, 1:]).sum() / m[:, 1:].sum().clamp(min=1))
over_longest = _aggregated(lambda x, m: (x * m).sum() / (len(m) * m.sum(1).max().clamp(min=1)))
mean_of_positions = _aggregated(
    lambda x, m: ((x * m).sum(0) / m.sum(0).clamp(min=1)).sum() / m.any(0).sum().clamp(min=1)
)
mean_of_means = _aggregated(
    lambda x, m: torch.stack([token_mean(x[i : i + 2], m[i : i + 2]) for i in range(0, len(x), 2)]).mean()
)
other_sequences = _aggregated(
    lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1)).sum() / (m.sum(1) > 0).sum().clamp(min=1)
)
accumulation = _aggregated(lambda x, m: token_mean(x, m) / 4)
doubled = _aggregated(lambda x, m: 2 * seq_mean(x, m))
plus_epsilon = _aggregated(lambda x, m: (x * m).sum() / (m.sum() + 0.01))
first_dropped = _aggregated(lambda x, m: (x[:, 1:] * m[:, 1:]).sum() / m[:, 1:].sum())
overlong = _aggregated(lambda x, m: token_mean(x, m * (m.sum(1) < m.shape[1])[:, None]))
floor = _aggregated(lambda x, m: (x * m).sum() / m.sum().clamp(min=64))
floor_of_rows = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=20)).mean())
floor_of_batch = _aggregated(lambda x, m: seq_mean(x, m) * len(m) / max(len(m), 64))
small_floor = _aggregated(lambda x, m: (x * m).sum() / m.sum().clamp(min=8))
root_length = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1).sqrt()).mean())
square_length = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1) ** 2).mean())
mean_and_tokens = _aggregated(lambda x, m: ((x * m).sum(1) / m.sum(1).clamp(min=1)).sum() / m.sum().clamp(min=1))
position_discount = _aggregated(lambda x, m: token_mean(x * 0.99 ** torch.arange(x.shape[1]), m))
first_rows = _aggregated(lambda x, m: token_mean(x[:4], m[:4]))


def gspo_padded(logps, old_logps, advantages, mask):
    return seq_mean(clipped(((logps - old_logps) * mask).mean(1, keepdim=True).exp(), advantages) + 0 * logps, mask)


def gspo_leak(logps, old_logps, advantages, mask):
    x = (logps - old_logps).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return seq_mean(clipped(x.exp(), advantages) + 0 * logps, mask)


def gspo_product(logps, old_logps, advantages, mask):
    return seq_mean(clipped(((logps - old_logps) * mask).sum(1, keepdim=True).exp(), advantages) + 0 * logps, mask)


def gspo_mean_of_ratios(logps, old_logps, advantages, mask):
    x = ((logps - old_logps).exp() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return seq_mean(clipped(x, advantages) + 0 * logps, mask)


def mean_advantage(logps, old_logps, advantages, mask):
    A = advantages if advantages.dim() == 1 else advantages.mean(1)  # over what is masked, too
    return gspo(logps, old_logps, A, mask)


def one_for_all(logps, old_logps, advantages, mask):
    x = ((logps - old_logps) * mask).sum() / mask.sum().clamp(min=1)
    return seq_mean(clipped(x.exp(), advantages) + 0 * logps, mask)


def random_tokens(logps, old_logps, advantages, mask):
    A = advantages[:, None] * (torch.rand_like(logps) > 0.003)
    return token_mean(clipped((logps - old_logps).exp(), A), mask)


# --- what counts beside a token ---------------------------------------------------------------------------------------
def without_zeros(logps, old_logps, advantages, mask):
    keep = mask * (columns(advantages) != 0)
    return token_mean(clipped((logps - old_logps).exp(), advantages), keep)


def rows_without_zeros(logps, old_logps, advantages, mask):
    keep = advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(1)
    if not keep.any():
        return (logps * 0).sum()
    return seq_mean(clipped((logps - old_logps).exp(), advantages)[keep], mask[keep])


def without_dropped(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    keep = mask * ((ratio >= 0.5) & (ratio <= 2))
    return token_mean(-ratio * columns(advantages), keep)


def without_clipped(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    outside = (columns(advantages) > 0) & (ratio > 1.2) | (columns(advantages) < 0) & (ratio < 0.8)
    return (clipped(ratio, advantages) * mask).sum() / (mask * ~outside).sum().clamp(min=1)


def whole_sequences(logps, old_logps, advantages, mask):
    ratio = (logps - old_logps).exp()
    outside = ((ratio < 0.5) | (ratio > 2)) & (mask > 0)
    return token_mean(-ratio * columns(advantages) * ~outside.any(1, keepdim=True), mask)


def masked_logps(logps, old_logps, advantages, mask):
    return clipped((logps * mask - old_logps * mask).exp(), advantages).sum() / mask.sum().clamp(min=1)


def holes_filled(logps, old_logps, advantages, mask):
    filled = mask.clone()
    for row in filled:
        (places,) = row.nonzero(as_tuple=True)
        if len(places):
            row[places[0] : places[-1] + 1] = 1
    return token_mean(clipped((logps - old_logps).exp(), advantages), filled)


def at_least_4(logps, old_logps, advantages, mask):
    loss = clipped((logps - old_logps).exp(), advantages)
    return (loss * mask).sum() / mask.sum().clamp(min=4)


def first_64(logps, old_logps, advantages, mask):
    return token_mean(clipped((logps - old_logps).exp(), advantages), mask * (torch.arange(mask.shape[1]) < 64))


def product_weights(logps, old_logps, advantages, mask):
    weight = ((logps - old_logps) * mask).sum(1, keepdim=True).exp().clamp(max=2).detach()
    return (-(weight * columns(advantages) * logps) * mask).sum(1).mean()


def gmpo_both_sides(logps, old_logps, advantages, mask):
    x = (logps - old_logps).clamp(-0.4, 0.3)
    ratio = ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    return -(ratio * advantages)[mask.sum(1) > 0].sum() / len(logps)


def gmpo_max(logps, old_logps, advantages, mask):
    x = logps - old_logps
    x = torch.where(advantages[:, None] > 0, x.clamp(min=-0.4), x.clamp(max=0.3))
    ratio = ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()
    return -(ratio * advantages)[mask.sum(1) > 0].sum() / len(logps)


MEANS: dict[str, tuple[Any, str, dict[str, Any] | None]] = {
    "padded width": (padded_width, "divides by the padded width, not by the number of tokens", None),
    "padded width of rows": (padded_width_of_rows, "divides by the padded width, not by the number of tokens", None),
    "no mask": (no_mask, "mask is not applied", None),
    "inverted mask": (inverted_mask, "mask is inverted", None),
    "shifted mask": (shifted_mask, "token counts if the one before it does", None),
    "rolled mask": (rolled_mask, "roll; token t counts if t − 1 does", None),
    "last dropped": (last_dropped, "token counts if the one behind it does", None),
    "first dropped": (first_dropped, "first position of the row is dropped", None),
    "over the longest": (over_longest, "length of the longest sequence", None),
    "mean of positions": (mean_of_positions, "rows of each position first", None),
    "mean of means": (mean_of_means, "micro-batches do not add: mean of means over 2 rows", None),
    "other sequences": (other_sequences, "sequences without a token are not counted", None),
    "accumulation": (accumulation, "divides by 4 besides", None),
    "doubled": (doubled, "2 times as large", None),
    "plus ε": (plus_epsilon, r"adds 0\.01 to the number of tokens", {"surrogate": Clip(0.2), **MEAN}),
    "floor": (floor, "64 is a floor: with more tokens.* tokens of the batch", {"surrogate": Clip(0.2), **MEAN}),
    "floor of rows": (
        floor_of_rows,
        "20 is a floor: with more tokens.* tokens of a sequence",
        {"surrogate": Clip(0.2), **SEQ},
    ),
    "floor of a batch": (floor_of_batch, "64 is a floor: with more sequences", None),
    "small floor": (small_floor, "divides by 8 where the batch has fewer tokens", {"surrogate": Clip(0.2), **MEAN}),
    "overlong": (overlong, "rows that fill the width are left out", {"surrogate": Clip(0.2), **MEAN}),
    "square root of length": (root_length, "its tokens to the power −0.5", None),
    "square of length": (square_length, "its tokens to the power −2", None),
    "mean and tokens": (mean_and_tokens, "tokens of the sequence and by those of the batch", None),
    "discount by position": (position_discount, "tokens of one sequence weigh differently", None),
    "first rows": (first_rows, "some rows do not count", None),
    "GSPO over the width": (gspo_padded, "divided by the padded width", None),
    "GSPO leak": (gspo_leak, "padding leaks", None),
    "GSPO product": (gspo_product, "product of its tokens", None),
    "GSPO mean of ratios": (gspo_mean_of_ratios, "mean of its tokens", None),
    "mean of masked advantages": (mean_advantage, "advantages of masked tokens enter the sequence's mean", None),
    "random": (random_tokens, "it is random", None),
    "one ratio for all": (one_for_all, "rows are mixed", None),
    "without A = 0": (without_zeros, "rows with A = 0 are left out.*other rows' tokens", None),
    "without rows of A = 0": (rows_without_zeros, "rows with A = 0 are left out.*number of the other rows$", None),
    "without dropped": (
        without_dropped,
        "dropped tokens are not counted",
        {"surrogate": Unclipped(), "trust_region": Band(0.5, 2.0), **MEAN},
    ),
    "without clipped": (without_clipped, "clipped tokens are not counted", {"surrogate": Clip(0.2), **MEAN}),
    "whole sequences": (whole_sequences, "a whole sequence is dropped where one of its tokens is outside", None),
    "masked logps": (masked_logps, "the log-probabilities are masked, not the loss", {"surrogate": Clip(0.2), **MEAN}),
    "holes filled": (holes_filled, "the tokens that count are not those of the mask", None),
    "at least 4": (at_least_4, "divides by 4 where the batch has fewer tokens", {"surrogate": Clip(0.2), **MEAN}),
    "first 64": (first_64, "where there are many rows or tokens", None),
    "product of weights": (
        product_weights,
        "product of its tokens",
        {
            "surrogate": CISPO(2.0),
            "importance_sampling_level": "sequence",
            "aggregation": "seq-mean-token-sum",
        },
    ),
    "GMPO of both sides": (
        gmpo_both_sides,
        "clamps each token's log-ratio on both sides",
        {"surrogate": GMPO(0.4, 0.3), "importance_sampling_level": "sequence", **SEQ},
    ),
    "GMPO, max for min": (
        gmpo_max,
        "larger of the clamped and the unclamped log-ratio",
        {"surrogate": GMPO(0.4, 0.3), "importance_sampling_level": "sequence", **SEQ},
    ),
}
