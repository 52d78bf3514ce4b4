// SPDX-License-Identifier: Apache-2.0
#pragma once
// convert: a checkpoint of one storage as a checkpoint of another, without ever holding more of it than the memory budget.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/catalog_reader.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

template <class From, class To>
struct ConvertOptions {
  std::vector<std::string> only = {};     // entries of these names or below them, as of load_from_keys; empty: all
  DType decode_to = DType::bf16;          // what tensors become that are stored quantized: F32, BF16, F16 or F64
  LoadOptions<From> load = {};            // verify, storage
  SaveOptions<To> save = {};
};

namespace detail {

/// What converting means, but for the storages' own options.
struct ConvertSettings {
  std::vector<std::string> only;
  DType decode_to = DType::bf16;
  LoadSettings load;
  SaveSettings save;
};

template <class = Deferred>
class CheckpointSource final : public TensorSource {
 public:
  CheckpointSource(std::shared_ptr<CatalogReader<>> reader, CatalogTensor const& tensor, DType dtype) : reader_{std::move(reader)}, tensor_{tensor}, dtype_{dtype} {}
  void read(Box const& box, std::byte* out) const override {
    try {
      reader_->read(tensor_, box, dtype_, out);
    } catch (Error const& error) {
      throw Error{error}.with_hint("of the checkpoint that is converted");
    }
  }

 private:
  std::shared_ptr<CatalogReader<>> reader_;
  CatalogTensor const& tensor_;
  DType dtype_;
};

/// The state that a checkpoint holds, to be saved: tensors are read when they are written. Pieces in archives have been located. Everything that it refers to
/// must outlive it.
template <class = Deferred>
class StoredState {
 public:
  StoredState(Catalog const& catalog, std::shared_ptr<CatalogReader<>> reader, std::vector<std::string> const& only, DType decode_to) {
    auto const add = [&](std::string const& name, CatalogTensor const& tensor) {
      DType const dtype = tensor.encoding == nullptr ? tensor.dtype : decode_to;
      state_.add_source(name, dtype, tensor.shape, std::make_shared<CheckpointSource<>>(reader, tensor, dtype)).joints = catalog.joints_of(name);
    };
    for (auto const& tensor : catalog.tensors)
      if (selected(tensor.name, only)) add(tensor.name, tensor);
    std::map<std::string, std::string> first;   // kept name -> the first of the dropped ones, where the kept one is not wanted
    for (auto const& tie : catalog.ties) {
      CatalogTensor const* tensor = catalog.find_tensor(tie.kept);
      if (tensor == nullptr || !selected(tie.dropped, only) || catalog.find_tensor(tie.dropped) != nullptr) continue;
      auto const [kept, fresh] = first.try_emplace(tie.kept, selected(tie.kept, only) ? tie.kept : tie.dropped);
      if (fresh && kept->second == tie.dropped) add(tie.dropped, *tensor);
      else state_.add_tie(tie.dropped, kept->second).joints = catalog.joints_of(tie.dropped);
    }
    for (auto const& [name, value] : catalog.values) {
      if (!selected(name, only)) continue;
      ops_.push_back(std::make_unique<ValueOps>(ValueOps{value.kind, value.dtype, [](void const* object) { return *static_cast<Value const*>(object); }, nullptr}));
      state_.add_value(name, {const_cast<Value*>(&value), ops_.back().get(), false, RankPolicy::fail}).joints = catalog.joints_of(name);
    }
    for (auto const& key : only)
      if (std::none_of(state_.entries().begin(), state_.entries().end(), [&](StateEntry const& entry) { return selected(entry.name, {key}); }))
        throw Error{ErrorCode::missing_entry, json_quoted(key) + ": no entry of the checkpoint has this name or lies below it"};
  }
  StateDict const& state() const { return state_; }

 private:
  std::vector<std::unique_ptr<ValueOps>> ops_;
  StateDict state_;
};

/// Looks for the pieces of `catalog` that lie in archives, all of them or those of selected tensors.
template <class = Deferred>
void locate_pieces(AnyStorage const& storage, AnyMedium& medium, OpenedCheckpoint& opened, std::vector<std::string> const& only) {
  std::vector<CatalogTensor*> tensors;
  for (auto& tensor : opened.catalog.tensors) {
    bool const wanted = selected(tensor.name, only) || std::any_of(opened.catalog.ties.begin(), opened.catalog.ties.end(), [&](Tie const& tie) { return tie.kept == tensor.name; });
    if (wanted && tensor.lies_in_archives()) tensors.push_back(&tensor);
  }
  if (!tensors.empty()) storage.locate(medium, opened.directory, opened.catalog, tensors);
}

template <class = Deferred>
Report convert_checkpoint(CommRef comm, AnyStorage const& from, PlaceRef const& from_place, AnyStorage const& to, PlaceRef const& to_place, ConvertSettings const& settings) {
  if (!settings.load.names.empty()) throw Error{ErrorCode::invalid_argument, "names are mapped by the options of the save: what the source holds is the state, and the target is the checkpoint"};
  if (!is_wide_float(settings.decode_to)) throw Error{ErrorCode::invalid_argument, "quantized tensors cannot become " + std::string{to_string(settings.decode_to)}};
  return again_if_replaced(comm, *from_place.medium, from_place.path, [&](Sighting& seen) {
    OpenedCheckpoint opened = open_checkpoint(comm, from, *from_place.medium, from_place.path, settings.load.verify, seen);
    auto const stored = agree(comm, "convert: plan", [&] {
      locate_pieces(from, *from_place.medium, opened, settings.only);
      return std::make_unique<StoredState<>>(opened.catalog, std::make_shared<CatalogReader<>>(*from_place.medium, opened, settings.load.verify), settings.only, settings.decode_to);
    });
    Report report = save_state(comm, to, to_place, stored->state(), settings.save);
    report.operation = "convert";
    detail::append(report.warnings, opened.catalog.warnings);
    return report;
  });
}
}  // namespace detail

/// Saves what the checkpoint `from` holds as a checkpoint of another storage. Collective: ranks share the work, whatever number of them wrote the source.
///
/// Memory    on each rank what a save needs (SaveOptions::memory_bytes) and some MiB, however large the tensors are: bytes are read when they are written
/// Names     stay, ties too, or become what options.save.names says of a state that has the source's names; quantized tensors become options.decode_to; values go where the target has a place for them, and into its commit record
/// Verified  as a load does, every chunk of the source once
/// Throws    what opening the source and saving throw; Error(missing_entry) for a name in options.only that selects nothing
/// Example   dcp::convert<dcp::TorchDcp, dcp::SafeTensors>(world, "run/step-100", "export", {.only = {"model"}});
template <class From, class To, class C>
Report convert(C& comm, place_of<From> const& from, place_of<To> const& to, ConvertOptions<From, To> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<From, C> source;
  [[maybe_unused]] detail::verb_arguments<To, C> target;
  [[maybe_unused]] detail::a_writable_storage<detail::can_be_written<To>()> writable;
  if constexpr (Storage<From> && Storage<To> && Communicator<C>) {
    return detail::convert_checkpoint(CommRef{comm}, *From::open(options.load.storage), From::locate(from), *To::open(options.save.storage), To::locate(to),
                                      {options.only, options.decode_to, detail::settings_of(options.load), detail::settings_of(options.save)});
  } else {
    return {};
  }
}

}  // namespace dcp
