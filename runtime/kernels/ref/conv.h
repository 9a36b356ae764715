// The geometry that conv2d and its two gradients share.
//
// x [N, H, W, C], w [O, kh, kw, C / groups], y [N, Y, X, O]. Output channel o belongs to group o / (O /
// groups) and reads that group's C / groups input channels. Tap (r, s) of output (i, j) reads x at (i *
// stride - top + r * dilation, j * stride - left + s * dilation); outside of x there are zeros.
#ifndef POCKC_KERNELS_REF_CONV_H_
#define POCKC_KERNELS_REF_CONV_H_

#include "common.h"

namespace pockc::ref {

// How a window moves over an image: attributes stride, padding (top, bottom, left, right), dilation.
struct Window {
  int64_t kernel[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t before[2] = {0, 0};
  int64_t after[2] = {0, 0};
  int64_t dilation[2] = {1, 1};

  // The input position that tap `tap` of output `out` reads; outside [0, size) is padding.
  int64_t position(int axis, int64_t out, int64_t tap) const {
    return out * stride[axis] - before[axis] + tap * dilation[axis];
  }
  // Outputs along an axis of that length; 0 or less where the window does not fit.
  int64_t outputs(int axis, int64_t length) const {
    const int64_t room = length + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }
};

inline void read_kernel(Attributes& attributes, Window& window) {
  const Tuple kernel = attributes.tuple_of(2, 1, kMaxWindow);
  for (int i = 0; i < 2; ++i) window.kernel[i] = kernel[i];
}

inline void read_stride_and_padding(Attributes& attributes, Window& window) {
  const Tuple stride = attributes.tuple_of(2, 1, kMaxWindow);
  const Tuple padding = attributes.tuple_of(4, 0, kMaxWindow);
  for (int i = 0; i < 2; ++i) {
    window.stride[i] = stride[i];
    window.before[i] = padding[2 * i];
    window.after[i] = padding[2 * i + 1];
  }
}

inline void read_dilation(Attributes& attributes, Window& window) {
  const Tuple dilation = attributes.tuple_of(2, 1, kMaxWindow);
  for (int i = 0; i < 2; ++i) window.dilation[i] = dilation[i];
}

struct Conv {
  Window window;
  int64_t groups = 1;
  int64_t batch = 0, height = 0, width = 0, channels = 0;       // x
  int64_t out_height = 0, out_width = 0, out_channels = 0;      // y
  int64_t group_channels() const { return channels / groups; }  // of x
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t first_channel(int64_t out_channel) const {
    return out_channel / group_outputs() * group_channels();
  }
  bool depthwise() const { return groups == channels && groups == out_channels; }
};

// stride, padding, dilation, groups, in this order, as all three ops end.
inline void read_conv(Attributes& attributes, Conv& conv) {
  read_stride_and_padding(attributes, conv.window);
  read_dilation(attributes, conv.window);
  conv.groups = attributes.integer(1, kMaxElements);
}

inline void set_shapes(const Tensor& x, const Tensor& w, const Tensor& y, Conv& conv) {
  conv.window.kernel[0] = w.dims[1];
  conv.window.kernel[1] = w.dims[2];
  conv.batch = x.dims[0];
  conv.height = x.dims[1];
  conv.width = x.dims[2];
  conv.channels = x.dims[3];
  conv.out_height = y.dims[1];
  conv.out_width = y.dims[2];
  conv.out_channels = y.dims[3];
}

// Whether x, w and y (or their gradients, of the same shapes) belong together.
inline bool fits_conv(const Tensor& x, const Tensor& w, const Tensor& y, const Conv& conv) {
  if (w.dims[1] > kMaxWindow || w.dims[2] > kMaxWindow) return false;
  if (x.dims[3] % conv.groups != 0 || w.dims[0] % conv.groups != 0) return false;
  return w.dims[3] == x.dims[3] / conv.groups && y.dims[0] == x.dims[0] && y.dims[3] == w.dims[0] &&
         y.dims[1] == conv.window.outputs(0, x.dims[1]) && y.dims[2] == conv.window.outputs(1, x.dims[2]);
}

inline bool all_rank_4(const Tensor& x, const Tensor& w, const Tensor& y) {
  return x.rank == 4 && w.rank == 4 && y.rank == 4;
}

// Calls body(pixel of x, pixel of y, tap of w) wherever a window's tap lies inside x: the sums of all three
// ops. Pixels count [N, H, W] and [N, Y, X], taps [kh, kw].
template <typename Body>
void for_each_tap(const Conv& conv, int64_t image, int64_t i, int64_t j, Body&& body) {
  const Window& window = conv.window;
  const int64_t out_pixel = (image * conv.out_height + i) * conv.out_width + j;
  for (int64_t r = 0; r < window.kernel[0]; ++r) {
    const int64_t row = window.position(0, i, r);
    if (row < 0 || row >= conv.height) continue;
    for (int64_t s = 0; s < window.kernel[1]; ++s) {
      const int64_t column = window.position(1, j, s);
      if (column < 0 || column >= conv.width) continue;
      body((image * conv.height + row) * conv.width + column, out_pixel, r * window.kernel[1] + s);
    }
  }
}

// The same for every output pixel.
template <typename Body>
void for_each_tap(const Conv& conv, Body&& body) {
  for (int64_t image = 0; image < conv.batch; ++image) {
    for (int64_t i = 0; i < conv.out_height; ++i) {
      for (int64_t j = 0; j < conv.out_width; ++j) for_each_tap(conv, image, i, j, body);
    }
  }
}

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_CONV_H_
