// SPDX-License-Identifier: Apache-2.0
#pragma once
// reshard: one live state into another of the same job, in memory: the same names, other placements or meshes.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/load.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace dcp {

struct ReshardOptions {
  OnMissing on_missing = OnMissing::error;              // `to` wants what `from` lacks
  OnUnexpected on_unexpected = OnUnexpected::error;     // `from` holds what `to` lacks
  std::vector<DeviceStream> on = {};                    // the program's streams, of each device that has tensors: dcp::on(stream). What is in them comes first
  std::uint64_t memory_bytes = default_memory_bytes;    // of messages on this rank, at least 16 MiB
};

namespace detail {

/// A part of a tensor that this rank sends to another, and how far it has got.
struct OutgoingPart {
  std::uint32_t tensor;
  int to;
  Box part;
  Transfer transfer;      // from memory to a dense array of the part
  std::int64_t sent = 0;  // elements
  std::shared_ptr<DeviceHere const> device{};   // whose memory it is
};

/// The rank that sends a cell of `from` to rank `to`: itself if it holds the cell, else one of the replicas, by turns.
template <class = Deferred>
std::int64_t sender_of(Layout const& from, MeshGeometry::Coordinate const& cell, std::int64_t to) {
  auto const there = from.mesh.coordinate_of(to);
  if (there && cell_index(from, *there) == cell_index(from, cell)) return to;
  return from.mesh.rank_at(replica_coordinate(from, cell, to % replicas(from)));
}

template <class = Deferred>
void refuse_shared_memory(StateDict const& from, StateDict const& to, std::int64_t rank) {
  Problems problems;
  auto const sources = local_memory(from, rank), targets = local_memory(to, rank);
  for (auto const& source : sources)
    for (auto const& target : targets)
      if (source.begin < target.end && target.begin < source.end && runs_meet(source, target))
        problems.add(ErrorCode::overlapping_memory, target.entry->name + ": its memory is also that of " + source.entry->name + " in the other state; reshard needs two of them");
  problems.raise();
}

template <class = Deferred>
Report reshard_state(CommRef comm, StateDict const& from, StateDict const& to, ReshardOptions const& options) {
  Stopwatch watch;
  Report report;
  report.operation = "reshard";
  report.place = "memory";
  watch.enter("agree");
  LoadSettings settings;
  settings.on_missing = options.on_missing;
  settings.on_unexpected = options.on_unexpected;
  report.options = options_text(settings);
  agree(comm, "reshard: agree", [&] {
    check_resources(options.memory_bytes, 1);
    refuse_shared_memory(from, to, comm.rank());
  });
  AgreedState const source = agree_state(comm, "reshard: agree", from, report.options, true, {}, options.on);
  AgreedState const target = agree_state(comm, "reshard: agree", to, report.options, false, {}, options.on);

  watch.enter("plan");
  // The source as a catalog: what is there, without saying where.
  Catalog catalog;
  for (auto const& tensor : source.tensors) catalog.tensors.push_back({tensor.name, tensor.dtype, tensor.layout.shape, {}, {}});
  catalog.ties = source.ties;
  for (auto const& value : source.values) {
    Value known{value.per_rank ? ValueKind::per_rank : value.value_kind, value.dtype, {}, {}};
    if (value.per_rank) known.ranks.assign(static_cast<std::size_t>(comm.size()), Value{value.value_kind, value.dtype, {}, {}});
    catalog.values.emplace_back(value.name, std::move(known));
  }
  auto const values = collect_values(comm, source, agree(comm, "reshard: plan", [&] { return own_values(source, comm.rank()); }));
  Bytes value_bytes;
  if (comm.rank() == 0) {
    ByteWriter out;
    for (auto const& [name, value] : values)
      if (value.kind != ValueKind::per_rank) out.text(name).block(value.payload);
    value_bytes = out.take();
  }
  broadcast_bytes(comm, value_bytes, 0);

  std::vector<OutgoingPart> outgoing;
  Comparison const comparison = agree(comm, "reshard: plan", [&] {
    Comparison result = compare(
        target.tensors, target.values, catalog, comm.size(), std::vector<RankPolicy>(target.values.size(), RankPolicy::fail),
        [&](std::string const& name) {
          std::vector<std::string> names;
          for (auto const& tie : target.ties)
            if (tie.kept == name) names.push_back(tie.dropped);
          return names;
        },
        [&](std::string_view name) { return policy_of(settings, name); });
    for (std::uint32_t t = 0; t < target.tensors.size(); ++t) {
      StateEntry const* local = target.local_tensors[t];
      if (local != nullptr && local->tensor->layout.everywhere && !target.tensors[t].layout.mesh.coordinate_of(comm.rank()))
        throw Error{ErrorCode::ranks_disagree, target.tensors[t].name + ": a plain tensor is the same on every rank, and only some list it"}.with_hint("give it a mesh of the ranks that hold it");
      if (result.tensors[t].how != WantedTensor::How::load) continue;
      auto const s = static_cast<std::size_t>(result.tensors[t].stored - catalog.tensors.data());
      TensorSpec const& wanted = target.tensors[t];
      Layout const& lies = source.tensors[s].layout;
      auto const here = lies.mesh.coordinate_of(comm.rank());
      if (!here || source.local_tensors[s] == nullptr) continue;
      HeldPart const held = held_at(lies, *here);
      for (std::int64_t i = 0; i < wanted.layout.mesh.size(); ++i) {
        MeshGeometry::Coordinate coordinate{};
        std::int64_t rest = i;
        for (int a = wanted.layout.mesh.axes; a-- > 0; rest /= wanted.layout.mesh.extents[static_cast<std::size_t>(a)])
          coordinate[static_cast<std::size_t>(a)] = rest % wanted.layout.mesh.extents[static_cast<std::size_t>(a)];
        std::int64_t const rank = wanted.layout.mesh.rank_at(coordinate);
        HeldPart const there = held_at(wanted.layout, coordinate);
        Box part;
        if (held.empty() || there.empty() || !intersect(held.box, there.box, part) || sender_of(lies, *here, rank) != comm.rank()) continue;
        for_each_held_box(held, wanted.dtype, source.local_tensors[s]->tensor->memory, [&](Box const& box, MemoryView const& memory) {
          for_each_held_box(there, wanted.dtype, memory, [&](Box const& other, MemoryView const&) {
            if (intersect(box, other, part)) outgoing.push_back({t, static_cast<int>(rank), part, make_transfer(wanted.dtype, wanted.dtype, part, box, memory, part, 0), 0, source.devices.of(s)});
          });
        });
      }
    }
    return result;
  });

  watch.enter("exchange");
  // In a round every rank sends at most this to every other, so that nobody receives more than its budget.
  std::uint64_t const per_pair = std::max<std::uint64_t>(4096, options.memory_bytes / 4 / static_cast<std::uint64_t>(comm.size()));
  for (;;) {
    std::map<int, ByteWriter> messages;
    std::uint64_t left = 0;
    agree(comm, "reshard: exchange", [&] {
      Bytes bytes;
      for (auto& part : outgoing) {
        ByteWriter& message = messages[part.to];
        std::int64_t const elements = part.transfer.end;
        if (part.sent == elements) continue;
        if (message.size() < per_pair) {
          std::int64_t const room = std::max<std::int64_t>(1, static_cast<std::int64_t>((per_pair - message.size()) * 8 / static_cast<std::uint64_t>(bits_of(part.transfer.dtype))));
          std::int64_t const end = std::min(elements, part.sent + room);
          pack(part.device, part.transfer, part.sent, end, bytes);
          message.number(part.tensor).number(part.sent).number(end);
          for (int d = 0; d < part.part.rank(); ++d) message.number(part.part.origin[d]).number(part.part.shape[d]);
          message.block(bytes);
          watch.here().bytes += bytes.size();
          part.sent = end;
        }
        left += part.sent < elements ? 1 : 0;
      }
    });
    std::vector<Message> round;
    for (auto& [rank, message] : messages)
      if (message.size() > 0) round.push_back({rank, message.take()}), ++watch.here().operations;
    auto const incoming = comm.exchange(std::move(round));
    agree(comm, "reshard: exchange", [&] {
      for (auto const& message : incoming)
        for (ByteReader in{message.bytes}; !in.done();) {
          auto const t = in.number<std::uint32_t>();
          auto const begin = in.number<std::int64_t>(), end = in.number<std::int64_t>();
          if (!in.ok() || t >= target.tensors.size() || target.local_tensors[t] == nullptr) throw Error{ErrorCode::unknown, "a message with data from rank " + std::to_string(message.rank) + " is damaged"};
          TensorEntry const& entry = *target.local_tensors[t]->tensor;
          Box part = Box::whole(entry.layout.shape);
          for (int d = 0; d < part.rank(); ++d) part.origin[d] = in.number<std::int64_t>(), part.shape[d] = in.number<std::int64_t>();
          auto const bytes = in.block();
          // A part lies in one of the boxes that this rank holds.
          for_each_held_box(held_part(entry.layout, comm.rank()), entry.dtype, entry.memory, [&](Box const& held, MemoryView const& memory) {
            Box common;
            if (!intersect(held, part, common)) return;
            unpack(target.devices.of(t), make_transfer(entry.dtype, entry.dtype, part, held, memory, part, 0), begin, end, bytes);
          });
        }
    });
    if (all_reduce_max(comm, left) == 0) break;
  }

  watch.enter("finish");
  agree(comm, "reshard: values", [&] {
    std::map<std::string, ConstByteSpan> known;
    for (ByteReader in{value_bytes}; !in.done() && in.ok();) {
      std::string name = in.text();
      known[std::move(name)] = in.block();
    }
    for (std::size_t t = 0; t < target.tensors.size(); ++t)
      if (comparison.tensors[t].how == WantedTensor::How::zero && target.local_tensors[t] != nullptr)
        fill_with_zeros(*target.local_tensors[t]->tensor, comm.rank(), target.devices.of(t));
    auto const sources = entries_by_name(from);
    for (std::size_t v = 0; v < target.values.size(); ++v) {
      StateEntry const* local = target.local_values[v];
      if (local == nullptr || comparison.values[v].stored == nullptr) continue;
      if (local->value.per_rank) {
        ValueEntry const& own = sources.at(local->name)->value;
        local->value.ops->decode(local->value.object, own.ops->encode(own.object));
      } else {
        auto const payload = known.at(local->name);
        local->value.ops->decode(local->value.object, make_value(local->value.ops->kind, local->value.ops->dtype, payload));
      }
    }
  });
  agree(comm, "reshard: after_load", [&] {
    std::vector<AfterLoad> hooks = to.hooks();
    std::stable_sort(hooks.begin(), hooks.end(), [](AfterLoad const& a, AfterLoad const& b) { return a.name < b.name; });
    for (auto const& hook : hooks) hook.call(hook.object);
  });
  for (std::size_t t = 0; t < target.tensors.size(); ++t)
    if (comparison.tensors[t].how == WantedTensor::How::load) {
      ++report.tensors;
      report.tensor_bytes += bytes_of(target.tensors[t].dtype, target.tensors[t].layout.shape.elements());
    }
  for (auto const& value : comparison.values) report.values += value.stored != nullptr ? 1 : 0;
  report.missing = comparison.missing;
  report.unexpected = comparison.unexpected;
  (source.devices.any() ? source : target).devices.warn(report.warnings);
  watch.collect(comm, report);
  return report;
}

}  // namespace detail

/// Fills `to` with what `from` holds: the same names, dtypes and global shapes, any placements and meshes. Collective.
///
/// Memory    at most options.memory_bytes of messages per rank; no tensor is gathered
/// Throws    the same Error on all ranks: what load throws for differences, overlapping_memory if the states share memory
/// Example   dcp::reshard(world, {{"weight", rows}}, {{"weight", columns}});
template <class C>
Report reshard(C& comm, StateDict const& from, StateDict const& to, ReshardOptions const& options = {}) {
  [[maybe_unused]] detail::a_communicator<C> check;
  if constexpr (Communicator<C>) return detail::reshard_state(CommRef{comm}, from, to, options);
  else return {};
}

}  // namespace dcp
