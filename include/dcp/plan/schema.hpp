// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a state consists of, without its data: the part that ranks agree on before anything is read or written.

#include <dcp/base/config.hpp>
#include <dcp/base/checksum.hpp>
#include <dcp/base/algorithms.hpp>
#include <dcp/base/problems.hpp>
#include <dcp/core/state_dict.hpp>
#include <dcp/plan/shares.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dcp {

/// One entry of a state, as every rank that lists it describes it.
struct SchemaEntry {
  std::string name;
  bool is_tensor = true;
  DType dtype{};                 // of a tensor, or of a number or array
  Layout layout;                 // of a tensor
  ValueKind value_kind{};        // of a value
  bool per_rank = false;         // of a value
  std::uint64_t value_crc = 0;   // of a value that is no per-rank one: all ranks must hold the same
  std::int64_t first_rank = 0;   // the lowest rank that lists the entry
  NameJoints joints{};           // of the name, where that rank lists it; without StateDict's marks
};

/// `dropped` is stored as `kept`.
struct Tie {
  std::string dropped, kept;
  NameJoints joints{};   // of the dropped name; without StateDict's marks. Not known of ties that were read
  friend bool operator==(Tie const&, Tie const&) = default;
  friend auto operator<=>(Tie const&, Tie const&) = default;
};

struct Schema {
  std::vector<SchemaEntry> entries;   // sorted by name
  std::vector<Tie> ties;              // sorted

  template <class = Deferred>
  SchemaEntry const* find(std::string_view name) const {
    auto const at = std::lower_bound(entries.begin(), entries.end(), name, [](auto const& e, std::string_view n) { return e.name < n; });
    return at != entries.end() && at->name == name ? &*at : nullptr;
  }
};

namespace detail {
template <class = Deferred>
void encode_layout(ByteWriter& out, Layout const& layout) {
  out.number(layout.shape.rank());
  for (int d = 0; d < layout.shape.rank(); ++d) out.number(layout.shape[d]).number(layout.split_shape[d]);
  out.number(layout.everywhere).number(layout.mesh.axes).number(layout.mesh.world).number(layout.mesh.base);
  for (std::size_t a = 0; a < static_cast<std::size_t>(layout.mesh.axes); ++a)
    out.number(layout.mesh.extents[a]).number(layout.mesh.strides[a]).number(layout.rules[a].kind).number(layout.rules[a].dim).number(layout.rules[a].step);
  FlatSlot const& flat = layout.flat;
  if (flat_axis(layout) >= 0) out.number(flat.offset).number(flat.elements).number(flat.ranks).number(flat.shard).number(flat.ranges.digest());
}
// The ranges of flat buckets are as long as a job has ranks, and all tensors of a bucket have the same.
using RangesByDigest = std::map<std::uint64_t, SharedRanges>;
template <class = Deferred>
Layout decode_layout(ByteReader& in, RangesByDigest const& ranges) {
  Layout layout;
  int const rank = std::clamp(in.number<int>(), 0, max_rank);
  layout.shape = layout.split_shape = Extents::filled(rank, 0);
  for (int d = 0; d < rank; ++d) layout.shape[d] = in.number<std::int64_t>(), layout.split_shape[d] = in.number<std::int64_t>();
  layout.everywhere = in.number<bool>();
  layout.mesh.axes = std::clamp(in.number<int>(), 0, max_axes);
  layout.mesh.world = in.number<std::int64_t>(), layout.mesh.base = in.number<std::int64_t>();
  for (std::size_t a = 0; a < static_cast<std::size_t>(layout.mesh.axes); ++a) {
    layout.mesh.extents[a] = in.number<std::int64_t>(), layout.mesh.strides[a] = in.number<std::int64_t>();
    layout.rules[a].kind = in.number<RuleKind>(), layout.rules[a].dim = in.number<int>(), layout.rules[a].step = in.number<int>();
  }
  if (flat_axis(layout) >= 0) {
    layout.flat.offset = in.number<std::int64_t>(), layout.flat.elements = in.number<std::int64_t>();
    layout.flat.ranks = in.number<std::int64_t>(), layout.flat.shard = in.number<std::int64_t>();
    if (auto const at = ranges.find(in.number<std::uint64_t>()); at != ranges.end()) layout.flat.ranges = at->second;
  }
  return layout;
}
}  // namespace detail

/// Joints and ties in a message, and out of it.
template <class = Deferred>
void put(ByteWriter& out, NameJoints const& joints) {
  out.number(static_cast<std::uint8_t>(joints.size()));
  for (auto const joint : joints) out.number(joint);
}
template <class = Deferred>
NameJoints take_joints(ByteReader& in) {
  NameJoints joints;
  for (auto count = in.number<std::uint8_t>(); count > 0 && in.ok(); --count) joints.push_back(in.number<std::uint32_t>());
  return joints;
}
template <class = Deferred>
void put(ByteWriter& out, Tie const& tie) {
  out.text(tie.dropped).text(tie.kept);
  put(out, tie.joints);
}
template <class = Deferred>
Tie take_tie(ByteReader& in) {
  Tie tie;
  tie.dropped = in.text(), tie.kept = in.text(), tie.joints = take_joints(in);
  return tie;
}

/// `values`: with the CRCs of values; without, 0 stands for each.
template <class = Deferred>
Bytes encode_entries(std::vector<SchemaEntry> const& entries, bool values) {
  ByteWriter out;
  out.number<std::uint64_t>(entries.size());
  for (auto const& entry : entries) {
    out.text(entry.name).number(entry.is_tensor).number(entry.dtype).number(entry.value_kind).number(entry.per_rank).number(values ? entry.value_crc : 0);
    put(out, entry.joints);
    if (entry.is_tensor) detail::encode_layout(out, entry.layout);
  }
  return out.take();
}
template <class = Deferred>
Bytes encode(Schema const& schema) {
  detail::RangesByDigest ranges;
  for (auto const& entry : schema.entries)
    if (entry.layout.flat.ranges) ranges.emplace(entry.layout.flat.ranges.digest(), entry.layout.flat.ranges);
  ByteWriter out;
  out.number<std::uint64_t>(ranges.size());
  for (auto const& [digest, list] : ranges) out.number(digest).block(std::as_bytes(std::span{list.by_coordinate()}));
  out.raw(encode_entries(schema.entries, true)).number<std::uint64_t>(schema.ties.size());
  for (auto const& tie : schema.ties) put(out, tie);
  return out.take();
}
template <class = Deferred>
Schema decode_schema(ConstByteSpan bytes) {
  ByteReader in{bytes};
  Schema schema;
  detail::RangesByDigest ranges;
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    auto const digest = in.number<std::uint64_t>();
    auto const block = in.block();
    std::vector<FlatRange> list(block.size() / sizeof(FlatRange));
    if (!list.empty()) std::memcpy(list.data(), block.data(), list.size() * sizeof(FlatRange));
    ranges.emplace(digest, detail::SharedRanges{std::move(list)});
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    SchemaEntry& entry = schema.entries.emplace_back();
    entry.name = in.text(), entry.is_tensor = in.number<bool>(), entry.dtype = in.number<DType>(), entry.value_kind = in.number<ValueKind>();
    entry.per_rank = in.number<bool>(), entry.value_crc = in.number<std::uint64_t>();
    entry.joints = take_joints(in);
    if (entry.is_tensor) entry.layout = detail::decode_layout(in, ranges);
  }
  for (auto count = in.number<std::uint64_t>(); count > 0 && in.ok(); --count) {
    schema.ties.push_back(take_tie(in));
  }
  return schema;
}

/// What ranks compare: equal digests, equal names, dtypes, shapes and layouts. The values' contents stay out; they have their own.
template <class = Deferred>
std::uint64_t schema_digest(Schema const& schema) { return crc64(encode_entries(schema.entries, false)); }
template <class = Deferred>
std::uint64_t values_digest(Schema const& schema) {
  ByteWriter out;
  for (auto const& entry : schema.entries)
    if (!entry.is_tensor && !entry.per_rank) out.number(entry.value_crc);
  return crc64(out.bytes());
}

/// The CRC by which ranks compare a value.
template <class = Deferred>
std::uint64_t value_crc(Value const& value) { return crc64(as_byte_span(to_json(value))) ^ static_cast<std::uint64_t>(value.dtype); }

/// Entries of `state` sorted by name, as indices into state.entries(). Throws Error(duplicate_entry), listing all names that come twice.
template <class = Deferred>
std::vector<std::size_t> sorted_entries(StateDict const& state) {
  auto const& entries = state.entries();
  std::vector<std::size_t> order(entries.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return entries[a].name < entries[b].name; });
  Problems problems;
  for (std::size_t i = 1; i < order.size(); ++i)
    if (entries[order[i]].name == entries[order[i - 1]].name) problems.add(ErrorCode::duplicate_entry, entries[order[i]].name + ": the state has two entries of this name");
  problems.raise();
  return order;
}

/// What the object of a value entry holds now. An error says of which entry.
template <class = Deferred>
Value value_now(StateEntry const& entry) {
  try {
    return entry.value.ops->encode(entry.value.object);
  } catch (Error const& error) {
    throw Error{error.code(), entry.name + ": " + error.message()};
  }
}

/// The joints of an entry's name, without StateDict's marks.
template <class = Deferred>
NameJoints unmarked_joints(StateEntry const& entry) {
  NameJoints joints;
  for (auto const joint : entry.joints)
    if (joints.size() < UINT8_MAX) joints.push_back(joint & ~StateDict::joint_of_object);
  return joints;
}

/// The schema of this rank's state, without ties found in memory. `with_values`: also the CRCs of values. `sorted`: of sorted_entries.
template <class = Deferred>
Schema local_schema(StateDict const& state, bool with_values, std::vector<std::size_t> const& sorted) {
  Schema schema;
  schema.entries.reserve(state.entries().size());
  for (auto const i : sorted) {
    StateEntry const& from = state.entries()[i];
    if (from.kind == StateEntry::Kind::tie) {
      schema.ties.push_back({from.name, from.tie.kept, unmarked_joints(from)});
      continue;
    }
    SchemaEntry& entry = schema.entries.emplace_back();
    entry.name = from.name;
    entry.joints = unmarked_joints(from);
    if (from.tensor) {
      entry.dtype = from.tensor->dtype;
      entry.layout = from.tensor->layout;
    } else {
      entry.is_tensor = false;
      entry.value_kind = from.value.ops->kind;
      entry.dtype = from.value.ops->dtype;
      entry.per_rank = from.value.per_rank;
      if (with_values && !entry.per_rank) entry.value_crc = value_crc(value_now(from));
    }
  }
  return schema;
}
template <class = Deferred>
Schema local_schema(StateDict const& state, bool with_values) { return local_schema(state, with_values, sorted_entries(state)); }

/// A plain tensor that every kind of rank lists is replicated over all ranks; otherwise its first rank stands for it.
template <class = Deferred>
void bind_to_ranks(SchemaEntry& entry, bool on_all, std::int64_t ranks, Problems& problems) {
  Layout& layout = entry.layout;
  if (layout.everywhere) layout = on_all ? replicated_layout(layout.shape, ranks) : single_rank_layout(layout.shape, entry.first_rank, ranks);
  else if (layout.mesh.world != ranks)
    problems.add(ErrorCode::invalid_argument, entry.name + ": its mesh was made for a communicator of " + std::to_string(layout.mesh.world) + " ranks, and this one has " + std::to_string(ranks));
}

/// The schemas of all distinct kinds of rank as one. `parts[i]` comes from rank `first_rank[i]`, the lowest of its kind.
///
/// Throws    Error(ranks_disagree) listing every entry that two kinds describe differently, with a rank of each;
///           Error(invalid_argument) for a tensor whose mesh was made for another number of ranks
template <class = Deferred>
Schema merge_schemas(std::vector<Schema> parts, std::vector<std::int64_t> const& first_rank, std::int64_t ranks) {
  Schema all;
  if (parts.size() == 1) {
    // One kind of rank: nothing to compare, and entries stay where they are.
    all = std::move(parts[0]);
    detail::sort(all.ties);
    all.ties.erase(std::unique(all.ties.begin(), all.ties.end()), all.ties.end());
    Problems wrong;
    for (auto& entry : all.entries) {
      entry.first_rank = first_rank[0];
      if (entry.is_tensor) bind_to_ranks(entry, true, ranks, wrong);
    }
    wrong.raise();
    return all;
  }
  std::vector<SchemaEntry*> entries;   // entries are large: pointers are sorted
  std::vector<std::ptrdiff_t> begins;  // of sorted stretches
  for (std::size_t p = 0; p < parts.size(); ++p) {
    begins.push_back(static_cast<std::ptrdiff_t>(entries.size()));
    for (auto& entry : parts[p].entries) {
      entry.first_rank = first_rank[p];
      entries.push_back(&entry);
    }
    detail::append(all.ties, parts[p].ties);
  }
  begins.push_back(static_cast<std::ptrdiff_t>(entries.size()));
  while (begins.size() > 2) {
    std::vector<std::ptrdiff_t> merged{0};
    for (std::size_t i = 0; i + 1 < begins.size(); i += 2) {
      std::size_t const last = std::min(i + 2, begins.size() - 1);
      std::inplace_merge(entries.begin() + begins[i], entries.begin() + begins[i + 1], entries.begin() + begins[last], [](SchemaEntry const* a, SchemaEntry const* b) {
        int const order = a->name.compare(b->name);
        return order != 0 ? order < 0 : a->first_rank < b->first_rank;
      });
      merged.push_back(begins[last]);
    }
    begins = std::move(merged);
  }
  detail::sort(all.ties);
  all.ties.erase(std::unique(all.ties.begin(), all.ties.end()), all.ties.end());
  Problems problems;
  auto const both = [](SchemaEntry const& a, SchemaEntry const& b) { return " on rank " + std::to_string(a.first_rank) + " and on rank " + std::to_string(b.first_rank); };
  all.entries.reserve(entries.size());
  for (std::size_t i = 0; i < entries.size();) {
    SchemaEntry& entry = all.entries.emplace_back(std::move(*entries[i]));
    std::size_t same = i + 1;
    for (; same < entries.size() && entries[same]->name == entry.name; ++same) {
      SchemaEntry const& other = *entries[same];
      if (entry.is_tensor != other.is_tensor) problems.add(ErrorCode::ranks_disagree, entry.name + ": a tensor and a value of the same name," + both(entry, other));
      else if (!entry.is_tensor && (entry.value_kind != other.value_kind || entry.dtype != other.dtype || entry.per_rank != other.per_rank))
        problems.add(ErrorCode::ranks_disagree, entry.name + ": values of different types," + both(entry, other));
      else if (!entry.is_tensor && entry.value_crc != other.value_crc) problems.add(ErrorCode::ranks_disagree, entry.name + ": different values" + both(entry, other) + "; declare it per_rank, or make it equal");
      else if (entry.is_tensor && entry.dtype != other.dtype) problems.add(ErrorCode::ranks_disagree, entry.name + ": different dtypes" + both(entry, other));
      else if (entry.is_tensor && !(entry.layout.shape == other.layout.shape))
        problems.add(ErrorCode::ranks_disagree, entry.name + ": shape " + to_string(entry.layout.shape) + " and shape " + to_string(other.layout.shape) + both(entry, other));
      else if (entry.is_tensor && !(entry.layout == other.layout))
        problems.add(ErrorCode::ranks_disagree, entry.name + ": tensors on different meshes or placements have the same name" + both(entry, other) + "; give each its own name");
    }
    if (entry.is_tensor) {
      bind_to_ranks(entry, same - i == parts.size(), ranks, problems);
    } else if (entry.per_rank && same - i != parts.size()) {
      problems.add(ErrorCode::ranks_disagree, entry.name + ": a per-rank value must be listed by every rank, and rank " + std::to_string(entry.first_rank) + " lists it while others do not");
    }
    i = same;
  }
  problems.raise();
  return all;
}

}  // namespace dcp
