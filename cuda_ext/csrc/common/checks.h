// Checks of an operator's arguments; messages name the argument, what was given and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

namespace slipstream {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kLargestHeadDim = 256;

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " has ", tensor.dim(), " dimensions, expected ", dim);
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == int64_t(expected.size());
  int64_t axis = 0;
  for (const int64_t size : expected) same = same && tensor.size(axis++) == size;
  STD_TORCH_CHECK(same, name, " has shape ", shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

inline void check_innermost(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name, " has stride ", tensor.stride(last),
                  " in its last dimension, expected 1");
}

inline void check_rows(const Tensor& tensor, const char* name) {
  check_dim(tensor, name, 4);
  check_innermost(tensor, name);
}

inline void check_head_dim(int64_t head_dim) {
  STD_TORCH_CHECK(head_dim > 0 && head_dim <= kLargestHeadDim, "head_dim is ", head_dim, ", expected 1 to ",
                  kLargestHeadDim);
}

// A tensor that is read through a bare pointer: of one type, rows without gaps.
inline void check_index(const Tensor& tensor, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " has dtype ", toString(tensor.scalar_type()), ", expected ",
                  toString(expected));
  const bool rows = tensor.dim() == 2 && tensor.size(1) > 0 && std::string(name) == "block_tables";
  STD_TORCH_CHECK(rows ? tensor.stride(1) == 1 : tensor.is_contiguous(), name, " has strides ",
                  shape_text(tensor.strides()), ", expected contiguous ones");
}

// The kernels' own name of a tensor's type; CPU and CUDA kernels each have an enumeration, with the same members.
template <class KernelDType>
KernelDType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return KernelDType::kFloat32;
    case ScalarType::BFloat16: return KernelDType::kBFloat16;
    case ScalarType::Half: return KernelDType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", toString(tensor.scalar_type()), ", expected Float, BFloat16 or Half");
  }
  return KernelDType::kFloat32;
}

inline void check_same_dtype(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " has dtype ", toString(tensor.scalar_type()),
                  ", expected ", toString(other.scalar_type()), " as ", other_name);
}

}  // namespace slipstream
