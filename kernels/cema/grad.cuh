// The pieces of cema/grad.cu: what one warp does with its channel of a group of blocks, step by step.
#pragma once
#include "cema/staging.cuh"

// A tile of this kernel, a group of blocks of x or of dy.
struct GroupTile {
  static constexpr int kBlocks = 32;
  // Rows of 16 bytes for the transposing load; any 8 of them that it reads at once lie in different banks.
  static constexpr int kBlockWords = kBlock / 2 + 4;
  static constexpr int kPlaneWords = 4 * (8 * kBlockWords + 8);
  static constexpr int kChannelWords = kPlanes * kPlaneWords;
  static __device__ __forceinline__ int word_of_block(int block) { return block * kBlockWords + block / 8 * 8; }
};
constexpr int kGroupSteps = Staging<GroupTile>::kSteps;

constexpr int kTimeSteps = kBlock / 16;
constexpr int kTimeTiles = kBlock / 8;
constexpr int kTableBytes = 2 * 2 * kTimeSteps * kTerms * 32 * 16;  // in and out table of one channel
constexpr int kTileWords = kChannels * GroupTile::kChannelWords;

// A group's x and dy, from device to shared memory. Nothing is loaded ahead: while some warps wait here, others work,
// and registers are what cema_grad is short of.
__device__ __forceinline__ void bring(unsigned* tiles, const char* x, const char* dy, int steps, int dim,
                                      int channels) {
  Move x_moves[Staging<GroupTile>::kMoves], dy_moves[Staging<GroupTile>::kMoves];
  fetch<GroupTile>(x_moves, x, steps, dim, channels);
  fetch<GroupTile>(dy_moves, dy, steps, dim, channels);
  to_shared<GroupTile>(x_moves, tiles);
  to_shared<GroupTile>(dy_moves, tiles + kTileWords);
}

// Rows g and g + 8 of row tile m: real and imaginary part of order 8 m + g; columns are steps.
__device__ __forceinline__ void write_table(uint4* table, const Complex<Real>* coefficients, int channel,
                                            int first_order, bool out, int lane) {
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
      unsigned parts[4][kTerms];
      split<kTerms>(re[0], re[1], parts[0]);
      split<kTerms>(im[0], im[1], parts[1]);
      split<kTerms>(re[2], re[3], parts[2]);
      split<kTerms>(im[2], im[3], parts[3]);
#pragma unroll
      for (int t = 0; t < kTerms; ++t)
        table[((m * kTimeSteps + k) * kTerms + t) * 32 + lane] =
            make_uint4(parts[0][t], parts[1][t], parts[2][t], parts[3][t]);
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
        const unsigned* w = words + plane * GroupTile::kPlaneWords +
                            GroupTile::word_of_block(8 * (g / 2) + 2 * j + g % 2) + 8 * k + c;
        low[j][plane] = w[0];
        high[j][plane] = w[4];
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned a[kTerms][4];
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        uint4 v = table[((m * kTimeSteps + k) * kTerms + t) * 32 + lane];
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
__device__ __forceinline__ Complex<float> block_of(const float (&u)[4][4], int i) {
  return {u[i / 2][i % 2], u[i / 2][2 + i % 2]};
}
__device__ __forceinline__ void set_block(float (&u)[4][4], int i, Complex<float> z) {
  u[i / 2][i % 2] = z.re;
  u[i / 2][2 + i % 2] = z.im;
}

struct LanePowers {
  Complex<float> a1, a8, a16, mine;  // A, A^8, A^16, and what is left of the carried state at this lane's first block
};

// The powers of an order, and `left`: what is left of l, carried from the end, at this lane's last block.
__device__ __forceinline__ void load_powers(LanePowers& up, Complex<float>& left, const Coefficients& z, int c) {
  up.a1 = convert<float>(z[kA]);
  up.a8 = convert<float>(z[kA8]);
  up.a16 = convert<float>(z[kA16]);
  const Complex<float> powers[4] = {convert<float>(z[kPower]), up.a8, up.a16, convert<float>(z[kA16] * z[kA8])};
  up.mine = c == 0 ? powers[0] : c == 1 ? powers[1] : c == 2 ? powers[2] : powers[3];
  left = c == 3 ? powers[0] : c == 2 ? powers[1] : c == 1 ? powers[2] : powers[3];
}

// A last group may have fewer blocks. The first block past the end of the sequence, block `first` of this lane, adds
// nothing of its own; it takes the carried gradient, from where the scan passes it to the blocks before it.
__device__ __forceinline__ void hand_on_gradient(float (&grad)[2][4][4], Complex<float> (&l)[2], int first) {
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

// The scan over a lane's 8 blocks and the four lanes of an order, in three steps, each of which is taken for all
// scans at once, so that one's latency is hidden by the others. BACKWARDS walks from the last block.
template <bool BACKWARDS>
__device__ __forceinline__ Complex<float> sum_of_blocks(const float (&u)[4][4], const LanePowers& q) {
  Complex<float> sum = block_of(u, BACKWARDS ? 7 : 0);
#pragma unroll
  for (int i = 1; i < 8; ++i) sum = multiply_add(q.a1, sum, block_of(u, BACKWARDS ? 7 - i : i));
  return sum;
}

// The state that the lane's first block starts from, from the sums of the lanes before it.
template <bool BACKWARDS>
__device__ __forceinline__ Complex<float> state_of_lane(Complex<float> sum, const LanePowers& q, Complex<float> carry,
                                                        int c) {
  const int distance = BACKWARDS ? 3 - c : c;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Complex<float> other = BACKWARDS ? Complex<float>{shuffle_down(sum.re, 1 << i), shuffle_down(sum.im, 1 << i)}
                                           : Complex<float>{shuffle_up(sum.re, 1 << i), shuffle_up(sum.im, 1 << i)};
    const Complex<float> joined = multiply_add(i ? q.a16 : q.a8, other, sum);
    if (distance >= 1 << i) sum = joined;
  }
  Complex<float> state = BACKWARDS ? Complex<float>{shuffle_down(sum.re, 1), shuffle_down(sum.im, 1)}
                                   : Complex<float>{shuffle_up(sum.re, 1), shuffle_up(sum.im, 1)};
  if (distance == 0) state = {0, 0};
  return multiply_add(q.mine, carry, state);
}

// In place: what every block adds becomes the state that it starts from.
template <bool BACKWARDS>
__device__ __forceinline__ void spread(float (&u)[4][4], const LanePowers& q, Complex<float> state) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = BACKWARDS ? 7 - i : i;
    const Complex<float> added = block_of(u, at);
    set_block(u, at, state);
    state = multiply_add(q.a1, state, added);
  }
}

// The state's terms as a left operand: rows are states, columns the 16 blocks of column tiles 2 k and 2 k + 1.
__device__ __forceinline__ void left_operand(unsigned (&a)[kTerms][4], const float (&u)[4][4], int k) {
  unsigned parts[4][kTerms];
  split<kTerms>(u[2 * k][0], u[2 * k][1], parts[0]);
  split<kTerms>(u[2 * k][2], u[2 * k][3], parts[1]);
  split<kTerms>(u[2 * k + 1][0], u[2 * k + 1][1], parts[2]);
  split<kTerms>(u[2 * k + 1][2], u[2 * k + 1][3], parts[3]);
#pragma unroll
  for (int t = 0; t < kTerms; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[t][i] = parts[i][t];
}

// Right operands with blocks as rows and steps as columns: [column tile of 8 steps][plane].
__device__ __forceinline__ void transposed(unsigned (&low)[kTimeTiles][kPlanes], unsigned (&high)[kTimeTiles][kPlanes],
                                           const unsigned* words, int k, int lane) {
  const int matrix = lane / 8, row = lane % 8;
  const unsigned* at =
      words + GroupTile::word_of_block(8 * (row / 2) + 2 * (2 * k + matrix % 2) + row % 2) + 4 * (matrix / 2);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int j = 0; j < kTimeTiles; j += 2) {
      unsigned r[4];
      load_transposed(r, at + plane * GroupTile::kPlaneWords + 4 * j);
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

// The gradients of the tables, of this lane's piece of them.
struct TableGradients {
  float out[2][kTimeTiles][4], in[2][kTimeTiles][4];  // dC and dS
  float lags[kTimeTiles][4];                          // pieces of dy^T x
  Complex<float> decay[2];                            // dA

  // Both scans, of the states up and of their gradients down: what blocks add becomes what they start from; and dA.
  __device__ __forceinline__ void scan(float (&state)[2][4][4], float (&grad)[2][4][4], Complex<float> (&h)[2],
                                       Complex<float> (&l)[2], const LanePowers (&up)[2],
                                       const Complex<float> (&left)[2], int c) {
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
      for (int k = 0; k < 8; ++k) decay[m] = multiply_add(block_of(grad[m], k), block_of(state[m], k), decay[m]);
    }
  }

  // The products over the blocks of column tiles 2 k and 2 k + 1.
  __device__ __forceinline__ void add_products(const float (&state)[2][4][4], const float (&grad)[2][4][4],
                                               const unsigned* x_words, const unsigned* dy_words, int k, int lane) {
    unsigned dy_low[kTimeTiles][kPlanes], dy_high[kTimeTiles][kPlanes];
    transposed(dy_low, dy_high, dy_words, k, lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned a[kTerms][4];
      left_operand(a, state[m], k);
#pragma unroll
      for (int j = 0; j < kTimeTiles; ++j) mma_terms<false>(out[m][j], a, dy_low[j], dy_high[j]);
    }
    unsigned x_low[kTimeTiles][kPlanes], x_high[kTimeTiles][kPlanes];
    transposed(x_low, x_high, x_words, k, lane);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned a[kTerms][4];
      left_operand(a, grad[m], k);
#pragma unroll
      for (int j = 0; j < kTimeTiles; ++j) mma_terms<false>(in[m][j], a, x_low[j], x_high[j]);
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
      for (int j = 0; j <= 2 * m + 1; ++j) mma_terms<false>(lags[2 * m - j + 1], a, x_low[j], x_high[j]);
    }
  }
};
