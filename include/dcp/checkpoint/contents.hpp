// SPDX-License-Identifier: Apache-2.0
#pragma once
// contents: what a checkpoint holds, from its headers alone.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/read_plan.hpp>
#include <dcp/checkpoint/save.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

/// A tensor of a checkpoint, as load knows it.
struct TensorContents {
  std::string name;
  DType dtype{};                     // as stored; of an encoded tensor F32, which it becomes if nothing else is asked for
  Extents shape;
  std::string scheme;                // how it is encoded; empty: it is stored as it is
  std::vector<std::string> parts;    // that it is encoded in
  std::vector<std::string> files;    // that it lies in
  std::uint64_t stored_bytes = 0;    // of all parts
};
struct Contents {
  std::vector<TensorContents> tensors;                 // in name order
  std::vector<std::pair<std::string, Value>> values;
  std::vector<std::pair<std::string, std::string>> ties;   // a name, and the name under which it is stored
  std::vector<std::pair<std::string, std::uint64_t>> files;   // data files, and their bytes
  std::vector<std::string> warnings;
  bool foreign = false;                                // no commit record: another program wrote it, and nothing but its format says what is right
};

namespace detail {
template <class = Deferred>
Contents contents_of(OpenedCheckpoint const& opened) {
  Catalog const& catalog = opened.catalog;
  Contents contents;
  for (auto const& tensor : catalog.tensors) {
    TensorContents entry{tensor.name, tensor.dtype, tensor.shape, {}, {}, {}, 0};
    if (tensor.encoding != nullptr) {
      entry.scheme = tensor.encoding->scheme();
      for (auto const& part : tensor.encoding->parts()) entry.parts.push_back(part.name);
    }
    for_each_stored_piece(tensor, [&](DType dtype, StoredPiece const& piece) {
      entry.stored_bytes += bytes_of(dtype, static_cast<std::int64_t>(piece.box.size()));
      std::string const& file = catalog.files[piece.file].path;
      if (std::find(entry.files.begin(), entry.files.end(), file) == entry.files.end()) entry.files.push_back(file);
    });
    contents.tensors.push_back(std::move(entry));
  }
  contents.values = catalog.values;
  for (auto const& tie : catalog.ties) contents.ties.emplace_back(tie.dropped, tie.kept);
  for (auto const& file : catalog.files) contents.files.emplace_back(file.path, file.size);
  contents.warnings = catalog.warnings;
  contents.foreign = !opened.record;
  return contents;
}
template <class = Deferred>
Contents read_contents(CommRef comm, AnyStorage const& storage, PlaceRef const& place, LoadSettings const& settings) {
  return again_if_replaced(comm, *place.medium, place.path, [&](Sighting& seen) { return contents_of(open_checkpoint(comm, storage, *place.medium, place.path, settings.verify, seen)); });
}
}  // namespace detail

/// Names, dtypes, shapes, schemes and sizes, without reading a tensor. Collective; equal on all ranks.
///
/// Throws    what load throws of a checkpoint that cannot be opened
/// Example   for (auto const& t : dcp::contents<dcp::Quantized<dcp::AnyScheme, dcp::SafeTensors>>(self, "model").tensors) std::cout << t.name << ' ' << t.scheme << '\n';
template <class S, class C>
Contents contents(C& comm, place_of<S> const& place, LoadOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  if constexpr (Storage<S> && Communicator<C>) return detail::read_contents(CommRef{comm}, *S::open(options.storage), S::locate(place), detail::settings_of(options));
  else return {};
}

}  // namespace dcp
