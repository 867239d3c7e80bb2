// The instructions that the kernels use beyond plain C++, one function each, and nothing else.
//
// No CUDA header is included: the run-time compiler comes without them. bfloat16 numbers are therefore held as bits,
// two in an `unsigned`, the earlier one in the low half. Another header of this name, found first on the include path,
// can give every function here a meaning on a CPU; that is how the kernels are tested without a GPU.
#pragma once

// Rounds to nearest even; `low` goes to the low half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float bf16_low(unsigned packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float bf16_high(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

// d (16 x 8) += a (16 x 16) b (16 x 8), bfloat16 products in a float32 sum. With g = lane / 4 and c = 2 (lane % 4):
//   a[0] row g, columns c, c+1; a[1] row g+8; a[2] row g, columns c+8, c+9; a[3] row g+8, columns c+8, c+9;
//   b0 rows c, c+1 of column g; b1 rows c+8, c+9;      d[0], d[1] row g, columns c, c+1; d[2], d[3] row g+8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with nothing to add to: d = a b.
__device__ __forceinline__ void mma_bf16_first(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// Four 8 x 8 bfloat16 matrices, transposed on the way: lane l gives the address of row l % 8 (16 bytes, aligned) of
// matrix l / 8 and receives, in r[i], elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of matrix i.
__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const unsigned* shared_row) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int by) { return __shfl_up_sync(0xffffffffu, value, by); }
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int by) { return __shfl_down_sync(0xffffffffu, value, by); }

// The block's dynamic shared memory, 16-byte aligned. The kernels use no other: its size is chosen at the launch.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// 16 bytes that are read or written once: they need not stay in L1. The rest of their 128 bytes is on its way to L2:
// other blocks want it soon.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
__device__ __forceinline__ void store_once(void* address, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// A word that another block waits for: everything written before the release is seen after the acquire.
__device__ __forceinline__ void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
// Called in a loop that waits for load_acquire.
__device__ __forceinline__ void wait_a_little() { __nanosleep(20); }
