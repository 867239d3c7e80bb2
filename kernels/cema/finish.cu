// Gradients of the parameters from those of p, g and log q: adds up the partial sums in a fixed order, in float64.
//
// dp, dg and dlog q come conjugated. With w = 1 - a d and dL = dlog q:
//   da = -Re(dL) d / w + dp's part along p,   dd = -Re(dL) a / w,   dangle_n = Im(dL) (+ dp's part across p),
//   dalpha = da a (1 - a),  ddelta = dd d (1 - d),  dtheta = sum_n dangle_n (2 pi n / N) f (1 - f),
//   dgamma = dg sqrt(1/N).
// One thread owns one order of one channel; the kOrders neighbouring lanes of a channel add up dtheta by shuffles.
#include "cema/common.cuh"

struct Params {
  const float* alpha;             // (D, N)
  const float* delta;             // (D, N)
  const float* theta;             // (D)
  const Complex<float>* partial;  // (slots, D, kOrders, 3)
  const float* partial_omega;     // (slots, D)
  float* dalpha;
  float* ddelta;
  float* dtheta;
  float* dgamma;
  float* domega;
  int dim, order, slots;
  int rotate_input;
};

extern "C" __global__ void __launch_bounds__(256) cema_finish(const __grid_constant__ Params p) {
  const int index = blockIdx.x * 256 + threadIdx.x;
  const int channel = index / kOrders, n = index % kOrders;
  const bool real = channel < p.dim && n < p.order;
  double d_angle = 0, f = 0;
  const double step = 2.0 / p.order * (n + 1);  // of the angle, over pi
  if (real) {
    Complex<double> dp = {0, 0}, dg = {0, 0}, d_log = {0, 0};
    for (int slot = 0; slot < p.slots; ++slot) {
      const Complex<float>* from = p.partial + ((static_cast<long long>(slot) * p.dim + channel) * kOrders + n) * 3;
      dp = {dp.re + from[0].re, dp.im + from[0].im};
      dg = {dg.re + from[1].re, dg.im + from[1].im};
      d_log = {d_log.re + from[2].re, d_log.im + from[2].im};
    }
    const long long at = static_cast<long long>(channel) * p.order + n;
    const double a = sigmoid(p.alpha[at]), d = sigmoid(p.delta[at]), left = fmax(1.0 - a * d, 1e-15);
    f = sigmoid(p.theta[channel]);
    double da = -d_log.re * d / left, dd = -d_log.re * a / left;
    d_angle = -d_log.im;
    if (p.rotate_input) {
      double s, c;
      sincospi(f * step, &s, &c);
      da += dp.re * c - dp.im * s;               // Re(conj(e) dp) with dp conjugated here
      d_angle -= a * (dp.re * s + dp.im * c);    // Re(conj(i a e) dp)
    } else {
      da += dp.re;
    }
    p.dalpha[at] = static_cast<float>(da * a * (1.0 - a));
    p.ddelta[at] = static_cast<float>(dd * d * (1.0 - d));
    const double scale = sqrt(1.0 / p.order);
    p.dgamma[2 * at] = static_cast<float>(dg.re * scale);
    p.dgamma[2 * at + 1] = static_cast<float>(-dg.im * scale);
  }
  double d_theta = d_angle * step * 3.14159265358979323846 * f * (1.0 - f);
#pragma unroll
  for (int mask = 1; mask < kOrders; mask *= 2) d_theta += shuffle_xor(d_theta, mask);
  if (real && n == 0) {
    p.dtheta[channel] = static_cast<float>(d_theta);
    double d_omega = 0;
    for (int slot = 0; slot < p.slots; ++slot)
      d_omega += p.partial_omega[static_cast<long long>(slot) * p.dim + channel];
    p.domega[channel] = static_cast<float>(d_omega);
  }
}
