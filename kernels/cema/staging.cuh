// Activations between device memory, (time, channel), and a tile in shared memory, channel by channel.
//
// A tile is some blocks of T steps. Two neighbouring steps of one channel share a word, as the tensor cores take
// them. A thread moves `kMoves` times 2 steps x 8 channels: two rows of 16 bytes (32 for float32) that are re-paired
// in registers. A float32 activation fills three planes with its bfloat16 terms; as an output it is put into the
// first two, the even step's bits and the odd step's.
//
// Where a tile's words lie is its kernel's choice, a type `Tile` with
//   kBlocks                blocks of the tile
//   kPlaneWords            words of a plane of one channel, with their padding
//   kChannelWords          words of a channel
//   word_of_block(block)   the block's first word in its plane
// so word i of a block is    channel * kChannelWords + plane * kPlaneWords + word_of_block(block) + i.
#pragma once
#include "cema/common.cuh"

// What follows from a tile's layout.
template <class Tile>
struct Staging {
  static constexpr int kSteps = Tile::kBlocks * kBlock;
  static constexpr int kPairs = kSteps / 2;  // words of one channel without padding
  static constexpr int kMovesInAll = kPairs * (kChannels / 8);
  static constexpr int kMoves = kMovesInAll / kThreads > 0 ? kMovesInAll / kThreads : 1;
  static constexpr bool kEveryThreadMoves = kMovesInAll >= kThreads;
};
constexpr int kRowWords = kFloat32 ? 8 : 4;  // of 8 channels at one step

struct Move {
  unsigned early[kRowWords], late[kRowWords];  // 8 channels at step 2 i and at step 2 i + 1
};

// Neighbouring lanes take neighbouring 16 bytes of a row, so that the memory pipe serves them at once.
__device__ __forceinline__ int octet_of(int thread) { return thread % (kChannels / 8); }
__device__ __forceinline__ int pair_of(int thread, int move) { return (thread + move * kThreads) / (kChannels / 8); }

template <typename T>
__device__ __forceinline__ void read_row(unsigned (&row)[kRowWords], const T* from, int channels) {
  if (kAligned) {
#pragma unroll
    for (int i = 0; i < kRowWords / 4; ++i) {
      uint4 v = load_once(reinterpret_cast<const uint4*>(from) + i);
      row[4 * i] = v.x, row[4 * i + 1] = v.y, row[4 * i + 2] = v.z, row[4 * i + 3] = v.w;
    }
  } else if (kFloat32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i % kRowWords] = i < channels ? reinterpret_cast<const unsigned*>(from)[i] : 0;
  } else {
    const unsigned short* f = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned low = 2 * i < channels ? f[2 * i] : 0, high = 2 * i + 1 < channels ? f[2 * i + 1] : 0;
      row[i] = low | high << 16;
    }
  }
}

template <typename T>
__device__ __forceinline__ void write_row(const unsigned (&row)[kRowWords], T* to, int channels) {
  if (kAligned) {
#pragma unroll
    for (int i = 0; i < kRowWords / 4; ++i)
      store_once(reinterpret_cast<uint4*>(to) + i,
                 make_uint4(row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]));
  } else if (kFloat32) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < channels) reinterpret_cast<unsigned*>(to)[i] = row[i % kRowWords];
  } else {
    unsigned short* t = reinterpret_cast<unsigned short*>(to);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * i < channels) t[2 * i] = static_cast<unsigned short>(row[i] & 0xffffu);
      if (2 * i + 1 < channels) t[2 * i + 1] = static_cast<unsigned short>(row[i] >> 16);
    }
  }
}

// `tile` points at the tile's first step and at the first channel of the block. The tile has `steps` steps and the
// block `channels` channels; what is missing is zero.
template <class Tile>
__device__ __forceinline__ void fetch(Move (&moves)[Staging<Tile>::kMoves], const char* tile, int steps, int dim,
                                      int channels) {
  const int first = 8 * octet_of(threadIdx.x), count = channels - first;
  const unsigned step_bytes = dim * (kFloat32 ? 4u : 2u);
#pragma unroll
  for (int i = 0; i < Staging<Tile>::kMoves; ++i) {
    const int pair = pair_of(threadIdx.x, i);
    if ((Staging<Tile>::kEveryThreadMoves || pair < Staging<Tile>::kPairs) && 2 * pair < steps && count > 0) {
      const char* at = tile + (2u * pair * step_bytes + first * (kFloat32 ? 4 : 2));
      read_row(moves[i].early, at, count);
      read_row(moves[i].late, at + step_bytes, count);
    } else {
#pragma unroll
      for (int w = 0; w < kRowWords; ++w) moves[i].early[w] = moves[i].late[w] = 0;
    }
  }
}

template <class Tile>
__device__ __forceinline__ void to_shared(const Move (&moves)[Staging<Tile>::kMoves], unsigned* tile) {
  int first = 8 * octet_of(threadIdx.x);
#pragma unroll
  for (int i = 0; i < Staging<Tile>::kMoves; ++i) {
    int pair = pair_of(threadIdx.x, i);
    if (!Staging<Tile>::kEveryThreadMoves && pair >= Staging<Tile>::kPairs) continue;
    unsigned* word =
        tile + first * Tile::kChannelWords + Tile::word_of_block(pair / (kBlock / 2)) + pair % (kBlock / 2);
    if (kFloat32) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        unsigned terms[3];
        split<3>(__uint_as_float(moves[i].early[c % kRowWords]), __uint_as_float(moves[i].late[c % kRowWords]), terms);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
          word[c * Tile::kChannelWords + plane * Tile::kPlaneWords] = terms[plane];
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        word[2 * c * Tile::kChannelWords] = __byte_perm(moves[i].early[c], moves[i].late[c], 0x5410);
        word[(2 * c + 1) * Tile::kChannelWords] = __byte_perm(moves[i].early[c], moves[i].late[c], 0x7632);
      }
    }
  }
}

// The counterpart of fetch and to_shared: every thread reads the words that it wrote, so no barrier is needed
// between storing a tile and bringing in the next one.
template <class Tile>
__device__ __forceinline__ void store(const unsigned* words, char* tile, int steps, int dim, int channels) {
  const int first = 8 * octet_of(threadIdx.x), count = channels - first;
  const unsigned step_bytes = dim * (kFloat32 ? 4u : 2u);
#pragma unroll
  for (int i = 0; i < Staging<Tile>::kMoves; ++i) {
    const int pair = pair_of(threadIdx.x, i);
    const bool moves = Staging<Tile>::kEveryThreadMoves || pair < Staging<Tile>::kPairs;
    if (!moves || 2 * pair >= steps || count <= 0) continue;
    const unsigned* word =
        words + first * Tile::kChannelWords + Tile::word_of_block(pair / (kBlock / 2)) + pair % (kBlock / 2);
    Move m;
    if (kFloat32) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        m.early[c % kRowWords] = word[c * Tile::kChannelWords];
        m.late[c % kRowWords] = word[c * Tile::kChannelWords + Tile::kPlaneWords];
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        unsigned even = word[2 * c * Tile::kChannelWords], odd = word[(2 * c + 1) * Tile::kChannelWords];
        m.early[c] = __byte_perm(even, odd, 0x5410);
        m.late[c] = __byte_perm(even, odd, 0x7632);
      }
    }
    char* at = tile + (2u * pair * step_bytes + first * (kFloat32 ? 4 : 2));
    write_row(m.early, at, count);
    write_row(m.late, at + step_bytes, count);
  }
}
