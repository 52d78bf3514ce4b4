// SPDX-License-Identifier: Apache-2.0
#pragma once
// The opening agreement: ranks make sure that they mean the same state before anything is touched. One small gather of digests;
// only distinct sets of names travel, each once.

#include <dcp/base/config.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/checkpoint/devices.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/plan/arrangement.hpp>
#include <dcp/plan/schema.hpp>
#include <dcp/plan/ties.hpp>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
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
  std::shared_ptr<Arrangement const> arrangement{};          // where the checkpoint has other tensors than these
  DevicesOfState devices{};                                  // of this rank's memory
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

/// Sorts `names(i)` for i < count, and says where each comes from.
template <class NameOf>
std::vector<std::size_t> order_by(std::size_t count, NameOf name_of) {
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return name_of(a) < name_of(b); });
  return order;
}
template <class T>
void reorder(std::vector<T>& list, std::vector<std::size_t> const& order) {
  std::vector<T> sorted;
  sorted.reserve(list.size());
  for (auto const i : order) sorted.push_back(std::move(list[i]));
  list = std::move(sorted);
}

/// Gives the entries of `state` the names that the checkpoint has for them, and finds out how tensors lie that it does not have as the state does; those keep their
/// names. Pure, and equal on all ranks.
/// Throws    what NameMap::stored_tensors throws; Error(duplicate_entry) for a tensor and a value of one name, Error(invalid_argument) for tied names of cut tensors
template <class = Deferred>
void map_names(AgreedState& state, NameMap const& names) {
  if (names.empty()) return;
  std::vector<MappedTensor> mapped;
  for (std::uint32_t t = 0; t < state.tensors.size(); ++t) {
    TensorSpec const& tensor = state.tensors[t];
    mapped.push_back({tensor.name, tensor.dtype, tensor.layout.shape, {PlacedBox::whole(t, tensor.layout.shape)}, false});
  }
  mapped = names.stored_tensors(std::move(mapped));
  reorder(mapped, order_by(mapped.size(), [&](std::size_t i) -> auto const& { return mapped[i].name; }));
  bool const cut = std::any_of(mapped.begin(), mapped.end(), [](MappedTensor const& tensor) { return tensor.cut; });

  std::vector<std::string> renamed(state.tensors.size());   // of tensors that are not cut
  for (auto const& tensor : mapped)
    if (!tensor.cut) renamed[tensor.from[0].tensor] = tensor.name;
  Problems problems;
  std::map<std::string, std::string> tied;   // of the state's names
  for (auto& tie : state.ties) {
    auto const at = std::lower_bound(state.tensors.begin(), state.tensors.end(), tie.kept, [](TensorSpec const& tensor, std::string const& name) { return tensor.name < name; });
    std::string const& kept = renamed[static_cast<std::size_t>(at - state.tensors.begin())];
    if (kept.empty()) problems.add(ErrorCode::invalid_argument, "names: " + tie.dropped + " is tied to " + tie.kept + ", which is cut: what has two names can only be renamed");
    std::string dropped = names.stored_name(tie.dropped);
    if (dropped != tie.dropped) tie.joints.clear();
    tie.dropped = std::move(dropped);
    tie.kept = kept;
  }
  problems.raise();
  // Names that the rules make one.
  std::erase_if(state.ties, [](Tie const& tie) { return tie.dropped == tie.kept; });
  detail::sort(state.ties);
  for (std::size_t t = 0; t < state.tensors.size(); ++t)
    if (!renamed[t].empty() && renamed[t] != state.tensors[t].name) state.tensors[t].name = std::move(renamed[t]), state.tensors[t].joints.clear();
  auto const tensors = order_by(state.tensors.size(), [&](std::size_t t) -> auto const& { return state.tensors[t].name; });
  reorder(state.tensors, tensors);
  reorder(state.local_tensors, tensors);
  for (auto& value : state.values)
    if (std::string name = names.stored_name(value.name); name != value.name) value.name = std::move(name), value.joints.clear();
  auto const values = order_by(state.values.size(), [&](std::size_t v) -> auto const& { return state.values[v].name; });
  reorder(state.values, values);
  reorder(state.local_values, values);

  auto const stored = [&](std::string const& name) {
    auto const at = std::lower_bound(mapped.begin(), mapped.end(), name, [](MappedTensor const& tensor, std::string const& wanted) { return tensor.name < wanted; });
    return at != mapped.end() && at->name == name;
  };
  for (std::size_t v = 0; v < state.values.size(); ++v)
    if (stored(state.values[v].name) || (v > 0 && state.values[v].name == state.values[v - 1].name)) problems.add(ErrorCode::duplicate_entry, "names: two entries would have the name " + state.values[v].name);
  for (std::size_t i = 0; i < state.ties.size(); ++i)
    if (stored(state.ties[i].dropped) || (i > 0 && state.ties[i].dropped == state.ties[i - 1].dropped)) problems.add(ErrorCode::duplicate_entry, "names: two entries would have the name " + state.ties[i].dropped);
  problems.raise();
  if (!cut) return;

  std::vector<std::uint32_t> number(tensors.size());   // of what was tensor i
  for (std::uint32_t t = 0; t < tensors.size(); ++t) number[tensors[t]] = t;
  auto arrangement = std::make_shared<Arrangement>();
  for (auto& tensor : mapped) {
    for (auto& box : tensor.from) box.tensor = number[box.tensor];
    Layout layout;
    layout.shape = layout.split_shape = tensor.shape;
    if (tensor.cut) arrangement->tensors.push_back({tensor.name, tensor.dtype, layout});
    else arrangement->tensors.push_back(state.tensors[tensor.from[0].tensor]);
  }
  arrangement->from = std::move(mapped);
  state.arrangement = std::move(arrangement);
}

/// Collective. Throws the same Error on every rank: of local mistakes (duplicate names, overlapping memory), of differences between
/// ranks (options, layouts, values), of tensors that a rank of their mesh does not list.
///
/// `saving`: whether values are compared and partial tensors refused. `names`: of the checkpoint. `streams`: of the program, on devices
template <class = Deferred>
AgreedState agree_state(CommRef comm, std::string_view phase, StateDict const& state, std::string_view options, bool saving, NameMap const& names, std::vector<DeviceStream> const& streams) {
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
    agree(comm, phase, [&] {
      check_own_part(agreed, comm.rank(), saving);
      map_names(agreed, names);
      agreed.devices = DevicesOfState::of(agreed.local_tensors, streams);
    });
    return agreed;
  } catch (Error& error) {
    throw error.with_phase(std::string{phase});
  }
}

}  // namespace dcp::detail
