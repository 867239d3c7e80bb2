// What the CEMA kernels share: complex numbers, the coefficients of a channel, the layout of a tile in shared memory.
//
// Macros, set at compile time:
//   BLOCK     T, the steps of a block: 16 or 32
//   ORDERS    orders a channel is padded to with zero coefficients: 16 or 32
//   TERMS     bfloat16 terms that a table entry or a state is split into: 2 for bfloat16 activations, 3 for float32
//   CHANNELS  channels of a thread block: 8 or 16
//   ALIGNED   1 if every row of the activations starts on 16 bytes and D is a multiple of 8
#pragma once
#include "primitives.cuh"

constexpr int kBlock = BLOCK, kOrders = ORDERS, kTerms = TERMS, kChannels = CHANNELS;
constexpr bool kAligned = ALIGNED;
static_assert(kBlock == 16 || kBlock == 32, "a block has 16 or 32 steps");
static_assert(kOrders == 16 || kOrders == 32, "a channel has 16 or 32 orders");
static_assert(kTerms == 2 || kTerms == 3, "numbers are split into 2 or 3 terms");
static_assert(kChannels == 8 || kChannels == 16, "a thread block has 8 or 16 channels");

constexpr bool kFloat32 = kTerms == 3;           // activations are float32
constexpr int kPlanes = kFloat32 ? 3 : 1;        // bfloat16 terms of an activation; a bfloat16 one is exact
constexpr int kThreads = 32 * kChannels;         // where a warp has a channel

template <bool wide>
struct RealOf { using type = float; };
template <>
struct RealOf<true> { using type = double; };
using Real = RealOf<kFloat32>::type;  // of the coefficients, and of the state that is carried from tile to tile

template <typename T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

template <typename T>
__device__ __forceinline__ Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// c + a b
template <typename T>
__device__ __forceinline__ Complex<T> multiply_add(Complex<T> a, Complex<T> b, Complex<T> c) {
  return {fma(-a.im, b.im, fma(a.re, b.re, c.re)), fma(a.im, b.re, fma(a.re, b.im, c.im))};
}

template <typename To, typename From>
__device__ __forceinline__ Complex<To> convert(Complex<From> z) {
  return {static_cast<To>(z.re), static_cast<To>(z.im)};
}

__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// q = (1 - a d) e^{i angle} of one order n = 0 .. N-1 of one channel, in float64: the phase of q^t is what a float32
// power loses first.
struct Transition {
  double a;          // sigmoid(alpha)
  double log_decay;  // log |q|
  double turn;       // angle / pi
  __device__ __forceinline__ Transition(float alpha, float delta, float theta, int n, int order) : a(sigmoid(alpha)) {
    log_decay = log(fmax(1.0 - a * sigmoid(delta), 1e-15));  // a d may round to 1
    turn = sigmoid(theta) * 2.0 / order * (n + 1);
  }
  // q^steps. A product of two float64 numbers, so the phase is right to 1e-16 of the turns made, also after 2^20 steps.
  __device__ __forceinline__ Complex<double> power(double steps) const {
    double s, c, magnitude = exp(log_decay * steps);
    sincospi(turn * steps, &s, &c);
    return {magnitude * c, magnitude * s};
  }
};

// Of each channel and order, (D, kSlots, kOrders), made by cema_prepare in float64 and rounded once.
enum Slot {
  kP,             // p, the input coefficient
  kG,             // g, the output coefficient
  kPower,         // q^0 .. q^8
  kPower16 = kPower + 9,
  kPower24,
  kA,             // q^T, and its powers 2, 4, 8 and 16
  kA2,
  kA4,
  kA8,
  kA16,
  kSegment,       // q^(steps of a segment)
  kSlots
};

// The coefficients of one order of one channel: number `slot` of (kSlots, kOrders).
struct Coefficients {
  const Complex<Real>* at;
  __device__ __forceinline__ Coefficients(const Complex<Real>* all, long long channel, int order)
      : at(all + channel * kSlots * kOrders + order) {}
  __device__ __forceinline__ Complex<Real> operator[](int slot) const { return at[slot * kOrders]; }

  // q^(8 m + r) from the stored powers.
  __device__ __forceinline__ Complex<Real> power(int m, int r) const {
    Complex<Real> q = (*this)[kPower + r];
    if (m == 1) q = q * (*this)[kPower + 8];
    if (m == 2) q = q * (*this)[kPower16];
    if (m == 3) q = q * (*this)[kPower24];
    return q;
  }

  // Entry of the table of inputs, S_t = p q^(T-1-t), and of outputs, C_t = g q^(t+1).
  __device__ __forceinline__ Complex<Real> input(int step) const {
    const int exponent = kBlock - 1 - step;
    return (*this)[kP] * power(exponent / 8, exponent % 8);
  }
  __device__ __forceinline__ Complex<Real> output(int step) const {
    return (*this)[kG] * power(step / 8, step % 8 + 1);
  }
};

// Splits two numbers into K bfloat16 terms each; what is lost is 2^-9K of the number.
template <int K>
__device__ __forceinline__ void split(float low, float high, unsigned (&terms)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    terms[k] = pack_bf16(low, high);
    if (k + 1 < K) {
      low -= bf16_low(terms[k]);
      high -= bf16_high(terms[k]);
    }
  }
}

// d += a b, or d = a b if FIRST, where both are sums of bfloat16 terms, a[i] and (b0[j], b1[j]). Products below the
// last term's size are left out; the small ones go first. The tensor cores truncate what a float32 sum cannot hold
// instead of rounding it; where float32 accuracy is wanted, each product is therefore added to d by an addition that
// rounds.
template <bool FIRST, int I, int J>
__device__ __forceinline__ void mma_terms(float (&d)[4], const unsigned (&a)[I][4], const unsigned (&b0)[J],
                                          const unsigned (&b1)[J]) {
  float product[4];
  float(&sum)[4] = kFloat32 ? product : d;
  bool fresh = FIRST || kFloat32;
#pragma unroll
  for (int order = kTerms - 1; order >= 0; --order) {
#pragma unroll
    for (int i = 0; i < I; ++i) {
      const int j = order - i;
      if (j < 0 || j >= J) continue;
      if (fresh)
        mma_bf16_first(sum, a[i], b0[j], b1[j]);
      else
        mma_bf16(sum, a[i], b0[j], b1[j]);
      fresh = false;
    }
  }
  if (kFloat32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = FIRST ? product[i] : d[i] + product[i];
  }
}
