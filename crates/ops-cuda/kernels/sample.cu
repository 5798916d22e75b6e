// One token of each row of logits [R, V], or how likely tokens are, drawn as ops::sample defines it: bias, penalties and
// exclusions; softmax(logits / temperature), the k most likely, the smallest set of the most likely that reaches top_p of
// those, those at least min_p as likely as the best; then a draw through what is left in order of ids by one uniform
// number. Log-probabilities are those of the row as the model made it.
//
// A row is work for as many blocks as it has segments of 4096 numbers; the last block of a row to arrive does what needs
// all of them. Launches, each only where a row of the step needs it:
//   adjust  the row as rules and penalties want it, in fp32: masked while it is copied, then patched token by token
//   survey  its best token, its lowest finite logit, whether one is not a number
//   spread  how many tokens, of what weight, fall into each of 2048 equal parts of its range of logits; so where the cuts of
//           top_k and top_p must be
//   cut     the tokens around the cut listed and put in order; the key at which it is
//   draw    the weight of what is kept, by segments; the segment and then the token at the uniform number
// All weights are fp64 and sums of them too, in an order that does not depend on timing: a token differs from the host's only
// where the uniform number or top_p falls within 10^-11 of a boundary. Where the tokens around a cut are more than a block
// lists (thousands of equal logits), one block halves the range of keys instead, a pass over the row each time.
// Bytes: a row of V numbers twice (without top_k and top_p) to four times, all but the first from L2. V 262144, bf16: 0.5 MB
// each, floor 0.13 us of memory for the first; with top_p two fp64 exponentials a token more, 40 operations each: 0.7 us
// each on all multiprocessors. Bound by the latency of the launches: predicted 3 to 5 us each, 10 to 20 us a row or few.

struct SampleJob {
    double at;       // uniform in [0, 1)
    const void* x;   // the row
    const void* raw; // the row as the model made it
    float scale;     // of x
    float raw_scale;
    float temperature;
    float top_p;
    float min_p;
    u32 top_k; // 0: all; of a report: how many are listed
    u32 kind;
    u32 x_f32;
    u32 raw_f32;
    u32 row;    // whose token it is
    u32 target; // of a report without a draw: the token; else NONE
    u32 bins;   // which bins and list are its own; NONE: it needs none
    u32 bad_at; // words
    u32 bad_count;
    u32 tops_at; // entries
    u32 unused;
};

#define KIND_GREEDY 1
#define KIND_DRAWN 2
#define KIND_REPORT 3

struct SampleAdjust {
    float* out;    // [V]
    const void* x; // [V]
    float scale;
    u32 is_f32;
    float repetition;
    float frequency;
    float presence;
    u32 job;
    u32 mask_at;    // words from here on; NONE: all may be drawn
    u32 mask_words; // tokens beyond them may not
    u32 bias_at;    // pairs of token and fp32
    u32 bias_count;
    u32 seen_at; // pairs of token and number
    u32 seen_count;
    u32 banned_at; // tokens
    u32 banned_count;
    u32 bad_at; // tokens, each once
    u32 bad_count;
};

#define NONE 0xffffffffu
#define NOT_A_NUMBER 0xfffffffeu
#define THREADS 512
#define WARPS (THREADS / WARP)
#define EACH 8
#define TILE (THREADS * EACH)
#define SEGMENTS_MAX THREADS
#define BINS 2048
#define LIST_MAX 4096
#define BAD_MAX 256
// A token less likely than the best by this power of e is no candidate.
#define NEGLIGIBLE 36.0
// Weights in bins are in units of 2^-36, in two halves.
#define HALF_BITS 18

#define COURSE_NONE 0
#define COURSE_LISTED 1
#define COURSE_HALVED 2

// What the launches tell each other of a row; zero at first.
struct SampleState {
    u64 best;          // the best token's key; all ones: a logit is not a number
    u64 cut;           // what is kept has at least this key
    double wanted;     // the weight that top_p asks for
    u32 lowest;        // complement of the lowest finite logit's key
    u32 wrong;         // whether `adjust` saw what is not a number
    u32 arrived[5];    // blocks of each launch
    u32 from, to;      // bins that are listed
    u32 above;         // tokens in bins before those
    u32 listed;
    u32 course;
    u32 by_count, by_weight; // which cuts there are
    float saved[BAD_MAX];
    double sums[SEGMENTS_MAX];
};

struct SampleBins {
    u64 weights[BINS];
    u32 counts[BINS];
};

struct SampleFound {
    double sum;  // of exp(logit - most)
    float most;
    float logit; // of the token
    u32 listed;
    u32 wrong;
};

struct SampleTop {
    u32 token;
    float logit;
};

struct SampleParams {
    const SampleJob* jobs;
    const SampleAdjust* adjusts;
    const u32* words;
    SampleState* states; // [jobs]
    SampleBins* bins;
    u64* lists;          // [.., LIST_MAX]
    u32* tokens;         // [R]
    SampleFound* found;  // [jobs]
    SampleTop* tops;
    u32 width;
    u32 segment; // numbers of a block, a multiple of TILE
};

// The host lays these out.
static_assert(sizeof(SampleJob) == 88 && sizeof(SampleAdjust) == 80, "what is staged");
static_assert(sizeof(SampleState) == 5200 && sizeof(SampleBins) == 24576, "what is reserved");
static_assert(sizeof(SampleFound) == 24 && sizeof(SampleTop) == 8, "what comes back");

__device__ __forceinline__ u32 ordered(float v) {
    u32 bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The larger logit has the larger key, of equals the lowest token.
__device__ __forceinline__ u64 key_of(float v, u32 token) { return (u64)ordered(v) << 32 | (u32)~token; }

template <class V>
__device__ __forceinline__ V fresh_of(const V* at) {
    return *(const volatile V*)at;
}

// Sum over the block, for every thread.
__device__ __forceinline__ double total(double v, double* shared) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = v;
    __syncthreads();
    v = threadIdx.x % WARP < WARPS ? shared[threadIdx.x % WARP] : 0.0;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    return v;
}

// Sum over this thread and those before it.
__device__ __forceinline__ double running(double v, double* shared) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        double left = __shfl_up_sync(ALL, v, step);
        if (lane >= step) v += left;
    }
    __syncthreads();
    if (lane == WARP - 1) shared[warp] = v;
    __syncthreads();
    double before = 0.0;
    for (u32 i = 0; i < warp; i++) before += shared[i];
    return before + v;
}

__device__ __forceinline__ u64 largest_of(u64 v, double* shared) {
    u64* keys = (u64*)shared;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v = max(v, __shfl_xor_sync(ALL, v, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) keys[threadIdx.x / WARP] = v;
    __syncthreads();
    v = keys[threadIdx.x % WARPS];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v = max(v, __shfl_xor_sync(ALL, v, step));
    return v;
}

// EACH numbers from `at` on, a multiple of EACH; those from `end` on are minus infinity.
__device__ __forceinline__ void load(const void* x, u32 is_f32, u32 at, u32 end, float* v) {
    bool wide = is_f32 || !BF16;
    if (at + EACH <= end && (u64)x % 16 == 0) {
        if (wide) {
            uint4 first = load16((const float*)x + at), second = load16((const float*)x + at + 4);
            v[0] = __uint_as_float(first.x), v[1] = __uint_as_float(first.y);
            v[2] = __uint_as_float(first.z), v[3] = __uint_as_float(first.w);
            v[4] = __uint_as_float(second.x), v[5] = __uint_as_float(second.y);
            v[6] = __uint_as_float(second.z), v[7] = __uint_as_float(second.w);
        } else {
            uint4 all = load16((const u16*)x + at);
            v[0] = low(all.x), v[1] = high(all.x), v[2] = low(all.y), v[3] = high(all.y);
            v[4] = low(all.z), v[5] = high(all.z), v[6] = low(all.w), v[7] = high(all.w);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = at + i < end ? either(x, wide, at + i) : __int_as_float(0xff800000);
}

// A row and what its logits weigh.
struct Row {
    const void* x;
    u32 is_f32;
    float scale;
    bool report;
    u32 width;
    float most;
    float floor; // lower logits are no candidates
    double inverse; // 1 / temperature

    __device__ __forceinline__ double weight(float v) const { return exp(((double)v - (double)most) * inverse); }

    // Calls each(logit, token, valid) for EACH tokens from `at` on; all threads of a warp do.
    template <class Each>
    __device__ __forceinline__ void piece(u32 at, u32 end, Each each) const {
        float v[EACH];
        load(x, is_f32, at, end, v);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            // Adding zero makes the two zeros equal, as they are to a draw; a report keeps them apart.
            float scaled = report ? __fmul_rn(v[i], scale) : fmaf(v[i], scale, 0.0f);
            each(scaled, at + i, at + i < end);
        }
    }

    // Calls it for all tokens from `first` to `end`.
    template <class Each>
    __device__ __forceinline__ void visit(u32 first, u32 end, Each each) const {
        for (u32 tile = first; tile < end; tile += TILE) piece(tile + threadIdx.x * EACH, end, each);
    }
};

__device__ __forceinline__ Row row_of(const SampleJob& job, const SampleState& state, u32 width) {
    bool report = job.kind == KIND_REPORT;
    float most = value_of((u32)(fresh_of(&state.best) >> 32));
    double temperature = report ? 1.0 : (double)job.temperature;
    float floor = __double2float_ru((double)most - NEGLIGIBLE * temperature);
    return {job.x, job.x_f32, job.scale, report, width, most, floor, 1.0 / temperature};
}

// Whether `survey` left something to do.
__device__ __forceinline__ bool is_open(const SampleJob& job, const SampleState& state) {
    u64 best = fresh_of(&state.best);
    float most = value_of((u32)(best >> 32));
    if (best == ~0ull || job.kind == KIND_GREEDY) return false;
    return job.kind == KIND_REPORT || most - most == 0.0f;
}

// Notes a row's token.
__device__ __forceinline__ void settle(const SampleParams& p, const SampleJob& job, u32 token) {
    p.tokens[job.row] = token;
    float logit = token < p.width ? __fmul_rn(either(job.raw, job.raw_f32 || !BF16, token), job.raw_scale) : 0.0f;
    p.found[blockIdx.y].logit = logit;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) adjust(const SampleParams p) {
    SampleAdjust a = p.adjusts[blockIdx.y];
    SampleState& state = p.states[a.job];
    u32 first = blockIdx.x * p.segment, end = min(first + p.segment, p.width);
    const float excluded = __int_as_float(0xff800000);
    bool wrong = false;
    for (u32 tile = first; tile < end; tile += TILE) {
        u32 at = tile + threadIdx.x * EACH;
        if (at >= end) break;
        float v[EACH];
        load(a.x, a.is_f32, at, end, v);
        u32 bits = ~0u;
        if (a.mask_at != NONE) bits = at / 32 < a.mask_words ? p.words[a.mask_at + at / 32] >> at % 32 : 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            wrong |= v[i] != v[i];
            v[i] = bits >> i & 1 ? __fmul_rn(v[i], a.scale) : excluded;
        }
        // Rows in scratch begin at multiples of 16 bytes.
        if (at + EACH <= end) {
            *(float4*)(a.out + at) = make_float4(v[0], v[1], v[2], v[3]);
            *(float4*)(a.out + at + 4) = make_float4(v[4], v[5], v[6], v[7]);
        } else {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (at + i < end) a.out[at + i] = v[i];
            }
        }
    }
    if (__syncthreads_or(wrong) && threadIdx.x == 0) atomicExch(&state.wrong, 1);
    if (!last_to_arrive(&state.arrived[0], gridDim.x)) return;
    // What is excluded stays so: the order of the reference, whose exclusions come last, gives the same.
    auto all_done = [&] {
        __threadfence();
        __syncthreads();
    };
    const u32* pairs = p.words + a.bias_at;
    for (u32 i = threadIdx.x; i < a.bias_count; i += THREADS) {
        u32 token = pairs[2 * i];
        if (token < p.width) a.out[token] = __fadd_rn(fresh(a.out + token), __uint_as_float(pairs[2 * i + 1]));
    }
    all_done();
    pairs = p.words + a.seen_at;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < a.seen_count; i += THREADS) {
        u32 token = pairs[2 * i], times = pairs[2 * i + 1];
        if (token >= p.width) continue;
        float v = fresh(a.out + token);
        v = v > 0.0f ? __fdiv_rn(v, a.repetition) : __fmul_rn(v, a.repetition);
        if (times > 0) v = __fsub_rn(v, __fadd_rn(__fmul_rn(a.frequency, (float)times), a.presence));
        a.out[token] = v;
    }
    all_done();
    for (u32 i = threadIdx.x; i < a.banned_count; i += THREADS) {
        u32 token = p.words[a.banned_at + i];
        if (token < p.width) a.out[token] = excluded;
    }
    all_done();
    // Kept for the case that nothing else is left.
    for (u32 i = threadIdx.x; i < a.bad_count; i += THREADS) {
        u32 token = p.words[a.bad_at + i];
        if (token >= p.width) continue;
        state.saved[i] = fresh(a.out + token);
        a.out[token] = excluded;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) survey(const SampleParams p) {
    __shared__ double shared[WARP];
    await_inputs();
    SampleJob job = p.jobs[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    bool report = job.kind == KIND_REPORT;
    Row row = {job.x, job.x_f32, job.scale, report, p.width, 0.0f, 0.0f, 1.0};
    u32 first = blockIdx.x * p.segment, end = min(first + p.segment, p.width), lowest = 0;
    u64 best = 0;
    auto take = [&](float v, u32 token) {
        best = max(best, v != v ? ~0ull : key_of(v, token));
        if (v - v == 0.0f) lowest = max(lowest, ~ordered(v));
    };
    row.visit(first, end, [&](float v, u32 token, bool valid) {
        if (valid) take(v, token);
    });
    best = largest_of(best, shared);
    lowest = (u32)largest_of(lowest, shared);
    if (threadIdx.x == 0) {
        atomicMax(&state.best, best);
        atomicMax(&state.lowest, lowest);
    }
    if (!last_to_arrive(&state.arrived[1], gridDim.x)) return;
    best = fresh_of(&state.best), lowest = fresh_of(&state.lowest);
    if (fresh_of(&state.wrong)) best = ~0ull;
    if ((u32)(best >> 32) == ordered(__int_as_float(0xff800000)) && job.bad_count) {
        // Bad words leave nothing: they are let through.
        best = 0, lowest = 0;
        for (u32 i = threadIdx.x; i < job.bad_count; i += THREADS) {
            u32 token = p.words[job.bad_at + i];
            if (token >= p.width) continue;
            float v = state.saved[i];
            ((float*)job.x)[token] = v;
            take(fmaf(v, job.scale, 0.0f), token);
        }
        best = largest_of(best, shared);
        lowest = (u32)largest_of(lowest, shared);
        // Not even they: the reference then takes the first token.
        if (!best) best = key_of(__int_as_float(0xff800000), 0);
    }
    if (threadIdx.x != 0) return;
    state.best = best, state.lowest = lowest;
    p.found[blockIdx.y].wrong = best == ~0ull;
    if (report) return;
    float most = value_of((u32)(best >> 32));
    bool infinite = most - most != 0.0f;
    if (best == ~0ull) {
        settle(p, job, NOT_A_NUMBER);
    } else if (job.kind == KIND_GREEDY || infinite) {
        settle(p, job, infinite && most < 0.0f ? 0 : ~(u32)best);
    }
}

// Which part of the row's range of logits one falls into: a logit that is no larger falls into none before it.
struct Parts {
    float most;
    float per_unit;

    __device__ __forceinline__ Parts(const Row& row, const SampleState& state) : most(row.most) {
        float lowest = value_of(~fresh_of(&state.lowest));
        if (!row.report) lowest = fmaxf(lowest, row.floor);
        per_unit = BINS / (most - lowest);
    }
    __device__ __forceinline__ u32 of(float v) const { return min((u32)((most - v) * per_unit), BINS - 1u); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) spread(const SampleParams p) {
    __shared__ double shared[WARP];
    __shared__ u32 counts[BINS], upper[BINS], lower[BINS];
    __shared__ u32 places[3];
    await_inputs();
    SampleJob job = p.jobs[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    if (job.bins == NONE || !is_open(job, state)) return;
    SampleBins& bins = p.bins[job.bins];
    Row row = row_of(job, state, p.width);
    Parts parts(row, state);
    bool weighed = !row.report && job.top_p < 1.0f;
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) counts[i] = 0, upper[i] = 0, lower[i] = 0;
    __syncthreads();
    u32 first = blockIdx.x * p.segment, end = min(first + p.segment, p.width);
    double sum = 0.0;
    for (u32 tile = first; tile < end; tile += TILE) {
        row.piece(tile + threadIdx.x * EACH, end, [&](float v, u32, bool valid) {
            if (!valid || !(row.report || v >= row.floor)) return;
            u32 bin = parts.of(v);
            atomicAdd(&counts[bin], 1u);
            if (!weighed) return;
            double weight = row.weight(v);
            sum += weight;
            double scaled = weight * (1 << HALF_BITS);
            u32 whole = (u32)scaled;
            atomicAdd(&upper[bin], whole);
            atomicAdd(&lower[bin], (u32)((scaled - whole) * (1 << HALF_BITS)));
        });
        __syncthreads();
        // A tile's sums fit 32 bits.
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) {
            if (counts[i] == 0) continue;
            atomicAdd(&bins.counts[i], counts[i]);
            if (weighed) atomicAdd(&bins.weights[i], ((u64)upper[i] << HALF_BITS) + lower[i]);
            counts[i] = 0, upper[i] = 0, lower[i] = 0;
        }
        __syncthreads();
    }
    if (weighed) {
        sum = total(sum, shared);
        if (threadIdx.x == 0) state.sums[blockIdx.x] = sum;
    }
    if (!last_to_arrive(&state.arrived[2], gridDim.x)) return;
    const u32 own = BINS / THREADS, begin = threadIdx.x * own;
    double number = 0.0, mass = 0.0;
    u32 each[own];
    double weights[own];
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        each[i] = fresh_of(&bins.counts[begin + i]);
        weights[i] = weighed ? (double)fresh_of(&bins.weights[begin + i]) / (1ull << 2 * HALF_BITS) : 0.0;
        number += each[i], mass += weights[i];
    }
    double all = total(number, shared);
    double wanted = 0.0;
    if (weighed) {
        wanted = job.top_p * total(threadIdx.x < gridDim.x ? fresh_of(&state.sums[threadIdx.x]) : 0.0, shared);
    }
    bool by_count = job.top_k > 0 && job.top_k < all;
    if (threadIdx.x < 3) places[threadIdx.x] = BINS - 1;
    double counted = running(number, shared) - number, massed = running(mass, shared) - mass;
    // What rounding down to the bins' unit may have lost, and what their sums are off.
    double lost = (double)p.width / (1ull << 2 * HALF_BITS) + 1e-12 * wanted;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        counted += each[i], massed += weights[i];
        if (counted >= job.top_k) atomicMin(&places[0], begin + i);
        if (massed + lost >= wanted) atomicMin(&places[1], begin + i);
        if (massed - lost >= wanted) atomicMin(&places[2], begin + i);
    }
    __syncthreads();
    u32 from = 0, to = BINS - 1;
    if (by_count) {
        to = places[0];
        if (!weighed && !row.report) from = to;
    } else if (weighed) {
        from = places[1], to = places[2];
    }
    u32 before = 0, within = 0;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        if (begin + i < from) before += each[i];
        if (begin + i >= from && begin + i <= to) within += each[i];
    }
    double above = total(before, shared), listed = total(within, shared);
    if (threadIdx.x != 0) return;
    bool cut = by_count || weighed || row.report;
    state.course = !cut ? COURSE_NONE : listed > LIST_MAX ? COURSE_HALVED : COURSE_LISTED;
    state.from = from, state.to = to, state.above = (u32)above, state.wanted = wanted;
    state.by_count = by_count, state.by_weight = weighed;
}
