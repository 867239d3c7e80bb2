// Mean and centred squares of every channel over a segment of time: the first half of a slice's statistics.
//
// A thread owns kVector neighbouring channels (16 bytes if rows allow it) and takes every kRows-th step of the segment.
// Numbers are measured from the channel's first one there, so that float32 sums do not cancel where the data lies far
// from 0. The kRows threads of a channel meet in shared memory. norm_summary_finish joins segments and channels.
#include "primitives.cuh"

constexpr int kActivationBytes = ACTIVATION_BYTES;  // 2 (bfloat16) or 4 (float32)
constexpr int kVector = VECTOR;                     // channels of a thread: 1, or as many as 16 bytes hold
constexpr bool kFloat32 = kActivationBytes == 4;
constexpr int kLanes = 32, kRows = 8;

struct Params {
  const char* x;      // (B, L, D), steps and channels packed
  double* partial;    // (2, segments, B, D): mean, and sum of squares about it
  long long x_row;    // elements from one batch row to the next
  long long length;   // L
  long long segment;  // steps of a segment
  int batch, dim;
};

__device__ __forceinline__ void read(const char* at, float (&v)[kVector]) {
  if constexpr (kVector == 1) {
    if constexpr (kFloat32)
      v[0] = *reinterpret_cast<const float*>(at);
    else
      v[0] = __uint_as_float(static_cast<unsigned>(*reinterpret_cast<const unsigned short*>(at)) << 16);
  } else {
    const uint4 words = load_once(at);
    const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if constexpr (kFloat32)
        v[i] = __uint_as_float(w[i]);
      else
        v[i] = i % 2 ? bf16_high(w[i / 2]) : bf16_low(w[i / 2]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kLanes * kRows) norm_summary(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  const int channel = (blockIdx.x * kLanes + lane) * kVector;
  const bool real = channel < p.dim;
  const long long first = blockIdx.z * p.segment;
  const long long end = first + p.segment < p.length ? first + p.segment : p.length;
  const char* start = p.x + (blockIdx.y * p.x_row + (real ? channel : 0)) * kActivationBytes;
  const long long step_bytes = static_cast<long long>(p.dim) * kActivationBytes;
  float pivot[kVector], sum[kVector] = {}, squares[kVector] = {};
  read(start + first * step_bytes, pivot);
#pragma unroll 4
  for (long long t = first + row; t < end; t += kRows) {
    float v[kVector];
    read(start + t * step_bytes, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = v[i] - pivot[i];
      sum[i] += d;
      squares[i] += d * d;
    }
  }
  float* shared = reinterpret_cast<float*>(shared_memory());  // (kRows, 2 kVector, kLanes)
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    shared[(row * 2 * kVector + i) * kLanes + lane] = sum[i];
    shared[(row * 2 * kVector + kVector + i) * kLanes + lane] = squares[i];
  }
  sync_block();
  if (row != 0 || !real) return;
  const double steps = static_cast<double>(end - first);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    double total = 0, total_squares = 0;
    for (int r = 0; r < kRows; ++r) {
      total += shared[(r * 2 * kVector + i) * kLanes + lane];
      total_squares += shared[(r * 2 * kVector + kVector + i) * kLanes + lane];
    }
    const double mean = total / steps;
    const long long at = (static_cast<long long>(blockIdx.z) * p.batch + blockIdx.y) * p.dim + channel + i;
    p.partial[at] = pivot[i] + mean;
    p.partial[static_cast<long long>(gridDim.z) * p.batch * p.dim + at] = total_squares - total * mean;
  }
}
