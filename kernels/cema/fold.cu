// The state before one of several consecutive slices of time, from the state s_k that each slice leaves of a zero one:
// sum_k q^steps(k) s_k, where k = 0 is the neighbouring slice and steps(k) is the number of steps between slice k and
// the one whose state is computed.
//
// One thread owns one order of one channel of one batch row. Powers and the sum are float64; the order is fixed.
#include "cema/common.cuh"

struct Params {
  const Complex<float>* summaries;  // (slices, B, D, N)
  Complex<float>* state;            // (B, D, N)
  const float* alpha;               // (D, N)
  const float* delta;               // (D, N)
  const float* theta;               // (D)
  long long first_gap, gap;         // steps of the nearest slice, and of each farther one
  int nearest, direction;           // number of the nearest slice, and from it to the next
  int slices;                       // how many count
  int batch, dim, order;
  int conjugate_power, conjugate_result;
};

extern "C" __global__ void __launch_bounds__(256) cema_fold(const __grid_constant__ Params p) {
  const long long states = static_cast<long long>(p.dim) * p.order;
  const long long at = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;  // in a row
  if (at >= states) return;
  const int channel = static_cast<int>(at / p.order), n = static_cast<int>(at % p.order);
  const Transition transition(p.alpha[at], p.delta[at], p.theta[channel], n, p.order);
  const long long row = blockIdx.y * states;
  Complex<double> sum = {0, 0};
  for (int k = 0; k < p.slices; ++k) {
    const double steps = k == 0 ? 0.0 : static_cast<double>(p.first_gap + (k - 1) * p.gap);
    Complex<double> power = transition.power(steps);
    if (p.conjugate_power) power.im = -power.im;
    const long long slice = p.nearest + static_cast<long long>(k) * p.direction;
    sum = multiply_add(power, convert<double>(p.summaries[slice * p.batch * states + row + at]), sum);
  }
  if (p.conjugate_result) sum.im = -sum.im;
  p.state[row + at] = convert<float>(sum);
}
