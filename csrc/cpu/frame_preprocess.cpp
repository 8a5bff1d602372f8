// C++ twin of the CUDA frame pre-processor: the same tables and rounding, blocked for SIMD instead of tiled.
#include "geoalign/frame_preprocess.h"

#include <cstring>
#include <vector>

namespace geoalign {
namespace {

constexpr int kLanes = 16;  // image rows resampled side by side: one SIMD register of floats

// Horizontal pass of kLanes rows. `in` [width][kLanes] -> `out` [rows][axis.size]; only `rows` lanes are stored.
template <bool kRound>
void resample_rows(const Axis& axis, const float* in, float* out, int32_t rows) {
  for (int32_t x = 0; x < axis.size; ++x) {
    const float* weights = axis.weights + static_cast<int64_t>(x) * axis.taps;
    const float* from = in + static_cast<int64_t>(axis.first[x]) * kLanes;
    float sum[kLanes] = {};
    for (int32_t k = 0; k < axis.taps; ++k)
      for (int32_t lane = 0; lane < kLanes; ++lane) sum[lane] += weights[k] * from[k * kLanes + lane];
    for (int32_t lane = 0; lane < rows; ++lane)
      out[static_cast<int64_t>(lane) * axis.size + x] = kRound ? round_half_up(sum[lane]) : sum[lane];
  }
}

// One output row of the vertical pass: `sum` [width].
void resample_column(const Axis& axis, int32_t y, const float* in, int32_t width, float* sum) {
  const float* weights = axis.weights + static_cast<int64_t>(y) * axis.taps;
  const float* from = in + static_cast<int64_t>(axis.first[y]) * width;
  for (int32_t x = 0; x < width; ++x) sum[x] = weights[0] * from[x];
  for (int32_t k = 1; k < axis.taps; ++k)
    for (int32_t x = 0; x < width; ++x) sum[x] += weights[k] * from[static_cast<int64_t>(k) * width + x];
}

struct Workspace {
  std::vector<float> levels, lanes, geometry, patch, row;
  explicit Workspace(const FramePreprocess& p)
      : levels(static_cast<size_t>(p.width) * kLanes),
        lanes(static_cast<size_t>(p.width) * kLanes),
        geometry(static_cast<size_t>(p.height) * p.geometry_x.size),
        patch(static_cast<size_t>(p.height) * p.patch_x.size),
        row(p.geometry_x.size > p.patch_x.size ? p.geometry_x.size : p.patch_x.size) {}
};

// Rows [y, y + rows) of a plane as levels, transposed to [width][kLanes]; converted first, because that part vectorises.
template <Pixel kPixel>
void read_lanes(const FramePreprocess& p, int64_t plane, int32_t y, int32_t rows, Workspace& work) {
  float* levels = work.levels.data();
  const int64_t from = plane + static_cast<int64_t>(y) * p.width, count = static_cast<int64_t>(rows) * p.width;
  for (int64_t i = 0; i < count; ++i) levels[i] = read_level<kPixel>(p.video, from + i);
  float* lanes = work.lanes.data();
  for (int32_t x = 0; x < p.width; ++x)
    for (int32_t lane = 0; lane < rows; ++lane) lanes[x * kLanes + lane] = levels[lane * p.width + x];
}

template <Pixel kPixel>
void horizontal(const FramePreprocess& p, int64_t plane, bool geometry, bool patch, Workspace& work) {
  for (int32_t y = 0; y < p.height; y += kLanes) {
    const int32_t rows = p.height - y < kLanes ? p.height - y : kLanes;
    read_lanes<kPixel>(p, plane, y, rows, work);
    if (geometry)
      resample_rows<true>(p.geometry_x, work.lanes.data(),
                          work.geometry.data() + static_cast<int64_t>(y) * p.geometry_x.size, rows);
    if (patch)
      resample_rows<false>(p.patch_x, work.lanes.data(), work.patch.data() + static_cast<int64_t>(y) * p.patch_x.size,
                           rows);
  }
}

void geometry_rows(const FramePreprocess& p, int32_t clip, int32_t frame, int32_t channel, Workspace& work) {
  const int32_t width = p.geometry_x.size;
  float* out = geometry_plane(p, clip, frame, channel);
  const float* levels = p.levels + channel * 256;
  for (int32_t y = 0; y < p.geometry_y.size; ++y) {
    resample_column(p.geometry_y, y, work.geometry.data(), width, work.row.data());
    for (int32_t x = 0; x < width; ++x)
      out[static_cast<int64_t>(y) * width + x] = levels[static_cast<int32_t>(round_half_up(work.row[x]))];
  }
}

void patch_rows(const FramePreprocess& p, int32_t clip, int32_t frame, int32_t channel, Workspace& work) {
  const int32_t width = p.patch_x.size;
  const float* levels = p.levels + (3 + channel) * 256;
  float* in_clip = clip_slice(p, clip, frame);
  float* in_still = still_slice(p, clip, frame);
  for (int32_t y = 0; y < p.patch_y.size; ++y) {
    resample_column(p.patch_y, y, work.patch.data(), width, work.row.data());
    for (int32_t column = 0; column < width; column += kPatch) {
      const int64_t offset = patch_offset(channel, y, column, width);
      float values[kPatch];
      for (int32_t x = 0; x < kPatch; ++x)
        values[x] = levels[static_cast<int32_t>(round_half_even(work.row[column + x]))];
      if (in_clip) std::memcpy(in_clip + offset, values, sizeof(values));
      if (in_still) {
        std::memcpy(in_still + offset, values, sizeof(values));
        std::memcpy(in_still + offset + kPatchArea, values, sizeof(values));
      }
    }
  }
}

template <Pixel kPixel>
void images(const FramePreprocess& p, int64_t begin, int64_t end) {
  Workspace work(p);
  for (int64_t image = begin; image < end; ++image) {
    const int32_t clip = static_cast<int32_t>(image / p.frames), frame = static_cast<int32_t>(image % p.frames);
    const bool geometry = p.slots[frame] >= 0;
    const bool patch = p.slots[p.frames + frame] >= 0 || p.slots[2 * p.frames + frame] >= 0;
    if (!geometry && !patch) continue;
    for (int32_t channel = 0; channel < 3; ++channel) {
      horizontal<kPixel>(p, (image * 3 + channel) * p.height * p.width, geometry, patch, work);
      if (geometry) geometry_rows(p, clip, frame, channel, work);
      if (patch) patch_rows(p, clip, frame, channel, work);
    }
  }
}

}  // namespace
}  // namespace geoalign

extern "C" void geoalign_frame_preprocess_cpu(const geoalign::FramePreprocess* p, int64_t begin, int64_t end) {
  using geoalign::Pixel;
  if (p->pixel == Pixel::kUint8) return geoalign::images<Pixel::kUint8>(*p, begin, end);
  if (p->pixel == Pixel::kFloat32) return geoalign::images<Pixel::kFloat32>(*p, begin, end);
  geoalign::images<Pixel::kBFloat16>(*p, begin, end);
}
