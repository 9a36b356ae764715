// cast(x; dtype): f32, i64, i32 and bool to each other, and from u8; f32 to 16-bit numbers, and back. Floats
// truncate to integers; bool(x) is x != 0.
// A float that the integer cannot hold, and NaN, give its lowest value; integers wrap.
#include <limits>
#include <type_traits>

#include "common.h"

namespace pockc::ref {
namespace {

struct Bool {
  uint8_t value;
};

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, F16> || std::is_same_v<T, B16>;

template <typename To, typename From>
To convert(From x) {
  if constexpr (kIsHalf<From> && kIsHalf<To>) {
    return To{};  // refused by the check
  } else if constexpr (kIsHalf<From>) {
    return convert<To>(widened(x));
  } else if constexpr (kIsHalf<To>) {
    To half;
    narrow(convert<float>(x), &half);
    return half;
  } else if constexpr (std::is_same_v<From, Bool>) {
    return convert<To>(static_cast<int32_t>(x.value != 0));
  } else if constexpr (std::is_same_v<To, Bool>) {
    return Bool{static_cast<uint8_t>(x != 0)};
  } else if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    constexpr From kLowest = static_cast<From>(std::numeric_limits<To>::min());
    return x >= kLowest && x < -kLowest ? static_cast<To>(x) : std::numeric_limits<To>::min();
  } else {
    return static_cast<To>(x);
  }
}

template <typename F>
void with_number(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(0.0f);
    case DType::kI64:
      return f(int64_t{0});
    case DType::kI32:
      return f(int32_t{0});
    case DType::kU8:
      return f(uint8_t{0});
    case DType::kF16:
      return f(F16{0});
    case DType::kB16:
      return f(B16{0});
    default:
      return f(Bool{0});
  }
}

DType named(int64_t choice) {
  if (choice > kTypeBool) return choice == kTypeF16 ? DType::kF16 : DType::kB16;
  return static_cast<DType>(choice - kTypeF32);
}

}  // namespace

Status check_cast(const Call& call) {
  if (!has_operands(call, 1, 1, 1, kNoWeight, kHalves)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  Attributes attributes(call);
  const DType dtype = named(attributes.integer(kTypeF32, kTypeB16));
  if (is_half(x.dtype) ? !is_f32(out) : is_half(out.dtype) && !is_f32(x)) return PK_BAD_FILE;
  return verdict(attributes.valid() && out.dtype == dtype && same_shape(x, out) && out.dtype != DType::kU8);
}

Status run_cast(const Call& call) {
  const Tensor &x = call.inputs[0], &out = call.outputs[0];
  with_number(x.dtype, [&](auto from) {
    with_number(out.dtype, [&](auto to) {
      const auto* source = x.as<decltype(from)>();
      auto* target = out.as<decltype(to)>();
      const int64_t elements = out.elements();
      for (int64_t i = 0; i < elements; ++i) target[i] = convert<decltype(to)>(source[i]);
    });
  });
  return PK_OK;
}

}  // namespace pockc::ref
