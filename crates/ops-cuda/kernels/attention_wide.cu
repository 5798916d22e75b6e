// Attention of a prompt on Hopper's warpgroup tensor cores, after attention_tiles.cu: what attend_prompt computes, from the same
// parameters. Sixteen rows and GROUP heads are 16 · GROUP pairs, 64 to a warpgroup. One warp has the copy engine bring
// queries, and keys and values in stages of WIDE_KEYS; the warpgroups multiply (q · kᵀ from shared memory, weights · v
// with the weights in registers and v as it lies), and take turns, so that one's exponentials run during the other's
// products. Within a warpgroup, the products of one step's weights run during the exponentials of the next. Blocks stay on
// their multiprocessor and take one piece of work after the other, longest first. For sm_90a alone.
// Operations: 4·D per (row, query head, visible key): North, 8K prompt: 0.55 T a full layer, 0.41 T a sliding one; floor at
// 790 TFLOP/s (H200) 0.70 and 0.52 ms. Measured (H200, events, 2026-11-30): 0.909 and 0.706 ms (605 and 584 TFLOP/s; with
// mma.sync 1.99 and 1.50); 2048 rows after 6144 keys 0.404 and 0.245 ms; Command A+, sliding 2.83 ms (floor 2.09 ms).
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && BF16 && D % 64 == 0 && D <= 128 && GROUP % 4 == 0

#ifndef WIDE_KEYS
#define WIDE_KEYS 128
#endif
#ifndef WIDE_STAGES
#define WIDE_STAGES 2
#endif
// Whether the warpgroups take turns.
#ifndef WIDE_TURNS
#define WIDE_TURNS 1
#endif
#define WIDE_PAIRS (TILE_ROWS * GROUP)
#define WIDE_GROUPS (WIDE_PAIRS / 64)
#define WIDE_THREADS ((WIDE_GROUPS + 1) * 128)
#define QUERY_BYTES (WIDE_PAIRS * D * 2)
// Of one stage of keys, or of values: 64 numbers of every key, then the other 64.
#define KEYS_BYTES (WIDE_KEYS * D * 2)
#define HALF_BYTES (WIDE_KEYS * 128)

struct AttendWideParams {
    AttendParams attend;
    u32 chunk;        // keys of one copy: a power of two, at least 8, at most WIDE_KEYS, that divides a block
    TensorMap q;      // [T, Q, D], boxes of TILE_ROWS, GROUP, 64
    TensorMap keys;   // [blocks · K · block tokens, D], boxes of chunk, 64
    TensorMap values; // likewise
};

// One piece of work: a tile's rows, a group of heads, a range of keys.
struct Errand {
    u32 tile;
    u32 first_row;
    u32 group;
    u32 range;
    u32 low; // keys, from the beginning of a chunk
    u32 steps;
    Prompt prompt;
    __device__ __forceinline__ Errand(const AttendWideParams& params, u32 number) {
        const AttendParams& p = params.attend;
        u32 groups = p.query_heads / GROUP, rest = number % (groups * p.ranges);
        // The last rows of a prompt see most keys: they go first.
        tile = p.rows / TILE_ROWS - 1 - number / (groups * p.ranges);
        group = rest % groups, range = rest / groups;
        first_row = p.tiles[2 * tile];
        u32 rows = p.tiles[2 * tile + 1], position = p.position[first_row];
        u32 from = p.window && position + 1 > p.window ? position + 1 - p.window : 0, to = position + rows;
        from -= from % params.chunk;
        u32 each = ((to - from + p.ranges - 1) / p.ranges + WIDE_KEYS - 1) / WIDE_KEYS * WIDE_KEYS;
        low = min(from + range * each, to);
        u32 high = min(low + each, to);
        steps = (high - low + WIDE_KEYS - 1) / WIDE_KEYS;
        prompt = {position, rows, p.window, high};
    }
};

// Work number `turn` of this block. Every other round goes backwards, so that no block always has the longer pieces.
__device__ __forceinline__ u32 errand_of(u32 turn) {
    return turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

struct WideMemory {
    u32 q;
    u32 keys;   // stages
    u32 values; // stages
    u32 q_full, q_empty;
    u32 barriers; // per stage: keys full, keys empty, values full, values empty
    __device__ __forceinline__ u32 keys_full(u32 stage) const { return barriers + stage * 32; }
    __device__ __forceinline__ u32 keys_empty(u32 stage) const { return barriers + stage * 32 + 8; }
    __device__ __forceinline__ u32 values_full(u32 stage) const { return barriers + stage * 32 + 16; }
    __device__ __forceinline__ u32 values_empty(u32 stage) const { return barriers + stage * 32 + 24; }
};

// A place in a ring of stages.
struct Ring {
    u32 stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == WIDE_STAGES) stage = 0, parity ^= 1;
    }
};

// Brings what the warpgroups work on: a warp for queries and keys, and one for values.
template <bool KEYS_TOO>
__device__ __forceinline__ void bring(const AttendWideParams& params, const WideMemory& memory, u32 errands) {
    const AttendParams& p = params.attend;
    u32 lane = threadIdx.x % WARP, chunk = params.chunk, q_parity = 1;
    constexpr u32 HALVES_OF = D / 64;
    Ring ring;
    for (u32 turn = 0;; turn++) {
        // Rounds that go backwards may miss where a later one does not.
        if (turn * gridDim.x >= errands) break;
        if (errand_of(turn) >= errands) continue;
        const Errand e(params, errand_of(turn));
        u32 sequence = p.sequence[e.first_row], kv = e.group * GROUP / (p.query_heads / p.kv_heads);
        for (u32 step = 0; step < e.steps; step++, ring.next()) {
            // A step's last keys may lie past the end: they are the end's again, and no pair sees them.
            auto fetch = [&](const TensorMap& map, u32 to, u32 barrier) {
                if (lane == 0) barrier_expect(barrier, KEYS_BYTES);
                __syncwarp();
                for (u32 i = lane; i < WIDE_KEYS / chunk * HALVES_OF; i += WARP) {
                    u32 at = i / HALVES_OF * chunk, half = i % HALVES_OF;
                    u32 key = min(e.low + step * WIDE_KEYS + at, e.prompt.high - 1) / chunk * chunk;
                    u32 row = (u32)(cached(p.tables, sequence, key, p.block_tokens, p.kv_heads, kv) / D);
                    copy_box(to + half * HALF_BYTES + at * 128, map, half * 64, row, barrier);
                }
            };
            if (!KEYS_TOO) {
                barrier_wait(memory.values_empty(ring.stage), ring.parity ^ 1);
                fetch(params.values, memory.values + ring.stage * KEYS_BYTES, memory.values_full(ring.stage));
                continue;
            }
            barrier_wait(memory.keys_empty(ring.stage), ring.parity ^ 1);
            fetch(params.keys, memory.keys + ring.stage * KEYS_BYTES, memory.keys_full(ring.stage));
            if (step == 0) {
                barrier_wait(memory.q_empty, q_parity);
                q_parity ^= 1;
                if (lane == 0) {
                    barrier_expect(memory.q_full, QUERY_BYTES);
                    for (u32 half = 0; half < HALVES_OF; half++) {
                        u32 to = memory.q + half * WIDE_PAIRS * 128;
                        copy_box(to, params.q, half * 64, e.group * GROUP, e.first_row, memory.q_full);
                    }
                }
            }
        }
    }
}

// A thread's sums: 64 pairs of a warpgroup, of which it has parts of two.
struct WideSums {
    float scores[WIDE_KEYS / 2];
    float out[D / 2];
    u32 weights[WIDE_KEYS / 4];
    float most[2];
    float total[2];
    float shrink[2];
};

// scores to weights, against the running largest score; `shrink` is what the sums so far are to be multiplied with.
__device__ __forceinline__ void weigh(WideSums& s, u32 first, const Prompt& prompt, bool masked, u32 pair) {
    const float scale = rsqrtf((float)D) * 1.4426950408889634f;
    u32 c = threadIdx.x % 4;
    if (masked) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Seen seen = prompt.seen(pair + 8 * i);
#pragma unroll
            for (int j = 0; j < WIDE_KEYS / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    u32 key = first + j * 8 + 2 * c + e;
                    float& score = s.scores[j * 4 + i * 2 + e];
                    score = key >= seen.start && key < seen.end ? score : LOWEST;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = s.most[i];
#pragma unroll
        for (int j = 0; j < WIDE_KEYS / 8; j++) {
            most = fmaxf(most, fmaxf(s.scores[j * 4 + i * 2], s.scores[j * 4 + i * 2 + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        s.shrink[i] = power_of_two((s.most[i] - most) * scale);
        s.most[i] = most;
        // Where nothing was seen yet, every score is the lowest one, and none may count.
        float offset = most > LOWEST / 2 ? -most * scale : 0.0f, total = s.total[i] * s.shrink[i];
#pragma unroll
        for (int j = 0; j < WIDE_KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = s.scores[j * 4 + i * 2 + e];
                score = power_of_two(fmaf(score, scale, offset));
                total += score;
            }
        }
        s.total[i] = total;
    }
}

__device__ __forceinline__ void pack_weights(WideSums& s) {
#pragma unroll
    for (int i = 0; i < WIDE_KEYS / 4; i++) s.weights[i] = pair_of(s.scores[2 * i], s.scores[2 * i + 1]);
}

__device__ __forceinline__ void multiply_keys(WideSums& s, u32 q, u32 keys) {
    pinned<WIDE_KEYS / 2>(s.scores);
    group_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 at = k % 4 * 32;
        multiply_rows<WIDE_KEYS>(s.scores, swizzled(q + k / 4 * WIDE_PAIRS * 128 + at), swizzled(keys + k / 4 * HALF_BYTES + at), k > 0);
    }
    group_commit();
}

__device__ __forceinline__ void multiply_values(WideSums& s, u32 values) {
    pinned<D / 2>(s.out);
    group_fence();
#pragma unroll
    for (int k = 0; k < WIDE_KEYS / 16; k++) multiply_columns<D>(s.out, s.weights + k * 4, swizzled(values + k * 2048, HALF_BYTES));
    group_commit();
}

__device__ __forceinline__ void shrink_out(WideSums& s) {
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) s.out[n * 4 + e] *= s.shrink[e / 2];
    }
}

// Values past the end may be anything, also no numbers: they become zeros before weights of zero meet them.
__device__ __forceinline__ void clear_values(u32 values, u32 from, u32 group) {
    u32 pieces = (WIDE_KEYS - from) * 8;
    for (u32 i = threadIdx.x % 128; i < pieces * (D / 64); i += 128) {
        u32 at = values + i / pieces * HALF_BYTES + from * 128 + i % pieces * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    shared_written();
    meet_at(4 + group, 128);
}

// Word `at` of four, `at` known at run time.
__device__ __forceinline__ u32 chosen(const u32* words, u32 at) {
    return at & 2 ? (at & 1 ? words[3] : words[2]) : (at & 1 ? words[1] : words[0]);
}

// The result of one of a thread's pairs, 16 bytes at a time: four lanes have two numbers each of eight neighbours, and
// exchange them for eight of one.
__device__ __forceinline__ void store_pair(T* to, const float* out, float factor, bool here) {
    u32 c = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
        u32 own[4], got[4];
#pragma unroll
        for (int t = 0; t < 4; t++) own[t] = pair_of(out[(n + t) * 4] * factor, out[(n + t) * 4 + 1] * factor);
#pragma unroll
        for (int s = 0; s < 4; s++) got[s] = __shfl_xor_sync(ALL, chosen(own, c ^ s), s);
        if (here) *(uint4*)(to + (n + c) * 8) = make_uint4(chosen(got, c), chosen(got, c ^ 1), chosen(got, c ^ 2), chosen(got, c ^ 3));
    }
}

// A warpgroup's share of all errands of the block.
__device__ __forceinline__ void attend_errands(const AttendWideParams& params, const WideMemory& memory, u32 errands) {
    const AttendParams& p = params.attend;
    constexpr bool TURNS = WIDE_TURNS && WIDE_GROUPS == 2;
    const float scale = rsqrtf((float)D) * 1.4426950408889634f;
    u32 lane = threadIdx.x % WARP, c = lane % 4, group = threadIdx.x / 128 - 1;
    u32 first_pair = group * 64 + threadIdx.x % 128 / WARP * 16 + lane / 4;
    u32 q = memory.q + group * 64 * 128, q_parity = 0;
    Ring keys, values;
    auto my_turn = [&]() {
        if (TURNS) meet_at(1 + group, 256);
    };
    auto your_turn = [&]() {
        if (TURNS) pass_by(2 - group, 256);
    };
    auto done_with = [&](u32 barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    if (group == 1) your_turn();
    WideSums s;
    for (u32 turn = 0;; turn++) {
        if (turn * gridDim.x >= errands) break;
        if (errand_of(turn) >= errands) continue;
        const Errand e(params, errand_of(turn));
        // Before the first limit some pair no longer sees a key; from the second on some pair does not yet.
        u32 last = e.prompt.position + e.prompt.rows, all_from = p.window && last > p.window ? last - p.window : 0;
        u32 all_to = min(e.prompt.position + 1, e.prompt.high);
        auto weigh_step = [&](u32 step) {
            u32 first = e.low + step * WIDE_KEYS;
            weigh(s, first, e.prompt, first < all_from || first + WIDE_KEYS > all_to, first_pair);
        };
#pragma unroll
        for (int i = 0; i < D / 2; i++) s.out[i] = 0.0f;
        s.most[0] = s.most[1] = LOWEST;
        s.total[0] = s.total[1] = 0.0f;
        if (e.steps > 0) {
            barrier_wait(memory.q_full, q_parity);
            q_parity ^= 1;
            barrier_wait(memory.keys_full(keys.stage), keys.parity);
            multiply_keys(s, q, memory.keys + keys.stage * KEYS_BYTES);
            group_wait<0>();
            pinned<WIDE_KEYS / 2>(s.scores);
            done_with(memory.keys_empty(keys.stage));
            keys.next();
            weigh_step(0);
            pack_weights(s);
            for (u32 step = 1; step < e.steps; step++) {
                barrier_wait(memory.keys_full(keys.stage), keys.parity);
                my_turn();
                multiply_keys(s, q, memory.keys + keys.stage * KEYS_BYTES);
                shrink_out(s);
                barrier_wait(memory.values_full(values.stage), values.parity);
                multiply_values(s, memory.values + values.stage * KEYS_BYTES);
                your_turn();
                group_wait<1>();
                pinned<WIDE_KEYS / 2>(s.scores);
                done_with(memory.keys_empty(keys.stage));
                keys.next();
                weigh_step(step);
                pinned<WIDE_KEYS / 2>(s.scores);
                group_wait<0>();
                pinned<D / 2>(s.out);
                done_with(memory.values_empty(values.stage));
                values.next();
                pack_weights(s);
            }
            done_with(memory.q_empty);
            shrink_out(s);
            barrier_wait(memory.values_full(values.stage), values.parity);
            u32 past = e.prompt.high - (e.low + (e.steps - 1) * WIDE_KEYS), stage = memory.values + values.stage * KEYS_BYTES;
            if (past < WIDE_KEYS) clear_values(stage, past, group);
            multiply_values(s, stage);
            group_wait<0>();
            pinned<D / 2>(s.out);
            done_with(memory.values_empty(values.stage));
            values.next();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float total = s.total[i];
            total += __shfl_xor_sync(ALL, total, 1);
            total += __shfl_xor_sync(ALL, total, 2);
            u32 pair = first_pair + 8 * i, row = pair / GROUP, head = e.group * GROUP + pair % GROUP;
            if (p.ranges > 1) {
                if (row >= e.prompt.rows) continue;
                u64 part = part_of(p, e.tile * TILE_ROWS + row, head, e.range);
                if (c == 0) stats_of(p, part)[0] = max(s.most[i] * scale, LOWEST), stats_of(p, part)[1] = total;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    *(float2*)(p.parts + part * D + n * 8 + 2 * c) = make_float2(s.out[n * 4 + i * 2], s.out[n * 4 + i * 2 + 1]);
                }
            } else {
                u64 at = (u64)(e.first_row + min(row, e.prompt.rows - 1)) * p.query_heads + head;
                store_pair(p.out + at * D, s.out + i * 2, total > 0.0f ? 1.0f / total : 0.0f, row < e.prompt.rows);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) attend_wide(const __grid_constant__ AttendWideParams params) {
    extern __shared__ unsigned char shared[];
    __shared__ __align__(8) u64 barriers[2 + 4 * WIDE_STAGES];
    WideMemory memory;
    memory.q = (shared_address(shared) + 1023) & ~1023u;
    memory.keys = memory.q + QUERY_BYTES;
    memory.values = memory.keys + WIDE_STAGES * KEYS_BYTES;
    memory.q_full = shared_address(barriers), memory.q_empty = memory.q_full + 8, memory.barriers = memory.q_full + 16;
    if (threadIdx.x == 0) {
        barrier_init(memory.q_full, 1);
        barrier_init(memory.q_empty, WIDE_GROUPS * 4);
        for (u32 i = 0; i < WIDE_STAGES; i++) {
            barrier_init(memory.keys_full(i), 1);
            barrier_init(memory.keys_empty(i), WIDE_GROUPS * 4);
            barrier_init(memory.values_full(i), 1);
            barrier_init(memory.values_empty(i), WIDE_GROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        shared_written();
    }
    await_inputs();
    __syncthreads();
    const AttendParams& p = params.attend;
    u32 errands = p.rows / TILE_ROWS * (p.query_heads / GROUP) * p.ranges;
    if (threadIdx.x < 128) {
#if WIDE_GROUPS > 1
        FEWER_REGISTERS(40);
#endif
        if (threadIdx.x < WARP) {
            bring<true>(params, memory, errands);
        } else if (threadIdx.x < 2 * WARP) {
            bring<false>(params, memory, errands);
        }
    } else {
#if WIDE_GROUPS > 1
        MORE_REGISTERS(232);
#endif
        attend_errands(params, memory, errands);
    }
}
#endif
