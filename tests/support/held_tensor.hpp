// SPDX-License-Identifier: Apache-2.0
#pragma once
// A distributed tensor with the memory of this rank's part, and what tests ask of one: fill it by position, see all of it.

#include <dcp/comm/agree.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/sharded_tensor.hpp>

#include <concepts>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

namespace dcp::test {

template <class T, class P>
struct Held {
  std::vector<T> memory;
  ShardedTensor<T, P> tensor;

  template <int N>
  Held(DeviceMesh<N> const& mesh, Extents const& shape, T value = T{}) : memory(local_box<P>(mesh, shape).size(), value), tensor{mesh, shape, memory} {}
  /// Padded before it was split; the memory holds the padding too.
  template <int N, std::same_as<Padded> Shape>
  Held(DeviceMesh<N> const& mesh, Shape const& shape, T value = T{}) : memory(local_box<P>(mesh, shape).size(), value), tensor{mesh, shape, memory} {}
  Held(Held const&) = delete;   // the tensor views the memory of this object
  Held& operator=(Held const&) = delete;

  /// Calls visit(element, its position in the row-major global tensor) for what this rank holds.
  template <class Visit>
  void each(Visit visit) {
    Box const& box = tensor.local_box();
    if (box.empty()) return;
    Extents const strides = row_major_strides(tensor.shape());
    auto const origin = linear_origin(box, strides);
    for_each_run(box.shape, strides, tensor.memory().strides, 0, static_cast<std::int64_t>(box.size()), [&](std::int64_t, std::int64_t global, std::int64_t local, std::int64_t length) {
      for (std::int64_t i = 0; i < length; ++i) visit(memory[static_cast<std::size_t>(local + i)], static_cast<std::size_t>(origin + global + i));
    });
  }
  /// This rank's part of `whole`.
  void fill(std::vector<T> const& whole) {
    each([&](T& element, std::size_t at) { element = whole[at]; });
  }
};

/// All of a tensor, on every rank, from `parts`, the memory of each rank.
template <class T>
std::vector<T> assembled(Layout const& layout, std::vector<Bytes> const& parts) {
  Extents const strides = row_major_strides(layout.shape);
  std::vector<T> whole(static_cast<std::size_t>(layout.shape.elements()));
  for (std::size_t rank = 0; rank < parts.size(); ++rank) {
    auto const box = box_of_rank(layout, static_cast<std::int64_t>(rank));
    if (!box) continue;
    auto const origin = linear_origin(*box, strides);
    for_each_run(box->shape, strides, row_major_strides(box->shape), 0, static_cast<std::int64_t>(box->size()), [&](std::int64_t, std::int64_t global, std::int64_t local, std::int64_t length) {
      std::memcpy(whole.data() + origin + global, parts[rank].data() + static_cast<std::size_t>(local) * sizeof(T), static_cast<std::size_t>(length) * sizeof(T));
    });
  }
  return whole;
}

/// All of a tensor, on every rank: moved by the communicator alone, so that neither files nor dcp::reshard had a hand in it. Collective.
template <class T, class P>
std::vector<T> gathered(CommRef world, Held<T, P> const& held) {
  return assembled<T>(held.tensor.layout(), all_gather_bytes(world, std::as_bytes(std::span{held.memory})));
}

/// 0, 1, 2, ...
template <class T = float>
std::vector<T> arange(std::size_t count) {
  std::vector<T> values(count);
  std::iota(values.begin(), values.end(), T{0});
  return values;
}

}  // namespace dcp::test
