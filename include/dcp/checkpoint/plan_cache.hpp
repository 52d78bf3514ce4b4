// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the saves of one state have in common: as long as names, shapes, layouts, memory and options stay as they are, ranks need not agree again on what they mean, nor
// plan again where it goes, nor write headers again. Values are new every time.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/exchange.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/core/state_dict.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

template <class = Deferred>
class PlanCache {
 public:
  /// A number that is the same on all ranks while they have remembered the same saves; 0 if `state` is not what was remembered here. Local; does not throw.
  std::uint64_t match(StateDict const& state, std::string const& options) {
    if (!planned_ || options != planned_->options || state.entries().size() != entries_.size()) return 0;
    if (state.revision() != revision_) {
      if (!std::equal(entries_.begin(), entries_.end(), state.entries().begin(), [](Known const& known, StateEntry const& entry) { return known.is(entry); })) return 0;
      revision_ = state.revision();
    }
    return generation_;
  }
  /// The plan of what matched, with the entries of `state`, which lie where those that were remembered did.
  std::shared_ptr<PlannedSave> rebound(StateDict const& state) {
    auto const rebind = [&](std::vector<StateEntry const*>& here, std::vector<std::size_t> const& from) {
      for (std::size_t i = 0; i < here.size(); ++i) here[i] = from[i] == nowhere ? nullptr : &state.entries()[from[i]];
    };
    rebind(planned_->agreed.local_tensors, tensors_);
    rebind(planned_->agreed.local_values, values_);
    return planned_;
  }
  /// Collective in the sense that all ranks do it for the same saves.
  void remember(StateDict const& state, std::shared_ptr<PlannedSave> planned) {
    planned_ = std::move(planned);
    writes_.reset();
    ++generation_;
    revision_ = state.revision();
    entries_.clear();
    entries_.reserve(state.entries().size());
    for (auto const& entry : state.entries()) entries_.emplace_back(entry);
    auto const places = [&](std::vector<StateEntry const*> const& here) {
      std::vector<std::size_t> from;
      from.reserve(here.size());
      for (auto const* entry : here) from.push_back(entry == nullptr ? nowhere : static_cast<std::size_t>(entry - state.entries().data()));
      return from;
    };
    tensors_ = places(planned_->agreed.local_tensors);
    values_ = places(planned_->agreed.local_values);
  }
  void forget() { planned_.reset(); }

  /// The writes of what was remembered, as make(planned) makes them for blocks of `block_bytes`.
  template <class Make>
  std::shared_ptr<PlannedWrites> writes(std::uint64_t block_bytes, Make make) {
    if (!writes_ || writes_->plan.block_bytes() != block_bytes) writes_ = std::make_shared<PlannedWrites>(PlannedWrites{make(*planned_)});
    return writes_;
  }

 private:
  static constexpr std::size_t nowhere = ~std::size_t{0};
  struct Known {
    StateEntry::Kind kind;
    std::string name;
    std::optional<TensorEntry> tensor;
    ValueOps const* ops;
    bool per_rank;
    RankPolicy policy;
    std::string kept;

    explicit Known(StateEntry const& entry)
        : kind{entry.kind}, name{entry.name}, ops{entry.value.ops}, per_rank{entry.value.per_rank}, policy{entry.value.policy}, kept{entry.tie.kept} {
      if (entry.tensor) tensor = *entry.tensor;
    }
    bool is(StateEntry const& entry) const {
      return kind == entry.kind && name == entry.name && ops == entry.value.ops && per_rank == entry.value.per_rank && policy == entry.value.policy && kept == entry.tie.kept && tensor.has_value() == (entry.tensor != nullptr) &&
             (!tensor || (tensor->dtype == entry.tensor->dtype && tensor->memory.data == entry.tensor->memory.data && tensor->memory.strides == entry.tensor->memory.strides && tensor->layout == entry.tensor->layout));
    }
  };

  std::shared_ptr<PlannedSave> planned_;
  std::shared_ptr<PlannedWrites> writes_;
  std::vector<Known> entries_;
  std::vector<std::size_t> tensors_, values_;   // where in a state the tensors and values of `planned_` are
  std::uint64_t generation_ = 0;
  std::uint64_t revision_ = 0;                  // of a state that is equal to what was remembered
};

}  // namespace dcp::detail
