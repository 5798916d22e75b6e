// The second half of sample.cu: where the cuts of top_k and top_p are, and the draw.

// Puts `count` keys in descending order, room for the next power of two.
__device__ __forceinline__ void sort_descending(u64* keys, u32 count) {
    u32 size = 2;
    while (size < count) size *= 2;
    for (u32 i = count + threadIdx.x; i < size; i += THREADS) keys[i] = 0;
    __syncthreads();
    for (u32 run = 2; run <= size; run *= 2) {
        for (u32 stride = run / 2; stride > 0; stride /= 2) {
            for (u32 i = threadIdx.x; i < size / 2; i += THREADS) {
                u32 left = 2 * i - (i & (stride - 1)), right = left + stride;
                u64 a = keys[left], b = keys[right];
                bool descending = (left & run) == 0;
                if ((a < b) == descending) keys[left] = b, keys[right] = a;
            }
            __syncthreads();
        }
    }
}

struct Listed {
    double sums[WARP];
    u64 keys[LIST_MAX];
    u32 count;
    u32 index;
};

// The most likely tokens of a report, best first.
__device__ __forceinline__ void write_tops(const SampleParams& p, const SampleJob& job, u32 count, Listed& s) {
    u32 listed = min(job.top_k, count);
    for (u32 i = threadIdx.x; i < listed; i += THREADS) {
        u64 key = s.keys[i];
        p.tops[job.tops_at + i] = {~(u32)key, value_of((u32)(key >> 32))};
    }
    if (threadIdx.x == 0) p.found[blockIdx.y].listed = listed;
}

// The key of the token at the cut, found by one block that halves the range of keys.
__device__ __forceinline__ u64 halved(const SampleJob& job, const SampleState& state, const Row& row, Listed& s) {
    u32 best = (u32)(fresh_of(&state.best) >> 32), cut = row.report ? 0 : ordered(row.floor);
    double ties = row.width, wanted = job.top_k, number, mass;
    // Of the candidates with at least this key.
    auto measure = [&](u32 key) {
        double numbered = 0.0, weighed = 0.0;
        row.visit(0, row.width, [&](float v, u32, bool valid) {
            if (!valid || !(row.report || v >= row.floor) || ordered(v) < key) return;
            numbered += 1.0;
            weighed += row.weight(v);
        });
        number = total(numbered, s.sums), mass = total(weighed, s.sums);
    };
#pragma unroll 1
    for (u32 round = 0; round < 2; round++) {
        bool weighed = round == 1;
        if (!(weighed ? state.by_weight : state.by_count)) continue;
        if (weighed && !state.by_count) wanted = state.wanted;
        // The largest key from which on there are as many, or as much, as wanted.
        u32 reaches = cut, falls_short = best + 1;
#pragma unroll 1
        while (falls_short - reaches > 1) {
            u32 middle = reaches + (falls_short - reaches) / 2;
            measure(middle);
            if ((weighed ? mass : number) >= wanted) {
                reaches = middle;
            } else {
                falls_short = middle;
            }
        }
        measure(reaches + 1);
        double each = row.weight(value_of(reaches));
        double needed = weighed ? fmax(1.0, ceil((wanted - mass) / each)) : wanted - number;
        ties = reaches == cut ? fmin(ties, needed) : needed;
        cut = reaches;
        // What top_p is a part of, when top_k comes before it.
        wanted = job.top_p * (mass + ties * each);
    }
    // The last of so many tokens at the cut, in order of ids.
    if (threadIdx.x == 0) s.index = NONE;
    double before = 0.0;
    for (u32 tile = 0; tile < row.width; tile += TILE) {
        u32 equal = 0;
        row.piece(tile + threadIdx.x * EACH, row.width, [&](float v, u32, bool valid) { equal += valid && ordered(v) == cut; });
        double rank = before + running(equal, s.sums) - equal;
        before += total(equal, s.sums);
        row.piece(tile + threadIdx.x * EACH, row.width, [&](float v, u32 token, bool valid) {
            if (!valid || ordered(v) != cut) return;
            rank += 1.0;
            if (rank == ties) s.index = token;
        });
        __syncthreads();
        if (before >= ties) break;
    }
    u32 last = s.index;
    __syncthreads();
    // NONE's complement is below every token's: all at the cut are kept.
    return (u64)cut << 32 | (u32)~last;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) cut(const SampleParams p) {
    __shared__ Listed s;
    await_inputs();
    SampleJob job = p.jobs[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    if (job.bins == NONE || !is_open(job, state)) return;
    u32 course = state.course;
    Row row = row_of(job, state, p.width);
    if (course == COURSE_NONE) return;
    if (course == COURSE_HALVED) {
        if (blockIdx.x != 0) return;
        u64 kept = halved(job, state, row, s);
        if (threadIdx.x == 0) state.cut = kept, s.count = 0;
        __syncthreads();
        if (!row.report) return;
        row.visit(0, p.width, [&](float v, u32 token, bool valid) {
            if (!valid || key_of(v, token) < kept) return;
            u32 place = atomicAdd(&s.count, 1u);
            if (place < LIST_MAX) s.keys[place] = key_of(v, token);
        });
        __syncthreads();
        sort_descending(s.keys, s.count);
        write_tops(p, job, s.count, s);
        return;
    }
    Parts parts(row, state);
    u32 from = state.from, to = state.to, first = blockIdx.x * p.segment, end = min(first + p.segment, p.width);
    bool weighed = state.by_weight && from > 0;
    u64* list = p.lists + (u64)job.bins * LIST_MAX;
    double sum = 0.0;
    u32 lane = threadIdx.x % WARP;
    row.visit(first, end, [&](float v, u32 token, bool valid) {
        bool candidate = valid && (row.report || v >= row.floor);
        u32 bin = parts.of(v);
        if (weighed && candidate && bin < from) sum += row.weight(v);
        bool member = candidate && bin >= from && bin <= to;
        u32 members = __ballot_sync(ALL, member), place = 0;
        if (members == 0) return;
        if (lane == 0) place = atomicAdd(&state.listed, __popc(members));
        place = __shfl_sync(ALL, place, 0) + __popc(members & ((1u << lane) - 1));
        if (member) list[place] = key_of(v, token);
    });
    if (weighed) {
        sum = total(sum, s.sums);
        if (threadIdx.x == 0) state.sums[blockIdx.x] = sum;
    }
    if (!last_to_arrive(&state.arrived[3], gridDim.x)) return;
    u32 count = fresh_of(&state.listed);
    for (u32 i = threadIdx.x; i < count; i += THREADS) s.keys[i] = fresh_of(list + i);
    __syncthreads();
    sort_descending(s.keys, count);
    if (row.report) return write_tops(p, job, count, s);
    u32 left = state.by_count ? job.top_k - state.above : count, kept = left;
    if (state.by_weight) {
        double before = weighed ? total(threadIdx.x < gridDim.x ? fresh_of(&state.sums[threadIdx.x]) : 0.0, s.sums) : 0.0;
        u32 own = (left + THREADS - 1) / THREADS, begin = min(threadIdx.x * own, left), behind = min(begin + own, left);
        double mass = 0.0;
        for (u32 i = begin; i < behind; i++) mass += row.weight(value_of((u32)(s.keys[i] >> 32)));
        double wanted = state.by_count ? job.top_p * total(mass, s.sums) : state.wanted;
        before += running(mass, s.sums) - mass;
        if (threadIdx.x == 0) s.index = left;
        __syncthreads();
        for (u32 i = begin; i < behind; i++) {
            before += row.weight(value_of((u32)(s.keys[i] >> 32)));
            if (before >= wanted) {
                atomicMin(&s.index, i + 1);
                break;
            }
        }
        __syncthreads();
        kept = s.index;
    }
    // Bins before those that are listed are kept; of the list its beginning.
    if (threadIdx.x == 0 && kept > 0) state.cut = s.keys[kept - 1];
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) draw(const SampleParams p) {
    __shared__ double sums[WARP];
    __shared__ double before_segment;
    __shared__ u32 chosen, last;
    await_inputs();
    SampleJob job = p.jobs[blockIdx.y];
    SampleState& state = p.states[blockIdx.y];
    if (!is_open(job, state)) return;
    Row row = row_of(job, state, p.width);
    u64 least = fresh_of(&state.cut);
    double min_p = job.min_p;
    // What a token that may be drawn weighs; 0 for the others.
    auto weight = [&](float v, u32 token, bool valid) {
        if (row.report) return valid ? row.weight(v) : 0.0;
        if (!valid || !(v >= row.floor) || key_of(v, token) < least) return 0.0;
        double w = row.weight(v);
        return w >= min_p ? w : 0.0;
    };
    u32 first = blockIdx.x * p.segment, end = min(first + p.segment, p.width);
    double sum = 0.0;
    row.visit(first, end, [&](float v, u32 token, bool valid) { sum += weight(v, token, valid); });
    sum = total(sum, sums);
    if (threadIdx.x == 0) state.sums[blockIdx.x] = sum;
    if (!last_to_arrive(&state.arrived[4], gridDim.x)) return;
    double own = threadIdx.x < gridDim.x ? fresh_of(&state.sums[threadIdx.x]) : 0.0;
    double all = total(own, sums);
    if (row.report) {
        if (threadIdx.x != 0) return;
        SampleFound& found = p.found[blockIdx.y];
        found.sum = all, found.most = row.most;
        if (job.target == NONE) return;
        found.logit = __int_as_float(0xff800000);
        if (job.target < p.width) found.logit = __fmul_rn(either(job.raw, job.raw_f32 || !BF16, job.target), job.raw_scale);
        return;
    }
    double target = job.at * all, after = running(own, sums);
    if (threadIdx.x == 0) chosen = NONE, last = 0;
    __syncthreads();
    // Rounding may leave the target past the end: then it is the last token that may be drawn.
    if (own > 0.0) {
        atomicMax(&last, threadIdx.x);
        if (target < after) atomicMin(&chosen, threadIdx.x);
    }
    __syncthreads();
    u32 segment = chosen == NONE ? last : chosen;
    if (threadIdx.x == segment) before_segment = after - own;
    __syncthreads();
    if (threadIdx.x == 0) chosen = NONE, last = 0;
    double before = before_segment;
    first = segment * p.segment, end = min(first + p.segment, p.width);
    for (u32 tile = first; tile < end; tile += TILE) {
        double w[EACH], piece = 0.0;
        u32 at = tile + threadIdx.x * EACH;
        row.piece(at, end, [&](float v, u32 token, bool valid) { piece += w[token - at] = weight(v, token, valid); });
        double behind = before + running(piece, sums), left = target - (behind - piece);
        __syncthreads();
        if (piece > 0.0) {
            u32 mine = NONE, final = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (w[i] == 0.0) continue;
                left -= w[i];
                if (left < 0.0 && mine == NONE) mine = at + i;
                final = at + i;
            }
            atomicMax(&last, final);
            if (target < behind) atomicMin(&chosen, mine == NONE ? final : mine);
        }
        __syncthreads();
        if (chosen != NONE) break;
        before += total(piece, sums);
    }
    if (threadIdx.x == 0) settle(p, job, chosen == NONE ? last : chosen);
}
