// Powers of a block's decay A = q^T that cema/pass.cu scans with.
#pragma once
#include "cema/common.cuh"

// Powers that the scan needs, of one order.
struct alignas(kFloat32 ? 16 : 8) ScanPowers {
  Complex<float> a1;
#if TERMS == 3
  Complex<float> a2, a4, a8;
  Complex<float> lanes[8];  // A^(2 g)
  Complex<Real> a16;
#endif
};

__device__ __forceinline__ ScanPowers scan_powers(const Coefficients& z) {
  ScanPowers s;
  s.a1 = convert<float>(z[kA]);
#if TERMS == 3
  s.a2 = convert<float>(z[kA2]);
  s.a4 = convert<float>(z[kA4]);
  s.a8 = convert<float>(z[kA8]);
  s.a16 = z[kA16];
  s.lanes[0] = convert<float>(z[kPower]);
#pragma unroll
  for (int i = 1; i < 8; ++i) {
    Complex<Real> w = z[kPower];
    if (i & 1) w = w * z[kA2];
    if (i & 2) w = w * z[kA4];
    if (i & 4) w = w * z[kA8];
    s.lanes[i] = convert<float>(w);
  }
#endif
  return s;
}
