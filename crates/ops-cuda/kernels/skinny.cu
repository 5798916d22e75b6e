// y[t, o] = Σ_k x[t, k] · w[o, k] for few rows: a warp takes OUTS rows of w, reads them once in 16-byte pieces and
// meets them with up to ROWS rows of x, which stay in L1.
//
// x [T, K] T, w [O, K] T, y [T, O] fp32 or T. Bytes: O·K of weights dominate; each is read once for every ROWS rows.
// Floor, bf16, H100 at 3.35 TB/s: qkv of North (5120 × 2048, 21 MB) 6.3 us; its head (262144 × 2048, 1.07 GB) 321 us.
// Measured (one row, H100 80GB HBM3, ncu with cold caches, 2026-11-23): qkv 10.4 us, head 341 us.

struct SkinnyParams {
    void* y;
    const T* x;
    const T* w;
    u32 rows;
    u32 outs;
    u32 inner;
    u32 y_f32;
};

__device__ __forceinline__ void put(const SkinnyParams& p, u32 row, u32 out, float v) {
    u64 at = (u64)row * p.outs + out;
    if (p.y_f32) {
        ((float*)p.y)[at] = v;
    } else {
        ((T*)p.y)[at] = narrow(v);
    }
}

// One step: PIECES vectors of each weight row in flight before the first is used.
template <int ROWS, int OUTS, int PIECES>
__device__ __forceinline__ void step(const T* const* w, const T* const* x, u32 k, float (*sums)[OUTS]) {
    uint4 weights[PIECES][OUTS];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int o = 0; o < OUTS; o++) weights[i][o] = stream16(w[o] + k + i * WARP * VECTOR);
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            uint4 values = load16(x[r] + k + i * WARP * VECTOR);
#pragma unroll
            for (int o = 0; o < OUTS; o++) sums[r][o] = dot16(values, weights[i][o], sums[r][o]);
        }
    }
}

template <int ROWS, int OUTS, int PIECES>
__device__ __forceinline__ void skinny(const SkinnyParams& p) {
    u32 lane = threadIdx.x % WARP;
    u32 out = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * OUTS;
    u32 row = blockIdx.y * ROWS;
    await_inputs();
    if (out >= p.outs) return;
    const T *w[OUTS], *x[ROWS];
    // A row beyond the end repeats the last one; its sum is not stored.
#pragma unroll
    for (int o = 0; o < OUTS; o++) w[o] = p.w + (u64)min(out + o, p.outs - 1) * p.inner;
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = p.x + (u64)min(row + r, p.rows - 1) * p.inner;
    float sums[ROWS][OUTS] = {};
    u32 k = lane * VECTOR;
    for (; k + (PIECES - 1) * WARP * VECTOR < p.inner; k += PIECES * WARP * VECTOR) {
        step<ROWS, OUTS, PIECES>(w, x, k, sums);
    }
    for (; k < p.inner; k += WARP * VECTOR) step<ROWS, OUTS, 1>(w, x, k, sums);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            float v = warp_sum(sums[r][o]);
            if (lane == 0 && row + r < p.rows && out + o < p.outs) put(p, row + r, out + o, v);
        }
    }
}

#if BF16
// On the tensor cores: a block takes OUTS·16 rows of w and up to NT·8 rows of x, its warps share K in pieces of 64, and
// what they summed is added up in shared memory. Each weight is read once for all rows of x; needs K a multiple of 8.
#define SHARERS 8
template <int NT, int OUTS, int UNITS>
__device__ __forceinline__ void skinny_tiles(const SkinnyParams& p) {
    extern __shared__ float partial[];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r = lane / 4, c = lane % 4;
    u32 first_out = blockIdx.x * OUTS * 16, first_row = blockIdx.y * NT * 8;
    await_inputs();
    const T *w[OUTS][2], *x[NT];
    // Rows beyond the end repeat the last one; their sums are not stored.
#pragma unroll
    for (int o = 0; o < OUTS; o++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            w[o][half] = p.w + (u64)min(first_out + o * 16 + half * 8 + r, p.outs - 1) * p.inner;
        }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) x[n] = p.x + (u64)min(first_row + n * 8 + r, p.rows - 1) * p.inner;
    float sums[OUTS][NT][4] = {};
    auto meet = [&](u32 first, auto whole) {
        // Everything that a warp reads in one round is on its way before the first product.
        uint4 weights[UNITS * 2][OUTS][2];
        auto load = [&](const T* from, int i, bool once) {
            u32 k = first + i / 2 * SHARERS * 64 + i % 2 * 32;
            if (!decltype(whole)::value && k >= p.inner) return make_uint4(0, 0, 0, 0);
            return once ? stream16(from + k) : load16(from + k);
        };
#pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
#pragma unroll
            for (int o = 0; o < OUTS; o++) weights[i][o][0] = load(w[o][0], i, true), weights[i][o][1] = load(w[o][1], i, true);
        }
#pragma unroll
        for (int i = 0; i < UNITS * 2; i++) {
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 values = load(x[n], i, false);
#pragma unroll
                for (int o = 0; o < OUTS; o++) multiply_pieces(sums[o][n], weights[i][o][0], weights[i][o][1], values);
            }
        }
    };
    // All lanes of a warp go through the same rounds: the tensor cores need them together.
    for (u32 k = warp * 64; k < p.inner; k += SHARERS * 64 * UNITS) {
        if (k + SHARERS * 64 * (UNITS - 1) + 64 <= p.inner) {
            meet(k + c * 8, Yes());
        } else {
            meet(k + c * 8, No());
        }
    }
    constexpr u32 EACH = OUTS * 16 * NT * 8;
#pragma unroll
    for (int o = 0; o < OUTS; o++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 row = n * 8 + c * 2 + e % 2, out = o * 16 + e / 2 * 8 + r;
                partial[warp * EACH + row * OUTS * 16 + out] = sums[o][n][e];
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < EACH; i += SHARERS * WARP) {
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < SHARERS; s++) sum += partial[s * EACH + i];
        u32 row = first_row + i / (OUTS * 16), out = first_out + i % (OUTS * 16);
        if (row < p.rows && out < p.outs) put(p, row, out, sum);
    }
}

extern "C" __global__ void __launch_bounds__(256, 4) tiles8(const SkinnyParams p) { skinny_tiles<1, 1, 2>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) tiles16(const SkinnyParams p) { skinny_tiles<2, 1, 2>(p); }
extern "C" __global__ void __launch_bounds__(256) tiles32(const SkinnyParams p) { skinny_tiles<4, 2, 1>(p); }
extern "C" __global__ void __launch_bounds__(256) tiles64(const SkinnyParams p) { skinny_tiles<8, 2, 1>(p); }
#endif

extern "C" __global__ void __launch_bounds__(128) skinny1(const SkinnyParams p) { skinny<1, 1, 4>(p); }
extern "C" __global__ void __launch_bounds__(128) skinny2(const SkinnyParams p) { skinny<2, 2, 2>(p); }
extern "C" __global__ void __launch_bounds__(128) skinny4(const SkinnyParams p) { skinny<4, 2, 2>(p); }
extern "C" __global__ void __launch_bounds__(128) skinny8(const SkinnyParams p) { skinny<8, 2, BF16 ? 2 : 1>(p); }

// Any inner size, also one whose rows are not aligned: one number at a time, one row of x to a block.
extern "C" __global__ void __launch_bounds__(128) skinny_unaligned(const SkinnyParams p) {
    u32 lane = threadIdx.x % WARP;
    u32 out = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    u32 row = blockIdx.y;
    await_inputs();
    if (out >= p.outs) return;
    float sum = 0.0f;
    for (u32 k = lane; k < p.inner; k += WARP) {
        sum = fmaf(widen(p.x[(u64)row * p.inner + k]), widen(p.w[(u64)out * p.inner + k]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) put(p, row, out, sum);
}
