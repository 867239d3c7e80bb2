// What the forward and the backward pass of TimestepNorm share: who owns what, vectors, and sums over time.
//
// A sequence is one group of one batch row: `length` steps of kFeatures numbers. `blocks` blocks walk it in tiles of
// kTileSteps steps; block k takes tiles k, k + blocks, ... In a tile, a warp owns kTeams * kSteps consecutive steps; a
// team of kLanes lanes holds kSteps consecutive ones, each lane the same vectors of kVector features of every step; and
// the lane that is member i of its team keeps the numbers of the team's step i (means, counts), so that lanes are in
// time order and one scan over a warp is a scan over time. The backward pass counts steps from the end and is otherwise
// the same.
//
// Sums over time are float64. They are added in a fixed order: the steps of a warp by a scan, then the warps, then the
// tiles. The order does not depend on how many blocks share the sequence, nor on which of them is first. For each tile
// a block publishes one pair of sums, as soon as it has them, and reads those of the tiles between its last tile and
// this one, so no block waits for a chain of others. Blocks of one sequence do wait for each other's sums, so all of
// them must be resident at once (a cooperative launch).
//
// The macros given to the compiler are bound to constants here; all other code reads the constants.
#pragma once
#include "primitives.cuh"

constexpr int kFeatures = FEATURES;                 // of a group
constexpr int kActivationBytes = ACTIVATION_BYTES;  // 2 (bfloat16) or 4 (float32)
constexpr int kVector = VECTOR;                     // features a load
constexpr int kLanes = LANES;                       // of a team
constexpr int kSteps = STEPS;                       // that a team holds
constexpr int kThreads = THREADS;                   // of a block
constexpr int kMinBlocks = MIN_BLOCKS;              // of them on a multiprocessor
// A tile is held in registers. Otherwise (large groups) it is read again, and a block is one warp.
constexpr bool kKeep = KEEP;
constexpr bool kMasked = MASKED;  // there is a padding mask

constexpr int kWarps = kThreads / 32;
constexpr int kTeams = 32 / kLanes;
constexpr int kWarpSteps = kTeams * kSteps;
constexpr int kTileSteps = kWarps * kWarpSteps;
constexpr int kChunks = (kFeatures / kVector + kLanes - 1) / kLanes;  // vectors a lane has of a step
constexpr bool kEven = kChunks * kLanes * kVector == kFeatures;       // else the last vectors of some lanes are empty
constexpr int kVectorBytes = kVector * kActivationBytes;
constexpr int kWords = kVectorBytes < 4 ? 1 : kVectorBytes / 4;
constexpr int kPadded = kChunks * kLanes * kVector;  // features with those empty vectors
constexpr int kUnrolledChunks = kKeep ? kChunks : 1;
static_assert(kSteps <= kLanes && kFeatures % kVector == 0 && kThreads % 32 == 0);
static_assert(kKeep || (kSteps == 1 && kWarps == 1));

// Blocks a multiprocessor must hold. From compute capability 10 on the compiler works on pairs of registers and needs
// more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kResident = kMinBlocks > 2 ? kMinBlocks - 1 : kMinBlocks;
#else
constexpr int kResident = kMinBlocks;
#endif

struct Vector {
  unsigned words[kWords];
};

__device__ __forceinline__ Vector no_vector() {
  Vector v;
#pragma unroll
  for (int i = 0; i < kWords; i++) v.words[i] = 0;
  return v;
}

__device__ __forceinline__ Vector load_vector(const unsigned char* address) {
  Vector v;
  if constexpr (kVectorBytes == 16) {
    const uint4 u = load_once(address);
    v.words[0] = u.x;
    v.words[1] = u.y;
    v.words[2] = u.z;
    v.words[3] = u.w;
  } else if constexpr (kVectorBytes == 8) {
    const uint2 u = *reinterpret_cast<const uint2*>(address);
    v.words[0] = u.x;
    v.words[1] = u.y;
  } else if constexpr (kVectorBytes == 4) {
    v.words[0] = *reinterpret_cast<const unsigned*>(address);
  } else {
    v.words[0] = *reinterpret_cast<const unsigned short*>(address);
  }
  return v;
}

__device__ __forceinline__ void store_vector(unsigned char* address, const Vector& v) {
  if constexpr (kVectorBytes == 16) {
    uint4 u;
    u.x = v.words[0];
    u.y = v.words[1];
    u.z = v.words[2];
    u.w = v.words[3];
    store_once(address, u);
  } else if constexpr (kVectorBytes == 8) {
    uint2 u;
    u.x = v.words[0];
    u.y = v.words[1];
    *reinterpret_cast<uint2*>(address) = u;
  } else if constexpr (kVectorBytes == 4) {
    *reinterpret_cast<unsigned*>(address) = v.words[0];
  } else {
    *reinterpret_cast<unsigned short*>(address) = static_cast<unsigned short>(v.words[0]);
  }
}

__device__ __forceinline__ void unpack(const Vector& v, float (&f)[kVector]) {
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    if constexpr (kActivationBytes == 4)
      f[e] = __uint_as_float(v.words[e]);
    else
      f[e] = e % 2 ? bf16_high(v.words[e / 2]) : bf16_low(v.words[e / 2]);
  }
}

__device__ __forceinline__ Vector pack(const float (&f)[kVector]) {
  Vector v;
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    if constexpr (kActivationBytes == 4)
      v.words[w] = __float_as_uint(f[w]);
    else
      v.words[w] = pack_bf16(f[2 * w], 2 * w + 1 < kVector ? f[(2 * w + 1) % kVector] : 0.0f);
  }
  return v;
}

// One number of feature `f`, for what is read too seldom to need vectors.
__device__ __forceinline__ float load_one(const unsigned char* row, int f) {
  if constexpr (kActivationBytes == 4)
    return reinterpret_cast<const float*>(row)[f];
  else
    return __uint_as_float(static_cast<unsigned>(reinterpret_cast<const unsigned short*>(row)[f]) << 16);
}

// Which thread this is; computed once.
struct Place {
  int lane, warp, member, team_lane;  // member of its team; lane of the team's member 0
  __device__ __forceinline__ Place() {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    member = lane % kLanes;
    team_lane = lane - member;
  }
  // Step of a tile that the team begins with.
  __device__ __forceinline__ int first_step() const { return warp * kWarpSteps + lane / kLanes * kSteps; }
  __device__ __forceinline__ int feature(int chunk) const { return (chunk * kLanes + member) * kVector; }
  __device__ __forceinline__ bool has(int chunk) const { return kEven || feature(chunk) < kFeatures; }
};

// Where the steps of a team lie, in every tensor like x.
struct Span {
  long long offset;  // of the lane's first vector of the team's first step
  int count;         // steps that exist
  __device__ __forceinline__ bool has(const Place& place, int i, int chunk) const {
    return i < count && place.has(chunk);
  }
  __device__ __forceinline__ long long at(int i, int chunk, long long step_bytes) const {
    return offset + i * step_bytes + chunk * (kLanes * kVectorBytes);
  }
};

// The numbers of a team's steps, of one tensor.
struct Rows {
  Vector kept[kKeep ? kSteps : 1][kKeep ? kChunks : 1];

  static __device__ __forceinline__ Vector read(const unsigned char* tensor, const Span& span, const Place& place,
                                                int i, int chunk, long long step_bytes) {
    return span.has(place, i, chunk) ? load_vector(tensor + span.at(i, chunk, step_bytes)) : no_vector();
  }
  __device__ __forceinline__ void load(const unsigned char* tensor, const Span& span, const Place& place,
                                       long long step_bytes) {
    if constexpr (kKeep) {
#pragma unroll
      for (int i = 0; i < kSteps; i++)
#pragma unroll
        for (int c = 0; c < kChunks; c++) kept[i][c] = read(tensor, span, place, i, c, step_bytes);
    }
  }
  __device__ __forceinline__ Vector get(const unsigned char* tensor, const Span& span, const Place& place, int i,
                                        int chunk, long long step_bytes) const {
    if constexpr (kKeep) return kept[i][chunk];
    return read(tensor, span, place, i, chunk, step_bytes);
  }
};

// A team's steps of one tile, in one tensor; written to the same place of another one.
struct Tile {
  const Rows& rows;
  const unsigned char* tensor;
  const Span& span;
  const Place& place;
  long long step_bytes;
  __device__ __forceinline__ Vector get(int i, int chunk) const {
    return rows.get(tensor, span, place, i, chunk, step_bytes);
  }
  __device__ __forceinline__ void put(unsigned char* other, int i, int chunk, const Vector& v) const {
    if (span.has(place, i, chunk)) store_vector(other + span.at(i, chunk, step_bytes), v);
  }
};

// `value` where `mine`, else 0, added bit by bit to `chosen`: a choice among registers that stays one. (As a condition,
// it becomes an array in local memory that is read at a variable index.)
__device__ __forceinline__ void choose(float& chosen, bool mine, float value) {
  chosen = __uint_as_float(__float_as_uint(chosen) | (__float_as_uint(value) & (mine ? 0xffffffffu : 0u)));
}

__device__ __forceinline__ float sum_team(float value) {
#pragma unroll
  for (int mask = kLanes / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Two sums over time. In the forward pass of mu - pivot and s2 + (mu - pivot)^2, in the backward of P and R.
struct __align__(16) Sums {
  double first, second;
};
__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  Sums c;
  c.first = a.first + b.first;
  c.second = a.second + b.second;
  return c;
}
__device__ __forceinline__ Sums no_sums() {
  Sums s;
  s.first = s.second = 0;
  return s;
}

// Over this lane and those before it.
__device__ __forceinline__ Sums scan_warp(Sums s, int lane) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    Sums other;
    other.first = shuffle_up(s.first, by);
    other.second = shuffle_up(s.second, by);
    if (lane >= by) s = other + s;
  }
  return s;
}

// The sums over everything before each tile, for one sequence and one of its blocks.
struct OverTime {
  static constexpr int kSharedSums = 2 * kWarps + 1;
  Sums* totals;     // (tiles,) of this sequence, global; unused with one block
  unsigned* flags;  // (tiles,) 0 until the total is there
  int blocks;
  Sums* shared;  // kSharedSums
  Sums carry;    // over the tiles so far
  int parity;
  __device__ __forceinline__ OverTime(Sums* totals, unsigned* flags, int blocks, Sums* shared)
      : totals(totals), flags(flags), blocks(blocks), shared(shared) {
    carry = no_sums();
    parity = 0;
  }

  // Returns the sum over all steps up to and including the lane's, given the lane's own. All threads call it, once a
  // tile. One barrier, and a second one where blocks share the sequence.
  __device__ __forceinline__ Sums add(Sums mine, const Place& place, int tile) {
    mine = scan_warp(mine, place.lane);
    Sums* warps = shared + parity * kWarps;  // two in turn: a slow warp may still read the last tile's
    parity ^= 1;
    if (place.lane == 31) warps[place.warp] = mine;
    sync_block();
    Sums before = no_sums(), total = no_sums();
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      if (w == place.warp) before = total;
      total = total + warps[w];
    }
    if (blocks > 1) {
      if (place.warp == 0) {
        if (place.lane == 0) {
          totals[tile] = total;
          store_release(flags + tile, 1);
        }
        for (int start = max(0, tile - blocks + 1); start < tile; start += 32) {
          Sums theirs = no_sums();
          if (start + place.lane < tile) {
            while (!load_acquire(flags + start + place.lane)) wait_a_little();
            theirs = totals[start + place.lane];
          }
          sync_warp();
          const int present = min(32, tile - start);
          for (int i = 0; i < present; i++) {
            Sums one;
            one.first = shuffle(theirs.first, i);
            one.second = shuffle(theirs.second, i);
            carry = carry + one;
          }
        }
        if (place.lane == 0) shared[2 * kWarps] = carry;
      }
      sync_block();
      carry = shared[2 * kWarps];
    }
    mine = (carry + before) + mine;
    carry = carry + total;
    return mine;
  }
};

// Gain or bias of a vector's features, from shared memory: registers are scarce where tiles are in flight.
__device__ __forceinline__ void read_parameters(const float* shared_features, float (&f)[kVector]) {
  if constexpr (kVector % 4 == 0) {
#pragma unroll
    for (int e = 0; e < kVector; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(shared_features + e);
      f[e] = four.x;
      f[(e + 1) % kVector] = four.y;
      f[(e + 2) % kVector] = four.z;
      f[(e + 3) % kVector] = four.w;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kVector; e++) f[e] = shared_features[e];
  }
}

// Which sequence and which of its blocks: neighbouring blocks take neighbouring groups, so that they read the same
// lines of memory at about the same time.
struct Sequence {
  int group, block;
  long long row;
  __device__ __forceinline__ Sequence(int groups, int blocks) {
    group = blockIdx.x % groups;
    block = blockIdx.x / groups % blocks;
    row = blockIdx.x / groups / blocks;
  }
};

// The steps of a sequence in the order of the walk: `start` is where the first one lies in every tensor like x, and
// `step_bytes` leads to the next one, towards the end of time or the start of it.
struct Walk {
  const Place& place;
  int length, tiles;
  long long start, step_bytes;
  __device__ __forceinline__ Walk(const Place& place, long long steps, long long start, long long step_bytes)
      : place(place), length(static_cast<int>(steps)), start(start), step_bytes(step_bytes) {
    tiles = (length + kTileSteps - 1) / kTileSteps;
  }
  // The first step of the team, and the one whose numbers this lane keeps, if it keeps any.
  __device__ __forceinline__ int team_step(int tile) const { return tile * kTileSteps + place.first_step(); }
  __device__ __forceinline__ int own_step(int tile) const { return team_step(tile) + place.member; }
  __device__ __forceinline__ bool owns(int step) const { return place.member < kSteps && step < length; }
  __device__ __forceinline__ Span span_of(int tile) const {
    Span span;
    const int step = team_step(tile);
    span.offset = start + step * step_bytes + place.member * kVectorBytes;
    span.count = length - step;
    return span;
  }
};
