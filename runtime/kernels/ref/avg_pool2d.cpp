// avg_pool2d(x; kernel, stride, padding, count_include_pad): the sum of a window over kh * kw, or over the
// number of pixels of x in it. avg_pool2d_grad(ct; size, kernel, stride, padding, count_include_pad).
#include "conv.h"

namespace pockc::ref {
namespace {

struct Pool {
  Conv conv;
  bool include_padding;
};

Pool read(Attributes& attributes, const Tensor& x, const Tensor& y) {
  Pool pool;
  Window window;
  read_kernel(attributes, window);
  read_stride_and_padding(attributes, window);
  pool.include_padding = attributes.boolean();
  Tensor w;
  w.dims[1] = window.kernel[0];
  w.dims[2] = window.kernel[1];
  pool.conv.window = window;
  set_shapes(x, w, y, pool.conv);
  return pool;
}

bool fits(const Pool& pool, const Tensor& x, const Tensor& y) {
  const Window& window = pool.conv.window;
  return x.rank == 4 && is_f32(x) && is_f32(y) &&
         has_shape(y, {x.dims[0], window.outputs(0, x.dims[1]), window.outputs(1, x.dims[2]), x.dims[3]});
}

// Pixels of x under the window of output `out`, along one axis.
int64_t covered(const Window& window, int axis, int64_t out, int64_t length) {
  int64_t count = 0;
  for (int64_t tap = 0; tap < window.kernel[axis]; ++tap) {
    const int64_t position = window.position(axis, out, tap);
    count += position >= 0 && position < length ? 1 : 0;
  }
  return count;
}

// 1 / (what the window's sum is divided by); 0 for a window that lies in the padding.
float weight_of(const Pool& pool, int64_t i, int64_t j) {
  const Window& window = pool.conv.window;
  if (pool.include_padding) return 1.0f / static_cast<float>(window.kernel[0] * window.kernel[1]);
  const int64_t count = covered(window, 0, i, pool.conv.height) * covered(window, 1, j, pool.conv.width);
  return count == 0 ? 0.0f : 1.0f / static_cast<float>(count);
}

// Calls body(pixel of x, pixel of y, weight) for every tap inside x.
template <typename Body>
void for_each_weighted_tap(const Pool& pool, Body&& body) {
  const Conv& conv = pool.conv;
  for (int64_t i = 0; i < conv.out_height; ++i) {
    for (int64_t j = 0; j < conv.out_width; ++j) {
      const float weight = weight_of(pool, i, j);
      for (int64_t image = 0; image < conv.batch; ++image) {
        for_each_tap(conv, image, i, j,
                     [&](int64_t x_pixel, int64_t y_pixel, int64_t) { body(x_pixel, y_pixel, weight); });
      }
    }
  }
}

}  // namespace

Status check_avg_pool2d(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Pool pool = read(attributes, call.inputs[0], call.outputs[0]);
  return verdict(attributes.valid() && fits(pool, call.inputs[0], call.outputs[0]));
}

Status run_avg_pool2d(const Call& call) {
  Attributes attributes(call);
  const Pool pool = read(attributes, call.inputs[0], call.outputs[0]);
  const int64_t channels = pool.conv.channels;
  const float* x = call.inputs[0].as<float>();
  float* y = call.outputs[0].as<float>();
  fill_zero(call.outputs[0]);
  for_each_weighted_tap(pool, [&](int64_t x_pixel, int64_t y_pixel, float weight) {
    add_scaled(weight, x + x_pixel * channels, y + y_pixel * channels, channels);
  });
  return PK_OK;
}

Status check_avg_pool2d_grad(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  const Tensor& x = call.outputs[0];
  Attributes attributes(call);
  const Tuple size = attributes.tuple_of(2, 1, kMaxElements);
  const Pool pool = read(attributes, x, call.inputs[0]);
  return verdict(attributes.valid() && fits(pool, x, call.inputs[0]) && x.dims[1] == size[0] &&
                 x.dims[2] == size[1]);
}

Status run_avg_pool2d_grad(const Call& call) {
  Attributes attributes(call);
  attributes.tuple(1, kMaxElements);
  const Pool pool = read(attributes, call.outputs[0], call.inputs[0]);
  const int64_t channels = pool.conv.channels;
  const float* ct = call.inputs[0].as<float>();
  float* x = call.outputs[0].as<float>();
  fill_zero(call.outputs[0]);
  for_each_weighted_tap(pool, [&](int64_t x_pixel, int64_t y_pixel, float weight) {
    add_scaled(weight, ct + y_pixel * channels, x + x_pixel * channels, channels);
  });
  return PK_OK;
}

}  // namespace pockc::ref
