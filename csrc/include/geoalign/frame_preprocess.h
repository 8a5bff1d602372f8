// One decoded clip to the inputs of three reward models: data layout and the maths that CPU and CUDA share.
// No torch here: raw pointers only. All tensors are contiguous.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GEOALIGN_HD __host__ __device__ __forceinline__
#else
#define GEOALIGN_HD __attribute__((always_inline)) inline
#endif

namespace geoalign {

enum class Pixel : int32_t { kUint8 = 0, kFloat32 = 1, kBFloat16 = 2 };

// Resampling along one axis: output i = sum_k weights[i * taps + k] * input[first[i] + k]. Rows are padded with zero
// weights and first[i] + taps never exceeds the input, so no tap needs a bounds check.
struct Axis {
  const int32_t* first;
  const float* weights;
  int32_t taps;
  int32_t size;
};

// What is made of a frame: images of MapAnything, patches of VideoAlign's clip, patches of HPSv3's stills.
enum Target : int32_t { kGeometry = 0, kClip = 1, kStill = 2, kTargets = 3 };

struct Resize {
  Axis x, y;
};

// Sizes: clips * frames images of 3 x height x width. A slot is the position of a frame in an output, or -1.
struct FramePreprocess {
  const void* video;
  Pixel pixel;
  int32_t clips, frames, height, width;
  Resize resize[kTargets];
  const int32_t* slots;  // [3, frames]: geometry, clip, still
  int32_t geometry_frames, clip_frames, still_frames;
  const float* levels;   // [2, 3, 256]: normalised value of each 8-bit level, of images and patches, per channel
  float* geometry;       // [clips, geometry_frames, 3, height, width] of its target
  float* clip;           // [clips, clip_frames / 2, patches, 1176]
  float* still;          // [clips, still_frames, patches, 1176], every frame shown twice
};

// Pillow rounds to 8 bits after each pass, ties up; torch at the end only, ties to even. Clips are resized by torch.
GEOALIGN_HD constexpr bool rounds_twice(int32_t target) { return target != kClip; }

GEOALIGN_HD bool shows(const FramePreprocess& p, int32_t target, int32_t frame) {
  return p.slots[target * p.frames + frame] >= 0;
}

constexpr int kPatch = 14, kMerge = 2, kPair = 2;  // Qwen2-VL's vision tower
constexpr int kPatchArea = kPatch * kPatch;
constexpr int kPatchValues = 3 * kPair * kPatchArea;

// T is a float or, where the compiler has them, a vector of floats. NaN becomes 0.
template <class T>
GEOALIGN_HD T clamp_level(const T& x) {
  const T positive = x > 0.0f ? x : 0.0f;
  return positive < 255.0f ? positive : 255.0f;
}

// The integer part of the result is the level nearest to x, ties up.
template <class T>
GEOALIGN_HD T half_up(const T& x) {
  return clamp_level(x) + 0.5f;
}

// The level nearest to x, ties to even: added to 1.5 * 2^23 a float has no bits left for a fraction.
template <class T>
GEOALIGN_HD T half_even(const T& x) {
  return clamp_level(x) + 12582912.0f - 12582912.0f;
}

// Value in [-1, 1] to the nearest 8-bit level that a video file would store.
GEOALIGN_HD float level_of(float value) { return half_even((value + 1.0f) * 127.5f); }

GEOALIGN_HD float level_of_bfloat16(uint16_t bits) {
  union { uint32_t word; float value; } cast{static_cast<uint32_t>(bits) << 16};
  return level_of(cast.value);
}

template <Pixel kPixel>
GEOALIGN_HD float read_level(const void* video, int64_t index) {
  if constexpr (kPixel == Pixel::kUint8) return static_cast<float>(static_cast<const uint8_t*>(video)[index]);
  if constexpr (kPixel == Pixel::kFloat32) return level_of(static_cast<const float*>(video)[index]);
  return level_of_bfloat16(static_cast<const uint16_t*>(video)[index]);
}

// Offset of pixel (y, x) inside one temporal slice of patches, for channel c and the first frame of the pair.
// Order: merged row, merged column, row in merge, column in merge, channel, frame of the pair, row, column.
GEOALIGN_HD int64_t patch_offset(int32_t channel, int32_t y, int32_t x, int32_t width) {
  const int32_t row = y / kPatch, column = x / kPatch;
  const int32_t merged = (row / kMerge) * (width / (kPatch * kMerge)) + column / kMerge;
  const int64_t patch = static_cast<int64_t>(merged) * kMerge * kMerge + (row % kMerge) * kMerge + column % kMerge;
  return (patch * 3 + channel) * kPair * kPatchArea + (y % kPatch) * kPatch + x % kPatch;
}

// Where the patches of a frame that `target` (kClip or kStill) shows start; patch_offset counts from there.
GEOALIGN_HD float* patch_slice(const FramePreprocess& p, int32_t target, int32_t clip, int32_t frame) {
  const int64_t values = static_cast<int64_t>(p.resize[target].y.size) * p.resize[target].x.size * 3 * kPair;
  const int64_t first = clip, slot = p.slots[target * p.frames + frame];
  if (target == kStill) return p.still + (first * p.still_frames + slot) * values;
  return p.clip + (first * (p.clip_frames / kPair) + slot / kPair) * values + (slot % kPair) * kPatchArea;
}

GEOALIGN_HD float* geometry_plane(const FramePreprocess& p, int32_t clip, int32_t frame, int32_t channel) {
  const int64_t image = static_cast<int64_t>(clip) * p.geometry_frames + p.slots[frame];
  return p.geometry + (image * 3 + channel) * p.resize[kGeometry].y.size * p.resize[kGeometry].x.size;
}

}  // namespace geoalign

extern "C" {
// Images [begin, end) of the clips * frames images; host pointers.
void geoalign_frame_preprocess_cpu(const geoalign::FramePreprocess* p, int64_t begin, int64_t end);
// All images on `stream`; device pointers. `tile_reads`: source rows and columns that the largest tile of each target
// reads. Returns a cudaError_t.
int geoalign_frame_preprocess_cuda(const geoalign::FramePreprocess* p, const int32_t* tile_reads, void* stream);
}
