// SPDX-License-Identifier: Apache-2.0
#pragma once
// Eigen matrices, vectors, arrays, and maps, references and blocks of them, as tensors of a state.
//
//   a vector (one row or one column at compile time) of n elements is a tensor [n], anything else [rows, cols];
//   a view is made of the memory as it is when a state is built: loading writes there and never resizes, so a matrix gets its size
//   before, and a state does not outlive a resize.
//
// Checkpoints store rows first. What stores columns first (Eigen's default) is refused at compile time, since its bytes would
// silently be those of the transpose; `transposed(m)` says that the transpose is meant. Eigen::half and Eigen::bfloat16 are F16 and BF16.

#include <dcp/core/state_dict.hpp>
#include <dcp/core/tensor_view.hpp>

#include <Eigen/Core>

#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

namespace dcp {

namespace detail {
// Asked of the base classes, since Eigen's own traits are undefined for types that are not Eigen's.
template <class D>
std::true_type derives_from_dense(Eigen::DenseBase<D> const*);
std::false_type derives_from_dense(void const*);
template <class D>
std::true_type derives_from_plain(Eigen::PlainObjectBase<D> const*);
std::false_type derives_from_plain(void const*);
template <class M>
concept EigenDense = std::is_class_v<M> && decltype(derives_from_dense(static_cast<M*>(nullptr)))::value;
// Owns its elements, so that a temporary one is gone with them.
template <class M>
inline constexpr bool owns_elements = decltype(derives_from_plain(static_cast<M*>(nullptr)))::value;

template <class M>
inline constexpr bool has_memory = (static_cast<unsigned>(M::Flags) & Eigen::DirectAccessBit) != 0;
template <class M>
inline constexpr bool is_writable = (static_cast<unsigned>(M::Flags) & Eigen::LvalueBit) != 0;
template <class M>
inline constexpr bool is_vector = M::RowsAtCompileTime == 1 || M::ColsAtCompileTime == 1;
template <class M>
inline constexpr bool stores_rows_first = M::IsRowMajor || is_vector<M>;

template <class M, bool HasMemory>
struct matrix_in_memory {
  static_assert(HasMemory, "dcp: this Eigen expression has no memory of its own; evaluate it into a matrix and name that");
};
template <class M, bool Writable>
struct matrix_can_be_loaded {
  static_assert(Writable, "dcp: this Eigen object is const, and loading writes into it; use a matrix, Map or Ref that can change");
};
template <class M, bool Lives>
struct matrix_outlives_the_view {
  static_assert(Lives, "dcp: a view is made of a temporary Eigen matrix, which is gone before it could be loaded into; name a variable");
};
template <class M, int IsRowMajor>
struct rows_first {
  static_assert(IsRowMajor == 1, "dcp: checkpoints store rows first (C order) and this Eigen type stores columns first; use Eigen::RowMajor, or dcp::transposed(m) to save the transpose "
                                 "[M::IsRowMajor == 1]");
};

template <class S>
struct element_of_scalar {
  using type = S;
};
template <>
struct element_of_scalar<Eigen::half> {
  using type = f16;
};
#if EIGEN_VERSION_AT_LEAST(3, 4, 0)
template <>
struct element_of_scalar<Eigen::bfloat16> {
  using type = bf16;
};
#endif
template <class M>
using element_of = typename element_of_scalar<typename std::remove_cvref_t<M>::Scalar>::type;

// What a view is asked for, as the check that fails first, or one that holds. `M`: the type of a forwarding reference.
struct matrix_is_viewable {};
template <class M, bool Transposed>
constexpr auto first_check_of_matrix() {
  using Plain = std::remove_cvref_t<M>;
  constexpr bool is_const = std::is_const_v<std::remove_reference_t<M>>;
  if constexpr (!has_memory<Plain>) return std::type_identity<matrix_in_memory<Plain, false>>{};
  else if constexpr (!is_element<element_of<M>>) return std::type_identity<an_element_type<element_of<M>>>{};
  else if constexpr (!is_writable<Plain> || (owns_elements<Plain> && is_const)) return std::type_identity<matrix_can_be_loaded<Plain, false>>{};
  else if constexpr (owns_elements<Plain> && !std::is_lvalue_reference_v<M>) return std::type_identity<matrix_outlives_the_view<Plain, false>>{};
  else if constexpr (!Transposed && !stores_rows_first<Plain>) return std::type_identity<rows_first<Plain, 0>>{};
  else return std::type_identity<matrix_is_viewable>{};
}
template <class M, bool Transposed = false>
using a_viewable_matrix = typename decltype(first_check_of_matrix<M, Transposed>())::type;
template <class M, bool Transposed = false>
inline constexpr bool is_viewable_matrix = std::is_same_v<a_viewable_matrix<M, Transposed>, matrix_is_viewable>;

template <class M>
TensorView<element_of<M>> view_of_matrix(M& m, Extents const& shape, Extents const& strides) {
  using Element = element_of<M>;
  std::int64_t last = 0;
  for (int d = 0; d < shape.rank(); ++d) last += (shape[d] - 1) * strides[d];
  auto const elements = shape.empty() ? std::size_t{0} : static_cast<std::size_t>(last + 1);
  // A Map is const when it cannot be pointed elsewhere; what it maps can still change.
  auto* const first = const_cast<typename M::Scalar*>(m.data());
  return {std::span{reinterpret_cast<Element*>(first), elements}, shape, strides};
}
}  // namespace detail

/// The memory of `m`, as a state or a ShardedTensor wants it: [n] for vectors, else [rows, cols], with the strides of a Map, Ref or
/// Block. `m` stores rows first, is not const, and is a temporary only if it refers to elements of another object.
///
/// Throws    Error(invalid_argument) if a stride is negative
/// Example   dcp::ShardedTensor<float, P> w{mesh, {4096, 1024}, dcp::view(shard)};   // Eigen::Matrix<float, -1, -1, Eigen::RowMajor> shard
template <class M>
  requires detail::EigenDense<std::remove_cvref_t<M>>
TensorView<detail::element_of<M>> view(M&& m) {
  using Plain = std::remove_cvref_t<M>;
  [[maybe_unused]] detail::a_viewable_matrix<M> check;
  if constexpr (!detail::is_viewable_matrix<M>) return {};
  else if constexpr (detail::is_vector<Plain>) return detail::view_of_matrix(m, Extents{m.size()}, Extents{m.innerStride()});
  else return detail::view_of_matrix(m, Extents{m.rows(), m.cols()}, Extents{m.rowStride(), m.colStride()});
}

/// The transpose of `m` over the same memory: element [j, i] of the tensor [cols, rows] is m(i, j). The way to save, shard and load a
/// matrix that stores columns first: its bytes are then already in order. Of a vector it is a tensor of two dimensions.
///
/// Example   Eigen::MatrixXf w(768, 3072);   dcp::StateDict state{{"w", dcp::transposed(w)}};   // stored as [3072, 768]
template <class M>
  requires detail::EigenDense<std::remove_cvref_t<M>>
TensorView<detail::element_of<M>> transposed(M&& m) {
  [[maybe_unused]] detail::a_viewable_matrix<M, true> check;
  if constexpr (!detail::is_viewable_matrix<M, true>) return {};
  else return detail::view_of_matrix(m, Extents{m.cols(), m.rows()}, Extents{m.colStride(), m.rowStride()});
}

/// The same on every rank and written once, like a TensorView. What only refers to elements (Map, Ref, Block) may be a temporary.
///
/// Example   Eigen::VectorXf bias(768);   dcp::StateDict state{{"bias", bias}, {"head", weight.topRows(10)}};
template <detail::EigenDense M>
struct EntryOf<M> {
  static constexpr bool is_view = !detail::owns_elements<M>;
  static void add(StateDict& state, std::string const& name, M& m) {
    [[maybe_unused]] detail::a_viewable_matrix<M&> check;
    if constexpr (detail::is_viewable_matrix<M&>) {
      auto const tensor = view(m);
      state.add_tensor(name, tensor.dtype(), plain_layout(tensor.shape()), tensor.memory());
    }
  }
};

}  // namespace dcp
