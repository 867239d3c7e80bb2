// The pieces of cema/pass.cu: the tables in registers, and what one warp does with its channel of a tile, step by step.
//
// Macros beside those of common.cuh:
//   REVERSE     1 for the transpose, which walks from the end
//   SUMMARY     1 to leave states alone, without an output
//   OUT_SHARED  1 if the table of outputs lies in shared memory, 0 if in registers
#pragma once
#include "cema/scan.cuh"
#include "cema/staging.cuh"

constexpr bool kReverse = REVERSE, kWrites = !SUMMARY, kOutShared = OUT_SHARED;

struct PassTile {
  static constexpr int kBlocks = 16;
  // Twice that is 4 modulo 32, or 20: even blocks lie in different banks.
  static constexpr int kBlockWords = kBlock / 2 + 2;
  static constexpr int kPlaneWords = kBlocks * kBlockWords;
  static constexpr int kChannelWords = kPlanes * kPlaneWords + 2;
  static __device__ __forceinline__ int word_of_block(int block) { return block * kBlockWords; }
};
constexpr int kTileSteps = Staging<PassTile>::kSteps;
constexpr int kTileWords = (kChannels * PassTile::kChannelWords + 3) / 4 * 4;

constexpr int kStateTiles = kOrders / 4;  // accumulators of the states, 8 columns each: 4 orders
constexpr int kStateSteps = kOrders / 8;  // steps of 16 in the product with the out table
constexpr int kOutTiles = kBlock / 8;
constexpr int kTimeSteps = kBlock / 16;
constexpr int kOutEntries = kOutTiles * kStateSteps;

// The table of inputs as a right operand: rows are steps, columns states, where Re and Im of an order are neighbours.
struct InTable {
  unsigned low[kTimeSteps][kStateTiles][kTerms], high[kTimeSteps][kStateTiles][kTerms];

  __device__ __forceinline__ void load(const Complex<Real>* coefficients, int channel, int g, int c) {
#pragma unroll
    for (int j = 0; j < kStateTiles; ++j) {
      const Coefficients z(coefficients, channel, 4 * j + g / 2);
#pragma unroll
      for (int k = 0; k < kTimeSteps; ++k) {
        const int first = 16 * k + 2 * c, steps[4] = {first, first + 1, first + 8, first + 9};
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Complex<Real> e = kReverse ? z.output(steps[i]) : z.input(steps[i]);
          v[i] = static_cast<float>(g % 2 ? e.im : e.re);
        }
        split<kTerms>(v[0], v[1], low[k][j]);
        split<kTerms>(v[2], v[3], high[k][j]);
      }
    }
  }
};

struct alignas(kTerms == 2 ? 16 : 8) OutEntry {
  unsigned b0[kTerms], b1[kTerms];
};

// The table of outputs as a right operand: rows are states, where Re and -Im of an order are neighbours, columns steps.
template <bool kShared>
struct OutTable {  // in registers
  OutEntry entries[kOutEntries];
  __device__ __forceinline__ OutTable(unsigned char*, int, int) {}
  __device__ __forceinline__ OutEntry& at(int k, int j) { return entries[k * kOutTiles + j]; }
};
template <>
struct OutTable<true> {
  OutEntry* entries;
  int lane;
  __device__ __forceinline__ OutTable(unsigned char* shared, int warp, int lane)
      : entries(reinterpret_cast<OutEntry*>(shared) + warp * kOutEntries * 32), lane(lane) {}
  __device__ __forceinline__ OutEntry& at(int k, int j) { return entries[(k * kOutTiles + j) * 32 + lane]; }
};

template <bool kShared>
__device__ __forceinline__ void load_out_table(OutTable<kShared>& table, const Complex<Real>* coefficients, int channel,
                                               int g, int c) {
#pragma unroll
  for (int k = 0; k < kStateSteps && kWrites; ++k) {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      const Coefficients z0(coefficients, channel, 8 * k + c), z1(coefficients, channel, 8 * k + 4 + c);
      const int step = 8 * j + g;
      const Complex<Real> low = kReverse ? z0.input(step) : z0.output(step);
      const Complex<Real> high = kReverse ? z1.input(step) : z1.output(step);
      OutEntry e;
      split<kTerms>(static_cast<float>(low.re), -static_cast<float>(low.im), e.b0);
      split<kTerms>(static_cast<float>(high.re), -static_cast<float>(high.im), e.b1);
      table.at(k, j) = e;
    }
  }
}

// A Toeplitz matrix has few different 8 x 8 pieces: one for each distance of 8 steps, and the zero beside them.
struct ToeplitzTable {
  unsigned piece[kOutTiles + 1][kTerms];

  __device__ __forceinline__ void load(const Real* lags, int channel, int g, int c) {
#pragma unroll
    for (int distance = 0; distance < kOutTiles && kWrites; ++distance) {
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int lag = 8 * distance + (kReverse ? 2 * c + e - g : g - 2 * c - e);
        v[e] = lag >= 0 ? static_cast<float>(lags[static_cast<long long>(channel) * kBlock + lag]) : 0.0f;
      }
      split<kTerms>(v[0], v[1], piece[distance]);
    }
  }
};

// A tile's blocks as a left operand: rows g and g + 8 are block0 and block1, columns steps.
__device__ __forceinline__ void read_blocks(unsigned (&x)[kTimeSteps][kPlanes][4], const unsigned* words, int block0,
                                            int block1, int c) {
#pragma unroll
  for (int k = 0; k < kTimeSteps; ++k) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const unsigned* w0 = words + plane * PassTile::kPlaneWords + PassTile::word_of_block(block0) + 8 * k + c;
      const unsigned* w1 = words + plane * PassTile::kPlaneWords + PassTile::word_of_block(block1) + 8 * k + c;
      x[k][plane][0] = w0[0];
      x[k][plane][1] = w1[0];
      x[k][plane][2] = w0[4];
      x[k][plane][3] = w1[4];
    }
  }
}

// What each block adds to the states: x times the table of inputs.
__device__ __forceinline__ void state_product(float (&u)[kStateTiles][4], const unsigned (&x)[kTimeSteps][kPlanes][4],
                                              const InTable& in) {
#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) {
    mma_terms<true>(u[j], x[0], in.low[0][j], in.high[0][j]);
#pragma unroll
    for (int k = 1; k < kTimeSteps; ++k) mma_terms<false>(u[j], x[k], in.low[k][j], in.high[k][j]);
  }
}

// What happens inside a block: Toeplitz(k) x, with REVERSE its transpose.
__device__ __forceinline__ void toeplitz_product(float (&y)[kOutTiles][4], const unsigned (&x)[kTimeSteps][kPlanes][4],
                                                 const ToeplitzTable& toeplitz) {
#pragma unroll
  for (int j = 0; j < kOutTiles && kWrites; ++j) {
    bool fresh = true;
#pragma unroll
    for (int k = 0; k < kTimeSteps; ++k) {
      const int low = kReverse ? 2 * k - j : j - 2 * k, high = kReverse ? low + 1 : low - 1;
      if (low < 0 && high < 0) continue;
      const unsigned(&b0)[kTerms] = toeplitz.piece[low >= 0 ? low : kOutTiles];
      const unsigned(&b1)[kTerms] = toeplitz.piece[high >= 0 ? high : kOutTiles];
      if (fresh)
        mma_terms<true>(y[j], x[k], b0, b1);
      else
        mma_terms<false>(y[j], x[k], b0, b1);
      fresh = false;
    }
  }
}

// In the walk of REVERSE the blocks past the end of the sequence come first. The last of them takes the carried state,
// from where the scan passes it on.
__device__ __forceinline__ void hand_on_carry(float (&u)[kStateTiles][4], Complex<Real> (&carry)[kStateTiles],
                                              int missing, int g, int c) {
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

// From what each block adds to the states that blocks start from, as the left operand of the product with the table of
// outputs; `carry` becomes the state after the tile.
__device__ __forceinline__ void scan_blocks(unsigned (&states)[kStateSteps][kTerms][4],
                                            const float (&u)[kStateTiles][4], Complex<Real> (&carry)[kStateTiles],
                                            const ScanPowers* scan, int blocks, bool holds, int lane) {
  const int c = lane % 4;
#pragma unroll
  for (int j = 0; j < kStateTiles; ++j) {
    Complex<float> h0, h1;
    scan_order(scan[4 * j + c], {u[j][0], u[j][1]}, {u[j][2], u[j][3]}, carry[j], h0, h1, lane);
    if (!kReverse && blocks < PassTile::kBlocks) {  // the state after the last block that there is
      const int from = 4 * (blocks / 2) + c;
      const Complex<float> even = {shuffle(h0.re, from), shuffle(h0.im, from)};
      const Complex<float> odd = {shuffle(h1.re, from), shuffle(h1.im, from)};
      if (holds) carry[j] = convert<Real>(blocks % 2 ? odd : even);
    }
    unsigned even[kTerms], odd[kTerms];
    split<kTerms>(h0.re, h0.im, even);
    split<kTerms>(h1.re, h1.im, odd);
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      states[j / 2][t][j % 2 * 2] = even[t];
      states[j / 2][t][j % 2 * 2 + 1] = odd[t];
    }
  }
}

// What the states add to the output: y += states times the table of outputs.
template <bool kShared>
__device__ __forceinline__ void add_states_to_output(float (&y)[kOutTiles][4],
                                                     const unsigned (&states)[kStateSteps][kTerms][4],
                                                     OutTable<kShared>& out) {
#pragma unroll
  for (int k = 0; k < kStateSteps; ++k) {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      const OutEntry e = out.at(k, j);
      mma_terms<false>(y[j], states[k], e.b0, e.b1);
    }
  }
}

// The output takes the place of the input in the tile.
__device__ __forceinline__ void write_blocks(unsigned* words, const float (&y)[kOutTiles][4], int block0, int block1,
                                             int c) {
#pragma unroll
  for (int j = 0; j < kOutTiles; ++j) {
    unsigned* w0 = words + PassTile::word_of_block(block0) + 4 * j + c;
    unsigned* w1 = words + PassTile::word_of_block(block1) + 4 * j + c;
    if (kFloat32) {
      w0[0] = __float_as_uint(y[j][0]);
      w0[PassTile::kPlaneWords] = __float_as_uint(y[j][1]);
      w1[0] = __float_as_uint(y[j][2]);
      w1[PassTile::kPlaneWords] = __float_as_uint(y[j][3]);
    } else {
      w0[0] = pack_bf16(y[j][0], y[j][1]);
      w1[0] = pack_bf16(y[j][2], y[j][3]);
    }
  }
}
