// SPDX-License-Identifier: Apache-2.0
#pragma once
// The opening agreement: ranks make sure that they mean the same state before anything is touched. One small gather of digests;
// only distinct sets of names travel, each once.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/plan/schema.hpp>
#include <dcp/plan/ties.hpp>

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace dcp::detail {

/// The state as all ranks see it, and where this rank's entries are.
struct AgreedState {
  std::vector<TensorSpec> tensors;                           // in name order, tied names taken out
  std::vector<StateEntry const*> local_tensors;              // of each, nullptr if this rank does not list it
  std::vector<SchemaEntry> values;                           // in name order
  std::vector<StateEntry const*> local_values;
  std::vector<Tie> ties;                                     // sorted
};

template <class = Deferred>
std::map<std::string_view, StateEntry const*> entries_by_name(StateDict const& state) {
  std::map<std::string_view, StateEntry const*> entries;
  for (auto const& entry : state.entries()) entries.emplace(entry.name, &entry);
  return entries;
}

/// Ties that any rank found in its memory or declared, once no rank that holds elements speaks against them. Collective.
template <class = Deferred>
std::vector<Tie> agree_ties(CommRef comm, std::string_view phase, StateDict const& state, std::vector<Tie> mine) {
  detail::sort(mine);
  ByteWriter message;
  for (auto const& tie : mine) put(message, tie);
  auto const digests = all_gather_value(comm, crc64(message.bytes()));
  if (std::equal(digests.begin() + 1, digests.end(), digests.begin())) return mine;
  std::vector<Tie> all;
  std::vector<int> from;
  auto const messages = all_gather_bytes(comm, message.bytes());
  for (std::size_t r = 0; r < messages.size(); ++r)
    for (ByteReader in{messages[r]}; !in.done();) {
      Tie tie = take_tie(in);
      if (!in.ok()) break;
      if (std::find(all.begin(), all.end(), tie) == all.end()) all.push_back(std::move(tie)), from.push_back(static_cast<int>(r));
    }
  agree(comm, phase, [&] {
    auto const entries = entries_by_name(state);
    Problems problems;
    for (std::size_t i = 0; i < all.size(); ++i) {
      auto const dropped = entries.find(all[i].dropped), kept = entries.find(all[i].kept);
      if (dropped == entries.end() || kept == entries.end() || !dropped->second->tensor || !kept->second->tensor) continue;
      if (!has_elements(dropped->second->tensor->layout, comm.rank()) || same_memory(*dropped->second, *kept->second)) continue;
      problems.add(ErrorCode::ranks_disagree, all[i].dropped + " and " + all[i].kept + " are one tensor on rank " + std::to_string(from[i]) + " and two on rank " + std::to_string(comm.rank()));
    }
    problems.raise();
  });
  detail::sort(all);
  return all;
}

/// Values that differ between ranks with the same names: finds them, once digests have shown that there are some. Collective.
template <class = Deferred>
[[noreturn]] void raise_differing_values(CommRef comm, Schema const& mine, std::vector<std::uint64_t> const& kinds) {
  ByteWriter message;
  for (auto const& entry : mine.entries)
    if (!entry.is_tensor && !entry.per_rank) message.text(entry.name).number(entry.value_crc);
  auto const messages = all_gather_bytes(comm, message.bytes());
  std::map<std::pair<std::uint64_t, std::string>, std::pair<std::uint64_t, std::size_t>> first;   // (kind, name) -> crc, rank
  Problems problems;
  for (std::size_t r = 0; r < messages.size(); ++r)
    for (ByteReader in{messages[r]}; !in.done() && in.ok();) {
      std::string name = in.text();
      auto const crc = in.number<std::uint64_t>();
      auto const [at, fresh] = first.try_emplace({kinds[r], name}, crc, r);
      if (!fresh && at->second.first != crc) {
        problems.add(ErrorCode::ranks_disagree, name + ": rank " + std::to_string(at->second.second) + " and rank " + std::to_string(r) + " hold different values");
        at->second.first = crc;
      }
    }
  problems.hint("a value that every rank has its own of is declared with dcp::per_rank");
  problems.raise();
  throw Error{ErrorCode::ranks_disagree, "ranks hold different values"};
}

/// What distinct kinds of rank mean together, and where the entries of this rank are. `parts[i]` comes from rank `first_rank[i]`; `ties`
/// are sorted, `sorted` is of sorted_entries(state). Pure, and but for the pointers equal on all ranks, as are its errors.
template <class = Deferred>
AgreedState merge_states(std::vector<Schema> parts, std::vector<std::int64_t> const& first_rank, std::vector<Tie> ties, StateDict const& state, std::vector<std::size_t> const& sorted, std::int64_t ranks) {
  Schema schema = merge_schemas(std::move(parts), first_rank, ranks);
  auto const is_tied = [&](std::string const& name) {
    auto const at = std::lower_bound(ties.begin(), ties.end(), name, [](Tie const& tie, std::string const& dropped) { return tie.dropped < dropped; });
    return at != ties.end() && at->dropped == name;
  };
  Problems problems;
  for (auto const& tie : ties) {
    auto const* kept = schema.find(tie.kept);
    if (kept == nullptr || !kept->is_tensor) problems.add(ErrorCode::missing_entry, tie.dropped + ": tied to " + tie.kept + ", which is no tensor of the state");
    else if (is_tied(tie.kept)) problems.add(ErrorCode::invalid_argument, tie.dropped + ": tied to " + tie.kept + ", which is itself tied; tie both to the same name");
  }
  problems.raise();
  AgreedState agreed;
  agreed.tensors.reserve(schema.entries.size());
  agreed.local_tensors.reserve(schema.entries.size());
  auto next = sorted.begin();   // names of both are sorted
  for (auto& entry : schema.entries) {
    if (is_tied(entry.name)) continue;
    while (next != sorted.end() && state.entries()[*next].name < entry.name) ++next;
    StateEntry const* here = next != sorted.end() && state.entries()[*next].name == entry.name ? &state.entries()[*next] : nullptr;
    if (entry.is_tensor) {
      agreed.tensors.push_back({std::move(entry.name), entry.dtype, std::move(entry.layout), std::move(entry.joints)});
      agreed.local_tensors.push_back(here);
    } else {
      agreed.values.push_back(std::move(entry));
      agreed.local_values.push_back(here);
    }
  }
  agreed.ties = std::move(ties);
  return agreed;
}

/// What only this rank can find wrong with what was agreed on.
template <class = Deferred>
void check_own_part(AgreedState const& agreed, std::int64_t rank, bool saving) {
  Problems wrong;
  for (std::size_t t = 0; t < agreed.tensors.size(); ++t) {
    TensorSpec const& tensor = agreed.tensors[t];
    bool const in_mesh = tensor.layout.mesh.coordinate_of(rank).has_value();
    if (in_mesh && agreed.local_tensors[t] == nullptr)
      wrong.add(ErrorCode::ranks_disagree, tensor.name + ": rank " + std::to_string(rank) + " belongs to the tensor's mesh, but does not list it");
    for (auto const& rule : tensor.layout.rules)
      if (saving && rule.kind == RuleKind::partial) wrong.add(ErrorCode::invalid_argument, tensor.name + ": a tensor with Partial axes holds unreduced terms and has no single value to save; all-reduce it first");
    if (in_mesh && agreed.local_tensors[t] != nullptr) {
      bool whole = true;
      if (bits_of(tensor.dtype) % 8 != 0)
        for_each_held_box(held_part(tensor.layout, rank), tensor.dtype, agreed.local_tensors[t]->tensor->memory,
                          [&](Box const& box, MemoryView const&) { whole = whole && on_byte_boundaries(tensor.dtype, box, Box::whole(tensor.layout.shape)); });
      if (!whole) wrong.add(ErrorCode::misaligned, tensor.name + ": its layout cuts a byte of " + std::string{to_string(tensor.dtype)} + " elements on rank " + std::to_string(rank));
    }
  }
  wrong.raise();
}

/// Collective. Throws the same Error on every rank: of local mistakes (duplicate names, overlapping memory), of differences between
/// ranks (options, layouts, values), of tensors that a rank of their mesh does not list.
///
/// `saving`: whether values are compared and partial tensors refused
template <class = Deferred>
AgreedState agree_state(CommRef comm, std::string_view phase, StateDict const& state, std::string_view options, bool saving) {
  struct Local {
    std::vector<std::size_t> sorted;
    Schema schema;
    std::vector<Tie> ties;
  };
  Local local = agree(comm, phase, [&] {
    auto sorted = sorted_entries(state);
    Schema schema = local_schema(state, saving, sorted);
    return Local{std::move(sorted), std::move(schema), find_ties(state, comm.rank())};
  });
  struct Digests {
    std::uint64_t schema, values, options;
  };
  auto const digests = all_gather_value(comm, Digests{schema_digest(local.schema), values_digest(local.schema), crc64(as_byte_span(options))});
  auto const annotated = [&](Error error) { return error.with_phase(std::string{phase}); };
  for (std::size_t r = 1; r < digests.size(); ++r)
    if (digests[r].options != digests[0].options)
      throw annotated(Error{ErrorCode::ranks_disagree, "rank 0 and rank " + std::to_string(r) + " were given different options or places"}.with_hint("here: " + std::string{options}));

  std::vector<Tie> declared = local.schema.ties;
  append(declared, local.ties);
  detail::sort(declared);
  declared.erase(std::unique(declared.begin(), declared.end()), declared.end());
  std::vector<Tie> ties = agree_ties(comm, phase, state, std::move(declared));

  // Distinct kinds of rank, each by its lowest rank.
  std::vector<std::uint64_t> kinds, kind_values;
  std::vector<std::int64_t> first_rank;
  std::vector<std::uint64_t> kind_of;
  bool values_differ = false;
  for (std::size_t r = 0; r < digests.size(); ++r) {
    kind_of.push_back(digests[r].schema);
    auto const known = std::find(kinds.begin(), kinds.end(), digests[r].schema);
    if (known == kinds.end()) {
      kinds.push_back(digests[r].schema);
      kind_values.push_back(digests[r].values);
      first_rank.push_back(static_cast<std::int64_t>(r));
    } else if (kind_values[static_cast<std::size_t>(known - kinds.begin())] != digests[r].values) {
      values_differ = true;
    }
  }
  try {
    if (values_differ) raise_differing_values(comm, local.schema, kind_of);
    std::vector<Schema> parts;
    for (std::size_t k = 0; k < kinds.size(); ++k) {
      if (kinds.size() == 1) {
        parts.push_back(std::move(local.schema));
        break;
      }
      Bytes bytes;
      if (first_rank[k] == comm.rank()) bytes = encode(local.schema);
      broadcast_bytes(comm, bytes, static_cast<int>(first_rank[k]));
      parts.push_back(decode_schema(bytes));
    }
    AgreedState agreed = merge_states(std::move(parts), first_rank, std::move(ties), state, local.sorted, comm.size());
    agree(comm, phase, [&] { check_own_part(agreed, comm.rank(), saving); });
    return agreed;
  } catch (Error& error) {
    throw error.with_phase(std::string{phase});
  }
}

}  // namespace dcp::detail
