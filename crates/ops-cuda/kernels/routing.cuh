// Token-choice routing: logits, the k best experts of each row and their weights. Letters as in experts.cu.
//
// Bytes: E·H of weights, once for up to ROUTER_ROWS rows; North (E 128, H 2048, bf16): 0.5 MB, 0.13 us at 4.2 TB/s, so the
// launch and the waits in it are what counts. Measured (North, one row, H200, inside a recorded step, 2026-11-30): 4.9 us from
// the end of the norm; 8.9 us where the blocks wait for each other to choose.

struct RouteParams {
    u32* experts;    // [T, k]
    float* weights;  // [T, k]
    const T* logits; // [T, E]
    u32 rows;
    u32 count; // E
    u32 top_k;
    u32 softmax;     // softmax over the chosen; else the logistic function of each
    u32 renormalize; // divide by the sum
    const u32* position; // [T] PADDING for rows that mean nothing, which choose no expert; null: there are none
};

#define PADDING 0xffffffffu
#define NONE 0xffffffffu

// Larger logits first, then lower numbers, as one integer.
__device__ __forceinline__ u64 rank_key(float v, u32 expert) {
    u32 bits = __float_as_uint(v);
    u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ((u64)ordered << 32) | (u32)~expert;
}

#define KEYS 4

// A row's logits as keys: a lane has those of experts lane, lane + 32, … `Load` reads the logit of an expert. The first
// KEYS of a lane stay in registers; models with more experts look the others up each time.
template <class Load>
struct Ranking {
    u64 keys[KEYS];
    u32 count;
    Load load;

    __device__ __forceinline__ Ranking(u32 experts, Load from) : count(experts), load(from) {
#pragma unroll
        for (u32 i = 0; i < KEYS; i++) {
            u32 e = i * WARP + threadIdx.x % WARP;
            keys[i] = e < count ? rank_key(load(e), e) : 0;
        }
    }

    // The best key below `before`; all lanes of the warp get it.
    __device__ __forceinline__ u64 next(u64 before) const {
        u64 best = 0;
#pragma unroll
        for (u32 n = 0; n < KEYS; n++) {
            if (keys[n] < before && keys[n] > best) best = keys[n];
        }
        for (u32 e = KEYS * WARP + threadIdx.x % WARP; e < count; e += WARP) {
            u64 key = rank_key(load(e), e);
            if (key < before && key > best) best = key;
        }
        u32 top = __reduce_max_sync(ALL, (u32)(best >> 32));
        u32 rest = __reduce_max_sync(ALL, (u32)(best >> 32) == top ? (u32)best : 0);
        return (u64)top << 32 | rest;
    }
};

__device__ __forceinline__ u32 expert_of(u64 key) { return ~(u32)key; }

__device__ __forceinline__ bool means_nothing(const RouteParams& p, u32 row) {
    return p.position && p.position[row] == PADDING;
}

// k times the best key below the one before, by one warp.
template <class Load>
__device__ __forceinline__ void choose(const RouteParams& p, u32 row, Load load) {
    u32 lane = threadIdx.x % WARP;
    if (means_nothing(p, row)) {
        for (u32 i = lane; i < p.top_k; i += WARP) p.experts[(u64)row * p.top_k + i] = NONE, p.weights[(u64)row * p.top_k + i] = 0.0f;
        return;
    }
    Ranking<Load> ranking(p.count, load);
    u64 before = ~0ull;
    float most = 0.0f, total = 0.0f;
    // Choice i stays with lane i % 32 until the total is known.
    u32 chosen[2] = {};
    float scores[2] = {};
    for (u32 i = 0; i < p.top_k; i++) {
        before = ranking.next(before);
        u32 top = (u32)(before >> 32);
        float logit = __uint_as_float(top & 0x80000000u ? top ^ 0x80000000u : ~top);
        if (i == 0) most = logit;
        float score = p.softmax ? expf(logit - most) : sigmoid(logit);
        total += score;
        if (lane == i % WARP) {
            if (i < WARP) {
                chosen[0] = expert_of(before), scores[0] = score;
            } else {
                chosen[1] = expert_of(before), scores[1] = score;
            }
        }
    }
    // Logistic functions of very negative logits can all be almost zero; the guard is the reference ports' own.
    float divisor = p.softmax || p.renormalize ? fmaxf(total, 1e-12f) : 1.0f;
#pragma unroll
    for (u32 n = 0; n < 2; n++) {
        u32 i = n * WARP + lane;
        if (i >= p.top_k) continue;
        p.experts[(u64)row * p.top_k + i] = chosen[n];
        p.weights[(u64)row * p.top_k + i] = scores[n] / divisor;
    }
}

// Choice `which` of a row by one warp, the same that `choose` makes.
template <class Load>
__device__ __forceinline__ u32 choice(const RouteParams& p, u32 row, u32 which, Load load) {
    if (means_nothing(p, row)) return NONE;
    Ranking<Load> ranking(p.count, load);
    u64 key = ~0ull;
    for (u32 i = 0; i <= which; i++) key = ranking.next(key);
    return expert_of(key);
}

extern "C" __global__ void __launch_bounds__(128) route(const RouteParams p) {
    u32 row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    await_inputs();
    if (row >= p.rows) return;
    const T* logits = p.logits + (u64)row * p.count;
    choose(p, row, [&](u32 e) { return widen(logits[e]); });
}

struct RouterParams {
    RouteParams route; // its logits are not read
    float* logits;     // [T, E], made here
    const T* x;        // [T, H]
    const T* w;        // [E, H]
    u32* arrived;      // [1], zero; null: who uses the choices makes them
    u32 hidden;        // H, whole vectors
};

#define ROUTER_ROWS 8
// Vectors of an expert's weights that a lane asks for before the rows are there.
#define ROUTER_FLIGHT 8

// Logits and choice for at most ROUTER_ROWS rows in one launch: a warp per expert; the last block to finish chooses.
extern "C" __global__ void __launch_bounds__(128, 4) router(const RouterParams p) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rows = p.route.rows;
    u32 expert = blockIdx.x * (blockDim.x / WARP) + warp;
    const T* w = p.w + (u64)min(expert, p.route.count - 1) * p.hidden;
    const u32 stride = WARP * VECTOR;
    uint4 weights[ROUTER_FLIGHT];
    auto request = [&](u32 first) {
#pragma unroll
        for (int i = 0; i < ROUTER_FLIGHT; i++) {
            u32 k = first + i * stride;
            weights[i] = k < p.hidden ? load16(w + k) : make_uint4(0, 0, 0, 0);
        }
    };
    request(lane * VECTOR);
    await_inputs();
    if (expert < p.route.count) {
        float sums[ROUTER_ROWS] = {};
        for (u32 first = lane * VECTOR; first < p.hidden; first += ROUTER_FLIGHT * stride) {
            if (first >= ROUTER_FLIGHT * stride) request(first);
#pragma unroll
            for (int r = 0; r < ROUTER_ROWS; r++) {
                if (r >= rows) break;
#pragma unroll
                for (int i = 0; i < ROUTER_FLIGHT; i++) {
                    u32 k = first + i * stride;
                    if (k < p.hidden) sums[r] = dot16(load16(p.x + (u64)r * p.hidden + k), weights[i], sums[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROUTER_ROWS; r++) {
            if (r >= rows) break;
            float v = warp_sum(sums[r]);
            if (lane == 0) p.logits[(u64)r * p.route.count + expert] = rounded(v);
        }
    }
    if (!p.arrived || !last_to_arrive(p.arrived, gridDim.x)) return;
    for (u32 row = warp; row < rows; row += blockDim.x / WARP) {
        const float* logits = p.logits + (u64)row * p.route.count;
        choose(p.route, row, [&](u32 e) { return fresh(logits + e); });
    }
}

struct ChooseParams {
    RouteParams route;   // its logits are not read
    const float* logits; // [T, E] of `router`
};

// The choice that `router` left, for who does not make it on the way.
extern "C" __global__ void __launch_bounds__(128) route_left(const ChooseParams p) {
    u32 row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    await_inputs();
    if (row >= p.route.rows) return;
    const float* logits = p.logits + (u64)row * p.route.count;
    choose(p.route, row, [&](u32 e) { return logits[e]; });
}
