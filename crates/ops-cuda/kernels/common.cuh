// What every kernel file starts with: no header of CUDA's is needed. BF16 (0 or 1) chooses the storage type T of
// activations and weights; sums are fp32 everywhere.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define ALL 0xffffffffu

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

// Round to nearest, ties to even; a NaN stays one.
__device__ __forceinline__ u16 bf16_bits(float v) {
    u32 bits = __float_as_uint(v);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (u16)(v != v ? 0x7fffu : rounded);
}

#if BF16
typedef bf16 T;
// Elements of one 16-byte access.
#define VECTOR 8
__device__ __forceinline__ T narrow(float v) {
    T out;
    out.bits = bf16_bits(v);
    return out;
}
#else
typedef float T;
#define VECTOR 4
__device__ __forceinline__ T narrow(float v) { return v; }
#endif

// A value as storage keeps it.
__device__ __forceinline__ float rounded(float v) { return widen(narrow(v)); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    return v;
}

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// Sixteen bytes that are read once: past L1.
__device__ __forceinline__ uint4 stream16(const void* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

// Sixteen bytes that other warps read too.
__device__ __forceinline__ uint4 load16(const void* at) { return *(const uint4*)at; }

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ void unpack_f32(uint4 v, float* out) {
    out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y);
    out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
}

// The VECTOR numbers of sixteen bytes.
__device__ __forceinline__ void unpack(uint4 v, float* out) {
#if BF16
    out[0] = low(v.x), out[1] = high(v.x), out[2] = low(v.y), out[3] = high(v.y);
    out[4] = low(v.z), out[5] = high(v.z), out[6] = low(v.w), out[7] = high(v.w);
#else
    unpack_f32(v, out);
#endif
}

// sum + a · b over one vector.
__device__ __forceinline__ float dot16(uint4 a, uint4 b, float sum) {
    float x[VECTOR], y[VECTOR];
    unpack(a, x);
    unpack(b, y);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum = fmaf(x[i], y[i], sum);
    return sum;
}

// An operand that is fp32 (a partial sum) or T.
__device__ __forceinline__ float either(const void* data, u32 is_f32, u64 at) {
    return is_f32 ? ((const float*)data)[at] : widen(((const T*)data)[at]);
}

// The same bits whatever storage: for seeded weights and poison.
__device__ __forceinline__ u32 hashed(u64 v) {
    v += 0x9e3779b97f4a7c15ull;
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
    return (u32)((v ^ (v >> 31)) >> 32);
}

// Choices made while compiling.
struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

#if BF16
// One tensor-core product: c [16, 8] += a [16, 16] · b [16, 8], fp32 sums.
__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += weights · values over the eight numbers that a lane holds of each of two weight rows (`top`, `bottom`) and of one
// row of values. A product does not depend on the order of what it sums, so lanes hold whole 16-byte pieces: lane
// 4·r + c has piece c of 32 numbers, of weight rows r and r + 8 and of value row r.
__device__ __forceinline__ void multiply_pieces(float* c, uint4 top, uint4 bottom, uint4 values) {
    u32 first[4] = {top.x, bottom.x, top.y, bottom.y}, second[4] = {top.z, bottom.z, top.w, bottom.w};
    multiply(c, first, values.x, values.y);
    multiply(c, second, values.z, values.w);
}
#endif

// Data that other blocks of the same launch wrote: past L1.
__device__ __forceinline__ float fresh(const float* at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

// Whether this block is the last of `count` to get here; what the others wrote before is then visible to it. The
// counter is zero again afterwards. All threads of the block call it.
__device__ __forceinline__ bool last_to_arrive(u32* counter, u32 count) {
    __shared__ u32 before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicInc(counter, count - 1);
    __syncthreads();
    bool last = before == count - 1;
    if (last) __threadfence();
    return last;
}

// A kernel that is launched while the one before it in the stream still ends (programmatic dependent launch) reads what
// others wrote only after this. Every block calls it.
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start, up to its `await_inputs`, once all blocks of this launch have come here: for one
// that takes little room and whose successor has something to fetch meanwhile.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
