// Structs and strided tensors of compactattn.h, filled in by type. Part of compactattn.hpp.
#pragma once

#include <compactattn.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

namespace compactattn {

// A versioned struct of compactattn.h, zeroed, with its struct_size filled in.
template <class C>
struct Sized : C {
  Sized() noexcept : C{} { this->struct_size = sizeof(C); }
};

using PlanDesc = Sized<compactattn_plan_desc>;
using Batch = Sized<compactattn_batch>;
using Selection = Sized<compactattn_selection>;
using Table = Sized<compactattn_table>;
using Padded = Sized<compactattn_padded>;
using Csr = Sized<compactattn_csr>;
using ForwardArgs = Sized<compactattn_forward_args>;
using AttendArgs = Sized<compactattn_attend_args>;
using CombineArgs = Sized<compactattn_combine_args>;
using Sizes = Sized<compactattn_sizes>;

// What a layer's forward calls have selected so far.
struct Stats : Sized<compactattn_stats> {
  // Share of past blocks that sparse lists selected; 1 where there were none.
  [[nodiscard]] double density() const noexcept {
    return candidates > 0 ? static_cast<double>(selected) / static_cast<double>(candidates) : 1.0;
  }
};

// Elements of two bytes. Any other type of that layout serves as well, once dtype_of knows it.
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// The compactattn_dtype of an element type. Specialise it for an engine's own bf16 or f16.
template <class T>
struct dtype_of;
template <>
struct dtype_of<Bf16> : std::integral_constant<std::int32_t, COMPACTATTN_DTYPE_BF16> {};
template <>
struct dtype_of<F16> : std::integral_constant<std::int32_t, COMPACTATTN_DTYPE_F16> {};
template <>
struct dtype_of<float> : std::integral_constant<std::int32_t, COMPACTATTN_DTYPE_F32> {};
template <>
struct dtype_of<std::int32_t> : std::integral_constant<std::int32_t, COMPACTATTN_DTYPE_I32> {};
template <>
struct dtype_of<std::uint32_t> : std::integral_constant<std::int32_t, COMPACTATTN_DTYPE_U32> {};

using Extents = std::initializer_list<std::int64_t>;

// A view of `data` with `shape` and `stride` (elements); without strides it is contiguous, last
// dimension fastest.
//
// The library reads inputs only, so a pointer to const is fine for them; never pass one as an
// output. Shape and stride of different lengths, or of more than 4 dimensions, make a tensor that
// every call refuses with E_SHAPE.
template <class T>
[[nodiscard]] compactattn_tensor tensor(T* data, Extents shape, Extents stride = {}) noexcept {
  using Element = std::remove_const_t<T>;
  compactattn_tensor out{};
  out.data = const_cast<Element*>(data);
  out.dtype = dtype_of<Element>::value;
  const bool fits = shape.size() <= 4 && (stride.size() == 0 || stride.size() == shape.size());
  out.ndim = fits ? static_cast<std::int32_t>(shape.size()) : -1;
  if (!fits) return out;
  std::int64_t contiguous = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    out.shape[i] = shape.begin()[i];
    out.stride[i] = stride.size() == 0 ? contiguous : stride.begin()[i];
    contiguous *= shape.begin()[i];
  }
  return out;
}

// The same over a container with data() and size(): its end is known, so a shape that leaves it is
// refused.
template <class Container, class = decltype(std::declval<Container&>().size())>
[[nodiscard]] compactattn_tensor tensor(Container& data, Extents shape,
                                        Extents stride = {}) noexcept {
  compactattn_tensor out = tensor(data.data(), shape, stride);
  out.storage_bytes = static_cast<std::int64_t>(data.size() * sizeof(*data.data()));
  return out;
}

// `tensor` in the memory of CUDA device `ordinal`. Tensors that do not say where they lie count as
// the context's.
[[nodiscard]] inline compactattn_tensor on_cuda(compactattn_tensor tensor,
                                                std::int32_t ordinal) noexcept {
  tensor.device_kind = COMPACTATTN_DEVICE_CUDA;
  tensor.device_ordinal = ordinal;
  return tensor;
}

}  // namespace compactattn
