// max_pool2d(x; kernel, stride, padding, dilation) -> (y, indices u8): the maximum, the first of equals, and
// its row-major position in the window. Padding never wins. max_pool2d_grad(ct, indices; size, kernel,
// stride, padding, dilation): sends ct back to where the maximum was.
#include "conv.h"

namespace pockc::ref {
namespace {

constexpr int64_t kMaxTaps = 255;

void read_window(Attributes& attributes, Window& window) {
  read_kernel(attributes, window);
  read_stride_and_padding(attributes, window);
  read_dilation(attributes, window);
}

// A pool is a convolution without weights, as far as geometry goes.
Conv geometry(const Window& window, const Tensor& x, const Tensor& y) {
  Conv conv;
  Tensor w;
  w.dims[1] = window.kernel[0];
  w.dims[2] = window.kernel[1];
  conv.window = window;
  set_shapes(x, w, y, conv);
  return conv;
}

bool fits(const Window& window, const Tensor& x, const Tensor& y, const Tensor& indices) {
  if (x.rank != 4 || !is_f32(x) || !is_f32(y) || indices.dtype != DType::kU8) return false;
  return window.kernel[0] * window.kernel[1] <= kMaxTaps && same_shape(y, indices) &&
         has_shape(y, {x.dims[0], window.outputs(0, x.dims[1]), window.outputs(1, x.dims[2]), x.dims[3]});
}

}  // namespace

Status check_max_pool2d(const Call& call) {
  if (!has_operands(call, 1, 1, 2)) return PK_BAD_FILE;
  Attributes attributes(call);
  Window window;
  read_window(attributes, window);
  return verdict(attributes.valid() && fits(window, call.inputs[0], call.outputs[0], call.outputs[1]));
}

Status run_max_pool2d(const Call& call) {
  Attributes attributes(call);
  Window window;
  read_window(attributes, window);
  const Conv conv = geometry(window, call.inputs[0], call.outputs[0]);
  const float* x = call.inputs[0].as<float>();
  float* y = call.outputs[0].as<float>();
  uint8_t* indices = call.outputs[1].as<uint8_t>();
  const int64_t elements = call.outputs[0].elements();
  for (int64_t i = 0; i < elements; ++i) {
    y[i] = -std::numeric_limits<float>::infinity();
    indices[i] = 0;
  }
  // The first tap inside x is taken even where it is -inf; NaN wins over everything, as in PyTorch.
  int64_t started = -1;
  for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
    const bool first = y_pixel != started;
    started = y_pixel;
    for (int64_t c = 0; c < conv.channels; ++c) {
      const float value = x[x_pixel * conv.channels + c];
      const int64_t at = y_pixel * conv.channels + c;
      if (!first && !(value > y[at]) && value == value) continue;
      y[at] = value;
      indices[at] = static_cast<uint8_t>(tap);
    }
  });
  return PK_OK;
}

Status check_max_pool2d_grad(const Call& call) {
  if (!has_operands(call, 2, 2, 1)) return PK_BAD_FILE;
  const Tensor& x = call.outputs[0];
  Attributes attributes(call);
  const Tuple size = attributes.tuple_of(2, 1, kMaxElements);
  Window window;
  read_window(attributes, window);
  return verdict(attributes.valid() && fits(window, x, call.inputs[0], call.inputs[1]) &&
                 x.dims[1] == size[0] && x.dims[2] == size[1]);
}

// Only the tap that the index names receives anything; an index that names no tap inside x is lost, never
// followed.
Status run_max_pool2d_grad(const Call& call) {
  Attributes attributes(call);
  attributes.tuple(1, kMaxElements);
  Window window;
  read_window(attributes, window);
  const Conv conv = geometry(window, call.outputs[0], call.inputs[0]);
  const float* ct = call.inputs[0].as<float>();
  const uint8_t* indices = call.inputs[1].as<uint8_t>();
  float* x = call.outputs[0].as<float>();
  fill_zero(call.outputs[0]);
  for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
    for (int64_t c = 0; c < conv.channels; ++c) {
      const int64_t at = y_pixel * conv.channels + c;
      if (indices[at] == tap) x[x_pixel * conv.channels + c] += ct[at];
    }
  });
  return PK_OK;
}

}  // namespace pockc::ref
