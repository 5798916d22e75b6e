// Rotary embedding with KV append, and paged attention for prompts and single tokens alike. Constants: D head
// dimension, GROUP query heads handled together (they share a key/value head).
//
// qkv [T, (Q + 2K)·D]; a cache layer holds keys, then values, each [blocks, K, block tokens, D].
// Attention: out[t, h] = Σ_j softmax_j(q[t, h] · k[j] · D^-0.5) · v[j] over the visible positions j, scores fp32.
// Split-KV: a block takes one row, one group of heads and a range of keys; its warps keep several independent running
// softmaxes (LANES lanes each hold one key), merged in shared memory; ranges are merged by a second launch.
// Bytes of a decode row: 2·keys·K·D·2 (bf16). North, full layer at 8K: 16.8 MB, floor 5.0 us at 3.35 TB/s; sliding
// layer (4096): 8.4 MB, 2.5 us. bf16 heads of 64 and 128 go through attend_token and attend_prompt, the rest through
// attend, which reads a prompt's keys once per row. Measured (North, one row at 8K, attend_token, turning and appending
// included, H200, 2026-11-30): by itself 15.4 us a sliding layer, 18.2 us a full one; 19 and 24 us inside a recorded step
// beside the experts. A block has four warps, so that blocks of the experts fit beside it.

// Position of a row that means nothing: it has no keys, and its result is zero.
#define PADDING 0xffffffffu

struct AppendParams {
    T* q;                // [T, Q, D] turned
    T* keys;             // cache
    T* values;           // cache
    const void* qkv;     // [T, (Q + 2K)·D]
    const u32* position; // [T]
    const u32* sequence; // [T]
    const u32* tables;   // per sequence: offset into `tables`, first block
    const float* turns;  // [D / 2] frequencies
    u32 qkv_f32;
    u32 query_heads;
    u32 kv_heads;
    u32 block_tokens;
    u32 rope; // 0: no rotation
};

// Where (position, head) lies in a plane of the cache.
__device__ __forceinline__ u64 cached(const u32* tables, u32 sequence, u32 position, u32 block_tokens, u32 heads, u32 head) {
    const u32* table = tables + tables[2 * sequence];
    u32 block = table[position / block_tokens - tables[2 * sequence + 1]];
    return (((u64)block * heads + head) * block_tokens + position % block_tokens) * D;
}

// A block per row and some of its heads (of q, k and v), a thread per pair of numbers: the angle is the same in all.
extern "C" __global__ void append(const AppendParams p) {
    u32 row = blockIdx.x, heads = p.query_heads + 2 * p.kv_heads;
    await_inputs();
    u32 position = p.position[row];
    if (position == PADDING) return;
    for (u32 i = threadIdx.x; i < D / 2; i += blockDim.x) {
        float sine = 0.0f, cosine = 1.0f;
        if (p.rope) {
            sincosf((float)position * p.turns[i], &sine, &cosine);
            sine = rounded(sine), cosine = rounded(cosine);
        }
#pragma unroll 4
        for (u32 head = blockIdx.y; head < heads; head += gridDim.y) {
            T* to;
            if (head < p.query_heads) {
                to = p.q + ((u64)row * p.query_heads + head) * D;
            } else {
                u32 kv = (head - p.query_heads) % p.kv_heads;
                T* plane = head < p.query_heads + p.kv_heads ? p.keys : p.values;
                to = plane + cached(p.tables, p.sequence[row], position, p.block_tokens, p.kv_heads, kv);
            }
            u64 at = ((u64)row * heads + head) * D + 2 * i;
            float a, b;
            if (BF16 && !p.qkv_f32) {
                u32 pair = ((const u32*)p.qkv)[at / 2];
                a = low(pair), b = high(pair);
            } else {
                a = either(p.qkv, p.qkv_f32, at), b = either(p.qkv, p.qkv_f32, at + 1);
            }
            if (p.rope && head < p.query_heads + p.kv_heads) {
                float x = a * cosine - b * sine, y = b * cosine + a * sine;
                a = x, b = y;
            }
#if BF16
            ((u32*)to)[i] = (u32)bf16_bits(a) | (u32)bf16_bits(b) << 16;
#else
            to[2 * i] = a, to[2 * i + 1] = b;
#endif
        }
    }
}

struct AttendParams {
    T* out;         // [T, Q, D], when there is one range
    float* parts;   // [T, Q / GROUP, ranges, GROUP, D] unscaled sums, then as many pairs: largest score, sum of weights
    const T* q;     // [T, Q, D]
    const T* keys;
    const T* values;
    const u32* position;
    const u32* sequence;
    const u32* tables;
    u32 query_heads;
    u32 kv_heads;
    u32 block_tokens;
    u32 window; // keys visible, its own included; 0: all
    u32 ranges;
    u32 rows;           // rows that have parts: T, singles, or tiles · TILE_ROWS
    const u32* singles; // rows that are alone in their sequence (attend_token)
    const u32* tiles;   // per tile: first row, rows; of one sequence (attend_prompt)
    u32* arrived;       // [singles, groups], zero (attend_token)
};

struct AttendTokenParams {
    AttendParams attend;
    const T* qkv;       // [T, (Q + 2K)·D] of rows that `append` has not seen; null: it has
    const float* turns; // as in AppendParams
    u32 rope;
};

// Where a (row, head) keeps the sums of one range: number of the part, counted in heads.
__device__ __forceinline__ u64 part_of(const AttendParams& p, u32 row, u32 head, u32 range) {
    u32 groups = p.query_heads / GROUP;
    return (((u64)row * groups + head / GROUP) * p.ranges + range) * GROUP + head % GROUP;
}

__device__ __forceinline__ float* stats_of(const AttendParams& p, u64 part) {
    return p.parts + (u64)p.rows * p.query_heads * p.ranges * D + part * 2;
}

// Numbers of one head that a lane holds, and lanes to a key. A lane past D holds zeros.
#if BF16 && D % 8 == 0
#define HELD 8
#define HELD_WORDS 4
#elif D % 4 == 0
#define HELD 4
#define HELD_WORDS (BF16 ? 2 : 4)
#else
#define HELD 2
#define HELD_WORDS (BF16 ? 1 : 2)
#endif
#define NEEDED ((D + HELD - 1) / HELD)
#define LANES (NEEDED <= 1 ? 1 : NEEDED <= 2 ? 2 : NEEDED <= 4 ? 4 : NEEDED <= 8 ? 8 : NEEDED <= 16 ? 16 : 32)
// Vectors of a lane: one, unless a head has more than 32 of them.
#define VECTORS ((NEEDED + LANES - 1) / LANES)
#define PER_LANE (HELD * VECTORS)
#define WARPS 4
#define STREAMS (WARPS * (WARP / LANES))
#define LOWEST -1e30f

// A lane's part of one head as it lies in memory.
struct Held {
#if HELD_WORDS == 4
    uint4 data[VECTORS];
#else
    T data[PER_LANE];
#endif
};

__device__ __forceinline__ void request(const T* head, u32 part, Held& held) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        u32 at = (v * LANES + part) * HELD;
#if HELD_WORDS == 4
        held.data[v] = at < D ? load16(head + at) : make_uint4(0, 0, 0, 0);
#else
#pragma unroll
        for (int i = 0; i < HELD; i++) held.data[v * HELD + i] = at < D ? head[at + i] : narrow(0.0f);
#endif
    }
}

__device__ __forceinline__ void take(const Held& held, float* out) {
#if HELD_WORDS == 4
#pragma unroll
    for (int v = 0; v < VECTORS; v++) unpack(held.data[v], out + v * HELD);
#else
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) out[i] = widen(held.data[i]);
#endif
}

__device__ __forceinline__ void fetch(const T* head, u32 part, float* out) {
    Held held;
    request(head, part, held);
    take(held, out);
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attend(const AttendParams p) {
    __shared__ float sums[STREAMS][GROUP][2];
    __shared__ float merged[GROUP][D];
    u32 row = blockIdx.x, group = blockIdx.y, range = blockIdx.z;
    u32 kv = group * GROUP / (p.query_heads / p.kv_heads);
    u32 lane = threadIdx.x % WARP, part = lane % LANES;
    u32 stream = threadIdx.x / WARP * (WARP / LANES) + lane / LANES;
    u32 end = p.position[row] + 1, sequence = p.sequence[row];
    u32 start = p.window && end > p.window ? end - p.window : 0;
    u32 each = (end - start + p.ranges - 1) / p.ranges;
    u32 from = min(start + range * each, end), to = min(from + each, end);

    float q[GROUP][PER_LANE], acc[GROUP][PER_LANE] = {}, most[GROUP], total[GROUP] = {};
    // exp(s · D^-0.5) = exp2(s · D^-0.5 · log2 e)
    const float scale = rsqrtf((float)D) * 1.4426950408889634f;
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        fetch(p.q + ((u64)row * p.query_heads + group * GROUP + h) * D, part, q[h]);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) q[h][i] *= scale;
        most[h] = LOWEST;
    }
    // Streams of one warp go through the same number of rounds, so that shuffles meet. The next round's keys and
    // values are on their way while this one's are used.
    auto place = [&](u32 key) {
        return cached(p.tables, sequence, key < to ? key : from, p.block_tokens, p.kv_heads, kv);
    };
    Held next_key, next_value;
    u64 at = from < to ? place(from + stream) : 0;
    if (from < to) request(p.keys + at, part, next_key), request(p.values + at, part, next_value);
    at = from < to ? place(from + stream + STREAMS) : 0;
    for (u32 first = from; first < to; first += STREAMS) {
        bool here = first + stream < to;
        Held this_key = next_key, this_value = next_value;
        request(p.keys + at, part, next_key), request(p.values + at, part, next_value);
        at = place(first + stream + 2 * STREAMS);
        float k[PER_LANE], v[PER_LANE], score[GROUP];
        take(this_key, k), take(this_value, v);
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            score[h] = 0.0f;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) score[h] = fmaf(q[h][i], k[i], score[h]);
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2) score[h] += __shfl_xor_sync(ALL, score[h], step);
        }
        if (!here) continue;
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            if (score[h] > most[h]) {
                float shrink = exp2f(most[h] - score[h]);
                most[h] = score[h];
                total[h] *= shrink;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) acc[h][i] *= shrink;
            }
            float weight = exp2f(score[h] - most[h]);
            total[h] += weight;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) acc[h][i] = fmaf(weight, v[i], acc[h][i]);
        }
    }
    if (part == 0) {
#pragma unroll
        for (int h = 0; h < GROUP; h++) sums[stream][h][0] = most[h], sums[stream][h][1] = total[h];
    }
    for (u32 i = threadIdx.x; i < GROUP * D; i += WARPS * WARP) (&merged[0][0])[i] = 0.0f;
    __syncthreads();
    float all[GROUP], count[GROUP];
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        all[h] = LOWEST, count[h] = 0.0f;
#pragma unroll 4
        for (int s = 0; s < STREAMS; s++) all[h] = fmaxf(all[h], sums[s][h][0]);
#pragma unroll 4
        for (int s = 0; s < STREAMS; s++) count[h] += sums[s][h][1] * exp2f(sums[s][h][0] - all[h]);
    }
    // One stream after the other, so that sums come out the same in every run.
#pragma unroll 1
    for (u32 turn = 0; turn < STREAMS; turn++) {
        if (turn == stream) {
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                float shrink = exp2f(most[h] - all[h]);
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) {
                    u32 d = (i / HELD * LANES + part) * HELD + i % HELD;
                    if (d < D) merged[h][d] += acc[h][i] * shrink;
                }
            }
        }
        __syncthreads();
    }
    for (u32 i = threadIdx.x; i < GROUP * D; i += WARPS * WARP) {
        u32 h = i / D, d = i % D;
        if (p.ranges == 1) {
            float sum = 0.0f;
#pragma unroll
            for (int g = 0; g < GROUP; g++) sum = g == h ? count[g] : sum;
            p.out[((u64)row * p.query_heads + group * GROUP + h) * D + d] = narrow(sum > 0.0f ? merged[h][d] / sum : 0.0f);
        } else {
            p.parts[part_of(p, row, group * GROUP + h, range) * D + d] = merged[h][d];
        }
    }
    if (p.ranges > 1 && threadIdx.x == 0) {
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            float* stats = stats_of(p, part_of(p, row, group * GROUP + h, range));
            stats[0] = all[h], stats[1] = count[h];
        }
    }
}

// Merges the ranges of one (row, head), of every row or of every tile's rows: a block each, its warps share the ranges; at most RANGES_MAX.
#define RANGES_MAX 128
#define MERGE_WARPS 8
// Rows of a prompt that a block of attend_prompt takes.
#define TILE_ROWS 16
#define COLUMNS ((D + WARP - 1) / WARP)
extern "C" __global__ void __launch_bounds__(MERGE_WARPS* WARP) merge(const AttendParams p) {
    __shared__ float weights[RANGES_MAX], sums[MERGE_WARPS][D];
    u32 row = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, to = row;
    if (p.tiles) {
        u32 tile = row / TILE_ROWS, place = row % TILE_ROWS;
        if (place >= p.tiles[2 * tile + 1]) return;
        to = p.tiles[2 * tile] + place;
    }
    // Every warp computes all weights, so that no barrier stands between them and the sums.
    float most = LOWEST, total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < RANGES_MAX; i += WARP) {
        if (i + lane < p.ranges) most = fmaxf(most, stats_of(p, part_of(p, row, head, i + lane))[0]);
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
#pragma unroll
    for (u32 i = 0; i < RANGES_MAX; i += WARP) {
        if (i + lane >= p.ranges) continue;
        const float* stats = stats_of(p, part_of(p, row, head, i + lane));
        float weight = exp2f(stats[0] - most);
        total = fmaf(stats[1], weight, total);
        if (warp == 0) weights[i + lane] = weight;
    }
    total = warp_sum(total);
    __syncthreads();
    // All numbers of a lane's columns from several ranges on their way at once.
    float held[COLUMNS] = {};
    const float* parts = p.parts + part_of(p, row, head, 0) * D;
#pragma unroll 4
    for (u32 r = warp; r < p.ranges; r += MERGE_WARPS) {
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            u32 d = lane + i * WARP;
            float part = d < D ? parts[(u64)r * GROUP * D + d] : 0.0f;
            held[i] = fmaf(part, weights[r], held[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        if (lane + i * WARP < D) sums[warp][lane + i * WARP] = held[i];
    }
    __syncthreads();
    for (u32 d = threadIdx.x; d < D; d += MERGE_WARPS * WARP) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < MERGE_WARPS; w++) sum += sums[w][d];
        p.out[((u64)to * p.query_heads + head) * D + d] = narrow(total > 0.0f ? sum / total : 0.0f);
    }
}
