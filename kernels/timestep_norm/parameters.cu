// TimestepNorm, backward: dweight and dbias from the parts that the blocks of timestep_norm_backward leave.
//
// A block of 256 threads owns 32 features of one of the two gradients; its warp w adds the parts w, w + 8, ... and warp
// 0 then adds the warps' sums, all in float64 and in a fixed order.
#include "primitives.cuh"

struct Params {
  const float* partial;  // (2, parts, D)
  float* dweight;        // (D,)
  float* dbias;
  long long parts, dim;
};

extern "C" __global__ void __launch_bounds__(256) timestep_norm_parameters(const __grid_constant__ Params p) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [8][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long f = blockIdx.x * 32ll + lane;
  const float* partial = p.partial + blockIdx.y * p.parts * p.dim;
  double sum = 0;
  if (f < p.dim) {
#pragma unroll 4
    for (long long i = warp; i < p.parts; i += 8) sum += partial[i * p.dim + f];
  }
  sums[threadIdx.x] = sum;
  sync_block();
  if (warp == 0 && f < p.dim) {
    for (int w = 1; w < 8; w++) sum += sums[w * 32 + lane];
    (blockIdx.y ? p.dbias : p.dweight)[f] = static_cast<float>(sum);
  }
}
