// SPDX-License-Identifier: Apache-2.0
#pragma once
// Read once, share: of what several ranks are to hold, each reads a part, and they send each other the rest. The storage is asked for
// every byte once, however many replicas there are; who reads what is found as for a save (plan/shares.hpp).

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/agreement.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/plan/compare.hpp>
#include <dcp/plan/shares.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// Whether the replicas of `held` share the reading of a tensor: the same answer for all of them. A share is cut inside a row of a large
/// part, and of elements smaller than a byte only rows of whole bytes leave boxes of whole bytes on both sides.
template <class = Deferred>
bool replicas_share(TensorSpec const& tensor, HeldPart const& held) {
  if (replicas(tensor.layout) == 1) return false;
  int const bits = bits_of(tensor.dtype), rank = held.box.rank();
  return bits >= 8 || rank == 0 || held.box.shape[rank - 1] * bits % 8 == 0 || bytes_of(tensor.dtype, held.elements()) <= static_cast<std::uint64_t>(Shares::grain_bytes);
}

/// Calls visit(box, memory) for the boxes of a tensor that `rank` reads: its share of what it holds, or all of it.
template <class Visit>
void for_each_shared_box(TensorSpec const& tensor, std::size_t t, Shares const& shares, std::int64_t rank, MemoryView const& memory, Visit visit) {
  auto const coordinate = tensor.layout.mesh.coordinate_of(rank);
  if (!coordinate) return;
  HeldPart const held = held_at(tensor.layout, *coordinate);
  if (!replicas_share(tensor, held)) return for_each_held_box(held, tensor.dtype, memory, visit);
  CellRange const range = shares.range_of(t, *coordinate, held);
  if (held.flat) {
    auto const [part, begin] = slice_of(held, tensor.dtype, memory, range.begin, range.end);
    return for_each_held_box(part, tensor.dtype, begin, visit);
  }
  for_each_box(held.box, range.begin, range.end, [&](Box const& box, std::int64_t) {
    MemoryView at = memory;
    std::int64_t offset = 0;
    for (int d = 0; d < box.rank(); ++d) offset += (box.origin[d] - held.box.origin[d]) * memory.strides[d];
    at.data += static_cast<std::ptrdiff_t>(bytes_of(tensor.dtype, offset));
    visit(box, at);
  });
}

/// Sends what this rank has read to the other replicas of it, and takes what they have read, in rounds that the budget bounds. Collective.
template <class = Deferred>
void share_reads(CommRef comm, AgreedState const& agreed, Comparison const& comparison, Shares const& shares, std::uint64_t memory_bytes, Stopwatch& watch) {
  // All that a rank holds of a tensor, its elements in order: one behind the other in the "file" of the transfer.
  auto const whole = [&](std::size_t t, HeldPart const& held) {
    TensorEntry const& entry = *agreed.local_tensors[t]->tensor;
    Box const box = held.flat ? Box::whole(Extents{held.elements()}) : held.box;
    return make_transfer(entry.dtype, entry.dtype, box, box, entry.memory, box, 0);
  };
  struct Part {
    std::uint32_t tensor;
    Transfer transfer;                    // of all that the rank holds
    std::int64_t begin, end;              // elements of it, or bytes where elements are smaller
    std::vector<int> others;
  };
  std::vector<Part> parts;
  std::set<int> peers;
  agree(comm, "load: share", [&] {
    for (std::uint32_t t = 0; t < agreed.tensors.size(); ++t) {
      TensorSpec const& tensor = agreed.tensors[t];
      auto const here = tensor.layout.mesh.coordinate_of(comm.rank());
      if (comparison.tensors[t].how != WantedTensor::How::load || !here || agreed.local_tensors[t] == nullptr) continue;
      HeldPart const held = held_at(tensor.layout, *here);
      if (held.empty() || !replicas_share(tensor, held)) continue;
      CellRange const range = shares.range_of(t, *here, held);
      std::int64_t const bits = std::min(8, bits_of(tensor.dtype));
      std::vector<int> others;
      for (std::int64_t r = 0; r < replicas(tensor.layout); ++r)
        if (auto const rank = static_cast<int>(tensor.layout.mesh.rank_at(replica_coordinate(tensor.layout, *here, r))); rank != comm.rank()) others.push_back(rank);
      peers.insert(others.begin(), others.end());
      if (range.begin < range.end) parts.push_back({t, whole(t, held), range.begin * bits / 8, range.end * bits / 8, std::move(others)});
    }
  });
  std::uint64_t const most_peers = all_reduce_max(comm, peers.size());
  if (most_peers == 0) return;
  // Nobody receives more than an eighth of its budget, and nobody sends more.
  std::uint64_t const round_bytes = std::max<std::uint64_t>(4096, memory_bytes / 8 / most_peers);
  std::size_t next = 0;
  for (;;) {
    std::vector<Message> outgoing;
    agree(comm, "load: share", [&] {
      std::map<int, ByteWriter> messages;
      std::uint64_t filled = 0;
      Bytes bytes;
      for (; next < parts.size() && filled < round_bytes; ++next) {
        Part& part = parts[next];
        std::int64_t const room = std::max<std::int64_t>(1, static_cast<std::int64_t>((round_bytes - filled) * 8 / static_cast<std::uint64_t>(bits_of(part.transfer.dtype))));
        std::int64_t const end = std::min(part.end, part.begin + room);
        pack(agreed.devices.of(part.tensor), part.transfer, part.begin, end, bytes);
        for (int const other : part.others) messages[other].number(part.tensor).number(part.begin).number(end).block(bytes);
        watch.here().bytes += bytes.size() * part.others.size();
        filled += bytes.size();
        part.begin = end;
        if (part.begin < part.end) break;
      }
      for (auto& [rank, message] : messages) outgoing.push_back({rank, message.take()}), ++watch.here().operations;
    });
    auto const incoming = comm.exchange(std::move(outgoing));
    agree(comm, "load: share", [&] {
      for (auto const& message : incoming)
        for (ByteReader in{message.bytes}; !in.done();) {
          auto const t = in.number<std::uint32_t>();
          auto const begin = in.number<std::int64_t>(), end = in.number<std::int64_t>();
          auto const bytes = in.block();
          if (!in.ok() || t >= agreed.tensors.size() || agreed.local_tensors[t] == nullptr) throw Error{ErrorCode::unknown, "a message with data from rank " + std::to_string(message.rank) + " is damaged"};
          auto const held = held_by(agreed.tensors[t].layout, comm.rank());
          unpack(agreed.devices.of(t), whole(t, held.value()), begin, end, bytes);
        }
    });
    if (all_reduce_max(comm, next < parts.size() ? 1 : 0) == 0) return;
  }
}

}  // namespace dcp::detail
