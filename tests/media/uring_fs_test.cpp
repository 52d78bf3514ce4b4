// SPDX-License-Identifier: Apache-2.0
// ctest: alone
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/uring_fs.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/kill_campaign.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <sys/resource.h>

namespace {

static_assert(dcp::Medium<dcp::UringFs>);
static_assert(dcp::Storage<dcp::BasicSafeTensors<dcp::UringFs>>);

/// What a kernel's ring may do: write, write a part, fail, refuse.
struct FakeRing {
  struct Ended {
    std::size_t id;
    int result;
  };
  struct Behaviour {
    std::function<int(std::size_t nth)> refuses = [](std::size_t) { return 0; };         // to begin the nth write: an errno
    std::function<int(std::size_t nth, int bytes)> result = [](std::size_t, int bytes) { return bytes; };
    std::size_t begun = 0, ended = 0;
  };
  std::shared_ptr<Behaviour> behaviour;
  struct Write {
    int file;
    std::uint64_t offset;
    dcp::ConstByteSpan bytes;
    std::size_t id;
  };
  std::vector<Write> writes = {};

  int write(int file, std::uint64_t offset, dcp::ConstByteSpan bytes, std::size_t id) {
    if (int const failure = behaviour->refuses(behaviour->begun); failure != 0) return failure;
    ++behaviour->begun;
    writes.push_back({file, offset, bytes, id});
    return 0;
  }
  // The last one first: a kernel keeps no order.
  int wait(Ended& ended) {
    REQUIRE(!writes.empty());
    Write const write = writes.back();
    writes.pop_back();
    ended = {write.id, behaviour->result(behaviour->ended++, static_cast<int>(write.bytes.size()))};
    if (ended.result > 0 && ::pwrite(write.file, write.bytes.data(), static_cast<std::size_t>(ended.result), static_cast<off_t>(write.offset)) != ended.result) ended.result = -errno;
    return 0;
  }
};

// Aligned, as what a save stages.
dcp::AlignedBuffer pattern(std::size_t size) {
  dcp::AlignedBuffer buffer{size};
  for (std::size_t i = 0; i < size; ++i) buffer.data()[i] = static_cast<std::byte>(i * 31 + i / 4096);
  return buffer;
}

// Writes `contents` in pieces of `piece` bytes through a queue, as the writer of a save does.
void write_through(dcp::WriteQueue& queue, dcp::WritableFile& file, dcp::ConstByteSpan contents, std::size_t piece) {
  std::vector<std::size_t> idle;
  for (std::size_t id = 0; id < queue.depth(); ++id) idle.push_back(id);
  auto const end_one = [&] {
    auto const ended = queue.wait();
    if (ended.failure) std::rethrow_exception(ended.failure);
    CHECK(std::find(idle.begin(), idle.end(), ended.id) == idle.end());
    idle.push_back(ended.id);
  };
  for (std::size_t at = 0; at < contents.size(); at += piece) {
    if (idle.empty()) end_one();
    queue.begin(file, at, contents.subspan(at, std::min(piece, contents.size() - at)), idle.back());
    idle.pop_back();
  }
  while (idle.size() < queue.depth()) end_one();
}

std::map<std::string, std::string> files_in(std::filesystem::path const& directory) {
  std::map<std::string, std::string> files;
  for (auto const& entry : std::filesystem::directory_iterator{directory}) {
    std::ifstream in{entry.path(), std::ios::binary};
    files[entry.path().filename().string()] = {std::istreambuf_iterator<char>{in}, {}};
  }
  return files;
}

template <class On>
void save_pattern(int ranks, std::filesystem::path const& place, dcp::DirectIo direct, int threads, std::vector<std::int64_t> const& rows) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::DeviceMesh<1> const mesh{world, {world.size()}};
    using Rows = dcp::Placement<dcp::Shard<0>>;
    std::vector<std::vector<float>> memory;
    dcp::StateDict state;
    for (std::size_t t = 0; t < rows.size(); ++t) {
      auto const box = dcp::local_box<Rows>(mesh, {rows[t], 1000});
      auto& part = memory.emplace_back(box.size());
      for (std::size_t i = 0; i < part.size(); ++i) part[i] = static_cast<float>(t * 1'000'000 + static_cast<std::size_t>(box.origin[0]) * 1000 + i);
      state.add("t" + std::to_string(t), dcp::ShardedTensor<float, Rows>{mesh, {rows[t], 1000}, part});
    }
    dcp::SaveOptions<On> options;
    options.if_exists = dcp::IfExists::replace;
    options.threads = threads;
    options.direct_io = direct;
    options.memory_bytes = 64 << 20;
    dcp::save<On>(world, place, state, options);
  });
}

}  // namespace

TEST_CASE("UringQueue: whatever a ring does with writes, the file holds them") {
  using Behaviour = FakeRing::Behaviour;
  std::map<std::string, std::function<void(Behaviour&)>> const cases{
      {"it writes", [](Behaviour&) {}},
      {"it refuses all", [](Behaviour& b) { b.refuses = [](std::size_t) { return EPERM; }; }},
      {"it breaks in the middle", [](Behaviour& b) { b.refuses = [](std::size_t nth) { return nth >= 5 ? ENOSYS : 0; }; }},
      {"it is busy now and then", [](Behaviour& b) { b.refuses = [n = 0](std::size_t) mutable { return ++n % 3 == 0 ? EBUSY : 0; }; }},
      {"it writes parts", [](Behaviour& b) { b.result = [](std::size_t nth, int bytes) { return nth % 2 == 0 ? bytes / 2 : bytes; }; }},
      {"it is interrupted", [](Behaviour& b) { b.result = [](std::size_t nth, int bytes) { return nth % 2 == 1 ? -EINTR : bytes; }; }},
      {"the file system takes no such writes", [](Behaviour& b) { b.result = [](std::size_t, int) { return -EINVAL; }; }},
      {"the kernel forgets the operation", [](Behaviour& b) { b.result = [](std::size_t nth, int bytes) { return nth >= 3 ? -EOPNOTSUPP : bytes; }; }},
  };
  for (auto const& one : cases)
    for (auto const mode : {dcp::DirectIo::never, dcp::DirectIo::always})
      for (std::size_t const size : {std::size_t{1}, std::size_t{8192}, std::size_t{300'000}}) {
        auto const& name = one.first;
        CAPTURE(name);
        CAPTURE(size);
        dcp::test::TemporaryDirectory directory;
        auto behaviour = std::make_shared<Behaviour>();
        one.second(*behaviour);
        auto const buffer = pattern(size);
        dcp::ConstByteSpan const contents{buffer.data(), size};
        {
          dcp::UringFs medium;
          auto const file = medium.open_blocks(directory.path() + "/file", 4096, mode);
          file->resize(size);
          dcp::detail::UringQueue<FakeRing> queue{std::make_unique<FakeRing>(FakeRing{behaviour}), 4};
          write_through(queue, *file, contents, 16384);
          file->sync();
          file->close();
        }
        auto const files = files_in(directory.path());
        CHECK(dcp::as_byte_span(files.at("file")).size() == size);
        CHECK(std::equal(contents.begin(), contents.end(), dcp::as_byte_span(files.at("file")).begin()));
        if (name == "it writes") CHECK(behaviour->begun == size / 16384 + (size % 16384 != 0 && size % 4096 == 0 ? 1 : 0));   // a tail inside a block is the file's
      }
}

TEST_CASE("UringQueue: what the file system refuses is an error, of the write that it refused") {
  for (int const refusal : {ENOSPC, EIO, EDQUOT}) {
    dcp::test::TemporaryDirectory directory;
    auto behaviour = std::make_shared<FakeRing::Behaviour>();
    behaviour->result = [refusal](std::size_t nth, int bytes) { return nth == 2 ? -refusal : bytes; };
    dcp::UringFs medium;
    auto const buffer = pattern(100'000);   // outlives the queue, which waits for what is under way
    auto const file = medium.open_blocks(directory.path() + "/file", 4096, dcp::DirectIo::never);
    dcp::detail::UringQueue<FakeRing> queue{std::make_unique<FakeRing>(FakeRing{behaviour}), 4};
    int seen = 0;
    try {
      write_through(queue, *file, {buffer.data(), 100'000}, 8192);
    } catch (dcp::Error const& error) {
      seen = error.system_error();
    }
    CHECK(seen == refusal);
  }
}

TEST_CASE("UringFs: the files of a save are, byte by byte, those of LocalFs, directly and through the page cache, on any number of threads") {
  std::vector<std::int64_t> const rows{3001, 17, 4000, 1};
  for (int const ranks : {1, 3}) {
    dcp::test::TemporaryDirectory directory;
    save_pattern<dcp::SafeTensors>(ranks, directory.path() + "/plain", dcp::DirectIo::never, 1, rows);
    auto expected = files_in(directory.path() + "/plain");
    expected.erase("dcp.json");   // it holds an id
    for (auto const direct : {dcp::DirectIo::never, dcp::DirectIo::always, dcp::DirectIo::automatic})
      for (int const threads : {1, 4}) {
        CAPTURE(ranks);
        CAPTURE(threads);
        save_pattern<dcp::BasicSafeTensors<dcp::UringFs>>(ranks, directory.path() + "/uring", direct, threads, rows);
        save_pattern<dcp::SafeTensors>(ranks, directory.path() + "/threads", direct, threads, rows);
        for (auto const* name : {"uring", "threads"}) {
          auto found = files_in(directory.path() + "/" + name);
          found.erase("dcp.json");
          CHECK(found == expected);
        }
      }
  }
}

TEST_CASE("UringFs: a disk that refuses ends the save with an Error that names file and bytes, and leaves nothing") {
  dcp::test::TemporaryDirectory directory;
  auto const before = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  rlimit const small{20 << 20, limit.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  std::string message;
  try {
    save_pattern<dcp::BasicSafeTensors<dcp::UringFs>>(1, directory.path() + "/ckpt", dcp::DirectIo::automatic, 2, {8000});
  } catch (dcp::Error const& error) {
    message = error.what();
  }
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  std::signal(SIGXFSZ, before);
  CAPTURE(message);
  CHECK(message.find("model-00001-of-00001.safetensors") != std::string::npos);
  CHECK(!std::filesystem::exists(directory.path() + "/ckpt"));
  save_pattern<dcp::BasicSafeTensors<dcp::UringFs>>(1, directory.path() + "/ckpt", dcp::DirectIo::automatic, 2, {8000});
  CHECK(std::filesystem::exists(directory.path() + "/ckpt/dcp.json"));
}

TEST_CASE("UringFs: ranks that are killed at any time, their writes in the kernel's hands, lose nothing") {
  namespace kills = dcp::test::kills;
  auto const seed = dcp::test::first_seed() + 2'000'000;
  CAPTURE(seed);
  kills::check(kills::campaign<dcp::UringFs>(seed, dcp::test::rounds(60, 600), kills::time_of()), 5);
}
