// Norms of rows, for every file that ends in one.

struct NormParams {
    T* out;          // [T, width]
    const void* x;   // [T, width]
    const T* weight; // [width]
    u32 width;
    u32 x_f32;
    float eps;
    u32 layer; // 1: LayerNorm, 0: RMSNorm
};

__device__ float block_sum(float v) {
    __shared__ float part[WARP];
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = v;
    __syncthreads();
    v = threadIdx.x % WARP < blockDim.x / WARP ? part[threadIdx.x % WARP] : 0.0f;
    return warp_sum(v);
}

// RMS: x / sqrt(mean(x²) + eps), rounded, times weight, rounded. Layer: (x − mean) / sqrt(var + eps) · weight, rounded.
__device__ __forceinline__ T normed(const NormParams& p, float v, float mean, float factor, float weight) {
    v = (v - mean) * factor;
    // The reference casts what RMSNorm normalised before the weight multiplies it.
    if (!p.layer) v = rounded(v);
    return narrow(v * weight);
}

