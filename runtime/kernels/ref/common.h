// What the reference kernels share: reading attributes, checking operands, walking broadcast operands.
//
// Reference kernels are plain loops that allocate nothing and need no workspace. A `check_` refuses every
// call whose operands or attributes differ from what the op table says, so that `run_` can index without
// looking; only values inside tensors (ids, labels, index lists) are looked at while running.
#ifndef POCKC_KERNELS_REF_COMMON_H_
#define POCKC_KERNELS_REF_COMMON_H_

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "compact.h"
#include "half.h"
#include "pockc/kernel.h"

namespace pockc::ref {

// Every kernel is declared here, so that a definition that differs from the list does not compile or link.
// Checks run when a session is made, those of all ops in use, and never again: being cold, they lie side by
// side, and do not bring the pages of kernels that nobody runs into memory.
#define POCKC_REF(op)                                   \
  __attribute__((cold)) Status check_##op(const Call&); \
  Status run_##op(const Call&);
#include "../kernels.inc"

// Bounds that keep every product and sum of sizes inside int64.
constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr int64_t kMaxWindow = int64_t{1} << 20;  // strides, paddings, dilations and kernel sizes
constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();
constexpr int64_t kMinInt = std::numeric_limits<int64_t>::min();

// String attributes: their index in the compiler's list of values.
enum Choice : int64_t {
  kNone = 0,
  kClip,
  kGelu,
  kGeluTanh,
  kSilu,
  kHardswish,
  kConstant,
  kLinear,
  kCosine,
  kStep,
  kTypeF32,
  kTypeI64,
  kTypeI32,
  kTypeU8,
  kTypeBool,
  kTypeF16,
  kTypeB16,
};

constexpr int kNoWeight = -1;
constexpr bool kHalves = true;

inline Status verdict(bool fits) { return fits ? PK_OK : PK_BAD_FILE; }

struct Tuple {
  int size = 0;
  int64_t values[kMaxRank] = {};
  int64_t operator[](int i) const { return values[i]; }
};

// Reads a call's attributes one after the other, in the canonical order of the op table. Anything missing or
// out of its range makes the cursor invalid and reads as the low bound, so that callers ask `valid()` once,
// at the end.
class Attributes {
 public:
  explicit Attributes(const Call& call) : call_(call) {}

  int64_t integer(int64_t low = kMinInt, int64_t high = kMaxInt) {
    if (next_int_ >= call_.int_count) return fail(low);
    const int64_t value = call_.ints[next_int_++];
    return value < low || value > high ? fail(low) : value;
  }
  bool boolean() { return integer(0, 1) != 0; }
  int axis(const Tensor& tensor) { return static_cast<int>(integer(0, tensor.rank - 1)); }
  double number() {
    if (next_float_ < call_.float_count) return call_.floats[next_float_++];
    valid_ = false;
    return 0.0;
  }
  float number_f32() { return static_cast<float>(number()); }
  // A tuple of any length up to the largest rank.
  Tuple tuple(int64_t low, int64_t high) {
    Tuple result;
    result.size = static_cast<int>(integer(0, kMaxRank));
    for (int i = 0; i < result.size; ++i) result.values[i] = integer(low, high);
    return result;
  }
  Tuple tuple_of(int size, int64_t low, int64_t high) {
    Tuple result = tuple(low, high);
    if (result.size != size) valid_ = false;
    return result;
  }
  // Whether all reads were in range and nothing is left over.
  bool valid() const { return valid_ && next_int_ == call_.int_count && next_float_ == call_.float_count; }

 private:
  int64_t fail(int64_t value) {
    valid_ = false;
    return value;
  }

  const Call& call_;
  int32_t next_int_ = 0;
  int32_t next_float_ = 0;
  bool valid_ = true;
};

inline bool no_attributes(const Call& call) { return Attributes(call).valid(); }

inline bool well_formed(const Tensor& tensor, bool may_be_compact = false, bool may_be_half = false) {
  const bool compact = may_be_compact && is_compact(tensor.dtype) && tensor.rank >= 2;
  const bool half = may_be_half && is_half(tensor.dtype);
  if (tensor.dtype > DType::kBool && !compact && !half) return false;
  if (tensor.rank < 0 || tensor.rank > kMaxRank) return false;
  int64_t elements = 1;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.dims[i] < 1 || tensor.dims[i] > kMaxElements / elements) return false;
    elements *= tensor.dims[i];
  }
  return true;
}

// Operand counts, and tensors whose shape alone makes sense. The first condition of every check. Only the
// input `weight` may be compact: no other kernel could tell how many bytes such a tensor has. `halves` is for
// kernels that convert 16-bit numbers, or move them without looking.
inline bool has_operands(const Call& call, int least_inputs, int most_inputs, int outputs, int weight = -1,
                         bool halves = false) {
  if (call.input_count < least_inputs || call.input_count > most_inputs || call.output_count != outputs)
    return false;
  for (int i = 0; i < call.input_count; ++i) {
    if (!well_formed(call.inputs[i], i == weight, halves)) return false;
  }
  for (int i = 0; i < call.output_count; ++i) {
    if (!well_formed(call.outputs[i], false, halves)) return false;
  }
  return true;
}

inline bool is_f32(const Tensor& tensor) { return tensor.dtype == DType::kF32; }

// Floats, or compact frozen weights.
inline bool is_weight(const Tensor& tensor) { return is_f32(tensor) || is_compact(tensor.dtype); }

inline bool all_f32(const Call& call, int weight = -1) {
  for (int i = 0; i < call.input_count; ++i) {
    if (i == weight ? !is_weight(call.inputs[i]) : !is_f32(call.inputs[i])) return false;
  }
  for (int i = 0; i < call.output_count; ++i) {
    if (!is_f32(call.outputs[i])) return false;
  }
  return true;
}

inline bool is_scalar(const Tensor& tensor, DType dtype) { return tensor.dtype == dtype && tensor.rank == 0; }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.dims[i] != b.dims[i]) return false;
  }
  return true;
}

inline bool same_type(const Tensor& a, const Tensor& b) { return a.dtype == b.dtype && same_shape(a, b); }

// Equal shapes but for one axis, which may have any length in both.
inline bool same_shape_except(const Tensor& a, const Tensor& b, int axis) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (i != axis && a.dims[i] != b.dims[i]) return false;
  }
  return true;
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> dims) {
  if (tensor.rank != static_cast<int>(dims.size())) return false;
  int axis = 0;
  for (int64_t dim : dims) {
    if (tensor.dims[axis++] != dim) return false;
  }
  return true;
}

inline bool has_shape(const Tensor& tensor, const Tuple& dims) {
  if (tensor.rank != dims.size) return false;
  for (int i = 0; i < dims.size; ++i) {
    if (tensor.dims[i] != dims[i]) return false;
  }
  return true;
}

inline int64_t last_dim(const Tensor& tensor) { return tensor.dims[tensor.rank - 1]; }

inline size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kB16:
      return 2;
    default:
      return 1;
  }
}

inline size_t byte_count(const Tensor& tensor) {
  return static_cast<size_t>(tensor.elements()) * element_size(tensor.dtype);
}

// Calls f with a zero of an unsigned type as wide as an element: for ops that only move data.
template <typename F>
void with_element(DType dtype, F&& f) {
  switch (element_size(dtype)) {
    case 8:
      return f(uint64_t{0});
    case 4:
      return f(uint32_t{0});
    case 2:
      return f(uint16_t{0});
    default:
      return f(uint8_t{0});
  }
}

// A tensor seen as [outer, length, inner] around one axis.
struct AxisView {
  int64_t outer = 1;
  int64_t length = 1;
  int64_t inner = 1;
};

inline AxisView around_axis(const Tensor& tensor, int axis) {
  AxisView view;
  for (int i = 0; i < tensor.rank; ++i) {
    int64_t& part = i < axis ? view.outer : i == axis ? view.length : view.inner;
    part *= tensor.dims[i];
  }
  return view;
}

inline bool broadcasts_to(const Tensor& from, const Tensor& to) {
  if (from.rank > to.rank) return false;
  for (int i = 1; i <= from.rank; ++i) {
    const int64_t dim = from.dims[from.rank - i];
    if (dim != 1 && dim != to.dims[to.rank - i]) return false;
  }
  return true;
}

// Whether `out` has exactly the shape that numpy's broadcasting of the others gives.
inline bool is_broadcast_of(const Tensor& out, std::initializer_list<const Tensor*> operands) {
  Tensor shape;
  for (const Tensor* operand : operands) {
    if (!broadcasts_to(*operand, out)) return false;
    if (operand->rank > shape.rank) shape.rank = operand->rank;
  }
  if (shape.rank != out.rank) return false;
  for (int i = 1; i <= out.rank; ++i) {
    int64_t longest = 1;
    for (const Tensor* operand : operands) {
      if (i <= operand->rank && operand->dims[operand->rank - i] > longest)
        longest = operand->dims[operand->rank - i];
    }
    if (longest != out.dims[out.rank - i]) return false;
  }
  return true;
}

// Strides in elements of a row-major tensor.
inline void dense_strides(const Tensor& tensor, int64_t (&strides)[kMaxRank]) {
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= tensor.dims[i];
  }
}

// Strides of `tensor` seen with the shape of `to`: 0 along the axes on which it is repeated.
inline void broadcast_strides(const Tensor& tensor, const Tensor& to, int64_t (&strides)[kMaxRank]) {
  int64_t stride = 1;
  for (int i = 1; i <= to.rank; ++i) {
    const int64_t dim = i <= tensor.rank ? tensor.dims[tensor.rank - i] : 1;
    strides[to.rank - i] = dim == 1 ? 0 : stride;
    stride *= dim;
  }
}

// A loop nest that walks N tensors together. Axes are appended from the outermost to the innermost; axes of
// length 1 vanish and neighbours that are contiguous in all tensors merge, so that the innermost loop is as
// long as it can be.
template <int N>
struct Nest {
  int rank = 0;
  int64_t dims[kMaxRank] = {};
  int64_t strides[kMaxRank][N] = {};

  void append(int64_t dim, const int64_t (&steps)[N]) {
    if (dim == 1) return;
    bool merges = rank > 0;
    for (int t = 0; t < N && merges; ++t) merges = strides[rank - 1][t] == steps[t] * dim;
    if (merges) {
      dims[rank - 1] *= dim;
    } else {
      dims[rank++] = dim;
    }
    for (int t = 0; t < N; ++t) strides[rank - 1][t] = steps[t];
  }

  // Distance between the elements of a row.
  int64_t step(int tensor) const { return rank > 0 ? strides[rank - 1][tensor] : 0; }

  // Calls body(offsets, count) for each row along the innermost axis, in row-major order.
  template <typename Body>
  void for_each_row(Body&& body) const {
    const int64_t count = rank > 0 ? dims[rank - 1] : 1;
    int64_t index[kMaxRank] = {};
    int64_t offsets[N] = {};
    for (;;) {
      body(offsets, count);
      int axis = rank - 2;
      for (; axis >= 0 && index[axis] + 1 == dims[axis]; --axis) {
        for (int t = 0; t < N; ++t) offsets[t] -= strides[axis][t] * index[axis];
        index[axis] = 0;
      }
      if (axis < 0) return;
      ++index[axis];
      for (int t = 0; t < N; ++t) offsets[t] += strides[axis][t];
    }
  }
};

// The nest over `out` and operands that broadcast to its shape; tensor 0 is `out`.
template <int N>
Nest<N> broadcast_nest(const Tensor& out, const Tensor* const (&operands)[N - 1]) {
  int64_t strides[N][kMaxRank] = {};
  dense_strides(out, strides[0]);
  for (int t = 1; t < N; ++t) broadcast_strides(*operands[t - 1], out, strides[t]);
  Nest<N> nest;
  for (int axis = 0; axis < out.rank; ++axis) {
    int64_t steps[N];
    for (int t = 0; t < N; ++t) steps[t] = strides[t][axis];
    nest.append(out.dims[axis], steps);
  }
  return nest;
}

// Sum of products, in 16 lanes that a fixed tree combines: fast where the compiler vectorises, and the same
// order of additions everywhere.
inline float dot(const float* a, const float* b, int64_t count) {
  constexpr int kLanes = 16;
  float tail = 0.0f;
  const int64_t whole = count - count % kLanes;
  for (int64_t i = whole; i < count; ++i) tail += a[i] * b[i];
  if (whole == 0) return tail;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0] + tail;
}

// y += factor * x. The buffers do not overlap.
inline void add_scaled(float factor, const float* __restrict x, float* __restrict y, int64_t count) {
  constexpr int kLanes = 16;
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) y[i + lane] += factor * x[i + lane];
  }
  for (int64_t i = whole; i < count; ++i) y[i] += factor * x[i];
}

// Calls body(values, begin, count) along elements [first, first + length) of a row of compact weights,
// decoded a piece at a time: `begin` counts from `first`.
template <typename Body>
void for_decoded(const CompactRows& rows, int64_t row, int64_t first, int64_t length, Body&& body) {
  constexpr int64_t kPiece = 256;
  float values[kPiece];
  for (int64_t begin = 0; begin < length; begin += kPiece) {
    const int64_t count = length - begin < kPiece ? length - begin : kPiece;
    decode(rows, row, first + begin, count, values);
    body(values, begin, count);
  }
}

// Refuses ids (`what`: "id", "index") outside [0, limit).
template <typename T>
Status require_range(const Tensor& ids, int64_t limit, const char* what) {
  const T* values = ids.as<T>();
  const int64_t count = ids.elements();
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= 0 && values[i] < limit) continue;
    return fail(PK_INVALID_ARGUMENT, "%s %lld at position %lld is outside [0, %lld)", what,
                static_cast<long long>(values[i]), static_cast<long long>(i), static_cast<long long>(limit));
  }
  return PK_OK;
}

inline void fill_zero(const Tensor& tensor) { std::memset(tensor.data, 0, byte_count(tensor)); }

}  // namespace pockc::ref

#endif  // POCKC_KERNELS_REF_COMMON_H_
