// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// The law that everything else serves: what ranks save in any layouts, other ranks load in any other layouts, bit for bit.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/reshard.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/random_parts.hpp"

#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

using Storage = dcp::BasicSafeTensors<dcp::Memory>;
using dcp::test::Generator, dcp::test::Subject;

std::byte byte_at(Subject const& subject, std::uint64_t position) {
  std::uint64_t x = position * 0x9E3779B97F4A7C15u + std::hash<std::string>{}(subject.name);
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9u;
  return static_cast<std::byte>(x >> 56);
}

std::vector<Subject> subjects_of(Generator& random) {
  std::vector<dcp::DType> const dtypes{dcp::DType::f32, dcp::DType::bf16, dcp::DType::u8, dcp::DType::i64, dcp::DType::f8_e4m3, dcp::DType::boolean, dcp::DType::c64, dcp::DType::f4, dcp::DType::f6_e3m2};
  std::vector<Subject> subjects;
  bool const large = random.chance(16);
  for (std::int64_t i = 0, count = 1 + random.up_to(8); i < count; ++i) {
    Subject subject{"layer." + std::to_string(i) + ".weight", random.pick(dtypes), random.shape(large)};
    if (dcp::bits_of(subject.dtype) < 8) {
      if (subject.shape.rank() == 0) subject.shape = dcp::Extents{8};
      subject.shape[subject.shape.rank() - 1] = (subject.shape[subject.shape.rank() - 1] + 7) / 8 * 8;
      if (subject.shape.rank() == 1) subject.shape = dcp::Extents{3, subject.shape[0]};
    }
    subjects.push_back(subject);
  }
  return subjects;
}

}  // namespace

TEST_CASE("law: a state saved on any mesh and placement loads on any other, bit for bit, and the bytes on the medium do not depend on the mesh") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(120, 3000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    auto const subjects = subjects_of(random);
    dcp::SafeTensorsOptions options;
    if (random.chance(30)) options.layout = dcp::FileLayout::sharded;
    if (random.chance(30)) options.max_file_bytes = 200;
    dcp::Memory store;
    std::vector<dcp::Bytes> first_files;
    for (int generation = 0; generation < 2; ++generation) {
      int const writers = static_cast<int>(1 + random.up_to(6)), readers = static_cast<int>(1 + random.up_to(6));
      auto const layouts_for = [&](int ranks) {
        std::vector<dcp::Layout> layouts;
        for (auto const& subject : subjects) layouts.push_back(random.layout(subject.shape, ranks, subject.dtype));
        return layouts;
      };
      auto const write_layouts = layouts_for(writers), read_layouts = layouts_for(readers);
      auto const pitch = static_cast<std::uint64_t>(random.up_to(2)), read_pitch = static_cast<std::uint64_t>(random.up_to(2));
      std::int64_t const writers_per_file = random.chance(25) ? 1 + random.up_to(2) : 16;
      int const threads = static_cast<int>(1 + random.up_to(2));
      bool const budget = random.chance(50);
      bool const shuffle = random.chance(50);
      CAPTURE(writers);
      CAPTURE(readers);
      std::mutex mutex;
      std::string problem;
      dcp::run_threads(writers, [&](dcp::ThreadComm& world) {
        dcp::StateDict state;
        auto held = dcp::test::hold(subjects, write_layouts, world.rank(), pitch, state);
        for (auto& part : held) part.visit([&](std::byte& byte, std::uint64_t at) { byte = byte_at(*part.subject, at); });
        dcp::StateDict turned;
        if (shuffle && world.rank() % 2 == 1)
          for (auto at = held.rbegin(); at != held.rend(); ++at) turned.add_tensor(at->subject->name, at->subject->dtype, at->layout, {at->memory.data(), at->strides});
        dcp::save<Storage>(world, {store, "run/ckpt"}, turned.empty() ? state : turned,
                           {.if_exists = dcp::IfExists::replace, .memory_bytes = budget ? dcp::least_memory_bytes : dcp::default_memory_bytes, .threads = threads, .writers_per_file = writers_per_file, .storage = options});
      });
      dcp::run_threads(readers, [&](dcp::ThreadComm& world) {
        dcp::StateDict state;
        auto held = dcp::test::hold(subjects, read_layouts, world.rank(), read_pitch, state);
        // Sub-meshes: a tensor may have no reader of this rank's; ranks without any still take part.
        auto const report = dcp::load<Storage>(world, {store, "run/ckpt"}, state, {.read_once = seed % 3 == 0, .threads = threads});
        std::string wrong;
        for (auto& part : held) {
          std::size_t untouched = part.memory.size();
          part.visit([&](std::byte& byte, std::uint64_t at) {
            if (byte != byte_at(*part.subject, at)) wrong = part.subject->name + " at byte " + std::to_string(at);
            --untouched;
            byte = std::byte{0xEE};
          });
          // Gaps and padding stay as they were.
          for (auto const byte : part.memory) if (byte != std::byte{0xEE}) wrong = part.subject->name + ": a byte outside the box was written";
          static_cast<void>(untouched);
        }
        std::lock_guard const lock{mutex};
        if (!wrong.empty()) problem = wrong;
        for (auto const& phase : report.phases)
          if (seed % 3 == 0 && phase.name == "read" && phase.bytes() != report.tensor_bytes) problem = "read " + std::to_string(phase.bytes()) + " bytes of " + std::to_string(report.tensor_bytes);
        if (report.unverified_bytes != 0) problem = "unverified bytes: " + std::to_string(report.unverified_bytes);
      });
      CHECK(problem == "");
      if (!problem.empty()) return;
      // One rank writes the same bytes as any number of ranks.
      dcp::SelfComm self;
      auto const all = dcp::load_from_keys<Storage>(self, {store, "run/ckpt"});
      for (auto const& subject : subjects) {
        auto const bytes = all.tensors().at(subject.name).bytes();
        bool same = true;
        for (std::size_t i = 0; i < bytes.size(); ++i) same = same && bytes[i] == byte_at(subject, i);
        CHECK(same);
      }
      if (options.layout == dcp::FileLayout::final) {
        std::vector<dcp::Bytes> files;
        dcp::MediumModel<dcp::Memory> medium{store};
        for (auto const& entry : medium.list("run/ckpt"))
          if (entry.name != dcp::record_name) files.push_back(dcp::read_file(medium, "run/ckpt/" + entry.name, 1u << 30));
        if (generation == 0) first_files = files;
        CHECK(files == first_files);
      }
      CHECK(dcp::MediumModel<dcp::Memory>{store}.list("run").size() == 1);
    }
  }
}

TEST_CASE("law: reshard moves any layout into any other, bit for bit") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(120, 3000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Generator random{seed};
    auto const subjects = subjects_of(random);
    int const ranks = static_cast<int>(1 + random.up_to(6));
    std::vector<dcp::Layout> from, to;
    for (auto const& subject : subjects) {
      from.push_back(random.layout(subject.shape, ranks, subject.dtype));
      to.push_back(random.layout(subject.shape, ranks, subject.dtype));
    }
    std::mutex mutex;
    std::string problem;
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::StateDict source, target;
      auto held = dcp::test::hold(subjects, from, world.rank(), 1, source);
      auto wanted = dcp::test::hold(subjects, to, world.rank(), 0, target);
      for (auto& part : held) part.visit([&](std::byte& byte, std::uint64_t at) { byte = byte_at(*part.subject, at); });
      dcp::reshard(world, source, target);
      for (auto& part : wanted)
        part.visit([&](std::byte& byte, std::uint64_t at) {
          std::lock_guard const lock{mutex};
          if (byte != byte_at(*part.subject, at)) problem = part.subject->name + " at byte " + std::to_string(at);
        });
    });
    CHECK(problem == "");
    if (!problem.empty()) return;
  }
}
