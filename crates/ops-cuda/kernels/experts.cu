// Routed experts, after routing.cuh. Letters: T rows, E experts of the model, k chosen, H hidden, I width of one expert. A
// pair is (row, one of its k choices): pair = row · k + choice.
//
// Few rows: a warp reads one gate row and one up row of the expert (gate_up), then one row of each chosen expert
// (down), so a step of one row reads each chosen expert once. Bytes of a row: 3·k·I·H of weights; North (k 8, I 768,
// H 2048, bf16): 75 MB a layer, floor 22.5 us on an H100 at 3.35 TB/s; Command A+ (k 8, I 4096, H 4096): 805 MB, 240 us.
// For 3 to 256 rows expert_up_tiles and expert_down_tiles read each touched expert once; more rows are grouped for gemm.cu.
// Grouping 8192 rows (H200, events, 2026-11-30): one block 77.6 us, several 17.7 us.
// Measured (North, one row, H200, inside a recorded step beside attention, 2026-11-30): expert_up with the choice 20 us,
// expert_down 11 us. H100, by themselves: 23.4 and 13.6 us. For 8192 rows: combine 82 us of bf16 (217 us of fp32 on an H100).
// All launches of a layer's routed experts (H200, cohort bench kernels, 2026-11-24): 64 rows 331 us, 87 % of the floor
// (1.21 GB of weights); 256 rows 345 us, 84 %.

struct ExpertUpParams {
    T* activated;       // [T·k, I]
    const T* x;         // [T, H]
    const T* gate_up;   // [experts of this rank, 2 I, H]
    const u32* experts; // [T, k]
    u32 top_k;
    u32 first; // expert 0 of this rank
    u32 local; // experts of this rank
    u32 hidden;
    u32 inter;
    u32 pairs;           // T·k
    RouteParams route;   // where the choices are to be made here: its experts are those above, its logits are not read
    const float* logits; // [T, E] of `router`, whose choices are made here; null: they are there (expert_up)
};

// Blocks that fit beside attention's are what counts: with 64 registers instead of 48 a rank of two needs a second round of
// them, and a step takes 4 % longer (two H200s, 2026-11-30). Without a bound sm_100a is given 40, and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define UP_BOUNDS __launch_bounds__(128, 8)
#else
#define UP_BOUNDS __launch_bounds__(128)
#endif

// activated[pair, i] = silu(gate) · up with gate = x · w[e, i], up = x · w[e, I + i], rounded as the reference stores.
//
// Where `router` left the choice, every block makes its own out of the logits, at the price of the load that it would
// wait for anyway: that spares the router's blocks waiting for each other. One block more for each pair leaves the choices
// of its row for expert_down.
extern "C" __global__ void UP_BOUNDS expert_up(const ExpertUpParams p) {
    __shared__ u32 own;
    u32 lane = threadIdx.x % WARP;
    u32 i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    u32 pair = blockIdx.y, row = pair / p.top_k, expert;
    await_inputs();
    if (p.logits) {
        auto load = [&](u32 e) { return p.logits[(u64)row * p.route.count + e]; };
        if (blockIdx.x + 1 == gridDim.x) {
            if (pair % p.top_k == 0 && threadIdx.x < WARP) choose(p.route, row, load);
            return;
        }
        if (threadIdx.x < WARP) {
            u32 made = choice(p.route, row, pair % p.top_k, load);
            if (lane == 0) own = made;
        }
        __syncthreads();
        expert = own;
    } else {
        expert = p.experts[pair];
    }
    if (i >= p.inter || expert < p.first || expert - p.first >= p.local) return;
    expert -= p.first;
    const T* x = p.x + (u64)row * p.hidden;
    const T* gate = p.gate_up + ((u64)expert * 2 * p.inter + i) * p.hidden;
    const T* up = gate + (u64)p.inter * p.hidden;
    float g = 0.0f, u = 0.0f;
    if (p.hidden % VECTOR == 0) {
        const u32 stride = WARP * VECTOR;
        u32 k = lane * VECTOR;
        for (; k + 3 * stride < p.hidden; k += 4 * stride) {
            uint4 gates[4], ups[4];
#pragma unroll
            for (int n = 0; n < 4; n++) gates[n] = stream16(gate + k + n * stride), ups[n] = stream16(up + k + n * stride);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint4 values = load16(x + k + n * stride);
                g = dot16(values, gates[n], g);
                u = dot16(values, ups[n], u);
            }
        }
        for (; k < p.hidden; k += stride) {
            uint4 values = load16(x + k);
            g = dot16(values, stream16(gate + k), g);
            u = dot16(values, stream16(up + k), u);
        }
    } else {
        for (u32 k = lane; k < p.hidden; k += WARP) {
            g = fmaf(widen(x[k]), widen(gate[k]), g);
            u = fmaf(widen(x[k]), widen(up[k]), u);
        }
    }
    g = rounded(warp_sum(g)), u = rounded(warp_sum(u));
    if (lane == 0) p.activated[(u64)pair * p.inter + i] = narrow(rounded(g * sigmoid(g)) * u);
}

struct ExpertDownParams {
    float* out;           // [T, H]
    const T* activated;   // [T·k, I]
    const T* down;        // [experts of this rank, H, I]
    const u32* experts;   // [T, k]
    const float* weights; // [T, k]
    u32 top_k;
    u32 first;
    u32 local;
    u32 hidden;
    u32 inter;
};

// Choices of a row at most: their experts and weights wait in shared memory.
#define CHOICES_MAX 64
// Vectors of weights that a lane has in flight.
#define FLIGHT (BF16 ? 6 : 4)

// out[t, h] = Σ over the choices on this rank of weight · (activated · w[e, h]): a warp per element. Vectors are
// numbered through all choices, so that a lane has loads of several experts on their way at once.
extern "C" __global__ void __launch_bounds__(128) expert_down(const ExpertDownParams p) {
    __shared__ float weights[CHOICES_MAX];
    __shared__ u32 experts[CHOICES_MAX];
    u32 lane = threadIdx.x % WARP, row = blockIdx.y;
    u32 h = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    await_inputs();
    if (threadIdx.x < p.top_k) {
        u32 expert = p.experts[row * p.top_k + threadIdx.x];
        bool own = expert >= p.first && expert - p.first < p.local;
        // Another rank's choice weighs nothing here and is not read.
        experts[threadIdx.x] = own ? expert - p.first : 0;
        weights[threadIdx.x] = own ? p.weights[row * p.top_k + threadIdx.x] : 0.0f;
    }
    __syncthreads();
    if (h >= p.hidden) return;
    const T* activated = p.activated + (u64)row * p.top_k * p.inter;
    float sum = 0.0f;
    if (p.inter % VECTOR == 0) {
        u32 per_choice = p.inter / VECTOR, choice = 0, k = lane;
        auto settle = [&]() {
            while (k >= per_choice) k -= per_choice, choice++;
        };
        settle();
        while (choice < p.top_k) {
            uint4 w[FLIGHT], x[FLIGHT];
            float scale[FLIGHT];
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                bool some = choice < p.top_k;
                u32 c = some ? choice : 0, at = some ? k * VECTOR : 0;
                scale[i] = some ? weights[c] : 0.0f;
                w[i] = x[i] = make_uint4(0, 0, 0, 0);
                if (scale[i] != 0.0f) {
                    w[i] = stream16(p.down + ((u64)experts[c] * p.hidden + h) * p.inter + at);
                    x[i] = load16(activated + c * p.inter + at);
                }
                k += WARP;
                settle();
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) sum = fmaf(scale[i], dot16(x[i], w[i], 0.0f), sum);
        }
    } else {
        for (u32 at = lane; at < p.inter * p.top_k; at += WARP) {
            u32 choice = at / p.inter, k = at % p.inter;
            if (weights[choice] == 0.0f) continue;
            float w = widen(p.down[((u64)experts[choice] * p.hidden + h) * p.inter + k]);
            sum = fmaf(weights[choice] * widen(activated[choice * p.inter + k]), w, sum);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) p.out[(u64)row * p.hidden + h] = sum;
}

#if BF16
// Several rows on the tensor cores: a block takes one expert and finds the pairs that chose it; each of its warps takes
// 16 rows of weights and reads them once for up to 32 pairs. I and H are multiples of 8.
#define PAIRS_MAX 256
// Pieces of each weight row that a lane has in flight.
#define EXPERT_FLIGHT 6

// The pairs that chose `expert`, in shared memory; at most one of a row.
__device__ __forceinline__ u32 find_pairs(const u32* experts, u32 pairs, u32 expert, u32* found) {
    __shared__ u32 count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (u32 pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        if (experts[pair] == expert) found[atomicAdd(&count, 1u)] = pair;
    }
    __syncthreads();
    return count;
}

// sums[n] += weights · values over `inner`: the 16 weight rows are `top` and `bottom` of each lane's r.
template <int NT>
__device__ __forceinline__ void expert_tile(const T* top, const T* bottom, const T* const* x, u32 inner, float (*sums)[4]) {
    auto meet = [&](u32 first, auto whole) {
        uint4 weights[EXPERT_FLIGHT][2];
        auto inside = [&](u32 k) { return decltype(whole)::value || k < inner; };
#pragma unroll
        for (int i = 0; i < EXPERT_FLIGHT; i++) {
            u32 k = first + i * 32;
            weights[i][0] = inside(k) ? stream16(top + k) : make_uint4(0, 0, 0, 0);
            weights[i][1] = inside(k) ? stream16(bottom + k) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < EXPERT_FLIGHT; i++) {
            u32 k = first + i * 32;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 values = inside(k) ? load16(x[n] + k) : make_uint4(0, 0, 0, 0);
                multiply_pieces(sums[n], weights[i][0], weights[i][1], values);
            }
        }
    };
    // All lanes of a warp go through the same rounds: the tensor cores need them together.
    u32 k = 0, piece = threadIdx.x % 4 * 8;
    for (; k + EXPERT_FLIGHT * 32 <= inner; k += EXPERT_FLIGHT * 32) meet(k + piece, Yes());
    if (k < inner) meet(k + piece, No());
}

template <int NT>
__device__ __forceinline__ void up_pairs(const ExpertUpParams& p, u32 expert, u32 i, const u32* found, u32 count) {
    u32 lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    const T* gate = p.gate_up + ((u64)expert * 2 * p.inter + i + r) * p.hidden;
    for (u32 first = 0; first < count; first += NT * 8) {
        const T* x[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) x[n] = p.x + (u64)(found[min(first + n * 8 + r, count - 1)] / p.top_k) * p.hidden;
        float sums[NT][4] = {};
        expert_tile<NT>(gate, gate + (u64)p.inter * p.hidden, x, p.hidden, sums);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 at = first + n * 8 + c * 2 + e;
                if (at >= count) continue;
                float g = rounded(sums[n][e]), u = rounded(sums[n][2 + e]);
                p.activated[(u64)found[at] * p.inter + i + r] = narrow(rounded(g * sigmoid(g)) * u);
            }
        }
    }
}

// As expert_up: a warp takes eight gate rows and the eight up rows that belong to them.
extern "C" __global__ void __launch_bounds__(128) expert_up_tiles(const ExpertUpParams p) {
    __shared__ u32 found[PAIRS_MAX];
    u32 expert = blockIdx.y, i = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * 8;
    await_inputs();
    u32 count = find_pairs(p.experts, p.pairs, expert + p.first, found);
    if (count == 0 || i >= p.inter) return;
    if (count <= 8) return up_pairs<1>(p, expert, i, found, count);
    if (count <= 16) return up_pairs<2>(p, expert, i, found, count);
    up_pairs<4>(p, expert, i, found, count);
}

struct ExpertDownTilesParams {
    float* y;           // [T·k, H]
    const T* activated; // [T·k, I]
    const T* down;      // [experts of this rank, H, I]
    const u32* experts; // [T, k]
    u32 pairs;
    u32 first;
    u32 hidden;
    u32 inter;
};

template <int NT>
__device__ __forceinline__ void down_pairs(const ExpertDownTilesParams& p, u32 expert, u32 h, const u32* found, u32 count) {
    u32 lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    const T* w = p.down + (u64)expert * p.hidden * p.inter;
    const T *top = w + (u64)min(h + r, p.hidden - 1) * p.inter, *bottom = w + (u64)min(h + r + 8, p.hidden - 1) * p.inter;
    for (u32 first = 0; first < count; first += NT * 8) {
        const T* x[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) x[n] = p.activated + (u64)found[min(first + n * 8 + r, count - 1)] * p.inter;
        float sums[NT][4] = {};
        expert_tile<NT>(top, bottom, x, p.inter, sums);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 at = first + n * 8 + c * 2 + e % 2, out = h + e / 2 * 8 + r;
                if (at < count && out < p.hidden) p.y[(u64)found[at] * p.hidden + out] = sums[n][e];
            }
        }
    }
}

// y[pair] = activated · w[e]; `combine` adds up a row's pairs.
extern "C" __global__ void __launch_bounds__(128) expert_down_tiles(const ExpertDownTilesParams p) {
    __shared__ u32 found[PAIRS_MAX];
    u32 expert = blockIdx.y, h = (blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * 16;
    await_inputs();
    u32 count = find_pairs(p.experts, p.pairs, expert + p.first, found);
    if (count == 0 || h >= p.hidden) return;
    if (count <= 8) return down_pairs<1>(p, expert, h, found, count);
    if (count <= 16) return down_pairs<2>(p, expert, h, found, count);
    down_pairs<4>(p, expert, h, found, count);
}
#endif

struct GroupParams {
    u32* sorted;        // [slots] pair, or NO_PAIR
    u32* tile_expert;   // [slots / tile] expert of this rank
    u32* tiles;         // [1] tiles in use
    const u32* experts; // [pairs]
    u32 pairs;
    u32 first;
    u32 local;
    u32 tile; // slots of one tile; each expert starts a new one
    u32* starts;  // [blocks, local]: where the pairs of each block go (count_pairs, place_pairs)
    u32* arrived; // [1], zero (count_pairs)
};

#define NO_PAIR 0xffffffffu

// The pairs of this rank's experts from `from` up to `to`, FLIGHT of them on their way at once.
template <int FLIGHT_PAIRS, class Each>
__device__ __forceinline__ void for_each_pair(const GroupParams& p, u32 from, u32 to, Each each) {
    for (u32 first = from + threadIdx.x; first < to; first += FLIGHT_PAIRS * blockDim.x) {
        u32 experts[FLIGHT_PAIRS];
#pragma unroll
        for (u32 i = 0; i < FLIGHT_PAIRS; i++) {
            u32 pair = first + i * blockDim.x;
            experts[i] = pair < to ? p.experts[pair] : NONE;
        }
#pragma unroll
        for (u32 i = 0; i < FLIGHT_PAIRS; i++) {
            if (experts[i] >= p.first && experts[i] - p.first < p.local) each(experts[i] - p.first, first + i * blockDim.x);
        }
    }
}

// Where each expert's slots start, from its count: one warp.
__device__ __forceinline__ void start_tiles(const GroupParams& p, const u32* counts, u32* starts) {
    if (threadIdx.x >= WARP) return;
    u32 before = 0;
    for (u32 first = 0; first < p.local; first += WARP) {
        u32 e = first + threadIdx.x, own = e < p.local ? (counts[e] + p.tile - 1) / p.tile : 0, sum = own;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            u32 left = __shfl_up_sync(ALL, sum, step);
            if (threadIdx.x >= step) sum += left;
        }
        if (e < p.local) starts[e] = (before + sum - own) * p.tile;
        before += __shfl_sync(ALL, sum, WARP - 1);
    }
    if (threadIdx.x == 0) *p.tiles = before;
}

// Pairs by expert, one block: counts in shared memory, offsets by one warp, then a scatter. The order inside an
// expert varies from run to run; every pair is computed by itself, so results do not.
extern "C" __global__ void __launch_bounds__(1024) group_pairs(const GroupParams p) {
    extern __shared__ u32 shared[];
    u32 *counts = shared, *starts = shared + p.local;
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) counts[e] = 0;
    await_inputs();
    __syncthreads();
    for_each_pair<16>(p, 0, p.pairs, [&](u32 expert, u32) { atomicAdd(&counts[expert], 1u); });
    __syncthreads();
    start_tiles(p, counts, starts);
    __syncthreads();
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) {
        for (u32 i = 0; i * p.tile < counts[e]; i++) p.tile_expert[starts[e] / p.tile + i] = e;
        u32 end = (counts[e] + p.tile - 1) / p.tile * p.tile;
        for (u32 slot = counts[e]; slot < end; slot++) p.sorted[starts[e] + slot] = NO_PAIR;
    }
    __syncthreads();
    for_each_pair<16>(p, 0, p.pairs, [&](u32 expert, u32 pair) { p.sorted[atomicAdd(&starts[expert], 1u)] = pair; });
}

// The same in two launches of many blocks, each with pairs of its own, for very many pairs. The first counts; its last
// block finds where each expert's slots start, and those of each block in them.
extern "C" __global__ void __launch_bounds__(1024) count_pairs(const GroupParams p) {
    extern __shared__ u32 shared[];
    u32 *counts = shared, *starts = shared + p.local;
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) counts[e] = 0;
    await_inputs();
    __syncthreads();
    u32 each = (p.pairs + gridDim.x - 1) / gridDim.x, from = min(blockIdx.x * each, p.pairs);
    for_each_pair<4>(p, from, min(from + each, p.pairs), [&](u32 expert, u32) { atomicAdd(&counts[expert], 1u); });
    __syncthreads();
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) p.starts[blockIdx.x * p.local + e] = counts[e];
    if (!last_to_arrive(p.arrived, gridDim.x)) return;
    auto of_block = [&](u32 block, u32 e) {
        u32 v;
        asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p.starts + block * p.local + e) : "memory");
        return v;
    };
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) {
        u32 sum = 0;
#pragma unroll 8
        for (u32 block = 0; block < gridDim.x; block++) sum += of_block(block, e);
        counts[e] = sum;
    }
    __syncthreads();
    start_tiles(p, counts, starts);
    __syncthreads();
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) {
        u32 at = starts[e];
#pragma unroll 8
        for (u32 block = 0; block < gridDim.x; block++) {
            u32 own = of_block(block, e);
            p.starts[block * p.local + e] = at;
            at += own;
        }
        for (u32 i = 0; i * p.tile < counts[e]; i++) p.tile_expert[starts[e] / p.tile + i] = e;
    }
    for (u32 i = threadIdx.x; i < p.local * p.tile; i += blockDim.x) {
        u32 e = i / p.tile, slot = counts[e] + i % p.tile;
        if (slot < (counts[e] + p.tile - 1) / p.tile * p.tile) p.sorted[starts[e] + slot] = NO_PAIR;
    }
}

extern "C" __global__ void __launch_bounds__(1024) place_pairs(const GroupParams p) {
    extern __shared__ u32 shared[];
    await_inputs();
    for (u32 e = threadIdx.x; e < p.local; e += blockDim.x) shared[e] = p.starts[blockIdx.x * p.local + e];
    __syncthreads();
    u32 each = (p.pairs + gridDim.x - 1) / gridDim.x, from = min(blockIdx.x * each, p.pairs);
    for_each_pair<4>(p, from, min(from + each, p.pairs), [&](u32 expert, u32 pair) { p.sorted[atomicAdd(&shared[expert], 1u)] = pair; });
}

struct CombineParams {
    float* out;           // [T, H]
    const void* y;        // [T·k, H], fp32 or T; rows of other ranks' pairs hold nothing
    const u32* experts;   // [T, k]
    const float* weights; // [T, k]
    u32 top_k;
    u32 first;
    u32 local;
    u32 hidden;
    u32 y_f32;
};

// Neighbours that a thread adds up.
#define COMBINED 8

// out[t] = Σ weight · y[pair], in the order of the choices.
extern "C" __global__ void __launch_bounds__(256) combine(const CombineParams p) {
    u32 row = blockIdx.x, h = (blockIdx.y * blockDim.x + threadIdx.x) * COMBINED;
    await_inputs();
    if (h >= p.hidden) return;
    bool whole = p.hidden % COMBINED == 0;
    float sum[COMBINED] = {};
#pragma unroll 4
    for (u32 i = 0; i < p.top_k; i++) {
        u32 pair = row * p.top_k + i, expert = p.experts[pair] - p.first;
        if (p.experts[pair] < p.first || expert >= p.local) continue;
        float weight = p.weights[pair], y[COMBINED];
        u64 at = (u64)pair * p.hidden + h;
        if (whole && (p.y_f32 || !BF16)) {
            unpack_f32(load16((const float*)p.y + at), y), unpack_f32(load16((const float*)p.y + at + 4), y + 4);
        } else if (whole) {
            unpack(load16((const T*)p.y + at), y);
        } else {
#pragma unroll
            for (u32 n = 0; n < COMBINED; n++) y[n] = h + n < p.hidden ? either(p.y, p.y_f32, at + n) : 0.0f;
        }
#pragma unroll
        for (u32 n = 0; n < COMBINED; n++) sum[n] = fmaf(weight, y[n], sum[n]);
    }
    float* out = p.out + (u64)row * p.hidden + h;
#pragma unroll
    for (u32 n = 0; n < COMBINED; n += 4) {
        if (whole) {
            *(float4*)(out + n) = make_float4(sum[n], sum[n + 1], sum[n + 2], sum[n + 3]);
        } else {
#pragma unroll
            for (u32 i = n; i < n + 4; i++) {
                if (h + i < p.hidden) out[i] = sum[i];
            }
        }
    }
}
