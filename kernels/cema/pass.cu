// One pass of CEMA over time: the forward pass, or, with REVERSE, its transpose, which gives dx from dy.
//
// With the tables of kernels/README.md, for each channel and block of T steps:
//   forward   y = Toeplitz(k) x + Re(C h),     h <- A h + S x        in = S_t = p q^(T-1-t),  out = C_t = g q^(t+1)
//   REVERSE   dx = Toeplitz(k)^T dy + Re(S l), l <- A l + C dy       in = C_t,                out = S_t
// where l is the conjugate of the state's gradient and the blocks are walked from the last one to the first.
//
// A thread block owns CHANNELS channels, one warp each, and walks their tiles of 16 blocks in order of time for some
// batch rows and one segment. All threads move tiles between device and shared memory (cema/staging.cuh); each warp works
// on its own channel of a tile alone, in place. Two tiles' buffers alternate: between two barriers the block brings in
// tile i + 1, carries off tile i - 1 and works on tile i. Half of the warps do the moving first and half the work, so that
// both go on at once; neighbouring warps run on different schedulers, so it is by warp / 4. The loads of tile i + 2 are
// then under way in registers.
//
// In a warp, the rows of the matrix products are the 16 blocks: rows g and g + 8 (g = lane / 4) hold blocks 2g and
// 2g + 1 in walking order. A lane holds the states of orders 4 j + lane % 4 of its two blocks, real and imaginary part
// side by side in an accumulator, so the scan over blocks is arithmetic on registers with three shuffles up, and the
// states' bfloat16 terms are at once the left operand of the product with the out table.
//
// With SUMMARY it walks without an output: each segment leaves the state that it makes of a zero one (its conjugate in
// REVERSE, as everywhere inside).
//
// Precision: tables and states are split into TERMS bfloat16 terms, sums are float32. For bfloat16 activations the carried
// state joins the first block's and goes through the scan. For float32 ones it is a float64 number beside the scan and
// decays by A^16, made in float64, so that a slow decay does not gather the rounding of every tile.
constexpr int kBlocks = 16;
constexpr int kBlockWords = BLOCK / 2 + 2;  // 2 kBlockWords is 4 modulo 32 or 20: even blocks lie in different banks
constexpr int kPlaneWords = kBlocks * kBlockWords;
constexpr int kWarpsOfChannel = 1;
#include "cema/common.cuh"
constexpr int kChannelWords = kPlanes * kPlaneWords + 2;
__device__ __forceinline__ int word_of_block(int block) { return block * kBlockWords; }
#include "cema/scan.cuh"
#include "cema/staging.cuh"

struct Params {
  const char* x;
  char* y;                            // not with SUMMARY
  const Complex<Real>* coefficients;  // (D, kSlots, ORDERS)
  const Real* lags;                   // (D, T)
  const Complex<float>* state_in;     // (B, D, N), null is zero
  Complex<float>* state_out;          // (B, D, N), null if not wanted
  Complex<float>* boundaries;         // (groups - 1, B, D, N): the states between groups of tiles; null if not wanted
  Complex<float>* summaries;          // (segments, B, D, N): what each segment leaves of a zero state
  long long x_row, y_row;             // elements from one batch row to the next
  int length;                         // steps, a multiple of T
  int batch, dim, order;
  int rows;                           // batch rows of a thread block
  int segments;                       // parts of the time axis that are walked at once
  int segment_tiles;
};

constexpr bool kWrites = !SUMMARY;
constexpr int kStateTiles = ORDERS / 4;   // accumulators of the states, 8 columns each: 4 orders
constexpr int kStateSteps = ORDERS / 8;   // steps of 16 in the product with the out table
constexpr int kOutTiles = BLOCK / 8;
constexpr int kTimeSteps = BLOCK / 16;
constexpr int kOutEntries = kOutTiles * kStateSteps;
constexpr int kTilesPerGroup = 2;         // tiles between two states that are kept for the backward pass

struct alignas(TERMS == 2 ? 16 : 8) OutEntry {
  unsigned b0[TERMS], b1[TERMS];
};

// Shared memory: two tiles, the scan's powers, and the out table if registers are short of room.
constexpr int kTileWords = (CHANNELS * kChannelWords + 3) / 4 * 4;
constexpr int kScanBytes = CHANNELS * ORDERS * sizeof(ScanPowers);

// A tile of the walk: batch row and number in the row, in walking order.
struct Cursor {
  int row, walked;
  __device__ __forceinline__ void advance(int tiles) {
    if (++walked == tiles) {
      walked = 0;
      ++row;
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) cema_pass(const __grid_constant__ Params p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int first_channel = blockIdx.x * CHANNELS, channels = min(CHANNELS, p.dim - first_channel);
  const int channel = first_channel + warp, known = min(channel, p.dim - 1);
  const bool real = channel < p.dim;  // the other warps work on zeros
  unsigned* buffers = reinterpret_cast<unsigned*>(shared_memory());
  unsigned char* after_buffers = shared_memory() + 2 * 4 * kTileWords;
  ScanPowers* scan = reinterpret_cast<ScanPowers*>(after_buffers) + warp * ORDERS;

  // The tables, as right operands: rows are steps (in) or states (out, where Re and -Im of an order are neighbours).
  unsigned in_low[kTimeSteps][kStateTiles][TERMS], in_high[kTimeSteps][kStateTiles][TERMS];
#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) {
    const Coefficients z(p.coefficients, known, 4 * j + g / 2);
#pragma unroll
    for (int k = 0; k < kTimeSteps; ++k) {
      const int first = 16 * k + 2 * c, steps[4] = {first, first + 1, first + 8, first + 9};
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Complex<Real> e = REVERSE ? z.output(steps[i]) : z.input(steps[i]);
        v[i] = static_cast<float>(g % 2 ? e.im : e.re);
      }
      split<TERMS>(v[0], v[1], in_low[k][j]);
      split<TERMS>(v[2], v[3], in_high[k][j]);
    }
  }
#if OUT_SHARED
  OutEntry* out_table = reinterpret_cast<OutEntry*>(after_buffers + kScanBytes) + warp * kOutEntries * 32;
#else
  OutEntry out_table[kOutEntries];
#endif
#pragma unroll
  for (int k = 0; k < kStateSteps && kWrites; ++k) {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      const Coefficients z0(p.coefficients, known, 8 * k + c), z1(p.coefficients, known, 8 * k + 4 + c);
      const int step = 8 * j + g;
      const Complex<Real> low = REVERSE ? z0.input(step) : z0.output(step);
      const Complex<Real> high = REVERSE ? z1.input(step) : z1.output(step);
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
  // A Toeplitz matrix has few different 8 x 8 pieces: one for each distance of 8 steps, and the zero beside them.
  unsigned toeplitz[kOutTiles + 1][TERMS] = {};
#pragma unroll
  for (int distance = 0; distance < kOutTiles && kWrites; ++distance) {
    float v[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int lag = 8 * distance + (REVERSE ? 2 * c + e - g : g - 2 * c - e);
      v[e] = lag >= 0 ? static_cast<float>(p.lags[static_cast<long long>(known) * BLOCK + lag]) : 0.0f;
    }
    split<TERMS>(v[0], v[1], toeplitz[distance]);
  }
  for (int n = lane; n < ORDERS; n += 32) scan[n] = scan_powers(Coefficients(p.coefficients, known, n));
  sync_warp();

  const int all_tiles = (p.length + kTile - 1) / kTile;
  const int segment = blockIdx.z;                    // in walking order
  const int first_tile = segment * p.segment_tiles;  // also in walking order
  const int tiles = min(p.segment_tiles, all_tiles - first_tile);
  const int first_row = blockIdx.y * p.rows, rows = min(p.rows, p.batch - first_row), total = rows * tiles;
  const long long states_of_row = static_cast<long long>(p.dim) * p.order;
  const long long state_at = static_cast<long long>(known) * p.order + c;  // in a row: of order c, then 4 + c ...
  const int block0 = REVERSE ? 15 - 2 * g : 2 * g, block1 = REVERSE ? 14 - 2 * g : 2 * g + 1;
  const long long bytes = kFloat32 ? 4 : 2;
  // Where a tile of the walk lies in time.
  auto place = [&](int walked) { return REVERSE ? all_tiles - 1 - (first_tile + walked) : first_tile + walked; };
  auto steps_of = [&](int walked) { return min(kTile, p.length - place(walked) * kTile); };
  Move moves[kMoves];
  auto fetch_tile = [&](const Cursor& at) {
    const char* from =
        p.x + (at.row * p.x_row + static_cast<long long>(place(at.walked)) * kTile * p.dim + first_channel) * bytes;
    fetch(moves, from, steps_of(at.walked), p.dim, channels);
  };
  auto store_tile = [&](const Cursor& at, const unsigned* words) {
    char* to = p.y + (at.row * p.y_row + static_cast<long long>(place(at.walked)) * kTile * p.dim + first_channel) * bytes;
    store(words, to, steps_of(at.walked), p.dim, channels);
  };

  // The states: every lane holds orders c, 4 + c ... For bfloat16 activations only lanes with g = 0 hold the carried one.
  const bool holds = kFloat32 || g == 0;
  Complex<Real> carry[kStateTiles];
  auto start_row = [&](int row) {
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      const bool there = holds && real && 4 * j + c < p.order;
      const long long at = row * states_of_row + state_at + 4 * j;
      Complex<float> h = {0, 0};
      if (there && p.summaries && segment > 0 && kWrites) {
        // The first segment's summary is its whole outgoing state. Every segment from there to here has the same length,
        // in either direction.
        const long long stride = p.batch * states_of_row;
        Complex<Real> sum = convert<Real>(p.summaries[at]);
        const Complex<Real> decay = Coefficients(p.coefficients, known, 4 * j + c)[kSegment];
#pragma unroll 1
        for (int s = 1; s < segment; ++s) sum = multiply_add(decay, sum, convert<Real>(p.summaries[s * stride + at]));
        h = convert<float>(sum);
      } else if (there && p.state_in && segment == 0) {
        h = p.state_in[at];
        if (REVERSE) h.im = -h.im;
      }
      carry[j] = convert<Real>(h);
    }
  };
  auto finish_row = [&](int row) {
    Complex<float>* to = kWrites ? (segment == p.segments - 1 ? p.state_out : nullptr) : p.summaries;
    if (!to || g != 0 || !real) return;
    to += ((kWrites ? 0 : segment * static_cast<long long>(p.batch)) + row) * states_of_row + state_at;
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      Complex<float> h = convert<float>(carry[j]);
      if (REVERSE && kWrites) h.im = -h.im;
      if (4 * j + c < p.order) to[4 * j] = h;
    }
  };
  auto keep_states = [&](int row, int edge) {
    if (g != 0 || !real) return;
    Complex<float>* to = p.boundaries + (static_cast<long long>(edge) * p.batch + row) * states_of_row + state_at;
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j)
      if (4 * j + c < p.order) to[4 * j] = convert<float>(carry[j]);
  };

  Cursor coming = {first_row, 0}, current = coming, leaving = coming;
  fetch_tile(coming);
  to_shared(moves, buffers);
  coming.advance(tiles);
  if (total > 1) fetch_tile(coming);
  for (int i = 0; i <= total; ++i) {
    sync_block();  // tile i is in shared memory, and so are the results of tile i - 1
    unsigned* buffer = buffers + i % 2 * kTileWords;
    unsigned* other = buffers + (i + 1) % 2 * kTileWords;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if (phase == warp / 4 % 2) {
        // A thread writes the words that it has just read, so the buffer passes from one tile to the next without a
        // barrier.
        if (i > 0) {
          if (kWrites) store_tile(leaving, other);
          leaving.advance(tiles);
        }
        if (i + 1 < total) {
          to_shared(moves, other);
          coming.advance(tiles);
          if (i + 2 < total) fetch_tile(coming);
        }
        continue;
      }
      if (i == total) continue;
      const int here = place(current.walked), blocks = steps_of(current.walked) / BLOCK;
      unsigned* words = buffer + warp * kChannelWords;
      if (current.walked == 0) start_row(current.row);
      const int later = REVERSE ? here + 1 : here;  // the first tile after the edge that the walk stands at
      if (kWrites && p.boundaries && later % kTilesPerGroup == 0 && later > 0 && later < all_tiles)
        keep_states(current.row, later / kTilesPerGroup - 1);

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
        mma_terms<true>(u[j], x[0], in_low[0][j], in_high[0][j]);
#pragma unroll
        for (int k = 1; k < kTimeSteps; ++k) mma_terms<false>(u[j], x[k], in_low[k][j], in_high[k][j]);
      }

      float y[kOutTiles][4];
#pragma unroll
      for (int j = 0; j < kOutTiles && kWrites; ++j) {
        bool fresh = true;
#pragma unroll
        for (int k = 0; k < kTimeSteps; ++k) {
          const int low = REVERSE ? 2 * k - j : j - 2 * k, high = REVERSE ? low + 1 : low - 1;
          if (low < 0 && high < 0) continue;
          const unsigned(&b0)[TERMS] = toeplitz[low >= 0 ? low : kOutTiles];
          const unsigned(&b1)[TERMS] = toeplitz[high >= 0 ? high : kOutTiles];
          if (fresh)
            mma_terms<true>(y[j], x[k], b0, b1);
          else
            mma_terms<false>(y[j], x[k], b0, b1);
          fresh = false;
        }
      }

      // Blocks that the sequence does not have stand at the end of the tile: in the walk of REVERSE they come first, and
      // the last of them hands on what was carried.
      const int missing = kBlocks - blocks;
      if (REVERSE && missing > 0) {
#pragma unroll
        for (int j = 0; j < kStateTiles; ++j) {
          const Complex<float> carried = {shuffle(static_cast<float>(carry[j].re), c),
                                          shuffle(static_cast<float>(carry[j].im), c)};
          if (g == (missing - 1) / 2) {
            const bool odd = (missing - 1) % 2;
            (odd ? u[j][2] : u[j][0]) = carried.re;
            (odd ? u[j][3] : u[j][1]) = carried.im;
          }
          carry[j] = {0, 0};
        }
      }
      unsigned states[kStateSteps][TERMS][4];
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        const ScanPowers& s = scan[4 * j + c];
        const Complex<float> a1 = s.a1, second = {u[j][2], u[j][3]};
        Complex<float> first = {u[j][0], u[j][1]}, steps[3], h0, h1;
#if TERMS == 3
        steps[0] = s.a2, steps[1] = s.a4, steps[2] = s.a8;
#else
        first = multiply_add(a1, carry[j], first);
        steps[0] = a1 * a1, steps[1] = steps[0] * steps[0], steps[2] = steps[1] * steps[1];
#endif
        Complex<float> sum = multiply_add(a1, first, second);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const Complex<float> before = {shuffle_up(sum.re, 4 << k), shuffle_up(sum.im, 4 << k)};
          const Complex<float> joined = multiply_add(steps[k], before, sum);
          if (g >= 1 << k) sum = joined;
        }
        // From the lanes one g before; g = 0 gets what the whole tile leaves.
        const Complex<float> turned = {shuffle(sum.re, (lane + 28) % 32), shuffle(sum.im, (lane + 28) % 32)};
        const Complex<float> before = g == 0 ? Complex<float>{0, 0} : turned;
        h1 = multiply_add(a1, before, first);
#if TERMS == 3
        const Complex<float> left = multiply_add(s.lanes[g], convert<float>(carry[j]), Complex<float>{0, 0});
        h0 = {before.re + left.re, before.im + left.im};
        h1 = multiply_add(a1, left, h1);
        const Complex<float> whole = {shuffle(turned.re, c), shuffle(turned.im, c)};
        carry[j] = multiply_add(s.a16, carry[j], convert<Real>(whole));
#else
        h0 = {before.re + carry[j].re, before.im + carry[j].im};
        carry[j] = g == 0 ? turned : Complex<float>{0, 0};
#endif
        if (!REVERSE && missing > 0) {
          const int from = 4 * (blocks / 2) + c;
          const Complex<float> even = {shuffle(h0.re, from), shuffle(h0.im, from)};
          const Complex<float> odd = {shuffle(h1.re, from), shuffle(h1.im, from)};
          if (holds) carry[j] = convert<Real>(blocks % 2 ? odd : even);
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
      if (kWrites) {
#pragma unroll
        for (int k = 0; k < kStateSteps; ++k) {
#pragma unroll
          for (int j = 0; j < kOutTiles; ++j) {
#if OUT_SHARED
            const OutEntry e = out_table[(k * kOutTiles + j) * 32 + lane];
#else
            const OutEntry& e = out_table[k * kOutTiles + j];
#endif
            mma_terms<false>(y[j], states[k], e.b0, e.b1);
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
      if (current.walked == tiles - 1) finish_row(current.row);
      current.advance(tiles);
    }
  }
}
