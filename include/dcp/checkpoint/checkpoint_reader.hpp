// SPDX-License-Identifier: Apache-2.0
#pragma once
// A checkpoint that stays open: what it holds, and any box of any tensor, without a state.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/catalog_reader.hpp>
#include <dcp/checkpoint/contents.hpp>
#include <dcp/checkpoint/convert.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/comm/self.hpp>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace dcp {
namespace detail {
template <class = Deferred>
struct ReaderState {
  std::unique_ptr<AnyStorage> storage;
  std::shared_ptr<AnyMedium> medium;
  OpenedCheckpoint opened;
  Contents contents;
  std::unique_ptr<CatalogReader<>> reader;
};
}  // namespace detail

/// Reads from a checkpoint on one process alone, in any order, by several threads at once. Copies read the same.
///
/// Example   auto reader = dcp::CheckpointReader::open<dcp::TorchDcp>("ckpt/step-100");
///           std::vector<dcp::bf16> rows(8 * 4096);
///           reader.read("model.embed.weight", {{100, 0}, {8, 4096}}, std::as_writable_bytes(std::span{rows}));
class CheckpointReader {
 public:
  /// Throws    what load throws of a checkpoint that cannot be opened
  template <class S>
  static CheckpointReader open(place_of<S> const& place, LoadOptions<S> const& options = {}) {
    [[maybe_unused]] detail::a_storage<S> check;
    return CheckpointReader{S::open(options.storage), S::locate(place), options.verify};
  }

  template <class = Deferred>
  Contents const& contents() const { return state_->contents; }

  /// `box` of the tensor `name`, dense and row-major: as it is stored, or decoded to the dtype that contents() says.
  ///
  /// Throws    Error(missing_entry); Error(invalid_argument) for a box that is no part of the tensor, and for memory of another size; Error(corrupt)
  template <class = Deferred>
  void read(std::string_view name, Box const& box, ByteSpan out) {
    CatalogTensor const* tensor = state_->opened.catalog.find_tensor(state_->opened.catalog.stored_name(std::string{name}));
    if (tensor == nullptr) throw Error{ErrorCode::missing_entry, json_quoted(name) + ": the checkpoint has no tensor of this name"};
    Box common;
    if (box.rank() != tensor->shape.rank() || (!box.empty() && (!intersect(box, Box::whole(tensor->shape), common) || !(common == box))))
      throw Error{ErrorCode::invalid_argument, std::string{name} + ": " + to_string(box) + " is no part of " + to_string(tensor->shape)};
    if (out.size() != bytes_of(tensor->dtype, static_cast<std::int64_t>(box.size())))
      throw Error{ErrorCode::invalid_argument, std::string{name} + ": " + std::to_string(out.size()) + " bytes of memory for " + std::to_string(bytes_of(tensor->dtype, static_cast<std::int64_t>(box.size())))};
    if (!box.empty()) state_->reader->read(*tensor, box, tensor->dtype, out.data());
  }

 private:
  template <class = Deferred>
  CheckpointReader(std::unique_ptr<AnyStorage> storage, PlaceRef place, Verify verify) : state_{std::make_shared<detail::ReaderState<>>()} {
    SelfComm self;
    CommRef const comm{self};
    detail::again_if_replaced(comm, *place.medium, place.path, [&](detail::Sighting& seen) {
      state_->opened = detail::open_checkpoint(comm, *storage, *place.medium, place.path, verify, seen);
      detail::locate_pieces(*storage, *place.medium, state_->opened, {});
      return 0;
    });
    state_->contents = detail::contents_of(state_->opened);
    state_->storage = std::move(storage);
    state_->medium = std::move(place.medium);
    state_->reader = std::make_unique<detail::CatalogReader<>>(*state_->medium, state_->opened, verify);
  }

  std::shared_ptr<detail::ReaderState<>> state_;
};

}  // namespace dcp
