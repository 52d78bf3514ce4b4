// SPDX-License-Identifier: Apache-2.0
#pragma once
// What is stored of a state whose tensors are made when they are written, where it is put together of several. See plan/arrangement.hpp.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/agreement.hpp>
#include <dcp/core/state_dict.hpp>
#include <dcp/plan/transfer.hpp>

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace dcp::detail {

/// A stored tensor that is put together of tensors with sources.
template <class = Deferred>
class ArrangedSource final : public TensorSource {
 public:
  struct Part {
    PlacedBox placed;
    std::shared_ptr<TensorSource const> source;
  };
  ArrangedSource(DType dtype, std::vector<Part> parts) : dtype_{dtype}, parts_{std::move(parts)} {}
  void read(Box const& box, std::byte* out) const override {
    for (auto const& part : parts_) {
      Box here;
      if (!intersect(box, part.placed.region(), here)) continue;
      Box const there = part.placed.original(here);
      if (here == box && part.placed.in_order()) return part.source->read(there, out);
      Bytes bytes(static_cast<std::size_t>(bytes_of(dtype_, static_cast<std::int64_t>(there.size()))));
      part.source->read(there, bytes.data());
      MemoryView const memory{bytes.data(), permuted(row_major_strides(there.shape), part.placed.order)};
      Transfer const transfer = make_transfer(dtype_, dtype_, here, here, memory, box, 0);
      transfer.for_each_run(0, transfer.end, [&](std::uint64_t at, std::byte const* run, std::size_t size) { std::memcpy(out + at, run, size); });
    }
  }
  /// nullptr where no tensor of `mapped` has a source on this rank.
  static std::shared_ptr<TensorSource const> of(AgreedState const& state, MappedTensor const& mapped) {
    std::vector<Part> parts;
    for (auto const& placed : mapped.from)
      if (auto const* entry = state.local_tensors[placed.tensor]; entry != nullptr && entry->tensor->source) parts.push_back({placed, entry->tensor->source});
    return parts.empty() ? nullptr : std::make_shared<ArrangedSource>(mapped.dtype, std::move(parts));
  }

 private:
  DType dtype_;
  std::vector<Part> parts_;
};

}  // namespace dcp::detail
