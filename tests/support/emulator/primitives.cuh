// The CPU's meaning of kernels/primitives.cuh, and of what a CUDA compiler gives without a header.
#pragma once
#include <math.h>

#include <bit>
#include <type_traits>

#include "scheduler.h"

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(16) double2 { double x, y; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(4) ushort2 { unsigned short x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ushort2 make_ushort2(unsigned short x, unsigned short y) { return {x, y}; }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline float __int_as_float(int i) { return std::bit_cast<float>(i); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
inline double __longlong_as_double(long long i) { return std::bit_cast<double>(i); }
inline long long __double_as_longlong(double d) { return std::bit_cast<long long>(d); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i) & 15;
    unsigned byte = bytes >> (8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
template <typename T>
T __ldg(const T* p) { return *p; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline void sincospi(double x, double* s, double* c) {
  const double r = x - 2.0 * nearbyint(0.5 * x);  // exact, in [-1, 1]
  ::sincos(M_PI * r, s, c);
}
inline void sincospif(float x, float* s, float* c) {
  double sine, cosine;
  sincospi(x, &sine, &cosine);
  *s = static_cast<float>(sine);
  *c = static_cast<float>(cosine);
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

namespace emulator {

inline unsigned round_to_bf16(float f) {
  if (f != f) return 0x7fff;
  const unsigned bits = std::bit_cast<unsigned>(f);
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline void check_aligned(const char* operation, const Where& where, const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail(text(operation, where) + " at an address that is not a multiple of " + std::to_string(bytes));
}

template <typename T>
struct Exchange {
  T value;
  int lane;  // whose value is wanted
  T result;
};
template <typename T>
T exchange(const char* operation, const Where& where, T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a CUDA shuffle takes 4 or 8 bytes");
  Exchange<T> mine{value, lane, value};
  with_warp(operation, where, mine, [](Exchange<T>** all) {
    for (int i = 0; i < 32; i++) all[i]->result = all[all[i]->lane]->value;
  });
  return mine.result;
}
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace emulator

inline unsigned pack_bf16(float low, float high) {
  return emulator::round_to_bf16(high) << 16 | emulator::round_to_bf16(low);
}
inline float bf16_low(unsigned packed) { return __uint_as_float(packed << 16); }
inline float bf16_high(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                     emulator::Where where = emulator::Where::current()) {
  struct Operands { float* d; const unsigned* a; unsigned b[2]; } mine{d, a, {b0, b1}};
  emulator::with_warp("mma_bf16", where, mine, [](Operands** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, c = 2 * (lane % 4);
      for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i % 2), column = c + 8 * (i / 2);
        a[row][column] = bf16_low(all[lane]->a[i]);
        a[row][column + 1] = bf16_high(all[lane]->a[i]);
      }
      for (int i = 0; i < 2; i++) {
        b[c + 8 * i][g] = bf16_low(all[lane]->b[i]);
        b[c + 8 * i + 1][g] = bf16_high(all[lane]->b[i]);
      }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = all[lane]->d[i];
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
        all[lane]->d[i] = sum;
      }
  });
}

inline void mma_bf16_first(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                           emulator::Where where = emulator::Where::current()) {
  d[0] = d[1] = d[2] = d[3] = 0;
  mma_bf16(d, a, b0, b1, where);
}

inline void load_transposed(unsigned (&r)[4], const unsigned* shared_row,
                            emulator::Where where = emulator::Where::current()) {
  struct Operands { unsigned* r; const unsigned char* row; };
  Operands mine{r, reinterpret_cast<const unsigned char*>(shared_row)};
  emulator::check_aligned("load_transposed", where, shared_row, 16);
  const unsigned char* shared = emulator::current->block->shared;
  if (mine.row < shared || mine.row + 16 > shared + emulator::launch.shared_bytes)
    emulator::fail(emulator::text("load_transposed", where) + " outside the block's shared memory");
  emulator::with_warp("load_transposed", where, mine, [](Operands** all) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        unsigned short low, high;
        memcpy(&low, all[8 * i + 2 * (lane % 4)]->row + 2 * (lane / 4), 2);
        memcpy(&high, all[8 * i + 2 * (lane % 4) + 1]->row + 2 * (lane / 4), 2);
        all[lane]->r[i] = static_cast<unsigned>(high) << 16 | low;
      }
  });
}

template <typename T>
T shuffle(T value, int lane, emulator::Where where = emulator::Where::current()) {
  return emulator::exchange("shuffle", where, value, lane & 31);
}
template <typename T>
T shuffle_xor(T value, int mask, emulator::Where where = emulator::Where::current()) {
  return emulator::exchange("shuffle_xor", where, value, (emulator::lane() ^ mask) & 31);
}
template <typename T>
T shuffle_up(T value, int by, emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::lane();
  return emulator::exchange("shuffle_up", where, value, lane - by < 0 ? lane : lane - by);
}
template <typename T>
T shuffle_down(T value, int by, emulator::Where where = emulator::Where::current()) {
  const int lane = emulator::lane();
  return emulator::exchange("shuffle_down", where, value, lane + by > 31 ? lane : lane + by);
}

inline unsigned char* shared_memory() { return emulator::current->block->shared; }

inline void sync_block(emulator::Where where = emulator::Where::current()) { emulator::with_block(where); }
inline void sync_warp(emulator::Where where = emulator::Where::current()) {
  int nothing = 0;
  emulator::with_warp("sync_warp", where, nothing, [](int**) {});
}

inline uint4 load_once(const void* address, emulator::Where where = emulator::Where::current()) {
  emulator::check_aligned("load_once", where, address, 16);
  uint4 v;
  memcpy(&v, address, 16);
  return v;
}
inline void store_once(void* address, uint4 v, emulator::Where where = emulator::Where::current()) {
  emulator::check_aligned("store_once", where, address, 16);
  memcpy(address, &v, 16);
}

inline void store_release(unsigned* address, unsigned value) {
  *static_cast<volatile unsigned*>(address) = value;
}
inline unsigned load_acquire(const unsigned* address) { return *static_cast<const volatile unsigned*>(address); }
inline void wait_a_little(emulator::Where where = emulator::Where::current()) {
  emulator::current->operation = "wait_a_little";
  emulator::current->where = where;
  emulator::suspend(emulator::State::yielded);
}
