// Gradients of CEMA's coefficients from x, dy and the states at the edges of groups of 32 blocks.
//
// kernels/README.md (CEMA, Backward) derives them and has the names: h_b is the state that enters block b, l_b the
// conjugate of the gradient of the state that leaves it, k, C, S and A are the tables. All gradients are conjugated, so
// that no conjugate is left.
//
// A thread block owns kChannels channels, one warp each, 16 orders of them (blockIdx.z: which 16), and every
// gridDim.y-th group of time, in fixed order; groups are independent of each other because the passes kept the states
// at their edges. All threads bring a group of x and of dy to shared memory, each warp works on its own channel
// alone. Two groups' buffers alternate: between two barriers the block works on group i and brings in group i + 1.
// Half of the warps do the one first and half the other, so that both go on at once; neighbouring warps run on
// different schedulers, so it is by warp / 4.
//
// In a warp, the rows of the first products are states: rows g and g + 8 (g = lane / 4) of row tile m are the real and
// imaginary part of order 8 m + g; the columns are blocks, and a lane holds 8 neighbouring ones, 8 (lane % 4) and on,
// so the scan over blocks is arithmetic on registers with two shuffles. The states are then the left operands of the
// products that sum over blocks, whose right operands are x and dy, transposed on the way from shared memory.
//
// Precision: tables and states are split into kTerms bfloat16 terms, x and dy are exact; sums are float32.
#include "cema/grad.cuh"

struct Params {
  const char* x;
  const char* dy;
  const Complex<Real>* coefficients;     // (D, kSlots, kOrders)
  const Complex<float>* state_in;        // (B, D, N): h that enters the first group, null is zero
  const Complex<float>* states;          // (groups - 1, B, D, N): h between groups
  const Complex<float>* state_grads;     // (groups - 1, B, D, N): l between groups
  const Complex<float>* state_grad_in;   // (B, D, N): gradient of the state that leaves the last group, null is zero
  Complex<float>* partial;               // (slots, D, kOrders, 3): dp, dg, dlog q, conjugated
  float* partial_omega;                  // (slots, D)
  long long x_row, dy_row;               // elements from one batch row to the next
  int length;                            // steps, a multiple of T
  int batch, dim, order;
};

// A group of blocks: batch row and number in the row.
struct Cursor {
  int row, group;
  __device__ __forceinline__ void advance(int by, int groups) {
    for (group += by; group >= groups; group -= groups) ++row;
  }
};

// Where this thread works: its warp's channel, and its 16 orders of it.
struct Place {
  int warp, lane, g, c;          // row g of a row tile, columns 8 c .. 8 c + 7
  int first_channel, channels;   // of the thread block
  int channel, known;            // of the warp; the nearest one that there is
  int first_order;
  bool real;                     // the other warps work on zeros
  __device__ __forceinline__ explicit Place(const Params& p) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    first_channel = blockIdx.x * kChannels, channels = min(kChannels, p.dim - first_channel);
    channel = first_channel + warp, first_order = 16 * blockIdx.z;
    real = channel < p.dim;
    known = min(channel, p.dim - 1);
  }
};

// The groups of time that the thread block takes.
struct Groups {
  const Params& p;
  const Place& at;
  int count;
  long long states_of_row;
  __device__ __forceinline__ Groups(const Params& p, const Place& at) : p(p), at(at) {
    count = (p.length + kGroupSteps - 1) / kGroupSteps;
    states_of_row = static_cast<long long>(p.dim) * p.order;
  }
  __device__ __forceinline__ int steps_of(const Cursor& cursor) const {
    return min(kGroupSteps, p.length - cursor.group * kGroupSteps);
  }
  __device__ __forceinline__ const char* start_of(const Cursor& cursor, const char* tensor, long long row) const {
    const long long bytes = kFloat32 ? 4 : 2;
    return tensor +
           (cursor.row * row + static_cast<long long>(cursor.group) * kGroupSteps * p.dim + at.first_channel) * bytes;
  }
  // The states at a group's edges, one of four in each lane: h of both row tiles in lanes c = 0 and 1, l in c = 2 and
  // 3.
  __device__ __forceinline__ Complex<float> load_edges(const Cursor& cursor) const {
    const int c = at.c, n = at.first_order + 8 * (c % 2) + at.g;
    const long long state = cursor.row * states_of_row + static_cast<long long>(at.channel) * p.order + n;
    const bool outer = c < 2 ? cursor.group == 0 : cursor.group == count - 1;
    const Complex<float>* from = outer ? (c < 2 ? p.state_in : p.state_grad_in) : (c < 2 ? p.states : p.state_grads);
    if (!from || !at.real || n >= p.order) return {0, 0};
    if (!outer) from += (cursor.group - (c < 2 ? 1 : 0)) * (p.batch * states_of_row);
    return from[state];
  }
};

// The edges of a group for this lane's order in both row tiles.
__device__ __forceinline__ void share_edges(Complex<float> (&h)[2], Complex<float> (&l)[2], Complex<float> edge,
                                            bool last_group, int g) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    h[m] = {shuffle(edge.re, 4 * g + m), shuffle(edge.im, 4 * g + m)};
    l[m] = {shuffle(edge.re, 4 * g + 2 + m), shuffle(edge.im, 4 * g + 2 + m)};
    if (last_group) l[m].im = -l[m].im;  // the last one is a gradient, not its conjugate
  }
}

// Adds up the pieces of dy^T x over diagonals: lane l gets the sum of lag l, in a fixed order. `pieces` is shared
// memory.
__device__ __forceinline__ float sum_diagonals(float* pieces, const float (&d_lags)[kTimeTiles][4], const Place& at) {
#pragma unroll
  for (int i = 0; i < kTimeTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) pieces[(i * 16 + at.g + e / 2 * 8) * 8 + 2 * at.c + e % 2] = d_lags[i][e];
  }
  sync_warp();
  float d_lag = 0;
  for (int i = 0; i < kTimeTiles; ++i) {
    for (int r = 0; r < 16; ++r) {
      int column = 8 * i - 8 + r - at.lane;
      if (column >= 0 && column < 8) d_lag += pieces[(i * 16 + r) * 8 + column];
    }
  }
  return d_lag;
}

// From the gradients of the tables to those of p, g and log q, by the equations of the head; `lags` holds dk.
__device__ __forceinline__ void leave_coefficient_gradients(const Params& p, const TableGradients& d, const float* lags,
                                                            const Place& at) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int n = at.first_order + 8 * m + at.g;
    const Coefficients z(p.coefficients, at.known, n);
    const Complex<float> in = convert<float>(z[kP]), out = convert<float>(z[kG]), both = in * out;
    Complex<float> dp = {0, 0}, dg = {0, 0}, d_log = convert<float>(z[kA]) * d.decay[m];
    d_log = {kBlock * d_log.re, kBlock * d_log.im};
#pragma unroll
    for (int j = 0; j < kTimeTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int step = 8 * j + 2 * at.c + e, left = kBlock - 1 - step;
        const Complex<float> at_lag = convert<float>(z.power(j, 2 * at.c + e));
        const Complex<float> after = convert<float>(z.power(j, 2 * at.c + e + 1));
        const Complex<float> before = convert<float>(z.power(kTimeTiles - 1 - j, 7 - 2 * at.c - e));
        const Complex<float> by_out = after * Complex<float>{d.out[m][j][e], d.out[m][j][2 + e]};
        const Complex<float> by_in = before * Complex<float>{d.in[m][j][e], d.in[m][j][2 + e]};
        const Complex<float> by_lag = {at_lag.re * lags[step], at_lag.im * lags[step]};
        dg = multiply_add(in, by_lag, {dg.re + by_out.re, dg.im + by_out.im});
        dp = multiply_add(out, by_lag, {dp.re + by_in.re, dp.im + by_in.im});
        const Complex<float> whole = multiply_add(
            out, {(step + 1) * by_out.re, (step + 1) * by_out.im},
            multiply_add(in, {left * by_in.re, left * by_in.im},
                         both * Complex<float>{step * by_lag.re, step * by_lag.im}));
        d_log = {d_log.re + whole.re, d_log.im + whole.im};
      }
    }
    dp = sum_of_four(dp);
    dg = sum_of_four(dg);
    d_log = sum_of_four(d_log);
    if (at.c == 0 && at.real) {
      Complex<float>* to =
          p.partial + ((static_cast<long long>(blockIdx.y) * p.dim + at.channel) * kOrders + n) * 3;
      to[0] = dp;
      to[1] = dg;
      to[2] = d_log;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) cema_grad(const __grid_constant__ Params p) {
  const Place at(p);
  unsigned* tiles = reinterpret_cast<unsigned*>(shared_memory());  // x, dy, and both of the next group
  uint4* in_table = reinterpret_cast<uint4*>(shared_memory() + 4 * 4 * kTileWords + at.warp * kTableBytes);
  uint4* out_table = in_table + kTableBytes / 32;
  write_table(in_table, p.coefficients, at.known, at.first_order, false, at.lane);
  write_table(out_table, p.coefficients, at.known, at.first_order, true, at.lane);
  sync_warp();
  LanePowers up[2];
  Complex<float> left[2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
    load_powers(up[m], left[m], Coefficients(p.coefficients, at.known, at.first_order + 8 * m + at.g), at.c);

  TableGradients d = {};
  const Groups groups(p, at);
  Cursor coming = {0, 0}, current;
  coming.advance(blockIdx.y, groups.count);
  current = coming;
  Complex<float> edges = {0, 0};  // loaded while the group before is processed
  if (coming.row < p.batch) {
    edges = groups.load_edges(coming);
    bring(tiles, groups.start_of(coming, p.x, p.x_row), groups.start_of(coming, p.dy, p.dy_row),
          groups.steps_of(coming), p.dim, at.channels);
    coming.advance(gridDim.y, groups.count);
  }
  for (int i = 0; current.row < p.batch; ++i) {
    sync_block();  // group i is in shared memory, and no warp reads group i - 1 any more
    const unsigned* x_words = tiles + i % 2 * 2 * kTileWords + at.warp * GroupTile::kChannelWords;
    const unsigned* dy_words = x_words + kTileWords;
    // What is the same for every warp is computed here, before their paths diverge.
    const int blocks = groups.steps_of(current) / kBlock;
    const bool last_group = current.group == groups.count - 1;
    const bool waiting = coming.row < p.batch;  // there is a group i + 1
    const char *next_x = groups.start_of(coming, p.x, p.x_row), *next_dy = groups.start_of(coming, p.dy, p.dy_row);
    const int next_steps = groups.steps_of(coming);
    coming.advance(gridDim.y, groups.count);
    unsigned* next_tiles = tiles + (i + 1) % 2 * 2 * kTileWords;
    current.advance(gridDim.y, groups.count);
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == at.warp / 4 % 2) {
        if (waiting) bring(next_tiles, next_x, next_dy, next_steps, p.dim, at.channels);
        continue;
      }
      const Complex<float> edge = edges;
      if (waiting) edges = groups.load_edges(current);
      Complex<float> h[2], l[2];
      share_edges(h, l, edge, last_group, at.g);
      float state[2][4][4], grad[2][4][4];
      products(state, in_table, x_words, at.lane);
      products(grad, out_table, dy_words, at.lane);
      if (blocks < GroupTile::kBlocks) hand_on_gradient(grad, l, blocks - 8 * at.c);
      d.scan(state, grad, h, l, up, left, at.c);
#pragma unroll
      for (int k = 0; k < 2; ++k) d.add_products(state, grad, x_words, dy_words, k, at.lane);
    }
  }
  sync_block();

  float* pieces = reinterpret_cast<float*>(tiles + at.warp * GroupTile::kChannelWords);
  const float d_lag = sum_diagonals(pieces, d.lags, at);
  float* lags = pieces + kTimeTiles * 128;
  lags[at.lane] = at.lane < kBlock ? d_lag : 0.0f;
  sync_warp();
  leave_coefficient_gradients(p, d, lags, at);
  if (at.lane == 0 && at.real && blockIdx.z == 0)
    p.partial_omega[static_cast<long long>(blockIdx.y) * p.dim + at.channel] = d_lag;
}
