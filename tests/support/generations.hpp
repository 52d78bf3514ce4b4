// SPDX-License-Identifier: Apache-2.0
#pragma once
// A state whose whole content follows from one number, its generation: whatever is loaded is then one generation, or a mix.

#include <dcp/core/sharded_tensor.hpp>
#include <dcp/core/state_dict.hpp>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace dcp::test {

/// Tensors split by rows, by columns, and not at all, smaller than a block and (with 1,100 rows) larger than a chunk of checksums;
/// values of one kind each.
class GenerationState {
 public:
  template <class Ranks>
  explicit GenerationState(Ranks const& ranks, std::int64_t rows = 1100)
      : mesh_{ranks, {static_cast<std::int64_t>(ranks.size())}},
        rank_{static_cast<std::int64_t>(ranks.rank())},
        rows_memory_(local_box<Rows>(mesh_, {rows, 256}).size()),
        columns_memory_(local_box<Columns>(mesh_, {67, 129}).size()),
        uneven_memory_(local_box<Rows>(mesh_, {4, 3}).size()),
        whole_memory_(513),
        small_memory_(3),
        rows_{mesh_, {rows, 256}, rows_memory_},
        columns_{mesh_, {67, 129}, columns_memory_},
        uneven_{mesh_, {4, 3}, uneven_memory_},
        whole_{mesh_, {513}, whole_memory_},
        small_{mesh_, {3}, small_memory_} {}
  GenerationState(GenerationState const&) = delete;

  StateDict state() {
    return {{"rows", rows_},   {"layer.columns", columns_}, {"layer.uneven", uneven_}, {"whole", whole_},
            {"small", small_}, {"step", step_},             {"note", note_},           {"rng", per_rank(rng_, RankPolicy::wrap)}};
  }

  void fill(std::uint64_t generation) {
    each([&](std::uint32_t& element, std::uint32_t tensor, std::int64_t at) { element = element_of(generation, tensor, at); });
    for (std::size_t i = 0; i < small_memory_.size(); ++i) small_memory_[i] = static_cast<std::uint8_t>(element_of(generation, 9, static_cast<std::int64_t>(i)));
    step_ = generation;
    note_ = note_of(generation);
    rng_ = 1000 * generation + static_cast<std::uint64_t>(rank_);
  }

  /// What no generation has: to see that a load fills everything.
  void scribble() {
    each([](std::uint32_t& element, std::uint32_t, std::int64_t) { element = 0xEEEEEEEE; });
    for (auto& element : small_memory_) element = 0xEE;
    step_ = 0, rng_ = 0;
    note_ = "nothing";
  }

  std::uint64_t step() const { return step_; }

  /// Empty if everything here is of this generation, else the first thing that is not.
  std::string difference(std::uint64_t generation) const {
    std::string wrong;
    auto& self = const_cast<GenerationState&>(*this);
    self.each([&](std::uint32_t& element, std::uint32_t tensor, std::int64_t at) {
      if (element != element_of(generation, tensor, at) && wrong.empty())
        wrong = "element " + std::to_string(at) + " of tensor " + std::to_string(tensor) + " on rank " + std::to_string(rank_) + " is not of generation " + std::to_string(generation);
    });
    for (std::size_t i = 0; i < small_memory_.size(); ++i)
      if (small_memory_[i] != static_cast<std::uint8_t>(element_of(generation, 9, static_cast<std::int64_t>(i)))) wrong = "small";
    if (step_ != generation) wrong = "step " + std::to_string(step_) + ", not " + std::to_string(generation);
    if (note_ != note_of(generation)) wrong = "the note";
    if (rng_ / 1000 != generation) wrong = "rng";
    return wrong;
  }

  /// The generation that all of this is. Throws std::runtime_error for a mix.
  std::uint64_t generation() const {
    if (auto const wrong = difference(step_); !wrong.empty()) throw std::runtime_error{"a mix: step says generation " + std::to_string(step_) + ", but " + wrong};
    return step_;
  }

 private:
  using Rows = Placement<Shard<0>>;
  using Columns = Placement<Shard<1>>;
  using Everywhere = Placement<Replicate>;

  static std::uint32_t element_of(std::uint64_t generation, std::uint32_t tensor, std::int64_t at) {
    auto x = static_cast<std::uint32_t>(at) * 2654435761u + static_cast<std::uint32_t>(generation) * 0x9E3779B9u + tensor * 0x85EBCA6Bu;
    x ^= x >> 15;
    return x * 0xC2B2AE35u;
  }
  static std::string note_of(std::uint64_t generation) { return "generation " + std::to_string(generation); }

  // visit(element, number of its tensor, position in the global tensor) for all that is here.
  template <class Visit>
  void each(Visit visit) {
    auto const one = [&](auto const& tensor, std::uint32_t number) {
      Box const box = tensor.local_box();
      if (box.empty()) return;
      std::uint32_t* at = tensor.data();
      std::int64_t const width = box.rank() == 2 ? box.shape[1] : box.shape[0], height = box.rank() == 2 ? box.shape[0] : 1;
      std::int64_t const pitch = box.rank() == 2 ? tensor.shape()[1] : 0, column = box.rank() == 2 ? box.origin[1] : box.origin[0];
      for (std::int64_t i = 0; i < height; ++i)
        for (std::int64_t j = 0; j < width; ++j) visit(*at++, number, ((box.rank() == 2 ? box.origin[0] : 0) + i) * pitch + column + j);
    };
    one(rows_, 1), one(columns_, 2), one(uneven_, 3), one(whole_, 4);
  }

  DeviceMesh<1> mesh_;
  std::int64_t rank_;
  std::vector<std::uint32_t> rows_memory_, columns_memory_, uneven_memory_, whole_memory_;
  std::vector<std::uint8_t> small_memory_;
  ShardedTensor<std::uint32_t, Rows> rows_;
  ShardedTensor<std::uint32_t, Columns> columns_;
  ShardedTensor<std::uint32_t, Rows> uneven_;
  ShardedTensor<std::uint32_t, Everywhere> whole_;
  ShardedTensor<std::uint8_t, Everywhere> small_;
  std::uint64_t step_ = 0, rng_ = 0;
  std::string note_ = "nothing";
};

}  // namespace dcp::test
