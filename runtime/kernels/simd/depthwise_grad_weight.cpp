// Weight gradient of a depthwise convolution: dw[tap, c] = sum over images, rows and columns of x * ct.
//
// Summation order (fixed; rounding grows like the longest of the three levels): one chain of fma along an
// output row; rows added in order within a unit; units, kUnits equal parts of all rows, added in order. A
// unit runs on one thread and has its own [tap][channel] sums in the workspace; a row's sums for one vector
// of channels stay in registers.
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// Rows of taps whose sums are in registers together: enough chains to hide the latency of fma.
#if defined(__AVX512F__) || defined(__aarch64__)
template <int Taps>
constexpr int kRowsAtOnce = Taps;
#else
template <int Taps>
constexpr int kRowsAtOnce = Taps <= 3 ? 3 : 2;
#endif

template <typename T>
struct RowPair {
  const T* ct;
  const T* x[kMaxTaps];  // input row of each tap row, null where it lies outside
  float* sums;           // [tap][channel]
};

// sums[(r0 .. r0 + Rows) x taps] += chain over the columns of one row.
template <int Rows, int Taps, typename T>
POCKC_INLINE void add_row(const Convolution& conv, const RowPair<T>& pair, int64_t r0) {
  const int64_t channels = conv.channels, stride = conv.stride[1], dilation = conv.dilation[1];
  // Columns whose taps are all inside; the others test each tap.
  const int64_t low = minimum(conv.out_width, divide_up(maximum<int64_t>(conv.padding[2], 0), stride));
  const int64_t reach = conv.width - 1 + conv.padding[2] - (Taps - 1) * dilation;
  const int64_t high = reach < 0 ? low : maximum(low, minimum(conv.out_width, reach / stride + 1));
  for_vectors(0, channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
    vf sum[Rows][Taps];
    POCKC_UNROLL
    for (int r = 0; r < Rows; ++r) {
      POCKC_UNROLL
      for (int s = 0; s < Taps; ++s) sum[r][s] = vf{};
    }
    const auto border = [&](int64_t begin, int64_t end) POCKC_LAMBDA {
      for (int64_t ow = begin; ow < end; ++ow) {
        const vf ct = load_n(pair.ct + ow * channels + c, valid);
        POCKC_UNROLL
        for (int s = 0; s < Taps; ++s) {
          const int64_t w = ow * stride - conv.padding[2] + s * dilation;
          if (w < 0 || w >= conv.width) continue;
          POCKC_UNROLL
          for (int r = 0; r < Rows; ++r) {
            sum[r][s] = fma(load_n(pair.x[r0 + r] + w * channels + c, valid), ct, sum[r][s]);
          }
        }
      }
    };
    border(0, low);
    for (int64_t ow = low; ow < high; ++ow) {
      const vf ct = load_n(pair.ct + ow * channels + c, valid);
      const int64_t at = (ow * stride - conv.padding[2]) * channels + c;
      POCKC_UNROLL
      for (int r = 0; r < Rows; ++r) {
        POCKC_UNROLL
        for (int s = 0; s < Taps; ++s) {
          sum[r][s] = fma(load_n(pair.x[r0 + r] + at + s * dilation * channels, valid), ct, sum[r][s]);
        }
      }
    }
    border(high, conv.out_width);
    POCKC_UNROLL
    for (int r = 0; r < Rows; ++r) {
      POCKC_UNROLL
      for (int s = 0; s < Taps; ++s) {
        float* to = pair.sums + ((r0 + r) * Taps + s) * channels + c;
        store_n(to, load_n(to, valid) + sum[r][s], valid);
      }
    }
  });
}

template <int Taps, typename T>
void add_rows(const Convolution& conv, const RowPair<T>& pair) {
  constexpr int kRows = kRowsAtOnce<Taps>;
  for (int64_t r = 0; r < conv.kernel_h;) {
    bool together = r + kRows <= conv.kernel_h;
    for (int i = 0; together && i < kRows; ++i) together = pair.x[r + i] != nullptr;
    if (together) {
      add_row<kRows, Taps>(conv, pair, r);
      r += kRows;
      continue;
    }
    if (pair.x[r] != nullptr) add_row<1, Taps>(conv, pair, r);
    ++r;
  }
}

// Any kernel width: one tap at a time.
template <typename T>
void add_taps(const Convolution& conv, const RowPair<T>& pair) {
  const int64_t channels = conv.channels;
  for (int64_t r = 0; r < conv.kernel_h; ++r) {
    if (pair.x[r] == nullptr) continue;
    for (int64_t s = 0; s < conv.kernel_w; ++s) {
      float* sums = pair.sums + (r * conv.kernel_w + s) * channels;
      for_vectors(0, channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
        vf sum = {};
        for (int64_t ow = 0; ow < conv.out_width; ++ow) {
          const int64_t w = ow * conv.stride[1] - conv.padding[2] + s * conv.dilation[1];
          if (w < 0 || w >= conv.width) continue;
          const vf ct = load_n(pair.ct + ow * channels + c, valid);
          sum = fma(load_n(pair.x[r] + w * channels + c, valid), ct, sum);
        }
        store_n(sums + c, load_n(sums + c, valid) + sum, valid);
      });
    }
  }
}

template <typename T>
void add_unit(const Call& call, const Convolution& conv, int64_t begin, int64_t end, float* sums) {
  zero_run(sums, conv.taps() * conv.channels);
  RowPair<T> pair;
  pair.sums = sums;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / conv.out_height;
    const int64_t top = (i - n * conv.out_height) * conv.stride[0] - conv.padding[0];
    pair.ct = call.inputs[1].as<T>() + i * conv.out_width * conv.channels;
    for (int64_t r = 0; r < conv.kernel_h; ++r) {
      const int64_t y = top + r * conv.dilation[0];
      const T* x = call.inputs[0].as<T>() + (n * conv.height + y) * conv.width * conv.channels;
      pair.x[r] = y < 0 || y >= conv.height ? nullptr : x;
    }
    if (conv.kernel_w == 3) {
      add_rows<3>(conv, pair);
    } else if (conv.kernel_w == 5) {
      add_rows<5>(conv, pair);
    } else {
      add_taps(conv, pair);
    }
  }
}

}  // namespace

void depthwise_grad_weight(const Call& call, const Convolution& conv) {
  const int64_t size = depthwise_floats(conv);
  const int64_t rows = conv.batch * conv.out_height;
  float* sums = workspace(call);
  parallel(call, kDepthwiseUnits, 1, [&](int64_t begin, int64_t end, int) {
    with_elements(call.inputs[0].dtype, [&](auto zero) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = rows * u / kDepthwiseUnits, stop = rows * (u + 1) / kDepthwiseUnits;
        add_unit<decltype(zero)>(call, conv, first, stop, sums + u * size);
      }
    });
  });
  float* dw = call.outputs[0].as<float>();
  for (int64_t channel = 0; channel < conv.channels; ++channel) {
    for (int64_t tap = 0; tap < conv.taps(); ++tap) {
      const float* from = sums + tap * conv.channels + channel;
      float total = from[0];
      for (int64_t u = 1; u < kDepthwiseUnits; ++u) total += from[u * size];
      dw[channel * conv.taps() + tap] = total;
    }
  }
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
