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

extern "C" __global__ void __launch_bounds__(128) skinny1(const SkinnyParams p) { skinny<1, 1, 4>(p); }
extern "C" __global__ void __launch_bounds__(128) skinny2(const SkinnyParams p) { skinny<2, 2, 2>(p); }
extern "C" __global__ void __launch_bounds__(128) skinny4(const SkinnyParams p) { skinny<4, 2, 2>(p); }
extern "C" __global__ void __launch_bounds__(128) skinny8(const SkinnyParams p) { skinny<8, 2, BF16 ? 2 : 1>(p); }

// Any inner size, also one whose rows are not aligned: one number at a time, one row of x to a block.
extern "C" __global__ void __launch_bounds__(128) skinny_unaligned(const SkinnyParams p) {
    u32 lane = threadIdx.x % WARP;
    u32 out = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    u32 row = blockIdx.y;
    if (out >= p.outs) return;
    float sum = 0.0f;
    for (u32 k = lane; k < p.inner; k += WARP) {
        sum = fmaf(widen(p.x[(u64)row * p.inner + k]), widen(p.w[(u64)out * p.inner + k]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) put(p, row, out, sum);
}
