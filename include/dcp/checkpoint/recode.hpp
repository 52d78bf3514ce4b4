// SPDX-License-Identifier: Apache-2.0
#pragma once
// Before a save that encodes tensors writes: what ranks must know of each other's elements. See storage/quantizer.hpp.

#include <dcp/base/config.hpp>
#include <dcp/checkpoint/agreement.hpp>
#include <dcp/checkpoint/arranged_source.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/comm/agree.hpp>
#include <dcp/io/workers.hpp>
#include <dcp/storage/recoding.hpp>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace dcp::detail {

/// Whether all ranks encode the same tensors in the same way. Collective; `recoding` is nullptr on all ranks or on none.
template <class = Deferred>
void agree_on_recoding(CommRef comm, Recoding const* recoding) {
  auto const digests = all_gather_value(comm, recoding == nullptr ? std::uint64_t{0} : recoding->digest());
  agree(comm, "save: plan", [&] {
    for (std::size_t r = 1; r < digests.size(); ++r)
      if (digests[r] != digests[0]) throw Error{ErrorCode::ranks_disagree, "rank 0 and rank " + std::to_string(r) + " would quantize different tensors"}.with_hint("the predicate must say the same on every rank");
  });
}

/// Reads the tensors that will be encoded, and exchanges what concerns several ranks. Collective.
/// Throws    the same Error on all ranks: for elements that cannot be encoded, what is known of them by now
template <class = Deferred>
void prepare_recoding(CommRef comm, Recoding const& recoding, AgreedState const& agreed, Shares const& shares, SaveSettings const& settings, Stopwatch& watch) {
  watch.enter("quantize");
  auto const& encoded = recoding.encoded();
  agree(comm, "save: quantize", [&] {
    Workers<> workers{static_cast<std::size_t>(settings.threads)};
    for (auto const& [tensor, quantizer] : encoded) {
      std::vector<HeldElements::Held> held;
      std::vector<DeviceTensor<>::Held> anywhere;   // the same, and whose memory each is
      bool on_devices = false;
      std::shared_ptr<TensorSource const> source;
      auto const hold_box = [&](std::uint32_t t, Box const& box, MemoryView const& memory) {
        auto device = agreed.devices.of(t);
        on_devices = on_devices || device != nullptr;
        held.push_back({box, memory});
        anywhere.push_back({box, memory, std::move(device)});
      };
      auto const hold = [&](std::uint32_t t, auto visit) {
        StateEntry const* const local = agreed.local_tensors[t];
        if (local != nullptr) for_each_held_box(held_part(local->tensor->layout, comm.rank()), local->tensor->dtype, local->tensor->memory, visit);
      };
      if (agreed.arrangement && agreed.arrangement->cut(tensor)) {
        MappedTensor const& mapped = agreed.arrangement->from[tensor];
        for (auto const& placed : mapped.from)
          hold(placed.tensor, [&](Box const& box, MemoryView const& memory) {
            place_box(placed, box, box, memory, [&](Box const& at, Box const& whole, MemoryView const& there) {
              std::int64_t offset = 0;
              for (int d = 0; d < at.rank(); ++d) offset += (at.origin[d] - whole.origin[d]) * there.strides[d];
              hold_box(placed.tensor, at, {there.data + static_cast<std::ptrdiff_t>(bytes_of(mapped.dtype, offset)), there.strides});
            });
          });
        source = ArrangedSource<>::of(agreed, mapped);
      } else {
        std::uint32_t const t = agreed.arrangement ? agreed.arrangement->from[tensor].from[0].tensor : tensor;
        hold(t, [&](Box const& box, MemoryView const& memory) { hold_box(t, box, memory); });
        if (agreed.local_tensors[t] != nullptr) source = agreed.local_tensors[t]->tensor->source;
      }
      Quantizer& here = *quantizer;
      if (on_devices) source = std::make_shared<DeviceTensor<>>(here.elements().dtype(), std::move(anywhere));
      here.elements().hold(std::move(held), std::move(source));
      here.begin();
      for (auto& box : here.units()) {
        watch.here().bytes += bytes_of(here.elements().dtype(), box.shape.elements());
        ++watch.here().operations;
        workers.submit([&here, box](std::size_t) { here.prepare_unit(box); });
      }
    }
    workers.finish([&] { comm.progress(); });
  });
  // In two rounds: to the ranks that write, and back.
  using Messages = std::map<std::int64_t, ByteWriter>;
  auto const sent = [&](Messages& messages) {
    std::vector<Message> outgoing;
    for (auto& [rank, message] : messages) outgoing.push_back({static_cast<int>(rank), message.take()});
    return comm.exchange(std::move(outgoing));
  };
  auto const each_record = [&](std::vector<Message> const& incoming, auto visit) {
    for (auto const& message : incoming)
      for (ByteReader in{message.bytes}; !in.done();) {
        auto const q = in.number<std::uint32_t>();
        if (in.ok() && q < encoded.size()) visit(*encoded[q].quantizer, in, message.rank);
        if (!in.ok() || q >= encoded.size()) throw Error{ErrorCode::unknown, "a message about scales from rank " + std::to_string(message.rank) + " is damaged"};
      }
  };
  Messages messages = agree(comm, "save: quantize", [&] {
    Messages all;
    for (std::uint32_t q = 0; q < encoded.size(); ++q) {
      std::uint32_t const tensor = encoded[q].tensor;
      encoded[q].quantizer->tell([&](Extents const& index) { return writer_of(shares, agreed.arrangement.get(), tensor, index); }, comm.rank(), [&](std::int64_t rank) -> ByteWriter& { return all[rank].number(q); });
    }
    return all;
  });
  auto const told = sent(messages);
  messages = agree(comm, "save: quantize", [&] {
    each_record(told, [](Quantizer& quantizer, ByteReader& in, int from) { quantizer.take(in, from); });
    Messages all;
    for (std::uint32_t q = 0; q < encoded.size(); ++q) encoded[q].quantizer->answer([&](std::int64_t rank) -> ByteWriter& { return all[rank].number(q); });
    return all;
  });
  auto const answers = sent(messages);
  agree(comm, "save: quantize", [&] { each_record(answers, [](Quantizer& quantizer, ByteReader& in, int) { quantizer.learn(in); }); });
}

}  // namespace dcp::detail
