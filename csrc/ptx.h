// The instructions that C++ has no name for, each one function. checks/emulator.h has the same functions for a CPU.
#pragma once
#ifdef __CUDACC__
#include <cuda.h>

#include <cstdint>

#include "device.h"
#include "numbers.h"

namespace rwn {

RWN_DEVICE unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Past L1, which may hold what stood here before other blocks wrote.
RWN_DEVICE float4 load_uncached(const float4* address) { return __ldcg(address); }

RWN_DEVICE void pause() { __nanosleep(20); }

RWN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// 16 bytes from global to shared memory, both on 16-byte boundaries; 16 zeros where not valid (nothing is read then).
RWN_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
RWN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
RWN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit values, transposed; lane l names row l % 8 of matrix l / 8.
RWN_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

#define RWN_MMA(type)                                                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                  \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T>
RWN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
RWN_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  RWN_MMA("bf16");
}
template <>
RWN_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  RWN_MMA("f16");
}
#undef RWN_MMA

#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// An mbarrier that completes with one arrival and the bytes which that arrival announces.
RWN_DEVICE void arrival_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Makes the barriers' beginning known to the copy engine.
RWN_DEVICE void arrival_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
RWN_DEVICE void arrival_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
RWN_DEVICE void arrival_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// A box of 64 pixels x 64 channels of the tensor that `map` describes; zeros outside of it.
RWN_DEVICE void copy_box(void* shared, const void* map, int channel, int pixel, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(channel), "r"(pixel), "r"(shared_address(barrier))
      : "memory");
}

// What this thread wrote to shared memory becomes visible to the tensor cores and the copy engine.
RWN_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

RWN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RWN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All products of this warp are complete.
RWN_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Keeps the compiler from reading the sums before the wait that precedes this.
template <int count>
RWN_DEVICE void wgmma_results(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// sums += A (64 channels x 16 pixels, m across) * B (16 pixels x WIDTH * 8 columns, k across), by a warpgroup. With
// `accumulate` 0 the sums begin here: registers that nothing else has written are what lets products overlap.
template <class T, int WIDTH>
struct Wgmma;
template <class T, int WIDTH>
RWN_DEVICE void wgmma(float (&d)[WIDTH * 4], uint64_t a, uint64_t b, int accumulate) {
  Wgmma<T, WIDTH>::run(d, a, b, accumulate);
}

// clang-format off
#define RWN_R4 "%0, %1, %2, %3"
#define RWN_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RWN_D_4 RWN_D4(0)
#define RWN_R8 RWN_R4 ", %4, %5, %6, %7"
#define RWN_D_8 RWN_D_4, RWN_D4(4)
#define RWN_R12 RWN_R8 ", %8, %9, %10, %11"
#define RWN_D_12 RWN_D_8, RWN_D4(8)
#define RWN_R16 RWN_R12 ", %12, %13, %14, %15"
#define RWN_D_16 RWN_D_12, RWN_D4(12)
#define RWN_R20 RWN_R16 ", %16, %17, %18, %19"
#define RWN_D_20 RWN_D_16, RWN_D4(16)
#define RWN_R24 RWN_R20 ", %20, %21, %22, %23"
#define RWN_D_24 RWN_D_20, RWN_D4(20)
#define RWN_R28 RWN_R24 ", %24, %25, %26, %27"
#define RWN_D_28 RWN_D_24, RWN_D4(24)
#define RWN_R32 RWN_R28 ", %28, %29, %30, %31"
#define RWN_D_32 RWN_D_28, RWN_D4(28)
#define RWN_R36 RWN_R32 ", %32, %33, %34, %35"
#define RWN_D_36 RWN_D_32, RWN_D4(32)
#define RWN_R40 RWN_R36 ", %36, %37, %38, %39"
#define RWN_D_40 RWN_D_36, RWN_D4(36)
#define RWN_R44 RWN_R40 ", %40, %41, %42, %43"
#define RWN_D_44 RWN_D_40, RWN_D4(40)
#define RWN_R48 RWN_R44 ", %44, %45, %46, %47"
#define RWN_D_48 RWN_D_44, RWN_D4(44)
#define RWN_R52 RWN_R48 ", %48, %49, %50, %51"
#define RWN_D_52 RWN_D_48, RWN_D4(48)
#define RWN_R56 RWN_R52 ", %52, %53, %54, %55"
#define RWN_D_56 RWN_D_52, RWN_D4(52)
#define RWN_R60 RWN_R56 ", %56, %57, %58, %59"
#define RWN_D_60 RWN_D_56, RWN_D4(56)
#define RWN_R64 RWN_R60 ", %60, %61, %62, %63"
#define RWN_D_64 RWN_D_60, RWN_D4(60)
#define RWN_R68 RWN_R64 ", %64, %65, %66, %67"
#define RWN_D_68 RWN_D_64, RWN_D4(64)
#define RWN_R72 RWN_R68 ", %68, %69, %70, %71"
#define RWN_D_72 RWN_D_68, RWN_D4(68)
#define RWN_WGMMA(T, type, WIDTH, columns, registers, a_name, b_name, accumulate_name, ...)                      \
  template <>                                                                                                    \
  struct Wgmma<T, WIDTH> {                                                                                       \
    RWN_DEVICE static void run(float (&d)[WIDTH * 4], uint64_t a, uint64_t b, int accumulate) {                   \
      asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " accumulate_name ", 0;\n"                            \
                   "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, "      \
                   a_name ", " b_name ", more, 1, 1, 1, 0;\n}"                                                   \
                   : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate));                                              \
    }                                                                                                            \
  };
#define RWN_WGMMA_TYPES(...) RWN_WGMMA(bf16, "bf16", __VA_ARGS__) RWN_WGMMA(f16, "f16", __VA_ARGS__)
RWN_WGMMA_TYPES(2, "16", RWN_R8, "%8", "%9", "%10", RWN_D_8)
RWN_WGMMA_TYPES(3, "24", RWN_R12, "%12", "%13", "%14", RWN_D_12)
RWN_WGMMA_TYPES(4, "32", RWN_R16, "%16", "%17", "%18", RWN_D_16)
RWN_WGMMA_TYPES(5, "40", RWN_R20, "%20", "%21", "%22", RWN_D_20)
RWN_WGMMA_TYPES(7, "56", RWN_R28, "%28", "%29", "%30", RWN_D_28)
RWN_WGMMA_TYPES(9, "72", RWN_R36, "%36", "%37", "%38", RWN_D_36)
RWN_WGMMA_TYPES(12, "96", RWN_R48, "%48", "%49", "%50", RWN_D_48)
RWN_WGMMA_TYPES(15, "120", RWN_R60, "%60", "%61", "%62", RWN_D_60)
RWN_WGMMA_TYPES(18, "144", RWN_R72, "%72", "%73", "%74", RWN_D_72)
#undef RWN_WGMMA_TYPES
#undef RWN_WGMMA
// clang-format on

#endif
}  // namespace rwn
#endif
