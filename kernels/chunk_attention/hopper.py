"""Triton kernels of attention inside chunks for Hopper; README.md derives them. Imports triton: load it when needed.

Scores of a chunk, (C, C), pass through memory once, as bfloat16 weights: values are 2048 wide, so a fused kernel would
either keep 2048 float32 sums a query or recompute the scores for every slice of the values. Each product visits only
blocks on or under the diagonal. All sums are float32 in a fixed order.

Tensors are read by the bulk copy engine through descriptors of two dimensions: activations (B * L, H * width), where
row `b * L + start + c * C + i` is position i of chunk c, and weights (matrices * C, C), one matrix a chunk and head.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(matrix, n_chunks, n_heads, length, start, chunk):
    """(first row, head) of a matrix among those of (row of the batch, chunk, head), the head running fastest."""
    head = matrix % n_heads
    number = matrix // n_heads
    return (number // n_chunks) * length + start + (number % n_chunks) * chunk, head


@triton.jit
def _weights_of_rows(
    q_block, k, weights, row, out_row, head, block, reference,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Store 2^(score - reference) of ROWS queries, scores in units of log 2; gives each row's sum and largest score."""
    largest = reference
    total = tl.zeros([ROWS], tl.float32)
    queries = block * ROWS + tl.arange(0, ROWS)
    for at in tl.range(0, (block + 1) * ROWS, COLS):
        scores = tl.dot(q_block, k.load([row + at, head * WIDTH]).T) * LOG2_E
        seen = queries[:, None] >= (at + tl.arange(0, COLS))[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        values = tl.exp2(scores - reference[:, None])
        weights.store([out_row, at], values.to(tl.bfloat16))
        largest = tl.maximum(largest, tl.max(scores, 1))
        total += tl.sum(values, 1)
    return total, largest


@triton.jit
def attention_weights(
    q, k, weights, inverse_sum, log_sum, first, n_chunks, n_heads, length, start, chunk,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """weights_ij = exp(q_i . k_j - r_i) for j <= i, zero in the rest of the blocks on the diagonal.

    r_i, the largest score among the first COLS keys, keeps the weights in range as long as no later score exceeds it by
    60 log 2: bfloat16 is as exact at 2^60 as at 1. Where one does, the rows are recomputed with their largest score.
    inverse_sum_i = 1 / sum_j weights_ij is left for the product with the values; log_sum_i is that of the scores.
    A program: ROWS queries. Grid: (chunk / ROWS, matrices); long rows first.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = tl.program_id(1)
    row, head = _place(first + matrix, n_chunks, n_heads, length, start, chunk)
    queries = block * ROWS + tl.arange(0, ROWS)
    q_block = q.load([row + block * ROWS, head * WIDTH])
    scores = tl.dot(q_block, k.load([row, head * WIDTH]).T) * LOG2_E
    reference = tl.max(tl.where(queries[:, None] >= tl.arange(0, COLS)[None, :], scores, float("-inf")), 1)
    out_row = matrix * chunk + block * ROWS
    total, largest = _weights_of_rows(q_block, k, weights, row, out_row, head, block, reference, WIDTH, ROWS, COLS)
    if tl.max(largest - reference, 0) > 60.0:
        reference = largest
        total, largest = _weights_of_rows(q_block, k, weights, row, out_row, head, block, reference, WIDTH, ROWS, COLS)
    places = (row + queries).to(tl.int64) * n_heads + head
    tl.store(inverse_sum + places, 1.0 / total)
    tl.store(log_sum + places, (reference + tl.log2(total)) / LOG2_E)


@triton.jit
def causal_product(
    a, x, scale, y, first, n_chunks, n_heads, length, start, chunk,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """y_i = scale_i sum over j <= i of a_ij x_j; TRANSPOSED: y_j = sum over i >= j of a_ij x_i. `scale` may be None.

    A program: ROWS x COLS of y. Grid: (WIDTH / COLS, chunk / ROWS, matrices): programs that run together share a
    chunk's x and a in the second-level cache. Where COLS is all of WIDTH, x is small and the grid is
    (matrices, chunk / ROWS, 1), so that the long sums of all matrices come first.
    """
    column = tl.program_id(0) * COLS
    matrix = tl.program_id(2)
    if WIDTH == COLS:
        column = 0
        matrix = tl.program_id(0)
    row, head = _place(first + matrix, n_chunks, n_heads, length, start, chunk)
    column += head * WIDTH
    total = tl.zeros([ROWS, COLS], tl.float32)
    if TRANSPOSED:
        block = tl.program_id(1)
        for at in tl.range(block * ROWS, chunk, INNER):
            a_block = a.load([matrix * chunk + at, block * ROWS])
            total = tl.dot(a_block.T, x.load([row + at, column]), total)
    else:
        block = tl.num_programs(1) - 1 - tl.program_id(1)
        for at in tl.range(0, (block + 1) * ROWS, INNER):
            a_block = a.load([matrix * chunk + block * ROWS, at])
            total = tl.dot(a_block, x.load([row + at, column]), total)
    if scale is not None:
        rows = row + block * ROWS + tl.arange(0, ROWS)
        total *= tl.load(scale + rows.to(tl.int64) * n_heads + head)[:, None]
    y.store([row + block * ROWS, column], total.to(tl.bfloat16))


@triton.jit
def output_products(out, dout, delta, n_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """delta_i = sum of out_i dout_i, over (n_rows, WIDTH). Grid: n_rows / ROWS."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    places = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (rows < n_rows)[:, None]
    products = tl.load(out + places, inside, 0.0).to(tl.float32) * tl.load(dout + places, inside, 0.0).to(tl.float32)
    tl.store(delta + rows, tl.sum(products, 1), rows < n_rows)


@triton.jit
def score_gradients(
    q, k, v, dout, log_sum, delta, weights, dscores, first, n_chunks, n_heads, length, start, chunk,
    QK_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr,
    QK_INNER: tl.constexpr,
):  # fmt: skip
    """The weights again, and dscores_ij = weights_ij (dout_i . v_j - delta_i), both in bfloat16.

    A program: one block of SIDE x SIDE on or under the diagonal; they are counted along the rows, 0, 1 2, 3 4 5, ...
    Grid: (n (n + 1) / 2, matrices), n = chunk / SIDE.
    """
    number = tl.program_id(0)
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)  # the root may be rounded across a whole number
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    block = i * SIDE
    column = (number - i * (i + 1) // 2) * SIDE
    matrix = tl.program_id(1)
    row, head = _place(first + matrix, n_chunks, n_heads, length, start, chunk)
    queries = block + tl.arange(0, SIDE)
    keys = column + tl.arange(0, SIDE)
    scores = tl.zeros([SIDE, SIDE], tl.float32)
    for at in tl.range(0, QK_WIDTH, QK_INNER):
        q_block = q.load([row + block, head * QK_WIDTH + at])
        scores = tl.dot(q_block, k.load([row + column, head * QK_WIDTH + at]).T, scores)
    rows = (row + queries).to(tl.int64) * n_heads + head
    log2_sum = tl.load(log_sum + rows) * LOG2_E
    values = tl.exp2(scores * LOG2_E - log2_sum[:, None])
    values = tl.where(queries[:, None] >= keys[None, :], values, 0.0).to(tl.bfloat16)
    weights.store([matrix * chunk + block, column], values)
    products = tl.zeros([SIDE, SIDE], tl.float32)
    for at in tl.range(0, V_WIDTH, INNER):
        dout_block = dout.load([row + block, head * V_WIDTH + at])
        products = tl.dot(dout_block, v.load([row + column, head * V_WIDTH + at]).T, products)
    products = (products - tl.load(delta + rows)[:, None]) * values.to(tl.float32)
    dscores.store([matrix * chunk + block, column], products.to(tl.bfloat16))
