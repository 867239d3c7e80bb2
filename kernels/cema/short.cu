// CEMA over fewer than T steps, forward or backward: the end of a sequence that fills no block, and decoding.
//
// One thread owns one order of one channel and takes the steps one by one, as the definition does; the ORDERS
// neighbouring lanes of a channel add up the output by shuffles. The forward pass has a thread for each batch row; the
// backward pass walks the batch rows in order, so that its sums over them have one order, and recomputes the states.
//
// Macro beside those of common.cuh:
//   BACKWARD   1 for the backward pass
#include "cema/common.cuh"

constexpr bool kBackward = BACKWARD;

struct Params {
  const char* x;
  const char* dy;                        // backward only
  char* y;                               // y, or dx
  const Complex<Real>* coefficients;     // (D, kSlots, kOrders)
  const float* omega;                    // (D)
  const Complex<float>* state_in;        // (B, D, N), null is zero
  const Complex<float>* state_grad_in;   // (B, D, N): gradient of the state that leaves, null is zero; backward only
  Complex<float>* state_out;             // (B, D, N): the state that leaves, or the gradient of the one that enters;
                                         // null if not wanted
  Complex<float>* partial;               // (D, kOrders, 3), backward only
  float* partial_omega;                  // (D)
  long long x_row, dy_row, y_row;        // elements from one batch row to the next
  int length;                            // steps, less than 32
  int batch, dim, order;
};

__device__ __forceinline__ float read(const char* from, long long at) {
  if (kFloat32) return reinterpret_cast<const float*>(from)[at];
  return __uint_as_float(static_cast<unsigned>(reinterpret_cast<const unsigned short*>(from)[at]) << 16);
}

__device__ __forceinline__ void write(char* to, long long at, float value) {
  if (kFloat32)
    reinterpret_cast<float*>(to)[at] = value;
  else
    reinterpret_cast<unsigned short*>(to)[at] = static_cast<unsigned short>(pack_bf16(value, 0.0f) & 0xffffu);
}

__device__ __forceinline__ Real sum_of_orders(Real value) {
#pragma unroll
  for (int mask = 1; mask < kOrders; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

extern "C" __global__ void __launch_bounds__(256) cema_short(const __grid_constant__ Params p) {
  const int index = blockIdx.x * 256 + threadIdx.x;
  const int channel = min(index / kOrders, p.dim - 1), n = index % kOrders;
  const bool real = index / kOrders < p.dim, there = real && n < p.order;
  const Coefficients z(p.coefficients, channel, n);
  const Complex<Real> in = z[kP], out = z[kG], q = z[kPower + 1];
  const float omega = p.omega[channel];
  auto state_at = [&](int row) { return (static_cast<long long>(row) * p.dim + channel) * p.order + n; };
  if constexpr (!kBackward) {
    const int row = blockIdx.y;
    Complex<Real> h = {0, 0};
    if (there && p.state_in) h = convert<Real>(p.state_in[state_at(row)]);
    for (int t = 0; t < p.length; ++t) {
      const long long at = static_cast<long long>(t) * p.dim + channel;
      const Real x = read(p.x, row * p.x_row + at);
      h = multiply_add(q, h, {in.re * x, in.im * x});
      const Real y = sum_of_orders(out.re * h.re - out.im * h.im) + omega * x;
      if (n == 0 && real) write(p.y, row * p.y_row + at, static_cast<float>(y));
    }
    if (there && p.state_out) p.state_out[state_at(row)] = convert<float>(h);
  } else {
    Complex<Real> dp = {0, 0}, dg = {0, 0}, d_log = {0, 0};
    Real d_omega = 0;
    for (int row = 0; row < p.batch; ++row) {
      Complex<Real> entering[kBlock];  // the state before each step
      Complex<Real> h = {0, 0}, l = {0, 0};
      if (there && p.state_in) h = convert<Real>(p.state_in[state_at(row)]);
      if (there && p.state_grad_in) {
        l = convert<Real>(p.state_grad_in[state_at(row)]);
        l.im = -l.im;
      }
      for (int t = 0; t < p.length; ++t) {
        entering[t] = h;
        const Real x = read(p.x, row * p.x_row + static_cast<long long>(t) * p.dim + channel);
        h = multiply_add(q, h, {in.re * x, in.im * x});
      }
      for (int t = p.length - 1; t >= 0; --t) {
        const long long at = static_cast<long long>(t) * p.dim + channel;
        const Real x = read(p.x, row * p.x_row + at), dy = read(p.dy, row * p.dy_row + at);
        const Complex<Real> decayed = q * entering[t];
        // l is the conjugate of the gradient of the state after step t.
        l = {l.re + out.re * dy, l.im + out.im * dy};
        const Real dx = sum_of_orders(in.re * l.re - in.im * l.im) + omega * dy;
        if (n == 0 && real) write(p.y, row * p.y_row + at, static_cast<float>(dx));
        dp = {dp.re + l.re * x, dp.im + l.im * x};
        dg = {dg.re + dy * (decayed.re + in.re * x), dg.im + dy * (decayed.im + in.im * x)};
        d_log = multiply_add(decayed, l, d_log);
        d_omega += dy * x;
        l = q * l;
      }
      if (there && p.state_out) p.state_out[state_at(row)] = {static_cast<float>(l.re), -static_cast<float>(l.im)};
    }
    if (real) {
      Complex<float>* to = p.partial + (static_cast<long long>(channel) * kOrders + n) * 3;
      to[0] = convert<float>(dp);
      to[1] = convert<float>(dg);
      to[2] = convert<float>(d_log);
      if (n == 0) p.partial_omega[channel] = static_cast<float>(d_omega);
    }
  }
}
