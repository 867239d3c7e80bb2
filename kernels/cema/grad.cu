// Gradients of CEMA's coefficients from x, dy and the states at the edges of groups of 32 blocks.
//
// With h_b the state that enters block b and l_b the conjugate of the gradient of the state that leaves it,
//   dk_lag = sum of the lag-th diagonal of sum_b dy_b x_b^T,
//   dC = sum_b dy_b h_b,   dS = sum_b x_b l_b,   dA = sum_b l_b h_b
// (all conjugated, so that no conjugate is left), and from these tables' gradients those of p, g and log q:
//   dp = sum_l g q^l dk_l + sum_t q^(T-1-t) dS_t,     dg = sum_l p q^l dk_l + sum_t q^(t+1) dC_t,
//   dlog q = sum_l l p g q^l dk_l + sum_t (t+1) g q^(t+1) dC_t + sum_t (T-1-t) p q^(T-1-t) dS_t + T A dA.
//
// A thread block owns CHANNELS channels, one warp each, 16 orders of them (blockIdx.z: which 16), and every gridDim.y-th
// group of time, in fixed order; groups are independent of each other because the passes kept the states at their edges.
// All threads bring a group of x and of dy to shared memory, each warp works on its own channel alone. Two groups' buffers
// alternate: between two barriers the block works on group i and brings in group i + 1. Half of the warps do the one first
// and half the other, so that both go on at once; neighbouring warps run on different schedulers, so it is by warp / 4.
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
#include "cema/common.cuh"
constexpr int kChannelWords = kPlanes * kPlaneWords;
__device__ __forceinline__ int word_of_block(int block) { return block * kBlockWords + block / 8 * 8; }

struct Params {
  const char* x;
  const char* dy;
  const Complex<Real>* coefficients;     // (D, kSlots, ORDERS)
  const Complex<float>* state_in;        // (B, D, N): h that enters the first group, null is zero
  const Complex<float>* states;          // (groups - 1, B, D, N): h between groups
  const Complex<float>* state_grads;     // (groups - 1, B, D, N): l between groups
  const Complex<float>* state_grad_in;   // (B, D, N): gradient of the state that leaves the last group, null is zero
  Complex<float>* partial;               // (slots, D, ORDERS, 3): dp, dg, dlog q, conjugated
  float* partial_omega;                  // (slots, D)
  long long x_row, dy_row;               // elements from one batch row to the next
  int length;                            // steps, a multiple of T
  int batch, dim, order;
};

#include "cema/grad.cuh"

// A group of blocks: batch row and number in the row.
struct Cursor {
  int row, group;
  __device__ __forceinline__ void advance(int by, int groups) {
    for (group += by; group >= groups; group -= groups) ++row;
  }
};

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
  Complex<float> left[2];  // what is left of l, carried from the end, at this lane's last block
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const Coefficients z(p.coefficients, known, first_order + 8 * m + g);
    up[m].a1 = convert<float>(z[kA]);
    up[m].a8 = convert<float>(z[kA8]);
    up[m].a16 = convert<float>(z[kA16]);
    const Complex<float> powers[4] = {convert<float>(z[kPower]), up[m].a8, up[m].a16, convert<float>(z[kA16] * z[kA8])};
    up[m].mine = c == 0 ? powers[0] : c == 1 ? powers[1] : c == 2 ? powers[2] : powers[3];
    left[m] = c == 3 ? powers[0] : c == 2 ? powers[1] : c == 1 ? powers[2] : powers[3];
  }

  float d_out[2][kTimeTiles][4] = {}, d_in[2][kTimeTiles][4] = {}, d_lags[kTimeTiles][4] = {};
  Complex<float> d_a[2] = {};
  const int groups = (p.length + kTile - 1) / kTile;
  const long long bytes = kFloat32 ? 4 : 2, states_of_row = static_cast<long long>(p.dim) * p.order;
  Cursor coming = {0, 0}, current;
  coming.advance(blockIdx.y, groups);
  current = coming;
  auto steps_of = [&](const Cursor& at) { return min(kTile, p.length - at.group * kTile); };
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
    bring(tiles, start_of(coming, p.x, p.x_row), start_of(coming, p.dy, p.dy_row), steps_of(coming), p.dim, channels);
    coming.advance(gridDim.y, groups);
  }
  for (int i = 0; current.row < p.batch; ++i) {
    sync_block();  // group i is in shared memory, and nobody reads group i - 1 any more
    const unsigned *x_words = tiles + i % 2 * 2 * kTileWords + warp * kChannelWords, *dy_words = x_words + kTileWords;
    // All that is the same for every warp is worked out here, before their ways part.
    const int blocks = steps_of(current) / BLOCK;
    const bool last_group = current.group == groups - 1;
    const bool waiting = coming.row < p.batch;  // there is a group i + 1
    const char *next_x = start_of(coming, p.x, p.x_row), *next_dy = start_of(coming, p.dy, p.dy_row);
    const int next_steps = steps_of(coming);
    coming.advance(gridDim.y, groups);
    unsigned* next_tiles = tiles + (i + 1) % 2 * 2 * kTileWords;
    current.advance(gridDim.y, groups);
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == warp / 4 % 2) {
        if (waiting) bring(next_tiles, next_x, next_dy, next_steps, p.dim, channels);
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
      // Blocks that the sequence does not have stand at the end: the first of them, which adds nothing of its own, hands
      // on the carried gradient.
      if (blocks < kBlocks) {
        const int first = blocks - 8 * c;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const Complex<float> added = block_of(grad[m], k);
            set_block(grad[m], k, {added.re + (k == first ? l[m].re : 0.0f), added.im + (k == first ? l[m].im : 0.0f)});
          }
          l[m] = {0, 0};
        }
      }
      LanePowers down[2] = {up[0], up[1]};
      down[0].mine = left[0], down[1].mine = left[1];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        h[m] = state_of_lane<false>(sum_of_blocks<false>(state[m], up[m]), up[m], h[m], c);
        l[m] = state_of_lane<true>(sum_of_blocks<true>(grad[m], down[m]), down[m], l[m], c);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        spread<false>(state[m], up[m], h[m]);
        spread<true>(grad[m], down[m], l[m]);
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
