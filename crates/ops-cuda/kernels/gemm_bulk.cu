// c = a · wᵀ for very many rows on Hopper, after gemm.cu: the same products. Blocks stay on their
// multiprocessor and take one tile after the other, so that the loads of a tile run during the epilogue of the one before.
// A warpgroup brings what two others multiply, four stages ahead: weights by the copy engine (TMA), and rows of a too where
// they follow each other; rows that are looked up by cp.async. Each warpgroup takes every other 64 rows of a tile and skips
// them where they are nobody's. Tiles of 128 rows and 256 outs; the row tiles whose outs are gone through together share
// weights in L2, and rows of a. For sm_90a alone.
// Operations 2·M·N·K; floor at 790 TFLOP/s (H200), North, 8192 rows: qkv 217 us, o 174 us, gate_up of 65536 pairs 522 us,
// down 261 us (and 128 us to write its 537 MB at 4.2 TB/s). Measured (H200, events, 2026-11-30): 232, 186, 707 and 419 us, so
// 94, 94, 74 and 62 % of the floor. For 2048 rows gate_up 264 and down 167 us, where the weights alone take 192 and 96 us.
// Command A+, 8192 rows: qkv 1614 us, o 1437 us, 97 %; gate_up 8.84 ms, down 5.39 ms, 63 and 52 %.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#ifndef BULK_STAGES
#define BULK_STAGES 4
#endif
#ifndef BULK_FENCE
#define BULK_FENCE 1
#endif
#define BULK_THREADS 384
// Row tiles whose outs are gone through together: what they share stays in L2.
#ifndef BULK_TOGETHER
#define BULK_TOGETHER 8
#endif

struct GemmBulkParams {
    GemmParams gemm;
    u32 c_by_place; // row of c = place in `sorted`, not what stands there
    TensorMap w;    // [E · N, K], boxes of half a tile's outs and 64
    TensorMap a;    // [rows, K], boxes of 128 and 64, unless rows are looked up
};

__device__ __forceinline__ u32 pair_of(float first, float second) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// A copy that arrives at a barrier when it has ended, as do all before it of this thread.
__device__ __forceinline__ void copies_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What is the same in all lanes, said so that the compiler knows.
__device__ __forceinline__ u32 alike(u32 v) { return __shfl_sync(ALL, v, 0); }

// The logistic function but for the last bits of fp32, which its rounding to bf16 hides.
__device__ __forceinline__ float quick_sigmoid(float v) {
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
    return result;
}

template <int BM, int BN, bool GATED>
struct Bulk {
    static constexpr u32 OUTS = GATED ? BN / 2 : BN;
    static constexpr u32 A_BYTES = BM * 128, STAGE_BYTES = (BM + BN) * 128;
    const GemmBulkParams& params;
    const GemmParams& p;
    u32 stages;
    u32 barriers; // full, then empty ones
    u32 outs;
    u32 row_tiles;
    u32 out_tiles;
    u32 steps;

    __device__ __forceinline__ u32 full(u32 stage) const { return barriers + stage * 8; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return barriers + (BULK_STAGES + stage) * 8; }

    // Tile number `i`: some row tiles together, their outs one after the other.
    __device__ __forceinline__ void place(u32 i, u32& row_tile, u32& out_tile) const {
        u32 together = BULK_TOGETHER * out_tiles, first = i / together * BULK_TOGETHER, rest = i % together;
        u32 count = min(BULK_TOGETHER, row_tiles - first);
        row_tile = first + rest % count, out_tile = rest / count;
    }

    template <bool GATHERED>
    __device__ __forceinline__ void bring() const {
        u32 thread = threadIdx.x, stage = 0, parity = 1;
        for (u32 i = blockIdx.x; i < row_tiles * out_tiles; i += gridDim.x) {
            u32 row_tile, out_tile;
            place(i, row_tile, out_tile);
            u32 first_row = row_tile * BM;
            u32 w_row = (p.tile_expert ? p.tile_expert[row_tile] * p.n : 0) + out_tile * OUTS;
            u32 column = thread % 8, line = thread / 8, rows[GATHERED ? BM / 16 : 1];
            if (GATHERED) {
#pragma unroll
                for (int n = 0; n < BM / 16; n++) {
                    u32 row = p.sorted[first_row + line + n * 16];
                    rows[n] = row == NO_PAIR ? NO_PAIR : row / p.a_divisor;
                }
            }
#pragma unroll 1
            for (u32 step = 0; step < steps; step++) {
                u32 a = stages + stage * STAGE_BYTES, w = a + A_BYTES;
                barrier_wait(empty(stage), parity);
                if (thread == 0) {
                    barrier_expect(full(stage), GATHERED ? BN * 128 : STAGE_BYTES);
                    constexpr u32 HALF = BN * 64;
                    u32 other = w_row + (GATED ? outs : BN / 2);
                    copy_box(w, params.w, step * BK, w_row, full(stage));
                    copy_box(w + HALF, params.w, step * BK, other, full(stage));
                    if (!GATHERED) {
#pragma unroll
                        for (int n = 0; n < BM / 128; n++) copy_box(a + n * 128 * 128, params.a, step * BK, first_row + n * 128, full(stage));
                    }
                }
                if (GATHERED) {
                    u32 k = step * BK + column * 8;
#pragma unroll
                    for (int n = 0; n < BM / 16; n++) {
                        bool here = rows[n] != NO_PAIR && k < p.k;
                        copy16(a + piece(line + n * 16, column), here ? p.a + (u64)rows[n] * p.k + k : p.a, here);
                    }
                    copies_arrive(full(stage));
                }
                if (++stage == BULK_STAGES) stage = 0, parity ^= 1;
            }
        }
    }

    // This warp has done with a stage.
    __device__ __forceinline__ void leave(u32 stage) const {
        if (threadIdx.x % WARP == 0) barrier_arrive(empty(stage));
    }

    // A tile's products for COUNT times 64 rows of this warpgroup.
    template <int COUNT, bool GATHERED>
    __device__ __forceinline__ void multiply_tile(float (*sums)[BN / 2], u32 group, u32& stage, u32& parity) const {
        u32 before = 0;
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            barrier_wait(full(stage), parity);
            // Copies by cp.async are ordinary stores to wgmma.
            if (GATHERED && BULK_FENCE) shared_written();
            u32 a = stages + stage * STAGE_BYTES + group * 64 * 128, w = stages + stage * STAGE_BYTES + A_BYTES;
            if (COUNT > 0) {
#pragma unroll
                for (int n = 0; n < COUNT; n++) pinned<BN / 2>(sums[n]);
                group_fence();
#pragma unroll
                for (int n = 0; n < COUNT; n++) {
#pragma unroll
                    for (u32 k = 0; k < BK / 16; k++) multiply_rows<BN>(sums[n], swizzled(a + n * 128 * 128 + k * 32), swizzled(w + k * 32), step + k > 0);
                }
                group_commit();
                group_wait<1>();
                if (step > 0) leave(before);
                before = stage;
            } else {
                leave(stage);
            }
            if (++stage == BULK_STAGES) stage = 0, parity ^= 1;
        }
        if (COUNT > 0) {
            group_wait<0>();
#pragma unroll
            for (int n = 0; n < COUNT; n++) pinned<BN / 2>(sums[n]);
            leave(before);
        }
    }

    // Half of 16 rows of a warp: `row` of c is this thread's, if it is anybody's.
    __device__ __forceinline__ void store(const float* sums, u32 first_out, u32 row, bool here) const {
        u32 c = threadIdx.x % 4;
        if (GATED || !p.c_f32) {
#pragma unroll
            for (int n = 0; n < OUTS / 8; n += 4) {
                u32 own[4], got[4];
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    float v[2] = {sums[(n + t) * 4], sums[(n + t) * 4 + 1]};
                    if (GATED) {
                        u32 gates = pair_of(v[0], v[1]), ups = pair_of(sums[BN / 4 + (n + t) * 4], sums[BN / 4 + (n + t) * 4 + 1]);
                        float first = low(gates), second = high(gates);
                        u32 active = pair_of(first * quick_sigmoid(first), second * quick_sigmoid(second));
                        v[0] = low(active) * low(ups), v[1] = high(active) * high(ups);
                    }
                    own[t] = pair_of(v[0], v[1]);
                }
                // Four lanes have two numbers each of eight neighbours, and exchange them for eight of one.
                auto at = [](const u32* words, u32 i) { return i & 2 ? (i & 1 ? words[3] : words[2]) : (i & 1 ? words[1] : words[0]); };
#pragma unroll
                for (int s = 0; s < 4; s++) got[s] = __shfl_xor_sync(ALL, at(own, c ^ s), s);
                u32 out = first_out + (n + c) * 8;
                if (here && out < outs) *(uint4*)((T*)p.c + (u64)row * outs + out) = make_uint4(at(got, c), at(got, c ^ 1), at(got, c ^ 2), at(got, c ^ 3));
            }
            return;
        }
        bool odd = c & 1;
#pragma unroll
        for (int n = 0; n < OUTS / 8; n += 2) {
            // An even lane takes four numbers of the first eight, an odd one four of the second.
            float own[4] = {sums[n * 4], sums[n * 4 + 1], sums[n * 4 + 4], sums[n * 4 + 5]};
            pinned<4>(own);
            float x = __shfl_xor_sync(ALL, odd ? own[0] : own[2], 1), y = __shfl_xor_sync(ALL, odd ? own[1] : own[3], 1);
            float4 four = odd ? make_float4(x, y, own[2], own[3]) : make_float4(own[0], own[1], x, y);
            u32 out = first_out + (n + odd) * 8 + c / 2 * 4;
            if (here && out < outs) *(float4*)((float*)p.c + (u64)row * outs + out) = four;
        }
    }

    template <bool GATHERED>
    __device__ __forceinline__ void multiply_all() const {
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x % 128 / WARP, group = alike(threadIdx.x / 128 - 1);
        u32 stage = 0, parity = 0;
        for (u32 i = blockIdx.x; i < row_tiles * out_tiles; i += gridDim.x) {
            u32 row_tile, out_tile;
            place(i, row_tile, out_tile);
            // Rows that are nobody's come last.
            auto some = [&](u32 place) { return p.sorted ? p.sorted[place] != NO_PAIR : place < p.m; };
            u32 first_row = row_tile * BM + group * 64, count = 0;
#pragma unroll
            for (int n = 0; n < BM / 128; n++) count += some(first_row + n * 128);
            count = alike(count);
            float sums[BM / 128][BN / 2];
            if (count == 0) {
                multiply_tile<0, GATHERED>(sums, group, stage, parity);
                continue;
            }
            if (BM == 128 || count == BM / 128) {
                multiply_tile<BM / 128, GATHERED>(sums, group, stage, parity);
            } else {
                multiply_tile<1, GATHERED>(sums, group, stage, parity);
            }
#pragma unroll
            for (int n = 0; n < BM / 128; n++) {
                if (n >= count) break;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 place = first_row + n * 128 + warp * 16 + lane / 4 + half * 8, row = p.sorted ? p.sorted[place] : place;
                    bool here = p.sorted ? row != NO_PAIR : row < p.m;
                    store(sums[n] + half * 2, out_tile * OUTS, params.c_by_place ? place : row, here);
                }
            }
        }
    }
};

template <int BM, int BN, bool GATED, bool GATHERED>
__device__ __forceinline__ void gemm_bulk(const GemmBulkParams& params) {
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * BULK_STAGES];
    const GemmParams& p = params.gemm;
    using Tiles = Bulk<BM, BN, GATED>;
    u32 outs = GATED ? p.n / 2 : p.n;
    if (threadIdx.x < BULK_STAGES) {
        barrier_init(shared_address(barriers + threadIdx.x), GATHERED ? 129 : 1);
        barrier_init(shared_address(barriers + BULK_STAGES + threadIdx.x), 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        shared_written();
    }
    await_inputs();
    __syncthreads();
    u32 row_tiles = alike(p.tiles ? *p.tiles : (p.m + BM - 1) / BM);
    const Tiles tiles = {params,
                         p,
                         (shared_address(memory) + 1023) & ~1023u,
                         shared_address(barriers),
                         outs,
                         row_tiles,
                         (outs + Tiles::OUTS - 1) / Tiles::OUTS,
                         (p.k + BK - 1) / BK};
    if (threadIdx.x < 128) {
        FEWER_REGISTERS(72);
        if (GATHERED || threadIdx.x == 0) tiles.template bring<GATHERED>();
    } else {
        MORE_REGISTERS(216);
        tiles.template multiply_all<GATHERED>();
    }
}

extern "C" __global__ void __launch_bounds__(BULK_THREADS, 1) gemm_bulk_plain(const __grid_constant__ GemmBulkParams params) {
    gemm_bulk<128, 256, false, false>(params);
}
extern "C" __global__ void __launch_bounds__(BULK_THREADS, 1) gemm_bulk_gated(const __grid_constant__ GemmBulkParams params) {
    gemm_bulk<128, 256, true, true>(params);
}
#endif
