// SPDX-License-Identifier: Apache-2.0
#pragma once
// Moves bytes of a checkpoint's files into a rank's memory, and verifies together with the other ranks what no rank read whole.
//
// A chunk that this rank needs all of is verified here. Of other chunks, this rank contributes the checksum of the runs that it
// read; one rank per chunk adds up what came. Together ranks read all of every tensor that is loaded, so what nobody read of a
// chunk is known: the header, and tensors that are not loaded; that rank reads it. Runs that replicas read too are compared with
// theirs (different nodes may read different copies) and counted once.
//
// What is decoded is read in tiles: what a tile needs of the parts of its tensor goes to scratch memory, and is decoded from there while it is in cache. Where it is to be on a
// device that has a kernel for it, it goes to pinned memory, and the device decodes it from there.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/crc32.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/read_plan.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/write.hpp>
#include <dcp/core/cast.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/workers.hpp>
#include <dcp/plan/transfer_index.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace dcp::detail {

/// A rank's runs in a chunk, as it tells the rank that adds the chunk up.
struct Contribution {
  std::uint32_t file;
  std::uint64_t chunk, first, bytes, raw;   // `first`: file position of the first run; `bytes`: of all runs
  bool counts;
  bool verified;                            // this rank had all of the chunk and has compared it; others need the sum nevertheless
  std::uint32_t transfer = 0;               // on the rank that read it
};

template <class = Deferred>
class Reader {
 public:
  static constexpr std::uint64_t gap_bytes = 32 << 10;   // a hole that is cheaper to read than to skip
  static constexpr std::uint64_t page_bytes = 4096;
  static constexpr std::size_t windows_ahead = 6;        // of this rank, on their way from the device
  static constexpr std::size_t most_pieces = 1024;       // of one scattered read: IOV_MAX of Linux

  /// `loaded`: per file, the ranges of all tensors that ranks load, sorted
  Reader(CommRef comm, AnyMedium& medium, OpenedCheckpoint& opened, ReadPlan plan, std::vector<std::vector<FileRange>> loaded, LoadSettings const& settings, Stopwatch& watch)
      : comm_{comm}, medium_{medium}, opened_{opened}, loaded_{std::move(loaded)}, purposes_{std::move(plan.purposes)}, decodes_{std::move(plan.decodes)}, records_{std::move(plan.records)}, settings_{settings}, budget_{Budget::of(settings.memory_bytes, settings.threads)}, watch_{watch} {
    for (std::uint32_t i = 0; i < plan.transfers.size(); ++i) plan.transfers[i].tensor = i;   // to find its purpose after sorting
    index_ = TransferIndex{std::move(plan.transfers)};
    files_.resize(opened.catalog.files.size());
    verifies_ = settings.verify != Verify::none && opened.record.has_value();
    reaches_devices_ = std::any_of(purposes_.begin(), purposes_.end(), [](ReadPurpose const& purpose) { return purpose.device != nullptr; });
  }

  /// Opens every file that this rank will read. Files once open stay what they are when the place gets a new checkpoint.
  void open_files() {
    for (auto const& transfer : index_.transfers()) file(transfer.file);
    for (auto const& decode : decodes_) for_each_stored_piece(*decode.tensor, [&](DType, StoredPiece const& piece) { file(piece.file); });
  }

  void read() {
    auto const windows = index_.windows(budget_.buffer_bytes);
    std::uint64_t total = 0;
    for (auto const& transfer : index_.transfers()) total += transfer.bytes();
    std::vector<Tile> const tiles = all_tiles();
    for (auto const& tile : tiles) total += decodes_[tile.decode].tensor->encoding->bytes_needed(tile.box);
    auto reported = Stopwatch::clock::now();
    auto const alive = [&] {
      comm_.progress();
      auto const now = Stopwatch::clock::now();
      if (!settings_.progress || now - reported < std::chrono::milliseconds{250}) return;
      reported = now;
      settings_.progress({"read", done_, total});
    };
    // Ranks begin at different places, so that they do not all ask for the same file first.
    std::size_t const start = windows.empty() ? 0 : windows.size() * static_cast<std::size_t>(comm_.rank()) / static_cast<std::size_t>(comm_.size());
    std::vector<Hands> hands(budget_.threads);
    Workers<> workers{budget_.threads};
    auto const finish = [&] {
      workers.finish(alive);
      for (auto& hand : hands) hand.finish();
    };
    // Copies that are only compared come after what they are compared with.
    for (bool const compare : {false, true}) {
      if (compare && std::none_of(purposes_.begin(), purposes_.end(), [](ReadPurpose const& p) { return p.compare; })) break;
      auto const window_at = [&](std::size_t w) -> auto const& { return windows[(w + start) % windows.size()]; };
      for (std::size_t w = 0; w < windows.size(); ++w)
        workers.submit([&, compare, w](std::size_t thread) {
          // The device works on what comes next while this thread copies and sums up.
          for (std::size_t next = w == 0 ? 0 : w + windows_ahead; next <= w + windows_ahead && next < windows.size(); ++next) will_read(window_at(next).first, window_at(next).second);
          read_window(window_at(w).first, window_at(w).second, hands[thread], compare);
        });
      finish();
    }
    for (std::size_t t = 0; t < tiles.size(); ++t)
      workers.submit([&, t](std::size_t thread) {
        constexpr std::size_t ahead = 8;
        if (t % ahead == 0) for (std::size_t next = t == 0 ? 0 : t + ahead; next < std::min(tiles.size(), t + 2 * ahead); ++next) will_read(tiles[next]);
        read_tile(tiles[t], hands[thread]);
      });
    finish();
    verify_records(workers, alive);
    watch_.here().bytes += done_;
    watch_.here().operations += operations_;
    if (settings_.progress) settings_.progress({"read", total, total});
  }

  /// Adds up the chunks that ranks read in parts. Collective.
  void verify_together() {
    if (!verifies_) return;
    std::map<int, ByteWriter> messages;
    for (auto const& c : contributions_)
      messages[static_cast<int>((c.file * std::uint64_t{131} + c.chunk) % static_cast<std::uint64_t>(comm_.size()))]
          .number(c.file).number(c.chunk).number(c.first).number(c.bytes).number(c.raw).number(c.counts).number(c.verified);
    contributions_ = {};
    std::vector<Message> outgoing;
    for (auto& [rank, message] : messages) outgoing.push_back({rank, message.take()});
    auto const incoming = comm_.exchange(std::move(outgoing));
    agree(comm_, "load: verify", [&] {
      std::map<std::pair<std::uint32_t, std::uint64_t>, std::vector<Contribution>> chunks;
      for (auto const& message : incoming)
        for (ByteReader in{message.bytes}; !in.done() && in.ok();) {
          Contribution c{};
          c.file = in.number<std::uint32_t>(), c.chunk = in.number<std::uint64_t>(), c.first = in.number<std::uint64_t>(), c.bytes = in.number<std::uint64_t>();
          c.raw = in.number<std::uint64_t>(), c.counts = in.number<bool>(), c.verified = in.number<bool>();
          chunks[{c.file, c.chunk}].push_back(c);
        }
      for (auto& [key, list] : chunks) {
        add_up(key.first, key.second, list);
        comm_.progress();
      }
    });
  }

  std::uint64_t verified_bytes = 0, unverified_bytes = 0;
  Atomic<std::uint64_t> verification_bytes{0}, over_read_bytes{0};

 private:
  static constexpr std::uint64_t slack = 4096;   // for elements that begin in a window and end behind it
  struct Run {
    std::uint64_t at, bytes;
    std::byte* memory;
    std::uint32_t transfer;
    bool counts;
  };
  // What one thread reads into, and by what it reaches devices. Two buffers take turns there: while the one is filled and verified, the other is copied on.
  struct Hands {
    AlignedBuffer buffer;
    Bytes scratch;
    struct Reach {
      std::shared_ptr<DeviceHere const> device;
      std::shared_ptr<DeviceLane> lane;
      int which = 0;
      bool decodes = true;   // until it says that it cannot
    };
    std::vector<Reach> reaches;

    Reach& reach(std::shared_ptr<DeviceHere const> const& device) {
      for (auto& known : reaches)
        if (known.device == device) return known;
      return reaches.emplace_back(Reach{device, device->lane()});
    }
    void finish() {
      for (auto& known : reaches) known.lane->finish();
    }
  };
  // Runs that lie as rows on both sides are one copy.
  class RowsToDevice {
   public:
    explicit RowsToDevice(DeviceLane& lane) : lane_{lane} {}
    RowsToDevice(RowsToDevice const&) = delete;
    RowsToDevice& operator=(RowsToDevice const&) = delete;
    /// `of`: runs of different transfers may lie in different memory, and are not one copy.
    void add(std::uint32_t of, std::byte* to, std::byte const* from, std::size_t bytes) {
      if (rows_ > 0 && bytes == bytes_ && of == of_) {
        auto const to_step = to - to_ - static_cast<std::ptrdiff_t>(to_pitch_ * (rows_ - 1)), from_step = from - from_ - static_cast<std::ptrdiff_t>(from_pitch_ * (rows_ - 1));
        bool const forward = to_step >= static_cast<std::ptrdiff_t>(bytes) && from_step >= static_cast<std::ptrdiff_t>(bytes);
        if (forward && (rows_ == 1 || (static_cast<std::size_t>(to_step) == to_pitch_ && static_cast<std::size_t>(from_step) == from_pitch_))) {
          to_pitch_ = static_cast<std::size_t>(to_step), from_pitch_ = static_cast<std::size_t>(from_step);
          ++rows_;
          return;
        }
      }
      put();
      of_ = of, to_ = to, from_ = from, bytes_ = bytes, to_pitch_ = from_pitch_ = bytes, rows_ = 1;
    }
    void put() {
      if (rows_ > 0) lane_.copy(to_, to_pitch_, from_, from_pitch_, bytes_, rows_);
      rows_ = 0;
    }

   private:
    DeviceLane& lane_;
    std::byte* to_ = nullptr;
    std::byte const* from_ = nullptr;
    std::uint32_t of_ = 0;
    std::size_t bytes_ = 0, to_pitch_ = 0, from_pitch_ = 0, rows_ = 0;
  };
  // A box of a decode that is read and decoded at once.
  struct Tile {
    std::uint32_t decode;
    Box box;
  };

  ReadableFile& file(std::uint32_t f) {
    std::lock_guard const lock{mutex_};
    if (!files_[f]) {
      CatalogFile const& known = opened_.catalog.files[f];
      files_[f] = medium_.open_read(path(f));
      if (files_[f]->size() != known.size) throw Error{ErrorCode::corrupt, "the file has " + std::to_string(files_[f]->size()) + " bytes; it had " + std::to_string(known.size) + " when its header was read"}.with_path(path(f));
      // With a record, its id and the checksums notice that; and clients of a network file system may disagree on times for a while.
      if (!opened_.record && files_[f]->version() != known.version)
        throw Error{ErrorCode::io, "the file was replaced or changed after its header was read"}.with_path(path(f)).with_hint("load again");
    }
    return *files_[f];
  }
  bool summed(std::uint32_t f) const { return verifies_ && opened_.checksums.has(opened_.catalog.files[f].path); }
  std::string path(std::uint32_t f) const { return opened_.directory + '/' + opened_.catalog.files[f].path; }

  // Tells the medium of a window, if most of it is needed: what lies between is read with it.
  void will_read(std::uint32_t f, FileRange window) {
    std::uint64_t needed = 0;
    index_.for_each_in(f, window, [&](std::uint32_t t, std::int64_t from, std::int64_t to) { needed += bytes_of(index_[t].dtype, to - from); });
    std::uint64_t const end = std::min(window.end, opened_.catalog.files[f].size);
    if (needed * 4 >= end - window.begin) file(f).will_read(window.begin, end);
  }

  // Compares CRC-32s of records, where there is no commit record, with what has come to memory; or, where that is not all of one, with the record read once more.
  template <class Alive>
  void verify_records(Workers<>& workers, Alive alive) {
    if (opened_.record || settings_.verify == Verify::none) return;
    for (std::uint32_t t = 0; t < index_.transfers().size(); ++t)
      if (auto const expected = purposes_[index_[t].tensor].crc32)
        workers.submit([this, t, expected](std::size_t) {
          Transfer const& transfer = index_[t];
          std::uint32_t crc = 0;
          transfer.for_each_run(transfer.begin, transfer.end, [&](std::uint64_t, std::byte const* memory, std::size_t bytes) { crc = crc32({memory, bytes}, crc); });
          FileRange const range{transfer.file_begin(), transfer.file_end()};
          if (crc != *expected) throw wrong_record(path(transfer.file), range.begin, range.end, tensors_in(range, transfer.file));
          std::lock_guard const lock{mutex_};
          verified_bytes += transfer.bytes();
          unverified_bytes -= transfer.bytes();
        });
    for (auto const& record : records_)
      workers.submit([this, &record](std::size_t) {
        Bytes buffer;
        verify_record(file(record.file), path(record.file), record, tensors_in({record.offset, record.offset + record.bytes}, record.file), buffer);
        verification_bytes += record.bytes;
      });
    workers.finish(alive);
  }

  void read_window(std::uint32_t f, FileRange window, Hands& hands, bool compare) {
    std::uint64_t const file_size = opened_.catalog.files[f].size;
    std::vector<Run> runs;
    index_.for_each_in(f, window, [&](std::uint32_t t, std::int64_t from, std::int64_t to) {
      if (purposes_[index_[t].tensor].compare != compare) return;
      index_[t].for_each_run(from, to, [&](std::uint64_t at, std::byte* memory, std::size_t bytes) { runs.push_back({at, bytes, memory, t, purposes_[index_[t].tensor].counts}); });
    });
    if (runs.empty()) return;
    std::sort(runs.begin(), runs.end(), [](Run const& a, Run const& b) { return a.at < b.at; });
    bool const as_stored = std::all_of(runs.begin(), runs.end(), [&](Run const& run) { return index_[run.transfer].dtype == index_[run.transfer].memory_dtype; });
    std::shared_ptr<DeviceHere const> device;   // that has all of the runs; or some of them
    bool on_host = false;
    for (auto const& run : std::span{runs}.first(reaches_devices_ ? runs.size() : 0)) {
      auto const& of = purposes_[index_[run.transfer].tensor].device;
      if (of == nullptr || (device != nullptr && of != device)) on_host = true;
      if (of != nullptr) device = of;
    }
    if (device == nullptr && as_stored && !compare && !(verifies_ && settings_.verify == Verify::full)) return read_straight(f, file_size, runs, own_buffer(hands));
    ByteSpan buffer;
    if (device != nullptr && !on_host && !compare) {
      auto& reach = hands.reach(device);
      buffer = reach.lane->buffer(reach.which, static_cast<std::size_t>(budget_.buffer_bytes + slack));
      reach.which = 1 - reach.which;
    } else {
      buffer = own_buffer(hands).first(budget_.buffer_bytes + slack);
    }
    // What to read: the runs, over small holes; whole chunks when everything is to be verified.
    std::vector<FileRange> ranges;
    std::uint64_t needed = 0;
    for (auto const& run : runs) {
      FileRange range{run.at, run.at + run.bytes};
      needed += run.bytes;
      if (verifies_ && settings_.verify == Verify::full) range = {round_down(range.begin, chunk_bytes), std::max(range.end, std::min(file_size, round_up(std::min(range.end, window.end), chunk_bytes)))};
      if (!ranges.empty() && range.begin <= ranges.back().end + gap_bytes) ranges.back().end = std::max(ranges.back().end, range.end);
      else ranges.push_back(range);
    }
    ReadableFile& in = file(f);
    for (auto const& range : ranges) {
      try {
        in.read_at(range.begin, {buffer.data() + (range.begin - window.begin), static_cast<std::size_t>(range.size())});
      } catch (Error& error) {
        throw error.with_path(path(f)).with_range(range.begin, range.end);
      }
    }
    auto const bytes_at = [&](std::uint64_t at) { return buffer.data() + (at - window.begin); };
    bool const sums = summed(f);
    if (sums) verify_window(f, file_size, window, runs, ranges, bytes_at);
    for (auto& reach : hands.reaches) reach.lane->finish();   // what is copied from the other buffer, and what is compared below
    Bytes cast;
    std::uint64_t begun = 0;   // of `cast`
    if (device != nullptr && !compare && !as_stored) cast.resize(static_cast<std::size_t>(cast_bytes(runs)));
    std::optional<RowsToDevice> rows;
    DeviceLane* to = nullptr;
    for (auto const& run : runs) {
      Transfer const& transfer = index_[run.transfer];
      auto const& there = purposes_[transfer.tensor].device;
      std::byte const* from = bytes_at(run.at);
      std::size_t const elements = static_cast<std::size_t>(run.bytes * 8 / static_cast<std::uint64_t>(bits_of(transfer.dtype)));
      if (compare) {
        if (transfer.dtype == transfer.memory_dtype && !same_bytes(there, hands, run, from))
          throw Error{ErrorCode::corrupt, "two files hold the same elements of " + tensors_in({run.at, run.at + run.bytes}, f) + " with different values"}.with_path(path(f)).with_range(run.at, run.at + run.bytes);
      } else if (there != nullptr) {
        std::size_t bytes = static_cast<std::size_t>(run.bytes);
        if (transfer.dtype != transfer.memory_dtype) {
          bytes = elements * static_cast<std::size_t>(bits_of(transfer.memory_dtype)) / 8;
          cast_elements(transfer.dtype, from, transfer.memory_dtype, cast.data() + begun, elements);
          from = cast.data() + begun;
          begun += bytes;
        }
        if (DeviceLane* const lane = hands.reach(there).lane.get(); lane != to) {
          if (rows) rows->put();
          rows.emplace(*lane);
          to = lane;
        }
        rows->add(run.transfer, run.memory, from, bytes);
      } else if (transfer.dtype == transfer.memory_dtype) {
        std::memcpy(run.memory, from, static_cast<std::size_t>(run.bytes));
      } else {
        cast_elements(transfer.dtype, from, transfer.memory_dtype, run.memory, elements);
      }
    }
    if (rows) rows->put();
    if (device != nullptr && (on_host || !cast.empty())) hands.finish();   // they are copied from memory that is next used for something else
    done_ += needed;
    operations_ += ranges.size();
    std::lock_guard const lock{mutex_};
    if (!sums) unverified_bytes += needed;
  }
  AlignedBuffer& own_buffer(Hands& hands) {
    if (hands.buffer.size() == 0) hands.buffer = AlignedBuffer{static_cast<std::size_t>(budget_.buffer_bytes + slack)};
    return hands.buffer;
  }
  // What runs become that are cast.
  std::uint64_t cast_bytes(std::vector<Run> const& runs) const {
    std::uint64_t bytes = 0;
    for (auto const& run : runs) bytes += run.bytes * static_cast<std::uint64_t>(bits_of(index_[run.transfer].memory_dtype)) / static_cast<std::uint64_t>(bits_of(index_[run.transfer].dtype));
    return bytes;
  }
  // Whether memory, of whatever device, holds what the file does.
  static bool same_bytes(std::shared_ptr<DeviceHere const> const& device, Hands& hands, Run const& run, std::byte const* from) {
    if (device == nullptr) return std::memcmp(run.memory, from, static_cast<std::size_t>(run.bytes)) == 0;
    DeviceLane& lane = *hands.reach(device).lane;
    std::byte* const back = lane.buffer(0, static_cast<std::size_t>(run.bytes)).data();
    lane.copy(back, static_cast<std::size_t>(run.bytes), run.memory, static_cast<std::size_t>(run.bytes), static_cast<std::size_t>(run.bytes), 1);
    lane.finish();
    return std::memcmp(back, from, static_cast<std::size_t>(run.bytes)) == 0;
  }

  // ---- what is decoded

  std::vector<Tile> all_tiles() const {
    // Of parts: stays in cache, and is read well. Some tiles have three times as much.
    std::uint64_t const tile_bytes = std::min<std::uint64_t>(512 << 10, settings_.memory_bytes / 8 / budget_.threads);
    std::vector<Tile> tiles;
    for (std::uint32_t d = 0; d < decodes_.size(); ++d) {
      Encoding const& encoding = *decodes_[d].tensor->encoding;
      Box const& held = decodes_[d].held;
      if (held.empty()) continue;
      std::int64_t const most = elements_of_tile(encoding, held, tile_bytes);
      for_each_tile(encoding, held, most, [&](Box const& box) { tiles.push_back({d, box}); });
    }
    return tiles;
  }
  // Calls visit(part, box of the part, where its bytes begin in scratch memory) for the parts of a tile. Returns the bytes of scratch memory.
  template <class Visit>
  static std::uint64_t for_each_part(Encoding const& encoding, Box const& tile, Visit visit) {
    std::uint64_t at = 0;
    for (std::size_t p = 0; p < encoding.parts().size(); ++p) {
      EncodedPart const& part = encoding.parts()[p];
      Box const box = part.grid.needed(tile, encoding.shape(), part.shape);
      visit(p, box, at);
      at = round_up(at + bytes_of(part.dtype, static_cast<std::int64_t>(box.size())), std::uint64_t{64});
    }
    return at;
  }

  // Tells the medium of the codes that a tile needs.
  void will_read(Tile const& tile) {
    CatalogTensor const& tensor = *decodes_[tile.decode].tensor;
    EncodedPart const& codes = tensor.encoding->parts()[0];
    Box const box = codes.grid.needed(tile.box, tensor.encoding->shape(), codes.shape);
    Box part;
    for (auto const& piece : tensor.parts[0])
      if (intersect(box, piece.box, part)) {
        Transfer const transfer = make_transfer(codes.dtype, codes.dtype, part, part, {nullptr, row_major_strides(part.shape)}, piece.box, piece.offset);   // of which only the file matters
        if (transfer.bytes() * 4 >= transfer.file_end() - transfer.file_begin()) file(piece.file).will_read(transfer.file_begin(), transfer.file_end());
      }
  }

  void read_tile(Tile const& tile, Hands& hands) {
    Bytes& scratch = hands.scratch;
    Decode const& decode = decodes_[tile.decode];
    CatalogTensor const& tensor = *decode.tensor;
    Encoding const& encoding = *tensor.encoding;
    std::uint64_t const bytes = for_each_part(encoding, tile.box, [](std::size_t, Box const&, std::uint64_t) {});
    if (bytes > settings_.memory_bytes / 2 / budget_.threads)
      throw Error{ErrorCode::budget, tensor.name + ": " + std::to_string(bytes) + " bytes of its parts are needed at once, more than the memory budget has for each of " + std::to_string(budget_.threads) + " threads"};
    // What the device decodes is read to where it reads that from.
    auto* by_device = decode.device != nullptr && decodes_on_devices(encoding, decode.memory_dtype) ? &hands.reach(decode.device) : nullptr;
    if (by_device != nullptr && !by_device->decodes) by_device = nullptr;
    std::byte* parts = nullptr;
    if (by_device != nullptr) {
      parts = by_device->lane->buffer(by_device->which, static_cast<std::size_t>(bytes)).data();
      by_device->which = 1 - by_device->which;
    } else {
      if (scratch.size() < bytes) scratch = Bytes(static_cast<std::size_t>(bytes));
      parts = scratch.data();
    }
    std::map<std::uint32_t, std::vector<Run>> runs;   // of each file
    std::vector<PartBytes> given(encoding.parts().size());
    for_each_part(encoding, tile.box, [&](std::size_t p, Box const& box, std::uint64_t at) {
      EncodedPart const& part = encoding.parts()[p];
      MemoryView const memory{parts + at, row_major_strides(box.shape)};
      given[p] = {memory.data, box};
      Box const owned = part.shape.rank() == 0 ? box : part.grid.owned(tile.box, encoding.shape(), part.shape);
      bool const owns_any = decode.counts && (part.shape.rank() > 0 || PartGrid::owns_scalar(tile.box));
      auto const add = [&](StoredPiece const& piece, Box const& from, bool counts) {
        Transfer const transfer = make_transfer(part.dtype, part.dtype, from, box, memory, piece.box, piece.offset);
        // Nobody else has this number: runs of one part of one tile are summed up together.
        auto const number = static_cast<std::uint32_t>(p * 2 + (counts ? 1 : 0));
        transfer.for_each_run(0, transfer.end, [&](std::uint64_t position, std::byte* to, std::size_t size) { runs[piece.file].push_back({position, size, to, number, counts}); });
      };
      std::vector<Box> others;
      for_each_source(
          tensor.parts[p], box,
          [&](StoredPiece const& piece, Box const& from) {
            Box mine;
            if (!verifies_ || !owns_any || !intersect(from, owned, mine)) return add(piece, from, false);
            add(piece, mine, true);
            others.clear();
            subtract(from, mine, others);
            for (auto const& other : others) add(piece, other, false);
          },
          [&](Box const& hole) {
            if (part.shape.rank() > 0) throw Error{ErrorCode::incomplete, part.name + ": nothing is stored for " + to_string(hole)};
          });
    });
    AlignedBuffer& gaps = own_buffer(hands);
    for (auto& [f, list] : runs) {
      std::sort(list.begin(), list.end(), [](Run const& a, Run const& b) { return a.at < b.at; });
      read_straight(f, opened_.catalog.files[f].size, list, gaps);
    }
    std::int64_t at = 0;
    for (int d = 0; d < tile.box.rank(); ++d) at += (tile.box.origin[d] - decode.held.origin[d]) * decode.memory.strides[d];
    MemoryView const memory{decode.memory.data + static_cast<std::ptrdiff_t>(bytes_of(decode.memory_dtype, at)), decode.memory.strides};
    if (by_device != nullptr) {
      in_checkpoint([&] { encoding.check_scales(given[1]); });
      by_device->lane->finish();   // what is decoded from the other buffer
      if (decode_by(*by_device->lane, encoding, tile.box, given, decode.memory_dtype, memory)) return;
      by_device->decodes = false;
    }
    if (decode.device != nullptr) return decode_to_device(tile, given, hands);
    in_checkpoint([&] { encoding.decode(tile.box, given, decode.memory_dtype, memory); });
  }

  template <class F>
  void in_checkpoint(F f) const {
    try {
      f();
    } catch (Error& error) {
      throw error.with_path(opened_.directory);
    }
  }

  // As it is decoded it is dense in pinned memory, from where it is copied on.
  void decode_to_device(Tile const& tile, std::vector<PartBytes> const& given, Hands& hands) {
    Decode const& decode = decodes_[tile.decode];
    auto& reach = hands.reach(decode.device);
    ByteSpan const dense = reach.lane->buffer(reach.which, static_cast<std::size_t>(bytes_of(decode.memory_dtype, tile.box.shape.elements())));
    reach.which = 1 - reach.which;
    in_checkpoint([&] { decode.tensor->encoding->decode(tile.box, given, decode.memory_dtype, {dense.data(), row_major_strides(tile.box.shape)}); });
    reach.lane->finish();   // what is copied from the other buffer
    Transfer const transfer = make_transfer(decode.memory_dtype, decode.memory_dtype, tile.box, decode.held, decode.memory, tile.box, 0);
    copy_elements(*reach.lane, false, transfer.memory_dtype, transfer.shape, transfer.memory, 0, transfer.end, dense.data());
  }

  // Every chunk that `runs` touch, read and compared, unless some thread has done so before.
  void verify_whole_chunks(std::uint32_t f, std::uint64_t file_size, std::vector<Run> const& runs) {
    auto const& table = opened_.checksums.of(opened_.catalog.files[f].path);
    Bytes buffer;
    std::uint64_t needed = 0, chunk = 0;
    for (auto const& run : runs) {
      needed += run.bytes;
      for (chunk = run.at / chunk_bytes; chunk * chunk_bytes < run.at + run.bytes; ++chunk) {
        {
          std::lock_guard const lock{mutex_};
          if (!whole_chunks_.insert({f, chunk}).second) continue;
        }
        std::uint64_t const begin = chunk * chunk_bytes;
        verify_chunk(file(f), path(f), file_size, chunk, table[static_cast<std::size_t>(chunk)], tensors_in({begin, begin + chunk_size(file_size, chunk)}, f), buffer);
        verification_bytes += buffer.size();
      }
    }
    std::lock_guard const lock{mutex_};
    verified_bytes += needed;
  }

  // Runs whose elements are stored as memory holds them go straight to memory, in reads that are summed up while they are in cache.
  void read_straight(std::uint32_t f, std::uint64_t file_size, std::vector<Run> const& runs, AlignedBuffer& scratch) {
    constexpr std::uint64_t cached_bytes = 256 << 10;
    ReadableFile& in = file(f);
    // Runs of tiles come here even where whole chunks are to be verified; those are read once more for that.
    bool const whole = summed(f) && settings_.verify == Verify::full, sums = summed(f) && !whole;
    if (whole) verify_whole_chunks(f, file_size, runs);
    ChunkSums found;
    std::vector<ByteSpan> pieces;
    std::uint64_t needed = 0, operations = 0, gaps = 0;
    std::size_t run = 0;
    std::uint64_t in_run = 0;   // bytes of it that earlier reads have taken
    while (run < runs.size()) {
      // One read: from the next byte that is needed, over runs and small holes, to about `cached_bytes`.
      std::uint64_t const begin = runs[run].at + in_run;
      std::uint64_t at = begin, wanted = 0, skipped = 0;
      std::size_t const first = run;
      std::uint64_t const first_in_run = in_run;
      pieces.clear();
      while (run < runs.size() && wanted < cached_bytes && pieces.size() + 2 <= most_pieces) {
        std::uint64_t const next = runs[run].at + in_run;
        if (next < at) break;   // two tensors of the state read the same bytes
        if (std::uint64_t const hole = next - at; hole > 0) {
          // A hole inside a page costs the device nothing; larger ones add less than a half to what is read, headers included.
          bool const worth = hole <= gap_bytes && (gaps + skipped + hole) * 32 <= (needed + wanted + std::min(runs[run].bytes, cached_bytes)) * 15;
          if (hole > scratch.size() || (hole >= page_bytes && !worth)) break;
          pieces.push_back(scratch.first(hole));
          skipped += hole;
        }
        std::uint64_t const size = std::min(runs[run].bytes - in_run, cached_bytes - wanted);
        pieces.push_back({runs[run].memory + in_run, static_cast<std::size_t>(size)});
        wanted += size;
        at = next + size;
        in_run += size;
        if (in_run == runs[run].bytes) ++run, in_run = 0;
      }
      try {
        in.read_pieces(begin, pieces);
      } catch (Error& error) {
        throw error.with_path(path(f)).with_range(begin, at);
      }
      needed += wanted;
      gaps += skipped;
      ++operations;
      if (!sums) continue;
      std::uint64_t from = first_in_run;
      for (std::size_t r = first; r < runs.size() && (r < run || (r == run && in_run > 0)); ++r, from = 0) {
        std::uint64_t const to = r == run ? in_run : runs[r].bytes;
        found.add(f, file_size, runs[r].at + from, {runs[r].memory + from, static_cast<std::size_t>(to - from)}, runs[r].transfer, runs[r].counts);
      }
    }
    done_ += needed;
    operations_ += operations;
    over_read_bytes += gaps;
    if (sums) return settle(f, file_size, found);
    if (whole) return;
    std::lock_guard const lock{mutex_};
    unverified_bytes += needed;
  }

  // What the runs of a window contribute to each chunk, per transfer.
  struct ChunkSums {
    struct Sum {
      PositionedCrc crc;
      Contribution contribution;
    };
    std::vector<Sum> sums;                              // in the order of the file
    std::map<std::uint32_t, std::size_t> of;            // transfer -> index into `sums`, in the last chunk

    void add(std::uint32_t f, std::uint64_t file_size, std::uint64_t position, ConstByteSpan bytes, std::uint32_t transfer, bool counts) {
      for_each_chunk(file_size, position, bytes, [&](std::uint64_t chunk, std::uint64_t offset, std::uint64_t size, ConstByteSpan part) {
        if (sums.empty() || sums[last].contribution.chunk != chunk) of.clear();
        if (sums.empty() || sums[last].contribution.chunk != chunk || sums[last].contribution.transfer != transfer) {
          auto const [at, fresh] = of.try_emplace(transfer, sums.size());
          if (fresh) sums.push_back({PositionedCrc{size}, Contribution{f, chunk, chunk * chunk_bytes + offset, 0, 0, counts, false, transfer}});
          last = at->second;
        }
        sums[last].crc.add(offset, part);
        sums[last].contribution.bytes += part.size();
      });
    }
    std::size_t last = 0;
  };

  // Compares the chunks that this rank has read all of; the others are added up with those of other ranks.
  void settle(std::uint32_t f, std::uint64_t file_size, ChunkSums& found) {
    auto const& table = opened_.checksums.of(opened_.catalog.files[f].path);
    std::vector<Contribution> mine;
    std::uint64_t verified = 0;
    for (std::size_t i = 0; i < found.sums.size();) {
      std::uint64_t const chunk = found.sums[i].contribution.chunk, size = chunk_size(file_size, chunk);
      std::uint64_t counted = 0, raw = 0;
      std::size_t end = i;
      for (; end < found.sums.size() && found.sums[end].contribution.chunk == chunk; ++end) {
        Contribution& c = found.sums[end].contribution;
        c.raw = found.sums[end].crc.contribution();
        if (c.counts) counted += c.bytes, raw ^= c.raw;
      }
      bool const all = counted == size;
      if (all && crc64_from_raw(raw, size) != table[static_cast<std::size_t>(chunk)]) throw corrupt_chunk(path(f), file_size, chunk, tensors_in({chunk * chunk_bytes, chunk * chunk_bytes + size}, f));
      if (all) verified += size;
      // A chunk that one transfer fills is nobody else's business: who else reads of it has the same box, and fills it too.
      bool const alone = all && (end - i == 1 || comm_.size() == 1);
      for (; i < end; ++i) {
        found.sums[i].contribution.verified = all;
        if (!alone) mine.push_back(found.sums[i].contribution);
      }
    }
    std::lock_guard const lock{mutex_};
    verified_bytes += verified;
    append(contributions_, mine);
  }

  // `bytes_at`: the buffer, where it holds the file's bytes.
  template <class BytesAt>
  void verify_window(std::uint32_t f, std::uint64_t file_size, FileRange window, std::vector<Run> const& runs, std::vector<FileRange> const& ranges, BytesAt bytes_at) {
    auto const& table = opened_.checksums.of(opened_.catalog.files[f].path);
    std::vector<Contribution> mine;
    std::uint64_t verified = 0, extra = 0;
    for (std::uint64_t begin = window.begin; begin < std::min(window.end, file_size); begin += chunk_bytes) {
      std::uint64_t const chunk = begin / chunk_bytes, size = chunk_size(file_size, chunk), end = begin + size;
      auto const covering = std::find_if(ranges.begin(), ranges.end(), [&](FileRange const& r) { return r.begin <= begin && r.end >= end; });
      std::uint64_t needed = 0;
      for (auto const& run : runs) needed += run.at < end && run.at + run.bytes > begin ? std::min(end, run.at + run.bytes) - std::max(begin, run.at) : 0;
      if (needed == 0) continue;
      if (covering != ranges.end()) {
        if (crc64({bytes_at(begin), static_cast<std::size_t>(size)}) != table[static_cast<std::size_t>(chunk)]) throw corrupt_chunk(path(f), file_size, chunk, tensors_in({begin, end}, f));
        verified += needed;
        extra += size - std::min(size, needed);
      }
    }
    // Per transfer and chunk, what its runs add to the chunk. Runs may reach into the chunk behind the window. A chunk that one
    // transfer fills is nobody else's business: who else reads of it has the same box, and fills it too.
    std::map<std::pair<std::uint32_t, std::uint64_t>, std::pair<PositionedCrc, Contribution>> open;
    for (auto const& run : runs) {
      auto const covered = [&](std::uint64_t chunk) {
        std::uint64_t const begin = chunk * chunk_bytes, end = begin + chunk_size(file_size, chunk);
        return begin >= window.begin && begin < window.end && std::any_of(ranges.begin(), ranges.end(), [&](FileRange const& r) { return r.begin <= begin && r.end >= end; });
      };
      for_each_chunk(file_size, run.at, {bytes_at(run.at), static_cast<std::size_t>(run.bytes)}, [&](std::uint64_t chunk, std::uint64_t offset, std::uint64_t size, ConstByteSpan part) {
        if (part.size() == size && covered(chunk)) return;
        std::uint64_t const position = chunk * chunk_bytes + offset;
        auto const at = open.try_emplace({run.transfer, chunk}, PositionedCrc{size}, Contribution{f, chunk, position, 0, 0, run.counts, covered(chunk)}).first;
        Contribution& sum = at->second.second;
        at->second.first.add(offset, part);
        sum.bytes += part.size();
      });
    }
    for (auto& [key, value] : open) {
      value.second.raw = value.first.contribution();
      mine.push_back(value.second);
    }
    verification_bytes += extra;
    std::lock_guard const lock{mutex_};
    verified_bytes += verified;
    append(contributions_, mine);
  }

  void add_up(std::uint32_t f, std::uint64_t chunk, std::vector<Contribution>& list) {
    std::uint64_t const file_size = opened_.catalog.files[f].size, size = chunk_size(file_size, chunk), begin = chunk * chunk_bytes;
    std::string const& name = opened_.catalog.files[f].path;
    std::sort(list.begin(), list.end(), [](Contribution const& a, Contribution const& b) { return std::tie(a.first, a.bytes) < std::tie(b.first, b.bytes); });
    for (auto const& c : list)
      if (!c.counts && !c.verified) unverified_bytes += c.bytes;
    std::erase_if(list, [](Contribution const& c) { return !c.counts; });
    if (list.empty()) return;
    std::uint64_t raw = 0, counted = 0, all = 0;
    for (std::size_t i = 0; i < list.size(); ++i) {
      all += list[i].verified ? 0 : list[i].bytes;
      if (i > 0 && list[i].first == list[i - 1].first && list[i].bytes == list[i - 1].bytes) {
        if (list[i].raw != list[i - 1].raw)
          throw Error{ErrorCode::corrupt, "two ranks read different bytes for " + tensors_in({list[i].first, list[i].first + list[i].bytes}, f)}.with_path(path(f)).with_range(begin, begin + size);
        continue;
      }
      raw ^= list[i].raw;
      counted += list[i].bytes;
    }
    std::vector<FileRange> unread;
    std::uint64_t at = begin;
    for (auto const& range : loaded_[f]) {
      if (range.end <= at) continue;
      if (range.begin >= begin + size) break;
      if (range.begin > at) unread.push_back({at, range.begin});
      at = std::min(begin + size, range.end);
    }
    if (at < begin + size) unread.push_back({at, begin + size});
    for (auto const& range : unread) counted += range.size();
    if (counted != size) {   // entries that read parts of one stored tensor
      unverified_bytes += all;
      return;
    }
    Bytes bytes;
    for (auto const& range : unread) {
      bytes.resize(static_cast<std::size_t>(range.size()));
      file(f).read_at(range.begin, bytes);
      raw ^= crc64_contribution(bytes, range.begin - begin, size);
      verification_bytes += range.size();
    }
    if (crc64_from_raw(raw, size) != opened_.checksums.of(name)[static_cast<std::size_t>(chunk)]) throw corrupt_chunk(path(f), file_size, chunk, tensors_in({begin, begin + size}, f));
    verified_bytes += all;
  }

  std::string tensors_in(FileRange range, std::uint32_t f) const {
    std::string names;
    int count = 0;
    for (auto const* tensors : {&opened_.catalog.tensors, &opened_.catalog.raw})
      for (auto const& tensor : *tensors)
        for (auto const* pieces : {&tensor.pieces, &tensor.copies})
          for (auto const& piece : *pieces)
            if (piece.file == f && piece.offset < range.end && piece.offset + bytes_of(tensor.dtype, static_cast<std::int64_t>(piece.box.size())) > range.begin && ++count <= 4)
              names += (names.empty() ? "" : ", ") + tensor.name;
    return count > 4 ? names + " and " + std::to_string(count - 4) + " more" : names;
  }

  CommRef comm_;
  AnyMedium& medium_;
  OpenedCheckpoint& opened_;
  TransferIndex index_;
  std::vector<std::vector<FileRange>> loaded_;
  std::vector<ReadPurpose> purposes_;
  std::vector<Decode> decodes_;
  std::vector<SummedRecord> records_;
  LoadSettings const& settings_;
  Budget budget_;
  Stopwatch& watch_;
  bool verifies_ = false, reaches_devices_ = false;
  std::vector<std::unique_ptr<ReadableFile>> files_;
  Mutex mutex_;
  std::vector<Contribution> contributions_;
  std::set<std::pair<std::uint32_t, std::uint64_t>> whole_chunks_;   // (file, chunk) that a tile has had compared
  Atomic<std::uint64_t> done_{0}, operations_{0};
};

}  // namespace dcp::detail
