// SPDX-License-Identifier: Apache-2.0
#pragma once
// remove: deletes a checkpoint and everything beside it that could take its place again.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/place.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/agree.hpp>

#include <string>

namespace dcp {
namespace detail {

template <class = Deferred>
void remove_checkpoint(CommRef comm, PlaceRef const& target) {
  AnyMedium& medium = *target.medium;
  agree(comm, "remove", [&] {
    if (comm.rank() != 0) return;
    std::string const place = medium.resolve_place(target.path);
    Occupant const occupant = look_at(medium, place);
    if (occupant.kind == Occupant::Kind::foreign) throw Error{ErrorCode::unsupported, "this is no checkpoint of this library, and is left alone"}.with_path(place);
    auto const siblings = siblings_of(medium, place, occupant.record);
    if (occupant.kind == Occupant::Kind::nothing && siblings.empty()) throw Error{ErrorCode::not_found, "there is no checkpoint"}.with_path(place);
    // Old ones first: a load that finds no checkpoint at the place takes the newest beside it.
    for (auto const& sibling : siblings) {
      auto const lease = medium.acquire_lease(sibling.path + '/' + std::string{lease_name});
      if (!lease) throw Error{ErrorCode::already_exists, "a save to this place is under way"}.with_path(sibling.path);
      remove_with_record_first(medium, sibling.path);
    }
    // Where attempts lie below the place, one of them may have become the checkpoint meanwhile.
    if (occupant.kind == Occupant::Kind::checkpoint || !medium.renames_directories()) remove_with_record_first(medium, place);
  });
}

}  // namespace detail

/// Deletes the checkpoint at `place`, and attempts beside it. Collective; rank 0 does it.
///
/// Throws    Error on all ranks: not_found, unsupported for a directory that is no checkpoint, already_exists while a save is under way
/// Example   dcp::remove<dcp::SafeTensors>(world, "ckpt/step-100");
template <class S, class C>
void remove(C& comm, place_of<S> const& place) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  if constexpr (Storage<S> && Communicator<C>) detail::remove_checkpoint(CommRef{comm}, S::locate(place));
}

}  // namespace dcp
