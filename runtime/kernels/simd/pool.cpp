// Max and average pooling and their gradients, NHWC, vectorised over channels. The gradients gather: a pixel
// of x asks every window that covers it, in ascending order, so threads take rows of x.
#include "simd/attributes.h"
#include "simd/halves.h"
#include "simd/math.h"
#include "simd/patches.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

struct Pool {
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[4], dilation[2] = {1, 1};
  bool include_padding = false;

  Pool(const Tensor& x, const Tensor& y)
      : batch(x.dims[0]),
        height(x.dims[1]),
        width(x.dims[2]),
        channels(x.dims[3]),
        out_height(y.dims[1]),
        out_width(y.dims[2]) {}
  void read(Attributes* attributes, bool is_max) {
    attributes->tuple(kernel, 2);
    attributes->tuple(stride, 2);
    attributes->tuple(padding, 4);
    if (is_max) {
      attributes->tuple(dilation, 2);
    } else {
      include_padding = attributes->boolean();
    }
  }
  int64_t input(int axis, int64_t out, int64_t tap) const {
    return out * stride[axis] - padding[2 * axis] + tap * dilation[axis];
  }
  // Pixels of one axis under a window.
  int64_t covered(int axis, int64_t out) const {
    int64_t count = 0;
    for (int64_t tap = 0; tap < kernel[axis]; ++tap) {
      const int64_t at = input(axis, out, tap);
      count += at >= 0 && at < (axis == 0 ? height : width);
    }
    return count;
  }
  // 1 / (what a window's sum is divided by); 0 for a window that lies in the padding.
  float weight(int64_t oh, int64_t ow) const {
    if (include_padding) return 1.0f / static_cast<float>(kernel[0] * kernel[1]);
    const int64_t count = covered(0, oh) * covered(1, ow);
    return count == 0 ? 0.0f : 1.0f / static_cast<float>(count);
  }
  // f(tap, pixel of x) for the taps of a window that are inside.
  template <typename F>
  POCKC_INLINE void for_taps(int64_t n, int64_t oh, int64_t ow, F&& f) const {
    for (int64_t r = 0; r < kernel[0]; ++r) {
      const int64_t h = input(0, oh, r);
      if (h < 0 || h >= height) continue;
      for (int64_t s = 0; s < kernel[1]; ++s) {
        const int64_t w = input(1, ow, s);
        if (w >= 0 && w < width) f(r * kernel[1] + s, ((n * height + h) * width + w) * channels);
      }
    }
  }
  // The window that reads position `at` of an axis with `tap`, or -1.
  int64_t window(int axis, int64_t at, int64_t tap) const {
    const int64_t shifted = at + padding[2 * axis] - tap * dilation[axis];
    if (shifted < 0 || shifted % stride[axis] != 0) return -1;
    const int64_t out = shifted / stride[axis];
    return out < (axis == 0 ? out_height : out_width) ? out : -1;
  }
  // f(tap, oh, ow, pixel of y) for the windows over pixel (h, w) of x.
  template <typename F>
  POCKC_INLINE void for_windows(int64_t n, int64_t h, int64_t w, F&& f) const {
    for (int64_t r = kernel[0] - 1; r >= 0; --r) {
      const int64_t oh = window(0, h, r);
      if (oh < 0) continue;
      for (int64_t s = kernel[1] - 1; s >= 0; --s) {
        const int64_t ow = window(1, w, s);
        if (ow >= 0) f(r * kernel[1] + s, oh, ow, ((n * out_height + oh) * out_width + ow) * channels);
      }
    }
  }
};

bool accepts(const Call& call) {
  return call.inputs[0].dtype == call.outputs[0].dtype && elements(call.inputs[0]) > 0 &&
         elements(call.outputs[0]) > 0;
}

// f(image, row) over rows.
template <typename F>
void for_rows(const Call& call, const Pool& p, int64_t height, int64_t width, F&& f) {
  const int64_t grain = maximum<int64_t>(1, kElementGrain / (width * p.channels));
  parallel(call, p.batch * height, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) f(row / height, row % height);
  });
}

POCKC_INLINE vi load_bytes(const uint8_t* p, int64_t valid) {
  typedef uint8_t bytes __attribute__((vector_size(W)));
  bytes x = {};
  std::memcpy(&x, p, static_cast<size_t>(valid));
  return __builtin_convertvector(x, vi);
}
POCKC_INLINE void store_bytes(uint8_t* p, vi x, int64_t valid) {
  typedef uint8_t bytes __attribute__((vector_size(W)));
  const bytes narrow = __builtin_convertvector(x, bytes);
  std::memcpy(p, &narrow, static_cast<size_t>(valid));
}

}  // namespace

template <typename T>
Status max_pool2d_of(const Call& call) {
  Pool p(call.inputs[0], call.outputs[0]);
  Attributes attributes(call);
  p.read(&attributes, true);
  const T* x = call.inputs[0].as<T>();
  T* y = call.outputs[0].as<T>();
  uint8_t* indices = call.outputs[1].as<uint8_t>();
  for_rows(call, p, p.out_height, p.out_width, [&](int64_t n, int64_t oh) {
    for (int64_t ow = 0; ow < p.out_width; ++ow) {
      const int64_t out = ((n * p.out_height + oh) * p.out_width + ow) * p.channels;
      for_vectors(0, p.channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        vf most = splat(-kInfinity);
        vi index = {};
        bool first = true;
        p.for_taps(n, oh, ow, [&](int64_t tap, int64_t pixel) {
          const vf v = load_n(x + pixel + c, valid);
          // The first tap is taken even where it is -inf; NaN wins over everything.
          const vi wins = first ? splat_int(-1) : (v > most) | (v != v);
          most = select(wins, v, most);
          index = wins ? splat_int(static_cast<int32_t>(tap)) : index;
          first = false;
        });
        store_n(y + out + c, most, valid);
        store_bytes(indices + out + c, index, valid);
      });
    }
  });
  return PK_OK;
}

bool accepts_max_pool2d(const Call& call) { return accepts(call); }

Status run_max_pool2d(const Call& call) {
  return with_elements(call.inputs[0].dtype, [&](auto zero) { return max_pool2d_of<decltype(zero)>(call); });
}

template <typename T>
Status max_pool2d_grad_of(const Call& call) {
  Pool p(call.outputs[0], call.inputs[0]);
  Attributes attributes(call);
  int64_t size[2];
  attributes.tuple(size, 2);
  p.read(&attributes, true);
  const T* ct = call.inputs[0].as<T>();
  const uint8_t* indices = call.inputs[1].as<uint8_t>();
  T* dx = call.outputs[0].as<T>();
  for_rows(call, p, p.height, p.width, [&](int64_t n, int64_t h) {
    for (int64_t w = 0; w < p.width; ++w) {
      const int64_t out = ((n * p.height + h) * p.width + w) * p.channels;
      for_vectors(0, p.channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        vf sum = {};
        p.for_windows(n, h, w, [&](int64_t tap, int64_t, int64_t, int64_t pixel) {
          const vi chosen = load_bytes(indices + pixel + c, valid) == splat_int(static_cast<int32_t>(tap));
          sum += select(chosen, load_n(ct + pixel + c, valid), vf{});
        });
        store_n(dx + out + c, sum, valid);
      });
    }
  });
  return PK_OK;
}

bool accepts_max_pool2d_grad(const Call& call) { return accepts(call); }

Status run_max_pool2d_grad(const Call& call) {
  return with_elements(call.inputs[0].dtype,
                       [&](auto zero) { return max_pool2d_grad_of<decltype(zero)>(call); });
}

template <typename T>
Status avg_pool2d_of(const Call& call) {
  Pool p(call.inputs[0], call.outputs[0]);
  Attributes attributes(call);
  p.read(&attributes, false);
  const T* x = call.inputs[0].as<T>();
  T* y = call.outputs[0].as<T>();
  for_rows(call, p, p.out_height, p.out_width, [&](int64_t n, int64_t oh) {
    for (int64_t ow = 0; ow < p.out_width; ++ow) {
      const vf weight = splat(p.weight(oh, ow));
      const int64_t out = ((n * p.out_height + oh) * p.out_width + ow) * p.channels;
      for_vectors(0, p.channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        vf sum = {};
        p.for_taps(n, oh, ow, [&](int64_t, int64_t pixel) { sum += load_n(x + pixel + c, valid); });
        store_n(y + out + c, sum * weight, valid);
      });
    }
  });
  return PK_OK;
}

bool accepts_avg_pool2d(const Call& call) { return accepts(call); }

Status run_avg_pool2d(const Call& call) {
  return with_elements(call.inputs[0].dtype, [&](auto zero) { return avg_pool2d_of<decltype(zero)>(call); });
}

bool accepts_avg_pool2d_grad(const Call& call) { return accepts(call); }

Status run_avg_pool2d_grad(const Call& call) {
  Pool p(call.outputs[0], call.inputs[0]);
  Attributes attributes(call);
  int64_t size[2];
  attributes.tuple(size, 2);
  p.read(&attributes, false);
  const float* ct = call.inputs[0].as<float>();
  float* dx = call.outputs[0].as<float>();
  for_rows(call, p, p.height, p.width, [&](int64_t n, int64_t h) {
    for (int64_t w = 0; w < p.width; ++w) {
      float* to = dx + ((n * p.height + h) * p.width + w) * p.channels;
      zero_run(to, p.channels);
      p.for_windows(n, h, w, [&](int64_t, int64_t oh, int64_t ow, int64_t pixel) {
        const vf weight = splat(p.weight(oh, ow));
        for_vectors(0, p.channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
          store_n(to + c, fma(load_n(ct + pixel + c, valid), weight, load_n(to + c, valid)), valid);
        });
      });
    }
  });
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
