// Attention on the tensor cores, after attention.cu: one row's heads over a range of keys (attend_token), and 16 rows of
// a prompt (attend_prompt). Formula, shapes and bytes are there. A prompt's operations: 4·D per (row, query head, visible
// key); North, 8K prompt: 0.55 T a full layer, 0.41 T a sliding one; floor at 800 TFLOP/s (H100) 0.69 and 0.51 ms.
// Measured (H100 80GB HBM3, ncu with cold caches, 2026-11-24): attend_prompt 1.52 ms a sliding layer, 34 % of the floor.
#if BF16 && D % 64 == 0 && D <= 128
#define KEYS 16
#define CHUNKS (D / 32)
#define HALVES (D / 64)
#define TOKEN_WARPS 4

__device__ __forceinline__ u32 packed(float first, float second) {
    return (u32)bf16_bits(first) | (u32)bf16_bits(second) << 16;
}

__device__ __forceinline__ u32 word(const uint4& v, int at) {
    return at == 0 ? v.x : at == 1 ? v.y : at == 2 ? v.z : v.w;
}

// Which keys one of a lane's two rows sees.
struct Seen {
    u32 start;
    u32 end;
};

struct Sums {
    float out[HALVES * 8][4];
    float most[2];
    float total[2];
};

// One step of 16 keys from `first` on, without shared memory: a product does not depend on the order of what it
// sums, so lanes load whole 16-byte pieces of keys (and of queries in the same order), and of values with the columns
// of the result in the order that this gives. Here `slot` of lane l is the place of key first + l in the cache.
__device__ __forceinline__ void meet(const AttendParams& p, const u32 (*q)[4], u32 first, u32 slot, const Seen* seen, Sums& sums) {
    u32 lane = threadIdx.x % WARP, c = lane % 4, r = lane / 4;
    uint4 k[2][CHUNKS], v[4][HALVES];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const T* key = p.keys + (u64)__shfl_sync(ALL, slot, j * 8 + r) * D + c * 8;
#pragma unroll
        for (int n = 0; n < CHUNKS; n++) k[j][n] = load16(key + n * 32);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const T* value = p.values + (u64)__shfl_sync(ALL, slot, j / 2 * 8 + 2 * c + j % 2) * D + r * 8;
#pragma unroll
        for (int n = 0; n < HALVES; n++) v[j][n] = load16(value + n * 64);
    }
    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                multiply(scores[j], q[n * 2 + half], word(k[j][n], 2 * half), word(k[j][n], 2 * half + 1));
            }
        }
    }
    const float scale = rsqrtf((float)D) * 1.4426950408889634f;
    float most[2] = {sums.most[0], sums.most[1]};
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            u32 key = first + j * 8 + 2 * c + e % 2;
            bool sees = key >= seen[e / 2].start && key < seen[e / 2].end;
            scores[j][e] = sees ? scores[j][e] * scale : LOWEST;
            most[e / 2] = fmaxf(most[e / 2], scores[j][e]);
        }
    }
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        most[i] = fmaxf(most[i], __shfl_xor_sync(ALL, most[i], 1));
        most[i] = fmaxf(most[i], __shfl_xor_sync(ALL, most[i], 2));
        shrink[i] = exp2f(sums.most[i] - most[i]);
        sums.most[i] = most[i];
        sums.total[i] *= shrink[i];
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            // The weight that the values meet is the one that is counted.
            float weight = scores[j][e] > LOWEST / 2 ? rounded(exp2f(scores[j][e] - most[e / 2])) : 0.0f;
            scores[j][e] = weight;
            sums.total[e / 2] += weight;
        }
    }
    if (__any_sync(ALL, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < HALVES * 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sums.out[n][e] *= shrink[e / 2];
        }
    }
    u32 weights[4] = {packed(scores[0][0], scores[0][1]), packed(scores[0][2], scores[0][3]),
                      packed(scores[1][0], scores[1][1]), packed(scores[1][2], scores[1][3])};
#pragma unroll
    for (int n = 0; n < HALVES; n++) {
#pragma unroll
        for (int t = 0; t < 8; t++) {
            u32 which = t % 2 ? 0x7632 : 0x5410;
            u32 b0 = __byte_perm(word(v[0][n], t / 2), word(v[1][n], t / 2), which);
            u32 b1 = __byte_perm(word(v[2][n], t / 2), word(v[3][n], t / 2), which);
            multiply(sums.out[n * 8 + t], weights, b0, b1);
        }
    }
}

template <int COUNT>
__device__ __forceinline__ void fresh_numbers(const float* at, float* out) {
    if (COUNT == 4) {
        asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(out[0]), "=f"(out[1]), "=f"(out[2 % COUNT]), "=f"(out[3 % COUNT])
                     : "l"(at)
                     : "memory");
    } else {
        asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(out[0]), "=f"(out[1]) : "l"(at) : "memory");
    }
}

// Ranges whose sums a merging lane asks for at once.
#define MERGED 16

// Merges the ranges of TOGETHER heads of one row, from `first_head` on. A warp has several of them side by side, so that it
// waits for all at once.
template <int TOGETHER>
__device__ __forceinline__ void merge_token(const AttendParams& p, u32 row, u32 first_head) {
    constexpr int COUNT = D / WARP, HEADS = (TOGETHER + TOKEN_WARPS - 1) / TOKEN_WARPS;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Past the last head a warp repeats it, and stores nothing.
    auto head = [&](int i) { return first_head + min(warp + i * TOKEN_WARPS, TOGETHER - 1u); };
    float most[HEADS], count[HEADS], weight[HEADS], total[HEADS], sums[HEADS][COUNT] = {};
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        const float* stats = stats_of(p, part_of(p, blockIdx.z, head(i), min(lane, p.ranges - 1)));
        most[i] = fresh(stats), count[i] = fresh(stats + 1);
    }
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        float own = lane < p.ranges ? most[i] : LOWEST, all = own;
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) all = fmaxf(all, __shfl_xor_sync(ALL, all, step));
        weight[i] = lane < p.ranges ? exp2f(own - all) : 0.0f;
        total[i] = warp_sum(lane < p.ranges ? count[i] * weight[i] : 0.0f);
    }
    // A lane has COUNT neighbouring numbers, and many ranges on their way at once.
#pragma unroll 1
    for (u32 first = 0; first < p.ranges; first += MERGED) {
        float held[HEADS][MERGED][COUNT];
#pragma unroll
        for (int i = 0; i < HEADS; i++) {
            const float* parts = p.parts + part_of(p, blockIdx.z, head(i), 0) * D + lane * COUNT;
#pragma unroll
            for (u32 n = 0; n < MERGED; n++) fresh_numbers<COUNT>(parts + (u64)min(first + n, p.ranges - 1) * GROUP * D, held[i][n]);
        }
#pragma unroll
        for (int i = 0; i < HEADS; i++) {
#pragma unroll
            for (u32 n = 0; n < MERGED; n++) {
                // Past the last range the weight is zero.
                float factor = __shfl_sync(ALL, weight[i], (first + n) % WARP);
                if (first + n >= p.ranges) factor = 0.0f;
#pragma unroll
                for (int d = 0; d < COUNT; d++) sums[i][d] = fmaf(held[i][n][d], factor, sums[i][d]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        if (warp + i * TOKEN_WARPS >= TOGETHER) continue;
        T* out = p.out + ((u64)row * p.query_heads + head(i)) * D + lane * COUNT;
#pragma unroll
        for (int d = 0; d < COUNT; d++) out[d] = narrow(total[i] > 0.0f ? sums[i][d] / total[i] : 0.0f);
    }
}

// What `append` does, for TOGETHER queries of one row; the block that sees the row's own position (`own`)
// also turns its key, which goes to the cache with the value. Blocks that share a key/value head write the same there.
template <int TOGETHER>
__device__ __forceinline__ void turn_token(const AttendTokenParams& token, u32 row, u32 first_head, u32 position, bool own, u32 sequence, T (*turned)[D]) {
    const AttendParams& p = token.attend;
    constexpr u32 PAIRS = D / 2, SIDE_BY_SIDE = TOKEN_WARPS * WARP / PAIRS, ROUNDS = (TOGETHER + 2 + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
    u32 pair = threadIdx.x % PAIRS, kv = first_head / (p.query_heads / p.kv_heads);
    const u32* from = (const u32*)(token.qkv + (u64)row * (p.query_heads + 2 * p.kv_heads) * D) + pair;
    u32 held[ROUNDS];
#pragma unroll
    for (u32 n = 0; n < ROUNDS; n++) {
        u32 i = threadIdx.x / PAIRS + n * SIDE_BY_SIDE;
        u32 head = i < TOGETHER ? first_head + i : p.query_heads + (i - TOGETHER) * p.kv_heads + kv;
        held[n] = i < TOGETHER + (own ? 2 : 0) ? from[head * PAIRS] : 0;
    }
    float sine = 0.0f, cosine = 1.0f;
    if (token.rope) {
        sincosf((float)position * token.turns[pair], &sine, &cosine);
        sine = rounded(sine), cosine = rounded(cosine);
    }
    u64 place = own ? cached(p.tables, sequence, position, p.block_tokens, p.kv_heads, kv) : 0;
#pragma unroll
    for (u32 n = 0; n < ROUNDS; n++) {
        u32 i = threadIdx.x / PAIRS + n * SIDE_BY_SIDE;
        if (i >= TOGETHER + (own ? 2 : 0)) continue;
        float a = low(held[n]), b = high(held[n]);
        if (token.rope && i <= TOGETHER) {
            float x = a * cosine - b * sine, y = b * cosine + a * sine;
            a = x, b = y;
        }
        T* to = i < TOGETHER ? turned[i] : (T*)(i == TOGETHER ? p.keys : p.values) + place;
        ((u32*)to)[pair] = packed(a, b);
    }
}

// A block per (row, TOGETHER heads, range of at most 32): its warps share the keys, merge in shared memory, and the last
// block of a row merges its ranges. With `qkv` it also does what `append` would.
template <int TOGETHER>
__device__ __forceinline__ void attend_heads(const AttendTokenParams& token) {
    const AttendParams& p = token.attend;
    __shared__ float stats[TOKEN_WARPS][TOGETHER][2];
    __shared__ float merged[TOKEN_WARPS][TOGETHER][D];
    __shared__ __align__(16) T turned[TOGETHER][D];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = lane % 4, h = lane / 4;
    u32 range = blockIdx.x, first_head = blockIdx.y * TOGETHER, row = p.singles[blockIdx.z];
    u32 kv = first_head / (p.query_heads / p.kv_heads);
    // Positions, tables and keys of steps before are there already.
    u32 end = p.position[row] + 1, sequence = p.sequence[row];
    u32 start = p.window && end > p.window ? end - p.window : 0;
    u32 each = ((end - start + p.ranges - 1) / p.ranges + KEYS - 1) / KEYS * KEYS;
    u32 low = min(start + range * each, end), high = min(low + each, end);
    Seen seen[2] = {{low, h < TOGETHER ? high : 0}, {0, 0}};
    Sums sums = {};
    sums.most[0] = sums.most[1] = LOWEST;
    auto place = [&](u32 first) {
        u32 key = min(first + lane % KEYS, high - 1);
        return first < high ? (u32)(cached(p.tables, sequence, key, p.block_tokens, p.kv_heads, kv) / D) : 0;
    };
    u32 first = low + warp * KEYS, slot = place(first);
    const T* plane = lane < KEYS ? p.keys : p.values;
#pragma unroll
    for (u32 at = 0; first < high && at < D; at += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(plane + (u64)slot * D + at));
    await_inputs();
    const T* from = p.q + ((u64)row * p.query_heads + first_head + min(h, TOGETHER - 1u)) * D + c * 8;
    if (token.qkv) {
        turn_token<TOGETHER>(token, row, first_head, end - 1, low < high && high == end, sequence, turned);
        __syncthreads();
        from = turned[min(h, TOGETHER - 1u)] + c * 8;
    }
    u32 q[CHUNKS * 2][4];
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
        uint4 data = load16(from + n * 32);
        q[n * 2][0] = data.x, q[n * 2][2] = data.y, q[n * 2 + 1][0] = data.z, q[n * 2 + 1][2] = data.w;
        q[n * 2][1] = q[n * 2][3] = q[n * 2 + 1][1] = q[n * 2 + 1][3] = 0;
    }
    for (; first < high; first += TOKEN_WARPS * KEYS) {
        u32 next = place(first + TOKEN_WARPS * KEYS);
        meet(p, q, first, slot, seen, sums);
        slot = next;
    }
    float total = sums.total[0];
    total += __shfl_xor_sync(ALL, total, 1);
    total += __shfl_xor_sync(ALL, total, 2);
    if (h < TOGETHER) {
        if (c == 0) stats[warp][h][0] = sums.most[0], stats[warp][h][1] = total;
#pragma unroll
        for (int n = 0; n < HALVES; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int t = 0; t < 8; t++) merged[warp][h][n * 64 + (2 * c + e) * 8 + t] = sums.out[n * 8 + t][e];
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < TOGETHER * D; i += TOKEN_WARPS * WARP) {
        u32 head = i / D, d = i % D;
        float most = LOWEST, count = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < TOKEN_WARPS; w++) most = fmaxf(most, stats[w][head][0]);
#pragma unroll
        for (int w = 0; w < TOKEN_WARPS; w++) {
            float weight = exp2f(stats[w][head][0] - most);
            count = fmaf(stats[w][head][1], weight, count);
            sum = fmaf(merged[w][head][d], weight, sum);
        }
        if (p.ranges == 1) {
            p.out[((u64)row * p.query_heads + first_head + head) * D + d] = narrow(count > 0.0f ? sum / count : 0.0f);
        } else {
            u64 part = part_of(p, blockIdx.z, first_head + head, range);
            p.parts[part * D + d] = sum;
            if (d == 0) stats_of(p, part)[0] = most, stats_of(p, part)[1] = count;
        }
    }
    if (p.ranges == 1 || !last_to_arrive(p.arrived + blockIdx.z * gridDim.y + blockIdx.y, p.ranges)) return;
    merge_token<TOGETHER>(p, row, first_head);
}

extern "C" __global__ void __launch_bounds__(TOKEN_WARPS* WARP) attend_token(const AttendTokenParams p) { attend_heads<GROUP>(p); }
#if GROUP % 2 == 0
// For so few heads that blocks of half of them still fit on a card at once.
extern "C" __global__ void __launch_bounds__(TOKEN_WARPS* WARP) attend_token_half(const AttendTokenParams p) { attend_heads<GROUP / 2>(p); }
#endif

// Sixteen rows of a prompt and a group of heads make 16 · GROUP (row, head) pairs; a warp takes PAIR_TILES · 16 of them,
// and keys and values go through shared memory in two stages of STEP_KEYS, 16 bytes a piece, pieces of a key
// exclusive-or'ed with its number so that ldmatrix meets no bank twice.
#define PAIR_TILES (GROUP % 2 ? 1 : 2)
#define PROMPT_THREADS (GROUP / PAIR_TILES * WARP)
#define STEP_KEYS (D > 64 ? 32 : 64)
#define PIECES (D / 8)
#define PLANE_BYTES (STEP_KEYS * D * 2)

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void copy16(u32 to, const void* from, bool present) {
    u32 bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void load_matrices(u32 at, u32* r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

__device__ __forceinline__ void load_turned(u32 at, u32* r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

__device__ __forceinline__ u32 piece(u32 row, u32 column) { return (row * PIECES + (column ^ (row & 7))) * 16; }

// Two numbers as one register, the first one low.
__device__ __forceinline__ u32 pair_of(float first, float second) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// What a block of attend_prompt works on.
struct Prompt {
    u32 position; // of the first row
    u32 rows;
    u32 window;
    u32 high; // end of the range of keys
    __device__ __forceinline__ Seen seen(u32 pair) const {
        u32 row = pair / GROUP, end = position + row + 1;
        return {window && end > window ? end - window : 0, row < rows ? min(end, high) : 0};
    }
};

struct Tile {
    float out[D / 8][4];
    float most[2];
    float total[2];
};

__device__ __forceinline__ float power_of_two(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

// scores to weights, against the running largest score (before scaling); `out` and `total` shrink with it. `Masked`: not
// every pair sees all of these keys.
template <class Masked>
__device__ __forceinline__ void soften(float (*scores)[4], u32 first, const Prompt& prompt, u32 pair, Tile& tile) {
    const float scale = rsqrtf((float)D) * 1.4426950408889634f;
    u32 c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float most = tile.most[i];
        Seen seen = Masked::value ? prompt.seen(pair + 8 * i) : Seen{0, 0};
#pragma unroll
        for (int j = 0; j < STEP_KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = scores[j][i * 2 + e];
                if (Masked::value) {
                    u32 key = first + j * 8 + 2 * c + e;
                    score = key >= seen.start && key < seen.end ? score : LOWEST;
                }
                most = fmaxf(most, score);
            }
        }
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        float shrink = power_of_two((tile.most[i] - most) * scale);
        tile.most[i] = most;
        // Where nothing was seen yet, every score is the lowest one, and none may count.
        float offset = most > LOWEST / 2 ? -most * scale : 0.0f, total = tile.total[i] * shrink;
#pragma unroll
        for (int j = 0; j < STEP_KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float weight = power_of_two(fmaf(scores[j][i * 2 + e], scale, offset));
                scores[j][i * 2 + e] = weight;
                total += weight;
            }
        }
        tile.total[i] = total;
        if (__any_sync(ALL, shrink != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) tile.out[n][i * 2] *= shrink, tile.out[n][i * 2 + 1] *= shrink;
        }
    }
}

// One step: the keys and values of `stage` against a warp's pairs, whose queries are in shared memory from `queries` on.
template <class Masked>
__device__ __forceinline__ void meet_stage(u32 queries, u32 stage, u32 first, const Prompt& prompt, Tile* tiles) {
    u32 lane = threadIdx.x % WARP, pair = threadIdx.x / WARP * PAIR_TILES * 16 + lane / 4;
    float scores[PAIR_TILES][STEP_KEYS / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 q[PAIR_TILES][4];
#pragma unroll
        for (int m = 0; m < PAIR_TILES; m++) load_matrices(queries + piece(m * 16 + lane % 16, k * 2 + lane / 16), q[m]);
#pragma unroll
        for (int j = 0; j < STEP_KEYS / 16; j++) {
            u32 keys[4];
            load_matrices(stage + piece(j * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2), keys);
#pragma unroll
            for (int m = 0; m < PAIR_TILES; m++) {
                multiply(scores[m][j * 2], q[m], keys[0], keys[1]);
                multiply(scores[m][j * 2 + 1], q[m], keys[2], keys[3]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < PAIR_TILES; m++) soften<Masked>(scores[m], first, prompt, pair + m * 16, tiles[m]);
#pragma unroll
    for (int k = 0; k < STEP_KEYS / 16; k++) {
        u32 weights[PAIR_TILES][4];
#pragma unroll
        for (int m = 0; m < PAIR_TILES; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* from = scores[m][k * 2 + i / 2] + i % 2 * 2;
                weights[m][i] = pair_of(from[0], from[1]);
            }
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 values[4];
            load_turned(stage + PLANE_BYTES + piece(k * 16 + lane % 16, n * 2 + lane / 16), values);
#pragma unroll
            for (int m = 0; m < PAIR_TILES; m++) {
                multiply(tiles[m].out[n * 2], weights[m], values[0], values[1]);
                multiply(tiles[m].out[n * 2 + 1], weights[m], values[2], values[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(PROMPT_THREADS) attend_prompt(const AttendParams p) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = lane % 4;
    // The last rows of a prompt see most keys: they go first.
    u32 tile = gridDim.x - 1 - blockIdx.x, group = blockIdx.y, range = blockIdx.z;
    u32 first_row = p.tiles[2 * tile], rows = p.tiles[2 * tile + 1], sequence = p.sequence[first_row];
    u32 kv = group * GROUP / (p.query_heads / p.kv_heads), position = p.position[first_row];
    u32 from = p.window && position + 1 > p.window ? position + 1 - p.window : 0, to = position + rows;
    u32 each = ((to - from + p.ranges - 1) / p.ranges + STEP_KEYS - 1) / STEP_KEYS * STEP_KEYS;
    u32 low = min(from + range * each, to), high = min(low + each, to);
    u32 queries = shared_address(memory), stages = queries + TILE_ROWS * GROUP * D * 2;
    for (u32 i = threadIdx.x; i < TILE_ROWS * GROUP * PIECES; i += PROMPT_THREADS) {
        u32 pair = i / PIECES, row = min(pair / GROUP, rows - 1);
        const T* q = p.q + ((u64)(first_row + row) * p.query_heads + group * GROUP + pair % GROUP) * D + i % PIECES * 8;
        copy16(queries + piece(pair, i % PIECES), q, true);
    }
    // Where the keys of a step lie is looked up once for all, a step before they are asked for.
    __shared__ u32 slots[2][STEP_KEYS];
    auto look_up = [&](u32 first, u32 turn) {
        for (u32 i = threadIdx.x; i < STEP_KEYS; i += PROMPT_THREADS) {
            u32 key = min(first + i, high - 1);
            slots[turn][i] = (u32)(cached(p.tables, sequence, key, p.block_tokens, p.kv_heads, kv) / D);
        }
    };
    auto fetch = [&](u32 first, u32 turn) {
        u32 stage = stages + turn * 2 * PLANE_BYTES;
#pragma unroll 4
        for (u32 i = threadIdx.x; i < STEP_KEYS * PIECES; i += PROMPT_THREADS) {
            u32 to_byte = piece(i / PIECES, i % PIECES);
            bool here = first + i / PIECES < high;
            u64 at = (u64)slots[turn][i / PIECES] * D + i % PIECES * 8;
            copy16(stage + to_byte, p.keys + at, here);
            copy16(stage + PLANE_BYTES + to_byte, p.values + at, here);
        }
        asm volatile("cp.async.commit_group;");
    };
    Tile tiles[PAIR_TILES] = {};
    const Prompt prompt = {position, rows, p.window, high};
#pragma unroll
    for (int m = 0; m < PAIR_TILES; m++) tiles[m].most[0] = tiles[m].most[1] = LOWEST;
    const float scale = rsqrtf((float)D) * 1.4426950408889634f;
    u32 own = queries + warp * PAIR_TILES * 16 * D * 2;
    // From the second limit on some pair does not see a key; before the first some pair no longer does.
    u32 last = position + rows, all_from = p.window && last > p.window ? last - p.window : 0, all_to = min(position + 1, high);
    if (low < high) {
        look_up(low, 0);
        look_up(low + STEP_KEYS, 1);
        __syncthreads();
        fetch(low, 0);
    }
    u32 turn = 0;
    for (u32 first = low; first < high; first += STEP_KEYS, turn ^= 1) {
        if (first + STEP_KEYS < high) {
            fetch(first + STEP_KEYS, turn ^ 1);
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();
        if (first + 2 * STEP_KEYS < high) look_up(first + 2 * STEP_KEYS, turn);
        u32 stage = stages + turn * 2 * PLANE_BYTES;
        if (rows == TILE_ROWS && first >= all_from && first + STEP_KEYS <= all_to) {
            meet_stage<No>(own, stage, first, prompt, tiles);
        } else {
            meet_stage<Yes>(own, stage, first, prompt, tiles);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < PAIR_TILES; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float total = tiles[m].total[i];
            total += __shfl_xor_sync(ALL, total, 1);
            total += __shfl_xor_sync(ALL, total, 2);
            u32 pair = (warp * PAIR_TILES + m) * 16 + lane / 4 + 8 * i;
            if (pair / GROUP >= rows) continue;
            u32 head = group * GROUP + pair % GROUP, at = first_row + pair / GROUP;
            if (p.ranges > 1) {
                u64 part = part_of(p, tile * TILE_ROWS + pair / GROUP, head, range);
                if (c == 0) stats_of(p, part)[0] = max(tiles[m].most[i] * scale, LOWEST), stats_of(p, part)[1] = total;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    *(float2*)(p.parts + part * D + n * 8 + 2 * c) = make_float2(tiles[m].out[n][i * 2], tiles[m].out[n][i * 2 + 1]);
                }
            } else {
                u32* out = (u32*)(p.out + ((u64)at * p.query_heads + head) * D) + c;
                float factor = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    out[n * 4] = pair_of(tiles[m].out[n][i * 2] * factor, tiles[m].out[n][i * 2 + 1] * factor);
                }
            }
        }
    }
}
#endif
