// c = a · wᵀ for very many rows on Hopper's warpgroup tensor cores (wgmma m64n256k16), after gemm.cu: the same shapes and
// the same tiles in shared memory, whose pieces lie as the 128-byte swizzle wants them. A block takes 128 rows and 256
// rows of w; two warpgroups take 64 rows each. Four stages of cp.async; a product is on its way while the next stage is
// awaited. For sm_90a alone. Operations: 2·M·N·K. Floor at 800 TFLOP/s (H100), North, 8192 rows: qkv 215 us, o 172 us,
// gate_up of 65536 pairs 515 us, down 258 us. Measured (H100 80GB HBM3, ncu with cold caches, 2026-11-24): 387, 271, 1030 and
// 753 us, so 56, 63, 50 and 34 % of the floor; an expert's last tile is mostly padding, and down writes 537 MB of fp32.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define WIDE_ROWS 128
#define WIDE_OUTS 256
#define WIDE_STAGES 4
#define WIDE_THREADS 256
#define WIDE_STAGE_BYTES ((WIDE_ROWS + WIDE_OUTS) * BK * 2)

// d [64, 256] (+)= a [64, 16] · b [256, 16]ᵀ, both described in shared memory.
__device__ __forceinline__ void multiply_group(float* d, u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, add, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(add));
}

// Rows of 128 bytes, eight of them to a swizzled group of 1024.
__device__ __forceinline__ u64 described(u32 at) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Gated: w holds gate rows and up rows, and c = silu(gate) · up [M, N/2] in bf16, each factor rounded as the reference
// stores it. A tile then has 128 gate rows and the 128 up rows that belong to them.
template <bool GATED>
__device__ __forceinline__ void gemm_wide(const GemmParams& p) {
    extern __shared__ unsigned char memory[];
    await_inputs();
    if (p.tiles && blockIdx.x >= *p.tiles) return;
    u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    u32 outs = GATED ? p.n / 2 : p.n;
    u32 first_row = blockIdx.x * WIDE_ROWS, first_out = blockIdx.y * (GATED ? WIDE_OUTS / 2 : WIDE_OUTS);
    const T* w = p.w + (p.tile_expert ? (u64)p.tile_expert[blockIdx.x] * p.n * p.k : 0);
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    u32 column = thread % 8, line = thread / 8;

    const T* a_from[4];
    bool a_here[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 place = first_row + line + i * 32;
        u32 row = p.sorted ? p.sorted[place] : place;
        a_here[i] = p.sorted ? row != NO_PAIR : row < p.m;
        a_from[i] = p.a + (a_here[i] ? (u64)(row / p.a_divisor) * p.k : 0);
    }
    auto fetch = [&](u32 tile) {
        u32 k = tile * BK + column * 8, stage = base + tile % WIDE_STAGES * WIDE_STAGE_BYTES;
        bool inside = k < p.k;
        u32 at = inside ? k : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) copy16(stage + piece(line + i * 32, column), a_from[i] + at, a_here[i] && inside);
        stage += WIDE_ROWS * BK * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 out = first_out + line + (GATED ? i % 4 : i) * 32;
            bool here = inside && out < outs;
            u64 row = here ? out + (GATED ? i / 4 * outs : 0) : 0;
            copy16(stage + piece(line + i * 32, column), w + row * p.k + at, here);
        }
    };

    float sums[128];
    u32 tiles = (p.k + BK - 1) / BK;
#pragma unroll
    for (u32 tile = 0; tile < 2; tile++) {
        if (tile < tiles) fetch(tile);
        asm volatile("cp.async.commit_group;");
    }
    for (u32 tile = 0; tile < tiles; tile++) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        u32 stage = base + tile % WIDE_STAGES * WIDE_STAGE_BYTES;
        u64 a = described(stage + warp / 4 * 64 * BK * 2), b = described(stage + WIDE_ROWS * BK * 2);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (u32 k = 0; k < BK / 16; k++) multiply_group(sums, a + k * 2, b + k * 2, tile + k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The stage of the tile before the last one: both warpgroups had done with it before the barrier.
        if (tile + 2 < tiles) fetch(tile + 2);
        asm volatile("cp.async.commit_group;");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 place = first_row + warp * 16 + lane / 4 + half * 8;
        u32 row = p.sorted ? p.sorted[place] : place;
        if (p.sorted ? row == NO_PAIR : row >= p.m) continue;
#pragma unroll
        for (int j = 0; j < (GATED ? 16 : 32); j++) {
            u32 out = first_out + j * 8 + lane % 4 * 2;
            if (out >= outs) continue;
            float v[2] = {sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]};
            if (GATED) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float gate = rounded(v[e]), up = rounded(sums[64 + j * 4 + half * 2 + e]);
                    v[e] = rounded(gate * sigmoid(gate)) * up;
                }
            }
            u64 at = (u64)row * outs + out;
            if (!GATED && p.c_f32) {
                *(float2*)((float*)p.c + at) = make_float2(v[0], v[1]);
            } else {
                *(u32*)((T*)p.c + at) = (u32)bf16_bits(v[0]) | (u32)bf16_bits(v[1]) << 16;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) gemm_wide_plain(const GemmParams p) { gemm_wide<false>(p); }
extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) gemm_wide_gated(const GemmParams p) { gemm_wide<true>(p); }
#endif
