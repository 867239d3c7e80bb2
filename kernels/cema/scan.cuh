// The scan over the 16 blocks of a tile in cema/pass.cu, for one order of a channel, and the powers of the block's
// decay A = q^T that it takes.
//
// A lane has blocks 2 g and 2 g + 1 in walking order. What they add to the state comes in, the states that they start
// from go out, and `carry`, the state before the tile, becomes the one after it.
#pragma once
#include "cema/common.cuh"

struct alignas(8) NarrowPowers {
  Complex<float> a1;
};
struct alignas(16) WidePowers {
  Complex<float> a1, a2, a4, a8;
  Complex<float> lanes[8];  // A^(2 g)
  Complex<double> a16;
};
template <bool wide>
struct ScanPowersOf { using type = NarrowPowers; };
template <>
struct ScanPowersOf<true> { using type = WidePowers; };
using ScanPowers = ScanPowersOf<kFloat32>::type;

__device__ __forceinline__ void load_powers(NarrowPowers& s, const Coefficients& z) { s.a1 = convert<float>(z[kA]); }
__device__ __forceinline__ void load_powers(WidePowers& s, const Coefficients& z) {
  s.a1 = convert<float>(z[kA]);
  s.a2 = convert<float>(z[kA2]);
  s.a4 = convert<float>(z[kA4]);
  s.a8 = convert<float>(z[kA8]);
  s.a16 = convert<double>(z[kA16]);
  s.lanes[0] = convert<float>(z[kPower]);
#pragma unroll
  for (int i = 1; i < 8; ++i) {
    Complex<Real> w = z[kPower];
    if (i & 1) w = w * z[kA2];
    if (i & 2) w = w * z[kA4];
    if (i & 4) w = w * z[kA8];
    s.lanes[i] = convert<float>(w);
  }
}

// The sum over this lane's blocks and those of the lanes before it, steps[k] = A^(2^(k + 1)). Returns it as the lane
// one g before has it; lanes with g = 0 get that of the whole tile.
__device__ __forceinline__ Complex<float> scan_lanes(Complex<float> sum, const Complex<float> (&steps)[3], int lane) {
  const int g = lane / 4;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const Complex<float> before = {shuffle_up(sum.re, 4 << k), shuffle_up(sum.im, 4 << k)};
    const Complex<float> joined = multiply_add(steps[k], before, sum);
    if (g >= 1 << k) sum = joined;
  }
  return {shuffle(sum.re, (lane + 28) % 32), shuffle(sum.im, (lane + 28) % 32)};
}

// The carried state joins the first block's and goes through the scan; only lanes with g = 0 hold it.
__device__ __forceinline__ void scan_order(const NarrowPowers& s, Complex<float> first, Complex<float> second,
                                           Complex<float>& carry, Complex<float>& h0, Complex<float>& h1, int lane) {
  const int g = lane / 4;
  const Complex<float> a1 = s.a1;
  Complex<float> steps[3];
  first = multiply_add(a1, carry, first);
  steps[0] = a1 * a1, steps[1] = steps[0] * steps[0], steps[2] = steps[1] * steps[1];
  const Complex<float> turned = scan_lanes(multiply_add(a1, first, second), steps, lane);
  const Complex<float> before = g == 0 ? Complex<float>{0, 0} : turned;
  h1 = multiply_add(a1, before, first);
  h0 = {before.re + carry.re, before.im + carry.im};
  carry = g == 0 ? turned : Complex<float>{0, 0};
}

// The carried state is a float64 number beside the scan, the same in all lanes of an order.
__device__ __forceinline__ void scan_order(const WidePowers& s, Complex<float> first, Complex<float> second,
                                           Complex<double>& carry, Complex<float>& h0, Complex<float>& h1, int lane) {
  const int g = lane / 4;
  const Complex<float> a1 = s.a1, steps[3] = {s.a2, s.a4, s.a8};
  const Complex<float> turned = scan_lanes(multiply_add(a1, first, second), steps, lane);
  const Complex<float> before = g == 0 ? Complex<float>{0, 0} : turned;
  h1 = multiply_add(a1, before, first);
  const Complex<float> left = multiply_add(s.lanes[g], convert<float>(carry), Complex<float>{0, 0});
  h0 = {before.re + left.re, before.im + left.im};
  h1 = multiply_add(a1, left, h1);
  const Complex<float> whole = {shuffle(turned.re, lane % 4), shuffle(turned.im, lane % 4)};
  carry = multiply_add(s.a16, carry, convert<double>(whole));
}
