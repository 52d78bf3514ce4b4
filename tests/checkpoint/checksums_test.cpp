// SPDX-License-Identifier: Apache-2.0
// Every byte of a file is written once, by one rank: what the counts and checksums of a save say when that is not so.
#include <dcp/checkpoint/checksums.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"

#include <doctest/doctest.h>

#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using dcp::detail::decode_sums;
using dcp::detail::encode;
using dcp::detail::finish_sums;
using dcp::detail::merge_sums;
using dcp::test::GenerationState;
using Sums = std::map<std::string, dcp::detail::FileSums>;

/// A file in runs, as ranks write them.
struct Runs {
  dcp::Bytes bytes;
  std::vector<std::size_t> cuts;   // 0, ..., size

  Runs(dcp::test::Random& random, std::size_t size) : bytes{random.bytes(size)}, cuts{0, size} {
    for (int i = 0; i < 40; ++i) cuts.push_back(static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(size))));
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  }
  std::size_t count() const { return cuts.size() - 1; }
  dcp::ConstByteSpan run(std::size_t i) const { return dcp::ConstByteSpan{bytes}.subspan(cuts[i], cuts[i + 1] - cuts[i]); }
};

dcp::ErrorCode code_of(std::function<void()> const& action) {
  try {
    action();
  } catch (dcp::Error const& error) {
    return error.code();
  }
  return dcp::ErrorCode::unknown;
}

}  // namespace

TEST_CASE("law: whoever wrote which run, and in whatever order sums meet, they become the checksums of the file") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  for (std::uint64_t round = 0; round < 30; ++round) {
    dcp::test::Random random{seed + round};
    CAPTURE(round);
    Runs const file{random, static_cast<std::size_t>(random.between(1, 3 << 20))};
    std::vector<dcp::detail::WrittenSums<>> ranks(static_cast<std::size_t>(random.between(1, 5)));
    for (std::size_t i = 0; i < file.count(); ++i) ranks[static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(ranks.size()) - 1))].add("f", file.bytes.size(), file.cuts[i], file.run(i));
    std::vector<dcp::Bytes> messages;
    for (auto& rank : ranks) messages.push_back(encode(rank.take()));
    while (messages.size() > 1) {
      random.shuffle(messages);
      auto merged = merge_sums(messages[0], messages[1]);
      messages.erase(messages.begin());
      messages[0] = std::move(merged);
    }
    auto const result = finish_sums("f", decode_sums(messages[0]).at("f"));
    CHECK(result.file == dcp::crc64(file.bytes));
    REQUIRE(result.chunks.size() == dcp::ceil_div(file.bytes.size(), dcp::chunk_bytes));
    for (std::size_t c = 0; c < result.chunks.size(); ++c) {
      auto const begin = c * dcp::chunk_bytes, size = std::min<std::size_t>(dcp::chunk_bytes, file.bytes.size() - begin);
      CHECK(result.chunks[c] == dcp::crc64(dcp::ConstByteSpan{file.bytes}.subspan(begin, size)));
    }
  }
}

TEST_CASE("sums: a run that nobody wrote is found, also one of zeros, which no checksum shows; so is one counted twice or behind the end") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  dcp::test::Random random{seed};
  Runs file{random, (2 << 20) + 12345};
  std::size_t const victim = file.count() / 2;
  std::fill(file.bytes.begin() + static_cast<std::ptrdiff_t>(file.cuts[victim]), file.bytes.begin() + static_cast<std::ptrdiff_t>(file.cuts[victim + 1]), std::byte{0});
  auto const sums = [&](auto times) {
    dcp::detail::WrittenSums<> written;
    for (std::size_t i = 0; i < file.count(); ++i)
      for (int t = 0; t < times(i); ++t) written.add("f", file.bytes.size(), file.cuts[i], file.run(i));
    return written.take().at("f");
  };
  CHECK(finish_sums("f", sums([](std::size_t) { return 1; })).file == dcp::crc64(file.bytes));
  auto const missing = sums([&](std::size_t i) { return i == victim ? 0 : 1; });
  auto const twice = sums([&](std::size_t i) { return i == victim ? 2 : 1; });
  for (auto const* wrong : {&missing, &twice}) {
    std::string what;
    try {
      finish_sums("f", *wrong);
    } catch (dcp::Error const& error) {
      CHECK(error.code() == dcp::ErrorCode::incomplete);
      CHECK(error.path() == "f");
      what = error.what();
    }
    CHECK(what.find(wrong == &missing ? "written by nobody" : "written twice") != std::string::npos);
    CHECK(what.find("bytes [" + std::to_string(file.cuts[victim] / dcp::chunk_bytes * dcp::chunk_bytes)) != std::string::npos);
  }
  // The linear sums alone would not have told: zeros weigh nothing.
  CHECK(missing.chunks.at(file.cuts[victim] / dcp::chunk_bytes).raw == twice.chunks.at(file.cuts[victim] / dcp::chunk_bytes).raw);

  auto behind = sums([](std::size_t) { return 1; });
  behind.chunks[7] = {0, 1};
  CHECK(code_of([&] { finish_sums("f", behind); }) == dcp::ErrorCode::incomplete);
  CHECK(finish_sums("f", {}).file == dcp::crc64({}));
  CHECK(code_of([] { finish_sums("f", {1, {}}); }) == dcp::ErrorCode::incomplete);
}

TEST_CASE("sums: one run counted twice in place of another of its size leaves a checksum that the bytes do not have") {
  // Counts are right then; a load notices, because what is recorded is not what lies there.
  dcp::Bytes bytes(1000);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
  dcp::detail::WrittenSums<> written;
  written.add("f", 1000, 0, dcp::ConstByteSpan{bytes}.first(500));
  written.add("f", 1000, 0, dcp::ConstByteSpan{bytes}.first(500));
  CHECK(finish_sums("f", written.take().at("f")).file != dcp::crc64(bytes));
}

TEST_CASE("sums: ranks that planned different sizes, and damaged messages, are refused") {
  Sums const a{{"f", {10, {{0, {1, 10}}}}}}, b{{"f", {11, {}}}};
  CHECK(code_of([&] { merge_sums(encode(a), encode(b)); }) == dcp::ErrorCode::ranks_disagree);
  dcp::Bytes const message = encode(a);
  for (std::size_t size = 0; size < message.size(); ++size)
    CHECK_THROWS_AS(decode_sums(dcp::ConstByteSpan{message}.first(size)), dcp::Error);
  CHECK(decode_sums(message).at("f").chunks.at(0).bytes == 10);
}

namespace {

// --- plans that are wrong on one rank: the safetensors driver, with a saboteur behind it

using Sabotage = std::function<void(dcp::FilePlan&, std::int64_t rank)>;
Sabotage& sabotage() {
  static Sabotage action;
  return action;
}

struct SabotagedDriver final : dcp::AnyStorage {
  std::unique_ptr<dcp::AnyStorage> inner;
  explicit SabotagedDriver(std::unique_ptr<dcp::AnyStorage> driver) : inner{std::move(driver)} {}
  std::string_view name() const override { return inner->name(); }
  std::string file_layout() const override { return inner->file_layout(); }
  std::string options_text() const override { return inner->options_text(); }
  dcp::FilePlan plan_files(dcp::SaveRequest const& request) const override {
    auto plan = inner->plan_files(request);
    if (sabotage()) sabotage()(plan, request.rank);
    return plan;
  }
  std::vector<dcp::RecordGroup> groups() const override { return inner->groups(); }
  std::vector<std::pair<std::string, dcp::Bytes>> extra_files() const override { return inner->extra_files(); }
  dcp::Scan scan(dcp::AnyMedium& medium, std::string const& path, dcp::CommitRecord const* record) const override { return inner->scan(medium, path, record); }
  dcp::FoundFile read_header(dcp::AnyMedium& medium, dcp::Scan const& scan, std::string const& file) const override { return inner->read_header(medium, scan, file); }
  dcp::Catalog assemble(dcp::Scan const& scan, std::vector<dcp::FoundFile> found, dcp::CommitRecord const* record) const override { return inner->assemble(scan, std::move(found), record); }
};
struct Sabotaged : dcp::BasicSafeTensors<dcp::Memory> {
  static std::unique_ptr<dcp::AnyStorage> open(Options const& options) { return std::make_unique<SabotagedDriver>(BasicSafeTensors::open(options)); }
};

void save_sabotaged(dcp::Memory const& store, std::uint64_t generation, Sabotage action, int ranks = 3) {
  sabotage() = std::move(action);
  dcp::run_threads(
      ranks,
      [&](dcp::ThreadComm& world) {
        GenerationState state{world};
        state.fill(generation);
        dcp::save<Sabotaged>(world, {store, "ckpt"}, state, {.if_exists = dcp::IfExists::replace, .threads = 1});
      },
      std::chrono::seconds{20});
}

std::uint64_t load_plain(dcp::Memory const& store) {
  dcp::SelfComm self;
  GenerationState state{self};
  state.scribble();
  dcp::load<dcp::BasicSafeTensors<dcp::Memory>>(self, {store, "ckpt"}, state);
  return state.generation();
}

}  // namespace

TEST_CASE("save: a plan by which a run has no writer, two writers, or another place on one rank ends in an error, and the old checkpoint stays") {
  dcp::Memory store;
  save_sabotaged(store, 1, {});
  REQUIRE(load_plain(store) == 1);
  struct Case {
    std::string name;
    std::function<void(dcp::FilePlan&, std::size_t)> damage;
  };
  std::vector<Case> const cases{
      {"nobody writes it", [](dcp::FilePlan& plan, std::size_t box) { plan.stored.erase(plan.stored.begin() + static_cast<std::ptrdiff_t>(box)); }},
      {"it is written twice", [](dcp::FilePlan& plan, std::size_t box) { plan.stored.insert(plan.stored.begin() + static_cast<std::ptrdiff_t>(box), plan.stored[box]); }},
      {"it is written elsewhere",
       [](dcp::FilePlan& plan, std::size_t box) {
         if (box > 0) plan.stored[box].offset -= 4;
         else plan.stored[box].offset += 4;
       }},
      {"a header is not written", [](dcp::FilePlan& plan, std::size_t) { plan.files[0].literals.clear(); }},
      {"a header is written twice", [](dcp::FilePlan& plan, std::size_t) {
         // Only the rank that writes a header has its text.
         if (!plan.files[0].literals.empty()) plan.files[0].literals.push_back(plan.files[0].literals[0]);
       }},
  };
  std::size_t errors = 0;
  for (auto const& one : cases)
    for (std::int64_t victim = 0; victim < 3; ++victim)
      for (std::size_t box = 0; box < 5; ++box) {
        std::string message;
        try {
          save_sabotaged(store, 2, [&](dcp::FilePlan& plan, std::int64_t rank) {
            if (plan.stored.size() != 5) throw std::logic_error{"the cases below count on five stored tensors"};
            if (rank == victim) one.damage(plan, box);
          });
        } catch (dcp::Error const& error) {
          message = error.what();
          ++errors;
        }
        CAPTURE(one.name);
        CAPTURE(victim);
        CAPTURE(box);
        // Damage to what this rank does not hold or write changes nothing; then the result is right.
        auto const found = load_plain(store);
        CHECK(found == (message.empty() ? 2 : 1));
        CHECK(store.list("/").size() == 1);
        if (found != 1) save_sabotaged(store, 1, {});
      }
  CHECK(errors > 30);
}

namespace {

/// A memory in which blocks remember who wrote them. Each rank has a handle of its own.
struct WatchedMemory : dcp::Memory {
  struct Watch {
    std::mutex mutex;
    std::map<std::pair<std::string, std::uint64_t>, int> writer;
    std::string violation;
    std::uint64_t writes = 0;
  };
  std::shared_ptr<Watch> watch;
  std::uint64_t block;
  int rank;
  WatchedMemory(dcp::Memory const& store, std::shared_ptr<Watch> shared, std::uint64_t block_size, int who) : Memory{store}, watch{std::move(shared)}, block{block_size}, rank{who} {}

  struct File final : dcp::WritableFile {
    std::unique_ptr<dcp::WritableFile> inner;
    std::string path;
    WatchedMemory& medium;
    File(std::unique_ptr<dcp::WritableFile> file, std::string name, WatchedMemory& of) : inner{std::move(file)}, path{std::move(name)}, medium{of} {}
    void write_at(std::uint64_t offset, dcp::ConstByteSpan bytes) override {
      {
        std::lock_guard const lock{medium.watch->mutex};
        ++medium.watch->writes;
        for (std::uint64_t b = offset / medium.block; !bytes.empty() && b <= (offset + bytes.size() - 1) / medium.block; ++b) {
          auto const [at, fresh] = medium.watch->writer.try_emplace({path, b}, medium.rank);
          if (!fresh && at->second != medium.rank)
            medium.watch->violation = "ranks " + std::to_string(at->second) + " and " + std::to_string(medium.rank) + " write block " + std::to_string(b) + " of " + path;
        }
      }
      inner->write_at(offset, bytes);
    }
    void resize(std::uint64_t size) override { inner->resize(size); }
    void sync() override { inner->sync(); }
    void close() override { inner->close(); }
  };
  std::unique_ptr<dcp::WritableFile> open_write(std::string const& path) { return std::make_unique<File>(Memory::open_write(path), path, *this); }
  std::uint64_t block_bytes(std::string const&) { return block; }
};
static_assert(dcp::Medium<WatchedMemory>);

}  // namespace

TEST_CASE("law: no two ranks write one block of a file, whatever layouts, block sizes and numbers of writers") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  std::uint64_t shared_files = 0;
  for (int round = 0; round < dcp::test::rounds(60, 2000); ++round) {
    dcp::test::Random random{seed + static_cast<std::uint64_t>(round)};
    CAPTURE(round);
    auto const ranks = static_cast<int>(random.between(2, 6));
    std::uint64_t const block = std::uint64_t{1} << random.between(9, 16);
    std::int64_t const writers = random.one_in(3) ? random.between(1, 3) : 16;
    std::vector<dcp::Layout> layouts;
    for (auto count = random.between(1, 6); count > 0; --count) {
      dcp::Layout layout;
      layout.mesh = dcp::test::mesh_of({ranks});
      if (ranks == 4 && random.one_in(2)) layout.mesh = dcp::test::mesh_of({2, 2});
      layout.shape = dcp::Extents{random.between(1, 300), random.between(1, 900)};
      layout.split_shape = layout.shape;
      layout.rules = dcp::test::any_rules(random, layout.mesh.axes, 2);
      layouts.push_back(layout);
    }
    bool const large_files = random.one_in(2);
    dcp::Memory store;
    auto const watch = std::make_shared<WatchedMemory::Watch>();
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      std::vector<dcp::Bytes> memory;
      dcp::StateDict state;
      for (std::size_t t = 0; t < layouts.size(); ++t) {
        auto const box = dcp::box_of_rank(layouts[t], world.rank());
        memory.emplace_back(4 * box->size() + 4, static_cast<std::byte>(t + 1));
        state.add_tensor("t" + std::to_string(t), dcp::DType::f32, layouts[t], {memory.back().data(), dcp::row_major_strides(box->shape)});
      }
      dcp::save<dcp::BasicSafeTensors<WatchedMemory>>(world, {WatchedMemory{store, watch, block, world.rank()}, "ckpt"}, state,
                                                      {.threads = 2, .writers_per_file = writers, .storage = {.max_file_bytes = large_files ? 5'000'000'000u : 300'000u}});
    });
    CHECK(watch->violation == "");
    std::map<std::string, std::map<int, int>> writers_of;
    for (auto const& [at, rank] : watch->writer) ++writers_of[at.first][rank];
    for (auto const& [path, by_rank] : writers_of) shared_files += by_rank.size() > 1 ? 1 : 0;
  }
  CHECK(shared_files >= 5);   // else there was nothing to watch
}

TEST_CASE("harness: two writers of one block are noticed") {
  dcp::Memory store;
  auto const watch = std::make_shared<WatchedMemory::Watch>();
  WatchedMemory first{store, watch, 4096, 0}, second{store, watch, 4096, 1};
  dcp::Bytes const bytes(3000);
  first.open_write("f")->write_at(0, bytes);
  second.open_write("f")->write_at(4096, bytes);
  CHECK(watch->violation == "");
  second.open_write("f")->write_at(3000, bytes);
  CHECK(watch->violation == "ranks 0 and 1 write block 0 of f");
}
