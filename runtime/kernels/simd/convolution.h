// The geometry of a convolution and of its gradients, and the two families of kernels that compute it.
#ifndef POCKC_SIMD_CONVOLUTION_H_
#define POCKC_SIMD_CONVOLUTION_H_

#include "simd/attributes.h"
#include "simd/gemm.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {

struct Convolution {
  int64_t batch = 0, height = 0, width = 0, channels = 0;   // x
  int64_t out_height = 0, out_width = 0, out_channels = 0;  // y or its cotangent
  int64_t kernel_h = 0, kernel_w = 0;
  int64_t stride[2], padding[4], dilation[2], groups = 1;

  int64_t group_in() const { return channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t taps() const { return kernel_h * kernel_w; }
  bool depthwise() const { return groups > 1 && groups == channels && groups == out_channels; }
  // A plain matrix product over pixels.
  bool pointwise() const {
    return taps() == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0 &&
           padding[2] == 0 && padding[3] == 0;
  }
  void read_attributes(Attributes* attributes) {
    attributes->tuple(stride, 2);
    attributes->tuple(padding, 4);
    attributes->tuple(dilation, 2);
    groups = attributes->integer();
  }
  void set_x(const Tensor& t) {
    batch = t.dims[0], height = t.dims[1], width = t.dims[2], channels = t.dims[3];
  }
  void set_y(const Tensor& t) {
    batch = t.dims[0], out_height = t.dims[1], out_width = t.dims[2], out_channels = t.dims[3];
  }
  void set_kernel(const Tensor& w) { kernel_h = w.dims[1], kernel_w = w.dims[2]; }

  // The patches that the outputs of one group read from x.
  Patches patches(const Tensor& x, int64_t group) const {
    Patches p;
    p.dtype = x.dtype;
    p.image = element(x, group * group_in());
    p.end = element(x, batch * height * width * channels);
    p.height = height, p.width = width, p.pitch = channels, p.channels = group_in();
    p.grid_height = out_height, p.grid_width = out_width;
    p.step_h = stride[0], p.step_w = stride[1];
    p.taps_h = static_cast<int>(kernel_h), p.taps_w = static_cast<int>(kernel_w);
    for (int64_t r = 0; r < kernel_h; ++r) p.tap_h[r] = r * dilation[0] - padding[0];
    for (int64_t s = 0; s < kernel_w; ++s) p.tap_w[s] = s * dilation[1] - padding[2];
    p.finish();
    return p;
  }
};

inline bool depthwise_dtypes_fit(const Call& call) {
  const DType dtype = call.inputs[0].dtype;
  if (is_half(call.inputs[1].dtype)) return call.inputs[1].dtype == dtype && is_f32(call.outputs[0]);
  return call.outputs[0].dtype == dtype;
}

// `left` is the dtype of the product's left operand. The set of 16-bit products leaves depthwise convolutions
// to the others.
inline bool convolution_fits(const Call& call, const Convolution& c, DType left) {
  if (!is_multiplied(left) || (kHalfProducts && c.depthwise())) return false;
  if (c.depthwise() && !depthwise_dtypes_fit(call)) return false;
  for (int i = 0; i < call.input_count; ++i) {
    if (elements(call.inputs[i]) == 0) return false;
  }
  return elements(call.outputs[0]) > 0 && c.kernel_h <= kMaxTaps && c.kernel_w <= kMaxTaps;
}

// The weight as the right matrix of one group's product: from its row `first` on, `stride` floats each where
// plain.
inline void set_weight(const Tensor& w, int64_t first, int64_t stride, RightMatrix* b) {
  b->stride = stride;
  if (!is_compact(w.dtype)) {
    b->data = w.as<float>() + first * stride;
    return;
  }
  b->compact = compact_rows(w);
  b->compact.data += first * b->compact.stride;
}

// Depthwise kernels (depthwise.cpp, depthwise_grad_weight.cpp). Workspace, shared by all threads:
// depthwise_floats(c); for the weight gradient kDepthwiseUnits times that.
constexpr int64_t kDepthwiseUnits = 4;
int64_t depthwise_floats(const Convolution& c);
void depthwise_forward(const Call& call, const Convolution& c, const Epilogue& epilogue);
void depthwise_grad_input(const Call& call, const Convolution& c, const Gate* gate);
void depthwise_grad_weight(const Call& call, const Convolution& c);

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc

#endif  // POCKC_SIMD_CONVOLUTION_H_
