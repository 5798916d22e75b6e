// Sums over the ranks of a group whose cards see each other's memory, without NCCL: every rank writes its part into the
// others' slots, and reads the others' parts out of its own.
//
// all_reduce:       data = part_0 + part_1 + …, fp32, in rank order, so that all ranks get the same bits as over the hosts.
// all_reduce_norm:  x += Σ_r (sum_r + scale_r · more_r), rounded, and its norm: a layer's all-reduce, residual and next norm.
//
// Shapes: data, sum, more [T, H] fp32; x, out [T, H] of T. One block a row, a thread for PAIRS pairs of neighbours.
// Bytes: 4·T·H read (8 with `more`), 2·2·T·H of x and 2·T·H of out in bf16; 8·T·H to each other rank over NVLink, because
// half of what is sent are flags. Flops: T·H·(N + 4).
// Floor with two ranks at 450 GB/s a direction of H200's NVLink: T = 1, H = 2048: 16 KiB, 0.04 us, so the way of one store
// and one poll (about 1.5 us) is what counts; T = 32, H = 4096: 1 MiB, 2.3 us. Reached (two
// H200s, inside a recorded graph, 2026-11-30): all_reduce of 4 KiB 2.3 us, of 512 KiB 5.5; all_reduce_norm of 8 KiB 4.0, of 512 KiB 7.5.
//
// The protocol is NCCL's LL: a store of sixteen bytes carries two halves of eight, each a number and a flag, and eight bytes
// arrive whole, so a half with the right flag has the right number, and no fence is needed.
//
// Flags. `state[0]` on each card counts the calls since the line was made. All ranks make the same calls in the same order
// (what goes this way is decided by sizes that all have in common), so the count is the same on all, also when a recorded
// graph is launched again, after steps that NCCL carried, and whatever else ran between. Call c has the flag 2c + 1: odd, so
// never the zero of an unwritten place, and the same again after 2^31 calls. A place that a small call leaves out keeps an old
// flag; calls 0 and 1 of every 2^30 clear all places of their slot that they do not use, so no flag there is older than 2^30
// calls. The count starts 32 calls before it comes to that, so every process does it in its first steps.
//
// Slots. Call c uses slot c % 2. No place is overwritten before it was read: a rank is in call c only after its call c - 1 has
// ended, so it has got what every other rank sent in call c - 1; each of them sent that after its own call c - 2 had ended,
// with all its places of slot c % 2 read. ("Ended" is that of a whole launch: launches of one stream follow each other, and one
// that starts early, as programmatic dependent launch allows, sends nothing before `await_inputs`, which waits for it.) For the
// same reason nothing but call c's own places comes into slot c % 2 while call c runs, so what call c clears is not in use.
//
// A step that was aborted leaves places half written. Nobody uses them: its line is over for all calls, here by `state[2]`, and
// at the others by their own host's deadline.
//
// Waiting. A block waits for the block of the same row on the other cards only, after it has sent its own row; all blocks of
// a launch fit on a card at once (the host sees to it), so no order of blocks can make two cards wait for each other. A rank
// that does not come ends the wait by its host: that sets host[0], which is looked at now and then.

#define RANKS_MAX 8
#define PEER_THREADS 512
// Calls between two cleanings.
#define CLEAN (1u << 30)

// Two numbers with their flags.
#define PLACE_BYTES 16

struct Peers {
    u64 slots[RANKS_MAX]; // by rank: [2][ranks][places], what was sent to it; its own is this card's
    u32* state;           // calls; blocks that arrived; not 0: the line is over
    u32* host;            // page-locked: not 0: give up; the number of the call that has begun; 1 + the rank that was waited for then
    u32 rank;
    u32 ranks;
    u32 places;
    u32 number; // of this call in its step
};

__device__ __forceinline__ u32 now(const u32* at) { return *(const volatile u32*)at; }

// Where rank `to` finds what rank `from` sends in this call.
__device__ __forceinline__ u64 slot(const Peers& p, u32 to, u32 from, u32 call) {
    return p.slots[to] + (u64)((call & 1) * p.ranks + from) * p.places * PLACE_BYTES;
}

__device__ __forceinline__ void put(u64 slot, u32 place, u32 call, float2 v) {
    u64 flag = (u64)(call * 2 + 1) << 32;
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(slot + (u64)place * PLACE_BYTES),
                 "l"(flag | __float_as_uint(v.x)), "l"(flag | __float_as_uint(v.y))
                 : "memory");
}

__device__ __forceinline__ bool take(u64 slot, u32 place, u32 call, float2& v) {
    u64 x, y;
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(x), "=l"(y)
                 : "l"(slot + (u64)place * PLACE_BYTES)
                 : "memory");
    v.x = __uint_as_float((u32)x), v.y = __uint_as_float((u32)y);
    u32 flag = call * 2 + 1;
    return (u32)(x >> 32) == flag && (u32)(y >> 32) == flag;
}

// Whether the wait for `from` is over without it.
__device__ __forceinline__ bool given_up(const Peers& p, u32 from, u32 spins) {
    if (spins % 64) return false;
    if (now(p.state + 2)) return true;
    if (spins % 4096 || !now(p.host)) return false;
    *(volatile u32*)(p.host + 2) = from + 1;
    *(volatile u32*)(p.state + 2) = 1;
    return true;
}

// Sends a thread's pairs to every other rank, the next one first.
template <int PAIRS>
__device__ __forceinline__ void send(const Peers& p, u32 call, u32 first, u32 pairs, const float2* own) {
    for (u32 n = 1; n < p.ranks; n++) {
        u32 to = p.rank + n < p.ranks ? p.rank + n : p.rank + n - p.ranks;
        u64 at = slot(p, to, p.rank, call);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            u32 pair = threadIdx.x + i * blockDim.x;
            if (pair < pairs) put(at, first + pair, call, own[i]);
        }
    }
}

// The sum of a thread's pairs over all ranks, in rank order.
template <int PAIRS>
__device__ __forceinline__ void receive(const Peers& p, u32 call, u32 first, u32 pairs, const float2* own, float2* sum) {
    for (u32 from = 0; from < p.ranks; from++) {
        float2 part[PAIRS];
        u64 at = slot(p, p.rank, from, call);
        for (u32 spins = 1;; spins++) {
            bool all = true;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                u32 pair = threadIdx.x + i * blockDim.x;
                part[i] = own[i];
                if (from != p.rank && pair < pairs) all &= take(at, first + pair, call, part[i]);
            }
            if (all || given_up(p, from, spins)) break;
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            sum[i].x = from ? sum[i].x + part[i].x : part[i].x;
            sum[i].y = from ? sum[i].y + part[i].y : part[i].y;
        }
    }
}

// What has to be done once in a call, by all threads of all blocks: clearing what it does not use, when it is time.
__device__ __forceinline__ void clean(const Peers& p, u32 call, u32 used) {
    if ((call & (CLEAN - 1)) > 1) return;
    for (u32 from = 0; from < p.ranks; from++) {
        uint4* at = (uint4*)slot(p, p.rank, from, call);
        for (u32 place = used + blockIdx.x * blockDim.x + threadIdx.x; place < p.places; place += gridDim.x * blockDim.x)
            at[place] = make_uint4(0, 0, 0, 0);
    }
}

// Tells the host which call has begun, once its own part is on its way: what is written to the host has arrived before the
// others' parts have, and the launch does not end later for it.
__device__ __forceinline__ void tell(const Peers& p) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *(volatile u32*)(p.host + 1) = p.number;
}

// The call ends when its last block does. All threads have read the count before.
__device__ __forceinline__ void finish(const Peers& p, u32 call) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (gridDim.x > 1 && atomicInc(p.state + 1, gridDim.x - 1) != gridDim.x - 1) return;
    *(volatile u32*)p.state = call + 1;
}

struct AllReduceParams {
    Peers peers;
    float* data; // [2 pairs]
    u32 pairs;
};

#define ALL_REDUCE_PAIRS 4

extern "C" __global__ void __launch_bounds__(PEER_THREADS, 1) all_reduce(const __grid_constant__ AllReduceParams p) {
    const u32 tile = ALL_REDUCE_PAIRS * PEER_THREADS;
    float2* data = (float2*)p.data;
    float2 own[ALL_REDUCE_PAIRS] = {}, sum[ALL_REDUCE_PAIRS];
    await_inputs();
    u32 call = now(p.peers.state);
    for (u32 first = blockIdx.x * tile; first < p.pairs; first += gridDim.x * tile) {
        u32 pairs = min(tile, p.pairs - first);
#pragma unroll
        for (int i = 0; i < ALL_REDUCE_PAIRS; i++) {
            u32 pair = threadIdx.x + i * blockDim.x;
            if (pair < pairs) own[i] = data[first + pair];
        }
        send<ALL_REDUCE_PAIRS>(p.peers, call, first, pairs, own);
    }
    tell(p.peers);
    for (u32 first = blockIdx.x * tile; first < p.pairs; first += gridDim.x * tile) {
        u32 pairs = min(tile, p.pairs - first);
#pragma unroll
        for (int i = 0; i < ALL_REDUCE_PAIRS; i++) {
            u32 pair = threadIdx.x + i * blockDim.x;
            if (pair < pairs) own[i] = data[first + pair];
        }
        receive<ALL_REDUCE_PAIRS>(p.peers, call, first, pairs, own, sum);
#pragma unroll
        for (int i = 0; i < ALL_REDUCE_PAIRS; i++) {
            u32 pair = threadIdx.x + i * blockDim.x;
            if (pair < pairs) data[first + pair] = sum[i];
        }
    }
    clean(p.peers, call, p.pairs);
    finish(p.peers, call);
}

struct AllReduceNormParams {
    Peers peers;
    T* x;              // [T, width] the residual stream, in and out
    T* out;            // [T, width] its norm
    const float* sum;  // [T, width] this rank's part
    const float* more; // [T, width] of it, times `scale`; null: nothing
    const T* weight;   // [width]
    u32 width;
    float scale;
    float eps;
    u32 layer;
};

#if BF16
__device__ __forceinline__ float2 load2(const T* at) {
    u32 v = *(const u32*)at;
    return make_float2(low(v), high(v));
}
__device__ __forceinline__ void store2(T* at, float2 v) { *(u32*)at = bf16_bits(v.x) | (u32)bf16_bits(v.y) << 16; }
#else
__device__ __forceinline__ float2 load2(const T* at) { return *(const float2*)at; }
__device__ __forceinline__ void store2(T* at, float2 v) { *(float2*)at = v; }
#endif

// The rounding points are those of `residual_norm`.
template <int PAIRS>
__device__ __forceinline__ void all_reduce_norm(const AllReduceNormParams& p) {
    release_next();
    u32 pairs = p.width / 2, first = blockIdx.x * pairs;
    float2 weight[PAIRS], own[PAIRS], x[PAIRS], sum[PAIRS];
    // Weights are there before anything else is. Long rows have no registers for them, nor for x.
    constexpr bool early = PAIRS < 8;
#pragma unroll
    for (int i = 0; early && i < PAIRS; i++) {
        u32 pair = threadIdx.x + i * blockDim.x;
        weight[i] = pair < pairs ? load2(p.weight + 2 * pair) : make_float2(0.0f, 0.0f);
    }
    await_inputs();
    u32 call = now(p.peers.state);
    const float2 none = make_float2(0.0f, 0.0f);
    float2 more[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        u32 pair = threadIdx.x + i * blockDim.x;
        own[i] = pair < pairs ? ((const float2*)p.sum)[first + pair] : none;
        more[i] = pair < pairs && p.more ? ((const float2*)p.more)[first + pair] : none;
        if (early) x[i] = pair < pairs ? load2(p.x + 2 * (u64)(first + pair)) : none;
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (!p.more) continue;
        own[i].x = fmaf(p.scale, more[i].x, own[i].x), own[i].y = fmaf(p.scale, more[i].y, own[i].y);
    }
    send<PAIRS>(p.peers, call, first, pairs, own);
    tell(p.peers);
    receive<PAIRS>(p.peers, call, first, pairs, own, sum);
    float added = 0.0f, squares = 0.0f, mean = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        u32 pair = threadIdx.x + i * blockDim.x;
        if (pair >= pairs) continue;
        if (!early) x[i] = load2(p.x + 2 * (u64)(first + pair));
        x[i].x = rounded(x[i].x + sum[i].x), x[i].y = rounded(x[i].y + sum[i].y);
        store2(p.x + 2 * (u64)(first + pair), x[i]);
        added += x[i].x + x[i].y;
    }
    if (p.layer) mean = block_sum(added) / (float)p.width;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (threadIdx.x + i * blockDim.x >= pairs) continue;
        float a = x[i].x - mean, b = x[i].y - mean;
        squares = fmaf(a, a, fmaf(b, b, squares));
    }
    float factor = 1.0f / sqrtf(block_sum(squares) / (float)p.width + p.eps);
    NormParams norm;
    norm.layer = p.layer;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        u32 pair = threadIdx.x + i * blockDim.x;
        if (pair >= pairs) continue;
        if (!early) weight[i] = load2(p.weight + 2 * pair);
        float2 n = make_float2(widen(normed(norm, x[i].x, mean, factor, weight[i].x)),
                               widen(normed(norm, x[i].y, mean, factor, weight[i].y)));
        store2(p.out + 2 * (u64)(first + pair), n);
    }
    clean(p.peers, call, gridDim.x * pairs);
    finish(p.peers, call);
}

extern "C" __global__ void __launch_bounds__(PEER_THREADS, 1) all_reduce_norm2(const __grid_constant__ AllReduceNormParams p) {
    all_reduce_norm<2>(p);
}
extern "C" __global__ void __launch_bounds__(PEER_THREADS, 1) all_reduce_norm4(const __grid_constant__ AllReduceNormParams p) {
    all_reduce_norm<4>(p);
}
extern "C" __global__ void __launch_bounds__(PEER_THREADS, 1) all_reduce_norm8(const __grid_constant__ AllReduceNormParams p) {
    all_reduce_norm<8>(p);
}
