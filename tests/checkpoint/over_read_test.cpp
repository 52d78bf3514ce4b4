// SPDX-License-Identifier: Apache-2.0
// How much more than what ranks need a load asks the storage for.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace {

using dcp::Placement;
using dcp::Replicate;
using dcp::Shard;

// Counts what is read of data files.
class Counted : public dcp::Memory {
 public:
  std::shared_ptr<std::atomic<std::uint64_t>> bytes = std::make_shared<std::atomic<std::uint64_t>>(0);

  template <class = dcp::Deferred>
  std::unique_ptr<dcp::ReadableFile> open_read(std::string const& path) {
    struct File final : dcp::ReadableFile {
      std::unique_ptr<dcp::ReadableFile> file;
      std::shared_ptr<std::atomic<std::uint64_t>> count;
      std::uint64_t size() const override { return file->size(); }
      void read_at(std::uint64_t offset, dcp::ByteSpan out) override {
        if (count) *count += out.size();
        file->read_at(offset, out);
      }
    };
    auto counted = std::make_unique<File>();
    counted->file = dcp::Memory::open_read(path);
    if (path.ends_with(".safetensors")) counted->count = bytes;
    return counted;
  }
};
using Storage = dcp::BasicSafeTensors<Counted>;

struct Read {
  double times;        // bytes read of data files, in bytes that ranks need
  dcp::Report report;
};

template <class P>
dcp::StateDict state_of(dcp::ThreadComm const& world, std::int64_t tensors, std::int64_t rows, std::int64_t columns, std::vector<std::vector<float>>& memory) {
  dcp::DeviceMesh<1> const mesh{world, {world.size()}};
  dcp::StateDict state;
  for (std::int64_t t = 0; t < tensors; ++t) {
    memory.emplace_back(dcp::local_box<P>(mesh, {rows, columns}).size(), 1.0f);
    state.add("t" + std::to_string(t), dcp::ShardedTensor<float, P>{mesh, {rows, columns}, memory.back()});
  }
  return state;
}

template <class To>
Read load_as(int ranks, std::int64_t tensors, std::int64_t rows, std::int64_t columns, dcp::Verify verify) {
  Counted const store;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    std::vector<std::vector<float>> memory;
    dcp::save<Storage>(world, {store, "ckpt"}, state_of<Placement<Shard<0>>>(world, tensors, rows, columns, memory));
  });
  *store.bytes = 0;
  std::atomic<std::uint64_t> needed{0};
  Read result{};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    std::vector<std::vector<float>> memory;
    auto const state = state_of<To>(world, tensors, rows, columns, memory);
    for (auto const& part : memory) needed += 4 * part.size();
    auto const report = dcp::load<Storage>(world, {store, "ckpt"}, state, {.verify = verify});
    if (world.rank() == 0) result.report = report;
  });
  // The header, and the chunk that it begins, are verified before they are believed: at most this, of one file.
  std::uint64_t const header = dcp::chunk_bytes + 2 * 4096;
  result.times = static_cast<double>(*store.bytes - std::min<std::uint64_t>(*store.bytes, verify == dcp::Verify::none ? 2 * 4096 : header)) / static_cast<double>(needed);
  return result;
}

}  // namespace

TEST_CASE("load: of runs of 64 KiB and more, what is read is within 2 % of what is needed, verified or not") {
  // Columns of 64 KiB on each of 2 and 4 ranks; rows; everything everywhere.
  for (auto const verify : {dcp::Verify::none, dcp::Verify::standard}) {
    CHECK(load_as<Placement<Shard<1>>>(2, 3, 256, 32768, verify).times <= 1.02);
    CHECK(load_as<Placement<Shard<1>>>(4, 3, 128, 65536, verify).times <= 1.02);
    CHECK(load_as<Placement<Shard<0>>>(3, 3, 1000, 8192, verify).times <= 1.02);
    CHECK(load_as<Placement<Replicate>>(2, 3, 500, 8192, verify).times <= 1.02);
    CHECK(load_as<Placement<Shard<1>>>(2, 3, 256, 32768, verify).report.over_read_bytes == 0);
  }
}

TEST_CASE("load: of shorter runs, what is read is within 1.5 times what is needed, and the report has the bytes between") {
  for (std::int64_t const columns : {64, 500, 2048, 8000})
    for (int const ranks : {2, 4}) {
      CAPTURE(columns);
      CAPTURE(ranks);
      for (auto const verify : {dcp::Verify::none, dcp::Verify::standard}) {
        auto const read = load_as<Placement<Shard<1>>>(ranks, 2, 4'000'000 / columns, columns, verify);
        // Holes within a page are read with it: the device reads pages.
        bool const within_pages = columns * 4 < 4096;
        if (!within_pages) CHECK(read.times <= 1.48);
        CHECK(read.times <= ranks + 0.01);
        std::uint64_t const extra = read.report.over_read_bytes + (verify == dcp::Verify::none ? 0 : read.report.verification_bytes);
        CHECK(read.times <= 1.01 + static_cast<double>(extra) / static_cast<double>(read.report.tensor_bytes));
        CHECK(read.times >= 0.99 + static_cast<double>(read.report.over_read_bytes) / static_cast<double>(read.report.tensor_bytes));
      }
    }
}
