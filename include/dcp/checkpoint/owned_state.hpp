// SPDX-License-Identifier: Apache-2.0
#pragma once
// load_from_keys: reads a checkpoint without a state to fill, and owns what it read.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/load.hpp>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// A whole tensor in memory of its own: dense, row-major, elements smaller than a byte packed. Copies share the memory, as tensors do
/// that the checkpoint ties to each other: a name costs nothing, however many a file lists.
class OwnedTensor {
 public:
  template <class = Deferred>
  OwnedTensor(DType dtype, Extents const& shape) : dtype_{dtype}, shape_{shape}, bytes_{std::make_shared<Bytes>(static_cast<std::size_t>(bytes_of(dtype, shape.elements())))} {}
  DType dtype() const { return dtype_; }
  Extents const& shape() const { return shape_; }
  ConstByteSpan bytes() const { return *bytes_; }
  ByteSpan bytes() { return *bytes_; }
  /// The elements as T. Throws Error(dtype_mismatch) if they are none.
  template <class T>
  std::span<storage_of<T> const> as() const {
    if (dtype_of<T> != dtype_) throw Error{ErrorCode::dtype_mismatch, "a tensor of " + std::string{to_string(dtype_)} + " read as " + std::string{to_string(dtype_of<T>)}};
    return {reinterpret_cast<storage_of<T> const*>(bytes_->data()), bytes_->size() / sizeof(storage_of<T>)};
  }

 private:
  DType dtype_;
  Extents shape_;
  std::shared_ptr<Bytes> bytes_;
};

/// What load_from_keys read: names to tensors, and names to values, each in name order.
class OwnedState {
 public:
  OwnedState() = default;
  template <class = Deferred>
  OwnedState(std::map<std::string, OwnedTensor> tensors, std::map<std::string, Value> values, Report report)
      : tensors_{std::move(tensors)}, values_{std::move(values)}, report_{std::move(report)} {}

  std::map<std::string, OwnedTensor> const& tensors() const { return tensors_; }
  std::map<std::string, Value> const& values() const { return values_; }
  std::map<std::string, OwnedTensor>& tensors() { return tensors_; }
  Report const& report() const { return report_; }

 private:
  std::map<std::string, OwnedTensor> tensors_;
  std::map<std::string, Value> values_;
  Report report_;
};
namespace detail {

/// Whether `name` is one of `keys`, or lies below one: whole components between dots. No keys: everything.
template <class = Deferred>
bool selected(std::string_view name, std::vector<std::string> const& keys) {
  return keys.empty() || std::any_of(keys.begin(), keys.end(), [&](std::string const& key) { return name.starts_with(key) && (name.size() == key.size() || name[key.size()] == '.'); });
}

template <class = Deferred>
OwnedState load_owned(CommRef comm, AnyStorage const& storage, PlaceRef const& place, std::vector<std::string> const& keys, LoadSettings settings) {
  settings.on_unexpected = OnUnexpected::ignore;
  settings.for_prefix.clear();
  return again_if_replaced(comm, *place.medium, place.path, [&](Sighting& seen) {
    OpenedCheckpoint const opened = open_checkpoint(comm, storage, *place.medium, place.path, settings.verify, seen);
    std::map<std::string, OwnedTensor> tensors;
    std::map<std::string, Value> values;
    StateDict state;
    agree(comm, "load: allocate", [&] {
      auto const add = [&](std::string const& name, DType dtype, Extents const& shape, std::string const& kept) {
        auto const at = tensors.find(kept);
        auto& tensor = tensors.try_emplace(name, at == tensors.end() ? OwnedTensor{dtype, shape} : at->second).first->second;
        state.add_tensor(name, dtype, plain_layout(shape), {tensor.bytes().data(), row_major_strides(shape)});
      };
      std::vector<MappedTensor> stored;
      for (auto const& tensor : opened.catalog.tensors) stored.push_back({tensor.name, tensor.dtype, tensor.shape, {}, false});
      if (!settings.names.empty()) stored = settings.names.state_tensors(std::move(stored));
      for (auto const& tensor : stored)
        if (selected(tensor.name, keys)) add(tensor.name, tensor.dtype, tensor.shape, tensor.name);
      std::map<std::string, std::string> first;   // kept name -> the first of the dropped ones, where the kept one is not asked for
      for (auto const& tie : opened.catalog.ties) {
        auto const* tensor = opened.catalog.find_tensor(tie.kept);
        std::string const dropped = settings.names.state_name(tie.dropped), kept = settings.names.state_name(tie.kept);
        if (tensor == nullptr || !selected(dropped, keys) || opened.catalog.find_tensor(tie.dropped) != nullptr) continue;
        add(dropped, tensor->dtype, tensor->shape, tensors.contains(kept) ? kept : first.try_emplace(kept, dropped).first->second);
      }
      for (auto const& [name, value] : opened.catalog.values)
        if (std::string const known = settings.names.state_name(name); selected(known, keys)) values.emplace(known, value);
      for (auto const& key : keys)
        if (std::none_of(tensors.begin(), tensors.end(), [&](auto const& t) { return selected(t.first, {key}); }) && std::none_of(values.begin(), values.end(), [&](auto const& v) { return selected(v.first, {key}); }))
          throw Error{ErrorCode::missing_entry, json_quoted(key) + ": Missing key in checkpoint; no entry has this name or lies below it"};
    });
    Report report = load_state(comm, storage, place, state, settings);
    seen.complete = report.id == (opened.record ? opened.record->id : "");
    if (!seen.complete) throw Error{ErrorCode::io, "the checkpoint was replaced while it was being read"}.with_path(place.path);
    return OwnedState{std::move(tensors), std::move(values), std::move(report)};
  });
}

}  // namespace detail

/// Reads the entries whose name is one of `keys`, or lies below one ("optimizer.state" takes "optimizer.state.step" and not
/// "optimizer.state_dict"); all of them if `keys` is empty. Collective; every rank gets whole tensors in memory of its own.
///
/// Throws    Error(missing_entry) for a key that selects nothing, and what load throws
/// Note      write the keys as {"a", "b"}; {{"a", "b"}} would be one string made of two iterators
/// Example   auto state = dcp::load_from_keys<dcp::SafeTensors>(self, "model", {"lm_head"});  state.tensors().at("lm_head.weight").shape();
template <class S, class C>
OwnedState load_from_keys(C& comm, place_of<S> const& place, std::vector<std::string> const& keys = {}, LoadOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  if constexpr (Storage<S> && Communicator<C>) {
    return detail::load_owned(CommRef{comm}, *S::open(options.storage), S::locate(place), keys, detail::settings_of(options));
  } else {
    return {};
  }
}

}  // namespace dcp
