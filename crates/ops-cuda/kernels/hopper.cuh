// What kernels for Hopper (sm_90a) share: barriers in shared memory, the copy engine (TMA), warpgroup products (wgmma).
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// How a matrix lies in memory and which box of it one copy takes, as cuTensorMapEncodeTiled makes it.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and this many bytes of copies more.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; a fresh barrier counts as one whose phase of parity 1 has.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@over bra done;\nbra again;\ndone:\n}"
        ::"r"(barrier), "r"(parity)
        : "memory");
}

// Threads of several warps: `count` of them, a multiple of 32, meet at the block's barrier `which`, or pass it by.
__device__ __forceinline__ void meet_at(u32 which, u32 count) { asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(count) : "memory"); }
__device__ __forceinline__ void pass_by(u32 which, u32 count) { asm volatile("bar.arrive %0, %1;" ::"r"(which), "r"(count) : "memory"); }

// Shared memory that ordinary stores wrote may next be read by wgmma, or be written by the copy engine.
__device__ __forceinline__ void shared_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 column, u32 line, u32 row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(to), "l"(&map), "r"(column), "r"(line), "r"(row), "r"(barrier)
        : "memory");
}

#define FEWER_REGISTERS(n) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n))
#define MORE_REGISTERS(n) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n))

__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// What the compiler must not move across: sums of products that are on their way.
template <int COUNT>
__device__ __forceinline__ void pinned(float* sums) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// A matrix in shared memory in rows of 128 bytes, eight of them to a swizzled group of 1024. `leading`: bytes from one
// 64 columns to the next where the columns are not what is summed over; it means nothing where they are.
__device__ __forceinline__ u64 swizzled(u32 at, u32 leading = 16) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define SUMS4(d, i) "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define SUMS16(d, i) SUMS4(d, i), SUMS4(d, (i) + 4), SUMS4(d, (i) + 8), SUMS4(d, (i) + 12)
#define SUMS32(d, i) SUMS16(d, i), SUMS16(d, (i) + 16)
#define SUMS64(d, i) SUMS32(d, i), SUMS32(d, (i) + 32)
#define SUMS128(d, i) SUMS64(d, i), SUMS64(d, (i) + 64)
#define NAMES32                                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                                        \
    NAMES32                                                                                                            \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES128                                                                                                       \
    NAMES64                                                                                                            \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
    "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
    "%125, %126, %127"

// sums [64, N] (+)= a [64, 16] · b [N, 16]ᵀ, both described in shared memory.
template <int N>
__device__ __forceinline__ void multiply_rows(float* sums, u64 a, u64 b, u32 add) {
    if constexpr (N == 64) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, %32, %33, add, 1, 1, 0, 0;\n}"
                     : SUMS32(sums, 0)
                     : "l"(a), "l"(b), "r"(add));
    } else if constexpr (N == 128) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, %64, %65, add, 1, 1, 0, 0;\n}"
                     : SUMS64(sums, 0)
                     : "l"(a), "l"(b), "r"(add));
    } else {
        static_assert(N == 256, "no product of this width");
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NAMES128 "}, %128, %129, add, 1, 1, 0, 0;\n}"
                     : SUMS128(sums, 0)
                     : "l"(a), "l"(b), "r"(add));
    }
}

// sums [64, N] += a [64, 16] · b [16, N]: a in registers, b in shared memory in rows of N.
template <int N>
__device__ __forceinline__ void multiply_columns(float* sums, const u32* a, u64 b) {
    if constexpr (N == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : SUMS32(sums, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        static_assert(N == 128, "no product of this width");
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : SUMS64(sums, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}
#endif
