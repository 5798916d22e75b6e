// One token of each row of logits [R, V], drawn as ops::sample defines it: softmax(logits / temperature), the k most
// likely, the smallest set of the most likely that reaches top_p of those, those at least min_p as likely as the best,
// then a draw through what is left in order of ids by one uniform number. Runs after `largest`.
//
// A block has a row. What the filters keep is a beginning of the tokens in order of likelihood, the lowest id first
// among equals: all with keys above a cut and some at it. The cut is found by halving the range of keys; a histogram
// says beforehand which tokens can be kept, and where they are at most LIST_MAX, they are listed in shared memory and only
// those are looked at again, with weights in fp64. Else, and without filters, the row is read again (it stays in L2) with
// weights in fp32, whose sums are fp64. So a token differs from the host's only where the uniform number or a filter falls
// within 10^-5 of the probability of a boundary.
// Bytes: a row of V numbers three times (twice without top_k and top_p); V 262144, bf16: 1.6 MB from L2 by one
// multiprocessor. Floor 2 us at 64 bytes a clock each; bound by exponentials and shared-memory atomics.

struct SampleRow {
    double at; // uniform in [0, 1)
    float temperature;
    float top_p;
    float min_p;
    u32 top_k; // 0: all
    u32 kind;
    u32 unused;
};

#define KIND_LEFT 0
#define KIND_GREEDY 1
#define KIND_DRAWN 2

struct SampleParams {
    u32* tokens;           // [R]; LEFT where none is asked for, NOT_A_NUMBER where a logit is none
    const void* x;         // [R, V], fp32 or T
    const u64* best;       // [R] of `largest`
    const SampleRow* rows; // [R]
    u32 width;             // V
    u32 is_f32;
    float scale;
};

#define LEFT 0xffffffffu
#define NOT_A_NUMBER 0xfffffffeu
#define THREADS 1024
#define EACH_MAX 4
#define LIST_MAX (THREADS * EACH_MAX)
#define BINS (2 * THREADS)
// A token less likely than the best by this power of e is no candidate.
#define NEGLIGIBLE 36.0

__device__ __forceinline__ u32 ordered(float v) {
    u32 bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Sum over the block, for every thread.
__device__ __forceinline__ double total(double v, double* shared) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = v;
    __syncthreads();
    v = shared[threadIdx.x % WARP];
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

// A block's row: each thread has a run of it, or of the list.
struct Source {
    const void* x;
    u32 width;
    u32 is_f32;
    float scale;
    float most;
    float inverse; // 1 / temperature
    const float* listed;
    const u32* numbers;
    u32 count; // of the list; LEFT: there is none

    __device__ __forceinline__ double weight(float v) const {
        if (count != LEFT) return exp(((double)v - most) * inverse);
        return expf((v - most) * inverse);
    }

    // Calls each(logit, token) in ascending order of tokens.
    template <class Each>
    __device__ __forceinline__ void visit(Each each) const {
        if (count != LEFT) {
            u32 end = min(count, (threadIdx.x + 1) * EACH_MAX);
            for (u32 i = threadIdx.x * EACH_MAX; i < end; i++) each(listed[i], numbers[i]);
            return;
        }
        const u32 run = (width + THREADS * VECTOR - 1) / (THREADS * VECTOR) * VECTOR;
        u32 at = min(threadIdx.x * run, width), end = min(at + run, width);
        if ((is_f32 && BF16) || width % VECTOR) {
            u64 row = (u64)blockIdx.x * width;
            for (; at < end; at++) each(fmaf(either(x, is_f32, row + at), scale, 0.0f), at);
            return;
        }
        const T* row = (const T*)x + (u64)blockIdx.x * width;
        const int flight = 2;
        while (at < end) {
            uint4 pieces[flight];
#pragma unroll
            for (int i = 0; i < flight; i++) {
                if (at + i * VECTOR < end) pieces[i] = load16(row + at + i * VECTOR);
            }
#pragma unroll
            for (int i = 0; i < flight; i++) {
                if (at + i * VECTOR >= end) break;
                float v[VECTOR];
                unpack(pieces[i], v);
#pragma unroll
                for (int n = 0; n < VECTOR; n++) each(fmaf(v[n], scale, 0.0f), at + i * VECTOR + n);
            }
            at += flight * VECTOR;
        }
    }

    // Weight of the tokens with at least this key, or their number.
    __device__ __forceinline__ double mass(u32 key, double* shared) const {
        double sum = 0.0;
        visit([&](float v, u32) {
            if (ordered(v) >= key) sum += weight(v);
        });
        return total(sum, shared);
    }
    __device__ __forceinline__ double number(u32 key, double* shared) const {
        u32 sum = 0;
        visit([&](float v, u32) { sum += ordered(v) >= key; });
        return total(sum, shared);
    }
};

// The largest key in lowest..=best from which on `measure` reaches `wanted`; at `lowest` it does.
template <class Measure>
__device__ __forceinline__ u32 cut_of(u32 lowest, u32 best, double wanted, Measure measure) {
    u32 reaches = lowest, falls_short = best + 1;
    while (falls_short - reaches > 1) {
        u32 middle = reaches + (falls_short - reaches) / 2;
        if (measure(middle) >= wanted) {
            reaches = middle;
        } else {
            falls_short = middle;
        }
    }
    return reaches;
}

struct Shared {
    double sums[WARP];
    u32 bins[BINS];
    float listed[LIST_MAX];
    u32 numbers[LIST_MAX];
    u32 limit, chosen, last;
};

// Lists the tokens that top_k and top_p can keep, if they are few; `reach` is what top_p wants of the weight (0: top_k
// decides).
__device__ __forceinline__ void list_candidates(Source& source, const SampleRow& row, u32 lowest, double reach, Shared& s) {
    const float width = (float)NEGLIGIBLE / BINS;
    float per_unit = source.inverse / width;
    auto bin = [&](float v) { return min((u32)((source.most - v) * per_unit), BINS - 1u); };
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    if (threadIdx.x == 0) s.limit = BINS - 1;
    __syncthreads();
    source.visit([&](float v, u32) {
        if (ordered(v) >= lowest) atomicAdd(&s.bins[bin(v)], 1u);
    });
    __syncthreads();
    // Bins two by two: a bin's tokens weigh at least what its end weighs.
    u32 first = 2 * threadIdx.x, counts[2] = {s.bins[first], s.bins[first + 1]};
    double low[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        // A little less, for the rounding of a bin's edges.
        low[i] = row.top_k ? counts[i] : counts[i] * expf(-(first + i + 1) * width) * 0.999;
    }
    double wanted = row.top_k ? (double)row.top_k : reach, sum = running(low[0] + low[1], s.sums) - low[1];
    if (sum >= wanted) {
        atomicMin(&s.limit, first);
    } else if (sum + low[1] >= wanted) {
        atomicMin(&s.limit, first + 1);
    }
    __syncthreads();
    u32 limit = s.limit, own = (first <= limit ? counts[0] : 0) + (first + 1 <= limit ? counts[1] : 0);
    double listed = total(own, s.sums);
    if (listed > LIST_MAX) return;
    auto kept = [&](float v) { return ordered(v) >= lowest && bin(v) <= limit; };
    u32 members = 0;
    source.visit([&](float v, u32) { members += kept(v); });
    u32 place = (u32)running(members, s.sums) - members;
    source.visit([&](float v, u32 token) {
        if (!kept(v)) return;
        s.listed[place] = v, s.numbers[place] = token, place++;
    });
    __syncthreads();
    source.count = (u32)listed;
}

// Draws among the tokens above `cut` and the first `ties` at it.
__device__ __forceinline__ u32 draw(const Source& source, double at, u32 cut, double ties, Shared& s) {
    double above = 0.0, equal = 0.0, each = source.weight(value_of(cut));
    source.visit([&](float v, u32) {
        u32 key = ordered(v);
        if (key > cut) above += source.weight(v);
        equal += key == cut;
    });
    double above_after = running(above, s.sums), equal_after = running(equal, s.sums);
    auto weighed = [&](double sum, double count) { return sum + fmin(count, ties) * each; };
    double before = weighed(above_after - above, equal_after - equal), after = weighed(above_after, equal_after);
    if (threadIdx.x == 0) s.chosen = LEFT, s.last = 0;
    __syncthreads();
    if (threadIdx.x == THREADS - 1) s.sums[0] = after;
    __syncthreads();
    double target = at * s.sums[0];
    double left = target - before, rank = equal_after - equal;
    bool holds = target < after && left >= 0.0;
    source.visit([&](float v, u32 token) {
        u32 key = ordered(v);
        bool keep = key > cut || (key == cut && rank < ties);
        rank += key == cut;
        if (!keep) return;
        atomicMax(&s.last, token);
        if (!holds) return;
        left -= key > cut ? source.weight(v) : each;
        if (left < 0.0) atomicMin(&s.chosen, token), holds = false;
    });
    __syncthreads();
    // Rounding may leave the target past the end, or between two runs.
    return s.chosen == LEFT ? s.last : s.chosen;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const SampleParams p) {
    __shared__ Shared s;
    SampleRow row = p.rows[blockIdx.x];
    u64 found = p.best[blockIdx.x];
    u32 best = (u32)(found >> 32), token = ~(u32)found;
    float most = value_of(best);
    bool infinite = most - most != 0.0f;
    if (found == ~0ull || row.kind != KIND_DRAWN || infinite) {
        if (infinite && most < 0.0f) token = 0;
        if (threadIdx.x == 0) p.tokens[blockIdx.x] = found == ~0ull ? NOT_A_NUMBER : row.kind == KIND_LEFT ? LEFT : token;
        return;
    }
    Source source = {p.x, p.width, p.is_f32, p.scale, most, 1.0f / row.temperature, s.listed, s.numbers, LEFT};
    double temperature = row.temperature;
    u32 cut = ordered(__double2float_ru(most - NEGLIGIBLE * temperature));
    double ties = p.width, mass = row.top_p < 1.0f && !row.top_k ? source.mass(cut, s.sums) : 0.0;
    if (row.top_k || row.top_p < 1.0f) list_candidates(source, row, cut, row.top_p * mass, s);
    if (row.top_k && source.number(cut, s.sums) > row.top_k) {
        cut = cut_of(cut, best, row.top_k, [&](u32 key) { return source.number(key, s.sums); });
        ties = row.top_k - source.number(cut + 1, s.sums);
    }
    if (row.top_p < 1.0f) {
        if (row.top_k) {
            double equal = source.number(cut, s.sums) - source.number(cut + 1, s.sums);
            mass = source.mass(cut + 1, s.sums) + fmin(ties, equal) * source.weight(value_of(cut));
        }
        double wanted = row.top_p * mass;
        u32 nucleus = cut_of(cut, best, wanted, [&](u32 key) { return source.mass(key, s.sums); });
        double missing = wanted - source.mass(nucleus + 1, s.sums);
        double needed = fmax(1.0, ceil(missing / source.weight(value_of(nucleus))));
        ties = nucleus == cut ? fmin(ties, needed) : needed;
        cut = nucleus;
    }
    if (row.min_p > 0.0f) {
        u32 likely = ordered(__double2float_ru(most + log((double)row.min_p) * temperature));
        if (likely > cut) cut = min(likely, best), ties = p.width;
    }
    u32 drawn = draw(source, row.at, cut, ties, s);
    if (threadIdx.x == 0) p.tokens[blockIdx.x] = drawn;
}
