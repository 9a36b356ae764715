// Elementwise ops of two or three operands that broadcast like numpy: arithmetic, comparison, logic,
// selection. Arithmetic may write over the operand that has the output's shape: each element is read before
// it is written.
#include <cmath>
#include <type_traits>

#include "common.h"

namespace pockc::ref {
namespace {

template <typename In, typename Out, typename F>
void apply(const Call& call, F f) {
  const In* a = call.inputs[0].as<In>();
  const In* b = call.inputs[1].as<In>();
  Out* out = call.outputs[0].as<Out>();
  const Nest<3> nest = broadcast_nest<3>(call.outputs[0], {&call.inputs[0], &call.inputs[1]});
  const int64_t out_step = nest.step(0), a_step = nest.step(1), b_step = nest.step(2);
  nest.for_each_row([&](const int64_t (&at)[3], int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      out[at[0] + i * out_step] = f(a[at[1] + i * a_step], b[at[2] + i * b_step]);
    }
  });
}

bool broadcasts(const Call& call) {
  if (!has_operands(call, 2, 2, 1) || !no_attributes(call)) return false;
  return call.inputs[0].dtype == call.inputs[1].dtype &&
         is_broadcast_of(call.outputs[0], {&call.inputs[0], &call.inputs[1]});
}

Status check_float(const Call& call) { return verdict(broadcasts(call) && all_f32(call)); }

Status check_number(const Call& call) {
  if (!broadcasts(call) || call.outputs[0].dtype != call.inputs[0].dtype) return PK_BAD_FILE;
  const DType dtype = call.inputs[0].dtype;
  return verdict(dtype == DType::kF32 || dtype == DType::kI64 || dtype == DType::kI32);
}

Status check_comparison(const Call& call) {
  if (!broadcasts(call) || call.outputs[0].dtype != DType::kBool) return PK_BAD_FILE;
  return verdict(call.inputs[0].dtype != DType::kU8);
}

Status check_logic(const Call& call) {
  return verdict(broadcasts(call) && call.inputs[0].dtype == DType::kBool &&
                 call.outputs[0].dtype == DType::kBool);
}

// Integers wrap around: their arithmetic is done unsigned, where overflow is defined.
template <typename T, typename F>
T wrapping(T a, T b, F f) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(f(static_cast<Unsigned>(a), static_cast<Unsigned>(b)));
  } else {
    return f(a, b);
  }
}

template <typename F>
Status run_number(const Call& call, F f) {
  switch (call.inputs[0].dtype) {
    case DType::kF32:
      apply<float, float>(call, f);
      return PK_OK;
    case DType::kI64:
      apply<int64_t, int64_t>(call, f);
      return PK_OK;
    default:
      apply<int32_t, int32_t>(call, f);
      return PK_OK;
  }
}

template <typename F>
Status run_comparison(const Call& call, F f) {
  switch (call.inputs[0].dtype) {
    case DType::kF32:
      apply<float, uint8_t>(call, f);
      return PK_OK;
    case DType::kI64:
      apply<int64_t, uint8_t>(call, f);
      return PK_OK;
    case DType::kI32:
      apply<int32_t, uint8_t>(call, f);
      return PK_OK;
    default:
      apply<uint8_t, uint8_t>(call, f);
      return PK_OK;
  }
}

}  // namespace

#define POCKC_FLOAT(op, expression)                                         \
  Status check_##op(const Call& call) { return check_float(call); }         \
  Status run_##op(const Call& call) {                                       \
    apply<float, float>(call, [](float a, float b) { return expression; }); \
    return PK_OK;                                                           \
  }
POCKC_FLOAT(div, a / b)
POCKC_FLOAT(pow, std::pow(a, b))

#define POCKC_WRAPPING(op, expression)                                                                   \
  Status check_##op(const Call& call) { return check_number(call); }                                     \
  Status run_##op(const Call& call) {                                                                    \
    return run_number(                                                                                   \
        call, [](auto a, auto b) { return wrapping(a, b, [](auto a, auto b) { return expression; }); }); \
  }
POCKC_WRAPPING(add, a + b)
POCKC_WRAPPING(sub, a - b)
POCKC_WRAPPING(mul, a* b)

// `a != a` is true for NaN alone: a NaN in either operand wins, as in numpy and PyTorch.
#define POCKC_EXTREMUM(op, expression)                                          \
  Status check_##op(const Call& call) { return check_number(call); }            \
  Status run_##op(const Call& call) {                                           \
    return run_number(call, [](auto a, auto b) { return expression ? a : b; }); \
  }
POCKC_EXTREMUM(maximum, a > b || a != a)
POCKC_EXTREMUM(minimum, a < b || a != a)

#define POCKC_COMPARISON(op, expression)                                                          \
  Status check_##op(const Call& call) { return check_comparison(call); }                          \
  Status run_##op(const Call& call) {                                                             \
    return run_comparison(call, [](auto a, auto b) { return static_cast<uint8_t>(expression); }); \
  }
POCKC_COMPARISON(equal, a == b)
POCKC_COMPARISON(not_equal, a != b)
POCKC_COMPARISON(less, a < b)
POCKC_COMPARISON(less_equal, a <= b)
POCKC_COMPARISON(greater, a > b)
POCKC_COMPARISON(greater_equal, a >= b)

#define POCKC_LOGIC(op, expression)                                                                       \
  Status check_##op(const Call& call) { return check_logic(call); }                                       \
  Status run_##op(const Call& call) {                                                                     \
    apply<uint8_t, uint8_t>(call, [](uint8_t a, uint8_t b) { return static_cast<uint8_t>(expression); }); \
    return PK_OK;                                                                                         \
  }
POCKC_LOGIC(logical_and, a != 0 && b != 0)
POCKC_LOGIC(logical_or, a != 0 || b != 0)

// where(condition, a, b): a where the condition holds, else b; a and b of any one dtype.
Status check_where(const Call& call) {
  if (!has_operands(call, 3, 3, 1) || !no_attributes(call)) return PK_BAD_FILE;
  const Tensor &condition = call.inputs[0], &a = call.inputs[1], &b = call.inputs[2], &out = call.outputs[0];
  return verdict(condition.dtype == DType::kBool && a.dtype == b.dtype && a.dtype == out.dtype &&
                 is_broadcast_of(out, {&condition, &a, &b}));
}

Status run_where(const Call& call) {
  const Nest<4> nest =
      broadcast_nest<4>(call.outputs[0], {&call.inputs[0], &call.inputs[1], &call.inputs[2]});
  with_element(call.outputs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    const uint8_t* condition = call.inputs[0].as<uint8_t>();
    const T* a = call.inputs[1].as<T>();
    const T* b = call.inputs[2].as<T>();
    T* out = call.outputs[0].as<T>();
    nest.for_each_row([&](const int64_t (&at)[4], int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const bool first = condition[at[1] + i * nest.step(1)] != 0;
        out[at[0] + i * nest.step(0)] = first ? a[at[2] + i * nest.step(2)] : b[at[3] + i * nest.step(3)];
      }
    });
  });
  return PK_OK;
}

}  // namespace pockc::ref
