// Rotary embedding with KV append, and paged attention for prompts and single tokens alike. Constants: D head
// dimension, GROUP query heads handled together (they share a key/value head).
//
// qkv [T, (Q + 2K)·D]; a cache layer holds keys, then values, each [blocks, K, block tokens, D].
// Attention: out[t, h] = Σ_j softmax_j(q[t, h] · k[j] · D^-0.5) · v[j] over the visible positions j, scores fp32.
// Split-KV: a block takes one row, one group of heads and a range of keys; its warps keep several independent running
// softmaxes (LANES lanes each hold one key), merged in shared memory; ranges are merged by a second launch.
// Bytes of a decode row: 2·keys·K·D·2 (bf16). North, full layer at 8K: 16.8 MB, floor 5.0 us at 3.35 TB/s; sliding
// layer (4096): 8.4 MB, 2.5 us. Prompts read their keys once per row, from L2: right, and not the fast path.

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

// A block per (row, head of q, k or v), a thread per pair of numbers.
extern "C" __global__ void append(const AppendParams p) {
    u32 row = blockIdx.x, head = blockIdx.y;
    u32 heads = p.query_heads + 2 * p.kv_heads;
    u32 position = p.position[row];
    bool turned = p.rope && head < p.query_heads + p.kv_heads;
    T* to;
    if (head < p.query_heads) {
        to = p.q + ((u64)row * p.query_heads + head) * D;
    } else {
        u32 kv = (head - p.query_heads) % p.kv_heads;
        T* plane = head < p.query_heads + p.kv_heads ? p.keys : p.values;
        to = plane + cached(p.tables, p.sequence[row], position, p.block_tokens, p.kv_heads, kv);
    }
    for (u32 i = threadIdx.x; i < D / 2; i += blockDim.x) {
        u64 at = ((u64)row * heads + head) * D + 2 * i;
        float a = either(p.qkv, p.qkv_f32, at), b = either(p.qkv, p.qkv_f32, at + 1);
        if (turned) {
            float sine, cosine;
            sincosf((float)position * p.turns[i], &sine, &cosine);
            sine = rounded(sine), cosine = rounded(cosine);
            float x = a * cosine - b * sine, y = b * cosine + a * sine;
            a = x, b = y;
        }
        to[2 * i] = narrow(a), to[2 * i + 1] = narrow(b);
    }
}

struct AttendParams {
    T* out;         // [T, Q, D], when there is one range
    float* parts;   // [T, Q / GROUP, ranges, GROUP, D + 2]: unscaled sums, then largest score and sum of exponentials
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
};

// Numbers of one head that a lane holds, and lanes to a key. A lane past D holds zeros.
#define HELD (D % VECTOR == 0 ? VECTOR : D % 4 == 0 ? 4 : 2)
#define NEEDED ((D + HELD - 1) / HELD)
#define LANES (NEEDED <= 1 ? 1 : NEEDED <= 2 ? 2 : NEEDED <= 4 ? 4 : NEEDED <= 8 ? 8 : NEEDED <= 16 ? 16 : 32)
// Vectors of a lane: one, unless a head has more than 32 of them.
#define VECTORS ((NEEDED + LANES - 1) / LANES)
#define PER_LANE (HELD * VECTORS)
#define WARPS 4
#define STREAMS (WARPS * (WARP / LANES))
#define LOWEST -1e30f

__device__ __forceinline__ void fetch(const T* head, u32 part, float* out) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        u32 at = (v * LANES + part) * HELD;
        if (HELD == VECTOR) {
            uint4 data = at < D ? load16(head + at) : make_uint4(0, 0, 0, 0);
            unpack(data, out + v * HELD);
        } else {
#pragma unroll
            for (int i = 0; i < HELD; i++) out[v * HELD + i] = at < D ? widen(head[at + i]) : 0.0f;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attend(const AttendParams p) {
    __shared__ float sums[STREAMS][GROUP][2];
    __shared__ float merged[GROUP][D];
    u32 row = blockIdx.x, group = blockIdx.y, range = blockIdx.z;
    u32 groups = p.query_heads / GROUP, kv = group * GROUP / (p.query_heads / p.kv_heads);
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
    // Streams of one warp go through the same number of rounds, so that shuffles meet.
    for (u32 first = from; first < to; first += STREAMS) {
        u32 key = first + stream;
        bool here = key < to;
        u64 at = cached(p.tables, sequence, here ? key : from, p.block_tokens, p.kv_heads, kv);
        float k[PER_LANE], v[PER_LANE], score[GROUP];
        fetch(p.keys + at, part, k);
        fetch(p.values + at, part, v);
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
            p.out[((u64)row * p.query_heads + group * GROUP + h) * D + d] = narrow(merged[h][d] / sum);
        } else {
            u64 at = (((u64)row * groups + group) * p.ranges + range) * GROUP + h;
            p.parts[at * (D + 2) + d] = merged[h][d];
        }
    }
    if (p.ranges > 1 && threadIdx.x == 0) {
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            u64 at = (((u64)row * groups + group) * p.ranges + range) * GROUP + h;
            p.parts[at * (D + 2) + D] = all[h], p.parts[at * (D + 2) + D + 1] = count[h];
        }
    }
}

// Merges the ranges of one (row, head): a block each.
extern "C" __global__ void merge(const AttendParams p) {
    u32 row = blockIdx.x, head = blockIdx.y, groups = p.query_heads / GROUP;
    const float* parts = p.parts + (((u64)row * groups + head / GROUP) * p.ranges * GROUP + head % GROUP) * (D + 2);
    const u64 stride = (u64)GROUP * (D + 2);
    float most = LOWEST, total = 0.0f;
    for (u32 r = 0; r < p.ranges; r++) most = fmaxf(most, parts[r * stride + D]);
    for (u32 r = 0; r < p.ranges; r++) total += parts[r * stride + D + 1] * exp2f(parts[r * stride + D] - most);
    for (u32 d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0.0f;
        for (u32 r = 0; r < p.ranges; r++) sum += parts[r * stride + d] * exp2f(parts[r * stride + D] - most);
        p.out[((u64)row * p.query_heads + head) * D + d] = narrow(sum / total);
    }
}
