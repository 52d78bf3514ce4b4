// SPDX-License-Identifier: Apache-2.0
#pragma once
// A tensor whose layout over the ranks is part of its type, viewing the memory that holds this rank's part.

#include <dcp/base/config.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/tensor_view.hpp>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace dcp {

namespace detail {
template <class S>
struct shape_of_type {
  static constexpr int rank = max_rank;   // AnyShape: known at run time
  static constexpr bool is_static = false;
};
template <std::int64_t... Sizes>
struct shape_of_type<Shape<Sizes...>> {
  static constexpr int rank = Shape<Sizes...>::rank;
  static constexpr bool is_static = true;
};
template <class S>
struct a_static_shape {
  static_assert(shape_of_type<S>::is_static, "dcp: as_shape<...> takes a dcp::Shape<...>, the global shape that the tensor should turn out to have");
};
// The shape that as_shape returns, or AnyShape to go on with after a sentence.
template <class S, class P>
using shape_that_fits = std::conditional_t<shape_of_type<S>::is_static && shape_of_type<S>::rank >= needed_rank_of<P>, S, AnyShape>;
template <class S>
struct a_shape {
  static_assert(std::is_same_v<S, AnyShape>, "dcp: the third argument of a ShardedTensor is a dcp::Shape<...>, or dcp::AnyShape when the shape is known at run time");
};
template <std::int64_t... Sizes>
struct a_shape<Shape<Sizes...>> {};

template <class T>
inline constexpr bool is_tensor_view = false;
template <class T>
inline constexpr bool is_tensor_view<TensorView<T>> = true;

// What a ShardedTensor is without its type.
struct LocalPart {
  Layout layout;
  HeldPart part;       // logical: without padding
  MemoryView memory;   // of a flat part: of its elements, one behind the other
  bool held = false;   // whether this rank is in the mesh
};

template <class = Deferred>
void check_local_memory(Layout const& layout, Box const& padded, Box const& box, Extents const& given, Extents const& strides, bool dense) {
  bool holds = given.rank() == box.rank();
  for (int d = 0; holds && d < box.rank(); ++d) holds = given[d] >= box.shape[d];
  if (!holds)
    throw Error{ErrorCode::invalid_argument, "a tensor " + to_string(layout.shape) + " has a local part " + to_string(padded.shape) + " here, but its memory is " + to_string(given) +
                                                 " with strides " + to_string(strides) + (dense ? "" : "; pass a view of the local part")};
}

// What the memory of a flat part holds: in a bucket the rank's whole shard, of which the tensor has a run.
struct FlatMemory {
  std::int64_t elements, begin;
};
template <class = Deferred>
FlatMemory flat_memory(Layout const& layout, MeshGeometry::Coordinate const& coordinate, HeldPart const& held) {
  if (!layout.flat.in_bucket()) return {held.elements(), 0};
  auto const a = static_cast<std::size_t>(flat_axis(layout));
  FlatRange const shard = layout.flat.range_of(coordinate[a], layout.mesh.extents[a], layout.flat.elements);
  return {shard.size(), layout.flat.offset + held.begin - shard.begin};
}

/// The part of `layout` that `rank` holds, in `memory`. Compiled once per element and memory type: a model has few of them, and many
/// types of tensors.
template <class T, class M>
LocalPart local_part(Layout const& layout, std::int64_t rank, M& memory) {
  LocalPart part{layout, {nothing_of(layout.shape)}, {}, false};
  auto const coordinate = layout.mesh.coordinate_of(rank);
  if (!coordinate) return part;
  part.held = true;
  part.part = held_at(layout, *coordinate);
  if (part.part.flat) {
    FlatMemory const wanted = flat_memory(layout, *coordinate, part.part);
    TensorView<T> whole;
    if constexpr (is_tensor_view<std::remove_cvref_t<M>>) {
      if constexpr (std::is_same_v<typename std::remove_cvref_t<M>::element_type, T>) whole = memory;
      if (whole.shape().rank() != 1 || whole.shape()[0] < wanted.elements) check_local_memory(layout, {{}, Extents{wanted.elements}}, {Extents{0}, Extents{wanted.elements}}, whole.shape(), whole.strides(), false);
    } else if constexpr (std::is_constructible_v<std::span<storage_of<T>>, M&>) {
      whole = TensorView<T>{memory, Extents{wanted.elements}};
    }
    part.memory = whole.memory();
    if (part.part.empty()) return part;
    if (bits_of(dtype_of<T>) < 8 && wanted.begin * bits_of(dtype_of<T>) % 8 != 0)
      throw Error{ErrorCode::misaligned, "a tensor " + to_string(layout.shape) + " of " + std::string{to_string(dtype_of<T>)} + " elements begins inside a byte of its flat bucket"};
    part.memory.data += bits_of(dtype_of<T>) < 8 ? wanted.begin * bits_of(dtype_of<T>) / 8 : wanted.begin * whole.strides()[0] * static_cast<std::int64_t>(sizeof(storage_of<T>));
    return part;
  }
  Box const padded = padded_box_at(layout, *coordinate);
  if constexpr (is_tensor_view<std::remove_cvref_t<M>>) {
    check_local_memory(layout, padded, part.part.box, memory.shape(), memory.strides(), false);
    part.memory = memory.memory();
  } else if constexpr (std::is_constructible_v<std::span<storage_of<T>>, M&>) {
    part.memory = TensorView<T>{memory, padded.shape}.memory();
  }
  return part;
}
}  // namespace detail

class Entry;

/// A view of this rank's part of a global tensor.
///
/// Memory    a contiguous range of at least local_box(...).size() elements (padding included), or a TensorView of the local part
///           for strided and fused buffers; of a flat part (FlatShard) its elements, one behind the other. It belongs to the trainer and must outlive the tensor's use
/// Throws    Error(invalid_argument) if the memory is too small
/// Outside   on a rank that is not in the mesh it views nothing, and a state leaves it out
/// Example   dcp::ShardedTensor<float, dcp::Placement<dcp::Shard<0>>> w{mesh, {7, 5}, memory};
template <class T, class P, class S = AnyShape>
class ShardedTensor : detail::an_element_type<T>, detail::a_placement<P>, detail::a_shape<S>, detail::dims_exist<detail::shape_of_type<S>::rank, detail::needed_rank_of<P>> {
 public:
  using element_type = T;
  using placement = P;
  static constexpr int partial_axes = detail::partial_axes_of<P>;

  /// Global shape known at run time.
  template <int N, class M, std::size_t K>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, std::int64_t const (&shape)[K], M&& memory) : ShardedTensor{layout_of<P>(mesh, Extents{shape}), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
    [[maybe_unused]] detail::dims_exist<static_cast<int>(K), detail::needed_rank_of<P>> dims;
  }
  template <int N, class M>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, Extents const& shape, M&& memory) : ShardedTensor{layout_of<P>(mesh, shape), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  }
  /// A tensor that was padded before it was split; see Padded.
  template <int N, class M>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, Padded const& shape, M&& memory) : ShardedTensor{layout_of<P>(mesh, shape), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  }
  /// A tensor of a flat bucket; see FlatBucket. `memory`: this rank's whole shard of the bucket.
  template <int N, class M, std::size_t K>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, std::int64_t const (&shape)[K], FlatSlot const& slot, M&& memory) : ShardedTensor{layout_of<P>(mesh, {Extents{shape}, Extents{shape}}, slot), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
    [[maybe_unused]] detail::dims_exist<static_cast<int>(K), detail::needed_rank_of<P>> dims;
  }
  template <int N, class M>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, Extents const& shape, FlatSlot const& slot, M&& memory) : ShardedTensor{layout_of<P>(mesh, {shape, shape}, slot), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  }
  template <int N, class M>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, Padded const& shape, FlatSlot const& slot, M&& memory) : ShardedTensor{layout_of<P>(mesh, shape, slot), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  }
  /// Global shape in the type.
  template <int N, class M>
    requires(!std::is_same_v<S, AnyShape>)
  ShardedTensor(DeviceMesh<N> const& mesh, M&& memory) : ShardedTensor{layout_of<P>(mesh, Extents{std::span<std::int64_t const>{S::sizes}}), mesh.rank(), memory} {
    [[maybe_unused]] detail::one_rule_per_axis<detail::rules_given<P, N>, N> rules;
  }

  /// From a global shape in the type to one at run time. The way back is checked: as_shape.
  template <std::int64_t... Sizes>
    requires(std::is_same_v<S, AnyShape>)
  ShardedTensor(ShardedTensor<T, P, Shape<Sizes...>> const& other) : part_{other.part_} {}
  template <class To>
  Result<ShardedTensor<T, P, detail::shape_that_fits<To, P>>> as_shape() const {
    [[maybe_unused]] detail::a_static_shape<To> check;
    [[maybe_unused]] detail::dims_exist<detail::shape_of_type<To>::rank, detail::needed_rank_of<P>> dims;
    if constexpr (detail::shape_of_type<To>::is_static) {
      if (Extents const wanted{std::span<std::int64_t const>{To::sizes}}; !(wanted == shape()))
        return Error{ErrorCode::shape_mismatch, "a tensor of shape " + to_string(shape()) + " seen as one of " + to_string(wanted)};
    }
    return ShardedTensor<T, P, detail::shape_that_fits<To, P>>{part_};
  }

  storage_of<T>* data() const { return reinterpret_cast<storage_of<T>*>(part_.memory.data); }
  Extents const& shape() const { return part_.layout.shape; }      // global, logical
  Box const& local_box() const { return part_.part.box; }          // logical: without padding; of a flat part, the box that it is part of
  HeldPart const& local_part() const { return part_.part; }        // of a flat part: which elements of the box
  Layout const& layout() const { return part_.layout; }
  MemoryView const& memory() const { return part_.memory; }        // strides of the local part
  bool held_here() const { return part_.held; }                    // whether this rank is in the mesh
  DType dtype() const { return dtype_of<T>; }

 private:
  template <class, class, class>
  friend class ShardedTensor;
  friend class Entry;
  explicit ShardedTensor(detail::LocalPart const& part) : part_{part} {}

  template <class M>
  ShardedTensor(Layout const& layout, std::int64_t rank, M& memory) : part_{detail::local_part<T>(layout, rank, memory)} {
    if constexpr (detail::is_tensor_view<std::remove_cvref_t<M>>) {
      [[maybe_unused]] detail::memory_of_type<T, std::span<storage_of<typename std::remove_cvref_t<M>::element_type>>> check;
    } else {
      [[maybe_unused]] detail::memory_of_type<T, M> check;
    }
  }

  detail::LocalPart part_;
};

}  // namespace dcp
