// c = a · wᵀ for many rows on the tensor cores (mma.sync m16n8k16, bf16 in, fp32 sums), dense or grouped by expert:
// a tile of rows meets the matrix of its expert; with no group there is one matrix.
//
// a [M, K] bf16, w [E, N, K] bf16, c [M, N] fp32 or bf16; K a multiple of 8. Operations 2·M·N·K; bytes
// 2·(M·K·⌈N/BN⌉ + N·K·⌈M/BM⌉) before L2. Floor, H100 at 800 TFLOP/s: qkv of North (M 2048, N 5120, K 2048) 54 us; a
// layer's experts for 2048 rows (8 of 128, I 768) 193 us. Measured (H100 80GB HBM3, ncu with cold caches, 2026-11-23):
// 166 us; 514 us gate_up and 399 us down. Tiles go through shared memory in three stages (cp.async), 16
// bytes a piece, pieces of a row exclusive-or'ed with the row so that ldmatrix meets no bank twice.
// With K shared (H200, cohort bench kernels, 2026-11-24): qkv of 128 rows 25.4 us, of 256 rows 33.6 us, 21 and 30 % of the floor.

#define BK 64
#define STAGES 3
#define THREADS 128
#define NO_PAIR 0xffffffffu

struct GemmParams {
    void* c;
    const T* a;
    const T* w;
    const u32* sorted;      // [tiles · BM] row of c for each row of a tile, NO_PAIR for none; null: row = place
    const u32* tile_expert; // [tiles] which w
    const u32* tiles;       // [1] tiles in use; null: as many as M needs
    u32 m;
    u32 n;
    u32 k;
    u32 a_divisor; // row of a = row of c / a_divisor
    u32 c_f32;
};

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

// Byte offset of a 16-byte piece in a tile whose rows are BK numbers.
__device__ __forceinline__ u32 piece(u32 row, u32 column) { return row * BK * 2 + ((column ^ (row & 7)) * 16); }

struct SharesParams {
    void* c;            // [count], fp32 or bf16
    const float* parts; // [shares, count]
    u32 count;          // a multiple of 4
    u32 shares;
    u32 c_f32;
};

// What the blocks that shared K summed, added up in their order.
extern "C" __global__ void __launch_bounds__(256) add_shares(const SharesParams p) {
    u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    await_inputs();
    if (at >= p.count) return;
    float4 sum = *(const float4*)(p.parts + at);
#pragma unroll 4
    for (u32 i = 1; i < p.shares; i++) {
        float4 v = *(const float4*)(p.parts + (u64)i * p.count + at);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    if (p.c_f32) {
        *(float4*)((float*)p.c + at) = sum;
        return;
    }
    u32 low = (u32)bf16_bits(sum.x) | (u32)bf16_bits(sum.y) << 16, high = (u32)bf16_bits(sum.z) | (u32)bf16_bits(sum.w) << 16;
    *(uint2*)((T*)p.c + at) = make_uint2(low, high);
}

// Gated: w holds gate rows and up rows, and c = silu(gate) · up [M, N/2] in bf16, each factor rounded as the reference
// stores it. Eight gate rows of a tile and the eight up rows that belong to them follow each other, so that a thread has
// both. Blocks of the third direction share K, and each share writes a matrix c of its own in fp32.
template <int BM, int BN, bool GROUPED, bool GATED>
__device__ __forceinline__ void gemm(const GemmParams& p) {
    extern __shared__ __align__(128) unsigned char memory[];
    constexpr int A_BYTES = BM * BK * 2, STAGE_BYTES = (BM + BN) * BK * 2;
    constexpr int A_PIECES = BM * 8 / THREADS, B_PIECES = BN * 8 / THREADS;
    constexpr int MT = BM / 32, NT = BN / 16;
    await_inputs();
    if (GROUPED && blockIdx.x >= *p.tiles) return;
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 outs = GATED ? p.n / 2 : p.n;
    u32 first_row = blockIdx.x * BM, first_out = blockIdx.y * (GATED ? BN / 2 : BN);
    const T* w = p.w + (GROUPED ? (u64)p.tile_expert[blockIdx.x] * p.n * p.k : 0);
    u32 base = shared_address(memory);

    // Rows of a that this thread copies pieces of; NO_PAIR: zeros.
    u32 a_row[GROUPED ? A_PIECES : 1];
    if (GROUPED) {
#pragma unroll
        for (int i = 0; i < A_PIECES; i++) {
            u32 row = p.sorted[first_row + (thread + i * THREADS) / 8];
            a_row[i] = row != NO_PAIR ? row / p.a_divisor : NO_PAIR;
        }
    }
    u32 column = thread % 8, tiles = (p.k + BK - 1) / BK;
    u32 each = (tiles + gridDim.z - 1) / gridDim.z, begin = blockIdx.z * each;
    tiles = min(each, tiles - min(begin, tiles));
    auto fetch = [&](u32 tile) {
        u32 k = (begin + tile) * BK + column * 8, stage = base + tile % STAGES * STAGE_BYTES;
        bool inside = k < p.k;
        auto copy = [&](u32 to, const T* matrix, u32 row) {
            bool here = inside && row != NO_PAIR;
            copy16(to, here ? matrix + (u64)row * p.k + k : matrix, here);
        };
#pragma unroll
        for (int i = 0; i < A_PIECES; i++) {
            u32 line = (thread + i * THREADS) / 8, row = first_row + line;
            copy(stage + piece(line, column), p.a, GROUPED ? a_row[GROUPED ? i : 0] : row < p.m ? row : NO_PAIR);
        }
#pragma unroll
        for (int i = 0; i < B_PIECES; i++) {
            u32 line = (thread + i * THREADS) / 8;
            u32 out = first_out + (GATED ? line / 16 * 8 + line % 8 : line);
            copy(stage + A_BYTES + piece(line, column), w, out >= outs ? NO_PAIR : GATED && line & 8 ? out + outs : out);
        }
    };

    float sums[MT][NT][4] = {};
    u32 warp_row = warp / 2 * (BM / 2), warp_out = warp % 2 * (BN / 2);
#pragma unroll
    for (u32 tile = 0; tile < STAGES - 1; tile++) {
        if (tile < tiles) fetch(tile);
        asm volatile("cp.async.commit_group;");
    }
    for (u32 tile = 0; tile < tiles; tile++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        if (tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
        asm volatile("cp.async.commit_group;");
        u32 stage = base + tile % STAGES * STAGE_BYTES;
#pragma unroll
        for (u32 k = 0; k < BK / 16; k++) {
            u32 a[MT][4], b[NT / 2][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                load_matrices(stage + piece(warp_row + i * 16 + lane % 16, k * 2 + lane / 16), a[i]);
            }
#pragma unroll
            for (int j = 0; j < NT / 2; j++) {
                u32 row = warp_out + j * 16 + lane % 8 + lane / 16 * 8;
                load_matrices(stage + A_BYTES + piece(row, k * 2 + lane / 8 % 2), b[j]);
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int j = 0; j < NT; j++) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
    asm volatile("cp.async.wait_group 0;");

#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 place = first_row + warp_row + i * 16 + lane / 4 + half * 8;
            u32 row = GROUPED ? p.sorted[place] : place;
            if (GROUPED ? row == NO_PAIR : row >= p.m) continue;
            if (GATED) {
#pragma unroll
                for (int j = 0; j < NT; j += 2) {
                    u32 out = first_out + (warp_out + j * 8) / 2 + lane % 4 * 2;
                    if (out >= outs) continue;
                    float v[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float gate = rounded(sums[i][j][half * 2 + e]), up = rounded(sums[i][j + 1][half * 2 + e]);
                        v[e] = rounded(gate * sigmoid(gate)) * up;
                    }
                    *(u32*)((T*)p.c + (u64)row * outs + out) = (u32)bf16_bits(v[0]) | (u32)bf16_bits(v[1]) << 16;
                }
                continue;
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    u32 out = first_out + warp_out + j * 8 + lane % 4 * 2 + e;
                    if (out >= p.n) continue;
                    float v = sums[i][j][half * 2 + e];
                    if (p.c_f32) {
                        ((float*)p.c)[((u64)(GROUPED ? 0 : blockIdx.z) * p.m + row) * p.n + out] = v;
                    } else {
                        ((T*)p.c)[(u64)row * p.n + out] = narrow(v);
                    }
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gemm128(const GemmParams p) { gemm<128, 128, false, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm64(const GemmParams p) { gemm<64, 128, true, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm64_gated(const GemmParams p) { gemm<64, 128, true, true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm32(const GemmParams p) { gemm<32, 128, true, false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm32_gated(const GemmParams p) { gemm<32, 128, true, true>(p); }
