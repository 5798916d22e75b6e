// Ops on rows that only move memory: embedding, rounding, sums, SiLU gates, gathers, norms.
//
// Bytes: each input read once, each output written once (a norm reads its row twice, the second time from L1).
// Floor at T = 1, H = 2048, bf16: 8 KiB, far under a launch; at T = 2048: 16 MiB, 5 us at 3.35 TB/s.

struct EmbedParams {
    float* out;        // [T, width]
    const T* table;    // [rows, width]
    const u32* tokens; // [T]; with FED, the logit row of the step before whose token it is
    const u32* drawn;  // by logit row of the step before
    u32 first;
    u32 rows;
    u32 width;
};

#define FED 0x80000000u

// out[t] = table[tokens[t] - first], or zeros for a token that another rank holds and where none was drawn.
extern "C" __global__ void embed(const EmbedParams p) {
    u64 row = blockIdx.x;
    u32 token = p.tokens[row];
    if (token & FED) token = p.drawn[token & ~FED];
    u32 local = token - p.first;
    bool own = token >= p.first && local < p.rows;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        p.out[row * p.width + i] = own ? widen(p.table[(u64)local * p.width + i]) : 0.0f;
    }
}

struct SumParams {
    void* out;     // [count], fp32 or T
    const void* a; // [count], fp32 or T
    const void* b; // [count], fp32 or T
    u64 count;
    float scale;
    u32 out_f32;
    u32 a_f32;
    u32 b_f32;
};

// out = a + scale · b; `out` may be `a`.
extern "C" __global__ void sum(const SumParams p) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.count) return;
    float v = fmaf(p.scale, either(p.b, p.b_f32, at), either(p.a, p.a_f32, at));
    if (p.out_f32) {
        ((float*)p.out)[at] = v;
    } else {
        ((T*)p.out)[at] = narrow(v);
    }
}

struct RoundParams {
    T* out;         // [count]
    const float* x; // [count]
    u64 count;
};

extern "C" __global__ void round_to_storage(const RoundParams p) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < p.count) p.out[at] = narrow(p.x[at]);
}

struct SwigluParams {
    T* out;           // [rows, width]
    const T* gate_up; // [rows, 2 width], gate first
    u64 rows;
    u32 width;
};

// silu(gate) · up, each factor rounded as the reference stores it.
extern "C" __global__ void swiglu(const SwigluParams p) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.rows * p.width) return;
    u64 row = at / p.width;
    const T* gate_up = p.gate_up + row * 2 * p.width + at % p.width;
    float gate = widen(gate_up[0]);
    p.out[at] = narrow(rounded(gate * sigmoid(gate)) * widen(gate_up[p.width]));
}

struct GatherParams {
    void* out;        // [count, width]
    const void* x;    // [T, width]
    const u32* which; // [count] rows of x
    u32 width;
    u32 is_f32;
};

extern "C" __global__ void gather(const GatherParams p) {
    u64 from = (u64)p.which[blockIdx.x] * p.width, to = (u64)blockIdx.x * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        if (p.is_f32) {
            ((float*)p.out)[to + i] = ((const float*)p.x)[from + i];
        } else {
            ((T*)p.out)[to + i] = ((const T*)p.x)[from + i];
        }
    }
}

// Rows on their way to the ranks that hold their experts, and back: values, k expert numbers (fp32 holds them exactly),
// k weights. The host says which row goes where (`dispatch.rs`).
struct PackParams {
    float* out;         // [N, width + 2 top_k]
    const void* x;      // [T, width]
    const u32* experts; // [T, top_k]
    const float* weights;
    const u32* source; // [N] rows of x
    u32 width;
    u32 top_k;
    u32 x_f32;
};

extern "C" __global__ void pack_rows(const PackParams p) {
    u64 from = p.source[blockIdx.x];
    u32 whole = p.width + 2 * p.top_k;
    float* out = p.out + (u64)blockIdx.x * whole;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) out[i] = either(p.x, p.x_f32, from * p.width + i);
    for (u32 i = threadIdx.x; i < p.top_k; i += blockDim.x) {
        out[p.width + i] = (float)p.experts[from * p.top_k + i];
        out[p.width + p.top_k + i] = p.weights[from * p.top_k + i];
    }
}

struct UnpackParams {
    T* x;         // [N, width]
    u32* experts; // [N, top_k]
    float* weights;
    const float* rows; // [N, width + 2 top_k]
    u32 width;
    u32 top_k;
};

extern "C" __global__ void unpack_rows(const UnpackParams p) {
    u64 row = blockIdx.x;
    u32 whole = p.width + 2 * p.top_k;
    const float* in = p.rows + row * whole;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) p.x[row * p.width + i] = narrow(in[i]);
    for (u32 i = threadIdx.x; i < p.top_k; i += blockDim.x) {
        p.experts[row * p.top_k + i] = (u32)in[p.width + i];
        p.weights[row * p.top_k + i] = in[p.width + p.top_k + i];
    }
}

struct CombineRowsParams {
    float* out;            // [T, width]
    const float* returned; // [N, width]
    const u32* first;      // [T + 1]: row t takes place[first[t]..first[t + 1]]
    const u32* place;      // [N] rows of returned, of each row in rank order
    u32 width;
};

extern "C" __global__ void combine_rows(const CombineRowsParams p) {
    u32 begin = p.first[blockIdx.x], end = p.first[blockIdx.x + 1];
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        float sum = 0.0f;
        for (u32 n = begin; n < end; n++) sum += p.returned[(u64)p.place[n] * p.width + i];
        p.out[(u64)blockIdx.x * p.width + i] = sum;
    }
}

// What of a row each thread keeps in registers; wider rows are read again.
#define KEPT 4
#define NORM_THREADS 256

// Rows of T in whole vectors, at most KEPT of them to a thread: one read.
__device__ __forceinline__ void norm_kept(const NormParams& p) {
    const T* x = (const T*)p.x + (u64)blockIdx.x * p.width;
    float values[KEPT][VECTOR];
    u32 vectors = p.width / VECTOR;
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        u32 at = threadIdx.x + i * NORM_THREADS;
        unpack(at < vectors ? load16(x + at * VECTOR) : make_uint4(0, 0, 0, 0), values[i]);
#pragma unroll
        for (int n = 0; n < VECTOR; n++) sum += values[i][n];
    }
    if (p.layer) mean = block_sum(sum) / (float)p.width;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        bool here = threadIdx.x + i * NORM_THREADS < vectors;
#pragma unroll
        for (int n = 0; n < VECTOR; n++) {
            float v = here ? values[i][n] - mean : 0.0f;
            squares = fmaf(v, v, squares);
        }
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)p.width + p.eps);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        u32 at = threadIdx.x + i * NORM_THREADS;
        if (at >= vectors) continue;
        float weight[VECTOR];
        unpack(load16(p.weight + at * VECTOR), weight);
        union {
            T parts[VECTOR];
            uint4 all;
        } out;
#pragma unroll
        for (int n = 0; n < VECTOR; n++) out.parts[n] = normed(p, values[i][n], mean, factor, weight[n]);
        ((uint4*)(p.out + (u64)blockIdx.x * p.width))[at] = out.all;
    }
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) norm_rows(const NormParams p) {
    u64 row = (u64)blockIdx.x * p.width;
    bool is_t = !BF16 || !p.x_f32;
    if (is_t && p.width % VECTOR == 0 && p.width <= KEPT * NORM_THREADS * VECTOR) return norm_kept(p);
    float mean = 0.0f;
    if (p.layer) {
        float sum = 0.0f;
        for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) sum += either(p.x, p.x_f32, row + i);
        mean = block_sum(sum) / (float)p.width;
    }
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        float v = either(p.x, p.x_f32, row + i) - mean;
        squares = fmaf(v, v, squares);
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)p.width + p.eps);
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        p.out[row + i] = normed(p, either(p.x, p.x_f32, row + i), mean, factor, widen(p.weight[i]));
    }
}

struct ResidualNormParams {
    T* x;             // [T, width] the residual stream, in and out
    T* out;           // [T, width] its norm
    const float* sum; // [T, width]
    const float* more; // [T, width], times `scale`; null: nothing
    const T* weight;  // [width]
    u32 width;
    float scale;
    float eps;
    u32 layer;
};

// x += sum + scale · more, rounded, and its norm, in one pass. Rows in whole vectors, at most KEPT of them to a thread.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) residual_norm(const ResidualNormParams p) {
    u64 row = (u64)blockIdx.x * p.width;
    u32 vectors = p.width / VECTOR;
    float values[KEPT][VECTOR] = {};
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
    release_next();
    // Weights are there before anything else is.
    uint4 weights[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        u32 at = threadIdx.x + i * NORM_THREADS;
        weights[i] = at < vectors ? load16(p.weight + at * VECTOR) : make_uint4(0, 0, 0, 0);
    }
    await_inputs();
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        u32 at = threadIdx.x + i * NORM_THREADS;
        if (at >= vectors) continue;
        u64 from = row + at * VECTOR;
        unpack(load16(p.x + from), values[i]);
        union {
            T parts[VECTOR];
            uint4 all;
        } out;
#pragma unroll
        for (int n = 0; n < VECTOR; n += 4) {
            float4 a = *(const float4*)(p.sum + from + n);
            if (p.more) {
                float4 b = *(const float4*)(p.more + from + n);
                a.x = fmaf(p.scale, b.x, a.x), a.y = fmaf(p.scale, b.y, a.y);
                a.z = fmaf(p.scale, b.z, a.z), a.w = fmaf(p.scale, b.w, a.w);
            }
            values[i][n] += a.x, values[i][n + 1] += a.y, values[i][n + 2] += a.z, values[i][n + 3] += a.w;
        }
#pragma unroll
        for (int n = 0; n < VECTOR; n++) {
            out.parts[n] = narrow(values[i][n]);
            values[i][n] = widen(out.parts[n]);
            sum += values[i][n];
        }
        *(uint4*)(p.x + from) = out.all;
    }
    if (p.layer) mean = block_sum(sum) / (float)p.width;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        bool here = threadIdx.x + i * NORM_THREADS < vectors;
#pragma unroll
        for (int n = 0; n < VECTOR; n++) {
            float v = here ? values[i][n] - mean : 0.0f;
            squares = fmaf(v, v, squares);
        }
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)p.width + p.eps);
    NormParams norm;
    norm.layer = p.layer;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        u32 at = threadIdx.x + i * NORM_THREADS;
        if (at >= vectors) continue;
        float weight[VECTOR];
        unpack(weights[i], weight);
        union {
            T parts[VECTOR];
            uint4 all;
        } out;
#pragma unroll
        for (int n = 0; n < VECTOR; n++) out.parts[n] = normed(norm, values[i][n], mean, factor, weight[n]);
        *(uint4*)(p.out + row + at * VECTOR) = out.all;
    }
}

struct NoteParams {
    u32* at; // of page-locked memory
    u32 value;
};

// Tells the host how far the card has come.
extern "C" __global__ void note(const NoteParams p) { *(volatile u32*)p.at = p.value; }

struct FillParams {
    T* out; // [count]
    u64 count;
    u64 seed;
    float scale;
};

// Seeded weights, uniform in ±scale.
extern "C" __global__ void fill(const FillParams p) {
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < p.count; at += step) {
        float unit = (float)hashed(p.seed * 0x100000001b3ull + at) * (2.0f / 4294967296.0f) - 1.0f;
        p.out[at] = narrow(unit * p.scale);
    }
}

struct JoinParams {
    void* out;         // [rows, width], T
    const void* parts; // [ranks, rows, each], T
    u32 rows;
    u32 each;
    u32 width;
};

// Parts of rows from ranks one after the other to whole rows; blockIdx.y is the row, blocks share its columns.
extern "C" __global__ void __launch_bounds__(256) join_ranks(const JoinParams p) {
    u32 first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    u64 row = blockIdx.y;
    if (p.each % VECTOR == 0 && p.width % VECTOR == 0) {
        for (u32 at = first; at < p.width / VECTOR; at += step) {
            u32 column = at * VECTOR;
            u64 from = (u64)(column / p.each * p.rows + row) * p.each + column % p.each;
            *(uint4*)((T*)p.out + row * p.width + column) = load16((const T*)p.parts + from);
        }
        return;
    }
    for (u32 at = first; at < p.width; at += step) {
        u64 from = (u64)(at / p.each * p.rows + row) * p.each + at % p.each;
        ((T*)p.out)[row * p.width + at] = ((const T*)p.parts)[from];
    }
}
