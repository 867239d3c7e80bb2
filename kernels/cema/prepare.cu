// The coefficients of every channel and order, and the first T lags of the convolution, from the parameters.
//
//   a = sigmoid(alpha), d = sigmoid(delta), angle_n = sigmoid(theta) (2 pi / N) n,  q = (1 - a d) e^{i angle}
//   p = a or a e^{i angle},  g = gamma sqrt(1/N),  k_l = Re sum_n p g q^l  (omega joins k_0)
//
// One thread owns one order of one channel; the kOrders neighbouring lanes of a channel add up k_l by shuffles. All in
// float64. Orders beyond N get p = q = g = 0 and add nothing.
#include "cema/common.cuh"

struct Params {
  const float* alpha;          // (D, N)
  const float* delta;          // (D, N)
  const float* theta;          // (D)
  const float* gamma;          // (D, N, 2)
  const float* omega;          // (D)
  Complex<Real>* coefficients;  // (D, kSlots, kOrders)
  Real* lags;                  // (D, T)
  long long segment;           // steps of a segment
  int dim;
  int order;                   // N
  int rotate_input;
};

extern "C" __global__ void __launch_bounds__(256) cema_prepare(const __grid_constant__ Params p) {
  int index = blockIdx.x * 256 + threadIdx.x;
  int channel = index / kOrders, n = index % kOrders;
  bool real = channel < p.dim && n < p.order;
  Complex<double> in = {0, 0}, q = {0, 0}, g = {0, 0}, segment = {0, 0};
  if (real) {
    long long at = static_cast<long long>(channel) * p.order + n;
    const Transition transition(p.alpha[at], p.delta[at], p.theta[channel], n, p.order);
    const double a = transition.a;
    double s, c;
    sincospi(transition.turn, &s, &c);
    double decay = exp(transition.log_decay);
    q = {decay * c, decay * s};
    in = p.rotate_input ? Complex<double>{a * c, a * s} : Complex<double>{a, 0};
    double scale = sqrt(1.0 / p.order);
    g = {p.gamma[2 * at] * scale, p.gamma[2 * at + 1] * scale};
    segment = transition.power(static_cast<double>(p.segment));
  }
  Complex<double> powers[9];
  powers[0] = {real ? 1.0 : 0.0, 0};
#pragma unroll
  for (int r = 1; r <= 8; ++r) powers[r] = powers[r - 1] * q;
  Complex<double> q16 = powers[8] * powers[8], q24 = q16 * powers[8];
  Complex<double> a1 = kBlock == 16 ? q16 : q16 * q16;
  Complex<double> a2 = a1 * a1, a4 = a2 * a2, a8 = a4 * a4;
  if (channel < p.dim) {
    Complex<Real>* c = p.coefficients + static_cast<long long>(channel) * kSlots * kOrders + n;
    c[(kP) * kOrders] = convert<Real>(in);
    c[(kG) * kOrders] = convert<Real>(g);
#pragma unroll
    for (int r = 0; r <= 8; ++r) c[(kPower + r) * kOrders] = convert<Real>(powers[r]);
    c[(kPower16) * kOrders] = convert<Real>(q16);
    c[(kPower24) * kOrders] = convert<Real>(q24);
    c[(kA) * kOrders] = convert<Real>(a1);
    c[(kA2) * kOrders] = convert<Real>(a2);
    c[(kA4) * kOrders] = convert<Real>(a4);
    c[(kA8) * kOrders] = convert<Real>(a8);
    c[(kA16) * kOrders] = convert<Real>(a8 * a8);
    c[(kSegment) * kOrders] = convert<Real>(segment);
  }
  Complex<double> term = in * g;
#pragma unroll 8
  for (int lag = 0; lag < kBlock; ++lag) {
    double sum = term.re;
#pragma unroll
    for (int mask = 1; mask < kOrders; mask *= 2) sum += shuffle_xor(sum, mask);
    if (channel < p.dim && n == 0)
      p.lags[static_cast<long long>(channel) * kBlock + lag] =
          static_cast<Real>(sum + (lag == 0 ? p.omega[channel] : 0.0f));
    term = term * q;
  }
}
