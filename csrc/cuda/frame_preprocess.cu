// CUDA launcher of the frame pre-processor: one launch per clip batch, one block per output tile, channel and image.
#include <cuda_runtime.h>

#include "geoalign/frame_tile.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    frame_preprocess_kernel(const __grid_constant__ geoalign::FramePreprocess p, int32_t row_bytes) {
  extern __shared__ __align__(16) unsigned char shared[];
  float* rows = reinterpret_cast<float*>(shared);
  unsigned char* source = shared + row_bytes;
  const geoalign::Tile tile = geoalign::make_tile(p, blockIdx.y, blockIdx.z, blockIdx.x);
  if (!geoalign::wanted(p, tile)) return;
  geoalign::load_tile(p, tile, source, threadIdx.x, kThreads);
  __syncthreads();
  geoalign::resample_rows(p, tile, source, rows, threadIdx.x, kThreads);
  __syncthreads();
  geoalign::store_tile(p, tile, rows, threadIdx.x, kThreads);
}

}  // namespace

extern "C" int geoalign_frame_preprocess_cuda(const geoalign::FramePreprocess* p, const int32_t* tile_reads,
                                              void* stream) {
  const int64_t images = static_cast<int64_t>(p->clips) * p->frames;
  if (images == 0) return cudaSuccess;
  int32_t most_rows = 0, most_area = 0;
  for (int32_t target = 0; target < geoalign::kTargets; ++target) {
    const int32_t rows = tile_reads[2 * target], area = rows * tile_reads[2 * target + 1];
    most_rows = rows > most_rows ? rows : most_rows;
    most_area = area > most_area ? area : most_area;
  }
  const int32_t row_bytes = most_rows * geoalign::kTileWidth * static_cast<int32_t>(sizeof(float));
  const int32_t bytes = row_bytes + most_area;
  if (bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(frame_preprocess_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  // make_tile reads tables in device memory; tile counts need sizes only.
  const dim3 grid(static_cast<unsigned>(images), static_cast<unsigned>(geoalign::all_tiles(*p)), 3);
  frame_preprocess_kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(*p, row_bytes);
  return cudaGetLastError();
}
