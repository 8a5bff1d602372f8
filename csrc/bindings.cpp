// The only file that knows torch: registers geoalign_native::frame_preprocess through the stable ABI (torch >= 2.10).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "geoalign/frame_preprocess.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef GEOALIGN_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using torch::stable::Tensor;

geoalign::Axis axis(const Tensor& first, const Tensor& weights) {
  return {static_cast<const int32_t*>(first.const_data_ptr()), static_cast<const float*>(weights.const_data_ptr()),
          static_cast<int32_t>(weights.size(1)), static_cast<int32_t>(weights.size(0))};
}

geoalign::Pixel pixel_of(const Tensor& video) {
  using torch::headeronly::ScalarType;
  const ScalarType type = video.scalar_type();
  if (type == ScalarType::Byte) return geoalign::Pixel::kUint8;
  if (type == ScalarType::Float) return geoalign::Pixel::kFloat32;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "frame_preprocess takes uint8, float32 or bfloat16 pixels");
  return geoalign::Pixel::kBFloat16;
}

// Shapes and dtypes of everything but the pixels are the Python op's own doing; it builds all tables and outputs.
geoalign::FramePreprocess pack(const Tensor& video, const Tensor& gx, const Tensor& gxw, const Tensor& gy,
                               const Tensor& gyw, const Tensor& cx, const Tensor& cxw, const Tensor& cy,
                               const Tensor& cyw, const Tensor& sx, const Tensor& sxw, const Tensor& sy,
                               const Tensor& syw, const Tensor& slots, const Tensor& levels, const Tensor& geometry,
                               const Tensor& clip, const Tensor& still) {
  geoalign::FramePreprocess p{};
  p.video = video.const_data_ptr();
  p.pixel = pixel_of(video);
  p.clips = static_cast<int32_t>(video.size(0));
  p.frames = static_cast<int32_t>(video.size(1));
  p.height = static_cast<int32_t>(video.size(3));
  p.width = static_cast<int32_t>(video.size(4));
  p.resize[geoalign::kGeometry] = {axis(gx, gxw), axis(gy, gyw)};
  p.resize[geoalign::kClip] = {axis(cx, cxw), axis(cy, cyw)};
  p.resize[geoalign::kStill] = {axis(sx, sxw), axis(sy, syw)};
  p.slots = static_cast<const int32_t*>(slots.const_data_ptr());
  p.geometry_frames = static_cast<int32_t>(geometry.size(1));
  p.clip_frames = static_cast<int32_t>(clip.size(1)) * geoalign::kPair;
  p.still_frames = static_cast<int32_t>(still.size(1));
  p.levels = static_cast<const float*>(levels.const_data_ptr());
  p.geometry = static_cast<float*>(geometry.mutable_data_ptr());
  p.clip = static_cast<float*>(clip.mutable_data_ptr());
  p.still = static_cast<float*>(still.mutable_data_ptr());
  return p;
}

#define GEOALIGN_ARGUMENTS                                                                                       \
  Tensor video, Tensor gx, Tensor gxw, Tensor gy, Tensor gyw, Tensor cx, Tensor cxw, Tensor cy, Tensor cyw,      \
      Tensor sx, Tensor sxw, Tensor sy, Tensor syw, Tensor slots, Tensor levels, int64_t geometry_rows,          \
      int64_t geometry_columns, int64_t clip_rows, int64_t clip_columns, int64_t still_rows,                     \
      int64_t still_columns, int64_t stream, Tensor geometry, Tensor clip, Tensor still
#define GEOALIGN_PACKED \
  pack(video, gx, gxw, gy, gyw, cx, cxw, cy, cyw, sx, sxw, sy, syw, slots, levels, geometry, clip, still)

// Outputs of hundreds of megabytes are fresh memory: with pages of 4 KiB the kernel takes as long to map them as the
// twin takes to fill them. NumPy asks for huge pages in the same way.
void ask_for_huge_pages(const Tensor& output) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(output.const_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + static_cast<uintptr_t>(output.numel()) * sizeof(float)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal costs time only
#else
  (void)output;
#endif
}

void frame_preprocess_cpu(GEOALIGN_ARGUMENTS) {
  (void)geometry_rows, (void)geometry_columns, (void)clip_rows, (void)clip_columns, (void)still_rows;
  (void)still_columns, (void)stream;
  for (const Tensor& output : {geometry, clip, still}) ask_for_huge_pages(output);
  const geoalign::FramePreprocess p = GEOALIGN_PACKED;
  torch::stable::parallel_for(0, static_cast<int64_t>(p.clips) * p.frames, 1, [&p](int64_t begin, int64_t end) {
    geoalign_frame_preprocess_cpu(&p, begin, end);
  });
}

#ifdef GEOALIGN_WITH_CUDA
void frame_preprocess_cuda(GEOALIGN_ARGUMENTS) {
  const geoalign::FramePreprocess p = GEOALIGN_PACKED;
  const torch::stable::accelerator::DeviceGuard guard(video.get_device_index());
  const int32_t reads[2 * geoalign::kTargets] = {
      static_cast<int32_t>(geometry_rows), static_cast<int32_t>(geometry_columns), static_cast<int32_t>(clip_rows),
      static_cast<int32_t>(clip_columns),  static_cast<int32_t>(still_rows),       static_cast<int32_t>(still_columns)};
  const int error = geoalign_frame_preprocess_cuda(&p, reads, reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(error == 0, "frame_preprocess: CUDA launch failed with cudaError ", error);
}
#endif

}  // namespace

// `stream` is a cudaStream_t (0 for CPU tensors): the shim that would give it lies in torch's CUDA library, which a
// library that also loads into a CPU torch cannot link.
STABLE_TORCH_LIBRARY(geoalign_native, m) {
  m.def(
      "frame_preprocess(Tensor video, Tensor gx, Tensor gxw, Tensor gy, Tensor gyw, Tensor cx, Tensor cxw, Tensor cy, "
      "Tensor cyw, Tensor sx, Tensor sxw, Tensor sy, Tensor syw, Tensor slots, Tensor levels, int geometry_rows, "
      "int geometry_columns, int clip_rows, int clip_columns, int still_rows, int still_columns, int stream, Tensor(a!) geometry, Tensor(b!) clip, Tensor(c!) still) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(geoalign_native, CPU, m) { m.impl("frame_preprocess", TORCH_BOX(&frame_preprocess_cpu)); }

#ifdef GEOALIGN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(geoalign_native, CUDA, m) { m.impl("frame_preprocess", TORCH_BOX(&frame_preprocess_cuda)); }
#endif
