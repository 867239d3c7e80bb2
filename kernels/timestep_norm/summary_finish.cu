// Mean and population variance of every group over all segments of time, from norm_summary's partial sums.
//
// A block owns one group of one batch row; its threads take (segment, feature) pairs and meet in shared memory, in a
// fixed order, first for the mean, then for the squares about it. All in float64.
#include "primitives.cuh"

constexpr int kThreads = 128;

struct Params {
  const double* partial;  // (2, segments, B, D)
  float* mean;            // (B, G)
  float* var;             // (B, G)
  long long length;       // L
  long long segment;      // steps of a segment; the last may have fewer
  int batch, dim, groups, segments;
};

__device__ __forceinline__ double block_sum(double value) {
  double* shared = reinterpret_cast<double*>(shared_memory());  // (kThreads)
  sync_block();  // the last call's result has been read
  shared[threadIdx.x] = value;
  sync_block();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    sync_block();
  }
  return shared[0];
}

extern "C" __global__ void __launch_bounds__(kThreads) norm_summary_finish(const __grid_constant__ Params p) {
  const int features = p.dim / p.groups, entries = p.segments * features;
  const long long squares = static_cast<long long>(p.segments) * p.batch * p.dim;
  auto place = [&](int entry) {
    return (static_cast<long long>(entry / features) * p.batch + blockIdx.y) * p.dim +
           static_cast<long long>(blockIdx.x) * features + entry % features;
  };
  auto steps = [&](int entry) {
    const long long first = entry / features * p.segment;
    return static_cast<double>(p.length - first < p.segment ? p.length - first : p.segment);
  };
  const double count = static_cast<double>(p.length) * features;
  double sum = 0;
  for (int e = threadIdx.x; e < entries; e += kThreads) sum += steps(e) * p.partial[place(e)];
  const double mean = block_sum(sum) / count;
  sum = 0;
  for (int e = threadIdx.x; e < entries; e += kThreads) {
    const double d = p.partial[place(e)] - mean;
    sum += p.partial[squares + place(e)] + steps(e) * d * d;
  }
  const double var = block_sum(sum) / count;
  if (threadIdx.x == 0) {
    p.mean[blockIdx.y * p.groups + blockIdx.x] = static_cast<float>(mean);
    p.var[blockIdx.y * p.groups + blockIdx.x] = static_cast<float>(var);
  }
}
