// One pass of CEMA over time: the forward pass, or, with REVERSE, its transpose, which gives dx from dy.
//
// With the tables of kernels/README.md, for each channel and block of T steps:
//   forward   y = Toeplitz(k) x + Re(C h),     h <- A h + S x        in = S_t = p q^(T-1-t),  out = C_t = g q^(t+1)
//   REVERSE   dx = Toeplitz(k)^T dy + Re(S l), l <- A l + C dy       in = C_t,                out = S_t
// where l is the conjugate of the state's gradient and the blocks are walked from the last one to the first.
//
// A thread block owns CHANNELS channels, one warp each, and walks their tiles of 16 blocks in order of time for some
// batch rows and one segment. For a tile, all threads bring the steps to shared memory (cema_staging.cuh); then each
// warp works on its own channel alone, in place; then all threads carry the result away. Two barriers a tile part the
// three. The next tile's loads are under way in registers meanwhile.
//
// In a warp, the rows of the matrix products are the 16 blocks: rows g and g + 8 (g = lane / 4) hold blocks 2g and
// 2g + 1 in walking order. A lane holds the states of orders 4 j + lane % 4 of its two blocks, real and imaginary part
// side by side in an accumulator, so the scan over blocks is arithmetic on registers with three shuffles up, and the
// states' bfloat16 terms are at once the left operand of the product with the out table.
//
// Precision: tables and states are split into TERMS bfloat16 terms, sums are float32. The state that is carried from
// tile to tile is a Real (float64 for float32 activations) and decays by A^16, which was made in float64.
constexpr int kBlocks = 16;
constexpr int kBlockWords = BLOCK / 2 + 2;  // 2 kBlockWords is 4 modulo 32 or 20: even blocks lie in different banks
constexpr int kPlaneWords = kBlocks * kBlockWords;
#include "cema.cuh"
constexpr int kChannelWords = kPlanes * kPlaneWords + 2;
__device__ __forceinline__ int word_of_block(int block) { return block * kBlockWords; }
#include "cema_staging.cuh"

struct Params {
  const char* x;
  char* y;                            // null: only the state is wanted
  const Complex<Real>* coefficients;  // (D, ORDERS, kSlots)
  const Real* lags;                   // (D, T)
  const Complex<float>* state_in;     // (B, D, N), null is zero
  Complex<float>* state_out;          // (B, D, N), null if not wanted
  Complex<float>* boundaries;         // (groups, B, D, N): the state that enters each group of tiles, null if not wanted
  Complex<float>* summaries;          // (segments, B, D, N): what each segment leaves of a zero state
  long long x_row, y_row;             // elements from one batch row to the next
  long long length;                   // steps, a multiple of T
  int batch, dim, order;
  int rows;                           // batch rows of a thread block
  int segments;                       // parts of the time axis that are walked at once
  int segment_tiles;
};

constexpr int kStateTiles = ORDERS / 4;   // accumulators of the states, 8 columns each: 4 orders
constexpr int kStateSteps = ORDERS / 8;   // steps of 16 in the product with the out table
constexpr int kOutTiles = BLOCK / 8;
constexpr int kTimeSteps = BLOCK / 16;
constexpr int kOutEntries = kOutTiles * kStateSteps;
constexpr int kTilesPerGroup = 2;         // tiles between two states that are kept for the backward pass

struct alignas(TERMS == 2 ? 16 : 8) OutEntry {
  unsigned b0[TERMS], b1[TERMS];
};

// Powers that the scan needs, of one order.
struct alignas(16) ScanPowers {
  Complex<float> a1, a2, a4, a8;
  Complex<float> lanes[8];  // A^(2 g)
  Complex<Real> a16;
};

// Shared memory: the tile, the scan's powers, and the out table if registers are short of room.
constexpr int kTileBytes = (CHANNELS * kChannelWords * 4 + 15) / 16 * 16;
constexpr int kScanBytes = CHANNELS * ORDERS * sizeof(ScanPowers);

__device__ __forceinline__ Complex<Real> in_entry(const Complex<Real>* c, int step) {
  int exponent = REVERSE ? step + 1 : BLOCK - 1 - step;
  int r = exponent % 8, m = exponent / 8;
  return c[REVERSE ? kG : kP] * power(c, m == BLOCK / 8 ? m - 1 : m, m == BLOCK / 8 ? 8 : r);
}

__device__ __forceinline__ Complex<Real> out_entry(const Complex<Real>* c, int step) {
  int exponent = REVERSE ? BLOCK - 1 - step : step + 1;
  int r = exponent % 8, m = exponent / 8;
  return c[REVERSE ? kP : kG] * power(c, m == BLOCK / 8 ? m - 1 : m, m == BLOCK / 8 ? 8 : r);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) cema_pass(const __grid_constant__ Params p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int first_channel = blockIdx.x * CHANNELS, channels = min(CHANNELS, p.dim - first_channel);
  const int channel = first_channel + warp;
  const bool real = channel < p.dim;  // the other warps work on zeros
  unsigned* tile = reinterpret_cast<unsigned*>(shared_memory());
  ScanPowers* scan = reinterpret_cast<ScanPowers*>(shared_memory() + kTileBytes) + warp * ORDERS;
  const Complex<Real>* coefficients =
      p.coefficients + static_cast<long long>(real ? channel : p.dim - 1) * ORDERS * kSlots;

  // The tables, as right operands: rows are steps (in) or states (out, where Re and -Im of an order are neighbours).
  unsigned in_low[kTimeSteps][kStateTiles][TERMS], in_high[kTimeSteps][kStateTiles][TERMS];
#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) {
    const Complex<Real>* z = coefficients + (4 * j + g / 2) * kSlots;
#pragma unroll
    for (int k = 0; k < kTimeSteps; ++k) {
      Complex<Real> e[4] = {in_entry(z, 16 * k + 2 * c), in_entry(z, 16 * k + 2 * c + 1),
                            in_entry(z, 16 * k + 2 * c + 8), in_entry(z, 16 * k + 2 * c + 9)};
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(g % 2 ? e[i].im : e[i].re);
      split<TERMS>(v[0], v[1], in_low[k][j]);
      split<TERMS>(v[2], v[3], in_high[k][j]);
    }
  }
#if OUT_SHARED
  OutEntry* out_table = reinterpret_cast<OutEntry*>(shared_memory() + kTileBytes + kScanBytes) + warp * kOutEntries * 32;
#else
  OutEntry out_table[kOutEntries];
#endif
#pragma unroll
  for (int k = 0; k < kStateSteps; ++k) {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      const Complex<Real>* z = coefficients + (8 * k + c) * kSlots;
      Complex<Real> low = out_entry(z, 8 * j + g), high = out_entry(z + 4 * kSlots, 8 * j + g);
      OutEntry e;
      split<TERMS>(static_cast<float>(low.re), -static_cast<float>(low.im), e.b0);
      split<TERMS>(static_cast<float>(high.re), -static_cast<float>(high.im), e.b1);
#if OUT_SHARED
      out_table[(k * kOutTiles + j) * 32 + lane] = e;
#else
      out_table[k * kOutTiles + j] = e;
#endif
    }
  }
  // A Toeplitz matrix has few different 8 x 8 pieces: one for each distance of 8 steps.
  unsigned toeplitz[kOutTiles][TERMS];
#pragma unroll
  for (int distance = 0; distance < kOutTiles; ++distance) {
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int lag = 8 * distance + (REVERSE ? 2 * c + e - g : g - 2 * c - e);
      v[e] = lag >= 0 ? static_cast<float>(p.lags[static_cast<long long>(real ? channel : p.dim - 1) * BLOCK + lag]) : 0.0f;
    }
    split<TERMS>(v[0], v[1], toeplitz[distance]);
  }
  for (int n = lane; n < ORDERS; n += 32) {
    const Complex<Real>* z = coefficients + n * kSlots;
    ScanPowers s;
    s.a1 = convert<float>(z[kA]);
    s.a2 = convert<float>(z[kA2]);
    s.a4 = convert<float>(z[kA4]);
    s.a8 = convert<float>(z[kA8]);
    s.a16 = z[kA16];
    s.lanes[0] = convert<float>(z[kPower]);
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      Complex<Real> w = z[kPower];
      if (i & 1) w = w * z[kA2];
      if (i & 2) w = w * z[kA4];
      if (i & 4) w = w * z[kA8];
      s.lanes[i] = convert<float>(w);
    }
    scan[n] = s;
  }
  sync_warp();

  const int all_tiles = static_cast<int>((p.length + kTile - 1) / kTile);
  const int segment = blockIdx.z;                                                 // in walking order
  const int first_tile = segment * p.segment_tiles;                               // also in walking order
  const int tiles = min(p.segment_tiles, all_tiles - first_tile);
  const int first_row = blockIdx.y * p.rows, rows = min(p.rows, p.batch - first_row);
  const long long states_of_row = static_cast<long long>(p.dim) * p.order;
  unsigned* words = tile + warp * kChannelWords;
  const int block0 = REVERSE ? 15 - 2 * g : 2 * g, block1 = REVERSE ? 14 - 2 * g : 2 * g + 1;

  Move moves[kMoves];
  Complex<Real> carry[kStateTiles];
  const long long bytes = kFloat32 ? 4 : 2;
  // Where a tile of the walk lies in time.
  auto place = [&](int walked) { return REVERSE ? all_tiles - 1 - (first_tile + walked) : first_tile + walked; };
  fetch(moves, p.x + (first_row * p.x_row + first_channel) * bytes, static_cast<long long>(place(0)) * kTile, p.length,
        p.dim, channels);

  for (int row = first_row; row < first_row + rows; ++row) {
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      int n = 4 * j + c;
      bool there = real && n < p.order;
      long long at = row * states_of_row + static_cast<long long>(channel) * p.order + n;
      Complex<float> h = {0, 0};
      if (there && p.summaries && segment > 0 && p.y) {
        // The first segment's summary is its whole outgoing state. Every segment on the way here but that one has the
        // same length, in either direction.
        const long long stride = static_cast<long long>(p.batch) * states_of_row;
        Complex<Real> total = convert<Real>(p.summaries[at]);
        for (int s = 1; s < segment; ++s)
          total = multiply_add(coefficients[n * kSlots + kSegment], total, convert<Real>(p.summaries[s * stride + at]));
        h = convert<float>(total);
      } else if (there && p.state_in && segment == 0) {
        h = p.state_in[at];
        if (REVERSE) h.im = -h.im;
      }
      carry[j] = convert<Real>(h);
    }
    for (int walked = 0; walked < tiles; ++walked) {
      const int here = place(walked);
      const long long start = static_cast<long long>(here) * kTile;
      const int blocks = static_cast<int>(min(static_cast<long long>(kBlocks), (p.length - start) / BLOCK));
      to_shared(moves, tile);
      {
        bool more = walked + 1 < tiles;
        int next_row = more ? row : row + 1;
        if (next_row < first_row + rows)
          fetch(moves, p.x + (next_row * p.x_row + first_channel) * bytes,
                static_cast<long long>(place(more ? walked + 1 : 0)) * kTile, p.length, p.dim, channels);
      }
      sync_block();

      if (p.boundaries && (REVERSE ? (here % kTilesPerGroup == kTilesPerGroup - 1 || here == all_tiles - 1)
                                   : here % kTilesPerGroup == 0)) {
#pragma unroll
        for (int j = 0; j < kStateTiles; ++j) {
          int n = 4 * j + c;
          if (g == 0 && real && n < p.order)
            p.boundaries[(static_cast<long long>(here / kTilesPerGroup) * p.batch + row) * states_of_row +
                         static_cast<long long>(channel) * p.order + n] = convert<float>(carry[j]);
        }
      }

      unsigned x[kTimeSteps][kPlanes][4];
#pragma unroll
      for (int k = 0; k < kTimeSteps; ++k) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const unsigned* w0 = words + plane * kPlaneWords + word_of_block(block0) + 8 * k + c;
          const unsigned* w1 = words + plane * kPlaneWords + word_of_block(block1) + 8 * k + c;
          x[k][plane][0] = w0[0];
          x[k][plane][1] = w1[0];
          x[k][plane][2] = w0[4];
          x[k][plane][3] = w1[4];
        }
      }

      float u[kStateTiles][4];
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        u[j][0] = u[j][1] = u[j][2] = u[j][3] = 0;
#pragma unroll
        for (int k = 0; k < kTimeSteps; ++k) mma_terms<kPlanes, TERMS>(u[j], x[k], in_low[k][j], in_high[k][j]);
      }

      float y[kOutTiles][4];
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
        y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0;
        const unsigned none[TERMS] = {};
#pragma unroll
        for (int k = 0; k < kTimeSteps; ++k) {
          int low = REVERSE ? 2 * k - j : j - 2 * k, high = REVERSE ? low + 1 : low - 1;
          if (low >= 0 && high >= 0)
            mma_terms<kPlanes, TERMS>(y[j], x[k], toeplitz[low], toeplitz[high]);
          else if (low >= 0)
            mma_terms<kPlanes, TERMS>(y[j], x[k], toeplitz[low], none);
          else if (high >= 0)
            mma_terms<kPlanes, TERMS>(y[j], x[k], none, toeplitz[high]);
        }
      }

      // The scan. Blocks that the sequence does not have stand at the end of the tile: in the walk of REVERSE they come
      // first, and the last of them hands on what was carried.
      const int missing = kBlocks - blocks;
      if (REVERSE && missing > 0) {
#pragma unroll
        for (int j = 0; j < kStateTiles; ++j) {
          if (g == (missing - 1) / 2) {
            int i = 2 * ((missing - 1) % 2);
            (i ? u[j][2] : u[j][0]) = static_cast<float>(carry[j].re);
            (i ? u[j][3] : u[j][1]) = static_cast<float>(carry[j].im);
          }
          carry[j] = {0, 0};
        }
      }
      unsigned states[kStateSteps][TERMS][4];
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        const ScanPowers& s = scan[4 * j + c];
        const Complex<float> a1 = s.a1, first = {u[j][0], u[j][1]}, second = {u[j][2], u[j][3]};
        Complex<float> sum = multiply_add(a1, first, second);
        const Complex<float> steps[3] = {s.a2, s.a4, s.a8};
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          Complex<float> before = {shuffle_up(sum.re, 4 << i), shuffle_up(sum.im, 4 << i)};
          Complex<float> joined = multiply_add(steps[i], before, sum);
          if (g >= 1 << i) sum = joined;
        }
        Complex<float> before = {shuffle_up(sum.re, 4), shuffle_up(sum.im, 4)};
        if (g == 0) before = {0, 0};
        const Complex<float> total = {shuffle(sum.re, 28 + c), shuffle(sum.im, 28 + c)};
        const Complex<float> carried = convert<float>(carry[j]);
        const Complex<float> h0 = multiply_add(s.lanes[g], carried, before);
        const Complex<float> h1 = multiply_add(a1, h0, first);
        if (!REVERSE && blocks < kBlocks) {
          int from = 4 * (blocks / 2) + c;
          carry[j] = convert<Real>(blocks % 2 ? Complex<float>{shuffle(h1.re, from), shuffle(h1.im, from)}
                                              : Complex<float>{shuffle(h0.re, from), shuffle(h0.im, from)});
        } else {
          carry[j] = multiply_add(s.a16, carry[j], convert<Real>(total));
        }
        unsigned even[TERMS], odd[TERMS];
        split<TERMS>(h0.re, h0.im, even);
        split<TERMS>(h1.re, h1.im, odd);
#pragma unroll
        for (int t = 0; t < TERMS; ++t) {
          states[j / 2][t][j % 2 * 2] = even[t];
          states[j / 2][t][j % 2 * 2 + 1] = odd[t];
        }
      }
      if (p.y) {
#pragma unroll
        for (int k = 0; k < kStateSteps; ++k) {
#pragma unroll
          for (int j = 0; j < kOutTiles; ++j) {
#if OUT_SHARED
            const OutEntry e = out_table[(k * kOutTiles + j) * 32 + lane];
#else
            const OutEntry& e = out_table[k * kOutTiles + j];
#endif
            mma_terms<TERMS, TERMS>(y[j], states[k], e.b0, e.b1);
          }
        }
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j) {
          unsigned* w0 = words + word_of_block(block0) + 4 * j + c;
          unsigned* w1 = words + word_of_block(block1) + 4 * j + c;
          if (kFloat32) {
            w0[0] = __float_as_uint(y[j][0]);
            w0[kPlaneWords] = __float_as_uint(y[j][1]);
            w1[0] = __float_as_uint(y[j][2]);
            w1[kPlaneWords] = __float_as_uint(y[j][3]);
          } else {
            w0[0] = pack_bf16(y[j][0], y[j][1]);
            w1[0] = pack_bf16(y[j][2], y[j][3]);
          }
        }
      }
      sync_block();
      if (p.y) store(tile, p.y + (row * p.y_row + first_channel) * bytes, start, p.length, p.dim, channels);
    }
    const bool last = segment == p.segments - 1;
    Complex<float>* to = p.y ? (last ? p.state_out : nullptr) : p.summaries;
    if (to && g == 0 && real) {
      const long long at = (p.y ? 0 : segment * static_cast<long long>(p.batch) * states_of_row) + row * states_of_row +
                           static_cast<long long>(channel) * p.order;
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        Complex<float> h = convert<float>(carry[j]);
        if (REVERSE && p.y) h.im = -h.im;
        if (4 * j + c < p.order) to[at + 4 * j + c] = h;
      }
    }
  }
}
