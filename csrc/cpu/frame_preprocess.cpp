// C++ twin of the CUDA frame pre-processor: the same tables, the same order of sums, the same rounding.
//
// A plane streams through once. kRows source rows become levels and are resampled across into a ring per target, just
// long enough for the vertical filter. Every output row whose taps have arrived is summed down the ring and stored. All
// intermediate values stay in the L1 and L2 caches; only pixels and outputs travel to memory.
//
// The sums are written for kLanes floats side by side and compiled once per instruction set, to be chosen when the
// code runs: a library built on one machine runs on the others of its architecture. No sum depends on the lanes, so all
// give the same bits.

// Vectors are passed between functions that are always inlined, so no calling convention is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "geoalign/frame_preprocess.h"

#include <algorithm>
#include <cstring>
#include <vector>

#define GEOALIGN_INLINE __attribute__((always_inline)) inline
#define GEOALIGN_UNROLL _Pragma("GCC unroll 4")  // small arrays of vectors must become registers

namespace geoalign {
namespace {

constexpr int kRows = 4;     // source rows resampled across together; they share the loads of the weights
constexpr int kVectors = 4;  // vectors summed down together; they share the loads of the weight

int32_t round_up(int32_t value, int32_t step) { return (value + step - 1) / step * step; }

template <int kLanes>
struct Vectors {
  typedef float Float __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Int __attribute__((vector_size(kLanes * sizeof(int32_t))));
};

// One target of one plane at a time.
template <int kLanes, bool kRoundsTwice>
class Resampler {
  using Float = typename Vectors<kLanes>::Float;
  using Int = typename Vectors<kLanes>::Int;

 public:
  // `kept`: finished rows of levels held until they are stored.
  Resampler(const Resize& resize, int32_t kept)
      : across_(resize.x),
        down_(resize.y),
        stride_(round_up(across_.size, kVectors * kLanes)),
        slots_(down_.taps + kRows - 1),
        kept_(kept),
        ring_(static_cast<size_t>(slots_) * stride_),
        levels_(static_cast<size_t>(kept_) * stride_),
        taps_(down_.taps) {
    spread_weights();
  }

  int32_t span() const { return span_; }
  int32_t stride() const { return stride_; }
  const int32_t* levels() const { return levels_.data(); }

  void restart() { next_ = 0; }

  // Source rows [y, y + kRows), `stride` floats apart, into the ring. A block of kLanes neighbouring outputs reads one
  // run of inputs, each of them with a vector of weights: some weights are zero, but nothing is ever transposed.
  GEOALIGN_INLINE void across(const float* source, int32_t stride, int32_t y) {
    float* out[kRows];
    for (int r = 0; r < kRows; ++r) out[r] = slot(y + r);
    const float* weights = weights_.data();
    for (int32_t x = 0; x < across_.size; x += kLanes) {
      const float* in = source + across_.first[x];
      Float sum[kRows];
      GEOALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] = Float{};
      for (int32_t j = 0; j < span_; ++j, weights += kLanes) {
        const Float weight = load(weights);
        GEOALIGN_UNROLL
        for (int r = 0; r < kRows; ++r) sum[r] += in[r * stride + j] * weight;
      }
      GEOALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kRoundsTwice) sum[r] = __builtin_convertvector(levels_of(sum[r]), Float);
        std::memcpy(out[r] + x, &sum[r], sizeof(Float));
      }
    }
  }

  // The next output row, if all its taps lie in source rows [0, end): sums it into levels() and returns its number,
  // else returns -1. Row y goes to row y % kept.
  GEOALIGN_INLINE int32_t down(int32_t end) {
    if (next_ == down_.size || down_.first[next_] + down_.taps > end) return -1;
    for (int32_t k = 0; k < down_.taps; ++k) taps_[k] = slot(down_.first[next_] + k);
    const float* weights = down_.weights + static_cast<int64_t>(next_) * down_.taps;
    int32_t* out = levels_.data() + static_cast<int64_t>(next_ % kept_) * stride_;
    for (int32_t x = 0; x < stride_; x += kVectors * kLanes) {
      Float sum[kVectors];
      GEOALIGN_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[v] = Float{};
      for (int32_t k = 0; k < down_.taps; ++k) {
        GEOALIGN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[v] += weights[k] * load(taps_[k] + x + v * kLanes);
      }
      GEOALIGN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Int whole = levels_of(sum[v]);
        std::memcpy(out + x + v * kLanes, &whole, sizeof(Int));
      }
    }
    return next_++;
  }

 private:
  static GEOALIGN_INLINE Float load(const float* from) {
    Float value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }

  static GEOALIGN_INLINE Int levels_of(const Float& sum) {
    return __builtin_convertvector(kRoundsTwice ? half_up(sum) : half_even(sum), Int);
  }

  float* slot(int32_t y) { return ring_.data() + static_cast<int64_t>(y % slots_) * stride_; }

  // Weights of the horizontal filter per block of kLanes outputs: [block][input of the block's run][output].
  void spread_weights() {
    for (int32_t x = 0; x < across_.size; ++x) span_ = std::max(span_, shift(x) + across_.taps);
    weights_.resize(static_cast<size_t>(round_up(across_.size, kLanes)) * span_);
    for (int32_t x = 0; x < across_.size; ++x)
      for (int32_t k = 0; k < across_.taps; ++k)
        weights_[static_cast<size_t>(x / kLanes * span_ + shift(x) + k) * kLanes + x % kLanes] =
            across_.weights[static_cast<int64_t>(x) * across_.taps + k];
  }

  int32_t shift(int32_t x) const { return across_.first[x] - across_.first[x / kLanes * kLanes]; }

  Axis across_, down_;
  int32_t stride_, slots_, kept_, span_ = 0, next_ = 0;
  std::vector<float> weights_, ring_;
  std::vector<int32_t> levels_;
  std::vector<const float*> taps_;
};

struct Plane {
  int32_t clip, frame, channel;
};

// The table look-ups are functions of their own, outside of the code for wide vectors: there the compiler would make
// them gathers, which are slower than plain loads.
GEOALIGN_INLINE void look_up(const float* table, const int32_t* levels, int32_t count, float* out) {
  for (int32_t i = 0; i < count; ++i) out[i] = table[levels[i]];
}

__attribute__((noinline)) void store_geometry(const FramePreprocess& p, const Plane& plane, int32_t y,
                                              const int32_t* levels) {
  const int32_t width = p.resize[kGeometry].x.size;
  float* out = geometry_plane(p, plane.clip, plane.frame, plane.channel);
  look_up(p.levels + plane.channel * 256, levels, width, out + static_cast<int64_t>(y) * width);
}

// kPatch rows of levels, the last of them output row y: one contiguous run per patch and copy.
__attribute__((noinline)) void store_patches(const FramePreprocess& p, const Plane& plane, int32_t target, int32_t y,
                                             const int32_t* levels, int32_t stride) {
  if (y % kPatch != kPatch - 1) return;
  const int32_t width = p.resize[target].x.size;
  const float* table = p.levels + (3 + plane.channel) * 256;
  float* slice = patch_slice(p, target, plane.clip, plane.frame);
  for (int32_t x = 0; x < width; x += kPatch) {
    float patch[kPatchArea];
    for (int32_t row = 0; row < kPatch; ++row) look_up(table, levels + row * stride + x, kPatch, patch + row * kPatch);
    float* out = slice + patch_offset(plane.channel, y - (kPatch - 1), x, width);
    std::memcpy(out, patch, sizeof(patch));
    if (target == kStill) std::memcpy(out + kPatchArea, patch, sizeof(patch));
  }
}

template <int kLanes>
struct Workspace {
  Resampler<kLanes, rounds_twice(kGeometry)> geometry;
  Resampler<kLanes, rounds_twice(kClip)> clip;
  Resampler<kLanes, rounds_twice(kStill)> still;
  int32_t stride;
  std::vector<float> rows;  // kRows source rows of levels

  // The run of the last block may reach past the image, with zero weights; so the rows are padded.
  explicit Workspace(const FramePreprocess& p)
      : geometry(p.resize[kGeometry], 1),
        clip(p.resize[kClip], kPatch),
        still(p.resize[kStill], kPatch),
        stride(p.width + std::max({geometry.span(), clip.span(), still.span()})),
        rows(static_cast<size_t>(kRows) * stride) {}
};

template <Pixel kPixel, int kLanes>
GEOALIGN_INLINE void resample(const FramePreprocess& p, const Plane& plane, Workspace<kLanes>& work) {
  const int64_t image = static_cast<int64_t>(plane.clip) * p.frames + plane.frame;
  const int64_t first = (image * 3 + plane.channel) * p.height * p.width;
  work.geometry.restart();
  work.clip.restart();
  work.still.restart();
  for (int32_t y = 0; y < p.height; y += kRows) {
    const int32_t end = std::min(y + kRows, p.height);
    for (int32_t row = y; row < end; ++row)
      for (int32_t x = 0; x < p.width; ++x)
        work.rows[(row - y) * work.stride + x] = read_level<kPixel>(p.video, first + int64_t{row} * p.width + x);
    if (shows(p, kGeometry, plane.frame)) {
      work.geometry.across(work.rows.data(), work.stride, y);
      for (int32_t out; (out = work.geometry.down(end)) >= 0;) store_geometry(p, plane, out, work.geometry.levels());
    }
    if (shows(p, kClip, plane.frame)) {
      work.clip.across(work.rows.data(), work.stride, y);
      for (int32_t out; (out = work.clip.down(end)) >= 0;)
        store_patches(p, plane, kClip, out, work.clip.levels(), work.clip.stride());
    }
    if (shows(p, kStill, plane.frame)) {
      work.still.across(work.rows.data(), work.stride, y);
      for (int32_t out; (out = work.still.down(end)) >= 0;)
        store_patches(p, plane, kStill, out, work.still.levels(), work.still.stride());
    }
  }
}

template <Pixel kPixel, int kLanes>
GEOALIGN_INLINE void images(const FramePreprocess& p, int64_t begin, int64_t end) {
  Workspace<kLanes> work(p);
  for (int64_t image = begin; image < end; ++image) {
    const int32_t clip = static_cast<int32_t>(image / p.frames), frame = static_cast<int32_t>(image % p.frames);
    if (!shows(p, kGeometry, frame) && !shows(p, kClip, frame) && !shows(p, kStill, frame)) continue;
    for (int32_t channel = 0; channel < 3; ++channel) resample<kPixel>(p, {clip, frame, channel}, work);
  }
}

template <int kLanes>
GEOALIGN_INLINE void images(const FramePreprocess& p, int64_t begin, int64_t end) {
  if (p.pixel == Pixel::kUint8) return images<Pixel::kUint8, kLanes>(p, begin, end);
  if (p.pixel == Pixel::kFloat32) return images<Pixel::kFloat32, kLanes>(p, begin, end);
  images<Pixel::kBFloat16, kLanes>(p, begin, end);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) void images_avx2(const FramePreprocess& p, int64_t begin, int64_t end) {
  images<8>(p, begin, end);
}
#endif

// SSE2, or the vectors of another architecture.
void images_baseline(const FramePreprocess& p, int64_t begin, int64_t end) { images<4>(p, begin, end); }

}  // namespace
}  // namespace geoalign

extern "C" void geoalign_frame_preprocess_cpu(const geoalign::FramePreprocess* p, int64_t begin, int64_t end) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) return geoalign::images_avx2(*p, begin, end);
#endif
  geoalign::images_baseline(*p, begin, end);
}
