// SPDX-License-Identifier: Apache-2.0
#pragma once
// verify: every byte of a checkpoint that has a checksum, compared with it; nothing is loaded.

#include <dcp/base/config.hpp>
#include <dcp/base/crc32.hpp>
#include <dcp/checkpoint/convert.hpp>
#include <dcp/checkpoint/open.hpp>
#include <dcp/checkpoint/options.hpp>
#include <dcp/checkpoint/report.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/io/aligned_buffer.hpp>
#include <dcp/io/workers.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dcp {
namespace detail {

template <class = Deferred>
Report verify_checkpoint(CommRef comm, AnyStorage const& storage, PlaceRef const& place, LoadSettings const& settings) {
  Stopwatch watch;
  Report report;
  report.operation = "verify";
  AnyMedium& medium = *place.medium;
  return again_if_replaced(comm, medium, place.path, [&](Sighting& seen) {
    watch.enter("open");
    OpenedCheckpoint opened = open_checkpoint(comm, storage, medium, place.path, Verify::standard, seen);
    watch.enter("verify");
    Atomic<std::uint64_t> verified{0}, done{0};
    agree(comm, "verify", [&] {
      struct Part {
        std::string path;             // in the checkpoint
        std::uint64_t begin, bytes;
        RecordFile const* listed;     // of chunks
        std::uint32_t crc32;          // of a record
        std::string const* tensor;
      };
      constexpr std::uint64_t part_bytes = 4 << 20;
      std::vector<Part> parts;
      if (opened.record) {
        for (auto const& file : opened.record->files)
          if (file.summed)
            for (std::uint64_t at = 0; at < file.size; at += part_bytes) parts.push_back({file.path, at, std::min(part_bytes, file.size - at), &file, 0, nullptr});
      } else {
        locate_pieces(storage, medium, opened, {});
        for (auto const& tensor : opened.catalog.tensors)
          for (auto const* pieces : {&tensor.pieces, &tensor.copies})
            for (auto const& piece : *pieces)
              if (piece.crc32) {
                SummedRecord const record = record_of(tensor.dtype, piece);
                parts.push_back({opened.catalog.files[piece.file].path, record.offset, record.bytes, nullptr, record.crc32, &tensor.name});
              }
        std::stable_sort(parts.begin(), parts.end(), [](Part const& a, Part const& b) { return a.path != b.path ? a.path < b.path : a.begin < b.begin; });
      }
      std::uint64_t total = 0;
      for (auto const& part : parts) total += part.bytes;
      auto const threads = static_cast<std::size_t>(settings.threads);
      std::vector<AlignedBuffer> buffers(threads);
      std::vector<std::pair<std::string, std::unique_ptr<ReadableFile>>> open(threads);   // of each thread, the last
      Workers<> workers{threads};
      for (std::size_t p = static_cast<std::size_t>(comm.rank()); p < parts.size(); p += static_cast<std::size_t>(comm.size()))
        workers.submit([&, p](std::size_t thread) {
          Part const& part = parts[p];
          std::string const path = opened.directory + '/' + part.path;
          auto& [name, file] = open[thread];
          if (name != part.path || !file) file = medium.open_read(path), name = part.path;
          if (part.listed != nullptr) require_size(*file, path, part.listed->size);
          AlignedBuffer& buffer = buffers[thread];
          if (buffer.size() == 0) buffer = AlignedBuffer{static_cast<std::size_t>(chunk_bytes)};
          std::uint32_t crc = 0;
          for (std::uint64_t at = part.begin, end = part.begin + part.bytes; at < end; at += chunk_bytes) {
            ByteSpan const bytes{buffer.data(), static_cast<std::size_t>(std::min(chunk_bytes, end - at))};   // stays in cache until it is summed up
            file->read_at(at, bytes);
            if (part.listed == nullptr) crc = crc32(bytes, crc);
            else if (crc64(bytes) != opened.checksums.of(part.path)[static_cast<std::size_t>(at / chunk_bytes)]) throw corrupt_chunk(path, part.listed->size, at / chunk_bytes, "");
            done += bytes.size();
          }
          if (part.listed == nullptr && crc != part.crc32)
            throw wrong_record(path, part.begin, part.begin + part.bytes, *part.tensor);
          verified += part.bytes;
        });
      auto reported = Stopwatch::clock::now();
      workers.finish([&] {
        comm.progress();
        auto const now = Stopwatch::clock::now();
        if (!settings.progress || now - reported < std::chrono::milliseconds{250}) return;
        reported = now;
        settings.progress({"verify", done * static_cast<std::uint64_t>(comm.size()), total});
      });
      watch.here().bytes += verified;
    });
    seen.complete = true;
    report.place = opened.record ? opened.record_directory : opened.directory;
    report.id = opened.record ? opened.record->id : "";
    report.foreign = !opened.record;
    report.tensors = opened.catalog.tensors.size();
    report.values = opened.catalog.values.size();
    std::uint64_t stored = 0;
    for (auto const& tensor : opened.catalog.tensors) {
      report.tensor_bytes += bytes_of(tensor.dtype, tensor.shape.elements());
      for_each_stored_piece(tensor, [&](DType dtype, StoredPiece const& piece) { stored += bytes_of(dtype, static_cast<std::int64_t>(piece.box.size())); });
    }
    report.duplicates = opened.catalog.duplicates;
    report.warnings = opened.catalog.warnings;
    for (auto const bytes : all_gather_value(comm, verified.load())) report.verified_bytes += bytes;
    report.unverified_bytes = stored > report.verified_bytes ? stored - report.verified_bytes : 0;
    watch.collect(comm, report);
    return report;
  });
}
}  // namespace detail

/// Reads all of the checkpoint at `place` and compares it with its checksums: those of the commit record, of every chunk of every file; or, where PyTorch has written it,
/// the CRC-32 of every tensor. Files, headers, index, names and shapes are compared as a load compares them. Collective; ranks share the work.
///
/// Report    verified_bytes; unverified_bytes, which have no checksum: all of a foreign checkpoint whose format has none
/// Throws    Error(corrupt) that names file and range, and what opening a checkpoint throws
/// Example   dcp::verify<dcp::TorchDcp>(world, "ckpt/step-100");
template <class S, class C>
Report verify(C& comm, place_of<S> const& place, LoadOptions<S> const& options = {}) {
  [[maybe_unused]] detail::verb_arguments<S, C> check;
  if constexpr (Storage<S> && Communicator<C>) return detail::verify_checkpoint(CommRef{comm}, *S::open(options.storage), S::locate(place), detail::settings_of(options));
  else return {};
}

}  // namespace dcp
