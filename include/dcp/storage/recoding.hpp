// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a storage makes of the tensors of a state where it does not store them as they are.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/config.hpp>
#include <dcp/plan/save_plan.hpp>
#include <dcp/plan/schema.hpp>
#include <dcp/storage/quantizer.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// The tensors that files will hold: those of the state, and parts of those that are encoded. Made by a storage for a list of tensors; equal on all ranks.
class Recoding {
 public:
  /// Tensor number `tensor` of the state is stored as it is.
  template <class = Deferred>
  void keep(std::uint32_t tensor, TensorSpec const& spec) {
    entries_.push_back({{spec.name, spec.dtype, stored_layout(spec.layout.shape)}, {tensor, spec.dtype, spec.layout.shape, false, {}}, spec.name, no_quantizer, 0});
  }
  /// It is stored as the parts of `quantizer`.
  template <class = Deferred>
  void encode(std::uint32_t tensor, std::unique_ptr<detail::Quantizer> quantizer) {
    for (std::size_t p = 0; p < quantizer->parts().size(); ++p) {
      EncodedPart const& part = quantizer->parts()[p];
      entries_.push_back({{part.name, part.dtype, stored_layout(part.shape)}, {tensor, part.dtype, part.shape, true, part.grid}, quantizer->elements().name(), quantizers_.size(), p});
    }
    quantizers_.push_back({tensor, std::move(quantizer)});
  }
  /// After the last. Throws Error(duplicate_entry) for parts and tensors of the same name.
  template <class = Deferred>
  void finish() {
    std::stable_sort(entries_.begin(), entries_.end(), [](Entry const& a, Entry const& b) { return a.spec.name < b.spec.name; });
    Problems problems;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (i > 0 && entries_[i].spec.name == entries_[i - 1].spec.name) problems.add(ErrorCode::duplicate_entry, entries_[i].spec.name + ": two tensors would be stored under this name");
      stored_.push_back(entries_[i].spec);
      forms_.push_back(entries_[i].form);
      parts_of_.push_back(entries_[i].part_of);
    }
    problems.raise();
  }
  /// What a model's configuration has to say of it.
  std::string model_config;

  /// What files hold, in name order. Of their layouts only the shape means anything.
  std::vector<TensorSpec> const& stored() const { return stored_; }
  std::vector<StoredForm> const& forms() const { return forms_; }
  /// The names that they have, or that what they are parts of has, in the state.
  std::vector<std::string> const& parts_of() const { return parts_of_; }
  struct Encoded {
    std::uint32_t tensor;
    std::unique_ptr<detail::Quantizer> quantizer;
  };
  std::vector<Encoded> const& encoded() const { return quantizers_; }
  /// Equal where ranks mean the same.
  template <class = Deferred>
  std::uint64_t digest() const {
    ByteWriter out;
    for (auto const& entry : entries_) {
      out.text(entry.spec.name).number(entry.form.dtype).number(entry.form.shape.rank());
      for (auto const size : entry.form.shape) out.number(size);
    }
    return crc64(out.bytes());
  }

  /// The transfer of `part`, a box of stored tensor `stored.tensor`, which is made when it is written. It refers to this.
  template <class = Deferred>
  Transfer transfer(StoredBox const& stored, Box const& part) const {
    Entry const& entry = entries_[stored.tensor];
    sources_.push_back(std::make_unique<PartSource>(*quantizers_[entry.quantizer].quantizer, entry.part, part));
    Transfer transfer = make_transfer(entry.form.dtype, entry.form.dtype, part, part, {nullptr, row_major_strides(part.shape)}, stored.box, stored.offset);
    transfer.tensor = entry.form.tensor;
    transfer.file = stored.file;
    transfer.source = sources_.back().get();
    return transfer;
  }

 private:
  static constexpr std::size_t no_quantizer = ~std::size_t{0};
  struct Entry {
    TensorSpec spec;
    StoredForm form;
    std::string part_of;
    std::size_t quantizer, part;
  };
  class PartSource final : public ElementSource {
   public:
    PartSource(detail::Quantizer const& quantizer, std::size_t part, Box const& box) : quantizer_{quantizer}, part_{part}, box_{box} {}
    void produce(std::int64_t first, std::int64_t count, std::byte* out) const override { quantizer_.produce(part_, box_, first, count, out); }

   private:
    detail::Quantizer const& quantizer_;
    std::size_t part_;
    Box box_;
  };
  static Layout stored_layout(Extents const& shape) {
    Layout layout;
    layout.shape = layout.split_shape = shape;
    return layout;
  }

  std::vector<Entry> entries_;
  std::vector<TensorSpec> stored_;
  std::vector<StoredForm> forms_;
  std::vector<std::string> parts_of_;
  std::vector<Encoded> quantizers_;
  mutable std::vector<std::unique_ptr<ElementSource>> sources_;   // of transfers; of the one thread that plans
};

}  // namespace dcp
