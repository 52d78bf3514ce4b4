// SPDX-License-Identifier: Apache-2.0
#pragma once
// Boxes of a checkpoint's tensors, one after the other, in any order: for what passes over a checkpoint and never holds all of it.

#include <dcp/base/config.hpp>
#include <dcp/base/threading.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/read_plan.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// Reads boxes. Used by several threads at once; an opened checkpoint, which must outlive it, that was located (AnyStorage::locate).
///
/// Verified  unless told not to: every chunk that is touched, or every record of an archive, is read whole and compared before a byte of it is used, once
template <class = Deferred>
class CatalogReader {
 public:
  CatalogReader(AnyMedium& medium, OpenedCheckpoint& opened, Verify verify) : medium_{medium}, opened_{opened}, verify_{verify != Verify::none}, files_(opened.catalog.files.size()) {}

  /// `box` of a tensor, dense and row-major, as `dtype`: that of the tensor, or another that it is decoded to.
  void read(CatalogTensor const& tensor, Box const& box, DType dtype, std::byte* out) {
    ReadPlan plan;
    plan_reads(tensor, dtype, box, {out, row_major_strides(box.shape)}, true, false, plan);
    if (verify_ && !opened_.record) verify_records(tensor, box);
    std::map<std::uint32_t, std::vector<Run>> runs;   // of each file
    for (auto const& transfer : plan.transfers)
      transfer.for_each_run(transfer.begin, transfer.end, [&](std::uint64_t at, std::byte* memory, std::size_t bytes) { runs[transfer.file].push_back({at, memory, bytes}); });
    read_runs(runs);
    for (auto const& decode : plan.decodes) read_decoded(decode);
  }

 private:
  struct Run {
    std::uint64_t at;
    std::byte* memory;
    std::size_t bytes;
  };

  ReadableFile& file(std::uint32_t f) {
    std::lock_guard const lock{mutex_};
    if (!files_[f]) {
      files_[f] = medium_.open_read(path(f));
      if (files_[f]->size() != opened_.catalog.files[f].size) throw Error{ErrorCode::corrupt, "the file has another size than when its header was read"}.with_path(path(f));
    }
    return *files_[f];
  }
  std::string path(std::uint32_t f) const { return opened_.directory + '/' + opened_.catalog.files[f].path; }

  void read_runs(std::map<std::uint32_t, std::vector<Run>>& runs) {
    constexpr std::size_t most_pieces = 512;
    constexpr std::uint64_t gap_bytes = 16 << 10;
    Bytes skipped(static_cast<std::size_t>(gap_bytes));
    std::vector<ByteSpan> pieces;
    for (auto& [f, list] : runs) {
      std::sort(list.begin(), list.end(), [](Run const& a, Run const& b) { return a.at < b.at; });
      if (verify_ && opened_.record) verify_chunks(f, list);
      ReadableFile& in = file(f);
      for (std::size_t i = 0; i < list.size();) {
        std::uint64_t const begin = list[i].at;
        std::uint64_t at = begin;
        pieces.clear();
        for (; i < list.size() && pieces.size() + 2 <= most_pieces && list[i].at >= at && list[i].at - at <= gap_bytes; ++i) {
          if (list[i].at > at) pieces.push_back(ByteSpan{skipped}.first(static_cast<std::size_t>(list[i].at - at)));
          pieces.push_back({list[i].memory, list[i].bytes});
          at = list[i].at + list[i].bytes;
        }
        try {
          in.read_pieces(begin, pieces);
        } catch (Error& error) {
          throw error.with_path(path(f)).with_range(begin, at);
        }
      }
    }
  }

  void verify_chunks(std::uint32_t f, std::vector<Run> const& runs) {
    std::string const& name = opened_.catalog.files[f].path;
    if (!opened_.checksums.has(name)) return;
    auto const& table = opened_.checksums.of(name);
    Bytes buffer;
    for (auto const& run : runs)
      for (std::uint64_t chunk = run.at / chunk_bytes; chunk * chunk_bytes < run.at + run.bytes; ++chunk)
        once(f, chunk, [&] { verify_chunk(file(f), path(f), opened_.catalog.files[f].size, chunk, table[static_cast<std::size_t>(chunk)], "", buffer); });
  }
  void verify_records(CatalogTensor const& tensor, Box const& box) {
    Box common;
    Bytes buffer;
    for (auto const& piece : tensor.pieces)
      if (piece.crc32 && intersect(box, piece.box, common)) once(piece.file, piece.offset, [&] { verify_record(file(piece.file), path(piece.file), record_of(tensor.dtype, piece), tensor.name, buffer); });
  }
  // Who comes while another thread compares waits for it. What is found to be wrong is found again by whoever asks again.
  template <class Compare>
  void once(std::uint32_t f, std::uint64_t what, Compare compare) {
    std::lock_guard const comparing{comparing_[(f * 31 + what) % comparing_.size()]};
    {
      std::lock_guard const lock{mutex_};
      if (verified_.contains({f, what})) return;
    }
    compare();
    std::lock_guard const lock{mutex_};
    verified_.insert({f, what});
  }

  void read_decoded(Decode const& decode) {
    constexpr std::uint64_t tile_bytes = 512 << 10;
    CatalogTensor const& tensor = *decode.tensor;
    Encoding const& encoding = *tensor.encoding;
    std::int64_t const most = elements_of_tile(encoding, decode.held, tile_bytes);
    std::vector<Bytes> scratch(encoding.parts().size());
    for_each_tile(encoding, decode.held, most, [&](Box const& tile) {
      std::map<std::uint32_t, std::vector<Run>> runs;
      std::vector<PartBytes> given(scratch.size());
      for (std::size_t p = 0; p < scratch.size(); ++p) {
        EncodedPart const& part = encoding.parts()[p];
        Box const box = part.grid.needed(tile, encoding.shape(), part.shape);
        scratch[p].resize(static_cast<std::size_t>(bytes_of(part.dtype, static_cast<std::int64_t>(box.size()))));
        MemoryView const memory{scratch[p].data(), row_major_strides(box.shape)};
        given[p] = {memory.data, box};
        for_each_source(
            tensor.parts[p], box,
            [&](StoredPiece const& piece, Box const& from) {
              Transfer const transfer = make_transfer(part.dtype, part.dtype, from, box, memory, piece.box, piece.offset);
              transfer.for_each_run(0, transfer.end, [&](std::uint64_t at, std::byte* to, std::size_t size) { runs[piece.file].push_back({at, to, size}); });
            },
            [&](Box const& hole) {
              if (part.shape.rank() > 0) throw Error{ErrorCode::incomplete, part.name + ": nothing is stored for " + to_string(hole)};
            });
      }
      read_runs(runs);
      std::int64_t at = 0;
      for (int d = 0; d < tile.rank(); ++d) at += (tile.origin[d] - decode.held.origin[d]) * decode.memory.strides[d];
      encoding.decode(tile, given, decode.memory_dtype, {decode.memory.data + static_cast<std::ptrdiff_t>(bytes_of(decode.memory_dtype, at)), decode.memory.strides});
    });
  }

  AnyMedium& medium_;
  OpenedCheckpoint& opened_;
  bool verify_;
  Mutex mutex_;
  std::array<Mutex, 61> comparing_;   // by file and place
  std::vector<std::unique_ptr<ReadableFile>> files_;
  std::set<std::pair<std::uint32_t, std::uint64_t>> verified_;   // (file, chunk, or the offset of a record)
};

}  // namespace dcp::detail
