"""Interpolated byte n-grams: what counting alone reaches on a text, to compare a model's loss with."""

import numpy as np


def ngram_losses(train: bytes, held_out: bytes, orders: tuple[int, ...] = (2, 3, 4)) -> dict[int, float]:
    """Mean loss of the held-out bytes under byte n-grams counted on `train`, order -> nats a byte.

    Interpolated by Witten and Bell's rule (IEEE Trans. Inf. Theory 37, 1991): with c counts and T(context) the number
    of different bytes seen after a context,

        P_n(b | context) = (c(context b) + T(context) P_{n-1}(b | shorter context)) / (c(context) + T(context))

    down to P_0 = 1/256. The first n - 1 held-out bytes are not scored.

    Raises:
        ValueError: an order lies outside 1..4, or a text is shorter than the highest order.
    """
    highest = max(orders)
    if min(orders) < 1 or highest > 4:
        raise ValueError(f"`orders` must lie between 1 and 4, but are {orders}")
    if min(len(train), len(held_out)) < highest:
        raise ValueError(f"both texts must have at least {highest} bytes, but have {len(train)} and {len(held_out)}")
    train_bytes, test_bytes = (np.frombuffer(text, np.uint8) for text in (train, held_out))
    n_scored = len(test_bytes) - highest + 1
    probability = np.full(n_scored, 1 / 256)
    losses = {}
    for order in range(1, highest + 1):
        grams, gram_counts = np.unique(_codes(train_bytes, order), return_counts=True)
        contexts, first, kinds = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
        context_counts = np.add.reduceat(gram_counts, first)
        scored = _codes(test_bytes, order)[highest - order :]
        context = scored >> np.uint64(8)
        count, total, types = (
            _look_up(grams, gram_counts, scored),
            _look_up(contexts, context_counts, context),
            _look_up(contexts, kinds, context),
        )
        seen = total > 0
        mixed = (count + types * probability) / np.maximum(total + types, 1)
        probability = np.where(seen, mixed, probability)
        if order in orders:
            losses[order] = float(-np.log(probability).mean())
    return losses


def _codes(text: np.ndarray, order: int) -> np.ndarray:
    """Every run of `order` bytes as one number, the last byte lowest."""
    length = len(text) - order + 1
    codes = np.zeros(length, np.uint64)
    for i in range(order):
        codes = (codes << np.uint64(8)) | text[i : i + length]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is no such key; keys are sorted."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
