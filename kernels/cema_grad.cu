// Gradients of CEMA's coefficients from x, dy and the states at the edges of groups of 32 blocks.
//
// With h_b the state that enters block b and l_b the conjugate of the gradient of the state that leaves it,
//   dk_lag = sum of the lag-th diagonal of sum_b dy_b x_b^T,   dC = sum_b dy_b h_b,   dS = sum_b x_b l_b,   dA = sum_b l_b h_b
// (all conjugated, so that no conjugate is left), and from these tables' gradients those of p, g and log q:
//   dp = sum_l g q^l dk_l + sum_t q^(T-1-t) dS_t,     dg = sum_l p q^l dk_l + sum_t q^(t+1) dC_t,
//   dlog q = sum_l l p g q^l dk_l + sum_t (t+1) g q^(t+1) dC_t + sum_t (T-1-t) p q^(T-1-t) dS_t + T A dA.
//
// A thread block owns CHANNELS channels, one warp each, 16 orders of them (blockIdx.z: which 16), and every
// gridDim.y-th group of time, in fixed order; groups are independent of each other because the passes kept the states at
// their edges. All threads bring a group of x and of dy to shared memory, each warp works on its own channel alone. Two groups'
// buffers alternate: between two barriers the block works on group i and brings in group i + 1, half of the warps the one
// first and half the other, so that both go on at once. The loads of group i + 2 are then under way in registers.
//
// In a warp, the rows of the first products are states: rows g and g + 8 (g = lane / 4) of row tile m are the real and
// imaginary part of order 8 m + g; the columns are blocks, and a lane holds 8 neighbouring ones, 8 (lane % 4) and on, so
// the scan over blocks is arithmetic on registers with two shuffles. The states are then the left operands of the
// products that sum over blocks, whose right operands are x and dy, transposed on the way from shared memory.
//
// Precision: tables and states are split into TERMS bfloat16 terms, x and dy are exact; sums are float32.
constexpr int kBlocks = 32;
constexpr int kBlockWords = BLOCK / 2 + 4;  // rows of 16 bytes for the transposing load ...
constexpr int kPlaneWords = 4 * (8 * kBlockWords + 8);  // ... of which any 8 that it touches lie in different banks
constexpr int kWarpsOfChannel = 1;
#include "cema.cuh"
constexpr int kChannelWords = kPlanes * kPlaneWords;
__device__ __forceinline__ int word_of_block(int block) { return block * kBlockWords + block / 8 * 8; }
#include "cema_staging.cuh"

struct Params {
  const char* x;
  const char* dy;
  const Complex<Real>* coefficients;     // (D, kSlots, ORDERS)
  const Complex<float>* state_in;        // (B, D, N): h that enters the first group, null is zero
  const Complex<float>* states;          // (groups - 1, B, D, N): h between groups
  const Complex<float>* state_grads;     // (groups - 1, B, D, N): l between groups
  const Complex<float>* state_grad_in;   // (B, D, N): the gradient of the state that leaves the last group, null is zero
  Complex<float>* partial;               // (slots, D, ORDERS, 3): dp, dg, dlog q, conjugated
  float* partial_omega;                  // (slots, D)
  long long x_row, dy_row;               // elements from one batch row to the next
  long long length;                      // steps, a multiple of T
  int batch, dim, order;
};

constexpr int kTimeSteps = BLOCK / 16;
constexpr int kTimeTiles = BLOCK / 8;
constexpr int kTableBytes = 2 * 2 * kTimeSteps * TERMS * 32 * 16;  // in and out table of one channel
constexpr int kTileWords = CHANNELS * kChannelWords;

// A group of blocks: batch row and number in the row.
struct Cursor {
  int row, group;
  __device__ __forceinline__ void advance(int by, int groups) {
    for (group += by; group >= groups; group -= groups) ++row;
  }
};

// Rows g and g + 8 of row tile m: real and imaginary part of order 8 m + g; columns are steps.
__device__ __forceinline__ void write_table(uint4* table, const Complex<Real>* coefficients, int channel, int first_order,
                                            bool out, int lane) {
  const int g = lane / 4, c = lane % 4;
  for (int m = 0; m < 2; ++m) {
    const Coefficients z(coefficients, channel, first_order + 8 * m + g);
    for (int k = 0; k < kTimeSteps; ++k) {
      float re[4], im[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int step = 16 * k + 2 * c + i % 2 + i / 2 * 8;
        const Complex<Real> e = out ? z.output(step) : z.input(step);
        re[i] = static_cast<float>(e.re);
        im[i] = static_cast<float>(e.im);
      }
      unsigned parts[4][TERMS];
      split<TERMS>(re[0], re[1], parts[0]);
      split<TERMS>(im[0], im[1], parts[1]);
      split<TERMS>(re[2], re[3], parts[2]);
      split<TERMS>(im[2], im[3], parts[3]);
#pragma unroll
      for (int t = 0; t < TERMS; ++t)
        table[((m * kTimeSteps + k) * TERMS + t) * 32 + lane] = make_uint4(parts[0][t], parts[1][t], parts[2][t], parts[3][t]);
    }
  }
}

// What each block adds to the state: table (states x steps) times the steps of every block.
__device__ __forceinline__ void products(float (&u)[2][4][4], const uint4* table, const unsigned* words, int lane) {
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int k = 0; k < kTimeSteps; ++k) {
    unsigned low[4][kPlanes], high[4][kPlanes];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const unsigned* w = words + plane * kPlaneWords + word_of_block(8 * (g / 2) + 2 * j + g % 2) + 8 * k + c;
        low[j][plane] = w[0];
        high[j][plane] = w[4];
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned a[TERMS][4];
#pragma unroll
      for (int t = 0; t < TERMS; ++t) {
        uint4 v = table[((m * kTimeSteps + k) * TERMS + t) * 32 + lane];
        a[t][0] = v.x, a[t][1] = v.y, a[t][2] = v.z, a[t][3] = v.w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (k == 0)
          mma_terms<true>(u[m][j], a, low[j], high[j]);
        else
          mma_terms<false>(u[m][j], a, low[j], high[j]);
      }
    }
  }
}

// Block i (0..7) of a lane: column i % 2 of column tile i / 2.
__device__ __forceinline__ Complex<float> block_of(const float (&u)[4][4], int i) { return {u[i / 2][i % 2], u[i / 2][2 + i % 2]}; }
__device__ __forceinline__ void set_block(float (&u)[4][4], int i, Complex<float> z) {
  u[i / 2][i % 2] = z.re;
  u[i / 2][2 + i % 2] = z.im;
}

struct LanePowers {
  Complex<float> a1, a8, a16, mine;  // A, A^8, A^16, and what is left of the carried state at this lane's first block
};

// In place: what every block adds becomes the state that it starts from (BACKWARDS: walking from the last block).
template <bool BACKWARDS>
__device__ __forceinline__ void scan(float (&u)[4][4], const LanePowers& q, Complex<float> carry, int c) {
  Complex<float> sum = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = multiply_add(q.a1, sum, block_of(u, BACKWARDS ? 7 - i : i));
  const int distance = BACKWARDS ? 3 - c : c;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Complex<float> other = BACKWARDS ? Complex<float>{shuffle_down(sum.re, 1 << i), shuffle_down(sum.im, 1 << i)}
                                     : Complex<float>{shuffle_up(sum.re, 1 << i), shuffle_up(sum.im, 1 << i)};
    Complex<float> joined = multiply_add(i ? q.a16 : q.a8, other, sum);
    if (distance >= 1 << i) sum = joined;
  }
  Complex<float> state = BACKWARDS ? Complex<float>{shuffle_down(sum.re, 1), shuffle_down(sum.im, 1)}
                                   : Complex<float>{shuffle_up(sum.re, 1), shuffle_up(sum.im, 1)};
  if (distance == 0) state = {0, 0};
  state = multiply_add(q.mine, carry, state);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = BACKWARDS ? 7 - i : i;
    Complex<float> added = block_of(u, at);
    set_block(u, at, state);
    state = multiply_add(q.a1, state, added);
  }
}

// The state's terms as a left operand: rows are states, columns the 16 blocks of column tiles 2 k and 2 k + 1.
__device__ __forceinline__ void left_operand(unsigned (&a)[TERMS][4], const float (&u)[4][4], int k) {
  unsigned parts[4][TERMS];
  split<TERMS>(u[2 * k][0], u[2 * k][1], parts[0]);
  split<TERMS>(u[2 * k][2], u[2 * k][3], parts[1]);
  split<TERMS>(u[2 * k + 1][0], u[2 * k + 1][1], parts[2]);
  split<TERMS>(u[2 * k + 1][2], u[2 * k + 1][3], parts[3]);
#pragma unroll
  for (int t = 0; t < TERMS; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[t][i] = parts[i][t];
}

// Right operands with blocks as rows and steps as columns: [column tile of 8 steps][plane].
__device__ __forceinline__ void transposed(unsigned (&low)[kTimeTiles][kPlanes], unsigned (&high)[kTimeTiles][kPlanes],
                                           const unsigned* words, int k, int lane) {
  const int matrix = lane / 8, row = lane % 8;
  const unsigned* at = words + word_of_block(8 * (row / 2) + 2 * (2 * k + matrix % 2) + row % 2) + 4 * (matrix / 2);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int j = 0; j < kTimeTiles; j += 2) {
      unsigned r[4];
      load_transposed(r, at + plane * kPlaneWords + 4 * j);
      low[j][plane] = r[0], high[j][plane] = r[1];
      low[j + 1][plane] = r[2], high[j + 1][plane] = r[3];
    }
  }
}

__device__ __forceinline__ Complex<float> sum_of_four(Complex<float> z) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    z.re += shuffle_xor(z.re, mask);
    z.im += shuffle_xor(z.im, mask);
  }
  return z;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) cema_grad(const __grid_constant__ Params p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int first_channel = blockIdx.x * CHANNELS, channels = min(CHANNELS, p.dim - first_channel);
  const int channel = first_channel + warp, first_order = 16 * blockIdx.z;
  const bool real = channel < p.dim;  // the other warps work on zeros
  unsigned* tiles = reinterpret_cast<unsigned*>(shared_memory());  // x, dy, and both of the next group
  uint4* in_table = reinterpret_cast<uint4*>(shared_memory() + 4 * 4 * kTileWords + warp * kTableBytes);
  uint4* out_table = in_table + kTableBytes / 32;
  const int known = min(channel, p.dim - 1);
  write_table(in_table, p.coefficients, known, first_order, false, lane);
  write_table(out_table, p.coefficients, known, first_order, true, lane);
  sync_warp();

  LanePowers up[2];
  Complex<float> down[2];  // what is left of l, carried from the end, at this lane's last block
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const Coefficients z(p.coefficients, known, first_order + 8 * m + g);
    up[m].a1 = convert<float>(z[kA]);
    up[m].a8 = convert<float>(z[kA8]);
    up[m].a16 = convert<float>(z[kA16]);
    const Complex<float> left[4] = {convert<float>(z[kPower]), up[m].a8, up[m].a16, convert<float>(z[kA16] * z[kA8])};
    up[m].mine = c == 0 ? left[0] : c == 1 ? left[1] : c == 2 ? left[2] : left[3];
    down[m] = c == 3 ? left[0] : c == 2 ? left[1] : c == 1 ? left[2] : left[3];
  }

  float d_out[2][kTimeTiles][4] = {}, d_in[2][kTimeTiles][4] = {}, d_lags[kTimeTiles][4] = {};
  Complex<float> d_a[2] = {};
  const int groups = static_cast<int>((p.length + kTile - 1) / kTile);
  const long long bytes = kFloat32 ? 4 : 2, states_of_row = static_cast<long long>(p.dim) * p.order;
  Cursor coming = {0, 0}, current;
  coming.advance(blockIdx.y, groups);
  current = coming;
  Move x_moves[kMoves], dy_moves[kMoves];
  auto steps_of = [&](const Cursor& at) {
    return static_cast<int>(min(static_cast<long long>(kTile), p.length - static_cast<long long>(at.group) * kTile));
  };
  auto start_of = [&](const Cursor& at, const char* tensor, long long row) {
    return tensor + (at.row * row + static_cast<long long>(at.group) * kTile * p.dim + first_channel) * bytes;
  };
  // The states at a group's edges, one of four in each lane, are loaded while the group before is worked on.
  Complex<float> edges = {0, 0};
  auto load_edges = [&](const Cursor& at) {
    const int n = first_order + 8 * (c % 2) + g;
    const long long state = at.row * states_of_row + static_cast<long long>(channel) * p.order + n;
    const bool outer = c < 2 ? at.group == 0 : at.group == groups - 1;
    const Complex<float>* from = outer ? (c < 2 ? p.state_in : p.state_grad_in) : (c < 2 ? p.states : p.state_grads);
    edges = {0, 0};
    if (!from || !real || n >= p.order) return;
    if (!outer) from += (at.group - (c < 2 ? 1 : 0)) * (p.batch * states_of_row);
    edges = from[state];
  };
  if (coming.row < p.batch) {
    load_edges(coming);
    fetch(x_moves, start_of(coming, p.x, p.x_row), steps_of(coming), p.dim, channels);
    fetch(dy_moves, start_of(coming, p.dy, p.dy_row), steps_of(coming), p.dim, channels);
    to_shared(x_moves, tiles);
    to_shared(dy_moves, tiles + kTileWords);
    coming.advance(gridDim.y, groups);
  }
  if (coming.row < p.batch) {
    fetch(x_moves, start_of(coming, p.x, p.x_row), steps_of(coming), p.dim, channels);
    fetch(dy_moves, start_of(coming, p.dy, p.dy_row), steps_of(coming), p.dim, channels);
  }
  for (int i = 0; current.row < p.batch; ++i) {
    sync_block();  // group i is in shared memory, and nobody reads group i - 1 any more
    const unsigned *x_words = tiles + i % 2 * 2 * kTileWords + warp * kChannelWords, *dy_words = x_words + kTileWords;
    // All that is the same for every warp is worked out here, before their ways part.
    const int blocks = steps_of(current) / BLOCK;
    const bool last_group = current.group == groups - 1;
    const bool waiting = coming.row < p.batch;  // group i + 1 is in registers
    coming.advance(gridDim.y, groups);
    const bool more = coming.row < p.batch;  // there is a group i + 2
    const char *next_x = start_of(coming, p.x, p.x_row), *next_dy = start_of(coming, p.dy, p.dy_row);
    const int next_steps = steps_of(coming);
    unsigned* next_tiles = tiles + (i + 1) % 2 * 2 * kTileWords;
    current.advance(gridDim.y, groups);
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == warp / 4 % 2) {
        if (waiting) {
          to_shared(x_moves, next_tiles);
          to_shared(dy_moves, next_tiles + kTileWords);
        }
        if (more) {
          fetch(x_moves, next_x, next_steps, p.dim, channels);
          fetch(dy_moves, next_dy, next_steps, p.dim, channels);
        }
        continue;
      }
      // h of both row tiles in lanes c = 0 and 1, l in lanes c = 2 and 3.
      const Complex<float> edge = edges;
      if (waiting) load_edges(current);
      Complex<float> h[2], l[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        h[m] = {shuffle(edge.re, 4 * g + m), shuffle(edge.im, 4 * g + m)};
        l[m] = {shuffle(edge.re, 4 * g + 2 + m), shuffle(edge.im, 4 * g + 2 + m)};
        if (last_group) l[m].im = -l[m].im;  // the last one is a gradient, not its conjugate
      }
      float state[2][4][4], grad[2][4][4];
      products(state, in_table, x_words, lane);
      products(grad, out_table, dy_words, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        scan<false>(state[m], up[m], h[m], c);
        // Blocks that the sequence does not have stand at the end: the first of them, which adds nothing of its own,
        // hands on the carried gradient.
        if (blocks < kBlocks) {
          const int first = blocks - 8 * c;
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const Complex<float> added = block_of(grad[m], k);
            set_block(grad[m], k, {added.re + (k == first ? l[m].re : 0.0f), added.im + (k == first ? l[m].im : 0.0f)});
          }
          l[m] = {0, 0};
        }
        LanePowers q = up[m];
        q.mine = down[m];
        scan<true>(grad[m], q, l[m], c);
#pragma unroll
        for (int k = 0; k < 8; ++k) d_a[m] = multiply_add(block_of(grad[m], k), block_of(state[m], k), d_a[m]);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        unsigned dy_low[kTimeTiles][kPlanes], dy_high[kTimeTiles][kPlanes];
        transposed(dy_low, dy_high, dy_words, k, lane);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          unsigned a[TERMS][4];
          left_operand(a, state[m], k);
#pragma unroll
          for (int j = 0; j < kTimeTiles; ++j) mma_terms<false>(d_out[m][j], a, dy_low[j], dy_high[j]);
        }
        unsigned x_low[kTimeTiles][kPlanes], x_high[kTimeTiles][kPlanes];
        transposed(x_low, x_high, x_words, k, lane);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          unsigned a[TERMS][4];
          left_operand(a, grad[m], k);
#pragma unroll
          for (int j = 0; j < kTimeTiles; ++j) mma_terms<false>(d_in[m][j], a, x_low[j], x_high[j]);
        }
        // dy^T x: accumulator i holds all pieces whose first element has the lag 8 i - 8.
#pragma unroll
        for (int m = 0; m < kTimeSteps; ++m) {
          unsigned a[kPlanes][4];
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            a[plane][0] = dy_low[2 * m][plane], a[plane][1] = dy_low[2 * m + 1][plane];
            a[plane][2] = dy_high[2 * m][plane], a[plane][3] = dy_high[2 * m + 1][plane];
          }
#pragma unroll
          for (int j = 0; j <= 2 * m + 1; ++j) mma_terms<false>(d_lags[2 * m - j + 1], a, x_low[j], x_high[j]);
        }
      }
    }
  }
  sync_block();

  // The sums over diagonals: lane l adds up lag l, in a fixed order.
  float* pieces = reinterpret_cast<float*>(tiles + warp * kChannelWords);
#pragma unroll
  for (int i = 0; i < kTimeTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) pieces[(i * 16 + g + e / 2 * 8) * 8 + 2 * c + e % 2] = d_lags[i][e];
  }
  sync_warp();
  float d_lag = 0;
  for (int i = 0; i < kTimeTiles; ++i) {
    for (int r = 0; r < 16; ++r) {
      int column = 8 * i - 8 + r - lane;
      if (column >= 0 && column < 8) d_lag += pieces[(i * 16 + r) * 8 + column];
    }
  }
  float* lags = pieces + kTimeTiles * 128;
  lags[lane] = lane < BLOCK ? d_lag : 0.0f;
  sync_warp();

#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int n = first_order + 8 * m + g;
    const Coefficients z(p.coefficients, known, n);
    const Complex<float> in = convert<float>(z[kP]), out = convert<float>(z[kG]), both = in * out;
    Complex<float> dp = {0, 0}, dg = {0, 0}, d_log = convert<float>(z[kA]) * d_a[m];
    d_log = {BLOCK * d_log.re, BLOCK * d_log.im};
#pragma unroll
    for (int j = 0; j < kTimeTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int step = 8 * j + 2 * c + e, left = BLOCK - 1 - step;
        const Complex<float> at_lag = convert<float>(z.power(j, 2 * c + e));
        const Complex<float> after = convert<float>(z.power(j, 2 * c + e + 1));
        const Complex<float> before = convert<float>(z.power(kTimeTiles - 1 - j, 7 - 2 * c - e));
        const Complex<float> by_out = after * Complex<float>{d_out[m][j][e], d_out[m][j][2 + e]};
        const Complex<float> by_in = before * Complex<float>{d_in[m][j][e], d_in[m][j][2 + e]};
        const Complex<float> by_lag = {at_lag.re * lags[step], at_lag.im * lags[step]};
        dg = multiply_add(in, by_lag, {dg.re + by_out.re, dg.im + by_out.im});
        dp = multiply_add(out, by_lag, {dp.re + by_in.re, dp.im + by_in.im});
        const Complex<float> whole = multiply_add(
            out, {(step + 1) * by_out.re, (step + 1) * by_out.im},
            multiply_add(in, {left * by_in.re, left * by_in.im}, both * Complex<float>{step * by_lag.re, step * by_lag.im}));
        d_log = {d_log.re + whole.re, d_log.im + whole.im};
      }
    }
    dp = sum_of_four(dp);
    dg = sum_of_four(dg);
    d_log = sum_of_four(d_log);
    if (c == 0 && real) {
      Complex<float>* to =
          p.partial + ((static_cast<long long>(blockIdx.y) * p.dim + channel) * ORDERS + n) * 3;
      to[0] = dp;
      to[1] = dg;
      to[2] = d_log;
    }
  }
  if (lane == 0 && real && blockIdx.z == 0) p.partial_omega[static_cast<long long>(blockIdx.y) * p.dim + channel] = d_lag;
}
