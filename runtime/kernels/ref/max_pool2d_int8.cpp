// max_pool2d_int8(x u8; kernel, stride, padding, dilation): the largest code of each window. Padding is no
// code, and a window without any gives 0.
#include "conv.h"
#include "quantized.h"

namespace pockc::ref {
namespace {

constexpr int64_t kMostTaps = 255;  // as of max_pool2d

Conv read(const Call& call, Attributes& attributes) {
  Conv conv;
  read_kernel(attributes, conv.window);
  read_stride_and_padding(attributes, conv.window);
  read_dilation(attributes, conv.window);
  Tensor w;
  w.dims[1] = conv.window.kernel[0];
  w.dims[2] = conv.window.kernel[1];
  set_shapes(call.inputs[0], w, call.outputs[0], conv);
  return conv;
}

}  // namespace

Status check_max_pool2d_int8(const Call& call) {
  if (!has_operands(call, 1, 1, 1)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &y = call.outputs[0];
  if (!is_codes(x) || !is_codes(y) || x.rank != 4 || y.rank != 4) return PK_BAD_FILE;
  Attributes attributes(call);
  const Conv conv = read(call, attributes);
  const Window& window = conv.window;
  if (window.kernel[0] * window.kernel[1] > kMostTaps) return PK_BAD_FILE;
  return verdict(attributes.valid() && has_shape(y, {x.dims[0], window.outputs(0, x.dims[1]),
                                                     window.outputs(1, x.dims[2]), x.dims[3]}));
}

Status run_max_pool2d_int8(const Call& call) {
  Attributes attributes(call);
  const Conv conv = read(call, attributes);
  const uint8_t* x = call.inputs[0].as<uint8_t>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  fill_zero(call.outputs[0]);
  for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t) {
    for (int64_t c = 0; c < conv.channels; ++c) {
      const uint8_t code = x[x_pixel * conv.channels + c];
      uint8_t& most = y[y_pixel * conv.channels + c];
      most = code > most ? code : most;
    }
  });
  return PK_OK;
}

}  // namespace pockc::ref
